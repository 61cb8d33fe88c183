"""What is done to an assembled LLaVA before it trains: adapters, checkpointing, compilation, fused kernels. To the LLM alone; the tower sleeps."""

from __future__ import annotations

import inspect
import sys
from importlib.util import find_spec
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import LlavaForConditionalGeneration

from llm_stage.llava_settings import LoraSettings
from mmkit.errors import ConfigError


def checkpoint_llm(model: LlavaForConditionalGeneration) -> None:
    """Recompute the LLM's layers in the backward pass. Not the tower's: it has none.

    Raises:
        ConfigError: The LLM is frozen and has dropout, which recomputing would wake.
    """
    llm = model.model.language_model
    llm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    llm.__dict__.pop("train", None)  # stage 1 froze it in eval mode, in which nothing is recomputed
    dropouts = [name for name, module in llm.named_modules() if isinstance(module, nn.Dropout) and module.p > 0]
    if not any(parameter.requires_grad for parameter in llm.parameters()) and (
        dropouts or bool(getattr(llm.config, "attention_dropout", 0))
    ):
        raise ConfigError("gradient_checkpointing would wake the frozen LLM's dropout in stage 1: set its dropout to 0, or switch this off")


def add_lora(model: LlavaForConditionalGeneration, lora: LoraSettings, seed: int) -> PeftModel:
    """Put adapters into the LLM and freeze the rest of it; the projector is trained whole and saved with them.

    On a 4-bit LLM (QLoRA) peft's `prepare_model_for_kbit_training` is left out: it would cast tower, projector and head to float32 and
    recompute the tower's layers; none of it is needed here.

    Raises:
        ConfigError: No layer of the LLM matches `lora.targets`.
    """
    torch.manual_seed(seed)
    model.requires_grad_(False)
    model.is_loaded_in_4bit = lora.quantize != "none"  # where peft looks to choose its layers for 4-bit weights
    try:
        adapted = get_peft_model(
            model,
            LoraConfig(
                r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=lora.targets, use_rslora=lora.rslora,
                use_dora=lora.dora, modules_to_save=["multi_modal_projector"], task_type="CAUSAL_LM",
            ),
        )  # fmt: skip
    except ValueError as error:
        layers = [name for name, module in model.model.language_model.named_modules() if isinstance(module, nn.Linear)]
        raise ConfigError(
            f"lora.targets {lora.targets!r} matches no layer of this LLM; its linear layers are called {', '.join(layers[:7])}, ... below "
            f"model.language_model. ({str(error).splitlines()[0]})"
        ) from error
    if model.config.projector_hidden_act == "linear":
        for name, parameter in adapted.named_parameters():
            if "multi_modal_projector" in name and "linear_2" in name:
                parameter.requires_grad_(False)
    return adapted


def keep_trained_in_fp32(model: nn.Module) -> None:
    """Hold what is trained in float32, whatever the frozen rest is in: in bfloat16 an update of a 256th of a weight is rounded away."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()


def compile_llm(model: LlavaForConditionalGeneration) -> None:
    """Let torch.compile have each layer of the LLM, one graph for all lengths; names in checkpoints stay as they are."""
    layers: Any = model.model.language_model.layers
    for layer in layers:
        layer.compile(dynamic=True)


def use_liger(model: LlavaForConditionalGeneration, device: torch.device) -> list[str]:
    """Put Liger's fused norms and MLPs into the LLM of this model.

    Only this model changes. Liger's loss is left out, as the loss here is computed on the supervised positions alone, and so is its rotary
    embedding, which would replace that of every model of the family in the process.

    Returns:
        The kinds of the modules that were given kernels.

    Raises:
        ConfigError: liger-kernel is not installed, there is no CUDA, or it has nothing for this LLM.
    """
    if find_spec("liger_kernel") is None:
        raise ConfigError("liger needs the package liger-kernel, which is not installed: pip install 'mmkit[liger]', or leave --liger out")
    if device.type != "cuda":
        raise ConfigError(f"liger is on, and the device is {device.type}: its kernels run on CUDA. Leave --liger out")
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    llm: Any = model.model.language_model
    kind = llm.config.model_type
    if kind not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        known = ", ".join(name for name in MODEL_TYPE_TO_APPLY_LIGER_FN if name in ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2"))
        raise ConfigError(f"liger has no kernels for an LLM of type {kind!r}; it has them for {known} and others. Leave --liger out")
    apply = MODEL_TYPE_TO_APPLY_LIGER_FN[kind]
    wanted = {"rope": False, "cross_entropy": False, "fused_linear_cross_entropy": False, "rms_norm": True, "swiglu": True, "model": llm}
    family = sys.modules[type(llm).__module__]
    before = dict(vars(family))
    apply(**{name: value for name, value in wanted.items() if name in inspect.signature(apply).parameters})
    for name, value in before.items():  # the classes of the family, which it replaces for models made later
        setattr(family, name, value)
    return sorted({type(module).__name__ for module in llm.modules() if "liger" in getattr(module.forward, "__module__", "")})
