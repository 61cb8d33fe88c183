"""A benchmark of mmkit's as a task of lmms-eval: the same questions, pictures, prompt and scorer, inside that harness.

    mmkit lmms-task mini_vqa --questions Q.json --annotations A.json --images DIR --out tasks/mini
    lmms-eval --model mmkit --model_args pretrained=runs/stage2/model --include_path tasks/mini --tasks mmkit_mini_vqa

So models of other people are asked what mmkit's are asked, and a figure can be checked by a second program. Nothing is downloaded.

The wheel of lmms-eval 0.7.2 lacks the templates of its own tasks, without which its command line does not start: install it from its source, or
call `lmms_eval.evaluator.simple_evaluate` with `TaskManager(include_path=FOLDER, include_defaults=False)`, which needs none of them.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llm_stage.benchmark_files import VqaItem
from llm_stage.benchmark_scores import SCORERS
from llm_stage.benchmarks import Benchmark, choose, read_items
from mmkit.checkpoint import atomic_folder, atomic_write
from mmkit.config import cli_entry, load_config
from mmkit.errors import ConfigError
from mmkit.images import open_image
from mmkit.manifest import manifest

ROWS, FUNCTIONS = "rows.jsonl", ("doc_to_visual", "doc_to_text", "process_results", "mean_percent")


@dataclass
class LmmsTaskConfig:
    """Settings of `mmkit lmms-task BENCHMARK`."""

    benchmark: str = field(default="", metadata={"help": "row of `mmkit list benchmarks`; the first word"})
    questions: str = field(default="", metadata={"help": "the benchmark's question file"})
    annotations: str = field(default="", metadata={"help": "the file of the answers, where it is another one"})
    images: str = field(default="", metadata={"help": "folder of the pictures"})
    ocr: str = field(default="", metadata={"help": "TextVQA's Rosetta file, for textvqa_ocr"})
    split: str = field(default="", metadata={"help": "of a file that holds several; empty is the row's own"})
    limit: int = field(default=0, metadata={"help": "the first so many questions; 0: all"})
    out: str = field(default="", metadata={"help": "folder for the task, for lmms-eval's --include_path"})
    overwrite: bool = field(default=False, metadata={"help": "replace an earlier --out"})

    def validate(self) -> None:
        """Refuse a task without input or output.

        Raises:
            ConfigError: The message names the flag.
        """
        for name in ("benchmark", "questions", "images", "out"):
            if not getattr(self, name):
                raise ConfigError(f"--{name} is missing: mmkit lmms-task BENCHMARK --questions Q --annotations A --images DIR --out DIR")


def main(argv: Sequence[str] | None = None) -> Path:
    """Write the task's folder; gives it back."""
    words, start = list(sys.argv[1:] if argv is None else argv), time.monotonic()
    if words and not words[0].startswith("-"):
        words.insert(0, "--benchmark")
    config = load_config(LmmsTaskConfig, words)
    row = choose(config.benchmark, "", "")
    if row.scorer not in SCORERS:
        raise ConfigError(
            f"{row.name} is scored over all captions at once, which lmms-eval's own caption tasks do; questions can be a task here"
        )
    out = Path(config.out)
    if out.exists() and not config.overwrite:
        raise ConfigError(f"{out} exists already; name another folder, or add --overwrite")
    more: dict[str, Any] = {"split": config.split, "ocr": Path(config.ocr) if config.ocr else None}
    items, _ = read_items(config.questions, config.annotations or None, config.images, config.limit, row, **more)
    place = out.resolve()
    with atomic_folder(out, overwrite=config.overwrite) as folder:
        lines = [json.dumps(document(item, row, Path(config.images).resolve()), ensure_ascii=False) for item in items]
        atomic_write(folder / ROWS, "".join(f"{line}\n" for line in lines))
        atomic_write(folder / f"mmkit_{row.name}.yaml", task_yaml(row, place / ROWS))
        atomic_write(folder / "mmkit_task.py", f"from llm_stage.lmms_task import {', '.join(FUNCTIONS)}  # noqa: F401\n")
        made = manifest(seconds=time.monotonic() - start, name="lmms_task", state="finished")
        atomic_write(folder / "manifest.json", json.dumps(made, indent=1) + "\n")
    print(f"{len(items)} questions: lmms-eval --model mmkit --model_args pretrained=MODEL --include_path {out} --tasks mmkit_{row.name}")
    return out


def document(item: VqaItem, row: Benchmark, images: Path) -> dict[str, Any]:
    """One question as a line of the task's data; all values are texts, so that every line has the same types."""
    return {
        "question_id": json.dumps(item.question_id),
        "prompt": row.ask(item.question),
        "image": str(images / item.image) if item.image else "",
        "target": item.reference if item.answers else "",
        "scorer": row.scorer,
        "item": json.dumps({"question": item.question, "kind": item.kind, "answers": list(item.answers), "facts": dict(item.facts)}),
    }


def task_yaml(row: Benchmark, rows: Path) -> str:
    """The task's description, in lmms-eval's words."""
    metric = SCORERS[row.scorer].metric
    return f"""# {row.name} of mmkit; written by `mmkit lmms-task`
task: mmkit_{row.name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {json.dumps(str(rows))}
test_split: test
output_type: generate_until
doc_to_visual: !function mmkit_task.doc_to_visual
doc_to_text: !function mmkit_task.doc_to_text
doc_to_target: target
process_results: !function mmkit_task.process_results
generation_kwargs:
  max_new_tokens: {row.max_new_tokens}
  temperature: 0
  do_sample: false
metric_list:
  - metric: {metric}
    aggregation: !function mmkit_task.mean_percent
    higher_is_better: true
metadata:
  - version: 1.0
"""


# ---- what the task calls -----------------------------------------------------------------------------------------------------------------


def doc_to_visual(doc: Mapping[str, Any]) -> list[Any]:
    """The question's picture."""
    return [open_image(doc["image"], f"question {doc['question_id']}")] if doc["image"] else []


def doc_to_text(doc: Mapping[str, Any], lmms_eval_specific_kwargs: Any = None) -> str:
    """The words of the user's turn."""
    return str(doc["prompt"])


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """Score one answer, and say whose it is, for `mmkit score`."""
    scorer, name = SCORERS[doc["scorer"]], json.loads(doc["question_id"])
    value = scorer.score(_item(doc["question_id"], doc["item"]), str(results[0]).strip())
    return {scorer.metric: {"question_id": name, "score": value}}


def mean_percent(rows: Sequence[Mapping[str, Any]]) -> float:
    """The mean score in percent."""
    return 100 * sum(float(row["score"]) for row in rows) / len(rows)


def _item(name: str, packed: str) -> VqaItem:
    facts = json.loads(packed)
    return VqaItem(json.loads(name), facts["question"], "", "", facts["kind"], tuple(facts["answers"]), facts["facts"])


if __name__ == "__main__":
    cli_entry(main)
