"""Other people's models through the same doors: LLaVA-NeXT and BLIP-2 of transformers, tiny and random."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from llava_tiny import TEMPLATE, picture, tiny_tokenizer
from test_convert_blip2 import stage2, world  # noqa: F401 - fixtures
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
)

from llm_stage import eval_vqa
from llm_stage.chat_format import Turn
from llm_stage.chat_models import load_chat
from llm_stage.convert_blip2 import to_hf
from llm_stage.generate import ChatRequest
from llm_stage.stock_chat import StockChat
from mmkit.errors import ConfigError, DataError

PARTS = TEMPLATE.replace(
    "m['content']", "(m['content'] if m['content'] is string else m['content'] | map(attribute='text', default='<image>') | join)"
)


@pytest.fixture(scope="module")
def llava_next(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("next")
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    vision = CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8)
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=1024, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
    )  # fmt: skip
    grids = [[32, 64], [64, 32], [64, 64]]
    config = LlavaNextConfig(
        vision_config=vision, text_config=text, image_token_id=tokenizer.convert_tokens_to_ids("<image>"), image_grid_pinpoints=grids,
        vision_feature_layer=-2, vision_feature_select_strategy="default", image_seq_length=16,
    )  # fmt: skip
    LlavaNextForConditionalGeneration(config).eval().save_pretrained(folder)
    images = LlavaNextImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_grid_pinpoints=grids)
    processor = LlavaNextProcessor(
        images, tokenizer, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=PARTS
    )
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["llava_next", "blip-2"])
def chat(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> StockChat:
    if request.param == "llava_next":
        folder = request.getfixturevalue("llava_next")
    else:
        folder = to_hf([str(request.getfixturevalue("stage2")), str(tmp_path_factory.mktemp("hf") / "blip2")])
    found = load_chat(folder)
    assert isinstance(found, StockChat)
    return found


def asked(words: str, colour: str, size: tuple[int, int] = (40, 36)) -> ChatRequest:
    return ChatRequest([Turn("user", words)], [picture(colour, size)])


def test_a_batch_answers_as_its_rows_alone(chat: StockChat) -> None:
    requests = [asked("w7 what", "red"), asked("w7 w8 w9 how many pictures are there", "blue", (90, 30)), asked("w8", "green", (30, 80))]
    alone = [chat.generate([request], 6)[0] for request in requests]
    assert chat.generate(requests, 6, batch_size=3) == alone
    assert "".join(chat.stream(requests[1], 6)) == alone[1]


def test_marks_and_pictures_must_agree(chat: StockChat) -> None:
    with pytest.raises(DataError, match="request 0: 2 times <image> and 1 picture"):
        chat.generate([asked("<image> or <image>", "red")], 4)


def test_memory_that_runs_out_halves_the_batch(chat: StockChat, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [asked("w7 what", colour) for colour in ("red", "blue", "green", "white")]
    whole, generate = chat.generate(requests, 4, batch_size=4), chat.model.generate

    def small(**inputs: Any) -> Any:
        if len(inputs["input_ids"]) > 2:
            raise torch.OutOfMemoryError("too much")
        return generate(**inputs)

    monkeypatch.setattr(chat.model, "generate", small)
    assert chat.generate(requests, 4, batch_size=4) == whole
    assert chat.last_batch_size <= 2


def test_rows_without_pictures_are_answered_too(llava_next: Path) -> None:
    chat = StockChat.load(llava_next)
    mixed = [
        asked("what", "red"),
        ChatRequest([Turn("user", "say red")]),
        ChatRequest([Turn("user", "<image> or <image>")], [picture("red"), picture("blue")]),
    ]
    assert chat.generate(mixed, 5, batch_size=3) == [chat.generate([request], 5)[0] for request in mixed]


def test_a_picture_changes_the_answer_of_its_own_row_alone(llava_next: Path) -> None:
    chat = StockChat.load(llava_next)
    texts = [chat._text(asked("what", "red"), "") for _ in range(2)]
    with torch.no_grad():
        one, other = (
            chat.model(**chat._inputs(texts, [asked("what", first), asked("what", "white")], ["", ""])).logits for first in ("red", "blue")
        )
    assert not torch.equal(one[0], other[0])
    torch.testing.assert_close(one[1], other[1])


def test_questions_of_a_benchmark_go_to_transformers_blip_2(stage2: Path, tmp_path: Path) -> None:  # noqa: F811
    to_hf([str(stage2), str(tmp_path / "m")])
    picture("red").save(tmp_path / "0.png")
    (tmp_path / "q.json").write_text(json.dumps({"questions": [{"question_id": 1, "image": "0.png", "question": "w7"}]}))
    (tmp_path / "a.json").write_text(json.dumps({"annotations": [{"question_id": 1, "answers": [{"answer": "w8"}] * 10}]}))
    files = ["--questions", str(tmp_path / "q.json"), "--annotations", str(tmp_path / "a.json"), "--images", str(tmp_path)]
    out = eval_vqa.main(["--model", str(tmp_path / "m"), *files, "--protocol", "lavis_opt", "--out", str(tmp_path / "out")])
    assert json.loads((out / "summary.json").read_text())["protocol"]["decoding"]["num_beams"] == 5


def test_what_cannot_be_loaded_says_so(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava_next"}))
    with pytest.raises(ConfigError, match="could not be loaded as an image-text-to-text model"):
        load_chat(tmp_path)
