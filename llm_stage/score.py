"""Score answers that any other model or harness made: no model, no pictures, the same summary.

    mmkit score gqa --answers answers.jsonl --questions testdev_balanced_questions.json --out DIR
    mmkit score vqav2 --answers answers.jsonl --questions Q.json --annotations A.json --out DIR

`answers.jsonl` has `question_id` and `answer` in every line (see `answer_files` for what else is understood).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from llm_stage.answer_files import Given, check_complete, read_answers
from llm_stage.benchmark_files import VqaItem, file_hash
from llm_stage.benchmark_scores import Scored, score, score_rows, summarise, summary_text
from llm_stage.benchmarks import Benchmark, choose, data_type_of, most_frequent_of, own_row, read_items
from llm_stage.caption_scores import check_java_metrics, choose_tokeniser, cut, summarise_captions
from llm_stage.submissions import write_submission
from mmkit.checkpoint import atomic_write
from mmkit.config import cli_entry, load_config
from mmkit.errors import ConfigError
from mmkit.evaluation import EvaluationFolder, Ranks, relative
from mmkit.stats import DRAWS

OWN_FILES = ("scores.jsonl", "submission.json", "submission.jsonl", "submission.xlsx")
_YES_NO = ("pope", "mme", "lmms_pope", "lmms_mme")


@dataclass
class ScoreConfig:
    """Settings of a scoring: mmkit score BENCHMARK --answers FILE --questions FILE --out DIR."""

    benchmark: str = field(default="", metadata={"help": "row of llm_stage/benchmarks.py, or a YAML file with your own; the first word"})
    answers: str = field(
        default="", metadata={"help": "question_id and answer a line (JSONL), a JSON list of them, or MME's result folder"}
    )
    questions: str = field(default="", metadata={"help": "the benchmark's question file (POPE, MME, ScienceQA: or its folder)"})
    annotations: str = field(default="", metadata={"help": "the file of the answers, where it is another one (VQAv2, OK-VQA, own sets)"})
    images: str = field(default="", metadata={"help": "folder of the pictures, for the report's examples; not needed to score"})
    ocr: str = field(default="", metadata={"help": "TextVQA's Rosetta file, for textvqa_ocr; not needed to score"})
    out: str = field(default="", metadata={"help": "folder for answers.jsonl, scores.jsonl, summary.json, manifest.json"})
    model: str = field(default="", metadata={"help": "name of the model, for tables; empty is what the file says, else its name"})
    scorer: str = field(default="", metadata={"help": "another scorer than the row's: vqa_2017, m4c, exact, anls, lmms_gqa, ..."})
    split: str = field(default="", metadata={"help": "of a file that holds several (ScienceQA); empty is the row's own"})
    prompt: str = field(default="", metadata={"help": "what the model was asked, for the record"})
    decoding: str = field(default="", metadata={"help": "how it decoded (greedy, beam 5, ...), for the record"})
    tokeniser: Literal["auto", "ptb_java", "ptb_python"] = field(
        default="auto", metadata={"help": "captions: what cuts them into words; auto is CoreNLP's own where Java and pycocoevalcap are"}
    )
    java_metrics: list[str] = field(default_factory=lambda: ["auto"], metadata={"help": "captions: [meteor], [meteor, spice], [none]"})
    missing: Literal["error", "leave_out", "wrong"] = field(
        default="error",
        metadata={"help": "questions without an answer: refuse the file, report them beside the score, count them as wrong"},
    )
    overwrite: bool = field(default=False, metadata={"help": "throw an earlier scoring in --out away"})

    def validate(self) -> None:
        """Refuse a scoring without input or output.

        Raises:
            ConfigError: The message names the flag.
        """
        if self.benchmark.endswith((".yaml", ".yml")):
            for name, path in own_row(self.benchmark)[1].items():
                setattr(self, name, getattr(self, name) or path)
        self.questions = self.questions or self.annotations  # captions and other one-file sets may be given under either name
        for name in ("answers", "questions", "out"):
            if not getattr(self, name):
                raise ConfigError(f"--{name} is missing; mmkit score BENCHMARK --answers A.jsonl --questions Q --annotations A --out DIR")


def main(argv: Sequence[str] | None = None) -> Path:
    """Score one file of answers.

    Args:
        argv: Command line; None is the process's own. A first word without dashes is the benchmark.

    Returns:
        The output folder.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words and not words[0].startswith("-"):
        words.insert(0, "--benchmark")
    config = load_config(ScoreConfig, words)
    row = choose(config.benchmark, "", "" if config.benchmark else data_type_of(config.questions))
    row = replace(row, scorer=config.scorer or row.scorer)
    folder = EvaluationFolder(config.out, "score", overwrite=config.overwrite, own=OWN_FILES)
    folder.refuse()
    items, head, given = read_all(config, row)
    if config.missing == "error":
        check_complete(given, items, Path(config.answers))
    parts, rows, how = scored_captions(config, items, given) if row.scorer == "captions" else scored_answers(config, row, items, given)
    summary = {
        "benchmark": row.name,
        "model": config.model or given.model or Path(config.answers).stem,
        "protocol": {**protocol(config, row, head, given), **how},
        **parts,
        "ignored_answers": given.ignored,
        "notes": given.notes,
    }
    identity = {"benchmark": row.name, "answers_sha256": summary["protocol"]["answers_sha256"], "questions_sha256": head["sha256"]}
    folder.open({**identity, "scorer": row.scorer, "missing": config.missing}, Ranks("cpu"))
    write_lines(
        folder.path / "answers.jsonl", [answer_row(item, given.rows[item.question_id]) for item in items if item.question_id in given.rows]
    )
    write_lines(folder.path / "scores.jsonl", rows)
    if not row.control_of:
        write_submission(row.upload, items, given.rows, folder.path)
    folder.finish(summary)
    for note in given.notes:
        print(f"{config.answers}: {note}", file=sys.stderr)
    print(summary_text(summary))
    return folder.path


Parts = tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any]]  # of the summary, lines of scores.jsonl, and of the protocol


def scored_answers(config: ScoreConfig, row: Benchmark, items: Sequence[VqaItem], given: Given) -> Parts:
    """Score answers to questions."""
    scored = with_missing(items, given, row, config.missing)
    baseline = most_frequent_of([(item.kind, item.reference) for item in items])
    parts = summarise(items, scored, given.rows, baseline, row.scoring)
    counted = "most frequent answer per question kind, counted in the evaluated set itself (higher than an honest guess)"
    wrong = {"counted_as_wrong": sum(not row.given for row in scored)}
    return {**parts, **wrong}, score_rows(scored), {"baseline": counted}


def scored_captions(config: ScoreConfig, items: Sequence[VqaItem], given: Given) -> Parts:
    """Score captions.

    Raises:
        ConfigError: Missing captions were to count as wrong, or a tokeniser or metric cannot run.
    """
    if config.missing == "wrong":
        raise ConfigError(
            "--missing wrong is for questions; a missing caption is left out (--missing leave_out), which changes CIDEr's weights"
        )
    java, tokeniser = check_java_metrics(config.java_metrics), choose_tokeniser(config.tokeniser)
    parts, rows = summarise_captions(items, given.rows, cut(items, given.rows, tokeniser), java)
    return parts, rows, {"scorer": "cider_d, weights of the references of the scored images", "tokeniser": tokeniser}


def read_all(config: ScoreConfig, row: Benchmark) -> tuple[list[VqaItem], dict[str, Any], Given]:
    """The benchmark's questions, what their file says of itself, and the answers joined to them.

    Words that OCR read are no part of a score: without them textvqa_ocr is read as textvqa.
    """
    reading = replace(row, reader="textvqa") if row.reader == "textvqa_ocr" and not config.ocr else row
    items, head = read_items(
        config.questions,
        config.annotations,
        config.images or None,
        0,
        reading,
        ocr=Path(config.ocr) if config.ocr else None,
        split=config.split,
    )
    return items, head, read_answers(Path(config.answers), items, head.get("not_asked", ()))


def with_missing(items: Sequence[VqaItem], given: Given, row: Benchmark, missing: str) -> list[Scored]:
    """Score what is there, and count what is not as asked.

    Raises:
        ConfigError: An empty answer would be read as a right one.
    """
    if missing != "wrong":
        return score(items, given.rows, row.scoring)
    if row.scorer in _YES_NO:
        raise ConfigError(
            f"--missing wrong: {row.scorer} reads yes or no out of every answer, so an empty one is not wrong; --missing leave_out"
        )
    rows = {row.item.question_id: row for row in score(items, given.rows, row.scoring)}
    return [rows.get(item.question_id, Scored(item, "", 0.0, given=False)) for item in items]


def protocol(config: ScoreConfig, row: Benchmark, head: Mapping[str, Any], given: Given) -> dict[str, Any]:
    """What a reader needs to repeat or to doubt the figures."""
    return {
        "prompt": config.prompt or given.prompt or "not told: the answers were made elsewhere",
        "decoding": config.decoding or "not told: the answers were made elsewhere",
        "scorer": row.scorer,
        "missing": config.missing,
        "answers": Path(config.answers).name,
        "answers_sha256": file_hash(*sorted(Path(config.answers).glob("*.txt")) if Path(config.answers).is_dir() else [config.answers]),
        "questions": Path(config.questions).name,
        "questions_sha256": head["sha256"],
        "annotations_sha256": head.get("annotations_sha256", head["sha256"]),
        "split": config.split or row.split or None,
        "images": relative(config.images, config.out) if config.images else None,
        "interval": f"95 % percentile bootstrap, {DRAWS} draws, resampled by image",
    }


def answer_row(item: VqaItem, answer: Mapping[str, Any]) -> dict[str, Any]:
    """A line of answers.jsonl, as evaluations write it."""
    return {"question_id": item.question_id, "image": item.image, "question": item.question, "kind": item.kind, **answer}


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a JSONL file in one piece."""
    atomic_write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


if __name__ == "__main__":
    cli_entry(main)
