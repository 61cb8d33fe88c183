"""The encoder contract: one behaviour for every source (encoders/modeling.py, catalog.py, foreign.py)."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import (
    AutoModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from encoders.catalog import ENCODERS, describe, encoder_table, export_timm, load_encoder
from encoders.modeling import KeepPatches, VisionEncoder, VisionEncoderConfig
from mmkit.errors import ConfigError, DataError, NameNotFound

SIZES: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}
KINDS: dict[str, VisionEncoderConfig] = {
    "eva": VisionEncoderConfig(architecture="eva02_tiny_patch14_224", model_args={**SIZES, "global_pool": "token"}, joint_width=40),
    "clip": VisionEncoderConfig(architecture="vit_base_patch16_clip_224", model_args=SIZES, joint_width=40),
    "siglip": VisionEncoderConfig(architecture="vit_base_patch16_siglip_224", model_args={**SIZES, "num_classes": 0}, joint_width=48),
    "registers": VisionEncoderConfig(architecture="vit_base_patch16_224", model_args={**SIZES, "reg_tokens": 2}, joint_width=40),
    "no joint space": VisionEncoderConfig(architecture="vit_base_patch16_224", model_args=SIZES),
}
PREFIX = {"eva": 1, "clip": 1, "siglip": 0, "registers": 3, "no joint space": 1}


def encoder(kind: str = "eva") -> VisionEncoder:
    torch.manual_seed(3)
    return VisionEncoder(VisionEncoderConfig(**KINDS[kind].to_dict())).eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32)


@pytest.mark.parametrize("kind", KINDS)
def test_every_network_keeps_the_contract(kind: str, images: torch.Tensor) -> None:
    model = encoder(kind)
    out = model(images, output_hidden_states=True)
    tokens = PREFIX[kind] + 16
    assert (model.width, model.grid, model.num_patches, model.num_prefix_tokens) == (48, (4, 4), 16, PREFIX[kind])
    assert out.last_hidden_state.shape == (2, tokens, 48)
    assert [state.shape for state in out.hidden_states] == [(2, tokens, 48)] * 4
    assert out.pooler_output.shape == (2, model.joint_width or 48)
    assert model.spec.size == 32
    assert model.config.hidden_size == 48
    assert_close(model.network(images), out.pooler_output)
    assert_close(model.network.forward_features(images), out.last_hidden_state)


@pytest.mark.parametrize("kind", ["eva", "clip", "siglip", "registers"])
def test_token_zero_is_the_image_embedding_and_keeping_all_changes_nothing(kind: str, images: torch.Tensor) -> None:
    model = encoder(kind)
    tokens = model.tokens(images)
    every = torch.arange(16).expand(2, -1)
    assert tokens.shape == (2, 17, model.joint_width)
    assert_close(tokens[:, 0], model(images).pooler_output, rtol=0, atol=1e-5)
    assert_close(model.tokens(images, every), tokens, rtol=0, atol=1e-6)


def test_siglip_tokens_go_through_the_pooling_alone(images: torch.Tensor) -> None:
    model = encoder("siglip")
    features = model(images).last_hidden_state
    alone = model.network.attn_pool(features[:, 5:6])  # one patch, nothing else to look at
    assert_close(model.tokens(images)[:, 6], alone, rtol=0, atol=1e-6)


def test_a_subset_equals_hiding_the_others_from_attention(images: torch.Tensor) -> None:
    model = encoder("eva")
    keep = torch.tensor([[0, 3, 7, 12], [1, 2, 14, 15]])
    visible = torch.zeros(2, 17, dtype=torch.bool)
    visible[:, 0] = True
    visible.scatter_(1, keep + 1, True)
    whole = model.network.forward_features(images, attn_mask=visible[:, None, None, :])
    oracle = model.network.head(torch.cat([whole[:, :1], whole[:, 1:].gather(1, keep[..., None].expand(-1, -1, 48))], 1))
    assert_close(model.tokens(images, keep), oracle, rtol=0, atol=1e-5)


def test_the_order_of_kept_patches_only_permutes_the_tokens(images: torch.Tensor) -> None:
    model = encoder("eva")
    keep = torch.tensor([[0, 3, 7, 12], [1, 2, 14, 15]])
    order = torch.tensor([2, 0, 3, 1])
    plain, shuffled = model.tokens(images, keep), model.tokens(images, keep[:, order])
    assert_close(shuffled[:, 0], plain[:, 0], rtol=0, atol=1e-5)
    assert_close(shuffled[:, 1:], plain[:, 1:][:, order], rtol=0, atol=1e-5)


def test_a_dropped_patch_cannot_be_seen(images: torch.Tensor) -> None:
    model = encoder("eva")
    keep = torch.tensor([[1, 2, 3]] * 2)
    painted = images.clone()
    painted[:, :, :8, :8] = 9.0  # patch 0
    assert torch.equal(model.tokens(images, keep), model.tokens(painted, keep))
    model.tokens(images, keep).sum().backward()
    gradient = model.network.pos_embed.grad[0, 1:]
    assert torch.equal(gradient[0], torch.zeros(48))
    assert gradient[1].abs().max() > 0


def test_no_index_set_outlives_its_call(images: torch.Tensor) -> None:
    model = encoder("eva")
    before = model(images).pooler_output
    model.tokens(images, torch.tensor([[1, 2]] * 2))
    with pytest.raises(RuntimeError):
        model.tokens(images, torch.tensor([[1, 99]] * 2))  # out of range: the call fails in the middle
    assert isinstance(model.network.patch_drop, KeepPatches)
    assert model.network.patch_drop.keep is None
    assert torch.equal(model(images).pooler_output, before)


def test_hidden_states_can_be_chosen_by_number(images: torch.Tensor) -> None:
    model = encoder("clip")
    every = model(images, output_hidden_states=True).hidden_states
    some = model(images, output_hidden_states=[-2, 0]).hidden_states
    assert [state is None for state in some] == [False, True, False, True]
    assert torch.equal(some[2], every[2])
    assert torch.equal(model(images, output_hidden_states=-2).hidden_states[-2], every[-2])
    assert_close(model.network.norm(every[-1]), model(images).last_hidden_state)
    with pytest.raises(ValueError, match="hidden state 4 was asked for"):
        model(images, output_hidden_states=4)
    assert not model.network.blocks[0]._forward_hooks


def test_images_of_another_size_are_refused(images: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"images are \[2, 3, 16, 16\].*takes \[B, 3, 32, 32\]"):
        encoder()(images[:, :, :16, :16])
    with pytest.raises(ValueError, match="has no joint image-text space"):
        encoder("no joint space").tokens(images)


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_encoder_loads_the_same(kind: str, images: torch.Tensor, tmp_path: Path) -> None:
    model = encoder(kind)
    model.save_pretrained(tmp_path / "e")
    for again in (load_encoder(tmp_path / "e"), AutoModel.from_pretrained(tmp_path / "e").eval()):
        assert isinstance(again, VisionEncoder)
        assert torch.equal(again(images).pooler_output, model(images).pooler_output)
        assert again.spec == model.spec


def test_a_fresh_process_without_the_kit_loads_it_from_the_folder_alone(images: torch.Tensor, tmp_path: Path) -> None:
    model = encoder("eva")
    model.save_pretrained(tmp_path / "e")
    save_file({"images": images, "expected": model(images).pooler_output.detach()}, str(tmp_path / "io.safetensors"))
    code = (
        "import sys, torch; sys.modules.update(mmkit=None, encoders=None)\n"
        "from safetensors.torch import load_file; from transformers import AutoModel\n"
        f"io = load_file({str(tmp_path / 'io.safetensors')!r})\n"
        f"model = AutoModel.from_pretrained({str(tmp_path / 'e')!r}, trust_remote_code=True).eval()\n"
        "print('difference', float((model(io['images']).pooler_output - io['expected']).abs().max()), model.config.image_spec['size'])\n"
    )
    environment = {
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path),
    }
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120)
    assert "difference 0.0 32" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("kind", ["eva", "clip", "siglip"])
def test_llava_takes_it_as_its_tower_unchanged(kind: str, images: torch.Tensor, tmp_path: Path) -> None:
    model = encoder(kind)
    text = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2
    )
    select = "default" if model.num_prefix_tokens else "full"
    config = LlavaConfig(vision_config=model.config, text_config=text, image_token_index=49, vision_feature_select_strategy=select)
    llava = LlavaForConditionalGeneration(config).eval()
    llava.model.vision_tower.load_state_dict(model.state_dict())
    ids = torch.tensor([[1, *[49] * 16, 5, 6]] * 2)
    logits = llava(input_ids=ids, pixel_values=images).logits
    llava.save_pretrained(tmp_path / "llava")
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path / "llava").eval()
    assert torch.equal(again(input_ids=ids, pixel_values=images).logits, logits)
    assert torch.equal(again.model.vision_tower(images).pooler_output, model(images).pooler_output)


def test_the_network_inside_is_a_plain_timm_checkpoint(images: torch.Tensor, tmp_path: Path) -> None:
    model = encoder("eva")
    export_timm(model, tmp_path / "t")
    plain = timm.create_model(f"local-dir:{tmp_path / 't'}", pretrained=True).eval()
    assert_close(plain(images), model(images).pooler_output, rtol=0, atol=0)
    assert plain.pretrained_cfg["input_size"][-1] == 32
    assert isinstance(model.network.patch_drop, KeepPatches)


# ---- sources ----------------------------------------------------------------------------------------------------------------------------

TEXT = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
VISION: dict[str, dict[str, Any]] = {
    "native": {"image_size": 32, "layers": 2, "width": 48, "head_width": 16, "patch_size": 8},
    "native_no_norm": {"image_size": 32, "layers": 2, "width": 48, "head_width": 16, "patch_size": 8, "no_ln_pre": True},
    "native_average": {"image_size": 32, "layers": 2, "width": 48, "head_width": 16, "patch_size": 8, "pool_type": "avg"},
    "resnet": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16},
    "mini": {"image_size": 96, "timm_model_name": "vit_mini_patch16_96", "timm_pool": "token", "timm_proj": ""},
    "mini_linear": {"image_size": 96, "timm_model_name": "vit_mini_patch16_96", "timm_pool": "token", "timm_proj": "linear"},
    "mini_mlp": {"image_size": 96, "timm_model_name": "vit_mini_patch16_96", "timm_pool": "token", "timm_proj": "mlp"},
    "eva": {"image_size": 224, "timm_model_name": "eva02_tiny_patch14_224", "timm_pool": "token", "timm_proj": None},
}


def clip_folder(folder: Path, vision: str, quick_gelu: bool = False) -> tuple[str, Any]:
    """Write an open_clip folder with random weights; gives its source, and the model."""
    config = {"embed_dim": 40, "vision_cfg": VISION[vision], "text_cfg": TEXT, "quick_gelu": quick_gelu}
    model = open_clip.CLIP(**config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, std=0.5)  # biases of 0 would hide one that is lost
    folder.mkdir()
    save_file(model.state_dict(), str(folder / "open_clip_model.safetensors"))
    preprocess = {
        "size": VISION[vision]["image_size"],
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "resize_mode": "squash",
        "interpolation": "bicubic",
    }
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    return f"openclip:{folder}", model


@pytest.mark.parametrize("quick_gelu", [False, True])
@pytest.mark.parametrize("vision", ["native", "mini", "mini_linear", "eva"])
def test_an_open_clip_tower_gives_open_clips_own_embedding(vision: str, quick_gelu: bool, tmp_path: Path) -> None:
    source, model = clip_folder(tmp_path / "clip", vision, quick_gelu)
    tower = load_encoder(source)
    images = torch.randn(2, 3, tower.spec.size, tower.spec.size)
    assert_close(tower(images).pooler_output, model.encode_image(images), rtol=0, atol=1e-4)
    assert_close(tower.tokens(images)[:, 0], model.encode_image(images), rtol=0, atol=1e-4)
    assert (tower.joint_width, tower.config.text_tower) == (40, source)
    assert (tower.spec.resize, tower.spec.mean) == ("squash", (0.5, 0.5, 0.5))


@pytest.mark.parametrize(("vision", "words"), [
    ("native_no_norm", "without its first norm"),
    ("native_average", "pooling 'avg'"),
    ("resnet", "ModifiedResNet"),
    ("mini_mlp", "no single linear"),
])  # fmt: skip
def test_a_tower_that_cannot_be_expressed_is_refused(vision: str, words: str, tmp_path: Path) -> None:
    source, _ = clip_folder(tmp_path / "clip", vision)
    with pytest.raises(ConfigError, match=words):
        load_encoder(source)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_a_clip_of_transformers_gives_its_own_embedding(activation: str, images: torch.Tensor, tmp_path: Path) -> None:
    config = CLIPVisionConfig(
        hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=3, image_size=32, patch_size=8, projection_dim=40,
        hidden_act=activation,
    )  # fmt: skip
    model = CLIPVisionModelWithProjection(config).eval()
    model.save_pretrained(tmp_path)
    tower = load_encoder(f"hf:{tmp_path}")
    theirs = model(images, output_hidden_states=True)
    assert_close(tower(images).pooler_output, theirs.image_embeds, rtol=0, atol=1e-5)
    assert_close(tower(images, output_hidden_states=-2).hidden_states[-2], theirs.hidden_states[-2], rtol=0, atol=1e-5)


def test_a_siglip_of_transformers_gives_its_own_embedding(images: torch.Tensor, tmp_path: Path) -> None:
    model = SiglipVisionModel(
        SiglipVisionConfig(hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=3, image_size=32, patch_size=8)
    ).eval()
    model.save_pretrained(tmp_path)
    tower = load_encoder(f"hf:{tmp_path}")
    assert_close(tower(images).pooler_output, model(images).pooler_output, rtol=0, atol=1e-5)
    assert (tower.num_prefix_tokens, tower.spec.resize) == (0, "squash")


def test_a_timm_name_gives_timms_network(tmp_path: Path) -> None:
    tower = load_encoder("timm:eva02_tiny_patch14_224", pretrained=False)
    assert (tower.joint_width, tower.grid, tower.spec.crop_pct) == (None, (16, 16), 0.9)
    assert load_encoder("timm:vit_base_patch16_clip_224.openai", pretrained=False).joint_width == 512
    assert load_encoder("timm:vit_base_patch16_siglip_224.webli", pretrained=False).joint_width == 768


@pytest.mark.parametrize(("source", "near"), [
    ("mini-clp", "mini-clip"),
    ("timm:eva02_base_patch14_22", "timm:eva02_base_patch14_224"),
    ("openclip:ViT-B-61/openai", "openclip:ViT-B-16"),
    ("openclip:ViT-B-16/opnai", "openai"),
])  # fmt: skip
def test_an_unknown_name_is_answered_with_its_neighbours(source: str, near: str) -> None:
    with pytest.raises(NameNotFound, match=r"nearest|open_clip has") as caught:
        load_encoder(source)
    assert near in str(caught.value)
    assert source in str(caught.value)


def test_a_network_without_tokens_is_refused() -> None:
    with pytest.raises(ConfigError, match="'timm:resnet18' is a ResNet"):
        load_encoder("timm:resnet18")


def damaged(folder: Path, damage: str) -> None:
    encoder("eva").save_pretrained(folder)
    weights, config = folder / "model.safetensors", folder / "config.json"
    state, values = load_file(str(weights)), json.loads(config.read_text())
    if damage == "shape":
        state["network.head.weight"] = torch.zeros(7, 48)
    elif damage == "missing":
        del state["network.blocks.1.norm1.weight"], state["network.blocks.1.norm1.bias"]
    elif damage == "extra":
        state["network.mask_token"] = torch.zeros(1)
    save_file(state, str(weights))
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif damage == "gone":
        weights.unlink()
    elif damage == "width":
        config.write_text(json.dumps({**values, "hidden_size": 64}))
    elif damage == "type":
        config.write_text(json.dumps({**values, "model_type": "llava"}))
    elif damage == "json":
        config.write_text("{")


@pytest.mark.parametrize(("damage", "words"), [
    ("shape", r"head.weight is \[7, 48\], should be \[40, 48\]"),
    ("missing", r"2 of \d+ tensors missing, all under network.blocks.1.norm1"),
    ("extra", "unexpected: network.mask_token"),
    ("truncated", "no whole weight file"),
    ("gone", "has no model.safetensors"),
    ("width", "config.json says hidden_size 64"),
    ("type", "of type 'llava', not an encoder"),
    ("json", "no valid JSON"),
])  # fmt: skip
def test_a_damaged_folder_is_refused_by_name(damage: str, words: str, tmp_path: Path) -> None:
    folder = tmp_path / "enc"
    damaged(folder, damage)
    with pytest.raises(DataError, match=words) as caught:
        load_encoder(folder)
    assert "enc" in str(caught.value) or "config.json" in str(caught.value)


def test_a_run_folder_points_to_the_encoder_in_it(tmp_path: Path) -> None:
    encoder().save_pretrained(tmp_path / "run" / "encoder")
    with pytest.raises(DataError, match=r"Did you mean .*encoder"):
        load_encoder(tmp_path / "run")


def test_the_table_shows_parameters_origin_and_spec() -> None:
    text = encoder_table({"tower": encoder()})
    assert "tower" in text
    assert "random weights" in text
    assert "images 32 px, crop, bicubic" in text
    assert "4 x 4 patches + 1" in describe(encoder())
    assert all(row.source and row.licence for row in ENCODERS.values())


def test_the_teacher_in_the_package_loads_as_open_clip_has_it() -> None:
    tower = load_encoder("mini-clip")
    folder = Path(__file__).resolve().parent.parent / "encoders" / "data" / "mini_clip"
    images = torch.randn(2, 3, 96, 96)
    theirs = open_clip.create_model(f"local-dir:{folder}").eval().encode_image(images)
    assert_close(tower(images).pooler_output, theirs, rtol=0, atol=1e-4)
    assert (tower.joint_width, tower.grid, tower.config.text_tower) == (256, (6, 6), "mini-clip")


@pytest.mark.parametrize("first", ["encoders.modeling", "encoders.joined", "transformers"])
def test_transformers_knows_both_encoders_whichever_module_comes_first(first: str, child_environment: dict[str, str]) -> None:
    """A module that registers itself may be what imports transformers, and mmkit may have been imported before."""
    code = f"import mmkit, {first}; from transformers import AutoConfig; "
    code += "[AutoConfig.for_model(name) for name in ('mmkit_vision_encoder', 'mmkit_joined_encoder')]"
    subprocess.run([sys.executable, "-c", code], check=True, env=child_environment, timeout=300)
