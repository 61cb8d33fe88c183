"""Loss curves as inline SVG, drawn by hand so that the page needs no library; colours are the page's CSS variables."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape

from mmkit.report_data import RunData, Training

WIDTH, HEIGHT = 360, 224
LEFT, RIGHT, TOP, BOTTOM = 40, 58, 12, 36
MAX_POINTS = 400  # more are not seen at this width
COLOURS = 6  # --c0 .. --c5 of the style sheet
_SMOOTH = 0.04  # share of the run that a point of the strong line averages over

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Series:
    """One line of a chart; `colour` counts the page's colours, -1 is the ink."""

    label: str
    points: Points
    colour: int


def curves(data: RunData) -> list[dict[str, Any]]:
    """Group the trainings: those that differ by the encoder's name only share a chart; alone, a training shows its loss terms.

    Returns:
        For each chart its title and series; every series with label, colour, first and last value, and points.
    """
    names = list(dict.fromkeys([*data.encoders, *data.cards]))
    groups: dict[str, list[tuple[str, Training]]] = defaultdict(list)
    for training in data.trainings:
        encoder, common = _without_encoder(training.name, names)
        groups[common].append((encoder, training))
    charts = []
    for common, members in groups.items():
        several = len({encoder for encoder, _ in members}) == len(members) > 1
        if several:
            series = [Series(encoder, _main(training), _colour(encoder, names)) for encoder, training in members]
            charts.append(_chart(common.replace("*", "…"), series))
        else:
            charts += [_chart(training.name, _terms(training, _colour(encoder, names))) for encoder, training in members]
    return charts


def _without_encoder(name: str, encoders: Sequence[str]) -> tuple[str, str]:
    """Cut an encoder's name out of a path: "work/clip/stage1" and "work/stage1_clip" -> ("clip", with "*" in its place)."""
    pieces = re.split(r"([/_-])", name)
    for position, piece in enumerate(pieces):
        if piece in encoders:
            return piece, "".join([*pieces[:position], "*", *pieces[position + 1 :]])
    return "", name


def _colour(encoder: str, names: Sequence[str]) -> int:
    return names.index(encoder) % COLOURS if encoder in names else -1


def _main(training: Training) -> Points:
    return training.columns.get("loss") or next(iter(training.columns.values()))


def _terms(training: Training, colour: int) -> list[Series]:
    """The loss, and its terms where they are logged beside it."""
    if "loss" not in training.columns:
        return [Series(name, points, index) for index, (name, points) in enumerate(training.columns.items())][:3]
    terms = [name for name in training.columns if name != "loss" and ("loss" in name or name in ("cls", "patch", "patches"))]
    return [Series("loss", training.columns["loss"], colour)] + [
        Series(name, training.columns[name], (colour + 2 + index) % COLOURS) for index, name in enumerate(terms[:2])
    ]


def _chart(title: str, series: Sequence[Series]) -> dict[str, Any]:
    thin = [Series(s.label, _thin(s.points), s.colour) for s in series]
    table = [
        {
            "label": s.label,
            "colour": s.colour,
            "first": s.points[0][1],
            "last": smooth(s.points)[-1][1],
            "steps": s.points[-1][0],
            "points": t.points,
        }
        for s, t in zip(series, thin, strict=True)
    ]
    return {"title": title, "series": table}


def _thin(points: Points) -> Points:
    """At most MAX_POINTS points, each the mean of its stretch."""
    if len(points) <= MAX_POINTS:
        return points
    size = math.ceil(len(points) / MAX_POINTS)
    parts = [points[start : start + size] for start in range(0, len(points), size)]
    return [(part[-1][0], sum(value for _, value in part) / len(part)) for part in parts]


def smooth(points: Points) -> Points:
    """A running mean over the last few per cent of the run, so that the start is not pulled towards a first value."""
    window = max(1, round(len(points) * _SMOOTH))
    out, total = [], 0.0
    for index, (step, value) in enumerate(points):
        total += value - (points[index - window][1] if index >= window else 0.0)
        out.append((step, total / min(index + 1, window)))
    return out


def draw(chart: dict[str, Any]) -> Markup:
    """The chart as an SVG element: raw values faint, the running mean strong, the last value at the line's end."""
    lines = [(row, [tuple(point) for point in row["points"]]) for row in chart["series"]]
    strong = [smooth(points) for _, points in lines]
    low = min(value for points in strong for _, value in points)
    high = max(value for points in strong for _, value in points)
    ticks = nice_ticks(low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])
    last = max(points[-1][0] for points in strong)
    first = min(points[0][0] for points in strong)

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (step - first) / ((last - first) or 1)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - low) / ((high - low) or 1)

    what = f"{chart['title']}: " + ", ".join(f"{row['label']} from {row['first']:.3g} to {row['last']:.3g}" for row in chart["series"])
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" class="curve" role="img" aria-label="{escape(what)}">']
    clip = f"clip{abs(hash_name(chart['title']))}"
    parts.append(
        f'<clipPath id="{clip}"><rect x="{LEFT}" y="{TOP}" width="{WIDTH - LEFT - RIGHT}" height="{HEIGHT - TOP - BOTTOM}"/></clipPath>'
    )
    for tick in ticks:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 7}" y="{y(tick) + 3.5:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in nice_ticks(first, last):
        if first <= tick <= last:
            parts.append(f'<text class="tick" x="{x(tick):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{short(tick)}</text>')
    parts.append(f'<text class="axis" x="{WIDTH - RIGHT}" y="{HEIGHT - 3}" text-anchor="end">step</text>')
    ends = spread([y(points[-1][1]) for points in strong])
    for (row, raw), points, end in reversed(list(zip(lines, strong, ends, strict=True))):  # the first line, the loss itself, on top
        colour = f"var(--c{row['colour']})" if row["colour"] >= 0 else "var(--ink)"
        parts.append(f'<path class="raw" clip-path="url(#{clip})" style="stroke:{colour}" d="{path(raw, x, y)}"/>')
        parts.append(f'<path class="strong" style="stroke:{colour}" d="{path(points, x, y)}"/>')
        parts.append(f'<circle cx="{x(points[-1][0]):.1f}" cy="{y(points[-1][1]):.1f}" r="3" style="fill:{colour}"/>')
        parts.append(f'<text class="end" style="fill:{colour}" x="{WIDTH - RIGHT + 8}" y="{end + 4:.1f}">{row["last"]:.3g}</text>')
    return Markup("".join(parts) + "</svg>")  # every text in it is a number or escaped


def path(points: Sequence[tuple[float, ...]], x: Any, y: Any) -> str:
    """The "d" of a polyline."""
    return "M" + "L".join(f"{x(step):.1f} {y(value):.1f}" for step, value in points)


def spread(heights: Sequence[float], gap: float = 13.0) -> list[float]:
    """Move labels apart that would overlap, keeping their order."""
    out = list(heights)
    previous = -math.inf
    for index in sorted(range(len(heights)), key=lambda index: heights[index]):
        out[index] = previous = max(heights[index], previous + gap)
    return out


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round numbers that cover the range."""
    if high <= low:
        high = low + (abs(low) or 1.0)
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def short(number: float) -> str:
    """12000 -> 12k."""
    return f"{number / 1000:g}k" if abs(number) >= 1000 else f"{number:g}"


def hash_name(text: str) -> int:
    """A number from a title that is the same at every run (ids in the page)."""
    value = 0
    for letter in text:
        value = (value * 31 + ord(letter)) % 1_000_003
    return value
