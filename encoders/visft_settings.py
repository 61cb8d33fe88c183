"""Settings of `train_visft.py`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from encoders.heads.registry import HEADS
from encoders.placement import PLACERS
from encoders.visft_mixture import Mix
from mmkit.errors import ConfigError, find
from mmkit.run import RunConfig

RANDOM_PLACERS = {"fit_and_flip", "squash_and_flip", "jitter", "multi_scale"}


@dataclass
class TaskConfig:
    """How one task is trained.

    Attributes are documented by their help.
    """

    weight: float = field(default=0.3, metadata={"help": "stage 2: how often a step has this task"})
    canvas: int = field(default=0, metadata={"help": "side of the square that pictures lie on, pixels; 0 is the encoder's own size"})
    placer: str = field(default="fit", metadata={"help": f"how pictures are laid out in training: {', '.join(PLACERS)}"})
    held_out_placer: str = field(default="fit", metadata={"help": "and for held-out losses"})
    jitter_scale: list[float] = field(default_factory=lambda: [0.1, 2.0], metadata={"help": "of placer jitter"})
    images: int = field(default=1, metadata={"help": "stage 2: images of a unit (a sample of run.micro_batch_size)"})
    checkpointing: bool = field(
        default=False, metadata={"help": "stage 2: compute the encoder's activations again in the backward pass", "free": True}
    )


@dataclass
class DataConfig:
    """What is looked at: sets in COCO's format."""

    images: str = field(default="", metadata={"help": "folder of the training images"})
    instances: str = field(default="", metadata={"help": "their instances JSON (boxes, masks)"})
    captions: str = field(default="", metadata={"help": "their captions JSON"})
    panoptic: str = field(
        default="", metadata={"help": "their panoptic JSON, the PNGs in the folder of its name beside it (task panoptic)"}
    )
    keypoints: str = field(default="", metadata={"help": "their keypoints JSON (task pose)"})
    held_out_images: str = field(default="", metadata={"help": "folder of the held-out images"})
    held_out_instances: str = field(default="", metadata={"help": "their instances JSON"})
    held_out_captions: str = field(default="", metadata={"help": "their captions JSON"})
    held_out_panoptic: str = field(default="", metadata={"help": "their panoptic JSON"})
    held_out_keypoints: str = field(default="", metadata={"help": "their keypoints JSON"})
    held_out_limit: int = field(default=0, metadata={"help": "take the first held-out images only; 0 takes all"})
    held_out_batch: int = field(default=15, metadata={"help": "images of a held-out batch"})
    views: int = field(
        default=0,
        metadata={"help": "stage 1: lay each picture out in so many ways only, so that features can be cached; 0 is anew each epoch"},
    )
    feature_cache: str = field(
        default="", metadata={"help": "stage 1: folder for the frozen encoder's features: computed once, then read", "free": True}
    )
    feature_dtype: Literal["computed", "float16"] = field(
        default="computed", metadata={"help": "of cached features; float16 takes half the disk of fp32, and is not exact"}
    )
    rebuild_cache: bool = field(default=False, metadata={"help": "throw away what feature_cache holds, and begin again", "free": True})
    min_count: int = field(default=5, metadata={"help": "stage 1: rarer words of the captions become <unk>"})
    captions_per_image: int = field(default=1, metadata={"help": "captions of an image in a step, drawn anew; 0 takes all"})
    cache_pictures: bool = field(default=False, metadata={"help": "keep decoded pictures in memory: for small sets"})
    on_bad_sample: Literal["error", "skip"] = field(default="error", metadata={"help": "skip counts and lists them instead"})

    def validate(self) -> None:
        """Refuse numbers that mean nothing."""
        for name, least in {"views": 0, "held_out_limit": 0, "held_out_batch": 1, "captions_per_image": 0}.items():
            if getattr(self, name) < least:
                raise ConfigError(f"data.{name} is {getattr(self, name)}; at least {least} is right")


@dataclass
class LoraConfig:
    """What is trained in stage 2."""

    rank: int = field(default=64, metadata={"help": "r: columns of B, rows of A"})
    alpha: float = field(default=1.0, metadata={"help": "B A is scaled by alpha / r; the authors' files have 1"})
    save_every: int = field(
        default=0, metadata={"help": "keep the adapter every so many steps, in RUN/adapters; 0 only at the end", "free": True}
    )


@dataclass
class VisftConfig:
    """Settings of a ViSFT training: one head (stage heads), or LoRA under frozen heads (stage lora)."""

    stage: Literal["heads", "lora"] = field(
        default="heads", metadata={"help": "heads: one head on the frozen encoder; lora: q and v under them"}
    )
    task: str = field(default="", metadata={"help": f"stage heads: {', '.join(HEADS)}"})
    encoder: str = field(default="mini-clip", metadata={"help": "a name, or a folder"})
    heads: list[str] = field(default_factory=list, metadata={"help": "stage lora: head folders of stage 1 (RUN/head), one for each task"})
    head: dict[str, Any] = field(default_factory=dict, metadata={"help": "stage heads: sizes of the head that differ from the paper's"})
    tasks: list[str] = field(default_factory=list, metadata={"help": "stage lora: use the heads of these tasks only; empty uses all"})
    data_share: float = field(default=1.0, metadata={"help": "share of the training images that is used, chosen by the seed"})
    permute_annotations: bool = field(
        default=False, metadata={"help": "the control: every training image shows another's picture; its annotations say nothing of it"}
    )
    lr: float = field(default=5e-5, metadata={"help": "peak learning rate"})
    warmup: float = field(default=2000, metadata={"help": "steps, or share of schedule_steps if below 1"})
    schedule_steps: int = field(default=0, metadata={"help": "length of the cosine; 0 is run.steps. The paper stops at 5k of 100k"})
    weight_decay: float = field(default=1e-4, metadata={"help": "of matrices, LoRA's too"})
    head_lr: float = field(default=0.0, metadata={"help": "stage lora: learning rate of the heads, times lr; 0 freezes them"})
    heads_awake: bool = field(default=False, metadata={"help": "stage lora: leave the heads' dropout on, as the authors did"})
    mix: Mix = field(default="step", metadata={"help": "stage lora: micro-batches of a step share a task, or each has its own"})
    divide_losses: bool = field(
        default=False, metadata={"help": "stage lora: divide each task's loss by its held-out value before the first step (ours)"}
    )
    eval_every: int = field(default=0, metadata={"help": "steps between held-out losses; 0 is at the start and the end", "free": True})
    scored_images: int = field(
        default=100, metadata={"help": "stage heads: held-out images for AP or CIDEr, untrained and trained; 0: none"}
    )
    drop_cls: bool = field(default=False, metadata={"help": "leave the CLS token out of the sequence, as the authors trained"})
    imagenet_norm: bool = field(
        default=False, metadata={"help": "normalise pictures with ImageNet's mean and deviation, as the authors did"}
    )
    low_base: bool = field(
        default=True, metadata={"help": "under run.precision bf16 or fp16 the frozen encoder's weights are of that type, too"}
    )
    lora: LoraConfig = field(default_factory=LoraConfig)
    detection: TaskConfig = field(default_factory=TaskConfig)
    segmentation: TaskConfig = field(default_factory=TaskConfig)
    panoptic: TaskConfig = field(default_factory=TaskConfig)
    pose: TaskConfig = field(default_factory=TaskConfig)
    caption: TaskConfig = field(default_factory=lambda: TaskConfig(weight=0.4, placer="squash", held_out_placer="squash"))
    data: DataConfig = field(default_factory=DataConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def validate(self) -> None:
        """Refuse a stage without what it needs, and settings that contradict each other."""
        if self.stage == "heads":
            if not self.task:
                raise ConfigError(f"--stage heads trains one head: name its --task, one of {', '.join(HEADS)}")
            find("task", HEADS, self.task)
        elif not self.heads:
            raise ConfigError("--stage lora needs the heads of stage 1: --heads RUN1/head,RUN2/head,RUN3/head")
        for task in self.tasks:
            find("task", HEADS, task)
        if not 0 < self.data_share <= 1:
            raise ConfigError(f"data_share is {self.data_share}; a share above 0 and up to 1 is right")
        if self.data.feature_cache and self.stage == "lora":
            raise ConfigError("data.feature_cache is for stage heads: in stage lora the encoder changes with every step")
        for name in TASKS:
            settings = self.of(name)
            if settings.images < 1 or settings.weight < 0 or len(settings.jitter_scale) != 2:
                raise ConfigError(f"{name}: images is at least 1, weight at least 0, jitter_scale two numbers; they are {settings}")
            find("placer", PLACERS, settings.placer)
            find("placer", PLACERS, settings.held_out_placer)
        if self.head_lr < 0 or self.lr < 0:
            raise ConfigError(f"lr is {self.lr}, head_lr {self.head_lr}; 0 or more is right")
        if self.head_lr > 0 and self.stage == "lora":
            self.run.find_unused_parameters = True  # a step trains the head of its own task only
        if self.data.feature_cache and self.of(self.task).placer in RANDOM_PLACERS and not self.data.views:
            raise ConfigError(
                f"{self.task}.placer {self.of(self.task).placer} lays pictures out anew in each epoch, and data.feature_cache keeps what it saw: "
                "give a fixed number of ways with --data.views 2, or a placer without chance (fit, squash)"
            )

    def of(self, task: str) -> TaskConfig:
        """Give a task's settings."""
        found: TaskConfig = getattr(self, task)
        return found

    def files(self, held_out: bool) -> Mapping[str, Path | None]:
        """Give the images, instances, captions and segments of the training or the held-out set; None where none is named."""
        prefix = "held_out_" if held_out else ""
        return {name: Path(value) if (value := getattr(self.data, prefix + name)) else None for name in FILES}


TASKS = ("detection", "segmentation", "panoptic", "pose", "caption")
FILES = ("images", "instances", "captions", "panoptic", "keypoints")
FILE_OF = {"detection": "instances", "segmentation": "instances", "panoptic": "panoptic", "pose": "keypoints", "caption": "captions"}
