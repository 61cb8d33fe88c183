"""The demo: choose an image, ask, and read the answers of one to four models side by side, as they are written.

    mmkit demo                                            the models of runs/quickstart; without any, the one in this package
    mmkit demo --model runs/a/model --model runs/b/model  these

One process, bound to loopback. The page asks nothing of any other host: system fonts, no analytics, no sharing, no remote scripts.
"""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # gradio reads it when it is imported

import gradio as gr
from PIL import Image

from apps import demo_page
from apps.chat_session import Answerer, ChatSession, Limits, ModelShelf
from apps.quickstart_plan import SCENE_DRAWINGS
from mmkit.config import cli_entry, load_config
from mmkit.errors import ConfigError, DataError, MMKitError
from mmkit.images import open_image

IMAGE_TYPES = [".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp"]
MAX_UPLOAD = "20mb"
MAX_WAITING = 16  # questions waiting in the queue; the next one is told that the demo is busy
QUICKSTART = Path("runs/quickstart/llava")
# Worded as in the embedded world, whose questions the small models learned; real chat models understand them as well.
PRESETS = [
    "what is in the picture?",
    "how many objects are there?",
    "what color is the background?",
    "what word is written?",
    "describe the picture.",
]


@dataclass
class DemoConfig:
    """Settings of `mmkit demo`."""

    model: list[str] = field(
        default_factory=list,
        metadata={
            "help": "folders, or names of `mmkit list models`, 1 to 4: --model A --model B, or --model A,B; none: those of runs/quickstart, or mini-chat"
        },
    )
    host: str = field(default="127.0.0.1", metadata={"help": "address to listen on; loopback keeps the demo to this machine"})
    port: int = field(default=7860, metadata={"help": "port; 0 takes a free one"})
    examples: int = field(default=12, metadata={"help": "example images drawn from the embedded world; 0: none"})
    open_browser: bool = field(default=False, metadata={"help": "open the page in the default browser"})

    def validate(self) -> None:
        """Check the number of models.

        Raises:
            ConfigError: More than four.
        """
        if len(self.model) > 4:
            raise ConfigError(f"--model names {len(self.model)} models; the page holds up to four side by side")


class SafeImage(gr.Image):
    """gradio's image picker, handing on the uploaded file's path unread: `open_image` reads it, and its error names the file."""

    def get_block_name(self) -> str:
        """The browser's half is the stock image component."""
        return "image"

    def preprocess(self, payload: Any) -> str | None:
        """The path of the uploaded file in gradio's own folder (gradio has checked that it lies there)."""
        return None if payload is None else payload.path


class Page:
    """The handlers behind the page: a `ChatSession` per open browser page, and HTML made of its rounds."""

    def __init__(self, shelf: ModelShelf, examples: Sequence[Image.Image]) -> None:
        self.shelf = shelf
        self.examples = list(examples)
        self.sessions: dict[str, ChatSession] = {}
        self.images: dict[str, tuple[str, Image.Image]] = {}
        self.thumbnails: dict[str, dict[int, tuple[Image.Image, str]]] = {}
        self._lock = threading.Lock()

    def session(self, request: gr.Request) -> ChatSession:
        """The session of the page that asks; made when it first does."""
        with self._lock:
            return self.sessions.setdefault(str(request.session_hash), ChatSession(self.shelf))

    def ask(
        self, path: str | None, question: str, tokens: float, temperature: float, together: bool, remember: bool, request: gr.Request
    ) -> Iterator[Any]:
        """Answer a question with every model; yields (conversation, notice, question box, ask button, stop button)."""
        session, memory = self.session(request), self.thumbnails.setdefault(str(request.session_hash), {})
        busy = (gr.update(interactive=False), gr.update(interactive=True))
        idle = (gr.update(interactive=True), gr.update(interactive=False))
        limits = Limits(int(tokens), float(temperature), together=bool(together), remember=bool(remember))
        try:
            image = self.image(path, request)
            for number, rounds in enumerate(session.ask(question or "", image, limits)):
                box = "" if number == 0 else gr.skip()
                yield demo_page.rounds_html(rounds, memory), "", box, *busy
            yield gr.skip(), "", gr.skip(), *idle
        except (MMKitError, ValueError, OSError) as error:  # a question or a file that is not right: said on the page, with what to do
            yield demo_page.rounds_html(session.rounds, memory), demo_page.notice_html(str(error)), gr.skip(), *idle

    def image(self, path: str | None, request: gr.Request) -> Image.Image | None:
        """Decode the chosen image; the same file is the same object, so that a follow-up question is known as one."""
        if not path:
            return None
        key = str(request.session_hash)
        if self.images.get(key, ("",))[0] != path:
            name = Path(path).name
            if Path(path).suffix.lower() not in IMAGE_TYPES:
                raise DataError(f"{name}: images of these types are taken: {', '.join(IMAGE_TYPES)}")
            self.images[key] = path, open_image(path, where=f"the uploaded file {name}")
        return self.images[key][1]

    def stop(self, request: gr.Request) -> None:
        """End the answers being written."""
        self.session(request).stop()

    def clear(self, request: gr.Request) -> tuple[str, str]:
        """Start a new conversation."""
        self.session(request).clear()
        self.thumbnails.pop(str(request.session_hash), None)
        return demo_page.rounds_html([]), ""

    def example(self, event: gr.SelectData) -> Image.Image:
        """The example that was tapped, for the image picker."""
        return self.examples[int(event.index)]

    def forget(self, request: gr.Request) -> None:
        """A page was closed: stop what it asked for and drop what it holds."""
        key = str(request.session_hash)
        if key in self.sessions:
            self.sessions.pop(key).stop()
        self.images.pop(key, None)
        self.thumbnails.pop(key, None)


def build_page(shelf: ModelShelf, examples: Sequence[Image.Image] = ()) -> gr.Blocks:
    """Put the page together: image and examples on the left, conversation and question on the right (below, on a phone)."""
    page = Page(shelf, examples)
    with gr.Blocks(title="mmkit demo", analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
        gr.HTML(demo_page.head_html(shelf.names, [model.encoder_card() for model in shelf.models]), elem_id="mm-head")
        with gr.Row(equal_height=False):
            with gr.Column(scale=4, min_width=280):
                picker = SafeImage(
                    type="filepath", sources=["upload", "clipboard"], label="Image", height=270, buttons=[], elem_id="mm-image"
                )
                if page.examples:
                    gallery = gr.Gallery(
                        page.examples, label="Or one of these", columns=4, height="auto", allow_preview=False, object_fit="cover", buttons=[],
                        interactive=False, format="png", elem_id="mm-examples",
                    )  # fmt: skip
                    gallery.select(page.example, None, picker, show_progress="hidden", queue=False)
            with gr.Column(scale=7, min_width=300):
                conversation = gr.HTML(demo_page.rounds_html([]), elem_id="mm-conversation")
                notice = gr.HTML("", elem_id="mm-notice")
                with gr.Row(elem_id="mm-send"):
                    question = gr.Textbox(
                        placeholder="Ask about the image …",
                        show_label=False,
                        label="Question",
                        lines=1,
                        max_lines=4,
                        elem_id="mm-question",
                        scale=1,
                        container=False,
                    )
                    send = gr.Button("Ask", variant="primary", elem_id="mm-ask-button")
                    stop = gr.Button("Stop", variant="stop", interactive=False, elem_id="mm-stop-button")
                with gr.Row(elem_id="mm-presets"):
                    presets = [gr.Button(text, size="sm", variant="secondary") for text in PRESETS]
                clear = gr.Button("New conversation", size="sm", variant="secondary", elem_id="mm-clear")
                with gr.Accordion("Settings", open=False, elem_id="mm-settings"):
                    tokens = gr.Slider(1, 512, 64, step=1, label="Longest answer (tokens)")
                    temperature = gr.Slider(0, 1.5, 0, step=0.1, label="Temperature", info="0 always takes the likeliest token")
                    together = gr.Checkbox(
                        True, label="All models at once", info="off: one after the other, so that their times do not disturb each other"
                    )
                    remember = gr.Checkbox(True, label="Remember earlier questions about the image")
        inputs = [picker, question, tokens, temperature, together, remember]
        outputs = [conversation, notice, question, send, stop]
        _wire(page, inputs, outputs, (send, stop, clear), presets)
        blocks.unload(page.forget)
    return blocks


def _wire(
    page: Page, inputs: list[Any], outputs: list[Any], buttons: tuple[gr.Button, gr.Button, gr.Button], presets: list[gr.Button]
) -> None:
    """Say which button calls what."""
    send, stop, clear = buttons
    question = inputs[1]
    # Streams are told apart by session, models by their lock, so the queue may run several at once.
    options = {"show_progress": "hidden", "concurrency_limit": 8, "concurrency_id": "ask", "api_name": False}
    gr.on([send.click, question.submit], page.ask, inputs, outputs, **options)
    for button in presets:
        ask: Callable[..., Any] = page.ask
        button.click(lambda text=button.value: text, None, question, queue=False, show_progress="hidden").then(
            ask, inputs, outputs, **options
        )
    stop.click(page.stop, None, None, queue=False, show_progress="hidden")
    clear.click(page.clear, None, outputs[:2], queue=False, show_progress="hidden")


def theme() -> gr.themes.Base:
    """gradio's plain theme in the system's own fonts: its default brings font files, other themes ask for them elsewhere."""
    fonts = ["ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Noto Sans", "sans-serif"]
    mono = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"]
    base = gr.themes.Base(primary_hue="indigo", neutral_hue="slate", radius_size="lg", font=fonts, font_mono=mono)
    return base.set(
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        body_background_fill="#f5f6f9",
        body_background_fill_dark="#14171d",
        block_shadow="none",
        button_large_text_weight="600",
    )


def launch(blocks: gr.Blocks, host: str = "127.0.0.1", port: int = 0, *, open_browser: bool = False, block: bool = False) -> str:
    """Serve the page.

    Args:
        blocks: What `build_page` made.
        host: The address to listen on.
        port: The port; 0 takes a free one.
        open_browser: Open the page in the default browser.
        block: Serve until interrupted; otherwise return at once and serve from a thread (`blocks.close()` ends it).

    Returns:
        The page's address.
    """
    blocks.queue(max_size=MAX_WAITING)
    _, url, _ = blocks.launch(
        server_name=host, server_port=port or None, share=False, inbrowser=open_browser, quiet=True, prevent_thread_lock=True, show_error=True,
        max_file_size=MAX_UPLOAD, enable_monitoring=False, ssr_mode=False, pwa=False, mcp_server=False, theme=theme(), css=demo_page.CSS,
        head=demo_page.HEAD, footer_links=[],
    )  # fmt: skip
    if block:
        print(f"the demo is at {url}   (Ctrl-C ends it)", flush=True)
        blocks.block_thread()
    return url


def quickstart_models() -> list[str]:
    """The models that `mmkit quickstart` made here, or, where it has made none, the chat model that comes with the kit.

    Raises:
        ConfigError: There are none; the message says what to run.
    """
    from llm_stage.models import MODELS

    models = sorted(str(path.parent) for path in QUICKSTART.glob("*/config.json"))
    if models:
        return models[:4]
    shipped = [name for name, row in MODELS.items() if row.usable]
    if not shipped:
        raise ConfigError(
            f"no --model was given and {QUICKSTART} holds none. Make them: `mmkit quickstart`; or name yours: `mmkit demo --model FOLDER`"
        )
    print(f"no --model was given and {QUICKSTART} holds none: this is {shipped[0]}, {MODELS[shipped[0]].about}", flush=True)
    return shipped[:1]


def example_images(count: int, seed: int = 7) -> list[Image.Image]:
    """Draw some scenes of the quickstart's world: one to four objects each, now and then a word."""
    import numpy as np

    from mmkit.minidata import world
    from mmkit.minidata.names import evenly, object_names

    images, names = [], evenly(object_names("trained"), SCENE_DRAWINGS)  # what the quickstart's models have met
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        scene = world.sample_scene(rng, names, 1 + number % 4, 1.0 if number % 4 == 1 else 0.0)
        images.append(Image.fromarray(world.render(scene)).resize((288, 288), Image.Resampling.BICUBIC))
    return images


def load_models(folders: Sequence[str]) -> ModelShelf:
    """Load all models before the page opens, so that a folder that does not load is said at once."""
    from llm_stage.chat_models import load_chat

    models: list[Answerer] = []
    for folder in folders:
        print(f"loading {folder} ...", flush=True)
        models.append(load_chat(folder))
    return ModelShelf(models)


def main(argv: Sequence[str] | None = None) -> Path:
    """Serve the demo until it is interrupted; gives the folder of the first model back."""
    import sys

    config = load_config(DemoConfig, join_repeated(list(sys.argv[1:] if argv is None else argv), "--model"))
    folders = config.model or quickstart_models()
    shelf = load_models(folders)
    launch(build_page(shelf, example_images(config.examples)), config.host, config.port, open_browser=config.open_browser, block=True)
    return Path(folders[0])


def join_repeated(argv: Sequence[str], flag: str) -> list[str]:
    """Make `--model A --model B` one list for `load_config`, whose later flags otherwise replace the earlier ones."""
    rest: list[str] = []
    values: list[str] = []
    words = iter(argv)
    for word in words:
        if word == flag:
            values.append(next(words, ""))
        elif word.startswith(flag + "="):
            values.append(word.split("=", 1)[1])
        else:
            rest.append(word)
    return [*rest, f"{flag}={','.join(values)}"] if values else rest


if __name__ == "__main__":
    cli_entry(main)
