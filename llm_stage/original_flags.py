"""The command line of LLaVA's own scripts, understood: their flags become our settings, or say what replaces them.

    deepspeed llm_stage/train_llava.py --deepspeed zero2.json --model_name_or_path lmsys/vicuna-7b-v1.5 --version plain \
        --data_path blip_laion_cc_sbu_558k.json --image_folder LLaVA-Pretrain --tune_mm_mlp_adapter True ...

What is different here, flag for flag:

    LLaVA's defaults        are not taken over: mm_vision_select_layer -1, model_max_length 512, mm_projector_type linear, version v0,
                            per_device_train_batch_size 8, warmup_ratio 0, lr_scheduler_type linear. Ours count, and a line says so for each.
    lora_enable             needs lora_r: LLaVA's 64, with alpha 16, is taken by nobody on purpose
    mm_projector_lr         left out in stage 2 it is learning_rate, as in LLaVA, and a line says so
    group_by_modality_length makes steps of one kind of row, and sorts 8 steps' rows by length (run.group_by_modality, run.group_by_length)
    image_aspect_ratio      is the resize of the tower's pictures, saved with the model
    deepspeed               a file's gradient clipping, optimizer and schedule must not contradict the settings; a name alone
                            (zero2, zero3_offload) is a file of llm_stage/recipes
    bf16                    frozen weights are bfloat16; what is trained stays float32, with DeepSpeed or without
    loss                    the mean over all supervised tokens of a step; LLaVA takes the mean of the micro-batches' means

Order: defaults < recipe < command line. Flags that neither side knows stay errors.

Source: the 39 flags of scripts/v1_5/{pretrain,finetune,finetune_lora}.sh of haotian-liu/LLaVA, and those of its other scripts.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from mmkit.config import find_recipe, read_recipe
from mmkit.errors import ConfigError

RECIPES = Path(__file__).parent / "recipes"
BLOCKS = ("zero1", "zero2", "zero2_offload", "zero3", "zero3_offload")


@dataclass(frozen=True)
class Flag:
    """What becomes of one of LLaVA's flags.

    Attributes:
        to: The setting that takes its value as it is.
        values: Its values, in lower case, and the words of our command line that say the same; () is "nothing to do".
        otherwise: What to do instead of a value that is not among them.
    """

    to: str = ""
    values: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    otherwise: str = ""


# fmt: off
_OFF: Mapping[str, tuple[str, ...]] = {"false": ()}
_SWITCH: Mapping[str, tuple[str, ...]] = {"false": (), "true": ()}

FLAGS: dict[str, Flag] = {
    # LLaVA's own
    "model_name_or_path": Flag("llm"),
    "version": Flag(
        values={
            "plain": ("--template", "plain"), "v1": ("--template", "vicuna_v1"), "vicuna_v1": ("--template", "vicuna_v1"),
            "llava_llama_2": ("--template", "llama_2"), "mpt": ("--template", "chatml"), "chatml_direct": ("--template", "chatml"),
        },
        otherwise="choose a template: --template plain, vicuna_v1, llama_2, llama_3, chatml, or own (the tokenizer's)",
    ),
    "data_path": Flag("data.json"),
    "image_folder": Flag("data.images"),
    "vision_tower": Flag(),  # see _tower
    "mm_projector_type": Flag(
        values={"linear": ("--projector", "linear"), "mlp2x_gelu": ("--projector", "mlp2x_gelu")},
        otherwise="transformers' LLaVA has one or two layers: --mm_projector_type linear or mlp2x_gelu",
    ),
    "tune_mm_mlp_adapter": Flag(values={"true": ("--stage", "1"), "false": ("--stage", "2")}, otherwise="True is stage 1, False stage 2"),
    "pretrain_mm_mlp_adapter": Flag(),  # see _pretrained
    "mm_vision_select_layer": Flag("feature_layer"),
    "mm_vision_select_feature": Flag(
        values={"patch": ("--select", "auto"), "cls_patch": ("--select", "full")}, otherwise="patch or cls_patch is right"
    ),
    "mm_use_im_start_end": Flag(values=_OFF, otherwise="an image has no start and end tokens here: leave it out"),
    "mm_use_im_patch_token": Flag(values=_OFF, otherwise="the place of an image is <image> alone here: leave it out"),
    "image_aspect_ratio": Flag(
        values={"square": ("--resize", "crop"), "pad": ("--resize", "pad"), "anyres": ("--resize", "squash", "--tiles", "4")},
        otherwise="square, pad or anyres is right, or --resize squash",
    ),
    "group_by_modality_length": Flag(
        values={
            "true": ("--run.group_by_modality", "true", "--run.group_by_length", "8"),
            "false": ("--run.group_by_modality", "false", "--run.group_by_length", "0"),
        },
        otherwise="True or False is right",
    ),
    "lazy_preprocess": Flag(values=_SWITCH, otherwise="leave it out: pictures are always opened when their turn comes"),
    "model_max_length": Flag("data.max_length"),
    "freeze_mm_mlp_adapter": Flag(values={"false": (), "true": ("--projector_lr", "0")}, otherwise="True or False is right"),
    "freeze_backbone": Flag(values=_OFF, otherwise="training the projector alone is stage 1: --tune_mm_mlp_adapter True"),
    "mm_projector_lr": Flag("projector_lr"),
    "lora_enable": Flag(),  # these five: see _lora
    "lora_r": Flag(),
    "bits": Flag(),
    "double_quant": Flag("lora.double_quant"),
    "quant_type": Flag(),
    "lora_alpha": Flag("lora.alpha"),
    "lora_dropout": Flag("lora.dropout"),
    "lora_bias": Flag(values={"none": ()}, otherwise="biases are not trained beside LoRA here: none is right"),
    "lora_weight_path": Flag(values={"": ()}, otherwise="a LoRA is not gone on with: --resume goes on with a run, mmkit export merges one"),
    "cache_dir": Flag(otherwise="set the environment variable HF_HOME instead"),
    "is_multimodal": Flag(values=_SWITCH, otherwise="leave it out"),
    # the Trainer's
    "bf16": Flag(values=_SWITCH, otherwise="True or False is right"),  # see _precision
    "fp16": Flag(values=_SWITCH, otherwise="True or False is right"),
    "num_train_epochs": Flag("run.epochs"),
    "max_steps": Flag("run.steps"),
    "per_device_train_batch_size": Flag("run.micro_batch_size"),
    "per_device_eval_batch_size": Flag(),  # nothing is evaluated during a training
    "evaluation_strategy": Flag(values={"no": ()}, otherwise="nothing is evaluated during a training: mmkit eval vqa does it afterwards"),
    "eval_strategy": Flag(values={"no": ()}, otherwise="nothing is evaluated during a training: mmkit eval vqa does it afterwards"),
    "save_strategy": Flag(values={"steps": (), "no": ("--run.save_every", "0")}, otherwise="steps or no is right, with --save_steps N"),
    "save_steps": Flag("run.save_every"),
    "save_total_limit": Flag("run.keep_checkpoints"),
    "learning_rate": Flag(),  # see _rates
    "lr_scheduler_type": Flag(values={"cosine": ()}, otherwise="cosine is the one schedule here: leave it out"),
    "warmup_ratio": Flag("warmup"),
    "warmup_steps": Flag("warmup"),
    "logging_steps": Flag("run.log_every"),
    "dataloader_num_workers": Flag("run.num_workers"),
    "report_to": Flag(),  # see _trackers
    "optim": Flag(values={"adamw_torch": ()}, otherwise="AdamW of torch is the one optimizer here: leave it out"),
    "attn_implementation": Flag("attention"),
    "remove_unused_columns": Flag(values=_SWITCH, otherwise="leave it out"),
}
# fmt: on
"""Flags that bear the same name on both sides (output_dir, deepspeed, tf32, weight_decay, seed, gradient_accumulation_steps, ...) pass."""

SURPRISING: dict[str, tuple[str, str]] = {
    "mm_vision_select_layer": ("-1", "feature_layer"), "model_max_length": ("512", "data.max_length"),
    "mm_projector_type": ("linear", "projector"), "version": ("v0", "template"), "warmup_ratio": ("0", "warmup"),
    "per_device_train_batch_size": ("8", "run.micro_batch_size"), "learning_rate": ("5e-5", "lr"),
}  # fmt: skip
"""Defaults of LLaVA that are not taken over: its value, and the setting whose own default counts."""


def settings_argv(argv: Sequence[str] | None) -> list[str]:
    """Put LLaVA's flags of a command line into ours, and say on the first process what was not obvious.

    Args:
        argv: The command line; None is `sys.argv[1:]`.
    """
    words, remarks = translate(list(sys.argv[1:] if argv is None else argv))
    if int(os.environ.get("RANK", 0)) == 0:
        for remark in remarks:
            print(f"original flags: {remark}", flush=True)
    return words


def translate(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Put LLaVA's flags of a command line into ours; what is not theirs stays where it is.

    Returns:
        Our command line, and remarks on what the two programs do differently.

    Raises:
        ConfigError: A flag says something that has no counterpart here; the message says what to do instead.
    """
    given, rest = _split(argv)
    words, remarks = _deepspeed_file(rest)
    if not given:
        return words, remarks
    ours = {word[2:].split("=")[0].replace("-", "_") for word in words if word.startswith("--")}
    translated: list[str] = []
    for name, value in given.items():
        translated += _one(name, value)
    for together in (_stage, _precision, _lora, _rates, _training_length, _defaults):
        more, said = together(given, ours, words)
        translated += more
        remarks += said
    return [*translated, *words], remarks


def _split(argv: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """LLaVA's flags with their values, and all other words in their order; the last of a flag given twice counts."""
    given: dict[str, str] = {}
    rest: list[str] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        name, equals, value = word[2:].partition("=")
        if not word.startswith("--") or name not in FLAGS:
            rest.append(word)
        elif equals:
            given[name] = value
        else:  # --bf16 alone is True, as for the Trainer's parser
            given[name] = words.pop(0) if words and not words[0].startswith("--") else "True"
    return given, rest


def _one(name: str, value: str) -> list[str]:
    flag = FLAGS[name]
    if flag.to:
        return [f"--{flag.to}", value]
    if name in SPECIAL:
        return SPECIAL[name](value)
    if flag.values or flag.otherwise:
        if value.lower() not in flag.values:
            known = f"; known: {', '.join(flag.values)}" if len(flag.values) > 2 else ""
            raise ConfigError(f"--{name} {value} (a flag of LLaVA's scripts) has no counterpart here: {flag.otherwise}{known}")
        return list(flag.values[value.lower()])
    return []


def _tower(value: str) -> list[str]:
    """A name or folder as LLaVA has it is one of transformers; ours have a prefix, a name in the table, or a folder of their own."""
    config = Path(value) / "config.json"
    if config.is_file():
        kind = json.loads(config.read_text(encoding="utf-8")).get("model_type", "")
        return ["--encoder", f"hf:{value}" if kind in ("clip", "clip_vision_model", "siglip", "siglip_vision_model") else value]
    return ["--encoder", f"hf:{value}" if "/" in value and ":" not in value and not Path(value).exists() else value]


def _pretrained(value: str) -> list[str]:
    """LLaVA names the projector's file; a stage-1 run of ours in that place has it in its model folder."""
    path = Path(value)
    if path.is_file():
        return ["--pretrained", value]
    home = path.parent if path.suffix == ".bin" else path
    for folder in (home / "model", home):
        if (folder / "projector.safetensors").is_file():
            return ["--pretrained", str(folder)]
    return ["--pretrained", value]


def _trackers(value: str) -> list[str]:
    if value == "all":
        raise ConfigError("--report_to all (a flag of LLaVA's scripts): name the trackers, --report_to tensorboard, or none")
    return ["--run.trackers", "" if value == "none" else value]


SPECIAL: dict[str, Callable[[str], list[str]]] = {
    "vision_tower": _tower, "pretrain_mm_mlp_adapter": _pretrained, "report_to": _trackers,
}  # fmt: skip

Together = tuple[list[str], list[str]]


def _recipe(words: Sequence[str]) -> dict[str, object]:
    """The top level of the recipes on the command line."""
    names = [after for word, after in pairwise([*words, ""]) if word == "--recipe"]
    names += [word.partition("=")[2] for word in words if word.startswith("--recipe=")]
    merged: dict[str, object] = {}
    for name in names:
        for _, data in read_recipe(find_recipe(name, RECIPES)):
            merged.update(data)
    return merged


def _stage_of(given: Mapping[str, str], words: Sequence[str]) -> int:
    if "tune_mm_mlp_adapter" in given:
        return 1 if given["tune_mm_mlp_adapter"].lower() == "true" else 2
    for word, after in pairwise([*words, ""]):
        if word == "--stage" or word.startswith("--stage="):
            return int((word.partition("=")[2] or after) == "2") + 1
    return 2 if _recipe(words).get("stage", 2 if "model_name_or_path" in given else 1) == 2 else 1


def _stage(given: Mapping[str, str], ours: set[str], words: Sequence[str]) -> Together:
    """Without tune_mm_mlp_adapter LLaVA trains the LLM too."""
    said = {"tune_mm_mlp_adapter", "stage"} & {*given, *ours} or "stage" in _recipe(words)
    return ([], []) if said or "model_name_or_path" not in given else (["--stage", "2"], [])


def _precision(given: Mapping[str, str], ours: set[str], words: Sequence[str]) -> Together:
    on = [name for name in ("bf16", "fp16") if given.get(name, "").lower() == "true"]
    if len(on) == 2:
        raise ConfigError("--bf16 True and --fp16 True (flags of LLaVA's scripts) contradict each other: leave one out")
    if not {"bf16", "fp16"} & set(given):
        return [], []
    return ["--run.precision", on[0] if on else "fp32", "--weights", "bf16" if on == ["bf16"] else "fp32"], []


def _lora(given: Mapping[str, str], ours: set[str], words: Sequence[str]) -> Together:
    """lora_r counts only with lora_enable, bits only with LoRA."""
    rank, bits = given.get("lora_r"), given.get("bits", "16")
    if bits not in ("4", "16", "32"):
        raise ConfigError(f"--bits {bits} (a flag of LLaVA's scripts) has no counterpart here: 4 (QLoRA) or 16 is right")
    found = ["--lora.quantize", given.get("quant_type", "nf4")] if bits == "4" else []
    if given.get("lora_enable", "False").lower() != "true":
        if found:
            raise ConfigError("--bits 4 trains adapters on a frozen LLM: add --lora_enable True --lora_r 64 --lora_alpha 16 (QLoRA's own)")
        return (["--lora.rank", "0"] if "lora_enable" in given else []), (
            [f"--lora_r {rank} does not count without --lora_enable True"] if rank else []
        )
    known = _recipe(words).get("lora")
    if rank is None and "lora.rank" not in ours and not (isinstance(known, dict) and known.get("rank")):
        raise ConfigError("--lora_enable True without --lora_r: LLaVA would take rank 64 (alpha 16); say --lora_r 128 --lora_alpha 256")
    return [*found, *(["--lora.rank", rank] if rank else [])], []


def _rates(given: Mapping[str, str], ours: set[str], words: Sequence[str]) -> Together:
    """One learning_rate there, two here: of the projector in stage 1; of the LLM, and by default of the projector, in stage 2."""
    rate = given.get("learning_rate")
    if rate is None:
        return [], []
    if _stage_of(given, words) == 1:
        return ([] if "mm_projector_lr" in given else ["--projector_lr", rate]), []
    if {"mm_projector_lr", "freeze_mm_mlp_adapter"} & set(given) or "projector_lr" in ours or "projector_lr" in _recipe(words):
        return ["--lr", rate], []
    return ["--lr", rate, "--projector_lr", rate], [f"no --mm_projector_lr: the projector's is {rate} too, as LLaVA has it"]


def _training_length(given: Mapping[str, str], ours: set[str], words: Sequence[str]) -> Together:
    """Epochs on the command line count, whatever steps a recipe has."""
    said = "max_steps" in given or {"steps", "run.steps"} & ours
    return (["--run.steps", "0"] if "num_train_epochs" in given and not said else []), []


def _defaults(given: Mapping[str, str], ours: set[str], words: Sequence[str]) -> Together:
    """Say where LLaVA's default is another one; not for somebody who took a recipe and one or two of its flags."""
    if "model_name_or_path" not in given or any(word.startswith("--recipe") for word in words):
        return [], []
    left = [
        f"no --{name}: LLaVA's default is {theirs}; here {setting} is in force (--help shows its default)"
        for name, (theirs, setting) in SURPRISING.items()
        if name not in given and setting not in ours and setting.rsplit(".", 1)[-1] not in ours
    ]
    return [], left


def _deepspeed_file(words: list[str]) -> tuple[list[str], list[str]]:
    """A DeepSpeed file of LLaVA's that is not there, or a bare name, is the one of that name in our recipes."""
    remarks: list[str] = []
    found = list(words)
    for place, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name not in ("--deepspeed", "--run.deepspeed"):
            continue
        value = value if equals else (words[place + 1] if place + 1 < len(words) else "")
        if Path(value).stem not in BLOCKS or Path(value).exists():
            continue
        own = str(RECIPES / f"{Path(value).stem}.json")
        found[place if equals else place + 1] = f"{name}={own}" if equals else own
        if value not in BLOCKS:
            remarks.append(f"there is no file {value}; {own} is taken")
    return found, remarks
