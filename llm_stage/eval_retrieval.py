"""Retrieval with a Q-Former: by contrast alone (ITC), and with the best k re-ranked by the matching head (ITM); R@1, R@5, R@10.

    mmkit eval qformer-retrieval --model runs/qformer/model --captions data/coco/captions_test.json --images data/images/test --out OUT
    torchrun --nproc_per_node 8 llm_stage/eval_retrieval.py --model M --captions dataset_coco.json --images coco --out OUT

The caption file may be COCO's, Karpathy's, ALBEF's and LAVIS' or Flickr's (see `encoders/captions.py`). answers.jsonl has a line a query with
both ranks; a second start with --resume goes on there.
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

import torch
from torch import Tensor
from tqdm import tqdm

from encoders.captions import Captioned, read_captions
from encoders.image_batches import batches
from llm_stage.qformer_folder import QFormerParts, load_qformer
from llm_stage.qformer_retrieval import RERANKED, Candidates, best_by_itc, reranked_images, reranked_texts
from llm_stage.qformer_text import clean_caption
from mmkit.config import cli_entry, load_config
from mmkit.errors import ConfigError
from mmkit.evaluation import EvaluationFolder, Ranks, merge_parts, part_records, relative, share_metric
from mmkit.images import ImageError
from mmkit.retrieval import RECALL_AT
from mmkit.stats import DRAWS, mean_interval

DIRECTIONS = ("text_retrieval", "image_retrieval")


@dataclass
class EvalConfig:
    """Settings of one evaluation."""

    model: str = field(default="", metadata={"help": "a Q-Former folder: RUN/model of train_qformer"})
    captions: str = field(default="", metadata={"help": "COCO JSON, Karpathy's JSON, a list of {image, caption}, or Flickr's text file"})
    images: str = field(default="", metadata={"help": "folder that the image names of --captions are relative to"})
    out: str = field(default="", metadata={"help": "folder for answers.jsonl, summary.json, manifest.json"})
    benchmark: str = field(default="qformer_retrieval", metadata={"help": "name in the summary"})
    k: int = field(default=RERANKED, metadata={"help": "candidates of each query that the matching head sees; 0: contrast alone"})
    split: str = field(default="test", metadata={"help": "of a caption file with several splits (Karpathy's)"})
    captions_per_image: int = field(default=0, metadata={"help": "take only the first so many captions of an image; 0 takes all"})
    shuffle_images: bool = field(default=False, metadata={"help": "the control: every image is shown as another one"})
    batch_size: int = field(default=64, metadata={"help": "images encoded, and pairs matched, at once"})
    workers: int = field(default=0, metadata={"help": "processes that open images; 0 opens them in between"})
    device: str = field(default="auto", metadata={"help": "cpu, cuda, ...; auto takes an accelerator if there is one"})
    resume: bool = field(default=False, metadata={"help": "go on in --out where an earlier start stopped"})
    overwrite: bool = field(default=False, metadata={"help": "throw what is in --out away"})

    def validate(self) -> None:
        """Refuse a run without input or output."""
        for name in ("model", "captions", "images", "out"):
            if not getattr(self, name):
                raise ConfigError(f"--{name} is missing; --help lists all settings")
        if self.batch_size < 1 or self.workers < 0 or self.k < 0:
            raise ConfigError(f"--batch_size {self.batch_size}, --workers {self.workers}, --k {self.k}: at least 1, 0 and 0 are right")
        if self.resume and self.overwrite:
            raise ConfigError("--resume keeps what is in --out, --overwrite throws it away: give one of them")


def main(argv: Sequence[str] | None = None) -> Path:
    """Evaluate one Q-Former on one caption file.

    Args:
        argv: Command line; None is the process's own.

    Returns:
        The output folder.
    """
    config = load_config(EvalConfig, argv)
    start = time.monotonic()
    folder = EvaluationFolder(config.out, "eval_retrieval", resume=config.resume, overwrite=config.overwrite)
    folder.refuse()
    data = read_captions(Path(config.captions), Path(config.images), config.split, config.captions_per_image)
    ranks = Ranks(config.device)
    parts = load_qformer(config.model).to(ranks.device)
    folder.open(identify(data, parts, config), ranks)
    queries = Queries(parts, data, config, ranks)
    with part_records(folder.path, ranks) as (records, done):
        wanted = [name for name in ranks.share(queries.names) if name not in done]
        for name in tqdm(wanted, desc=f"{config.benchmark} · {Path(config.model).parent.name}", unit="query", disable=not ranks.first):
            records.append(queries.answer(name))
    rows = merge_parts(folder.path, queries.names, ranks)
    if ranks.first:
        summary = summarise(rows, data, parts, config, ranks)
        summary["seconds"] = round(time.monotonic() - start, 1)
        folder.finish(summary)
        print(as_text(summary))
    ranks.wait()
    return folder.path


def identify(data: Captioned, parts: QFormerParts, config: EvalConfig) -> dict[str, Any]:
    """All that an answer depends on."""
    digest = hashlib.sha256(json.dumps([data.paths, data.captions, data.owner]).encode()).hexdigest()[:16]
    weights = hashlib.sha256((Path(config.model) / "model.safetensors").read_bytes()).hexdigest()[:16]
    return {
        "model": weights, "encoder": parts.card.encoder_hash, "captions_sha256": digest, "k": config.k, "shuffled": config.shuffle_images,
    }  # fmt: skip


class Queries:
    """All queries of a caption file: "text_retrieval/IMAGE" and "image_retrieval/NUMBER", and their answers."""

    def __init__(self, parts: QFormerParts, data: Captioned, config: EvalConfig, ranks: Ranks) -> None:
        self.parts, self.data, self.config = parts, data, config
        self.names = [f"text_retrieval/{path}" for path in data.paths] + [
            f"image_retrieval/{number}" for number in range(len(data.captions))
        ]
        self.place = {name: number for number, name in enumerate(self.names)}
        self.states, images = encode_images(parts, data, config, ranks)
        self.ids, self.mask, texts = encode_texts(parts, data.captions, ranks.device)
        best = max(config.k, max(RECALL_AT))
        self.by_image, self.by_text = best_by_itc(images, texts, best)
        self.own: list[list[int]] = [[] for _ in data.paths]
        for caption, image in enumerate(data.owner):
            self.own[image].append(caption)

    def answer(self, name: str) -> dict[str, Any]:
        """Give the row of one query: its rank by contrast, its rank after matching, and what stands first."""
        data, number = self.data, self.place[name]
        text = number < len(data.paths)
        row = number if text else number - len(data.paths)
        found, right = (self.by_image, self.own[row]) if text else (self.by_text, [data.owner[row]])
        items = data.captions if text else data.paths
        before = Candidates(found.index[row : row + 1], found.score[row : row + 1])
        after = before if not self.config.k else self._matched(text, found, row)
        itc, rank = (int(some.ranks([right], len(items))[0]) for some in (before, after))
        kind = DIRECTIONS[0] if text else DIRECTIONS[1]
        about = (
            {"image": data.paths[row], "label": data.captions[right[0]]}
            if text
            else {"question": data.captions[row], "label": data.paths[right[0]]}
        )
        image = data.paths[row] if text else data.paths[right[0]]
        first = items[int(after.index[0, 0])]
        return {
            "question_id": name,
            "kind": kind,
            **about,
            "image": image,
            "answer": first,
            "top1": int(rank < 1),
            "rank": rank,
            "itc_rank": itc,
        }

    def _matched(self, text: bool, found: Candidates, row: int) -> Candidates:
        match = reranked_texts if text else reranked_images
        return match(self.parts.qformer, self.states.__getitem__, self.ids, self.mask, found, row, self.config.k, self.config.batch_size)


@torch.no_grad()
def encode_images(parts: QFormerParts, data: Captioned, config: EvalConfig, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Give normalised tokens [N, n, W] and joint rows [N, Q, E] of all images, on the device; with the control, of the next image.

    Raises:
        ImageError: One cannot be read.
    """
    states, rows = [], []
    for names, images, broken in batches(data.source, data.paths, parts.spec, config.batch_size, config.workers):
        if broken:
            raise ImageError(f"{broken[0].reason}\n  mend it, or take its captions out of {config.captions}")
        assert names
        image = parts.qformer.image_states(parts.features(images.to(ranks.device)))
        states.append(image)
        rows.append(parts.qformer.image_embeddings(parts.qformer.queries(image)))
    found, joint = torch.cat(states), torch.cat(rows)
    return (found.roll(1, 0), joint.roll(1, 0)) if config.shuffle_images else (found, joint)


@torch.no_grad()
def encode_texts(
    parts: QFormerParts, captions: Sequence[str], device: torch.device, batch_size: int = 256
) -> tuple[Tensor, Tensor, Tensor]:
    """Give ids, mask [M, T] and joint rows [M, E] of captions."""
    ids, mask = (part.to(device) for part in parts.tokenizer([clean_caption(text) or text for text in captions]))
    model = parts.qformer
    rows = [model.text_embeddings(model.text(ids[i : i + batch_size], mask[i : i + batch_size])) for i in range(0, len(ids), batch_size)]
    return ids, mask, torch.cat(rows)


# ---- the summary ---------------------------------------------------------------------------------------------------------------------


def summarise(rows: Sequence[Mapping[str, Any]], data: Captioned, parts: QFormerParts, config: EvalConfig, ranks: Ranks) -> dict[str, Any]:
    """Recall at 1, 5 and 10 in percent, both ways, by contrast ("itc/...") and after matching, with 95 % intervals and chance."""
    metrics: dict[str, Any] = {}
    for kind in DIRECTIONS:
        some = [row for row in rows if row["kind"] == kind]
        for prefix, key in (("", "rank"), ("itc/", "itc_rank")) if config.k else (("itc/", "itc_rank"),):
            metrics |= {f"{prefix}{kind}_recall@{k}": _recall([(row[key], row["image"]) for row in some], kind, k) for k in RECALL_AT}
    return {
        "benchmark": config.benchmark,
        "model": config.model,
        "protocol": {
            "rule": "right when any caption of the image is among the first k",
            "score": "largest cosine of a query"
            + (f"; the best {config.k} again by the logit of a match, plus the cosine" if config.k else ""),
            "mode": parts.card.mode,
            "captions": Path(config.captions).name,
            "text": 'lower case, without .!"()*#:;~',
            "images": ("each shown as another one; " if config.shuffle_images else "") + relative(data.root, config.out),
            "chance": {kind: chance(data, kind) for kind in DIRECTIONS},
            "interval": f"text retrieval: Wilson, 95 %; image retrieval: 95 % percentile bootstrap, {DRAWS} draws, resampled by image",
            "processes": ranks.count,
            **({"notes": list(data.notes)} if data.notes else {}),
        },
        "n": len(rows),
        "metrics": metrics,
        "missing": 0,
    }


def chance(data: Captioned, kind: str) -> float:
    """R@1 of blind guessing, in percent."""
    if kind == "image_retrieval":
        return round(100 / len(data.paths), 3)
    counts = (
        [data.owner.count(image) for image in range(len(data.paths))] if len(data.owner) < 10_000 else [len(data.owner) / len(data.paths)]
    )
    return round(100 * sum(counts) / len(counts) / len(data.captions), 3)


def _recall(ranks: Sequence[tuple[int, str]], kind: str, k: int) -> dict[str, Any]:
    hits = [int(rank < k) for rank, _ in ranks]
    if kind == "text_retrieval":
        return share_metric(sum(hits), len(hits))
    estimate = mean_interval(hits, [image for _, image in ranks]).scaled(100)
    return {"value": round(estimate.value, 4), "ci95": [round(estimate.low, 4), round(estimate.high, 4)], "n": estimate.n}


def as_text(summary: Mapping[str, Any]) -> str:
    """The summary in a few lines."""
    lines = [f"{summary['benchmark']}, {summary['model']}:"]
    for kind in DIRECTIONS:
        for prefix, title in (("itc/", "by contrast"), ("", "re-ranked")):
            found = [(k, summary["metrics"].get(f"{prefix}{kind}_recall@{k}")) for k in RECALL_AT]
            if all(row for _, row in found):
                figures = ", ".join(f"R@{k} {row['value']:.1f} % ({row['ci95'][0]:.1f} to {row['ci95'][1]:.1f})" for k, row in found)
                lines.append(f"  {kind.replace('_', ' ')}, {title}: {figures} over {found[0][1]['n']} queries")
    return "\n".join(lines)


if __name__ == "__main__":
    cli_entry(main)
