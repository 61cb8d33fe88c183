"""Image-caption pairs: drawn on the fly from the embedded world, or read from COCO captions, a JSON list, or a folder."""

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmkit.batches import derive_seed
from mmkit.errors import DataError
from mmkit.images import ImageError, ImageSpec, open_image
from mmkit.minidata import names as mini_names
from mmkit.minidata import world

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
Pair = tuple[Tensor, str]


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


class CaptionedImages:
    """Pairs from files. An image with several captions shows another one each epoch."""

    def __init__(
        self,
        records: Sequence[tuple[Path, tuple[str, ...]]],
        spec: ImageSpec,
        seed: int,
        training: bool = True,
        on_bad_sample: str = "error",
    ) -> None:
        """Keep the records; images are opened when asked for.

        Args:
            records: Image file and its captions, at least one each.
            spec: How a picture becomes a tensor.
            seed: Seeds crops, flips and the choice of captions, by (seed, epoch, index).
            training: Random crops.
            on_bad_sample: "error" stops at an unreadable image; "skip" lists it in `bad` and takes the next good one in its place.
        """
        if not records:
            raise DataError("there are no image-caption pairs")
        self.records, self.seed, self.on_bad_sample = list(records), seed, on_bad_sample
        self.spec, self.training = spec, training
        self.bad: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self.records)

    def caption(self, epoch: int, index: int) -> str:
        """The caption this pair has in this epoch."""
        captions = self.records[index][1]
        return captions[(epoch + index) % len(captions)]

    def get(self, epoch: int, index: int) -> Pair:
        """Picture float [3, H, W], normalised, and caption.

        Raises:
            ImageError: The image cannot be read and `on_bad_sample` is "error", or no image of the set can be read.
        """
        for offset in range(len(self.records)):
            place = (index + offset) % len(self.records)
            path = self.records[place][0]
            try:
                picture = open_image(path, where=f"pair {place}")
            except ImageError as error:
                if self.on_bad_sample != "skip":
                    raise ImageError(f"{error}\n  --data.on_bad_sample skip leaves such images out, counted") from error
                self.bad.setdefault(str(path), str(error))
                continue
            if not self.training:
                return self.spec.transform(training=False)(picture), self.caption(epoch, place)
            generator = random.Random(derive_seed(self.seed, epoch, place))
            # Captions may say where things are: no flip.
            return self.spec.training_transform(picture, generator, scale=(0.6, 1.0), flip=0.0), self.caption(epoch, place)
        raise ImageError(f"none of {len(self.records)} images can be read; the first: {next(iter(self.bad.values()))}")


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


def collate_pairs(tokenizer: Callable[[list[str]], Tensor]) -> Callable[[Sequence[Pair]], dict[str, Tensor]]:
    """Make the function that turns pairs into {"images" [B, 3, H, W], "text_ids" [B, context]}."""

    def collate(pairs: Sequence[Pair]) -> dict[str, Tensor]:
        return {"images": torch.stack([image for image, _ in pairs]), "text_ids": tokenizer([caption for _, caption in pairs])}

    return collate


def sample_captions(dataset: DrawnPairs | CaptionedImages, most: int = 20_000) -> Iterator[str]:
    """Captions to make a tokenizer from: all of a small set, or evenly spread ones of a large set."""
    step = max(1, len(dataset) // most)
    for index in range(0, len(dataset), step):
        yield dataset.caption(0, index)


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
