"""Captions, questions and conversations say what is true, in lower case."""

import re
from collections import Counter

import numpy as np
import pytest

from mmkit.minidata import names, world
from mmkit.minidata.language import (
    KINDS,
    NUMBERS,
    SHORT_ANSWER,
    all_text_sources,
    caption,
    conversation,
    describe,
    questions,
    text_conversation,
)
from mmkit.minidata.scene import Scene

TRAINED = names.object_names("trained")
SIDES = {"left of": (1, -1), "right of": (1, 1), "above": (0, -1), "below": (0, 1)}  # axis of the mask array, sign


def scene_of(index: int) -> tuple[Scene, np.random.Generator]:
    rng = np.random.default_rng((11, index))
    count = index % 6
    return world.sample_scene(rng, TRAINED, count, 1.0 if count == 0 else 0.3), rng


def parse_thing(phrase: str) -> tuple[str, int]:
    """ "three cats" -> ("cat", 3), by trying all names: the inverse of the writer, written apart from it."""
    for name in TRAINED:
        if phrase == names.with_article(name):
            return name, 1
        for count in range(2, 6):
            if phrase == f"{NUMBERS[count]} {names.plural(name)}":
                return name, count
    raise AssertionError(phrase)


def test_captions_name_exactly_what_is_there() -> None:
    for index in range(150):
        scene, rng = scene_of(index)
        text = caption(scene, rng)
        assert text == text.lower()
        text = re.sub(r"^(a picture of|a drawing of|there is|there are) ", "", text)
        background = re.search(r" on an? (\w+) background$", text)
        if background:
            assert background[1] == scene.background
            text = text[: background.start()]
        side = re.fullmatch(r"(.+) (left of|right of|above|below) (.+)", text)
        parts = [side[1], side[3]] if side else re.split(r", | and (?=some |an? |one |two |three |four |five |the word )", text)
        words = [part[len("the word '") : -1] for part in parts if part.startswith("the word '")]
        things = dict(parse_thing(part) for part in parts if not part.startswith("the word '"))
        assert words == ([scene.word.text] if scene.word else [])
        assert things == scene.counts


def test_a_relation_in_a_caption_is_what_the_masks_show() -> None:
    found = 0
    for index in range(200):
        rng = np.random.default_rng((12, index))
        scene = world.sample_scene(rng, TRAINED, 2)
        match = re.search(r"(an?|some) (.+) (left of|right of|above|below) (an?|some) (.+?)( on an? \w+ background)?$", caption(scene, rng))
        if match and len(scene.counts) == 2:
            found += 1
            by_name = {item.name: np.argwhere(item.mask).mean(0) for item in scene.objects}
            first = match[2].removeprefix("picture of ").removeprefix("drawing of ")
            first = re.sub(r"^(an?|some) ", "", first)
            axis, sign = SIDES[match[3]]
            assert sign * (by_name[first][axis] - by_name[match[5]][axis]) > 96 / 10
    assert found > 30


def test_question_answers_hold_when_read_off_the_masks() -> None:
    """Counts, presence and places are recomputed here from names and mask pixels alone."""
    checked: Counter[str] = Counter()
    for index in range(240):
        scene, rng = scene_of(index)
        middle = {item.name: np.argwhere(item.mask).mean(0) for item in scene.objects}
        for question in questions(scene, rng):
            text, answer = question.text, question.answer
            if match := re.match(r"how many (.+) (?:are there|can you see)\?", text):
                there = [name for name in scene.names if match[1] in ("objects", names.plural(name))]
                assert int(answer) == len(there)
            elif match := re.match(r"(?:is there|are there|can you see|do you see) (.+?)(?: in the picture)?\?", text):
                assert (answer == "yes") == (parse_thing(match[1])[0] in scene.names)
            elif match := re.match(r"(?:is|are) the (.+) (left of|right of|above|below) the (.+)\?", text):
                axis, sign = SIDES[match[2]]
                gap = middle[match[1]] - middle[match[3]]
                assert (answer == "yes") == (sign * gap[axis] > 0 and abs(gap[axis]) > abs(gap[1 - axis]))
            elif match := re.match(r"where (?:is|are) the (.+), relative to the (.+)\?", text):
                axis, sign = SIDES[answer if answer in SIDES else f"{answer} of"]
                gap = middle[match[1]] - middle[match[2]]
                assert sign * gap[axis] > abs(gap[1 - axis])
            elif match := re.match(r"what is (left of|right of|above|below) the (.+)\?", text):
                axis, sign = SIDES[match[1]]
                beyond = [item.name for item in scene.objects if sign * (np.argwhere(item.mask).mean(0) - middle[match[2]])[axis] > 96 / 6]
                assert beyond == [answer]
            elif question.kind == "object":
                assert scene.names == [answer]
            elif question.kind == "colour":
                assert answer == scene.background
            else:
                assert scene.word is not None
                assert answer == scene.word.text
            checked[question.kind] += 1
    assert set(checked) == set(KINDS)
    assert min(checked.values()) > 50


def test_yes_and_no_come_equally_often() -> None:
    said: Counter[tuple[str, str]] = Counter()
    for index in range(600):
        scene, rng = scene_of(index)
        said.update((question.kind, question.answer) for question in questions(scene, rng) if question.answer in ("yes", "no"))
    assert said["presence", "yes"] == said["presence", "no"]
    share = said["relation", "yes"] / (said["relation", "yes"] + said["relation", "no"])
    assert 0.4 < share < 0.6  # a fair coin, some 300 throws: two standard deviations are 0.06


def test_half_of_the_absent_things_are_of_a_present_kind() -> None:
    alike = []
    for index in range(300):
        scene, rng = scene_of(6 * index + 1)
        (question,) = [question for question in questions(scene, rng) if question.answer == "no" and question.kind == "presence"]
        phrase = re.sub(r"^(is there|are there|can you see|do you see) | in the picture|\?", "", question.text)
        alike.append(names.category(parse_thing(phrase)[0]) == names.category(scene.names[0]))
    assert 0.45 < np.mean(alike) < 0.7


def test_every_question_has_ten_answers_of_which_the_true_one_leads() -> None:
    for index in range(120):
        scene, rng = scene_of(index)
        for question in questions(scene, rng):
            assert len(question.answers10) == 10
            assert Counter(question.answers10).most_common(1)[0] in ((question.answer, 10), (question.answer, 7))


def test_conversations_begin_with_the_image_mark_and_alternate() -> None:
    suffixes = 0
    for index in range(200):
        scene, rng = scene_of(index)
        turns = conversation(scene, rng)
        assert 2 <= len(turns) <= 8
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
        text = "".join(turn["value"] for turn in turns)
        assert text == text.lower()
        assert text.count("<image>") == 1
        assert turns[0]["value"].startswith("<image>\n")
        assert all(turn["value"].strip() for turn in turns)
        suffixes += SHORT_ANSWER in text
    assert 50 < suffixes < 150


def test_text_only_conversations_tell_the_truth() -> None:
    kinds = Counter[str]()
    for index in range(200):
        turns = text_conversation(np.random.default_rng((13, index)))
        for human, gpt in zip(turns[::2], turns[1::2], strict=True):
            assert "<image>" not in human["value"]
            if match := re.match(r"what is (\d) (plus|minus) (\d)\?", human["value"]):
                first, second = int(match[1]), int(match[3])
                assert int(gpt["value"]) == (first + second if match[2] == "plus" else first - second)
                kinds["sum"] += 1
            elif match := re.match(r"what kind of thing (?:is|are) (.+)\?", human["value"]):
                assert gpt["value"].endswith(names.category(parse_thing(match[1])[0]))
                kinds["kind"] += 1
            elif match := re.match(r"what do you call two of (.+)\?", human["value"]):
                assert gpt["value"] == f"two {names.plural(parse_thing(match[1])[0])}"
                kinds["plural"] += 1
            else:
                phrase = re.sub(r"^(is|are) |\?", "", human["value"])
                (name,) = [name for name in TRAINED if phrase.startswith(names.with_article(name) + " a") and kind_after(phrase, name)]
                assert (gpt["value"] == "yes") == (kind_after(phrase, name) == names.category(name))
                kinds["fact"] += 1
    assert len(kinds) == 4


def kind_after(phrase: str, name: str) -> str:
    rest = re.sub(r"^ an? ", "", phrase.removeprefix(names.with_article(name)))
    return rest if rest in {names.category(other) for other in TRAINED} else ""


def test_descriptions_hold_what_the_questions_ask_for() -> None:
    for index in range(120):
        scene, rng = scene_of(index)
        text = describe(scene)
        for question in questions(scene, rng):
            if question.kind in ("object", "colour", "word"):
                assert question.answer in text
            elif match := re.match(r"where (?:is|are) the (.+), relative to the (.+)\?", question.text):
                mirrored = {"left": "right of", "right": "left of", "above": "below", "below": "above"}[question.answer]
                side = f"{question.answer} of" if question.answer in ("left", "right") else question.answer
                assert re.search(
                    rf"the {match[1]} (is|are) {side} the {match[2]}\.|the {match[2]} (is|are) {mirrored} the {match[1]}\.", text
                )
        for name, count in scene.counts.items():
            assert len(re.findall(rf"(?:^|\. ){names.with_article(name)} at the ", text)) == count


def test_the_language_is_small() -> None:
    texts = all_text_sources(n_scenes=300)
    words = {word for text in texts for word in re.findall(r"[a-z0-9']+", text)}
    assert len(words) < 1500
    assert all(text == text.lower() for text in texts)


@pytest.mark.parametrize("count", range(6))
def test_the_same_generator_says_the_same(count: int) -> None:
    def say() -> tuple[object, ...]:
        rng = np.random.default_rng((14, count))
        scene = world.sample_scene(rng, TRAINED, count, 1.0 if count == 0 else 0.3)
        return caption(scene, rng), describe(scene), questions(scene, rng), conversation(scene, rng), text_conversation(rng)

    assert say() == say()
