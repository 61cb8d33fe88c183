"""Labelled images as people have them on disk: class folders, ImageNet and its kin, ObjectNet, CIFAR's batches, GTSRB's lists.

Every finder takes the folder a user names and gives `LabelledImages`. Folders of a data set that are not there, or are empty, stop it:
a figure on half a benchmark looks like a figure on all of it. `partial=True` takes what is there and says how much that is.
"""

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path

from open_clip import IMAGENET_CLASSNAMES
from PIL import Image

from encoders.cifar import CIFAR10, CIFAR100, CifarLayout, cifar_files, read_cifar
from mmkit.errors import DataError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
_SHOWN = 3


@dataclass(frozen=True)
class LabelledImages:
    """Images with their classes.

    Attributes:
        root: Folder that `paths` are relative to.
        paths: What identifies each image: its path; for images inside a larger file a path and a number.
        labels: Index of each one's class in `names`.
        names: Class names, the candidates. There may be more than folders: names to be confused with.
        notes: What a reader of the figure should know of the data.
        pixels: Gives an image that is no file of its own; None where `paths` are files.
    """

    root: Path
    paths: tuple[str, ...]
    labels: tuple[int, ...]
    names: tuple[str, ...]
    notes: tuple[str, ...] = ()
    pixels: Callable[[str], Image.Image | bytes] | None = field(default=None, compare=False)

    def source(self, path: str) -> Path | Image.Image | bytes:
        """Give what `mmkit.images.open_image` takes."""
        return self.pixels(path) if self.pixels else self.root / path


# ---- folders -------------------------------------------------------------------------------------------------------------------------


def class_folders(root: Path) -> list[str]:
    """Names of the folders in a folder, sorted; hidden ones and what archivers leave (__MACOSX) are left out."""
    return sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith((".", "__")))


def images_below(folder: Path) -> list[Path]:
    """Image files at any depth, sorted; hidden ones are left out."""
    found = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and not path.name.startswith("."))
    return sorted(path for path in found if path.is_file())


def existing_folder(root: Path) -> Path:
    """Refuse what is no folder.

    Raises:
        DataError: The message names the flag.
    """
    if not root.is_dir():
        raise DataError(f"--images {root}: {'it is a file, a folder was expected' if root.exists() else 'there is no such folder'}")
    return root


def gather(root: Path, label_of: Mapping[str, int], names: Sequence[str], partial: bool, what: str = "") -> LabelledImages:
    """List the images of some class folders.

    Args:
        root: The folder that holds the class folders.
        label_of: Class folder -> index in `names`, for every folder the data set has.
        names: Class names.
        partial: Take what is there where folders are missing or empty.
        what: Name of the data set, for messages.

    Raises:
        DataError: There is no image, or folders are missing or empty and `partial` is off.
    """
    paths: list[str] = []
    labels: list[int] = []
    absent, empty = [], []
    for folder in sorted(label_of):
        if not (root / folder).is_dir():
            absent.append(folder)
            continue
        found = images_below(root / folder)
        empty += [] if found else [folder]
        paths += [path.relative_to(root).as_posix() for path in found]
        labels += [label_of[folder]] * len(found)
    total = len(label_of)
    if not paths:
        raise DataError(f"--images {root}: {total - len(absent)} class folders, and no image ({', '.join(SUFFIXES)}) in any of them")
    lacks = [f"{len(rows)} of {total} class folders {verb}: {_some(rows)}" for rows, verb in ((absent, "are missing"), (empty, "are empty"))
             if rows]  # fmt: skip
    if lacks and not partial:
        raise DataError(
            f"--images {root}{f', {what}' if what else ''}: {'; '.join(lacks)}. Complete the data, or take what is there with --partial true "
            "(all class names stay in the choice)"
        )
    return LabelledImages(root, tuple(paths), tuple(labels), tuple(names), tuple(lacks))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def descend(root: Path, fits: Callable[[Path], bool], below: Sequence[str], expected: str) -> Path:
    """Find the folder meant: the one named, or a usual one below it.

    Args:
        root: What the user named.
        fits: Tells whether a folder is the one.
        below: Where else to look, relative to `root`.
        expected: What the folder should hold, for the message.

    Raises:
        DataError: None of them fits.
    """
    existing_folder(root)
    for place in (root, *(root / name for name in below)):
        if place.is_dir() and fits(place):
            return place
    held = class_folders(root)
    raise DataError(
        f"--images {root}: expected {expected} in it, or in {', '.join(below)} below it; "
        + (f"it holds the folders {_some(held)}" if held else "it holds no folders")
    )


def named_folders(table: Mapping[str, str], below: Sequence[str], what: str) -> Callable[[Path, bool], LabelledImages]:
    """Make the finder of a data set whose class folders have fixed names.

    Args:
        table: Folder -> class name.
        below: Where the class folders may be, relative to what the user named.
        what: The data set's name.
    """

    def find(root: Path, partial: bool) -> LabelledImages:
        some = next(iter(table))
        place = descend(root, lambda path: any((path / name).is_dir() for name in table), below, f"class folders of {what} ({some}, ...)")
        strange = [name for name in class_folders(place) if name not in table]
        if strange:
            raise DataError(f"--images {place}: '{strange[0]}' is no class folder of {what}; it has {_some(list(table))}")
        return gather(place, {name: index for index, name in enumerate(table)}, list(table.values()), partial, what)

    return find


# ---- ImageNet and its kin ------------------------------------------------------------------------------------------------------------


@cache
def synsets(subset: str = "") -> tuple[str, ...]:
    """WordNet ids of ImageNet-1K's classes in their order (sorted), or of the 200 of "imagenet_a" and "imagenet_r".

    Source: timm carries the lists (timm/data/_info).
    """
    text = (files("timm.data") / "_info" / f"{subset or 'imagenet'}_synsets.txt").read_text(encoding="utf-8")
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def _is_synset(name: str) -> bool:
    return len(name) == 9 and name[0] == "n" and name[1:].isdigit()


def imagenet(below: Sequence[str], what: str, subset: str = "") -> Callable[[Path, bool], LabelledImages]:
    """Make the finder of a data set in folders named by WordNet id; with a subset, its 200 classes are the only candidates."""

    def find(root: Path, partial: bool) -> LabelledImages:
        if not subset and (solution := _kaggle_solution(root)):
            return _from_solution(root, solution, partial)
        place = descend(
            root,
            lambda path: any(_is_synset(name) for name in class_folders(path)),
            below,
            f"{what}'s class folders, named by WordNet id (n01440764, ...),",
        )
        order = {wnid: index for index, wnid in enumerate(synsets())}
        wanted = synsets(subset)
        strange = [name for name in class_folders(place) if name not in set(wanted)]
        if strange:
            known = "a class of ImageNet-1K, but not of" if strange[0] in order else "no class of"
            raise DataError(f"--images {place}: folder '{strange[0]}' is {known} {what}; is another data set in this folder?")
        names = [IMAGENET_CLASSNAMES[order[wnid]] for wnid in wanted]
        return gather(place, {wnid: index for index, wnid in enumerate(wanted)}, names, partial, what)

    return find


def _kaggle_solution(root: Path) -> Path | None:
    """The list of labels that comes with Kaggle's copy, if its validation images lie in one folder, as they come."""
    for place in (root, root.parent.parent.parent.parent):
        images = place / "ILSVRC" / "Data" / "CLS-LOC" / "val"
        if (place / "LOC_val_solution.csv").is_file() and images.is_dir() and not class_folders(images):
            return place / "LOC_val_solution.csv"
    return None


def _from_solution(root: Path, solution: Path, partial: bool) -> LabelledImages:
    folder = solution.parent / "ILSVRC" / "Data" / "CLS-LOC" / "val"
    order = {wnid: index for index, wnid in enumerate(synsets())}
    rows = _csv(solution, ("ImageId", "PredictionString"))
    pairs = sorted((f"{row['ImageId']}.JPEG", row["PredictionString"].split(" ")[0]) for row in rows)
    strange = [wnid for _, wnid in pairs if wnid not in order]
    if strange:
        raise DataError(f"{solution}: '{strange[0]}' is no WordNet id of ImageNet-1K")
    return _listed(folder, [(name, order[wnid]) for name, wnid in pairs], IMAGENET_CLASSNAMES, partial, "ImageNet-1K")


def _listed(folder: Path, pairs: Sequence[tuple[str, int]], names: Sequence[str], partial: bool, what: str) -> LabelledImages:
    """Images of a list, checked against what is on disk."""
    there = {path.name for path in folder.iterdir()}
    found = [(name, label) for name, label in pairs if name in there]
    absent = [name for name, _ in pairs if name not in there]
    if not found:
        raise DataError(f"--images {folder}: none of the {len(pairs)} listed images of {what} is there, {absent[0]} for one")
    notes = [f"{len(absent)} of {len(pairs)} listed images are missing: {_some(absent)}"] if absent else []
    if absent and not partial:
        raise DataError(f"--images {folder}, {what}: {notes[0]}. Complete the data, or take what is there with --partial true")
    return LabelledImages(folder, tuple(n for n, _ in found), tuple(label for _, label in found), tuple(names), tuple(notes))


def imagenet_v2(root: Path, partial: bool) -> LabelledImages:
    """ImageNet-V2: folders named by class index, "0" to "999" (in their order as text "10" comes before "2")."""
    below = ("imagenetv2-matched-frequency-format-val", "ImageNetV2-matched-frequency", "imagenetv2-matched-frequency")
    place = descend(root, lambda path: any(name.isdigit() for name in class_folders(path)), below, "class folders '0' to '999'")
    strange = [name for name in class_folders(place) if not name.isdigit() or int(name) >= len(IMAGENET_CLASSNAMES)]
    if strange:
        raise DataError(f"--images {place}: ImageNet-V2's folders are named 0 to 999, and '{strange[0]}' is none of them")
    return gather(place, {str(index): index for index in range(1000)}, IMAGENET_CLASSNAMES, partial, "ImageNet-V2")


def objectnet(root: Path, partial: bool) -> LabelledImages:
    """ObjectNet: the 113 of its 313 classes that ImageNet-1K has too, under ObjectNet's own names.

    Source: the mappings that come with the data set; names and classes as clip_benchmark takes them. Images are taken as they are: the
    red line of one pixel at their border stays.
    """
    existing_folder(root)
    table = _mapping(root, "folder_to_objectnet_label.json")
    overlap = _mapping(root, "objectnet_to_imagenet_1k.json")
    place = descend(
        root, lambda path: any((path / name).is_dir() for name in table), ("images", "objectnet-1.0/images"), "ObjectNet's class folders"
    )
    kept = sorted(folder for folder, label in table.items() if label in overlap)
    found = gather(place, {name: index for index, name in enumerate(kept)}, [table[name].lower() for name in kept], partial, "ObjectNet")
    left_out = sum((place / name).is_dir() for name in table if name not in set(kept))
    return LabelledImages(
        found.root, found.paths, found.labels, found.names,
        (*found.notes, f"{len(kept)} classes that ImageNet-1K has too; {left_out} other folders left out"),
    )  # fmt: skip


def _mapping(root: Path, name: str) -> dict[str, str]:
    for place in (root, root / "mappings", root / "objectnet-1.0" / "mappings", root.parent / "mappings"):
        if (place / name).is_file():
            return read_json_object(place / name)
    raise DataError(f"--images {root}: ObjectNet's {name} is neither in it nor in its folder mappings; the data set's archive has it there")


# ---- the small ones ------------------------------------------------------------------------------------------------------------------


def gtsrb(names: Sequence[str]) -> Callable[[Path, bool], LabelledImages]:
    """Make the finder of the German traffic signs: the test list with its folder of images, or folders named by class number."""

    def find(root: Path, partial: bool) -> LabelledImages:
        existing_folder(root)
        official = (("GT-final_test.csv", "GTSRB/Final_Test/Images"), ("GT-final_test.csv", "Final_Test/Images"), ("Test.csv", "Test"))
        for listing, images in official:
            if (root / listing).is_file() and (root / images).is_dir():
                rows = _csv(root / listing, ("ClassId",))
                column = "Filename" if "Filename" in rows[0] else "Path"
                strange = [row["ClassId"] for row in rows if not row["ClassId"].isdigit() or int(row["ClassId"]) >= len(names)]
                if strange:
                    raise DataError(f"{root / listing}: ClassId '{strange[0]}'; GTSRB's classes are 0 to {len(names) - 1}")
                pairs = [(row[column].rsplit("/", 1)[-1], int(row["ClassId"])) for row in rows]
                return _listed(root / images, sorted(pairs), names, partial, "GTSRB")
        place = descend(root, lambda path: any(name.isdigit() for name in class_folders(path)), ("Test", "test", "GTSRB/Final_Test/Images"),
                        "GT-final_test.csv with GTSRB/Final_Test/Images, Test.csv with Test, or class folders 00000 to 00042")  # fmt: skip
        label_of = {name: int(name) for name in class_folders(place) if name.isdigit() and int(name) < len(names)}
        width = max(map(len, label_of), default=5)
        label_of |= {str(index).zfill(width): index for index in range(len(names)) if index not in label_of.values()}
        return gather(place, label_of, names, partial, "GTSRB")

    return find


def cifar(layout: CifarLayout) -> Callable[[Path, bool], LabelledImages]:
    """Make the finder of CIFAR: its own batches (Python's or the binary form), or one folder a class."""

    def find(root: Path, partial: bool) -> LabelledImages:
        existing_folder(root)
        if batch := cifar_files(root, layout):
            return LabelledImages(*read_cifar(batch, layout))
        below = ("test", f"{root.name}/test")
        place = descend(root, lambda path: len(class_folders(path)) >= layout.classes // 2, below,
                        f"{layout.folder} with its test batch, or {layout.classes} class folders")  # fmt: skip
        folders = class_folders(place)
        if len(folders) != layout.classes and not partial:
            raise DataError(f"--images {place}: {len(folders)} class folders; {layout.title} has {layout.classes}")
        return gather(
            place, {name: index for index, name in enumerate(folders)}, [n.replace("_", " ") for n in folders], partial, layout.title
        )

    return find


cifar10, cifar100 = cifar(CIFAR10), cifar(CIFAR100)


# ---- files ---------------------------------------------------------------------------------------------------------------------------


def read_json_object(path: Path, where: str = "") -> dict[str, str]:
    """Read {text: text}; a key that occurs twice is an error, since JSON would silently keep the last.

    Raises:
        DataError: The file is no such object.
    """
    head = f"{where} {path}".strip()

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        seen: dict[str, object] = {}
        for key, value in pairs:
            if key in seen:
                raise DataError(f"{head}: '{key}' occurs twice, as {seen[key]!r} and as {value!r}; keep one")
            seen[key] = value
        return seen

    try:
        table = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)
    except UnicodeDecodeError as error:
        raise DataError(f"{head} is not UTF-8 text: {error}") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{head} is no valid JSON: {error}") from error
    if not isinstance(table, dict) or not all(isinstance(name, str) and name.strip() for name in table.values()):
        raise DataError(f"{head}: an object {{folder: name}} was expected, every name a text")
    return table


def _csv(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    text = path.read_text(encoding="utf-8-sig")
    head, _, body = text.partition("\n")
    delimiter = ";" if ";" in head else ","
    rows = list(csv.DictReader(body.splitlines(), fieldnames=head.strip().split(delimiter), delimiter=delimiter))
    absent = [name for name in columns if not rows or name not in rows[0]]
    if absent:
        raise DataError(
            f"{path}: a list with the column{'s' if len(absent) > 1 else ''} {', '.join(absent)} was expected; it begins {head[:60]!r}"
        )
    return rows
