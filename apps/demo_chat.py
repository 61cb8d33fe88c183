"""The demo's first tab: ask about the images, every model answers side by side; ask again, edit, save and open."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr

from apps import demo_page, share
from apps.chat_session import Round
from apps.demo_desk import DOWNLOAD, QUIET, STREAMED, Desk, limits_of
from mmkit.errors import MMKitError

BUSY = (gr.update(interactive=False), gr.update(interactive=True))  # the ask and stop buttons, while something is written
IDLE = (gr.update(interactive=True), gr.update(interactive=False))
# Worded as in the embedded world, whose questions the small models learned; real chat models understand them as well.
PRESETS = [
    "what is in the picture?",
    "how many objects are there?",
    "what color is the background?",
    "what word is written?",
    "describe the picture.",
]


class Chat:
    """The tab's handlers: a `ChatSession` per open browser page, and HTML made of its rounds."""

    def __init__(self, desk: Desk, cards: list[dict[str, Any]]) -> None:
        self.desk, self.cards = desk, cards

    def ask(self, request: gr.Request, path: str | None, more: Any, question: str, *settings: Any) -> Iterator[Any]:
        """Answer a question with every model; yields (conversation, notice, question box, ask button, stop button)."""
        key, session = str(request.session_hash), self.desk.session(request)

        def rounds() -> Iterator[list[Round]]:
            images = self.desk.images(path, more, request)
            for shown in session.ask(question or "", images, limits_of(*settings), instead=key in self.desk.editing):
                self.desk.editing.discard(key)
                yield shown

        yield from self._shown(rounds, request, empties_the_box=True)

    def again(self, request: gr.Request, *settings: Any) -> Iterator[Any]:
        """Answer the last question anew; yields as `ask`."""
        yield from self._shown(lambda: self.desk.session(request).again(limits_of(*settings)), request, empties_the_box=False)

    def _shown(self, start: Callable[[], Iterator[list[Round]]], request: gr.Request, empties_the_box: bool) -> Iterator[Any]:
        memory = self.desk.memory(request)
        try:
            for number, rounds in enumerate(start()):
                box = "" if number == 0 and empties_the_box else gr.skip()
                yield demo_page.rounds_html(rounds, memory), "", box, *BUSY
            yield gr.skip(), "", gr.skip(), *IDLE
        except (MMKitError, ValueError, OSError) as error:  # a question or a file that is not right: said on the page, with what to do
            rounds = self.desk.session(request).rounds
            yield demo_page.rounds_html(rounds, memory), demo_page.notice_html(str(error)), gr.skip(), *IDLE

    def edit(self, request: gr.Request) -> tuple[Any, str]:
        """Put the last question back into its box; the next one asked takes its place. Gives (question box, notice)."""
        session = self.desk.session(request)
        if not session.rounds:
            return gr.skip(), demo_page.notice_html("nothing was asked yet: there is no question to change")
        self.desk.editing.add(str(request.session_hash))
        return session.rounds[-1].question, demo_page.info_html("Change the question, then Ask: it takes the place of the last one.")

    def stop(self, request: gr.Request) -> None:
        """End the answers being written."""
        self.desk.session(request).stop()

    def clear(self, request: gr.Request) -> tuple[str, str]:
        """Start a new conversation."""
        self.desk.session(request).clear()
        self.desk.memory(request).clear()
        self.desk.editing.discard(str(request.session_hash))
        return demo_page.rounds_html([]), ""

    def save_page(self, request: gr.Request) -> tuple[str, str]:
        """The conversation as a page for the browser to keep: (file, notice)."""
        return self._saved("html", share.to_html, request)

    def save_json(self, request: gr.Request) -> tuple[str, str]:
        """The conversation as JSON: (file, notice)."""
        return self._saved("json", lambda document: json.dumps(document, ensure_ascii=False, indent=1) + "\n", request)

    def _saved(self, kind: str, write: Callable[[dict[str, Any]], str], request: gr.Request) -> tuple[str, str]:
        rounds = self.desk.session(request).rounds
        if not rounds:
            return "", demo_page.notice_html("nothing was asked yet: there is nothing to save")
        return f"mmkit-conversation.{kind}\n" + write(share.to_document(rounds, self.desk.shelf.names, self.cards)), ""

    def open(self, path: str, request: gr.Request) -> tuple[Any, Any, Any, str]:
        """Show a saved conversation: (conversation, image picker, further images, notice)."""
        try:
            rounds = share.read_document(path)
            self.desk.session(request).load(rounds)
        except (MMKitError, ValueError, OSError) as error:
            return gr.skip(), gr.skip(), gr.skip(), demo_page.notice_html(str(error))
        images = list(rounds[-1].images) if rounds else []
        self.desk.memory(request).clear()
        drawn = demo_page.rounds_html(rounds, self.desk.memory(request))
        return drawn, images[0] if images else None, images[1:] or None, ""


@dataclass
class ChatParts:
    """The components of the tab that others set."""

    question: gr.Textbox
    conversation: gr.HTML


def build_chat(
    desk: Desk, cards: list[dict[str, Any]], picker: gr.Image, more: gr.Gallery, settings: list[gr.components.Component]
) -> ChatParts:
    """Put the tab together, inside the blocks that are open."""
    chat = Chat(desk, cards)
    conversation = gr.HTML(demo_page.rounds_html([]), elem_id="mm-conversation")
    notice = gr.HTML("", elem_id="mm-notice")
    with gr.Row(elem_id="mm-send"):
        question = gr.Textbox(
            placeholder="Ask about the image …", show_label=False, label="Question", lines=1, max_lines=4, elem_id="mm-question", scale=1,
            container=False,
        )  # fmt: skip
        send = gr.Button("Ask", variant="primary", elem_id="mm-ask-button")
        stop = gr.Button("Stop", variant="stop", interactive=False, elem_id="mm-stop-button")
    with gr.Row(elem_id="mm-presets"):
        presets = [gr.Button(text, size="sm", variant="secondary") for text in PRESETS]
    with gr.Row(elem_id="mm-tools"):
        again = gr.Button("Ask again", size="sm", elem_id="mm-again")
        edit = gr.Button("Edit the last question", size="sm", elem_id="mm-edit")
        clear = gr.Button("New conversation", size="sm", elem_id="mm-clear")
        page = gr.Button("Save as a page", size="sm", elem_id="mm-save-page")
        data = gr.Button("Save as JSON", size="sm", elem_id="mm-save-json")
        opened = gr.UploadButton("Open a saved one", size="sm", file_types=[".json", ".html"], type="filepath", elem_id="mm-open")
    file = gr.Textbox(visible="hidden", elem_id="mm-file", label="file")
    inputs, outputs = [picker, more, question, *settings], [conversation, notice, question, send, stop]
    gr.on([send.click, question.submit], chat.ask, inputs, outputs, **STREAMED)
    for button in presets:
        button.click(lambda text=button.value: text, None, question, **QUIET).then(chat.ask, inputs, outputs, **STREAMED)
    again.click(chat.again, list(settings), outputs, **STREAMED)
    edit.click(chat.edit, None, [question, notice], **QUIET)
    stop.click(chat.stop, None, None, **QUIET)
    clear.click(chat.clear, None, outputs[:2], **QUIET)
    for button, save in ((page, chat.save_page), (data, chat.save_json)):
        button.click(save, None, [file, notice], **QUIET).then(None, file, None, js=DOWNLOAD)
    opened.upload(chat.open, opened, [conversation, picker, more, notice], **QUIET)
    return ChatParts(question, conversation)
