"""Retrieval with a Q-Former: cosines of queries and texts, then the matching head over the best k of them.

Letters: N images, M texts, Q queries, E joint width, n image tokens, T text tokens, k re-ranked.

    ITC     the largest cosine over an image's queries, no temperature
    ITM     for the k best of each query: the logit of "yes" (mean over queries) plus the cosine; the others stay behind these

Source: LAVIS, lavis/models/blip2_models/blip2_qformer.py (compute_sim_matrix); k is 128 there. The paper does not mention the sum. Departure:
LAVIS gives all others one score, so that recall beyond k depends on the order of the files.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llm_stage.qformer import QFormer

CELLS = 4_000_000  # scores held at once
RERANKED = 128
BEHIND = -1e6  # score of the first candidate that was not matched


@dataclass(frozen=True)
class Candidates:
    """The best k items of each query, best first.

    Attributes:
        index: [queries, k].
        score: [queries, k].
    """

    index: Tensor
    score: Tensor

    def ranks(self, right: Sequence[Sequence[int]], items: int) -> np.ndarray:
        """Give the place of each query's first right item (0 is first); `items` where none is among the k.

        A wrong item with the very same score counts as being before it.

        Args:
            right: Items that are right, by query.
            items: How many there are in all.
        """
        places = np.full(len(self.index), items, dtype=np.int64)
        for query, (index, score) in enumerate(zip(self.index.tolist(), self.score.tolist(), strict=True)):
            wanted = set(right[query])
            best = max((s for i, s in zip(index, score, strict=True) if i in wanted), default=None)
            if best is not None:
                places[query] = sum(s >= best for i, s in zip(index, score, strict=True) if i not in wanted)
        return places


def itc_scores(images: Tensor, texts: Tensor) -> Tensor:
    """Give cosines [N, M] of images [N, Q, E] and texts [M, E], unit rows: the best query counts."""
    size = max(1, CELLS // max(1, len(texts) * images.shape[1]))
    return torch.cat([torch.einsum("nqe,me->nmq", images[i : i + size], texts).amax(dim=-1) for i in range(0, len(images), size)])


def best_by_itc(images: Tensor, texts: Tensor, k: int) -> tuple[Candidates, Candidates]:
    """Give the best k texts of each image, and the best k images of each text (all, where there are fewer), in bounded memory."""
    return _best(lambda rows: itc_scores(images[rows], texts), len(images), len(texts), k), _best(
        lambda rows: itc_scores(images, texts[rows]).T, len(texts), len(images), k
    )


def _best(scores: Callable[[slice], Tensor], queries: int, items: int, k: int) -> Candidates:
    size = max(1, CELLS // items)
    found = [scores(slice(start, start + size)).topk(min(k, items), dim=1) for start in range(0, queries, size)]
    return Candidates(torch.cat([part.indices for part in found]), torch.cat([part.values for part in found]))


@torch.no_grad()
def reranked_texts(
    model: QFormer, states: Callable[[int], Tensor], ids: Tensor, mask: Tensor, found: Candidates, row: int, k: int, batch_size: int = 256
) -> Candidates:
    """Re-rank the first k texts of one image.

    Args:
        model: The Q-Former, asleep.
        states: Image number to its normalised tokens [n, W] (`QFormer.image_states`), on the model's device.
        ids: All texts [M, T].
        mask: [M, T].
        found: The candidates of each image.
        row: The image.
        k: How many of its candidates are matched; the others stay behind them, by their cosine.
        batch_size: Texts matched at once; the image's keys and values are computed once for them.

    Returns:
        All candidates of this image, [1, candidates].
    """
    image, items = states(row)[None], found.index[row, :k]
    logits = [model.match(image, *_trimmed(ids[some], mask[some]))[:, 1] for some in items.split(batch_size)]
    return _reranked(found, row, torch.cat(logits))


@torch.no_grad()
def reranked_images(
    model: QFormer, states: Callable[[int], Tensor], ids: Tensor, mask: Tensor, found: Candidates, row: int, k: int, batch_size: int = 64
) -> Candidates:
    """Re-rank the first k images of one text; see `reranked_texts`. `states` gives [n, W] for each candidate."""
    logits = []
    for some in found.index[row, :k].split(batch_size):
        image = torch.stack([states(int(item)) for item in some])
        words = _trimmed(ids[row].expand(len(some), -1), mask[row].expand(len(some), -1))
        logits.append(model.match(image, *words)[:, 1])
    return _reranked(found, row, torch.cat(logits))


def _reranked(found: Candidates, row: int, logits: Tensor) -> Candidates:
    k = len(logits)
    scores = logits.float().to(found.score.device) + found.score[row, :k]
    order = scores.argsort(descending=True, stable=True)
    index = torch.cat([found.index[row, :k][order], found.index[row, k:]])
    # Behind the matched ones the cosine's order counts, and no tie is to be seen.
    rest = torch.arange(len(index) - k, device=scores.device, dtype=scores.dtype)
    return Candidates(index[None], torch.cat([scores[order], BEHIND - rest])[None])


def _trimmed(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Cut off the padding that all have."""
    length = int(mask.sum(dim=1).max())
    return ids[:, :length], mask[:, :length]
