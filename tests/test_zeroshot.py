"""Zero-shot: the classifier, ranks and ties, the evaluation through its front door, and the teacher that ships."""

import json
import shutil
from pathlib import Path

import open_clip
import pytest
import torch
from open_clip.transformer import TextTransformer
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F

from encoders import eval_zeroshot
from encoders.pairs import held_out_drawings
from encoders.text import MINI_CLIP, load_text_tower
from encoders.zeroshot import (
    TEMPLATES,
    cached_weights,
    classifier_from_features,
    label_ranks,
    load_templates,
    phrase,
    similarities,
    topk_accuracy,
    zeroshot_ranks,
    zeroshot_weights,
)  # fmt: skip
from encoders.zeroshot_sets import own_folders
from mmkit.errors import ConfigError, DataError, NameNotFound
from mmkit.images import ImageError
from mmkit.minidata import names, world
from mmkit.records import read_jsonl

THIRD = min(name for name in names.object_names("trained") if " " in name and name > "pizza")  # its folder's name has a space
GOLDEN = Path(__file__).parent / "golden" / "uta"


# ---- the classifier ------------------------------------------------------------------------------------------------------------------


def test_text_features_and_classifier_equal_the_golden_ones() -> None:
    golden = load_file(GOLDEN / "text_io.safetensors")
    sizes = json.loads((GOLDEN / "config_expected.json").read_text())["text"]
    tower = TextTransformer(context_length=77, vocab_size=320, width=48, heads=3, layers=2, output_dim=64).eval()
    assert (sizes.get("vocab_size", 320), sizes.get("width", 48)) == (320, 48)
    state = load_file(GOLDEN / "clip_checkpoint.safetensors")
    tower.load_state_dict({name.removeprefix("text."): tensor for name, tensor in state.items() if name.startswith("text.")}, strict=True)
    with torch.no_grad():
        torch.testing.assert_close(tower(golden["text_ids"]), golden["text_features"], atol=2e-5, rtol=0)
        features = tower(golden["prompt_ids"].flatten(0, 1)).unflatten(0, (7, 5))  # [C, T, E]
    torch.testing.assert_close(classifier_from_features(features), golden["classifier"], atol=2e-5, rtol=0)


def test_zero_shot_accuracies_equal_the_golden_ones() -> None:
    golden = load_file(GOLDEN / "text_io.safetensors")
    expected = json.loads((GOLDEN / "config_expected.json").read_text())["expected"]["zero_shot"]
    scores = similarities(golden["zs_image_features"], golden["classifier"])
    torch.testing.assert_close(100 * scores, golden["zs_logits"], atol=1e-3, rtol=0)
    assert topk_accuracy(scores, golden["zs_labels"], 1) == pytest.approx(expected["top1"], abs=1e-6)
    assert topk_accuracy(scores, golden["zs_labels"], 5) == pytest.approx(expected["top5"], abs=1e-6)


def test_every_prompt_counts_alike_whatever_its_length() -> None:
    features = torch.randn(3, 4, 8)
    longer = features * torch.tensor([1.0, 5.0, 0.2, 30.0])[None, :, None]
    torch.testing.assert_close(classifier_from_features(features), classifier_from_features(longer))
    torch.testing.assert_close(classifier_from_features(features).norm(dim=0), torch.ones(3))


def test_prompts_are_grouped_by_class_and_not_by_template() -> None:
    codes = {"x1": 0, "x2": 1, "y1": 2, "y2": 3}
    templates = [lambda name: name + "1", lambda name: name + "2"]
    weights = zeroshot_weights(lambda texts: torch.eye(4)[[codes[text] for text in texts]], ["x", "y"], templates)
    half = 2**-0.5
    torch.testing.assert_close(weights.T, torch.tensor([[half, half, 0, 0], [0, 0, half, half]]))


def test_ties_count_against_the_right_class() -> None:
    scores = torch.tensor([[0.5, 0.5, 0.1], [0.2, 0.9, 0.1], [0.3, 0.3, 0.3]])
    assert label_ranks(scores, torch.tensor([0, 1, 2])).tolist() == [1, 0, 2]


def test_a_text_tower_of_another_space_is_refused() -> None:
    with pytest.raises(DataError, match=r"width 8.*classifier 16"):
        similarities(torch.randn(2, 8), torch.randn(16, 3))


def test_ranks_do_not_depend_on_the_batch_size() -> None:
    images, labels, weights = torch.randn(10, 3, 4, 4), torch.arange(10) % 5, F.normalize(torch.randn(48, 5), dim=0)
    ranks = [zeroshot_ranks(lambda batch: batch.flatten(1), images, labels, weights, size).tolist() for size in (1, 3, 10)]
    assert ranks[0] == ranks[1] == ranks[2]


def test_openai_prompts_are_the_eighty_and_mini_prompts_speak_english() -> None:
    assert len(load_templates("openai")) == 80
    assert load_templates("openai")[0]("cat") == open_clip.OPENAI_IMAGENET_TEMPLATES[0]("cat")
    assert phrase("owl") == "an owl"
    assert phrase("cat") == "a cat"
    assert phrase("no drawing of ours") == "a no drawing of ours"
    for name in names.object_names("trained"):
        assert phrase(name) == names.with_article(name)
    assert all(template("cat") for templates in TEMPLATES.values() for template in templates)


def test_prompts_from_a_file_and_what_is_wrong_with_them(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a photo of {}\n\nmy {}\n")
    assert [template("cat") for template in load_templates(str(path))] == ["a photo of cat", "my cat"]
    path.write_text("a photo\n")
    with pytest.raises(ConfigError, match="line 1"):
        load_templates(str(path))
    with pytest.raises(NameNotFound, match="openai"):
        load_templates("opanai")


# ---- text towers ---------------------------------------------------------------------------------------------------------------------


def test_a_miss_names_what_there_is() -> None:
    with pytest.raises(NameNotFound, match="mini-clip"):
        load_text_tower("mini-clap")
    with pytest.raises(NameNotFound, match="openai"):
        load_text_tower("openclip:ViT-B-16/openay")
    with pytest.raises(NameNotFound, match="no model"):
        load_text_tower("openclip:ViT-B-1600/openai")
    with pytest.raises(ConfigError, match="--text_tower"):
        load_text_tower("")


def test_mini_clip_text_rows_are_unit_and_independent_of_the_batch() -> None:
    tower = load_text_tower("mini-clip")
    texts = ["a cat", "a cat on a red background", "two dogs"]
    rows = tower.encode(texts)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(torch.cat([tower.encode([text]) for text in texts]), rows, atol=1e-6, rtol=1e-5)
    assert tower.joint_width == 256
    assert tower.templates == "mini"
    assert not any(p.requires_grad for p in tower.parameters())
    assert not hasattr(tower.clip, "visual")


def test_the_classifier_is_computed_once_per_tower_and_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMKIT_CACHE", str(tmp_path))
    tower, calls = load_text_tower("mini-clip"), []
    original = tower.encode
    monkeypatch.setattr(tower, "encode", lambda texts: calls.append(len(texts)) or original(texts))
    first = cached_weights(tower, ["cat", "dog"], load_templates("mini"))
    assert torch.equal(first, cached_weights(tower, ["cat", "dog"], load_templates("mini")))
    assert len(calls) == 1
    cached_weights(tower, ["dog", "cat"], load_templates("mini"))
    assert len(calls) == 2
    for path in (tmp_path / "zeroshot").iterdir():
        path.write_bytes(b"damaged")
    assert torch.equal(first, cached_weights(tower, ["cat", "dog"], load_templates("mini")))


def test_the_shipped_teacher_is_small_and_names_half_of_unseen_renderings() -> None:
    assert sum(path.stat().st_size for path in MINI_CLIP.rglob("*") if path.suffix == ".safetensors") <= 12e6
    clip = open_clip.create_model(f"local-dir:{MINI_CLIP}").eval()
    pixels, labels, trained = held_out_drawings(seed=1234, views=1)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    images = (pixels.float() / 255 - mean) / std
    weights = zeroshot_weights(load_text_tower("mini-clip").encode, trained, load_templates("mini"))
    ranks = zeroshot_ranks(clip.encode_image, images, labels, weights)
    assert len(trained) > 500
    assert float((ranks < 1).double().mean()) > 0.5


# ---- the evaluation ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of two pictures."""
    import numpy as np

    root = tmp_path_factory.mktemp("pictures")
    for position, name in enumerate(("cat", "pizza", THIRD)):
        (root / name).mkdir()
        for number in range(2):
            scene = world.sample_scene(np.random.default_rng((position, number)), [name], 1)
            Image.fromarray(world.render(scene)).save(root / name / f"{number}.png")
    return root


def evaluate(pictures: Path, out: Path, *flags: str) -> Path:
    return eval_zeroshot.main(["--encoder", "mini-clip", "--images", str(pictures), "--out", str(out), *flags])


def test_an_evaluation_writes_answers_and_a_summary(pictures: Path, tmp_path: Path) -> None:
    out = evaluate(pictures, tmp_path / "out", "--benchmark", "mini_zeroshot")
    summary, answers = json.loads((out / "summary.json").read_text()), read_jsonl(out / "answers.jsonl")
    assert {"benchmark", "model", "protocol", "n", "metrics", "seconds", "missing"} <= summary.keys()
    assert (summary["benchmark"], summary["n"], summary["missing"]) == ("mini_zeroshot", 6, 0)
    assert [row["question_id"] for row in answers] == sorted(f"{name}/{n}.png" for name in ("cat", "pizza", THIRD) for n in range(2))
    assert all(row["answer"] == row["nearest"][0] and row["top1"] == int(row["answer"] == row["label"]) for row in answers)
    for name in ("top1", "top5"):
        metric = summary["metrics"][name]
        assert metric["value"] == pytest.approx(100 * sum(row[name] for row in answers) / 6, abs=1e-3)
        assert metric["ci95"][0] <= metric["value"] <= metric["ci95"][1]
        assert metric["n"] == 6
    assert summary["metrics"]["top5"]["value"] == 100  # three classes


def test_more_names_than_folders_make_it_harder(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("\n".join(names.object_names("trained")))
    out = evaluate(pictures, tmp_path / "out", "--classnames", str(tmp_path / "names.txt"))
    summary = json.loads((out / "summary.json").read_text())
    assert summary["protocol"]["classes"] == len(names.object_names("trained"))
    assert summary["n"] == 6


def test_an_existing_folder_is_refused_resumed_or_thrown_away(pictures: Path, tmp_path: Path) -> None:
    out = evaluate(pictures, tmp_path / "out")
    with pytest.raises(DataError, match="--resume"):
        evaluate(pictures, out)
    whole = (out / "answers.jsonl").read_text()
    (out / "answers.jsonl").write_text(whole[: len(whole) // 2])  # killed in the middle of a line
    evaluate(pictures, out, "--resume", "--batch_size", "1")
    rows = [{key: row[key] for key in ("question_id", "answer", "rank")} for row in read_jsonl(out / "answers.jsonl")]
    assert rows == [{key: row[key] for key in ("question_id", "answer", "rank")} for row in map(json.loads, whole.splitlines())]
    with pytest.raises(DataError, match="prompts was 'mini', is 'name'"):
        evaluate(pictures, out, "--resume", "--prompts", "name")
    evaluate(pictures, out, "--overwrite", "--prompts", "name")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match="holds no evaluation"):
        evaluate(pictures, tmp_path / "other", "--overwrite")
    assert (tmp_path / "other" / "thesis.txt").read_text() == "mine"


def test_a_bad_image_stops_or_counts_as_missing(pictures: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(pictures, broken)
    (broken / "cat" / "2.jpg").write_text("no picture")
    with pytest.raises(ImageError, match=r"2\.jpg"):
        evaluate(broken, tmp_path / "stop")
    assert not (tmp_path / "stop" / "summary.json").exists()
    summary = json.loads((evaluate(broken, tmp_path / "skip", "--on_bad_sample", "skip") / "summary.json").read_text())
    assert (summary["n"], summary["missing"], summary["missing_images"]) == (6, 1, ["cat/2.jpg"])


@pytest.mark.parametrize(
    "prepare, complaint",
    [
        (lambda root: None, "no folders"),
        (lambda root: (root / "cat").mkdir(), "no image"),
        (lambda root: shutil.rmtree(root), "no such folder"),
    ],
)
def test_a_folder_without_classes_or_images_is_refused(tmp_path: Path, prepare, complaint: str) -> None:  # type: ignore[no-untyped-def]
    root = tmp_path / "root"
    root.mkdir()
    prepare(root)
    with pytest.raises(DataError, match=complaint):
        own_folders(root, False)


def test_names_come_from_json_from_lines_or_in_sorted_order(pictures: Path, tmp_path: Path) -> None:
    table = tmp_path / "names.json"
    table.write_text(json.dumps({"pizza": "a slice", "cat": "puss", THIRD: "fruit"}))
    data = own_folders(pictures, False, str(table))
    assert [data.names[label] for label in data.labels] == ["puss", "puss", "a slice", "a slice", "fruit", "fruit"]
    lines = tmp_path / "names.txt"
    lines.write_text("one\ntwo\nthree\n")
    assert [own_folders(pictures, False, str(lines)).names[label] for label in (0, 1, 2)] == ["one", "two", "three"]
    lines.write_text("cat\npizza\n")
    with pytest.raises(DataError, match=THIRD):
        own_folders(pictures, False, str(lines))
    table.write_text(json.dumps({"cat": "puss"}))
    with pytest.raises(DataError, match="pizza"):
        own_folders(pictures, False, str(table))


def test_missing_flags_and_spaceless_encoders_are_named(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--encoder"):
        eval_zeroshot.main(["--images", str(pictures), "--out", str(tmp_path / "out")])
    with pytest.raises(NameNotFound, match="mini-clip"):
        eval_zeroshot.main(["--encoder", "mini-clop", "--images", str(pictures), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
