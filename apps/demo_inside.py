"""The demo's look inside: what encoders attend to, where a typed phrase is found, and where a LLaVA looked while it answered."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from functools import lru_cache
from html import escape
from typing import Any

import gradio as gr
from PIL import Image
from torch import Tensor

from apps import demo_page
from apps.chat_session import Round, user_turn
from apps.demo_desk import QUIET, Desk
from encoders.map_pictures import tile
from encoders.maps import attention_figures, attention_maps, text_maps
from encoders.modeling import VisionEncoder
from encoders.text import TextTower, load_text_tower
from llm_stage.answer_attention import AnswerAttention, answer_attention
from llm_stage.blip2_chat import Blip2Chat
from llm_stage.generate import ChatModel, ChatRequest
from llm_stage.llava import tower_geometry
from mmkit.errors import ConfigError, DataError, MMKitError

TILE = 288  # pixels
LAST, MEAN, NONE, ALL = "last", "mean", "none", "all tokens"


class Inside:
    """The tab's handlers."""

    def __init__(self, desk: Desk, encoders: Sequence[tuple[str, Any]]) -> None:
        self.desk = desk
        self.encoders: dict[str, tuple[VisionEncoder, Any]] = {}  # with the lock of the model it belongs to
        for name, model, lock in zip(desk.shelf.names, desk.shelf.models, desk.shelf.locks, strict=True):
            if (own := encoder_of(model)) is not None:
                self.encoders[name] = own, lock
        self.encoders |= {name: (encoder, nullcontext()) for name, encoder in encoders}
        self.answerers = [name for name, model in zip(desk.shelf.names, desk.shelf.models, strict=True) if isinstance(model, ChatModel)]

    def encoder_maps(
        self, request: gr.Request, path: str | None, more: Any, one: str, other: str, layer: str, head: str, phrase: str
    ) -> str:
        """Attention, and the phrase's place, of one or two encoders, as HTML."""

        def draw() -> Iterable[str]:
            images = self.desk.images(path, more, request)
            if not images:
                raise DataError("there is no image: choose one on the left")
            for name in dict.fromkeys(name for name in (one, other) if name in self.encoders):
                yield from self._one_encoder(name, images[0], layer, head, (phrase or "").strip())

        return drawn(draw)

    def _one_encoder(self, name: str, image: Image.Image, layer: str, head: str, phrase: str) -> Iterable[str]:
        encoder, lock = self.encoders[name]
        seen = encoder.spec.fit(image)
        pixels = encoder.spec.normalise(seen).unsqueeze(0).to(encoder.device, encoder.dtype)
        depth = len(encoder.network.blocks)
        with lock:
            maps = attention_maps(encoder, pixels, [depth if layer == LAST else int(layer)])
            shares = list(maps.values())[-1][0].cpu()  # [A, h, w]
            found = [one.float().cpu() for one in text_maps(encoder, pixels, _phrase_features(encoder, phrase))] if phrase else None
        chosen, said = chosen_head(shares, head)
        figures = {key: float(value) for key, value in attention_figures(chosen).items()}
        where = f"{list(maps)[-1]} of {depth}, {said}; entropy {figures['entropy']:.2f}, distance {figures['distance']:.1f} patches"
        yield figure(name, f"attention, {where}", tile(seen, chosen, TILE, 0.0, float(chosen.max())), float(chosen.max()), "%")
        if found is not None:
            values, whole = found[0][0, 0], float(found[1][0, 0])
            low, high = float(values.min()), float(values.max())
            picture = tile(seen, values, TILE, low, high)
            yield figure(name, f"“{phrase}”: cosine {low:.2f} to {high:.2f}, whole image {whole:.2f}", picture)

    def answer_maps(self, request: gr.Request, name: str, token: str, layer: str, head: str) -> tuple[str, Any]:
        """Where a model looked while it wrote its last answer in the chat: (HTML, the choice of tokens)."""
        tokens: list[str] = []

        def draw() -> Iterable[str]:
            current, answer = self._last_answer(request, name)
            place = self.desk.shelf.names.index(name)
            model: Any = self.desk.shelf.models[place]
            request_ = ChatRequest([user_turn(current.question, len(current.images))], list(current.images))
            with self.desk.shelf.locks[place]:
                seen = answer_attention(model, request_, answer)
            tokens.extend(f"{number + 1}: {text.strip() or '␣'}" for number, text in enumerate(seen.tokens))
            yield from _token_figures(model, current.images, seen, token if token in tokens else ALL, layer, head, name)

        html = drawn(draw)
        return html, gr.update(choices=[ALL, *tokens], value=token if token in tokens else ALL)

    def _last_answer(self, request: gr.Request, name: str) -> tuple[Round, str]:
        rounds = self.desk.session(request).rounds
        answers = {answer.model: answer for answer in rounds[-1].answers} if rounds else {}
        if name not in answers or not answers[name].text.strip() or not answers[name].finished:
            raise DataError("there is no answer to look at: ask in the chat first")
        return rounds[-1], answers[name].text


def _token_figures(
    model: ChatModel, images: Sequence[Image.Image], seen: AnswerAttention, token: str, layer: str, head: str, name: str
) -> Iterable[str]:
    """A map for each image: of one token or the mean over all, of one layer or the mean, of one head or the mean."""
    depth = seen.shares.shape[1]
    if layer not in (LAST, MEAN) and not 1 <= int(layer) <= depth:
        raise ConfigError(f"layer {layer} was asked for; the LLM of '{name}' has layers 1 to {depth}")
    of_tokens = seen.shares.mean(dim=0) if token == ALL else seen.shares[int(token.split(":")[0]) - 1]  # [L, A, I, h, w]
    of_layer = of_tokens.mean(dim=0) if layer == MEAN else of_tokens[(depth if layer == LAST else int(layer)) - 1]  # [A, I, h, w]
    spec = tower_geometry(model.model.model.vision_tower, None).spec
    for number, image in enumerate(images):
        chosen, said = chosen_head(of_layer[:, number], head)
        words = (
            f"{token}, {f'layer {layer}' if layer != LAST else 'last layer'}, {said}; {float(chosen.sum()):.1%} of its attention is here"
        )
        yield figure(name, words, tile(spec.fit(image), chosen, TILE, 0.0, float(chosen.max())), float(chosen.max()), "%")


def chosen_head(shares: Tensor, head: str) -> tuple[Tensor, str]:
    """One head's map of [A, h, w], or their mean, and its name.

    Raises:
        ConfigError: There is no such head.
    """
    if head == MEAN:
        return shares.mean(dim=0), f"mean of {len(shares)} heads"
    if not 1 <= int(head) <= len(shares):
        raise ConfigError(f"head {head} was asked for; there are heads 1 to {len(shares)}")
    return shares[int(head) - 1], f"head {head} of {len(shares)}"


def encoder_of(model: Any) -> VisionEncoder | None:
    """The vision encoder of a loaded model, where it is one of mmkit's that can be looked into."""
    encoder = (
        model.model.model.vision_tower if isinstance(model, ChatModel) else model.parts.encoder if isinstance(model, Blip2Chat) else None
    )
    return encoder if isinstance(encoder, VisionEncoder) else None


def _phrase_features(encoder: VisionEncoder, phrase: str) -> Tensor:
    """The phrase in the encoder's joint space [1, E].

    Raises:
        ConfigError: The encoder names no text tower.
    """
    if not encoder.config.text_tower or encoder.joint_width is None:
        raise ConfigError(f"'{encoder.config.origin}' has no joint space with texts: leave the phrase empty")
    return _text_tower(encoder.config.text_tower).encode([phrase])


@lru_cache(maxsize=4)
def _text_tower(name: str) -> TextTower:
    return load_text_tower(name)


def drawn(draw: Callable[[], Iterable[str]]) -> str:
    """All figures beside each other, or why there are none."""
    try:
        return f'<div class="mm-maps">{"".join(draw())}</div>'
    except (MMKitError, ValueError, OSError) as error:
        return demo_page.notice_html(str(error))


def figure(name: str, words: str, picture: Image.Image, top: float | None = None, unit: str = "") -> str:
    """A map with its caption and, where it begins at nought, its scale."""
    scale = "" if top is None else f'<br>0<span class="mm-scale"></span>{100 * top:.3g} {unit}'
    alt = escape(f"{name}: {words}", quote=True)
    source = demo_page.data_url(picture, TILE, "PNG")
    return f'<figure><img alt="{alt}" src="{source}"><figcaption><b>{escape(name)}</b>{escape(words)}{scale}</figcaption></figure>'


def build_inside(desk: Desk, encoders: Sequence[tuple[str, Any]], picker: gr.Image, more: gr.Gallery) -> None:
    """Put the tab together, inside the blocks that are open."""
    inside = Inside(desk, encoders)
    names = list(inside.encoders)
    if names:
        depth = max(len(encoder.network.blocks) for encoder, _ in inside.encoders.values())
        heads = max(getattr(getattr(encoder.network.blocks[0], "attn", None), "num_heads", 1) for encoder, _ in inside.encoders.values())
        with gr.Row():
            one = gr.Dropdown(names, value=names[0], label="Encoder", elem_id="mm-encoder")
            other = gr.Dropdown([NONE, *names], value=names[1] if len(names) > 1 else NONE, label="Beside it", elem_id="mm-encoder-2")
            layer = gr.Dropdown([LAST, *map(str, range(1, depth + 1))], value=LAST, label="Layer", elem_id="mm-layer")
            head = gr.Dropdown([MEAN, *map(str, range(1, heads + 1))], value=MEAN, label="Head", elem_id="mm-head-choice")
        phrase = gr.Textbox(label="Phrase to look for (optional)", placeholder="a red bus", lines=1, elem_id="mm-phrase")
        show = gr.Button("Show what the encoders look at", variant="primary", elem_id="mm-show")
        maps = gr.HTML("", elem_id="mm-maps")
        gr.on([show.click, phrase.submit], inside.encoder_maps, [picker, more, one, other, layer, head, phrase], maps, **QUIET)
    else:
        gr.HTML(
            demo_page.info_html("None of these models has an encoder that can be looked into; name some: `mmkit demo --encoder FOLDER`.")
        )
    if inside.answerers:
        _build_answers(inside)


def _build_answers(inside: Inside) -> None:
    models: list[Any] = [inside.desk.shelf.models[inside.desk.shelf.names.index(name)] for name in inside.answerers]
    sizes = [model.model.config.text_config for model in models]
    with gr.Row():
        model = gr.Dropdown(inside.answerers, value=inside.answerers[0], label="Last answer of", elem_id="mm-answerer")
        token = gr.Dropdown([ALL], value=ALL, label="Token", elem_id="mm-token")
        layers = [LAST, MEAN, *(str(number + 1) for number in range(max(size.num_hidden_layers for size in sizes)))]
        layer = gr.Dropdown(layers, value=MEAN, label="Layer of the LLM", elem_id="mm-llm-layer")
        heads = [MEAN, *(str(number + 1) for number in range(max(size.num_attention_heads for size in sizes)))]
        head = gr.Dropdown(heads, value=MEAN, label="Head", elem_id="mm-llm-head")
    show = gr.Button("Show where it looked while answering", variant="primary", elem_id="mm-show-answer")
    maps = gr.HTML("", elem_id="mm-answer-maps")
    gr.on([show.click, token.input, layer.input, head.input], inside.answer_maps, [model, token, layer, head], [maps, token], **QUIET)
