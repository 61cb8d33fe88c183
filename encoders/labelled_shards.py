"""Benchmarks kept in webdataset shards, as clip_benchmark's converted data sets are: labels or captions beside each image.

FOLDER/classnames.txt                    one name a line; a sample's class is the number of its line, from 0
FOLDER/test/0.tar, 1.tar, ...            members s0000000.jpg (or webp, png) with s0000000.cls, or with s0000000.txt, a caption a line
"""

from collections.abc import Callable
from pathlib import Path

from encoders.captions import Captioned
from encoders.shards import IMAGE_EXTENSIONS, Sample, Shards, find_shards
from encoders.zeroshot_layouts import LabelledImages
from mmkit.errors import DataError


def has_shards(root: Path) -> bool:
    """Tell whether a folder is one of shards: tar files in it and no folders, or tar files in its folder `test`.

    ImageNet's own archives may lie beside its folders of images: those are no shards.
    """
    if not root.is_dir():
        return False
    folders = [path for path in root.iterdir() if path.is_dir()]
    return any((root / "test").glob("*.tar")) or (not folders and any(root.glob("*.tar")))


def labelled_shards(root: Path, classnames: str = "") -> LabelledImages:
    """Read the labels of all samples below a folder of shards (its part `test`, if it has one).

    Args:
        root: The folder.
        classnames: File of names, one a line, in the order of the labels; empty is `classnames.txt` in the folder.

    Raises:
        DataError: There are no names, or a sample has no image, no label, or a label that has no name.
    """
    listing = Path(classnames) if classnames else root / "classnames.txt"
    if not listing.is_file():
        raise DataError(f"{listing} is missing: shards say a class by its number, and that file has the names, one a line (--classnames)")
    names = tuple(line.strip() for line in listing.read_text(encoding="utf-8").splitlines() if line.strip())
    places, pixels, shards = _samples(root, "test")
    labels = []
    for place, (sample, _) in places.items():
        text = _text(shards, sample, "cls").strip()
        if not text.isdigit() or int(text) >= len(names):
            raise DataError(f"{sample.place('cls')} says {text[:20]!r}; a number from 0 to {len(names) - 1} was expected ({place})")
        labels.append(int(text))
    return LabelledImages(root, tuple(places), tuple(labels), names, (f"{len(shards.paths)} shards",), pixels)


def captioned_shards(root: Path, split: str, first: int = 0) -> Captioned:
    """Read the captions of all samples below a folder of shards: a line of the member `txt` is a caption.

    Args:
        root: The folder.
        split: Which part of it, where it has one of this name.
        first: Take only so many captions of each image; 0 takes all.

    Raises:
        DataError: A sample has no image or no caption.
    """
    places, pixels, shards = _samples(root, split)
    captions: list[str] = []
    owner: list[int] = []
    for index, (sample, _) in enumerate(places.values()):
        texts = [" ".join(line.split()) for line in _text(shards, sample, "txt").splitlines() if line.strip()]
        if not texts:
            raise DataError(f"{sample.place('txt')} has no caption in it; one a line was expected")
        texts = texts[:first] if first else texts
        captions += texts
        owner += [index] * len(texts)
    return Captioned(root, tuple(places), tuple(captions), tuple(owner), (f"{len(shards.paths)} shards",), pixels)


def _samples(root: Path, split: str) -> tuple[dict[str, tuple[Sample, str]], Callable[[str], bytes], Shards]:
    """All samples by a name of their own ("0.tar/s0000017"), each with the extension of its image; and what reads an image."""
    place = root / split if (root / split).is_dir() else root
    shards = Shards([str(path) for path in find_shards(place)])
    found: dict[str, tuple[Sample, str]] = {}
    for sample in shards:
        extension = sample.first(IMAGE_EXTENSIONS)
        if extension is None:
            raise DataError(f"shard {sample.shard}: sample '{sample.key}' has no image; it has {', '.join(sample.members)}")
        found[f"{sample.shard.relative_to(place) if place in sample.shard.parents else sample.shard.name}/{sample.key}"] = (
            sample,
            extension,
        )

    def pixels(name: str) -> bytes:
        sample, extension = found[name]
        return shards.read(sample, extension)

    return found, pixels, shards


def _text(shards: Shards, sample: Sample, extension: str) -> str:
    if extension not in sample.members:
        raise DataError(f"shard {sample.shard}: sample '{sample.key}' has no member {extension}; it has {', '.join(sample.members)}")
    return shards.read(sample, extension).decode("utf-8", "replace")
