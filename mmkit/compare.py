"""Compare models on the questions that both answered: differences with intervals, by kind and in all, and a sentence that says what stands.

    mmkit compare runs/quickstart                                      every two encoders of a run
    mmkit compare runs/quickstart/eval/clip runs/quickstart/eval/uta   two of them, on all benchmarks that both have
    mmkit compare runs/a0/eval/x,runs/a1/eval/x runs/b0/eval/x,runs/b1/eval/x    several seeds of each
    mmkit compare runs/a/eval/x/vqav2 runs/b/eval/x/vqav2 --out compare.json

One seed: the paired bootstrap, resampled by picture, and McNemar's test. LLaVA-Bench's ratio of sums and POPE's F1 are computed anew in every
resample; CIDEr is compared image by image, with the weights of its references held. Several seeds: the scores of a question are averaged over
the seeds of a side; the interval holds both what other pictures and what other seeds would change (Student's t for the seeds; the two are added
as variances). p-values are adjusted over the benchmarks, and inside a benchmark over its kinds (Holm).
"""

import argparse
import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from mmkit import stats
from mmkit.checkpoint import atomic_write
from mmkit.config import cli_entry
from mmkit.errors import ConfigError, DataError
from mmkit.report_compare import LEVEL, RIGHT, p_text
from mmkit.report_data import BLIP2_SUFFIX, CONTROL_SUFFIXES, Evaluation, Ratio, RunData, read_runs


@dataclass
class Side:
    """One side of a comparison: a name, and for each benchmark its evaluation in every seed."""

    name: str
    seeds: list[dict[str, Evaluation]] = field(default_factory=list)
    ratios: list[dict[str, Ratio]] = field(default_factory=list)

    @property
    def benchmarks(self) -> list[str]:
        """Those that every seed has, controls left out."""
        shared = set.intersection(*(set(seed) | set(ratio) for seed, ratio in zip(self.seeds, self.ratios, strict=True)))
        return sorted(name for name in shared if not name.endswith(CONTROL_SUFFIXES))


def main(argv: Sequence[str] | None = None) -> Path:
    """Compare, print, and write what --out names.

    Returns:
        The file that was written, or the first folder.

    Raises:
        ConfigError: Fewer than two sides.
        DataError: A folder holds no evaluation, or two sides share no benchmark or no question.
    """
    parser = argparse.ArgumentParser(prog="mmkit compare", description=__doc__.split("\n", 1)[0])
    parser.add_argument(
        "sides", nargs="+", metavar="FOLDER[,FOLDER]", help="a model's evaluations, its seeds with commas; or one run folder"
    )
    parser.add_argument("--out", default="", help="write everything as JSON")
    args = parser.parse_args(argv)
    sides = read_sides(args.sides)
    rows = [row for first, second in pairs(sides, found_in_one_folder=len(args.sides) == 1) for row in compare(first, second)]
    adjust(rows)
    show(Console(), rows)
    if not args.out:
        return Path(args.sides[0].split(",")[0])
    atomic_write(Path(args.out), json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
    return Path(args.out)


def read_sides(words: Sequence[str]) -> list[Side]:
    """Read the sides; one folder with several encoders in it makes a side of each.

    Raises:
        ConfigError: There are fewer than two sides.
        DataError: A folder with commas or beside others holds several encoders, or none; or one side has seeds and another a single run.
    """
    if len(words) == 1 and "," not in words[0]:
        data = read_runs([Path(words[0])])
        names = list(dict.fromkeys([*data.encoders, *(ratio.encoder for ratio in data.ratios)]))
        sides = [Side(name, [{e.benchmark: e for e in data.evaluations if e.encoder == name}], [_ratios(data, name)]) for name in names]
        if len(sides) < 2:
            raise ConfigError(
                f"{words[0]} holds the evaluations of {len(sides)} encoder(s); a comparison takes two: name another folder too"
            )
        return sides
    sides = []
    for word in words:
        seeds, ratios = [], []
        for folder in word.split(","):
            data = read_runs([Path(folder)])
            names = list(dict.fromkeys([*data.encoders, *(ratio.encoder for ratio in data.ratios)]))
            if len(names) != 1:
                held = ", ".join(names) or "no evaluation"
                raise DataError(f"{folder} holds {held}; beside others a folder of one encoder is compared, such as {folder}/eval/NAME")
            seeds.append({evaluation.benchmark: evaluation for evaluation in data.evaluations})
            ratios.append(_ratios(data, names[0]))
        sides.append(Side(_name(word), seeds, ratios))
    if len({len(side.seeds) == 1 for side in sides}) == 2:
        raise DataError(
            "one side has several seeds and another a single run, of which nobody knows how far another seed would be: give seeds to both"
        )
    if len({side.name for side in sides}) < len(sides):
        for side, word in zip(sides, words, strict=True):
            side.name = word.split(",")[0]
    return sides


def pairs(sides: Sequence[Side], found_in_one_folder: bool) -> list[tuple[Side, Side]]:
    """Every two sides; inside one folder only those of one downstream, since LLaVA against BLIP-2 says nothing of encoders.

    Raises:
        ConfigError: No two sides are left.
    """
    every = list(itertools.combinations(sides, 2))
    if not every:
        raise ConfigError(f"{sides[0].name} alone: a comparison takes two sides, a folder of each")
    if not found_in_one_folder:
        return every
    alike = [pair for pair in every if pair[0].name.endswith(BLIP2_SUFFIX) == pair[1].name.endswith(BLIP2_SUFFIX)]
    if not alike:
        names = " and ".join(side.name for side in sides)
        raise ConfigError(f"{names} are not of one downstream; to compare them nevertheless name their folders: mmkit compare A B")
    return alike


def _ratios(data: RunData, name: str) -> dict[str, Ratio]:
    return {ratio.benchmark: ratio for ratio in data.ratios if ratio.encoder == name}


def _name(word: str) -> str:
    first = Path(word.split(",")[0]).resolve()
    return first.name if not (first / "summary.json").is_file() else first.parent.name


def compare(first: Side, second: Side) -> list[dict[str, Any]]:
    """Compare two sides on all benchmarks that both have, in all ("") and by kind.

    Raises:
        DataError: They share no benchmark, or a benchmark without a shared question.
    """
    shared = [name for name in first.benchmarks if name in second.benchmarks]
    if not shared:
        have = [f"{side.name}: {', '.join(side.benchmarks) or 'none'}" for side in (first, second)]
        raise DataError(f"{first.name} and {second.name} have no benchmark in common ({'; '.join(have)})")
    return [row for benchmark in shared for row in compare_on(benchmark, first, second)]


def compare_on(benchmark: str, first: Side, second: Side) -> list[dict[str, Any]]:
    """Compare two sides on one benchmark."""
    if benchmark in first.ratios[0]:
        return compare_ratios(benchmark, first, second)
    found = [[seed[benchmark] for seed in side.seeds] for side in (first, second)]
    if len({evaluation.main for side in found for evaluation in side}) > 1:
        raise DataError(f"{benchmark} is scored by different metrics: {sorted({e.main for side in found for e in side})}")
    every = [evaluation.items for side in found for evaluation in side]
    names = [name for name in every[0] if all(name in items for items in every[1:])]
    if not names:
        raise DataError(f"{first.name} and {second.name} share no scored question of {benchmark}")
    x, y = (np.array([[e.items[name].score for name in names] for e in side]) for side in found)  # [seeds, questions]
    clusters, kinds = [every[0][name].cluster for name in names], [every[0][name].kind for name in names]
    several = sorted(set(kinds)) if len(set(kinds)) > 1 else []
    left_out = len(set().union(*every)) - len(names)
    rows = []
    for kind in ["", *several]:
        chosen = [index for index, own in enumerate(kinds) if kind in ("", own)]
        row = difference(x[:, chosen], y[:, chosen], [clusters[index] for index in chosen])
        rows.append({"benchmark": benchmark, "kind": kind, "first": first.name, "second": second.name, "left_out": left_out, **row})
    f1 = (
        f1_difference(x, y, [every[0][name].reference.strip().lower() for name in names], clusters)
        if benchmark.startswith("pope")
        else None
    )
    if f1 is not None:
        rows.append({"benchmark": benchmark, "kind": "F1", "first": first.name, "second": second.name, "left_out": left_out, **f1})
    if found[0][0].graded:
        for row in rows:
            row |= {"p": stats.normal_p(row["difference"], *row["ci95"]), "p_is": "normal"}
            for name in ("only_first", "only_second"):
                row.pop(name, None)
    return rows


def compare_ratios(benchmark: str, first: Side, second: Side) -> list[dict[str, Any]]:
    """Compare ratios of sums, 100 x candidate / reference, on the questions that were judged for all; in all and by kind."""
    found = [[ratios[benchmark].rows for ratios in side.ratios] for side in (first, second)]
    every = [rows for side in found for rows in side]
    names = [name for name in every[0] if all(name in rows for rows in every[1:])]
    if not names:
        raise DataError(f"{first.name} and {second.name} share no judged question of {benchmark}")
    x, y = (np.array([[rows[name][:2] for name in names] for rows in side]) for side in found)  # [seeds, questions, 2]
    kinds, clusters = [every[0][name][2] for name in names], [every[0][name][3] for name in names]
    left_out = len(set().union(*every)) - len(names)
    rows = []
    for kind in ["", *(sorted(set(kinds)) if len(set(kinds)) > 1 else [])]:
        chosen = [index for index, own in enumerate(kinds) if kind in ("", own)]
        row = statistic_difference(x[:, chosen], y[:, chosen], _ratio, [clusters[index] for index in chosen])
        rows.append({"benchmark": benchmark, "kind": kind, "first": first.name, "second": second.name, "left_out": left_out, **row})
    return rows


def f1_difference(x: np.ndarray, y: np.ndarray, references: Sequence[str], clusters: Sequence[str]) -> dict[str, Any] | None:
    """Compare F1 of "yes" over all questions; None where the right answers are no yes and no.

    Args:
        x, y: Right or wrong [seeds, questions].
        references: The right answers.
        clusters: The picture of each question.
    """
    if set(references) != {"yes", "no"}:
        return None
    yes = np.array([reference == "yes" for reference in references])
    # true positives and errors: an error is a false positive where the right answer is no, else a false negative
    one, other = (np.stack([(side >= RIGHT) & yes, side < RIGHT], axis=-1).astype(float) for side in (x, y))
    return statistic_difference(one, other, _f1, clusters)


def _ratio(totals: np.ndarray) -> np.ndarray:
    return 100 * totals[..., 1] / totals[..., 0]


def _f1(totals: np.ndarray) -> np.ndarray:
    return 200 * totals[..., 0] / np.maximum(2 * totals[..., 0] + totals[..., 1], 1e-12)


def statistic_difference(
    x: np.ndarray, y: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], clusters: Sequence[str]
) -> dict[str, Any]:
    """Compare a statistic of sums on the same questions; it is computed anew in every resample.

    Args:
        x, y: What is summed [seeds, questions, S]; over seeds the sums are averaged.
        statistic: Totals [..., S] -> percent [...].
        clusters: The picture of each question.

    Returns:
        As `difference`; p from the bootstrap's spread.
    """
    width = x.shape[-1]
    columns = np.concatenate([x.mean(axis=0), y.mean(axis=0)], axis=1)  # [questions, 2 S]
    drawn = stats.bootstrap(columns, lambda totals: statistic(totals[:, :width]) - statistic(totals[:, width:]), clusters)
    low, high = (float(end) for end in np.percentile(drawn, [2.5, 97.5]))
    totals = columns.sum(axis=0)
    means = [float(statistic(totals[:width])), float(statistic(totals[width:]))]
    row: dict[str, Any] = {"n": len(columns), "means": means, "seeds": [len(x), len(y)], "difference": means[0] - means[1]}
    row |= over_seeds(row["difference"], low, high, [statistic(side.sum(axis=1)) for side in (x, y)])
    return {
        **row,
        "p": stats.normal_p(row["difference"], *row["ci95"]),
        "p_is": "normal",
        "visible": 2.8 * (row["ci95"][1] - row["ci95"][0]) / (2 * stats.Z95),
    }


def over_seeds(value: float, low: float, high: float, by_seed: Sequence[np.ndarray]) -> dict[str, Any]:
    """The interval that holds what other questions and what other seeds would change, and each side's deviation over its seeds.

    Args:
        value, low, high: The difference with its interval over questions.
        by_seed: Each side's figure in every seed.
    """
    if all(len(side) == 1 for side in by_seed):
        return {"ci95": [low, high]}
    variance = sum(float(side.var(ddof=1)) / len(side) for side in by_seed if len(side) > 1)
    t = stats.student_t95(max(1, min(len(side) for side in by_seed if len(side) > 1) - 1))
    half = math.sqrt((t * math.sqrt(variance)) ** 2 + ((high - low) / 2) ** 2)
    return {"ci95": [value - half, value + half], "sd": [float(side.std(ddof=1)) if len(side) > 1 else None for side in by_seed]}


def difference(x: np.ndarray, y: np.ndarray, clusters: Sequence[str]) -> dict[str, Any]:
    """Compare scores of two sides on the same questions.

    Args:
        x, y: Fractions [seeds, questions]; the sides may have different numbers of seeds.
        clusters: The picture of each question.

    Returns:
        Percent: "difference" (x - y), "ci95", the means and, over seeds, their deviations; "p"; "visible", the smallest true difference that
        would be seen in four of five such comparisons; "n".
    """
    a, b = x.mean(axis=0), y.mean(axis=0)
    paired = stats.paired_bootstrap(a, b, clusters).scaled(100)
    row: dict[str, Any] = {"n": len(a), "means": [100 * float(a.mean()), 100 * float(b.mean())], "seeds": [len(x), len(y)]}
    test = stats.mcnemar_of(a, b, RIGHT)
    error = 100 * stats.standard_error(a - b, clusters)
    if len(x) == len(y) == 1:
        row |= {"difference": paired.value, "ci95": [paired.low, paired.high], "p": test.exact_p, "p_is": "McNemar"}
        row |= {"only_first": test.only_first, "only_second": test.only_second}
    else:
        row["difference"] = paired.value
        row |= over_seeds(paired.value, paired.low, paired.high, [100 * side.mean(axis=1) for side in (x, y)])
        row |= {"p": stats.normal_p(row["difference"], *row["ci95"]), "p_is": "normal, questions and seeds"}
        error = (row["ci95"][1] - row["ci95"][0]) / (2 * stats.Z95)
    row["visible"] = 2.8 * error
    return row


def adjust(rows: Sequence[dict[str, Any]]) -> None:
    """Adjust p over benchmarks, and inside a benchmark over its kinds; say what stands."""
    groups: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["first"], row["second"], row["benchmark"]) if row["kind"] else "all", []).append(row)
    for group in groups.values():
        for row, adjusted in zip(group, stats.holm([row["p"] for row in group]), strict=True):
            row["p_holm"] = adjusted
            row["stands"] = (row["ci95"][0] > 0 or row["ci95"][1] < 0) and adjusted < LEVEL
            row["sentence"] = sentence(row)


def sentence(row: dict[str, Any]) -> str:
    """Say in plain words what stands, and on what evidence."""
    ahead, behind = (row["first"], row["second"]) if row["difference"] >= 0 else (row["second"], row["first"])
    sign = 1 if row["difference"] >= 0 else -1
    low, high = sorted(sign * end for end in row["ci95"])
    where = row["benchmark"] + (f", {row['kind']}" if row["kind"] else "")
    seeds = "" if row["seeds"] == [1, 1] else f", {row['seeds'][0]} and {row['seeds'][1]} seeds"
    evidence = (
        f"{abs(row['difference']):+.1f} points [{low:+.1f}, {high:+.1f}] on the same {row['n']} questions{seeds}, p {p_text(row['p'])}"
    )
    if p_text(row["p_holm"]) != p_text(row["p"]):
        evidence += f" (Holm {p_text(row['p_holm'])})"
    evidence += f"; {row['left_out']} that not all have are left out" if row["left_out"] else ""
    if row["stands"]:
        return f"{ahead} is better than {behind} on {where}: {evidence}. The claim stands."
    if row["difference"] == 0:
        return f"{ahead} and {behind} score the same on {where}: {evidence}. No claim."
    return (
        f"{ahead} is ahead of {behind} on {where}, but not beyond chance: {evidence}; a true difference below about {row['visible']:.1f} points "
        "would go unseen. No claim."
    )


def show(console: Console, rows: Sequence[dict[str, Any]]) -> None:
    """Print a table, and the sentences of whole benchmarks."""
    table = Table(title="differences in points, percent of the score", title_justify="left")
    for heading in ("benchmark", "first", "second", "first - second", "95 %", "p (Holm)", "n", "visible"):
        table.add_column(heading, justify="left" if heading in ("benchmark", "first", "second") else "right", overflow="fold")
    for row in rows:
        cells = [_mean(row, index) for index in range(2)]
        mark = "[bold]" if row["stands"] else ""
        table.add_row(
            f"  {row['kind']}" if row["kind"] else row["benchmark"],
            *(f"{row[name]} {cell}" if not row["kind"] else cell for name, cell in zip(("first", "second"), cells, strict=True)),
            f"{mark}{row['difference']:+.1f}", f"{row['ci95'][0]:+.1f} to {row['ci95'][1]:+.1f}", p_text(row["p_holm"]).removeprefix("= "),
            str(row["n"]), f"{row['visible']:.1f}",
        )  # fmt: skip
    console.print(table)
    for row in rows:
        if not row["kind"]:
            console.print(row["sentence"], highlight=False)


def _mean(row: dict[str, Any], index: int) -> str:
    spread = (row.get("sd") or [None, None])[index]
    return f"{row['means'][index]:.1f}" + (f" ± {spread:.1f}" if spread is not None else "")


if __name__ == "__main__":
    cli_entry(main)
