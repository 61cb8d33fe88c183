"""LLaVA-Bench: long answers about images, scored by a language model as judge against a reference.

    mmkit eval llava-bench --model runs/stage2/model --questions qa90_questions.jsonl --reference qa90_gpt4_answer.jsonl \\
        --context caps_boxes_coco2014_val_80.jsonl --rules rule.json --images val2014 --judge qwen3-32b@http://localhost:8000/v1 --out OUT
    mmkit eval llava-bench --answers theirs.jsonl ... --both_orders true         answers of any other model; the judge's taste for a place measured
    mmkit eval llava-bench --replay review.jsonl --questions Q --out OUT         recorded reviews alone

Three files, each gone on with by question id: answers.jsonl, reviews.jsonl (a line a question and order, what the judge wrote), summary.json.
judge_cache.jsonl keeps every call. What was not judged is counted, and never a score; above one in twenty the figure is marked invalid.

The score is 100 x mean(candidate) / mean(reference), a ratio of means. It says "judge = X": figures of different judges cannot be compared.

Source: LLaVA (Liu et al., 2023), section 5.1, and its evaluation scripts, whose question, context and rule files are read as they are.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

if __package__ in (None, ""):  # started as a file: its folder is on sys.path, the packages' folder is not
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from tqdm import tqdm

from llm_stage.chat_format import Turn
from llm_stage.chat_models import load_chat
from llm_stage.endpoint import KEY_VARIABLE, Endpoint
from llm_stage.generate import ChatRequest
from llm_stage.judge import MAX_TOKENS, TEMPERATURE, Case, Judge, MockJudge, context_of, parse_scores, same_family, self_test
from mmkit.checkpoint import atomic_write
from mmkit.config import cli_entry, load_config
from mmkit.errors import ConfigError, DataError
from mmkit.evaluation import EvaluationFolder, Ranks
from mmkit.records import Records, read_jsonl
from mmkit.stats import bootstrap_ratio

INVALID_ABOVE = 0.05  # share of questions without a verdict
CATEGORIES = ("conv", "detail", "complex")
OWN = ("reviews.jsonl", "judge_cache.jsonl", "scores.jsonl")


@dataclass
class LlavaBenchConfig:
    """Settings of one evaluation."""

    model: str = field(default="", metadata={"help": "folder of a trained LLaVA or BLIP-2, a name of `mmkit list models`, or MODEL@URL"})
    answers: str = field(
        default="", metadata={"help": "instead of --model: JSONL with question_id and text (or answer) of any other model"}
    )
    candidate: str = field(default="", metadata={"help": "the candidate's name, for the summary and the warning about families"})
    questions: str = field(default="", metadata={"help": "JSONL: question_id, image, text, category"})
    reference: str = field(default="", metadata={"help": "JSONL of the reference answers: question_id, text"})
    context: str = field(
        default="", metadata={"help": "JSONL of the images in words: image, captions, instances; or caption (in the wild)"}
    )
    rules: str = field(default="", metadata={"help": "LLaVA's rule.json: role and prompt for each category"})
    images: str = field(default="", metadata={"help": "folder of the images (COCO's val2014 names are found too)"})
    benchmark: Literal["llava_bench_coco", "llava_bench_wild"] = field(default="llava_bench_coco", metadata={"help": "which rules"})
    judge: str = field(default="", metadata={"help": "MODEL@URL of an OpenAI-compatible endpoint; mock scores by a hash, to try the tools"})
    key_variable: str = field(default=KEY_VARIABLE, metadata={"help": "environment variable with the judge's key; never written anywhere"})
    both_orders: bool = field(default=False, metadata={"help": "judge each question twice, the answers in both places; the mean counts"})
    self_test: int = field(default=20, metadata={"help": "pairs with a known winner that the judge has to tell apart first; 0: none"})
    temperature: float = field(default=TEMPERATURE, metadata={"help": "of the judge"})
    judge_tokens: int = field(default=MAX_TOKENS, metadata={"help": "longest verdict"})
    tries: int = field(default=5, metadata={"help": "calls for one verdict before it is given up"})
    backoff: float = field(default=1.0, metadata={"help": "seconds before the second try; doubled each time"})
    timeout: float = field(default=120.0, metadata={"help": "seconds for one call"})
    workers: int = field(default=4, metadata={"help": "calls at once"})
    price: list[float] = field(default_factory=lambda: [0.0, 0.0], metadata={"help": "of a million tokens in and out, for the cost"})
    replay: str = field(default="", metadata={"help": "recorded reviews (LLaVA's, or reviews.jsonl) instead of a judge"})
    out: str = field(default="", metadata={"help": "folder for answers.jsonl, reviews.jsonl, summary.json, manifest.json"})
    batch_size: int = field(default=8, metadata={"help": "questions answered at once"})
    max_new_tokens: int = field(default=1024, metadata={"help": "longest answer"})
    limit: int = field(default=0, metadata={"help": "only the first so many questions; 0: all"})
    overwrite: bool = field(default=False, metadata={"help": "throw what is in --out away"})

    def validate(self) -> None:
        """Refuse a run without what its kind needs."""
        if not self.out or not self.questions:
            raise ConfigError(f"--{'out' if not self.out else 'questions'} is missing; --help lists all settings")
        if self.replay:
            return
        if bool(self.model) == bool(self.answers):
            raise ConfigError("whose answers? --model FOLDER, or --answers FILE of any other model: one of them")
        if self.model and not self.images:
            raise ConfigError("--images is missing: the folder of the pictures that --model is asked about")
        if missing := [name for name in ("reference", "context", "rules") if self.judge and not getattr(self, name)]:
            raise ConfigError(f"--{missing[0]} is missing: a judge is told the reference, the image in words, and a rule")
        if len(self.price) != 2:
            raise ConfigError(f"--price is {self.price}; two numbers are right, for a million tokens in and out")


def main(argv: Sequence[str] | None = None) -> Path:
    """Answer, judge, and sum up; give the output folder."""
    config = load_config(LlavaBenchConfig, argv)
    began = time.monotonic()
    folder = EvaluationFolder(config.out, "eval_llava_bench", resume=True, overwrite=config.overwrite, own=OWN)
    folder.refuse()
    questions = read_by_id(config.questions)
    questions = dict(list(questions.items())[: config.limit or None])
    if config.replay:
        return replay(config, folder, questions)
    answers = read_by_id(config.answers) if config.answers else {}
    cases = None if not config.judge else read_cases(config, questions)
    judge_of = open_judge(config) if config.judge else None
    folder.open(identity(config), Ranks("cpu"))
    name = config.candidate or Path(config.model or config.answers).stem
    if config.model:
        name, answers = answer_all(config, questions, folder.path)
    if cases is None or judge_of is None:
        print(f"{folder.path / 'answers.jsonl'}: {len(answers)} answers; --judge MODEL@URL scores them")
        folder.close()
        return folder.path
    said = {key: str(answers[key].get("answer", answers[key].get("text", ""))) for key in questions if key in answers}
    with Records(folder.path / "judge_cache.jsonl", key="key") as cache:
        judge = Judge(judge_of, cache, config.temperature, config.judge_tokens)
        test = self_test(judge, known_winners(cases, config.self_test)) if config.self_test else None
        if test is not None:
            print(f"self-test of {judge_of.model}: {test['accuracy']} % right, {test['ties']} % ties, {test['consistent']} % consistent")
        reviews = review_all(config, judge, cases, said, folder.path)
        summary = summarise(reviews, questions, config, name, judge_of.model, test, judge)
    write_scores(folder.path, reviews, questions, config)
    folder.finish({**summary, "seconds": round(time.monotonic() - began, 1)})
    print(as_text(summary))
    return folder.path


def read_by_id(path: Path | str) -> dict[Any, dict[str, Any]]:
    """Read JSONL rows by question id.

    Raises:
        DataError: The file is missing, or an id comes twice or is missing.
    """
    if not Path(path).is_file():
        raise DataError(f"there is no file {path}; JSON Lines with a question_id each were expected")
    found: dict[Any, dict[str, Any]] = {}
    for number, row in enumerate(read_jsonl(Path(path)), 1):
        if "question_id" not in row or row["question_id"] in found:
            what = f"question_id {row['question_id']} comes twice" if "question_id" in row else "there is no question_id"
            raise DataError(f"{path}, line {number}: {what}; one line for each question is right")
        found[row["question_id"]] = row
    return found


def identity(config: LlavaBenchConfig) -> dict[str, Any]:
    """All that answers and reviews depend on."""
    names = ("model", "answers", "questions", "benchmark", "max_new_tokens", "limit", "judge", "both_orders", "temperature", "judge_tokens")
    return {name: getattr(config, name) for name in names}


# ---- answers -------------------------------------------------------------------------------------------------------------------------


def answer_all(config: LlavaBenchConfig, questions: Mapping[Any, Mapping[str, Any]], out: Path) -> tuple[str, dict[Any, dict[str, Any]]]:
    """Let the model answer what it has not answered yet; its name, and rows by id.

    Raises:
        DataError: A picture is not there.
    """
    paths = {key: find_picture(Path(config.images), str(row["image"])) for key, row in questions.items()}
    chat = load_chat(config.model)
    with Records(out / "answers.jsonl") as records:
        todo = [key for key in questions if key not in records.done]
        for start in tqdm(range(0, len(todo), config.batch_size), desc=f"{config.benchmark} · {chat.name}", unit="batch"):
            batch = todo[start : start + config.batch_size]
            requests = [ChatRequest([Turn("user", f"<image>\n{questions[key]['text']}")], [paths[key]]) for key in batch]
            for key, text in zip(batch, chat.generate(requests, config.max_new_tokens, config.batch_size), strict=True):
                row = {"question_id": key, "image": questions[key]["image"], "question": questions[key]["text"]}
                records.append({**row, "kind": questions[key].get("category", ""), "answer": text})
        return config.candidate or str(chat.name), dict(records.done)


def find_picture(root: Path, name: str) -> Path:
    """Find a picture by its name, or by COCO val2014's.

    Raises:
        DataError: Neither is there.
    """
    for path in (root / name, root / f"COCO_val2014_{name}"):
        if path.is_file():
            return path
    raise DataError(f"no picture {root / name} (nor COCO_val2014_{name} beside it): give the folder of the pictures, --images DIR")


# ---- reviews -------------------------------------------------------------------------------------------------------------------------


def read_cases(config: LlavaBenchConfig, questions: Mapping[Any, Mapping[str, Any]]) -> dict[Any, Case]:
    """Put together what the judge is told of each question; the candidate is still empty.

    Raises:
        DataError: A question has no reference, context or rule; it is named.
    """
    references = read_by_id(config.reference)
    contexts = {str(row.get("image", row.get("id"))): row for row in read_jsonl(Path(config.context))}
    rules = json.loads(Path(config.rules).read_text(encoding="utf-8"))
    wild = config.benchmark == "llava_bench_wild"
    cases = {}
    for key, row in questions.items():
        category = ("llava_bench_" if wild else "") + str(row.get("category", ""))
        image = contexts.get(str(row["image"]))
        wanted = {
            "reference": (references.get(key), config.reference),
            "context": (image, config.context),
            "rule": (rules.get(category), config.rules),
        }
        for what, (held, file) in wanted.items():
            if held is None:
                raise DataError(f"{config.questions}: question {key} (image {row['image']}, category {category}) has no {what} in {file}")
        assert image is not None
        told = image.get("captions") or image.get("caption")
        captions = [told] if isinstance(told, str) else list(told or [])
        boxes = [] if wild else image.get("instances", [])
        rule = rules[category]
        cases[key] = Case(
            key, str(row["text"]), context_of(captions, boxes), str(references[key]["text"]), "", rule["prompt"], rule["role"]
        )
    return cases


def open_judge(config: LlavaBenchConfig) -> Endpoint | MockJudge:
    """Open the judge's endpoint; nothing is sent yet."""
    if config.judge == "mock":
        return MockJudge()
    return Endpoint.parse(
        config.judge, key_variable=config.key_variable, tries=config.tries, backoff=config.backoff, timeout=config.timeout
    )


def known_winners(cases: Mapping[Any, Case], count: int) -> list[Case]:
    """Pairs with a known winner: a question's own reference against that of a question about another image."""
    order = list(cases.values())
    pairs: list[Case] = []
    for place, case in enumerate(order):
        other = next((o for o in order[place + 1 :] + order[:place] if o.context != case.context and o.reference != case.reference), None)
        if other is not None and len(pairs) < count:
            pairs.append(Case(**{**case.__dict__, "candidate": other.reference}))
    return pairs


def review_all(
    config: LlavaBenchConfig, judge: Judge, cases: Mapping[Any, Case], answers: Mapping[Any, str], out: Path
) -> dict[Any, list[dict[str, Any]]]:
    """Judge what has no verdict yet; rows by question id, one for each order. Failures are asked for again by the next start."""
    path = out / "reviews.jsonl"
    if path.is_file():  # verdicts stay, failures are tried again
        kept = [row for row in read_jsonl(path) if row.get("scores")]
        atomic_write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))
    orders = (False, True) if config.both_orders else (False,)
    with Records(path, key="review_id") as records:
        todo = [
            (key, swapped) for key in cases for swapped in orders if key in answers and f"{key}/{int(swapped)}" not in records.done
        ]  # fmt: skip

        def one(item: tuple[Any, bool]) -> dict[str, Any]:
            key, swapped = item
            row = {"review_id": f"{key}/{int(swapped)}", "question_id": key, "swapped": swapped}
            return {**row, **judge.judge(Case(**{**cases[key].__dict__, "candidate": answers[key]}), swapped)}

        with ThreadPoolExecutor(max(1, config.workers)) as pool:
            for row in tqdm(pool.map(one, todo), total=len(todo), desc=f"judge {judge.asks.model}", unit="review"):
                records.append(row)
        found: dict[Any, list[dict[str, Any]]] = {}
        for row in records.done.values():
            found.setdefault(row["question_id"], []).append(row)
    return found


def replay(config: LlavaBenchConfig, folder: EvaluationFolder, questions: Mapping[Any, Mapping[str, Any]]) -> Path:
    """Sum up recorded reviews; their scores are read from what the judge wrote.

    Raises:
        DataError: A review is of no question.
    """
    recorded = read_jsonl(Path(config.replay))
    if strange := [row.get("question_id") for row in recorded if row.get("question_id") not in questions]:
        raise DataError(f"{config.replay} has reviews of questions that {config.questions} does not hold, such as {strange[0]}")
    folder.open({"replay": Path(config.replay).name, "questions": config.questions}, Ranks("cpu"))
    reviews: dict[Any, list[dict[str, Any]]] = {}
    for row in recorded:
        scores = row.get("scores") or parse_scores(str(row.get("text", row.get("content", ""))))
        found = {"question_id": row["question_id"], "swapped": bool(row.get("swapped")), "scores": list(scores) if scores else None}
        reviews.setdefault(row["question_id"], []).append(found)
    summary = summarise(reviews, questions, config, config.candidate or Path(config.replay).stem, "recorded", None, None)
    write_scores(folder.path, reviews, questions, config)
    folder.finish(summary)
    print(as_text(summary))
    return folder.path


# ---- the summary ---------------------------------------------------------------------------------------------------------------------


def verdict(rows: Sequence[Mapping[str, Any]], orders: int) -> tuple[float, float] | None:
    """A question's scores, the mean over its orders; None unless every order was judged."""
    scores = [row["scores"] for row in rows if row.get("scores")]
    if len(scores) < orders:
        return None
    return sum(pair[0] for pair in scores) / len(scores), sum(pair[1] for pair in scores) / len(scores)


def summarise(
    reviews: Mapping[Any, Sequence[Mapping[str, Any]]], questions: Mapping[Any, Mapping[str, Any]], config: LlavaBenchConfig, name: str,
    judge_name: str, test: Mapping[str, Any] | None, judge: Judge | None,
) -> dict[str, Any]:  # fmt: skip
    """Give the summary: ratios of means with intervals, in all and by category; what was not judged; the judge's own record."""
    orders = 2 if config.both_orders else 1
    scores = {key: found for key in questions if (found := verdict(reviews.get(key, ()), orders)) is not None}
    kinds = sorted({str(row.get("category", "")) for row in questions.values()})
    metrics: dict[str, dict[str, Any]] = {}
    means: dict[str, dict[str, float]] = {}
    for kind in ["", *kinds] if len(kinds) > 1 else [""]:
        wanted = [key for key, row in questions.items() if kind in ("", row.get("category", ""))]
        judged = [key for key in wanted if key in scores]
        label = f"/{kind}" if kind else ""
        means[kind or "all"] = {"judged": len(judged), "of": len(wanted), "failed": len(wanted) - len(judged)}
        if judged and sum(scores[key][0] for key in judged):
            reference, candidate = ([scores[key][side] for key in judged] for side in (0, 1))
            clusters = [str(questions[key].get("image", key)) for key in judged]
            estimate = bootstrap_ratio(candidate, reference, clusters)
            metrics[f"relative{label}"] = {
                "value": round(estimate.value, 10),
                "ci95": [round(estimate.low, 2), round(estimate.high, 2)],
                "n": len(judged),
            }
            means[kind or "all"] |= {"reference": sum(reference) / len(judged), "candidate": sum(candidate) / len(judged)}
    if not metrics:
        raise DataError(f"none of {len(questions)} questions was judged: there is no score; reviews.jsonl says why of each")
    failed = 1 - len(scores) / len(questions)
    family = same_family(judge_name, config.candidate or name)
    both = [pair for rows in reviews.values() if len(pair := [row["scores"] for row in rows if row.get("scores")]) == 2]
    signs = [[(a > b) - (a < b) for a, b in pair] for pair in both]
    warnings = [f"judge and candidate are of one family ({family}): models like their own kind's answers"] if family else []
    warnings += [f"{100 * failed:.0f} % of the questions have no verdict: invalid"] if failed > INVALID_ABOVE else []
    warnings += ["the judge failed its self-test: its scores say little"] if test is not None and not test["trusted"] else []
    if config.benchmark == "llava_bench_coco" and judge_name != "recorded":
        warnings.append("not comparable with figures of another judge, such as the published ones of gpt-4-0314")
    return {
        "benchmark": config.benchmark, "title": f"LLaVA-Bench {config.benchmark.rsplit('_', 1)[1]} (judge = {judge_name})", "model": name,
        "unit": "100 x mean(candidate) / mean(reference)",
        "protocol": {
            "judge": judge_name, "temperature": config.temperature, "both_orders": config.both_orders, "scores": "ratio of means, 0 to 10 each",
            "interval": "95 % percentile bootstrap of the ratio, resampled by image", "answers": "greedy", "max_new_tokens": config.max_new_tokens,
        },
        "n": len(scores), "metrics": metrics, "means": means, "missing": len(questions) - len(scores), "valid": failed <= INVALID_ABOVE,
        "order_consistency": round(100 * sum(a == b for a, b in signs) / len(signs), 1) if signs else None,
        "self_test": dict(test) if test is not None else None, "warnings": warnings,
        "usage": None if judge is None else usage(judge, config),
    }  # fmt: skip


def write_scores(
    out: Path, reviews: Mapping[Any, Sequence[Mapping[str, Any]]], questions: Mapping[Any, Mapping[str, Any]], config: LlavaBenchConfig
) -> None:
    """Write scores.jsonl, a line for each judged question: both scores, the mean over the orders, for `mmkit compare`."""
    lines = []
    for key, row in questions.items():
        if (scores := verdict(reviews.get(key, ()), 2 if config.both_orders else 1)) is not None:
            line = {"question_id": key, "kind": row.get("category", ""), "image": str(row.get("image", key))}
            lines.append(json.dumps({**line, "reference_score": scores[0], "candidate_score": scores[1]}, ensure_ascii=False))
    atomic_write(out / "scores.jsonl", "".join(f"{line}\n" for line in lines))


def usage(judge: Judge, config: LlavaBenchConfig) -> dict[str, Any]:
    """What was asked of the judge, in all starts."""
    calls = judge.cache.done.values()
    read, written = (sum(int(call[name]) for call in calls) for name in ("prompt_tokens", "completion_tokens"))
    cost = (read * config.price[0] + written * config.price[1]) / 1e6
    return {"calls": len(calls), "prompt_tokens": read, "completion_tokens": written, "cost": round(cost, 4)}


def as_text(summary: Mapping[str, Any]) -> str:
    """The summary in a few lines."""
    lines = [f"{summary['title']} · {summary['model']}: judged {summary['n']} of {summary['n'] + summary['missing']}"]
    for name, metric in summary["metrics"].items():
        lines.append(f"  {name:24s} {metric['value']:6.1f} [{metric['ci95'][0]:.1f}, {metric['ci95'][1]:.1f}]  n {metric['n']}")
    return "\n".join([*lines, *(f"  note: {warning}" for warning in summary["warnings"])])


if __name__ == "__main__":
    cli_entry(main)
