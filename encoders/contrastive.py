"""The contrastive loss, with the negatives of all ranks, and the encoding of pairs that goes before it.

Letters: B pairs of this rank, G pairs of all ranks, E width of the joint space, K kept patches.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from encoders.clip_towers import patch_keeper
from mmkit.ranks import rows_of_all_ranks


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


def _gather(images: Tensor, texts: Tensor, captions: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    """All ranks' features (gradients flow back to their ranks) and captions, and where this rank's rows begin."""
    both, offset = rows_of_all_ranks(torch.cat([images, texts], dim=1))  # one exchange instead of two
    return both[:, : images.shape[1]], both[:, images.shape[1] :], rows_of_all_ranks(captions)[0], offset


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
