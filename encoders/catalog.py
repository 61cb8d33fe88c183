"""The one way to an encoder: `load_encoder(SOURCE)`, and the table of those that have a name.

    "mini-clip"                   the teacher inside this package
    "timm:NAME[.TAG]"             a vision transformer of timm
    "openclip:MODEL/TAG"          the image tower of an open_clip model; also a folder with open_clip_config.json
    "hf:NAME" or "hf:FOLDER"      a CLIP or SigLIP vision tower of transformers
    FOLDER                        what save_pretrained of a VisionEncoder wrote (trainings write it as RUN/encoder, `mmkit convert` as OUT)

Whatever the source, the network inside is stock timm; a conversion that does not give the source's own numbers is refused.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from encoders.foreign import from_hf, from_open_clip
from encoders.modeling import MODEL_TYPE, VisionEncoder, VisionEncoderConfig, image_spec_of
from encoders.text import quiet_open_clip
from encoders.text_folder import IN_THIS_FOLDER, TEXT_FOLDER
from mmkit.checkpoint import load_strict, load_weights
from mmkit.errors import ConfigError, DataError, NameNotFound
from mmkit.images import ImageSpec
from mmkit.trainable import trainable_table

MINI_CLIP = Path(__file__).parent / "data" / "mini_clip"
# Widths of the joint spaces of CLIP models. No data set that timm classifies has as many classes, so a head of this width is a projection.
CLIP_WIDTHS = {512, 640, 768, 1024, 1152, 1280, 1536}


@dataclass(frozen=True)
class EncoderRow:
    """An encoder with a name: where `load_encoder` finds it, and what to know before using it."""

    source: str
    weights: str
    licence: str
    note: str


ENCODERS: dict[str, EncoderRow] = {
    "mini-clip": EncoderRow(
        "mini-clip", "in this package", "Apache-2.0", "96 px, 6 x 6 patches, joint width 256; the quickstart's teacher"
    ),
    "clip-b16": EncoderRow("openclip:ViT-B-16/openai", "downloaded by open_clip", "MIT", "224 px, 14 x 14, joint width 512"),
    "clip-l14": EncoderRow("openclip:ViT-L-14/openai", "downloaded by open_clip", "MIT", "224 px, 16 x 16, joint width 768"),
    "clip-l14-336": EncoderRow("openclip:ViT-L-14-336/openai", "downloaded by open_clip", "MIT", "336 px, 24 x 24; LLaVA-1.5's tower"),
    "eva01-g14-plus": EncoderRow(
        "openclip:EVA01-g-14-plus/merged2b_s11b_b114k", "downloaded by open_clip", "MIT", "224 px, 16 x 16, joint width 1024; UTA's teacher"
    ),
    "eva02-b16": EncoderRow("openclip:EVA02-B-16/merged2b_s8b_b131k", "downloaded by open_clip", "MIT", "224 px, 14 x 14, joint width 512"),
    "eva02-l14": EncoderRow("openclip:EVA02-L-14/merged2b_s4b_b131k", "downloaded by open_clip", "MIT", "224 px, 16 x 16, joint width 768"),
    "siglip-b16": EncoderRow(
        "openclip:ViT-B-16-SigLIP/webli", "downloaded by open_clip", "Apache-2.0", "224 px, 14 x 14, no CLS, joint width 768"
    ),
}


def load_encoder(source: str | Path, *, pretrained: bool = True) -> VisionEncoder:
    """Load an encoder from any of the sources above, in eval mode, on the CPU, in float32 (a folder: in the type it was saved in).

    Args:
        source: See the head of this file. A name of `ENCODERS` stands for its row's source.
        pretrained: False gives random weights for "timm:" and "openclip:MODEL" sources.

    Raises:
        NameNotFound: Nothing has this name; the message gives the nearest.
        DataError: A folder does not hold a whole encoder, or its weights do not fit its configuration.
        ConfigError: The network has no tokens to give, or cannot be expressed in timm's form.
    """
    text = str(source)
    kind, _, name = text.partition(":")
    if text == "mini-clip":
        return _mini_clip()
    if text in ENCODERS:
        return load_encoder(ENCODERS[text].source, pretrained=pretrained)
    loaders: dict[str, Callable[[str, str, bool], VisionEncoder]] = {
        "timm": _from_timm,
        "openclip": _from_open_clip_name,
        "hf": _from_hf_name,
    }
    if name and kind in loaders:
        return loaders[kind](name, text, pretrained).eval()
    folder = Path(text).expanduser()
    if folder.is_dir():
        return _from_folder(folder, text)
    if folder.exists():
        raise DataError(f"encoder '{text}' is a file; a folder with config.json and model.safetensors was expected")
    known = [*ENCODERS, *(f"timm:{model}" for model in timm.list_models("*vit_*") + timm.list_models("eva*"))]
    near = get_close_matches(text if kind in loaders else text.rpartition(":")[2], known, n=4, cutoff=0.4) or list(ENCODERS)
    raise NameNotFound(
        f"no encoder '{text}': it is neither a folder nor a name; nearest: {', '.join(near)}. "
        "Others are written timm:NAME, openclip:MODEL/TAG, hf:NAME; `mmkit list encoders` shows the table"
    )


def encoder_table(encoders: dict[str, VisionEncoder]) -> str:
    """Draw what every start prints: each encoder's parameters, frozen or trained, from where; and how its images are prepared."""
    table = trainable_table(
        nn.ModuleDict(dict(encoders)), dict(encoders), {name: encoder.config.origin for name, encoder in encoders.items()}
    )
    return "\n".join([table, *(f"{name}: {describe(encoder)}" for name, encoder in encoders.items())])


def describe(encoder: VisionEncoder) -> str:
    """Put an encoder's shape and image spec into one line."""
    spec = encoder.spec
    joint = (
        f"joint width {encoder.joint_width}, text tower {encoder.config.text_tower or 'none'}" if encoder.joint_width else "no joint space"
    )
    return (
        f"{encoder.config.architecture}, width {encoder.width}, {encoder.grid[0]} x {encoder.grid[1]} patches "
        f"+ {encoder.num_prefix_tokens}, {joint}; "
        f"images {spec.size} px, {spec.resize}, {spec.interpolation}, crop_pct {spec.crop_pct}"
    )


def timm_config_of(spec: ImageSpec, num_classes: int) -> dict[str, Any]:
    """Put an image spec into the words of timm's `pretrained_cfg`."""
    return {
        "input_size": (3, spec.size, spec.size),
        "mean": spec.mean,
        "std": spec.std,
        "interpolation": spec.interpolation,
        "crop_pct": spec.crop_pct,
        "crop_mode": {"crop": "center", "squash": "squash", "pad": "border"}[spec.resize],
        "num_classes": num_classes,
    }


def export_timm(encoder: VisionEncoder, folder: Path) -> None:
    """Write the network inside as a plain timm checkpoint: `timm.create_model("local-dir:FOLDER", pretrained=True)` reads it.

    timm's `pretrained_cfg` is rewritten from the encoder's image spec: a model's own entry keeps the sizes it was registered with.
    """
    spec, config = encoder.spec, encoder.config
    cfg = timm_config_of(spec, encoder.network.num_classes)
    network: Any = encoder.network
    dropper, network.patch_drop = network.patch_drop, nn.Identity()  # stateless; only so that nothing of ours is in the pickle-free export
    try:
        old, network.pretrained_cfg = network.pretrained_cfg, {**network.pretrained_cfg, **cfg}
        try:
            timm.models.save_for_hf(network, str(folder), model_args=config.model_args, safe_serialization=True)
        finally:
            network.pretrained_cfg = old
    finally:
        network.patch_drop = dropper


def _mini_clip() -> VisionEncoder:
    if not (MINI_CLIP / "open_clip_config.json").is_file():
        raise DataError(f"mini-clip: its weights are missing from this installation (encoders/data/{MINI_CLIP.name}); reinstall mmkit")
    return from_open_clip(str(MINI_CLIP), text_tower="mini-clip", origin="mini-clip").eval()


def _from_open_clip_name(name: str, source: str, pretrained: bool) -> VisionEncoder:
    return from_open_clip(name, text_tower=source, origin=source, pretrained=pretrained)


def _from_hf_name(name: str, source: str, pretrained: bool) -> VisionEncoder:
    return from_hf(name, origin=source)


def _from_timm(name: str, source: str, pretrained: bool) -> VisionEncoder:
    """Build timm's model; a projection to a CLIP space is kept as the head, a classifier is left out."""
    base = name.partition(".")[0]
    if not timm.is_model(base):
        near = get_close_matches(name, timm.list_models() + timm.list_pretrained(), n=4, cutoff=0.4)
        raise NameNotFound(
            f"no encoder '{source}': timm {timm.__version__} has no model '{base}'; nearest: {', '.join(f'timm:{n}' for n in near)}"
        )
    cfg = timm.get_pretrained_cfg(name, allow_unregistered=False)
    classes = cfg.num_classes if cfg else 0
    joint = classes if classes in CLIP_WIDTHS else None
    with torch.device("meta"):
        shape: Any = timm.create_model(name, num_classes=joint or 0)
    if not isinstance(shape, VisionTransformer | Eva):
        raise ConfigError(
            f"'{source}' is a {type(shape).__name__}; an encoder here gives tokens: name a vision transformer (VisionTransformer, Eva)"
        )
    args: dict[str, Any] = {}
    if shape.attn_pool is not None and joint is None:
        joint, args = shape.embed_dim, {"num_classes": 0}  # SigLIP: the pooling itself ends in the joint space
    if not pretrained:
        origin = f"random weights ({source})"
        return VisionEncoder(
            VisionEncoderConfig(architecture=base, model_args=args, joint_width=joint, origin=origin, image_spec=image_spec_of(shape))
        )
    try:
        with quiet_open_clip():
            network = timm.create_model(name, pretrained=True, num_classes=0 if args else joint or 0)
    except (OSError, RuntimeError) as error:
        raise _no_weights(source, error) from error
    config = VisionEncoderConfig(architecture=base, model_args=args, joint_width=joint, origin=source, image_spec=image_spec_of(network))
    encoder = VisionEncoder(config)
    load_strict(encoder.network, network.state_dict(), source)
    return encoder


def _no_weights(source: str, error: Exception) -> DataError:
    return DataError(
        f"encoder '{source}' has no weights here: {str(error).splitlines()[0]}. "
        "Fetch them where there is a network (huggingface_hub keeps them), or name a folder; random weights: "
        "load_encoder(..., pretrained=False)"
    )


def _from_folder(folder: Path, source: str) -> VisionEncoder:
    """Load a VisionEncoder folder strictly, or tell which kind of folder it is instead."""
    if (folder / "open_clip_config.json").is_file():
        return from_open_clip(str(folder), text_tower=source, origin=source).eval()
    if not (folder / "config.json").is_file():
        inner = folder / "encoder"
        hint = f" Did you mean {inner}?" if (inner / "config.json").is_file() else ""
        raise DataError(f"encoder folder '{source}' has no config.json; a folder that a training wrote (RUN/encoder) was expected.{hint}")
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{folder / 'config.json'} is no valid JSON: {error}") from error
    if not isinstance(values, dict) or values.get("model_type") != MODEL_TYPE:
        found = values.get("model_type") if isinstance(values, dict) else None
        raise DataError(
            f"'{source}' holds a model of type '{found}', not an encoder ('{MODEL_TYPE}'). "
            f"A CLIP or SigLIP of transformers is written hf:{source}; a run folder's encoder is in RUN/encoder"
        )
    try:
        encoder = VisionEncoder(VisionEncoderConfig.from_dict(values))
    except ValueError as error:
        raise DataError(f"encoder folder '{source}': {error}") from error
    state = folder_weights(folder)
    load_strict(encoder, state, f"{folder / 'model.safetensors'}")
    encoder.network.to(next(iter(state.values())).dtype)
    if encoder.config.text_tower == IN_THIS_FOLDER:  # the folder may have been moved: its own text tower is named by where it is now
        encoder.config.text_tower = str(folder / TEXT_FOLDER)
    return encoder.eval()


def folder_weights(folder: Path) -> dict[str, Tensor]:
    """Read all weight files of a folder (large encoders are written in shards)."""
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise DataError(f"encoder folder '{folder}' has no model.safetensors: its copy or its training was cut off")
    state: dict[str, Tensor] = {}
    for file in files:
        try:
            state.update(load_weights(file))
        except SafetensorError as error:
            raise DataError(f"{file} is damaged: {error}") from error
    return state


@torch.no_grad()
def encode_images(encoder: VisionEncoder, images: Tensor) -> Tensor:
    """Embed images [B, 3, H, W] into the joint space: unit rows [B, E].

    Raises:
        ConfigError: The encoder has no joint space.
    """
    if encoder.joint_width is None:
        raise ConfigError(f"encoder '{encoder.config.origin}' has no joint image-text space")
    pooled: Tensor = encoder(images).pooler_output
    return nn.functional.normalize(pooled.float(), dim=-1)
