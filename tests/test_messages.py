"""LLaVA's JSON and Hugging Face's messages say the same, and turn into each other without a loss."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_stage.chat_format import Turn
from llm_stage.conversations import ConversationDataset, encode_within
from llm_stage.messages import to_llava, to_messages
from llm_stage.rows import RowError, parse_row

GOLDEN = Path(__file__).parent / "golden" / "labels"
CASES = json.loads((GOLDEN / "cases.json").read_text(encoding="utf-8"))
TEXT = {"type": "text", "text": "What?"}
ANSWER = {"role": "assistant", "content": "A cat."}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_every_golden_row_comes_back_from_its_messages(case: dict[str, Any]) -> None:
    row = {**case["row"], "data_source": "golden"}
    messages = to_messages(row)
    assert "conversations" not in messages
    assert to_llava(json.loads(json.dumps(messages))) == row
    if "policy" not in case:
        assert vars(parse_row(messages, "x")) == vars(parse_row(row, "x"))


WORDS = st.text(max_size=12) | st.sampled_from(["<image>", "a <image>\nb<image>", "</s>", ""])


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3), st.sampled_from([None, "a.png", ["a.png", "b.png"]]))
def test_any_llava_row_comes_back_from_its_messages(rounds: list[tuple[str, str]], image: Any) -> None:
    turns = [{"from": who, "value": text} for pair in rounds for who, text in zip(("human", "gpt"), pair, strict=True)]
    row = {"id": "1", "conversations": turns, **({"image": image} if image else {})}
    assert to_llava(to_messages(row)) == row


def test_typed_parts_strings_and_names_in_parts_read_alike() -> None:
    typed = {"messages": [{"role": "user", "content": [{"type": "image"}, TEXT]}, ANSWER], "images": ["a.png"]}
    text = {"messages": [{"role": "user", "content": "<image>What?"}, ANSWER], "images": [{"path": "a.png"}]}
    named = {"messages": [{"role": "user", "content": [{"type": "image", "image": "file://a.png"}, TEXT]}, ANSWER]}
    for row in (typed, text, named):
        item = parse_row(row, "x")
        assert item.images == ["a.png"]
        assert item.turns == [Turn("user", "<image>What?"), Turn("assistant", "A cat.")]
        assert item.system is None


def test_a_system_message_is_the_rows_system_prompt(tmp_path: Path) -> None:
    from test_chat_format import FORMATS

    row = {"messages": [{"role": "system", "content": "Rhyme."}, {"role": "user", "content": [TEXT]}, ANSWER]}
    item = parse_row(row, "x")
    assert item.system == "Rhyme."
    chat = FORMATS["bytes", "chatml"]
    shown = chat.show(encode_within(item, chat, 1, 500)[0])
    assert shown.startswith("<s><|im_start|>system\nRhyme.<|im_end|><|im_start|>user\nWhat?")
    with pytest.raises(ValueError, match="no place for its system turn"):
        to_llava(row)
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))  # a file of one line is no single object
    data = ConversationDataset(tmp_path / "rows.jsonl", None, chat)
    assert len(data) == 1


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": "hi"}, "has no list of messages"),
        ({"messages": ["hi"]}, "message 0 is not"),
        ({"messages": [{"role": "user", "content": 3}]}, "message 0 is not"),
        ({"messages": [{"role": "human", "content": "a"}]}, "message 0 is of role 'human': user and assistant speak"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]}, "message 1 is of role 'system'"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}, ANSWER]}, "this one is of type 'video'"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}, TEXT]}, ANSWER]}, r"1 image part\(s\), and no image is named"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "<image>"}]}, ANSWER], "images": ["a"]},
            "stands in the words of a message",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "url": "https://x/y.png"}]}, ANSWER]},
            "is not a file: fetch it",
        ),
        ({"messages": [{"role": "user", "content": [TEXT]}, ANSWER], "images": [{"bytes": "..."}]}, "pictures inside the row are not read"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "path": "a"}]}, ANSWER], "images": ["b"]},
            "name all of them in one place",
        ),
        ({"messages": [{"role": "user", "content": [TEXT]}, {"role": "assistant", "content": [{"type": "image"}]}]}, "an image in an answer"),
        ({"messages": [{"role": "user", "content": [TEXT]}]}, "the last human turn has no answer"),
    ],
)  # fmt: skip
def test_messages_that_are_not_right_are_named(row: Any, expected: str) -> None:
    with pytest.raises(RowError, match=expected) as error:
        parse_row({"id": "7", **row}, "data.json, row 3")
    assert "data.json, row 3 (id '7')" in str(error.value)


def test_a_row_error_survives_the_way_out_of_a_worker() -> None:
    error = pickle.loads(pickle.dumps(RowError("x.json, row 1: no answer", "roles")))
    assert (str(error), error.reason) == ("x.json, row 1: no answer", "roles")
