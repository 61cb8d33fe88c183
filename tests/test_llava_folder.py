"""LLaVA folders: saved and loaded is the same model, in this process and in a fresh one; broken folders are named."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from llava_tiny import picture, stock_tower, tiny_llm, tiny_tower, write_parts
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from encoders.modeling import VisionEncoder
from llm_stage.llava import build_llava
from llm_stage.llava_folder import (
    CARD,
    PROJECTOR,
    LlavaCard,
    load_llava,
    load_projector,
    read_card,
    save_adapter,
    save_llava,
    save_projector,
)
from mmkit.errors import ConfigError, DataError
from mmkit.trainable import weights_hash

FRESH = """
import sys, torch
{first}
from transformers import LlavaForConditionalGeneration, LlavaProcessor
model, info = LlavaForConditionalGeneration.from_pretrained(sys.argv[1], output_loading_info=True)
assert not any(info.values()), info
inputs = torch.load(sys.argv[2])
torch.save(model(**inputs).logits, sys.argv[3])
print("encoders" in sys.modules, "mmkit" in sys.modules)
"""


@pytest.fixture
def parts(tmp_path):
    encoder, llm = write_parts(tmp_path)
    model, processor = build_llava(str(encoder), str(llm))
    card = LlavaCard(str(encoder), str(llm), weights_hash(model.model.vision_tower))
    return model, processor, card


def inputs_for(processor, image=True):
    text = "<image>\nwhat colour is it" if image else "what colour is it"
    return processor(images=picture("red") if image else None, text=text, return_tensors="pt")


def logits(model, processor):
    with torch.no_grad():
        return model(**inputs_for(processor)).logits


@pytest.mark.parametrize("projector", ["mlp2x_gelu", "linear"])
def test_saved_and_loaded_gives_the_same_logits(tmp_path, projector):
    model, processor = build_llava(tiny_tower(), tiny_llm(), projector)
    save_llava(model, processor, LlavaCard("a", "b", "c", projector), tmp_path / "model")
    again, its_processor, card = load_llava(tmp_path / "model")
    assert torch.equal(logits(model, processor), logits(again, its_processor))
    assert card == LlavaCard("a", "b", "c", projector)
    names = set(load_file(tmp_path / "model" / "model.safetensors"))
    assert {name.split(".")[0] for name in names} == {"vision_tower", "multi_modal_projector", "language_model"}  # the names others read
    assert "language_model.model.norm.weight" in names


@pytest.mark.parametrize("stock", [False, True], ids=["mmkit tower", "stock tower"])
def test_a_fresh_process_gives_the_same_logits(tmp_path, stock):
    model, processor = build_llava(stock_tower() if stock else tiny_tower(), tiny_llm(tie=False))
    save_llava(model, processor, LlavaCard("a", "b", "c"), tmp_path / "model")
    torch.save(dict(inputs_for(processor)), tmp_path / "inputs.pt")
    code = FRESH.format(first="" if stock else "import mmkit")
    paths = [str(tmp_path / name) for name in ("model", "inputs.pt", "logits.pt")]
    done = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-2:] == (["False", "False"] if stock else ["True", "True"])
    assert torch.equal(torch.load(tmp_path / "logits.pt"), logits(model, processor))


def test_a_projector_folder_is_the_same_model(tmp_path, parts):
    model, processor, card = parts
    with torch.no_grad():
        model.model.multi_modal_projector.linear_1.weight.normal_()
    save_projector(model.state_dict(), processor, card, tmp_path / "stage1")
    assert len(load_file(tmp_path / "stage1" / PROJECTOR)) == 4
    again, its_processor, _ = load_llava(tmp_path / "stage1")
    assert torch.equal(logits(model, processor), logits(again, its_processor))


def test_an_adapter_folder_is_the_same_model_merged_or_not(tmp_path, parts):
    model, processor, card = parts
    model.requires_grad_(False)
    config = LoraConfig(r=4, target_modules=r".*language_model.*\.(q|v)_proj", modules_to_save=["multi_modal_projector"])
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad and ("lora_B" in name or "modules_to_save" in name):
            torch.nn.init.normal_(parameter, std=0.1)
    expected = logits(adapted, processor)
    save_adapter(adapted, processor, card, tmp_path / "lora")
    assert not (tmp_path / "lora" / "config.json").exists()
    loose, its_processor, _ = load_llava(tmp_path / "lora", merge=False)
    assert torch.equal(logits(loose, its_processor), expected)
    merged, _, _ = load_llava(tmp_path / "lora")
    assert not any("lora" in name for name in merged.state_dict())
    torch.testing.assert_close(logits(merged, its_processor), expected, rtol=1e-4, atol=1e-4)  # W + BA is rounded once more


def test_folders_may_move_together(tmp_path, parts):
    model, processor, card = parts
    save_projector(model.state_dict(), processor, card, tmp_path / "runs" / "stage1")
    shutil.copytree(tmp_path, tmp_path.parent / "moved")
    shutil.rmtree(tmp_path / "encoder")
    assert read_card(tmp_path.parent / "moved" / "runs" / "stage1").encoder == str(tmp_path.parent / "moved" / "encoder")
    load_llava(tmp_path.parent / "moved" / "runs" / "stage1")
    shutil.rmtree(tmp_path.parent / "moved")


def test_another_encoder_under_the_same_name_is_refused(tmp_path, parts):
    model, processor, card = parts
    save_projector(model.state_dict(), processor, card, tmp_path / "stage1")
    encoder = VisionEncoder.from_pretrained(tmp_path / "encoder")
    with torch.no_grad():
        encoder.network.cls_token += 1e-3
    encoder.save_pretrained(tmp_path / "encoder")
    with pytest.raises(DataError, match="was trained with an encoder whose weights hash to"):
        load_llava(tmp_path / "stage1")


def test_a_projector_of_other_widths_names_both(tmp_path, parts):
    model, processor, card = parts
    state = {f"multi_modal_projector.linear_{i}.{n}": torch.zeros(s) for i, n, s in ((1, "weight", (64, 32)), (1, "bias", (64,)))}
    save_projector(state, processor, card, tmp_path / "stage1")
    with pytest.raises(ConfigError, match=r"leads from width 32 \(encoder .*\) to width 64(.|\n)*from 32 to 48"):
        load_projector(model, tmp_path / "stage1")


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda folder: shutil.rmtree(folder), "no model folder"),
        (lambda folder: (folder / "config.json").unlink(), "is no LLaVA: in it are"),
        (lambda folder: (folder / "config.json").write_text("{"), "is not JSON"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "llama"}'), "says model_type 'llama'"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 40), "model.safetensors has 40 bytes"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda folder: drop(folder, "multi_modal_projector.linear_1.weight"), "1 missing .model.multi_modal_projector.linear_1.weight"),
        (lambda folder: drop(folder, "vision_tower.network.cls_token", add=True), "1 unexpected"),
        (lambda folder: reshape(folder, "language_model.model.norm.weight"), "could not be loaded|mismatched"),
        (lambda folder: (folder / "processor_config.json").unlink(), "processor"),
        (lambda folder: (folder / CARD).write_text(json.dumps({"encoder": 1})), "is not a card"),
    ],
)
def test_a_broken_folder_says_what_is_wrong(tmp_path, spoil, message):
    model, processor = build_llava(tiny_tower(), tiny_llm())
    save_llava(model, processor, LlavaCard("a", "b", "c"), tmp_path / "model")
    spoil(tmp_path / "model")
    with pytest.raises((ConfigError, DataError), match=message):
        load_llava(tmp_path / "model")


def drop(folder, name, add=False):
    (folder / CARD).unlink()  # else its hashes would tell first
    state = load_file(folder / "model.safetensors")
    tensor = state[name] if add else state.pop(name)
    if add:
        state[name + "_2"] = tensor.clone()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def reshape(folder, name):
    (folder / CARD).unlink()
    state = load_file(folder / "model.safetensors")
    state[name] = state[name][:-1].clone()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def test_the_folder_above_a_model_is_told_where_it_is(tmp_path):
    model, processor = build_llava(tiny_tower(), tiny_llm())
    save_llava(model, processor, LlavaCard("a", "b", "c"), tmp_path / "run" / "model")
    with pytest.raises(ConfigError, match=r"did you mean .*run/model"):
        load_llava(tmp_path / "run")


def test_nothing_stays_of_a_folder_that_could_not_be_written(tmp_path, monkeypatch):
    model, processor = build_llava(tiny_tower(), tiny_llm())

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(processor, "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        save_llava(model, processor, LlavaCard("a", "b", "c"), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_with_other_tensors_than_its_settings_is_a_diff(tmp_path, parts):
    model, processor, card = parts
    config = LoraConfig(r=4, target_modules=r".*language_model.*\.(q|v)_proj", modules_to_save=["multi_modal_projector"])
    save_adapter(get_peft_model(model, config), processor, card, tmp_path / "lora")
    weights = tmp_path / "lora" / "adapter_model.safetensors"
    state = load_file(weights)
    name = next(name for name in state if "lora_A" in name)
    state["surplus"] = state.pop(name)
    save_file(state, weights, metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"adapter_model.safetensors (is not the file that was written|has .* bytes)"):
        load_llava(tmp_path / "lora")
    table = json.loads((tmp_path / "lora" / CARD).read_text())
    (tmp_path / "lora" / CARD).write_text(json.dumps({**table, "files": {}}))
    with pytest.raises(DataError, match=r"1 of \d+ tensors missing: .*lora_A(.|\n)*1 of \d+ tensors unexpected: surplus"):
        load_llava(tmp_path / "lora")
    weights.unlink()
    with pytest.raises(DataError, match=r"adapter_model.safetensors is missing"):
        load_llava(tmp_path / "lora")
