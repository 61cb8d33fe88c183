"""`mmkit serve` under load: 32 clients that check their own answers, and what common batches are worth.

    mmkit data mini --out runs/data --scene_drawings 80
    OMP_NUM_THREADS=1 python benchmarks/serve_load.py --data runs/data --model runs/quickstart/llava/clip
    OMP_NUM_THREADS=1 python benchmarks/serve_load.py --data runs/data --model mini-chat --seconds 0 --requests 64

First the same requests by the same clients with batches of one and of 16, in turns: requests a second. Then `--seconds` of load, half of it streams:
every answer must be the one that the model gives alone, the only error allowed is "busy", and memory must not grow.
"""

import argparse
import base64
import random
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import openai

from llm_stage.asking import request_for
from llm_stage.benchmarks import BENCHMARKS, read_items
from llm_stage.generate import ChatModel

GOAL, MEGABYTE = 2.0, 2**20
ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Asked:
    """One request and the answer that the model gives alone."""

    messages: list[dict[str, Any]]
    answer: str


class Server:
    """`mmkit serve` in a process of its own, so that it does not share an interpreter with its clients."""

    def __init__(self, folder: str, name: str, batch_size: int, waiting: int) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        flags = {"model": folder, "port": port, "batch_size": batch_size, "waiting": waiting}
        words = [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
        self.process = subprocess.Popen([sys.executable, "-m", "apps.serve", *words], cwd=ROOT, stdout=subprocess.DEVNULL)
        self.client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=300)
        self.name, self.limit = name, BENCHMARKS["mini_vqa"].max_new_tokens
        while True:
            try:
                self.client.models.list()
                break
            except openai.APIConnectionError:
                if self.process.poll() is not None:
                    raise SystemExit("the server did not start; its own words are above") from None
                time.sleep(0.5)

    @property
    def memory(self) -> float:
        """Resident memory of the server, MB."""
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * 4096 / MEGABYTE

    def stop(self) -> None:
        """End it, as a service manager would."""
        self.process.terminate()
        self.process.wait(60)

    def ask(self, asked: Asked, stream: bool) -> str:
        """One request by the official client; "right", "mixed", or the error's code."""
        try:
            how: dict[str, Any] = {"model": self.name, "messages": asked.messages, "max_tokens": self.limit, "temperature": 0}
            if stream:
                chunks = self.client.chat.completions.create(stream=True, **how)
                text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
            else:
                text = self.client.chat.completions.create(**how).choices[0].message.content or ""
        except openai.APIStatusError as error:
            return str(getattr(error, "code", "") or error.status_code)
        return "right" if text.strip() == asked.answer else "mixed"


def main() -> None:
    """Measure, then load."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of `mmkit data mini`")
    parser.add_argument("--model", required=True)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--requests", type=int, default=256, help="of a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=120.0, help="of load; 0: none")
    flags = parser.parse_args()
    model = ChatModel.load(flags.model)
    asked = requests_of(model, Path(flags.data), flags.requests)
    sides = {size: Server(flags.model, model.name, size, waiting=4 * flags.clients) for size in (1, 16)}
    found: dict[int, list[float]] = {size: [] for size in sides}
    for number in range(flags.rounds):
        for size in list(sides)[:: 1 if number % 2 == 0 else -1]:
            begin = time.perf_counter()
            with ThreadPoolExecutor(flags.clients) as pool:
                ends = Counter(pool.map(lambda one, server=sides[size]: server.ask(one, False), asked))  # type: ignore[misc]
            found[size].append(len(asked) / (time.perf_counter() - begin))
            if set(ends) != {"right"}:
                raise SystemExit(f"batches of {size}: {dict(ends)}")
            print(f"round {number + 1}, batches of {size:2d}: {found[size][-1]:6.1f} requests/s", flush=True)
    one, many = (statistics.median(found[size]) for size in sides)
    print(f"{flags.clients} clients: {one:.1f} requests/s one at a time, {many:.1f} in common batches: {many / one:.2f}x (goal {GOAL})")
    for server in sides.values():
        server.stop()
    if flags.seconds:
        server = Server(flags.model, model.name, 16, waiting=flags.clients // 2)
        load(server, asked, flags.clients, flags.seconds)
        server.stop()


def requests_of(model: ChatModel, data: Path, count: int) -> list[Asked]:
    """Questions of the embedded test set as chat messages, with the model's own answer to each."""
    row = BENCHMARKS["mini_vqa"]
    items, _ = read_items(data / "vqa/questions_test.json", data / "vqa/annotations_test.json", data / "images", 0, row)
    chosen = items[:: max(1, len(items) // count)][:count]
    answers = model.generate([request_for(item, row, data / "images") for item in chosen], row.max_new_tokens, 1)
    asked = []
    for item, answer in zip(chosen, answers, strict=True):
        picture = base64.b64encode((data / "images" / item.image).read_bytes()).decode()
        parts = [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}},
            {"type": "text", "text": row.ask(item.question)},
        ]
        asked.append(Asked([{"role": "user", "content": parts}], answer))
    return asked


def load(server: Server, asked: Sequence[Asked], clients: int, seconds: float) -> None:
    """Let the clients ask for a while, every second time as a stream; print how it ended and what memory did."""
    ends: Counter[str] = Counter()
    lock, until = threading.Lock(), time.monotonic() + seconds

    def client(number: int) -> None:
        chance = random.Random(number)
        while time.monotonic() < until:
            end = server.ask(chance.choice(asked), stream=chance.random() < 0.5)
            with lock:
                ends[end] += 1
            if end == "busy":
                time.sleep(chance.random() * 0.2)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    time.sleep(seconds / 4)
    early = server.memory
    for thread in threads:
        thread.join()
    print(
        f"{seconds:g} s of load by {clients} clients: {dict(ends)}; memory {early:.0f} MB after a quarter, {server.memory:.0f} MB at the end"
    )
    if set(ends) - {"right", "busy"}:
        raise SystemExit("something else than a right answer or busy came back")


if __name__ == "__main__":
    main()
