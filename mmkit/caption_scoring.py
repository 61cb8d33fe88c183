"""CIDEr-D, BLEU and ROUGE-L of captions that are cut into words, equal to pycocoevalcap's figures on the same words.

Nothing here cuts text (`mmkit.caption_tokens`) or averages: CIDEr and ROUGE give a figure an image, BLEU gives counts that are summed over
images, so that `stats` can put intervals on them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mmkit.errors import DataError

Words = Sequence[str]
ORDERS = 4
_SIGMA = 6.0  # of the penalty on a difference in length
_BETA = 1.2  # weight of recall in ROUGE-L
_TINY, _SMALL = 1e-15, 1e-9  # as in the official BLEU, where a count of 0 must not end the product


def ngrams(words: Words, order: int) -> Counter[tuple[str, ...]]:
    """How often each run of `order` words stands in a caption."""
    return Counter(tuple(words[i : i + order]) for i in range(len(words) - order + 1))


def cider_d(given: Sequence[Words], references: Sequence[Sequence[Words]]) -> list[float]:
    """CIDEr-D of each image's caption; their mean is the corpus figure.

    Args:
        given: One caption an image, as words.
        references: Captions by people for each image, in the same order.

    Returns:
        From 0 to 10 each. Weights are log(images / images whose references hold the n-gram): they hang on which images are in the set, and
        for one image all are 0.

    Raises:
        DataError: Counts differ, or an image has no reference.

    Source: CIDEr: Consensus-based Image Description Evaluation (Vedantam et al., 2015), section 4 and the D form of its appendix;
        length is counted in bigrams, as in pycocoevalcap.
    """
    _check(given, references)
    held: Counter[tuple[str, ...]] = Counter()
    for texts in references:
        held.update({gram for text in texts for order in range(1, ORDERS + 1) for gram in ngrams(text, order)})
    images = math.log(len(references)) if references else 0.0
    scores = []
    for caption, texts in zip(given, references, strict=True):
        own = [_weighted(caption, order, held, images) for order in range(1, ORDERS + 1)]
        total = 0.0
        for text in texts:
            other = [_weighted(text, order, held, images) for order in range(1, ORDERS + 1)]
            apart = max(len(caption) - 1, 0) - max(len(text) - 1, 0)
            likeness = sum(_clipped_cosine(mine, theirs) for mine, theirs in zip(own, other, strict=True))
            total += likeness / ORDERS * math.exp(-(apart**2) / (2 * _SIGMA**2))
        scores.append(10 * total / len(texts))
    return scores


def _weighted(words: Words, order: int, held: Counter[tuple[str, ...]], images: float) -> dict[tuple[str, ...], float]:
    """Counts of n-grams times the logarithm of their rarity."""
    return {gram: count * (images - math.log(max(1.0, held[gram]))) for gram, count in ngrams(words, order).items()}


def _clipped_cosine(mine: dict[tuple[str, ...], float], theirs: dict[tuple[str, ...], float]) -> float:
    """Cosine of two weighted counts in which saying an n-gram more often than the reference gains nothing."""
    length = math.sqrt(sum(v * v for v in mine.values())) * math.sqrt(sum(v * v for v in theirs.values()))
    return sum(min(value, theirs[gram]) * theirs[gram] for gram, value in mine.items() if gram in theirs) / length if length else 0.0


@dataclass(frozen=True)
class BleuCounts:
    """What BLEU adds up over a corpus.

    Attributes:
        matches: N-grams of order 1 to 4 that a reference has too, each at most as often as one reference has it.
        guesses: N-grams of each order in the caption.
        length: Words of the caption.
        reference_length: Words of the reference nearest in length, the shorter of two.
    """

    matches: tuple[int, ...]
    guesses: tuple[int, ...]
    length: int
    reference_length: int

    @staticmethod
    def total(counts: Iterable[BleuCounts]) -> BleuCounts:
        """The sum over images."""
        rows = list(counts)
        matches, guesses = (
            tuple(sum(column) for column in zip(*table, strict=True)) for table in ([r.matches for r in rows], [r.guesses for r in rows])
        )
        return BleuCounts(matches, guesses, sum(row.length for row in rows), sum(row.reference_length for row in rows))


def bleu_counts(given: Words, references: Sequence[Words]) -> BleuCounts:
    """Counts of one image."""
    matches, guesses = [], []
    for order in range(1, ORDERS + 1):
        most: Counter[tuple[str, ...]] = Counter()
        for text in references:
            most |= ngrams(text, order)
        own = ngrams(given, order)
        matches.append(sum((own & most).values()))
        guesses.append(max(0, len(given) - order + 1))
    nearest = min((abs(len(text) - len(given)), len(text)) for text in references)[1]
    return BleuCounts(tuple(matches), tuple(guesses), len(given), nearest)


def bleu_of(counts: BleuCounts) -> list[float]:
    """BLEU-1 to BLEU-4 of summed counts, fractions.

    Source: BLEU (Papineni et al., 2002), with the closest reference length of pycocoevalcap.
    """
    ratio = (counts.length + _TINY) / (counts.reference_length + _SMALL)
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    scores, product = [], 1.0
    for order, (right, guessed) in enumerate(zip(counts.matches, counts.guesses, strict=True), 1):
        product *= (right + _TINY) / (guessed + _SMALL)
        scores.append(product ** (1 / order) * brevity)
    return scores


def rouge_l(given: Words, references: Sequence[Words]) -> float:
    """ROUGE-L of one image: the F-measure of the best precision and the best recall over its references, recall weighted by 1.2.

    Source: ROUGE (Lin, 2004), section 3; pycocoevalcap takes the two maxima from different references where they fall so.
    """
    precision = recall = 0.0
    for text in references:
        common = _common(text, given)
        precision = max(precision, common / len(given) if given else 0.0)
        recall = max(recall, common / len(text) if text else 0.0)
    if not precision or not recall:
        return 0.0
    return (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)


def _common(first: Words, second: Words) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(second) + 1)
    for a in first:
        diagonal = 0
        for j, b in enumerate(second, 1):
            diagonal, row[j] = row[j], diagonal + 1 if a == b else max(row[j], row[j - 1])
    return row[-1]


def _check(given: Sequence[Words], references: Sequence[Sequence[Words]]) -> None:
    if len(given) != len(references):
        raise DataError(f"{len(given)} captions for {len(references)} images: one an image, in the same order, is right")
    bare = next((number for number, texts in enumerate(references) if not texts), None)
    if bare is not None:
        raise DataError(f"image {bare} has no reference caption")
