"""Questions a second inside lmms-eval: mmkit's plug-in against lmms-eval's own `llava_hf`, on the same weights, task and answers.

    pip install 'mmkit[lmms-eval]' decord                                  # best in an environment of its own
    mmkit data mini --out runs/data --scene_drawings 80
    mmkit lmms-task mini_vqa --questions runs/data/vqa/questions_test.json --annotations runs/data/vqa/annotations_test.json \
        --images runs/data/images --limit 96 --out runs/task
    mmkit export mini-chat runs/plain                                      # the same model as a plain transformers LLaVA
    OMP_NUM_THREADS=1 python benchmarks/lmms_eval_throughput.py --task runs/task --model mini-chat --plain runs/plain

The sides take turns, and only answering is timed. `llava_hf` takes one question at a time (it refuses more), so that is its best batch size. On a CPU
with one thread the clock is the process's own CPU time, which other programs do not stretch.
"""

import argparse
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lmms_eval.evaluator import simple_evaluate
from lmms_eval.models import get_model
from lmms_eval.tasks import TaskManager

GOAL = 1.5


def main() -> None:
    """Ask in turns, check that scores agree, print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", required=True, help="folder of `mmkit lmms-task`")
    parser.add_argument("--model", default="mini-chat", help="for mmkit")
    parser.add_argument("--plain", required=True, help="the same model, exported, for llava_hf")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    flags = parser.parse_args()
    name = next(Path(flags.task).glob("mmkit_*.yaml")).stem
    mine = get_model("mmkit")(pretrained=flags.model, device=flags.device)
    theirs = get_model("llava_hf")(
        pretrained=flags.plain, device=flags.device, device_map=flags.device, dtype="float32", attn_implementation="sdpa"
    )
    theirs.clean = lambda: None  # lmms-eval would delete the weights after the first round
    sides: dict[str, tuple[Any, int]] = {"llava_hf, one at a time": (theirs, 1)}
    sides |= {f"mmkit, batches of {size}": (mine, size) for size in flags.batches}
    found: dict[str, list[float]] = {side: [] for side in sides}
    answers: dict[str, list[str]] = {}
    for number in range(flags.rounds):
        for side in list(sides)[:: 1 if number % 2 == 0 else -1]:
            seconds, answers[side] = answered(*sides[side], name, flags.task)
            found[side].append(seconds)
            print(f"round {number + 1}, {side}: {len(answers[side]) / seconds:.2f} questions/s", flush=True)
    base = statistics.median(found["llava_hf, one at a time"])
    for side, seconds in found.items():
        middle = statistics.median(seconds)
        differ = sum(a.strip() != b.strip() for a, b in zip(answers[side], answers["llava_hf, one at a time"], strict=True))
        print(f"{side:28s} {len(answers[side]) / middle:6.2f} questions/s  {base / middle:5.2f}x (goal {GOAL}), {differ} answers differ")


def answered(model: Any, batch_size: int, task: str, folder: str) -> tuple[float, list[str]]:
    """Let lmms-eval run the task once; seconds of answering alone, and the answers by document."""
    clock = time.process_time if os.environ.get("OMP_NUM_THREADS") == "1" else time.perf_counter
    spent: list[float] = []
    ask = type(model).generate_until

    def timed(requests: Any) -> Any:
        begin = clock()
        given = ask(model, requests)
        spent.append(clock() - begin)
        return given

    model.generate_until = timed
    if not isinstance(getattr(type(model), "batch_size", None), property):
        model.batch_size = batch_size
    tasks = TaskManager("ERROR", include_path=folder, include_defaults=False, model_name="mmkit")
    result = simple_evaluate(model=model, tasks=[task], task_manager=tasks, batch_size=batch_size, log_samples=True, cli_args=None)
    rows = sorted(result["samples"][task], key=lambda row: row["doc_id"])
    return sum(spent), [str(row["filtered_resps"][0]) for row in rows]


if __name__ == "__main__":
    main()
