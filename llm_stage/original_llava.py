"""LLaVA's own folders (haotian-liu/LLaVA, v1 to v1.5): read into transformers' model, and their names for each tensor.

    whole        config.json with mm_* keys, model.embed_tokens / layers / norm, lm_head, model.mm_projector.*, perhaps the vision tower
    LoRA         adapter_config.json, adapter_model.*, non_lora_trainables.bin (the projector), config.json with mm_* keys
    projector    mm_projector.bin, and config.json where one wants to load more than the projector

Told apart by the files in them, never by their names; torch files are read with weights_only; whatever is missing or left over is an error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoTokenizer,
    CLIPVisionModel,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    MistralForCausalLM,
    PreTrainedModel,
)

from encoders.catalog import ENCODERS
from encoders.foreign import hf_spec, load_hf
from encoders.joined import JOINED_TYPE
from encoders.modeling import MODEL_TYPE
from encoders.vision_towers import load_tower, parse
from llm_stage.adapters import ADAPTER, adapter_file, merged, put_adapter, read_adapter_config
from llm_stage.llava import PROJECTORS, Select, build_llava, with_resize
from llm_stage.llava_card import LlavaCard, check_files, read_card
from llm_stage.llms import add_image_token, load_llm
from mmkit.checkpoint import load_strict, load_weights, refuse_differences
from mmkit.errors import ConfigError, DataError
from mmkit.images import ImageSpec
from mmkit.trainable import weights_hash

PROJECTOR_BIN = "mm_projector.bin"
NON_LORA_BIN = "non_lora_trainables.bin"
TOWER_FOLDER = "vision_tower"
LLM_TYPES = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral"}
"""LLaVA's model_type -> the LLM's own. The first releases said "llava", as transformers' model does now; the mm_* keys tell them apart."""
LLMS = {"llama": LlamaForCausalLM, "mistral": MistralForCausalLM}
FEATURES: dict[str, Select] = {"patch": "default", "cls_patch": "full"}
PROJECTOR_KEYS = {
    "mlp2x_gelu": {"0.weight": "linear_1.weight", "0.bias": "linear_1.bias", "2.weight": "linear_2.weight", "2.bias": "linear_2.bias"},
    "linear": {"weight": "linear_1.weight", "bias": "linear_1.bias"},
}
_PROJECTOR_PREFIX = re.compile(r"(?:base_model\.)?(?:model\.)*mm_projector\.(.+)")
_TOWER_PREFIX = "model.vision_tower.vision_tower."
_LORA_PREFIX, _LORA_HERE = "base_model.model.model.layers.", "base_model.model.model.language_model.layers."


@dataclass(frozen=True)
class OriginalConfig:
    """What config.json of an original folder says, in this kit's words."""

    tower: str
    llm: str
    projector: str
    feature_layer: int
    select: Select
    pad: bool
    values: dict[str, Any]


# -- which folders -------------------------------------------------------------------------------------------------------------------------


def is_original(folder: Path) -> bool:
    """Whether a folder is in LLaVA's own layout."""
    if (folder / PROJECTOR_BIN).is_file() or (folder / NON_LORA_BIN).is_file():
        return True
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and "vision_config" not in values and any(key.startswith("mm_") for key in values)


def projector_file(source: Path) -> Path | None:
    """The mm_projector.bin that a path names or holds; None where it is something else."""
    if source.is_file() and source.suffix in (".bin", ".safetensors"):
        return source
    inside = [source / name for name in (PROJECTOR_BIN, NON_LORA_BIN) if (source / name).is_file()]
    return inside[0] if inside else None


def read_original_config(folder: Path) -> OriginalConfig:
    """Read config.json.

    Raises:
        DataError: It is missing or no JSON.
        ConfigError: The model has something that transformers' LLaVA cannot express; the message names the key.
    """
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{folder} holds a part of an original LLaVA, and its config.json, which says how it was joined, cannot be read ({error}). "
            "Add it, or name the projector's file alone to train_llava.py: --pretrained FILE"
        ) from error
    projector, feature = values.get("mm_projector_type", "linear"), values.get("mm_vision_select_feature", "patch")
    aspect, kind = values.get("image_aspect_ratio", "square"), values.get("model_type", "llava")
    wrong = {
        "mm_projector_type": (projector, projector in PROJECTORS, " or ".join(PROJECTORS)),
        "mm_vision_select_feature": (feature, feature in FEATURES, " or ".join(FEATURES)),
        "image_aspect_ratio": (
            aspect,
            aspect in ("square", "pad"),
            "square or pad (not anyres, whose tiles transformers calls LLaVA-NeXT)",
        ),
        "mm_use_im_start_end": (values.get("mm_use_im_start_end", False), not values.get("mm_use_im_start_end"), "false"),
        "model_type": (kind, kind in LLM_TYPES, " or ".join(LLM_TYPES)),
    }
    for key, (value, right, known) in wrong.items():
        if not right:
            raise ConfigError(f"{path} says {key} {value!r}; what can be loaded here is {known}")
    near = folder / str(values.get("mmkit_vision_tower", ""))
    tower = str(near) if values.get("mmkit_vision_tower") and near.is_dir() else str(values.get("mm_vision_tower", ""))
    return OriginalConfig(
        tower, str(values.get("_name_or_path", "")), projector, int(values.get("mm_vision_select_layer", -2)), FEATURES[feature],
        aspect == "pad", values,
    )  # fmt: skip


# -- the projector -------------------------------------------------------------------------------------------------------------------------


def projector_from_original(state: Mapping[str, Tensor], source: str) -> tuple[str, dict[str, Tensor]]:
    """Rename LLaVA's projector tensors to transformers'; the prefixes of all its files are known.

    Args:
        state: What mm_projector.bin or non_lora_trainables.bin holds.
        source: The file, for the message.

    Returns:
        The projector's kind, and `linear_1` and `linear_2`; the second layer of a linear projector is the identity.

    Raises:
        DataError: Tensors are missing or left over; the message is a diff.
    """
    found, other = {}, []
    for name, tensor in state.items():
        match = _PROJECTOR_PREFIX.fullmatch(name)
        if match:
            found[match[1]] = tensor
        else:
            other.append(name)
    kind = "linear" if {"weight", "bias"} & set(found) else "mlp2x_gelu"
    wanted = {name: found.get(name, torch.empty(0)) for name in PROJECTOR_KEYS[kind]}
    refuse_differences(wanted, {**found, **{name: state[name] for name in other}}, source, f"a projector of kind {kind} (mm_projector.*)")
    renamed = {new: found[old] for old, new in PROJECTOR_KEYS[kind].items()}
    if kind == "linear":
        width, dtype = len(renamed["linear_1.weight"]), renamed["linear_1.weight"].dtype
        renamed |= {"linear_2.weight": torch.eye(width, dtype=dtype), "linear_2.bias": torch.zeros(width, dtype=dtype)}
    return kind, renamed


def projector_to_original(state: Mapping[str, Tensor], kind: str, prefix: str = "model.mm_projector.") -> dict[str, Tensor]:
    """The inverse of `projector_from_original`."""
    return {prefix + old: state[new] for old, new in PROJECTOR_KEYS[kind].items()}


def fill_projector(model: LlavaForConditionalGeneration, state: Mapping[str, Tensor], source: str) -> None:
    """Fill a model's projector from LLaVA's names.

    Raises:
        ConfigError: The file's projector is of another kind or leads between other widths.
    """
    kind, renamed = projector_from_original(state, source)
    projector = model.model.multi_modal_projector
    own = "linear" if model.config.projector_hidden_act == "linear" else "mlp2x_gelu"
    if kind != own:
        raise ConfigError(f"the projector in {source} is of kind {kind}, the model's of kind {own}: set --projector {kind}")
    given, needed = list(renamed["linear_1.weight"].shape), list(projector.linear_1.weight.shape)
    if given != needed:
        raise ConfigError(
            f"the projector in {source} leads from width {given[1]} to width {given[0]}; here it would have to lead from {needed[1]} (the "
            f"encoder's) to {needed[0]} (the LLM's). Name the encoder and the LLM that it was trained with"
        )
    load_strict(projector, renamed, source)


# -- whole models --------------------------------------------------------------------------------------------------------------------------


def load_original(
    folder: Path, dtype: torch.dtype = torch.float32, *, merge: bool = True, encoder: str = "", llm: str = ""
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor, LlavaCard]:
    """Load a folder in LLaVA's own layout.

    Args:
        folder: The folder.
        dtype: Of the weights.
        merge: As for `load_llava`.
        encoder, llm: Where the parts are that the folder only names; empty takes what its files say (a hub name or a path).

    Returns:
        The model, its processor, and a card; its template is vicuna_v1, that of v1.5, where the folder has no card of ours.

    Raises:
        ConfigError: The model has something that transformers' LLaVA cannot express.
        DataError: A file is missing, broken or does not fit; a part that it names is not there.
    """
    check_files(folder)
    original, card = read_original_config(folder), read_card(folder)
    lora = (folder / ADAPTER).is_file()
    state = {} if lora else read_shards(folder)
    tower, spec = _tower(encoder or (card.encoder if card and not state else "") or original.tower, folder, state, original)
    if state:
        language = _language(folder, original, state, dtype)
        llm = str(folder)
    else:
        llm = llm or (card.llm if card else "") or _base_model(folder, original, lora)
        language = load_llm(llm, dtype)
    model, processor = build_llava(
        tower, language, original.projector, original.feature_layer, original.select, spec=spec, dtype=dtype
    )  # fmt: skip
    projector = {name: tensor for name, tensor in state.items() if "mm_projector." in name}
    source = folder
    if not state:
        file = projector_file(folder)
        if file is None:
            raise DataError(
                f"{folder / NON_LORA_BIN} is missing: the adapter's projector is in it. Intermediate checkpoints of LLaVA lack it"
            )
        projector, source = load_weights(file), file
    fill_projector(model, projector, str(source))
    made = LlavaCard(
        encoder or original.tower,
        llm,
        weights_hash(tower),
        original.projector,
        original.feature_layer,
        original.select,
        "vicuna_v1",
        stage=2,
    )
    card = replace(card, encoder_hash=made.encoder_hash) if card else made
    return (_with_lora(model, folder, merge).to(dtype).eval() if lora else model), processor, card


def _with_lora(model: LlavaForConditionalGeneration, folder: Path, merge: bool) -> Any:
    """Put LLaVA's adapter on: its layers have the LLM inside LLaVA's own model, transformers' have it one level down."""
    config, file = read_adapter_config(folder), adapter_file(folder)
    targets = config.target_modules
    if not targets or isinstance(targets, str):
        raise DataError(f"{folder / ADAPTER} has target_modules {targets!r}; LLaVA's is a list of names such as q_proj")
    config.base_model_name_or_path = None  # it named the LLM, the adapter goes on the whole model
    config.target_modules = rf".*language_model.*\.({'|'.join(sorted(map(re.escape, targets)))})"
    adapted = put_adapter(model, config, {lora_from_original(name): tensor for name, tensor in load_weights(file).items()}, str(file))
    return merged(adapted) if merge else adapted


def lora_from_original(name: str) -> str:
    """`base_model.model.model.layers.3...` -> `base_model.model.model.language_model.layers.3...`."""
    return name.replace(_LORA_PREFIX, _LORA_HERE, 1) if name.startswith(_LORA_PREFIX) else name


def lora_to_original(name: str) -> str:
    """The inverse of `lora_from_original`."""
    return name.replace(_LORA_HERE, _LORA_PREFIX, 1)


def _base_model(folder: Path, original: OriginalConfig, lora: bool) -> str:
    name = (read_adapter_config(folder).base_model_name_or_path if lora else "") or original.llm
    if not name:
        raise ConfigError(f"{folder} does not say which LLM it belongs to: give it, --llm NAME_OR_FOLDER")
    return str(name)


def read_shards(folder: Path) -> dict[str, Tensor]:
    """All weights of a folder: model*.safetensors, else pytorch_model*.bin; none for a folder that has only a projector."""
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files and not (folder / PROJECTOR_BIN).is_file():
        raise DataError(f"{folder} has a config.json of LLaVA's and no weights: model*.safetensors or pytorch_model*.bin are missing")
    state: dict[str, Tensor] = {}
    for file in files:
        state |= load_weights(file)
    return {name: tensor for name, tensor in state.items() if not name.endswith("rotary_emb.inv_freq")}  # old releases wrote the table


def _language(folder: Path, original: OriginalConfig, state: Mapping[str, Tensor], dtype: torch.dtype) -> tuple[PreTrainedModel, Any]:
    """The LLM inside a whole folder, and its tokenizer."""
    own = {name: tensor for name, tensor in state.items() if "mm_projector." not in name and not name.startswith(_TOWER_PREFIX)}
    values = {key: value for key, value in original.values.items() if not key.startswith(("mm_", "mmkit_", "_name", "torch_dtype"))}
    kind: Any = LLMS[LLM_TYPES[original.values.get("model_type", "llava")]]
    values.pop("model_type", None)
    config = kind.config_class(**values)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, config=config)
        model, info = kind.from_pretrained(None, config=config, state_dict=own, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"the LLM in {folder} could not be loaded: {str(error).splitlines()[0]}") from error
    gaps = {kind: sorted(map(str, info.get(f"{kind}_keys") or [])) for kind in ("missing", "unexpected", "mismatched")}
    said = [f"{len(names)} {kind} ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})" for kind, names in gaps.items() if names]
    if said:
        raise DataError(f"the weights in {folder} do not fill its config.json: {'; '.join(said)}. Take all files of one model")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    add_image_token(model, tokenizer)
    return model, tokenizer


# -- vision towers -------------------------------------------------------------------------------------------------------------------------


def _tower(name: str, folder: Path, state: Mapping[str, Tensor], original: OriginalConfig) -> tuple[PreTrainedModel, ImageSpec | None]:
    """The vision tower: an encoder of this kit's, or a stock CLIP, whose weights the folder itself may hold."""
    if not name:
        raise ConfigError(f"{folder / 'config.json'} names no mm_vision_tower: give the encoder, --encoder NAME_OR_FOLDER")
    own = {key.removeprefix(_TOWER_PREFIX): tensor for key, tensor in state.items() if key.startswith(_TOWER_PREFIX)}
    said = original.values.get("mmkit_image_spec")  # by mmkit's own exports: more than LLaVA's keys can tell
    if not own and _is_ours(name):
        return with_resize(load_tower(name), said["resize"] if said else "pad" if original.pad else "own"), None
    try:
        config: Any = AutoConfig.from_pretrained(name.removeprefix("hf:"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{folder} names the vision tower '{name}', which is not here: {str(error).splitlines()[0]}\n  Give the folder where it is: "
            "--encoder FOLDER, or fetch it where there is a network"
        ) from error
    vision = getattr(config, "vision_config", config)
    if vision.model_type != "clip_vision_model":
        raise ConfigError(f"{folder} names the vision tower '{name}', a {config.model_type}: original LLaVA reads CLIP towers only")
    if own:
        tower = CLIPVisionModel(vision).eval()
        infix = "vision_model." if any(key.startswith("vision_model.") for key in tower.state_dict()) else ""
        skipped = "embeddings.position_ids"  # a table of numbers, which old versions of transformers saved
        renamed = {infix + key.removeprefix("vision_model."): tensor.float() for key, tensor in own.items() if not key.endswith(skipped)}
        load_strict(tower, renamed, f"the vision tower in {folder}")
    else:
        tower = load_hf(CLIPVisionModel, name.removeprefix("hf:"), vision, name)
    spec = ImageSpec.from_dict(said) if said else ImageSpec(size=vision.image_size, **hf_spec(name.removeprefix("hf:"), config))
    return tower, replace(spec, resize="pad") if original.pad else spec


def _is_ours(name: str) -> bool:
    """Whether `load_encoder` is to be asked: a name of the kit's, or a folder that a training of ours wrote."""
    join, parts = parse(name)
    if join or name in ENCODERS or name.startswith(("timm:", "openclip:")) or any(part.image_size for part in parts):
        return True
    try:
        return bool(json.loads((Path(name) / "config.json").read_text(encoding="utf-8")).get("model_type") in (MODEL_TYPE, JOINED_TYPE))
    except (OSError, ValueError, AttributeError):
        return False
