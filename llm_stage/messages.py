"""The two ways to write a conversation with images: LLaVA's JSON, and Hugging Face's messages.

    {"id": "7", "image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]}

    {"id": "7", "images": ["a.jpg"], "messages": [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "\\nWhat is it?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}]}

`to_messages` and `to_llava` turn one into the other and back, other keys kept. What only one of them can say (a system turn; the letters
`<image>` in the words of a question about an image) is refused, not changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llm_stage.chat_templates import IMAGE_MARK
from mmkit.errors import DataError

SPEAKERS = {"human": "user", "gpt": "assistant"}
NAMES = {role: speaker for speaker, role in SPEAKERS.items()}


def to_messages(row: Mapping[str, Any]) -> dict[str, Any]:
    """Turn a LLaVA row into messages of typed parts with a list of images.

    Args:
        row: A row that `conversations.parse_row` takes.

    Raises:
        DataError: A turn is from somebody else than human and gpt.
    """
    given = row.get("image")
    images = [given] if isinstance(given, str) else list(given or [])
    messages = []
    for turn in row["conversations"]:
        if turn.get("from") not in SPEAKERS:
            raise DataError(f"a turn is from {turn.get('from')!r}: only 'human' and 'gpt' speak in LLaVA's JSON")
        rest = {key: value for key, value in turn.items() if key not in ("from", "value")}
        marked = bool(images) and turn["from"] == "human"
        messages.append({"role": SPEAKERS[turn["from"]], "content": _parts(turn["value"], marked), **rest})
    rest = {key: value for key, value in row.items() if key not in ("image", "conversations")}
    return {**rest, **({"images": images} if images else {}), "messages": messages}


def _parts(text: str, marked: bool) -> list[dict[str, str]]:
    """A text as typed parts; where it is marked, each `<image>` is one."""
    parts: list[dict[str, str]] = []
    for index, words in enumerate(text.split(IMAGE_MARK) if marked else [text]):
        parts += [{"type": "image"}] if index else []
        parts += [{"type": "text", "text": words}] if words else []
    return parts or [{"type": "text", "text": ""}]


def to_llava(row: Mapping[str, Any], where: str = "the row") -> dict[str, Any]:
    """Turn messages into a LLaVA row; the inverse of `to_messages` (a list of one image comes back as the image).

    Args:
        row: {"messages": [...], "images": [...]}; contents are strings with `<image>` marks, or typed parts.
        where: Stands in front of every message.

    Raises:
        DataError: There is a system turn, or anything is not as it should be.
    """
    system, llava = without_system(row, where)
    if system is not None:
        raise DataError(f"{where}: LLaVA's JSON has no place for its system turn: keep the row as it is (it is read too), or take it out")
    return llava


def without_system(row: Mapping[str, Any], where: str) -> tuple[str | None, dict[str, Any]]:
    """Split messages into the system prompt, if there is one, and the rest as a LLaVA row.

    Raises:
        DataError: Anything is not as it should be.
    """
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        raise DataError(f'{where} has no list of messages: give [{{"role": "user" or "assistant", "content": text or parts}}, ...]')
    system: str | None = None
    turns: list[dict[str, Any]] = []
    names: list[str | None] = []
    for index, message in enumerate(messages):
        place = f"{where}, message {index}"
        if not isinstance(message, Mapping) or not isinstance(message.get("content"), str | list):
            raise DataError(f'{place} is not {{"role": "user" or "assistant" or (first) "system", "content": text or parts}}')
        rest = {key: value for key, value in message.items() if key not in ("role", "content")}
        text, found = _text(message["content"], place)
        if message.get("role") == "system" and index == 0 and not found:
            system = text
            continue
        if message.get("role") not in NAMES:
            raise DataError(f"{place} is of role {message.get('role')!r}: user and assistant speak, and system before them, without images")
        if found and message["role"] == "assistant":
            raise DataError(f"{place}: an image in an answer; images belong to user messages")
        names += found
        turns.append({"from": NAMES[message["role"]], "value": text, **rest})
    images = _images(row, names, where)
    if images:
        _no_letters(messages, where)
    rest = {key: value for key, value in row.items() if key not in ("messages", "images", "image")}
    image = {"image": images[0] if len(images) == 1 else images} if images else {}
    return system, {**rest, **image, "conversations": turns}


def _text(content: str | list[Any], where: str) -> tuple[str, list[str | None]]:
    """A content as text with marks, and for each typed image its name, None where it has none."""
    if isinstance(content, str):
        return content, []
    text, names = "", []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            text += part["text"]
        elif kind == "image":
            text += IMAGE_MARK
            names.append(_name(next((part[key] for key in ("image", "path", "url") if part.get(key) is not None), None), where))
        else:
            raise DataError(f'{where}: a part is {{"type": "text", "text": ...}} or {{"type": "image"}}; this one is of type {kind!r}')
    return text, names


def _name(given: Any, where: str) -> str | None:
    """The path of an image as written: a string, `file://...`, or the "path" of an object."""
    name = given.get("path") if isinstance(given, Mapping) else given
    if given is not None and (not isinstance(name, str) or not name):
        raise DataError(
            f"{where}: an image is a path relative to the image folder; pictures inside the row are not read: write them to files"
        )
    if isinstance(name, str) and name.startswith(("http://", "https://", "data:")):
        raise DataError(f"{where}: image {name[:60]!r} is not a file: fetch it, and give its path relative to the image folder")
    return name.removeprefix("file://") if isinstance(name, str) else None


def _images(row: Mapping[str, Any], named: list[str | None], where: str) -> list[str]:
    """The row's images: its own list, or the names in the typed parts."""
    given = row.get("images", row.get("image"))
    listed = [name for name in (_name(item, where) for item in ([given] if isinstance(given, str | Mapping) else given or [])) if name]
    inside = [name for name in named if name]
    if inside and (len(inside) != len(named) or (listed and listed != inside)):
        raise DataError(f"{where}: its image parts name {inside}, its list of images is {listed}: name all of them in one place")
    if named and not (inside or listed):
        raise DataError(f"{where}: {len(named)} image part(s), and no image is named: list them under 'images', in their order")
    return inside or listed


def _no_letters(messages: list[Any], where: str) -> None:
    """Refuse `<image>` in the words of a user's typed part: it would become a place of an image."""
    for message in messages:
        parts = message["content"] if message["role"] == "user" and isinstance(message["content"], list) else []
        if any(IMAGE_MARK in part.get("text", "") for part in parts if part["type"] == "text"):
            raise DataError(f"{where}: {IMAGE_MARK} stands in the words of a message with typed parts: write the image as a part")
