"""Classifying a folder of classes, and what is said of it: rows an image, top-1 and top-5 with intervals, the curve over the epochs."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from encoders.class_folders import ClassFolders, OnBad
from encoders.zeroshot import label_ranks
from mmkit.errors import DataError, TrainingError
from mmkit.images import ImageError, ImageSpec, open_image
from mmkit.ranks import gather
from mmkit.stats import wilson

Row = dict[str, Any]


class _Fixed(Dataset[Any]):
    """Images as evaluation sees them; an unreadable one comes as its error, which a worker could not raise readably."""

    def __init__(self, data: ClassFolders, spec: ImageSpec, indices: Sequence[int]) -> None:
        self.data, self.transform, self.indices = data, spec.transform(training=False), indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> tuple[int, Tensor | ImageError]:
        index = self.indices[place]
        try:
            return index, self.transform(open_image(self.data.root / self.data.paths[index], f"image {index + 1} of {len(self.data)}"))
        except ImageError as error:
            return index, error


def _as_list(items: list[Any]) -> list[Any]:
    return items


@dataclass(frozen=True)
class Loading:
    """How images of an evaluation are read: batch size, worker processes, what to do with unreadable ones, this process's share."""

    batch_size: int = 64
    num_workers: int = 0
    on_bad_sample: OnBad = "error"
    rank: int = 0
    ranks: int = 1


@torch.no_grad()
def classify(
    networks: Mapping[str, nn.Module],
    data: ClassFolders,
    spec: ImageSpec,
    device: torch.device,
    loading: Loading,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> dict[str, list[Row]]:
    """Classify images with several networks in one pass over them; all ranks take part and get all rows.

    Args:
        networks: Name to network, images [B, 3, H, W] to logits [B, C], on `device`. They are in eval mode meanwhile.
        data: The images.
        spec: How they are prepared.
        device: Where the networks are.
        loading: How they are read.
        autocast: Context of the forward.

    Returns:
        For each network rows in the order of `data`: "index", "rank" (0 is right), "best" (five labels), "probability" (theirs); a row of an
        unreadable image has "index" and "missing".

    Raises:
        ImageError: An image cannot be read and `loading.on_bad_sample` is "error".
        TrainingError: A logit is not finite.
    """
    indices = range(loading.rank, len(data), loading.ranks)
    # A generator of its own: a loader without one draws a seed from torch's, and the training would go on elsewhere.
    loader: DataLoader[Any] = DataLoader(
        _Fixed(data, spec, indices), loading.batch_size, num_workers=loading.num_workers, collate_fn=_as_list, generator=torch.Generator()
    )
    rows: dict[str, list[Row]] = {name: [] for name in networks}
    with _evaluating(networks.values()):
        for items in loader:
            good = [(index, image) for index, image in items if isinstance(image, Tensor)]
            for index, error in items:
                if isinstance(error, ImageError):
                    if loading.on_bad_sample == "error":
                        raise ImageError(f"{error}\n  --data.on_bad_sample skip counts such images as missing instead") from error
                    for found in rows.values():
                        found.append({"index": index, "missing": str(error)})
            if not good:
                continue
            images = torch.stack([image for _, image in good]).to(device)
            labels = torch.tensor([data.labels[index] for index, _ in good], device=device)
            for name, network in networks.items():
                with autocast():
                    logits = network(images).float()  # [b, C]
                rows[name] += _rows(name, logits, labels, [index for index, _ in good])
    return {name: sorted((row for part in gather(found) for row in part), key=lambda row: row["index"]) for name, found in rows.items()}


@contextmanager
def _evaluating(networks: Any) -> Iterator[None]:
    before = [(network, network.training) for network in networks]
    for network, _ in before:
        network.eval()
    try:
        yield
    finally:
        for network, training in before:
            network.train(training)


def _rows(name: str, logits: Tensor, labels: Tensor, indices: Sequence[int]) -> list[Row]:
    if not bool(torch.isfinite(logits).all()):
        raise TrainingError(f"evaluating {name}: a logit is not finite; the training has diverged, or a weight file holds NaN")
    values, places = logits.softmax(dim=-1).topk(min(5, logits.shape[1]), dim=1)
    ranks = label_ranks(logits, labels).tolist()
    pairs = zip(indices, ranks, places.tolist(), values.tolist(), strict=True)
    return [{"index": i, "rank": r, "best": best, "probability": [round(p, 5) for p in ps]} for i, r, best, ps in pairs]


def share_right(rows: Sequence[Row], k: int = 1) -> float:
    """Top-k accuracy in percent over the rows that have an answer."""
    ranks = [row["rank"] for row in rows if "missing" not in row]
    if not ranks:
        raise DataError(f"none of {len(rows)} images could be read; the first: {rows[0]['missing'] if rows else 'there are none'}")
    return 100 * sum(rank < k for rank in ranks) / len(ranks)


def metric(rows: Sequence[Row], k: int) -> dict[str, Any]:
    """Top-k accuracy with its Wilson 95 % interval, as summaries hold it: percent."""
    value, n = share_right(rows, k), sum("missing" not in row for row in rows)
    low, high = wilson(round(value * n / 100), n)
    return {"value": round(value, 4), "ci95": [round(100 * low, 4), round(100 * high, 4)], "n": n}


def metrics_of(rows: Mapping[str, Sequence[Row]], chosen: str) -> dict[str, dict[str, Any]]:
    """Top-1 and top-5 of the chosen weights first, then of all weights by name ("top1/last_ema")."""
    found = {f"top{k}": metric(rows[chosen], k) for k in (1, 5)}
    return found | {f"top{k}/{name}": metric(rows[name], k) for name in rows for k in (1, 5)}


def answers(rows: Sequence[Row], data: ClassFolders) -> list[Row]:
    """Rows for answers.jsonl, which the report and paired comparisons read."""
    found: list[Row] = []
    for row in rows:
        path = data.paths[row["index"]]
        head = {"question_id": path, "image": path, "label": data.names[data.labels[row["index"]]]}
        if "missing" in row:
            found.append({**head, "missing": row["missing"]})
            continue
        nearest = [data.names[label] for label in row["best"]]
        scores = {"top1": int(row["rank"] < 1), "top5": int(row["rank"] < 5), "rank": row["rank"]}
        found.append({**head, "answer": nearest[0], **scores, "nearest": nearest, "probability": row["probability"]})
    return found


def relative_root(data: ClassFolders, folder: Path) -> str:
    """Where the images are, seen from the folder of the answers."""
    return os.path.relpath(data.root, folder)


@dataclass
class Curve:
    """Held-out accuracy by epoch, and the weights that were best on it: raw and averaged; part of every checkpoint.

    Attributes:
        rows: {"epoch", "step", "n", "raw": percent, "ema": percent} of each evaluation.
        best: "raw", "ema" -> the row's "epoch", "step", "held_out_top1" and the "weights"; the first of equals.
    """

    rows: list[Row] = field(default_factory=list)
    best: dict[str, Row] = field(default_factory=dict)

    def add(self, epoch: float, step: int, found: Mapping[str, Sequence[Row]], networks: Mapping[str, nn.Module]) -> Row:
        """Take in one evaluation of the held-out images; copies weights that are better than all before."""
        row: Row = {"epoch": round(epoch, 4), "step": step, "n": sum("missing" not in item for item in next(iter(found.values())))}
        for name, network in networks.items():
            row[name] = round(share_right(found[name]), 4)
            if name not in self.best or row[name] > self.best[name]["held_out_top1"]:
                weights = {key: tensor.detach().to("cpu", copy=True) for key, tensor in network.state_dict().items()}
                self.best[name] = {"epoch": row["epoch"], "step": step, "held_out_top1": row[name], "weights": weights}
        self.rows.append(row)
        return row

    def state_dict(self) -> dict[str, Any]:
        """Plain data for a checkpoint."""
        return {"rows": self.rows, "best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.rows, self.best = list(state["rows"]), dict(state["best"])
