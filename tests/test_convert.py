"""Conversions: official checkpoints in, open_clip and timm out, other sizes; and the traps on the way (encoders/convert.py, official.py)."""

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from encoders import convert
from encoders.catalog import load_encoder
from encoders.modeling import VisionEncoder, VisionEncoderConfig
from encoders.official import EVA_MODELS, UTA_MODELS, UTA_TEXT
from encoders.resize import resize_encoder, resize_kernel, resize_positions
from encoders.text import load_text_tower
from encoders.text_folder import build_text, read_text_folder
from mmkit.errors import ConfigError, DataError, NameNotFound

GOLDEN = Path(__file__).parent / "golden" / "uta"
CHECKPOINT = GOLDEN / "clip_checkpoint.safetensors"
SIZES: dict[str, Any] = {"img_size": 56, "patch_size": 14, "embed_dim": 96, "depth": 3, "num_heads": 3}
TEXT: dict[str, Any] = {"context_length": 77, "vocab_size": 320, "width": 48, "heads": 3, "layers": 2}
TOLERANCE = {"rtol": 0.0, "atol": 2e-5}
SMALL: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
SMALL_TEXT: dict[str, Any] = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}


def uta(source: Path, out: Path, sizes: dict[str, Any] = SIZES, text: dict[str, Any] = TEXT, *more: str) -> Path:
    return convert.uta([str(source), str(out), "--model_args", json.dumps(sizes), "--text_args", json.dumps(text), *more])


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return uta(CHECKPOINT, tmp_path_factory.mktemp("uta") / "encoder")


@pytest.fixture(scope="module")
def vision() -> dict[str, torch.Tensor]:
    return load_file(str(GOLDEN / "vision_io.safetensors"))


def official_state(sizes: dict[str, Any] = SMALL, text_args: dict[str, Any] = SMALL_TEXT, joint: int = 24) -> dict[str, torch.Tensor]:
    """A checkpoint in the authors' names, with random weights: what timm's filter renames, named back."""
    network = timm.create_model("eva02_base_patch14_224", **sizes, num_classes=joint, global_pool="token", head_init_scale=1.0)
    names = [("attn.q_proj.bias", "attn.q_bias"), ("attn.v_proj.bias", "attn.v_bias"), ("mlp.norm.", "mlp.ffn_ln.")]
    names += [("mlp.fc1_g.", "mlp.w1."), ("mlp.fc1_x.", "mlp.w2."), ("mlp.fc2.", "mlp.w3.")]
    state = {}
    for name, tensor in network.state_dict().items():
        for new, old in names:
            name = name.replace(new, old)
        state[f"visual.{name}"] = tensor + 0.1 * torch.randn_like(tensor)
    state |= {name: tensor.detach() for name, tensor in build_text(text_args, joint).state_dict().items()}
    return {**state, "logit_scale": torch.tensor(2.659)}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted checkpoint with CLIP's vocabulary, so that words work."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("small")
    torch.save(official_state(), folder / "small.pt")
    return uta(folder / "small.pt", folder / "encoder", SMALL, SMALL_TEXT)


# ---- official weights in ----------------------------------------------------------------------------------------------------------------


def test_the_official_checkpoint_gives_the_official_image_tokens(converted: Path, vision: dict[str, torch.Tensor]) -> None:
    encoder = load_encoder(converted)
    out = encoder(vision["images"])
    assert_close(out.pooler_output, vision["image_features"], **TOLERANCE)
    assert_close(out.last_hidden_state, vision["tokens_norm"], **TOLERANCE)
    assert_close(encoder.tokens(vision["images"]), vision["tokens_proj"], **TOLERANCE)
    for name in ("sorted", "shuffled", "single"):
        assert_close(encoder.tokens(vision["images"], vision[f"keep_{name}"]), vision[f"tokens_proj__{name}"], **TOLERANCE)


def test_the_official_checkpoint_gives_the_official_text_features_and_logits(converted: Path, vision: dict[str, torch.Tensor]) -> None:
    io = load_file(str(GOLDEN / "text_io.safetensors"))
    text, _ = read_text_folder(converted / "text_tower")
    features = text.encode_text(io["text_ids"])
    assert_close(features, io["text_features"], **TOLERANCE)
    images = load_encoder(converted)(vision["images"]).pooler_output
    logits = 100 * torch.nn.functional.normalize(images, dim=-1) @ torch.nn.functional.normalize(features, dim=-1).T
    assert_close(logits, io["logits_t001"], rtol=0, atol=1e-3)


def test_pixels_are_prepared_as_the_official_script_does(converted: Path) -> None:
    from PIL import Image

    io = load_file(str(GOLDEN / "preprocess_io.safetensors"))
    transform = load_encoder(converted).spec.transform()
    for name in [name for name in io if name.startswith("image_u8_")]:
        picture = Image.fromarray(io[name].numpy())
        assert_close(transform(picture), io[name.replace("image_u8", "pixels")], **TOLERANCE)


def test_a_converted_folder_can_be_moved_and_brings_its_text_tower(small: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    moved.symlink_to(small)
    encoder = load_encoder(moved)
    assert encoder.config.text_tower == str(moved / "text_tower")
    assert (small / "model.safetensors").stat().st_mode == (small / "config.json").stat().st_mode
    words = ["a red cat", "two owls"]
    features = load_text_tower(encoder.config.text_tower or "").encode(words)
    assert features.shape == (2, 24)
    assert torch.equal(load_text_tower(str(small)).encode(words), features)  # the encoder folder names it too


def test_a_converted_folder_is_ready_for_zero_shot(small: Path, tmp_path: Path) -> None:
    from PIL import Image

    from encoders.eval_zeroshot import main

    for name, colour in (("cat", "red"), ("dog", "blue")):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("RGB", (40, 40), colour).save(tmp_path / "images" / name / "0.png")
    out = main(["--encoder", str(small), "--images", str(tmp_path / "images"), "--out", str(tmp_path / "out"), "--prompts", "name"])
    summary = json.loads((out / "summary.json").read_text())
    assert summary["n"] == 2
    assert summary["protocol"]["text_tower"].endswith("text_tower")


def test_text_of_another_vocabulary_says_so_when_it_is_given_words(converted: Path) -> None:
    with pytest.raises(ConfigError, match=r"320 entries in its vocabulary, CLIP's tokenizer 49408"):
        load_text_tower(str(converted))


def test_a_training_file_is_unwrapped_and_half_weights_become_float(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = {f"module.{name}": tensor.half() for name, tensor in official_state().items()}
    torch.save({"epoch": 3, "name": "run", "state_dict": state}, tmp_path / "epoch_3.pt")
    encoder = load_encoder(uta(tmp_path / "epoch_3.pt", tmp_path / "e", SMALL, SMALL_TEXT))
    assert encoder.dtype == torch.float32
    assert "those under 'state_dict'" in capsys.readouterr().out
    half = load_encoder(uta(tmp_path / "epoch_3.pt", tmp_path / "half", SMALL, SMALL_TEXT, "--dtype", "float16"))
    assert half.dtype == torch.float16
    assert torch.equal(half.network.head.weight, encoder.network.head.weight.half())


@pytest.mark.parametrize("name", UTA_MODELS)
def test_the_named_models_have_the_papers_sizes(name: str) -> None:
    row = UTA_MODELS[name]
    with torch.device("meta"):
        network = timm.create_model(row.architecture, **row.model_args, num_classes=1024, global_pool="token")
        text = build_text(UTA_TEXT, 1024)
    millions = {"uta_b16": 86.638, "uta_l14_336": 304.646, "uta_g14_336": 1013.449}
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions[name], abs=5e-4)
    assert len(text.text.transformer.resblocks) == 24


# ---- EVA ---------------------------------------------------------------------------------------------------------------------------------

EVA_SIZES: dict[str, Any] = {"img_size": 56, "patch_size": 14, "embed_dim": 72, "depth": 2, "num_heads": 3, "mlp_ratio": 4.3637}


def test_an_eva_clip_tower_gives_the_official_targets(tmp_path: Path) -> None:
    golden = load_file(str(GOLDEN / "teacher_eva.safetensors"))
    save_file({name: tensor for name, tensor in golden.items() if name.startswith("visual.")}, str(tmp_path / "eva.safetensors"))
    out = convert.eva([str(tmp_path / "eva.safetensors"), str(tmp_path / "e"), "--model_args", json.dumps(EVA_SIZES)])
    tokens = load_encoder(out).tokens(golden["io.images"])
    assert_close(tokens[:, 0], golden["io.cls_joint"], **TOLERANCE)
    assert_close(tokens[:, 1:], golden["io.patches_joint"], **TOLERANCE)


def test_eva_vit_g_has_no_prefix_no_head_no_norm_and_keeps_its_last_block(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    golden = load_file(str(GOLDEN / "teacher_eva.safetensors"))
    bare = {name.removeprefix("visual."): tensor for name, tensor in golden.items() if name.startswith("visual.")}
    bare = {name: tensor for name, tensor in bare.items() if not name.startswith(("norm.", "head."))}
    torch.save(bare, tmp_path / "eva_vit_g.pth")
    encoder = load_encoder(
        convert.eva([str(tmp_path / "eva_vit_g.pth"), str(tmp_path / "e"), "--model", "eva_vit_g", "--model_args", json.dumps(EVA_SIZES)])
    )
    assert encoder.joint_width is None
    assert "no final norm in the file" in capsys.readouterr().out
    out = encoder(golden["io.images"], output_hidden_states=True)
    assert torch.equal(out.last_hidden_state, out.hidden_states[-1])
    # BLIP-2 reads the block before the last; the last one, the norm and the head lead to the golden embedding
    whole = timm.create_model("eva_giant_patch14_224", **EVA_SIZES, num_classes=64, global_pool="token").eval()
    whole.load_state_dict(timm.models.eva.checkpoint_filter_fn({k: v for k, v in golden.items() if k.startswith("visual.")}, whole))
    assert_close(whole.forward_head(whole.norm(out.hidden_states[-1])), golden["io.cls_joint"], **TOLERANCE)


def test_the_eva_table_names_networks_that_timm_and_open_clip_have() -> None:
    assert all(timm.is_model(row.architecture) for row in EVA_MODELS.values())
    assert EVA_MODELS["eva01_g14_plus"].text_args == UTA_TEXT  # UTA's text tower is its teacher's
    assert EVA_MODELS["eva02_l14"].joint_width == 768


# ---- the traps ---------------------------------------------------------------------------------------------------------------------------


def test_t1_t4_the_norm_stands_before_the_pooling_and_nothing_is_cropped_away(converted: Path) -> None:
    encoder = load_encoder(converted)
    assert isinstance(encoder.network.norm, torch.nn.LayerNorm)
    assert isinstance(encoder.network.fc_norm, torch.nn.Identity)
    assert encoder.network.norm.eps == 1e-6
    assert encoder.spec.crop_pct == 1.0


def test_t2_the_clip_entries_are_another_network_and_are_refused_by_a_diff(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"clip_checkpoint.safetensors does not fit Eva:\n.*attn.norm") as caught:
        uta(CHECKPOINT, tmp_path / "e", SIZES, TEXT, "--architecture", "eva02_base_patch16_clip_224")
    assert "missing" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_t3_an_argument_that_is_none_is_refused_not_ignored(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="ref_feat_shape is none, and timm ignores"):
        uta(CHECKPOINT, tmp_path / "e", {**SIZES, "ref_feat_shape": None})


@pytest.mark.parametrize(("sizes", "words"), [
    ({"img_size": 112}, r"patches of 14 px in a grid of 4 x 4 \(an image of 56 px\).* has patches of 14 px in 8 x 8 \(112 px\)"),
    ({"patch_size": 16, "img_size": 64}, r"patches of 14 px in a grid of 4 x 4.* has patches of 16 px in 4 x 4 \(64 px\)"),
])  # fmt: skip
def test_t7_other_sizes_are_refused_and_not_resampled(sizes: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=words) as caught:
        uta(CHECKPOINT, tmp_path / "e", {**SIZES, **sizes})
    assert "clip_checkpoint.safetensors" in str(caught.value)
    assert '"img_size": 56, "patch_size": 14' in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_t8_a_mask_token_is_left_out_and_moves_no_norm(vision: dict[str, torch.Tensor], tmp_path: Path) -> None:
    state = {**load_file(str(CHECKPOINT)), "visual.mask_token": torch.randn(1, 1, 96)}
    save_file(state, str(tmp_path / "mim.safetensors"))
    encoder = load_encoder(uta(tmp_path / "mim.safetensors", tmp_path / "e"))
    assert_close(encoder(vision["images"]).pooler_output, vision["image_features"], **TOLERANCE)
    assert not any("mask_token" in name for name in load_file(str(tmp_path / "e" / "model.safetensors")))


def test_a_rotary_table_of_another_reference_grid_is_seen(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a rotary table .* does not compute"):
        uta(CHECKPOINT, tmp_path / "e", {**SIZES, "ref_feat_shape": [4, 4]})


# ---- files that are not what they say ----------------------------------------------------------------------------------------------------


def tampered(change: str) -> dict[str, Any]:
    state: dict[str, Any] = load_file(str(CHECKPOINT))
    if change == "width":
        state["visual.head.weight"], state["visual.head.bias"] = torch.zeros(64, 80), torch.zeros(64)
    elif change == "depth":
        state = {name: tensor for name, tensor in state.items() if not name.startswith("visual.blocks.2.")}
    elif change == "a tensor is gone":
        del state["visual.blocks.1.mlp.ffn_ln.weight"]
    elif change == "a third tower":
        state["audio.proj"] = torch.zeros(3)
    elif change == "no text":
        state = {name: tensor for name, tensor in state.items() if not name.startswith("text.")}
    elif change == "a language model":
        state = {"model.layers.0.self_attn.q_proj.weight": torch.zeros(2, 2)}
    return state


@pytest.mark.parametrize(("change", "words"), [
    ("width", r"head.weight is \[64, 80\], should be \[64, 96\]"),
    ("depth", "has 2 blocks, .* 3"),
    ("a tensor is gone", "1 of .* tensors missing: blocks.1.mlp.norm.weight"),
    ("a third tower", "neither image nor text tower: audio.proj"),
    ("no text", "has no text tower"),
    ("a language model", "no checkpoint of UTA or EVA.*model.layers.0.self_attn.q_proj.weight"),
])  # fmt: skip
def test_a_checkpoint_that_is_not_what_it_says_is_refused_by_name(change: str, words: str, tmp_path: Path) -> None:
    save_file(tampered(change), str(tmp_path / "wrong.safetensors"))
    with pytest.raises(DataError, match=words) as caught:
        uta(tmp_path / "wrong.safetensors", tmp_path / "e")
    assert "wrong.safetensors" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["wrong.safetensors"]


class Danger:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        import os

        return os.system, ("touch pwned",)


@pytest.mark.parametrize("content", [b"", b"not weights at all", pickle.dumps({"visual.x": Danger()})])
def test_a_file_that_is_damaged_or_holds_code_is_not_opened(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "uta.pt").write_bytes(content)
    with pytest.raises(DataError, match=r"uta.pt is no whole weight file"):
        uta(tmp_path / "uta.pt", tmp_path / "e")
    assert [path.name for path in tmp_path.iterdir()] == ["uta.pt"]


def test_wrong_words_on_the_command_line_are_answered(converted: Path, tmp_path: Path) -> None:
    with pytest.raises(NameNotFound, match="nearest: uta_b16"):
        convert.uta([str(CHECKPOINT), str(tmp_path / "e"), "--model", "uta_b14"])
    with pytest.raises(ConfigError, match="say what the file holds: --model uta_b16"):
        convert.uta([str(CHECKPOINT), str(tmp_path / "e")])
    with pytest.raises(ConfigError, match="no valid JSON"):
        convert.uta([str(CHECKPOINT), str(tmp_path / "e"), "--model_args", "{img_size: 3}"])
    with pytest.raises(ConfigError, match="say its sizes: --text_args"):
        convert.uta([str(CHECKPOINT), str(tmp_path / "e"), "--model_args", json.dumps(SIZES)])
    with pytest.raises(ConfigError, match="cannot build a text tower"):
        uta(CHECKPOINT, tmp_path / "e", SIZES, {**TEXT, "widht": 3})
    with pytest.raises(DataError, match=r"text tower\) does not fit"):
        uta(CHECKPOINT, tmp_path / "e", SIZES, {**TEXT, "layers": 3})
    assert list(tmp_path.iterdir()) == []
    before = (converted / "config.json").read_bytes()
    with pytest.raises(ConfigError, match="exists already"):
        uta(CHECKPOINT, converted)
    assert (converted / "config.json").read_bytes() == before


# ---- out again ---------------------------------------------------------------------------------------------------------------------------


def test_open_clip_and_timm_alone_load_the_exports(small: Path, tmp_path: Path) -> None:
    encoder = load_encoder(small)
    convert.open_clip([str(small), str(tmp_path / "clip")])
    convert.plain_timm([str(small), str(tmp_path / "timm")])
    images, words = torch.randn(2, 3, 32, 32), ["a red cat", "two owls"]
    text = load_text_tower(str(small)).encode(words)
    save_file({"images": images, "image": encoder(images).pooler_output.detach(), "text": text}, str(tmp_path / "io.safetensors"))
    code = f"""
import sys; sys.modules.update(mmkit=None, encoders=None)
import json, open_clip, timm, torch
from safetensors.torch import load_file
io = load_file("io.safetensors")
exec(open("clip/timm_entry.py").read())
model, _, transform = open_clip.create_model_and_transforms("local-dir:clip")
model.eval()
ids = open_clip.get_tokenizer("local-dir:clip")({words!r})
found = {{
    "image": (model.encode_image(io["images"]) - io["image"]).abs().max().item(),
    "text": (model.encode_text(ids, normalize=True) - io["text"]).abs().max().item(),
    "scale": model.logit_scale.exp().item(),
    "transform": [str(step) for step in transform.transforms],
}}
plain = timm.create_model("local-dir:timm", pretrained=True).eval()
found["timm"] = (plain(io["images"]) - io["image"]).abs().max().item()
found["cfg"] = [plain.pretrained_cfg["input_size"], plain.pretrained_cfg["crop_pct"]]
print(json.dumps(found))
"""
    environment = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["image"] <= 1e-5
    assert found["text"] <= 1e-5
    assert found["scale"] == pytest.approx(100, rel=1e-5)
    assert "size=32" in found["transform"][0]
    assert found["timm"] == 0.0
    assert found["cfg"] == [[3, 32, 32], 1.0]


def test_an_exported_open_clip_model_comes_back_the_same(small: Path, tmp_path: Path) -> None:
    out = convert.open_clip([str(small), str(tmp_path / "clip")])
    again, first, images = load_encoder(f"openclip:{out}"), load_encoder(small), torch.randn(2, 3, 32, 32)
    assert_close(again.tokens(images), first.tokens(images), rtol=0, atol=1e-5)
    assert again.spec == first.spec
    assert_close(load_text_tower(str(out)).encode(["cat"]), load_text_tower(str(small)).encode(["cat"]))


def test_a_student_of_the_packaged_teacher_goes_out_with_the_teachers_text_tower(tmp_path: Path) -> None:
    args = {"img_size": 96, "patch_size": 16, "embed_dim": 48, "depth": 1, "num_heads": 3, "global_pool": "token"}
    spec = load_encoder("mini-clip").spec.to_dict()
    student = VisionEncoder(
        VisionEncoderConfig(
            architecture="eva02_base_patch14_224", model_args=args, joint_width=256, text_tower="mini-clip", image_spec=spec
        )
    ).eval()
    student.save_pretrained(tmp_path / "student")
    out = convert.open_clip([str(tmp_path / "student"), str(tmp_path / "clip")])
    words = ["a cat", "two owls and a bus"]
    assert torch.equal(load_text_tower(str(out)).encode(words), load_text_tower("mini-clip").encode(words))
    images = torch.randn(2, 3, 96, 96)
    assert_close(load_encoder(f"openclip:{out}")(images).pooler_output, student(images).pooler_output, rtol=0, atol=1e-5)
    torch.save(official_state(), tmp_path / "small.pt")
    uta(tmp_path / "small.pt", tmp_path / "small", SMALL, SMALL_TEXT)
    with pytest.raises(ConfigError, match="joint width 24"):
        convert.open_clip([str(tmp_path / "small"), str(tmp_path / "wrong"), "--text_tower", "mini-clip"])
    assert not (tmp_path / "wrong").exists()


# ---- other sizes -------------------------------------------------------------------------------------------------------------------------


def test_kernels_and_positions_are_resampled_as_the_golden_files_say() -> None:
    golden = load_file(str(GOLDEN / "convert_14to16.safetensors"))
    for method, kernel, positions in (("pi", "kernel16_pi", "pos_14x14_timm"), ("bicubic", "kernel16_bicubic", "pos_14x14_bicubic")):
        assert_close(resize_kernel(golden["kernel14"], 16, method), golden[kernel], rtol=0, atol=1e-6)  # type: ignore[arg-type]
        found = resize_positions(golden["pos_16x16"], (14, 14), (16, 16), 1, method)  # type: ignore[arg-type]
        assert_close(found, golden[positions], rtol=0, atol=1e-6)


def test_only_the_pseudo_inverse_keeps_the_response_to_an_even_patch() -> None:
    even = torch.ones(1, 3, 14, 14)
    assert float(resize_kernel(even, 16, "pi").sum() / even.sum()) == pytest.approx(1.0, abs=1e-3)
    assert float(resize_kernel(even, 16, "bicubic").sum() / even.sum()) == pytest.approx((16 / 14) ** 2, abs=1e-3)


@pytest.mark.parametrize("architecture", ["eva02_base_patch14_224", "vit_base_patch16_224"])
def test_resizing_is_what_timm_does_and_the_rotary_table_is_the_native_one(architecture: str) -> None:
    args = {"img_size": 224, "patch_size": 14, "embed_dim": 48, "depth": 1, "num_heads": 3, "global_pool": "token"}
    encoder = VisionEncoder(VisionEncoderConfig(architecture=architecture, model_args=args, joint_width=24)).eval()
    for patch, size in ((16, 224), (14, 336)):
        made = resize_encoder(encoder, patch, size, "pi")
        images = torch.randn(1, 3, size, size)
        theirs = timm.create_model(architecture, **args, num_classes=24).eval()
        theirs.load_state_dict(encoder.network.state_dict())
        theirs.set_input_size(img_size=(size, size), patch_size=(patch, patch))
        assert_close(made(images).last_hidden_state, theirs.forward_features(images), rtol=0, atol=1e-5)
        assert (made.spec.size, made.grid) == (size, (size // patch,) * 2)
        if architecture.startswith("eva"):
            native = timm.create_model(architecture, **{**args, "img_size": size, "patch_size": patch})
            assert torch.equal(made.network.rope.get_embed(), native.rope.get_embed())
        other = resize_encoder(encoder, patch, size, "bicubic")
        assert (other(images).last_hidden_state - made(images).last_hidden_state).abs().max() > 1e-3  # the two methods are two


def test_t5_a_resized_folder_says_its_new_size_everywhere_and_keeps_its_text(small: Path, tmp_path: Path) -> None:
    out = convert.resize([str(small), str(tmp_path / "r"), "--patch_size", "16", "--image_size", "96", "--method", "bicubic"])
    encoder = load_encoder(out)
    assert (encoder.grid, encoder.spec.size, encoder.config.patch_size) == ((6, 6), 96, 16)
    assert json.loads((out / "preprocessor_config.json").read_text())["crop_size"] == {"height": 96, "width": 96}
    assert torch.equal(load_text_tower(str(out)).encode(["cat"]), load_text_tower(str(small)).encode(["cat"]))
    assert encoder.config.training["resized"] == [{"method": "bicubic", "image_size": [32, 96], "patch_size": [8, 16]}]  # type: ignore[index]
    convert.plain_timm([str(out), str(tmp_path / "t")])
    config = json.loads((tmp_path / "t" / "config.json").read_text())
    assert config["pretrained_cfg"]["input_size"] == [3, 96, 96]
    assert torch.equal(
        timm.create_model(f"local-dir:{tmp_path / 't'}", pretrained=True).eval()(torch.ones(1, 3, 96, 96)),
        encoder(torch.ones(1, 3, 96, 96)).pooler_output,
    )


def test_a_size_that_is_no_whole_number_of_patches_is_refused(small: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="100 px is no whole number of patches of 16 px; the nearest is 96 px"):
        convert.resize([str(small), str(tmp_path / "r"), "--patch_size", "16", "--image_size", "100"])
    with pytest.raises(ConfigError, match="32 px and patches of 8 px already"):
        convert.resize([str(small), str(tmp_path / "r")])
    assert list(tmp_path.iterdir()) == []
