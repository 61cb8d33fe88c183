"""The stages of the quickstart: which scripts, with which command lines, and how to see that one is complete. Runs and writes nothing."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from mmkit.config import find_recipe
from mmkit.errors import ConfigError, find
from mmkit.report_data import BLIP2_SUFFIX

ROOT = Path(__file__).resolve().parent.parent
RECIPES = {"encoders": ROOT / "encoders" / "recipes", "llm_stage": ROOT / "llm_stage" / "recipes"}
ENCODERS = {
    "clip": "the mini CLIP teacher, from the package",
    "uta": "a student of it, trained here without text (UTA)",
    "visft": "the teacher with LoRA merged in, trained here under three frozen heads (ViSFT); some minutes more",
}
DEFAULT_ENCODERS = ("clip", "uta")
DOWNSTREAMS = {
    "llava": "projector and language model trained behind each encoder",
    "blip2": "a Q-Former trained behind each encoder, then in front of a frozen language model; a quarter of an hour more for two encoders",
}
RERANKED = 16  # of the embedded data's 500 pictures and 2,500 captions
VISFT_TASKS = ("detection", "segmentation", "caption")
SCENE_DRAWINGS = 80  # of the 574: in twenty minutes a language model cannot learn to tell more things apart in scenes
SIDE_BY_SIDE = "encoders tried at the same time, each with its share of the threads; 0: one for each thread, on an accelerator one"
LEAST_STEPS = 4  # however small the scale: enough for a checkpoint in the middle


@dataclass
class QuickstartConfig:
    """Settings of `mmkit quickstart`."""

    out: str = field(default="runs/quickstart", metadata={"help": "folder for everything; an unfinished one is gone on with"})
    encoders: list[str] = field(
        default_factory=lambda: list(DEFAULT_ENCODERS), metadata={"help": "which to compare: clip, uta, visft, with commas"}
    )
    downstream: list[str] = field(
        default_factory=lambda: ["llava"], metadata={"help": "what the encoders are tried in: llava, blip2, with commas"}
    )
    scale: float = field(
        default=1.0, metadata={"help": "factor on pictures drawn and steps trained; 1 is about twenty minutes on two cores"}
    )
    seed: int = field(default=0, metadata={"help": "of data and trainings"})
    threads: int = field(default=0, metadata={"help": "of torch; 0 is OMP_NUM_THREADS where that is set, else every core"})
    side_by_side: int = field(default=0, metadata={"help": SIDE_BY_SIDE})

    def validate(self) -> None:
        """Check the names of the encoders and the scale.

        Raises:
            ConfigError: The scale is not above 0, no encoder is named, or one is named twice.
            NameNotFound: There is no such encoder in the quickstart.
        """
        for name in self.encoders:
            find("quickstart encoder", ENCODERS, name)
        if not self.encoders or len(set(self.encoders)) != len(self.encoders):
            raise ConfigError(f"--encoders is '{','.join(self.encoders)}'; right are one or more of {', '.join(ENCODERS)}, each once")
        for name in self.downstream:
            find("downstream", DOWNSTREAMS, name)
        if not self.downstream or len(set(self.downstream)) != len(self.downstream):
            raise ConfigError(f"--downstream is '{','.join(self.downstream)}'; right are {' or '.join(DOWNSTREAMS)}, or both")
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
        lane: Stages of different lanes need nothing of each other, and can run side by side; "" needs all before it.
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
    lane: str = ""

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
            ("--out", str(data), *size, "--scene_drawings", str(SCENE_DRAWINGS), "--resume"),
            data,
            data / "manifest.json",
        )
    ]
    for name in config.encoders:
        stages += _encoder_stages(name, out, config)
    stages += in_lanes({name: [zeroshot_stage(name, out, data)] for name in config.encoders})
    for kind, stages_of in DOWNSTREAM_STAGES.items():
        if kind in config.downstream:
            stages += in_lanes({name: stages_of(name, out, config) for name in config.encoders})
    stages.append(Stage("report", "report", "mmkit.report:main", (str(out), "--out", str(out)), out / "report.html", out / "report.html"))
    return stages


def in_lanes(found: Mapping[str, Sequence[Stage]]) -> list[Stage]:
    """Give the stages of all lanes, by their names."""
    return [replace(stage, lane=lane) for lane, stages in found.items() for stage in stages]


def zeroshot_stage(name: str, out: Path, data: Path) -> Stage:
    """Name the drawings by their nearest class name."""
    folder = out / "eval" / name / "mini_zeroshot"
    named = {"encoder": out / "encoders" / name, "images": data / "classification" / "test", "out": folder, "benchmark": "mini_zeroshot"}
    done = folder / "summary.json"
    return Stage(f"zero-shot: {name}", "eval zeroshot", "encoders.eval_zeroshot:main", _flags(named), folder, done, ("--resume",))


def _encoder_stages(name: str, out: Path, config: QuickstartConfig) -> list[Stage]:
    """Get one encoder folder: `clip` from the package, `uta` and `visft` trained."""
    folder = out / "encoders" / name
    if name == "clip":
        flags = ("mini-clip", str(folder))
        return [
            Stage(
                "encoder: clip (the teacher)", "quickstart", "apps.quickstart:export_encoder", flags, folder, folder / "config.json"
            )
        ]  # fmt: skip
    if name == "visft":
        heads, places = visft_heads(out / "data", out / "work", config.seed, config.scale)
        own, work = visft_flags(out / "data", places), out / "work" / "visft"
        title = "encoder: visft (clip with LoRA under the heads)"
        return [
            *heads,
            training(title, "train visft", "encoders", "mini_visft_lora", own, work, config.seed, config.scale, (work / "encoder", folder)),
        ]
    work = out / "work" / "uta"
    roots = [str(out / "data" / part / "train") for part in ("images", "classification")]
    own = ("--data.root", json.dumps(roots))
    title = "encoder: uta (a student of clip)"
    return [training(title, "train uta", "encoders", "mini_uta_quick", own, work, config.seed, config.scale, (work / "encoder", folder))]


def visft_data(data: Path) -> dict[str, str]:
    """The settings of a ViSFT training that name the embedded data."""
    found = {}
    for prefix, split in (("", "train"), ("held_out_", "val")):
        found[f"data.{prefix}images"] = str(data / "images" / split)
        for kind in ("instances", "captions"):
            found[f"data.{prefix}{kind}"] = str(data / "coco" / f"{kind}_{split}.json")
    return found


def visft_heads(data: Path, work: Path, seed: int, scale: float) -> tuple[list[Stage], list[Path]]:
    """Stage 1 of ViSFT: a head for each task on the frozen teacher; and where the heads will be."""
    stages, places = [], []
    for task in VISFT_TASKS:
        kind = "captions" if task == "caption" else "instances"
        named = {key: value for key, value in visft_data(data).items() if key.endswith(("images", kind))}
        named["data.feature_cache"] = str(work / "visft_features")
        folder = work / f"visft_{task}"
        own = tuple(word for key, value in named.items() for word in (f"--{key}", value))
        stages.append(training(f"ViSFT head: {task}", "train visft", "encoders", f"mini_visft_{task}", own, folder, seed, scale))
        places.append(folder / "head")
    return stages, places


def visft_flags(data: Path, heads: Sequence[Path]) -> tuple[str, ...]:
    """Stage 2 of ViSFT: its heads and its data."""
    named = {"heads": json.dumps([str(place) for place in heads]), **visft_data(data)}
    return tuple(word for key, value in named.items() for word in (f"--{key}", value))


def llava_stages(name: str, out: Path, config: QuickstartConfig, recipes: str = "mini") -> list[Stage]:
    """Both stages of LLaVA behind one encoder, by recipes NAME_stage1 and NAME_stage2, and its questions with their control."""
    first, second = (out / "work" / f"llava_{name}_stage{stage}" for stage in (1, 2))
    texts, images = out / "data" / "llava", ("--data.images", str(out / "data" / "images"))
    own = ("--encoder", str(out / "encoders" / name), "--data.json", str(texts / "pretrain.json"), *images)
    stages = [training(f"LLaVA stage 1: {name}", "train llava", "llm_stage", f"{recipes}_stage1", own, first, config.seed, config.scale)]
    own = ("--pretrained", str(first / "model"), "--data.json", str(texts / "instruct.json"), *images)
    publish = (second / "model", out / "llava" / name)
    title = f"LLaVA stage 2: {name}"
    stages.append(training(title, "train llava", "llm_stage", f"{recipes}_stage2", own, second, config.seed, config.scale, publish))
    return [*stages, *(vqa_stage(name, publish[1], out, shuffled) for shuffled in (False, True))]


def blip2_stages(name: str, out: Path, config: QuickstartConfig, recipes: str = "mini") -> list[Stage]:
    """Both stages of BLIP-2 behind one encoder: retrieval after the first, beside the encoder's own; questions and captions after the second.

    The first is by recipe mini_qformer, whatever the language model; the second by NAME_blip2.
    """
    column, images = f"{name}{BLIP2_SUFFIX}", out / "data" / "images"
    first, second = (out / "work" / f"{column}_stage{stage}" for stage in (1, 2))
    captions = {split: str(out / "data" / "coco" / f"captions_{split}.json") for split in ("train", "val", "test")}
    named = {
        "encoder": out / "encoders" / name, "data.source": captions["train"], "data.image_root": images / "train",
        "val_captions": captions["val"], "val_images": images / "val", "data.feature_cache": out / "work" / "blip2_features",
    }  # fmt: skip
    stages = [training(f"Q-Former: {name}", "train qformer", "llm_stage", "mini_qformer", _flags(named), first, config.seed, config.scale)]
    sought = {"captions": captions["test"], "images": images / "test"}
    for title, command, target, folder, more in (
        (f"retrieval by the encoder itself: {name}", "eval retrieval", "encoders.eval_zeroshot_retrieval", out / "eval" / name / "mini_retrieval",
         {"encoder": out / "encoders" / name, "benchmark": "mini_retrieval"}),
        (f"retrieval by the Q-Former: {name}", "eval qformer-retrieval", "llm_stage.eval_retrieval", out / "eval" / column / "mini_retrieval",
         {"model": first / "model", "benchmark": "mini_retrieval", "k": RERANKED}),
    ):  # fmt: skip
        flags = _flags({**more, **sought, "out": folder})
        stages.append(Stage(title, command, f"{target}:main", flags, folder, folder / "summary.json", ("--resume",)))
    vqa = out / "data" / "vqa"
    named = {
        "pretrained": first / "model", "data.source": captions["train"], "data.image_root": images / "train", "images": images,
        "questions": vqa / "questions_train.json", "annotations": vqa / "annotations_train.json",
        "data.feature_cache": out / "work" / "blip2_features",
    }  # fmt: skip
    publish = (second / "model", out / "blip2" / name)
    title = f"BLIP-2 before the language model: {name}"
    stages.append(
        training(title, "train blip2", "llm_stage", f"{recipes}_blip2", _flags(named), second, config.seed, config.scale, publish)
    )
    stages += [vqa_stage(column, publish[1], out, shuffled) for shuffled in (False, True)]
    return [*stages, *(captions_stage(column, publish[1], out, shuffled) for shuffled in (False, True))]


DOWNSTREAM_STAGES: Mapping[str, Callable[..., list[Stage]]] = {"llava": llava_stages, "blip2": blip2_stages}


def _flags(named: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(word for key, value in named.items() for word in (f"--{key}", str(value)))


def captions_stage(column: str, model: Path, out: Path, shuffled: bool) -> Stage:
    """Captions of the test scenes, or their control."""
    folder = out / "eval" / column / ("mini_captions_shuffled" if shuffled else "mini_captions")
    named = {"model": model, "benchmark": "mini_captions", "images": out / "data" / "images" / "test", "batch_size": 32, "out": folder}
    flags = _flags({**named, "annotations": out / "data" / "coco" / "captions_test.json", **({"control": "shuffled"} if shuffled else {})})
    title = f"captions, images shuffled (the control): {column}" if shuffled else f"captions: {column}"
    return Stage(title, "eval captions", "llm_stage.eval_captions:main", flags, folder, folder / "summary.json")


def vqa_stage(name: str, model: Path, out: Path, shuffled: bool) -> Stage:
    """Questions about the test scenes, or their control: each before another question's picture."""
    vqa, folder = out / "data" / "vqa", out / "eval" / name / ("mini_vqa_shuffled" if shuffled else "mini_vqa")
    flags = [
        "--model",
        str(model),
        "--questions",
        str(vqa / "questions_test.json"),
        "--annotations",
        str(vqa / "annotations_test.json"),
    ]
    flags += ["--train_annotations", str(vqa / "annotations_train.json"), "--images", str(out / "data" / "images"), "--batch_size", "32"]
    flags += ["--out", str(folder), *(["--shuffle_images"] if shuffled else [])]
    title = f"questions, images shuffled (the control): {name}" if shuffled else f"questions: {name}"
    return Stage(title, "eval vqa", "llm_stage.eval_vqa:main", tuple(flags), folder, folder / "summary.json")


def training(
    name: str,
    command: str,
    package: str,
    recipe: str,
    own: Sequence[str],
    work: Path,
    seed: int,
    scale: float,
    publish: tuple[Path, Path] | None = None,
) -> Stage:
    """A stage that trains by a recipe of a package, with a share of the recipe's steps."""
    path = find_recipe(recipe, RECIPES[package])
    flags = ["--recipe", recipe, *own, "--run.output_dir", str(work), "--run.seed", str(seed)]
    if scale != 1:
        steps = max(LEAST_STEPS, round(recipe_steps(path) * scale))
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
