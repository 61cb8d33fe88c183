"""Panoptic segmentation: the Mask2Former-form head with stuff among its categories, and every pixel given to one segment.

Targets are `segmentation`'s, with a mask for each segment, thing or stuff; so is the loss.

Source: ViSFT's ablation (a panoptic task in place of the instances); Mask2Former, panoptic inference (Cheng et al., 2022).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from encoders.heads.base import Prediction, Targets, target_places
from encoders.heads.segmentation import SegmentationConfig, SegmentationHead, to_picture
from mmkit.errors import ConfigError


@dataclass(frozen=True)
class PanopticConfig(SegmentationConfig):
    """Sizes as of `SegmentationConfig`.

    Attributes:
        things: Of each category, whether it is a thing; segments of one stuff category become one.
    """

    things: tuple[bool, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.things) != len(self.classes.ids):
            raise ConfigError(
                f"panoptic: things says of {len(self.things)} categories what they are, and there are {len(self.classes.ids)}"
            )


class PanopticHead(SegmentationHead):
    """Mask2Former without its backbone, for things and stuff."""

    task = "panoptic"
    config: PanopticConfig

    @torch.no_grad()
    def predict(self, feature_map: Tensor, targets: Targets | None = None, **settings: Any) -> list[Prediction]:
        """Give each pixel to a segment, or to none.

        Args:
            feature_map: [B, C, h, w].
            targets: Read for "picture" and "original_size" alone.
            settings: `threshold` (0.8): queries that are less certain are left out; `overlap` (0.8): so are segments of which others take more.

        Returns:
            For each image "labels" int64 [n], "scores" [n] and "masks" bool [n, H, W], which share no pixel.

        Source: Mask2Former, panoptic inference, with its thresholds for COCO.
        """
        feature_map = self.check(feature_map, targets)
        class_logits, mask_logits = self.outputs(feature_map)
        places = target_places(targets, len(feature_map), feature_map.device)
        found = []
        for image, (classes, masks) in enumerate(zip(class_logits[-1].float(), mask_logits[-1].float(), strict=True)):
            size = None if targets is None else targets[image].get("original_size")
            found.append(self._segments(classes, to_picture(masks, places[image], size).sigmoid(), settings))
        return found

    def _segments(self, classes: Tensor, masks: Tensor, settings: Mapping[str, Any]) -> Prediction:
        """Class logits [Q, K] and masks [Q, H, W] of one image -> its segments, the most certain first."""
        chance = classes.softmax(-1)[:, self.class_index]  # [Q, categories]
        scores, labels = chance.max(dim=1)
        nothing = 1 - chance.sum(dim=1)
        kept = ((scores > nothing) & (scores > settings.get("threshold", 0.8))).nonzero()[:, 0]
        kept = kept[scores[kept].argsort(descending=True, stable=True)]
        segments: list[tuple[int, float, Tensor]] = []
        stuff: dict[int, int] = {}  # label -> place in the list
        owner = (scores[kept, None, None] * masks[kept]).argmax(dim=0) if len(kept) else None  # [H, W]
        for place, query in enumerate(kept.tolist()):
            whole = masks[query] >= 0.5
            mine = (owner == place) & whole
            label = int(labels[query])
            if not mine.any() or mine.sum() / whole.sum() < settings.get("overlap", 0.8):
                continue
            if not self.config.things[label] and label in stuff:
                first = segments[stuff[label]]
                segments[stuff[label]] = (label, first[1], first[2] | mine)
                continue
            stuff |= {} if self.config.things[label] else {label: len(segments)}
            segments.append((label, float(scores[query]), mine))
        shape = masks.shape[1:]
        return {
            "labels": torch.tensor([label for label, _, _ in segments], dtype=torch.int64),
            "scores": torch.tensor([score for _, score, _ in segments]),
            "masks": torch.stack([mask for _, _, mask in segments]) if segments else torch.zeros(0, *shape, dtype=torch.bool),
        }
