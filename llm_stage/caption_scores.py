"""From captions to figures: CIDEr-D, BLEU, ROUGE-L in Python, METEOR and SPICE where Java is.

Figures on words cut by CoreNLP's own tokeniser are named as the literature names them; on words cut in Python they are named
"..._ptb_python" (the two tokenisers agree on ordinary captions, see `mmkit.caption_tokens`). CIDEr hangs on the set: its weights are the
document frequencies of the references of the images that are scored, so that a part of a benchmark cannot be compared with the whole.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llm_stage.benchmark_files import VqaItem
from mmkit.caption_scoring import BleuCounts, bleu_counts, bleu_of, cider_d, rouge_l
from mmkit.caption_tokens import PTB_JAVA, PTB_PYTHON, java_tokens, java_works, package_folders, tokens
from mmkit.errors import ConfigError, DataError
from mmkit.stats import bootstrap

ORDERS = 4
JAVA_METRICS = ("meteor", "spice")


@dataclass(frozen=True)
class Cut:
    """The captions of some images as words.

    Attributes:
        items: Images with a caption by the model, in order.
        given: The model's words for each.
        references: People's words for each, several captions.
        kind: Which tokeniser cut them.
    """

    items: list[VqaItem]
    given: list[list[str]]
    references: list[list[list[str]]]
    kind: str

    def named(self, metric: str) -> str:
        """A metric's name with these words."""
        return metric if self.kind == PTB_JAVA else f"{metric}_{self.kind}"

    def part(self, kind: str) -> Cut:
        """The images of one kind (NoCaps: of one domain)."""
        chosen = [index for index, item in enumerate(self.items) if item.kind == kind]
        return Cut([self.items[i] for i in chosen], [self.given[i] for i in chosen], [self.references[i] for i in chosen], self.kind)


def choose_tokeniser(name: str) -> str:
    """The tokeniser to use: the one named, or for "auto" Java's where it runs.

    Raises:
        ConfigError: Java's was named and cannot run.
    """
    if name == "auto":
        return PTB_JAVA if java_works() else PTB_PYTHON
    if name == PTB_JAVA and not java_works():
        raise ConfigError("--tokeniser ptb_java needs Java and `pip install 'mmkit[captions]'`; ptb_python needs neither")
    return name


def check_java_metrics(names: Sequence[str]) -> list[str]:
    """The metrics that Java computes, where it can: "auto" takes METEOR if it runs, a name that cannot run is an error.

    Raises:
        ConfigError: A name is unknown, or what it needs is not there.
    """
    wanted = [name for name in names if name != "none"]
    if wanted == ["auto"]:
        return ["meteor"] if java_works() else []
    for name in wanted:
        if name not in JAVA_METRICS:
            raise ConfigError(f"--java_metrics {name}: {', '.join(JAVA_METRICS)}, auto or none are right")
        if not java_works():
            raise ConfigError(f"--java_metrics {name} needs Java and `pip install 'mmkit[captions]'`; they are not here")
        if name == "spice" and not _spice_models():
            raise ConfigError(
                "--java_metrics spice needs Stanford's models in pycocoevalcap/spice/lib, which that package fetches by itself at"
                " its first use: run pycocoevalcap's SPICE once where the network is, or leave spice out"
            )
    return wanted


def cut(items: Sequence[VqaItem], answers: Mapping[Any, Mapping[str, Any]], tokeniser: str) -> Cut:
    """Cut the answered images' captions and references into words.

    Raises:
        DataError: Nothing was answered, or an answered image has no reference.
    """
    answered = [item for item in items if answers.get(item.question_id, {}).get("answer") is not None]
    if not answered:
        raise DataError(f"none of {len(items)} images has a caption: there is nothing to score")
    bare = [item.question_id for item in answered if not item.answers]
    if bare:
        raise DataError(f"{len(bare)} images have no reference caption, {bare[0]} for one: there is nothing to score them against")
    texts = [text for item in answered for text in (str(answers[item.question_id]["answer"]), *item.answers)]
    words = iter(java_tokens(texts) if tokeniser == PTB_JAVA else map(tokens, texts))
    given, references = [], []
    for item in answered:
        given.append(next(words))
        references.append([next(words) for _ in item.answers])
    return Cut(answered, given, references, tokeniser)


def summarise_captions(
    items: Sequence[VqaItem], answers: Mapping[Any, Mapping[str, Any]], words: Cut, java_metrics: Sequence[str] = ()
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Score the captions: percent with 95 % intervals (bootstrap over images; CIDEr with its weights held), by kind where there are several.

    Args:
        items: All images that were to be captioned.
        answers: Answer rows by image id.
        words: Of the images that have a caption.
        java_metrics: Of `JAVA_METRICS`; they are among the official figures.

    Returns:
        The summary's parts, and the lines of scores.jsonl, whose `score` is the image's CIDEr-D.
    """
    cider = np.array(cider_d(words.given, words.references))  # [n]
    rouge = np.array([rouge_l(given, texts) for given, texts in zip(words.given, words.references, strict=True)])
    counts = [bleu_counts(given, texts) for given, texts in zip(words.given, words.references, strict=True)]
    kinds = sorted({item.kind for item in words.items})
    metrics: dict[str, Any] = {}
    for kind in ["", *(kinds if len(kinds) > 1 else [])]:
        chosen = [index for index, item in enumerate(words.items) if kind in ("", item.kind)]
        bleu = np.array([_row(counts[index]) for index in chosen])
        found = {"cider": _metric(_with_ones(cider[chosen]), _mean), "rouge_l": _metric(_with_ones(rouge[chosen]), _mean)}
        found |= {f"bleu{order}": _metric(bleu, _bleu_statistic(order)) for order in range(1, ORDERS + 1)}
        metrics |= {words.named(name) + (f"/{kind}" if kind else ""): value for name, value in found.items()}
    answered = {item.question_id for item in words.items}
    missing = [item.question_id for item in items if item.question_id not in answered]
    summary = {
        "n": len(words.items),
        "metrics": metrics,
        "official": {
            **official(words, java_metrics),
            **({kind: official(words.part(kind), ()) for kind in kinds} if len(kinds) > 1 else {}),
        },
        "item_metric": words.named("cider"),
        "seconds": round(sum(float(row.get("seconds", 0.0)) for row in answers.values()), 1),
        "missing": len(missing),
        "missing_questions": {str(name): answers.get(name, {}).get("missing", "not answered") for name in missing},
    }
    rows = [
        {
            "question_id": item.question_id,
            "score": round(float(value), 6),
            "kind": item.kind,
            "image": item.own_image,
            "reference": item.answers[0],
            "answer": str(answers[item.question_id]["answer"]),
        }
        for item, value in zip(words.items, cider, strict=True)
    ]
    return summary, rows


def official(words: Cut, java_metrics: Sequence[str]) -> dict[str, float]:
    """The figures as pycocoevalcap prints them, fractions; CIDEr's weights are those of these images alone."""
    counts = [bleu_counts(given, texts) for given, texts in zip(words.given, words.references, strict=True)]
    bleu = bleu_of(BleuCounts.total(counts))
    rouge = [rouge_l(given, texts) for given, texts in zip(words.given, words.references, strict=True)]
    figures = {"CIDEr": float(np.mean(cider_d(words.given, words.references))), "ROUGE_L": float(np.mean(rouge))}
    figures |= {f"Bleu_{order}": value for order, value in enumerate(bleu, 1)}
    for name in java_metrics:
        figures[name.upper()] = _JAVA[name](words)
    return {words.named(name): value for name, value in figures.items()}


def _metric(columns: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray]) -> dict[str, Any]:
    """Percent with an interval, resampled by image."""
    value = float(statistic(columns.sum(axis=0, keepdims=True))[0])
    low, high = np.percentile(bootstrap(columns, statistic), [2.5, 97.5])
    return {"value": round(100 * value, 2), "ci95": [round(100 * float(low), 2), round(100 * float(high), 2)], "n": len(columns)}


def _with_ones(values: np.ndarray) -> np.ndarray:
    return np.stack([values, np.ones(len(values))], axis=1)  # [n, 2]


def _mean(totals: np.ndarray) -> np.ndarray:
    return np.asarray(totals[:, 0] / totals[:, 1])


def _row(counts: BleuCounts) -> list[float]:
    return [*counts.matches, *counts.guesses, counts.length, counts.reference_length]


def _bleu_statistic(order: int) -> Callable[[np.ndarray], np.ndarray]:
    """BLEU-`order` of many totals at once [draws, 10] -> [draws]."""

    def statistic(totals: np.ndarray) -> np.ndarray:
        ratios = (totals[:, :order] + 1e-15) / (totals[:, ORDERS : ORDERS + order] + 1e-9)
        brevity = np.minimum(1.0, np.exp(1 - (totals[:, 9] + 1e-15) / (totals[:, 8] + 1e-9)))
        return np.asarray(np.prod(ratios, axis=1) ** (1 / order) * brevity)

    return statistic


# ---- Java ----------------------------------------------------------------------------------------------------------------------------


def _meteor(words: Cut) -> float:
    from pycocoevalcap.meteor.meteor import Meteor

    return float(_quiet(Meteor(), words))


def _spice(words: Cut) -> float:
    from pycocoevalcap.spice.spice import Spice

    return float(_quiet(Spice(), words))


def _quiet(scorer: Any, words: Cut) -> float:
    """Run one of pycocoevalcap's scorers without its chatter."""
    given = {index: [" ".join(caption)] for index, caption in enumerate(words.given)}
    references = {index: [" ".join(text) for text in texts] for index, texts in enumerate(words.references)}
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return float(scorer.compute_score(references, given)[0])


def _spice_models() -> bool:
    return any(list((Path(root) / "spice" / "lib").glob("stanford-corenlp-*-models.jar")) for root in package_folders())


_JAVA: dict[str, Callable[[Cut], float]] = {"meteor": _meteor, "spice": _spice}
