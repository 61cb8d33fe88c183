"""Packed micro-batches learn what padded ones learn; a model that would mix packed examples up is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llava_tiny import picture, tiny_llm, tiny_tokenizer, tiny_tower, write_data, write_parts
from torch.testing import assert_close
from transformers import (
    BloomConfig,
    BloomModel,
    GPT2Config,
    GPT2Model,
    MambaConfig,
    MambaModel,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)  # fmt: skip
from transformers import modeling_flash_attention_utils as flash

from llm_stage.chat_format import IGNORE_INDEX, ChatFormat, Turn
from llm_stage.conversations import collate
from llm_stage.llava import build_llava, label_tokens, set_stage, supervised_loss, with_dummy_row
from llm_stage.packing import WITHOUT_END, check_packing, pack, packed_batch, padding_share, plan_rows, real_tokens, row_budget
from llm_stage.train_llava import main
from mmkit.errors import ConfigError

SIZES = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
CHATS: list[tuple[list[str], list[str]]] = [  # turns, colours of their images
    (["<image>\nwhat colour is it", "it is red"], ["red"]),
    (["say it", "blue", "and once more, at some length", "blue blue blue"], []),
    (["which of <image> and <image> is green", "the first one"], ["green", "white"]),
    (["how many pictures are there", "one", "and now <image>", "two"], ["blue"]),
    (["say white", "white"], []),
]


def llm_of(kind: str) -> Any:
    """A tiny random LLM of a family."""
    tokenizer = tiny_tokenizer()
    common = {"vocab_size": len(tokenizer), "eos_token_id": 2, "pad_token_id": 0, "bos_token_id": 1}
    torch.manual_seed(0)
    if kind == "llama":
        return tiny_llm()
    if kind == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**SIZES, **common)).eval(), tokenizer
    return MistralForCausalLM(MistralConfig(**SIZES, **common, sliding_window=7)).eval(), tokenizer  # a window shorter than an example


def items_of(model: Any, processor: Any, chats: list[tuple[list[str], list[str]]]) -> list[dict[str, Any]]:
    chat = ChatFormat(processor.tokenizer)
    items = []
    for texts, colours in chats:
        turns = [Turn("assistant" if index % 2 else "user", text) for index, text in enumerate(texts)]
        encoded = chat.encode(turns, len(colours), model.config.image_seq_length)
        pixels = [processor.image_processor(images=picture(c), return_tensors="pt")["pixel_values"][0] for c in colours]
        items.append({"input_ids": encoded.input_ids, "labels": encoded.labels, "images": pixels})
    return items


def both(model: Any, items: list[dict[str, Any]], budget: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same examples padded and packed."""
    config = model.config
    padded = with_dummy_row(collate(items, 0, config.image_token_id, config.image_seq_length), config, 32, 0)
    return padded, packed_batch(items, 0, config.image_token_id, config.image_seq_length, 32, budget)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_loss_and_gradients_are_the_padded_ones(kind: str, attention: str) -> None:
    model, processor = build_llava(tiny_tower(), llm_of(kind))
    model.model.language_model.set_attn_implementation(attention)
    set_stage(model, train_llm=True)
    check_packing(model.model.language_model)
    for chats, budget, rows in ((CHATS, 150, 2), (CHATS, 1000, 1), ([CHATS[1], CHATS[4]], 1000, 1)):  # the last without any image
        padded, packed = both(model, items_of(model, processor, chats), budget)
        assert len(packed["input_ids"]) == rows < len(padded["input_ids"])
        assert label_tokens(packed) == label_tokens(padded)
        other = copy.deepcopy(model)
        expected, loss = supervised_loss(model, padded)[0], supervised_loss(other, packed)[0]
        assert_close(loss, expected, rtol=1e-5, atol=1e-6)  # float32, another order of sums
        expected.backward()
        loss.backward()
        for (name, p), (_, q) in zip(model.named_parameters(), other.named_parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), name
            if p.grad is not None:
                assert_close(q.grad, p.grad, rtol=1e-3, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}")
        model.zero_grad()


def test_an_attention_mask_beside_the_positions_would_mix_examples() -> None:
    """What this module guards against; if transformers comes to refuse or heed it, the guard can go."""
    model, processor = build_llava(tiny_tower(), tiny_llm())
    _, packed = both(model, items_of(model, processor, CHATS), 1000)
    with_mask = {**packed, "attention_mask": torch.ones_like(packed["input_ids"])}
    assert packed["attention_mask"] is None
    with torch.no_grad():
        assert abs(float(supervised_loss(model, packed)[0] - supervised_loss(model, with_mask)[0])) > 1e-4


def test_positions_restart_and_nothing_is_predicted_across_a_border() -> None:
    items = [
        {"input_ids": [5, 6, 7], "labels": [5, 6, 7]},
        {"input_ids": [8, 9], "labels": [-100, 9]},
        {"input_ids": [4], "labels": [-100]},
    ]
    (row,) = pack(items, 10)
    assert row["input_ids"] == [5, 6, 7, 8, 9, 4]
    assert row["position_ids"] == [0, 1, 2, 0, 1, 0]
    assert row["labels"] == [IGNORE_INDEX, 6, 7, IGNORE_INDEX, 9, IGNORE_INDEX]
    batch = collate(pack(items, 4), 0)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 4]]
    assert batch["position_ids"].tolist() == [[0, 1, 2], [0, 1, 0]]
    assert (real_tokens(batch), padding_share(batch)) == (6, 0.0)


def test_padding_of_a_packed_row_is_an_example_of_its_own() -> None:
    batch = collate(pack([{"input_ids": [5, 6, 7, 8], "labels": [-100] * 4}, {"input_ids": [9], "labels": [-100]}], 4), 0)
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3], [0, 0, 1, 2]]
    assert (real_tokens(batch), padding_share(batch)) == (5, 3 / 8)
    padded = collate([{"input_ids": [5, 6, 7, 8], "labels": [-100] * 4}, {"input_ids": [9], "labels": [-100]}], 0)
    assert (real_tokens(padded), padding_share(padded)) == (5, 3 / 8)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=24), st.integers(1, 100))
def test_every_example_is_in_one_row_and_no_row_is_overfull(lengths: list[int], budget: int) -> None:
    rows = plan_rows(lengths, budget)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(row == sorted(row) for row in rows)
    assert max(sum(lengths[index] for index in row) for row in rows) <= max(budget, *lengths)
    longest = max(sum(lengths[index] for index in row) for row in rows)
    assert len(rows) * longest <= 2 * sum(lengths) + max(budget, *lengths)  # first-fit leaves at most one row less than half full
    assert rows == plan_rows(list(lengths), budget)


def test_rows_are_dealt_evenly_so_that_little_is_padded() -> None:
    lengths = [100, 90, 80, 30, 20, 10]
    sums = [sum(lengths[index] for index in row) for row in plan_rows(lengths, 200)]
    assert sums == [110, 110, 110]  # first-fit alone makes 200 and 130


def test_masked_attention_is_given_short_rows_where_it_would_cost_more_than_the_padding() -> None:
    lengths = [300, 160, 150, 140, 120, 100, 60, 40]
    whole = plan_rows(lengths, 2048)
    short = plan_rows(lengths, 2048, width=64)
    assert len(whole) < len(short)
    assert len(plan_rows(lengths, 2048, width=10**9)) == len(whole)  # a model so wide has no attention to save
    assert plan_rows(lengths, WITHOUT_END, width=64) == [list(range(8))]


SMALL = {"vocab_size": 64, "hidden_size": 32}
BREAKING: dict[str, Any] = {
    "opt": lambda: OPTModel(OPTConfig(**SMALL, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32)),
    "bloom": lambda: BloomModel(BloomConfig(**SMALL, n_layer=2, n_head=4)),
    "mamba": lambda: MambaModel(MambaConfig(**SMALL, num_hidden_layers=2, state_size=4)),
}


@pytest.mark.parametrize("name", BREAKING)
def test_an_architecture_that_carries_something_over_borders_is_refused(name: str) -> None:
    torch.manual_seed(0)
    with pytest.raises(ConfigError, match=r"packed examples see each other.*data.pack false"):
        check_packing(BREAKING[name]())


def test_an_architecture_without_positions_is_refused() -> None:
    class Recurrent(torch.nn.Linear):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return input_ids

    with pytest.raises(ConfigError, match="Recurrent takes no position_ids"):
        check_packing(Recurrent(2, 2))


def test_positions_that_do_not_restart_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = GPT2Model(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2))  # learned positions
    check_packing(model)
    forward = model.forward

    def moved(position_ids: torch.Tensor, **rest: Any) -> Any:
        examples_before = (position_ids.diff(dim=-1, prepend=position_ids[:, :1] - 1) != 1).cumsum(-1)
        return forward(position_ids=position_ids + 3 * examples_before, **rest)

    monkeypatch.setattr(model, "forward", moved)
    with pytest.raises(ConfigError, match="packed examples do not begin from position 0"):
        check_packing(model)


def test_the_trial_leaves_the_model_as_it_was() -> None:
    model = tiny_llm()[0].model.train()
    model.layers[0].eval()
    check_packing(model)
    assert model.training
    assert not model.layers[0].training


def test_an_attention_not_known_to_keep_examples_apart_is_refused() -> None:
    model = tiny_llm()[0].model
    assert row_budget(model, 100) == 100
    model.config._attn_implementation = "paged|eager"
    with pytest.raises(ConfigError, match=r"attention 'paged\|eager'.*sdpa.*data.pack false"):
        row_budget(model, 100)


def varlen_reference(q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, softmax_scale: float, causal: bool, **_: Any) -> Any:
    """flash-attention's variable-length kernel as its documentation defines it: [tokens, heads, width], borders in cu_seqlens."""
    assert causal
    assert torch.equal(cu_seqlens_q, cu_seqlens_k)
    parts = []
    for begin, end in zip(cu_seqlens_q[:-1].tolist(), cu_seqlens_q[1:].tolist(), strict=True):
        one, two, three = (x[begin:end].transpose(0, 1)[None] for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(one, two, three, is_causal=True, scale=softmax_scale, enable_gqa=True)
        parts.append(out[0].transpose(0, 1))
    return torch.cat(parts)


def test_flash_attention_reads_the_borders_from_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' own way to the kernel, the kernel itself replaced by its definition, as it needs a GPU."""
    model, processor = build_llava(tiny_tower(), tiny_llm())
    padded, _ = both(model, items_of(model, processor, CHATS), 1000)
    expected = supervised_loss(model, padded)[0]
    calls: list[list[int]] = []

    def varlen(q: Any, k: Any, v: Any, cu_seqlens_q: Any, **rest: Any) -> Any:
        calls.append(cu_seqlens_q.diff().tolist())
        return varlen_reference(q, k, v, cu_seqlens_q, **rest)

    def dense(q: Any, k: Any, v: Any, softmax_scale: float, causal: bool) -> Any:
        borders = torch.tensor([0, q.shape[1]])
        return torch.stack([varlen_reference(*row, borders, borders, softmax_scale, causal) for row in zip(q, k, v, strict=True)])

    functions = (dense, varlen, None, None, None)

    def kwargs_of(query_length: int, key_length: int, is_causal: bool, softmax_scale: Any = None, **rest: Any) -> dict[str, Any]:
        return {"causal": is_causal, "softmax_scale": softmax_scale}

    monkeypatch.setattr(flash, "lazy_import_flash_attention", lambda *_: (functions, (kwargs_of, None)))
    model.model.language_model.config._attn_implementation = "flash_attention_2"
    budget = row_budget(model.model.language_model, 100)
    _, packed = both(model, items_of(model, processor, CHATS), budget)
    assert len(packed["input_ids"]) == 1
    assert_close(supervised_loss(model, packed)[0], expected, rtol=1e-5, atol=1e-6)
    assert calls == [[len(item["input_ids"]) for item in items_of(model, processor, CHATS)]] * 2  # a call for each layer
    check_packing(model.model.language_model)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packing")
    write_parts(folder)
    write_data(folder, rows=24, text_only_every=4)
    return folder


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_packed_training_is_the_padded_training(world: Path, tmp_path: Path) -> None:
    def train(name: str, *flags: str) -> list[float]:
        parts = ["--encoder", world / "encoder", "--llm", world / "llm", "--json", world / "data.json", "--images", world / "images"]
        words = [
            "--stage",
            2,
            *parts,
            "--steps",
            5,
            "--lr",
            2e-3,
            "--log_every",
            1,
            "--output_dir",
            tmp_path / name,
            "--data.check",
            "false",
        ]
        return losses(main([str(word) for word in [*words, *flags]]))

    padded = train("padded", "--micro_batch_size", "8")
    packed = train("packed", "--micro_batch_size", "8", "--data.pack", "--data.pack_length", "120")
    four = train("four", "--micro_batch_size", "2", "--gradient_accumulation_steps", "4", "--data.pack")  # some without any image
    assert packed == pytest.approx(padded, rel=1e-5)
    assert four == pytest.approx(padded, rel=1e-5)
