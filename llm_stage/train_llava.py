"""Train LLaVA, one stage at a time: 1 the projector alone, 2 projector and LLM (all of it, or LoRA). The encoder sleeps in both.

    python llm_stage/train_llava.py --recipe mini_stage1 --encoder runs/uta/encoder --json data/llava/pretrain.json --images data/images \
        --output_dir runs/stage1
    python llm_stage/train_llava.py --recipe mini_stage2 --encoder runs/uta/encoder --pretrained runs/stage1/model \
        --json data/llava/instruct.json --images data/images --output_dir runs/stage2
    deepspeed --num_gpus 8 llm_stage/train_llava.py --recipe llava_v15_stage2 ...

Source: Visual Instruction Tuning (LLaVA, v1) and Improved Baselines with Visual Instruction Tuning (v1.5).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from encoders.catalog import load_encoder
from llm_stage.chat_format import ChatFormat
from llm_stage.conversations import ConversationDataset, check, collate
from llm_stage.llava import build_llava, label_tokens, set_stage, supervised_loss, tower_geometry, with_dummy_row
from llm_stage.llava_folder import LlavaCard, load_llava, load_projector, read_card, save_adapter, save_llava, save_projector
from llm_stage.llms import load_llm
from mmkit.config import cli_entry, load_config
from mmkit.errors import ConfigError, DataError
from mmkit.optim import cosine_schedule, param_groups
from mmkit.run import Run, RunConfig
from mmkit.trainable import trainable_table, weights_hash

RECIPES = Path(__file__).parent / "recipes"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class DataSettings:
    """What is trained on."""

    json: str = field(default="", metadata={"help": "LLaVA JSON or JSONL: id, image, conversations"})
    images: str = field(default="", metadata={"help": "folder that the rows' image paths are relative to"})
    max_length: int = field(default=2048, metadata={"help": "tokens per row, images included; whole trailing rounds are cut, images never"})
    on_bad_sample: Literal["error", "skip"] = field(default="error", metadata={"help": "skip counts and lists them instead"})
    check: bool = field(default=True, metadata={"help": "encode all rows once before the start, to name the bad ones and count labels"})


@dataclass
class LoraSettings:
    """Low-rank adapters in the LLM, in stage 2."""

    rank: int = field(default=0, metadata={"help": "0 trains the whole LLM"})
    alpha: int = field(default=16, metadata={"help": "scale is alpha / rank"})
    dropout: float = field(default=0.0, metadata={"help": "before the adapters"})
    # peft's own "all-linear" would also hit tower and projector
    targets: str = field(
        default=r".*language_model.*\.(q|k|v|o|gate|up|down)_proj", metadata={"help": "regular expression over module names"}
    )


@dataclass
class LlavaSettings:
    """One stage of LLaVA."""

    stage: Literal[1, 2] = field(default=1, metadata={"help": "1 trains the projector, 2 projector and LLM"})
    encoder: str = field(default="", metadata={"help": "name or folder; stage 2 takes that of --pretrained if empty"})
    llm: str = field(default="", metadata={"help": "name or folder; stage 2 takes that of --pretrained if empty"})
    pretrained: str = field(default="", metadata={"help": "model folder of a stage-1 run, whose projector is taken over"})
    projector: Literal["mlp2x_gelu", "linear"] = field(default="mlp2x_gelu", metadata={"help": "LLaVA-v1.5's, LLaVA-v1's"})
    feature_layer: int = field(default=-2, metadata={"help": "hidden state of the encoder that is read"})
    select: Literal["auto", "default", "full"] = field(default="auto", metadata={"help": "default drops the CLS token, full keeps all"})
    template: str = field(default="own", metadata={"help": "plain, vicuna_v1, llama_2, chatml, or own: the tokenizer's"})
    system: str | None = field(default=None, metadata={"help": "system prompt in place of the template's"})
    lr: float = field(default=2e-5, metadata={"help": "peak, of the LLM or its LoRA (stage 2)"})
    projector_lr: float = field(default=1e-3, metadata={"help": "peak, of the projector"})
    weight_decay: float = field(default=0.0, metadata={"help": "AdamW's, on matrices"})
    warmup: float = field(default=0.03, metadata={"help": "share of the steps (below 1), or steps"})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "of the LLM only: less memory, a third more time"})
    weights: Literal["fp32", "bf16"] = field(default="fp32", metadata={"help": "dtype of all weights; bf16 halves frozen parts too"})
    check_saving: bool = field(default=True, metadata={"help": "at step 0 save and reload everything, compare the loss"})
    data: DataSettings = field(default_factory=DataSettings)
    lora: LoraSettings = field(default_factory=LoraSettings)
    run: RunConfig = field(default_factory=RunConfig)

    def validate(self) -> None:
        """Refuse what cannot be trained.

        Raises:
            ConfigError: The message names the setting.
        """
        if not (self.pretrained or (self.encoder and self.llm)):
            raise ConfigError("which parts? --encoder NAME_OR_FOLDER and --llm NAME_OR_FOLDER, or in stage 2 --pretrained STAGE1_RUN/model")
        if not self.data.json:
            raise ConfigError("which data? --json FILE (LLaVA JSON) and --images FOLDER; `mmkit data mini --out DIR` makes a small set")
        if self.stage == 1 and self.lora.rank:
            raise ConfigError(f"stage 1 trains the projector alone; lora.rank {self.lora.rank} is for stage 2")
        if self.lora.rank < 0 or self.data.max_length < 1:
            raise ConfigError(f"lora.rank {self.lora.rank}, data.max_length {self.data.max_length}: rank is 0 or more, length 1 or more")


def main(argv: Sequence[str] | None = None) -> Path:
    """Train one stage.

    Args:
        argv: The command line; None is `sys.argv[1:]`.

    Returns:
        The run folder; the result is in its `model/`, which `ChatModel.load` takes.
    """
    settings = load_config(LlavaSettings, argv, recipe_dir=RECIPES)
    parts = assemble(settings)  # before the run folder is made: a wrong name leaves nothing behind
    dataset = make_dataset(settings, parts)
    model: Any = parts.model
    set_stage(model, train_llm=settings.stage == 2)
    if settings.gradient_checkpointing:
        checkpoint_llm(model)
    if settings.lora.rank:
        model = add_lora(model, settings)
    groups = param_groups(model, settings.lr, settings.weight_decay, lr_by_pattern={"*multi_modal_projector*": settings.projector_lr})
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8)
    run = Run(settings.run, name=f"llava stage {settings.stage}", settings=settings)
    run.print(trainable_table(model, parts.table(), parts.origins))
    held = DTYPES[settings.run.precision] if run.deepspeed and settings.run.precision != "fp32" else None  # DeepSpeed casts all weights
    frozen = frozen_hashes(parts, settings, dtype=held) if run.is_main else {}
    batch_of = partial(make_batch, parts=parts)
    if settings.check_saving and run.is_main and not run.step:
        items = (dataset[i] for i in range(len(dataset)))
        check_saving(model, parts, settings, batch_of([next(item for item in items if item is not None)]), run.folder)
    wrapped, optimizer = run.prepare(model, optimizer)
    run.set_schedule(cosine_schedule(run.plan(dataset), warmup=settings.warmup))
    for batch in run.batches(dataset, batch_of, weigh=label_tokens):
        loss, _ = supervised_loss(wrapped, batch)
        run.backward(loss)
        run.log(loss=loss)
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
    card = LlavaCard(
        encoder=settings.encoder, llm=settings.llm, encoder_hash="", projector=settings.projector, feature_layer=settings.feature_layer,
        select=settings.select, template=settings.template, system=settings.system, stage=settings.stage,
    )  # fmt: skip
    origins = {"vision_tower": settings.encoder, "language_model": settings.llm, "lm_head": settings.llm, "projector": "new"}
    if settings.pretrained:
        card = _agree(card, settings)
        origins = {"vision_tower": card.encoder, "language_model": card.llm, "lm_head": card.llm, "projector": settings.pretrained}
    tower = load_encoder(card.encoder)
    card = replace(card, encoder_hash=weights_hash(tower), encoder_card=_describe(tower, card.encoder))
    language, tokenizer = load_llm(card.llm, DTYPES[settings.weights])
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
    if earlier is None:
        raise ConfigError(f"--pretrained {settings.pretrained} is no stage-1 folder of mmkit: give RUN/model of a stage-1 run")
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
    model, data = parts.model, settings.data
    if data.check and int(os.environ.get("RANK", 0)) == 0:
        found = check(data.json, data.images or None, parts.chat_format, model.config.image_seq_length, data.max_length, decode=False)
        print(f"{data.json}: {found}", flush=True)
        if found.bad and data.on_bad_sample == "error":
            raise DataError(
                f"{len(found.bad)} of {found.rows} rows are bad, the first: {found.bad[0]}\n  --on_bad_sample skip leaves them out, counted"
            )
    return ConversationDataset(
        settings.data.json, settings.data.images, parts.chat_format, tower_geometry(model.model.vision_tower).spec,
        model.config.image_seq_length, settings.data.max_length, settings.data.on_bad_sample,
    )  # fmt: skip


def make_batch(items: list[Any], parts: Parts) -> dict[str, Any]:
    """Pad and stack, and see to it that every micro-batch has an image."""
    pad = parts.processor.tokenizer.pad_token_id
    size = tower_geometry(parts.model.model.vision_tower).spec.size
    config = parts.model.config
    return with_dummy_row(collate(items, pad, config.image_token_id, config.image_seq_length), config, size, pad)


def checkpoint_llm(model: LlavaForConditionalGeneration) -> None:
    """Recompute the LLM's layers in the backward pass. Not the tower's: it has none."""
    llm = model.model.language_model
    llm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    llm.__dict__.pop("train", None)  # stage 1 froze it in eval mode, in which nothing is recomputed
    dropouts = [name for name, module in llm.named_modules() if isinstance(module, torch.nn.Dropout) and module.p > 0]
    if not any(parameter.requires_grad for parameter in llm.parameters()) and (
        dropouts or bool(getattr(llm.config, "attention_dropout", 0))
    ):
        raise ConfigError("gradient_checkpointing would wake the frozen LLM's dropout in stage 1: set its dropout to 0, or switch this off")


def add_lora(model: LlavaForConditionalGeneration, settings: LlavaSettings) -> PeftModel:
    """Put adapters into the LLM and freeze the rest of it; the projector is trained whole and saved with them."""
    lora = settings.lora
    torch.manual_seed(settings.run.seed)
    model.requires_grad_(False)
    adapted = get_peft_model(
        model,
        LoraConfig(
            r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=lora.targets,
            modules_to_save=["multi_modal_projector"], task_type="CAUSAL_LM",
        ),
    )  # fmt: skip
    if model.config.projector_hidden_act == "linear":
        for name, parameter in adapted.named_parameters():
            if "multi_modal_projector" in name and "linear_2" in name:
                parameter.requires_grad_(False)
    return adapted


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


def check_saving(model: Any, parts: Parts, settings: LlavaSettings, batch: dict[str, Any], folder: Path) -> None:
    """Save and reload everything before the first step, so that nothing fails after the last one.

    Raises:
        DataError: The reloaded model has another loss.
    """
    trial = folder / ".saving"
    shutil.rmtree(trial, ignore_errors=True)
    try:
        save_result(model, parts, settings, trial, None, 0)
        again, _, _ = load_llava(trial, DTYPES[settings.weights], merge=False)
        training = {module: module.training for module in model.modules()}
        model.eval()
        with torch.no_grad():
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
