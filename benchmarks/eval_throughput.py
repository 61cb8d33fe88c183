"""Questions a second: mmkit's batches against one question at a time, as LLaVA's own scripts ask; the answers must be the same.

    mmkit data mini --out runs/data --scene_drawings 80
    OMP_NUM_THREADS=1 python benchmarks/eval_throughput.py --data runs/data                     # mini-chat: SmolLM2-135M behind the mini CLIP
    python benchmarks/eval_throughput.py --data runs/data --model runs/quickstart/llava/clip --questions 256

The same questions of the embedded test set, spread over all kinds, by the same loaded model; the sides take turns. One at a time: prompt, picture,
`generate` in transformers, in the file's order. mmkit: sorted by length, padded on the left, batches of several sizes. On a CPU with one thread the
clock is the process's own CPU time, which other programs do not stretch.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from llm_stage.asking import request_for
from llm_stage.benchmarks import BENCHMARKS, read_items
from llm_stage.generate import ChatModel, ChatRequest

GOAL = 4.0


def main() -> None:
    """Ask, check that the answers agree, print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of `mmkit data mini`")
    parser.add_argument("--model", default="mini-chat")
    parser.add_argument("--questions", type=int, default=96)
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--rounds", type=int, default=3)
    flags = parser.parse_args()
    vqa, images = Path(flags.data) / "vqa", Path(flags.data) / "images"
    row = BENCHMARKS["mini_vqa"]
    items, _ = read_items(vqa / "questions_test.json", vqa / "annotations_test.json", images, 0, row)
    chosen = items[:: max(1, len(items) // flags.questions)][: flags.questions]
    requests = [request_for(item, row, images) for item in chosen]
    chat = ChatModel.load(flags.model)
    limit = row.max_new_tokens
    sides: dict[str, Callable[[], list[str]]] = {"one at a time": lambda: [one(chat, request, limit) for request in requests]}
    sides |= {f"batches of {size}": (lambda size=size: chat.generate(requests, limit, size)) for size in flags.batches}  # type: ignore[misc]
    clock = time.process_time if os.environ.get("OMP_NUM_THREADS") == "1" and chat.model.device.type == "cpu" else time.perf_counter
    found: dict[str, list[float]] = {name: [] for name in sides}
    answers: dict[str, list[str]] = {}
    for number in range(flags.rounds):
        for name in list(sides)[:: 1 if number % 2 == 0 else -1]:
            begin = clock()
            answers[name] = sides[name]()
            found[name].append(clock() - begin)
    for name, given in answers.items():
        differ = sum(a != b for a, b in zip(given, answers["one at a time"], strict=True))
        if differ and chat.model.dtype == torch.float32:
            raise SystemExit(f"{name}: {differ} of {len(given)} answers differ")
    slow = statistics.median(found["one at a time"])
    print(f"{flags.model}, {len(requests)} questions, medians of {flags.rounds} rounds; all answers equal")
    for name, seconds in found.items():
        median = statistics.median(seconds)
        print(
            f"  {name:16s} {len(requests) / median:7.2f} questions/s   {slow / median:5.2f}x"
            + ("" if median == slow else f"  (goal {GOAL:.0f}x)")
        )


@torch.no_grad()
def one(chat: ChatModel, request: ChatRequest, limit: int) -> str:
    """Ask one question the plain way."""
    prompt = chat._prompt(request, "a question")
    picture = request.images[0]
    pixels = chat.processor.image_processor(images=[picture], return_tensors="pt")["pixel_values"].to(chat.model.device, chat.model.dtype)
    ids = torch.tensor([prompt], device=chat.model.device)
    settings = chat._settings(limit, 0.0, 1.0, len(prompt))
    output = chat.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels, generation_config=settings)
    return chat._text(output[0, len(prompt) :].tolist())


if __name__ == "__main__":
    main()
