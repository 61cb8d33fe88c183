"""Zero-shot classification: how often the right class name is the nearest text.

    mmkit eval zeroshot --encoder runs/uta/encoder --images data/classification/test --out runs/eval/uta/zeroshot
    mmkit eval zeroshot --encoder openclip:ViT-B-16/openai --benchmark imagenet --images imagenet --out runs/eval/b16/imagenet
    torchrun --nproc_per_node 8 encoders/eval_zeroshot.py --encoder E --benchmark imagenet_six --images DATA_SETS --out runs/eval/e

Alone, `--images` is the benchmark's folder (for your own: one folder a class, named by it or by `--classnames`), or a folder of webdataset
shards with `classnames.txt`. With several benchmarks (`imagenet_six`, `all`, or names with commas) it is the folder that holds theirs, each
gets a folder of its own in `--out`, and their plain mean is written beside them. Every folder gets answers.jsonl (a line an image,
resumable) and summary.json.
"""

import hashlib
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

from encoders.image_batches import Broken, batches
from encoders.labelled_shards import has_shards, labelled_shards
from encoders.modeling import VisionEncoder
from encoders.text import TextTower
from encoders.zeroshot import Template, cached_weights, label_ranks, load_templates, similarities
from encoders.zeroshot_layouts import LabelledImages
from encoders.zeroshot_pair import Pair, autocast, encoder_card, load_pair
from encoders.zeroshot_sets import IMAGENET_SIX, SETS, choose, own_folders, place_of
from mmkit.config import cli_entry, load_config
from mmkit.errors import ConfigError, DataError
from mmkit.evaluation import EvaluationFolder, Ranks, mean_of_shares, merge_parts, part_records, relative, share_metric
from mmkit.images import ImageError

OWN = ("zeroshot", "mini_zeroshot")  # benchmarks whose classes are the user's folders


@dataclass
class EvalZeroshotConfig:
    """Settings of one evaluation."""

    encoder: str = field(default="", metadata={"help": "an encoder folder, timm:..., openclip:MODEL/TAG, hf:..., or mini-clip"})
    images: str = field(default="", metadata={"help": "the benchmark's folder; with several benchmarks the folder that holds theirs"})
    out: str = field(default="", metadata={"help": "folder for answers.jsonl, summary.json, manifest.json"})
    benchmark: str = field(default="zeroshot", metadata={"help": f"{', '.join(SETS)}; imagenet_six, all, or several with commas"})
    classnames: str = field(default="", metadata={"help": "names: JSON {folder: name}, or text, one a line; default: the folders' names"})
    text_tower: str = field(default="", metadata={"help": "mini-clip, openclip:MODEL/TAG or a folder; default: the one the encoder names"})
    prompts: str = field(
        default="auto",
        metadata={"help": "openai (80), mini, name, ... or a file of lines with {}; auto: the benchmark's, else the text tower's own"},
    )
    batch_size: int = field(default=64, metadata={"help": "images encoded at once"})
    workers: int = field(default=0, metadata={"help": "processes that open images, for each rank; 0 opens them in between"})
    precision: Literal["fp32", "bf16"] = field(default="fp32", metadata={"help": "of the image tower; scores are taken in fp32"})
    device: str = field(default="auto", metadata={"help": "cpu, cuda, ...; auto takes an accelerator if there is one"})
    on_bad_sample: Literal["error", "skip"] = field(default="error", metadata={"help": "an unreadable image: stop, or count it as missing"})
    partial: bool = field(default=False, metadata={"help": "take what is there where class folders are missing or empty"})
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
        if self.batch_size < 1 or self.workers < 0:
            raise ConfigError(f"--batch_size {self.batch_size}, --workers {self.workers}; at least 1 and at least 0 are right")
        if self.resume and self.overwrite:
            raise ConfigError("--resume keeps the answers in --out, --overwrite throws them away: give one of them")
        if self.classnames and self.benchmark not in OWN and not has_shards(Path(self.images)):
            raise ConfigError(f"--classnames goes with your own data (--benchmark zeroshot); the names of {self.benchmark} are fixed")


@dataclass(frozen=True)
class Task:
    """One benchmark of this start: its data, its prompts and where its result goes."""

    name: str
    data: LabelledImages
    prompts: str
    templates: Sequence[Template]
    folder: EvaluationFolder


def main(argv: Sequence[str] | None = None) -> Path:
    """Evaluate one encoder on one benchmark or several.

    Args:
        argv: Command line; None is the process's own.

    Returns:
        The output folder.
    """
    config = load_config(EvalZeroshotConfig, argv)
    names = choose(config.benchmark)
    out = Path(config.out)
    folders = {name: _folder(out if len(names) == 1 else out / name, config) for name in names}
    data = {name: _find(name, config, alone=len(names) == 1) for name in names}
    ranks = Ranks(config.device)
    pair = load_pair(config.encoder, config.text_tower, ranks.device)
    tasks = [_task(name, data[name], folders[name], pair.tower, config) for name in names]
    summaries = {task.name: evaluate(task, pair, config, ranks) for task in tasks}
    if len(names) > 1 and ranks.first:
        write_mean(out, summaries, config)
    ranks.wait()
    return out


def _folder(path: Path, config: EvalZeroshotConfig) -> EvaluationFolder:
    folder = EvaluationFolder(path, "eval_zeroshot", resume=config.resume, overwrite=config.overwrite)
    folder.refuse()
    return folder


def _find(name: str, config: EvalZeroshotConfig, alone: bool) -> LabelledImages:
    root = place_of(name, Path(config.images), alone)
    if has_shards(root):
        return labelled_shards(root, config.classnames)
    if name in OWN:
        return own_folders(root, config.partial, config.classnames)
    return SETS[name].find(root, config.partial)


def _task(name: str, data: LabelledImages, folder: EvaluationFolder, tower: TextTower, config: EvalZeroshotConfig) -> Task:
    prompts = config.prompts if config.prompts != "auto" else SETS[name].prompts or tower.templates
    return Task(name, data, prompts, load_templates(prompts), folder)


def evaluate(task: Task, pair: Pair, config: EvalZeroshotConfig, ranks: Ranks) -> dict[str, Any]:
    """Run one benchmark and write its folder.

    Returns:
        Its summary.
    """
    start = time.monotonic()
    task.folder.open(identify(task, pair, config), ranks)
    with ranks.first_goes_first():
        weights = cached_weights(pair.tower, task.data.names, task.templates)  # [E, C]
    classify_all(pair.encoder, weights, task, config, ranks)
    rows = merge_parts(task.folder.path, task.data.paths, ranks)
    summary = summarise(rows, task, pair, config, ranks)
    summary["seconds"] = round(time.monotonic() - start, 1)
    summary["encoder"] = encoder_card(pair.encoder)
    if ranks.first:
        task.folder.finish(summary)
        print(as_text(summary))
    return summary


def identify(task: Task, pair: Pair, config: EvalZeroshotConfig) -> dict[str, Any]:
    """All that an answer depends on: answers of another identity must not be mixed with these."""
    asked = "\n".join(template(name) for name in task.data.names for template in task.templates)
    listed = "\n".join(f"{path} {label}" for path, label in zip(task.data.paths, task.data.labels, strict=True))
    return {
        **pair.identity,
        "prompts": task.prompts,
        "classes": len(task.data.names),
        "images": len(task.data.paths),
        "precision": config.precision,
        "texts_sha256": hashlib.sha256(asked.encode()).hexdigest()[:16],
        "images_sha256": hashlib.sha256(listed.encode()).hexdigest()[:16],
    }


# ---- answers -------------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def classify_all(encoder: VisionEncoder, weights: Tensor, task: Task, config: EvalZeroshotConfig, ranks: Ranks) -> None:
    """Classify this process's share of what has no answer yet, a batch at a time, each flushed to disk."""
    data = task.data
    weights = weights.to(ranks.device)
    label_of = dict(zip(data.paths, data.labels, strict=True))
    with part_records(task.folder.path, ranks) as (records, done):
        strange = [name for name in done if name not in label_of]
        if strange:
            where = task.folder.path / "answers.jsonl"
            raise DataError(f"{where} has an answer for {strange[0]}, which is not below {data.root}; give another --out, or --overwrite")
        todo = ranks.share([name for name in data.paths if name not in done])
        described = f"{task.name} · {config.encoder}" + (f" · rank 0 of {ranks.count}" if ranks.count > 1 else "")
        progress = tqdm(
            total=len(todo) + len(done), initial=len(done), desc=described, unit="image", disable=not ranks.first
        )  # fmt: skip
        with progress:
            for names, images, broken in batches(data.source, todo, encoder.spec, config.batch_size, config.workers):
                for bad in broken:
                    records.append(_missing_row(bad, data, label_of, config))
                if names:
                    for row in _classify(encoder, weights, data, names, images, label_of, config):
                        records.append(row)
                progress.update(len(names) + len(broken))


def _missing_row(bad: Broken, data: LabelledImages, label_of: Mapping[str, int], config: EvalZeroshotConfig) -> dict[str, Any]:
    if config.on_bad_sample == "error":
        raise ImageError(
            f"{bad.reason} (class '{data.names[label_of[bad.name]]}')\n  --on_bad_sample skip counts such images as missing instead"
        )
    return {"question_id": bad.name, "image": bad.name, "label": data.names[label_of[bad.name]], "missing": bad.reason}


def _classify(
    encoder: VisionEncoder, weights: Tensor, data: LabelledImages, names: Sequence[str], images: Tensor, label_of: Mapping[str, int],
    config: EvalZeroshotConfig,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Rows of one batch: images [b, 3, H, W]."""
    began = time.monotonic()
    with autocast(weights.device, config.precision):
        features = encoder(images.to(weights.device)).pooler_output  # [b, E]
    scores = similarities(features, weights)  # [b, C]
    ranks = label_ranks(scores, torch.tensor([label_of[name] for name in names], device=weights.device)).tolist()
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
    rows: Sequence[Mapping[str, Any]], task: Task, pair: Pair, config: EvalZeroshotConfig, ranks: Ranks
) -> dict[str, Any]:  # fmt: skip
    """Top-1 and top-5 in percent with Wilson 95 % intervals, over the images that have an answer; for known benchmarks the mean per class.

    Raises:
        DataError: No image has one.
    """
    answered = [row for row in rows if "missing" not in row]
    if not answered:
        raise DataError(f"none of {len(rows)} images could be read; the first: {rows[0]['missing']}")
    metrics = {name: share_metric(sum(row[name] for row in answered), len(answered)) for name in ("top1", "top5")}
    known = SETS[task.name]
    if task.name not in OWN:
        metrics["mean_per_class"] = mean_per_class(answered, task.data)
    notes = [*task.data.notes, *([known.note] if known.note else [])]
    if known.images and known.images != len(rows):
        notes.append(f"{len(rows)} images; the whole benchmark has {known.images}")
    twice = len(task.data.names) - len(set(task.data.names))
    if twice:
        notes.append(f"{twice} class names occur twice: their classes tie, and a tie is wrong")
    return {
        "benchmark": task.name,
        "model": config.encoder,
        "protocol": {
            "text_tower": pair.tower.name,
            "prompts": task.prompts,
            "templates": len(task.templates),
            "classes": len(task.data.names),
            "images": relative(task.data.root, task.folder.path),
            "ties": "counted against the right class",
            "interval": "Wilson, 95 %",
            "precision": config.precision,
            "processes": ranks.count,
            **({"notes": notes} if notes else {}),
        },
        "n": len(answered),
        "metrics": metrics,
        "missing": len(rows) - len(answered),
        "missing_images": [row["image"] for row in rows if "missing" in row],
    }


def mean_per_class(answered: Sequence[Mapping[str, Any]], data: LabelledImages) -> dict[str, Any]:
    """Top-1 of each class, averaged over the classes that have images (balanced accuracy)."""
    label_of = dict(zip(data.paths, data.labels, strict=True))
    right: dict[int, list[int]] = {}
    for row in answered:
        right.setdefault(label_of[row["question_id"]], []).append(row["top1"])
    return mean_of_shares([(sum(hits) / len(hits), len(hits)) for hits in right.values()])


def write_mean(out: Path, summaries: Mapping[str, Mapping[str, Any]], config: EvalZeroshotConfig) -> None:
    """Write the plain mean over the benchmarks into a folder of its own: `imagenet_six` where they are UTA's six, else `mean`."""
    name = "imagenet_six" if tuple(summaries) == IMAGENET_SIX else "mean"
    metrics: dict[str, Any] = {}
    for metric in ("top1", "top5"):
        rows = {key: summary["metrics"][metric] for key, summary in summaries.items()}
        metrics[metric] = mean_of_shares([(row["value"] / 100, row["n"]) for row in rows.values()])
        metrics |= {f"{metric}/{key}": row for key, row in rows.items()}
    first = next(iter(summaries.values()))
    summary = {
        "benchmark": name,
        "model": config.encoder,
        "protocol": {
            "benchmarks": list(summaries),
            "mean": "plain, each benchmark counts alike",
            "interval": "normal, 95 %, images independent",
        },
        "n": sum(summary["n"] for summary in summaries.values()),
        "metrics": metrics,
        "seconds": round(sum(summary["seconds"] for summary in summaries.values()), 1),
        "missing": sum(summary["missing"] for summary in summaries.values()),
        "encoder": first["encoder"],
    }
    folder = EvaluationFolder(out / name, "eval_zeroshot", resume=True)
    folder.finish(summary)
    print(
        f"{name}, {config.encoder}: " + ", ".join(f"{key} {row['value']:.1f} %" for key, row in metrics.items() if key.startswith("top1"))
    )


def as_text(summary: Mapping[str, Any]) -> str:
    """The summary in a line or two."""
    figures = ", ".join(
        f"{name} {row['value']:.1f} % ({row['ci95'][0]:.1f} to {row['ci95'][1]:.1f})" for name, row in summary["metrics"].items()
    )
    missing = f"; {summary['missing']} images could not be read" if summary["missing"] else ""
    over = f"{summary['n']} images, {summary['protocol']['classes']} names"
    notes = "".join(f"\n  {note}" for note in summary["protocol"].get("notes", []))
    return f"{summary['benchmark']}, {summary['model']}: {figures} over {over}{missing}{notes}"


if __name__ == "__main__":
    cli_entry(main)
