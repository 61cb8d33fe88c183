"""The two halves of every zero-shot evaluation: an image tower and the text tower of its joint space, frozen, on their device."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from encoders.catalog import load_encoder
from encoders.modeling import VisionEncoder
from encoders.text import TextTower, load_text_tower
from mmkit.errors import ConfigError
from mmkit.trainable import freeze, weights_hash


@dataclass(frozen=True)
class Pair:
    """Image tower, text tower, and what identifies them (names and hashes of the weights)."""

    encoder: VisionEncoder
    tower: TextTower
    identity: dict[str, Any]


def load_pair(encoder_name: str, text_name: str, device: torch.device) -> Pair:
    """Load both towers and see that they belong together.

    Args:
        encoder_name: What `load_encoder` takes.
        text_name: What `load_text_tower` takes; empty is the one the encoder names.
        device: Where they go.

    Raises:
        ConfigError: The encoder has no joint space, or the towers' spaces differ in width.
    """
    encoder = freeze(load_encoder(encoder_name))
    if encoder.joint_width is None:
        raise ConfigError(f"--encoder {encoder_name} has no joint image-text space: zero-shot needs a CLIP-like encoder or a UTA student")
    tower = load_text_tower(text_name or encoder.config.text_tower or "")
    if tower.joint_width != encoder.joint_width:
        raise ConfigError(
            f"--encoder {encoder_name} has joint width {encoder.joint_width}, text tower {tower.name} has {tower.joint_width}: "
            "they belong to different spaces; name the tower it was trained towards with --text_tower"
        )
    identity = {
        "encoder": encoder_name,
        "encoder_weights": weights_hash(encoder)[:16],
        "text_tower": tower.name,
        "text_weights": weights_hash(tower)[:16],
    }
    torch.nn.Module.to(encoder, device)  # what transformers wraps around `to` has lost its types
    tower.to(device)
    return Pair(encoder, tower, identity)


@contextmanager
def autocast(device: torch.device, precision: str) -> Iterator[None]:
    """Compute in bf16 where that is asked for."""
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        yield


def encoder_card(encoder: VisionEncoder) -> dict[str, Any]:
    """What the report says of the encoder."""
    c = encoder.config
    parameters = sum(parameter.numel() for parameter in encoder.parameters())
    return {"architecture": c.architecture, "origin": c.origin, "joint_width": c.joint_width, "image_spec": c.image_spec,
            "text_tower": c.text_tower, "training": c.training, "parameters": parameters}  # fmt: skip
