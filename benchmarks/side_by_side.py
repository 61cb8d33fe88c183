"""The quickstart's encoders side by side with a share of the threads each, against one after the other with all threads.

    python benchmarks/side_by_side.py                                  # both downstreams, a twentieth of their length
    python benchmarks/side_by_side.py --downstream blip2 --scale 0.1 --rounds 3

Data and encoders are made once, and each side begins with a copy of them. The sides take turns. Starting the lanes' processes counts, and
weighs more the smaller the scale. The clock is the wall's, since that is what one waits for: nothing else should run.
"""

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console

from apps.quickstart import open_journal
from apps.quickstart_plan import QuickstartConfig, plan
from apps.stages import quiet, run_all, run_stage, set_threads


def main() -> None:
    """Measure both, print medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--downstream", default="llava,blip2", help="as in mmkit quickstart")
    parser.add_argument("--encoders", default="clip,uta", help="as in mmkit quickstart")
    parser.add_argument("--scale", type=float, default=0.05, help="factor on pictures drawn and steps trained")
    parser.add_argument("--rounds", type=int, default=2)
    flags = parser.parse_args()
    threads = set_threads(0)
    if threads < 2:
        raise SystemExit("one thread: lanes would have nothing to share (OMP_NUM_THREADS?)")
    quiet()
    seconds: dict[str, list[float]] = {"one after the other": [], "side by side": []}
    with tempfile.TemporaryDirectory() as folder:
        base = settings(Path(folder) / "base", flags)
        prepared = [stage for stage in plan(base)[:-1] if not stage.lane]
        journal = open_journal(base)
        for number, stage in enumerate(prepared, start=1):
            run_stage(stage, journal, number, len(prepared))
        for turn in range(flags.rounds):
            for name, at_once in (("one after the other", 1), ("side by side", threads)):
                seconds[name].append(measure(Path(base.out), Path(folder) / f"{turn}_{at_once}", flags, at_once, threads))
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    told = "; ".join(f"{name} {medians[name]:.0f} s ({', '.join(f'{s:.0f}' for s in found)})" for name, found in seconds.items())
    ratio = medians["one after the other"] / medians["side by side"]
    print(f"{flags.encoders} in {flags.downstream}, scale {flags.scale:g}, {threads} threads: {told}; {ratio:.2f}x")


def settings(out: Path, flags: argparse.Namespace) -> QuickstartConfig:
    """The quickstart's settings for a folder."""
    return QuickstartConfig(
        out=str(out), encoders=flags.encoders.split(","), downstream=flags.downstream.split(","), scale=flags.scale
    )  # fmt: skip


def measure(base: Path, out: Path, flags: argparse.Namespace, at_once: int, threads: int) -> float:
    """Seconds of all that is done in lanes."""
    shutil.copytree(base, out)
    config = settings(out, flags)
    stages = [stage for stage in plan(config) if stage.lane]
    set_threads(0)
    begin = time.monotonic()
    run_all(Console(), stages, open_journal(config), at_once, threads)
    taken = time.monotonic() - begin
    shutil.rmtree(out)
    return taken


if __name__ == "__main__":
    main()
