"""Train BLIP-2's Q-Former in front of a frozen encoder: stage 1, image-text contrast, matching and captions from pairs.

    python llm_stage/train_qformer.py --recipe mini_qformer --encoder runs/uta/encoder --data.source DATA/coco/captions_train.json \\
        --data.image_root DATA/images/train --output_dir runs/qformer
    torchrun --nproc_per_node 8 llm_stage/train_qformer.py --recipe qformer_stage1 --encoder E --data.source "shards/{0000..0099}.tar" ...
    python llm_stage/train_qformer.py --recipe qformer_calibrate --pretrained QFORMER --encoder NEW ...     keys, values and norm alone

RUN/model is a Q-Former folder with the encoder inside (llm_stage/qformer_folder.py); `mmkit eval qformer-retrieval` reads it.

Source: BLIP-2 (Li et al., 2023), section 3.2; the recipe's numbers from its appendix and from LAVIS. Negatives are those of a micro-batch on
all ranks, as in LAVIS: accumulation averages over smaller contests, it does not make one large contest.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # started as a file: its folder is on sys.path, the packages' folder is not
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from torch import Tensor

from encoders.captions import Captioned
from encoders.captions import read_captions as read_caption_file
from encoders.heads.base import StepCounts
from encoders.image_batches import batches as image_batches
from encoders.pair_sources import open_pairs, read_source
from encoders.pairs import FilePairs, sample_captions
from encoders.pairs import Pairs as PairData
from llm_stage.pair_features import FrozenPairConfig, features_of, keep_features
from llm_stage.qformer import QFormerConfig
from llm_stage.qformer_build import CALIBRATED, calibrated, new_qformer, trained_parts
from llm_stage.qformer_folder import QFormerCard, QFormerParts, encoder_width, load_frozen_encoder, load_qformer, save_qformer
from llm_stage.qformer_losses import Pairs, stage1_loss
from llm_stage.qformer_retrieval import best_by_itc
from llm_stage.qformer_text import QFormerTokenizer, clean_caption
from mmkit.batches import derive_seed
from mmkit.config import cli_entry, load_config
from mmkit.errors import ConfigError, DataError
from mmkit.images import ImageSpec
from mmkit.launch import refuse_shares
from mmkit.optim import cosine_schedule, param_groups
from mmkit.run import Run, RunConfig
from mmkit.trainable import set_trainable, trainable_table, weights_hash

RECIPES = Path(__file__).parent / "recipes"
_NEGATIVES = 3  # purpose of a seed


@dataclass
class NetworkConfig:
    """Shape of a new Q-Former; the defaults are the paper's."""

    width: int = field(default=768, metadata={"help": "of the Q-Former"})
    layers: int = field(default=12, metadata={"help": "of the Q-Former"})
    heads: int = field(default=12, metadata={"help": "of its attention"})
    feed_forward: int = field(default=3072, metadata={"help": "inner width of its MLPs"})
    queries: int = field(default=32, metadata={"help": "tokens that read the image"})
    cross_attention_every: int = field(default=2, metadata={"help": "layers 0, this, twice this ... look at the image"})
    joint_width: int = field(default=256, metadata={"help": "of the space that images and texts are compared in"})
    dropout: float = field(default=0.1, metadata={"help": "in training"})


@dataclass
class QFormerSettings:
    """Settings of stage 1."""

    encoder: str = field(default="", metadata={"help": "an encoder, joined ones too; frozen"})
    feature_layer: int = field(default=-2, metadata={"help": "its hidden state that is read, without its final norm; -2 as in BLIP-2"})
    pretrained: str = field(default="", metadata={"help": "begin with this Q-Former folder"})
    calibrate: bool = field(default=False, metadata={"help": "with --pretrained: train only how it reads this encoder"})
    renew: bool = field(default=True, metadata={"help": "with --calibrate: draw keys, values and norm anew"})
    bert: str = field(default="", metadata={"help": "begin with this BERT (bert-base-uncased, or a folder); its tokenizer is taken too"})
    tokenizer: str = field(default="", metadata={"help": "name or folder; empty: BERT's, or a small one made of the captions"})
    words: int = field(default=4096, metadata={"help": "largest vocabulary of a tokenizer made of the captions"})
    network: NetworkConfig = field(default_factory=NetworkConfig)
    weights: list[float] = field(default_factory=lambda: [1.0, 1.0, 1.0], metadata={"help": "of ITC, ITM, ITG; the last two may be 0"})
    itm_from: float = field(
        default=0.0, metadata={"help": "step, or share of all if below 1, from which ITM is trained: it is most of a step's work"}
    )
    both_sides: bool = field(default=False, metadata={"help": "ITC sends gradients into gathered features too; as published it does not"})
    max_tokens: int = field(default=32, metadata={"help": "longest caption, special tokens included"})
    lr: float = field(default=1e-4, metadata={"help": "peak learning rate"})
    final_lr: float = field(default=1e-5, metadata={"help": "that the cosine ends at"})
    warmup: float = field(default=5000, metadata={"help": "steps, or share of all steps if below 1"})
    weight_decay: float = field(default=0.05, metadata={"help": "of matrices"})
    betas: list[float] = field(default_factory=lambda: [0.9, 0.98], metadata={"help": "AdamW's"})
    val_captions: str = field(default="", metadata={"help": "captions of held-out images (COCO's and others): retrieval by ITC is printed"})
    val_images: str = field(default="", metadata={"help": "folder of those images"})
    val_every: int = field(default=0, metadata={"help": "steps between such checks; 0 is only at the end"})
    shuffle_pairs: bool = field(default=False, metadata={"help": "the control: every picture gets another one's caption"})
    data: FrozenPairConfig = field(default_factory=lambda: FrozenPairConfig(scale=[0.5, 1.0]))
    run: RunConfig = field(default_factory=RunConfig)

    def validate(self) -> None:
        """Refuse what cannot be meant."""
        if len(self.weights) != 3 or self.weights[0] <= 0 or min(self.weights) < 0:
            raise ConfigError(f"weights is {self.weights}; three numbers are right, ITC's above 0: ITM's negatives come from its scores")
        if self.itm_from < 0 or (self.itm_from and not self.weights[1]):
            raise ConfigError(f"itm_from is {self.itm_from}; a step, a share below 1, or 0 (always) is right, and ITM's weight above 0")
        if len(self.betas) != 2:
            raise ConfigError(f"betas is {self.betas}; AdamW has two, as in [0.9, 0.98]")
        if self.pretrained and (self.bert or self.tokenizer):
            raise ConfigError("--pretrained brings its own words: --bert and --tokenizer are for new Q-Formers")
        if self.run.micro_batch_size < 2:
            raise ConfigError("run.micro_batch_size is 1: ITM needs another pair to be wrong about; 2 is the least, 64 a start")
        if bool(self.val_captions) != bool(self.val_images):
            raise ConfigError("--val_captions and --val_images go together: give both or none")
        if self.val_captions:
            refuse_shares(self.run.deepspeed)

    def require(self) -> None:
        """Refuse a run without what a recipe cannot know."""
        if not self.encoder:
            raise ConfigError("--encoder is missing: the encoder that the Q-Former is to read")
        if self.calibrate and not self.pretrained:
            raise ConfigError("--calibrate needs --pretrained: the Q-Former folder that is calibrated")


class CaptionedPairs:
    """Pairs of a training with their picture's number; with `shuffled`, captions of the next picture in a fixed random order."""

    def __init__(self, pairs: PairData, shuffled: bool, seed: int) -> None:
        self.pairs, self.other = pairs, list(range(len(pairs)))
        if shuffled:
            order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(derive_seed(seed, _NEGATIVES))).tolist()
            for place, index in enumerate(order):
                self.other[index] = order[(place + 1) % len(order)]
        if hasattr(pairs, "order"):
            self.order = pairs.order

    def __len__(self) -> int:
        return len(self.pairs)

    def get(self, epoch: int, index: int) -> tuple[Tensor, str, int]:
        """Give a picture uint8 [3, S, S], its caption, and its number."""
        image, caption = self.pairs.get(epoch, index)
        other = self.other[index]
        return image, caption if other == index else self.pairs.caption(epoch, other), index


def collate(tokenizer: QFormerTokenizer) -> Callable[[Sequence[tuple[Tensor, str, int]]], dict[str, Tensor]]:
    """Make the function that turns pairs into "images" uint8 [B, 3, S, S], "ids", "mask" [B, T] and "image_ids" [B]."""

    def make(items: Sequence[tuple[Tensor, str, int]]) -> dict[str, Tensor]:
        images, captions, numbers = zip(*items, strict=True)
        ids, mask = tokenizer([clean_caption(caption) or caption for caption in captions])
        return {"images": torch.stack(images), "ids": ids, "mask": mask, "image_ids": torch.tensor(numbers)}

    return make


class StepNoise:
    """Generators for the hard negatives: the same on all ranks, a function of (seed, step, micro-batch)."""

    def __init__(self, seed: int) -> None:
        self.seed, self.step, self.count = seed, -1, 0
        self.generator = torch.Generator()

    def at(self, step: int) -> torch.Generator:
        """Give the generator of the next micro-batch of a step."""
        self.count = self.count + 1 if step == self.step else 0
        self.step = step
        self.generator.manual_seed(derive_seed(self.seed, _NEGATIVES, step, self.count))
        return self.generator


def build_parts(settings: QFormerSettings, source: Any) -> QFormerParts:
    """Load the encoder and make, or load, the Q-Former; before the run folder is made, as it may fail."""
    encoder = load_frozen_encoder(settings.encoder, settings.feature_layer)
    card = QFormerCard(settings.encoder, "", settings.feature_layer, "calibrate" if settings.calibrate else "train", settings.max_tokens)
    if settings.pretrained:
        earlier = load_qformer(settings.pretrained)
        model = calibrated(earlier.qformer, encoder_width(encoder), renew=settings.renew and settings.calibrate)
        return QFormerParts(encoder, model, QFormerTokenizer(earlier.tokenizer.tokenizer, settings.max_tokens), card)
    tokenizer = make_tokenizer(settings, source)
    n = settings.network
    config = QFormerConfig(
        encoder_width(encoder), n.width, n.layers, n.heads, n.feed_forward, n.queries, n.cross_attention_every, len(tokenizer),
        max(512 if settings.bert else settings.max_tokens, settings.max_tokens), n.joint_width, n.dropout, **tokenizer.special,
    )  # fmt: skip
    return QFormerParts(encoder, new_qformer(config, derive_seed(settings.run.seed), settings.bert), tokenizer, card)


def make_tokenizer(settings: QFormerSettings, source: Any) -> QFormerTokenizer:
    """Load the tokenizer, or the run's own, or make one of the captions."""
    saved = Path(settings.run.output_dir) / "tokenizer"
    if settings.tokenizer or settings.bert:
        return QFormerTokenizer.load(settings.tokenizer or settings.bert, settings.max_tokens)
    if saved.is_dir() and settings.run.resume:
        return QFormerTokenizer.load(str(saved), settings.max_tokens)
    pairs = open_pairs(settings.data, source, ImageSpec(), settings.run.seed)
    return QFormerTokenizer.learn(sample_captions(pairs), settings.words, settings.max_tokens)


def main(argv: Sequence[str] | None = None) -> Path:
    """Train, and give the run folder."""
    settings = load_config(QFormerSettings, argv, recipe_dir=RECIPES)
    settings.require()
    source = read_source(settings.data)
    parts = build_parts(settings, source)
    if source is None and parts.spec.size != 96:
        raise ConfigError(f"{settings.encoder} takes {parts.spec.size} pixels, minidata draws 96; name files: --data.source")
    held_out = HeldOut(settings, parts) if settings.val_captions else None
    model = parts.qformer.train()
    if settings.calibrate:
        set_trainable(model, CALIBRATED)
    groups = param_groups(model, settings.lr, settings.weight_decay)
    optimizer = torch.optim.AdamW(groups, betas=(settings.betas[0], settings.betas[1]))
    run = Run(settings.run, name="q-former", settings=settings)
    if run.is_main:
        parts.tokenizer.save(run.folder / "tokenizer")
    pairs = open_pairs(settings.data, source, parts.spec, settings.run.seed, run.folder / "bad_samples.jsonl")
    dataset = CaptionedPairs(pairs, settings.shuffle_pairs, settings.run.seed)
    origins = {"encoder": settings.encoder, "(rest)": settings.pretrained or settings.bert or "random"}
    table = torch.nn.ModuleDict({"encoder": parts.encoder, "qformer": model})
    run.print(trainable_table(table, {"encoder": parts.encoder, **trained_parts(model)}, origins))
    frozen = weights_hash(parts.encoder)
    run.prepare(model, optimizer)
    parts.encoder.to(run.device)
    keep_features(settings.data, parts, [pairs], run)
    steps = run.plan(dataset)
    run.set_schedule(cosine_schedule(steps, settings.warmup, settings.final_lr / settings.lr))
    counts, noise = StepCounts(lambda batch: {"words": float(batch["mask"][:, 1:].sum())}), StepNoise(settings.run.seed)
    itc, itm, itg = settings.weights
    itm_from = settings.itm_from * (steps if settings.itm_from < 1 else 1)
    for batch in run.batches(dataset, collate(parts.tokenizer), weigh=lambda _: 1.0, look_ahead=counts):
        with run.accelerator.autocast():
            features = features_of(parts, batch["images"])  # [B, n, W], no graph
        mine = Pairs(features, batch["ids"], batch["mask"], batch["image_ids"])
        weights = itc, itm if run.step >= itm_from else 0.0, itg
        loss, terms = run.forward(stage1_loss, mine, noise.at(run.step), counts.mean["words"], weights, settings.both_sides)
        run.backward(loss, **terms)
        run.log(**terms, temperature=model.temp[0])
        if run.updated and held_out and settings.val_every and (run.step + 1) % settings.val_every == 0 and run.step + 1 < run.steps:
            held_out.check(run, parts)
    if held_out:
        held_out.check(run, parts)
    if isinstance(pairs, FilePairs) and (bad := pairs.bad_samples()):
        run.print(f"{len(bad)} unreadable pairs or shards were left out (bad_samples.jsonl):\n  " + "\n  ".join(bad.values()))
    export(run, parts, settings, frozen)
    folder = run.finish()
    run.print(f"q-former: the model is in {folder / 'model'}")
    return folder


class HeldOut:
    """Retrieval on held-out captions by ITC alone, while it trains: what the loss of a batch does not tell."""

    def __init__(self, settings: QFormerSettings, parts: QFormerParts) -> None:
        self.data: Captioned = read_caption_file(Path(settings.val_captions), Path(settings.val_images), "test", 0, False)
        self.spec, self.batch_size = parts.spec, settings.run.micro_batch_size

    @torch.no_grad()
    def check(self, run: Run, parts: QFormerParts) -> None:
        """Print R@1 and R@5, both ways; all ranks wait for the first."""
        if run.is_main:
            model, data = parts.qformer, self.data
            training = model.training
            model.eval()
            images = []
            for names, pixels, broken in image_batches(data.source, data.paths, self.spec, self.batch_size, 0):
                if broken:
                    raise DataError(f"{broken[0].reason}\n  it is among --val_images")
                assert names
                images.append(model.image_embeddings(model.queries(model.image_states(parts.features(pixels.to(run.device))))))
            texts = []
            for start in range(0, len(data.captions), 256):
                ids, mask = (part.to(run.device) for part in parts.tokenizer([clean_caption(text) for text in data.captions[start:][:256]]))
                texts.append(model.text_embeddings(model.text(ids, mask)))
            by_image, by_text = best_by_itc(torch.cat(images), torch.cat(texts), 10)
            own: list[list[int]] = [[] for _ in data.paths]
            for caption, image in enumerate(data.owner):
                own[image].append(caption)
            places = {"text": by_image.ranks(own, 10), "image": by_text.ranks([[image] for image in data.owner], 10)}
            recalls = ", ".join(f"{kind} R@{k} {100 * (rank < k).mean():.1f}" for kind, rank in places.items() for k in (1, 5))
            run.print(f"step {run.step}: held-out retrieval of {len(data.paths)} images, {len(data.captions)} captions: {recalls}")
            model.train(training)
        run.accelerator.wait_for_everyone()


def export(run: Run, parts: QFormerParts, settings: QFormerSettings, frozen: str) -> None:
    """Write RUN/model; all ranks take part.

    Raises:
        DataError: The encoder changed during the training.
    """
    state = run.weights()
    if not run.is_main or state is None:
        return
    if weights_hash(parts.encoder.cpu()) != frozen:
        raise DataError("the encoder changed during a training in which it is frozen: not saved; the checkpoints are there")
    training = {
        "data": Path(settings.data.source).name,
        "steps": run.step,
        "seed": settings.run.seed,
        "pairs": run.step * run.layout.global_batch_size,
    }
    parts.card = QFormerCard(settings.encoder, "", settings.feature_layer, parts.card.mode, settings.max_tokens, training)
    save_qformer(parts, run.folder / "model", state={name: tensor.cpu() for name, tensor in state.items()}, overwrite=True)


if __name__ == "__main__":
    cli_entry(main)
