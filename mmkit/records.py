"""JSON Lines files keyed by an id: append, resume by id, merge. What is missing stays missing.

with Records(folder / "answers.jsonl") as answers:
    for question in answers.todo(questions):
        answers.append({"question_id": question["question_id"], "answer": ask(question)})
"""

import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mmkit.checkpoint import atomic_write
from mmkit.errors import DataError


class Records:
    """A JSONL file that grows by whole lines and knows what it holds.

    Opening it reads what an earlier run left. A last line without its end (the process died while writing) is cut off, and said so.

    Args:
        path: The file; made, with its folder, on entering.
        key: The field that identifies a row.

    Attributes:
        done: Rows by id, in file order.

    Raises:
        DataError: A line in the middle is no JSON object, has no id, or repeats one.
    """

    def __init__(self, path: Path | str, key: str = "question_id") -> None:
        self.path = Path(path)
        self.key = key
        self.done: dict[Any, dict[str, Any]] = {}
        self._file: Any = None

    def __enter__(self) -> Self:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            repair(self.path)
            for number, row in enumerate(read_jsonl(self.path), 1):
                self._add(row, f"{self.path}, line {number}")
        self._file = open(self.path, "a", encoding="utf-8")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()
        self._file = None

    def __len__(self) -> int:
        return len(self.done)

    def todo(self, items: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
        """Give those items whose id is not in the file.

        Raises:
            DataError: An item has no id, or two items share one.
        """
        seen: set[Any] = set()
        for item in items:
            identity = self._identity(item, "an item")
            if identity in seen:
                raise DataError(f"two items have {self.key} {identity!r}: answers could not be told apart")
            seen.add(identity)
            if identity not in self.done:
                yield item

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row and flush it.

        Raises:
            DataError: The row has no id, or one that the file holds already.
        """
        if self._file is None:
            raise RuntimeError(f"{self.path} is not open: use `with Records(...) as records`")
        line = json.dumps(dict(row), ensure_ascii=False)
        self._add(dict(row), f"a new row for {self.path}")
        self._file.write(line + "\n")
        self._file.flush()

    def _add(self, row: dict[str, Any], where: str) -> None:
        identity = self._identity(row, where)
        if identity in self.done:
            raise DataError(f"{where}: {self.key} {identity!r} is in the file already; each id may have one row")
        self.done[identity] = row

    def _identity(self, row: Mapping[str, Any], where: str) -> Any:
        if self.key not in row:
            raise DataError(f"{where} has no '{self.key}'; it has {', '.join(row) or 'nothing'}")
        identity = row[self.key]
        if not isinstance(identity, str | int):
            raise DataError(f"{where}: {self.key} is {identity!r}; an id is text or a whole number")
        return identity


def repair(path: Path | str) -> bool:
    """Cut off a half-written last line, and say so on stderr.

    Returns:
        True if there was one. A last line that is whole JSON and lacks only its line end is completed instead.
    """
    path = Path(path)
    data = path.read_bytes()
    if not data or data.endswith(b"\n"):
        return False
    start = data.rfind(b"\n") + 1
    try:
        whole = isinstance(json.loads(data[start:]), dict)
    except ValueError:
        whole = False
    with open(path, "r+b") as file:
        if whole:
            file.seek(0, os.SEEK_END)
            file.write(b"\n")
        else:
            file.truncate(start)
    if not whole:
        print(f"{path}: the last line was half written ({len(data) - start} bytes) and has been removed", file=sys.stderr)
    return not whole


def read_jsonl(path: Path | str) -> list[dict[str, Any]]:
    """Read all rows of a JSONL file; blank lines are passed over.

    Raises:
        DataError: A line is no JSON object; the message names file and line.
    """
    rows: list[dict[str, Any]] = []
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number}, is no JSON: {error}; the line begins {line[:60]!r}") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}, holds a {type(row).__name__}, not an object with fields")
        rows.append(row)
    return rows


def merge(paths: Iterable[Path | str], out: Path | str, key: str = "question_id") -> int:
    """Join JSONL files of several processes into one, ordered as given.

    Returns:
        How many rows were written.

    Raises:
        DataError: Two files hold the same id with different rows. Equal rows are kept once.
    """
    rows: dict[Any, dict[str, Any]] = {}
    for path in paths:
        for row in read_jsonl(path):
            if key not in row:
                raise DataError(f"{path} has a row without '{key}': {str(row)[:80]}")
            if rows.setdefault(row[key], row) != row:
                raise DataError(f"{path}: {key} {row[key]!r} is in another of the files too, with other content")
    atomic_write(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows.values()))
    return len(rows)
