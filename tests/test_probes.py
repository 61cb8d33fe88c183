"""Probes of a frozen encoder: words read off patch tokens (eval_ocr), objects named from CLS (eval_goi), CLS before and after."""

import base64
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from torch.testing import assert_close

from encoders import eval_goi, eval_ocr
from encoders.inspection import main as inspect
from encoders.maps import attention_figures, cls_patch_cosine
from encoders.modeling import VisionEncoder, VisionEncoderConfig
from encoders.ocr import CLASSES, GO, IGNORE_INDEX, LETTERS, STOP, ReadingHead, labels_of, normalised, reading_loss, spelt
from encoders.probing import KeptBatches, ProbeData, ProbeImages, over_heads, token_features
from encoders.region_data import read_regions, region_of
from encoders.word_data import read_words
from mmkit.errors import ConfigError, DataError
from mmkit.report_data import read_runs

SIZES: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
FAST = (
    "--head.width",
    "32",
    "--head.layers",
    "1",
    "--head.heads",
    "2",
    "--run.steps",
    "4",
    "--run.micro_batch_size",
    "4",
    "--seeds",
    "0,1",
)


def encoder() -> VisionEncoder:
    torch.manual_seed(0)
    config = VisionEncoderConfig(architecture="vit_base_patch16_clip_224", model_args={**SIZES, "global_pool": "token"}, joint_width=16)
    return VisionEncoder(config).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    place = tmp_path_factory.mktemp("encoder") / "tiny"
    encoder().save_pretrained(place)
    return str(place)


def word_picture(word: str, place: Path) -> None:
    picture = Image.new("RGB", (48, 24), "white")
    ImageDraw.Draw(picture).text((3, 6), word, "black", font=ImageFont.load_default(10))
    place.parent.mkdir(parents=True, exist_ok=True)
    picture.save(place)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve words to learn, six to be tested on, in the layout of the embedded data."""
    root = tmp_path_factory.mktemp("words") / "words"
    for split, said in {"train": ["yes", "no", "up", "Go!"] * 3, "test": ["no", "yes", "GO", "up", "...", "no"]}.items():
        rows = []
        for number, word in enumerate(said):
            word_picture(word, root / f"images/{split}/{number}.png")
            rows.append(json.dumps({"id": number, "image": f"images/{split}/{number}.png", "word": word}))
        (root / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
    return root


# ---- layouts of word sets ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("annotation_test.txt", "./2425/1/115_Lube_45484.jpg 45484\n", [("2425/1/115_Lube_45484.jpg", "Lube")]),
        ("gt.txt", '\ufeffword_1.png, "Tiredness"\r\nword_2.png, "a, \\"b\\""\n', [("word_1.png", "Tiredness"), ("word_2.png", 'a, "b"')]),
        ("labels.tsv", "a/1.jpg\tHello\nb.png\tyou and me\n", [("a/1.jpg", "Hello"), ("b.png", "you and me")]),
        ("test.txt", "a.jpg two\n", [("a.jpg", "two")]),
        ("word.xml", '<l><image file="w/1.jpg" tag="self"/></l>', [("w/1.jpg", "self")]),
    ],
)  # fmt: skip
def test_lists_of_words_are_read_as_their_makers_write_them(
    tmp_path: Path, file: str, content: str, expected: list[tuple[str, str]]
) -> None:
    (tmp_path / file).write_text(content, encoding="utf-8")
    found = read_words(f"IC13={tmp_path}")
    assert found.name == "IC13"
    assert list(zip(found.names, found.words, strict=True)) == expected


def test_words_of_svt_and_synthtext_are_cut_out_of_their_pictures(tmp_path: Path) -> None:
    from scipy.io import savemat

    picture = np.zeros((20, 30, 3), dtype=np.uint8)
    picture[5:9, 10:16] = 255
    Image.fromarray(picture).save(tmp_path / "a.png")
    box = '<taggedRectangle x="10" y="5" width="6" height="4"><tag>GO</tag></taggedRectangle>'
    (tmp_path / "test.xml").write_text(f"<t><image><imageName>a.png</imageName><taggedRectangles>{box}</taggedRectangles></image></t>")
    corners = np.array([[[10, 0], [16, 3], [16, 3], [10, 0]], [[5, 0], [5, 0], [9, 2], [9, 2]]], dtype=float)  # [x or y, corner, word]
    cell = np.empty((1, 2), dtype=object)
    cell[0, 0], cell[0, 1] = np.array(["GO\nit  "]), np.array(["on"])
    boxes = np.empty((1, 2), dtype=object)
    boxes[0, 0], boxes[0, 1] = corners, corners[:, :, 0]
    names = np.empty((1, 2), dtype=object)
    names[0, 0], names[0, 1] = "a.png", "a.png"
    savemat(tmp_path / "gt.mat", {"imnames": names, "wordBB": boxes, "txt": cell})
    for source, said in ((tmp_path / "test.xml", ["GO"]), (tmp_path / "gt.mat", ["GO", "it", "on"])):
        found = read_words(str(source))
        assert found.words == said
        cut = found.open(found.names[0])
        assert isinstance(cut, Image.Image)
        assert cut.size == (6, 4)
        assert np.array(cut).min() == 255


def test_words_come_from_shards_and_from_iiit(tmp_path: Path) -> None:
    from scipy.io import savemat

    word_picture("taxi", tmp_path / "x.png")
    with tarfile.open(tmp_path / "words.tar", "w") as shard:
        for name, content in (("0.png", (tmp_path / "x.png").read_bytes()), ("0.txt", b"taxi\n")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            shard.addfile(member, io.BytesIO(content))
    found = read_words(str(tmp_path / "words.tar"))
    assert found.words == ["taxi"]
    assert found.open(found.names[0]) == (tmp_path / "x.png").read_bytes()
    rows = np.array([("test/1.png", "TAXI"), ("test/2.png", "now")], dtype=[("ImgName", object), ("GroundTruth", object)])
    savemat(tmp_path / "testdata.mat", {"testdata": rows})
    assert read_words(str(tmp_path / "testdata.mat")).words == ["TAXI", "now"]


def test_a_list_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "gt.txt").write_text("what is this\n")
    with pytest.raises(DataError, match=r"gt\.txt, line 1: `path<TAB>word`"):
        read_words(str(tmp_path))
    (tmp_path / "gt.txt").unlink()
    with pytest.raises(DataError, match="no list of words"):
        read_words(str(tmp_path))
    with pytest.raises(DataError, match="there is no"):
        read_words(str(tmp_path / "nothing"))


# ---- the reading head --------------------------------------------------------------------------------------------------------------------


def test_what_is_taught_is_what_is_read() -> None:
    said = ["Hello!", "a", "z" * 25]
    labels = labels_of(said)
    assert labels.shape == (3, 27)
    assert (labels[:, 0] == IGNORE_INDEX).all()
    logits = torch.nn.functional.one_hot(labels.clamp(min=0), CLASSES).float()
    logits[labels == IGNORE_INDEX] = torch.nn.functional.one_hot(
        torch.tensor(LETTERS.index("x") + 2), CLASSES
    ).float()  # noise behind the end
    assert spelt(logits) == said
    assert normalised("It's 5-PM!") == "its5pm"
    assert (len(LETTERS), len(set(LETTERS)), {GO, STOP}) == (94, 94, {0, 1})
    for wrong in ("", "é", "a" * 26):
        with pytest.raises(ValueError, match="no word of 1 to 25"):
            labels_of([wrong])


def test_a_head_learns_to_tell_tokens_apart_and_scale_does_not_matter() -> None:
    torch.manual_seed(0)
    tokens, said = torch.randn(4, 6, 16), ["one", "two", "three", "four"]
    head, labels = ReadingHead(16, 6, width=32, layers=1, heads=2, dropout=0.0, longest=8), labels_of(said, 8)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        reading_loss(head(tokens), labels).backward()
        optimizer.step()
    assert spelt(head(tokens)) == said
    assert_close(head(tokens * 100), head(tokens), rtol=0, atol=1e-3)  # layer norm's epsilon


# ---- features ----------------------------------------------------------------------------------------------------------------------------


def test_patch_tokens_and_cls_are_the_encoders_own() -> None:
    network, images = encoder(), torch.randn(2, 3, 32, 32)
    states = network(images).last_hidden_state
    assert torch.equal(token_features(network, images, "patch_tokens"), states[:, 1:])
    assert torch.equal(token_features(network, images, "cls"), states[:, 0])


def test_kept_batches_hold_every_image_once_an_epoch_in_another_order_each_time() -> None:
    images = ProbeImages(encoder(), encoder().spec, "cls", Path, [str(number) for number in range(10)])
    data = KeptBatches(ProbeData(images, torch.arange(10), torch.arange(10.0)), size=4, seed=3)
    epochs = [torch.cat([data.get(epoch, index)["labels"] for index in range(len(data))]).tolist() for epoch in (0, 1, 0)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 3
    assert epochs[0] == epochs[2] != epochs[1]
    assert data.get(1, 2)["features"].tolist() == [float(label) for label in data.get(1, 2)["labels"]]


def test_a_share_over_heads_is_their_mean_with_the_items_interval() -> None:
    found = over_heads([50, 60, 70], 100)
    assert (found["value"], found["by_seed"]) == (60.0, [50.0, 60.0, 70.0])
    assert found["ci95"][0] < 60 < found["ci95"][1]
    assert found["ci95_over_seeds"][0] < found["ci95"][0]  # three heads ten points apart say less than a hundred words
    assert over_heads([50], 100)["ci95_over_seeds"] is None


# ---- eval ocr ----------------------------------------------------------------------------------------------------------------------------


def ocr(folder: str, words: Path, out: Path, *flags: str) -> dict[str, Any]:
    test = f"words={words}"
    eval_ocr.main(["--encoder", folder, "--train", str(words), "--test", test, "--optimizer", "adamw", "--out", str(out), *FAST, *flags])
    found: dict[str, Any] = json.loads((out / "summary.json").read_text())
    return found


def test_the_ocr_probe_scores_every_head_and_the_report_reads_it(folder: str, words: Path, tmp_path: Path) -> None:
    out = tmp_path / "eval" / "tiny" / "ocr"
    summary = ocr(folder, words, out)
    assert summary["n"] == summary["protocol"]["tests"]["words"] == 5  # "..." has neither letter nor digit
    assert summary["protocol"]["test_words_seen_in_training"] == "5 of 5"
    assert len(summary["metrics"]["word_accuracy"]["by_seed"]) == 2
    rows = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    for row in rows:
        assert row["right"] == [int(normalised(answer) == normalised(row["label"])) for answer in row["answers"]]
    data = read_runs([tmp_path])
    assert [(e.encoder, e.benchmark, e.main, len(e.items)) for e in data.evaluations] == [("tiny", "ocr", "word_accuracy", 5)]
    assert all(item.image is not None for item in data.evaluations[0].items.values())
    assert not data.trainings  # the heads' own curves are not the report's
    weights = {path: path.stat().st_mtime_ns for path in out.rglob("head.safetensors")}
    assert len(weights) == 2
    again = ocr(folder, words, out, "--resume")
    assert again["metrics"] == summary["metrics"]
    assert {path: path.stat().st_mtime_ns for path in weights} == weights  # heads that are there are not trained again
    with pytest.raises(DataError, match="another evaluation: seeds"):
        ocr(folder, words, out, "--resume", "--seeds", "0")
    assert ocr(folder, words, out, "--overwrite", "--seeds", "0")["metrics"]["word_accuracy"]["by_seed"][1:] == []


def test_heads_on_computed_features_learn_what_heads_on_kept_ones_do(folder: str, words: Path, tmp_path: Path) -> None:
    """All twelve words in every step: the order cannot matter, and the losses agree but for the order of sums."""
    losses = []
    for name, cache in (("kept", "4"), ("computed", "0")):
        ocr(
            folder,
            words,
            tmp_path / name,
            "--cache_gb",
            cache,
            "--run.micro_batch_size",
            "12",
            "--head.dropout",
            "0",
            "--run.log_every",
            "1",
        )
        rows = (tmp_path / name / "probe_heads" / "seed_0" / "metrics.jsonl").read_text().splitlines()
        losses.append(torch.tensor([json.loads(row)["loss"] for row in rows]))
    assert len(losses[0]) == 4
    assert_close(losses[0], losses[1], rtol=0, atol=1e-5)


def test_two_training_sets_count_alike_whatever_their_sizes(words: Path) -> None:
    small, large = read_words(str(words / "test.jsonl")).thinned(2), read_words(str(words / "train.jsonl"))
    dealt = eval_ocr.learnt_words([small, large])
    assert len(dealt.names) == len(set(dealt.names)) == 24
    assert sum(name.startswith("0/") for name in dealt.names) == 12


def test_the_ocr_probe_refuses_what_it_cannot_do(folder: str, words: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--train is missing"):
        eval_ocr.main(["--encoder", folder, "--test", str(words), "--out", str(tmp_path / "o")])
    with pytest.raises(ConfigError, match="below --out"):
        ocr(folder, words, tmp_path / "o", "--run.output_dir", "x")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"no picture")
    (tmp_path / "broken" / "gt.txt").write_text("a.png\tyes\n")
    with pytest.raises(DataError, match="on_bad_sample skip"):
        ocr(folder, words, tmp_path / "p", "--train", f"{words},{tmp_path / 'broken'}")
    summary = ocr(folder, words, tmp_path / "q", "--test", f"w={words},b={tmp_path / 'broken'}", "--on_bad_sample", "skip")
    assert (summary["n"], summary["missing"]) == (5, 1)


# ---- eval goi ----------------------------------------------------------------------------------------------------------------------------

COLOURS = {"cat": (200, 30, 30), "dog": (30, 200, 30), "bus": (30, 30, 200)}


def coco_set(root: Path) -> Path:
    """Pictures of two squares; the colour of a square says its category."""
    generator = np.random.default_rng(0)
    for split, count in {"train": 40, "val": 20}.items():
        (root / "images" / split).mkdir(parents=True)
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for number in range(count):
            picture = np.full((40, 40, 3), 255, dtype=np.uint8)
            for place in range(2):
                category = int(generator.integers(3))
                left = 4 + 18 * place
                picture[10:24, left : left + 12] = list(COLOURS.values())[category]
                annotations.append({"id": len(annotations) + 1, "image_id": number, "category_id": 10 * category + 1, "bbox": [left, 10, 12, 14],
                                    "area": 168, "iscrowd": 0})  # fmt: skip
            Image.fromarray(picture).save(root / "images" / split / f"{number}.png")
            images.append({"id": number, "file_name": f"{number}.png", "width": 40, "height": 40})
        categories = [{"id": 10 * number + 1, "name": name} for number, name in enumerate(COLOURS)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / f"instances_{split}.json").write_text(json.dumps(content))
    return root


def test_a_region_says_more_than_the_whole_picture(folder: str, tmp_path: Path) -> None:
    data = coco_set(tmp_path / "coco")
    out = tmp_path / "eval" / "tiny"
    flags = ["--images", str(data / "images"), "--seeds", "0,1", "--lr", "0.03", "--run.micro_batch_size", "10", "--out", str(out)]
    eval_goi.main(["--encoder", folder, "--data", str(data), *flags])
    found = {name: json.loads((out / name / "summary.json").read_text()) for name in ("goi_image", "goi_box")}
    assert {summary["n"] for summary in found.values()} == {20}
    assert found["goi_box"]["metrics"]["top1"]["value"] == 100.0  # one colour fills the region: a linear layer tells three colours apart
    assert found["goi_image"]["metrics"]["top1"]["value"] < 95  # which square is meant is not said
    assert found["goi_image"]["metrics"]["top5"]["value"] == 100.0  # there are three names
    assert sorted((e.encoder, e.benchmark, e.main) for e in read_runs([tmp_path / "eval"]).evaluations) == [
        ("tiny", "goi_box", "top1"), ("tiny", "goi_image", "top1"),
    ]  # fmt: skip


def test_names_that_training_never_says_are_left_out_counted_or_refused(tmp_path: Path) -> None:
    data = coco_set(tmp_path / "coco")
    content = json.loads((data / "instances_train.json").read_text())

    def task(forgotten: set[int]) -> eval_goi.Task:
        kept = [row for row in content["annotations"] if row["category_id"] not in forgotten]
        (data / "instances_train.json").write_text(json.dumps({**content, "annotations": kept}))
        return eval_goi.read_task(eval_goi.EvalGoiConfig(encoder="e", out="o", data=str(data), images=str(data / "images")))

    found = task({21})
    assert 0 < found.unknown == 20 - len(found.test)
    assert {found.test.labels[name] for name in found.test.names} == {"cat", "dog"}
    with pytest.raises(DataError, match="there is nothing to tell apart"):
        task({11, 21})


def test_m3it_rows_give_label_region_and_picture(tmp_path: Path) -> None:
    picture = np.zeros((10, 20, 3), dtype=np.uint8)
    picture[2:6, 5:15] = 255
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    text = base64.b64encode(buffer.getvalue()).decode()
    rows: list[dict[str, Any]] = [
        {"instruction": "Identify ...", "inputs": "region: [5, 2, 15, 6]\nOptions: (A) cat (B) dog", "outputs": "(B) Dog.", "image_base64_str": [text]},
        {"instruction": "Identify ...", "inputs": "", "outputs": "traffic light", "image_base64_str": text, "bbox": [0.25, 0.2, 0.75, 0.6]},
        {"instruction": "What is it?", "inputs": "", "outputs": "cat", "image_base64_str": [text]},
    ]  # fmt: skip
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = read_regions(tmp_path / "train.jsonl")
    assert [found.labels[name] for name in found.names] == ["dog", "traffic light", "cat"]
    for name in found.names[:2]:
        cut = found.cut(name)
        assert cut.size == (10, 4)
        assert np.array(cut).min() == 255
    assert region_of(rows[2]) is None
    with pytest.raises(DataError, match="names no region"):
        found.cut(found.names[2])
    (tmp_path / "bad.jsonl").write_text(json.dumps({"outputs": "cat"}))
    with pytest.raises(DataError, match="`image_base64_str` and `outputs`"):
        read_regions(tmp_path / "bad.jsonl")


# ---- before and after --------------------------------------------------------------------------------------------------------------------


def test_entropy_and_distance_of_attention_are_those_of_known_maps() -> None:
    one, two = torch.zeros(4, 4), torch.zeros(4, 4)
    one[1, 2] = 0.7
    two[0, 0] = two[0, 3] = 0.2
    found = attention_figures(torch.stack([torch.full((4, 4), 0.05), one, two]))
    assert_close(found["entropy"], torch.tensor([1.0, 0.0, np.log(2) / np.log(16)], dtype=torch.float32), rtol=0, atol=1e-5)
    assert_close(found["distance"][1:], torch.tensor([0.0, 1.5]), rtol=0, atol=1e-5)


def test_the_cosine_of_cls_and_patches_is_one_where_patches_repeat_cls() -> None:
    network = encoder()
    images = torch.randn(2, 3, 32, 32)
    tokens = network(images).last_hidden_state
    expected = torch.nn.functional.cosine_similarity(tokens[:, 1:], tokens[:, :1], dim=-1).mean(dim=1)
    assert_close(cls_patch_cosine(network, images), expected.detach(), rtol=0, atol=1e-5)


def test_two_encoders_are_shown_side_by_side_with_figures(folder: str, tmp_path: Path) -> None:
    changed = encoder()
    torch.nn.init.normal_(changed.network.blocks[1].attn.qkv.weight, std=0.5)
    changed.save_pretrained(tmp_path / "after")
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    out = inspect([str(tmp_path / "after"), "--before", folder, "--images", str(tmp_path / "a.png"), "--out", str(tmp_path / "maps")])
    content = json.loads((out / "maps.json").read_text())
    assert list(content["before_after"]) == ["tiny", "after"]
    assert content["before_after"]["tiny"] != content["before_after"]["after"]
    assert content["pictures"][0]["kind"] == "before and after"
    assert (out / content["pictures"][0]["file"]).is_file()
