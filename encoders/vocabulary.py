"""The words a captioner can write: counted in captions, kept with the head."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from mmkit.errors import DataError

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
SPECIAL = ("<unk>", "<start>", "<end>")  # behind the words, in this order; <pad> is in front


def words_of(caption: str) -> list[str]:
    """Split a caption into lower-case words; marks are left out, apostrophes inside a word stay."""
    return _WORD.findall(caption.lower())


class Vocabulary:
    """Words and their numbers: <pad> is 0, words follow from 1, then <unk>, <start>, <end>.

    Args:
        words: In the order of their numbers.

    Raises:
        DataError: There is none, or one is there twice.

    Source: the layout of Show, Attend and Tell's word maps, which the authors' caption heads have too.
    """

    pad = 0

    def __init__(self, words: Sequence[str]) -> None:
        self.words = tuple(words)
        if not self.words or len(set(self.words)) != len(self.words):
            raise DataError(
                f"a vocabulary needs words that differ; this one has {len(self.words)}, {len(set(self.words))} of them different"
            )
        self.number = {word: place for place, word in enumerate(self.words, 1)}
        self.unknown, self.start, self.end = (len(self.words) + place for place in (1, 2, 3))

    def __len__(self) -> int:
        return len(self.words) + 1 + len(SPECIAL)

    @classmethod
    def build(cls, captions: Iterable[str], min_count: int = 5) -> "Vocabulary":
        """Take the words that occur at least `min_count` times, the most frequent first (alphabetically where equal).

        Raises:
            DataError: No word does.
        """
        counts = Counter(word for caption in captions for word in words_of(caption))
        kept = sorted((word for word, count in counts.items() if count >= min_count), key=lambda word: (-counts[word], word))
        if not kept:
            raise DataError(
                f"no word occurs {min_count} times in the captions ({len(counts)} different words, {sum(counts.values())} in all): "
                "give more captions or a smaller min_count"
            )
        return cls(kept)

    def encode(self, caption: str, max_words: int = 50) -> Tensor:
        """Give <start> words <end> as int64 [T]; what is longer than `max_words` is cut.

        Raises:
            DataError: The caption has no word.
        """
        words = words_of(caption)[:max_words]
        if not words:
            raise DataError(f"the caption {caption!r} has no word in it")
        return torch.tensor([self.start, *(self.number.get(word, self.unknown) for word in words), self.end])

    def decode(self, tokens: Iterable[int]) -> str:
        """Join the words of some tokens by blanks; special ones are left out."""
        return " ".join(self.words[token - 1] for token in tokens if 1 <= token <= len(self.words))


def pad_tokens(rows: Sequence[Tensor]) -> Tensor:
    """Stack token rows [T_i] to [k, T], <pad> behind them."""
    if not rows:
        return torch.zeros(0, 2, dtype=torch.int64)
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=Vocabulary.pad)
