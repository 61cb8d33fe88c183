"""What a UTA step costs beside its count of operations: shares of patches kept, and a complementary pair against two single views.

    OMP_NUM_THREADS=1 python benchmarks/uta_step.py --rounds 5
    python benchmarks/uta_step.py --device cuda --precision bf16 --batch 128 --student.patch_size 14 --rounds 20

All sides take turns within one process, and the order turns round by round. Weights and images are random. On a CPU with one thread the clock
is the process's own CPU time, which other programs on the machine do not stretch; anywhere else it is the wall clock.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from encoders.flops import forward_flops
from encoders.masking import kept_count
from encoders.modeling import VisionEncoder, VisionEncoderConfig
from encoders.students import Student
from encoders.teachers import Teacher
from encoders.train_uta import learn
from mmkit.checkpoint import atomic_write
from mmkit.config import cli_entry, load_config
from mmkit.images import ImageSpec

GOAL_KEEP, GOAL_PAIR = 1.15, 1.5
JOINT = 512


@dataclass
class BenchmarkConfig:
    """Settings of the measurement."""

    rounds: int = field(default=5, metadata={"help": "times each side is run; the median counts"})
    batch: int = field(default=8, metadata={"help": "images in a step"})
    pair_batch: int = field(default=0, metadata={"help": "crops in a step of the second part; 0 is batch"})
    keeps: list[float] = field(default_factory=lambda: [1.0, 0.6, 0.5, 0.3], metadata={"help": "shares of patches kept"})
    architecture: str = field(default="eva02_base_patch14_224", metadata={"help": "the student"})
    student: dict[str, Any] = field(default_factory=lambda: {"patch_size": 16}, metadata={"help": "its arguments for timm"})
    teachers: list[str] = field(
        default_factory=lambda: ["vit_base_patch16_clip_224", "vit_large_patch14_clip_224"], metadata={"help": "of the second part"}
    )
    device: str = field(default="cpu", metadata={"help": "cpu or cuda"})
    precision: Literal["fp32", "bf16"] = field(default="fp32", metadata={"help": "of the forward"})
    compile: bool = field(default=False, metadata={"help": "torch.compile the student"})
    out: str = field(default="", metadata={"help": "file for the figures as JSON"})


class Bench:
    """A student, its optimizer, and a clock."""

    def __init__(self, config: BenchmarkConfig) -> None:
        self.config, self.device = config, torch.device(config.device)
        args = {"global_pool": "token", "head_init_scale": 1.0, **config.student}
        encoder = VisionEncoder(VisionEncoderConfig(architecture=config.architecture, model_args=args, joint_width=JOINT))
        self.student = Student(encoder).to(self.device).train()
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=1e-4)
        self.size, self.patches = encoder.config.image_size or 0, encoder.num_patches
        self.own_time = config.device == "cpu" and torch.get_num_threads() == 1
        if config.compile:
            self.student.compile_tokens()

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision of the forward."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.config.precision == "bf16" else nullcontext()

    def keep(self, views: int, kept: int) -> Tensor:
        """Random keep indices [V, K], ascending."""
        return torch.rand(views, self.patches, device=self.device).argsort(dim=1)[:, :kept].sort(dim=1).values

    def step(self, images: Tensor, keep: Tensor, target: Tensor) -> None:
        """One training step of the student."""
        with self.autocast():
            loss, _ = learn("uta", self.student, images, keep, target)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def seconds(self, work: Callable[[], None]) -> float:
        """Time a piece of work."""
        clock = time.process_time if self.own_time else time.perf_counter
        self._wait()
        begin = clock()
        work()
        self._wait()
        return clock() - begin

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def take_turns(self, sides: dict[str, Callable[[], None]]) -> dict[str, float]:
        """Run all sides `rounds` times, each round beginning with another one; gives medians."""
        names, times = list(sides), {name: list[float]() for name in sides}
        for turn in range(self.config.rounds):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                times[name].append(self.seconds(sides[name]))
        return {name: statistics.median(found) for name, found in times.items()}


def shares_kept(bench: Bench) -> list[dict[str, float]]:
    """The student's step at each share of patches kept, against the ratio of operations."""
    config, size = bench.config, bench.size
    images = torch.randn(config.batch, 3, size, size, device=bench.device)
    target = torch.randn(config.batch, 1 + bench.patches, JOINT, device=bench.device)
    counts = {keep: kept_count(bench.patches, 1 - keep) for keep in config.keeps}
    sides: dict[str, Callable[[], None]] = {
        str(keep): lambda kept=kept: bench.step(images, bench.keep(config.batch, kept), target)  # type: ignore[misc]
        for keep, kept in counts.items()
    }
    bench.step(images[:1], bench.keep(1, 4), target[:1])  # the optimizer's state and the threads are there before the clock starts
    found = bench.take_turns(sides)
    flops = {keep: forward_flops(bench.student.encoder, kept) for keep, kept in counts.items()}
    first = config.keeps[0]
    rows = []
    for keep in config.keeps:
        ratio, bound = found[str(keep)] / found[str(first)], flops[keep] / flops[first]
        rate = 3 * flops[keep] * config.batch / found[str(keep)] / 1e9
        rows.append({"keep": keep, "seconds": found[str(keep)], "ratio": ratio, "flop_ratio": bound, "over": ratio / bound, "gflops": rate})
    return rows


def pair_against_singles(bench: Bench, architecture: str) -> dict[str, Any]:
    """Student tokens a second: two complementary views from one pass of the teacher, and two single views of two crops."""
    config, size = bench.config, bench.size
    args = {"img_size": size, "patch_size": size // int(bench.patches**0.5)}
    spec = ImageSpec(size=size).to_dict()
    encoder = VisionEncoder(VisionEncoderConfig(architecture=architecture, model_args=args, joint_width=JOINT, image_spec=spec))
    teacher = Teacher(encoder.eval(), architecture).to(bench.device, torch.bfloat16 if config.precision == "bf16" else None)
    batch, kept = config.pair_batch or config.batch, bench.patches // 2
    images = torch.randn(batch, 3, size, size, device=bench.device)

    def single() -> None:
        for _ in range(2):
            bench.step(images, bench.keep(batch, kept), teacher.tokens(images))

    def pair() -> None:
        order = torch.rand(batch, bench.patches, device=bench.device).argsort(dim=1)
        keep = torch.cat([order[:, :kept], order[:, kept:]])  # [2 B, K]
        bench.step(images.repeat(2, 1, 1, 1), keep, teacher.tokens(images).repeat(2, 1, 1))

    found = bench.take_turns({"single": single, "pair": pair})
    t, s = forward_flops(encoder), forward_flops(bench.student.encoder, kept)
    tokens = 2 * batch * (1 + kept)
    return {
        "teacher": architecture,
        "teacher_gflop": t / 1e9,
        "single_tokens_per_second": tokens / found["single"],
        "pair_tokens_per_second": tokens / found["pair"],
        "speedup": found["single"] / found["pair"],
        "flop_bound": 2 * (t + 3 * s) / (t + 6 * s),
    }


def main(argv: Sequence[str] | None = None) -> Path:
    """Measure, print and write."""
    config = load_config(BenchmarkConfig, argv)
    torch.manual_seed(0)
    bench = Bench(config)
    clock = "CPU time of the process" if bench.own_time else "wall clock"
    print(
        f"{config.architecture} {config.student}, batch {config.batch}, {config.precision}, {config.device}, {clock}, {config.rounds} rounds"
    )
    rows = shares_kept(bench)
    for row in rows:
        goal = f"  (goal {GOAL_KEEP})" if row["keep"] == 0.5 else ""
        print(
            f"keep {row['keep']:<4} {row['seconds']:8.3f} s  ratio {row['ratio']:.3f}  operations {row['flop_ratio']:.3f}  "
            f"over the bound {row['over']:.3f}x{goal}  {row['gflops']:.1f} GFLOP/s",
            flush=True,
        )
    pairs = []
    for architecture in config.teachers:
        row = pair_against_singles(bench, architecture)
        pairs.append(row)
        print(
            f"pair, teacher {architecture}: {row['pair_tokens_per_second']:.0f} student tokens/s, two single views "
            f"{row['single_tokens_per_second']:.0f}: {row['speedup']:.3f}x (goal {GOAL_PAIR}x; operations allow {row['flop_bound']:.3f}x)",
            flush=True,
        )
    if config.out:
        atomic_write(config.out, json.dumps({"clock": clock, "keep": rows, "pair": pairs}, indent=1) + "\n")
    return Path(config.out)


if __name__ == "__main__":
    cli_entry(main)
