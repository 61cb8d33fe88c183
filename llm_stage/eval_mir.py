"""Modality integration rate: how well a projector has brought image tokens to where the LLM has its text tokens (llm_stage/mir.py).

    mmkit eval mir --model runs/stage1/model --texts data/llava/pretrain.json --images data/images --out runs/stage1/mir

A pair is an image and a text: a user turn that holds the image alone, an answer that is the text. In the output folder: `summary.json` with
MIR, its interval and each layer's part; `manifest.json`. Lower is better; only figures with the same pairs and template may be compared.
"""

from __future__ import annotations

import json
import math
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

if __package__ in (None, ""):  # started as a file: its folder is on sys.path, the packages' folder is not
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from llm_stage.chat_format import ChatFormat, Turn
from llm_stage.conversations import parse_row, read_rows
from llm_stage.generate import ChatModel
from llm_stage.mir import Mir, PairBatch, modality_integration_rate
from mmkit.config import cli_entry, load_config
from mmkit.errors import ConfigError, DataError
from mmkit.evaluation import EvaluationFolder, Ranks, relative
from mmkit.images import open_image
from mmkit.stats import Z95

PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class EvalMirConfig:
    """Settings of one evaluation."""

    model: str = field(default="", metadata={"help": "folder of a LLaVA model of any stage; RUN/model"})
    texts: str = field(default="", metadata={"help": "LLaVA JSON or JSONL, COCO captions JSON, or a text file with a text a line"})
    images: str = field(default="", metadata={"help": "folder the images' names are relative to; texts without an image take one of it"})
    out: str = field(default="", metadata={"help": "folder for summary.json and manifest.json"})
    pairs: int = field(default=100, metadata={"help": "image-text pairs, drawn at random; the paper's code takes 100"})
    seed: int = field(default=0, metadata={"help": "of the draw; the same for all models that are compared"})
    max_length: int = field(default=2048, metadata={"help": "tokens of a pair; longer texts are cut"})
    template: str = field(default="", metadata={"help": "plain, vicuna_v1, ..., own; empty takes that of the model's training"})
    groups: int = field(default=5, metadata={"help": "leaves out a group of pairs in turn, for the interval; at least 2"})
    batch_size: int = field(default=4, metadata={"help": "pairs at once"})
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = field(
        default="auto", metadata={"help": "of the weights; auto: fp32 on a CPU, else bf16"}
    )
    device: str = field(default="auto", metadata={"help": "cpu, cuda, ...; auto takes an accelerator if there is one"})
    memory_gb: float = field(default=4.0, metadata={"help": "for second moments; less of it means more passes"})
    overwrite: bool = field(default=False, metadata={"help": "throw an earlier result in --out away"})

    def validate(self) -> None:
        """Refuse a run without input or output.

        Raises:
            ConfigError: The message names the flag.
        """
        for name in ("model", "texts", "images", "out"):
            if not getattr(self, name):
                raise ConfigError(f"--{name} is missing; --help lists all settings")
        if not Path(self.images).is_dir():
            raise ConfigError(f"--images '{self.images}' is no folder")
        if self.pairs < 2 or not 2 <= self.groups <= self.pairs or self.batch_size < 1 or self.memory_gb <= 0:
            raise ConfigError(
                f"--pairs {self.pairs}, --groups {self.groups}, --batch_size {self.batch_size}, --memory_gb {self.memory_gb}: two pairs or "
                "more, groups from 2 to as many, the others above 0"
            )


@dataclass(frozen=True)
class Pair:
    """An image (relative to the image folder) and a text."""

    image: str
    text: str


def main(argv: Sequence[str] | None = None) -> Path:
    """Evaluate one model.

    Args:
        argv: Command line; None is the process's own.

    Returns:
        The output folder.
    """
    config = load_config(EvalMirConfig, argv)
    start = time.monotonic()
    folder = EvaluationFolder(config.out, "eval_mir", overwrite=config.overwrite)
    folder.refuse()
    ranks = Ranks(config.device)
    if ranks.count > 1:
        raise ConfigError(f"eval_mir runs in one process, {ranks.count} were started: start it without a launcher")
    pairs = draw(read_pairs(config), config)
    chat = ChatModel.load(config.model, device=ranks.device, dtype=DTYPES.get(config.dtype), template=config.template or None)
    encoded = encode(chat, pairs, config)
    folder.open(identify(config, pairs), ranks)
    found = modality_integration_rate(
        chat.model, lambda: batches(chat, pairs, encoded, config), groups=config.groups, memory=config.memory_gb * 1e9
    )
    summary = summarise(found, chat, pairs, config)
    summary["seconds"] = round(time.monotonic() - start, 1)
    folder.finish(summary)
    print(as_text(summary))
    return Path(config.out)


# ---- pairs ---------------------------------------------------------------------------------------------------------------------------


def read_pairs(config: EvalMirConfig) -> list[Pair]:
    """All pairs that the texts make; a text without an image of its own takes one from the folder, in a seeded order.

    Raises:
        DataError: The file is none of the three kinds, a row is bad, or the folder has no images for texts that need one.
    """
    path = Path(config.texts)
    found = _from_lines(path) if path.suffix == ".txt" else _from_captions(path) or _from_conversations(path)
    if not found:
        raise DataError(f"--texts {path} holds no text")
    if all(pair.image for pair in found):
        return found
    root = Path(config.images)
    pictures = sorted(str(file.relative_to(root)) for file in root.rglob("*") if file.suffix.lower() in PICTURES)
    if not pictures:
        raise DataError(f"--images {root} holds no picture ({', '.join(sorted(PICTURES))}), and texts of {path} name none")
    random.Random(config.seed).shuffle(pictures)
    return [pair if pair.image else Pair(pictures[index % len(pictures)], pair.text) for index, pair in enumerate(found)]


def _from_lines(path: Path) -> list[Pair]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--texts {path} cannot be read as text: {error}") from error
    return [Pair("", line.strip()) for line in lines if line.strip()]


def _from_captions(path: Path) -> list[Pair]:
    """COCO captions; empty where the file is something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        names = {row["id"]: row["file_name"] for row in content["images"]}
        return [Pair(names[row["image_id"]], row["caption"].strip()) for row in content["annotations"]]
    except (OSError, ValueError, TypeError, KeyError):
        return []


def _from_conversations(path: Path) -> list[Pair]:
    """LLaVA rows of one image or none; the text is their answers."""
    found = []
    for index, row in enumerate(read_rows(path)):
        item = parse_row(row, f"{path}, row {index}")
        if len(item.images) < 2:
            text = "\n".join(turn.text.strip() for turn in item.turns if turn.role == "assistant")
            found.append(Pair(item.images[0] if item.images else "", text))
    return found


def draw(pairs: list[Pair], config: EvalMirConfig) -> list[Pair]:
    """Draw the pairs that are used.

    Raises:
        DataError: There are fewer than groups.
    """
    if len(pairs) < config.groups:
        raise DataError(f"--texts {config.texts} makes {len(pairs)} pair(s), --groups is {config.groups}: give more texts")
    if len(pairs) < config.pairs:
        print(f"{config.texts}: {len(pairs)} pairs, fewer than the {config.pairs} asked for; all are taken")
    return random.Random(config.seed).sample(pairs, min(config.pairs, len(pairs)))


def encode(chat: ChatModel, pairs: Sequence[Pair], config: EvalMirConfig) -> list[list[int]]:
    """Token ids of each pair.

    Raises:
        ConfigError: The model's folder has no template and none was given, or max_length leaves no room for a text.
    """
    if chat.chat_format is None:
        chat_format = ChatFormat(chat.tokenizer, "own")
    else:
        chat_format = chat.chat_format
    limit = min(config.max_length, getattr(chat.model.config.text_config, "max_position_embeddings", None) or config.max_length)
    encoded = []
    for pair in pairs:
        ids = chat_format.encode([Turn("user", "<image>\n"), Turn("assistant", pair.text)], 1, chat.tokens_per_image).input_ids[:limit]
        if ids[-1] == chat.model.config.image_token_id:
            raise ConfigError(
                f"--max_length {limit} ends within the {chat.tokens_per_image} tokens of the image: no text is left; raise it"
            )
        encoded.append(ids)
    return encoded


def batches(chat: ChatModel, pairs: Sequence[Pair], encoded: Sequence[list[int]], config: EvalMirConfig) -> Iterator[PairBatch]:
    """Pairs as batches, padded on the right; pair i belongs to group i modulo `groups`."""
    for begin in range(0, len(pairs), config.batch_size):
        rows = range(begin, min(begin + config.batch_size, len(pairs)))
        length = max(len(encoded[row]) for row in rows)
        ids = torch.full((len(rows), length), chat.tokenizer.pad_token_id or 0)
        mask = torch.zeros_like(ids)
        for place, row in enumerate(rows):
            ids[place, : len(encoded[row])] = torch.tensor(encoded[row])
            mask[place, : len(encoded[row])] = 1
        pictures = [open_image(Path(config.images) / pairs[row].image, f"pair {row} of {config.texts}") for row in rows]
        pixels = chat.processor.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
        device = chat.model.device
        inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device), "pixel_values": pixels.to(device, chat.model.dtype)}
        yield PairBatch(inputs, [row % config.groups for row in rows])


# ---- the summary ---------------------------------------------------------------------------------------------------------------------


def identify(config: EvalMirConfig, pairs: Sequence[Pair]) -> dict[str, Any]:
    """What the figure depends on."""
    return {"model": config.model, "texts": Path(config.texts).name, "pairs": len(pairs), "seed": config.seed, "template": config.template}


def summarise(found: Mir, chat: ChatModel, pairs: Sequence[Pair], config: EvalMirConfig) -> dict[str, Any]:
    """MIR with its interval, each layer's part, and how it was made.

    Raises:
        DataError: The distances are 0, so that their logarithm is no number.
    """
    if not math.isfinite(found.value) or not math.isfinite(found.standard_error):
        raise DataError(
            f"MIR is {found.value}, its standard error {found.standard_error}: image and text tokens of this model do not differ"
        )
    half = Z95 * found.standard_error
    return {
        "benchmark": "mir",
        "unit": "log10",  # no share in percent, and lower is better: reports leave it out of their tables
        "model": chat.name,
        "n": len(pairs),
        "metrics": {
            "mir": {"value": round(found.value, 4), "ci95": [round(found.value - half, 4), round(found.value + half, 4)], "n": len(pairs)}
        },
        "protocol": {
            "definition": "Huang et al. 2024 (arXiv 2410.07167), as llm_stage/mir.py says; outliers removed, exact square root",
            "interval": f"95 %, jackknife over {config.groups} groups of pairs",
            "template": chat.chat_format.name if chat.chat_format else "own",
            "texts": Path(config.texts).name,
            "images": relative(config.images, config.out),
            "pairs": len(pairs), "seed": config.seed, "max_length": config.max_length, "dtype": str(chat.model.dtype).removeprefix("torch."),
        },
        "layers": [_rounded(asdict(layer)) for layer in found.layers],
        "encoder": chat.encoder_card(),
    }  # fmt: skip


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    return float(f"{value:.6g}") if isinstance(value, float) else value


def as_text(summary: Mapping[str, Any]) -> str:
    """The summary for the terminal, a line a layer."""
    mir = summary["metrics"]["mir"]
    low, high = mir["ci95"]
    lines = [
        f"mir · {summary['model']}: {mir['value']:.3f}  [{low:.3f}, {high:.3f}]  (lower is better)  {summary['n']} pairs, {summary['seconds']:.0f} s"
    ]
    for row in summary["layers"]:
        lines.append(
            f"  layer {row['layer']:3d}  distance {row['distance']:10.4g}  of it means {row['of_means']:10.4g}  "
            f"norms: image {row['norms']['vision']:.3g}, text {row['norms']['text']:.3g}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    cli_entry(main)
