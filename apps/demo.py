"""The demo: choose images, ask, and read the answers of one to four models side by side, as they are written.

    mmkit demo                                            the models of runs/quickstart; without any, the one in this package
    mmkit demo --model runs/a/model --model runs/b/model  these

Further tabs: vote without knowing who answered, look at what encoders and answers attend to, browse the questions of a run.

One process, bound to loopback. The page asks nothing of any other host: system fonts, no analytics, no sharing, no remote scripts.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # gradio reads it when it is imported

import gradio as gr
from PIL import Image

from apps import demo_page, demo_style
from apps.chat_session import Answerer, ModelShelf
from apps.demo_browse import build_browse
from apps.demo_chat import build_chat
from apps.demo_desk import QUIET, Desk
from apps.demo_desk import settings as demo_settings
from apps.demo_inside import build_inside
from apps.demo_vote import build_vote
from apps.quickstart_plan import SCENE_DRAWINGS
from apps.serve import LOOPBACK
from apps.votes import Votes
from encoders.catalog import load_encoder
from mmkit.config import cli_entry, load_config
from mmkit.errors import ConfigError, DataError
from mmkit.images import open_image

MAX_UPLOAD = "20mb"
MAX_WAITING = 16  # questions waiting in the queue; the next one is told that the demo is busy
QUICKSTART = Path("runs/quickstart/llava")
RUNS, VOTES = "runs", "runs/votes.sqlite"
PHOTOGRAPHS = ("cheetah1.jpg", "lion.jpg", "tower.jpg")
PASSWORD, USER = "MMKIT_DEMO_PASSWORD", "mmkit"


@dataclass
class DemoConfig:
    """Settings of `mmkit demo`."""

    model: list[str] = field(
        default_factory=list,
        metadata={
            "help": "folders, or names of `mmkit list models`, 1 to 4: --model A --model B, or --model A,B; none: those of runs/quickstart, or mini-chat"
        },
    )
    host: str = field(
        default="127.0.0.1", metadata={"help": f"address to listen on; one that is no loopback takes a password in {PASSWORD}"}
    )
    port: int = field(default=7860, metadata={"help": "port; 0 takes a free one"})
    examples: int = field(
        default=12, metadata={"help": "example images drawn from the embedded world, and a few photographs beside them; 0: none"}
    )
    open_browser: bool = field(default=False, metadata={"help": "open the page in the default browser"})
    encoder: list[str] = field(
        default_factory=list,
        metadata={"help": "encoders to look inside beside the models' own: folders, or names of `mmkit list encoders`"},
    )
    runs: str = field(default=RUNS, metadata={"help": "folder whose run folders may be browsed"})
    votes: str = field(default=VOTES, metadata={"help": "file of the blind votes; several demos may share it"})

    def validate(self) -> None:
        """Check the number of models, and that nothing is opened to others without a password.

        Raises:
            ConfigError: More than four models, or an address that is no loopback and no password.
        """
        if self.host not in LOOPBACK and not os.environ.get(PASSWORD):
            raise ConfigError(
                f"--host {self.host} opens the page to others: set a password in the environment first ({PASSWORD}; user {USER})"
            )
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


def build_page(
    shelf: ModelShelf,
    examples: Sequence[Image.Image] = (),
    *,
    votes: Votes | None = None,
    encoders: Sequence[tuple[str, Any]] = (),
    runs: Path | str = RUNS,
    scores: Sequence[dict[str, str]] | None = None,
) -> gr.Blocks:
    """Put the page together: images on the left, the tabs on the right (below, on a phone).

    Args:
        shelf: The models.
        examples: Images to choose from.
        votes: Where blind votes go; None is `VOTES`.
        encoders: Encoders to look inside beside those of the models, with their names.
        runs: Folder whose run folders may be browsed.
        scores: Of each model's encoder, for its card.
    """
    desk, cards = Desk(shelf, examples), [model.encoder_card() for model in shelf.models]
    with gr.Blocks(title="mmkit demo", analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
        gr.HTML(demo_page.head_html(shelf.names, cards, scores), elem_id="mm-head")
        with gr.Row(equal_height=False):
            with gr.Column(scale=4, min_width=280):
                picker, more = _images(desk)
                settings = demo_settings()
            with gr.Column(scale=7, min_width=300), gr.Tabs(elem_id="mm-tabs") as tabs:
                with gr.Tab("Chat", id="chat"):
                    chat = build_chat(desk, cards, picker, more, settings)
                with gr.Tab("Blind vote", id="vote") as tab:
                    build_vote(desk, votes or Votes(VOTES), picker, more, settings, tab)
                with gr.Tab("Look inside", id="inside"):
                    build_inside(desk, encoders, picker, more)
                with gr.Tab("Browse a run", id="browse") as tab:
                    build_browse(Path(runs), picker, chat, tabs, tab)
        blocks.unload(desk.forget)
    return blocks


def _images(desk: Desk) -> tuple[gr.Image, gr.Gallery]:
    """The image picker, a place for further images, and the examples."""
    picker = SafeImage(
        type="filepath", sources=["upload", "clipboard", "webcam"], label="Image", height=270, buttons=[], format="png", elem_id="mm-image"
    )
    with gr.Accordion("More images", open=False, elem_id="mm-more"):
        more = gr.Gallery(
            label="Further images, after the first", columns=4, height=180, type="filepath", file_types=["image"], format="png", buttons=[],
            interactive=True, elem_id="mm-more-images",
        )  # fmt: skip
    if desk.examples:
        gallery = gr.Gallery(
            desk.examples, label="Or one of these", columns=4, height="auto", allow_preview=False, object_fit="cover", buttons=[],
            interactive=False, format="png", elem_id="mm-examples",
        )  # fmt: skip
        gallery.select(desk.example, None, picker, **QUIET)
    return picker, more


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
        body_text_color_subdued="*neutral_600",  # gradio's own grey is too faint to read on its fields
        body_text_color_subdued_dark="*neutral_300",
        input_placeholder_color="*neutral_600",
        input_placeholder_color_dark="*neutral_300",
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
    password = os.environ.get(PASSWORD)
    _, url, _ = blocks.launch(
        server_name=host, server_port=port or None, share=False, inbrowser=open_browser, quiet=True, prevent_thread_lock=True, show_error=True,
        auth=(USER, password) if password else None, max_file_size=MAX_UPLOAD, enable_monitoring=False, ssr_mode=False, pwa=False,
        mcp_server=False, theme=theme(), css=demo_style.CSS, head=demo_style.HEAD, footer_links=[],
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


def photographs() -> list[Image.Image]:
    """The photographs that gradio brings for its own examples, where this version has them."""
    folder = Path(gr.__file__).parent / "media_assets" / "images"
    return [open_image(folder / name) for name in PHOTOGRAPHS if (folder / name).is_file()]


def scores_of(folder: str) -> dict[str, str]:
    """What the evaluations beside a model say of its encoder: benchmark -> score. A run keeps them in eval/ENCODER, next to llava/ENCODER."""
    from mmkit.report_data import read_runs

    place = Path(folder).resolve()
    place = place.parent if place.name == "model" else place
    root = next((above / "eval" / place.name for above in place.parents[:3] if (above / "eval" / place.name).is_dir()), None)
    if root is None or not any(root.rglob("summary.json")):
        return {}
    scores: dict[str, str] = {}
    try:
        evaluations = read_runs([root]).evaluations
    except DataError as error:  # the demo is of the model; its evaluations are an ornament
        print(f"no scores for {folder}: {error}", flush=True)
        return {}
    for found in evaluations:
        metric = found.metrics[found.main]
        low, high = metric["ci95"]
        scores[found.benchmark.replace("_", " ")] = f"{metric['value']:.1f} % [{low:.1f}, {high:.1f}]"
    return scores


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

    config = load_config(DemoConfig, join_repeated(join_repeated(list(sys.argv[1:] if argv is None else argv), "--model"), "--encoder"))
    folders = config.model or quickstart_models()
    shelf = load_models(folders)
    extra = [(name, load_encoder(name).eval()) for name in config.encoder]
    scores = [scores_of(folder) for folder in folders]
    examples = [*example_images(config.examples), *photographs()] if config.examples else []
    votes = Votes(config.votes)
    page = build_page(shelf, examples, votes=votes, encoders=extra, runs=config.runs, scores=scores)
    try:
        launch(page, config.host, config.port, open_browser=config.open_browser, block=True)
    finally:
        votes.close()
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
