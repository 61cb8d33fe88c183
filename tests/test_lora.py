"""LoRA on q and v: the laws of ViSFT's second stage, and the numbers of the authors' own classes (tests/golden/visft)."""

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from encoders.catalog import load_encoder
from encoders.convert import write_encoder
from encoders.lora import LoraAdapter, LoraSettings, add_lora, base_hash
from encoders.lora_files import delta_weight, lora_state, read_lora, write_official
from encoders.modeling import VisionEncoder, VisionEncoderConfig
from encoders.official import OfficialModel, image_tower, read_checkpoint
from mmkit.errors import ConfigError, DataError, TrainingError

GOLDEN = Path(__file__).parent / "golden" / "visft"
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
TOWERS = {
    "plain": ("vit_tiny_patch16_224", SMALL),
    "siglip": ("vit_base_patch16_siglip_224", SMALL),
    "eva_g": ("eva_giant_patch14_clip_224", SMALL | {"mlp_ratio": 2.0}),
    "eva_e": ("eva02_enormous_patch14_clip_224", SMALL | {"mlp_ratio": 2.0}),
    "eva02": ("eva02_base_patch16_clip_224", SMALL | {"mlp_ratio": 2.0}),
}
GOLDEN_TOWERS = {
    "g": OfficialModel("eva_giant_patch14_clip_224", {"img_size": 56, "embed_dim": 64, "depth": 3, "num_heads": 4, "mlp_ratio": 4.0}),
    "e": OfficialModel("eva02_enormous_patch14_clip_224", {"img_size": 56, "embed_dim": 64, "depth": 3, "num_heads": 4, "mlp_ratio": 6.0}),
}


def tower(name: str = "eva_g", seed: int = 0, **changes: Any) -> VisionEncoder:
    torch.manual_seed(seed)
    architecture, args = TOWERS[name]
    encoder = VisionEncoder(VisionEncoderConfig(architecture=architecture, model_args=args | changes, origin=f"tiny {name}")).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))  # biases and norms too
    return encoder


def images(count: int = 2, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def stirred(name: str = "eva_g", rank: int = 4, alpha: float = 4.0) -> tuple[VisionEncoder, LoraAdapter]:
    """A tower whose LoRA does something."""
    encoder = tower(name)
    adapter = add_lora(encoder, LoraSettings(rank, alpha), seed=0)
    generator = torch.Generator().manual_seed(5)
    adapter.load(
        {key: value if key.endswith("A") else 0.1 * torch.randn(value.shape, generator=generator) for key, value in adapter.state().items()}
    )
    return encoder, adapter


def loss_of(encoder: VisionEncoder) -> torch.Tensor:
    out: torch.Tensor = encoder(images()).last_hidden_state
    return (out * torch.linspace(-1, 1, out.shape[-1])).square().mean()


@pytest.mark.parametrize("name", TOWERS)
def test_a_new_lora_changes_no_bit_and_passes_the_guard(name: str) -> None:
    encoder = tower(name)
    before, weights = encoder(images()).last_hidden_state, copy.deepcopy(encoder.state_dict())
    adapter = add_lora(encoder, LoraSettings(4, 2.0), seed=0)
    assert torch.equal(encoder(images()).last_hidden_state, before)
    adapter.check(images())
    assert torch.equal(encoder(images()).last_hidden_state, before)
    assert all(parameter.grad is None for parameter in encoder.parameters())
    assert {id(p) for p in encoder.parameters() if p.requires_grad} == {id(p) for p in adapter.parameters()}
    assert len(list(adapter.parameters())) == 2 * sum(len(target.layers) for target in adapter.targets)
    adapter.merge()
    assert all(torch.equal(tensor, weights[key]) for key, tensor in encoder.state_dict().items())


def test_a_depends_on_its_seed_alone_and_lies_within_its_bound() -> None:
    torch.manual_seed(1)
    first = add_lora(tower(), LoraSettings(4), seed=7).state()
    second = add_lora(tower(seed=3), LoraSettings(4), seed=7).state()
    other = add_lora(tower(), LoraSettings(4), seed=8).state()
    assert all(torch.equal(first[key], second[key]) for key in first)
    a = first["visual.blocks.0.attn.qkv.lora_A"]
    assert not torch.equal(a, other["visual.blocks.0.attn.qkv.lora_A"])
    assert 0.9 * 32**-0.5 < float(a.abs().max()) <= 32**-0.5
    assert not first["visual.blocks.0.attn.qkv.lora_B"].any()


@pytest.mark.parametrize("name", TOWERS)
def test_the_first_step_moves_b_alone_and_training_touches_nothing_but_a_and_b(name: str) -> None:
    encoder = tower(name)
    before = {key: tensor.clone() for key, tensor in encoder.state_dict().items()}
    adapter = add_lora(encoder, LoraSettings(4, 4.0), seed=0)
    start = {key: tensor.clone() for key, tensor in adapter.named_parameters()}
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2, weight_decay=1e-2)
    loss_of(encoder).backward()
    for key, parameter in adapter.named_parameters():
        assert parameter.grad is not None
        assert bool(parameter.grad.any()) == key.endswith("lora_B"), key
    optimizer.step()
    for key, parameter in adapter.named_parameters():
        if key.endswith("lora_A"):
            torch.testing.assert_close(parameter.detach(), start[key] * (1 - 1e-4), rtol=1e-6, atol=0)
        elif adapter.targets[0].fused:
            moved = parameter.detach().abs()
            assert not moved[32:64].any()
            assert not moved[:32, 4:].any()
            assert not moved[64:, :4].any()
            assert float(moved[:32, :4].max()) == pytest.approx(1e-2, rel=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(encoder).backward()
        optimizer.step()
    now = {key.replace(".base_layer.", "."): tensor for key, tensor in encoder.state_dict().items() if ".lora_" not in key}
    assert now.keys() == before.keys()
    assert all(torch.equal(now[key], tensor) for key, tensor in before.items())
    adapter.merge()
    merged = encoder.state_dict()
    changed = {key for key in before if not torch.equal(merged[key], before[key])}
    assert changed == {f"network.{name}.weight" for target in adapter.targets for name in target.names}
    if adapter.targets[0].fused:
        assert all(torch.equal(merged[key][32:64], before[key][32:64]) for key in changed)


@pytest.mark.parametrize("name", TOWERS)
def test_merged_equals_unmerged_and_merging_twice_is_merging_once(name: str) -> None:
    plain = tower(name)
    encoder, adapter = stirred(name)
    want, state = encoder(images()).last_hidden_state, adapter.state()
    assert float((want - plain(images()).last_hidden_state).detach().abs().max()) > 1e-2
    encoder.train().eval()
    assert torch.equal(encoder(images()).last_hidden_state, want)  # modes touch no weight
    adapter.merge()
    torch.testing.assert_close(encoder(images()).last_hidden_state, want, rtol=0, atol=1e-5)
    once = copy.deepcopy(encoder.state_dict())
    adapter.merge()
    assert {key: tensor.shape for key, tensor in once.items()} == {key: tensor.shape for key, tensor in plain.state_dict().items()}
    assert all(torch.equal(tensor, once[key]) for key, tensor in encoder.state_dict().items())
    assert all(torch.equal(tensor, state[key]) for key, tensor in adapter.state().items())
    with pytest.raises(ConfigError, match="merged"):
        adapter.load(state)
    add_lora(encoder, LoraSettings(2))  # an ordinary encoder takes LoRA again


def test_the_guard_names_a_layer_whose_weight_is_read_past_lora() -> None:
    encoder = tower("eva_g")
    adapter = add_lora(encoder, LoraSettings(4))
    encoder.network.blocks[1].attn.qkv_bias_separate = False
    with pytest.raises(TrainingError, match=r"blocks\.1\.attn\.qkv\.lora_A got no gradient \(2 of 6"):
        adapter.check(images())
    for block in encoder.network.blocks:
        block.attn.qkv_bias_separate = False
    with pytest.raises(TrainingError, match=r"blocks\.0\.attn\.qkv\.lora_A got no gradient \(6 of 6.*qkv_bias_separate"):
        adapter.check(images())
    assert not any(tensor.any() for key, tensor in adapter.state().items() if key.endswith("B"))


@pytest.mark.parametrize("name", ["plain", "eva_g"])
def test_checkpointing_gives_the_same_gradients(name: str) -> None:
    encoder, adapter = stirred(name)
    found = []
    for on in (False, True):
        encoder.network.set_grad_checkpointing(on)
        loss_of(encoder).backward()
        found.append([parameter.grad.clone() for parameter in adapter.parameters() if parameter.grad is not None])
        for parameter in adapter.parameters():
            parameter.grad = None
    assert len(found[0]) == len(found[1]) == 6
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_a_bfloat16_base_keeps_its_type_and_merging_into_it_warns() -> None:
    encoder = tower().to(torch.bfloat16)
    adapter = add_lora(encoder, LoraSettings(4, 4.0))
    adapter.check(images())
    assert {parameter.dtype for parameter in adapter.parameters()} == {torch.float32}
    assert encoder(images()).last_hidden_state.dtype == torch.bfloat16
    assert adapter.base_hash() == base_hash(tower()) != base_hash(tower(seed=1))
    with pytest.warns(UserWarning, match="bfloat16"):
        adapter.merge()
    assert {tensor.dtype for tensor in encoder.state_dict().values()} == {torch.bfloat16}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stirred()[1].merge()


def test_the_change_of_each_block_is_that_of_its_merged_weights() -> None:
    for name in ("plain", "eva02"):
        plain = tower(name).state_dict()
        encoder, adapter = stirred(name)
        logged = adapter.change()
        adapter.merge()
        for target, ratio in zip(adapter.targets, logged, strict=True):
            before = torch.cat([plain[f"network.{key}.weight"] for key in target.names])
            after = torch.cat([encoder.state_dict()[f"network.{key}.weight"] for key in target.names])
            rows = torch.cat([before[:32], before[-32:]])
            assert ratio == pytest.approx(float((after - before).norm() / rows.norm()), rel=1e-4)


# ---- files -----------------------------------------------------------------------------------------------------------------------------


def test_an_adapter_folder_brings_back_the_same_encoder(tmp_path: Path) -> None:
    encoder, adapter = stirred()
    adapter.save(tmp_path / "adapter", note="kept")
    adapter.save(tmp_path / "adapter")
    file = read_lora(tmp_path / "adapter")
    assert (file.rank, file.alpha, file.depth, file.width) == (4, 4.0, 3, 32)
    assert file.base == base_hash(tower())
    assert json.loads((tmp_path / "adapter" / "adapter.json").read_text())["targets"][2] == "blocks.2.attn.qkv"
    again = tower()
    add_lora(again, LoraSettings(4, 4.0), seed=9).load(file.state, file.source)
    assert torch.equal(again(images()).last_hidden_state, encoder(images()).last_hidden_state)
    (tmp_path / "other").mkdir()
    with pytest.raises(DataError, match="no adapter folder"):
        adapter.save(tmp_path / "other")


def test_lora_of_another_depth_width_or_rank_is_refused_and_changes_nothing() -> None:
    _, adapter = stirred()
    before = adapter.state()
    for changes, words in (({"depth": 2}, "missing"), ({"depth": 4}, "unexpected"), ({"embed_dim": 48}, "should be")):
        other = add_lora(tower("eva_g", **changes), LoraSettings(4)).state()
        with pytest.raises(DataError, match=words) as error:
            adapter.load(other, "file.pt")
        assert "file.pt" in str(error.value)
        assert "3 blocks, width 32" in str(error.value)
    with pytest.raises(DataError, match="rank 4"):
        adapter.load(add_lora(tower(), LoraSettings(2)).state())
    assert all(torch.equal(tensor, before[key]) for key, tensor in adapter.state().items())


def test_broken_tables_are_refused_by_name() -> None:
    good = load_file(GOLDEN / "lora_r8.safetensors")
    a, b = "visual.blocks.1.attn.qkv.lora_A", "visual.blocks.1.attn.qkv.lora_B"
    for broken, words in (
        ({key: value for key, value in good.items() if key != b}, r"no visual\.blocks\.1\.attn\.qkv\.lora_B"),
        (good | {"visual.blocks.1.mlp.lora_A": good[a]}, r"'visual\.blocks\.1\.mlp\.lora_A' is no tensor"),
        (good | {a: good[a][:, :60]}, r"block 1 has lora_A \[16, 60\].*\[16, 64\]"),
        (good | {a.replace("visual.", ""): good[a]}, "twice"),
        ({}, "no tensors"),
    ):
        with pytest.raises(DataError, match=words):
            lora_state(broken, "file.pt")


def test_the_authors_file_comes_back_as_the_same_table(tmp_path: Path) -> None:
    theirs = load_file(GOLDEN / "lora_r8.safetensors")
    torch.save(theirs, tmp_path / "eva_g_lora_5000.pt")
    encoder = golden_tower("g")
    adapter = add_lora(encoder, LoraSettings(8))
    adapter.load(read_lora(tmp_path / "eva_g_lora_5000.pt").state)
    adapter.save(tmp_path / "adapter")
    write_official(read_lora(tmp_path / "adapter").state, tmp_path / "back.pt")
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[key], theirs[key]) and back[key].dtype == theirs[key].dtype for key in theirs)


def test_an_untrained_lora_is_exported_as_the_source_byte_for_byte(tmp_path: Path) -> None:
    source = tower()
    with torch.no_grad():
        source.network.blocks[0].attn.qkv.weight[0, 0] = -0.0
    write_encoder(source, tmp_path / "source")
    encoder = load_encoder(tmp_path / "source")
    add_lora(encoder, LoraSettings(4)).merge()
    write_encoder(encoder, tmp_path / "export")
    names = sorted(path.name for path in (tmp_path / "source").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "export").iterdir())
    for name in names:
        assert (tmp_path / "source" / name).read_bytes() == (tmp_path / "export" / name).read_bytes(), name


# ---- the authors' numbers --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def io() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "encoder_io.safetensors")


def golden_tower(name: str) -> VisionEncoder:
    return image_tower(read_checkpoint(GOLDEN / f"tower_{name}.safetensors"), GOLDEN_TOWERS[name], f"golden {name}")


def without_cls(encoder: VisionEncoder, pixels: torch.Tensor) -> torch.Tensor:
    """The authors' feature map [B, D, h, w]: no CLS in the sequence, positions resized without antialias."""
    network = encoder.network
    grown = network.patch_embed.proj(pixels)  # [B, D, h, w]; rests at the right and bottom are cut
    positions = network.pos_embed[:, 1:].transpose(1, 2).unflatten(2, encoder.grid)
    positions = torch.nn.functional.interpolate(positions, size=grown.shape[-2:], mode="bicubic", align_corners=False)
    tokens = (grown + positions).flatten(2).transpose(1, 2)
    for block in network.blocks:
        tokens = block(tokens)
    return network.norm(tokens).transpose(1, 2).unflatten(2, grown.shape[-2:])


@pytest.mark.parametrize("name", ["g", "e"])
@pytest.mark.parametrize("variant", ["base", "r8", "r64"])
def test_outputs_are_the_authors_before_and_after_merging(name: str, variant: str, io: dict[str, torch.Tensor]) -> None:
    encoder, pixels = golden_tower(name), io["pixels.native"]
    adapter = None
    if variant != "base":
        file = read_lora(GOLDEN / f"lora_{variant}.safetensors")
        adapter = add_lora(encoder, LoraSettings(file.rank, file.alpha))
        adapter.load(file.state)
    for merged in (False, True):
        if merged and adapter:
            adapter.merge()
        with torch.no_grad():
            out = encoder(pixels)
            found = {"tokens_cls.native": out.last_hidden_state, "embed.native": out.pooler_output}
            found |= {f"map_nocls.{size}": without_cls(encoder, io[f"pixels.{size}"]) for size in ("native", "other")}
        for key, tensor in found.items():
            torch.testing.assert_close(tensor, io[f"{name}.{variant}.{key}"], rtol=0, atol=1e-5)  # the bare tower differs by 5.5e-6 already


@pytest.mark.parametrize("rank", [8, 64])
def test_what_is_added_to_the_weights_is_the_authors(rank: int, io: dict[str, torch.Tensor]) -> None:
    file = read_lora(GOLDEN / f"lora_r{rank}.safetensors")
    encoder = golden_tower("g")
    before = copy.deepcopy(encoder.state_dict())
    adapter = add_lora(encoder, LoraSettings(rank))
    adapter.load(file.state)
    adapter.merge()
    for block in range(file.depth):
        want, key = io[f"delta.r{rank}.blocks.{block}"], f"network.blocks.{block}.attn.qkv.weight"
        torch.testing.assert_close(delta_weight(file.state, block, 1 / rank), want, rtol=0, atol=1e-6)
        torch.testing.assert_close(encoder.state_dict()[key] - before[key], want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["g", "e"])
def test_gradients_are_the_authors(name: str, io: dict[str, torch.Tensor]) -> None:
    encoder = golden_tower(name)
    adapter = add_lora(encoder, LoraSettings(8))
    adapter.load(read_lora(GOLDEN / "lora_r8.safetensors").state)
    found = without_cls(encoder, io["pixels.native"])
    loss = (found.square() * (torch.arange(64) / 64)[:, None, None]).mean()
    torch.testing.assert_close(loss.reshape(1), io[f"{name}.r8.loss"], rtol=1e-5, atol=0)
    loss.backward()
    for target in adapter.targets:
        for _, a, b in target.a_and_b():
            assert a.grad is not None
            assert b.grad is not None
            torch.testing.assert_close(a.grad, io[f"{name}.r8.grad.blocks.{target.block}.lora_A"], rtol=0, atol=1e-6)
            halves = torch.cat([b.grad[:64, :8], b.grad[128:, 8:]])
            torch.testing.assert_close(halves, io[f"{name}.r8.grad.blocks.{target.block}.lora_B"], rtol=0, atol=1e-6)
