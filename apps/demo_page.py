"""The HTML of the demo's page: models, questions, answers. Every word of a user or a model is escaped here."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from PIL.Image import Image, Resampling

from apps.chat_session import Answer, Round

THUMBNAIL = 320  # pixels; sharp at the 112 CSS pixels it is shown at, on phones too
LARGE = 640  # in a saved conversation

STATES = {"waiting": "waiting", "writing": "writing …", "done": "done", "stopped": "stopped", "failed": "failed"}


def head_html(
    names: Sequence[str], cards: Sequence[Mapping[str, Any]], scores: Sequence[Mapping[str, str]] | None = None, shared: str = ""
) -> str:
    """The page's head: what this is, and for each model what is known of its encoder, in a line and unfolded.

    Args:
        names: Of the models.
        cards: Of their encoders.
        scores: Of their evaluations, where they are at hand: benchmark -> score as it is to be read.
        shared: When the conversation was saved, for a page of its own.
    """
    chips = "".join(
        f'<details class="mm-model"><summary><b>{html.escape(name)}</b>{html.escape(card_line(card))}</summary>{_card_list(card, found)}</details>'
        for name, card, found in zip(names, cards, scores or [{}] * len(names), strict=True)
    )
    several = "Ask about an image; every model answers side by side." if len(names) > 1 else "Ask about an image."
    about = f"A conversation of {html.escape(shared)}." if shared else f"{several} Nothing leaves this machine."
    return f'<h1>mmkit</h1><p>{about}</p><div class="mm-models">{chips}</div>'


def _card_list(card: Mapping[str, Any], scores: Mapping[str, str]) -> str:
    """All that is known of an encoder: plain values, then scores."""
    rows = {key.replace("_", " "): value for key, value in card.items() if isinstance(value, str | int | float) and value != ""}
    listed = {**rows, **scores} or {"encoder": "nothing is known of it"}
    return "<dl>" + "".join(f"<dt>{html.escape(key)}</dt><dd>{html.escape(str(value))}</dd>" for key, value in listed.items()) + "</dl>"


def card_line(card: Mapping[str, Any]) -> str:
    """An encoder's card in a line: origin, architecture, size; whatever of it is known."""
    parts = [str(card[key]) for key in ("origin", "architecture") if card.get(key)]
    parameters = card.get("parameters")
    if isinstance(parameters, int | float) and parameters:
        parts.append(f"{parameters / 1e6:,.1f} M parameters")
    return " · ".join(dict.fromkeys(parts))


def rounds_html(rounds: Sequence[Round], thumbnails: dict[int, tuple[Image, str]] | None = None, size: int = THUMBNAIL) -> str:
    """The conversation: for each round the question with its images, and the answers side by side.

    Args:
        rounds: Oldest first.
        thumbnails: A memory of encoded images by id (the image is kept with it, so that its id stays its own):
            streaming would encode one anew twenty times a second.
        size: Of the longer side of an image, pixels.
    """
    if not rounds:
        return (
            '<div class="mm-empty"><b>No question yet</b>Choose or paste an image, then ask, or tap one of the suggested questions.</div>'
        )
    thumbnails = {} if thumbnails is None else thumbnails
    drawn = []
    for entry, before in zip(rounds, [None, *rounds], strict=False):
        # Images are shown where they change; a follow-up question about the same ones is text alone.
        fresh = entry.images if before is None or before.digests != entry.digests else ()
        shown = "".join(f'<img alt="the image asked about" src="{_thumbnail(image, thumbnails, size)}">' for image in fresh)
        attempt = f'<span class="mm-attempt">asked {entry.attempt + 1} times</span>' if entry.attempt else ""
        pictures = f'<div class="mm-shown">{shown}</div>' if shown else ""
        question = f'<div class="mm-ask"><p>{html.escape(entry.question)}{attempt}</p>{pictures}</div>'
        answers = "".join(answer_html(answer) for answer in entry.answers)
        drawn.append(f'<section class="mm-round">{question}<div class="mm-answers">{answers}</div></section>')
    return f'<div class="mm-rounds" aria-live="polite">{"".join(drawn)}</div>'


def answer_html(answer: Answer) -> str:
    """One model's answer as a card: name, state, text or error, times."""
    if answer.state == "failed":
        body = f'<p class="mm-text">{html.escape(answer.text)}</p>' if answer.text else ""
        body += f'<p class="mm-text mm-error" role="alert">{html.escape(answer.error)}</p>'
    elif answer.text.strip() or not answer.finished:
        body = f'<p class="mm-text">{html.escape(answer.text.strip())}</p>'
    else:
        body = '<p class="mm-text mm-none">(no words)</p>'
    return (
        f'<article class="mm-answer mm-{answer.state}"><header><b>{html.escape(answer.model)}</b>'
        f'<span class="mm-state">{STATES[answer.state]}</span></header>{body}<footer class="mm-times">{times(answer)}</footer></article>'
    )


def times(answer: Answer) -> str:
    """Time to the first token and to the end, and the speed between, as far as known."""
    parts = []
    if answer.first_token is not None:
        parts.append(f"first token {duration(answer.first_token)}")
    if answer.finished and answer.seconds is not None:
        parts.append(f"in all {duration(answer.seconds)}")
    if answer.rate is not None:
        parts.append(f"{answer.rate:.3g} tokens/s")
    return " · ".join(parts) or "&nbsp;"


def duration(seconds: float) -> str:
    """Milliseconds below a second, else seconds."""
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def notice_html(message: str) -> str:
    """Something went wrong before any model was asked."""
    return f'<div class="mm-notice" role="alert"><b>That did not work.</b> {html.escape(message)}</div>'


def info_html(message: str) -> str:
    """Something to know."""
    return f'<div class="mm-info" role="status">{html.escape(message)}</div>'


def table_html(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """A table of plain words; the columns in `numbers` are set to the right."""

    def cells(row: Sequence[str], tag: str) -> str:
        return "".join(
            f"<{tag}{' class=mm-number' if column in numbers else ''}>{html.escape(cell)}</{tag}>" for column, cell in enumerate(row)
        )

    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return (
        f'<div class="mm-table"><table><caption>{html.escape(caption)}</caption><thead><tr>{cells(head, "th")}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def data_url(image: Image, size: int, kind: Literal["JPEG", "PNG"] = "JPEG") -> str:
    """An image as a data URL, its longer side at most `size` pixels."""
    small = image.convert("RGB")
    small.thumbnail((size, size), Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, kind, **({"quality": 88} if kind == "JPEG" else {}))
    return f"data:image/{kind.lower()};base64," + base64.b64encode(buffer.getvalue()).decode()


def _thumbnail(image: Image, memory: dict[int, tuple[Image, str]], size: int) -> str:
    """The image as a small JPEG in a data URL, remembered."""
    if id(image) not in memory:
        memory[id(image)] = image, data_url(image, size)
    return memory[id(image)][1]
