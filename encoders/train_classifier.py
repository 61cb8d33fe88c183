"""Fine-tuning an encoder to classify (FT-CLIP): layer-wise lr decay, an average of the weights, weak augmentation, no mixup.

    python encoders/train_classifier.py --recipe mini_ftclip --data.train DATA/classification/train --data.test DATA/classification/test \\
        --output_dir runs/ft
    torchrun --nproc_per_node 8 encoders/train_classifier.py --recipe ftclip_b16_224 --data.train IN1K/train --data.test IN1K/val \\
        --output_dir runs/ft_b16

Fine-tunes all of an encoder, its last blocks, or a head alone (`--network.train_blocks 0`: linear probe), or trains the same network from
random weights (`--network.scratch`). The run folder then holds `classifier/` (a timm checkpoint with its head), `encoder/` (an encoder
folder without it), `curve.jsonl` (held-out accuracy by epoch) and, with `--data.test`, `test/summary.json`.

Source: CLIP Itself is a Strong Fine-tuner (FT-CLIP). Departure: the published figures are the best epoch of the average *on the test set*;
here the best epoch is chosen on a held-out part of the training images, and the last epoch's figures stand beside it.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

if __package__ in (None, ""):  # started as a file: its folder is on sys.path, the packages' folder is not
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from timm.data import Mixup
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import default_collate

from encoders.class_folders import (
    AugmentConfig,
    ClassFolders,
    LabelledImages,
    describe_classes,
    hold_out,
    match_classes,
    only_classes,
    read_class_folders,
    spread,
)
from encoders.classifier import Classifier, NetworkConfig, build_classifier, export_encoder, fresh_network, save_classifier
from encoders.classifier_scores import Curve, Loading, Row, answers, classify, metrics_of, relative_root
from mmkit.checkpoint import atomic_folder, atomic_write
from mmkit.config import cli_entry, load_config
from mmkit.errors import ConfigError, DataError
from mmkit.optim import cosine_schedule, make_ema, param_groups
from mmkit.run import Run, RunConfig
from mmkit.trainable import trainable_table

RECIPES = Path(__file__).parent / "recipes"
CLASS_FILE = "class_names.json"
Weights = Literal["auto", "best_ema", "last_ema", "best_raw", "last_raw"]


@dataclass
class DataConfig:
    """What is learnt and what is tested; both have one folder of images a class."""

    train: str = field(default="", metadata={"help": "folder of class folders"})
    test: str = field(default="", metadata={"help": "folder of the same class folders, looked at once, after training; empty for no test"})
    test_subset: bool = field(default=False, metadata={"help": "allow a test folder that lacks some classes (ImageNet-A, -R)"})
    held_out: float = field(default=0.02, metadata={"help": "share of the training images that epochs are compared on; 0 for none"})
    split_seed: int = field(default=0, metadata={"help": "of the held-out share; not the run's, so that seeds share their images"})
    max_classes: int = field(default=0, metadata={"help": "use this many classes, evenly spaced by name; 0 is all"})
    on_bad_sample: Literal["error", "skip"] = field(
        default="error", metadata={"help": "an unreadable image: stop, or leave it out, listed (tests: counted as missing)"}
    )
    cache: bool = field(default=False, metadata={"help": "keep decoded training images in memory: for small sets"})

    def validate(self) -> None:
        """Refuse missing folders and shares that are none."""
        if not self.train:
            raise ConfigError("data.train is empty; give a folder with one folder of images a class: --data.train FOLDER")
        if not 0 <= self.held_out < 1 or self.max_classes < 0:
            raise ConfigError(
                f"data.held_out {self.held_out}, max_classes {self.max_classes}: a share from 0 to below 1, and 0 or more, are right"
            )


@dataclass
class ClassifierConfig:
    """Settings of a fine-tuning (or linear probe, or training from scratch) for classification."""

    lr: float = field(default=6e-4, metadata={"help": "peak learning rate of norm and head; blocks below have it times layer_decay^k"})
    head_lr: float | None = field(default=None, metadata={"help": "peak learning rate of the head alone; none is lr (the paper's)"})
    layer_decay: float | None = field(default=0.6, metadata={"help": "lr factor from one block to the one below; none is 1"})
    final_lr: float = field(default=1e-6, metadata={"help": "learning rate that the cosine ends at, times the layer's factor"})
    warmup: float = field(default=0.2, metadata={"help": "steps, or share of all steps if below 1; rises from 0"})
    weight_decay: float = field(default=0.05, metadata={"help": "of matrices"})
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999], metadata={"help": "AdamW's"})
    eps: float = field(default=1e-8, metadata={"help": "AdamW's"})
    label_smoothing: float = field(default=0.1, metadata={"help": "share of the target spread evenly over all classes"})
    ema_decay: float = field(default=0.9998, metadata={"help": "of the average of the weights, updated after each step; 0 for none"})
    evaluate_every: float = field(default=1.0, metadata={"help": "epochs between evaluations on the held-out images"})
    weights: Weights = field(
        default="auto", metadata={"help": "which are exported and give the summary's headline; auto: best_ema, as far as there is one"}
    )
    benchmark: str = field(default="classification", metadata={"help": "name in the summary"})
    network: NetworkConfig = field(default_factory=NetworkConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    data: DataConfig = field(default_factory=DataConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def validate(self) -> None:
        """Refuse what means nothing, or contradicts itself."""
        if len(self.betas) != 2:
            raise ConfigError(f"betas is {self.betas}; AdamW has two, as in [0.9, 0.999]")
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise ConfigError(f"layer_decay is {self.layer_decay}; a factor in (0, 1] is right, or none")
        if (
            not 0 <= self.label_smoothing < 1
            or not 0 <= self.ema_decay < 1
            or self.evaluate_every <= 0
            or min(self.lr, self.head_lr or 1) <= 0
        ):
            raise ConfigError(
                f"label_smoothing {self.label_smoothing}, ema_decay {self.ema_decay}, evaluate_every {self.evaluate_every}, lr {self.lr}: "
                "two shares from 0 to below 1, and two numbers above 0, are right"
            )
        if (self.augment.mixup or self.augment.cutmix) and self.run.micro_batch_size % 2:
            raise ConfigError(f"run.micro_batch_size is {self.run.micro_batch_size}; mixup and cutmix pair its images: make it even")
        wants = [
            word for word, there in (("ema", self.ema_decay > 0), ("best", self.data.held_out > 0)) if word in self.weights and not there
        ]
        if wants:
            raise ConfigError(f"weights '{self.weights}' needs {'--ema_decay' if wants == ['ema'] else '--data.held_out'} above 0")

    @property
    def chosen(self) -> str:
        """The weights that are exported and give the headline."""
        best, average = self.data.held_out > 0, self.ema_decay > 0
        return f"{'best' if best else 'last'}_{'ema' if average else 'raw'}" if self.weights == "auto" else self.weights


@dataclass(frozen=True)
class Splits:
    """Training images, held-out training images (may be empty), test images or None."""

    train: ClassFolders
    held_out: ClassFolders
    test: ClassFolders | None


def read_splits(config: DataConfig) -> Splits:
    """Read the folders and hold some training images out.

    Raises:
        DataError: A folder is missing or empty, test and training are one folder, or their classes differ.
    """
    train = read_class_folders(config.train, "--data.train")
    test = None
    if config.test:
        test = read_class_folders(config.test, "--data.test")
        if test.root.resolve() == train.root.resolve():
            raise DataError(f"--data.test {test.root} is the training folder: its accuracy would say nothing; give another one")
        test = match_classes(train, test, config.test_subset)
    names = spread(train.names, config.max_classes)
    train, held_out = hold_out(only_classes(train, names), config.held_out, config.split_seed)
    return Splits(train, held_out, only_classes(test, names) if test is not None else None)


def classification_loss(logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """Cross entropy: (1 - s) * nll + s * mean over classes of -log p.

    Args:
        logits: [B, C].
        targets: Labels [B], or shares of each class [B, C] (mixup), which are smoothed already.
        smoothing: s.

    Returns:
        Mean over the batch [].
    """
    return F.cross_entropy(logits.float(), targets, label_smoothing=smoothing if targets.dim() == 1 else 0.0)


def mix(images: Tensor, labels: Tensor, mixup: Mixup | None) -> tuple[Tensor, Tensor]:
    """Mix the images of a micro-batch [B, 3, H, W] in pairs, if asked to; labels [B] become shares [B, C].

    An odd number is left where a bad sample was skipped: then one image is mixed with itself.
    """
    if mixup is None:
        return images, labels
    if len(images) % 2:
        mixed, targets = mixup(torch.cat([images, images[-1:]]), torch.cat([labels, labels[-1:]]))
        return mixed[:-1], targets[:-1]
    return mixup(images, labels)


class Watch:
    """Compares the epochs on the held-out images, while the training goes on."""

    def __init__(self, config: ClassifierConfig, run: Run, classifier: Classifier, splits: Splits, ema: Any) -> None:
        self.config, self.run, self.classifier, self.splits, self.ema = config, run, classifier, splits, ema
        self.curve = Curve()
        data = config.data
        self.loading = Loading(2 * config.run.micro_batch_size, config.run.num_workers, data.on_bad_sample, run.rank, run.world_size)

    def networks(self) -> dict[str, Any]:
        """The present weights and their average."""
        return {"raw": self.run.unwrap()} | ({"ema": self.ema.module} if self.ema is not None else {})

    def epoch(self, step: int) -> float:
        """Passes over the training images after so many steps."""
        return step * self.run.layout.global_batch_size / len(self.splits.train)

    def after_step(self, step: int) -> None:
        """Evaluate when an epoch (or `evaluate_every` of them) ends, and after the last step."""
        every = self.config.evaluate_every
        if len(self.splits.held_out) and (self.epoch(step) // every > self.epoch(step - 1) // every or step == self.run.steps):
            networks = self.networks()
            row = self.curve.add(self.epoch(step), step, self.classify(networks, self.splits.held_out), networks)
            if self.run.is_main:
                atomic_write(self.run.folder / "curve.jsonl", "".join(json.dumps(row) + "\n" for row in self.curve.rows))
            shown = ", ".join(f"{name} {row[name]:.1f} %" for name in networks)
            self.run.print(f"\nepoch {row['epoch']:.2f}, step {step}: {shown} of {row['n']} held-out images")

    def classify(self, networks: dict[str, Any], data: ClassFolders) -> dict[str, list[Row]]:
        """Classify images with several networks, all ranks together."""
        return classify(networks, data, self.classifier.spec, self.run.device, self.loading, self.run.accelerator.autocast)

    def variants(self) -> dict[str, dict[str, Tensor]]:
        """All weights that there are at the end: last and best, averaged and raw."""
        found = {f"last_{name}": network.state_dict() for name, network in self.networks().items()}
        found |= {f"best_{name}": row["weights"] for name, row in self.curve.best.items()}
        return dict(sorted(found.items(), key=lambda item: (not item[0].endswith("ema"), item[0])))


def summarise(watch: Watch, rows: dict[str, list[Row]], test: ClassFolders) -> dict[str, Any]:
    """Give the summary of the test: the chosen weights' figures, all others beside them, and how they were chosen."""
    config, splits, chosen = watch.config, watch.splits, watch.config.chosen
    folder, spec = watch.run.folder / "test", watch.classifier.spec
    best = {f"best_{name}": {key: row[key] for key in ("epoch", "step", "held_out_top1")} for name, row in watch.curve.best.items()}
    last = {f"last_{name}": {"epoch": round(watch.epoch(watch.run.steps), 4), "step": watch.run.steps} for name in watch.networks()}
    held = f"{len(splits.held_out)} of {len(splits.held_out) + len(splits.train)} training images (data.held_out {config.data.held_out}, "
    n, count = config.network, config.network.train_blocks
    return {
        "benchmark": config.benchmark,
        "model": watch.run.folder.name,
        "protocol": {
            "weights": chosen,
            "selected_on": f"{held}split_seed {config.data.split_seed}), never the test images" if len(splits.held_out) else "nothing",
            "weights_at": {**last, **best},
            "method": "from scratch"
            if n.scratch
            else "fine-tuning"
            if count is None
            else f"last {count} blocks"
            if count
            else "linear probe",
            "encoder": n.encoder,
            "pooling": n.pooling,
            "crop_pct": spec.crop_pct,
            "input_size": spec.size,
            "position_resampling": n.position_resampling,
            "ema_decay": config.ema_decay,
            "layer_decay": config.layer_decay,
            "classes": len(test.names),
            "images": relative_root(test, folder),
            "ties": "counted against the right class",
            "interval": "Wilson, 95 %",
        },
        "n": sum("missing" not in row for row in rows[chosen]),
        "metrics": metrics_of(rows, chosen),
        "missing": sum("missing" in row for row in rows[chosen]),
        "seconds": round(watch.run.seconds, 1),
        "curve": watch.curve.rows,
    }


def run_test(watch: Watch, test: ClassFolders) -> None:
    """Classify the test images once with each of the weights, and write RUN/test."""
    networks: dict[str, Any] = {}
    for name, state in watch.variants().items():
        networks[name] = fresh_network(watch.classifier).to(watch.run.device)
        networks[name].load_state_dict(state)
    rows = watch.classify(networks, test)
    if not watch.run.is_main:
        return
    summary = summarise(watch, rows, test)
    with atomic_folder(watch.run.folder / "test", overwrite=True) as folder:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in answers(rows[watch.config.chosen], test)]
        (folder / "answers.jsonl").write_text("".join(lines), encoding="utf-8")
        (folder / "summary.json").write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    watch.run.print(as_text(summary))


def as_text(summary: dict[str, Any]) -> str:
    """Give all weights' figures, a line each; the best never stands alone."""
    p, lines = summary["protocol"], []
    for name, at in p["weights_at"].items():
        one, five = (summary["metrics"][f"top{k}/{name}"] for k in (1, 5))
        mark = "   <- exported" if name == p["weights"] else ""
        low, high = one["ci95"]
        lines.append(
            f"  {name}: top1 {one['value']:.2f} % ({low:.2f} to {high:.2f}), top5 {five['value']:.2f} %, epoch {at['epoch']:.2f}{mark}"
        )
    head = f"{summary['benchmark']}, {p['method']} of {p['encoder']}: {summary['n']} test images, {p['classes']} classes"
    return "\n".join([head, *lines, f"  best epochs were chosen on {p['selected_on']}"])


def export(watch: Watch) -> None:
    """Write the chosen weights into RUN/classifier (with the head) and RUN/encoder (without)."""
    run, config = watch.run, watch.config
    if not run.is_main:
        return
    state = {name: tensor.detach().cpu() for name, tensor in watch.variants()[config.chosen].items()}
    with atomic_folder(run.folder / "classifier", overwrite=True) as folder:
        save_classifier(watch.classifier, state, folder)
    training = {"objective": "classification", "weights": config.chosen, "pooling": config.network.pooling, "classes": len(watch.classifier.class_names),
                "step": run.step, "samples_seen": run.step * run.layout.global_batch_size}  # fmt: skip
    with atomic_folder(run.folder / "encoder", overwrite=True) as folder:
        export_encoder(watch.classifier, state, folder, f"fine-tuned from {watch.classifier.origin}, {run.step} steps", training)


def check_classes(config: RunConfig, names: tuple[str, ...]) -> None:
    """Hold the class names against those of the run that is resumed: with others its head would mean something else.

    Raises:
        DataError: They differ.
    """
    path = Path(config.output_dir) / CLASS_FILE
    if not config.resume or not path.is_file():
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    if tuple(before) != names:
        changed = sorted(set(before) ^ set(names))
        what = f"'{changed[0]}' is in one of the two only" if changed else "their order differs"
        raise DataError(
            f"{config.output_dir} was begun with a head of {len(before)} classes, --data.train now gives {len(names)} ({what}); "
            "resume with the old folder and data.max_classes, or start anew with --run.overwrite"
        )


def start_ema(config: ClassifierConfig, run: Run, network: Any) -> Any:
    """Make the average of the weights, a copy of the first ones (decay from step 0, no warm-up), restored when resuming.

    Raises:
        ConfigError: ZeRO-3 shards the weights, so that no process could average or evaluate them.
    """
    if run.deepspeed and run.accelerator.state.deepspeed_plugin.zero_stage == 3:
        raise ConfigError("train_classifier averages and evaluates whole weights, ZeRO-3 shards them: use zero_optimization.stage 2")
    if not config.ema_decay:
        return None
    ema = make_ema(network, config.ema_decay, warmup=False).to(run.device)
    run.keep("ema", ema)
    return ema


def main(argv: Sequence[str] | None = None) -> Path:
    """Train, test, and give the run folder."""
    config = load_config(ClassifierConfig, argv, recipe_dir=RECIPES)
    splits = read_splits(config.data)  # before anything is written
    torch.manual_seed(config.run.seed)
    classifier = build_classifier(config.network, splits.train.names)
    network = classifier.network
    check_classes(config.run, classifier.class_names)
    run = Run(config.run, name="classifier", settings=config)
    if run.is_main:
        atomic_write(run.folder / CLASS_FILE, json.dumps(classifier.class_names, ensure_ascii=False, indent=0))
    data, augment = config.data, config.augment
    bad_list = run.folder / "bad_samples.jsonl"
    transform = augment.transform(classifier.spec)
    dataset = LabelledImages(splits.train, transform, on_bad_sample=data.on_bad_sample, bad_list=bad_list, cache=data.cache)
    mixup = None
    if augment.mixup or augment.cutmix:
        mixup = Mixup(augment.mixup, augment.cutmix, label_smoothing=config.label_smoothing, num_classes=len(classifier.class_names))

    own_lr = {"head.*": config.head_lr} if config.head_lr else None
    groups = param_groups(network, config.lr, config.weight_decay, layer_decay=config.layer_decay, lr_by_pattern=own_lr)
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(config.betas[0], config.betas[1]), eps=config.eps)
    parts = {name: getattr(network, name) for name in ("patch_embed", "blocks", "head")}
    run.print(trainable_table(network, parts, dict.fromkeys(("patch_embed", "blocks"), classifier.origin)))
    run.print(f"train: {describe_classes(splits.train)}; held out: {describe_classes(splits.held_out)}; pooling: {config.network.pooling}")
    ema = start_ema(config, run, network)
    model, optimizer = run.prepare(network, optimizer)
    watch = Watch(config, run, classifier, splits, ema)
    run.keep("curve", watch.curve)
    run.set_schedule(cosine_schedule(run.plan(dataset), config.warmup, config.final_lr / config.lr, from_zero=True))

    for batch in run.batches(dataset, default_collate):
        images, targets = mix(batch["images"], batch["labels"], mixup)  # [B, 3, H, W], [B] or [B, C]
        logits = model(images)  # [B, C]
        loss = classification_loss(logits, targets, config.label_smoothing)
        run.backward(loss)
        run.log(right=(logits.argmax(dim=1) == batch["labels"]).float().mean())
        if run.updated:
            if ema is not None:
                ema.update(run.unwrap())
            watch.after_step(run.step + 1)

    export(watch)
    if splits.test is not None:
        run_test(watch, splits.test)
    if bad := dataset.bad_images():
        run.print(f"{len(bad)} unreadable images were left out (bad_samples.jsonl):\n  " + "\n  ".join(bad.values()))
    return run.finish()


if __name__ == "__main__":
    cli_entry(main)
