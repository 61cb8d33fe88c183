"""LoRA on the queries and values of an encoder's attention, as ViSFT trains it, and merged back into plain weights.

    adapter = add_lora(encoder, LoraSettings(rank=64, alpha=1.0), seed=0)     # the encoder's output is what it was; A and B alone are trained
    adapter.check(images)                                                     # refuses a tower whose attention does not listen
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-5)
    adapter.merge()                                                           # an ordinary encoder again

Letters: d width, r rank, i block. In block i, W is the weight of the fused `qkv` (rows q|k|v), or of `q_proj` and `v_proj` apart:

    lora_A [2r, d]: rows 0:r for q, r:2r for v          lora_B [2d, r]: rows 0:d for q, d:2d for v
    dW = alpha / r * cat([B_q A_q, 0, B_v A_v])          the keys' rows stay as they are

The layers are peft's. On a fused qkv one peft layer of rank 2r holds both halves, in a B of [3d, 2r] whose other blocks are kept at exactly 0
by a hook on its gradient. Tensors leave this file in the layout above, never padded. train() and eval() never touch a weight: merging is one
call.

Source: ViSFT, eq. (1), and TencentARC/ViSFT's files: rank 64 and alpha 1, thus a scaling of 1/64; A uniform within 1/sqrt(d), B zero.
"""

import hashlib
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from encoders.lora_files import layout_names, write_adapter
from encoders.modeling import VisionEncoder
from mmkit.checkpoint import refuse_differences
from mmkit.errors import ConfigError, TrainingError

NAME = "default"  # peft's name of the only adapter


@dataclass(frozen=True)
class LoraSettings:
    """How large the change may be.

    Attributes:
        rank: r, rows of A for each of q and v.
        alpha: B A is scaled by alpha / r; the authors' files have 1.

    Raises:
        ConfigError: A number means nothing.
    """

    rank: int = 64
    alpha: float = 1.0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"LoRA's rank is {self.rank}; at least 1 is right (ViSFT has 64)")
        if not (self.alpha > 0 and math.isfinite(self.alpha)):
            raise ConfigError(f"LoRA's alpha is {self.alpha}; a number above 0 is right (ViSFT's files have 1)")


@dataclass(frozen=True)
class Target:
    """The attention of one block.

    Attributes:
        block: i.
        attention: The module that holds the linear layers.
        layers: Their names in it: ("qkv",), or ("q_proj", "v_proj").
    """

    block: int
    attention: nn.Module
    layers: tuple[str, ...]

    @property
    def fused(self) -> bool:
        """Whether q, k and v are one layer."""
        return len(self.layers) == 1

    @property
    def names(self) -> list[str]:
        """The layers' names, as messages and files give them."""
        return [f"blocks.{self.block}.attn.{layer}" for layer in self.layers]

    def modules(self) -> list[Any]:
        """The layers: linear, or peft's once there is LoRA."""
        return [getattr(self.attention, layer) for layer in self.layers]

    def a_and_b(self) -> Iterator[tuple[str, nn.Parameter, nn.Parameter]]:
        """Give each layer's name with its A and B, peft's way."""
        for name, module in zip(self.names, self.modules(), strict=True):
            yield name, module.lora_A[NAME].weight, module.lora_B[NAME].weight


def lora_targets(encoder: VisionEncoder) -> list[Target]:
    """Find the layers of every block that make queries and values.

    Raises:
        ConfigError: It is no single timm tower, has LoRA already, or a block has neither a `qkv` nor `q_proj` and `v_proj`.
    """
    if not isinstance(encoder, VisionEncoder):
        raise ConfigError(f"LoRA goes into one VisionEncoder; this is a {type(encoder).__name__}: name one of its towers")
    targets = []
    for number, block in enumerate(encoder.network.blocks):
        attention = getattr(block, "attn", None)
        found = next(
            (layers for layers in (("qkv",), ("q_proj", "v_proj")) if all(getattr(attention, layer, None) is not None for layer in layers)),
            None,
        )
        if attention is None or found is None:
            raise ConfigError(
                f"encoder '{encoder.config.origin}' ({encoder.config.architecture}): block {number} is a {type(block).__name__} whose attention "
                "has neither a layer 'qkv' nor 'q_proj' and 'v_proj'; LoRA has no place there"
            )
        target = Target(number, attention, found)
        for name, module in zip(target.names, target.modules(), strict=True):
            if type(module) is not nn.Linear:
                raise ConfigError(
                    f"encoder '{encoder.config.origin}': {name} is a {type(module).__name__}; a plain Linear was expected"
                    + (" (it has LoRA already: merge that first)" if hasattr(module, "lora_A") else "")
                )
        targets.append(target)
    return targets


def add_lora(encoder: VisionEncoder, settings: LoraSettings | None = None, seed: int = 0) -> "LoraAdapter":
    """Put LoRA into every block. Base weights are frozen in the type they have; A and B are float32; the output stays what it was.

    Args:
        encoder: Any tower of `load_encoder`; changed in place.
        settings: Rank and alpha; None takes the authors'.
        seed: Of A, whose numbers depend on nothing else.

    Raises:
        ConfigError: The encoder has no place for it (see `lora_targets`).
    """
    settings = settings or LoraSettings()
    targets = lora_targets(encoder)
    encoder.requires_grad_(False)
    separate = {}
    for target in targets:
        attention: Any = target.attention
        if hasattr(attention, "qkv_bias_separate"):  # else timm reads qkv.weight past peft's layer, and LoRA is silently skipped
            separate[target.block] = attention.qkv_bias_separate
            attention.qkv_bias_separate = True
    halves = 2 if targets[0].fused else 1
    names = [f"blocks.{target.block}.attn.{layer}" for target in targets for layer in target.layers]
    config = LoraConfig(r=halves * settings.rank, lora_alpha=halves * settings.alpha, target_modules=names)
    inject_adapter_in_model(config, encoder.network)
    adapter = LoraAdapter(encoder, settings, targets, separate)
    generator = torch.Generator().manual_seed(seed)
    for target in targets:
        for _, a, b in target.a_and_b():
            bound = a.shape[1] ** -0.5
            a.data = torch.empty(a.shape).uniform_(-bound, bound, generator=generator).to(a.device)
            b.data = torch.zeros(b.shape, device=a.device)
            a.requires_grad_(True)
            b.requires_grad_(True)
            if target.fused:
                b.register_hook(lambda grad, rank=settings.rank: _two_blocks(grad, rank))
    return adapter


def _two_blocks(padded: Tensor, rank: int) -> Tensor:
    """Keep the blocks of q and v of a B [3d, 2r]; the keys' rows and the cross blocks become 0."""
    width, kept = padded.shape[0] // 3, torch.zeros_like(padded)
    kept[:width, :rank] = padded[:width, :rank]
    kept[2 * width :, rank:] = padded[2 * width :, rank:]
    return kept


class LoraAdapter:
    """The LoRA of one encoder.

    Attributes:
        encoder: The encoder it is in.
        settings: Rank and alpha.
        targets: Its places, block by block.
        merged: Whether `merge` was called.
    """

    def __init__(self, encoder: VisionEncoder, settings: LoraSettings, targets: list[Target], separate: Mapping[int, bool]) -> None:
        self.encoder, self.settings, self.targets = encoder, settings, targets
        self.merged = False
        self._separate = dict(separate)
        self._final: dict[str, Tensor] | None = None
        self._hash = ""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Give what is trained, float32, by name: A and B of each layer, as peft holds them."""
        self._refuse_merged()
        for target in self.targets:
            for name, a, b in target.a_and_b():
                yield f"{name}.lora_A", a
                yield f"{name}.lora_B", b

    def parameters(self) -> Iterator[nn.Parameter]:
        """Give what is trained: two tensors for each layer."""
        for _, parameter in self.named_parameters():
            yield parameter

    # ---- the guard ---------------------------------------------------------------------------------------------------------------------

    def check(self, images: Tensor) -> None:
        """Try the adapter once: B to noise, forward and backward, B back. Nothing is left changed, no gradient stays.

        Args:
            images: [B, 3, H, W], as the encoder takes them; noise will do.

        Raises:
            TrainingError: The output stayed as it was, or a layer got no gradient: training would change nothing there.
        """
        named = dict(self.named_parameters())
        old = {name: parameter.detach().clone() for name, parameter in named.items() if name.endswith("lora_B")}
        grads = {name: parameter.grad for name, parameter in named.items()}
        try:
            with torch.no_grad():
                before = self.encoder(images).last_hidden_state
                self._noise()
            for parameter in named.values():
                parameter.grad = None
            with torch.enable_grad():
                after = self.encoder(images).last_hidden_state
                if after.requires_grad:
                    after.float().square().mean().backward()
            dead = [name for name, parameter in named.items() if parameter.grad is None or not bool(parameter.grad.any())]
            stayed = torch.equal(before, after)
        finally:
            with torch.no_grad():
                for name, value in old.items():
                    named[name].copy_(value)
            for name, parameter in named.items():
                parameter.grad = grads[name]
        if dead or stayed:
            what = f"{dead[0]} got no gradient ({len(dead)} of {len(named)} tensors)" if dead else "the output stayed as it was"
            raise TrainingError(
                f"LoRA does not work in '{self.encoder.config.origin}' ({self.encoder.config.architecture}): {what}. "
                "The attention reads its weight past the layer (timm's Eva without qkv_bias_separate does), or the tower gives zeros"
            )

    def _noise(self) -> None:
        """Fill the blocks of B with numbers that make LoRA's term about as large as the layer's input."""
        generator = torch.Generator().manual_seed(0)
        rank = self.settings.rank
        for target in self.targets:
            for _, _, b in target.a_and_b():
                noise = torch.empty(b.shape).normal_(0, rank**0.5 / self.settings.alpha, generator=generator)
                b.copy_(_two_blocks(noise, rank) if target.fused else noise)

    # ---- tensors in the published layout -----------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """Give A and B of all blocks in the published layout (top of this file), float32, on the CPU; after `merge`, what was merged."""
        if self._final is not None:
            return {name: tensor.clone() for name, tensor in self._final.items()}
        rank = self.settings.rank
        state: dict[str, Tensor] = {}
        for target in self.targets:
            pairs = [(a.detach().float().cpu(), b.detach().float().cpu()) for _, a, b in target.a_and_b()]
            if target.fused:
                a, b = pairs[0]
                width = b.shape[0] // 3
                b = torch.cat([b[:width, :rank], b[2 * width :, rank:]])
            else:
                a, b = (torch.cat(both) for both in zip(*pairs, strict=True))
            state |= dict(zip(layout_names(target.block), (a.clone(), b.clone()), strict=True))
        return state

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor], source: str = "the LoRA given") -> None:
        """Fill A and B from a state in the published layout.

        Raises:
            DataError: A block is missing, a tensor is left over or has another shape; both sides are named. Nothing is changed then.
            ConfigError: It is merged already.
        """
        self._refuse_merged()
        name = f"{self.encoder.config.origin} ({self.encoder.config.architecture}: {len(self.targets)} blocks, width {self.encoder.width})"
        refuse_differences(self.state(), state, source, f"{name} with LoRA of rank {self.settings.rank}")
        rank = self.settings.rank
        for target in self.targets:
            a, b = (state[key].float() for key in layout_names(target.block))
            if target.fused:
                width = b.shape[0] // 2
                padded = torch.zeros(3 * width, 2 * rank)
                padded[:width, :rank], padded[2 * width :, rank:] = b[:width], b[width:]
                parts = [(a, padded)]
            else:
                parts = list(zip(a.chunk(2), b.chunk(2), strict=True))
            for (_, own_a, own_b), (new_a, new_b) in zip(target.a_and_b(), parts, strict=True):
                own_a.copy_(new_a)
                own_b.copy_(new_b)

    def base_hash(self) -> str:
        """Give SHA-256 of the encoder without LoRA, its numbers rounded to bfloat16: one for a base in float32 and in bfloat16."""
        if not self._hash:
            self._hash = base_hash(self.encoder)
        return self._hash

    def save(self, path: Path | str, **more: Any) -> Path:
        """Write an adapter folder: A and B in the published layout, and what they are for. An older adapter of this name is replaced.

        Args:
            path: The folder to make.
            more: Other JSON values to keep.

        Raises:
            DataError: Something else lies at `path`.
        """
        about = {
            "rank": self.settings.rank,
            "alpha": self.settings.alpha,
            "targets": [name for target in self.targets for name in target.names],
            "base": self.base_hash(),
            "source": self.encoder.config.origin,
        }
        return write_adapter(self.state(), {**about, **more}, Path(path))

    # ---- the change itself -------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def change(self) -> list[float]:
        """Give |dW| / |W| of each block (Frobenius), over the rows of q and v: what to log."""
        self._refuse_merged()
        found = []
        for target in self.targets:
            changed = total = 0.0
            for module, delta in self._deltas(target):
                weight = module.base_layer.weight.float()
                if target.fused:
                    width = weight.shape[0] // 3
                    weight = torch.cat([weight[:width], weight[2 * width :]])
                changed, total = changed + float(delta.square().sum()), total + float(weight.square().sum())
            found.append(math.sqrt(changed / total) if total else math.inf if changed else 0.0)
        return found

    def _deltas(self, target: Target) -> Iterator[tuple[Any, Tensor]]:
        """Give each layer with the float32 matrix that is added to its weight."""
        rank, scaling = self.settings.rank, self.settings.alpha / self.settings.rank
        for module, (_, a, b) in zip(target.modules(), target.a_and_b(), strict=True):
            rows, columns = a.detach().float(), b.detach().float()
            if not target.fused:
                yield module, columns @ rows * scaling
                continue
            width = columns.shape[0] // 3
            queries, values = columns[:width, :rank] @ rows[:rank], columns[2 * width :, rank:] @ rows[rank:]
            yield module, torch.cat([queries, torch.zeros_like(queries), values]) * scaling

    @torch.no_grad()
    def merge(self) -> None:
        """Add dW to the weights, in float32, and take LoRA out: the encoder has its own names, shapes and types again. Twice is once."""
        if self.merged:
            return
        self.base_hash()
        self._final = self.state()
        if any(module.base_layer.weight.dtype == torch.bfloat16 for module in self.targets[0].modules()):
            warnings.warn(
                "LoRA is merged into bfloat16 weights: after 5k steps at ViSFT's settings nearly half of the entries stay as they were. "
                "Load the encoder in float32 (or float16) for the merge",
                stacklevel=2,
            )
        for target in self.targets:
            for layer, (module, delta) in zip(target.layers, list(self._deltas(target)), strict=True):
                add_delta(module.base_layer.weight, delta)
                setattr(target.attention, layer, module.base_layer)
            if target.block in self._separate:
                attention: Any = target.attention
                attention.qkv_bias_separate = self._separate[target.block]
        self.encoder.network.__dict__.pop("peft_config", None)
        self.merged = True

    def _refuse_merged(self) -> None:
        if self.merged:
            raise ConfigError("this LoRA is merged into its encoder: there is nothing left to train or load")


@torch.no_grad()
def add_delta(weight: Tensor, delta: Tensor) -> None:
    """Add a float32 matrix to a weight in place. Where it is 0 the weight keeps its bits (-0.0 + 0.0 would not)."""
    delta = delta.to(weight.device)
    weight.copy_(torch.where(delta == 0, weight, (weight.float() + delta).to(weight.dtype)))


def base_hash(encoder: VisionEncoder) -> str:
    """Give SHA-256 over names, shapes and bfloat16-rounded numbers of an encoder's tensors; LoRA in it does not count."""
    digest = hashlib.sha256()
    for name, tensor in sorted((name.replace(".base_layer.", "."), tensor) for name, tensor in encoder.state_dict().items()):
        if ".lora_" not in name:
            digest.update(f"{name} {list(tensor.shape)}".encode())
            digest.update(tensor.detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()
