"""What a head is worth: right answers score 100 through all the mapping, wrong ones nothing; the evaluation resumes and refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from visft_tiny import HEADS, head_flags, rows, write_world

from encoders import eval_heads
from encoders.catalog import load_encoder
from encoders.coco_data import CocoTask
from encoders.coco_files import CocoSet, read_coco
from encoders.head_scores import predict_rows, score_rows, score_with_intervals
from encoders.heads.registry import HEADS as KINDS
from encoders.heads.registry import build_head, save_head
from encoders.train_visft import main as train
from encoders.visft_features import FeatureMaps, TaskData
from encoders.vocabulary import Vocabulary
from mmkit.errors import ConfigError, DataError
from mmkit.records import read_jsonl


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("heads")
    write_world(folder)
    # one picture is made wide, so that a canvas holds padding and pixels are scaled
    from PIL import Image

    name = folder / "held_out" / "0.png"
    Image.open(name).resize((80, 40), Image.Resampling.NEAREST).save(name)
    file = folder / "held_out_instances.json"
    content = json.loads(file.read_text())
    content["images"][0]["width"] = 80
    for item in content["annotations"]:
        if item["image_id"] == 0:
            left, top, width, height = item["bbox"]
            item["bbox"] = [2 * left, top, 2 * width, height]
            item["area"] = 2 * width * height
            item["segmentation"] = [[2 * x if place % 2 == 0 else x for place, x in enumerate(item["segmentation"][0])]]
    file.write_text(json.dumps(content))
    captions = json.loads((folder / "held_out_captions.json").read_text())
    captions["images"][0]["width"] = 80
    (folder / "held_out_captions.json").write_text(json.dumps(captions))
    return folder


def read(world: Path, task: str) -> CocoSet:
    kind = "captions" if task == "caption" else "instances"
    return read_coco(world / "held_out", **{kind: world / f"held_out_{kind}.json"})


def made(world: Path, task: str, coco: CocoSet) -> Any:
    if task == "caption":
        needed: dict[str, Any] = {"words": list(Vocabulary.build(coco.captions(), 1).words)}
    else:
        assert coco.classes is not None
        needed = {"classes": coco.classes.to_dict()}
    torch.manual_seed(0)
    return build_head(task, KINDS[task].config.from_dict({"width": 48, **needed, **HEADS[task]})).eval()


def parts(world: Path, task: str, canvas: int = 64) -> tuple[Any, FeatureMaps, TaskData, CocoSet]:
    coco = read(world, task)
    head = made(world, task, coco)
    maps = FeatureMaps(load_encoder(str(world / "encoder")), pool=4 if task == "caption" else 0)
    words = head.vocabulary if task == "caption" else None
    data = CocoTask(coco, task, canvas=canvas, fill=(0, 0, 0), placer="fit", vocabulary=words, captions_per_image=0)
    return head, maps, TaskData(data, 1), coco


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_objects_told_as_they_are_score_100_and_shifted_ones_less(world: Path, task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head says what its targets hold, in its own coordinates: everything up to COCO's figure is between the two."""
    head, maps, data, coco = parts(world, task)
    shift = 0.0

    def tell(_: Tensor, targets: list[dict[str, Tensor]], **__: Any) -> list[dict[str, Tensor]]:
        found = []
        for target in targets:
            guess = {"labels": target["labels"], "scores": torch.ones(len(target["labels"]))}
            if task == "detection":
                found.append({**guess, "boxes": target["boxes"] + shift})
            else:
                image = next(image for image in coco.images if image.image_id == int(target["image_id"]))
                masks = torch.stack([torch.from_numpy(item.mask()) for item in image.objects]) if image.objects else torch.zeros(0, 4, 4)
                found.append({**guess, "masks": masks.roll(int(shift * 64), 2).bool()})
        return found

    monkeypatch.setattr(head, "predict", tell)
    rows = predict_rows(head, maps, data, range(len(data)), torch.device("cpu"), batch_size=4)
    assert [row["image_id"] for row in rows] == [image.image_id for image in coco.images]
    scores = score_rows(task, rows, coco)
    assert scores["ap"] == scores["ap50"] == 100.0
    assert score_with_intervals(task, rows, coco)["ap"]["ci95"] == [100.0, 100.0]
    shift = 0.15
    moved = score_rows(task, predict_rows(head, maps, data, range(len(data)), torch.device("cpu")), coco)
    assert moved["ap"] < 50


def test_nothing_found_scores_nothing_and_no_image_is_an_error(world: Path) -> None:
    coco = read(world, "detection")
    assert score_rows("detection", [{"image_id": image.image_id, "objects": []} for image in coco.images], coco)["ap"] == 0.0
    with pytest.raises(DataError, match="nothing to score"):
        score_rows("detection", [], coco)


def test_captions_as_people_wrote_them_have_bleu_100_and_more_cider_than_others(world: Path) -> None:
    coco = read(world, "caption")
    right = [{"image_id": image.image_id, "caption": image.captions[0]} for image in coco.images]
    others = [{**row, "caption": right[(place + 1) % len(right)]["caption"]} for place, row in enumerate(right)]
    scores, wrong = score_rows("caption", right, coco), score_rows("caption", others, coco)
    assert scores["bleu1"] == pytest.approx(100.0, abs=1e-3)
    assert scores["cider"] > wrong["cider"]
    low, high = score_with_intervals("caption", right, coco)["bleu1"]["ci95"]
    assert low <= scores["bleu1"] <= high


@pytest.mark.parametrize("task", ["detection", "segmentation", "caption"])
def test_stage_1_writes_down_what_its_head_was_worth_before_and_after(world: Path, tmp_path: Path, task: str) -> None:
    run = train(head_flags(world, task, tmp_path / "run", "--scored_images", "4", steps=3))
    scores = json.loads((run / "scores.json").read_text())
    main = "cider" if task == "caption" else "ap"
    assert scores["task"] == task
    assert {scores[when][main]["n"] for when in ("untrained", "trained")} == {4}
    words = ["--encoder", str(world / "encoder"), "--head", str(run / "head"), "--images", str(world / "held_out")]
    words += [word for name in ("instances", "captions") for word in (f"--{name}", str(world / f"held_out_{name}.json"))]
    whole = eval_heads.main([*words, "--out", str(tmp_path / "whole")])
    assert json.loads((whole / "summary.json").read_text())["n"] == 6
    part = eval_heads.main([*words, "--out", str(tmp_path / "part"), "--limit", "4"])
    assert json.loads((part / "summary.json").read_text())["metrics"][main]["value"] == pytest.approx(scores["trained"][main]["value"])
    lines = (whole / "answers.jsonl").read_text().splitlines(keepends=True)
    (whole / "answers.jsonl").write_text("".join(lines[:2]) + lines[2][: len(lines[2]) // 2])  # killed while it wrote
    before = (whole / "summary.json").read_text()
    again = eval_heads.main([*words, "--out", str(tmp_path / "whole"), "--resume"])
    assert len(read_jsonl(again / "answers.jsonl")) == 6
    assert json.loads((again / "summary.json").read_text())["metrics"] == json.loads(before)["metrics"]


def test_another_encoder_or_a_missing_file_is_refused(world: Path, tmp_path: Path) -> None:
    coco = read(world, "detection")
    save_head(made(world, "detection", coco), tmp_path / "head", encoder="other", encoder_hash="0" * 64, canvas=32)
    words = ["--encoder", str(world / "encoder"), "--head", str(tmp_path / "head"), "--images", str(world / "held_out")]
    with pytest.raises(ConfigError, match="is a detection head: --instances FILE is missing"):
        eval_heads.main([*words, "--out", str(tmp_path / "out")])
    words += ["--instances", str(world / "held_out_instances.json"), "--out", str(tmp_path / "out")]
    with pytest.raises(DataError, match=r"was trained behind other, .* has other weights"):
        eval_heads.main(words)
    assert not (tmp_path / "out").exists()
    eval_heads.main([*words, "--any_encoder", "true"])
    assert rows(tmp_path / "out", "answers.jsonl")[0]["image_id"] == 0
