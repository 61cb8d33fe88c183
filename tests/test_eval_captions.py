"""Captions of COCO's, NoCaps's and Flickr's files: asked, scored as pycocoevalcap scores, uploaded, resumed, controlled, and scored alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmark_tiny import COLOURS, MAKERS, save
from PIL import Image

from apps import cli
from llm_stage import eval_captions, eval_vqa, score
from mmkit.caption_tokens import java_works
from mmkit.errors import ConfigError, DataError
from mmkit.images import ImageError

GOLDEN = json.loads((Path(__file__).parent / "golden" / "eval" / "captions.json").read_text(encoding="utf-8"))
ROWS = ("coco_captions", "nocaps", "flickr30k")


class Painter:
    """Stands in for ChatModel: says which colour it sees, in the references' words."""

    name = "painter"

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.fail_after = -1

    def encoder_card(self) -> dict[str, Any]:
        return {"architecture": "eye"}

    def generate(self, requests: Sequence[Any], **_: Any) -> list[str]:
        if 0 <= self.fail_after <= len(self.asked):
            raise RuntimeError("the machine went away")
        self.asked += [request.turns[-1].text for request in requests]
        return [f" A plain {self.colour(request.images)} picture of nothing.\n" for request in requests]

    @staticmethod
    def colour(images: Sequence[Image.Image]) -> str:
        if not images:
            return "grey"
        pixel = np.asarray(images[0])[0, 0].astype(int)
        near = min(COLOURS, key=lambda name: int(np.abs(pixel - COLOURS[name]).sum()))
        return near if np.abs(pixel - COLOURS[near]).sum() < 60 else "grey"


@pytest.fixture
def painter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Painter:
    model = Painter()
    monkeypatch.setattr(eval_captions, "load_chat", lambda *args, **kwargs: model)
    save(tmp_path / "model" / "weights", "x")
    return model


def flags(tmp_path: Path, name: str, out: str = "out", *more: str) -> list[str]:
    root = tmp_path / "data" / name
    tiny = MAKERS[name](root)
    words = ["--model", str(tmp_path / "model"), "--benchmark", name, "--annotations", tiny.flags["questions"]]
    words += ["--images", tiny.flags["images"], "--out", str(tmp_path / out), "--batch_size", "3"]
    return [*words, "--tokeniser", "ptb_python", "--java_metrics", "[none]", *more]


def summary_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ROWS)
def test_every_benchmark_of_captions_runs_on_its_own_files(tmp_path: Path, painter: Painter, name: str) -> None:
    summary = summary_of(eval_captions.main(flags(tmp_path, name)))
    assert (summary["benchmark"], summary["n"], summary["missing"]) == (name, 4, 0)
    assert summary["protocol"]["tokeniser"] == "ptb_python"
    metrics = summary["metrics"]
    assert metrics["bleu4_ptb_python"]["value"] == 100.0  # words cut in Python are named so
    assert metrics["cider_ptb_python"]["value"] > 300
    rows = [json.loads(line) for line in (tmp_path / "out" / "scores.jsonl").read_text().splitlines()]
    assert 100 * np.mean([row["score"] for row in rows]) == pytest.approx(metrics["cider_ptb_python"]["value"], abs=0.01)
    assert painter.asked == ["<image>\nProvide a one-sentence caption for the provided image."] * 4
    upload = json.loads((tmp_path / "out" / "submission.json").read_text())
    assert [sorted(row) for row in upload] == [["caption", "image_id"]] * 4
    assert upload[0]["image_id"] == ("1000.jpg" if name == "flickr30k" else 50)


def test_nocaps_is_told_apart_by_domain(tmp_path: Path, painter: Painter) -> None:
    summary = summary_of(eval_captions.main(flags(tmp_path, "nocaps")))
    assert {"cider_ptb_python/in-domain", "cider_ptb_python/out-domain"} <= set(summary["metrics"])
    assert summary["metrics"]["cider_ptb_python/in-domain"]["n"] == 2
    # in the set's own weights, as if the domain stood alone
    assert summary["official"]["in-domain"]["CIDEr_ptb_python"] != pytest.approx(
        summary["metrics"]["cider_ptb_python/in-domain"]["value"] / 100
    )


def test_karpathys_split_of_coco_goes_by_cocos_image_ids(tmp_path: Path, painter: Painter) -> None:
    words = flags(tmp_path, "flickr30k")
    path = Path(words[words.index("--annotations") + 1])
    content = json.loads(path.read_text())
    for row in content["images"]:
        row |= {"cocoid": row["imgid"] + 391895, "split": "test" if row["imgid"] else "val"}
    save(path, content)
    assert summary_of(eval_captions.main(words))["n"] == 3
    assert json.loads((tmp_path / "out" / "submission.json").read_text())[0]["image_id"] == 391896
    with pytest.raises(DataError, match="no split 'dev'; it has test, val"):
        eval_captions.main([*words, "--split", "dev"])


@pytest.mark.skipif(not java_works(), reason="no Java, or no pycocoevalcap")
def test_java_gives_the_names_of_the_literature(tmp_path: Path, painter: Painter) -> None:
    words = flags(tmp_path, "coco_captions", "out", "--tokeniser", "auto")
    summary = summary_of(eval_captions.main(words))
    assert summary["metrics"]["bleu4"]["value"] == 100.0
    assert summary["protocol"]["tokeniser"] == "ptb_java"


def test_a_run_goes_on_where_it_stopped(tmp_path: Path, painter: Painter) -> None:
    painter.fail_after = 3
    words = flags(tmp_path, "coco_captions")
    with pytest.raises(RuntimeError, match="went away"):
        eval_captions.main(words)
    painter.fail_after = -1
    assert summary_of(eval_captions.main(words))["n"] == 4
    assert len(painter.asked) == 4
    with pytest.raises(DataError, match="prompt was"):
        eval_captions.main([*words, "--prompt", "llava_caption"])


def test_a_control_says_how_much_of_cider_needs_the_picture(tmp_path: Path, painter: Painter) -> None:
    eval_captions.main(flags(tmp_path, "coco_captions", "coco_captions"))
    for control in ("shuffled", "blank", "text_only"):
        summary = summary_of(eval_captions.main(flags(tmp_path, "coco_captions", f"coco_captions_{control}", "--control", control)))
        assert summary["benchmark"] == f"coco_captions_{control}"
        assert summary["grounding"]["difference"]["value"] > 0
        assert "of the score need the picture" in summary["grounding"]["sentence"]


def test_an_unreadable_picture_is_named_or_counted(tmp_path: Path, painter: Painter) -> None:
    words = flags(tmp_path, "coco_captions")
    (tmp_path / "data" / "coco_captions" / "images" / "000000000002.jpg").write_text("I am text")
    with pytest.raises(ImageError, match="image 52 of"):
        eval_captions.main(words)
    summary = summary_of(eval_captions.main([*words, "--on_bad_sample", "skip"]))
    assert (summary["n"], summary["missing"], list(summary["missing_questions"])) == (3, 1, ["52"])


def test_a_test_split_without_captions_gives_the_upload_alone(tmp_path: Path, painter: Painter) -> None:
    words = flags(tmp_path, "nocaps")
    path = Path(words[words.index("--annotations") + 1])
    save(path, {**json.loads(path.read_text()), "annotations": []})
    with pytest.raises(DataError, match=r"4 of 4 images have no caption.*--unlabelled"):
        eval_captions.main(words)
    eval_captions.main([*words, "--unlabelled"])
    assert len(json.loads((tmp_path / "out" / "submission.json").read_text())) == 4
    assert not (tmp_path / "out" / "summary.json").exists()


def test_each_kind_of_benchmark_names_the_others_command(tmp_path: Path, painter: Painter) -> None:
    with pytest.raises(ConfigError, match="mmkit eval vqa --benchmark gqa"):
        eval_captions.main(["--model", "m", "--benchmark", "gqa", "--annotations", "a", "--images", "i", "--out", "o"])
    words = ["--model", "m", "--benchmark", "nocaps", "--questions", "a", "--images", str(tmp_path), "--out", "o"]
    with pytest.raises(ConfigError, match="mmkit eval captions --benchmark nocaps"):
        eval_vqa.main(words)
    with pytest.raises(ConfigError, match="spice"):
        eval_captions.main(flags(tmp_path, "nocaps", "out", "--java_metrics", "[spicy]"))


def golden_files(tmp_path: Path) -> tuple[Path, Path]:
    images = GOLDEN["cases"][0]["images"]
    notes = [{"id": 0, "image_id": image["id"], "caption": text} for image in images for text in image["references"]]
    captions = save(tmp_path / "c.json", {"images": [{"id": i["id"], "file_name": f"{i['id']}.jpg"} for i in images], "annotations": notes})
    answers = save(
        tmp_path / "r.json", [{"image_id": image["id"], "caption": image["candidate"]} for image in images]
    )  # COCO's result file
    return captions, answers


@pytest.mark.parametrize(
    "tokeniser", ["ptb_python", pytest.param("ptb_java", marks=pytest.mark.skipif(not java_works(), reason="no Java"))]
)
def test_captions_of_any_other_model_score_as_the_official_code_scores_them(tmp_path: Path, tokeniser: str) -> None:
    captions, answers = golden_files(tmp_path)
    words = ["score", "coco_captions", "--answers", str(answers), "--annotations", str(captions), "--out", str(tmp_path / "out")]
    assert cli.main([*words, "--tokeniser", tokeniser, "--java_metrics", "[none]" if tokeniser == "ptb_python" else "[meteor]"]) == 0
    expected = GOLDEN["cases"][0]["expected"]["corpus"]
    official = summary_of(tmp_path / "out")["official"]
    for name, value in official.items():
        assert value == pytest.approx(expected[name.removesuffix("_ptb_python")], abs=1e-6), name
    assert len(official) == (7 if tokeniser == "ptb_java" else 6)


def test_a_missing_caption_is_said_and_not_counted(tmp_path: Path) -> None:
    captions, answers = golden_files(tmp_path)
    save(answers, json.loads(answers.read_text())[1:])
    words = [
        "coco_captions",
        "--answers",
        str(answers),
        "--annotations",
        str(captions),
        "--tokeniser",
        "ptb_python",
        "--out",
        str(tmp_path / "out"),
    ]
    with pytest.raises(DataError, match="1 of 20 questions have no answer: 100"):
        score.main(words)
    with pytest.raises(ConfigError, match="changes CIDEr's weights"):
        score.main([*words, "--missing", "wrong"])
    summary = summary_of(score.main([*words, "--missing", "leave_out", "--java_metrics", "[none]"]))
    assert (summary["n"], summary["missing"]) == (19, 1)
