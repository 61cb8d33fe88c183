"""LLaVA conversations: from JSON or JSONL rows to padded batches.

    dataset = ConversationDataset("instruct.json", "images", chat_format, encoder.spec, tokens_per_image=36)
    batch = collate([dataset[0], dataset[1]], pad_id=tokenizer.pad_token_id)

Rows are read and checked when the data set is made; pictures are opened when an item is asked for. What is wrong is an error that names
the file, the row and its id, or with `on_bad_sample="skip"` is left out, counted and listed. Nothing is mended in silence.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from llm_stage.chat_format import IGNORE_INDEX, IMAGE_MARK, ChatFormat, Encoded, Turn
from llm_stage.chat_templates import Role
from mmkit.errors import ConfigError, DataError
from mmkit.images import ImageSpec, open_image

Policy = Literal["error", "skip"]
ROLES: dict[str, Role] = {"human": "user", "gpt": "assistant"}


@dataclass(frozen=True)
class Conversation:
    """One row: its id, turns (user first, answered to the end), image paths as written, and where it stands ("x.json, row 3 (id '7')")."""

    id: str
    turns: list[Turn]
    images: list[str]
    where: str

    @property
    def words(self) -> int:
        """Words in all turns: a length that needs neither tokenizer nor pictures."""
        return sum(len(turn.text.split()) for turn in self.turns)

    @property
    def empty_answers(self) -> int:
        """Answers without a word; of these the end token alone is learned."""
        return sum(turn.role == "assistant" and not turn.text.strip() for turn in self.turns)


# -- reading ---------------------------------------------------------------------------------------------------------------------------


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
        rows = [_loads(line, path, number) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
        if len(rows) == 1 and isinstance(rows[0], dict) and "conversations" not in rows[0]:
            raise DataError(
                f"{path} holds one object with the keys {sorted(rows[0])[:6]}: it should be a list of rows with 'conversations'"
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
    """Turn a LLaVA row into a conversation: a leading gpt turn is dropped, other keys are ignored.

    Args:
        row: {"id", "image": path or list of paths or absent, "conversations": [{"from": "human" | "gpt", "value": text}, ...]}.
        where: Stands in front of every message.

    Raises:
        ValueError: Anything is not as it should be.
    """
    if not isinstance(row, dict):
        raise DataError(f"{where} is {_short(row)}: a row is an object with 'conversations'")
    where = f"{where} (id {row['id']!r})" if "id" in row else where
    spoken = row.get("conversations")
    if not isinstance(spoken, list) or not spoken:
        kind = "has no 'conversations'" if spoken is None else f"has conversations {_short(spoken)}"
        raise DataError(f'{where} {kind}: give a list of turns {{"from": "human" or "gpt", "value": text}}')
    turns = [_turn(turn, f"{where}, turn {index}") for index, turn in enumerate(spoken)]
    turns = turns[1:] if turns[0].role == "assistant" else turns
    for index, turn in enumerate(turns):
        if turn.role != ("assistant" if index % 2 else "user"):
            roles = " ".join("gpt" if t.role == "assistant" else "human" for t in turns[:8])
            raise DataError(
                f"{where}: roles out of order ({roles}{' ...' if len(turns) > 8 else ''}): human and gpt must alternate, human first"
            )
    if not turns or turns[-1].role == "user":
        raise DataError(f"{where}: the last human turn has no answer: add the gpt turn, or take the question out")
    images = _images(row, where)
    marks = sum(turn.text.count(IMAGE_MARK) for turn in turns if turn.role == "user")
    if images and marks != len(images):
        raise DataError(
            f"{where}: {marks} {IMAGE_MARK} mark(s) in the human turns and {len(images)} image(s): write {IMAGE_MARK} once for each image, "
            "where it belongs"
        )
    conversation = Conversation(str(row.get("id", "")), turns, images, where)
    if conversation.empty_answers * 2 == len(turns):
        raise DataError(f"{where}: no answer has a word, so there is nothing to learn: fill in the gpt values, or take the row out")
    return conversation


def _turn(turn: Any, where: str) -> Turn:
    if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
        raise DataError(f'{where} is {_short(turn)}: a turn is {{"from": "human" or "gpt", "value": text}}')
    if turn.get("from") not in ROLES:
        raise DataError(f"{where} is from {turn.get('from')!r}: only 'human' and 'gpt' speak; a system prompt is a setting, not a turn")
    return Turn(ROLES[turn["from"]], turn["value"])


def _images(row: dict[str, Any], where: str) -> list[str]:
    given = row.get("image")
    images = [] if given is None else [given] if isinstance(given, str) else given
    if not isinstance(images, list) or not all(isinstance(name, str) and name for name in images):
        raise DataError(f"{where}: image is {_short(given)}: give a path, a list of paths, or leave the key out for text alone")
    return images


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."


# -- checking --------------------------------------------------------------------------------------------------------------------------


@dataclass
class Check:
    """What `check` found. `bad` holds one message for each row that cannot be trained on."""

    rows: int = 0
    image_rows: int = 0
    text_rows: int = 0
    images: int = 0
    rounds: int = 0
    empty_answers: int = 0
    shortened_rows: int = 0
    lost_rounds: int = 0
    label_tokens: int = 0
    longest: int = 0
    bad: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        counts = ", ".join(f"{name.replace('_', ' ')} {value:,}" for name, value in vars(self).items() if name != "bad")
        return "\n".join([f"{counts}, bad rows {len(self.bad):,}", *self.bad[:20]])


def check(
    path: Path | str,
    image_root: Path | str | None = None,
    chat_format: ChatFormat | None = None,
    tokens_per_image: int = 1,
    max_length: int = 2048,
    decode: bool = True,
) -> Check:
    """Go through a whole file before a training: rows, roles, marks, pictures, lengths, labels.

    Args:
        path: LLaVA JSON or JSONL.
        image_root: Folder of the pictures; None leaves pictures alone.
        chat_format: Encodes every row to count tokens; None leaves that out.
        tokens_per_image: For the lengths.
        max_length: Tokens of a row.
        decode: Open and read every picture, not only see that the file is there.

    Raises:
        ValueError: The file itself cannot be read. Bad rows are in the result.
    """
    found = Check()
    conversations, found.bad = _parse_all(path, None)
    found.rows = len(conversations) + len(found.bad)
    for item in conversations:
        found.image_rows += bool(item.images)
        found.text_rows += not item.images
        found.images += len(item.images)
        found.rounds += len(item.turns) // 2
        found.empty_answers += item.empty_answers
        try:
            for name in item.images if image_root is not None else []:
                if decode:
                    open_image(Path(image_root or ".") / name, item.where)
                else:
                    _must_exist(Path(image_root or "."), name, item.where)
            if chat_format is not None:
                encoded, rounds = encode_within(item, chat_format, tokens_per_image, max_length)
                lost = len(item.turns) // 2 - rounds
                found.shortened_rows += lost > 0
                found.lost_rounds += lost
                found.label_tokens += encoded.n_labels
                found.longest = max(found.longest, len(encoded))
        except DataError as error:
            found.bad.append(str(error))
    return found


def _parse_all(path: Path | str, image_root: Path | None) -> tuple[list[Conversation], list[str]]:
    good: list[Conversation] = []
    bad: list[str] = []
    for index, row in enumerate(read_rows(path)):
        try:
            item = parse_row(row, f"{path}, row {index}")
            for name in item.images if image_root is not None else []:
                assert image_root is not None
                _must_exist(image_root, name, item.where)
            good.append(item)
        except DataError as error:
            bad.append(str(error))
    return good, bad


def _must_exist(root: Path, name: str, where: str) -> None:
    if not (root / name).is_file():
        raise DataError(
            f"{where}: image {root / name} is not there: fetch it, or give the folder that {name!r} is relative to (--data.images)"
        )


def encode_within(item: Conversation, chat_format: ChatFormat, tokens_per_image: int, max_length: int) -> tuple[Encoded, int]:
    """Encode a conversation in at most `max_length` tokens, leaving out whole rounds at its end.

    Returns:
        The ids and labels, and how many rounds are kept. An image goes only with its whole round.

    Raises:
        ValueError: Not even the first round fits, or no label is left.
    """
    full = 0
    for rounds in range(len(item.turns) // 2, 0, -1):
        turns = item.turns[: 2 * rounds]
        n_images = sum(turn.text.count(IMAGE_MARK) for turn in turns if turn.role == "user") if item.images else 0
        try:
            encoded = chat_format.encode(turns, n_images, tokens_per_image)
        except DataError as error:
            raise DataError(f"{item.where}: {error}") from error
        full = full or len(encoded)
        if len(encoded) <= max_length:
            if encoded.n_labels == 0:
                break
            if not any(turn.text.strip() for turn in turns[1::2]):
                break
            return encoded, rounds
    else:
        raise DataError(
            f"{item.where}: its first round alone has {len(encoded)} tokens ({n_images * tokens_per_image} of images, never cut), "
            f"max_length is {max_length}: set it to at least {len(encoded)} (the whole row takes {full}), or take the row out"
        )
    raise DataError(
        f"{item.where}: the {max_length} tokens of max_length hold no answer with a word: raise it to {full}, or take the row out"
    )


# -- items and batches -----------------------------------------------------------------------------------------------------------------


class ConversationDataset:
    """Conversations as training examples.

    Args:
        path: LLaVA JSON or JSONL.
        image_root: Folder that image paths are relative to; None for text alone.
        chat_format: Encodes turns.
        spec: Turns pictures into tensors; None for text alone.
        tokens_per_image: Placeholders per picture.
        max_length: Tokens of a row; whole rounds at the end are left out beyond it.
        on_bad_sample: "error" stops at the first bad row; "skip" leaves rows out, and gives None for a picture that turns out broken.

    Attributes:
        conversations: The rows in use.
        skipped: One message for each row left out when the file was read.
        broken: Messages by index, for items that could not be made since (only what this process asked for).
        image_source: Gives the tensor of a picture by its name, in place of opening it; None opens it.

    Raises:
        ValueError: A row is bad and the policy is "error"; or no row is left.
    """

    def __init__(
        self,
        path: Path | str,
        image_root: Path | str | None,
        chat_format: ChatFormat,
        spec: ImageSpec | None = None,
        tokens_per_image: int = 1,
        max_length: int = 2048,
        on_bad_sample: Policy = "error",
    ) -> None:
        self.root = Path(image_root) if image_root not in (None, "") else None
        self.chat_format, self.tokens_per_image, self.max_length, self.policy = chat_format, tokens_per_image, max_length, on_bad_sample
        self._transform = spec.transform() if spec is not None else None
        self.conversations, self.skipped = _parse_all(path, self.root)
        self.broken: dict[int, str] = {}
        self.image_source: Callable[[str], Tensor] | None = None
        if self.skipped and on_bad_sample == "error":
            more = f"\n  {len(self.skipped) - 1} more rows are bad too." if len(self.skipped) > 1 else ""
            raise DataError(f"{self.skipped[0]}{more}\n  --data.on_bad_sample skip leaves bad rows out, counted and listed")
        if self.skipped:
            print(f"{path}: {skip_report(self.skipped, len(self.skipped) + len(self.conversations))}", flush=True)
        if not self.conversations:
            raise DataError(f"{path}: not one of its {len(self.skipped)} rows can be used; the first: {self.skipped[0]}")
        pictured = next((item for item in self.conversations if item.images), None)
        if pictured is not None and (self._transform is None or self.root is None):
            raise ConfigError(
                f"{pictured.where} has an image, and no folder of images is given (--data.images); text-only training takes no images"
            )

    def __len__(self) -> int:
        return len(self.conversations)

    @property
    def lengths(self) -> list[int]:
        """Words and image tokens of each row, from the index alone; good enough to group rows of like length."""
        return [item.words + len(item.images) * self.tokens_per_image for item in self.conversations]

    @property
    def modalities(self) -> list[bool]:
        """Whether each row has an image."""
        return [bool(item.images) for item in self.conversations]

    def __getitem__(self, index: int) -> dict[str, Any] | None:
        """One example: "input_ids", "labels" (lists), "images" (tensors [3, H, W]); None for a bad one under "skip"."""
        item = self.conversations[index]
        try:
            encoded, rounds = encode_within(item, self.chat_format, self.tokens_per_image, self.max_length)
            kept = sum(turn.text.count(IMAGE_MARK) for turn in item.turns[: 2 * rounds : 2]) if item.images else 0
            return {
                "input_ids": encoded.input_ids,
                "labels": encoded.labels,
                "images": [self._open(item, name) for name in item.images[:kept]],
            }
        except DataError as error:
            if self.policy == "error":
                raise
            if index not in self.broken:
                self.broken[index] = str(error)
                print(f"skipped: {error}", flush=True)
            return None

    def _open(self, item: Conversation, name: str) -> Tensor:
        if self.image_source is not None:
            return self.image_source(name)
        assert self.root is not None
        assert self._transform is not None
        tensor: Tensor = self._transform(open_image(self.root / name, item.where))
        return tensor


def skip_report(messages: Sequence[str], rows: int, shown: int = 5) -> str:
    """How many rows were left out, and the first of them."""
    lines = [f"{len(messages)} of {rows} rows skipped", *messages[:shown]]
    if len(messages) > shown:
        lines.append(f"... and {len(messages) - shown} more")
    return "\n  ".join(lines)


def collate(
    items: Sequence[Mapping[str, Any]], pad_id: int, image_token_id: int | None = None, tokens_per_image: int | None = None
) -> dict[str, Any]:
    """Pad examples on the right and stack their pictures.

    Args:
        items: Examples of `ConversationDataset`, or rows of `packing.pack`.
        pad_id: Fills up the ids; masked and without labels, so any id will do.
        image_token_id: With tokens_per_image, each row's placeholders are held against its own pictures: transformers compares only sums.
        tokens_per_image: See image_token_id.

    Returns:
        "input_ids", "attention_mask", "labels" [B, L], and "pixel_values" [images, 3, H, W], None where no row has a picture. Packed rows
        have "position_ids" [B, L] in which each example, and the padding, starts from 0, "real_tokens", and None for "attention_mask".

    Raises:
        ValueError: A row's placeholders do not fit its pictures.
    """
    packed = "position_ids" in items[0]
    length = max(len(item["input_ids"]) for item in items)
    ids = torch.full((len(items), length), pad_id)
    mask, positions = torch.zeros_like(ids), torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORE_INDEX)
    pictures: list[Tensor] = []
    for row, item in enumerate(items):
        n, images = len(item["input_ids"]), item.get("images", [])
        if image_token_id is not None and tokens_per_image is not None:
            placeholders = Counter(item["input_ids"])[image_token_id]
            if placeholders != tokens_per_image * len(images):
                raise DataError(
                    f"row {row} of the batch: {placeholders} image placeholders, {len(images)} picture(s) of {tokens_per_image} tokens"
                )
        ids[row, :n], labels[row, :n], mask[row, :n] = torch.tensor(item["input_ids"]), torch.tensor(item["labels"]), 1
        if packed:
            positions[row] = torch.tensor([*item["position_ids"], *range(length - n)])
        pictures += images
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels, "pixel_values": torch.stack(pictures) if pictures else None}
    # a mask given with the positions would switch the separation off without a word
    return {**batch, "attention_mask": None, "position_ids": positions, "real_tokens": int(mask.sum())} if packed else batch
