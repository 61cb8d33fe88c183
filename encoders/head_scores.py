"""What ViSFT's heads find in pictures, told in the pictures' own pixels, and how much of it is right.

    rows = predict_rows(head, maps, data, range(64), device)      # one an image, in the form of COCO's result files
    score_rows("detection", rows, coco)                           # {"ap": 12.3, "ap50": ...}, percent

Average precision is COCO's own (pycocotools), panoptic quality as its authors count it; captions are cut into words by the Penn Treebank's
rules and scored by CIDEr-D and BLEU.
"""

import contextlib
import copy
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from encoders.coco_files import CocoSet
from encoders.heads.base import Head
from encoders.panoptic_files import VOID, segment_ids
from encoders.panoptic_quality import panoptic_quality, tally
from encoders.visft_features import FeatureMaps, TaskData
from encoders.visft_mixture import collate_items
from mmkit.caption_scoring import BleuCounts, bleu_counts, bleu_of, cider_d
from mmkit.caption_tokens import tokens
from mmkit.errors import DataError
from mmkit.stats import student_t95

MOST = 100  # objects of an image that COCO looks at
AP_NAMES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
GROUPS = 20  # of the jackknife
MOST_SCORE = {"detection": 100.0, "segmentation": 100.0, "panoptic": 100.0, "pose": 100.0, "caption": 1000.0}
MAIN_SCORE = {"detection": "ap", "segmentation": "ap", "panoptic": "pq", "pose": "ap", "caption": "cider"}
POSE_NAMES = ("ap", "ap50", "ap75", "ap_medium", "ap_large")  # COCO has no small ones
_KINDS = {"detection": "bbox", "segmentation": "segm", "pose": "keypoints"}


@torch.no_grad()
def predict_rows(
    head: Head, maps: FeatureMaps, data: TaskData, indices: Iterable[int], device: torch.device, batch_size: int = 16
) -> list[dict[str, Any]]:
    """Run a head over images.

    Args:
        head: In eval mode.
        maps: What feeds it.
        data: The images, laid out without chance.
        indices: Which of them.
        device: Where to compute.
        batch_size: Images at once.

    Returns:
        For each image that could be read "image_id" and "caption", or "objects": {"category_id", "score", "bbox" (left, top, width, height in
        pixels)} with "segmentation" (run lengths) where the head draws masks; at most 100 of them, the most certain.
    """
    found, wanted = [], list(indices)
    for start in range(0, len(wanted), batch_size):
        pairs = [(index, data.get(0, index)) for index in wanted[start : start + batch_size]]
        kept = [(index, item) for index, item in pairs if item is not None]
        if not kept:
            continue
        batch = collate_items([item for _, item in kept])
        features = batch["features"] if "features" in batch else maps(batch["pixels"].to(device))
        targets = [{name: value.to(device) for name, value in target.items()} for target in batch["targets"]]
        for (index, _), guess in zip(kept, head.predict(features.to(device), targets), strict=True):
            found.append(_row(head, data, index, guess))
    return found


def _row(head: Head, data: TaskData, index: int, guess: Mapping[str, Any]) -> dict[str, Any]:
    image = data.data.images[index]
    row: dict[str, Any] = {"image_id": image.image_id}
    if head.task == "caption":
        return {**row, "caption": guess["caption"]}
    labels, scores = guess["labels"][:MOST].tolist(), guess["scores"][:MOST].tolist()
    ids = head.config.classes.ids
    if "masks" in guess:
        parts = _mask_parts(guess["masks"][:MOST])
    elif "keypoints" in guess:
        parts = [{"keypoints": points} for points in _pixel_points(guess["keypoints"][:MOST], data, index)]
    else:
        parts = [{"bbox": box} for box in _pixel_boxes(guess["boxes"][:MOST], data, index)]
    objects = [{"category_id": ids[label], "score": score, **part} for label, score, part in zip(labels, scores, parts, strict=True)]
    return {**row, "objects": objects}


def _pixel_boxes(boxes: Tensor, data: TaskData, index: int) -> list[list[float]]:
    """Boxes (centre x, centre y, width, height as shares of the canvas) as left, top, width, height in the picture's pixels."""
    place, image = data.place(0, index), data.data.images[index]
    middle, sides = boxes.double().cpu().split(2, dim=1)
    corners = place.back(torch.cat([middle - sides / 2, middle + sides / 2], dim=1) * place.canvas)
    limit = torch.tensor([image.width, image.height] * 2, dtype=torch.float64)
    corners = corners.clamp(min=torch.zeros(4, dtype=torch.float64), max=limit)
    return torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], dim=1).tolist()


def _pixel_points(keypoints: Tensor, data: TaskData, index: int) -> list[list[float]]:
    """Keypoints [n, K, 3] (x, y as shares of the canvas, certainty) as COCO's list of x, y, certainty in the picture's pixels."""
    place = data.place(0, index)
    points = keypoints[..., :2].double().cpu().reshape(-1, 2) * place.canvas
    back = place.back(torch.cat([points, points], dim=1))[:, :2].reshape(*keypoints.shape[:2], 2)
    rows: list[list[float]] = torch.cat([back, keypoints[..., 2:].double().cpu()], dim=-1).flatten(1).tolist()
    return rows


def _mask_parts(masks: Tensor) -> list[dict[str, Any]]:
    """Masks bool [n, height, width] as run lengths with their boxes."""
    parts = []
    for mask in masks.cpu().numpy():
        code = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        box = [float(value) for value in coco_mask.toBbox(code)]
        parts.append({"bbox": box, "segmentation": {"size": list(code["size"]), "counts": code["counts"].decode("ascii")}})
    return parts


def score_rows(task: str, rows: Sequence[Mapping[str, Any]], coco: CocoSet) -> dict[str, float]:
    """Score what a head found in the images of `rows`.

    Args:
        task: "detection", "segmentation" or "caption".
        rows: From `predict_rows`.
        coco: What is there.

    Returns:
        Detection, segmentation: average precision over IoU .5 to .95 ("ap"), at .5 and .75, for small, medium and large objects; percent; sizes
        of which there is no object are left out. Captions: "cider" (100 is 1.0 of CIDEr-D) and "bleu1" to "bleu4", percent.

    Raises:
        DataError: There are no rows.
    """
    return _scorer(task, rows, coco)([True] * len(rows))


def score_with_intervals(task: str, rows: Sequence[Mapping[str, Any]], coco: CocoSet) -> dict[str, dict[str, Any]]:
    """Score as `score_rows` does, with 95 % intervals by the jackknife over groups of images, since the figures are no means over images.

    Returns:
        {"value", "ci95", "n"} for each figure.

    Source: delete-a-group jackknife (Kott, 2001), Student's t.
    """
    score = _scorer(task, rows, coco)
    whole, groups = score([True] * len(rows)), min(GROUPS, len(rows))
    without = [score([index % groups != group for index in range(len(rows))]) for group in range(groups)] if groups > 1 else []
    found = {}
    for name, value in whole.items():
        parts = [part[name] for part in without if name in part]
        spread = math.sqrt((len(parts) - 1) / len(parts) * sum((part - value) ** 2 for part in parts)) if len(parts) > 1 else math.inf
        reach = student_t95(max(1, len(parts) - 1)) * spread
        found[name] = {
            "value": value,
            "ci95": [round(max(0.0, value - reach), 4), round(min(value + reach, MOST_SCORE[task]), 4)],
            "n": len(rows),
        }
    return found


def _scorer(task: str, rows: Sequence[Mapping[str, Any]], coco: CocoSet) -> Callable[[Sequence[bool]], dict[str, float]]:
    """Give the function that scores a part of the rows; what is dear is done once."""
    if not rows:
        raise DataError("no image was looked at: there is nothing to score")
    if task == "panoptic":
        return _panoptic(rows, coco)
    return _captions(rows, coco) if task == "caption" else _average_precision(task, rows, coco)


def _panoptic(rows: Sequence[Mapping[str, Any]], coco: CocoSet) -> Callable[[Sequence[bool]], dict[str, float]]:
    if coco.panoptic is None or coco.classes is None:
        raise DataError("panoptic quality needs the panoptic file that the set was read with")
    said = {row["image_id"]: row for row in coco.panoptic["annotations"]}
    sizes = {image.image_id: (image.height, image.width) for image in coco.images}
    tallies = []
    for row in rows:
        truth = said[row["image_id"]]
        found = np.zeros(sizes[row["image_id"]], dtype=np.int64)
        for number, segment in enumerate(row["objects"], start=1):
            found[coco_mask.decode(segment["segmentation"]).astype(bool)] = number
        kinds = {
            crowd: {s["id"]: s["category_id"] for s in truth["segments_info"] if bool(s.get("iscrowd")) is crowd} for crowd in (False, True)
        }
        own = {number: segment["category_id"] for number, segment in enumerate(row["objects"], start=1)}
        ids = segment_ids(coco.panoptic["pngs"] / truth["file_name"], found.shape)
        if strange := sorted(set(np.unique(ids).tolist()) - {VOID, *kinds[False], *kinds[True]}):
            raise DataError(
                f"{coco.panoptic['pngs'] / truth['file_name']} has pixels of segment {strange[0]}, which the JSON file does not list for image "
                f"{row['image_id']}: are PNGs and JSON of one set?"
            )
        tallies.append(tally(ids, kinds[False], kinds[True], found, own))
    things = dict(zip(coco.classes.ids, coco.things, strict=True))
    return lambda kept: panoptic_quality([one for one, keep in zip(tallies, kept, strict=True) if keep], things)


def _average_precision(task: str, rows: Sequence[Mapping[str, Any]], coco: CocoSet) -> Callable[[Sequence[bool]], dict[str, float]]:
    if coco.instances is None:
        raise DataError("average precision needs the instances file that the set was read with")
    results = [{"image_id": row["image_id"], **found} for row in rows for found in row["objects"]]
    if not results:
        return lambda _: dict.fromkeys(AP_NAMES[:3], 0.0)
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools talks
        truth = COCO()
        truth.dataset = {"info": {}, **coco.instances}
        if task == "pose":
            truth.dataset["annotations"] = [{**row, "num_keypoints": _visible(row)} for row in coco.instances["annotations"]]
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), _KINDS[task])
        if task == "pose" and coco.joints is not None:
            evaluation.params.kpt_oks_sigmas = np.array(coco.joints.sigmas)
        evaluation.params.imgIds = sorted(row["image_id"] for row in rows)
        evaluation.evaluate()
    images, matches = list(evaluation.params.imgIds), evaluation.evalImgs  # matches: by category, then size, then image

    def score(kept: Sequence[bool]) -> dict[str, float]:
        wanted = {row["image_id"] for row, keep in zip(rows, kept, strict=True) if keep}
        inside = [image in wanted for image in images]
        evaluation.params.imgIds = [image for image in images if image in wanted]
        evaluation.evalImgs = [match for place, match in enumerate(matches) if inside[place % len(images)]]
        evaluation._paramsEval = copy.deepcopy(evaluation.params)
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation.accumulate()
            evaluation.summarize()
        names = POSE_NAMES if task == "pose" else AP_NAMES
        stats = zip(names, evaluation.stats[: len(names)], strict=True)
        return {name: round(100 * float(value), 4) for name, value in stats if value >= 0}

    return score


def _visible(row: Mapping[str, Any]) -> int:
    return sum(value > 0 for value in (row.get("keypoints") or ())[2::3])


def _captions(rows: Sequence[Mapping[str, Any]], coco: CocoSet) -> Callable[[Sequence[bool]], dict[str, float]]:
    told = {image.image_id: image.captions for image in coco.images}
    given = [tokens(row["caption"]) for row in rows]
    references = [[tokens(text) for text in told[row["image_id"]]] for row in rows]
    counts = [bleu_counts(one, texts) for one, texts in zip(given, references, strict=True)]

    def score(kept: Sequence[bool]) -> dict[str, float]:
        part = [index for index, keep in enumerate(kept) if keep]
        cider = cider_d([given[index] for index in part], [references[index] for index in part])
        bleu = bleu_of(BleuCounts.total(counts[index] for index in part))
        named = {f"bleu{order}": round(100 * value, 4) for order, value in enumerate(bleu, start=1)}
        return {"cider": round(100 * sum(cider) / len(cider), 4), **named}

    return score


def score_text(task: str, scores: Mapping[str, float]) -> str:
    """The scores that people ask for, in a line."""
    lines = {"caption": {"cider": "CIDEr", "bleu4": "BLEU-4"}, "panoptic": {"pq": "PQ", "sq": "SQ", "rq": "RQ"}}
    names = lines.get(task, {"ap": "AP", "ap50": "AP50", "ap75": "AP75"})
    kind = {"detection": "box ", "segmentation": "mask ", "pose": "keypoint "}.get(task, "")
    return ", ".join(f"{kind}{title} {scores[name]:.2f}" for name, title in names.items())
