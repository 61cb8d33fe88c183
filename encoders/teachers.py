"""Teachers: frozen CLIP-like towers that give one target in the joint image-text space for the image and for each of its patches."""

from collections.abc import Callable

import torch
from torch import Tensor

from encoders.catalog import describe, load_encoder
from encoders.modeling import VisionEncoder
from mmkit.errors import ConfigError
from mmkit.images import ImageSpec
from mmkit.trainable import freeze

TOLERANCE = 2e-5  # float32: token 0 and the pooled output take the same way through the head, in batches of other shapes


class Teacher:
    """A frozen encoder with a joint space, asleep for good.

    It is no part of the student's module: neither checkpoints nor `prepare` see it. Whatever it was made from (an open_clip or
    transformers model, an encoder folder), its targets are those of `VisionEncoder.tokens`.

    Args:
        encoder: The tower.
        source: What it was loaded by.

    Raises:
        ConfigError: It has no joint space, or its token path does not end in its own image embedding.
    """

    def __init__(self, encoder: VisionEncoder, source: str) -> None:
        if encoder.joint_width is None:
            raise ConfigError(f"teacher '{source}' has no joint image-text space ({describe(encoder)}); name a CLIP-like encoder")
        self.source, self.joint_width = source, encoder.joint_width
        self.encoder: VisionEncoder = freeze(encoder)
        self._tokens: Callable[[Tensor], Tensor] = self.encoder.tokens
        self._assert_tokens()

    @property
    def spec(self) -> ImageSpec:
        """How images are prepared for it."""
        spec: ImageSpec = self.encoder.spec
        return spec

    @property
    def grid(self) -> tuple[int, int]:
        """Patches down and across."""
        return self.encoder.grid

    @property
    def text_tower(self) -> str | None:
        """The text tower of the same joint space."""
        return self.encoder.config.text_tower

    @torch.no_grad()  # not inference_mode: its tensors may not enter a loss that saves them for backward
    def tokens(self, images: Tensor) -> Tensor:
        """Give the targets [B, 1 + N, E] of images [B, 3, H, W] prepared by `spec`: the image's embedding, then its patches', in order."""
        return self._tokens(images)

    def to(self, device: torch.device, dtype: torch.dtype | None = None, compiled: bool | None = None) -> "Teacher":
        """Move it, and compile it where that pays.

        Args:
            device: Where to.
            dtype: bfloat16 weights save casting them anew in each step. None leaves them as they are.
            compiled: None is yes on a GPU, no elsewhere. Batches should keep their size: each new one is compiled anew.
        """
        self.encoder.network.to(device=device, dtype=dtype)
        compiled = torch.device(device).type == "cuda" if compiled is None else compiled
        self._tokens = torch.compile(self.encoder.tokens, dynamic=False) if compiled else self.encoder.tokens
        return self

    @torch.no_grad()
    def _assert_tokens(self) -> None:
        """Check that token 0 is what the tower itself says of the image: a wrong head or pooling would train a student towards nothing."""
        images = torch.randn(2, 3, self.spec.size, self.spec.size, generator=torch.Generator().manual_seed(0))
        images = images.to(next(self.encoder.parameters()).device)
        try:
            tokens, pooled = self.encoder.tokens(images), self.encoder(images).pooler_output
        except ValueError as error:
            raise ConfigError(f"teacher '{self.source}': {error}") from error
        difference = float((tokens[:, 0] - pooled).abs().max())
        if not difference <= TOLERANCE * max(1.0, float(pooled.abs().max())):
            raise ConfigError(
                f"teacher '{self.source}': its token path ends {difference:.1e} away from its own image embedding; it cannot teach tokens"
            )


def load_teacher(source: str) -> Teacher:
    """Load a teacher by any name or folder that `load_encoder` takes, in float32 on the CPU.

    Raises:
        NameNotFound: There is none of this name.
        ConfigError: It cannot teach.
    """
    return Teacher(load_encoder(source).float(), source)


def check_grids(student: VisionEncoder, teacher: Teacher) -> None:
    """Refuse grids that differ: a target must belong to the same place in the picture.

    Raises:
        ConfigError: They do; the message names both, and what would make them equal.
    """
    if student.grid != teacher.grid:
        patch = student.spec.size // student.grid[0]
        size = patch * teacher.grid[0]
        raise ConfigError(
            f"the student sees {student.grid[0]} x {student.grid[1]} patches ({student.spec.size} px, patch {patch}), "
            f"the teacher '{teacher.source}' {teacher.grid[0]} x {teacher.grid[1]} ({teacher.spec.size} px). "
            f"Give the student the same grid: --encoder.model_args.img_size {size}, or another patch_size; or give the teacher the student's: "
            f"mmkit convert resize {teacher.source} OUT --image_size {teacher.spec.size // teacher.grid[0] * student.grid[0]}"
        )


def check_student(student: VisionEncoder, teacher: Teacher) -> None:
    """Refuse a student that this teacher cannot teach: one with a head to another space, or with another grid.

    Raises:
        ConfigError: The widths or the grids differ; the message names both sides.
    """
    if student.joint_width != teacher.joint_width:
        head = f"ends in {student.joint_width} channels" if student.joint_width else "has no head to a joint space"
        raise ConfigError(
            f"the student '{student.config.origin}' {head}, the teacher '{teacher.source}' gives targets of {teacher.joint_width}: "
            "nothing is projected between them; take a student with such a head (a new one, without --encoder.start, has it), "
            "or the teacher it was trained towards"
        )
    check_grids(student, teacher)
