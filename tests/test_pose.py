"""ViSFT's pose task: keypoints through placing, mirroring and back, the head's bells and peaks, and training to evaluation."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from visft_tiny import HEADS, running, write_world

from encoders import eval_heads
from encoders.catalog import load_encoder
from encoders.coco_data import CocoTask, collate
from encoders.coco_files import CocoSet, read_coco
from encoders.head_scores import predict_rows, score_rows
from encoders.heads.pose import PoseConfig, PoseHead, peaks
from encoders.joints import COCO_SIGMAS, Joints, joints_of
from encoders.placement import Placement
from encoders.train_visft import main as train
from encoders.visft_features import FeatureMaps, TaskData
from mmkit.errors import ConfigError, DataError

JOINTS = ["top_left", "top_right", "middle"]


def write_keypoints(folder: Path, name: str) -> Path:
    """Corners and middle of the tiny world's boxes; the middle of every second one is not seen."""
    content = json.loads((folder / f"{name}_instances.json").read_text())
    for number, row in enumerate(content["annotations"]):
        left, top, width, height = row["bbox"]
        row["keypoints"] = [left, top, 2, left + width, top, 2, left + width / 2, top + height / 2, 2 * (number % 2)]
    content["categories"] = [{**row, "keypoints": JOINTS, "sigmas": [0.08] * 3} for row in content["categories"]]
    file = folder / f"{name}_keypoints.json"
    file.write_text(json.dumps(content))
    return file


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_world(tmp_path_factory.mktemp("pose"))
    for name in ("train", "held_out"):
        write_keypoints(folder, name)
    return folder


def read(world: Path, name: str = "held_out") -> CocoSet:
    return read_coco(world / name, instances=world / f"{name}_keypoints.json")


def made(coco: CocoSet, **more: Any) -> PoseHead:
    assert coco.classes is not None
    torch.manual_seed(0)
    return PoseHead(PoseConfig(48, coco.classes, tuple(JOINTS), crop_height=4, crop_width=4, **more)).eval()


# ---- keypoints ------------------------------------------------------------------------------------------------------------------------------


def test_left_and_right_change_places_in_a_mirror(world: Path) -> None:
    assert Joints(("nose", "left_eye", "right_eye"), (0.1,) * 3).mirrored == [0, 2, 1]
    coco = read(world)
    data = CocoTask(coco, "pose", canvas=80, fill=(0, 0, 0))
    image = data.images[0]
    size = (image.height, image.width)
    plain = Placement(size, (0.0, 0.0, 40.0, 40.0), (80, 80), 80)
    mirrored = Placement(size, (0.0, 0.0, 40.0, 40.0), (80, 80), 80, True)
    one, other = data.target(image, plain, 0, 0)["keypoints"], data.target(image, mirrored, 0, 0)["keypoints"]
    assert torch.allclose(other[:, 0, 0], 1 - one[:, 1, 0])  # what was right is left, mirrored
    assert torch.allclose(other[:, :, 1], one[:, [1, 0, 2], 1])
    assert (other[:, 0, 0] < other[:, 1, 0]).all()  # the left one is still on the left


def test_jittered_keypoints_lie_on_their_boxes(world: Path) -> None:
    data = CocoTask(read(world), "pose", canvas=64, fill=(0, 0, 0), placer="jitter", jitter_scale=(1.0, 1.0), seed=3)
    for index in range(len(data)):
        item = data.get(random.Random(1).randrange(9), index)
        assert item is not None
        boxes, points = item["target"]["boxes"], item["target"]["keypoints"]
        corners = torch.cat([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], dim=1)
        assert torch.allclose(points[:, 0, :2], corners[:, :2], atol=1e-5)
        assert torch.allclose(points[:, 1, :2], corners[:, [2, 1]], atol=1e-5)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda content: content["annotations"][0].update(keypoints=[1, 2, 2]),
            "keypoints are 3 numbers, and its category has 3 keypoints",
        ),
        (lambda content: content["annotations"][0]["keypoints"].__setitem__(0, float("nan")), "no numbers"),
        (lambda content: content["annotations"][0]["keypoints"].__setitem__(2, 7), "visibility"),
        (lambda content: content["categories"][0].update(sigmas=[0, 0.1, 0.1]), "above 0"),
        (lambda content: content["categories"][1].update(keypoints=["a", "b", "c"]), "have other keypoints"),
        (lambda content: [row.pop("sigmas") for row in content["categories"]], "3 keypoints and 0 sigmas"),
    ],
)
def test_faulty_keypoints_are_named(world: Path, tmp_path: Path, change: Any, said: str) -> None:
    content = json.loads((world / "held_out_keypoints.json").read_text())
    change(content)
    file = tmp_path / "keypoints.json"
    file.write_text(json.dumps(content))
    with pytest.raises(DataError, match=said):
        read_coco(world / "held_out", instances=file)


def test_a_set_without_keypoints_is_refused(world: Path) -> None:
    with pytest.raises(ConfigError, match="names keypoints"):
        CocoTask(read_coco(world / "held_out", instances=world / "held_out_instances.json"), "pose", canvas=32, fill=(0, 0, 0))
    row = {"id": 1, "name": "person", "keypoints": [str(n) for n in range(17)]}
    found = joints_of({"categories": [row]}, "file")
    assert found is not None
    assert found.sigmas == COCO_SIGMAS


# ---- the head -------------------------------------------------------------------------------------------------------------------------------


def test_a_bell_is_found_where_it_was_put(world: Path) -> None:
    """From canvas to heatmap and back: within a quarter of a heatmap's pixel, and what lies outside of the crop does not count."""
    head = made(read(world), spread=1.5)
    boxes = torch.tensor([[0.5, 0.4, 0.3, 0.2], [0.7, 0.7, 0.1, 0.4]])
    keypoints = torch.tensor(
        [[[0.45, 0.38, 2.0], [0.6, 0.45, 2.0], [5.0, 0.5, 2.0]], [[0.7, 0.6, 2.0], [0.72, 0.8, 0.0], [0.68, 0.88, 1.0]]]
    )
    wanted, weights = head.places({"boxes": boxes, "keypoints": keypoints})
    bells = head.bells(wanted)
    assert weights.tolist() == [[1, 1, 0], [1, 0, 1]]
    places, height = peaks(bells)
    crops = head.crops(boxes)
    found = (places + 0.5) / 16 * crops[:, None, 2:] + crops[:, None, :2]
    pixel = crops[:, None, 2:] / 16
    counted = weights.bool()
    assert ((found - keypoints[..., :2]).abs() / pixel)[counted].max() <= 0.26
    assert height[counted].min() > 0.9


def test_an_object_does_not_depend_on_its_batch_and_the_loss_falls(world: Path) -> None:
    coco = read(world)
    head = made(coco)
    data = CocoTask(coco, "pose", canvas=32, fill=(0, 0, 0))
    batch = collate([item for index in range(3) if (item := data.get(0, index)) is not None])
    with torch.no_grad():
        maps = FeatureMaps(load_encoder(str(world / "encoder")))(batch["pixels"])
    head.train()
    assert not head.decoder.batchnorm1.training
    together = head.predict(maps, batch["targets"])
    for place, one in enumerate(together):
        alone = head.predict(maps[place : place + 1], batch["targets"][place : place + 1])[0]
        assert torch.allclose(one["keypoints"], alone["keypoints"], atol=1e-5)
    halves = [head(maps[part], batch["targets"][part], head.counts(batch["targets"]))[0] for part in (slice(0, 1), slice(1, 3))]
    assert torch.allclose(sum(halves), head(maps, batch["targets"])[0], atol=1e-6)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        loss, _ = head(maps, batch["targets"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.3 * losses[0]
    with pytest.raises(ValueError, match="boxes"):
        head.predict(maps)


def test_the_truth_scores_100_and_a_shift_less(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    coco = read(world)
    head = made(coco)
    data = TaskData(CocoTask(coco, "pose", canvas=64, fill=(0, 0, 0)), 1)
    maps, shift = FeatureMaps(load_encoder(str(world / "encoder"))), 0.0

    def told(feature_map: Any, targets: Any = None, **_: Any) -> list[dict[str, Any]]:
        moved = torch.tensor([shift, 0.0, 0.0])
        return [{"labels": t["labels"], "scores": torch.ones(len(t["labels"])), "keypoints": t["keypoints"] + moved} for t in targets]

    monkeypatch.setattr(head, "predict", told)
    rows = predict_rows(head, maps, data, range(len(data)), torch.device("cpu"))
    assert score_rows("pose", rows, coco)["ap"] == 100
    shift = 0.1
    assert score_rows("pose", predict_rows(head, maps, data, range(len(data)), torch.device("cpu")), coco)["ap"] < 60


# ---- training to evaluation -------------------------------------------------------------------------------------------------------------------


def test_a_pose_head_is_trained_scored_and_stands_beside_another_under_lora(world: Path, tmp_path: Path) -> None:
    files = []
    for prefix, name in (("", "train"), ("held_out_", "held_out")):
        files += [f"--data.{prefix}images", str(world / name), f"--data.{prefix}keypoints", str(world / f"{name}_keypoints.json")]
        files += [f"--data.{prefix}instances", str(world / f"{name}_instances.json")]
    own = [*files, "--encoder", str(world / "encoder")]
    sizes = ["--head.crop_height", "4", "--head.crop_width", "4"]
    run = train(["--stage", "heads", "--task", "pose", *sizes, *own, *running(tmp_path / "pose", 4)])
    assert set(json.loads((run / "scores.json").read_text())) >= {"untrained", "trained"}
    out = eval_heads.main(
        ["--encoder", str(world / "encoder"), "--head", str(run / "head"), "--images", str(world / "held_out"),
         "--keypoints", str(world / "held_out_keypoints.json"), "--out", str(tmp_path / "eval")]
    )  # fmt: skip
    assert "ap50" in json.loads((out / "summary.json").read_text())["metrics"]
    shape = [word for key, value in HEADS["detection"].items() for word in (f"--head.{key}", str(value))]
    boxes = train(["--stage", "heads", "--task", "detection", *shape, *own, *running(tmp_path / "boxes", 2)])
    lora = train(
        ["--stage", "lora", "--heads", f"{boxes / 'head'},{run / 'head'}", "--lora.rank", "2", *own, *running(tmp_path / "lora", 3)]
    )
    assert (lora / "encoder/config.json").is_file()
