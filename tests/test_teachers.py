"""Teachers of every family through one interface, against each family's own code; students that see a part (encoders/teachers.py)."""

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

from encoders.architectures import register_entry
from encoders.modeling import VisionEncoder, VisionEncoderConfig
from encoders.teachers import Teacher, check_student, load_teacher
from encoders.text import load_text_tower, word_tokenizer
from mmkit.errors import ConfigError, DataError
from mmkit.images import ImageSpec, renormalise

SMALL: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
TEXT = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
NATIVE = {"image_size": 32, "layers": 2, "width": 48, "head_width": 16, "patch_size": 8}
# open_clip's families at a small size: the vision configuration, and what is registered with timm for it
FAMILIES: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "OpenAI ViT": ({**NATIVE}, "", {"quick_gelu": True}),
    "OpenCLIP ViT": ({**NATIVE}, "", {}),
    "EVA-CLIP g": ({"timm_pool": "token", "timm_proj": None}, "eva_giant_patch14_224", {}),
    "EVA-CLIP E": ({"timm_pool": "token", "timm_proj": None}, "eva02_enormous_patch14_clip_224", {}),
    "EVA-02-CLIP": ({"timm_pool": "token", "timm_proj": None}, "eva02_base_patch16_clip_224", {}),
    "SigLIP": ({"timm_pool": "map", "timm_proj": "none"}, "vit_base_patch16_siglip_224", {}),
    "SigLIP 2": ({"timm_pool": "map", "timm_proj": "none"}, "vit_base_patch16_siglip_256", {}),
}


def shake(model: torch.nn.Module) -> None:
    """Biases and norms away from 0 and 1, where one that is lost would not be missed."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2 if parameter.dim() > 1 else 0.5)


def open_clip_model(family: str, folder: Path) -> Any:
    vision, entry, more = FAMILIES[family]
    if entry:
        name = f"test_{entry}"
        register_entry(name, entry, SMALL)
        vision = {**vision, "image_size": 32, "timm_model_name": name}
    config = {"embed_dim": 48 if "SigLIP" in family else 40, "vision_cfg": vision, "text_cfg": TEXT, **more}
    model = open_clip.CLIP(**config).eval()
    shake(model)
    folder.mkdir()
    save_file(model.state_dict(), str(folder / "open_clip_model.safetensors"))
    half = [0.5] * 3
    preprocess = {"size": 32, "mean": half, "std": half, "resize_mode": "squash", "interpolation": "bicubic"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    return model


def joint_patches(visual: Any, images: torch.Tensor) -> torch.Tensor:
    """Patch tokens in the joint space by open_clip's own interface: the last block, the final norm, the head."""
    out = visual.forward_intermediates(images, indices=1, normalize_intermediates=True, output_fmt="NLC", output_extra_tokens=True)
    patches = out["image_intermediates"][-1]
    if not hasattr(visual, "trunk"):
        return patches @ visual.proj
    trunk = visual.trunk
    if trunk.attn_pool is None:
        return trunk.head(patches)
    return torch.stack([trunk.attn_pool(patches[:, i : i + 1]) for i in range(patches.shape[1])], dim=1)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_an_open_clip_teacher_gives_the_familys_own_tokens(family: str, tmp_path: Path) -> None:
    model = open_clip_model(family, tmp_path / "clip")
    teacher, images = load_teacher(f"openclip:{tmp_path / 'clip'}"), torch.randn(2, 3, 32, 32)
    tokens = teacher.tokens(images)
    scale = float(tokens.abs().max())
    assert tokens.shape == (2, 17, teacher.joint_width)
    assert_close(tokens[:, 0], model.encode_image(images), rtol=0, atol=2e-5 * scale)
    assert_close(tokens[:, 1:], joint_patches(model.visual, images), rtol=0, atol=2e-5 * scale)
    assert (tokens[:, 1] - tokens[:, 2]).abs().max() > 1e-2 * scale  # a target of its own for each patch
    assert teacher.spec.mean == (0.5, 0.5, 0.5)


VISION = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 32, "patch_size": 8}
WORDS = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@torch.no_grad()
def test_a_whole_clip_of_transformers_teaches(activation: str, tmp_path: Path) -> None:
    model = CLIPModel(CLIPConfig(vision_config={**VISION, "hidden_act": activation}, text_config=WORDS, projection_dim=40)).eval()
    shake(model)
    model.save_pretrained(tmp_path)
    teacher, images = load_teacher(f"hf:{tmp_path}"), torch.randn(2, 3, 32, 32)
    tokens, seen = teacher.tokens(images), model.vision_model(pixel_values=images)
    scale = float(tokens.abs().max())
    assert_close(tokens[:, 0], model.visual_projection(seen.pooler_output), rtol=0, atol=2e-5 * scale)
    patches = model.visual_projection(model.vision_model.post_layernorm(seen.last_hidden_state[:, 1:]))
    assert_close(tokens[:, 1:], patches, rtol=0, atol=2e-5 * scale)


@torch.no_grad()
def test_a_whole_siglip_of_transformers_teaches(tmp_path: Path) -> None:
    model = SiglipModel(SiglipConfig(vision_config=VISION, text_config=WORDS)).eval()
    shake(model)
    model.save_pretrained(tmp_path)
    teacher, images = load_teacher(f"hf:{tmp_path}"), torch.randn(2, 3, 32, 32)
    tokens, seen = teacher.tokens(images), model.vision_model(pixel_values=images)
    scale = float(tokens.abs().max())
    assert_close(tokens[:, 0], seen.pooler_output, rtol=0, atol=2e-5 * scale)
    assert_close(tokens[:, 8], model.vision_model.head(seen.last_hidden_state[:, 7:8]), rtol=0, atol=2e-5 * scale)


@pytest.mark.parametrize("family", ["clip", "siglip"])
@torch.no_grad()
def test_a_teacher_of_transformers_brings_its_text_tower(family: str, tmp_path: Path) -> None:
    words = {**WORDS, "max_position_embeddings": 12}
    texts = ["a cat", "two owls and a bus"]
    tokenizer = word_tokenizer(texts * 4, 64)  # its end is id 2, as in the configurations of the first CLIPs
    if family == "clip":
        model: Any = CLIPModel(CLIPConfig(vision_config=VISION, text_config={**words, "eos_token_id": 2}, projection_dim=40)).eval()
    else:
        model = SiglipModel(SiglipConfig(vision_config={**VISION, "hidden_size": 48}, text_config={**words, "hidden_size": 48})).eval()
    shake(model)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    teacher = load_teacher(f"hf:{tmp_path}")
    assert teacher.text_tower == f"hf:{tmp_path}"
    tower = load_text_tower(teacher.text_tower or "")
    assert tower.joint_width == teacher.joint_width
    ids = tokenizer(texts, padding="max_length", max_length=12, return_tensors="pt")["input_ids"]
    theirs = model.get_text_features(input_ids=ids).pooler_output
    assert_close(tower.encode(texts), F.normalize(theirs, dim=-1), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("tensor", "words"), [
    ("visual_projection.weight", "1 tensors are missing: visual_projection.weight"),
    ("vision_model.encoder.layers.1.mlp.fc1.bias", r"1 have another shape: .*fc1.bias is \[95\], should be \[96\]"),
])  # fmt: skip
def test_a_folder_that_lacks_a_tensor_is_not_filled_with_random_numbers(tensor: str, words: str, tmp_path: Path) -> None:
    CLIPModel(CLIPConfig(vision_config=VISION, text_config=WORDS, projection_dim=40)).save_pretrained(tmp_path)
    state = load_file(str(tmp_path / "model.safetensors"))
    if "projection" in tensor:
        del state[tensor]
    else:
        state[tensor] = state[tensor][:-1].clone()
    save_file(state, str(tmp_path / "model.safetensors"), metadata={"format": "pt"})
    with pytest.raises(DataError, match=words):
        load_teacher(f"hf:{tmp_path}")


def build(architecture: str, joint: int | None = 40, **changes: Any) -> VisionEncoder:
    torch.manual_seed(1)
    args = {**SMALL, **changes}
    config = VisionEncoderConfig(
        architecture=architecture, model_args=args, joint_width=joint, image_spec=ImageSpec(size=args["img_size"]).to_dict()
    )
    return VisionEncoder(config).eval()


def test_a_teacher_whose_tokens_do_not_lead_to_its_embedding_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = build("vit_base_patch16_clip_224")
    true = encoder.tokens
    monkeypatch.setattr(encoder, "tokens", lambda images, keep=None: true(images, keep) + 0.01)
    with pytest.raises(ConfigError, match=r"token path ends .* away from its own image embedding"):
        Teacher(encoder, "shifted")


def test_half_weights_give_nearly_the_same_targets_and_take_float_images() -> None:
    images = torch.randn(2, 3, 32, 32)
    full = Teacher(build("eva_giant_patch14_224", global_pool="token"), "full").tokens(images)
    half = Teacher(build("eva_giant_patch14_224", global_pool="token"), "half").to(torch.device("cpu"), torch.bfloat16)
    tokens = half.tokens(images)
    assert tokens.dtype == torch.bfloat16
    assert all(parameter.dtype == torch.bfloat16 for parameter in half.encoder.parameters())
    assert F.cosine_similarity(tokens.float(), full, dim=-1).min() > 0.999


@pytest.mark.parametrize("architecture", ["eva02_base_patch14_224", "vit_base_patch16_siglip_224"])
def test_a_teacher_compiles_into_one_graph(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compile_it = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile_it(function, backend=backend, fullgraph=True, **options))
    joint = {"joint": 48, "num_classes": 0} if "siglip" in architecture else {"global_pool": "token"}
    teacher = Teacher(build(architecture, **joint), "compiled")
    images = torch.randn(2, 3, 32, 32)
    plain = teacher.tokens(images)
    teacher.to(torch.device("cpu"), compiled=True)
    for _ in range(3):
        assert_close(teacher.tokens(images), plain, rtol=0, atol=1e-6)
    assert len(graphs) == 1
    assert not teacher.tokens(images).requires_grad


def test_images_of_the_student_are_renormalised_for_the_teacher(tmp_path: Path) -> None:
    open_clip_model("SigLIP", tmp_path / "clip")
    teacher = load_teacher(f"openclip:{tmp_path / 'clip'}")
    pixels = torch.rand(2, 3, 32, 32)
    student = ImageSpec(size=32)
    mean, std = torch.tensor(student.mean).view(3, 1, 1), torch.tensor(student.std).view(3, 1, 1)
    assert_close(renormalise((pixels - mean) / std, student, teacher.spec), (pixels - 0.5) / 0.5, rtol=0, atol=1e-5)


def test_a_student_with_a_head_to_another_space_is_refused_by_both_widths() -> None:
    teacher = Teacher(build("vit_base_patch16_clip_224"), "tiny")
    check_student(build("eva02_base_patch14_224", global_pool="token"), teacher)
    with pytest.raises(ConfigError, match=r"ends in 24 channels, the teacher 'tiny' gives targets of 40"):
        check_student(build("eva02_base_patch14_224", 24, global_pool="token"), teacher)
    with pytest.raises(ConfigError, match=r"has no head to a joint space, the teacher 'tiny' gives targets of 40"):
        check_student(build("eva02_base_patch14_224", None), teacher)
    with pytest.raises(
        ConfigError, match=r"student sees 2 x 2 patches \(32 px.*teacher 'tiny' 4 x 4 \(32 px\).*resize tiny OUT --image_size 16"
    ):
        check_student(build("eva02_base_patch14_224", patch_size=16, global_pool="token"), teacher)


def test_equal_grids_at_two_image_sizes_are_welcome() -> None:
    teacher = Teacher(build("vit_base_patch16_clip_224", img_size=28, patch_size=7), "28 px")
    check_student(build("eva02_base_patch14_224", global_pool="token"), teacher)  # 32 / 8 meets 28 / 7


# ---- students ---------------------------------------------------------------------------------------------------------------------------

LARGE = {"img_size": 336, "embed_dim": 1408, "depth": 40, "num_heads": 16, "mlp_ratio": 4096 / 1408}


@pytest.mark.parametrize(("architecture", "args", "millions"), [
    ("eva02_base_patch14_224", {}, 86.546),
    ("eva02_base_patch14_224", {"patch_size": 16}, 86.638),
    ("eva02_large_patch14_224", {}, 304.318),
    ("eva02_large_patch14_224", {"img_size": 336}, 304.646),
    ("eva02_large_patch14_224", LARGE, 1013.449),
])  # fmt: skip
def test_the_students_of_the_paper_have_its_numbers_of_parameters(architecture: str, args: dict[str, Any], millions: float) -> None:
    with torch.device("meta"):
        config = VisionEncoderConfig(architecture=architecture, model_args={**args, "global_pool": "token"}, joint_width=1024)
        student = VisionEncoder(config)
    assert sum(parameter.numel() for parameter in student.parameters()) / 1e6 == pytest.approx(millions, abs=5e-4)
    assert next(student.parameters()).device.type == "meta"


# Every way in which timm's transformers differ before and in their blocks: prefix tokens, positions (absolute, rotary, mixed), norms, pooling.
STUDENTS = [
    "eva02_base_patch14_224", "eva02_base_patch16_clip_224", "eva_giant_patch14_224", "eva02_enormous_patch14_clip_224",
    "vit_base_patch16_224", "vit_base_patch16_clip_224", "vit_base_patch16_siglip_224", "vit_base_patch14_reg4_dinov2",
    "vit_small_patch16_dinov3", "vit_medium_patch16_rope_reg1_gap_256", "vit_small_patch16_rope_mixed_ape_224",
    "vit_pe_core_tiny_patch16_384", "vit_small_patch16_18x2_224", "aimv2_large_patch14_224",
]  # fmt: skip


@pytest.mark.parametrize("architecture", STUDENTS)
@torch.no_grad()
def test_a_part_of_the_patches_equals_hiding_the_others_from_attention(architecture: str) -> None:
    encoder = build(architecture, num_heads=4)
    shake(encoder)
    images, keep = torch.randn(2, 3, 32, 32), torch.tensor([[0, 3, 7, 12], [14, 2, 1, 15]])
    prefix = encoder.num_prefix_tokens
    whole, part = encoder._features(images, None), encoder._features(images, keep)
    every = torch.arange(16).expand(2, -1)
    assert torch.equal(encoder._features(images, every), whole)
    visible = torch.zeros(2, prefix + 16, dtype=torch.bool)
    visible[:, :prefix] = True
    visible.scatter_(1, keep + prefix, True)
    hidden = encoder.network.forward_features(images, attn_mask=visible[:, None, None, :])
    oracle = torch.cat([hidden[:, :prefix], hidden[:, prefix:].gather(1, keep[..., None].expand(-1, -1, 48))], dim=1)
    assert_close(part, oracle, rtol=0, atol=1e-5)
    assert (part[:, prefix:] - whole[:, prefix:].gather(1, keep[..., None].expand(-1, -1, 48))).abs().max() > 0.05  # the others were seen


def test_a_network_with_two_heads_on_two_tokens_is_no_student() -> None:
    with pytest.raises(ValueError, match="averages two heads"):
        build("deit_tiny_distilled_patch16_224")


def test_timm_has_the_names_this_file_uses() -> None:
    assert all(timm.is_model(name) for name in STUDENTS)
