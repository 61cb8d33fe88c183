"""The one table of zero-shot benchmarks: name -> where its images lie, what its classes are called, which prompts, what to report."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from encoders.zeroshot_layouts import (
    LabelledImages,
    cifar10,
    cifar100,
    class_folders,
    existing_folder,
    gather,
    gtsrb,
    imagenet,
    imagenet_v2,
    named_folders,
    objectnet,
    read_json_object,
)  # fmt: skip
from mmkit.errors import ConfigError, DataError, NameNotFound, find

FACTS = Path(__file__).parent / "data" / "zeroshot_sets.json"


@dataclass(frozen=True)
class ZeroshotSet:
    """One benchmark of classification.

    Attributes:
        title: What it is called.
        find: (folder named by the user, take a part) -> its labelled images.
        prompts: Name in `encoders.zeroshot.TEMPLATES`; empty is the text tower's own.
        images: How many it has when complete; 0 where that depends on the user.
        folders: What its folder is usually called below a folder of data sets.
        note: How it departs from what others may print.
    """

    title: str
    find: Callable[[Path, bool], LabelledImages]
    prompts: str = "openai"
    images: int = 0
    folders: tuple[str, ...] = ()
    note: str = ""


@cache
def facts() -> dict[str, Any]:
    """Class names and prompts that are not in open_clip."""
    return dict(json.loads(FACTS.read_text(encoding="utf-8")))


def _small(name: str, below: tuple[str, ...], title: str) -> Callable[[Path, bool], LabelledImages]:
    return named_folders(facts()["names"][name], below, title)


def own_folders(root: Path, partial: bool, classnames: str = "") -> LabelledImages:
    """A folder of class folders, the names theirs or from a file.

    Args:
        root: Holds one folder a class, images at any depth below each.
        partial: Take what is there where a folder is empty; its name stays in the choice.
        classnames: JSON {folder: name}; or text, one name a line: the folders' names among others, or in the order of sorted folders.

    Raises:
        DataError: There are no class folders or images, a folder is empty, or the names do not fit the folders.
    """
    existing_folder(root)
    folders = class_folders(root)
    if not folders:
        raise DataError(f"--images {root}: one folder a class was expected in it, with that class's images; it has no folders")
    names, label_of = tuple(folders), {name: index for index, name in enumerate(folders)}
    if classnames:
        names, label_of = _read_names(Path(classnames), folders)
    return gather(root, {folder: label_of[folder] for folder in folders}, names, partial)


def _read_names(path: Path, folders: list[str]) -> tuple[tuple[str, ...], dict[str, int]]:
    """Names from a file, and which of them each folder bears."""
    if not path.is_file():
        raise DataError(f"--classnames {path}: there is no such file; it is JSON {{folder: name}}, or text with one name a line")
    if path.suffix == ".json":
        table = read_json_object(path, "--classnames")
        absent = [folder for folder in folders if folder not in table]
        if absent:
            raise DataError(f"--classnames {path} has no name for folder '{absent[0]}' ({len(absent)} of {len(folders)} are not in it)")
        return tuple(table.values()), {folder: index for index, folder in enumerate(table)}
    lines = [(number, line.strip()) for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1) if line.strip()]
    names = tuple(name for _, name in lines)
    first: dict[str, int] = {}
    for number, name in lines:
        if name in first and name in folders:
            raise DataError(f"--classnames {path}: '{name}' stands in line {first[name]} and in line {number}; a class may be named once")
        first.setdefault(name, number)
    place = {name: index for index, name in enumerate(names)}
    absent = [folder for folder in folders if folder not in place]
    if not absent:
        return names, place
    if len(absent) == len(folders) == len(names):  # ImageNet's habit: the lines are in the order of the sorted folders
        print(f"{path}: its lines name the {len(names)} folders in sorted order: {folders[0]} is '{names[0]}' and so on")
        return names, {folder: index for index, folder in enumerate(folders)}
    raise DataError(
        f"--classnames {path}: {len(names)} names, {len(folders)} folders, and folder '{absent[0]}' is none of the names; "
        "give JSON {folder: name}, or one line a folder in sorted order"
    )


SETS: Mapping[str, ZeroshotSet] = {
    "zeroshot": ZeroshotSet("your own class folders", own_folders, prompts=""),
    "mini_zeroshot": ZeroshotSet("drawings of the embedded data, new renderings", own_folders, prompts=""),
    "imagenet": ZeroshotSet(
        "ImageNet-1K, validation",
        imagenet(("val", "validation", "imagenet/val", "ILSVRC2012/val", "ILSVRC/Data/CLS-LOC/val"), "ImageNet-1K"),
        images=50_000, folders=("imagenet", "imagenet1k", "imagenet-1k", "ImageNet", "ILSVRC2012"),
    ),
    "imagenet_a": ZeroshotSet(
        "ImageNet-A, 200 classes", imagenet(("imagenet-a",), "ImageNet-A", "imagenet_a"), images=7_500, folders=("imagenet-a", "imagenet_a"),
    ),
    "imagenet_r": ZeroshotSet(
        "ImageNet-R, 200 classes", imagenet(("imagenet-r",), "ImageNet-R", "imagenet_r"), images=30_000, folders=("imagenet-r", "imagenet_r"),
    ),
    "imagenet_v2": ZeroshotSet(
        "ImageNet-V2, matched frequency", imagenet_v2, images=10_000,
        folders=("imagenetv2-matched-frequency-format-val", "ImageNetV2-matched-frequency", "imagenetv2", "imagenet-v2", "imagenet_v2"),
    ),
    "imagenet_sketch": ZeroshotSet(
        "ImageNet-Sketch", imagenet(("sketch", "imagenet-sketch/sketch"), "ImageNet-Sketch"), images=50_889,
        folders=("imagenet-sketch", "imagenet_sketch", "ImageNet-Sketch", "sketch"),
    ),
    "objectnet": ZeroshotSet(
        "ObjectNet, 113 classes", objectnet, images=18_574, folders=("objectnet-1.0", "objectnet", "ObjectNet"),
        note="ObjectNet's own names of the 113 classes, as clip_benchmark; the red border of one pixel is left on",
    ),
    "eurosat": ZeroshotSet(
        "EuroSAT, RGB", _small("eurosat", ("2750", "EuroSAT/2750", "eurosat/2750", "EuroSAT", "EuroSAT_RGB"), "EuroSAT"), "eurosat",
        27_000, ("eurosat", "EuroSAT", "EuroSAT_RGB"), "all images of the folder; papers differ in their test split",
    ),
    "cifar10": ZeroshotSet("CIFAR-10, test", cifar10, "cifar", 10_000, ("cifar10", "cifar-10", "cifar-10-batches-py")),
    "cifar100": ZeroshotSet(
        "CIFAR-100, test", cifar100, "cifar", 10_000, ("cifar100", "cifar-100", "cifar-100-python"),
        "names with blanks (clip_benchmark leaves their underscores)",
    ),
    "gtsrb": ZeroshotSet("German traffic signs, test", gtsrb(facts()["names"]["gtsrb"]), "gtsrb", 12_630, ("gtsrb", "GTSRB")),
    "caltech101": ZeroshotSet(
        "Caltech-101", _small("caltech101", ("101_ObjectCategories", "caltech101/101_ObjectCategories", "caltech-101/101_ObjectCategories"),
                              "Caltech-101"),
        "caltech101", 9_145, ("caltech101", "caltech-101"), "all images, the background class among them; papers give mean_per_class",
    ),
}  # fmt: skip

IMAGENET_SIX = ("imagenet", "imagenet_a", "imagenet_r", "imagenet_v2", "imagenet_sketch", "objectnet")
SUITES: Mapping[str, tuple[str, ...]] = {
    "imagenet_six": IMAGENET_SIX,
    "all": tuple(name for name in SETS if name not in ("zeroshot", "mini_zeroshot")),
}


def choose(asked: str) -> tuple[str, ...]:
    """Give the benchmarks of a name, of a suite, or of several with commas between.

    Raises:
        NameNotFound: One of them is in neither table; the nearest are named.
        ConfigError: None is named, or one twice.
    """
    names: list[str] = []
    for word in (part.strip() for part in asked.split(",")):
        if not word:
            continue
        if word not in SUITES:
            if "retrieval" in word:
                raise NameNotFound(f"--benchmark {word} is no classification; `mmkit eval retrieval` does retrieval")
            find("benchmark", {**SETS, **SUITES}, word)
        names += SUITES.get(word, (word,))
    twice = sorted({name for name in names if names.count(name) > 1})
    if not names or twice:
        raise ConfigError(
            f"--benchmark '{asked}' names {f'{twice[0]} twice' if twice else 'nothing'}; known: {', '.join([*SETS, *SUITES])}"
        )
    return tuple(names)


def place_of(name: str, root: Path, alone: bool) -> Path:
    """Find a benchmark's folder: the one named, where it is asked for alone; else its usual folder in the one named.

    Raises:
        DataError: There is none; the message lists the folder names that are looked for.
    """
    if alone:
        return root
    existing_folder(root)
    for folder in SETS[name].folders:
        if (root / folder).is_dir():
            return root / folder
    raise DataError(
        f"--images {root}: no folder of {SETS[name].title}, in it; it would be called {' or '.join(SETS[name].folders) or name}. "
        f"Link it there, or leave {name} out of --benchmark"
    )
