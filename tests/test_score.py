"""Answers of any other model are scored as the official code scores them, joined by id, and refused where they cannot be joined."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from benchmark_tiny import MAKERS, Tiny, save

from apps import cli
from llm_stage import score
from llm_stage.benchmarks import BENCHMARKS
from mmkit.errors import ConfigError, DataError
from mmkit.report_data import read_runs

GOLDEN = Path(__file__).parent / "golden" / "eval"
VQA_ROWS = [row.name for row in BENCHMARKS.values() if not row.control_of and row.scorer != "captions"]


def golden(name: str) -> Any:
    return json.loads((GOLDEN / name).read_text(encoding="utf-8"))


def lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    return save(path, "".join(json.dumps(row) + "\n" for row in rows))


def scored(tmp_path: Path, benchmark: str, answers: Path, flags: dict[str, str], *more: str) -> dict[str, Any]:
    words = [word for key, value in flags.items() for word in (f"--{key}", value)]
    folder = score.main([benchmark, "--answers", str(answers), *words, "--out", str(tmp_path / "out"), "--overwrite", *more])
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def asked(tiny: Tiny) -> dict[str, str]:
    """The files without pictures: none is needed to score."""
    return {key: value for key, value in tiny.flags.items() if key not in ("images", "ocr")}


@pytest.mark.parametrize("name", VQA_ROWS)
def test_right_answers_of_another_model_score_100_on_every_row_without_pictures(tmp_path: Path, name: str) -> None:
    tiny = MAKERS[name](tmp_path / "data")
    answers = lines(tmp_path / "a.jsonl", [{"question_id": key, "answer": value} for key, value in tiny.right.items()])
    summary = scored(tmp_path, name, answers, asked(tiny))
    assert {"benchmark", "model", "protocol", "n", "metrics", "missing"} <= set(summary)
    assert {"prompt", "decoding", "scorer"} <= set(summary["protocol"])
    assert summary["metrics"][summary["item_metric"]]["value"] == 100.0
    assert list((tmp_path / "out").glob("submission*"))


# ---- the golden cases, from files to summary -----------------------------------------------------------------------------------------


def vqa_golden(tmp_path: Path) -> tuple[dict[str, str], Path, Any]:
    data = golden("vqa_records.json")
    questions = [{key: row[key] for key in ("question_id", "image_id", "question")} for row in data["annotations"]]
    save(tmp_path / "q.json", {"questions": questions})
    save(tmp_path / "a.json", {"annotations": data["annotations"]})
    flags = {"questions": str(tmp_path / "q.json"), "annotations": str(tmp_path / "a.json")}
    return flags, save(tmp_path / "results.json", data["results"]), data["expected"]  # an official result file is a JSON list


def test_the_vqa_tool_s_figures_come_out_of_its_own_result_file(tmp_path: Path) -> None:
    flags, answers, expected = vqa_golden(tmp_path)
    official = scored(tmp_path, "vqav2", answers, flags)["official"]
    wanted = expected["gt_vision_lab_2021"]
    assert official["overall"] == wanted["overall"]
    assert official["perAnswerType"] == wanted["per_answer_type"]
    assert official["perQuestionType"] == wanted["per_question_type"]
    others = {"vqa_2017": "gt_vision_lab_2017", "m4c": "m4c", "lmms_vqav2": "lmms_vqav2", "vizwiz": "vizwiz_rule"}
    for scorer, name in others.items():
        summary = scored(tmp_path, "vqav2", answers, flags, "--scorer", scorer)
        assert summary["official"]["overall"] == pytest.approx(expected[name]["overall"], abs=0.01)
        assert summary["protocol"]["scorer"] == scorer


def test_gqa_s_figures_come_out_of_raw_answers_and_of_an_upload(tmp_path: Path) -> None:
    data = golden("gqa.json")
    save(tmp_path / "q.json", data["questions"])
    flags = {"questions": str(tmp_path / "q.json")}
    for answers in (lines(tmp_path / "a.jsonl", data["raw_outputs"]), save(tmp_path / "upload.json", data["submission"])):
        summary = scored(tmp_path, "gqa", answers, flags)
        for name in ("accuracy", "binary", "open", "distribution"):
            assert summary["official"][name] == pytest.approx(data["expected"][name])
        assert summary["ignored_answers"] == 4  # unbalanced questions
        assert summary["metrics"]["accuracy"]["value"] == pytest.approx(data["expected"]["accuracy"], abs=0.005)
        assert summary["metrics"]["open"]["value"] == pytest.approx(data["expected"]["open"], abs=0.0051)


def test_pope_s_figures_come_out_of_its_three_files(tmp_path: Path) -> None:
    data, answers = golden("pope.json"), []
    for category, content in data["categories"].items():
        rows = [{key: row[key] for key in ("question_id", "image", "text", "label")} for row in content["rows"]]
        lines(tmp_path / "pope" / f"coco_pope_{category}.json", rows)
        answers += [{"question_id": row["question_id"], "category": category, "text": row["answer"]} for row in content["rows"]]
    summary = scored(tmp_path, "pope", lines(tmp_path / "a.jsonl", answers), {"questions": str(tmp_path / "pope")})
    for category, content in data["categories"].items():
        assert summary["official"][category] == pytest.approx(content["official"])
        assert summary["metrics"][f"f1/{category}"]["value"] == pytest.approx(100 * content["official"]["f1"], abs=0.005)
    assert summary["official"]["mean_f1"] == pytest.approx(data["mean_f1"])
    assert next(iter(summary["metrics"])) == "f1"  # the headline
    low, high = summary["metrics"]["f1"]["ci95"]
    assert low < 100 * data["mean_f1"] < high


def test_textvqa_answers_of_llava_are_joined_by_picture_and_question(tmp_path: Path) -> None:
    data = golden("textvqa.json")
    save(tmp_path / "val.json", {"data": data["annotations"]})
    summary = scored(tmp_path, "textvqa", lines(tmp_path / "a.jsonl", data["results"]), {"questions": str(tmp_path / "val.json")})
    assert summary["metrics"]["vqa_accuracy"]["value"] == pytest.approx(data["expected"]["accuracy"], abs=0.005)
    assert summary["protocol"]["scorer"] == "m4c"


def test_scienceqa_s_totals_count_missing_answers_as_wrong(tmp_path: Path) -> None:
    data = golden("scienceqa.json")
    problems = {
        row["question_id"]: {
            "question": "?",
            "choices": ["x"] * row["n_choices"],
            "answer": row["answer_index"],
            "hint": "",
            "image": "image.png" if row["has_image"] else None,
        }
        for row in data["rows"]
    }
    save(tmp_path / "problems.json", problems)
    save(tmp_path / "pid_splits.json", {"test": list(problems)})
    answers = [{"question_id": row["question_id"], "text": row["text"]} for row in data["rows"] if row["text"] is not None]
    flags = {"questions": str(tmp_path / "problems.json")}
    with pytest.raises(DataError, match=r"5 of 72 questions have no answer.*--missing leave_out"):
        scored(tmp_path, "scienceqa", lines(tmp_path / "a.jsonl", answers), flags)
    summary = scored(tmp_path, "scienceqa", tmp_path / "a.jsonl", flags, "--missing", "wrong")
    expected, official = data["expected"], summary["official"]
    for name in ("accuracy", "correct", "count", "img_accuracy", "img_count"):
        assert official[name] == pytest.approx(expected[name]), name
    assert summary["counted_as_wrong"] == 5
    left = scored(tmp_path, "scienceqa", tmp_path / "a.jsonl", flags, "--missing", "leave_out")
    assert (left["n"], left["missing"]) == (67, 5)


def test_mme_s_scores_come_out_of_its_own_result_folder(tmp_path: Path) -> None:
    data = golden("mme.json")
    for subtask, rows in data["subtasks"].items():
        save(tmp_path / "results" / f"{subtask}.txt", "".join("\t".join(row) + "\n" for row in rows))
    flags = {"questions": str(tmp_path / "results")}
    summary = scored(tmp_path, "mme", tmp_path / "results", flags)
    for subtask, figures in data["expected"]["per_subtask"].items():
        assert summary["official"]["per_subtask"][subtask] == pytest.approx(figures), subtask
    assert summary["official"]["perception"] == pytest.approx(data["expected"]["perception"])
    assert summary["official"]["cognition"] == pytest.approx(data["expected"]["cognition"])
    # LLaVA's own answers name a picture twice and hold the question, in its words, in the prompt
    rows = [
        {
            "question_id": f"{subtask}/{image}",
            "text": answer,
            "prompt": question.replace("Please answer yes or no.", "").strip() + "\nShort.",
        }
        for subtask, lines_of in data["subtasks"].items()
        for image, question, _, answer in reversed(lines_of)
    ]
    again = scored(tmp_path, "mme", lines(tmp_path / "a.jsonl", rows), flags)
    assert again["official"] == summary["official"]


# ---- what cannot be joined -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(tmp_path: Path) -> Tiny:
    return MAKERS["vqav2"](tmp_path / "data")


def right(tiny: Tiny) -> list[dict[str, Any]]:
    return [{"question_id": key, "answer": value} for key, value in tiny.right.items()]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda rows: [{**row, "question_id": f"n{row['question_id']}"} for row in rows],
            r"4 of 4 answers .* look like 0, 1000.*another benchmark",
        ),
        (lambda rows: [*rows, rows[1]], "1 questions are answered more than once: 1000"),
        (lambda rows: rows[:2], "2 of 4 questions have no answer: 2000, 3000"),
        (lambda rows: [{"answer": "red"}, *rows], "line 1 has no 'question_id'; it has answer"),
        (lambda rows: [{"question_id": 0, "score": 1}, *rows[1:]], "line 1 has no 'answer'; it has question_id, score"),
        (lambda rows: [{"question_id": 0, "answer": {"a": 1}}, *rows[1:]], "line 1: the answer is .* a dict; text is right"),
        (lambda rows: [], "holds no answers"),
    ],
)
def test_answers_that_do_not_fit_are_refused_and_nothing_is_written(tmp_path: Path, tiny: Tiny, edit: Any, message: str) -> None:
    answers = lines(tmp_path / "a.jsonl", edit(right(tiny)))
    with pytest.raises(DataError, match=message):
        scored(tmp_path, "vqav2", answers, asked(tiny))
    assert not (tmp_path / "out").exists()


def test_a_half_written_last_line_is_left_out_and_said(tmp_path: Path, tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    answers = lines(tmp_path / "a.jsonl", right(tiny))
    whole = answers.read_text()
    answers.write_text(whole[:-9])
    with pytest.raises(DataError, match=r"1 of 4 questions have no answer: 3000 \(the last line \(4\) was half written and is left out\)"):
        scored(tmp_path, "vqav2", answers, asked(tiny))
    summary = scored(tmp_path, "vqav2", answers, asked(tiny), "--missing", "leave_out")
    assert (summary["n"], summary["missing"], list(summary["missing_questions"])) == (3, 1, ["3000"])
    assert "half written" in summary["notes"][0]
    assert "half written" in capsys.readouterr().err
    assert answers.read_text() == whole[:-9]  # somebody else's file stays as it is
    answers.write_text(whole.replace('"answer"', "answer", 1))
    with pytest.raises(DataError, match="line 1, is no JSON"):
        scored(tmp_path, "vqav2", answers, asked(tiny))


def test_an_annotation_without_answers_is_named(tmp_path: Path, tiny: Tiny) -> None:
    data = json.loads(Path(tiny.flags["annotations"]).read_text())
    del data["annotations"][2]["answers"]
    save(Path(tiny.flags["annotations"]), data)
    with pytest.raises(DataError, match="question 2000 has 0 answers, not ten"):
        scored(tmp_path, "vqav2", lines(tmp_path / "a.jsonl", right(tiny)), asked(tiny))


def test_an_empty_answer_is_not_taken_for_a_wrong_one_where_it_would_be_read_as_yes(tmp_path: Path) -> None:
    tiny = MAKERS["pope"](tmp_path / "data")
    answers = lines(tmp_path / "a.jsonl", right(tiny)[:-1])
    with pytest.raises(ConfigError, match="reads yes or no out of every answer"):
        scored(tmp_path, "pope", answers, asked(tiny), "--missing", "wrong")


def test_a_scoring_is_an_evaluation_for_the_report_and_a_command_of_mmkit(tmp_path: Path, tiny: Tiny) -> None:
    answers = lines(tmp_path / "gpt.jsonl", right(tiny))
    words = [
        "score",
        "vqav2",
        "--answers",
        str(answers),
        "--questions",
        tiny.flags["questions"],
        "--annotations",
        tiny.flags["annotations"],
    ]
    words += ["--images", tiny.flags["images"], "--out", str(tmp_path / "runs" / "gpt" / "vqav2"), "--prompt", "P", "--decoding", "beam 5"]
    assert cli.main(words) == 0
    assert cli.main(words) == 2  # it holds an evaluation already
    (evaluation,) = read_runs([tmp_path / "runs"]).evaluations
    assert (evaluation.encoder, evaluation.benchmark, evaluation.main) == ("gpt", "vqav2", "vqa_accuracy")
    assert (evaluation.summary["protocol"]["prompt"], evaluation.summary["protocol"]["decoding"]) == ("P", "beam 5")
    item = evaluation.items["1000"]
    assert item.image is not None
    assert (item.score, item.answer, item.reference) == (1.0, "green", "green")
