"""Rows of a conversations file: read, held against the rules, named when they break them.

LLaVA's JSON (or JSON Lines) and Hugging Face's messages; see messages.py for the two forms.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_stage.chat_templates import IMAGE_MARK, Role, Turn
from llm_stage.messages import without_system
from mmkit.errors import DataError

ROLES: dict[str, Role] = {"human": "user", "gpt": "assistant"}


class RowError(DataError):
    """A row cannot be trained on. `reason` says why in a word or two, the same for all rows of that kind."""

    def __init__(self, message: str, reason: str = "form") -> None:  # a default, as workers pickle errors by their message
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Conversation:
    """One row: its id, turns (user first, answered to the end), image paths as written, and where it stands ("x.json, row 3 (id '7')").

    `system` replaces the template's system prompt, if the row brings one.
    """

    id: str
    turns: list[Turn]
    images: list[str]
    where: str
    system: str | None = None

    @property
    def words(self) -> int:
        """Words in all turns: a length that needs neither tokenizer nor pictures."""
        return sum(len(turn.text.split()) for turn in self.turns)

    @property
    def empty_answers(self) -> int:
        """Answers without a word; of these the end token alone is learned."""
        return sum(turn.role == "assistant" and not turn.text.strip() for turn in self.turns)


def read_rows(path: Path | str) -> list[Any]:
    """Read a JSON list, or JSON Lines, of rows.

    Raises:
        ValueError: The file is missing, is not JSON, or is JSON of another form; the message names the line.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise DataError(f"no conversations file {path}: check the path; `mmkit data mini --out DIR` makes a small set to try") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}): it should be JSON or JSON Lines of LLaVA rows") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): it should be a JSON or JSON Lines file of LLaVA rows") from error
    if text.lstrip()[:1] == "[":
        rows = _loads(text, path, 1)
    else:
        rows = [_loads(line, path, number) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        if len(rows) == 1 and isinstance(rows[0], dict) and not {"conversations", "messages"} & set(rows[0]):
            raise DataError(
                f"{path} holds one object with the keys {sorted(rows[0])[:6]}: it should be a list of rows with 'conversations' or 'messages'"
            )
    if not rows:
        raise DataError(f"{path} holds no rows: it should be a JSON list, or JSON Lines, of LLaVA rows")
    return rows


def _loads(text: str, path: Path, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise DataError(
            f"{path} is not valid JSON: line {line}, column {error.colno}: {error.msg}. Repair the file or fetch it "
            "again; it should be a list of rows, or one row per line"
        ) from error


def parse_row(row: Any, where: str) -> Conversation:
    """Turn a row into a conversation: a leading gpt turn is dropped, other keys are ignored.

    Args:
        row: {"id", "image": path or list of paths or absent, "conversations": [{"from": "human" | "gpt", "value": text}, ...]}, or the same
            as {"id", "images", "messages"}, see messages.py.
        where: Stands in front of every message.

    Raises:
        RowError: Anything is not as it should be.
    """
    if not isinstance(row, dict):
        raise RowError(f"{where} is {_short(row)}: a row is an object with 'conversations'", "form")
    where = f"{where} (id {row['id']!r})" if "id" in row else where
    system: str | None = None
    if "messages" in row and "conversations" not in row:
        try:
            system, row = without_system(row, where)
        except DataError as error:
            raise RowError(str(error), "form") from error
    turns = _turns(row, where)
    images = _images(row, where)
    marks = sum(turn.text.count(IMAGE_MARK) for turn in turns if turn.role == "user")
    if images and marks != len(images):
        raise RowError(
            f"{where}: {marks} {IMAGE_MARK} mark(s) in the human turns and {len(images)} image(s): write {IMAGE_MARK} once for each image, "
            "where it belongs",
            "image marks",
        )
    conversation = Conversation(str(row.get("id", "")), turns, images, where, system)
    if conversation.empty_answers * 2 == len(turns):
        message = f"{where}: no answer has a word, so there is nothing to learn: fill in the gpt values, or take the row out"
        raise RowError(message, "empty answers")
    return conversation


def _turns(row: dict[str, Any], where: str) -> list[Turn]:
    spoken = row.get("conversations")
    if not isinstance(spoken, list) or not spoken:
        kind = "has no 'conversations'" if spoken is None else f"has conversations {_short(spoken)}"
        raise RowError(f'{where} {kind}: give a list of turns {{"from": "human" or "gpt", "value": text}}', "form")
    turns = [_turn(turn, f"{where}, turn {index}") for index, turn in enumerate(spoken)]
    turns = turns[1:] if turns[0].role == "assistant" else turns
    for index, turn in enumerate(turns):
        if turn.role != ("assistant" if index % 2 else "user"):
            roles = " ".join("gpt" if t.role == "assistant" else "human" for t in turns[:8])
            order = f"roles out of order ({roles}{' ...' if len(turns) > 8 else ''})"
            raise RowError(f"{where}: {order}: human and gpt must alternate, human first", "roles")
    if not turns or turns[-1].role == "user":
        raise RowError(f"{where}: the last human turn has no answer: add the gpt turn, or take the question out", "roles")
    return turns


def _turn(turn: Any, where: str) -> Turn:
    if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
        raise RowError(f'{where} is {_short(turn)}: a turn is {{"from": "human" or "gpt", "value": text}}', "form")
    if turn.get("from") not in ROLES:
        raise RowError(
            f"{where} is from {turn.get('from')!r}: only 'human' and 'gpt' speak; a system prompt is a setting (--system), or the first of "
            "a row's 'messages'",
            "roles",
        )
    return Turn(ROLES[turn["from"]], turn["value"])


def _images(row: dict[str, Any], where: str) -> list[str]:
    given = row.get("image")
    images = [] if given is None else [given] if isinstance(given, str) else given
    if not isinstance(images, list) or not all(isinstance(name, str) and name for name in images):
        message = f"{where}: image is {_short(given)}: give a path, a list of paths, or leave the key out for text alone"
        raise RowError(message, "form")
    return images


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."
