"""Zero-shot retrieval: find an image's captions among all captions, and a caption's image among all images; R@1, R@5, R@10.

    mmkit eval retrieval --encoder runs/uta/encoder --captions data/coco/captions_test.json --images data/images/test --out runs/eval/uta/retrieval
    mmkit eval retrieval --encoder E --benchmark coco_retrieval --captions dataset_coco.json --images coco --out runs/eval/e/coco_retrieval
    torchrun --nproc_per_node 8 encoders/eval_zeroshot_retrieval.py --encoder E --captions captions_val2017.json --images val2017 --out OUT

The caption file may be COCO's, Karpathy's, ALBEF's and LAVIS' or Flickr's (see `encoders/captions.py`). Features are kept while it runs,
so that a second start goes on; then answers.jsonl (a line a query) and summary.json are written.
"""

import hashlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

if __package__ in (None, ""):  # started as a file: its folder is on sys.path, the packages' folder is not
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from torch import Tensor
from tqdm import tqdm

from encoders.captions import Captioned, read_captions
from encoders.image_batches import batches
from encoders.labelled_shards import captioned_shards, has_shards
from encoders.zeroshot_pair import Pair, autocast, encoder_card, load_pair
from mmkit.checkpoint import atomic_write, load_weights, save_weights
from mmkit.config import cli_entry, load_config
from mmkit.errors import ConfigError, DataError, find
from mmkit.evaluation import EvaluationFolder, Ranks, relative, share_metric
from mmkit.images import ImageError
from mmkit.records import read_jsonl
from mmkit.retrieval import RECALL_AT, RetrievalRanks, retrieval_ranks
from mmkit.stats import DRAWS, mean_interval

IMAGES_AT_ONCE, TEXTS_AT_ONCE = 256, 2048  # in a file of features: what a killed start loses at most
DIRECTIONS = ("text_retrieval", "image_retrieval")


@dataclass(frozen=True)
class RetrievalSet:
    """One benchmark of retrieval: its title, and how many images and captions the whole one has (0: that depends)."""

    title: str
    images: int = 0
    captions: int = 0


SETS: Mapping[str, RetrievalSet] = {
    "retrieval": RetrievalSet("your own captions"),
    "mini_retrieval": RetrievalSet("scenes of the embedded data"),
    "flickr30k_retrieval": RetrievalSet("Flickr30k, Karpathy's test split", 1_000, 5_000),
    "coco_retrieval": RetrievalSet("COCO, Karpathy's 5k test split", 5_000, 25_010),
}


@dataclass
class EvalRetrievalConfig:
    """Settings of one evaluation."""

    encoder: str = field(default="", metadata={"help": "an encoder folder, timm:..., openclip:MODEL/TAG, hf:..., or mini-clip"})
    captions: str = field(
        default="", metadata={"help": "COCO JSON, Karpathy's JSON, a list of {image, caption}, Flickr's text file; or a folder of shards"}
    )
    images: str = field(default="", metadata={"help": "folder that the image names of --captions are relative to; not needed with shards"})
    out: str = field(default="", metadata={"help": "folder for answers.jsonl, summary.json, manifest.json"})
    benchmark: str = field(default="retrieval", metadata={"help": f"name in the summary: {', '.join(SETS)}"})
    split: str = field(default="test", metadata={"help": "of a caption file with several splits (Karpathy's)"})
    captions_per_image: int = field(default=0, metadata={"help": "take only the first so many captions of an image; 0 takes all"})
    text_tower: str = field(default="", metadata={"help": "mini-clip, openclip:MODEL/TAG or a folder; default: the one the encoder names"})
    batch_size: int = field(default=64, metadata={"help": "images encoded at once"})
    workers: int = field(default=0, metadata={"help": "processes that open images, for each rank; 0 opens them in between"})
    precision: Literal["fp32", "bf16"] = field(default="fp32", metadata={"help": "of the image tower; scores are taken in fp32"})
    device: str = field(default="auto", metadata={"help": "cpu, cuda, ...; auto takes an accelerator if there is one"})
    on_bad_sample: Literal["error", "skip"] = field(default="error", metadata={"help": "an unreadable image: stop, or count it as missing"})
    partial: bool = field(default=False, metadata={"help": "leave out images that are not there, with their captions"})
    resume: bool = field(default=False, metadata={"help": "go on in --out where an earlier start stopped"})
    overwrite: bool = field(default=False, metadata={"help": "throw what is in --out away"})

    def validate(self) -> None:
        """Refuse a run without input or output.

        Raises:
            ConfigError: The message names the flag.
            NameNotFound: There is no such benchmark.
        """
        for name in ("encoder", "captions", "images", "out"):
            if not getattr(self, name) and not (name == "images" and has_shards(Path(self.captions))):
                raise ConfigError(f"--{name} is missing; --help lists all settings")
        find("retrieval benchmark", SETS, self.benchmark)
        if self.batch_size < 1 or self.workers < 0 or self.captions_per_image < 0:
            raise ConfigError(
                f"--batch_size {self.batch_size}, --workers {self.workers}, --captions_per_image {self.captions_per_image}: "
                "at least 1, 0 and 0 are right"
            )
        if self.resume and self.overwrite:
            raise ConfigError("--resume keeps what is in --out, --overwrite throws it away: give one of them")


def main(argv: Sequence[str] | None = None) -> Path:
    """Evaluate one encoder on one caption file.

    Args:
        argv: Command line; None is the process's own.

    Returns:
        The output folder.
    """
    config = load_config(EvalRetrievalConfig, argv)
    start = time.monotonic()
    folder = EvaluationFolder(config.out, "eval_zeroshot_retrieval", resume=config.resume, overwrite=config.overwrite)
    folder.refuse()
    data = find_captions(config)
    ranks = Ranks(config.device)
    pair = load_pair(config.encoder, config.text_tower, ranks.device)
    folder.open(identify(data, pair, config), ranks)
    if config.overwrite and ranks.first:
        shutil.rmtree(folder.path / "features", ignore_errors=True)
    ranks.wait()
    rows = _finished(folder.path, data)
    if rows is None:
        encode_all(pair, data, config, ranks, folder.path / "features")
        rows = rank_all(data, ranks, folder.path, config) if ranks.first else []
    if ranks.first:
        summary = summarise(rows, data, pair, config, ranks)
        summary["seconds"] = round(time.monotonic() - start, 1)
        summary["encoder"] = encoder_card(pair.encoder)
        folder.finish(summary)
        shutil.rmtree(folder.path / "features", ignore_errors=True)
        print(as_text(summary))
    ranks.wait()
    return folder.path


def find_captions(config: EvalRetrievalConfig) -> Captioned:
    """Read the caption file with its folder of images, or a folder of shards, which holds both."""
    if has_shards(Path(config.captions)):
        return captioned_shards(Path(config.captions), config.split, config.captions_per_image)
    return read_captions(Path(config.captions), Path(config.images), config.split, config.captions_per_image, config.partial)


def identify(data: Captioned, pair: Pair, config: EvalRetrievalConfig) -> dict[str, Any]:
    """All that an answer depends on: features of another identity must not be mixed with these."""
    digest = hashlib.sha256(json.dumps([data.paths, data.captions, data.owner]).encode()).hexdigest()[:16]
    return {
        **pair.identity,
        "images": len(data.paths),
        "captions": len(data.captions),
        "captions_sha256": digest,
        "precision": config.precision,
    }


def _finished(folder: Path, data: Captioned) -> list[dict[str, Any]] | None:
    """The answers of an earlier start, if it came to its end."""
    path = folder / "answers.jsonl"
    rows = read_jsonl(path) if path.is_file() else []
    return rows if len(rows) == len(data.paths) + len(data.captions) else None


# ---- features ------------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def encode_all(pair: Pair, data: Captioned, config: EvalRetrievalConfig, ranks: Ranks, folder: Path) -> None:
    """Encode this process's share of images and of distinct captions, a file of features at a time; files that are there are kept."""
    texts = list(dict.fromkeys(data.captions))

    def image_features(names: Sequence[str]) -> dict[str, Tensor]:
        return _encode_images(pair, data, names, config, ranks.device)

    def text_features(some: Sequence[str]) -> dict[str, Tensor]:
        return {"features": pair.tower.encode(some)}

    _in_files(folder, "images", data.paths, IMAGES_AT_ONCE, image_features, ranks, f"{config.benchmark} · {config.encoder} · images")
    _in_files(folder, "texts", texts, TEXTS_AT_ONCE, text_features, ranks, f"{config.benchmark} · {config.encoder} · captions")
    ranks.wait()


def _in_files(
    folder: Path, kind: str, items: Sequence[str], size: int, encode: Callable[[Sequence[str]], dict[str, Tensor]], ranks: Ranks, title: str
) -> None:
    starts = range(0, len(items), size)
    with tqdm(total=len(ranks.share(starts)) * size, desc=title, unit=kind[:-1], disable=not ranks.first) as progress:
        for start in ranks.share(starts):
            path = folder / f"{kind}_{start:09d}.safetensors"
            if not path.is_file():
                save_weights(encode(items[start : start + size]), path)
            progress.update(size)


def _encode_images(
    pair: Pair, data: Captioned, names: Sequence[str], config: EvalRetrievalConfig, device: torch.device
) -> dict[str, Tensor]:
    """Features [n, E] of some images, and which of them could be read [n] (the others have a row of zeros)."""
    place = {name: index for index, name in enumerate(names)}
    features = torch.zeros(len(names), int(pair.encoder.joint_width or 0))
    read = torch.zeros(len(names), dtype=torch.bool)
    for some, images, broken in batches(data.source, names, pair.encoder.spec, config.batch_size, config.workers):
        for bad in broken:
            if config.on_bad_sample == "error":
                raise ImageError(f"{bad.reason}\n  --on_bad_sample skip leaves such images out, with their captions, and counts them")
            print(f"left out: {bad.reason}", file=sys.stderr)
        if some:
            with autocast(device, config.precision):
                found = pair.encoder(images.to(device)).pooler_output  # [b, E]
            rows = torch.tensor([place[name] for name in some])
            features[rows], read[rows] = found.float().cpu(), True
    return {"features": features, "read": read}


def _load(folder: Path, kind: str, key: str) -> Tensor:
    return torch.cat([load_weights(path)[key] for path in sorted(folder.glob(f"{kind}_*.safetensors"))])


# ---- answers -------------------------------------------------------------------------------------------------------------------------


def rank_all(data: Captioned, ranks: Ranks, folder: Path, config: EvalRetrievalConfig) -> list[dict[str, Any]]:
    """Rank both ways and write answers.jsonl: a row an image, then a row a caption.

    Raises:
        DataError: No image could be read.
    """
    features = folder / "features"
    images, read = _load(features, "images", "features"), _load(features, "images", "read")
    place = {text: index for index, text in enumerate(dict.fromkeys(data.captions))}
    kept_captions = [index for index, image in enumerate(data.owner) if read[image]]
    if not kept_captions:
        raise DataError(f"none of {len(data.paths)} images below {data.root} could be read")
    texts = _load(features, "texts", "features")[[place[data.captions[index]] for index in kept_captions]]  # [M, E]
    kept_images = read.nonzero().flatten().tolist()
    renumbered = {image: number for number, image in enumerate(kept_images)}
    owner = [renumbered[data.owner[index]] for index in kept_captions]
    by_image, by_text = retrieval_ranks(images[read].to(ranks.device), texts.to(ranks.device), owner)
    rows = _rows(data, by_image, by_text, kept_images, kept_captions)
    atomic_write(folder / "answers.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return rows


def _rows(
    data: Captioned, by_image: RetrievalRanks, by_text: RetrievalRanks, kept_images: list[int], kept_captions: list[int]
) -> list[dict[str, Any]]:
    own: dict[int, str] = {}
    for index, image in enumerate(data.owner):
        own.setdefault(image, data.captions[index])
    places = {image: number for number, image in enumerate(kept_images)}
    rows = []
    for image, path in enumerate(data.paths):
        row: dict[str, Any] = {"question_id": f"text_retrieval/{path}", "kind": "text_retrieval", "image": path, "label": own[image]}
        if image in places:
            answer = data.captions[kept_captions[int(by_image.nearest[places[image]])]]
            row |= {"answer": answer, **_hits(by_image, places[image])}
        else:
            row["missing"] = "the image could not be read"
        rows.append(row)
    numbers = {caption: number for number, caption in enumerate(kept_captions)}
    for caption, text in enumerate(data.captions):
        path = data.paths[data.owner[caption]]
        row = {"question_id": f"image_retrieval/{caption}", "kind": "image_retrieval", "question": text, "image": path, "label": path}
        if caption in numbers:
            answer = data.paths[kept_images[int(by_text.nearest[numbers[caption]])]]
            row |= {"answer": answer, **_hits(by_text, numbers[caption])}
        else:
            row["missing"] = "the image could not be read"
        rows.append(row)
    return rows


def _hits(ranks: RetrievalRanks, number: int) -> dict[str, int]:
    rank, lucky = int(ranks.rank[number]), int(ranks.lucky[number])
    return {"top1": int(rank < 1), "rank": rank, **({"rank_if_ties_are_won": lucky} if lucky != rank else {})}


# ---- the summary ---------------------------------------------------------------------------------------------------------------------


def summarise(rows: Sequence[Mapping[str, Any]], data: Captioned, pair: Pair, config: EvalRetrievalConfig, ranks: Ranks) -> dict[str, Any]:
    """Recall at 1, 5 and 10 in percent, both ways, with 95 % intervals."""
    answered = [row for row in rows if "missing" not in row]
    missing = [row["image"] for row in rows if "missing" in row and row["kind"] == "text_retrieval"]
    known, notes = SETS[config.benchmark], list(data.notes)
    counts = (len(data.paths), len(data.captions))
    if known.images and (known.images, known.captions) != counts:
        notes.append(f"{counts[0]} images, {counts[1]} captions; {known.title} has {known.images} and {known.captions}")
    tied = sum("rank_if_ties_are_won" in row for row in answered)
    metrics = {
        f"{kind}_recall@{k}": _recall([row for row in answered if row["kind"] == kind], kind, k) for kind in DIRECTIONS for k in RECALL_AT
    }
    return {
        "benchmark": config.benchmark,
        "model": config.encoder,
        "protocol": {
            "rule": "right when any caption of the image is among the first k",
            "captions": Path(config.captions).name,
            "captions_per_image": f"the first {config.captions_per_image}" if config.captions_per_image else "all",
            "text_tower": pair.tower.name,
            "prompts": "the caption as it is",
            "images": relative(data.root, config.out),
            "ties": f"counted against the query; {tied} of {len(answered)} queries have one",
            "interval": f"text retrieval: Wilson, 95 %; image retrieval: 95 % percentile bootstrap, {DRAWS} draws, resampled by image",
            "precision": config.precision,
            "processes": ranks.count,
            **({"notes": notes} if notes else {}),
        },
        "n": len(answered),
        "metrics": metrics,
        "missing": len(missing),
        "missing_images": missing,
    }


def _recall(rows: Sequence[Mapping[str, Any]], kind: str, k: int) -> dict[str, Any]:
    hits = [int(row["rank"] < k) for row in rows]
    if kind == "text_retrieval":
        return share_metric(sum(hits), len(hits))
    estimate = mean_interval(hits, [row["image"] for row in rows]).scaled(100)
    return {"value": round(estimate.value, 4), "ci95": [round(estimate.low, 4), round(estimate.high, 4)], "n": estimate.n}


def as_text(summary: Mapping[str, Any]) -> str:
    """The summary in three lines."""
    lines = [f"{summary['benchmark']}, {summary['model']}:"]
    for kind in DIRECTIONS:
        rows = [(k, summary["metrics"][f"{kind}_recall@{k}"]) for k in RECALL_AT]
        figures = ", ".join(f"R@{k} {row['value']:.1f} % ({row['ci95'][0]:.1f} to {row['ci95'][1]:.1f})" for k, row in rows)
        lines.append(f"  {kind.replace('_', ' ')}: {figures} over {rows[0][1]['n']} queries")
    lines += [f"  {summary['missing']} images could not be read"] if summary["missing"] else []
    return "\n".join([*lines, *(f"  {note}" for note in summary["protocol"].get("notes", []))])


if __name__ == "__main__":
    cli_entry(main)
