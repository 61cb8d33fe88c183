"""Folders of classes: one folder of images a class; held-out shares of them; augmented crops, each a function of (seed, epoch, index)."""

import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from timm.data import create_transform

from encoders.image_data import SUFFIXES
from mmkit.batches import derive_seed
from mmkit.errors import ConfigError, DataError
from mmkit.images import ImageError, ImageSpec, open_image
from mmkit.records import read_jsonl

OnBad = Literal["error", "skip"]


@dataclass(frozen=True)
class ClassFolders:
    """Images and their classes.

    Attributes:
        root: Folder that `paths` are relative to.
        names: Class names, in the order of the labels.
        paths: Image files.
        labels: Index into `names` of each.
    """

    root: Path
    names: tuple[str, ...]
    paths: tuple[str, ...]
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, indices: Sequence[int]) -> "ClassFolders":
        """Give some of the images, the classes unchanged."""
        return ClassFolders(self.root, self.names, tuple(self.paths[i] for i in indices), tuple(self.labels[i] for i in indices))


def read_class_folders(root: str | Path, setting: str) -> ClassFolders:
    """List a folder of class folders, images at any depth below each, all sorted; hidden ones are left out.

    Args:
        root: The folder.
        setting: Where it was given ("--data.train"), for the message.

    Raises:
        DataError: It does not exist, has no class folders, or one of them holds no image.
    """
    root = Path(root).expanduser()
    if not root.is_dir():
        raise DataError(
            f"{setting} {root}: {'it is a file' if root.exists() else 'there is no such folder'}; one folder a class was expected in it"
        )
    names = tuple(sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")))
    if not names:
        raise DataError(f"{setting} {root}: one folder a class was expected in it, with that class's images; it has no folders")
    paths: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        found = [path.relative_to(root) for path in (root / name).rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file()]
        shown = sorted(path.as_posix() for path in found if not any(part.startswith(".") for part in path.parts))
        if not shown:
            raise DataError(
                f"{setting} {root}: class folder '{name}' holds no image ({', '.join(sorted(SUFFIXES))}); "
                "fill it, or take it away from training and test alike"
            )
        paths += shown
        labels += [label] * len(shown)
    return ClassFolders(root, names, tuple(paths), tuple(labels))


def match_classes(train: ClassFolders, test: ClassFolders, subset: bool, setting: str = "--data.test") -> ClassFolders:
    """Give the test images the labels of the training classes.

    Args:
        train: Whose classes count.
        test: Read by itself, so its labels are its own.
        subset: Allow training classes that the test folder lacks (ImageNet-A and -R have 200 of 1000).
        setting: Where the test folder was given, for the message.

    Raises:
        DataError: The folders differ in their classes.
    """
    label_of = {name: label for label, name in enumerate(train.names)}
    strange = [name for name in test.names if name not in label_of]
    absent = [name for name in train.names if name not in set(test.names)]
    if strange:
        raise DataError(
            f"{setting} {test.root}: {len(strange)} of {len(test.names)} class folders are no classes of {train.root} "
            f"({_some(strange)}); both need the same folder names"
        )
    if absent and not subset:
        raise DataError(
            f"{setting} {test.root} lacks {len(absent)} of {len(train.names)} classes of {train.root} ({_some(absent)}); "
            "add them, or allow a test of some classes only: --data.test_subset"
        )
    return ClassFolders(test.root, train.names, test.paths, tuple(label_of[test.names[label]] for label in test.labels))


def _some(names: Sequence[str]) -> str:
    return ", ".join(f"'{name}'" for name in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def only_classes(data: ClassFolders, names: Sequence[str]) -> ClassFolders:
    """Keep the images of some classes, labelled in the order of `names`."""
    label_of = {name: label for label, name in enumerate(names)}
    kept = [
        (path, label_of[data.names[label]]) for path, label in zip(data.paths, data.labels, strict=True) if data.names[label] in label_of
    ]
    return ClassFolders(data.root, tuple(names), tuple(path for path, _ in kept), tuple(label for _, label in kept))


def spread(names: Sequence[str], count: int) -> list[str]:
    """Take `count` names, evenly spaced; 0 takes all.

    Raises:
        ConfigError: There are not so many.
    """
    if count > len(names):
        raise ConfigError(f"data.max_classes is {count}; the training folder has {len(names)} classes")
    return [names[place * len(names) // count] for place in range(count)] if count else list(names)


def hold_out(data: ClassFolders, share: float, seed: int) -> tuple[ClassFolders, ClassFolders]:
    """Split off a share of the images to choose weights on, evenly over the classes; a class always keeps an image to train on.

    Returns:
        What is trained on, and what is held out (empty if `share` is 0).

    Raises:
        ConfigError: The share is so small that nothing is held out.
    """
    members: dict[int, list[int]] = {}
    for index, label in enumerate(data.labels):
        members.setdefault(label, []).append(index)
    held: set[int] = set()
    owed = 0.0
    order = sorted(members)
    random.Random(derive_seed(seed, 17)).shuffle(order)  # small classes give an image each to a share of the classes, not the first ones
    for label in order:
        owed += share * len(members[label])
        count = min(int(owed + 1e-9), len(members[label]) - 1)
        owed -= count
        held.update(random.Random(derive_seed(seed, label)).sample(members[label], count))
    if share > 0 and not held:
        raise ConfigError(f"data.held_out {share} of {len(data)} images is not one image: give more, or 0 to choose no epoch by it")
    kept = [index for index in range(len(data)) if index not in held]
    return data.take(kept), data.take(sorted(held))


@dataclass
class AugmentConfig:
    """How training images are varied; timm's transforms."""

    auto: str = field(
        default="rand-m9-mstd0.5-inc1", metadata={"help": "timm's name: rand-..., 3a (3-Augment), augmix-...; empty for none"}
    )
    crop: Literal["rrc", "rkrc", "rkrr"] = field(
        default="rrc", metadata={"help": "random resized crop, or timm's resize-keep-ratio with centre or random crop"}
    )
    scale: list[float] = field(default_factory=lambda: [0.08, 1.0], metadata={"help": "share of the area a crop covers, from and to"})
    flip: float = field(default=0.5, metadata={"help": "probability of mirroring left and right"})
    color_jitter: float = field(default=0.4, metadata={"help": "ignored beside rand-... and augmix-..., as timm does"})
    random_erase: float = field(default=0.25, metadata={"help": "probability of a box of noise, after normalisation"})
    mixup: float = field(default=0.0, metadata={"help": "alpha; mixes within a micro-batch"})
    cutmix: float = field(default=0.0, metadata={"help": "alpha; mixes within a micro-batch"})

    def validate(self) -> None:
        """Refuse shares that are none, and names timm does not know.

        Raises:
            ConfigError: The message names the setting.
        """
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ConfigError(f"augment.scale is {self.scale}; two shares of the area, from and to, as in [0.08, 1.0], are right")
        for name in ("flip", "random_erase"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"augment.{name} is {getattr(self, name)}; a probability from 0 to 1 is right")
        if min(self.mixup, self.cutmix, self.color_jitter) < 0:
            raise ConfigError(f"augment.mixup {self.mixup}, cutmix {self.cutmix}, color_jitter {self.color_jitter}: 0 or more is right")
        if self.auto and not self.auto.startswith(("rand", "augmix", "3a", "original", "v0")):
            raise ConfigError(f"augment.auto is '{self.auto}'; timm knows rand-..., augmix-..., 3a, original, v0 (as rand-m9-mstd0.5-inc1)")
        try:
            self.transform(ImageSpec(size=32))
        except (AssertionError, KeyError, ValueError, TypeError) as error:
            raise ConfigError(f"augment: timm cannot make '{self.auto}' ({type(error).__name__}: {error})") from error

    def transform(self, spec: ImageSpec) -> Any:
        """Make the function from an RGB picture to a normalised tensor [3, size, size]; it draws from the global generators."""
        return create_transform(
            spec.size,
            is_training=True,
            train_crop_mode=self.crop,
            auto_augment=self.auto or None,
            interpolation=spec.interpolation,
            scale=(self.scale[0], self.scale[1]),
            hflip=self.flip,
            color_jitter=self.color_jitter or None,
            re_prob=self.random_erase,
            re_mode="pixel",
            re_count=1,
            mean=spec.mean,
            std=spec.std,
        )


class LabelledImages:
    """Augmented training images with their labels.

    `mmkit.batches` seeds all global generators by (seed, epoch, index) before an item is made, and timm's transforms draw from those: so an
    item does not depend on ranks, workers or restarts.

    Args:
        data: The images.
        transform: From an RGB picture to a tensor.
        on_bad_sample: "error" stops at an image that cannot be read; "skip" leaves it out and lists it.
        bad_list: Where "skip" writes what it left out, a JSON line an image.
        cache: Keep decoded images in memory, for small sets.
    """

    def __init__(
        self, data: ClassFolders, transform: Any, *, on_bad_sample: OnBad = "error", bad_list: Path | None = None, cache: bool = False
    ) -> None:
        self.data, self.transform, self.on_bad_sample, self.bad_list = data, transform, on_bad_sample, bad_list
        self.cache: dict[int, np.ndarray] | None = {} if cache else None
        self._bad: set[int] = set()

    def __len__(self) -> int:
        return len(self.data)

    def get(self, epoch: int, index: int) -> dict[str, Any] | None:
        """Give {"images": [3, S, S], "labels": int}, or None for an image that was left out.

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
            self._bad.add(index)
            if self.bad_list is not None:
                with open(self.bad_list, "a", encoding="utf-8") as file:
                    file.write(json.dumps({"image": self.data.paths[index], "error": str(error)}) + "\n")
            return None
        return {"images": self.transform(image), "labels": self.data.labels[index]}

    def _image(self, index: int) -> Image.Image:
        if self.cache is None or index not in self.cache:
            image = open_image(self.data.root / self.data.paths[index], f"image {index + 1} of {len(self.data)}")
            if self.cache is None:
                return image
            self.cache[index] = np.array(image)
        return Image.fromarray(self.cache[index])

    def bad_images(self) -> dict[str, str]:
        """Give what was left out so far by all workers (and earlier parts of a resumed run): path and why."""
        if self.bad_list is None or not self.bad_list.is_file():
            return {}
        return {row["image"]: row["error"] for row in read_jsonl(self.bad_list)}


def describe_classes(data: ClassFolders) -> str:
    """Put a set into a few words: images, classes, how many a class."""
    counts = Counter(data.labels)
    each = sorted({counts[label] for label in range(len(data.names))})
    return f"{len(data)} images of {len(data.names)} classes ({each[0]} to {each[-1]} each)" if len(data) else "no images"
