"""JoinedEncoder: several encoders as one vision tower, which LLaVA takes, saves and loads like any other.

Letters as in encoders/modeling.py, with an index for the part: N_i patches, D_i width; D = D_1 + D_2 + ... is the width of the whole.

    channels      patch k of the whole is patch k of every part, side by side        [B, N, D]; the parts need one grid
    tokens        the patches of the parts one after another, each in the channels   [B, N_1 + N_2 + ..., D], zero outside of its part's
                  of its own part                                                    channels; any grids

Zero channels mean that the projector's first layer has a matrix of its own for each part, as if there were a projector for each: so parts of
any width can follow each other in front of LLaVA's one projector. A CLS token is kept where every part has exactly one: a token in front that
holds them side by side; other prefix tokens (registers, a CLS that another part has not) are left out.

One picture is decoded and framed once, as the first part's image spec says, at the size of the part that takes the largest; for each part it
is scaled down and renormalised to what that part was trained on.

The idea of channel and token concatenation: Eagle (Shi et al., 2024), Prismatic VLMs (Karamcheti et al., 2024).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from encoders.modeling import Layers, VisionEncoder, VisionEncoderConfig, layer_numbers
from mmkit.errors import ConfigError
from mmkit.images import ImageSpec, renormalise

JOINED_TYPE = "mmkit_joined_encoder"
Join = Literal["channels", "tokens"]


class JoinedEncoderConfig(PreTrainedConfig):
    """What is needed to build the parts again.

    Attributes:
        parts: The configuration of each part (`VisionEncoderConfig`).
        join: "channels" or "tokens".
        layers: Which hidden state of each part is used; None leaves the choice to who calls, the same for all.
        image_spec: How a picture becomes a row of `images`; None derives it from the parts.
        architecture, origin: The parts' own, for tables.
        hidden_size, num_hidden_layers, image_size: Read off the parts.
    """

    model_type = JOINED_TYPE

    parts: list[dict[str, Any]] | None = None
    join: str = "channels"
    layers: list[int] | None = None
    image_spec: dict[str, Any] | None = None
    architecture: str = ""
    origin: str = ""
    hidden_size: int | None = None
    num_hidden_layers: int | None = None
    image_size: int | None = None


class JoinedEncoder(PreTrainedModel):
    """Several `VisionEncoder`s behind the contract of one, see the top of this file. It has no joint image-text space.

    Raises:
        ConfigError: The parts cannot be joined in this way; the message names both sides.
    """

    config_class = JoinedEncoderConfig
    config: JoinedEncoderConfig
    main_input_name = "pixel_values"
    input_modalities = "image"
    _supports_sdpa = True
    _no_split_modules = VisionEncoder._no_split_modules

    joint_width = None

    def __init__(self, config: JoinedEncoderConfig) -> None:
        super().__init__(config)
        self.parts = nn.ModuleList(VisionEncoder(VisionEncoderConfig.from_dict(dict(part))) for part in config.parts or [])
        self._describe()
        self.post_init()

    @classmethod
    def of(cls, parts: Sequence[VisionEncoder], join: Join = "channels", layers: Sequence[int] | None = None) -> JoinedEncoder:
        """Join loaded encoders; they are not copied.

        Args:
            parts: Two or more.
            join: See the top of this file.
            layers: A hidden state for each part (-1 is the last); None leaves the choice to who calls.
        """
        dtypes = sorted({str(next(part.parameters()).dtype) for part in parts})
        if len(dtypes) > 1:
            raise ConfigError(f"encoders to be joined have weights of types {' and '.join(dtypes)}: convert them to one, .float() say")
        config = JoinedEncoderConfig(parts=[part.config.to_dict() for part in parts], join=join, layers=list(layers) if layers else None)
        with torch.device("meta"):
            joined = cls(config)
        joined.parts = nn.ModuleList(parts)
        return joined.eval()

    def _describe(self) -> None:
        """Refuse parts that do not fit each other, and write into the configuration what others read off it."""
        config, parts = self.config, self._parts
        names = [part.config.origin for part in parts]
        if len(parts) < 2:
            raise ConfigError(f"a joined encoder has two parts or more, here {len(parts)} ({', '.join(names) or 'none'})")
        if config.join not in ("channels", "tokens"):
            raise ConfigError(f"encoders are joined by 'channels' or by 'tokens', not by '{config.join}'")
        if config.layers is not None and len(config.layers) != len(parts):
            raise ConfigError(f"layers {config.layers} of {len(parts)} encoders: give one for each, or none")
        for part, layer in zip(parts, config.layers or [], strict=False):
            layer_numbers(layer, part.config.num_hidden_layers or 0)
        for part in parts[1:]:
            if config.join == "channels" and part.grid != parts[0].grid:
                (a, b), (c, d) = parts[0].grid, part.grid
                raise ConfigError(
                    f"'{names[0]}' has {a} x {b} patches, '{part.config.origin}' has {c} x {d}: channels are joined patch by patch and need "
                    f"one grid. Convert one (SOURCE@{part.config.image_size and a * (part.config.patch_size or 1)}px for the second), or join "
                    "their tokens: tokens:A+B"
                )
        first = parts[0].spec
        size = max(part.spec.size for part in parts)
        config.image_spec = config.image_spec or {**first.to_dict(), "size": size}
        config.architecture = " + ".join(part.config.architecture for part in parts)
        config.origin = f" {'+' if config.join == 'channels' else 'then'} ".join(names)
        config.hidden_size, config.image_size = sum(part.width for part in parts), config.image_spec["size"]
        config.num_hidden_layers = min(part.config.num_hidden_layers or 0 for part in parts)
        config.parts = [part.config.to_dict() for part in parts]

    @property
    def _parts(self) -> list[VisionEncoder]:
        return list(self.parts)  # type: ignore[arg-type]

    @property
    def spec(self) -> ImageSpec:
        """How a picture becomes a row of `images`: framed as for the first part, at the largest size."""
        return ImageSpec.from_dict(self.config.image_spec or {})

    @property
    def width(self) -> int:
        """D, the sum of the parts' widths."""
        return sum(part.width for part in self._parts)

    @property
    def grid(self) -> tuple[int, int]:
        """Patches down and across: of all parts, or where tokens are joined of the first."""
        return self._parts[0].grid

    @property
    def num_patches(self) -> int:
        """N, patches per image, those of all parts where tokens are joined."""
        counts = [part.num_patches for part in self._parts]
        return counts[0] if self.config.join == "channels" else sum(counts)

    @property
    def num_prefix_tokens(self) -> int:
        """P, 1 where every part has a CLS and nothing else in front of its patches, otherwise 0."""
        return int(all(part.num_prefix_tokens == 1 for part in self._parts))

    def get_input_embeddings(self) -> nn.Module:
        """Give the first part's patch embedding (what transformers hooks to make inputs require gradients)."""
        return self._parts[0].get_input_embeddings()

    def forward(
        self, pixel_values: Tensor, output_hidden_states: Layers = None, return_dict: bool | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling | tuple[Any, ...]:
        """Encode whole images.

        Args:
            pixel_values: Images [B, 3, H, W], prepared by `spec`.
            output_hidden_states: As for `VisionEncoder`. Parts of unlike depth are counted from their ends: -2 is the last but one of each,
                and a positive number means what it means in the shallowest. Where the configuration fixes `layers`, there is -1 alone.
            return_dict: False gives a tuple.
            kwargs: Switches that transformers passes to every tower; nothing here reads them.

        Returns:
            last_hidden_state [B, P + N, D], hidden_states when asked for, pooler_output [B, sum of the parts'].

        Raises:
            ConfigError: A layer is asked for where the configuration fixes others.
        """
        fixed, depth = self.config.layers, self.config.num_hidden_layers or 0
        if fixed is not None:
            if output_hidden_states not in (None, False, True) and set(_listed(output_hidden_states)) != {-1}:
                raise ConfigError(
                    f"the layers of this encoder's parts are fixed ({fixed}): it has one hidden state, -1, and {output_hidden_states} was asked "
                    "for. Set --feature_layer -1"
                )
            asked = [[layer] for layer in fixed]
        else:
            wanted = sorted(layer_numbers(output_hidden_states, depth))
            asked = [[number - depth - 1 for number in wanted]] * len(self.parts)
        found = [
            part(self._for_part(pixel_values, part), output_hidden_states=layers) for part, layers in zip(self._parts, asked, strict=True)
        ]
        if fixed is not None:
            last = self._join([out.hidden_states[layer] for out, layer in zip(found, fixed, strict=True)])
            states: tuple[Tensor | None, ...] | None = (last,)
        else:
            last = self._join([out.last_hidden_state for out in found])
            joined = {number: self._join([out.hidden_states[number - depth - 1] for out in found]) for number in wanted}
            states = tuple(map(joined.get, range(depth + 1))) if wanted else None
        pooled = torch.cat([out.pooler_output for out in found], dim=-1)
        output = BaseModelOutputWithPooling(last_hidden_state=last, pooler_output=pooled, hidden_states=states)
        return output.to_tuple() if return_dict is False else output

    def _for_part(self, images: Tensor, part: VisionEncoder) -> Tensor:
        """Scale and renormalise images [B, 3, H, W] from this encoder's spec to a part's."""
        ours, theirs = self.spec, part.spec
        if images.dim() != 4 or tuple(images.shape[1:]) != (3, ours.size, ours.size):
            raise ValueError(
                f"images are {list(images.shape)}; this encoder takes [B, 3, {ours.size}, {ours.size}]: use encoder.spec.transform()"
            )
        if theirs.size == ours.size:
            return renormalise(images, ours, theirs)
        mean, std = (images.new_tensor(values, dtype=torch.float32).view(3, 1, 1) for values in (ours.mean, ours.std))
        shown = F.interpolate(images.float() * std + mean, (theirs.size, theirs.size), mode="bicubic", antialias=True)
        shown = (shown * 255).round().clamp(0, 255) / 255  # to whole grey levels, as a decoded picture has
        mean, std = (images.new_tensor(values, dtype=torch.float32).view(3, 1, 1) for values in (theirs.mean, theirs.std))
        return (shown - mean) / std

    def _join(self, tokens: Sequence[Tensor]) -> Tensor:
        """Join the parts' tokens [B, P_i + N_i, D_i] into [B, P + N, D]."""
        patches = [found[:, part.num_prefix_tokens :] for found, part in zip(tokens, self._parts, strict=True)]
        if self.config.join == "tokens":
            before, placed = 0, []
            for found in patches:
                after = self.width - before - found.shape[-1]
                placed.append(F.pad(found, (before, after)))
                before += found.shape[-1]
            body = torch.cat(placed, dim=1)
        else:
            body = torch.cat(patches, dim=-1)
        if not self.num_prefix_tokens:
            return body
        return torch.cat([torch.cat([found[:, :1] for found in tokens], dim=-1), body], dim=1)


def _listed(layers: Any) -> Sequence[Any]:
    return layers if isinstance(layers, Sequence) else [layers]


AutoConfig.register(JOINED_TYPE, JoinedEncoderConfig, exist_ok=True)
AutoModel.register(JoinedEncoderConfig, JoinedEncoder, exist_ok=True)
