"""COCO's panoptic format: a PNG an image, whose colours are segment ids, and a JSON file that says what each segment is.

    coco = read_panoptic(Path("coco/train2017"), Path("annotations/panoptic_train2017.json"))     # PNGs in annotations/panoptic_train2017/
    coco.images[0].objects[0].mask()             # uint8 [height, width]; things and stuff alike

A segment becomes a `CocoObject`, so that whatever draws masks draws these. Id 0 is void: nobody said what is there. Crowds are left out of the
objects; scoring reads them from the file's content.

Source: COCO's format description; Panoptic Segmentation (Kirillov et al., 2019).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from encoders.coco_files import CocoImage, CocoObject, CocoSet, LeftOut, OnBad, classes_of, image_rows, load_coco_json, on_disk
from mmkit.errors import DataError

VOID = 0


@dataclass(frozen=True)
class Segment:
    """Where a segment's mask is: a file, and its id there."""

    file: Path
    number: int

    def mask(self, size: tuple[int, int]) -> np.ndarray:
        """Draw it: uint8 [height, width], 0 or 1.

        Raises:
            DataError: No pixel of the PNG has its id.
        """
        found = segment_ids(self.file, size) == self.number
        if not found.any():
            raise DataError(f"{self.file} has no pixel of segment {self.number}, which the JSON file lists: are PNGs and JSON of one set?")
        return found.astype(np.uint8)


def read_panoptic(root: Path, file: Path, pngs: Path | None = None, on_bad: OnBad = "error") -> CocoSet:
    """Read a panoptic set.

    Args:
        root: Folder of the pictures.
        file: The JSON.
        pngs: Folder of the segment PNGs; None is the folder beside the JSON that has its name.
        on_bad: "skip" leaves out faulty segments and missing images, counted.

    Returns:
        The set; `things` says of each label whether it is a thing, `panoptic` is the file's content.

    Raises:
        DataError: A file or the PNGs' folder is missing, damaged or not of this format; something in it is faulty; it is named.
    """
    if not root.is_dir():
        raise DataError(f"--data.images {root}: there is no such folder; it should hold the images that the annotations name")
    content = load_coco_json(file)
    pngs = file.with_suffix("") if pngs is None else pngs
    if not pngs.is_dir():
        raise DataError(f"{file} needs its segment PNGs in {pngs}: there is no such folder")
    classes, out = classes_of(content, file), LeftOut(file, on_bad)
    rows = image_rows(content, file)
    if unsaid := next((row for row in content["categories"] if row.get("isthing") not in (0, 1)), None):
        raise DataError(f"{file}: category {unsaid['id']} ('{unsaid['name']}') does not say whether it is a thing: isthing 0 or 1")
    kinds = {int(row["id"]): bool(row["isthing"]) for row in content["categories"]}
    told: set[int] = set()
    labels, present = classes.label_of(), {path.name for path in pngs.iterdir()}
    for annotation in content["annotations"]:
        image, name = annotation.get("image_id"), str(annotation.get("file_name", ""))
        if image not in rows:
            out.fault("its image is not in the file's list of images", f"annotation of image {image}", "Complete the list")
        elif name not in present:
            out.fault(f"its PNG '{name}' is not in {pngs}", f"annotation of image {image}", "Unpack the PNGs beside the JSON file")
        elif image in told:
            out.fault("it is annotated twice", f"image {image}", "Keep one annotation of each image")
        elif (wrong := _fault(annotation)) is not None:
            out.fault(wrong, f"annotation of image {image}", "Repair it")
        else:
            told.add(image)
            size = rows[image]["height"], rows[image]["width"]
            for segment in annotation["segments_info"]:
                if (found := _object(segment, image, labels, Segment(pngs / name, int(segment["id"])), size, out)) is not None:
                    rows[image]["objects"].append(found)
    images = [
        CocoImage(number, row["file_name"], row["width"], row["height"], tuple(row["objects"])) for number, row in sorted(rows.items())
    ]
    images = on_disk(images, root, out, keep_empty=False)
    if not images:
        raise DataError(f"{file}: no image is left to train on: {'; '.join(out.lines().values()) or 'it lists none'}")
    things = tuple(kinds[number] for number in classes.ids)
    return CocoSet(root, tuple(images), classes, out.lines(), things=things, panoptic={**content, "pngs": pngs})


def _fault(annotation: Mapping[str, Any]) -> str | None:
    """Say what is wrong with an image's list of segments, or None."""
    segments = annotation.get("segments_info")
    if not isinstance(segments, list) or not all(isinstance(segment, dict) for segment in segments):
        return "it has no list segments_info"
    for segment in segments:
        box = segment.get("bbox")
        numbers = isinstance(box, list) and len(box) == 4 and all(isinstance(edge, int | float) for edge in box)
        if not isinstance(segment.get("id"), int) or not numbers:
            return f"segment {str(segment)[:80]} needs an id and a bbox of four numbers"
    ids = [segment["id"] for segment in segments]
    twice = next((number for number in ids if ids.count(number) > 1), None)
    return None if twice is None else f"segment {twice} is there twice"


def _object(
    segment: Mapping[str, Any], image: int, labels: Mapping[int, int], where: Segment, size: tuple[int, int], out: LeftOut
) -> CocoObject | None:
    """One segment as an object; None for what is left out."""
    what, category = f"segment {segment['id']} (image {image})", segment.get("category_id")
    if category is None or category not in labels:
        out.fault(f"category {category} is not among the file's categories", what, f"Declare it; {len(labels)} are declared")
    elif segment.get("iscrowd"):
        out.note("crowd", what)
    elif where.number == VOID:
        out.fault("its id is 0, which means void", what, "Number segments from 1")
    else:
        left, top, width, height = (float(value) for value in segment["bbox"])
        box = (left, top, left + width, top + height)
        return CocoObject(where.number, labels[category], box, float(segment.get("area", width * height)), where, size)
    return None


@lru_cache(maxsize=16)
def segment_ids(file: Path, size: tuple[int, int]) -> np.ndarray:
    """The segment id of each pixel [height, width], from the PNG's colours: red + 256 green + 65,536 blue.

    Raises:
        DataError: The file is no picture, or has another size than the image.
    """
    try:
        with Image.open(file) as picture:
            colours = np.asarray(picture.convert("RGB"), dtype=np.int64)
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read as a PNG of segments: {error}") from error
    if colours.shape[:2] != size:
        raise DataError(
            f"{file} is {colours.shape[1]} x {colours.shape[0]} pixels, and its image {size[1]} x {size[0]}: segments and image must agree"
        )
    ids: np.ndarray = colours @ np.array([1, 256, 65536])
    return ids
