"""Reading answers that any other model or harness wrote, and joining them to a benchmark's questions by id.

One JSON object a line with `question_id` and `answer` (LLaVA's `text`, and uploads' `prediction` and `caption`, are understood), a JSON list
of such objects, lmms-eval's logged samples, or MME's folder of result files. An id may be the benchmark's own, or the pair by which LLaVA's
files know a question: (picture, question in the prompt) of TextVQA and MME, (category, number) of POPE.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_stage.benchmark_choice_files import YES_NO
from llm_stage.benchmark_files import VqaItem, some
from mmkit.choice_scoring import textvqa_question
from mmkit.errors import DataError

IDS = ("question_id", "questionId", "image_id", "image", "index", "id")
ANSWERS = ("answer", "text", "prediction", "caption", "response")


@dataclass(frozen=True)
class Given:
    """Answers joined to questions.

    Attributes:
        rows: By question id: "answer", or "missing" with the reason.
        ignored: How many answers are to questions that the benchmark has but does not score.
        notes: What was repaired.
        model: What the file calls the model; "" where it does not say.
        prompt: The first answer's prompt, where the file has prompts.
    """

    rows: dict[Any, dict[str, Any]]
    ignored: int
    notes: list[str]
    model: str
    prompt: str


def read_answers(path: Path, items: Sequence[VqaItem], not_asked: Collection[Any] = ()) -> Given:
    """Read a file of answers and join it to the questions.

    Args:
        path: The file, or MME's folder of result files.
        items: The benchmark's questions.
        not_asked: Ids that the benchmark's file holds and its score does not.

    Raises:
        DataError: The file is no list of answers, an id comes twice, or answers are to questions that the benchmark does not ask.
    """
    rows, notes = _rows(path)
    rows = [(where, _of_lmms(row, items, where) if "filtered_resps" in row else row) for where, row in rows]
    index = _index(items)
    passed_over = {str(name) for name in not_asked}
    joined: dict[Any, dict[str, Any]] = {}
    strange: list[str] = []
    doubled: list[Any] = []
    ignored = 0
    for where, row in rows:
        name, answer = _identity(row, where), _answer(row, where)
        found = next((index[key] for key in _names(name, row) if key in index), None)
        if found is None:
            if name in passed_over:
                ignored += 1
            else:
                strange.append(name)
        elif found in joined:
            doubled.append(found)
        else:
            joined[found] = {"answer": answer} if answer is not None else {"missing": str(row.get("missing") or "no answer in the file")}
    if strange:
        raise DataError(
            f"{path}: {len(strange)} of {len(rows)} answers are to questions that the benchmark does not ask ({some(strange)}); its ids look"
            f" like {some([item.question_id for item in items[:2]])}. Answers of another benchmark, or of another split?"
        )
    if doubled:
        raise DataError(f"{path}: {len(doubled)} questions are answered more than once: {some(doubled)}; each may have one answer")
    model = next((str(row["model_id"]) for _, row in rows if row.get("model_id")), "")
    return Given(joined, ignored, notes, model, next((str(row["prompt"]) for _, row in rows if row.get("prompt")), ""))


def check_complete(given: Given, items: Sequence[VqaItem], path: Path) -> None:
    """Refuse an answer file that leaves questions out.

    Raises:
        DataError: The message counts them.
    """
    absent = [item.question_id for item in items if "answer" not in given.rows.get(item.question_id, {})]
    if absent:
        hint = f" ({'; '.join(given.notes)})" if given.notes else ""
        raise DataError(
            f"{path}: {len(absent)} of {len(items)} questions have no answer: {some(absent)}{hint}. Answer them, or say what they count as:"
            " --missing leave_out (reported beside the score) or --missing wrong"
        )


def _rows(path: Path) -> tuple[list[tuple[str, dict[str, Any]]], list[str]]:
    """Rows with where they stand, and notes on what was left out."""
    if path.is_dir():
        return _mme_results(path), []
    if not path.is_file():
        raise DataError(f"--answers {path}: no such file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"--answers {path} is not UTF-8 text: {error}") from error
    if text.lstrip().startswith("["):
        try:
            content = json.loads(text)
        except ValueError as error:
            raise DataError(f"--answers {path} is no JSON: {error}; is the list cut off?") from error
        found: list[tuple[str, Any]] = [(f"{path}, entry {number}", row) for number, row in enumerate(content)]
        notes: list[str] = []
    else:
        found, notes = _lines(path, text)
    wrong = next((where for where, row in found if not isinstance(row, dict)), None)
    if wrong or not found:
        raise DataError(
            f'{wrong or path} {"is no object" if wrong else "holds no answers"}; {{"question_id": ..., "answer": ...}} a line is right'
        )
    return found, notes


def _lines(path: Path, text: str) -> tuple[list[tuple[str, Any]], list[str]]:
    """Lines of a JSONL file; a half-written last one is left out, and said so."""
    found: list[tuple[str, Any]] = []
    lines = text.split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found.append((f"{path}, line {number}", json.loads(line)))
        except ValueError as error:
            if number == len(lines) and number > 1:  # no line end behind it: whoever wrote it was stopped
                return found, [f"the last line ({number}) was half written and is left out"]
            raise DataError(f"{path}, line {number}, is no JSON: {error}; the line begins {line[:60]!r}") from error
    return found, []


def _mme_results(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    """Result files of MME's own tool: picture, question, gold, answer with tabs between them, one file a subtask."""
    rows = []
    for path in sorted(folder.glob("*.txt")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if not line.strip():
                continue
            cells = line.split("\t")
            if len(cells) != 4:
                raise DataError(f"{path}, line {number}, has {len(cells)} cells; picture, question, gold and answer were expected")
            rows.append((f"{path}, line {number}", {"question_id": f"{path.stem}/{cells[0]}", "prompt": cells[1], "answer": cells[3]}))
    if not rows:
        raise DataError(f"--answers {folder} is a folder without result files of MME (count.txt, color.txt, ...)")
    return rows


def _of_lmms(row: Mapping[str, Any], items: Sequence[VqaItem], where: str) -> dict[str, Any]:
    """A sample that lmms-eval logged, as a row of ours.

    Many tasks log the question's own id beside a score. Others log only its place in the data set; it is taken for the place in the
    benchmark's file where the right answer there is the same.

    Raises:
        DataError: The place has another right answer: the task holds other questions, or holds them in another order.
    """
    answer = row["filtered_resps"]
    while isinstance(answer, list) and len(answer) == 1:
        answer = answer[0]
    named = next((value["question_id"] for value in row.values() if isinstance(value, dict) and "question_id" in value), None)
    if named is not None:
        return {"question_id": named, "answer": answer}
    place, target = row.get("doc_id"), str(row.get("target", ""))
    item = items[place] if isinstance(place, int) and 0 <= place < len(items) else None
    if item is None or (
        target and item.answers and not any(target in (own, str([*item.answers])) for own in (*item.answers, item.reference))
    ):
        wanted = f", where the benchmark's file has {item.reference!r}" if item else f", and the benchmark has {len(items)} questions"
        raise DataError(
            f"{where} is document {place} of lmms-eval with the right answer {target[:60]!r}{wanted}: its samples name no question, and are not"
            " in the order of the benchmark's file"
        )
    return {"question_id": item.question_id, "answer": answer}


def _identity(row: Mapping[str, Any], where: str) -> str:
    name = next((row[key] for key in IDS if isinstance(row.get(key), str | int)), None)
    if name is None:
        raise DataError(f"{where} has no 'question_id'; it has {', '.join(row) or 'nothing'}")
    return str(name)


def _answer(row: Mapping[str, Any], where: str) -> str | None:
    """The answer's text; None for a row that says it has none."""
    keys = [key for key in ANSWERS if key in row]
    if not keys and "missing" not in row:
        raise DataError(f"{where} has no 'answer'; it has {', '.join(row)}")
    value = row[keys[0]] if keys else None
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if value is not None and not isinstance(value, str | int | float):
        raise DataError(f"{where}: the answer is {str(value)[:60]!r}, a {type(value).__name__}; text is right")
    return None if value is None or "missing" in row else str(value)


def _index(items: Sequence[VqaItem]) -> dict[str, Any]:
    """Question ids by every name that means one question only."""
    counts = Counter(alias for item in items for alias in set(item.aliases))
    index: dict[str, Any] = {alias: item.question_id for item in items for alias in item.aliases if counts[alias] == 1}
    return index | {str(item.question_id): item.question_id for item in items}


def _names(name: str, row: Mapping[str, Any]) -> list[str]:
    """Names under which a row's question may be known, its own id first."""
    names = [name]
    if row.get("category"):
        names.append(f"{row['category']}/{name}")
    prompt = str(row.get("prompt") or row.get("question") or "").removeprefix("<image>\n")
    if prompt:
        try:
            question = textvqa_question(prompt)
        except DataError:
            question = prompt.split("\n")[0].lower()
        names.append(f"{name}|{question.replace(YES_NO.lower(), '').strip()}")
    return names
