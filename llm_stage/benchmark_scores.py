"""From answers to figures: the table of scorers, and the summary that every evaluation writes.

A scorer gives each answer a fraction (so that encoders can be compared question by question), the benchmark's further figures with
intervals, and under "official" what the authors' own code prints for the same answers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from llm_stage.benchmark_choice_files import ROTATED
from llm_stage.benchmark_files import VqaItem
from mmkit import choice_scoring as rules
from mmkit.choice_scoring import FAILED
from mmkit.errors import DataError
from mmkit.scoring import VQA_VARIANTS, normalise_answer, vqa_accuracy
from mmkit.stats import bootstrap, mean_interval

BASELINE = "most_frequent_answer"


@dataclass(frozen=True)
class Scored:
    """One question with its answer and score, a fraction; `given` is False where it has none and counts as wrong."""

    item: VqaItem
    answer: str
    score: float
    given: bool = True


Metric = dict[str, Any]  # value in percent, ci95, n


@dataclass(frozen=True)
class Scorer:
    """How the answers of a benchmark become figures.

    Attributes:
        metric: What the mean of the items' scores is called.
        score: Fraction of one answer.
        extra: Further metrics with intervals, by name.
        official: What the authors' code prints, in its own units; also counts of answers that could not be read.
        people: How many references an item must have; 0 is at least one.
        extra_first: The benchmark's headline is the first of the further metrics, not the mean of the items' scores.
    """

    metric: str
    score: Callable[[VqaItem, str], float]
    extra: Callable[[Sequence[Scored]], dict[str, Metric]] = lambda rows: {}
    official: Callable[[Sequence[Scored]], dict[str, Any]] = lambda rows: {}
    people: int = 0
    extra_first: bool = False


# ---- parts of scorers ----------------------------------------------------------------------------------------------------------------


def metric(values: Sequence[float], clusters: Sequence[Hashable]) -> Metric:
    """One entry of `metrics`: percent with a 95 % interval, resampled by image."""
    estimate = mean_interval(values, clusters).scaled(100)
    return {"value": round(estimate.value, 2), "ci95": [round(estimate.low, 2), round(estimate.high, 2)], "n": estimate.n}


def _mean(rows: Sequence[Scored]) -> Metric:
    return metric([row.score for row in rows], [cluster(row.item) for row in rows])


def cluster(item: VqaItem) -> Hashable:
    """What is resampled together: the questions of one picture; a question without one stands alone."""
    return item.own_image or ("question", item.question_id)


def _means(rows: Sequence[Scored], **chosen: Callable[[VqaItem], bool]) -> dict[str, Metric]:
    """The mean over some of the rows for each name that has any."""
    found = {name: [row for row in rows if choose(row.item)] for name, choose in chosen.items()}
    return {name: _mean(some) for name, some in found.items() if some}


def _percents(rows: Sequence[Scored], key: Callable[[VqaItem], Any], digits: int = 2) -> dict[str, float]:
    table: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        table[str(key(row.item))].append(row.score)
    return {name: round(100 * sum(values) / len(values), digits) for name, values in sorted(table.items())}


def _vqa_official(rows: Sequence[Scored]) -> dict[str, Any]:
    """As the VQA tool rounds: each question to 2 decimals in percent, then the means."""
    out: dict[str, Any] = {"overall": round(sum(round(100 * row.score, 2) for row in rows) / len(rows), 2)}
    if any(row.item.facts.get("answer_type") for row in rows):
        out["perAnswerType"] = _percents(rows, lambda item: item.facts.get("answer_type"))
    if len({row.item.kind for row in rows}) > 1:
        out["perQuestionType"] = _percents(rows, lambda item: item.kind)
    return out


def _vqa_extra(rows: Sequence[Scored]) -> dict[str, Metric]:
    """Yes/no, number and other apart, where the annotations tell them and the kinds do not."""
    types = sorted({str(row.item.facts.get("answer_type") or "") for row in rows})
    if len(types) < 2 or all(row.item.kind == row.item.facts.get("answer_type") for row in rows):
        return {}
    return {f"vqa_accuracy_{name}": _mean([row for row in rows if row.item.facts.get("answer_type") == name]) for name in types if name}


def _gqa_official(form: Callable[[str], str], rows: Sequence[Scored]) -> dict[str, Any]:
    rows = [row for row in rows if row.item.facts.get("gqa", {}).get("types")]
    return rules.gqa_figures([row.item.facts["gqa"] for row in rows], [form(row.answer) for row in rows]) if rows else {}


def _gqa_extra(rows: Sequence[Scored]) -> dict[str, Metric]:
    return _means(rows, binary=lambda item: item.kind != "query", open=lambda item: item.kind == "query")


def _pope_official(rows: Sequence[Scored], parse: Callable[[str], str] = rules.parse_pope) -> dict[str, Any]:
    """POPE's figures in each category, and the mean F1, as fractions."""
    out: dict[str, Any] = {}
    for kind in sorted({row.item.kind for row in rows}):
        some = [row for row in rows if row.item.kind == kind]
        out[kind] = rules.yes_no_figures([parse(row.answer) for row in some], [row.item.answers[0].lower() for row in some])
    return {**out, "mean_f1": sum(figures["f1"] for figures in out.values()) / len(out)}


def _pope_lmms_official(rows: Sequence[Scored]) -> dict[str, Any]:
    return dict(rules.yes_no_figures_lmms([row.answer for row in rows], [row.item.answers[0].lower() for row in rows]))


def _pope_extra(rows: Sequence[Scored]) -> dict[str, Metric]:
    """F1, recomputed in every draw: the mean over the categories, and each one."""
    kinds = sorted({row.item.kind for row in rows})
    columns = np.zeros((len(rows), 3 * len(kinds)))
    for number, row in enumerate(rows):
        said, gold = rules.parse_pope(row.answer), row.item.answers[0].lower()
        place = {("yes", "yes"): 0, ("yes", "no"): 1, ("no", "yes"): 2}.get((said, gold))
        if place is not None:
            columns[number, 3 * kinds.index(row.item.kind) + place] = 1
    clusters = [cluster(row.item) for row in rows]

    def f1(totals: np.ndarray, which: Sequence[int]) -> np.ndarray:
        parts = [(2 * totals[:, 3 * k], 2 * totals[:, 3 * k] + totals[:, 3 * k + 1] + totals[:, 3 * k + 2]) for k in which]
        return np.mean([np.divide(a, b, out=np.zeros_like(a), where=b > 0) for a, b in parts], axis=0)

    out = {}
    chosen = {"f1": list(range(len(kinds)))} | ({f"f1/{kind}": [k] for k, kind in enumerate(kinds)} if len(kinds) > 1 else {})
    for name, which in chosen.items():
        value = float(f1(columns.sum(axis=0, keepdims=True), which)[0])
        low, high = np.percentile(bootstrap(columns, partial(f1, which=which), clusters), [2.5, 97.5])
        n = sum(row.item.kind in {kinds[k] for k in which} for row in rows)
        out[name] = {"value": round(100 * value, 2), "ci95": [round(100 * float(low), 2), round(100 * float(high), 2)], "n": n}
    return out


def _mme_official(rows: Sequence[Scored]) -> dict[str, Any]:
    return rules.mme_figures([(row.item.kind, str(row.item.question_id).rsplit("/", 1)[0], row.score == 1) for row in rows])


def _mme_extra(rows: Sequence[Scored]) -> dict[str, Metric]:
    """Pictures with both questions answered and right."""
    both = _groups(rows, lambda item: str(item.question_id).rsplit("/", 1)[0])
    return {"accuracy_plus": metric([min(scores) if len(scores) == 2 else 0.0 for scores in both.values()], list(both))}


def _groups(rows: Sequence[Scored], key: Callable[[VqaItem], Any]) -> dict[Any, list[float]]:
    table: dict[Any, list[float]] = defaultdict(list)
    for row in rows:
        table[key(row.item)].append(row.score)
    return table


def _scienceqa(item: VqaItem, answer: str) -> float:
    letter, choices = rules.parse_scienceqa(answer), item.facts.get("choices", len(rules.LETTERS))
    return float(letter != FAILED and rules.letter_index(letter, choices) == rules.letter_index(item.answers[0], choices))


def _scienceqa_extra(rows: Sequence[Scored]) -> dict[str, Metric]:
    with_image = [row for row in rows if row.item.facts.get("has_image")]
    return {"img_accuracy": _mean(with_image)} if 0 < len(with_image) < len(rows) else {}


def _scienceqa_official(rows: Sequence[Scored]) -> dict[str, Any]:
    """IMG-Accuracy is over answered questions with a picture; the accuracy is over all, missing ones wrong."""
    with_image = [row.score for row in rows if row.item.facts.get("has_image") and row.given]
    unread = sum(rules.parse_scienceqa(row.answer) == FAILED for row in rows)
    right = int(sum(row.score for row in rows))
    out: dict[str, Any] = {"accuracy": 100 * right / len(rows), "correct": right, "count": len(rows), "unparsed": unread}
    return {**out, "img_accuracy": 100 * sum(with_image) / len(with_image) if with_image else None, "img_count": len(with_image)}


def _letter_official(parse: Callable[[str], str], rows: Sequence[Scored]) -> dict[str, Any]:
    return {"unparsed": sum(parse(row.answer) == FAILED for row in rows)}


def _circular(rows: Sequence[Scored]) -> dict[str, Metric]:
    """MMBench's circular figure: a question counts where all its rotations are right."""
    table = _groups(rows, lambda item: item.question_id % ROTATED if isinstance(item.question_id, int) else item.question_id)
    if len(table) == len(rows):
        return {}
    return {"circular_accuracy": metric([min(scores) for scores in table.values()], list(table))}


def _equal(item: VqaItem, answer: str) -> float:
    given = normalise_answer(answer)
    return float(any(given == normalise_answer(reference) for reference in item.answers))


def _yes_no(parse: Callable[[str], str], item: VqaItem, answer: str) -> float:
    return float(parse(answer) == item.answers[0].lower())


def _is(form: Callable[[str], str], item: VqaItem, answer: str) -> float:
    return float(form(answer) == item.answers[0])


def _as_it_is(text: str) -> str:
    return text


def _vqa(variant: str, item: VqaItem, answer: str) -> float:
    return vqa_accuracy(answer, item.answers, variant)


SCORERS: dict[str, Scorer] = {
    **{name: Scorer("vqa_accuracy", partial(_vqa, name), _vqa_extra, _vqa_official, people=10) for name in VQA_VARIANTS},
    "gqa": Scorer("accuracy", partial(_is, rules.gqa_form), _gqa_extra, partial(_gqa_official, rules.gqa_form)),
    "lmms_gqa": Scorer("accuracy", lambda item, answer: float(rules.gqa_right_lmms(answer, item.answers[0])), _gqa_extra),
    "lavis_gqa": Scorer("accuracy", lambda item, answer: float(rules.gqa_right_lavis(answer, item.answers[0])), _gqa_extra),
    "pope": Scorer("accuracy", partial(_yes_no, rules.parse_pope), _pope_extra, _pope_official, extra_first=True),
    "lmms_pope": Scorer("accuracy", partial(_yes_no, lambda text: text.lower().strip()), official=_pope_lmms_official),
    "mme": Scorer("accuracy", partial(_yes_no, rules.parse_mme), _mme_extra, _mme_official),
    "lmms_mme": Scorer("accuracy", partial(_yes_no, rules.parse_mme_lmms), _mme_extra, _mme_official),
    "scienceqa": Scorer("accuracy", _scienceqa, _scienceqa_extra, _scienceqa_official),
    "lmms_scienceqa": Scorer("accuracy", lambda item, answer: float(rules.scienceqa_lmms(answer, item.answers[0])), _scienceqa_extra),
    # the letter at the start of the answer; MMBench's own server asks a judge where it finds none, which is not done here
    "letter": Scorer("accuracy", partial(_is, rules.parse_letter), _circular, partial(_letter_official, rules.parse_letter)),
    "exact_letter": Scorer("accuracy", partial(_is, _as_it_is), _circular),  # LLaVA's rule for SEED: the answer is the letter
    "exact": Scorer("accuracy", _equal),  # equal to one of the references in VQA's normal form
    "anls": Scorer("anls", lambda item, answer: rules.anls(answer, item.answers)),
}

# ---- the summary ---------------------------------------------------------------------------------------------------------------------


def score(items: Sequence[VqaItem], answers: Mapping[Any, Mapping[str, Any]], scorer: Scorer) -> list[Scored]:
    """Score every answer in the order of the questions. A question without answer has no row."""
    given = ((item, answers.get(item.question_id, {}).get("answer")) for item in items)
    return [Scored(item, answer, scorer.score(item, answer)) for item, answer in given if answer is not None]


def score_rows(rows: Sequence[Scored]) -> list[dict[str, Any]]:
    """Lines of scores.jsonl."""
    return [
        {
            "question_id": row.item.question_id,
            "score": round(row.score, 4),
            "kind": row.item.kind,
            "image": row.item.own_image,
            "reference": row.item.reference,
            "answer": row.answer,
        }
        for row in rows
    ]


def summarise(
    items: Sequence[VqaItem],
    rows: Sequence[Scored],
    answers: Mapping[Any, Mapping[str, Any]],
    baseline: Mapping[str, str],
    scorer: Scorer,
) -> dict[str, Any]:
    """Average with intervals: all questions, each kind, the benchmark's own figures, and the baseline on the same answered questions.

    Args:
        items: All questions that were to be answered.
        rows: Those that have an answer, scored.
        answers: Answer rows by question id, for times and reasons.
        baseline: The most frequent answer by kind, under "" that of all; empty leaves it out.
        scorer: The benchmark's.

    Raises:
        DataError: Nothing was answered.
    """
    if not rows:
        raise DataError(f"none of {len(items)} questions has an answer: there is nothing to score")
    answered = {row.item.question_id for row in rows}
    missing = [item.question_id for item in items if item.question_id not in answered]
    kinds = sorted({row.item.kind for row in rows})
    extra = scorer.extra(rows)
    metrics: dict[str, Metric] = dict(extra) if scorer.extra_first else {}
    for kind in ["", *(kinds if len(kinds) > 1 else [])]:
        some = [row for row in rows if kind in ("", row.item.kind)]
        suffix = f"/{kind}" if kind else ""
        metrics[scorer.metric + suffix] = _mean(some)
        if baseline:
            guesses = [scorer.score(row.item, baseline.get(row.item.kind, baseline[""])) for row in some]
            metrics[BASELINE + suffix] = metric(guesses, [cluster(row.item) for row in some])
    metrics |= extra
    official = scorer.official(rows)
    return {
        "n": len(rows),
        "metrics": metrics,
        **({"official": official} if official else {}),
        "item_metric": scorer.metric,
        "seconds": round(sum(float(row.get("seconds", 0.0)) for row in answers.values()), 1),
        "missing": len(missing),
        "missing_questions": {str(name): answers.get(name, {}).get("missing", "not answered") for name in missing},
        **({"baseline_answers": {kind: baseline.get(kind, baseline[""]) for kind in kinds}} if baseline else {}),
    }


def summary_text(summary: Mapping[str, Any]) -> str:
    """The summary for the terminal, a line a question kind."""
    lines = [
        f"{summary['benchmark']} · {summary['model']}: {summary['n']} answered, {summary['missing']} missing, {summary['seconds']:.0f} s"
    ]
    for name, value in summary["metrics"].items():
        if not name.startswith(BASELINE):
            _, slash, kind = name.partition("/")
            guess = summary["metrics"].get(BASELINE + slash + kind) if name.split("/")[0] == summary["item_metric"] else None
            low, high = value["ci95"]
            line = f"  {name:28s} {value['value']:6.2f} %  [{low:.2f}, {high:.2f}]  n {value['n']:5d}"
            lines.append(line + (f"  most frequent answer {guess['value']:.2f} %" if guess else ""))
    plain = {name: value for name, value in summary.get("official", {}).items() if isinstance(value, int | float)}
    if plain:
        lines.append("  as the authors' code prints it: " + ", ".join(f"{name} {value:.6g}" for name, value in plain.items()))
    if "grounding" in summary:
        lines.append(f"  {summary['grounding']['sentence']}")
    return "\n".join(lines)
