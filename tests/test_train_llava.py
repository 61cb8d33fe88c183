"""The LLaVA training, by its front door: both stages, exact resume, weighting, what it refuses."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from llava_tiny import COLOURS, picture, write_data, write_parts
from safetensors.torch import load_file

from encoders.modeling import VisionEncoder
from llm_stage import train_llava
from llm_stage.chat_format import Turn
from llm_stage.generate import ChatModel, ChatRequest
from llm_stage.train_llava import RECIPES, LlavaSettings, main
from mmkit.config import load_config
from mmkit.errors import ConfigError, DataError, NameNotFound
from mmkit.trainable import weights_hash

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Parts, data with text-only rows, and a finished stage 1."""
    folder = tmp_path_factory.mktemp("llava")
    write_parts(folder)
    write_data(folder, rows=24, text_only_every=4)
    main(arguments(folder, folder / "stage1", 1, steps=4))
    return folder


def arguments(world, output, stage, steps=6, **changes):
    parts = ["--encoder", world / "encoder", "--llm", world / "llm"] if stage == 1 else ["--pretrained", world / "stage1" / "model"]
    settings = {"micro_batch_size": 4, "log_every": 1, "lr": 2e-3, "projector_lr": 2e-3, **changes}
    data = ["--json", world / "data.json", "--images", world / "images"]
    words = ["--stage", stage, *parts, *data, "--steps", steps, "--output_dir", output]
    return [str(word) for word in [*words, *(item for key, value in settings.items() for item in (f"--{key}", value))]]


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_stage_one_leaves_the_projector_alone_and_all_else_untouched(world):
    model = world / "stage1" / "model"
    assert (model / "projector.safetensors").is_file()
    assert not list(model.glob("model*.safetensors"))
    encoder = VisionEncoder.from_pretrained(world / "encoder")
    assert json.loads((model / "mmkit_llava.json").read_text())["encoder_hash"] == weights_hash(encoder)
    assert ChatModel.load(model).generate([ChatRequest([Turn("user", "hi")])], 3)


def test_stage_two_learns_and_its_folder_answers(world, tmp_path):
    folder = main(arguments(world, tmp_path / "run", 2, steps=60, micro_batch_size=8, lr=1e-2))
    values = losses(folder)
    assert values[-1] < 0.3 * values[0]
    chat = ChatModel.load(folder / "model")
    assert chat.name == "run"
    answers = chat.generate([ChatRequest([Turn("user", "what colour is it")], [picture(colour)]) for colour in COLOURS], 8)
    assert all(answer.startswith("it is") for answer in answers)
    before, after = VisionEncoder.from_pretrained(world / "encoder").state_dict(), chat.model.model.vision_tower.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_lora_leaves_an_adapter_with_the_projector_in_it(world, tmp_path):
    folder = main(arguments(world, tmp_path / "run", 2, **{"lora.rank": 4, "lora.alpha": 8}))
    state = load_file(folder / "model" / "adapter_model.safetensors")
    assert {name.split(".")[3] for name in state} == {"language_model", "multi_modal_projector"}
    assert sum("multi_modal_projector" in name for name in state) == 4
    assert ChatModel.load(folder / "model").generate([ChatRequest([Turn("user", "what")], [picture("red")])], 3)


def test_four_micro_batches_equal_one_batch(world, tmp_path):
    one = main(arguments(world, tmp_path / "one", 2, micro_batch_size=8))
    four = main(arguments(world, tmp_path / "four", 2, micro_batch_size=2, gradient_accumulation_steps=4))
    assert losses(four) == pytest.approx(losses(one), rel=1e-5)  # rows have unlike label counts, some micro-batches no image
    for name, tensor in load_file(one / "model" / "model.safetensors").items():
        torch.testing.assert_close(load_file(four / "model" / "model.safetensors")[name], tensor, rtol=1e-3, atol=1e-4)


def test_rows_dealt_by_length_change_no_loss(world, tmp_path):
    plain = main(arguments(world, tmp_path / "plain", 2, micro_batch_size=4, gradient_accumulation_steps=2))
    dealt = main(arguments(world, tmp_path / "dealt", 2, micro_batch_size=4, gradient_accumulation_steps=2, group_by_length=1))
    assert losses(dealt) == pytest.approx(losses(plain), rel=1e-5)


def test_gradient_checkpointing_changes_no_loss(world, tmp_path):
    for stage in (1, 2):
        plain = main(arguments(world, tmp_path / f"plain{stage}", stage, steps=3))
        saving = main(arguments(world, tmp_path / f"saving{stage}", stage, steps=3, gradient_checkpointing="true"))
        assert losses(saving) == pytest.approx(losses(plain), rel=1e-6)


@pytest.mark.parametrize("stage, changes", [(1, {}), (2, {}), (2, {"lora.rank": 4, "lora.dropout": 0.3})], ids=["stage 1", "full", "lora"])
def test_a_killed_run_goes_on_as_if_nothing_had_been(world, tmp_path, stage, changes):
    changes = {**changes, "save_every": 2, "check_saving": "false"}
    whole = main(arguments(world, tmp_path / "whole", stage, steps=9, **changes))
    command = [sys.executable, "-c", KILLED, *arguments(world, tmp_path / "cut", stage, steps=9, **changes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert not (tmp_path / "cut" / "model").exists()
    again = main([*arguments(world, tmp_path / "cut", stage, steps=9, **changes), "--num_workers", "1", "--resume"])
    assert losses(again) == losses(whole)
    for file in (whole / "model").glob("*.safetensors"):
        one, two = load_file(file), load_file(again / "model" / file.name)
        assert all(torch.equal(one[name], two[name]) for name in one)


KILLED = """
import os, signal, sys
from llm_stage import train_llava
calls, loss = [], train_llava.supervised_loss
def counted(model, batch):
    calls.append(1)
    if len(calls) == 6: os.kill(os.getpid(), signal.SIGKILL)
    return loss(model, batch)
train_llava.supervised_loss = counted
train_llava.main(sys.argv[1:])
"""


def test_saving_is_tried_before_the_first_step(world, tmp_path, monkeypatch):
    def wrong(folder, dtype, merge):
        model, processor, card = train_llava_load(folder, dtype, merge=merge)
        model.model.language_model.layers[0].mlp.down_proj.weight.data.normal_()  # a tiny random LLM hardly hears the projector
        return model, processor, card

    train_llava_load = train_llava.load_llava
    monkeypatch.setattr(train_llava, "load_llava", wrong)
    with pytest.raises(DataError, match="saved and loaded at step 0 has loss"):
        main(arguments(world, tmp_path / "run", 2))
    assert not list((tmp_path / "run").glob(".saving*"))


def test_a_frozen_part_that_changes_is_not_saved(world, tmp_path, monkeypatch):
    loss = train_llava.supervised_loss

    def touching(model, batch):
        with torch.no_grad():
            model.model.vision_tower.network.cls_token += 1e-6
        return loss(model, batch)

    monkeypatch.setattr(train_llava, "supervised_loss", touching)
    with pytest.raises(DataError, match="vision_tower changed during a training in which it is frozen"):
        main(arguments(world, tmp_path / "run", 1, steps=2, check_saving="false"))
    assert not (tmp_path / "run" / "model").exists()


def spoil(world, folder, change):
    """The data with one change, in a folder of its own."""
    records = json.loads((world / "data.json").read_text())
    change(records)
    (folder / "spoilt.json").write_text(json.dumps(records))
    return folder / "spoilt.json"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda rows: rows[1].update(image="gone.png"), "row 1 .*gone.png is not there"),
        (lambda rows: rows[1].pop("conversations"), "row 1 .*has no 'conversations'"),
        (lambda rows: rows[1]["conversations"].reverse(), "row 1 "),
        (lambda rows: rows[1]["conversations"][0].update(value="<image><image>"), "row 1 .*2 <image> mark"),
        (lambda rows: rows[1]["conversations"][1].update(value=" "), "row 1 .*no answer has a word"),
    ],
)
def test_a_bad_row_is_named_and_nothing_is_written(world, tmp_path, change, message):
    path = spoil(world, tmp_path, change)
    with pytest.raises(DataError, match=message):
        main([*arguments(world, tmp_path / "run", 1), "--json", str(path)])
    assert not (tmp_path / "run").exists()


def test_skipping_leaves_the_bad_row_out(world, tmp_path, capsys):
    path = spoil(world, tmp_path, lambda rows: rows[1].update(image="gone.png"))
    main([*arguments(world, tmp_path / "run", 1, steps=2), "--json", str(path), "--on_bad_sample", "skip"])
    assert "1 of 24 rows skipped" in capsys.readouterr().out


@pytest.mark.parametrize(
    "extra, kind, message",
    [
        (["--stage", "1", "--json", "x"], ConfigError, "which parts"),
        (["--encoder", "mini-clipp", "--llm", "mini-llm", "--json", "x"], NameNotFound, "mini-clip"),
        (["--learning_rat", "1"], ConfigError, "learning_rat"),
        (["--pretrained", "nowhere", "--json", "x"], ConfigError, "is no stage-1 folder"),
    ],
)
def test_wrong_settings_leave_nothing_behind(tmp_path, extra, kind, message):
    with pytest.raises(kind, match=message):
        main([*extra, "--output_dir", str(tmp_path / "run"), "--steps", "1"])
    assert not (tmp_path / "run").exists()


def test_an_output_folder_in_use_is_left_alone(world):
    with pytest.raises(ConfigError, match="holds files already"):
        main(arguments(world, world / "stage1", 1))
    assert (world / "stage1" / "model" / "projector.safetensors").is_file()


@pytest.mark.parametrize(
    "setting, earlier, now", [("projector", "mlp2x_gelu", "linear"), ("feature_layer", -2, -1), ("select", "auto", "full")]
)
def test_stage_two_refuses_features_that_stage_one_did_not_have(world, tmp_path, setting, earlier, now):
    with pytest.raises(ConfigError, match=f"was trained with {setting} {earlier}, the settings say {now}"):
        main(arguments(world, tmp_path / "run", 2, **{setting: now}))


LLAVA_RECIPES = sorted(path for path in RECIPES.glob("*_stage*.yaml") if not path.stem.startswith(("qformer", "blip2")))


def test_every_recipe_is_found():
    assert len(LLAVA_RECIPES) >= 6


@pytest.mark.parametrize("path", LLAVA_RECIPES, ids=lambda path: path.stem)
def test_a_recipe_loads(path):
    settings = load_config(LlavaSettings, ["--recipe", str(path)], recipe_dir=RECIPES)
    assert settings.stage == (1 if path.stem.endswith("stage1") else 2)
    assert settings.run.deepspeed["zero_optimization"]["stage"] in (2, 3)
    assert settings.run.global_batch_size
