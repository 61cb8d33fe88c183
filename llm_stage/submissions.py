"""The files that the benchmarks' own servers and tools take, from a run's answers."""

from __future__ import annotations

import json
import zipfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from llm_stage.benchmark_files import VqaItem, load_json
from mmkit.checkpoint import atomic_write
from mmkit.choice_scoring import gqa_form, letter_index, parse_scienceqa
from mmkit.errors import DataError, find
from mmkit.scoring import normalise_m4c

Answers = Mapping[Any, str]
_NOT_IN_XLSX = {*range(32)} - {9, 10, 13}


def write_submission(
    kind: str, items: Sequence[VqaItem], answers: Mapping[Any, Mapping[str, Any]], out: Path, all_questions: Path | None = None
) -> list[Path]:
    """Write the official file of a benchmark beside its answers.

    Args:
        kind: A name of `UPLOADS`; "" writes nothing.
        items: All questions, in the file's order.
        answers: Answer rows by question id; a question without one is uploaded as "".
        out: The evaluation's folder.
        all_questions: VQAv2: the question file of the whole test split, whose every id must be in the upload (test2015 for test-dev).

    Returns:
        The files written.
    """
    if not kind:
        return []
    texts = {item.question_id: str(answers.get(item.question_id, {}).get("answer") or "") for item in items}
    written = find("upload", UPLOADS, kind)(items, texts)
    if kind == "vqa" and all_questions is not None:
        written = {"submission.json": _as_json(_whole_split(items, texts, all_questions))}
    for name, content in written.items():
        atomic_write(out / name, content)
    return [out / name for name in written]


def _as_json(content: Any) -> str:
    return json.dumps(content, ensure_ascii=False) + "\n"


def _vqa(items: Sequence[VqaItem], answers: Answers) -> dict[str, str]:
    """[{question_id, answer}], normalised as LLaVA's upload is."""
    rows = [{"question_id": item.question_id, "answer": normalise_m4c(answers[item.question_id])} for item in items]
    return {"submission.json": _as_json(rows)}


def _whole_split(items: Sequence[VqaItem], answers: Answers, path: Path) -> list[dict[str, Any]]:
    data = load_json(path, "the questions of the whole split")
    names = [row["question_id"] for row in data.get("questions", [])]
    strange = sorted(set(answers) - set(names))
    if strange:
        raise DataError(f"{path} does not ask {len(strange)} of the answered questions, {strange[0]} for one: is it the whole split?")
    return [{"question_id": name, "answer": normalise_m4c(answers.get(name, ""))} for name in names]


def _gqa(items: Sequence[VqaItem], answers: Answers) -> dict[str, str]:
    return {
        "submission.json": _as_json([{"questionId": item.question_id, "prediction": gqa_form(answers[item.question_id])} for item in items])
    }


def _vizwiz(items: Sequence[VqaItem], answers: Answers) -> dict[str, str]:
    rows = [{"image": item.question_id, "answer": normalise_m4c(answers[item.question_id])} for item in items]
    return {"submission.json": _as_json(rows)}


def _scienceqa(items: Sequence[VqaItem], answers: Answers) -> dict[str, str]:
    """The authors' result file: index of the choice by question, -1 where no letter was read."""
    results = {str(item.question_id): letter_index(parse_scienceqa(answers[item.question_id]), item.facts["choices"]) for item in items}
    outputs = {str(item.question_id): answers[item.question_id] for item in items}
    right = sum(letter_index(item.answers[0], 5) == results[str(item.question_id)] for item in items if item.answers)
    head = {"acc": 100 * right / max(len(items), 1), "correct": right, "count": len(items)}
    return {"submission.json": _as_json({**head, "results": results, "outputs": outputs})}


def _pope(items: Sequence[VqaItem], answers: Answers) -> dict[str, str]:
    """POPE's answer files, {question, answer} a line, one a category."""
    lines: dict[str, list[str]] = defaultdict(list)
    for item in items:
        lines[item.kind].append(json.dumps({"question": item.question, "answer": answers[item.question_id]}, ensure_ascii=False) + "\n")
    return {f"submission/coco_pope_{kind}_answers.json": "".join(rows) for kind, rows in lines.items()}


def _mme(items: Sequence[VqaItem], answers: Answers) -> dict[str, str]:
    """The result files of MME's eval_tool: picture, question, gold and answer with tabs between them, one file a subtask."""
    lines: dict[str, list[str]] = defaultdict(list)
    for item in sorted(items, key=lambda item: str(item.question_id).rsplit("/", 1)[0]):  # two lines of a picture stand together
        answer = answers[item.question_id].replace("\n", " ").replace("\t", " ")
        lines[item.kind].append("\t".join([*item.facts["line"], answer]) + "\n")
    return {f"submission/{kind}.txt": "".join(rows) for kind, rows in lines.items()}


def _seed(items: Sequence[VqaItem], answers: Answers) -> dict[str, str]:
    rows = [
        json.dumps({"question_id": item.question_id, "prediction": answers[item.question_id]}, ensure_ascii=False) + "\n" for item in items
    ]
    return {"submission.jsonl": "".join(rows)}


def _captions(items: Sequence[VqaItem], answers: Answers) -> dict[str, str]:
    return {"submission.json": _as_json([{"image_id": item.question_id, "caption": answers[item.question_id]} for item in items])}


def _mmbench(items: Sequence[VqaItem], answers: Answers) -> dict[str, bytes]:
    """The sheet that MMBench's server takes: its table without pictures, and the answers in the column `prediction`."""
    left_out = ("hint", "category", "source", "image", "comment", "l2-category")
    columns = [name for name in items[0].facts["row"] if name not in left_out]
    columns.insert(min(6, len(columns)), "prediction")
    rows = [{**item.facts["row"], "prediction": answers[item.question_id]} for item in items]
    return {"submission.xlsx": sheet([columns, *([str(row.get(name) or "") for name in columns] for row in rows)])}


def sheet(rows: Sequence[Sequence[str]]) -> bytes:
    """A spreadsheet (.xlsx) of one table; whole numbers as numbers, all else as text.

    Source: ECMA-376, the smallest workbook: content types, relations, a workbook and a sheet of inline strings.
    """
    kinds = "application/vnd.openxmlformats-officedocument.spreadsheetml"
    office = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
    main, packages = "http://schemas.openxmlformats.org/spreadsheetml/2006/main", "http://schemas.openxmlformats.org/package/2006"
    cells = "".join(f"<row>{''.join(map(_cell, row))}</row>" for row in rows)
    relation = '<Relationship Id="rId1" Type="{}" Target="{}"/>'
    parts = {
        "[Content_Types].xml": f'<Types xmlns="{packages}/content-types">'
        '<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
        f'<Override PartName="/xl/workbook.xml" ContentType="{kinds}.sheet.main+xml"/>'
        f'<Override PartName="/xl/worksheets/sheet1.xml" ContentType="{kinds}.worksheet+xml"/></Types>',
        "_rels/.rels": f'<Relationships xmlns="{packages}/relationships">{relation.format(office + "/officeDocument", "xl/workbook.xml")}</Relationships>',
        "xl/workbook.xml": f'<workbook xmlns="{main}" xmlns:r="{office}"><sheets><sheet name="Sheet1" sheetId="1" r:id="rId1"/></sheets></workbook>',
        "xl/_rels/workbook.xml.rels": f'<Relationships xmlns="{packages}/relationships">'
        f"{relation.format(office + '/worksheet', 'worksheets/sheet1.xml')}</Relationships>",
        "xl/worksheets/sheet1.xml": f'<worksheet xmlns="{main}"><sheetData>{cells}</sheetData></worksheet>',
    }
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            stamped = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))  # the same answers give the same bytes
            stamped.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(stamped, f'<?xml version="1.0" encoding="UTF-8" standalone="yes"?>\n{content}')
    return buffer.getvalue()


def _cell(text: str) -> str:
    if text.isascii() and text.isdigit() and len(text) < 16 and (text == "0" or text[0] != "0"):
        return f"<c><v>{text}</v></c>"
    clean = "".join(letter for letter in text if ord(letter) not in _NOT_IN_XLSX)
    return f'<c t="inlineStr"><is><t xml:space="preserve">{escape(clean)}</t></is></c>'


UPLOADS: dict[str, Callable[[Sequence[VqaItem], Answers], Mapping[str, str | bytes]]] = {
    "vqa": _vqa,
    "gqa": _gqa,
    "vizwiz": _vizwiz,
    "scienceqa": _scienceqa,
    "pope": _pope,
    "mme": _mme,
    "mmbench": _mmbench,
    "seed": _seed,
    "captions": _captions,
}
