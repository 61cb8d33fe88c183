"""Image-caption pairs: drawn on the fly from the embedded world, or read from COCO captions, a JSON list, a folder, or shards."""

import json
import os
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from encoders.image_data import SUFFIXES, open_sample
from encoders.masking import Masks
from encoders.shards import SKIP_HINT, OnBad, Sample, Shards
from mmkit.batches import derive_seed
from mmkit.errors import DataError
from mmkit.images import ImageSpec, open_image
from mmkit.minidata import names as mini_names
from mmkit.minidata import world
from mmkit.records import read_jsonl

WHOLE = (1.0, 1.0)  # a scale: pictures are not cropped
CAPTION_EXTENSIONS = ("txt", "json")
Pair = tuple[Tensor, str]


class Pairs(Protocol):
    """What a contrastive training reads: as many pairs as `len` says, each a function of (epoch, index)."""

    def __len__(self) -> int: ...

    def caption(self, epoch: int, index: int) -> str:
        """Give the caption alone."""
        ...

    def get(self, epoch: int, index: int) -> Pair:
        """Give a picture uint8 [3, S, S] and its caption."""
        ...


class DrawnPairs:
    """Pairs of the embedded world, never the same twice; as many as asked for make an epoch.

    Pictures of one object are often captioned by its name alone ("a cat"): the zero-shot prompt, and the quickest way to learn 574 names.
    """

    def __init__(self, seed: int, length: int, single_share: float = 0.7, plain_share: float = 0.6) -> None:
        """Keep the settings.

        Args:
            seed: Seed of everything drawn.
            length: Pairs in an epoch.
            single_share: Share of pictures with one object.
            plain_share: Among these, the share whose caption is the name alone.
        """
        self.pairs = world.pairs(seed, length, single_share=single_share)
        self.plain_share = plain_share

    def __len__(self) -> int:
        return len(self.pairs)

    def caption(self, epoch: int, index: int) -> str:
        """The caption alone, as `get` gives it."""
        return self._captioned(epoch, index)[1]

    def get(self, epoch: int, index: int) -> Pair:
        """Picture uint8 [3, 96, 96] and caption."""
        scene, caption = self._captioned(epoch, index)
        return torch.from_numpy(world.render(scene)).permute(2, 0, 1).contiguous(), caption

    def _captioned(self, epoch: int, index: int) -> tuple[world.Scene, str]:
        from mmkit.minidata.language import caption

        scene, rng = self.pairs.scene(epoch, index)
        if len(scene.objects) == 1 and scene.word is None and rng.random() < self.plain_share:
            return scene, mini_names.with_article(scene.objects[0].name)
        return scene, caption(scene, rng)


class FilePairs(ABC):
    """What pairs from files have in common: crops as bytes, and what becomes of bad ones. Subclasses say `__len__`, `caption`, `_open`, `_name`.

    Args:
        spec: Size of a picture, and how it is resized.
        seed: Seeds crops, by (seed, epoch, index).
        training: Random crops; else the spec's own fixed way.
        on_bad_sample: "error" stops at a pair that cannot be read; "skip" lists it and takes the next good one in its place, so that all
            ranks have as many pairs.
        bad_list: Where "skip" writes down what it left out, a JSON line a pair. A file, since workers have no other way to tell.
        scale: Share of the area a random crop covers, from and to; `WHOLE` is the spec's own fixed way. Captions may say where things are:
            there is no flip.
    """

    def __init__(
        self,
        spec: ImageSpec,
        seed: int,
        training: bool = True,
        on_bad_sample: OnBad = "error",
        bad_list: Path | None = None,
        scale: tuple[float, float] = (0.6, 1.0),
    ) -> None:
        self.spec, self.seed, self.training, self.scale = spec, seed, training, scale
        self.on_bad_sample, self.bad_list = on_bad_sample, bad_list
        self.bad: dict[str, str] = {}

    @abstractmethod
    def __len__(self) -> int:
        """Give the number of pairs."""

    @abstractmethod
    def caption(self, epoch: int, index: int) -> str:
        """Give the caption this pair has in this epoch."""

    @abstractmethod
    def _open(self, index: int) -> Image.Image:
        """Read the picture of a pair."""

    @abstractmethod
    def name(self, index: int) -> str:
        """Give what a message calls the pair."""

    def get(self, epoch: int, index: int) -> Pair:
        """Give a picture uint8 [3, S, S] (or what is kept of it) and its caption.

        Raises:
            DataError: The pair cannot be read and `on_bad_sample` is "error", or no pair of the set can be read.
        """
        for offset in range(len(self)):
            place = (index + offset) % len(self)
            try:
                picture, caption = self._picture(epoch, place), self.caption(epoch, place)
            except DataError as error:
                if self.on_bad_sample != "skip":
                    raise type(error)(f"{error}{SKIP_HINT}") from error
                self.note(self.name(place), str(error))
                continue
            return picture, caption
        raise DataError(f"none of {len(self)} pairs can be read; the first: {next(iter(self.bad.values()))}")

    def _picture(self, epoch: int, place: int) -> Tensor:
        picture = self._open(place)
        if not self.training or self.scale == WHOLE:
            crop = self.spec.fit(picture)
        else:
            crop = self.spec.random_crop(picture, random.Random(derive_seed(self.seed, epoch, place)), scale=self.scale, flip=0.0)
        return torch.from_numpy(np.array(crop)).permute(2, 0, 1)

    def note(self, name: str, fault: str) -> None:
        """List a bad pair, once in each process."""
        if name in self.bad:
            return
        self.bad[name] = fault
        if self.bad_list is not None:
            with open(self.bad_list, "a", encoding="utf-8") as file:
                file.write(json.dumps({"pair": name, "error": fault}) + "\n")

    def bad_samples(self) -> dict[str, str]:
        """Give what was left out so far by all processes (and earlier parts of a resumed run): name and why."""
        if self.bad_list is None or not self.bad_list.is_file():
            return dict(self.bad)
        return {row["pair"]: row["error"] for row in read_jsonl(self.bad_list)}


class CaptionedImages(FilePairs):
    """Pairs of image files. An image with several captions shows another one each epoch.

    Args:
        records: Image file and its captions, at least one each.
        spec, seed, more: As in `FilePairs`.

    Attributes:
        kept: Gives what is kept of a picture by its name, such as a frozen encoder's features; in place of opening it.
    """

    kept: Callable[[str], Tensor] | None = None

    def __init__(self, records: Sequence[tuple[Path, tuple[str, ...]]], spec: ImageSpec, seed: int, **more: Any) -> None:
        super().__init__(spec, seed, **more)
        if not records:
            raise DataError("there are no image-caption pairs")
        self.records = list(records)

    def __len__(self) -> int:
        return len(self.records)

    def caption(self, epoch: int, index: int) -> str:
        captions = self.records[index][1]
        return captions[(epoch + index) % len(captions)]

    def _picture(self, epoch: int, place: int) -> Tensor:
        return super()._picture(epoch, place) if self.kept is None else self.kept(self.name(place))

    def _open(self, index: int) -> Image.Image:
        return open_image(self.records[index][0], where=f"pair {index}")

    def name(self, index: int) -> str:
        return str(self.records[index][0])


class ShardPairs(FilePairs):
    """Pairs of webdataset shards, as DataComp and img2dataset lay them: NAME.jpg and NAME.txt, or a NAME.json with a "caption".

    A .txt is one caption, all of it; a "caption" in a .json may be a list, of which another one is shown each epoch.

    Args:
        shards: Where the samples are.
        spec, seed, more: As in `FilePairs`.
    """

    def __init__(self, shards: Shards, spec: ImageSpec, seed: int, **more: Any) -> None:
        super().__init__(spec, seed, **more)
        self.shards = shards
        self.order = partial(shards.order, seed)
        if os.environ.get("RANK", "0") == "0":  # all ranks see the same shards
            for shard, fault in shards.bad.items():
                self.note(shard, fault)

    def __len__(self) -> int:
        return len(self.shards)

    def caption(self, epoch: int, index: int) -> str:
        captions = read_captions(self.shards, self.shards[index])
        return captions[(epoch + index) % len(captions)]

    def _open(self, index: int) -> Image.Image:
        return open_sample(self.shards, index)

    def name(self, index: int) -> str:
        sample = self.shards[index]
        return f"{sample.shard}/{sample.key}"


def read_captions(shards: Shards, sample: Sample) -> tuple[str, ...]:
    """Read the caption or captions of a sample.

    Raises:
        DataError: There is none; shard and member are named.
    """
    extension = sample.first(CAPTION_EXTENSIONS)
    if extension is None:
        there = ", ".join(sample.names.values())
        wanted = ", ".join(CAPTION_EXTENSIONS)
        raise DataError(f"sample '{sample.key}' of {sample.shard} has no caption ({wanted}); its members: {there}")
    place = sample.place(extension)
    try:
        text = shards.read(sample, extension).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{place} is no UTF-8 text: {error}") from error
    if extension == "txt":
        if not text.strip():
            raise DataError(f"{place}: the caption is empty")
        return (text.strip(),)
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{place} is no valid JSON: {error}") from error
    found = row.get("caption") if isinstance(row, Mapping) else None
    captions = (found,) if isinstance(found, str) else tuple(found) if isinstance(found, list) else ()
    if not captions or not all(isinstance(caption, str) and caption.strip() for caption in captions):
        raise DataError(f"{place}: 'caption' (text, or a list of texts) was expected, got {row!r:.80}")
    return tuple(caption.strip() for caption in captions)


class MaskedPairs:
    """Pairs with the patches that the image tower is to see, a function of (seed, epoch, index) as the pairs are."""

    def __init__(self, pairs: Pairs, masks: Masks) -> None:
        self.pairs, self.masks = pairs, masks
        if hasattr(pairs, "order"):
            self.order = pairs.order

    def __len__(self) -> int:
        return len(self.pairs)

    def get(self, epoch: int, index: int) -> tuple[Tensor, str, Tensor]:
        """Give a picture uint8 [3, S, S], its caption, and the kept patches [K]."""
        image, caption = self.pairs.get(epoch, index)
        return image, caption, self.masks.keep(epoch, index)[0]


def read_pairs(source: str, image_root: str = "") -> list[tuple[Path, tuple[str, ...]]]:
    """Read image-caption records.

    Args:
        source: A COCO captions JSON, a JSON list or JSON lines of {"image", "caption"}, or a folder of images with a `.txt` beside each.
        image_root: Folder the file names are relative to; by default the JSON's own.

    Returns:
        Image files with their captions, in the source's order.

    Raises:
        DataError: The file cannot be parsed, or a record lacks what it needs; file and record are named.
    """
    path = Path(source)
    if path.is_dir():
        return _folder_pairs(path)
    if not path.is_file():
        raise DataError(f"--data.source {source}: no such file or folder; give a captions JSON, a folder with .txt files, or minidata")
    root = Path(image_root) if image_root else path.parent
    try:
        text = path.read_text(encoding="utf-8")
        data = [json.loads(line) for line in text.splitlines() if line.strip()] if path.suffix == ".jsonl" else json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is no valid JSON: {error}") from error
    if isinstance(data, Mapping):
        return _coco_pairs(path, data, root)
    if not isinstance(data, list):
        kind = type(data).__name__
        raise DataError(f"{path}: a list of {{'image', 'caption'}} or COCO's {{'images', 'annotations'}} was expected, not a {kind}")
    return [_list_pair(path, number, row, root) for number, row in enumerate(data)]


def _folder_pairs(folder: Path) -> list[tuple[Path, tuple[str, ...]]]:
    images = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not images:
        raise DataError(f"{folder}: no images ({', '.join(SUFFIXES)}) in it")
    records = []
    for image in images:
        text = image.with_suffix(".txt")
        if not text.is_file():
            raise DataError(f"{image}: there is no {text.name} with its caption beside it")
        captions = tuple(line.strip() for line in text.read_text(encoding="utf-8").splitlines() if line.strip())
        if not captions:
            raise DataError(f"{text}: the caption is empty")
        records.append((image, captions))
    return records


def _coco_pairs(path: Path, data: Mapping[str, Any], root: Path) -> list[tuple[Path, tuple[str, ...]]]:
    if "images" not in data or "annotations" not in data:
        raise DataError(f"{path}: COCO captions hold 'images' and 'annotations'; this file has {', '.join(list(data)[:6]) or 'nothing'}")
    captions: dict[Any, list[str]] = {}
    for number, row in enumerate(data["annotations"]):
        if not isinstance(row, Mapping) or not isinstance(row.get("caption"), str) or "image_id" not in row:
            raise DataError(f"{path}, annotation {number}: 'image_id' and a 'caption' were expected, got {row!r:.80}")
        captions.setdefault(row["image_id"], []).append(row["caption"].strip())
    records = []
    for number, row in enumerate(data["images"]):
        if not isinstance(row, Mapping) or "id" not in row or not isinstance(row.get("file_name"), str):
            raise DataError(f"{path}, image {number}: 'id' and 'file_name' were expected, got {row!r:.80}")
        if row["id"] in captions:
            records.append((root / row["file_name"], tuple(captions[row["id"]])))
    if not records:
        raise DataError(f"{path}: none of its {len(data['images'])} images has a caption")
    return records


def _list_pair(path: Path, number: int, row: Any, root: Path) -> tuple[Path, tuple[str, ...]]:
    caption = row.get("caption") if isinstance(row, Mapping) else None
    captions = (caption,) if isinstance(caption, str) else tuple(caption or ())
    image = row.get("image") if isinstance(row, Mapping) else None
    if not isinstance(image, str) or not captions or not all(isinstance(text, str) and text.strip() for text in captions):
        raise DataError(f"{path}, record {number}: 'image' and 'caption' (text, or a list of texts) were expected, got {row!r:.80}")
    return root / image, tuple(text.strip() for text in captions)


def collate_pairs(tokenizer: Callable[[list[str]], Tensor]) -> Callable[[Sequence[Any]], dict[str, Tensor]]:
    """Make the function that turns pairs into {"images" [B, 3, S, S], "text_ids" [B, context]}, and "keep" [B, K] where they are masked."""

    def collate(pairs: Sequence[Any]) -> dict[str, Tensor]:
        images, captions, *keep = zip(*pairs, strict=True)
        batch = {"images": torch.stack(images), "text_ids": tokenizer(list(captions))}
        return {**batch, "keep": torch.stack(keep[0])} if keep else batch

    return collate


def sample_captions(dataset: Pairs, most: int = 20_000) -> Iterator[str]:
    """Captions to make a tokenizer from: all of a small set, or evenly spread ones of a large set. Bad ones are not for here to report."""
    step = max(1, len(dataset) // most)
    for index in range(0, len(dataset), step):
        try:
            yield dataset.caption(0, index)
        except DataError:
            if getattr(dataset, "on_bad_sample", "error") != "skip":
                raise


def held_out_drawings(seed: int, views: int) -> tuple[Tensor, Tensor, list[str]]:
    """Single objects drawn for testing: uint8 [N, 3, 96, 96], labels [N], and the trained names they index."""
    names = mini_names.object_names("trained")
    images, labels = [], []
    for view in range(views):
        for label, name in enumerate(names):
            rng = np.random.default_rng((seed, 7_919, view, label))  # a stream of its own: training draws from (seed, epoch, index)
            images.append(torch.from_numpy(world.render(world.sample_scene(rng, [name], 1))).permute(2, 0, 1))
            labels.append(label)
    return torch.stack(images), torch.tensor(labels), names
