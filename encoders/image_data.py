"""Folders of images, without labels: crops as bytes, each a function of (seed, epoch, index)."""

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmkit.batches import derive_seed
from mmkit.errors import DataError
from mmkit.images import ImageError, ImageSpec, open_image
from mmkit.records import read_jsonl

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}
OnBad = Literal["error", "skip"]
Roots = Path | str | Sequence[Path | str]


def find_images(roots: Roots) -> list[Path]:
    """Find all image files below one or several folders, sorted by their path in each; hidden files and folders are left out.

    Raises:
        DataError: There is no such folder, or no image in it.
    """
    if not isinstance(roots, str | Path):
        return [path for root in roots for path in find_images(root)]
    root = Path(roots).expanduser()
    if not root.is_dir():
        raise DataError(
            f"data.root {root}: {'it is a file' if root.exists() else 'there is no such folder'}; give a folder with images in it"
        )
    found = [path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file()]
    found = sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(root).parts))
    if not found:
        raise DataError(f"data.root {root} holds no image ({', '.join(sorted(SUFFIXES))})")
    return found


class ImageFolder:
    """Random crops of all images below one or several folders.

    Args:
        roots: The folder or folders.
        spec: Size of a crop, and the filter it is resized with.
        seed: The run's.
        scale, flip: Share of the area a crop covers, from and to; probability of mirroring.
        on_bad_sample: "error" stops at an image that cannot be read; "skip" leaves it out and lists it.
        bad_list: Where "skip" writes down what it left out, a JSON line an image. A file, since workers have no other way to tell.
        cache: Keep decoded images in memory (27 kB for 96 x 96 pixels): decoding small PNGs in each epoch costs as much as the crop.
        extra: Called with (epoch, index); its entries join the item (masks).
    """

    def __init__(
        self,
        roots: Roots,
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
        self.spec, self.seed, self.scale, self.flip = spec, seed, scale, flip
        self.on_bad_sample, self.bad_list, self.extra = on_bad_sample, bad_list, extra
        self.cache: dict[int, np.ndarray] | None = {} if cache else None
        self._bad: set[int] = set()

    def __len__(self) -> int:
        return len(self.paths)

    def get(self, epoch: int, index: int) -> dict[str, Any] | None:
        """Give {"pixels": uint8 [3, S, S]} and what `extra` adds; None for an image that was left out.

        Raises:
            ImageError: The image cannot be read and `on_bad_sample` is "error".
        """
        if index in self._bad:
            return None
        try:
            image = self._image(index)
        except ImageError as error:
            if self.on_bad_sample != "skip":
                raise ImageError(f"{error}\n  --data.on_bad_sample skip leaves such images out, counted and listed") from error
            self._note(index, error)
            return None
        generator = random.Random(derive_seed(self.seed, epoch, index))
        crop = self.spec.random_crop(image, generator, scale=self.scale, flip=self.flip)
        item: dict[str, Any] = {"pixels": torch.from_numpy(np.array(crop)).permute(2, 0, 1)}
        return {**item, **self.extra(epoch, index)} if self.extra else item

    def _image(self, index: int) -> Image.Image:
        if self.cache is None:
            return open_image(self.paths[index], f"image {index + 1} of {len(self.paths)}")
        if index not in self.cache:
            self.cache[index] = np.array(open_image(self.paths[index], f"image {index + 1} of {len(self.paths)}"))
        return Image.fromarray(self.cache[index])

    def _note(self, index: int, error: ImageError) -> None:
        self._bad.add(index)
        if self.bad_list is not None:
            with open(self.bad_list, "a", encoding="utf-8") as file:
                file.write(json.dumps({"image": str(self.paths[index]), "error": str(error)}) + "\n")

    def bad_images(self) -> dict[str, str]:
        """Give what was left out so far by all workers (and earlier parts of a resumed run): path and why."""
        if self.bad_list is None or not self.bad_list.is_file():
            return {}
        return {row["image"]: row["error"] for row in read_jsonl(self.bad_list)}
