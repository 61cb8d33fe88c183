"""Detection as DETR does it, on the feature map of a frozen encoder; layers, matching and boxes are transformers'.

A target holds "labels" int64 [n] (0 to categories - 1), "boxes" [n, 4] (centre x, centre y, width, height as shares of the canvas) and
"picture" [2], the share of the canvas's height and width that the picture fills, from the upper left corner.

Source: ViSFT (detection head of mmf/models/visft), DETR (Carion et al., 2020). Differences to `DetrModel`: the encoder is narrower than the
decoder, its input is added to its output, a task token stands in front of it, and the decoder's states are not normalised between layers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import box_convert, generalized_box_iou_loss
from transformers import DetrConfig
from transformers.loss.loss_for_object_detection import HungarianMatcher
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.detr.modeling_detr import DetrDecoder, DetrEncoder, DetrMLPPredictionHead, DetrSinePositionEmbedding

from encoders.coco_classes import Classes
from encoders.heads.base import Head, HeadConfig, Prediction, Targets, Terms, divisors, positive, target_places

LOSS_WEIGHTS = {"class": 1.0, "box": 5.0, "giou": 2.0}  # of the loss and of the matching
TASK_TOKENS = 256  # rows of the table; all but the first are for tasks that were never released


@dataclass(frozen=True)
class DetectionConfig(HeadConfig):
    """Sizes of the detection head; the defaults are the paper's.

    Attributes:
        width: C of the feature map.
        classes: Categories and their logits.
        encoder_width, decoder_width: Channels of each transformer.
        encoder_layers, decoder_layers, attention_heads, feedforward: Of both.
        queries: At most so many objects are found.
        dropout: In training.
        no_object_weight: Of "no object" in the cross-entropy.
        mask_padding: Positions and attention count the picture only, and boxes are predicted as shares of it, not of the canvas.
    """

    width: int
    classes: Classes
    encoder_width: int = 128
    decoder_width: int = 256
    encoder_layers: int = 6
    decoder_layers: int = 6
    attention_heads: int = 8
    feedforward: int = 1024
    queries: int = 100
    dropout: float = 0.1
    no_object_weight: float = 0.1
    mask_padding: bool = True

    def __post_init__(self) -> None:
        positive(self, "width", "encoder_layers", "decoder_layers", "queries", "feedforward")


class DetectionHead(Head):
    """DETR without its CNN: 8,761,312 parameters behind ViT-G with COCO's raw ids as logits."""

    task = "detection"
    mean_over = ("boxes", "class_weight")
    config: DetectionConfig
    class_weight: Tensor
    class_index: Tensor

    def __init__(self, config: DetectionConfig) -> None:
        super().__init__(config)
        inner, outer = config.encoder_width, config.decoder_width
        self.input_proj = nn.Conv2d(config.width, inner, kernel_size=1)
        self.task_embeddings = nn.Embedding(TASK_TOKENS, inner)
        self.encoder = DetrEncoder(_detr_config(config, inner))
        self.encoder.dropout = 0.0  # transformers drops parts of the encoder's input, too; DETR and the authors do not
        self.encoder_to_decoder = nn.Linear(inner, outer)
        self.positions_to_decoder = nn.Linear(inner, outer)
        self.decoder = DetrDecoder(_detr_config(config, outer))
        self.queries = nn.Embedding(config.queries, outer)
        self.class_predictor = nn.Linear(outer, config.classes.num_logits)
        self.box_predictor = DetrMLPPredictionHead(outer, outer, 4, 3)
        self.position_embedding = DetrSinePositionEmbedding(inner // 2, normalize=True)
        self.matcher = HungarianMatcher(*LOSS_WEIGHTS.values())
        weight = torch.ones(config.classes.num_logits)
        weight[-1] = config.no_object_weight
        self.register_buffer("class_weight", weight, persistent=False)
        self.register_buffer("class_index", torch.tensor(config.classes.index), persistent=False)
        self._initialise()

    def _initialise(self) -> None:
        """Xavier for every matrix of the transformer, as DETR; transformers' own start is Normal(0.02)."""
        parts = (self.encoder, self.decoder, self.encoder_to_decoder, self.positions_to_decoder, self.task_embeddings)
        for parameter in (parameter for part in parts for parameter in part.parameters()):
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def outputs(self, feature_map: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Run the network.

        Args:
            feature_map: [B, C, h, w].
            valid: bool [B, h, w], True where the picture is; None where it is everywhere.

        Returns:
            Class logits [L, B, Q, K] and boxes [L, B, Q, 4] of each decoder layer; boxes are shares of the picture.
        """
        x = self.input_proj(feature_map)
        batch, inner, height, width = x.shape
        # float32 positions: in bfloat16, neighbours in a large map are the same place
        pos = self.position_embedding(torch.Size((batch, inner, height, width)), x.device, torch.float32, valid)
        x, pos = x.flatten(2).transpose(1, 2), pos.flatten(2).transpose(1, 2)  # [B, h w, inner]
        task = self.task_embeddings.weight[0].expand(batch, 1, -1)
        x, pos = torch.cat([task, x], dim=1), torch.cat([torch.zeros_like(pos[:, :1]), pos], dim=1)
        real = None if valid is None else F.pad(valid.flatten(1), (1, 0), value=True)  # the task token is always there
        memory = self.encoder(inputs_embeds=x, attention_mask=real, spatial_position_embeddings=pos).last_hidden_state + x
        memory, pos = self.encoder_to_decoder(memory[:, 1:]), self.positions_to_decoder(pos[:, 1:])
        states = self._decode(memory, pos, None if real is None else real[:, 1:])  # [L, B, Q, outer]
        return self.class_predictor(states).float(), self.box_predictor(states).float().sigmoid()

    def _decode(self, memory: Tensor, pos: Tensor, real: Tensor | None) -> Tensor:
        """Run the decoder's layers. `DetrDecoder.forward` hands the normalised state to the next layer; DETR normalises what it reads off."""
        queries = self.queries.weight.expand(len(memory), -1, -1)
        state, states = torch.zeros_like(queries), []
        mask = create_bidirectional_mask(config=self.decoder.config, inputs_embeds=state, attention_mask=real, encoder_hidden_states=memory)
        for layer in self.decoder.layers:
            state = layer(state, None, pos, queries, memory, encoder_attention_mask=mask)
            states.append(self.decoder.layernorm(state))
        return torch.stack(states)

    def counts(self, targets: Targets) -> dict[str, float]:
        """Count boxes, and the class weights of all queries."""
        boxes, weight = 0.0, 0.0
        for target in targets:
            labels = target["labels"][: self.config.queries]  # more objects than queries: the rest is not matched
            matched = self.class_weight[self.class_index[labels.to(self.class_index.device)]]
            weight += float(matched.sum()) + self.config.no_object_weight * (self.config.queries - len(labels))
            boxes += len(target["labels"])
        return {"boxes": boxes, "class_weight": weight}

    def forward(self, feature_map: Tensor, targets: Targets, counts: Mapping[str, float] | None = None) -> tuple[Tensor, Terms]:
        """Give the loss over all decoder layers; see `Head.forward`.

        Returns:
            The loss [], and of the last layer the unweighted "class", "box" and "giou"; "auxiliary" is the weighted rest.
        """
        feature_map = self.check(feature_map, targets)
        places = target_places(targets, len(targets), feature_map.device)
        logits, boxes = self.outputs(feature_map, self._valid(feature_map, places))
        wanted = self._wanted(targets, places)
        counts = divisors(self.counts(targets)) if counts is None else counts
        layers = [self.layer_loss(logits[i], boxes[i], wanted, counts) for i in range(len(logits))]
        totals = [sum((LOSS_WEIGHTS[name] * value for name, value in terms.items()), torch.zeros(())) for terms in layers]
        loss = torch.stack([total.to(logits.device) for total in totals]).sum()
        return loss, {**layers[-1], "auxiliary": loss - totals[-1]}

    def _valid(self, feature_map: Tensor, places: Tensor) -> Tensor | None:
        """Give the cells [B, h, w] that begin inside their picture; None where all do."""
        if not self.config.mask_padding or bool((places >= 1).all()):
            return None
        height, width = feature_map.shape[-2:]
        rows = torch.arange(height, device=places.device) < places[:, :1] * height - 1e-4  # [B, h]; 1e-4: a share is not exact
        columns = torch.arange(width, device=places.device) < places[:, 1:] * width - 1e-4
        return rows[:, :, None] & columns[:, None, :]

    def _wanted(self, targets: Targets, places: Tensor) -> list[dict[str, Tensor]]:
        """Give the matcher's targets: the head's own class numbers, boxes as shares of what it calls the picture."""
        device, wanted = places.device, []
        for target, place in zip(targets, places, strict=True):
            share = place.flip(0).repeat(2) if self.config.mask_padding else torch.ones(4, device=device)  # w, h, w, h
            boxes = target["boxes"].to(device, torch.float32).reshape(-1, 4) / share
            wanted.append({"class_labels": self.class_index[target["labels"].to(device)], "boxes": boxes})
        return wanted

    def match(self, logits: Tensor, boxes: Tensor, wanted: list[dict[str, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """Assign queries [m] to targets [m] in each image, at the least cost."""
        # what is not finite must come out in the loss, where Run names it, not as a complaint of the matcher's
        found = {"logits": logits.detach().nan_to_num(), "pred_boxes": boxes.detach().nan_to_num(0.5)}
        return [(query.to(logits.device), target.to(logits.device)) for query, target in self.matcher(found, wanted)]

    def layer_loss(self, logits: Tensor, boxes: Tensor, wanted: list[dict[str, Tensor]], counts: Mapping[str, float]) -> Terms:
        """Give one decoder layer's unweighted terms.

        Args:
            logits, boxes: [B, Q, K], [B, Q, 4].
            wanted: "class_labels" and "boxes" of each image.
            counts: What to divide by.
        """
        matched = self.match(logits, boxes, wanted)
        classes = torch.full(logits.shape[:2], self.config.classes.no_object, device=logits.device)
        for image, (query, target) in enumerate(matched):
            classes[image, query] = wanted[image]["class_labels"][target]
        ours = torch.cat([boxes[image, query] for image, (query, _) in enumerate(matched)])  # [n, 4]
        theirs = torch.cat([wanted[image]["boxes"][target] for image, (_, target) in enumerate(matched)])
        cross_entropy = F.cross_entropy(logits.flatten(0, 1), classes.flatten(), self.class_weight, reduction="sum")
        corners = [box_convert(which, "cxcywh", "xyxy") for which in (ours, theirs)]
        return {
            "class": cross_entropy / counts["class_weight"],
            "box": (ours - theirs).abs().sum() / counts["boxes"],
            "giou": generalized_box_iou_loss(*corners, reduction="none").sum() / counts["boxes"],
        }

    @torch.no_grad()
    def predict(self, feature_map: Tensor, targets: Targets | None = None, **settings: Any) -> list[Prediction]:
        """Find objects.

        Args:
            feature_map: [B, C, h, w].
            targets: Read for "picture" alone.
            settings: `threshold` (0): leave out what is less likely.

        Returns:
            For each image "labels" int64 [n], "scores" [n], "boxes" [n, 4] as shares of the canvas, most likely first.
        """
        feature_map = self.check(feature_map, targets)
        places = target_places(targets, len(feature_map), feature_map.device)
        logits, boxes = self.outputs(feature_map, self._valid(feature_map, places))
        share = places.flip(1).repeat(1, 2)[:, None] if self.config.mask_padding else 1.0
        scores, labels = logits[-1].softmax(-1)[..., self.class_index].max(-1)  # [B, Q]
        found = []
        for score, label, box in zip(scores, labels, boxes[-1] * share, strict=True):
            order = score.argsort(descending=True, stable=True)
            order = order[score[order] >= settings.get("threshold", 0.0)]
            found.append({"labels": label[order], "scores": score[order], "boxes": box[order]})
        return found


def _detr_config(config: DetectionConfig, width: int) -> DetrConfig:
    """Say it in transformers' words. DETR drops in attention and between the two linear layers as well."""
    return DetrConfig(
        d_model=width,
        encoder_layers=config.encoder_layers,
        decoder_layers=config.decoder_layers,
        encoder_attention_heads=config.attention_heads,
        decoder_attention_heads=config.attention_heads,
        encoder_ffn_dim=config.feedforward,
        decoder_ffn_dim=config.feedforward,
        dropout=config.dropout,
        attention_dropout=config.dropout,
        activation_dropout=config.dropout,
        activation_function="relu",
    )
