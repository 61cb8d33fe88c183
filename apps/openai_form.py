"""OpenAI's chat completions, read and written: requests into `ChatRequest`, answers and errors into JSON. No server in it.

What is not understood is refused with a reason: a request that is half done would give wrong numbers to whoever measures through it.
"""

import base64
import binascii
import json
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_stage.chat_format import IMAGE_MARK, Turn
from llm_stage.generate import ChatRequest
from mmkit.errors import DataError
from mmkit.images import open_image

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
IGNORED = {
    "model",
    "messages",
    "stream",
    "stream_options",
    "user",
    "n",
    "metadata",
    "store",
    "service_tier",
}  # read elsewhere, or without effect
KNOWN = IGNORED | {"max_tokens", "max_completion_tokens", "temperature", "top_p", "seed", "stop"}
NEUTRAL = {"frequency_penalty": 0, "presence_penalty": 0, "logprobs": False, "tools": [], "response_format": {"type": "text"}}


class RequestError(DataError):
    """A request that cannot be served.

    Attributes:
        status: HTTP's.
        code, param: OpenAI's.
    """

    def __init__(self, message: str, status: int = 400, code: str = "invalid_request", param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param


@dataclass(frozen=True)
class Limits:
    """What a request may ask for.

    Attributes:
        max_tokens: Longest answer; also where a request says nothing.
        images: Pictures of a request.
        pixels: Of one picture.
        root: Folder that files may be read from; None refuses all.
    """

    max_tokens: int = 512
    images: int = 8
    pixels: int = 40_000_000
    root: Path | None = None


@dataclass(frozen=True)
class Asked:
    """A request, understood."""

    model: str
    request: ChatRequest
    max_tokens: int
    temperature: float
    top_p: float
    seed: int | None
    stop: tuple[str, ...]
    stream: bool
    usage_in_stream: bool


def read_request(body: Any, limits: Limits) -> Asked:
    """Read a request.

    Args:
        body: What came in, as JSON values.
        limits: What it may ask for.

    Raises:
        RequestError: Something is missing, unknown, too much, or not of its type.
    """
    if not isinstance(body, dict):
        raise RequestError("the body is no JSON object")
    for name in sorted(set(body) - KNOWN):
        if name not in NEUTRAL or body[name] not in (None, NEUTRAL[name]):
            raise RequestError(f"'{name}' is not supported here", param=name)
    if body.get("n") not in (None, 1):
        raise RequestError("n other than 1 is not supported here", param="n")
    longest = body.get("max_completion_tokens", body.get("max_tokens"))
    stop = body.get("stop") or ()
    stop = (stop,) if isinstance(stop, str) else stop
    if not isinstance(stop, list | tuple) or len(stop) > 4 or not all(isinstance(word, str) and word for word in stop):
        raise RequestError("stop is a text, or a list of up to four", param="stop")
    stream, options = body.get("stream") or False, body.get("stream_options") or {}
    if not isinstance(stream, bool) or not isinstance(options, dict):
        raise RequestError("stream is true or false, stream_options an object", param="stream")
    if not isinstance(body.get("model", ""), str):
        raise RequestError("model is a name", param="model")
    return Asked(
        model=body.get("model", ""),
        request=read_messages(body.get("messages"), limits),
        max_tokens=int(_number(longest, "max_tokens", 1, limits.max_tokens, limits.max_tokens, whole=True)),
        temperature=_number(body.get("temperature"), "temperature", 0, 2, 0.0),
        top_p=_number(body.get("top_p"), "top_p", 1e-6, 1, 1.0),
        seed=None if body.get("seed") is None else int(_number(body["seed"], "seed", -(2**63), 2**63 - 1, 0, whole=True)) % 2**63,
        stop=tuple(stop),
        stream=stream,
        usage_in_stream=bool(options.get("include_usage")),
    )


def _number(value: Any, name: str, low: float, high: float, default: float, whole: bool = False) -> float:
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or (whole and int(value) != value) or not low <= value <= high:
        raise RequestError(
            f"{name} is {str(value)[:40]}; a {'whole ' if whole else ''}number from {low:g} to {high:g} is right", param=name
        )
    return value


def read_messages(messages: Any, limits: Limits) -> ChatRequest:
    """Read the messages: the last one is a user's; pictures come as data URLs, or as files under the allowed root."""
    if not isinstance(messages, list) or not messages:
        raise RequestError("messages is a list of at least one message", param="messages")
    turns: list[Turn] = []
    images: list[Any] = []
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ROLES:
            raise RequestError(f"{where}: role is {str(role)[:20]!r}; system, user or assistant is right", param=where)
        turns.append(Turn(ROLES[role], _content(message.get("content"), role, images, where, limits)))  # type: ignore[arg-type]
    if turns[-1].role != "user":
        raise RequestError("the last message is a user's", param="messages")
    return ChatRequest(turns, images)


def _content(content: Any, role: str, images: list[Any], where: str, limits: Limits) -> str:
    """A message's words, a mark for each picture; the pictures are added to `images`."""
    if isinstance(content, str):
        return content.replace(IMAGE_MARK, "")  # a mark in words is no picture
    if not isinstance(content, list) or not content:
        raise RequestError(f"{where}: content is a text or a list of parts", param=where)
    pieces = []
    for place, part in enumerate(content):
        spot = f"{where}.content[{place}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            pieces.append(part["text"].replace(IMAGE_MARK, ""))
        elif kind == "image_url" and role == "user":
            if len(images) == limits.images:
                raise RequestError(f"{spot}: more than {limits.images} pictures", param=spot)
            url = part.get("image_url")
            images.append(read_picture(url.get("url") if isinstance(url, dict) else url, spot, limits))
            pieces.append(IMAGE_MARK)
        else:
            raise RequestError(f"{spot}: type is {str(kind)[:20]!r}; text, or image_url of a user, is right", param=spot)
    return "\n".join(pieces)


def read_picture(url: Any, where: str, limits: Limits) -> Any:
    """Open a picture: data:image/...;base64,... or file:///... under the allowed root. Nothing is fetched.

    Raises:
        RequestError: It is another URL, outside the root, no picture, or too large.
    """
    if not isinstance(url, str):
        raise RequestError(f"{where}: image_url holds a url", param=where)
    if url.startswith("data:"):
        head, comma, data = url.partition(",")
        if not comma or not head.endswith(";base64"):
            raise RequestError(f"{where}: a data URL is data:image/png;base64,...", param=where)
        try:
            source: Any = base64.b64decode(data, validate=True)
        except (binascii.Error, ValueError) as error:
            raise RequestError(f"{where}: the data URL is no base64 ({error})", param=where) from error
    elif url.startswith("file://"):
        source = allowed_file(url.removeprefix("file://"), where, limits.root)
    else:
        raise RequestError(f"{where}: pictures come inside the request, as data URLs; nothing is fetched from '{url[:40]}'", param=where)
    try:
        picture = open_image(source, where)
    except DataError as error:
        raise RequestError(str(error), param=where) from error
    if picture.width * picture.height > limits.pixels:
        raise RequestError(f"{where}: {picture.width} x {picture.height} pixels; {limits.pixels:,} are allowed", 413, "too_large", where)
    return picture


def allowed_file(name: str, where: str, root: Path | None) -> Path:
    """A file under the root, links followed; what lies outside is not told apart from what is not there."""
    path = Path(name).resolve()
    if root is None or not path.is_relative_to(root.resolve()) or not path.is_file():
        raise RequestError(f"{where}: no such file under the allowed root (--root)", param=where)
    return path


# ---- answers -------------------------------------------------------------------------------------------------------------------------


def cut_at_stop(text: str, stop: tuple[str, ...]) -> str:
    """The text before the first of the stop sequences."""
    places = [place for word in stop if (place := text.find(word)) >= 0]
    return text[: min(places)].rstrip() if places else text


def until_stop(pieces: Iterator[str], stop: tuple[str, ...]) -> Iterator[str]:
    """Pieces before the first stop sequence; so much is held back that none of it ever gets out."""
    if not stop:
        yield from pieces
        return
    held, longest = "", max(map(len, stop))
    for piece in pieces:
        held += piece
        cut = cut_at_stop(held, stop)
        if len(cut) < len(held.rstrip()) and any(word in held for word in stop):
            yield cut
            return
        if len(held) >= longest:
            keep = longest - 1
            yield held[: len(held) - keep]
            held = held[len(held) - keep :]
    yield held


def completion(model: str, text: str, usage: Mapping[str, int], finish: str) -> dict[str, Any]:
    """A whole answer."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish, "logprobs": None}
    return {**_head(model, "chat.completion"), "choices": [choice], "usage": dict(usage)}


def _head(model: str, kind: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}


def stream_lines(model: str, pieces: Iterator[str], finish: Any, usage: Any) -> Iterator[str]:
    """Server-sent events of an answer.

    Args:
        model: Its name.
        pieces: Of the answer.
        finish: Gives the reason, once all is said.
        usage: Gives the counts, once all is said; None leaves them out.
    """
    head = _head(model, "chat.completion.chunk")

    def event(delta: dict[str, Any], reason: str | None = None) -> str:
        return f"data: {json.dumps({**head, 'choices': [{'index': 0, 'delta': delta, 'finish_reason': reason}]})}\n\n"

    yield event({"role": "assistant", "content": ""})
    try:
        for piece in pieces:
            if piece:
                yield event({"content": piece})
        yield event({}, finish())
        if usage is not None:
            yield f"data: {json.dumps({**head, 'choices': [], 'usage': usage()})}\n\n"
    except Exception as error:  # the status has gone out already: the reason is all that can still be told
        yield f"data: {json.dumps(error_body(str(error), 'server_error'))}\n\n"
    yield "data: [DONE]\n\n"


def error_body(message: str, code: str, param: str | None = None) -> dict[str, Any]:
    """An error in OpenAI's form."""
    kind = "server_error" if code in ("server_error", "busy") else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
