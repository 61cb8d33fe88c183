"""LAVIS's BLIP-2 checkpoints: how their weights are called, in and out. Every key is mapped, kept beside, or left out by a rule with a name.

Q-Former    query_tokens, temp, Qformer.bert.*, Qformer.cls.*, ln_vision, vision_proj, text_proj, itm_head
stage 2     ... opt_proj or t5_proj, and the language model under opt_model or t5_model
encoder     visual_encoder.* (EVA's own names, without the last block)
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from llm_stage.qformer import QFormer, QFormerConfig
from mmkit.errors import DataError

# Ours are transformers' names. Order matters: the first that matches is replaced.
RULES = (
    (r"^Qformer\.bert\.embeddings\.LayerNorm\.", "qformer.layernorm."),
    (r"^Qformer\.bert\.embeddings\.(word|position)_embeddings\.", r"embeddings.\1_embeddings."),
    (r"^Qformer\.bert\.encoder\.", "qformer.encoder."),
    (r"^Qformer\.cls\.predictions\.transform\.", "cls."),
    (r"^Qformer\.cls\.predictions\.bias$", "cls.bias"),
    (r"^(vision|text)_proj\.", r"\1_projection."),
    (r"^(query_tokens|temp|ln_vision\..*|itm_head\..*)$", r"\1"),
)
# What says nothing new: positions counted up, and the language head's second names of the word embeddings and of its bias.
IMPLIED = re.compile(r"^Qformer\.(bert\.embeddings\.position_ids|cls\.predictions\.decoder\.(weight|bias))$")
OTHERS = re.compile(r"^(visual_encoder|opt_model|opt_proj|t5_model|t5_proj)\.")


def from_lavis(state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Rename the Q-Former's part of a LAVIS checkpoint.

    Args:
        state: Its weights; those of the encoder and of a language model are passed over.
        source: The file, for messages.

    Returns:
        Weights by the names of `QFormer`; without text side and heads, if a stage-2 checkpoint holds none.

    Raises:
        DataError: A key has no place, or a second name holds other numbers than the first.
    """
    found: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if IMPLIED.match(key) or OTHERS.match(key):
            continue
        new = next((re.sub(pattern, name, key) for pattern, name in RULES if re.match(pattern, key)), None)
        if new is None:
            raise DataError(f"{source}: '{key}' is no weight of a BLIP-2 as LAVIS writes it; is this another kind of checkpoint?")
        tensor = tensor.reshape(1) if new == "temp" else tensor
        found[new.replace("attention.self.", "attention.attention.")] = tensor
    if not found:
        raise DataError(f"{source}: no Q-Former in it; the first of its {len(state)} keys is '{next(iter(state), '')}'")
    for second, first in (("decoder.weight", "embeddings.word_embeddings.weight"), ("decoder.bias", "cls.bias")):
        other = state.get(f"Qformer.cls.predictions.{second}")
        if other is not None and first in found and not torch.equal(other, found[first]):
            raise DataError(f"{source}: Qformer.cls.predictions.{second} should be tied, and differs from what it is tied to")
    return found


def to_lavis(model: QFormer) -> dict[str, Tensor]:
    """Give a Q-Former's weights by LAVIS's names, the implied ones included."""
    found: dict[str, Tensor] = {}
    for key, tensor in model.state_dict().items():
        name = key.replace("attention.attention.", "attention.self.")
        for pattern, new in (
            (r"^qformer\.layernorm\.", "Qformer.bert.embeddings.LayerNorm."),
            (r"^embeddings\.", "Qformer.bert.embeddings."),
            (r"^qformer\.", "Qformer.bert."),
            (r"^cls\.bias$", "Qformer.cls.predictions.bias"),
            (r"^cls\.", "Qformer.cls.predictions.transform."),
            (r"^(vision|text)_projection\.", r"\1_proj."),
        ):
            if re.match(pattern, name):
                name = re.sub(pattern, new, name)
                break
        found[name] = tensor.reshape(()) if name == "temp" else tensor
    found["Qformer.cls.predictions.decoder.weight"] = model.embeddings.word_embeddings.weight.detach()
    found["Qformer.cls.predictions.decoder.bias"] = model.cls.bias.detach()
    found["Qformer.bert.embeddings.position_ids"] = torch.arange(model.config.positions)[None]
    return found


def config_of(state: Mapping[str, Tensor], heads: int = 12, dropout: float = 0.1, **special: int) -> QFormerConfig:
    """Read the shape of a Q-Former off its (renamed) weights; only its heads, and the ids of special tokens, leave no trace in them.

    Raises:
        DataError: A weight it goes by is missing.
    """
    try:
        vocabulary, width = state["embeddings.word_embeddings.weight"].shape
        layers = 1 + max(int(key.split(".")[3]) for key in state if key.startswith("qformer.encoder.layer."))
        crossed = [i for i in range(layers) if f"qformer.encoder.layer.{i}.crossattention.attention.key.weight" in state]
        return QFormerConfig(
            encoder_width=state["ln_vision.weight"].shape[0], width=width, layers=layers, heads=heads,
            feed_forward=state["qformer.encoder.layer.0.intermediate_query.dense.weight"].shape[0],
            queries=state["query_tokens"].shape[1], cross_attention_every=crossed[1] if len(crossed) > 1 else layers, vocabulary=vocabulary,
            positions=state["embeddings.position_embeddings.weight"].shape[0], joint_width=state["vision_projection.weight"].shape[0],
            dropout=dropout, **{"dec": vocabulary - 1, **special},
        )  # fmt: skip
    except (KeyError, ValueError) as error:
        raise DataError(f"the shape of the Q-Former cannot be read off its weights: {error}") from error
