"""A BLIP-2 of the second stage as one folder, and back.

    FOLDER/blip2.json            shape, the hidden state of the encoder that is read, the language model's name and hash, how it was made
    FOLDER/model.safetensors     norm, queries, Q-Former, projection
    FOLDER/encoder/              the frozen encoder, whole
    (the language model)         by name: it is never changed, and its hash is compared

Neither a random tower nor another language model under the same name can come back: weights are loaded strictly and hashes compared.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llm_stage.blip2 import Blip2, load_trained
from llm_stage.blip2_text import END, TextFormat
from llm_stage.llms import load_any_llm
from llm_stage.qformer import QFormerConfig
from llm_stage.qformer_folder import ENCODER_FOLDER, WEIGHT_FILE, encoder_features, load_frozen_encoder
from mmkit.checkpoint import atomic_folder, load_weights, save_weights
from mmkit.errors import ConfigError, DataError
from mmkit.images import ImageSpec
from mmkit.trainable import weights_hash

BLIP2_FILE = "blip2.json"


@dataclass(frozen=True)
class Blip2Card:
    """How a BLIP-2 was made.

    Attributes:
        encoder: What the encoder was loaded by, for people; the folder holds its own copy.
        encoder_hash: Of the encoder's weights.
        llm: The language model: a name, a name on the hub, or a folder.
        llm_hash: Of its weights, rounded to bfloat16: the same whether they are loaded in float32 or in bfloat16. Trained in float16: to that.
        weights: How the language model was held in training: "fp32", "bf16", "fp16".
        feature_layer: The encoder's hidden state that is read.
        mode: "train" (a Q-Former trained for this encoder), "calibrate" or "swap"; see `QFormerCard`.
        end, lead, max_tokens: Of `TextFormat`.
        prompt: What a question is put into, `{}` standing for it.
        caption_prompt: What a caption is asked for by.
        training: Data, steps and the like, for people.
    """

    encoder: str
    llm: str
    encoder_hash: str = ""
    llm_hash: str = ""
    weights: str = "fp32"
    feature_layer: int = -2
    mode: str = "train"
    end: str = END
    lead: str = ""
    max_tokens: int = 64
    prompt: str = "Question: {} Short answer:"
    caption_prompt: str = ""
    training: dict[str, Any] = field(default_factory=dict)


@dataclass
class Blip2Parts:
    """An encoder, a BLIP-2 behind it, and the words of its language model."""

    encoder: nn.Module
    model: Blip2
    text: TextFormat
    card: Blip2Card

    @property
    def spec(self) -> ImageSpec:
        """How the encoder wants its images."""
        spec: ImageSpec = self.encoder.spec  # type: ignore[assignment]
        return spec

    def features(self, images: Tensor) -> Tensor:
        """Encode images [B, 3, H, W]: [B, n, W], without gradient."""
        return encoder_features(self.encoder, images, self.card.feature_layer)

    def to(self, device: torch.device) -> "Blip2Parts":
        """Move encoder and model."""
        self.encoder.to(device)
        self.model.to(device)
        return self


def save_blip2(parts: Blip2Parts, folder: Path | str, *, state: Mapping[str, Tensor] | None = None, overwrite: bool = False) -> Path:
    """Write the folder, whole or not at all.

    Args:
        parts: What to write; the language model's hash must be in the card.
        folder: The folder to make.
        state: The model's gathered weights, where its own are in shares.
        overwrite: Replace a folder of this name.

    Raises:
        FileExistsError: The folder exists and `overwrite` is off.
    """
    card = replace(
        parts.card, encoder_hash=weights_hash(parts.encoder), llm_hash=parts.card.llm_hash or llm_hash(parts.model, parts.card.weights)
    )
    values = {**asdict(card), "config": parts.model.config.to_dict()}
    if Path(card.llm).is_dir():
        values |= {"llm": str(Path(card.llm).absolute()), "llm_folder": os.path.relpath(card.llm, folder)}
    with atomic_folder(folder, overwrite=overwrite) as work:
        (work / BLIP2_FILE).write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        save_weights(parts.model.trained_state(state), work / WEIGHT_FILE)
        encoder: Any = parts.encoder
        encoder.save_pretrained(str(work / ENCODER_FOLDER))
    return Path(folder)


def llm_hash(model: Blip2, weights: str) -> str:
    """Hash of the language model's weights, rounded as a card's `llm_hash` is."""
    return weights_hash(model.language_model, _rounded_to(weights))


def _rounded_to(weights: str) -> torch.dtype:
    return torch.float16 if weights == "fp16" else torch.bfloat16


def is_blip2(folder: Path | str) -> bool:
    """Whether a folder holds a BLIP-2 of the second stage."""
    return (Path(folder) / BLIP2_FILE).is_file()


def read_blip2_file(folder: Path | str) -> tuple[Blip2Card, QFormerConfig]:
    """Read what a folder says of itself.

    Raises:
        ConfigError: It is no BLIP-2 folder.
        DataError: The file is damaged.
    """
    file = Path(folder) / BLIP2_FILE
    if not file.is_file():
        raise ConfigError(f"{folder} is no BLIP-2 folder: it has no {BLIP2_FILE}. Stage 2 writes one: mmkit train blip2 ...")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        config = QFormerConfig.from_dict(content.pop("config"))
        moved = Path(folder) / content.pop("llm_folder", "") if "llm_folder" in content else None
        card = Blip2Card(**content)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{file} is damaged, or of another version of mmkit: {error}") from error
    return (replace(card, llm=str(moved.resolve())) if moved is not None and moved.is_dir() else card), config


def load_blip2(folder: Path | str, dtype: torch.dtype = torch.float32) -> Blip2Parts:
    """Load a folder: everything frozen and in eval mode.

    Args:
        folder: Of `save_blip2`.
        dtype: Of the language model's weights; the rest stays float32.

    Raises:
        ConfigError: It is no BLIP-2 folder, or its language model cannot be had.
        DataError: Something is missing, does not fit, or is not what it was trained with.
    """
    card, config = read_blip2_file(folder)
    folder = Path(folder)
    encoder = load_frozen_encoder(str(folder / ENCODER_FOLDER), card.feature_layer)
    if (found := weights_hash(encoder)) != card.encoder_hash:
        raise DataError(
            f"{folder / ENCODER_FOLDER} is not the encoder that this BLIP-2 was made with (its weights' hash is {found[:12]}, "
            f"{card.encoder_hash[:12]} was written down): restore it, or train for the new one"
        )
    llm, tokenizer = load_any_llm(card.llm, dtype)
    text = TextFormat(tokenizer, bool(llm.config.is_encoder_decoder), card.end, card.lead, card.max_tokens)
    model = Blip2(config, llm, text.lead_ids)
    load_trained(model, load_weights(folder / WEIGHT_FILE), str(folder / WEIGHT_FILE))
    comparable = dtype in (torch.float32, _rounded_to(card.weights))  # rounded twice, through another type, it would be another number
    if comparable and (own := llm_hash(model, card.weights)) != card.llm_hash:
        raise DataError(
            f"'{card.llm}' is not the language model that {folder} was trained with (its weights' hash is {own[:12]}, "
            f"{card.llm_hash[:12]} was written down): name that one in {BLIP2_FILE}, or train for the new one"
        )
    return Blip2Parts(encoder, model.eval(), text, card)
