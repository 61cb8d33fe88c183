"""The demo: sessions without a page, then the real page in Chromium with a tiny random LLaVA, a slow model and one that fails."""

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from llava_tiny import picture
from PIL import Image

from apps import demo, demo_page
from apps.chat_session import Answer, ChatSession, Limits, ModelShelf, Round
from llm_stage import models
from llm_stage.generate import ChatRequest
from mmkit.errors import ConfigError, DataError


class Scripted:
    """A model that says what it is told, word by word."""

    def __init__(self, name: str, words: str = "a red apple", delay: float = 0.0, error: Exception | None = None) -> None:
        self.name, self.words, self.delay, self.error = name, words, delay, error
        self.requests: list[ChatRequest] = []
        self.seeds: list[int | None] = []
        self.closed = 0
        self.running = 0
        self.most_running = 0

    def encoder_card(self) -> dict[str, Any]:
        return {"origin": f"origin of {self.name}", "parameters": 3.1e6}

    def stream(self, request: ChatRequest, **options: Any) -> Iterator[str]:
        self.requests.append(request)
        self.seeds.append(options["seed"])
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
    for _ in session.ask(question, [image] if image else [], limits):
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
    stream = ChatSession(ModelShelf([slow])).ask("count")
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
    for rounds in session.ask("what?", (), Limits(together=False)):
        answers = rounds[-1].answers
        assert answers[0].finished or answers[1].state == "waiting"
    assert [answer.state for answer in session.rounds[-1].answers] == ["done", "done"]


def test_several_images_come_in_order_each_with_its_mark() -> None:
    model, images = Scripted("a"), [picture("red"), picture("blue")]
    session = ChatSession(ModelShelf([model]))
    list(session.ask("what differs?", images))
    assert model.requests[0].turns[0].text == "<image>\n<image>\nwhat differs?"
    assert list(model.requests[0].images) == images
    list(session.ask("and the second?", images))
    assert [turn.role for turn in model.requests[1].turns] == ["user", "assistant", "user"]
    list(session.ask("and now?", images[::-1]))  # the other way round they are another question
    assert [turn.role for turn in model.requests[2].turns] == ["user"]
    with pytest.raises(DataError, match="9 images"):
        list(session.ask("all?", [picture("red")] * 9))


def test_asking_again_replaces_the_answers_and_draws_with_another_seed() -> None:
    model = Scripted("a")
    session, limits = ChatSession(ModelShelf([model])), Limits(temperature=1.0, seed=5)
    ask(session, "what is it?", picture("red"), limits)
    list(session.again(limits))
    list(session.again(limits))
    assert len(session.rounds) == 1
    assert session.rounds[0].attempt == 2
    assert [turn.text for turn in model.requests[2].turns] == ["<image>\nwhat is it?"]  # the replaced answer is no part of the prompt
    assert model.seeds == [5, 6, 7]
    with pytest.raises(DataError, match="nothing was asked"):
        list(ChatSession(ModelShelf([model])).again())


def test_an_edited_question_takes_the_last_ones_place_and_a_bad_one_takes_nothing() -> None:
    model, image = Scripted("a"), picture("red")
    session = ChatSession(ModelShelf([model]))
    ask(session, "first?", image)
    ask(session, "secnd?", image)
    with pytest.raises(DataError, match="empty"):
        list(session.ask(" ", [image], instead=True))
    assert len(session.rounds) == 2
    list(session.ask("second?", [image], instead=True))
    assert [past.question for past in session.rounds] == ["first?", "second?"]
    assert [turn.text for turn in model.requests[-1].turns] == ["<image>\nfirst?", "a red apple", "second?"]


def test_an_image_that_was_saved_and_loaded_is_the_same_image() -> None:
    model, image = Scripted("a"), picture("red")
    session = ChatSession(ModelShelf([model]))
    session.load([Round("before?", (image,), [Answer("a", "yes", "done"), Answer("gone", "no", "done")])])
    ask(session, "after?", image.copy())
    assert [turn.text for turn in model.requests[0].turns] == ["<image>\nbefore?", "yes", "after?"]


def test_speed_is_of_the_tokens_after_the_first() -> None:
    assert Answer("a", "x", "done", first_token=1.0, seconds=3.0, tokens=5).rate == 2.0
    assert Answer("a", "x", "done", first_token=1.0, seconds=3.0, tokens=1).rate is None
    assert Answer("a", "x", "done", first_token=1.0, seconds=3.0).rate is None
    assert "2 tokens/s" in demo_page.times(Answer("a", "x", "done", first_token=1.0, seconds=3.0, tokens=5))


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
    drawn = demo_page.rounds_html([Round(evil, (), [Answer(evil, text=evil, state="done"), Answer("b", state="failed", error=evil)])])
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


def test_a_page_open_to_others_needs_a_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(demo.PASSWORD, raising=False)
    with pytest.raises(ConfigError, match=demo.PASSWORD):
        demo.main(["--model", "mini-chat", "--host", "0.0.0.0"])


def test_a_models_card_shows_the_scores_beside_it(tmp_path: Path) -> None:
    summary = {"benchmark": "mini_vqa", "n": 3, "metrics": {"vqa_accuracy": {"value": 43.91, "ci95": [41.2, 46.7], "n": 3}}}
    folder = tmp_path / "eval/clip/mini_vqa"
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "llava/clip").mkdir(parents=True)
    assert demo.scores_of(str(tmp_path / "llava/clip")) == {"mini vqa": "43.9 % [41.2, 46.7]"}
    assert demo.scores_of(str(tmp_path / "llava/uta")) == {}
    assert "43.9 % [41.2, 46.7]" in demo_page.head_html(["clip"], [{"origin": "x"}], [{"mini vqa": "43.9 % [41.2, 46.7]"}])


def test_photographs_are_examples_where_the_installed_packages_bring_them(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(min(image.size) >= 100 for image in demo.photographs())
    monkeypatch.setattr(demo, "PHOTOGRAPHS", ("none_of_this_name.jpg",))
    assert demo.photographs() == []


def test_five_models_are_refused() -> None:
    with pytest.raises(ConfigError, match="up to four"):
        demo.main(["--model", "a,b,c,d,e"])
