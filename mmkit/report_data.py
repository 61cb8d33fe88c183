"""Reading run folders for the report: evaluations, encoder cards, training logs, manifests. Nothing is computed here.

Known by their files, not by their place: a `summary.json` is an evaluation (its encoder is the folder above it), a `metrics.jsonl` a
training, a `manifest.json` says what made its folder, a `config.json` with an `image_spec` is an encoder, a `maps.json` lists pictures of
what an encoder looks at, a `findings.json` holds an experiment's own sentences.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmkit.errors import DataError
from mmkit.records import read_jsonl

CONTROL_SUFFIX = "_shuffled"
CONTROL_SUFFIXES = (CONTROL_SUFFIX, "_blank", "_text_only")  # another question's picture, a grey one, none
BASELINE = "most_frequent_answer"
MAIN_METRICS = ("vqa_accuracy", "top1")  # the first that a summary has is its headline; else its first metric
BLIP2_SUFFIX = "_blip2"  # of an encoder's column whose models are BLIP-2's, beside its own with LLaVA's
_SKIP = {"checkpoints", "probe_heads", "images", "classification", ".git", ".venv", "node_modules"}
_NO_CURVE = {"step", "samples_seen", "seconds", "lr", "epoch", "grad_norm", "missing"}


@dataclass(frozen=True)
class Item:
    """One scored question or picture."""

    score: float  # fraction
    kind: str
    cluster: str  # the picture, which several questions share
    question: str
    answer: str
    reference: str
    image: Path | None


@dataclass
class Evaluation:
    """One encoder on one benchmark."""

    encoder: str
    benchmark: str
    folder: Path
    summary: dict[str, Any]
    items: dict[str, Item]

    @property
    def metrics(self) -> dict[str, dict[str, Any]]:
        """The summary's metrics, in percent."""
        return dict(self.summary["metrics"])

    @property
    def main(self) -> str:
        """Name of the headline metric: the one that is the mean of the items' scores, where the summary names it."""
        if self.summary.get("item_metric") in self.metrics:
            return str(self.summary["item_metric"])
        plain = [name for name in self.metrics if "/" not in name and name != BASELINE]
        return next((name for name in MAIN_METRICS if name in plain), plain[0] if plain else next(iter(self.metrics)))

    @property
    def graded(self) -> bool:
        """True where an item's score is a measure, CIDEr: a caption is not right or wrong, so there is nothing for McNemar to count."""
        return self.main.startswith("cider")

    @property
    def is_control(self) -> bool:
        """True where the pictures were shuffled, blank or left out."""
        return self.benchmark.endswith(CONTROL_SUFFIXES)


@dataclass(frozen=True)
class Ratio:
    """One encoder on a benchmark whose score is a ratio of sums (LLaVA-Bench): by question its reference's and its own score, kind and picture."""

    encoder: str
    benchmark: str
    rows: dict[str, tuple[float, float, str, str]]


@dataclass(frozen=True)
class Training:
    """A `metrics.jsonl`: its columns by name, each a list of (step, value)."""

    name: str
    columns: dict[str, list[tuple[float, float]]]


@dataclass
class RunData:
    """Everything found below the run folders."""

    roots: list[Path]
    evaluations: list[Evaluation] = field(default_factory=list)
    ratios: list[Ratio] = field(default_factory=list)
    cards: dict[str, dict[str, Any]] = field(default_factory=dict)
    trainings: list[Training] = field(default_factory=list)
    manifests: list[dict[str, Any]] = field(default_factory=list)
    maps: list[dict[str, Any]] = field(default_factory=list)
    remarks: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def encoders(self) -> list[str]:
        """Names of all evaluated encoders, in order."""
        return list(dict.fromkeys(evaluation.encoder for evaluation in self.evaluations))

    @property
    def encoder_names(self) -> list[str]:
        """The encoders themselves: one in several downstreams has several columns."""
        return list(dict.fromkeys(name.removesuffix(BLIP2_SUFFIX) for name in self.encoders))

    @property
    def benchmarks(self) -> list[str]:
        """Names of all benchmarks, in order, controls after their own."""
        names = dict.fromkeys(evaluation.benchmark for evaluation in self.evaluations)
        return sorted(names, key=lambda name: (without_control(name), name))

    def find(self, encoder: str, benchmark: str) -> Evaluation | None:
        """The evaluation of an encoder on a benchmark, if there is one."""
        return next((e for e in self.evaluations if (e.encoder, e.benchmark) == (encoder, benchmark)), None)


def without_control(benchmark: str) -> str:
    """The benchmark that a control is one of; a benchmark itself stays."""
    return next((benchmark.removesuffix(suffix) for suffix in CONTROL_SUFFIXES if benchmark.endswith(suffix)), benchmark)


def read_runs(roots: Sequence[Path]) -> RunData:
    """Read everything below the given folders.

    Args:
        roots: Run folders, or folders of single evaluations.

    Raises:
        DataError: A folder does not exist, holds nothing to report, or one of its files is not what its name says.
    """
    data = RunData([root.resolve() for root in roots])
    several = len(roots) > 1
    for root in data.roots:
        if not root.is_dir():
            raise DataError(f"no run folder '{root}'")
        prefix = f"{root.name}/" if several else ""
        for path in _walk(root):
            if path.name == "summary.json":
                _add_evaluation(data, path, root, prefix)
            elif path.name == "metrics.jsonl":
                _add_training(data, path, f"{prefix}{path.parent.relative_to(root).as_posix()}")
            elif path.name == "manifest.json":
                data.manifests.append(_manifest(path, root, f"{prefix}{path.parent.relative_to(root).as_posix()}"))
            elif path.name == "config.json":
                _add_card(data, path, prefix)
            elif path.name == "findings.json":
                _add_remarks(data, path)
            elif path.name == "maps.json":
                _add_maps(data, path, f"{prefix}{path.parent.relative_to(root).as_posix()}")
    if not data.evaluations and not data.ratios and not data.trainings and not data.maps:
        places = ", ".join(str(root) for root in roots)
        raise DataError(
            f"nothing to report in {places}: no summary.json of an evaluation, no metrics.jsonl of a training and no maps.json of an "
            "inspection below it"
        )
    if several and data.evaluations and len({e.encoder.split("/", 1)[1] for e in data.evaluations}) == len(data.encoders):
        _shorten(data)
    return data


def _walk(root: Path) -> Iterable[Path]:
    """Files below a folder in a stable order, without descending into pictures and checkpoints."""
    for path in sorted(root.iterdir()):
        if path.is_dir() and not path.is_symlink():
            if path.name not in _SKIP:
                yield from _walk(path)
        elif path.is_file():
            yield path


def _shorten(data: RunData) -> None:
    """Drop the run's name from encoders whose own name is unique."""
    for evaluation in data.evaluations:
        evaluation.encoder = evaluation.encoder.split("/", 1)[1]
    data.cards = {name.split("/", 1)[1]: card for name, card in data.cards.items()}


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is no JSON: {error}") from error


# ---- evaluations -------------------------------------------------------------------------------------------------------------------


def _add_evaluation(data: RunData, path: Path, root: Path, prefix: str) -> None:
    summary = _json(path)
    absent = [name for name in ("benchmark", "metrics", "n") if not isinstance(summary, dict) or name not in summary]
    if absent:
        raise DataError(f"{path} is no evaluation's summary: it lacks {', '.join(absent)}")
    for name, value in summary["metrics"].items():
        if not isinstance(value, dict) or "value" not in value or len(value.get("ci95", [])) != 2:
            raise DataError(f"{path}: metric '{name}' is {value!r}; a value with its interval is wanted: value, ci95 [low, high], n")
    if not summary["metrics"]:
        raise DataError(f"{path} has no metrics")
    encoder = prefix + (path.parent.parent.name if path.parent != root else str(summary.get("model") or root.name))
    benchmark = str(summary["benchmark"])
    if summary.get("unit", "percent") != "percent":  # the tables and plots are of shares
        _add_ratio(data, path.parent, encoder, benchmark)
        values = ", ".join(f"{name} {value['value']:g} {value['ci95']}" for name, value in summary["metrics"].items())
        data.notes.append(f"{prefix}{path.parent.relative_to(root).as_posix()}: {values} ({summary['unit']}, no share; not in the tables)")
        return
    before = data.find(encoder, benchmark)
    if before is not None:
        raise DataError(f"{before.folder} and {path.parent} both hold {benchmark} of {encoder}: report one of them, or rename a folder")
    data.evaluations.append(Evaluation(encoder, benchmark, path.parent, summary, read_items(path.parent, summary)))
    if isinstance(summary.get("encoder"), dict):
        data.cards[encoder] = {**summary["encoder"], **data.cards.get(encoder, {})}


def _add_ratio(data: RunData, folder: Path, encoder: str, benchmark: str) -> None:
    """Read the scores of a benchmark whose figure is a ratio of sums, where they are."""
    if (folder / "scores.jsonl").is_file():
        rows = {
            _identity(row, number): (float(row["reference_score"]), float(row["candidate_score"]), str(row["kind"]), str(row["image"]))
            for number, row in enumerate(read_jsonl(folder / "scores.jsonl"))
            if "reference_score" in row
        }
        if rows:
            data.ratios.append(Ratio(encoder, benchmark, rows))


def read_items(folder: Path, summary: Mapping[str, Any]) -> dict[str, Item]:
    """Join `answers.jsonl` with `scores.jsonl` by id; rows without a score are left out."""
    rows: dict[str, dict[str, Any]] = {}
    for name in ("answers.jsonl", "scores.jsonl"):
        if (folder / name).is_file():
            for number, row in enumerate(read_jsonl(folder / name)):
                shown = {"shown": row["image"]} if name == "answers.jsonl" and "image" in row else {}
                rows.setdefault(_identity(row, number), {}).update({**row, **shown})
    protocol = summary.get("protocol")
    images = protocol.get("images") if isinstance(protocol, dict) else None
    root = folder / str(images or summary.get("images") or ".")
    return {name: _item(row, root) for name, row in rows.items() if _score(row) is not None}


def _identity(row: Mapping[str, Any], number: int) -> str:
    return str(_first(row, ("question_id", "id", "image", "path"), number))


def _first(row: Mapping[str, Any], names: Sequence[str], default: Any = "") -> Any:
    return next((row[name] for name in names if row.get(name) is not None), default)


def _score(row: Mapping[str, Any]) -> float | None:
    """Fraction from 0 to 1: VQA accuracy, or right and wrong."""
    value = _first(row, ("score", "correct", "top1"), None)
    return None if value is None or "missing" in row else float(value)


def _item(row: Mapping[str, Any], root: Path) -> Item:
    shown = str(_first(row, ("shown", "image", "path")))
    image = root / shown if shown else None
    return Item(
        score=_score(row) or 0.0,
        kind=str(_first(row, ("kind", "question_type"))),
        cluster=str(_first(row, ("image", "path"), _identity(row, 0))),
        question=str(_first(row, ("question",))),
        answer=str(_first(row, ("answer", "prediction", "predicted"))),
        reference=str(_first(row, ("reference", "label", "target", "name"))),
        image=image if image is not None and image.is_file() else None,
    )


# ---- cards, trainings, manifests ---------------------------------------------------------------------------------------------------


def _add_card(data: RunData, path: Path, prefix: str) -> None:
    config = _json(path)
    if not isinstance(config, dict) or "image_spec" not in config or "architecture" not in config:
        return  # some other model's settings
    keys = ("architecture", "origin", "image_spec", "joint_width", "text_tower", "training")
    name = prefix + (path.parent.parent.name if path.parent.name == "encoder" else path.parent.name)
    card = {key: config[key] for key in keys if config.get(key) not in (None, "", {})}
    data.cards[name] = {**data.cards.get(name, {}), **card}


def _add_training(data: RunData, path: Path, name: str) -> None:
    columns: dict[str, list[tuple[float, float]]] = {}
    for number, row in enumerate(read_jsonl(path)):
        step = row.get("step", number)
        for key, value in row.items():
            usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if key not in _NO_CURVE and usable and isinstance(step, int | float):
                columns.setdefault(key, []).append((float(step), float(value)))
    if columns:
        data.trainings.append(Training(name, columns))
    else:
        data.notes.append(f"{name}/metrics.jsonl holds no numbers to draw")


def _add_maps(data: RunData, path: Path, folder: str) -> None:
    content = _json(path)
    rows = content.get("pictures") if isinstance(content, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) and {"file", "caption"} <= set(row) for row in rows):
        raise DataError(f"{path} is no list of maps: `pictures`, each with file and caption, was expected (`mmkit inspect` writes it)")
    for row in rows:
        file = path.parent / Path(str(row["file"])).name  # beside its list, whatever it says
        data.maps.append({**row, "encoder": str(content.get("encoder", "")), "folder": folder, "file": file})


def _add_remarks(data: RunData, path: Path) -> None:
    rows = _json(path)
    if not isinstance(rows, list) or not all(isinstance(row, dict) and {"headline", "evidence"} <= set(row) for row in rows):
        raise DataError(f"{path} is no list of findings: each with headline, evidence and good (true, false or null) was expected")
    data.remarks += [{"good": None, **row, "sentence": f"{row['headline']}: {row['evidence']}".rstrip(".") + "."} for row in rows]


def _manifest(path: Path, root: Path, folder: str) -> dict[str, Any]:
    content = _json(path)
    if not isinstance(content, dict):
        raise DataError(f"{path} holds a {type(content).__name__}, not an object with fields")
    return {**content, "folder": folder, "command": command_line(content.get("command"), root)}


def command_line(command: Any, root: Path | None = None) -> str:
    """A command as one would type it: relative to the working folder, the kit and the run folder's parent; no machine's paths."""
    if not command:
        return ""
    words = command if isinstance(command, list) else shlex.split(str(command))
    homes = [f"{Path.cwd()}/", f"{Path(__file__).resolve().parent.parent}/", *([f"{root.parent}/"] if root else [])]
    short = []
    for word in map(str, words):
        for home in homes:
            word = word.replace(home, "")
        short.append(word)
    if short[0].endswith(".py"):
        return shlex.join(["python", *short])
    return shlex.join([Path(short[0]).name, *short[1:]])
