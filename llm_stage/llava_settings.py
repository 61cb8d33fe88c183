"""The settings of a LLaVA training, and what of them cannot be trained."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from llm_stage.tiles import MOST
from mmkit.deepspeed_block import refuse_contradictions
from mmkit.errors import ConfigError
from mmkit.launch import read_deepspeed_block
from mmkit.run_config import RunConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class DataSettings:
    """What is trained on."""

    json: str = field(default="", metadata={"help": "LLaVA JSON or JSONL: id, image, conversations"})
    images: str = field(default="", metadata={"help": "folder that the rows' image paths are relative to"})
    max_length: int = field(default=2048, metadata={"help": "tokens per row, images included; whole trailing rounds are cut, images never"})
    on_bad_sample: Literal["error", "skip"] = field(default="error", metadata={"help": "skip counts and lists them instead"})
    feature_cache: str = field(
        default="", metadata={"help": "folder for the frozen encoder's features: computed once, then read", "free": True}
    )
    feature_dtype: Literal["computed", "float16"] = field(
        default="computed", metadata={"help": "of cached features; float16 takes half the disk of fp32, and is not exact"}
    )
    rebuild_cache: bool = field(
        default=False, metadata={"help": "throw away what feature_cache holds for this encoder, and begin again", "free": True}
    )
    pack: bool = field(default=False, metadata={"help": "rows of a micro-batch one behind the other, not padded; learns the same"})
    pack_length: int = field(default=0, metadata={"help": "tokens of a packed row; 0 is max_length"})
    check: bool = field(
        default=True, metadata={"help": "encode all rows once before the start, to name the bad ones and count labels", "free": True}
    )


@dataclass
class LoraSettings:
    """Low-rank adapters in the LLM, in stage 2."""

    rank: int = field(default=0, metadata={"help": "0 trains the whole LLM"})
    alpha: int = field(default=16, metadata={"help": "scale is alpha / rank"})
    dropout: float = field(default=0.0, metadata={"help": "before the adapters"})
    # peft's own "all-linear" would also hit tower and projector
    targets: str = field(
        default=r".*language_model.*\.(q|k|v|o|gate|up|down)_proj", metadata={"help": "regular expression over module names"}
    )
    rslora: bool = field(default=False, metadata={"help": "scale is alpha / sqrt(rank)"})
    dora: bool = field(default=False, metadata={"help": "direction and length of each weight apart: slower, as good at lower ranks"})
    quantize: Literal["none", "nf4", "fp4"] = field(
        default="none", metadata={"help": "4 bits for the frozen LLM (QLoRA), not for its head, tower and projector; needs bitsandbytes"}
    )
    double_quant: bool = field(default=True, metadata={"help": "quantise the 4-bit scales too"})


@dataclass
class LlavaSettings:
    """One stage of LLaVA. The flags of LLaVA's own scripts are understood too (llm_stage/original_flags.py)."""

    stage: Literal[1, 2] = field(default=1, metadata={"help": "1 trains the projector, 2 projector and LLM"})
    encoder: str = field(
        default="", metadata={"help": "name or folder, A+B or tokens:A+B for several; stage 2 takes that of --pretrained if empty"}
    )
    image_size: int = field(default=0, metadata={"help": "pixels, for which the encoder's positions are resampled; 0 is its own size"})
    llm: str = field(default="", metadata={"help": "name or folder; stage 2 takes that of --pretrained if empty"})
    pretrained: str = field(default="", metadata={"help": "model folder of a stage-1 run, whose projector is taken over"})
    projector: Literal["mlp2x_gelu", "linear"] = field(default="mlp2x_gelu", metadata={"help": "LLaVA-v1.5's, LLaVA-v1's"})
    feature_layer: int = field(default=-2, metadata={"help": "hidden state of the encoder that is read"})
    select: Literal["auto", "default", "full"] = field(default="auto", metadata={"help": "default drops the CLS token, full keeps all"})
    resize: Literal["own", "crop", "squash", "pad"] = field(
        default="own",
        metadata={"help": "how pictures become square: the encoder's own way, or crop, squash, pad (bars in the mean colour)"},
    )
    tiles: int = field(
        default=0, metadata={"help": "tiles of a large picture at most, shown besides the whole of it (any resolution); 0 cuts nothing"}
    )
    template: str = field(default="own", metadata={"help": "plain, vicuna_v1, llama_2, llama_3, chatml, or own: the tokenizer's"})
    system: str | None = field(default=None, metadata={"help": "system prompt in place of the template's"})
    lr: float = field(default=2e-5, metadata={"help": "peak, of the LLM or its LoRA (stage 2)"})
    projector_lr: float = field(default=1e-3, metadata={"help": "peak, of the projector"})
    weight_decay: float = field(default=0.0, metadata={"help": "AdamW's, on matrices"})
    warmup: float = field(default=0.03, metadata={"help": "share of the steps (below 1), or steps"})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "of the LLM only: less memory, a third more time"})
    weights: Literal["fp32", "bf16"] = field(
        default="fp32",
        metadata={"help": "dtype of all weights; bf16 halves frozen parts, what is trained stays fp32 if run.precision is bf16"},
    )
    attention: Literal["sdpa", "eager", "flash_attention_2"] = field(default="sdpa", metadata={"help": "of the LLM"})
    compile: bool = field(default=False, metadata={"help": "torch.compile the LLM's layers: minutes at the start, then faster"})
    liger: bool = field(
        default=False, metadata={"help": "Liger's kernels for the LLM's norms and MLPs, on CUDA: pip install 'mmkit[liger]'"}
    )
    tf32: bool = field(default=False, metadata={"help": "let float32 matrix products round to TF32, on CUDA"})
    peak_tflops: float = field(
        default=0.0, metadata={"help": "what the device can do at best, for the share of it (MFU); 0 looks it up", "free": True}
    )
    check_saving: bool = field(default=True, metadata={"help": "at step 0 save and reload everything, compare the loss", "free": True})
    data: DataSettings = field(default_factory=DataSettings)
    lora: LoraSettings = field(default_factory=LoraSettings)
    run: RunConfig = field(default_factory=RunConfig)

    @property
    def quantization(self) -> dict[str, Any]:
        """How the frozen LLM is held, as the card of the result says it; empty is whole."""
        if self.lora.quantize == "none":
            return {}
        return {"bits": 4, "type": self.lora.quantize, "double": self.lora.double_quant, "dtype": self.weights}

    def validate(self) -> None:
        """Refuse what cannot be trained.

        Raises:
            ConfigError: The message names the setting.
        """
        if not (self.pretrained or (self.encoder and self.llm)):
            raise ConfigError("which parts? --encoder NAME_OR_FOLDER and --llm NAME_OR_FOLDER, or in stage 2 --pretrained STAGE1_RUN/model")
        if not self.data.json:
            raise ConfigError("which data? --json FILE (LLaVA JSON) and --images FOLDER; `mmkit data mini --out DIR` makes a small set")
        if self.stage == 1 and self.lora.rank:
            raise ConfigError(f"stage 1 trains the projector alone; lora.rank {self.lora.rank} is for stage 2")
        if self.image_size < 0 or (self.image_size and not self.encoder):
            raise ConfigError(
                f"image_size {self.image_size}: a size of the encoder that --encoder names; stage 2 takes stage 1's if both are empty"
            )
        if self.lora.rank < 0 or self.data.max_length < 1:
            raise ConfigError(f"lora.rank {self.lora.rank}, data.max_length {self.data.max_length}: rank is 0 or more, length 1 or more")
        if self.tiles == 1 or not 0 <= self.tiles <= MOST:
            raise ConfigError(f"tiles is {self.tiles}; 0 shows the whole picture alone, 2 to {MOST} cut it besides")
        if self.tiles and self.data.feature_cache:
            raise ConfigError("data.feature_cache keeps whole pictures: with tiles leave it out")
        if self.data.pack_length < 0:
            raise ConfigError(f"data.pack_length is {self.data.pack_length}; the tokens of a packed row, or 0 for max_length, are right")
        if self.lora.quantize != "none" and not self.lora.rank:
            raise ConfigError(
                f"lora.quantize {self.lora.quantize} freezes the LLM in 4 bits: give --lora.rank too (64 is QLoRA's), in stage 2"
            )
        self._check_deepspeed()

    def _check_deepspeed(self) -> None:
        lr = self.projector_lr if self.stage == 1 else self.lr
        refuse_contradictions(self.run, schedule="cosine", optimizer={"lr": lr, "weight_decay": self.weight_decay})
        zero = read_deepspeed_block(self.run.deepspeed).get("zero_optimization", {})
        if zero.get("stage") == 3 and self.lora.quantize != "none":
            raise ConfigError(
                f"lora.quantize {self.lora.quantize} with run.deepspeed.zero_optimization.stage 3: ZeRO-3 would cut up 4-bit weights, whose "
                "scales do not travel with them; 2 is right for QLoRA (--deepspeed zero2)"
            )
