"""`mmkit sweep NAME`: rows of settings over seeds, each trained and evaluated, and one table of means and intervals.

    mmkit sweep uta_objectives --out runs/sweeps/uta_objectives
    mmkit sweep uta_objectives --out runs/sweeps/two --rows.uta.lr 1e-3 --common.run.steps 300 --seeds 0,1 --only uta,fd

A sweep is a small YAML file (`encoders/sweeps/`): a script, a recipe, and rows of flags. Runs follow each other, seed by seed, so that a sweep
that is stopped has whole rows; started again it keeps what is finished, and goes on inside the training that was interrupted. A run that fails
is named in the table and does not stop the others. In all values {data}, {run}, {out}, {row} and {seed} stand for those.
"""

import gc
import hashlib
import importlib
import json
import shlex
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from apps.stages import as_typed, clock, quiet, set_threads
from apps.sweep_table import Table
from mmkit.checkpoint import atomic_write
from mmkit.config import cli_entry, find_recipe, load_config, read_recipe, save_config
from mmkit.errors import ConfigError, MMKitError, TrainingError, find

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = [ROOT / package / "sweeps" for package in ("encoders", "llm_stage")]
INTERRUPTED, TERMINATED = 130, 143  # how `Run` leaves after Ctrl-C and SIGTERM


@dataclass
class SweepConfig:
    """Settings of `mmkit sweep NAME`: NAME is a file of these, from encoders/sweeps/ or by its path."""

    script: str = field(default="", metadata={"help": "the training of every row, as in encoders/train_uta.py"})
    recipe: str = field(default="", metadata={"help": "recipe of every row that names no other (a row's own: recipe: NAME)"})
    common: dict[str, Any] = field(default_factory=dict, metadata={"help": "flags of all rows; --common.run.steps 3 adds one"})
    rows: dict[str, dict[str, Any]] = field(default_factory=dict, metadata={"help": "name of a row: its own flags"})
    only: list[str] = field(default_factory=list, metadata={"help": "rows to run; none is all"})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "values of run.seed"})
    evaluate: dict[str, dict[str, Any]] = field(
        default_factory=dict, metadata={"help": "name: the script and flags of an evaluation of each run; it gets --out"}
    )
    prepare: dict[str, dict[str, Any]] = field(default_factory=dict, metadata={"help": "name: the script and flags of what comes first"})
    metrics: list[str] = field(default_factory=list, metadata={"help": "columns, as in zeroshot.top1; none is all that summaries hold"})
    baseline: str = field(default="", metadata={"help": "the row that others are compared with, seed by seed"})
    data: str = field(default="", metadata={"help": "what {data} stands for"})
    notes: list[str] = field(default_factory=list, metadata={"help": "what a reader of the table should know; printed below it"})
    launcher: str = field(default="", metadata={"help": "starts each training: 'torchrun --nproc_per_node 8'; none is this process"})
    threads: int = field(default=0, metadata={"help": "of torch; 0 is OMP_NUM_THREADS where that is set, else every core"})
    out: str = field(default="", metadata={"help": "folder for runs/ROW/seed_N, eval/ROW/seed_N, sweep.md and sweep.json"})

    def validate(self) -> None:
        """Refuse a sweep of nothing, and names that no row bears.

        Raises:
            ConfigError: The message names the setting.
            NameNotFound: `only` or `baseline` is no row.
        """
        for name in ("script", "out", "rows", "seeds"):
            if not getattr(self, name):
                raise ConfigError(f"a sweep needs `{name}`, and it is empty: `mmkit sweep NAME --out FOLDER`, --help lists all settings")
        for name in [*self.only, *([self.baseline] if self.baseline else [])]:
            find("row of this sweep", self.rows, name)
        if len(set(self.seeds)) != len(self.seeds):
            raise ConfigError(f"seeds is {self.seeds}; each seed once is right")
        for name, row in self.rows.items():
            if not isinstance(row, Mapping):  # a flag may have put anything there
                raise ConfigError(f"rows.{name} is {row!r}; flags and their values are right, as in --rows.{name}.lr 1e-3")
            if Path(name).name != name or name.startswith("."):
                raise ConfigError(f"row '{name}': the name of a row is also that of a folder; letters, digits, _ and - are right")
        for name, entry in {"script": {"script": self.script}, **self.evaluate, **self.prepare}.items():
            script = entry.get("script")
            if not isinstance(script, str) or not (ROOT / script).is_file():
                raise ConfigError(f"'{name}' names the script {script!r}, and there is none below {ROOT}; encoders/train_uta.py is one")


@dataclass(frozen=True)
class Job:
    """One script with its flags.

    Attributes:
        row, seed: Whose.
        name: "train", or the evaluation's.
        script: File of the script, below the root.
        argv: Its command line.
        folder: Where it writes.
        recipes: What its recipe says, for the fingerprint.
    """

    row: str
    seed: int
    name: str
    script: str
    argv: tuple[str, ...]
    folder: Path
    recipes: str = ""

    @property
    def key(self) -> str:
        """Name in the journal."""
        return f"{self.row}/seed_{self.seed}/{self.name}"

    @property
    def finished(self) -> bool:
        """The script has come to its end: a training says so in its manifest, an evaluation writes its summary last."""
        if self.name != "train":
            return (self.folder / "summary.json").is_file()
        manifest = self.folder / "manifest.json"
        return manifest.is_file() and json.loads(manifest.read_text(encoding="utf-8")).get("state") == "finished"

    def fingerprint(self, out: Path) -> str:
        """A digest of what is asked for, wherever the sweep's folder lies."""
        words = [word.replace(str(out), "OUT") for word in self.argv]
        return hashlib.sha256(json.dumps([self.script, words, self.recipes]).encode()).hexdigest()[:16]


def main(argv: Sequence[str] | None = None) -> Path:
    """Run what is not finished yet, and write the table after each run.

    Args:
        argv: A sweep's name or file, then flags, see `SweepConfig`.

    Returns:
        The sweep's folder.

    Raises:
        ConfigError: The folder was made with other settings.
        NameNotFound: `metrics` names one that no summary has.
        TrainingError: Some runs failed; the table names them.
        SystemExit: Interrupted (code 130); what is done is kept.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words and not words[0].startswith("-"):
        words = ["--sweep", *words]
    named = [Path(words[index + 1]).stem for index, word in enumerate(words[:-1]) if word == "--sweep"]
    folder = next((folder for folder in FOLDERS if named and (folder / f"{named[-1]}.yaml").is_file()), FOLDERS[0])
    config = load_config(SweepConfig, words, recipe_dir=folder, recipe_flag="sweep")
    jobs = plan(config)
    journal = Journal(config, jobs)
    set_threads(config.threads)
    quiet()
    table = Table(named[-1] if named else "sweep", config.rows, config.seeds, config.baseline, config.metrics, config.notes)
    for name, entry in config.prepare.items():
        print(f"prepare: {name}", flush=True)
        start(
            str(entry["script"]),
            flags_of({key: value for key, value in entry.items() if key != "script"}, {"data": config.data, "out": config.out}),
        )
    run_all(config, jobs, journal, table)
    for metric in config.metrics if table.values else []:
        find("metric in the summaries of this sweep", table.values, metric)
    out = Path(config.out)
    print(table.markdown(), f"\n{out / 'sweep.md'}")
    if table.failed:
        raise TrainingError(f"{len(table.failed)} of {len(jobs)} runs failed; the same command tries them again:\n{table.failures()}")
    return out


# ---- which runs -------------------------------------------------------------------------------------------------------------------------


def plan(config: SweepConfig) -> list[Job]:
    """List all trainings and evaluations in their order; nothing is run or written."""
    out, jobs = Path(config.out), []
    for seed in config.seeds:
        for row in config.only or config.rows:
            run = out / "runs" / row / f"seed_{seed}"
            places = {"data": config.data, "run": str(run), "out": str(out), "row": row, "seed": str(seed)}
            settings = {**({"recipe": config.recipe} if config.recipe else {}), **flat(config.common), **flat(config.rows[row])}
            recipe = str(settings.pop("recipe", ""))
            own = {**({"recipe": recipe} if recipe else {}), **settings, "run.seed": seed, "run.output_dir": str(run)}
            jobs.append(Job(row, seed, "train", config.script, flags_of(own, places), run, recipe_text(config.script, recipe)))
            for name, entry in config.evaluate.items():
                folder = out / "eval" / row / f"seed_{seed}" / name
                flags = {**{key: value for key, value in entry.items() if key != "script"}, "out": str(folder)}
                jobs.append(Job(row, seed, name, str(entry["script"]), flags_of(flags, places), folder))
    return jobs


def recipe_text(script: str, recipe: str) -> str:
    """Give all that a recipe says, its bases included, as text.

    Raises:
        ConfigError: There is no such recipe.
    """
    if not recipe:
        return ""
    path = find_recipe(recipe, ROOT / Path(script).parent / "recipes")
    return json.dumps([data for _, data in read_recipe(path)], sort_keys=True, default=str)


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn nested groups into paths, a later one over an earlier one: {"run": {"steps": 3}} and {"run.steps": 3} are the same."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        entries = flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
        for path, entry in entries.items():
            found.pop(path, None)  # a flag that comes later also stands later
            found[path] = entry
    return found


def flags_of(settings: Mapping[str, Any], places: Mapping[str, str]) -> tuple[str, ...]:
    """Turn settings into a command line, with names in braces replaced."""

    def fill(value: Any) -> Any:
        if isinstance(value, list):
            return [fill(item) for item in value]
        if isinstance(value, str):
            for name, place in places.items():
                value = value.replace(f"{{{name}}}", place)
        return value

    filled = {key: fill(value) for key, value in flat(settings).items()}
    return tuple(f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in filled.items())


# ---- running them -----------------------------------------------------------------------------------------------------------------------


def run_all(config: SweepConfig, jobs: Sequence[Job], journal: "Journal", table: Table) -> None:
    """Run the jobs that are not finished; after each, the table is written anew.

    Raises:
        SystemExit: Interrupted.
    """
    begin, todo = time.monotonic(), sum(not job.finished for job in jobs)
    print(f"{len(jobs)} runs, {todo} to do; Ctrl-C stops at the next good moment, the same command goes on", flush=True)
    trained: set[tuple[str, int]] = set()
    for number, job in enumerate(jobs, start=1):
        if job.name != "train" and (job.row, job.seed) not in trained:
            continue
        if not job.finished:
            print(f"\n[{number} of {len(jobs)}, {clock(time.monotonic() - begin)}] {job.row}, seed {job.seed}: {job.name}", flush=True)
            problem = attempt(job, config, journal)
            if problem:
                print(f"failed: {problem}", file=sys.stderr, flush=True)
                table.fail(job.row, job.seed, job.name, problem)
                write(config, table)
                continue
        if job.name == "train":
            trained.add((job.row, job.seed))
        for name, path in summaries(job):
            table.read(job.row, job.seed, name, path)
        write(config, table)


def attempt(job: Job, config: SweepConfig, journal: "Journal") -> str:
    """Run a job; gives what went wrong, or nothing."""
    going_on = ("--run.resume",) if job.name == "train" else ("--resume",) if job.folder.exists() else ()
    journal.begin(job)
    try:
        start(job.script, (*job.argv, *going_on), config.launcher if job.name == "train" else "")
    except (KeyboardInterrupt, SystemExit) as stop:
        if isinstance(stop, SystemExit) and stop.code not in (INTERRUPTED, TERMINATED, None, 0):
            return f"it left with code {stop.code}"
        print("\nstopped; the same command goes on with it", file=sys.stderr)
        raise SystemExit(TERMINATED if isinstance(stop, SystemExit) and stop.code == TERMINATED else INTERRUPTED) from None
    except MMKitError as error:
        return str(error)
    except Exception as error:  # a fault in one row: the others may be well
        traceback.print_exc()
        return f"{type(error).__name__}: {error}"
    finally:
        gc.collect()  # a finished run's model and optimizer hang together in cycles; the next run needs their memory
    return ""


def start(script: str, argv: Sequence[str], launcher: str = "") -> None:
    """Run a script, here or under a launcher.

    Raises:
        TrainingError: It left the launcher with another code than 0.
    """
    path = ROOT / script
    if launcher:
        process = subprocess.Popen([*shlex.split(launcher), str(path), *argv])
        try:
            code = process.wait()
        except KeyboardInterrupt:  # the terminal has told the training too: it finishes its step and saves
            process.wait()
            raise
        if code:
            raise TrainingError(f"{launcher} {script} left with code {code}; its own words are above")
        return
    with as_typed([str(path), *argv]):
        importlib.import_module(".".join(Path(script).with_suffix("").parts)).main(list(argv))


def summaries(job: Job) -> Iterator[tuple[str, Path]]:
    """Give what a finished job says of itself: an evaluation's summary, or those that a training wrote in its folder."""
    if job.name != "train":
        yield job.name, job.folder / "summary.json"
        return
    for path in sorted([job.folder / "summary.json", *job.folder.glob("*/summary.json")]):
        if path.is_file():
            yield ("train" if path.parent == job.folder else path.parent.name), path


def write(config: SweepConfig, table: Table) -> None:
    """Write sweep.md and sweep.json."""
    atomic_write(Path(config.out) / "sweep.md", table.markdown())
    atomic_write(Path(config.out) / "sweep.json", json.dumps(table.as_dict(), indent=1) + "\n")


class Journal:
    """`runs.json` in the sweep's folder: what each run was asked to do, so that other settings are not taken for the same run.

    Raises:
        ConfigError: A run that is there was asked for something else.
    """

    def __init__(self, config: SweepConfig, jobs: Sequence[Job]) -> None:
        self.out = Path(config.out)
        self.path = self.out / "runs.json"
        self.noted: dict[str, dict[str, Any]] = json.loads(self.path.read_text(encoding="utf-8")) if self.path.is_file() else {}
        for job in jobs:
            before = self.noted.get(job.key)
            if job.folder.exists() and (before is None or before["fingerprint"] != job.fingerprint(self.out)):
                what = "no sweep has made it" if before is None else "its settings were others: " + shlex.join(before["command"])
                raise ConfigError(
                    f"{job.folder} is there, and {what}\n  take another folder (--out {self.out}_2), or remove this one "
                    f"(rm -r {shlex.quote(str(job.folder))})"
                )
        self.out.mkdir(parents=True, exist_ok=True)
        save_config(config, self.out / "sweep.yaml")

    def begin(self, job: Job) -> None:
        """Note a run before it writes anything."""
        self.noted[job.key] = {"fingerprint": job.fingerprint(self.out), "command": [job.script, *job.argv]}
        atomic_write(self.path, json.dumps(self.noted, indent=1) + "\n")


if __name__ == "__main__":
    cli_entry(main)
