"""Networks of this kit's own, under timm names, so that timm and open_clip build them by name once `encoders` is imported."""

from typing import Any

import timm
from timm.models import register_model
from torch import nn

# The plain ViT behind `vit_mini_patch16_96`: a stock timm entry and the arguments that make it small, for whoever has timm alone.
MINI_VIT_ENTRY = "vit_tiny_patch16_224"
MINI_VIT_ARGS: dict[str, Any] = {"img_size": 96, "patch_size": 16, "embed_dim": 192, "depth": 8, "num_heads": 3}


@register_model
def vit_mini_patch16_96(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build the image tower of mini-clip: 96 px, patch 16 (6 x 6 patches), width 192, 8 blocks, 3.6 M parameters.

    Raises:
        ValueError: `pretrained` is set: the trained weights belong to a whole CLIP model.
    """
    if pretrained:
        raise ValueError("vit_mini_patch16_96 has no weights of its own; load_encoder('mini-clip') gives the trained image tower")
    for name in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):  # timm.create_model hands these to every entry
        kwargs.pop(name, None)
    return timm.create_model(MINI_VIT_ENTRY, **{**MINI_VIT_ARGS, **kwargs})
