"""Stages side by side: a process for each lane, since small models gain little from a second thread and much from a core of their own.

A lane's process keeps its imports from stage to stage and writes what its scripts say to OUT/logs/LANE.log; here the last line of each is
shown. Ctrl-C here is Ctrl-C in all of them; a process whose parent is gone saves and leaves.
"""

import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for_end
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from apps.quickstart_plan import Stage
from apps.stages import Journal, Stopped, clock, perform, quiet, run_stage, set_threads, title
from mmkit.errors import TrainingError
from mmkit.signals import stop_signals

Numbered = tuple[int, Stage]
LAST_WORDS = 12  # lines of a log that are shown when its process has died
TAIL = 4096  # bytes of a log that hold its last line, whatever the bar's width


def side_by_side(console: Console, stages: Sequence[Numbered], total: int, journal: Journal, at_once: int, threads: int) -> None:
    """Run lanes side by side, each lane's stages in their order.

    Args:
        console: Where beginnings, ends and the last line of each lane are shown.
        stages: With their numbers in the whole job.
        total: Stages of the whole job.
        journal: Notes them.
        at_once: Lanes that run at the same time.
        threads: Of torch, shared out among those.

    Raises:
        Stopped: By Ctrl-C; every lane has saved.
        TrainingError: A lane's process died.
    """
    names = list(dict.fromkeys(stage.lane for _, stage in stages))
    at_once = min(at_once, len(names))
    share, logs = max(1, threads // at_once), journal.out / "logs"
    console.rule(f"[bold]side by side[/bold] · {', '.join(names)} · {at_once} at once, threads each: {share}", align="left")
    console.print(f"what they say in full: {logs}", highlight=False)
    lanes = [Lane(name, [entry for entry in stages if entry[1].lane == name], logs / f"{name}.log", share) for name in names]
    stop = threading.Event()

    def ask(number: int) -> None:
        stop.set()
        console.print("stopping: each lane finishes its step and saves", highlight=False)
        for lane in lanes:
            lane.signal(number)

    with stop_signals(ask), ThreadPoolExecutor(at_once) as pool:
        runs = [pool.submit(lane.run, console, total, journal, stop) for lane in lanes]
        try:
            watch(console, lanes, runs, total)
        except KeyboardInterrupt:  # the second one: nobody waits for a step's end any more
            for lane in lanes:
                lane.signal(signal.SIGINT)
            raise
        if not stop.is_set() and not all(run.done() for run in runs):  # a lane has failed: the others save and leave
            ask(signal.SIGINT)
    failed = [error for run in runs if (error := run.exception()) is not None]
    if others := [error for error in failed if not isinstance(error, Stopped)]:
        raise others[0]
    left = [entry for entry in stages if not entry[1].complete]
    if failed or (stop.is_set() and left):
        where = [where for error in failed if isinstance(error, Stopped) for where in error.stages]
        raise Stopped(*(where or [title(*left[0], total)]))


def watch(console: Console, lanes: Sequence["Lane"], runs: Sequence["Future[None]"], total: int) -> None:
    """Wait for all lanes, or for the first that fails; on a terminal each lane's last line is shown meanwhile."""
    if not console.is_terminal:
        wait(runs, return_when=FIRST_EXCEPTION)
        return
    with Live(console=console, refresh_per_second=2, transient=True) as live:
        while wait(runs, timeout=0.5, return_when=FIRST_EXCEPTION).not_done and not any(run.done() and run.exception() for run in runs):
            live.update(Group(*(lane.view(total) for lane in lanes if lane.present is not None)))


class Lane:
    """A chain of stages in one process.

    Args:
        name: What is shown.
        stages: With their numbers, in order.
        log: What its process says.
        threads: Of torch.
    """

    def __init__(self, name: str, stages: Sequence[Numbered], log: Path, threads: int) -> None:
        self.name, self.stages, self.log, self.threads = name, stages, log, threads
        self.present: Numbered | None = None
        self.process = 0
        self._begin = 0.0

    def run(self, console: Console, total: int, journal: Journal, stop: threading.Event) -> None:
        """Run all stages; in a thread of its own.

        Raises:
            Stopped: By Ctrl-C.
            TrainingError: The process died.
        """
        if stop.is_set():  # before this lane's turn came
            return
        self.log.parent.mkdir(parents=True, exist_ok=True)
        where = ""
        context = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads in whatever state they are
        with ProcessPoolExecutor(1, context, initializer=enter, initargs=(str(self.log), self.threads)) as pool:

            def there(target: str, command: str, flags: Sequence[str]) -> None:
                pool.submit(perform_here, target, command, list(flags)).result()

            try:
                self.process = pool.submit(os.getpid).result()
                for number, stage in self.stages:
                    where = title(number, stage, total)
                    if stop.is_set():
                        raise Stopped(where)
                    self.present, self._begin = (number, stage), time.monotonic()
                    console.print(f"[{number} of {total}] {stage.name}: begins", markup=False, highlight=False)
                    run_stage(stage, journal, number, total, perform=there)
                    took = clock(time.monotonic() - self._begin)
                    console.print(f"[{number} of {total}] {stage.name}: done in {took}", markup=False, highlight=False)
            except BrokenProcessPool as error:
                if stop.is_set():
                    raise Stopped(where) from None
                said = "\n  ".join(last_lines(self.log, LAST_WORDS))
                raise TrainingError(
                    f"the process of lane '{self.name}' died without a word (out of memory? --side_by_side 1 runs one lane at a time); "
                    f"{self.log} ends with:\n  {said}"
                ) from error
            finally:
                self.present = None

    def signal(self, number: int) -> None:
        """Send a signal to the process, if it is at a stage."""
        if self.present is not None:
            os.kill(self.process, number)

    def view(self, total: int) -> Text:
        """What it is at, and the last line of its log."""
        if (present := self.present) is None:
            return Text("")
        number, stage = present
        said = (last_lines(self.log, 1) or [""])[0]
        line = f"[{number} of {total}] {stage.name} · {clock(time.monotonic() - self._begin)} · {said}"
        return Text(line, no_wrap=True, overflow="ellipsis")


def last_lines(log: Path, count: int) -> list[str]:
    """Give the last lines of a log that are not empty; a bar drawn anew is a line."""
    if not log.is_file():
        return []
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - TAIL * count))
        lines = file.read().decode("utf-8", errors="replace").replace("\r", "\n").splitlines()
    return [line.strip() for line in lines if line.strip()][-count:]


# ---- in a lane's process ----------------------------------------------------------------------------------------------------------------


def enter(log: str, threads: int) -> None:
    """Begin a lane's process: a session of its own, its log, its share of the threads, and an eye on its parent."""
    os.setsid()  # the terminal's Ctrl-C reaches the parent alone, which passes it on once
    with open(log, "ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.environ["OMP_NUM_THREADS"] = str(threads)
    set_threads(threads)
    quiet()
    threading.Thread(target=leave_with_parent, daemon=True).start()


def leave_with_parent() -> None:
    """Wait for the parent's end, however it came; then ask this process to save and leave."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait_for_end([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)


def perform_here(target: str, command: str, flags: Sequence[str]) -> None:
    """Call a stage's function; its errors go into the log, too."""
    print(f"\n=== mmkit {command}", flush=True)
    try:
        perform(target, command, flags)
    except Exception:
        traceback.print_exc()
        raise
