"""What ViSFT's steps cost: stage 1 with cached features against computed ones, stage 2 against the bare encoder, memory with checkpointing.

    OMP_NUM_THREADS=1 python benchmarks/visft_step.py --rounds 5
    python benchmarks/visft_step.py --device cuda --precision bf16 --architecture eva_giant_patch14_clip_224 --rounds 10 \\
        --canvas.detection 672 --canvas.segmentation 1022 --canvas.caption 252 --batch.caption 8

Heads have the paper's sizes; weights, pictures and annotations are random. A stage-1 step begins with the pictures' files (or their records in
the cache) and ends with the head's optimizer. A stage-2 step is forward, backward and the adapter's optimizer, pictures in memory; "plain" is a
forward and backward of the same encoder with all of its weights trained, without head or optimizer; "frozen" the same with the first block's
bias alone trained, so that the backward pass is as long as LoRA's and makes nothing else. All sides take turns within one process, and the
order turns round by round.

On a CPU with one thread the clock is the process's own CPU time; anywhere else it is the wall clock. Peak memory is what a step adds: on CUDA
by torch's own count, on a CPU by the kernel's (resident pages).
"""

import ctypes
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from encoders.coco_classes import COCO_IDS, Classes
from encoders.coco_data import CocoTask
from encoders.coco_files import CocoImage, CocoObject, CocoSet
from encoders.heads.base import Head
from encoders.heads.registry import HEADS, build_head
from encoders.lora import LoraSettings, add_lora
from encoders.modeling import VisionEncoder, VisionEncoderConfig
from encoders.visft_features import FeatureMaps, TaskData, fill
from encoders.visft_held_out import to_device
from encoders.visft_mixture import collate_items
from mmkit.checkpoint import atomic_write
from mmkit.config import cli_entry, load_config
from mmkit.trainable import freeze

GOAL_CACHED = 3.0
WORDS = tuple(f"w{number}" for number in range(9486))  # with the special ones 9,490, as the authors' word map


@dataclass
class BenchmarkConfig:
    """Settings of the measurement."""

    rounds: int = field(default=5, metadata={"help": "times each side is run; the median counts"})
    tasks: list[str] = field(default_factory=lambda: list(HEADS), metadata={"help": "which heads"})
    architecture: str = field(default="vit_base_patch16_clip_224", metadata={"help": "the encoder"})
    model_args: dict[str, Any] = field(default_factory=dict, metadata={"help": "its arguments for timm"})
    canvas: dict[str, int] = field(default_factory=dict, metadata={"help": "side of each task's pictures; left out: the encoder's size"})
    batch: dict[str, int] = field(default_factory=dict, metadata={"help": "images in a step, by task; left out: 2"})
    rank: int = field(default=64, metadata={"help": "of LoRA"})
    device: str = field(default="cpu", metadata={"help": "cpu or cuda"})
    precision: Literal["fp32", "bf16"] = field(
        default="fp32", metadata={"help": "of the encoder's weights and the forward; heads are fp32"}
    )
    out: str = field(default="", metadata={"help": "file for the figures as JSON"})


class Bench:
    """An encoder, pictures, and a clock."""

    def __init__(self, config: BenchmarkConfig, folder: Path) -> None:
        self.config, self.folder, self.device = config, folder, torch.device(config.device)
        self.own_time = config.device == "cpu" and torch.get_num_threads() == 1
        self.coco = random_set(folder, 8)

    def encoder(self) -> VisionEncoder:
        """An encoder with random weights, frozen, on the device."""
        torch.manual_seed(0)
        made = VisionEncoder(VisionEncoderConfig(architecture=self.config.architecture, model_args=self.config.model_args, joint_width=512))
        return freeze(made).to(self.device, torch.bfloat16 if self.config.precision == "bf16" else torch.float32)

    def head(self, task: str, width: int) -> Head:
        """A head of the paper's size."""
        if task == "caption":
            settings: dict[str, Any] = {"words": WORDS}
        else:
            names = [str(number) for number in COCO_IDS]
            make = Classes.raw_ids if task == "detection" else Classes.contiguous
            settings = {"classes": make(COCO_IDS, names).to_dict()}
        return build_head(task, HEADS[task].config.from_dict({"width": width, **settings})).to(self.device)

    def data(self, task: str, canvas: int, head: Any) -> TaskData:
        """Its pictures on canvases, each laid out in one way."""
        vocabulary = head.vocabulary if task == "caption" else None
        return TaskData(CocoTask(self.coco, task, canvas=canvas, fill=(124, 116, 104), placer="squash", vocabulary=vocabulary), 1)  # type: ignore[arg-type]

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision of the forward."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.config.precision == "bf16" else nullcontext()

    def wait(self) -> None:
        """Let the device finish."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def take_turns(self, sides: dict[str, Callable[[], None]]) -> dict[str, float]:
        """Run all sides `rounds` times, each round beginning with another one; gives median seconds."""
        clock = time.process_time if self.own_time else time.perf_counter
        names, times = list(sides), {name: list[float]() for name in sides}
        for side in sides.values():
            side()  # optimizer states and threads are there before the clock starts
        for turn in range(self.config.rounds):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                self.wait()
                begin = clock()
                sides[name]()
                self.wait()
                times[name].append(clock() - begin)
        return {name: statistics.median(found) for name, found in times.items()}

    def peak(self, work: Callable[[], None]) -> float:
        """Give what a step adds to memory at its peak, in GB; NaN where nobody counts."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            work()
            torch.cuda.synchronize()
            return (torch.cuda.max_memory_allocated() - before) / 1e9
        try:
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # what earlier steps freed would hide what this one takes
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return float("nan")
        before_kb = resident("VmRSS")
        work()
        return (resident("VmHWM") - before_kb) * 1024 / 1e9


def resident(name: str) -> int:
    """Read a line of /proc/self/status, kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))


def random_set(folder: Path, pictures: int) -> CocoSet:
    """Write random JPEG pictures of 640 x 480, with seven objects and a caption of ten words each."""
    random = np.random.default_rng(0)
    images = []
    for number in range(pictures):
        small = Image.fromarray(random.integers(0, 256, (30, 40, 3), dtype=np.uint8))
        small.resize((640, 480), Image.Resampling.BICUBIC).save(folder / f"{number}.jpg", quality=90)
        objects = []
        for place in range(7):
            left, top = (float(value) for value in random.integers(0, 300, 2))
            box = (left, top, left + 120, top + 90)
            corners = [left, top, left + 120, top, left + 120, top + 90, left, top + 90]
            objects.append(CocoObject(place, int(random.integers(80)), box, 120.0 * 90, [corners], (480, 640)))
        caption = " ".join(WORDS[int(word)] for word in random.integers(0, len(WORDS), 10))
        images.append(CocoImage(number, f"{number}.jpg", 640, 480, tuple(objects), (caption,)))
    return CocoSet(folder, tuple(images), Classes.contiguous(COCO_IDS, map(str, COCO_IDS)), {})


def stage_one(bench: Bench, task: str, canvas: int, batch: int) -> dict[str, Any]:
    """A head's step from files to optimizer, features computed and cached."""
    encoder = bench.encoder()
    head = bench.head(task, encoder.width)
    maps = FeatureMaps(encoder, pool=head.config.pool if task == "caption" else 0)
    optimizer = torch.optim.AdamW(head.parameters(), lr=5e-5)
    computed, cached = bench.data(task, canvas, head), bench.data(task, canvas, head)
    fill(bench.folder / "features", cached, maps, maps.key(canvas, bench.config.precision, "computed"), bench.device, batch)

    def step(data: TaskData) -> None:
        items = [item for item in (data.get(0, index % len(data)) for index in range(batch)) if item is not None]
        found = to_device(collate_items(items), bench.device)
        with torch.no_grad():
            features = found["features"] if "features" in found else maps(found["pixels"])
        with bench.autocast():
            loss, _ = head(features, found["targets"])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    times = bench.take_turns({"computed": lambda: step(computed), "cached": lambda: step(cached)})
    return {**times, "speedup": times["computed"] / times["cached"]}


def stage_two(bench: Bench, task: str, canvas: int, batch: int) -> dict[str, Any]:
    """A LoRA step under a frozen head against the bare encoder's forward and backward, and the memory of both ways to keep activations."""
    encoder, bare = bench.encoder(), bench.encoder()
    head = freeze(bench.head(task, encoder.width))
    adapter = add_lora(encoder, LoraSettings(rank=bench.config.rank, alpha=1.0), seed=0)
    encoder.to(bench.device)
    maps, plain_maps = FeatureMaps(encoder), FeatureMaps(bare)
    optimizer = torch.optim.AdamW(list(adapter.parameters()), lr=1e-5)
    data = bench.data(task, canvas, head)
    items = [item for item in (data.get(0, index % len(data)) for index in range(batch)) if item is not None]
    found = to_device(collate_items(items), bench.device)

    def step(checkpointing: bool = False) -> None:
        encoder.network.set_grad_checkpointing(checkpointing)
        with bench.autocast():
            loss, _ = head(maps(found["pixels"]), found["targets"])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def plain(trained: bool) -> None:
        bare.requires_grad_(trained)
        bare.network.blocks[0].norm1.bias.requires_grad_(True)  # the backward pass reaches as far down as LoRA's
        with bench.autocast():
            tokens: Tensor = plain_maps(found["pixels"])
        tokens.float().square().mean().backward()
        for parameter in bare.parameters():
            parameter.grad = None

    sides: dict[str, Callable[[], None]] = {
        "step": step,
        "checkpointed": lambda: step(True),
        "plain": lambda: plain(True),
        "frozen": lambda: plain(False),
    }
    times = bench.take_turns(sides)
    memory = {"checkpointed_gb": bench.peak(lambda: step(True)), "gb": bench.peak(lambda: step(False))}
    return {**times, **memory, "over_plain": times["step"] / times["plain"], "over_frozen": times["step"] / times["frozen"]}


def main(argv: Sequence[str] | None = None) -> Path:
    """Measure, print and write."""
    config = load_config(BenchmarkConfig, argv)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(config, Path(folder))
        clock = "CPU time of the process" if bench.own_time else "wall clock"
        print(f"{config.architecture} {config.model_args}, {config.precision}, {config.device}, {clock}, {config.rounds} rounds")
        for task in config.tasks:
            canvas, batch = config.canvas.get(task, 0) or bench.encoder().spec.size, config.batch.get(task, 2)
            one, two = stage_one(bench, task, canvas, batch), stage_two(bench, task, canvas, batch)
            found[task] = {"canvas": canvas, "batch": batch, "stage 1": one, "stage 2": two}
            print(
                f"{task}, {batch} x {canvas} px\n  stage 1: computed {one['computed']:.3f} s, cached {one['cached']:.3f} s: "
                f"{one['speedup']:.1f}x (goal {GOAL_CACHED}x)\n  stage 2: {two['step']:.3f} s, {two['over_plain']:.2f}x of the plain encoder "
                f"({two['plain']:.3f} s), {two['over_frozen']:.2f}x of the frozen one ({two['frozen']:.3f} s)\n  checkpointed: "
                f"{two['checkpointed']:.3f} s; peak {two['gb']:.2f} GB without, {two['checkpointed_gb']:.2f} GB with",
                flush=True,
            )
    if config.out:
        atomic_write(config.out, json.dumps({"clock": clock, **found}, indent=1) + "\n")
    return Path(config.out)


if __name__ == "__main__":
    cli_entry(main)
