"""COCO-format data: the target cases of the goldens, what moves with a picture, what is left out and what is refused."""

import itertools
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from encoders.coco_classes import COCO_IDS, Classes
from encoders.coco_data import CocoTask, collate
from encoders.coco_files import CocoImage, CocoObject, CocoSet, read_coco
from encoders.placement import PLACERS, Placement, fit, jitter, multi_scale, short_side_size
from encoders.vocabulary import Vocabulary, words_of
from mmkit.errors import ConfigError, DataError

GOLDEN = Path(__file__).parent / "golden" / "visft"
GREY = (128, 128, 128)
EXACT = {"rtol": 0, "atol": 1e-6}  # the goldens' own tolerance


def write_images(root: Path, rows: list[dict[str, Any]]) -> Path:
    root.mkdir(exist_ok=True)
    for row in rows:
        Image.new("RGB", (row["width"], row["height"]), (40, 80, 120)).save(root / row["file_name"])
    return root


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> tuple[CocoSet, dict[str, Any]]:
    rows = json.loads((GOLDEN / "coco_annotations.json").read_text())["images"]
    root = write_images(tmp_path_factory.mktemp("coco"), rows)
    return read_coco(root, instances=GOLDEN / "coco_annotations.json"), json.loads((GOLDEN / "coco_expected.json").read_text())


def test_golden_targets_are_met(golden: tuple[CocoSet, dict[str, Any]]) -> None:
    coco, expected = golden
    assert coco.classes is not None
    assert coco.classes.ids == COCO_IDS
    assert {str(raw): label for raw, label in coco.classes.label_of().items()} == expected["category_id_to_label"]
    authors = Classes.authors_segmentation(coco.classes.ids, coco.classes.names)
    assert [image.image_id for image in coco.images] == [want["image_id"] for want in expected["targets"]]
    for image, want in zip(coco.images, expected["targets"], strict=True):
        height, width = want["orig_size"]
        assert (image.height, image.width) == (height, width)
        assert [item.annotation_id for item in image.objects] == want["kept_ann_ids"]
        assert [item.label for item in image.objects] == want["labels"]
        assert [coco.classes.ids[item.label] for item in image.objects] == want["category_ids"]
        assert [authors.index[item.label] for item in image.objects] == want["authors_seg_labels"]
        boxes = torch.tensor([item.box for item in image.objects]).reshape(-1, 4)
        torch.testing.assert_close(boxes, torch.tensor(want["boxes_xyxy"]).reshape(-1, 4), **EXACT)
        assert [int(item.mask().sum()) for item in image.objects] == want["mask_pixels"]
        assert [item.area for item in image.objects] == pytest.approx(want["area"], rel=1e-6)
    dropped = sum(len(want["dropped"]) for want in expected["targets"])
    assert dropped == 5
    assert sorted(coco.left_out) == ["box without area inside its image", "crowd"]
    assert coco.left_out["crowd"].startswith("2 x crowd (annotation 40")


def test_golden_flips_crops_and_resizes_are_met(golden: tuple[CocoSet, dict[str, Any]]) -> None:
    coco, expected = golden
    by_id = {image.image_id: image for image in coco.images}
    for case in expected["transforms"]:
        image, (height, width) = by_id[case["image_id"]], case["size_hw"]
        size, window = (image.height, image.width), (0.0, 0.0, float(image.width), float(image.height))
        if case["op"] == "crop":
            left, top = case["params"]["left"], case["params"]["top"]
            window = (left, top, left + case["params"]["width"], top + case["params"]["height"])
        elif case["op"] == "resize":
            assert list(short_side_size(image.width, image.height, case["params"]["short"], case["params"]["max"])) == [height, width]
        place = Placement(size, window, (height, width), max(height, width), mirrored=case["op"] == "hflip")
        boxes = place.boxes(torch.tensor([item.box for item in image.objects]))
        keep = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        centres = torch.cat([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], 1) / torch.tensor([width, height] * 2)
        torch.testing.assert_close(centres[keep].float(), torch.tensor(case["boxes_cxcywh"]), **EXACT)
        assert [item.label for item, kept in zip(image.objects, keep, strict=True) if kept] == case["labels"]
    for case in expected["resize_sizes"]:
        assert list(short_side_size(*case["wh"], case["short"], case["max"])) == case["out_hw"]


def picture_with_objects(seed: int) -> tuple[Image.Image, CocoImage]:
    """A picture whose red channel is one object's mask and whose green one is another's."""
    rng = random.Random(seed)
    height, width = rng.randint(30, 90), rng.randint(30, 90)
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    objects = []
    for channel in (0, 1):
        left, top = rng.randint(0, width - 12), rng.randint(0, height - 12)
        right, bottom = rng.randint(left + 8, width), rng.randint(top + 8, height)
        pixels[top:bottom, left:right, channel] = 255
        polygon = [[left, top, right, top, right, bottom, left, bottom]]
        box = (float(left), float(top), float(right), float(bottom))
        objects.append(CocoObject(channel, channel, box, 1.0, polygon, (height, width)))
    return Image.fromarray(pixels), CocoImage(seed, f"{seed}.png", width, height, tuple(objects))


@pytest.mark.parametrize("name", PLACERS)
def test_masks_and_boxes_move_with_the_pixels(name: str) -> None:
    """The picture itself shows the masks, so it says where they must be. A pixel at an edge may be mixed: half of it decides."""
    for seed in range(12):
        picture, image = picture_with_objects(seed)
        place = PLACERS[name](image.width, image.height, 64, random.Random(seed))
        shown = torch.from_numpy(np.array(place.image(picture, (0, 0, 0))))
        masks = place.masks([item.mask() for item in image.objects])
        boxes = place.boxes(torch.tensor([item.box for item in image.objects]))
        height, width = place.out
        assert not shown[height:].any()
        assert not shown[:, width:].any()
        assert not masks[:, height:].any()
        assert not masks[:, :, width:].any()
        for channel in (0, 1):
            seen, mask = shown[..., channel], masks[channel].bool()
            sure = (seen < 60) | (seen > 195)
            assert ((seen > 127) == mask)[sure].all(), (name, seed)
            if mask.any():
                rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
                tight = torch.tensor([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], dtype=torch.float64)
                # a pixel is in the mask if its centre is: the box lies within half a pixel of the mask's
                assert (boxes[channel] - tight).abs().max() <= 0.5 + 1e-6, (name, seed)


@pytest.mark.parametrize("name", PLACERS)
def test_boxes_come_back_to_the_picture(name: str) -> None:
    for seed in range(8):
        place = PLACERS[name](80, 50, 64, random.Random(seed))
        left, top, right, bottom = place.window
        inside = torch.tensor([[left + 1, top + 1, right - 1, bottom - 1]], dtype=torch.float64)
        if place.mirrored:
            inside = torch.stack([80 - inside[:, 2], inside[:, 1], 80 - inside[:, 0], inside[:, 3]], 1)
        torch.testing.assert_close(place.back(place.boxes(inside)), inside, rtol=0, atol=1e-9)


def test_jitter_makes_small_and_large_and_never_leaves_the_picture() -> None:
    generator = random.Random(0)
    places = [jitter(640, 427, 128, generator) for _ in range(300)]
    scales = [place.scale[1] * 640 / 128 for place in places]
    assert min(scales) < 0.2
    assert max(scales) > 1.8
    assert 0.4 < sum(place.mirrored for place in places) / 300 < 0.6
    for place in [*places, *(multi_scale(640, 427, 128, generator) for _ in range(300))]:
        left, top, right, bottom = place.window
        assert 0 <= left < right <= 640
        assert 0 <= top < bottom <= 427
        assert max(place.out) <= 128
        assert min(place.out) >= 1
        down, across = place.scale
        assert down == pytest.approx(across, rel=0.12)  # whole pixels of a small canvas: the aspect ratio holds but for rounding


def small_set(folder: Path, **changes: Any) -> Path:
    """Three images; 1 has two objects (one as uncompressed run lengths), 2 a crowd, 3 nothing. `changes` replace parts of the content."""
    rows = [{"id": n, "file_name": f"{n}.png", "width": 20, "height": 16} for n in (1, 2, 3)]
    write_images(folder / "images", rows)
    drawn = np.zeros((16, 20), dtype=np.uint8)
    drawn[4:10, 3:9] = 1
    packed = coco_mask.encode(np.asfortranarray(drawn))
    runs, flat = [], drawn.flatten(order="F")
    edges = [0, *(np.flatnonzero(np.diff(flat)) + 1).tolist(), flat.size]
    runs = [b - a for a, b in itertools.pairwise(edges)]
    annotation = {"image_id": 1, "bbox": [3, 4, 6, 6], "area": 36, "iscrowd": 0}
    content: dict[str, Any] = {
        "images": rows,
        "categories": [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}],
        "annotations": [
            {**annotation, "id": 1, "category_id": 7, "segmentation": {"size": [16, 20], "counts": runs}},
            {**annotation, "id": 2, "category_id": 3, "segmentation": {"size": [16, 20], "counts": packed["counts"].decode()}},
            {**annotation, "id": 3, "category_id": 3, "image_id": 2, "iscrowd": 1, "segmentation": {"size": [16, 20], "counts": [320]}},
        ],
    }
    content["annotations"] += changes.pop("more", [])
    path = folder / "instances.json"
    path.write_text(json.dumps({**content, **changes}))
    return path


def read_small(folder: Path, **changes: Any) -> CocoSet:
    file = small_set(folder, **changes)
    return read_coco(folder / "images", instances=file)


def test_both_forms_of_run_lengths_and_gaps_in_the_ids_are_read(tmp_path: Path) -> None:
    coco = read_small(tmp_path)
    assert coco.classes is not None
    first = coco.images[0].objects
    assert [item.label for item in first] == [1, 0]
    assert coco.classes.names == ("dog", "cat")
    assert first[0].mask().sum() == 36
    assert np.array_equal(first[0].mask(), first[1].mask())
    assert len(coco.images) == 3
    assert not coco.images[2].objects
    assert "3 images, 2 objects" in coco.describe()
    assert "crowd" in coco.describe()
    assert len(read_coco(tmp_path / "images", instances=tmp_path / "instances.json", keep_empty=False).images) == 1


BAD = {  # what is wrong: (an annotation, what the message must say)
    "mask of another size": ({"segmentation": {"size": [20, 16], "counts": [320]}}, r"annotation 9 .*its mask is \[20, 16\]"),
    "short run lengths": ({"segmentation": {"size": [16, 20], "counts": [10, 5]}}, "cover 15 of 320"),
    "half a polygon": ({"segmentation": [[1, 2, 3, 4]]}, "three corners"),
    "unknown category": ({"category_id": 99}, "category 99 is not among"),
    "unknown image": ({"image_id": 77}, "annotation 9 .image 77."),
    "no box": ({"bbox": None}, "a bbox of four numbers"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_is_wrong_with_an_annotation_is_named_or_left_out_and_counted(tmp_path: Path, what: str) -> None:
    change, message = BAD[what]
    bad = {"id": 9, "image_id": 1, "category_id": 7, "bbox": [1, 1, 4, 4], "iscrowd": 0, "segmentation": [], **change}
    file = small_set(tmp_path, more=[bad])
    with pytest.raises(DataError, match=message):
        read_coco(tmp_path / "images", instances=file)
    coco = read_coco(tmp_path / "images", instances=file, on_bad="skip")
    assert len(coco.images[0].objects) == 2
    assert len(coco.left_out) == 2


def test_boxes_outside_or_without_area_are_left_out_and_counted(tmp_path: Path) -> None:
    boxes = [[25, 2, 5, 5], [2, 2, 0, 5], [2, 2, 5, 0], [-9, 2, 9, 5], [float("nan"), 2, 5, 5]]
    more = [{"id": 10 + n, "image_id": 3, "category_id": 7, "bbox": box, "iscrowd": 0} for n, box in enumerate(boxes)]
    coco = read_small(tmp_path, more=more)
    assert not coco.images[2].objects
    assert coco.left_out["box without area inside its image"].startswith("5 x ")


def test_missing_images_are_named_or_left_out_and_counted(tmp_path: Path) -> None:
    file = small_set(tmp_path)
    (tmp_path / "images" / "2.png").unlink()
    with pytest.raises(DataError, match=r"'2.png'.*the image is not in"):
        read_coco(tmp_path / "images", instances=file)
    assert [image.image_id for image in read_coco(tmp_path / "images", instances=file, on_bad="skip").images] == [1, 3]
    for path in (tmp_path / "images").iterdir():
        path.unlink()
    with pytest.raises(DataError, match=r"no image is left to train on: .*3 x the image is not in"):
        read_coco(tmp_path / "images", instances=file, on_bad="skip")


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "no valid JSON"),
        ("[]", "holds a list"),
        ('{"images": [], "annotations": []}', "is it a captions file"),
        (None, "no such file"),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "x.json").write_text(content)
    with pytest.raises(DataError, match=message):
        read_coco(tmp_path, instances=tmp_path / "x.json")


def captions_file(folder: Path) -> Path:
    texts = {1: ["A cat sits.", "Two cats!", "..."], 2: ["A dog's bowl"], 3: []}
    rows = [{"id": n, "file_name": f"{n}.png", "width": 20, "height": 16} for n in texts]
    notes = [{"id": 10 * n + i, "image_id": n, "caption": text} for n, each in texts.items() for i, text in enumerate(each)]
    (folder / "captions.json").write_text(json.dumps({"images": rows, "annotations": notes}))
    return folder / "captions.json"


def test_captions_join_instances_and_those_without_words_are_counted(tmp_path: Path) -> None:
    instances = small_set(tmp_path)
    coco = read_coco(tmp_path / "images", instances=instances, captions=captions_file(tmp_path))
    assert coco.images[0].captions == ("A cat sits.", "Two cats!")
    assert len(coco.images[0].objects) == 2
    assert coco.left_out["caption without words"] == "1 x caption without words (caption 12 (image 1))"
    vocabulary = Vocabulary.build(coco.captions(), min_count=1)
    data = CocoTask(coco, "caption", canvas=16, fill=GREY, vocabulary=vocabulary, captions_per_image=0, placer="squash")
    assert len(data) == 2  # image 3 has none
    tokens = data.get(0, 0)["target"]["tokens"]  # type: ignore[index]
    assert [vocabulary.decode(row.tolist()) for row in tokens] == ["a cat sits", "two cats"]
    with pytest.raises(ConfigError, match="vocabulary"):
        CocoTask(coco, "caption", canvas=16, fill=GREY)


def test_a_vocabulary_counts_words_and_gives_rare_ones_one_number() -> None:
    vocabulary = Vocabulary.build(["A dog's bowl, a bowl.", "A café"], min_count=2)
    assert vocabulary.words == ("a", "bowl")
    assert len(vocabulary) == 6
    assert vocabulary.encode("a dog's bowl").tolist() == [vocabulary.start, 1, vocabulary.unknown, 2, vocabulary.end]
    assert words_of("A dog’s CAFÉ no. 5_6!") == ["a", "dog’s", "café", "no", "5", "6"]
    with pytest.raises(DataError, match="no word occurs 9 times"):
        Vocabulary.build(["one two"], min_count=9)
    with pytest.raises(DataError, match="has no word"):
        vocabulary.encode("!?")


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_an_item_is_a_function_of_seed_epoch_and_index(tmp_path: Path, task: Any) -> None:
    coco = read_small(tmp_path)
    make = lambda seed: CocoTask(coco, task, canvas=32, fill=GREY, placer="jitter", seed=seed)  # noqa: E731
    first, again = make(0).get(3, 0), make(0).get(3, 0)
    assert first is not None
    assert again is not None
    assert torch.equal(first["pixels"], again["pixels"])
    assert all(torch.equal(first["target"][k], again["target"][k]) for k in first["target"])
    others = [make(0).get(4, 0), make(1).get(3, 0)]
    assert all(other is not None and not torch.equal(other["target"]["boxes"], first["target"]["boxes"]) for other in others)
    batch = collate([first, *others])  # type: ignore[list-item]
    assert batch["pixels"].shape == (3, 3, 32, 32)
    assert batch["pixels"].dtype == torch.uint8
    assert len(batch["targets"]) == 3


def test_objects_whose_mask_leaves_the_canvas_are_dropped(tmp_path: Path) -> None:
    """A box may reach into the window where the object in it does not: here the object fills one corner of its box."""
    polygon = [[0, 0, 4, 0, 4, 4, 0, 4]]
    image = CocoImage(1, "1.png", 20, 16, (CocoObject(1, 0, (0.0, 0.0, 20.0, 16.0), 1.0, polygon, (16, 20)),))
    coco = CocoSet(tmp_path, (image,), Classes.contiguous([1], ["x"]), {})
    place = Placement((16, 20), (10.0, 8.0, 20.0, 16.0), (16, 16), 16)
    kept = {
        task: CocoTask(coco, task, canvas=16, fill=GREY).target(image, place, 0, 0)["labels"]  # type: ignore[arg-type]
        for task in ("detection", "segmentation")
    }
    assert len(kept["detection"]) == 1
    assert len(kept["segmentation"]) == 0


def test_a_picture_of_another_size_than_its_annotations_is_refused_or_listed(tmp_path: Path) -> None:
    coco = read_small(tmp_path)
    Image.new("RGB", (16, 20)).save(tmp_path / "images" / "1.png")
    (tmp_path / "images" / "2.png").write_bytes(b"no picture")
    strict = CocoTask(coco, "detection", canvas=16, fill=GREY)
    with pytest.raises(DataError, match=r"is 16 x 20 pixels; its annotations .* are for 20 x 16"):
        strict.get(0, 0)
    lenient = CocoTask(coco, "detection", canvas=16, fill=GREY, on_bad_sample="skip", bad_list=tmp_path / "bad.jsonl")
    assert lenient.get(0, 0) is None
    assert lenient.get(0, 1) is None
    assert lenient.get(1, 0) is None
    assert lenient.get(0, 2) is not None
    assert list(lenient.bad_images()) == ["1.png", "2.png"]


def test_the_permuted_control_shows_every_image_anothers_picture(tmp_path: Path) -> None:
    instances = small_set(tmp_path)
    for number, colour in ((1, 50), (2, 100), (3, 150)):
        Image.new("RGB", (20, 16), (colour,) * 3).save(tmp_path / "images" / f"{number}.png")
    coco = read_coco(tmp_path / "images", instances=instances)
    data = CocoTask(coco, "detection", canvas=20, fill=(0, 0, 0), permuted=True, cache=True)
    for _ in range(2):  # the second time from memory
        items = [data.get(0, index) for index in range(3)]
        seen = [int(item["pixels"][0, 0, 0]) for item in items if item is not None]
        assert sorted(seen) == [50, 100, 150]
        assert all(value != own for value, own in zip(seen, (50, 100, 150), strict=True))
        assert [len(item["target"]["labels"]) for item in items if item is not None] == [2, 0, 0]


def test_evaluation_fills_the_canvas_and_says_how_much() -> None:
    place = fit(40, 20, 64)
    assert place.out == (32, 64)
    assert place.picture.tolist() == [0.5, 1.0]
    assert not place.mirrored
