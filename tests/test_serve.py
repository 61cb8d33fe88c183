"""`mmkit serve`: the official client, many clients at once, everything malformed, a full queue, and an orderly end."""

import base64
import io
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
import uvicorn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llava_tiny import picture, write_data, write_parts
from PIL import Image

from apps import serve
from apps.openai_form import cut_at_stop, until_stop
from apps.serve import ServeConfig, make_app
from llm_stage.chat_format import Turn
from llm_stage.chat_models import load_chat
from llm_stage.generate import ChatRequest
from llm_stage.train_llava import main as train
from mmkit.errors import ConfigError, DataError


class Echo:
    """Says what it was asked, and how many pictures came along; keeps the sizes of its batches."""

    name, tokens_per_image = "echo", 4

    def __init__(self, pause: float = 0.0) -> None:
        self.pause, self.batches, self.stopped = pause, [], False  # type: ignore[var-annotated]

    def said(self, request: ChatRequest) -> str:
        text = request.turns[-1].text.replace("<image>", "").strip()
        if "refuse" in text:
            raise DataError("the prompt is too long")
        return f"{text} with {len(request.images)}"

    def generate(self, requests: Any, max_new_tokens: int, batch_size: int, temperature: float, top_p: float, seed: Any) -> list[str]:
        self.batches.append(len(requests))
        time.sleep(self.pause)
        return [self.said(request) for request in requests]

    def stream(self, request: ChatRequest, *, stop: threading.Event, **_: Any) -> Iterator[str]:
        for word in self.said(request).split(" "):
            if stop.is_set():
                self.stopped = True
                return
            time.sleep(self.pause / 10)
            yield word + " "


class Running:
    """A server in a thread."""

    def __init__(self, models: dict[str, Any], **more: Any) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        app = make_app(models, ServeConfig(model=list(models), **more))
        self.server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error", timeout_graceful_shutdown=20))
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.url = f"http://127.0.0.1:{port}"
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive()


@pytest.fixture(scope="module")
def echo() -> Iterator[Running]:
    running = Running({"echo": Echo()}, max_images=2, max_megabytes=1.0)
    yield running
    running.stop()


def data_url(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def asking(words: str, *images: str) -> list[Any]:
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": words}]}]


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Running, Any]]:
    folder = tmp_path_factory.mktemp("serve")
    encoder, llm = write_parts(folder)
    data, images = write_data(folder / "data", rows=8)
    train([
        "--stage", "2", "--encoder", str(encoder), "--llm", str(llm), "--json", str(data), "--images", str(images), "--template", "own",
        "--run.steps", "1", "--run.micro_batch_size", "2", "--run.output_dir", str(folder / "tiny"),
    ])  # fmt: skip
    chat = load_chat(folder / "tiny" / "model")
    running = Running({"tiny": chat}, root=str(images))
    yield running, chat
    running.stop()


def test_the_official_client_gets_the_models_own_answer(real: tuple[Running, Any]) -> None:
    running, chat = real
    own = chat.generate([ChatRequest([Turn("user", "<image>\nwhat colour is it")], [picture("red")])], 12)[0]
    found = running.client.chat.completions.create(
        model="tiny", messages=asking("what colour is it", data_url(picture("red"))), max_tokens=12
    )
    assert found.choices[0].message.content == own
    assert found.usage is not None
    assert found.usage.prompt_tokens == len(chat.tokenizer("<image>\nwhat colour is it")["input_ids"]) + chat.tokens_per_image
    assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens
    assert [model.id for model in running.client.models.list()] == ["tiny"]


def test_a_stream_is_the_answer_in_pieces(real: tuple[Running, Any]) -> None:
    running, _ = real
    messages = asking("what colour is it", data_url(picture("blue")))
    whole = running.client.chat.completions.create(model="tiny", messages=messages, max_tokens=12)
    chunks = list(
        running.client.chat.completions.create(
            model="tiny", messages=messages, max_tokens=12, stream=True, stream_options={"include_usage": True}
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == whole.choices[0].finish_reason


def test_stop_sequences_cut_whole_answers_and_streams_alike(echo: Running) -> None:
    for words, stop in (("one two three", ["two"]), ("one two three", ["x", "e t"]), ("abc", "zz")):
        whole = echo.client.chat.completions.create(model="echo", messages=asking(words), stop=stop).choices[0].message.content
        chunks = echo.client.chat.completions.create(model="echo", messages=asking(words), stop=stop, stream=True)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text.rstrip() == whole
    assert cut_at_stop("one two", ("two",)) == "one"
    assert "".join(until_stop(iter(["o", "ne t", "wo"]), ("two",))).rstrip() == "one"


def test_many_clients_get_each_its_own_answer_in_common_batches() -> None:
    model = Echo(pause=0.05)
    running = Running({"echo": model}, batch_size=8)
    try:
        with ThreadPoolExecutor(24) as pool:

            def ask(number: int) -> bool:
                found = running.client.chat.completions.create(model="echo", messages=asking(f"number {number}"))
                return found.choices[0].message.content == f"number {number} with 0"

            assert all(pool.map(ask, range(48)))
        assert sum(model.batches) == 48
        assert max(model.batches) > 1
        assert len(model.batches) < 30
        metrics = httpx.get(f"{running.url}/metrics").text
        assert 'mmkit_requests_total{status="200"} 48' in metrics
        assert 'mmkit_batch_rows_total{model="echo"} 48' in metrics
    finally:
        running.stop()


def test_a_full_queue_says_busy_and_nothing_else() -> None:
    running = Running({"echo": Echo(pause=0.3)}, batch_size=1, waiting=2)
    try:

        def ask(number: int) -> int:
            body = {"model": "echo", "messages": asking(f"number {number}")}
            return httpx.post(f"{running.url}/v1/chat/completions", json=body, timeout=60).status_code

        with ThreadPoolExecutor(12) as pool:
            codes = list(pool.map(ask, range(12)))
        assert set(codes) == {200, 503}
        assert ask(99) == 200  # and it recovers
    finally:
        running.stop()


def test_one_bad_request_fails_alone() -> None:
    running = Running({"echo": Echo(pause=0.05)}, batch_size=8)
    try:

        def ask(words: str) -> int:
            return httpx.post(f"{running.url}/v1/chat/completions", json={"messages": asking(words)}, timeout=60).status_code

        with ThreadPoolExecutor(6) as pool:
            codes = list(pool.map(ask, ["a", "refuse", "b", "c", "refuse", "d"]))
        assert codes == [200, 400, 200, 200, 400, 200]
    finally:
        running.stop()


def test_a_model_out_of_memory_says_so_and_goes_on() -> None:
    class Hungry(Echo):
        def generate(self, requests: Any, *args: Any) -> list[str]:
            if any("huge" in request.turns[-1].text for request in requests):
                raise torch.OutOfMemoryError("tried to allocate 80 GiB")
            return super().generate(requests, *args)

    server = Running({"echo": Hungry(0.02)})
    try:
        with ThreadPoolExecutor(8) as pool:
            asked = ["huge" if number == 3 else f"small {number}" for number in range(8)]
            answers = list(pool.map(lambda text: httpx.post(f"{server.url}/v1/chat/completions", json=plain(text), timeout=30), asked))
        assert [answer.status_code for answer in answers] == [500 if number == 3 else 200 for number in range(8)]
        assert "out of memory" in answers[3].json()["error"]["message"]
        assert answers[4].json()["choices"][0]["message"]["content"] == "small 4 with 0"
    finally:
        server.stop()


def plain(text: str) -> dict[str, Any]:
    """A request of words alone."""
    return {"model": "echo", "messages": [{"role": "user", "content": text}]}


def test_an_end_lets_accepted_requests_finish() -> None:
    running = Running({"echo": Echo(pause=0.5)}, batch_size=1)
    with ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(running.client.chat.completions.create, model="echo", messages=asking(f"n{n}")) for n in range(3)]
        time.sleep(0.3)
        running.stop()
        assert [future.result().choices[0].message.content for future in asked] == ["n0 with 0", "n1 with 0", "n2 with 0"]
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{running.url}/health")


def test_a_client_that_goes_away_ends_its_stream() -> None:
    model = Echo(pause=1.0)
    running = Running({"echo": model})
    try:
        with running.client.chat.completions.create(model="echo", messages=asking("word " * 50), stream=True) as chunks:
            for count, _ in enumerate(chunks):
                if count == 2:
                    break
        assert running.client.chat.completions.create(model="echo", messages=asking("next")).choices[0].message.content == "next with 0"
    finally:
        running.stop()


def bomb() -> str:
    """A small PNG that says it is 60,000 pixels wide and high."""
    import struct
    import zlib

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(data).decode()


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"model": "other", "messages": asking("x")}, 404, "no model 'other' here; there are: echo"),
        ({"messages": asking("x", "http://example.com/a.png")}, 400, "nothing is fetched"),
        ({"messages": asking("x", "file:///etc/passwd")}, 400, "no such file under the allowed root"),
        ({"messages": asking("x", "data:image/png;base64,!!!")}, 400, "is no base64"),
        ({"messages": asking("x", "data:image/png;base64," + base64.b64encode(b"text").decode())}, 400, "is not an image"),
        ({"messages": asking("x", bomb())}, 400, "too many pixels"),
        ({"messages": asking("x", *[data_url(picture("red"))] * 3)}, 400, "more than 2 pictures"),
        ({"messages": asking("x" * 2**20)}, 413, "larger than 1 MB"),
        ({"messages": asking("x"), "temperature": "hot"}, 400, "temperature is hot"),
        ({"messages": asking("x"), "max_tokens": 10**6}, 400, "max_tokens is 1000000"),
        ({"messages": asking("x"), "tools": [{"type": "function"}]}, 400, "'tools' is not supported"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "the last message is a user's"),
        ({"messages": [{"role": "robot", "content": "x"}]}, 400, "role is 'robot'"),
        ({"messages": []}, 400, "at least one message"),
    ],
)
def test_a_refusal_has_a_reason_in_the_standard_form(echo: Running, body: dict[str, Any], status: int, words: str) -> None:
    found = httpx.post(f"{echo.url}/v1/chat/completions", json=body)
    assert found.status_code == status
    assert words in found.json()["error"]["message"]
    assert set(found.json()["error"]) == {"message", "type", "param", "code"}


def test_the_official_client_knows_the_errors(echo: Running) -> None:
    with pytest.raises(openai.NotFoundError):
        echo.client.chat.completions.create(model="other", messages=asking("x"))
    with pytest.raises(openai.BadRequestError):
        echo.client.chat.completions.create(model="echo", messages=asking("refuse"))


JSON = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.integers() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FIELDS = st.sampled_from(
    ["model", "messages", "max_tokens", "temperature", "top_p", "seed", "stop", "stream", "n", "stream_options", "tools"]
)
PART = st.fixed_dictionaries({"type": st.sampled_from(["text", "image_url", "x"])}, optional={"text": JSON, "image_url": JSON})
MESSAGE = st.fixed_dictionaries({"role": st.sampled_from(["user", "system", "x"]), "content": JSON | st.lists(PART, max_size=3)})
BODY = JSON | st.dictionaries(FIELDS, JSON | st.lists(MESSAGE, max_size=3), max_size=6)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(BODY, st.booleans())
def test_whatever_comes_in_is_answered_or_refused_with_a_reason(echo: Running, body: Any, torn: bool) -> None:
    data = json.dumps(body).encode()
    found = httpx.post(f"{echo.url}/v1/chat/completions", content=data[: len(data) // 2] if torn else data, timeout=10)
    assert found.status_code < 500
    if found.status_code >= 400:
        assert found.json()["error"]["message"]


def test_a_token_is_asked_of_everybody_and_wanted_before_the_door_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(serve.TOKEN, raising=False)
    with pytest.raises(ConfigError, match=r"opens the server to others: set a token"):
        serve.main(["--model", "mini-chat", "--host", "0.0.0.0"])
    monkeypatch.setenv(serve.TOKEN, "open-sesame")
    running = Running({"echo": Echo()})
    try:
        with pytest.raises(openai.AuthenticationError):
            running.client.chat.completions.create(model="echo", messages=asking("x"))
        client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="open-sesame", max_retries=0)
        assert client.chat.completions.create(model="echo", messages=asking("x")).choices[0].message.content == "x with 0"
        assert httpx.get(f"{running.url}/health").json() == {"status": "ok"}
    finally:
        running.stop()


def test_files_are_read_under_the_root_alone(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    picture("red").save(tmp_path / "root" / "in.png")
    picture("red").save(tmp_path / "out.png")
    (tmp_path / "root" / "link.png").symlink_to(tmp_path / "out.png")
    running = Running({"echo": Echo()}, root=str(tmp_path / "root"))
    try:

        def ask(name: str) -> int:
            body = {"messages": asking("x", f"file://{tmp_path}/root/{name}")}
            return httpx.post(f"{running.url}/v1/chat/completions", json=body).status_code

        assert [ask(name) for name in ("in.png", "../out.png", "link.png", "none.png")] == [200, 400, 400, 400]
    finally:
        running.stop()
