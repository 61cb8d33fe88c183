"""The main job on the embedded data, from nothing to a report; stopped at any moment and started again, it goes on where it was.

    mmkit quickstart                        about twenty minutes on two cores, all of it in runs/quickstart
    mmkit quickstart --encoders clip        one encoder only; the other can follow later
    mmkit quickstart --encoders clip,uta,visft
    mmkit quickstart --downstream llava,blip2

Each stage is a script's own `main([...])`, with a recipe everybody can read and run alone. A stage is complete when the file that its
script writes last is there; a training that was interrupted resumes from its checkpoint, an evaluation by question id.
"""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from apps.quickstart_plan import DEFAULT_ENCODERS, QuickstartConfig, plan
from apps.stages import Journal, lanes_at_once, overview, quiet, run_all, set_threads
from mmkit.checkpoint import atomic_folder
from mmkit.config import cli_entry, load_config
from mmkit.errors import NameNotFound

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
    journal = open_journal(config)
    journal.check(stages)
    threads = set_threads(config.threads)
    quiet()
    console = Console()
    overview(console, f"mmkit quickstart in {config.out} · scale {config.scale:g} · {threads} threads", stages)
    run_all(console, stages, journal, lanes_at_once(config.side_by_side, threads), threads)
    results(console, Path(config.out), config)
    return Path(config.out)


def open_journal(config: QuickstartConfig) -> Journal:
    """`quickstart.json` in the folder."""
    defaults = QuickstartConfig()
    flags = [] if config.out == defaults.out else ["--out", config.out]
    flags += [] if config.encoders == list(DEFAULT_ENCODERS) else ["--encoders", ",".join(config.encoders)]
    flags += [] if config.downstream == ["llava"] else ["--downstream", ",".join(config.downstream)]
    settings: dict[str, Any] = {"scale": config.scale, "seed": config.seed}
    flags += [word for key, value in settings.items() if value != getattr(defaults, key) for word in (f"--{key}", str(value))]
    return Journal(Path(config.out) / "quickstart.json", settings, shlex.join(["mmkit", "quickstart", *flags]))


def export_encoder(argv: Sequence[str]) -> Path:
    """Write an encoder of the catalog as a folder; `argv` is its source and the folder."""
    from encoders.catalog import load_encoder

    source, folder = argv
    with atomic_folder(Path(folder)) as half_written:
        load_encoder(source).save_pretrained(half_written)
    return Path(folder)


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


if __name__ == "__main__":
    cli_entry(main)
