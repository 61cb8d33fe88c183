"""Every recipe of the LLaVA stage: what it says, and two steps of it with everything made tiny."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from llava_tiny import tiny_llm, tiny_tokenizer, write_data, write_parts
from transformers import Qwen2Config, Qwen2ForCausalLM

from llm_stage.chat_templates import TEMPLATES as CHAT_TEMPLATES
from llm_stage.llava_settings import LlavaSettings
from llm_stage.train_llava import RECIPES, main
from mmkit.config import load_config

NAMES = sorted(path.stem for path in RECIPES.glob("*_stage*.yaml") if not path.stem.startswith(("qformer", "blip2")))
PUBLISHED = [name for name in NAMES if name.startswith("llava_")]

# projector, encoder, global batch, epochs, lr, projector's lr, LoRA rank, alpha, ZeRO stage, resize: sections 4 and 7 of LLaVA's papers and
# scripts. The lr of stage 1 counts for nothing.
TABLE: dict[str, tuple[str, str, int, float, float, float, int, int, int, str]] = {
    "llava_v1_stage1": ("linear", "clip-l14", 128, 1, 2e-5, 2e-3, 0, 16, 2, "crop"),
    "llava_v1_stage2": ("linear", "", 32, 3, 2e-5, 2e-5, 0, 16, 3, "crop"),
    "llava_v1_stage2_lora": ("linear", "", 128, 1, 2e-5, 2e-5, 64, 16, 2, "crop"),
    "llava_v1_stage2_qlora": ("linear", "", 128, 1, 2e-5, 2e-5, 64, 16, 2, "crop"),
    "llava_v15_stage1": ("mlp2x_gelu", "clip-l14-336", 256, 1, 2e-5, 1e-3, 0, 16, 2, "crop"),
    "llava_v15_stage2": ("mlp2x_gelu", "", 128, 1, 2e-5, 2e-5, 0, 16, 3, "pad"),
    "llava_v15_stage2_tiles": ("mlp2x_gelu", "", 128, 1, 2e-5, 2e-5, 0, 16, 3, "squash"),
    "llava_v15_stage2_lora": ("mlp2x_gelu", "", 128, 1, 2e-4, 2e-5, 128, 256, 3, "pad"),
    "llava_v15_stage2_qlora": ("mlp2x_gelu", "", 128, 1, 2e-4, 2e-5, 128, 256, 2, "pad"),
}
TEMPLATES = {"": "vicuna_v1", "llama3": "llama_3", "qwen": "chatml", "smollm2": "chatml"}


def read(name: str) -> LlavaSettings:
    return load_config(LlavaSettings, ["--recipe", name], recipe_dir=RECIPES)


def family_of(name: str) -> str:
    return next((llm for llm in TEMPLATES if llm and f"_{llm}_" in name), "")


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_is_the_papers_setting_whatever_the_llm(name: str) -> None:
    s, family = read(name), family_of(name)
    row = TABLE[name.replace(f"_{family}_", "_") if family else name]
    zero = s.run.deepspeed["zero_optimization"]["stage"] if isinstance(s.run.deepspeed, dict) else 0
    assert (
        s.projector, s.encoder, s.run.global_batch_size, s.run.epochs, s.lr, s.projector_lr, s.lora.rank, s.lora.alpha, zero, s.resize
    ) == row  # fmt: skip
    assert (s.weight_decay, s.warmup, s.feature_layer, s.data.max_length, s.gradient_checkpointing) == (
        0.0,
        0.03,
        -2,
        4096 if s.tiles else 2048,
        True,
    )
    assert (s.run.precision, s.weights, s.stage) == ("bf16", "bf16", 1 if name.endswith("stage1") else 2)
    assert s.lora.quantize == ("nf4" if name.endswith("qlora") else "none")
    assert s.template == ("plain" if s.stage == 1 else TEMPLATES[family])
    assert s.run.global_batch_size % (8 * s.run.micro_batch_size) == 0  # on eight GPUs
    if s.stage == 2:
        assert s.pretrained == read(f"{name.split('_stage')[0]}_stage1").run.output_dir + "/model"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Encoder, two Llamas and a Qwen2 of one width, two kinds of data, and a stage 1 for each projector and layer that recipes ask for."""
    folder = tmp_path_factory.mktemp("recipes")
    write_parts(folder)
    tokenizer = tiny_tokenizer()
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    qwen = Qwen2ForCausalLM(Qwen2Config(vocab_size=len(tokenizer), max_position_embeddings=512, tie_word_embeddings=False, **sizes))
    qwen.save_pretrained(folder / "qwen")
    tokenizer.save_pretrained(folder / "qwen")
    llama, _ = tiny_llm()
    marked = tiny_tokenizer(*CHAT_TEMPLATES["llama_3"].marks)
    llama.resize_token_embeddings(len(marked))
    llama.save_pretrained(folder / "llama3")
    marked.save_pretrained(folder / "llama3")
    data, _ = write_data(folder, rows=8)
    rows = json.loads(data.read_text())
    captions = [{**row, "conversations": row["conversations"][:2]} for row in rows]
    (folder / "captions.json").write_text(json.dumps(captions))
    (folder / "data.json").write_text(
        json.dumps([*rows, {"id": "t", "conversations": [said(turn) for turn in captions[0]["conversations"]]}])
    )
    for name in ("llava_v1_stage1", "llava_v15_stage1", "mini_stage1"):
        train(name, folder, folder / name, "--check_saving", "false")
    return folder


def said(turn: dict[str, str]) -> dict[str, str]:
    return {**turn, "value": turn["value"].replace("<image>\n", "")}


def train(name: str, world: Path, output: Path, *more: str) -> Path:
    """Two steps of a recipe, each of two micro-batches, with tiny parts of the same kinds."""
    settings = read(name)
    flags: dict[str, Any] = {
        "llm": world / (family if (family := family_of(name)) in ("qwen", "llama3") else "llm"), "encoder": world / "encoder", "images": world / "images",
        "json": world / ("captions.json" if settings.stage == 1 else "data.json"), "output_dir": output, "steps": 2, "micro_batch_size": 2,
        "global_batch_size": 4, "gradient_accumulation_steps": 0, "num_workers": 0, "save_every": 0, "log_every": 1, "warmup": 1,
    }  # fmt: skip
    if settings.stage == 2:
        earlier = "llava_v15" if "v15" in name else "llava_v1" if "v1" in name else "mini"
        flags["pretrained"] = world / f"{earlier}_stage1" / "model"
    return main(["--recipe", name, *(str(word) for key, value in flags.items() for word in (f"--{key}", value)), *more])


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_trains_when_all_is_tiny(name: str, world: Path, tmp_path: Path) -> None:
    settings = read(name)
    folder = train(name, world, tmp_path / "run", "--check_saving", str(family_of(name) in ("", "qwen")))
    losses = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 2
    assert all(math.isfinite(loss) for loss in losses)
    files = {path.name for path in (folder / "model").iterdir()}
    kind = "projector" if settings.stage == 1 else "adapter" if settings.lora.rank else "whole"
    assert {"projector": "projector.safetensors", "adapter": "adapter_model.safetensors", "whole": "model.safetensors"}[kind] in files
    card = json.loads((folder / "model" / "mmkit_llava.json").read_text())
    assert (card["projector"], card["resize"], card["quantization"]) == (settings.projector, settings.resize, settings.quantization)
