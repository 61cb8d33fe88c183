import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import toy_training

from mmkit.batches import Layout, StreamOrder, derive_seed
from mmkit.errors import ConfigError, DataError
from mmkit.records import read_jsonl
from mmkit.run import Run, RunConfig, TrainingError

SCRIPT = Path(toy_training.__file__)
BASE = ["--steps", "12", "--log_every", "1"]


def train(folder: Path, *flags: str) -> list[dict[str, Any]]:
    """Train in this process and give the log."""
    toy_training.main(["--output_dir", str(folder), *BASE, *flags])
    return read_jsonl(folder / "metrics.jsonl")


def launch(environment: dict[str, str], folder: Path, *flags: str, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Train in other processes."""
    words = [sys.executable, *launcher, str(SCRIPT), "--output_dir", str(folder), *BASE, *flags]
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=550)


def numbers(rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """Everything in the log but the clock."""
    return [tuple(value for key, value in row.items() if key != "seconds") for row in rows]


def losses(rows: list[dict[str, Any]]) -> list[float]:
    return [row["loss"] for row in rows]


# ---- order ----------------------------------------------------------------------------------------------------------------------------


def test_every_epoch_sees_every_item_once() -> None:
    order = StreamOrder(toy_training.ToyData(), seed=3)
    stream = [order(position) for position in range(3 * 37)]
    for epoch in range(3):
        assert sorted(index for of, index in stream if of == epoch) == list(range(37))
    assert stream[:37] != [(0, index) for _, index in stream[37:74]]


def test_a_step_holds_the_same_samples_however_it_is_dealt() -> None:
    def positions(micro: int, accumulation: int, ranks: int) -> set[int]:
        layouts = [Layout(micro, accumulation, ranks, rank) for rank in range(ranks)]
        return {layout.begin(5, m) + offset for layout in layouts for m in range(accumulation) for offset in range(micro)}

    assert positions(8, 1, 1) == positions(1, 8, 1) == positions(2, 2, 2) == positions(1, 2, 4) == set(range(40, 48))


def test_a_dataset_may_bring_its_own_order() -> None:
    class Ordered(toy_training.ToyData):
        def order(self, epoch: int) -> list[int]:
            return [(index + epoch) % 4 for index in range(8)]

    order = StreamOrder(Ordered(), seed=0)
    assert [order(position)[1] for position in range(10)] == [0, 1, 2, 3, 0, 1, 2, 3, 1, 2]


class OfLengths(toy_training.ToyData):
    lengths = tuple((index * 7919) % 101 for index in range(37))


@pytest.mark.parametrize("group", [1, 3])
def test_grouped_by_length_every_epoch_still_sees_every_item_once(group: int) -> None:
    order = StreamOrder(OfLengths(), seed=3, group=group, global_batch_size=4)
    stream = [order(position) for position in range(3 * 37)]
    for epoch in range(3):
        assert sorted(index for of, index in stream if of == epoch) == list(range(37))


def test_grouping_one_step_moves_no_sample_to_another_step() -> None:
    plain, grouped = StreamOrder(OfLengths(), seed=3), StreamOrder(OfLengths(), seed=3, group=1, global_batch_size=4)
    for step in range(27):  # two epochs and a bit: 37 is no multiple of 4
        places = range(4 * step, 4 * step + 4)
        assert sorted(map(plain, places)) == sorted(map(grouped, places))


def test_grouped_steps_hold_samples_of_like_length() -> None:
    def spread(order: StreamOrder) -> float:
        steps = [[OfLengths.lengths[order(4 * step + place)[1]] for place in range(4)] for step in range(9)]
        return sum(max(lengths) - min(lengths) for lengths in steps) / 9

    assert spread(StreamOrder(OfLengths(), seed=3, group=4, global_batch_size=4)) < 0.5 * spread(StreamOrder(OfLengths(), seed=3))


def test_grouping_needs_lengths() -> None:
    with pytest.raises(ConfigError, match="group_by_length is 2, and ToyData says no lengths"):
        StreamOrder(toy_training.ToyData(), seed=0, group=2, global_batch_size=4)


class OfKinds(OfLengths):
    modalities = tuple(index % 3 == 0 for index in range(37))  # 13 of one kind, 24 of the other


@pytest.mark.parametrize("group", [0, 1, 3])
@pytest.mark.parametrize("size", [4, 5, 16, 50])
def test_grouped_by_modality_every_epoch_sees_every_item_once_and_mixes_one_step(group: int, size: int) -> None:
    order = StreamOrder(OfKinds(), seed=3, group=group, global_batch_size=size, by_modality=True)
    stream = [order(position) for position in range(4 * 37)]
    for epoch in range(4):
        assert sorted(index for of, index in stream if of == epoch) == list(range(37))
    again = StreamOrder(OfKinds(), seed=3, group=group, global_batch_size=size, by_modality=True)
    assert [again(position) for position in range(3 * 37, 4 * 37)] == stream[3 * 37 :]  # as after a resume
    if size < 37:
        other = StreamOrder(OfKinds(), seed=4, group=group, global_batch_size=size, by_modality=True)
        assert [other(position) for position in range(37)] != stream[:37]
    if size <= 5:  # larger steps than a kind has samples are mixed, whatever one does
        kinds = [{OfKinds.modalities[index] for _, index in stream[start : start + size]} for start in range(0, len(stream), size)]
        assert sum(len(kind) > 1 for kind in kinds) <= 4
        assert {True} in kinds


def test_kinds_take_turns_all_over_the_epoch_and_lengths_are_alike_within_a_step() -> None:
    class Many:
        lengths = tuple((index * 7919) % 1009 for index in range(400))
        modalities = tuple(index % 4 == 0 for index in range(400))

        def __len__(self) -> int:
            return 400

    order = StreamOrder(Many(), seed=0, group=10, global_batch_size=8, by_modality=True)
    steps = [[order(place)[1] for place in range(start, start + 8)] for start in range(0, 400, 8)]
    kinds = [Many.modalities[step[0]] for step in steps]
    assert 4 <= sum(kinds[:25]) <= 9  # of 12 steps in all
    spread = [max(Many.lengths[i] for i in step) - min(Many.lengths[i] for i in step) for step in steps]
    assert sum(spread) / len(spread) < 0.25 * 1009


def test_grouping_by_modality_needs_modalities_and_no_order_of_their_own() -> None:
    with pytest.raises(ConfigError, match="group_by_modality is on, and ToyData says no modalities"):
        StreamOrder(toy_training.ToyData(), seed=0, global_batch_size=4, by_modality=True)

    class Ordered(OfKinds):
        def order(self, epoch: int) -> list[int]:
            return list(range(37))

    with pytest.raises(ConfigError, match="brings its own order"):
        StreamOrder(Ordered(), seed=0, global_batch_size=4, by_modality=True)


def test_seeds_of_neighbours_differ() -> None:
    assert len({derive_seed(seed, epoch, index) for seed in range(5) for epoch in range(5) for index in range(40)}) == 1000


# ---- accumulation, ranks, workers -----------------------------------------------------------------------------------------------------


def test_four_micro_batches_equal_one_batch(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", "--micro_batch_size", "4")
    parts = train(tmp_path / "parts", "--micro_batch_size", "1", "--gradient_accumulation_steps", "4")
    torch.testing.assert_close(losses(whole), losses(parts), rtol=1e-5, atol=1e-6)  # float32 sums in another order, 12 AdamW steps
    torch.testing.assert_close([row["grad_norm"] for row in whole], [row["grad_norm"] for row in parts], rtol=1e-4, atol=1e-5)


def test_two_processes_equal_one(tmp_path: Path, child_environment: dict[str, str]) -> None:
    one = train(tmp_path / "one", "--micro_batch_size", "4")
    torchrun = (
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        "0",
        "--rdzv_backend",
        "c10d",
        "--rdzv_endpoint",
        "localhost:0",
    )
    result = launch(child_environment, tmp_path / "two", "--micro_batch_size", "1", "--gradient_accumulation_steps", "2", launcher=torchrun)
    assert result.returncode == 0, result.stderr[:3000]
    two = read_jsonl(tmp_path / "two" / "metrics.jsonl")
    torch.testing.assert_close(losses(one), losses(two), rtol=1e-5, atol=1e-6)


def test_looking_ahead_shows_the_step_with_the_randomness_it_will_have(tmp_path: Path) -> None:
    config = RunConfig(output_dir=str(tmp_path / "run"), steps=2, micro_batch_size=2, gradient_accumulation_steps=3)
    run = Run(config, name="toy", settings=config)
    model = torch.nn.Linear(6, 1)
    run.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    ahead: list[list[torch.Tensor]] = []
    turns: list[torch.Tensor] = []

    def look(micro_batches: Iterator[dict[str, torch.Tensor]]) -> None:
        ahead.append([torch.cat([batch["x"].flatten(), torch.rand(3)]) for batch in micro_batches])

    for batch in run.batches(toy_training.ToyData(), toy_training.collate, look_ahead=look):
        turns.append(torch.cat([batch["x"].flatten(), torch.rand(3)]))
        run.backward(run.forward(lambda bare, x: (x @ bare.weight.T).mean(), batch["x"]))
    assert [len(step) for step in ahead] == [3, 3]
    assert all(torch.equal(seen, turn) for seen, turn in zip([seen for step in ahead for seen in step], turns, strict=True))


def test_worker_processes_change_nothing(tmp_path: Path) -> None:
    alone = train(tmp_path / "alone", "--micro_batch_size", "4", "--dropout", "0.3")
    workers = train(tmp_path / "workers", "--micro_batch_size", "4", "--dropout", "0.3", "--num_workers", "2")
    assert numbers(alone) == numbers(workers)


def test_the_log_averages_by_weight(tmp_path: Path) -> None:
    for row in train(tmp_path / "run", "--micro_batch_size", "1", "--gradient_accumulation_steps", "3"):
        assert row["double"] == pytest.approx(2 * row["loss"], rel=1e-6)


def test_the_gradient_is_clipped(tmp_path: Path) -> None:
    def change(limit: float) -> float:
        settings = RunConfig(output_dir=str(tmp_path / f"run{limit}"), steps=1, micro_batch_size=4, max_grad_norm=limit)
        run = Run(settings, name="toy", settings=settings)
        model = toy_training.ToyModel(0.0)
        before = model.first.weight.detach().clone()
        wrapped, _ = run.prepare(model, torch.optim.SGD(model.parameters(), 1.0))
        for batch in run.batches(toy_training.ToyData(), toy_training.collate):
            run.backward(wrapped(batch["x"]).square().sum())
        return float((model.first.weight - before).norm())

    assert change(0.01) <= 0.01 * 1.001 < change(0)  # one SGD step at lr 1 moves by the gradient itself


# ---- resume ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [3, 7])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path, child_environment: dict[str, str], step: int) -> None:
    flags = ["--micro_batch_size", "5", "--gradient_accumulation_steps", "2", "--dropout", "0.3", "--save_every", "2", "--ema"]
    whole = train(tmp_path / "whole", *flags)
    killed = launch(child_environment, tmp_path / "killed", *flags, "--kill_at", str(step))
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    resumed = train(tmp_path / "killed", *flags, "--resume", "--num_workers", "1")  # in mid-epoch, and with another worker count
    assert numbers(resumed) == numbers(whole)
    assert (tmp_path / "killed" / "ema.json").read_text() == (tmp_path / "whole" / "ema.json").read_text()


def test_resuming_a_finished_run_trains_nothing(tmp_path: Path) -> None:
    before = train(tmp_path / "run", "--micro_batch_size", "4")
    assert train(tmp_path / "run", "--micro_batch_size", "4", "--resume") == before


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--micro_batch_size", "4", "--save_every", "4"]
    whole = train(tmp_path / "run", *flags)
    newest = tmp_path / "run" / "checkpoints" / "step_00000012" / "optimizer.pt"
    newest.write_bytes(newest.read_bytes()[:100])
    assert numbers(train(tmp_path / "run", *flags, "--resume")) == numbers(whole)
    assert "optimizer.pt has 100 bytes" in capsys.readouterr().out


def test_a_missing_file_is_named_with_the_checkpoint_that_is_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--micro_batch_size", "4", "--save_every", "4"]
    whole = train(tmp_path / "run", *flags)
    (tmp_path / "run" / "checkpoints" / "step_00000012" / "trainable.safetensors").unlink()
    assert numbers(train(tmp_path / "run", *flags, "--resume")) == numbers(whole)
    said = capsys.readouterr().out
    assert "step_00000012 is passed over: trainable.safetensors is missing; the newest whole one is" in said
    assert "step_00000008" in said


def test_no_whole_checkpoint_is_an_error_and_not_a_new_beginning(tmp_path: Path) -> None:
    before = train(tmp_path / "run", "--micro_batch_size", "4")
    (tmp_path / "run" / "checkpoints" / "step_00000012" / "optimizer.pt").unlink()
    with pytest.raises(ConfigError, match=r"none of the 1 checkpoints in .* is whole, the newest one's fault: optimizer.pt is missing"):
        train(tmp_path / "run", "--micro_batch_size", "4", "--resume")
    assert read_jsonl(tmp_path / "run" / "metrics.jsonl") == before


KILLED_WRITING = """
import os, signal, sys, toy_training, mmkit.snapshots
save, calls = mmkit.snapshots.save_weights, []
def killed(state, path):
    save(state, path)
    calls.append(path)
    if len(calls) == 2: os.kill(os.getpid(), signal.SIGKILL)
mmkit.snapshots.save_weights = killed
toy_training.main(sys.argv[1:])
"""


def test_killed_while_it_writes_a_checkpoint_a_run_goes_on_from_the_one_before(tmp_path: Path, child_environment: dict[str, str]) -> None:
    flags = ["--micro_batch_size", "4", "--dropout", "0.3", "--save_every", "4"]
    words = [sys.executable, "-c", KILLED_WRITING, "--output_dir", str(tmp_path / "run"), *BASE, *flags]
    path = os.pathsep.join([str(SCRIPT.parent), child_environment["PYTHONPATH"]])
    done = subprocess.run(words, env={**child_environment, "PYTHONPATH": path}, capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    checkpoints = tmp_path / "run" / "checkpoints"
    assert sorted(path.name.split("-")[0] for path in checkpoints.iterdir()) == [".step_00000008.writing", "step_00000004"]
    assert numbers(train(tmp_path / "run", *flags, "--resume")) == numbers(train(tmp_path / "whole", *flags))
    assert not list(checkpoints.glob(".*"))


def test_another_global_batch_is_refused_on_resume(tmp_path: Path) -> None:
    train(tmp_path / "run", "--micro_batch_size", "4")
    with pytest.raises(ConfigError, match="4 samples in a step, the settings now make it 8"):
        train(tmp_path / "run", "--micro_batch_size", "8", "--resume")


def test_checkpoints_are_plain_data_and_hold_no_frozen_weights(tmp_path: Path) -> None:
    from mmkit.checkpoint import load_weights

    train(tmp_path / "run", "--micro_batch_size", "4")
    (path,) = (tmp_path / "run" / "checkpoints").iterdir()
    names = load_weights(path / "trainable.safetensors").keys()
    assert "first.weight" in names
    assert "norm.running_mean" in names
    assert not [name for name in names if name.startswith("frozen")]
    assert torch.load(path / "optimizer.pt", weights_only=True)["optimizer"]["state"]


def test_only_the_last_checkpoints_stay(tmp_path: Path) -> None:
    train(tmp_path / "run", "--micro_batch_size", "4", "--save_every", "3", "--keep_checkpoints", "2")
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["step_00000009", "step_00000012"]


# ---- stops ----------------------------------------------------------------------------------------------------------------------------


def test_ctrl_c_finishes_the_step_saves_and_exits_130(tmp_path: Path, child_environment: dict[str, str]) -> None:
    flags = ["--micro_batch_size", "4", "--dropout", "0.3"]
    result = launch(child_environment, tmp_path / "run", *flags, "--signal_at", "5", "--num_workers", "1")
    assert result.returncode == 130, result.stderr[-2000:]
    assert "--resume" in result.stdout
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["state"] == "interrupted"
    assert (tmp_path / "run" / "checkpoints" / "step_00000006").is_dir()
    assert numbers(train(tmp_path / "run", *flags, "--resume")) == numbers(train(tmp_path / "whole", *flags))


def test_ctrl_c_in_the_last_step_lets_the_run_finish_and_still_ends_the_caller(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        train(tmp_path / "run", "--micro_batch_size", "4", "--steps", "5", "--signal_at", "4")
    assert stop.value.code == 130
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["state"] == "finished"


def test_nan_names_term_step_and_micro_batch(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"loss term 'double' is nan at step 4, micro-batch 1 of 2, rank 0; .*the batch is in"):
        train(tmp_path / "run", "--micro_batch_size", "4", "--gradient_accumulation_steps", "2", "--nan_at", "3")
    assert list((tmp_path / "run").glob("nan_00000004/*.pt"))
    assert len(read_jsonl(tmp_path / "run" / "metrics.jsonl")) == 3


def test_nan_without_a_term_names_the_loss(tmp_path: Path) -> None:
    run = Run(RunConfig(output_dir=str(tmp_path / "run"), steps=2, micro_batch_size=4), name="toy", settings=RunConfig())
    model = toy_training.ToyModel(0.0)
    wrapped, _ = run.prepare(model, torch.optim.SGD(model.parameters(), 0.1))
    before = [parameter.clone() for parameter in model.parameters()]
    batches = run.batches(toy_training.ToyData(), toy_training.collate)
    run.backward(wrapped(next(batches)["x"]).sum() * float("inf"))
    with pytest.raises(TrainingError, match=r"loss term 'loss' is -?inf at step 1"):
        next(batches)
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


class Reads(torch.overrides.TorchFunctionMode):
    """Counts how often a tensor's value is asked for: each time, the host would wait for an accelerator."""

    count = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += getattr(function, "__name__", "") in ("item", "tolist", "__float__", "__bool__", "__int__")
        return function(*args, **(kwargs or {}))


def deferred_run(folder: Path, steps: int, spoilt: int = -1) -> tuple[Run, list[int], torch.nn.Module]:
    """A run of two micro-batches a step that reads as it would on an accelerator, and how many reads each of its micro-batches made."""
    config = RunConfig(output_dir=str(folder), steps=steps, micro_batch_size=2, gradient_accumulation_steps=2, log_every=1000)
    run = Run(config, name="toy", settings=config)
    run._deferred = True
    model = toy_training.ToyModel(0.0)
    wrapped, _ = run.prepare(model, torch.optim.SGD(model.parameters(), 0.1, foreach=False))
    counts = []
    for number, batch in enumerate(run.batches(toy_training.ToyData(), toy_training.collate)):
        loss = wrapped(batch["x"]).square().mean()
        part = loss * float("nan") if number == spoilt else 2 * loss
        with Reads() as reads:
            run.backward(loss + (part if number == spoilt else 0))
            run.log(part=part)
        counts.append(reads.count)
    return run, counts, model


def test_an_accelerator_is_waited_for_once_in_a_step(tmp_path: Path) -> None:
    _, counts, _ = deferred_run(tmp_path / "run", steps=3)
    assert counts[0::2] == [0, 0, 0]
    assert counts[1::2] == [1, 1, 1]


@pytest.mark.parametrize("spoilt, micro_batch", [(4, 1), (5, 2)])
def test_read_once_in_a_step_a_nan_is_still_named_before_the_optimizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoilt: int, micro_batch: int
) -> None:
    steps: list[int] = []
    step = torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self, *rest: steps.append(1) or step(self, *rest))
    with pytest.raises(TrainingError, match=rf"loss term 'part' is nan at step 3, micro-batch {micro_batch} of 2, rank 0; loss nan; "):
        deferred_run(tmp_path / "run", 4, spoilt)
    assert len(steps) == 2
    assert (tmp_path / "run" / "nan_00000003" / f"batch_0_{micro_batch - 1}.pt").is_file()


def test_under_deepspeed_every_rank_stops_before_the_optimizer_when_one_has_a_nan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(RunConfig(output_dir=str(tmp_path / "run"), steps=2, micro_batch_size=4), name="toy", settings=RunConfig())
    model = toy_training.ToyModel(0.0)
    wrapped, _ = run.prepare(model, torch.optim.SGD(model.parameters(), 0.1))
    run._deferred = run.deepspeed = True  # the engine's backward steps, too: ranks have to agree before it
    monkeypatch.setattr("mmkit.terms.dist.all_reduce", lambda flag: flag.add_(1))  # another rank says that it has one
    before = [parameter.clone() for parameter in model.parameters()]
    batches = run.batches(toy_training.ToyData(), toy_training.collate)
    with pytest.raises(TrainingError, match="a loss of another rank is not finite at step 1"):
        run.backward(wrapped(next(batches)["x"]).square().mean())
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def test_a_forgotten_backward_is_an_error(tmp_path: Path) -> None:
    run = Run(RunConfig(output_dir=str(tmp_path / "run"), steps=2, micro_batch_size=4), name="toy", settings=RunConfig())
    model = toy_training.ToyModel(0.0)
    run.prepare(model, torch.optim.SGD(model.parameters(), 0.1))
    with pytest.raises(RuntimeError, match="called 0 times"):
        for _ in run.batches(toy_training.ToyData(), toy_training.collate):
            pass


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_bad_sample_is_named_without_a_workers_traceback(tmp_path: Path, workers: str) -> None:
    with pytest.raises(DataError) as caught:
        train(tmp_path / "run", "--micro_batch_size", "4", "--bad_item", "5", "--num_workers", workers)
    assert str(caught.value) == "image_5.png is truncated"


def test_all_ranks_hear_of_a_bad_sample_that_one_of_them_met(tmp_path: Path, child_environment: dict[str, str], free_port: int) -> None:
    """Without a launcher, that would kill the others: each has to leave by itself."""
    shared = {**child_environment, "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port)}
    words = [sys.executable, str(SCRIPT), "--output_dir", str(tmp_path / "run"), *BASE, "--micro_batch_size", "4", "--bad_item", "5"]
    ranks = [
        subprocess.Popen(words, env={**shared, "RANK": rank, "LOCAL_RANK": rank}, stderr=subprocess.PIPE, text=True) for rank in ("0", "1")
    ]
    said = [process.communicate(timeout=300)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [2, 2], said
    other = next(text for text in said if "stopped: " in text)
    assert re.search(r"error: rank \d stopped: image_5.png is truncated", other)
    assert sum("error: image_5.png is truncated" in text for text in said) == 1


def test_a_skipped_sample_costs_one_sample(tmp_path: Path) -> None:
    rows = train(tmp_path / "run", "--micro_batch_size", "4", "--bad_item", "5", "--on_bad", "skip")
    assert len(rows) == 12


def test_a_step_without_weight_is_refused(tmp_path: Path) -> None:
    run = Run(RunConfig(output_dir=str(tmp_path / "run"), steps=2, micro_batch_size=4), name="toy", settings=RunConfig())
    model = toy_training.ToyModel(0.0)
    run.prepare(model, torch.optim.SGD(model.parameters(), 0.1))
    with pytest.raises(DataError, match="nothing in its 4 samples has weight"):
        next(iter(run.batches(toy_training.ToyData(), toy_training.collate, weigh=lambda batch: 0.0)))


# ---- folders and settings -------------------------------------------------------------------------------------------------------------


def test_an_existing_run_is_refused(tmp_path: Path) -> None:
    train(tmp_path / "run", "--micro_batch_size", "4")
    with pytest.raises(ConfigError, match="--resume goes on with that run, --overwrite removes it"):
        train(tmp_path / "run", "--micro_batch_size", "4")
    train(tmp_path / "run", "--micro_batch_size", "8", "--overwrite")


def test_overwrite_touches_no_folder_that_is_not_a_run(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not overwritten"):
        train(tmp_path, "--overwrite")
    assert (tmp_path / "precious.txt").read_text() == "mine"


def test_the_global_batch_must_add_up(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run.global_batch_size is 16, and 3 samples \* 2 micro-batches \* 1 processes are 6"):
        train(tmp_path / "run", "--micro_batch_size", "3", "--gradient_accumulation_steps", "2", "--global_batch_size", "16")


def test_accumulation_follows_from_the_global_batch(tmp_path: Path) -> None:
    rows = train(tmp_path / "run", "--micro_batch_size", "4", "--gradient_accumulation_steps", "0", "--global_batch_size", "16")
    assert rows[0]["samples_seen"] == 16


def test_epochs_become_steps(tmp_path: Path) -> None:
    toy_training.main(["--output_dir", str(tmp_path / "run"), "--epochs", "2", "--micro_batch_size", "10", "--log_every", "1"])
    assert len(read_jsonl(tmp_path / "run" / "metrics.jsonl")) == 8  # 2 * 37 samples in steps of 10, rounded up


def test_the_run_folder_explains_itself(tmp_path: Path) -> None:
    train(tmp_path / "run", "--micro_batch_size", "4")
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["state"] == "finished"
    assert manifest["seed"] == 0
    assert manifest["versions"]["torch"] == torch.__version__.split("+")[0]
    assert manifest["peak_memory_mb"] > 0
    assert "steps: 12" in (tmp_path / "run" / "config.yaml").read_text()


def test_a_full_disk_stops_the_run_and_keeps_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mmkit.snapshots

    calls = []

    def full(*args: Any, **kwargs: Any) -> None:
        calls.append(args)
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        real(*args, **kwargs)

    real = mmkit.snapshots.save_weights
    monkeypatch.setattr(mmkit.snapshots, "save_weights", full)
    with pytest.raises(OSError, match="No space left on device"):
        train(tmp_path / "run", "--micro_batch_size", "4", "--save_every", "4")
    assert os.listdir(tmp_path / "run" / "checkpoints") == ["step_00000004"]


# ---- DeepSpeed ------------------------------------------------------------------------------------------------------------------------


def test_a_deepspeed_block_is_not_used_without_a_launcher(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path / "run", "--micro_batch_size", "4", "--deepspeed", '{"zero_optimization": {"stage": 2}}')
    assert "not used in a single process" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.timeout(1200)  # the first start compiles an extension: 40 s alone, minutes on a busy machine
@pytest.mark.parametrize("stage", [2, 3])
def test_zero_on_two_processes_equals_one_process_and_resumes(tmp_path: Path, child_environment: dict[str, str], stage: int) -> None:
    pytest.importorskip("deepspeed")
    one = train(tmp_path / "one", "--micro_batch_size", "4")
    flags = [
        "--micro_batch_size",
        "1",
        "--gradient_accumulation_steps",
        "2",
        "--save_every",
        "5",
        "--run.deepspeed.zero_optimization.stage",
        str(stage),
    ]
    launcher = ("-m", "deepspeed.launcher.runner", "--num_accelerators", "2", "--master_port", str(29600 + stage))
    killed = launch(child_environment, tmp_path / "two", *flags, "--kill_at", "7", launcher=launcher)
    assert killed.returncode != 0
    done = launch(child_environment, tmp_path / "two", *flags, "--resume", launcher=launcher)
    assert done.returncode == 0, done.stderr[-3000:]
    two = read_jsonl(tmp_path / "two" / "metrics.jsonl")
    assert [row["step"] for row in two] == list(range(1, 13))
    torch.testing.assert_close(losses(one), losses(two), rtol=1e-4, atol=1e-6)
    assert "toy: goes on from" in done.stdout
    assert json.loads((tmp_path / "two" / "manifest.json").read_text())["deepspeed_stage"] == stage
