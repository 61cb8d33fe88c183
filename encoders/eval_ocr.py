"""Can words be read off an encoder's patch tokens? A small transformer head on the frozen encoder, trained and tested on word pictures.

    mmkit eval ocr --encoder runs/visft/encoder --train MJSYNTH,SYNTHTEXT --test IC03=ic03,IC13=ic13,IC15=ic15,SVTP=svtp,SVT=svt,IIIT=iiit5k \\
        --run.steps 300000 --out runs/visft/eval/ocr
    mmkit eval ocr --encoder mini-clip --train DATA/words --test DATA/words --optimizer adamw --head.width 128 --run.steps 600 \\
        --out runs/eval/mini-clip/mini_ocr

Layouts of the sets: encoders/word_data.py. Several training sets count alike, whatever their sizes. Word accuracy: equal in lower-case
letters and digits, over all words of all sets and for each set. Several heads (`--seeds`) say how much is luck.

Source: ViSFT's OCR probe. What the paper leaves open is ViTSTR's (squashed images, 94 letters, words up to 25, Adadelta, clip at 5).
"""

import hashlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

if __package__ in (None, ""):  # started as a file: its folder is on sys.path, the packages' folder is not
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from PIL import Image
from torch import nn
from tqdm import tqdm

from encoders.catalog import load_encoder
from encoders.modeling import VisionEncoder
from encoders.ocr import IGNORE_INDEX, LONGEST, ReadingHead, known_letters, labels_of, normalised, reading_loss, spelt
from encoders.probing import HEADS, ProbeConfig, ProbeImages, fit_head, over_heads, probe_data
from encoders.word_data import WordSet, read_words
from encoders.zeroshot_pair import encoder_card
from mmkit.checkpoint import atomic_write
from mmkit.config import cli_entry, load_config
from mmkit.errors import ConfigError, DataError
from mmkit.evaluation import EvaluationFolder, Ranks, relative
from mmkit.images import ImageError
from mmkit.optim import Schedule, constant_schedule, cosine_schedule
from mmkit.run import RunConfig
from mmkit.trainable import freeze, weights_hash


@dataclass
class HeadConfig:
    """The head's size."""

    width: int = field(default=512, metadata={"help": "channels"})
    layers: int = field(default=4, metadata={"help": "transformer layers"})
    heads: int = field(default=8, metadata={"help": "attention heads"})
    dropout: float = field(default=0.1, metadata={"help": "in training"})
    longest: int = field(default=LONGEST, metadata={"help": "letters of the longest word; longer ones are not taught"})

    def validate(self) -> None:
        """Refuse sizes that do not go together."""
        if min(self.width, self.layers, self.heads, self.longest) < 1 or self.width % self.heads:
            raise ConfigError(
                f"head.width {self.width}, layers {self.layers}, heads {self.heads}, longest {self.longest}: "
                "all above 0, and the width a multiple of the heads, are right"
            )


def _run() -> RunConfig:
    return RunConfig(steps=300_000, micro_batch_size=192, max_grad_norm=5.0, save_every=5000)


@dataclass
class EvalOcrConfig(ProbeConfig):
    """Settings of the OCR probe."""

    train: list[str] = field(default_factory=list, metadata={"help": "sets to learn from, with commas (layouts: encoders/word_data.py)"})
    test: list[str] = field(default_factory=list, metadata={"help": "sets to be tested on, as NAME=PATH or PATH, with commas"})
    benchmark: str = field(default="ocr", metadata={"help": "name in the summary"})
    limit_train: int = field(default=0, metadata={"help": "words of each training set, evenly spaced; 0 is all"})
    optimizer: Literal["adadelta", "adamw"] = field(
        default="adadelta", metadata={"help": "ViTSTR's, lr constant; or AdamW, warm-up and cosine"}
    )
    lr: float | None = field(default=None, metadata={"help": "learning rate; none is 1 for Adadelta, 1e-3 for AdamW"})
    head: HeadConfig = field(default_factory=HeadConfig)
    run: RunConfig = field(default_factory=_run)

    def validate(self) -> None:
        """Refuse a probe without data."""
        super().validate()
        for name in ("train", "test"):
            if not getattr(self, name):
                raise ConfigError(f"--{name} is missing: sets of words, with commas between them; --help lists all settings")
        if self.peak_lr <= 0 or self.limit_train < 0:
            raise ConfigError(f"--lr {self.lr}, --limit_train {self.limit_train}; above 0 and at least 0 are right")

    @property
    def peak_lr(self) -> float:
        """The learning rate that is meant."""
        return self.lr if self.lr is not None else 1.0 if self.optimizer == "adadelta" else 1e-3

    @property
    def training(self) -> str:
        """How heads are trained, in words."""
        length = f"{self.run.steps} steps" if self.run.steps else f"{self.run.epochs:g} epochs"
        return f"{self.optimizer}, lr {self.peak_lr:g}, {length} of {self.run.micro_batch_size} words a process"


def main(argv: Sequence[str] | None = None) -> Path:
    """Probe one encoder.

    Args:
        argv: Command line; None is the process's own.

    Returns:
        The output folder.
    """
    config, start = load_config(EvalOcrConfig, argv), time.monotonic()
    folder = EvaluationFolder(config.out, "eval_ocr", resume=config.resume, overwrite=config.overwrite)
    folder.refuse()
    learnt = [read_words(place, "train", "--train").thinned(config.limit_train) for place in config.train]
    words = learnt_words(learnt, config.head.longest)
    tests = tested_words([read_words(place, "test", "--test") for place in config.test])
    ranks = Ranks("auto")
    encoder = freeze(load_encoder(config.encoder)).float()
    identity = identify(encoder, words, tests, config)
    nn.Module.to(encoder, ranks.device)
    folder.open(identity, ranks)
    if config.overwrite and ranks.first:
        remove_heads(folder.path)
    ranks.wait()
    spec = replace(encoder.spec, resize="squash", crop_pct=1.0)
    images = ProbeImages(encoder, spec, "patch_tokens", words.open, words.names, config.run.precision)
    data, left_out = probe_data(images, labels_of(words.words, config.head.longest), config)
    heads = [
        fit_head(
            folder.path, seed, lambda: build_head(encoder, config.head), data, reading_loss,
            lambda batch: float((batch["labels"] != IGNORE_INDEX).sum()), lambda head: optimizer_of(head, config),
            lambda steps: schedule_of(steps, config), config,
        )
        for seed in config.seeds
    ]  # fmt: skip
    if ranks.first:
        rows = [row for test in tests for row in read_out(test, replace(images, open=test.open, names=test.names), heads, config)]
        atomic_write(folder.path / "answers.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        summary = summarise(rows, words, tests, left_out, folder.path, config)
        summary |= {"seconds": round(time.monotonic() - start, 1), "encoder": encoder_card(encoder)}
        folder.finish(summary)
        print(as_text(summary))
    ranks.wait()
    return folder.path


# ---- words -------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Words:
    """The training words of several sets, dealt so that each set counts alike."""

    names: list[str]
    words: list[str]
    sets: list[WordSet]
    too_long: int

    def open(self, name: str) -> Path | bytes | Image.Image:
        """Open a picture by "set/number/repetition"."""
        number, index, _ = map(int, name.split("/"))
        return self.sets[number].open(self.sets[number].names[index])


def learnt_words(sets: Sequence[WordSet], longest: int = LONGEST) -> Words:
    """Deal words from all sets in turn, the smaller ones several times; words without a known letter or of too many are left out.

    Raises:
        DataError: A set has no word that can be taught.
    """
    kept = [[index for index, word in enumerate(found.words) if 0 < len(known_letters(word)) <= longest] for found in sets]
    for found, indices in zip(sets, kept, strict=True):
        if not indices:
            raise DataError(f"--train {found.place}: none of its {len(found)} words has 1 to {longest} letters of the alphabet")
    names, words = [], []
    for turn in range(max(map(len, kept))):
        for number, indices in enumerate(kept):
            index = indices[turn % len(indices)]
            names.append(f"{number}/{index}/{turn // len(indices)}")
            words.append(known_letters(sets[number].words[index]))
    return Words(names, words, list(sets), sum(map(len, sets)) - sum(map(len, kept)))


def tested_words(sets: Sequence[WordSet]) -> list[WordSet]:
    """Leave out words without letters and digits, which this test cannot ask for.

    Raises:
        DataError: Two sets bear one name, or one has no word left.
    """
    names = [found.name for found in sets]
    if len(set(names)) != len(names):
        raise DataError(f"--test names its sets {', '.join(names)}; give each its own name, as in IC13=PATH")
    tests = []
    for found in sets:
        kept = [index for index, word in enumerate(found.words) if normalised(word)]
        if not kept:
            raise DataError(f"--test {found.place}: none of its {len(found)} words has a letter or a digit")
        tests.append(replace(found, names=[found.names[i] for i in kept], words=[found.words[i] for i in kept]))
    return tests


def identify(encoder: VisionEncoder, words: Words, tests: Sequence[WordSet], config: EvalOcrConfig) -> dict[str, Any]:
    """All that an answer depends on."""

    def digest(names: Sequence[str], said: Sequence[str]) -> str:
        sha = hashlib.sha256()
        for name, word in zip(names, said, strict=True):
            sha.update(f"{name}\t{word}\n".encode())
        return sha.hexdigest()[:16]

    return {
        "encoder": config.encoder,
        "encoder_weights": weights_hash(encoder)[:16],
        "seeds": config.seeds,
        "head": vars(config.head),
        "training": config.training,
        "precision": config.run.precision,
        "train_sha256": digest(words.names, words.words),
        "tests": {test.name: digest(test.names, test.words) for test in tests},
    }


# ---- heads -------------------------------------------------------------------------------------------------------------------------------


def build_head(encoder: VisionEncoder, config: HeadConfig) -> nn.Module:
    """Make a head for an encoder's tokens; draws from torch's generator."""
    return ReadingHead(encoder.width, encoder.num_patches, config.width, config.layers, config.heads, config.dropout, config.longest)


def optimizer_of(head: nn.Module, config: EvalOcrConfig) -> torch.optim.Optimizer:
    """ViTSTR's Adadelta, or AdamW without weight decay."""
    if config.optimizer == "adadelta":
        return torch.optim.Adadelta(head.parameters(), lr=config.peak_lr, rho=0.95, eps=1e-8)
    return torch.optim.AdamW(head.parameters(), lr=config.peak_lr, weight_decay=0.0)


def schedule_of(steps: int, config: EvalOcrConfig) -> Schedule:
    """Constant for Adadelta; 5 % warm-up and a cosine for AdamW."""
    return constant_schedule() if config.optimizer == "adadelta" else cosine_schedule(steps, 0.05)


def remove_heads(folder: Path) -> None:
    """Take away the heads of an evaluation that is thrown away."""
    import shutil

    shutil.rmtree(folder / HEADS, ignore_errors=True)


# ---- answers -----------------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def read_out(test: WordSet, images: ProbeImages, heads: Sequence[nn.Module], config: EvalOcrConfig) -> list[dict[str, Any]]:
    """Let all heads read all pictures of a set; gives a row a picture.

    Raises:
        ImageError: A picture cannot be read, and `on_bad_sample` is "error".
    """
    said = dict(zip(test.names, test.words, strict=True))
    rows: list[dict[str, Any]] = []
    place = relative(test.place.parent, config.out)
    found = images.batches(test.names, config.batch_size, config.run.num_workers)
    for names, features, broken in tqdm(found, desc=test.name, total=-(-len(test) // config.batch_size), unit="batch"):
        for bad in broken:
            if config.on_bad_sample == "error":
                raise ImageError(
                    f"{bad.reason} ('{bad.name}' of {test.name})\n  --on_bad_sample skip counts such images as missing instead"
                )
            rows.append({"question_id": f"{test.name}/{bad.name}", "kind": test.name, "missing": bad.reason})
        read = [spelt(head(features)) for head in heads] if names else []
        for number, name in enumerate(names):
            answers = [words[number] for words in read]
            right = [int(normalised(answer) == normalised(said[name])) for answer in answers]
            rows.append(
                {
                    "question_id": f"{test.name}/{name}",
                    "kind": test.name,
                    "image": f"{place}/{name}",
                    "answer": answers[0],
                    "label": said[name],
                    "answers": answers,
                    "right": right,
                    "score": sum(right) / len(right),
                }
            )
    return rows


def summarise(
    rows: Sequence[dict[str, Any]], words: Words, tests: Sequence[WordSet], left_out: dict[str, str], folder: Path, config: EvalOcrConfig
) -> dict[str, Any]:
    """Word accuracy over all words and for each set, in percent.

    Raises:
        DataError: No picture could be read.
    """
    answered = [row for row in rows if "missing" not in row]
    if not answered:
        raise DataError(f"none of {len(rows)} test pictures could be read; the first: {rows[0]['missing']}")
    metrics = {"word_accuracy": _accuracy(answered)}
    for test in tests:
        if of_set := [row for row in answered if row["kind"] == test.name]:
            metrics[f"word_accuracy/{test.name}"] = _accuracy(of_set)
    return {
        "benchmark": config.benchmark,
        "model": config.encoder,
        "protocol": {
            "compared": "lower-case letters and digits alone",
            "average": "correct words / words over all sets",
            "head": f"{config.head.layers} layers, width {config.head.width}, one query a letter; reads patch tokens after the final norm",
            "alphabet": f"94 characters, words up to {config.head.longest}",
            "images": ".",
            "resize": "squash",
            "training": config.training,
            "train": {str(found.name): len(found) for found in words.sets},
            "train_left_out": words.too_long + len(left_out),
            "tests": {test.name: len(test) for test in tests},
            "distinct_words_trained": len(set(words.words)),
            "test_words_seen_in_training": _seen(words, tests),
            "head_seeds": config.seeds,
            "interval": "Wilson over words, 95 %, of the heads' mean; ci95_over_seeds: Student's t over the heads",
        },
        "n": len(answered),
        "metrics": metrics,
        "missing": len(rows) - len(answered),
    }


def _accuracy(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return over_heads([sum(right) for right in zip(*(row["right"] for row in rows), strict=True)], len(rows))


def _seen(words: Words, tests: Sequence[WordSet]) -> str:
    """How many test words were taught: a head may know a small vocabulary by heart."""
    taught = {normalised(word) for word in words.words}
    asked = [normalised(word) for test in tests for word in test.words]
    return f"{sum(word in taught for word in asked)} of {len(asked)}"


def as_text(summary: dict[str, Any]) -> str:
    """The summary in a line for each figure."""
    lines = [f"{summary['benchmark']}, {summary['model']}:"]
    for name, row in summary["metrics"].items():
        heads = ", ".join(f"{value:.1f}" for value in row["by_seed"])
        lines.append(f"  {name} {row['value']:.1f} % ({row['ci95'][0]:.1f} to {row['ci95'][1]:.1f}) over {row['n']} words; heads: {heads}")
    return "\n".join(lines)


if __name__ == "__main__":
    cli_entry(main)
