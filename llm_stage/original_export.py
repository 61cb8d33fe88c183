"""Writing LLaVA's own folders (haotian-liu/LLaVA v1 to v1.5), which its code and everything built on it read; see original_llava.py."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor
from transformers import CLIPVisionModel, LlavaForConditionalGeneration, LlavaProcessor

from encoders.joined import JoinedEncoder
from encoders.modeling import VisionEncoder
from llm_stage.llava_card import LlavaCard
from llm_stage.llms import LLMS, llm_source
from llm_stage.original_llava import (
    FEATURES,
    NON_LORA_BIN,
    PROJECTOR_BIN,
    TOWER_FOLDER,
    lora_to_original,
    projector_to_original,
)
from mmkit.checkpoint import save_weights
from mmkit.errors import ConfigError
from mmkit.images import FILTERS, ImageSpec

ORIGINAL_TYPES = {"llama": ("llava_llama", "LlavaLlamaForCausalLM"), "mistral": ("llava_mistral", "LlavaMistralForCausalLM")}


def inner(model: Any) -> LlavaForConditionalGeneration:
    """The LLaVA inside, whether an adapter is around it or not."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def projector_state(model: Any) -> dict[str, Tensor]:
    """The projector's tensors as trained: an adapter keeps a copy of its own."""
    projector: Any = inner(model).model.multi_modal_projector
    copies = getattr(projector, "modules_to_save", None)
    module = copies["default"] if copies is not None and "default" in copies else projector
    return {name: tensor.detach() for name, tensor in module.state_dict().items()}


def projector_kind(model: Any) -> str:
    """ "linear" or "mlp2x_gelu"."""
    return "linear" if inner(model).config.projector_hidden_act == "linear" else "mlp2x_gelu"


def spec_of(model: Any, processor: LlavaProcessor) -> ImageSpec:
    """How the model's pictures are prepared: the encoder's own word, or what a stock processor says."""
    tower, own = inner(model).model.vision_tower, processor.image_processor
    if isinstance(tower, VisionEncoder | JoinedEncoder):
        return tower.spec
    size, scaled = tower.config.image_size, own.size.get("shortest_edge") or own.size["height"]
    cropped = bool(getattr(own, "do_center_crop", False)) and scaled != size
    names = {int(value): name for name, value in FILTERS.items()}
    return ImageSpec(
        size=size, mean=tuple(own.image_mean), std=tuple(own.image_std), interpolation=names[int(own.resample)],
        resize="pad" if getattr(own, "do_pad", False) else "crop" if "shortest_edge" in own.size else "squash",
        crop_pct=size / (scaled + 1e-6) if cropped else 1.0,  # a hair below: floor(size / crop_pct) is the edge again
    )  # fmt: skip


def write_config(model: Any, processor: LlavaProcessor, card: LlavaCard, folder: Path, *, tower: str, dtype: torch.dtype) -> None:
    """Write config.json with LLaVA's mm_* keys.

    Args:
        model: With or without an adapter around it.
        processor: Its processor.
        card: How it was made.
        folder: Where to write.
        tower: What mm_vision_tower shall say.
        dtype: Of the written weights.

    Raises:
        ConfigError: LLaVA has no class for this LLM, or reads several layers of the tower.
    """
    config = inner(model).config
    text, layer = config.text_config, config.vision_feature_layer
    if text.model_type not in ORIGINAL_TYPES:
        raise ConfigError(
            f"original LLaVA has classes for {', '.join(ORIGINAL_TYPES)}; this LLM is of type {text.model_type}. Take --format transformers"
        )
    if not isinstance(layer, int):
        raise ConfigError(f"original LLaVA reads one layer of the tower, this model reads {list(layer)}. Take --format transformers")
    kind, architecture = ORIGINAL_TYPES[text.model_type]
    spec = spec_of(model, processor)
    feature = {select: name for name, select in FEATURES.items()}[config.vision_feature_select_strategy]
    values = {
        **text.to_dict(), "model_type": kind, "architectures": [architecture], "torch_dtype": str(dtype).removeprefix("torch."),
        "_name_or_path": _llm_place(card.llm), "tie_word_embeddings": bool(config.tie_word_embeddings),
        "mm_vision_tower": tower, "mm_hidden_size": config.vision_config.hidden_size, "mm_projector_type": projector_kind(model),
        "mm_vision_select_layer": layer, "mm_vision_select_feature": feature,
        "image_aspect_ratio": "pad" if spec.resize == "pad" else "square",
        "mm_use_im_start_end": False, "mm_use_im_patch_token": False, "use_mm_proj": True, "tune_mm_mlp_adapter": card.stage == 1,
        "mmkit_image_spec": spec.to_dict(),
    }  # fmt: skip
    values.pop("dtype", None)
    if (folder / TOWER_FOLDER).is_dir():
        values["mmkit_vision_tower"] = (
            TOWER_FOLDER  # LLaVA's key has to be a path from anywhere; this one stays right when the folder moves
        )
    (folder / "config.json").write_text(json.dumps(values, indent=1, default=str) + "\n", encoding="utf-8")


def _llm_place(name: str) -> str:
    """What other programs find an LLM by: a hub's name as it is, a name of this kit's as its folder."""
    return llm_source(name) if name in LLMS or Path(name).is_dir() else name


def _tower_name(card: LlavaCard) -> str:
    return str(Path(card.encoder).absolute()) if Path(card.encoder).is_dir() else card.encoder.removeprefix("hf:")


def save_torch(state: Mapping[str, Tensor], path: Path, dtype: torch.dtype) -> None:
    """Write a torch file of tensors and nothing else, which weights_only reads."""
    torch.save({name: tensor.detach().cpu().to(dtype).clone() for name, tensor in state.items()}, path)


def write_mm_projector(model: Any, processor: LlavaProcessor, card: LlavaCard, folder: Path, home: Path, dtype: torch.dtype) -> None:
    """Write mm_projector.bin, and what it takes to load the whole model by it. Arguments as for `write_original`."""
    save_torch(projector_to_original(projector_state(model), projector_kind(model)), folder / PROJECTOR_BIN, dtype)
    write_config(model, processor, card, folder, tower=_tower_name(card), dtype=dtype)
    card.write(folder, home)


def write_original_lora(model: PeftModel, processor: LlavaProcessor, card: LlavaCard, folder: Path, home: Path, dtype: torch.dtype) -> None:
    """Write adapter and non_lora_trainables.bin under LLaVA's names. Arguments as for `write_original`."""
    config = model.peft_config["default"]
    adapter = {
        lora_to_original(name): tensor.to(dtype)
        for name, tensor in get_peft_model_state_dict(model, save_embedding_layers=False).items()
        if "multi_modal_projector" not in name
    }
    targets = sorted({name.split(".lora_")[0].rsplit(".", 1)[-1] for name in adapter})
    save_weights(adapter, folder / "adapter_model.safetensors")
    written = replace(
        config, base_model_name_or_path=_llm_place(card.llm), target_modules=targets, modules_to_save=None, inference_mode=True
    )
    written.save_pretrained(str(folder))
    projector = projector_to_original(projector_state(model), projector_kind(model), "base_model.model.model.mm_projector.")
    save_torch(projector, folder / NON_LORA_BIN, dtype)
    write_config(model, processor, card, folder, tower=_tower_name(card), dtype=dtype)
    card.write(folder, home)


def write_original(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, card: LlavaCard, folder: Path, home: Path, dtype: torch.dtype,
    *, max_shard_size: str = "5GB",
) -> None:  # fmt: skip
    """Write the whole model under LLaVA's names, the vision tower in it and beside it.

    Args:
        model: Merged, with a stock CLIP tower.
        processor: Its processor.
        card: How it was made.
        folder: Where to write.
        home: The folder's final place.
        dtype: Of the written weights.
        max_shard_size: Largest weight file.

    Raises:
        ConfigError: The tower is no CLIP, or see `write_config`.
    """
    tower: Any = model.model.vision_tower
    if not isinstance(tower, CLIPVisionModel):
        raise ConfigError(
            f"original LLaVA reads CLIP vision towers only, this model has a {type(tower).__name__} ({card.encoder}). "
            "Take --format transformers, or mm_projector for the projector alone"
        )
    tower.to(dtype).save_pretrained(folder / TOWER_FOLDER)
    processor.image_processor.save_pretrained(folder / TOWER_FOLDER)
    write_config(model, processor, card, folder, tower=str(home.absolute() / TOWER_FOLDER), dtype=dtype)
    processor.tokenizer.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    state = {name: tensor.to(dtype) for name, tensor in original_state(model).items()}
    plan = split_torch_state_dict_into_shards(state, max_shard_size=max_shard_size)
    for file, names in plan.filename_to_tensors.items():
        save_weights({name: state[name] for name in names}, folder / file)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    card.write(folder, home)


def original_state(model: LlavaForConditionalGeneration) -> dict[str, Tensor]:
    """All tensors of a merged model by LLaVA's names; a tied head is left out, as transformers does."""
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        if name.startswith("model.multi_modal_projector."):
            continue
        name = name.replace("model.language_model.", "model.", 1)
        if name.startswith("model.vision_tower."):
            rest = name.removeprefix("model.vision_tower.").removeprefix("vision_model.")
            name = f"model.vision_tower.vision_tower.vision_model.{rest}"
        state[name] = tensor.detach()
    return state | projector_to_original(projector_state(model), projector_kind(model))
