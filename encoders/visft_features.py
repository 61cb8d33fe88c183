"""What ViSFT's heads are given: feature maps of a frozen (or LoRA-adapted) encoder on canvases of any size, computed or read from a cache.

    maps = FeatureMaps(encoder, pool=14)
    maps(pixels)                                  # uint8 [B, 3, S, S] -> [B, C, h, w]
    fill(cache, data, maps, device)               # every picture of a set goes through the encoder once; after that `data` gives maps

The map is the patch tokens behind the last block's final norm, nothing else: no neck. On a canvas of another size than the encoder's own the
position table is resampled in each forward, as the authors do (bicubic, no antialiasing); rotary tables are computed for the new grid.

Source: ViSFT (mmf/models/visft), its two towers.
"""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from timm.layers import Format
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from encoders.coco_data import CocoTask
from encoders.modeling import VisionEncoder
from encoders.placement import Placement
from encoders.resize import resize_positions
from mmkit.batches import derive_seed
from mmkit.errors import ConfigError, DataError
from mmkit.feature_cache import FeatureCache, FeatureKey, picture_digest, say_size, what_counts
from mmkit.images import to_images
from mmkit.ranks import gather
from mmkit.trainable import weights_hash

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class FeatureMaps:
    """Turns canvases into feature maps.

    Args:
        encoder: Its gradient flows where it is asked for; `torch.no_grad()` is the caller's.
        drop_cls: Leave the CLS token out of the sequence, as the authors trained.
        imagenet_norm: Normalise with ImageNet's mean and deviation in place of the encoder's own, as the authors did.
        pool: Side of the map after average pooling (the captioner's); 0 leaves it.

    Raises:
        ConfigError: `drop_cls` of a network that has no CLS token, or that pools or registers around it.
    """

    def __init__(self, encoder: VisionEncoder, *, drop_cls: bool = False, imagenet_norm: bool = False, pool: int = 0) -> None:
        self.encoder, self.drop_cls, self.pool = encoder, drop_cls, pool
        network: Any = encoder.network
        if drop_cls and (network.cls_token is None or encoder.num_prefix_tokens != 1):
            raise ConfigError(
                f"drop_cls: '{encoder.config.origin}' has {encoder.num_prefix_tokens} prefix tokens; one CLS token can be left out"
            )
        own = encoder.spec
        self.spec = replace(own, mean=IMAGENET_MEAN, std=IMAGENET_STD) if imagenet_norm else own

    def grid(self, canvas: int) -> int:
        """Give the side of the map of a canvas, before pooling.

        Raises:
            ConfigError: The canvas is no whole number of patches.
        """
        patch = int(self.encoder.config.patch_size or 1)
        if canvas < patch or canvas % patch:
            near = max(patch, canvas // patch * patch)
            raise ConfigError(f"a canvas of {canvas} px is no whole number of patches of {patch} px; the nearest below is {near} px")
        return canvas // patch

    def size(self, canvas: int) -> int:
        """Give the side of the map that comes out."""
        return self.pool or self.grid(canvas)

    def __call__(self, pixels: Tensor) -> Tensor:
        """Encode canvases uint8 [B, 3, S, S] to [B, C, h, w]."""
        side = self.grid(pixels.shape[-1])
        network: Any = self.encoder.network
        images = to_images(pixels, replace(self.spec, size=pixels.shape[-1])).to(network.patch_embed.proj.weight.dtype)
        with laid_out(network, side, self.encoder.grid, self.drop_cls):
            tokens = network.forward_features(images)[:, network.num_prefix_tokens :]  # [B, N, C]
        found = tokens.transpose(1, 2).unflatten(2, (side, side))
        return F.adaptive_avg_pool2d(found, self.pool) if self.pool else found

    def key(self, canvas: int, precision: str, stored: str) -> FeatureKey:
        """Give the key of a cache of these maps.

        Args:
            canvas: Side of the pictures' canvas.
            precision: How the forward computes, in words.
            stored: "computed" or "float16".
        """
        computed = str(self.encoder.network.patch_embed.proj.weight.dtype).removeprefix("torch.")
        side = self.size(canvas)
        return FeatureKey(
            tower=weights_hash(self.encoder),
            network=what_counts(self.encoder.config.to_dict()),
            spec={**asdict(self.spec), "canvas": canvas, "drop_cls": self.drop_cls},
            layer=-1,
            select="map" if side == self.grid(canvas) else f"map, pooled to {self.pool}",
            precision=precision,
            tokens=side * side,
            width=self.encoder.width,
            computed=computed,
            stored=computed if stored == "computed" else stored,
        )


@contextmanager
def laid_out(network: Any, side: int, own: tuple[int, int], drop_cls: bool) -> Iterator[None]:
    """Let a timm network take a square of side x side patches, with or without its CLS token, for the length of a forward.

    timm's own dynamic sizes resample positions with antialiasing, which the authors' towers do not; given a table of the right size, timm
    leaves it alone.

    Args:
        network: A VisionTransformer or an Eva.
        side: Patches down and across.
        own: What its position table is for.
        drop_cls: Leave CLS out.
    """
    if (side, side) == own and not drop_cls:
        yield
        return
    embed, parameters = network.patch_embed, network._parameters
    positions, token = parameters.get("pos_embed"), parameters.get("cls_token")
    prefix = 0 if getattr(network, "no_embed_class", False) else network.num_prefix_tokens
    changes: list[tuple[Any, str, Any]] = [
        (network, "dynamic_img_size", True),
        *((embed, name, value) for name, value in {"strict_img_size": False, "flatten": False, "output_fmt": Format.NHWC}.items()),
        (embed, "grid_size", (side, side)),
    ]
    if drop_cls:
        changes += [(part, "num_prefix_tokens", 0) for part in network.modules() if hasattr(part, "num_prefix_tokens")]
    rope: Any = getattr(network, "rope", None)
    if hasattr(rope, "update_feat_shape"):
        changes += [(rope, "feat_shape", rope.feat_shape), (rope, "pos_embed", rope.pos_embed)]  # restored; set by its own method
    before = [(part, name, getattr(part, name)) for part, name, _ in changes]
    try:
        if positions is not None:
            table = resize_positions(positions.detach(), (side, side), own, prefix, "bicubic")
            parameters["pos_embed"] = nn.Parameter(table[:, prefix:] if drop_cls else table, requires_grad=False)
        if drop_cls:
            parameters["cls_token"] = None
        for part, name, value in changes:
            setattr(part, name, value)
        if hasattr(rope, "update_feat_shape"):
            rope.update_feat_shape([side, side])
        yield
    finally:
        for part, name, value in before:
            setattr(part, name, value)
        parameters.update({name: kept for name, kept in (("pos_embed", positions), ("cls_token", token)) if name in parameters})


class TaskData:
    """Items of one task, with pixels or, once a cache is filled, with feature maps.

    Args:
        data: The pictures and targets.
        views: Each picture is laid out in so many ways, one epoch after the other, and then in these again; 0 is a new way each epoch.
            Captions and the matcher's points are drawn anew in each epoch all the same.
    """

    def __init__(self, data: CocoTask, views: int = 0) -> None:
        self.data, self.views = data, views
        self.cache: FeatureCache | None = None
        self._digests: dict[str, bytes] = {}

    def __len__(self) -> int:
        return len(self.data)

    def place(self, view: int, index: int) -> Placement:
        """Say how a picture lies in one of the views."""
        image, data = self.data.images[index], self.data
        return data.place(image.width, image.height, data.canvas, random.Random(derive_seed(data.seed, view, index)))

    def record(self, view: int, index: int) -> bytes:
        """Give what a cached map is found by: the picture's bytes, and how they are laid out.

        Raises:
            DataError: The picture cannot be read.
        """
        name = self.data.images[self.data.shown[index]].file_name
        if name not in self._digests:
            path = self.data.coco.root / name
            try:
                self._digests[name] = picture_digest(path)
            except OSError as error:
                raise DataError(f"image {path} cannot be read ({error.strerror})") from error
        return hashlib.sha256(self._digests[name] + repr((self.place(view, index), self.data.fill)).encode()).digest()

    def get(self, epoch: int, index: int) -> dict[str, Any] | None:
        """Give {"pixels": uint8 [3, S, S]} or {"features": [C, h, w]}, with "target"; None for a picture that was left out.

        Raises:
            DataError: The picture or its cached map cannot be read.
        """
        view = epoch % self.views if self.views else epoch
        if self.cache is None:
            item = self.data.get(view, index)
            if item is None or view == epoch:
                return item
            return {**item, "target": self._target(view, epoch, index)}
        record = self.record(view, index)
        if record not in self.cache:
            return None  # it could not be read when the cache was filled, and was to be skipped
        features = self.cache.read(record)  # [N, C]
        side = round(len(features) ** 0.5)
        return {"features": features.T.unflatten(1, (side, side)).contiguous(), "target": self._target(view, epoch, index)}

    def _target(self, view: int, epoch: int, index: int) -> dict[str, Tensor]:
        return self.data.target(self.data.images[index], self.place(view, index), epoch, index)


@torch.no_grad()
def fill(
    root: Path | str, data: TaskData, maps: FeatureMaps, key: FeatureKey, device: torch.device, batch_size: int = 32, rebuild: bool = False
) -> None:
    """Put the maps of all views into a cache; from then on `data` reads them. All ranks take part, each with its share.

    Args:
        root: The cache's folder; features of other keys may lie in it too.
        data: Its `views` must be above 0.
        maps: Of the encoder, on its device.
        key: From `maps.key`.
        device: Where to compute.
        batch_size: Pictures at once.
        rebuild: Throw away what is there.

    Raises:
        ConfigError: Pictures are laid out anew in each epoch, or the disk has no room.
        DataError: A picture or the cache cannot be read.
    """
    if not data.views:
        raise ConfigError("a feature cache needs a fixed number of views of each picture; pictures are laid out anew in each epoch")
    ranks, rank = _world()
    if rebuild and rank == 0:
        FeatureCache(root, key, rebuild=True)
    gather(None)
    cache = FeatureCache(root, key)
    places = [(view, index) for view in range(data.views) for index in range(len(data))]
    absent: dict[bytes, tuple[int, int]] = {}
    for view, index in places:
        if (record := _readable(data, view, index)) is not None and record not in cache:
            absent.setdefault(record, (view, index))
    say_size(cache, len(places), len(absent), rank)
    gather(None)  # nobody writes before all have looked
    mine = list(absent.items())[rank::ranks]
    with cache.writer() as writer, tqdm(total=len(mine), desc="feature cache", unit="image", disable=rank > 0 or not mine) as progress:
        for start in range(0, len(mine), batch_size):
            part = mine[start : start + batch_size]
            items = [(record, data.data.get(view, index)) for record, (view, index) in part]
            found = [(record, item["pixels"]) for record, item in items if item is not None]
            if found:
                features = maps(torch.stack([pixels for _, pixels in found]).to(device))  # [b, C, h, w]
                writer.append([record for record, _ in found], features.flatten(2).transpose(1, 2))
            progress.update(len(part))
    gather(None)
    cache.refresh()
    data.cache = cache


def _readable(data: TaskData, view: int, index: int) -> bytes | None:
    """Give a record's digest; None for a file that cannot be read, which `data.data.get` then lists, or refuses."""
    try:
        return data.record(view, index)
    except DataError:
        data.data.get(view, index)
        return None


def _world() -> tuple[int, int]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size(), torch.distributed.get_rank()
    return 1, 0
