"""Vision towers by name: what LLaVA may be given, one encoder or several, at its own image size or at another.

SOURCE                   one encoder: what `load_encoder` takes
SOURCE@336px             the same, its position embeddings resampled for images of 336 px
A+B                      the channels of A and B side by side (encoders/joined.py); channels:A+B is the same
tokens:A+B+C             their tokens one after another
A@-2+B@-1                each with the hidden state to be used; all of them or none (then --feature_layer -1 is what is left to choose)
FOLDER                   what save_pretrained of any of these wrote
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from encoders.catalog import folder_weights, load_encoder
from encoders.joined import JOINED_TYPE, Join, JoinedEncoder, JoinedEncoderConfig
from encoders.modeling import VisionEncoder
from encoders.resize import resize_encoder
from mmkit.checkpoint import load_strict
from mmkit.errors import ConfigError, DataError

VisionTower = VisionEncoder | JoinedEncoder


@dataclass(frozen=True)
class Part:
    """One encoder of a tower's name: its source, and what stands behind it."""

    source: str
    image_size: int | None = None
    layer: int | None = None

    def __str__(self) -> str:
        size = "" if self.image_size is None else f"@{self.image_size}px"
        return self.source + size + ("" if self.layer is None else f"@{self.layer}")


def parse(source: str) -> tuple[Join | None, list[Part]]:
    """Take a tower's name apart; None for a single encoder."""
    if Path(source).expanduser().is_dir():
        return None, [Part(source)]
    kind, _, rest = source.partition(":")
    join: Join | None = None
    for name in get_args(Join):
        if kind == name:
            join, source = name, rest
    if "+" in source:
        join = join or "channels"
    return join, [_part(text) for text in source.split("+")]


def _part(text: str) -> Part:
    found = re.fullmatch(r"(.+?)(?:@(\d+)px)?(?:@(-?\d+))?", text.strip())
    if found is None or Path(text).expanduser().is_dir():
        return Part(text)
    name, size, layer = found.groups()
    return Part(name, int(size) if size else None, int(layer) if layer else None)


def load_tower(source: str | Path) -> VisionTower:
    """Load a vision tower, in eval mode, on the CPU.

    Args:
        source: See the head of this file.

    Raises:
        NameNotFound, DataError, ConfigError: As `load_encoder` and `JoinedEncoder`.
    """
    join, parts = parse(str(source))
    if join is None:
        (part,) = parts
        if part.layer is not None:
            raise ConfigError(
                f"'{source}': the layer of a single encoder is --feature_layer {part.layer}; @{part.layer} is for joined ones"
            )
        folder = Path(part.source).expanduser()
        return _joined_folder(folder) if _is_joined(folder) else _load_part(part)
    empty = [str(part) for part in parts if not part.source]
    if empty or len(parts) < 2:
        raise ConfigError(f"'{source}' names {len(parts)} encoder(s){', one without a name' if empty else ''}; joined are two or more: A+B")
    layers = [part.layer for part in parts if part.layer is not None]
    if layers and len(layers) < len(parts):
        missing = next(str(part) for part in parts if part.layer is None)
        raise ConfigError(f"'{source}' says a layer for {len(layers)} of {len(parts)} encoders; say it for '{missing}' too, or for none")
    return JoinedEncoder.of([_load_part(part).float() for part in parts], join, layers or None)


def _load_part(part: Part) -> VisionEncoder:
    encoder = load_encoder(part.source)
    return encoder if part.image_size in (None, encoder.config.image_size) else resize_encoder(encoder, None, part.image_size, "pi")


def _is_joined(folder: Path) -> bool:
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and values.get("model_type") == JOINED_TYPE


def _joined_folder(folder: Path) -> JoinedEncoder:
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    try:
        tower = JoinedEncoder(JoinedEncoderConfig.from_dict(values))
    except ValueError as error:
        raise DataError(f"encoder folder '{folder}': {error}") from error
    state = folder_weights(folder)
    load_strict(tower, state, f"{folder / 'model.safetensors'}")
    return tower.to(next(iter(state.values())).dtype).eval()


def at_size(source: str, image_size: int) -> str:
    """The name of the same tower at another image size.

    Raises:
        ConfigError: It is a joined one.
    """
    join, parts = parse(source)
    if join is not None:
        raise ConfigError(
            f"image_size {image_size} of several encoders ({source}): write it behind those that are meant, A@{image_size}px+B"
        )
    return str(Part(parts[0].source, image_size))


def folders(source: str) -> list[str]:
    """The folders that a tower's name is made of."""
    return [part.source for part in parse(source)[1] if Path(part.source).expanduser().is_dir()]


def with_folders(source: str, change: Callable[[str], str]) -> str:
    """The name with its folders put in another way (relative, absolute)."""
    join, parts = parse(source)
    named = [Part(change(p.source), p.image_size, p.layer) if Path(p.source).expanduser().is_dir() else p for p in parts]
    return (f"{join}:" if join else "") + "+".join(map(str, named))
