"""The one table of task heads, and how a head becomes a folder and back.

A head folder holds `head.json` (task, settings with categories or words, where it came from) and `model.safetensors`.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from encoders.heads.base import Head, HeadConfig
from encoders.heads.caption import CaptionConfig, CaptionHead
from encoders.heads.detection import DetectionConfig, DetectionHead
from encoders.heads.panoptic import PanopticConfig, PanopticHead
from encoders.heads.pose import PoseConfig, PoseHead
from encoders.heads.segmentation import SegmentationConfig, SegmentationHead
from mmkit.checkpoint import atomic_folder, load_strict, load_weights, save_weights
from mmkit.errors import DataError, find

HEAD_FILE, WEIGHT_FILE = "head.json", "model.safetensors"


@dataclass(frozen=True)
class HeadEntry:
    """A task.

    Attributes:
        config: Class of its settings.
        head: Class of its network.
        scores: What it is measured by.
    """

    config: type[HeadConfig]
    head: type[Head]
    scores: str


HEADS: dict[str, HeadEntry] = {
    "detection": HeadEntry(DetectionConfig, DetectionHead, "box AP"),
    "segmentation": HeadEntry(SegmentationConfig, SegmentationHead, "mask AP"),
    "panoptic": HeadEntry(PanopticConfig, PanopticHead, "PQ"),
    "pose": HeadEntry(PoseConfig, PoseHead, "keypoint AP"),
    "caption": HeadEntry(CaptionConfig, CaptionHead, "CIDEr-D, BLEU"),
}


def build_head(task: str, config: HeadConfig) -> Head:
    """Make a head with random weights, drawn from torch's generator.

    Raises:
        NameNotFound: There is no such task.
        DataError: The settings are another task's.
    """
    entry = find("task", HEADS, task)
    if not isinstance(config, entry.config):
        raise DataError(f"task '{task}' takes a {entry.config.__name__}; it was given a {type(config).__name__}")
    return entry.head(config)


def save_head(head: Head, path: Path | str, origin: str = "", overwrite: bool = False, **more: Any) -> Path:
    """Write a head folder, whole or not at all.

    Args:
        head: The head.
        path: The folder to make.
        origin: Where the weights came from, for people.
        overwrite: Replace a folder of this name.
        more: Other JSON values to keep (the encoder, the canvas).

    Raises:
        FileExistsError: The folder exists and `overwrite` is off.
    """
    path = Path(path)
    with atomic_folder(path, overwrite=overwrite) as folder:
        content = {"task": head.task, "origin": origin, **more, "config": head.config.to_dict()}
        (folder / HEAD_FILE).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        save_weights(head.state_dict(), folder / WEIGHT_FILE)
    return path


def read_head_file(path: Path | str) -> dict[str, Any]:
    """Give the content of a head folder's `head.json`.

    Raises:
        DataError: There is none, or it is damaged.
    """
    file = Path(path) / HEAD_FILE
    if not file.is_file():
        raise DataError(f"{path} is no head folder: it has no {HEAD_FILE}. Stage 1 writes one: mmkit train visft --stage heads --task ...")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{file} is no valid JSON: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("config"), dict) or not isinstance(content.get("task"), str):
        raise DataError(f"{file} should hold an object with task and config; it holds {str(content)[:60]!r}")
    return content


def load_head(path: Path | str, task: str = "", width: int = 0) -> Head:
    """Read a head folder.

    Args:
        path: The folder.
        task: Refuse another task.
        width: Refuse a head for feature maps of another width.

    Raises:
        DataError: The folder is damaged, or the head is for another task or width.
        NameNotFound: Its task is not known here.
    """
    content = read_head_file(path)
    if task and content["task"] != task:
        raise DataError(f"{path} is a {content['task']} head; a {task} head was wanted")
    entry = find("task", HEADS, content["task"])
    config = entry.config.from_dict(content["config"])
    if width and config.width != width:
        raise DataError(f"{path} takes feature maps of width {config.width}; the encoder gives {width}. Train a head behind this encoder")
    head = entry.head(config)
    load_strict(head, load_weights(Path(path) / WEIGHT_FILE), str(Path(path) / WEIGHT_FILE))
    return head
