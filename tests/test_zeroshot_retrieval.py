"""Retrieval: the metric and its laws, caption files, the evaluation through its front door, agreement with clip_benchmark."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from encoders import eval_zeroshot_retrieval
from encoders.captions import Captioned, read_captions
from encoders.catalog import load_encoder
from encoders.image_batches import batches
from encoders.text import MINI_CLIP
from mmkit.errors import ConfigError, DataError
from mmkit.images import ImageError
from mmkit.minidata import world
from mmkit.minidata.language import caption
from mmkit.records import read_jsonl
from mmkit.retrieval import retrieval_ranks
from mmkit.scoring import recall_at_k

GOLDEN = Path(__file__).parent / "golden" / "uta"
NO_BENCHMARK = "clip_benchmark is not installed (the extra `dev` has it)"


def features(images: int, texts: int, width: int = 8, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Random features and owners; every image has at least one caption."""
    generator = torch.Generator().manual_seed(seed)
    owner = torch.cat([torch.arange(images), torch.randint(images, (texts - images,), generator=generator)])
    own = torch.randn(images, width, generator=generator)
    near = own[owner] + torch.randn(texts, width, generator=generator)
    return F.normalize(own, dim=1), F.normalize(near, dim=1), owner[torch.arange(texts)]


# ---- the metric ----------------------------------------------------------------------------------------------------------------------


def test_recalls_equal_the_golden_ones() -> None:
    golden = load_file(GOLDEN / "retrieval.safetensors")
    expected = json.loads((GOLDEN / "config_expected.json").read_text())["expected"]["retrieval"]
    by_image, by_text = retrieval_ranks(golden["image_emb"], golden["text_emb"], golden["text_image_index"])
    for k in (1, 5, 10):
        assert by_image.recall(k) == pytest.approx(expected[f"text_retrieval_recall@{k}"], abs=1e-6)
        assert by_text.recall(k) == pytest.approx(expected[f"image_retrieval_recall@{k}"], abs=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_ranks_equal_those_of_the_whole_table(seed: int) -> None:
    images, texts, owner = features(20, 70, seed=seed)
    by_image, by_text = retrieval_ranks(images, texts, owner, cells=300)
    table = (images @ texts.T).numpy()
    relevant = owner.numpy()[None, :] == np.arange(20)[:, None]
    for k in (1, 3, 10):
        assert np.array_equal(by_image.rank < k, recall_at_k(table, relevant, k))
        assert np.array_equal(by_text.rank < k, recall_at_k(table.T, relevant.T, k))
    assert np.array_equal(by_image.nearest, table.argmax(axis=1))
    assert np.array_equal(by_text.nearest, table.argmax(axis=0))


def test_neither_the_size_of_a_part_nor_the_length_of_a_feature_matters() -> None:
    images, texts, owner = features(30, 90)
    whole = retrieval_ranks(images, texts, owner)
    small = retrieval_ranks(3 * images, texts * torch.linspace(0.2, 9, 90)[:, None], owner, cells=1)
    for first, second in zip(whole, small, strict=True):
        assert np.array_equal(first.rank, second.rank)


def test_shuffled_captions_shuffle_the_ranks_and_nothing_else() -> None:
    images, texts, owner = features(30, 90)
    order = torch.randperm(90)
    plain, shuffled = retrieval_ranks(images, texts, owner), retrieval_ranks(images, texts[order], owner[order])
    assert np.array_equal(plain[0].rank, shuffled[0].rank)
    assert np.array_equal(plain[1].rank[order.numpy()], shuffled[1].rank)


def test_an_encoder_that_says_the_same_of_everything_finds_nothing() -> None:
    by_image, by_text = retrieval_ranks(torch.ones(12, 4), torch.ones(24, 4), torch.arange(24) % 12)
    assert by_image.recall(10) == by_text.recall(10) == 0
    assert by_image.lucky.tolist() == [0] * 12  # chance would have found all


def test_features_that_cannot_be_ranked_are_named() -> None:
    images, texts, owner = features(4, 8)
    with pytest.raises(DataError, match="1 of 4 images have no caption, the first is image 2"):
        retrieval_ranks(images, texts, torch.tensor([0, 1, 3, 3, 0, 1, 3, 3]))
    with pytest.raises(DataError, match=r"caption features are not finite, the first is number 5"):
        retrieval_ranks(images, texts.index_fill(0, torch.tensor([5]), float("nan")), owner)
    with pytest.raises(DataError, match="images 0 to 3, and there are 3"):
        retrieval_ranks(images[:3], texts, owner)


@pytest.mark.parametrize("twins", [False, True])
def test_clip_benchmark_finds_as_much_and_with_ties_no_less_nor_more_than_luck(twins: bool) -> None:
    theirs = pytest.importorskip("clip_benchmark.metrics.zeroshot_retrieval", reason=NO_BENCHMARK)
    images, texts, owner = features(40, 160, width=6)
    if twins:
        texts[100:140] = texts[20:60]  # captions of other images, word for word
    positive = F.one_hot(owner, 40).bool()
    by_image, by_text = retrieval_ranks(images, texts, owner)
    scores = texts @ images.T
    for k in (1, 5, 10):
        found = (theirs.batchify(theirs.recall_at_k, scores.T, positive.T, 16, "cpu", k=k) > 0).float().mean().item()
        assert by_image.recall(k) - 1e-6 <= found <= (by_image.lucky < k).mean() + 1e-6
        if not twins:
            assert found == pytest.approx(by_image.recall(k), abs=1e-6)
        found = (theirs.batchify(theirs.recall_at_k, scores, positive, 16, "cpu", k=k) > 0).float().mean().item()
        assert found == pytest.approx(by_text.recall(k), abs=1e-6)


# ---- caption files -------------------------------------------------------------------------------------------------------------------

TEXTS = {"a.jpg": ["one, two", "three"], "b.jpg": ["four"]}


def write_formats(folder: Path) -> dict[str, Path]:
    """The same captions in every format."""
    coco = {
        "images": [{"id": 7, "file_name": "a.jpg"}, {"id": 3, "file_name": "b.jpg"}],
        "annotations": [{"image_id": key, "caption": text} for key, name in ((7, "a.jpg"), (3, "b.jpg")) for text in TEXTS[name]],
    }
    karpathy = [
        {"filepath": "val2014", "filename": name, "split": "test", "sentences": [{"raw": text} for text in texts]}
        for name, texts in TEXTS.items()
    ]
    karpathy.append({"filepath": "val2014", "filename": "c.jpg", "split": "train", "sentences": [{"raw": "other"}]})
    lines = [(name, number, text) for name, texts in TEXTS.items() for number, text in enumerate(texts)]
    contents = {
        "coco.json": json.dumps(coco),
        "karpathy.json": json.dumps({"dataset": "coco", "images": karpathy}),
        "lavis.json": json.dumps([{"image": f"val2014/{name}", "caption": texts} for name, texts in TEXTS.items()]),
        "flat.json": json.dumps([{"image": name, "caption": text} for name, _, text in lines]),
        "flickr_karpathy.txt": "image,caption\n" + "".join(f"{name},{text}\n" for name, _, text in lines),
        "results.token": "".join(f"{name}#{number}\t{text}\n" for name, number, text in lines),
        "results.csv": "image_name| comment_number| comment\n" + "".join(f"{name}| {number}| {text}\n" for name, number, text in lines),
        "quoted.csv": "image,caption\n" + "".join(f'{name},"{text}"\n' for name, _, text in lines),
    }
    for name, content in contents.items():
        (folder / name).write_text(content)
    return {name: folder / name for name in contents}


@pytest.fixture
def two_images(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for name in TEXTS:
        (tmp_path / "images" / name).write_bytes(b"")
    return tmp_path / "images"


def test_every_format_gives_the_same_captions(tmp_path: Path, two_images: Path) -> None:
    for name, path in write_formats(tmp_path).items():
        found = read_captions(path, two_images)
        assert (found.paths, found.captions, found.owner) == (("a.jpg", "b.jpg"), ("one, two", "three", "four"), (0, 0, 1)), name
    assert read_captions(path, two_images, first=1).captions == ("one, two", "four")


@pytest.mark.parametrize(
    "name, content, complaint",
    [
        ("captions.json", '{"questions": [], "data_type": "x"}', "holds an object with questions, data_type; it should be COCO JSON"),
        ("captions.json", '[{"question_id": 3}]', "a record lacks 'caption'"),
        ("captions.json", '{"images": [], "annotations": []}', "has no caption in it"),
        ("captions.json", '{"images": [', "is no valid JSON"),
        ("captions.json", '{"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 2, "caption": "x"}]}', "belongs to image 2"),
        ("captions.txt", "image,caption\na.jpg,fine\nno image here\n", "line 3, names no image and caption: 'no image here'"),
        ("captions.csv", "just text\n", "has no caption in it"),
        ("captions.bin", b"\xff\xfe\x00", "is not UTF-8 text"),
    ],
)  # fmt: skip
def test_a_caption_file_of_another_format_is_refused(
    name: str, content: str | bytes, complaint: str, tmp_path: Path, two_images: Path
) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=complaint):
        read_captions(tmp_path / name, two_images)


def test_missing_images_and_splits_are_named(tmp_path: Path, two_images: Path) -> None:
    files = write_formats(tmp_path)
    (two_images / "b.jpg").unlink()
    with pytest.raises(DataError, match=r"1 of 2 images are missing: b\.jpg.*--partial true"):
        read_captions(files["coco.json"], two_images)
    found = read_captions(files["coco.json"], two_images, partial=True)
    assert (found.paths, found.owner) == (("a.jpg",), (0, 0))
    assert "missing: b.jpg" in found.notes[0]
    with pytest.raises(DataError, match="no split 'val'; it has test, train"):
        read_captions(files["karpathy.json"], two_images, split="val")
    with pytest.raises(DataError, match="there is no such folder"):
        read_captions(files["coco.json"], tmp_path / "nowhere")


# ---- the evaluation ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """COCO captions of 30 scenes, three a scene, no caption of two scenes; and the folder of their images."""
    root = tmp_path_factory.mktemp("scenes")
    (root / "images").mkdir()
    pool = ["cat", "dog", "pizza", "rocket", "umbrella", "bicycle", "owl", "red apple"]
    images, annotations, used = [], [], set()
    for number in range(80):
        rng = np.random.default_rng((5, number))
        scene = world.sample_scene(rng, list(rng.choice(pool, 2, replace=False)), 2)
        texts = [caption(scene, rng) for _ in range(3)]
        if used & set(texts) or len(images) == 30:
            continue
        used |= set(texts)
        name = f"{number:03d}.png"
        Image.fromarray(world.render(scene)).save(root / "images" / name)
        images.append({"id": number, "file_name": name})
        annotations += [{"image_id": number, "caption": text} for text in texts]
    assert len(images) >= 20
    (root / "captions.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    return root / "captions.json", root / "images"


def evaluate(scenes: tuple[Path, Path], out: Path, *flags: str) -> Path:
    captions, images = map(str, scenes)
    return eval_zeroshot_retrieval.main(["--encoder", "mini-clip", "--captions", captions, "--images", images, "--out", str(out), *flags])


def test_clip_benchmark_agrees_on_the_embedded_scenes(scenes: tuple[Path, Path], tmp_path: Path) -> None:
    theirs = pytest.importorskip("clip_benchmark.metrics.zeroshot_retrieval", reason=NO_BENCHMARK)
    import open_clip

    out = evaluate(scenes, tmp_path / "out", "--benchmark", "mini_retrieval")
    summary = json.loads((out / "summary.json").read_text())
    data: Captioned = read_captions(*scenes)
    spec = load_encoder("mini-clip").spec
    texts = [[text for text, owner in zip(data.captions, data.owner, strict=True) if owner == image] for image in range(len(data.paths))]
    start, loader = 0, []
    for read, images, _ in batches(lambda name: data.root / name, data.paths, spec, 16):
        loader.append((images, texts[start : start + len(read)]))
        start += len(read)
    model, tokenizer = open_clip.create_model(f"local-dir:{MINI_CLIP}").eval(), open_clip.get_tokenizer(f"local-dir:{MINI_CLIP}")
    expected = theirs.evaluate(model, loader, tokenizer, "cpu", amp=False, recall_k_list=[1, 5, 10])
    for name, metric in summary["metrics"].items():
        assert metric["value"] == pytest.approx(100 * expected[name], abs=1e-3)
        assert metric["ci95"][0] <= metric["value"] <= metric["ci95"][1]
    assert 0 < expected["image_retrieval_recall@1"] < 1
    assert summary["n"] == len(data.paths) + len(data.captions)
    assert {"benchmark", "model", "protocol", "n", "metrics", "seconds", "missing"} <= summary.keys()


def test_a_killed_evaluation_goes_on_without_encoding_again(
    scenes: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluate(scenes, tmp_path / "whole")
    encoded: list[int] = []
    original = eval_zeroshot_retrieval._encode_images

    def encode(pair, data, names, config, device):  # type: ignore[no-untyped-def]
        if len(encoded) == 2:
            raise KeyboardInterrupt
        encoded.append(len(names))
        return original(pair, data, names, config, device)

    monkeypatch.setattr(eval_zeroshot_retrieval, "IMAGES_AT_ONCE", 10)
    monkeypatch.setattr(eval_zeroshot_retrieval, "_encode_images", encode)
    with pytest.raises(KeyboardInterrupt):
        evaluate(scenes, tmp_path / "out")
    assert not (tmp_path / "out" / "summary.json").exists()
    with pytest.raises(DataError, match="--resume"):
        evaluate(scenes, tmp_path / "out")
    encoded.clear()
    out = evaluate(scenes, tmp_path / "out", "--resume")
    assert sum(encoded) == len(read_captions(*scenes).paths) - 20
    assert read_jsonl(out / "answers.jsonl") == read_jsonl(whole / "answers.jsonl")
    assert not (out / "features").exists()
    with pytest.raises(DataError, match="precision was 'fp32', is 'bf16'"):
        evaluate(scenes, out, "--resume", "--precision", "bf16")


def test_an_unreadable_image_stops_or_leaves_with_its_captions(scenes: tuple[Path, Path], tmp_path: Path) -> None:
    broken = tmp_path / "images"
    broken.mkdir()
    for path in scenes[1].iterdir():
        (broken / path.name).symlink_to(path)
    bad = sorted(path.name for path in broken.iterdir())[3]
    (broken / bad).unlink()
    (broken / bad).write_text("no picture")
    with pytest.raises(ImageError, match=bad):
        evaluate((scenes[0], broken), tmp_path / "stop")
    out = evaluate((scenes[0], broken), tmp_path / "skip", "--on_bad_sample", "skip")
    summary = json.loads((out / "summary.json").read_text())
    data = read_captions(*scenes)
    assert (summary["missing"], summary["missing_images"]) == (1, [bad])
    assert summary["n"] == len(data.paths) + len(data.captions) - 4
    assert sum("missing" in row for row in read_jsonl(out / "answers.jsonl")) == 4


def test_flags_that_are_missing_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--captions is missing"):
        eval_zeroshot_retrieval.main(["--encoder", "mini-clip", "--images", str(tmp_path), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
