"""The scorers give what the official code gives, on the golden cases, and refuse what has no score."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmkit.errors import DataError, NameNotFound
from mmkit.scoring import (
    CONTRACTIONS,
    NUMBER_WORDS,
    PUNCTUATION,
    clean,
    most_common_answer,
    normalise_answer,
    normalise_m4c,
    recall_at_k,
    simplify_words,
    strip_punctuation,
    top_k_hits,
    vqa_accuracy,
)

GOLDEN = Path(__file__).parent / "golden" / "eval"
# golden name -> our variant; LAVIS equals the rule of 2017, lmms-eval scores OK-VQA, TextVQA and VizWiz as m4c
VARIANTS = {
    "gt_vision_lab_2021": "vqa_2021",
    "gt_vision_lab_2017": "vqa_2017",
    "lavis": "vqa_2017",
    "m4c": "m4c",
    "lmms_vqav2": "lmms_vqav2",
    "lmms_okvqa_textvqa_vizwiz": "m4c",
}


def golden(name: str) -> Any:
    return json.loads((GOLDEN / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def records() -> dict[str, Any]:
    return golden("vqa_records.json")


def scores_of(records: dict[str, Any], variant: str) -> dict[int, float]:
    answers = {row["question_id"]: row["answer"] for row in records["results"]}
    return {
        row["question_id"]: 100 * vqa_accuracy(answers[row["question_id"]], [a["answer"] for a in row["answers"]], variant)
        for row in records["annotations"]
    }


def test_tables_are_the_official_ones() -> None:
    tables = golden("vqa_tables.json")
    assert tables["contractions"] == CONTRACTIONS
    assert tables["number_words"] == NUMBER_WORDS
    assert tuple(tables["punctuation"]) == PUNCTUATION


def test_normal_forms_equal_the_official_code_on_every_golden_string() -> None:
    rows = golden("vqa_normalise.json")
    assert len(rows) == 123
    for row in rows:
        text = row["input"]
        assert strip_punctuation(text) == row["punctuation_only"], row
        assert simplify_words(text) == row["digit_article_only"], row
        assert normalise_answer(text) == row["vqa_official"], row
        assert normalise_m4c(text) == row["m4c"], row


@pytest.mark.parametrize("name", VARIANTS)
def test_each_variant_scores_every_golden_question_as_its_own_code(records: dict[str, Any], name: str) -> None:
    ours, expected = scores_of(records, VARIANTS[name]), records["expected"][name]
    assert len(ours) == len(expected["per_question"]) == 65
    for question, score in expected["per_question"].items():
        assert ours[int(question)] == pytest.approx(score, abs=0.01), question
    assert np.mean(list(ours.values())) == pytest.approx(expected["overall"], abs=0.01)


def test_answer_and_question_types_average_to_the_official_figures(records: dict[str, Any]) -> None:
    ours, expected = scores_of(records, "vqa_2021"), records["expected"]["gt_vision_lab_2021"]
    for key, table in (("answer_type", expected["per_answer_type"]), ("question_type", expected["per_question_type"])):
        for kind, value in table.items():
            members = [ours[row["question_id"]] for row in records["annotations"] if row[key] == kind]
            assert np.mean(members) == pytest.approx(value, abs=0.01), kind


def test_textvqa_golden_answers_score_the_same_under_m4c() -> None:
    data = golden("textvqa.json")
    for annotation, result, expected in zip(data["annotations"], data["results"], data["expected"]["per_question"], strict=True):
        assert 100 * vqa_accuracy(result["text"], annotation["answers"], "m4c") == pytest.approx(expected, abs=0.01)


def test_equal_answers_without_ids_are_left_out_one_at_a_time(records: dict[str, Any]) -> None:
    for row in records["without_answer_id"]:
        assert 100 * vqa_accuracy(row["prediction"], row["answers"]) == pytest.approx(row["correct"])


def test_a_ladder_of_matches_gives_three_tenths_a_person() -> None:
    for matches, expected in enumerate([0.0, 0.3, 0.6, 0.9, 1.0, 1.0]):
        answers = ["kite"] * matches + [f"other {i}" for i in range(10 - matches)]
        assert vqa_accuracy("kite", answers) == pytest.approx(expected)


def test_nine_answers_are_refused_and_an_unknown_variant_is_helped() -> None:
    with pytest.raises(DataError, match="ten human answers, got 9"):
        vqa_accuracy("kite", ["kite"] * 9)
    with pytest.raises(NameNotFound, match="vqa_2021"):
        vqa_accuracy("kite", ["kite"] * 10, "vqa_2012")


def test_the_most_common_answer_is_counted_in_normal_form() -> None:
    assert most_common_answer(["The dog.", "cat", "dog", "cat", "a dog"]) == "dog"
    with pytest.raises(DataError, match="no answers"):
        most_common_answer([])


def test_clean_keeps_one_line() -> None:
    assert clean(" two\nlines\t ") == "two lines"


def test_top_k_counts_the_targets_rank() -> None:
    scores = np.array([[0.1, 0.7, 0.2], [0.5, 0.3, 0.2], [0.2, 0.3, 0.5]])
    targets = np.array([1, 1, 0])
    assert top_k_hits(scores, targets, 1).tolist() == [True, False, False]
    assert top_k_hits(scores, targets, 2).tolist() == [True, True, False]
    assert top_k_hits(scores, targets, 3).all()


def test_a_model_that_scores_all_classes_alike_is_never_right() -> None:
    assert not top_k_hits(np.zeros((4, 10)), np.arange(4), 5).any()
    assert not recall_at_k(np.zeros((3, 8)), np.eye(3, 8, dtype=bool), 5).any()


def test_recall_takes_the_best_of_several_matches() -> None:
    similarity = np.array([[0.9, 0.1, 0.8, 0.2], [0.9, 0.8, 0.7, 0.1]])
    relevant = np.array([[False, False, True, True], [False, False, True, True]])
    assert recall_at_k(similarity, relevant, 1).tolist() == [False, False]
    assert recall_at_k(similarity, relevant, 2).tolist() == [True, False]
    assert recall_at_k(similarity, relevant, 3).tolist() == [True, True]


@pytest.mark.parametrize(
    ("scores", "targets", "message"),
    [
        (np.zeros((2, 3)), np.array([0, 3]), "3 classes"),
        (np.zeros((2, 3)), np.array([0]), r"\[2, 3\] and \[1\]"),
        (np.array([[0.0, np.nan]]), np.array([0]), "not finite, the first is row 0"),
    ],
)
def test_scores_that_mean_nothing_are_refused(scores: np.ndarray, targets: np.ndarray, message: str) -> None:
    with pytest.raises(DataError, match=message):
        top_k_hits(scores, targets)


def test_a_query_without_a_match_is_named() -> None:
    with pytest.raises(DataError, match="the first is query 1"):
        recall_at_k(np.zeros((2, 2)), np.array([[True, False], [False, False]]))
