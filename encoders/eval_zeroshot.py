"""Zero-shot classification of an image folder: how often the right class name is the nearest text.

    python encoders/eval_zeroshot.py --encoder runs/uta/encoder --images data/classification/test --out runs/eval/uta/mini_zeroshot
    mmkit eval zeroshot --encoder openclip:ViT-B-16/openai --images imagenet/val --classnames imagenet_names.json --out runs/eval/b16

`--images` has one folder a class; the class names are the folders' names, or come from `--classnames`. Writes answers.jsonl (a line an
image, resumable) and summary.json.
"""

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

if __package__ in (None, ""):  # started as a file: its folder is on sys.path, the packages' folder is not
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from torch import Tensor
from tqdm import tqdm

from encoders.catalog import load_encoder
from encoders.modeling import VisionEncoder
from encoders.text import TextTower, load_text_tower
from encoders.zeroshot import cached_weights, label_ranks, load_templates, similarities
from mmkit.checkpoint import atomic_write
from mmkit.config import cli_entry, load_config
from mmkit.errors import ConfigError, DataError
from mmkit.images import ImageError, open_image
from mmkit.manifest import manifest
from mmkit.records import Records, read_jsonl, repair
from mmkit.stats import wilson
from mmkit.trainable import freeze, weights_hash

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
OWN_FILES = ("answers.jsonl", "summary.json", "manifest.json")


@dataclass
class EvalZeroshotConfig:
    """Settings of one evaluation."""

    encoder: str = field(default="", metadata={"help": "an encoder folder, timm:..., openclip:MODEL/TAG, hf:..., or mini-clip"})
    images: str = field(default="", metadata={"help": "folder with one folder of images a class"})
    out: str = field(default="", metadata={"help": "folder for answers.jsonl, summary.json, manifest.json"})
    classnames: str = field(default="", metadata={"help": "names: JSON {folder: name}, or text, one a line; default: the folders' names"})
    text_tower: str = field(default="", metadata={"help": "mini-clip, openclip:MODEL/TAG or a folder; default: the one the encoder names"})
    prompts: str = field(
        default="auto", metadata={"help": "mini, openai (80), name, or a file of lines with {}; auto: the text tower's own"}
    )
    benchmark: str = field(default="zeroshot", metadata={"help": "name in the summary"})
    batch_size: int = field(default=64, metadata={"help": "images encoded at once"})
    device: str = field(default="auto", metadata={"help": "cpu, cuda, ...; auto takes an accelerator if there is one"})
    on_bad_sample: Literal["error", "skip"] = field(default="error", metadata={"help": "an unreadable image: stop, or count it as missing"})
    resume: bool = field(default=False, metadata={"help": "go on in --out where an earlier start stopped"})
    overwrite: bool = field(default=False, metadata={"help": "throw earlier answers in --out away"})

    def validate(self) -> None:
        """Refuse a run without input or output.

        Raises:
            ConfigError: The message names the flag.
        """
        for name in ("encoder", "images", "out"):
            if not getattr(self, name):
                raise ConfigError(f"--{name} is missing; --help lists all settings")
        if self.batch_size < 1:
            raise ConfigError(f"--batch_size is {self.batch_size}; at least 1 is right")
        if self.resume and self.overwrite:
            raise ConfigError("--resume keeps the answers in --out, --overwrite throws them away: give one of them")


@dataclass(frozen=True)
class LabelledImages:
    """Images with their classes.

    Attributes:
        root: Folder that `paths` are relative to.
        paths: Image files, sorted.
        labels: Index of each one's class in `names`.
        names: Class names. There may be more than folders: names to be confused with.
    """

    root: Path
    paths: tuple[str, ...]
    labels: tuple[int, ...]
    names: tuple[str, ...]


def find_images(root: Path, classnames: str = "") -> LabelledImages:
    """List a folder of class folders, images at any depth below each.

    Raises:
        DataError: There are no class folders or images, or the names do not fit the folders.
    """
    if not root.is_dir():
        raise DataError(f"--images {root}: there is no such folder")
    folders = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not folders:
        raise DataError(f"--images {root}: one folder a class was expected in it, with that class's images; it has no folders")
    names, label_of = tuple(folders), {name: index for index, name in enumerate(folders)}
    if classnames:
        names, label_of = _read_names(Path(classnames), folders)
    paths, labels = [], []
    for folder in folders:
        for path in sorted((root / folder).rglob("*")):
            if path.suffix.lower() in SUFFIXES:
                paths.append(path.relative_to(root).as_posix())
                labels.append(label_of[folder])
    if not paths:
        raise DataError(f"--images {root}: {len(folders)} folders, and no image ({', '.join(SUFFIXES)}) in any of them")
    return LabelledImages(root, tuple(paths), tuple(labels), names)


def _read_names(path: Path, folders: Sequence[str]) -> tuple[tuple[str, ...], dict[str, int]]:
    """Names from a file, and which of them each folder bears."""
    if not path.is_file():
        raise DataError(f"--classnames {path}: there is no such file; it is JSON {{folder: name}}, or text with one name a line")
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        try:
            table = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"--classnames {path} is no valid JSON: {error}") from error
        if not isinstance(table, Mapping) or not all(isinstance(name, str) and name.strip() for name in table.values()):
            raise DataError(f"--classnames {path}: an object {{folder: name}} was expected, every name a text")
        absent = [folder for folder in folders if folder not in table]
        if absent:
            raise DataError(f"--classnames {path} has no name for folder '{absent[0]}' ({len(absent)} of {len(folders)} are not in it)")
        return tuple(table.values()), {folder: index for index, folder in enumerate(table)}
    names = tuple(line.strip() for line in text.splitlines() if line.strip())
    place = {name: index for index, name in enumerate(names)}
    absent = [folder for folder in folders if folder not in place]
    if not absent:
        return names, place
    if len(absent) == len(folders) == len(names):  # ImageNet's habit: the lines are in the order of the sorted folders
        print(f"{path}: its lines name the {len(names)} folders in sorted order: {folders[0]} is '{names[0]}' and so on")
        return names, {folder: index for index, folder in enumerate(folders)}
    raise DataError(
        f"--classnames {path}: {len(names)} names, {len(folders)} folders, and folder '{absent[0]}' is none of the names; "
        "give JSON {folder: name}, or one line a folder in sorted order"
    )


def main(argv: Sequence[str] | None = None) -> Path:
    """Evaluate one encoder on one folder.

    Args:
        argv: Command line; None is the process's own.

    Returns:
        The output folder.
    """
    config = load_config(EvalZeroshotConfig, argv)
    out, start = Path(config.out), time.monotonic()
    _refuse_folder(out, config)
    data = find_images(Path(config.images), config.classnames)
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device)
    encoder = freeze(load_encoder(config.encoder))
    torch.nn.Module.to(encoder, device)  # what transformers wraps around `to` has lost its types
    if encoder.joint_width is None:
        raise ConfigError(f"--encoder {config.encoder} has no joint image-text space: zero-shot needs a CLIP-like encoder or a UTA student")
    tower = load_text_tower(config.text_tower or encoder.config.text_tower or "")
    if tower.joint_width != encoder.joint_width:
        raise ConfigError(
            f"--encoder {config.encoder} has joint width {encoder.joint_width}, text tower {tower.name} has {tower.joint_width}: "
            "they belong to different spaces; name the tower it was trained towards with --text_tower"
        )
    prompts = tower.templates if config.prompts == "auto" else config.prompts
    identity = identify(config, data, encoder, tower, prompts)
    _open_folder(out, identity, config)
    weights = cached_weights(tower, data.names, load_templates(prompts))  # [E, C]
    rows = classify_all(encoder, weights, data, config, device)
    summary = summarise(rows, data, config, tower, prompts)
    summary["seconds"] = round(time.monotonic() - start, 1)
    summary["encoder"] = encoder_card(encoder)
    atomic_write(out / "summary.json", json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    _write_manifest(out, identity, "finished", time.monotonic() - start)
    print(as_text(summary))
    return out


# ---- the output folder ---------------------------------------------------------------------------------------------------------------


def identify(config: EvalZeroshotConfig, data: LabelledImages, encoder: VisionEncoder, tower: TextTower, prompts: str) -> dict[str, Any]:
    """All that an answer depends on: answers of another identity must not be mixed with these."""
    return {
        "encoder": config.encoder,
        "encoder_weights": weights_hash(encoder)[:16],
        "text_tower": tower.name,
        "text_weights": weights_hash(tower)[:16],
        "prompts": prompts,
        "classes": len(data.names),
        "images": len(data.paths),
    }


def _refuse_folder(out: Path, config: EvalZeroshotConfig) -> None:
    """Look at the output folder before anything is loaded."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / "manifest.json").is_file():
        raise DataError(f"--out {out} exists and holds no evaluation (no manifest.json in it); give another folder")
    if not (config.resume or config.overwrite):
        raise DataError(f"--out {out} holds an evaluation already; --resume goes on with it, --overwrite throws it away")


def _open_folder(out: Path, identity: Mapping[str, Any], config: EvalZeroshotConfig) -> None:
    """Begin the output folder, or go on in it if it holds answers of the same evaluation."""
    if config.overwrite:
        for name in OWN_FILES:
            (out / name).unlink(missing_ok=True)
    path = out / "manifest.json"
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8")).get("identity", {})
        changed = [f"{key} was {before.get(key)!r}, is {value!r}" for key, value in identity.items() if before.get(key) != value]
        if changed:
            raise DataError(f"--out {out} holds another evaluation: {'; '.join(changed)}. Give another folder, or --overwrite")
    out.mkdir(parents=True, exist_ok=True)
    _write_manifest(out, identity, "running", 0.0)


def _write_manifest(out: Path, identity: Mapping[str, Any], state: str, seconds: float) -> None:
    content = manifest(seconds=seconds, name="eval_zeroshot", state=state, identity=dict(identity))
    atomic_write(out / "manifest.json", json.dumps(content, indent=1) + "\n")


# ---- answers -------------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def classify_all(
    encoder: VisionEncoder, weights: Tensor, data: LabelledImages, config: EvalZeroshotConfig, device: torch.device
) -> list[dict[str, Any]]:
    """Classify what has no answer yet, a batch at a time, each flushed to disk.

    Returns:
        The rows in the order of the images; a row that has no "answer" has "missing", the reason.
    """
    path = Path(config.out) / "answers.jsonl"
    _forget_missing(path)
    weights = weights.to(device)
    label_of = dict(zip(data.paths, data.labels, strict=True))
    with Records(path) as records:
        strange = [name for name in records.done if name not in label_of]
        if strange:
            raise DataError(f"{path} has an answer for {strange[0]}, which is not below {data.root}; give another --out, or --overwrite")
        todo = [name for name in data.paths if name not in records.done]
        description = f"{config.benchmark} · {config.encoder}"
        with tqdm(total=len(data.paths), initial=len(data.paths) - len(todo), desc=description, unit="image") as progress:
            for start in range(0, len(todo), config.batch_size):
                batch = todo[start : start + config.batch_size]
                for row in _classify(encoder, weights, data, batch, label_of, config, device):
                    records.append(row)
                progress.update(len(batch))
        return [records.done[name] for name in data.paths]


def _forget_missing(path: Path) -> None:
    """Drop the rows without an answer, so that a new start tries those images again."""
    if path.is_file():
        repair(path)
        rows = read_jsonl(path)
        if any("missing" in row for row in rows):
            atomic_write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows if "missing" not in row))


def _classify(
    encoder: VisionEncoder, weights: Tensor, data: LabelledImages, batch: Sequence[str], label_of: Mapping[str, int],
    config: EvalZeroshotConfig, device: torch.device,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Rows of one batch."""
    began = time.monotonic()
    transform = encoder.spec.transform(training=False)
    tensors, names = [], []
    for name in batch:
        try:
            tensors.append(transform(open_image(data.root / name, where=f"class folder {name.split('/')[0]}")))
            names.append(name)
        except ImageError as error:
            if config.on_bad_sample == "error":
                raise ImageError(f"{error}\n  --on_bad_sample skip counts such images as missing instead") from error
            yield {"question_id": name, "image": name, "label": data.names[label_of[name]], "missing": str(error)}
    if not names:
        return
    features = encoder(torch.stack(tensors).to(device)).pooler_output  # [b, E]
    scores = similarities(features, weights)  # [b, C]
    ranks = label_ranks(scores, torch.tensor([label_of[name] for name in names], device=device)).tolist()
    best, order = scores.topk(min(5, scores.shape[1]), dim=1)
    seconds = round((time.monotonic() - began) / len(names), 5)
    for name, rank, values, places in zip(names, ranks, best.tolist(), order.tolist(), strict=True):
        found = [data.names[place] for place in places]
        yield {
            "question_id": name,
            "image": name,
            "answer": found[0],
            "label": data.names[label_of[name]],
            "top1": int(rank < 1),
            "top5": int(rank < 5),
            "rank": rank,
            "nearest": found,
            "cosine": [round(value, 4) for value in values],
            "seconds": seconds,
        }


# ---- the summary ---------------------------------------------------------------------------------------------------------------------


def summarise(
    rows: Sequence[Mapping[str, Any]], data: LabelledImages, config: EvalZeroshotConfig, tower: TextTower, prompts: str
) -> dict[str, Any]:
    """Top-1 and top-5 in percent with Wilson 95 % intervals, over the images that have an answer.

    Raises:
        DataError: No image has one.
    """
    answered = [row for row in rows if "missing" not in row]
    if not answered:
        raise DataError(f"none of {len(rows)} images could be read; the first: {rows[0]['missing']}")
    metrics = {}
    for name in ("top1", "top5"):
        right, n = sum(row[name] for row in answered), len(answered)
        low, high = wilson(right, n)
        metrics[name] = {"value": round(100 * right / n, 4), "ci95": [round(100 * low, 4), round(100 * high, 4)], "n": n}
    return {
        "benchmark": config.benchmark,
        "model": config.encoder,
        "protocol": {
            "text_tower": tower.name,
            "prompts": prompts,
            "templates": len(load_templates(prompts)),
            "classes": len(data.names),
            "images": os.path.relpath(data.root, config.out),
            "ties": "counted against the right class",
            "interval": "Wilson, 95 %",
        },
        "n": len(answered),
        "metrics": metrics,
        "missing": len(rows) - len(answered),
        "missing_images": [row["image"] for row in rows if "missing" in row],
    }


def encoder_card(encoder: VisionEncoder) -> dict[str, Any]:
    """What the report says of the encoder."""
    c = encoder.config
    parameters = sum(parameter.numel() for parameter in encoder.parameters())
    return {"architecture": c.architecture, "origin": c.origin, "joint_width": c.joint_width, "image_spec": c.image_spec,
            "text_tower": c.text_tower, "training": c.training, "parameters": parameters}  # fmt: skip


def as_text(summary: Mapping[str, Any]) -> str:
    """The summary in a line or two."""
    figures = ", ".join(
        f"{name} {row['value']:.1f} % ({row['ci95'][0]:.1f} to {row['ci95'][1]:.1f})" for name, row in summary["metrics"].items()
    )
    missing = f"; {summary['missing']} images could not be read" if summary["missing"] else ""
    over = f"{summary['n']} images, {summary['protocol']['classes']} names"
    return f"{summary['benchmark']}, {summary['model']}: {figures} over {over}{missing}"


if __name__ == "__main__":
    cli_entry(main)
