"""Tiles: a large picture is shown whole and, at the encoder's own resolution, in pieces (any resolution).

    tiles = Tiles(most=4, spec=encoder.spec)
    tiles.grid(800, 400)                 # (1, 2): one row of two tiles
    tiles.views(picture)                 # the whole picture, then its tiles, left to right and top to bottom
    tiles.place("<image>\\nwhat is it", [3])      # three placeholders in place of one

Each view goes through the encoder like a picture of its own and has a picture's number of tokens, so that a model with tiles is an ordinary
LLaVA that is given several images: packing, checks and exports know nothing of them. No token marks the end of a row of tiles, and no
padding is cut off, as LLaVA-NeXT does.

Source: LLaVA-NeXT (January 2024), whose rule chooses the grid: the most pixels of the picture, then the least padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from llm_stage.chat_format import IMAGE_MARK
from mmkit.errors import ConfigError, DataError
from mmkit.images import FILTERS, ImageSpec, open_image

ORIENTATION, TURNED = 0x0112, (5, 6, 7, 8)  # EXIF: stored lying on its side
MOST = 36


@dataclass(frozen=True)
class Tiles:
    """How pictures are cut.

    Attributes:
        most: Tiles of a picture at most, besides the whole; 0 cuts nothing.
        spec: The encoder's.
    """

    most: int
    spec: ImageSpec

    def __post_init__(self) -> None:
        """Refuse numbers that are none."""
        if not 0 <= self.most <= MOST or self.most == 1:
            raise ConfigError(f"tiles is {self.most}; 0 shows the whole picture alone, 2 to {MOST} cut it besides")

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """Give rows and columns for a picture; (1, 1) shows the whole alone."""
        size = self.spec.size
        best, shape = (min(1.0, size / width, size / height) ** 2 * width * height, -float(size * size)), (1, 1)
        for rows in range(1, self.most + 1):
            for columns in range(1, self.most // rows + 1):
                scale = min(1.0, columns * size / width, rows * size / height)
                shown = scale * scale * width * height  # pixels of the picture that survive
                key = (shown, shown - rows * columns * size * size)  # most of them, then least padding
                if key > best:
                    best, shape = key, (rows, columns)
        return shape

    def count(self, width: int, height: int) -> int:
        """Give the number of views: 1 for the whole, and the tiles."""
        rows, columns = self.grid(width, height)
        return 1 if rows * columns == 1 else 1 + rows * columns

    def views(self, picture: Image.Image) -> list[Image.Image]:
        """Cut a picture: itself, and size x size tiles of it, scaled to fit its grid and centred on the mean colour."""
        rows, columns = self.grid(*picture.size)
        if rows * columns == 1:
            return [picture]
        size = self.spec.size
        scale = min(columns * size / picture.width, rows * size / picture.height)
        scaled = picture.resize(
            (max(1, min(columns * size, round(picture.width * scale))), max(1, min(rows * size, round(picture.height * scale)))),
            FILTERS[self.spec.interpolation],
        )
        mean = tuple(int(channel * 255) for channel in self.spec.mean)
        canvas = Image.new("RGB", (columns * size, rows * size), mean)
        canvas.paste(scaled, ((canvas.width - scaled.width) // 2, (canvas.height - scaled.height) // 2))
        boxes = [(column * size, row * size, (column + 1) * size, (row + 1) * size) for row in range(rows) for column in range(columns)]
        return [picture, *(canvas.crop(box) for box in boxes)]

    def count_of(self, path: Path, where: str = "") -> int:
        """Give the number of views of a file, from its header alone.

        Raises:
            ImageError: It is no picture.
        """
        try:
            with Image.open(path) as image:
                width, height = image.size
                if image.getexif().get(ORIENTATION) in TURNED:
                    width, height = height, width
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # open_image says it better, or opens it after all
            width, height = open_image(path, where).size
        return self.count(width, height)

    def place(self, text: str, counts: Sequence[int]) -> str:
        """Put as many placeholders in the place of each as its picture has views.

        Args:
            text: With a mark for each picture.
            counts: Views of each picture, in the order of the marks.

        Raises:
            DataError: There are more or fewer marks.
        """
        pieces = text.split(IMAGE_MARK)
        if len(pieces) != len(counts) + 1:
            raise DataError(f"{len(pieces) - 1} times {IMAGE_MARK} and {len(counts)} picture(s)")
        return "".join(piece + IMAGE_MARK * count for piece, count in zip(pieces, [*counts, 0], strict=True))
