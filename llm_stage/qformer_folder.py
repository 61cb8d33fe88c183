"""A Q-Former with its encoder as one folder, and back: what stage 1 leaves and everything else begins with.

    FOLDER/qformer.json          shape, which hidden state of the encoder it reads, hash of the encoder, how it was made
    FOLDER/model.safetensors     the Q-Former
    FOLDER/tokenizer*.json       its words
    FOLDER/encoder/              the frozen encoder, whole: a folder that was moved, or an encoder that was trained on, changes nothing

A random tower can never come back: weights are loaded strictly, and the encoder's hash must be the one that the Q-Former was trained behind.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from encoders.vision_towers import load_tower
from llm_stage.qformer import QFormer, QFormerConfig
from llm_stage.qformer_text import QFormerTokenizer
from mmkit.checkpoint import atomic_folder, load_strict, load_weights, save_weights
from mmkit.errors import ConfigError, DataError
from mmkit.images import ImageSpec
from mmkit.trainable import freeze, weights_hash

QFORMER_FILE, WEIGHT_FILE, ENCODER_FOLDER = "qformer.json", "model.safetensors", "encoder"


@dataclass(frozen=True)
class QFormerCard:
    """How a Q-Former was made.

    Attributes:
        encoder: What the encoder was loaded by, for people; the folder holds its own copy.
        encoder_hash: Of the encoder's weights.
        feature_layer: The hidden state that is read, without the encoder's final norm: -2 is BLIP-2's, the last but one block.
        mode: "train", "calibrate" (keys, values and norm alone) or "swap" (nothing was trained for this encoder).
        max_tokens: Longest text.
        training: Data, steps and the like, for people.
    """

    encoder: str
    encoder_hash: str
    feature_layer: int = -2
    mode: str = "train"
    max_tokens: int = 32
    training: dict[str, Any] = field(default_factory=dict)


@dataclass
class QFormerParts:
    """An encoder with its Q-Former.

    Attributes:
        encoder: Frozen, any vision tower.
        qformer: Behind it.
        tokenizer: Of the Q-Former's text side.
        card: How it was made.
    """

    encoder: nn.Module
    qformer: QFormer
    tokenizer: QFormerTokenizer
    card: QFormerCard

    @property
    def spec(self) -> ImageSpec:
        """How the encoder wants its images."""
        spec: ImageSpec = self.encoder.spec  # type: ignore[assignment]
        return spec

    def features(self, images: Tensor) -> Tensor:
        """Encode images [B, 3, H, W]: [B, n, W], without gradient."""
        return encoder_features(self.encoder, images, self.card.feature_layer)

    def to(self, device: torch.device) -> "QFormerParts":
        """Move both."""
        self.encoder.to(device)
        self.qformer.to(device)
        return self


@torch.no_grad()
def encoder_features(encoder: nn.Module, images: Tensor, layer: int) -> Tensor:
    """Give all tokens [B, n, W] of one hidden state of an encoder, CLS included where there is one."""
    states = encoder(images, output_hidden_states=[layer]).hidden_states
    found: Tensor = states[layer]
    return found


def load_frozen_encoder(source: str, layer: int) -> nn.Module:
    """Load an encoder, freeze it, and see that it has the layer.

    Raises:
        NameNotFound: There is no such encoder.
        ConfigError: It has no such hidden state.
    """
    encoder = freeze(load_tower(source))
    depth = int(encoder.config.num_hidden_layers or 0)
    if not -depth - 1 <= layer <= depth:
        raise ConfigError(f"feature_layer {layer}: {source} has {depth} blocks, so {-depth - 1} to {depth} is right")
    return encoder


def encoder_width(encoder: nn.Module) -> int:
    """W, width of an encoder's tokens."""
    config: Any = encoder.config
    return int(config.hidden_size)


def save_qformer(parts: QFormerParts, folder: Path | str, *, state: Mapping[str, Tensor] | None = None, overwrite: bool = False) -> Path:
    """Write the folder, whole or not at all.

    Args:
        parts: Encoder, Q-Former, tokenizer, card.
        folder: The folder to make.
        state: The Q-Former's gathered weights, where its own are in shares.
        overwrite: Replace a folder of this name.

    Raises:
        FileExistsError: The folder exists and `overwrite` is off.
    """
    card = replace(parts.card, encoder_hash=weights_hash(parts.encoder))
    with atomic_folder(folder, overwrite=overwrite) as work:
        content = {**card.__dict__, "config": parts.qformer.config.to_dict()}
        (work / QFORMER_FILE).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        save_weights(state or parts.qformer.state_dict(), work / WEIGHT_FILE)
        parts.tokenizer.save(work)
        encoder: Any = parts.encoder
        encoder.save_pretrained(str(work / ENCODER_FOLDER))
    return Path(folder)


def read_qformer_file(folder: Path | str) -> tuple[QFormerCard, QFormerConfig]:
    """Read what a folder says of itself.

    Raises:
        ConfigError: It is no Q-Former folder.
        DataError: The file is damaged.
    """
    file = Path(folder) / QFORMER_FILE
    if not file.is_file():
        raise ConfigError(f"{folder} is no Q-Former folder: it has no {QFORMER_FILE}. Stage 1 writes one: mmkit train qformer ...")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        config = QFormerConfig.from_dict(content.pop("config"))
        return QFormerCard(**content), config
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{file} is damaged, or of another version of mmkit: {error}") from error


def load_qformer(folder: Path | str) -> QFormerParts:
    """Load a folder: the encoder frozen, the Q-Former in eval mode.

    Raises:
        ConfigError: It is no Q-Former folder.
        DataError: Something is missing, does not fit, or the encoder is another one than the Q-Former was trained behind.
    """
    card, config = read_qformer_file(folder)
    folder = Path(folder)
    encoder = load_frozen_encoder(str(folder / ENCODER_FOLDER), card.feature_layer)
    if (found := weights_hash(encoder)) != card.encoder_hash:
        raise DataError(
            f"{folder / ENCODER_FOLDER} is not the encoder that this Q-Former was made with (its weights' hash is {found[:12]}, "
            f"{card.encoder_hash[:12]} was written down): restore it, or train or calibrate a Q-Former for the new one"
        )
    qformer = QFormer(config)
    load_strict(qformer, load_weights(folder / WEIGHT_FILE), str(folder / WEIGHT_FILE))
    return QFormerParts(encoder, qformer.eval(), QFormerTokenizer.load(str(folder), card.max_tokens), card)
