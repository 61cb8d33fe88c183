"""Instance (and panoptic) segmentation as Mask2Former does it, on one feature map; its networks are transformers', cut to one level.

A target holds "labels" int64 [n] (0 to categories - 1), "masks" [n, S, S] on the canvas (0 or 1), "picture" [2] (see `detection`) and, for
training, "points_seed" int64 []: where the random points of its loss begin. Without it they are drawn from torch's generator.

Source: ViSFT (segmentation head of mmf/models/visft), Mask2Former (Cheng et al., 2022).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Mask2FormerConfig
from transformers.models.mask2former.modeling_mask2former import (
    Mask2FormerPixelDecoder,
    Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention,
    Mask2FormerPreTrainedModel,
    Mask2FormerSinePositionEmbedding,
    Mask2FormerTransformerModule,
)

from encoders.coco_classes import Classes
from encoders.heads.base import Head, HeadConfig, Prediction, Targets, Terms, divisors, positive, target_places
from encoders.heads.mask_loss import LOSS_WEIGHTS, Points, WantedMasks, mask_loss
from mmkit.errors import ConfigError

GROUPS = 32  # of the group norms, fixed in transformers


@dataclass(frozen=True)
class SegmentationConfig(HeadConfig):
    """Sizes of the segmentation head; the defaults are the paper's.

    Attributes:
        width: C of the feature map.
        classes: Categories and their logits.
        hidden_width: Channels, a multiple of 32.
        encoder_layers, decoder_layers: Deformable layers; masked-attention layers.
        attention_heads: Of both.
        attention_points: A deformable head looks at so many places.
        encoder_feedforward, decoder_feedforward: Hidden channels.
        queries: At most so many objects are found.
        no_object_weight: Of "no object" in the cross-entropy.
        points, oversample, importance: See `mask_loss.Points`.
    """

    width: int
    classes: Classes
    hidden_width: int = 256
    encoder_layers: int = 6
    decoder_layers: int = 9
    attention_heads: int = 8
    attention_points: int = 4
    encoder_feedforward: int = 512
    decoder_feedforward: int = 1024
    queries: int = 100
    no_object_weight: float = 0.1
    points: int = 12544
    oversample: float = 3.0
    importance: float = 0.75

    def __post_init__(self) -> None:
        positive(self, "width", "encoder_layers", "decoder_layers", "queries", "points", "attention_points")
        if self.hidden_width % GROUPS or self.hidden_width % self.attention_heads:
            raise ConfigError(
                f"segmentation: hidden_width {self.hidden_width} must be a multiple of {GROUPS} (group norms) and of the "
                f"{self.attention_heads} attention heads"
            )


class _FloatPositions(Mask2FormerSinePositionEmbedding):
    """Positions in float32 whatever the map's type: in bfloat16, neighbours in a large map are the same place."""

    def forward(self, shape: torch.Size, device: torch.device | str, dtype: torch.dtype, mask: Tensor | None = None) -> Tensor:
        positions: Tensor = super().forward(shape, device, torch.float32, mask)
        return positions


class _OneLevel(Mask2FormerPreTrainedModel):
    """transformers' pixel decoder and masked-attention decoder for a single level. A model of transformers, for its initialisation."""

    def __init__(self, config: SegmentationConfig) -> None:
        hidden = config.hidden_width
        settings = Mask2FormerConfig(
            feature_size=hidden,
            mask_feature_size=hidden,
            hidden_dim=hidden,
            encoder_feedforward_dim=config.encoder_feedforward,
            dim_feedforward=config.decoder_feedforward,
            encoder_layers=config.encoder_layers,
            decoder_layers=config.decoder_layers + 1,  # it counts the prediction before the first layer
            num_attention_heads=config.attention_heads,
            num_queries=config.queries,
            dropout=0.0,  # above 0 it would also skip whole decoder layers
            feature_strides=[32],  # with common_stride 4: the one level gets its lateral convolution
            common_stride=4,
        )
        super().__init__(settings)
        pixels = Mask2FormerPixelDecoder(settings, feature_channels=[config.width])
        pixels.num_feature_levels = 1
        pixels.level_embed = nn.Parameter(torch.empty(1, hidden))
        pixels.position_embedding = _FloatPositions(hidden // 2, normalize=True)
        for layer in pixels.encoder.layers:
            layer.self_attn = Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention(
                hidden, config.attention_heads, n_levels=1, n_points=config.attention_points
            )
        decoder = Mask2FormerTransformerModule(hidden, settings)
        decoder.num_feature_levels = decoder.decoder.num_feature_levels = 1
        decoder.level_embed = nn.Embedding(1, hidden)
        decoder.input_projections = decoder.input_projections[:1]
        decoder.position_embedder = _FloatPositions(hidden // 2, normalize=True)
        self.pixel_decoder, self.decoder = pixels, decoder
        self.class_predictor = nn.Linear(hidden, config.classes.num_logits)
        self.post_init()
        self.apply(self._init_weights)  # post_init leaves modules that are not its own models' as torch made them


class SegmentationHead(Head):
    """Mask2Former without its backbone: 13,650,833 parameters behind ViT-G for COCO's 80 categories. Masks have the map's own size."""

    task = "segmentation"
    mean_over = ("masks", "class_weight")
    config: SegmentationConfig
    class_weight: Tensor
    class_index: Tensor

    def __init__(self, config: SegmentationConfig) -> None:
        super().__init__(config)
        self.network = _OneLevel(config)
        weight = torch.ones(config.classes.num_logits)
        weight[-1] = config.no_object_weight
        self.register_buffer("class_weight", weight, persistent=False)
        self.register_buffer("class_index", torch.tensor(config.classes.index), persistent=False)

    def outputs(self, feature_map: Tensor) -> tuple[Tensor, Tensor]:
        """Run the network on [B, C, h, w].

        Returns:
            Class logits [L + 1, B, Q, K] and mask logits [L + 1, B, Q, h, w], before the first decoder layer and after each.
        """
        pixels = self.network.pixel_decoder([feature_map])
        found = self.network.decoder(list(pixels.multi_scale_features), pixels.mask_features, output_hidden_states=True)
        states = torch.stack([state.transpose(0, 1) for state in found.intermediate_hidden_states])
        return self.network.class_predictor(states), torch.stack(list(found.masks_queries_logits))

    def counts(self, targets: Targets) -> dict[str, float]:
        """Count masks, and the class weights of all queries."""
        masks, weight = 0.0, 0.0
        for target in targets:
            labels = target["labels"][: self.config.queries]
            matched = self.class_weight[self.class_index[labels.to(self.class_index.device)]]
            weight += float(matched.sum()) + self.config.no_object_weight * (self.config.queries - len(labels))
            masks += len(target["labels"])
        return {"masks": masks, "class_weight": weight}

    def forward(self, feature_map: Tensor, targets: Targets, counts: Mapping[str, float] | None = None) -> tuple[Tensor, Terms]:
        """Give the loss over all outputs; see `Head.forward`.

        Returns:
            The loss [], and of the last layer the unweighted "class", "mask" and "dice"; "auxiliary" is the weighted rest.
        """
        feature_map = self.check(feature_map, targets)
        class_logits, mask_logits = self.outputs(feature_map)
        counts = divisors(self.counts(targets)) if counts is None else counts
        wanted = [self._wanted(target, feature_map.device) for target in targets]
        points = Points(self.config.points, self.config.oversample, self.config.importance)
        with torch.autocast(feature_map.device.type, enabled=False):
            layers = [
                mask_loss(classes, masks, wanted, self.class_weight, points, counts)
                for classes, masks in zip(class_logits, mask_logits, strict=True)
            ]
        totals = torch.stack([torch.stack([LOSS_WEIGHTS[name] * terms[name] for name in LOSS_WEIGHTS]).sum() for terms in layers])
        return totals.sum(), {**layers[-1], "auxiliary": totals[:-1].sum()}

    def _wanted(self, target: Mapping[str, Tensor], device: torch.device) -> WantedMasks:
        seed = int(target["points_seed"]) if "points_seed" in target else int(torch.randint(2**62, ()))
        classes = self.class_index[target["labels"].to(device)]
        return WantedMasks(classes, target["masks"].to(device), torch.Generator(device).manual_seed(seed))

    @torch.no_grad()
    def predict(self, feature_map: Tensor, targets: Targets | None = None, **settings: Any) -> list[Prediction]:
        """Find objects and their masks.

        Args:
            feature_map: [B, C, h, w].
            targets: Read for "picture" and "original_size" alone.
            settings: `limit` (100): keep so many, the most likely pairs of query and class; `threshold` (0): leave out what is less likely.

        Returns:
            For each image "labels" int64 [n], "scores" [n] (class times mean certainty inside the mask) and "masks" bool [n, H, W] of the
            picture in its original size, or of the canvas in the map's size where targets do not say one.

        Source: Mask2Former, instance inference.
        """
        feature_map = self.check(feature_map, targets)
        class_logits, mask_logits = self.outputs(feature_map)
        places = target_places(targets, len(feature_map), feature_map.device)
        found = []
        for image, (classes, masks) in enumerate(zip(class_logits[-1].float(), mask_logits[-1].float(), strict=True)):
            chance = classes.softmax(-1)[:, self.class_index]  # [Q, categories]
            scores, index = chance.flatten().topk(min(settings.get("limit", 100), chance.numel()))
            query, labels = index // chance.shape[1], index % chance.shape[1]
            kept = scores >= settings.get("threshold", 0.0)
            scores, query, labels = scores[kept], query[kept], labels[kept]
            size = None if targets is None else targets[image].get("original_size")
            logits = to_picture(masks, places[image], size)[query]
            inside = logits > 0
            certainty = (logits.sigmoid() * inside).flatten(1).sum(1) / inside.flatten(1).sum(1).clamp(min=1)
            scores = scores * certainty
            order = scores.argsort(descending=True, stable=True)
            found.append({"labels": labels[order], "scores": scores[order], "masks": inside[order]})
        return found


def to_picture(masks: Tensor, place: Tensor, size: Tensor | None) -> Tensor:
    """Bring mask logits from the canvas to the picture in it.

    Args:
        masks: [Q, h, w], of the canvas.
        place: The picture's share of the canvas's height and width [2].
        size: Height and width of the picture [2]; None leaves the masks as they are.

    Returns:
        [Q, height, width], read off bilinearly at the centres of the picture's pixels.
    """
    if size is None:
        return masks
    height, width = (int(edge) for edge in size)
    y = (torch.arange(height, device=masks.device) + 0.5) / height * place[0] * 2 - 1
    x = (torch.arange(width, device=masks.device) + 0.5) / width * place[1] * 2 - 1
    grid = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], dim=-1)  # [height, width, 2] of x, y
    return F.grid_sample(masks[None], grid[None], mode="bilinear", padding_mode="border", align_corners=False)[0]
