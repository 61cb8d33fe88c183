"""Every recipe of UTA: what it says, the network it means, and two steps of it with everything made tiny."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from encoders.catalog import load_encoder
from encoders.modeling import VisionEncoder, VisionEncoderConfig
from encoders.students import network_args
from encoders.train_uta import RECIPES, UTAConfig, main
from mmkit.config import load_config

NAMES = sorted(path.stem for path in RECIPES.glob("*uta*.yaml") if "contrastive" not in path.stem)
TINY = {"img_size": 32, "patch_size": 2, "embed_dim": 24, "depth": 1, "num_heads": 2}  # 16 x 16 patches, as the papers' networks have
FLAGS = [word for key, value in TINY.items() for word in (f"--encoder.model_args.{key}", str(value))]
FLAGS += ["--encoder.compile", "false", "--run.steps", "2", "--run.micro_batch_size", "2", "--run.gradient_accumulation_steps", "1"]
FLAGS += ["--run.global_batch_size", "0", "--run.num_workers", "0", "--run.save_every", "0", "--run.log_every", "1", "--warmup", "1"]

# objective, mask, ratio (None: not used), positions, teacher's last word
ROWS: dict[str, tuple[str, str, float | None, bool, str]] = {
    "tab6_fd": ("fd", "", None, True, "b114k"),
    "tab6_mim": ("mim", "block_reversed", 0.4, True, "b114k"),
    "tab6_uta_mim": ("uta+mim", "block_reversed", 0.4, True, "b114k"),
    "tab6_uta": ("uta", "block_reversed", 0.4, True, "b114k"),
    "tab7_mim": ("mim", "block_reversed", 0.4, True, "b114k"),
    "tab7_mim_no_pe": ("mim", "block_reversed", 0.4, False, "b114k"),
    "tab7_uta": ("uta", "block_reversed", 0.4, True, "b114k"),
    "tab7_uta_no_pe": ("uta", "block_reversed", 0.4, False, "b114k"),
    "tab8_clip_l14": ("uta", "block_reversed", 0.4, True, "ViT-L-14/openai"),
    "tab8_eva_g14": ("uta", "block_reversed", 0.4, True, "b114k"),
    "tab9_ratio_0": ("fd", "", None, True, "b114k"),
    "tab9_ratio_04": ("uta", "block_reversed", 0.4, True, "b114k"),
    "tab9_ratio_05": ("uta", "block_reversed", 0.5, True, "b114k"),
    "tab9_ratio_07": ("uta", "block_reversed", 0.7, True, "b114k"),
    "tab9_block": ("uta", "block", 0.5, True, "b114k"),
    "tab9_random": ("uta", "random", 0.5, True, "b114k"),
    "tab9_block_reversed": ("uta", "block_reversed", 0.5, True, "b114k"),
}


def read(name: str, *flags: str) -> UTAConfig:
    return load_config(UTAConfig, ["--recipe", name, *flags], recipe_dir=RECIPES)


def test_the_tables_of_the_paper_are_all_here() -> None:
    assert {f"uta_{row}" for row in ROWS} == {name for name in NAMES if "_tab" in name}


@pytest.mark.parametrize("row", ROWS)
def test_a_row_of_a_table_is_the_papers_setting(row: str) -> None:
    config, common = read(f"uta_{row}"), read("uta_ablation_b14")
    objective, mask, ratio, positions, teacher = ROWS[row]
    assert (config.objective, config.encoder.absolute_positions, config.encoder.rotary_positions) == (objective, positions, positions)
    assert config.teacher.endswith(teacher)
    if ratio is not None:
        assert (config.mask.type, config.mask.ratio) == (mask, ratio)
    shared = ("lr", "final_lr", "warmup", "weight_decay", "betas", "eps", "cls_weight", "data")
    assert all(getattr(config, name) == getattr(common, name) for name in shared)
    assert (config.run.steps, config.run.global_batch_size, config.run.max_grad_norm) == (312_000, 4096, 3.0)


@pytest.mark.parametrize(
    ("name", "million", "hidden"), [("uta_vit_b14", 86.546, 2048), ("uta_vit_l14", 304.318, 2730), ("uta_vit_g14", 1012.998, 4096)]
)
def test_a_recipe_means_the_papers_network(name: str, million: float, hidden: int) -> None:
    config = read(name).encoder
    with torch.device("meta"):
        args: dict[str, Any] = {**network_args(config), "depth": 1}  # a block, and as many of it as the network has
        encoder = VisionEncoder(VisionEncoderConfig(architecture=config.architecture, model_args=args, joint_width=1024))
    block = sum(parameter.numel() for parameter in encoder.network.blocks.parameters())
    depth = {"uta_vit_b14": 12, "uta_vit_l14": 24, "uta_vit_g14": 40}[name]
    total = sum(parameter.numel() for parameter in encoder.parameters()) + (depth - 1) * block
    assert encoder.network.blocks[0].mlp.fc2.in_features == hidden
    assert total / 1e6 == pytest.approx(million, abs=1e-3)


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipes")
    torch.manual_seed(5)
    config = VisionEncoderConfig(architecture="vit_base_patch16_clip_224", model_args=TINY, joint_width=20, text_tower="mini-clip")
    VisionEncoder(config).save_pretrained(folder / "teacher")
    (folder / "images").mkdir()
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_trains_when_all_is_tiny(name: str, material: Path, tmp_path: Path) -> None:
    own = ["--teacher", str(material / "teacher"), "--data.root", str(material / "images"), "--run.output_dir", str(tmp_path / "run")]
    folder = main(["--recipe", name, *own, *FLAGS])
    encoder = load_encoder(folder / "encoder")
    assert encoder.grid == (16, 16)
    assert encoder.config.training["objective"] == read(name).objective
    assert encoder.config.training["step"] == 2
