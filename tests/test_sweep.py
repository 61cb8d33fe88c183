"""`mmkit sweep`: rows over seeds from one command, kept when finished, and the arithmetic of its table."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from apps import sweep
from apps.sweep_table import Table
from encoders.train_uta import RECIPES, UTAConfig
from mmkit.config import load_config
from mmkit.errors import ConfigError, NameNotFound, TrainingError

SWEEPS = sorted(path for folder in sweep.FOLDERS for path in folder.glob("*.yaml"))
TINY = {"embed_dim": 24, "depth": 1, "num_heads": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders as `mmkit data mini` makes them, with eight pictures in each."""
    folder = tmp_path_factory.mktemp("data")
    for part in ("images/train", "classification/train/cat", "classification/test/cat", "classification/test/dog"):
        (folder / part).mkdir(parents=True)
        for number in range(8):
            pixels = np.random.default_rng(number).integers(0, 256, (48, 48, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / part / f"{number}.png")
    return folder


def flags(data: Path, out: Path, *more: str) -> list[str]:
    sizes = [word for key, value in TINY.items() for word in (f"--common.encoder.model_args.{key}", str(value))]
    small = ["--common.run.steps", "2", "--common.run.micro_batch_size", "2", "--common.warmup", "1", "--threads", "1"]
    return ["uta_objectives", "--data", str(data), "--out", str(out), "--prepare", "{}", *sizes, *small, *more]


def test_one_command_trains_evaluates_and_tells(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = sweep.main(flags(data, tmp_path / "out", "--only", "uta,mim", "--seeds", "0,1"))
    found = json.loads((out / "sweep.json").read_text())
    for row in ("uta", "mim"):
        figure = found["rows"][row]["metrics"]["zeroshot.top1"]
        assert figure["n"] == 2
        assert set(figure["by_seed"]) == {"0", "1"}
        assert figure["mean"] == pytest.approx(sum(figure["by_seed"].values()) / 2)
    assert found["rows"]["uta"]["metrics"]["zeroshot.top1"]["difference"] is None
    assert found["rows"]["mim"]["metrics"]["zeroshot.top1"]["difference"]["n"] == 2
    assert found["rows"]["fd"]["metrics"] == {}
    assert "| mim | 2 of 2 |" in (out / "sweep.md").read_text()
    trained = yaml.safe_load((out / "runs" / "mim" / "seed_1" / "config.yaml").read_text())
    assert (trained["objective"], trained["run"]["seed"], trained["run"]["steps"]) == ("mim", 1, 2)
    assert trained["data"]["root"][0] == str(data / "images" / "train")
    capsys.readouterr()

    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("model.safetensors")}
    sweep.main(flags(data, tmp_path / "out", "--only", "uta,mim", "--seeds", "0,1"))
    assert "8 runs, 0 to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in out.rglob("model.safetensors")} == stamps

    sweep.main(flags(data, tmp_path / "out", "--only", "uta", "--seeds", "0,1,2"))  # one seed more: the others are kept
    assert "6 runs, 2 to do" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"seed_0 is there, and its settings were others(.|\n)*--out .*out_2"):
        sweep.main(flags(data, tmp_path / "out", "--only", "uta", "--seeds", "0", "--rows.uta.lr", "1e-4"))


def test_a_row_that_fails_is_named_and_the_others_go_on(data: Path, tmp_path: Path) -> None:
    arguments = flags(data, tmp_path / "out", "--only", "fd,uta", "--seeds", "0", "--rows.fd.mask.ratio", "2")
    with pytest.raises(TrainingError, match=r"1 of 4 runs failed(.|\n)*fd, seed 0, train: mask.ratio is 2"):
        sweep.main(arguments)
    found = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert found["rows"]["fd"]["metrics"] == {}
    assert found["rows"]["uta"]["metrics"]["zeroshot.top1"]["n"] == 1
    assert found["failed"][0]["row"] == "fd"
    assert "Failed:" in (tmp_path / "out" / "sweep.md").read_text()


@pytest.mark.parametrize("how, code", [(KeyboardInterrupt(), 130), (SystemExit(143), 143)], ids=["Ctrl-C", "SIGTERM"])
def test_an_interrupted_training_is_gone_on_with(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: BaseException, code: int
) -> None:
    arguments = flags(data, tmp_path / "out", "--only", "uta", "--seeds", "0", "--common.run.steps", "4", "--common.run.save_every", "2")
    from encoders.teachers import Teacher

    tokens, calls = Teacher.tokens, iter(range(100))

    def interrupted(self: Teacher, images: object) -> object:
        if next(calls) == 2:
            raise how
        return tokens(self, images)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Teacher, "tokens", interrupted)
        with pytest.raises(SystemExit) as stop:
            sweep.main(arguments)
    assert stop.value.code == code
    seen: list[int] = []
    monkeypatch.setattr(Teacher, "tokens", lambda self, images: (seen.append(1), tokens(self, images))[1])
    sweep.main(arguments)
    assert len(seen) == 2  # steps 3 and 4 only


@pytest.mark.parametrize(
    ("more", "error", "words"),
    [
        (["--only", "utta"], NameNotFound, "no row of this sweep named 'utta'; nearest: uta"),
        (["--baseline", "clip"], NameNotFound, "no row of this sweep named 'clip'"),
        (["--seeds", "1,1"], ConfigError, "each seed once"),
        (["--script", "encoders/train_utta.py"], ConfigError, "'script' names the script 'encoders/train_utta.py', and there is none"),
        (["--recipe", "mini_utta"], ConfigError, "mini_utta: no such file, and no recipe of that name"),
        (["--rows.uta", "3"], ConfigError, r"rows\.uta is 3; flags and their values"),
        (["--evaluate.zeroshot.script", "null"], ConfigError, "'zeroshot' names the script None"),
    ],
)
def test_what_is_wrong_with_a_sweep_is_said(more: list[str], error: type[Exception], words: str, data: Path, tmp_path: Path) -> None:
    with pytest.raises(error, match=words):
        sweep.main([*flags(data, tmp_path / "out"), *more])


def test_a_sweep_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"uta_objective: no such file, and no recipe of that name; nearest: uta_objectives"):
        sweep.main(["uta_objective", "--out", str(tmp_path / "out")])
    with pytest.raises(ConfigError, match="a sweep needs `script`"):
        sweep.main(["--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_launcher_starts_the_trainings(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(sweep.ROOT))
    one = ("--only", "uta", "--seeds", "0", "--metrics", "zeroshot.top5", "--launcher")
    out = sweep.main(flags(data, tmp_path / "out", *one, sys.executable))
    assert list(json.loads((out / "sweep.json").read_text())["rows"]["uta"]["metrics"]) == ["zeroshot.top5"]
    with pytest.raises(TrainingError, match="left with code"):
        sweep.main(flags(data, tmp_path / "other", *one, "false"))


def test_flags_are_filled_and_later_ones_win() -> None:
    settings = {"run.steps": 600, "lr": 1e-5, "name": None, "data": {"root": ["{data}/a"], "cache": True}, "run": {"steps": 3}}
    assert sweep.flags_of(settings, {"data": "D"}) == (
        "--lr=1e-05",
        "--name=null",
        '--data.root=["D/a"]',
        "--data.cache=true",
        "--run.steps=3",
    )


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_row_of_a_sweep_for_uta_is_a_setting(path: Path, tmp_path: Path) -> None:
    config = load_config(sweep.SweepConfig, ["--sweep", str(path), "--out", str(tmp_path)], recipe_flag="sweep")
    if config.script != "encoders/train_uta.py":
        pytest.skip(f"{path.name} is for {config.script}, whose own tests read it")
    jobs = [job for job in sweep.plan(config) if job.name == "train"]
    assert len(jobs) == len(config.rows) * len(config.seeds)
    read = {job.row: load_config(UTAConfig, job.argv, recipe_dir=RECIPES) for job in jobs}
    assert len({repr((one.objective, one.mask, one.encoder, one.cls_weight)) for one in read.values()}) == len(read)  # no two are the same


def test_the_table_takes_differences_seed_by_seed(tmp_path: Path) -> None:
    table = Table("t", {"a": {}, "b": {"lr": 1}, "c": {}}, [0, 1, 2], baseline="a")
    for row, values in {"a": [10, 20, 30], "b": [11, 21, 32]}.items():
        for seed, value in enumerate(values):
            (tmp_path / "summary.json").write_text(json.dumps({"metrics": {"top1": {"value": value, "n": 5}, "plain": value}}))
            table.read(row, seed, "eval", tmp_path / "summary.json")
    text = table.markdown()
    assert "| b | 3 of 3 | 21.33 ± 10.50 [-4.76, 47.43] | +1.33 ± 0.58 [-0.10, +2.77] |" in text
    assert "| c | 0 of 3 | - | - | - | - |" in text
    figures = table.as_dict()["rows"]["b"]
    assert figures["settings"] == {"lr": 1}
    assert figures["metrics"]["eval.plain"]["by_seed"] == {"0": 11.0, "1": 21.0, "2": 32.0}
