"""Image tokens that several passes of a Q-Former read: each layer's keys and values of an image are computed once.

    images = ImageTokens(states)                     # [U, n, W]
    reading = Reading(images)                        # row r reads image r
    reading = Reading(images, rows)                  # row r reads image rows[r]: the 3 B rows of matching know B images
    reading = Reading(ImageTokens(states[:1]))       # every row reads the one image there is

Letters: U images, R rows of a pass, n image tokens of width W, Q queries, D width of the Q-Former.

Of a stage-1 step in front of ViT-g's tokens, keys and values of images are a third of the operations when each pass computes its own; matching
alone would compute those of each image three times.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerMultiHeadAttention


class ImageTokens:
    """Normalised tokens of images, and what the layers made of them so far. It lives as long as a step: what it keeps is part of the graph.

    Args:
        states: [U, n, W].
    """

    def __init__(self, states: Tensor) -> None:
        self.states = states
        self._kept: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def keys_and_values(self, attention: "ImageAttention") -> tuple[Tensor, Tensor]:
        """Give a layer's keys and values [U, n, D]."""
        if attention not in self._kept:
            self._kept[attention] = attention.key(self.states), attention.value(self.states)
        return self._kept[attention]


@dataclass(frozen=True)
class Reading:
    """Which image each row of a pass reads.

    Attributes:
        images: One set of images, or several, counted through.
        rows: Image of each row [R]; None: row r reads image r, or all read the only one.
    """

    images: ImageTokens | Sequence[ImageTokens]
    rows: Tensor | None = None

    @property
    def parts(self) -> Sequence[ImageTokens]:
        """The sets of images."""
        return [self.images] if isinstance(self.images, ImageTokens) else self.images

    def keys_and_values(self, attention: "ImageAttention") -> tuple[Tensor, Tensor]:
        """Give the rows' keys and values [R or 1, n, D]."""
        found = [part.keys_and_values(attention) for part in self.parts]
        keys, values = found[0] if len(found) == 1 else (torch.cat(some) for some in zip(*found, strict=True))
        return (keys, values) if self.rows is None else (keys[self.rows], values[self.rows])


class ImageAttention(Blip2QFormerMultiHeadAttention):
    """The cross-attention of transformers' Q-Former, its weights called the same, for images that come as a `Reading`."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        encoder_hidden_states: Any = None,
        encoder_attention_mask: Any = None,
        *,
        reading: Reading,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """Let queries [R, Q, D] read their images: [R, Q, D]. Images have no padding, so no mask is looked at."""
        keys, values = reading.keys_and_values(self)
        query = self.query(hidden_states)
        if len(keys) == 1:  # one image for all rows: they are as one row with R Q queries
            query = query.flatten(0, 1)[None]
        query, keys, values = (part.unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2) for part in (query, keys, values))
        found = F.scaled_dot_product_attention(query, keys, values, dropout_p=self.attention_dropout if self.training else 0.0)
        return found.transpose(1, 2).reshape(hidden_states.shape), None
