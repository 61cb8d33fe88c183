"""What the demo's page looks like: style sheet and HTML of the answers. Every word of a user or a model is escaped here."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

from PIL.Image import Image, Resampling

from apps.chat_session import Answer, Round

THUMBNAIL = 320  # pixels; sharp at the 112 CSS pixels it is shown at, on phones too

CSS = """
:root { --mm-ink: #1c2330; --mm-soft: #5b6577; --mm-line: #dfe3ea; --mm-card: #ffffff; --mm-page: #f5f6f9; --mm-accent: #4f46e5;
        --mm-good: #1d7a4c; --mm-warn: #9a5b00; --mm-bad: #b3261e; --mm-bad-bg: #fdecea; --mm-bubble: #e6e8ff; }
.dark { --mm-ink: #e8ebf2; --mm-soft: #a3adbf; --mm-line: #343b49; --mm-card: #1d222c; --mm-page: #14171d; --mm-accent: #a5b4fc;
        --mm-good: #6fd3a0; --mm-warn: #f0b860; --mm-bad: #ff9d94; --mm-bad-bg: #3b1f1d; --mm-bubble: #2d2f55; }
#mm-head h1 { font-size: 26px; font-weight: 680; letter-spacing: -0.02em; margin: 0; color: var(--mm-ink); }
#mm-head p { margin: 4px 0 0; color: var(--mm-soft); font-size: 15px; line-height: 1.5; }
.mm-models { display: flex; flex-wrap: wrap; gap: 8px; margin-top: 12px; }
.mm-model { border: 1px solid var(--mm-line); background: var(--mm-card); border-radius: 10px; padding: 7px 12px; font-size: 13px;
        color: var(--mm-soft); max-width: 100%; overflow-wrap: anywhere; }
.mm-model b { color: var(--mm-ink); font-size: 14px; margin-right: 6px; }
.mm-rounds { display: flex; flex-direction: column; gap: 22px; color: var(--mm-ink); }
.mm-empty { border: 1.5px dashed var(--mm-line); border-radius: 14px; padding: 42px 20px; text-align: center; color: var(--mm-soft);
        font-size: 15px; line-height: 1.6; }
.mm-empty b { color: var(--mm-ink); display: block; font-size: 17px; margin-bottom: 4px; }
.mm-ask { display: flex; justify-content: flex-end; align-items: flex-end; gap: 10px; margin-bottom: 10px; }
.mm-ask p { background: var(--mm-bubble); border-radius: 14px 14px 4px 14px; padding: 10px 14px; margin: 0; font-size: 15.5px; line-height: 1.45;
        max-width: 75%; overflow-wrap: anywhere; white-space: pre-wrap; }
.mm-ask img { width: 112px; height: 112px; object-fit: cover; border-radius: 12px; border: 1px solid var(--mm-line); margin: 0; }
.mm-answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(190px, 100%), 1fr)); gap: 12px; }
.mm-answer { background: var(--mm-card); border: 1px solid var(--mm-line); border-radius: 14px; padding: 13px 15px 11px; min-height: 112px;
        display: flex; flex-direction: column; gap: 8px; min-width: 0; box-shadow: 0 1px 2px rgb(20 30 60 / 5%); }
.mm-answer.mm-failed { border-color: var(--mm-bad); background: var(--mm-bad-bg); }
.mm-answer header { display: flex; justify-content: space-between; align-items: baseline; gap: 8px; font-size: 13px; }
.mm-answer header b { font-size: 14px; overflow-wrap: anywhere; }
.mm-answer .mm-text { flex: 1; margin: 0; font-size: 17px; line-height: 1.5; white-space: pre-wrap; overflow-wrap: anywhere; }
.mm-answer .mm-none { color: var(--mm-soft); font-size: 15px; }
.mm-answer footer { color: var(--mm-soft); font-size: 12.5px; font-variant-numeric: tabular-nums; }
.mm-state { white-space: nowrap; color: var(--mm-soft); }
.mm-writing .mm-state { color: var(--mm-accent); } .mm-done .mm-state { color: var(--mm-good); }
.mm-stopped .mm-state { color: var(--mm-warn); } .mm-failed .mm-state { color: var(--mm-bad); }
.mm-writing .mm-text::after { content: ""; display: inline-block; width: 8px; height: 1.05em; margin-left: 3px; vertical-align: text-bottom;
        background: var(--mm-accent); border-radius: 2px; animation: mm-blink 1s steps(2) infinite; }
@keyframes mm-blink { to { opacity: 0; } }
@media (prefers-reduced-motion: reduce) { .mm-writing .mm-text::after { animation: none; } }
.mm-notice { border: 1px solid var(--mm-bad); background: var(--mm-bad-bg); color: var(--mm-ink); border-radius: 12px; padding: 11px 14px;
        font-size: 14.5px; line-height: 1.45; overflow-wrap: anywhere; }
.mm-notice b { color: var(--mm-bad); }
#mm-presets { gap: 8px !important; flex-wrap: wrap !important; }
#mm-presets button { flex: 0 1 auto !important; min-width: 0 !important; width: auto !important; border-radius: 999px !important; font-weight: 450;
        padding: 5px 13px !important; font-size: 13.5px !important; }
#mm-send { align-items: stretch !important; flex-wrap: nowrap !important; }
#mm-send > button { flex: 0 0 auto !important; min-width: 84px !important; }
#mm-send .form, #mm-send .block { min-width: 0 !important; }
#mm-head .html-container, #mm-conversation .html-container, #mm-notice .html-container { padding: 0 !important; }
#mm-examples, #mm-examples .gallery-container, #mm-examples .grid-wrap { height: auto !important; min-height: 0 !important; max-height: none !important; }
#mm-examples .grid-container { grid-template-columns: repeat(4, minmax(0, 1fr)) !important; grid-auto-rows: auto !important; gap: 8px; padding-top: 26px; }
#mm-examples button.thumbnail-item { border-radius: 10px; overflow: hidden; width: 100%; height: auto; aspect-ratio: 1; min-width: 0; }
#mm-clear { align-self: flex-start; width: auto !important; flex: 0 0 auto; min-width: 0 !important; }
@media (max-width: 700px) {
  #mm-send { flex-wrap: wrap !important; }
  #mm-send > :first-child { flex: 1 1 100% !important; }
  #mm-send > button { flex: 1 1 0 !important; }
  #mm-head h1 { font-size: 22px; } .mm-ask p { max-width: 100%; } .mm-ask img { width: 84px; height: 84px; }
  .row > .column { min-width: 0 !important; flex: 1 1 100% !important; }
  #mm-examples .grid-container { grid-template-columns: repeat(6, minmax(0, 1fr)) !important; gap: 6px; }
  .mm-empty { padding: 22px 14px; }
}
"""

# gradio confines `CSS` to what stands inside its page's <main>; the frame around that is styled from the document's head.
HEAD = """<style>
.gradio-container { background: #f5f6f9 !important; max-width: 1240px !important; margin: 0 auto !important; }
.dark .gradio-container { background: #14171d !important; }
.gradio-container .main.app { padding: 0 !important; }
.gradio-container main.contain { padding: 32px 28px 28px !important; }
.gradio-container footer:not(.mm-times) { display: none !important; }
@media (max-width: 700px) { .gradio-container main.contain { padding: 16px 14px 22px !important; } }
</style>"""

STATES = {"waiting": "waiting", "writing": "writing …", "done": "done", "stopped": "stopped", "failed": "failed"}


def head_html(names: Sequence[str], cards: Sequence[Mapping[str, Any]]) -> str:
    """The page's head: what this is, and a chip for each model with what is known of its encoder."""
    chips = "".join(
        f'<span class="mm-model"><b>{html.escape(name)}</b>{html.escape(card_line(card))}</span>'
        for name, card in zip(names, cards, strict=True)
    )
    several = "Ask about an image; every model answers side by side." if len(names) > 1 else "Ask about an image."
    return f'<h1>mmkit</h1><p>{several} Nothing leaves this machine.</p><div class="mm-models">{chips}</div>'


def card_line(card: Mapping[str, Any]) -> str:
    """An encoder's card in a line: origin, architecture, size; whatever of it is known."""
    parts = [str(card[key]) for key in ("origin", "architecture") if card.get(key)]
    parameters = card.get("parameters")
    if isinstance(parameters, int | float) and parameters:
        parts.append(f"{parameters / 1e6:,.1f} M parameters")
    return " · ".join(dict.fromkeys(parts))


def rounds_html(rounds: Sequence[Round], thumbnails: dict[int, tuple[Image, str]] | None = None) -> str:
    """The conversation: for each round the question with its image, and the answers side by side.

    Args:
        rounds: Oldest first.
        thumbnails: A memory of encoded images by id (the image is kept with it, so that its id stays its own):
            streaming would encode one anew twenty times a second.
    """
    if not rounds:
        return (
            '<div class="mm-empty"><b>No question yet</b>Choose or paste an image, then ask, or tap one of the suggested questions.</div>'
        )
    thumbnails = {} if thumbnails is None else thumbnails
    drawn, image_before = [], None
    for entry in rounds:
        # The image is shown where it changes; a follow-up question about the same one is text alone.
        picture = (
            f'<img alt="the image asked about" src="{_thumbnail(entry.image, thumbnails)}">'
            if entry.image is not None and entry.image is not image_before
            else ""
        )
        image_before = entry.image
        question = f'<div class="mm-ask"><p>{html.escape(entry.question)}</p>{picture}</div>'
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
    """Time to the first token and to the end, as far as known."""
    parts = []
    if answer.first_token is not None:
        parts.append(f"first token {duration(answer.first_token)}")
    if answer.finished and answer.seconds is not None:
        parts.append(f"in all {duration(answer.seconds)}")
    return " · ".join(parts) or "&nbsp;"


def duration(seconds: float) -> str:
    """Milliseconds below a second, else seconds."""
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def notice_html(message: str) -> str:
    """Something went wrong before any model was asked."""
    return f'<div class="mm-notice" role="alert"><b>That did not work.</b> {html.escape(message)}</div>'


def _thumbnail(image: Image, memory: dict[int, tuple[Image, str]]) -> str:
    """The image as a small JPEG in a data URL, remembered."""
    if id(image) not in memory:
        small = image.convert("RGB")
        small.thumbnail((THUMBNAIL, THUMBNAIL), Resampling.LANCZOS)
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=88)
        memory[id(image)] = image, "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
    return memory[id(image)][1]
