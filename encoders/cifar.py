"""CIFAR-10 and CIFAR-100 in their own batch files, read without running what a pickle may hold."""

import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmkit.errors import DataError

SIZE = 32  # pixels of an edge
_BYTES = 3 * SIZE * SIZE
# What numpy arrays in Python 2's pickles are made of, and nothing else: a pickle can name any function to be called.
_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}


@dataclass(frozen=True)
class CifarLayout:
    """One of the two sets: where its test images and its class names are."""

    title: str
    folder: str
    classes: int
    test: str
    meta: str
    labels_key: str
    names_key: str
    label_bytes: int  # of a row of the binary form; CIFAR-100 has the coarse label first


CIFAR10 = CifarLayout("CIFAR-10", "cifar-10-batches-py", 10, "test_batch", "batches.meta", "labels", "label_names", 1)
CIFAR100 = CifarLayout("CIFAR-100", "cifar-100-python", 100, "test", "meta", "fine_labels", "fine_label_names", 2)


def cifar_files(root: Path, layout: CifarLayout) -> Path | None:
    """Find the test batch in a folder or in the usual folder below it: Python's form, else the binary one."""
    binary = {"CIFAR-10": "cifar-10-batches-bin", "CIFAR-100": "cifar-100-binary"}[layout.title]
    places = [root / layout.test, root / layout.folder / layout.test]
    places += [root / f"{layout.test}.bin", root / binary / f"{layout.test}.bin"]
    return next((path for path in places if path.is_file()), None)


Pixels = Callable[[str], Image.Image]


def read_cifar(path: Path, layout: CifarLayout) -> tuple[Path, tuple[str, ...], tuple[int, ...], tuple[str, ...], tuple[str, ...], Pixels]:
    """Read a test batch: the fields of `LabelledImages`.

    Raises:
        DataError: The file is not what its name says.
    """
    rows, labels, names = _binary(path, layout) if path.suffix == ".bin" else _python(path, layout)
    if rows.shape != (len(labels), _BYTES) or rows.dtype != np.uint8 or len(names) != layout.classes or not len(labels):
        raise DataError(f"{path}: {list(rows.shape)} {rows.dtype}, {len(labels)} labels, {len(names)} names; {layout.title} was expected")
    if min(labels) < 0 or max(labels) >= layout.classes:
        raise DataError(f"{path}: labels from {min(labels)} to {max(labels)}; {layout.title} has {layout.classes} classes")
    ids = tuple(f"{path.name}/{index:05d}" for index in range(len(labels)))

    def pixels(name: str) -> Image.Image:
        row = rows[int(name.rpartition("/")[2])]
        return Image.fromarray(np.ascontiguousarray(row.reshape(3, SIZE, SIZE).transpose(1, 2, 0)))

    return path.parent, ids, tuple(labels), tuple(name.replace("_", " ") for name in names), (), pixels


def _python(path: Path, layout: CifarLayout) -> tuple[np.ndarray, list[int], list[str]]:
    batch, meta = _unpickle(path), _unpickle(path.parent / layout.meta)
    try:
        return np.asarray(batch["data"]), [int(label) for label in batch[layout.labels_key]], [str(n) for n in meta[layout.names_key]]
    except (KeyError, TypeError) as error:
        raise DataError(f"{path} has no {error}; a batch of {layout.title} was expected") from error


def _binary(path: Path, layout: CifarLayout) -> tuple[np.ndarray, list[int], list[str]]:
    listing = path.parent / ("batches.meta.txt" if layout.classes == 10 else "fine_label_names.txt")
    if not listing.is_file():
        raise DataError(f"{listing} is missing: the class names of {layout.title} come from it")
    data = np.frombuffer(path.read_bytes(), dtype=np.uint8)
    width = layout.label_bytes + _BYTES
    if len(data) % width:
        raise DataError(f"{path}: {len(data)} bytes are no whole number of rows of {width}; {layout.title} was expected")
    rows = data.reshape(-1, width)
    labels = rows[:, layout.label_bytes - 1].astype(int).tolist()
    return rows[:, layout.label_bytes :], labels, [line.strip() for line in listing.read_text().splitlines() if line.strip()]


class _PlainData(pickle.Unpickler):
    """Reads numbers, texts, lists, dictionaries and numpy arrays; refuses everything that would call a function."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is no plain data")
        return super().find_class(module, name)


def _unpickle(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise DataError(f"{path} is missing: it belongs beside the test batch")
    try:
        content = _PlainData(io.BytesIO(path.read_bytes()), encoding="latin1").load()
    except (pickle.UnpicklingError, EOFError, ValueError, ImportError, AttributeError, IndexError, KeyError, TypeError) as error:
        raise DataError(f"{path} is no batch file of CIFAR: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} holds a {type(content).__name__}; a batch file of CIFAR holds a dictionary")
    return content
