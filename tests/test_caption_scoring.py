"""CIDEr-D, BLEU and ROUGE-L are pycocoevalcap's on the golden corpora, and obey what they are made for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mmkit.caption_scoring import BleuCounts, bleu_counts, bleu_of, cider_d, rouge_l
from mmkit.errors import DataError

GOLDEN = json.loads((Path(__file__).parent / "golden" / "eval" / "captions.json").read_text(encoding="utf-8"))
IMAGES = {image["id"]: image for image in GOLDEN["cases"][0]["images"]}


def corpus(case: dict[str, Any]) -> tuple[list[list[str]], list[list[list[str]]]]:
    images = [IMAGES[name] for name in case.get("ids", IMAGES)]
    return [i["candidate_tokenised"].split() for i in images], [[text.split() for text in i["references_tokenised"]] for i in images]


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["name"])
def test_a_golden_corpus_scores_as_the_official_code_scores_it(case: dict[str, Any]) -> None:
    given, references = corpus(case)
    expected = case["expected"]["corpus"]
    cider = cider_d(given, references)
    assert sum(cider) / len(cider) == pytest.approx(expected["CIDEr"], abs=1e-12)
    rouge = [rouge_l(mine, texts) for mine, texts in zip(given, references, strict=True)]
    assert sum(rouge) / len(rouge) == pytest.approx(expected["ROUGE_L"], abs=1e-12)
    counts = [bleu_counts(mine, texts) for mine, texts in zip(given, references, strict=True)]
    for order, value in enumerate(bleu_of(BleuCounts.total(counts)), 1):
        assert value == pytest.approx(expected[f"Bleu_{order}"], abs=1e-12)
    for name, figures in zip(case.get("ids", IMAGES), range(len(given)), strict=True):
        wanted = case["expected"]["per_image"].get(str(name), {})
        if "CIDEr" in wanted:
            assert cider[figures] == pytest.approx(wanted["CIDEr"], abs=1e-9)
            assert rouge[figures] == pytest.approx(wanted["ROUGE_L"], abs=1e-9)
            assert bleu_of(counts[figures])[3] == pytest.approx(wanted["Bleu_4"], abs=1e-6)


def test_one_image_alone_has_no_cider() -> None:
    assert cider_d([["a", "dog"]], [[["a", "dog"]]]) == [0.0]


def test_saying_a_word_again_gains_nothing() -> None:
    references = [[["a", "red", "kite"]], [["two", "dogs", "play"]]]
    once, often = (cider_d([words, ["two"]], references)[0] for words in (["a", "red", "kite"], ["a", "red", "kite", "kite", "kite"]))
    assert often < once


def test_captions_and_references_must_pair() -> None:
    with pytest.raises(DataError, match="1 captions for 2 images"):
        cider_d([["a"]], [[["a"]], [["b"]]])
    with pytest.raises(DataError, match="image 1 has no reference"):
        cider_d([["a"], ["b"]], [[["a"]], []])
