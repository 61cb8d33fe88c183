"""Grounded object identification: pictures, a region in each, and what the object there is called.

    regions = read_regions("m3it/data/classification/coco-goi/train.jsonl")
    regions = read_regions("coco/annotations/instances_val2017.json", images="coco")

M3IT's `coco-goi` is taken to be a JSON line an item: `image_base64_str` (text, or a list of one), `instruction`, `inputs`, `outputs`. The
label is `outputs`, without the letter of an option before it ("(B) dog"). The region is `bbox`, `box` or `region` of the row (or of its
`meta`), else the first four numbers in a row of `inputs` or `instruction`: left, top, right, bottom in pixels, or in shares of the
picture where none is above 1. An item without a region can be asked for the whole image only.
"""

import base64
import binascii
import json
import math
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from encoders.coco_files import read_coco
from mmkit.batches import derive_seed
from mmkit.errors import DataError
from mmkit.images import ImageError, open_image
from mmkit.records import read_jsonl

Split = Literal["train", "test"]
Box = tuple[float, float, float, float]  # left, top, right, bottom
_OPTION = re.compile(r"^\s*\(?[A-Z]{1,2}\)\s*|^\s*[A-Z]{1,2}\.\s+")
_NUMBERS = re.compile(r"(-?\d+(?:\.\d+)?)\s*,\s*(-?\d+(?:\.\d+)?)\s*,\s*(-?\d+(?:\.\d+)?)\s*,\s*(-?\d+(?:\.\d+)?)")
_NAMES: dict[Split, tuple[str, ...]] = {
    "train": ("train.jsonl", "instances_train*.json"),
    "test": ("val.jsonl", "test.jsonl", "instances_test*.json", "instances_val*.json"),
}


@dataclass(frozen=True)
class Regions:
    """Items of one split.

    Attributes:
        file: Where they were read.
        names: Ids, all different.
        labels: What the object of each is called.
        boxes: Left, top, right, bottom in pixels (or shares, see the head of this file); None where an item names no region.
        picture: Gives the whole picture of an item.
        files: The picture's file; "" where it has none of its own.
    """

    file: Path
    names: list[str]
    labels: dict[str, str]
    boxes: dict[str, Box | None]
    picture: Callable[[str], Path | bytes] = field(compare=False)
    files: dict[str, str] = field(default_factory=dict, compare=False)

    def __len__(self) -> int:
        return len(self.names)

    def cut(self, name: str) -> Image.Image:
        """Cut the region of an item out of its picture.

        Raises:
            ImageError: It has no region, or none of it is inside the picture.
        """
        box = self.boxes[name]
        if box is None:
            raise ImageError(f"{self.file}: item '{name}' names no region")
        picture = open_image(self.picture(name), f"item '{name}' of {self.file}")
        width, height = picture.size
        if max(box) <= 1:
            box = (box[0] * width, box[1] * height, box[2] * width, box[3] * height)
        left, top = max(0, math.floor(box[0])), max(0, math.floor(box[1]))
        right, bottom = min(width, math.ceil(box[2])), min(height, math.ceil(box[3]))
        if left >= right or top >= bottom:
            raise ImageError(f"{self.file}: the region {box} of item '{name}' has nothing of its picture ({width} x {height}) in it")
        return picture.crop((left, top, right, bottom))


def find_regions(data: str, split: Split) -> Path:
    """The file of a split in a folder: M3IT's train.jsonl and val.jsonl, or COCO's instances_train*.json and instances_val*.json.

    Raises:
        DataError: There is none, or there are several.
    """
    root = Path(data).expanduser()
    if not root.is_dir():
        raise DataError(f"--data {data}: there is no such folder; name the files themselves with --train and --test")
    for pattern in _NAMES[split]:
        for folder in (root, root / "coco", root / "annotations"):
            found = sorted(folder.glob(pattern))
            if len(found) > 1:
                raise DataError(
                    f"--data {data}: {len(found)} files {pattern} in {folder} ({found[0].name}, {found[1].name}); name one with --{split}"
                )
            if found:
                return found[0]
    raise DataError(f"--data {data}: no {split} file, one of {', '.join(_NAMES[split])}, in it, in coco/ or in annotations/")


def read_regions(file: Path, images: str = "", count: int = 0, seed: int = 0) -> Regions:
    """Read one split.

    Args:
        file: M3IT's JSON lines, or COCO's instances.
        images: Of COCO: the folder of the pictures, or the one above (with `train2017` for instances_train2017.json); "" looks beside it.
        count: So many items, drawn evenly; 0 is all. Of a COCO file each picture is asked once, for one of its objects.
        seed: Which object that is.

    Raises:
        DataError: The file is missing or of another format, or holds no item.
    """
    if not file.is_file():
        raise DataError(f"{file}: there is no such file; M3IT's .jsonl or COCO's instances .json was expected")
    found = _from_coco(file, images, seed) if file.suffix == ".json" else _from_m3it(file)
    if not len(found):
        raise DataError(f"{file} holds no item with a label")
    if 0 < count < len(found):
        found = replace(found, names=[found.names[index * len(found) // count] for index in range(count)])
    return found


# ---- COCO --------------------------------------------------------------------------------------------------------------------------------


def _from_coco(file: Path, images: str, seed: int) -> Regions:
    root = _image_folder(file, images)
    coco = read_coco(root, instances=file, keep_empty=False)
    if coco.classes is None:
        raise DataError(f"{file} names no categories")
    labels: dict[str, str] = {}
    boxes: dict[str, Box | None] = {}
    files: dict[str, str] = {}
    for image in coco.images:
        if image.objects:
            chosen = random.Random(derive_seed(seed, image.image_id)).choice(image.objects)
            name = str(chosen.annotation_id)
            labels[name], boxes[name], files[name] = coco.classes.names[chosen.label], chosen.box, str(root / image.file_name)
    return Regions(file, list(labels), labels, boxes, lambda name: Path(files[name]), files)


def _image_folder(file: Path, images: str) -> Path:
    """instances_train2017.json -> IMAGES/train2017, or IMAGES itself."""
    part = file.stem.removeprefix("instances_")
    homes = [Path(images).expanduser()] if images else [file.parent.parent / "images", file.parent.parent, file.parent]
    for home in homes:
        if (home / part).is_dir():
            return home / part
    if images and homes[0].is_dir():
        return homes[0]
    raise DataError(f"{file}: no folder '{part}' of its pictures in {', '.join(map(str, homes))}; give it with --images")


# ---- M3IT --------------------------------------------------------------------------------------------------------------------------------


def _from_m3it(file: Path) -> Regions:
    rows = read_jsonl(file)
    pictures: dict[str, str] = {}
    labels: dict[str, str] = {}
    boxes: dict[str, Box | None] = {}
    for number, row in enumerate(rows):
        picture = next((row[key] for key in ("image_base64_str", "image_str", "image") if row.get(key)), None)
        picture = picture[0] if isinstance(picture, list) else picture
        if not isinstance(picture, str) or not isinstance(row.get("outputs"), str):
            raise DataError(f"{file}, line {number + 1}: `image_base64_str` and `outputs` were expected; it has {', '.join(row)}")
        label = _OPTION.sub("", row["outputs"]).strip().rstrip(".").lower()
        if label:
            name = str(number)
            labels[name], boxes[name], pictures[name] = label, region_of(row), picture

    def decode(name: str) -> bytes:
        try:
            return base64.b64decode(pictures[name], validate=True)
        except (binascii.Error, ValueError) as error:
            raise ImageError(f"{file}, line {int(name) + 1}: its picture is no base64 ({error})") from error

    return Regions(file, list(labels), labels, boxes, decode)


def region_of(row: Mapping[str, Any]) -> Box | None:
    """The region of an M3IT row, where it names one."""
    meta = row.get("meta") or row.get("meta_data") or {}
    if isinstance(meta, str):
        try:
            meta = json.loads(meta)
        except ValueError:
            meta = {}
    for place in (row, meta if isinstance(meta, Mapping) else {}):
        for key in ("bbox", "box", "region"):
            value = place.get(key)
            if isinstance(value, list) and len(value) == 4 and all(isinstance(part, int | float) for part in value):
                return tuple(float(part) for part in value)  # type: ignore[return-value]
    for key in ("inputs", "instruction"):
        if isinstance(row.get(key), str) and (found := _NUMBERS.search(row[key])):
            left, top, right, bottom = (float(part) for part in found.groups())
            return left, top, right, bottom
    return None
