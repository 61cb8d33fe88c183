"""Kept features for trainings on pairs: with `--data.feature_cache` every picture goes through the frozen encoder once, before the first step.

    keep_features(settings.data, parts, [pairs], run)     # the sets then give features where they gave pixels
    features = features_of(parts, batch["images"])        # encodes pixels, passes features on

Both stages of BLIP-2 read the same hidden state of the same encoder: one folder serves both, and whoever shares it.

Letters: B pictures, n image tokens of width W, S pixels a side.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from encoders.pair_sources import PairConfig
from encoders.pairs import WHOLE, CaptionedImages, Pairs
from encoders.shards import holds_shards
from llm_stage.qformer_folder import encoder_features
from llm_stage.tower_features import cached_images
from mmkit.errors import ConfigError
from mmkit.feature_cache import FeatureKey, Stored, check_cache, what_counts
from mmkit.images import ImageError, ImageSpec, to_images
from mmkit.run import Run
from mmkit.trainable import weights_hash


@dataclass
class FrozenPairConfig(PairConfig):
    """Pairs in front of an encoder that sleeps."""

    feature_cache: str = field(
        default="",
        metadata={"help": "folder for the frozen encoder's features: computed once, then read; files, data.scale 1.0 1.0", "free": True},
    )
    feature_dtype: Stored = field(
        default="computed", metadata={"help": "of cached features; float16 takes half the disk of fp32, and is not exact"}
    )
    rebuild_cache: bool = field(
        default=False, metadata={"help": "throw away what feature_cache holds for this encoder, and begin again", "free": True}
    )

    def validate(self) -> None:
        """Refuse a cache of pictures that are never the same twice, and one that is damaged."""
        super().validate()
        if not self.feature_cache:
            return
        if (self.scale[0], self.scale[1]) != WHOLE:
            raise ConfigError(
                f"data.feature_cache keeps what the encoder makes of a whole picture, and data.scale {self.scale} cuts another crop each time: "
                "--data.scale '[1.0, 1.0]' trains without crops, or leave the cache out"
            )
        if self.source == "minidata" or holds_shards(self.source):
            raise ConfigError(f"data.feature_cache is for picture files; data.source {self.source} has none, leave the cache out")
        if not self.rebuild_cache:
            check_cache(self.feature_cache)


class Encoded(Protocol):
    """An encoder with what reads it: `QFormerParts` or `Blip2Parts`."""

    encoder: nn.Module
    card: Any

    @property
    def spec(self) -> ImageSpec:
        """How the encoder wants its images."""
        ...

    def features(self, images: Tensor) -> Tensor:
        """Encode images [B, 3, S, S]: [B, n, W]."""
        ...


def features_of(parts: Encoded, pictures: Tensor) -> Tensor:
    """Give features [B, n, W], without gradient, of pixels uint8 [B, 3, S, S], or of features that a cache gave."""
    return parts.features(to_images(pictures, parts.spec)) if pictures.dtype == torch.uint8 else pictures


class EncoderFeatures:
    """Computes what the cache holds: one hidden state of an encoder, as the training would.

    Args:
        parts: The encoder, frozen, on its device, and the layer that is read.
        device: Where to compute.
        autocast: Gives the context of the training's forward.
    """

    def __init__(self, parts: Encoded, device: torch.device, autocast: Callable[[], AbstractContextManager[Any]]) -> None:
        self.encoder, self.layer, self.spec = parts.encoder, int(parts.card.feature_layer), parts.spec
        self.device, self.autocast = device, autocast

    def __call__(self, images: Tensor) -> Tensor:
        """Turn images [B, 3, S, S] into features [B, n, W]."""
        with self.autocast():
            return encoder_features(self.encoder, images.to(self.device), self.layer)

    def key(self, stored: Stored) -> FeatureKey:
        """Describe what is given; the encoder runs once, on a blank image."""
        features = self(torch.zeros(1, 3, self.spec.size, self.spec.size))
        computed = str(features.dtype).removeprefix("torch.")
        config: Any = self.encoder.config
        with self.autocast():
            forward = "autocast" if torch.is_autocast_enabled(self.device.type) else "plain"
        return FeatureKey(
            tower=weights_hash(self.encoder), network=what_counts(config.to_dict()),
            spec=self.spec.to_dict(), layer=self.layer, select="all", precision=f"{next(self.encoder.parameters()).dtype} {forward}",
            tokens=features.shape[1], width=features.shape[2], computed=computed, stored=computed if stored == "computed" else stored,
        )  # fmt: skip


def keep_features(data: FrozenPairConfig, parts: Encoded, sets: Sequence[Pairs | None], run: Run) -> None:
    """Have the features of all pictures of some sets on disk, and let the sets give them.

    Args:
        data: The setting; without a cache's folder nothing happens.
        parts: The encoder, on its device, and the layer that is read.
        sets: Sets of picture files.
        run: All its ranks take part, each with its share, a micro-batch at a time.

    Raises:
        ImageError: A picture cannot be read, and `on_bad_sample` is "error".
        DataError: The cache is damaged.
        ConfigError: The disk has no room.
    """
    if not data.feature_cache:
        return
    files = [some for some in sets if isinstance(some, CaptionedImages)]
    compute = EncoderFeatures(parts, run.device, run.accelerator.autocast)
    wanted = {some.name(index): f"pair {index}" for some in files for index in range(len(some))}
    kept = cached_images(
        data.feature_cache, compute, compute.key(data.feature_dtype), wanted, Path(), parts.spec, batch_size=run.config.micro_batch_size,
        workers=run.config.num_workers, rebuild=data.rebuild_cache, rank=run.rank, ranks=run.world_size,
    )  # fmt: skip
    if kept.broken and data.on_bad_sample == "error":
        message = next(iter(kept.broken.values()))
        raise ImageError(f"{message}\n  {len(kept.broken)} picture(s) in all; --data.on_bad_sample skip leaves them out, listed")
    for some in files:
        some.kept = kept
