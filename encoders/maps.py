"""What an encoder looks at: attention of the image's own token over the patches, and how near each patch is to a text.

Letters as in modeling.py; L layers, A heads, T texts.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from timm.layers import AttentionPoolLatent
from torch import Tensor
from torch.nn import functional as F

from encoders.modeling import VisionEncoder
from mmkit.errors import ConfigError

POOLING = "pooling"


@torch.no_grad()
def attention_maps(encoder: VisionEncoder, images: Tensor, layers: Sequence[int] | None = None) -> dict[str, Tensor]:
    """Read, for every layer and head, how the attention that makes the image's embedding is spread over the patches.

    In a network with CLS this is the row of CLS. In one without, each patch is shown with the attention it gets, the mean over all tokens
    that look; and the pooling's own query comes last, as "pooling".

    Args:
        encoder: In eval mode.
        images: [B, 3, H, W], prepared by its spec.
        layers: Numbers from 1 to depth; None is all.

    Returns:
        "layer 1" ... -> shares [B, A, h, w]; what is missing to 1 goes to CLS and registers.

    Raises:
        ConfigError: A number is out of range, or the blocks keep no attention.
    """
    depth, prefix = len(encoder.network.blocks), encoder.num_prefix_tokens
    wanted = list(range(1, depth + 1)) if layers is None else list(layers)
    if wrong := [layer for layer in wanted if not 1 <= layer <= depth]:
        raise ConfigError(f"layer {wrong[0]} was asked for; '{encoder.config.origin}' has layers 1 to {depth}")
    found: dict[str, Tensor] = {}
    with _attention_recorded(encoder, wanted, found):
        features = encoder(images).last_hidden_state  # [B, P + N, D]
    if isinstance(encoder.network.attn_pool, AttentionPoolLatent):
        found[POOLING] = _pooling_attention(encoder.network.attn_pool, features)[..., prefix:]
    return {name: rows.unflatten(-1, encoder.grid).float() for name, rows in found.items()}


@contextmanager
def _attention_recorded(encoder: VisionEncoder, layers: Sequence[int], found: dict[str, Tensor]) -> Iterator[None]:
    """Let the blocks compute their attention in the open (timm's fused kernel keeps none), and note down the one row that counts."""
    prefix, has_cls = encoder.num_prefix_tokens, encoder.num_prefix_tokens > 0
    handles, fused = [], []
    for layer in layers:
        attention: Any = getattr(encoder.network.blocks[layer - 1], "attn", None)
        if not hasattr(attention, "fused_attn") or not hasattr(attention, "attn_drop"):
            raise ConfigError(f"the blocks of {encoder.config.architecture} keep no attention that could be shown")

        def note(_: Any, inputs: tuple[Tensor, ...], name: str = f"layer {layer}") -> None:
            shares = inputs[0]  # [B, A, P + N, P + N], rows sum to 1
            found[name] = (shares[:, :, 0] if has_cls else shares.mean(dim=2))[..., prefix:].clone()

        fused.append((attention, attention.fused_attn))
        attention.fused_attn = False
        handles.append(attention.attn_drop.register_forward_pre_hook(note))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for attention, before in fused:
            attention.fused_attn = before


def _pooling_attention(pool: Any, features: Tensor) -> Tensor:
    """Attention of the pooling's query over all tokens [B, A, P + N]."""
    batch, tokens, _ = features.shape
    features = features if pool.pos_embed is None else features + pool.pos_embed.unsqueeze(0).to(features.dtype)
    query = pool.q(pool.latent.expand(batch, -1, -1)).reshape(batch, pool.latent_len, pool.num_heads, pool.head_dim).transpose(1, 2)
    keys = pool.kv(features).reshape(batch, tokens, 2, pool.num_heads, pool.head_dim)[:, :, 0].transpose(1, 2)
    shares = (pool.q_norm(query) * pool.scale) @ pool.k_norm(keys).transpose(-2, -1)  # [B, A, 1, P + N]
    return shares.softmax(dim=-1).mean(dim=2)


@torch.no_grad()
def text_maps(encoder: VisionEncoder, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
    """Hold every patch's token in the joint space against texts.

    Args:
        encoder: With a joint space.
        images: [B, 3, H, W].
        texts: Text features [T, E] of the same space.

    Returns:
        Cosines of the patches [B, T, h, w], and of the whole images [B, T].

    Raises:
        ConfigError: The texts have another width: they belong to another space.
    """
    if encoder.joint_width != texts.shape[1]:
        raise ConfigError(
            f"encoder '{encoder.config.origin}' has joint width {encoder.joint_width}, the text tower {texts.shape[1]}: they belong to "
            "different spaces; name its own with --text_tower"
        )
    tokens = F.normalize(encoder.tokens(images).float(), dim=-1)  # [B, 1 + N, E]
    cosines = tokens @ F.normalize(texts.float(), dim=-1).T.to(tokens.device)  # [B, 1 + N, T]
    return cosines[:, 1:].transpose(1, 2).unflatten(-1, encoder.grid), cosines[:, 0]


def attention_figures(shares: Tensor) -> dict[str, Tensor]:
    """Put numbers to attention maps.

    Args:
        shares: Attention over the patches [..., h, w], not negative; what goes elsewhere is left out of account.

    Returns:
        [...] each: "entropy" from 0 (one patch) to 1 (all alike), and "distance", the mean distance of what is looked at from its own centre
        of gravity, in patches.
    """
    weights = shares.flatten(-2) / shares.flatten(-2).sum(dim=-1, keepdim=True).clamp(min=1e-12)  # [..., N]
    entropy = -(weights * weights.clamp(min=1e-12).log()).sum(dim=-1) / math.log(weights.shape[-1])
    down, across = torch.meshgrid(torch.arange(shares.shape[-2]), torch.arange(shares.shape[-1]), indexing="ij")
    places = torch.stack([down, across], dim=-1).flatten(0, 1).to(weights)  # [N, 2]
    centre = weights @ places  # [..., 2]
    apart = (places - centre.unsqueeze(-2)).norm(dim=-1)  # [..., N]
    return {"entropy": entropy, "distance": (weights * apart).sum(dim=-1)}


@torch.no_grad()
def cls_patch_cosine(encoder: VisionEncoder, images: Tensor) -> Tensor:
    """The mean cosine of an image's CLS token with its patch tokens, after the final norm [B].

    Where it rises in training, patches give up what is theirs and repeat the image as a whole.

    Raises:
        ConfigError: The encoder has no CLS.
    """
    if not encoder.num_prefix_tokens:
        raise ConfigError(f"'{encoder.config.origin}' has no CLS token to compare its patches with")
    tokens = F.normalize(encoder(images).last_hidden_state.float(), dim=-1)  # [B, P + N, D]
    return (tokens[:, encoder.num_prefix_tokens :] @ tokens[:, 0].unsqueeze(-1)).squeeze(-1).mean(dim=1)
