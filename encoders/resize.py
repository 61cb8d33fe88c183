"""Other patch and image sizes for a trained encoder: kernels and positions resampled, on request and by a named method only."""

from typing import Any, Literal

import torch
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from torch import Tensor
from torch.nn import functional as F

from encoders.modeling import VisionEncoder, VisionEncoderConfig
from mmkit.checkpoint import load_strict
from mmkit.errors import ConfigError

Method = Literal["pi", "bicubic"]
METHODS: tuple[Method, ...] = ("pi", "bicubic")


@torch.no_grad()
def resize_kernel(kernel: Tensor, size: int, method: Method) -> Tensor:
    """Resample a patch embedding's kernel [D, 3, p, p] to [D, 3, size, size].

    Args:
        kernel: As trained.
        size: The new patch, pixels.
        method: "pi" keeps the response to a resized patch (pseudo-inverse of the resizing, FlexiViT); "bicubic" resizes the kernel like a
            picture, as EVA's script does, which multiplies the response to an even patch by (size / p)^2.
    """
    if size == kernel.shape[-1]:
        return kernel
    if method == "pi":
        return resample_patch_embed(kernel, [size, size])
    return F.interpolate(kernel.float(), (size, size), mode="bicubic", align_corners=False).to(kernel.dtype)


@torch.no_grad()
def resize_positions(positions: Tensor, grid: tuple[int, int], old: tuple[int, int], prefix: int, method: Method) -> Tensor:
    """Resample position embeddings [1, P + N, D] to another grid; the first `prefix` rows, which have no place in it, stay.

    "pi" is timm's bicubic with antialiasing, "bicubic" EVA's without.
    """
    if grid == old:
        return positions
    if method == "pi":
        return resample_abs_pos_embed(positions, list(grid), list(old), num_prefix_tokens=prefix)
    fixed, places = positions[:, :prefix], positions[:, prefix:]
    field = places.float().unflatten(1, old).permute(0, 3, 1, 2)  # [1, D, h, w]
    field = F.interpolate(field, grid, mode="bicubic", align_corners=False)
    return torch.cat([fixed, field.flatten(2).transpose(1, 2).to(fixed.dtype)], dim=1)


def resize_encoder(encoder: VisionEncoder, patch_size: int | None, image_size: int | None, method: Method) -> VisionEncoder:
    """Make an encoder of another patch or image size out of a trained one. Rotary tables are computed anew for the new grid.

    Args:
        encoder: Left as it is.
        patch_size, image_size: Pixels; None keeps what it has.
        method: See `resize_kernel`.

    Raises:
        ConfigError: Nothing would change, or the image is no multiple of the patch.

    Source: EVA's interpolate_patch_14to16.py ("bicubic"); FlexiViT (Beyer et al., 2023), as timm's `set_input_size` computes it ("pi").
    """
    network, config = encoder.network, encoder.config
    old_patch, old_size = int(network.patch_embed.patch_size[0]), int(network.patch_embed.img_size[0])
    patch, size = patch_size or old_patch, image_size or old_size
    if (patch, size) == (old_patch, old_size):
        raise ConfigError(f"the encoder has {old_size} px and patches of {old_patch} px already: name another --patch_size or --image_size")
    if patch < 1 or size < patch or size % patch:
        near = max(patch, round(size / patch) * patch) if patch > 0 else "?"
        raise ConfigError(f"an image of {size} px is no whole number of patches of {patch} px; the nearest is {near} px")
    grid = (size // patch, size // patch)
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    state["patch_embed.proj.weight"] = resize_kernel(state["patch_embed.proj.weight"], patch, method)
    if "pos_embed" in state:
        prefix = 0 if getattr(network, "no_embed_class", False) else encoder.num_prefix_tokens
        state["pos_embed"] = resize_positions(state["pos_embed"], grid, encoder.grid, prefix, method)
    args: dict[str, Any] = {**(config.model_args or {}), "img_size": size, "patch_size": patch}
    change = {"method": method, "image_size": [old_size, size], "patch_size": [old_patch, patch]}
    made = VisionEncoder(
        VisionEncoderConfig(
            architecture=config.architecture,
            model_args=args,
            joint_width=config.joint_width,
            image_spec={**(config.image_spec or {}), "size": size},
            text_tower=config.text_tower,
            origin=f"{config.origin}; {old_size} px / {old_patch} -> {size} px / {patch} ({method})",
            training={**(config.training or {}), "resized": [*(config.training or {}).get("resized", []), change]},
        )
    )
    made.network.to(state["patch_embed.proj.weight"].dtype)
    load_strict(made.network, state, f"{config.origin}, resized")
    return made.eval()
