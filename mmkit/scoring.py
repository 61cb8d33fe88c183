"""Metric functions without state: VQA accuracy in its public variants, top-k, recall@k.

Nothing here reads files or averages: every function scores one answer or one row, so that `stats` can put an interval on the mean and
pair the items of two encoders.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mmkit.errors import DataError, find

# The official table, as "typed:meant". Its oddities ("somebody'd", "I'd've" never met after lower-casing) are part of published numbers.
_CONTRACTION_TABLE = """
    aint:ain't arent:aren't cant:can't couldve:could've couldnt:couldn't couldn'tve:couldn't've couldnt've:couldn't've didnt:didn't
    doesnt:doesn't dont:don't hadnt:hadn't hadnt've:hadn't've hadn'tve:hadn't've hasnt:hasn't havent:haven't hed:he'd hed've:he'd've
    he'dve:he'd've hes:he's howd:how'd howll:how'll hows:how's Id've:I'd've I'dve:I'd've Im:I'm Ive:I've isnt:isn't itd:it'd
    itd've:it'd've it'dve:it'd've itll:it'll let's:let's maam:ma'am mightnt:mightn't mightnt've:mightn't've mightn'tve:mightn't've
    mightve:might've mustnt:mustn't mustve:must've neednt:needn't notve:not've oclock:o'clock oughtnt:oughtn't ow's'at:'ow's'at
    'ows'at:'ow's'at 'ow'sat:'ow's'at shant:shan't shed've:she'd've she'dve:she'd've she's:she's shouldve:should've shouldnt:shouldn't
    shouldnt've:shouldn't've shouldn'tve:shouldn't've somebody'd:somebodyd somebodyd've:somebody'd've somebody'dve:somebody'd've
    somebodyll:somebody'll somebodys:somebody's someoned:someone'd someoned've:someone'd've someone'dve:someone'd've someonell:someone'll
    someones:someone's somethingd:something'd somethingd've:something'd've something'dve:something'd've somethingll:something'll
    thats:that's thered:there'd thered've:there'd've there'dve:there'd've therere:there're theres:there's theyd:they'd theyd've:they'd've
    they'dve:they'd've theyll:they'll theyre:they're theyve:they've twas:'twas wasnt:wasn't wed've:we'd've we'dve:we'd've weve:we've
    werent:weren't whatll:what'll whatre:what're whats:what's whatve:what've whens:when's whered:where'd wheres:where's whereve:where've
    whod:who'd whod've:who'd've who'dve:who'd've wholl:who'll whos:who's whove:who've whyll:why'll whyre:why're whys:why's wont:won't
    wouldve:would've wouldnt:wouldn't wouldnt've:wouldn't've wouldn'tve:wouldn't've yall:y'all yall'll:y'all'll y'allll:y'all'll
    yall'd've:y'all'd've y'alld've:y'all'd've y'all'dve:y'all'd've youd:you'd youd've:you'd've you'dve:you'd've youll:you'll youre:you're
    youve:you've
"""
CONTRACTIONS = dict(pair.split(":") for pair in _CONTRACTION_TABLE.split())
NUMBER_WORDS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5"}
NUMBER_WORDS |= {"six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"}
ARTICLES = frozenset({"a", "an", "the"})
PUNCTUATION = tuple(';/[]"{}()=+\\_-><@`,?!')  # in the order in which the official code walks them
_LONE_PERIOD = re.compile(r"\.(?!\d)")
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_MAX_PERIODS = 32  # the official call passes re.UNICODE (32) where re.sub takes a count
PEOPLE = 10

VqaVariant = Literal["vqa_2021", "vqa_2017", "m4c", "lmms_vqav2", "vizwiz"]
VQA_VARIANTS: tuple[VqaVariant, ...] = ("vqa_2021", "vqa_2017", "m4c", "lmms_vqav2", "vizwiz")


def clean(text: str) -> str:
    """Put the text on one line, without blanks around it."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def strip_punctuation(text: str) -> str:
    """Delete or blank out the official 21 marks, then drop periods that are no decimal point.

    A mark is deleted when it stands beside a blank anywhere in the text, or when the text has a comma inside a number; else it becomes a
    blank. Colons and apostrophes are no marks.

    Source: GT-Vision-Lab/VQA, `vqaEval.py`, `processPunctuation`; its quirks are kept, because published numbers have them.
    """
    out = text
    number = _COMMA_IN_NUMBER.search(text) is not None
    for mark in PUNCTUATION:
        beside_blank = f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if beside_blank or number else " ")
    return _LONE_PERIOD.sub("", out, count=_MAX_PERIODS)


def simplify_words(text: str) -> str:
    """Lower-case, write number words as digits, drop articles, restore apostrophes of contractions.

    Source: GT-Vision-Lab/VQA, `vqaEval.py`, `processDigitArticle`.
    """
    words = (NUMBER_WORDS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def normalise_answer(text: str) -> str:
    """The official normal form of a VQA answer: one line, without punctuation, number words, articles, capitals."""
    return simplify_words(strip_punctuation(clean(text)))


def normalise_m4c(text: str) -> str:
    """The normal form of M4C, which LLaVA's TextVQA, VizWiz uploads and lmms-eval's OK-VQA use.

    Source: facebookresearch/mmf, `m4c_evaluators.py`, `EvalAIAnswerProcessor`.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return normalise_answer(text)


def _vqa_2021(prediction: str, answers: list[str]) -> tuple[str, list[str]]:
    """Both sides in normal form, but only where people disagree: ten equal references are compared as they are."""
    if len(set(answers)) == 1:
        return prediction, answers
    return normalise_answer(prediction), [normalise_answer(answer) for answer in answers]


def _vqa_2017(prediction: str, answers: list[str]) -> tuple[str, list[str]]:
    """The prediction in full normal form, the references at most without punctuation."""
    if len(set(answers)) > 1:
        answers = [strip_punctuation(answer) for answer in answers]
    return normalise_answer(prediction), answers


def _m4c(prediction: str, answers: list[str]) -> tuple[str, list[str]]:
    return normalise_m4c(prediction), [normalise_m4c(answer) for answer in answers]


def _lmms_vqav2(prediction: str, answers: list[str]) -> tuple[str, list[str]]:
    return normalise_answer(prediction), [normalise_answer(answer) for answer in answers]


def _vizwiz(prediction: str, answers: list[str]) -> tuple[str, list[str]]:
    """The prediction in full normal form, the references as published.

    The contractions are VQA's; in VizWiz's own table they have typographic apostrophes, so that "dont" meets no reference there.
    """
    return normalise_answer(prediction), answers


_NORMAL_FORMS: Mapping[str, Callable[[str, list[str]], tuple[str, list[str]]]] = {
    "vqa_2021": _vqa_2021,
    "vqa_2017": _vqa_2017,
    "m4c": _m4c,
    "lmms_vqav2": _lmms_vqav2,
    "vizwiz": _vizwiz,
}


def vqa_accuracy(prediction: str, answers: Sequence[str], variant: str = "vqa_2021") -> float:
    """Score a short answer against ten human ones, as VQAv2, OK-VQA and TextVQA do.

    Args:
        prediction: The model's words as generated; normalising is done here, not by the caller.
        answers: The ten people's answers, in any order.
        variant: Which public rule normalises the two sides; see `VQA_VARIANTS`. `vqa_2021` is the official one since March 2021.

    Returns:
        A fraction in [0, 1] (reports print percent): 0, 0.3, 0.6, 0.9 for 0 to 3 agreeing people, 1 from 4 on.

    Raises:
        DataError: There are not exactly ten answers.
        NameNotFound: There is no such variant.

    Source: VQA: Visual Question Answering (Antol et al., 2015): min(matches / 3, 1), averaged over the ten ways to leave one person out.
        Left out by position; the official code drops all equal answers where they lack an `answer_id`.
    """
    if len(answers) != PEOPLE:
        raise DataError(f"VQA accuracy needs ten human answers, got {len(answers)}: is this a test split, or another format?")
    normal_form = find("VQA scorer", _NORMAL_FORMS, variant)
    given, references = normal_form(clean(prediction), [clean(answer) for answer in answers])
    matches = sum(reference == given for reference in references)
    return min(1.0, 3 * matches / PEOPLE)  # the closed form of the ten leave-one-out means


def most_common_answer(answers: Sequence[str]) -> str:
    """The answer that most people gave, in normal form; the first one given wins a tie.

    Raises:
        DataError: There is no answer.
    """
    if not answers:
        raise DataError("no answers to take the most common one of: is this a test split?")
    return Counter(normalise_answer(answer) for answer in answers).most_common(1)[0][0]


def top_k_hits(scores: NDArray[np.floating], targets: NDArray[np.integer], k: int = 1) -> NDArray[np.bool_]:
    """Say for each row whether the target is among the k highest scores.

    Args:
        scores: [N, C], higher is better.
        targets: [N], column of the right class.
        k: How many guesses count.

    Returns:
        Booleans [N]. A tie counts against the target, so that a model that scores all classes alike is never right.

    Raises:
        DataError: Shapes differ, a target is no column, or a score is not finite.
    """
    scores, targets = np.asarray(scores), np.asarray(targets)
    if scores.ndim != 2 or targets.shape != scores.shape[:1]:
        raise DataError(f"top-k takes scores [N, C] and targets [N], got {list(scores.shape)} and {list(targets.shape)}")
    if k < 1:
        raise DataError(f"top-k with k = {k}: it takes at least one guess")
    if len(targets) and (targets.min() < 0 or targets.max() >= scores.shape[1]):
        raise DataError(f"targets run from {targets.min()} to {targets.max()}, but there are {scores.shape[1]} classes")
    _check_finite(scores)
    own = np.take_along_axis(scores, targets[:, None], axis=1)  # [N, 1]
    ahead = (scores >= own).sum(axis=1) - 1  # [N]; itself does not count
    return ahead < k


def recall_at_k(similarity: NDArray[np.floating], relevant: NDArray[np.bool_], k: int = 1) -> NDArray[np.bool_]:
    """Say for each query whether one of its matches is among the k nearest.

    Args:
        similarity: [Q, G], higher is nearer.
        relevant: [Q, G], True where the gallery item matches the query (five captions an image: five True in a row).
        k: How many neighbours count.

    Returns:
        Booleans [Q]. A tie with an item that does not match counts against the query.

    Raises:
        DataError: Shapes differ, a query has no match, or a similarity is not finite.
    """
    similarity, relevant = np.asarray(similarity), np.asarray(relevant, dtype=bool)
    if similarity.ndim != 2 or similarity.shape != relevant.shape:
        raise DataError(f"recall takes similarity and relevant [Q, G], got {list(similarity.shape)} and {list(relevant.shape)}")
    if k < 1:
        raise DataError(f"recall at k with k = {k}: it takes at least one neighbour")
    orphans = np.flatnonzero(~relevant.any(axis=1))
    if len(orphans):
        raise DataError(f"{len(orphans)} of {len(relevant)} queries have no match in the gallery, the first is query {orphans[0]}")
    _check_finite(similarity)
    best = np.where(relevant, similarity, -np.inf).max(axis=1, keepdims=True)  # [Q, 1]
    return ((similarity >= best) & ~relevant).sum(axis=1) < k


def _check_finite(scores: NDArray[np.floating]) -> None:
    broken = np.flatnonzero(~np.isfinite(scores).all(axis=1))
    if len(broken):
        raise DataError(f"{len(broken)} of {len(scores)} rows have a score that is not finite, the first is row {broken[0]}")
