"""Tiny made-up sets in the official format of every benchmark: the flags that read them, and the right answer of every question."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from mmkit.choice_scoring import MME_COGNITION, MME_PERCEPTION

COLOURS = {"red": (220, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 210), "white": (250, 250, 250)}
NAMES = list(COLOURS)


@dataclass
class Tiny:
    """Files of one benchmark: flags by name, and by question id the right answer."""

    flags: dict[str, str]
    right: dict[Any, str]
    images: dict[Any, str] = field(default_factory=dict)  # colour of each question's picture


def picture(path: Path, colour: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), COLOURS[colour]).save(path)


def save(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def tens(answer: str, key: str = "answer") -> list[dict[str, Any]]:
    return [{"answer_id": i + 1, key: answer, "answer_confidence": "yes"} for i in range(10)]


def vqa(root: Path, split: str = "val2014", **head: str) -> Tiny:
    questions, annotations, right = [], [], {}
    for number, colour in enumerate(NAMES):
        picture(root / "images" / f"COCO_{split}_{number:012d}.jpg", colour)
        questions.append({"question_id": number * 1000, "image_id": number, "question": "What color is this?"})
        note = {"question_id": number * 1000, "image_id": number, "question_type": "what color", "answer_type": "other"}
        annotations.append({**note, "multiple_choice_answer": colour, "answers": tens(colour)})
        right[number * 1000] = colour
    save(root / "q.json", {"info": {}, "data_type": "mscoco", "data_subtype": split, **head, "questions": questions})
    save(root / "a.json", {"info": {}, "data_subtype": split, "annotations": annotations})
    return Tiny(files(root, "q.json", "a.json"), right)


def files(root: Path, questions: str, annotations: str = "", images: str = "images", **more: str) -> dict[str, str]:
    flags = {"questions": str(root / questions), "images": str(root / images)}
    return flags | ({"annotations": str(root / annotations)} if annotations else {}) | {key: str(root / name) for key, name in more.items()}


def okvqa(root: Path) -> Tiny:
    tiny = vqa(root)
    data = json.loads((root / "a.json").read_text())
    for row in data["annotations"]:
        row["answers"] = [{**answer, "raw_answer": answer["answer"] + "s", "answer_confidence": "yes"} for answer in row["answers"]]
        del row["multiple_choice_answer"]
    save(root / "a.json", data)
    return tiny


def gqa(root: Path) -> Tiny:
    rows, right = {}, {}
    for number, colour in enumerate(NAMES):
        picture(root / "images" / f"n{number}.jpg", colour)
        yes = number == 0
        rows[f"2000{number}"] = {
            "question": "Is it red?" if yes else "What color is it?",
            "answer": "yes" if yes else colour,
            "imageId": f"n{number}",
            "isBalanced": True,
            "groups": {"global": None if yes else "color", "local": "x"},
            "entailed": [],
            "equivalent": [],
            "types": {"structural": "verify" if yes else "query", "semantic": "attr", "detailed": "d"},
            "semantic": [{"operation": "select", "argument": "thing (1)"}, {"operation": "query", "argument": "color"}],
        }
        right[f"2000{number}"] = rows[f"2000{number}"]["answer"]
    rows["29999"] = {**rows["20001"], "isBalanced": False}
    save(root / "testdev_balanced_questions.json", rows)
    return Tiny(files(root, "testdev_balanced_questions.json"), right)


def textvqa(root: Path, ocr: bool = False) -> Tiny:
    rows, words, right = [], [], {}
    for number, colour in enumerate(NAMES):
        image = f"{number:016x}"
        picture(root / "train_images" / f"{image}.jpg", colour)
        row = {
            "question_id": 34602 + number,
            "image_id": image,
            "question": "what is written?",
            "answers": [colour] * 10,
            "set_name": "val",
        }
        rows.append(row)
        words.append({"image_id": image, "ocr_tokens": [colour.upper(), "Inc."], "ocr_info": []})
        right[34602 + number] = colour
    save(root / "TextVQA_0.5.1_val.json", {"dataset_type": "val", "data": rows})
    save(root / "TextVQA_Rosetta_OCR_v0.2_val.json", {"data": words})
    more = {"ocr": "TextVQA_Rosetta_OCR_v0.2_val.json"} if ocr else {}
    return Tiny(files(root, "TextVQA_0.5.1_val.json", images="train_images", **more), right)


def vizwiz(root: Path) -> Tiny:
    rows, right = [], {}
    for number, colour in enumerate(NAMES):
        name = f"VizWiz_val_{number:08d}.jpg"
        picture(root / "val" / name, colour)
        answer = "unanswerable" if number == 0 else colour
        kind = "unanswerable" if number == 0 else "other"
        rows.append(
            {"image": name, "question": "What is this?", "answers": tens(answer), "answer_type": kind, "answerable": int(number > 0)}
        )
        right[name] = answer
    save(root / "val.json", rows)
    return Tiny(files(root, "val.json", images="val"), right)


def scienceqa(root: Path) -> Tiny:
    problems, right = {}, {}
    for number, colour in enumerate(NAMES):
        name, with_image = str(number + 4), number != 3
        if with_image:
            picture(root / "images" / "test" / name / "image.png", colour)
        problems[name] = {
            "question": "Which is it?",
            "choices": ["iron", "wood", "glass"][: 2 + number % 2],
            "answer": number % 2,
            "hint": "" if number else "Look.",
            "image": "image.png" if with_image else None,
            "split": "test",
            "subject": "natural science" if number < 2 else "social science",
        }
        right[name] = "AB"[number % 2]
    save(root / "problems.json", problems)
    save(root / "pid_splits.json", {"train": [], "test": list(problems)})
    return Tiny(files(root, "problems.json"), right)


def scienceqa_img(root: Path) -> Tiny:
    tiny = scienceqa(root)
    del tiny.right["7"]
    return tiny


def pope(root: Path) -> Tiny:
    right = {}
    for category in ("random", "popular", "adversarial"):
        lines = []
        for number in range(1, 5):
            image = f"COCO_val2014_{number:012d}.jpg"
            picture(root / "val2014" / image, NAMES[number - 1])
            label = "yes" if number % 2 else "no"
            lines.append(json.dumps({"question_id": number, "image": image, "text": "Is there a dog in the image?", "label": label}))
            right[f"{category}/{number}"] = label.capitalize()
        save(root / "pope" / f"coco_pope_{category}.json", "\n".join(lines) + "\n")
    return Tiny(files(root, "pope", images="val2014"), right)


def mme(root: Path) -> Tiny:
    right = {}
    for subtask in (*MME_PERCEPTION, *MME_COGNITION):
        apart = subtask in ("posters", "celebrity", "scene", "landmark", "artwork")
        for number in range(2):
            stem = f"{number:04d}"
            ending = "png" if number else "jpg"
            picture(root / "mme" / subtask / ("images" if apart else ".") / f"{stem}.{ending}", NAMES[number])
            text = "Is it red?  Please answer yes or no.\tYes\nIs it blue? Please answer yes or no.\tNo\n"
            save(root / "mme" / subtask / ("questions_answers_YN" if apart else ".") / f"{stem}.txt", text)
            right |= {f"{subtask}/{stem}.{ending}/1": "Yes", f"{subtask}/{stem}.{ending}/2": "No"}
    return Tiny(files(root, "mme", images="mme"), right)


def mmbench(root: Path) -> Tiny:
    columns = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source", "l2-category", "comment", "split"]
    lines, right = ["\t".join(columns)], {}
    for number, colour in enumerate(NAMES):
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8), COLOURS[colour]).save(buffer, "JPEG")
        pixels = base64.b64encode(buffer.getvalue()).decode()
        for turn in (0, 1):
            options = [colour, "other"][:: -1 if turn else 1]
            index, answer = number + 7 + turn * 1_000_000, "AB"[turn]
            hint = "a hint" if number == 1 else ""
            row = [str(index), "What color?", hint, *options, "", "nan", answer, "color", pixels, "made up", "coarse", "", "dev"]
            lines.append("\t".join(row))
            right[index] = answer
    save(root / "mmbench_dev.tsv", "\n".join(lines) + "\n")
    return Tiny(files(root, "mmbench_dev.tsv", images="unpacked"), right)


def seed(root: Path) -> Tiny:
    rows, right = [], {}
    for number, colour in enumerate(NAMES):
        (root / "images").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), COLOURS[colour]).save(root / "images" / f"{number}_9", "PNG")  # SEED's pictures have no ending
        choices = {f"choice_{letter}": name for letter, name in zip("abcd", NAMES, strict=True)}
        row = {"answer": "ABCD"[number], **choices, "data_id": f"{number}_9", "data_type": "image", "question": "What color?"}
        rows.append({**row, "question_id": str(100 + number), "question_type_id": 1 + number % 2})
        right[str(100 + number)] = "ABCD"[number]
    rows.append({**rows[0], "question_id": "999", "data_type": "video", "data_id": "a.mp4", "question_type_id": 10})
    save(root / "SEED-Bench.json", {"questions": rows, "question_type": {"Scene": 1, "Identity": 2, "Action": 10}})
    return Tiny(files(root, "SEED-Bench.json"), right)


def captions(root: Path, domains: bool = False) -> Tiny:
    images, annotations, right = [], [], {}
    for number, colour in enumerate(NAMES):
        name = f"{number:012d}.jpg"
        picture(root / "images" / name, colour)
        images.append(
            {"id": number + 50, "file_name": name, **({"domain": "in-domain" if number % 2 else "out-domain"} if domains else {})}
        )
        for text in (f"a plain {colour} picture of nothing", f"all of it is {colour}"):
            annotations.append({"id": len(annotations), "image_id": number + 50, "caption": text})
        right[number + 50] = f"a plain {colour} picture of nothing"
    save(root / "captions.json", {"info": {}, "images": images, "annotations": annotations})
    return Tiny(files(root, "captions.json"), right)


def flickr(root: Path) -> Tiny:
    images, right = [], {}
    for number, colour in enumerate(NAMES):
        name = f"{number + 1000}.jpg"
        picture(root / "images" / name, colour)
        sentences = [{"raw": f"A plain {colour} picture of nothing.", "tokens": []}, {"raw": f"All of it is {colour}.", "tokens": []}]
        images.append({"filename": name, "split": "test", "imgid": number, "sentences": sentences})
        right[name] = f"a plain {colour} picture of nothing"
    save(root / "dataset_flickr30k.json", {"images": images, "dataset": "flickr30k"})
    return Tiny(files(root, "dataset_flickr30k.json"), right)


MAKERS: dict[str, Callable[[Path], Tiny]] = {
    "mini_vqa": lambda root: vqa(root, data_type="mmkit_mini"),
    "mini_captions": captions,
    "vqav2": vqa,
    "okvqa": okvqa,
    "own_vqa": vqa,
    "gqa": gqa,
    "textvqa": textvqa,
    "textvqa_ocr": lambda root: textvqa(root, ocr=True),
    "vizwiz": vizwiz,
    "scienceqa": scienceqa,
    "scienceqa_img": scienceqa_img,
    "pope": pope,
    "mme": mme,
    "mmbench": mmbench,
    "seed_image": seed,
    "nocaps": lambda root: captions(root, domains=True),
    "coco_captions": captions,
    "flickr30k": flickr,
}
