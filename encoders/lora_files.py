"""Files of LoRA: the authors' flat tables, this kit's adapter folders, and which names they use. Nothing is skipped without a word.

    visual.blocks.{i}.attn.qkv.lora_A [2r, d]      rows 0:r for q, r:2r for v
    visual.blocks.{i}.attn.qkv.lora_B [2d, r]      rows 0:d for q, d:2d for v

An adapter folder holds `adapter.safetensors` with these names and `adapter.json`: rank, alpha, targets, base (a hash), source.

Source: TencentARC/ViSFT (`eva_{g,e}_lora_*.pt`, scripts/postprocess).
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmkit.checkpoint import atomic_folder, load_weights, save_weights
from mmkit.errors import DataError

ADAPTER_FILE, ABOUT_FILE = "adapter.safetensors", "adapter.json"
# EVA-CLIP's names, open_clip's, LAVIS's, and transformers' Blip2.
_KEY = re.compile(r"(?:(?:visual\.(?:trunk\.)?)?blocks\.(\d+)\.attn|vision_model\.encoder\.layers\.(\d+)\.self_attn)\.qkv\.lora_([AB])")


def layout_names(block: int) -> tuple[str, str]:
    """Give the published names of a block's A and B."""
    return f"visual.blocks.{block}.attn.qkv.lora_A", f"visual.blocks.{block}.attn.qkv.lora_B"


@dataclass(frozen=True)
class LoraFile:
    """LoRA as a file holds it.

    Attributes:
        state: A and B under the published names, blocks in order.
        rank, depth, width: r, blocks, d.
        alpha: What the file says; the authors' files say nothing and have 1.
        base: Hash of the encoder it was trained on (`encoders.lora.base_hash`); empty where it is not known.
        source: The file.
        about: Everything that adapter.json holds.
    """

    state: dict[str, Tensor]
    rank: int
    depth: int
    width: int
    alpha: float = 1.0
    base: str = ""
    source: str = ""
    about: dict[str, Any] = field(default_factory=dict)


def read_lora(path: Path | str) -> LoraFile:
    """Read an adapter folder, or a flat table of the authors' (`.pt`, plain data only) or in safetensors.

    Raises:
        DataError: It is damaged, a name is none of LoRA's, a block lacks A or B, or shapes do not belong together.
        FileNotFoundError: There is nothing.
    """
    path = Path(path)
    about = _about(path) if path.is_dir() else {}
    found = lora_state(load_weights(path / ADAPTER_FILE if path.is_dir() else path), str(path))
    rank, alpha = about.get("rank", found.rank), about.get("alpha", 1.0)
    if rank != found.rank or not isinstance(alpha, int | float):
        raise DataError(f"{path}: {ABOUT_FILE} says rank {rank} and alpha {alpha}; the tensors have rank {found.rank}")
    return LoraFile(found.state, found.rank, found.depth, found.width, float(alpha), str(about.get("base") or ""), str(path), about)


def _about(folder: Path) -> dict[str, Any]:
    file = folder / ABOUT_FILE
    if not file.is_file():
        raise DataError(f"{folder} is no adapter folder: it has no {ABOUT_FILE}; mmkit train visft --stage lora writes one as RUN/adapter")
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{file} is no valid JSON: {error}") from error
    if not isinstance(about, dict):
        raise DataError(f"{file} should hold an object with rank and alpha; it holds {str(about)[:60]!r}")
    return about


def lora_state(tensors: Mapping[str, Any], source: str) -> LoraFile:
    """Bring a flat table into order: published names, every block with both tensors, shapes that belong together.

    Raises:
        DataError: As `read_lora`.
    """
    blocks: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _KEY.fullmatch(name)
        if match is None or not isinstance(tensor, Tensor) or tensor.dim() != 2:
            raise DataError(f"{source}: '{name}' is no tensor of ViSFT's LoRA; names like {layout_names(0)[0]} were expected, nothing else")
        half = blocks.setdefault(int(match[1] or match[2]), {})
        if match[3] in half:
            raise DataError(f"{source} holds lora_{match[3]} of block {match[1] or match[2]} twice, under two names")
        half[match[3]] = tensor
    if not blocks:
        raise DataError(f"{source} holds no tensors; LoRA has two for each block")
    depth = max(blocks) + 1
    state: dict[str, Tensor] = {}
    for block in range(depth):
        names = dict(zip("AB", layout_names(block), strict=True))
        if missing := [name for half, name in names.items() if half not in blocks.get(block, {})]:
            raise DataError(f"{source} has LoRA up to block {depth - 1}, but no {missing[0]}")
        state |= {name: blocks[block][half] for half, name in names.items()}
    first_a, first_b = (state[name] for name in layout_names(0))
    rank, width = first_b.shape[1], first_a.shape[1]
    for block in range(depth):
        a, b = (state[name] for name in layout_names(block))
        if tuple(a.shape) != (2 * rank, width) or b.shape != first_b.shape or b.shape[0] % 2:
            raise DataError(
                f"{source}: block {block} has lora_A {list(a.shape)} and lora_B {list(b.shape)}; with rank {rank} and width {width} "
                f"(block 0) they should be {[2 * rank, width]} and {[2 * width, rank]}"
            )
    return LoraFile(state, rank, depth, width, source=source)


def write_adapter(state: Mapping[str, Tensor], about: Mapping[str, Any], path: Path) -> Path:
    """Write an adapter folder, whole or not at all; one that is there is replaced.

    Raises:
        DataError: Something else lies at `path`.
    """
    if path.exists() and not (path / ABOUT_FILE).is_file():
        raise DataError(f"{path} exists and is no adapter folder; name another one")
    with atomic_folder(path, overwrite=True) as folder:
        save_weights(state, folder / ADAPTER_FILE)
        (folder / ABOUT_FILE).write_text(json.dumps(dict(about), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def write_official(state: Mapping[str, Tensor], path: Path) -> Path:
    """Write the authors' flat torch file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    work = path.parent / f".{path.name}.writing-{os.getpid()}"
    try:
        torch.save({name: tensor.detach().cpu().clone() for name, tensor in state.items()}, work)
        os.replace(work, path)
    finally:
        work.unlink(missing_ok=True)
    return path


def delta_weight(state: Mapping[str, Tensor], block: int, scaling: float) -> Tensor:
    """Give dW [3d, d] in float32 of one block: what is added to the weight of a fused qkv."""
    a, b = (state[name].float() for name in layout_names(block))
    (a_q, a_v), (b_q, b_v) = a.chunk(2), b.chunk(2)
    queries = b_q @ a_q
    return torch.cat([queries, torch.zeros_like(queries), b_v @ a_v]) * scaling
