"""Retrieval with a Q-Former: by contrast alone (ITC), and with the best k re-ranked by the matching head (ITM); R@1, R@5, R@10.

    mmkit eval qformer-retrieval --model runs/qformer/model --captions data/coco/captions_test.json --images data/images/test --out OUT
    torchrun --nproc_per_node 8 llm_stage/eval_retrieval.py --model M --captions dataset_coco.json --images coco --out OUT

The caption file may be COCO's, Karpathy's, ALBEF's and LAVIS' or Flickr's (see `encoders/captions.py`). answers.jsonl has a line a query with
both ranks. Processes divide the images; until all are matched, matches.jsonl has a line for each that is, and --resume goes on there.
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
from llm_stage.qformer_retrieval import RERANKED, Candidates, Matches, best_by_itc, match_texts, sought
from llm_stage.qformer_text import clean_caption
from mmkit.checkpoint import atomic_write
from mmkit.config import cli_entry, load_config
from mmkit.errors import ConfigError
from mmkit.evaluation import ANSWERS, EvaluationFolder, Ranks, merge_parts, part_records, relative, share_metric
from mmkit.images import ImageError
from mmkit.ranks import gather
from mmkit.records import read_jsonl
from mmkit.retrieval import RECALL_AT
from mmkit.stats import DRAWS, mean_interval

MATCHES = "matches"
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
    own = (ANSWERS, MATCHES)
    folder = EvaluationFolder(config.out, "eval_retrieval", resume=config.resume, overwrite=config.overwrite, records=own)
    folder.refuse()
    data = read_captions(Path(config.captions), Path(config.images), config.split, config.captions_per_image)
    ranks = Ranks(config.device)
    parts = load_qformer(config.model).to(ranks.device)
    folder.open(identify(data, parts, config), ranks)
    answers = folder.path / f"{ANSWERS}.jsonl"
    if not answers.is_file() or len(read_jsonl(answers)) != len(data.paths) + len(data.captions):
        found = answer(parts, data, config, ranks, folder.path)
        ranks.wait()
        if ranks.first:
            atomic_write(answers, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found))
            (folder.path / f"{MATCHES}.jsonl").unlink(missing_ok=True)
    ranks.wait()
    rows = read_jsonl(answers)
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


def answer(parts: QFormerParts, data: Captioned, config: EvalConfig, ranks: Ranks, folder: Path) -> list[dict[str, Any]]:
    """Give a row for each query, "text_retrieval/IMAGE" and "image_retrieval/NUMBER": its ranks, and what stands first."""
    states, images = encode_images(parts, data, config, ranks)
    ids, mask, texts = encode_texts(parts, data.captions, ranks)
    by_image, by_text = best_by_itc(images, texts, max(config.k, *RECALL_AT))
    after = by_image, by_text
    if config.k:
        found = match(parts, states, ids, mask, sought(by_image, by_text, config.k), data, config, ranks, folder)
        after = found.rerank(by_image, config.k, of_images=True), found.rerank(by_text, config.k, of_images=False)
    own: list[list[int]] = [[] for _ in data.paths]
    for caption, image in enumerate(data.owner):
        own[image].append(caption)
    about = [{"image": path, "label": data.captions[right[0]]} for path, right in zip(data.paths, own, strict=True)]
    named = [f"text_retrieval/{path}" for path in data.paths]
    rows = _rows(DIRECTIONS[0], named, about, data.captions, own, by_image, after[0])
    about = [{"question": text, "label": data.paths[i], "image": data.paths[i]} for text, i in zip(data.captions, data.owner, strict=True)]
    named = [f"image_retrieval/{number}" for number in range(len(data.captions))]
    return rows + _rows(DIRECTIONS[1], named, about, data.paths, [[image] for image in data.owner], by_text, after[1])


def _rows(
    kind: str, names: Sequence[str], about: Sequence[Mapping[str, str]], items: Sequence[str], right: Sequence[Sequence[int]],
    before: Candidates, after: Candidates,
) -> list[dict[str, Any]]:  # fmt: skip
    itc, ranks = (found.ranks(right, len(items)).tolist() for found in (before, after))
    first = [items[index] for index in after.index[:, 0].tolist()]
    return [
        {
            "question_id": names[i],
            "kind": kind,
            **about[i],
            "answer": first[i],
            "top1": int(ranks[i] < 1),
            "rank": ranks[i],
            "itc_rank": itc[i],
        }
        for i in range(len(names))
    ]


def match(
    parts: QFormerParts, states: Mapping[int, Tensor], ids: Tensor, mask: Tensor, wanted: Sequence[Tensor], data: Captioned,
    config: EvalConfig, ranks: Ranks, folder: Path,
) -> Matches:  # fmt: skip
    """Match each image with its texts; each process takes its share of the images, and leaves a line for each in matches.jsonl."""
    with part_records(folder, ranks, MATCHES) as (records, done):
        mine = [image for image in ranks.share(range(len(data.paths))) if image not in done]
        title = f"{config.benchmark} · {Path(config.model).parent.name}"
        with tqdm(total=sum(len(wanted[image]) for image in mine), desc=title, unit="pair", disable=not ranks.first) as progress:
            for image in mine:
                logits = match_texts(parts.qformer, states[image], ids, mask, wanted[image], config.batch_size)
                records.append({"question_id": image, "texts": wanted[image].tolist(), "logits": logits.tolist()})
                progress.update(len(logits))
    rows = merge_parts(folder, range(len(data.paths)), ranks, MATCHES)
    matched = [torch.tensor(row["texts"], dtype=torch.long, device=ranks.device) for row in rows]
    return Matches(matched, [torch.tensor(row["logits"], device=ranks.device) for row in rows], len(data.captions))


@torch.no_grad()
def encode_images(parts: QFormerParts, data: Captioned, config: EvalConfig, ranks: Ranks) -> tuple[dict[int, Tensor], Tensor]:
    """Give normalised tokens [n, W] of this process's images by number, and joint rows [N, Q, E] of all; on the device.

    With the control, an image's picture is that of the image before it.

    Raises:
        ImageError: One cannot be read.
    """
    shown = [data.paths[-1], *data.paths[:-1]] if config.shuffle_images else data.paths
    mine, states, rows = list(ranks.share(range(len(shown)))), [], []
    for names, images, broken in batches(data.source, ranks.share(shown), parts.spec, config.batch_size, config.workers):
        if broken:
            raise ImageError(f"{broken[0].reason}\n  mend it, or take its captions out of {config.captions}")
        assert names
        image = parts.qformer.image_states(parts.features(images.to(ranks.device)))
        states += list(image)
        rows.append(parts.qformer.image_embeddings(parts.qformer.queries(image)))
    return dict(zip(mine, states, strict=True)), _joined(rows, ranks)


@torch.no_grad()
def encode_texts(parts: QFormerParts, captions: Sequence[str], ranks: Ranks, batch_size: int = 256) -> tuple[Tensor, Tensor, Tensor]:
    """Give ids, mask [M, T] and joint rows [M, E] of captions; each process reads its share."""
    ids, mask = (part.to(ranks.device) for part in parts.tokenizer([clean_caption(text) or text for text in captions]))
    model, mine = parts.qformer, torch.tensor(ranks.share(range(len(ids))), device=ranks.device)
    rows = [model.text_embeddings(model.text(ids[some], mask[some])) for some in mine.split(batch_size)]
    return ids, mask, _joined(rows, ranks)


def _joined(mine: Sequence[Tensor], ranks: Ranks) -> Tensor:
    """Rows of all processes, in the order of what `Ranks.share` divided; a process may have none."""
    shares = [share for share in gather(torch.cat(list(mine)).cpu() if mine else None) if share is not None]
    found = torch.empty(sum(map(len, shares)), *shares[0].shape[1:], device=ranks.device)
    for rank, share in enumerate(shares):
        found[rank :: ranks.count] = share.to(ranks.device)
    return found


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
