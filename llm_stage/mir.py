"""MIR, the modality integration rate: how far image tokens lie from text tokens inside the LLM, on a model of stage 1 without any tuning.

    MIR = log10( sum over layers k of  F( w(a_k V_k), w(a_k T_k) ) )

V_k and T_k are the hidden states of all image tokens and of all text tokens behind layer k, of all image-text pairs together; k runs over the
L decoder layers (not over what enters the first; the last is taken behind the final norm, as transformers gives it).
a_k = 1 / mean over T_k of the l2-norm: text-centric normalisation, one factor for both, so that layers of unlike magnitude may be added.
w removes outliers: tokens whose norm is further than three standard deviations (of their modality, at their layer) from the median norm.
F is the Frechet distance of the two sets taken as normal distributions: |m_V - m_T|^2 + tr(S_V + S_T - 2 (S_V S_T)^(1/2)).
Lower is better: 0 before the logarithm where both have the same mean and covariance.

Source: Deciphering Cross-Modal Alignment in Large Vision-Language Models with Modality Integration Rate (Huang et al., 2024, arXiv
2410.07167), and its released code (github.com/shikiw/Modality-Integration-Rate, mir.py and mir_util.py), from which are taken: text tokens
are those behind the image, chat marks included; the base of the logarithm; the median in the rule of three; a_k before outliers go. Two
things differ. There outliers are not removed but replaced by the median vector. And its default ("fast") mode takes five steps of an
iteration for the square root, which may be far from converged; here, as in its "accurate" mode, the root is exact. Figures of one number of
pairs, one template and one set of images and texts may be compared, others not: with few tokens the covariances have noise that F counts in.

Only counts, sums and second moments are kept, in float64, so that a thousand pairs take no more memory than ten.

Letters: B pairs of a batch, S tokens of a row, H width of the LLM, G groups of pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from mmkit.errors import DataError

SIGMAS = 3.0
MODALITIES = ("vision", "text")


@dataclass(frozen=True)
class PairBatch:
    """Image-text pairs as the model takes them.

    Attributes:
        inputs: input_ids and attention_mask [B, S], padded on the right, pixel_values [B, 3, h, w]; on the model's device.
        groups: The group of each pair, for the interval.
    """

    inputs: dict[str, Tensor]
    groups: Sequence[int]


@dataclass(frozen=True)
class LayerGap:
    """One layer's part: F, its share that comes from the means, mean norms, tokens that count, and outliers that do not."""

    layer: int
    distance: float
    of_means: float
    norms: dict[str, float]
    tokens: dict[str, int]
    outliers: dict[str, int]


@dataclass(frozen=True)
class Mir:
    """The result.

    Attributes:
        value: MIR; minus infinity where all distances are 0.
        standard_error: By the jackknife over groups of pairs; NaN for fewer than two groups.
        layers: Each layer's part.
    """

    value: float
    standard_error: float
    layers: list[LayerGap]


def trace_of_root(first: Tensor, second: Tensor) -> float:
    """tr((A B)^(1/2)) of two covariances [H, H], which has the eigenvalues of R^T B R, A = R R^T: all real, none negative."""
    values, vectors = torch.linalg.eigh(first)
    root = vectors * values.clamp(min=0).sqrt()  # rounding makes zeros slightly negative
    return float(torch.linalg.eigvalsh(root.T @ second @ root).clamp(min=0).sqrt().sum())


def frechet_distance(means: Sequence[Tensor], covariances: Sequence[Tensor]) -> tuple[float, float]:
    """The Frechet (2-Wasserstein) distance, squared, of two normal distributions.

    Args:
        means: Two vectors [H], float64.
        covariances: Two symmetric matrices [H, H], float64.

    Returns:
        The distance, and its part |m_1 - m_2|^2; never below 0.
    """
    of_means = float((means[0] - means[1]).square().sum())
    of_spread = float(covariances[0].trace() + covariances[1].trace()) - 2 * trace_of_root(covariances[0], covariances[1])
    return of_means + max(0.0, of_spread), of_means


class Moments:
    """Count, sum and second moment of vectors [H], by group."""

    def __init__(self, groups: int, width: int, device: torch.device) -> None:
        self.counts = torch.zeros(groups, dtype=torch.float64, device=device)
        self.sums = torch.zeros(groups, width, dtype=torch.float64, device=device)
        self.squares = torch.zeros(groups, width, width, dtype=torch.float64, device=device)

    def add(self, group: int, vectors: Tensor) -> None:
        """Count in vectors [n, H]."""
        vectors = vectors.to(self.sums)
        self.counts[group] += len(vectors)
        self.sums[group] += vectors.sum(0)
        self.squares[group] += vectors.T @ vectors

    def summary(self, without: int | None = None) -> tuple[Tensor, Tensor]:
        """Mean [H] and covariance [H, H] of all groups, or of all but one."""
        chosen = [group for group in range(len(self.counts)) if group != without]
        count, total, square = self.counts[chosen].sum(), self.sums[chosen].sum(0), self.squares[chosen].sum(0)
        if count < 2:
            raise DataError(f"{int(count)} token(s) have no covariance: give more image-text pairs")
        mean = total / count
        return mean, (square - count * torch.outer(mean, mean)) / (count - 1)


@dataclass(frozen=True)
class _Norms:
    """Norms of one modality's tokens at one layer: for each group their sum and count, and what is no outlier."""

    sums: Tensor
    counts: Tensor
    median: float
    limit: float
    outliers: int

    def mean(self, without: int | None = None) -> float:
        chosen = [group for group in range(len(self.counts)) if group != without]
        return float(self.sums[chosen].sum() / self.counts[chosen].sum())


def token_masks(input_ids: Tensor, attention_mask: Tensor, image_token_id: int) -> dict[str, Tensor]:
    """Where in [B, S] image tokens are, and text tokens: all real ones behind a row's last image token.

    Raises:
        DataError: A row has no image token, or no text behind it.
    """
    vision = input_ids == image_token_id
    behind = vision.flip(1).cumsum(1).flip(1) == 0  # no image token here or further on
    masks = {"vision": vision, "text": behind & attention_mask.bool()}
    for name, mask in masks.items():
        if not bool(mask.any(1).all()):
            raise DataError(
                f"row {int((~mask.any(1)).nonzero()[0])} of the batch has no {name} token: a pair is an image with a text behind it"
            )
    return masks


@torch.no_grad()
def _layer_states(model: LlavaForConditionalGeneration, batch: PairBatch, layers: Sequence[int]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Hidden states [B, S, H] behind some layers (1 to L), and where the modalities are."""
    output: Any = model(**batch.inputs, output_hidden_states=True, use_cache=False, logits_to_keep=1)
    masks = token_masks(batch.inputs["input_ids"], batch.inputs["attention_mask"], model.config.image_token_id)
    return [output.hidden_states[layer] for layer in layers], masks


def _measure_norms(
    model: LlavaForConditionalGeneration, batches: Iterable[PairBatch], layers: Sequence[int], groups: int
) -> list[dict[str, _Norms]]:
    """First pass: norms of all tokens, by layer and modality."""
    found: list[dict[str, list[list[Tensor]]]] = [{name: [[] for _ in range(groups)] for name in MODALITIES} for _ in layers]
    for batch in batches:
        states, masks = _layer_states(model, batch, layers)
        for place, state in enumerate(states):
            norms = state.float().norm(dim=-1).cpu()  # [B, S]
            for name, mask in masks.items():
                for row, group in enumerate(batch.groups):
                    found[place][name][group].append(norms[row][mask[row].cpu()])
    return [{name: _norms(parts) for name, parts in of_layer.items()} for of_layer in found]


def _norms(parts: Sequence[Sequence[Tensor]]) -> _Norms:
    groups = [torch.cat(list(part)).double() if part else torch.zeros(0, dtype=torch.float64) for part in parts]
    every = torch.cat(groups)
    if not bool(torch.isfinite(every).all()):
        raise DataError("hidden states are not finite: the model overflows in this precision; try --dtype fp32")
    median, limit = float(every.median()), SIGMAS * float(every.std())
    outliers = int(((every - median).abs() > limit).sum())
    sums, counts = torch.stack([group.sum() for group in groups]), torch.tensor([float(len(group)) for group in groups])
    return _Norms(sums, counts, median, limit, outliers)


def modality_integration_rate(
    model: LlavaForConditionalGeneration, batches: Callable[[], Iterable[PairBatch]], groups: int = 1, memory: float = 4e9
) -> Mir:
    """Compute MIR; the pairs go through the model once for the norms, and then once for each set of layers that fits into `memory`.

    Args:
        model: Any LLaVA, in eval mode.
        batches: Gives the same batches of pairs every time it is called.
        groups: G, parts of the pairs, dealt by who makes the batches; leaving out each in turn gives the standard error. 1 is none.
        memory: Bytes for second moments: 16 G H^2 for each layer.

    Raises:
        DataError: A pair has no image or no text, or hidden states are not finite.
    """
    width, depth = model.config.text_config.hidden_size, model.config.text_config.num_hidden_layers
    layers = list(range(1, depth + 1))
    norms = _measure_norms(model, batches(), layers, groups)
    at_once = max(1, int(memory / (16 * groups * width**2)))
    device = model.device if model.device.type in ("cpu", "cuda") else torch.device("cpu")  # others have no float64
    parts: list[LayerGap] = []
    left_out = torch.zeros(groups, dtype=torch.float64)  # the sum over layers without each group
    for begin in range(0, depth, at_once):
        chosen = layers[begin : begin + at_once]
        moments = [{name: Moments(groups, width, device) for name in MODALITIES} for _ in chosen]
        for batch in batches():
            states, masks = _layer_states(model, batch, chosen)
            for place, state in enumerate(states):
                _add_tokens(moments[place], norms[begin + place], state, masks, batch.groups)
        for place, layer in enumerate(chosen):
            parts.append(_gap(layer, moments[place], norms[begin + place]))
            if groups > 1:
                left_out += torch.tensor([_distance(moments[place], norms[begin + place], group)[0] for group in range(groups)])
    value, others = _log(sum(part.distance for part in parts)), [_log(float(total)) for total in left_out]
    mean = sum(others) / groups
    error = (
        math.sqrt((groups - 1) / groups * sum((other - mean) ** 2 for other in others)) if groups > 1 and math.isfinite(mean) else math.nan
    )
    return Mir(value, error, parts)


def _log(total: float) -> float:
    return math.log10(total) if total > 0 else -math.inf


def _add_tokens(
    moments: dict[str, Moments], norms: dict[str, _Norms], state: Tensor, masks: dict[str, Tensor], groups: Sequence[int]
) -> None:
    """Count one batch's tokens [B, S, H] of a layer in, without outliers."""
    lengths = state.float().norm(dim=-1)
    for name, mask in masks.items():
        kept = mask & ((lengths - norms[name].median).abs() <= norms[name].limit)
        for row, group in enumerate(groups):
            moments[name].add(group, state[row][kept[row]])


def _distance(moments: dict[str, Moments], norms: dict[str, _Norms], without: int | None = None) -> tuple[float, float]:
    """F of a layer, and its part of the means. Scaling both sets by a scales F by a^2, so it is done last."""
    (mean_v, cov_v), (mean_t, cov_t) = (moments[name].summary(without) for name in MODALITIES)
    scale = norms["text"].mean(without) ** -2
    distance, of_means = frechet_distance((mean_v, mean_t), (cov_v, cov_t))
    return scale * distance, scale * of_means


def _gap(layer: int, moments: dict[str, Moments], norms: dict[str, _Norms]) -> LayerGap:
    distance, of_means = _distance(moments, norms)
    return LayerGap(
        layer=layer,
        distance=distance,
        of_means=of_means,
        norms={name: norms[name].mean() for name in MODALITIES},
        tokens={name: int(moments[name].counts.sum()) for name in MODALITIES},
        outliers={name: norms[name].outliers for name in MODALITIES},
    )
