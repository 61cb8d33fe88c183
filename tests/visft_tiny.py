"""A world for ViSFT trainings of seconds: pictures of coloured rectangles in COCO's format, a tiny encoder, tiny heads."""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from encoders.modeling import VisionEncoder, VisionEncoderConfig

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
COLOURS = {1: ("red", (220, 40, 40)), 7: ("green", (40, 200, 60))}  # category ids with a gap
HEADS = {
    "detection": {
        "encoder_width": 16, "decoder_width": 16, "encoder_layers": 1, "decoder_layers": 2, "attention_heads": 2, "feedforward": 32,
        "queries": 4, "dropout": 0.0,
    },
    "segmentation": {
        "hidden_width": 32, "encoder_layers": 1, "decoder_layers": 1, "attention_heads": 2, "encoder_feedforward": 32,
        "decoder_feedforward": 32, "queries": 4, "points": 32,
    },
    "caption": {"attention_width": 16, "word_width": 16, "hidden_width": 16, "pool": 4, "dropout": 0.0},
}  # fmt: skip
DATA = ("images", "instances", "captions")


def write_world(folder: Path, train: int = 16, held_out: int = 6) -> Path:
    """Write train/, held_out/, their JSON files and encoder/ into a folder, and give it."""
    torch.manual_seed(5)
    config = VisionEncoderConfig(architecture="vit_base_patch16_clip_224", model_args=SIZES, joint_width=40, text_tower="mini-clip")
    VisionEncoder(config).save_pretrained(folder / "encoder")
    random = np.random.default_rng(0)
    write_set(folder, "train", train, random)
    write_set(folder, "held_out", held_out, random)
    return folder


def write_set(folder: Path, name: str, pictures: int, random: np.random.Generator) -> None:
    """Write one set; the last picture has no object."""
    (folder / name).mkdir(parents=True)
    images, objects, captions = [], [], []
    for number in range(pictures):
        pixels = np.full((40, 40, 3), 230, dtype=np.uint8)
        words = []
        for _ in range(0 if number == pictures - 1 else 1 + number % 2):
            category = (1, 7)[int(random.integers(2))]
            width, height = (int(edge) for edge in random.integers(10, 20, 2))
            left, top = (int(place) for place in random.integers(0, 20, 2))
            pixels[top : top + height, left : left + width] = COLOURS[category][1]
            corners = [left, top, left + width, top, left + width, top + height, left, top + height]
            objects.append(
                {
                    "id": len(objects) + 1, "image_id": number, "category_id": category, "bbox": [left, top, width, height],
                    "area": width * height, "iscrowd": 0, "segmentation": [corners],
                }
            )  # fmt: skip
            words.append(f"a {COLOURS[category][0]} box")
        Image.fromarray(pixels).save(folder / name / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": 40, "height": 40})
        captions.append({"id": number, "image_id": number, "caption": " and ".join(words) or "nothing at all"})
    categories = [{"id": key, "name": value[0]} for key, value in COLOURS.items()]
    (folder / f"{name}_instances.json").write_text(json.dumps({"images": images, "annotations": objects, "categories": categories}))
    (folder / f"{name}_captions.json").write_text(json.dumps({"images": images, "annotations": captions}))


def data_flags(world: Path) -> list[str]:
    """Name the files of both sets."""
    words = []
    for prefix, name in (("", "train"), ("held_out_", "held_out")):
        files = {"images": world / name, "instances": world / f"{name}_instances.json", "captions": world / f"{name}_captions.json"}
        words += [word for key, path in files.items() for word in (f"--data.{prefix}{key}", str(path))]
    return [*words, "--encoder", str(world / "encoder"), "--data.min_count", "1"]


def running(out: Path, steps: int = 6) -> list[str]:
    """Say how long, and how."""
    more = ["--run.micro_batch_size", "4", "--run.log_every", "1", "--warmup", "0", "--lr", "3e-3", "--data.held_out_batch", "2"]
    return ["--run.output_dir", str(out), "--run.steps", str(steps), *more]


def head_flags(world: Path, task: str, out: Path, *more: str, steps: int = 6) -> list[str]:
    """The command line of stage 1."""
    sizes = [word for key, value in HEADS[task].items() for word in (f"--head.{key}", str(value))]
    return [*data_flags(world), "--stage", "heads", "--task", task, *sizes, *running(out, steps), *more]


def lora_flags(world: Path, heads: list[Path], out: Path, *more: str, steps: int = 6) -> list[str]:
    """The command line of stage 2."""
    adapter = ["--lora.rank", "4", "--lora.alpha", "4"]
    return [*data_flags(world), "--stage", "lora", "--heads", ",".join(map(str, heads)), *adapter, *running(out, steps), *more]


def rows(folder: Path, file: str = "metrics.jsonl", without: tuple[str, ...] = ("seconds",)) -> list[dict[str, object]]:
    """Read a log, without what is never the same."""
    found = [json.loads(line) for line in (folder / file).read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in without} for row in found]


def copy_as_killed(run: Path, to: Path, after: int) -> Path:
    """Copy a finished run, and make the copy look as if it had been killed right after it saved a step."""
    shutil.copytree(run, to)
    for checkpoint in (to / "checkpoints").glob("step_*"):
        if int(checkpoint.name.removeprefix("step_")) > after:
            shutil.rmtree(checkpoint)
    for made in ("head", "encoder", "adapter"):
        shutil.rmtree(to / made, ignore_errors=True)
    return to
