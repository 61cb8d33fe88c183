"""The state of one person's comparison: images, questions, and every model's answer to each. No Gradio in it.

The models are shared by all sessions, the rounds are not. Each model answers in a thread of its own and tells what it wrote through one
queue; `ChatSession.ask` turns that into a stream of snapshots for whoever draws them.
"""

import hashlib
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from queue import Empty, Queue
from typing import Any, Literal, Protocol

from PIL.Image import Image

from llm_stage.chat_format import Turn
from llm_stage.generate import ChatRequest
from mmkit.errors import DataError

MAX_QUESTION = 2000  # characters; longer than any context of the models at hand leaves room for
MAX_IMAGES = 8
SNAPSHOTS_PER_SECOND = 20
IMAGE_MARK = "<image>"

State = Literal["waiting", "writing", "done", "stopped", "failed"]
FINISHED: tuple[State, ...] = ("done", "stopped", "failed")


class Answerer(Protocol):
    """What a session needs of a model; `llm_stage.generate.ChatModel` is one."""

    name: str

    def stream(
        self, request: ChatRequest, *, max_new_tokens: int, temperature: float, top_p: float, seed: int | None, stop: threading.Event
    ) -> Iterator[str]:
        """Give the answer piece by piece; end early once `stop` is set."""

    def encoder_card(self) -> dict[str, Any]:
        """Say what the vision encoder is."""


@dataclass
class Limits:
    """How the models may answer."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = 0
    together: bool = True  # all models at once; one after the other gives times that do not disturb each other
    remember: bool = True  # earlier rounds about the same image are part of the question


@dataclass
class Answer:
    """One model's answer to one question, as far as it is written.

    `first_token` and `seconds` count from the moment the model was asked, its waiting for a free turn included. `tokens` is the answer's
    length where the model's tokenizer is at hand.
    """

    model: str
    text: str = ""
    state: State = "waiting"
    first_token: float | None = None
    seconds: float | None = None
    tokens: int | None = None
    error: str = ""

    @property
    def finished(self) -> bool:
        """True when nothing more will be written."""
        return self.state in FINISHED

    @property
    def rate(self) -> float | None:
        """Tokens a second after the first one, which waits for the image and the prompt; None where there is no second."""
        if not self.tokens or self.tokens < 2 or self.seconds is None or self.first_token is None or self.seconds <= self.first_token:
            return None
        return (self.tokens - 1) / (self.seconds - self.first_token)


@dataclass
class Round:
    """One question about some images (or none), and an answer per model; `attempt` counts how often it was asked before.

    `digests` tell the images apart by what is in them: one that was saved and loaded again is still the same image.
    """

    question: str
    images: tuple[Image, ...]
    answers: list[Answer]
    attempt: int = 0
    digests: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.digests = tuple(map(digest, self.images))


@dataclass
class _News:
    """What a model's thread has to tell: a piece of text, or its end."""

    index: int
    piece: str = ""
    state: State | None = None
    error: str = ""
    at: float = field(default_factory=time.perf_counter)


class ModelShelf:
    """The loaded models, one generation at a time each: a model's weights, cache and seed belong to one answer at a time."""

    def __init__(self, models: Sequence[Answerer]) -> None:
        names = [model.name for model in models]
        if not 1 <= len(models) <= 4:
            raise DataError(f"a comparison takes one to four models, got {len(models)}: {', '.join(names) or 'none'}")
        self.models = list(models)
        self.names = distinct(names)
        self.locks = [threading.Lock() for _ in models]

    def pick(self, places: Sequence[int], names: Sequence[str]) -> "ModelShelf":
        """Some of the models under other names, for a blind comparison; a model still does one thing at a time, whichever shelf asks."""
        picked = ModelShelf([self.models[place] for place in places])
        picked.names, picked.locks = list(names), [self.locks[place] for place in places]
        return picked


def digest(image: Image) -> str:
    """SHA-256 of an image's size and pixels."""
    return hashlib.sha256(f"{image.size} {image.mode} ".encode() + image.tobytes()).hexdigest()


def user_turn(question: str, images: int) -> Turn:
    """A question as a turn; so many images are first shown with it, before its words, as in LLaVA's own prompts."""
    return Turn("user", f"{IMAGE_MARK}\n" * images + question)


def distinct(names: Sequence[str]) -> list[str]:
    """Number the names that occur more than once, so that two folders called `model` can be told apart."""
    return [name if names.count(name) == 1 else f"{name} ({names[: place + 1].count(name)})" for place, name in enumerate(names)]


class ChatSession:
    """One browser's conversation with all the models of a shelf."""

    def __init__(self, shelf: ModelShelf) -> None:
        self.shelf = shelf
        self.rounds: list[Round] = []
        self._stop = threading.Event()
        self._asking = threading.Lock()

    def ask(
        self, question: str, images: Sequence[Image] = (), limits: Limits | None = None, *, instead: bool = False
    ) -> Iterator[list[Round]]:
        """Ask all models; yields the rounds so far, about `SNAPSHOTS_PER_SECOND` times a second and once at the end.

        A model that fails does not take the others along: its answer holds the reason.

        Args:
            question: The words of the question, without any image mark.
            images: RGB; none for a question about no image.
            limits: How to answer; None is the default.
            instead: The question takes the place of the last one, whose answers are dropped.

        Raises:
            DataError: The question is empty or too long, there are too many images, or this session's last question is still being answered.
        """
        question = question.strip()
        if not question:
            raise DataError("the question is empty: type one, or pick one of the suggested questions")
        if len(question) > MAX_QUESTION:
            raise DataError(f"the question has {len(question)} characters; at most {MAX_QUESTION} are taken")
        if IMAGE_MARK in question:
            raise DataError(f"the question holds {IMAGE_MARK}, the models' own mark for where the image is: leave it out")
        if len(images) > MAX_IMAGES:
            raise DataError(f"{len(images)} images were given; at most {MAX_IMAGES} are taken")
        yield from self._asked(Round(question, tuple(images), []), limits or Limits(), drop_last=instead)

    def again(self, limits: Limits | None = None) -> Iterator[list[Round]]:
        """Ask the last question once more, in place of the answers it had; where tokens are drawn, with the next seed.

        Raises:
            DataError: Nothing was asked yet, or the last question is still being answered.
        """
        if not self.rounds:
            raise DataError("nothing was asked yet: there is no answer to make anew")
        last = self.rounds[-1]
        yield from self._asked(Round(last.question, last.images, [], last.attempt + 1), limits or Limits(), drop_last=True)

    def _asked(self, current: Round, limits: Limits, drop_last: bool) -> Iterator[list[Round]]:
        """Take the session's turn, then answer."""
        if not self._asking.acquire(blocking=False):
            raise DataError("the last question is still being answered: wait for it, or press Stop")
        try:
            if drop_last and self.rounds:
                self.rounds = self.rounds[:-1]
            yield from self._rounds_while_answering(current, limits)
        finally:
            self._stop.set()  # the page may have gone away in mid-answer: the threads must not write on for nobody
            self._asking.release()

    def stop(self) -> None:
        """End the answers being written; what stands there stays."""
        self._stop.set()

    def clear(self) -> None:
        """Forget all rounds."""
        self.stop()
        self.rounds = []

    def load(self, rounds: Sequence[Round]) -> None:
        """Take over a saved conversation in place of this one.

        Raises:
            DataError: A question is still being answered.
        """
        if not self._asking.acquire(blocking=False):
            raise DataError("the last question is still being answered: wait for it, or press Stop")
        self.rounds = list(rounds)
        self._asking.release()

    def history(self, index: int, current: Round) -> list[Turn]:
        """The turns model `index` has had about a round's images: rounds from the last change of images on, its failed ones left out."""
        turns: list[Turn] = []
        for past in self.rounds:
            answer = next((answer for answer in past.answers if answer.model == self.shelf.names[index]), None)
            if past.digests != current.digests:
                turns = []
            elif answer and answer.state in ("done", "stopped") and answer.text.strip():
                turns += [user_turn(past.question, len(past.images) if not turns else 0), Turn("assistant", answer.text.strip())]
        return turns

    def _rounds_while_answering(self, current: Round, limits: Limits) -> Iterator[list[Round]]:
        """Start the threads, then turn their news into snapshots until all have ended or Stop was pressed."""
        self._stop = stop = threading.Event()
        if limits.seed is not None:
            limits = replace(limits, seed=limits.seed + current.attempt)
        requests = []
        for index in range(len(self.shelf.models)):
            turns = self.history(index, current) if limits.remember else []
            turns.append(user_turn(current.question, len(current.images) if not turns else 0))
            requests.append(ChatRequest(turns=turns, images=list(current.images)))
        current.answers = [Answer(name) for name in self.shelf.names]
        self.rounds.append(current)
        yield self.rounds

        news: Queue[_News] = Queue()
        groups = [[index] for index in range(len(requests))] if limits.together else [list(range(len(requests)))]
        for group in groups:
            work = (group, requests, limits, news, stop)
            threading.Thread(target=self._answer_in_turn, args=work, name=f"answer {group}", daemon=True).start()
        starts: dict[int, float] = {}
        shown = time.perf_counter()
        while not all(answer.finished for answer in current.answers):
            try:
                _apply(current, news.get(timeout=0.05), starts)
            except Empty:
                pass
            if stop.is_set():
                _mark_stopped(current, starts)
            self._count_tokens(current)
            if time.perf_counter() - shown >= 1 / SNAPSHOTS_PER_SECOND:
                shown = time.perf_counter()
                yield self.rounds
        yield self.rounds

    def _count_tokens(self, current: Round) -> None:
        """Count the tokens of answers that have ended, where the tokenizer is at hand."""
        for answer, model in zip(current.answers, self.shelf.models, strict=True):
            tokenizer = getattr(model, "tokenizer", None)
            if answer.finished and answer.tokens is None and tokenizer is not None:
                answer.tokens = len(tokenizer(answer.text, add_special_tokens=False)["input_ids"])

    def _answer_in_turn(
        self, group: Sequence[int], requests: Sequence[ChatRequest], limits: Limits, news: "Queue[_News]", stop: threading.Event
    ) -> None:
        """Let the models of a group answer one after the other (a thread's whole life)."""
        for index in group:
            news.put(_News(index))
            try:
                state = self._answer(index, requests[index], limits, news, stop)
                news.put(_News(index, state=state))
            except Exception as error:  # whatever a model throws belongs on the page, in its own column, and in the terminal in full
                traceback.print_exc()
                news.put(_News(index, state="failed", error=f"{type(error).__name__}: {error}"))

    def _answer(self, index: int, request: ChatRequest, limits: Limits, news: "Queue[_News]", stop: threading.Event) -> State:
        """Stream one model's answer into the queue; give the state it ended in."""
        while not self.shelf.locks[index].acquire(timeout=0.1):
            if stop.is_set():
                return "stopped"
        try:
            options: dict[str, Any] = {
                "max_new_tokens": limits.max_new_tokens,
                "temperature": limits.temperature,
                "top_p": limits.top_p,
                "seed": limits.seed,
                "stop": stop,
            }
            for piece in self.shelf.models[index].stream(request, **options):
                if stop.is_set():
                    return "stopped"
                news.put(_News(index, piece=piece))
        finally:
            self.shelf.locks[index].release()
        return "done"


def _apply(current: Round, news: _News, starts: dict[int, float]) -> None:
    """Write one piece of news into its answer; an answer that has ended (Stop) takes no more."""
    answer = current.answers[news.index]
    if answer.finished:
        return
    since = news.at - starts.setdefault(news.index, news.at)
    if news.piece:
        answer.first_token = since if answer.first_token is None else answer.first_token
        answer.state = "writing"
        answer.text += news.piece
    if news.state is not None:
        answer.state, answer.error, answer.seconds = news.state, news.error, since


def _mark_stopped(current: Round, starts: dict[int, float]) -> None:
    """End all unfinished answers at once: Stop answers at once even where a model is in the middle of a long step."""
    for index, answer in enumerate(current.answers):
        if not answer.finished:
            answer.state = "stopped"
            answer.seconds = time.perf_counter() - starts[index] if index in starts else None
