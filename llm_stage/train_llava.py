"""Train LLaVA, one stage at a time: 1 the projector alone, 2 projector and LLM (all of it, or LoRA). The encoder sleeps in both.

    python llm_stage/train_llava.py --recipe mini_stage1 --encoder runs/uta/encoder --json data/llava/pretrain.json --images data/images \
        --output_dir runs/stage1
    python llm_stage/train_llava.py --recipe mini_stage2 --encoder runs/uta/encoder --pretrained runs/stage1/model \
        --json data/llava/instruct.json --images data/images --output_dir runs/stage2
    deepspeed --num_gpus 8 llm_stage/train_llava.py --recipe llava_v15_stage2 ...        also _lora, _qlora, and for other LLMs (recipes/)

Source: Visual Instruction Tuning (LLaVA, v1) and Improved Baselines with Visual Instruction Tuning (v1.5).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from encoders.vision_towers import at_size, load_tower
from llm_stage.chat_format import ChatFormat
from llm_stage.conversations import ConversationDataset, check, collate
from llm_stage.llava import build_llava, set_stage, supervised_loss, tower_geometry, with_dummy_row, with_resize
from llm_stage.llava_folder import LlavaCard, load_llava, load_projector, read_card, save_adapter, save_llava, save_projector
from llm_stage.llava_settings import DTYPES, LlavaSettings
from llm_stage.llms import load_llm
from llm_stage.original_flags import settings_argv
from llm_stage.original_llava import projector_file
from llm_stage.packing import check_packing, packed_batch, row_budget
from llm_stage.throughput import Throughput
from llm_stage.tiles import Tiles
from llm_stage.tower_features import CachedImages, TowerFeatures, cached_images, feature_key
from llm_stage.tuning import add_lora, checkpoint_llm, compile_llm, keep_trained_in_fp32, use_liger
from mmkit.config import cli_entry, load_config
from mmkit.errors import ConfigError, DataError
from mmkit.feature_cache import check_cache
from mmkit.images import ImageError
from mmkit.optim import cosine_schedule, param_groups
from mmkit.run import Run
from mmkit.trainable import trainable_table, weights_hash

RECIPES = Path(__file__).parent / "recipes"


def main(argv: Sequence[str] | None = None) -> Path:
    """Train one stage.

    Args:
        argv: The command line; None is `sys.argv[1:]`.

    Returns:
        The run folder; the result is in its `model/`, which `ChatModel.load` takes.
    """
    settings = load_config(LlavaSettings, settings_argv(argv), recipe_dir=RECIPES)
    parts = assemble(settings)  # before the run folder is made: a wrong name leaves nothing behind
    dataset = make_dataset(settings, parts)
    if settings.data.feature_cache and not settings.data.rebuild_cache:
        check_cache(settings.data.feature_cache)
    model = choose_trained(parts, settings)
    groups = param_groups(model, settings.lr, settings.weight_decay, lr_by_pattern={"*multi_modal_projector*": settings.projector_lr})
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8)
    torch.set_float32_matmul_precision("high" if settings.tf32 else "highest")
    run = Run(settings.run, name=f"llava stage {settings.stage}", settings=settings)
    run.print(trainable_table(model, parts.table(), parts.origins))
    if run.is_main:
        parts.card.write(run.folder, run.folder, files=False)  # what a checkpoint needs, besides config.yaml, to be loaded alone
    held = DTYPES[settings.run.precision] if run.deepspeed and settings.run.precision != "fp32" else None  # DeepSpeed casts all weights
    frozen = frozen_hashes(parts, settings, dtype=held) if run.is_main else {}
    batch_of = partial(make_batch, parts=parts, budget=pack_budget(settings, parts))
    if settings.check_saving and run.is_main and not run.step:
        first = next(item for item in (dataset[i] for i in range(len(dataset))) if item is not None)
        check_saving(model, parts, settings, batch_of([first]), run)
    if settings.liger:
        use_liger(parts.model, run.device)
    if settings.compile:
        compile_llm(parts.model)
    if settings.data.feature_cache:
        dataset.image_source = open_cache(settings, parts, dataset, run)
        batch_of = partial(batch_of, blank=dataset.image_source.blank())
    wrapped, optimizer = run.prepare(model, optimizer)
    if settings.data.pack:
        with run.accelerator.autocast():
            check_packing(parts.model.model.language_model)
    run.set_schedule(cosine_schedule(run.plan(dataset), warmup=settings.warmup))
    speed = Throughput(parts.model, run, settings.peak_tflops)
    for batch in run.batches(dataset, batch_of, weigh=speed.weigh):
        loss, _ = supervised_loss(wrapped, batch)
        run.backward(loss)
        run.log(loss=loss, **speed.terms())
    run.print(speed.summary())
    state = run.weights()  # on all ranks
    if run.is_main:
        check_frozen(frozen, frozen_hashes(parts, settings, state))
        save_result(run.unwrap(), parts, settings, run.folder / "model", state, run.step)
    folder = run.finish()
    run.print(f"llava stage {settings.stage}: the model is in {folder / 'model'}")
    return folder


# -- parts -----------------------------------------------------------------------------------------------------------------------------


@dataclass
class Parts:
    """The assembled model and what it was made from."""

    model: LlavaForConditionalGeneration
    processor: LlavaProcessor
    chat_format: ChatFormat
    card: LlavaCard
    origins: dict[str, str]

    def table(self) -> dict[str, torch.nn.Module]:
        """The parts by name, for the table printed at the start."""
        inner = self.model.model
        return {
            "vision_tower": inner.vision_tower, "projector": inner.multi_modal_projector,
            "language_model": inner.language_model, "lm_head": self.model.lm_head,
        }  # fmt: skip


def assemble(settings: LlavaSettings) -> Parts:
    """Load encoder and LLM, join them, take over a stage-1 projector.

    Raises:
        ConfigError: The stage-1 folder was made with other parts than these.
    """
    encoder = at_size(settings.encoder, settings.image_size) if settings.image_size and settings.encoder else settings.encoder
    card = LlavaCard(
        encoder=encoder, llm=settings.llm, encoder_hash="", projector=settings.projector, feature_layer=settings.feature_layer,
        select=settings.select, template=settings.template, system=settings.system, stage=settings.stage, resize=settings.resize,
        tiles=settings.tiles, quantization=settings.quantization,
    )  # fmt: skip
    origins = {"vision_tower": encoder, "language_model": settings.llm, "lm_head": settings.llm, "projector": "new"}
    if settings.pretrained:
        card = _agree(card, settings)
        origins = {"vision_tower": card.encoder, "language_model": card.llm, "lm_head": card.llm, "projector": settings.pretrained}
    tower = with_resize(load_tower(card.encoder), card.resize)
    card = replace(card, encoder_hash=weights_hash(tower), encoder_card=_describe(tower, card.encoder))
    language, tokenizer = load_llm(card.llm, DTYPES[settings.weights], attention=settings.attention, quantization=settings.quantization)
    chat_format = ChatFormat(tokenizer, settings.template, system=settings.system)
    model, processor = build_llava(
        tower, (language, tokenizer), card.projector, card.feature_layer, card.select,
        stop_ids=chat_format.stop_ids, dtype=DTYPES[settings.weights], seed=settings.run.seed,
    )  # fmt: skip
    if settings.pretrained:
        load_projector(model, settings.pretrained)
    return Parts(model, processor, chat_format, card, origins)


def _agree(card: LlavaCard, settings: LlavaSettings) -> LlavaCard:
    """Fill what was left open from the stage-1 folder, and hold the rest against it."""
    earlier = read_card(Path(settings.pretrained))
    if earlier is None and projector_file(Path(settings.pretrained)) is not None:  # LLaVA's mm_projector.bin says nothing of its parts
        if not (settings.encoder and settings.llm):
            raise ConfigError(f"{settings.pretrained} is a projector of LLaVA's own, alone: say its --encoder and --llm as well")
        return card
    if earlier is None:
        raise ConfigError(
            f"--pretrained {settings.pretrained} is no stage-1 folder of mmkit (RUN/model of a stage-1 run) and no mm_projector.bin"
        )
    for name in ("projector", "feature_layer", "select"):
        if getattr(earlier, name) != getattr(card, name):
            raise ConfigError(
                f"{settings.pretrained} was trained with {name} {getattr(earlier, name)}, the settings say {getattr(card, name)}: "
                f"set --{name} {getattr(earlier, name)}, or train stage 1 again"
            )
    return replace(card, encoder=card.encoder or earlier.encoder, llm=card.llm or earlier.llm)


def _describe(tower: Any, source: str) -> dict[str, Any]:
    geometry = tower_geometry(tower)
    found = {
        "source": source if not Path(source).is_dir() else Path(source).name,
        "width": tower.config.hidden_size, "image_size": geometry.spec.size, "patches": geometry.num_patches,
    }  # fmt: skip
    return {**found, **{key: getattr(tower.config, key) for key in ("architecture", "origin") if getattr(tower.config, key, None)}}


def make_dataset(settings: LlavaSettings, parts: Parts) -> Any:
    """The conversations as training examples, checked once, by the first process.

    Raises:
        DataError: Rows are bad and on_bad_sample is "error"; nothing was written so far.
    """
    model, data, spec = parts.model, settings.data, tower_geometry(parts.model.model.vision_tower).spec
    tiles = Tiles(settings.tiles, spec) if settings.tiles else None
    if data.check and int(os.environ.get("RANK", 0)) == 0:
        found = check(data.json, data.images or None, parts.chat_format, model.config.image_seq_length, data.max_length, False, tiles)
        print(f"{data.json}: {found}", flush=True)
        if found.bad and data.on_bad_sample == "error":
            raise DataError(
                f"{len(found.bad)} of {found.rows} rows are bad, the first: {found.bad[0]}\n  --on_bad_sample skip leaves them out, counted"
            )
    return ConversationDataset(
        settings.data.json, settings.data.images, parts.chat_format, spec, model.config.image_seq_length, settings.data.max_length,
        settings.data.on_bad_sample, tiles,
    )  # fmt: skip


def open_cache(settings: LlavaSettings, parts: Parts, dataset: ConversationDataset, run: Run) -> CachedImages:
    """Have the features of all pictures of the data on disk before the first step; the encoder then runs no more.

    Raises:
        DataError: A picture cannot be read and on_bad_sample is "error", or the cache is damaged.
        ConfigError: The disk has no room.
    """
    data = settings.data
    cast = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(settings.run.precision) if run.deepspeed else None
    compute = TowerFeatures(parts.model, run.device, run.accelerator.autocast, cast)
    spec = tower_geometry(parts.model.model.vision_tower).spec
    wanted = {name: item.where for item in reversed(dataset.conversations) for name in item.images}  # the first row that wants it
    images = cached_images(
        data.feature_cache, compute, feature_key(compute, parts.card.encoder_hash, spec, data.feature_dtype), wanted,
        Path(data.images), spec, batch_size=settings.run.micro_batch_size, workers=settings.run.num_workers, rebuild=data.rebuild_cache,
        rank=run.rank, ranks=run.world_size,
    )  # fmt: skip
    if images.broken and data.on_bad_sample == "error":
        message = next(iter(images.broken.values()))
        raise ImageError(f"{message}\n  {len(images.broken)} picture(s) in all; --data.on_bad_sample skip leaves their rows out, counted")
    return images


def pack_budget(settings: LlavaSettings, parts: Parts) -> int:
    """Tokens of a packed row; 0 where rows are padded."""
    data = settings.data
    return row_budget(parts.model.model.language_model, data.pack_length or data.max_length) if data.pack else 0


def make_batch(items: list[Any], parts: Parts, budget: int = 0, blank: Tensor | None = None) -> dict[str, Any]:
    """Pad (or pack into rows of `budget` tokens) and stack, and see to it that every micro-batch has an image.

    Args:
        items: Examples of `ConversationDataset`.
        parts: The model and its processor.
        budget: Tokens of a packed row; 0 pads.
        blank: What stands for the image of a micro-batch without any, where features [1, N, C] come from the cache; None is zero pixels.
    """
    pad = parts.processor.tokenizer.pad_token_id
    size = tower_geometry(parts.model.model.vision_tower).spec.size
    config = parts.model.config
    if budget:
        width = config.text_config.hidden_size
        batch = packed_batch(items, pad, config.image_token_id, config.image_seq_length, size, budget, width)
    else:
        batch = with_dummy_row(collate(items, pad, config.image_token_id, config.image_seq_length), config, size, pad)
    if blank is not None and not any(item.get("images") for item in items):
        batch["pixel_values"] = blank
    return batch


def choose_trained(parts: Parts, settings: LlavaSettings) -> Any:
    """Freeze what this stage does not train, and add what it trains besides; with LoRA the result is peft's model around ours."""
    model: Any = parts.model
    set_stage(model, train_llm=settings.stage == 2)
    if settings.gradient_checkpointing:
        checkpoint_llm(model)
    if settings.lora.rank:
        model = add_lora(model, settings.lora, settings.run.seed)
    if settings.run.precision != "fp32":
        keep_trained_in_fp32(model)
    return model


# -- proofs ----------------------------------------------------------------------------------------------------------------------------


def frozen_hashes(
    parts: Parts, settings: LlavaSettings, state: Mapping[str, Tensor] | None = None, dtype: torch.dtype | None = None
) -> dict[str, str]:
    """Hashes of the parts that this stage must not change: as they are, cast to `dtype`, or as they are in the gathered weights."""
    inner = parts.model.model
    frozen = {"vision_tower": inner.vision_tower, **({"language_model": inner.language_model} if settings.stage == 1 else {})}
    if state is None:
        return {name: weights_hash(part, dtype) for name, part in frozen.items()}
    found: dict[str, dict[str, Tensor]] = {name: {} for name in frozen}
    for key, tensor in state.items():
        for name in frozen:
            if (marker := f"model.{name}.") in key:
                found[name][key.split(marker, 1)[1]] = tensor
    return {name: weights_hash(part) for name, part in found.items()}


def check_frozen(before: Mapping[str, str], after: Mapping[str, str]) -> None:
    """Prove that frozen parts did not change by a bit.

    Raises:
        DataError: One did. That is a fault of the program or of the memory; the result is not written.
    """
    changed = [name for name in after if before.get(name) != after[name]]
    if changed:
        raise DataError(f"{', '.join(changed)} changed during a training in which it is frozen: not saved; the checkpoints are there")


def check_saving(model: Any, parts: Parts, settings: LlavaSettings, batch: dict[str, Any], run: Run) -> None:
    """Save and reload everything before the first step, so that nothing fails after the last one.

    Raises:
        DataError: The reloaded model has another loss.
    """
    trial = run.folder / ".saving"
    shutil.rmtree(trial, ignore_errors=True)
    try:
        save_result(model, parts, settings, trial, None, 0)
        again, _, _ = load_llava(trial, DTYPES[settings.weights], merge=False)
        device = run.device if settings.quantization else torch.device("cpu")  # 4-bit weights were put there when they were loaded
        model, again, batch = model.to(device), again.to(device), send_to_device(batch, device)
        training = {module: module.training for module in model.modules()}
        model.eval()
        with torch.no_grad(), run.accelerator.autocast():  # what is trained may be in another dtype than the rest
            batch = {**batch, "pixel_values": batch["pixel_values"].to(DTYPES[settings.weights])}
            before, after = float(supervised_loss(model, batch)[0]), float(supervised_loss(again, batch)[0])
        for module, mode in training.items():
            module.training = mode
        if abs(before - after) > 1e-4 * max(1.0, abs(before)):  # the same weights on the same device: equal up to the order of sums
            raise DataError(f"the model saved and loaded at step 0 has loss {after:.6f} instead of {before:.6f}: it is not what was saved")
    finally:
        shutil.rmtree(trial, ignore_errors=True)


def save_result(model: Any, parts: Parts, settings: LlavaSettings, folder: Path, state: Mapping[str, Tensor] | None, step: int) -> None:
    """Write the stage's result; see llava_folder for the three kinds."""
    card = replace(parts.card, training={"data": Path(settings.data.json).name, "steps": step, "seed": settings.run.seed})
    if settings.stage == 1:
        save_projector(state or model.state_dict(), parts.processor, card, folder, overwrite=True)
    elif settings.lora.rank:
        save_adapter(model, parts.processor, card, folder, state=state, overwrite=True)
    else:
        save_llava(model, parts.processor, card, folder, state=state, overwrite=True)


if __name__ == "__main__":
    cli_entry(main)
