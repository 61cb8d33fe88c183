"""Words of a caption, as the caption metrics count them.

COCO's figures are made of words cut by the Penn Treebank tokeniser of CoreNLP 3.4.1, a Java program. Where Java and pycocoevalcap are,
`java_tokens` runs it; `tokens` is a rewriting of its rules for captions in Python. The two differ where CoreNLP knows more abbreviations
and emoticons than stand here: figures made with either say which in their protocol (`ptb_java`, `ptb_python`).
"""

from __future__ import annotations

import os
import re
import shutil
import unicodedata
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from mmkit.errors import ConfigError

PTB_PYTHON, PTB_JAVA = "ptb_python", "ptb_java"
# what the official evaluation drops after cutting; it lists -LRB- in capitals, so that the lower-case -lrb- of brackets stays
_DROPPED = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_TWO_WORDS = {"cannot": "can not", "gonna": "gon na", "wanna": "wan na", "gotta": "got ta", "gimme": "gim me", "lemme": "lem me"}
_TWO_WORDS |= {"'tis": "'t is", "'twas": "'t was", "y'all": "y' all"}
_MONEY = {"£": "#", "€": "$"}
_TITLES = "mr|mrs|ms|messrs|dr|drs|prof|rev|hon|gen|col|capt|lt|sgt|maj|gov|sen|rep|pres|st|ave|blvd|rd|hwy|mt|ft|jr|sr|bros|co|corp|inc"
_TITLES += "|ltd|vs|etc|jan|feb|mar|apr|jun|jul|aug|sep|sept|oct|nov|dec"
_LETTER = r"[^\W\d_]"
_WORD = rf"(?:{_LETTER}|[\d_])+"
_TOKEN = re.compile(
    rf"""(?P<url>(?:https?://|www\.)[^\s<>"]+)
    |(?P<tag></?[a-z][^<>\s]*/?>)
    |(?P<initials>(?<![\w.]){_LETTER}(?:\.{_LETTER})+(?:\.|(?!\w)))
    |(?P<initial>(?<![\w'.]){_LETTER}\.(?!\w))
    |(?P<dotted>(?<![\w']){_LETTER}{{2,}}(?:\.{_LETTER}+)+)
    |(?P<title>(?<!\w)(?:{_TITLES})\.)
    |(?P<numbered>(?<!\w)(?:no|nos|fig|vol|p|pp)\.(?=\s*\d))
    |(?P<mail>[\w.]+@\w+\.\w+)
    |(?P<name>[#@]{_LETTER}\w*)
    |(?P<pair>(?<!\w){_LETTER}&{_LETTER}(?!\w))
    |(?P<signed>(?<![\w)])[-+]\d+(?:[.,:/]\d+)*\b)
    |(?P<plus>(?<!\w)c\+\+)
    |(?P<number>(?:\d+(?:[.,:/]\d+)+|\d*\.\d+)(?:-{_WORD})*)
    |(?P<and>'n'?(?!\w)|'em\b|'til\b|'cause\b|'\d0s\b)
    |(?P<word>'t(?:is|was)\b|(?:o'|d'|l')?{_WORD}(?:[-/](?={_LETTER}|\d){_WORD})*(?:'{_LETTER}+)?|{_WORD})
    |(?P<clitic>'(?:s|ll|re|ve|d|m)\b)
    |(?P<many>\.\.\.|[?!]{{2,}}|--+|''|``)
    |(?P<mark>[^\s\w])""",
    re.VERBOSE | re.IGNORECASE,
)
_CLITIC = re.compile(r"^(.+?)(n't|'(?:s|ll|re|ve|d|m))$", re.IGNORECASE)
_QUOTES = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "´": "'", "…": " ... ", "–": " -- ", "—": " -- ", "\u00a0": " "})


def tokens(text: str) -> list[str]:
    """The words of one caption, lower-cased, without punctuation, in the manner of the Penn Treebank tokeniser.

    Contractions are cut ("is n't", "it 's", "can not"), hyphens and slashes are not, brackets become "-lrb-" and so on.
    """
    found: list[str] = []
    for match in _TOKEN.finditer(text.translate(_QUOTES).lower()):
        word, kind = match.group(), match.lastgroup
        if kind == "word":
            found += _cut(word)
        elif kind == "mark":
            found += [(_BRACKETS | _MONEY).get(word, word)] if word != '"' and not _unknown(word) else []
        else:
            found.append("--" if kind == "many" and word.startswith("--") else word)
    return [word for word in found if word not in _DROPPED]


def _cut(word: str) -> list[str]:
    """Cut a contraction into its words."""
    if word in _TWO_WORDS:
        return _TWO_WORDS[word].split()
    match = _CLITIC.match(word)
    return [match.group(1), match.group(2)] if match else [word]


def _unknown(mark: str) -> bool:
    """True for signs that the tokeniser does not know and leaves out: emoji and other pictures."""
    return unicodedata.category(mark) in ("So", "Cs", "Cn", "Co", "Cf", "Mn") and ord(mark) > 0xFF


def java_works() -> bool:
    """True where Java and pycocoevalcap are, in a place that can be written to: the tokeniser puts its input beside its jar."""
    if shutil.which("java") is None:
        return False
    return any(os.access(Path(root) / "tokenizer", os.W_OK) for root in package_folders())


def package_folders() -> list[str]:
    """Where pycocoevalcap lies; empty where it does not."""
    spec = find_spec("pycocoevalcap")
    return list(spec.submodule_search_locations or []) if spec else []


def java_tokens(texts: Sequence[str]) -> list[list[str]]:
    """The words of many captions by CoreNLP itself, in one start of Java.

    Raises:
        ConfigError: Java or pycocoevalcap is not there.
    """
    if not java_works():
        raise ConfigError("the Penn Treebank tokeniser needs Java and `pip install 'mmkit[captions]'` (writable); ptb_python needs neither")
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    cut = PTBTokenizer().tokenize({number: [{"caption": text}] for number, text in enumerate(texts)})
    return [cut[number][0].split() for number in range(len(texts))]
