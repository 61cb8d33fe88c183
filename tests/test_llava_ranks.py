"""LLaVA on several ranks: ZeRO-1, 2, 3 and DDP equal one process, also when one rank has only text; resume; the launchers."""

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from llava_ranks import copy_as_killed
from llava_tiny import write_data, write_parts
from safetensors.torch import load_file

from llm_stage.train_llava import main
from mmkit.batches import StreamOrder

ROOT = Path(__file__).parents[1]
STEPS, GLOBAL_BATCH = 4, 4
FULL, LORA = {"lr": 2e-3}, {"lr": 2e-3, "lora.rank": 4, "lora.alpha": 8}
QLORA = {**LORA, "lora.quantize": "nf4"}
STAGES: dict[str, tuple[int, dict[str, Any]]] = {"stage1": (1, {}), "full": (2, FULL), "lora": (2, LORA), "qlora": (2, QLORA)}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Parts, a stage 1, and data whose order gives the second of two ranks text-only rows throughout."""
    folder = tmp_path_factory.mktemp("ranks")
    write_parts(folder)
    write_data(folder, rows=STEPS * GLOBAL_BATCH)
    rows = json.loads((folder / "data.json").read_text())
    order = StreamOrder(rows, seed=0)
    for position in range(1, len(rows), 2):  # micro-batches of one row: the odd positions are the second rank's
        row = rows[order(position)[1]]
        del row["image"]
        row["conversations"][0]["value"] = "say " + row["conversations"][1]["value"].split()[-1]
    (folder / "data.json").write_text(json.dumps(rows))
    main(arguments(folder, folder / "first", "stage1", micro_batch_size=4, steps=2))
    return folder


def arguments(world: Path, output: Path, kind: str, **changes: Any) -> list[str]:
    stage, settings = STAGES[kind]
    parts = ["--encoder", world / "encoder", "--llm", world / "llm"] if stage == 1 else ["--pretrained", world / "first" / "model"]
    data = ["--json", world / "data.json", "--images", world / "images"]
    common = {"steps": STEPS, "micro_batch_size": 1, "global_batch_size": GLOBAL_BATCH, "gradient_accumulation_steps": 0, "log_every": 1}
    flags = {**common, "projector_lr": 2e-3, "check_saving": "false", **settings, **changes}
    words = ["--stage", stage, *parts, *data, "--output_dir", output]
    return [str(word) for word in [*words, *(item for key, value in flags.items() for item in (f"--{key}", value))]]


def zero(stage: int, **more: Any) -> str:
    return json.dumps({"zero_optimization": {"stage": stage, **more}})


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted((folder / "model").glob("*.safetensors")) for name, tensor in load_file(file).items()}


def equal(run: Path, reference: Path, loss: float = 1e-4, weight: float = 1e-5) -> None:
    """Hold the losses and the saved folder of a run against another's."""
    assert losses(run) == pytest.approx(losses(reference), rel=loss)
    found, wanted = weights(run), weights(reference)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=weight, msg=lambda text, name=name: f"{run.name}, {name}: {text}")
        assert "vision_tower" not in name or torch.equal(found[name], tensor)


def a_port() -> int:
    with socket.socket() as place:
        place.bind(("localhost", 0))
        return int(place.getsockname()[1])


def on_two_ranks(environment: dict[str, str], folder: Path, jobs: list[dict[str, Any]]) -> None:
    """Do jobs of llava_ranks.py on two processes without a launcher."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    shared = {**environment, "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(a_port()), "DS_ACCELERATOR": "cpu"}
    ranks = []
    for rank in ("0", "1"):
        with open(folder / f"rank{rank}.log", "wb") as log:
            command = [sys.executable, str(ROOT / "tests" / "llava_ranks.py"), str(folder / "jobs.json")]
            own = {**shared, "RANK": rank, "LOCAL_RANK": rank}
            ranks.append(subprocess.Popen(command, env=own, stdout=log, stderr=subprocess.STDOUT))
    try:
        codes = [process.wait(timeout=1000) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert codes == [0, 0], "\n".join((folder / f"rank{rank}.log").read_text()[-3000:] for rank in "01")


OFFLOAD = json.dumps(
    {
        "zero_force_ds_cpu_optimizer": False,  # DeepSpeed's own CPU Adam would be compiled for a minute
        "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}},
    }
)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "zero1_full": ("full", {"deepspeed": zero(1)}),
    "zero2_stage1": ("stage1", {"deepspeed": zero(2)}),
    "zero2_full": ("full", {"deepspeed": zero(2), "save_every": 2}),
    "zero2_lora": ("lora", {"deepspeed": zero(2)}),
    "zero2_qlora": ("qlora", {"deepspeed": zero(2), "save_every": 2}),
    "zero3_stage1": ("stage1", {"deepspeed": zero(3)}),
    "zero3_full": ("full", {"deepspeed": zero(3), "check_saving": "true", "save_every": 2}),
    "zero3_lora": ("lora", {"deepspeed": zero(3)}),
    "zero3_offload": ("full", {"deepspeed": OFFLOAD, "gradient_checkpointing": "true"}),
}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_zero_on_two_ranks_equals_one_process_and_resumes(world: Path, tmp_path: Path, child_environment: dict[str, str]) -> None:
    jobs: list[dict[str, Any]] = [{"argv": arguments(world, tmp_path / name, kind, **more)} for name, (kind, more) in CASES.items()]
    resumed = [name for name, (_, more) in CASES.items() if "save_every" in more]
    for name in resumed:
        jobs.append({"copy": str(tmp_path / name), "to": str(tmp_path / f"{name}_again"), "after": 2})
        jobs.append({"argv": [*arguments(world, tmp_path / f"{name}_again", CASES[name][0], **CASES[name][1]), "--resume"]})
    on_two_ranks(child_environment, tmp_path, jobs)
    for kind in STAGES:
        main(arguments(world, tmp_path / kind, kind))
    for name, (kind, _) in CASES.items():
        equal(tmp_path / name, tmp_path / kind)
    for name in resumed:
        equal(tmp_path / f"{name}_again", tmp_path / name, loss=1e-6, weight=1e-6)
    assert (tmp_path / "rank0.log").read_text().count("goes on from") == len(resumed)


# -- launchers -------------------------------------------------------------------------------------------------------------------------

SCRIPT = ROOT / "llm_stage" / "train_llava.py"
BIN = Path(sys.executable).parent


def launch(environment: dict[str, str], *words: Any) -> str:
    """Run a command, which must end well, and give what it said."""
    done = subprocess.run([str(word) for word in words], env=environment, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_torchrun_goes_on_on_two_ranks_with_what_one_began(world: Path, tmp_path: Path, child_environment: dict[str, str]) -> None:
    jobs = []
    for kind in ("full", "lora"):
        flags = arguments(world, tmp_path / kind, kind, save_every=2)
        main(flags)
        copy_as_killed(tmp_path / kind, tmp_path / f"{kind}_again", after=2)
        jobs.append({"argv": [*flags, "--output_dir", str(tmp_path / f"{kind}_again"), "--num_workers", "1", "--resume"]})
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    rendezvous = ["--nproc_per_node", 2, "--master_port", a_port()]
    said = launch(child_environment, BIN / "torchrun", *rendezvous, ROOT / "tests" / "llava_ranks.py", tmp_path / "jobs.json")
    assert said.count("goes on from") == 2
    for kind in ("full", "lora"):
        equal(tmp_path / f"{kind}_again", tmp_path / kind, loss=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_launcher_starts_it(world: Path, tmp_path: Path, child_environment: dict[str, str]) -> None:
    environment = {**child_environment, "DS_ACCELERATOR": "cpu"}
    launchers: dict[str, list[Any]] = {
        "python": [sys.executable],
        "accelerate": [BIN / "accelerate", "launch", "--cpu", "--num_processes", 1],  # on a CPU it starts one, whatever it is told
        "deepspeed": [BIN / "deepspeed", "--num_accelerators", 2, "--master_port", a_port()],
    }
    main(arguments(world, tmp_path / "main", "stage1", steps=2))
    for name, words in launchers.items():
        block = {"deepspeed": zero(2)} if name == "deepspeed" else {}
        launch(environment, *words, SCRIPT, *arguments(world, tmp_path / name, "stage1", steps=2, **block))
        equal(tmp_path / name, tmp_path / "main")
