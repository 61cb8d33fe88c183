"""Rows become examples or errors that name file, row and id; nothing is cut, skipped or read as markup in silence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

from llm_stage.chat_format import IGNORE_INDEX, ChatFormat
from llm_stage.conversations import Check, ConversationDataset, check, collate, parse_row, read_rows
from mmkit.images import ImageSpec

TOKENIZER = AutoTokenizer.from_pretrained(Path(__file__).parent / "golden" / "labels" / "tokenizer_bytes")
CHAT = ChatFormat(TOKENIZER, "chatml", system="")
SPEC = ImageSpec(size=8)
TOKENS = 4


def row(*texts: str, image: Any = None, name: str = "r1") -> dict[str, Any]:
    turns = [{"from": "gpt" if index % 2 else "human", "value": text} for index, text in enumerate(texts)]
    return {"id": name, "conversations": turns, **({"image": image} if image is not None else {})}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for index, colour in enumerate(["red", "blue"]):
        Image.new("RGB", (16, 16), colour).save(folder / f"{index}.png")
    Image.effect_noise((64, 64), 50).convert("RGB").save(folder / "whole.jpg")
    (folder / "cut.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:900])
    (folder / "text.jpg").write_text("this is not a picture")
    return folder


def written(folder: Path, rows: Any, name: str = "data.json") -> Path:
    path = folder / name
    path.write_text(rows if isinstance(rows, str) else json.dumps(rows), encoding="utf-8")
    return path


def dataset(folder: Path, images: Path | None, rows: Any, **settings: Any) -> ConversationDataset:
    return ConversationDataset(written(folder, rows), images, CHAT, SPEC if images else None, TOKENS, **settings)


GOOD = row("<image>\nWhat?", "Red.", image="0.png")


def test_an_image_row_gives_ids_labels_and_the_normalised_picture(tmp_path: Path, images: Path) -> None:
    item = dataset(tmp_path, images, [GOOD])[0]
    assert item is not None
    assert item["input_ids"].count(CHAT.image_token_id) == TOKENS
    assert TOKENIZER.decode([label for label in item["labels"] if label != IGNORE_INDEX]) == "Red.<|im_end|>"
    expected = SPEC.transform()(Image.new("RGB", (16, 16), "red"))
    assert torch.equal(item["images"][0], expected)
    again = dataset(tmp_path, images, [GOOD])[0]
    assert again is not None
    assert again["input_ids"] == item["input_ids"]


def test_json_and_jsonl_hold_the_same_rows(tmp_path: Path) -> None:
    rows = [GOOD, row("a", "b", name="r2")]
    lines = "\n".join(json.dumps(item) for item in rows) + "\n\n"
    assert read_rows(written(tmp_path, rows)) == read_rows(written(tmp_path, lines, "data.jsonl")) == rows


def test_a_leading_gpt_turn_is_dropped_and_other_keys_are_ignored() -> None:
    item = parse_row(
        {**row("hi", "there"), "model": "x", "conversations": [{"from": "gpt", "value": "ready"}, *row("hi", "there")["conversations"]]},
        "x",
    )
    assert [turn.role for turn in item.turns] == ["user", "assistant"]
    assert item.turns[0].text == "hi"


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        ("text", 'row 1 is "text": a row is an object'),
        ({"id": "x"}, "has no 'conversations'"),
        ({"id": "x", "conversations": []}, "has conversations []"),
        ({"id": "x", "conversations": ["hi"]}, 'turn 0 is "hi"'),
        ({"id": "x", "conversations": [{"from": "human", "value": 3}]}, "turn 0 is"),
        ({"id": "x", "conversations": [{"from": "system", "value": "s"}]}, "from 'system': only 'human' and 'gpt' speak"),
        (
            {"id": "x", "conversations": [{"from": "human", "value": "a"}, {"from": "human", "value": "b"}]},
            "roles out of order (human human)",
        ),
        (row("a", name="x"), "the last human turn has no answer"),
        (row("a", "", name="x"), "no answer has a word"),
        (row("a", "  ", "b", "\n", name="x"), "no answer has a word"),
        (row("<image> and <image>", "b", image="0.png", name="x"), "2 <image> mark(s) in the human turns and 1 image(s)"),
        (row("no mark", "b", image="0.png", name="x"), "0 <image> mark(s) in the human turns and 1 image(s)"),
        (row("<image>", "b", image=7, name="x"), "image is 7"),
        (row("<image>", "b", image="gone.png", name="x"), "gone.png is not there"),
    ],
)
def test_a_bad_row_is_named_or_skipped_and_counted(
    tmp_path: Path, images: Path, bad: Any, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError) as error:
        dataset(tmp_path, images, [GOOD, bad])
    assert expected in str(error.value)
    assert "data.json, row 1" in str(error.value)
    assert not isinstance(bad, dict) or "(id 'x')" in str(error.value)
    assert "on_bad_sample skip" in str(error.value)
    kept = dataset(tmp_path, images, [GOOD, bad], on_bad_sample="skip")
    assert len(kept) == len(kept.skipped) == 1
    assert expected in kept.skipped[0]
    assert "1 of 2 rows skipped" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "expected"), [("cut.jpg", "truncated or damaged"), ("text.jpg", "not an image")])
def test_a_broken_picture_is_an_error_or_a_counted_none(tmp_path: Path, images: Path, name: str, expected: str) -> None:
    bad = row("<image>\nWhat?", "That.", image=name, name="x")
    with pytest.raises(ValueError, match=expected) as error:
        dataset(tmp_path, images, [GOOD, bad])[1]
    assert name in str(error.value)
    assert "row 1 (id 'x')" in str(error.value)
    kept = dataset(tmp_path, images, [GOOD, bad], on_bad_sample="skip")
    assert kept[1] is None
    assert kept[1] is None
    assert len(kept.broken) == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[{", "line 1, column 3"),
        ('{"id": 1, "conversations": []}\n{"id": ', "line 2"),
        ("[]", "holds no rows"),
        ("", "holds no rows"),
        ('{"version": 1, "data": []}', "holds one object with the keys ['data', 'version']"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(ValueError) as error:
        read_rows(written(tmp_path, text))
    assert expected in str(error.value)
    assert "data.json" in str(error.value)


def test_a_missing_or_binary_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no conversations file .*nowhere\.json"):
        read_rows(tmp_path / "nowhere.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"binary\.json is not UTF-8"):
        read_rows(tmp_path / "binary.json")
    with pytest.raises(ValueError, match="cannot be read"):
        read_rows(tmp_path)


def test_whole_trailing_rounds_are_left_out_and_images_never_cut(tmp_path: Path, images: Path) -> None:
    long = row("<image>\nFirst?", "One.", "Second?", "Two.", "Third?", "Three.", image="0.png")
    full = dataset(tmp_path, images, [long])[0]
    assert full is not None
    shorter = dataset(tmp_path, images, [long], max_length=len(full["input_ids"]) - 1)[0]
    assert shorter is not None
    assert shorter["input_ids"] == full["input_ids"][: len(shorter["input_ids"])]
    text = TOKENIZER.decode(shorter["input_ids"])
    assert text.endswith("Two.<|im_end|>")
    assert shorter["input_ids"].count(CHAT.image_token_id) == TOKENS
    with pytest.raises(ValueError, match=r"its first round alone has \d+ tokens \(4 of images, never cut\), max_length is 10"):
        dataset(tmp_path, images, [long], max_length=10)[0]


def test_an_image_of_a_round_left_out_goes_with_it(tmp_path: Path, images: Path) -> None:
    two = row("<image>\nA?", "One.", "<image>\nB?", "Two.", image=["0.png", "1.png"])
    full = dataset(tmp_path, images, [two])[0]
    assert full is not None
    assert len(full["images"]) == 2
    item = dataset(tmp_path, images, [two], max_length=len(full["input_ids"]) - 1)[0]
    assert item is not None
    assert len(item["images"]) == 1
    assert item["input_ids"].count(CHAT.image_token_id) == TOKENS


def test_marks_in_a_text_only_row_are_letters(tmp_path: Path) -> None:
    item = dataset(tmp_path, None, [row("Is <image> or </s> or <|im_end|> a tag?", "Yes, <image> is.")])[0]
    assert item is not None
    ids = item["input_ids"]
    assert ids.count(CHAT.image_token_id) == 0
    assert ids.count(TOKENIZER.eos_token_id) == 0
    assert ids.count(TOKENIZER.convert_tokens_to_ids("<|im_end|>")) == 2
    assert item["images"] == []


def test_images_without_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has an image, and no folder"):
        dataset(tmp_path, None, [GOOD])


def test_a_file_without_one_good_row_is_refused_even_under_skip(tmp_path: Path, images: Path) -> None:
    with pytest.raises(ValueError, match="not one of its 2 rows"):
        dataset(tmp_path, images, [{}, {}], on_bad_sample="skip")


def test_collate_pads_on_the_right_and_keeps_every_label(tmp_path: Path, images: Path) -> None:
    data = dataset(tmp_path, images, [GOOD, row("Longer question without a picture?", "Yes.")])
    items = [item for item in (data[0], data[1]) if item is not None]
    batch = collate(items, 3, CHAT.image_token_id, TOKENS)
    ids, mask, labels, pixels = batch["input_ids"], batch["attention_mask"], batch["labels"], batch["pixel_values"]
    assert ids is not None
    assert mask is not None
    assert labels is not None
    assert pixels is not None
    assert pixels.shape == (1, 3, 8, 8)
    for index, item in enumerate(items):
        n = len(item["input_ids"])
        assert ids[index, :n].tolist() == item["input_ids"]
        assert labels[index, :n].tolist() == item["labels"]
        assert mask[index].tolist() == [1] * n + [0] * (ids.shape[1] - n)
        assert (labels[index, n:] == IGNORE_INDEX).all()
    assert collate([items[1]], 3)["pixel_values"] is None


def test_collate_refuses_a_row_whose_placeholders_are_anothers(tmp_path: Path, images: Path) -> None:
    data = dataset(tmp_path, images, [GOOD, GOOD])
    first, second = data[0], data[1]
    assert first is not None
    assert second is not None
    first["input_ids"].insert(1, CHAT.image_token_id)
    first["labels"].insert(1, IGNORE_INDEX)
    second["input_ids"].remove(CHAT.image_token_id)
    second["labels"].pop(0)
    with pytest.raises(ValueError, match="row 0 of the batch: 5 image placeholders"):
        collate([first, second], 3, CHAT.image_token_id, TOKENS)


def test_lengths_need_no_pictures(tmp_path: Path, images: Path) -> None:
    data = dataset(tmp_path, images, [GOOD, row("one two", "three")])
    for path in images.iterdir():
        path.unlink()
    assert data.lengths == [3 + TOKENS, 3]


def test_check_counts_what_a_training_would_meet(tmp_path: Path, images: Path) -> None:
    rows = [
        GOOD,
        row("a", "b", "c", "", name="r2"),
        row("<image>\nWhat?", "That.", image="cut.jpg", name="r3"),
        row("a", name="r4"),
        row("x", "y", "z " * 40, "w", name="r5"),
    ]
    found = check(written(tmp_path, rows), images, CHAT, TOKENS, max_length=80)
    assert (found.rows, found.image_rows, found.text_rows, found.rounds, found.empty_answers) == (5, 2, 2, 6, 1)
    assert (found.shortened_rows, found.lost_rounds) == (1, 1)
    assert len(found.bad) == 2
    assert any("cut.jpg" in message for message in found.bad)
    assert any("(id 'r4')" in message for message in found.bad)
    assert isinstance(found, Check)
    assert "bad rows 2" in str(found)
