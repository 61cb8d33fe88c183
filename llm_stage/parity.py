"""The proof of an export: logits before and after, on one fixed picture and text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmkit.errors import DataError

TEXT = "<image>\nDescribe the picture in one sentence."
FORM = 1e-4
"""Largest difference of a logit, as a share of the largest logit, that merging and another form of the tower may make (float32)."""
CONVERSION = 1e-5
"""The same between the model in memory, rounded to what is written, and the one read back."""
ROUNDING = {"fp32": 1e-4, "fp16": 0.1, "bf16": 0.5}
"""The same between the model as trained and the one read back, by the dtype of the written weights: a guard against overflow; what rounding
costs on a picture is in the card."""


@dataclass(frozen=True)
class Parity:
    """What was measured.

    Attributes:
        form: Largest difference of a logit that merging the adapter and another form of the tower made.
        conversion: Largest difference of a logit between what was to be written and what is read back.
        rounding: Largest difference of a logit between the model as it was and what is read back.
        largest: Largest logit, in magnitude, before.
        same_next: Share of positions with the same likeliest next token, before and after.
        tokens: Positions compared.
        dtype: Of the written weights.
    """

    form: float
    conversion: float
    rounding: float
    largest: float
    same_next: float
    tokens: int
    dtype: str

    def refuse(self) -> None:
        """Refuse an export that is another model.

        Raises:
            DataError: A difference is above its tolerance; both are named.
        """
        for what, found, limit in self.rows():
            if not found <= limit:  # also when it is no number
                raise DataError(
                    f"not exported: {what}, the logits differ by {found:.2e}; up to {limit:.2e} is right (the largest logit is "
                    f"{self.largest:.3g}, weights are written in {self.dtype}). The written model would be another one"
                )

    def rows(self) -> list[tuple[str, float, float]]:
        """What was compared, the largest difference found, and the largest allowed."""
        scale = max(1.0, self.largest)
        return [
            ("merged and in its new form against the model before", self.form, FORM * scale),
            ("read back against what was to be written", self.conversion, CONVERSION * scale),
            (f"read back ({self.dtype}) against the model before", self.rounding, ROUNDING[self.dtype] * scale),
        ]


def probe(processor: Any) -> dict[str, Tensor]:
    """The fixed picture and text as inputs: smooth colours with noise, of no square shape, so that resizing counts too."""
    down, across = np.mgrid[0:90, 0:140].astype(np.float64)
    waves = np.stack([np.sin(across / 17), np.cos(down / 13), np.sin((across + down) / 29)], axis=-1)
    noise = np.random.default_rng(0).normal(0, 12, waves.shape)
    picture = Image.fromarray(np.clip(127 + 90 * waves + noise, 0, 255).astype(np.uint8))
    return dict(processor(images=picture, text=TEXT, return_tensors="pt"))


@torch.no_grad()
def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Logits [L, V] of the probe, in float32."""
    dtype = next(model.parameters()).dtype
    inputs = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}
    found: Tensor = model(**inputs, use_cache=False).logits[0].float()
    return found


def compare(before: Tensor, formed: Tensor, expected: Tensor, after: Tensor, dtype: str) -> Parity:
    """Measure.

    Args:
        before: Logits [L, V] of the model as it was.
        formed: Of the model merged and in its new form, not rounded yet.
        expected: Of the model in memory, its weights rounded to what is written.
        after: Of the model read back.
        dtype: fp32, fp16 or bf16.
    """
    return Parity(
        form=float((before - formed).abs().max()),
        conversion=float((expected - after).abs().max()),
        rounding=float((before - after).abs().max()),
        largest=float(before.abs().max()),
        same_next=float((before.argmax(-1) == after.argmax(-1)).float().mean()),
        tokens=len(before),
        dtype=dtype,
    )


def refuse_other_inputs(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """See that the exported processor makes the same of picture and text.

    Raises:
        DataError: It does not.
    """
    for name, tensor in ours.items():
        if name not in theirs or tensor.shape != theirs[name].shape or not torch.equal(tensor, theirs[name]):
            raise DataError(f"not exported: the written processor makes other {name} of the same picture and text than the model's own")
