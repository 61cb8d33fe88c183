"""Encoders as transformers' own vision models: every hidden state, bit for bit the weights they came from, or a reason why not."""

import pytest
import torch
from llava_tiny import tiny_tower
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, SiglipVisionConfig, SiglipVisionModel

from encoders import stock_towers
from encoders.catalog import load_encoder
from encoders.modeling import VisionEncoder, VisionEncoderConfig
from encoders.stock_towers import stock_tower
from mmkit.errors import ConfigError

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}


@pytest.mark.parametrize("kind", ["clip", "clip with gelu", "siglip"])
def test_a_tower_of_transformers_comes_back_bit_for_bit(tmp_path, kind):
    act = {"hidden_act": "gelu"} if kind == "clip with gelu" else {}
    source = (
        SiglipVisionModel(SiglipVisionConfig(**SIZES))
        if kind == "siglip"
        else CLIPVisionModelWithProjection(CLIPVisionConfig(**SIZES, **act, projection_dim=16))
    )
    source.save_pretrained(tmp_path / "source")
    tower = stock_tower(load_encoder(f"hf:{tmp_path / 'source'}"), range(-4, 4))
    given = {name.removeprefix("vision_model."): tensor for name, tensor in source.state_dict().items()}
    found = {name.removeprefix("vision_model."): tensor for name, tensor in tower.state_dict().items()}
    assert set(given) - set(found) <= {"visual_projection.weight"}
    assert all(torch.equal(given[name], tensor) for name, tensor in found.items())


@pytest.mark.parametrize("name", ["tiny", "mini-clip"])
def test_a_plain_vision_transformer_becomes_a_vit(name):
    encoder = tiny_tower() if name == "tiny" else load_encoder(name)
    tower = stock_tower(encoder, (0, -2, -1))
    assert tower.config.model_type == "vit"
    images = torch.randn(2, 3, encoder.spec.size, encoder.spec.size)
    with torch.no_grad():
        given = encoder(images, output_hidden_states=True).hidden_states
        found = tower(images, output_hidden_states=True).hidden_states
    assert len(given) == len(found)
    for ours, theirs in zip(given, found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_an_encoder_in_half_precision_stays_as_it_was():
    encoder = tiny_tower().to(torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    assert {parameter.dtype for parameter in stock_tower(encoder).parameters()} == {torch.bfloat16}
    assert all(torch.equal(before[name], tensor) for name, tensor in encoder.state_dict().items())


@pytest.mark.parametrize(
    "architecture, args, reason",
    [
        ("eva02_tiny_patch14_224", {}, "rotary positions"),
        ("vit_tiny_patch16_224", {"reg_tokens": 2}, "register tokens"),
        ("vit_tiny_patch16_224", {"init_values": 1e-5}, "layer scale"),
        ("vit_tiny_patch16_224", {"qk_norm": True}, "normalised queries"),
        ("vit_tiny_patch16_224", {"no_embed_class": True}, "positions without a place for CLS"),
        ("vit_tiny_patch16_224", {"qkv_bias": False}, "attention without bias"),
        ("vit_tiny_patch16_224", {"act_layer": "silu"}, "activation SiLU"),
    ],
)
def test_what_transformers_has_no_form_for_is_said(architecture, args, reason):
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, **args}
    encoder = VisionEncoder(VisionEncoderConfig(architecture=architecture, model_args=sizes)).eval()
    with pytest.raises(ConfigError, match=reason):
        stock_tower(encoder)


def test_a_conversion_with_a_fault_is_refused(monkeypatch):
    monkeypatch.setattr(stock_towers, "_activation", lambda module: "quick_gelu")  # the wrong one: close, and silent
    with pytest.raises(ConfigError, match=r"does not convert to ViTModel: hidden state -2 differs by"):
        stock_tower(tiny_tower())
