"""Image-text retrieval: at which place the first right item stands, in bounded memory.

N images, M captions, each caption belongs to one image. Text retrieval asks with an image and is right when any of its captions is among
the first k; image retrieval asks with a caption and is right when its image is.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmkit.errors import DataError

CELLS = 4_000_000  # scores held at once, 16 MB: 5,000 x 25,000 at once are half a gigabyte
RECALL_AT = (1, 5, 10)


@dataclass(frozen=True)
class RetrievalRanks:
    """Where the first right item stands for each query (0 is first), and what stands first.

    Attributes:
        rank: [Q] int64; a wrong item with the very same score counts as being before it.
        lucky: [Q] int64; the same, such items counted behind. Where the two differ, chance decides in other tools.
        nearest: [Q] int64, index of the first item.
    """

    rank: np.ndarray
    lucky: np.ndarray
    nearest: np.ndarray

    def recall(self, k: int) -> float:
        """Share of the queries with a right item among the first k, in [0, 1]."""
        return float((self.rank < k).mean())


def retrieval_ranks(
    images: Tensor, texts: Tensor, owner: Sequence[int] | Tensor, cells: int = CELLS
) -> tuple[RetrievalRanks, RetrievalRanks]:
    """Rank captions for every image and images for every caption.

    Args:
        images: Image features [N, E], any length, on any device.
        texts: Caption features [M, E].
        owner: Index of each caption's image [M]. Captions need not be in order, nor equally many for each image.
        cells: Scores held at once; the result does not depend on it.

    Returns:
        Text retrieval (N queries) and image retrieval (M queries).

    Raises:
        DataError: Shapes do not fit, an image has no caption, or a feature is not finite.

    Source: the "any" rule of CLIP's and ALIGN's papers, as clip_benchmark's zeroshot_retrieval computes it from a one-hot of every top k.
    """
    index = torch.as_tensor(owner, dtype=torch.int64).cpu()
    _check(images, texts, index)
    images, texts = _unit(images), _unit(texts)
    text_retrieval = _first_right(images, texts, _captions_of(index, len(images)), cells)
    return text_retrieval, _first_right(texts, images, index[:, None], cells)


def _check(images: Tensor, texts: Tensor, owner: Tensor) -> None:
    if images.ndim != 2 or texts.ndim != 2 or images.shape[1] != texts.shape[1] or owner.shape != texts.shape[:1]:
        raise DataError(
            f"images {list(images.shape)}, captions {list(texts.shape)}, owners {list(owner.shape)}: [N, E], [M, E] and [M] were expected"
        )
    if not len(images) or not len(texts):
        raise DataError(f"{len(images)} images and {len(texts)} captions: retrieval needs some of both")
    if int(owner.min()) < 0 or int(owner.max()) >= len(images):
        raise DataError(f"captions belong to images {int(owner.min())} to {int(owner.max())}, and there are {len(images)}")
    without = torch.bincount(owner, minlength=len(images)).eq(0).nonzero().flatten()
    if len(without):
        raise DataError(f"{len(without)} of {len(images)} images have no caption, the first is image {int(without[0])}")
    for name, features in (("image", images), ("caption", texts)):
        broken = (~torch.isfinite(_lengths(features))).nonzero().flatten()
        if len(broken):
            raise DataError(f"{len(broken)} of {len(features)} {name} features are not finite, the first is number {int(broken[0])}")


def _lengths(features: Tensor) -> Tensor:
    return torch.linalg.vector_norm(features, dim=1, dtype=torch.float32)  # [n]; sums without a copy of the table


def _unit(features: Tensor) -> Tensor:
    """Bring rows to length 1; rows that have it are not copied."""
    lengths = _lengths(features)
    if features.dtype == torch.float32 and bool((lengths - 1).abs().max() < 1e-5):
        return features
    return features.float() / lengths.clamp_min(1e-12)[:, None]


def _captions_of(owner: Tensor, images: int) -> Tensor:
    """Captions of each image [N, most captions of one image], filled up with its last one."""
    order = torch.argsort(owner, stable=True)
    counts = torch.bincount(owner, minlength=images)  # [N]
    starts = counts.cumsum(0) - counts
    place = torch.arange(int(counts.max())).expand(images, -1)  # [N, most]
    return order[starts[:, None] + torch.minimum(place, counts[:, None] - 1)]


def _first_right(queries: Tensor, gallery: Tensor, right: Tensor, cells: int) -> RetrievalRanks:
    """Rank of the best right item for each query.

    Args:
        queries: Unit rows [Q, E].
        gallery: Unit rows [G, E].
        right: Indices of each query's right items [Q, R]; an index may occur twice.
    """
    step = max(1, cells // len(gallery))
    rank, lucky, nearest = (np.empty(len(queries), dtype=np.int64) for _ in range(3))
    columns = gallery.T
    for start in range(0, len(queries), step):
        part = slice(start, start + step)
        scores = queries[part] @ columns  # [q, G]
        own = right[part].to(scores.device)
        best = scores.gather(1, own).amax(dim=1, keepdim=True)  # [q, 1]
        nearest[part] = scores.argmax(dim=1).cpu().numpy()
        above = _count(scores > best)
        # The right items leave the table; those that tie with the best of them are then wrong ones.
        scores.scatter_(1, own, -torch.inf)
        rank[part] = _count(scores >= best)
        lucky[part] = above
    return RetrievalRanks(rank, lucky, nearest)


def _count(mask: Tensor) -> np.ndarray:
    """Number of True in each row [q]. numpy's count of bytes is fifty times faster on a CPU than torch's sum of a bool tensor."""
    if mask.device.type == "cpu":
        return np.count_nonzero(mask.numpy(), axis=1)
    return mask.sum(dim=1).cpu().numpy()
