"""Where a picture lies on its square canvas, and the ways to choose that: one rule that moves pixels, masks and boxes alike.

Every augmentation here is the same thing: mirror the picture or not, cut a rectangle out of it, scale it to so many pixels, lay it into the
upper left corner of a square of padding. A `Placement` says these numbers, and moves whatever belongs to the picture by them.

Source: large-scale jitter as Mask2Former's (scale 0.1 to 2), multi-scale crops as DETR's, the squash of ViSFT's captions.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Placement:
    """How a picture is put on a canvas.

    Attributes:
        size: Height and width of the picture.
        window: Left, top, right, bottom of the rectangle that is kept, in pixels of the (mirrored) picture; fractions are allowed.
        out: Height and width of that rectangle on the canvas.
        canvas: Side of the canvas.
        mirrored: The picture is mirrored left and right first.
    """

    size: tuple[int, int]
    window: tuple[float, float, float, float]
    out: tuple[int, int]
    canvas: int
    mirrored: bool = False

    @property
    def scale(self) -> tuple[float, float]:
        """Canvas pixels for a pixel of the picture, down and across."""
        left, top, right, bottom = self.window
        return self.out[0] / (bottom - top), self.out[1] / (right - left)

    @property
    def picture(self) -> Tensor:
        """Share of the canvas's height and width that is no padding [2]."""
        return torch.tensor(self.out, dtype=torch.float32) / self.canvas

    def image(self, image: Image.Image, fill: Colour) -> Image.Image:
        """Put an RGB picture on the canvas."""
        if self.mirrored:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        part = image.resize((self.out[1], self.out[0]), Image.Resampling.BILINEAR, box=self.window)
        if self.out == (self.canvas, self.canvas):
            return part
        canvas = Image.new("RGB", (self.canvas, self.canvas), fill)
        canvas.paste(part, (0, 0))
        return canvas

    def masks(self, masks: Sequence[np.ndarray]) -> Tensor:
        """Put masks on the canvas.

        Args:
            masks: uint8 [height, width] each.

        Returns:
            uint8 [n, canvas, canvas]; each pixel is that of the picture at its centre.
        """
        placed = torch.zeros(len(masks), self.canvas, self.canvas, dtype=torch.uint8)
        left, top, _, _ = self.window
        down, across = self.scale
        rows = np.clip(np.floor((np.arange(self.out[0]) + 0.5) / down + top).astype(int), 0, self.size[0] - 1)
        columns = np.clip(np.floor((np.arange(self.out[1]) + 0.5) / across + left).astype(int), 0, self.size[1] - 1)
        if self.mirrored:
            columns = self.size[1] - 1 - columns
        for place, mask in enumerate(masks):
            placed[place, : self.out[0], : self.out[1]] = torch.from_numpy(np.ascontiguousarray(mask[rows[:, None], columns]))
        return placed

    def boxes(self, boxes: Tensor) -> Tensor:
        """Move boxes [n, 4] (left, top, right, bottom in the picture) to canvas pixels, cut at the window's edge; some may become empty."""
        boxes = boxes.reshape(-1, 4).double()
        if self.mirrored:
            boxes = torch.stack([self.size[1] - boxes[:, 2], boxes[:, 1], self.size[1] - boxes[:, 0], boxes[:, 3]], dim=1)
        left, top, _, _ = self.window
        down, across = self.scale
        moved = (boxes - torch.tensor([left, top, left, top])) * torch.tensor([across, down, across, down])
        limit = torch.tensor([self.out[1], self.out[0], self.out[1], self.out[0]], dtype=torch.float64)
        return moved.clamp(min=torch.zeros(4, dtype=torch.float64), max=limit)

    def points(self, points: Tensor) -> Tensor:
        """Move points [n, 2] (x, y in the picture) to canvas pixels, also those that leave the window."""
        x = self.size[1] - points[:, 0] if self.mirrored else points[:, 0]
        down, across = self.scale
        return torch.stack([(x - self.window[0]) * across, (points[:, 1] - self.window[1]) * down], dim=1)

    def back(self, boxes: Tensor) -> Tensor:
        """Move boxes [n, 4] (left, top, right, bottom in canvas pixels) back to the picture."""
        left, top, _, _ = self.window
        down, across = self.scale
        boxes = boxes.double() / torch.tensor([across, down, across, down]) + torch.tensor([left, top, left, top])
        if self.mirrored:
            boxes = torch.stack([self.size[1] - boxes[:, 2], boxes[:, 1], self.size[1] - boxes[:, 0], boxes[:, 3]], dim=1)
        return boxes


Placer = Callable[[int, int, int, random.Random], Placement]  # (width, height, canvas, generator)


def whole(width: int, height: int) -> tuple[float, float, float, float]:
    """Give the window that keeps all."""
    return 0.0, 0.0, float(width), float(height)


def fit(width: int, height: int, canvas: int, generator: random.Random | None = None) -> Placement:
    """Scale the long side to the canvas: how pictures are laid out for evaluation."""
    long = max(width, height)
    out = (max(1, round(height * canvas / long)), max(1, round(width * canvas / long)))
    return Placement((height, width), whole(width, height), out, canvas)


def squash(width: int, height: int, canvas: int, generator: random.Random | None = None) -> Placement:
    """Fill the canvas, whatever the aspect ratio: how pictures are captioned."""
    return Placement((height, width), whole(width, height), (canvas, canvas), canvas)


def squash_and_flip(width: int, height: int, canvas: int, generator: random.Random) -> Placement:
    """Fill the canvas, mirrored half of the time."""
    return Placement((height, width), whole(width, height), (canvas, canvas), canvas, generator.random() < 0.5)


def fit_and_flip(width: int, height: int, canvas: int, generator: random.Random) -> Placement:
    """Scale the long side to the canvas, mirrored half of the time."""
    plain = fit(width, height, canvas)
    return Placement(plain.size, plain.window, plain.out, canvas, generator.random() < 0.5)


def jitter(
    width: int, height: int, canvas: int, generator: random.Random, scale: tuple[float, float] = (0.1, 2.0), flip: float = 0.5
) -> Placement:
    """Large-scale jitter: scale so that the picture just fits into `scale` times the canvas, then cut out a random part or pad.

    Args:
        width, height: Of the picture.
        canvas: Side of the canvas.
        generator: All randomness comes from it.
        scale: From and to; uniform.
        flip: Probability of mirroring.
    """
    mirrored = generator.random() < flip
    factor = min(canvas / height, canvas / width) * generator.uniform(*scale)
    tall, wide = max(1, round(height * factor)), max(1, round(width * factor))
    out = (min(canvas, tall), min(canvas, wide))
    top, left = (generator.uniform(0, edge - kept) for edge, kept in zip((tall, wide), out, strict=True))
    down, across = tall / height, wide / width
    window = (left / across, top / down, (left + out[1]) / across, (top + out[0]) / down)
    return Placement((height, width), _inside(window, width, height), out, canvas, mirrored)


DETR_SIDES = (480, 512, 544, 576, 608, 640, 672)  # of a canvas of 672; scaled along for others
DETR_SHORT = (400, 500, 600)
DETR_CROP = (384, 600)
DETR_CANVAS = 672


def multi_scale(width: int, height: int, canvas: int, generator: random.Random, flip: float = 0.5) -> Placement:
    """DETR's augmentation: mirror; half of the time cut out a random rectangle; scale the short side to one of several sizes.

    Source: ViSFT, mmf/datasets: short side 480 to 672 and at most 672 long; the rectangle has sides of 384 to 600 pixels of the picture
    scaled to a short side of 400, 500 or 600. The numbers are for a canvas of 672.
    """
    mirrored = generator.random() < flip
    window, kept = whole(width, height), (height, width)
    if generator.random() < 0.5:
        tall, wide = short_side_size(width, height, generator.choice(DETR_SHORT))
        crop = [generator.randint(min(DETR_CROP[0], edge), min(DETR_CROP[1], edge)) for edge in (tall, wide)]
        top, left = (generator.randint(0, edge - part) for edge, part in zip((tall, wide), crop, strict=True))
        down, across = tall / height, wide / width
        window = _inside((left / across, top / down, (left + crop[1]) / across, (top + crop[0]) / down), width, height)
        kept = (crop[0], crop[1])
    short = round(generator.choice(DETR_SIDES) * canvas / DETR_CANVAS)
    out = short_side_size(kept[1], kept[0], short, canvas)
    return Placement((height, width), window, (min(out[0], canvas), min(out[1], canvas)), canvas, mirrored)


def short_side_size(width: int, height: int, short: int, longest: int | None = None) -> tuple[int, int]:
    """Give height and width after scaling the short side to `short`, less where the long side would pass `longest`.

    Source: DETR's rule (the authors'); transformers and torchvision differ from it by a pixel in some shapes.
    """
    small, large = float(min(width, height)), float(max(width, height))
    if longest is not None and large / small * short > longest:
        short = max(1, round(longest * small / large))
    if short == min(width, height):
        return height, width
    if width < height:
        return max(1, int(short * height / width)), short
    return short, max(1, int(short * width / height))


def _inside(window: tuple[float, float, float, float], width: int, height: int) -> tuple[float, float, float, float]:
    """Take off what rounding laid beyond the picture's edge."""
    left, top, right, bottom = window
    return max(0.0, left), max(0.0, top), min(float(width), right), min(float(height), bottom)


PLACERS: dict[str, Placer] = {
    "fit": fit,
    "fit_and_flip": fit_and_flip,
    "squash": squash,
    "squash_and_flip": squash_and_flip,
    "jitter": jitter,
    "multi_scale": multi_scale,
}


def padding_colour(mean: Sequence[float]) -> Colour:
    """Give the colour that is 0 after an encoder's normalisation, as near as whole numbers allow."""
    red, green, blue = (math.floor(channel * 255) for channel in mean)
    return red, green, blue
