"""Reading the question files of benchmarks as they are downloaded: what all readers share, and the VQA family, GQA and captions.

Every reader gives its items in the file's order, each with the names under which its picture may lie; `place` looks for the pictures.
Choices, yes and no (POPE, MME, ScienceQA, MMBench, SEED) are read in `benchmark_choice_files`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from encoders.captions import caption_rows
from mmkit.choice_scoring import textvqa_question
from mmkit.errors import DataError
from mmkit.records import read_jsonl
from mmkit.scoring import PEOPLE, most_common_answer

T = TypeVar("T")
SHOWN = 5  # names in one message


@dataclass(frozen=True)
class VqaItem:
    """One question with its picture and what is right.

    Attributes:
        question: What stands in the prompt for "{question}": with its options, its context or the words that OCR read, where it has them.
        image: The picture's name, relative to the image folder; "" where it is asked without one.
        own_image: The picture the question is about; another than `image` in a control.
        kind: Groups of questions that are reported apart; "all" where there are none.
        answers: What people or the benchmark's authors answered; empty where that is not public.
        facts: What a scorer or an upload needs beside the answers.
        aliases: Other names under which another model's answer file may know the question.
    """

    question_id: int | str
    question: str
    image: str
    own_image: str
    kind: str
    answers: tuple[str, ...]
    facts: Mapping[str, Any] = field(default_factory=dict, hash=False)
    aliases: tuple[str, ...] = ()

    @property
    def reference(self) -> str:
        """The answer most people gave, or the right one."""
        return self.answers[0] if len(self.answers) == 1 else most_common_answer(self.answers)


@dataclass(frozen=True)
class Source:
    """Where a benchmark's files are.

    Attributes:
        questions: The question file (POPE, MME: the folder of several).
        annotations: The file of answers, where it is another one.
        images: Folder that picture names are relative to; None does not look for pictures (scoring alone).
        split: Of files that hold several.
        ocr: Words read from the pictures (TextVQA's Rosetta file).
        unlabelled: The split has no public answers.
        people: How many answers a question must have; 0 is at least one.
        limit: Take the first so many questions; 0 takes all.
    """

    questions: Path
    annotations: Path | None = None
    images: Path | None = None
    split: str = ""
    ocr: Path | None = None
    unlabelled: bool = False
    people: int = PEOPLE
    limit: int = 0


Found = list[tuple[VqaItem, list[str]]]  # items, each with the names its picture may have
Head = dict[str, Any]


# ---- what readers share --------------------------------------------------------------------------------------------------------------


def read_json(path: Path | str, key: str) -> dict[str, Any]:
    """Read a JSON file that holds a list of objects under `key`.

    Raises:
        DataError: It does not exist, is no JSON, or has no such list.
    """
    data = load_json(path, f"its '{key}'")
    rows = data.get(key) if isinstance(data, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        has = ", ".join(list(data)[:8]) if isinstance(data, dict) else f"a {type(data).__name__}"
        hint = ". Questions and annotations come in two files, as in VQAv2; other formats go by --benchmark (`mmkit list benchmarks`)"
        hint = hint if key in ("questions", "annotations") else ""
        raise DataError(f"{path} has no list '{key}'; it holds {has}{hint}")
    if not rows:
        raise DataError(f"{path}: the list '{key}' is empty")
    return {**data, "sha256": file_hash(path)}


def load_json(path: Path | str, wanted: str) -> Any:
    """Read any JSON file.

    Raises:
        DataError: It does not exist or is no JSON.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"no file '{path}' (wanted for {wanted})")
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise DataError(f"{path} is no JSON: {error}") from error


def file_hash(*paths: Path | str) -> str:
    """Sha256 of one file or of several in order."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(Path(path).read_bytes())
    return digest.hexdigest()


def by_question(
    rows: Sequence[Mapping[str, Any]], fields: Iterable[str], path: Path | str, key: str = "question_id"
) -> dict[int | str, Mapping[str, Any]]:
    """Key rows by their question id.

    Raises:
        DataError: A row lacks a field, or an id comes twice; the row's number is named.
    """
    table: dict[int | str, Mapping[str, Any]] = {}
    for number, row in enumerate(rows):
        absent = [name for name in (key, *fields) if name not in row]
        if absent:
            raise DataError(f"{path}, row {number} (question {row.get(key, '?')}), lacks {', '.join(absent)}")
        if row[key] in table:
            raise DataError(f"{path}, row {number}: {key} {row[key]} comes twice; answers could not be told apart")
        table[row[key]] = row
    return table


def people(annotation: Mapping[str, Any], path: Path | str, wanted: int = PEOPLE) -> tuple[str, ...]:
    """The people's answers of an annotation.

    Raises:
        DataError: There are not so many as wanted (0: not one).
    """
    answers = annotation.get("answers")
    count = len(answers) if isinstance(answers, list) else 0
    if not isinstance(answers, list) or (count != wanted if wanted else count == 0):
        number = {PEOPLE: "not ten", 0: "at least one is wanted"}.get(wanted, f"not {wanted}")
        name = annotation.get("question_id", annotation.get("image", "?"))
        raise DataError(
            f"{path}: question {name} has {count} answers, {number}. A test split has none: take val, or --unlabelled for its upload"
        )
    return tuple(str(answer["answer"] if isinstance(answer, dict) else answer) for answer in answers)


def place(found: Found, source: Source) -> list[VqaItem]:
    """Find every item's picture under the image folder.

    Raises:
        DataError: Pictures do not exist; the first is named with the names tried.
    """
    if source.images is None:
        return [_shown(item, names[0] if names else "") for item, names in found]
    items, absent = [], {}
    for item, names in found:
        name = next((name for name in names if (source.images / name).is_file()), None)
        if names and name is None:
            absent[item.question_id] = names
        else:
            items.append(_shown(item, name or ""))
    if absent:
        first = next(iter(absent))
        raise DataError(
            f"{len(absent)} of {len(found)} questions have no picture under {source.images}: question {first} of {source.questions} wants"
            f" {' or '.join(dict.fromkeys(absent[first]))}. Give the folder that these names are relative to, --images DIR"
        )
    return items


def _shown(item: VqaItem, name: str) -> VqaItem:
    return replace(item, image=name, own_image=name)


def first(rows: Sequence[T], limit: int) -> Sequence[T]:
    """The first `limit` rows; all of them for 0."""
    return rows[:limit] if limit else rows


def some(names: Sequence[Any]) -> str:
    """A few of many names, for a message."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(str(name) for name in names[:SHOWN]) + more


def item_of(name: int | str, question: str, kind: str, answers: Sequence[str], aliases: Sequence[str] = (), **facts: Any) -> VqaItem:
    """An item whose picture is still to be found."""
    return VqaItem(name, question, "", "", kind or "all", tuple(answers), facts, tuple(aliases))


# ---- VQAv2's format, VizWiz, TextVQA -------------------------------------------------------------------------------------------------


def read_vqa(source: Source) -> tuple[Found, Head]:
    """VQAv2's two files, OK-VQA's, and any own set in their format.

    Raises:
        DataError: A question has no annotation, or an annotation not enough answers.
    """
    asked = read_json(source.questions, "questions")
    rows = first(list(by_question(asked["questions"], ("question",), source.questions).items()), source.limit)
    notes: dict[int | str, Mapping[str, Any]] = {}
    head = {key: value for key, value in asked.items() if key != "questions"}
    if source.annotations is not None:
        told = read_json(source.annotations, "annotations")
        notes, head["annotations_sha256"] = by_question(told["annotations"], (), source.annotations), told["sha256"]
        lost = [name for name, _ in rows if name not in notes]
        if lost:
            raise DataError(
                f"{len(lost)} of {len(rows)} questions of {source.questions} have no annotation in {source.annotations}: {some(lost)}."
                " Same split?"
            )
    found: Found = []
    for name, row in rows:
        note = notes.get(name, {})
        answers = people(note, source.annotations, source.people) if source.annotations is not None else ()
        kind, answer_type = str(note.get("question_type") or "all"), note.get("answer_type")
        found.append(
            (
                item_of(name, str(row["question"]), kind, answers, answer_type=answer_type),
                picture_names(row, str(asked.get("data_subtype", ""))),
            )
        )
    return found, head


def picture_names(question: Mapping[str, Any], split: str) -> list[str]:
    """Names a question's picture may have: its own "image", else COCO's names for its image_id.

    Raises:
        DataError: The question names no picture.
    """
    if question.get("image"):
        return [str(question["image"])]
    if "image_id" not in question:
        raise DataError(f"question {question.get('question_id', '?')} names no picture: it has neither 'image' nor 'image_id'")
    image_id = question["image_id"]
    number = f"{image_id:012d}" if isinstance(image_id, int) else str(image_id)
    stems = [f"COCO_{split}_{number}.jpg", f"{split}/COCO_{split}_{number}.jpg"] if split else []
    if split.startswith("test-dev"):  # VQAv2's test-dev asks about pictures of test2015
        stems += [name.replace(split, "test" + split.removeprefix("test-dev")) for name in stems]
    return [*stems, f"{number}.jpg", f"{image_id}.jpg", f"{image_id}.png"]


def read_vizwiz(source: Source) -> tuple[Found, Head]:
    """VizWiz's one file of a split: a list of {image, question, answers, answer_type, answerable}."""
    rows = load_json(source.questions, "VizWiz's questions")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows) or not rows:
        raise DataError(f"{source.questions} is no list of questions, each with image, question and answers, as VizWiz's val.json is")
    table = list(by_question(rows, ("question",), source.questions, "image").items())
    found: Found = []
    for name, row in first(table, source.limit):
        answers = () if source.unlabelled else people(row, source.questions, source.people)
        item = item_of(str(name), str(row["question"]), str(row.get("answer_type") or "all"), answers, answer_type=row.get("answer_type"))
        found.append((item, [str(name), f"val/{name}", f"test/{name}"]))
    return found, {"sha256": file_hash(source.questions)}


def read_textvqa(source: Source, with_ocr: bool = False) -> tuple[Found, Head]:
    """TextVQA's JSON ("data"), or LLaVA's JSONL of prompts with that JSON as annotations.

    Args:
        source: With `with_ocr`, `ocr` is TextVQA's Rosetta file, unless the JSONL already holds the words.
        with_ocr: Put the words that OCR read under the question, as LLaVA-1.5 does.

    Raises:
        DataError: A row lacks fields, has not ten answers, or no words are given for it.
    """
    asked = source.questions.suffix == ".jsonl"
    truth = source.annotations if asked or source.annotations is not None else source.questions
    if truth is None:
        raise DataError(f"{source.questions} holds prompts without answers: give TextVQA's own file as well, --annotations JSON")
    data = read_json(truth, "data")
    table = by_question(data["data"], ("image_id", "question"), truth)
    words = _textvqa_prompts(source.questions, table) if asked else _ocr_words(source, table) if with_ocr else {}
    if asked:
        table = {name: row for name, row in table.items() if name in words}
    found: Found = []
    for name, row in first(list(table.items()), source.limit):
        image, question = str(row["image_id"]), str(row["question"])
        text = f"{question}\nReference OCR token: {words[name]}" if with_ocr else question
        answers = () if source.unlabelled else people(row, truth, source.people)
        aliases = (f"{image}|{question.lower().strip()}",)
        found.append(
            (item_of(name, text, "all", answers, aliases), [f"{image}.jpg", f"train_images/{image}.jpg", f"test_images/{image}.jpg"])
        )
    return found, {"sha256": file_hash(source.questions), "annotations_sha256": data["sha256"]}


def _ocr_words(source: Source, table: Mapping[int | str, Mapping[str, Any]]) -> dict[int | str, str]:
    """The words of each question's picture, as LLaVA writes them: joined by comma and blank."""
    if source.ocr is None:
        raise DataError(
            "TextVQA with OCR needs the words: --ocr TextVQA_Rosetta_OCR_v0.2_val.json, or LLaVA's llava_textvqa_val_v051_ocr.jsonl as"
            " --questions with TextVQA's file as --annotations. Without them it is the benchmark 'textvqa'"
        )
    by_image = by_question(read_json(source.ocr, "data")["data"], ("ocr_tokens",), source.ocr, "image_id")
    bare = [name for name, row in table.items() if row["image_id"] not in by_image]
    if bare:
        raise DataError(f"{source.ocr} has no words for the pictures of {len(bare)} of {len(table)} questions: {some(bare)}. Same split?")
    return {name: ", ".join(map(str, by_image[row["image_id"]]["ocr_tokens"])) for name, row in table.items()}


def _textvqa_prompts(path: Path, table: Mapping[int | str, Mapping[str, Any]]) -> dict[int | str, str]:
    """The words of LLaVA's prompts, joined to the questions by picture and lower-cased question."""
    names = {(str(row["image_id"]), str(row["question"]).lower()): name for name, row in table.items()}
    words: dict[int | str, str] = {}
    for number, row in enumerate(read_jsonl(path), 1):
        if "question_id" not in row or "text" not in row:
            raise DataError(f"{path}, line {number}, is no prompt of LLaVA's: it lacks question_id or text")
        key = (str(row["question_id"]), textvqa_question(str(row["text"])))
        if key not in names:
            raise DataError(f"{path}, line {number}: the annotations have no question {key[1]!r} about picture {key[0]}. Same split?")
        lines = [line for line in str(row["text"]).split("\n") if line.startswith("Reference OCR token:")]
        words[names[key]] = lines[0].removeprefix("Reference OCR token:").strip() if lines else ""
    return words


# ---- GQA and captions ----------------------------------------------------------------------------------------------------------------


def read_gqa(source: Source) -> tuple[Found, Head]:
    """GQA's question file: {id: {question, answer, isBalanced, types, semantic, groups, imageId}}; only balanced questions are asked."""
    rows = load_json(source.questions, "GQA's questions")
    wanted = ("question", "imageId") if source.unlabelled else ("question", "imageId", "answer", "types")
    if not isinstance(rows, dict) or not rows or not all(isinstance(row, dict) for row in rows.values()):
        raise DataError(f"{source.questions} is no question file of GQA: an object of questions by id was expected")
    broken = next(((name, key) for name, row in rows.items() for key in wanted if key not in row), None)
    if broken:
        raise DataError(f"{source.questions}: question {broken[0]} lacks {broken[1]}")
    asked = {name: row for name, row in rows.items() if row.get("isBalanced", True)}
    if not asked:
        raise DataError(f"{source.questions} has no balanced question, and only those are scored")
    found: Found = []
    for name, row in first(list(asked.items()), source.limit):
        kind = str((row.get("types") or {}).get("structural") or "all")
        answers = [] if source.unlabelled else [str(row["answer"])]
        found.append(
            (item_of(name, str(row["question"]), kind, answers, gqa=row), [f"{row['imageId']}.jpg", f"images/{row['imageId']}.jpg"])
        )
    return found, {"sha256": file_hash(source.questions), "not_asked": sorted(set(rows) - set(asked))}


def read_caption_items(source: Source) -> tuple[Found, Head]:
    """Pictures to be captioned: COCO's and NoCaps's JSON by image id (NoCaps: kind is the domain), other caption files by picture name.

    Raises:
        DataError: The file has no captions, or another format.
    """
    path = source.annotations or source.questions
    head: Head = {"sha256": file_hash(path) if path.is_file() else ""}
    content = load_json(path, "captions") if path.suffix == ".json" else None
    images = content.get("images") if isinstance(content, dict) else None
    if isinstance(images, list) and images and isinstance(images[0], dict) and "sentences" in images[0]:
        return list(first(_karpathy_captions(path, images, source.split or "test"), source.limit)), head
    if not (isinstance(content, dict) and isinstance(images, list) and "annotations" in content):
        return list(first(_other_captions(path, source), source.limit)), head
    texts: dict[Any, list[str]] = {}
    for row in content["annotations"]:
        texts.setdefault(row.get("image_id"), []).append(str(row.get("caption", "")))
    by_id = by_question(images, ("file_name",), path, "id")
    bare = [name for name in by_id if name not in texts]
    if bare and not source.unlabelled:
        raise DataError(f"{path}: {len(bare)} of {len(by_id)} images have no caption: {some(bare)}. A test split has none: --unlabelled")
    found: Found = []
    for name, row in first(list(by_id.items()), source.limit):
        file = str(row["file_name"])
        domain = str(row.get("domain") or "all")
        found.append((item_of(name, "", domain, texts.get(name, []), (file,)), [file, file.rsplit("/", 1)[-1]]))
    return found, head


def _karpathy_captions(path: Path, images: Sequence[Mapping[str, Any]], split: str) -> Found:
    """A split of Karpathy's files, by COCO's image id where it stands there, else by the picture's name."""
    chosen = [row for row in images if row.get("split") == split]
    if not chosen:
        raise DataError(f"{path} has no split '{split}'; it has {some(sorted({str(row.get('split')) for row in images}))} (--split)")
    found: Found = []
    for number, row in enumerate(chosen):
        if "filename" not in row or not row.get("sentences"):
            raise DataError(f"{path}: image {number} of split {split} lacks filename or sentences")
        file = str(row["filename"])
        names = [f"{row['filepath']}/{file}", file] if row.get("filepath") else [file]
        texts = [str(sentence["raw"]).strip() for sentence in row["sentences"]]
        found.append((item_of(row.get("cocoid", file), "", "all", texts, (file,) if "cocoid" in row else ()), names))
    return found


def _other_captions(path: Path, source: Source) -> Found:
    """Lists and Flickr's text files, by the names of their pictures."""
    rows = [(name, texts) for name, texts in caption_rows(path, source.split or "test") if texts]
    if not rows:
        raise DataError(f"{path} has no caption in it")
    return [(item_of(name, "", "all", texts), [name, name.rsplit("/", 1)[-1]]) for name, texts in rows]
