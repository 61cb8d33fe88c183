"""Which patches a student sees: random, block, block-reversed, torus and complementary masks, all with an exact count.

A mask of ratio r on a grid of N patches removes floor(r N) of them. The number of kept patches, K, is the same for every image, so that a
batch of keep indices is a rectangle [B, K]. All randomness is a function of (seed, epoch, index, view): a mask survives a resumed run and
any number of workers.

Source: the block generator is BEiT's (Bao et al., 2021) as EVA-02 uses it; reversing is from UTA, section 3.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from mmkit.errors import ConfigError, find

LEAST_BLOCK, ITS_GRID = 16, 196  # BEiT's smallest block, in patches, on its 14 x 14 grid
LEAST_ASPECT = 0.3  # a block's height by width is between this and its inverse
TRIES = 10
APART = 0x6D61736B  # keeps the masks' randomness apart from the crops', which has the same seed, epoch and index
Grid = tuple[int, int]


@dataclass
class MaskConfig:
    """How patches are left out."""

    type: Literal["block_reversed", "block", "block_torus", "random", "complementary"] = field(
        default="block_reversed",
        metadata={"help": "shape of what is removed; complementary is a block mask and its inverse (ratio 0.5, two views)"},
    )
    ratio: float = field(default=0.4, metadata={"help": "share of patches removed; 0 keeps all"})
    views: int = field(default=1, metadata={"help": "masks of one crop in a step: the student sees each, the teacher the crop once"})

    def validate(self) -> None:
        """Refuse a share that leaves nothing to see, or a pair that would not cover the picture."""
        if not 0 <= self.ratio < 1:
            raise ConfigError(f"mask.ratio is {self.ratio}; a share from 0 (keep all) to below 1 is right")
        if self.views < 1:
            raise ConfigError(f"mask.views is {self.views}; at least 1 is right")
        if self.type == "complementary" and (self.ratio != 0.5 or self.views % 2):
            raise ConfigError(f"mask.ratio is {self.ratio}, mask.views {self.views}; complementary pairs halve the picture: give 0.5 and 2")


def kept_count(patches: int, ratio: float) -> int:
    """Give K, the number of patches that stay of `patches` when a share `ratio` is removed."""
    return patches - math.floor(ratio * patches + 1e-6)


def least_block(grid: Grid) -> float:
    """Give the smallest area of a drawn block, in patches: 16 from 14 x 14 patches on, in proportion below (2.9 on 6 x 6).

    On 6 x 6 patches with ratio 0.5 a least area of 16 would leave one block of nearly all 18 patches to draw: hardly any variety.
    """
    return min(float(LEAST_BLOCK), LEAST_BLOCK * grid[0] * grid[1] / ITS_GRID)


def block_mask(grid: Grid, count: int, generator: np.random.Generator, torus: bool = False) -> np.ndarray:
    """Remove exactly `count` patches in rectangles, and fill up what rectangles cannot reach at random.

    Args:
        grid: Patches down and across.
        count: How many to remove.
        generator: Where randomness comes from.
        torus: Let a rectangle begin anywhere and wrap around: every position is then removed equally often.

    Returns:
        bool [h, w], True where removed.
    """
    height, width = grid
    mask = np.zeros(grid, dtype=bool)
    removed = 0
    while removed < count:
        added = _add_block(mask, count - removed, generator, torus)
        if added == 0:
            break
        removed += added
    if removed < count:
        free = np.flatnonzero(~mask)
        mask.reshape(-1)[generator.choice(free, count - removed, replace=False)] = True
    assert mask.sum() == count, (height, width, count)
    return mask


def _add_block(mask: np.ndarray, budget: int, generator: np.random.Generator, torus: bool) -> int:
    """Lay one more rectangle on the mask; gives how many patches it newly removed, 0 when ten tries found none that fits."""
    height, width = mask.shape
    for _ in range(TRIES):
        least = least_block((height, width))
        area = least + (budget - least) * generator.random()  # near the end the budget is below the least: the area then lies between both
        aspect = math.exp(generator.uniform(math.log(LEAST_ASPECT), -math.log(LEAST_ASPECT)))
        rows, columns = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if rows >= height or columns >= width:
            continue
        top = int(generator.integers(0, height if torus else height - rows + 1))
        left = int(generator.integers(0, width if torus else width - columns + 1))
        block: tuple[Any, ...] = (slice(top, top + rows), slice(left, left + columns))
        if torus:
            block = np.ix_(np.arange(top, top + rows) % height, np.arange(left, left + columns) % width)
        new = rows * columns - int(mask[block].sum())
        if 0 < new <= budget:
            mask[block] = True
            return new
    return 0


def _random(grid: Grid, removed: int, generator: np.random.Generator) -> np.ndarray:
    mask = np.zeros(grid[0] * grid[1], dtype=bool)
    mask[generator.choice(len(mask), removed, replace=False)] = True
    return mask.reshape(grid)


def _block_reversed(grid: Grid, removed: int, generator: np.random.Generator) -> np.ndarray:
    """A block mask, or (one time in two) blocks of what is kept; the count is the same either way, which a plain flip would not give."""
    if generator.random() < 0.5:
        return block_mask(grid, removed, generator)
    return ~block_mask(grid, grid[0] * grid[1] - removed, generator)


Scheme = Callable[[Grid, int, np.random.Generator], np.ndarray]
SCHEMES: dict[str, Scheme] = {
    "random": _random,
    "block": block_mask,
    "block_reversed": _block_reversed,
    "block_torus": lambda grid, removed, generator: block_mask(grid, removed, generator, torus=True),
}


class Masks:
    """Draws keep indices for one grid.

    Args:
        config: Shape and share.
        grid: Patches down and across.
        seed: The run's.

    Attributes:
        kept: K, patches kept of every image.
    """

    def __init__(self, config: MaskConfig, grid: Grid, seed: int = 0) -> None:
        config.validate()
        self.config, self.grid, self.seed = config, grid, seed
        self.kept = kept_count(grid[0] * grid[1], config.ratio)
        self.scheme = find("mask type", {**SCHEMES, "complementary": block_mask}, config.type)
        if self.kept < 1:
            raise ConfigError(f"mask.ratio {config.ratio} leaves none of {grid[0]} x {grid[1]} patches; make it smaller")
        if config.type == "complementary" and grid[0] * grid[1] % 2:
            raise ConfigError(
                f"a grid of {grid[0]} x {grid[1]} patches cannot be halved: complementary masks need an even number of patches"
            )

    def keep(self, epoch: int, index: int) -> Tensor:
        """Give the kept positions [V, K] of an image in an epoch, one row a view, ascending; CLS is not counted."""
        return torch.stack([self._view(epoch, index, view) for view in range(self.config.views)])

    def _view(self, epoch: int, index: int, view: int) -> Tensor:
        removed = self.grid[0] * self.grid[1] - self.kept
        if removed == 0:
            return torch.arange(self.kept)
        paired = self.config.type == "complementary"  # views 2 n and 2 n + 1 share a mask: the second sees what the first did not
        generator = np.random.default_rng([self.seed, epoch, index, view // 2 if paired else view, APART])
        mask = self.scheme(self.grid, removed, generator).reshape(-1)
        return torch.from_numpy(np.flatnonzero(mask if paired and view % 2 else ~mask))
