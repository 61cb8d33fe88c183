"""An encoder and the text tower of its space, written as one CLIP model that open_clip loads."""

import json
import math
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch
from open_clip.factory import get_model_config
from torch import Tensor

from encoders.architectures import NO_SHAPE, own_entry
from encoders.clip_models import ClipParts, export_clip
from encoders.foreign import network_args
from encoders.modeling import VisionEncoder
from encoders.text import MINI_CLIP, TextTower, quiet_open_clip
from encoders.text_folder import TEXT_CONFIG, read_text_config
from mmkit.checkpoint import load_strict
from mmkit.errors import ConfigError

SCALE_AT_TEST = math.log(100)  # what CLIP models end at; logits are 100 times the cosine
TOLERANCE = 1e-4


def export_open_clip(encoder: VisionEncoder, tower: TextTower, folder: Path) -> None:
    """Write both towers as an open_clip folder: `open_clip.create_model_and_transforms("local-dir:FOLDER")`.

    A tower whose sizes no stock timm entry has needs one more line before that: the folder's `timm_entry.py`, or `import encoders` and
    `load_encoder("openclip:FOLDER")`.

    Args:
        encoder: With a joint space, as its own text tower has it.
        tower: The text tower.
        folder: Where to; it exists and is empty.

    Raises:
        ConfigError: The towers do not share a space, or open_clip cannot express the encoder.
    """
    if encoder.joint_width != tower.joint_width:
        raise ConfigError(
            f"encoder '{encoder.config.origin}' has joint width {encoder.joint_width}, text tower '{tower.name}' {tower.joint_width}: they "
            "belong to different spaces; name its own with --text_tower"
        )
    if encoder.spec.crop_pct != 1:
        raise ConfigError(f"open_clip cuts no margin: an encoder with crop_pct {encoder.spec.crop_pct} would see other pictures there")
    vision, entry = _vision_config(encoder)
    config = {**text_model_config(tower.name), "embed_dim": encoder.joint_width, "vision_cfg": vision}
    with quiet_open_clip():
        kind = open_clip.CustomTextCLIP if config.get("custom_text") or "hf_model_name" in config["text_cfg"] else open_clip.CLIP
        clip = kind(**{key: value for key, value in config.items() if key != "custom_text"}).eval()
    state: dict[str, Tensor] = {f"visual.trunk.{name}": tensor for name, tensor in encoder.network.state_dict().items()}
    state |= {"logit_scale": torch.tensor(SCALE_AT_TEST), **tower.clip.state_dict()}
    load_strict(clip, {name: tensor.float() for name, tensor in state.items()}, f"encoder '{encoder.config.origin}' as an open_clip model")
    _assert_same(encoder, clip)
    about: dict[str, Any] = {"templates": tower.templates, "origin": encoder.config.origin, "text_tower": tower.name}
    parts = ClipParts(clip, tower.tokenizer, config, encoder.spec, encoder.config.origin, entry=entry)
    export_clip(folder, parts, about, half=False)


def text_model_config(name: str) -> dict[str, Any]:
    """Find open_clip's `model_cfg` for a text tower by the name it is loaded by."""
    bare = Path(name.removeprefix("openclip:").removeprefix("local-dir:")) if name != "mini-clip" else MINI_CLIP
    if (bare / TEXT_CONFIG).is_file():
        config = read_text_config(bare)
        config.pop("mmkit", None)
        return config
    if (bare / "open_clip_config.json").is_file():
        model: dict[str, Any] = json.loads((bare / "open_clip_config.json").read_text(encoding="utf-8"))["model_cfg"]
        return model
    if name.startswith("hf:"):
        raise ConfigError(f"text tower '{name}' is transformers'; open_clip takes its own: name one of the same space with --text_tower")
    found: dict[str, Any] | None = get_model_config(str(bare).partition("/")[0])
    if found is None:
        raise ConfigError(f"text tower '{name}': open_clip has no configuration of this name")
    return found


def _vision_config(encoder: VisionEncoder) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Give open_clip's `vision_cfg`, and the timm entry that it needs if no stock one will do."""
    network, config = encoder.network, encoder.config
    headless = not network.num_classes  # SigLIP: attention pooling ends in the joint space
    args = {key: value for key, value in (config.model_args or {}).items() if key not in NO_SHAPE}
    with torch.device("meta"):
        stock = network_args(timm.create_model(config.architecture, num_classes=network.num_classes, global_pool=network.global_pool))
    entry = None
    if any(stock.get(key) != value for key, value in args.items()):
        entry = own_entry(config.architecture, args)
    vision = {
        "image_size": encoder.spec.size,
        "timm_model_name": entry["name"] if entry else config.architecture,
        "timm_pool": network.global_pool,
    }
    return {**vision, "timm_proj": "none" if headless else None}, entry


@torch.no_grad()
def _assert_same(encoder: VisionEncoder, clip: Any) -> None:
    images = torch.randn(1, 3, encoder.spec.size, encoder.spec.size, generator=torch.Generator().manual_seed(0))
    expected = encoder.float()(images).pooler_output
    difference = float((clip.encode_image(images) - expected).abs().max() / expected.abs().max())
    if not difference <= TOLERANCE:
        raise ConfigError(f"'{encoder.config.origin}' is another network in open_clip: embeddings differ by {difference:.1e}")
