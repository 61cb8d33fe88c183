"""The Q-Former of BLIP-2 in front of any frozen encoder: the network of stage 1.

Letters: B pairs, n image tokens of width W, Q queries, T text tokens, D width of the Q-Former, E width of the joint space.

    features = encoder(...)                                          # [B, n, W], frozen, all tokens, without its final norm in BLIP-2's own way
    image = qformer.image_states(features)                           # [B, n, W], normalised; this norm is trained
    queries = qformer.queries(image)                                 # [B, Q, D]
    queries, logits = qformer.queries_and_caption(image, ids, mask)  # the same queries and the caption's logits, in one pass
    words = qformer.text(ids, mask)                                  # [B, T, D]
    match = qformer.match(image, ids, mask)                          # [B, 2]

The body is transformers' `Blip2QFormerModel`, whose classes train none of this: they have no language head, no temperature and no loss.
Weights are called as there, so that a `Blip2ForImageTextRetrieval` takes them as they are; `temp` and `cls` are what it has no room for.

Source: BLIP-2 (Li et al., 2023), section 3; LAVIS, lavis/models/blip2_models/blip2_qformer.py (what the paper does not say).
"""

from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Blip2QFormerConfig, Blip2QFormerModel
from transformers.models.blip_2.modeling_blip_2 import Blip2TextEmbeddings

from llm_stage.qformer_images import ImageAttention, ImageTokens, Reading
from mmkit.errors import ConfigError, DataError


@dataclass(frozen=True)
class QFormerConfig:
    """Shape of a Q-Former. The defaults are the paper's: BERT-base with 32 queries.

    Attributes:
        encoder_width: W, width of the encoder's tokens.
        width: D.
        layers, heads, feed_forward: Of the body.
        queries: Q.
        cross_attention_every: Layers 0, this, twice this, ... look at the image.
        vocabulary: Words and special tokens.
        positions: Longest text.
        joint_width: E.
        dropout: Of hidden states and attention, in training.
        pad, cls, sep, dec: Ids of the special tokens; a caption is written from `dec` on, and read from `cls` on.
    """

    encoder_width: int
    width: int = 768
    layers: int = 12
    heads: int = 12
    feed_forward: int = 3072
    queries: int = 32
    cross_attention_every: int = 2
    vocabulary: int = 30523
    positions: int = 512
    joint_width: int = 256
    dropout: float = 0.1
    pad: int = 0
    cls: int = 101
    sep: int = 102
    dec: int = 30522

    def __post_init__(self) -> None:
        """Refuse shapes that are none."""
        for name in ("encoder_width", "width", "layers", "heads", "feed_forward", "queries", "cross_attention_every", "joint_width"):
            if getattr(self, name) < 1:
                raise ConfigError(f"a Q-Former with {name} {getattr(self, name)}: 1 or more is right")
        if self.width % self.heads:
            raise ConfigError(f"a Q-Former of width {self.width} cannot have {self.heads} heads: the one must divide the other")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"a Q-Former with dropout {self.dropout}: from 0 to below 1 is right")
        if not all(0 <= token < self.vocabulary for token in (self.pad, self.cls, self.sep, self.dec)):
            raise ConfigError(
                f"special tokens {self.pad}, {self.cls}, {self.sep}, {self.dec} must lie in a vocabulary of {self.vocabulary}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Give JSON values that `from_dict` takes back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "QFormerConfig":
        """Build from JSON values.

        Raises:
            DataError: A key is unknown or missing.
        """
        known = {field.name for field in fields(cls)}
        if strange := sorted(set(values) - known):
            raise DataError(f"a Q-Former has no {', '.join(strange)}; it has {', '.join(sorted(known))}")
        try:
            return cls(**values)
        except TypeError as error:
            raise DataError(f"the shape of a Q-Former is incomplete: {error}") from error

    def body(self) -> Blip2QFormerConfig:
        """Give transformers' configuration of the body."""
        return Blip2QFormerConfig(
            vocab_size=self.vocabulary, hidden_size=self.width, num_hidden_layers=self.layers, num_attention_heads=self.heads,
            intermediate_size=self.feed_forward, hidden_dropout_prob=self.dropout, attention_probs_dropout_prob=self.dropout,
            max_position_embeddings=self.positions, pad_token_id=self.pad, cross_attention_frequency=self.cross_attention_every,
            encoder_hidden_size=self.encoder_width, use_qformer_text_input=True,
        )  # fmt: skip


class LanguageHead(nn.Module):
    """BERT's head for words: dense, GELU, norm, and the word embeddings turned round, with a bias of its own."""

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.LayerNorm = nn.LayerNorm(width, eps=1e-12)
        self.bias = nn.Parameter(torch.zeros(vocabulary))

    def forward(self, states: Tensor, words: Tensor) -> Tensor:
        """Give logits [..., V] of states [..., D], for word embeddings [V, D]."""
        return F.linear(self.LayerNorm(F.gelu(self.dense(states))), words, self.bias)


class QFormer(nn.Module):
    """Queries that read an image, and the text side that teaches them to.

    Queries are drawn from N(0, 0.02) (transformers begins with zeros, which never come apart), the queries' feed-forward networks begin
    as the text's. Everything comes from torch's generator.
    """

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.config = config
        self.ln_vision = nn.LayerNorm(config.encoder_width, eps=1e-5)
        self.query_tokens = nn.Parameter(torch.empty(1, config.queries, config.width))
        body = config.body()
        body._attn_implementation = "sdpa"
        self.embeddings = Blip2TextEmbeddings(body)
        self.qformer = Blip2QFormerModel(body)
        for layer in self.qformer.encoder.layer[:: config.cross_attention_every]:
            layer.crossattention.attention = ImageAttention(body, is_cross_attention=True)
        self.cls = LanguageHead(config.width, config.vocabulary)
        self.vision_projection = nn.Linear(config.width, config.joint_width)
        self.text_projection = nn.Linear(config.width, config.joint_width)
        self.itm_head = nn.Linear(config.width, 2)
        self.temp = nn.Parameter(torch.tensor([0.07]))  # one number with a dimension: DeepSpeed cannot send one without
        self._begin()

    def _begin(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.query_tokens, std=0.02)
        with torch.no_grad():
            self.embeddings.word_embeddings.weight[self.config.pad].zero_()
        self.copy_feed_forward()

    def copy_feed_forward(self) -> None:
        """Let the queries' feed-forward networks begin as the text's (after BERT's weights have been loaded into those)."""
        for layer in self.qformer.encoder.layer:
            layer.intermediate_query.load_state_dict(layer.intermediate.state_dict())
            layer.output_query.load_state_dict(layer.output.state_dict())

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.query_tokens.device

    def image_states(self, features: Tensor) -> Tensor:
        """Normalise an encoder's tokens [B, n, W] in float32, whatever the precision around.

        Raises:
            ValueError: They have another width.
        """
        if features.dim() != 3 or features.shape[-1] != self.config.encoder_width:
            raise ValueError(
                f"this Q-Former reads image tokens [B, n, {self.config.encoder_width}]; it was given {list(features.shape)}: "
                "was it trained behind another encoder?"
            )
        with torch.autocast(features.device.type, enabled=False):
            return self.ln_vision(features.to(self.ln_vision.weight.dtype))

    def _run(self, embedded: Tensor, queries: int, mask: Tensor | None, image: Tensor | Reading | None) -> Tensor:
        reading = Reading(ImageTokens(image)) if isinstance(image, Tensor) else image
        more = {} if reading is None else {"encoder_hidden_states": reading.parts[0].states, "reading": reading}
        out: Tensor = self.qformer(query_embeds=embedded, query_length=queries, attention_mask=mask, **more).last_hidden_state
        return out

    def queries(self, image: Tensor) -> Tensor:
        """Let the queries read images [B, n, W] alone: [B, Q, D]."""
        return self._run(self.query_tokens.expand(len(image), -1, -1), self.config.queries, None, image)

    def text(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Read texts [B, T] alone: [B, T, D]. `mask` is 1 on words, 0 on padding."""
        return self._run(self.embeddings(input_ids=ids), 0, mask, None)

    def match(self, image: Tensor | Reading, ids: Tensor, mask: Tensor) -> Tensor:
        """Say whether text and image belong together: logits [B, 2], the second of "yes"; the mean over the queries.

        Args:
            image: [B, n, W], or [1, n, W]: one image before B texts; or which image each of the texts is shown.
            ids: [B, T].
            mask: [B, T], 1 on words.
        """
        batch, queries = len(ids), self.config.queries
        embedded = self.embeddings(input_ids=ids, query_embeds=self.query_tokens.expand(batch, -1, -1))
        whole = torch.cat([mask.new_ones(batch, queries), mask], dim=1)  # [B, Q + T], everything sees everything
        return self.itm_head(self._run(embedded, queries, whole, image)[:, :queries]).mean(dim=1)

    def queries_and_caption(self, image: Tensor | Reading, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Let the queries read images, and the texts the queries and their own past: in one pass, since queries never see the text.

        Args:
            image: [B, n, W], or which image each row reads.
            ids: [B, T], the first replaced by `dec`.
            mask: [B, T], 1 on words.

        Returns:
            Query states [B, Q, D], equal to `queries(image)`, and logits of the next word at each place [B, T, V].
        """
        queries = self.config.queries
        embedded = self.embeddings(input_ids=ids, query_embeds=self.query_tokens.expand(len(ids), -1, -1))
        states = self._run(embedded, queries, prefix_mask(mask, queries, embedded.dtype), image)
        return states[:, :queries], self.words(states[:, queries:])

    def words(self, states: Tensor) -> Tensor:
        """Give logits of words [..., V] for text states [..., D]."""
        logits: Tensor = self.cls(states, self.embeddings.word_embeddings.weight)
        return logits

    def image_embeddings(self, queries: Tensor) -> Tensor:
        """Give unit rows of the joint space [B, Q, E] for query states [B, Q, D], in float32."""
        return F.normalize(self.vision_projection(queries).float(), dim=-1)

    def text_embeddings(self, words: Tensor) -> Tensor:
        """Give unit rows of the joint space [B, E] for text states [B, T, D], in float32."""
        return F.normalize(self.text_projection(words[:, 0]).float(), dim=-1)

    @torch.no_grad()
    def caption(self, image: Tensor, max_new_tokens: int = 30) -> Tensor:
        """Write captions greedily, straight from stage 1: ids [B, T] from `dec` to `sep`, padded.

        Args:
            image: [B, n, W].
            max_new_tokens: Longest caption.
        """
        ids = torch.full((len(image), 1), self.config.dec, device=image.device)
        done = torch.zeros(len(image), dtype=torch.bool, device=image.device)
        for _ in range(min(max_new_tokens, self.config.positions - 1)):
            logits = self.queries_and_caption(image, ids, torch.ones_like(ids))[1][:, -1]
            word = logits.argmax(dim=-1).masked_fill(done, self.config.pad)
            ids = torch.cat([ids, word[:, None]], dim=1)
            done |= word == self.config.sep
            if bool(done.all()):
                break
        return ids


def prefix_mask(mask: Tensor, queries: int, dtype: torch.dtype) -> Tensor:
    """Make the mask of captioning: additive [B, 1, Q + T, Q + T]; queries see queries, a word sees all queries and the words up to itself.

    Additive, since transformers' eager attention adds a boolean mask as 0 and 1, silently.

    Args:
        mask: [B, T], 1 on words.
        queries: Q.
        dtype: Of the states.
    """
    batch, length = mask.shape
    allowed = torch.zeros(batch, 1, queries + length, queries + length, dtype=torch.bool, device=mask.device)
    allowed[..., :queries] = True
    past = torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
    allowed[:, :, queries:, queries:] = past & mask[:, None, None, :].bool()
    return torch.zeros(allowed.shape, dtype=dtype, device=mask.device).masked_fill(~allowed, torch.finfo(dtype).min)
