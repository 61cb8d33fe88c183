"""A VisionEncoder as one of transformers' own vision models, so that people without mmkit load it: CLIP, SigLIP or plain ViT.

    tower = stock_tower(encoder, layers=(-2,))      CLIPVisionModel | SiglipVisionModel | ViTModel, or a ConfigError that says why not

A conversion is kept only if it gives the encoder's own hidden states. What LLaVA does not read is left out: the projection to the joint
space of CLIP.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

from encoders.modeling import VisionEncoder
from mmkit.checkpoint import load_strict
from mmkit.errors import ConfigError

TOLERANCE = 1e-5  # of the largest value; float32, the same sums in another order
Names = Sequence[tuple[str, str]]

# timm -> transformers; the first that fits a tensor's name renames it
_CLIP: Names = (
    ("blocks.", "encoder.layers."), ("norm_pre.", "pre_layrnorm."), (".norm1.", ".layer_norm1."), (".norm2.", ".layer_norm2."),
    (".attn.proj.", ".self_attn.out_proj."), (".attn.", ".self_attn."), ("patch_embed.proj.", "embeddings.patch_embedding."),
)  # fmt: skip
_VIT: Names = (
    ("blocks.", "layers."), (".norm1.", ".layernorm_before."), (".norm2.", ".layernorm_after."),
    (".attn.proj.", ".attention.o_proj."), (".attn.", ".attention."),
    ("patch_embed.proj.", "embeddings.patch_embeddings.projection."),
)  # fmt: skip
_FINAL_NORM = {"clip": "post_layernorm.", "siglip": "post_layernorm.", "vit": "layernorm."}


def stock_tower(encoder: VisionEncoder, layers: Sequence[int] = (-2, -1)) -> PreTrainedModel:
    """Put an encoder's network into the stock transformers model of its form.

    Args:
        encoder: The encoder; it is not changed.
        layers: Hidden states that have to be equal, as `vision_feature_layer` counts them.

    Returns:
        The stock model in eval mode, in the encoder's dtype.

    Raises:
        ConfigError: transformers has no vision model of this form; the message names what is different.
    """
    network: Any = encoder.network
    odd = peculiarities(network)
    if odd:
        raise ConfigError(
            f"{encoder.config.architecture} is none of transformers' CLIP, SigLIP or ViT vision models: it has {', '.join(odd)}"
        )
    dtype = network.patch_embed.proj.weight.dtype
    state = {name: tensor.detach().float() for name, tensor in network.state_dict().items()}
    kind = "siglip" if network.cls_token is None else "vit" if isinstance(network.norm_pre, nn.Identity) else "clip"
    build: dict[str, Callable[[Any, dict[str, Tensor]], PreTrainedModel]] = {"clip": _clip, "siglip": _siglip, "vit": _vit}
    tower = build[kind](network, state).eval()
    _assert_equal(encoder, tower, layers)
    return tower.to(dtype)


def peculiarities(network: Any) -> list[str]:
    """What of a timm network none of the three stock models can express; nothing where one can."""
    if not isinstance(network, VisionTransformer):
        return [f"the layers of timm's {type(network).__name__} (rotary positions, gated MLPs)"]
    block: Any = network.blocks[0]
    activation = _activation(block.mlp.act) if hasattr(block.mlp, "act") else None
    checks = {
        "register tokens": network.num_prefix_tokens > 1,
        "positions without a place for CLS": network.cls_token is not None and network.no_embed_class,
        "no position embedding": network.pos_embed is None,
        "blocks of another kind": any(type(block) is not Block for block in network.blocks),
        "layer scale": not all(isinstance(getattr(block, name), nn.Identity) for block in network.blocks for name in ("ls1", "ls2")),
        "normalised queries and keys": not isinstance(block.attn.q_norm, nn.Identity),
        "norms inside attention or MLP": not (
            isinstance(getattr(block.attn, "norm", nn.Identity()), nn.Identity) and isinstance(block.mlp.norm, nn.Identity)
        ),
        "attention without bias": block.attn.qkv.bias is None,
        f"activation {type(getattr(block.mlp, 'act', None)).__name__}": activation is None,
        "no bias in its patch embedding and no norm before the blocks": (
            network.patch_embed.proj.bias is None and isinstance(network.norm_pre, nn.Identity)
        ),
        "a bias in its patch embedding and a norm before the blocks": (
            network.patch_embed.proj.bias is not None and not isinstance(network.norm_pre, nn.Identity)
        ),
        "no final norm": not isinstance(network.norm, nn.LayerNorm),
        "attention pooling and a CLS token": network.attn_pool is not None and network.cls_token is not None,
    }
    return [what for what, found in checks.items() if found]


def _activation(module: nn.Module) -> str | None:
    """transformers' name of an activation."""
    if isinstance(module, nn.GELU):
        return "gelu_pytorch_tanh" if module.approximate == "tanh" else "gelu"
    return {"QuickGELU": "quick_gelu", "GELU": "gelu", "GELUTanh": "gelu_pytorch_tanh"}.get(type(module).__name__)


def _sizes(network: Any) -> dict[str, Any]:
    block = network.blocks[0]
    return {
        "hidden_size": network.embed_dim, "num_hidden_layers": len(network.blocks), "num_attention_heads": block.attn.num_heads,
        "intermediate_size": block.mlp.fc1.out_features, "hidden_act": _activation(block.mlp.act), "layer_norm_eps": network.norm.eps,
        "image_size": network.patch_embed.img_size[0], "patch_size": network.patch_embed.patch_size[0],
    }  # fmt: skip


def _renamed(state: dict[str, Tensor], names: Names, norm: str) -> dict[str, Tensor]:
    """The trunk under transformers' names, with q, k and v taken apart; head and pooling are left out."""
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.startswith(("head.", "fc_norm.", "attn_pool.", "cls_token", "pos_embed")):
            continue
        name = norm + name.removeprefix("norm.") if name.startswith("norm.") else name
        for old, new in names:
            name = name.replace(old, new)
        if ".qkv." in name:
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                out[name.replace(".qkv.", f".{letter}_proj.")] = part.clone()
        else:
            out[name] = tensor
    return out


def _fill(model: Any, state: dict[str, Tensor], what: str) -> Any:
    """Load strictly, with the infix where this version of transformers has one."""
    infix = "vision_model." if any(name.startswith("vision_model.") for name in model.state_dict()) else ""
    load_strict(model, {infix + name: tensor for name, tensor in state.items()}, what)
    return model


def _clip(network: Any, state: dict[str, Tensor]) -> PreTrainedModel:
    model = CLIPVisionModel(CLIPVisionConfig(**_sizes(network)))
    out = _renamed(state, _CLIP, _FINAL_NORM["clip"])
    out["embeddings.class_embedding"] = state["cls_token"].flatten()
    out["embeddings.position_embedding.weight"] = state["pos_embed"][0]
    return _fill(model, out, "a CLIP vision tower in timm's form")


def _vit(network: Any, state: dict[str, Tensor]) -> PreTrainedModel:
    model = ViTModel(ViTConfig(**_sizes(network), qkv_bias=True))
    out = _renamed(state, _VIT, _FINAL_NORM["vit"])
    out["embeddings.cls_token"], out["embeddings.position_embeddings"] = state["cls_token"], state["pos_embed"]
    for name, tensor in model.state_dict().items():
        if name.startswith("pooler."):  # AutoModel builds one, LLaVA never calls it
            out[name] = torch.zeros_like(tensor)
    return _fill(model, out, "a vision transformer in timm's form")


def _siglip(network: Any, state: dict[str, Tensor]) -> PreTrainedModel:
    pooled = network.attn_pool is not None
    config = SiglipVisionConfig(**_sizes(network))
    config.vision_use_head = pooled
    model = SiglipVisionModel(config)
    out = _renamed(state, _CLIP, _FINAL_NORM["siglip"])
    out["embeddings.position_embedding.weight"] = state["pos_embed"][0]
    if pooled:
        out["head.probe"] = state["attn_pool.latent"]
        for part in ("weight", "bias"):
            out[f"head.attention.in_proj_{part}"] = torch.cat([state[f"attn_pool.q.{part}"], state[f"attn_pool.kv.{part}"]])
            out[f"head.attention.out_proj.{part}"] = state[f"attn_pool.proj.{part}"]
            out[f"head.layernorm.{part}"] = state[f"attn_pool.norm.{part}"]
            for layer in ("fc1", "fc2"):
                out[f"head.mlp.{layer}.{part}"] = state[f"attn_pool.mlp.{layer}.{part}"]
    return _fill(model, out, "a SigLIP vision tower in timm's form")


@torch.no_grad()
def _assert_equal(encoder: VisionEncoder, tower: PreTrainedModel, layers: Sequence[int]) -> None:
    """Refuse a conversion whose hidden states for noise are not the encoder's.

    Raises:
        ConfigError: They are not; the message says by how much.
    """
    size, trunk = encoder.spec.size, encoder.network
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    dtype = trunk.patch_embed.proj.weight.dtype
    try:
        expected = encoder.float()(images, output_hidden_states=True).hidden_states
    finally:
        encoder.to(dtype)
    found = tower(pixel_values=images, output_hidden_states=True).hidden_states
    for layer in layers:
        off = float((found[layer] - expected[layer]).abs().max() / expected[layer].abs().max().clamp_min(1e-12))
        if not off <= TOLERANCE:
            raise ConfigError(
                f"{encoder.config.architecture} does not convert to {type(tower).__name__}: hidden state {layer} differs by {off:.1e} of "
                "its largest value. The tower has a part that this conversion does not know; please report it"
            )
