"""A language model as judge of two answers: what it is told, how its scores are read, whether it can be trusted.

The judge sees no image; it is told captions and boxes. It scores assistant 1 (the reference) and assistant 2 (the candidate) from 0 to 10.
What cannot be read as two scores is a failure: it is counted, and never becomes a number.

Source: LLaVA, llava/eval/eval_gpt_review_visual.py (the message). Its rules are read from its own rule.json, which is not shipped here.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from llm_stage.endpoint import Endpoint, EndpointError, Reply
from mmkit.errors import DataError
from mmkit.records import Records

SYSTEM = "You are a helpful and precise assistant for checking the quality of the answer."
TEMPERATURE, MAX_TOKENS = 0.2, 1024
MOST = 10.0
GIVE_UP = 5  # questions in a row without an answer: the endpoint is down, and hours of waiting would not change that
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)"
_THOUGHT = re.compile(r"<think>.*?</think>", re.DOTALL)
_LABELLED = re.compile(rf"assistant[\s_]*([12])\W{{0,4}}\s*({_NUMBER})", re.IGNORECASE)
_PAIR = re.compile(rf"(?:scores?\W{{0,4}}\s*)?[\[(]?\s*({_NUMBER})\s*(?:,\s*|\s+)({_NUMBER})\s*[\])]?\.?", re.IGNORECASE)
FAMILIES = {
    "llama": ("llama", "vicuna", "alpaca"), "qwen": ("qwen", "qwq"), "gpt": ("gpt-", "chatgpt", "openai"), "mistral": ("mistral", "mixtral"),
    "gemma": ("gemma", "gemini"), "smollm": ("smollm",), "phi": ("phi-",), "claude": ("claude",), "opt": ("opt-",), "deepseek": ("deepseek",),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One question to be judged.

    Attributes:
        question_id: Its id.
        question: Asked of both.
        context: Captions and boxes, as the judge is told them.
        reference, candidate: The answers.
        rule: What the judge is told to do.
        role: How the assistants are called.
    """

    question_id: Any
    question: str
    context: str
    reference: str
    candidate: str
    rule: str
    role: str = "Assistant"


def context_of(captions: Sequence[str], boxes: Sequence[Mapping[str, Any]] = ()) -> str:
    """Tell an image in words: captions a line each, an empty line, then "category: [x1, y1, x2, y2]" a line each."""
    lines = [f"{box['category']}: {list(box['bbox'])}" for box in boxes]
    return "\n".join(captions) + ("\n\n" + "\n".join(lines) if lines else "")


def message(case: Case, swapped: bool = False) -> str:
    """Write the user's message, equal to LLaVA's to the byte.

    Args:
        case: What is judged.
        swapped: The candidate is assistant 1.
    """
    first, second = (case.candidate, case.reference) if swapped else (case.reference, case.candidate)
    role = case.role
    return (
        f"[Context]\n{case.context}\n\n[Question]\n{case.question}\n\n[{role} 1]\n{first}\n\n[End of {role} 1]\n\n"
        f"[{role} 2]\n{second}\n\n[End of {role} 2]\n\n[System]\n{case.rule}\n\n"
    )


def parse_scores(text: str) -> tuple[float, float] | None:
    """Read two scores from what a judge wrote: the first line with words, past closed thoughts; labels, JSON and markdown are allowed.

    Returns:
        The scores of assistant 1 and 2, finite and from 0 to 10; None where there are none. Numbers in prose are never taken.
    """
    text = _THOUGHT.sub("", text).strip()
    if "<think>" in text or not text:
        return None
    head = "\n".join(text.splitlines()[:2]) if text.lower().lstrip("*#_ ").startswith("assistant") else ""
    labelled = {number: value for number, value in _LABELLED.findall(head or (text.splitlines()[0] if text.startswith("{") else ""))}
    if set(labelled) == {"1", "2"}:
        found = (labelled["1"], labelled["2"])
    else:
        line = text.splitlines()[0].strip().strip("*_#`").strip()
        match = _PAIR.fullmatch(line)
        if match is None:
            return None
        found = (match[1], match[2])
    scores = (float(found[0]), float(found[1]))
    return scores if all(math.isfinite(score) and 0 <= score <= MOST for score in scores) else None


class Asks(Protocol):
    """What a judge is asked through: `Endpoint`, or a stand-in."""

    model: str

    def complete(self, messages: Sequence[Mapping[str, Any]], *, max_tokens: int, temperature: float = 0.0, **more: Any) -> Reply:
        """Answer."""


class MockJudge:
    """A judge for trying the tools: scores from a hash of what it reads. Its numbers mean nothing."""

    model = "mock"

    def complete(self, messages: Sequence[Mapping[str, Any]], *, max_tokens: int, temperature: float = 0.0, **more: Any) -> Reply:
        """Score by a hash."""
        digest = hashlib.sha256(str(messages[-1]["content"]).encode()).digest()
        return Reply(f"{1 + digest[0] % 10} {1 + digest[1] % 10}\nby a hash", "mock", 0, 0, "stop")


class Judge:
    """Asks for verdicts, each once: what was judged before is read from the cache.

    Args:
        asks: The endpoint.
        cache: Open; a row for each call that gave an answer, by a hash of all it depends on.
        temperature, max_tokens: Of its answers.
    """

    def __init__(self, asks: Asks | Endpoint, cache: Records, temperature: float = TEMPERATURE, max_tokens: int = MAX_TOKENS) -> None:
        self.asks, self.cache, self.temperature, self.max_tokens = asks, cache, temperature, max_tokens
        self.unanswered = 0  # calls in a row
        self._lock = threading.Lock()

    def judge(self, case: Case, swapped: bool = False) -> dict[str, Any]:
        """Judge a case; an unreadable verdict is asked for once more.

        Returns:
            "scores" [reference, candidate] whatever the order, or None with "failure", why; "text", what the judge wrote.
        """
        failure, text, fresh, attempt = "", "", 0, 0
        while fresh < 2:
            try:
                reply, known = self._ask(message(case, swapped), attempt)
            except EndpointError as error:
                self.unanswered += 1
                if self.unanswered >= GIVE_UP:
                    raise EndpointError(
                        f"{GIVE_UP} questions in a row had no answer; what was judged is kept, start again: {error}"
                    ) from error
                return {"scores": None, "failure": str(error), "text": ""}
            self.unanswered = 0
            text = reply["text"]
            scores = parse_scores(text)
            if scores is not None:
                return {"scores": list(scores[::-1] if swapped else scores), "text": text, "judge": reply["model"]}
            failure = (
                "refused by a filter" if reply["finish_reason"] == "content_filter" else "no two scores from 0 to 10 in its first line"
            )
            fresh, attempt = fresh + (not known), attempt + 1  # an unreadable verdict of an earlier start is kept, and asked for again
        return {"scores": None, "failure": failure, "text": text}

    def _ask(self, words: str, attempt: int) -> tuple[dict[str, Any], bool]:
        """The answer of an attempt, and whether it was there already."""
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": words}]
        settings = {"model": self.asks.model, "temperature": self.temperature, "max_tokens": self.max_tokens, "attempt": attempt}
        key = hashlib.sha256(json.dumps([messages, settings], sort_keys=True).encode()).hexdigest()
        with self._lock:
            if key in self.cache.done:
                return self.cache.done[key], True
        reply = self.asks.complete(messages, max_tokens=self.max_tokens, temperature=self.temperature)
        row = {"key": key, **settings, "messages": messages, **asdict(reply)}
        with self._lock:
            if key not in self.cache.done:  # two equal questions at once
                self.cache.append(row)
        return row, False


def self_test(judge: Judge, cases: Sequence[Case]) -> dict[str, Any]:
    """Let the judge tell known-better answers from known-worse ones, in both orders.

    Args:
        judge: The judge.
        cases: Their `reference` is the better answer.

    Returns:
        Percent: "accuracy" (the better one scored higher, of what was judged), "ties", "consistent" (the same winner in both orders); "judged"
        and "of" calls; "trusted": accuracy 80 or more, nine tenths judged.

    Raises:
        DataError: There are no cases.
    """
    if not cases:
        raise DataError("a self-test of the judge needs cases: at least two questions with different references")
    verdicts = [[judge.judge(case, swapped)["scores"] for swapped in (False, True)] for case in cases]
    signs = [[None if scores is None else (scores[0] > scores[1]) - (scores[0] < scores[1]) for scores in pair] for pair in verdicts]
    flat = [sign for pair in signs for sign in pair if sign is not None]
    both = [pair for pair in signs if None not in pair]
    share = {
        "accuracy": 100 * sum(sign == 1 for sign in flat) / len(flat) if flat else 0.0,
        "ties": 100 * sum(sign == 0 for sign in flat) / len(flat) if flat else 0.0,
        "consistent": 100 * sum(pair[0] == pair[1] for pair in both) / len(both) if both else 0.0,
    }
    judged = len(flat) / (2 * len(cases))
    return {
        **{k: round(v, 1) for k, v in share.items()},
        "judged": len(flat),
        "of": 2 * len(cases),
        "trusted": share["accuracy"] >= 80 and judged >= 0.9,
    }


def same_family(judge: str, candidate: str) -> str:
    """The family that two models' names share, or ""."""

    def family(name: str) -> set[str]:
        return {title for title, marks in FAMILIES.items() if any(mark in name.lower() for mark in marks)}

    return next(iter(sorted(family(judge) & family(candidate))), "")
