"""LLaVA's stage 2 with mmkit, with transformers' Trainer and with TRL's SFTTrainer: supervised tokens a second, and peak memory.

    mmkit data mini --out runs/data --scene_drawings 80
    OMP_NUM_THREADS=1 python benchmarks/llava_step.py --data runs/data                          # mini-llm, all of it trained
    OMP_NUM_THREADS=1 python benchmarks/llava_step.py --data runs/data --llm smollm2 --lora 16

Every side trains the same rows once, from the same weights, with the same micro-batches, accumulation and optimizer; each run is a process of
its own, and the sides take turns. A fifth of the rows is text alone; rounds per row fall off as in a geometric series. First every side sums
the loss of the answers' tokens over all rows at the start weights: the sums must agree, or nothing is measured.

mmkit       train_llava with packing (--pack false: grouped by length instead)
trainer     transformers.Trainer, padded on the right, logits at every position
trl         SFTTrainer, grouped by length, and on this CPU too the compact head that it uses on CUDA (elsewhere it scores every position)

Time is from the end of the first step to the end of the last; on one thread it is the process's own CPU time, which other programs do not
stretch. Peak is that of the whole process, libraries included, with MALLOC_MMAP_THRESHOLD_=1048576, without which freed blocks stay with it.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SIDES = ("mmkit", "trainer", "trl")
GOAL_SPEED, GOAL_MEMORY = 1.5, 0.6
TEXT_ONLY, MORE_ROUNDS, MOST_ROUNDS = 0.2, 0.6, 12


def main() -> None:
    """Write the rows, check the sums, take turns, print medians and ratios."""
    flags = read_flags()
    if flags.side:
        print(json.dumps(measure(flags.side, flags, Path(flags.work)) if flags.rounds else loss_sum(flags.side, flags, Path(flags.work))))
        return
    with tempfile.TemporaryDirectory(prefix="llava_step_") as work:
        (Path(work) / "rows.json").write_text(json.dumps(make_rows(Path(flags.data), flags.rows, flags.seed)), encoding="utf-8")
        check_equal({side: in_a_process(side, flags, work, rounds=0) for side in flags.sides})
        found: dict[str, list[dict[str, float]]] = {side: [] for side in flags.sides}
        for number in range(flags.rounds):
            for side in flags.sides[number % len(flags.sides) :] + flags.sides[: number % len(flags.sides)]:
                row = in_a_process(side, flags, work, rounds=1)
                found[side].append(row)
                print(f"round {number + 1}, {side}: " + line(row), flush=True)
    report(found, flags)


def read_flags() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="runs/quickstart/data", help="folder of `mmkit data mini`")
    parser.add_argument("--encoder", default="mini-clip")
    parser.add_argument("--llm", default="mini-llm", help="mini-llm, smollm2, or any name or folder")
    parser.add_argument("--lora", type=int, default=0, help="rank; 0 trains the whole LLM")
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--micro_batch_size", type=int, default=8)
    parser.add_argument("--accumulation", type=int, default=2)
    parser.add_argument("--pack", default="true", choices=["true", "false"], help="mmkit's side: pack, or group by length")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sides", default=list(SIDES), type=lambda text: text.split(","), help="some of mmkit,trainer,trl")
    parser.add_argument("--side", choices=SIDES, help="run one side in this process and print its figures (what the rounds call)")
    parser.add_argument("--work", default="", help="folder with rows.json (what the rounds give)")
    return parser.parse_args()


def make_rows(data: Path, count: int, seed: int) -> list[dict[str, Any]]:
    """Rows of LLaVA JSON out of the embedded instruction data, with a length mix as in real sets: many short ones, a long tail."""
    import random

    random_ = random.Random(seed)
    rows = json.loads((data / "llava" / "instruct.json").read_text(encoding="utf-8"))
    pictured = [row for row in rows if row.get("image")]
    texts = [row["conversations"] for row in rows if not row.get("image")]
    if not pictured or not texts:
        raise SystemExit(f"{data}/llava/instruct.json has no rows with or none without a picture; `mmkit data mini` writes both")
    made = []
    for number in range(count):
        only_text = random_.random() < TEXT_ONLY
        row = {} if only_text else {"image": random_.choice(pictured)["image"]}
        turns = list(random_.choice(texts)) if only_text else list(next(r for r in [random_.choice(pictured)])["conversations"])
        while random_.random() < MORE_ROUNDS and len(turns) < 2 * MOST_ROUNDS:
            turns += random_.choice(texts)
        made.append({"id": str(number), **row, "conversations": turns})
    return made


# -- sides -----------------------------------------------------------------------------------------------------------------------------


def settings_of(flags: argparse.Namespace, work: Path, out: str) -> list[str]:
    """Flags of train_llava, which builds the model for all sides."""
    pack = ["--data.pack", "true"] if flags.pack == "true" else ["--run.group_by_length", "8"]
    return [
        "--stage", "2", "--encoder", flags.encoder, "--llm", flags.llm, "--feature_layer", "-1", "--select", "full", "--template", "own",
        "--lr", "1e-4", "--projector_lr", "1e-4", "--lora.rank", str(flags.lora), "--data.json", str(work / "rows.json"),
        "--data.images", str(Path(flags.data) / "images"), "--data.check", "false", "--check_saving", "false", *pack,
        "--run.output_dir", out, "--run.micro_batch_size", str(flags.micro_batch_size),
        "--run.gradient_accumulation_steps", str(flags.accumulation), "--run.epochs", "1", "--run.log_every", "1",
        "--run.seed", str(flags.seed),
    ]  # fmt: skip


def build(flags: argparse.Namespace, work: Path) -> tuple[Any, Any, Any]:
    """The model in training form, its parts, and the rows as examples: the same for all sides."""
    from llm_stage.llava import set_stage
    from llm_stage.llava_settings import LlavaSettings
    from llm_stage.train_llava import assemble, make_dataset
    from llm_stage.tuning import add_lora
    from mmkit.config import load_config

    settings = load_config(LlavaSettings, settings_of(flags, work, str(work / "unused")))
    parts = assemble(settings)
    dataset = make_dataset(settings, parts)
    model: Any = parts.model
    set_stage(model, train_llm=True)
    if flags.lora:
        model = add_lora(model, settings.lora, settings.run.seed)
    return model, parts, dataset


class Padded:
    """A collator: indices to a batch padded on the right; counts what it padded."""

    def __init__(self, dataset: Any, parts: Any) -> None:
        self.dataset, self.parts = dataset, parts
        self.real = self.all = 0

    def __call__(self, rows: list[dict[str, int]]) -> dict[str, Any]:
        from llm_stage.conversations import collate

        config = self.parts.model.config
        items = [self.dataset[row["index"]] for row in rows]
        batch = collate(items, self.parts.processor.tokenizer.pad_token_id, config.image_token_id, config.image_seq_length)
        self.real, self.all = self.real + int(batch["attention_mask"].sum()), self.all + batch["input_ids"].numel()
        return {name: value for name, value in batch.items() if value is not None}


def make_trainer(side: str, flags: argparse.Namespace, work: Path) -> tuple[Any, Padded]:
    """transformers' Trainer, or TRL's at its best for this machine."""
    from datasets import Dataset

    model, parts, dataset = build(flags, work)
    collator = Padded(dataset, parts)
    rows = Dataset.from_dict({"index": list(range(len(dataset))), "length": dataset.lengths})
    common: dict[str, Any] = {
        "output_dir": str(work / f"{side}_out"), "per_device_train_batch_size": flags.micro_batch_size,
        "gradient_accumulation_steps": flags.accumulation, "num_train_epochs": 1, "learning_rate": 1e-4, "weight_decay": 0.0,
        "max_grad_norm": 1.0, "lr_scheduler_type": "cosine", "logging_steps": 10, "report_to": "none", "save_strategy": "no",
        "use_cpu": True, "remove_unused_columns": False, "disable_tqdm": True, "seed": flags.seed, "optim": "adamw_torch", "bf16": False,
        "gradient_checkpointing": False,
    }  # fmt: skip
    if side == "trainer":
        from transformers import Trainer, TrainingArguments

        return Trainer(model=model, args=TrainingArguments(**common), train_dataset=rows, data_collator=collator), collator
    from trl import SFTConfig, SFTTrainer
    from trl.trainer import utils

    utils._use_triton = lambda device: True  # the choice of positions alone; the kernels ask elsewhere what they run on
    args = SFTConfig(
        **common, max_length=None, train_sampling_strategy="group_by_length", length_column_name="length",
        dataset_kwargs={"skip_prepare_dataset": True},
    )  # fmt: skip
    trainer = SFTTrainer(model=model, args=args, train_dataset=rows, data_collator=collator, processing_class=parts.processor)
    return trainer, collator


def measure(side: str, flags: argparse.Namespace, work: Path) -> dict[str, float]:
    """Train once over the rows; seconds of all steps but the first, scaled to all, and the process's peak."""
    clock = time.process_time if os.environ.get("OMP_NUM_THREADS") == "1" else time.perf_counter
    ends: list[float] = []
    padding = train_mmkit(flags, work, clock, ends) if side == "mmkit" else train_other(side, flags, work, clock, ends)
    seconds = (ends[-1] - ends[0]) * len(ends) / (len(ends) - 1)
    tokens = supervised(flags, work)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": seconds, "tokens_per_second": tokens / seconds, "peak_mb": peak, "padding": padding, "steps": len(ends)}


def train_mmkit(flags: argparse.Namespace, work: Path, clock: Callable[[], float], ends: list[float]) -> float:
    """Our side, through its front door; the end of each step is noted where the run writes its line."""
    from llm_stage import train_llava
    from mmkit.run import Run

    write = Run._write_row

    def noted(self: Run) -> None:
        write(self)
        ends.append(clock())

    Run._write_row = noted  # type: ignore[method-assign]
    out = work / "mmkit_run"
    shutil.rmtree(out, ignore_errors=True)
    train_llava.main(settings_of(flags, work, str(out)))
    rows = [json.loads(text) for text in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return statistics.mean(row["padding"] for row in rows if "padding" in row)


def train_other(side: str, flags: argparse.Namespace, work: Path, clock: Callable[[], float], ends: list[float]) -> float:
    """The others' side."""
    from transformers import TrainerCallback

    class Ends(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            ends.append(clock())

    trainer, collator = make_trainer(side, flags, work)
    trainer.add_callback(Ends())
    trainer.train()
    return 1 - collator.real / collator.all


def supervised(flags: argparse.Namespace, work: Path) -> int:
    """Tokens that are predicted, over all rows; counted once, by the first process that asks."""
    path = work / "supervised.txt"
    if not path.is_file():
        _, _, dataset = build(flags, work)
        path.write_text(str(sum(sum(label != -100 for label in dataset[i]["labels"][1:]) for i in range(len(dataset)))))
    return int(path.read_text())


def loss_sum(side: str, flags: argparse.Namespace, work: Path) -> dict[str, float]:
    """The loss at the start weights, summed over the answers' tokens of all rows, by a side's own loss."""
    import torch

    supervised(flags, work)
    with torch.no_grad():
        return {"loss": sum(mmkit_losses(flags, work) if side == "mmkit" else other_losses(side, flags, work))}


def mmkit_losses(flags: argparse.Namespace, work: Path) -> Iterator[float]:
    from llm_stage.llava import supervised_loss
    from llm_stage.packing import row_budget
    from llm_stage.train_llava import make_batch

    model, parts, dataset = build(flags, work)
    budget = row_budget(parts.model.model.language_model, 2048) if flags.pack == "true" else 0
    for start in range(0, len(dataset), flags.micro_batch_size):
        items = [dataset[i] for i in range(start, min(start + flags.micro_batch_size, len(dataset)))]
        loss, count = supervised_loss(model, make_batch(items, parts, budget))
        yield float(loss) * count


def other_losses(side: str, flags: argparse.Namespace, work: Path) -> Iterator[float]:
    trainer, _ = make_trainer(side, flags, work)
    for batch in trainer.get_train_dataloader():
        count = int((batch["labels"][:, 1:] != -100).sum())
        yield float(trainer.compute_loss(trainer.model, batch)) * count


# -- together --------------------------------------------------------------------------------------------------------------------------


def in_a_process(side: str, flags: argparse.Namespace, work: str, rounds: int) -> dict[str, float]:
    """One measurement (or, with no rounds, one sum of losses) in a process of its own."""
    passed = ["data", "encoder", "llm", "lora", "rows", "micro_batch_size", "accumulation", "pack", "seed"]
    words = [word for name in passed for word in (f"--{name}", str(getattr(flags, name)))]
    command = [sys.executable, __file__, *words, "--side", side, "--work", work, "--rounds", str(rounds)]
    environment = {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE", **os.environ, "MALLOC_MMAP_THRESHOLD_": "1048576"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    result: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def check_equal(sums: dict[str, dict[str, float]]) -> None:
    """Refuse to compare sides that do not learn the same."""
    print("summed loss at the start: " + ", ".join(f"{side} {row['loss']:.4f}" for side, row in sums.items()), flush=True)
    values = [row["loss"] for row in sums.values()]
    if max(values) - min(values) > 1e-4 * max(values):
        raise SystemExit("the sides do not sum the same losses: nothing is measured")


def line(row: dict[str, float]) -> str:
    """One row's figures."""
    return f"{row['tokens_per_second']:7.1f} supervised tokens/s, peak {row['peak_mb']:.0f} MB, padding {100 * row['padding']:.1f} %"


def report(found: dict[str, list[dict[str, float]]], flags: argparse.Namespace) -> None:
    """Medians, and the ratios beside their goals."""
    medians = {side: {key: statistics.median(row[key] for row in rows) for key in rows[0]} for side, rows in found.items()}
    what = f"LoRA rank {flags.lora}" if flags.lora else "all of the LLM"
    print(
        f"\n{flags.encoder} + {flags.llm}, {what}, {flags.rows} rows, {flags.micro_batch_size} x {flags.accumulation}, {flags.rounds} rounds"
    )
    for side, row in medians.items():
        print(f"  {side:<8} {line(row)}")
    for side in [side for side in flags.sides if side != "mmkit" and "mmkit" in medians]:
        speed = medians["mmkit"]["tokens_per_second"] / medians[side]["tokens_per_second"]
        memory = medians["mmkit"]["peak_mb"] / medians[side]["peak_mb"]
        print(f"  mmkit / {side}: {speed:.2f}x the tokens (goal {GOAL_SPEED}), {memory:.2f}x the memory (goal {GOAL_MEMORY})")


if __name__ == "__main__":
    main()
