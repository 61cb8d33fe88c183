"""LLaVA conversations: from JSON or JSONL rows to padded batches.

    dataset = ConversationDataset("instruct.json", "images", chat_format, encoder.spec, tokens_per_image=36)
    batch = collate([dataset[0], dataset[1]], pad_id=tokenizer.pad_token_id)

Rows are read and checked when the data set is made; pictures are opened when an item is asked for. What is wrong is an error that names
the file, the row and its id, or with `on_bad_sample="skip"` is left out, counted and listed. Nothing is mended in silence.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from llm_stage.chat_format import IGNORE_INDEX, IMAGE_MARK, ChatFormat, Encoded, Turn
from llm_stage.rows import Conversation, RowError, parse_row, read_rows
from llm_stage.tiles import Tiles
from mmkit.errors import ConfigError, DataError
from mmkit.images import ImageSpec, open_image

Policy = Literal["error", "skip"]


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
    tiles: Tiles | None = None,
) -> Check:
    """Go through a whole file before a training: rows, roles, marks, pictures, lengths, labels.

    Args:
        path: LLaVA JSON or JSONL.
        image_root: Folder of the pictures; None leaves pictures alone.
        chat_format: Encodes every row to count tokens; None leaves that out.
        tokens_per_image: For the lengths.
        max_length: Tokens of a row.
        decode: Open and read every picture, not only see that the file is there.
        tiles: How pictures are cut; needs the folder.

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
            if tiles is not None and image_root is not None:
                item = tiled(item, tiles, Path(image_root))[0]
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
        message = f"{where}: image {root / name} is not there: fetch it, or give the folder that {name!r} is relative to (--data.images)"
        raise RowError(message, "image missing")


def tiled(item: Conversation, tiles: Tiles, root: Path) -> tuple[Conversation, list[int]]:
    """Give a conversation with a placeholder for each view of its pictures, and how many views each picture has.

    Raises:
        ImageError: A picture's header cannot be read.
    """
    counts = [tiles.count_of(root / name, item.where) for name in item.images]
    turns, seen = [], 0
    for turn in item.turns:
        marks = turn.text.count(IMAGE_MARK) if turn.role == "user" and counts else 0
        turns.append(replace(turn, text=tiles.place(turn.text, counts[seen : seen + marks])) if marks else turn)
        seen += marks
    return replace(item, turns=turns), counts


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
        spoken = turns if item.system is None else [Turn("system", item.system), *turns]
        try:
            encoded = chat_format.encode(spoken, n_images, tokens_per_image)
        except DataError as error:
            raise RowError(f"{item.where}: {error}", "template") from error
        full = full or len(encoded)
        if len(encoded) <= max_length:
            if encoded.n_labels == 0:
                break
            if not any(turn.text.strip() for turn in turns[1::2]):
                break
            return encoded, rounds
    else:
        raise RowError(
            f"{item.where}: its first round alone has {len(encoded)} tokens ({n_images * tokens_per_image} of images, never cut), "
            f"max_length is {max_length}: set it to at least {len(encoded)} (the whole row takes {full}), or take the row out",
            "too long",
        )
    message = f"{item.where}: the {max_length} tokens of max_length hold no answer with a word: raise it to {full}, or take the row out"
    raise RowError(message, "no label")


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
        tiles: How pictures are cut; None shows them whole.

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
        tiles: Tiles | None = None,
    ) -> None:
        self.spec, self.tiles = spec, tiles
        self.root = Path(image_root) if image_root not in (None, "") else None
        self.chat_format, self.tokens_per_image, self.max_length, self.policy = chat_format, tokens_per_image, max_length, on_bad_sample
        self._transform = spec.transform() if spec is not None else None
        self.conversations, self.skipped = _parse_all(path, self.root)
        self.views: list[list[int]] = []  # of each row's pictures, where they are cut
        if tiles is not None and self.root is not None:
            self._cut(tiles, self.root)
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

    def _cut(self, tiles: Tiles, root: Path) -> None:
        """Put a placeholder for each view; rows whose pictures have no header are bad ones."""
        rows, self.conversations = self.conversations, []
        for item in rows:
            try:
                row, counts = tiled(item, tiles, root)
            except DataError as error:
                self.skipped.append(str(error))
                continue
            self.conversations.append(row)
            self.views.append(counts)

    def __len__(self) -> int:
        return len(self.conversations)

    @property
    def lengths(self) -> list[int]:
        """Words and image tokens of each row, from the index alone; good enough to group rows of like length."""
        views = [sum(counts) for counts in self.views] or [len(item.images) for item in self.conversations]
        return [item.words + count * self.tokens_per_image for item, count in zip(self.conversations, views, strict=True)]

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
                "images": self._pictures(index, kept),
            }
        except DataError as error:
            if self.policy == "error":
                raise
            if index not in self.broken:
                self.broken[index] = str(error)
                print(f"skipped: {error}", flush=True)
            return None

    def _pictures(self, index: int, kept: int) -> list[Tensor]:
        """Tensors of the first `kept` placeholders of a row."""
        item = self.conversations[index]
        if self.tiles is None or not self.views:
            return [self._open(item, name) for name in item.images[:kept]]
        assert self.root is not None
        assert self.spec is not None
        assert self._transform is not None
        found: list[Tensor] = []
        for name, count in zip(item.images, self.views[index], strict=True):
            if len(found) == kept:
                break
            whole, *tiles = self.tiles.views(open_image(self.root / name, item.where))
            if 1 + len(tiles) != count:
                raise DataError(f"{item.where}: {name} has {1 + len(tiles)} views, its header said {count}: it changed, or its header lies")
            found += [self._transform(whole), *(self.spec.normalise(tile) for tile in tiles)]
        return found

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
