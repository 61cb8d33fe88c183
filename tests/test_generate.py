"""ChatModel: batches answer as single rows do, streams as batches do, errors reach the caller."""

import threading

import pytest
import torch
from llava_tiny import COLOURS, picture, stock_tower, tiny_llm, tiny_tower
from PIL import Image

from llm_stage.chat_format import ChatFormat, Turn
from llm_stage.generate import ChatModel, ChatRequest, place_marks
from llm_stage.llava import build_llava
from llm_stage.llava_folder import LlavaCard, save_llava
from mmkit.errors import ConfigError, DataError
from mmkit.images import ImageError

STOCK_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] + '\n' }}{% for part in message['content'] if part['type'] == 'image' %}"
    "<image>{% endfor %}{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat_model(seed=0, tower=None):
    llm, tokenizer = tiny_llm(seed, tie=False)
    with torch.no_grad():  # fresh weights hardly look at their input, and answer with one token again and again
        for parameter in llm.parameters():
            parameter.mul_(8 if parameter.ndim > 1 else 1)
    model, processor = build_llava(tower or tiny_tower(), (llm, tokenizer))
    return ChatModel(model, processor, ChatFormat(tokenizer), "tiny")


@pytest.fixture(scope="module")
def chat():
    return chat_model()


def ask(text, *images):
    return ChatRequest([Turn("user", text)], images)


REQUESTS = [
    ask("what colour is it", picture("red")),
    ask("hi"),
    ask("<image> and <image>, which is red?", picture("blue"), picture("red", (20, 60))),
    ChatRequest([Turn("user", "<image>\nwhat is it"), Turn("assistant", "it is red"), Turn("user", "is it")], [picture("red")]),
    ask("say what you like, whatever it is, in as many words as you want to"),
]


@pytest.mark.parametrize("batch_size", [2, 5])
def test_a_batch_answers_as_its_rows_do_alone(chat, batch_size):
    alone = [chat.generate([request], 12)[0] for request in REQUESTS]
    assert len(set(alone)) > 2
    assert any(alone)
    assert chat.generate(REQUESTS, 12, batch_size=batch_size) == alone


def test_the_image_makes_a_difference(chat):
    assert len({chat.generate([ask("what colour is it", picture(colour))], 12)[0] for colour in COLOURS}) > 1


def test_greedy_generation_is_the_argmax_of_full_forwards(chat):
    request = REQUESTS[0]
    ids = chat._prompt(request, "")
    pixels = chat.processor.image_processor(images=request.images[0], return_tensors="pt")["pixel_values"]
    generated = []
    for _ in range(8):
        with torch.no_grad():
            token = int(chat.model(input_ids=torch.tensor([ids + generated]), pixel_values=pixels).logits[0, -1].argmax())
        if token in chat.stop_ids:
            break
        generated.append(token)
    assert chat.generate([request], 8) == [chat.tokenizer.decode(generated, skip_special_tokens=True).strip()]


def test_a_stream_is_the_answer_in_pieces(chat):
    for request in REQUESTS:
        assert "".join(chat.stream(request, 12)) == chat.generate([request], 12)[0]


def test_on_answer_hears_each_answer_once(chat):
    heard = {}
    answers = chat.generate(REQUESTS, 6, batch_size=2, on_answer=heard.__setitem__)
    assert [heard[i] for i in range(len(REQUESTS))] == answers


def test_an_answer_ends_at_a_stop_token(chat):
    chat_end = chat.tokenizer.convert_tokens_to_ids("<|im_end|>")
    word = chat.tokenizer("red", add_special_tokens=False)["input_ids"]
    assert chat.stop_ids == [chat_end]
    assert chat._text([*word, chat_end, *word]) == "red"


def test_sampling_repeats_with_its_seed_and_leaves_the_global_generator_alone(chat):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    one = chat.generate(REQUESTS[:2], 12, temperature=2.0, seed=1)
    assert torch.equal(torch.rand(1), expected)
    assert one == chat.generate(REQUESTS[:2], 12, temperature=2.0, seed=1)
    assert one != chat.generate(REQUESTS[:2], 12, temperature=2.0, seed=2)


def test_an_error_in_the_thread_reaches_the_caller(chat, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("the tower fell")

    monkeypatch.setattr(chat.model.model.vision_tower, "forward", broken)
    with pytest.raises(RuntimeError, match="the tower fell"):
        list(chat.stream(REQUESTS[0], 4))


def test_a_closed_stream_stops_generating(chat):
    request, threads = REQUESTS[4], threading.active_count()
    stream = chat.stream(request, 400, temperature=3.0, seed=0)
    next(stream)
    stream.close()
    assert threading.active_count() == threads
    stop = threading.Event()
    list(chat.stream(request, 3, stop=stop))
    assert not stop.is_set()  # the caller's event may be for other streams too
    stop.set()
    assert len("".join(chat.stream(request, 400, stop=stop))) < 20


def test_memory_running_out_halves_the_batch(chat, monkeypatch, capsys):
    expected = chat.generate(REQUESTS, 6)
    generate = chat.model.generate

    def small(**kwargs):
        if len(kwargs["input_ids"]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(**kwargs)

    monkeypatch.setattr(chat.model, "generate", small)
    assert chat.generate(REQUESTS, 6, batch_size=4) == expected
    assert chat.last_batch_size <= 2
    assert "out of memory with 4 rows, goes on with 2" in capsys.readouterr().out


def test_marks_are_placed_where_none_were_written():
    pictures = [picture("red"), picture("blue")]
    placed = place_marks(ChatRequest([Turn("system", "s"), Turn("user", "which?")], pictures))
    assert placed[1].text == "<image>\n<image>\nwhich?"
    assert place_marks(ask("a <image> b", pictures[0]))[0].text == "a <image> b"


@pytest.mark.parametrize(
    "request_, message",
    [
        (ask("<image> or <image>", picture("red")), "request 0: 2 <image>"),
        (ChatRequest([Turn("user", "a"), Turn("assistant", "b")]), "request 0: a prompt ends with a user turn"),
        (ask("word " * 600), "request 0: the prompt has .* the LLM takes 512"),
    ],
)
def test_a_bad_request_is_named(chat, request_, message):
    with pytest.raises(DataError, match=message):
        chat.generate([request_], 4)


def test_a_bad_image_is_named(chat, tmp_path):
    (tmp_path / "no.jpg").write_text("text")
    with pytest.raises(ImageError, match=r"request 1(.|\n)*no.jpg|no.jpg(.|\n)*request 1"):
        chat.generate([REQUESTS[1], ask("what", tmp_path / "no.jpg")], 4)


def test_settings_that_mean_nothing_are_refused(chat):
    for changes in ({"temperature": -1.0}, {"top_p": 0.0}, {"max_new_tokens": 0}, {"batch_size": 0}):
        with pytest.raises(ConfigError):
            chat.generate([REQUESTS[1]], **changes)


def test_an_mmkit_folder_loads_with_its_template(chat, tmp_path):
    card = LlavaCard("tiny", "tiny-llm", "", template="chatml", system="be brief", stage=2, encoder_card={"source": "tiny"})
    save_llava(chat.model, chat.processor, card, tmp_path / "clip" / "model")
    loaded = ChatModel.load(tmp_path / "clip" / "model")
    assert loaded.name == "clip"
    assert "be brief" in loaded.tokenizer.decode(loaded._prompt(REQUESTS[1], ""))
    assert loaded.encoder_card()["source"] == "tiny"
    assert loaded.encoder_card()["tokens_per_image"] == 16


def test_a_stock_folder_loads_with_its_own_template_and_answers_as_transformers_does(tmp_path):
    chat = chat_model(1, stock_tower())
    chat.processor.chat_template = STOCK_TEMPLATE
    chat.tokenizer.chat_template = None
    chat.model.save_pretrained(tmp_path / "stock")
    chat.processor.save_pretrained(tmp_path / "stock")
    loaded = ChatModel.load(tmp_path / "stock")
    assert loaded.chat_format is None
    image: Image.Image = picture("green")
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what colour is it"}]}]
    text = chat.processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = chat.processor(images=image, text=text, return_tensors="pt")
    output = chat.model.generate(**inputs, max_new_tokens=10, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    expected = chat.processor.decode(output, skip_special_tokens=True).strip()
    assert loaded.generate([ask("what colour is it", image)], 10) == [expected]
    assert expected
    with pytest.raises(DataError, match="says <image> and there is no image"):
        loaded.generate([ask("what is <image>?")], 4)


def test_a_folder_without_template_asks_for_one(chat, tmp_path):
    model, processor = chat_model(2, stock_tower()).model, chat_model(2, stock_tower()).processor
    processor.chat_template = processor.tokenizer.chat_template = None
    model.save_pretrained(tmp_path / "bare")
    processor.save_pretrained(tmp_path / "bare")
    with pytest.raises(ConfigError, match="has no chat template"):
        ChatModel.load(tmp_path / "bare")
    assert ChatModel.load(tmp_path / "bare", template="chatml").generate([REQUESTS[1]], 3)
