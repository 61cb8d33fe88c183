"""Ctrl-C and SIGTERM as a wish: a training that is asked to stop finishes its step and saves."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def stop_signals(ask: Callable[[int], None]) -> Iterator[None]:
    """Call `ask` with the first SIGINT or SIGTERM inside the block; a second one, two seconds later or more, ends the program at once.

    Outside the main thread, where Python has no signals, the block runs as it is.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    first: float | None = None

    def handle(number: int, _: Any) -> None:
        nonlocal first
        if first is None:
            first = time.monotonic()
            ask(number)
        elif time.monotonic() - first > 2:  # launchers repeat the terminal's Ctrl-C at once
            raise KeyboardInterrupt

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
