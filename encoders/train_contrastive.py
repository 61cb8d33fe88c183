"""Train an image and a text tower together, as CLIP: each picture must find its caption in the batch, each caption its picture.

    python encoders/train_contrastive.py --recipe mini_clip --output_dir runs/mini_clip
    mmkit train contrastive --recipe mini_contrastive_uta --encoder runs/uta/encoder --output_dir runs/uta_clip
    torchrun --nproc_per_node 8 encoders/train_contrastive.py --recipe contrastive_uta_b16 --encoder runs/uta_b16/encoder \\
        --data.source "datacomp/{00000..12895}.tar" --output_dir runs/uta_b16_clip
    accelerate launch --multi_gpu --num_processes 8 encoders/train_contrastive.py ...

(On processors alone accelerate starts several processes with --multi_gpu too; --cpu or --use_cpu with --num_processes starts only one.)

The towers start from nothing, from an open_clip model, or from an encoder folder and the text tower of its joint space (`--encoder`), as
when a UTA student is fine-tuned. The run folder then holds `clip/` (an open_clip model) and `encoder/` (the image tower as a VisionEncoder
folder). Negatives are all other pairs of the step: those of all ranks, and of all micro-batches when gradients are accumulated.

Source: Learning Transferable Visual Models From Natural Language Supervision (Radford et al., 2021); the fine-tuning is UTA's, section 3;
masked pictures are FLIP's (Li et al., 2022). Departure: captions that occur twice in a step are not each other's negatives.
"""

import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

if __package__ in (None, ""):  # started as a file: its folder is on sys.path, the packages' folder is not
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from timm.optim import Lamb
from torch import Tensor, nn

from encoders.catalog import load_encoder
from encoders.clip_models import ClipParts, build_clip, clip_from_encoder, export_clip
from encoders.clip_towers import install_patch_keeper, lr_scales
from encoders.contrastive import contrastive_loss, encode_pairs
from encoders.masking import MaskConfig, Masks
from encoders.modeling import VisionEncoder
from encoders.pair_sources import PairConfig, open_pairs, read_source
from encoders.pairs import FilePairs, MaskedPairs, collate_pairs, held_out_drawings, sample_captions
from encoders.zeroshot import load_templates, zeroshot_ranks, zeroshot_weights
from mmkit.batches import derive_seed, seed_everything
from mmkit.checkpoint import atomic_folder, atomic_write, load_strict
from mmkit.config import cli_entry, load_config
from mmkit.errors import ConfigError
from mmkit.images import ImageSpec, to_images
from mmkit.launch import read_deepspeed_block
from mmkit.optim import cosine_schedule, param_groups
from mmkit.records import read_jsonl
from mmkit.run import Run, RunConfig
from mmkit.stats import wilson
from mmkit.trainable import trainable_table

RECIPES = Path(__file__).parent / "recipes"
LARGEST_SCALE = math.log(100)


@dataclass
class ContrastiveConfig:
    """Settings of a contrastive training."""

    model: str = field(default="mini-clip-new", metadata={"help": "mini-clip-new, an open_clip JSON, MODEL, MODEL/TAG, or a folder"})
    encoder: str = field(default="", metadata={"help": "start from this image tower (a UTA run's encoder folder), instead of --model"})
    encoder_text: str = field(default="", metadata={"help": "and from this text tower; default: the one that the encoder names"})
    text_tower: str = field(default="", metadata={"help": "how the encoder names this text tower; default: the run's clip folder"})
    prompts: str = field(default="mini", metadata={"help": "zero-shot prompts: mini, openai, name or a file"})
    optimizer: Literal["adamw", "lamb"] = field(default="adamw", metadata={"help": "lamb is for batches of tens of thousands"})
    lr: float = field(default=1e-3, metadata={"help": "peak learning rate"})
    text_lr_factor: float = field(default=1.0, metadata={"help": "the text tower's lr as a share of lr"})
    layer_decay: float = field(default=1.0, metadata={"help": "image tower: the lr of each block as a share of the next one's; 1 is off"})
    text_layer_decay: float = field(default=1.0, metadata={"help": "text tower: the same"})
    weight_decay: float = field(default=0.05, metadata={"help": "of matrices"})
    beta2: float = field(default=0.98, metadata={"help": "the optimizer's second beta"})
    eps: float = field(default=1e-6, metadata={"help": "the optimizer's epsilon"})
    warmup: float = field(default=0.05, metadata={"help": "steps, or share of all steps if below 1"})
    temperature: float | None = field(default=None, metadata={"help": "where the temperature starts; none: where the model has it"})
    train_scale: bool = field(default=True, metadata={"help": "learn the temperature; else it stays where it starts"})
    mask_ratio: float = field(default=0.0, metadata={"help": "share of each picture's patches left out at random, as FLIP does"})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "compute activations twice instead of keeping them"})
    eval_every: int = field(default=0, metadata={"help": "minidata: steps between zero-shot checks; 0 is only at the end"})
    eval_views: int = field(default=2, metadata={"help": "minidata: held-out drawings of each name"})
    export_every: int = field(default=0, metadata={"help": "steps between exports; 0 is only at the end"})
    data: PairConfig = field(default_factory=PairConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def validate(self) -> None:
        """Refuse what cannot be meant."""
        if self.run.micro_batch_size * max(self.run.gradient_accumulation_steps, self.run.global_batch_size) < 2:
            raise ConfigError("run.micro_batch_size 1 has no negatives; 128 is a start")
        for name in ("layer_decay", "text_layer_decay", "text_lr_factor"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; a factor above 0 and up to 1 (off) is right")
        if not 0 <= self.mask_ratio < 1:
            raise ConfigError(f"mask_ratio is {self.mask_ratio}; a share from 0 (keep all) to below 1 is right")
        if self.temperature is not None and not 0.01 <= self.temperature <= 1:
            raise ConfigError(f"temperature is {self.temperature}; from 0.01, where learnt ones are stopped, to 1 is right")
        block = read_deepspeed_block(self.run.deepspeed)
        zero = block.get("zero_optimization")
        if block and self.optimizer == "lamb":  # its ratio of norms is per tensor, and ZeRO cuts tensors up
            raise ConfigError("optimizer lamb does not work on DeepSpeed's flat partitions; set run.deepspeed to {} or take adamw")
        if isinstance(zero, dict) and zero.get("stage") == 3:
            raise ConfigError(
                "run.deepspeed ZeRO-3 shards the weights, which the export of an open_clip model needs whole; take stage 1 or 2"
            )


class CachedFeatures:
    """Gradient accumulation that keeps all negatives: the gradient of the whole step's loss, with one micro-batch's activations at a time.

    Before a step all its micro-batches are encoded without a graph, the loss of all of them is taken, and its gradient with respect to each
    feature is kept. When a micro-batch's turn comes it is encoded again, with the same dropout and the same masks, and sent that gradient.

    Source: Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup (Gao et al., 2021).
    """

    def __init__(self, run: Run, spec: ImageSpec) -> None:
        self.run, self.spec = run, spec
        self.loss, self.terms = torch.zeros(()), dict[str, Tensor]()
        self.gradients: list[tuple[Tensor, Tensor]] = []
        self.scale_gradient: Tensor | float = 0.0

    def encode(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Encode a micro-batch of bytes and ids; see `encode_pairs`."""
        found: tuple[Tensor, Tensor, Tensor] = self.run.forward(
            encode_pairs, to_images(batch["images"], self.spec), batch["text_ids"], batch.get("keep")
        )
        return found

    def look_ahead(self, micro_batches: Iterator[dict[str, Tensor]]) -> None:
        """Take the loss of a whole step, and its gradients with respect to the features and 1 / temperature."""
        features, captions = [], []
        with torch.no_grad():
            for batch in micro_batches:
                features.append(self.encode(batch))
                captions.append(batch["text_ids"])
        sizes = [len(images) for images, _, _ in features]
        images, texts = (torch.cat([row[part] for row in features]).requires_grad_() for part in range(2))
        scale = features[0][2].detach().clone().requires_grad_()
        loss, terms = contrastive_loss(images, texts, scale, torch.cat(captions))
        image_gradient, text_gradient, self.scale_gradient = torch.autograd.grad(loss, [images, texts, scale])
        self.gradients = list(zip(image_gradient.split(sizes), text_gradient.split(sizes), strict=True))
        self.loss, self.terms = loss.detach(), {name: term.detach() for name, term in terms.items()}

    def __call__(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Give the loss of the step, whose gradient is this micro-batch's part of it.

        The mean over micro-batches that `Run` takes must be the whole gradient: the features' part is multiplied by their number; the
        temperature's gradient is the same in each micro-batch already.
        """
        images, texts, scale = self.encode(batch)
        image_gradient, text_gradient = self.gradients.pop(0)
        part = (images * image_gradient).sum() + (texts * text_gradient).sum()
        part = self.run.accumulation * part + scale * self.scale_gradient
        return self.loss + (part - part.detach()), self.terms


class HeldOut:
    """The zero-shot check while training: single drawings, made once, against all trained names."""

    def __init__(self, settings: ContrastiveConfig, spec: Any) -> None:
        pixels, self.labels, self.names = held_out_drawings(settings.run.seed, settings.eval_views)
        self.images = to_images(pixels, spec)
        self.templates = load_templates(settings.prompts)

    @torch.no_grad()
    def check(self, parts: ClipParts) -> dict[str, float]:
        """Top-1 and top-5 in percent, with the Wilson interval of top-1."""
        clip: Any = parts.model
        training = clip.training
        clip.eval()
        device = clip.logit_scale.device

        def encode(texts: list[str]) -> Tensor:
            return clip.encode_text(parts.tokenizer(texts).to(device)).float()

        weights = zeroshot_weights(encode, self.names, self.templates).cpu()
        ranks = zeroshot_ranks(lambda images: clip.encode_image(images.to(device)).float(), self.images, self.labels, weights)
        clip.train(training)
        right = int((ranks < 1).sum())
        low, high = wilson(right, len(ranks))
        top5 = float((ranks < 5).double().mean())
        return {"top1": 100 * right / len(ranks), "top1_low": 100 * low, "top1_high": 100 * high, "top5": 100 * top5, "n": len(ranks)}


def export(run: Run, settings: ContrastiveConfig, parts: ClipParts, check: dict[str, float] | None, step: int) -> None:
    """Write `clip/` into the run folder, and at the end `encoder/` too."""
    if not run.is_main:
        return
    training = {
        "objective": "contrastive",
        "step": step,
        "samples_seen": step * run.layout.global_batch_size,
        "seconds": round(run.seconds),
        **({f"zeroshot_{key}": round(value, 2) for key, value in check.items()} if check else {}),
    }
    with atomic_folder(run.folder / "clip", overwrite=True) as folder:
        export_clip(folder, parts, {"templates": settings.prompts, "training": training})
        atomic_write(folder / "training_log.jsonl", thin_log(run.folder))
    if step < run.steps:
        return
    encoder = exported_encoder(run.folder / "clip", parts)
    encoder.config.text_tower = settings.text_tower or str(run.folder / "clip")
    encoder.config.training = training
    with atomic_folder(run.folder / "encoder", overwrite=True) as folder:
        encoder.save_pretrained(str(folder))


def exported_encoder(folder: Path, parts: ClipParts) -> VisionEncoder:
    """Give the image tower of an exported CLIP folder: built as the encoder it came from, or read off open_clip's model."""
    encoder = load_encoder(f"openclip:{folder}") if parts.encoder is None else VisionEncoder(parts.encoder)
    if parts.encoder is not None:
        exported: Any = build_clip(str(folder), lambda: [], Path()).model
        load_strict(encoder.network, exported.visual.trunk.state_dict(), str(folder))
        encoder.config.origin = f"contrastive, from {parts.origin}"
    return encoder


def thin_log(folder: Path, most: int = 150) -> str:
    """The training's story in few lines: every zero-shot check, and evenly spread lines of metrics.jsonl."""
    rows = read_jsonl(folder / "metrics.jsonl") if (folder / "metrics.jsonl").is_file() else []
    rows = rows[:: max(1, math.ceil(len(rows) / most))]
    checks = read_jsonl(folder / "zeroshot.jsonl") if (folder / "zeroshot.jsonl").is_file() else []
    return "".join(json.dumps(row) + "\n" for row in sorted([*rows, *checks], key=lambda row: row["step"]))


def build_parts(settings: ContrastiveConfig, source: Any, saved: Path) -> ClipParts:
    """Build the two towers and set their temperature.

    Args:
        source: What `read_source` gave; captions for a tokenizer come from it.
        saved: Where the run keeps a tokenizer of its own.

    Raises:
        ConfigError: The model takes other pictures than the data has, or patches cannot be left out of it.
    """
    if settings.encoder:
        parts = clip_from_encoder(settings.encoder, settings.encoder_text)
    else:
        parts = build_clip(
            settings.model, lambda: sample_captions(open_pairs(settings.data, source, ImageSpec(), settings.run.seed)), saved
        )
    if source is None and parts.spec.size != 96:
        name = settings.encoder or settings.model
        raise ConfigError(f"--model {name} takes {parts.spec.size} pixels, minidata draws 96; give a model of 96, or other data")
    clip: Any = parts.model
    if settings.temperature is not None:
        with torch.no_grad():
            clip.logit_scale.fill_(-math.log(settings.temperature))
    clamp_scale(clip)
    clip.logit_scale.requires_grad_(settings.train_scale)
    if getattr(clip, "logit_bias", None) is not None:
        clip.logit_bias.requires_grad_(False)  # a sigmoid loss's; this one has no use for it
    if settings.gradient_checkpointing:
        clip.set_grad_checkpointing(True)
    return parts


def build_optimizer(settings: ContrastiveConfig, clip: nn.Module) -> torch.optim.Optimizer:
    """Group the parameters by layer and tower, and make the optimizer. Call it with the bare model."""
    scales = lr_scales(clip, settings.layer_decay, settings.text_layer_decay, settings.text_lr_factor)
    groups = param_groups(clip, settings.lr, settings.weight_decay, lr_scales=scales)
    if settings.optimizer == "lamb":  # clips the whole gradient's norm to 1 by itself, as in EVA-CLIP, after Run's own clip
        return Lamb(groups, lr=settings.lr, betas=(0.9, settings.beta2), eps=settings.eps, weight_decay=settings.weight_decay)
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, settings.beta2), eps=settings.eps)


def main(argv: Sequence[str] | None = None) -> Path:
    """Train, and give the run folder."""
    settings = load_config(ContrastiveConfig, argv, recipe_dir=RECIPES)
    source = read_source(settings.data)  # this and the towers before the run folder is made: they may fail
    saved = Path(settings.run.output_dir) / "tokenizer"
    seed_everything(derive_seed(settings.run.seed))
    parts = build_parts(settings, source, saved)
    clip: Any = parts.model
    masks = MaskConfig("random", settings.mask_ratio) if settings.mask_ratio else None
    grid = install_patch_keeper(clip) if masks else (0, 0)
    optimizer = build_optimizer(settings, clip)
    run = Run(settings.run, name="contrastive", settings=settings)
    _keep_tokenizer(run, parts, saved)
    pairs = open_pairs(settings.data, source, parts.spec, settings.run.seed, run.folder / "bad_samples.jsonl")
    dataset: Any = MaskedPairs(pairs, Masks(masks, grid, settings.run.seed)) if masks else pairs
    origins = {"image tower": parts.origin, "(rest)": parts.text_origin or parts.origin}
    run.print(trainable_table(clip, {"image tower": clip.visual}, origins))
    rates = sorted(group["lr"] for group in optimizer.param_groups)
    run.print(f"{settings.optimizer}: {len(rates)} groups, peak lr {rates[0]:.3g} to {rates[-1]:.3g}; {len(dataset)} pairs")
    run.prepare(clip, optimizer)
    run.set_schedule(cosine_schedule(run.plan(dataset), settings.warmup))
    held_out = HeldOut(settings, parts.spec) if source is None and run.is_main else None
    cached = CachedFeatures(run, parts.spec)
    whole = run.accumulation == 1
    check: dict[str, float] | None = None
    for batch in run.batches(dataset, collate_pairs(parts.tokenizer), look_ahead=None if whole else cached.look_ahead):
        loss, terms = contrastive_loss(*cached.encode(batch), batch["text_ids"]) if whole else cached(batch)
        run.backward(loss, **terms)
        run.log(**terms, logit_scale=clip.logit_scale.exp())
        if not run.updated:
            continue
        clamp_scale(clip)
        step = run.step + 1
        if held_out and settings.eval_every and step % settings.eval_every == 0:
            check = _check(run, held_out, parts, step)
        if settings.export_every and step % settings.export_every == 0 and step < run.steps:
            export(run, settings, parts, check, step)
    if held_out and not (settings.eval_every and run.step % settings.eval_every == 0 and check):
        check = _check(run, held_out, parts, run.step)
    if isinstance(pairs, FilePairs) and (bad := pairs.bad_samples()):
        run.print(f"{len(bad)} unreadable pairs or shards were left out (bad_samples.jsonl):\n  " + "\n  ".join(bad.values()))
    export(run, settings, parts, check, run.step)
    return run.finish()


def clamp_scale(clip: Any) -> None:
    """Keep 1 / temperature at 100 or below: CLIP's own limit."""
    with torch.no_grad():
        clip.logit_scale.clamp_(0, LARGEST_SCALE)


def _keep_tokenizer(run: Run, parts: ClipParts, saved: Path) -> None:
    """Keep an own tokenizer with the run, so that a resumed run has the same one whatever made it."""
    own = getattr(parts.tokenizer, "tokenizer", None)
    if run.is_main and own is not None and hasattr(own, "save_pretrained") and not saved.exists():
        with atomic_folder(saved) as folder:
            own.save_pretrained(str(folder))


def _check(run: Run, held_out: HeldOut, parts: ClipParts, step: int) -> dict[str, float]:
    """Run the zero-shot check, say it and keep it."""
    check = held_out.check(parts)
    row = {"step": step, "samples_seen": step * run.layout.global_batch_size, **check, "seconds": round(run.seconds, 1)}
    with open(run.folder / "zeroshot.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    interval = f"{check['top1_low']:.1f} to {check['top1_high']:.1f}"
    run.print(f"step {step}: zero-shot top-1 {check['top1']:.1f} % ({interval}), top-5 {check['top5']:.1f} %")
    return check


if __name__ == "__main__":
    cli_entry(main)
