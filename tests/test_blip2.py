"""BLIP-2's second stage: LAVIS's own numbers, what is learnt of a text, training, folder, answers, and bad input."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from llava_tiny import COLOURS, picture, tiny_llm, tiny_tokenizer, tiny_tower
from safetensors.torch import load_file, save_file
from test_qformer import GOLDEN, close, load_golden, made
from torch import Tensor
from transformers import OPTConfig, OPTForCausalLM, T5Config, T5ForConditionalGeneration

from llm_stage import eval_vqa
from llm_stage.blip2 import Blip2, Texts, from_stage1, text_loss
from llm_stage.blip2_chat import Blip2Chat, prompt_text
from llm_stage.blip2_folder import Blip2Parts, load_blip2
from llm_stage.blip2_held_out import CaptionCheck
from llm_stage.blip2_text import TextFormat
from llm_stage.chat_format import Turn
from llm_stage.generate import ChatRequest
from llm_stage.llms import load_llm
from llm_stage.qformer import QFormerConfig
from llm_stage.qformer_build import new_qformer
from llm_stage.qformer_folder import QFormerCard, QFormerParts, encoder_features, save_qformer
from llm_stage.qformer_text import QFormerTokenizer
from llm_stage.train_blip2 import main
from mmkit.errors import ConfigError, DataError
from mmkit.images import ImageSpec
from mmkit.records import read_jsonl
from mmkit.run import Run
from mmkit.trainable import weights_hash


@pytest.fixture(scope="module")
def opt() -> tuple[Blip2, dict[str, Tensor]]:
    """LAVIS's tiny second stage, with its OPT."""
    theirs = load_file(GOLDEN / "stage2.safetensors")
    sizes = {"vocab_size": 64, "hidden_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 80}
    ids = {"max_position_embeddings": 64, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2}
    llm = OPTForCausalLM(OPTConfig(**sizes, **ids, word_embed_proj_dim=40, dropout=0.0))
    weights = {key.removeprefix("opt_model."): tensor for key, tensor in theirs.items() if key.startswith("opt_model.")}
    missing, unexpected = llm.load_state_dict(weights, strict=False)
    assert set(missing) <= {"lm_head.weight"}
    assert not unexpected
    llm.tie_weights()
    model = from_stage1(made(load_golden()), llm).eval()
    with torch.no_grad():
        model.language_projection.weight.copy_(theirs["opt_proj.weight"])
        model.language_projection.bias.copy_(theirs["opt_proj.bias"])
    return model, theirs


def test_logits_loss_and_gradients_are_lavis_own(opt: tuple[Blip2, dict[str, Tensor]]) -> None:
    model, theirs = opt
    features = load_golden()["outputs"]["image_embeds_raw"][:3]
    ids, mask = theirs["in/input_ids"], theirs["in/attention_mask"]
    texts = Texts(ids, mask, ids.masked_fill(mask == 0, -100))
    soft = model.soft_prompt(features)
    close(soft, theirs["out/query_embeds_llm"])
    logits = model.logits(soft, texts)  # from the last query's place on
    wanted = theirs["out/logits"][:, 7:-1]
    close(logits[mask.bool()], wanted[mask.bool()])
    loss = text_loss(model, features, texts)
    assert float(loss) == pytest.approx(float(theirs["out/loss"]), abs=1e-5)
    loss.backward()
    for name, parameter in (
        ("query_tokens", model.query_tokens),
        ("opt_proj.weight", model.language_projection.weight),
        ("ln_vision.weight", model.ln_vision.weight),
    ):
        assert parameter.grad is not None
        assert float((parameter.grad - theirs[f"grad/{name}"]).norm() / theirs[f"grad/{name}"].norm()) < 2e-5, name
    assert all(parameter.grad is None for parameter in model.language_model.parameters())


@pytest.mark.parametrize(("width", "count"), [(1408, 105_165_056), (1024, 101_625_344), (768, 99_265_536)])
def test_as_many_parameters_are_trained_as_in_the_paper(width: int, count: int) -> None:
    with torch.device("meta"):
        model = Blip2(QFormerConfig(width), tiny_llm()[0])
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad and not name.startswith("language_projection")}
    assert sum(trained.values()) == count


# -- texts -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lead", ["", "<|im_start|>user\n"])
def test_what_is_learnt_decodes_to_the_text_and_its_end(lead: str) -> None:
    tokenizer = tiny_tokenizer()
    text = TextFormat(tokenizer, writes_apart=False, end="\n", lead=lead)
    found = text.encode(["Question: what colour is it Short answer:", ""], ["red", "a green wall"])
    said = [tokenizer.decode(row[row != -100]) for row in found.labels]
    assert said == [" red\n", "a green wall\n"]
    whole = tokenizer.decode(found.ids[0][found.mask[0] == 1])
    assert whole == "Question: what colour is it Short answer: red\n"
    assert (found.labels[found.mask == 0] == -100).all()
    assert tokenizer.decode(text.lead_ids) == lead


def test_a_text_that_is_cut_has_no_end_to_learn() -> None:
    text = TextFormat(tiny_tokenizer(), writes_apart=False, max_tokens=8)
    labels = text.encode([""], ["what colour is it " * 6]).labels[0]
    assert len(labels) == 8
    assert int(labels[-1]) not in text.stop_ids
    with pytest.raises(DataError, match="leave no room for a text"):
        text.encode(["what colour is it " * 6], ["red"])
    with pytest.raises(DataError, match="text 1 of 2 has no word"):
        text.encode(["", ""], ["red", "  "])
    with pytest.raises(ConfigError, match=r"end 'the end' is \d+ tokens"):
        TextFormat(tiny_tokenizer(), writes_apart=False, end="the end")


def test_begin_tokens_are_learnt_where_there_is_no_prompt() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.backend_tokenizer.post_processor = __import__("tokenizers").processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    found = TextFormat(tokenizer, writes_apart=False).encode(["", "it is"], ["red", "red"])
    assert found.labels[0][0] == tokenizer.bos_token_id  # predicted from the last query, as in LAVIS
    assert found.ids[1][0] == tokenizer.bos_token_id
    assert found.labels[1][0] == -100


def test_a_chat_becomes_one_line() -> None:
    turns = [Turn("user", "<image>\nwhat is it"), Turn("assistant", "a cat"), Turn("user", "which colour")]
    assert prompt_text(turns, "Question: {} Answer:", "a photo of") == "Question: what is it Answer: a cat. Question: which colour Answer:"
    assert prompt_text([Turn("user", "")], "Question: {} Answer:", "a photo of") == "a photo of"


# -- training --------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Q-Former folder, a causal and an encoder-decoder language model, pictures with captions and questions."""
    folder = tmp_path_factory.mktemp("blip2")
    tower = tiny_tower()
    words = QFormerTokenizer.learn(["a red green blue white wall"], 64)
    shape = QFormerConfig(32, 32, 2, 4, 48, 4, 1, len(words), 32, 16, 0.0, **words.special)
    torch.manual_seed(0)
    save_qformer(QFormerParts(tower, new_qformer(shape, 0), words, QFormerCard("tiny", "")), folder / "qformer")
    llm, tokenizer = tiny_llm()
    for name, model in (("llm", llm), ("t5", tiny_t5(len(tokenizer)))):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "images").mkdir()
    captions, questions, annotations = [], [], []
    for number in range(16):
        colour = list(COLOURS)[number % 4]
        picture(colour, seed=number).save(folder / "images" / f"{number:02d}.png")
        captions.append({"image": f"{number:02d}.png", "caption": f"a {colour} wall"})
        questions.append({"question_id": number, "image": f"{number:02d}.png", "question": "what colour is it"})
        annotations.append({"question_id": number, "answers": [{"answer": colour}] * 10})
    (folder / "captions.json").write_text(json.dumps(captions))
    (folder / "questions.json").write_text(json.dumps({"questions": questions}))
    (folder / "annotations.json").write_text(json.dumps({"annotations": annotations}))
    return folder


def tiny_t5(words: int) -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
    return T5ForConditionalGeneration(T5Config(vocab_size=words, **sizes, pad_token_id=0, eos_token_id=2, decoder_start_token_id=0)).eval()


def flags(material: Path, out: Path, *more: str) -> list[str]:
    words: dict[str, Any] = {
        "pretrained": material / "qformer", "llm": material / "llm", "data.source": material / "captions.json",
        "data.image_root": material / "images", "questions": material / "questions.json", "annotations": material / "annotations.json",
        "images": material / "images", "run.steps": 6, "run.micro_batch_size": 8, "lr": 2e-3, "warmup": 2, "run.log_every": 1,
        "run.save_every": 2, "run.output_dir": out,
    }  # fmt: skip
    return [part for key, value in words.items() for part in (f"--{key}", str(value))] + list(more)


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_jsonl(folder / "metrics.jsonl")]


@pytest.fixture(scope="module")
def trained(material: Path) -> Path:
    return main(flags(material, material / "trained"))


def test_a_stopped_run_goes_on_with_the_same_losses(material: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backward = Run.backward

    def break_down(self: Run, loss: Any, **terms: Any) -> None:
        if self.step == 3:
            raise RuntimeError("the lights go out")
        backward(self, loss, **terms)

    with monkeypatch.context() as patched:
        patched.setattr(Run, "backward", break_down)
        with pytest.raises(RuntimeError):
            main(flags(material, tmp_path / "run"))
    main(flags(material, tmp_path / "run", "--resume"))
    assert losses(tmp_path / "run") == losses(trained)
    whole, again = (load_file(folder / "model" / "model.safetensors") for folder in (trained, tmp_path / "run"))
    assert all(torch.equal(whole[key], again[key]) for key in whole)
    assert not any(key.startswith(("language_model", "encoder")) for key in whole)


def test_four_micro_batches_are_one_batch(material: Path, trained: Path, tmp_path: Path) -> None:
    more = ("--run.micro_batch_size", "2", "--run.gradient_accumulation_steps", "4")
    assert losses(main(flags(material, tmp_path / "run", *more))) == pytest.approx(losses(trained), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 2])
def test_two_processes_equal_one(
    zero: int, material: Path, trained: Path, tmp_path: Path, child_environment: dict[str, str], free_port: int
) -> None:
    words = flags(material, tmp_path / "two", "--run.micro_batch_size", "4", *watched(material))
    if zero:
        words += ["--run.deepspeed", json.dumps({"zero_optimization": {"stage": zero}})]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port)]
    done = subprocess.run(
        [*command, "-m", "llm_stage.train_blip2", *words], env=child_environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(tmp_path / "two") == pytest.approx(losses(trained), rel=1e-5)
    assert [row["step"] for row in read_jsonl(tmp_path / "two" / "held_out.jsonl")] == [2, 4, 6]


def test_a_folder_speaks_in_the_words_it_was_trained_in(material: Path, trained: Path, tmp_path: Path) -> None:
    words = {"lead": "a", "end": "<|im_end|>", "prompt": "is {} it", "caption_prompt": "the", "max_tokens": 20}
    more = [part for key, value in words.items() for part in (f"--{key}", str(value))]
    for first in ([], ["--pretrained", str(trained / "model")]):
        parts = load_blip2(main(flags(material, tmp_path / f"run{len(first)}", "--run.steps", "1", *first, *more)) / "model")
        assert {key: getattr(parts.card, key) for key in words} == words
        assert parts.model.lead == parts.text.lead_ids != []


def test_kept_features_train_the_same(material: Path, tmp_path: Path) -> None:
    whole = ("--data.scale", "[1.0, 1.0]")
    plain = main(flags(material, tmp_path / "plain", *whole))
    kept = main(flags(material, tmp_path / "kept", *whole, "--data.feature_cache", str(tmp_path / "features")))
    assert losses(kept) == losses(plain)
    assert len(list((tmp_path / "features").glob("*/*.features"))) == 1


def test_a_centered_projection_begins_with_what_tells_pictures_apart(
    material: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All sixteen pictures, then the sixteen with their questions: the mean over them is nothing, what is between them is as it was."""
    begun: list[Tensor] = []

    def look(self: Run, model: Blip2, optimizer: Any) -> Any:
        with torch.no_grad():
            pictures = [picture(colour, seed=number) for number, colour in enumerate(list(COLOURS)[:4] * 4)]
            spec = ImageSpec(**tiny_tower().spec.to_dict())
            pixels = torch.stack([spec.normalise(spec.fit(image)) for image in pictures])
            begun.append(model.soft_prompt(encoder_features(tiny_tower(), pixels, -2)))
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "prepare", look)
    whole = ("--data.scale", "[1.0, 1.0]")
    for name, more in (("plain", ()), ("centered", ("--center", "64"))):
        with pytest.raises(KeyboardInterrupt):
            main(flags(material, tmp_path / name, *whole, *more))
    plain, centered = begun
    torch.testing.assert_close(centered.mean(dim=(0, 1)), torch.zeros(plain.shape[-1]), rtol=0, atol=1e-5)
    assert plain.mean(dim=(0, 1)).abs().max() > 0.05
    torch.testing.assert_close(centered - centered[:1], plain - plain[:1], rtol=1e-4, atol=1e-5)


def watched(material: Path) -> tuple[str, ...]:
    """Flags that caption four held-out pictures every second step."""
    named = {"val_captions": material / "captions.json", "val_images": material / "images", "val_every": 2, "val_count": 4}
    return tuple(word for key, value in named.items() for word in (f"--{key}", str(value)))


def test_held_out_captions_are_scored_and_change_nothing(material: Path, trained: Path, tmp_path: Path) -> None:
    run = main(flags(material, tmp_path / "run", *watched(material)))
    assert losses(run) == losses(trained)
    rows = read_jsonl(run / "held_out.jsonl")
    assert [row["step"] for row in rows] == [2, 4, 6]
    card = load_blip2(run / "model").card
    assert card.training["best_cider"] == pytest.approx(max(row["cider"] for row in rows), abs=1e-3)
    check = CaptionCheck.read(str(material / "captions.json"), str(material / "images"), 4, 2, 8)
    assert check.score(load_blip2(run / "model")) == pytest.approx(card.training["best_cider"], abs=1e-3)
    assert not (run / "best").exists()


def test_the_best_model_is_kept_when_captions_fall_apart_after_it_also_over_a_stop(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[int, dict[str, Tensor]] = {}
    scores = {2: 3.0, 4: 5.0, 6: 1.0}
    backward = Run.backward

    def score(self: CaptionCheck, parts: Blip2Parts) -> float:
        step = max(scores) if 4 in seen else 4 if 2 in seen else 2
        seen[step] = {key: tensor.clone() for key, tensor in parts.model.trained_state().items()}
        return scores[step]

    def break_down(self: Run, loss: Any, **terms: Any) -> None:
        if self.step == 5:
            raise RuntimeError("the lights go out")
        backward(self, loss, **terms)

    monkeypatch.setattr(CaptionCheck, "score", score)
    words = flags(material, tmp_path / "run", *watched(material))
    with monkeypatch.context() as patched:
        patched.setattr(Run, "backward", break_down)
        with pytest.raises(RuntimeError):
            main(words)
    run = main([*words, "--resume"])
    assert read_jsonl(run / "held_out.jsonl") == [{"step": step, "cider": value} for step, value in scores.items()]
    kept = load_file(run / "model" / "model.safetensors")
    assert all(torch.equal(kept[key], tensor) for key, tensor in seen[4].items())
    assert not all(torch.equal(kept[key], tensor) for key, tensor in seen[6].items())
    assert load_blip2(run / "model").card.training["best_step"] == 4
    main([*words, "--resume"])  # finished: once more changes nothing
    again = load_file(run / "model" / "model.safetensors")
    assert all(torch.equal(again[key], tensor) for key, tensor in kept.items())


def test_encoder_and_language_model_sleep(material: Path, trained: Path) -> None:
    parts = load_blip2(trained / "model")
    assert weights_hash(parts.model.language_model) == weights_hash(load_blip2_llm(material / "llm"))
    own, kept = load_file(material / "qformer" / "encoder" / "model.safetensors"), load_file(trained / "model/encoder/model.safetensors")
    assert all(torch.equal(own[key], kept[key]) for key in own)
    before, after = load_file(material / "qformer" / "model.safetensors"), load_file(trained / "model" / "model.safetensors")
    assert all(not torch.equal(before[key], after[key]) for key in ("query_tokens", "ln_vision.weight"))


def load_blip2_llm(folder: Path) -> Any:
    from llm_stage.llms import load_any_llm

    return load_any_llm(str(folder))[0]


@pytest.mark.slow
def test_colours_are_learnt_in_front_of_a_frozen_language_model(material: Path, tmp_path: Path) -> None:
    """mini-llm, 200 steps: the first word of an answer is the colour of a picture of other noise."""
    chat_marks = {"lead": "<|im_start|>user ", "prompt": "\n{}<|im_end|><|im_start|>assistant", "end": "<|im_end|>"}
    marks = [part for key, value in chat_marks.items() for part in (f"--{key}", value)]
    more = ["--llm", "mini-llm", "--run.steps", "200", "--lr", "3e-3", "--caption_prompt", "<|im_end|><|im_start|>assistant", *marks]
    chat = Blip2Chat.load(main(flags(material, tmp_path / "run", *more)) / "model")
    shown = [picture(colour, seed=99) for colour in COLOURS]
    answers = chat.generate([ChatRequest([Turn("user", "what colour is it")], [image]) for image in shown], 8)
    assert [answer.split()[0] for answer in answers] == list(COLOURS)


# -- folder ----------------------------------------------------------------------------------------------------------------------------


def test_another_language_model_or_encoder_under_the_same_name_is_refused(material: Path, trained: Path, tmp_path: Path) -> None:
    moved = tmp_path / "home" / "model"
    shutil.copytree(trained / "model", moved)
    shutil.copytree(material / "llm", tmp_path / "llm")
    content = json.loads((moved / "blip2.json").read_text())
    (moved / "blip2.json").write_text(json.dumps({**content, "llm_folder": "../../llm"}))
    assert load_blip2(moved).card.llm == str(tmp_path / "llm")  # found beside the folder, wherever both were moved
    tiny_llm(seed=5)[0].save_pretrained(tmp_path / "llm")
    with pytest.raises(DataError, match=r"is not the language model that .* was trained with"):
        load_blip2(moved)
    weights = moved / "encoder" / "model.safetensors"
    kept = load_file(weights)
    save_file({key: tensor + 1e-3 for key, tensor in kept.items()}, weights, metadata={"format": "pt"})
    with pytest.raises(DataError, match="is not the encoder that this BLIP-2 was made with"):
        load_blip2(moved)
    with pytest.raises(ConfigError, match=r"no BLIP-2 folder: it has no blip2\.json"):
        load_blip2(material / "qformer")


def test_a_finished_one_goes_on_and_keeps_its_language_model(material: Path, trained: Path, tmp_path: Path) -> None:
    more = ("--pretrained", str(trained / "model"), "--run.steps", "1", "--data.source", "", "--prompt", "{}?")
    again = [word for word in flags(material, tmp_path / "on", *more) if word]
    place = again.index("--data.source", again.index("1"))
    again[place : place + 1] = ["--data.source="]
    folder = main(again)
    assert load_blip2(folder / "model").card.prompt == "{}?"
    with pytest.raises(ConfigError, match=r"speaks to .* not to 'mini-llm'"):
        main(flags(material, tmp_path / "no", "--pretrained", str(trained / "model"), "--llm", "mini-llm"))
    assert not (tmp_path / "no").exists()


# -- answers ---------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["llm", "t5"])
def chat(request: pytest.FixtureRequest, material: Path, trained: Path) -> Blip2Chat:
    if request.param == "llm":
        return Blip2Chat.load(trained / "model")
    out = main(flags(material, material / "trained_t5", "--llm", str(material / "t5"), "--run.steps", "3"))
    return Blip2Chat.load(out / "model")


def asked(words: str, colour: str, seed: int = 0) -> ChatRequest:
    return ChatRequest([Turn("user", words)], [picture(colour, seed=seed)])


def test_a_batch_answers_as_its_rows_alone_and_encodes_a_picture_once(chat: Blip2Chat) -> None:
    requests = [asked("what colour is it", "red"), asked("how many pictures are there, and what colour", "blue", 3), asked("", "red")]
    before = chat.encoded
    alone = [chat.generate([request], 8, num_beams=beams)[0] for beams in (1, 3) for request in requests]
    together = [answer for beams in (1, 3) for answer in chat.generate(requests, 8, batch_size=3, num_beams=beams)]
    assert alone == together
    assert chat.encoded - before <= 2
    fresh = Blip2Chat(chat.parts, "fresh")
    assert fresh.generate(requests, 8) == together[:3]


def test_the_stream_is_the_answer(chat: Blip2Chat) -> None:
    request = asked("what colour is it", "green")
    assert "".join(chat.stream(request, 8)) == chat.generate([request], 8)[0]


def test_a_picture_changes_its_own_row_and_no_other(chat: Blip2Chat) -> None:
    parts: Blip2Parts = chat.parts
    texts = parts.text.encode(["what", "what"], ["red", "it is blue"])
    rows = [chat.soft_prompts([picture(first), picture("white")], ["", ""]) for first in ("red", "blue")]
    with torch.no_grad():
        one, other = (parts.model.logits(soft, texts) for soft in rows)
    assert not torch.equal(one[0], other[0])
    assert torch.equal(one[1], other[1])


def test_one_image_it_is(chat: Blip2Chat) -> None:
    for images in ((), (picture("red"), picture("blue"))):
        with pytest.raises(DataError, match=f"request 0: BLIP-2 reads one image with each question, {len(images)} were given"):
            chat.generate([ChatRequest([Turn("user", "what")], images)], 4)
    with pytest.raises(DataError, match="2 times <image> and one image"):
        chat.generate([ChatRequest([Turn("user", "<image> or <image>")], [picture("red")])], 4)


def test_memory_that_runs_out_halves_the_batch(chat: Blip2Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [asked("what colour is it", colour) for colour in COLOURS]
    whole = chat.generate(requests, 6, batch_size=4)
    generate = chat.model.language_model.generate

    def small(**inputs: Any) -> Any:
        if len(inputs["inputs_embeds"]) > 2:
            raise torch.OutOfMemoryError("too much")
        return generate(**inputs)

    monkeypatch.setattr(chat.model.language_model, "generate", small)
    assert chat.generate(requests, 6, batch_size=4) == whole
    assert chat.last_batch_size <= 2


# -- bad input -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--pretrained="], "--pretrained is missing"),
        (["--llm="], "--llm is missing"),
        (["--data.source=", "--questions=", "--annotations=", "--images="], "nothing to learn from"),
        (["--images="], "--questions, --annotations and --images go together"),
        (["--val_captions", "a.json"], "--val_captions and --val_images go together"),
        (["--center", "-1"], "center is -1"),
        (["--val_every", "0"], "1 and 2 are the least"),
        (["--prompt", "Question:"], "the question's place is marked by one {}"),
        (["--end", "the end"], "end 'the end' is"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_written(material: Path, tmp_path: Path, more: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        main(flags(material, tmp_path / "run", *more))
    assert not (tmp_path / "run").exists()


def test_an_answer_without_words_is_named(material: Path, tmp_path: Path) -> None:
    content = json.loads((material / "annotations.json").read_text())
    content["annotations"][3]["answers"][7]["answer"] = " "
    (tmp_path / "annotations.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="question 3 has an answer without a word"):
        main(flags(material, tmp_path / "run", "--annotations", str(tmp_path / "annotations.json")))
    assert not (tmp_path / "run").exists()


def test_load_llm_leaves_other_callers_their_image_token() -> None:
    """`load_any_llm` reads a model as it is; LLaVA's loader still adds its image token."""
    _, tokenizer = load_llm("mini-llm")
    assert "<image>" in tokenizer.all_special_tokens


# -- evaluation ------------------------------------------------------------------------------------------------------------------------


def test_questions_are_asked_in_the_models_own_words_or_a_protocols(material: Path, trained: Path, tmp_path: Path) -> None:
    words = ["--model", str(trained / "model"), "--questions", str(material / "questions.json"), "--images", str(material / "images")]
    words += ["--annotations", str(material / "annotations.json"), "--batch_size", "4"]
    plain = json.loads((eval_vqa.main([*words, "--out", str(tmp_path / "plain")]) / "summary.json").read_text())
    assert plain["protocol"]["prompt"].endswith("Question: {question} Short answer:")
    assert plain["protocol"]["decoding"] == "greedy"
    assert plain["n"] == 16
    assert plain["encoder"]["downstream"] == "BLIP-2 (train)"
    named = json.loads((eval_vqa.main([*words, "--out", str(tmp_path / "named"), "--protocol", "paper_opt"]) / "summary.json").read_text())
    assert named["protocol"]["prompt"].endswith("Question: {question} Answer:")
    assert named["protocol"]["decoding"]["num_beams"] == 5
    asked_as = {row["question_id"]: row["answer"] for row in read_jsonl(tmp_path / "plain" / "answers.jsonl")}
    chat = Blip2Chat.load(trained / "model")
    question = ChatRequest([Turn("user", "what colour is it")], [material / "images" / "03.png"])
    assert chat.generate([question], 64) == [asked_as[3]]
    with pytest.raises(ConfigError, match="--protocol paper_opt holds BLIP-2's prompt and decoding"):
        eval_vqa.main([*words, "--out", str(tmp_path / "no"), "--protocol", "paper_opt", "--model", "mini-chat"])
