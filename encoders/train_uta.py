"""Unmasked Token Alignment: a student that sees part of a picture learns the tokens a frozen CLIP tower gives for all of it.

    python encoders/train_uta.py --recipe mini_uta --data.root IMAGES --output_dir runs/uta
    python encoders/train_uta.py --recipe mini_uta --data.root IMAGES --output_dir runs/mim --objective mim
    torchrun --nproc_per_node 8 encoders/train_uta.py --recipe uta_vit_b14 --data.root IN21K_FOLDER --output_dir runs/uta_b14

The teacher's image embedding and patch tokens, projected into the joint image-text space, are the targets; the student, a vision
transformer with random weights, is given CLS and the kept patches alone and has a linear head into the same space. So its CLS output can be
compared with the teacher's text tower, although no text is used here. The run folder then holds `encoder/`, a VisionEncoder folder.

The paper's rivals are one setting away (`objective`): feature distillation (all tokens), MIM (a mask token in the place of removed patches,
and the loss there), and both at once.

Source: Enhancing Vision-Language Model with Unmasked Token Alignment (UTA), sections 3 and 4. Departure: `cls_weight` may give CLS a larger
share of the loss than 1 / (1 + K), which is the paper's plain mean. EVA-02's first weights are `encoder.init eva02`.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

if __package__ in (None, ""):  # started as a file: its folder is on sys.path, the packages' folder is not
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import default_collate

from encoders.catalog import describe
from encoders.flops import StepBound, forward_flops, peak_of
from encoders.image_data import ImageFolder, find_images
from encoders.masking import MaskConfig, Masks
from encoders.students import Student, StudentConfig, build_student
from encoders.teachers import Teacher, load_teacher
from mmkit.checkpoint import atomic_folder
from mmkit.config import cli_entry, load_config
from mmkit.errors import ConfigError
from mmkit.images import ImageSpec, to_images
from mmkit.optim import cosine_schedule, param_groups
from mmkit.run import Run, RunConfig
from mmkit.trainable import trainable_table

RECIPES = Path(__file__).parent / "recipes"
Objective = Literal["uta", "fd", "mim", "uta+mim"]
MASK_TOKEN_OBJECTIVES = ("mim", "uta+mim")


@dataclass
class DataConfig:
    """What is looked at."""

    root: list[str] = field(default_factory=list, metadata={"help": "folders of images, searched to their depths; no labels, no texts"})
    on_bad_sample: Literal["error", "skip"] = field(
        default="error", metadata={"help": "an unreadable image: stop, or leave it out, listed"}
    )
    scale: list[float] = field(default_factory=lambda: [0.2, 1.0], metadata={"help": "share of the area a random crop covers, from and to"})
    flip: float = field(default=0.5, metadata={"help": "probability of mirroring left and right"})
    cache: bool = field(default=False, metadata={"help": "keep decoded images in memory: for small sets"})

    def validate(self) -> None:
        """Refuse a missing folder and shares that are none."""
        if not self.root:
            raise ConfigError("data.root is empty; give folders of images: --data.root FOLDER[,FOLDER...]")
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ConfigError(f"data.scale is {self.scale}; two shares of the area, from and to, as in [0.2, 1.0], are right")


@dataclass
class UTAConfig:
    """Settings of an Unmasked Token Alignment training."""

    objective: Objective = field(
        default="uta",
        metadata={
            "help": "uta: CLS and kept patches; fd: all tokens (mask.* is not used); mim: a mask token stands for removed patches, loss on "
            "those (CLS learns nothing: no zero-shot); uta+mim: both losses, one pass with mask tokens"
        },
    )
    teacher: str = field(default="mini-clip", metadata={"help": "a CLIP-like encoder: a name, or a folder"})
    cls_weight: float | None = field(
        default=None, metadata={"help": "share of CLS in the uta loss; none is 1 / (1 + K), the mean over tokens"}
    )
    lr: float = field(default=1.5e-3, metadata={"help": "peak learning rate"})
    final_lr: float = field(default=1e-5, metadata={"help": "learning rate that the cosine ends at"})
    warmup: float = field(default=0.01, metadata={"help": "steps, or share of all steps if below 1"})
    weight_decay: float = field(default=0.05, metadata={"help": "of matrices"})
    betas: list[float] = field(default_factory=lambda: [0.9, 0.98], metadata={"help": "AdamW's"})
    eps: float = field(default=1e-6, metadata={"help": "AdamW's"})
    peak_tflops: float = field(default=0.0, metadata={"help": "what the device can do at best, for the share of it (MFU); 0 looks it up"})
    encoder: StudentConfig = field(default_factory=StudentConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    data: DataConfig = field(default_factory=DataConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def validate(self) -> None:
        """Refuse a share that is none, and mask tokens that stand for nothing."""
        if self.objective in MASK_TOKEN_OBJECTIVES and self.mask.ratio == 0:
            raise ConfigError(f"mask.ratio is 0 and the objective '{self.objective}' learns what was removed: give a share, as in 0.4")
        if self.objective == "fd":
            self.mask = MaskConfig("random", 0.0)
        if self.cls_weight is not None and not 0 <= self.cls_weight <= 1:
            raise ConfigError(f"cls_weight is {self.cls_weight}; a share from 0 to 1 is right, or none for the mean over tokens")
        if len(self.betas) != 2:
            raise ConfigError(f"betas is {self.betas}; AdamW has two, as in [0.9, 0.98]")


def alignment_loss(predicted: Tensor, target: Tensor, cls_weight: float | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Pull the student's kept tokens towards the teacher's tokens at the same places.

    Args:
        predicted: Student tokens [B, 1 + K, E] in the joint space, CLS first; need not be normalised.
        target: Teacher tokens [B, 1 + K, E] at the same keep indices, without gradient.
        cls_weight: Share of CLS in the total, in [0, 1]. None is 1 / (1 + K): the plain mean over tokens.

    Returns:
        The total [], from 0 to 2 (1 - cosine), and its unweighted terms "cls" and "patches" [].

    Raises:
        ValueError: The shapes differ.

    Source: Unmasked Token Alignment (UTA), section 3. The paper minimises the negative cosine; 1 - cosine has the same gradient.
    """
    if predicted.shape != target.shape:
        raise ValueError(
            f"student tokens {list(predicted.shape)}, teacher tokens {list(target.shape)}: were both given the same keep indices?"
        )
    distance = 1 - F.cosine_similarity(predicted.float(), target.float(), dim=-1)  # [B, 1 + K]; float: bfloat16 steps by 0.004 near 1
    terms = {"cls": distance[:, 0].mean(), "patches": distance[:, 1:].mean()}
    weight = 1 / distance.shape[1] if cls_weight is None else cls_weight
    return weight * terms["cls"] + (1 - weight) * terms["patches"], terms


def take_kept(tokens: Tensor, keep: Tensor) -> Tensor:
    """Take CLS and the kept patches [B, 1 + K, E] out of all tokens [B, 1 + N, E]; keep is [B, K]."""
    index = keep.unsqueeze(-1).expand(-1, -1, tokens.shape[-1])
    return torch.cat([tokens[:, :1], tokens[:, 1:].gather(1, index)], dim=1)


def masked_loss(predicted: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Give the mean distance [] (1 - cosine) over the patches that a mask token stood for.

    Args:
        predicted, target: Student and teacher tokens [B, 1 + N, E], CLS first.
        mask: bool [B, N], True where removed: as many in each image.
    """
    distance = 1 - F.cosine_similarity(predicted[:, 1:].float(), target[:, 1:].float(), dim=-1)  # [B, N]
    return (distance * mask).sum() / mask.sum()


def mask_of(keep: Tensor, patches: int) -> Tensor:
    """Turn keep indices [B, K] into a mask: bool [B, N], True where removed."""
    return torch.ones(len(keep), patches, dtype=torch.bool, device=keep.device).scatter(1, keep, False)


def learn(
    objective: Objective, student: Any, images: Tensor, keep: Tensor, target: Tensor, cls_weight: float | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Take the student's forward and loss of a micro-batch: all that differs between the objectives.

    Args:
        objective: Which.
        student: A `Student`, or what wraps it.
        images: [B, 3, H, W], prepared by the student's spec.
        keep: Positions of the kept patches [B, K].
        target: The teacher's tokens [B, 1 + N, E] of the whole images, without gradient.
        cls_weight: As in `alignment_loss`.

    Returns:
        The total [] and its terms: "cls" and "patches" (the kept ones), and "masked" where there is a mask token.

    Source: UTA, section 4.4 and Table 6. The paper does not weigh "UTA + MIM": the two means are added.
    """
    patches = target.shape[1] - 1
    if objective in MASK_TOKEN_OBJECTIVES:
        mask = mask_of(keep, patches)  # [B, N]
        predicted = student(images, None, mask)  # [B, 1 + N, E]
        seen, terms = alignment_loss(take_kept(predicted, keep), take_kept(target, keep), cls_weight)
        masked = masked_loss(predicted, target, mask)
        return (masked if objective == "mim" else seen + masked), {**terms, "masked": masked}
    if keep.shape[1] == patches:  # all are kept: feature distillation
        return alignment_loss(student(images), target, cls_weight)
    return alignment_loss(student(images, keep), take_kept(target, keep), cls_weight)  # [B, 1 + K, E] both


def export(run: Run, config: UTAConfig, kept: int) -> None:
    """Write the student into RUN/encoder, as an encoder folder. All ranks take part: sharded weights are gathered."""
    state = run.weights()
    if not run.is_main or state is None:
        return
    state = {name.removeprefix("encoder."): tensor for name, tensor in state.items() if name.startswith("encoder.")}  # no mask token
    student = run.unwrap().encoder
    begun = f", begun with {config.encoder.start}" if config.encoder.start else ""
    student.config.origin = f"{config.objective.upper()}, teacher {config.teacher}, {run.step} steps{begun}"
    student.config.training = {
        "objective": config.objective,
        "teacher": config.teacher,
        "mask": config.mask.type,
        "ratio": config.mask.ratio,
        "kept_patches": kept,
        "step": run.step,
        "samples_seen": run.step * run.layout.global_batch_size,
    }
    with atomic_folder(run.folder / "encoder", overwrite=True) as folder:
        student.save_pretrained(str(folder), state_dict=state)
        student.spec.image_processor().save_pretrained(str(folder))


def open_images(config: UTAConfig, crop_spec: ImageSpec, masks: Masks, run: Run) -> ImageFolder:
    """Open the data; a crop of `crop_spec` serves both networks, the smaller one's is resized on the device."""
    low, high = config.data.scale
    return ImageFolder(
        config.data.root,
        crop_spec,
        seed=config.run.seed,
        scale=(low, high),
        flip=config.data.flip,
        on_bad_sample=config.data.on_bad_sample,
        bad_list=run.folder / "bad_samples.jsonl",
        cache=config.data.cache,
        extra=lambda epoch, index: {"keep": masks.keep(epoch, index)},
    )


def step_bound(config: UTAConfig, student: Student, teacher: Teacher, kept: int, run: Run) -> StepBound:
    """Count what a step of this process must compute; with mask tokens all N patches enter the student."""
    entering = None if config.objective in MASK_TOKEN_OBJECTIVES else kept
    return StepBound(
        teacher=forward_flops(teacher.encoder),
        student=forward_flops(student.encoder, entering),
        views=config.mask.views,
        batch=config.run.micro_batch_size * run.accumulation,
        peak=config.peak_tflops or peak_of(run.device, config.run.precision),
    )


def main(argv: Sequence[str] | None = None) -> Path:
    """Train, and give the run folder."""
    config = load_config(UTAConfig, argv, recipe_dir=RECIPES)
    find_images(config.data.root)  # before anything is written
    teacher = load_teacher(config.teacher)
    torch.manual_seed(config.run.seed)
    student = Student(build_student(config.encoder, teacher), mask_token=config.objective in MASK_TOKEN_OBJECTIVES)
    spec, num_patches = student.encoder.spec, student.encoder.num_patches
    masks = Masks(config.mask, student.encoder.grid, config.run.seed)
    run = Run(config.run, name="uta", settings=config)
    teacher.to(run.device, torch.bfloat16 if config.run.precision == "bf16" else None, compiled=config.encoder.compile or None)
    dataset = open_images(config, max(spec, teacher.spec, key=lambda spec: spec.size), masks, run)

    groups = param_groups(student, config.lr, config.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(config.betas[0], config.betas[1]), eps=config.eps)
    run.print(trainable_table(student, {"student": student, "teacher": teacher.encoder}, {"teacher": teacher.encoder.config.origin}))
    run.print(f"student: {describe(student.encoder)}\nteacher: {describe(teacher.encoder)}")
    run.print(
        f"{len(dataset)} images; {config.objective}, {config.mask.type}: {masks.kept} of {num_patches} patches kept, "
        f"{config.mask.views} view(s) of each crop"
    )
    bound = step_bound(config, student, teacher, masks.kept, run)
    run.print(bound.describe())
    if config.encoder.compile:
        student.compile_tokens()
    model, optimizer = run.prepare(student, optimizer)
    run.set_schedule(cosine_schedule(run.plan(dataset), config.warmup, config.final_lr / config.lr))

    speed: dict[str, float] = {}
    for batch in run.batches(dataset, default_collate):
        pixels, keep = batch["pixels"], batch["keep"].transpose(0, 1)  # uint8 [B, 3, S, S], [V, B, K]
        views = len(keep)
        target = teacher.tokens(to_images(pixels, teacher.spec)).repeat(views, 1, 1)  # [V B, 1 + N, E], without gradient
        images = to_images(pixels, spec).repeat(views, 1, 1, 1)  # [V B, 3, H, W]
        loss, terms = learn(config.objective, model, images, keep.flatten(0, 1), target, config.cls_weight)
        run.backward(loss, **terms)
        speed = bound.tick() if run.updated else speed
        run.log(**terms, **speed)

    export(run, config, masks.kept)
    if speed_found := bound.summary():
        run.print(speed_found)
    if bad := dataset.bad_images():
        run.print(f"{len(bad)} unreadable images were left out (bad_samples.jsonl):\n  " + "\n  ".join(bad.values()))
    return run.finish()


if __name__ == "__main__":
    cli_entry(main)
