"""Yes, no, letters and words are read as the official code reads them, on every golden case; the figures are the official ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mmkit.choice_scoring import (
    FAILED,
    anls,
    edit_distance,
    gqa_figures,
    gqa_form,
    gqa_right_lavis,
    gqa_right_lmms,
    letter_index,
    mme_figures,
    parse_letter,
    parse_mme,
    parse_mme_lmms,
    parse_pope,
    parse_scienceqa,
    scienceqa_lmms,
    textvqa_question,
    yes_no_figures,
    yes_no_figures_lmms,
)
from mmkit.errors import DataError
from mmkit.scoring import vqa_accuracy

GOLDEN = Path(__file__).parent / "golden" / "eval"


def golden(name: str) -> Any:
    return json.loads((GOLDEN / name).read_text(encoding="utf-8"))


def test_pope_reads_every_golden_answer_as_the_official_code() -> None:
    rows = golden("pope.json")["parse"]
    assert len(rows) == 35
    assert [parse_pope(row["text"]) for row in rows] == [row["official_label"] for row in rows]


def test_pope_figures_are_the_official_ones_in_each_category() -> None:
    data = golden("pope.json")
    f1 = []
    for category in data["categories"].values():
        texts, labels = [row["answer"] for row in category["rows"]], [row["label"] for row in category["rows"]]
        ours = yes_no_figures([parse_pope(text) for text in texts], labels)
        assert ours == pytest.approx(category["official"])
        f1.append(ours["f1"])
        assert yes_no_figures_lmms(texts, labels) == pytest.approx(category["lmms_eval"])
    assert sum(f1) / 3 == pytest.approx(data["mean_f1"])


def test_where_the_official_code_divides_by_zero_the_figure_is_0_and_said_so() -> None:
    for case in golden("pope.json")["degenerate"]:
        figures = yes_no_figures(case["predictions"], case["labels"])
        assert ("undefined" in figures) == (case["official"] != "ok"), case
    assert yes_no_figures(["no", "no"], ["yes", "no"])["f1"] == 0.0


def test_mme_reads_and_scores_as_the_official_tool() -> None:
    data = golden("mme.json")
    for row in data["parse"]:
        assert parse_mme(row["text"]) == row["official_without_newline"], row
        assert parse_mme_lmms(row["text"]) == row["lmms"], row
    rows = [
        (subtask, image, parse_mme(answer) == gold.lower())
        for subtask, lines in data["subtasks"].items()
        for image, _, gold, answer in lines
    ]
    ours, expected = mme_figures(rows), data["expected"]
    for subtask, figures in expected["per_subtask"].items():
        assert ours["per_subtask"][subtask] == pytest.approx(figures), subtask
    assert ours["perception"] == pytest.approx(expected["perception"])
    assert ours["cognition"] == pytest.approx(expected["cognition"])


def test_mme_pairs_by_picture_and_not_by_the_order_of_the_lines() -> None:
    rows = [("count", "a", True), ("count", "b", False), ("count", "a", True), ("count", "b", True)]
    assert mme_figures(rows)["per_subtask"]["count"] == {"acc": 0.75, "acc_plus": 0.5, "score": 125.0}


def test_scienceqa_letters_indices_and_totals_are_the_official_ones() -> None:
    data = golden("scienceqa.json")
    right = []
    for row in data["rows"]:
        text = FAILED if row["text"] is None else row["text"]
        letter = parse_scienceqa(text)
        assert letter == row["official_parsed"], row
        assert letter_index(letter, row["n_choices"]) == row["official_index"], row
        right.append(letter_index(letter, row["n_choices"]) == row["answer_index"])
        assert right[-1] == row["official_correct"]
        if row["text"] is not None:
            assert scienceqa_lmms(row["text"], "ABCDE"[row["answer_index"]]) == bool(row["lmms_score"]), row
    assert 100 * sum(right) / len(right) == pytest.approx(data["expected"]["accuracy"])


def test_scienceqa_reads_published_answers_as_their_file_did() -> None:
    rows = golden("scienceqa_real.json")["rows"]
    assert len(rows) > 100
    assert [parse_scienceqa(row["text"]) for row in rows] == [row["parsed"] for row in rows]


def test_gqa_figures_are_the_official_ones() -> None:
    data = golden("gqa.json")
    uploads = [gqa_form(row["text"]) for row in data["raw_outputs"]]
    assert uploads == [row["prediction"] for row in data["submission"]]
    questions = [data["questions"][row["question_id"]] for row in data["raw_outputs"]]
    ours, expected = gqa_figures(questions, uploads), data["expected"]
    for name in ("accuracy", "binary", "open", "distribution"):
        assert ours[name] == pytest.approx(expected[name], abs=1e-9), name
    for name in ("accuracyPerStructuralType", "accuracyPerSemanticType", "accuracyPerSteps", "accuracyPerLength"):
        assert ours[name].keys() == expected[name].keys(), name
        for value, figures in expected[name].items():
            assert ours[name][value] == pytest.approx(figures), (name, value)


def test_the_other_harnesses_rules_for_gqa_give_what_they_print() -> None:
    data = golden("gqa.json")
    rows = [(row["text"], data["questions"][row["question_id"]]["answer"]) for row in data["raw_outputs"]]
    lmms = [gqa_right_lmms(text, gold) for text, gold in rows]
    lavis = [gqa_right_lavis(text, gold) for text, gold in rows]
    assert 100 * sum(lmms) / len(rows) == pytest.approx(data["expected"]["lmms_exact_match_all_rows"])
    assert 100 * sum(lavis) / len(rows) == pytest.approx(data["expected"]["lavis_rule_all_rows"])


def test_textvqa_questions_are_read_out_of_all_four_prompts() -> None:
    data = golden("textvqa.json")
    assert [textvqa_question(row["prompt"]) for row in data["results"]] == data["expected"]["question_recovered_from_prompt"]
    with pytest.raises(DataError, match="four forms"):
        textvqa_question("one line")


def test_vizwiz_answers_score_as_its_own_rule() -> None:
    data = golden("vqa_records.json")
    answers = {row["question_id"]: row["answer"] for row in data["results"]}
    expected = data["expected"]["vizwiz_rule"]
    for row in data["annotations"]:
        ours = 100 * vqa_accuracy(answers[row["question_id"]], [a["answer"] for a in row["answers"]], "vizwiz")
        assert ours == pytest.approx(expected["per_question"][str(row["question_id"])], abs=0.01), row["question_id"]


def test_anls_equals_the_golden_values() -> None:
    data = golden("anls.json")
    values = [anls(row["prediction"], row["references"]) for row in data["rows"]]
    assert values == pytest.approx([row["anls"] for row in data["rows"]], abs=1e-6)
    assert sum(values) / len(values) == pytest.approx(data["mean"], abs=1e-6)
    assert edit_distance("kitten", "sitting") == 3


@pytest.mark.parametrize(
    ("text", "letter"),
    [("B", "B"), ("(B)", "B"), ("B. iron", "B"), ("B) iron", "B"), (" C", "C"), ("d", "D"), ("Because", FAILED), ("", FAILED), ("A:", "A")],
)
def test_a_letter_at_the_start_is_found(text: str, letter: str) -> None:
    assert parse_letter(text) == letter
