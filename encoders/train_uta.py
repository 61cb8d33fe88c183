"""Unmasked Token Alignment: a student that sees part of a picture learns the tokens a frozen CLIP tower gives for all of it.

    python encoders/train_uta.py --recipe mini_uta --data.root IMAGES --output_dir runs/uta
    torchrun --nproc_per_node 8 encoders/train_uta.py --recipe uta_vit_b14 --data.root IN21K_FOLDER --output_dir runs/uta_b14

The teacher's image embedding and patch tokens, projected into the joint image-text space, are the targets; the student, a vision
transformer with random weights, is given CLS and the kept patches alone and has a linear head into the same space. So its CLS output can be
compared with the teacher's text tower, although no text is used here. The run folder then holds `encoder/`, a VisionEncoder folder.

Source: Enhancing Vision-Language Model with Unmasked Token Alignment (UTA). Departures: the student begins with timm's initialisation
instead of EVA-02's, and `cls_weight` may give CLS a larger share of the loss than 1 / (1 + K), which is the paper's plain mean.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

if __package__ in (None, ""):  # started as a file: its folder is on sys.path, the packages' folder is not
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from timm.models import is_model_in_modules
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import default_collate

from encoders.catalog import describe
from encoders.image_data import ImageFolder, find_images
from encoders.masking import MaskConfig, Masks
from encoders.modeling import VisionEncoder, VisionEncoderConfig
from encoders.teachers import Teacher, check_grids, load_teacher
from mmkit.checkpoint import atomic_folder
from mmkit.config import cli_entry, load_config
from mmkit.errors import ConfigError
from mmkit.images import ImageSpec, to_images
from mmkit.optim import cosine_schedule, param_groups
from mmkit.run import Run, RunConfig
from mmkit.trainable import trainable_table

RECIPES = Path(__file__).parent / "recipes"


@dataclass
class StudentConfig:
    """The network to be trained."""

    architecture: str = field(default="eva02_base_patch14_224", metadata={"help": "a timm VisionTransformer or Eva"})
    model_args: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "its arguments: img_size, patch_size, embed_dim, depth, ..."}
    )


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

    teacher: str = field(default="mini-clip", metadata={"help": "a CLIP-like encoder: a name, or a folder"})
    cls_weight: float | None = field(default=None, metadata={"help": "share of CLS in the loss; none is 1 / (1 + K), the mean over tokens"})
    lr: float = field(default=1.5e-3, metadata={"help": "peak learning rate"})
    final_lr: float = field(default=1e-5, metadata={"help": "learning rate that the cosine ends at"})
    warmup: float = field(default=0.01, metadata={"help": "steps, or share of all steps if below 1"})
    weight_decay: float = field(default=0.05, metadata={"help": "of matrices"})
    betas: list[float] = field(default_factory=lambda: [0.9, 0.98], metadata={"help": "AdamW's"})
    eps: float = field(default=1e-6, metadata={"help": "AdamW's"})
    encoder: StudentConfig = field(default_factory=StudentConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    data: DataConfig = field(default_factory=DataConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def validate(self) -> None:
        """Refuse a share that is none."""
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


def build_student(config: StudentConfig, teacher: Teacher) -> VisionEncoder:
    """Build a student with random weights, whose head ends in the teacher's joint space.

    Raises:
        ConfigError: The network cannot be built, or sees another grid than the teacher.
    """
    args = dict(config.model_args)
    if args.setdefault("global_pool", "token") != "token":  # the EVA-02 entries default to 'avg', which has no CLS target
        raise ConfigError(f"encoder.model_args.global_pool is '{args['global_pool']}'; UTA trains CLS, so 'token' is right")
    if is_model_in_modules(config.architecture, ["eva"]):
        # timm's 0.001 makes the head's gradient 400 times the trunk's: a clipped step would then move the head alone
        args.setdefault("head_init_scale", 1.0)
    try:
        student = VisionEncoder(
            VisionEncoderConfig(
                architecture=config.architecture, model_args=args, joint_width=teacher.joint_width, text_tower=teacher.text_tower
            )
        )
    except ValueError as error:
        raise ConfigError(f"encoder.architecture '{config.architecture}': {error}") from error
    t = teacher.spec
    spec = ImageSpec(student.config.image_size or 0, t.mean, t.std, t.interpolation, t.resize)  # crop_pct 1: timm's 0.9 is for classifiers
    student.config.image_spec = spec.to_dict()
    check_grids(student, teacher)
    return student


def export(run: Run, model: Any, config: UTAConfig, kept: int) -> None:
    """Write the student into RUN/encoder, as an encoder folder. All ranks take part: sharded weights are gathered."""
    state = run.accelerator.get_state_dict(model)
    if not run.is_main:
        return
    student: VisionEncoder = run.unwrap()
    student.config.origin = f"UTA, teacher {config.teacher}, {run.step} steps"
    student.config.training = {
        "objective": "uta",
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


def main(argv: Sequence[str] | None = None) -> Path:
    """Train, and give the run folder."""
    config = load_config(UTAConfig, argv, recipe_dir=RECIPES)
    find_images(config.data.root)  # before anything is written
    teacher = load_teacher(config.teacher)
    torch.manual_seed(config.run.seed)
    student = build_student(config.encoder, teacher)
    masks = Masks(config.mask, student.grid, config.run.seed)
    run = Run(config.run, name="uta", settings=config)
    teacher.to(run.device, torch.bfloat16 if config.run.precision == "bf16" else None)
    low, high = config.data.scale
    crop_spec = max(student.spec, teacher.spec, key=lambda spec: spec.size)  # one crop for both; the smaller one's is resized on the device
    dataset = ImageFolder(
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

    groups = param_groups(student, config.lr, config.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(config.betas[0], config.betas[1]), eps=config.eps)
    run.print(trainable_table(student, {"student": student, "teacher": teacher.encoder}, {"teacher": teacher.encoder.config.origin}))
    run.print(f"student: {describe(student)}\nteacher: {describe(teacher.encoder)}")
    run.print(
        f"{len(dataset)} images; {config.mask.type}: {masks.kept} of {student.num_patches} patches kept, "
        f"{config.mask.views} view(s) of each crop"
    )
    model, optimizer = run.prepare(student, optimizer)
    run.set_schedule(cosine_schedule(run.plan(dataset), config.warmup, config.final_lr / config.lr))

    for batch in run.batches(dataset, default_collate):
        pixels, keep = batch["pixels"], batch["keep"].transpose(0, 1)  # uint8 [B, 3, S, S], [V, B, K]
        views = len(keep)
        target = teacher.tokens(to_images(pixels, teacher.spec)).repeat(views, 1, 1)  # [V B, 1 + N, E], without gradient
        images = to_images(pixels, student.spec).repeat(views, 1, 1, 1)  # [V B, 3, H, W]
        keep = keep.flatten(0, 1)  # [V B, K]
        predicted = run.forward(VisionEncoder.tokens, images, keep)  # [V B, 1 + K, E]
        loss, terms = alignment_loss(predicted, take_kept(target, keep), config.cls_weight)
        run.backward(loss, **terms)
        run.log(**terms)

    export(run, model, config, masks.kept)
    if bad := dataset.bad_images():
        run.print(f"{len(bad)} unreadable images were left out (bad_samples.jsonl):\n  " + "\n  ".join(bad.values()))
    return run.finish()


if __name__ == "__main__":
    cli_entry(main)
