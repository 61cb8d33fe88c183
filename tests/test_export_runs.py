"""Runs, their checkpoints and their results as exported models: each checkpoint is a model, its card tells how it came to be."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from llava_tiny import logits, picture, write_data, write_parts
from safetensors.torch import load_file

from llm_stage import train_llava
from llm_stage.chat_format import Turn
from llm_stage.export import main
from llm_stage.generate import ChatModel, ChatRequest
from llm_stage.llava_folder import load_llava, read_card
from mmkit.errors import ConfigError, DataError

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Both stages, three steps each, a checkpoint every two."""
    world = tmp_path_factory.mktemp("runs")
    write_parts(world)
    write_data(world, rows=12)
    data = ["--json", world / "data.json", "--images", world / "images", "--micro_batch_size", 4, "--lr", 1e-2, "--projector_lr", 1e-2]
    common = ["--steps", 3, "--save_every", 1, "--check_saving", "false", *data]
    first = ["--stage", 1, "--encoder", world / "encoder", "--llm", world / "llm", "--output_dir", world / "stage1"]
    second = ["--stage", 2, "--pretrained", world / "stage1" / "model"]
    train(first, common)
    train([*second, "--output_dir", world / "full"], common)
    train([*second, "--output_dir", world / "lora", "--lora.rank", 4, "--lora.alpha", 12], common)
    return world


def train(*words):
    train_llava.main([str(word) for some in words for word in some])


@pytest.mark.parametrize("run", ["stage1", "full", "lora"])
def test_each_checkpoint_is_a_model(runs, run):
    steps = sorted((runs / run / "checkpoints").glob("step_*"))
    assert len(steps) >= 2
    last, processor, card = load_llava(steps[-1])
    result, _, its_card = load_llava(runs / run / "model")
    assert torch.equal(logits(last, processor), logits(result, processor))
    assert card.stage == its_card.stage
    earlier, _, _ = load_llava(steps[-2])
    assert not torch.equal(logits(earlier, processor), logits(result, processor))
    assert ChatModel.load(steps[-1]).generate([ChatRequest([Turn("user", "what")], [picture("red")])], 2)


def test_a_checkpoint_goes_on_as_a_stage_one_folder(runs, tmp_path):
    checkpoint = sorted((runs / "stage1" / "checkpoints").glob("step_*"))[-1]
    out = main([str(checkpoint), str(tmp_path / "out"), "--format", "parts"])
    given, found = load_file(runs / "stage1" / "model" / "projector.safetensors"), load_file(out / "projector.safetensors")
    assert all(torch.equal(given[name], found[name]) for name in given)
    assert read_card(out).encoder_hash == read_card(runs / "stage1" / "model").encoder_hash


def test_a_checkpoint_of_a_lora_run_exports_merged(runs, tmp_path):
    checkpoint = sorted((runs / "lora" / "checkpoints").glob("step_*"))[-1]
    main([str(checkpoint), str(tmp_path / "out")])
    expected, processor, _ = load_llava(runs / "lora" / "model", merge=False)
    again, its_processor, _ = load_llava(tmp_path / "out")
    torch.testing.assert_close(logits(again, its_processor), logits(expected, processor), rtol=0, atol=1e-5)


def test_a_faulty_checkpoint_is_named(runs, tmp_path):
    source = sorted((runs / "stage1" / "checkpoints").glob("step_*"))[-1]
    folder = tmp_path / "run" / "checkpoints" / "step_00000003"
    folder.mkdir(parents=True)
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    with pytest.raises(ConfigError, match=r"config.yaml cannot be read"):
        load_llava(folder)
    (folder.parent.parent / "config.yaml").write_bytes((runs / "stage1" / "config.yaml").read_bytes())
    load_llava(folder)  # an old run, which has no card of its own: the settings say what it was made of
    with pytest.raises(ConfigError, match="has no ZeRO files: its run was not started with DeepSpeed"):
        main([str(folder), str(tmp_path / "out"), "--from_zero"])
    weights = folder / "trainable.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(DataError, match=r"trainable.safetensors has [\d,]+ bytes, should have [\d,]+: this checkpoint is not whole"):
        load_llava(folder)
    weights.unlink()
    with pytest.raises(DataError, match=r"trainable.safetensors is missing"):
        load_llava(folder)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("zero", [2, 3])
def test_zero_files_of_two_ranks_give_the_float32_weights(runs, tmp_path, tmp_path_factory, zero):
    """The training's own copy is bfloat16; the values that the optimizer keeps round to it, and say more."""
    extensions = tmp_path_factory.getbasetemp().parent / "mmkit_torch_extensions"
    environment = {
        **os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TORCH_EXTENSIONS_DIR": str(extensions), "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    settings = {
        "stage": 1, "encoder": runs / "encoder", "llm": runs / "llm", "json": runs / "data.json", "images": runs / "images", "steps": 2,
        "save_every": 2, "micro_batch_size": 2, "global_batch_size": 4, "projector_lr": 1e-3, "precision": "bf16", "check_saving": "false",
        "output_dir": tmp_path / "run", "run.deepspeed.zero_optimization.stage": zero,
    }  # fmt: skip
    port = 20000 + (os.getpid() * 7 + int(time.time())) % 20000
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", "2", "--master_port", str(port)]
    flags = [str(word) for key, value in settings.items() for word in (f"--{key}", value)]
    command = [*launcher, str(ROOT / "llm_stage" / "train_llava.py"), *flags]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=800, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000002"
    copy = load_file(main([str(checkpoint), str(tmp_path / "copy"), "--format", "parts"]) / "projector.safetensors")
    exact = load_file(main([str(checkpoint), str(tmp_path / "exact"), "--format", "parts", "--from_zero"]) / "projector.safetensors")
    assert copy.keys() == exact.keys()
    for name, tensor in exact.items():
        assert torch.equal(tensor.bfloat16(), copy[name].bfloat16())
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in exact.values())


def test_the_card_tells_data_commands_metrics_and_proof(runs, tmp_path):
    summary = {"benchmark": "mini_vqa", "model": "m", "n": 44, "metrics": {"vqa_accuracy": {"value": 20.45, "ci95": [11.1, 31.1], "n": 44}}}
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "summary.json").write_text(json.dumps(summary))
    out = main([str(runs / "full" / "model"), str(tmp_path / "out"), "--eval", str(tmp_path / "eval")])
    card = (out / "README.md").read_text()
    assert re.search(r"\| stage1 \| data.json \| 12 \| `[0-9a-f]{64}` \|\n\| full \| data.json \| 12 \|", card)
    assert "| mini_vqa | vqa_accuracy | 20.45 | 11.1 to 31.1 | 44 |" in card
    assert "### llava stage 1" in card
    assert "### llava stage 2" in card
    assert "global_batch_size: 4" in card or "micro_batch_size: 4" in card
    assert read_card(runs / "full" / "model").encoder_hash in card
    assert "read back against what was to be written | 0.00e+00" in card
    assert card.count("to be filled in") == 5
    assert "torch " in card
    assert str(runs) not in card
    with pytest.raises(DataError, match=r"there is no summary.json"):
        main([str(runs / "full" / "model"), str(tmp_path / "out2"), "--eval", str(tmp_path)])
    with pytest.raises(ConfigError, match="exists already"):
        main([str(runs / "full" / "model"), str(out)])


def test_an_export_of_an_export_is_the_same_again(runs, tmp_path):
    one = main([str(runs / "full" / "model"), str(tmp_path / "one")])
    two = main([str(one), str(tmp_path / "two")])
    first, second = (load_file(folder / "model.safetensors") for folder in (one, two))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
