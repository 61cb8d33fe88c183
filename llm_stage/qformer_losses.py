"""The three losses of BLIP-2's stage 1, with the negatives of all ranks.

Letters: B pairs of this rank, G pairs of all ranks, n image tokens of width W, Q queries, T text tokens, E width of the joint space.

    ITC   which of G texts belongs to the image, and the reverse: cosines, the best of the Q queries counts
    ITM   do they belong together? the pair itself, the text with a hard negative image, the image with a hard negative text
    ITG   the caption, word by word, from the queries

Three passes do it (LAVIS takes four): the queries never see the text, so one pass with the prefix mask serves ITC's images and ITG.

Source: BLIP-2, section 3.2; LAVIS, lavis/models/blip2_models/blip2_qformer.py. Departures: pairs with equal captions are not each other's
negatives; ITG is a mean over the words of all ranks; the hard negatives of a step are a function of the seed, whatever the ranks.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from llm_stage.qformer import QFormer
from llm_stage.qformer_images import ImageTokens, Reading
from mmkit.ranks import rows_of_all_ranks

SMOOTHING = 0.1  # of ITC's and ITG's targets
IGNORED = -100


@dataclass(frozen=True)
class Pairs:
    """Pairs of one micro-batch.

    Attributes:
        features: The frozen encoder's tokens [B, n, W].
        ids: Captions [B, T], from `cls` to `sep`, padded.
        mask: [B, T], 1 on words.
        image_ids: Whose picture it is [B]; pairs with one id are each other's positives.
    """

    features: Tensor
    ids: Tensor
    mask: Tensor
    image_ids: Tensor


@dataclass(frozen=True)
class Everyone:
    """What a rank needs of all ranks' pairs: features [G, n, W], ids, mask [G, T], positives [B, G], and where its own begin."""

    features: Tensor
    ids: Tensor
    mask: Tensor
    positive: Tensor
    offset: int


def gather_pairs(pairs: Pairs, pad: int) -> Everyone:
    """Collect the pairs of all ranks. Texts are padded to the longest of them first."""
    longest = pairs.ids.new_tensor([pairs.ids.shape[1]])
    length = int(rows_of_all_ranks(longest)[0].max())
    short = length - pairs.ids.shape[1]
    ids, offset = rows_of_all_ranks(F.pad(pairs.ids, (0, short), value=pad))
    mask = rows_of_all_ranks(F.pad(pairs.mask, (0, short)))[0]
    image_ids = rows_of_all_ranks(pairs.image_ids)[0]
    _, text_ids = torch.unique(ids, dim=0, return_inverse=True)  # equal captions have equal numbers
    mine = slice(offset, offset + len(pairs.ids))
    positive = (image_ids[mine, None] == image_ids[None]) | (text_ids[mine, None] == text_ids[None])
    return Everyone(rows_of_all_ranks(pairs.features)[0], ids, mask, positive, offset)


def stage1_loss(
    model: QFormer,
    pairs: Pairs,
    noise: torch.Generator,
    words: float | None = None,
    weights: tuple[float, float, float] = (1.0, 1.0, 1.0),
    both_sides: bool = False,
    negatives: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the loss of this rank's pairs; the mean over ranks is that of the whole batch.

    Args:
        model: The Q-Former.
        pairs: This rank's.
        noise: Generator of the hard negatives, in the same state on all ranks.
        words: What ITG's sum is divided by; None is the words of this batch. With several ranks or micro-batches, the mean of their words.
        weights: Of ITC, ITM and ITG; 0 leaves a loss out.
        both_sides: ITC sends gradients into the gathered side too; as published it does not.
        negatives: Indices among all pairs (images for the texts [B], texts for the images [B]) instead of drawn ones.

    Returns:
        The loss [] and its terms "itc", "itm", "itg" [].
    """
    config = model.config
    everyone = gather_pairs(pairs, config.pad)
    images = ImageTokens(model.image_states(pairs.features))
    ids, mask = everyone.ids[everyone.offset :][: len(pairs.ids)], everyone.mask[everyone.offset :][: len(pairs.ids)]
    written = ids.clone()
    written[:, 0] = config.dec
    queries, logits = model.queries_and_caption(Reading(images), written, mask)
    image_rows, text_rows = model.image_embeddings(queries), model.text_embeddings(model.text(ids, mask))
    terms: dict[str, Tensor] = {}
    terms["itc"], to_text, to_image = itc_loss(image_rows, text_rows, model.temp[0], everyone.positive, both_sides)
    if weights[1]:
        drawn = negatives or hard_negatives(to_text, to_image, everyone, noise)
        terms["itm"] = itm_loss(model, images, ids, mask, everyone, drawn)
    if weights[2]:
        terms["itg"] = itg_loss(logits, written, mask, words)
    named: Mapping[str, float] = dict(zip(("itc", "itm", "itg"), weights, strict=True))
    idle = [part for part, weight in ((model.itm_head, weights[1]), (model.cls, weights[2])) if not weight]
    nothing = [0.0 * weight.sum() for part in idle for weight in part.parameters()]  # ranks wait for the gradient of every weight
    return torch.stack([named[name] * term for name, term in terms.items()] + nothing).sum(), terms


def itc_loss(
    images: Tensor, texts: Tensor, temperature: Tensor, positive: Tensor, both_sides: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Contrast images with texts.

    Args:
        images: Unit rows [B, Q, E].
        texts: Unit rows [B, E].
        temperature: [].
        positive: Which of all pairs are right for which of this rank's [B, G].
        both_sides: Let the gradient into the gathered rows.

    Returns:
        The mean over both directions [], and the scores over temperature: image to text and text to image [B, G], without gradient.
    """
    all_images, all_texts = (rows_of_all_ranks(rows if both_sides else rows.detach())[0] for rows in (images, texts))
    to_text = torch.einsum("bqe,ge->bgq", images, all_texts).amax(dim=-1) / temperature
    to_image = torch.einsum("be,gqe->bgq", texts, all_images).amax(dim=-1) / temperature
    share = positive / positive.sum(dim=1, keepdim=True)
    target = (1 - SMOOTHING) * share + SMOOTHING / positive.shape[1]
    losses = [-(target * F.log_softmax(scores, dim=1)).sum(dim=1).mean() for scores in (to_text, to_image)]
    return (losses[0] + losses[1]) / 2, to_text.detach(), to_image.detach()


def hard_negatives(to_text: Tensor, to_image: Tensor, everyone: Everyone, noise: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw an image for each text and a text for each image, the likelier the more alike, never a positive.

    Returns:
        Indices among all pairs: images for the texts [B], texts for the images [B]; -1 where there is no negative.
    """
    size = everyone.positive.shape[1]
    mine = slice(everyone.offset, everyone.offset + len(to_text))
    none_left = everyone.positive.all(dim=1)
    drawn = []
    for scores in (to_image, to_text):  # a text asks for images, an image for texts
        uniform = torch.rand(size, size, generator=noise)[mine].to(scores.device)
        gumbel = -torch.log(-torch.log(uniform.clamp(1e-20, 1 - 1e-7)))  # the largest of score + Gumbel noise is a draw from softmax(score)
        drawn.append((scores.float() + gumbel).masked_fill(everyone.positive, -torch.inf).argmax(dim=1).masked_fill(none_left, -1))
    return drawn[0], drawn[1]


def itm_loss(model: QFormer, images: ImageTokens, ids: Tensor, mask: Tensor, everyone: Everyone, drawn: tuple[Tensor, Tensor]) -> Tensor:
    """Tell the pairs [B] from their texts with another image and their images with another text: cross-entropy over 3 B rows [].

    Rows for which there was no negative count nothing.
    """
    other_image, other_text = drawn
    own = torch.arange(len(ids), device=ids.device)
    if len(everyone.ids) == len(ids):  # no other ranks: all images are here
        reading = Reading(images, torch.cat([own, other_image.clamp_min(0), own]))
    else:
        others = ImageTokens(model.image_states(everyone.features[other_image.clamp_min(0)]))
        reading = Reading((images, others), torch.cat([own, len(ids) + own, own]))
    logits = model.match(
        reading,
        torch.cat([ids, ids, everyone.ids[other_text.clamp_min(0)]]),
        torch.cat([mask, mask, everyone.mask[other_text.clamp_min(0)]]),
    )
    right = torch.ones_like(other_image)
    label = torch.cat([right, *(torch.where(other < 0, IGNORED, 0) for other in drawn)])
    counted = (label != IGNORED).sum()
    all_counted = rows_of_all_ranks(counted[None].float())[0].mean()  # each rank's share of the whole mean
    return F.cross_entropy(logits.float(), label, ignore_index=IGNORED, reduction="sum") / all_counted


def itg_loss(logits: Tensor, ids: Tensor, mask: Tensor, words: float | None = None) -> Tensor:
    """Predict each word of the captions [B, T] from logits [B, T, V] of the place before it; the sum over `words` []."""
    target = ids[:, 1:].masked_fill(mask[:, 1:] == 0, IGNORED)
    total = F.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), target.flatten(), ignore_index=IGNORED, label_smoothing=SMOOTHING, reduction="sum"
    )
    return total / (words if words is not None else (target != IGNORED).sum())
