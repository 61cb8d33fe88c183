"""One run folder or many -> `report.json`, `report.md` and a self-contained `report.html`.

    mmkit report runs/quickstart
    mmkit report runs/a runs/b --out runs/both

The page asks the network for nothing: styles, the few lines of script, curves and example pictures are inside it. No figure is typed
here: all come from the summaries, answers, logs and manifests below the run folders.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from mmkit import agreement, report_charts, report_compare
from mmkit.checkpoint import atomic_write
from mmkit.config import cli_entry
from mmkit.errors import ConfigError
from mmkit.images import ImageError, open_image
from mmkit.manifest import versions
from mmkit.report_data import RunData, read_runs

TEMPLATES = Path(__file__).parent / "templates"
THUMBNAIL = 320  # pixels of an example's longer side
SHEET = 1600  # pixels of the longer side of a sheet of maps
TITLES = {
    "mini_zeroshot": "Zero-shot naming",
    "mini_vqa": "Questions about pictures",
    "mini_vqa_shuffled": "The same, pictures shuffled",
    "vqav2": "VQAv2",
    "okvqa": "OK-VQA",
    "gqa": "GQA",
    "textvqa": "TextVQA",
    "textvqa_ocr": "TextVQA with OCR words",
    "vizwiz": "VizWiz",
    "scienceqa": "ScienceQA",
    "scienceqa_img": "ScienceQA, with pictures",
    "pope": "POPE",
    "mme": "MME",
    "mmbench": "MMBench",
    "seed_image": "SEED-Bench, images",
    "nocaps": "NoCaps",
    "coco_captions": "COCO captions",
    "flickr30k": "Flickr30k captions",
    "mini_captions": "Captions of the embedded scenes",
    "mini_retrieval": "Captions and pictures of the embedded scenes, found by each other",
    "imagenet": "ImageNet-1K",
    "imagenet_a": "ImageNet-A",
    "imagenet_r": "ImageNet-R",
    "imagenet_v2": "ImageNetV2",
    "imagenet_sketch": "ImageNet-Sketch",
    "imagenet_six": "ImageNet, mean of six",
    "objectnet": "ObjectNet",
    "eurosat": "EuroSAT",
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "gtsrb": "GTSRB",
    "caltech101": "Caltech-101",
    "ocr": "Words read (OCR probe)",
    "mini_ocr": "Words read (OCR probe)",
    "goi_image": "Object named from the whole picture (probe)",
    "goi_box": "Object named from its region (probe)",
    "coco_retrieval": "COCO retrieval",
    "flickr30k_retrieval": "Flickr30k retrieval",
}
METRICS = {
    "vqa_accuracy": "VQA accuracy",
    "word_accuracy": "words right",
    "top1": "top-1",
    "top5": "top-5",
    **{f"{way}_retrieval_recall@{k}": f"{way} R@{k}" for way in ("text", "image") for k in (1, 5, 10)},
    "cider": "CIDEr",
    "cider_ptb_python": "CIDEr (words cut in Python)",
    "f1": "F1",
    "anls": "ANLS",
    "most_frequent_answer": "most frequent answer",
}


def main(argv: Sequence[str] | None = None) -> Path:
    """Write the report of one or several run folders.

    Args:
        argv: Command line; None is the process's own.

    Returns:
        The folder with the three files.
    """
    parser = argparse.ArgumentParser(prog="mmkit report", description="one run folder or many -> report.json, report.md, report.html")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder, e.g. runs/quickstart")
    parser.add_argument("--out", default="", help="folder for the report; default: the run folder itself")
    parser.add_argument("--title", default="", help="title of the page")
    args = parser.parse_args(argv)
    if len(args.runs) > 1 and not args.out:
        raise ConfigError(f"{len(args.runs)} run folders and no --out: say where their common report goes, --out DIR")
    out = Path(args.out or args.runs[0])
    data = read_runs([Path(run) for run in args.runs])
    report, pictures = build(data, args.title)
    out.mkdir(parents=True, exist_ok=True)
    atomic_write(out / "report.json", json.dumps(report, indent=1, ensure_ascii=False, default=str) + "\n")
    atomic_write(out / "report.md", render("report.md", report, {}))
    atomic_write(out / "report.html", render("report.html", report, pictures))
    for line in findings(report):
        print(line)
    print(f"report: {out / 'report.html'}")
    return out


def build(data: RunData, title: str = "") -> tuple[dict[str, Any], dict[str, str]]:
    """Compute the report.

    Args:
        data: What was read.
        title: Of the page; "" asks the kit's question.

    Returns:
        The content of `report.json`, and the example pictures as data URLs by their key there.
    """
    shown = report_compare.examples(data)
    pictures: dict[str, str] = {}
    for row in shown:
        row["picture"] = f"{row['benchmark']}/{row['id']}"
        try:
            pictures[row["picture"]] = data_url(row.pop("image"))
        except ImageError as error:
            data.notes.append(f"an example picture cannot be shown: {error}")
    maps = shown_maps(data, pictures)
    report = {
        "title": title or "Which encoder makes the better multimodal model?",
        "created": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "runs": [root.name for root in data.roots],
        "encoders": data.encoders,
        "encoder_names": data.encoder_names,
        "benchmarks": data.benchmarks,
        "remarks": data.remarks,
        "results": report_compare.results(data),
        "comparisons": report_compare.comparisons(data),
        "agreements": agreement.agreements(data),
        "controls": report_compare.controls(data),
        "kinds": report_compare.kinds(data),
        "curves": report_charts.curves(data),
        "examples": shown,
        "maps": maps,
        "cards": {name: flat(card) for name, card in data.cards.items()},
        "manifests": data.manifests,
        "versions": merge_versions(data),
        "notes": data.notes,
    }
    return report, pictures


def shown_maps(data: RunData, pictures: dict[str, str]) -> list[dict[str, Any]]:
    """Put the sheets of maps among the pictures; gives what the page says of each."""
    rows = []
    for row in data.maps:
        key = f"{row['folder']}/{row['file'].name}"
        try:
            pictures[key] = data_url(row["file"], SHEET)
        except ImageError as error:
            data.notes.append(f"a sheet of maps cannot be shown: {error}")
            continue
        rows.append({**{name: row.get(name, "") for name in ("encoder", "kind", "image", "caption")}, "picture": key})
    return rows


def findings(report: Mapping[str, Any]) -> list[str]:
    """The sentences at the top: an experiment's own, then comparisons, then controls."""
    return [row["sentence"] for row in (*report["remarks"], *report["comparisons"], *report["controls"])]


def flat(card: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A card with nested settings as dotted keys."""
    out: dict[str, Any] = {}
    for key, value in card.items():
        if isinstance(value, Mapping):
            out |= flat(value, f"{prefix}{key}.")
        elif value not in (None, ""):
            out[prefix + str(key)] = value
    return out


def merge_versions(data: RunData) -> dict[str, list[str]]:
    """Versions by package over all manifests, and of this process; more than one value means that results mix versions."""
    merged: dict[str, list[str]] = {}
    for content in [*(manifest.get("versions") for manifest in data.manifests), versions()]:
        for name, version in (content or {}).items():
            if version not in merged.setdefault(name, []):
                merged[name].append(str(version))
    return merged


def data_url(path: Path, longest: int = THUMBNAIL) -> str:
    """A picture, at most `longest` pixels long, as a data URL; PNG where it is small enough, JPEG else."""
    image = open_image(path)
    small = max(image.size) <= longest
    if not small:
        image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "PNG" if small else "JPEG", **({} if small else {"quality": 85}))
    return f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(buffer.getvalue()).decode()}"


# ---- rendering ---------------------------------------------------------------------------------------------------------------------


def render(template: str, report: Mapping[str, Any], pictures: Mapping[str, str]) -> str:
    """Fill a template; HTML is escaped, Markdown has its own filter for table cells."""
    filled = environment(template.endswith(".html")).get_template(template)
    return filled.render(report=report, pictures=pictures, findings=findings(report), colour=colours(report)) + "\n"


@cache
def environment(html: bool) -> Environment:
    """The templates' surroundings; cached, since compiling the page takes longer than filling it."""
    made = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=html,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"cell": cell, "duration": duration, "number": number, "bench": bench, "metric": metric, "p": p_cell}
    made.globals |= {"draw": report_charts.draw, "reach": reach}
    return made


def colours(report: Mapping[str, Any]) -> dict[str, int]:
    """The page's colour of every encoder, the same in every table and chart."""
    names = list(dict.fromkeys([*report["encoders"], *report["cards"]]))
    return {name: index % report_charts.COLOURS for index, name in enumerate(names)}


def p_cell(p: float) -> str:
    """A p-value for a table: the equals sign is left out."""
    return report_compare.p_text(p).removeprefix("= ")


def reach(rows: Sequence[Mapping[str, Any]]) -> float:
    """Half width, in points, of the axis on which differences are drawn; a multiple of five that holds all intervals."""
    ends = [abs(end) for row in rows if row["ci95"] for end in row["ci95"]]
    return max(5.0, 5.0 * -(-max(ends, default=5.0) // 5))


def bench(name: str) -> str:
    """A benchmark's title."""
    return TITLES.get(name, name)


def metric(name: str) -> str:
    """A metric's title."""
    return METRICS.get(name, name)


def cell(text: Any) -> str:
    """Text that cannot break a Markdown table or be read as HTML."""
    return str(text).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def duration(seconds: Any) -> str:
    """Seconds as one reads them: "48 s", "3 min 20 s", "2 h 5 min"."""
    if not isinstance(seconds, int | float):
        return "–"
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def number(value: Any) -> str:
    """A figure of an encoder card: thousands apart, fractions short, lists in brackets."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(number(part) for part in value)
    return str(value)


if __name__ == "__main__":
    cli_entry(main)
