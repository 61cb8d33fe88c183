"""The main job on the embedded data, from nothing to a report; stopped at any moment and started again, it goes on where it was.

    mmkit quickstart                        about twenty minutes on two cores, all of it in runs/quickstart
    mmkit quickstart --encoders clip        one encoder only; the other can follow later

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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from mmkit.checkpoint import atomic_folder, atomic_write
from mmkit.config import cli_entry, find_recipe, load_config
from mmkit.errors import ConfigError, NameNotFound, find

ROOT = Path(__file__).resolve().parent.parent
RECIPES = {"encoders": ROOT / "encoders" / "recipes", "llm_stage": ROOT / "llm_stage" / "recipes"}
ENCODERS = {"clip": "the mini CLIP teacher, from the package", "uta": "a student of it, trained here without text (UTA)"}
BENCHMARKS = {"mini_zeroshot": "top1", "mini_vqa": "vqa_accuracy", "mini_vqa_shuffled": "vqa_accuracy"}
LEAST_STEPS = 4  # however small the scale: enough for a checkpoint in the middle
INTERRUPTED = 130


@dataclass
class QuickstartConfig:
    """Settings of `mmkit quickstart`."""

    out: str = field(default="runs/quickstart", metadata={"help": "folder for everything; an unfinished one is gone on with"})
    encoders: list[str] = field(default_factory=lambda: list(ENCODERS), metadata={"help": "which to compare: clip, uta or both"})
    scale: float = field(
        default=1.0, metadata={"help": "factor on pictures drawn and steps trained; 1 is about twenty minutes on two cores"}
    )
    seed: int = field(default=0, metadata={"help": "of data and trainings"})
    threads: int = field(default=0, metadata={"help": "of torch; 0 is OMP_NUM_THREADS where that is set, else every core"})

    def validate(self) -> None:
        """Check the names of the encoders and the scale.

        Raises:
            ConfigError: The scale is not above 0, no encoder is named, or one is named twice.
            NameNotFound: There is no such encoder in the quickstart.
        """
        for name in self.encoders:
            find("quickstart encoder", ENCODERS, name)
        if not self.encoders or len(set(self.encoders)) != len(self.encoders):
            raise ConfigError(f"--encoders is '{','.join(self.encoders)}'; right are clip, uta or clip,uta")
        if not self.scale > 0:
            raise ConfigError(f"--scale is {self.scale}; above 0 is right: 1 for the full job, 0.02 for a trial of minutes")


@dataclass(frozen=True)
class Stage:
    """One step of the job: a script, its command line, and how to see that it is complete.

    Attributes:
        name: For people.
        command: As typed after `mmkit`, "train llava".
        target: "module:function", called with `argv`.
        argv: Its command line.
        folder: Where it works.
        done: The file that it writes last.
        resume: What to add to `argv` where `folder` is there and the script has not finished.
        recipe: The recipe that it reads; None for none.
        publish: A folder of its result, and where a copy of that belongs; None for none.
    """

    name: str
    command: str
    target: str
    argv: tuple[str, ...]
    folder: Path
    done: Path
    resume: tuple[str, ...] = ()
    recipe: Path | None = None
    publish: tuple[Path, Path] | None = None

    @property
    def finished(self) -> bool:
        """The script has come to its end. A training writes its manifest from the start, and says in it how far it is."""
        if not self.done.is_file():
            return False
        return not self.command.startswith("train ") or json.loads(self.done.read_text(encoding="utf-8")).get("state") == "finished"

    @property
    def complete(self) -> bool:
        """The script has finished, and its result is where it belongs."""
        return self.finished and (self.publish is None or self.publish[1].is_dir())

    @property
    def begun(self) -> bool:
        """There is something of it on the disk."""
        return self.folder.exists()


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
    overview(console, config, stages, threads)
    start = time.monotonic()
    for number, stage in enumerate(stages, start=1):
        last = number == len(stages)
        if stage.complete and not last:  # the report is cheap, and belongs to whatever has been made since
            continue
        elapsed = clock(time.monotonic() - start)
        console.rule(f"[bold]{number} of {len(stages)}[/bold] · {stage.name} · {elapsed} so far", align="left")
        run_stage(stage, journal, number, len(stages))
    console.rule(f"[bold]done[/bold] · {clock(time.monotonic() - start)} this time, {clock(journal.seconds)} in all", align="left")
    results(console, Path(config.out), config.encoders)
    return Path(config.out)


# ---- the stages -----------------------------------------------------------------------------------------------------------------------


def plan(config: QuickstartConfig) -> list[Stage]:
    """All stages of the job, in order; nothing is run or written."""
    out = Path(config.out)
    data = out / "data"
    size = ("--seed", str(config.seed), "--scale", str(config.scale))
    stages = [
        Stage(
            "draw the embedded data",
            "data mini",
            "mmkit.minidata.build:main",
            ("--out", str(data), *size, "--resume"),
            data,
            data / "manifest.json",
        )
    ]
    for name in config.encoders:
        stages.append(_encoder_stage(name, out, config))
    for name in config.encoders:
        folder = out / "eval" / name / "mini_zeroshot"
        flags = (
            "--encoder",
            str(out / "encoders" / name),
            "--images",
            str(data / "classification" / "test"),
            "--out",
            str(folder),
            "--benchmark",
            "mini_zeroshot",
        )
        done = folder / "summary.json"
        stages.append(Stage(f"zero-shot: {name}", "eval zeroshot", "encoders.eval_zeroshot:main", flags, folder, done, ("--resume",)))
    for name in config.encoders:
        stages += _llava_stages(name, out, config)
        stages += [_vqa_stage(name, out, shuffled) for shuffled in (False, True)]
    stages.append(Stage("report", "report", "mmkit.report:main", (str(out), "--out", str(out)), out / "report.html", out / "report.html"))
    return stages


def _encoder_stage(name: str, out: Path, config: QuickstartConfig) -> Stage:
    """Get one encoder folder: `clip` from the package, `uta` trained."""
    folder = out / "encoders" / name
    if name == "clip":
        return Stage(
            "encoder: clip (the teacher)",
            "quickstart",
            "apps.quickstart:export_encoder",
            ("mini-clip", str(folder)),
            folder,
            folder / "config.json",
        )
    work = out / "work" / "uta"
    seen = (out / "data" / "images" / "train", out / "data" / "classification" / "train")
    roots = [str(out / "data" / part / "train") for part in ("images", "classification")]
    own = ("--data.root", json.dumps(roots))
    return _training(
        "encoder: uta (a student of clip)", "train uta", "encoders", "mini_uta_quick", own, work, config, (work / "encoder", folder)
    )


def _llava_stages(name: str, out: Path, config: QuickstartConfig) -> list[Stage]:
    """Both stages of LLaVA behind one encoder."""
    first, second = (out / "work" / f"llava_{name}_stage{stage}" for stage in (1, 2))
    texts, images = out / "data" / "llava", ("--data.images", str(out / "data" / "images"))
    own = ("--encoder", str(out / "encoders" / name), "--data.json", str(texts / "pretrain.json"), *images)
    stages = [_training(f"LLaVA stage 1: {name}", "train llava", "llm_stage", "mini_stage1", own, first, config)]
    own = ("--pretrained", str(first / "model"), "--data.json", str(texts / "instruct.json"), *images)
    publish = (second / "model", out / "llava" / name)
    return [*stages, _training(f"LLaVA stage 2: {name}", "train llava", "llm_stage", "mini_stage2", own, second, config, publish)]


def _vqa_stage(name: str, out: Path, shuffled: bool) -> Stage:
    """Questions about the test scenes, or their control: each before another question's picture."""
    vqa, folder = out / "data" / "vqa", out / "eval" / name / ("mini_vqa_shuffled" if shuffled else "mini_vqa")
    flags = [
        "--model",
        str(out / "llava" / name),
        "--questions",
        str(vqa / "questions_test.json"),
        "--annotations",
        str(vqa / "annotations_test.json"),
    ]
    flags += ["--train_annotations", str(vqa / "annotations_train.json"), "--images", str(out / "data" / "images"), "--batch_size", "32"]
    flags += ["--out", str(folder), *(["--shuffle_images"] if shuffled else [])]
    title = f"questions, images shuffled (the control): {name}" if shuffled else f"questions: {name}"
    return Stage(title, "eval vqa", "llm_stage.eval_vqa:main", tuple(flags), folder, folder / "summary.json")


def _training(
    name: str,
    command: str,
    package: str,
    recipe: str,
    own: Sequence[str],
    work: Path,
    config: QuickstartConfig,
    publish: tuple[Path, Path] | None = None,
) -> Stage:
    """A stage that trains by a recipe of a package, with a share of the recipe's steps."""
    path = find_recipe(recipe, RECIPES[package])
    flags = ["--recipe", recipe, *own, "--run.output_dir", str(work), "--run.seed", str(config.seed)]
    if config.scale != 1:
        steps = max(LEAST_STEPS, round(recipe_steps(path) * config.scale))
        flags += ["--run.steps", str(steps), "--run.save_every", str(max(2, steps // 4))]
    target = f"{package}.train_{command.split()[1]}:main"
    return Stage(name, command, target, tuple(flags), work, work / "manifest.json", ("--run.resume",), path, publish)


def recipe_steps(path: Path) -> int:
    """The number of steps in a recipe.

    Raises:
        ConfigError: The recipe does not say.
    """
    steps = (yaml.safe_load(path.read_text(encoding="utf-8")).get("run") or {}).get("steps")
    if not isinstance(steps, int) or steps < 1:
        raise ConfigError(f"{path.name}: run.steps is {steps!r}; the quickstart scales it, so it has to be a number of steps")
    return steps


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
            f"in stage {number} of {total} of the quickstart ({stage.name}); alone: {shlex.join(['mmkit', *stage.command.split(), *stage.argv])}"
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
        self.settings = {"scale": config.scale, "seed": config.seed}
        flags = [] if str(out) == QuickstartConfig().out else ["--out", str(out)]
        flags += [] if config.encoders == list(ENCODERS) else ["--encoders", ",".join(config.encoders)]
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


def overview(console: Console, config: QuickstartConfig, stages: Sequence[Stage], threads: int) -> None:
    """Print the list of stages and what of it is there already."""
    table = Table(title=f"mmkit quickstart in {config.out} · scale {config.scale:g} · {threads} threads", title_justify="left")
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


def results(console: Console, out: Path, encoders: Sequence[str]) -> None:
    """Print what came out, in percent with 95 % intervals, and where the report is."""
    table = Table(title="results, percent [95 % interval]", title_justify="left")
    for heading in ("encoder", "zero-shot top-1", "VQA accuracy", "images shuffled", "difference"):
        table.add_column(heading, justify="left" if heading == "encoder" else "right")
    for name in encoders:
        found = {
            benchmark: read_metric(out / "eval" / name / benchmark / "summary.json", metric) for benchmark, metric in BENCHMARKS.items()
        }
        gain = found["mini_vqa"]["value"] - found["mini_vqa_shuffled"]["value"]
        table.add_row(name, *(f"{m['value']:.1f} [{m['ci95'][0]:.1f}, {m['ci95'][1]:.1f}]" for m in found.values()), f"{gain:+.1f}")
    console.print(table)
    console.print(
        f"report: {out / 'report.html'}\nask them yourself: mmkit demo"
        + ("" if str(out) == QuickstartConfig().out else f" --model {out / 'llava' / encoders[0]}")
    )


def read_metric(path: Path, metric: str) -> dict[str, Any]:
    """One metric of a summary.json.

    Raises:
        NameNotFound: The summary does not have it.
    """
    metrics = json.loads(path.read_text(encoding="utf-8"))["metrics"]
    if metric not in metrics:
        raise NameNotFound(f"{path} has no metric '{metric}'; it has {', '.join(metrics)}")
    found: dict[str, Any] = metrics[metric]
    return found


def clock(seconds: float) -> str:
    """Minutes and seconds, 4:07."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


if __name__ == "__main__":
    cli_entry(main)
