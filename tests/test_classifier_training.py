"""train_classifier through its front door: averages, resume, accumulation, exports, what the summary says, bad input."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from encoders.catalog import load_encoder
from encoders.classifier import load_classifier
from encoders.eval_classifier import main as evaluate
from encoders.modeling import VisionEncoder, VisionEncoderConfig
from encoders.train_classifier import RECIPES, ClassifierConfig, main
from mmkit.config import load_config, to_dict
from mmkit.errors import ConfigError, DataError, NameNotFound
from mmkit.images import ImageError

ROOT = Path(__file__).resolve().parent.parent
SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
COLOURS = {"blue": (40, 60, 200), "green": (30, 180, 60), "red": (200, 40, 30)}


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder folder, eight training and four test pictures of each of three colours."""
    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(5)
    config = VisionEncoderConfig(
        architecture="vit_base_patch16_clip_quickgelu_224", model_args=SIZES, joint_width=16, text_tower="mini-clip"
    )
    VisionEncoder(config).save_pretrained(folder / "encoder")
    random = np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 4)):
        for name, colour in COLOURS.items():
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                noise = random.integers(-60, 60, (40, 44, 3))
                Image.fromarray(np.clip(noise + colour, 0, 255).astype(np.uint8)).save(folder / split / name / f"{number:02d}.png")
    return folder


def flags(material: Path, out: Path, *more: str) -> list[str]:
    data = ["--data.train", str(material / "train"), "--data.test", str(material / "test"), "--data.held_out", "0.25", "--data.cache"]
    running = [
        "--run.output_dir",
        str(out),
        "--run.steps",
        "6",
        "--run.micro_batch_size",
        "4",
        "--run.log_every",
        "1",
        "--run.max_grad_norm",
        "0",
    ]
    return ["--encoder", str(material / "encoder"), "--lr", "1e-3", "--ema_decay", "0.8", "--warmup", "2", *data, *running, *more]


def losses(folder: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows}


def curve(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]


def summary(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "test" / "summary.json").read_text())
    return found


@pytest.fixture(scope="module")
def run(material: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a checkpoint after every step."""
    return main(flags(material, tmp_path_factory.mktemp("run") / "ft", "--run.save_every", "1", "--run.keep_checkpoints", "0"))


# ---- laws of the training -----------------------------------------------------------------------------------------------------------------


def test_the_average_is_its_closed_form(run: Path) -> None:
    steps = [load_file(str(run / "checkpoints" / f"step_{step:08d}" / "trainable.safetensors")) for step in range(1, 7)]
    ema = torch.load(run / "checkpoints" / "step_00000006" / "kept_ema.pt", weights_only=True)
    for name, last in steps[-1].items():
        expected = 0.8**6 * steps[0][name]  # the first step has lr 0: after it the weights are the initial ones
        for k, state in enumerate(steps, start=1):
            expected = expected + 0.2 * 0.8 ** (6 - k) * state[name]
        torch.testing.assert_close(ema[f"module.{name}"], expected, rtol=1e-5, atol=1e-6)
        assert not torch.equal(ema[f"module.{name}"], last), name


def test_the_lr_of_every_group_follows_its_layer_at_every_step(run: Path) -> None:
    for step in range(1, 7):
        state = torch.load(run / "checkpoints" / f"step_{step:08d}" / "optimizer.pt", weights_only=True)
        groups = state["optimizer"]["param_groups"]
        top = max(group["lr"] for group in groups)
        assert (top == 0) == (step == 1)
        for group in groups:
            assert group["lr"] == pytest.approx(top * group["initial_lr"] / 1e-3)
        if step == 3:
            assert sorted({round(group["lr"], 12) for group in groups}) == pytest.approx([1e-3 * 0.6**power for power in (3, 2, 1, 0)])


def test_the_patch_embedding_is_frozen_bit_for_bit_and_trained_when_asked(material: Path, run: Path, tmp_path: Path) -> None:
    start = load_encoder(material / "encoder").network.patch_embed.proj.weight
    assert torch.equal(load_encoder(run / "encoder").network.patch_embed.proj.weight, start)
    free = main(flags(material, tmp_path / "free", "--network.freeze_patch_embed", "false"))
    assert not torch.equal(load_encoder(free / "encoder").network.patch_embed.proj.weight, start)


def test_four_micro_batches_equal_one_batch_average_and_curve_included(material: Path, run: Path, tmp_path: Path) -> None:
    four = main(flags(material, tmp_path / "four", "--run.micro_batch_size", "1", "--run.gradient_accumulation_steps", "4"))
    assert losses(four) == pytest.approx(losses(run), rel=1e-5)
    one_ema, four_ema = (load_file(str(folder / "classifier" / "model.safetensors")) for folder in (run, four))
    for name, tensor in one_ema.items():
        torch.testing.assert_close(four_ema[name], tensor, rtol=1e-3, atol=1e-4)
    assert curve(four) == curve(run)


def test_a_resumed_run_is_the_whole_one_bit_for_bit(material: Path, run: Path, tmp_path: Path) -> None:
    part = tmp_path / "part"
    shutil.copytree(run, part)
    for step in (4, 5, 6):
        shutil.rmtree(part / "checkpoints" / f"step_{step:08d}")
    for name in ("classifier", "encoder", "test"):
        shutil.rmtree(part / name)
    main(flags(material, part, "--run.save_every", "1", "--run.keep_checkpoints", "0", "--run.resume"))
    assert (part / "metrics.jsonl").read_text().count("\n") == 6
    assert losses(part) == losses(run)
    assert curve(part) == curve(run)
    assert summary(part)["metrics"] == summary(run)["metrics"]
    for kept in ("kept_ema.pt", "kept_curve.pt"):
        first, second = (torch.load(folder / "checkpoints" / "step_00000006" / kept, weights_only=True) for folder in (run, part))
        assert str(first) == str(second)
    whole, again = (load_file(str(folder / "classifier" / "model.safetensors")) for folder in (run, part))
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_workers_and_the_test_folder_change_nothing(material: Path, run: Path, tmp_path: Path) -> None:
    other = main(flags(material, tmp_path / "other", "--run.num_workers", "1", "--data.test", ""))
    assert losses(other) == losses(run)
    assert curve(other) == curve(run)
    assert not (other / "test").exists()


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_same_losses(material: Path, tmp_path: Path, child_environment: dict[str, str]) -> None:
    whole = main(flags(material, tmp_path / "whole", "--run.steps", "40"))
    arguments = flags(material, tmp_path / "killed", "--run.steps", "40", "--run.save_every", "5")
    process = start(arguments, child_environment)
    log, deadline = tmp_path / "killed" / "metrics.jsonl", time.monotonic() + 180
    while time.monotonic() < deadline and process.poll() is None and not (log.is_file() and log.read_text().count("\n") >= 12):
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()[0]
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    again = main([*arguments, "--run.resume"])
    assert losses(again) == losses(whole)
    assert curve(again) == curve(whole)
    assert summary(again)["metrics"] == summary(whole)["metrics"]


@pytest.mark.slow
def test_two_processes_equal_one(material: Path, run: Path, tmp_path: Path, child_environment: dict[str, str]) -> None:
    arguments = flags(material, tmp_path / "two", "--run.micro_batch_size", "2")
    process = start(arguments, child_environment, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29651")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    two = tmp_path / "two"
    assert losses(two) == pytest.approx(losses(run), rel=1e-4)
    assert curve(two) == curve(run)
    assert summary(two)["metrics"] == summary(run)["metrics"]
    assert (two / "test" / "answers.jsonl").read_text().count("\n") == 12


def start(arguments: list[str], environment: dict[str, str], *launcher: str) -> subprocess.Popen[str]:
    command = [sys.executable, *launcher, str(ROOT / "encoders" / "train_classifier.py"), *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)


# ---- what a run leaves --------------------------------------------------------------------------------------------------------------------


def test_the_summary_never_shows_the_best_alone(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = summary(run)
    variants = ["best_ema", "last_ema", "best_raw", "last_raw"]
    assert set(found["metrics"]) == {"top1", "top5"} | {f"top{k}/{name}" for k in (1, 5) for name in variants}
    assert found["metrics"]["top1"] == found["metrics"]["top1/best_ema"]
    assert {"benchmark", "model", "protocol", "n", "metrics", "seconds", "missing"} <= set(found)
    protocol = found["protocol"]
    assert protocol["selected_on"] == "6 of 24 training images (data.held_out 0.25, split_seed 0), never the test images"
    assert set(protocol["weights_at"]) == set(variants)
    assert {"epoch", "step", "held_out_top1"} == set(protocol["weights_at"]["best_ema"])
    assert (protocol["crop_pct"], protocol["pooling"], protocol["weights"]) == (1.0, "norm_then_mean", "best_ema")
    for name in ("top1", "top5/last_raw"):
        row = found["metrics"][name]
        assert row["ci95"][0] <= row["value"] <= row["ci95"][1]
        assert row["n"] == found["n"] == 12
    rows = [json.loads(line) for line in (run / "test" / "answers.jsonl").read_text().splitlines()]
    assert 100 * sum(row["top1"] for row in rows) / 12 == pytest.approx(found["metrics"]["top1"]["value"], abs=1e-3)
    assert (run / "test" / protocol["images"] / rows[0]["image"]).resolve().is_file()


def test_the_best_epoch_is_the_first_highest_of_the_held_out_curve(run: Path) -> None:
    rows, at = curve(run), summary(run)["protocol"]["weights_at"]
    assert [row["step"] for row in rows] == [5, 6]  # 18 images are passed after 4.5 steps of 4; and the last step
    for name in ("raw", "ema"):
        best = max(rows, key=lambda row: row[name])
        assert (at[f"best_{name}"]["step"], at[f"best_{name}"]["held_out_top1"]) == (best["step"], best[name])


def test_what_is_exported_is_what_was_chosen(material: Path, run: Path, tmp_path: Path) -> None:
    state = load_file(str(run / "classifier" / "model.safetensors"))
    kept = torch.load(run / "checkpoints" / "step_00000006" / "kept_curve.pt", weights_only=True)
    assert all(torch.equal(state[name], tensor) for name, tensor in kept["best"]["ema"]["weights"].items())
    classifier, encoder = load_classifier(run / "classifier"), load_encoder(run / "encoder")
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(classifier.network.head(encoder(images).pooler_output), classifier.network(images))
    assert classifier.class_names == ("blue", "green", "red")
    assert encoder.config.training["weights"] == "best_ema"
    raw = main(flags(material, tmp_path / "raw", "--ema_decay", "0", "--data.held_out", "0"))
    assert set(summary(raw)["protocol"]["weights_at"]) == {"last_raw"}
    assert not (raw / "curve.jsonl").exists()


def test_fine_tuning_learns_and_an_encoder_of_it_can_be_tuned_again(material: Path, tmp_path: Path) -> None:
    easy = ["--augment.auto", "", "--augment.color_jitter", "0", "--augment.scale", "0.5,1.0", "--layer_decay", "none", "--lr", "3e-3"]
    first = main(flags(material, tmp_path / "first", "--run.steps", "40", "--run.micro_batch_size", "8", *easy))
    assert summary(first)["metrics"]["top1/last_raw"]["value"] > 80
    probe = main(flags(material, tmp_path / "second", "--encoder", str(first / "encoder"), "--network.train_blocks", "0"))
    assert summary(probe)["protocol"]["method"] == "linear probe"
    assert summary(first)["protocol"]["method"] == "fine-tuning"


def test_a_head_may_have_its_own_lr(material: Path, tmp_path: Path) -> None:
    folder = main(flags(material, tmp_path / "run", "--head_lr", "1e-2", "--run.steps", "3", "--data.test", ""))
    state = torch.load(folder / "checkpoints" / "step_00000003" / "optimizer.pt", weights_only=True)
    peaks = sorted({group["initial_lr"] for group in state["optimizer"]["param_groups"]})
    assert peaks == pytest.approx([1e-3 * 0.6**3, 1e-3 * 0.6**2, 1e-3 * 0.6, 1e-3, 1e-2])


def test_mixup_trains_on_shares(material: Path, tmp_path: Path) -> None:
    mixed = main(flags(material, tmp_path / "mixed", "--augment.mixup", "0.8", "--augment.cutmix", "1.0", "--run.steps", "2"))
    again = main(flags(material, tmp_path / "again", "--augment.mixup", "0.8", "--augment.cutmix", "1.0", "--run.steps", "2"))
    assert losses(mixed) == losses(again)


# ---- bad input ----------------------------------------------------------------------------------------------------------------------------


def bad_settings(material: Path, tmp_path: Path) -> dict[str, tuple[list[str], type[Exception], str]]:
    out = tmp_path / "run"
    spoilt = tmp_path / "spoilt"
    shutil.copytree(material / "encoder", spoilt)
    state = load_file(str(spoilt / "model.safetensors"))
    save_file({**state, "network.blocks.0.attn.proj.weight": torch.zeros(3, 48)}, str(spoilt / "model.safetensors"))
    holed, other = tmp_path / "holed", tmp_path / "other"
    shutil.copytree(material / "train", holed)
    (holed / "yellow").mkdir()
    shutil.copytree(material / "test", other)
    (other / "red").rename(other / "crimson")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("network:\n  train_block: 2\n")
    return {
        "no encoder": (flags(material, out, "--encoder", ""), ConfigError, "network.encoder is empty"),
        "encoder": (flags(material, out, "--encoder", "mini-clop"), NameNotFound, "nearest: mini-clip"),
        "weights": (flags(material, out, "--encoder", str(spoilt)), DataError, r"attn.proj.weight is \[3, 48\], should be \[48, 48\]"),
        "no folder": (flags(material, out, "--data.train", str(tmp_path / "none")), DataError, "there is no such folder"),
        "empty class": (flags(material, out, "--data.train", str(holed)), DataError, "class folder 'yellow' holds no image"),
        "classes": (flags(material, out, "--data.test", str(other)), DataError, "no classes of .*'crimson'"),
        "same": (flags(material, out, "--data.test", str(material / "train")), DataError, "is the training folder"),
        "recipe key": (flags(material, out, "--recipe", str(recipe)), ConfigError, "train_block.*recipe.yaml.*train_blocks"),
        "flag": (flags(material, out, "--layer_decai", "0.5"), ConfigError, "layer_decai.*layer_decay"),
        "blocks": (flags(material, out, "--network.train_blocks", "3"), ConfigError, "has 2 blocks"),
        "weights choice": (flags(material, out, "--weights", "best_ema", "--ema_decay", "0"), ConfigError, "needs --ema_decay above 0"),
        "odd": (flags(material, out, "--augment.mixup", "1", "--run.micro_batch_size", "3"), ConfigError, "make it even"),
        "augment": (flags(material, out, "--augment.auto", "rand-q9"), ConfigError, "timm cannot make 'rand-q9'"),
        "classes asked": (flags(material, out, "--data.max_classes", "9"), ConfigError, "has 3 classes"),
    }


CASES = [
    "no encoder",
    "encoder",
    "weights",
    "no folder",
    "empty class",
    "classes",
    "same",
    "recipe key",
    "flag",
    "blocks",
    "weights choice",
]


@pytest.mark.parametrize("case", [*CASES, "odd", "augment", "classes asked"])
def test_what_is_wrong_is_said_and_nothing_is_written(case: str, material: Path, tmp_path: Path) -> None:
    arguments, error, words = bad_settings(material, tmp_path)[case]
    with pytest.raises(error, match=words):
        main(arguments)
    assert not (tmp_path / "run").exists()


def test_a_head_of_other_classes_is_not_resumed(material: Path, run: Path, tmp_path: Path) -> None:
    part, fewer = tmp_path / "part", tmp_path / "fewer"
    shutil.copytree(run, part)
    shutil.copytree(material / "train", fewer)
    shutil.rmtree(fewer / "red")
    before = (part / "config.yaml").read_text()
    with pytest.raises(DataError, match=r"a head of 3 classes, --data.train now gives 2 \('red' is in one of the two only\)"):
        main(flags(material, part, "--data.train", str(fewer), "--data.test", "", "--run.resume"))
    assert (part / "config.yaml").read_text() == before


def test_bad_pictures_stop_or_are_counted(material: Path, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(material / "train", folder / "train")
    shutil.copytree(material / "test", folder / "test")
    (folder / "train" / "red" / "note.jpg").write_text("this is text")
    (folder / "test" / "blue" / "empty.png").write_bytes(b"")
    where = ["--data.train", str(folder / "train"), "--data.test", str(folder / "test"), "--data.held_out", "0", "--run.steps", "8"]
    with pytest.raises(ImageError, match=r"note\.jpg.*image \d+ of 25(.|\n)*on_bad_sample skip"):
        main(flags(material, tmp_path / "run", *where))
    skipped = main(flags(material, tmp_path / "skip", *where, "--data.on_bad_sample", "skip"))
    assert (summary(skipped)["missing"], summary(skipped)["n"]) == (1, 12)
    assert "note.jpg" in (skipped / "bad_samples.jsonl").read_text()


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*ftclip*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_of_ftclip_trains_at_tiny_size(path: Path, material: Path, tmp_path: Path) -> None:
    config = load_config(ClassifierConfig, ["--recipe", str(path)])
    assert config.network.pooling == ("cls" if path.stem.startswith("mini") else "norm_then_mean")
    assert config.run.steps > 0 or config.run.epochs > 0
    tiny = [
        "--network.image_size",
        "0",
        "--run.global_batch_size",
        "0",
        "--run.gradient_accumulation_steps",
        "1",
        "--run.precision",
        "fp32",
    ]
    small = flags(
        material, tmp_path / "run", *tiny, "--run.steps", "1", "--run.epochs", "0", "--run.num_workers", "0", "--data.max_classes", "0"
    )
    folder = main(["--recipe", str(path), *small])
    assert summary(folder)["n"] == 12


# ---- the classifier on other folders ------------------------------------------------------------------------------------------------------


def test_eval_classifier_gives_the_trainings_own_figure(material: Path, run: Path, tmp_path: Path) -> None:
    out = evaluate(["--model", str(run / "classifier"), "--images", str(material / "test"), "--out", str(tmp_path / "all")])
    again = json.loads((out / "summary.json").read_text())
    assert again["metrics"] == {name: summary(run)["metrics"][name] for name in ("top1", "top5")}
    assert (out / "answers.jsonl").read_text() == (run / "test" / "answers.jsonl").read_text()
    with pytest.raises(DataError, match="--overwrite"):
        evaluate(["--model", str(run / "classifier"), "--images", str(material / "test"), "--out", str(out)])


def test_classes_without_a_folder_do_not_compete(material: Path, run: Path, tmp_path: Path) -> None:
    shutil.copytree(material / "test", tmp_path / "some")
    shutil.rmtree(tmp_path / "some" / "green")
    arguments = ["--model", str(run / "classifier"), "--images", str(tmp_path / "some")]
    rows = {}
    for name, more in (("some", []), ("all", ["--all_classes"])):
        out = evaluate([*arguments, "--out", str(tmp_path / name / "out") if name == "all" else str(tmp_path / "out"), *more])
        rows[name] = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert {len(row["nearest"]) for row in rows["some"]} == {2}
    assert {len(row["nearest"]) for row in rows["all"]} == {3}
    with pytest.raises(DataError, match="no classifier folder"):
        evaluate([*arguments, "--model", str(run), "--out", str(tmp_path / "x")])


# ---- tables -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((RECIPES.parent / "sweeps").glob("*ftclip*.yaml")), ids=lambda path: path.stem)
def test_every_row_of_an_ftclip_table_is_a_setting_of_its_own(path: Path) -> None:
    sweep = yaml.safe_load(path.read_text())
    assert sweep["script"] == "encoders/train_classifier.py"
    seen: dict[str, str] = {}
    for name, overrides in sweep["rows"].items():
        words = [
            f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in {**sweep["common"], **overrides}.items()
        ]
        config = load_config(ClassifierConfig, ["--recipe", sweep["recipe"], *words], recipe_dir=RECIPES)
        other = seen.setdefault(json.dumps(to_dict(config), sort_keys=True), name)
        assert other == name, f"{name} and {other} are the same run"
