"""The text recipe: its chats are true and repeatable, its loss is on answers only, and its result is an ordinary folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from llm_stage.chat_format import IGNORE_INDEX, ChatFormat, Turn
from llm_stage.llms import load_llm
from llm_stage.train_text import Collate, accuracy, answer_loss, embed, main, mimetic_init, predictions
from llm_stage.world_text import FORMS, GRID, WorldText, build_tokenizer, cells_of, places
from mmkit.minidata import language, names, world
from mmkit.minidata.scene import place_of

MODEL, TOKENIZER = load_llm("mini-llm")
CHAT = ChatFormat(TOKENIZER)
WORLD = WorldText(CHAT, 100)
COLLATE = Collate(TOKENIZER.pad_token_id, CHAT.image_token_id or 0)


def test_a_chat_is_the_same_for_the_same_place_in_the_stream() -> None:
    assert WORLD.get(1, 7) == WorldText(CHAT, 100).get(1, 7)
    assert WORLD.get(1, 7) != WORLD.get(0, 7)
    assert WORLD.get(1, 7) != WorldText(CHAT, 100, seed=1).get(1, 7)


@pytest.mark.parametrize("form", FORMS)
def test_only_answers_are_supervised_and_every_placeholder_has_words(form: str) -> None:
    chat = WORLD.chat(np.random.default_rng(3), form)
    item = WORLD.encode(chat)
    placeholders = item["input_ids"].count(CHAT.image_token_id)
    assert placeholders == len(item["cells"]) == (GRID * GRID if form in ("cells", "read") else 0)
    assert all(cell and sum(weight for _, weight in cell) > 0 for cell in item["cells"])
    supervised = TOKENIZER.decode([label for label in item["labels"] if label != IGNORE_INDEX])
    assert supervised.split("<|im_end|>")[:-1] == [f" {turn.text}" for turn in chat.turns if turn.role == "assistant"]


def test_chats_are_of_nearly_one_length() -> None:
    lengths = [len(WORLD.get(0, index)["input_ids"]) for index in range(64)]
    assert max(lengths) <= 230
    assert sum(lengths) / len(lengths) > 0.8 * sorted(lengths)[-4]


def test_cells_tell_where_things_are() -> None:
    for seed in range(20):
        scene = world.sample_scene(np.random.default_rng(seed), names.object_names("trained"), 2, 1.0)
        cells = cells_of(scene)
        assert len(cells) == GRID * GRID
        told = {text for cell in cells for text in cell}
        assert told <= {*scene.names, scene.background, scene.word.text if scene.word else ""}
        assert {*scene.names, scene.background} <= told
        for item in scene.objects:
            where = [place for cell, place in zip(cells, places(), strict=True) if item.name in cell]
            if scene.names.count(item.name) == 1 and min(item.box[2:]) > 20:
                assert place_of(item, scene.size) in where


def test_a_placeholder_is_the_weighted_mean_of_its_words() -> None:
    cat, blue = (TOKENIZER(f" {word}")["input_ids"][0] for word in ("cat", "blue"))
    turns = [Turn("user", "<image>\nwhat is this?"), Turn("assistant", "cat")]
    encoded = CHAT.encode(turns, 1, 2)
    item = {"input_ids": encoded.input_ids, "labels": encoded.labels, "cells": [[(cat, 1.0)], [(cat, 1.5), (blue, 0.5)]]}
    text = {"input_ids": [cat, blue, cat, blue], "labels": [IGNORE_INDEX] * 4}
    batch = COLLATE([text, item])
    table = MODEL.get_input_embeddings().weight
    embedded = embed(MODEL, batch)
    first, second = embedded[1][batch["places"][1]]
    assert torch.allclose(first, table[cat])
    assert torch.allclose(second, 0.75 * table[cat] + 0.25 * table[blue], atol=1e-6)
    assert torch.equal(embedded[0, :4], table[torch.tensor([cat, blue, cat, blue])])


def test_padding_and_company_change_no_loss() -> None:
    items = [WORLD.get(0, index) for index in range(4)]
    with torch.no_grad():
        alone = [(answer_loss(MODEL, COLLATE([item])), sum(label != IGNORE_INDEX for label in item["labels"][1:])) for item in items]
        together = answer_loss(MODEL, COLLATE(items))
    assert torch.allclose(together, sum(loss * count for loss, count in alone) / sum(count for _, count in alone), atol=1e-5)


def test_the_loss_is_transformers_own() -> None:
    items = [WORLD.encode(WORLD.chat(np.random.default_rng(index), "describe")) for index in range(3)]
    batch = COLLATE(items)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    with torch.no_grad():
        assert torch.allclose(answer_loss(MODEL, batch), MODEL(**inputs).loss, atol=1e-5)


def test_a_question_counts_as_right_exactly_when_greedy_decoding_gives_its_answer() -> None:
    for index in range(8):
        chat = WORLD.chat(np.random.default_rng((9, index)), "cells" if index % 2 else "loose")
        turns = chat.turns[:2]
        encoded = CHAT.encode(turns, int(bool(chat.cells)), len(chat.cells))
        item = {**WORLD.encode(chat), "input_ids": encoded.input_ids, "labels": encoded.labels}
        batch = COLLATE([item])
        with torch.no_grad():
            logits, labels = predictions(MODEL, batch)
            start = int((batch["labels"][0] != IGNORE_INDEX).nonzero()[0])
            answer = MODEL.generate(
                inputs_embeds=embed(MODEL, batch)[:, :start], max_new_tokens=len(labels), do_sample=False, eos_token_id=CHAT.stop_ids
            )
        assert (answer[0].tolist() == labels.tolist()) == bool((logits.argmax(-1) == labels).all())


def test_mini_llm_answers_about_held_out_scenes() -> None:
    found = accuracy(MODEL, WORLD, COLLATE, 64, "cells")
    assert found["colour"]["right"] >= 90
    assert found["all"]["right"] >= 64, found  # 71.7 on 300 scenes; six points are the sampling of these 64


def test_the_tokenizer_writes_lower_case_and_gives_everything_else_back() -> None:
    tokenizer = build_tokenizer(["a red cat on a blue background", "what is this?", "the word 'lamp'"] * 3, 300)
    assert len(tokenizer) <= 300
    assert tokenizer.decode(tokenizer("What is THIS? ü 猫 🐈")["input_ids"]) == "what is this? ü 猫 🐈"
    assert tokenizer.bos_token is None
    assert tokenizer.convert_ids_to_tokens(tokenizer("<image>")["input_ids"]) == ["<image>"]
    assert ChatFormat(tokenizer).show(ChatFormat(tokenizer).encode([Turn("user", "hi"), Turn("assistant", "you")])) == (
        "<|im_start|>user hi<|im_end|><|im_start|>assistant【 you<|im_end|>】"
    )


def chats(folder: Path, rows: Any) -> str:
    path = folder / "chats.json"
    path.write_text(json.dumps(rows))
    return str(path)


def test_a_chat_file_trains_any_model_and_the_result_loads(tmp_path: Path) -> None:
    rows = [
        {"id": str(i), "conversations": [{"from": "human", "value": "what is the secret word?"}, {"from": "gpt", "value": "zebra lamp"}]}
        for i in range(4)
    ]
    folder = main(
        ["--data.json", chats(tmp_path, rows), "--model.llm", "mini-llm", "--output_dir", str(tmp_path / "run"), "--steps", "12",
         "--micro_batch_size", "4", "--lr", "1e-3", "--warmup", "2", "--weights", "fp32"]
    )  # fmt: skip
    losses = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]
    model, tokenizer = load_llm(str(folder / "model"))
    chat = ChatFormat(tokenizer)
    prompt = chat.prompt_ids([Turn("user", "what is the secret word?")])
    answer = model.generate(input_ids=torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=chat.stop_ids)
    assert tokenizer.decode(answer[0, len(prompt) :], skip_special_tokens=True).strip() == "zebra lamp"


def test_a_new_model_is_made_in_the_size_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = language.all_text_sources(n_scenes=50)  # the 2,000 of the recipe take ten seconds
    monkeypatch.setattr(language, "all_text_sources", lambda: texts)
    folder = main(
        ["--data.world", "64", "--model.hidden_size", "32", "--model.layers", "1", "--model.heads", "2", "--model.intermediate_size", "48",
         "--model.vocab_size", "600", "--output_dir", str(tmp_path / "run"), "--steps", "2", "--micro_batch_size", "2", "--held_out", "8"]
    )  # fmt: skip
    weights = load_file(folder / "model" / "model.safetensors")
    assert weights["model.embed_tokens.weight"].shape == (600, 32)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    assert "lm_head.weight" not in weights
    assert set(json.loads((folder / "held_out.json").read_text())) == {"cells", "describe", "loose"}


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], "give one of them"),
        (["--data.world", "8", "--data.json", "x.json"], "give one of them"),
        (["--data.json", "x.json"], "needs a model to go on from"),
        (["--data.json", "nowhere.json", "--model.llm", "mini-llm"], "no conversations file nowhere.json"),
        (["--data.world", "8", "--hiden_size", "8"], "hidden_size"),
    ],
)
def test_settings_that_make_no_training_are_refused_before_a_folder_is_made(tmp_path: Path, argv: list[str], expected: str) -> None:
    with pytest.raises(ValueError) as error:
        main([*argv, "--output_dir", str(tmp_path / "run"), "--steps", "1"])
    assert expected in str(error.value)
    assert not (tmp_path / "run").exists()


def test_rows_with_images_are_no_text(tmp_path: Path) -> None:
    rows = [{"id": "a", "image": "x.png", "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a cat"}]}]
    with pytest.raises(ValueError, match="text-only training takes no images"):
        main(["--data.json", chats(tmp_path, rows), "--model.llm", "mini-llm", "--output_dir", str(tmp_path / "run"), "--steps", "1"])


def test_heard_chats_supervise_every_word_and_no_placeholder() -> None:
    quiet, heard = WorldText(CHAT, 100, heard=0.0), WorldText(CHAT, 100, heard=1.0)
    for index in range(20):
        asked, listened = quiet.get(0, index), heard.get(0, index)
        assert asked["input_ids"] == listened["input_ids"]
        expected = [IGNORE_INDEX if token == CHAT.image_token_id else token for token in asked["input_ids"]]
        assert listened["labels"] == expected
        assert asked["labels"].count(IGNORE_INDEX) > expected.count(IGNORE_INDEX)


def test_mimetic_attention_begins_as_finding_and_passing_on_the_same_word() -> None:
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
    )
    mimetic_init(model)
    for layer in model.model.layers:
        attention = layer.self_attn
        assert torch.equal(attention.q_proj.weight, attention.k_proj.weight)
        passed_on = attention.o_proj.weight @ attention.v_proj.weight
        assert torch.allclose(passed_on, 0.09 * torch.eye(64), atol=1e-5)
