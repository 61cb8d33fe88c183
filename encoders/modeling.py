"""VisionEncoder: any timm vision transformer as a transformers model, with one contract for the whole kit.

Letters: B images, N patches, P prefix tokens (CLS and registers; 0 is allowed), K kept patches, D width, E width of the joint
image-text space.

    out = encoder(images)                # images [B, 3, H, W], prepared by encoder.spec
    out.last_hidden_state                # [B, P + N, D], after the final norm
    out.hidden_states                    # when asked for: what enters block 0, then what leaves each block, all [B, P + N, D]
    out.pooler_output                    # [B, E] in the joint space where there is one, else the pooled features [B, D]
    encoder.tokens(images, keep)         # [B, 1 + K, E]: CLS and the kept patches in the joint space

This file needs torch, timm and transformers, nothing else of the kit: it travels with the weights (`trust_remote_code=True`).
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import timm
import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

MODEL_TYPE = "mmkit_vision_encoder"
Layers = bool | int | Sequence[int] | None


class VisionEncoderConfig(PreTrainedConfig):
    """What is needed to build the network again, and where its weights came from.

    Attributes:
        architecture: A name of `timm.create_model`: a VisionTransformer or an Eva.
        model_args: Keyword arguments for it. `num_classes` is E and stays away, but for a 0: attention pooling itself ends in the space.
        image_spec: size, mean, std, interpolation, resize, crop_pct: the fields of `mmkit.images.ImageSpec`.
        joint_width: E, channels of the joint image-text space; None where the network was never tied to text.
        text_tower: The text tower that shares this space ("mini-clip", "openclip:ViT-B-16/openai"; "./text_tower": in the same folder), if
            any.
        origin: Where the weights came from, for the table printed at every start.
        training: How they were made: objective, teacher, kept patches, step.
        hidden_size, num_hidden_layers, image_size, patch_size: Read off the network; LLaVA's configuration wants them.
    """

    model_type = MODEL_TYPE

    architecture: str = "vit_base_patch16_224"
    model_args: dict[str, Any] | None = None
    image_spec: dict[str, Any] | None = None
    joint_width: int | None = None
    text_tower: str | None = None
    origin: str = "random weights"
    training: dict[str, Any] | None = None
    hidden_size: int | None = None
    num_hidden_layers: int | None = None
    image_size: int | None = None
    patch_size: int | None = None


class KeepPatches(nn.Module):
    """Takes the place of timm's patch dropout: passes on the prefix tokens and the patches it was told to keep.

    timm calls `patch_drop` after the position embedding and before the first block, and Eva gathers its rotary table by the indices that
    come back; so no model code is copied.

    Attributes:
        keep: Patch positions [B, K] without prefix tokens, in the order wanted; None keeps all. Set for one call by `VisionEncoder`.
    """

    def __init__(self, num_prefix_tokens: int, returns_indices: bool) -> None:
        super().__init__()
        self.num_prefix_tokens = num_prefix_tokens
        self.returns_indices = returns_indices  # Eva wants (tokens, indices), VisionTransformer the tokens alone
        self.keep: Tensor | None = None

    def forward(self, tokens: Tensor) -> Tensor | tuple[Tensor, Tensor | None]:
        """Thin out tokens [B, P + N, D] to [B, P + K, D]."""
        if self.keep is not None:
            index = self.keep.unsqueeze(-1).expand(-1, -1, tokens.shape[-1])
            prefix = self.num_prefix_tokens
            tokens = torch.cat([tokens[:, :prefix], tokens[:, prefix:].gather(1, index)], dim=1)
        return (tokens, self.keep) if self.returns_indices else tokens


class VisionEncoder(PreTrainedModel):
    """A timm vision transformer behind the contract at the top of this file.

    Raises:
        ValueError: The configuration names a network that has no tokens, or contradicts the network that timm builds.
    """

    config_class = VisionEncoderConfig
    config: VisionEncoderConfig
    base_model_prefix = "network"
    main_input_name = "pixel_values"
    input_modalities = "image"
    supports_gradient_checkpointing = True
    _supports_sdpa = True  # timm's attention calls scaled_dot_product_attention itself
    _no_split_modules = {"Block", "EvaBlock", "EvaBlockPostNorm"}  # noqa: RUF012

    def __init__(self, config: VisionEncoderConfig) -> None:
        super().__init__(config)
        self.network = build_network(config.architecture, config.model_args or {}, config.joint_width)
        self.network.patch_drop = KeepPatches(self.network.num_prefix_tokens, isinstance(self.network, Eva))
        self._describe_network()
        if self.network.patch_embed.proj.weight.device.type != "meta":
            for module in self.network.modules():
                module._is_hf_initialized = True  # timm has initialised it, its own way; transformers would do it again, with std 0.02
        self.post_init()

    def _describe_network(self) -> None:
        """Write into the configuration what others read off it, and refuse a configuration that says something else."""
        image_size, patch_size = self.network.patch_embed.img_size, self.network.patch_embed.patch_size
        found = {
            "hidden_size": self.network.embed_dim,
            "num_hidden_layers": len(self.network.blocks),
            "image_size": image_size[0],
            "patch_size": patch_size[0],
        }
        for key, value in found.items():
            if getattr(self.config, key, None) not in (None, value):
                raise ValueError(
                    f"config.json says {key} {getattr(self.config, key)}; {self.config.architecture} with its model_args has {value}"
                )
            setattr(self.config, key, value)
        self.config.image_spec = self.config.image_spec or image_spec_of(self.network)
        if image_size[0] != image_size[1] or self.config.image_spec["size"] != image_size[0]:
            raise ValueError(f"image spec says size {self.config.image_spec['size']}; {self.config.architecture} takes {tuple(image_size)}")

    def _init_weights(self, module: nn.Module) -> None:
        """Fill what no weight file holds: rotary tables and the like, which are empty after a load on the meta device."""
        super()._init_weights(module)
        if hasattr(module, "init_non_persistent_buffers"):
            reset: Any = module.init_non_persistent_buffers
            reset()

    def _set_gradient_checkpointing(self, enable: bool = True, *args: Any, **kwargs: Any) -> None:
        self.network.set_grad_checkpointing(enable)

    @property
    def spec(self) -> Any:
        """How a picture becomes a row of `images`: an `mmkit.images.ImageSpec`. Without mmkit, read `config.image_spec`."""
        try:
            from mmkit.images import ImageSpec
        except ImportError as error:
            raise ImportError(
                "`spec` makes an mmkit ImageSpec: `pip install mmkit`, or read `config.image_spec`, the same numbers"
            ) from error
        return ImageSpec.from_dict(self.config.image_spec or {})

    @property
    def width(self) -> int:
        """D, channels of one token."""
        return int(self.network.embed_dim)

    @property
    def joint_width(self) -> int | None:
        """E, channels of the joint image-text space, or None."""
        return self.config.joint_width

    @property
    def grid(self) -> tuple[int, int]:
        """Patches down and across."""
        down, across = self.network.patch_embed.grid_size
        return int(down), int(across)

    @property
    def num_patches(self) -> int:
        """N, patches per image."""
        return self.grid[0] * self.grid[1]

    @property
    def num_prefix_tokens(self) -> int:
        """P, tokens in front of the patches: CLS and registers."""
        return int(self.network.num_prefix_tokens)

    def get_input_embeddings(self) -> nn.Module:
        """Give the patch embedding (what transformers hooks to make inputs require gradients)."""
        return self.network.patch_embed

    def forward(
        self, pixel_values: Tensor, output_hidden_states: Layers = None, return_dict: bool | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling | tuple[Any, ...]:
        """Encode whole images.

        Args:
            pixel_values: Images [B, 3, H, W], prepared by `spec`.
            output_hidden_states: True for all layers; a number or several for these only (the others are None, to save memory). Layer 0 is
                what enters the first block; layers are not normalised, except that `last_hidden_state` is.
            return_dict: False gives a tuple.
            kwargs: `interpolate_pos_encoding=False` and other switches that transformers passes to every tower; nothing here reads them.

        Raises:
            ValueError: The images are not [B, 3, H, W] of the size that `spec` says.
        """
        if kwargs.get("output_attentions"):
            raise ValueError("timm's fused attention keeps no attention maps: output_attentions is not available here")
        layers = getattr(self.config, "output_hidden_states", False) if output_hidden_states is None else output_hidden_states
        wanted = layer_numbers(layers, len(self.network.blocks))
        with self._recorded(wanted) as states:
            features = self._features(pixel_values, None)  # [B, P + N, D]
        out = BaseModelOutputWithPooling(
            last_hidden_state=features,
            pooler_output=self.network.forward_head(features),  # [B, E]
            hidden_states=tuple(map(states.get, range(len(self.network.blocks) + 1))) if wanted else None,  # None: not wanted
        )
        return out.to_tuple() if return_dict is False else out

    def tokens(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """Encode images into tokens of the joint space, one for the whole image and one for each patch.

        Args:
            images: [B, 3, H, W], prepared by `spec`.
            keep: Patch positions [B, K] that enter the network, CLS not counted. None is all N, in order.

        Returns:
            [B, 1 + K, E]. Token 0 is the image's own embedding, equal to `pooler_output` when nothing is dropped. Towers with attention
            pooling (SigLIP) have no CLS: token 0 is pooled, and each patch goes through the pooling alone.

        Raises:
            ValueError: There is no joint space, or the network pools in a way that gives single tokens no place in it.
        """
        if self.config.joint_width is None:
            raise ValueError(
                f"'{self.config.origin}' ({self.config.architecture}) has no joint image-text space: tokens need a CLIP-like encoder"
            )
        network, prefix = self.network, self.num_prefix_tokens
        features = self._features(images, keep)  # [B, P + K, D]
        patches = features[:, prefix:]
        if network.attn_pool is not None:
            alone = patches.flatten(0, 1).unsqueeze(1)  # [B K, 1, D]: attention over one key is that key's value
            joint = network.head(network.fc_norm(network.attn_pool(alone))).unflatten(0, patches.shape[:2])
            return torch.cat([network.forward_head(features).unsqueeze(1), joint], dim=1)
        if network.global_pool != "token":
            raise ValueError(
                f"{self.config.architecture} pools by '{network.global_pool}'; single tokens have a place in the joint space with "
                "'token' (and attention pooling) only"
            )
        return network.head(network.fc_norm(torch.cat([features[:, :1], patches], dim=1)))

    def _features(self, images: Tensor, keep: Tensor | None) -> Tensor:
        """Run the network up to its final norm: [B, P + K, D]. `keep` never outlives the call."""
        if images.dim() != 4 or tuple(images.shape[1:]) != (3, self.config.image_size, self.config.image_size):
            size = self.config.image_size
            raise ValueError(
                f"images are {list(images.shape)}; '{self.config.origin}' takes [B, 3, {size}, {size}]: use encoder.spec.transform()"
            )
        if keep is not None and (keep.dim() != 2 or len(keep) != len(images)):
            raise ValueError(f"keep is {list(keep.shape)} for {len(images)} images; [B, K] patch positions were expected")
        drop = self.network.patch_drop
        drop.keep = keep
        try:
            return self.network.forward_features(images.to(self.network.patch_embed.proj.weight.dtype))
        finally:
            drop.keep = None  # a stale index set would silently change every later result

    @contextmanager
    def _recorded(self, wanted: set[int]) -> Iterator[dict[int, Tensor]]:
        """Collect the wanted layers of one forward, by number; 0 is what enters the first block."""
        states: dict[int, Tensor] = {}
        blocks, handles = self.network.blocks, []
        if 0 in wanted:
            handles.append(blocks[0].register_forward_pre_hook(lambda _, args: states.__setitem__(0, args[0])))
        for layer in sorted(wanted - {0}):
            handles.append(blocks[layer - 1].register_forward_hook(lambda _, __, out, layer=layer: states.__setitem__(layer, out)))
        try:
            yield states
        finally:
            for handle in handles:
                handle.remove()


def layer_numbers(layers: Layers, depth: int) -> set[int]:
    """Turn transformers' `output_hidden_states` (a switch, a number, several) into layer numbers 0 to depth.

    Raises:
        ValueError: A number is out of range.
    """
    if layers is None or layers is False:
        return set()
    if layers is True:
        return set(range(depth + 1))
    numbers = [layers] if isinstance(layers, int) else list(layers)
    wrong = [number for number in numbers if not -depth - 1 <= number <= depth]
    if wrong:
        raise ValueError(
            f"hidden state {wrong[0]} was asked for; this encoder has {-depth - 1} to {depth} ({depth} blocks and what enters them)"
        )
    return {number % (depth + 1) for number in numbers}


def build_network(architecture: str, model_args: dict[str, Any], joint_width: int | None) -> Any:
    """Build a timm network with random weights and a linear head to the joint space (or none).

    Raises:
        ValueError: It is no vision transformer, an argument is unknown, or patch dropout is asked for.
    """
    if model_args.get("patch_drop_rate"):
        raise ValueError("patch_drop_rate is not for model_args: patches are dropped by `tokens(images, keep)`")
    if nothing := [key for key, value in model_args.items() if value is None]:
        raise ValueError(
            f"model_args: {', '.join(nothing)} is none, and timm ignores arguments that are none: leave it out, or give a value"
        )
    args: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in model_args.items()}
    # SigLIP has a joint space and no head: its attention pooling ends in it
    headless = joint_width is None or (args.get("num_classes") == 0)
    args["num_classes"] = 0 if headless else joint_width
    try:
        network = timm.create_model(architecture, pretrained=False, **args)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"timm {timm.__version__} cannot build '{architecture}' with {args}: {error}") from error
    if not isinstance(network, VisionTransformer | Eva):
        raise ValueError(f"'{architecture}' is a {type(network).__name__}; a VisionEncoder wants tokens: a VisionTransformer or an Eva")
    if hasattr(network, "head_dist"):
        raise ValueError(f"'{architecture}' averages two heads on two tokens; no single token is its embedding")
    return network


def image_spec_of(network: Any) -> dict[str, Any]:
    """Read the image spec off timm's `pretrained_cfg`, with the size the network really has.

    Raises:
        ValueError: timm prepares the images in a way that has no name here.
    """
    cfg, size = network.pretrained_cfg, network.patch_embed.img_size[0]
    modes = {"center": "crop", "squash": "squash"}
    mode = cfg.get("crop_mode") or "center"
    if mode not in modes:
        raise ValueError(f"timm's crop_mode '{mode}' of {cfg.get('architecture')} is not supported; known are {', '.join(modes)}")
    return {
        "size": int(size),
        "mean": list(cfg["mean"]),
        "std": list(cfg["std"]),
        "interpolation": cfg["interpolation"],
        "resize": modes[mode],
        "crop_pct": float(cfg["crop_pct"]),
    }


AutoConfig.register(MODEL_TYPE, VisionEncoderConfig, exist_ok=True)
AutoModel.register(VisionEncoderConfig, VisionEncoder, exist_ok=True)
VisionEncoderConfig.register_for_auto_class("AutoConfig")
VisionEncoder.register_for_auto_class("AutoModel")  # save_pretrained lays this file beside the weights

if __name__ == "encoders.modeling" and "mmkit" in sys.modules:  # not where this file lies beside weights
    sys.modules["mmkit"].register_models(whole=__name__)
