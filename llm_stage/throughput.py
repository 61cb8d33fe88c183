"""How fast a LLaVA trains, and how much of it is of use: tokens, padding, operations, memory.

    speed = Throughput(model, run, peak_tflops)
    for batch in run.batches(dataset, collate, weigh=speed.weigh):
        ...
        run.log(loss=loss, **speed.terms())

Everything is counted on the host, from batches that are not on the device yet: no step waits for the device because of it.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from encoders.flops import forward_flops, peak_of
from encoders.modeling import VisionEncoder
from llm_stage.chat_format import IGNORE_INDEX
from llm_stage.llava import label_tokens
from mmkit.run import Run


@dataclass
class Counts:
    """What went through the model.

    Attributes:
        labels: Supervised tokens.
        tokens: Tokens of samples, image tokens included.
        places: Places in the batches, padding included.
        flops: Operations that the samples need, forward and backward.
    """

    labels: float = 0.0
    tokens: float = 0.0
    places: float = 0.0
    flops: float = 0.0

    def add(self, other: Counts) -> None:
        """Add up."""
        for item in fields(self):
            setattr(self, item.name, getattr(self, item.name) + getattr(other, item.name))


@dataclass(frozen=True)
class LlavaFlops:
    """Operations of a training step (2 for a multiply-add), by what they grow with; padding and recomputation are not counted.

    A matrix of w weights takes 2w for a token in the forward, 2w for the gradient of its input, and 2w for its own gradient if it is trained.
    The attention of a row of n tokens takes 4 n^2 d a layer forward (the causal half is not taken off) and twice that backward. The frozen
    tower goes forward only.

    Source: PaLM: Scaling Language Modeling with Pathways, appendix B (6N + 12LHQT for a token), here for parts that are frozen too.
    """

    per_token: int
    per_square: int
    per_label: int
    per_image: int
    per_feature: int

    @classmethod
    def of(cls, model: LlavaForConditionalGeneration) -> LlavaFlops:
        """Read them off a model whose trained parts are chosen."""
        inner, llm = model.model, model.model.language_model
        text: Any = llm.config
        width = text.num_attention_heads * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
        first, second = inner.multi_modal_projector.linear_1, inner.multi_modal_projector.linear_2
        return cls(
            per_token=sum(_matrix(module) for module in llm.modules()),
            per_square=3 * 4 * text.num_hidden_layers * width,
            per_label=_matrix(model.lm_head),
            per_image=_tower_flops(inner.vision_tower, model.config.image_seq_length),
            per_feature=_matrix(first) - 2 * _weights(first) + _matrix(second),  # the tower wants no gradient
        )

    def of_batch(self, batch: Mapping[str, Any], lengths: Tensor, tokens_per_image: int) -> float:
        """Operations for a batch on the host; `lengths` are those of its samples."""
        pictures = batch.get("pixel_values")
        images = 0 if pictures is None else len(pictures)
        seen = images if pictures is not None and pictures.dim() == 4 else 0  # cached features pass the tower by
        squares = float(lengths.double().square().sum())
        return (
            self.per_token * float(lengths.sum()) + self.per_square * squares + self.per_label * label_tokens(batch)
            + self.per_image * seen + self.per_feature * images * tokens_per_image
        )  # fmt: skip


def _weights(module: nn.Module) -> int:
    weight: Any = module.weight
    packed = getattr(weight, "quant_state", None)  # two weights of 4 bits are in a byte
    return int(torch.Size(packed.shape if packed is not None else getattr(weight, "ds_shape", weight.shape)).numel())


def _matrix(module: nn.Module) -> int:
    """Operations of a linear layer for a token, forward and backward; 0 for other modules."""
    if not isinstance(module, nn.Linear):
        return 0
    return _weights(module) * (6 if module.weight.requires_grad else 4)


def _tower_flops(tower: Any, tokens: int) -> int:
    """Operations for an image; of towers that are not one VisionEncoder the linear layers alone, nearly all of it."""
    if isinstance(tower, VisionEncoder):
        return forward_flops(tower)
    return 2 * tokens * sum(_weights(module) for module in tower.modules() if isinstance(module, nn.Linear))


def sample_lengths(batch: Mapping[str, Any]) -> Tensor:
    """Tokens of each sample of a batch [samples], packed or not; what bears no label is padding, a dummy row among it."""
    labelled = (batch["labels"] != IGNORE_INDEX).double()  # [B, L]
    if batch.get("attention_mask") is not None:
        return batch["attention_mask"].sum(1)[labelled.any(1)]
    positions = batch.get("position_ids")
    starts = torch.zeros_like(labelled, dtype=torch.bool) if positions is None else positions == 0
    starts[:, 0] = True
    sample = starts.flatten().cumsum(0) - 1
    return sample.bincount()[sample.bincount(labelled.flatten()) > 0]


class Throughput:
    """Counts what a run trains on, and gives rates for its log.

    Args:
        model: The bare LLaVA, its trained parts chosen.
        run: The run, before its loop.
        peak_tflops: What the device can do at best; 0 looks it up.
    """

    def __init__(self, model: LlavaForConditionalGeneration, run: Run, peak_tflops: float = 0.0) -> None:
        self.run, self.flops = run, LlavaFlops.of(model)
        self.tokens_per_image = model.config.image_seq_length
        self.peak = peak_tflops or peak_of(run.device, run.config.precision)
        self.all, self.window = Counts(), Counts()
        self.begin = self.window_begin = 0.0
        self.first_step = self.window_step = run.step

    def weigh(self, batch: Mapping[str, Any]) -> int:
        """Count a batch of this process, and give its weight: its supervised tokens."""
        if not self.begin:
            self.begin = self.window_begin = time.monotonic()
        lengths, labels = sample_lengths(batch), label_tokens(batch)
        counts = Counts(labels, float(lengths.sum()), batch["labels"].numel(), self.flops.of_batch(batch, lengths, self.tokens_per_image))
        self.window.add(counts)
        self.all.add(counts)
        return labels

    def terms(self) -> dict[str, float]:
        """Rates since the last line of the log, behind the last micro-batch of a step that gets a line; else nothing.

        Tokens and samples are those of all processes together, each taken for as busy as this one; padding, mfu and memory_gb (the highest so
        far: CUDA's allocated, elsewhere the process's resident memory) are this process's; the log averages them over the processes.
        """
        step = self.run.step + 1
        if not self.run.updated or (step % self.run.config.log_every and step != self.run.steps):
            return {}
        found = self._rates(self.window, time.monotonic() - self.window_begin, step - self.window_step)
        self.window, self.window_begin, self.window_step = Counts(), time.monotonic(), step
        return {**found, "memory_gb": self._memory()}

    def _rates(self, counts: Counts, seconds: float, steps: int) -> dict[str, float]:
        ranks, seconds = self.run.world_size, max(seconds, 1e-9)
        tflops = counts.flops / seconds / 1e12
        return {
            "label_tokens_per_second": counts.labels * ranks / seconds,
            "tokens_per_second": counts.tokens * ranks / seconds,
            "samples_per_second": steps * self.run.layout.global_batch_size / seconds,
            "padding": 1 - counts.tokens / max(counts.places, 1),
            "tflops": tflops,
            **({"mfu": tflops / self.peak} if self.peak else {}),
        }

    def _memory(self) -> float:
        if self.run.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.run.device) / 1e9
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most * (1 if sys.platform == "darwin" else 1024) / 1e9

    def summary(self) -> str:
        """Say what the whole run came to; empty if it had no step."""
        if not self.begin:
            return ""
        rates = self._rates(self.all, time.monotonic() - self.begin, self.run.step - self.first_step)
        share = f", {100 * rates['mfu']:.1f} % of the peak of {self.peak:g}" if self.peak else ""
        return (
            f"{rates['label_tokens_per_second']:,.0f} supervised tokens/s of {rates['tokens_per_second']:,.0f}, "
            f"{rates['samples_per_second']:.3g} samples/s, {100 * rates['padding']:.1f} % padding, {rates['tflops']:.3g} TFLOP/s a process"
            f"{share}, {self._memory():.3g} GB at most"
        )
