"""Stages side by side: order, threads, logs, and that Ctrl-C, a failure, a death and a killed parent leave everything saved."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console

from apps.lanes import last_lines
from apps.quickstart_plan import Stage
from apps.stages import Journal, Stopped, run_all
from mmkit.config import cli_entry
from mmkit.errors import TrainingError

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 120.0  # seconds for what takes a fraction of one: the machine may be busy


def wait_for(path: Path) -> None:
    """Wait until a file is there."""
    end = time.monotonic() + PATIENCE
    while not path.is_file():
        if time.monotonic() > end:
            raise TimeoutError(f"{path} did not come")
        time.sleep(0.02)


# ---- stages, run in lanes' processes ----------------------------------------------------------------------------------------------------


def meets(argv: list[str]) -> None:
    """Wait until the other lane is at work too, then finish."""
    import torch

    mine, other = map(Path, argv[:2])
    mine.mkdir(parents=True)
    (mine / "begun").touch()
    wait_for(other / "begun")
    print("met the other lane")
    (mine / "summary.json").write_text(json.dumps({"threads": torch.get_num_threads(), "typed": sys.argv[:3], "process": os.getpid()}))


def follows(argv: list[str]) -> None:
    """Finish at once."""
    Path(argv[0]).mkdir(parents=True)
    (Path(argv[0]) / "summary.json").write_text(json.dumps({"process": os.getpid()}))


def waits(argv: list[str]) -> None:
    """Work until asked to stop, then save: as a training does."""
    folder, stop = Path(argv[0]), threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "begun").touch()
    stop.wait(PATIENCE)
    (folder / "saved").touch()
    raise SystemExit(130)


def finishes_when_asked(argv: list[str]) -> None:
    """Be asked to stop when there is nothing left to do."""
    folder, stop = Path(argv[0]), threading.Event()
    signal.signal(signal.SIGINT, lambda *_: stop.set())
    folder.mkdir(parents=True)
    (folder / "begun").touch()
    stop.wait(PATIENCE)
    (folder / "summary.json").write_text("{}")


def fails(argv: list[str]) -> None:
    """Fail once the other lane is at work."""
    wait_for(Path(argv[1]) / "begun")
    fails_at_once(argv)


def fails_at_once(argv: list[str]) -> None:
    """Fail."""
    raise ValueError("the projector takes width 192")


def dies(argv: list[str]) -> None:
    """Die as a process that takes too much memory does."""
    wait_for(Path(argv[1]) / "begun")
    print("loading a very large model", flush=True)
    os._exit(9)


# ---- the job ----------------------------------------------------------------------------------------------------------------------------


def job(out: Path, **lanes: Sequence[str]) -> list[Stage]:
    """A job of a first stage, lanes of functions from above, and a last stage."""

    def stage(name: str, function: str, lane: str = "", other: str = "") -> Stage:
        folder = out / name
        return Stage(
            name, "eval vqa", f"{__name__}:{function}", (str(folder), str(out / other)), folder, folder / "summary.json", lane=lane
        )

    names = list(lanes)
    chains = [
        stage(f"{lane}_{place}", function, lane, f"{names[(names.index(lane) == 0) % len(names)]}_{place}")
        for lane, functions in lanes.items()
        for place, function in enumerate(functions)
    ]
    return [stage("first", "follows"), *chains, stage("last", "follows")]


def journal(out: Path) -> Journal:
    """A journal of the test's own."""
    return Journal(out / "job.json", {"seed": 0}, "mmkit job")


def test_lanes_run_side_by_side_each_in_order_with_its_share_of_the_threads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stages = job(tmp_path, a=["meets", "follows"], b=["meets", "follows"])
    run_all(Console(), stages, journal(tmp_path), at_once=2, threads=6)
    assert all(stage.complete for stage in stages)
    found = {stage.name: json.loads(stage.done.read_text()) for stage in stages}
    assert found["a_0"]["threads"] == found["b_0"]["threads"] == 3
    assert found["a_0"]["typed"] == ["mmkit", "eval", "vqa"]
    assert (
        found["a_0"]["process"] == found["a_1"]["process"] != found["b_0"]["process"]
    )  # a lane keeps its process, and what it has imported
    assert found["first"]["process"] == found["last"]["process"] == os.getpid()
    assert "met the other lane" in (tmp_path / "logs" / "a.log").read_text()
    said = capsys.readouterr().out
    assert "met the other lane" not in said
    assert said.index("[2 of 6] a_0: done") < said.index("[3 of 6] a_1: begins")
    noted = json.loads((tmp_path / "job.json").read_text())
    assert set(noted["stages"]) == {stage.name for stage in stages}
    assert noted["seconds"] < sum(entry["seconds"] for entry in noted["stages"].values()) + 60


def test_one_at_once_runs_everything_here_in_the_plan_s_order(tmp_path: Path) -> None:
    stages = job(tmp_path, a=["follows"], b=["follows"])
    run_all(Console(), stages, journal(tmp_path), at_once=1, threads=2)
    assert {json.loads(stage.done.read_text())["process"] for stage in stages} == {os.getpid()}


def press_ctrl_c(out: Path) -> threading.Thread:
    """Press Ctrl-C as soon as lanes a and b are at work."""

    def press() -> None:
        for lane in "ab":
            wait_for(out / f"{lane}_0" / "begun")
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press)
    thread.start()
    return thread


def test_ctrl_c_stops_every_lane_after_it_has_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    thread = press_ctrl_c(tmp_path)
    with pytest.raises(Stopped) as stop:
        run_all(Console(), job(tmp_path, a=["waits", "follows"], b=["waits"]), journal(tmp_path), at_once=2, threads=2)
    thread.join()
    assert stop.value.code == 130
    assert (tmp_path / "a_0" / "saved").is_file()
    assert (tmp_path / "b_0" / "saved").is_file()
    assert not (tmp_path / "a_1").exists()
    assert "stopped in stage 2 of 5 (a_0) and stage 4 of 5 (b_0); this goes on with it:\n  mmkit job" in capsys.readouterr().err


def test_a_lane_whose_turn_has_not_come_is_not_begun_and_not_forgotten(tmp_path: Path) -> None:
    """Ctrl-C in the last stage of all lanes at work, which finish: the job is not done while another lane waits."""
    stages = job(tmp_path, a=["finishes_when_asked"], b=["finishes_when_asked"], c=["follows"])

    thread = press_ctrl_c(tmp_path)
    with pytest.raises(Stopped) as stop:
        run_all(Console(), stages, journal(tmp_path), at_once=2, threads=2)
    thread.join()
    assert stop.value.stages == ("stage 4 of 5 (c_0)",)
    assert not (tmp_path / "c_0").exists()
    assert not (tmp_path / "last").exists()


def test_when_a_lane_fails_the_others_save_and_the_error_names_the_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="width 192") as caught:
        run_all(Console(), job(tmp_path, a=["fails"], b=["waits"]), journal(tmp_path), at_once=2, threads=2)
    assert any("in stage 2 of 4 (a_0) of the job; alone: mmkit eval vqa" in note for note in caught.value.__notes__)
    assert "stage 2 of 4 (a_0) failed" in capsys.readouterr().err
    assert (tmp_path / "b_0" / "saved").is_file()
    assert "width 192" in (tmp_path / "logs" / "a.log").read_text()


def test_what_a_job_adds_to_an_error_is_printed_with_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        run_all(Console(), job(tmp_path, a=["fails_at_once"]), journal(tmp_path))

    with pytest.raises(SystemExit):
        cli_entry(main)
    assert "error: the projector takes width 192\n  in stage 2 of 3 (a_0) of the job; alone: mmkit eval vqa" in capsys.readouterr().err


def test_a_process_that_dies_is_named_with_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"lane 'a' died without a word.*--side_by_side 1(.|\n)*loading a very large model"):
        run_all(Console(), job(tmp_path, a=["dies"], b=["waits"]), journal(tmp_path), at_once=2, threads=2)
    assert (tmp_path / "b_0" / "saved").is_file()


def test_a_killed_parent_leaves_no_process_at_work(tmp_path: Path, child_environment: dict[str, str]) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\nfrom rich.console import Console\n"
        "from apps.stages import run_all\nfrom tests import test_lanes\n"
        "if __name__ == '__main__':\n"
        "    out = Path(sys.argv[1])\n"
        "    run_all(Console(), test_lanes.job(out, a=['waits'], b=['waits']), test_lanes.journal(out), at_once=2, threads=2)\n"
    )
    environment = {**child_environment, "PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen([sys.executable, str(script), str(tmp_path / "out")], cwd=ROOT, env=environment)
    try:
        for lane in "ab":
            wait_for(tmp_path / "out" / f"{lane}_0" / "begun")
    finally:
        parent.kill()
        parent.wait()
    for lane in "ab":
        wait_for(tmp_path / "out" / f"{lane}_0" / "saved")


def test_a_bar_drawn_anew_is_a_line_and_empty_ones_do_not_count(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    assert last_lines(log, 1) == []
    log.write_bytes("step 1\n\nquestions:  10%\rquestions: 100% ▏\n\n".encode())
    assert last_lines(log, 2) == ["questions:  10%", "questions: 100% ▏"]
