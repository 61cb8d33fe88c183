"""The demo: sessions without a page, then the real page in Chromium with a tiny random LLaVA, a slow model and one that fails."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from llava_tiny import picture, tiny_llm, tiny_tower
from PIL import Image

from apps import demo, demo_page
from apps.chat_session import Answer, ChatSession, Limits, ModelShelf, Round
from llm_stage import models
from llm_stage.chat_format import ChatFormat
from llm_stage.generate import ChatModel, ChatRequest
from llm_stage.llava import build_llava
from mmkit.errors import ConfigError, DataError


class Scripted:
    """A model that says what it is told, word by word."""

    def __init__(self, name: str, words: str = "a red apple", delay: float = 0.0, error: Exception | None = None) -> None:
        self.name, self.words, self.delay, self.error = name, words, delay, error
        self.requests: list[ChatRequest] = []
        self.closed = 0
        self.running = 0
        self.most_running = 0

    def encoder_card(self) -> dict[str, Any]:
        return {"origin": f"origin of {self.name}", "parameters": 3.1e6}

    def stream(self, request: ChatRequest, **options: Any) -> Iterator[str]:
        self.requests.append(request)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            for word in self.words.split(" "):
                time.sleep(self.delay)
                if self.error is not None:
                    raise self.error
                yield word + " "
        finally:
            self.running -= 1
            self.closed += 1


def ask(session: ChatSession, question: str, image: Image.Image | None = None, limits: Limits | None = None) -> Round:
    """Ask and wait for the end."""
    for _ in session.ask(question, image, limits):
        pass
    return session.rounds[-1]


# ---- sessions ---------------------------------------------------------------------------------------------------------------------------


def test_all_models_answer_one_question_and_are_timed() -> None:
    session = ChatSession(ModelShelf([Scripted("a", "one two", 0.02), Scripted("b", "three", 0.01)]))
    answers = ask(session, "what is it?").answers
    assert [answer.text.strip() for answer in answers] == ["one two", "three"]
    assert [answer.state for answer in answers] == ["done", "done"]
    for answer in answers:
        assert answer.first_token is not None
        assert answer.seconds is not None
        assert 0 < answer.first_token <= answer.seconds


def test_a_model_that_fails_says_why_and_does_not_stop_the_others() -> None:
    session = ChatSession(ModelShelf([Scripted("a", error=RuntimeError("width 192 is not 256")), Scripted("b")]))
    failed, done = ask(session, "what is it?").answers
    assert (failed.state, failed.error) == ("failed", "RuntimeError: width 192 is not 256")
    assert done.state == "done"


def test_stop_ends_the_answers_keeps_their_words_and_closes_the_generation() -> None:
    slow = Scripted("slow", " ".join(map(str, range(200))), 0.02)
    session = ChatSession(ModelShelf([slow]))
    threading.Timer(0.3, session.stop).start()
    start = time.monotonic()
    answer = ask(session, "count").answers[0]
    assert time.monotonic() - start < 2
    assert answer.state == "stopped"
    assert answer.text.startswith("0 1 2")
    deadline = time.monotonic() + 5
    while not slow.closed and time.monotonic() < deadline:
        time.sleep(0.01)
    assert slow.closed == 1


def test_a_page_that_goes_away_stops_its_models() -> None:
    slow = Scripted("slow", " ".join(map(str, range(200))), 0.02)
    stream = ChatSession(ModelShelf([slow])).ask("count", None)
    next(stream)  # the question alone; the models start after it
    next(stream)
    stream.close()
    deadline = time.monotonic() + 5
    while not slow.closed and time.monotonic() < deadline:
        time.sleep(0.01)
    assert slow.closed == 1


def test_a_follow_up_about_the_same_image_comes_with_what_went_before() -> None:
    model, image, other = Scripted("a", "a cat"), picture("red"), picture("blue")
    session = ChatSession(ModelShelf([model]))
    ask(session, "what is it?", image)
    ask(session, "what colour?", image)
    assert [(turn.role, turn.text) for turn in model.requests[1].turns] == [
        ("user", "<image>\nwhat is it?"),
        ("assistant", "a cat"),
        ("user", "what colour?"),
    ]
    ask(session, "and this?", other)
    assert [turn.text for turn in model.requests[2].turns] == ["<image>\nand this?"]
    ask(session, "alone?", other, Limits(remember=False))
    assert [turn.text for turn in model.requests[3].turns] == ["<image>\nalone?"]


def test_a_failed_answer_is_no_part_of_the_conversation() -> None:
    model, image = Scripted("a", error=RuntimeError("once")), picture("red")
    session = ChatSession(ModelShelf([model]))
    ask(session, "what is it?", image)
    model.error = None
    ask(session, "and now?", image)
    assert [turn.text for turn in model.requests[1].turns] == ["<image>\nand now?"]


def test_one_model_answers_one_question_at_a_time_whoever_asks() -> None:
    model = Scripted("a", "one two three four", 0.02)
    shelf = ModelShelf([model])
    threads = [threading.Thread(target=ask, args=(ChatSession(shelf), f"question {number}")) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=10)
    assert len(model.requests) == 4
    assert model.most_running == 1


def test_one_after_the_other_never_runs_two_models_at_once() -> None:
    first, second = Scripted("a", "one two three", 0.05), Scripted("b", "four", 0.01)
    session = ChatSession(ModelShelf([first, second]))
    for rounds in session.ask("what?", None, Limits(together=False)):
        answers = rounds[-1].answers
        assert answers[0].finished or answers[1].state == "waiting"
    assert [answer.state for answer in session.rounds[-1].answers] == ["done", "done"]


@pytest.mark.parametrize(("question", "said"), [("  ", "empty"), ("x" * 5000, "5000 characters"), ("what is <image>?", "<image>")])
def test_a_question_that_cannot_be_asked_says_why(question: str, said: str) -> None:
    session = ChatSession(ModelShelf([Scripted("a")]))
    with pytest.raises(DataError, match=said):
        ask(session, question)
    assert session.rounds == []


def test_a_shelf_takes_one_to_four_models_and_tells_their_names_apart() -> None:
    with pytest.raises(DataError, match="one to four"):
        ModelShelf([Scripted(str(number)) for number in range(5)])
    assert ModelShelf([Scripted("model"), Scripted("model"), Scripted("uta")]).names == ["model (1)", "model (2)", "uta"]


# ---- what the page is made of -------------------------------------------------------------------------------------------------------------


def test_every_word_of_user_and_model_is_escaped() -> None:
    evil = "<img src=x onerror=alert(1)>"
    drawn = demo_page.rounds_html([Round(evil, None, [Answer(evil, text=evil, state="done"), Answer("b", state="failed", error=evil)])])
    assert "<img" not in drawn
    assert drawn.count("&lt;img") == 4
    assert "<img" not in demo_page.notice_html(evil) + demo_page.head_html([evil], [{"origin": evil}])


def test_repeated_model_flags_become_one_list() -> None:
    assert demo.join_repeated(["--model", "a", "--port=1", "--model=b"], "--model") == ["--port=1", "--model=a,b"]


def test_without_any_model_the_error_says_what_to_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, "MODELS", {})  # an installation without weights
    with pytest.raises(ConfigError, match="mmkit quickstart"):
        demo.main([])


def test_five_models_are_refused() -> None:
    with pytest.raises(ConfigError, match="up to four"):
        demo.main(["--model", "a,b,c,d,e"])


# ---- the page in a browser ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served() -> Iterator[str]:
    """The address of a page with three models."""
    llm, tokenizer = tiny_llm(tie=False)
    with torch.no_grad():
        llm.get_input_embeddings().weight.mul_(10)  # spreads the logits: a random model repeats one token for ever otherwise
    model, processor = build_llava(tiny_tower(), (llm, tokenizer))
    chat = ChatModel(model.eval(), processor, ChatFormat(processor.tokenizer, "own"), "tiny")
    slow = Scripted(
        "slow", " ".join(f"word{number}" for number in range(6000)), 0.05
    )  # it never comes to its end, however long a busy machine takes to press Stop
    shelf = ModelShelf([chat, slow, Scripted("broken", error=RuntimeError("the tower's <b>width</b> does not fit"))])
    blocks = demo.build_page(shelf, [picture(colour, (96, 96)) for colour in ("red", "green", "blue")])
    yield demo.launch(blocks)
    blocks.close()


@pytest.fixture
def watched(chromium: Any) -> Iterator[Any]:
    """Opens pages whose every request must go to loopback, and whose console must stay clean."""
    requests: list[str] = []
    complaints: list[str] = []

    def open_page(url: str, width: int, height: int) -> Any:
        page = chromium.new_page(viewport={"width": width, "height": height})
        page.set_default_timeout(120_000)  # a busy two-core machine takes half a minute to draw the page the first time
        page.on("request", lambda request: requests.append(request.url))
        page.on("websocket", lambda socket: requests.append(socket.url.replace("ws", "http", 1)))
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(url)
        page.wait_for_selector("#mm-examples button.thumbnail-item")
        return page

    yield open_page
    outside = [url for url in requests if not url.startswith(("http://127.0.0.1:", "data:", "blob:"))]
    assert len(requests) > 5
    assert outside == []
    assert complaints == []


@pytest.mark.slow
@pytest.mark.parametrize("width,height", [(1280, 860), (390, 844)], ids=["desktop", "phone"])
def test_upload_ask_stream_stop_in_a_browser(served: str, watched: Any, width: int, height: int, tmp_path: Path) -> None:
    upload = tmp_path / "upload.png"
    picture("blue", (120, 80)).save(upload)
    page = watched(served, width, height)
    page.set_input_files("#mm-image input[type=file]", upload)
    page.wait_for_selector("#mm-image img")
    page.fill("#mm-question textarea", "what colour is it")
    page.click("#mm-ask-button")

    page.wait_for_selector(".mm-answer:nth-child(2).mm-writing >> text=word3")  # streamed: words are there while it writes
    page.wait_for_selector(".mm-answer.mm-failed >> text=RuntimeError: the tower's <b>width</b> does not fit")
    page.wait_for_selector(".mm-answer:nth-child(2) >> text=first token")
    page.wait_for_selector(".mm-answer:nth-child(1).mm-done >> text=in all")
    assert page.locator(".mm-ask img").count() == 1
    page.click("#mm-stop-button")
    page.wait_for_selector(".mm-answer:nth-child(2).mm-stopped >> text=word3")
    assert "word5999" not in page.inner_text(".mm-answer:nth-child(2)")

    page.wait_for_selector("#mm-ask-button:not([disabled])")
    page.click("#mm-presets button >> nth=1")  # a preset asks at once
    page.wait_for_selector(".mm-round:nth-child(2) .mm-answer.mm-writing")
    page.click("#mm-stop-button")
    page.wait_for_selector("#mm-ask-button:not([disabled])")
    assert page.evaluate("document.documentElement.scrollWidth") <= width  # nothing sticks out sideways
    page.click("#mm-clear")
    page.wait_for_selector(".mm-empty")
    page.close()


@pytest.mark.slow
def test_examples_bad_files_and_empty_questions_in_a_browser(served: str, watched: Any, tmp_path: Path) -> None:
    broken = tmp_path / "notes.jpg"
    broken.write_text("this is no picture")
    page = watched(served, 1000, 800)
    page.click("#mm-ask-button")
    page.wait_for_selector(".mm-notice >> text=the question is empty")

    page.set_input_files("#mm-image input[type=file]", broken)
    page.wait_for_selector("#mm-image img", state="attached")
    page.fill("#mm-question textarea", "what is it")
    page.click("#mm-ask-button")
    page.wait_for_selector(".mm-notice >> text=notes.jpg")
    assert page.locator(".mm-answer").count() == 0

    page.click("#mm-examples button.thumbnail-item >> nth=1")
    page.wait_for_function("document.querySelector('#mm-image img') && document.querySelector('#mm-image img').naturalWidth > 0")
    page.fill("#mm-question textarea", "what is it")
    page.click("#mm-ask-button")
    page.wait_for_selector(".mm-answer:nth-child(1).mm-done")
    assert page.locator(".mm-notice").count() == 0
    page.click("#mm-stop-button")
    page.wait_for_selector("#mm-ask-button:not([disabled])")
    page.close()


@pytest.mark.slow
def test_two_people_do_not_see_each_other(served: str, watched: Any) -> None:
    first, second = watched(served, 900, 700), watched(served, 900, 700)
    first.fill("#mm-question textarea", "the first one's question")
    first.click("#mm-ask-button")
    first.wait_for_selector(".mm-ask >> text=the first one's question")
    second.fill("#mm-question textarea", "the second one's question")
    second.click("#mm-ask-button")
    second.wait_for_selector(".mm-ask >> text=the second one's question")
    assert "first one" not in second.inner_text("#mm-conversation")
    assert "second one" not in first.inner_text("#mm-conversation")
    for page in (first, second):
        page.click("#mm-stop-button")
        page.wait_for_selector("#mm-ask-button:not([disabled])")
        page.close()
