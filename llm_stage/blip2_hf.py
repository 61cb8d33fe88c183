"""BLIP-2 between this kit and transformers: names of weights, the EVA tower both ways, and whole folders.

What transformers has no room for (temperature and language head of stage 1) goes into a file beside its own, `mmkit_stage1.safetensors`, and
comes back from there. Its vision norm runs with eps 1e-6, LAVIS' and ours with 1e-5; a configuration of transformers cannot say so.

Source: the names are LAVIS' (eva_vit.py) and transformers' (modeling_blip_2.py); BLIP-2 runs 39 of EVA-ViT-G's 40 blocks and no final norm.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Blip2Config, Blip2VisionConfig, PreTrainedConfig

from encoders.modeling import VisionEncoder
from encoders.official import Checkpoint, OfficialModel, image_tower
from llm_stage.qformer import QFormerConfig
from mmkit.errors import ConfigError, DataError
from mmkit.images import ImageSpec

EVA = "eva_giant_patch14_clip_224"
SIDE_FILE = "mmkit_stage1.safetensors"
SIDE_KEYS = re.compile(r"^(temp|cls\..*)$")
_OUTSIDE = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.weight": "embeddings.patch_embedding.weight",
    "patch_embed.proj.bias": "embeddings.patch_embedding.bias",
}
_INSIDE = {
    f"{ours}.{kind}": f"{theirs}.{kind}"
    for ours, theirs in (
        ("norm1", "layer_norm1"), ("norm2", "layer_norm2"), ("attn.proj", "self_attn.projection"), ("mlp.fc1", "mlp.fc1"), ("mlp.fc2", "mlp.fc2"),
    )
    for kind in ("weight", "bias")
} | {"attn.qkv.weight": "self_attn.qkv.weight"}  # fmt: skip
_DROPPED = ("norm.", "head.")


def blocks_read(encoder: nn.Module, layer: int) -> int:
    """How many blocks of an encoder are run where its hidden state `layer` is read."""
    config: Any = encoder.config
    depth = int(config.num_hidden_layers)
    return layer if layer >= 0 else depth + 1 + layer


def vision_to_hf(encoder: nn.Module, layer: int) -> tuple[dict[str, Tensor], Blip2VisionConfig, list[str]]:
    """Give an EVA tower's weights by the names of transformers' `Blip2VisionModel`, without its last norm.

    Args:
        encoder: A VisionEncoder with EVA-CLIP's first network (learned positions, fused qkv without a key bias).
        layer: The hidden state that is read; blocks behind it, final norm and head are left out.

    Returns:
        The weights, the configuration, and what was left out.

    Raises:
        ConfigError: It is another network.
    """
    if not isinstance(encoder, VisionEncoder):
        raise ConfigError(f"transformers' BLIP-2 has a tower of EVA-CLIP's form; {type(encoder).__name__} is none")
    state, blocks = encoder.network.state_dict(), blocks_read(encoder, layer)
    found: dict[str, Tensor] = {}
    dropped: list[str] = []
    strange: list[str] = []
    for key, tensor in state.items():
        if key in _OUTSIDE:
            found[_OUTSIDE[key]] = tensor
        elif (match := re.match(r"blocks\.(\d+)\.(.*)", key)) and int(match[1]) < blocks:
            if match[2] in _INSIDE:
                found[f"encoder.layers.{match[1]}.{_INSIDE[match[2]]}"] = tensor
            elif match[2] == "attn.q_bias":
                biases = [tensor, torch.zeros_like(tensor), state[f"blocks.{match[1]}.attn.v_bias"]]
                found[f"encoder.layers.{match[1]}.self_attn.qkv.bias"] = torch.cat(biases)
            elif match[2] not in ("attn.v_bias", "attn.k_bias"):  # a key bias is a table of zeros in timm
                strange.append(key)
        elif match or key.startswith(_DROPPED):
            dropped.append((match and f"blocks.{match[1]}") or key)
        else:
            strange.append(key)
    if strange or len(found) != len(_OUTSIDE) + blocks * (len(_INSIDE) + 1):
        raise ConfigError(
            f"{encoder.config.architecture} is not of EVA-CLIP's first form, which transformers' BLIP-2 has as its tower"
            + (f": it has {strange[0]}" if strange else ": it lacks some of its weights")
        )
    return found, _vision_config(encoder, found, blocks), list(dict.fromkeys(dropped))


def _vision_config(encoder: VisionEncoder, state: Mapping[str, Tensor], blocks: int) -> Blip2VisionConfig:
    kernel = state["embeddings.patch_embedding.weight"]
    network: Any = encoder.network
    return Blip2VisionConfig(
        hidden_size=kernel.shape[0], intermediate_size=state["encoder.layers.0.mlp.fc1.weight"].shape[0], num_hidden_layers=blocks,
        num_attention_heads=network.blocks[0].attn.num_heads, image_size=encoder.spec.size, patch_size=kernel.shape[-1], layer_norm_eps=1e-6,
        initializer_range=0.02,
    )  # fmt: skip


def vision_from_hf(state: Mapping[str, Tensor], config: Any, source: str) -> VisionEncoder:
    """Make an encoder of the tower in a BLIP-2 of transformers: as many blocks, no final norm; hidden state -1 is what BLIP-2 reads.

    Args:
        state: Weights of `vision_model`, without its last norm.
        config: Its configuration.
        source: For messages and the encoder's card.

    Raises:
        DataError: A key has no place, or keys have a bias, for which an EVA tower has no room.
    """
    ours: dict[str, Tensor] = {}
    outside, inside = ({v: k for k, v in names.items()} for names in (_OUTSIDE, _INSIDE))
    for key, tensor in state.items():
        if key in outside:
            ours[outside[key]] = tensor
            continue
        match = re.match(r"encoder\.layers\.(\d+)\.(.*)", key)
        if match and match[2] in inside:
            ours[f"blocks.{match[1]}.{inside[match[2]]}"] = tensor
        elif match and match[2] == "self_attn.qkv.bias":
            query, keys, value = tensor.chunk(3)
            if keys.any():
                raise DataError(
                    f"{source}: the keys of block {match[1]} have a bias; EVA's tower has none, and dropping it would change it"
                )
            ours[f"blocks.{match[1]}.attn.q_bias"], ours[f"blocks.{match[1]}.attn.v_bias"] = query, value
        else:
            raise DataError(f"{source}: '{key}' has no place in an EVA tower")
    return eva_tower(ours, int(config.num_attention_heads), source)


def eva_tower(state: Mapping[str, Tensor], heads: int, source: str) -> VisionEncoder:
    """Make an encoder of EVA's weights, its sizes read off them; without a final norm."""
    file = Checkpoint(source, {key: tensor for key, tensor in state.items() if not key.startswith(_DROPPED)}, {})
    try:
        kernel, hidden = state["patch_embed.proj.weight"], state["blocks.0.mlp.fc1.weight"].shape[0]
        width, patch = int(kernel.shape[0]), int(kernel.shape[-1])
        size = patch * math.isqrt(state["pos_embed"].shape[1] - 1)
        depth = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
    except (KeyError, ValueError) as error:
        raise DataError(f"{source}: no EVA tower's weights: {error}") from error
    args = {
        "img_size": size, "patch_size": patch, "embed_dim": width, "depth": depth, "num_heads": heads, "mlp_ratio": (hidden + 0.5) / width,
    }  # fmt: skip
    return image_tower(file, OfficialModel(EVA, args), f"{EVA} of width {width}")


def hf_config(config: QFormerConfig, vision: Blip2VisionConfig, text: PreTrainedConfig | None, with_words: bool) -> Blip2Config:
    """Describe a BLIP-2 to transformers.

    Args:
        config: The Q-Former.
        vision: The tower.
        text: The language model; None for a Q-Former of stage 1.
        with_words: The Q-Former has its text side.
    """
    body = config.body()
    body.use_qformer_text_input = with_words
    more = {} if text is None else {"text_config": text.to_dict()}
    return Blip2Config(
        vision_config=vision.to_dict(), qformer_config=body.to_dict(), num_query_tokens=config.queries,
        image_text_hidden_size=config.joint_width, **more,
    )  # fmt: skip


def qformer_config(config: Any, special: Mapping[str, int]) -> QFormerConfig:
    """Read a Q-Former's shape from a BLIP-2 configuration of transformers.

    Args:
        config: The Blip2Config.
        special: Ids of `pad`, `cls`, `sep`, `dec`.
    """
    body = config.qformer_config
    return QFormerConfig(
        encoder_width=config.vision_config.hidden_size, width=body.hidden_size, layers=body.num_hidden_layers, heads=body.num_attention_heads,
        feed_forward=body.intermediate_size, queries=config.num_query_tokens, cross_attention_every=body.cross_attention_frequency,
        vocabulary=body.vocab_size, positions=body.max_position_embeddings, joint_width=config.image_text_hidden_size,
        dropout=body.hidden_dropout_prob, **special,
    )  # fmt: skip


def squashed(size: int) -> dict[str, Any]:
    """How BLIP-2 prepares images: squashed to size x size, CLIP's mean and standard deviation; an encoder's `image_spec`."""
    return ImageSpec(size=size, resize="squash").to_dict()
