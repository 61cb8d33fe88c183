"""Images without labels, from folders or webdataset shards: crops as bytes, each a function of (seed, epoch, index)."""

import json
import os
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from encoders.shards import IMAGE_EXTENSIONS, SKIP_HINT, Names, OnBad, Shards, find_shards, is_shard_name
from mmkit.batches import derive_seed
from mmkit.errors import DataError
from mmkit.images import ImageSpec, open_image
from mmkit.records import read_jsonl

SUFFIXES = {f".{extension}" for extension in IMAGE_EXTENSIONS}


def find_images(roots: Names) -> list[Path]:
    """Find all image files below one or several folders, sorted by their path in each; hidden files and folders are left out.

    A root may also be webdataset shards: "shards/{0000..0099}.tar", or a folder that holds tar files and no images; their paths are given.

    Raises:
        DataError: There is no such folder or shard, no image in it, or some roots hold images and others shards.
    """
    if not isinstance(roots, str | Path):
        found = [path for root in roots for path in find_images(root)]
        kinds = {is_shard_name(path) for path in found}
        if len(kinds) > 1:
            raise DataError(f"data.root {', '.join(map(str, roots))}: some are folders of images, others shards; give one kind")
        return found
    root = Path(roots).expanduser()
    if is_shard_name(root) and not root.is_dir():
        return find_shards(root)
    if not root.is_dir():
        raise DataError(
            f"data.root {root}: {'it is a file' if root.exists() else 'there is no such folder'}; give a folder with images in it, "
            "or shards as in shards/{0000..0099}.tar"
        )
    files = [path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES or path.suffix == ".tar"]
    files = sorted(path for path in files if path.is_file() and not any(part.startswith(".") for part in path.relative_to(root).parts))
    images = [path for path in files if path.suffix != ".tar"]
    if not files:
        raise DataError(f"data.root {root} holds no image ({', '.join(sorted(SUFFIXES))}) and no shard (.tar)")
    return images or files


class ImageFolder:
    """Random crops of all images below one or several folders, or in webdataset shards (which then bring an `order` of their own).

    Args:
        roots: The folder or folders, or the shards: see `find_images`.
        spec: Size of a crop, and the filter it is resized with.
        seed: The run's.
        scale, flip: Share of the area a crop covers, from and to; probability of mirroring.
        on_bad_sample: "error" stops at an image that cannot be read, a sample without one, a shard that is cut off or empty; "skip" leaves
            it out and lists it.
        bad_list: Where "skip" writes down what it left out, a JSON line an image. A file, since workers have no other way to tell.
        cache: Keep decoded images in memory (27 kB for 96 x 96 pixels): decoding small PNGs in each epoch costs as much as the crop.
        extra: Called with (epoch, index); its entries join the item (masks).
    """

    def __init__(
        self,
        roots: Names,
        spec: ImageSpec,
        *,
        seed: int = 0,
        scale: tuple[float, float] = (0.2, 1.0),
        flip: float = 0.5,
        on_bad_sample: OnBad = "error",
        bad_list: Path | None = None,
        cache: bool = False,
        extra: Callable[[int, int], dict[str, Tensor]] | None = None,
    ) -> None:
        self.paths = find_images(roots)
        self.shards = Shards(self.paths, on_bad_sample) if is_shard_name(self.paths[0]) else None
        if self.shards is not None:
            self.order = partial(self.shards.order, seed)
        self.spec, self.seed, self.scale, self.flip = spec, seed, scale, flip
        self.on_bad_sample, self.bad_list, self.extra = on_bad_sample, bad_list, extra
        self.cache: dict[int, np.ndarray] | None = {} if cache else None
        self._bad: set[int] = set()
        if self.shards is not None and os.environ.get("RANK", "0") == "0":  # all ranks see the same shards
            for shard, fault in self.shards.bad.items():
                self._write(shard, fault)

    def __len__(self) -> int:
        return len(self.paths if self.shards is None else self.shards)

    def get(self, epoch: int, index: int) -> dict[str, Any] | None:
        """Give {"pixels": uint8 [3, S, S]} and what `extra` adds; None for an image that was left out.

        Raises:
            DataError: The image cannot be read, or its sample has none, and `on_bad_sample` is "error".
        """
        if index in self._bad:
            return None
        try:
            image = self._image(index)
        except DataError as error:
            if self.on_bad_sample != "skip":
                raise type(error)(f"{error}{SKIP_HINT}") from error
            self._bad.add(index)
            self._write(self._name(index), str(error))
            return None
        generator = random.Random(derive_seed(self.seed, epoch, index))
        crop = self.spec.random_crop(image, generator, scale=self.scale, flip=self.flip)
        item: dict[str, Any] = {"pixels": torch.from_numpy(np.array(crop)).permute(2, 0, 1)}
        return {**item, **self.extra(epoch, index)} if self.extra else item

    def _image(self, index: int) -> Image.Image:
        if self.cache is None:
            return self._open(index)
        if index not in self.cache:
            self.cache[index] = np.array(self._open(index))
        return Image.fromarray(self.cache[index])

    def _open(self, index: int) -> Image.Image:
        if self.shards is not None:
            return open_sample(self.shards, index)
        return open_image(self.paths[index], f"image {index + 1} of {len(self.paths)}")

    def _name(self, index: int) -> str:
        if self.shards is None:
            return str(self.paths[index])
        sample = self.shards[index]
        return f"{sample.shard}/{sample.key}"

    def _write(self, name: str, fault: str) -> None:
        if self.bad_list is not None:
            with open(self.bad_list, "a", encoding="utf-8") as file:
                file.write(json.dumps({"image": name, "error": fault}) + "\n")

    def bad_images(self) -> dict[str, str]:
        """Give what was left out so far by all workers (and earlier parts of a resumed run): path and why."""
        if self.bad_list is None or not self.bad_list.is_file():
            return {}
        return {row["image"]: row["error"] for row in read_jsonl(self.bad_list)}


def open_sample(shards: Shards, index: int) -> Image.Image:
    """Open the image of a shard's sample, as RGB.

    Raises:
        DataError: The sample has no image; shard and key are named.
        ImageError: The image cannot be read; shard and member are named.
    """
    sample = shards[index]
    extension = sample.first(IMAGE_EXTENSIONS)
    if extension is None:
        there = ", ".join(sample.names.values())
        raise DataError(f"sample '{sample.key}' of {sample.shard} has no image ({', '.join(IMAGE_EXTENSIONS)}); its members: {there}")
    return open_image(shards.read(sample, extension), sample.place(extension))
