"""BLIP-2's second stage: a Q-Former's queries, projected, in front of a frozen language model.

Letters: B rows, n image tokens of width W, Q queries, T text tokens, D width of the Q-Former, d width of the language model, V its words.

    features = encoder(...)                              # [B, n, W], frozen
    soft = blip2.soft_prompt(features)                   # [B, Q, d]: what the language model sees of the image
    logits = blip2.logits(soft, texts)                   # [B, T, V], of each text token from the place before it

A decoder (OPT, Llama, Qwen, SmolLM2) reads [lead; queries; prompt; text]. An encoder-decoder (Flan-T5) reads [lead; queries; prompt] and writes
the text. The lead is empty in the paper; a chat model's template begins there ("<|im_start|>user").
Of the Q-Former only the path of the queries is left: no words, no feed-forward of the text's. Weights are called as in transformers'
`Blip2ForConditionalGeneration`, where `ln_vision` is the vision model's last norm.

Source: BLIP-2 (Li et al., 2023), section 3.3; LAVIS, lavis/models/blip2_models/blip2_opt.py and blip2_t5.py (what the paper does not say).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Blip2QFormerModel, PreTrainedModel

from llm_stage.qformer import QFormer, QFormerConfig
from mmkit.checkpoint import load_strict
from mmkit.trainable import freeze

IGNORED = -100


@dataclass
class Texts:
    """What a language model reads, and what it is to say.

    Attributes:
        ids: [B, T]. A decoder's prompt and text, padded on the right; the prompt alone, for an encoder-decoder.
        mask: [B, T], 1 on tokens.
        labels: A decoder's: [B, T], -100 on prompt and padding. An encoder-decoder's: the text [B, S], -100 on padding.
    """

    ids: Tensor
    mask: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> "Texts":
        """Move all."""
        return Texts(self.ids.to(device), self.mask.to(device), self.labels.to(device))


class Blip2(nn.Module):
    """Queries, their projection, and a language model that sleeps.

    Args:
        config: Shape of the Q-Former.
        language_model: Any causal or encoder-decoder language model of transformers; it is frozen.
        lead: Ids of what stands in front of the queries, the same in all rows.
    """

    def __init__(self, config: QFormerConfig, language_model: PreTrainedModel, lead: Sequence[int] = ()) -> None:
        super().__init__()
        self.config, self.lead = config, list(lead)
        body = config.body()
        body.use_qformer_text_input = False
        body._attn_implementation = "sdpa"
        self.ln_vision = nn.LayerNorm(config.encoder_width, eps=1e-5)
        self.query_tokens = nn.Parameter(torch.empty(1, config.queries, config.width).normal_(std=0.02))
        self.qformer = Blip2QFormerModel(body)
        llm: Any = language_model
        self.language_projection = nn.Linear(config.width, llm.get_input_embeddings().embedding_dim)
        self.language_model: Any = freeze(language_model)

    @property
    def writes_apart(self) -> bool:
        """Whether the language model has an encoder, which reads, and a decoder, which writes."""
        return bool(self.language_model.config.is_encoder_decoder)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.query_tokens.device

    def trained_state(self, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Give all weights but the language model's."""
        return {key: tensor for key, tensor in (state or self.state_dict()).items() if not key.startswith("language_model.")}

    def soft_prompt(self, features: Tensor) -> Tensor:
        """Let the queries read an encoder's tokens [B, n, W], and project them: [B, Q, d].

        Raises:
            ValueError: The tokens have another width.
        """
        if features.dim() != 3 or features.shape[-1] != self.config.encoder_width:
            raise ValueError(
                f"this Q-Former reads image tokens [B, n, {self.config.encoder_width}]; it was given {list(features.shape)}: "
                "was it trained behind another encoder?"
            )
        with torch.autocast(features.device.type, enabled=False):
            image = self.ln_vision(features.to(self.ln_vision.weight.dtype))
        queries = self.query_tokens.expand(len(image), -1, -1)
        states = self.qformer(query_embeds=queries, query_length=self.config.queries, encoder_hidden_states=image).last_hidden_state
        soft: Tensor = self.language_projection(states)
        return soft

    def read(self, soft: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Put the lead and queries [B, Q, d] in front of tokens [B, T]: embeddings [B, l + Q + T, d] and mask [B, l + Q + T]."""
        embed = self.language_model.get_input_embeddings()
        words = embed(ids)
        lead = embed(torch.tensor(self.lead, dtype=torch.long, device=ids.device)).expand(len(ids), -1, -1)
        whole = torch.cat([lead, soft.to(words.dtype), words], dim=1)
        return whole, torch.cat([mask.new_ones(len(ids), whole.shape[1] - ids.shape[1]), mask], dim=1)

    def logits(self, soft: Tensor, texts: Texts) -> Tensor:
        """Give logits of the text's tokens, each from what stands before it: [B, T, V], or [B, S, V] of an encoder-decoder."""
        embedded, mask = self.read(soft, texts.ids, texts.mask)
        if self.writes_apart:
            found: Tensor = self.language_model(inputs_embeds=embedded, attention_mask=mask, labels=texts.labels).logits
            return found
        keep = texts.ids.shape[1] + 1
        whole: Tensor = self.language_model(inputs_embeds=embedded, attention_mask=mask, logits_to_keep=keep, use_cache=False).logits
        return whole[:, :-1]


def text_loss(model: Blip2, features: Tensor, texts: Texts) -> Tensor:
    """Mean cross-entropy [] over the labelled tokens of a micro-batch.

    Args:
        model: The second stage.
        features: [B, n, W].
        texts: What it reads and what it is to say.
    """
    logits = model.logits(model.soft_prompt(features), texts)
    return F.cross_entropy(logits.float().flatten(0, 1), texts.labels.flatten(), ignore_index=IGNORED)


def from_stage1(stage1: QFormer, language_model: PreTrainedModel, lead: Sequence[int] = (), seed: int = 0) -> Blip2:
    """Take the queries' path out of a Q-Former of stage 1; the projection is drawn anew.

    Args:
        stage1: A trained Q-Former.
        language_model: The language model.
        lead: As for `Blip2`.
        seed: Of the projection.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Blip2(stage1.config, language_model, lead)
        nn.init.normal_(model.language_projection.weight, std=0.02)
        nn.init.zeros_(model.language_projection.bias)
    own, theirs = model.trained_state(), stage1.state_dict()
    found = {key: theirs.get(key, tensor) for key, tensor in own.items()}
    load_trained(model, found, "the Q-Former of stage 1")
    return model


def load_trained(model: Blip2, state: Mapping[str, Tensor], source: str) -> None:
    """Load all weights but the language model's, strictly.

    Raises:
        DataError: A weight is missing, unknown, or of another shape.
    """
    load_strict(model, {**state, **{f"language_model.{k}": v for k, v in model.language_model.state_dict().items()}}, source)
