"""What all models that answer share: batches that shrink when memory runs out, sampling, streams.

answers, size = answer_in_batches(order, 8, answer)      # answer(rows, position) gives the rows' answers, or runs out of memory
for piece in streamed(model, inputs, settings, tokenizer, stop_ids): print(piece, end="")
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from threading import Event, Thread
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from mmkit.errors import ConfigError


def answer_in_batches(
    order: Sequence[int],
    batch_size: int,
    answer: Callable[[list[int], int], list[str]],
    name: str,
    on_answer: Callable[[int, str], None] | None = None,
    kind: Callable[[int], Hashable] | None = None,
) -> tuple[list[str], int]:
    """Answer rows batch by batch; a batch that runs out of memory is halved and tried again.

    Args:
        order: Rows in the order they are answered.
        batch_size: Rows at once.
        answer: Gives the answers of some rows; it is also told how many rows were answered before.
        name: Of the model, for the message.
        on_answer: Called with (row, answer) as soon as each is there.
        kind: Rows of different kinds are never in one batch; None lets all be.

    Returns:
        The answers by row, and the size of the last batch.

    Raises:
        ConfigError: batch_size is none.
        torch.OutOfMemoryError: A single row is too large.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}; at least 1 is right")
    answers, position, last = [""] * len(order), 0, 0
    while position < len(order):
        rows = list(order[position : position + batch_size])
        rows = rows if kind is None else [row for row in rows if kind(row) == kind(rows[0])]
        try:
            found = answer(rows, position)
        except torch.OutOfMemoryError:
            if len(rows) == 1:
                raise
            batch_size = (len(rows) + 1) // 2
            print(f"{name}: out of memory with {len(rows)} rows, goes on with {batch_size}", flush=True)
            continue
        last = len(rows)
        for row, text in zip(rows, found, strict=True):
            answers[row] = text
            if on_answer is not None:
                on_answer(row, text)
        position += len(rows)
    return answers, last


def sampling(max_new_tokens: int, temperature: float, top_p: float) -> dict[str, Any]:
    """Give transformers' words for a temperature; 0 is greedy.

    Raises:
        ConfigError: A number is none.
    """
    if temperature < 0 or not 0 < top_p <= 1 or max_new_tokens < 1:
        raise ConfigError(
            f"temperature {temperature}, top_p {top_p}, max_new_tokens {max_new_tokens}: temperature is 0 (greedy) or more, "
            "top_p in (0, 1], max_new_tokens at least 1"
        )
    return {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0} if temperature else {"do_sample": False}


def streamed(
    model: Any,
    inputs: dict[str, Tensor],
    settings: GenerationConfig,
    tokenizer: Any,
    stop_ids: Sequence[int],
    seed: int | None = None,
    stop: Event | None = None,
    skip_prompt: bool = True,
) -> Iterator[str]:
    """Generate in a thread of its own and give the pieces of the answer as they come; see `ChatModel.stream`.

    Args:
        model: Anything with transformers' `generate`.
        inputs: Of one row.
        settings: Of the generation.
        tokenizer: Of the answer.
        stop_ids: Tokens that end it.
        seed: Of the sampling.
        stop: Set it, from any thread, to end early.
        skip_prompt: The first thing that `generate` sends is no answer: input ids, or what a decoder begins with.
    """
    closed = Event()  # this stream's own: the caller's event may belong to several
    streamer = _AnswerStreamer(tokenizer, stop_ids, skip_prompt)
    failure: list[BaseException] = []

    def work() -> None:
        try:
            with seeded(seed, settings.do_sample):
                criteria = StoppingCriteriaList([_StopWhenSet(closed, *([stop] if stop else []))])
                model.generate(**inputs, generation_config=settings, streamer=streamer, stopping_criteria=criteria)
        except BaseException as error:  # goes to the caller, below: a thread's own error would be lost
            failure.append(error)
            streamer.end()

    thread = Thread(target=work, daemon=True)
    thread.start()
    try:
        yield from _trimmed(streamer)
    finally:
        closed.set()
        thread.join()
    if failure:
        raise failure[0]


def best_device() -> torch.device:
    """The accelerator if there is one, else the CPU."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


@contextmanager
def seeded(seed: int | None, sampling: bool) -> Iterator[None]:
    """Seed torch for one generation, and leave the caller's generators as they were."""
    if seed is None or not sampling:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


class _StopWhenSet(StoppingCriteria):
    def __init__(self, *events: Event) -> None:
        self.events = events

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), any(event.is_set() for event in self.events), dtype=torch.bool, device=input_ids.device)


class _AnswerStreamer(TextIteratorStreamer):
    """Pieces of text without prompt and without the token that ends the answer (which may be a newline)."""

    def __init__(self, tokenizer: Any, stop_ids: Sequence[int], skip_prompt: bool = True) -> None:
        super().__init__(tokenizer, skip_prompt=skip_prompt, skip_special_tokens=True)
        self.stop_ids = set(stop_ids)

    def put(self, value: Tensor) -> None:
        if not value.numel():  # what `generate` sends for a prompt of embeddings
            return
        if not (self.skip_prompt and self.next_tokens_are_prompt) and int(value.flatten()[-1]) in self.stop_ids:
            return
        super().put(value)


def _trimmed(pieces: Iterator[str]) -> Iterator[str]:
    """The pieces without the blanks around the whole."""
    blank, begun = "", False
    for piece in pieces:
        text = blank + piece if begun else piece.lstrip()
        kept = text.rstrip()
        blank = text[len(kept) :]
        if kept:
            begun = True
            yield kept
