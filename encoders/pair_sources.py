"""The setting of every training on image-caption pairs that says where they are, and the pairs it means."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from encoders.pairs import CaptionedImages, DrawnPairs, Pairs, ShardPairs, read_pairs
from encoders.shards import Shards, holds_shards
from mmkit.errors import ConfigError
from mmkit.images import ImageSpec


@dataclass
class PairConfig:
    """Where the pairs come from."""

    source: str = field(
        default="minidata",
        metadata={"help": "minidata (drawn on the fly), a captions JSON, a folder with .txt files, or shards: DIR/{0000..0099}.tar"},
    )
    image_root: str = field(default="", metadata={"help": "folder of the images a JSON names; default: the JSON's own"})
    length: int = field(default=100_000, metadata={"help": "minidata: pairs in an epoch"})
    single_share: float = field(default=0.7, metadata={"help": "minidata: share of pictures with one object"})
    plain_share: float = field(default=0.6, metadata={"help": "minidata: of these, the share captioned by the name alone"})
    on_bad_sample: Literal["error", "skip"] = field(
        default="error", metadata={"help": "an unreadable pair or shard: stop, or leave it out, listed"}
    )
    scale: list[float] = field(
        default_factory=lambda: [0.6, 1.0], metadata={"help": "files: share of the area a crop covers, from and to; 1.0 1.0: no crop"}
    )

    def validate(self) -> None:
        """Refuse shares that are none."""
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ConfigError(f"data.scale is {self.scale}; two shares of the area, from and to, as in [0.6, 1.0], are right")


def read_source(data: PairConfig) -> Any:
    """Find the pairs before the run folder is made: it may fail. None for pairs that are drawn.

    Raises:
        DataError: There is no such file, or it is not what it should be.
    """
    if data.source == "minidata":
        return None
    if holds_shards(data.source):
        return Shards(data.source, data.on_bad_sample)
    return read_pairs(data.source, data.image_root)


def open_pairs(data: PairConfig, source: Any, spec: ImageSpec, seed: int, bad_list: Path | None = None) -> Pairs:
    """Give the pairs of a training.

    Args:
        data: The setting.
        source: What `read_source` gave.
        spec: How pictures are prepared.
        seed: The run's.
        bad_list: Where pairs that were left out are listed.
    """
    if source is None:
        return DrawnPairs(seed, data.length, data.single_share, data.plain_share)
    low, high = data.scale
    more: dict[str, Any] = {"on_bad_sample": data.on_bad_sample, "bad_list": bad_list, "scale": (low, high)}
    return ShardPairs(source, spec, seed, **more) if isinstance(source, Shards) else CaptionedImages(source, spec, seed, **more)
