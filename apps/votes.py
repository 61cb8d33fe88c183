"""Votes of a blind comparison: kept in SQLite, rated by Bradley-Terry, exported as JSONL.

    votes = Votes("runs/votes.sqlite")
    votes.add(Vote(question="how many?", kind="count", first="clip", second="uta", choice="first", ...))
    votes.export("votes.jsonl")

A vote given while another process holds the file is kept in memory and written with the next one, or by `close`; where the file is held
even then, beside it as JSONL.
"""

from __future__ import annotations

import json
import os
import re
import sqlite3
import sys
import threading
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, get_args

from mmkit.checkpoint import atomic_write
from mmkit.errors import DataError
from mmkit.pairs import Game

Choice = Literal["first", "second", "tie", "both_bad"]
SCORES: dict[Choice, float] = {"first": 1.0, "second": 0.0, "tie": 0.5, "both_bad": 0.5}
WAIT, LAST_WAIT = 2.0, 15.0  # seconds for another process to let go of the file: with each vote, and at the end
KINDS = {  # of a free question, by its words; the first that fits
    "count": r"\bhow many\b|\bcount\b|\bnumber of\b",
    "colour": r"\bcolou?rs?\b",
    "reading": r"\b(written|word|text|read|say|says|spell)\b",
    "yes or no": r"^(is|are|was|were|do|does|did|can|could|has|have|will|would|should)\b",
    "describe": r"\b(describe|caption|explain|tell me)\b",
    "place": r"^where\b|\b(left|right|above|below|between|behind|front)\b",
    "object": r"^(what|which|who|name)\b",
}


def question_kind(question: str) -> str:
    """What a question asks for, by its words: count, colour, reading, yes or no, describe, place, object, other."""
    words = question.strip().lower()
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, words)), "other")


@dataclass(frozen=True)
class Vote:
    """One choice between two answers; `first` was shown first (on the left)."""

    question: str
    first: str
    second: str
    choice: Choice
    first_answer: str = ""
    second_answer: str = ""
    kind: str = ""
    images: str = ""  # SHA-256 of each, with commas
    settings: str = ""  # JSON of how the models were to answer
    at: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    def __post_init__(self) -> None:
        if self.choice not in get_args(Choice):
            raise DataError(f"a vote is one of {', '.join(get_args(Choice))}, not '{self.choice}'")
        if not self.kind:
            object.__setattr__(self, "kind", question_kind(self.question))

    @property
    def game(self) -> Game:
        """The vote for `mmkit.pairs`."""
        return Game(self.first, self.second, SCORES[self.choice])


COLUMNS = [column.name for column in fields(Vote)]


class Votes:
    """A file of votes, which several demos may share.

    Args:
        path: Made with the first vote.

    Raises:
        DataError: The file is no votes file, or lies where nothing can be written.
    """

    def __init__(self, path: Path | str, wait: float = WAIT) -> None:
        self.path, self.wait = Path(path), wait
        self.waiting: list[Vote] = []
        self._lock = threading.Lock()
        if self.path.exists():
            self.all()

    def add(self, vote: Vote) -> bool:
        """Keep a vote; gives whether it is in the file already (else it waits for another process to let go of it)."""
        with self._lock:
            self.waiting.append(vote)
        return self.flush()

    def flush(self, wait: float | None = None) -> bool:
        """Write what waits; gives whether nothing waits any more.

        Raises:
            DataError: The file cannot be written for another reason than a lock.
        """
        with self._lock:
            if not self.waiting:
                return True
            marks = ", ".join("?" * len(COLUMNS))
            rows = [tuple(asdict(vote)[name] for name in COLUMNS) for vote in self.waiting]
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with closing(sqlite3.connect(self.path, timeout=self.wait if wait is None else wait)) as file, file:
                    file.execute(
                        f"CREATE TABLE IF NOT EXISTS votes (id INTEGER PRIMARY KEY, {', '.join(f'{c} TEXT NOT NULL' for c in COLUMNS)})"
                    )
                    file.executemany(f"INSERT INTO votes ({', '.join(COLUMNS)}) VALUES ({marks})", rows)
            except (sqlite3.Error, OSError) as error:
                if "locked" in str(error):
                    return False
                raise DataError(f"votes cannot be written to {self.path}: {error}; {len(rows)} wait in memory") from error
            self.waiting = []
            return True

    def close(self, wait: float = LAST_WAIT) -> Path:
        """Write what waits, for the last time; gives the file that holds it: the votes' own, or, where that cannot be written, one beside it."""
        try:
            if self.flush(wait):
                return self.path
        except DataError as error:
            print(error, file=sys.stderr)
        beside = self.path.with_name(f"{self.path.stem}.waiting-{os.getpid()}.jsonl")
        atomic_write(beside, _lines(self.waiting))
        print(f"{self.path} could not be written: {len(self.waiting)} votes are in {beside}", file=sys.stderr)
        return beside

    def all(self) -> list[Vote]:
        """Every vote, the oldest first, those that wait included.

        Raises:
            DataError: The file is no votes file, or another process keeps it locked.
        """
        stored: list[Vote] = []
        if self.path.exists():
            try:
                with closing(sqlite3.connect(f"{self.path.resolve().as_uri()}?mode=ro", uri=True, timeout=self.wait)) as file:
                    if file.execute("SELECT name FROM sqlite_master WHERE name = 'votes'").fetchone():
                        rows = file.execute(f"SELECT {', '.join(COLUMNS)} FROM votes ORDER BY id").fetchall()
                        stored = [Vote(**dict(zip(COLUMNS, row, strict=True))) for row in rows]
            except sqlite3.Error as error:
                raise DataError(f"{self.path} cannot be read as a file of votes: {error}") from error
        return [*stored, *self.waiting]

    def export(self, path: Path | str) -> int:
        """Write all votes as JSONL; gives their number."""
        votes = self.all()
        atomic_write(Path(path), _lines(votes))
        return len(votes)


def _lines(votes: Sequence[Vote]) -> str:
    """Votes as JSONL."""
    return "".join(json.dumps(asdict(vote), ensure_ascii=False) + "\n" for vote in votes)


def by_kind(votes: Sequence[Vote]) -> dict[str, list[Vote]]:
    """Votes by the kind of their question, the commonest kind first."""
    kinds: dict[str, list[Vote]] = {}
    for vote in votes:
        kinds.setdefault(vote.kind, []).append(vote)
    return dict(sorted(kinds.items(), key=lambda item: -len(item[1])))
