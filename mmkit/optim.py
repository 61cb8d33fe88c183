"""Parameter groups, schedules, EMA: timm's and torch's, composed.

A group carries its own peak `lr`; `Run.set_schedule` multiplies it by a schedule, a plain function from step to factor.
"""

import math
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from timm.models import group_parameters
from timm.utils import ModelEmaV3
from torch import nn

from mmkit.errors import ConfigError

Schedule = Callable[[int], float]
NO_DECAY_NAMES = ("pos_embed", "cls_token", "reg_token", "mask_token", "positional_embedding", "logit_scale")  # 2-D ones are easy to miss


def param_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float,
    *,
    layer_decay: float | None = None,
    lr_by_pattern: Mapping[str, float] | None = None,
    lr_scales: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Sort the trainable parameters into optimizer groups.

    Args:
        model: The bare model, not a wrapper (DDP hides the names).
        lr: Peak learning rate of what no pattern names.
        weight_decay: For matrices; biases, norms, other 1-D tensors, positions and CLS get none.
        layer_decay: Factor d per block of a timm network: lr * d^(L + 1 - i) for block i of L (from 1), d^(L + 1) for patch embedding and
            positions, and 1 for what comes after the blocks.
        lr_by_pattern: Shell pattern over parameter names to peak learning rate; the first that matches counts.
        lr_scales: Exact parameter name to a factor on its peak, for models whose layers timm cannot tell (see `encoders.clip_towers`);
            takes the place of `layer_decay`.

    Returns:
        Groups with "params", "lr", "initial_lr", "weight_decay" and a "name".

    Raises:
        ConfigError: Nothing is trainable, a pattern matches nothing, or `layer_decay` is asked of a model without a timm network in it.

    Source: EVA-CLIP's layer decay. timm's own `param_groups_layer_decay` gives a final norm one factor d more; here it gets 1.
    """
    lr_by_pattern = lr_by_pattern or {}
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not named:
        raise ConfigError("nothing is trainable: every parameter of the model is frozen")
    for pattern in lr_by_pattern:
        if not any(fnmatchcase(name, pattern) for name, _ in named):
            raise ConfigError(
                f"lr_by_pattern: '{pattern}' matches none of {len(named)} trainable parameters, the first being {named[0][0]}"
            )
    scales: Mapping[str, float] = _layer_scales(model, layer_decay) if layer_decay is not None else lr_scales or {}
    skip = _no_decay_names(model)
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in named:
        peak = next((value for pattern, value in lr_by_pattern.items() if fnmatchcase(name, pattern)), lr) * scales.get(name, 1.0)
        plain = parameter.ndim <= 1 or name.endswith(".bias") or name.rsplit(".", 1)[-1] in NO_DECAY_NAMES or name in skip
        decay = 0.0 if plain else weight_decay
        label = f"lr {peak:.3g}, {'decay' if decay else 'no decay'}"
        group = groups.setdefault((peak, decay), {"params": [], "lr": peak, "initial_lr": peak, "weight_decay": decay, "name": label})
        group["params"].append(parameter)
    return list(groups.values())


def _no_decay_names(model: nn.Module) -> set[str]:
    """Collect what timm networks inside the model ask to be spared (`no_weight_decay()`), with their full names."""
    names: set[str] = set()
    for prefix, module in model.named_modules():
        ask = getattr(module, "no_weight_decay", None)
        if callable(ask):
            names.update(f"{prefix}.{name}" if prefix else str(name) for name in ask())
    return names


def _layer_scales(model: nn.Module, decay: float) -> dict[str, float]:
    found = [(prefix, module) for prefix, module in model.named_modules() if callable(getattr(module, "group_matcher", None))]
    outer = [
        (prefix, module)
        for prefix, module in found
        if not any(prefix.startswith(f"{other}.") or (not other and prefix) for other, _ in found)
    ]
    if len(outer) != 1:
        raise ConfigError(
            f"layer_decay needs one timm network in the model, {type(model).__name__} has {len(outer)}: build the groups per tower"
        )
    prefix, network = outer[0]
    matcher: Any = network.group_matcher
    layer_of: dict[str, int] = group_parameters(network, matcher(coarse=False), reverse=True)
    blocks = {name.split(".")[0] for name in layer_of if any(part.isdigit() for part in name.split(".")[1:2])}
    last = max((layer for name, layer in layer_of.items() if name.split(".")[0] in blocks), default=max(layer_of.values()) - 1)
    # Everything behind the blocks shares one layer with factor 1; timm puts a final norm into the last block's.
    top = last + 1
    layer_of = {name: top if layer >= last and name.split(".")[0] not in blocks else layer for name, layer in layer_of.items()}
    return {f"{prefix}.{name}" if prefix else name: decay ** (top - layer) for name, layer in layer_of.items()}


def warmup_steps(warmup: float, steps: int) -> int:
    """Read a warm-up given in steps (at least 1) or as a share of all steps (below 1)."""
    return math.ceil(steps * warmup) if 0 < warmup < 1 else int(warmup)


def cosine_schedule(steps: int, warmup: float = 0, final: float = 0.0, *, from_zero: bool = False) -> Schedule:
    """Rise linearly, then fall along half a cosine.

    Args:
        steps: Length of the whole training in optimizer steps.
        warmup: Steps of the rise, or its share of `steps` if below 1; the peak is reached in the last of them.
        final: Factor that the cosine ends at (the last step is just above it).
        from_zero: Begin the rise at 0, a step that changes nothing, and reach the peak right behind it: the form of BEiT and FT-CLIP.

    Returns:
        A function from step (0 is the first) to a factor in [0, 1].
    """
    rise = warmup_steps(warmup, steps)

    def factor(step: int) -> float:
        if step < rise:
            return (step if from_zero else step + 1) / rise
        progress = min(1.0, (step - rise) / max(1, steps - rise))
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))

    return factor


def constant_schedule(warmup: int = 0) -> Schedule:
    """Rise linearly over `warmup` steps, then stay."""
    return lambda step: min(1.0, (step + 1) / warmup) if warmup else 1.0


def make_ema(model: nn.Module, decay: float = 0.9999, warmup: bool = True) -> ModelEmaV3:
    """Make timm's running average of a model's weights.

    Call `ema.update(model, step=run.step)` after each optimizer step (`if run.updated`), and give it to `run.keep("ema", ema)`, or a
    resumed run would begin a new average.
    """
    return ModelEmaV3(model, decay=decay, use_warmup=warmup)
