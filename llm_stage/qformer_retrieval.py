"""Retrieval with a Q-Former: cosines of queries and texts, then the matching head over the best k of them.

Letters: N images, M texts, Q queries, E joint width, n image tokens, T text tokens, k re-ranked.

    ITC     the largest cosine over an image's queries, no temperature
    ITM     for the k best of each query: the logit of "yes" (mean over queries) plus the cosine; the others stay behind these

Matching goes image by image, whichever way a pair is sought: its keys and values are computed once for all its texts.

Source: LAVIS, lavis/models/blip2_models/blip2_qformer.py (compute_sim_matrix); k is 128 there. The paper does not mention the sum. Departure:
LAVIS gives all others one score, so that recall beyond k depends on the order of the files.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llm_stage.qformer import QFormer
from llm_stage.qformer_images import ImageTokens, Reading
from mmkit.errors import DataError

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


def sought(by_image: Candidates, by_text: Candidates, k: int) -> list[Tensor]:
    """Give the texts to match with each image: its own best k, and those that have it among theirs; a pair sought both ways is one pair.

    Args:
        by_image: Candidates of each image.
        by_text: Candidates of each text.
        k: How many of each count.
    """
    own, back = by_image.index[:, :k], by_text.index[:, :k]
    images = torch.cat([torch.arange(len(own), device=own.device).repeat_interleave(own.shape[1]), back.flatten()])
    texts = torch.cat([own.flatten(), torch.arange(len(back), device=own.device).repeat_interleave(back.shape[1])])
    pairs = torch.unique(images * len(back) + texts)  # in order: image by image
    counts = torch.bincount(pairs // len(back), minlength=len(own))
    return list((pairs % len(back)).split(counts.tolist()))


@torch.no_grad()
def match_texts(model: QFormer, states: Tensor, ids: Tensor, mask: Tensor, texts: Tensor, batch_size: int = 256) -> Tensor:
    """Match one image with some texts; its keys and values are computed once, and texts of like length stand together.

    Args:
        model: The Q-Former, asleep.
        states: The image's normalised tokens [n, W] (`QFormer.image_states`).
        ids: All texts [M, T].
        mask: [M, T].
        texts: Which of them [P].
        batch_size: Texts matched at once.

    Returns:
        The logit of "yes" of each [P], in float32.
    """
    reading = Reading(ImageTokens(states[None]))
    lengths = mask[texts].sum(dim=1)
    order = lengths.argsort(stable=True)
    logits = torch.empty(len(texts), device=states.device)
    for some in order.split(batch_size) if len(texts) else ():
        longest, rows = int(lengths[some].max()), texts[some]
        logits[some] = model.match(reading, ids[rows, :longest], mask[rows, :longest])[:, 1].float()
    return logits


class Matches:
    """Logits of the pairs that were matched.

    Args:
        texts: Texts of each image, as `sought` gives them: in rising order.
        logits: Their logits.
        count: Number of texts in all.
    """

    def __init__(self, texts: Sequence[Tensor], logits: Sequence[Tensor], count: int) -> None:
        self.count = count
        self.pairs = torch.cat([image * count + some for image, some in enumerate(texts)])
        self.logits = torch.cat(list(logits))

    def rerank(self, found: Candidates, k: int, of_images: bool) -> Candidates:
        """Put the first k candidates of each query in the order of logit plus cosine; the others stay behind them, by their cosine.

        Args:
            found: The candidates.
            k: How many of them were matched.
            of_images: Queries are images and candidates texts; else the reverse.

        Raises:
            DataError: A pair was not matched.
        """
        rows, index = torch.arange(len(found.index), device=found.index.device)[:, None], found.index[:, :k]
        pairs = rows * self.count + index if of_images else index * self.count + rows
        places = torch.searchsorted(self.pairs, pairs).clamp_max(len(self.pairs) - 1)
        if not torch.equal(self.pairs[places], pairs):
            raise DataError(
                "some of the best pairs by contrast were not matched: other pairs were the best at an earlier start; --overwrite"
            )
        scores = self.logits[places] + found.score[:, :k]
        order = scores.argsort(dim=1, descending=True, stable=True)
        # Behind the matched ones the cosine's order counts, and no tie is to be seen.
        rest = torch.arange(found.index.shape[1] - index.shape[1], device=scores.device, dtype=scores.dtype)
        behind = (BEHIND - rest).expand(len(index), -1)
        return Candidates(
            torch.cat([index.gather(1, order), found.index[:, k:]], dim=1), torch.cat([scores.gather(1, order), behind], dim=1)
        )
