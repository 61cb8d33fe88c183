"""Images with their captions, from the files people have: COCO JSON, Karpathy's splits, ALBEF's and LAVIS' lists, Flickr's text files."""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmkit.errors import DataError

FORMATS = (
    'COCO JSON {"images": [...], "annotations": [...]}; Karpathy\'s {"images": [{"filename", "split", "sentences"}]}; '
    'a list of {"image", "caption"}; text with image.jpg,caption or image.jpg#0<TAB>caption in a line'
)
_LINE = re.compile(r"^(?P<image>[^\t|]+?\.(?:jpe?g|png|webp|bmp|gif|tiff?))(?:#\d+\t|\|\s*\d+\s*\||\s*[,\t])\s*(?P<caption>.*)$", re.I)
_SHOWN = 3


@dataclass(frozen=True)
class Captioned:
    """Images, captions, and which belong together.

    Attributes:
        root: Folder that `paths` are relative to.
        paths: N image files.
        captions: M texts.
        owner: Index of each caption's image [M].
        notes: What was left out.
        pixels: Gives the bytes of an image that is no file of its own; None where `paths` are files.
    """

    root: Path
    paths: tuple[str, ...]
    captions: tuple[str, ...]
    owner: tuple[int, ...]
    notes: tuple[str, ...] = ()
    pixels: Callable[[str], bytes] | None = field(default=None, compare=False)

    def source(self, path: str) -> Path | bytes:
        """Give what `mmkit.images.open_image` takes."""
        return self.pixels(path) if self.pixels else self.root / path


Rows = list[tuple[str, list[str]]]  # (image, its captions), in the order of the file


def read_captions(file: Path, root: Path, split: str = "test", first: int = 0, partial: bool = False) -> Captioned:
    """Read a caption file and find its images.

    Args:
        file: In one of `FORMATS`.
        root: Folder of the images; a name is looked for below it as the file has it, then by its last part alone.
        split: Which split of a file that holds several.
        first: Take only so many captions of each image; 0 takes all.
        partial: Leave out images that are not there (and their captions), instead of stopping.

    Raises:
        DataError: The file has another format or no captions, or images are missing.
    """
    if not file.is_file():
        raise DataError(f"--captions {file}: {'it is a folder' if file.is_dir() else 'there is no such file'}; it should be {FORMATS}")
    if not root.is_dir():
        raise DataError(f"--images {root}: there is no such folder; it should hold the images that {file.name} names")
    rows, notes = _rows(file, split)
    bare = [image for image, texts in rows if not texts]
    if bare:
        notes.append(f"{len(bare)} images without a caption left out, {bare[0]} for one")
    rows = [(image, texts[:first] if first else texts) for image, texts in rows if texts]
    if not rows:
        raise DataError(f"--captions {file} has no caption in it; it should be {FORMATS}")
    places = {image: _find_image(root, image) for image, _ in rows}
    absent = [image for image, place in places.items() if place is None]
    if absent:
        notes.append(f"{len(absent)} of {len(rows)} images are missing: {', '.join(absent[:_SHOWN])}")
        if not partial or len(absent) == len(rows):
            raise DataError(
                f"--images {root}: {notes[-1]} (named by {file.name}). Point --images to the folder those names are relative to"
                + ("" if len(absent) == len(rows) else ", or leave them out with --partial true")
            )
        rows = [(image, texts) for image, texts in rows if places[image] is not None]
    owner = tuple(index for index, (_, texts) in enumerate(rows) for _ in texts)
    captions = tuple(text for _, texts in rows for text in texts)
    return Captioned(root, tuple(str(places[image]) for image, _ in rows), captions, owner, tuple(notes))


def caption_rows(file: Path, split: str = "test") -> Rows:
    """The images of a caption file with their captions; images are not looked for.

    Raises:
        DataError: The file does not exist, or has another format.
    """
    if not file.is_file():
        raise DataError(f"--captions {file}: {'it is a folder' if file.is_dir() else 'there is no such file'}; it should be {FORMATS}")
    return _rows(file, split)[0]


def _find_image(root: Path, name: str) -> str | None:
    for candidate in (name, name.replace("\\", "/").rsplit("/", 1)[-1]):
        if (root / candidate).is_file():
            return candidate
    return None


# ---- formats -------------------------------------------------------------------------------------------------------------------------


def _rows(file: Path, split: str) -> tuple[Rows, list[str]]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"--captions {file} is not UTF-8 text ({error}); it should be {FORMATS}") from error
    if file.suffix.lower() != ".json" and not text.lstrip().startswith(("{", "[")):
        return _from_lines(file, text), []
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"--captions {file} is no valid JSON: {error}") from error
    try:
        if isinstance(content, list):
            return _from_list(content), []
        if isinstance(content, dict) and "annotations" in content and "images" in content:
            return _from_coco(content), []
        if isinstance(content, dict) and isinstance(content.get("images"), list):
            return _from_karpathy(file, content["images"], split)
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"--captions {file}: a record lacks {error}; the file should be {FORMATS}") from error
    held = f"an object with {', '.join(list(content)[:6]) or 'nothing'}" if isinstance(content, dict) else f"a {type(content).__name__}"
    raise DataError(f"--captions {file} holds {held}; it should be {FORMATS}")


def _grouped(pairs: Iterable[tuple[Any, str]], known: Mapping[Any, str] | None = None) -> Rows:
    """Collect captions by image, in order of first appearance; `known` gives images their names and may hold some without captions."""
    found: dict[Any, list[str]] = {key: [] for key in known or {}}
    for key, caption in pairs:
        if not isinstance(caption, str):
            raise TypeError(f"a caption that is text (it has {caption!r})")
        found.setdefault(key, []).append(" ".join(caption.split()))
    return [(known[key] if known is not None else str(key), [text for text in texts if text]) for key, texts in found.items()]


def _from_coco(content: Mapping[str, Any]) -> Rows:
    known = {image["id"]: str(image["file_name"]) for image in content["images"]}
    strange = [row["image_id"] for row in content["annotations"] if row["image_id"] not in known]
    if strange:
        raise DataError(f"a caption belongs to image {strange[0]!r}, which is not among the {len(known)} images of the file")
    return _grouped(((row["image_id"], row["caption"]) for row in content["annotations"]), known)


def _from_karpathy(file: Path, images: Sequence[Mapping[str, Any]], split: str) -> tuple[Rows, list[str]]:
    splits = sorted({str(image["split"]) for image in images})
    if split not in splits:
        raise DataError(f"--captions {file} has no split '{split}'; it has {', '.join(splits)} (--split)")
    taken = [image for image in images if image["split"] == split]
    rows = [
        ("/".join(filter(None, (image.get("filepath", ""), image["filename"]))), [str(s["raw"]).strip() for s in image["sentences"]])
        for image in taken
    ]
    return [(name, [text for text in texts if text]) for name, texts in rows], [f"split {split}"]


def _from_list(content: Sequence[Mapping[str, Any]]) -> Rows:
    pairs = [
        (row["image"], caption) for row in content for caption in (row["caption"] if isinstance(row["caption"], list) else [row["caption"]])
    ]
    return _grouped(pairs)


def _from_lines(file: Path, text: str) -> Rows:
    pairs = []
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    for position, (number, line) in enumerate(lines):
        match = _LINE.match(line)
        if match is None:
            if position == 0:
                continue  # the head of the table
            raise DataError(f"--captions {file}, line {number}, names no image and caption: {line[:60]!r}; the file should be {FORMATS}")
        caption = match["caption"].strip()
        quoted = len(caption) > 1 and caption[0] == caption[-1] == '"'
        pairs.append((match["image"].strip(), caption[1:-1].replace('""', '"') if quoted else caption))
    return _grouped(pairs)
