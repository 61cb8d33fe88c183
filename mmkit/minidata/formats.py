"""Scenes as the files the real data sets come in: COCO instances and captions, LLaVA conversations, VQAv2 questions and annotations."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from mmkit.minidata.language import DESCRIBE_PROMPTS, Question, caption, conversation, questions, text_conversation
from mmkit.minidata.masks import segmentation_of
from mmkit.minidata.names import table
from mmkit.minidata.scene import Scene
from mmkit.minidata.world import COLOURS

LICENSE = {"id": 1, "name": "CC BY-SA 4.0", "url": "https://creativecommons.org/licenses/by-sa/4.0/"}
CREDIT = "All emojis designed by OpenMoji - the open-source emoji and icon project. License: CC BY-SA 4.0"
SCENE_SPLITS = ("train", "val", "test", "unseen")
CAPTIONS_PER_IMAGE = 5  # as COCO
QUESTIONS_PER_IMAGE = 3


@dataclass(frozen=True)
class Numbered:
    """A scene with its split, its image id, the seed of everything that is said about it, and the names its questions may ask for."""

    split: str
    image_id: int
    seed: int
    scene: Scene
    pool: Sequence[str]

    @property
    def image(self) -> str:
        """Path relative to OUT/images."""
        return f"{self.split}/{self.image_id:06d}.png"

    def generator(self, purpose: int) -> np.random.Generator:
        """Randomness of its own for each purpose, so that a change in one file moves no other."""
        return np.random.default_rng((self.seed, 1, SCENE_SPLITS.index(self.split), self.image_id, purpose))


def _info(what: str) -> dict[str, Any]:
    return {"description": f"mmkit embedded data: {what}", "version": "1", "contributor": CREDIT}


@cache
def _category_ids() -> dict[str, int]:
    return {name: number for number, name in enumerate(table(), 1)}


def coco_instances(scenes: Sequence[Numbered]) -> dict[str, Any]:
    """COCO instances: boxes and masks of what is visible. Category ids are the same in all splits."""
    annotations: list[dict[str, Any]] = []
    for item in scenes:
        for placed in item.scene.objects:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": item.image_id,
                    "category_id": _category_ids()[placed.name],
                    "bbox": list(placed.box),
                    "area": int(placed.mask.sum()),
                    "iscrowd": 0,
                    "segmentation": segmentation_of(placed.mask),
                }
            )
    rows = table().values()
    names = [{"id": _category_ids()[row.name], "name": row.name, "supercategory": row.category} for row in rows]
    return {**_coco_head("instances", scenes), "categories": names, "annotations": annotations}


KEYPOINTS = ("top", "bottom", "left_end", "right_end")  # where what is visible of a drawing ends; no person's mark, so no spread of marks
KEYPOINT_SIGMA = 0.08  # about as exact as COCO's shoulders


def coco_keypoints(scenes: Sequence[Numbered], instances: dict[str, Any]) -> dict[str, Any]:
    """COCO keypoints: the instances, with the ends of each drawing's visible part as its keypoints."""
    masks = (placed.mask for item in scenes for placed in item.scene.objects)
    rows = [
        {**row, "keypoints": _ends(mask), "num_keypoints": len(KEYPOINTS)}
        for row, mask in zip(instances["annotations"], masks, strict=True)
    ]
    names = {"keypoints": list(KEYPOINTS), "skeleton": [[1, 2], [3, 4]], "sigmas": [KEYPOINT_SIGMA] * len(KEYPOINTS)}
    categories = [{**row, **names} for row in instances["categories"]]
    return {**instances, "info": _info("keypoints"), "categories": categories, "annotations": rows}


def _ends(mask: np.ndarray) -> list[float]:
    """x, y, visibility of the uppermost, lowest, leftmost and rightmost pixels' middles; of several, their mean."""
    rows, columns = np.nonzero(mask)
    ends: list[float] = []
    for values, end in ((rows, rows.min()), (rows, rows.max()), (columns, columns.min()), (columns, columns.max())):
        chosen = values == end
        ends += [round(float(columns[chosen].mean()) + 0.5, 2), round(float(rows[chosen].mean()) + 0.5, 2), 2]
    return ends


def coco_panoptic(item: Numbered) -> tuple[np.ndarray, dict[str, Any]]:
    """One picture's segments in COCO's panoptic form: ids [size, size], and what they are.

    Drawings are things; what no drawing covers is the background, stuff of its colour; a written word's box is void (0).
    """
    scene, size = item.scene, item.scene.size
    ids = np.full((size, size), len(scene.objects) + 1, dtype=np.int64)
    if scene.word is not None:
        left, top, width, height = scene.word.box
        ids[max(0, top) : top + height, max(0, left) : left + width] = 0
    for number, placed in enumerate(scene.objects, 1):
        ids[placed.mask] = number
    kinds = {number: _category_ids()[placed.name] for number, placed in enumerate(scene.objects, 1)}
    kinds[len(scene.objects) + 1] = _stuff_ids()[scene.background]
    info = []
    for number, category in kinds.items():
        rows, columns = np.nonzero(ids == number)
        if len(rows):
            box = [int(columns.min()), int(rows.min()), int(np.ptp(columns)) + 1, int(np.ptp(rows)) + 1]
            info.append({"id": number, "category_id": category, "iscrowd": 0, "bbox": box, "area": len(rows)})
    return ids, {"image_id": item.image_id, "file_name": f"{item.image_id:06d}.png", "segments_info": info}


def coco_panoptic_file(scenes: Sequence[Numbered], annotations: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """COCO's panoptic JSON over all pictures of a split; category ids of drawings are those of the instances."""
    names = [{"id": _category_ids()[row.name], "name": row.name, "supercategory": row.category, "isthing": 1} for row in table().values()]
    names += [
        {"id": number, "name": f"{name} background", "supercategory": "background", "isthing": 0} for name, number in _stuff_ids().items()
    ]
    return {**_coco_head("panoptic", scenes), "categories": names, "annotations": list(annotations)}


def panoptic_colours(ids: np.ndarray) -> np.ndarray:
    """Segment ids [height, width] as COCO's PNGs hold them: id = red + 256 green + 65,536 blue; uint8 [height, width, 3]."""
    return np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8)


@cache
def _stuff_ids() -> dict[str, int]:
    return {name: len(table()) + number for number, name in enumerate(COLOURS, 1)}


def coco_captions(scenes: Sequence[Numbered]) -> dict[str, Any]:
    """COCO captions: five for each picture, in different words where there are any."""
    annotations: list[dict[str, Any]] = []
    for item in scenes:
        rng = item.generator(1)
        for _ in range(CAPTIONS_PER_IMAGE):
            annotations.append({"id": len(annotations) + 1, "image_id": item.image_id, "caption": caption(item.scene, rng)})
    return {**_coco_head("captions", scenes), "annotations": annotations}


def _coco_head(what: str, scenes: Sequence[Numbered]) -> dict[str, Any]:
    images = [
        {"id": item.image_id, "file_name": f"{item.image_id:06d}.png", "width": item.scene.size, "height": item.scene.size, "license": 1}
        for item in scenes
    ]
    return {"info": _info(what), "licenses": [LICENSE], "images": images}


def llava_pretrain(scenes: Sequence[Numbered]) -> list[dict[str, Any]]:
    """LLaVA's stage 1 file: one caption for each picture; the image mark before or after the request, as in LLaVA's own."""
    rows = []
    for item in scenes:
        rng = item.generator(2)
        prompt = DESCRIBE_PROMPTS[int(rng.integers(len(DESCRIBE_PROMPTS)))]
        human = f"<image>\n{prompt}" if rng.random() < 0.5 else f"{prompt}\n<image>"
        turns = [{"from": "human", "value": human}, {"from": "gpt", "value": caption(item.scene, rng)}]
        rows.append({"id": f"{item.split}-{item.image_id:06d}", "image": item.image, "conversations": turns})
    return rows


def llava_instruct(scenes: Sequence[Numbered], per_image: int = 2, text_share: float = 0.08) -> list[dict[str, Any]]:
    """LLaVA's stage 2 file: conversations about pictures and, strewn among them, some without a picture (no "image" key)."""
    rows: list[dict[str, Any]] = []
    for item in scenes:
        rng = item.generator(3)
        for part in range(per_image):
            name = f"{item.split}-{item.image_id:06d}-{part}"
            rows.append({"id": name, "image": item.image, "conversations": conversation(item.scene, rng, item.pool)})
            if rng.random() < text_share:
                rows.append({"id": f"{name}-text", "conversations": text_conversation(rng, item.pool)})
    return rows


# How many answers each form of question has, roughly: what "evenly spread" is measured against. For "object" it is the names there are.
_SPREAD = {"presence": 2, "count": 5, "count of a name": 5, "colour": 9, "relation": 4, "relation, yes or no": 2, "word": 60}


def form_of(question: Question) -> str:
    """The question's kind, finer where its wording narrows the answers: a guesser may read the question, too."""
    if question.kind == "count" and not question.text.startswith("how many objects"):
        return "count of a name"
    if question.kind == "relation" and question.answer in ("yes", "no"):
        return "relation, yes or no"
    return question.kind


def choose_questions(scenes: Sequence[Numbered], per_image: int = QUESTIONS_PER_IMAGE) -> list[tuple[Numbered, Question]]:
    """Questions for each picture, so that kinds come equally often and, within a form, answers do.

    One after another, the question is taken whose kind and whose answer were asked least so far; no two of a form about one picture.
    """
    kinds: Counter[str] = Counter()
    answers: Counter[tuple[str, str]] = Counter()
    chosen: list[tuple[Numbered, Question]] = []
    for item in scenes:
        rng = item.generator(4)
        left = questions(item.scene, rng, item.pool)
        spread = {**_SPREAD, "object": len(item.pool)}
        for _ in range(per_image):
            if not left:
                break
            best = min(
                left,
                key=lambda question: kinds[question.kind] + 2 * spread[form_of(question)] * answers[form_of(question), question.answer],
            )
            kinds[best.kind] += 1
            answers[form_of(best), best.answer] += 1
            chosen.append((item, best))
            left = [question for question in left if form_of(question) != form_of(best)]
    return chosen


def vqa_files(chosen: Sequence[tuple[Numbered, Question]], split: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """VQAv2's questions file and annotations file. Beyond VQAv2, each question carries "image", its path relative to OUT/images."""
    head = {"info": _info("questions"), "license": LICENSE, "data_type": "mmkit_mini", "data_subtype": split}
    asked: list[dict[str, Any]] = []
    answered: list[dict[str, Any]] = []
    numbers: Counter[int] = Counter()
    for item, question in chosen:
        question_id = item.image_id * 1000 + numbers[item.image_id]  # as VQAv2 numbers them
        numbers[item.image_id] += 1
        asked.append({"question_id": question_id, "image_id": item.image_id, "question": question.text, "image": item.image})
        answered.append(
            {
                "question_id": question_id,
                "image_id": item.image_id,
                "question_type": question.kind,
                "answer_type": {"yes": "yes/no", "no": "yes/no"}.get(question.answer, "number" if question.kind == "count" else "other"),
                "multiple_choice_answer": question.answer,
                "answers": [
                    {"answer": answer, "answer_confidence": "yes", "answer_id": number}
                    for number, answer in enumerate(question.answers10, 1)
                ],
            }
        )
    return {**head, "task_type": "Open-Ended", "questions": asked}, {**head, "annotations": answered}
