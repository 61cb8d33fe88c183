"""Options of the LLaVA training: 4-bit weights, adapters' kinds, attention, kernels, workers, log; and settings that contradict each other."""

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from llava_tiny import tiny_llm, write_data, write_parts
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from llm_stage import llms, throughput, train_llava, tuning
from llm_stage.llava import set_stage, supervised_loss
from llm_stage.llava_settings import LlavaSettings
from llm_stage.llms import load_llm
from llm_stage.throughput import LlavaFlops, sample_lengths
from llm_stage.train_llava import assemble, main, make_batch, make_dataset
from llm_stage.tuning import add_lora, checkpoint_llm, compile_llm, keep_trained_in_fp32, use_liger
from mmkit.config import load_config
from mmkit.errors import ConfigError

QLORA = {"lora.rank": 4, "lora.alpha": 8, "lora.quantize": "nf4"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Parts, data with text-only rows, and a finished stage 1."""
    folder = tmp_path_factory.mktemp("options")
    write_parts(folder)
    write_data(folder, rows=24, text_only_every=4)
    main(arguments(folder, folder / "stage1", stage=1, steps=1, check_saving="false"))
    return folder


def arguments(world: Path, output: Path, stage: int = 2, **changes: Any) -> list[str]:
    parts = {"encoder": world / "encoder", "llm": world / "llm"} if stage == 1 else {"pretrained": world / "stage1" / "model"}
    flags = {
        **parts, "stage": stage, "json": world / "data.json", "images": world / "images", "output_dir": output, "micro_batch_size": 4,
        "log_every": 1, "lr": 2e-3, "projector_lr": 2e-3, "steps": 6, **changes,
    }  # fmt: skip
    return [str(word) for name, value in flags.items() for word in (f"--{name}", value)]


def settings(world: Path, stage: int = 2, **changes: Any) -> LlavaSettings:
    return load_config(LlavaSettings, arguments(world, world / "unused", stage, **changes))


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in rows(folder)]


class Cut(RuntimeError):
    """What ends a run in its midst."""


def cut_off(monkeypatch: pytest.MonkeyPatch, argv: list[str], calls: int) -> None:
    """Train until the loss was asked for so often, and die."""
    with monkeypatch.context() as patch:
        left, loss = [calls], train_llava.supervised_loss

        def counted(*args: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise Cut
            return loss(*args)

        patch.setattr(train_llava, "supervised_loss", counted)
        with pytest.raises(Cut):
            main(argv)


# -- QLoRA -----------------------------------------------------------------------------------------------------------------------------


def test_four_bits_are_for_the_llms_layers_alone_and_the_trained_part_is_float32(world: Path) -> None:
    s = settings(world, **QLORA, weights="bf16", precision="bf16", gradient_checkpointing="true")
    parts = assemble(s)
    set_stage(parts.model, train_llm=True)
    checkpoint_llm(parts.model)
    adapted = add_lora(parts.model, s.lora, seed=0)
    keep_trained_in_fp32(adapted)
    inner = parts.model.model
    kinds = {type(module).__name__ for name, module in inner.language_model.named_modules() if name.endswith("_proj.base_layer")}
    assert kinds == {"Linear4bit"}
    assert type(parts.model.lm_head) is nn.Linear
    whole = [inner.vision_tower, inner.multi_modal_projector.original_module, parts.model.lm_head]
    assert {parameter.dtype for part in whole for parameter in part.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in adapted.parameters() if parameter.requires_grad} == {torch.float32}
    assert not any(getattr(module, "gradient_checkpointing", False) for module in inner.vision_tower.modules())
    trained = {name.split(".")[4] for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert trained == {"layers", "linear_1", "linear_2", "modules_to_save"} & trained
    assert parts.card.quantization == {"bits": 4, "type": "nf4", "double": True, "dtype": "bf16"}


def test_a_qlora_run_goes_on_bit_for_bit_with_another_number_of_workers(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {**QLORA, "lora.dropout": 0.3, "save_every": 2, "check_saving": "false"}
    whole = main(arguments(world, tmp_path / "whole", **changes))
    cut_off(monkeypatch, arguments(world, tmp_path / "cut", num_workers=2, **changes), calls=5)
    again = main([*arguments(world, tmp_path / "cut", num_workers=1, **changes), "--resume"])
    assert losses(again) == losses(whole)
    one, two = (load_file(folder / "model" / "adapter_model.safetensors") for folder in (whole, again))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora.quantize": "nf4"}, "give --lora.rank too"),
        ({**QLORA, "deepspeed.zero_optimization.stage": 3}, "ZeRO-3 would cut up 4-bit weights"),
        ({"lora.quantize": "int8", "lora.rank": 4}, "it may be none, nf4, fp4"),
    ],
)
def test_quantising_what_cannot_be_is_refused(world: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        main(arguments(world, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_a_missing_package_is_named_with_its_extra(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    absent = {"bitsandbytes", "flash_attn", "liger_kernel"}
    for module in (llms, tuning):
        monkeypatch.setattr(module, "find_spec", lambda name: None if name in absent else importlib.util.find_spec(name))
    with pytest.raises(ConfigError, match=r"pip install 'mmkit\[quantization\]'"):
        main(arguments(world, tmp_path / "run", **QLORA))
    with pytest.raises(ConfigError, match="pip install flash-attn, or --attention sdpa"):
        main(arguments(world, tmp_path / "run", attention="flash_attention_2"))
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match=r"pip install 'mmkit\[liger\]'"):
        use_liger(assemble(settings(world)).model, torch.device("cuda"))


# -- adapters, attention, kernels --------------------------------------------------------------------------------------------------------


def test_dora_and_rank_stabilised_scales_are_peft_s(world: Path) -> None:
    s = settings(world, **{"lora.rank": 4, "lora.dora": "true", "lora.rslora": "true"})
    adapted = add_lora(assemble(s).model, s.lora, seed=0)
    assert isinstance(adapted, PeftModel)
    config: Any = adapted.peft_config["default"]
    assert (config.use_dora, config.use_rslora) == (True, True)
    assert any("lora_magnitude_vector" in name for name, _ in adapted.named_parameters())


def test_targets_that_match_nothing_are_refused_with_what_there_is(world: Path) -> None:
    s = settings(world, **{"lora.rank": 4, "lora.targets": ".*c_attn"})
    with pytest.raises(ConfigError, match=r"lora.targets '\.\*c_attn' matches no layer.*layers.0.self_attn.q_proj"):
        add_lora(assemble(s).model, s.lora, seed=0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_llm_attends_as_it_is_told(world: Path, attention: str) -> None:
    parts = assemble(settings(world, attention=attention))
    assert parts.model.model.language_model.config._attn_implementation == attention


def test_liger_changes_this_llm_and_nothing_else(world: Path) -> None:
    pytest.importorskip("liger_kernel", reason="an extra for CUDA")
    model = assemble(settings(world)).model
    with pytest.raises(ConfigError, match="the device is cpu"):
        use_liger(model, torch.device("cpu"))
    tower = {name: module.forward for name, module in model.model.vision_tower.named_modules()}
    assert use_liger(model, torch.device("cuda")) == ["LlamaMLP", "LlamaRMSNorm"]
    assert {name: module.forward for name, module in model.model.vision_tower.named_modules()} == tower
    other, _ = tiny_llm()
    assert not any("liger" in type(module).__module__ for module in other.modules())
    other(torch.tensor([[1, 2, 3]]))  # on a CPU, where Liger's kernels do not run
    model.model.language_model.config.model_type = "opt"
    with pytest.raises(ConfigError, match="no kernels for an LLM of type 'opt'"):
        use_liger(model, torch.device("cuda"))


def test_compiled_layers_keep_their_names(world: Path) -> None:
    model = assemble(settings(world)).model
    names = set(model.state_dict())
    compile_llm(model)
    assert set(model.state_dict()) == names
    assert all(layer._compiled_call_impl is not None for layer in model.model.language_model.layers)


@pytest.mark.slow
def test_compiled_layers_learn_the_same(world: Path, tmp_path: Path) -> None:
    plain = main(arguments(world, tmp_path / "plain", check_saving="false", steps=3))
    compiled = main(arguments(world, tmp_path / "compiled", check_saving="false", steps=3, compile="true"))
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-4)


def test_pictures_are_padded_in_training_as_the_result_says(world: Path, tmp_path: Path) -> None:
    folder = main(arguments(world, tmp_path / "run", steps=1, resize="pad", **{"lora.rank": 2}))
    assert json.loads((folder / "model" / "processor_config.json").read_text())["image_processor"]["do_pad"] is True
    model, processor, card = train_llava.load_llava(folder / "model")
    assert card is not None
    assert (card.resize, model.model.vision_tower.spec.resize, processor.image_processor.do_pad) == ("pad", "pad", True)


# -- the log -----------------------------------------------------------------------------------------------------------------------------


def test_the_log_says_how_fast_it_was(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    clock = [0.0]
    ticking = SimpleNamespace(monotonic=lambda: clock.__setitem__(0, clock[0] + 1) or clock[0])
    monkeypatch.setattr(throughput, "time", ticking)
    changes = {"log_every": 2, "steps": 3, "gradient_accumulation_steps": 2, "peak_tflops": 1e-6, "check_saving": "false"}
    folder = main(arguments(world, tmp_path / "run", **changes))
    second, third = rows(folder)
    assert (second["step"], third["step"]) == (2, 3)
    assert second["samples_per_second"] == pytest.approx(2 * 8 / 1.0)  # two steps of two micro-batches of four; the clock ticks when asked
    assert 0 < second["padding"] < 1
    assert second["tokens_per_second"] > second["label_tokens_per_second"] > 0
    assert second["mfu"] == pytest.approx(second["tflops"] / 1e-6)
    assert second["memory_gb"] > 0.05
    assert "supervised tokens/s of" in capsys.readouterr().out


def test_padding_and_dummy_rows_are_not_tokens() -> None:
    labels = torch.tensor([[-100, 5, 6, -100], [-100, 7, -100, -100], [-100] * 4])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]])  # the last is a dummy row
    assert sample_lengths({"labels": labels, "attention_mask": mask}).tolist() == [3, 2]
    packed = torch.tensor([[-100, 5, 6, -100, 7, -100]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 0]])  # the last place is padding
    assert sample_lengths({"labels": packed, "attention_mask": None, "position_ids": positions}).tolist() == [3, 2]


@pytest.mark.parametrize(("stage", "rank"), [(1, 0), (2, 0), (2, 4)], ids=["projector", "full", "lora"])
def test_operations_are_those_that_torch_counts(world: Path, stage: int, rank: int) -> None:
    s = settings(world, stage, attention="eager", **{"lora.rank": rank})
    parts = assemble(s)
    model: Any = parts.model
    set_stage(model, train_llm=stage == 2)
    model = add_lora(model, s.lora, seed=0) if rank else model
    for module in parts.model.model.vision_tower.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # torch counts no operations of the fused kernel on a CPU
    dataset = make_dataset(s, parts)
    batch = make_batch([dataset[1]], parts)
    expected = LlavaFlops.of(parts.model).of_batch(batch, sample_lengths(batch), parts.model.config.image_seq_length)
    with FlopCounterMode(display=False) as counter:
        supervised_loss(model, batch)[0].backward()
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.02)  # torch also counts the rotary frequencies


def test_tensorboard_gets_what_the_log_gets(world: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="an extra")
    folder = main(arguments(world, tmp_path / "run", 1, steps=2, trackers="tensorboard", check_saving="false"))
    events = list(folder.rglob("events.out.tfevents.*"))
    assert events
    assert any(b"label_tokens_per_second" in path.read_bytes() for path in events)
    assert len(losses(folder)) == 2


def test_a_tracker_that_is_not_installed_is_named(world: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("clearml") is not None:
        pytest.skip("clearml is installed here")
    with pytest.raises(ConfigError, match="clearml is not installed; `pip install clearml`"):
        main(arguments(world, tmp_path / "run", 1, trackers="clearml"))


# -- contradictions ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"train_micro_batch_size_per_gpu": 8}, "train_micro_batch_size_per_gpu 8, and run.micro_batch_size is 4"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps 2, and run.gradient_accumulation_steps is 1"),
        ({"train_batch_size": 64}, "train_batch_size 64, and run.global_batch_size is 4"),
        ({"gradient_clipping": 0.5}, "gradient_clipping 0.5, and run.max_grad_norm is 1.0"),
        ({"bf16": {"enabled": True}}, "bf16.enabled True, and run.precision is fp32"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-4}}}, "optimizer.params.lr 0.0001, and lr is 0.002"),
        ({"optimizer": {"type": "Lamb"}}, "optimizer.type Lamb, and this training's is AdamW"),
        ({"scheduler": {"type": "WarmupLR", "params": {}}}, r"scheduler.type WarmupLR \(constant after the warm-up\), .* is cosine"),
    ],
)
def test_a_deepspeed_file_that_contradicts_the_settings_is_refused(
    world: Path, tmp_path: Path, block: dict[str, Any], message: str
) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}, **block}))
    with pytest.raises(ConfigError, match=f"ds.json says {message}"):
        main(arguments(world, tmp_path / "run", deepspeed=path, global_batch_size=4))
    assert not (tmp_path / "run").exists()


def test_a_deepspeed_file_with_auto_agrees_with_everything(world: Path, tmp_path: Path) -> None:
    names = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size", "gradient_clipping")
    block = {**dict.fromkeys(names, "auto"), "bf16": {"enabled": "auto"}, "optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}
    (tmp_path / "ds.json").write_text(json.dumps(block))
    assert settings(world, deepspeed=tmp_path / "ds.json").run.deepspeed


def test_a_run_that_goes_on_must_be_the_same_run(world: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    main(arguments(world, run, 1, steps=2, check_saving="false"))
    config = (run / "config.yaml").read_bytes()
    with pytest.raises(ConfigError) as caught:
        main([*arguments(world, run, 1, steps=4, check_saving="false", projector_lr=1e-3, num_workers=1), "--resume"])
    said = str(caught.value)
    assert "projector_lr was 0.002, is 0.001" in said
    assert "run.steps was 2, is 4" in said
    assert "num_workers was" not in said  # which is free
    assert (run / "config.yaml").read_bytes() == config
    freely = {"log_every": 2, "save_every": 1, "num_workers": 1, "trackers": "tensorboard"}
    main([*arguments(world, run, 1, steps=2, check_saving="false", **freely), "--resume"])


def test_an_llm_that_the_projector_does_not_lead_to_is_refused(world: Path, tmp_path: Path) -> None:
    model, tokenizer = tiny_llm()
    config = type(model.config)(**{**model.config.to_dict(), "hidden_size": 64, "head_dim": 16})
    type(model)(config).save_pretrained(tmp_path / "wide")
    tokenizer.save_pretrained(tmp_path / "wide")
    with pytest.raises(ConfigError, match=r"leads from width 32 .* to width 48 .*from 32 to 64"):
        main(arguments(world, tmp_path / "run", llm=tmp_path / "wide"))
    assert not (tmp_path / "run").exists()


def test_a_quantised_llm_keeps_its_answers_near(world: Path) -> None:
    whole, tokenizer = load_llm(str(world / "llm"))
    small, _ = load_llm(str(world / "llm"), quantization={"type": "nf4", "double": True})
    ids = torch.tensor([tokenizer("what colour is it")["input_ids"]])
    with torch.no_grad():
        one, two = whole(ids).logits, small(ids).logits
    assert 0 < (one - two).norm() < 0.5 * one.norm()  # rounded, and no more than rounded
