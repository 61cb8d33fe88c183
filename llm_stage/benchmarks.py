"""The one table of question-answering benchmarks, and the reading of their files.

A benchmark is a row: what is asked, how long the answer may be, who scores it. Every row has a control beside it, NAME_shuffled: the same
questions, each before another question's image. What a model still gets right there, it got right without looking.

Files are VQAv2's: questions {"questions": [{question_id, image_id, question}]}, annotations {"annotations": [{question_id, image_id,
question_type, multiple_choice_answer, answers: [{answer}] * 10}]}. A question may name its picture itself ("image", relative to the image
folder); else the picture is looked for under COCO's names.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mmkit.errors import DataError, find
from mmkit.scoring import most_common_answer

CONTROL_SUFFIX = "_shuffled"
SHORT_ANSWER = "Answer the question using a single word or phrase."  # LLaVA-1.5
SHOWN = 5  # names in one message


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    Attributes:
        name: As in `summary.json` and in folder names.
        prompt: What the model is asked, with "{question}" in it; the image comes first.
        max_new_tokens: Longest answer.
        scorer: Variant of `mmkit.scoring.vqa_accuracy`.
        control_of: The benchmark this one is the shuffled control of.
        data_type: What the question file calls itself, where that alone tells the benchmark.
    """

    name: str
    prompt: str
    max_new_tokens: int = 16
    scorer: str = "vqa_2021"
    control_of: str = ""
    data_type: str = ""

    @property
    def shuffled(self) -> bool:
        """True for a control."""
        return bool(self.control_of)

    def ask(self, question: str) -> str:
        """The words of the user's turn, without the image mark."""
        return self.prompt.replace("{question}", question.strip())


_ROWS = (
    # the embedded world speaks lower case; its questions bear LLaVA's line in this form in training too
    Benchmark("mini_vqa", "{question}\n" + SHORT_ANSWER.lower(), data_type="mmkit_mini"),
    Benchmark("vqav2", "{question}\n" + SHORT_ANSWER, max_new_tokens=128),
    # references: the field `answer` (stemmed), which published numbers use; `raw_answer` is not read
    Benchmark("okvqa", "{question}\n" + SHORT_ANSWER, max_new_tokens=128),
    Benchmark("own_vqa", "{question}\n" + SHORT_ANSWER, max_new_tokens=64),
)
BENCHMARKS: dict[str, Benchmark] = {
    row.name: row
    for plain in _ROWS
    for row in (plain, replace(plain, name=plain.name + CONTROL_SUFFIX, control_of=plain.name, data_type=""))
}


def choose(name: str, shuffle_images: bool, data_type: str) -> Benchmark:
    """Find the row for a run.

    Args:
        name: A benchmark's name; "" goes by what the question file says of itself, else own_vqa.
        shuffle_images: Take the row's control.
        data_type: "data_type" of the question file.

    Raises:
        NameNotFound: There is no such benchmark; the nearest are named.
    """
    if not name:
        name = next((row.name for row in BENCHMARKS.values() if row.data_type and row.data_type == data_type), "own_vqa")
    row = find("benchmark", BENCHMARKS, name)
    return row if row.shuffled or not shuffle_images else BENCHMARKS[row.name + CONTROL_SUFFIX]


@dataclass(frozen=True)
class VqaItem:
    """One question with its picture and what ten people answered.

    Attributes:
        image: The picture's name, relative to the image folder.
        own_image: The picture the question is about; another than `image` in a control.
        kind: "question_type" of the annotation; "all" where there is none.
    """

    question_id: int | str
    question: str
    image: str
    own_image: str
    kind: str
    answers: tuple[str, ...]

    @property
    def reference(self) -> str:
        """The answer most people gave."""
        return most_common_answer(self.answers)


def read_json(path: Path | str, key: str) -> dict[str, Any]:
    """Read a JSON file that holds a list of objects under `key`.

    Raises:
        DataError: It does not exist, is no JSON, or has no such list.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"no file '{path}' (wanted for its '{key}')")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is no JSON: {error}") from error
    rows = data.get(key) if isinstance(data, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        has = ", ".join(data) if isinstance(data, dict) else f"a {type(data).__name__}"
        raise DataError(f"{path} has no list '{key}'; it holds {has}. Questions and annotations come in two files, as in VQAv2")
    if not rows:
        raise DataError(f"{path}: the list '{key}' is empty")
    return {**data, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def by_question(rows: Sequence[Mapping[str, Any]], fields: Iterable[str], path: Path | str) -> dict[int | str, Mapping[str, Any]]:
    """Key rows by their question id.

    Raises:
        DataError: A row lacks a field, or an id comes twice; the row's number is named.
    """
    table: dict[int | str, Mapping[str, Any]] = {}
    for number, row in enumerate(rows):
        absent = [field for field in ("question_id", *fields) if field not in row]
        if absent:
            raise DataError(f"{path}, row {number} (question {row.get('question_id', '?')}), lacks {', '.join(absent)}")
        if row["question_id"] in table:
            raise DataError(f"{path}, row {number}: question_id {row['question_id']} comes twice; answers could not be told apart")
        table[row["question_id"]] = row
    return table


def people(annotation: Mapping[str, Any], path: Path | str) -> tuple[str, ...]:
    """The people's answers of an annotation.

    Raises:
        DataError: There are not ten.
    """
    answers = annotation.get("answers")
    if not isinstance(answers, list) or len(answers) != 10:
        count = len(answers) if isinstance(answers, list) else 0
        raise DataError(
            f"{path}: question {annotation.get('question_id', '?')} has {count} answers, not ten. A test split has none: take val"
        )
    return tuple(str(answer["answer"] if isinstance(answer, dict) else answer) for answer in answers)


def read_items(questions: Path | str, annotations: Path | str, images: Path | str, limit: int = 0) -> tuple[list[VqaItem], dict[str, Any]]:
    """Join questions, annotations and pictures by question id.

    Args:
        questions: Question file.
        annotations: Annotation file of the same questions; it may hold more.
        images: Folder that picture names are relative to.
        limit: Take the first so many questions; 0 takes all.

    Returns:
        The items in the file's order, and the question file's head (`data_type`, `data_subtype`, `sha256`, ...).

    Raises:
        DataError: See the other functions here; also questions without annotation, and pictures that do not exist.
    """
    asked, told = read_json(questions, "questions"), read_json(annotations, "annotations")
    by_id = by_question(asked["questions"], ("question",), questions)
    notes = by_question(told["annotations"], (), annotations)
    if limit:
        by_id = dict(list(by_id.items())[:limit])
    lost = [name for name in by_id if name not in notes]
    if lost:
        raise DataError(
            f"{len(lost)} of {len(by_id)} questions of {questions} have no annotation in {annotations}: {_some(lost)}. Same split?"
        )
    split = str(asked.get("data_subtype", ""))
    root, items, absent = Path(images), [], {}
    for name, row in by_id.items():
        picture, tried = find_image(row, root, split)
        if picture is None:
            absent[name] = tried
            continue
        kind = str(notes[name].get("question_type") or "all")
        items.append(VqaItem(name, str(row["question"]), picture, picture, kind, people(notes[name], annotations)))
    if absent:
        first = next(iter(absent))
        raise DataError(
            f"{len(absent)} of {len(by_id)} questions have no picture under {root}: question {first} of {questions} wants"
            f" {' or '.join(absent[first])}. Give the folder that these names are relative to, --images DIR"
        )
    head = {key: value for key, value in asked.items() if key != "questions"}
    return items, {**head, "annotations_sha256": told["sha256"]}


def find_image(question: Mapping[str, Any], root: Path, split: str) -> tuple[str | None, list[str]]:
    """Find a question's picture: its own "image", else COCO's names for its image_id.

    Returns:
        The name relative to the folder (None if there is no such file), and all names tried.
    """
    if question.get("image"):
        names = [str(question["image"])]
    elif "image_id" in question:
        image_id = question["image_id"]
        number = f"{image_id:012d}" if isinstance(image_id, int) else str(image_id)
        stems = [f"COCO_{split}_{number}.jpg", f"{split}/COCO_{split}_{number}.jpg"] if split else []
        names = [*stems, f"{number}.jpg", f"{image_id}.jpg", f"{image_id}.png"]
    else:
        raise DataError(f"question {question.get('question_id', '?')} names no picture: it has neither 'image' nor 'image_id'")
    return next((name for name in names if (root / name).is_file()), None), names


def shuffle_images(items: Sequence[VqaItem], seed: int) -> list[VqaItem]:
    """Give every question another question's picture; none keeps its own.

    The pictures are put in a random circle and each question takes the next one, so that all questions of a picture go to the same other
    picture, and equal seeds shuffle alike for every model.

    Raises:
        DataError: There is only one picture.
    """
    names = sorted({item.own_image for item in items})
    if len(names) < 2:
        raise DataError(f"{len(items)} questions about {len(names)} picture cannot change pictures; at least two are needed")
    circle = [names[i] for i in np.random.default_rng(seed).permutation(len(names))]
    following = dict(zip(circle, circle[1:] + circle[:1], strict=True))
    return [replace(item, image=following[item.own_image]) for item in items]


def most_frequent(annotations: Sequence[Mapping[str, Any]], path: Path | str) -> dict[str, str]:
    """The most frequent answer of each question kind, and under "" that of all: what one can say without image or question.

    Args:
        annotations: Rows with `question_type`, and `multiple_choice_answer` or ten `answers`.
        path: Where they came from, for the message.
    """
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for row in annotations:
        answer = row.get("multiple_choice_answer")
        answer = str(answer) if answer is not None else most_common_answer(people(row, path))
        for kind in (str(row.get("question_type") or "all"), ""):
            counts[kind][answer] += 1
    # ties by the alphabet, so that the order of the file does not matter
    return {kind: min(count, key=lambda answer: (-count[answer], answer)) for kind, count in counts.items()}


def _some(names: Sequence[Any]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(str(name) for name in names[:SHOWN]) + more
