"""How much of a score needs the picture: a control against the benchmark itself, question by question."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmkit.errors import DataError
from mmkit.evaluation import relative
from mmkit.records import read_jsonl
from mmkit.stats import bootstrap

WHAT = {"shuffled": "before other questions' pictures", "blank": "before a grey picture", "text_only": "without a picture"}


def beside(out: Path, control_of: str, identity: Mapping[str, Any]) -> Path | None:
    """The evaluation of the same model on the benchmark itself, where it lies beside a control's folder under the benchmark's name."""
    folder = out.resolve().parent / control_of
    if not (folder / "summary.json").is_file() or not (folder / "manifest.json").is_file() or not (folder / "scores.jsonl").is_file():
        return None
    other = json.loads((folder / "manifest.json").read_text(encoding="utf-8")).get("identity", {})
    same = all(other.get(key) == identity.get(key) for key in ("model_fingerprint", "questions_sha256", "prompt", "limit"))
    return folder if same and other.get("benchmark") == control_of else None


def grounding(real: Path, control_of: str, control: str, rows: Sequence[Mapping[str, Any]], out: Path) -> dict[str, Any]:
    """Compare a control's scores with those of the benchmark itself, on the questions that both answered.

    Args:
        real: Folder of the evaluation with its own pictures.
        control_of: The benchmark it must be of.
        control: Which of `benchmarks.CONTROLS` the rows are of.
        rows: Lines of the control's scores.jsonl.
        out: The control's folder; the summary names `real` relative to it.

    Returns:
        In percent: `score`, `control` and their `difference` with its 95 % interval (paired bootstrap by picture), `share` of the score
        that needs the picture, with its interval (None where the score is 0), `n`, and a `sentence`.

    Raises:
        DataError: The folder holds no finished evaluation, or one of another benchmark, or no question in common.
    """
    if not (real / "summary.json").is_file() or not (real / "scores.jsonl").is_file():
        raise DataError(f"--against {real} holds no finished evaluation (summary.json, scores.jsonl): run {control_of} itself first")
    benchmark = json.loads((real / "summary.json").read_text(encoding="utf-8")).get("benchmark")
    if benchmark != control_of:
        raise DataError(f"--against {real} is an evaluation of {benchmark}; this control is one of {control_of}")
    own = {row["question_id"]: float(row["score"]) for row in read_jsonl(real / "scores.jsonl")}
    shared = [row for row in rows if row["question_id"] in own]
    if not shared:
        raise DataError(f"--against {real}: none of its {len(own)} questions is among the {len(rows)} of the control")
    columns = np.array([[own[row["question_id"]], float(row["score"]), 1.0] for row in shared])  # [n, 3]
    clusters = [row["image"] or row["question_id"] for row in shared]
    drawn = bootstrap(columns, lambda totals: (totals[:, 0] - totals[:, 1]) / totals[:, 2], clusters)
    score, left = columns[:, 0].mean(), columns[:, 1].mean()
    difference = {"value": _percent(score - left), "ci95": [_percent(x) for x in np.percentile(drawn, [2.5, 97.5])]}
    share: dict[str, Any] | None = None
    if score > 0:
        ratios = bootstrap(columns, lambda t: np.divide(t[:, 0] - t[:, 1], t[:, 0], out=np.zeros(len(t)), where=t[:, 0] > 0), clusters)
        share = {"value": _percent((score - left) / score), "ci95": [_percent(x) for x in np.percentile(ratios, [2.5, 97.5])]}
    result = {"against": relative(real, out), "control": control, "score": _percent(score), "without": _percent(left)}
    result |= {"difference": difference, "share": share, "n": len(shared)}
    return {**result, "sentence": _sentence(result)}


def _percent(value: float) -> float:
    return round(100 * float(value), 2)


def _sentence(row: Mapping[str, Any]) -> str:
    low, high = row["difference"]["ci95"]
    says = f"{row['score']:.1f} with its own pictures, {row['without']:.1f} {WHAT[row['control']]} ({row['difference']['value']:+.1f}"
    says += f" [{low:+.1f}, {high:+.1f}], n {row['n']})"
    if low <= 0 or row["share"] is None:
        return f"{says}: not shown that the score needs the picture"
    return f"{says}: {row['share']['value']:.0f} % [{row['share']['ci95'][0]:.0f}, {row['share']['ci95'][1]:.0f}] of the score need the picture"
