"""train_visft's first stage through its front door, and what feeds it: feature maps, their cache."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from visft_tiny import HEADS, copy_as_killed, data_flags, head_flags, rows, running, write_world

from encoders import train_visft
from encoders.catalog import load_encoder
from encoders.heads.registry import load_head, read_head_file
from encoders.modeling import VisionEncoder, VisionEncoderConfig
from encoders.resize import resize_encoder
from encoders.train_visft import main
from encoders.visft_features import IMAGENET_MEAN, FeatureMaps
from mmkit.errors import ConfigError, DataError
from mmkit.images import to_images

TASKS = list(HEADS)
RANDOM = {"detection": "multi_scale", "segmentation": "jitter", "caption": "squash_and_flip"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("visft"))


def tower(architecture: str, **more: Any) -> VisionEncoder:
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, **more}
    return VisionEncoder(VisionEncoderConfig(architecture=architecture, model_args=sizes, joint_width=40)).eval()


def pixels(side: int) -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


# ---- feature maps ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["vit_base_patch16_clip_224", "eva02_base_patch14_224"])
def test_a_map_is_the_encoders_patch_tokens_on_its_own_canvas_and_on_others(architecture: str) -> None:
    encoder = tower(architecture)
    maps, before = FeatureMaps(encoder), dict(encoder.network.__dict__)
    with torch.no_grad():
        own = encoder(to_images(pixels(32), encoder.spec)).last_hidden_state[:, 1:]
        torch.testing.assert_close(maps(pixels(32)), own.transpose(1, 2).unflatten(2, (4, 4)), rtol=0, atol=0)
        larger = resize_encoder(encoder, None, 48, "bicubic")
        wanted = larger(to_images(pixels(48), larger.spec)).last_hidden_state[:, 1:].transpose(1, 2).unflatten(2, (6, 6))
        torch.testing.assert_close(maps(pixels(48)), wanted, rtol=0, atol=1e-6)
        again = encoder(to_images(pixels(32), encoder.spec)).last_hidden_state[:, 1:]
    assert torch.equal(again, own)  # nothing is left behind
    assert dict(encoder.network.__dict__).keys() == before.keys()
    with pytest.raises(ConfigError, match="50 px is no whole number of patches of 8 px; the nearest below is 48 px"):
        maps(pixels(50))


@pytest.mark.parametrize("architecture", ["vit_base_patch16_clip_224", "eva02_base_patch14_224"])
def test_without_cls_no_patch_can_look_at_it(architecture: str) -> None:
    encoder = tower(architecture)
    with torch.no_grad():
        without = FeatureMaps(encoder, drop_cls=True)(pixels(32))
        kept = FeatureMaps(encoder)(pixels(32))
        encoder.network.cls_token += 3 * torch.randn(48)
        assert torch.equal(FeatureMaps(encoder, drop_cls=True)(pixels(32)), without)
        assert not torch.equal(FeatureMaps(encoder)(pixels(32)), kept)
    assert not torch.equal(without, kept)
    assert without.shape == kept.shape
    assert encoder.num_prefix_tokens == 1
    with pytest.raises(ConfigError, match="0 prefix tokens"):
        FeatureMaps(tower("vit_base_patch16_siglip_224", num_classes=0, global_pool="avg"), drop_cls=True)


def test_imagenets_mean_is_a_flag_and_pooling_comes_before_the_cache() -> None:
    encoder = tower("vit_base_patch16_clip_224")
    theirs = FeatureMaps(encoder, imagenet_norm=True)
    assert theirs.spec.mean == IMAGENET_MEAN
    with torch.no_grad():
        assert not torch.allclose(theirs(pixels(32)), FeatureMaps(encoder)(pixels(32)))
        assert FeatureMaps(encoder, pool=3)(pixels(48)).shape == (2, 48, 3, 3)
    digests = {
        maps.key(canvas, "fp32", "computed").digest
        for canvas in (32, 48)
        for maps in (theirs, FeatureMaps(encoder), FeatureMaps(encoder, pool=3))
    }
    assert len(digests) == 6
    encoder.network.norm.bias.data += 0.1
    assert FeatureMaps(encoder).key(32, "fp32", "computed").digest not in digests


# ---- training --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_a_head_learns_and_its_encoder_stays_bit_for_bit(world: Path, tmp_path: Path, task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[VisionEncoder] = []
    monkeypatch.setattr(train_visft, "open_encoder", lambda config: opened.append(load_encoder(config.encoder)) or opened[-1])
    before = load_encoder(world / "encoder").state_dict()
    folder = main(head_flags(world, task, tmp_path / "run", steps=40))
    after = opened[0].state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    losses = {row["step"]: row["loss"] for row in rows(folder, "held_out.jsonl")}
    assert sorted(losses) == [0, 40]
    assert losses[40] < 0.9 * losses[0]  # type: ignore[operator]
    head, about = load_head(folder / "head", task, width=48), read_head_file(folder / "head")
    assert (about["canvas"], about["step"], about["encoder"]) == (32, 40, str(world / "encoder"))
    assert head.config.to_dict() | HEADS[task] == head.config.to_dict()


@pytest.mark.parametrize("task", TASKS)
def test_cached_features_give_the_losses_of_computed_ones(world: Path, tmp_path: Path, task: str) -> None:
    words = [f"--{task}.placer", RANDOM[task], "--data.views", "2"]  # 16 pictures, 4 a step: 10 steps reach the third epoch
    computed = main(head_flags(world, task, tmp_path / "computed", *words, steps=10))
    cache = ["--data.feature_cache", str(tmp_path / "features")]
    cached = main(head_flags(world, task, tmp_path / "cached", *words, *cache, steps=10))
    for mine, theirs in zip(rows(cached), rows(computed), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-3), mine["step"]  # maps were computed in other batches: a matrix product's last digit
    after = [[row["loss"] for row in rows(folder, "held_out.jsonl")] for folder in (cached, computed)]
    assert after[0] == pytest.approx(after[1], rel=1e-3)
    again = main(head_flags(world, task, tmp_path / "again", *words, *cache, "--run.num_workers", "1", steps=10))
    assert rows(again) == rows(cached)


def test_a_cache_is_read_and_not_computed_again(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    plain = FeatureMaps.__call__
    monkeypatch.setattr(FeatureMaps, "__call__", lambda self, pixels: (seen.append(len(pixels)), plain(self, pixels))[1])
    cache = ["--data.feature_cache", str(tmp_path / "features")]
    main(head_flags(world, "detection", tmp_path / "first", *cache, steps=8))
    assert sum(seen) == 16 + 5  # the two pictures without a box are one, by content
    main(head_flags(world, "segmentation", tmp_path / "second", *cache, steps=8))  # the same maps
    assert sum(seen) == 16 + 5  # the two pictures without a box are one, by content


@pytest.mark.parametrize("task", TASKS)
def test_one_micro_batch_of_four_equals_four_of_one(world: Path, tmp_path: Path, task: str) -> None:
    one = main(head_flags(world, task, tmp_path / "one", steps=4))
    four = main(
        head_flags(world, task, tmp_path / "four", "--run.micro_batch_size", "1", "--run.gradient_accumulation_steps", "4", steps=4)
    )
    for mine, theirs in zip(rows(one), rows(four), strict=True):
        assert theirs == pytest.approx(mine, rel=2e-4), mine["step"]


def test_a_resumed_run_repeats_its_losses(world: Path, tmp_path: Path) -> None:
    words = ["--run.save_every", "3", "--segmentation.placer", "jitter", "--eval_every", "2"]
    whole = main(head_flags(world, "segmentation", tmp_path / "whole", *words))
    copy = copy_as_killed(whole, tmp_path / "killed", 3)
    main([*head_flags(world, "segmentation", copy, *words), "--run.resume"])
    assert rows(copy) == rows(whole)
    assert rows(copy, "held_out.jsonl") == rows(whole, "held_out.jsonl")
    assert (copy / "head" / "model.safetensors").read_bytes() == (whole / "head" / "model.safetensors").read_bytes()


def test_the_control_shows_other_pictures_in_training_alone(world: Path, tmp_path: Path) -> None:
    true = main(head_flags(world, "detection", tmp_path / "true", steps=2))
    permuted = main(head_flags(world, "detection", tmp_path / "permuted", "--permute_annotations", steps=2))
    assert rows(permuted, "held_out.jsonl")[0] == rows(true, "held_out.jsonl")[0]  # before the first step
    assert rows(permuted)[0]["loss"] != rows(true)[0]["loss"]


def test_a_share_of_the_data_is_part_of_a_larger_one(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(head_flags(world, "caption", tmp_path / "run", "--data_share", "0.5", steps=1))
    assert "8 images, 0 objects, 8 captions" in capsys.readouterr().out


# ---- bad input -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--task", "detektion"], "no task named 'detektion'; nearest: detection"),
        (["--task", "caption", "--data.captions", ""], r"data.captions is empty, and caption needs it: --data.captions PATH"),
        (["--task", "detection", "--detection.placer", "jitter", "--data.feature_cache", "X"], r"fixed number of ways with --data.views 2"),
        (["--task", "detection", "--detection.canvas", "50"], "50 px is no whole number of patches of 8 px"),
        (["--task", "detection", "--head.width", "3"], "head.width is taken from the encoder and the data"),
        (["--task", "detection", "--head.querys", "3"], "DetectionConfig has no querys"),
        (["--task", "detection", "--data_share", "1.5"], "data_share is 1.5"),
        (["--stage", "lora", "--task", "detection"], "needs the heads of stage 1"),
    ],
)
def test_a_wrong_setting_is_named_before_anything_is_written(world: Path, tmp_path: Path, words: list[str], message: str) -> None:
    with pytest.raises((ConfigError, DataError, LookupError), match=message):
        main([*data_flags(world), *running(tmp_path / "run"), *words])
    assert not (tmp_path / "run").exists()


def test_a_picture_that_cannot_be_read_is_named_or_left_out(world: Path, tmp_path: Path) -> None:
    broken = write_world(tmp_path / "broken")
    (broken / "train" / "3.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"3.png' .*is not an image"):
        main(head_flags(broken, "detection", tmp_path / "run", steps=4))
    skip = ["--data.on_bad_sample", "skip", "--data.feature_cache", str(tmp_path / "features")]
    folder = main(head_flags(broken, "detection", tmp_path / "skipped", *skip, steps=4))
    listed = [json.loads(line)["image"] for line in (folder / "bad_samples.jsonl").read_text().splitlines()]
    assert set(listed) == {"3.png"}


def test_held_out_data_with_other_categories_is_refused(world: Path, tmp_path: Path) -> None:
    other = json.loads((world / "held_out_instances.json").read_text())
    other["categories"].append({"id": 9, "name": "blue"})
    (tmp_path / "other.json").write_text(json.dumps(other))
    with pytest.raises(DataError, match=r"only the second 9 \(blue\)"):
        main(head_flags(world, "detection", tmp_path / "run", "--data.held_out_instances", str(tmp_path / "other.json")))
