"""Unmasked Token Alignment against the golden files of the public implementations, and its laws (encoders/train_uta.py, teachers.py)."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from encoders.modeling import VisionEncoder, VisionEncoderConfig
from encoders.teachers import Teacher, check_grids
from encoders.train_uta import StudentConfig, alignment_loss, build_student, take_kept
from mmkit.errors import ConfigError
from mmkit.images import ImageSpec

GOLDEN = Path(__file__).parent / "golden" / "uta"
EXPECTED = json.loads((GOLDEN / "config_expected.json").read_text(encoding="utf-8"))["expected"]
STUDENT = {"img_size": 56, "patch_size": 14, "embed_dim": 96, "depth": 3, "num_heads": 3, "global_pool": "token"}
TOLERANCE = {"rtol": 0.0, "atol": 2e-5}  # float32, three blocks; the public code differs from timm by 2e-6


def build(architecture: str, args: dict[str, Any], joint: int, size: int) -> VisionEncoder:
    spec = ImageSpec(size=size).to_dict()
    return VisionEncoder(VisionEncoderConfig(architecture=architecture, model_args=args, joint_width=joint, image_spec=spec)).eval()


@pytest.fixture(scope="module")
def student() -> VisionEncoder:
    """The golden student, its official checkpoint loaded strictly."""
    encoder = build("eva02_base_patch14_224", STUDENT, 64, 56)
    state = timm.models.eva.checkpoint_filter_fn(load_file(str(GOLDEN / "clip_checkpoint.safetensors")), encoder.network)
    encoder.network.load_state_dict(state, strict=True)
    return encoder


@pytest.fixture(scope="module")
def vision() -> dict[str, torch.Tensor]:
    return load_file(str(GOLDEN / "vision_io.safetensors"))


@pytest.fixture(scope="module")
def loss_io() -> dict[str, torch.Tensor]:
    return load_file(str(GOLDEN / "loss_io.safetensors"))


def test_the_full_picture_gives_the_official_tokens(student: VisionEncoder, vision: dict[str, torch.Tensor]) -> None:
    out = student(vision["images"], output_hidden_states=True)
    assert_close(out.hidden_states[-1], vision["tokens_prenorm"], **TOLERANCE)
    assert_close(out.last_hidden_state, vision["tokens_norm"], **TOLERANCE)
    assert_close(out.pooler_output, vision["image_features"], **TOLERANCE)
    assert_close(student.tokens(vision["images"]), vision["tokens_proj"], **TOLERANCE)
    assert student.network.norm.eps == 1e-6  # not pinned by the files


@pytest.mark.parametrize("name", ["sorted", "shuffled", "single", "all"])
def test_the_kept_patches_give_the_official_tokens(name: str, student: VisionEncoder, vision: dict[str, torch.Tensor]) -> None:
    expected = vision["tokens_proj" if name == "all" else f"tokens_proj__{name}"]
    assert_close(student.tokens(vision["images"], vision[f"keep_{name}"]), expected, **TOLERANCE)


def test_rotary_rows_that_are_not_gathered_would_be_seen(student: VisionEncoder, vision: dict[str, torch.Tensor]) -> None:
    """Sabotage: the first K rows instead of the kept ones."""
    dropper, keep = student.network.patch_drop, vision["keep_sorted"]
    first = torch.arange(keep.shape[1]).expand(len(keep), -1)
    forward = dropper.forward
    dropper.forward = lambda tokens: (forward(tokens)[0], first)
    try:
        wrong = student.tokens(vision["images"], keep)
    finally:
        del dropper.forward
    assert (wrong - vision["tokens_proj__sorted"]).abs().max() > 0.1


def test_the_loss_and_its_gradients_are_the_official_ones(
    student: VisionEncoder, vision: dict[str, torch.Tensor], loss_io: dict[str, torch.Tensor]
) -> None:
    expected, keep = EXPECTED["uta"], vision["keep_sorted"]
    student.zero_grad()
    loss, terms = alignment_loss(student.tokens(vision["images"], keep), take_kept(loss_io["teacher_tokens"], keep))
    loss.backward()
    assert float(loss.detach()) - 1 == pytest.approx(expected["loss_neg_mean_cos"], abs=1e-5)
    assert 1 - float(terms["cls"].detach()) == pytest.approx(expected["cls_cos"], abs=1e-5)
    assert 1 - float(terms["patches"].detach()) == pytest.approx(expected["patch_cos"], abs=1e-5)
    gradients = {f"visual.{name}": gradient for name, gradient in _official_gradients(student).items()}
    checked = [name for name in loss_io if name.startswith("grad.")]
    assert len(checked) == 6
    for name in checked:
        official = name.removeprefix("grad.")
        official = official if official.startswith("visual.") else f"visual.{official}"
        assert_close(gradients[official], loss_io[name], rtol=1e-4, atol=1e-6)
    for name, norm in expected["grad_norm"].items():
        assert float(gradients[f"visual.{name}"].norm()) == pytest.approx(norm, rel=1e-4), name
    total = torch.stack([parameter.grad.norm() for parameter in student.parameters() if parameter.grad is not None]).norm()
    assert float(total) == pytest.approx(expected["global_grad_norm"], rel=1e-4)
    dropped = expected["positions_dropped_in_every_image"]
    assert student.network.pos_embed.grad[0, [1 + position for position in dropped]].abs().max() == 0


def _official_gradients(student: VisionEncoder) -> dict[str, torch.Tensor]:
    names = [("attn.q_proj.bias", "attn.q_bias"), ("attn.v_proj.bias", "attn.v_bias"), ("mlp.norm.", "mlp.ffn_ln.")]
    names += [("mlp.fc1_g.", "mlp.w1."), ("mlp.fc1_x.", "mlp.w2."), ("mlp.fc2.", "mlp.w3.")]
    out = {}
    for name, parameter in student.network.named_parameters():
        for new, old in names:
            name = name.replace(new, old)
        if parameter.grad is not None:
            out[name] = parameter.grad
    return out


def test_all_patches_kept_is_feature_distillation(
    student: VisionEncoder, vision: dict[str, torch.Tensor], loss_io: dict[str, torch.Tensor]
) -> None:
    loss, _ = alignment_loss(student.tokens(vision["images"]), loss_io["teacher_tokens"])
    assert float(loss.detach()) - 1 == pytest.approx(EXPECTED["fd"]["loss_neg_mean_cos_all_tokens"], abs=1e-5)


def test_an_eva_clip_teacher_gives_the_official_targets() -> None:
    golden = load_file(str(GOLDEN / "teacher_eva.safetensors"))
    args = {"img_size": 56, "patch_size": 14, "embed_dim": 72, "depth": 2, "num_heads": 3, "mlp_ratio": 4.3637, "global_pool": "token"}
    encoder = build("eva_giant_patch14_224", args, 64, 56)
    state = {name: tensor for name, tensor in golden.items() if name.startswith("visual.")}
    encoder.network.load_state_dict(timm.models.eva.checkpoint_filter_fn(state, encoder.network), strict=True)
    tokens = Teacher(encoder, "golden").tokens(golden["io.images"])
    assert_close(tokens[:, 0], golden["io.cls_joint"], **TOLERANCE)
    assert_close(tokens[:, 1:], golden["io.patches_joint"], **TOLERANCE)


def test_an_openai_teacher_gives_the_official_targets() -> None:
    golden = load_file(str(GOLDEN / "teacher_openai.safetensors"))
    args = {"img_size": 64, "patch_size": 16, "embed_dim": 96, "depth": 2, "num_heads": 3}
    state = {name: tensor for name, tensor in golden.items() if name.startswith("visual.")}
    found = {}
    for entry in ("vit_base_patch16_clip_quickgelu_224", "vit_base_patch16_clip_224"):
        encoder = build(entry, args, 40, 64)
        state_here = timm.models.vision_transformer.checkpoint_filter_fn(state, encoder.network)
        encoder.network.load_state_dict(state_here, strict=True)
        found[entry] = Teacher(encoder, "golden").tokens(golden["io.images"])
    tokens = found["vit_base_patch16_clip_quickgelu_224"]
    assert_close(tokens[:, 0], golden["io.cls_joint"], **TOLERANCE)
    assert_close(tokens[:, 1:], golden["io.patches_joint"], **TOLERANCE)
    assert (
        found["vit_base_patch16_clip_224"][:, 0] - golden["io.cls_joint"]
    ).abs().max() > 1e-3  # the wrong activation loads without complaint


# ---- laws -------------------------------------------------------------------------------------------------------------------------------


def test_the_default_share_of_cls_is_the_plain_mean() -> None:
    predicted, target = torch.randn(4, 11, 8), torch.randn(4, 11, 8)
    plain = (1 - torch.nn.functional.cosine_similarity(predicted, target, dim=-1)).mean()
    assert_close(alignment_loss(predicted, target)[0], plain)
    assert_close(alignment_loss(predicted, target, 1 / 11)[0], plain)
    loss, terms = alignment_loss(predicted, target, 0.5)
    assert_close(loss, (terms["cls"] + terms["patches"]) / 2)


def test_the_loss_ignores_lengths_and_is_zero_for_a_perfect_student() -> None:
    predicted, target = torch.randn(4, 11, 8), torch.randn(4, 11, 8)
    assert_close(alignment_loss(3 * predicted, 0.1 * target)[0], alignment_loss(predicted, target)[0])
    assert float(alignment_loss(target, target)[0]) == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="same keep indices"):
        alignment_loss(predicted, target[:, :5])


def teacher(**changes: Any) -> Teacher:
    args = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, **changes}
    encoder = build("vit_base_patch16_clip_224", args, 40, args["img_size"])
    encoder.config.text_tower = "openclip:somewhere"
    return Teacher(encoder, "tiny")


def test_a_student_has_the_traps_of_its_timm_entry_removed() -> None:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    student = build_student(StudentConfig("eva02_tiny_patch14_224", sizes), teacher())
    assert student.network.global_pool == "token"  # timm's entry: avg
    assert student.spec.crop_pct == 1.0  # timm's entry: 0.9
    assert student.network.head.weight.std() > 0.01  # timm's entry: 0.001 times this
    assert (student.joint_width, student.config.text_tower) == (40, "openclip:somewhere")
    assert build_student(StudentConfig("vit_tiny_patch16_224", sizes), teacher()).joint_width == 40
    with pytest.raises(ConfigError, match="'token' is right"):
        build_student(StudentConfig("eva02_tiny_patch14_224", {**sizes, "global_pool": "avg"}), teacher())
    with pytest.raises(ConfigError, match=r"timm.*cannot build 'eva02_tiny_patch14_224'"):
        build_student(StudentConfig("eva02_tiny_patch14_224", {**sizes, "dept": 3}), teacher())


def test_grids_that_differ_are_refused_by_name() -> None:
    sizes = {"img_size": 32, "patch_size": 16, "embed_dim": 48, "depth": 2, "num_heads": 3}
    with pytest.raises(ConfigError, match=r"student sees 2 x 2 patches \(32 px, patch 16\).*teacher 'tiny' 4 x 4 \(32 px\).*img_size 64"):
        build_student(StudentConfig("eva02_tiny_patch14_224", sizes), teacher())
    student = build_student(StudentConfig("eva02_tiny_patch14_224", {**sizes, "img_size": 64}), teacher())  # 64 / 16 meets 32 / 8
    check_grids(student, teacher())


def test_a_tower_without_a_joint_space_or_with_averaged_tokens_cannot_teach() -> None:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    plain = VisionEncoder(VisionEncoderConfig(architecture="vit_base_patch16_224", model_args=sizes)).eval()
    with pytest.raises(ConfigError, match="no joint image-text space"):
        Teacher(plain, "plain")
    averaging = build("vit_base_patch16_224", {**sizes, "global_pool": "avg"}, 40, 32)
    with pytest.raises(ConfigError, match="pools by 'avg'"):
        Teacher(averaging, "averaging")


def test_a_teacher_sleeps_and_its_targets_carry_no_gradient() -> None:
    model = teacher()
    before = {name: tensor.clone() for name, tensor in model.encoder.state_dict().items()}
    model.encoder.train()
    assert not model.encoder.training
    assert not model.tokens(torch.randn(2, 3, 32, 32)).requires_grad
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.encoder.state_dict().items())
    assert not any(parameter.requires_grad for parameter in model.encoder.parameters())
