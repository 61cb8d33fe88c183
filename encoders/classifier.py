"""A classifier made of an encoder: stock timm, its pooling, its fresh final norm, its head, and what of it is trained.

    classifier = build_classifier(NetworkConfig(encoder="clip-b16"), names)
    classifier.network(images)                            # images [B, 3, H, W] -> logits [B, C]
    save_classifier(classifier, state, "runs/ft/classifier")      # timm.create_model("local-dir:runs/ft/classifier", pretrained=True)

Source: CLIP Itself is a Strong Fine-tuner (FT-CLIP). What the paper leaves out (the new norm before the mean, the small head, the frozen
patch embedding) is an option here, with the value behind the published figures as its default.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from timm.layers import trunc_normal_
from timm.models.eva import Eva
from torch import Tensor
from torch.nn import functional as F

from encoders.architectures import MINI_VIT_ARGS, MINI_VIT_ENTRY
from encoders.catalog import load_encoder, timm_config_of
from encoders.modeling import VisionEncoder, VisionEncoderConfig
from mmkit.checkpoint import load_strict, load_weights
from mmkit.errors import ConfigError, DataError
from mmkit.images import ImageSpec
from mmkit.trainable import set_trainable

Pooling = Literal["norm_then_mean", "mean_then_norm", "cls"]
HEAD_PARTS = ("head.", "norm.", "fc_norm.", "attn_pool.")  # what a classifier brings itself
CARD = "mmkit.json"  # beside timm's config.json, whose form changes from version to version
LAYER_SCALES = (".ls1.gamma", ".ls2.gamma", ".gamma_1", ".gamma_2")  # of a VisionTransformer, of an Eva
OWN_ARGS = ("num_classes", "global_pool", "fc_norm", "use_fc_norm", "pool_include_prefix", "head_init_scale", "drop_path_rate")


@dataclass
class NetworkConfig:
    """The network, and what of it is trained."""

    encoder: str = field(
        default="", metadata={"help": "an encoder folder, a name (`mmkit list encoders`), timm:..., openclip:MODEL/TAG, hf:..."}
    )
    scratch: bool = field(default=False, metadata={"help": "the same network with random weights"})
    image_size: int = field(default=0, metadata={"help": "pixels; 0 is the encoder's own; else the positions are resampled"})
    position_resampling: Literal["bicubic", "bicubic_antialias"] = field(
        default="bicubic", metadata={"help": "of learned positions at another image_size; FT-CLIP's is bicubic, timm's bicubic_antialias"}
    )
    pooling: Pooling = field(default="norm_then_mean", metadata={"help": "of patch tokens (FT-CLIP: norm_then_mean), or the CLS token"})
    fresh_norm: bool = field(default=True, metadata={"help": "begin with a new final norm (weight 1, bias 0), not the encoder's"})
    head_scale: float = field(default=0.001, metadata={"help": "factor on the head's first weights (normal, std 0.02)"})
    crop_pct: float = field(default=1.0, metadata={"help": "evaluation: share of the scaled short side that the centre crop keeps"})
    freeze_patch_embed: bool = field(default=True, metadata={"help": "FT-CLIP at 224 px; its 384 and 336 px runs train it"})
    train_blocks: int | None = field(
        default=None, metadata={"help": "train the last N blocks, norm and head alone; 0 is a linear probe; none trains all"}
    )
    drop_path: float = field(default=0.0, metadata={"help": "stochastic depth of the last block, growing linearly from 0"})
    layer_scale: float | None = field(default=None, metadata={"help": "add a scale to each branch, beginning at this value"})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "compute activations twice to save memory"})

    def validate(self) -> None:
        """Refuse what contradicts itself.

        Raises:
            ConfigError: The message names the setting.
        """
        if not self.encoder:
            raise ConfigError("network.encoder is empty; name one: --encoder mini-clip, --encoder runs/uta/encoder")
        if self.scratch and (self.freeze_patch_embed or self.train_blocks is not None):
            raise ConfigError(
                "network.scratch begins with random weights, and a frozen part would stay random: "
                "add --network.freeze_patch_embed false --network.train_blocks none"
            )
        if self.train_blocks is not None and self.train_blocks < 0:
            raise ConfigError(f"network.train_blocks is {self.train_blocks}; 0 (linear probe), the number of last blocks, or none is right")
        if self.image_size < 0 or not 0 < self.crop_pct <= 1 or not 0 <= self.drop_path < 1:
            raise ConfigError(
                f"network.image_size {self.image_size}, crop_pct {self.crop_pct}, drop_path {self.drop_path}: 0 or pixels, a share in (0, 1] "
                "and a share in [0, 1) are right"
            )


@dataclass(frozen=True)
class Classifier:
    """A timm network with a head, and what is needed to build it again and to feed it.

    Attributes:
        network: A VisionTransformer or Eva; images [B, 3, H, W] to logits [B, C].
        architecture, model_args: What `timm.create_model` builds it from, `num_classes` apart.
        spec: How images are prepared for evaluation.
        class_names: Names of the logits, in order.
        origin: Where its weights came from.
    """

    network: Any
    architecture: str
    model_args: dict[str, Any]
    spec: ImageSpec
    class_names: tuple[str, ...]
    origin: str


def build_classifier(config: NetworkConfig, class_names: tuple[str, ...]) -> Classifier:
    """Put a fresh norm and head on an encoder's trunk, and freeze what the configuration says; draws from torch's generator.

    Raises:
        NameNotFound: There is no such encoder.
        DataError: Its folder is damaged.
        ConfigError: timm cannot build the network this way, or the encoder has no norm that could be kept.
    """
    encoder = load_encoder(config.encoder, pretrained=not config.scratch)
    args = {key: value for key, value in (encoder.config.model_args or {}).items() if key not in OWN_ARGS}
    architecture = encoder.config.architecture
    if architecture == "vit_mini_patch16_96":  # a name that timm alone does not know
        architecture, args = MINI_VIT_ENTRY, {**MINI_VIT_ARGS, **args}
    args |= {"img_size": config.image_size or encoder.config.image_size, **pooling_args(encoder, config.pooling)}
    if config.drop_path:
        args["drop_path_rate"] = config.drop_path
    if config.layer_scale is not None:
        args["init_values"] = config.layer_scale
    try:
        network = timm.create_model(architecture, num_classes=len(class_names), **args)
    except (RuntimeError, TypeError, AssertionError, ValueError) as error:
        raise ConfigError(f"timm {timm.__version__} cannot build '{architecture}' with {args}: {error}") from error
    if args["img_size"] % network.patch_embed.patch_size[0]:
        raise ConfigError(f"network.image_size {args['img_size']} is no multiple of the patch, {network.patch_embed.patch_size[0]} pixels")
    if not config.scratch:
        load_strict(network, trunk_state(network, encoder, config), config.encoder)
    reset_head(network, config.head_scale)
    choose_trained(network, config)
    if config.gradient_checkpointing:
        network.set_grad_checkpointing(True)
    own = encoder.spec
    spec = ImageSpec(args["img_size"], own.mean, own.std, own.interpolation, own.resize, config.crop_pct)
    origin = f"random weights ({config.encoder})" if config.scratch else config.encoder
    return Classifier(network, architecture, args, spec, class_names, origin)


def pooling_args(encoder: VisionEncoder, pooling: Pooling) -> dict[str, Any]:
    """Say a pooling in timm's arguments.

    `norm_then_mean` is FT-CLIP's: each patch token is normalised, then their mean is taken, without CLS. timm's own 'avg' takes the mean
    first, which is another network.
    """
    pool_first = "use_fc_norm" if isinstance(encoder.network, Eva) else "fc_norm"
    return {"global_pool": "token" if pooling == "cls" else "avg", pool_first: pooling == "mean_then_norm"}


def trunk_state(network: Any, encoder: VisionEncoder, config: NetworkConfig) -> dict[str, Tensor]:
    """Take an encoder's weights for a classifier's trunk; the classifier's own beginnings stay where it has something of its own.

    Raises:
        ConfigError: `fresh_norm` is off, and the encoder has no final norm.
    """
    state: dict[str, Tensor] = encoder.network.state_dict()
    own: dict[str, Tensor] = network.state_dict()
    merged = {name: tensor for name, tensor in state.items() if not name.startswith(HEAD_PARTS)}
    merged |= {
        name: tensor
        for name, tensor in own.items()
        if name.startswith(HEAD_PARTS) or (config.layer_scale is not None and name.endswith(LAYER_SCALES) and name not in state)
    }
    if not config.fresh_norm:
        norms = {part: [name for name in state if name.startswith(part)] for part in ("norm.", "fc_norm.")}
        part = "norm." if norms["norm."] else "fc_norm."
        if not norms[part]:
            raise ConfigError(f"network.fresh_norm is off, and encoder '{config.encoder}' has no final norm: leave it on")
        target = "fc_norm." if config.pooling == "mean_then_norm" else "norm."
        merged |= {target + name.removeprefix(part): state[name] for name in norms[part]}
    if (place := state.get("pos_embed")) is not None and own["pos_embed"].shape != place.shape:
        antialias = config.position_resampling == "bicubic_antialias"
        merged["pos_embed"] = resample_positions(place, encoder.grid, network.patch_embed.grid_size, antialias)
    return merged


def resample_positions(positions: Tensor, old: tuple[int, int], new: tuple[int, int], antialias: bool = False) -> Tensor:
    """Bring learned positions [1, P + N, D] from one grid to another; those of prefix tokens (P may be 0) stay as they are.

    Source: FT-CLIP resamples bicubically without antialiasing; timm's own way has it on, 8 % apart on noise.
    """
    prefix = positions.shape[1] - old[0] * old[1]
    grid = positions[:, prefix:].reshape(1, *old, -1).permute(0, 3, 1, 2)  # [1, D, down, across]
    grid = F.interpolate(grid.float(), new, mode="bicubic", align_corners=False, antialias=antialias)
    return torch.cat([positions[:, :prefix], grid.flatten(2).transpose(1, 2).to(positions.dtype)], dim=1)


def reset_head(network: Any, scale: float) -> None:
    """Begin with a head that says almost nothing: std 0.02, scaled, bias 0 (a large one would pull the trunk about at first)."""
    with torch.no_grad():
        trunc_normal_(network.head.weight, std=0.02)
        network.head.weight.mul_(scale)
        network.head.bias.zero_()


def choose_trained(network: Any, config: NetworkConfig) -> None:
    """Freeze by name what is not trained; frozen modules stay in eval mode.

    Raises:
        ConfigError: `train_blocks` is more than there are.
    """
    depth, count = len(network.blocks), config.train_blocks
    if count is not None and count > depth:
        raise ConfigError(f"network.train_blocks is {count}; '{config.encoder}' has {depth} blocks: 0 to {depth}, or none, is right")
    names = [name for name, _ in network.named_parameters()]
    if count is not None:
        trained = {f"blocks.{number}." for number in range(depth - count, depth)}
        names = [name for name in names if name.startswith((*trained, *HEAD_PARTS))]
    elif config.freeze_patch_embed:
        names = [name for name in names if not name.startswith("patch_embed.")]
    set_trainable(network, names)


# ---- folders -----------------------------------------------------------------------------------------------------------------------------


def save_classifier(classifier: Classifier, state: Mapping[str, Tensor], folder: Path) -> None:
    """Write trunk and head as a timm checkpoint with its image spec and class names: `timm.create_model("local-dir:FOLDER", pretrained=True)`.

    Args:
        classifier: What is written.
        state: Weights to write; not always the network's present ones (an average, the best epoch's).
        folder: An existing folder.
    """
    spec, network = classifier.spec, fresh_network(classifier)
    load_strict(network, state, "the trained classifier")
    network.pretrained_cfg = {**network.pretrained_cfg, **timm_config_of(spec, len(classifier.class_names))}
    for key in ("label_names", "label_descriptions", "label_offset"):
        network.pretrained_cfg.pop(key, None)
    names = {"label_names": list(classifier.class_names)}
    timm.models.save_for_hf(network, str(folder), model_config=names, model_args=classifier.model_args, safe_serialization=True)
    card = {"architecture": classifier.architecture, "model_args": classifier.model_args, "image_spec": spec.to_dict(),
            "class_names": names["label_names"], "origin": classifier.origin}  # fmt: skip
    (folder / CARD).write_text(json.dumps(card, indent=1, ensure_ascii=False), encoding="utf-8")


def fresh_network(classifier: Classifier) -> Any:
    """Build the network once more, with random weights."""
    return timm.create_model(classifier.architecture, num_classes=len(classifier.class_names), **classifier.model_args)


def load_classifier(folder: Path) -> Classifier:
    """Read what `save_classifier` wrote.

    Raises:
        DataError: The folder holds no classifier of this kit, or not a whole one.
    """
    try:
        card = json.loads((folder / CARD).read_text(encoding="utf-8"))
        spec, names = ImageSpec.from_dict(card["image_spec"]), tuple(card["class_names"])
        classifier = Classifier(None, card["architecture"], card["model_args"], spec, names, card["origin"])
        network = fresh_network(classifier)
    except FileNotFoundError as error:
        inner = folder / "classifier"
        hint = f" Did you mean {inner}?" if inner.is_dir() else ""
        raise DataError(
            f"{folder} is no classifier folder, there is no {error.filename}; a training wrote it as RUN/classifier.{hint}"
        ) from error
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise DataError(f"classifier folder {folder} cannot be read ({error}); its copy or its training was cut off") from error
    load_strict(network, load_weights(folder / "model.safetensors"), str(folder / "model.safetensors"))
    return replace(classifier, network=network.eval())


def export_encoder(classifier: Classifier, state: Mapping[str, Tensor], folder: Path, origin: str, training: dict[str, Any]) -> None:
    """Write the trunk without its head as an encoder folder. It has no joint space any more: its pooled features are the head's input."""
    config = VisionEncoderConfig(
        architecture=classifier.architecture,
        model_args=classifier.model_args,
        image_spec=classifier.spec.to_dict(),
        origin=origin,
        training=training,
    )
    encoder = VisionEncoder(config)
    load_strict(encoder.network, {name: tensor for name, tensor in state.items() if not name.startswith("head.")}, "the trained classifier")
    encoder.save_pretrained(str(folder))
    encoder.spec.image_processor().save_pretrained(str(folder))
