"""Tiles: which grid a picture gets, that nothing of it is lost, and that a LLaVA with tiles counts, trains and answers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llava_tiny import picture, tiny_llm, write_parts
from PIL import Image
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from llm_stage import check_data
from llm_stage.chat_format import ChatFormat, Turn
from llm_stage.conversations import ConversationDataset, check
from llm_stage.generate import ChatModel, ChatRequest
from llm_stage.tiles import Tiles
from llm_stage.train_llava import main
from mmkit.errors import ConfigError, DataError
from mmkit.images import ImageSpec
from mmkit.records import read_jsonl

FOUR = Tiles(4, ImageSpec(32))


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((32, 32), (1, 1)),
        ((20, 12), (1, 1)),  # small pictures are not made larger
        ((64, 32), (1, 2)),
        ((40, 160), (4, 1)),
        ((100, 100), (2, 2)),
        ((60, 50), (2, 2)),
        ((1, 20_000), (4, 1)),
        ((20_000, 1), (1, 4)),
    ],
)
def test_the_grid_shows_most_of_a_picture_with_least_padding(size: tuple[int, int], grid: tuple[int, int]) -> None:
    assert FOUR.grid(*size) == grid


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from([0, 2, 3, 4, 6, 9]))
def test_there_are_as_many_views_as_were_counted_and_all_are_of_one_size(width: int, height: int, most: int) -> None:
    tiles = Tiles(most, ImageSpec(32))
    whole, *parts = tiles.views(Image.new("RGB", (width, height)))
    assert whole.size == (width, height)
    assert 1 + len(parts) == tiles.count(width, height) <= 1 + most
    assert {part.size for part in parts} <= {(32, 32)}


def test_tiles_laid_side_by_side_are_the_picture() -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    _, *parts = FOUR.views(Image.fromarray(pixels))
    rows = [np.hstack([np.array(part) for part in parts[start : start + 2]]) for start in (0, 2)]
    assert np.array_equal(np.vstack(rows), pixels)


def test_a_picture_lying_on_its_side_is_counted_as_it_is_shown(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (128, 32)).save(tmp_path / "turned.jpg", exif=exif)
    item = {
        "id": "1",
        "image": "turned.jpg",
        "conversations": [{"from": "human", "value": "<image>\nwhat"}, {"from": "gpt", "value": "red"}],
    }
    (tmp_path / "data.json").write_text(json.dumps([item]))
    dataset = dataset_of(tmp_path, Tiles(2, ImageSpec(32)))
    assert dataset.views == [[3]]
    assert len(dataset[0]["images"]) == 3  # type: ignore[index]


def dataset_of(folder: Path, tiles: Tiles | None, **more: Any) -> ConversationDataset:
    chat = ChatFormat(tiny_llm()[1], "own")
    return ConversationDataset(folder / "data.json", folder, chat, ImageSpec(32), 16, 2048, tiles=tiles, **more)


def write_rows(folder: Path) -> Path:
    """Rows with pictures of several shapes: one, two, in a later turn, and none."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, colour, size in (
        ("wide", "red", (80, 30)),
        ("tall", "blue", (30, 120)),
        ("small", "green", (20, 20)),
        ("large", "white", (90, 90)),
    ):
        picture(colour, size).save(folder / f"{name}.png")
    ask = [("human", "<image>\nwhat colour is it"), ("gpt", "it is red")]
    rows: list[dict[str, Any]] = [
        {"id": "1", "image": "wide.png", "conversations": ask},
        {"id": "2", "image": ["tall.png", "small.png"], "conversations": [("human", "<image> or <image>"), ("gpt", "blue")]},
        {"id": "3", "image": ["small.png", "large.png"], "conversations": [*ask, ("human", "and <image>"), ("gpt", "white")]},
        {"id": "4", "conversations": [("human", "say red"), ("gpt", "red")]},
    ]
    for row in rows:
        row["conversations"] = [{"from": who, "value": value} for who, value in row["conversations"]]
    (folder / "data.json").write_text(json.dumps(rows * 2))
    return folder


def test_placeholders_are_as_many_as_the_tokens_of_all_views(tmp_path: Path) -> None:
    dataset = dataset_of(write_rows(tmp_path), FOUR)
    image = dataset.chat_format.tokenizer.convert_tokens_to_ids("<image>")
    views = [sum(counts) for counts in dataset.views]
    assert views == [4, 6, 6, 0] * 2  # wide: whole + 3; tall: whole + 4, small: whole; ...
    for index, count in enumerate(views):
        item = dataset[index]
        assert item is not None
        assert item["input_ids"].count(image) == 16 * count
        assert len(item["images"]) == count
    plain = dataset_of(tmp_path, None)
    assert [a - b for a, b in zip(dataset.lengths, plain.lengths, strict=True)] == [
        16 * (count - n) for count, n in zip(views, [1, 2, 2, 0] * 2, strict=True)
    ]
    found = check(tmp_path / "data.json", tmp_path, dataset.chat_format, 16, 2048, tiles=FOUR)
    assert found.longest == max(len(dataset[i]["input_ids"]) for i in range(8))  # type: ignore[index]


def test_a_round_that_is_cut_off_takes_its_views_along(tmp_path: Path) -> None:
    dataset = dataset_of(write_rows(tmp_path), FOUR)
    dataset.max_length = len(dataset[2]["input_ids"]) - 1  # type: ignore[index]
    item = dataset[2]
    assert item is not None
    assert len(item["images"]) == 1  # the large picture's five views went with the second round


def test_a_picture_without_a_header_is_a_bad_row(tmp_path: Path) -> None:
    write_rows(tmp_path)
    (tmp_path / "wide.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"wide\.png.* is not an image"):
        dataset_of(tmp_path, FOUR)
    assert len(dataset_of(tmp_path, FOUR, on_bad_sample="skip")) == 6


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tiles")
    encoder, llm = write_parts(folder)
    data = write_rows(folder / "data")
    words = ["--encoder", str(encoder), "--llm", str(llm), "--json", str(data / "data.json"), "--images", str(data), "--template", "own"]
    words += ["--stage", "2", "--tiles", "4", "--lr", "1e-3", "--run.steps", "3", "--run.micro_batch_size", "4", "--run.log_every", "1"]
    return {
        "folder": folder,
        "padded": main([*words, "--run.output_dir", str(folder / "padded")]),
        "packed": main([*words, "--data.pack", "true", "--run.output_dir", str(folder / "packed")]),
    }


def test_packed_rows_learn_the_same(trained: dict[str, Path]) -> None:
    padded, packed = ([row["loss"] for row in read_jsonl(trained[name] / "metrics.jsonl")] for name in ("padded", "packed"))
    assert packed == pytest.approx(padded, rel=1e-4)


def test_the_result_is_an_ordinary_llava_that_is_given_several_images(trained: dict[str, Path]) -> None:
    chat = ChatModel.load(trained["padded"] / "model")
    assert chat.tiles is not None
    request = ChatRequest([Turn("user", "<image>\nwhat colour is it")], [trained["folder"] / "data" / "wide.png"])
    answer = chat.generate([request], 6)[0]
    assert "".join(chat.stream(request, 6)) == answer
    stock: Any = LlavaForConditionalGeneration.from_pretrained(trained["padded"] / "model").eval()
    processor: Any = LlavaProcessor.from_pretrained(trained["padded"] / "model")
    views = FOUR.views(Image.open(request.images[0]).convert("RGB"))  # type: ignore[arg-type]
    text = chat.tokenizer.apply_chat_template(
        [{"role": "user", "content": "<image>" * len(views) + "\nwhat colour is it"}], tokenize=False, add_generation_prompt=True
    )
    inputs = processor(images=views, text=text, return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        ids = stock.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert chat._text(ids[0, inputs["input_ids"].shape[1] :].tolist()) == answer


def test_a_batch_of_many_shapes_answers_as_its_rows_alone(trained: dict[str, Path]) -> None:
    chat, data = ChatModel.load(trained["padded"] / "model"), trained["folder"] / "data"
    requests = [ChatRequest([Turn("user", "what colour is it")], [data / f"{name}.png"]) for name in ("wide", "small", "tall")]
    requests.append(ChatRequest([Turn("user", "<image> or <image>")], [data / "large.png", data / "small.png"]))
    assert chat.generate(requests, 6, batch_size=4) == [chat.generate([request], 6)[0] for request in requests]
    with pytest.raises(DataError, match="stands more often in the chat than there are images"):
        chat.generate([ChatRequest([Turn("user", "<image> or <image>")], [data / "large.png"])], 6)


def test_settings_that_cannot_be_meant_are_refused(trained: dict[str, Path], tmp_path: Path) -> None:
    words = ["--encoder", "mini-clip", "--llm", "mini-llm", "--json", "x", "--run.output_dir", str(tmp_path / "run")]
    with pytest.raises(ConfigError, match="tiles is 1; 0 shows the whole picture alone"):
        main([*words, "--tiles", "1"])
    with pytest.raises(ConfigError, match=r"data\.feature_cache keeps whole pictures"):
        main([*words, "--tiles", "4", "--data.feature_cache", str(tmp_path / "cache")])


def test_the_preflight_counts_the_views_that_the_training_makes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(tmp_path)
    words = [str(tmp_path / "data.json"), "--images", str(tmp_path), "--llm", "mini-llm", "--encoder", "mini-clip"]
    for number, more in enumerate(([], ["--tiles", "4"])):
        check_data.main([*words, *more, "--report", str(tmp_path / f"{number}.json")])
    plain, cut = (json.loads((tmp_path / f"{number}.json").read_text())["tokens"] for number in range(2))
    dataset = dataset_of(tmp_path, Tiles(4, ImageSpec(96)))
    more = [sum(counts) - len(counts) for counts in dataset.views]
    assert sum(more) > 0
    assert cut["total"] - plain["total"] == sum(more) * cut["per_image"]
    with pytest.raises(ConfigError, match="--tiles needs --images"):
        check_data.main([str(tmp_path / "data.json"), "--tiles", "4"])
