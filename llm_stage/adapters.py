"""LoRA adapters put on a LLaVA: loaded strictly, and merged into the weights they were trained with, 4-bit rounding included."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from mmkit.checkpoint import load_weights, refuse_differences
from mmkit.errors import ConfigError, DataError

ADAPTER = "adapter_config.json"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def read_adapter_config(folder: Path) -> LoraConfig:
    """The LoRA settings of a folder.

    Raises:
        DataError: adapter_config.json is broken, or of another method than LoRA.
    """
    path = folder / ADAPTER
    try:
        kind = json.loads(path.read_text(encoding="utf-8")).get("peft_type", "LORA")
        if kind != "LORA":
            raise DataError(f"{path} is of peft's method {kind}; LoRA is what is loaded here")
        config: LoraConfig = LoraConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} is no adapter's configuration: {error}") from error
    config.inference_mode = True
    return config


def adapter_file(folder: Path) -> Path:
    """The weight file of an adapter folder, adapter_model.safetensors or LLaVA's adapter_model.bin.

    Raises:
        DataError: There is none.
    """
    found = [folder / f"adapter_model.{ending}" for ending in ("safetensors", "bin")]
    present = [path for path in found if path.is_file()]
    if not present:
        raise DataError(f"{found[0]} is missing: {folder} has {ADAPTER} and no weights to it. Copy the folder again, all files of it")
    return present[0]


def put_adapter(model: LlavaForConditionalGeneration, config: LoraConfig, state: Mapping[str, Tensor], source: str) -> PeftModel:
    """Put an adapter on a model and fill it exactly.

    Args:
        model: The bare model; it becomes part of the result.
        config: The adapter's.
        state: As `get_peft_model_state_dict` names it: no adapter name in the keys.
        source: Where the state came from, for the message.

    Raises:
        DataError: Tensors are missing, superfluous or misshapen.
        ConfigError: The adapter's targets are not in this LLM.
    """
    try:
        adapted: Any = get_peft_model(model, config)
    except ValueError as error:  # no target matches
        raise ConfigError(f"the adapter in {source} does not fit this LLM: {str(error).splitlines()[0]}") from error
    refuse_differences(get_peft_model_state_dict(adapted, save_embedding_layers=False), state, source, "the adapter of its configuration")
    set_peft_model_state_dict(adapted, dict(state))
    return adapted.eval()


def load_adapter(model: LlavaForConditionalGeneration, folder: Path) -> PeftModel:
    """Put the adapter of a folder of ours on a model; see `put_adapter`."""
    path = adapter_file(folder)
    return put_adapter(model, read_adapter_config(folder), load_weights(path), str(path))


def merged(adapted: PeftModel) -> LlavaForConditionalGeneration:
    """Add the adapter into the weights: W + (alpha / rank) B A, in W's own dtype."""
    model: LlavaForConditionalGeneration = adapted.merge_and_unload()
    return model.eval()


def round_like_quantized(language_model: nn.Module, quantization: Mapping[str, Any]) -> None:
    """Give an LLM's linear layers the values that 4-bit training saw: quantised and dequantised, in place.

    An adapter trained on 4-bit weights corrects their rounding too; added to the unrounded weights it would correct what is not there.

    Args:
        language_model: Without its head, which is not quantised in LLaVA.
        quantization: "bits" 4, "type" nf4 or fp4, "double": whether the scales are quantised as well, "dtype": of the weights before.

    Raises:
        ConfigError: bitsandbytes is not installed, or bits is another number.

    Source: QLoRA: Efficient Finetuning of Quantized LLMs, section 3.
    """
    if quantization.get("bits") != 4:
        raise ConfigError(f"the card speaks of weights in {quantization.get('bits')} bits; 4 is what mmkit trains adapters on")
    try:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit
    except ImportError as error:
        raise ConfigError(
            "this adapter was trained on 4-bit weights; merging needs them again: pip install 'mmkit[quantization]'"
        ) from error
    kind, double = quantization.get("type", "nf4"), bool(quantization.get("double", True))
    before = DTYPES[quantization.get("dtype", "fp32")]
    with torch.no_grad():
        for module in language_model.modules():
            if isinstance(module, nn.Linear):
                weight = module.weight
                packed, state = quantize_4bit(weight.to(before).contiguous(), quant_type=kind, compress_statistics=double)
                weight.copy_(dequantize_4bit(packed, state).to(weight.dtype))
