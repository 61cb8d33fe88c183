"""A conversation or comparison as one file: JSON that loads back, and HTML that shows itself and carries the same JSON.

    document = to_document(session.rounds, names, cards)
    Path("chat.html").write_text(to_html(document))
    rounds = read_document("chat.html")     # or chat.json

Images are kept as lossless PNG. The page has no script, and its policy lets it load nothing.
"""

from __future__ import annotations

import base64
import binascii
import html
import io
import json
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from PIL.Image import Image

from apps import demo_page, demo_style
from apps.chat_session import FINISHED, MAX_IMAGES, Answer, Round
from mmkit.errors import DataError
from mmkit.images import open_image

FORMAT, VERSION = "mmkit-conversation", 1
MAX_BYTES = 64 * 2**20  # of a file that is loaded
PNG = "data:image/png;base64,"
_CARRIED = re.compile(r'<script type="application/json" id="mmkit-conversation">(.*?)</script>', re.DOTALL)


def to_document(rounds: Sequence[Round], names: Sequence[str], cards: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A conversation as plain values.

    Args:
        rounds: Oldest first.
        names: Of the models.
        cards: What is known of each model's encoder.
    """
    places: dict[int, int] = {}
    images: list[str] = []
    for entry in rounds:
        for image in entry.images:
            if id(image) not in places:
                places[id(image)] = len(images)
                images.append(_encoded(image))
    return {
        "format": FORMAT,
        "version": VERSION,
        "mmkit": version("mmkit"),
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "models": [{"name": name, "encoder": dict(card)} for name, card in zip(names, cards, strict=True)],
        "images": images,
        "rounds": [
            {
                "question": entry.question,
                "images": [places[id(image)] for image in entry.images],
                "attempt": entry.attempt,
                "answers": [
                    {
                        "model": answer.model,
                        "text": answer.text,
                        "state": answer.state if answer.finished else "stopped",
                        "error": answer.error,
                        "first_token": answer.first_token,
                        "seconds": answer.seconds,
                        "tokens": answer.tokens,
                    }
                    for answer in entry.answers
                ],
            }
            for entry in rounds
        ],
    }


def to_html(document: Mapping[str, Any]) -> str:
    """The document as a page that needs nothing else."""
    models = document["models"]
    head = demo_page.head_html([model["name"] for model in models], [model["encoder"] for model in models], shared=str(document["at"]))
    body = demo_page.rounds_html(rounds_of(document, "the conversation"), size=demo_page.LARGE)
    carried = json.dumps(document, ensure_ascii=False).replace("<", "\\u003c")  # no word of it can end the element
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{html.escape(policy)}"><title>mmkit conversation</title>'
        f"<style>{demo_style.CSS}{demo_style.SHARED_CSS}</style></head><body><main>"
        f'<div id="mm-head">{head}</div><div id="mm-conversation">{body}</div></main>'
        f'<script type="application/json" id="{FORMAT}">{carried}</script></body></html>\n'
    )


def read_document(path: Path | str) -> list[Round]:
    """Load a conversation that was saved as JSON or as HTML.

    Raises:
        DataError: The file is too large, or no such conversation; what is wrong and where is said.
    """
    path = Path(path)
    if path.stat().st_size > MAX_BYTES:
        raise DataError(f"{path.name} has {path.stat().st_size / 2**20:.0f} MB; at most {MAX_BYTES // 2**20} MB are loaded")
    try:
        text = path.read_text(encoding="utf-8")
        carried = _CARRIED.search(text)
        content = json.loads(carried.group(1) if carried else text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path.name} holds no conversation: neither JSON, nor a page that was saved here") from error
    return rounds_of(content, path.name)


def rounds_of(content: Any, where: str) -> list[Round]:
    """The rounds of a document.

    Raises:
        DataError: It is not of this form; the place is named.
    """
    if not isinstance(content, Mapping) or content.get("format") != FORMAT:
        raise DataError(f"{where} is no conversation of mmkit: `format` should be {FORMAT}")
    if content.get("version") != VERSION:
        raise DataError(f"{where} is of version {content.get('version')!r}; this mmkit reads version {VERSION}")
    try:
        images = [_decoded(image, f"{where}: image {number}") for number, image in enumerate(content["images"])]
        return [_round(row, images, f"{where}: round {number + 1}") for number, row in enumerate(content["rounds"])]
    except (KeyError, TypeError, ValueError, IndexError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{where} is broken: {type(error).__name__}: {error}") from error


def _round(row: Mapping[str, Any], images: Sequence[Image], where: str) -> Round:
    places, answers = [int(place) for place in row["images"]], []
    if len(places) > MAX_IMAGES or any(not 0 <= place < len(images) for place in places):
        raise DataError(f"{where} names images {places} of {len(images)}")
    for answer in row["answers"]:
        if answer["state"] not in FINISHED:
            raise DataError(f"{where}: an answer's state is {answer['state']!r}; {', '.join(FINISHED)} are known")
        times = [None if answer[key] is None else float(answer[key]) for key in ("first_token", "seconds")]
        tokens = None if answer["tokens"] is None else int(answer["tokens"])
        answers.append(
            Answer(str(answer["model"]), str(answer["text"]), answer["state"], times[0], times[1], tokens, error=str(answer["error"]))
        )
    return Round(str(row["question"]), tuple(images[place] for place in places), answers, int(row["attempt"]))


def _encoded(image: Image) -> str:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG")
    return PNG + base64.b64encode(buffer.getvalue()).decode()


def _decoded(text: Any, where: str) -> Image:
    if not isinstance(text, str) or not text.startswith(PNG):
        raise DataError(f"{where} is no PNG in a data URL")
    try:
        content = base64.b64decode(text.removeprefix(PNG), validate=True)
    except binascii.Error as error:
        raise DataError(f"{where} is no base64") from error
    return open_image(content, where)
