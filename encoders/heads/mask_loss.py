"""Mask2Former's loss: matching at random points, then cross-entropy of the classes, and cross-entropy and dice of masks at chosen points.

As transformers' `Mask2FormerLoss` in everything but two things. Every image draws its points from a generator of its own, so that the loss
does not depend on which images share a batch. And sums are divided by counts that the caller gives, so that they may be a whole step's.

Source: Masked-attention Mask Transformer (Cheng et al., 2022), section 3.3; PointRend's choice of points.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F
from transformers.models.mask2former.modeling_mask2former import pair_wise_dice_loss, pair_wise_sigmoid_cross_entropy_loss, sample_point

from encoders.heads.base import Terms

LOSS_WEIGHTS = {"class": 2.0, "mask": 5.0, "dice": 5.0}  # of the loss and of the matching


@dataclass(frozen=True)
class Points:
    """How points of a mask are chosen.

    Attributes:
        number: Of points that a loss is a mean over.
        oversample: Times as many are drawn, and of these
        importance: this share of `number` is taken where the prediction is least certain; the rest is drawn anywhere.
    """

    number: int = 12544
    oversample: float = 3.0
    importance: float = 0.75


@dataclass(frozen=True)
class WantedMasks:
    """One image's objects.

    Attributes:
        classes: Logit of each [n].
        masks: [n, H, W], any size, 0 or 1.
        generator: Where its points come from.
    """

    classes: Tensor
    masks: Tensor
    generator: torch.Generator


def mask_loss(
    class_logits: Tensor,
    mask_logits: Tensor,
    wanted: Sequence[WantedMasks],
    class_weight: Tensor,
    points: Points,
    counts: Mapping[str, float],
) -> Terms:
    """Give the unweighted terms of one prediction.

    Args:
        class_logits: [B, Q, K], "no object" last.
        mask_logits: [B, Q, h, w].
        wanted: The objects of each image.
        class_weight: Of each class in the cross-entropy [K].
        points: How many, and how.
        counts: What to divide by: "class_weight" and "masks".

    Returns:
        "class", "mask" and "dice" []; masks of images without objects add 0.
    """
    class_logits, mask_logits = class_logits.float(), mask_logits.float()
    classes = torch.full(class_logits.shape[:2], class_logits.shape[-1] - 1, device=class_logits.device)
    mask_sum = dice_sum = mask_logits.sum() * 0.0  # 0 with a graph, and NaN if the masks are
    for image, objects in enumerate(wanted):
        query, target = match(class_logits[image], mask_logits[image], objects, points)
        classes[image, query] = objects.classes[target]
        if len(query):
            entropy, dice = _point_losses(mask_logits[image, query], objects.masks[target], objects.generator, points)
            mask_sum, dice_sum = mask_sum + entropy, dice_sum + dice
    cross_entropy = F.cross_entropy(class_logits.flatten(0, 1), classes.flatten(), class_weight, reduction="sum")
    return {
        "class": cross_entropy / counts["class_weight"],
        "mask": mask_sum / counts["masks"],
        "dice": dice_sum / counts["masks"],
    }


@torch.no_grad()
def match(class_logits: Tensor, mask_logits: Tensor, objects: WantedMasks, points: Points) -> tuple[Tensor, Tensor]:
    """Assign queries to objects of one image at the least cost; masks are compared at the same random points for all pairs.

    Args:
        class_logits: [Q, K].
        mask_logits: [Q, h, w].
        objects: The image's.
        points: How many.

    Returns:
        Queries [m] and objects [m]; m is the smaller of both numbers.
    """
    places = torch.rand(1, points.number, 2, generator=objects.generator, device=mask_logits.device)
    if not len(objects.classes):
        nothing = torch.zeros(0, dtype=torch.int64, device=mask_logits.device)
        return nothing, nothing
    ours = sample_point(mask_logits[None], places, align_corners=False)[0]  # [Q, P]
    theirs = sample_point(objects.masks[None].to(ours), places, align_corners=False)[0]  # [n, P]
    cost = -LOSS_WEIGHTS["class"] * class_logits.softmax(-1)[:, objects.classes]
    cost = cost + LOSS_WEIGHTS["mask"] * pair_wise_sigmoid_cross_entropy_loss(ours, theirs)
    cost = cost + LOSS_WEIGHTS["dice"] * pair_wise_dice_loss(ours, theirs)
    worst = torch.finfo(cost.dtype).max  # what is not finite must come out in the loss, where Run names it
    query, target = linear_sum_assignment(cost.nan_to_num(worst, worst, worst).cpu().numpy())
    return torch.as_tensor(query, device=cost.device), torch.as_tensor(target, device=cost.device)


def _point_losses(mask_logits: Tensor, masks: Tensor, generator: torch.Generator, points: Points) -> tuple[Tensor, Tensor]:
    """Give cross-entropy (mean over points) and dice of matched masks [n, h, w] and [n, H, W], summed over masks."""
    logits, masks = mask_logits[:, None], masks[:, None].to(mask_logits)
    with torch.no_grad():
        places = uncertain_points(logits, generator, points)
        labels = sample_point(masks, places, align_corners=False).squeeze(1)  # [n, P]
    found = sample_point(logits, places, align_corners=False).squeeze(1)
    entropy = F.binary_cross_entropy_with_logits(found, labels, reduction="none").mean(1).sum()
    chance = found.sigmoid()
    dice = 1 - (2 * (chance * labels).sum(1) + 1) / (chance.sum(1) + labels.sum(1) + 1)
    return entropy, dice.sum()


def uncertain_points(logits: Tensor, generator: torch.Generator, points: Points) -> Tensor:
    """Choose points [n, P, 2] (x, y in [0, 1]) for masks [n, 1, h, w], most of them where the logit is near 0."""
    many = int(points.number * points.oversample)
    places = torch.rand(len(logits), many, 2, generator=generator, device=logits.device)
    certainty = sample_point(logits, places, align_corners=False).squeeze(1).abs()  # [n, many]
    near = int(points.importance * points.number)
    index = certainty.topk(near, dim=1, largest=False).indices
    chosen = places.gather(1, index[..., None].expand(-1, -1, 2))
    anywhere = torch.rand(len(logits), points.number - near, 2, generator=generator, device=logits.device)
    return torch.cat([chosen, anywhere], dim=1)
