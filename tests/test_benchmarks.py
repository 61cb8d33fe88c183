"""Every row of the table runs on a tiny set in its official format: read, asked in its words, scored, uploaded; and its controls."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from benchmark_tiny import MAKERS, Tiny, save
from llava_tiny import tiny_llm, tiny_tower
from PIL import Image

from llm_stage import eval_vqa, lmms_task
from llm_stage.asking import request_for
from llm_stage.benchmark_scores import SCORERS
from llm_stage.benchmarks import BENCHMARKS, CONTROLS, PROMPTS, READERS, choose, controlled, own_row, read_items
from llm_stage.llava import build_llava
from llm_stage.llava_folder import LlavaCard, save_llava
from llm_stage.submissions import UPLOADS
from mmkit import report
from mmkit.errors import ConfigError, DataError, NameNotFound
from mmkit.report_compare import comparisons, controls
from mmkit.report_data import read_runs

ROWS = [row for row in BENCHMARKS.values() if not row.control_of]
VQA_ROWS = [row.name for row in ROWS if row.scorer != "captions"]
PROMPT_FILE = Path(__file__).parent / "golden" / "prompts" / "prompts.json"


class Knows:
    """Stands in for ChatModel: knows the right answer to every question it is given, or says one thing to all."""

    name = "knows"

    def __init__(self) -> None:
        self.asked: list[tuple[str, Image.Image | None]] = []
        self.answers: dict[str, str] = {}
        self.always = ""

    def encoder_card(self) -> dict[str, Any]:
        return {"architecture": "eye"}

    def generate(self, requests: Sequence[Any], **_: Any) -> list[str]:
        said = []
        for request in requests:
            picture = request.images[0] if request.images else None
            self.asked.append((request.turns[-1].text, picture))
            said.append(self.always or self.answers[self.key(request.turns[-1].text, picture)])
        return said

    @staticmethod
    def key(text: str, picture: Image.Image | None) -> str:
        pixel = np.asarray(picture)[0, 0].tolist() if picture is not None else None
        return f"{text}|{pixel}"


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Knows:
    knows = Knows()
    monkeypatch.setattr(eval_vqa, "load_chat", lambda *args, **kwargs: knows)
    return knows


def made(tmp_path: Path, name: str) -> Tiny:
    (tmp_path / "model").mkdir(exist_ok=True)
    (tmp_path / "model" / "weights").write_bytes(b"x" * 64)
    return MAKERS[name](tmp_path / "data" / name)


def items_of(name: str, tiny: Tiny) -> Any:
    flags = tiny.flags
    ocr = Path(flags["ocr"]) if "ocr" in flags else None
    return read_items(flags["questions"], flags.get("annotations"), flags["images"], benchmark=BENCHMARKS[name], ocr=ocr)


def run(tmp_path: Path, name: str, tiny: Tiny, model: Knows, *more: str, out: str = "out") -> dict[str, Any]:
    """Evaluate a model that knows every answer by question and picture."""
    benchmark = BENCHMARKS[name]
    items, _ = items_of(name, tiny)
    for item in items:
        request = request_for(item, benchmark, tiny.flags["images"])
        model.answers[model.key(request.turns[-1].text, request.images[0] if request.images else None)] = tiny.right[item.question_id]
    words = [word for key, value in tiny.flags.items() for word in (f"--{key}", value)]
    folder = eval_vqa.main(["--model", str(tmp_path / "model"), *words, "--benchmark", name, "--out", str(tmp_path / out), *more])
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def test_every_row_has_a_tiny_set_a_reader_a_scorer_and_an_upload() -> None:
    assert {row.name for row in ROWS} == set(MAKERS)
    wanted = {"vqav2", "okvqa", "gqa", "textvqa", "textvqa_ocr", "scienceqa_img", "pope", "vizwiz", "mme", "mmbench", "seed_image"}
    assert wanted | {"nocaps", "coco_captions", "flickr30k", "mini_vqa", "mini_captions"} <= set(MAKERS)
    for row in ROWS:
        assert row.reader in READERS
        assert row.scorer in {**SCORERS, "captions": 0}
        assert row.upload in UPLOADS
        assert row.prompt_name != "own"
        assert row.files
        assert {f"{row.name}_{control}" for control in CONTROLS} <= set(BENCHMARKS)


@pytest.mark.parametrize("name", VQA_ROWS)
def test_a_model_that_is_always_right_scores_100_on_every_row(tmp_path: Path, model: Knows, name: str) -> None:
    tiny = made(tmp_path, name)
    summary = run(tmp_path, name, tiny, model)
    assert summary["benchmark"] == name
    assert summary["n"] == len(tiny.right)
    assert summary["missing"] == 0
    assert summary["protocol"]["scorer"] == BENCHMARKS[name].scorer
    for metric, value in summary["metrics"].items():
        if not metric.startswith("most_frequent"):
            assert value["value"] == 100.0, metric
            assert value["ci95"][1] == 100.0
    assert {row["question_id"] for row in map(json.loads, (tmp_path / "out" / "scores.jsonl").read_text().splitlines())} == set(tiny.right)


@pytest.mark.parametrize("name", VQA_ROWS)
def test_every_row_becomes_a_task_of_lmms_eval_with_the_same_scores(tmp_path: Path, name: str) -> None:
    tiny = made(tmp_path, name)
    words = [word for key, value in tiny.flags.items() for word in (f"--{key}", value)]
    folder = lmms_task.main([name, *words, "--out", str(tmp_path / "task")])
    docs = [json.loads(line) for line in (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {json.loads(doc["question_id"]) for doc in docs} == set(tiny.right)
    assert any(doc["image"] for doc in docs)  # ScienceQA also asks without one
    for doc in docs:
        assert len(lmms_task.doc_to_visual(doc)) == bool(doc["image"])
        (scored,) = lmms_task.process_results(doc, [tiny.right[json.loads(doc["question_id"])]]).values()
        assert scored["score"] == 1.0


@pytest.mark.parametrize("name", VQA_ROWS)
def test_a_model_that_says_nonsense_scores_0_where_nonsense_is_wrong(tmp_path: Path, model: Knows, name: str) -> None:
    model.always = "xylophone"
    summary = run(tmp_path, name, made(tmp_path, name), model)
    expected = 50.0 if name == "pope" else 0.0  # POPE reads yes out of anything without a no
    assert summary["metrics"][summary["item_metric"]]["value"] == expected


def uploaded(folder: Path) -> Any:
    return json.loads((folder / "submission.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["vqav2", "okvqa", "textvqa"])
def test_the_vqa_upload_is_a_list_of_ids_and_normal_forms(tmp_path: Path, model: Knows, name: str) -> None:
    tiny = made(tmp_path, name)
    tiny.right = {key: f"The {value.upper()}." for key, value in tiny.right.items()}
    run(tmp_path, name, tiny, model)
    assert [sorted(row) for row in uploaded(tmp_path / "out")] == [["answer", "question_id"]] * 4
    assert {row["question_id"]: row["answer"] for row in uploaded(tmp_path / "out")} == {
        key: value[4:-1].lower() for key, value in tiny.right.items()
    }


def test_the_other_uploads_have_their_official_forms(tmp_path: Path, model: Knows) -> None:
    run(tmp_path, "gqa", made(tmp_path, "gqa"), model, out="gqa_out")
    assert uploaded(tmp_path / "gqa_out")[0] == {"questionId": "20000", "prediction": "yes"}
    run(tmp_path, "vizwiz", made(tmp_path, "vizwiz"), model, out="vizwiz_out")
    assert uploaded(tmp_path / "vizwiz_out")[1] == {"image": "VizWiz_val_00000001.jpg", "answer": "green"}
    run(tmp_path, "scienceqa", made(tmp_path, "scienceqa"), model, out="sqa_out")
    assert uploaded(tmp_path / "sqa_out")["results"] == {"4": 0, "5": 1, "6": 0, "7": 1}
    run(tmp_path, "seed_image", made(tmp_path, "seed_image"), model, out="seed_out")
    line = (tmp_path / "seed_out" / "submission.jsonl").read_text().splitlines()[1]
    assert json.loads(line) == {"question_id": "101", "prediction": "B"}
    run(tmp_path, "pope", made(tmp_path, "pope"), model, out="pope_out")
    lines = (tmp_path / "pope_out" / "submission" / "coco_pope_random_answers.json").read_text().splitlines()
    assert json.loads(lines[0]) == {"question": "Is there a dog in the image?", "answer": "Yes"}


def test_the_mme_upload_is_what_its_own_tool_reads(tmp_path: Path, model: Knows) -> None:
    model.always = "Yes\nof\tcourse"
    run(tmp_path, "mme", made(tmp_path, "mme"), model)
    files = sorted((tmp_path / "out" / "submission").iterdir())
    assert len(files) == 14
    lines = files[0].read_text().splitlines()
    # the question bears the file's own words again, also where two blanks stand in them
    assert lines[0].split("\t") == ["0000.jpg", "Is it red?  Please answer yes or no.", "Yes", "Yes of course"]
    assert len(lines) == 4


def test_the_mmbench_upload_is_a_sheet_with_predictions_and_without_pictures(tmp_path: Path, model: Knows) -> None:
    run(tmp_path, "mmbench", made(tmp_path, "mmbench"), model)
    with zipfile.ZipFile(tmp_path / "out" / "submission.xlsx") as archive:
        sheet = ElementTree.fromstring(archive.read("xl/worksheets/sheet1.xml"))
    rows = [
        ["".join(cell.itertext()) for cell in row] for row in sheet.iter("{http://schemas.openxmlformats.org/spreadsheetml/2006/main}row")
    ]
    assert rows[0] == ["index", "question", "A", "B", "C", "D", "prediction", "answer", "split"]
    assert rows[2] == ["1000007", "What color?", "other", "red", "", "nan", "B", "B", "dev"]


def test_a_test_split_without_answers_gives_the_upload_and_no_score(tmp_path: Path, model: Knows) -> None:
    tiny = made(tmp_path, "vqav2")
    whole = json.loads(Path(tiny.flags["questions"]).read_text())
    whole["questions"].append({"question_id": 77, "image_id": 9, "question": "why?"})
    save(tmp_path / "test2015.json", whole)
    del tiny.flags["annotations"]
    model.always = "two"
    words = [word for key, value in tiny.flags.items() for word in (f"--{key}", value)]
    words += ["--model", str(tmp_path / "model"), "--benchmark", "vqav2", "--out", str(tmp_path / "out")]
    with pytest.raises(ConfigError, match=r"--annotations is missing.*--unlabelled"):
        eval_vqa.main(words)
    eval_vqa.main([*words, "--unlabelled", "--submission_questions", str(tmp_path / "test2015.json")])
    assert uploaded(tmp_path / "out")[-2:] == [{"question_id": 3000, "answer": "2"}, {"question_id": 77, "answer": ""}]
    assert not (tmp_path / "out" / "summary.json").exists()


# ---- words ---------------------------------------------------------------------------------------------------------------------------


def asked_words(tmp_path: Path) -> dict[str, str]:
    """What every row sends for the second question of its tiny set, and every named prompt around the word QUESTION."""
    words = {f"prompt {name}": text.replace("{question}", "QUESTION") for name, text in PROMPTS.items()}
    for row in ROWS:
        items, _ = items_of(row.name, MAKERS[row.name](tmp_path / row.name))
        words[f"{row.name}, {row.max_new_tokens} tokens"] = row.ask(items[1].question)
    return words


def test_the_words_of_every_row_are_those_on_record(tmp_path: Path) -> None:
    assert asked_words(tmp_path) == json.loads(PROMPT_FILE.read_text(encoding="utf-8"))


# ---- controls ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VQA_ROWS)
def test_controls_take_the_picture_away_and_keep_the_words(tmp_path: Path, model: Knows, name: str) -> None:
    tiny = made(tmp_path, name)
    run(tmp_path, name, tiny, model, out="plain")
    plain = {words.removeprefix("<image>\n") for words, _ in model.asked}
    for control in CONTROLS:
        items, _ = items_of(name, tiny)
        row = choose(name, control, "")
        for item in controlled(items, row, 0):
            request = request_for(item, row, tiny.flags["images"])
            text = request.turns[-1].text
            assert text.removeprefix("<image>\n") in plain
            assert text.startswith("<image>\n") == bool(request.images)
            if control == "text_only" or not item.own_image:
                assert not request.images
            elif control == "blank":
                assert np.asarray(request.images[0]).std() == 0
                assert request.images[0].size == (336, 336)
            else:
                assert item.image != item.own_image


def test_the_share_of_the_score_that_needs_the_picture_is_said(tmp_path: Path, model: Knows) -> None:
    tiny = made(tmp_path, "vqav2")
    run(tmp_path, "vqav2", tiny, model, out="vqav2")
    model.always = "red"
    summary = run(tmp_path, "vqav2", tiny, model, "--control", "blank", out="vqav2_blank")
    assert summary["benchmark"] == "vqav2_blank"
    assert summary["protocol"]["control"] == "blank"
    ground = summary["grounding"]  # found beside it; the control is right on the red one of four
    assert (ground["against"], ground["score"], ground["without"]) == ("../vqav2", 100.0, 25.0)
    assert ground["difference"]["value"] == ground["share"]["value"] == 75.0
    assert "of the score need the picture" in ground["sentence"]
    assert not (tmp_path / "vqav2_blank" / "submission.json").exists()
    model.always = ""
    with pytest.raises(DataError, match="is an evaluation of vqav2_blank; this control is one of vqav2"):
        run(tmp_path, "vqav2", tiny, model, "--control", "shuffled", "--against", str(tmp_path / "vqav2_blank"), out="other")
    with pytest.raises(ConfigError, match="--against is for controls"):
        run(tmp_path, "vqav2", tiny, model, "--against", str(tmp_path / "vqav2"), out="third")


def test_text_only_needs_no_pictures_at_all(tmp_path: Path, model: Knows) -> None:
    tiny = made(tmp_path, "gqa")
    model.always = "yes"
    words = ["--model", str(tmp_path / "model"), "--questions", tiny.flags["questions"], "--benchmark", "gqa"]
    folder = eval_vqa.main([*words, "--control", "text_only", "--out", str(tmp_path / "out")])
    assert all(picture is None and "<image>" not in text for text, picture in model.asked)
    assert json.loads((folder / "summary.json").read_text())["metrics"]["accuracy/verify"]["value"] == 100.0


def test_a_control_is_named_exactly() -> None:
    with pytest.raises(NameNotFound, match="shuffled"):
        choose("gqa", "shufled", "")
    with pytest.raises(ConfigError, match="gqa_blank is a control itself"):
        choose("gqa_blank", "shuffled", "")


# ---- a row of one's own --------------------------------------------------------------------------------------------------------------


def own(tmp_path: Path, text: str) -> Path:
    return save(tmp_path / "leaves.yaml", text)


def test_a_row_of_ones_own_is_a_small_yaml_file(tmp_path: Path, model: Knows) -> None:
    made(tmp_path, "own_vqa")
    content = 'reader: vqa\nscorer: exact\nmax_new_tokens: 9\nprompt: "{question}\\nOne word."\n'
    content += "questions: data/own_vqa/q.json\nannotations: data/own_vqa/a.json\nimages: data/own_vqa/images\n"
    path = own(tmp_path, content)
    model.always = "The Red."
    folder = eval_vqa.main(["--model", str(tmp_path / "model"), "--benchmark", str(path), "--out", str(tmp_path / "out")])
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["benchmark"] == "leaves"
    assert summary["metrics"]["accuracy"]["value"] == 25.0
    assert summary["protocol"]["max_new_tokens"] == 9
    assert model.asked[0][0] == "<image>\nWhat color is this?\nOne word."


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("scorrer: exact\n", "no entry of a benchmark .*scorer"),
        ("scorer: exakt\n", "no scorer named 'exakt'; nearest: exact"),
        ("reader: vqqa\n", "no reader named 'vqqa'; nearest: vqa"),
        ("prompt: say it\n", "no prompt .*named 'say it'"),
        ("max_new_tokens: many\n", "max_new_tokens is 'many'; a number of tokens"),
        ("- a\n", "holds no `key: value` lines"),
        ("a: [\n", "is no YAML"),
    ],
)
def test_a_wrong_row_names_its_entry(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises((ConfigError, NameNotFound), match=message):
        own_row(own(tmp_path, text))


def test_own_sets_may_have_fewer_than_ten_answers_where_the_scorer_allows(tmp_path: Path, model: Knows) -> None:
    tiny = made(tmp_path, "own_vqa")
    data = json.loads(Path(tiny.flags["annotations"]).read_text())
    for row in data["annotations"]:
        row["answers"] = row["answers"][:2]
    save(Path(tiny.flags["annotations"]), data)
    model.always = "red"
    words = [word for key, value in tiny.flags.items() for word in (f"--{key}", value)]
    words += ["--model", str(tmp_path / "model"), "--out", str(tmp_path / "out")]
    with pytest.raises(DataError, match="question 0 has 2 answers, not ten"):
        eval_vqa.main(words)
    summary = json.loads((eval_vqa.main([*words, "--scorer", "anls"]) / "summary.json").read_text())
    assert summary["metrics"]["anls"]["n"] == 4
    with pytest.raises(NameNotFound, match="anls"):
        eval_vqa.main([*words, "--scorer", "anlss"])


# ---- in the report, and by a real model --------------------------------------------------------------------------------


def test_the_report_sets_every_control_beside_its_benchmark(tmp_path: Path, model: Knows) -> None:
    tiny = made(tmp_path, "vqav2")
    run(tmp_path, "vqav2", tiny, model, out="runs/clip/vqav2")
    model.always = "red"
    for control in CONTROLS:
        run(tmp_path, "vqav2", tiny, model, "--control", control, out=f"runs/clip/vqav2_{control}")
    data = read_runs([tmp_path / "runs"])
    rows = controls(data)
    assert [(row["benchmark"], row["kind"], row["share"]) for row in rows] == [("vqav2", control, 75.0) for control in CONTROLS]
    assert data.benchmarks[0] == "vqav2"
    assert comparisons(data) == []
    text = (report.main([str(tmp_path / "runs")]) / "report.md").read_text()
    assert "vqav2 (blank)" in text
    assert "vqav2 (text only)" in text


def test_the_report_compares_pope_by_what_its_items_average_to(tmp_path: Path, model: Knows) -> None:
    tiny = made(tmp_path, "pope")
    run(tmp_path, "pope", tiny, model, out="runs/clip/pope")
    model.always = "yes"
    run(tmp_path, "pope", tiny, model, "--control", "blank", out="runs/clip/pope_blank")
    (row,) = controls(read_runs([tmp_path / "runs"]))
    assert (row["metric"], row["score"]["value"], row["control"]["value"], row["difference"]) == ("accuracy", 100.0, 50.0, 50.0)


def test_a_real_model_answers_with_and_without_pictures_in_one_batch(tmp_path: Path) -> None:
    llm, tokenizer = tiny_llm(0, tie=False)
    with torch.no_grad():  # fresh weights hardly look at their input
        for parameter in llm.parameters():
            parameter.mul_(8 if parameter.ndim > 1 else 1)
    built, processor = build_llava(tiny_tower(), (llm, tokenizer))
    save_llava(built, processor, LlavaCard("tiny", "tiny", "chatml", "mlp2x_gelu"), tmp_path / "llava" / "model")
    tiny = MAKERS["scienceqa"](tmp_path / "data")
    words = ["--model", str(tmp_path / "llava" / "model"), "--questions", tiny.flags["questions"], "--images", tiny.flags["images"]]
    words += ["--benchmark", "scienceqa", "--max_new_tokens", "6"]
    said = {}
    for control in ("", *CONTROLS):
        folder = eval_vqa.main([*words, "--out", str(tmp_path / f"out_{control}"), *(["--control", control] if control else [])])
        said[control] = {row["question_id"]: row["answer"] for row in map(json.loads, (folder / "answers.jsonl").read_text().splitlines())}
    for control in CONTROLS:
        assert said[control]["7"] == said[""]["7"]  # it has no picture to lose
        assert said[control] != said[""]


# ---- broken official files -----------------------------------------------------------------------------------------------------------


def edited(path: Path, edit: Any) -> None:
    """Change a JSON file's content in place."""
    content = json.loads(path.read_text(encoding="utf-8"))
    edit(content)
    save(path, content)


def replaced(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def pope_lines(root: Path) -> Path:
    return root / "pope" / "coco_pope_popular.json"


BROKEN: list[tuple[str, Any, str]] = [
    ("gqa", lambda r: edited(r / "testdev_balanced_questions.json", lambda d: d["20001"].pop("answer")), "question 20001 lacks answer"),
    ("gqa", lambda r: save(r / "testdev_balanced_questions.json", []), "no question file of GQA"),
    ("gqa", lambda r: edited(r / "testdev_balanced_questions.json", lambda d: [q.update(isBalanced=False) for q in d.values()]), "no balanced"),
    ("gqa", lambda r: (r / "images" / "n2.jpg").unlink(), "1 of 4 questions have no picture .* question 20002 .* n2.jpg"),
    ("textvqa", lambda r: edited(r / "TextVQA_0.5.1_val.json", lambda d: d["data"][1]["answers"].pop()), "question 34603 has 9 answers"),
    ("textvqa", lambda r: edited(r / "TextVQA_0.5.1_val.json", lambda d: d["data"].append(d["data"][0])), "question_id 34602 comes twice"),
    ("textvqa_ocr", lambda r: edited(r / "TextVQA_Rosetta_OCR_v0.2_val.json", lambda d: d["data"].pop()), "no words for the pictures of 1 of 4"),
    ("vizwiz", lambda r: save(r / "val.json", {"a": 1}), "no list of questions"),
    ("vizwiz", lambda r: edited(r / "val.json", lambda d: d[2].pop("answers")), "VizWiz_val_00000002.jpg has 0 answers, not ten"),
    ("scienceqa", lambda r: edited(r / "problems.json", lambda d: d["5"].update(answer=7)), "question 5 has 3 choices and answer 7"),
    ("scienceqa", lambda r: save(r / "pid_splits.json", {"train": []}), "no split 'test'; it has train"),
    ("scienceqa", lambda r: edited(r / "problems.json", lambda d: d.pop("4")), "1 of 4 questions of split test are not in"),
    ("pope", lambda r: pope_lines(r).unlink(), "0 files of POPE's category popular"),
    ("pope", lambda r: replaced(pope_lines(r), '"yes"', '"maybe"'), "question 1 is labelled 'maybe'"),
    ("pope", lambda r: replaced(pope_lines(r), '"question_id": 2', '"question_id": 1'), "question_id 1 comes twice"),
    ("mme", lambda r: replaced(r / "mme" / "count" / "0001.txt", "Is it blue? Please answer yes or no.\tNo\n", ""), "have not two questions: 0001.png"),
    ("mme", lambda r: replaced(r / "mme" / "count" / "0001.txt", "\tNo", " No"), "line 2: question, Yes or No, with tabs"),
    ("mmbench", lambda r: replaced(r / "mmbench_dev.tsv", "\tB\tcolor", "\t\tcolor"), "question 1000007 has the answer '', and options A, B"),
    ("mmbench", lambda r: replaced(r / "mmbench_dev.tsv", "index", "number"), "lacks the columns index"),
    ("mmbench", lambda r: replaced(r / "mmbench_dev.tsv", "color\t/9j", "color\t!9j"), "picture of question 7 is no base64"),
    ("seed_image", lambda r: edited(r / "SEED-Bench.json", lambda d: d["questions"][1].update(answer="E")), "question 101 has the answer 'E'"),
    ("seed_image", lambda r: edited(r / "SEED-Bench.json", lambda d: [q.update(data_type="video") for q in d["questions"]]), "no question of data_type"),
    ("okvqa", lambda r: edited(r / "a.json", lambda d: d["annotations"].pop(1)), "1 of 4 questions .* have no annotation .*: 1000"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "edit", "message"), BROKEN, ids=[f"{name}-{message[:24]}" for name, _, message in BROKEN])
def test_a_broken_official_file_is_named_and_nothing_is_written(tmp_path: Path, model: Knows, name: str, edit: Any, message: str) -> None:
    tiny = made(tmp_path, name)
    edit(tmp_path / "data" / name)
    model.always = "A"
    words = [word for key, value in tiny.flags.items() for word in (f"--{key}", value)]
    with pytest.raises(DataError, match=message):
        eval_vqa.main(["--model", str(tmp_path / "model"), *words, "--benchmark", name, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    assert not model.asked


@pytest.mark.parametrize("name", [name for name in VQA_ROWS if name != "mmbench"])  # whose pictures are in its file
def test_a_picture_that_is_not_there_is_named_on_every_row(tmp_path: Path, model: Knows, name: str) -> None:
    tiny = made(tmp_path, name)
    items, _ = items_of(name, tiny)
    (Path(tiny.flags["images"]) / items[0].image).unlink()
    with pytest.raises(DataError, match=rf"questions have no picture under .*question {items[0].question_id} .*--images DIR"):
        items_of(name, tiny)


@pytest.mark.parametrize("scorer", SCORERS)
def test_every_scorer_can_score_a_set_of_ones_own(tmp_path: Path, model: Knows, scorer: str) -> None:
    tiny = made(tmp_path, "own_vqa")
    right = {"pope": "Yes", "mme": "Yes", "letter": "B", "scienceqa": "B"}.get(scorer.removeprefix("lmms_").removeprefix("exact_"), "red")
    edited(
        Path(tiny.flags["annotations"]), lambda d: [answer.update(answer=right) for row in d["annotations"] for answer in row["answers"]]
    )
    tiny.right = dict.fromkeys(tiny.right, right)
    summary = run(tmp_path, "own_vqa", tiny, model, "--scorer", scorer)
    assert summary["metrics"][summary["item_metric"]]["value"] == 100.0
    assert summary["protocol"]["scorer"] == scorer


def test_textvqa_with_ocr_asks_for_the_words_or_takes_llavas_prompts(tmp_path: Path, model: Knows) -> None:
    tiny = made(tmp_path, "textvqa_ocr")
    del tiny.flags["ocr"]
    model.always = "red"
    words = [
        "--model",
        str(tmp_path / "model"),
        "--images",
        tiny.flags["images"],
        "--benchmark",
        "textvqa_ocr",
        "--out",
        str(tmp_path / "out"),
    ]
    with pytest.raises(DataError, match="TextVQA with OCR needs the words: --ocr"):
        eval_vqa.main([*words, "--questions", tiny.flags["questions"]])
    prompts = [
        {"question_id": f"{n:016x}", "image": f"{n:016x}.jpg", "text": f"What is written?\nReference OCR token: W{n}, x\nShort."}
        for n in (0, 2)
    ]
    save(tmp_path / "llava_textvqa_val_v051_ocr.jsonl", "".join(json.dumps(row) + "\n" for row in prompts))
    words += ["--questions", str(tmp_path / "llava_textvqa_val_v051_ocr.jsonl")]
    with pytest.raises(DataError, match="prompts without answers: give TextVQA's own file"):
        eval_vqa.main(words)
    summary = json.loads((eval_vqa.main([*words, "--annotations", tiny.flags["questions"]]) / "summary.json").read_text())
    assert (summary["n"], summary["metrics"]["vqa_accuracy"]["value"]) == (2, 50.0)
    assert any("Reference OCR token: W2, x\nAnswer the question" in text for text, _ in model.asked)


def test_a_circular_question_counts_where_all_its_rotations_are_right(tmp_path: Path, model: Knows) -> None:
    model.always = "(A) of course"
    metrics = run(tmp_path, "mmbench", made(tmp_path, "mmbench"), model)["metrics"]
    assert metrics["accuracy"]["value"] == 50.0
    assert metrics["circular_accuracy"] == {"value": 0.0, "ci95": metrics["circular_accuracy"]["ci95"], "n": 4}


def test_pictures_of_mmbench_are_unpacked_once_where_they_are_asked_for(tmp_path: Path, model: Knows) -> None:
    run(tmp_path, "mmbench", made(tmp_path, "mmbench"), model)
    assert sorted(path.name for path in (tmp_path / "data" / "mmbench" / "unpacked").iterdir()) == ["10.jpg", "7.jpg", "8.jpg", "9.jpg"]
