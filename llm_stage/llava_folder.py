"""LLaVA folders: what each stage writes, and the one way to load any of them, other people's included.

Three kinds, told apart by the files in them, never by their names:

    whole      config.json, model.safetensors, processor            an ordinary Hugging Face LLaVA (stage 2, full)
    adapter    adapter_config.json, adapter_model.safetensors       LoRA and the projector; encoder and LLM by reference (stage 2, LoRA)
    projector  projector.safetensors                                the projector alone; encoder and LLM by reference (stage 1)

Each kind of ours has mmkit_llava.json beside it (`LlavaCard`): the parts, how they were joined, and the template of the chats.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

from encoders.vision_towers import folders, load_tower, with_folders
from llm_stage.llava import build_llava, check_image_tokens
from mmkit.checkpoint import atomic_folder, load_strict, load_weights, save_weights
from mmkit.errors import ConfigError, DataError
from mmkit.trainable import weights_hash

CARD = "mmkit_llava.json"
PROJECTOR = "projector.safetensors"
ADAPTER = "adapter_config.json"


@dataclass(frozen=True)
class LlavaCard:
    """How a LLaVA was put together.

    Attributes:
        encoder, llm: Names or folders, as given to `build_llava`; folders are found relative to the card, then as they were given.
        encoder_hash: Of the tower's weights (`weights_hash`): another encoder under the same name is refused.
        projector, feature_layer, select: As for `build_llava`.
        template, system: Of `ChatFormat`.
        stage: 1 or 2.
        encoder_card: What is known of the encoder: its origin, width, image size, tokens.
        training: Data and steps, for people.
    """

    encoder: str
    llm: str
    encoder_hash: str
    projector: str = "mlp2x_gelu"
    feature_layer: int = -2
    select: Literal["auto", "default", "full"] = "auto"
    template: str = "own"
    system: str | None = None
    stage: int = 1
    encoder_card: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)

    def write(self, folder: Path, home: Path) -> None:
        """Write the card into `folder`, whose final place is `home`."""
        values = asdict(self)
        for key in ("encoder", "llm"):
            if Path(values[key]).is_dir():
                values[f"{key}_folder"] = os.path.relpath(values[key], home)
                values[key] = str(Path(values[key]).absolute())
        if parts := folders(self.encoder) if not Path(self.encoder).is_dir() else []:  # several encoders, or one at another image size
            values["encoder_parts"] = {str(Path(part).absolute()): os.path.relpath(part, home) for part in parts}
            values["encoder"] = with_folders(self.encoder, lambda part: str(Path(part).absolute()))
        (folder / CARD).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def read_card(folder: Path) -> LlavaCard | None:
    """The card of a folder, with its references resolved; None where there is none (a folder that mmkit did not write).

    Raises:
        DataError: It is broken.
    """
    path = folder / CARD
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        for key in ("encoder", "llm"):
            near = values.pop(f"{key}_folder", None)
            if near is not None and (folder / near).is_dir():
                values[key] = os.path.normpath(folder / near)
        for absolute, near in values.pop("encoder_parts", {}).items():
            if (folder / near).is_dir():
                values["encoder"] = values["encoder"].replace(absolute, os.path.normpath(folder / near))
        return LlavaCard(**values)
    except (ValueError, TypeError) as error:
        raise DataError(f"{path} is not a card that this version of mmkit wrote: {error}") from error


# -- writing ---------------------------------------------------------------------------------------------------------------------------


def save_llava(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, card: LlavaCard, folder: Path | str,
    *, state: Mapping[str, Tensor] | None = None, overwrite: bool = False,
) -> Path:  # fmt: skip
    """Write a whole Hugging Face LLaVA folder, complete or not at all.

    Args:
        model: The bare model.
        processor: Its processor.
        card: How it was made.
        folder: The folder to make.
        state: Gathered weights, where the model's own are sharded (ZeRO-3).
        overwrite: Replace a folder of this name.
    """
    with atomic_folder(folder, overwrite=overwrite) as work:
        model.save_pretrained(work, **({} if state is None else {"state_dict": dict(state)}))
        processor.save_pretrained(work)
        card.write(work, Path(folder))
    return Path(folder)


def save_projector(
    state: Mapping[str, Tensor], processor: LlavaProcessor, card: LlavaCard, folder: Path | str, *, overwrite: bool = False
) -> Path:
    """Write a stage-1 folder.

    Args:
        state: The weights of the model; only those of the projector are taken.
        processor: The model's processor.
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
        processor.save_pretrained(work)
        card.write(work, Path(folder))
    return Path(folder)


def save_adapter(
    model: PeftModel, processor: LlavaProcessor, card: LlavaCard, folder: Path | str,
    *, state: Mapping[str, Tensor] | None = None, overwrite: bool = False,
) -> Path:  # fmt: skip
    """Write LoRA and projector; encoder and LLM stay where the card says. Arguments as for `save_llava`."""
    with atomic_folder(folder, overwrite=overwrite) as work:
        # the embeddings are never trained here; "auto" would ask the hub for the base model's config to find out
        extra = {} if state is None else {"state_dict": dict(state)}
        model.save_pretrained(work, save_embedding_layers=False, **extra)
        (work / "README.md").unlink(missing_ok=True)  # peft's blank form of a model card
        processor.save_pretrained(work)
        card.write(work, Path(folder))
    return Path(folder)


# -- loading ---------------------------------------------------------------------------------------------------------------------------


def load_llava(
    folder: Path | str, dtype: torch.dtype = torch.float32, *, merge: bool = True
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor, LlavaCard | None]:
    """Load any LLaVA folder: whole (ours or a stock one), adapter or projector.

    Args:
        folder: The folder.
        dtype: Of the weights.
        merge: Add a LoRA into the weights, which leaves the stock model; False keeps peft's model around it.

    Returns:
        The model in eval mode, its processor, and its card (None for a folder that mmkit did not write).

    Raises:
        ConfigError: It is not a LLaVA folder; the message says what is in it.
        DataError: Weights are missing, superfluous, misshapen, or belong to another encoder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(f"there is no model folder {folder}: give what train_llava.py wrote (RUN/model) or a Hugging Face LLaVA folder")
    card = read_card(folder)
    if card is not None and ((folder / PROJECTOR).is_file() or (folder / ADAPTER).is_file()):
        return (*_load_parts(folder, card, dtype, merge), card)
    model = _load_whole(folder, dtype)
    processor = _load_processor(folder)
    check_image_tokens(model, processor)
    return model, processor, card


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
    tower = load_tower(card.encoder)
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
    adapted = PeftModel.from_pretrained(model, folder)
    return (adapted.merge_and_unload() if merge else adapted).to(dtype).eval(), processor


def load_projector(model: LlavaForConditionalGeneration, folder: Path | str) -> LlavaCard:
    """Fill a model's projector from a stage-1 folder.

    Returns:
        That folder's card.

    Raises:
        ConfigError: The folder is none, or its projector was trained between parts of other widths or behind another encoder.
        DataError: The file does not fit.
    """
    folder = Path(folder)
    path, card = folder / PROJECTOR, read_card(folder)
    if card is None or not path.is_file():
        raise ConfigError(f"{folder} has no {PROJECTOR} and {CARD}: give the model folder of a stage-1 run (RUN/model)")
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
