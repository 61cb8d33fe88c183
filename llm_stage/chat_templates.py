"""Chat templates: turns -> pieces, each of which knows what it is and whether it is supervised.

A piece is a mark (one special token), words (in which nothing is special) or the place of an image. Those of LLaVA are written
here; any other is the tokenizer's own, rendered around stand-ins for the turns' texts.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from mmkit.errors import ConfigError, DataError

IMAGE_MARK = "<image>"

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Turn:
    """One turn. In a chat with images, each `<image>` in a user turn is the place of one image; without images it is only text."""

    role: Role
    text: str


@dataclass(frozen=True)
class Piece:
    """A stretch of a rendered chat: a mark (one special token, by its text), words, or the place of an image."""

    kind: Literal["mark", "words", "image"]
    text: str = ""
    supervised: bool = False


def mark(text: str, supervised: bool = False) -> Piece:
    """One special token."""
    return Piece("mark", text, supervised)


def words(text: str, supervised: bool = False) -> Piece:
    """Plain text, in which nothing is special."""
    return Piece("words", text, supervised)


IMAGE = Piece("image", IMAGE_MARK)


def place_image(text: str) -> str:
    """Put the image of a one-image turn first, on a line of its own; several images stay where they are.

    Source: preprocess_multimodal of LLaVA: marks deleted, text stripped, one mark and a newline in front.
    """
    if text.count(IMAGE_MARK) != 1:
        return text
    rest = text.replace(IMAGE_MARK, "").strip()
    return f"{IMAGE_MARK}\n{rest}" if rest else IMAGE_MARK


def user_pieces(text: str, with_images: bool) -> list[Piece]:
    """A user's text as words and images; without images everything is words."""
    if not with_images:
        return [words(text)]
    pieces: list[Piece] = []
    for index, part in enumerate(place_image(text).split(IMAGE_MARK)):
        pieces += [IMAGE] if index else []
        pieces += [words(part)] if part else []
    return pieces


def origin(tokenizer: Any) -> str:
    """Where a tokenizer came from, for messages."""
    return str(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)


# -- templates: (turns, answer pieces, prompt?) -> pieces ------------------------------------------------------------------------------

Render = Callable[[list[Turn], str, bool, str], list[Piece]]
"""(turns without system, system prompt, with images, end token) -> pieces; a final user turn ends in the answer's header."""


def _vicuna(turns: list[Turn], system: str, with_images: bool, eos: str) -> list[Piece]:
    pieces = [words(f"{system} ")] if system else []
    for turn in turns:
        if turn.role == "user":
            pieces += [words("USER: "), *user_pieces(turn.text, with_images), words(" ASSISTANT:")]
        else:
            pieces += [words(f" {turn.text}" if turn.text else "", True), mark(eos, True)]
    return pieces


def _llama_2(turns: list[Turn], system: str, with_images: bool, eos: str) -> list[Piece]:
    # Meta and LLaVA write <s> before every round; here there is one BOS, in front (law 8), as for every other template.
    pieces: list[Piece] = []
    for index, turn in enumerate(turns):
        if turn.role == "user":
            head = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system and index == 0 else ""
            pieces += [words(f"[INST] {head}"), *user_pieces(turn.text, with_images), words(" [/INST]")]
        else:
            pieces += [words(f" {turn.text} " if turn.text else "", True), mark(eos, True)]
    return pieces


def _chatml(turns: list[Turn], system: str, with_images: bool, eos: str) -> list[Piece]:
    start, end = "<|im_start|>", "<|im_end|>"
    pieces = [mark(start), words(f"system\n{system}"), mark(end)] if system else []
    for turn in turns:
        if turn.role == "user":
            pieces += [mark(start), words("user\n"), *user_pieces(turn.text, with_images), mark(end), mark(start), words("assistant\n")]
        else:
            pieces += [words(turn.text, True), mark(end, True)]
    return pieces


def _llama_3(turns: list[Turn], system: str, with_images: bool, eos: str) -> list[Piece]:
    def header(role: str) -> list[Piece]:
        return [mark("<|start_header_id|>"), words(role), mark("<|end_header_id|>"), words("\n\n")]

    end = "<|eot_id|>"
    pieces = [*header("system"), words(system), mark(end)] if system else []
    for turn in turns:
        if turn.role == "user":
            pieces += [*header("user"), *user_pieces(turn.text, with_images), mark(end), *header("assistant")]
        else:
            pieces += [words(turn.text, True), mark(end, True)]
    return pieces


def _plain(turns: list[Turn], system: str, with_images: bool, eos: str) -> list[Piece]:
    n_images = turns[0].text.count(IMAGE_MARK) if with_images else 0
    if not n_images or len(turns) > 2:
        raise DataError(
            f"template 'plain' is image, then caption: it takes two turns with {IMAGE_MARK} in the first, given {len(turns)} turn(s) "
            f"with {n_images} image(s) in the first. Take another template (vicuna_v1, llama_2, llama_3, chatml, own) for conversations"
        )
    pieces = [IMAGE] * n_images  # the instruction's words are thrown away, as in LLaVA
    return pieces + [words(f"{turn.text}\n", True) for turn in turns[1:]]


@dataclass(frozen=True)
class Template:
    """How one family of chat models writes a chat.

    Attributes:
        render: Makes the pieces.
        system: The system prompt used unless one is given.
        marks: Special tokens that the tokenizer must have, besides its own end token.
        end: The token that ends an answer; None is the tokenizer's end token, "\\n" (plain) is a text.
    """

    render: Render
    system: str = ""
    marks: tuple[str, ...] = ()
    end: str | None = None


_HELPFUL = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)
TEMPLATES: dict[str, Template] = {
    "plain": Template(_plain, end="\n"),
    "vicuna_v1": Template(
        _vicuna,
        system="A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    ),
    "llama_2": Template(_llama_2, system=_HELPFUL),
    "llama_3": Template(_llama_3, system=_HELPFUL, marks=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), end="<|eot_id|>"),
    "chatml": Template(_chatml, system="Answer the questions.", marks=("<|im_start|>", "<|im_end|>"), end="<|im_end|>"),
}
"""The templates of LLaVA (its system prompts: haotian-liu/LLaVA, llava/conversation.py, Apache-2.0). "own" is the tokenizer's own."""


# -- the tokenizer's own template ------------------------------------------------------------------------------------------------------

_OPEN, _CLOSE = "\ue0b0", "\ue0b1"  # private use: stand-ins for the turns' texts, unlikely in any template


class OwnTemplate:
    """The tokenizer's chat template as pieces: rendered around stand-ins, so that no text of a turn is ever taken for markup.

    Raises:
        ValueError: The tokenizer has no chat template, or the template fails on a plain chat.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not tokenizer.chat_template:
            raise ConfigError(
                f"the tokenizer {origin(tokenizer)} has no chat template of its own: "
                f"take one of {', '.join(TEMPLATES)} (--template vicuna_v1)"
            )
        self._tokenizer = tokenizer
        self._jinja = tokenizer.get_chat_template()
        self._marked = re.search(r"{%-?\s*generation\s*-?%}", self._jinja) is not None
        vocabulary = tokenizer.get_vocab()
        specials = {token for token in tokenizer.all_special_tokens if token in vocabulary}
        self._specials = re.compile("|".join(map(re.escape, sorted(specials, key=len, reverse=True))) or r"(?!)")
        self._strips = " x " not in self._rendered([{"role": "user", "content": " x "}], False)[0]

    def as_template(self) -> Template:
        """This template with the end token it uses."""
        pieces = self([Turn("user", "a"), Turn("assistant", "b")], "", False, self._tokenizer.eos_token)
        ends = [piece.text for piece in pieces if piece.supervised and piece.kind == "mark"]
        return Template(self, system="", end=ends[0] if ends else None)

    def __call__(self, turns: list[Turn], system: str, with_images: bool, eos: str) -> list[Piece]:
        """Pieces of the chat; see `Render`."""
        spoken = [Turn("system", system), *turns] if system else turns
        messages = [{"role": turn.role, "content": f"{_OPEN}{index}{_CLOSE}"} for index, turn in enumerate(spoken)]
        text, spans = self._rendered(messages, spoken[-1].role == "user")
        pieces: list[Piece] = []
        position = 0
        for match in re.finditer(f"{_OPEN}(\\d+){_CLOSE}", text):
            turn = spoken[int(match[1])]
            pieces += self._markup(text, position, match.start(), spans)
            content = turn.text.strip() if self._strips else turn.text
            if turn.role == "assistant":
                pieces += [words(self._take_blank(pieces) + content, True)]
            else:
                pieces += user_pieces(content, with_images and turn.role == "user")
            position = match.end()
        pieces += self._markup(text, position, len(text), spans)
        if spoken[-1].role == "user":
            self._take_blank(pieces)
        return pieces if self._marked else _with_ends(pieces)

    def _rendered(self, messages: list[dict[str, str]], prompt: bool) -> tuple[str, list[tuple[int, int]]]:
        try:
            rendered: Any = render_jinja_template(
                conversations=[messages],
                chat_template=self._jinja,
                return_assistant_tokens_mask=self._marked,
                add_generation_prompt=prompt,
                **self._tokenizer.special_tokens_map,
            )
        except TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise ConfigError(f"the chat template of {origin(self._tokenizer)} refuses a chat of the roles {roles}: {error}") from error
        texts, spans = rendered
        return str(texts[0]), [(int(start), int(end)) for start, end in spans[0]] if self._marked and spans else []

    def _markup(self, text: str, start: int, end: int, spans: list[tuple[int, int]]) -> list[Piece]:
        """The template's own text between two turns, cut at special tokens and at the edges of generation marks."""
        edges = sorted({start, end, *(edge for span in spans for edge in span if start < edge < end)})
        pieces: list[Piece] = []
        for left, right in pairwise(edges):
            supervised = any(a <= left and right <= b for a, b in spans)
            position = left
            for match in self._specials.finditer(text, left, right):
                pieces += [words(text[position : match.start()], supervised), mark(match[0], supervised)]
                position = match.end()
            pieces.append(words(text[position:right], supervised))
        return [piece for piece in pieces if piece.text]

    @staticmethod
    def _take_blank(pieces: list[Piece]) -> str:
        """A blank before an answer belongs to the answer: tokenizers join it to the first word, and a prompt must end without it."""
        if pieces and pieces[-1].kind == "words" and pieces[-1].text.endswith(" "):
            pieces[-1] = replace(pieces[-1], text=pieces[-1].text[:-1])
            return " "
        return ""


def _with_ends(pieces: list[Piece]) -> list[Piece]:
    """Supervise, after each answer, everything up to and with the first special token (for templates without generation marks)."""
    marked: list[Piece] = []
    open_answer = False
    for piece in pieces:
        if open_answer and not piece.supervised:
            open_answer = piece.kind == "words"
            piece = replace(piece, supervised=piece.kind != "image")
        elif piece.supervised:
            open_answer = True
        marked.append(piece)
    return marked
