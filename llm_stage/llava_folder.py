"""LLaVA folders: what each stage writes, and the one way to load any of them, other people's included.

Three kinds, told apart by the files in them, never by their names:

    whole      config.json, model.safetensors, processor            an ordinary Hugging Face LLaVA (stage 2, full)
    adapter    adapter_config.json, adapter_model.safetensors       LoRA and the projector; encoder and LLM by reference (stage 2, LoRA)
    projector  projector.safetensors                                the projector alone; encoder and LLM by reference (stage 1)

Each kind of ours has mmkit_llava.json beside it (`LlavaCard`): the parts, how they were joined, the template of the chats, and the hashes
of the weight files. Folders in LLaVA's own layout (original_llava.py) and the checkpoints of a run (run_checkpoint.py) load the same way.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

from encoders.vision_towers import load_tower
from llm_stage.adapters import ADAPTER, load_adapter, merged, round_like_quantized
from llm_stage.llava import build_llava, check_image_tokens, with_resize
from llm_stage.llava_card import CARD, LlavaCard, check_files, read_card
from llm_stage.original_llava import fill_projector, is_original, load_original, projector_file
from llm_stage.run_checkpoint import is_checkpoint, load_checkpoint
from mmkit.checkpoint import atomic_folder, load_strict, load_weights, save_weights
from mmkit.errors import ConfigError, DataError
from mmkit.trainable import weights_hash

PROJECTOR = "projector.safetensors"

# -- writing ---------------------------------------------------------------------------------------------------------------------------


def save_llava(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, card: LlavaCard | None, folder: Path | str,
    *, state: Mapping[str, Tensor] | None = None, overwrite: bool = False, max_shard_size: str = "5GB",
) -> Path:  # fmt: skip
    """Write a whole Hugging Face LLaVA folder, complete or not at all.

    Args:
        model: The bare model.
        processor: Its processor.
        card: How it was made; None where that is not known.
        folder: The folder to make.
        state: Gathered weights, where the model's own are sharded (ZeRO-3).
        overwrite: Replace a folder of this name.
        max_shard_size: Largest weight file, as transformers writes sizes.
    """
    with atomic_folder(folder, overwrite=overwrite) as work:
        extra = {} if state is None else {"state_dict": dict(state)}
        model.save_pretrained(work, max_shard_size=max_shard_size, **extra)
        processor.save_pretrained(work)
        if card is not None:
            card.write(work, Path(folder))
    return Path(folder)


def save_projector(
    state: Mapping[str, Tensor], processor: LlavaProcessor | None, card: LlavaCard, folder: Path | str, *, overwrite: bool = False
) -> Path:
    """Write a stage-1 folder.

    Args:
        state: The weights of the model; only those of the projector are taken.
        processor: The model's processor, for others; None leaves it out, as loading makes it again from encoder and LLM.
        card: How it was made.
        folder: The folder to make.
        overwrite: Replace a folder of this name.
    """
    marker = "multi_modal_projector."
    projector = {name.split(marker, 1)[1]: tensor for name, tensor in state.items() if marker in name}
    if not projector:
        raise DataError("there is no projector among the weights to save: were they gathered on this rank?")
    with atomic_folder(folder, overwrite=overwrite) as work:
        save_weights(projector, work / PROJECTOR)
        if processor is not None:
            processor.save_pretrained(work)
        card.write(work, Path(folder))
    return Path(folder)


def save_adapter(
    model: PeftModel, processor: LlavaProcessor | None, card: LlavaCard, folder: Path | str,
    *, state: Mapping[str, Tensor] | None = None, overwrite: bool = False,
) -> Path:  # fmt: skip
    """Write LoRA and projector; encoder and LLM stay where the card says. Arguments as for `save_llava`."""
    with atomic_folder(folder, overwrite=overwrite) as work:
        # the embeddings are never trained here; "auto" would ask the hub for the base model's config to find out
        extra = {} if state is None else {"state_dict": dict(state)}
        model.save_pretrained(work, save_embedding_layers=False, **extra)
        (work / "README.md").unlink(missing_ok=True)  # peft's blank form of a model card
        if processor is not None:
            processor.save_pretrained(work)
        card.write(work, Path(folder))
    return Path(folder)


# -- loading ---------------------------------------------------------------------------------------------------------------------------


def load_llava(
    folder: Path | str, dtype: torch.dtype = torch.float32, *, merge: bool = True, encoder: str = "", llm: str = ""
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor, LlavaCard | None]:
    """Load any LLaVA folder: ours (whole, adapter, projector, checkpoint of a run), a stock one, or one in LLaVA's own layout.

    Args:
        folder: The folder.
        dtype: Of the weights.
        merge: Add a LoRA into the weights, which leaves the stock model; False keeps peft's model around it.
        encoder, llm: Where the parts are that a folder refers to; empty goes by its card, or what an original folder says.

    Returns:
        The model in eval mode, its processor, and its card (None for a stock folder).

    Raises:
        ConfigError: It is not a LLaVA folder; the message says what is in it.
        DataError: A file is missing, cut off or another one than was written (the message names it); weights are missing, superfluous,
            misshapen, or belong to another encoder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(f"there is no model folder {folder}: give what train_llava.py wrote (RUN/model) or a Hugging Face LLaVA folder")
    if is_checkpoint(folder):
        model, processor, made = load_checkpoint(folder, dtype)
        return finished(model, merge).to(dtype), processor, made
    if is_original(folder):
        return load_original(folder, dtype, merge=merge, encoder=encoder, llm=llm)
    card = read_card(folder)
    check_files(folder)
    if card is not None and ((folder / PROJECTOR).is_file() or (folder / ADAPTER).is_file()):
        card = replace(card, encoder=encoder or card.encoder, llm=llm or card.llm)
        return (*_load_parts(folder, card, dtype, merge), card)
    model = _load_whole(folder, dtype)
    processor = _load_processor(folder)
    check_image_tokens(model, processor)
    return model, processor, card


def finished(model: Any, merge: bool) -> Any:
    """A model in eval mode, its adapter, if it has one, added in where asked for."""
    return merged(model) if merge and isinstance(model, PeftModel) else model.eval()


def _load_whole(folder: Path, dtype: torch.dtype) -> LlavaForConditionalGeneration:
    config = folder / "config.json"
    if not config.is_file():
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        inside = [str(path.parent) for path in sorted(folder.glob("*/config.json")) if '"llava"' in path.read_text(encoding="utf-8")]
        hint = f"; did you mean {inside[0]}?" if inside else f", {CARD} with {PROJECTOR} or {ADAPTER}: give the folder RUN/model"
        raise ConfigError(f"{folder} is no LLaVA: in it are {found}; a LLaVA folder has a config.json{hint}")
    try:
        kind = json.loads(config.read_text(encoding="utf-8")).get("model_type")
    except ValueError as error:
        raise DataError(f"{config} is not JSON: {error}") from error
    if kind != "llava":
        raise ConfigError(f"{config} says model_type {kind!r}; here a LLaVA is needed. Encoders and LLMs go into train_llava.py")
    try:
        model, info = LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    except (OSError, RuntimeError, SafetensorError) as error:  # RuntimeError: misshapen weights
        raise DataError(f"the weights in {folder} could not be loaded: {error}") from error
    _refuse_gaps(info, str(folder))
    return model.eval()


def _refuse_gaps(info: Mapping[str, Any], source: str) -> None:
    said = []
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        names = sorted(map(str, info.get(kind) or []))
        if names:
            said.append(f"{len(names)} {kind.split('_')[0]} ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})")
    if said:
        raise DataError(f"the weights in {source} do not fill its config.json: {'; '.join(said)}. Take all files of one model")


def _load_processor(folder: Path) -> LlavaProcessor:
    try:
        processor = AutoProcessor.from_pretrained(folder, backend="pil")  # as in training; torchvision resizes a grey level off
    except (OSError, ValueError) as error:
        raise DataError(f"{folder} has no processor that loads: {str(error).splitlines()[0]}") from error
    if not isinstance(processor, LlavaProcessor):
        raise ConfigError(
            f"the processor in {folder} is a {type(processor).__name__}, by its processor_config.json; a LlavaProcessor is needed"
        )
    return processor


def _load_parts(folder: Path, card: LlavaCard, dtype: torch.dtype, merge: bool) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    tower = with_resize(load_tower(card.encoder), card.resize)
    found = weights_hash(tower)  # before the cast to dtype
    if found != card.encoder_hash:
        raise DataError(
            f"{folder} was trained with an encoder whose weights hash to {card.encoder_hash[:12]}; {card.encoder} now has {found[:12]}. "
            "Give it back its encoder, or train stage 1 and 2 again with this one"
        )
    model, processor = build_llava(tower, card.llm, card.projector, card.feature_layer, card.select, dtype=dtype)
    if (folder / PROJECTOR).is_file():
        load_projector(model, folder)
        return model, processor
    if card.quantization:
        round_like_quantized(model.model.language_model, card.quantization)
    return finished(load_adapter(model, folder), merge).to(dtype), processor


def load_projector(model: LlavaForConditionalGeneration, source: Path | str) -> LlavaCard | None:
    """Fill a model's projector from a stage-1 folder, or from LLaVA's mm_projector.bin or a folder with one.

    Returns:
        The folder's card; None for a file of LLaVA's.

    Raises:
        ConfigError: There is none, or its projector was trained between parts of other widths or behind another encoder.
        DataError: The file does not fit.
    """
    folder = Path(source)
    path, card = folder / PROJECTOR, read_card(folder)
    original = projector_file(folder)
    if original is not None and not path.is_file():
        fill_projector(model, load_weights(original), str(original))
        return None
    if card is None or not path.is_file():
        raise ConfigError(
            f"{folder} has no {PROJECTOR} and {CARD}: give the model folder of a stage-1 run (RUN/model), or LLaVA's mm_projector.bin"
        )
    check_files(folder)
    state = load_weights(path)
    projector = model.model.multi_modal_projector
    given, needed = list(state["linear_1.weight"].shape), list(projector.linear_1.weight.shape)
    if given != needed:
        raise ConfigError(
            f"the projector in {folder} leads from width {given[1]} (encoder {card.encoder}) to width {given[0]} (LLM {card.llm}); here it "
            f"would have to lead from {needed[1]} to {needed[0]}.\n  Train stage 1 again with these parts, or name the old ones: "
            f"--encoder {card.encoder} --llm {card.llm}"
        )
    load_strict(projector, state, str(path))
    return card
