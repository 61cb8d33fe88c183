"""The objects of the embedded world: their names, their drawings' files, and how English treats them.

The tables are `objects.txt`, `synonyms.txt` and `confusable.txt`, in this folder: data, kept apart so that they can be read and
corrected without reading code. Names are Unicode's own in lower case (a few shortened: "vertical traffic light" is "traffic light").
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Literal

from mmkit.errors import find

Split = Literal["trained", "unseen"]


@dataclass(frozen=True)
class Object:
    """One drawing of the table.

    Attributes:
        name: Lower-case name, unique in the table.
        category: What it is, as a noun: "animal", "food", "sky thing".
        file: OpenMoji's file name without ".svg": the Unicode code points in hexadecimal.
        grammar: "count" (a cat, two cats), "mass" (some bread), "plural" (some grapes).
        split: "trained", or "unseen": in no training split.
    """

    name: str
    category: str
    file: str
    grammar: str
    split: str


_IRREGULAR = {
    "buffalo": "buffaloes",
    "goose": "geese",
    "knife": "knives",
    "leaf": "leaves",
    "mosquito": "mosquitoes",
    "mouse": "mice",
    "ox": "oxen",
    "potato": "potatoes",
    "scarf": "scarves",
    "tomato": "tomatoes",
    "tooth": "teeth",
    "tornado": "tornadoes",
    "volcano": "volcanoes",
    "wolf": "wolves",
    **{same: same for same in ("bison", "blowfish", "deer", "fish", "jellyfish", "moose", "shrimp", "squid")},
}


def _lines(file: str) -> list[tuple[int, str]]:
    """Number and text of a data file's lines, without comments and empty ones."""
    text = (files("mmkit.minidata") / file).read_text(encoding="utf-8")
    return [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip() and not line.startswith("#")]


@cache
def _synonym_table() -> dict[str, tuple[str, ...]]:
    rows = (line.split("|") for _, line in _lines("synonyms.txt"))
    return {name.strip(): tuple(word.strip() for word in words.split(";")) for name, words in rows}


@cache
def confusable_groups() -> tuple[tuple[str, ...], ...]:
    """Groups of drawings that answer to one another's names."""
    return tuple(tuple(name.strip() for name in line.split(";")) for _, line in _lines("confusable.txt"))


@cache
def table() -> dict[str, Object]:
    """The whole table, name -> Object, in the order of `objects.txt`."""
    rows: dict[str, Object] = {}
    for number, line in _lines("objects.txt"):
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) != 5 or cells[2] in rows:
            raise ValueError(f"objects.txt, line {number}: {line!r}: five cells with a new name in the third were expected")
        category, file, name, grammar, split = cells
        rows[name] = Object(name, category, file, grammar, split)
    return rows


def lookup(name: str) -> Object:
    """The row of one name.

    Raises:
        NameNotFound: No drawing has this name; the message gives the nearest ones.
    """
    return find("drawing", table(), name)


def object_names(split: Split = "trained") -> list[str]:
    """Names of one split, in the table's order: 574 "trained", 60 "unseen"."""
    if split not in ("trained", "unseen"):
        raise ValueError(f"object_names({split!r}): the splits of drawings are 'trained' and 'unseen'")
    return [row.name for row in table().values() if row.split == split]


def evenly(names: list[str], count: int) -> list[str]:
    """As many names as asked for, evenly over the list (0: all)."""
    return [names[position * len(names) // count] for position in range(count)] if count else names


def category(name: str) -> str:
    """What the object is: "animal", "food", "vehicle", ..."""
    return lookup(name).category


@cache
def of_category(kind: str) -> frozenset[str]:
    """All names of one category, of both splits."""
    return frozenset(row.name for row in table().values() if row.category == kind)


def with_article(name: str) -> str:
    """ "a cat", "an owl", "some bread", "some grapes"."""
    if lookup(name).grammar != "count":
        return f"some {name}"
    return f"{article(name)} {name}"


def article(phrase: str) -> str:
    """ "a" or "an", by the sound the phrase begins with."""
    if phrase.startswith("hour"):
        return "an"
    return "an" if phrase[0] in "aeiou" and not phrase.startswith(("uni", "ewe", "euro")) else "a"


def countable(name: str) -> bool:
    """Whether "two ...s" can be said of it."""
    return lookup(name).grammar == "count"


def is_plural(name: str) -> bool:
    """Whether the name itself takes "are": grapes, scissors."""
    return lookup(name).grammar == "plural"


@cache
def plural(name: str) -> str:
    """ "cats", "mice", "pots of food". Names that are not countable come back as they are."""
    if not countable(name):
        return name
    for link in (" of ", " with ", " on ", " and ", " behind "):  # the head of the phrase bears the ending: "cups with straw"
        if link in name:
            head, rest = name.split(link, 1)
            return f"{_plural_word(head)}{link}{rest}"
    return _plural_word(name)


def _plural_word(phrase: str) -> str:
    *before, last = phrase.split(" ")
    if last in _IRREGULAR:
        last = _IRREGULAR[last]
    elif last.endswith(("s", "x", "ch", "sh", "z")):
        last += "es"
    elif last.endswith("y") and last[-2:-1] not in ("a", "e", "i", "o", "u", ""):
        last = last[:-1] + "ies"
    else:
        last += "s"
    return " ".join([*before, last])


def synonyms(name: str) -> tuple[str, ...]:
    """Other accepted names, most usual first; often none."""
    return _synonym_table().get(lookup(name).name, ())


@cache
def _groups() -> dict[str, frozenset[str]]:
    near: dict[str, set[str]] = {}
    for group in confusable_groups():
        for member in group:
            near.setdefault(member, set()).update(group)
    return {name: frozenset(others - {name}) for name, others in near.items()}


@cache
def _own_words(name: str) -> frozenset[str]:
    """The words a name and its synonyms are made of, and the whole synonyms: what two drawings must not share to be told apart."""
    return frozenset({*name.split(), *synonyms(name)} - {"of", "with", "on", "and", "behind"})


def confusable(first: str, second: str) -> bool:
    """Whether saying that `first` is absent could be disputed when `second` is in the picture (or the reverse)."""
    return first == second or second in _groups().get(first, ()) or not _own_words(first).isdisjoint(_own_words(second))


@cache
def _disputed(name: str) -> frozenset[str]:
    return frozenset(other for other in table() if confusable(other, name))


def absent_names(present: Iterable[str], pool: Iterable[str]) -> list[str]:
    """Names of the pool that are surely not in a picture of `present`, in the pool's order."""
    disputed = frozenset[str]().union(*(_disputed(name) for name in present))
    return [name for name in pool if name not in disputed]
