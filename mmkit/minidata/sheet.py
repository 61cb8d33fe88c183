"""The contact sheet: one picture that shows what was made."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mmkit.minidata.formats import Numbered
from mmkit.minidata.language import Question
from mmkit.minidata.world import render

_COLUMNS, _CELL, _GAP, _MARGIN = 6, 192, 18, 28
_INK, _SOFT, _PAPER, _LINE = (28, 30, 36), (104, 108, 118), (252, 251, 248), (216, 214, 208)


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int, most: int) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines if len(lines) <= most else [*lines[: most - 1], lines[most - 1] + " ..."]


class _Sheet:
    """A growing page: rows of captioned pictures under headings."""

    def __init__(self) -> None:
        self.width = 2 * _MARGIN + _COLUMNS * _CELL + (_COLUMNS - 1) * _GAP
        self.page = Image.new("RGB", (self.width, 12000), _PAPER)
        self.draw = ImageDraw.Draw(self.page)
        self.y = _MARGIN
        self.big, self.middle, self.small = (ImageFont.load_default(points) for points in (30, 20, 15))

    def title(self, text: str, below: str) -> None:
        self.draw.text((_MARGIN, self.y), text, fill=_INK, font=self.big)
        self.draw.text((_MARGIN, self.y + 42), below, fill=_SOFT, font=self.small)
        self.y += 78

    def heading(self, text: str) -> None:
        self.draw.line([(_MARGIN, self.y), (self.width - _MARGIN, self.y)], fill=_LINE, width=1)
        self.draw.text((_MARGIN, self.y + 10), text, fill=_INK, font=self.middle)
        self.y += 46

    def row(
        self, cells: Sequence[tuple[np.ndarray, Sequence[tuple[str, tuple[int, int, int]]]]], columns: int = _COLUMNS, lines: int = 3
    ) -> None:
        """One row of (picture, [(text, ink), ...])."""
        side = (self.width - 2 * _MARGIN - (columns - 1) * _GAP) // columns
        lowest = self.y + side
        for column, (pixels, texts) in enumerate(cells):
            x = _MARGIN + column * (side + _GAP)
            self.page.paste(Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC), (x, self.y))
            self.draw.rectangle([x, self.y, x + side - 1, self.y + side - 1], outline=_LINE)
            y = self.y + side + 6
            for text, ink in texts:
                for line in _wrap(text, self.small, side, lines):
                    self.draw.text((x, y), line, fill=ink, font=self.small)
                    y += 19
                y += 3
            lowest = max(lowest, y)
        self.y = lowest + 14

    def finish(self) -> Image.Image:
        return self.page.crop((0, 0, self.width, self.y + _MARGIN - 14))


def contact_sheet(
    scenes: Sequence[tuple[Numbered, str, Question]],
    singles: Sequence[tuple[np.ndarray, str]],
    unseen: Sequence[tuple[np.ndarray, str]],
    words: Sequence[tuple[np.ndarray, str]],
    summary: str,
) -> Image.Image:
    """Lay out scenes (with caption, question and answer), drawings alone, unseen drawings, and words."""
    sheet = _Sheet()
    sheet.title("mmkit: the embedded data", f"{summary}   Drawings: OpenMoji, CC BY-SA 4.0")
    sheet.heading("Scenes: a caption, a question and its answer")
    for start in range(0, len(scenes), _COLUMNS):
        cells = []
        for item, caption, question in scenes[start : start + _COLUMNS]:
            lines = [(caption, _INK), (f"{question.text} {question.answer}", _SOFT)]
            cells.append((render(item.scene), lines))
        sheet.row(cells)
    for heading, pictures in (
        ("Classification: drawings alone", singles),
        ("Drawings in no training split", unseen),
        ("Words to read", words),
    ):
        sheet.heading(heading)
        for start in range(0, len(pictures), 10):
            sheet.row([(pixels, [(name, _INK)]) for pixels, name in pictures[start : start + 10]], columns=10, lines=2)
    return sheet.finish()
