"""The stages of `mmkit experiment visft`: heads, true and permuted annotations over seeds, probes before and after. Runs and writes nothing."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from apps.quickstart_plan import SCENE_DRAWINGS, SIDE_BY_SIDE, Stage, in_lanes, training, visft_flags, visft_heads
from mmkit.errors import ConfigError

BEFORE, TRUE, PERMUTED = "before", "true", "permuted"
ARMS = (TRUE, PERMUTED)
LOOKS = 4  # held-out losses along a stage 2, the start and the end included
EVALUATIONS = ("mini_zeroshot", "mini_ocr", "goi_image", "goi_box")
PROBE_IMAGES = 2000  # training items of an object probe: enough for a linear layer of this width


@dataclass
class VisftExperimentConfig:
    """Settings of `mmkit experiment visft`."""

    out: str = field(default="runs/visft", metadata={"help": "folder for everything; an unfinished one is gone on with"})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "of stage 2, of its permuted control and of the probes"})
    scale: float = field(default=1.0, metadata={"help": "factor on pictures drawn and steps trained"})
    steps: int = field(default=240, metadata={"help": "of each stage 2, before the scale; there are two for every seed"})
    data: str = field(default="", metadata={"help": "an embedded data set that is there (mmkit data mini); none is drawn then"})
    threads: int = field(default=0, metadata={"help": "of torch; 0 is OMP_NUM_THREADS where that is set, else every core"})
    side_by_side: int = field(
        default=0,
        metadata={"help": SIDE_BY_SIDE.replace("encoders tried", "arms worked on")},
    )

    def validate(self) -> None:
        """Refuse a scale of nothing and repeated seeds.

        Raises:
            ConfigError: The message names the flag.
        """
        if not self.scale > 0:
            raise ConfigError(f"--scale is {self.scale}; above 0 is right: 1 for the full job, 0.02 for a trial of minutes")
        if self.steps < 1:
            raise ConfigError(f"--steps is {self.steps}; at least 1 is right")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ConfigError(f"--seeds {self.seeds}: at least one, each once, is right")
        if self.data and not (Path(self.data) / "manifest.json").is_file():
            raise ConfigError(
                f"--data {self.data} is no finished embedded data set (no manifest.json); make one: mmkit data mini --out {self.data}"
            )

    @property
    def data_folder(self) -> Path:
        """Where the data are, or will be."""
        return Path(self.data) if self.data else Path(self.out) / "data"


def encoder_of(out: Path, arm: str, seed: int) -> Path:
    """The encoder of an arm and seed; there is one before, whatever the seed."""
    return out / "encoders" / (BEFORE if arm == BEFORE else f"{arm}_{seed}")


def work_of(out: Path, arm: str, seed: int) -> Path:
    """Where stage 2 of an arm and seed is trained."""
    return out / "work" / f"{arm}_{seed}"


def evaluation_of(out: Path, arm: str, seed: int, name: str) -> Path:
    """Where an evaluation of one encoder with one seed's probe is written; zero-shot has no probe, so before there is one."""
    return out / "by_seed" / (BEFORE if arm == BEFORE and name == "mini_zeroshot" else f"{arm}_{seed}") / name


def plan(config: VisftExperimentConfig) -> list[Stage]:
    """All stages in order."""
    out, data = Path(config.out), config.data_folder
    stages = [_draw(config, data), _before(out), _words(out, data)]
    heads, places = visft_heads(data, out / "work", 0, config.scale)
    stages += heads
    for seed in config.seeds:
        stages += in_lanes({arm: [_stage_two(config, arm, seed, places)] for arm in ARMS})
    for seed in config.seeds:
        stages += in_lanes({arm: _evaluations(config, arm, seed) for arm in (BEFORE, *ARMS)})
    stages += [_maps(config), _results(config)]
    results = out / "results"
    flags = (str(results), "--out", str(out), "--title", "Does ViSFT make this encoder better?")
    return [*stages, Stage("report", "report", "mmkit.report:main", flags, out / "report.html", out / "report.html")]


def _draw(config: VisftExperimentConfig, data: Path) -> Stage:
    flags = ("--out", str(data), "--scale", str(config.scale), "--scene_drawings", str(SCENE_DRAWINGS), "--resume")
    return Stage("draw the embedded data", "data mini", "mmkit.minidata.build:main", flags, data, data / "manifest.json")


def _before(out: Path) -> Stage:
    folder = encoder_of(out, BEFORE, 0)
    flags = ("mini-clip", str(folder))
    return Stage("encoder before", "quickstart", "apps.quickstart:export_encoder", flags, folder, folder / "config.json")


def _words(out: Path, data: Path) -> Stage:
    folder = out / "words"
    flags = ("--data", str(data), "--out", str(folder))
    return Stage("cut the words out", "experiment visft", "mmkit.minidata.word_crops:main", flags, folder, folder / "test.jsonl")


def _stage_two(config: VisftExperimentConfig, arm: str, seed: int, heads: list[Path]) -> Stage:
    """LoRA under the heads, with an arm's annotations."""
    out = Path(config.out)
    work = work_of(out, arm, seed)
    steps = max(4, round(config.steps * config.scale))
    own = [*visft_flags(config.data_folder, heads), "--permute_annotations", json.dumps(arm == PERMUTED), "--run.steps", str(steps)]
    own += ["--run.save_every", str(max(2, steps // 4))]
    stage = training(
        f"stage 2, {arm} annotations, seed {seed}", "train visft", "encoders", "mini_visft_lora", own, work, seed, 1.0,
        (work / "encoder", encoder_of(out, arm, seed)),
    )  # fmt: skip
    return replace(stage, argv=(*stage.argv, "--eval_every", str(max(1, steps // (LOOKS - 1)))))


def _evaluations(config: VisftExperimentConfig, arm: str, seed: int) -> list[Stage]:
    """Zero-shot and the probes of one encoder; the probes' heads have the seed of the encoder, before as after: pairs."""
    out, data, encoder = Path(config.out), config.data_folder, encoder_of(Path(config.out), arm, seed)
    title, found = arm if arm == BEFORE else f"{arm}, seed {seed}", []
    if arm != BEFORE or seed == config.seeds[0]:
        zero = evaluation_of(out, arm, seed, "mini_zeroshot")
        argv = (
            "--encoder",
            str(encoder),
            "--images",
            str(data / "classification" / "test"),
            "--benchmark",
            "mini_zeroshot",
            "--out",
            str(zero),
        )
        done = zero / "summary.json"
        found.append(Stage(f"zero-shot: {title}", "eval zeroshot", "encoders.eval_zeroshot:main", argv, zero, done, ("--resume",)))
    place = evaluation_of(out, arm, seed, "mini_ocr").parent
    return [*found, *probe_stages(title, encoder, place, data, seed, config.scale, out / "words")]


def probe_stages(title: str, encoder: Path, place: Path, data: Path, seed: int, scale: float, words: Path | None = None) -> list[Stage]:
    """The OCR probe and the object probe of one encoder.

    Args:
        title: What the encoder is called.
        encoder: Its folder.
        place: Folder of its evaluations.
        data: The embedded data.
        seed: Of the probes' heads.
        scale: Factor on their steps.
        words: Word pictures; None takes the data's own.
    """
    words = words or data / "words"
    ocr, goi = place / "mini_ocr", place / "goi_box"
    flags: Mapping[Path, tuple[str, ...]] = {
        ocr: (
            "--train", str(words), "--test", f"words={words}", "--benchmark", "mini_ocr", "--seeds", str(seed),
            "--optimizer", "adamw", "--lr", "3e-3", "--head.width", "96", "--head.layers", "2", "--head.heads", "3", "--head.longest", "8",
            "--run.steps", str(max(4, round(600 * scale))), "--run.micro_batch_size", "32",
        ),
        goi.parent: (
            "--data", str(data), "--images", str(data / "images"), "--seeds", str(seed), "--limit_train", str(PROBE_IMAGES),
            "--run.epochs", str(max(1, round(30 * min(1, scale)))),
        ),
    }  # fmt: skip
    rows = [("OCR probe", "eval ocr", ocr, ocr), ("object probe", "eval goi", goi.parent, goi)]
    found = []
    for name, command, folder, last in rows:
        argv = ("--encoder", str(encoder), *flags[folder], "--out", str(folder))
        script = f"encoders.{command.replace(' ', '_')}:main"
        found.append(Stage(f"{name}: {title}", command, script, argv, last, last / "summary.json", ("--resume",)))
    return found


def _maps(config: VisftExperimentConfig) -> Stage:
    out = Path(config.out)
    folder, first = out / "results" / "maps", config.seeds[0]
    flags = (str(encoder_of(out, TRUE, first)), "--before", str(encoder_of(out, BEFORE, 0)), "--out", str(folder), "--overwrite", "--limit", "6",
             "--layers", "6", "--images", str(config.data_folder / "images" / "test"))  # fmt: skip
    return Stage("attention before and after", "inspect", "encoders.inspection:main", flags, folder, folder / "maps.json")


def _results(config: VisftExperimentConfig) -> Stage:
    out = Path(config.out)
    flags = ("--out", str(out), "--seeds", ",".join(map(str, config.seeds)))
    done = out / "results" / "findings.json"
    return Stage("put the seeds together", "experiment visft", "apps.visft_results:main", flags, done, done)
