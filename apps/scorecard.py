"""`mmkit scorecard ENCODER...`: the same measures for every encoder, on the embedded data, in one table and one report.

    mmkit scorecard mini-clip runs/uta/encoder runs/visft/encoder --out runs/scorecard
    mmkit scorecard openclip:ViT-B-16/FILE timm:vit_base_patch16_dinov3.lvd1689m --zeroshot false --llm smollm2 --downstream llava,blip2

Zero-shot naming (encoders with a text tower), an OCR probe, an object probe, LLaVA with both stages and its VQA, BLIP-2 on request: each beside
its control. The report shows the questions on which the encoders disagree most. Stopped and started again, it goes on. What BLIP-2's trainings
keep of pictures, OUT/work/blip2_features, may be deleted afterwards: 3.6 GB of an encoder like ViT-B/16.
"""

import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from apps.quickstart_plan import (
    DOWNSTREAM_STAGES,
    DOWNSTREAMS,
    SCENE_DRAWINGS,
    SIDE_BY_SIDE,
    QuickstartConfig,
    Stage,
    in_lanes,
    zeroshot_stage,
)
from apps.stages import Journal, lanes_at_once, overview, quiet, run_all, set_threads
from apps.visft_plan import probe_stages
from mmkit.checkpoint import atomic_folder
from mmkit.config import cli_entry, load_config
from mmkit.errors import ConfigError, find
from mmkit.report_compare import results
from mmkit.report_data import BLIP2_SUFFIX, read_runs

LLMS = {"mini": "mini-llm, all of it trained", "smollm2": "SmolLM2-135M with LoRA; hours on a CPU"}


@dataclass
class ScorecardConfig:
    """Settings of `mmkit scorecard`."""

    encoders: list[str] = field(
        default_factory=list, metadata={"help": "folders, or names of `mmkit list encoders`; also without the flag"}
    )
    out: str = field(default="runs/scorecard", metadata={"help": "folder for everything; an unfinished one is gone on with"})
    downstream: list[str] = field(default_factory=lambda: ["llava"], metadata={"help": "llava, blip2, with commas; none: probes alone"})
    llm: str = field(default="mini", metadata={"help": f"language model of LLaVA and BLIP-2: {', '.join(LLMS)}"})
    zeroshot: bool = field(default=True, metadata={"help": "name drawings by text; encoders without a text tower cannot"})
    probes: bool = field(default=True, metadata={"help": "words (OCR) and objects, read off the frozen encoder"})
    scale: float = field(default=1.0, metadata={"help": "factor on pictures drawn and steps trained"})
    seed: int = field(default=0, metadata={"help": "of data and trainings"})
    threads: int = field(default=0, metadata={"help": "of torch; 0 is OMP_NUM_THREADS where that is set, else every core"})
    side_by_side: int = field(default=0, metadata={"help": SIDE_BY_SIDE})

    def validate(self) -> None:
        """Refuse names that are none, and encoders that could not be told apart."""
        find("language model of a scorecard", LLMS, self.llm)
        for name in self.downstream:
            find("downstream", {**DOWNSTREAMS, "none": ""}, name)
        if not self.scale > 0:
            raise ConfigError(f"--scale is {self.scale}; above 0 is right: 1 for the full job, 0.02 for a trial of minutes")
        names = [short_name(source) for source in self.encoders]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ConfigError(f"two encoders would both be called '{twice[0]}': rename a folder, or leave one out")


def short_name(source: str) -> str:
    """What an encoder is called in the table: its run's or its own name."""
    path = Path(source)
    if path.is_dir():
        resolved = path.resolve()
        source = resolved.parent.name if resolved.name in ("encoder", "model") else resolved.name
    return re.sub(r"[^\w.-]+", "-", source).strip("-")


def take_encoder(argv: Sequence[str]) -> Path:
    """Copy an encoder folder, or write an encoder of the catalog as one; `argv` is its source and the folder."""
    from encoders.catalog import load_encoder

    source, folder = argv
    with atomic_folder(Path(folder)) as half_written:
        if Path(source).is_dir():
            load_encoder(source)  # what does not load is said here, not an hour later
            shutil.copytree(source, half_written, dirs_exist_ok=True)
        else:
            load_encoder(source).save_pretrained(half_written)
    return Path(folder)


def plan(config: ScorecardConfig) -> list[Stage]:
    """All stages in order; nothing is run or written."""
    out = Path(config.out)
    data, size = out / "data", QuickstartConfig(out=config.out, scale=config.scale, seed=config.seed)
    drawn = (
        "--out",
        str(data),
        "--seed",
        str(config.seed),
        "--scale",
        str(config.scale),
        "--scene_drawings",
        str(SCENE_DRAWINGS),
        "--resume",
    )
    stages = [Stage("draw the embedded data", "data mini", "mmkit.minidata.build:main", drawn, data, data / "manifest.json")]
    names = [short_name(source) for source in config.encoders]
    for name, source in zip(names, config.encoders, strict=True):
        folder = out / "encoders" / name
        stages.append(
            Stage(f"encoder: {name}", "scorecard", "apps.scorecard:take_encoder", (source, str(folder)), folder, folder / "config.json")
        )
    if config.zeroshot:
        stages += in_lanes({name: [zeroshot_stage(name, out, data)] for name in names})
    if config.probes:
        places = {name: (out / "encoders" / name, out / "eval" / name) for name in names}
        stages += in_lanes({name: probe_stages(name, *found, data, config.seed, config.scale) for name, found in places.items()})
    for kind, stages_of in DOWNSTREAM_STAGES.items():
        if kind in config.downstream:
            stages += in_lanes({name: stages_of(name, out, size, config.llm) for name in names})
    title = ("--title", "Scorecard: " + ", ".join(names))
    return [
        *stages,
        Stage("report", "report", "mmkit.report:main", (str(out), "--out", str(out), *title), out / "report.html", out / "report.html"),
    ]


def open_journal(config: ScorecardConfig) -> Journal:
    """`scorecard.json` in the folder."""
    defaults = ScorecardConfig()
    settings = {"scale": config.scale, "seed": config.seed, "llm": config.llm}
    values = {name: getattr(config, name) for name in ("out", "downstream", "llm", "zeroshot", "probes", "scale", "seed")}
    said = {name: ",".join(value) if isinstance(value, list) else str(value) for name, value in values.items()}
    flags = [word for name, value in said.items() if values[name] != getattr(defaults, name) for word in (f"--{name}", value)]
    return Journal(Path(config.out) / "scorecard.json", settings, shlex.join(["mmkit", "scorecard", *config.encoders, *flags]))


def main(argv: Sequence[str] | None = None) -> Path:
    """Measure all encoders, and give the folder.

    Args:
        argv: Encoders, then flags; see `ScorecardConfig`.

    Raises:
        ConfigError: No encoder is named, or the folder was made with other settings.
        SystemExit: Interrupted (code 130); what is done is kept.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    first = next((place for place, word in enumerate(words) if word.startswith("-")), len(words))
    named = ["--encoders", ",".join(words[:first])] if first else []
    config = load_config(ScorecardConfig, [*named, *words[first:]])
    if not config.encoders:
        raise ConfigError("which encoders? mmkit scorecard mini-clip runs/uta/encoder; `mmkit list encoders` has names")
    stages, journal = plan(config), open_journal(config)
    journal.check(stages)
    threads = set_threads(config.threads)
    quiet()
    console = Console()
    overview(console, f"mmkit scorecard in {config.out} · scale {config.scale:g} · {threads} threads", stages)
    run_all(console, stages, journal, lanes_at_once(config.side_by_side, threads), threads)
    show(console, Path(config.out))
    return Path(config.out)


def show(console: Console, out: Path) -> None:
    """Print one table: a row for each measure, a column for each encoder."""
    rows = results(read_runs([out]))
    encoders = sorted({row["encoder"].removesuffix(BLIP2_SUFFIX) for row in rows})
    table = Table(title="percent [95 % interval]", title_justify="left")
    for heading in ("measure", *encoders):
        table.add_column(heading, justify="left" if heading == "measure" else "right")
    cells: dict[str, dict[str, str]] = {}
    for row in rows:
        name = row["encoder"].removesuffix(BLIP2_SUFFIX)
        low, high = row["ci95"]
        measure = f"{row['benchmark']} {row['metric']}" + (", BLIP-2" if row["encoder"].endswith(BLIP2_SUFFIX) else "")
        cells.setdefault(measure, {})[name] = f"{row['value']:.1f} [{low:.1f}, {high:.1f}]"
    for measure, found in cells.items():
        table.add_row(measure, *(found.get(name, "") for name in encoders))
    console.print(table)
    console.print(f"report: {out / 'report.html'}\nwhat stands: mmkit compare {out}")


if __name__ == "__main__":
    cli_entry(main)
