"""The cache of tower features: what is read is what would be computed, whatever was changed misses, and damage is named."""

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from llava_tiny import picture, tiny_tower, write_data, write_parts

from llm_stage import tower_features, train_llava
from llm_stage.train_llava import main
from mmkit import feature_cache
from mmkit.errors import ConfigError, DataError
from mmkit.feature_cache import ENTRY, HEAD, FeatureCache, FeatureKey, picture_digest

ROOT = Path(__file__).parents[1]
KEY = FeatureKey("hash", {"depth": 2}, {"size": 32}, -2, "default", "float32 plain", 4, 6, "float32", "float32")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Parts, and two epochs of stage 1 without a cache: 24 rows, six of them without an image."""
    folder = tmp_path_factory.mktemp("cache")
    write_parts(folder)
    write_data(folder, rows=24, text_only_every=4)
    main(arguments(folder, folder / "plain"))
    return folder


def arguments(world, output, *more, json_file="data.json", encoder="encoder"):
    words = ["--stage", 1, "--encoder", world / encoder, "--llm", world / "llm", "--json", world / json_file, "--images", world / "images"]
    words += ["--epochs", 2, "--micro_batch_size", 4, "--log_every", 1, "--projector_lr", 2e-3, "--check_saving", "false"]
    return [str(word) for word in [*words, "--output_dir", output, *more]]


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def count_calls(monkeypatch):
    """How many images the tower has been given, once for each forward."""
    calls, forward = [], tower_features.TowerFeatures.__call__

    def counted(self, images):
        calls.append(len(images))
        return forward(self, images)

    monkeypatch.setattr(tower_features.TowerFeatures, "__call__", counted)
    return calls


def computed(calls):
    """Images computed: the first call of each run is a blank one that shows the shape."""
    return sum(calls) - 1


# -- laws ------------------------------------------------------------------------------------------------------------------------------


def test_losses_with_cached_features_equal_those_with_computed_ones(world, tmp_path, monkeypatch):
    calls = count_calls(monkeypatch)
    cached = main(arguments(world, tmp_path / "cached", "--feature_cache", tmp_path / "features"))
    assert losses(cached) == losses(world / "plain")  # fp32, to the last bit; a third of the rows' micro-batches have a text-only row
    assert computed(calls) == 18
    calls.clear()
    again = main(arguments(world, tmp_path / "again", "--feature_cache", tmp_path / "features", "--num_workers", 2))
    assert losses(again) == losses(world / "plain")
    assert computed(calls) == 0


def test_the_tower_sleeps_while_its_features_are_there(world, tmp_path, monkeypatch):
    main(arguments(world, tmp_path / "first", "--feature_cache", tmp_path / "features", "--steps", 1))
    given = []
    forward = train_llava.supervised_loss

    def looked(model, batch):
        given.append(batch["pixel_values"].shape)
        return forward(model, batch)

    monkeypatch.setattr(train_llava, "supervised_loss", looked)
    main(arguments(world, tmp_path / "second", "--feature_cache", tmp_path / "features"))
    assert {tuple(shape[1:]) for shape in given} == {(16, 32)}  # 16 patches, the CLS token left out


def test_stage_two_with_lora_takes_cached_features_and_resumes(world, tmp_path):
    words = [
        "--stage",
        2,
        "--pretrained",
        world / "plain" / "model",
        "--lora.rank",
        4,
        "--save_every",
        2,
        "--keep_checkpoints",
        0,
        "--epochs",
        1,
    ]
    plain = main(arguments(world, tmp_path / "plain", *words))
    cached = main(arguments(world, tmp_path / "cached", *words, "--feature_cache", tmp_path / "features"))
    assert losses(cached) == losses(plain)
    for folder in list((cached / "checkpoints").iterdir()):
        if not folder.name.endswith("2"):
            shutil.rmtree(folder)
    again = main([*arguments(world, cached, *words, "--feature_cache", tmp_path / "features"), "--resume"])
    assert losses(again) == losses(plain)


def test_float16_is_near_and_takes_half_the_disk(world, tmp_path):
    folder = main(arguments(world, tmp_path / "run", "--feature_cache", tmp_path / "features", "--feature_dtype", "float16"))
    assert losses(folder) == pytest.approx(losses(world / "plain"), rel=2e-3)
    assert losses(folder) != losses(world / "plain")
    (shard,) = (tmp_path / "features").glob("*/*.features")
    assert shard.stat().st_size == HEAD.size + 18 * 16 * 32 * 2


def test_bfloat16_features_are_those_of_the_training(world, tmp_path):
    for words in (["--precision", "bf16"], ["--weights", "bf16"]):
        name = words[1] + words[0][2:]
        plain = main(arguments(world, tmp_path / f"plain{name}", *words, "--steps", 3))
        cached = main(arguments(world, tmp_path / f"cached{name}", *words, "--steps", 3, "--feature_cache", tmp_path / "features"))
        assert losses(cached) == losses(plain)
    assert len(list((tmp_path / "features").iterdir())) == 2


# -- what misses -----------------------------------------------------------------------------------------------------------------------


def test_a_changed_picture_misses_and_a_copy_hits(world, tmp_path, monkeypatch):
    calls = count_calls(monkeypatch)
    rows = [row for row in json.loads((world / "data.json").read_text()) if "image" in row]
    images = tmp_path / "images"
    images.mkdir()
    for row in rows:
        (images / row["image"]).write_bytes((world / "images" / row["image"]).read_bytes())
    (images / "copy.png").write_bytes((images / rows[0]["image"]).read_bytes())
    (tmp_path / "data.json").write_text(json.dumps([*rows, {**rows[0], "image": "copy.png"}]))
    words = ["--feature_cache", tmp_path / "features", "--json", tmp_path / "data.json", "--images", images, "--steps", 1]
    main(arguments(world, tmp_path / "first", *words))
    assert computed(calls) == 18
    calls.clear()
    picture("red", seed=99).save(images / rows[3]["image"])
    main(arguments(world, tmp_path / "second", *words))
    assert computed(calls) == 1


def test_other_weights_layer_tokens_or_spec_miss(world, tmp_path, monkeypatch):
    calls = count_calls(monkeypatch)
    features = ["--feature_cache", tmp_path / "features", "--steps", 1]
    main(arguments(world, tmp_path / "first", *features))
    tiny_tower(seed=5).save_pretrained(world / "other")
    spec = tiny_tower()
    spec.config.image_spec = {**spec.config.image_spec, "mean": [0.4, 0.5, 0.6]}
    spec.save_pretrained(world / "respec")
    changes = [["--encoder", world / "other"], ["--encoder", world / "respec"], ["--feature_layer", -1], ["--select", "full"]]
    for number, change in enumerate(changes):
        calls.clear()
        main(arguments(world, tmp_path / f"run{number}", *features, *change))
        assert computed(calls) == 18, change


# -- damage ----------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def filled(tmp_path):
    """A cache of five pictures, with their digests and features."""
    pictures = [bytes([number]) * 32 for number in range(5)]
    features = torch.randn(5, KEY.tokens, KEY.width)
    cache = FeatureCache(tmp_path / "cache", KEY)
    with cache.writer() as writer:
        writer.append(pictures[:3], features[:3])
        writer.append(pictures[3:], features[3:])
    cache.refresh()
    return cache, pictures, features


def test_what_is_written_is_read(filled):
    cache, pictures, features = filled
    assert len(cache) == 5
    assert all(torch.equal(cache.read(name), row) for name, row in zip(pictures, features, strict=True))
    assert bytes(32 * [9]) not in cache


def write_and_die(folder, number):
    writer = FeatureCache(folder, KEY).writer()
    for i in range(40):
        writer.append([bytes([number, i]) * 16], torch.full((1, KEY.tokens, KEY.width), float(number * 100 + i)))
    os._exit(9)


def test_writers_at_once_and_one_that_was_killed_leave_a_whole_cache(filled, tmp_path):
    cache, _, _ = filled
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_and_die, args=(tmp_path / "cache", number)) for number in (7, 8)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(timeout=60)
    assert [writer.exitcode for writer in writers] == [9, 9]
    cache.refresh()
    assert len(cache) == 85
    for number in (7, 8):
        assert all(float(cache.read(bytes([number, i]) * 16).mean()) == number * 100 + i for i in range(40))
    index = next(path for path in cache.folder.glob("*.index"))
    with open(index, "ab") as file:
        file.write(b"half an entry")
    cache.refresh()
    assert len(cache) == 85


def shard_of(cache, kind):
    (path,) = cache.folder.glob(f"*.{kind}")
    return path


def truncate(path, length):
    with open(path, "r+b") as file:
        file.truncate(length)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda cache: truncate(shard_of(cache, "features"), 200), r"\.features is truncated: .*\.index lists 5 pictures"),
        (lambda cache: truncate(shard_of(cache, "index"), 10), r"\.index is truncated"),
        (lambda cache: shard_of(cache, "features").unlink(), r"\.features is truncated"),
        (lambda cache: shard_of(cache, "index").write_bytes(b"x" * 136), r"\.index is no part of a feature cache"),
        (lambda cache: (cache.folder / "cache.json").write_text("{"), r"cache\.json is damaged"),
        (lambda cache: (cache.folder / "cache.json").write_text("[]"), r"cache\.json is damaged"),
    ],
)
def test_a_damaged_file_is_named(filled, tmp_path, spoil, message):
    cache, _, _ = filled
    spoil(cache)
    with pytest.raises(DataError, match=message):
        FeatureCache(tmp_path / "cache", KEY)
    rebuilt = FeatureCache(tmp_path / "cache", KEY, rebuild=True)
    assert len(rebuilt) == 0


def test_features_of_other_weights_are_named(filled, tmp_path):
    cache, _, _ = filled
    other = FeatureCache(tmp_path / "other", replace(KEY, tower="another"))
    for kind in ("features", "index"):
        path = shard_of(cache, kind)
        (other.folder / path.name).write_bytes(path.read_bytes())
    with pytest.raises(DataError, match=r"\.index holds features of other weights, another layer or another image spec"):
        other.refresh()
    cache.folder.rename(tmp_path / "cache" / other.folder.name)
    with pytest.raises(DataError, match=r"cache\.json .* describes features of other weights"):
        feature_cache.check_cache(tmp_path / "cache")


def test_a_changed_byte_is_named(filled):
    cache, pictures, _ = filled
    with open(shard_of(cache, "features"), "r+b") as file:
        file.seek(HEAD.size + 2 * KEY.record_bytes + 5)
        file.write(b"\x55")
    assert torch.isfinite(cache.read(pictures[1])).all()
    with pytest.raises(DataError, match="damaged at record 2"):
        cache.read(pictures[2])


def test_a_damaged_cache_stops_a_training_before_its_folder_is_made(world, tmp_path):
    words = ["--feature_cache", tmp_path / "features", "--steps", 1]
    main(arguments(world, tmp_path / "first", *words))
    (shard,) = (tmp_path / "features").glob("*/*.features")
    truncate(shard, 500)
    with pytest.raises(DataError, match=f"{shard} is truncated"):
        main(arguments(world, tmp_path / "second", *words))
    assert not (tmp_path / "second").exists()
    main(arguments(world, tmp_path / "second", *words, "--rebuild_cache", "true"))


def test_a_disk_without_room_is_refused_with_both_sizes(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(feature_cache.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 30_000})())
    with pytest.raises(ConfigError, match=r"would take 0.00 GB more \(18 pictures of 2,048 bytes\), and 0.00 GB are free"):
        main(arguments(world, tmp_path / "run", "--feature_cache", tmp_path / "features"))
    assert "0 of 18 pictures are there; 18 to compute" in capsys.readouterr().out


def test_a_broken_picture_is_named_or_skipped(world, tmp_path, capsys):
    rows = [row for row in json.loads((world / "data.json").read_text()) if "image" in row]
    images = tmp_path / "images"
    images.mkdir()
    for row in rows:
        (images / row["image"]).write_bytes((world / "images" / row["image"]).read_bytes())
    truncate(images / rows[2]["image"], 60)
    (tmp_path / "data.json").write_text(json.dumps(rows))
    words = ["--feature_cache", tmp_path / "features", "--json", tmp_path / "data.json", "--images", images, "--epochs", 1]
    with pytest.raises(DataError, match=r"003\.png.*row 2 "):
        main(arguments(world, tmp_path / "first", *words))
    capsys.readouterr()
    main(arguments(world, tmp_path / "second", *words, "--on_bad_sample", "skip"))
    assert "skipped: image" in capsys.readouterr().out
    assert ENTRY.size * 17 + HEAD.size == sum(path.stat().st_size for path in (tmp_path / "features").glob("*/*.index"))
    assert len(picture_digest(images / rows[0]["image"])) == 32


@pytest.mark.slow
def test_two_processes_fill_one_cache_and_train_as_one(world, tmp_path, child_environment, free_port):
    """Each has a shard of its own; a rank whose micro-batch is text alone has a blank image."""
    words = ["--feature_cache", tmp_path / "features", "--epochs", 1, "--micro_batch_size", 2]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port)]
    command = [*launcher, str(ROOT / "llm_stage" / "train_llava.py"), *arguments(world, tmp_path / "two", *words)]
    done = subprocess.run(command, env=child_environment, capture_output=True, text=True, timeout=500, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert len(list((tmp_path / "features").glob("*/*.features"))) == 2
    one = main(arguments(world, tmp_path / "one", "--epochs", 1, "--micro_batch_size", 2, "--gradient_accumulation_steps", 2))
    assert losses(tmp_path / "two") == pytest.approx(losses(one), rel=1e-5)  # two ranks add in another order
