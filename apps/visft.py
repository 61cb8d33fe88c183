"""`mmkit experiment visft`: does a ViSFT on the embedded data make an encoder better, by its own losses and out of its domain?

    mmkit experiment visft                          all of it in runs/visft; stopped and started again, it goes on
    mmkit experiment visft --scale 0.02 --seeds 0,1 --out /tmp/try

Stage 1 for three heads, stage 2 with true and with permuted annotations over seeds, then zero-shot, an OCR probe and an object probe before
and after, each beside the permuted control: a gain that the control shows too is no gain. The report holds the loss curves of both arms.
"""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from apps.stages import Journal, lanes_at_once, overview, quiet, run_all, set_threads
from apps.visft_plan import VisftExperimentConfig, plan
from mmkit.config import cli_entry, load_config


def open_journal(config: VisftExperimentConfig) -> Journal:
    """`experiment.json` in the folder."""
    defaults = VisftExperimentConfig()
    settings = {"scale": config.scale, "seeds": config.seeds, "steps": config.steps, "data": config.data}
    said = {name: spoken(getattr(config, name)) for name in ("out", "seeds", "scale", "steps", "data")}
    flags = [word for name, value in said.items() if value != spoken(getattr(defaults, name)) for word in (f"--{name}", value)]
    return Journal(Path(config.out) / "experiment.json", settings, shlex.join(["mmkit", "experiment", "visft", *flags]))


def spoken(value: Any) -> str:
    """A setting as one types it."""
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def main(argv: Sequence[str] | None = None) -> Path:
    """Run all stages that are not complete.

    Args:
        argv: Flags, see `VisftExperimentConfig`.

    Returns:
        The folder.

    Raises:
        ConfigError: The folder was made with other settings.
        SystemExit: Interrupted (code 130); what is done is kept.
    """
    config = load_config(VisftExperimentConfig, argv)
    stages = plan(config)
    journal = open_journal(config)
    journal.check(stages)
    threads = set_threads(config.threads)
    quiet()
    console = Console()
    overview(console, f"mmkit experiment visft in {config.out} · scale {config.scale:g} · {threads} threads", stages)
    run_all(console, stages, journal, lanes_at_once(config.side_by_side, threads), threads)
    out = Path(config.out)
    for row in json.loads((out / "results" / "findings.json").read_text(encoding="utf-8")):
        console.print(f"[bold]{row['headline']}[/bold]: {row['evidence']}", highlight=False)
    console.print(f"report: {out / 'report.html'}")
    return out


if __name__ == "__main__":
    cli_entry(main)
