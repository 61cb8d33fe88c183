"""Ask a LLaVA model the questions of a benchmark, and score its short answers as VQAv2 does.

    python llm_stage/eval_vqa.py --model runs/quickstart/llava/clip --questions Q.json --annotations A.json --images DIR --out DIR
    ... --shuffle_images                   the control: every question before another question's picture

In the output folder: `answers.jsonl`, the model's words, one line a question as they come (a second start goes on where the first
stopped); `scores.jsonl`, what they are worth; `summary.json`; `manifest.json`. Nothing is scored that was not answered.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from llm_stage.benchmarks import Benchmark, VqaItem, choose, most_frequent, read_items, read_json, shuffle_images
from llm_stage.chat_format import Turn
from llm_stage.generate import ChatModel, ChatRequest
from llm_stage.models import model_folder
from mmkit.checkpoint import atomic_write
from mmkit.config import cli_entry, load_config
from mmkit.errors import ConfigError, DataError
from mmkit.images import ImageError, open_image
from mmkit.manifest import manifest
from mmkit.records import Records, read_jsonl, repair
from mmkit.scoring import vqa_accuracy
from mmkit.stats import DRAWS, mean_interval

_WINDOW, _WINDOWS = 1 << 16, 16  # of each file, what the fingerprint of a model reads


@dataclass
class EvalVqaConfig:
    """Settings of one evaluation."""

    model: str = field(default="", metadata={"help": "folder of a trained LLaVA model, or a name of `mmkit list models`"})
    questions: str = field(default="", metadata={"help": "VQAv2-format questions (JSON)"})
    annotations: str = field(default="", metadata={"help": "VQAv2-format annotations with ten answers each (JSON)"})
    images: str = field(default="", metadata={"help": "folder the pictures' names are relative to"})
    out: str = field(default="", metadata={"help": "folder for answers.jsonl, scores.jsonl, summary.json, manifest.json"})
    benchmark: str = field(default="", metadata={"help": "row of llm_stage/benchmarks.py; empty goes by the question file, else own_vqa"})
    shuffle_images: bool = field(default=False, metadata={"help": "the control: each question before another question's picture"})
    shuffle_seed: int = field(default=0, metadata={"help": "which shuffle; the same for all models that are compared"})
    train_annotations: str = field(default="", metadata={"help": "annotations of the train split, for the most-frequent-answer baseline"})
    batch_size: int = field(default=8, metadata={"help": "questions answered at once"})
    max_new_tokens: int = field(default=0, metadata={"help": "longest answer; 0 is the benchmark's own limit"})
    limit: int = field(default=0, metadata={"help": "only the first so many questions; 0 is all"})
    on_bad_sample: Literal["error", "skip"] = field(
        default="error", metadata={"help": "an unreadable picture: stop, or count it as missing"}
    )
    overwrite: bool = field(default=False, metadata={"help": "throw earlier answers in --out away"})

    def validate(self) -> None:
        """Refuse a run without input or output.

        Raises:
            ConfigError: The message names the flag.
        """
        for name in ("model", "questions", "annotations", "images", "out"):
            if not getattr(self, name):
                raise ConfigError(f"--{name} is missing; --help lists all settings")
        if self.batch_size < 1:
            raise ConfigError(f"--batch_size is {self.batch_size}; at least 1 is right")
        if not Path(self.images).is_dir():
            raise ConfigError(f"--images '{self.images}' is no folder")


def main(argv: Sequence[str] | None = None) -> Path:
    """Evaluate one model on one benchmark.

    Args:
        argv: Command line; None is the process's own.

    Returns:
        The output folder.
    """
    config = load_config(EvalVqaConfig, argv)
    out, start = Path(config.out), time.monotonic()
    items, head = read_items(config.questions, config.annotations, config.images, config.limit)
    benchmark = choose(config.benchmark, config.shuffle_images, str(head.get("data_type", "")))
    if benchmark.shuffled:
        items = shuffle_images(items, config.shuffle_seed)
    baseline, baseline_from = baseline_answers(config)
    identity = identify(config, benchmark, head)
    model = ChatModel.load(config.model)
    open_folder(out, identity, config.overwrite)
    answers = answer_all(model, benchmark, items, config, out)
    scores = score(items, answers, benchmark)
    write_rows(out / "scores.jsonl", scores)
    summary = summarise(items, scores, answers, baseline, benchmark)
    summary = {
        "benchmark": benchmark.name,
        "model": model.name,
        "protocol": {**protocol(config, benchmark, head), "baseline": baseline_from},
        **summary,
        "encoder": model.encoder_card(),
    }
    atomic_write(out / "summary.json", json.dumps(summary, indent=1, ensure_ascii=False, default=str) + "\n")
    write_manifest(out, identity, "finished", time.monotonic() - start)
    print(as_text(summary))
    return out


# ---- what was asked, and of whom ---------------------------------------------------------------------------------------------------


def identify(config: EvalVqaConfig, benchmark: Benchmark, head: Mapping[str, Any]) -> dict[str, Any]:
    """All that an answer depends on: answers of another identity must not be mixed with these."""
    return {
        "benchmark": benchmark.name,
        "model": config.model,
        "model_fingerprint": fingerprint(model_folder(config.model)),
        "prompt": benchmark.prompt,
        "max_new_tokens": config.max_new_tokens or benchmark.max_new_tokens,
        "questions_sha256": head["sha256"],
        "shuffle_seed": config.shuffle_seed if benchmark.shuffled else None,
        "limit": config.limit,
    }


def fingerprint(folder: Path) -> str:
    """Hash a model folder: names, sizes and samples of every file. A whole 14 GB model would take a minute at every start."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder)} {size}\n".encode())
        with open(path, "rb") as file:
            for index in range(_WINDOWS):
                file.seek(max(0, size - _WINDOW) * index // (_WINDOWS - 1))
                digest.update(file.read(_WINDOW))
                if size <= _WINDOW:
                    break
    return digest.hexdigest()[:16]


def protocol(config: EvalVqaConfig, benchmark: Benchmark, head: Mapping[str, Any]) -> dict[str, Any]:
    """What a reader needs to repeat or to doubt the figures; `images` is relative to the summary's folder."""
    return {
        "prompt": "<image>\n" + benchmark.prompt,
        "decoding": "greedy",
        "max_new_tokens": config.max_new_tokens or benchmark.max_new_tokens,
        "scorer": benchmark.scorer,
        "batch_size": config.batch_size,
        "questions": Path(config.questions).name,
        "questions_sha256": head["sha256"],
        "annotations_sha256": head["annotations_sha256"],
        "images": os.path.relpath(config.images, config.out),
        "shuffle_seed": config.shuffle_seed if benchmark.shuffled else None,
        "limit": config.limit or None,
        "interval": f"95 % percentile bootstrap, {DRAWS} draws, resampled by image",
    }


def open_folder(out: Path, identity: Mapping[str, Any], overwrite: bool) -> None:
    """Begin the output folder, or go on in it if it holds answers to the same questions by the same model.

    Raises:
        DataError: The folder holds something else.
    """
    path = out / "manifest.json"
    if overwrite:
        for name in ("answers.jsonl", "scores.jsonl", "summary.json", "manifest.json"):
            (out / name).unlink(missing_ok=True)
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8")).get("identity", {})
        changed = [f"{key} was {before.get(key)!r}, is {value!r}" for key, value in identity.items() if before.get(key) != value]
        if changed:
            raise DataError(
                f"{out} holds answers of another evaluation: {'; '.join(changed)}. Give another --out, or --overwrite to throw them away"
            )
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out} exists and is no evaluation's folder (no manifest.json in it). Give another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_manifest(out, identity, "running", 0.0)


def write_manifest(out: Path, identity: Mapping[str, Any], state: str, seconds: float) -> None:
    """Say what made the folder; `seconds` is this start's share."""
    content = manifest(seconds=seconds, name="eval_vqa", state=state, identity=dict(identity))
    atomic_write(out / "manifest.json", json.dumps(content, indent=1) + "\n")


# ---- answers -----------------------------------------------------------------------------------------------------------------------


def answer_all(
    model: ChatModel, benchmark: Benchmark, items: Sequence[VqaItem], config: EvalVqaConfig, out: Path
) -> dict[Any, dict[str, Any]]:
    """Answer what has no answer yet, a batch at a time, each flushed to disk.

    Returns:
        Rows by question id; a row without "answer" has "missing", the reason.

    Raises:
        DataError: The file holds answers to questions that are not in this set.
        ImageError: A picture cannot be read, and --on_bad_sample is error.
    """
    path = out / "answers.jsonl"
    forget_missing(path)
    by_id = {item.question_id: item for item in items}
    with Records(path) as records:
        strange = [name for name in records.done if name not in by_id]
        if strange:
            raise DataError(
                f"{path} has {len(strange)} answers to questions that {config.questions} does not ask (first: {strange[0]}): it"
                " belongs to another benchmark. Give another --out, or --overwrite"
            )
        todo = sorted(
            (item for item in items if item.question_id not in records.done), key=lambda item: (len(item.question), str(item.question_id))
        )
        if len(todo) < len(items):
            print(f"{path}: {len(items) - len(todo)} of {len(items)} questions are answered already")
        limit = config.max_new_tokens or benchmark.max_new_tokens
        with tqdm(total=len(items), initial=len(items) - len(todo), desc=f"{benchmark.name} · {model.name}", unit="question") as progress:
            for start in range(0, len(todo), config.batch_size):
                batch = todo[start : start + config.batch_size]
                for row in answer_batch(model, benchmark, batch, config, limit):
                    records.append(row)
                progress.update(len(batch))
        return dict(records.done)


def answer_batch(
    model: ChatModel, benchmark: Benchmark, batch: Sequence[VqaItem], config: EvalVqaConfig, limit: int
) -> Iterator[dict[str, Any]]:
    """Answer one batch; a picture that cannot be read gives a row without answer, if that is allowed."""
    began, requests, asked = time.monotonic(), [], []
    for item in batch:
        try:
            image = open_image(Path(config.images) / item.image, where=f"question {item.question_id} of {config.questions}")
        except ImageError as error:
            if config.on_bad_sample == "error":
                raise
            yield {**_row(item, benchmark), "missing": str(error)}
            continue
        requests.append(ChatRequest(turns=[Turn("user", f"<image>\n{benchmark.ask(item.question)}")], images=[image]))
        asked.append(item)
    if not requests:
        return
    texts = model.generate(requests, max_new_tokens=limit, batch_size=config.batch_size, temperature=0.0)
    seconds = round((time.monotonic() - began) / len(asked), 4)
    for item, text in zip(asked, texts, strict=True):
        yield {**_row(item, benchmark), "answer": text.strip(), "seconds": seconds}


def _row(item: VqaItem, benchmark: Benchmark) -> dict[str, Any]:
    row: dict[str, Any] = {"question_id": item.question_id, "image": item.image, "question": item.question, "kind": item.kind}
    return {**row, "own_image": item.own_image} if benchmark.shuffled else row


def forget_missing(path: Path) -> None:
    """Drop the rows without answer, so that a new start asks for them again."""
    if not path.is_file():
        return
    repair(path)
    rows = read_jsonl(path)
    kept = [row for row in rows if "missing" not in row]
    if len(kept) < len(rows):
        write_rows(path, kept)


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a JSONL file in one piece."""
    atomic_write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


# ---- scores ------------------------------------------------------------------------------------------------------------------------


def score(items: Sequence[VqaItem], answers: Mapping[Any, Mapping[str, Any]], benchmark: Benchmark) -> list[dict[str, Any]]:
    """Score every answer in the order of the questions: fractions from 0 to 1. A question without answer has no row."""
    rows = []
    for item in items:
        answer = answers.get(item.question_id, {}).get("answer")
        if answer is None:
            continue
        value = vqa_accuracy(answer, item.answers, benchmark.scorer)
        row = {"question_id": item.question_id, "score": round(value, 4), "kind": item.kind, "image": item.own_image}
        rows.append({**row, "reference": item.reference, "answer": answer})
    return rows


def baseline_answers(config: EvalVqaConfig) -> tuple[dict[str, str], str]:
    """The most frequent answer per question kind, and a sentence on where it was counted."""
    path = config.train_annotations or config.annotations
    table = most_frequent(read_json(path, "annotations")["annotations"], path)
    if config.train_annotations:
        return table, f"most frequent answer per question kind, counted in {Path(path).name}"
    return table, "most frequent answer per question kind, counted in the evaluated set itself (higher than an honest guess)"


def summarise(
    items: Sequence[VqaItem],
    scores: Sequence[Mapping[str, Any]],
    answers: Mapping[Any, Mapping[str, Any]],
    baseline: Mapping[str, str],
    benchmark: Benchmark,
) -> dict[str, Any]:
    """Average with intervals: all questions, each kind, and the baseline on the same answered questions; values in percent."""
    missing = [item.question_id for item in items if item.question_id not in {row["question_id"] for row in scores}]
    if not scores:
        raise DataError(f"none of {len(items)} questions has an answer: there is nothing to score")
    by_id = {item.question_id: item for item in items}
    guesses = {
        row["question_id"]: vqa_accuracy(baseline.get(row["kind"], baseline[""]), by_id[row["question_id"]].answers, benchmark.scorer)
        for row in scores
    }
    metrics = {}
    kinds = sorted({row["kind"] for row in scores})
    for kind in ["", *(kinds if len(kinds) > 1 else [])]:
        rows = [row for row in scores if kind in ("", row["kind"])]
        images = [row["image"] for row in rows]
        suffix = f"/{kind}" if kind else ""
        metrics[f"vqa_accuracy{suffix}"] = metric([row["score"] for row in rows], images)
        metrics[f"most_frequent_answer{suffix}"] = metric([guesses[row["question_id"]] for row in rows], images)
    return {
        "n": len(scores),
        "metrics": metrics,
        "seconds": round(sum(float(row.get("seconds", 0.0)) for row in answers.values()), 1),
        "missing": len(missing),
        "missing_questions": {str(name): answers.get(name, {}).get("missing", "not answered") for name in missing},
        "baseline_answers": {kind: baseline.get(kind, baseline[""]) for kind in kinds},
    }


def metric(values: Sequence[float], images: Sequence[str]) -> dict[str, Any]:
    """One entry of `metrics`: percent with a 95 % interval, resampled by image."""
    estimate = mean_interval(values, images).scaled(100)
    return {"value": round(estimate.value, 2), "ci95": [round(estimate.low, 2), round(estimate.high, 2)], "n": estimate.n}


def as_text(summary: Mapping[str, Any]) -> str:
    """The summary for the terminal, a line a question kind."""
    lines = [
        f"{summary['benchmark']} · {summary['model']}: {summary['n']} answered, {summary['missing']} missing, {summary['seconds']:.0f} s"
    ]
    for name, value in summary["metrics"].items():
        if name.startswith("vqa_accuracy"):
            guess = summary["metrics"][name.replace("vqa_accuracy", "most_frequent_answer")]["value"]
            low, high = value["ci95"]
            lines.append(
                f"  {name:28s} {value['value']:6.2f} %  [{low:.2f}, {high:.2f}]  n {value['n']:5d}  most frequent answer {guess:.2f} %"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    cli_entry(main)
