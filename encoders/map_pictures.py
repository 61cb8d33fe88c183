"""Maps over patches drawn as PNG sheets with Pillow alone: a colour over a grey picture, one tile a map, labels beside them."""

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

GAP, MARGIN = 6, 14
INK, SOFT, PAPER = (24, 26, 31), (102, 107, 117), (255, 255, 255)
# Dark blue over green to yellow: rising brightness, so that grey prints and colour-blind eyes read the same order.
COLOURS = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)], dtype=np.float32)
STRENGTH = 0.62  # of the colour over the picture


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font."""
    return ImageFont.load_default(size)


def heat(values: Tensor, low: float, high: float) -> np.ndarray:
    """Colour a map [h, w] from `low` to `high`: uint8 [h, w, 3]."""
    place = np.clip((values.numpy() - low) / max(high - low, 1e-12), 0, 1) * (len(COLOURS) - 1)
    below = np.minimum(place.astype(int), len(COLOURS) - 2)
    share = (place - below)[..., None]
    coloured: np.ndarray = (COLOURS[below] * (1 - share) + COLOURS[below + 1] * share).round().astype(np.uint8)
    return coloured


def tile(picture: Image.Image, values: Tensor, size: int, low: float, high: float) -> Image.Image:
    """Lay a map [h, w] over a square picture, patches as they are: nothing between two of them is invented."""
    grey = picture.resize((size, size), Image.Resampling.BICUBIC).convert("L").convert("RGB")
    colour = Image.fromarray(heat(values, low, high)).resize((size, size), Image.Resampling.NEAREST)
    return Image.blend(grey, colour, STRENGTH)


def attention_sheet(picture: Image.Image, maps: Mapping[str, Tensor], title: str, size: int = 96) -> Image.Image:
    """Draw the attention of one image: a row a layer, the mean over heads first, then each head; every tile on its own scale, from 0.

    Args:
        picture: What the encoder saw, square.
        maps: Name of a layer -> shares [A, h, w].
        title: The line above.
        size: Pixels of a tile.
    """
    heads = max(len(rows) for rows in maps.values())
    left, top = 96, 64
    sheet = Image.new("RGB", (left + (heads + 2) * (size + GAP) + GAP + MARGIN, top + len(maps) * (size + 20 + GAP) + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, 10), title, INK, font=font(16))
    for column, name in enumerate(["picture", "mean", *(f"head {head + 1}" for head in range(heads))]):
        draw.text((_column(left, column, size) + size / 2, 52), name, SOFT, font=font(12), anchor="mm")
    for row, (name, rows) in enumerate(maps.items()):
        y = top + row * (size + 20 + GAP)
        draw.text((left - 10, y + size / 2), name, INK, font=font(13), anchor="rm")
        if row == 0:
            sheet.paste(picture.resize((size, size), Image.Resampling.BICUBIC), (_column(left, 0, size), y))
        for column, values in enumerate([rows.mean(dim=0), *rows], start=1):
            high = float(values.max())
            x = _column(left, column, size)
            sheet.paste(tile(picture, values, size, 0.0, high), (x, y))
            draw.text((x + size / 2, y + size + 9), f"max {100 * high:.0f} %", SOFT, font=font(11), anchor="mm")
    return sheet


def _column(left: int, column: int, size: int) -> int:
    return left + column * (size + GAP) + (GAP if column > 1 else 0)


def text_sheet(
    picture: Image.Image, texts: Sequence[str], maps: Tensor, whole: Tensor, title: str, size: int = 224, columns: int = 4
) -> Image.Image:
    """Draw how near each patch is to each text, every map on its own scale, which is printed below it.

    Args:
        picture: What the encoder saw, square.
        texts: T texts.
        maps: Cosines [T, h, w].
        whole: Cosines of the whole image [T].
        title: The line above.
        size: Pixels of a tile.
        columns: Tiles in a row at most, the picture included.
    """
    top, head, foot = 40, 40, 24
    columns = min(columns, len(texts) + 1)
    rows = -(-(len(texts) + 1) // columns)
    step = (size + 2 * GAP, head + size + foot + GAP)
    # a title may be longer than one or two tiles are wide
    width = max(2 * MARGIN + columns * step[0], 2 * MARGIN + int(font(16).getlength(title)))
    sheet = Image.new("RGB", (width, top + rows * step[1] + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, 10), title, INK, font=font(16))
    for number in range(len(texts) + 1):
        x, y = MARGIN + (number % columns) * step[0], top + (number // columns) * step[1]
        if number == 0:
            sheet.paste(picture.resize((size, size), Image.Resampling.BICUBIC), (x, y + head))
            continue
        values, text = maps[number - 1], texts[number - 1]
        low, high = float(values.min()), float(values.max())
        label = wrapped(text, size)
        draw.multiline_text((x, y + head - 18 * (1 + label.count("\n")) - 2), label, INK, font=font(13), spacing=2)
        sheet.paste(tile(picture, values, size, low, high), (x, y + head))
        note = f"cosine {low:.2f} to {high:.2f}; whole image {float(whole[number - 1]):.2f}"
        draw.text((x, y + head + size + 5), note, SOFT, font=font(12))
    return sheet


def wrapped(text: str, width: int, lines: int = 2) -> str:
    """Break a text into lines of a width in pixels; what does not fit ends in three dots."""
    rows: list[str] = [""]
    for word in text.split():
        longer = f"{rows[-1]} {word}".strip()
        if font(13).getlength(longer) <= width:
            rows[-1] = longer
        elif len(rows) < lines:
            rows.append(word)
        else:
            rows[-1] += " ..."
            break
    return "\n".join(rows)
