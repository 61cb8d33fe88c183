"""Pictures of single words with what they say, in the layouts word-recognition sets come in.

    words = read_words("IC13=icdar13/test")            # a name before "=", else the folder's
    words.names[7], words.words[7], words.open(words.names[7])

What is understood, as a file or as a folder that holds one of these:

    train.jsonl, test.jsonl                {"image": ..., "word": ...} a line (the embedded words)
    annotation_train.txt, _test.txt        MJSynth: `./2425/1/115_Lube_45484.jpg 45484`, the word is in the file's name
    gt.txt, labels.txt, labels.tsv, ...    `path<TAB>word`, `path, "word"` (ICDAR 2013, 2015) or `path word` a line
    word.xml                               ICDAR 2003: `<image file="word/1/1.jpg" tag="self"/>`
    train.xml, test.xml                    SVT: rectangles with tags in whole pictures
    traindata.mat, testdata.mat            IIIT 5K-word: ImgName, GroundTruth
    gt.mat                                 SynthText: imnames, wordBB, txt
    *.tar                                  webdataset shards, an image and a member `txt` in each sample

Words cut out of a whole picture (SVT, SynthText) are cut out upright, by the corners that lie farthest out.
"""

import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from encoders.shards import IMAGE_EXTENSIONS, Shards, find_shards, holds_shards
from mmkit.errors import DataError
from mmkit.images import ImageError, open_image
from mmkit.records import read_jsonl

Split = Literal["train", "test"]
Box = tuple[float, float, float, float]  # left, top, right, bottom
Row = tuple[str, str, Box | None]  # image, word, where in it
_MJSYNTH = re.compile(r"(?:^|/)\d+_([^_/]*)_\d+\.\w+\s+\d+$")
_LINE = re.compile(r"^(?P<image>\S.*?\.(?:jpe?g|png|webp|bmp|gif|tiff?|ppm))(?:\t|\s*,\s*|\s+)(?P<word>.*)$", re.I)


@dataclass(frozen=True)
class WordSet:
    """Pictures and their words.

    Attributes:
        name: For tables.
        names: Names of the pictures, all different.
        words: What they say, as the file has it.
        open: Gives a picture (or its file or bytes) by its name.
        place: The file or folder it was read from.
    """

    name: str
    names: list[str]
    words: list[str]
    open: Callable[[str], Path | bytes | Image.Image] = field(compare=False)
    place: Path

    def __len__(self) -> int:
        return len(self.names)

    def thinned(self, count: int) -> "WordSet":
        """So many of them, evenly spaced; 0 and more than there are is all."""
        if not 0 < count < len(self):
            return self
        kept = [index * len(self) // count for index in range(count)]
        return WordSet(self.name, [self.names[i] for i in kept], [self.words[i] for i in kept], self.open, self.place)


def read_words(source: str, split: Split = "test", setting: str = "--test") -> WordSet:
    """Read one set.

    Args:
        source: A file or folder (see the head of this file), with `NAME=` before it or not.
        split: Which file of a folder that has both.
        setting: Where the name came from, for messages.

    Raises:
        DataError: There is no such thing, its layout is none of those above, or it holds no word.
    """
    name, separator, rest = source.partition("=")
    place = Path(rest if separator else source).expanduser()
    name = (
        name if separator else (place.stem if place.is_dir() or place.stem not in ("gt", "labels", "word", *_SPLITS) else place.parent.name)
    )
    if not (place.exists() or holds_shards(place)):
        raise DataError(f"{setting} {source}: there is no {place}; give a file or folder of words, or NAME=PATH")
    if holds_shards(place):
        return _from_shards(name, place)
    file = _list_in(place, split, f"{setting} {source}") if place.is_dir() else place
    rows = list(_reader(file)(file))
    if not rows:
        raise DataError(f"{setting} {source}: {file} names no word")
    return _from_rows(name, file, rows)


# ---- which file, in which layout ---------------------------------------------------------------------------------------------------------

_SPLITS = ("train", "test")
_LISTS = ("{split}.jsonl", "annotation_{split}.txt", "{split}.xml", "word.xml", "{split}data.mat", "gt.mat", "{split}.tsv", "{split}.txt",
          "gt.txt", "labels.tsv", "labels.txt", "*_gt.txt", "*gt*.txt")  # fmt: skip


def _list_in(folder: Path, split: Split, where: str) -> Path:
    """The list in a folder: the first of the known names."""
    for pattern in _LISTS:
        found = sorted(folder.glob(pattern.format(split=split)))
        if len(found) > 1:
            raise DataError(
                f"{where}: {len(found)} lists match {pattern.format(split=split)} ({found[0].name}, {found[1].name}); name one of them"
            )
        if found:
            return found[0]
    raise DataError(
        f"{where}: no list of words in {folder}; one of {', '.join(_LISTS).format(split=split)} was expected, or name the file itself"
    )


def _reader(file: Path) -> Callable[[Path], Iterator[Row]]:
    readers = {".jsonl": _jsonl, ".xml": _xml, ".mat": _mat}
    return readers.get(file.suffix.lower(), _lines)


def _jsonl(file: Path) -> Iterator[Row]:
    for number, row in enumerate(read_jsonl(file), 1):
        word = next((row[key] for key in ("word", "label", "text") if isinstance(row.get(key), str)), None)
        if word is None or not isinstance(row.get("image"), str):
            raise DataError(f'{file}, line {number}: {{"image": ..., "word": ...}} was expected, found {json.dumps(row)[:80]}')
        yield row["image"], word, None


def _lines(file: Path) -> Iterator[Row]:
    with open(file, encoding="utf-8-sig", errors="strict") as lines:
        try:
            for number, raw in enumerate(lines, 1):
                line = raw.strip()
                if not line:
                    continue
                if found := _MJSYNTH.search(line):
                    yield line.rsplit(None, 1)[0].removeprefix("./"), found[1], None
                elif found := _LINE.match(line):
                    yield found["image"], _unquoted(found["word"]), None
                else:
                    raise DataError(f'{file}, line {number}: `path<TAB>word` or `path, "word"` was expected, found {line[:80]!r}')
        except UnicodeDecodeError as error:
            raise DataError(f"{file} is no UTF-8 text: {error}") from error


def _unquoted(word: str) -> str:
    """ICDAR's `"Tiredness"` with `\\"` inside; other words stay as they are."""
    word = word.strip()
    if len(word) >= 2 and word[0] == word[-1] == '"':
        return re.sub(r"\\(.)", r"\1", word[1:-1])
    return word


def _xml(file: Path) -> Iterator[Row]:
    """ICDAR 2003's word.xml, or SVT's rectangles."""
    try:
        root = ElementTree.parse(file).getroot()
    except ElementTree.ParseError as error:
        raise DataError(f"{file} is no XML: {error}") from error
    for image in root.iter("image"):
        if image.get("file") is not None and image.get("tag") is not None:
            yield str(image.get("file")), str(image.get("tag")), None
            continue
        name = image.findtext("imageName")
        for box in image.iter("taggedRectangle"):
            x, y, width, height = (float(box.get(key, "nan")) for key in ("x", "y", "width", "height"))
            yield str(name), box.findtext("tag") or "", (x, y, x + width, y + height)


def _mat(file: Path) -> Iterator[Row]:
    """IIIT 5K-word's struct, or SynthText's arrays."""
    from scipy.io import loadmat

    try:
        content: dict[str, Any] = loadmat(str(file), simplify_cells=True)
    except (ValueError, OSError, NotImplementedError) as error:
        raise DataError(f"{file} cannot be read as a MATLAB file ({error})") from error
    if "wordBB" in content:
        for name, boxes, texts in zip(content["imnames"], content["wordBB"], content["txt"], strict=True):
            words = " ".join([texts] if isinstance(texts, str) else texts).split()
            corners = boxes.reshape(2, 4, -1)  # [x or y, corner, word]
            if corners.shape[-1] != len(words):
                raise DataError(f"{file}: '{name}' has {corners.shape[-1]} boxes and {len(words)} words")
            low, high = corners.min(axis=1), corners.max(axis=1)
            for number, word in enumerate(words):
                yield str(name), word, (low[0, number], low[1, number], high[0, number], high[1, number])
        return
    data = next((content[key] for key in ("testdata", "traindata") if key in content), None)
    if data is None:
        raise DataError(
            f"{file} holds {', '.join(key for key in content if key[0] != '_')}; IIIT's testdata or SynthText's wordBB was expected"
        )
    for row in [data] if isinstance(data, dict) else data:
        yield str(row["ImgName"]), str(row["GroundTruth"]), None


# ---- pictures ----------------------------------------------------------------------------------------------------------------------------


def _from_rows(name: str, file: Path, rows: list[Row]) -> WordSet:
    """A set whose pictures lie beside its list; several words of one picture are told apart by a number."""
    if all(box is None for _, _, box in rows):
        twice = len(rows) - len({image for image, _, _ in rows})
        if twice:
            raise DataError(f"{file}: {twice} pictures are named twice; a picture of one word was expected in each line")
        return WordSet(name, [image for image, _, _ in rows], [word for _, word, _ in rows], lambda image: file.parent / image, file)
    places = {f"{image}#{number}": (image, word, box) for number, (image, word, box) in enumerate(rows)}

    def cut(key: str) -> Image.Image:
        image, _, box = places[key]
        picture = open_image(file.parent / image)
        left, top, right, bottom = box or (0, 0, *picture.size)
        inside = (max(0, int(left)), max(0, int(top)), min(picture.width, int(right + 0.999)), min(picture.height, int(bottom + 0.999)))
        if inside[0] >= inside[2] or inside[1] >= inside[3]:
            raise ImageError(f"{file}: the box {box} of '{key}' has nothing of its picture ({picture.width} x {picture.height}) in it")
        return picture.crop(inside)

    return WordSet(name, list(places), [word for _, word, _ in places.values()], cut, file)


def _from_shards(name: str, place: Path) -> WordSet:
    shards = Shards([str(path) for path in find_shards(place)])
    words: dict[str, str] = {}
    where: dict[str, int] = {}
    for index, sample in enumerate(shards):
        if "txt" not in sample.members or sample.first(IMAGE_EXTENSIONS) is None:
            raise DataError(
                f"shard {sample.shard}: sample '{sample.key}' has {', '.join(sample.members)}; an image and `txt` were expected"
            )
        key = f"{sample.shard.name}/{sample.key}"
        words[key], where[key] = shards.read(sample, "txt").decode("utf-8", "replace").strip(), index

    def read(key: str) -> bytes:
        sample = shards[where[key]]
        return shards.read(sample, str(sample.first(IMAGE_EXTENSIONS)))

    return WordSet(name.removesuffix(".tar"), list(words), list(words.values()), read, place)
