"""Train an image and a text tower together, as CLIP: each picture must find its caption in the batch, each caption its picture.

    python encoders/train_contrastive.py --recipe mini_clip --output_dir runs/mini_clip
    torchrun --nproc_per_node 8 encoders/train_contrastive.py --model ViT-B-16 --data.source captions.json --data.image_root train2017 ...

The run folder then holds `clip/` (an open_clip model) and `encoder/` (the image tower as a VisionEncoder folder).

Source: Learning Transferable Visual Models From Natural Language Supervision (Radford et al., 2021). Departure: captions that occur twice
in a batch are not each other's negatives.
"""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

if __package__ in (None, ""):  # started as a file: its folder is on sys.path, the packages' folder is not
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from encoders.clip_models import ClipParts, build_clip, export_clip
from encoders.pairs import CaptionedImages, DrawnPairs, collate_pairs, held_out_drawings, read_pairs, sample_captions
from encoders.zeroshot import load_templates, zeroshot_ranks, zeroshot_weights
from mmkit.checkpoint import atomic_folder, atomic_write
from mmkit.config import cli_entry, load_config
from mmkit.errors import ConfigError
from mmkit.optim import cosine_schedule, param_groups
from mmkit.records import read_jsonl
from mmkit.run import Run, RunConfig
from mmkit.stats import wilson
from mmkit.trainable import trainable_table

RECIPES = Path(__file__).parent / "recipes"
LARGEST_SCALE = math.log(100)


@dataclass
class DataConfig:
    """Where the pairs come from."""

    source: str = field(default="minidata", metadata={"help": "minidata (drawn on the fly), a captions JSON, or a folder with .txt files"})
    image_root: str = field(default="", metadata={"help": "folder of the images a JSON names; default: the JSON's own"})
    length: int = field(default=100_000, metadata={"help": "minidata: pairs in an epoch"})
    single_share: float = field(default=0.7, metadata={"help": "minidata: share of pictures with one object"})
    plain_share: float = field(default=0.6, metadata={"help": "minidata: of these, the share captioned by the name alone"})
    on_bad_sample: Literal["error", "skip"] = field(
        default="error", metadata={"help": "an unreadable image: stop, or leave it out, listed"}
    )


@dataclass
class ContrastiveConfig:
    """Settings of a contrastive training."""

    model: str = field(default="mini-clip-new", metadata={"help": "mini-clip-new, an open_clip JSON, MODEL, MODEL/TAG, or a folder"})
    text_tower: str = field(default="", metadata={"help": "how the encoder names this text tower; default: the run's clip folder"})
    prompts: str = field(default="mini", metadata={"help": "zero-shot prompts: mini, openai, name or a file"})
    lr: float = field(default=1e-3, metadata={"help": "peak learning rate"})
    text_lr_factor: float = field(default=1.0, metadata={"help": "the text tower's lr as a share of lr"})
    weight_decay: float = field(default=0.05, metadata={"help": "of matrices"})
    beta2: float = field(default=0.98, metadata={"help": "AdamW's second beta"})
    eps: float = field(default=1e-6, metadata={"help": "AdamW's epsilon"})
    warmup: float = field(default=0.05, metadata={"help": "steps, or share of all steps if below 1"})
    train_scale: bool = field(default=True, metadata={"help": "learn the temperature; else it stays where it starts"})
    chunk: int = field(default=0, metadata={"help": "encode so many pairs at a time, twice: for batches larger than memory; 0 is off"})
    eval_every: int = field(default=0, metadata={"help": "minidata: steps between zero-shot checks; 0 is only at the end"})
    eval_views: int = field(default=2, metadata={"help": "minidata: held-out drawings of each name"})
    export_every: int = field(default=0, metadata={"help": "steps between exports; 0 is only at the end"})
    data: DataConfig = field(default_factory=DataConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def validate(self) -> None:
        """Refuse what cannot be meant."""
        if self.run.gradient_accumulation_steps != 1:
            raise ConfigError(
                f"run.gradient_accumulation_steps {self.run.gradient_accumulation_steps}: accumulation shrinks the negatives of a "
                "contrastive loss; give the whole batch as run.micro_batch_size, and --chunk N to encode it N pairs at a time"
            )
        if self.run.micro_batch_size < 2:
            raise ConfigError("run.micro_batch_size 1 has no negatives; 128 is a start")


def contrastive_loss(image_features: Tensor, text_features: Tensor, scale: Tensor, captions: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy of pictures over captions and of captions over pictures, negatives gathered from all ranks.

    Two pairs of a batch with the same caption ("a cat" twice) are right for each other: neither is the other's negative.

    Args:
        image_features: Unit rows of this rank [B, E].
        text_features: Unit rows of this rank [B, E], in the same order.
        scale: 1 / temperature, [].
        captions: Token ids [B, context]; equal rows are equal captions.

    Returns:
        The mean over both directions and this rank's rows [], and its terms "image_to_text" and "text_to_image" []. The mean of all ranks'
        losses is the loss of the whole batch in one process, gradients included.
    """
    all_images, all_texts, all_captions, offset = _gather(image_features, text_features, captions)  # [G, E], [G, E], [G, context]
    labels = torch.arange(len(captions), device=captions.device) + offset  # [B]
    same = (captions[:, None, :] == all_captions[None, :, :]).all(-1)  # [B, G]
    same.scatter_(1, labels[:, None], False)
    terms = {}
    for name, own, others in (("image_to_text", image_features, all_texts), ("text_to_image", text_features, all_images)):
        logits = scale.float() * own.float() @ others.float().T  # [B, G]
        terms[name] = F.cross_entropy(logits.masked_fill(same, -math.inf), labels)
    return (terms["image_to_text"] + terms["text_to_image"]) / 2, terms


class _GatherRows(torch.autograd.Function):
    """Rows [B, D] of every rank, in rank order [G, D]; each rank's loss sends its gradient back to the rank whose rows it used.

    What torch.distributed.nn.all_gather does too, here with a single all-reduce in the backward, on every backend.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        everyone = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, rows.contiguous())
        return torch.cat(everyone)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total.chunk(dist.get_world_size())[dist.get_rank()]


def _gather(images: Tensor, texts: Tensor, captions: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    """All ranks' features (gradients flow back to their ranks) and captions, and where this rank's rows begin."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return images, texts, captions, 0
    both = torch.cat([images, texts], dim=1).contiguous()  # one exchange instead of two
    gathered: Tensor = _GatherRows.apply(both)
    ids = [torch.empty_like(captions) for _ in range(dist.get_world_size())]
    dist.all_gather(ids, captions.contiguous())
    return gathered[:, : images.shape[1]], gathered[:, images.shape[1] :], torch.cat(ids), dist.get_rank() * len(images)


def contrastive_step(clip: nn.Module, images: Tensor, text_ids: Tensor, chunk: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Encode a batch and take its loss.

    Args:
        clip: open_clip's model.
        images: Normalised [B, 3, H, W].
        text_ids: [B, context].
        chunk: Pairs encoded at a time, and once more in the backward; 0 encodes all at once.
    """
    encode_image: Any = clip.encode_image
    encode_text: Any = clip.encode_text
    distinct, place = torch.unique(text_ids, dim=0, return_inverse=True)  # a caption that occurs twice is encoded once
    image_features = F.normalize(_in_chunks(encode_image, images, chunk), dim=-1)
    text_features = F.normalize(_in_chunks(encode_text, distinct, chunk), dim=-1)[place]
    logit_scale: Any = clip.logit_scale
    return contrastive_loss(image_features, text_features, logit_scale.exp(), text_ids)


def _in_chunks(encode: Any, inputs: Tensor, chunk: int) -> Tensor:
    """Apply a tower; with `chunk`, its activations are kept for no more than so many inputs."""
    if not chunk or len(inputs) <= chunk:
        return encode(inputs)
    return torch.cat([checkpoint(encode, part, use_reentrant=False) for part in inputs.split(chunk)])


def to_images(batch: Tensor, spec: Any) -> Tensor:
    """Normalise uint8 pictures on the device; floats are normalised already."""
    if batch.dtype != torch.uint8:
        return batch
    mean, std = (torch.tensor(values, device=batch.device).view(1, 3, 1, 1) for values in (spec.mean, spec.std))
    return (batch.float() / 255 - mean) / std


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
    from encoders.catalog import load_encoder

    encoder = load_encoder(f"openclip:{run.folder / 'clip'}")
    encoder.config.text_tower = settings.text_tower or str(run.folder / "clip")
    encoder.config.training = training
    with atomic_folder(run.folder / "encoder", overwrite=True) as folder:
        encoder.save_pretrained(str(folder))


def thin_log(folder: Path, most: int = 150) -> str:
    """The training's story in few lines: every zero-shot check, and evenly spread lines of metrics.jsonl."""
    rows = read_jsonl(folder / "metrics.jsonl") if (folder / "metrics.jsonl").is_file() else []
    rows = rows[:: max(1, math.ceil(len(rows) / most))]
    checks = read_jsonl(folder / "zeroshot.jsonl") if (folder / "zeroshot.jsonl").is_file() else []
    return "".join(json.dumps(row) + "\n" for row in sorted([*rows, *checks], key=lambda row: row["step"]))


def main(argv: Sequence[str] | None = None) -> Path:
    """Train, and give the run folder."""
    settings = load_config(ContrastiveConfig, argv, recipe_dir=RECIPES)
    drawn = settings.data.source == "minidata"
    records = [] if drawn else read_pairs(settings.data.source, settings.data.image_root)  # before the folder is made: it may fail
    run = Run(settings.run, name="contrastive", settings=settings)

    def pairs_for(spec: Any) -> DrawnPairs | CaptionedImages:
        c = settings.data
        if drawn:
            return DrawnPairs(settings.run.seed, c.length, c.single_share, c.plain_share)
        return CaptionedImages(records, spec, settings.run.seed, True, c.on_bad_sample)

    saved = run.folder / "tokenizer"
    parts = build_clip(settings.model, lambda: sample_captions(pairs_for(None) if drawn else _captions_only(records)), saved)
    if drawn and parts.spec.size != 96:
        raise ConfigError(f"--model {settings.model} takes {parts.spec.size} pixels, minidata draws 96; give a model of 96, or other data")
    _keep_tokenizer(run, parts, saved)
    clip: Any = parts.model
    clip.logit_scale.requires_grad_(settings.train_scale)
    dataset = pairs_for(parts.spec)
    text = {name for name, _ in clip.named_parameters() if not name.startswith("visual.") and name != "logit_scale"}
    factor = {name: settings.lr * settings.text_lr_factor for name in text} if settings.text_lr_factor != 1 else {}
    groups = param_groups(clip, settings.lr, settings.weight_decay, lr_by_pattern=factor)
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, settings.beta2), eps=settings.eps)
    run.print(trainable_table(clip, {"image tower": clip.visual}, {"image tower": parts.origin, "(rest)": parts.origin}))
    run.prepare(clip, optimizer)
    run.set_schedule(cosine_schedule(run.plan(dataset), settings.warmup))
    held_out = HeldOut(settings, parts.spec) if drawn and run.is_main else None
    check: dict[str, float] | None = None
    for batch in run.batches(dataset, collate_pairs(parts.tokenizer)):
        with torch.no_grad():
            clip.logit_scale.clamp_(0, LARGEST_SCALE)
        loss, terms = run.forward(contrastive_step, to_images(batch["images"], parts.spec), batch["text_ids"], settings.chunk)
        run.backward(loss, **terms)
        run.log(**terms, logit_scale=clip.logit_scale.exp())
        step = run.step + 1
        if held_out and settings.eval_every and step % settings.eval_every == 0:
            check = _check(run, held_out, parts, step)
        if settings.export_every and step % settings.export_every == 0 and step < run.steps:
            export(run, settings, parts, check, step)
    if held_out and not (settings.eval_every and run.step % settings.eval_every == 0 and check):
        check = _check(run, held_out, parts, run.step)
    if isinstance(dataset, CaptionedImages) and dataset.bad:
        run.print(f"{len(dataset.bad)} unreadable images were left out:\n  " + "\n  ".join(dataset.bad.values()))
    with torch.no_grad():
        clip.logit_scale.clamp_(0, LARGEST_SCALE)
    export(run, settings, parts, check, run.step)
    return run.finish()


def _captions_only(records: Any) -> CaptionedImages:
    from mmkit.images import ImageSpec

    return CaptionedImages(records, ImageSpec(), 0, training=False)


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
