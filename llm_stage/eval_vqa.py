"""Ask a LLaVA model the questions of a benchmark, and score its answers by the benchmark's own rule.

    python llm_stage/eval_vqa.py --model runs/quickstart/llava/clip --questions Q.json --annotations A.json --images DIR --out DIR
    ... --benchmark pope --questions POPE_FOLDER --images val2014    a row of llm_stage/benchmarks.py, its files as downloaded
    ... --control shuffled                 a control: another question's picture; blank, a grey one; text_only, none

In the output folder: `answers.jsonl`, the model's words, one line a question as they come (a second start goes on where the first
stopped); `scores.jsonl`, what they are worth; `summary.json`; `submission.*`, what the benchmark's server takes; `manifest.json`. Nothing
is scored that was not answered.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from llm_stage.asking import request_for
from llm_stage.benchmark_scores import score, score_rows, summarise, summary_text
from llm_stage.benchmarks import (
    Benchmark,
    VqaItem,
    choose,
    controlled,
    data_type_of,
    most_frequent,
    most_frequent_of,
    own_row,
    prompt_words,
    read_items,
    read_json,
)
from llm_stage.blip2_protocols import PROTOCOLS, blip2_row, decoding_of
from llm_stage.chat_models import Chat, load_chat
from llm_stage.grounding import beside, grounding
from llm_stage.models import fingerprint, model_folder
from llm_stage.submissions import write_submission
from mmkit.checkpoint import atomic_write
from mmkit.config import cli_entry, load_config
from mmkit.errors import ConfigError, DataError
from mmkit.evaluation import Ranks, gather_parts, merge_parts, part_records
from mmkit.images import ImageError
from mmkit.manifest import manifest
from mmkit.stats import DRAWS

_NO_PICTURES = ("blank", "text_only")  # controls that need no picture files


OWN_FILES = (
    "answers.jsonl", "scores.jsonl", "summary.json", "manifest.json", "submission.json", "submission.jsonl", "submission.xlsx",
)  # fmt: skip


@dataclass
class EvalVqaConfig:
    """Settings of one evaluation."""

    model: str = field(default="", metadata={"help": "folder of a trained LLaVA or BLIP-2, or a name of `mmkit list models`"})
    questions: str = field(default="", metadata={"help": "the benchmark's question file (POPE, MME, ScienceQA: or its folder)"})
    annotations: str = field(default="", metadata={"help": "the file of the answers, where it is another one (VQAv2, OK-VQA, own sets)"})
    images: str = field(default="", metadata={"help": "folder the pictures' names are relative to (MMBench: where they are unpacked)"})
    ocr: str = field(default="", metadata={"help": "TextVQA's Rosetta file, for textvqa_ocr"})
    out: str = field(default="", metadata={"help": "folder for answers.jsonl, scores.jsonl, summary.json, manifest.json"})
    benchmark: str = field(
        default="",
        metadata={"help": "row of llm_stage/benchmarks.py, or a YAML file with your own; empty goes by the question file, else own_vqa"},
    )
    scorer: str = field(default="", metadata={"help": "another scorer than the row's: vqa_2017, m4c, exact, anls, lmms_gqa, ..."})
    prompt: str = field(default="", metadata={"help": "another prompt than the row's: a name of PROMPTS, or words with {question} in them"})
    protocol: str = field(default="", metadata={"help": f"BLIP-2's prompt and decoding by name: {', '.join(PROTOCOLS)}"})
    split: str = field(default="", metadata={"help": "of a file that holds several (ScienceQA); empty is the row's own"})
    unlabelled: bool = field(default=False, metadata={"help": "a test split without public answers: only the submission is written"})
    submission_questions: str = field(
        default="", metadata={"help": "VQAv2's test-dev: the questions of all of test2015, whose ids the upload must hold"}
    )
    control: Literal["", "shuffled", "blank", "text_only"] = field(
        default="", metadata={"help": "another question's picture, a grey one, or none: what is still right needs no picture"}
    )
    against: str = field(default="", metadata={"help": "a control: the evaluation with its own pictures; empty looks beside --out"})
    shuffle_images: bool = field(default=False, metadata={"help": "the same as --control shuffled"})
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
        """Refuse a run without input or output; take the files that a row of one's own names.

        Raises:
            ConfigError: The message names the flag.
        """
        if self.benchmark.endswith((".yaml", ".yml")):
            for name, path in own_row(self.benchmark)[1].items():
                setattr(self, name, getattr(self, name) or path)
        self.control = self.control or ("shuffled" if self.shuffle_images else "")
        needs_pictures = self.control not in _NO_PICTURES and not self.benchmark.endswith(_NO_PICTURES)
        for name in ("model", "questions", *(["images"] if needs_pictures else []), "out"):
            if not getattr(self, name):
                raise ConfigError(f"--{name} is missing; --help lists all settings")
        if self.batch_size < 1:
            raise ConfigError(f"--batch_size is {self.batch_size}; at least 1 is right")
        if self.images and not Path(self.images).is_dir() and not self.benchmark.startswith("mmbench"):
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
    benchmark = row_for(config)
    more: dict[str, Any] = {"ocr": Path(config.ocr) if config.ocr else None, "split": config.split, "unlabelled": config.unlabelled}
    items, head = read_items(config.questions, config.annotations, config.images or None, config.limit, benchmark, **more)
    items = controlled(items, benchmark, config.shuffle_seed)
    baseline, baseline_from = baseline_answers(config, benchmark, items)
    identity = identify(config, benchmark, head)
    if config.against and not benchmark.control_of:
        raise ConfigError(f"--against is for controls (--control shuffled, blank, text_only), and {benchmark.name} is none")
    ranks = Ranks()
    model = load_chat(config.model, verbatim=True, **({"device": ranks.device} if ranks.count > 1 else {}))
    open_folder(out, identity, config.overwrite, ranks)
    answers = answer_all(model, benchmark, items, config, out, ranks)
    if ranks.first:
        sum_up(config, benchmark, items, answers, model, identity, head, baseline, baseline_from, time.monotonic() - start)
    ranks.wait()
    return out


def sum_up(
    config: EvalVqaConfig, benchmark: Benchmark, items: Sequence[VqaItem], answers: Mapping[Any, dict[str, Any]], model: Chat,
    identity: Mapping[str, Any], head: Mapping[str, Any], baseline: Mapping[str, str], baseline_from: str, seconds: float,
) -> None:  # fmt: skip
    """Write the upload, the scores and the summary."""
    out = Path(config.out)
    if not benchmark.control_of:
        write_submission(benchmark.upload, items, answers, out, Path(config.submission_questions) if config.submission_questions else None)
    if config.unlabelled:
        write_manifest(out, identity, "finished", seconds)
        print(f"{benchmark.name} · {model.name}: {len(items)} questions without public answers; what the server takes is in {out}")
        return
    scored = score(items, answers, benchmark.scoring)
    rows = score_rows(scored)
    write_rows(out / "scores.jsonl", rows)
    summary = {
        "benchmark": benchmark.name,
        "model": model.name,
        "protocol": {**protocol(config, benchmark, head), "baseline": baseline_from},
        **summarise(items, scored, answers, baseline, benchmark.scoring),
        "encoder": model.encoder_card(),
    }
    real = Path(config.against) if config.against else beside(out, benchmark.control_of, identity) if benchmark.control_of else None
    if real is not None:
        summary["grounding"] = grounding(real, benchmark.control_of, benchmark.control, rows, out)
    atomic_write(out / "summary.json", json.dumps(summary, indent=1, ensure_ascii=False, default=str) + "\n")
    write_manifest(out, identity, "finished", seconds)
    print(summary_text(summary))


def row_for(config: EvalVqaConfig) -> Benchmark:
    """The benchmark's row with the scorer, the prompt and the control that were asked for.

    Raises:
        ConfigError: It is one of captions, which are scored by another command.
    """
    row = choose(config.benchmark, config.control, "" if config.benchmark else data_type_of(config.questions))
    row = replace(row, scorer=config.scorer or row.scorer, prompt=prompt_words(config.prompt) if config.prompt else row.prompt)
    if row.scorer == "captions":
        raise ConfigError(f"{row.name} is a benchmark of captions: mmkit eval captions --benchmark {row.name}")
    row.scoring  # noqa: B018 - an unknown scorer is refused before anything is read
    return blip2_row(row, config.model, config.prompt, config.protocol)


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
        **({"ocr": hashlib.sha256(Path(config.ocr).read_bytes()).hexdigest()} if config.ocr else {}),
        **({"split": config.split} if config.split else {}),
        **({"decoding": decoding_of(config.protocol)} if config.protocol else {}),
    }


def protocol(config: EvalVqaConfig, benchmark: Benchmark, head: Mapping[str, Any]) -> dict[str, Any]:
    """What a reader needs to repeat or to doubt the figures; `images` is relative to the summary's folder."""
    return {
        "prompt": ("" if benchmark.control == "text_only" else "<image>\n") + benchmark.prompt,
        "prompt_name": benchmark.prompt_name,
        "decoding": decoding_of(config.protocol) or "greedy",
        "protocol": config.protocol or None,
        "max_new_tokens": config.max_new_tokens or benchmark.max_new_tokens,
        "scorer": benchmark.scorer,
        "batch_size": config.batch_size,
        "questions": Path(config.questions).name,
        "questions_sha256": head["sha256"],
        "annotations_sha256": head.get("annotations_sha256", head["sha256"]),
        "split": config.split or benchmark.split or None,
        "images": os.path.relpath(config.images or ".", config.out),
        "control": benchmark.control or None,
        "shuffle_seed": config.shuffle_seed if benchmark.shuffled else None,
        "limit": config.limit or None,
        "interval": f"95 % percentile bootstrap, {DRAWS} draws, resampled by image",
    }


def open_folder(out: Path, identity: Mapping[str, Any], overwrite: bool, ranks: Ranks) -> None:
    """Begin the output folder, or go on in it if it holds answers to the same questions by the same model.

    Raises:
        DataError: The folder holds something else.
    """
    path = out / "manifest.json"
    held = path.is_file()
    if not held and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out} exists and is no evaluation's folder (no manifest.json in it). Give another --out")
    if held and not overwrite:
        before = json.loads(path.read_text(encoding="utf-8")).get("identity", {})
        changed = [f"{key} was {before.get(key)!r}, is {value!r}" for key, value in identity.items() if before.get(key) != value]
        if changed:
            raise DataError(
                f"{out} holds answers of another evaluation: {'; '.join(changed)}. Give another --out, or --overwrite to throw them away"
            )
    ranks.wait()  # all have looked before anything is written
    if ranks.first:
        for name in OWN_FILES if overwrite else ():
            (out / name).unlink(missing_ok=True)
        out.mkdir(parents=True, exist_ok=True)
        write_manifest(out, identity, "running", 0.0)
        gather_parts(out)
    ranks.wait()


def write_manifest(out: Path, identity: Mapping[str, Any], state: str, seconds: float) -> None:
    """Say what made the folder; `seconds` is this start's share."""
    content = manifest(seconds=seconds, name="eval_vqa", state=state, identity=dict(identity))
    atomic_write(out / "manifest.json", json.dumps(content, indent=1) + "\n")


# ---- answers -----------------------------------------------------------------------------------------------------------------------


def answer_all(
    model: Chat, benchmark: Benchmark, items: Sequence[VqaItem], config: EvalVqaConfig, out: Path, ranks: Ranks
) -> dict[Any, dict[str, Any]]:
    """Answer what has no answer yet, a batch at a time, each flushed to disk; several processes share the questions.

    Returns:
        Rows by question id; a row without "answer" has "missing", the reason.

    Raises:
        DataError: The file holds answers to questions that are not in this set.
        ImageError: A picture cannot be read, and --on_bad_sample is error.
    """
    names = [item.question_id for item in items]
    with part_records(out, ranks) as (records, done):
        if strange := sorted(map(str, done - set(names))):
            raise DataError(
                f"{out / 'answers.jsonl'} has {len(strange)} answers to questions that {config.questions} does not ask (first: {strange[0]}):"
                " it belongs to another benchmark. Give another --out, or --overwrite"
            )
        left = sorted(
            (item for item in items if item.question_id not in done), key=lambda item: (len(item.question), str(item.question_id))
        )
        if len(left) < len(items) and ranks.first:
            print(f"{out / 'answers.jsonl'}: {len(items) - len(left)} of {len(items)} questions are answered already")
        todo, limit = ranks.share(left), config.max_new_tokens or benchmark.max_new_tokens
        title = f"{benchmark.name} · {model.name}"
        with tqdm(total=len(todo), desc=title, unit="question", disable=not ranks.first) as progress:
            for start in range(0, len(todo), config.batch_size):
                batch = todo[start : start + config.batch_size]
                for row in answer_batch(model, benchmark, batch, config, limit):
                    records.append(row)
                progress.update(len(batch))
    return {row["question_id"]: row for row in merge_parts(out, names, ranks)}


def answer_batch(
    model: Chat, benchmark: Benchmark, batch: Sequence[VqaItem], config: EvalVqaConfig, limit: int
) -> Iterator[dict[str, Any]]:
    """Answer one batch; a picture that cannot be read gives a row without answer, if that is allowed."""
    began, requests, asked = time.monotonic(), [], []
    for item in batch:
        try:
            request = request_for(item, benchmark, config.images, f"question {item.question_id} of {config.questions}")
        except ImageError as error:
            if config.on_bad_sample == "error":
                raise
            yield {**_row(item, benchmark), "missing": str(error)}
            continue
        requests.append(request)
        asked.append(item)
    if not requests:
        return
    texts = model.generate(requests, max_new_tokens=limit, batch_size=config.batch_size, temperature=0.0, **decoding_of(config.protocol))
    seconds = round((time.monotonic() - began) / len(asked), 4)
    for item, text in zip(asked, texts, strict=True):
        yield {**_row(item, benchmark), "answer": text.strip(), "seconds": seconds}


def _row(item: VqaItem, benchmark: Benchmark) -> dict[str, Any]:
    row: dict[str, Any] = {"question_id": item.question_id, "image": item.image, "question": item.question, "kind": item.kind}
    return {**row, "own_image": item.own_image} if benchmark.control_of else row


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a JSONL file in one piece."""
    atomic_write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


# ---- scores ------------------------------------------------------------------------------------------------------------------------


def baseline_answers(config: EvalVqaConfig, benchmark: Benchmark, items: Sequence[VqaItem]) -> tuple[dict[str, str], str]:
    """The most frequent answer per question kind, and a sentence on where it was counted; nothing for a split without answers."""
    if config.unlabelled:
        return {}, ""
    here = "most frequent answer per question kind, counted in the evaluated set itself (higher than an honest guess)"
    if benchmark.reader != "vqa":
        if config.train_annotations:
            raise ConfigError(
                f"--train_annotations is for benchmarks in VQAv2's format, and {benchmark.name} is read as {benchmark.reader}"
            )
        return most_frequent_of([(item.kind, item.reference) for item in items]), here
    path = config.train_annotations or config.annotations
    table = most_frequent(read_json(path, "annotations")["annotations"], path)
    if config.train_annotations:
        return table, f"most frequent answer per question kind, counted in {Path(path).name}"
    return table, here


if __name__ == "__main__":
    cli_entry(main)
