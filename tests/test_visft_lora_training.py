"""train_visft's second stage through its front door: LoRA under frozen heads, and which task a step has."""

import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from visft_tiny import HEADS, copy_as_killed, head_flags, lora_flags, rows, write_world

from encoders import train_visft
from encoders.catalog import load_encoder
from encoders.heads.registry import load_head
from encoders.train_visft import Tuned, main
from encoders.visft_mixture import TaskCounts, TaskMixture, draw_tasks
from mmkit.errors import ConfigError, DataError

WEIGHTS = {"detection": 0.3, "segmentation": 0.3, "caption": 0.4}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, an encoder, and three heads behind it."""
    folder = write_world(tmp_path_factory.mktemp("visft"))
    for task in HEADS:
        main(head_flags(folder, task, folder / task, steps=20))
    return folder


def heads(world: Path) -> list[Path]:
    return [world / task / "head" for task in HEADS]


def flags(world: Path, out: Path, *more: str, steps: int = 6) -> list[str]:
    return lora_flags(world, heads(world), out, *more, steps=steps)


# ---- which task, which images ----------------------------------------------------------------------------------------------------------


class Counting:
    """A task's data that gives what it is asked for."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def get(self, epoch: int, index: int) -> dict[str, Any]:
        return {"place": (epoch, index)}


def mixture(chunk: int = 8, size: int = 8, steps: int = 50, seed: int = 3, images: int = 1) -> TaskMixture:
    data: Any = {task: Counting(length) for task, length in zip(WEIGHTS, (20, 30, 13), strict=True)}
    number = dict.fromkeys(WEIGHTS, 1) | {"caption": images}
    return TaskMixture(data, WEIGHTS, number, steps=steps, chunk=chunk, global_batch_size=size, seed=seed)


def test_tasks_come_as_often_as_their_weights_say() -> None:
    counts = Counter(draw_tasks(WEIGHTS, 4000, seed=0))
    for task, weight in WEIGHTS.items():
        assert abs(counts[task] - 4000 * weight) < 3 * math.sqrt(4000 * weight * (1 - weight)), task
    assert draw_tasks(WEIGHTS, 50, seed=0) == draw_tasks(WEIGHTS, 4000, seed=0)[:50]  # a longer run begins as a shorter one
    assert draw_tasks(WEIGHTS, 50, seed=1) != draw_tasks(WEIGHTS, 50, seed=0)
    assert set(draw_tasks(WEIGHTS | {"detection": 0.0}, 500, seed=0)) == {"segmentation", "caption"}
    with pytest.raises(ConfigError, match="one of them above"):
        draw_tasks({"detection": 0.0}, 3, seed=0)


def test_each_task_walks_through_all_its_images_before_one_comes_again() -> None:
    made = mixture(images=2)
    seen: dict[str, list[tuple[int, int]]] = {task: [] for task in WEIGHTS}
    for index in made.order(0):
        unit = made.get(0, index)
        assert unit is not None
        seen[unit["task"]] += [item["place"] for item in unit["items"]]
        assert len(unit["items"]) == (2 if unit["task"] == "caption" else 1)
    for task, length in zip(WEIGHTS, (20, 30, 13), strict=True):
        first = seen[task][:length]
        assert sorted(first) == [(0, index) for index in range(length)]
        assert seen[task][length][0] == 1


def test_a_step_has_one_task_and_a_micro_batch_of_a_mixed_step_too() -> None:
    for made, chunk in ((mixture(), 8), (mixture(chunk=2), 2)):
        tasks = [unit["task"] for index in made.order(0) if (unit := made.get(0, index)) is not None]
        groups = [set(tasks[start : start + chunk]) for start in range(0, len(tasks), chunk)]
        assert all(len(group) == 1 for group in groups)
    mixed = [{unit["task"] for place in range(8) if (unit := made.get(0, 8 * step + place)) is not None} for step in range(50)]
    assert max(len(step) for step in mixed) == 3


def test_leaving_a_task_out_moves_no_other_tasks_images() -> None:
    data: Any = {task: Counting(20) for task in WEIGHTS}
    fewer = {task: data[task] for task in ("segmentation", "caption")}
    kept = [
        TaskMixture(found, WEIGHTS, dict.fromkeys(WEIGHTS, 1), steps=30, chunk=4, global_batch_size=4, seed=0) for found in (data, fewer)
    ]
    streams = [[made.streams["segmentation"](position) for position in range(20)] for made in kept]
    assert streams[0] == streams[1]


def test_micro_batches_of_a_task_share_its_counts_alone(world: Path) -> None:
    made = {task: load_head(folder, task) for task, folder in zip(HEADS, heads(world), strict=True)}
    boxes = {"labels": torch.tensor([0, 1]), "boxes": torch.rand(2, 4)}
    caption = {"tokens": torch.tensor([[made["caption"].vocabulary.start, 1, made["caption"].vocabulary.end]])}
    counts = TaskCounts(made)
    counts(
        iter(
            [
                {"task": "detection", "targets": [boxes]},
                {"task": "caption", "targets": [caption]},
                {"task": "detection", "targets": [boxes] * 2},
            ]
        )
    )
    assert counts.of("detection")["boxes"] == pytest.approx(3)  # six boxes, two micro-batches
    assert counts.of("caption")["tokens"] == pytest.approx(2)


# ---- training --------------------------------------------------------------------------------------------------------------------------


def test_only_a_and_b_change(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Tuned] = []
    states: list[dict[str, torch.Tensor]] = []

    class Kept(Tuned):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(self)
            states.append({name: tensor.clone() for name, tensor in self.state_dict().items()})

    monkeypatch.setattr(train_visft, "Tuned", Kept)
    folder = main(flags(world, tmp_path / "run", steps=12))
    changed = {name for name, tensor in made[0].state_dict().items() if not torch.equal(tensor, states[0][name])}
    assert changed == {name for name in states[0] if "lora_" in name}
    assert len(changed) == 2 * 2 * len(load_encoder(folder / "encoder").network.blocks) or len(changed) == 2 * 2
    trained = {name for name, parameter in made[0].named_parameters() if parameter.requires_grad}
    assert trained == changed
    before, after = load_encoder(world / "encoder").state_dict(), load_encoder(folder / "encoder").state_dict()
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all("attn.qkv.weight" in name for name in moved)
    keys = after["network.blocks.0.attn.qkv.weight"][48:96]
    assert torch.equal(keys, before["network.blocks.0.attn.qkv.weight"][48:96])


def test_a_run_without_a_learning_rate_exports_the_source_byte_for_byte(world: Path, tmp_path: Path) -> None:
    folder = main(flags(world, tmp_path / "run", "--lr", "0", steps=2))
    assert (folder / "encoder" / "model.safetensors").read_bytes() == (world / "encoder" / "model.safetensors").read_bytes()
    mine, source = load_encoder(folder / "encoder"), load_encoder(world / "encoder")
    assert (mine.spec, mine.config.text_tower, mine.joint_width) == (source.spec, source.config.text_tower, source.joint_width)
    assert "ViSFT, 2 steps" in mine.config.origin


def test_held_out_losses_fall_under_the_frozen_heads(world: Path, tmp_path: Path) -> None:
    folder = main(flags(world, tmp_path / "run", "--eval_every", "20", steps=60))
    found = rows(folder, "held_out.jsonl")
    assert [row["step"] for row in found if row["task"] == "caption"] == [0, 20, 40, 60]
    sums = {step: sum(float(str(row["loss"])) for row in found if row["step"] == step) for step in (0, 60)}
    assert sums[60] < sums[0]
    before = {row["task"]: row["loss"] for row in rows(folder, "held_out.jsonl") if row["step"] == 0}
    for task in HEADS:  # nothing has changed before the first step: it is stage 1's last word
        assert before[task] == pytest.approx(rows(world / task, "held_out.jsonl")[-1]["loss"], rel=1e-5)


def test_a_resumed_run_repeats_tasks_images_and_points(world: Path, tmp_path: Path) -> None:
    more = [
        "--run.save_every",
        "5",
        "--run.keep_checkpoints",
        "0",
        "--segmentation.placer",
        "jitter",
        "--eval_every",
        "4",
        "--divide_losses",
        "--lora.save_every",
        "4",
    ]
    whole = main(flags(world, tmp_path / "whole", *more, steps=12))
    copy = copy_as_killed(whole, tmp_path / "killed", 5)
    main([*flags(world, copy, *more, steps=12), "--run.resume"])
    assert rows(copy) == rows(whole)
    assert rows(copy, "held_out.jsonl") == rows(whole, "held_out.jsonl")
    assert (copy / "encoder" / "model.safetensors").read_bytes() == (whole / "encoder" / "model.safetensors").read_bytes()
    assert sorted(path.name for path in (whole / "adapters").iterdir()) == ["step_00000004", "step_00000008", "step_00000012"]


@pytest.mark.parametrize("mix", ["step", "micro_batch"])
def test_accumulation_does_not_change_a_step(world: Path, tmp_path: Path, mix: str) -> None:
    few = ["--run.micro_batch_size", "4", "--run.gradient_accumulation_steps", "1"]
    one = main(flags(world, tmp_path / "one", *few, "--mix", mix, steps=5))
    many = ["--run.micro_batch_size", "1", "--run.gradient_accumulation_steps", "4"]
    four = main(flags(world, tmp_path / "four", *many, "--mix", mix, steps=5))
    tasks = [{key.split("/")[0] for key in row if "/" in key} for row in rows(four)]
    if mix == "step":
        for mine, theirs in zip(rows(one), rows(four), strict=True):
            assert theirs == pytest.approx(mine, rel=5e-4), mine["step"]
    else:
        assert max(map(len, tasks)) > 1


def test_heads_sleep_unless_they_are_to_be_awake(world: Path, tmp_path: Path) -> None:
    run = main(head_flags(world, "caption", tmp_path / "caption", "--head.dropout", "0.5", steps=2))
    arms = {}
    for name, more in (("asleep", []), ("awake", ["--heads_awake"])):
        folder = main(lora_flags(world, [run / "head"], tmp_path / name, "--lr", "0", *more, steps=9))
        arms[name] = rows(folder)
        losses = [row["loss"] for row in rows(folder, "held_out.jsonl")]
        assert losses[0] == losses[-1]  # measured asleep in both
    assert arms["asleep"] != arms["awake"]


def test_checkpointing_changes_no_loss(world: Path, tmp_path: Path) -> None:
    plain = main(flags(world, tmp_path / "plain", steps=5))
    again = main(flags(world, tmp_path / "again", *(word for task in HEADS for word in (f"--{task}.checkpointing", "true")), steps=5))
    assert rows(again) == rows(plain)


def test_permuted_annotations_teach_what_held_out_pictures_contradict(world: Path, tmp_path: Path) -> None:
    true = rows(main(flags(world, tmp_path / "true", steps=4)), "held_out.jsonl")
    permuted = rows(main(flags(world, tmp_path / "permuted", "--permute_annotations", steps=4)), "held_out.jsonl")
    assert permuted[:3] == true[:3]
    assert permuted[3:] != true[3:]


def test_a_task_can_be_left_out(world: Path, tmp_path: Path) -> None:
    folder = main(flags(world, tmp_path / "run", "--tasks", "caption,detection", steps=8))
    assert {row["task"] for row in rows(folder, "held_out.jsonl")} == {"caption", "detection"}
    assert not any(key.startswith("segmentation") for row in rows(folder) for key in row)


def test_heads_can_be_trained_along(world: Path, tmp_path: Path) -> None:
    folder = main(flags(world, tmp_path / "run", "--head_lr", "0.1", steps=6))
    state = load_file(sorted((folder / "checkpoints").glob("step_*"))[-1] / "trainable.safetensors")
    assert any(name.startswith("heads.") for name in state)


@pytest.mark.slow  # two processes import torch and transformers: 30 s on a busy machine, 2 of them training
def test_two_processes_equal_one(world: Path, tmp_path: Path, child_environment: dict[str, str], free_port: int) -> None:
    one, two = ["--run.micro_batch_size", "4"], ["--run.micro_batch_size", "2"]
    cache = ["--segmentation.placer", "jitter", "--data.views", "2", "--data.feature_cache"]

    def jobs(name: str, size: list[str]) -> list[list[str]]:
        folder = tmp_path / name
        return [
            head_flags(world, "segmentation", folder / "head", *cache, str(folder / "features"), *size, steps=5),
            head_flags(world, "caption", folder / "caption", *size, steps=5),
            flags(world, folder / "lora", *size, steps=6),
        ]

    (tmp_path / "jobs.json").write_text(json.dumps(jobs("two", two)))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port)]
    command = [*launcher, str(Path(__file__).with_name("visft_ranks.py")), str(tmp_path / "jobs.json")]
    done = subprocess.run(command, env=child_environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for argv in jobs("one", one):
        main(argv)
    for name in ("head", "caption", "lora"):
        for mine, theirs in zip(rows(tmp_path / "one" / name), rows(tmp_path / "two" / name), strict=True):
            assert theirs == pytest.approx(mine, rel=1e-3, abs=1e-6), (name, mine["step"])
        held = [[row["loss"] for row in rows(tmp_path / ranks / name, "held_out.jsonl")] for ranks in ("one", "two")]
        assert held[1] == pytest.approx(held[0], rel=1e-4)


# ---- bad input -------------------------------------------------------------------------------------------------------------------------


def test_heads_that_do_not_fit_are_refused(world: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="two detection heads"):
        main(lora_flags(world, [heads(world)[0]] * 2, tmp_path / "run"))
    with pytest.raises(DataError, match="is no head folder"):
        main(lora_flags(world, [world / "detection"], tmp_path / "run"))
    other = tmp_path / "other"
    write_world(other)
    torch.manual_seed(6)
    encoder = load_encoder(other / "encoder")
    encoder.network.norm.bias.data += 0.1
    encoder.save_pretrained(other / "encoder")
    with pytest.raises(DataError, match="whose weights are not those of"):
        main(lora_flags(world, heads(world), tmp_path / "run", "--encoder", str(other / "encoder")))
    about = json.loads((world / "detection" / "head" / "head.json").read_text())
    more = json.loads((world / "train_instances.json").read_text())
    more["categories"].append({"id": 9, "name": "blue"})
    (tmp_path / "more.json").write_text(json.dumps(more))
    assert about["task"] == "detection"
    with pytest.raises(DataError, match=r"the detection head knows 2 categories, .*only the second 9 \(blue\)"):
        main(flags(world, tmp_path / "run", "--data.instances", str(tmp_path / "more.json")))
    with pytest.raises(ConfigError, match="--tasks names caption, and none of"):
        main(lora_flags(world, heads(world)[:2], tmp_path / "run", "--tasks", "detection,caption"))
    with pytest.raises(ConfigError, match=r"run.steps is 0"):
        main([*flags(world, tmp_path / "run"), "--run.steps", "0", "--run.epochs", "1"])
    assert not (tmp_path / "run").exists()
