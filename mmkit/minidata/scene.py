"""What a scene is, and what is where in it: plain geometry, with no pixels and no words."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

RELATIONS = ("left", "right", "above", "below")
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}

Box = tuple[int, int, int, int]  # x, y, width, height in pixels; x to the right, y downwards


@dataclass(frozen=True, eq=False)
class Placed:
    """One drawing, placed.

    Attributes:
        name: The drawing's name.
        box: The tight box of `mask`.
        mask: bool [size, size]; True where this object is what one sees (alpha at least one half, not covered by a later one).
        z: Height in the pile: 0 is painted first.
        sprite: RGBA pixels as painted, resized and turned.
        corner: Where the sprite's upper left pixel lies, x and y.
    """

    name: str
    box: Box
    mask: np.ndarray = field(repr=False)
    z: int
    sprite: Image.Image = field(repr=False)
    corner: tuple[int, int]

    @property
    def centre(self) -> tuple[float, float]:
        """Middle of the box, x and y in pixels."""
        x, y, width, height = self.box
        return x + width / 2, y + height / 2


@dataclass(frozen=True, eq=False)
class Word:
    """One written word: its letters, box, ink (RGB) and font size in pixels."""

    text: str
    box: Box
    ink: tuple[int, int, int]
    font_size: int
    anchor: tuple[int, int]  # where the text is drawn from; the box lies a little lower

    @property
    def centre(self) -> tuple[float, float]:
        """Middle of the box, x and y in pixels."""
        x, y, width, height = self.box
        return x + width / 2, y + height / 2


@dataclass(frozen=True, eq=False)
class Scene:
    """A picture as facts.

    Attributes:
        size: Side in pixels.
        background: Colour name.
        tones: One or two RGB shades of that colour.
        split: How two shades share the canvas: "plain", "across", "down", "diagonal".
        objects: In painting order.
        word: The word written, if any.
    """

    size: int
    background: str
    tones: tuple[tuple[int, int, int], ...]
    split: str
    objects: tuple[Placed, ...]
    word: Word | None = None

    @property
    def names(self) -> list[str]:
        """Names in painting order, repeats included."""
        return [item.name for item in self.objects]

    @property
    def counts(self) -> dict[str, int]:
        """Name -> how many, in order of first appearance."""
        return dict(Counter(self.names))

    @property
    def singles(self) -> list[Placed]:
        """Objects whose name occurs once: those "the cat" can point to."""
        counts = self.counts
        return [item for item in self.objects if counts[item.name] == 1]


def relation(first: Placed | Word, second: Placed | Word, size: int) -> str | None:
    """Where the first is, seen from the second: "left", "right", "above", "below", or None where people might disagree.

    Clear-cut means: the centres lie at least a fifth of the canvas apart along one axis, twice as far as along the other, and the boxes
    overlap by at most a fifth of the smaller one along that axis.
    """
    (x1, y1), (x2, y2) = first.centre, second.centre
    dx, dy = x1 - x2, y1 - y2
    if abs(dx) >= abs(dy):
        return _side(dx, dy, _overlap(first.box, second.box, 0), size, "left", "right")
    return _side(dy, dx, _overlap(first.box, second.box, 1), size, "above", "below")


def _side(along: float, across: float, overlap: float, size: int, negative: str, positive: str) -> str | None:
    if abs(along) < size / 5 or abs(along) < 2 * abs(across) or overlap > 0.2:
        return None
    return negative if along < 0 else positive


def _overlap(first: Box, second: Box, axis: int) -> float:
    """Shared length along an axis, as a share of the shorter box's."""
    shared = min(first[axis] + first[axis + 2], second[axis] + second[axis + 2]) - max(first[axis], second[axis])
    return max(0, shared) / min(first[axis + 2], second[axis + 2])


def place_of(item: Placed | Word, size: int) -> str:
    """The third of the canvas the centre lies in: "top left", "left", "middle", "bottom", ..."""
    x, y = item.centre
    row = ("top", "", "bottom")[min(2, int(3 * y / size))]
    column = ("left", "", "right")[min(2, int(3 * x / size))]
    return " ".join(part for part in (row, column) if part) or "middle"


def only_one_beside(scene: Scene, anchor: Placed, side: str) -> Placed | None:
    """The one object on that side of the anchor, where the answer is beyond dispute.

    It must stand in a clear-cut relation to the anchor, and no other object may lie on that side by more than a tenth of the canvas.
    """
    axis, sign = (0, 1) if side in ("left", "right") else (1, 1)
    if side in ("left", "above"):
        sign = -1
    on_that_side = [
        item for item in scene.objects if item is not anchor and sign * (item.centre[axis] - anchor.centre[axis]) > scene.size / 10
    ]
    if len(on_that_side) != 1 or relation(on_that_side[0], anchor, scene.size) != side:
        return None
    return on_that_side[0]
