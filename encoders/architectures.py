"""Networks under timm names of this kit's own: the small tower of mini-clip, and towers of exported models that no stock entry describes.

open_clip builds a timm tower by its name alone, without arguments. So a tower of another size (patch 16 where timm's entry has 14) needs an
entry of its own; the folder that `mmkit convert open-clip` writes says which, and carries a file that registers it where mmkit is not
installed.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import timm
from timm.models import is_model, register_model
from torch import nn

# The plain ViT behind `vit_mini_patch16_96`: a stock timm entry and the arguments that make it small, for whoever has timm alone.
MINI_VIT_ENTRY = "vit_tiny_patch16_224"
MINI_VIT_ARGS: dict[str, Any] = {"img_size": 96, "patch_size": 16, "embed_dim": 192, "depth": 8, "num_heads": 3}
NO_SHAPE = ("global_pool", "num_classes", "head_init_scale")  # arguments that open_clip passes itself, or that weights make void
_HUB_ARGUMENTS = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")  # timm.create_model hands these to every entry


@register_model
def vit_mini_patch16_96(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build the image tower of mini-clip: 96 px, patch 16 (6 x 6 patches), width 192, 8 blocks, 3.6 M parameters.

    Raises:
        ValueError: `pretrained` is set: the trained weights belong to a whole CLIP model.
    """
    if pretrained:
        raise ValueError("vit_mini_patch16_96 has no weights of its own; load_encoder('mini-clip') gives the trained image tower")
    for name in _HUB_ARGUMENTS:
        kwargs.pop(name, None)
    return timm.create_model(MINI_VIT_ENTRY, **{**MINI_VIT_ARGS, **kwargs})


def entry_name(architecture: str, args: dict[str, Any]) -> str:
    """Give a stock entry with arguments a name that only these arguments have."""
    content = json.dumps(args, sort_keys=True)
    return f"{architecture}_{hashlib.sha256(content.encode()).hexdigest()[:8]}"


def register_entry(name: str, architecture: str, model_args: dict[str, Any]) -> None:
    """Let `timm.create_model(name)` build a stock entry with arguments. A name that is taken already stays as it is."""
    if is_model(name):
        return

    def entry(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        if pretrained:
            raise ValueError(f"{name} has no weights of its own; they belong to the model whose folder names it")
        for hub in _HUB_ARGUMENTS:
            kwargs.pop(hub, None)
        return timm.create_model(architecture, **{**model_args, **kwargs})

    entry.__name__ = name
    register_model(entry)


def own_entry(architecture: str, model_args: dict[str, Any]) -> dict[str, Any] | None:
    """Register a stock entry with arguments; None where no argument changes the network's shape, so that the stock entry will do.

    Args:
        architecture: A timm entry.
        model_args: Its arguments; those that open_clip passes itself, or that weights make void, do not count.

    Returns:
        "name", "architecture" and "model_args": what `register_folder_entry` reads in the configuration of an open_clip folder.
    """
    args = {key: value for key, value in model_args.items() if key not in NO_SHAPE}
    if not args:
        return None
    name = entry_name(architecture, args)
    register_entry(name, architecture, args)
    return {"name": name, "architecture": architecture, "model_args": args}


def register_folder_entry(folder: Path) -> None:
    """Register the timm entry that an open_clip folder of this kit's names in its configuration, if it names one."""
    try:
        config = json.loads((folder / "open_clip_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # whoever loads the folder says what is wrong with it
    entry = config.get("mmkit", {}).get("timm_entry") if isinstance(config, dict) else None
    if entry:
        args = {key: tuple(value) if isinstance(value, list) else value for key, value in entry["model_args"].items()}
        register_entry(entry["name"], entry["architecture"], args)


ENTRY_SCRIPT = '''"""Tells timm the image tower of this folder's model. Run it before open_clip loads the folder (mmkit does so by itself):

    exec(open("FOLDER/{file}").read()); model = open_clip.create_model("local-dir:FOLDER")
"""

import timm
from timm.models._registry import _model_entrypoints


def entry(pretrained=False, **kwargs):
    for name in {hub!r}:
        kwargs.pop(name, None)
    return timm.create_model({architecture!r}, **{{**{args!r}, **kwargs}})


_model_entrypoints[{name!r}] = entry
'''
ENTRY_FILE = "timm_entry.py"


def entry_script(name: str, architecture: str, model_args: dict[str, Any]) -> str:
    """Write the few lines that register an entry where mmkit is not installed: they need timm alone."""
    return ENTRY_SCRIPT.format(name=name, architecture=architecture, args=model_args, hub=_HUB_ARGUMENTS, file=ENTRY_FILE)
