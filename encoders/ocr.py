"""A reading head for frozen patch tokens: which letters it knows, what it is taught, what it says.

Letters: B images, N patches, D width of the encoder's tokens, W width of the head, T = 2 + longest word.

Source: ViSFT leaves size, alphabet and steps of its OCR probe open; the alphabet, the 25 letters and the test on lower-case alphanumerics
are ViTSTR's. The head (one query for each place of the word, four layers of attention to the patches) is ours.
"""

import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IGNORE_INDEX = -100
LETTERS = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"  # 94
GO, STOP = 0, 1  # [GO] stands before the word and is never taught; [s] ends it
CLASSES = len(LETTERS) + 2
LONGEST = 25
_ID = {letter: number + 2 for number, letter in enumerate(LETTERS)}


def known_letters(word: str) -> str:
    """A word without what is in no alphabet of this head."""
    return "".join(letter for letter in word if letter in _ID)


def normalised(word: str) -> str:
    """Lower-case letters and digits alone: how words are compared in a test."""
    return re.sub("[^0-9a-z]", "", word.lower())


def labels_of(words: Sequence[str], longest: int = LONGEST) -> Tensor:
    """What a head is taught: the word behind [GO], then [s]; other places are IGNORE_INDEX.

    Returns:
        [B, 2 + longest].

    Raises:
        ValueError: A word is empty, too long or has a letter outside the alphabet.
    """
    labels = torch.full((len(words), longest + 2), IGNORE_INDEX)
    for row, word in enumerate(words):
        if not word or len(word) > longest or word != known_letters(word):
            raise ValueError(f"'{word}' is no word of 1 to {longest} letters of the alphabet")
        labels[row, 1 : len(word) + 2] = torch.tensor([*(_ID[letter] for letter in word), STOP])
    return labels


def spelt(logits: Tensor) -> list[str]:
    """Read words off logits [B, T, 96]: the likeliest letter of each place up to the first [s]."""
    words = []
    for row in logits[:, 1:].argmax(dim=-1).tolist():
        end = row.index(STOP) if STOP in row else len(row)
        words.append("".join(LETTERS[number - 2] for number in row[:end] if number > STOP))
    return words


class ReadingHead(nn.Module):
    """Patch tokens -> a linear layer -> queries that attend to them through transformer layers -> letters.

    The tokens are layer-normalised without weights first, so that encoders of another scale are no easier or harder to learn from, and get
    a learnt position (from 0).

    Args:
        token_width: D.
        num_patches: N.
        width: W.
        layers, heads, dropout: Of the transformer; its inner width is 4 W.
        longest: Letters of the longest word.
    """

    def __init__(
        self,
        token_width: int,
        num_patches: int,
        width: int = 512,
        layers: int = 4,
        heads: int = 8,
        dropout: float = 0.1,
        longest: int = LONGEST,
    ) -> None:
        super().__init__()
        self.token_width = token_width
        self.project = nn.Linear(token_width, width)
        self.positions = nn.Parameter(torch.zeros(1, num_patches, width))
        self.queries = nn.Parameter(torch.randn(1, longest + 2, width) * 0.02)
        layer = nn.TransformerDecoderLayer(width, heads, 4 * width, dropout, "gelu", batch_first=True, norm_first=True)
        self.decoder = nn.TransformerDecoder(layer, layers, norm=nn.LayerNorm(width))
        self.letters = nn.Linear(width, CLASSES)

    def forward(self, patch_tokens: Tensor) -> Tensor:
        """Patch tokens [B, N, D] to logits [B, T, 96]."""
        memory = self.project(F.layer_norm(patch_tokens.float(), (self.token_width,))) + self.positions  # [B, N, W]
        words = self.decoder(self.queries.expand(len(memory), -1, -1), memory)  # [B, T, W]
        logits: Tensor = self.letters(words)
        return logits


def reading_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy over the letters and the ends of a batch []; logits [B, T, 96], labels [B, T]."""
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX)
