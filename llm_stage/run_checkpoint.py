"""A checkpoint of a LLaVA run as a model: RUN/checkpoints/step_N, with RUN/config.yaml, is all that is needed beside encoder and LLM.

A checkpoint holds what is trained (trainable.safetensors). Under DeepSpeed that is a copy in the training's own dtype; the float32 values
that the optimizer keeps are in its ZeRO files, and DeepSpeed's `zero_to_fp32` puts them together.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from transformers import LlavaProcessor

from encoders.vision_towers import at_size, load_tower
from llm_stage.adapters import round_like_quantized
from llm_stage.llava import build_llava, with_resize
from llm_stage.llava_card import LlavaCard, read_card, refuse_cut_off
from llm_stage.llava_settings import LoraSettings
from llm_stage.tuning import add_lora
from mmkit.checkpoint import load_weights, refuse_differences
from mmkit.errors import ConfigError, DataError
from mmkit.snapshots import read_state
from mmkit.trainable import weights_hash

TRAINABLE, ZERO = "trainable.safetensors", "deepspeed"


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint of a run."""
    return (folder / "state.json").is_file() and folder.parent.name == "checkpoints"


def load_checkpoint(folder: Path, dtype: torch.dtype = torch.float32, *, from_zero: bool = False) -> tuple[Any, LlavaProcessor, LlavaCard]:
    """Build the model that a run was training and fill in what it had learned by then.

    Args:
        folder: RUN/checkpoints/step_N.
        dtype: Of the weights.
        from_zero: Take the float32 weights out of DeepSpeed's ZeRO files. They are pickles: for one's own runs only.

    Returns:
        The model in eval mode (peft's, where a LoRA is trained), its processor, and the card that the run's result would have.

    Raises:
        ConfigError: The run is no LLaVA training, or there are no ZeRO files.
        DataError: A file of the checkpoint is missing or cut off, or does not fit; the encoder is another one now.
    """
    state = read_state(folder)
    for name, size in state["files"].items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            said = "is missing" if found is None else f"has {found:,} bytes, should have {size:,}"
            raise DataError(f"{path} {said}: this checkpoint is not whole. Take another one of {folder.parent}")
    refuse_cut_off([folder / TRAINABLE])
    settings = run_settings(folder.parent.parent)
    tower = with_resize(load_tower(_setting(settings, "encoder", folder)), settings.get("resize", "own"))
    card = _card(settings, tower, folder, state)
    model: Any
    model, processor = build_llava(tower, card.llm, card.projector, card.feature_layer, card.select, dtype=dtype)
    if card.quantization:
        round_like_quantized(model.model.language_model, card.quantization)
    lora = settings.get("lora") or {}
    if lora.get("rank"):
        model = add_lora(model, LoraSettings(**{**lora, "quantize": "none"}), seed=0)  # rounded already, where it was trained in 4 bits
    values = zero_weights(folder) if from_zero else load_weights(folder / TRAINABLE)
    fill_trained(model, values, state["trained"], str(folder))
    return model.eval(), processor, card


def run_settings(run: Path) -> dict[str, Any]:
    """The settings of a LLaVA run, those of its stage-1 folder filled in where stage 2 left them open.

    Raises:
        ConfigError: RUN/config.yaml is not there, or of another training.
    """
    path = run / "config.yaml"
    try:
        settings: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"a checkpoint is loaded with the settings of its run, and {path} cannot be read: {error}") from error
    if not isinstance(settings, dict) or not {"stage", "encoder", "llm", "projector"} <= set(settings):
        raise ConfigError(f"{path} holds no settings of a LLaVA training: of other runs' checkpoints this command knows nothing")
    earlier = read_card(Path(settings["pretrained"])) if settings.get("pretrained") else None
    for name in ("encoder", "llm"):
        settings[name] = settings[name] or (getattr(earlier, name) if earlier else "")
    if settings.get("image_size"):
        settings["encoder"] = at_size(settings["encoder"], settings["image_size"])
    return settings


def _setting(settings: dict[str, Any], name: str, folder: Path) -> str:
    value = settings[name]
    if not value:
        raise ConfigError(f"the run of {folder} took its {name} from {settings.get('pretrained')}, which is not there any more")
    return str(value)


def _card(settings: dict[str, Any], tower: nn.Module, folder: Path, state: dict[str, Any]) -> LlavaCard:
    """The card that train_llava wrote at the run's start, or one made from its settings."""
    started = read_card(folder.parent.parent)
    found = weights_hash(tower)
    if started is not None and started.encoder_hash != found:
        raise DataError(
            f"the run of {folder} has an encoder whose weights hash to {started.encoder_hash[:12]}; {started.encoder} now has {found[:12]}"
        )
    card = started or LlavaCard(
        encoder=_setting(settings, "encoder", folder), llm=_setting(settings, "llm", folder), encoder_hash=found,
        projector=settings["projector"], feature_layer=settings.get("feature_layer", -2), select=settings.get("select", "auto"),
        template=settings.get("template", "own"), system=settings.get("system"), stage=settings["stage"],
        resize=settings.get("resize", "own"),
    )  # fmt: skip
    data = Path((settings.get("data") or {}).get("json") or "").name
    return replace(card, training={**card.training, "data": data, "steps": state["step"], "seed": (settings.get("run") or {}).get("seed")})


def fill_trained(model: nn.Module, values: dict[str, Tensor], trained: list[str], source: str) -> None:
    """Put a checkpoint's weights into a bare model.

    Args:
        model: The model, with its adapter if one was trained.
        values: Name to tensor; buffers may be among them.
        trained: The names that the run trained.
        source: For the message.

    Raises:
        DataError: Tensors are missing, misshapen, or the model has no such tensors.
    """
    places: dict[str, Tensor] = {name: parameter for name, parameter in model.named_parameters(remove_duplicate=False)}
    buffers = dict(model.named_buffers())
    given = {name: tensor for name, tensor in values.items() if name in trained or name not in buffers}
    wanted = {name: places.get(name, torch.empty(0)) for name in trained}
    refuse_differences(wanted, given, source, "the model of its run")
    with torch.no_grad():
        for name, tensor in values.items():
            (places[name] if name in wanted else buffers[name]).copy_(tensor)


def zero_weights(folder: Path) -> dict[str, Tensor]:
    """The trained weights in float32 out of a checkpoint's ZeRO files, of all ranks.

    Raises:
        ConfigError: The run was not started with DeepSpeed, or DeepSpeed is not installed.
        DataError: DeepSpeed cannot put the files together.
    """
    if not (folder / ZERO).is_dir():
        raise ConfigError(f"{folder} has no ZeRO files: its run was not started with DeepSpeed. Leave --from_zero out")
    try:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
    except ImportError as error:
        raise ConfigError("--from_zero needs DeepSpeed: pip install 'mmkit[deepspeed]'") from error
    try:
        state = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=ZERO, exclude_frozen_parameters=True)
    except Exception as error:  # it raises whatever its files make it raise
        raise DataError(f"DeepSpeed cannot put the ZeRO files in {folder / ZERO} together: {error}") from error
    return {name.removeprefix("module."): tensor.detach().clone() for name, tensor in state.items()}
