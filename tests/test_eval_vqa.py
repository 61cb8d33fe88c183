"""The evaluation asks every question once, goes on where it stopped, scores only what was answered, and its control looks elsewhere."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llm_stage import benchmarks, eval_vqa
from llm_stage.benchmarks import BENCHMARKS, choose, find_image, most_frequent, shuffle_images
from mmkit.errors import ConfigError, DataError, NameNotFound
from mmkit.images import ImageError

COLOURS = {"red": (220, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 210), "white": (250, 250, 250)}


class Painter:
    """Stands in for ChatModel: sees the colour of the picture and says it; counts what it was asked."""

    name = "painter"

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.fail_after = -1  # questions; -1 is never

    def encoder_card(self) -> dict[str, Any]:
        return {"architecture": "eye", "parameters": 2}

    def generate(self, requests: Sequence[Any], max_new_tokens: int, batch_size: int, temperature: float) -> list[str]:
        assert temperature == 0.0
        assert len(requests) <= batch_size
        if 0 <= self.fail_after <= len(self.asked):
            raise RuntimeError("the machine went away")
        self.asked += [request.turns[-1].text for request in requests]
        return [f" {self.colour(request.images[0])}\n" for request in requests]

    @staticmethod
    def colour(image: Image.Image) -> str:
        pixel = np.asarray(image)[0, 0].astype(int)
        return min(COLOURS, key=lambda name: int(np.abs(pixel - COLOURS[name]).sum()))


@pytest.fixture
def painter(monkeypatch: pytest.MonkeyPatch) -> Painter:
    model = Painter()
    monkeypatch.setattr(eval_vqa, "load_chat", lambda *args, **kwargs: model)
    return model


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """Twelve pictures of one colour each, two questions a picture: its colour, and one that nobody can answer."""
    images, questions, annotations = tmp_path / "images", [], []
    (images / "val").mkdir(parents=True)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_bytes(bytes(range(256)) * 1000)
    names = list(COLOURS)
    for number in range(12):
        colour = names[number % 4]
        Image.new("RGB", (8, 8), COLOURS[colour]).save(images / "val" / f"{number:06d}.png")
        for kind, text, answer in (("colour", f"what color is picture {number}?", colour), ("count", "how many?", "3" if number else "4")):
            row = {"question_id": len(questions), "image_id": number, "question": text, "image": f"val/{number:06d}.png"}
            questions.append(row)
            note = {"question_id": row["question_id"], "image_id": number, "question_type": kind, "answer_type": "other"}
            tens = [{"answer_id": i + 1, "answer": answer if i < 9 else "no idea"} for i in range(10)]
            annotations.append({**note, "multiple_choice_answer": answer, "answers": tens})
    save(tmp_path / "q.json", {"data_type": "mmkit_mini", "data_subtype": "test", "questions": questions})
    save(tmp_path / "a.json", {"annotations": annotations})
    return tmp_path


def save(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def change(path: Path, key: str, edit: Any) -> None:
    data = json.loads(path.read_text(encoding="utf-8"))
    edit(data[key])
    save(path, data)


def flags(world: Path, out: str = "out", *more: str) -> list[str]:
    where = {"model": "model", "questions": "q.json", "annotations": "a.json", "images": "images", "out": out}
    return [word for name, path in where.items() for word in (f"--{name}", str(world / path))] + ["--batch_size", "5", *more]


def summary_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_model_that_sees_colours_is_right_on_colours_only(world: Path, painter: Painter) -> None:
    summary = summary_of(eval_vqa.main(flags(world)))
    assert {"benchmark", "model", "protocol", "n", "metrics", "seconds", "missing"} <= set(summary)
    assert (summary["benchmark"], summary["model"], summary["n"], summary["missing"]) == ("mini_vqa", "painter", 24, 0)
    metrics = summary["metrics"]
    assert metrics["vqa_accuracy"]["value"] == 50.0
    assert metrics["vqa_accuracy/colour"]["value"] == 100.0
    assert metrics["vqa_accuracy/count"]["value"] == 0.0
    assert metrics["vqa_accuracy/colour"]["n"] == 12
    low, high = metrics["vqa_accuracy/count"]["ci95"]
    assert low == 0.0
    assert high > 20  # twelve images with no right answer do not prove that there is none
    assert len(rows_of(world / "out" / "answers.jsonl")) == 24
    assert set(rows_of(world / "out" / "answers.jsonl")[0]) == {"question_id", "image", "question", "kind", "answer", "seconds"}


def test_questions_are_asked_in_the_benchmarks_words_after_the_image(world: Path, painter: Painter) -> None:
    eval_vqa.main(flags(world))
    assert "<image>\nwhat color is picture 3?\nanswer the question using a single word or phrase." in painter.asked


def test_the_mini_prompt_is_the_line_that_training_uses() -> None:
    language = pytest.importorskip("mmkit.minidata.language")
    assert BENCHMARKS["mini_vqa"].ask("why?") == f"why?\n{language.SHORT_ANSWER}"
    assert BENCHMARKS["mini_captions"].prompt in Path(language.__file__).read_text(encoding="utf-8")


def test_the_control_takes_every_picture_away_from_its_question(world: Path, painter: Painter) -> None:
    summary = summary_of(eval_vqa.main(flags(world, "out", "--shuffle_images")))
    assert summary["benchmark"] == "mini_vqa_shuffled"
    rows = rows_of(world / "out" / "answers.jsonl")
    assert all(row["image"] != row["own_image"] for row in rows)
    assert {row["image"] for row in rows} == {row["own_image"] for row in rows}
    assert summary["metrics"]["vqa_accuracy/colour"]["value"] < 60


@pytest.mark.parametrize("seed", range(6))
def test_no_question_keeps_its_picture_whatever_the_seed(world: Path, seed: int) -> None:
    items, _ = benchmarks.read_items(world / "q.json", world / "a.json", world / "images")
    for count in (4, 6, 24):  # two, three and twelve pictures
        shuffled = shuffle_images(items[:count], seed)
        assert all(item.image != item.own_image for item in shuffled)
        assert shuffled == shuffle_images(items[:count], seed)
    with pytest.raises(DataError, match="1 picture cannot"):
        shuffle_images(items[:2], seed)


def test_an_interrupted_run_goes_on_and_asks_nothing_twice(world: Path, painter: Painter) -> None:
    painter.fail_after = 10
    with pytest.raises(RuntimeError, match="went away"):
        eval_vqa.main(flags(world))
    assert not (world / "out" / "summary.json").exists()
    answers = world / "out" / "answers.jsonl"
    assert len(rows_of(answers)) == 10
    answers.write_text(answers.read_text() + '{"question_id": 23, "answ')  # killed while writing
    painter.fail_after = -1
    resumed = summary_of(eval_vqa.main(flags(world)))
    assert len(painter.asked) == 24
    whole = summary_of(eval_vqa.main(flags(world, "whole")))
    assert resumed["metrics"] == whole["metrics"]


def test_answers_of_another_evaluation_are_not_mixed_in(world: Path, painter: Painter) -> None:
    eval_vqa.main(flags(world))
    with pytest.raises(DataError, match=r"benchmark was 'mini_vqa', is 'mini_vqa_shuffled'.*--overwrite"):
        eval_vqa.main(flags(world, "out", "--shuffle_images"))
    (world / "model" / "weights").write_bytes(bytes(range(255, -1, -1)) * 1000)  # trained again, same size
    with pytest.raises(DataError, match="model_fingerprint was"):
        eval_vqa.main(flags(world))
    eval_vqa.main(flags(world, "out", "--overwrite"))
    assert len(painter.asked) == 48


def test_a_folder_with_other_things_in_it_is_left_alone(world: Path, painter: Painter) -> None:
    (world / "out").mkdir()
    (world / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match="no evaluation's folder"):
        eval_vqa.main(flags(world))
    assert [path.name for path in (world / "out").iterdir()] == ["thesis.txt"]


def test_answers_to_unknown_questions_are_refused(world: Path, painter: Painter) -> None:
    eval_vqa.main(flags(world))
    with open(world / "out" / "answers.jsonl", "a", encoding="utf-8") as file:
        file.write('{"question_id": 999, "answer": "red"}\n')
    with pytest.raises(DataError, match=r"1 answers to questions that .* \(first: 999\)"):
        eval_vqa.main(flags(world))


def test_an_unreadable_picture_stops_the_run_or_is_counted_and_asked_again_later(world: Path, painter: Painter) -> None:
    broken = world / "images" / "val" / "000002.png"
    whole = broken.read_bytes()
    broken.write_text("I am text")
    with pytest.raises(ImageError, match=r"000002.png.*question 5 of"):
        eval_vqa.main(flags(world))
    summary = summary_of(eval_vqa.main(flags(world, "out", "--on_bad_sample", "skip")))
    assert (summary["n"], summary["missing"]) == (22, 2)
    assert set(summary["missing_questions"]) == {"4", "5"}
    assert summary["metrics"]["vqa_accuracy/colour"] == {**summary["metrics"]["vqa_accuracy/colour"], "value": 100.0, "n": 11}
    broken.write_bytes(whole)
    assert summary_of(eval_vqa.main(flags(world)))["missing"] == 0
    assert len(painter.asked) == 24


def test_the_baseline_says_where_it_was_counted(world: Path, painter: Painter) -> None:
    summary = summary_of(eval_vqa.main(flags(world)))
    assert summary["metrics"]["most_frequent_answer/count"]["value"] == pytest.approx(100 * 11 / 12, abs=0.01)
    assert "evaluated set itself" in summary["protocol"]["baseline"]
    save(world / "train.json", {"annotations": [{"question_id": 1, "question_type": "count", "multiple_choice_answer": "4"}]})
    summary = summary_of(eval_vqa.main(flags(world, "other", "--train_annotations", str(world / "train.json"))))
    assert summary["metrics"]["most_frequent_answer/count"]["value"] == pytest.approx(100 / 12, abs=0.01)
    assert summary["protocol"]["baseline"].endswith("counted in train.json")
    assert summary["baseline_answers"] == {"colour": "4", "count": "4"}  # a kind that train lacks gets the answer most frequent of all


def test_ties_of_the_baseline_do_not_hang_on_the_order_of_the_file() -> None:
    rows = [{"question_type": "k", "multiple_choice_answer": answer} for answer in ("b", "a")]
    assert most_frequent(rows, "x") == most_frequent(rows[::-1], "x") == {"k": "a", "": "a"}


def test_pictures_are_found_under_cocos_names(tmp_path: Path) -> None:
    (tmp_path / "COCO_val2014_000000000042.jpg").touch()
    (tmp_path / "000000000043.jpg").touch()
    assert find_image({"question_id": 1, "image_id": 42}, tmp_path, "val2014")[0] == "COCO_val2014_000000000042.jpg"
    assert find_image({"question_id": 1, "image_id": 43}, tmp_path, "val2014")[0] == "000000000043.jpg"
    assert find_image({"question_id": 1, "image_id": 44}, tmp_path, "val2014")[0] is None
    with pytest.raises(DataError, match="names no picture"):
        find_image({"question_id": 1}, tmp_path, "")


def test_every_benchmark_has_its_control_and_a_miss_names_the_nearest() -> None:
    plain = [row for row in BENCHMARKS.values() if not row.control_of]
    assert {row.name for row in plain} >= {"mini_vqa", "vqav2", "okvqa", "own_vqa"}
    for row in plain:
        assert choose(row.name, True, "").control_of == row.name
    assert choose("", False, "mscoco").name == "own_vqa"
    with pytest.raises(NameNotFound, match="vqav2"):
        choose("vqa_v2", False, "")


def test_braces_in_a_question_are_only_braces() -> None:
    assert BENCHMARKS["vqav2"].ask("what is {0}?").startswith("what is {0}?\n")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda w: (w / "q.json").write_text("{"), "q.json is no JSON"),
        (lambda w: save(w / "q.json", [1]), "no list 'questions'; it holds a list"),
        (lambda w: (w / "a.json").unlink(), "no file .*a.json"),
        (lambda w: change(w / "q.json", "questions", lambda rows: rows.append(rows[3])), "row 24: question_id 3 comes twice"),
        (lambda w: change(w / "a.json", "annotations", lambda rows: rows.append(rows[3])), "a.json, row 24: question_id 3 comes twice"),
        (lambda w: change(w / "q.json", "questions", lambda rows: rows[2].pop("question")), "row 2 .*lacks question"),
        (lambda w: change(w / "a.json", "annotations", lambda rows: rows[7].pop("answers")), "question 7 has 0 answers"),
        (lambda w: change(w / "a.json", "annotations", lambda rows: rows.pop(7)), "1 of 24 questions .*no annotation .*: 7"),
        (lambda w: (w / "images" / "val" / "000004.png").unlink(), "2 of 24 questions have no picture .*question 8 .*val/000004.png"),
    ],
)
def test_a_broken_file_is_named_and_nothing_is_written(world: Path, painter: Painter, edit: Any, message: str) -> None:
    edit(world)
    with pytest.raises(DataError, match=message):
        eval_vqa.main(flags(world))
    assert not (world / "out").exists()


def test_a_missing_flag_is_named(world: Path) -> None:
    with pytest.raises(ConfigError, match="--questions is missing"):
        eval_vqa.main(["--model", str(world / "model")])
