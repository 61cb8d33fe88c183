"""Rules that read yes, no, a letter or a word out of an answer, and the figures that official code makes of them.

Each benchmark's rule stands here as its authors wrote it, oddities included, since published numbers have them; lmms-eval's rules differ
and bear names of their own. Nothing here reads files.
"""

from __future__ import annotations

import re
import string
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mmkit.errors import DataError
from mmkit.scoring import normalise_answer

LETTERS = "ABCDE"
FAILED = "FAILED"
MME_PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
MME_COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
_ANSWER_IS = re.compile(r"The answer is ([A-Z]).")  # the last dot is any character, as in the official code
_LETTER = re.compile(r"^\s*\(?([A-Z])(?:[).:,]|\s|$)")
_NO_STEP = ("exist", "query: name", "choose name")
_OCR_FORM = re.compile(r"Question: (.*?) Short answer:", re.DOTALL)

# ---- yes and no ----------------------------------------------------------------------------------------------------------------------


def parse_pope(text: str) -> str:
    """Read "yes" or "no" as POPE does: "no" if a word before the first full stop is No, no or not, else "yes" (also for "NO" and "").

    Source: RUCAIBox/POPE, `evaluate.py`.
    """
    words = text.partition(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def parse_mme(text: str) -> str:
    """Read "yes", "no" or "other" as MME does: from the first four characters where the answer is neither word alone ("snow" is no).

    Source: MME's eval_tool, `calculation.py`; line ends are removed, which its file format needs.
    """
    text = text.lower().replace("\n", " ").replace("\t", " ")
    if text in ("yes", "no"):
        return text
    return next((word for word in ("yes", "no") if word in text[:4]), "other")


def parse_mme_lmms(text: str) -> str:
    """MME's rule in lmms-eval: blanks and full stops at the ends go, and "y" and "n" count."""
    text = text.lower().strip().replace(".", "")
    short = {"y": "yes", "n": "no"}.get(text, text)
    return parse_mme(short)


def yes_no_figures(predictions: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
    """Counts, accuracy, precision, recall, F1 and share of "yes" among the predictions; "yes" is the positive class.

    A figure whose denominator is zero is 0, and `undefined` counts them; the official code fails there.
    """
    pairs = Counter(zip(predictions, labels, strict=True))
    tp, fp, fn = pairs["yes", "yes"], pairs["yes", "no"], pairs["no", "yes"]
    tn = len(labels) - tp - fp - fn
    precision, recall = tp / max(tp + fp, 1), tp / max(tp + fn, 1)
    figures = {"TP": tp, "FP": fp, "TN": tn, "FN": fn, "accuracy": (tp + tn) / max(len(labels), 1), "precision": precision}
    figures |= {"recall": recall, "f1": 2 * precision * recall / (precision + recall) if precision + recall else 0.0}
    figures["yes_ratio"] = (tp + fp) / max(len(labels), 1)
    undefined = (tp + fp == 0) + (tp + fn == 0) + (precision + recall == 0)
    return {**figures, "undefined": undefined} if undefined else figures


def yes_no_figures_lmms(texts: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
    """POPE's figures in lmms-eval: only the bare words count, F1 passes over what is neither, the share of "yes" is that of the labels."""
    words = [text.lower().strip() for text in texts]
    pairs = Counter(zip(words, labels, strict=True))
    tp, fp, fn = pairs["yes", "yes"], pairs["yes", "no"], pairs["no", "yes"]
    precision, recall = tp / max(tp + fp, 1), tp / max(tp + fn, 1)
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    right = sum(word == label for word, label in zip(words, labels, strict=True)) / max(len(labels), 1)
    yes = sum(label == "yes" for label in labels) / max(len(labels), 1)
    return {"accuracy": right, "precision": precision, "recall": recall, "f1_score": f1, "yes_ratio": yes}


def mme_figures(rows: Sequence[tuple[str, str, bool]]) -> dict[str, Any]:
    """MME's scores: per subtask 100 times the share of right answers plus 100 times the share of pictures with both right.

    A picture of which one question was left out does not have both right.

    Args:
        rows: (subtask, picture, right) of every question.

    Returns:
        `per_subtask` with acc, acc_plus and score; `perception` (at most 2000), `cognition` (800); subtasks without rows are left out.
    """
    pictures: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for subtask, picture, right in rows:
        pictures[subtask][picture].append(right)
    per_subtask = {}
    for subtask, by_picture in pictures.items():
        flat = [right for rights in by_picture.values() for right in rights]
        plus = sum(len(rights) == 2 and all(rights) for rights in by_picture.values()) / len(by_picture)
        acc = sum(flat) / len(flat)
        per_subtask[subtask] = {"acc": acc, "acc_plus": plus, "score": 100 * acc + 100 * plus}
    out: dict[str, Any] = {"per_subtask": per_subtask}
    for name, members in (("perception", MME_PERCEPTION), ("cognition", MME_COGNITION)):
        found = [per_subtask[subtask]["score"] for subtask in members if subtask in per_subtask]
        out[name] = sum(found) if found else None
    return out


# ---- letters -------------------------------------------------------------------------------------------------------------------------


def parse_scienceqa(text: str) -> str:
    """The letter that LLaVA's ScienceQA script reads, or FAILED.

    One of A to E alone; else one of them before ". " at the start; else the letter of "The answer is X" where that, with one character
    behind it, stands there exactly once.

    Source: haotian-liu/LLaVA, `llava/eval/eval_science_qa.py`.
    """
    if len(text) == 1 and text in LETTERS:
        return text
    if len(text) >= 3 and text[0] in LETTERS and text[1:3] == ". ":
        return text[0]
    found = _ANSWER_IS.findall(text)
    return found[0] if len(found) == 1 else FAILED


def letter_index(letter: str, choices: int) -> int:
    """Index of a choice; -1 for a letter beyond the choices, and for FAILED."""
    return LETTERS.index(letter) if len(letter) == 1 and letter in LETTERS[:choices] else -1


def scienceqa_lmms(text: str, answer: str) -> bool:
    """lmms-eval's rule: the letter alone in either case, or the answer's capital before a full stop at the start."""
    text = text.strip()
    if len(text) == 1:
        return text.upper() == answer
    return len(text) >= 2 and text[0].isupper() and text[1] == "." and text[0] == answer


def parse_letter(text: str) -> str:
    """A letter at the start, bare, in brackets or before a mark: "B", "(B)", "B. iron", "B) iron"; FAILED where there is none."""
    match = _LETTER.match(text)
    if match is None and len(text.strip()) == 1:
        return text.strip().upper()
    return match.group(1) if match else FAILED


# ---- words ---------------------------------------------------------------------------------------------------------------------------


def gqa_form(text: str) -> str:
    """An answer as LLaVA uploads it to GQA: full stops at its end go, capitals too; the score is then equality, letter by letter.

    Source: haotian-liu/LLaVA, `scripts/convert_gqa_for_eval.py`.
    """
    return text.rstrip(".").lower()


def gqa_right_lmms(text: str, gold: str) -> bool:
    """lmms-eval's exact match: both sides without capitals and punctuation."""
    table = str.maketrans("", "", string.punctuation)
    return text.lower().translate(table) == gold.lower().translate(table)


def gqa_right_lavis(text: str, gold: str) -> bool:
    """LAVIS's rule: both sides in the normal form of VQA answers."""
    return normalise_answer(text) == normalise_answer(gold)


def gqa_figures(questions: Sequence[Mapping[str, Any]], predictions: Sequence[str]) -> dict[str, Any]:
    """GQA's official figures over balanced questions, in percent (distribution: as the official code prints it).

    Args:
        questions: As in GQA's question files: question, answer, isBalanced, types, semantic, groups.
        predictions: The answer to each, already in `gqa_form`.

    Source: GQA's `eval.py`. Consistency, validity and plausibility need more than a question file and are not computed.
    """
    rows = [(q, p, p == q["answer"]) for q, p in zip(questions, predictions, strict=True) if q.get("isBalanced", True)]
    if not rows:
        raise DataError("none of GQA's questions is balanced, and only those are scored")
    out: dict[str, Any] = {"accuracy": _percent([right for _, _, right in rows])}
    for name, is_open in (("binary", False), ("open", True)):
        some = [right for q, _, right in rows if (q["types"]["structural"] == "query") is is_open]
        out[name] = _percent(some) if some else None
    groups: dict[str, Callable[[Mapping[str, Any]], Any]] = {
        "accuracyPerStructuralType": lambda q: q["types"]["structural"],
        "accuracyPerSemanticType": lambda q: q["types"]["semantic"],
        "accuracyPerSteps": gqa_steps,
        "accuracyPerLength": lambda q: len(q["question"].split()),
    }
    for name, key in groups.items():
        table: dict[str, list[bool]] = defaultdict(list)
        for question, _, right in rows:
            table[str(key(question))].append(right)
        out[name] = {value: {"score": _percent(rights), "count": len(rights)} for value, rights in table.items()}
    out["distribution"] = _distribution(rows)
    return out


def gqa_steps(question: Mapping[str, Any]) -> int:
    """How many steps of reasoning a question takes."""
    steps = [f"{step['operation']}: {step['argument']}" for step in question.get("semantic", [])]
    return sum(not any(name in step for name in _NO_STEP) for step in steps)


def _distribution(rows: Sequence[tuple[Mapping[str, Any], str, bool]]) -> float | None:
    """Chi-square of predicted against gold answers per global group, weighted by the group's size."""
    gold: dict[str, Counter[str]] = defaultdict(Counter)
    given: dict[str, Counter[str]] = defaultdict(Counter)
    for question, prediction, _ in rows:
        group = (question.get("groups") or {}).get("global")
        if group is not None:
            gold[group][question["answer"]] += 1
            given[group][prediction] += 1
    total = sum(sum(counts.values()) for counts in gold.values())
    if not total:
        return None
    parts = [
        sum(counts.values()) * sum((given[group][answer] - n) ** 2 / n for answer, n in counts.items()) for group, counts in gold.items()
    ]
    return sum(parts) / total / 100


def _percent(rights: Sequence[bool]) -> float:
    return 100 * sum(rights) / len(rights)


def textvqa_question(prompt: str) -> str:
    """The question inside one of the four prompts that LLaVA has used for TextVQA, in lower case.

    Raises:
        DataError: The prompt has another form.

    Source: haotian-liu/LLaVA, `llava/eval/eval_textvqa.py`.
    """
    lines = prompt.split("\n")
    form = _OCR_FORM.search(prompt) if prompt.startswith("OCR tokens: ") else None
    if form:
        return form.group(1).lower()
    if "Reference OCR token: " in prompt and len(lines) == 3:
        return lines[1 if prompt.startswith("Reference OCR token:") else 0].lower()
    if len(lines) == 2:
        return lines[0].lower()
    raise DataError(f"no question can be read out of the prompt {prompt[:80]!r}: none of TextVQA's four forms")


def anls(prediction: str, references: Sequence[str], threshold: float = 0.5) -> float:
    """Average normalised Levenshtein similarity of one answer: the best of its references, 0 below the threshold.

    Source: Scene Text Visual Question Answering (Biten et al., 2019).
    """
    given = prediction.strip().lower()
    best = 0.0
    for reference in references:
        wanted = reference.strip().lower()
        best = max(best, 1 - edit_distance(given, wanted) / max(len(given), len(wanted), 1))
    return best if best >= threshold else 0.0


def edit_distance(first: str, second: str) -> int:
    """How many letters must be put in, taken out or changed to turn one text into the other."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(second, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return row[-1]
