"""The contrastive loss, with the negatives of all ranks, and the encoding of pairs that goes before it.

Letters: B pairs of this rank, G pairs of all ranks, E width of the joint space, K kept patches.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from encoders.clip_towers import patch_keeper


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
    _, numbers = torch.unique(all_captions, dim=0, return_inverse=True)  # [G]; captions by number: comparing ids would take [B, G, context]
    same = numbers[offset : offset + len(captions), None] == numbers[None, :]  # [B, G]
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


def encode_pairs(clip: nn.Module, images: Tensor, text_ids: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Encode pairs.

    Args:
        clip: open_clip's model.
        images: Normalised [B, 3, H, W].
        text_ids: [B, context].
        keep: The patches [B, K] that the image tower sees; None is all.

    Returns:
        Unit rows of images and texts [B, E], and 1 / temperature [].
    """
    towers: Any = clip
    distinct, place = torch.unique(text_ids, dim=0, return_inverse=True)  # a caption that occurs twice is encoded once
    keeper = patch_keeper(clip) if keep is not None else None
    if keeper is not None:
        keeper.keep = keep
    try:
        image_features = towers.encode_image(images)
    finally:
        if keeper is not None:
            keeper.keep = None  # a stale index set would silently change every later result
    text_features = towers.encode_text(distinct)[place]
    return F.normalize(image_features.float(), dim=-1), F.normalize(text_features.float(), dim=-1), towers.logit_scale.exp()
