"""Runs the stages of a long job one after the other or in lanes, and keeps a journal of what was made with which settings.

Each stage is a script's own `main([...])`. It is complete when the file that its script writes last is there; a training that was interrupted
resumes from its checkpoint, an evaluation by question id. Stages of different lanes need nothing of each other: see `apps.lanes`.
"""

import gc
import hashlib
import importlib
import json
import os
import shlex
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from apps.quickstart_plan import Stage
from mmkit.checkpoint import atomic_folder, atomic_write
from mmkit.config import read_recipe
from mmkit.errors import ConfigError

INTERRUPTED = 130
Perform = Callable[[str, str, Sequence[str]], None]


class Stopped(SystemExit):
    """Ctrl-C in one stage or, with lanes, in several; what is done is kept.

    Args:
        stages: Where, for people: "stage 3 of 9 (zero-shot: clip)".
    """

    def __init__(self, *stages: str) -> None:
        super().__init__(INTERRUPTED)
        self.stages = stages


def run_all(console: Console, stages: Sequence[Stage], journal: "Journal", at_once: int = 1, threads: int = 1) -> None:
    """Run the stages that are not complete, and the last one always: a report is cheap, and belongs to whatever has been made since.

    Args:
        console: Where to say so.
        stages: All of them, in order.
        journal: Notes them.
        at_once: Lanes side by side; 1 runs everything here.
        threads: Of torch, for all lanes together.

    Raises:
        Stopped: By Ctrl-C; how to go on is printed.
    """
    from apps.lanes import side_by_side

    start, total = time.monotonic(), len(stages)
    todo = [(number, stage) for number, stage in enumerate(stages, start=1) if not stage.complete or number == total]
    try:
        for in_lanes, group in groupby(todo, key=lambda entry: bool(entry[1].lane)):
            found = list(group)
            if in_lanes and at_once > 1 and len({stage.lane for _, stage in found}) > 1:
                side_by_side(console, found, total, journal, at_once, threads)
                continue
            for number, stage in found:
                elapsed = clock(time.monotonic() - start)
                console.rule(f"[bold]{number} of {total}[/bold] · {stage.name} · {elapsed} so far", align="left")
                run_stage(stage, journal, number, total)
    except Stopped as stop:
        where = " and ".join(stop.stages)
        print(f"\nstopped in {where}; this goes on with it:\n  {journal.command}", file=sys.stderr)
        raise
    console.rule(f"[bold]done[/bold] · {clock(time.monotonic() - start)} this time, {clock(journal.seconds)} in all", align="left")


def title(number: int, stage: Stage, total: int) -> str:
    """A stage, for messages."""
    return f"stage {number} of {total} ({stage.name})"


def perform(target: str, command: str, flags: Sequence[str]) -> None:
    """Call "module:function" with flags, under the command line that repeats it alone: a stage's manifest names that."""
    module, function = target.split(":")
    with as_typed(["mmkit", *command.split(), *flags]):
        getattr(importlib.import_module(module), function)(list(flags))
    gc.collect()  # a finished stage's model and optimizer hang together in cycles; the next stage needs their memory


def run_stage(stage: Stage, journal: "Journal", number: int, total: int, perform: Perform = perform) -> None:
    """Run a stage to its end, copy its result to where it belongs, note its time.

    Raises:
        Stopped: By Ctrl-C.
    """
    begin, where = time.monotonic(), title(number, stage, total)
    try:
        if not stage.finished or stage.publish is None:
            flags = [*stage.argv, *(stage.resume if stage.begun else ())]
            journal.begin(stage)
            perform(stage.target, stage.command, flags)
        if stage.publish is not None and not stage.publish[1].is_dir():
            with atomic_folder(stage.publish[1]) as half_written:
                shutil.copytree(stage.publish[0], half_written, dirs_exist_ok=True)
    except (KeyboardInterrupt, SystemExit) as stop:
        if isinstance(stop, SystemExit) and stop.code not in (INTERRUPTED, None, 0):
            raise
        journal.end(stage, time.monotonic() - begin)
        raise Stopped(where) from None
    except Exception as error:
        error.add_note(f"in {where} of the job; alone: {shlex.join(['mmkit', *stage.command.split(), *stage.argv])}")
        print(f"{where} failed; the stages before it are kept", file=sys.stderr)
        raise
    journal.end(stage, time.monotonic() - begin)


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
    """A JSON file in the job's folder: the settings, the seconds so far, and per stage its command line, its recipe's digest and its seconds.

    Args:
        path: The file.
        settings: What must be the same when the job goes on.
        command: What starts and continues the job.
    """

    def __init__(self, path: Path, settings: dict[str, Any], command: str) -> None:
        self.out, self.path, self.settings, self.command = path.parent, path, settings, command
        self.stages: dict[str, dict[str, Any]] = {}
        self._before, self._start, self._lock = 0.0, time.monotonic(), threading.Lock()

    @property
    def seconds(self) -> float:
        """Time on the wall that the job took, earlier starts included."""
        return self._before + time.monotonic() - self._start

    def check(self, stages: Sequence[Stage]) -> None:
        """Read what an earlier start noted, and refuse to mix settings.

        Raises:
            ConfigError: Settings, recipes or commands differ from those that made what is there.
        """
        if self.path.is_file():
            try:
                noted = json.loads(self.path.read_text(encoding="utf-8"))
                settings, self.stages = noted["settings"], noted["stages"]
                self._before = float(noted.get("seconds", 0.0))
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
                raise ConfigError(f"{stage.folder} is there, and no {self.path.stem} has made it; {self._way_out()}")
            if noted_stage is not None and noted_stage["fingerprint"] != self.fingerprint(stage) and stage.begun:
                what = f"the recipe {stage.recipe.name}" if stage.recipe is not None else "its command"
                raise ConfigError(f"{stage.folder}: {what} has changed since '{stage.name}' was started; {self._way_out()}")

    def begin(self, stage: Stage) -> None:
        """Note that a stage starts, before it writes anything."""
        entry = {"command": ["mmkit", *stage.command.split(), *stage.argv], "fingerprint": self.fingerprint(stage)}
        with self._lock:
            self.stages[stage.name] = {"seconds": 0.0, **self.stages.get(stage.name, {}), **entry}
            self._write()

    def end(self, stage: Stage, seconds: float) -> None:
        """Add to a stage's time."""
        with self._lock:
            if stage.name in self.stages:
                self.stages[stage.name]["seconds"] = round(self.stages[stage.name]["seconds"] + seconds, 1)
                self._write()

    def fingerprint(self, stage: Stage) -> str:
        """A digest of a stage's command line (wherever the folder lies) and of its recipe."""
        words = [word.replace(str(self.out), "OUT") for word in stage.argv]
        recipe = [settings for _, settings in read_recipe(stage.recipe)] if stage.recipe is not None else None
        return hashlib.sha256(json.dumps([stage.target, words, recipe], sort_keys=True, default=str).encode()).hexdigest()[:16]

    def _write(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        noted = {"settings": self.settings, "seconds": round(self.seconds, 1), "stages": self.stages}
        atomic_write(self.path, json.dumps(noted, indent=1) + "\n")

    def _way_out(self) -> str:
        return f"take a new folder (--out {self.out}_2), or remove this one (rm -r {shlex.quote(str(self.out))})"


# ---- what people see, and what the stages may use ---------------------------------------------------------------------------------------


def set_threads(wanted: int) -> int:
    """Give torch its threads; returns how many."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = wanted or int(os.environ.get("OMP_NUM_THREADS") or 0) or cores
    torch.set_num_threads(threads)
    return threads


def lanes_at_once(wanted: int, threads: int) -> int:
    """How many lanes run side by side: as many as asked for, else a thread for each; one where an accelerator's memory is shared."""
    import torch

    return wanted or (1 if torch.accelerator.is_available() else threads)


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


def clock(seconds: float) -> str:
    """Minutes and seconds, 4:07."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
