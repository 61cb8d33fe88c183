"""train_uta through its front door: folders, resume, bad input, launchers."""

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
from PIL import Image

from encoders.catalog import load_encoder
from encoders.image_data import ImageFolder, find_images
from encoders.modeling import VisionEncoder, VisionEncoderConfig
from encoders.train_uta import main
from mmkit.errors import ConfigError, DataError, NameNotFound
from mmkit.images import ImageError, ImageSpec

ROOT = Path(__file__).resolve().parent.parent
SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher folder and twenty pictures in two folders."""
    folder = tmp_path_factory.mktemp("uta")
    torch.manual_seed(5)
    config = VisionEncoderConfig(architecture="vit_base_patch16_clip_224", model_args=SIZES, joint_width=40, text_tower="mini-clip")
    VisionEncoder(config).save_pretrained(folder / "teacher")
    random = np.random.default_rng(0)
    for number in range(20):
        path = folder / "images" / ("a" if number < 10 else "b") / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(path)
    return folder


def flags(material: Path, out: Path, *more: str, images: Path | None = None) -> list[str]:
    sizes = [part for key, value in SIZES.items() for part in (f"--encoder.model_args.{key}", str(value))]
    fixed = ["--teacher", str(material / "teacher"), "--data.root", str(images or material / "images"), "--mask.ratio", "0.5"]
    running = ["--run.output_dir", str(out), "--run.steps", "6", "--run.micro_batch_size", "4", "--run.log_every", "1"]
    return ["--encoder.architecture", "eva02_tiny_patch14_224", *sizes, *fixed, *running, *more]


def losses(folder: Path) -> dict[int, tuple[float, float, float]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: (row["loss"], row["cls"], row["patches"]) for row in rows}


def test_a_run_leaves_an_encoder_that_loads_anywhere(material: Path, tmp_path: Path) -> None:
    folder = main(flags(material, tmp_path / "run", "--cls_weight", "0.5"))
    student = load_encoder(folder / "encoder")
    assert (student.joint_width, student.config.text_tower, student.spec.crop_pct) == (40, "mini-clip", 1.0)
    assert student.config.training["kept_patches"] == 8
    assert (student.config.training["step"], student.config.training["objective"]) == (6, "uta")
    assert student(torch.randn(1, 3, 32, 32)).pooler_output.shape == (1, 40)
    assert sorted(losses(folder)) == [1, 2, 3, 4, 5, 6]
    assert json.loads((folder / "manifest.json").read_text())["state"] == "finished"
    assert "mask_token" not in " ".join(student.state_dict())


def test_a_run_can_begin_with_the_encoder_of_another(material: Path, tmp_path: Path) -> None:
    first = main(flags(material, tmp_path / "first", "--run.steps", "1")) / "encoder"
    words = flags(material, tmp_path / "second", "--lr", "1e-20", "--final_lr", "1e-20", "--run.steps", "1", "--encoder.start", str(first))
    cut = [words.index(word) for word in words if word.startswith(("--encoder.architecture", "--encoder.model_args"))]
    second = main([word for place, word in enumerate(words) if not any(place in (begin, begin + 1) for begin in cut)]) / "encoder"
    before, after = load_encoder(first), load_encoder(second)
    assert str(first) in after.config.origin
    for name, tensor in before.state_dict().items():
        torch.testing.assert_close(after.state_dict()[name], tensor, rtol=0, atol=1e-9)
    with pytest.raises(ConfigError, match=r"brings its network along, and encoder.architecture eva02_tiny"):
        main(words)


def test_a_student_learns_its_teacher(material: Path, tmp_path: Path) -> None:
    found = losses(main(flags(material, tmp_path / "run", "--lr", "3e-3", "--run.steps", "40", "--data.cache")))
    assert found[40][0] < 0.5 * found[1][0]


def test_accumulation_views_and_workers_do_not_change_the_law(material: Path, tmp_path: Path) -> None:
    one = losses(main(flags(material, tmp_path / "one")))
    four = losses(main(flags(material, tmp_path / "four", "--run.micro_batch_size", "1", "--run.gradient_accumulation_steps", "4")))
    workers = losses(main(flags(material, tmp_path / "workers", "--run.num_workers", "2", "--data.cache")))
    assert workers == one
    for step, values in one.items():
        assert four[step] == pytest.approx(values, rel=1e-4), step
    pair = main(flags(material, tmp_path / "pair", "--mask.type", "complementary", "--mask.views", "2"))
    assert len(losses(pair)) == 6


def test_a_larger_student_crop_meets_the_teachers_grid(material: Path, tmp_path: Path) -> None:
    larger = ["--encoder.model_args.img_size", "64", "--encoder.model_args.patch_size", "16", "--run.steps", "2"]
    assert load_encoder(main(flags(material, tmp_path / "run", *larger)) / "encoder").spec.size == 64


def start(arguments: list[str], environment: dict[str, str], *launcher: str) -> subprocess.Popen[str]:
    command = [sys.executable, *launcher, str(ROOT / "encoders" / "train_uta.py"), *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_same_losses(material: Path, tmp_path: Path, child_environment: dict[str, str]) -> None:
    whole = losses(main(flags(material, tmp_path / "whole", "--run.steps", "60")))
    arguments = flags(material, tmp_path / "killed", "--run.steps", "60", "--run.save_every", "7")
    process = start(arguments, child_environment)
    log = tmp_path / "killed" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if log.is_file() and log.read_text().count("\n") >= 17:
            break
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()[0]
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    before = log.read_text().count("\n")
    assert 17 <= before < 60
    assert losses(main([*arguments, "--run.resume"])) == whole  # bit for bit


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["uta", "uta+mim"])
def test_two_processes_equal_one(objective: str, material: Path, tmp_path: Path, child_environment: dict[str, str]) -> None:
    one = losses(main(flags(material, tmp_path / "one", "--objective", objective)))
    arguments = flags(material, tmp_path / "two", "--objective", objective, "--run.micro_batch_size", "2")
    process = start(arguments, child_environment, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29641")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    for step, values in losses(tmp_path / "two").items():
        assert one[step] == pytest.approx(values, rel=1e-4), step
    first, second = load_encoder(tmp_path / "one" / "encoder"), load_encoder(tmp_path / "two" / "encoder")
    for name, tensor in first.state_dict().items():
        torch.testing.assert_close(second.state_dict()[name], tensor, rtol=1e-3, atol=1e-4)


# ---- bad input --------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def broken(material: Path, tmp_path: Path) -> Path:
    """The pictures, three of them spoilt."""
    folder = tmp_path / "broken"
    shutil.copytree(material / "images", folder)
    (folder / "a" / "notes.jpg").write_text("this is a text file")
    whole = (folder / "a" / "003.png").read_bytes()
    (folder / "a" / "003.png").write_bytes(whole[: len(whole) // 2])
    (folder / "b" / "empty.jpeg").write_bytes(b"")
    return folder


def test_a_bad_picture_stops_the_run_by_name(material: Path, broken: Path, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"(003\.png|notes\.jpg|empty\.jpeg).*image \d+ of \d+(.|\n)*on_bad_sample skip"):
        main(flags(material, tmp_path / "run", images=broken))
    assert not (tmp_path / "run" / "encoder").exists()


def test_skipped_pictures_are_counted_and_listed(material: Path, broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = main(flags(material, tmp_path / "run", "--data.on_bad_sample", "skip", images=broken))
    listed = [json.loads(line)["image"] for line in (folder / "bad_samples.jsonl").read_text().splitlines()]
    assert sorted(Path(name).name for name in listed) == ["003.png", "empty.jpeg", "notes.jpg"]
    assert "3 unreadable images were left out" in capsys.readouterr().out


def bad_settings(material: Path, tmp_path: Path) -> dict[str, tuple[list[str], type[Exception], str]]:
    out = tmp_path / "run"
    spoilt = tmp_path / "spoilt"
    shutil.copytree(material / "teacher", spoilt)
    from safetensors.torch import load_file, save_file

    state = load_file(str(spoilt / "model.safetensors"))
    save_file({**state, "network.head.weight": torch.zeros(3, 48)}, str(spoilt / "model.safetensors"))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("mask:\n  ration: 0.5\n")
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.txt").write_text("mine")
    return {
        "no data": (flags(material, out, "--data.root", str(tmp_path / "none")), DataError, "there is no such folder"),
        "no images": (flags(material, out, "--data.root", str(material / "teacher")), DataError, "holds no image"),
        "teacher": (flags(material, out, "--teacher", "mini-clop"), NameNotFound, "nearest: mini-clip"),
        "weights": (flags(material, out, "--teacher", str(spoilt)), DataError, r"head.weight is \[3, 48\], should be \[40, 48\]"),
        "recipe key": (flags(material, out, "--recipe", str(recipe)), ConfigError, "ration.*recipe.yaml.*ratio"),
        "flag": (flags(material, out, "--cls_wait", "0.5"), ConfigError, "cls_wait.*cls_weight"),
        "folder": (flags(material, full), ConfigError, "holds files already"),
        "share": (flags(material, out, "--cls_weight", "2"), ConfigError, "a share from 0 to 1"),
        "start": (
            ["--encoder.start", "mini-clip", *flags(material, out)[12:]],
            ConfigError,
            "mini-clip.*ends in 256 channels.*targets of 40",
        ),
    }


@pytest.mark.parametrize("case", ["no data", "no images", "teacher", "weights", "recipe key", "flag", "folder", "share", "start"])
def test_what_is_wrong_is_said_and_nothing_is_written(case: str, material: Path, tmp_path: Path) -> None:
    arguments, error, words = bad_settings(material, tmp_path)[case]
    with pytest.raises(error, match=words):
        main(arguments)
    assert not (tmp_path / "run").exists()
    assert (tmp_path / "full" / "thesis.txt").read_text() == "mine"


@pytest.mark.slow
def test_the_command_line_says_it_without_a_traceback(material: Path, tmp_path: Path, child_environment: dict[str, str]) -> None:
    output, _ = (process := start(flags(material, tmp_path / "run", "--teacher", "mini-clop"), child_environment)).communicate(timeout=120)
    assert process.returncode == 2
    assert "error: no encoder 'mini-clop'" in output
    assert "Traceback" not in output


def test_a_full_disk_leaves_no_half_written_encoder(material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(self: Any, folder: str, **kwargs: Any) -> None:
        Path(folder, "config.json").write_text("{")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(VisionEncoder, "save_pretrained", no_space)
    with pytest.raises(OSError, match="No space left"):
        main(flags(material, tmp_path / "run", "--run.steps", "1"))
    assert not list((tmp_path / "run").glob("*encoder*"))


# ---- the folder of images ---------------------------------------------------------------------------------------------------------------


def test_images_are_found_in_order_and_hidden_ones_left_out(material: Path, tmp_path: Path) -> None:
    shutil.copytree(material / "images", tmp_path / "i")
    (tmp_path / "i" / ".thumbs").mkdir()
    shutil.copy(tmp_path / "i" / "a" / "000.png", tmp_path / "i" / ".thumbs" / "x.png")
    assert [path.name for path in find_images(tmp_path / "i")] == [f"{number:03d}.png" for number in range(20)]


def test_a_crop_depends_on_seed_epoch_and_index_and_not_on_the_cache(material: Path) -> None:
    spec = ImageSpec(size=32)
    plain, cached = ImageFolder(material / "images", spec, seed=1), ImageFolder(material / "images", spec, seed=1, cache=True)
    cached.get(0, 3)
    first, again = plain.get(2, 3), cached.get(2, 3)
    assert first is not None
    assert again is not None
    assert first["pixels"].dtype == torch.uint8
    assert torch.equal(first["pixels"], again["pixels"])
    other = plain.get(3, 3)
    assert other is not None
    assert not torch.equal(first["pixels"], other["pixels"])
