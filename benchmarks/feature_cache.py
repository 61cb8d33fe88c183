"""An epoch of LLaVA with cached tower features against the same epoch with the tower running, data loading included.

    OMP_NUM_THREADS=1 python benchmarks/feature_cache.py --rounds 5
    python benchmarks/feature_cache.py --device cuda --encoder openclip:ViT-L-14/openai --llm ORG/MODEL --stage 2 --rounds 5

Both sides take turns within one process and take the same optimizer steps from the same weights; their losses are compared. The pictures are
drawn at random and written as JPEG, so that decoding costs what it does. How much of a step the tower takes is measured and printed: the
goal is meant for a third or more. On a CPU with one thread the clock is the process's own CPU time, which other programs do not stretch;
anywhere else it is the wall clock.
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from PIL import Image

from encoders.modeling import VisionEncoder, VisionEncoderConfig
from llm_stage.conversations import ConversationDataset
from llm_stage.llava import set_stage, supervised_loss
from llm_stage.tower_features import TowerFeatures, cached_images, feature_key
from llm_stage.train_llava import LlavaSettings, Parts, assemble, make_batch, make_dataset
from mmkit.checkpoint import atomic_write
from mmkit.config import cli_entry, load_config

GOAL = 1.3


@dataclass
class BenchmarkConfig:
    """Settings of the measurement."""

    rounds: int = field(default=5, metadata={"help": "epochs of each side; the median counts"})
    rows: int = field(default=32, metadata={"help": "conversations in an epoch, each with a picture of its own"})
    words: int = field(default=40, metadata={"help": "words of each answer"})
    micro_batch_size: int = field(default=4, metadata={"help": "rows in a step"})
    stage: int = field(default=2, metadata={"help": "1 trains the projector, 2 the LLM too"})
    encoder: str = field(default="", metadata={"help": "the tower; empty takes random weights of `architecture`"})
    architecture: str = field(default="vit_small_patch16_224", metadata={"help": "a name of timm: with mini-llm about half of a step"})
    llm: str = field(default="mini-llm", metadata={"help": "the LLM"})
    picture: int = field(default=336, metadata={"help": "pixels of the pictures' edges"})
    device: str = field(default="cpu", metadata={"help": "cpu or cuda"})
    feature_dtype: str = field(default="computed", metadata={"help": "computed or float16"})
    out: str = field(default="", metadata={"help": "file for the figures as JSON"})


def write_world(folder: Path, config: BenchmarkConfig) -> None:
    """Random pictures and conversations about them."""
    generator = np.random.default_rng(0)
    rows = []
    for number in range(config.rows):
        coarse = generator.integers(0, 255, (12, 12, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((config.picture, config.picture), Image.Resampling.BICUBIC).save(folder / f"{number}.jpg")
        answer = " ".join(f"word{value}" for value in generator.integers(0, 50, config.words))
        turns = [{"from": "human", "value": "<image>\nwhat is it"}, {"from": "gpt", "value": answer}]
        rows.append({"id": str(number), "image": f"{number}.jpg", "conversations": turns})
    (folder / "data.json").write_text(json.dumps(rows))
    if not config.encoder:
        torch.manual_seed(0)
        VisionEncoder(VisionEncoderConfig(architecture=config.architecture)).save_pretrained(folder / "encoder")


class Side:
    """One way to train an epoch, with or without the tower: a model of its own, the same for both at the start."""

    def __init__(self, config: BenchmarkConfig, folder: Path, cached: bool) -> None:
        words = [
            "--stage",
            "1",
            "--encoder",
            config.encoder or str(folder / "encoder"),
            "--llm",
            config.llm,
            "--json",
            str(folder / "data.json"),
        ]
        self.settings = load_config(LlavaSettings, [*words, "--images", str(folder), "--data.check", "false"])
        self.config, self.device = config, torch.device(config.device)
        self.parts: Parts = assemble(self.settings)
        set_stage(self.parts.model, train_llm=config.stage == 2)
        self.dataset: ConversationDataset = make_dataset(self.settings, self.parts)
        self.batch_of: Any = partial(make_batch, parts=self.parts)
        self.model: Any = self.parts.model.to(self.device)
        if cached:
            self._use_cache(folder)
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-4)
        self.own_time = config.device == "cpu" and torch.get_num_threads() == 1

    def _use_cache(self, folder: Path) -> None:
        compute = TowerFeatures(self.parts.model, self.device, nullcontext)
        spec = self.parts.model.model.vision_tower.spec
        key = feature_key(compute, self.parts.card.encoder_hash, spec, self.config.feature_dtype)  # type: ignore[arg-type]
        wanted = {name: item.where for item in self.dataset.conversations for name in item.images}
        size = self.config.micro_batch_size
        images = cached_images(folder / "features", compute, key, wanted, folder, spec, batch_size=size)
        self.dataset.image_source = images
        self.batch_of = partial(make_batch, parts=self.parts, blank=images.blank())

    def _clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.process_time() if self.own_time else time.perf_counter()

    def epoch(self) -> tuple[float, list[float]]:
        """Seconds, and the loss of each step."""
        losses, size, begin = [], self.config.micro_batch_size, self._clock()
        for start in range(0, len(self.dataset) // size * size, size):
            batch = self.batch_of([self.dataset[index] for index in range(start, start + size)])
            batch = {name: value.to(self.device) for name, value in batch.items()}
            loss, _ = supervised_loss(self.model, batch)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            losses.append(loss.detach())
        return self._clock() - begin, [float(loss) for loss in losses]

    def tower_share(self) -> float:
        """The tower's part of a step's time, pictures already decoded."""
        batch = self.batch_of([self.dataset[index] for index in range(self.config.micro_batch_size)])
        batch = {name: value.to(self.device) for name, value in batch.items()}
        times: dict[str, list[float]] = {"tower": [], "step": []}
        for _ in range(3):
            begin = self._clock()
            self.model.model.vision_tower(batch["pixel_values"], output_hidden_states=self.model.config.vision_feature_layer)
            times["tower"].append(self._clock() - begin)
            begin = self._clock()
            supervised_loss(self.model, batch)[0].backward()
            times["step"].append(self._clock() - begin)
            self.optimizer.zero_grad()
        return min(times["tower"]) / min(times["step"])


def main(argv: Sequence[str] | None = None) -> Path:
    """Measure, print and write."""
    config = load_config(BenchmarkConfig, argv)
    with tempfile.TemporaryDirectory() as name:
        write_world(Path(name), config)
        sides = {"tower": Side(config, Path(name), cached=False), "cache": Side(config, Path(name), cached=True)}
        share = sides["tower"].tower_share()
        times: dict[str, list[float]] = {side: [] for side in sides}
        apart = 0.0
        for turn in range(config.rounds):
            found = {}
            for side in sorted(sides, reverse=turn % 2 == 1):
                seconds, found[side] = sides[side].epoch()
                times[side].append(seconds)
            apart = max(apart, *(abs(a - b) for a, b in zip(found["tower"], found["cache"], strict=True)))
    medians = {side: statistics.median(seconds) for side, seconds in times.items()}
    clock = "CPU time of the process" if sides["tower"].own_time else "wall clock"
    print(
        f"{config.encoder or config.architecture} + {config.llm}, stage {config.stage}, {config.rows} rows of {config.words} words, {config.device}, {clock}, "
        f"{config.rounds} rounds: the tower is {share:.0%} of a step\n"
        f"epoch with the tower {medians['tower']:.3f} s, with cached features {medians['cache']:.3f} s: "
        f"{medians['tower'] / medians['cache']:.2f}x (goal {GOAL}x); largest difference of losses {apart:.2g}"
    )
    if config.out:
        atomic_write(
            config.out, json.dumps({"clock": clock, "tower_share": share, "largest_difference": apart, "seconds": times}, indent=1) + "\n"
        )
    return Path(config.out)


if __name__ == "__main__":
    cli_entry(main)
