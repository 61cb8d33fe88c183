"""The table of a sweep: per row and metric the mean over seeds, its spread and interval, and the difference to a baseline, seed by seed."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmkit.errors import DataError
from mmkit.stats import OverSeeds, over_seeds

MISSING = "-"


class Table:
    """Figures by metric, row and seed.

    Args:
        name: Title.
        rows: Their names, in order, and settings.
        seeds: In order.
        baseline: The row to compare with; empty is none.
        metrics: Columns, as in "zeroshot.top1"; none is all that is read.
        notes: What a reader should know; printed below.

    Attributes:
        failed: (row, seed, run) -> what went wrong.
    """

    def __init__(
        self,
        name: str,
        rows: Mapping[str, Mapping[str, Any]],
        seeds: Sequence[int],
        baseline: str = "",
        metrics: Sequence[str] = (),
        notes: Sequence[str] = (),
    ) -> None:
        self.notes = list(notes)
        self.name, self.rows, self.seeds, self.baseline, self.wanted = name, rows, list(seeds), baseline, list(metrics)
        self.values: dict[str, dict[str, dict[int, float]]] = {}
        self.failed: dict[tuple[str, int, str], str] = {}

    def read(self, row: str, seed: int, source: str, path: Path) -> None:
        """Take the metrics of a summary.json: `{"metrics": {name: {"value": number}}}`, or plain numbers in place of the inner objects.

        Raises:
            DataError: It has no metrics.
        """
        metrics = json.loads(path.read_text(encoding="utf-8")).get("metrics")
        if not isinstance(metrics, Mapping):
            raise DataError(f'{path} has no "metrics"; a table is made of {{"metrics": {{name: {{"value": number}}}}}}')
        for name, entry in metrics.items():
            value = entry.get("value") if isinstance(entry, Mapping) else entry
            if isinstance(value, int | float):
                self.values.setdefault(f"{source}.{name}", {}).setdefault(row, {})[seed] = float(value)

    def fail(self, row: str, seed: int, run: str, problem: str) -> None:
        """Note a run that did not end well; its figures stay missing."""
        self.failed[row, seed, run] = problem

    @property
    def metrics(self) -> list[str]:
        """Columns: those wanted, or all."""
        return self.wanted or list(self.values)

    def summary(self, metric: str, row: str) -> OverSeeds | None:
        """One cell; None where no seed has a figure."""
        values = self.values.get(metric, {}).get(row, {})
        return over_seeds(list(values.values())) if values else None

    def difference(self, metric: str, row: str) -> OverSeeds | None:
        """Row minus baseline over the seeds that both have."""
        mine, other = (self.values.get(metric, {}).get(name, {}) for name in (row, self.baseline))
        both = [mine[seed] - other[seed] for seed in self.seeds if seed in mine and seed in other]
        return over_seeds(both) if both and row != self.baseline else None

    def markdown(self) -> str:
        """The table: mean, standard deviation over seeds, 95 % interval (Student's t) of the mean, difference to the baseline."""
        heads = ["row", "seeds"]
        for metric in self.metrics:
            heads += [metric, f"{metric} − {self.baseline}"] if self.baseline else [metric]
        lines = [f"# {self.name}", "", "| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1)]
        for row in self.rows:
            done = max((len(self.values.get(metric, {}).get(row, {})) for metric in self.metrics), default=0)
            cells = [row, f"{done} of {len(self.seeds)}"]
            for metric in self.metrics:
                cells.append(cell(self.summary(metric, row)))
                if self.baseline:
                    cells.append(cell(self.difference(metric, row), signed=True))
            lines.append("| " + " | ".join(cells) + " |")
        lines += ["", "Mean ± standard deviation over seeds [95 % interval of the mean, Student's t]; differences are taken seed by seed."]
        lines += [line for note in self.notes for line in ("", note)]
        lines += ["", "Failed:", "", self.failures()] if self.failed else []
        return "\n".join(lines) + "\n"

    def failures(self) -> str:
        """A line for each failed run."""
        return "\n".join(f"- {row}, seed {seed}, {run}: {problem.splitlines()[0]}" for (row, seed, run), problem in self.failed.items())

    def as_dict(self) -> dict[str, Any]:
        """The same for programs, with the figure of each seed."""
        rows: dict[str, Any] = {}
        for row, settings in self.rows.items():
            found = {}
            for metric in self.metrics:
                if (whole := self.summary(metric, row)) is not None:
                    difference = self.difference(metric, row)
                    found[metric] = {
                        "by_seed": {str(seed): value for seed, value in self.values[metric][row].items()},
                        **numbers(whole),
                        "difference": None if difference is None else numbers(difference),
                    }
            rows[row] = {"settings": dict(settings), "metrics": found}
        failed = [{"row": row, "seed": seed, "run": run, "error": problem} for (row, seed, run), problem in self.failed.items()]
        return {
            "sweep": self.name,
            "seeds": self.seeds,
            "baseline": self.baseline or None,
            "notes": self.notes,
            "rows": rows,
            "failed": failed,
        }


def cell(value: OverSeeds | None, signed: bool = False) -> str:
    """One cell as text."""
    if value is None:
        return MISSING
    sign = "+" if signed else ""
    text = f"{value.mean:{sign}.2f}"
    return text if value.sd is None else f"{text} ± {value.sd:.2f} [{value.low:{sign}.2f}, {value.high:{sign}.2f}]"


def numbers(value: OverSeeds) -> dict[str, Any]:
    """One cell for programs."""
    return {"mean": value.mean, "sd": value.sd, "ci95": None if value.low is None else [value.low, value.high], "n": value.n}
