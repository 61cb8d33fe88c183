"""What can be said of a scene: captions, questions with ten answers, conversations. All lower case, all true, all read off the geometry."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np

from mmkit.minidata import names as nouns
from mmkit.minidata.scene import OPPOSITE, RELATIONS, Placed, Scene, Word, only_one_beside, place_of, relation

KINDS = ("object", "presence", "count", "colour", "relation", "word")
SHORT_ANSWER = "answer the question using a single word or phrase."  # LLaVA-1.5's line, lower case as all text here
NUMBERS = ("zero", "one", "two", "three", "four", "five")
_SIDE_PHRASE = {"left": "left of", "right": "right of", "above": "above", "below": "below"}

DESCRIBE_PROMPTS = (
    "describe the picture.",
    "what do you see?",
    "describe this image.",
    "tell me what is in the picture.",
    "write a caption for the picture.",
    "what does the picture show?",
)


@dataclass(frozen=True)
class Question:
    """One question about one scene.

    Attributes:
        kind: One of KINDS.
        text: The question.
        answer: The true answer, short.
        answers10: Ten people's answers; `answer` is the most frequent.
        sentence: The answer as a whole sentence.
    """

    kind: str
    text: str
    answer: str
    answers10: tuple[str, ...]
    sentence: str


Turns = list[dict[str, str]]  # LLaVA's form: [{"from": "human" | "gpt", "value": text}, ...]


def _pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


def _ten(answer: str, variants: Sequence[str] = ()) -> tuple[str, ...]:
    """Ten answers: all the same, or seven and three that say it in other words."""
    others = [word for word in variants if word != answer]
    if not others:
        return (answer,) * 10
    return (answer,) * 7 + tuple(others[i % len(others)] for i in range(3))


def number_of(name: str, count: int) -> str:
    """ "a cat", "two cats", "some bread"."""
    return nouns.with_article(name) if count == 1 else f"{NUMBERS[count]} {nouns.plural(name)}"


def listing(parts: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _be(name: str, count: int = 1) -> str:
    return "are" if count > 1 or nouns.is_plural(name) else "is"


def _said(item: Placed | Word) -> str:
    return f"the word '{item.text}'" if isinstance(item, Word) else nouns.with_article(item.name)


def clear_relations(scene: Scene) -> list[tuple[Placed, Placed, str]]:
    """All (first, second, side) that are beyond dispute, among the objects whose name occurs once, in painting order."""
    found = []
    for first, second in permutations(scene.singles, 2):
        side = relation(first, second, scene.size)
        if side is not None:
            found.append((first, second, side))
    return found


# ---------------------------------------------------------------------------------------------------------------------- captions


def _contents(scene: Scene, rng: np.random.Generator) -> str:
    """Every object and the word, in a random order of kinds; with two things, sometimes by how they stand to one another."""
    things: list[Placed | Word] = [*scene.objects, *([scene.word] if scene.word is not None else [])]
    if len(things) == 2 and _said(things[0]) != _said(things[1]) and rng.random() < 0.6:
        first, second = things if rng.random() < 0.5 else things[::-1]
        side = relation(first, second, scene.size)
        if side is not None:
            return f"{_said(first)} {_SIDE_PHRASE[side]} {_said(second)}"
    parts = [number_of(name, count) for name, count in scene.counts.items()]
    parts = [parts[int(i)] for i in rng.permutation(len(parts))]
    if scene.word is not None:
        parts.append(f"the word '{scene.word.text}'")
    return listing(parts)


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """One caption: true, lower case, without a full stop.

    Examples: "a cat"; "a picture of a cat on a blue background"; "a cat left of a dog"; "three cats and a bone"; "the word 'lamp'".
    """
    text = _contents(scene, rng)
    frame = rng.random()
    if frame < 0.15:
        text = f"a picture of {text}"
    elif frame < 0.3:
        text = f"a drawing of {text}"
    elif frame < 0.36 and len(scene.counts) == 1 and scene.word is None:
        text = f"there {_be(scene.names[0], len(scene.objects))} {text}"
    if rng.random() < 0.35:
        text = f"{text} on {nouns.article(scene.background)} {scene.background} background"
    return text


def describe(scene: Scene) -> str:
    """All that the questions ask about, in words: the text recipe of mini-llm reads this in the place of the picture.

    Example: "the background is blue. there are 2 objects. a cat at the left. a dog at the right. the cat is left of the dog."
    """
    count = len(scene.objects)
    sentences = [f"the background is {scene.background}"]
    sentences.append("there is 1 object" if count == 1 else f"there are {count} objects")
    sentences += [f"{nouns.with_article(item.name)} at the {place_of(item, scene.size)}" for item in scene.objects]
    told = set()
    for first, second, side in clear_relations(scene):
        if (second.name, first.name) not in told:
            told.add((first.name, second.name))
            sentences.append(f"the {first.name} {_be(first.name)} {_SIDE_PHRASE[side]} the {second.name}")
    if scene.word is not None:
        sentences.append(f"the word '{scene.word.text}' is written at the {place_of(scene.word, scene.size)}")
    return ". ".join(sentences) + "."


# --------------------------------------------------------------------------------------------------------------------- questions


def _object_questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """ "what is in the picture?" of one object alone; "what is left of the dog?" where exactly one thing is."""
    if len(scene.objects) == 1:
        name = scene.objects[0].name
        text = _pick(rng, ("what is in the picture?", "what is this?", "what object is shown?", "what can you see?"))
        if scene.word is not None:
            text = "what object is shown?"
        variants = (*nouns.synonyms(name), nouns.with_article(name)) if nouns.countable(name) else nouns.synonyms(name)
        return [Question("object", text, name, _ten(name, variants), f"this is {nouns.with_article(name)}.")]
    found = []
    for anchor in scene.singles:
        for side in RELATIONS:
            item = only_one_beside(scene, anchor, side)
            if item is not None:
                text = f"what is {_SIDE_PHRASE[side]} the {anchor.name}?"
                sentence = f"there {_be(item.name)} {nouns.with_article(item.name)} {_SIDE_PHRASE[side]} the {anchor.name}."
                found.append(Question("object", text, item.name, _ten(item.name, nouns.synonyms(item.name)), sentence))
    return [found[int(rng.integers(len(found)))]] if found else []


def _presence_questions(scene: Scene, rng: np.random.Generator, pool: Sequence[str]) -> list[Question]:
    """One "yes" and one "no"; half of the absent names are of a present one's category."""
    if not scene.objects:
        return []
    forms: tuple[Callable[[str], str], ...] = (
        lambda name: f"{_be(name)} there {nouns.with_article(name)} in the picture?",
        lambda name: f"can you see {nouns.with_article(name)}?",
        lambda name: f"do you see {nouns.with_article(name)}?",
    )
    present = scene.objects[int(rng.integers(len(scene.objects)))].name
    yes = f"yes, there {_be(present, scene.counts[present])} {number_of(present, scene.counts[present])}."
    asked = [Question("presence", forms[int(rng.integers(3))](present), "yes", _ten("yes"), yes)]
    absent = nouns.absent_names(scene.names, pool)
    if scene.word is not None:  # "is there a bus?" could be disputed beside the word 'bus'
        absent = [name for name in absent if scene.word.text not in name.split()]
    alike = nouns.of_category(nouns.category(present))
    near = [name for name in absent if name in alike]
    options = near if near and rng.random() < 0.5 else absent
    if options:
        name = _pick(rng, options)
        no = f"no, there {_be(name)} no {name}."
        asked.append(Question("presence", forms[int(rng.integers(3))](name), "no", _ten("no"), no))
    return asked


def _count_questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """ "how many objects are there?" and, of something countable, "how many cats are there?"."""
    asked = []
    total = len(scene.objects)
    if total:
        sentence = "there is one object." if total == 1 else f"there are {NUMBERS[total]} objects."
        text = _pick(rng, ("how many objects are there?", "how many objects can you see?"))
        asked.append(Question("count", text, str(total), _ten(str(total), (NUMBERS[total],)), sentence))
    countable = [(name, count) for name, count in scene.counts.items() if nouns.countable(name)]
    countable = [pair for pair in countable if not any(nouns.confusable(pair[0], other) for other in scene.counts if other != pair[0])]
    if countable:
        repeated = [pair for pair in countable if pair[1] > 1]
        options = repeated if repeated and rng.random() < 0.85 else countable
        name, count = options[int(rng.integers(len(options)))]
        text = _pick(rng, (f"how many {nouns.plural(name)} are there?", f"how many {nouns.plural(name)} can you see?"))
        sentence = f"there {_be(name, count)} {'one ' + name if count == 1 else number_of(name, count)}."
        asked.append(Question("count", text, str(count), _ten(str(count), (NUMBERS[count],)), sentence))
    return asked


def _colour_questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    text = _pick(rng, ("what color is the background?", "what is the color of the background?"))
    answers = _ten(scene.background, ("grey",) if scene.background == "gray" else ())
    return [Question("colour", text, scene.background, answers, f"the background is {scene.background}.")]


def _relation_questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """One yes/no question (half of them "yes") and one "where", of pairs whose relation is clear-cut and whose names are not alike."""
    clear = [triple for triple in clear_relations(scene) if not nouns.confusable(triple[0].name, triple[1].name)]
    if not clear:
        return []
    first, second, side = clear[int(rng.integers(len(clear)))]
    answer = "yes" if rng.random() < 0.5 else "no"
    asked_side = side
    if answer == "no":
        asked_side = (
            OPPOSITE[side] if rng.random() < 0.7 else _pick(rng, [other for other in RELATIONS if other not in (side, OPPOSITE[side])])
        )
    truth = f"the {first.name} {_be(first.name)} {_SIDE_PHRASE[side]} the {second.name}."
    text = f"{_be(first.name)} the {first.name} {_SIDE_PHRASE[asked_side]} the {second.name}?"
    asked = [Question("relation", text, answer, _ten(answer), f"{answer}, {truth}")]
    first, second, side = clear[int(rng.integers(len(clear)))]
    where = f"where {_be(first.name)} the {first.name}, relative to the {second.name}?"
    variants = ("to the " + side, _SIDE_PHRASE[side]) if side in ("left", "right") else ({"above": "over", "below": "under"}[side],)
    truth = f"the {first.name} {_be(first.name)} {_SIDE_PHRASE[side]} the {second.name}."
    asked.append(Question("relation", where, side, _ten(side, variants), truth))
    return asked


def _word_questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    if scene.word is None:
        return []
    text = _pick(rng, ("what word is written?", "what does the text say?", "which word is written in the picture?"))
    return [Question("word", text, scene.word.text, _ten(scene.word.text), f"the word is '{scene.word.text}'.")]


def questions(scene: Scene, rng: np.random.Generator, pool: Sequence[str] | None = None) -> list[Question]:
    """Every question the scene can bear, at most two of a kind, in the order of KINDS.

    Args:
        scene: The scene.
        rng: Chooses wordings, absent names, pairs.
        pool: Names absent ones are taken from; None is all trained drawings.

    Returns:
        object (0-1), presence (one yes, one no), count (1-2), colour (1), relation (0 or 2: yes/no and where), word (0-1).
    """
    absent_from = nouns.object_names("trained") if pool is None else pool
    return [
        *_object_questions(scene, rng),
        *_presence_questions(scene, rng, absent_from),
        *_count_questions(scene, rng),
        *_colour_questions(scene, rng),
        *_relation_questions(scene, rng),
        *_word_questions(scene, rng),
    ]


# ----------------------------------------------------------------------------------------------------------------- conversations


def conversation(scene: Scene, rng: np.random.Generator, pool: Sequence[str] | None = None) -> Turns:
    """One to four exchanges about a picture, in LLaVA's form; the first human turn begins with "<image>" and a line break.

    Three styles: short answers (half of these bear LLaVA-1.5's line SHORT_ANSWER), whole sentences ("answer in a sentence."), and a
    description first, then short answers.
    """
    asked = questions(scene, rng, pool)
    order = [int(i) for i in rng.permutation(len(asked))][: int(rng.integers(1, 5))]
    style = rng.random()
    exchanges: list[tuple[str, str]] = []
    if style < 0.15:
        exchanges.append(
            (_pick(rng, DESCRIBE_PROMPTS), f"{_contents(scene, rng)} on {nouns.article(scene.background)} {scene.background} background.")
        )
        order = order[:3]
    in_sentences = style > 0.85
    suffix = " answer in a sentence." if in_sentences else f"\n{SHORT_ANSWER}" if rng.random() < 0.5 else ""
    for index in order:
        question = asked[index]
        exchanges.append((question.text + suffix, question.sentence if in_sentences else question.answer))
    return _turns(exchanges, "<image>\n")


def text_conversation(rng: np.random.Generator, pool: Sequence[str] | None = None) -> Turns:
    """One to three exchanges without a picture: what kind of thing something is, plurals, small sums."""
    names = nouns.object_names("trained") if pool is None else pool
    makers = (_category_fact, _kind_fact, _plural_fact, _sum_fact)
    return _turns([makers[int(rng.integers(len(makers)))](rng, names) for _ in range(int(rng.integers(1, 4)))], "")


def _turns(exchanges: Sequence[tuple[str, str]], prefix: str) -> Turns:
    turns: Turns = []
    for position, (human, gpt) in enumerate(exchanges):
        turns.append({"from": "human", "value": (prefix if position == 0 else "") + human})
        turns.append({"from": "gpt", "value": gpt})
    return turns


def _category_fact(rng: np.random.Generator, names: Sequence[str]) -> tuple[str, str]:
    name = _pick(rng, names)
    true = nouns.category(name)
    asked = true if rng.random() < 0.5 else _pick(rng, [kind for kind in categories() if kind != true])
    return f"{_be(name)} {nouns.with_article(name)} {nouns.article(asked)} {asked}?", "yes" if asked == true else "no"


def _kind_fact(rng: np.random.Generator, names: Sequence[str]) -> tuple[str, str]:
    name = _pick(rng, names)
    kind = nouns.category(name)
    return f"what kind of thing {_be(name)} {nouns.with_article(name)}?", f"{nouns.article(kind)} {kind}"


def _plural_fact(rng: np.random.Generator, names: Sequence[str]) -> tuple[str, str]:
    countable = [name for name in names if nouns.countable(name)]
    name = _pick(rng, countable or [name for name in nouns.object_names() if nouns.countable(name)])
    return f"what do you call two of {nouns.with_article(name)}?", f"two {nouns.plural(name)}"


def _sum_fact(rng: np.random.Generator, names: Sequence[str]) -> tuple[str, str]:
    first = int(rng.integers(1, 5))
    second = int(rng.integers(1, 6 - first))
    if rng.random() < 0.5:
        return f"what is {first} plus {second}?", str(first + second)
    return f"what is {first + second} minus {second}?", str(first)


def categories() -> list[str]:
    """All categories, in the table's order."""
    return list(dict.fromkeys(row.category for row in nouns.table().values()))


# ------------------------------------------------------------------------------------------------------------- for tokenizers


def all_text_sources(seed: int = 0, n_scenes: int = 2000) -> list[str]:
    """Text with everything this module can say: names, plurals, words, colours, captions, descriptions, conversations of drawn scenes.

    For training tokenizers and for fixing vocabularies. Unseen names are in the lists of names (a tokenizer has to spell them) and in
    no scene.
    """
    from mmkit.minidata.world import COLOURS, WORDS, sample_scene  # sampling is above language; only this list needs it

    texts = [*nouns.table(), *(nouns.with_article(name) for name in nouns.table()), *(nouns.plural(name) for name in nouns.table())]
    texts += [*COLOURS, *WORDS, *NUMBERS, *categories(), *DESCRIBE_PROMPTS, SHORT_ANSWER]
    texts += [word for name in nouns.table() for word in nouns.synonyms(name)]
    trained = nouns.object_names("trained")
    for index in range(n_scenes):
        rng = np.random.default_rng((seed, 77, index))
        scene = sample_scene(rng, trained, None, 0.3)
        texts += [caption(scene, rng), describe(scene)]
        texts += [turn["value"].replace("<image>\n", "") for turn in [*conversation(scene, rng), *text_conversation(rng)]]
    return texts
