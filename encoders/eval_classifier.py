"""Top-1 and top-5 of a fine-tuned classifier on any folder of its classes: ImageNet-V2, -A, -R, -Sketch after training on ImageNet-1K.

    python encoders/eval_classifier.py --model runs/ft/classifier --images imagenet-v2 --benchmark imagenet_v2 --out runs/ft/imagenet_v2
    mmkit eval classifier --model runs/ft/classifier --images DATA/classification/val --out runs/ft/val

`--images` has one folder a class, named as in training. Where it holds some of the classes only (ImageNet-A, -R), the others' logits are
left out, as is the rule there; `--all_classes` lets them compete. Writes answers.jsonl and summary.json.
"""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

if __package__ in (None, ""):  # started as a file: its folder is on sys.path, the packages' folder is not
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from torch import Tensor, nn

from encoders.class_folders import ClassFolders, match_classes, only_classes, read_class_folders
from encoders.classifier import load_classifier
from encoders.classifier_scores import Loading, answers, classify, metric, relative_root
from mmkit.checkpoint import atomic_folder
from mmkit.config import cli_entry, load_config
from mmkit.errors import ConfigError, DataError
from mmkit.manifest import manifest


@dataclass
class EvalClassifierConfig:
    """Settings of one evaluation."""

    model: str = field(default="", metadata={"help": "a classifier folder: RUN/classifier of train_classifier"})
    images: str = field(default="", metadata={"help": "folder with one folder of images a class"})
    out: str = field(default="", metadata={"help": "folder for answers.jsonl, summary.json, manifest.json"})
    benchmark: str = field(default="classification", metadata={"help": "name in the summary"})
    all_classes: bool = field(default=False, metadata={"help": "classes without a folder here compete too"})
    batch_size: int = field(default=64, metadata={"help": "images classified at once"})
    num_workers: int = field(default=0, metadata={"help": "processes that read images"})
    device: str = field(default="auto", metadata={"help": "cpu, cuda, ...; auto takes an accelerator if there is one"})
    on_bad_sample: Literal["error", "skip"] = field(default="error", metadata={"help": "an unreadable image: stop, or count it as missing"})
    overwrite: bool = field(default=False, metadata={"help": "replace an earlier evaluation in --out"})

    def validate(self) -> None:
        """Refuse an evaluation without input or output.

        Raises:
            ConfigError: The message names the flag.
        """
        for name in ("model", "images", "out"):
            if not getattr(self, name):
                raise ConfigError(f"--{name} is missing; --help lists all settings")
        if self.batch_size < 1 or self.num_workers < 0:
            raise ConfigError(f"--batch_size {self.batch_size}, --num_workers {self.num_workers}; at least 1 and 0 are right")


class SomeLogits(nn.Module):
    """A classifier that knows some of its classes only.

    Args:
        network: Images to logits [B, C].
        labels: The classes kept, in the order wanted.
    """

    labels: Tensor

    def __init__(self, network: nn.Module, labels: Sequence[int]) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("labels", torch.tensor(labels), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Give logits [B, len(labels)]."""
        logits: Tensor = self.network(images)
        return logits[:, self.labels]


def main(argv: Sequence[str] | None = None) -> Path:
    """Evaluate one classifier on one folder, and give the output folder."""
    config = load_config(EvalClassifierConfig, argv)
    out, begin = Path(config.out), time.monotonic()
    if out.exists() and any(out.iterdir()) and not (config.overwrite and (out / "summary.json").is_file()):
        raise DataError(f"--out {out} holds files already; --overwrite replaces an earlier evaluation (a folder with summary.json)")
    classifier = load_classifier(Path(config.model))
    found = read_class_folders(config.images, "--images")
    known = ClassFolders(Path(config.model), classifier.class_names, (), ())
    data, network = match_classes(known, found, subset=True, setting="--images"), classifier.network
    if not config.all_classes and len(found.names) < len(known.names):
        network = SomeLogits(network, [classifier.class_names.index(name) for name in found.names])
        data = only_classes(data, found.names)
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device)
    loading = Loading(config.batch_size, config.num_workers, config.on_bad_sample)
    rows = classify({"classifier": network.to(device)}, data, classifier.spec, device, loading)["classifier"]
    missing = sum("missing" in row for row in rows)
    summary = {
        "benchmark": config.benchmark,
        "model": config.model,
        "protocol": {
            "classes": len(data.names), "classes_trained": len(known.names), "crop_pct": classifier.spec.crop_pct,
            "input_size": classifier.spec.size, "images": relative_root(data, out), "ties": "counted against the right class",
            "interval": "Wilson, 95 %",
        },
        "n": len(rows) - missing,
        "metrics": {f"top{k}": metric(rows, k) for k in (1, 5)},
        "missing": missing,
        "seconds": round(time.monotonic() - begin, 1),
    }  # fmt: skip
    with atomic_folder(out, overwrite=True) as folder:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in answers(rows, data)]
        (folder / "answers.jsonl").write_text("".join(lines), encoding="utf-8")
        (folder / "summary.json").write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        facts = manifest(seconds=time.monotonic() - begin, device=device, name="eval_classifier", state="finished")
        (folder / "manifest.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    one, five = (metric(rows, k) for k in (1, 5))
    low, high = one["ci95"]
    print(
        f"{config.benchmark}, {config.model}: top1 {one['value']:.2f} % ({low:.2f} to {high:.2f}), top5 {five['value']:.2f} % over {one['n']} images"
    )
    return out


if __name__ == "__main__":
    cli_entry(main)
