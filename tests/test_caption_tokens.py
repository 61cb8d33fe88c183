"""Captions are cut into words as CoreNLP's tokeniser cuts them, on every golden string."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mmkit.caption_tokens import java_tokens, java_works, tokens

GOLDEN = Path(__file__).parent / "golden" / "eval"


def golden(name: str) -> Any:
    return json.loads((GOLDEN / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("row", golden("ptb_tokeniser.json"), ids=lambda row: row["input"][:20])
def test_a_golden_string_is_cut_as_the_java_tokeniser_cuts_it(row: dict[str, str]) -> None:
    assert " ".join(tokens(row["input"])) == row["ptb"]


def test_every_golden_caption_is_cut_as_the_java_tokeniser_cuts_it() -> None:
    for image in golden("captions.json")["cases"][0]["images"]:
        pairs = zip([*image["references"], image["candidate"]], [*image["references_tokenised"], image["candidate_tokenised"]], strict=True)
        for text, cut in pairs:
            assert " ".join(tokens(text)) == cut, text


@pytest.mark.skipif(not java_works(), reason="no Java, or no pycocoevalcap")
def test_the_java_tokeniser_gives_the_golden_words() -> None:
    rows = golden("ptb_tokeniser.json")
    assert [" ".join(words) for words in java_tokens([row["input"] for row in rows])] == [row["ptb"] for row in rows]


@pytest.mark.skipif(not java_works(), reason="no Java, or no pycocoevalcap")
def test_signs_prices_abbreviations_and_slips_of_the_pen_are_cut_as_in_java() -> None:
    texts = """A man on a bench.A dog too.|It is on 5th Ave.|He is a Jr.|a stop sign on Main St. in town|the temp is -5 degrees|'50s diner
        10:30 a.m. train|w/ a dog|James' bike|y'all ain't|it'd, that'll, who've, you're, I'm|two-year old, two- year old|a "No Parking" sign
        Washington D.C.|#1 fan|R&B|TV.|A cat ,sitting .|hello!! what??|1,000.50|3.5-inch|$20 bill, £5, €10, 30°|dog 's bone|don 't|10's
        rock 'n roll|'tis|No. of dogs|no.|it's 3.|email me@x.com|foo--bar|dog—cat|a…b|A, B, C."""
    rows = [text.strip() for line in texts.split("\n") for text in line.split("|")]
    assert [" ".join(tokens(text)) for text in rows] == [" ".join(words) for words in java_tokens(rows)]
