"""Requests of many clients in batches of one model: those that wait and ask alike are answered together.

batcher = Batcher(model, batch_size=16, waiting=64)
future = batcher.submit(asked)          # Busy where the queue is full
for piece in batcher.stream(asked): ...
batcher.close()                         # what was accepted is answered first
"""

import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

from apps.openai_form import Asked, RequestError


class Busy(RequestError):
    """The queue is full; the client may come again."""

    def __init__(self, waiting: int) -> None:
        super().__init__(f"busy: {waiting} requests are waiting; try again in a moment", 503, "busy")


class Batcher:
    """One model and its queue.

    Args:
        model: With `generate` and `stream`, as `ChatModel` has them.
        batch_size: Requests answered at once.
        waiting: Requests that may wait.
        pause: Seconds that a first request waits for others.

    Attributes:
        batches, rows: So many so far.
    """

    def __init__(self, model: Any, batch_size: int = 16, waiting: int = 64, pause: float = 0.01) -> None:
        self.model, self.batch_size, self.waiting, self.pause = model, batch_size, waiting, pause
        self.batches = self.rows = 0
        self._queue: deque[tuple[Asked, Future[str]]] = deque()
        self._change = threading.Condition()
        self._turn = threading.Lock()  # a model does one thing at a time
        self._closed = False
        self._streams = 0
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    @property
    def queued(self) -> int:
        """Requests that wait, streams included."""
        return len(self._queue) + self._streams

    def submit(self, asked: Asked) -> "Future[str]":
        """Put a request into the queue.

        Raises:
            Busy: It is full, or the server is going down.
        """
        future: Future[str] = Future()
        with self._change:
            if self._closed or self.queued >= self.waiting:
                raise Busy(self.queued)
            self._queue.append((asked, future))
            self._change.notify()
        return future

    def stream(self, asked: Asked) -> Iterator[str]:
        """Answer a request piece by piece, when its turn comes; closing the iterator ends it.

        Raises:
            Busy: The queue is full, or the server is going down.
        """
        with self._change:
            if self._closed or self.queued >= self.waiting:
                raise Busy(self.queued)
            self._streams += 1
        return self._pieces(asked)

    def _pieces(self, asked: Asked) -> Iterator[str]:
        stop = threading.Event()
        try:
            with self._turn:
                yield from self.model.stream(
                    asked.request,
                    max_new_tokens=asked.max_tokens,
                    temperature=asked.temperature,
                    top_p=asked.top_p,
                    seed=asked.seed,
                    stop=stop,
                )
        finally:
            stop.set()
            with self._change:
                self._streams -= 1

    def _work(self) -> None:
        while True:
            with self._change:
                while not self._queue and not self._closed:
                    self._change.wait()
                if not self._queue:
                    return
            if len(self._queue) < self.batch_size:
                time.sleep(self.pause)
            with self._turn:
                self._answer(self._take())

    def _take(self) -> list[tuple[Asked, "Future[str]"]]:
        """The first request, and those that ask alike."""
        with self._change:
            first = self._queue[0][0]
            alike = [row for row in self._queue if _settings(row[0]) == _settings(first)][: self.batch_size]
            for row in alike:
                self._queue.remove(row)
        return alike

    def _answer(self, rows: list[tuple[Asked, "Future[str]"]]) -> None:
        first = rows[0][0]
        try:
            texts = self.model.generate(
                [asked.request for asked, _ in rows], first.max_tokens, len(rows), first.temperature, first.top_p, first.seed
            )
        except BaseException as error:  # one bad request must not fail the others: each is asked alone
            if len(rows) == 1:
                rows[0][1].set_exception(error)
                return
            for row in rows:
                self._answer([row])
            return
        self.batches, self.rows = self.batches + 1, self.rows + len(rows)
        for (_, future), text in zip(rows, texts, strict=True):
            future.set_result(text)

    def close(self) -> None:
        """Take nothing more, and answer what was accepted."""
        with self._change:
            self._closed = True
            self._change.notify_all()
        self._thread.join()


def _settings(asked: Asked) -> tuple[Any, ...]:
    """What all requests of a batch have in common; sampled ones are answered alone, since their seeds belong to them."""
    alone = id(asked) if asked.temperature else 0
    return asked.max_tokens, asked.temperature, asked.top_p, asked.seed, alone
