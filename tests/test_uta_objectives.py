"""The objectives of train_uta, its students, and the count of operations: laws and golden files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from torch._dynamo.utils import counters
from torch.testing import assert_close

from encoders.catalog import load_encoder
from encoders.flops import StepBound, forward_flops
from encoders.modeling import VisionEncoder, VisionEncoderConfig
from encoders.students import Student, StudentConfig, build_student
from encoders.teachers import Teacher
from encoders.train_uta import Objective, learn, main, mask_of, masked_loss
from mmkit.errors import ConfigError
from mmkit.images import ImageSpec

GOLDEN = Path(__file__).parent / "golden" / "uta"
EXPECTED = json.loads((GOLDEN / "config_expected.json").read_text(encoding="utf-8"))["expected"]
SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
OBJECTIVES: list[Objective] = ["uta", "fd", "mim", "uta+mim"]


def encoder_of(architecture: str, args: dict[str, Any], joint: int, size: int) -> VisionEncoder:
    spec = ImageSpec(size=size).to_dict()
    return VisionEncoder(VisionEncoderConfig(architecture=architecture, model_args=args, joint_width=joint, image_spec=spec))


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    torch.manual_seed(5)
    return Teacher(encoder_of("vit_base_patch16_clip_224", SIZES, 40, 32).eval(), "tiny")


@pytest.fixture(scope="module")
def golden() -> tuple[Student, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The golden student with the golden mask token, and what the public code makes of it."""
    args = {"img_size": 56, "patch_size": 14, "embed_dim": 96, "depth": 3, "num_heads": 3, "global_pool": "token"}
    encoder = encoder_of("eva02_base_patch14_224", args, 64, 56)
    state = timm.models.eva.checkpoint_filter_fn(load_file(str(GOLDEN / "clip_checkpoint.safetensors")), encoder.network)
    encoder.network.load_state_dict(state, strict=True)
    student, loss_io = Student(encoder, mask_token=True).eval(), load_file(str(GOLDEN / "loss_io.safetensors"))
    assert student.mask_token is not None
    student.mask_token.data.copy_(loss_io["mask_token"].flatten())
    return student, load_file(str(GOLDEN / "vision_io.safetensors")), loss_io


def test_the_mask_token_stands_where_the_public_code_puts_it(golden: Any) -> None:
    student, vision, loss_io = golden
    mask = mask_of(vision["keep_sorted"], 16)
    assert torch.equal(mask, loss_io["mask"].bool())
    assert_close(student(vision["images"], mask=mask), loss_io["mim_tokens_proj"], rtol=0, atol=2e-5)  # float32, three blocks


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_losses_are_the_golden_ones(objective: Objective, golden: Any) -> None:
    student, vision, loss_io = golden
    keep = torch.arange(16).expand(3, -1) if objective == "fd" else vision["keep_sorted"]
    loss, terms = learn(objective, student, vision["images"], keep, loss_io["teacher_tokens"])
    mim = EXPECTED["mim"]
    expected = {
        "uta": 1 + EXPECTED["uta"]["loss_neg_mean_cos"],
        "fd": 1 + EXPECTED["fd"]["loss_neg_mean_cos_all_tokens"],
        "mim": 1 + mim["loss_neg_mean_cos_masked"],
        "uta+mim": 2 + mim["loss_neg_mean_cos_masked"] + mim["neg_mean_cos_kept_and_cls"],
    }
    assert float(loss.detach()) == pytest.approx(expected[objective], abs=1e-5)
    assert set(terms) == {"cls", "patches"} | ({"masked"} if "mim" in objective else set())


def gradients(objective: Objective, student: Student, images: torch.Tensor, keep: torch.Tensor, target: torch.Tensor) -> dict[str, Any]:
    student.zero_grad()
    learn(objective, student, images, keep, target)[0].backward()
    return {name: parameter.grad for name, parameter in student.named_parameters() if parameter.grad is not None}


def test_mim_trains_the_mask_token_and_uta_has_none(teacher: Teacher) -> None:
    images, keep = torch.randn(2, 3, 32, 32), torch.arange(6).expand(2, -1)
    target = teacher.tokens(images)
    with_token = Student(build_student(StudentConfig("eva02_tiny_patch14_224", SIZES), teacher), mask_token=True)
    for objective in ("mim", "uta+mim"):
        assert gradients(objective, with_token, images, keep, target)["mask_token"].abs().max() > 0  # type: ignore[arg-type]
    without = Student(build_student(StudentConfig("eva02_tiny_patch14_224", SIZES), teacher))
    assert "mask_token" not in dict(without.named_parameters())
    with pytest.raises(ValueError, match="no mask token"):
        without(images, mask=mask_of(keep, 16))


def test_a_removed_patch_is_not_seen_by_any_objective_but_fd(teacher: Teacher) -> None:
    """Pixels of removed patches change no loss: UTA drops them, MIM hides them. The teacher's tokens are held fixed."""
    images, keep = torch.randn(2, 3, 32, 32), torch.tensor([[0, 1, 2, 3, 8, 9], [0, 1, 2, 3, 8, 9]])
    target, changed = teacher.tokens(images), images.clone()
    changed[:, :, 24:, :] += 1  # patches 12 to 15
    student = Student(build_student(StudentConfig("eva02_tiny_patch14_224", SIZES), teacher), mask_token=True)
    every = torch.arange(16).expand(2, -1)
    for objective in OBJECTIVES:
        seen = every if objective == "fd" else keep
        losses = [learn(objective, student, pixels, seen, target)[0].item() for pixels in (images, changed)]
        assert (losses[0] == losses[1]) is (objective != "fd"), objective


def test_feature_distillation_is_uta_that_keeps_all(teacher: Teacher) -> None:
    images, every = torch.randn(2, 3, 32, 32), torch.arange(16).expand(2, -1)
    target = teacher.tokens(images)
    student = Student(build_student(StudentConfig("eva02_tiny_patch14_224", SIZES), teacher))
    fd, uta = learn("fd", student, images, every, target)[0], learn("uta", student, images, every, target)[0]
    assert torch.equal(fd, uta)
    assert_close(fd, 1 - torch.cosine_similarity(student(images), target, dim=-1).mean())


def test_a_mask_loss_counts_removed_patches_alone() -> None:
    predicted, target, keep = torch.randn(3, 9, 5), torch.randn(3, 9, 5), torch.tensor([[0, 1, 7]]).expand(3, -1)
    distance = 1 - torch.cosine_similarity(predicted, target, dim=-1)
    assert_close(masked_loss(predicted, target, mask_of(keep, 8)), distance[:, 1:][:, [2, 3, 4, 5, 6]].mean())


# ---- students ---------------------------------------------------------------------------------------------------------------------------


def test_without_positions_cls_does_not_care_about_the_order(teacher: Teacher) -> None:
    """With its absolute positions on, the same swap of two patches' pixels is seen."""
    images = torch.randn(1, 3, 32, 32)
    swapped = torch.cat([images[..., 8:16, :], images[..., :8, :], images[..., 16:, :]], dim=-2)  # rows of patches 0 and 1 change places
    moved = {}
    for name, absolute, rotary in (("none", False, False), ("rotary", False, True), ("absolute", True, False)):
        config = StudentConfig("eva02_tiny_patch14_224", SIZES, absolute_positions=absolute, rotary_positions=rotary)
        encoder = build_student(config, teacher).eval()
        assert (encoder.network.pos_embed is None, encoder.network.rope is None) == (not absolute, not rotary)
        moved[name] = float((encoder.tokens(images)[:, 0] - encoder.tokens(swapped)[:, 0]).abs().max().detach())
    assert moved["none"] < 1e-6  # float32 sums in another order
    assert min(moved["rotary"], moved["absolute"]) > 1e-4
    plain = build_student(StudentConfig("vit_tiny_patch16_224", SIZES, absolute_positions=False), teacher)
    assert plain.network.pos_embed is None


def test_eva02s_first_weights_grow_with_depth(teacher: Teacher) -> None:
    config = StudentConfig("eva02_base_patch14_224", {**SIZES, "embed_dim": 96, "depth": 8}, init="eva02")
    network, scale = build_student(config, teacher).network, np.log(16) ** 0.5
    block = network.blocks[3]
    xavier = (2 / (96 + 96)) ** 0.5
    assert float(block.attn.q_proj.weight.std()) == pytest.approx(xavier, rel=0.05)
    assert float(block.attn.v_proj.weight.std()) == pytest.approx(xavier * scale, rel=0.05)
    assert float(block.mlp.fc2.weight.std()) == pytest.approx((2 / (96 + 256)) ** 0.5 * scale, rel=0.05)
    assert float(network.head.bias.abs().max()) == 0
    with pytest.raises(ConfigError, match="init eva02 scales the projection of values"):
        build_student(StudentConfig("vit_tiny_patch16_224", SIZES, init="eva02"), teacher)


def test_gradient_checkpointing_changes_no_gradient(teacher: Teacher) -> None:
    images, keep = torch.randn(2, 3, 32, 32), torch.tensor([[0, 5, 9], [3, 4, 15]])
    target, found = teacher.tokens(images), []
    for checkpointing in (False, True):
        torch.manual_seed(1)
        config = StudentConfig("eva02_tiny_patch14_224", SIZES, gradient_checkpointing=checkpointing)
        student = Student(build_student(config, teacher), mask_token=True)
        assert student.encoder.network.grad_checkpointing is checkpointing
        found.append([gradients(objective, student, images, keep, target) for objective in ("uta", "mim")])  # type: ignore[arg-type]
    for plain, again in zip(*found, strict=True):
        assert all(torch.equal(gradient, again[name]) for name, gradient in plain.items())


@pytest.mark.slow
def test_a_compiled_student_gives_the_same_tokens_in_one_graph(teacher: Teacher) -> None:
    torch._dynamo.reset()
    counters.clear()
    student = Student(build_student(StudentConfig("eva02_tiny_patch14_224", {**SIZES, "depth": 1}), teacher))
    images = torch.randn(2, 3, 32, 32)
    drawn = [torch.rand(2, 16).argsort(dim=1)[:, :6] for _ in range(4)]
    plain = [student(images, keep) for keep in drawn]
    student.compile_tokens()
    for keep, expected in zip(drawn, plain, strict=True):
        assert_close(student(images, keep), expected, rtol=1e-4, atol=1e-5)  # fused sums
    assert (counters["stats"]["unique_graphs"], dict(counters["graph_break"])) == (1, {})  # constant K: no recompilation, no break
    assert student.encoder.network.patch_drop.keep is None


# ---- operations -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "args", "kept", "gflop"),
    [
        ("eva02_base_patch14_224", {}, 154, 27.69),
        ("vit_base_patch16_clip_224", {}, None, 35.3),
        ("vit_base_patch16_siglip_224", {"num_classes": 0, "global_pool": "map"}, None, 35.2),
    ],
)
def test_operations_are_counted_without_computing(architecture: str, args: dict[str, Any], kept: int | None, gflop: float) -> None:
    with torch.device("meta"):
        joint = 768 if "clip" in architecture or "siglip" in architecture else 1024
        args = {"global_pool": "token", **args}
        encoder = VisionEncoder(VisionEncoderConfig(architecture=architecture, model_args=args, joint_width=joint))
    found = forward_flops(encoder, kept) / 1e9
    # SigLIP's tokens each go through the pooling: more than its published 35.2, which pools once
    assert found == pytest.approx(gflop, rel=0.2 if "siglip" in architecture else 2e-3)


def test_a_complementary_pair_shares_the_teacher() -> None:
    g, b = 534_800_000_000, 22_960_000_000
    assert StepBound(g, b, 2, 1).per_image / (2 * StepBound(g, b, 1, 1).per_image) == pytest.approx(673 / 1208, rel=2e-3)
    bound = StepBound(g, b, 1, 256, peak=989.0)
    assert bound.seconds == pytest.approx(256 * 603.68e9 / 989e12)
    assert "at least 0.156 s a step at 989 TFLOP/s" in bound.describe()
    assert bound.summary() == ""
    assert set(bound.tick()) == {"step_seconds", "mfu"}
    for _ in range(4):
        bound.tick()
    assert "median of 2" in bound.summary()
    assert "give --peak_tflops" in StepBound(g, b, 1, 256).describe()


# ---- whole runs -------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory, teacher: Teacher) -> Path:
    folder = tmp_path_factory.mktemp("objectives")
    teacher.encoder.save_pretrained(folder / "teacher")
    (folder / "images").mkdir()
    random = np.random.default_rng(0)
    for number in range(12):
        Image.fromarray(random.integers(0, 256, (36, 36, 3), dtype=np.uint8)).save(folder / "images" / f"{number:03d}.png")
    return folder


def flags(material: Path, out: Path, *more: str) -> list[str]:
    sizes = [part for key, value in SIZES.items() for part in (f"--encoder.model_args.{key}", str(value))]
    fixed = ["--teacher", str(material / "teacher"), "--data.root", str(material / "images"), "--mask.ratio", "0.5", "--data.cache"]
    running = ["--run.output_dir", str(out), "--run.steps", "6", "--run.micro_batch_size", "4", "--run.log_every", "1"]
    return ["--encoder.architecture", "eva02_tiny_patch14_224", *sizes, *fixed, *running, *more]


def rows(folder: Path) -> dict[int, dict[str, float]]:
    names = ("loss", "cls", "patches", "masked")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: {name: row[name] for name in names if name in row} for row in lines}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_an_objective_trains_exports_and_resumes_exactly(
    objective: str, material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = main(flags(material, tmp_path / "whole", "--objective", objective))
    encoder = load_encoder(whole / "encoder")
    assert encoder.config.training["objective"] == objective
    assert encoder.config.training["kept_patches"] == (16 if objective == "fd" else 8)
    assert not [name for name in encoder.state_dict() if "mask_token" in name]
    arguments = flags(material, tmp_path / "broken", "--objective", objective, "--run.save_every", "2")
    calls, tokens = iter(range(100)), Teacher.tokens

    def fails(self: Teacher, images: torch.Tensor) -> torch.Tensor:
        if next(calls) == 3:
            raise RuntimeError("the lights go out")
        return tokens(self, images)

    with monkeypatch.context() as patch:
        patch.setattr(Teacher, "tokens", fails)
        with pytest.raises(RuntimeError, match="lights"):
            main(arguments)
    again = main([*arguments, "--run.resume"])
    assert rows(again) == rows(whole)  # bit for bit
    assert all(torch.equal(tensor, encoder.state_dict()[name]) for name, tensor in load_encoder(again / "encoder").state_dict().items())


@pytest.mark.parametrize("objective", ["mim", "uta+mim"])
def test_four_micro_batches_equal_one_batch(objective: str, material: Path, tmp_path: Path) -> None:
    one = rows(main(flags(material, tmp_path / "one", "--objective", objective)))
    small = ("--run.micro_batch_size", "1", "--run.gradient_accumulation_steps", "4")
    four = rows(main(flags(material, tmp_path / "four", "--objective", objective, *small)))
    for step, terms in one.items():
        assert four[step] == pytest.approx(terms, rel=1e-4), step


def test_two_views_take_one_pass_of_the_teacher(material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, tokens, learned = [], Teacher.tokens, []
    monkeypatch.setattr(Teacher, "tokens", lambda self, images: (seen.append(len(images)), tokens(self, images))[1])
    forward = Student.forward
    monkeypatch.setattr(
        Student, "forward", lambda self, images, keep=None, mask=None: (learned.append(keep), forward(self, images, keep, mask))[1]
    )
    main(flags(material, tmp_path / "run", "--mask.type", "complementary", "--mask.views", "2", "--run.steps", "2"))
    assert seen == [4, 4]
    assert [len(keep) for keep in learned] == [8, 8]
    first, second = learned[0][:4], learned[0][4:]
    assert torch.cat([first, second], dim=1).sort(dim=1).values.tolist() == [list(range(16))] * 4


def test_every_run_says_how_long_a_step_took_and_must_take(material: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = main(flags(material, tmp_path / "run", "--peak_tflops", "0.5"))
    printed = capsys.readouterr().out
    assert "s a step at 0.5 TFLOP/s" in printed
    assert "(median of 3)" in printed
    assert "% of the peak" in printed
    row = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert 0 < row["mfu"] < 1
    assert row["step_seconds"] > 0


def test_a_mask_token_that_stands_for_nothing_is_refused(material: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"mask\.ratio is 0 and the objective 'mim'"):
        main(flags(material, tmp_path / "run", "--objective", "mim", "--mask.ratio", "0"))
    assert not (tmp_path / "run").exists()
