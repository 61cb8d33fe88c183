"""The command lines of LLaVA's own scripts: what each of their flags becomes here."""

import json
from pathlib import Path

import pytest

from llm_stage import original_flags
from llm_stage.llava_settings import LlavaSettings
from llm_stage.original_flags import FLAGS, RECIPES, settings_argv, translate
from mmkit.config import load_config
from mmkit.errors import ConfigError

COMMON = {
    "model_name_or_path": "lmsys/vicuna-7b-v1.5", "vision_tower": "openai/clip-vit-large-patch14-336", "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": "-2", "mm_use_im_start_end": "False", "mm_use_im_patch_token": "False", "bf16": "True",
    "num_train_epochs": "1", "per_device_eval_batch_size": "4", "gradient_accumulation_steps": "1", "evaluation_strategy": "no",
    "save_strategy": "steps", "save_total_limit": "1", "weight_decay": "0.", "warmup_ratio": "0.03", "lr_scheduler_type": "cosine",
    "logging_steps": "1", "tf32": "True", "model_max_length": "2048", "gradient_checkpointing": "True", "dataloader_num_workers": "4",
    "lazy_preprocess": "True", "report_to": "wandb",
}  # fmt: skip
TUNING = {
    **COMMON, "version": "v1", "data_path": "./playground/data/llava_v1_5_mix665k.json", "image_folder": "./playground/data",
    "pretrain_mm_mlp_adapter": "./checkpoints/llava-v1.5-7b-pretrain/mm_projector.bin", "image_aspect_ratio": "pad",
    "group_by_modality_length": "True", "per_device_train_batch_size": "16", "save_steps": "50000",
}  # fmt: skip
PRETRAIN = {
    **COMMON, "deepspeed": "./scripts/zero2.json", "version": "plain", "data_path": "./playground/data/blip_laion_cc_sbu_558k.json",
    "image_folder": "./playground/data/LLaVA-Pretrain/images", "tune_mm_mlp_adapter": "True", "save_steps": "24000",
    "output_dir": "./checkpoints/llava-v1.5-7b-pretrain", "per_device_train_batch_size": "32", "learning_rate": "1e-3",
}  # fmt: skip
FINETUNE = {**TUNING, "deepspeed": "zero2", "output_dir": "./checkpoints/llava-v1.5-7b", "learning_rate": "2e-5"}
FINETUNE_LORA = {
    **FINETUNE, "lora_enable": "True", "lora_r": "128", "lora_alpha": "256", "mm_projector_lr": "2e-5", "learning_rate": "2e-4",
}  # fmt: skip
SHARED = {"deepspeed", "output_dir", "tf32", "weight_decay", "gradient_accumulation_steps", "gradient_checkpointing", "seed", "local_rank"}


def words(flags: dict[str, str]) -> list[str]:
    return [word for name, value in flags.items() for word in (f"--{name}", value)]


def read(flags: dict[str, str], *more: str) -> LlavaSettings:
    return load_config(LlavaSettings, settings_argv([*words(flags), *more]), recipe_dir=RECIPES)


def test_the_39_flags_of_the_v15_scripts_are_all_known() -> None:
    scripts = {**PRETRAIN, **FINETUNE, **FINETUNE_LORA}
    assert len(scripts) == 39
    assert set(scripts) - SHARED <= set(FLAGS)


def test_pretrain_is_our_stage_one() -> None:
    s = read(PRETRAIN)
    assert (s.stage, s.llm, s.encoder) == (1, "lmsys/vicuna-7b-v1.5", "hf:openai/clip-vit-large-patch14-336")
    assert (s.template, s.projector, s.feature_layer, s.projector_lr, s.warmup) == ("plain", "mlp2x_gelu", -2, 1e-3, 0.03)
    assert (s.data.json, s.data.max_length) == ("./playground/data/blip_laion_cc_sbu_558k.json", 2048)
    assert (s.run.micro_batch_size, s.run.epochs, s.run.save_every, s.run.keep_checkpoints) == (32, 1.0, 24000, 1)
    assert (s.weights, s.run.precision, s.tf32, s.gradient_checkpointing, s.run.trackers) == ("bf16", "bf16", True, True, ["wandb"])
    assert (s.run.log_every, s.run.num_workers, s.lora.rank, s.run.group_by_length) == (1, 4, 0, 0)
    assert Path(str(s.run.deepspeed)) == RECIPES / "zero2.json"  # theirs is not here


def test_finetune_is_our_stage_two() -> None:
    s = read(FINETUNE)
    assert (s.stage, s.template, s.resize, s.lora.rank) == (2, "vicuna_v1", "pad", 0)
    assert (s.lr, s.projector_lr) == (2e-5, 2e-5)
    assert (s.run.micro_batch_size, s.run.group_by_length, s.run.group_by_modality) == (16, 8, True)
    assert s.pretrained == "./checkpoints/llava-v1.5-7b-pretrain/mm_projector.bin"


def test_finetune_lora_keeps_both_rates_apart() -> None:
    s = read(FINETUNE_LORA)
    assert (s.stage, s.lora.rank, s.lora.alpha, s.lr, s.projector_lr, s.lora.quantize) == (2, 128, 256, 2e-4, 2e-5, "none")


def test_qlora_is_four_bits() -> None:
    s = read(FINETUNE_LORA | {"bits": "4", "lora_r": "64", "quant_type": "nf4", "double_quant": "True", "lora_dropout": "0.1"})
    assert (s.lora.quantize, s.lora.double_quant, s.lora.rank, s.lora.dropout) == ("nf4", True, 64, 0.1)
    assert s.quantization == {"bits": 4, "type": "nf4", "double": True, "dtype": "bf16"}


def test_the_command_line_wins_over_the_recipe_and_leaves_the_rest_of_it() -> None:
    s = load_config(LlavaSettings, settings_argv(["--recipe", "llava_v15_stage1", "--learning_rate", "5e-4"]), recipe_dir=RECIPES)
    assert (s.stage, s.projector_lr, s.template, s.run.global_batch_size) == (1, 5e-4, "plain", 256)
    s = load_config(LlavaSettings, settings_argv(["--recipe", "llava_v15_stage2", "--learning_rate=1e-5"]), recipe_dir=RECIPES)
    assert (s.stage, s.lr, s.projector_lr) == (2, 1e-5, 2e-5)


def test_defaults_that_llava_would_take_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    given = {name: PRETRAIN[name] for name in ("model_name_or_path", "vision_tower", "data_path", "tune_mm_mlp_adapter", "deepspeed")}
    s = read(given)
    said = capsys.readouterr().out
    for name, theirs in {"mm_vision_select_layer": "-1", "model_max_length": "512", "mm_projector_type": "linear", "version": "v0"}.items():
        assert f"no --{name}: LLaVA's default is {theirs}" in said
    assert (s.feature_layer, s.data.max_length, s.projector, s.template) == (-2, 2048, "mlp2x_gelu", "own")
    assert "./scripts/zero2.json" in said


def test_a_projector_without_a_rate_of_its_own_takes_the_llms_aloud(capsys: pytest.CaptureFixture[str]) -> None:
    flags = {name: value for name, value in FINETUNE_LORA.items() if name != "mm_projector_lr"}
    assert read(flags).projector_lr == 2e-4
    assert "no --mm_projector_lr: the projector's is 2e-4 too" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("version", "v0", "choose a template"),
        ("mm_projector_type", "mlp3x_gelu", "linear or mlp2x_gelu"),
        ("mm_use_im_start_end", "True", "no start and end tokens"),
        ("image_aspect_ratio", "highres", "square, pad or anyres"),
        ("evaluation_strategy", "epoch", "mmkit eval vqa"),
        ("lr_scheduler_type", "linear", "cosine is the one schedule"),
        ("bits", "8", r"4 \(QLoRA\) or 16"),
        ("lora_bias", "all", "none is right"),
        ("freeze_backbone", "True", "--tune_mm_mlp_adapter True"),
        ("cache_dir", "x", "HF_HOME"),
        ("report_to", "all", "name the trackers"),
        ("fp16", "True", "contradict each other"),
        ("save_strategy", "epoch", "--save_steps N"),
    ],
)
def test_what_has_no_counterpart_is_refused_with_what_replaces_it(name: str, value: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        translate(words(FINETUNE | {name: value}))


def test_lora_without_a_rank_is_not_guessed() -> None:
    with pytest.raises(ConfigError, match="LLaVA would take rank 64"):
        translate(["--lora_enable", "True"])
    assert "--lora.rank" not in translate(["--recipe", "smollm2_stage2", "--lora_enable", "True"])[0]  # the recipe says it
    assert any("does not count without" in remark for remark in translate(["--lora_r", "8", "--data_path", "x"])[1])


def test_an_unknown_flag_stays_an_error() -> None:
    with pytest.raises(ConfigError, match="no 'learning_rat'"):
        read(PRETRAIN | {"learning_rat": "1"})


def test_our_own_command_lines_pass_untouched() -> None:
    ours = ["--recipe", "mini_stage1", "--run.steps", "3", "--weight_decay=0.1", "--resume", "--deepspeed", "mine.json"]
    assert translate(ours) == (ours, [])


def test_a_flag_alone_is_true_and_the_launchers_own_passes() -> None:
    found, _ = translate(["--local_rank=0", "--bf16", "--data_path", "x", "--stage", "1"])
    assert found == ["--data.json", "x", "--run.precision", "bf16", "--weights", "bf16", "--local_rank=0", "--stage", "1"]


def test_a_tower_folder_is_told_by_what_is_in_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip_vision_model"}))
    assert original_flags._tower(str(tmp_path)) == ["--encoder", f"hf:{tmp_path}"]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mmkit_vision_encoder"}))
    assert original_flags._tower(str(tmp_path)) == ["--encoder", str(tmp_path)]
    assert original_flags._tower("clip-l14") == ["--encoder", "clip-l14"]


def test_the_projectors_file_of_a_run_of_ours_is_its_model_folder(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "projector.safetensors").touch()
    assert original_flags._pretrained(str(tmp_path / "mm_projector.bin")) == ["--pretrained", str(tmp_path / "model")]
