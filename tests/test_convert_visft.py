"""`mmkit convert visft-lora` and `visft-heads`: into encoders of EVA-ViT-G's and -E's form, into BLIP-2 folders, into LLaVA, and back."""

from pathlib import Path

import pytest
import torch
from llava_tiny import tiny_llm
from safetensors.torch import load_file, save_file
from test_lora import GOLDEN, golden_tower, images, stirred, tower
from transformers import Blip2VisionConfig, Blip2VisionModel

from apps.cli import main as mmkit
from encoders.catalog import load_encoder
from encoders.convert import write_encoder
from encoders.convert_visft import heads, lora
from encoders.heads.official import to_official
from encoders.heads.registry import load_head
from encoders.lora_files import delta_weight, read_lora
from llm_stage.llava import build_llava, set_stage
from mmkit.errors import ConfigError, DataError

R8 = GOLDEN / "lora_r8.safetensors"


@pytest.mark.parametrize("name", ["g", "e"])
def test_the_authors_lora_goes_into_an_encoder_folder_and_gives_their_tokens(name: str, tmp_path: Path) -> None:
    io = load_file(GOLDEN / "encoder_io.safetensors")
    write_encoder(golden_tower(name), tmp_path / "base")
    assert mmkit(["convert", "visft-lora", str(R8), "--encoder", str(tmp_path / "base"), "--out", str(tmp_path / "out")]) == 0
    merged, base = load_encoder(tmp_path / "out"), load_encoder(tmp_path / "base")
    with torch.no_grad():
        found = merged(io["pixels.native"]).last_hidden_state
    torch.testing.assert_close(found, io[f"{name}.r8.tokens_cls.native"], rtol=0, atol=1e-5)
    assert merged.spec == base.spec
    assert {k: (v.shape, v.dtype) for k, v in merged.state_dict().items()} == {k: (v.shape, v.dtype) for k, v in base.state_dict().items()}
    other = lora([str(R8), "--encoder", str(tmp_path / "base"), "--out", str(tmp_path / "alpha"), "--alpha", "8"])
    assert not torch.equal(load_encoder(other).network.blocks[0].attn.qkv.weight, merged.network.blocks[0].attn.qkv.weight)
    with pytest.raises(ConfigError, match="exists already"):
        lora([str(R8), "--encoder", str(tmp_path / "base"), "--out", str(tmp_path / "out")])


def test_an_adapter_is_refused_by_another_base_and_comes_back_as_the_authors_file(tmp_path: Path) -> None:
    _, adapter = stirred()
    adapter.save(tmp_path / "adapter")
    write_encoder(tower(seed=1), tmp_path / "other")
    flags = [str(tmp_path / "adapter"), "--encoder", str(tmp_path / "other"), "--out", str(tmp_path / "out")]
    with pytest.raises(DataError, match="trained on tiny eva_g"):
        lora(flags)
    assert not (tmp_path / "out").exists()
    assert load_encoder(lora([*flags, "--any_base"])).width == 32
    with pytest.raises(DataError, match="3 blocks, width 32"):
        lora([str(R8), "--encoder", str(tmp_path / "other"), "--out", str(tmp_path / "out2")])
    back = torch.load(lora([str(tmp_path / "adapter"), "--into", "official", "--out", str(tmp_path / "lora.pt")]), weights_only=True)
    assert all(torch.equal(back[key], tensor) for key, tensor in adapter.state().items())


@pytest.mark.parametrize("drop", [0, 1])
def test_lora_goes_into_a_blip2_folder_whose_last_block_was_cut_off(drop: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = Blip2VisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=3 - drop, num_attention_heads=4, image_size=28, initializer_range=0.02
    )
    torch.manual_seed(0)
    model = Blip2VisionModel(config).eval()
    holder = torch.nn.Module()
    holder.vision_model = model
    (tmp_path / "blip2").mkdir()
    names = {"vision_model." + key: tensor for key, tensor in model.state_dict().items()}
    (tmp_path / "blip2" / "config.json").write_text(config.to_json_string())
    save_file(
        {key: tensor.half().contiguous() for key, tensor in names.items()}, tmp_path / "blip2" / "model.safetensors", {"format": "pt"}
    )
    out = lora([str(R8), "--encoder", str(tmp_path / "blip2"), "--into", "blip2", "--out", str(tmp_path / "out")])
    assert ("block 2 is dropped" in capsys.readouterr().out) == bool(drop)
    before, after = load_file(tmp_path / "blip2" / "model.safetensors"), load_file(out / "model.safetensors")
    assert (out / "config.json").read_bytes() == (tmp_path / "blip2" / "config.json").read_bytes()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {f"vision_model.encoder.layers.{i}.self_attn.qkv.weight" for i in range(3 - drop)}
    for block in range(3 - drop):
        key = f"vision_model.encoder.layers.{block}.self_attn.qkv.weight"
        want = (before[key].float() + delta_weight(read_lora(R8).state, block, 1 / 8)).half()
        assert torch.equal(after[key], want)
    stirred()[1].save(tmp_path / "small")
    with pytest.raises(DataError, match="has 3 blocks of width 32"):
        lora([str(tmp_path / "small"), "--encoder", str(tmp_path / "blip2"), "--into", "blip2", "--out", str(tmp_path / "no")])
    assert not (tmp_path / "no").exists()


def test_a_head_file_becomes_a_head_folder(tmp_path: Path) -> None:
    source = GOLDEN / "det_head.safetensors"
    out = heads([str(source), "--task", "detection", "--attention_heads", "4", "--out", str(tmp_path / "head")])
    theirs = load_file(source)
    assert all(torch.equal(theirs[key], tensor) for key, tensor in to_official(load_head(out, "detection")).items())


def test_the_exported_encoder_stays_frozen_in_llava(tmp_path: Path) -> None:
    encoder, adapter = stirred("plain")
    with torch.no_grad():
        unmerged = encoder(images()).last_hidden_state
    adapter.merge()
    write_encoder(encoder, tmp_path / "encoder")
    exported = load_encoder(tmp_path / "encoder")
    model, _ = build_llava(exported, tiny_llm())
    set_stage(model, train_llm=True)
    frozen = model.model.vision_tower
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert {tensor.dtype for tensor in frozen.state_dict().values()} == {torch.float32}
    out = frozen(images().requires_grad_(True), output_hidden_states=True)
    assert out.hidden_states[-2].shape == (2, 17, 32)
    assert not out.last_hidden_state.requires_grad
    torch.testing.assert_close(out.last_hidden_state, unmerged, rtol=0, atol=1e-5)
