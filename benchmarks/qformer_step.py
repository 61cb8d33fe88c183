"""A Q-Former's stage-1 step in three passes against the plain four, and re-ranking with kept features against encoding again.

    OMP_NUM_THREADS=1 python benchmarks/qformer_step.py                       # the paper's Q-Former behind its ViT-L/14
    OMP_NUM_THREADS=1 python benchmarks/qformer_step.py --encoder vit_base_patch16_clip_224
    python benchmarks/qformer_step.py --device cuda --batch 64 --rounds 20

Four passes: queries alone, text alone, matching, and the caption behind the queries, as the losses are written down; we read queries and caption
in one, and compute an image's keys and values once. Both sides are given the same hard negatives, and their losses must agree.

Re-ranking: each of some captions' best k pictures is matched with it. The plain side encodes them for each caption; ours has them in memory,
and goes picture by picture. The scores must agree. The encoder has random weights, which changes no time.

The sides take turns. On a CPU with one thread the clock is the process's own CPU time, which other programs do not stretch.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor
from torch.nn import functional as F

from encoders.modeling import VisionEncoder, VisionEncoderConfig
from llm_stage.qformer import QFormer, QFormerConfig
from llm_stage.qformer_folder import encoder_features
from llm_stage.qformer_losses import Pairs, gather_pairs, hard_negatives, itc_loss, itg_loss, stage1_loss
from llm_stage.qformer_retrieval import Candidates, Matches, best_by_itc, match_texts, sought

GOAL_STEP, GOAL_RERANK = 1.3, 10.0


def main() -> None:
    """Measure both, print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="vit_large_patch14_clip_224", help="timm's name of the architecture; 224 pixels")
    parser.add_argument("--batch", type=int, default=8, help="pairs of a step")
    parser.add_argument("--words", type=int, default=32, help="tokens of a caption")
    parser.add_argument("--images", type=int, default=16, help="pictures of the retrieval; as many captions")
    parser.add_argument("--k", type=int, default=8, help="pictures matched with a caption")
    parser.add_argument("--captions", type=int, default=4, help="captions re-ranked")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    flags = parser.parse_args()
    torch.manual_seed(0)
    encoder = VisionEncoder(VisionEncoderConfig(architecture=flags.encoder)).eval().to(flags.device)
    model = QFormer(QFormerConfig(encoder.config.hidden_size, dropout=0.0)).to(flags.device)
    with torch.no_grad():
        features = encoder_features(encoder, torch.randn(flags.batch, 3, 224, 224, device=flags.device), -2)
    step(model, features, flags)
    rerank(model.eval(), encoder, flags)


def texts(count: int, words: int, device: str) -> tuple[Tensor, Tensor]:
    """Random captions [count, words] without padding, and their mask."""
    ids = torch.randint(1000, 30000, (count, words), device=device)
    ids[:, 0], ids[:, -1] = 101, 102
    return ids, torch.ones_like(ids)


def step(model: QFormer, features: Tensor, flags: argparse.Namespace) -> None:
    """Forward and backward of the three losses."""
    ids, mask = texts(flags.batch, flags.words, flags.device)
    pairs = Pairs(features, ids, mask, torch.arange(flags.batch, device=flags.device))
    drawn = negatives(model, pairs)
    sides: dict[str, Callable[[], Tensor]] = {
        "three passes": lambda: stage1_loss(model, pairs, torch.Generator(), negatives=drawn)[0],
        "four passes": lambda: four_passes(model, pairs, drawn),
    }
    with torch.no_grad():
        found = [float(side()) for side in sides.values()]
    if abs(found[0] - found[1]) > 1e-3:
        raise SystemExit(f"the losses differ: {found}")

    def train(side: Callable[[], Tensor]) -> None:
        model.zero_grad(set_to_none=True)
        side().backward()

    medians = alternate({name: (lambda side=side: train(side)) for name, side in sides.items()}, flags)  # type: ignore[misc]
    ratio = medians["four passes"] / medians["three passes"]
    print(f"stage-1 step, {flags.batch} pairs of {flags.words} tokens: {line(medians)}; {ratio:.2f}x (goal {GOAL_STEP})")


@torch.no_grad()
def negatives(model: QFormer, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """Hard negatives, drawn once for both sides."""
    image = model.image_states(pairs.features)
    rows = model.image_embeddings(model.queries(image)), model.text_embeddings(model.text(pairs.ids, pairs.mask))
    everyone = gather_pairs(pairs, model.config.pad)
    _, to_text, to_image = itc_loss(*rows, model.temp[0], everyone.positive)
    return hard_negatives(to_text, to_image, everyone, torch.Generator().manual_seed(0))


def four_passes(model: QFormer, pairs: Pairs, drawn: tuple[Tensor, Tensor]) -> Tensor:
    """The losses, one pass after the other."""
    everyone, image = gather_pairs(pairs, model.config.pad), model.image_states(pairs.features)
    rows = model.image_embeddings(model.queries(image)), model.text_embeddings(model.text(pairs.ids, pairs.mask))
    itc, _, _ = itc_loss(*rows, model.temp[0], everyone.positive)
    other_image, other_text = drawn
    shown = torch.cat([image, image[other_image], image])
    logits = model.match(shown, torch.cat([pairs.ids, pairs.ids, pairs.ids[other_text]]), pairs.mask.repeat(3, 1))
    itm = F.cross_entropy(logits, torch.tensor([1, 0, 0], device=image.device).repeat_interleave(len(image)))
    written = pairs.ids.clone()
    written[:, 0] = model.config.dec
    return itc + itm + itg_loss(model.queries_and_caption(image, written, pairs.mask)[1], written, pairs.mask)


@torch.no_grad()
def rerank(model: QFormer, encoder: VisionEncoder, flags: argparse.Namespace) -> None:
    """The best k pictures of some captions, matched."""
    pictures = torch.randn(flags.images, 3, 224, 224, device=flags.device)
    ids, mask = texts(flags.images, flags.words, flags.device)
    states = model.image_states(encoder_features(encoder, pictures, -2))
    images, words = model.image_embeddings(model.queries(states)), model.text_embeddings(model.text(ids, mask))
    by_image, by_text = best_by_itc(images, words, flags.k)
    by_text = Candidates(by_text.index[: flags.captions], by_text.score[: flags.captions])
    wanted = sought(Candidates(by_image.index[:, :0], by_image.score[:, :0]), by_text, flags.k)  # these captions' pictures alone

    def kept() -> Tensor:
        logits = [match_texts(model, image, ids, mask, some) for image, some in zip(states, wanted, strict=True)]
        return Matches(wanted, logits, len(by_text.index)).rerank(by_text, flags.k, of_images=False).score

    def again() -> Tensor:
        scores = []
        for row, found in enumerate(by_text.index):
            encoded = model.image_states(encoder_features(encoder, pictures[found], -2))
            logits = model.match(encoded, ids[row].expand(flags.k, -1), mask[row].expand(flags.k, -1))[:, 1]
            scores.append((logits + by_text.score[row]).sort(descending=True).values)
        return torch.stack(scores)

    if not torch.allclose(kept(), again(), atol=1e-4):
        raise SystemExit("the scores differ")
    medians = alternate({"features kept": kept, "encoded again": again}, flags)
    ratio = medians["encoded again"] / medians["features kept"]
    print(f"re-ranking {flags.k} pictures for each of {flags.captions} captions: {line(medians)}; {ratio:.1f}x (goal {GOAL_RERANK:.0f})")


def alternate(sides: dict[str, Callable[[], object]], flags: argparse.Namespace) -> dict[str, float]:
    """Median seconds of each side, turn by turn, after one round to warm up."""
    clock = time.process_time if os.environ.get("OMP_NUM_THREADS") == "1" and flags.device == "cpu" else time.perf_counter
    found: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(flags.rounds + 1):
        for name in list(sides)[:: 1 if number % 2 else -1]:
            if flags.device != "cpu":
                torch.accelerator.synchronize()
            begin = clock()
            sides[name]()
            if flags.device != "cpu":
                torch.accelerator.synchronize()
            found[name] += [clock() - begin] if number else []
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def line(medians: dict[str, float]) -> str:
    """All sides in a line."""
    return ", ".join(f"{name} {seconds:.2f} s" for name, seconds in medians.items())


if __name__ == "__main__":
    main()
