"""The language of the embedded world as chats for a language model: scenes in words, where LLaVA will later put an image.

mini-llm has to answer about a picture it reads as 36 tokens, one a patch. So in half of its training chats the `<image>` placeholders are
there already, and what stands in each is what a good projector would write: the mean of the embeddings of the words that name what is
in the cell ("racing", "car", "blue"). Later, LLaVA's projector has only to map patches to words. The other chats say the scene in text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from llm_stage.chat_format import IGNORE_INDEX, IMAGE_MARK, ChatFormat, Turn
from mmkit.minidata import language, names, world
from mmkit.minidata.scene import Scene, place_of

GRID = 6  # patches of 16 pixels in a picture of 96
_NAMED = 0.2  # share of a cell that an object must cover to give it its name
_SEEN = 0.35  # share of a cell that must be background for its colour to be told

CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}<|im_start|>assistant{% generation %} {{ message['content'] }}"
    "<|im_end|>{% endgeneration %}{% else %}<|im_start|>{{ message['role'] }} {{ message['content'] }}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)
"""chatml with blanks for line breaks, so that a word is one token wherever it stands; the end token is inside the generation mark."""


def build_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of exactly `vocab_size` tokens at most, lower case, with chat marks and `<image>`."""
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])  # the embedded world is written in lower case
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<|im_start|>", "<|im_end|>", IMAGE_MARK],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([f" {text}" for text in texts], trainer)  # a blank in front: nearly every word stands behind one
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<|im_end|>",
        extra_special_tokens=["<|im_start|>", IMAGE_MARK],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def cells_of(scene: Scene, grid: int = GRID) -> list[list[str]]:
    """What each cell of the scene shows, in raster order: an object's name, letters of a word, the background's colour.

    Returns:
        grid * grid lists of one to three texts.
    """
    step = scene.size // grid
    shown = np.zeros((len(scene.objects), grid, grid))
    for index, item in enumerate(scene.objects):
        shown[index] = item.mask.reshape(grid, step, grid, step).mean((1, 3))
    cells: list[list[str]] = []
    for row in range(grid):
        for column in range(grid):
            cell = [item.name for index, item in enumerate(scene.objects) if shown[index, row, column] >= _NAMED]
            if scene.word is not None and _overlap(scene.word.box, column * step, row * step, step) >= _NAMED:
                cell.append(scene.word.text)
            if not cell or 1 - shown[:, row, column].sum() >= _SEEN:
                cell.append(scene.background)
            cells.append(cell)
    return cells


def _overlap(box: tuple[int, int, int, int], left: int, top: int, side: int) -> float:
    width = min(box[0] + box[2], left + side) - max(box[0], left)
    height = min(box[1] + box[3], top + side) - max(box[1], top)
    return max(0, width) * max(0, height) / side**2


def places(grid: int = GRID) -> list[str]:
    """The third of the canvas of each cell, in words: "top left", "top", ..., in raster order."""
    rows, columns = ("top", "", "bottom"), ("left", "", "right")
    thirds = [min(2, 3 * index // grid) for index in range(grid)]
    return [" ".join(filter(None, (rows[r], columns[c]))) or "middle" for r in thirds for c in thirds]


@dataclass(frozen=True)
class Chat:
    """One training chat: turns, and for the image placeholders the words that stand in each with their weights."""

    turns: list[Turn]
    cells: list[list[tuple[str, float]]]
    kinds: list[str]


Exchange = tuple[str, str, str]
"""Kind of question, question, answer."""

FORMS = ("cells", "loose", "describe", "facts", "read", "repeat")
"""How a scene is told: in image placeholders, as loose words with places, in sentences. Then chats without questions about a scene: facts;
the words of all placeholders read out one by one; a list of words said again. The last two are nothing but copying, which is what answering
about a picture begins with, and which a small model learns late from answers of one word."""
SHARES = (0.47, 0.1, 0.1, 0.08, 0.2, 0.05)
READ_PROMPT = "read the cells of the picture."
REPEAT_PROMPT = "repeat:"


class WorldText:
    """Chats about scenes drawn at random, the same for the same (seed, epoch, index).

    Args:
        chat_format: Encodes them.
        length: Chats in an epoch.
        seed: Of everything.
        shares: How often each of `FORMS` is used.
        heard: Share of the chats in which the user's words are supervised too: four times the labels, and half of those copy as well.
        budget: Tokens of a chat, about: questions are added while they fit. Chats of one length waste nothing on padding.
    """

    def __init__(
        self,
        chat_format: ChatFormat,
        length: int,
        seed: int = 0,
        shares: Sequence[float] = SHARES,
        heard: float = 0.5,
        budget: int = 128,
    ) -> None:
        self.chat_format, self.length, self.seed, self.heard, self.budget = chat_format, length, seed, heard, budget
        self.shares = np.asarray(shares, dtype=float) / sum(shares)
        self._words: dict[str, list[int]] = {}
        # All names, also those whose drawings are kept back: a language model knows words whose pictures it has never seen.
        self.names = [*names.object_names("trained"), *names.object_names("unseen")]
        self._places = places()

    def __len__(self) -> int:
        return self.length

    def get(self, epoch: int, index: int) -> dict[str, Any]:
        """One chat: "input_ids", "labels", and "cells", for each placeholder its [(token id, weight), ...]."""
        rng = np.random.default_rng((self.seed, epoch, index))
        item = self.encode(self.chat(rng, FORMS[int(rng.choice(len(FORMS), p=self.shares))]))
        if rng.random() < self.heard:
            image = self.chat_format.image_token_id
            item["labels"] = [IGNORE_INDEX if token == image else token for token in item["input_ids"]]
        return item

    def encode(self, chat: Chat) -> dict[str, Any]:
        """Token ids and labels of a chat, and the words in its placeholders as token ids."""
        n_images = int(bool(chat.cells))
        encoded = self.chat_format.encode(chat.turns, n_images, len(chat.cells))
        cells = [[(token, weight) for text, weight in cell for token in self._ids(text)] for cell in chat.cells]
        return {"input_ids": encoded.input_ids, "labels": encoded.labels, "cells": cells}

    def _ids(self, text: str) -> list[int]:
        if text not in self._words:
            if len(self._words) > 50_000:  # questions come in endless forms, names do not
                self._words.clear()
            self._words[text] = self.chat_format.tokenizer.backend_tokenizer.encode(f" {text}", add_special_tokens=False).ids
        return self._words[text]

    def chat(self, rng: np.random.Generator, form: str) -> Chat:
        """Draw a scene, tell it in the given form, ask as many of its questions as fit."""
        if form == "facts":
            spoken = [turn["value"] for _ in range(8) for turn in language.text_conversation(rng, self.names)]
            exchanges = self._fitting([("facts", *pair) for pair in zip(spoken[::2], spoken[1::2], strict=True)], 0)
            return Chat(_turns(exchanges, ""), [], [kind for kind, _, _ in exchanges])
        if form == "repeat":
            said = ", ".join(self._any_words(rng, int(rng.integers(4, 14))))
            return Chat([Turn("user", f"{REPEAT_PROMPT}\n{said}"), Turn("assistant", said)], [], ["repeat"])
        scene = world.sample_scene(rng, self.names, None, 0.25)
        if form == "read":
            told = cells_of(scene) if rng.random() < 0.6 else [[word] for word in self._any_words(rng, GRID * GRID)]
            turns = [Turn("user", f"{IMAGE_MARK}\n{READ_PROMPT}"), Turn("assistant", " ".join(cell[0] for cell in told))]
            return Chat(turns, self._weighted(told, rng), ["read"])
        head, cells = self.told(scene, rng, form)
        exchanges = self._fitting(self._exchanges(scene, rng), len(cells) or len(self._ids(head)))
        return Chat(_turns(exchanges, f"{head}\n"), cells, [kind for kind, _, _ in exchanges])

    def _fitting(self, exchanges: list[Exchange], used: int) -> list[Exchange]:
        """The first exchange, and as many more as the budget allows; 8 tokens go on marks in each."""
        kept: list[Exchange] = []
        for exchange in exchanges:
            used += len(self._ids(exchange[1])) + len(self._ids(exchange[2])) + 8
            if kept and used > self.budget:
                break
            kept.append(exchange)
        return kept

    def told(self, scene: Scene, rng: np.random.Generator, form: str) -> tuple[str, list[list[tuple[str, float]]]]:
        """The scene in one form: the text in front of the first question, and the words in the placeholders."""
        if form == "describe":
            return language.describe(scene), []
        if form == "loose":
            things = [
                f"{item.name} {place_of(item, scene.size)}" if len(scene.objects) > 1 or rng.random() < 0.5 else item.name
                for item in scene.objects
            ]
            things += [scene.background] + ([f"'{scene.word.text}'"] if scene.word is not None else [])
            return ", ".join(things[int(i)] for i in rng.permutation(len(things))), []
        return IMAGE_MARK, self._weighted(cells_of(scene), rng)

    def _weighted(self, cells: list[list[str]], rng: np.random.Generator) -> list[list[tuple[str, float]]]:
        """Words with their weights: what a cell is weighs most; in half of the pictures each cell also says where it is."""
        with_places = rng.random() < 0.5
        told = []
        for cell, place in zip(cells, self._places, strict=True):
            words = [(text, 1.0 if index == 0 else float(rng.uniform(0.3, 0.7))) for index, text in enumerate(cell)]
            told.append([*words, (place, 0.3)] if with_places else words)
        return told

    def _any_words(self, rng: np.random.Generator, count: int) -> list[str]:
        pool = [*self.names, *world.COLOURS, *world.WORDS]
        return [pool[int(index)] for index in rng.integers(len(pool), size=count)]

    def _exchanges(self, scene: Scene, rng: np.random.Generator) -> list[Exchange]:
        asked = language.questions(scene, rng, self.names)
        in_sentences = rng.random() < 0.08
        suffix = " answer in a sentence." if in_sentences else f"\n{language.SHORT_ANSWER}" if rng.random() < 0.15 else ""
        exchanges = [
            (
                asked[int(i)].kind,
                other_words(asked[int(i)].text, rng) + suffix,
                asked[int(i)].sentence if in_sentences else asked[int(i)].answer,
            )
            for i in rng.permutation(len(asked))
        ]
        if rng.random() < 0.4:
            prompt = language.DESCRIBE_PROMPTS[int(rng.integers(len(language.DESCRIBE_PROMPTS)))]
            exchanges.insert(0, ("caption", other_words(prompt, rng), language.caption(scene, rng)))
        return exchanges


def _turns(exchanges: Sequence[Exchange], head: str) -> list[Turn]:
    turns: list[Turn] = []
    for position, (_, question, answer) in enumerate(exchanges):
        turns += [Turn("user", (head if position == 0 else "") + question), Turn("assistant", answer)]
    return turns


def other_words(question: str, rng: np.random.Generator) -> str:
    """Sometimes "image" or "photo" for "picture", "colour" for "color": people will not ask in the data set's words only."""
    chance = rng.random()
    if chance < 0.3:
        question = question.replace("picture", "image" if chance < 0.2 else "photo")
    return question.replace("color", "colour") if rng.random() < 0.3 else question
