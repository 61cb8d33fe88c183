"""Serve models behind OpenAI's chat completions: images inside the request, streams, batches across clients.

    mmkit serve --model runs/quickstart/llava/clip --model runs/quickstart/blip2/clip
    curl http://127.0.0.1:8000/v1/models

GET /v1/models, /health, /metrics; POST /v1/chat/completions. Bound to loopback unless --host says otherwise, which takes a token in the
environment (MMKIT_SERVE_TOKEN). Nothing is fetched for a client: pictures are data URLs, or files under --root. SIGTERM: what was accepted is
answered, then it ends.
"""

import hmac
import json
import os
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from apps.batcher import Batcher
from apps.openai_form import Asked, Limits, RequestError, completion, cut_at_stop, error_body, read_request, stream_lines, until_stop
from mmkit.config import cli_entry, load_config
from mmkit.errors import ConfigError, DataError

TOKEN = "MMKIT_SERVE_TOKEN"
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass
class ServeConfig:
    """Settings of `mmkit serve`."""

    model: list[str] = field(default_factory=list, metadata={"help": "folders, or names of `mmkit list models`: --model A --model B"})
    host: str = field(default="127.0.0.1", metadata={"help": f"address; one that is no loopback takes a token in {TOKEN}"})
    port: int = field(default=8000, metadata={"help": "port"})
    batch_size: int = field(default=16, metadata={"help": "requests answered at once"})
    waiting: int = field(default=64, metadata={"help": "requests that may wait for a model; the next is told that it is busy"})
    max_tokens: int = field(default=512, metadata={"help": "longest answer"})
    max_images: int = field(default=8, metadata={"help": "pictures of a request"})
    max_megabytes: float = field(default=20.0, metadata={"help": "of a request"})
    root: str = field(default="", metadata={"help": "folder whose files may be named as file:///...; empty: none"})
    timeout: float = field(default=600.0, metadata={"help": "seconds for one answer, its waiting included"})

    def validate(self) -> None:
        """Refuse to be open to the world without a token."""
        if not self.model:
            raise ConfigError("which model? mmkit serve --model FOLDER; `mmkit list models` has names")
        if self.host not in LOOPBACK and not os.environ.get(TOKEN):
            raise ConfigError(f"--host {self.host} opens the server to others: set a token in the environment first ({TOKEN})")
        if self.root and not Path(self.root).is_dir():
            raise ConfigError(f"--root {self.root} is no folder")
        if min(self.batch_size, self.waiting, self.max_tokens) < 1:
            raise ConfigError("--batch_size, --waiting and --max_tokens are at least 1")


class Counts:
    """What /metrics tells."""

    def __init__(self) -> None:
        self.lock, self.requests, self.totals = threading.Lock(), Counter[int](), Counter[str]()

    def add(self, status: int, seconds: float, usage: dict[str, int] | None = None) -> None:
        """Count a request that came to its end."""
        with self.lock:
            self.requests[status] += 1
            self.totals["seconds"] += seconds  # type: ignore[assignment]
            for name, value in (usage or {}).items():
                self.totals[name] += value

    def text(self, batchers: dict[str, Batcher]) -> str:
        """Prometheus' text form."""
        lines = [f'mmkit_requests_total{{status="{status}"}} {count}' for status, count in sorted(self.requests.items())]
        lines += [f"mmkit_{name}_total {value}" for name, value in sorted(self.totals.items())]
        for name, batcher in batchers.items():
            label = f"{{model={json.dumps(name)}}}"
            lines += [
                f"mmkit_waiting{label} {batcher.queued}",
                f"mmkit_batches_total{label} {batcher.batches}",
                f"mmkit_batch_rows_total{label} {batcher.rows}",
            ]
        return "\n".join(lines) + "\n"


def make_app(models: dict[str, Any], config: ServeConfig) -> Any:
    """Build the application.

    Args:
        models: By name.
        config: Limits.
    """
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse

    batchers = {name: Batcher(model, config.batch_size, config.waiting) for name, model in models.items()}
    limits = Limits(config.max_tokens, config.max_images, root=Path(config.root) if config.root else None)
    counts, token = Counts(), os.environ.get(TOKEN, "")

    @asynccontextmanager
    async def lifespan(_: Any) -> Any:
        yield
        for batcher in batchers.values():
            batcher.close()

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)

    def refused(error: RequestError) -> Any:
        counts.add(error.status, 0.0)
        headers = {"retry-after": "1"} if error.code == "busy" else {}
        return JSONResponse(error_body(str(error), error.code, error.param), error.status, headers)

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics")
    def metrics() -> Any:
        return PlainTextResponse(counts.text(batchers))

    @app.get("/v1/models")
    def listed() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": name, "object": "model", "created": 0, "owned_by": "mmkit"} for name in batchers]}

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Any:
        from anyio import to_thread

        try:
            body = await body_of(request, token, config.max_megabytes)
            return await to_thread.run_sync(answer, body)
        except RequestError as error:
            return refused(error)

    def answer(body: bytes) -> Any:
        """Answer one request, in a thread of its own."""
        began = time.monotonic()
        asked = understood(body, limits)
        name = asked.model or next(iter(batchers))
        if name not in batchers:
            raise RequestError(f"no model '{name[:60]}' here; there are: {', '.join(batchers)}", 404, "model_not_found", "model")
        batcher = batchers[name]
        if asked.stream:
            return StreamingResponse(alive(streamed(name, batcher, asked, counts, began)), media_type="text/event-stream")
        text = waited(batcher.submit(asked), config.timeout)
        usage, finish = usage_of(batcher.model, asked, text), finish_of(batcher.model, asked, text)
        counts.add(200, time.monotonic() - began, usage)
        return JSONResponse(completion(name, cut_at_stop(text, asked.stop), usage, finish))

    return app


async def body_of(request: Any, token: str, max_megabytes: float) -> bytes:
    """The body of a request, up to the limit: a client's word on its length is not taken.

    Raises:
        RequestError: The token is missing or wrong, or the body is too large.
    """
    if token and not hmac.compare_digest(request.headers.get("authorization", "").encode(), f"Bearer {token}".encode()):
        raise RequestError("the token is missing or wrong", 401, "invalid_api_key")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_megabytes * 2**20:
            raise RequestError(f"the request is larger than {max_megabytes:g} MB", 413, "too_large")
    return bytes(body)


def understood(body: bytes, limits: Limits) -> Asked:
    """Read a body.

    Raises:
        RequestError: It is no JSON, or asks for what is not served.
    """
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError("the body is no JSON") from error
    return read_request(content, limits)


def waited(future: "Future[str]", timeout: float) -> str:
    """An answer, or why there is none.

    Raises:
        RequestError: The model refused the request, ran out of memory, failed, or took too long.
    """
    try:
        return future.result(timeout)
    except TimeoutError as error:
        raise RequestError(f"no answer within {timeout:g} s", 503, "busy") from error
    except DataError as error:
        raise RequestError(str(error)) from error
    except Exception as error:
        kind = "out of memory" if "OutOfMemory" in type(error).__name__ else type(error).__name__
        raise RequestError(f"the model failed ({kind}): {str(error)[:300]}", 500, "server_error") from error


def streamed(name: str, batcher: Batcher, asked: Asked, counts: Counts, began: float) -> Iterator[str]:
    """Server-sent events of one answer; a client that goes away ends its generation."""
    said: list[str] = []

    def pieces() -> Iterator[str]:
        for piece in until_stop(source, asked.stop):
            said.append(piece)
            yield piece

    source = batcher.stream(asked)

    def lines() -> Iterator[str]:
        whole = lambda: "".join(said)  # noqa: E731
        usage = (lambda: usage_of(batcher.model, asked, whole())) if asked.usage_in_stream else None
        try:
            yield from stream_lines(name, pieces(), lambda: finish_of(batcher.model, asked, whole()), usage)
        finally:
            source.close()  # type: ignore[attr-defined]
            counts.add(200, time.monotonic() - began, usage_of(batcher.model, asked, whole()))

    return lines()


async def alive(lines: Iterator[str]) -> AsyncIterator[str]:
    """The lines, computed in a thread; when the client goes away, what makes them is closed at once and not when it is collected."""
    from starlette.concurrency import iterate_in_threadpool

    try:
        async for line in iterate_in_threadpool(lines):
            yield line
    finally:
        lines.close()  # type: ignore[attr-defined]


def usage_of(model: Any, asked: Asked, text: str) -> dict[str, int]:
    """Tokens of the prompt's words and of the answer, by the model's tokenizer; image tokens beside the words where it says how many."""
    tokenizer = getattr(model, "tokenizer", None)
    count = (
        (lambda words: len(tokenizer(words, add_special_tokens=False)["input_ids"])) if tokenizer else (lambda words: len(words.split()))
    )
    prompt = sum(count(turn.text) for turn in asked.request.turns)
    prompt += len(asked.request.images) * int(getattr(model, "tokens_per_image", 0))
    return {"prompt_tokens": prompt, "completion_tokens": count(text), "total_tokens": prompt + count(text)}


def finish_of(model: Any, asked: Asked, text: str) -> str:
    """Why an answer ended."""
    stopped = any(word in text for word in asked.stop)
    return "length" if not stopped and usage_of(model, asked, text)["completion_tokens"] >= asked.max_tokens else "stop"


def main(argv: Sequence[str] | None = None) -> Path:
    """Load the models and serve until a signal; give the first model's folder."""
    config = load_config(ServeConfig, argv)
    try:
        import uvicorn
        from fastapi import FastAPI  # noqa: F401
    except ImportError as error:
        raise ConfigError("mmkit serve needs fastapi and uvicorn, which come with the demo: pip install 'mmkit[demo]'") from error
    from llm_stage.chat_models import load_chat

    models = {}
    for folder in config.model:
        print(f"loading {folder} ...", flush=True)
        chat = load_chat(folder)
        if chat.name in models:
            raise ConfigError(f"two models are called '{chat.name}': rename a folder")
        models[chat.name] = chat
    app = make_app(models, config)
    print(f"serving {', '.join(models)} at http://{config.host}:{config.port}/v1", flush=True)
    uvicorn.run(app, host=config.host, port=config.port, log_level="warning", timeout_graceful_shutdown=int(config.timeout))
    return Path(config.model[0])


if __name__ == "__main__":
    cli_entry(main)
