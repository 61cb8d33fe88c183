"""What the demo's tabs share: the models, the chosen images, and a conversation per open browser page."""

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from apps.chat_session import ChatSession, Limits, ModelShelf
from mmkit.errors import DataError
from mmkit.images import open_image

IMAGE_TYPES = [".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp"]
QUIET: Mapping[str, Any] = {"queue": False, "show_progress": "hidden", "api_name": False}  # of handlers that answer at once
# Streams are told apart by session, models by their lock, so the queue may run several at once.
STREAMED: Mapping[str, Any] = {"show_progress": "hidden", "concurrency_limit": 8, "concurrency_id": "ask", "api_name": False}
# Hands a text to the browser as a file: nothing is written on the server.
DOWNLOAD = """(file) => { if (!file) return; const cut = file.indexOf("\\n"), name = file.slice(0, cut), text = file.slice(cut + 1);
  const link = document.createElement("a"); link.href = URL.createObjectURL(new Blob([text], {type: "text/plain"})); link.download = name;
  document.body.appendChild(link); link.click(); link.remove(); setTimeout(() => URL.revokeObjectURL(link.href), 10000); }"""


class Desk:
    """A shelf of models, and what each open page has on its desk."""

    def __init__(self, shelf: ModelShelf, examples: Sequence[Image.Image] = ()) -> None:
        self.shelf = shelf
        self.examples = list(examples)
        self.sessions: dict[str, ChatSession] = {}
        self.thumbnails: dict[str, dict[int, tuple[Image.Image, str]]] = {}
        self.editing: set[str] = set()
        self.leavers: list[Callable[[gr.Request], None]] = []  # told when a page is closed
        self._images: dict[str, dict[str, Image.Image]] = {}
        self._lock = threading.Lock()

    def session(self, request: gr.Request) -> ChatSession:
        """The session of the page that asks; made when it first does."""
        with self._lock:
            return self.sessions.setdefault(str(request.session_hash), ChatSession(self.shelf))

    def memory(self, request: gr.Request) -> dict[int, tuple[Image.Image, str]]:
        """The page's encoded thumbnails."""
        return self.thumbnails.setdefault(str(request.session_hash), {})

    def images(self, path: str | None, more: Sequence[Any] | None, request: gr.Request) -> list[Image.Image]:
        """Decode the chosen images, the first one first; a file is decoded once, as long as it is chosen.

        Raises:
            DataError: One is no image, or of a type that is not taken; its name is said.
        """
        paths = [*([path] if path else []), *(str(row[0]) for row in more or [])]
        before, chosen = self._images.get(str(request.session_hash), {}), {}
        for place in paths:
            name = Path(place).name
            if Path(place).suffix.lower() not in IMAGE_TYPES:
                raise DataError(f"{name}: images of these types are taken: {', '.join(IMAGE_TYPES)}")
            chosen[place] = before[place] if place in before else open_image(place, where=f"the uploaded file {name}")
        self._images[str(request.session_hash)] = chosen
        return [chosen[place] for place in paths]

    def example(self, event: gr.SelectData) -> Image.Image:
        """The example that was tapped, for the image picker."""
        return self.examples[int(event.index)]

    def forget(self, request: gr.Request) -> None:
        """A page was closed: stop what it asked for and drop what it holds."""
        key = str(request.session_hash)
        if key in self.sessions:
            self.sessions.pop(key).stop()
        self._images.pop(key, None)
        self.thumbnails.pop(key, None)
        self.editing.discard(key)
        for leave in self.leavers:
            leave(request)


def settings() -> list[gr.components.Component]:
    """The components that say how the models may answer, for `limits_of`."""
    with gr.Accordion("Settings", open=False, elem_id="mm-settings"):
        return [
            gr.Slider(1, 512, 64, step=1, label="Longest answer (tokens)"),
            gr.Slider(0, 1.5, 0, step=0.1, label="Temperature", info="0 always takes the likeliest token"),
            gr.Slider(0.05, 1, 1, step=0.05, label="Top-p", info="tokens are drawn from the likeliest that make up this share"),
            gr.Number(0, precision=0, label="Seed", info="the same seed draws the same tokens"),
            gr.Checkbox(True, label="All models at once", info="off: one after the other, so that their times do not disturb each other"),
            gr.Checkbox(True, label="Remember earlier questions about the image"),
        ]


def limits_of(tokens: float, temperature: float, top_p: float, seed: float | None, together: bool, remember: bool) -> Limits:
    """What the settings say."""
    return Limits(int(tokens), float(temperature), float(top_p), int(seed or 0), bool(together), bool(remember))
