"""Panoptic quality: how well segments are found (RQ) and how well they are drawn (SQ); PQ is their product.

A found segment is a true one's if they are of one category and share more than half of their union; then no other can be. What lies mostly on
void, or on a crowd of its category, is neither right nor wrong.

Source: Panoptic Segmentation (Kirillov et al., 2019), section 4; the rules for void and crowds as in COCO's panoptic evaluation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

MATCH = 0.5  # of the union; above it a match is the only one
IGNORED = 0.5  # of a found segment on void or a crowd of its category


@dataclass
class Tally:
    """One category's counts: the sum of its matches' overlaps, matches, wrong finds, misses."""

    overlap: float = 0.0
    matched: int = 0
    wrong: int = 0
    missed: int = 0

    def add(self, other: Tally) -> None:
        """Add another image's."""
        self.overlap += other.overlap
        self.matched += other.matched
        self.wrong += other.wrong
        self.missed += other.missed


def tally(
    truth: np.ndarray, true_segments: Mapping[int, int], crowds: Mapping[int, int], found: np.ndarray, found_segments: Mapping[int, int]
) -> dict[int, Tally]:
    """Compare one image's segments.

    Args:
        truth: True segment ids [height, width]; 0 is void.
        true_segments: Category of each true segment that is no crowd.
        crowds: Category of each crowd.
        found: Found segment ids [height, width]; 0 is nothing.
        found_segments: Category of each.

    Returns:
        The counts of each category that occurs.
    """
    pairs, sizes = np.unique(np.stack([truth.ravel(), found.ravel()]), axis=1, return_counts=True)
    shared = {(int(a), int(b)): int(size) for (a, b), size in zip(pairs.T, sizes, strict=True)}
    area_true = {int(a): int(size) for a, size in zip(*np.unique(truth, return_counts=True), strict=True)}
    area_found = {int(b): int(size) for b, size in zip(*np.unique(found, return_counts=True), strict=True)}
    counts: dict[int, Tally] = {}
    matched: set[tuple[str, int]] = set()
    for (a, b), size in shared.items():
        if a in true_segments and b in found_segments and true_segments[a] == found_segments[b]:
            union = area_true[a] + area_found[b] - size - shared.get((0, b), 0)
            if size / union > MATCH:
                own = counts.setdefault(true_segments[a], Tally())
                own.matched, own.overlap = own.matched + 1, own.overlap + size / union
                matched |= {("true", a), ("found", b)}
    for a, category in true_segments.items():
        if ("true", a) not in matched:
            counts.setdefault(category, Tally()).missed += 1
    for b, category in found_segments.items():
        if ("found", b) not in matched and area_found.get(b):
            ignored = shared.get((0, b), 0) + sum(shared.get((crowd, b), 0) for crowd, of in crowds.items() if of == category)
            if ignored / area_found[b] <= IGNORED:
                counts.setdefault(category, Tally()).wrong += 1
    return counts


def panoptic_quality(images: Iterable[Mapping[int, Tally]], things: Mapping[int, bool]) -> dict[str, float]:
    """Average over the categories that occur, percent.

    Args:
        images: `tally` of each.
        things: Whether each category is a thing.

    Returns:
        "pq", "sq", "rq", and "pq_things" and "pq_stuff" where there are such categories.
    """
    total: dict[int, Tally] = {}
    for image in images:
        for category, counts in image.items():
            total.setdefault(category, Tally()).add(counts)
    scores = {category: _of(counts) for category, counts in total.items()}
    kinds = {"things": [c for c in scores if things[c]], "stuff": [c for c in scores if not things[c]]}
    found = {name: _mean([scores[c][place] for c in scores]) for place, name in enumerate(("pq", "sq", "rq"))}
    return found | {f"pq_{kind}": _mean([scores[c][0] for c in chosen]) for kind, chosen in kinds.items() if chosen}


def _of(counts: Tally) -> tuple[float, float, float]:
    drawn = counts.overlap / counts.matched if counts.matched else 0.0
    recognised = counts.matched / (counts.matched + counts.wrong / 2 + counts.missed / 2) if counts.matched else 0.0
    return drawn * recognised, drawn, recognised


def _mean(values: Sequence[float]) -> float:
    return round(100 * sum(values) / len(values), 4) if values else 0.0
