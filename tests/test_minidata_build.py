"""The data set on disk: the same bytes twice, real formats, splits apart, answers that hold."""

import errno
import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFont
from pycocotools.coco import COCO

from mmkit.errors import ConfigError, DataError
from mmkit.minidata import names
from mmkit.minidata.build import main
from mmkit.minidata.masks import segmentation_of
from mmkit.minidata.world import COLOURS, WORDS

SPLITS = ("train", "val", "test", "unseen")
ROOT = Path(__file__).parents[1]
FEW = ("--drawings", "60")  # all 574 only add files of the same kind


def build_apart(out: Path, cache: Path, hash_seed: str) -> None:
    """Build in a fresh process: another hash seed, another cache."""
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "MMKIT_CACHE": str(cache)}
    command = [sys.executable, "-m", "mmkit.minidata.build", "--out", str(out), "--scale", "0.05", *FEW]
    subprocess.run(command, check=True, cwd=ROOT, env=environment, capture_output=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("minidata")
    build_apart(folder / "data", folder / "cache", "1")
    return folder / "data"


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def every_file(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def test_two_builds_give_the_same_bytes(data: Path, tmp_path: Path) -> None:
    build_apart(tmp_path / "again", tmp_path / "another-cache", "2")
    assert every_file(tmp_path / "again") == every_file(data)


def test_another_seed_gives_other_scenes(data: Path, tmp_path: Path) -> None:
    other = main(["--out", str(tmp_path / "other"), "--seed", "1", "--scale", "0.002", *FEW])
    assert (other / "images/train/000000.png").read_bytes() != (data / "images/train/000000.png").read_bytes()


def test_a_larger_build_begins_with_the_smaller_ones_scenes(data: Path, tmp_path: Path) -> None:
    small = main(["--out", str(tmp_path / "small"), "--scale", "0.002", *FEW])
    assert (small / "images/train/000011.png").read_bytes() == (data / "images/train/000011.png").read_bytes()


def test_scenes_can_be_kept_to_fewer_drawings_than_the_folders(tmp_path: Path) -> None:
    few = main(["--out", str(tmp_path / "few"), "--scale", "0.01", *FEW, "--scene_drawings", "12"])
    coco = read(few / "coco/instances_train.json")
    used = {row["category_id"] for row in coco["annotations"]}
    allowed = {row["id"] for row in coco["categories"] if row["name"] in names.object_names("trained")}
    assert len(used) <= 12
    assert used <= allowed
    assert len(list((few / "classification/train").iterdir())) == 60


def test_coco_masks_boxes_and_areas_agree_with_pycocotools(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    forms: Counter[type] = Counter()
    for split in SPLITS:
        coco = COCO(str(data / f"coco/instances_{split}.json"))
        for annotation in coco.dataset["annotations"]:
            mask = coco.annToMask(annotation).astype(bool)
            rows, columns = np.nonzero(mask)
            assert annotation["area"] == mask.sum()
            assert annotation["bbox"] == [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
            forms[type(annotation["segmentation"])] += 1
    assert forms[list] > 50  # polygons
    assert forms[dict] > 20  # run lengths


def test_any_mask_survives_the_way_to_coco_and_back() -> None:
    rng = np.random.default_rng(0)
    holder = COCO()
    for trial in range(60):
        mask = rng.random((13, 17)) < (0.1, 0.5, 0.9)[trial % 3]
        holder.imgs = {1: {"height": 13, "width": 17}}
        assert np.array_equal(holder.annToMask({"image_id": 1, "segmentation": segmentation_of(mask)}).astype(bool), mask)


def test_outside_the_masks_there_is_only_background_in_the_colour_the_questions_name(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Colour answers, read off the pixels: the tones far from objects, nearest named colour."""
    coco = COCO(str(data / "coco/instances_test.json"))
    for question, answer in answered(data, "test"):
        if answer["question_type"] != "colour":
            continue
        pixels = np.array(Image.open(data / "images" / question["image"]))
        free = np.ones(pixels.shape[:2], dtype=bool)
        for annotation in coco.imgToAnns[question["image_id"]]:
            free &= ~coco.annToMask(annotation).astype(bool)
        tones, counts = np.unique(pixels[free].reshape(-1, 3), axis=0, return_counts=True)
        tone = tones[counts.argmax()].astype(int)
        # Two-tone backgrounds have a darker shade, 0.88 of the lighter one: both readings are tried.
        nearest = min(COLOURS, key=lambda name: min(np.abs(tone - np.array(COLOURS[name]) * shade).sum() for shade in (1, 0.88)))
        assert nearest == answer["multiple_choice_answer"]


def answered(data: Path, split: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    questions = read(data / f"vqa/questions_{split}.json")["questions"]
    annotations = {row["question_id"]: row for row in read(data / f"vqa/annotations_{split}.json")["annotations"]}
    assert len(annotations) == len(questions) == len({row["question_id"] for row in questions})
    return [(question, annotations[question["question_id"]]) for question in questions]


def test_vqa_answers_hold_in_the_coco_file(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The questions file and the instances file are written apart; each must bear the other out."""
    checked: Counter[str] = Counter()
    for split in SPLITS:
        coco = COCO(str(data / f"coco/instances_{split}.json"))
        for question, annotation in answered(data, split):
            there = coco.imgToAnns[question["image_id"]]
            labels = [coco.cats[row["category_id"]]["name"] for row in there]
            masks = [np.argwhere(coco.annToMask(row)).mean(0) for row in there]
            middle = dict(zip(labels, masks, strict=True))
            checked[check_answer(question["question"], annotation["multiple_choice_answer"], labels, middle)] += 1
    assert set(checked) == {"count", "presence", "relation", "where", "object", "other"}


def check_answer(text: str, answer: str, labels: list[str], middle: dict[str, np.ndarray]) -> str:
    axes = {"left of": (1, -1), "right of": (1, 1), "above": (0, -1), "below": (0, 1)}
    if match := re.match(r"how many (.+) (?:are there|can you see)\?", text):
        assert int(answer) == sum(match[1] in ("objects", names.plural(label)) for label in labels)
        return "count"
    if match := re.match(r"(?:is there|are there|can you see|do you see) (?:an?|some) (.+?)(?: in the picture)?\?", text):
        assert (answer == "yes") == (match[1] in labels)
        return "presence"
    if match := re.match(r"(?:is|are) the (.+) (left of|right of|above|below) the (.+)\?", text):
        axis, sign = axes[match[2]]
        gap = middle[match[1]] - middle[match[3]]
        assert (answer == "yes") == (sign * gap[axis] > 0 and abs(gap[axis]) > abs(gap[1 - axis]))
        return "relation"
    if match := re.match(r"where (?:is|are) the (.+), relative to the (.+)\?", text):
        axis, sign = axes.get(answer) or axes[f"{answer} of"]
        gap = middle[match[1]] - middle[match[2]]
        assert sign * gap[axis] > abs(gap[1 - axis])
        return "where"
    if "background" in text or "text" in text or "word" in text:
        return "other"
    assert answer in labels
    return "object"


def test_written_words_are_the_ones_listed(data: Path) -> None:
    """Read each picture by comparing its ink with every word set in every size."""
    rows = [json.loads(line) for line in (data / "words/test.jsonl").read_text().splitlines()]
    for row in rows[:15]:
        pixels = np.array(Image.open(data / "words" / row["image"])).astype(int)
        assert read_word(pixels) == row["word"]


def read_word(pixels: np.ndarray) -> str:
    tones, counts = np.unique(pixels.reshape(-1, 3), axis=0, return_counts=True)
    common = tones[np.argsort(-counts)]
    ground = [tone for tone in common[:2] if np.abs(tone - common[0]).max() < 40]  # the two shades of a background lie nearer than ink
    distance = np.min([np.abs(pixels - tone).sum(2) for tone in ground], axis=0)
    found = cut_to_ink(distance / distance.max())
    best = (np.inf, "")
    for word, letters in every_word_in_every_size():
        if np.abs(np.subtract(letters.shape, found.shape)).max() <= 1:
            height, width = np.minimum(letters.shape, found.shape)
            best = min(best, (float(np.abs(letters[:height, :width] - found[:height, :width]).mean()), word))
    return best[1]


@cache
def every_word_in_every_size() -> list[tuple[str, np.ndarray]]:
    masks = [(word, ImageFont.load_default(size).getmask(word)) for size in range(20, 36) for word in WORDS]
    return [(word, cut_to_ink(np.frombuffer(bytes(mask), np.uint8).reshape(mask.size[::-1]) / 255)) for word, mask in masks]


def cut_to_ink(alpha: np.ndarray) -> np.ndarray:
    rows, columns = np.nonzero(alpha > 0.25)
    return alpha[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]


def test_splits_share_no_picture_and_train_knows_no_unseen_drawing(data: Path) -> None:
    owner: dict[str, str] = {}
    for path in sorted((data / "images").rglob("*.png")) + sorted((data / "classification").rglob("*.png")):
        split = path.relative_to(data).parts[1]
        assert owner.setdefault(hashlib.sha256(path.read_bytes()).hexdigest(), split) == split
    unseen = set(names.object_names("unseen"))
    for split in SPLITS:
        file = read(data / f"coco/instances_{split}.json")
        labels = {row["id"]: row["name"] for row in file["categories"]}
        shown = {labels[row["category_id"]] for row in file["annotations"]}
        folders = {path.name for path in (data / "classification" / split).iterdir()}
        for kind in (shown, folders):
            assert kind <= unseen if split == "unseen" else not kind & unseen
        asked = {row["multiple_choice_answer"] for _, row in answered(data, split)}
        assert split == "unseen" or not asked & unseen


def test_kinds_and_answers_of_the_test_questions_are_balanced(data: Path) -> None:
    by_form: dict[str, Counter[str]] = defaultdict(Counter)
    kinds: Counter[str] = Counter()
    for question, annotation in answered(data, "train"):
        answer, kind = annotation["multiple_choice_answer"], annotation["question_type"]
        kinds[kind] += 1
        if kind != "word":  # sixty words, a handful of questions at this size
            by_form[f"{kind} {answer in ('yes', 'no')} {question['question'].startswith('how many objects')}"][answer] += 1
    assert set(kinds) == {"object", "presence", "count", "colour", "relation", "word"}
    assert max(kinds.values()) < 0.35 * sum(kinds.values())
    for form, answers in by_form.items():
        most_frequent = answers.most_common(1)[0][1] / sum(answers.values())
        assert most_frequent < (0.6 if "True False" in form else 0.5), (form, answers)


def test_llava_files_have_the_form_of_llava(data: Path) -> None:
    pretrain, instruct = read(data / "llava/pretrain.json"), read(data / "llava/instruct.json")
    assert len({row["id"] for row in pretrain}) == len(pretrain) == 300
    assert len({row["id"] for row in instruct}) == len(instruct) > 600
    text_only = [row for row in instruct if "image" not in row]
    assert 0.03 < len(text_only) / len(instruct) < 0.15
    for row in pretrain + instruct:
        said = [turn["value"] for turn in row["conversations"]]
        assert [turn["from"] for turn in row["conversations"]] == ["human", "gpt"] * (len(said) // 2)
        assert "".join(said).count("<image>") == said[0].count("<image>") == ("image" in row)
        assert all(text.replace("<image>", "").strip() for text in said)
        if "image" in row:
            assert (data / "images" / row["image"]).is_file()
    assert max(len(row["conversations"]) for row in instruct) == 8


def test_vqa_files_have_the_form_of_vqav2(data: Path) -> None:
    for split in SPLITS:
        for question, annotation in answered(data, split):
            assert question["image"] == f"{split}/{question['image_id']:06d}.png"
            assert (data / "images" / question["image"]).is_file()
            assert [row["answer_id"] for row in annotation["answers"]] == list(range(1, 11))
            given = Counter(row["answer"] for row in annotation["answers"])
            assert given.most_common(1)[0][0] == annotation["multiple_choice_answer"]
    captions = read(data / "coco/captions_test.json")
    assert Counter(row["image_id"] for row in captions["annotations"]) == {row["id"]: 5 for row in captions["images"]}


def test_the_contact_sheet_and_the_manifest_are_there(data: Path) -> None:
    with Image.open(data / "contact_sheet.png") as sheet:
        assert sheet.width > 1000
        assert len(sheet.getcolors(1 << 24) or ()) > 500  # pictures, not an empty page
    manifest = read(data / "manifest.json")
    assert manifest["scenes"] == {"train": 300, "val": 15, "test": 25, "unseen": 10}
    for path, digest in manifest["files"].items():
        assert hashlib.sha256((data / path).read_bytes()).hexdigest() == digest
    assert "CC BY-SA 4.0" in manifest["license"]


def test_an_existing_folder_is_refused_and_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter.txt").write_text("dear")
    with pytest.raises(FileExistsError, match="--overwrite"):
        main(["--out", str(tmp_path / "mine")])
    with pytest.raises(DataError, match=r"manifest\.json"):
        main(["--out", str(tmp_path / "mine"), "--resume"])
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["letter.txt"]


def test_resume_keeps_a_complete_folder_and_refuses_one_of_other_settings(tmp_path: Path) -> None:
    out = tmp_path / "data"
    main(["--out", str(out), "--scale", "0.001", *FEW])
    before = (out / "manifest.json").stat().st_mtime_ns
    assert main(["--out", str(out), "--scale", "0.001", *FEW, "--resume"]) == out
    assert (out / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(DataError, match="seed 0 there, 5 now"):
        main(["--out", str(out), "--scale", "0.001", *FEW, "--seed", "5", "--resume"])


def test_a_full_disk_leaves_nothing_behind_and_the_old_folder_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "data"
    out.mkdir()
    (out / "old.txt").write_text("old")
    written = iter(range(5))

    def save(*args: object, **kwargs: object) -> None:
        if next(written, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", save)
    with pytest.raises(OSError, match="No space left"):
        main(["--out", str(out), "--scale", "0.001", *FEW, "--overwrite"])
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    assert [path.name for path in out.iterdir()] == ["old.txt"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--out"),
        (["--out", "x", "--scale", "0"], "--scale 0"),
        (["--out", "x", "--seed", "-1"], "--seed"),
        (["--out", "x", "--drawings", "7"], "--drawings 7"),
        (["--out", "x", "--drawings", "60", "--scene_drawings", "61"], "--scene_drawings 61"),
        (["--out", "x", "--scle", "1"], "scale"),
    ],
)
def test_wrong_flags_are_named(flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        main(flags)
