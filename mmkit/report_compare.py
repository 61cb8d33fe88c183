"""What the report claims, and on what evidence: comparisons of encoders, controls, question kinds, choice of examples."""

from __future__ import annotations

import hashlib
import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmkit import stats
from mmkit.report_data import BASELINE, BLIP2_SUFFIX, CONTROL_SUFFIX, CONTROL_SUFFIXES, Evaluation, Item, RunData

LEVEL = 0.05
EXAMPLES = 12  # a benchmark
RIGHT = 0.5  # from here on a score counts as right


def results(data: RunData) -> list[dict[str, Any]]:
    """One row for each encoder and benchmark: the headline metric, all metrics, what is missing."""
    rows = []
    for benchmark in data.benchmarks:
        for encoder in data.encoders:
            evaluation = data.find(encoder, benchmark)
            if evaluation is None:
                continue
            summary = evaluation.summary
            row = {"benchmark": benchmark, "encoder": encoder, "model": str(summary.get("model", "")), "control": evaluation.is_control}
            row |= {"metric": evaluation.main, **evaluation.metrics[evaluation.main], "missing": missing_count(summary)}
            row |= {"seconds": summary.get("seconds"), "metrics": evaluation.metrics, "protocol": summary.get("protocol", "")}
            row["baseline"] = evaluation.metrics.get(BASELINE)
            rows.append(row)
    return rows


def missing_count(summary: Mapping[str, Any]) -> int:
    """How many questions have no answer; a summary gives the number or the list of them."""
    missing = summary.get("missing", 0)
    return len(missing) if isinstance(missing, list | dict) else int(missing or 0)


def comparisons(data: RunData) -> list[dict[str, Any]]:
    """Compare every two encoders on the questions that both answered, the better one first; p-values adjusted over all (Holm).

    Columns of different downstreams (LLaVA, BLIP-2) are not compared: their difference would not be the encoder's.
    """
    rows = []
    for benchmark in data.benchmarks:
        if benchmark.endswith(CONTROL_SUFFIXES):
            continue
        for first, second in itertools.combinations(data.encoders, 2):
            if first.endswith(BLIP2_SUFFIX) != second.endswith(BLIP2_SUFFIX):
                continue
            one, other = data.find(first, benchmark), data.find(second, benchmark)
            if one is not None and other is not None:
                row = compare(one, other)
                if row is None:
                    data.notes.append(f"{first} and {second} share no scored question of {benchmark}: they cannot be compared in pairs")
                else:
                    rows.append(row)
    for row, adjusted in zip(rows, stats.holm([row["p"] for row in rows]), strict=True):
        row["p_holm"] = adjusted
        row["stands"] = (row["ci95"][0] > 0 or row["ci95"][1] < 0) and adjusted < LEVEL
        row["headline"], row["evidence"] = claim(row)
        row["sentence"] = f"{row['headline']}: {row['evidence']}. {'The claim stands.' if row['stands'] else 'No claim.'}"
    return rows


def compare(one: Evaluation, other: Evaluation) -> dict[str, Any] | None:
    """The paired comparison of two encoders on one benchmark, or None without a question in common."""
    shared = [name for name in one.items if name in other.items]
    if not shared:
        return None
    if mean_score(one, shared) < mean_score(other, shared):
        one, other = other, one
    x, y = scores(one, shared), scores(other, shared)
    difference = stats.paired_bootstrap(x, y, [one.items[name].cluster for name in shared]).scaled(100)
    row: dict[str, Any] = {"p": stats.normal_p(difference.value, difference.low, difference.high), "p_is": "normal"}
    row |= {"only_first": None, "only_second": None, "visible": 2.8 * (difference.high - difference.low) / (2 * stats.Z95)}
    if not one.graded:
        test = stats.mcnemar_of(x, y, RIGHT)
        discordant = (test.only_first + test.only_second) / len(shared)
        row = {"p": test.exact_p, "p_is": "McNemar", "only_first": test.only_first, "only_second": test.only_second}
        row["visible"] = 100 * stats.smallest_difference(discordant, len(shared))
    return {
        "benchmark": one.benchmark,
        "first": one.encoder,
        "second": other.encoder,
        "n": len(shared),
        "left_out": len(set(one.items) ^ set(other.items)),
        "difference": difference.value,
        "ci95": [difference.low, difference.high],
        **row,
    }


def scores(evaluation: Evaluation, names: Sequence[str]) -> np.ndarray:
    """Scores of the named items, fractions [n]."""
    return np.array([evaluation.items[name].score for name in names])


def mean_score(evaluation: Evaluation, names: Sequence[str]) -> float:
    """Mean over the named items."""
    return float(scores(evaluation, names).mean())


def claim(row: Mapping[str, Any]) -> tuple[str, str]:
    """Say in plain words whether the claim stands, and on what evidence."""
    low, high = row["ci95"]
    evidence = (
        f"{row['difference']:+.1f} points [{low:+.1f}, {high:+.1f}] on the same {row['n']} questions, {row['p_is']} p {p_text(row['p'])}"
    )
    if p_text(row["p_holm"]) != p_text(row["p"]):
        evidence += f" (Holm {p_text(row['p_holm'])})"
    if row["stands"]:
        return f"{row['first']} is better than {row['second']} on {row['benchmark']}", evidence
    if row["difference"] == 0:
        return f"{row['first']} and {row['second']} score the same on {row['benchmark']}", evidence
    if row["visible"]:
        evidence += f"; a true difference below about {row['visible']:.1f} points would go unseen"
    return f"{row['first']} is ahead of {row['second']} on {row['benchmark']}, but not beyond chance", evidence


def p_text(p: float) -> str:
    """A p-value to three places with its sign of comparison, small ones as a bound."""
    return "< 0.001" if p < 0.001 else f"= {p:.3f}"


def controls(data: RunData) -> list[dict[str, Any]]:
    """For every encoder and control: the score minus the score before other, grey or no pictures, on the same questions."""
    rows = []
    pairs = itertools.product(data.benchmarks, data.encoders, CONTROL_SUFFIXES)
    for benchmark, encoder, suffix in pairs:
        real, control = data.find(encoder, benchmark), data.find(encoder, benchmark + suffix)
        if real is not None and control is not None:
            with_image, without = real.metrics[real.main], control.metrics[control.main]
            row: dict[str, Any] = {"benchmark": benchmark, "encoder": encoder, "metric": real.main, "score": with_image, "control": without}
            row["kind"] = suffix.removeprefix("_")
            row["apart"] = with_image["ci95"][0] > without["ci95"][1]
            row["baseline"] = real.metrics.get(BASELINE)
            row["difference"], row["ci95"] = with_image["value"] - without["value"], None
            shared = [name for name in real.items if name in control.items]
            if shared:
                clusters = [real.items[name].cluster for name in shared]
                gain = stats.paired_bootstrap(scores(real, shared), scores(control, shared), clusters).scaled(100)
                row |= {"difference": gain.value, "ci95": [gain.low, gain.high], "n": len(shared)}
            row["share"] = 100 * row["difference"] / with_image["value"] if with_image["value"] else None
            row["headline"], row["evidence"] = control_claim(row)
            row["sentence"] = f"{row['headline']}: {row['evidence']}."
            rows.append(row)
    return rows


def control_claim(row: Mapping[str, Any]) -> tuple[str, str]:
    """Say in plain words whether the model looks at the picture, and on what evidence."""
    own, others = row["score"]["value"], row["control"]["value"]
    shown = {"blank": "before a grey one", "text_only": "without any"}.get(row["kind"], "with others'")
    unit = "" if str(row["metric"]).startswith("cider") else " %"  # CIDEr is no share
    evidence = f"{own:.1f}{unit} with its own pictures, {others:.1f}{unit} {shown} ({row['difference']:+.1f} points, intervals "
    evidence += "apart)" if row["apart"] else "overlap)"
    if row["apart"] and row["share"] is not None:
        evidence += f"; {row['share']:.0f} % of the score need the picture"
    if row["baseline"]:
        evidence += f"; the most frequent answer alone gives {row['baseline']['value']:.1f} %"
    if row["apart"]:
        return f"{row['encoder']} on {row['benchmark']}: the model looks at the picture", evidence
    return f"{row['encoder']} on {row['benchmark']}: not shown that the model looks at the picture", evidence


def kinds(data: RunData) -> list[dict[str, Any]]:
    """A table for each benchmark whose metrics are split by question kind: kind -> encoder -> score, control, baseline."""
    tables = []
    for benchmark in data.benchmarks:
        if benchmark.endswith(CONTROL_SUFFIXES):
            continue
        rows: dict[str, dict[str, Any]] = defaultdict(lambda: {"cells": {}})
        for encoder in data.encoders:
            evaluation, control = data.find(encoder, benchmark), data.find(encoder, benchmark + CONTROL_SUFFIX)
            if evaluation is None:
                continue
            for name, value in evaluation.metrics.items():
                metric, _, kind = name.partition("/")
                if not kind or metric != evaluation.main:
                    continue
                rows[kind]["kind"], rows[kind]["n"] = kind, value["n"]
                rows[kind]["cells"][encoder] = {**value, "control": control.metrics.get(name) if control else None}
                rows[kind].setdefault("baseline", evaluation.metrics.get(f"{BASELINE}/{kind}"))
        if rows:
            tables.append({"benchmark": benchmark, "rows": list(rows.values())})
    return tables


def examples(data: RunData, limit: int = EXAMPLES) -> list[dict[str, Any]]:
    """Choose questions to show for each benchmark: where the encoders disagree first, kinds in turn, the same ones at every run."""
    chosen = []
    for benchmark in data.benchmarks:
        found = [data.find(encoder, benchmark) for encoder in data.encoders]
        evaluations = [evaluation for evaluation in found if evaluation is not None and evaluation.items]
        if benchmark.endswith(CONTROL_SUFFIXES) or not evaluations:
            continue
        shared = [name for name in evaluations[0].items if all(name in e.items for e in evaluations[1:])]
        shared = [name for name in shared if evaluations[0].items[name].image is not None]
        if not shared:
            data.notes.append(f"no example pictures for {benchmark}: its answers name no picture that can be found from the run folder")
            continue
        for name in _choose(shared, evaluations, limit):
            item = evaluations[0].items[name]
            row: dict[str, Any] = {
                "benchmark": benchmark,
                "id": name,
                "kind": item.kind,
                "question": item.question,
                "reference": item.reference,
                "image": item.image,
            }
            row["answers"] = [_answer(e, e.items[name]) for e in evaluations]
            row["agree"] = len({answer["right"] for answer in row["answers"]}) == 1
            chosen.append(row)
    return chosen


def _answer(evaluation: Evaluation, item: Item) -> dict[str, Any]:
    right = item.score >= RIGHT
    return {"encoder": evaluation.encoder, "text": item.answer, "score": item.score, "right": right, "graded": evaluation.graded}


def _choose(names: Sequence[str], evaluations: Sequence[Evaluation], limit: int) -> list[str]:
    """Take three quarters where the encoders disagree, then where they agree, to see both; kinds in turn, and inside a kind by a hash.

    A hash, so that nobody picked them, and the same ones are shown at every run.
    """
    queues: dict[tuple[bool, str], list[str]] = defaultdict(list)
    for name in sorted(names, key=lambda name: hashlib.sha256(name.encode()).hexdigest()):
        rights = {e.items[name].score >= RIGHT for e in evaluations}
        queues[(len(rights) == 1, evaluations[0].items[name].kind)].append(name)
    in_turn: dict[bool, list[str]] = {}
    for agree in (False, True):
        rounds = itertools.zip_longest(*(queues[key] for key in sorted(queues) if key[0] is agree))
        in_turn[agree] = [name for names_of_round in rounds for name in names_of_round if name is not None]
    few = min(len(in_turn[False]), max(limit * 3 // 4, limit - len(in_turn[True])))
    return in_turn[False][:few] + in_turn[True][: limit - few]
