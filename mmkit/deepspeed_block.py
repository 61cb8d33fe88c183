"""Hold a DeepSpeed block against the settings it comes with, before anything is made: one of the two would win without a word."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from mmkit.errors import ConfigError
from mmkit.launch import read_deepspeed_block
from mmkit.run_config import RunConfig

SCHEDULES = {"WarmupCosineLR": "cosine", "WarmupDecayLR": "linear", "WarmupLR": "constant after the warm-up"}
OPTIMIZERS = ("adam", "adamw")  # DeepSpeed's Adam decays as AdamW does, unless told otherwise


def refuse_contradictions(config: RunConfig, *, schedule: str, optimizer: Mapping[str, float]) -> None:
    """Compare batch sizes, clipping, precision, optimizer and schedule; "auto" and what is left out agree with everything.

    Args:
        config: The run's settings, the block among them.
        schedule: What the lr does in this training ("cosine").
        optimizer: AdamW's values as the block would name them: "lr", "weight_decay".

    Raises:
        ConfigError: They differ; both values are named.
    """
    block = read_deepspeed_block(config.deepspeed)
    source = config.deepspeed if isinstance(config.deepspeed, str) and config.deepspeed else "run.deepspeed"
    ranks = int(os.environ.get("WORLD_SIZE", 0))
    accumulation = config.gradient_accumulation_steps
    whole = config.global_batch_size or (config.micro_batch_size * accumulation * ranks)
    if not accumulation and ranks:
        accumulation = whole // (config.micro_batch_size * ranks)
    ours: dict[str, tuple[str, Any]] = {
        "train_micro_batch_size_per_gpu": ("run.micro_batch_size", config.micro_batch_size),
        "gradient_accumulation_steps": ("run.gradient_accumulation_steps", accumulation or None),
        "train_batch_size": ("run.global_batch_size", whole or None),
        "gradient_clipping": ("run.max_grad_norm", config.max_grad_norm),
        "bf16.enabled": ("run.precision", config.precision == "bf16"),
        "fp16.enabled": ("run.precision", config.precision == "fp16"),
        **{f"optimizer.params.{name}": (name, value) for name, value in optimizer.items()},
    }
    for key, (setting, value) in ours.items():
        given = _at(block, key)
        if given not in (None, "auto") and value is not None and given != value:
            said = f"{setting} is {config.precision}" if setting == "run.precision" else f"{setting} is {value}"
            raise ConfigError(f'{source} says {key} {given}, and {said}: leave it out of the block, or write "auto"; the settings decide')
    kind = _at(block, "optimizer.type")
    if kind is not None and str(kind).lower() not in OPTIMIZERS:
        raise ConfigError(f"{source} says optimizer.type {kind}, and this training's is AdamW: leave the optimizer out of the block")
    kind = _at(block, "scheduler.type")
    if kind is not None and SCHEDULES.get(kind) != schedule:
        meaning = f" ({SCHEDULES[kind]})" if kind in SCHEDULES else ""
        raise ConfigError(
            f"{source} says scheduler.type {kind}{meaning}, and this training's is {schedule}: leave the scheduler out of the block"
        )


def _at(block: Mapping[str, Any], key: str) -> Any:
    place: Any = block
    for part in key.split("."):
        place = place.get(part) if isinstance(place, Mapping) else None
    return place
