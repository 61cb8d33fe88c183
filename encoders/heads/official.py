"""The authors' head files (`eva_{g,e}_{caption,segment,detection}_heads`), read strictly into our heads, and written from them.

Such a file is a flat table `visft_heads.*` of a whole model: of its three heads, one was trained, and the name of the file says which. A raw
checkpoint of mmf keeps the same table under "model". Segmentation stands in it twice (`segment_pixel_decoder`, `segment_predictor`, and again
under `segment_head`). Their loader skips what does not fit without a word; here every tensor of the head is accounted for.

Source: TencentARC/ViSFT; the renaming was checked against its classes.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from encoders.coco_classes import COCO_IDS, Classes
from encoders.heads.base import Head
from encoders.heads.caption import CaptionConfig, CaptionHead
from encoders.heads.detection import DetectionConfig, DetectionHead
from encoders.heads.segmentation import SegmentationConfig, SegmentationHead
from mmkit.checkpoint import load_strict, load_weights
from mmkit.errors import DataError, find

PREFIX = "visft_heads."
Rules = tuple[tuple[str, str], ...]
_ATTENTION: Rules = (
    (r"\.[qkv]_proj\.(weight|bias)$", r".in_proj_\1"),
    (r"\.o_proj\.", ".out_proj."),
    (r"\.(?:mlp\.)?fc([12])\.", r".linear\1."),
)
_DECODER = "transformer.decoders.detection.detection_coco"
# Applied one after another to our names; q, k and v become one stacked tensor.
RULES: dict[str, Rules] = {
    "detection": (
        *_ATTENTION,
        (r"^encoder\.(.*)self_attn_layer_norm", r"transformer.encoder.\1norm1"),
        (r"^encoder\.(.*)final_layer_norm", r"transformer.encoder.\1norm2"),
        (r"^encoder\.", "transformer.encoder."),
        (r"^decoder\.layernorm\.", f"{_DECODER}.norm."),
        (r"^decoder\.", f"{_DECODER}."),
        (r"\.self_attn_layer_norm\.", ".norm1."),
        (r"\.encoder_attn_layer_norm\.", ".norm2."),
        (r"\.final_layer_norm\.", ".norm3."),
        (r"\.encoder_attn\.", ".multihead_attn."),
        (r"^box_predictor\.", "bbox_embeds."),
        (r"^class_predictor\.", "class_embeds."),
        (r"^queries\.", "query_embeds.detection.detection_coco."),
        (r"^encoder_to_decoder\.", "transformer.enc2dec_proj."),
        (r"^positions_to_decoder\.", "transformer.pos_embed_proj."),
        (r"^task_embeddings\.", "transformer.task_embeddings_enc."),
    ),
    "segmentation": (
        *_ATTENTION,
        (r"^network\.class_predictor\.", "segment_predictor.class_embed."),
        (r"^network\.pixel_decoder\.", "segment_pixel_decoder."),
        (r"^(segment_pixel_decoder\.)input_projections\.", r"\1input_proj."),
        (r"^(segment_pixel_decoder\.)mask_projection\.", r"\1mask_features."),
        (r"^(segment_pixel_decoder\.)(level_embed$|encoder\.)", r"\1transformer.\2"),
        (r"^(segment_pixel_decoder\..*)self_attn_layer_norm", r"\1norm1"),
        (r"^(segment_pixel_decoder\..*)final_layer_norm", r"\1norm2"),
        (r"\.(adapter_1|layer_1)\.0\.", r".\1."),
        (r"\.(adapter_1|layer_1)\.1\.", r".\1.norm."),
        (
            r"^network\.decoder\.decoder\.layers\.(\d+)\.self_attn_layer_norm",
            r"segment_predictor.transformer_self_attention_layers.\1.norm",
        ),
        (r"^network\.decoder\.decoder\.layers\.(\d+)\.self_attn\.", r"segment_predictor.transformer_self_attention_layers.\1.self_attn."),
        (
            r"^network\.decoder\.decoder\.layers\.(\d+)\.cross_attn_layer_norm",
            r"segment_predictor.transformer_cross_attention_layers.\1.norm",
        ),
        (
            r"^network\.decoder\.decoder\.layers\.(\d+)\.cross_attn\.",
            r"segment_predictor.transformer_cross_attention_layers.\1.multihead_attn.",
        ),
        (r"^network\.decoder\.decoder\.layers\.(\d+)\.final_layer_norm", r"segment_predictor.transformer_ffn_layers.\1.norm"),
        (r"^network\.decoder\.decoder\.layers\.(\d+)\.linear", r"segment_predictor.transformer_ffn_layers.\1.linear"),
        (r"^network\.decoder\.decoder\.layernorm\.", "segment_predictor.decoder_norm."),
        (r"^network\.decoder\.decoder\.mask_predictor\.mask_embedder\.(\d+)\.0\.", r"segment_predictor.mask_embed.layers.\1."),
        (r"^network\.decoder\.queries_features\.", "segment_predictor.query_feat."),
        (r"^network\.decoder\.queries_embedder\.", "segment_predictor.query_embed."),
        (r"^network\.decoder\.level_embed\.", "segment_predictor.level_embed."),
    ),
    "caption": (
        (r"^feature_attention\.", "attention.encoder_att."),
        (r"^state_attention\.", "attention.decoder_att."),
        (r"^attention\.(weight|bias)$", r"attention.full_att.\1"),
        (r"^cell\.", "decode_step."),
        (r"^initial_([hc])\.", r"init_\1."),
        (r"^gate\.", "f_beta."),
        (r"^word_predictor\.", "fc."),
        (r"^", "caption_decoder."),
    ),
}
TWICE = (("segment_pixel_decoder.", "segment_head.pixel_decoder."), ("segment_predictor.", "segment_head.predictor."))
# What belongs to which head in a file of all three; the buffer is the loss's own.
BELONGS = {
    "detection": r"(input_proj|class_embeds|bbox_embeds|query_embeds|transformer)\.",
    "segmentation": r"segment_(pixel_decoder|predictor|head)\.",
    "caption": r"caption_decoder\.",
}
IGNORED = ("det_losses.empty_weight",)


def official_names(task: str, ours: Sequence[str]) -> dict[str, list[str]]:
    """Give each of the authors' names (without prefix) the names of ours that it holds; several are stacked in this order."""
    found: dict[str, list[str]] = {}
    for name in ours:
        theirs = name
        for pattern, replacement in RULES[task]:
            theirs = re.sub(pattern, replacement, theirs)
        found.setdefault(theirs, []).append(name)
    order = {"q": 0, "k": 1, "v": 2}
    return {theirs: sorted(names, key=lambda name: order.get(name.split(".")[-2][0], 3)) for theirs, names in found.items()}


def task_of_file(path: Path | str) -> str:
    """Say which head of a file was trained, as the authors' loader does: by its name."""
    name = Path(path).name.lower()
    return "segmentation" if "segment" in name else "caption" if "caption" in name else "detection"


def read_official_head(
    path: Path | str,
    task: str = "",
    *,
    width: int = 0,
    classes: Classes | None = None,
    words: Sequence[str] = (),
    attention_heads: int = 8,
) -> Head:
    """Read one head out of an authors' file.

    Args:
        path: The file: safetensors, or a torch file that holds nothing but tensors.
        task: Which head; empty reads the file's name, see `task_of_file`.
        width: Refuse a head for feature maps of another width.
        classes: Categories of COCO with the numbering the head was trained under (`Classes.raw_ids` for detection,
            `Classes.authors_segmentation`); None takes COCO's 80 ids without their names.
        words: The captioner's word map, which was not released; empty gives its words numbers for names.
        attention_heads: Not to be seen in the tensors.

    Raises:
        DataError: The file is damaged, is not such a file, or a tensor is missing, left over or of another shape; both sides are named.
    """
    task = task or task_of_file(path)
    find("task", RULES, task)
    state = _table(load_weights(path), path)
    mine = {name: tensor for name, tensor in state.items() if re.match(BELONGS[task], name)}
    if not mine:
        there = [other for other, pattern in BELONGS.items() if any(re.match(pattern, name) for name in state)]
        raise DataError(f"{path} has no {task} head; it has {', '.join(there) or f'names like {next(iter(state), None)}'}")
    strange = [name for name in state if name not in IGNORED and not any(re.match(pattern, name) for pattern in BELONGS.values())]
    if strange:
        raise DataError(f"{path}: {len(strange)} tensors belong to no head of ViSFT, {strange[0]} for one; is it another version's file?")
    mine = _once(mine, path) if task == "segmentation" else mine
    head = _BUILDERS[task](mine, classes, tuple(words), attention_heads, path)
    if width and head.config.width != width:
        raise DataError(f"{path}: its {task} head takes feature maps of width {head.config.width}; the encoder gives {width}")
    load_strict(head, _renamed(head, mine), f"{path} ({task} head, names as here)")
    return head


def to_official(head: Head) -> dict[str, Tensor]:
    """Give a head's tensors under the authors' names; segmentation twice, as in their files."""
    state = head.state_dict()
    table = {theirs: torch.cat([state[name] for name in names]) for theirs, names in official_names(head.task, list(state)).items()}
    for plain, again in TWICE if head.task == "segmentation" else ():
        table |= {name.replace(plain, again, 1): tensor for name, tensor in table.items() if name.startswith(plain)}
    return {PREFIX + name: tensor for name, tensor in table.items()}


def _table(state: Mapping[str, Any], path: Path | str) -> dict[str, Tensor]:
    if isinstance(state.get("model"), dict):
        state = state["model"]
    tensors = {name.removeprefix("module."): value for name, value in state.items() if isinstance(value, Tensor)}
    found = {name.removeprefix(PREFIX): value for name, value in tensors.items() if name.startswith(PREFIX)}
    if not found:
        raise DataError(
            f"{path} is no head file of ViSFT: no tensor is called {PREFIX}...; it begins with {', '.join(list(tensors)[:3]) or 'none'}"
        )
    return found


def _once(state: dict[str, Tensor], path: Path | str) -> dict[str, Tensor]:
    """Drop the second copy of each tensor.

    Raises:
        DataError: The copies differ, so which one was trained is not to be known.
    """
    kept = {name: tensor for name, tensor in state.items() if not name.startswith("segment_head.")}
    for plain, again in TWICE:
        for name, tensor in state.items():
            if not name.startswith(again):
                continue
            first = kept.setdefault(name.replace(again, plain, 1), tensor)
            if first.shape != tensor.shape or not torch.equal(first, tensor):
                raise DataError(f"{path}: {name} and {name.replace(again, plain, 1)} should be the same tensor and differ")
    return kept


def _renamed(head: Head, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give the file's tensors our names; what has no place here keeps the authors' name, for `load_strict` to complain of."""
    own = head.state_dict()
    names = official_names(head.task, list(own))
    renamed = {name: tensor for name, tensor in state.items() if name not in names}
    for theirs, ours in names.items():
        if theirs in state:
            parts = state[theirs].chunk(len(ours)) if state[theirs].dim() else [state[theirs]] * len(ours)
            renamed |= dict(zip(ours, parts, strict=False))
    return renamed


def _shape(state: Mapping[str, Tensor], name: str, path: Path | str, place: int = 0) -> int:
    """Read a size off a tensor.

    Raises:
        DataError: It is not there.
    """
    if name not in state:
        raise DataError(f"{path} lacks {PREFIX}{name}, without which the head's sizes are unknown")
    return int(state[name].shape[place])


def _layers(state: Mapping[str, Tensor], prefix: str, path: Path | str) -> int:
    numbers = {int(name[len(prefix) :].split(".")[0]) for name in state if name.startswith(prefix)}
    if numbers != set(range(len(numbers))) or not numbers:
        raise DataError(f"{path} has the layers {sorted(numbers)} under {PREFIX}{prefix}; 0, 1, 2, ... without a gap is right")
    return len(numbers)


def _coco(classes: Classes | None, raw: bool, logits: int, path: Path | str) -> Classes:
    made = classes or (Classes.raw_ids if raw else Classes.authors_segmentation)(COCO_IDS, [str(number) for number in COCO_IDS])
    if made.num_logits != logits:
        raise DataError(
            f"{path} has {logits} class logits; the {len(made.ids)} categories given make {made.num_logits} "
            f"(ids {made.ids[0]} to {made.ids[-1]}, and no object). Give the categories that it was trained with"
        )
    return made


def _detection(state: Mapping[str, Tensor], classes: Classes | None, words: tuple[str, ...], heads: int, path: Path | str) -> Head:
    return DetectionHead(
        DetectionConfig(
            width=_shape(state, "input_proj.weight", path, 1),
            classes=_coco(classes, True, _shape(state, "class_embeds.bias", path), path),
            encoder_width=_shape(state, "input_proj.weight", path),
            decoder_width=_shape(state, "class_embeds.weight", path, 1),
            encoder_layers=_layers(state, "transformer.encoder.layers.", path),
            decoder_layers=_layers(state, f"{_DECODER}.layers.", path),
            attention_heads=heads,
            feedforward=_shape(state, "transformer.encoder.layers.0.linear1.bias", path),
            queries=_shape(state, "query_embeds.detection.detection_coco.weight", path),
        )
    )


def _segmentation(state: Mapping[str, Tensor], classes: Classes | None, words: tuple[str, ...], heads: int, path: Path | str) -> Head:
    deformable = "segment_pixel_decoder.transformer.encoder.layers.0."
    return SegmentationHead(
        SegmentationConfig(
            width=_shape(state, "segment_pixel_decoder.input_proj.0.0.weight", path, 1),
            classes=_coco(classes, False, _shape(state, "segment_predictor.class_embed.bias", path), path),
            hidden_width=_shape(state, "segment_pixel_decoder.input_proj.0.0.weight", path),
            encoder_layers=_layers(state, "segment_pixel_decoder.transformer.encoder.layers.", path),
            decoder_layers=_layers(state, "segment_predictor.transformer_ffn_layers.", path),
            attention_heads=heads,
            attention_points=_shape(state, f"{deformable}self_attn.attention_weights.bias", path) // heads,
            encoder_feedforward=_shape(state, f"{deformable}linear1.bias", path),
            decoder_feedforward=_shape(state, "segment_predictor.transformer_ffn_layers.0.linear1.bias", path),
            queries=_shape(state, "segment_predictor.query_feat.weight", path),
        )
    )


def _caption(state: Mapping[str, Tensor], classes: Classes | None, words: tuple[str, ...], heads: int, path: Path | str) -> Head:
    number = _shape(state, "caption_decoder.fc.bias", path) - 4  # <pad>, <unk>, <start>, <end>
    if words and len(words) != number:
        raise DataError(f"{path} writes {number} words; the word map given has {len(words)}")
    return CaptionHead(
        CaptionConfig(
            width=_shape(state, "caption_decoder.attention.encoder_att.weight", path, 1),
            words=words or tuple(f"word{place}" for place in range(1, number + 1)),
            attention_width=_shape(state, "caption_decoder.attention.encoder_att.bias", path),
            word_width=_shape(state, "caption_decoder.embedding.weight", path, 1),
            hidden_width=_shape(state, "caption_decoder.fc.weight", path, 1),
        )
    )


_BUILDERS = {"detection": _detection, "segmentation": _segmentation, "caption": _caption}
