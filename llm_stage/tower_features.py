"""Filling a feature cache: every picture of a data set goes through the frozen tower once, before the first step.

    compute = TowerFeatures(model, device, autocast)
    dataset.image_source = cached_images(root, compute, feature_key(compute, tower_hash, spec, "computed"), wanted, image_root, spec, ...)

After that a data set gives features where it gave pixels, the frozen tower passes them on (`llm_stage.llava.freeze_tower`), and no process
runs it any more: so ranks cannot fall out of step over a picture that one of them has and another lacks.

Letters: n images, N image tokens, C channels of the tower.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import LlavaForConditionalGeneration

from encoders.image_batches import batches
from mmkit.errors import ConfigError, DataError
from mmkit.feature_cache import DTYPES, FeatureCache, FeatureKey, Stored, picture_digest, say_size, what_counts
from mmkit.images import ImageError, ImageSpec
from mmkit.snapshots import gather


class TowerFeatures:
    """Computes what the cache holds: the features of images, as the training would.

    Args:
        model: The LLaVA, its tower frozen (`freeze_tower`), before it is wrapped or sharded.
        device: Where to compute.
        autocast: Gives the context of the training's forward.
        cast: Type that the training's engine gives the tower's weights, where that is another one (DeepSpeed in half precision).
    """

    def __init__(
        self, model: LlavaForConditionalGeneration, device: torch.device, autocast: Callable[[], Any], cast: torch.dtype | None = None
    ) -> None:
        tower = model.model.vision_tower
        if any(hasattr(parameter, "ds_id") for parameter in tower.parameters()):
            raise ConfigError("a feature cache is filled before ZeRO-3 shards the tower; call cached_images before Run.prepare")
        self.tower = (deepcopy(tower).to(cast) if cast is not None else tower).to(device)
        self.config, self.device, self.autocast = model.config, device, autocast

    @property
    def dtype(self) -> torch.dtype:
        """Of the tower's weights."""
        return next(self.tower.parameters()).dtype

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Turn images [n, 3, H, W] into features [n, N, C] on the same device."""
        layer = self.config.vision_feature_layer
        with self.autocast():
            output = self.tower(images.to(self.device, self.dtype), output_hidden_states=layer, return_dict=True)
        states: Tensor = output.hidden_states[layer]
        return states[:, 1:] if self.config.vision_feature_select_strategy == "default" else states


def feature_key(compute: TowerFeatures, tower_hash: str, spec: ImageSpec, stored: Stored) -> FeatureKey:
    """Describe what `compute` gives; it is run once, on a blank image."""
    features = compute(torch.zeros(1, 3, spec.size, spec.size))
    computed = str(features.dtype).removeprefix("torch.")
    config = compute.config
    with compute.autocast():
        forward = "autocast" if torch.is_autocast_enabled(compute.device.type) else "plain"
    return FeatureKey(
        tower=tower_hash, network=what_counts(config.vision_config.to_dict()), spec=spec.to_dict(), layer=config.vision_feature_layer,
        select=config.vision_feature_select_strategy, precision=f"{compute.dtype} {forward}".removeprefix("torch."),
        tokens=features.shape[1], width=features.shape[2], computed=computed, stored=computed if stored == "computed" else stored,
    )  # fmt: skip


class CachedImages:
    """Gives the features of a picture by its name; takes the place of opening it (`ConversationDataset.image_source`).

    Args:
        cache: Holds them all.
        digests: Name to the digest of its file.
        broken: Name to what is wrong with a picture that could not be opened.
    """

    def __init__(self, cache: FeatureCache, digests: Mapping[str, bytes], broken: Mapping[str, str]) -> None:
        self.cache, self.digests, self.broken = cache, digests, broken

    def __call__(self, name: str) -> Tensor:
        """Features [N, C].

        Raises:
            ImageError: The picture cannot be read.
        """
        if name in self.broken:
            raise ImageError(self.broken[name])
        return self.cache.read(self.digests[name])

    def blank(self) -> Tensor:
        """Features [1, N, C] for a row that is there for its shape alone."""
        key = self.cache.key
        return torch.zeros(1, key.tokens, key.width, dtype=DTYPES[key.computed])


def cached_images(
    root: Path | str, compute: Callable[[Tensor], Tensor], key: FeatureKey, wanted: Mapping[str, str], image_root: Path, spec: ImageSpec,
    *, batch_size: int, workers: int = 0, rebuild: bool = False, rank: int = 0, ranks: int = 1,
) -> CachedImages:  # fmt: skip
    """Open a cache and compute what it lacks; every process takes its share. After that the tower need not run any more.

    Args:
        root: The cache's folder, which all processes must see.
        compute: Gives features of images.
        key: Of what `compute` gives.
        wanted: Picture's name to the row that wants it, for messages.
        image_root: Folder that the names are relative to.
        spec: Of the images.
        batch_size: Images at once. Sums may be taken in another order at another size: with that of the training the bits are the same.
        workers: Processes that open pictures.
        rebuild: Begin with an empty cache.
        rank, ranks: This process, and how many there are.

    Raises:
        DataError: The cache is damaged, or not the same folder for all processes.
        ConfigError: The disk has no room for what is missing.
    """
    if rank == 0:
        FeatureCache(root, key, rebuild=rebuild)
    gather(None)  # nobody looks before an old cache is gone
    cache = FeatureCache(root, key)
    digests, broken = _digests(sorted(wanted)[rank::ranks], wanted, image_root, ranks)
    absent: dict[bytes, str] = {}  # of each content one name, the same for all processes
    for name in sorted(digests):
        if digests[name] not in cache:
            absent.setdefault(digests[name], name)
    say_size(cache, len(set(digests.values())), len(absent), rank)
    gather(None)  # nobody writes before all have looked
    broken |= _fill(cache, compute, list(absent.values())[rank::ranks], digests, wanted, image_root, spec, batch_size, workers, rank)
    for found in gather(broken):
        broken |= found
    cache.refresh()
    bad = {digests[name]: message for name, message in broken.items() if name in digests}
    broken |= {name: bad[digest] for name, digest in digests.items() if digest in bad}  # other names of the same file
    lost = [name for name, digest in digests.items() if digest not in cache and name not in broken]
    if lost:
        raise DataError(
            f"{cache.folder} does not hold {len(lost)} of {len(digests)} pictures that were just put there, the first is {lost[0]}: is it one "
            "folder for all machines? Name one on a shared disk"
        )
    return CachedImages(cache, digests, broken)


def _digests(mine: Sequence[str], wanted: Mapping[str, str], image_root: Path, ranks: int) -> tuple[dict[str, bytes], dict[str, str]]:
    """Digests of all pictures by name, and what is wrong with those that cannot be read; each process reads its share."""

    def digest(name: str) -> bytes | str:
        try:
            return picture_digest(image_root / name)
        except OSError as error:
            return f"image {image_root / name} cannot be read ({error.strerror}) ({wanted[name]})"

    with ThreadPoolExecutor(8) as pool:  # reading and hashing leave Python's lock alone
        found = dict(zip(mine, pool.map(digest, mine), strict=True))
    merged = {name: value for part in gather(found) for name, value in part.items()} if ranks > 1 else found
    return (
        {name: value for name, value in merged.items() if isinstance(value, bytes)},
        {name: value for name, value in merged.items() if isinstance(value, str)},
    )


def _fill(
    cache: FeatureCache, compute: Callable[[Tensor], Tensor], names: Sequence[str], digests: Mapping[str, bytes], wanted: Mapping[str, str],
    image_root: Path, spec: ImageSpec, batch_size: int, workers: int, rank: int,
) -> dict[str, str]:  # fmt: skip
    """Compute and write the features of some pictures.

    Returns:
        What is wrong with those that could not be opened, by name.
    """
    broken: dict[str, str] = {}
    with cache.writer() as writer, tqdm(total=len(names), desc="feature cache", unit="image", disable=rank > 0 or not names) as progress:
        for read, images, failed in batches(lambda name: image_root / name, names, spec, batch_size, workers):
            if read:
                writer.append([digests[name] for name in read], compute(images))
            broken |= {bad.name: f"{bad.reason} ({wanted[bad.name]})" for bad in failed}
            progress.update(len(read) + len(failed))
    return broken
