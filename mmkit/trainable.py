"""What is trained and what sleeps: freezing that lasts, patterns that must match, a table that shows it, a hash that proves it."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import partial
from io import StringIO
from typing import TypeVar

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from mmkit.errors import ConfigError

M = TypeVar("M", bound=nn.Module)


def _asleep(module: nn.Module, mode: bool = True) -> nn.Module:
    return module


def freeze(module: M) -> M:
    """Freeze a module: no gradient, eval mode, and no parent's `.train()` wakes its dropout or batch statistics.

    The step still has to run it under `torch.no_grad()`, otherwise inputs that need gradients build a graph through it.
    """
    module.requires_grad_(False).eval()
    module.train = partial(_asleep, module)  # type: ignore[method-assign,assignment]  # a partial survives deepcopy and pickle, a lambda does not
    return module


def unfreeze(module: M) -> M:
    """Undo `freeze` for a module and all inside: parameters want gradients again, `.train()` works again."""
    for inner in module.modules():
        inner.__dict__.pop("train", None)
    module.requires_grad_(True).train()
    return module


def set_trainable(model: nn.Module, patterns: Sequence[str]) -> int:
    """Train exactly the parameters whose names match a pattern, and freeze the rest.

    The largest modules without any trained parameter are put to sleep (`freeze`), so that dropout there stays off.

    Args:
        model: The model.
        patterns: Shell patterns over parameter names ("multi_modal_projector.*", "*.norm.*"). A bare part name means all below it.

    Returns:
        How many parameters (numbers, not tensors) are trained.

    Raises:
        ConfigError: A pattern matches nothing; the message names the nearest part.
    """
    names = [name for name, _ in model.named_parameters()]
    chosen: set[str] = set()
    for pattern in patterns:
        hits = [name for name in names if fnmatchcase(name, pattern) or name.startswith(pattern.rstrip(".") + ".")]
        if not hits:
            parts = sorted({".".join(name.split(".")[:depth]) for name in names for depth in range(1, name.count(".") + 1)})
            near = get_close_matches(pattern.rstrip(".*"), parts, n=1, cutoff=0.3) or [child for child, _ in model.named_children()][:5]
            raise ConfigError(f"'{pattern}' matches none of {len(names)} parameters; nearest part: {', '.join(near)}")
        chosen.update(hits)
    unfreeze(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)
    _sleep_where_frozen(model)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _sleep_where_frozen(module: nn.Module) -> None:
    for child in module.children():
        parameters = list(child.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            freeze(child)
        else:
            _sleep_where_frozen(child)


def trainable_table(model: nn.Module, parts: Mapping[str, nn.Module], origins: Mapping[str, str]) -> str:
    """Draw the table that every training prints at its start: part, state, parameters, from where.

    Args:
        model: The whole model; what is in no part is shown as "(rest)".
        parts: Name to module; may be modules outside `model` too (a teacher).
        origins: Part name to where its weights came from; "new" where the name is missing.

    Returns:
        Text of at most 120 columns.
    """
    table = Table("part", "state", "parameters", "trained", "from", title=None)
    for column in (2, 3):
        table.columns[column].justify = "right"
    counted: set[int] = set()
    rows: list[tuple[str, list[tuple[str, nn.Parameter]]]] = [(name, list(part.named_parameters())) for name, part in parts.items()]
    known = {id(parameter) for _, parameters in rows for _, parameter in parameters}
    rest = [(name, parameter) for name, parameter in model.named_parameters() if id(parameter) not in known]
    if rest:
        rows.append(("(rest)", rest))
    total = trained = 0
    for name, named in rows:
        fresh = [(path, parameter) for path, parameter in named if id(parameter) not in counted]  # tied weights count once
        counted.update(id(parameter) for _, parameter in fresh)
        size = sum(_numel(parameter) for _, parameter in fresh)
        active = [(path, parameter) for path, parameter in fresh if parameter.requires_grad]
        active_size = sum(parameter.numel() for _, parameter in active)
        total, trained = total + size, trained + active_size
        table.add_row(name, _state(active, size, active_size), _millions(size), _millions(active_size), origins.get(name, "new"))
    table.add_section()
    table.add_row("total", "", _millions(total), _millions(trained), "")
    out = StringIO()
    Console(file=out, width=120, color_system=None).print(table)
    return out.getvalue().rstrip("\n")


def _numel(parameter: nn.Parameter) -> int:
    """How many weights a parameter holds; bitsandbytes packs two of 4 bits into a byte, and remembers the shape."""
    packed = getattr(parameter, "quant_state", None)
    return parameter.numel() if packed is None else math.prod(packed.shape)


def _state(active: Sequence[tuple[str, nn.Parameter]], size: int, active_size: int) -> str:
    if not active_size:
        return "frozen"
    if all("lora_" in path for path, _ in active):
        return "LoRA"
    return "trained" if active_size == size else "partly"


def _millions(count: int) -> str:
    return f"{count / 1e6:,.1f} M" if count >= 100_000 else f"{count:,}"


def weights_hash(module: nn.Module | Mapping[str, torch.Tensor], dtype: torch.dtype | None = None) -> str:
    """Hash all parameters and buffers (name, type, shape, bytes), to prove that a frozen part did not change.

    Args:
        module: The part, or its state.
        dtype: Hash the parameters as they would be after a cast: what DeepSpeed does to them with bf16.

    Returns:
        SHA-256 in hex.
    """
    digest = hashlib.sha256()
    cast = {name for name, _ in module.named_parameters()} if isinstance(module, nn.Module) and dtype is not None else set()
    for name, tensor in sorted((module.state_dict() if isinstance(module, nn.Module) else module).items()):
        if isinstance(tensor, torch.Tensor):
            plain = (tensor.to(dtype) if name in cast and tensor.is_floating_point() else tensor).detach().cpu().contiguous()
            digest.update(f"{name} {plain.dtype} {list(plain.shape)}\n".encode())
            digest.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b"")
    return digest.hexdigest()
