"""Starting Accelerate: alone, under torchrun or accelerate launch, under the deepspeed launcher; on an accelerator or on none.

A `deepspeed` block counts when a launcher started the process. Without one (plain `python`) the same recipe runs in one process without
DeepSpeed, which needs no installation of it.
"""

import atexit
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # before anything imports deepspeed, which chooses once and for all

from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DeepSpeedPlugin, DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs

from mmkit.errors import ConfigError

DEFAULT_BUCKET = 500_000_000  # elements; DeepSpeed's own, and it allocates as much whatever the model's size


def launched() -> bool:
    """Tell whether torchrun, accelerate launch or deepspeed started this process."""
    return "LOCAL_RANK" in os.environ and "WORLD_SIZE" in os.environ


def read_deepspeed_block(block: dict[str, Any] | str) -> dict[str, Any]:
    """Give the DeepSpeed settings, written in the recipe or in a JSON file that it names.

    Raises:
        ConfigError: There is no such file, or it is not JSON.
    """
    if isinstance(block, dict):
        return json.loads(json.dumps(block))  # a copy: Accelerate fills it in place
    if not block:
        return {}
    path = Path(block)
    if not path.is_file():
        raise ConfigError(f"run.deepspeed names {path}, and there is no such file; give a JSON file or write the block into the recipe")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"run.deepspeed: {path} is not JSON: {error}") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"run.deepspeed: {path} holds a {type(settings).__name__}, not an object with settings")
    return settings


def refuse_shares(block: dict[str, Any] | str) -> None:
    """Refuse ZeRO-3 where one rank computes alone while others wait: each holds a share of the weights, and it would wait for them.

    Raises:
        ConfigError: A launcher started this process, and `block` asks for stage 3.
    """
    if launched() and read_deepspeed_block(block).get("zero_optimization", {}).get("stage") == 3:
        raise ConfigError("held-out checks (--val_captions) need whole weights, and ZeRO-3 holds shares of them: ZeRO-2, or leave them out")


def make_accelerator(
    precision: str, accumulation: int, deepspeed: dict[str, Any], trackers: list[str], folder: Path, find_unused_parameters: bool = False
) -> Accelerator:
    """Make the Accelerator of one run.

    Args:
        precision: "fp32", "bf16" or "fp16".
        accumulation: Micro-batches in a step.
        deepspeed: Settings as DeepSpeed's JSON has them; empty is off.
        trackers: Names that Accelerate knows ("tensorboard", "wandb"), beside metrics.jsonl.
        folder: The run folder, for the trackers' files.
        find_unused_parameters: DDP's switch, for models whose steps leave trainable parameters unused.

    Raises:
        ConfigError: fp16 without an accelerator, a tracker that is not installed, or DeepSpeed that is not.
    """
    has_accelerator = torch.accelerator.is_available()
    if precision == "fp16" and not has_accelerator:
        raise ConfigError("run.precision fp16 needs an accelerator; fp32 and bf16 run on a CPU")
    # A process may hold several runs one after another (quickstart, tests); Accelerate's state is shared by all of them otherwise.
    AcceleratorState._reset_state(reset_partial_state=not launched())
    GradientState._reset_state()
    os.environ.pop("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", None)  # the recipe decides, `accelerate launch` would win
    plugin = _plugin(deepspeed) if deepspeed and launched() else None
    handlers: list[Any] = [DistributedDataParallelKwargs(find_unused_parameters=find_unused_parameters)]
    if plugin is not None and not has_accelerator:
        handlers.append(InitProcessGroupKwargs(backend="gloo"))
    accelerator = Accelerator(
        mixed_precision={"fp32": "no"}.get(precision, precision),
        gradient_accumulation_steps=accumulation,
        cpu=launched() and not has_accelerator and plugin is None,  # with a plugin, cpu=True would silently mean DDP
        deepspeed_plugin=plugin,
        log_with=trackers or None,
        project_dir=str(folder) if trackers else None,
        kwargs_handlers=handlers,
    )
    if plugin is not None:
        _forget_zero_init()
    if launched():
        atexit.register(_leave)
    if plugin is not None and accelerator.distributed_type != DistributedType.DEEPSPEED:
        raise ConfigError(
            "the recipe has a deepspeed block and Accelerate took another way; start with `deepspeed ...`, or set run.deepspeed to {}"
        )
    found = {getattr(tracker, "value", getattr(tracker, "name", str(tracker))) for tracker in accelerator.log_with}
    if missing := [name for name in trackers if name not in found]:
        raise ConfigError(f"run.trackers: {', '.join(missing)} is not installed; `pip install {missing[0]}`, or leave it out")
    return accelerator


def _forget_zero_init() -> None:
    """Let Transformers build models whole again.

    A plugin of ZeRO-3 tells it to shard every model while it is built, with a broadcast per tensor. Here `prepare` alone shards, and a model
    that one rank builds for itself (to try a saved folder) would wait for the others for ever.
    """
    from transformers.integrations import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


def _leave() -> None:
    """Close the process group in order: left to the interpreter's end, a rank may abort when another one closes first."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _plugin(settings: dict[str, Any]) -> DeepSpeedPlugin:
    os.environ.pop("ACCELERATE_USE_CPU", None)  # `accelerate launch --cpu` sets it, and Accelerate then ignores DeepSpeed without a word
    try:
        import deepspeed
    except ImportError as error:
        raise ConfigError("the recipe has a deepspeed block and DeepSpeed is not installed: `pip install mmkit[deepspeed]`") from error
    if not torch.accelerator.is_available():
        # Shared memory between CPU ranks serves inference alone, takes a minute to compile, and a killed build's lock stops all later starts.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"):
        settings.setdefault(key, "auto")  # Accelerate would put its own defaults; `complete_deepspeed` fills them in
    settings.setdefault("zero_optimization", {"stage": 0})
    if not isinstance(settings["zero_optimization"], dict):
        raise ConfigError(f"run.deepspeed.zero_optimization is {settings['zero_optimization']!r}; it should be a group of settings")
    return DeepSpeedPlugin(hf_ds_config=settings)


def complete_deepspeed(
    accelerator: Accelerator, model: nn.Module, micro: int, accumulation: int, precision: str, max_grad_norm: float
) -> list[str]:
    """Write into the DeepSpeed settings what the run and the model decide; call it before `accelerator.prepare`.

    Args:
        accelerator: One with a DeepSpeed plugin.
        model: The bare model, with its trainable parameters chosen.
        micro: Samples in a micro-batch.
        accumulation: Micro-batches in a step.
        precision: "fp32", "bf16" or "fp16".
        max_grad_norm: 0 is off. Left out, DeepSpeed's own default would decide, and it changed between releases.

    Returns:
        Remarks to print: which parts of the block are not used.

    Raises:
        ConfigError: The block contradicts the run.
    """
    plugin = accelerator.state.deepspeed_plugin
    settings: dict[str, Any] = plugin.deepspeed_config
    remarks = [
        f"deepspeed: the block's {key} is not used, the recipe's own is" for key in ("optimizer", "scheduler") if settings.pop(key, None)
    ]
    ours = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": micro * accumulation * accelerator.num_processes,
        "gradient_clipping": max_grad_norm,
    }
    for key, value in ours.items():
        given = settings.get(key, "auto")
        if given not in ("auto", value):
            raise ConfigError(f"run.deepspeed.{key} is {given}, the run's settings make it {value}; leave it out of the block")
        settings[key] = value
    for kind in ("bf16", "fp16"):
        section = settings.setdefault(kind, {})
        given = section.get("enabled", "auto")
        if given not in ("auto", precision == kind):
            raise ConfigError(f"run.deepspeed.{kind}.enabled is {given}, run.precision is {precision}; leave it out of the block")
        section["enabled"] = precision == kind
    zero = settings["zero_optimization"]
    zero.setdefault("stage3_gather_16bit_weights_on_model_save", True)  # without it ZeRO-3 cannot export
    _fill_sizes(zero, model)
    settings.setdefault("steps_per_print", 10**9)
    for name, value in list(settings.items()):
        if value == "auto":
            del settings[name]
    return remarks


def shard(accelerator: Accelerator, model: nn.Module, precision: str) -> None:
    """Under ZeRO-3 cut the weights into shares, one tensor after the other; call it between `complete_deepspeed` and `accelerator.prepare`.

    DeepSpeed would move the whole model to each device first, where it need not fit.
    """
    settings = accelerator.state.deepspeed_plugin.deepspeed_config
    if settings["zero_optimization"].get("stage") != 3:
        return
    import deepspeed

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    for parameter in model.parameters():
        if dtype is not None and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    deepspeed.zero.Init(module=model, config_dict_or_path=settings)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(accelerator.device)


def _fill_sizes(zero: dict[str, Any], model: nn.Module) -> None:
    """Set the bucket sizes from the language model's width d, as Transformers does, and never above what there is to reduce.

    Source: Accelerate looks at `config.hidden_size` alone, which composed models (LLaVA) do not have.
    """
    trainable = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters() if parameter.requires_grad)
    config = getattr(model, "config", None)
    text = getattr(config, "text_config", None) or config
    width = getattr(text, "hidden_size", None)
    automatic = {
        "reduce_bucket_size": max(width * width, 1_000_000) if width else DEFAULT_BUCKET,
        "stage3_prefetch_bucket_size": int(0.9 * width * width) if width else 50_000_000,
        "stage3_param_persistence_threshold": 10 * width if width else 100_000,
    }
    for key, value in automatic.items():
        if zero.get(key, "auto") == "auto":
            zero[key] = value
    zero["reduce_bucket_size"] = min(int(zero["reduce_bucket_size"]), max(trainable, 1))
    if zero.get("allgather_bucket_size", "auto") == "auto":
        zero["allgather_bucket_size"] = min(DEFAULT_BUCKET, max(trainable, 1))
