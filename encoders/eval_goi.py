"""Does an encoder's CLS token say what an object is? A linear probe on the frozen encoder (grounded object identification).

    mmkit eval goi --encoder runs/visft/encoder --data M3IT/data/classification/coco-goi --out runs/visft/eval
    mmkit eval goi --encoder eva02-b16 --train coco/annotations/instances_train2017.json --test coco/annotations/instances_val2017.json \\
        --images coco --limit_train 30000 --limit_test 2000 --out runs/eval/eva02-b16
    mmkit eval goi --encoder mini-clip --data DATA --out runs/eval/mini-clip

The paper does not say how the region enters, so there are two protocols, each with a folder of its own below `--out`: `goi_image` reads CLS
of the whole picture, which cannot know which object is meant, `goi_box` CLS of the region cut out (upright, squashed to the encoder's size).

Source: ViSFT: a linear probe on CLS, 30 epochs, M3IT's coco-goi, top-1 and top-5. Optimizer and learning rate are ours.
"""

import hashlib
import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # started as a file: its folder is on sys.path, the packages' folder is not
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from encoders.catalog import load_encoder
from encoders.modeling import VisionEncoder
from encoders.probing import HEADS, ProbeConfig, ProbeImages, fit_head, over_heads, probe_data
from encoders.region_data import Regions, find_regions, read_regions
from encoders.zeroshot import label_ranks
from encoders.zeroshot_pair import encoder_card
from mmkit.checkpoint import atomic_write
from mmkit.config import cli_entry, load_config
from mmkit.errors import ConfigError, DataError
from mmkit.evaluation import EvaluationFolder, Ranks, relative
from mmkit.images import ImageError
from mmkit.optim import cosine_schedule
from mmkit.run import RunConfig
from mmkit.trainable import freeze, weights_hash

PROTOCOLS = {
    "image": "CLS of the whole picture: which object is meant is not said",
    "box": "CLS of the region, cut out upright and squashed to the encoder's size",
}


def _run() -> RunConfig:
    return RunConfig(epochs=30, micro_batch_size=256)


@dataclass
class EvalGoiConfig(ProbeConfig):
    """Settings of the object identification probe."""

    data: str = field(default="", metadata={"help": "folder with both files: M3IT's train.jsonl, val.jsonl, or COCO's instances_*.json"})
    train: str = field(default="", metadata={"help": "the file to learn from, in place of --data"})
    test: str = field(default="", metadata={"help": "the file to be tested on, in place of --data"})
    images: str = field(default="", metadata={"help": "of COCO: folder of the pictures, or of train2017 and val2017; M3IT has them inside"})
    protocols: list[str] = field(default_factory=lambda: list(PROTOCOLS), metadata={"help": "image, box, or both with a comma"})
    benchmark: str = field(default="goi", metadata={"help": "name in the summary, with the protocol behind it"})
    limit_train: int = field(default=0, metadata={"help": "training items, evenly spaced; 0 is all"})
    limit_test: int = field(default=0, metadata={"help": "test items, evenly spaced; 0 is all"})
    lr: float = field(default=1e-3, metadata={"help": "peak learning rate of AdamW, without weight decay; 5 % warm-up, cosine"})
    run: RunConfig = field(default_factory=_run)

    def validate(self) -> None:
        """Refuse a probe without data, and unknown protocols."""
        super().validate()
        if not self.data and not (self.train and self.test):
            raise ConfigError("--data is missing: a folder of M3IT's coco-goi or of COCO's instances; or --train FILE and --test FILE")
        if not self.protocols or set(self.protocols) - set(PROTOCOLS) or len(set(self.protocols)) != len(self.protocols):
            raise ConfigError(f"--protocols {','.join(self.protocols)}: image, box or image,box is right")
        if self.lr <= 0 or min(self.limit_train, self.limit_test) < 0:
            raise ConfigError(
                f"--lr {self.lr}, --limit_train {self.limit_train}, --limit_test {self.limit_test}; above 0, 0 or more are right"
            )


class LinearProbe(nn.Module):
    """Standardised features [B, D] to logits [B, C].

    Args:
        mean, scale: Of the training features [D]; they are kept with the weights.
        classes: C.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, mean: Tensor, scale: Tensor, classes: int) -> None:
        super().__init__()
        self.register_buffer("mean", mean.clone())
        self.register_buffer("scale", scale.clone())
        self.linear = nn.Linear(len(mean), classes)
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Give the logits."""
        logits: Tensor = self.linear((features.float() - self.mean) / self.scale)
        return logits


@dataclass(frozen=True)
class Task:
    """Both splits, the labels that training has, and how many test items were left out, since training never says what they are."""

    train: Regions
    test: Regions
    classes: tuple[str, ...]
    unknown: int


def main(argv: Sequence[str] | None = None) -> Path:
    """Probe one encoder with one protocol or both.

    Args:
        argv: Command line; None is the process's own.

    Returns:
        The output folder.
    """
    config = load_config(EvalGoiConfig, argv)
    out = Path(config.out)
    places = {name: out if len(config.protocols) == 1 else out / f"{config.benchmark}_{name}" for name in config.protocols}
    folders = {
        name: EvaluationFolder(place, "eval_goi", resume=config.resume, overwrite=config.overwrite) for name, place in places.items()
    }
    for folder in folders.values():
        folder.refuse()
    task = read_task(config)
    ranks = Ranks("auto")
    encoder = freeze(load_encoder(config.encoder)).float()
    weights = weights_hash(encoder)[:16]
    nn.Module.to(encoder, ranks.device)
    for name, folder in folders.items():
        run_protocol(name, folder, task, encoder, weights, config, ranks)
    return out


def read_task(config: EvalGoiConfig) -> Task:
    """Read both splits.

    Raises:
        DataError: Training knows one label only, or does not know most of the test's.
    """
    train = read_regions(Path(config.train) if config.train else find_regions(config.data, "train"), config.images, config.limit_train)
    test = read_regions(Path(config.test) if config.test else find_regions(config.data, "test"), config.images, config.limit_test)
    classes = tuple(sorted({train.labels[name] for name in train.names}))
    if len(classes) < 2:
        raise DataError(f"{train.file}: its {len(train)} items have one label, '{classes[0]}'; there is nothing to tell apart")
    known = [name for name in test.names if test.labels[name] in classes]
    if 2 * len(known) < len(test):
        strange = next(test.labels[name] for name in test.names if test.labels[name] not in classes)
        raise DataError(
            f"{len(test) - len(known)} of the {len(test)} items of {test.file} are called what no item of {train.file} is, the first '{strange}'; "
            "are these two splits of one set?"
        )
    return Task(train, replace(test, names=known), classes, len(test) - len(known))


def run_protocol(
    name: str, folder: EvaluationFolder, task: Task, encoder: VisionEncoder, weights: str, config: EvalGoiConfig, ranks: Ranks
) -> None:
    """Train and test the heads of one protocol, and write its folder."""
    start = time.monotonic()
    folder.open(identify(name, task, weights, config), ranks)
    if config.overwrite and ranks.first:
        shutil.rmtree(folder.path / HEADS, ignore_errors=True)
    ranks.wait()
    train, test = (images_of(name, split, encoder, config) for split in (task.train, task.test))
    number = {label: index for index, label in enumerate(task.classes)}
    labels = torch.tensor([number[task.train.labels[item]] for item in train.names])
    data, left_out = probe_data(train, labels, config)
    if data.kept is None:
        raise ConfigError(f"--cache_gb {config.cache_gb} does not hold {len(labels)} CLS tokens; a linear probe needs all of them at once")
    mean, scale = data.kept.mean(dim=0), data.kept.std(dim=0).clamp(min=1e-6)
    heads = [
        fit_head(
            folder.path, seed, lambda: LinearProbe(mean, scale, len(task.classes)), data, F.cross_entropy, lambda batch: float(len(batch["labels"])),
            lambda head: torch.optim.AdamW(head.parameters(), lr=config.lr, weight_decay=0.0), lambda steps: cosine_schedule(steps, 0.05),
            config,
        )
        for seed in config.seeds
    ]  # fmt: skip
    if ranks.first:
        rows = classify(test, task, heads, config, folder.path)
        atomic_write(folder.path / "answers.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        summary = summarise(name, rows, task, left_out, config)
        summary |= {"seconds": round(time.monotonic() - start, 1), "encoder": encoder_card(encoder)}
        folder.finish(summary)
        print(as_text(summary))
    ranks.wait()


def images_of(protocol: str, split: Regions, encoder: VisionEncoder, config: EvalGoiConfig) -> ProbeImages:
    """The pictures of a split, or their regions.

    Raises:
        DataError: The regions are asked for, and no item has one.
    """
    names, spec = split.names, encoder.spec
    if protocol == "image":
        return ProbeImages(encoder, spec, "cls", split.picture, names, config.run.precision)
    names = [name for name in names if split.boxes[name] is not None]
    if not names:
        raise DataError(f"{split.file}: none of {len(split)} items names a region; --protocols image asks for the whole picture")
    return ProbeImages(encoder, replace(spec, resize="squash", crop_pct=1.0), "cls", split.cut, names, config.run.precision)


def identify(protocol: str, task: Task, weights: str, config: EvalGoiConfig) -> dict[str, Any]:
    """All that an answer depends on."""

    def digest(split: Regions) -> str:
        lines = [f"{name} {split.labels[name]} {split.boxes[name]}" for name in split.names]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]

    return {
        "encoder": config.encoder,
        "encoder_weights": weights,
        "protocol": protocol,
        "seeds": config.seeds,
        "training": f"AdamW, lr {config.lr:g}, {config.run.steps or config.run.epochs:g} {'steps' if config.run.steps else 'epochs'}",
        "precision": config.run.precision,
        "train_sha256": digest(task.train),
        "test_sha256": digest(task.test),
    }


@torch.no_grad()
def classify(images: ProbeImages, task: Task, heads: Sequence[nn.Module], config: EvalGoiConfig, folder: Path) -> list[dict[str, Any]]:
    """Let all heads name all test items; gives a row an item.

    Raises:
        ImageError: A picture cannot be read, and `on_bad_sample` is "error".
    """
    number = {label: index for index, label in enumerate(task.classes)}
    rows: list[dict[str, Any]] = []
    for names, features, broken in images.batches(images.names, config.batch_size, config.run.num_workers):
        for bad in broken:
            if config.on_bad_sample == "error":
                raise ImageError(f"{bad.reason}\n  --on_bad_sample skip counts such items as missing instead")
            rows.append({"question_id": bad.name, "missing": bad.reason})
        if not names:
            continue
        labels = torch.tensor([number[task.test.labels[name]] for name in names], device=features.device)
        logits = torch.stack([head(features) for head in heads])  # [heads, b, C]
        ranks = torch.stack([label_ranks(of_head, labels) for of_head in logits]).T.tolist()  # [b, heads]
        best = logits[0].argmax(dim=1).tolist()
        for name, places, answer in zip(names, ranks, best, strict=True):
            top1, top5 = [int(place < 1) for place in places], [int(place < 5) for place in places]
            file = task.test.files.get(name, "")
            rows.append(
                {
                    "question_id": name,
                    **({"image": relative(file, folder)} if file else {}),
                    "answer": task.classes[answer],
                    "label": task.test.labels[name],
                    "right_top1": top1,
                    "right_top5": top5,
                    "score": sum(top1) / len(top1),
                }
            )
    return rows


def summarise(protocol: str, rows: Sequence[dict[str, Any]], task: Task, left_out: dict[str, str], config: EvalGoiConfig) -> dict[str, Any]:
    """Top-1 and top-5 in percent.

    Raises:
        DataError: No test picture could be read.
    """
    answered = [row for row in rows if "missing" not in row]
    if not answered:
        raise DataError(f"none of {len(rows)} test pictures could be read; the first: {rows[0]['missing']}")
    metrics = {
        name: over_heads([sum(right) for right in zip(*(row[f"right_{name}"] for row in answered), strict=True)], len(answered))
        for name in ("top1", "top5")
    }
    most = max(task.classes, key=[task.train.labels[name] for name in task.train.names].count)
    guessed = sum(row["label"] == most for row in answered)
    metrics["most_frequent_answer"] = over_heads([guessed], len(answered))
    return {
        "benchmark": f"{config.benchmark}_{protocol}",
        "model": config.encoder,
        "protocol": {
            "reads": PROTOCOLS[protocol],
            "probe": "linear, on standardised features after the final norm",
            "training": f"AdamW, lr {config.lr:g}, {config.run.steps or config.run.epochs:g} {'steps' if config.run.steps else 'epochs'}",
            "images": ".",
            "classes": len(task.classes),
            "train": len(task.train) - len(left_out),
            "train_left_out": len(left_out),
            "test_items_of_unknown_label": task.unknown,
            "items_without_region": sum(task.test.boxes[name] is None for name in task.test.names),
            "head_seeds": config.seeds,
            "ties": "counted against the right class",
            "interval": "Wilson over items, 95 %, of the heads' mean; ci95_over_seeds: Student's t over the heads",
        },
        "n": len(answered),
        "metrics": metrics,
        "missing": len(rows) - len(answered),
    }


def as_text(summary: dict[str, Any]) -> str:
    """The summary in a line."""
    figures = ", ".join(
        f"{name} {row['value']:.1f} % ({row['ci95'][0]:.1f} to {row['ci95'][1]:.1f})" for name, row in summary["metrics"].items()
    )
    return f"{summary['benchmark']}, {summary['model']}: {figures} over {summary['n']} items, {summary['protocol']['classes']} names"


if __name__ == "__main__":
    cli_entry(main)
