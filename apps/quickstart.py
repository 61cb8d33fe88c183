"""The main job on the embedded data, from nothing to a report; stopped at any moment and started again, it goes on where it was.

    mmkit quickstart                        about twenty minutes on two cores, all of it in runs/quickstart
    mmkit quickstart --encoders clip        one encoder only; the other can follow later
    mmkit quickstart --encoders clip,uta,visft
    mmkit quickstart --downstream llava,blip2

Each stage is a script's own `main([...])`, with a recipe everybody can read and run alone. A stage is complete when the file that its
script writes last is there; a training that was interrupted resumes from its checkpoint, an evaluation by question id.
"""

import gc
import hashlib
import importlib
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from apps.quickstart_plan import DEFAULT_ENCODERS, QuickstartConfig, Stage, plan
from mmkit.checkpoint import atomic_folder, atomic_write
from mmkit.config import cli_entry, load_config
from mmkit.errors import ConfigError, NameNotFound

MAIN = "item_metric"  # the metric that a summary says its lines are scored by
RESULTS = {  # heading: folder under eval/, and the metric
    "llava": {
        "zero-shot top-1": ("{}/mini_zeroshot", "top1"),
        "VQA accuracy": ("{}/mini_vqa", "vqa_accuracy"),
        "images shuffled": ("{}/mini_vqa_shuffled", "vqa_accuracy"),
    },
    "blip2": {
        "own R@5": ("{}/mini_retrieval", "image_retrieval_recall@5"),
        "ITC R@5": ("{}_blip2/mini_retrieval", "itc/image_retrieval_recall@5"),
        "ITM R@5": ("{}_blip2/mini_retrieval", "image_retrieval_recall@5"),
        "VQA": ("{}_blip2/mini_vqa", "vqa_accuracy"),
        "VQA, control": ("{}_blip2/mini_vqa_shuffled", "vqa_accuracy"),
        "CIDEr": ("{}_blip2/mini_captions", MAIN),
        "CIDEr, control": ("{}_blip2/mini_captions_shuffled", MAIN),
    },
}
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> Path:
    """Run all stages that are not complete.

    Args:
        argv: Flags, see `QuickstartConfig`.

    Returns:
        The folder.

    Raises:
        ConfigError: The folder was made with other settings.
        SystemExit: Interrupted (code 130); what is done is kept.
    """
    config = load_config(QuickstartConfig, argv)
    stages = plan(config)
    journal = Journal(Path(config.out), config)
    journal.check(stages)
    threads = set_threads(config.threads)
    quiet()
    console = Console()
    overview(console, f"mmkit quickstart in {config.out} · scale {config.scale:g} · {threads} threads", stages)
    run_all(console, stages, journal)
    results(console, Path(config.out), config)
    return Path(config.out)


# ---- one stage ---------------------------------------------------------------------------------------------------------------------------


def run_all(console: Console, stages: Sequence[Stage], journal: "Journal") -> None:
    """Run the stages that are not complete, and the last one always."""
    start = time.monotonic()
    for number, stage in enumerate(stages, start=1):
        last = number == len(stages)
        if stage.complete and not last:  # the report is cheap, and belongs to whatever has been made since
            continue
        elapsed = clock(time.monotonic() - start)
        console.rule(f"[bold]{number} of {len(stages)}[/bold] · {stage.name} · {elapsed} so far", align="left")
        run_stage(stage, journal, number, len(stages))
    console.rule(f"[bold]done[/bold] · {clock(time.monotonic() - start)} this time, {clock(journal.seconds)} in all", align="left")


def export_encoder(argv: Sequence[str]) -> Path:
    """Write an encoder of the catalog as a folder; `argv` is its source and the folder."""
    from encoders.catalog import load_encoder

    source, folder = argv
    with atomic_folder(Path(folder)) as half_written:
        load_encoder(source).save_pretrained(half_written)
    return Path(folder)


def run_stage(stage: Stage, journal: "Journal", number: int, total: int) -> None:
    """Run a stage to its end, copy its result to where it belongs, note its time.

    Raises:
        SystemExit: Interrupted; the message says how to go on.
    """
    begin = time.monotonic()
    try:
        if not stage.finished or stage.publish is None:
            flags = [*stage.argv, *(stage.resume if stage.begun else ())]
            journal.begin(stage)
            module, function = stage.target.split(":")
            with as_typed(["mmkit", *stage.command.split(), *flags]):
                getattr(importlib.import_module(module), function)(flags)
        if stage.publish is not None and not stage.publish[1].is_dir():
            with atomic_folder(stage.publish[1]) as half_written:
                shutil.copytree(stage.publish[0], half_written, dirs_exist_ok=True)
    except (KeyboardInterrupt, SystemExit) as stop:
        if isinstance(stop, SystemExit) and stop.code not in (INTERRUPTED, None, 0):
            raise
        journal.end(stage, time.monotonic() - begin)
        print(f"\nstopped in stage {number} of {total} ({stage.name}); this goes on with it:\n  {journal.command}", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    except Exception as error:
        error.add_note(
            f"in stage {number} of {total} of the job ({stage.name}); alone: {shlex.join(['mmkit', *stage.command.split(), *stage.argv])}"
        )
        print(f"stage {number} of {total} ({stage.name}) failed; the stages before it are kept", file=sys.stderr)
        raise
    journal.end(stage, time.monotonic() - begin)
    gc.collect()  # a finished stage's model and optimizer hang together in cycles; the next stage needs their memory


@contextmanager
def as_typed(words: list[str]) -> Iterator[None]:
    """Let a stage's manifest name the command that repeats this stage alone."""
    before, sys.argv = sys.argv, words
    try:
        yield
    finally:
        sys.argv = before


# ---- what was made with which settings --------------------------------------------------------------------------------------------------


class Journal:
    """`quickstart.json` in the folder: the settings, and per stage its command line, its recipe's digest and its seconds so far."""

    def __init__(self, out: Path, config: QuickstartConfig) -> None:
        self.out, self.path = out, out / "quickstart.json"
        self.settings: dict[str, Any] = {"scale": config.scale, "seed": config.seed}
        flags = [] if str(out) == QuickstartConfig().out else ["--out", str(out)]
        flags += [] if config.encoders == list(DEFAULT_ENCODERS) else ["--encoders", ",".join(config.encoders)]
        flags += [] if config.downstream == ["llava"] else ["--downstream", ",".join(config.downstream)]
        flags += [
            word for key, value in self.settings.items() if value != getattr(QuickstartConfig(), key) for word in (f"--{key}", str(value))
        ]
        self.command = shlex.join(["mmkit", "quickstart", *flags])
        self.stages: dict[str, dict[str, Any]] = {}

    @property
    def seconds(self) -> float:
        """Time that all stages took, interrupted parts included."""
        return sum(float(entry.get("seconds", 0)) for entry in self.stages.values())

    def check(self, stages: Sequence[Stage]) -> None:
        """Read what an earlier start noted, and refuse to mix settings.

        Raises:
            ConfigError: Settings, recipes or commands differ from those that made what is there.
        """
        if self.path.is_file():
            try:
                noted = json.loads(self.path.read_text(encoding="utf-8"))
                settings, self.stages = noted["settings"], noted["stages"]
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigError(f"{self.path} cannot be read ({error}); {self._way_out()}") from error
            if settings != self.settings:
                differ = ", ".join(
                    f"{key} {settings.get(key)} (now {value})" for key, value in self.settings.items() if settings.get(key) != value
                )
                raise ConfigError(f"{self.out} was made with other settings: {differ}. Give the old ones again, or {self._way_out()}")
        for stage in stages[1:-1]:  # the data stage compares its own settings; the report depends on nothing else
            noted_stage = self.stages.get(stage.name)
            if noted_stage is None and stage.begun:
                raise ConfigError(f"{stage.folder} is there, and no quickstart has made it; {self._way_out()}")
            if noted_stage is not None and noted_stage["fingerprint"] != self.fingerprint(stage) and stage.begun:
                what = f"the recipe {stage.recipe.name}" if stage.recipe is not None else "its command"
                raise ConfigError(f"{stage.folder}: {what} has changed since '{stage.name}' was started; {self._way_out()}")

    def begin(self, stage: Stage) -> None:
        """Note that a stage starts, before it writes anything."""
        entry = {"command": ["mmkit", *stage.command.split(), *stage.argv], "fingerprint": self.fingerprint(stage)}
        self.stages[stage.name] = {"seconds": 0.0, **self.stages.get(stage.name, {}), **entry}
        self._write()

    def end(self, stage: Stage, seconds: float) -> None:
        """Add to a stage's time."""
        if stage.name in self.stages:
            self.stages[stage.name]["seconds"] = round(self.stages[stage.name]["seconds"] + seconds, 1)
            self._write()

    def fingerprint(self, stage: Stage) -> str:
        """A digest of a stage's command line (wherever the folder lies) and of its recipe."""
        words = [word.replace(str(self.out), "OUT") for word in stage.argv]
        recipe = yaml.safe_load(stage.recipe.read_text(encoding="utf-8")) if stage.recipe is not None else None
        return hashlib.sha256(json.dumps([stage.target, words, recipe], sort_keys=True, default=str).encode()).hexdigest()[:16]

    def _write(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        atomic_write(self.path, json.dumps({"settings": self.settings, "stages": self.stages}, indent=1) + "\n")

    def _way_out(self) -> str:
        return f"take a new folder (--out {self.out}_2), or remove this one (rm -r {shlex.quote(str(self.out))})"


# ---- what people see --------------------------------------------------------------------------------------------------------------------


def set_threads(wanted: int) -> int:
    """Give torch its threads; returns how many."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = wanted or int(os.environ.get("OMP_NUM_THREADS") or 0) or cores
    torch.set_num_threads(threads)
    return threads


def quiet() -> None:
    """Silence transformers' bars over loading and saving: fractions of a second each, between the bars that matter."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()


def overview(console: Console, title: str, stages: Sequence[Stage]) -> None:
    """Print the list of stages and what of it is there already."""
    table = Table(title=title, title_justify="left")
    table.add_column("", justify="right")
    table.add_column("stage")
    table.add_column("")
    for number, stage in enumerate(stages, start=1):
        last = number == len(stages)
        state = (
            "[green]complete, kept[/green]"
            if stage.complete and not last
            else "[yellow]goes on[/yellow]"
            if stage.begun and not last
            else "to do"
        )
        table.add_row(str(number), stage.name, state)
    console.print(table)
    console.print("Ctrl-C stops at the next good moment; the same command goes on from there.")


def results(console: Console, out: Path, config: QuickstartConfig) -> None:
    """Print what came out, in percent with 95 % intervals, and where the report is."""
    for name in config.downstream:
        table = Table(title=f"{name}: percent [95 % interval]", title_justify="left")
        rows = RESULTS[name]
        for heading in ("encoder", *rows):
            table.add_column(heading, justify="left" if heading == "encoder" else "right")
        for encoder in config.encoders:
            cells = [read_metric(out / "eval" / place.format(encoder) / "summary.json", metric) for place, metric in rows.values()]
            table.add_row(encoder, *(f"{m['value']:.1f} [{m['ci95'][0]:.1f}, {m['ci95'][1]:.1f}]" for m in cells))
        console.print(table)
    model = out / config.downstream[0] / config.encoders[0]
    asked = "" if str(out) == QuickstartConfig().out and "llava" in config.downstream else f" --model {model}"
    console.print(f"report: {out / 'report.html'}\nask them yourself: mmkit demo{asked}")


def read_metric(path: Path, metric: str) -> dict[str, Any]:
    """One metric of a summary.json.

    Raises:
        NameNotFound: The summary does not have it.
    """
    summary = json.loads(path.read_text(encoding="utf-8"))
    metrics = summary["metrics"]
    metric = summary[MAIN] if metric == MAIN else metric
    if metric not in metrics:
        raise NameNotFound(f"{path} has no metric '{metric}'; it has {', '.join(metrics)}")
    found: dict[str, Any] = metrics[metric]
    return found


def clock(seconds: float) -> str:
    """Minutes and seconds, 4:07."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


if __name__ == "__main__":
    cli_entry(main)
