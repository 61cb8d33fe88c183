"""COCO-format files, read strictly: instances (polygons, compressed and uncompressed run lengths, crowds, ids with gaps) and captions.

    coco = read_coco(Path("coco/train2017"), instances=Path("instances_train2017.json"), captions=Path("captions_train2017.json"))
    coco.images[0].objects[0].mask()             # uint8 [height, width]

What COCO itself has (crowds, boxes without area, captions without words) is left out and counted; what is wrong with a file (a mask of another
size, a category nobody declared, an image that is not there) is an error that names it, or left out and counted when asked for.

Source: ViSFT (mmf/datasets), as DETR prepares COCO: crowds dropped, boxes clamped to the image, empty ones dropped.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from pycocotools import mask as coco_mask

from encoders.coco_classes import Classes
from encoders.joints import Joints, joints_of
from encoders.vocabulary import words_of
from mmkit.errors import DataError

OnBad = Literal["error", "skip"]
Box = tuple[float, float, float, float]
EXAMPLES = 3  # named for each kind of thing that was left out


@runtime_checkable
class DrawnElsewhere(Protocol):
    """A mask that lies in a file of its own (`panoptic_files.Segment`)."""

    def mask(self, size: tuple[int, int]) -> np.ndarray:
        """Draw it: uint8 [height, width], 0 or 1."""


@dataclass(frozen=True)
class CocoObject:
    """One annotated object.

    Attributes:
        annotation_id: Its id in the file.
        label: 0 to categories - 1, by ascending raw id.
        box: Left, top, right, bottom in pixels, inside the image.
        area: As the file says it.
        segmentation: Polygons or run lengths as the file has them, or where a PNG has it; None where there is none.
        size: Height and width of the image.
        keypoints: x, y, visibility of each joint; empty where the file has none.
    """

    annotation_id: int
    label: int
    box: Box
    area: float
    segmentation: Any = field(repr=False)
    size: tuple[int, int]
    keypoints: tuple[float, ...] = field(default=(), repr=False)

    def mask(self) -> np.ndarray:
        """Draw the mask: uint8 [height, width], 0 or 1; the box where the file has no segmentation."""
        height, width = self.size
        if self.segmentation is None:
            drawn = np.zeros((height, width), dtype=np.uint8)
            left, top, right, bottom = self.box
            drawn[math.floor(top) : math.ceil(bottom), math.floor(left) : math.ceil(right)] = 1
            return drawn
        if isinstance(self.segmentation, DrawnElsewhere):
            return self.segmentation.mask(self.size)
        return decode_mask(self.segmentation, height, width)


@dataclass(frozen=True)
class CocoImage:
    """One image with what is said about it.

    Attributes:
        image_id: Its id in the file.
        file_name: Relative to the folder of the images.
        width, height: Pixels, as the file says.
        objects: In the file's order.
        captions: Those with words.
    """

    image_id: int
    file_name: str
    width: int
    height: int
    objects: tuple[CocoObject, ...] = field(default=(), repr=False)
    captions: tuple[str, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class CocoSet:
    """A data set.

    Attributes:
        root: Folder of the images.
        images: By ascending id.
        classes: Its categories, numbered from 0 by ascending id; None without an instances file.
        left_out: How many things of each kind were left out, with examples.
        instances: The instances file's content, for scoring; None without one.
        things: Of a panoptic set: whether each label is a thing.
        panoptic: Of a panoptic set: its file's content, with "pngs", the folder of its PNGs.
        joints: The keypoints of its categories; None where they have none.
        others: By task, sets of the same pictures from files of their own (panoptic, pose), where several tasks are trained together.
    """

    root: Path
    images: tuple[CocoImage, ...]
    classes: Classes | None
    left_out: dict[str, str]
    instances: dict[str, Any] | None = field(default=None, repr=False)
    things: tuple[bool, ...] = ()
    panoptic: dict[str, Any] | None = field(default=None, repr=False)
    joints: Joints | None = None
    others: Mapping[str, "CocoSet"] = field(default_factory=dict, repr=False)

    def of(self, task: str) -> "CocoSet":
        """The set as a task sees it."""
        return self.others.get(task, self)

    def describe(self) -> str:
        """Say what there is and what was left out, a line each."""
        objects, captions = (sum(len(getattr(image, what)) for image in self.images) for what in ("objects", "captions"))
        head = f"{len(self.images)} images, {objects} objects, {captions} captions"
        return "\n".join([head, *(f"  left out: {line}" for line in self.left_out.values())])

    def captions(self) -> list[str]:
        """Give all captions."""
        return [caption for image in self.images for caption in image.captions]


class LeftOut:
    """Counts what is left out, by kind, with some examples; refuses what may not be."""

    def __init__(self, file: Path, on_bad: OnBad) -> None:
        self.file, self.on_bad = file, on_bad
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}

    def note(self, kind: str, example: str) -> None:
        """Leave something out that is no fault of the file."""
        self.counts[kind] += 1
        if len(shown := self.examples.setdefault(kind, [])) < EXAMPLES:
            shown.append(example)

    def fault(self, kind: str, example: str, remedy: str) -> None:
        """Refuse a fault of the file, or leave it out where that was asked for.

        Raises:
            DataError: Faults are errors; the file, the example and the remedy are named.
        """
        if self.on_bad == "error":
            raise DataError(f"{self.file}: {example}: {kind}. {remedy}, or leave such things out, counted, with --data.on_bad_sample skip")
        self.note(kind, example)

    def lines(self) -> dict[str, str]:
        """What was left out, a line for each kind."""
        return {kind: f"{self.counts[kind]} x {kind} ({', '.join(self.examples[kind])})" for kind in self.counts}


def read_coco(
    root: Path,
    *,
    instances: Path | None = None,
    captions: Path | None = None,
    on_bad: OnBad = "error",
    keep_empty: bool = True,
) -> CocoSet:
    """Read a set in COCO's format.

    Args:
        root: Folder that the file names are relative to.
        instances, captions: The files; at least one. With both, images of both are joined by id.
        on_bad: "skip" leaves out faulty annotations and missing images, counted, instead of stopping.
        keep_empty: Keep images that have neither an object nor a caption. A detector learns from them what is nothing.

    Raises:
        DataError: A file is missing, damaged or not of this format, or something in it is faulty; it is named.
    """
    if instances is None and captions is None:
        raise DataError("no annotation file is given: --data.instances FILE (boxes, masks), --data.captions FILE, or both")
    if not root.is_dir():
        raise DataError(f"--data.images {root}: there is no such folder; it should hold the images that the annotations name")
    found: dict[int, dict[str, Any]] = {}
    left_out: dict[str, str] = {}
    content = None if instances is None else load_coco_json(instances)
    classes = None
    if instances is not None and content is not None:
        classes = classes_of(content, instances)
        left_out |= _add_objects(found, content, classes, LeftOut(instances, on_bad))
    if captions is not None:
        left_out |= _add_captions(found, load_coco_json(captions, categories=False), LeftOut(captions, on_bad))
    rest = LeftOut(instances or captions or root, on_bad)
    images = [
        CocoImage(number, row["file_name"], row["width"], row["height"], tuple(row["objects"]), tuple(row["captions"]))
        for number, row in sorted(found.items())
    ]
    images = on_disk(images, root, rest, keep_empty)
    if not images:
        why = "; ".join((left_out | rest.lines()).values()) or "it lists none"
        raise DataError(f"{instances or captions}: no image is left to train on: {why}")
    joints = None if content is None else joints_of(content, instances or "")
    return CocoSet(root, tuple(images), classes, left_out | rest.lines(), content, joints=joints)


def on_disk(images: Sequence[CocoImage], root: Path, rest: LeftOut, keep_empty: bool) -> list[CocoImage]:
    """Keep images that are on disk and have something to say."""
    kept = []
    present = {path.name for path in root.iterdir()}  # one listing: asking for 118,000 files one by one takes minutes on a network disk
    for image in images:
        if not keep_empty and not image.objects and not image.captions:
            rest.note("image without annotations", f"id {image.image_id}")
        elif image.file_name not in present and not (root / image.file_name).is_file():
            rest.fault(f"the image is not in {root}", f"'{image.file_name}'", "Point --data.images to the folder of the images")
        else:
            kept.append(image)
    return kept


def load_coco_json(path: Path, categories: bool = True) -> dict[str, Any]:
    """Read a COCO file and check its frame.

    Raises:
        DataError: It is missing, no JSON, or lacks a list.
    """
    if not path.is_file():
        raise DataError(f"annotation file {path}: {'it is a folder' if path.is_dir() else 'there is no such file'}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is no valid JSON: {error}") from error
    wanted = ("images", "annotations", *(("categories",) if categories else ()))
    if not isinstance(content, dict) or not all(isinstance(content.get(key), list) for key in wanted):
        held = f"an object with {', '.join(list(content)[:6])}" if isinstance(content, dict) else f"a {type(content).__name__}"
        hint = "; is it a captions file?" if isinstance(content, dict) and "categories" not in content else ""
        raise DataError(f"{path} holds {held}; COCO's format is an object with the lists {', '.join(wanted)}{hint}")
    return content


def classes_of(content: Mapping[str, Any], file: Path | str) -> Classes:
    """Give the categories of an instances file.

    Raises:
        DataError: There is none, or two share an id.
    """
    try:
        pairs = [(int(row["id"]), str(row["name"])) for row in content["categories"]]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{file}: a category needs id and name ({error})") from error
    twice = [number for number, count in Counter(number for number, _ in pairs).items() if count > 1]
    if not pairs or twice:
        raise DataError(f"{file}: {f'category id {twice[0]} is there twice' if twice else 'it declares no category'}")
    return Classes.contiguous((number for number, _ in pairs), (name for _, name in pairs))


def image_rows(content: Mapping[str, Any], file: Path) -> dict[int, dict[str, Any]]:
    """The file's images by id, each with its name and size and empty lists for what is said about it.

    Raises:
        DataError: An image lacks a field, has no pixels, or is there twice.
    """
    rows: dict[int, dict[str, Any]] = {}
    for row in content["images"]:
        try:
            number, name, width, height = int(row["id"]), str(row["file_name"]), int(row["width"]), int(row["height"])
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{file}: image {str(row)[:80]} lacks {error}; id, file_name, width and height are needed") from error
        if number in rows or min(width, height) < 1:
            raise DataError(f"{file}: image id {number} ({name}, {width} x {height}) is there twice or has no pixels")
        rows[number] = {"file_name": name, "width": width, "height": height, "objects": [], "captions": []}
    return rows


def _add_objects(found: dict[int, dict[str, Any]], content: Mapping[str, Any], classes: Classes, out: LeftOut) -> dict[str, str]:
    found.update(image_rows(content, out.file))
    labels = classes.label_of()
    counts = {int(row["id"]): len(row.get("keypoints") or ()) for row in content["categories"]}
    for row in content["annotations"]:
        try:
            number, image, category, bbox = row["id"], row["image_id"], row["category_id"], [float(value) for value in row["bbox"]]
            left, top, width, height = bbox
        except (KeyError, TypeError, ValueError) as error:
            out.fault(
                f"id, image_id, category_id and a bbox of four numbers are needed ({error})", f"annotation {str(row)[:80]}", "Repair it"
            )
            continue
        what = f"annotation {number} (image {image})"
        if image not in found:
            out.fault("its image is not in the file's list of images", what, "Complete the list")
        elif category not in labels:
            remedy = f"Declare it; declared are {classes.ids[0]} to {classes.ids[-1]}, {len(classes.ids)} in all"
            out.fault(f"category {category} is not among the file's categories", what, remedy)
        elif row.get("iscrowd"):
            out.note("crowd", what)
        else:
            size = (found[image]["height"], found[image]["width"])
            right, bottom = min(left + width, size[1]), min(top + height, size[0])
            left, top = max(left, 0.0), max(top, 0.0)
            if not (right > left and bottom > top):  # also when a number is NaN
                out.note("box without area inside its image", what)
            elif (fault := mask_fault(row.get("segmentation"), *size) or keypoint_fault(row, counts[category])) is not None:
                out.fault(fault, what, "Repair it")
            else:
                keypoints = tuple(float(value) for value in row.get("keypoints") or ())
                segmentation, area = row.get("segmentation") or None, float(row.get("area", (right - left) * (bottom - top)))
                found[image]["objects"].append(
                    CocoObject(number, labels[category], (left, top, right, bottom), area, segmentation, size, keypoints)
                )
    return out.lines()


def _add_captions(found: dict[int, dict[str, Any]], content: Mapping[str, Any], out: LeftOut) -> dict[str, str]:
    rows = image_rows(content, out.file)
    for number, row in rows.items():
        found.setdefault(number, row)
    for row in content["annotations"]:
        try:
            number, image, caption = row["id"], row["image_id"], row["caption"]
        except (KeyError, TypeError) as error:
            out.fault(f"id, image_id and caption are needed ({error})", f"caption {str(row)[:80]}", "Is this a captions file? Repair it")
            continue
        what = f"caption {number} (image {image})"
        if image not in rows:
            out.fault("its image is not in the file's list of images", what, "Complete the list")
        elif not isinstance(caption, str):
            out.fault(f"it is {caption!r}, not text", what, "Repair it")
        elif not words_of(caption):
            out.note("caption without words", what)
        else:
            found[image]["captions"].append(" ".join(caption.split()))
    return out.lines()


# ---- masks ---------------------------------------------------------------------------------------------------------------------------


def keypoint_fault(row: Mapping[str, Any], count: int) -> str | None:
    """Say what is wrong with an annotation's keypoints, or None; missing ones are none of that."""
    given = row.get("keypoints")
    if given and count and len(given) != 3 * count:
        return f"its keypoints are {len(given)} numbers, and its category has {count} keypoints of three each"
    if given and not all(isinstance(value, int | float) and math.isfinite(value) for value in given):
        return "among its keypoints are some that are no numbers"
    if given and not set(given[2::3]) <= {0, 1, 2}:
        return "a keypoint's visibility is none of 0, 1, 2"
    return None


def mask_fault(segmentation: Any, height: int, width: int) -> str | None:
    """Say what is wrong with a segmentation, or None; a missing one is none of that."""
    if not segmentation:
        return None
    if isinstance(segmentation, Mapping):
        size, counts = segmentation.get("size"), segmentation.get("counts")
        if size is None or list(size) != [height, width]:
            return f"its mask is {size} (height, width), its image {[height, width]}"
        if isinstance(counts, list):
            return None if sum(counts) == height * width else f"its run lengths cover {sum(counts)} of {height * width} pixels"
        return None if isinstance(counts, str | bytes) else f"its run lengths are {str(counts)[:20]!r}, neither text nor a list"
    if not isinstance(segmentation, list):
        return f"its segmentation is a {type(segmentation).__name__}, neither polygons nor run lengths"
    for polygon in segmentation:
        if not isinstance(polygon, list) or len(polygon) % 2 or len(polygon) < 6:
            return f"a polygon is {str(polygon)[:40]}; x and y of three corners or more are right"
    return None


def decode_mask(segmentation: Any, height: int, width: int) -> np.ndarray:
    """Draw polygons or run lengths: uint8 [height, width], 0 or 1, the pixels that pycocotools gives."""
    if isinstance(segmentation, Mapping):
        counts = segmentation["counts"]
        runs = coco_mask.frPyObjects(dict(segmentation), height, width) if isinstance(counts, list) else dict(segmentation)
        return np.asarray(coco_mask.decode(runs))
    return np.asarray(coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(list(segmentation), height, width))))
