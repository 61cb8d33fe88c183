"""A captioner with soft attention, after Show, Attend and Tell: an LSTM that looks at a 14 x 14 map of the picture for each word.

A target holds "tokens" int64 [k, T]: k captions as <start> words <end> <pad>..., padded to any length. The map may be the encoder's or
already pooled (`pool`), which is what a cache of features keeps: five captions share it.

Source: ViSFT (caption head of mmf/models/visft); Show, Attend and Tell (Xu et al., 2015), sections 3.1 and 4.2.1.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from encoders.heads.base import Head, HeadConfig, Prediction, Targets, Terms, divisors, positive
from encoders.vocabulary import Vocabulary
from mmkit.errors import DataError


@dataclass(frozen=True)
class CaptionConfig(HeadConfig):
    """Sizes of the caption head; the defaults are the paper's.

    Attributes:
        width: C of the feature map.
        words: The vocabulary's words; special tokens are added.
        attention_width, word_width, hidden_width: Channels.
        pool: Side of the map that is looked at.
        dropout: Before the words, in training.
        attention_weight: Of the second loss term.
    """

    width: int
    words: tuple[str, ...]
    attention_width: int = 384
    word_width: int = 384
    hidden_width: int = 384
    pool: int = 14
    dropout: float = 0.5
    attention_weight: float = 1.0

    def __post_init__(self) -> None:
        positive(self, "width", "attention_width", "word_width", "hidden_width", "pool")


class CaptionHead(Head):
    """Show, Attend and Tell: 12,956,691 parameters behind ViT-G with 9,490 tokens."""

    task = "caption"
    mean_over = ("tokens", "captions")
    config: CaptionConfig

    def __init__(self, config: CaptionConfig) -> None:
        super().__init__(config)
        self.vocabulary = Vocabulary(config.words)
        size, hidden = len(self.vocabulary), config.hidden_width
        self.feature_attention = nn.Linear(config.width, config.attention_width)
        self.state_attention = nn.Linear(hidden, config.attention_width)
        self.attention = nn.Linear(config.attention_width, 1)
        self.embedding = nn.Embedding(size, config.word_width)
        self.cell = nn.LSTMCell(config.word_width + config.width, hidden)
        self.initial_h = nn.Linear(config.width, hidden)
        self.initial_c = nn.Linear(config.width, hidden)
        self.gate = nn.Linear(hidden, config.width)
        self.word_predictor = nn.Linear(hidden, size)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        nn.init.uniform_(self.word_predictor.weight, -0.1, 0.1)
        nn.init.zeros_(self.word_predictor.bias)

    def pool(self, feature_map: Tensor) -> Tensor:
        """Average a map [B, C, h, w] to [B, C, pool, pool]; one of that size stays as it is."""
        return F.adaptive_avg_pool2d(feature_map, self.config.pool)

    def start(self, feature_map: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Give the places [B, P, C], what attention reads of them [B, P, A], and the LSTM's first h and c [B, H]."""
        places = self.pool(feature_map).flatten(2).transpose(1, 2)
        mean = places.mean(1)
        return places, self.feature_attention(places), self.initial_h(mean), self.initial_c(mean)

    def step(self, word: Tensor, places: Tensor, keys: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Read one word [B] and look at the picture.

        Returns:
            The attention [B, P], and the new h and c [B, H].
        """
        scores = self.attention(F.relu(keys + self.state_attention(h)[:, None])).squeeze(2)
        alpha = scores.softmax(1)  # [B, P]
        context = (alpha[:, None].to(places.dtype) @ places).squeeze(1) * self.gate(h).sigmoid()  # [B, C]
        h, c = self.cell(torch.cat([self.embedding(word), context], dim=1), (h, c))
        return alpha, h, c

    def outputs(self, feature_map: Tensor, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Predict each next word of given captions.

        Args:
            feature_map: [B, C, h, w], one for each caption.
            tokens: int64 [B, T], <start> first.
            lengths: With <start> and <end> [B].

        Returns:
            Logits [B, S, V] and attention [B, S, P], S the longest caption less one; both are 0 where a caption has ended.
        """
        places, keys, h, c = self.start(feature_map)
        logits, alphas = [], []
        for position in range(int(lengths.max()) - 1):
            alpha, h, c = self.step(tokens[:, position], places, keys, h, c)
            going = (lengths - 1 > position)[:, None]
            logits.append(self.word_predictor(F.dropout(h, self.config.dropout, self.training)) * going)
            alphas.append(alpha * going)
        return torch.stack(logits, dim=1), torch.stack(alphas, dim=1)

    def _captions(self, targets: Targets) -> tuple[Tensor, Tensor, Tensor]:
        """Give all captions [N, T], their lengths [N] and the image of each [N].

        Raises:
            DataError: A caption does not begin with <start> or has no <end>.
        """
        longest = max((target["tokens"].shape[1] for target in targets), default=0)
        pad = self.vocabulary.pad
        tokens = torch.cat([F.pad(target["tokens"], (0, longest - target["tokens"].shape[1]), value=pad) for target in targets])
        owner = torch.cat([torch.full((len(target["tokens"]),), image) for image, target in enumerate(targets)])
        ends = tokens == self.vocabulary.end
        if len(tokens) and not (bool(ends.any(1).all()) and bool((tokens[:, 0] == self.vocabulary.start).all())):
            raise DataError(f"a caption must be <start> ({self.vocabulary.start}) words <end> ({self.vocabulary.end}); one is not")
        if len(tokens) and int(tokens.max()) >= len(self.vocabulary):
            raise DataError(f"token {int(tokens.max())} in a caption; the head knows {len(self.vocabulary)}: is this its own vocabulary?")
        return tokens, ends.int().argmax(1) + 1, owner

    def counts(self, targets: Targets) -> dict[str, float]:
        """Count words to predict, and captions."""
        tokens, lengths, _ = self._captions(targets)
        return {"tokens": float((lengths - 1).sum()), "captions": float(len(tokens))}

    def forward(self, feature_map: Tensor, targets: Targets, counts: Mapping[str, float] | None = None) -> tuple[Tensor, Terms]:
        """Give the loss; see `Head.forward`.

        Returns:
            The loss [], and "words" (cross-entropy, mean over words) and "attention" (how far each place is from being looked at once).
        """
        feature_map = self.check(feature_map, targets)
        tokens, lengths, owner = (part.to(feature_map.device) for part in self._captions(targets))
        counts = divisors(self.counts(targets)) if counts is None else counts
        if not len(tokens):
            nothing = feature_map.sum() * 0.0
            return nothing, {"words": nothing, "attention": nothing}
        logits, alphas = self.outputs(self.pool(feature_map)[owner], tokens, lengths)
        wanted = tokens[:, 1 : logits.shape[1] + 1]
        going = torch.arange(logits.shape[1], device=wanted.device) < (lengths - 1)[:, None]
        words = F.cross_entropy(logits[going].float(), wanted[going], reduction="sum") / counts["tokens"]
        attention = ((1 - alphas.float().sum(1)) ** 2).mean(1).sum() / counts["captions"]
        return words + self.config.attention_weight * attention, {"words": words, "attention": attention}

    @torch.no_grad()
    def predict(self, feature_map: Tensor, targets: Targets | None = None, **settings: Any) -> list[Prediction]:
        """Write a caption, the likeliest word each time; the image's neighbours in the batch do not matter.

        Args:
            feature_map: [B, C, h, w].
            targets: Not read.
            settings: `max_words` (30).

        Returns:
            For each image "caption" (words joined by blanks) and "tokens" int64 [n], without special tokens.
        """
        feature_map = self.check(feature_map)
        places, keys, h, c = self.start(feature_map)
        v = self.vocabulary
        word = torch.full((len(feature_map),), v.start, device=feature_map.device)
        ended, written = torch.zeros_like(word, dtype=torch.bool), []
        for _ in range(settings.get("max_words", 30)):
            _, h, c = self.step(word, places, keys, h, c)
            logits = self.word_predictor(h)
            logits[:, [v.pad, v.start, v.unknown]] = -torch.inf
            word = logits.argmax(1)
            ended = ended | (word == v.end)
            written.append(torch.where(ended, v.pad, word))
            if bool(ended.all()):
                break
        rows = torch.stack(written, dim=1)
        return [{"caption": v.decode(row.tolist()), "tokens": row[row != v.pad]} for row in rows]
