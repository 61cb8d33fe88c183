"""How a Q-Former begins: from nothing, from BERT, from another Q-Former, or calibrated for an encoder it was not trained behind."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForMaskedLM

from llm_stage.qformer import QFormer, QFormerConfig
from mmkit.checkpoint import load_strict
from mmkit.errors import ConfigError

# What calibration trains: how the queries read an image, and the norm before that (ViSFT's and LAVIS's parts stay as they are).
CALIBRATED = (
    "qformer.encoder.layer.*.crossattention.attention.key.*",
    "qformer.encoder.layer.*.crossattention.attention.value.*",
    "ln_vision.*",
)
_BERT_RULES = (
    ("bert.embeddings.LayerNorm.", "qformer.layernorm."),
    ("bert.embeddings.word_embeddings.", "embeddings.word_embeddings."),
    ("bert.embeddings.position_embeddings.", "embeddings.position_embeddings."),
    ("bert.encoder.", "qformer.encoder."),
    ("cls.predictions.transform.", "cls."),
    ("cls.predictions.bias", "cls.bias"),
)


def load_bert(model: QFormer, name: str) -> None:
    """Let body, words and language head begin as a BERT's; cross-attention and queries stay as drawn, the queries' feed-forward as the text's.

    Words that BERT lacks ([DEC]) keep their drawn row.

    Args:
        model: The Q-Former.
        name: A BERT with its language head, on the hub or in a folder.

    Raises:
        ConfigError: It cannot be loaded, or has another shape.
    """
    try:
        bert = AutoModelForMaskedLM.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ConfigError(f"no BERT could be loaded from '{name}': {str(error).splitlines()[0]}") from error
    own = model.state_dict()
    taken = _as_ours(bert.state_dict())
    wrong = [
        key for key, tensor in taken.items() if key not in own or tensor.shape[1:] != own[key].shape[1:] or len(tensor) > len(own[key])
    ]
    if wrong or not taken:
        at = wrong[0] if wrong else "nothing"
        theirs, ours = (list(state[at].shape) if at in state else "none" for state in (taken, own))
        raise ConfigError(f"'{name}' does not fit this Q-Former: {at} is {theirs} there, {ours} here; give its width, layers and words")
    for key, tensor in taken.items():
        own[key] = torch.cat([tensor, own[key][len(tensor) :]])
    load_strict(model, own, name)
    model.copy_feed_forward()


def _as_ours(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for key, tensor in state.items():
        for old, new in _BERT_RULES:
            if key.startswith(old):
                found[(new + key.removeprefix(old)).replace("attention.self.", "attention.attention.")] = tensor
                break
    return found


def calibrated(model: QFormer, width: int, renew: bool = True) -> QFormer:
    """Give a Q-Former for an encoder of another width: all as it was, but for keys, values and the norm of the image.

    Args:
        model: A trained Q-Former.
        width: W of the new encoder.
        renew: Draw them anew, also where the width would let them stay.

    Raises:
        ConfigError: They are to stay, and the width differs.
    """
    if not renew and width != model.config.encoder_width:
        raise ConfigError(
            f"this Q-Former reads tokens of width {model.config.encoder_width}, the encoder gives {width}: its keys and values cannot stay"
        )
    new = QFormer(replace(model.config, encoder_width=width))
    state: dict[str, Any] = dict(model.state_dict())
    if renew:
        fresh = new.state_dict()
        state |= {key: fresh[key] for key in state if ".crossattention.attention.key." in key or ".crossattention.attention.value." in key}
        state |= {key: fresh[key] for key in state if key.startswith("ln_vision.")}
    load_strict(new, state, "the Q-Former")
    return new


def new_qformer(config: QFormerConfig, seed: int, bert: str = "") -> QFormer:
    """Make a Q-Former, its random numbers drawn from a seed of its own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = QFormer(config)
    if bert:
        load_bert(model, bert)
    return model


def trained_parts(model: nn.Module) -> dict[str, nn.Module]:
    """Give the parts for the table that is printed at the start."""
    names = ("ln_vision", "qformer", "embeddings", "cls", "vision_projection", "text_projection", "itm_head")
    return {name: getattr(model, name) for name in names if hasattr(model, name)}
