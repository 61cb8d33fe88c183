"""The two towers of a CLIP model, layer by layer: learning rates that fall with depth, and patches left out on the image side."""

import re
from collections.abc import Iterable
from typing import Any

from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer as OpenClipViT
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from encoders.modeling import KeepPatches
from mmkit.errors import ConfigError

# timm's, open_clip's and transformers' names for a list of blocks: blocks.3., resblocks.3., encoder.layer.3., layers.3.
BLOCK = re.compile(r"(?:^|\.)(?:blocks|resblocks|layers|layer)\.(\d+)\.")
# What stands in front of the first block, in any of their namings. All else outside the blocks comes behind them.
IN_FRONT = {
    *("patch_embed", "pos_embed", "cls_token", "reg_token", "mask_token", "norm_pre"),
    *("conv1", "class_embedding", "positional_embedding", "token_embedding", "cls_emb", "ln_pre"),
    *("embeddings", "embed_tokens", "wte", "wpe"),
}


def tower_layers(names: Iterable[str], tower: str) -> tuple[dict[str, int], int]:
    """Number the layers of one tower: 0 in front of the blocks, i + 1 for block i, L + 1 behind the L blocks.

    Args:
        names: The tower's parameter names.
        tower: What to call it in messages.

    Returns:
        Parameter name to layer, and L + 1.

    Raises:
        ConfigError: The tower has no numbered blocks.

    Source: EVA-CLIP's layer decay, as `timm.optim.param_groups_layer_decay` but for the final norm, which counts as behind the blocks.
    """
    names = list(names)
    block_of = {name: int(found[1]) for name in names if (found := BLOCK.search(name))}
    if not block_of:
        raise ConfigError(f"layer decay: the {tower} has no numbered blocks ({names[0] if names else 'no parameter'}, ...); leave it at 1")
    top = max(block_of.values()) + 2
    front = {name for name in names if name not in block_of and IN_FRONT & set(name.split("."))}
    return {name: block_of[name] + 1 if name in block_of else 0 if name in front else top for name in names}, top


def lr_scales(clip: nn.Module, layer_decay: float = 1.0, text_layer_decay: float = 1.0, text_lr_factor: float = 1.0) -> dict[str, float]:
    """Give each parameter of a CLIP model its factor on the learning rate: d^(L + 1 - layer), per tower; the text tower's times its own.

    Args:
        clip: open_clip's bare model: a wrapper would hide the names.
        layer_decay, text_layer_decay: d of each tower; 1 is off.
        text_lr_factor: The text tower's peak as a share of the image tower's.

    Raises:
        ConfigError: A tower whose layers cannot be told is to decay.
    """
    names = [name for name, _ in clip.named_parameters()]
    image = [name for name in names if name.startswith("visual.")]
    text = [name for name in names if not name.startswith("visual.") and name not in ("logit_scale", "logit_bias")]
    scales = dict.fromkeys(names, 1.0)
    scales.update(dict.fromkeys(text, text_lr_factor))
    for tower, members, decay in (("image tower", image, layer_decay), ("text tower", text, text_layer_decay)):
        if decay == 1:
            continue
        layers, top = tower_layers(members, tower)
        for name, layer in layers.items():
            scales[name] *= decay ** (top - layer)
    return scales


def install_patch_keeper(clip: Any) -> tuple[int, int]:
    """Let the image tower take part of an image's patches: see `patch_keeper`.

    Returns:
        Its grid: patches down and across.

    Raises:
        ConfigError: The tower is no vision transformer with a CLS token.
    """
    visual = clip.visual
    if isinstance(visual, TimmModel) and isinstance(visual.trunk, VisionTransformer | Eva):
        trunk: Any = visual.trunk
        trunk.patch_drop = KeepPatches(trunk.num_prefix_tokens, isinstance(trunk, Eva))
        down, across = trunk.patch_embed.grid_size
    elif isinstance(visual, OpenClipViT):
        visual.patch_dropout = KeepPatches(1, returns_indices=False)
        down, across = visual.grid_size
    else:
        raise ConfigError(f"mask_ratio: the image tower is a {type(visual).__name__}; patches can be left out of a vision transformer only")
    return int(down), int(across)


def patch_keeper(clip: Any) -> KeepPatches | None:
    """Give the module whose `keep` [B, K] decides which patches the image tower sees; None where none was installed."""
    return next((module for module in clip.visual.modules() if isinstance(module, KeepPatches)), None)
