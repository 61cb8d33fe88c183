"""Score a head of ViSFT on a COCO-format set: average precision of boxes or masks, panoptic quality, CIDEr-D and BLEU of captions it writes.

    mmkit eval heads --encoder mini-clip --head runs/visft/detection/head --images DATA/images/val --instances DATA/coco/instances_val.json \\
        --out runs/eval/detection
    mmkit eval heads --encoder runs/visft/lora/encoder --any_encoder true ...        under the frozen head, after stage 2

In the output folder: answers.jsonl, what the head found, an image a line, in the form of COCO's result files; summary.json; manifest.json. A
second start with --resume goes on.
"""

import hashlib
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # started as a file: its folder is on sys.path, the packages' folder is not
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from tqdm import tqdm

from encoders.catalog import load_encoder
from encoders.coco_data import CocoTask
from encoders.coco_files import CocoSet, read_coco
from encoders.head_scores import GROUPS, MAIN_SCORE, predict_rows, score_text, score_with_intervals
from encoders.heads.base import Head
from encoders.heads.caption import CaptionHead
from encoders.heads.registry import load_head, read_head_file
from encoders.modeling import VisionEncoder
from encoders.panoptic_files import read_panoptic
from encoders.placement import padding_colour
from encoders.visft_features import FeatureMaps, TaskData
from encoders.visft_settings import FILE_OF
from mmkit.config import cli_entry, load_config
from mmkit.errors import ConfigError, DataError
from mmkit.evaluation import EvaluationFolder, Ranks, merge_parts, part_records, relative
from mmkit.trainable import freeze, weights_hash

RULES = {
    "caption": "CIDEr-D and BLEU, greedy captions",
    "pose": "COCO's keypoint average precision (pycocotools), in true boxes",
    "panoptic": "panoptic quality (Kirillov et al., 2019); void and crowds ignored as in COCO's evaluation",
}


@dataclass
class EvalHeadsConfig:
    """Settings of one evaluation."""

    encoder: str = field(default="", metadata={"help": "the encoder that the head was trained behind"})
    head: str = field(default="", metadata={"help": "a head folder: RUN/head of `mmkit train visft --stage heads`"})
    images: str = field(default="", metadata={"help": "folder of the images"})
    instances: str = field(default="", metadata={"help": "COCO-format instances, for detection and segmentation heads"})
    captions: str = field(default="", metadata={"help": "COCO-format captions, for caption heads"})
    panoptic: str = field(
        default="", metadata={"help": "COCO-format panoptic JSON, its PNGs in the folder of its name, for panoptic heads"}
    )
    keypoints: str = field(default="", metadata={"help": "COCO-format keypoints, for pose heads"})
    out: str = field(default="", metadata={"help": "folder for answers.jsonl, summary.json, manifest.json"})
    benchmark: str = field(default="", metadata={"help": "name in the summary; empty: coco_ and the task"})
    any_encoder: bool = field(default=False, metadata={"help": "also another encoder than the head's own (one that LoRA changed)"})
    canvas: int = field(default=0, metadata={"help": "side that pictures are laid out on; 0: as in the head's training"})
    batch_size: int = field(default=16, metadata={"help": "images at once"})
    limit: int = field(default=0, metadata={"help": "only the first so many images; 0: all"})
    on_bad_sample: str = field(default="error", metadata={"help": "an unreadable picture: error, or skip (counted as missing)"})
    device: str = field(default="auto", metadata={"help": "cpu, cuda, ...; auto takes an accelerator if there is one"})
    resume: bool = field(default=False, metadata={"help": "go on in --out where an earlier start stopped"})
    overwrite: bool = field(default=False, metadata={"help": "throw what is in --out away"})

    def validate(self) -> None:
        """Refuse a run without input or output."""
        for name in ("encoder", "head", "images", "out"):
            if not getattr(self, name):
                raise ConfigError(f"--{name} is missing; --help lists all settings")
        if self.on_bad_sample not in ("error", "skip"):
            raise ConfigError(f"--on_bad_sample is '{self.on_bad_sample}'; error or skip is right")
        if self.batch_size < 1 or self.limit < 0:
            raise ConfigError(f"--batch_size {self.batch_size}, --limit {self.limit}: at least 1 and 0 are right")
        if self.resume and self.overwrite:
            raise ConfigError("--resume keeps what is in --out, --overwrite throws it away: give one of them")


def main(argv: Sequence[str] | None = None) -> Path:
    """Evaluate one head, and give the output folder."""
    config = load_config(EvalHeadsConfig, argv)
    start = time.monotonic()
    folder = EvaluationFolder(config.out, "eval_heads", resume=config.resume, overwrite=config.overwrite)
    folder.refuse()
    about = read_head_file(config.head)
    coco = open_set(config, about["task"])
    encoder, head = open_parts(config, about, coco)
    ranks = Ranks(config.device)
    maps = FeatureMaps(
        encoder, drop_cls=about.get("drop_cls", False), imagenet_norm=about.get("imagenet_norm", False),
        pool=head.config.pool if isinstance(head, CaptionHead) else 0,
    )  # fmt: skip
    canvas = config.canvas or about.get("canvas") or encoder.spec.size
    maps.grid(canvas)
    data = lay_out(config, about["task"], coco, encoder, head, canvas)
    identity = {
        "head": weights_hash(head)[:16],
        "encoder": weights_hash(encoder)[:16],
        "canvas": canvas,
        "set": digest(coco),
        "limit": config.limit,
    }
    folder.open(identity, ranks)
    encoder.to(ranks.device)
    head.to(ranks.device)
    count = min(len(data), config.limit or len(data))
    with part_records(folder.path, ranks) as (records, done):
        todo = [index for index in ranks.share(range(count)) if data.data.images[index].image_id not in done]
        for place in tqdm(range(0, len(todo), config.batch_size), desc=f"{about['task']} head", unit="batch", disable=not ranks.first):
            for row in predict_rows(head, maps, data, todo[place : place + config.batch_size], ranks.device, config.batch_size):
                records.append({"question_id": row["image_id"], **row})
    rows = merge_parts(folder.path, [data.data.images[index].image_id for index in range(count)], ranks)
    if ranks.first:
        summary = summarise(rows, coco, about, config, canvas, count)
        folder.finish({**summary, "seconds": round(time.monotonic() - start, 1)})
        print(
            f"{summary['benchmark']}, {Path(config.head).parent.name}: {score_text(about['task'], scores_of(summary))} over {len(rows)} images"
        )
    ranks.wait()
    return folder.path


def open_set(config: EvalHeadsConfig, task: str) -> CocoSet:
    """Read the annotations that a task is scored by.

    Raises:
        ConfigError: The file of this task is not named.
    """
    name = FILE_OF[task]
    if not getattr(config, name):
        raise ConfigError(f"{config.head} is a {task} head: --{name} FILE is missing")
    if task == "panoptic":
        return read_panoptic(Path(config.images), Path(config.panoptic), on_bad=config.on_bad_sample)  # type: ignore[arg-type]
    kind = "instances" if task == "pose" else name
    found: CocoSet = read_coco(Path(config.images), **{kind: Path(getattr(config, name))}, on_bad=config.on_bad_sample)  # type: ignore[arg-type]
    return found


def open_parts(config: EvalHeadsConfig, about: Mapping[str, Any], coco: CocoSet) -> tuple[VisionEncoder, Head]:
    """Load encoder and head.

    Raises:
        DataError: The head was trained behind another encoder, or knows other categories than the set has.
    """
    encoder = freeze(load_encoder(config.encoder))
    encoder.network.float()
    if not config.any_encoder and about.get("encoder_hash") not in (None, weights_hash(encoder)):
        raise DataError(
            f"{config.head} was trained behind {about.get('encoder', 'another encoder')}, {config.encoder} has other weights: name that one, or "
            "say --any_encoder true (an encoder that LoRA changed under this head)"
        )
    head = load_head(config.head, width=encoder.width).eval()
    if about["task"] != "caption" and coco.classes is not None:
        head.config.classes.check_covers(coco.classes, f"the {about['task']} head", getattr(config, FILE_OF[about["task"]]))
    return encoder, head


def lay_out(config: EvalHeadsConfig, task: str, coco: CocoSet, encoder: VisionEncoder, head: Head, canvas: int) -> TaskData:
    """Put the pictures on canvases, without chance: captioners' squashed, others' fitted."""
    found = CocoTask(
        coco, task, canvas=canvas, fill=padding_colour(encoder.spec.mean), placer="squash" if task == "caption" else "fit", seed=0,  # type: ignore[arg-type]
        vocabulary=head.vocabulary if isinstance(head, CaptionHead) else None, on_bad_sample=config.on_bad_sample,  # type: ignore[arg-type]
    )  # fmt: skip
    return TaskData(found, 1)


def digest(coco: CocoSet) -> str:
    """Of what the images are said to hold."""
    told = [(image.image_id, image.file_name, len(image.objects), image.captions) for image in coco.images]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


def summarise(
    rows: Sequence[Mapping[str, Any]], coco: CocoSet, about: Mapping[str, Any], config: EvalHeadsConfig, canvas: int, count: int
) -> dict[str, Any]:
    """Give the summary."""
    task = about["task"]
    return {
        "benchmark": config.benchmark or f"coco_{task}",
        "model": config.head,
        "encoder": {"source": config.encoder},
        "protocol": {
            "rule": RULES.get(task, "COCO's average precision (pycocotools), 100 objects an image"),
            "canvas": canvas,
            "images": relative(Path(config.images), config.out),
            "head_trained_behind": about.get("encoder", ""),
            "interval": f"95 %, jackknife over {GROUPS} groups of images",
            **({"tokeniser": "ptb_python"} if task == "caption" else {}),
        },
        "n": len(rows),
        "metrics": score_with_intervals(task, rows, coco),
        "item_metric": MAIN_SCORE[task],
        "missing": count - len(rows),
    }


def scores_of(summary: Mapping[str, Any]) -> dict[str, float]:
    """The figures alone."""
    return {name: metric["value"] for name, metric in summary["metrics"].items()}


if __name__ == "__main__":
    cli_entry(main)
