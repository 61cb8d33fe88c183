"""ViSFT: heads learn COCO's tasks on a frozen encoder, then LoRA in the encoder learns the same tasks under the frozen heads.

    python encoders/train_visft.py --recipe mini_visft_detection --output_dir runs/detection
    python encoders/train_visft.py --recipe mini_visft_lora --heads runs/detection/head,runs/segmentation/head,runs/caption/head --output_dir runs/visft
    torchrun --nproc_per_node 8 encoders/train_visft.py --recipe visft_lora_g --encoder EVA_G --heads ... --output_dir runs/visft_g

Stage 1 (`--stage heads --task ...`) trains one head and leaves RUN/head; the three can run side by side. Where each picture is laid out in one
or a few ways only, the encoder's features are computed once and read from then on (`data.feature_cache`). Stage 2 (`--stage lora`) draws
one task for each step, and trains the adapter's A and B alone. It leaves RUN/adapter and RUN/encoder, an ordinary encoder folder with the
adapter merged in. Both write RUN/held_out.jsonl: each task's loss on images that are not trained on, batch by batch.

`--permute_annotations` is the control: the same pictures, steps and heads, with annotations that belong to other pictures.

Source: Supervised Fine-tuning in turn Improves Visual Foundation Models (ViSFT), sections 3 and 4, and its code. Departures: heads sleep in
stage 2 (theirs drop out), CLS stays and pictures are normalised as the tower's were; three flags bring theirs back.
"""

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # started as a file: its folder is on sys.path, the packages' folder is not
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from torch import Tensor, nn

from encoders.catalog import describe, load_encoder
from encoders.head_scores import predict_rows, score_text, score_with_intervals
from encoders.heads.base import Head, StepCounts, Terms
from encoders.heads.registry import save_head
from encoders.lora import LoraAdapter, LoraSettings, add_lora
from encoders.modeling import VisionEncoder
from encoders.text_folder import IN_THIS_FOLDER, TEXT_FOLDER
from encoders.visft_features import FeatureMaps, TaskData, fill
from encoders.visft_held_out import HeldOut
from encoders.visft_mixture import TaskCounts, TaskMixture, collate_items, collate_units
from encoders.visft_parts import (
    all_data,
    base_dtype,
    check_classes,
    feature_maps,
    left_out,
    new_head,
    open_encoder,
    open_heads,
    open_set,
    task_data,
)
from encoders.visft_settings import VisftConfig
from mmkit.checkpoint import atomic_folder, atomic_write
from mmkit.config import cli_entry, load_config
from mmkit.errors import ConfigError
from mmkit.optim import cosine_schedule, param_groups
from mmkit.ranks import gather
from mmkit.run import Run
from mmkit.trainable import freeze, trainable_table, weights_hash

RECIPES = Path(__file__).parent / "recipes"


def one(_: Any) -> float:
    """Let each micro-batch weigh the same: its loss is divided by the whole step's counts already (`encoders.heads.base`)."""
    return 1.0


def schedule(run: Run, config: VisftConfig, data: Any) -> None:
    """Set the cosine, which may be longer than the run: the paper's 5k-step model is the beginning of one of 100k."""
    run.set_schedule(cosine_schedule(config.schedule_steps or run.plan(data), config.warmup))


# ---- stage 1: a head on the frozen encoder ---------------------------------------------------------------------------------------------


def train_head(config: VisftConfig) -> Path:
    """Train one head, and give the run folder."""
    task = config.task
    sets = {held_out: open_set(config, [task], held_out) for held_out in (False, True)}  # before anything is written
    encoder = freeze(open_encoder(config))
    digest = weights_hash(encoder)
    head = new_head(config, encoder, sets[False])
    check_classes({task: head}, sets[True], config.files(held_out=True))
    maps, canvas = feature_maps(config, encoder, head), config.of(task).canvas or encoder.spec.size
    maps.grid(canvas)
    run = Run(config.run, name=f"visft {task}", settings=config)
    encoder.to(run.device, base_dtype(config))
    found = {held_out: task_data(config, task, sets[held_out], encoder, canvas, head, held_out, run.folder) for held_out in sets}
    data, held_out = found[False], HeldOut({task: found[True]}, config.data.held_out_batch, run.folder, run.rank, run.world_size)
    if config.data.feature_cache:
        key = maps.key(canvas, config.run.precision, config.data.feature_dtype)
        for part, rebuild in ((data, config.data.rebuild_cache), (found[True], False)):
            fill(config.data.feature_cache, part, maps, key, run.device, config.data.held_out_batch, rebuild)
    run.print(f"{sets[False].describe()}\nheld out: {sets[True].describe()}\nencoder: {describe(encoder)}; canvas {canvas} px")
    run.print(trainable_table(head, {"head": head, "encoder": encoder}, {"encoder": encoder.config.origin}))

    optimizer = torch.optim.AdamW(param_groups(head, config.lr, config.weight_decay), lr=config.lr)
    model, optimizer = run.prepare(head, optimizer)
    schedule(run, config, data)
    run.keep("held_out", held_out)
    held_out.begin(run.step)

    def loss_of(_: str, batch: dict[str, Any]) -> tuple[Tensor, Mapping[str, Tensor]]:
        with run.accelerator.autocast():
            found: tuple[Tensor, Mapping[str, Tensor]] = head.eval()(features_of(batch, maps), batch["targets"])
        return found

    if run.step == 0:
        say(run, "untrained", held_out.measure(0, loss_of, run.device))
        score_head(run, config, "untrained", head, maps, found[True])
    totals = StepCounts(lambda batch: head.counts(batch["targets"]))
    head.train()
    for batch in run.batches(data, collate_items, weigh=one, look_ahead=totals):
        features = features_of(batch, maps)  # [B, C, h, w], without gradient
        loss, terms = model(features, batch["targets"], totals.mean)
        run.backward(loss, **terms)
        run.log(**terms)
        if run.updated and due(run, config):
            say(run, f"step {run.step + 1}", held_out.measure(run.step + 1, loss_of, run.device))
            head.train()

    say(run, f"after {run.step} steps", held_out.measure(run.step, loss_of, run.device))
    score_head(run, config, "trained", head, maps, found[True])
    if run.is_main:
        origin = f"ViSFT stage 1, {run.step} steps behind {config.encoder}"
        about = {"encoder": config.encoder, "encoder_hash": digest, "canvas": canvas, "step": run.step}
        about |= {"drop_cls": config.drop_cls, "imagenet_norm": config.imagenet_norm}
        save_head(head, run.folder / "head", origin, overwrite=True, **about)
    return finish(run, {task: data})


@torch.no_grad()
def features_of(batch: Mapping[str, Any], maps: FeatureMaps) -> Tensor:
    """Give the maps [B, C, h, w] of a batch: as they were cached, or computed."""
    cached: Tensor | None = batch.get("features")
    return maps(batch["pixels"]) if cached is None else cached


def score_head(run: Run, config: VisftConfig, when: str, head: Head, maps: FeatureMaps, data: TaskData) -> None:
    """Print and write down what a head is worth on some held-out images: AP, or CIDEr of captions it writes. The others wait for the first."""
    if config.scored_images and run.is_main:
        path, task = run.folder / "scores.json", config.task
        rows = predict_rows(head.eval(), maps, data, range(min(config.scored_images, len(data))), run.device, config.data.held_out_batch)
        scores = score_with_intervals(task, rows, data.data.coco)
        before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"task": task}
        atomic_write(path, json.dumps({**before, when: scores}, indent=1) + "\n")
        run.print(f"held-out, {when}, {len(rows)} images: {score_text(task, {name: row['value'] for name, row in scores.items()})}")
    gather(None)


def due(run: Run, config: VisftConfig) -> bool:
    """Say whether held-out losses are to be measured behind this step; behind the last one they are anyway."""
    step = run.step + 1  # Run counts it when the loop goes on
    return bool(config.eval_every) and step % config.eval_every == 0 and step < run.steps


def say(run: Run, when: str, losses: Mapping[str, float]) -> None:
    """Print held-out losses."""
    run.print(f"held-out loss, {when}: " + ", ".join(f"{task} {loss:.4f}" for task, loss in losses.items()))


def finish(run: Run, data: Mapping[str, TaskData]) -> Path:
    """Say what was left out, and end the run."""
    if bad := left_out(data):
        run.print(bad)
    return run.finish()


# ---- stage 2: LoRA under the frozen heads ----------------------------------------------------------------------------------------------


class Tuned(nn.Module):
    """An encoder with an adapter in it, under its heads.

    Args:
        encoder: With LoRA.
        heads: By task.
        maps: What feeds each head.
        checkpointing: Tasks that compute the encoder's activations again.
    """

    def __init__(self, encoder: VisionEncoder, heads: Mapping[str, Head], maps: Mapping[str, FeatureMaps], checkpointing: set[str]) -> None:
        super().__init__()
        self.encoder, self.heads = encoder, nn.ModuleDict(dict(heads))
        self.maps, self.checkpointing = dict(maps), checkpointing

    def forward(
        self, task: str, pixels: Tensor, targets: Sequence[Mapping[str, Tensor]], counts: Mapping[str, float] | None
    ) -> tuple[Tensor, Terms]:
        """Give a task's loss [] and its terms for canvases uint8 [B, 3, S, S]."""
        self.encoder.network.set_grad_checkpointing(task in self.checkpointing and torch.is_grad_enabled())
        found: tuple[Tensor, Terms] = self.heads[task](self.maps[task](pixels), targets, counts)
        return found


def train_lora(config: VisftConfig) -> Path:
    """Train the adapter, and give the run folder."""
    encoder = freeze(open_encoder(config))
    heads, canvases = open_heads(config, encoder)
    tasks = list(heads)
    sets = {held_out: open_set(config, tasks, held_out) for held_out in (False, True)}
    for held_out, coco in sets.items():
        check_classes(heads, coco, config.files(held_out))
    maps = {task: feature_maps(config, encoder, heads[task]) for task in tasks}
    for task in tasks:
        maps[task].grid(canvases[task])
    if not config.run.steps:
        raise ConfigError("run.steps is 0; --stage lora draws a task for each step: say how many steps there are")
    run = Run(config.run, name="visft lora", settings=config)
    encoder.to(base_dtype(config))
    adapter = add_lora(encoder, lora_settings(config), seed=config.run.seed)
    encoder.to(run.device)
    found = {side: all_data(config, coco, encoder, canvases, heads, side, run.folder) for side, coco in sets.items()}
    held = HeldOut(found[True], config.data.held_out_batch, run.folder, run.rank, run.world_size)
    for head in heads.values():
        set_head(head.to(run.device), config)
    model = Tuned(encoder, heads, maps, {task for task in tasks if config.of(task).checkpointing})
    adapter.check(torch.randn(2, 3, encoder.spec.size, encoder.spec.size, device=run.device))

    run.print("\n".join([sets[False].describe(), "held out: " + sets[True].describe(), "encoder: " + describe(encoder)]))
    run.print(trainable_table(model, {**heads, "encoder": encoder}, {"encoder": encoder.config.origin, **dict.fromkeys(tasks, "stage 1")}))
    wrapped, _ = run.prepare(model, optimizer_of(config, adapter, model))
    mixture = mix_tasks(config, run, found[False])
    schedule(run, config, mixture)
    run.keep("held_out", held)
    held.begin(run.step)

    def loss_of(task: str, batch: dict[str, Any]) -> tuple[Tensor, Mapping[str, Tensor]]:
        for head in heads.values():
            head.eval()
        with run.accelerator.autocast():
            return model(task, batch["pixels"], batch["targets"], None)

    def look(when: str, step: int) -> None:
        say(run, when, held.measure(step, loss_of, run.device, change=adapter.change()))
        for head in heads.values():
            set_head(head, config)

    if run.step == 0:
        look("before", 0)
    counts = TaskCounts(heads)
    for batch in run.batches(mixture, collate_units, weigh=one, look_ahead=counts):
        task = batch["task"]
        loss, terms = wrapped(task, batch["pixels"], batch["targets"], counts.of(task))
        named = {f"{task}/{name}": value for name, value in {**terms, "loss": loss}.items()}
        run.backward(loss / held.first[task] if config.divide_losses else loss, **named)
        run.log(**named)
        if run.updated:
            if due(run, config):
                look(f"step {run.step + 1}", run.step + 1)
            if config.lora.save_every and (run.step + 1) % config.lora.save_every == 0 and run.is_main:
                adapter.save(run.folder / "adapters" / f"step_{run.step + 1:08d}", step=run.step + 1, heads=config.heads)

    look(f"after {run.step} steps", run.step)
    if run.is_main:
        export(config, run, adapter)
    return finish(run, found[False])


def mix_tasks(config: VisftConfig, run: Run, data: Mapping[str, TaskData]) -> TaskMixture:
    """Let each step, or each micro-batch, have a task."""
    return TaskMixture(
        data,
        {task: config.of(task).weight for task in data},
        {task: config.of(task).images for task in data},
        steps=config.run.steps,
        chunk=run.layout.global_batch_size if config.mix == "step" else run.layout.micro * run.layout.ranks,
        global_batch_size=run.layout.global_batch_size,
        seed=config.run.seed,
    )


def optimizer_of(config: VisftConfig, adapter: LoraAdapter, model: Tuned) -> torch.optim.Optimizer:
    """Give AdamW over A and B, and over the heads if they are to be trained along."""
    groups = [{"params": list(adapter.parameters()), "lr": config.lr, "weight_decay": config.weight_decay, "name": "LoRA"}]
    if config.head_lr:
        groups += param_groups(model.heads, config.lr * config.head_lr, config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.lr)


def set_head(head: Head, config: VisftConfig) -> None:
    """Freeze a head and put it to sleep, unless the settings want it trained or awake."""
    head.requires_grad_(config.head_lr > 0)
    head.train(config.heads_awake)


def export(config: VisftConfig, run: Run, adapter: LoraAdapter) -> None:
    """Write RUN/adapter, and RUN/encoder: the source with the adapter merged in, in the source's own types, whatever was trained in."""
    adapter.save(run.folder / "adapter", step=run.step, heads=config.heads)
    encoder = load_encoder(config.encoder)
    copy = add_lora(encoder, lora_settings(config), seed=config.run.seed)
    copy.load(adapter.state())
    copy.merge()
    encoder.config.origin = f"ViSFT, {run.step} steps on {config.encoder}"
    encoder.config.training = {
        **(encoder.config.training or {}),
        "objective": "visft",
        "step": run.step,
        "lora_rank": config.lora.rank,
        "lora_alpha": config.lora.alpha,
    }
    own_text = Path(config.encoder) / TEXT_FOLDER  # zero-shot before and after: the text side comes along
    if own_text.is_dir():
        encoder.config.text_tower = IN_THIS_FOLDER
    with atomic_folder(run.folder / "encoder", overwrite=True) as folder:
        encoder.save_pretrained(str(folder))
        if own_text.is_dir():
            shutil.copytree(own_text, folder / TEXT_FOLDER)
        encoder.spec.image_processor().save_pretrained(str(folder))


def lora_settings(config: VisftConfig) -> LoraSettings:
    """Give the adapter's settings."""
    return LoraSettings(rank=config.lora.rank, alpha=config.lora.alpha)


def main(argv: Sequence[str] | None = None) -> Path:
    """Train, and give the run folder."""
    config = load_config(VisftConfig, argv, recipe_dir=RECIPES)
    return train_head(config) if config.stage == "heads" else train_lora(config)


if __name__ == "__main__":
    cli_entry(main)
