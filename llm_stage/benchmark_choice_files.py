"""Reading the question files of benchmarks that are answered with yes, no or a letter: POPE, MME, ScienceQA, MMBench, SEED."""

from __future__ import annotations

import base64
import binascii
import csv
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llm_stage.benchmark_files import Found, Head, Source, by_question, file_hash, first, item_of, load_json, read_json, some
from mmkit.checkpoint import atomic_write
from mmkit.choice_scoring import LETTERS, MME_COGNITION, MME_PERCEPTION
from mmkit.errors import DataError
from mmkit.records import read_jsonl

POPE_CATEGORIES = ("random", "popular", "adversarial")
YES_NO = "Please answer yes or no."
ROTATED = 1_000_000  # MMBench: the index of a question with its options turned round is its own plus a multiple of this
_NOTHING = ("", "nan", "none")


# ---- yes and no ----------------------------------------------------------------------------------------------------------------------


def read_pope(source: Source) -> tuple[Found, Head]:
    """POPE's JSONL files, one a category, from their folder or one alone; ids are "random/1", since numbers restart in every file."""
    files = {name: _pope_file(source.questions, name) for name in POPE_CATEGORIES} if source.questions.is_dir() else None
    if files is None:
        if not source.questions.is_file():
            raise DataError(
                f"no file or folder '{source.questions}'; POPE's coco_pope_random.json, ..._popular, ..._adversarial lie in one"
            )
        files = {next((name for name in POPE_CATEGORIES if name in source.questions.name), source.questions.stem): source.questions}
    found: Found = []
    for category, path in files.items():
        for name, row in by_question(read_jsonl(path), ("image", "text", "label"), path).items():
            if row["label"] not in ("yes", "no"):
                raise DataError(f"{path}: question {name} is labelled {row['label']!r}; yes or no is right")
            item = item_of(f"{category}/{name}", str(row["text"]), category, [str(row["label"])])
            found.append((item, [str(row["image"]), f"val2014/{row['image']}"]))
    return list(first(found, source.limit)), {"sha256": file_hash(*files.values()), "files": [path.name for path in files.values()]}


def _pope_file(folder: Path, category: str) -> Path:
    paths = sorted(path for path in folder.iterdir() if path.name.endswith(f"pope_{category}.json"))
    if len(paths) != 1:
        held = some(sorted(path.name for path in folder.iterdir())) or "nothing"
        raise DataError(f"{folder} has {len(paths)} files of POPE's category {category}, coco_pope_{category}.json; it holds {held}")
    return paths[0]


def read_mme(source: Source) -> tuple[Found, Head]:
    """MME's release folder: a folder a subtask with a text file a picture, or its template of results, a text file a subtask.

    A line of a picture's file is question, tab, answer; of the template picture, question, answer. Ids are "count/0001.jpg/1".

    Raises:
        DataError: No subtask is there, a line has another form, or a picture has not two questions.
    """
    root = source.questions
    if not root.is_dir():
        raise DataError(f"'{root}' is no folder; MME's release folder with count/, color/, ... or its eval_tool/Your_Results is right")
    found: Found = []
    paths: list[Path] = []
    for subtask in (*MME_PERCEPTION, *MME_COGNITION):
        template = root / f"{subtask}.txt"
        files = [template] if template.is_file() else sorted((root / subtask).rglob("*.txt")) if (root / subtask).is_dir() else []
        paths += files
        numbers: Counter[str] = Counter()
        for path in files:
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                if line.strip():
                    found.append(_mme_line(subtask, path, line.split("\t"), number, numbers, path == template))
        odd = [image for image, count in numbers.items() if count != 2]
        if odd:
            raise DataError(f"{root}: {len(odd)} pictures of {subtask} have not two questions: {some(odd)}; half of MME's score needs both")
    if not found:
        raise DataError(f"{root} holds no subtask of MME; {', '.join(MME_PERCEPTION[:3])}, ... as folders or text files were expected")
    return list(first(found, source.limit)), {"sha256": file_hash(*paths)}


def _mme_line(subtask: str, path: Path, cells: Sequence[str], number: int, numbers: Counter[str], template: bool) -> tuple[Any, list[str]]:
    if template:
        cells = cells[:3]
    if len(cells) != (3 if template else 2) or cells[-1].strip().lower() not in ("yes", "no"):
        form = "picture, question, Yes or No" if template else "question, Yes or No"
        raise DataError(f"{path}, line {number}: {form}, with tabs between them, was expected; it is {'|'.join(cells)[:80]!r}")
    image = cells[0].strip() if template else ""
    asked, gold = cells[-2], cells[-1].strip()
    stem = path.stem if not template else Path(image).stem
    image = image or f"{stem}{_mme_picture(path)}"
    numbers[image] += 1
    question = asked.replace(YES_NO, "").strip()
    aliases = (f"{subtask}/{image}|{question.lower()}",)
    item = item_of(f"{subtask}/{image}/{numbers[image]}", question, subtask, [gold.lower()], aliases, line=[image, asked, gold])
    endings = dict.fromkeys([Path(image).suffix, ".jpg", ".png"])
    return item, [f"{subtask}/{folder}{stem}{ending}" for folder in ("", "images/") for ending in endings]


def _mme_picture(path: Path) -> str:
    """Ending of the picture that a text file of MME's belongs to."""
    folders = [path.parent, path.parent.parent / "images"]
    return next((ending for folder in folders for ending in (".jpg", ".png") if (folder / f"{path.stem}{ending}").is_file()), ".jpg")


# ---- letters -------------------------------------------------------------------------------------------------------------------------


def read_scienceqa(source: Source, only_with_image: bool = False) -> tuple[Found, Head]:
    """ScienceQA's problems.json (or its folder) and pid_splits.json beside it or as annotations; the test split unless another is named.

    Args:
        source: `split` is test where it is "".
        only_with_image: Leave out the questions without a picture.
    """
    root = source.questions if source.questions.is_dir() else source.questions.parent
    problems = source.questions / "problems.json" if source.questions.is_dir() else source.questions
    splits_file = source.annotations or root / "pid_splits.json"
    table, splits, split = load_json(problems, "ScienceQA's problems"), load_json(splits_file, "ScienceQA's splits"), source.split or "test"
    if not isinstance(splits, dict) or split not in splits:
        raise DataError(f"{splits_file} has no split '{split}'; it has {', '.join(splits) if isinstance(splits, dict) else 'another form'}")
    names = [str(name) for name in splits[split]]
    lost = [name for name in names if name not in table]
    if lost:
        raise DataError(f"{len(lost)} of {len(names)} questions of split {split} are not in {problems}: {some(lost)}")
    if only_with_image:
        names = [name for name in names if table[name].get("image")]
    found: Found = []
    for name in first(names, source.limit):
        row = table[name]
        choices = row.get("choices") or []
        if not 2 <= len(choices) <= len(LETTERS) or not isinstance(row.get("answer"), int) or not 0 <= row["answer"] < len(choices):
            raise DataError(
                f"{problems}: question {name} has {len(choices)} choices and answer {row.get('answer')!r}; an index was expected"
            )
        item = item_of(
            name,
            _scienceqa_text(row),
            str(row.get("subject") or "all"),
            [LETTERS[row["answer"]]],
            choices=len(choices),
            has_image=bool(row.get("image")),
        )
        picture = str(row.get("image") or "")
        found.append((item, [f"{split}/{name}/{picture}", f"{name}/{picture}", f"images/{split}/{name}/{picture}"] if picture else []))
    return found, {"sha256": file_hash(problems, splits_file), "split": split}


def _scienceqa_text(row: Mapping[str, Any]) -> str:
    """Context, question and options as LLaVA writes them (its CQM form)."""
    options = " ".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, row["choices"], strict=False))
    text = f"Context: {str(row.get('hint') or '').strip() or 'N/A'}\nQuestion: {row['question']}\nOptions: {options}"
    return text.replace("  ", " ").strip()


def read_mmbench(source: Source) -> tuple[Found, Head]:
    """MMBench's TSV with pictures in base64; the pictures are unpacked into the image folder, where they are not there yet."""
    rows = _tsv(source.questions, ("index", "question", "A", "B", "image"))
    table = by_question(rows, (), source.questions, "index")
    found: Found = []
    chosen = list(first(list(table.items()), source.limit))
    for name, row in chosen:
        choices = [letter for letter in LETTERS[:4] if row.get(letter, "").lower() not in _NOTHING]
        answer = row.get("answer", "").strip()
        if not source.unlabelled and answer not in choices:
            raise DataError(
                f"{source.questions}: question {name} has the answer {answer!r}, and options {', '.join(choices)}. A test split"
                " has none: --unlabelled writes its upload"
            )
        hint = row.get("hint", "")
        lines = [*([hint] if hint.lower() not in _NOTHING else []), row["question"], *(f"{letter}. {row[letter]}" for letter in choices)]
        kind = row.get("category") or row.get("l2-category") or "all"
        answers = [] if source.unlabelled else [answer]
        item = item_of(int(name), "\n".join(lines), kind, answers, choices=len(choices), row={k: v for k, v in row.items() if k != "image"})
        found.append((item, [_mmbench_picture(row)]))
    if source.images is not None:
        _unpack(rows, [row for _, row in chosen], source)
    return found, {"sha256": file_hash(source.questions)}


def _tsv(path: Path, fields: Sequence[str]) -> list[dict[str, str]]:
    if not path.is_file():
        raise DataError(f"no file '{path}' (wanted for MMBench's questions)")
    csv.field_size_limit(sys.maxsize)  # a picture is one field
    with open(path, encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t", restval="")
        absent = [name for name in fields if name not in (reader.fieldnames or [])]
        if absent:
            raise DataError(f"{path} lacks the columns {', '.join(absent)}; MMBench's TSV (mmbench_dev_20230712.tsv) is expected")
        rows = list(reader)
    broken = next((number for number, row in enumerate(rows, 2) if not row["index"].isdigit()), None)
    if broken or not rows:
        raise DataError(f"{path}: {f'row {broken} has no number as index' if broken else 'no rows'}; is the download complete?")
    return rows


def _mmbench_picture(row: Mapping[str, str]) -> str:
    return f"{int(row['index']) % ROTATED}.jpg"


def _unpack(rows: Sequence[Mapping[str, str]], chosen: Sequence[Mapping[str, str]], source: Source) -> None:
    """Write pictures that are not there yet; a field may hold another question's index instead of a picture."""
    assert source.images is not None
    fields = {row["index"]: row["image"] for row in rows}
    for row in chosen:
        path = source.images / _mmbench_picture(row)
        if path.is_file():
            continue
        field = row["image"] if len(row["image"]) > 64 or row["image"] not in fields else fields[row["image"]]
        try:
            pixels = base64.b64decode(field, validate=True)
        except (binascii.Error, ValueError) as error:
            raise DataError(f"{source.questions}: the picture of question {row['index']} is no base64: {error}") from error
        source.images.mkdir(parents=True, exist_ok=True)
        atomic_write(path, pixels)


def read_seed(source: Source) -> tuple[Found, Head]:
    """SEED-Bench's JSON; only its questions about images."""
    data = read_json(source.questions, "questions")
    kinds = {number: name for name, number in (data.get("question_type") or {}).items()}
    fields = ("question", "data_id", "choice_a", "choice_b", "question_type_id")
    rows = [row for row in data["questions"] if row.get("data_type", "image") == "image"]
    if not rows:
        raise DataError(f"{source.questions} has no question of data_type image")
    found: Found = []
    for name, row in first(list(by_question(rows, fields, source.questions).items()), source.limit):
        letters = [letter for letter in "ABCD" if row.get(f"choice_{letter.lower()}") not in (None, "")]
        answer = str(row.get("answer", "")).strip()
        if not source.unlabelled and answer not in letters:
            raise DataError(f"{source.questions}: question {name} has the answer {answer!r}, and choices {', '.join(letters)}")
        text = "\n".join([str(row["question"]), *(f"{letter}. {row[f'choice_{letter.lower()}']}" for letter in letters)])
        kind = str(kinds.get(row["question_type_id"], row["question_type_id"]))
        item = item_of(name, text, kind, [] if source.unlabelled else [answer], choices=len(letters))
        picture = str(row["data_id"])
        found.append((item, [picture, f"{picture}.jpg", f"SEED-Bench-image/{picture}"]))
    return found, {"sha256": data["sha256"], "videos_left_out": len(data["questions"]) - len(rows)}
