"""ViSFT's panoptic task: the files, the metric by hand and by its own truth, the head, and training to evaluation."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from visft_tiny import HEADS, running, write_world

from encoders import eval_heads
from encoders.catalog import load_encoder
from encoders.coco_data import CocoTask, collate
from encoders.coco_files import CocoSet, read_coco
from encoders.head_scores import predict_rows, score_rows, score_with_intervals
from encoders.heads.panoptic import PanopticConfig
from encoders.heads.registry import build_head
from encoders.panoptic_files import read_panoptic
from encoders.panoptic_quality import Tally, panoptic_quality, tally
from encoders.train_visft import main as train
from encoders.visft_features import FeatureMaps, TaskData
from mmkit.errors import ConfigError, DataError
from mmkit.minidata.formats import panoptic_colours
from mmkit.records import read_jsonl

STUFF = 20  # category id of the background


def write_panoptic(folder: Path, name: str) -> Path:
    """Say of the tiny world's pictures what every pixel is: the boxes are things, the rest is stuff, the last column of pixels void."""
    instances = json.loads((folder / f"{name}_instances.json").read_text())
    out = folder / f"{name}_panoptic"
    out.mkdir()
    annotations = []
    for image in instances["images"]:
        ids, kinds = np.full((image["height"], image["width"]), 1, dtype=np.int64), {1: STUFF}
        for item in instances["annotations"]:
            if item["image_id"] == image["id"]:
                left, top, width, height = (int(edge) for edge in item["bbox"])
                number = 300 + item["id"]  # beyond one byte, so that green counts too
                ids[top : top + height, left : left + width], kinds[number] = number, item["category_id"]
        ids[:, -1] = 0
        Image.fromarray(panoptic_colours(ids)).save(out / f"{image['id']}.png")
        info = [
            {"id": number, "category_id": kinds[number], "iscrowd": 0, "bbox": [0, 0, 1, 1], "area": int((ids == number).sum())}
            for number in kinds
            if (ids == number).any()
        ]
        for segment in info:
            rows, columns = np.nonzero(ids == segment["id"])
            segment["bbox"] = [int(columns.min()), int(rows.min()), int(np.ptp(columns)) + 1, int(np.ptp(rows)) + 1]
        annotations.append({"image_id": image["id"], "file_name": f"{image['id']}.png", "segments_info": info})
    categories = [{**row, "isthing": 1} for row in instances["categories"]] + [{"id": STUFF, "name": "background", "isthing": 0}]
    file = folder / f"{name}_panoptic.json"
    file.write_text(json.dumps({"images": instances["images"], "annotations": annotations, "categories": categories}))
    return file


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_world(tmp_path_factory.mktemp("panoptic"))
    for name in ("train", "held_out"):
        write_panoptic(folder, name)
    return folder


def read(world: Path, name: str = "held_out") -> CocoSet:
    return read_panoptic(world / name, world / f"{name}_panoptic.json")


def made(coco: CocoSet) -> Any:
    assert coco.classes is not None
    torch.manual_seed(0)
    values = {"width": 48, "classes": coco.classes.to_dict(), "things": list(coco.things), **HEADS["segmentation"]}
    return build_head("panoptic", PanopticConfig.from_dict(values)).eval()


# ---- the files ------------------------------------------------------------------------------------------------------------------------------


def test_segments_are_read_as_they_were_written(world: Path) -> None:
    coco, instances = read(world), read_coco(world / "held_out", instances=world / "held_out_instances.json")
    assert coco.classes is not None
    assert (coco.classes.ids, coco.things) == ((1, 7, STUFF), (True, True, False))
    for image, plain in zip(coco.images, instances.images, strict=True):
        masks = [item.mask() for item in image.objects]
        whole = np.sum(masks, axis=0)
        assert whole[:, :-1].min() == whole[:, :-1].max() == 1  # each pixel is of one segment
        assert whole[:, -1].max() == 0  # but the void ones
        assert len(masks) <= len(plain.objects) + 1


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("no png", r"its PNG '0\.png' is not in"),
        ("other size", "segments and image must agree"),
        ("no pixel", "has no pixel of segment 900"),
        ("category", "category 99 is not among"),
        ("void", "id is 0"),
        ("no folder", "needs its segment PNGs"),
        ("no box", "needs an id and a bbox"),
        ("twice", "is there twice"),
        ("annotated twice", "image 0.*annotated twice"),
        ("no segments", "no list segments_info"),
        ("no isthing", "does not say whether it is a thing"),
    ],
)
def test_faulty_sets_are_named(tmp_path: Path, fault: str, said: str) -> None:
    folder = write_world(tmp_path)
    file = write_panoptic(folder, "held_out")
    content = json.loads(file.read_text())
    segment = content["annotations"][0]["segments_info"][0]
    if fault == "no png":
        (folder / "held_out_panoptic/0.png").unlink()
    elif fault == "other size":
        Image.new("RGB", (7, 7)).save(folder / "held_out_panoptic/0.png")
    elif fault == "no box":
        segment.pop("bbox")
    elif fault == "twice":
        content["annotations"][0]["segments_info"].append(segment)
    elif fault == "annotated twice":
        content["annotations"].append(content["annotations"][0])
    elif fault == "no segments":
        content["annotations"][0].pop("segments_info")
    elif fault == "no isthing":
        content["categories"][0].pop("isthing")
    elif fault == "no folder":
        (folder / "held_out_panoptic").rename(folder / "elsewhere")
    else:
        segment |= {"no pixel": {"id": 900}, "category": {"category_id": 99}, "void": {"id": 0}}[fault]
    file.write_text(json.dumps(content))
    with pytest.raises(DataError, match=said):
        read_panoptic(folder / "held_out", file).images[0].objects[0].mask()


# ---- the metric -----------------------------------------------------------------------------------------------------------------------------


def strip(*widths: tuple[int, int]) -> np.ndarray:
    """A picture of one row: (id, pixels) from the left."""
    return np.concatenate([np.full(pixels, number) for number, pixels in widths])[None]


def test_panoptic_quality_by_hand() -> None:
    """A thing of 10 pixels found with 8 of them, its other two given to the stuff beside it."""
    truth, found = strip((1, 10), (2, 10)), strip((5, 8), (6, 12))
    counts = tally(truth, {1: 7, 2: 20}, {}, found, {5: 7, 6: 20})
    assert counts == {7: Tally(8 / 10, 1, 0, 0), 20: Tally(10 / 12, 1, 0, 0)}
    scores = panoptic_quality([counts], {7: True, 20: False})
    assert scores["pq"] == pytest.approx(100 * (0.8 + 10 / 12) / 2, abs=1e-3)
    assert (scores["rq"], scores["pq_things"]) == (100, 80)


def test_half_of_the_union_is_no_match_and_another_category_is_none() -> None:
    truth = strip((1, 10), (2, 10))
    assert tally(truth, {1: 7, 2: 20}, {}, strip((5, 5), (6, 15)), {5: 7, 6: 20})[7] == Tally(0.0, 0, 1, 1)  # 5 of 10 is not more than half
    counts = tally(truth, {1: 7, 2: 20}, {}, strip((5, 10), (6, 10)), {5: 8, 6: 20})
    assert (counts[7].missed, counts[8].wrong) == (1, 1)
    assert panoptic_quality([counts], {7: True, 8: True, 20: False}) == {
        "pq": pytest.approx(100 / 3, abs=1e-3), "sq": pytest.approx(100 / 3, abs=1e-3), "rq": pytest.approx(100 / 3, abs=1e-3),
        "pq_things": 0.0, "pq_stuff": 100.0,
    }  # fmt: skip


def test_void_and_crowds_make_nothing_wrong() -> None:
    truth = strip((0, 6), (1, 10), (9, 8))  # void, a thing, a crowd of things
    kinds, crowds = {1: 7}, {9: 7}
    assert tally(truth, kinds, crowds, strip((5, 6), (6, 10), (0, 8)), {5: 7, 6: 7})[7] == Tally(1.0, 1, 0, 0)  # all on void
    assert tally(truth, kinds, crowds, strip((0, 6), (6, 10), (5, 8)), {5: 7, 6: 7})[7] == Tally(1.0, 1, 0, 0)  # all on the crowd
    assert tally(truth, kinds, crowds, strip((0, 6), (6, 10), (5, 8)), {5: 8, 6: 7})[8] == Tally(0.0, 0, 1, 0)  # a crowd of others
    # what reaches into the void is measured without it
    assert tally(truth, kinds, crowds, strip((6, 16), (0, 8)), {6: 7})[7] == Tally(1.0, 1, 0, 0)


# ---- the head -------------------------------------------------------------------------------------------------------------------------------


def test_the_truth_scores_100_through_all_the_mapping(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    coco = read(world)
    head = made(coco)
    data = TaskData(CocoTask(coco, "panoptic", canvas=64, fill=(0, 0, 0)), 1)
    maps = FeatureMaps(load_encoder(str(world / "encoder")))

    def told(feature_map: Any, targets: Any = None, **_: Any) -> list[dict[str, Any]]:
        by_id = {image.image_id: image for image in coco.images}
        found = []
        for target in targets:
            objects = by_id[int(target["image_id"])].objects
            masks = torch.stack([torch.from_numpy(item.mask()).bool() for item in objects])
            found.append({"labels": torch.tensor([item.label for item in objects]), "scores": torch.ones(len(objects)), "masks": masks})
        return found

    monkeypatch.setattr(head, "predict", told)
    rows = predict_rows(head, maps, data, range(len(data)), torch.device("cpu"))
    scores = score_rows("panoptic", rows, coco)
    assert scores == {"pq": 100.0, "sq": 100.0, "rq": 100.0, "pq_things": 100.0, "pq_stuff": 100.0}
    for row in rows:
        row["objects"] = row["objects"][:1]
    assert score_rows("panoptic", rows, coco)["rq"] < 100
    assert score_with_intervals("panoptic", rows, coco)["pq"]["n"] == len(rows)


def test_a_segment_that_the_json_does_not_list_is_named(tmp_path: Path) -> None:
    folder = write_world(tmp_path)
    file = write_panoptic(folder, "held_out")
    content = json.loads(file.read_text())
    gone = content["annotations"][0]["segments_info"].pop()
    file.write_text(json.dumps(content))
    coco = read_panoptic(folder / "held_out", file)
    with pytest.raises(DataError, match=f"pixels of segment {gone['id']}"):
        score_rows("panoptic", [{"image_id": 0, "objects": []}], coco)


def test_segments_share_no_pixel_and_stuff_is_one(world: Path) -> None:
    head = made(read(world))
    classes = torch.full((4, 4), -9.0)
    for query, label in enumerate((0, 2, 2, 1)):  # thing, stuff, stuff, an unsure thing
        classes[query, label] = 9.0 if query < 3 else -9.0
    masks = torch.zeros(4, 4, 6)
    masks[0, :, :2], masks[1, :, 2:4], masks[2, :, 4:], masks[3, :, :] = 0.9, 0.9, 0.9, 0.95
    found = head._segments(classes, masks, {})
    assert found["labels"].tolist() == [0, 2]
    assert found["masks"].sum(dim=0).max() == 1
    assert found["masks"].flatten(1).sum(1).tolist() == [8, 16]
    covered = masks.clone()
    covered[0, :, :] = 0.99  # the thing takes everything: what is left of the stuff is too little
    assert head._segments(classes, covered, {})["labels"].tolist() == [0]
    assert head._segments(torch.full((4, 4), -9.0) + torch.eye(4)[3] * 18, masks, {})["labels"].tolist() == []


def test_a_batch_is_its_pictures_and_the_loss_falls(world: Path) -> None:
    coco = read(world)
    head = made(coco)
    data = CocoTask(coco, "panoptic", canvas=32, fill=(0, 0, 0))
    items = [data.get(0, index) for index in range(3)]
    batch = collate([item for item in items if item is not None])
    assert all(int(target["masks"].sum(0).max()) == 1 for target in batch["targets"])
    with torch.no_grad():
        maps = FeatureMaps(load_encoder(str(world / "encoder")))(batch["pixels"])
    together, alone = (
        head.predict(maps, batch["targets"]),
        [head.predict(maps[i : i + 1], batch["targets"][i : i + 1])[0] for i in range(3)],
    )
    for one, other in zip(together, alone, strict=True):
        assert torch.equal(one["masks"], other["masks"])
    head.train()
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss, _ = head(maps, batch["targets"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


def test_things_must_be_said_of_every_category(world: Path) -> None:
    coco = read(world)
    assert coco.classes is not None
    with pytest.raises(ConfigError, match="things says of 1"):
        PanopticConfig(width=48, classes=coco.classes, things=(True,))


# ---- training to evaluation -------------------------------------------------------------------------------------------------------------------


def test_a_panoptic_head_is_trained_scored_and_stands_over_lora(world: Path, tmp_path: Path) -> None:
    files = []
    for prefix, name in (("", "train"), ("held_out_", "held_out")):
        files += [f"--data.{prefix}images", str(world / name), f"--data.{prefix}panoptic", str(world / f"{name}_panoptic.json")]
    sizes = [word for key, value in HEADS["segmentation"].items() for word in (f"--head.{key}", str(value))]
    flags = [*files, "--encoder", str(world / "encoder"), "--data.min_count", "1"]
    run = train(["--stage", "heads", "--task", "panoptic", *sizes, *flags, *running(tmp_path / "heads", 4)])
    assert set(json.loads((run / "scores.json").read_text())) >= {"untrained", "trained"}
    out = eval_heads.main(
        ["--encoder", str(world / "encoder"), "--head", str(run / "head"), "--images", str(world / "held_out"),
         "--panoptic", str(world / "held_out_panoptic.json"), "--out", str(tmp_path / "eval")]
    )  # fmt: skip
    summary = json.loads((out / "summary.json").read_text())
    assert {"pq", "sq", "rq"} <= set(summary["metrics"])
    lora = train(["--stage", "lora", "--heads", str(run / "head"), "--lora.rank", "2", *flags, *running(tmp_path / "lora", 2)])
    assert (lora / "encoder/config.json").is_file()
    assert all(np.isfinite(row["loss"]) for row in read_jsonl(lora / "metrics.jsonl") if "loss" in row)
    both = [
        *files,
        "--data.instances",
        str(world / "train_instances.json"),
        "--data.held_out_instances",
        str(world / "held_out_instances.json"),
    ]
    shape = [word for key, value in HEADS["detection"].items() for word in (f"--head.{key}", str(value))]
    boxes = train(
        ["--stage", "heads", "--task", "detection", *shape, *both, "--encoder", str(world / "encoder"), *running(tmp_path / "boxes", 2)]
    )
    heads = f"{boxes / 'head'},{run / 'head'}"
    beside = train(
        ["--stage", "lora", "--heads", heads, "--lora.rank", "2", *both, "--encoder", str(world / "encoder"), *running(tmp_path / "b", 3)]
    )
    assert (beside / "encoder/config.json").is_file()
