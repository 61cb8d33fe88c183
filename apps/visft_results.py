"""Puts the seeds of a ViSFT experiment together: means by arm, curves of the held-out losses, and the sentences of its report."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from apps.quickstart_plan import VISFT_TASKS
from apps.visft_plan import ARMS, BEFORE, EVALUATIONS, PERMUTED, TRUE, evaluation_of, work_of
from encoders.head_scores import MAIN_SCORE
from mmkit.checkpoint import atomic_write
from mmkit.config import load_config
from mmkit.errors import DataError
from mmkit.evaluation import relative
from mmkit.records import read_jsonl
from mmkit.stats import Estimate, over_seeds, paired_bootstrap, wilson

SHOWN = {BEFORE: "before", TRUE: "visft", PERMUTED: "permuted"}  # names of the arms in the report
TITLES = {"mini_zeroshot": "zero-shot naming", "mini_ocr": "the OCR probe", "goi_image": "the object probe on whole pictures",
          "goi_box": "the object probe on regions"}  # fmt: skip
HEAD_SCORES = {"detection": "box AP", "segmentation": "mask AP", "caption": "CIDEr"}
RULE = "a probe gain that the permuted control shows too is no gain"


@dataclass
class ResultsConfig:
    """Settings of this stage."""

    out: str = field(default="", metadata={"help": "folder of the experiment"})
    seeds: list[int] = field(default_factory=list, metadata={"help": "of the experiment"})


@dataclass(frozen=True)
class Scores:
    """One benchmark and arm: what each seed scored on each item.

    Attributes:
        rows: The first seed's rows by id, for the report.
        values: Scores [seeds, items], fractions, in the order of `names`.
        names: Ids of the items.
        images: The picture of each item.
    """

    rows: Mapping[str, Mapping[str, Any]]
    values: np.ndarray
    names: tuple[str, ...]
    images: tuple[str, ...]


def main(argv: Sequence[str] | None = None) -> Path:
    """Write OUT/results: eval/ARM/BENCHMARK, curves/TASK and findings.json, which is written last."""
    config = load_config(ResultsConfig, argv)
    out = Path(config.out)
    results = out / "results"
    findings = [*heads_findings(out), *held_out_findings(out, config.seeds)]
    for name in EVALUATIONS:
        scores = {arm: read_scores(out, arm, name, config.seeds) for arm in (BEFORE, *ARMS)}
        for arm, found in scores.items():
            write_mean(out, results / "eval" / SHOWN[arm] / name, arm, name, found, config.seeds)
        findings.append(verdict(name, scores))
    maps = results / "maps" / "maps.json"
    if maps.is_file() and (finding := drift(json.loads(maps.read_text(encoding="utf-8")))):
        findings.append(finding)
    atomic_write(results / "findings.json", json.dumps(findings, indent=1, ensure_ascii=False) + "\n")
    return results


# ---- losses ------------------------------------------------------------------------------------------------------------------------------


def held_out(folder: Path, task: str) -> list[tuple[int, float]]:
    """A task's held-out losses along a training: (step, mean over batches).

    Raises:
        DataError: There are none.
    """
    rows = [row for row in read_jsonl(folder / "held_out.jsonl") if row["task"] == task]
    if len(rows) < 2:
        raise DataError(f"{folder / 'held_out.jsonl'} has {len(rows)} losses of {task}; one before and one after were expected")
    return [(int(row["step"]), float(row["loss"])) for row in rows]


def heads_findings(out: Path) -> list[dict[str, Any]]:
    """What each head learnt on the frozen encoder."""
    parts = []
    for task in VISFT_TASKS:
        losses = held_out(out / "work" / f"visft_{task}", task)
        parts.append((task, losses[0][1], losses[-1][1]))
    better = all(last < first for _, first, last in parts)
    evidence = "; ".join(f"{task} {first:.3f} untrained, {last:.3f} after stage 1" for task, first, last in parts)
    found = [{"headline": "Heads on the frozen encoder, held-out loss", "evidence": evidence, "good": better}]
    files = {task: out / "work" / f"visft_{task}" / "scores.json" for task in VISFT_TASKS}
    if not all(path.is_file() for path in files.values()):  # --scored_images 0
        return found
    told, gained = [], []
    for task, path in files.items():
        scores = json.loads(path.read_text(encoding="utf-8"))
        before, after = (scores[when][MAIN_SCORE[task]] for when in ("untrained", "trained"))
        low, high = after["ci95"]
        told.append(
            f"{HEAD_SCORES[task]} {before['value']:.2f} untrained, {after['value']:.2f} [{low:.2f}, {high:.2f}] after (n {after['n']})"
        )
        gained.append(after["value"] > before["value"])
    return [*found, {"headline": "Heads on the frozen encoder, what they find", "evidence": "; ".join(told), "good": all(gained)}]


def held_out_findings(out: Path, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Compare the drop of the held-out loss under the frozen heads between the arms, and write both curves (means over the seeds)."""
    findings = []
    for task in VISFT_TASKS:
        losses = {arm: [held_out(work_of(out, arm, seed), task) for seed in seeds] for arm in ARMS}
        drops = {arm: [100 * (of[0][1] - of[-1][1]) / of[0][1] for of in found] for arm, found in losses.items()}
        lines = []
        for step in sorted(set.intersection(*({point[0] for point in of} for found in losses.values() for of in found))):
            means = {SHOWN[arm]: sum(dict(of)[step] for of in found) / len(found) for arm, found in losses.items()}
            lines.append(json.dumps({"step": step, **means}) + "\n")
        place = out / "results" / "held-out loss under frozen heads" / task / "metrics.jsonl"
        place.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(place, "".join(lines))
        more = [true > permuted for true, permuted in zip(drops[TRUE], drops[PERMUTED], strict=True)]
        headline = f"{task.capitalize()}: {fall_in_words(drops[TRUE], more)}"
        evidence = f"drop in % by seed, true {listed(drops[TRUE])}, permuted {listed(drops[PERMUTED])} (plus is better)"
        findings.append({"headline": headline, "evidence": evidence, "good": all(more)})
    return findings


def fall_in_words(drops: Sequence[float], more: Sequence[bool]) -> str:
    """Say whether the held-out loss fell under the frozen head, and how that compares with the control.

    Args:
        drops: By seed, with true annotations; above 0 is a fall.
        more: By seed, whether that is more than with permuted ones.
    """
    falls = "falls" if min(drops) > 0 else "falls in the mean of the seeds" if sum(drops) > 0 else "does not fall"
    beside = "more than" if all(more) else "not with every seed more than" if any(more) else "less than"
    return f"the held-out loss {falls} with true annotations, {beside} with permuted"


def listed(values: Sequence[float]) -> str:
    """Values with their signs."""
    return ", ".join(f"{value:+.2f}" for value in values)


# ---- probes ------------------------------------------------------------------------------------------------------------------------------


def read_scores(out: Path, arm: str, name: str, seeds: Sequence[int]) -> Scores:
    """Read the answers of all seeds on the items that all of them answered.

    Raises:
        DataError: They share none.
    """
    found: list[dict[str, dict[str, Any]]] = []
    for seed in seeds:
        rows = read_jsonl(evaluation_of(out, arm, seed, name) / "answers.jsonl")
        found.append({str(row["question_id"]): row for row in rows if "missing" not in row})
    shared = tuple(key for key in found[0] if all(key in rows for rows in found[1:]))
    if not shared:
        raise DataError(f"the seeds of {arm} share no item of {name}: were their evaluations made with one data set?")
    values = np.array([[float(rows[key].get("score", rows[key].get("top1", 0))) for key in shared] for rows in found])
    return Scores(found[0], values, shared, tuple(str(found[0][key].get("image", key)) for key in shared))


def write_mean(out: Path, folder: Path, arm: str, name: str, scores: Scores, seeds: Sequence[int]) -> None:
    """Write one arm's evaluation over all seeds as an ordinary one, so that the report compares arms in pairs."""
    source = evaluation_of(out, arm, seeds[0], name)
    summary = json.loads((source / "summary.json").read_text(encoding="utf-8"))
    images = source / str(summary["protocol"].get("images", "."))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    means, n = scores.values.mean(axis=0), len(scores.names)
    rows = []
    for key, mean in zip(scores.names, means, strict=True):
        row = scores.rows[key]
        kept = {word: row[word] for word in ("image", "answer", "label", "kind") if word in row}
        rows.append(json.dumps({"question_id": key, **kept, "score": round(float(mean), 6)}, ensure_ascii=False) + "\n")
    atomic_write(folder / "answers.jsonl", "".join(rows))
    low, high = wilson(float(means.sum()), n)
    by_seed = [round(100 * float(value), 4) for value in scores.values.mean(axis=1)]
    spread = over_seeds(by_seed)
    metric = "word_accuracy" if name == "mini_ocr" else "top1"
    value = {"value": round(100 * float(means.mean()), 4), "ci95": [round(100 * low, 4), round(100 * high, 4)], "n": n, "by_seed": by_seed}
    value["ci95_over_seeds"] = None if spread.low is None or spread.high is None else [round(spread.low, 4), round(spread.high, 4)]
    protocol = {
        **summary["protocol"],
        "images": relative(images, folder),
        "seeds": list(seeds),
        "score": "mean over the seeds, item by item",
    }
    content = {
        "benchmark": name, "model": SHOWN[arm], "protocol": protocol, "n": n, "metrics": {metric: value}, "missing": 0,
        "encoder": summary.get("encoder"),
    }  # fmt: skip
    atomic_write(folder / "summary.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def gain(first: Scores, second: Scores) -> tuple[Estimate, list[float]]:
    """Second minus first in points, seeds paired: the mean with its interval over pictures, and each seed's."""
    place = {key: index for index, key in enumerate(first.names)}
    both = [(place[key], index) for index, key in enumerate(second.names) if key in place]
    if not both:
        raise DataError("two arms share no item: were their evaluations made with one data set?")
    one, other = (np.array(indices) for indices in zip(*both, strict=True))
    before, after = first.values[:, one], second.values[:, other]
    images = [second.images[index] for index in other]
    found = paired_bootstrap(after.mean(axis=0), before.mean(axis=0), images).scaled(100)
    return found, [100 * float(value) for value in (after.mean(axis=1) - before.mean(axis=1))]


def verdict(name: str, scores: Mapping[str, Scores]) -> dict[str, Any]:
    """Say whether the encoder gained on a benchmark, and whether the control did."""
    (true, by_true), (control, by_control) = gain(scores[BEFORE], scores[TRUE]), gain(scores[BEFORE], scores[PERMUTED])
    beyond, _ = gain(scores[PERMUTED], scores[TRUE])
    what = TITLES[name]
    if true.low > 0 and beyond.low > 0 and min(by_true) > 0:
        headline, good = f"ViSFT gains on {what}, beyond its control", True
    elif true.low > 0 and beyond.low > 0:
        headline, good = f"A gain on {what}, beyond its control, but not with every seed: no claim", None
    elif true.low > 0:
        headline, good = f"No gain on {what}: {RULE}", False
    elif true.high < 0:
        headline, good = f"ViSFT loses on {what}", False
    else:
        headline, good = f"No gain shown on {what}", None
    share = 100 * float(scores[BEFORE].values.mean())
    evidence = (
        f"{share:.1f} % before; true annotations {shown(true)} points (seeds {listed(by_true)}), permuted {shown(control)} "
        f"(seeds {listed(by_control)}); true minus permuted {shown(beyond)}. Intervals over pictures, 95 %; {RULE}"
    )
    return {"headline": headline, "evidence": evidence, "good": good}


def shown(value: Estimate) -> str:
    """A difference with its interval."""
    return f"{value.value:+.2f} [{value.low:+.2f}, {value.high:+.2f}]"


def drift(maps: Mapping[str, Any]) -> dict[str, Any] | None:
    """The sentence on what CLS attends to before and after; None where the maps compare nothing."""
    figures = maps.get("before_after")
    if not isinstance(figures, Mapping) or len(figures) != 2:
        return None
    (_, before), (_, after) = figures.items()
    words = {
        "cls_patch_cosine": "cosine of CLS with the patch tokens",
        "entropy": "entropy of its attention",
        "distance": "distance (patches)",
    }
    evidence = "; ".join(f"{title} {before[key]:.3f} before, {after[key]:.3f} after" for key, title in words.items())
    return {"headline": "CLS before and after", "evidence": f"{evidence}; means over {maps['images']} pictures, first seed", "good": None}
