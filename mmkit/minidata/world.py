"""Scenes drawn at random, their pixels, and picture-caption pairs without end."""

import math
from collections.abc import Sequence
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mmkit.minidata.drawings import sprite
from mmkit.minidata.names import countable, object_names
from mmkit.minidata.scene import Box, Placed, Scene, Word

SIZE = 96

# Background colours. Each is one a person names without hesitation; black (it swallows the drawings' outlines) and brown (it passes for
# orange or red at small size) are left out.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 56, 56),
    "orange": (247, 148, 40),
    "yellow": (250, 226, 76),
    "green": (92, 186, 92),
    "blue": (72, 128, 222),
    "purple": (142, 86, 196),
    "pink": (250, 172, 204),
    "gray": (158, 160, 164),
    "white": (248, 248, 246),
}

WORDS: tuple[str, ...] = (
    "add",
    "air",
    "art",
    "bag",
    "big",
    "bus",
    "cold",
    "cup",
    "dark",
    "day",
    "deep",
    "down",
    "east",
    "farm",
    "fast",
    "free",
    "game",
    "gold",
    "good",
    "green",
    "happy",
    "hat",
    "hello",
    "home",
    "hot",
    "lamp",
    "left",
    "light",
    "long",
    "love",
    "magic",
    "map",
    "menu",
    "milk",
    "music",
    "new",
    "night",
    "north",
    "now",
    "open",
    "park",
    "play",
    "pull",
    "push",
    "quiet",
    "red",
    "river",
    "safe",
    "sale",
    "shop",
    "slow",
    "small",
    "south",
    "spring",
    "stop",
    "summer",
    "taxi",
    "train",
    "warm",
    "water",
    "west",
    "yes",
    "zoo",
)

# Side of an object as a share of the canvas, by the number of objects.
_SIDES = {1: (0.40, 0.95), 2: (0.30, 0.48), 3: (0.27, 0.42), 4: (0.25, 0.37), 5: (0.23, 0.34)}
_MOST_OVERLAP = 0.12  # of the smaller box
_ENOUGH_SEEN = 0.6  # an object of which others cover more than the rest is placed again


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)  # Aileron, inside Pillow: the same letters on every machine


def sample_scene(
    rng: np.random.Generator,
    names: Sequence[str],
    n_objects: int | None = None,
    word_probability: float = 0.0,
    size: int = SIZE,
) -> Scene:
    """Draw a scene at random.

    Args:
        rng: Source of all randomness; the same state gives the same scene.
        names: Names to choose from; at least `n_objects` of them.
        n_objects: 0 to 5 objects; None draws 1 to 5 (half of them 1). 0 needs `word_probability=1`.
        word_probability: How often a word is written as well; it has a place of its own.
        size: Side of the picture in pixels.

    Returns:
        The scene. Objects lie wholly inside the canvas and overlap little.

    Raises:
        ValueError: `n_objects` is not in 0..5, or there are fewer names than objects.
    """
    if n_objects is None:
        n_objects = (1, 1, 1, 1, 2, 2, 3, 4, 5)[int(rng.integers(9))]
    if not 0 <= n_objects <= 5 or len(names) < n_objects:
        raise ValueError(
            f"sample_scene: {n_objects} objects of {len(names)} names asked for; 0 to 5 objects can be drawn, from as many names"
        )
    has_word = bool(rng.random() < word_probability)
    if n_objects == 0 and not has_word:
        raise ValueError("sample_scene: 0 objects and no word would be an empty picture; give word_probability=1 with n_objects=0")
    background = tuple(COLOURS)[int(rng.integers(len(COLOURS)))]
    tones, split = _tones(rng, background)
    word = _sample_word(rng, background, n_objects, size) if has_word else None
    chosen = _choose_names(rng, names, n_objects)
    objects = _place(rng, chosen, word, size)
    return Scene(size, background, tones, split, objects, word)


def _tones(rng: np.random.Generator, background: str) -> tuple[tuple[tuple[int, int, int], ...], str]:
    """One shade near the named colour, or two: a lighter and a darker one, which people would still call by the same name."""
    shift = rng.integers(-9, 10, 3)
    base = [int(min(255, max(0, channel + change))) for channel, change in zip(COLOURS[background], shift, strict=True)]
    if rng.random() < 0.6:
        return ((base[0], base[1], base[2]),), "plain"
    darker = [int(channel * 0.88) for channel in base]
    split = ("across", "down", "diagonal")[int(rng.integers(3))]
    pair = ((base[0], base[1], base[2]), (darker[0], darker[1], darker[2]))
    return (pair if rng.random() < 0.5 else pair[::-1]), split


def _sample_word(rng: np.random.Generator, background: str, n_objects: int, size: int) -> Word:
    """A word in the upper or lower third (anywhere when it is alone), in an ink that stands out."""
    text = WORDS[int(rng.integers(len(WORDS)))]
    dark = ((20, 20, 24), (20, 20, 24), (34, 40, 110), (120, 20, 30))[int(rng.integers(4))]
    light_ink = background in ("red", "blue", "purple") or (background == "green" and rng.random() < 0.3)
    ink = (255, 255, 255) if light_ink else ((20, 20, 24) if background in ("orange", "gray", "green") else dark)
    largest, smallest = (0.36, 0.26) if n_objects == 0 else (0.30, 0.24)
    font_size = round(size * (smallest + (largest - smallest) * rng.random()))
    while True:
        left, top, right, bottom = (int(edge) for edge in _font(font_size).getbbox(text))
        if right - left <= size - 6:
            break
        font_size -= 1
    width, height = right - left, bottom - top
    x = int(rng.integers(2, size - width - 1))
    y = int(rng.integers(2, size - height - 1))
    if n_objects:  # the objects need the rest
        y = 3 if y < size / 2 else size - height - 3
    return Word(text, (x, y, width, height), ink, font_size, (x - left, y - top))


def _choose_names(rng: np.random.Generator, names: Sequence[str], n_objects: int) -> list[str]:
    """Distinct names, or (often enough for counting) one of them repeated."""
    picked: list[str] = []
    while len(picked) < n_objects:
        name = names[int(rng.integers(len(names)))]
        if name not in picked:
            picked.append(name)
    if n_objects >= 2 and rng.random() < (0.25 if n_objects == 2 else 0.45) and countable(picked[0]):
        copies = 2 + int(rng.integers(n_objects - 1))
        picked = [picked[0]] * copies + picked[copies:]
        order = rng.permutation(n_objects)
        picked = [picked[int(i)] for i in order]
    return picked


def _turned(rng: np.random.Generator, name: str, side: float) -> Image.Image:
    """The drawing with its longer side at `side` pixels, turned a little, mirrored half of the time; cut to what is visible."""
    master = sprite(name)
    angle = float(rng.normal(0.0, 6.0))
    mirrored = bool(rng.random() < 0.5)
    scale = side / max(master.size)
    width, height = max(3, round(master.width * scale)), max(3, round(master.height * scale))
    picture = master.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=2.0)
    if mirrored:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if abs(angle) > 1.5:
        picture = picture.rotate(angle, Image.Resampling.BILINEAR, expand=True)
    box = picture.getchannel("A").point(_HALF).getbbox()
    return picture.crop(box) if box is not None else picture


_HALF = [0] * 128 + [255] * 128


def _place(rng: np.random.Generator, chosen: list[str], word: Word | None, size: int) -> tuple[Placed, ...]:
    """Sizes and positions; the whole picture is tried again with smaller objects where they do not fit."""
    if not chosen:
        return ()
    low, high = _SIDES[len(chosen)]
    if word is not None:  # less room: the word keeps its strip
        low, high = min(low, 0.36), min(high, 0.55)
    shrink = 1.0
    while True:
        sprites = [_turned(rng, name, shrink * size * (low + (high - low) * rng.random())) for name in chosen]
        corners = _corners(rng, sprites, word, size)
        if corners is not None:
            objects = _seen(chosen, sprites, corners, size)
            if objects is not None:
                return objects
        shrink *= 0.93


def _corners(rng: np.random.Generator, sprites: list[Image.Image], word: Word | None, size: int) -> list[tuple[int, int]] | None:
    """Upper left corners, drawn one after another; None where one finds no room in thirty trials."""
    taken: list[Box] = [] if word is None else [word.box]
    corners: list[tuple[int, int]] = []
    line = _line(rng, len(sprites))
    for position, picture in enumerate(sprites):
        width, height = picture.size
        if width > size - 2 or height > size - 2:
            return None
        for trial in range(30):
            x, y = (int(rng.random() * (size - width + 1)), int(rng.random() * (size - height + 1)))
            if line is not None and trial < 15:
                x, y = _on_line(line, position, len(sprites), (x, y), (width, height), size)
            box = (x, y, width, height)
            if all(_shared(box, other) <= (0.0 if word is not None and other is word.box else _MOST_OVERLAP) for other in taken):
                break
        else:
            return None
        taken.append(box)
        corners.append((x, y))
    return corners


def _line(rng: np.random.Generator, count: int) -> str | None:
    """Half of the scenes with two or three objects stand in a row or a column, so that "left of" is often clear-cut."""
    if count not in (2, 3) or rng.random() < 0.4:
        return None
    return "row" if rng.random() < 0.5 else "column"


def _on_line(line: str, position: int, count: int, corner: tuple[int, int], extent: tuple[int, int], size: int) -> tuple[int, int]:
    """Pull a free position to its cell of the row or column, keeping a little of its freedom."""
    axis = 0 if line == "row" else 1
    along = (position + 0.5) * size / count - extent[axis] / 2 + (corner[axis] / size - 0.5) * 0.1 * size
    across_axis = 1 - axis
    across = (size - extent[across_axis]) / 2 + (corner[across_axis] / size - 0.3) * 0.3 * size
    pair = [0, 0]
    pair[axis], pair[across_axis] = round(along), round(across)
    return tuple(min(max(0, value), size - length) for value, length in zip(pair, extent, strict=True))  # type: ignore[return-value]


def _shared(first: Box, second: Box) -> float:
    """Area in common, as a share of the smaller box."""
    width = min(first[0] + first[2], second[0] + second[2]) - max(first[0], second[0])
    height = min(first[1] + first[3], second[1] + second[3]) - max(first[1], second[1])
    if width <= 0 or height <= 0:
        return 0.0
    return width * height / min(first[2] * first[3], second[2] * second[3])


def _seen(chosen: list[str], sprites: list[Image.Image], corners: list[tuple[int, int]], size: int) -> tuple[Placed, ...] | None:
    """Masks of what is visible, upper objects first; None where an object is mostly covered."""
    covered = np.zeros((size, size), dtype=bool)
    found: list[Placed] = []
    for z in reversed(range(len(chosen))):
        (x, y), picture = corners[z], sprites[z]
        mask = np.zeros((size, size), dtype=bool)
        opaque = np.asarray(picture.getchannel("A")) >= 128
        mask[y : y + picture.height, x : x + picture.width] = opaque
        visible = mask & ~covered
        rows, columns = np.flatnonzero(visible.any(1)), np.flatnonzero(visible.any(0))
        if not len(rows) or visible.sum() < _ENOUGH_SEEN * opaque.sum():
            return None
        box = (int(columns[0]), int(rows[0]), int(columns[-1] - columns[0] + 1), int(rows[-1] - rows[0] + 1))
        found.append(Placed(chosen[z], box, visible, z, picture, (x, y)))
        covered |= mask
    return tuple(reversed(found))


def render(scene: Scene) -> np.ndarray:
    """Paint a scene: uint8 [size, size, 3]."""
    size = scene.size
    canvas = Image.new("RGB", (size, size), scene.tones[0])
    if scene.split != "plain":
        corners = {
            "across": [(0, size // 2), (size, size // 2), (size, size), (0, size)],
            "down": [(size // 2, 0), (size, 0), (size, size), (size // 2, size)],
            "diagonal": [(size, 0), (size, size), (0, size)],
        }
        ImageDraw.Draw(canvas).polygon(corners[scene.split], fill=scene.tones[1])
    for item in scene.objects:
        canvas.paste(item.sprite, item.corner, item.sprite)
    if scene.word is not None:
        word = scene.word
        ImageDraw.Draw(canvas).text(word.anchor, word.text, fill=word.ink, font=_font(word.font_size))
    return np.array(canvas)


class Pairs:
    """Pictures and captions, made when asked for: endless fresh data for the contrastive teacher.

    Map-style: `pairs.get(epoch, index)` gives (uint8 [size, size, 3], caption), the same for the same (seed, epoch, index); `pairs[index]`
    is epoch 0. A single object's picture shows `names[index % len(names)]`, so that all names are seen equally often.
    """

    def __init__(self, seed: int, length: int, names: Sequence[str], single_share: float = 0.65, size: int = SIZE) -> None:
        """Keep the settings; nothing is drawn yet. `single_share` of the pairs show one object alone, 5 % a word alone."""
        self.seed, self.length, self.names, self.single_share, self.size = seed, length, list(names), single_share, size

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[np.ndarray, str]:
        return self.get(0, index)

    def scene(self, epoch: int, index: int) -> tuple[Scene, np.random.Generator]:
        """The scene of one pair, and the generator as it stands after drawing it."""
        if not 0 <= index < self.length:
            raise IndexError(f"pair {index} asked for; there are {self.length}")
        rng = np.random.default_rng((self.seed, epoch, index))
        kind = rng.random()
        if kind < self.single_share:
            return sample_scene(rng, [self.names[index % len(self.names)]], 1, 0.03, self.size), rng
        if kind < self.single_share + 0.05:
            return sample_scene(rng, self.names, 0, 1.0, self.size), rng
        return sample_scene(rng, self.names, int(rng.integers(2, 6)), 0.05, self.size), rng

    def get(self, epoch: int, index: int) -> tuple[np.ndarray, str]:
        """Picture uint8 [size, size, 3] and caption of one pair."""
        from mmkit.minidata.language import caption  # language imports nothing from here but WORDS and COLOURS; kept late to keep that so

        scene, rng = self.scene(epoch, index)
        return render(scene), caption(scene, rng)


def pairs(seed: int, length: int, names: Sequence[str] | None = None, single_share: float = 0.65, size: int = SIZE) -> Pairs:
    """Picture-caption pairs of the trained drawings (or of `names`); see `Pairs`."""
    if length <= 0 or not math.isfinite(length):
        raise ValueError(f"pairs(length={length}): at least one pair is needed")
    return Pairs(seed, int(length), object_names("trained") if names is None else names, single_share, size)
