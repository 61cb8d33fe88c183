"""What a training would meet in a conversations file: facts of every row, padding of every way to batch them, memory of every stage.

`mmkit data check` (check_data.py) prints them. Nothing here needs the weights of a model.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from llm_stage.chat_format import IMAGE_MARK, ChatFormat
from llm_stage.conversations import encode_within, tiled
from llm_stage.llms import llm_source
from llm_stage.packing import plan_rows
from llm_stage.rows import Conversation, RowError, parse_row
from llm_stage.tiles import Tiles
from mmkit.batches import Layout, StreamOrder
from mmkit.errors import ConfigError, DataError
from mmkit.images import open_image

SUFFIXES = {
    ".jpg": {"JPEG", "MPO"}, ".jpeg": {"JPEG", "MPO"}, ".png": {"PNG"}, ".gif": {"GIF"}, ".webp": {"WEBP"}, ".bmp": {"BMP"},
    ".tif": {"TIFF"}, ".tiff": {"TIFF"},
}  # fmt: skip
ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}
"""What a whole file of a format ends with; one that ends otherwise is decoded, to see whether it is cut off."""


# -- rows ------------------------------------------------------------------------------------------------------------------------------


@dataclass
class ImageFacts:
    """A picture's size and format, from its header."""

    width: int
    height: int
    format: str
    remark: str = ""


@dataclass
class RowFacts:
    """What is to be known of one row.

    Attributes:
        id: As written, "" if there is none.
        content: A digest of turns and images; equal for rows that are the same but for their id.
        rounds, empty_answers: Questions with their answer, answers without a word.
        images: One entry for each picture that was looked at.
        n_images: How many the row names.
        words: Words and image tokens, as `ConversationDataset.lengths` counts them: what a training groups by.
        tokens: Length with image tokens, before anything is cut; 0 without a tokenizer.
        kept_tokens, label_tokens, lost_rounds: After max_length.
        reason, message: Why it cannot be trained on, or "".
    """

    id: str = ""
    content: str = ""
    rounds: int = 0
    empty_answers: int = 0
    images: list[ImageFacts] = field(default_factory=list)
    n_images: int = 0
    words: int = 0
    tokens: int = 0
    kept_tokens: int = 0
    label_tokens: int = 0
    lost_rounds: int = 0
    reason: str = ""
    message: str = ""


@dataclass
class Examiner(Dataset[RowFacts]):
    """Looks at rows, here or in workers.

    Args:
        rows: As read from the file.
        path: The file, for messages.
        image_root: Folder of the pictures; None leaves them alone.
        chat_format: Encodes rows; None leaves tokens out.
        tokens_per_image: Placeholders per picture.
        max_length: Tokens of a row.
        decode: Read every pixel, not only headers.
        strict: A picture whose name says another format makes its row bad.
        tiles: How pictures are cut; needs the folder.
    """

    rows: list[Any]
    path: str
    image_root: Path | None = None
    chat_format: ChatFormat | None = None
    tokens_per_image: int = 576
    max_length: int = 2048
    decode: bool = False
    strict: bool = False
    tiles: Tiles | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> RowFacts:
        facts = RowFacts(id=str(self.rows[index].get("id", "")) if isinstance(self.rows[index], dict) else "")
        try:
            item = parse_row(self.rows[index], f"{self.path}, row {index}")
            facts.rounds, facts.empty_answers, facts.n_images = len(item.turns) // 2, item.empty_answers, len(item.images)
            facts.words = item.words + len(item.images) * self.tokens_per_image
            facts.content = hashlib.blake2b(repr((item.system, item.turns, item.images)).encode(), digest_size=12).hexdigest()
            for name in item.images if self.image_root is not None else []:
                facts.images.append(self._look(item, name))
            if self.tiles is not None and self.image_root is not None:
                item, views = tiled(item, self.tiles, self.image_root)
                facts.words += (sum(views) - len(views)) * self.tokens_per_image
            if self.chat_format is not None:
                self._count(item, self.chat_format, facts)
        except RowError as error:
            facts.reason, facts.message = error.reason, str(error)
        except DataError as error:
            facts.reason, facts.message = "image unreadable", str(error)
        return facts

    def _look(self, item: Conversation, name: str) -> ImageFacts:
        assert self.image_root is not None
        found = look_at_image(self.image_root / name, item.where, self.decode)
        if found.remark and self.strict:
            raise RowError(f"{item.where}: {found.remark}", "image format")
        return found

    def _count(self, item: Conversation, chat_format: ChatFormat, facts: RowFacts) -> None:
        encoded, _ = encode_within(item, chat_format, self.tokens_per_image, 2**62)
        facts.tokens = len(encoded)
        if facts.tokens > self.max_length:
            encoded, kept = encode_within(item, chat_format, self.tokens_per_image, self.max_length)
            facts.lost_rounds = facts.rounds - kept
        facts.kept_tokens, facts.label_tokens = len(encoded), encoded.n_labels

    def examine(self, num_workers: int = 0) -> Iterator[RowFacts]:
        """Facts of all rows, in order."""
        loader: DataLoader[Any] = DataLoader(self, batch_size=64, num_workers=num_workers, collate_fn=list)
        for facts in loader:
            yield from facts


def look_at_image(path: Path, where: str, decode: bool = False) -> ImageFacts:
    """Read a picture's header, and the whole of it where the end of the file looks cut off.

    Raises:
        RowError, DataError: The file is missing or cannot be read.
    """
    if not path.is_file():
        raise RowError(f"{where}: image {path} is not there: fetch it, or name the folder that paths are relative to", "image missing")
    try:
        with Image.open(path) as image:
            facts = ImageFacts(*image.size, format=str(image.format))
    except Exception:  # whatever PIL says: open_image says it better, or opens the picture after all
        picture = open_image(path, where)
        facts = ImageFacts(*picture.size, format="unknown")
    if decode or not _ends_well(path, facts.format):
        open_image(path, where)
    expected = SUFFIXES.get(path.suffix.lower())
    if expected and facts.format not in expected:
        facts.remark = f"{path} is a {facts.format} by its content; it is read as that, other programs go by the name"
    return facts


def _ends_well(path: Path, kind: str) -> bool:
    if kind not in ENDS:
        return True
    with open(path, "rb") as file:
        file.seek(-min(16, os.fstat(file.fileno()).st_size), os.SEEK_END)
        return file.read().rstrip(b"\0").endswith(ENDS[kind])


# -- batches ---------------------------------------------------------------------------------------------------------------------------


@dataclass
class Lengths:
    """Rows as far as the order of samples needs them: a data set without contents.

    Attributes:
        lengths: What a training groups by, words and image tokens.
        modalities: Whether there is an image.
        tokens: What a row then takes.
    """

    lengths: list[int]
    modalities: list[bool]
    tokens: list[int]

    def __len__(self) -> int:
        return len(self.lengths)


def padding(
    rows: Lengths, layout: Layout, tokens_per_image: int, *, group: int = 0, by_modality: bool = False, budget: int = 0, seed: int = 0
) -> tuple[float, int]:
    """Padding of an epoch's whole steps, the example that text-only micro-batches get included.

    Args:
        rows: The good rows.
        layout: Micro-batch and accumulation, of one rank.
        tokens_per_image: Length of the example added to a text-only micro-batch.
        group, by_modality: As `run.group_by_length`, `run.group_by_modality`.
        budget: As `data.pack_length`; 0 pads.
        seed: Of the order.

    Returns:
        The share of tokens that are padding, and the tokens computed.
    """
    order = StreamOrder(rows, seed, group, layout.global_batch_size, by_modality)
    steps = max(1, len(rows) // layout.global_batch_size)
    useful = computed = 0
    for begin in range(0, steps * layout.global_batch_size, layout.micro):
        indices = [order(place)[1] for place in range(begin, begin + layout.micro)]
        lengths = [rows.tokens[index] for index in indices]
        useful += sum(lengths)
        if not any(rows.modalities[index] for index in indices):
            lengths.append(tokens_per_image)
        if budget:
            dealt = plan_rows(lengths, budget)
            computed += len(dealt) * max(sum(lengths[index] for index in row) for row in dealt)
        else:
            computed += len(lengths) * max(lengths)
    return 1 - useful / computed, computed


# -- models, without their weights -----------------------------------------------------------------------------------------------------


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a language model, with `<image>`, as `load_llm` would give it.

    Raises:
        LookupError: The name is unknown.
        ConfigError: There is no tokenizer.
    """
    source = llm_source(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ConfigError(f"no tokenizer for '{name}' in {source}: {str(error).splitlines()[0]}") from error
    if IMAGE_MARK not in tokenizer.all_special_tokens:
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_MARK]}, replace_extra_special_tokens=False)
    return tokenizer


@dataclass
class Sizes:
    """Parameters of a LLaVA's parts, and of LoRA adapters of rank 1 in the LLM."""

    llm: int
    hidden: int
    vocabulary: int
    lora_rank_1: int
    tower: int = 0
    projector: int = 0


def llm_sizes(name: str) -> Sizes:
    """Count the parameters of a language model from its config: nothing is loaded."""
    config = AutoConfig.from_pretrained(llm_source(name))
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    adapted = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    lora = sum(
        module.in_features + module.out_features
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and path.endswith(adapted)
    )
    hidden, vocabulary = model.get_input_embeddings().weight.shape[1], model.get_input_embeddings().weight.shape[0]
    return Sizes(sum(parameter.numel() for parameter in model.parameters()), hidden, vocabulary, lora)


FORMULA = (
    "frozen weights 2 bytes; trained ones 16: bf16 weight and gradient 2 + 2, fp32 copy and Adam 4 + 8 (all in fp32: 4 + 4 + 8)",
    "ZeRO-2 shards 14 of the 16 over the processes, ZeRO-3 all, and the frozen ones too; activations come on top",
)


def memory(sizes: Sizes, lora_rank: int, ranks: int, frozen_bytes: int = 2) -> dict[str, dict[str, float]]:
    """Bytes of weights and optimizer states on one device, by stage and ZeRO stage.

    Source: the arithmetic of mixed-precision Adam (ZeRO, Rajbhandari et al., 2020, section 3.1).
    """
    adapters = lora_rank * sizes.lora_rank_1
    kinds = {
        "stage 1": (sizes.tower + sizes.llm, sizes.projector),
        f"stage 2, LoRA rank {lora_rank}": (sizes.tower + sizes.llm, sizes.projector + adapters),
        "stage 2, full": (sizes.tower, sizes.projector + sizes.llm),
    }
    return {
        kind: {
            "one process": frozen_bytes * frozen + 16 * trained,
            f"ZeRO-2 on {ranks}": frozen_bytes * frozen + (2 + 14 / ranks) * trained,
            f"ZeRO-3 on {ranks}": (frozen_bytes * frozen + 16 * trained) / ranks,
        }
        for kind, (frozen, trained) in kinds.items()
    }


def projector_size(width: int, hidden: int) -> int:
    """Parameters of mlp2x_gelu."""
    return width * hidden + hidden + hidden * hidden + hidden


def quantile(values: Sequence[int], share: float) -> int:
    """The value below which a share of the sorted values lies."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]
