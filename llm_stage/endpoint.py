"""A model behind an OpenAI-compatible endpoint (vLLM, llama.cpp, Ollama, a vendor): one call, bounded retries, nothing secret kept.

    endpoint = Endpoint.parse("qwen2.5-vl@http://localhost:8000/v1")
    reply = endpoint.complete([{"role": "user", "content": "hello"}], max_tokens=16)

The key comes from an environment variable and goes into the request's header alone. 429, 5xx, cut connections and slow answers are tried
again, later each time and never for ever; a wrong key or a wrong address is said at once.
"""

from __future__ import annotations

import base64
import io
import os
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Event
from typing import Any

from llm_stage.chat_format import IMAGE_MARK, Turn
from llm_stage.generate import ChatRequest, ImageSource, place_marks
from mmkit.errors import ConfigError, DataError
from mmkit.images import open_image

KEY_VARIABLE = "OPENAI_API_KEY"
LONGEST_WAIT = 60.0  # seconds between two tries, whatever the server asks for


class EndpointError(DataError):
    """A call failed, for good or after all tries; the message holds no key."""


@dataclass(frozen=True)
class Reply:
    """What came back.

    Attributes:
        text: The answer.
        model: The name the server gave.
        prompt_tokens, completion_tokens: As it counted them; 0 where it did not.
        finish_reason: "stop", "length", "content_filter", ...
        seconds, attempts: Of all tries.
    """

    text: str
    model: str
    prompt_tokens: int = 0
    completion_tokens: int = 0
    finish_reason: str = ""
    seconds: float = 0.0
    attempts: int = 1


@dataclass
class Endpoint:
    """One model at one address.

    Attributes:
        url: Up to and with /v1.
        model: Its name there.
        key_variable: Environment variable with the key; a server that wants none gets none.
        timeout: Seconds for one try.
        tries: At most so many.
        backoff: Seconds before the second try; doubled for each further one.
    """

    url: str
    model: str
    key_variable: str = KEY_VARIABLE
    timeout: float = 120.0
    tries: int = 5
    backoff: float = 1.0
    _client: Any = field(default=None, repr=False)

    @classmethod
    def parse(cls, text: str, **more: Any) -> Endpoint:
        """Read MODEL@URL.

        Raises:
            ConfigError: It is not of this form, or has a key in it, which would end up in files.
        """
        model, at, url = text.partition("@")
        if not at or not model or not url.startswith(("http://", "https://")):
            raise ConfigError(f"'{text}' is no endpoint: MODEL@URL is right, as in qwen2.5-vl@http://localhost:8000/v1")
        if any(mark in url for mark in "@?#"):
            raise ConfigError(
                f"the address of '{model}' holds a user, a key or a query; the key comes from an environment variable, not from the address"
            )
        return cls(url.rstrip("/"), model, **more)

    @property
    def client(self) -> Any:
        """The HTTP client, made once."""
        if self._client is None:
            try:
                import httpx
            except ImportError as error:
                raise ConfigError("endpoints need the package httpx, which is not installed: pip install 'mmkit[endpoint]'") from error
            key = os.environ.get(self.key_variable, "")
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            self._client = httpx.Client(headers=headers, timeout=self.timeout)
        return self._client

    def complete(self, messages: Sequence[Mapping[str, Any]], *, max_tokens: int, temperature: float = 0.0, **more: Any) -> Reply:
        """Ask once, and again where that may help.

        Args:
            messages: In OpenAI's form.
            max_tokens, temperature: Of the answer.
            more: Other fields of the request (seed, top_p, stop).

        Raises:
            ConfigError: The key is missing or wrong, or there is no such endpoint or model.
            EndpointError: All tries failed, or the server refused the request.
        """
        body = {"model": self.model, "messages": list(messages), "max_tokens": max_tokens, "temperature": temperature, **more}
        began, why = time.monotonic(), ""
        for attempt in range(1, self.tries + 1):
            wait = self.backoff * 2 ** (attempt - 1) * random.uniform(0.8, 1.2)
            try:
                response = self.client.post(f"{self.url}/chat/completions", json=body)
            except self._faults() as error:
                why = f"{type(error).__name__}"
            else:
                if response.status_code == 200:
                    reply, why = _read(response, time.monotonic() - began, attempt)
                    if reply is not None:
                        return reply
                elif response.status_code == 429 or response.status_code >= 500:
                    why = f"HTTP {response.status_code}"
                    wait = max(wait, _asked_wait(response))
                else:
                    self._refuse(response)
            if attempt < self.tries:
                time.sleep(min(wait, LONGEST_WAIT))
        raise EndpointError(f"{self.url} gave no answer in {self.tries} tries ({time.monotonic() - began:.0f} s); the last: {why}")

    def _faults(self) -> tuple[type[Exception], ...]:
        import httpx

        return (httpx.TransportError, httpx.DecodingError)

    def _refuse(self, response: Any) -> None:
        """Say what a refusal means; what the server wrote is shown, shortened."""
        code, words, key = response.status_code, " ".join(response.text[:300].split()), os.environ.get(self.key_variable)
        words = words.replace(key, "(the key)") if key else words  # some servers repeat it
        if code in (401, 403):
            held = "holds a key that it does not take" if os.environ.get(self.key_variable) else "is not set"
            raise ConfigError(f"{self.url} wants a key (HTTP {code}): the environment variable {self.key_variable} {held}")
        if code == 404:
            raise ConfigError(f"{self.url}/chat/completions is not there, or knows no model '{self.model}' (HTTP 404): {words}")
        raise EndpointError(f"{self.url} refused the request (HTTP {code}): {words}")


def _read(response: Any, seconds: float, attempts: int) -> tuple[Reply | None, str]:
    """The answer in a response, or what is wrong with it."""
    try:
        content = response.json()
        choice = content["choices"][0]
        said = choice["message"]
        text, reason = said.get("content"), str(choice.get("finish_reason") or "")
    except (ValueError, LookupError, TypeError, AttributeError):
        return None, "an answer that is none of a chat completion"
    if text is None and (
        said.get("refusal") or reason == "content_filter"
    ):  # a refusal is an answer: asking again costs, and gives the same
        text, reason = str(said.get("refusal") or ""), "content_filter"
    if not isinstance(text, str):
        return None, "an answer without text"
    usage = content.get("usage") or {}
    prompt, written = (int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens"))
    return Reply(text, str(content.get("model", "")), prompt, written, reason, round(seconds, 3), attempts), ""


def _asked_wait(response: Any) -> float:
    try:
        return max(0.0, float(response.headers.get("retry-after", "0")))
    except ValueError:  # a date: the own wait will do
        return 0.0


class EndpointChat:
    """A model at an endpoint, with `ChatModel`'s doors; images travel inside the request.

    Args:
        endpoint: Where it is.
        workers: Requests at once.
    """

    def __init__(self, endpoint: Endpoint, workers: int = 8) -> None:
        self.endpoint, self.workers, self.name = endpoint, workers, endpoint.model
        self.last_batch_size = 0

    def generate(
        self,
        requests: Sequence[ChatRequest],
        max_new_tokens: int = 128,
        batch_size: int = 8,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        **more: Any,
    ) -> list[str]:
        """Answer many requests, several at once; see `ChatModel.generate`."""
        extra = {**({"top_p": top_p} if temperature else {}), **({} if seed is None else {"seed": seed}), **more}
        bodies = [messages_of(request, f"request {index}") for index, request in enumerate(requests)]
        self.last_batch_size = min(batch_size, len(requests))

        def ask(body: list[dict[str, Any]]) -> str:
            return self.endpoint.complete(body, max_tokens=max_new_tokens, temperature=temperature, **extra).text.strip()

        with ThreadPoolExecutor(max(1, min(self.workers, batch_size))) as pool:
            return list(pool.map(ask, bodies))

    def stream(
        self,
        request: ChatRequest,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: Event | None = None,
    ) -> Iterator[str]:
        """Answer one request, in one piece; see `ChatModel.stream`."""
        if stop is None or not stop.is_set():
            yield self.generate([request], max_new_tokens, 1, temperature, top_p, seed)[0]

    def encoder_card(self) -> dict[str, Any]:
        """What is known of its encoder: nothing, but where the model is."""
        return {"source": f"{self.endpoint.model} at {self.endpoint.url}"}


def messages_of(request: ChatRequest, where: str) -> list[dict[str, Any]]:
    """A request in OpenAI's form, its pictures as data URLs in the places of their marks.

    Raises:
        DataError: Marks and pictures do not agree, or a picture cannot be read.
    """
    images, messages = list(request.images), []
    for turn in place_marks(request):
        messages.append({"role": turn.role, "content": _content(turn, images, where)})
    if images:
        raise DataError(f"{where}: {len(images)} picture(s) more than marks {IMAGE_MARK}")
    return messages


def _content(turn: Turn, images: list[ImageSource], where: str) -> str | list[dict[str, Any]]:
    if turn.role != "user" or IMAGE_MARK not in turn.text:
        return turn.text
    pieces = turn.text.split(IMAGE_MARK)
    parts: list[dict[str, Any]] = []
    for number, piece in enumerate(pieces):
        if number:
            if not images:
                raise DataError(f"{where}: more marks {IMAGE_MARK} than pictures")
            parts.append({"type": "image_url", "image_url": {"url": data_url(images.pop(0), where)}})
        if piece.strip():
            parts.append({"type": "text", "text": piece.strip("\n")})
    return parts


def data_url(image: ImageSource, where: str = "") -> str:
    """A picture as a PNG inside a URL: nothing is lost, and nothing has to be fetched."""
    file = io.BytesIO()
    open_image(image, where).save(file, format="PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")
