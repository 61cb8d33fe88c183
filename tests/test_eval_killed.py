"""An evaluation that is killed, three times over, and one that several processes share, give the answers of an undisturbed one."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from llava_tiny import COLOURS, picture, write_data, write_parts

from llm_stage import eval_vqa
from llm_stage.train_llava import main as train
from mmkit import compare
from mmkit.records import read_jsonl

QUESTIONS = 120


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    encoder, llm = write_parts(folder)
    data, images = write_data(folder / "data", rows=8)
    train([
        "--stage", "2", "--encoder", str(encoder), "--llm", str(llm), "--json", str(data), "--images", str(images), "--template", "own",
        "--run.steps", "1", "--run.micro_batch_size", "2", "--run.output_dir", str(folder / "run"),
    ])  # fmt: skip
    (folder / "shown").mkdir()
    questions, annotations = [], []
    for number in range(QUESTIONS):
        colour = list(COLOURS)[number % 4]
        picture(colour, seed=number).save(folder / "shown" / f"{number}.png")
        words = "what colour is it " + "really " * (number % 7)
        questions.append({"question_id": number, "image": f"{number}.png", "question": words})
        annotations.append({"question_id": number, "answers": [{"answer": colour}] * 10})
    (folder / "questions.json").write_text(json.dumps({"questions": questions}))
    (folder / "annotations.json").write_text(json.dumps({"annotations": annotations}))
    return folder


def command(world: Path, out: Path, *launcher: str) -> list[str]:
    files = [f"--{name}" if at else str(world / f"{name}.json") for name in ("questions", "annotations") for at in (True, False)]
    start = [sys.executable, *(launcher or ("-m",)), "llm_stage.eval_vqa"]
    return [
        *start,
        "--model",
        str(world / "run" / "model"),
        *files,
        "--images",
        str(world / "shown"),
        "--batch_size",
        "1",
        "--out",
        str(out),
    ]


def answers(out: Path) -> dict[int, str]:
    rows = read_jsonl(out / "answers.jsonl")
    assert len({row["question_id"] for row in rows}) == len(rows) == QUESTIONS  # none lost, none twice
    return {row["question_id"]: row["answer"] for row in rows}


@pytest.fixture
def undisturbed(world: Path, child_environment: dict[str, str]) -> Path:
    if not (world / "whole" / "summary.json").is_file():
        subprocess.run(command(world, world / "whole"), env=child_environment, check=True, capture_output=True, timeout=300)
    return world / "whole"


@pytest.mark.slow
def test_killed_three_times_in_a_row(world: Path, undisturbed: Path, tmp_path: Path, child_environment: dict[str, str]) -> None:
    out, chance = tmp_path / "out", random.Random(int.from_bytes(os.urandom(4)))
    seen = 0
    for _ in range(3):
        process = subprocess.Popen(command(world, out), env=child_environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        aim, end = seen + chance.randint(1, 20), time.monotonic() + 120
        while seen < aim and process.poll() is None and time.monotonic() < end:
            seen = (out / "answers.jsonl").read_bytes().count(b"\n") if (out / "answers.jsonl").is_file() else 0
            time.sleep(0.002)
        assert process.poll() is None, "it ended before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert 0 < seen < QUESTIONS
    subprocess.run(command(world, out), env=child_environment, check=True, capture_output=True, timeout=300)
    assert answers(out) == answers(undisturbed)
    assert json.loads((out / "summary.json").read_text())["metrics"] == json.loads((undisturbed / "summary.json").read_text())["metrics"]


def test_another_batch_size_is_no_difference(world: Path, tmp_path: Path) -> None:
    for size in (1, 16):
        flags = command(world, tmp_path / f"batch_{size}" / "tiny" / "own_vqa")[3:]
        eval_vqa.main([*flags, "--batch_size", str(size)])
    found = compare.main([str(tmp_path / "batch_1"), str(tmp_path / "batch_16"), "--out", str(tmp_path / "out.json")])
    rows = json.loads(found.read_text())
    assert rows
    assert all(row["difference"] == 0 and not row["stands"] for row in rows)


@pytest.mark.slow
def test_two_processes_share_the_questions(
    world: Path, undisturbed: Path, tmp_path: Path, child_environment: dict[str, str], free_port: int
) -> None:
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port), "-m")
    subprocess.run(command(world, tmp_path / "out", *launcher), env=child_environment, check=True, capture_output=True, timeout=300)
    assert answers(tmp_path / "out") == answers(undisturbed)
    assert not list((tmp_path / "out").glob("answers.rank*"))
