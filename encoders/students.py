"""Students: vision transformers with random weights that end in a teacher's joint space, and the mask token that trains beside them.

Letters as in modeling.py: B images, N patches, K kept ones, D width, E width of the joint space.
"""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from timm.models import is_model_in_modules
from torch import Tensor, nn

from encoders.catalog import load_encoder
from encoders.modeling import VisionEncoder, VisionEncoderConfig
from encoders.teachers import Teacher, check_student
from mmkit.errors import ConfigError
from mmkit.images import ImageSpec

MASK_TOKEN_STD = 0.02


@dataclass
class StudentConfig:
    """The network to be trained."""

    architecture: str = field(default="eva02_base_patch14_224", metadata={"help": "a timm VisionTransformer or Eva"})
    model_args: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "its arguments: img_size, patch_size, embed_dim, depth, drop_path_rate, ..."}
    )
    absolute_positions: bool = field(default=True, metadata={"help": "add a learnt position embedding to CLS and patches"})
    rotary_positions: bool = field(default=True, metadata={"help": "turn queries and keys by their places, where the network can (Eva)"})
    init: Literal["timm", "eva02"] = field(default="timm", metadata={"help": "first weights: timm's of the network, or EVA-02's rule"})
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "compute blocks again in the backward: a third slower, less memory"}
    )
    compile: bool = field(default=False, metadata={"help": "torch.compile student and teacher: K is constant, so it happens once"})
    start: str = field(default="", metadata={"help": "begin with the weights of this encoder, a name or folder, not with random ones"})

    def validate(self) -> None:
        """Refuse to build what is loaded.

        Raises:
            ConfigError: `start` is given, and settings of a new network beside it.
        """
        for name in ("architecture", "model_args", "absolute_positions", "rotary_positions", "init") if self.start else ():
            if getattr(self, name) != getattr(StudentConfig(), name):
                raise ConfigError(
                    f"encoder.start {self.start} brings its network along, and encoder.{name} {getattr(self, name)} describes a new one"
                )


class Student(nn.Module):
    """A vision encoder in training, with the mask token where an objective has one.

    Its weights are named `encoder.*` and `mask_token`; the encoder alone is exported, for the mask token has no part in the trained network
    (and timm's checkpoint filter takes a file with one for another layout).

    Args:
        encoder: The network.
        mask_token: Learn a token that stands for removed patches (MIM).
    """

    def __init__(self, encoder: VisionEncoder, mask_token: bool = False) -> None:
        super().__init__()
        self.encoder = encoder
        self.mask_token: nn.Parameter | None = None
        if mask_token:
            self.mask_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(encoder.width), std=MASK_TOKEN_STD))  # [D]
        self._mask: Tensor | None = None
        self._tokens: Any = encoder.tokens
        encoder.network.patch_embed.register_forward_hook(self._put_mask_tokens)

    def forward(self, images: Tensor, keep: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Give tokens in the joint space.

        Args:
            images: [B, 3, H, W], prepared by the encoder's spec.
            keep: Patch positions [B, K] that enter the network, CLS not counted. None is all N.
            mask: bool [B, N], True where the mask token takes the patch's place, before the position embedding. None is nowhere.

        Returns:
            [B, 1 + K, E], CLS first.

        Raises:
            ValueError: A mask is given and there is no mask token.
        """
        if mask is not None and self.mask_token is None:
            raise ValueError("this student has no mask token: it was built for an objective that removes patches instead")
        self._mask = mask
        try:
            tokens: Tensor = self._tokens(images, keep)
            return tokens
        finally:
            self._mask = None

    def _put_mask_tokens(self, _: nn.Module, __: Any, patches: Tensor) -> Tensor | None:
        """Replace masked patches of [B, N, D] as they leave the patch embedding."""
        if self._mask is None or self.mask_token is None:
            return None
        return torch.where(self._mask.unsqueeze(-1), self.mask_token.to(patches.dtype), patches)

    def compile_tokens(self) -> None:
        """Compile the way from images to tokens. B may change later, at the cost of one more compilation; K is a constant of the graph."""
        self._tokens = torch.compile(self.encoder.tokens)


def build_student(config: StudentConfig, teacher: Teacher) -> VisionEncoder:
    """Build a student whose head ends in the teacher's joint space: with random weights, or with those of `config.start`.

    Raises:
        NameNotFound: There is no encoder of the name to start with.
        ConfigError: The network cannot be built, ends in another space, or sees another grid than the teacher.
    """
    student = loaded_student(config.start) if config.start else new_student(config, teacher)
    student.config.text_tower = teacher.text_tower
    check_student(student, teacher)
    if config.gradient_checkpointing:
        student.network.set_grad_checkpointing(True)
    return student


def loaded_student(source: str) -> VisionEncoder:
    """Load an encoder to go on with, in float32.

    Raises:
        NameNotFound: There is none of this name.
        ConfigError: It gives no tokens in a joint space, as where it pools by attention.
    """
    student = load_encoder(source).float()
    try:
        with torch.no_grad():
            student.tokens(torch.zeros(1, 3, student.spec.size, student.spec.size))
    except ValueError as error:
        raise ConfigError(f"encoder.start {source}: {error}") from error
    return student


def new_student(config: StudentConfig, teacher: Teacher) -> VisionEncoder:
    """Build a network with random weights, which sees pictures as the teacher does, at its own size.

    Raises:
        ConfigError: The network cannot be built.
    """
    try:
        student = VisionEncoder(
            VisionEncoderConfig(architecture=config.architecture, model_args=network_args(config), joint_width=teacher.joint_width)
        )
    except ValueError as error:
        raise ConfigError(f"encoder.architecture '{config.architecture}': {error}") from error
    t = teacher.spec
    spec = ImageSpec(student.config.image_size or 0, t.mean, t.std, t.interpolation, t.resize)  # crop_pct 1: timm's 0.9 is for classifiers
    student.config.image_spec = spec.to_dict()
    if config.init == "eva02":
        eva02_init(student.network)
    return student


def network_args(config: StudentConfig) -> dict[str, Any]:
    """Give the arguments for timm: the user's own, and what keeps clear of the traps in its entries.

    Raises:
        ConfigError: Tokens are to be averaged, or the network cannot do without its positions.
    """
    args, eva = dict(config.model_args), is_model_in_modules(config.architecture, ["eva"])
    if args.setdefault("global_pool", "token") != "token":  # the EVA-02 entries default to 'avg', which has no CLS target
        raise ConfigError(f"encoder.model_args.global_pool is '{args['global_pool']}'; UTA trains CLS, so 'token' is right")
    if eva:
        # timm's 0.001 makes the head's gradient 400 times the trunk's: a clipped step would then move the head alone
        args.setdefault("head_init_scale", 1.0)
        if not config.rotary_positions:
            args["use_rot_pos_emb"] = False
    if not config.absolute_positions:
        args |= {"use_abs_pos_emb": False} if eva else {"pos_embed": "none"}
    return args


@torch.no_grad()
def eva02_init(network: nn.Module) -> None:
    """Fill a fresh Eva network with EVA-02's first weights.

    Matrices are Xavier-normal and the patch kernel Xavier-uniform, biases 0; then the values' projection, attention's output and the MLP's
    matrices grow by sqrt(ln(2 L)), L blocks, which keeps the variance of a network with a norm inside its MLP.

    Raises:
        ConfigError: The network has no value projection of its own.

    Source: EVA-02 (Fang et al., 2023), after Foundation Transformers' sub-LayerNorm rule.
    """
    blocks: Any = network.blocks
    if getattr(blocks[0].attn, "v_proj", None) is None:
        raise ConfigError(
            f"encoder.init eva02 scales the projection of values alone; {type(network).__name__} keeps it in one matrix with queries and keys: "
            "take an eva02_base or eva02_large entry (any size, by model_args), or --encoder.init timm"
        )
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    patch_embed: Any = network.patch_embed
    nn.init.xavier_uniform_(patch_embed.proj.weight.flatten(1))
    nn.init.zeros_(patch_embed.proj.bias)
    scale = math.sqrt(math.log(2 * len(blocks)))
    for block in blocks:
        grown = [block.attn.v_proj, block.attn.proj, *(part for part in block.mlp.modules() if isinstance(part, nn.Linear))]
        for part in grown:
            part.weight.mul_(scale)
