"""How a training runs: the settings that every training script has under `run`."""

from dataclasses import dataclass, field
from typing import Any, Literal

from mmkit.errors import ConfigError


@dataclass
class RunConfig:
    """How a training runs, whatever it trains."""

    output_dir: str = field(default="", metadata={"help": "the run folder; must be new or empty, unless resume or overwrite is on"})
    steps: int = field(default=0, metadata={"help": "optimizer steps; 0 takes them from epochs"})
    epochs: float = field(default=0.0, metadata={"help": "passes over the data, when steps is 0"})
    micro_batch_size: int = field(default=32, metadata={"help": "samples in one forward, per process"})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "micro-batches in a step; 0 takes it from global_batch_size"})
    global_batch_size: int = field(
        default=0, metadata={"help": "samples in a step; must be micro * accumulation * processes; 0 does not check"}
    )
    group_by_length: int = field(
        default=0, metadata={"help": "sort so many steps' samples by length: less padding; 1 moves none to another step, 0 is off"}
    )
    group_by_modality: bool = field(
        default=False, metadata={"help": "steps of image rows or of text-only rows, not of both; one step of an epoch may be mixed"}
    )
    precision: Literal["fp32", "bf16", "fp16"] = field(default="fp32", metadata={"help": "of the forward; weights and optimizer stay fp32"})
    seed: int = field(default=0, metadata={"help": "of order, augmentation, dropout"})
    max_grad_norm: float = field(default=1.0, metadata={"help": "clip the gradient to this norm; 0 is off"})
    save_every: int = field(default=0, metadata={"help": "steps between checkpoints; 0 is only at the end"})
    keep_checkpoints: int = field(default=2, metadata={"help": "the last ones; 0 keeps all"})
    log_every: int = field(default=10, metadata={"help": "steps between lines of metrics.jsonl"})
    resume: bool = field(default=False, metadata={"help": "go on from the last checkpoint, if there is one"})
    overwrite: bool = field(default=False, metadata={"help": "remove an earlier run in output_dir"})
    num_workers: int = field(default=0, metadata={"help": "processes that load data; 0 loads in the main one"})
    trackers: list[str] = field(default_factory=list, metadata={"help": "beside metrics.jsonl: tensorboard, wandb, ..."})
    deepspeed: dict[str, Any] | str = field(
        default_factory=dict, metadata={"help": "DeepSpeed's settings or their JSON file; used under a launcher"}
    )
    find_unused_parameters: bool = field(default=False, metadata={"help": "DDP: some steps leave trained parameters unused"})

    def validate(self) -> None:
        """Refuse numbers that mean nothing.

        Raises:
            ConfigError: The message names the setting.
        """
        for name, least in {
            "steps": 0,
            "epochs": 0,
            "micro_batch_size": 1,
            "gradient_accumulation_steps": 0,
            "global_batch_size": 0,
        }.items():
            if getattr(self, name) < least:
                raise ConfigError(f"run.{name} is {getattr(self, name)}; at least {least} is right")
        for name in ("max_grad_norm", "save_every", "keep_checkpoints", "num_workers", "group_by_length"):
            if getattr(self, name) < 0:
                raise ConfigError(f"run.{name} is {getattr(self, name)}; 0 or more is right")
        if self.log_every < 1:
            raise ConfigError(f"run.log_every is {self.log_every}; at least 1 is right")
        if self.gradient_accumulation_steps == 0 and self.global_batch_size == 0:
            raise ConfigError("run.gradient_accumulation_steps 0 takes it from run.global_batch_size: give that")


def accumulation_steps(config: RunConfig, ranks: int) -> int:
    """Settle the accumulation, and hold it against the global batch.

    Raises:
        ConfigError: micro * accumulation * ranks is not the global batch.
    """
    micro, wanted = config.micro_batch_size, config.global_batch_size
    accumulation = config.gradient_accumulation_steps or max(1, wanted // (micro * ranks))
    if wanted and micro * accumulation * ranks != wanted:
        raise ConfigError(
            f"run.global_batch_size is {wanted}, and {micro} samples * {accumulation} micro-batches * {ranks} processes are "
            f"{micro * accumulation * ranks}; set --gradient_accumulation_steps or --micro_batch_size so that they agree"
        )
    return accumulation
