"""Keypoints as ViTPose finds them: of each object's box a heatmap for each keypoint. The box is cut out of the encoder's map, not of the picture.

ViTPose encodes a crop for each person. Here the encoder sees the whole picture once, as for the other tasks, so that its features can be
shared and cached and a step costs one forward; the head reads the box from the map.

A target holds "boxes" [n, 4] and "labels" [n] (see `detection`) and "keypoints" [n, K, 3]: x and y as shares of the canvas, and how visible.

Source: ViSFT's ablation (a pose head); ViTPose (Xu et al., 2022), classic decoder; the sizes of the crop are ours.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Self

import torch
from torch import Tensor
from torchvision.ops import roi_align
from transformers.models.vitpose.modeling_vitpose import VitPoseClassicDecoder

from encoders.coco_classes import Classes
from encoders.heads.base import Head, HeadConfig, Prediction, Targets, Terms, divisors, positive
from mmkit.errors import ConfigError

UPSCALED = 4  # by the decoder's two deconvolutions


@dataclass(frozen=True)
class PoseConfig(HeadConfig):
    """Sizes of the pose head.

    Attributes:
        width: C of the feature map.
        classes: Categories; all have the same keypoints.
        joints: Names of the K keypoints.
        crop_height, crop_width: Cells that a box is read into; heatmaps are four times as large.
        margin: Boxes are enlarged so much, then to the crop's shape.
        spread: Deviation of a target's bell, in pixels of the heatmap.
    """

    width: int
    classes: Classes
    joints: tuple[str, ...]
    crop_height: int = 16
    crop_width: int = 12
    margin: float = 1.25
    spread: float = 2.0

    def __post_init__(self) -> None:
        positive(self, "width", "crop_height", "crop_width", "margin", "spread")
        if not self.joints:
            raise ConfigError("pose: the set's categories name no keypoints")


class PoseHead(Head):
    """Two deconvolutions and a convolution over the box's part of the map; batch norms keep the statistics they began with."""

    task = "pose"
    mean_over = ("keypoints",)
    config: PoseConfig

    def __init__(self, config: PoseConfig) -> None:
        super().__init__(config)
        backbone = SimpleNamespace(hidden_size=config.width)
        self.decoder = VitPoseClassicDecoder(SimpleNamespace(num_labels=len(config.joints), backbone_config=backbone))
        self.train()

    def train(self, mode: bool = True) -> Self:
        """Batch norms stay in eval: an object's heatmap must not depend on which others are in its batch."""
        super().train(mode)
        self.decoder.batchnorm1.eval()
        self.decoder.batchnorm2.eval()
        return self

    def crops(self, boxes: Tensor) -> Tensor:
        """Boxes [n, 4] (centre, sides) -> left, top, width, height of what is read, as shares of the canvas [n, 4]: enlarged, in the crop's shape."""
        shape = self.config.crop_width / self.config.crop_height
        width = torch.maximum(boxes[:, 2], boxes[:, 3] * shape) * self.config.margin
        sides = torch.stack([width, width / shape], dim=1)
        return torch.cat([boxes[:, :2] - sides / 2, sides], dim=1)

    def heatmaps(self, feature_map: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
        """Heatmaps of all objects [N, K, H, W] and their crops [N, 4], image by image."""
        crops = [self.crops(target["boxes"].to(feature_map.device)) for target in targets]
        size = torch.tensor([feature_map.shape[3], feature_map.shape[2]]).to(feature_map)
        rois = [torch.cat([crop[:, :2] * size, (crop[:, :2] + crop[:, 2:]) * size], dim=1) for crop in crops]
        cells = roi_align(feature_map, rois, (self.config.crop_height, self.config.crop_width), sampling_ratio=2, aligned=True)
        return self.decoder(cells), torch.cat(crops)

    def places(self, target: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Where one image's keypoints lie in their heatmaps, x and y in pixels [n, K, 2], and which count [n, K]: visible, and inside the crop."""
        size = torch.tensor([self.config.crop_width, self.config.crop_height]).to(target["boxes"]) * UPSCALED
        crop = self.crops(target["boxes"])[:, None]  # [n, 1, 4]
        place = (target["keypoints"][..., :2] - crop[..., :2]) / crop[..., 2:] * size - 0.5
        inside = ((place > -0.5) & (place < size - 0.5)).all(-1)
        return place, (inside & (target["keypoints"][..., 2] > 0)).float()

    def bells(self, places: Tensor) -> Tensor:
        """What the heatmaps should be [..., H, W]: a bell of height 1 around each place [..., 2]."""
        height, width = self.config.crop_height * UPSCALED, self.config.crop_width * UPSCALED
        across = torch.arange(width).to(places) - places[..., :1]  # [..., W]
        down = torch.arange(height).to(places) - places[..., 1:]
        return torch.exp(-(down[..., :, None] ** 2 + across[..., None, :] ** 2) / (2 * self.config.spread**2))

    def counts(self, targets: Targets) -> dict[str, float]:
        """Count keypoints that a loss is taken of."""
        return {"keypoints": sum(float(self.places(target)[1].sum()) for target in targets)}

    def forward(self, feature_map: Tensor, targets: Targets, counts: Mapping[str, float] | None = None) -> tuple[Tensor, Terms]:
        """Give the mean squared difference of heatmaps, over keypoints that count; see `Head.forward`."""
        feature_map = self.check(feature_map, targets)
        counts = divisors(self.counts(targets)) if counts is None else counts
        placed = [self.places(target) for target in targets]
        places, weights = (torch.cat([pair[part] for pair in placed]).to(feature_map.device) for part in (0, 1))
        with torch.autocast(feature_map.device.type, enabled=False):
            found, _ = self.heatmaps(feature_map, targets)  # [N, K, H, W]
            loss = (((found - self.bells(places)) ** 2).flatten(2).mean(-1) * weights).sum() / counts["keypoints"]
        return loss, {"heatmap": loss}

    @torch.no_grad()
    def predict(self, feature_map: Tensor, targets: Targets | None = None, **settings: Any) -> list[Prediction]:
        """Find the keypoints of given boxes.

        Args:
            feature_map: [B, C, h, w].
            targets: "boxes" and "labels" of each image: top-down, as ViTPose.
            settings: None.

        Returns:
            For each image "labels" [n], "scores" [n] (mean over the keypoints) and "keypoints" [n, K, 3]: x, y as shares of the canvas, certainty.

        Raises:
            ValueError: There are no targets, whose boxes are needed.
        """
        if targets is None:
            raise ValueError("the pose head finds keypoints in boxes: give targets with boxes and labels")
        feature_map = self.check(feature_map, targets)
        maps, crops = self.heatmaps(feature_map, targets)
        places, certainty = peaks(maps)  # [N, K, 2], [N, K]
        size = torch.tensor([maps.shape[3], maps.shape[2]]).to(maps)
        points = (places + 0.5) / size * crops[:, None, 2:] + crops[:, None, :2]
        both = torch.cat([points, certainty[..., None]], dim=-1)
        found, at = [], 0
        for target in targets:
            mine = both[at : at + len(target["boxes"])]
            at += len(mine)
            found.append({"labels": target["labels"], "scores": mine[..., 2].mean(dim=1), "keypoints": mine})
        return found


def peaks(maps: Tensor) -> tuple[Tensor, Tensor]:
    """The highest places x, y [N, K, 2] of heatmaps [N, K, H, W], a quarter of a pixel towards the higher neighbour, and their heights [N, K].

    Source: the usual decoding of heatmaps (Stacked Hourglass, 2016; ViTPose's without its Gaussian refinement).
    """
    height, width = maps.shape[2:]
    certainty, index = maps.flatten(2).max(dim=-1)
    places = []
    for axis, (own, length) in enumerate(((index % width, width), (index // width, height))):
        step = 1 if axis == 0 else width
        inner = (own > 0) & (own < length - 1)
        flat = maps.flatten(2)
        after, before = ((index + sign * step).clamp(0, height * width - 1) for sign in (1, -1))
        slope = (flat.gather(2, after[..., None]) - flat.gather(2, before[..., None]))[..., 0].sign()
        places.append(own + 0.25 * slope * inner)
    return torch.stack(places, dim=-1), certainty
