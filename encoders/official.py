"""Released checkpoints of UTA, EVA-CLIP and LAVIS (`eva_vit_g.pth`), read strictly into timm's and open_clip's networks.

They are flat tables of tensors: `visual.*`, `text.*`, `logit_scale`; LAVIS's has the image tower alone, without a prefix. timm's own
`checkpoint_filter_fn` renames them. It also resamples positions and patches to the sizes of the network without a word, and renames the
final norm when a mask token is among the tensors: here, other sizes are refused and the mask token is taken out before it is called.

Source: UTA (github.com/jihaonew/UTA), EVA-CLIP (github.com/baaivision/EVA), LAVIS (eva_vit.py).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from open_clip.factory import get_model_config
from timm.models.eva import checkpoint_filter_fn
from torch import Tensor

from encoders.modeling import VisionEncoder, VisionEncoderConfig
from encoders.text_folder import TextOnly, build_text
from mmkit.checkpoint import load_strict, load_weights
from mmkit.errors import ConfigError, DataError
from mmkit.images import ImageSpec

WRAPPERS = ("model_ema", "model", "module", "state_dict")  # a training's file holds the weights under one of these
PRETRAINING_ONLY = ("mask_token", "lm_head.weight", "lm_head.bias")
ROPE_TOLERANCE = 1e-3  # half-precision tables; a wrong reference grid shows at .1 and more


@dataclass(frozen=True)
class OfficialModel:
    """A released model: the network it is, in timm's and open_clip's words.

    Attributes:
        architecture: timm's entry.
        model_args: Its arguments.
        text_args: open_clip's `text_cfg`; None where the release has no text tower.
        joint_width: E, where it is known; None takes what the file has.
        note: For `--help`.
    """

    architecture: str
    model_args: dict[str, Any] = field(default_factory=dict)
    text_args: dict[str, Any] | None = None
    joint_width: int | None = None
    note: str = ""


UTA_TEXT = {"context_length": 77, "vocab_size": 49408, "width": 1024, "heads": 16, "layers": 24}
UTA_GIANT = {"img_size": 336, "embed_dim": 1408, "depth": 40, "num_heads": 16, "mlp_ratio": 4096 / 1408}
UTA_MODELS: dict[str, OfficialModel] = {
    "uta_b16": OfficialModel("eva02_base_patch14_224", {"patch_size": 16}, UTA_TEXT, 1024, "224 px, 14 x 14 patches, 86.6 M"),
    "uta_l14_336": OfficialModel("eva02_large_patch14_224", {"img_size": 336}, UTA_TEXT, 1024, "336 px, 24 x 24, 304.6 M"),
    "uta_g14_336": OfficialModel("eva02_large_patch14_224", UTA_GIANT, UTA_TEXT, 1024, "336 px, 24 x 24, 1013 M"),
}


def _eva_clip(name: str, note: str) -> OfficialModel:
    config: dict[str, Any] = get_model_config(name) or {}
    return OfficialModel(config["vision_cfg"]["timm_model_name"], {}, config["text_cfg"], config["embed_dim"], note)


EVA_MODELS: dict[str, OfficialModel] = {
    "eva01_g14": _eva_clip("EVA01-g-14", "EVA01_CLIP_g_14_psz14_s11B.pt"),
    "eva01_g14_plus": _eva_clip("EVA01-g-14-plus", "EVA01_CLIP_g_14_plus_psz14_s11B.pt; UTA's teacher"),
    "eva02_b16": _eva_clip("EVA02-B-16", "EVA02_CLIP_B_psz16_s8B.pt"),
    "eva02_l14": _eva_clip("EVA02-L-14", "EVA02_CLIP_L_psz14_s4B.pt"),
    "eva02_l14_336": _eva_clip("EVA02-L-14-336", "EVA02_CLIP_L_336_psz14_s6B.pt"),
    "eva02_e14": _eva_clip("EVA02-E-14", "EVA02_CLIP_E_psz14_s4B.pt"),
    "eva02_e14_plus": _eva_clip("EVA02-E-14-plus", "EVA02_CLIP_E_psz14_plus_s9B.pt"),
    # LAVIS runs 39 of the 40 blocks and no final norm: hidden_states[39] of this encoder
    "eva_vit_g": OfficialModel("eva_giant_patch14_clip_224", {}, None, None, "eva_vit_g.pth of LAVIS (BLIP-2): no head, no text"),
}


@dataclass
class Checkpoint:
    """The tensors of a file, by tower, without prefixes.

    Attributes:
        source: The file.
        visual, text: Tensors of each tower.
        logit_scale: Logarithm of the factor before the cosine, as it was trained; None where there is none.
        notes: What was left out on the way, for the user.
    """

    source: str
    visual: dict[str, Tensor]
    text: dict[str, Tensor]
    logit_scale: float | None = None
    notes: list[str] = field(default_factory=list)


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint and take its towers apart.

    Raises:
        DataError: It is no weight file, or holds no vision transformer under the names of these families.
    """
    state: Mapping[str, Any] = load_weights(path)
    notes: list[str] = []
    while (wrapper := next((name for name in WRAPPERS if isinstance(state.get(name), dict)), None)) is not None:
        notes.append(f"the weights are those under '{wrapper}'")
        state = state[wrapper]
    tensors = {name.removeprefix("module."): value for name, value in state.items() if isinstance(value, Tensor)}
    if other := [name for name in state if not isinstance(state[name], Tensor)]:
        notes.append(f"no tensors, left out: {', '.join(map(str, other[:6]))}")
    prefix = "visual." if any(name.startswith("visual.") for name in tensors) else ""
    visual = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    if "patch_embed.proj.weight" not in visual or "blocks.0.norm1.weight" not in visual:
        found = ", ".join(list(tensors)[:4]) or "no tensors"
        raise DataError(
            f"{path} is no checkpoint of UTA or EVA: it has no (visual.)patch_embed.proj.weight and blocks.0; it begins with {found}. "
            "open_clip files are loaded as openclip:MODEL/FILE, transformers' as hf:FOLDER"
        )
    text = {name.removeprefix("text."): value for name, value in tensors.items() if prefix and name.startswith("text.")}
    scale = tensors.get("logit_scale") if prefix else None
    known = len(visual) + len(text) + (scale is not None)
    if known != len(tensors):
        rest = [name for name in tensors if not name.startswith(("visual.", "text.")) and name != "logit_scale"]
        raise DataError(f"{path} holds {len(rest)} tensors that are neither image nor text tower: {', '.join(rest[:4])}")
    if dropped := [name for name in PRETRAINING_ONLY if visual.pop(name, None) is not None]:
        notes.append(f"left out, used in pre-training only: {', '.join(dropped)}")
    return Checkpoint(str(path), visual, text, None if scale is None else float(scale), notes)


def image_tower(file: Checkpoint, model: OfficialModel, name: str) -> VisionEncoder:
    """Build the image tower and fill it.

    Images are prepared as OpenAI CLIP does, at the network's size, which all these models use; crop_pct is 1, not the 0.9 that timm has for
    classifiers.

    Args:
        file: What was read.
        model: What it is said to be.
        name: What the user called that, for messages.

    Raises:
        DataError: The file's sizes or names are other ones; the message names the file and both sides.
        ConfigError: timm cannot build the network.
    """
    args = {**model.model_args, "global_pool": "token"}  # the MIM entries' default is 'avg', with another place for the norm
    joint = file.visual["head.weight"].shape[0] if "head.weight" in file.visual else None
    if "norm.weight" not in file.visual:
        args["use_post_transformer_norm"] = False
        file.notes.append("there is no final norm in the file; the encoder has none (its last_hidden_state is the last block's output)")
    try:
        encoder = VisionEncoder(VisionEncoderConfig(architecture=model.architecture, model_args=args, joint_width=joint))
    except ValueError as error:
        raise ConfigError(f"{file.source} as {name}: {error}") from error
    encoder.config.image_spec = ImageSpec(size=encoder.config.image_size or 0).to_dict()
    encoder.config.origin = f"{Path(file.source).name} ({name})"
    _same_sizes(file, encoder, name)
    if model.joint_width is not None and joint != model.joint_width:
        raise DataError(f"{file.source}: its head ends in {joint or 'nothing'}; {name} has a joint space of {model.joint_width}")
    _same_rotary_table(file, encoder, name)
    state = checkpoint_filter_fn({name: tensor.float() for name, tensor in file.visual.items()}, encoder.network)
    load_strict(encoder.network, state, file.source)
    return encoder.eval()


def text_tower(file: Checkpoint, text_args: Mapping[str, Any], joint_width: int) -> TextOnly:
    """Build the text tower and fill it.

    Raises:
        DataError: The file's text tower has other names or sizes.
        ConfigError: open_clip cannot build the tower.
    """
    tower = build_text(text_args, joint_width)
    load_strict(tower, {f"text.{name}": tensor.float() for name, tensor in file.text.items()}, f"{file.source} (text tower)")
    return tower


def _same_sizes(file: Checkpoint, encoder: VisionEncoder, name: str) -> None:
    """Refuse what timm's filter would resample: another patch size, another grid; and another depth, which strict loading words worse."""
    network, kernel = encoder.network, file.visual["patch_embed.proj.weight"]
    patch, wanted = int(kernel.shape[-1]), int(network.patch_embed.patch_size[0])
    prefix = 0 if getattr(network, "no_embed_class", False) else network.num_prefix_tokens
    positions = file.visual.get("pos_embed")
    found = math.isqrt(max(positions.shape[1] - prefix, 0)) if positions is not None else encoder.grid[0]
    if patch != wanted or found != encoder.grid[0]:
        raise DataError(
            f"{file.source} has patches of {patch} px in a grid of {found} x {found} (an image of {patch * found} px); "
            f"{name} has patches of {wanted} px in {encoder.grid[0]} x {encoder.grid[1]} "
            f"({encoder.config.image_size} px). Nothing is resampled here: name the model the file is of, or its sizes "
            f'(--model_args \'{{"img_size": {patch * found}, "patch_size": {patch}}}\'); afterwards `mmkit convert resize` changes them'
        )
    depth = 1 + max(int(name.split(".")[1]) for name in file.visual if name.startswith("blocks."))
    if depth != len(network.blocks):
        raise DataError(f"{file.source} has {depth} blocks, {name} {len(network.blocks)}")


@torch.no_grad()
def _same_rotary_table(file: Checkpoint, encoder: VisionEncoder, name: str) -> None:
    """Hold the file's rotary table, which timm's filter throws away, against the one timm computed: another reference grid is silent else."""
    names = ("rope.freqs_sin", "rope.freqs_cos")
    if not all(name in file.visual for name in names):
        return
    theirs = torch.cat([file.visual[name].float() for name in names], dim=-1)  # [N, 2 R]
    rope = getattr(encoder.network, "rope", None)
    ours = rope.get_embed() if rope is not None else None
    if ours is None or ours.shape != theirs.shape or float((ours - theirs).abs().max()) > ROPE_TOLERANCE:
        shown = "none" if ours is None else f"{list(ours.shape)}"
        raise DataError(
            f"{file.source} has a rotary table {list(theirs.shape)} that {name} does not compute ({shown}): "
            "another image size, head width or reference grid (ref_feat_shape) belongs to it"
        )
