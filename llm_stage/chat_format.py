"""Turns of a chat -> token ids and labels, built together, so that the mask never has to be searched for in the ids.

A template (chat_templates.py) turns the chat into pieces: marks, words, images. Each knows whether it is supervised. Words are encoded
 with the special tokens switched off: a person who writes `<image>` or `</s>` gets those letters, never those ids.

Laws (section 2.2 of the specification; tests/test_chat_format.py): every run of labels is one answer with its end token and nothing else;
the prompt for the first k turns is a prefix of the training ids; a round appended changes nothing before it; one BOS.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from tokenizers import Tokenizer

from llm_stage.chat_templates import IMAGE_MARK, TEMPLATES, OwnTemplate, Piece, Turn, mark, origin
from mmkit.errors import ConfigError, DataError, find

IGNORE_INDEX = -100


@dataclass(frozen=True)
class Encoded:
    """Ids and labels of one chat, equally long; labels are the ids where supervised, else -100 (the model shifts them itself)."""

    input_ids: list[int]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def n_labels(self) -> int:
        """How many tokens are supervised."""
        return sum(label != IGNORE_INDEX for label in self.labels)


class ChatFormat:
    """Encodes chats for one tokenizer in one template.

    Args:
        tokenizer: A tokenizer of transformers with a `tokenizers` backend.
        template: A name of `TEMPLATES`, or "own" for the tokenizer's chat template. There `{% generation %}` marks decide what is
            supervised; without marks it is each answer up to and with the special token after it.
        system: Replaces the template's system prompt; "" leaves it out. Ignored where the chat brings its own system turn.
        image_token: Text of the tokenizer's image placeholder. It has to be there only when images come.

    Raises:
        LookupError: The template is unknown.
        ValueError: The tokenizer lacks a mark of the template, has no chat template for "own", or the probe chat gives no usable labels.
    """

    def __init__(self, tokenizer: Any, template: str = "own", *, system: str | None = None, image_token: str = IMAGE_MARK) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ConfigError(f"{type(tokenizer).__name__} has no tokenizer.json behind it: load it with AutoTokenizer (a fast tokenizer)")
        self.tokenizer = tokenizer
        self.name = template
        self.template = OwnTemplate(tokenizer).as_template() if template == "own" else find("chat template", TEMPLATES, template)
        self.system = self.template.system if system is None else system
        vocabulary = tokenizer.get_vocab()
        self._ids: dict[str, int] = {token: vocabulary[token] for token in self._known_marks(vocabulary, image_token)}
        self.image_token_id: int | None = vocabulary.get(image_token)
        self._words = WordEncoder(tokenizer, [*self._ids, image_token])
        self._letters_stay_letters(image_token)
        self._probe()

    def _known_marks(self, vocabulary: dict[str, int], image_token: str) -> set[str]:
        if self.template.end is None and self.tokenizer.eos_token is None:
            raise ConfigError(
                f"the tokenizer {origin(self.tokenizer)} has no end token, and template {self.name!r} ends answers with it: a model would "
                "never stop. Name the one that it was trained with (tokenizer.eos_token = ..., saved with save_pretrained), or take a "
                "template with a mark of its own (chatml, llama_3)"
            )
        wanted = [*self.template.marks, *([self.tokenizer.eos_token] if self.template.end is None else [])]
        missing = [token for token in wanted if token not in vocabulary]
        if missing:
            raise ConfigError(
                f"template {self.name!r} needs the token(s) {', '.join(map(repr, missing))}, which the tokenizer {origin(self.tokenizer)} "
                f"does not have. Take template own, vicuna_v1 or llama_2, or add them with tokenizer.add_special_tokens"
            )
        return {token for token in [*wanted, *self.tokenizer.all_special_tokens] if token in vocabulary} - {image_token}

    # -- the two ways in ----------------------------------------------------------------------------------------------------------------

    def encode(self, turns: Sequence[Turn], n_images: int = 0, tokens_per_image: int = 1) -> Encoded:
        """Token ids and labels of a whole chat.

        Args:
            turns: An optional system turn, then user and assistant in turn.
            n_images: How many images come with the chat: as many as there are `<image>` in its user turns. With 0, `<image>` is text.
            tokens_per_image: Placeholders per image.

        Raises:
            ValueError: Roles out of order, or the count of `<image>` is not n_images.
        """
        ids: list[int] = []
        labels: list[int] = []
        for piece, piece_ids in self._encode_pieces(self._render(turns, n_images), tokens_per_image):
            ids += piece_ids
            labels += piece_ids if piece.supervised else [IGNORE_INDEX] * len(piece_ids)
        return Encoded(ids, labels)

    def prompt_ids(self, turns: Sequence[Turn], n_images: int = 0, tokens_per_image: int = 1) -> list[int]:
        """Ids to generate an answer from; a prefix of `encode`'s ids for the same chat with its answer.

        Args:
            turns: As for `encode`, but ending with a user turn.
            n_images: Images in these turns.
            tokens_per_image: Placeholders per image.
        """
        if not turns or turns[-1].role != "user":
            raise DataError(f"a prompt ends with a user turn, this one with {turns[-1].role if turns else 'nothing'}: drop the last answer")
        return self.encode(turns, n_images, tokens_per_image).input_ids

    @property
    def stop_ids(self) -> list[int]:
        """Ids after which an answer is over: the template's end token and the tokenizer's."""
        end = self.template.end
        ends = [self.tokenizer.eos_token_id] if end is None else [self._ids[end] if end in self._ids else self._words(end, "inner")[-1]]
        return list(dict.fromkeys(i for i in [*ends, self.tokenizer.eos_token_id] if i is not None))

    def show(self, encoded: Encoded) -> str:
        """The chat as text, supervised stretches between 【 and 】, a row of image placeholders as `<image>xN`."""
        shown: list[str] = []
        for supervised, is_image, ids in _runs(encoded, self.image_token_id):
            text = f"{IMAGE_MARK}x{len(ids)}" if is_image else self.tokenizer.decode(ids, skip_special_tokens=False)
            shown.append(f"【{text}】" if supervised else text)
        return "".join(shown)

    # -- inside -------------------------------------------------------------------------------------------------------------------------

    def _render(self, turns: Sequence[Turn], n_images: int) -> list[Piece]:
        turns = list(turns)
        system = turns.pop(0).text if turns and turns[0].role == "system" else self.system
        for index, turn in enumerate(turns):
            expected = "assistant" if index % 2 else "user"
            if turn.role != expected:
                raise DataError(f"turn {index} is {turn.role!r} where {expected!r} must speak: user and assistant alternate, user first")
        if not turns:
            raise DataError("the chat has no turns")
        marks = sum(turn.text.count(IMAGE_MARK) for turn in turns if turn.role == "user")
        if n_images and marks != n_images:
            raise DataError(
                f"{marks} {IMAGE_MARK} mark(s) in the user's turns, {n_images} image(s) given: write {IMAGE_MARK} once for each image"
            )
        if n_images and self.image_token_id is None:
            raise ConfigError(f"the tokenizer {origin(self.tokenizer)} has no {IMAGE_MARK} token: load it with llm_stage.llms.load_llm")
        return self.template.render(turns, system, n_images > 0, self.tokenizer.eos_token)

    def _encode_pieces(self, pieces: list[Piece], tokens_per_image: int) -> list[tuple[Piece, list[int]]]:
        bos = self.tokenizer.bos_token
        encoded: list[tuple[Piece, list[int]]] = []
        # A template that writes the BOS token itself (its own, or chatml where BOS is <|im_start|>) gets no second one.
        if bos is not None and self._adds_bos and not (pieces and pieces[0].kind == "mark" and pieces[0].text == bos):
            encoded.append((mark(bos), [self.tokenizer.bos_token_id]))
        before = "first"
        for piece in _joined(pieces):
            if piece.kind == "image":
                assert self.image_token_id is not None
                encoded.append((piece, [self.image_token_id] * tokens_per_image))
            elif piece.kind == "mark":
                encoded.append((piece, [self._ids[piece.text]]))
            else:
                encoded.append((piece, self._words(piece.text, before)))
            before = "inner" if piece.kind == "words" else "after_mark"
        return encoded

    @property
    def _adds_bos(self) -> bool:
        """A template of ours begins with BOS if there is one; the tokenizer's own only if the tokenizer adds it by itself."""
        if self.name != "own":
            return self.tokenizer.bos_token_id is not None
        return self._words.adds_bos

    def _letters_stay_letters(self, image_token: str) -> None:
        """Refuse a tokenizer that makes a mark's id out of plain letters: `<image>` in a question would be taken for an image (law 5)."""
        marks = {**self._ids, **({image_token: self.image_token_id} if self.image_token_id is not None else {})}
        for token, token_id in marks.items():
            if token != self.tokenizer.unk_token and token_id in self._words(token, "inner"):
                raise ConfigError(
                    f"in the tokenizer {origin(self.tokenizer)}, {token!r} is an ordinary piece of text (id {token_id}) and a mark at once, "
                    "so words could not be told from marks. Give the mark an id of its own: rename that piece in tokenizer.json, then "
                    "tokenizer.add_special_tokens"
                )

    def _probe(self) -> None:
        """Refuse a tokenizer and template under which nothing, or no end token, would be learned (law 10)."""
        question = Turn("user", f"{IMAGE_MARK}\nname it" if self.name == "plain" else "name it")
        if self.name == "plain" and self.image_token_id is None:
            return
        encoded = self.encode([question, Turn("assistant", "probe")], n_images=int(self.name == "plain"))
        supervised = [label for label in encoded.labels if label != IGNORE_INDEX]
        if "probe" not in self.tokenizer.decode(supervised) or supervised[-1] not in self.stop_ids:
            raise ConfigError(
                f"template {self.name!r} with the tokenizer {origin(self.tokenizer)} supervises {self.tokenizer.decode(supervised)!r} "
                f"for the answer 'probe': it must be the answer and then an end token "
                f"({self.tokenizer.convert_ids_to_tokens(self.stop_ids)}).\n"
                "  Put the answer and its end token into {% generation %} ... {% endgeneration %}, or take a template of mmkit: "
                + ", ".join(TEMPLATES)
            )


def _joined(pieces: list[Piece]) -> list[Piece]:
    """Neighbouring words of one kind as one piece, so that they are encoded in one pass, as the pretrained model saw them."""
    joined: list[Piece] = []
    for piece in pieces:
        if piece.kind == "words" and not piece.text:
            continue
        last = joined[-1] if joined else None
        if last and last.kind == piece.kind == "words" and last.supervised == piece.supervised:
            joined[-1] = replace(last, text=last.text + piece.text)
        else:
            joined.append(piece)
    return joined


def _runs(encoded: Encoded, image_id: int | None) -> list[tuple[bool, bool, list[int]]]:
    runs: list[tuple[bool, bool, list[int]]] = []
    for token, label in zip(encoded.input_ids, encoded.labels, strict=True):
        key = (label != IGNORE_INDEX, token == image_id)
        if runs and runs[-1][:2] == key:
            runs[-1][2].append(token)
        else:
            runs.append((*key, [token]))
    return runs


class WordEncoder:
    """Encodes plain text with a private copy of the tokenizer in which nothing is special.

    A piece inside a sentence must not get the blank that SentencePiece-like tokenizers put in front of a text; a second copy with that
    switched off encodes it, so that the pieces together are what one pass over the whole text gives.

    Args:
        tokenizer: A fast tokenizer; stays untouched.
        marks: Texts that must not be recognised in words, whether or not the tokenizer calls them special.
    """

    def __init__(self, tokenizer: Any, marks: Sequence[str]) -> None:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        for token in state.get("added_tokens", []):
            token["special"] = token["special"] or token["content"] in marks
        _never_merge(state, marks)
        self._outer = _backend(state)
        self._prefix_after_mark = not _drop_prefix(state)
        self._inner = _backend(state)
        self.adds_bos = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]

    def __call__(self, text: str, before: str) -> list[int]:
        """Ids of `text`; `before` is "first" (start of the sequence), "after_mark" or "inner" (words stand before it)."""
        outer = before == "first" or (before == "after_mark" and self._prefix_after_mark)
        return (self._outer if outer else self._inner).encode(text, add_special_tokens=False).ids


def _never_merge(state: dict[str, Any], marks: Sequence[str]) -> None:
    """Take out of a BPE, in place, the merges that make a mark out of letters: some vocabularies hold `<image>` as an ordinary piece."""
    model = state["model"]
    if model.get("type") == "BPE":
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        kept = [merge for merge, pair in zip(model["merges"], pairs, strict=True) if "".join(pair) not in marks]
        if len(kept) < len(pairs):
            model["merges"] = kept


def _backend(state: dict[str, Any]) -> Tokenizer:
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # special tokens in words are encoded as the letters they are
    return tokenizer


def _drop_prefix(state: dict[str, Any]) -> bool:
    """Switch off the blank put before a text, in place; True if the tokenizer does it at the start of a sequence only."""
    first_only = True
    for name in ("normalizer", "pre_tokenizer"):
        part = state.get(name) or {}
        steps = part.get("normalizers") or part.get("pretokenizers") or [part]
        for step in steps:
            if step.get("type") == "Metaspace":
                first_only &= step.get("prepend_scheme") != "always"
                step["prepend_scheme"] = "never"
            elif step.get("type") == "ByteLevel" and step.get("add_prefix_space"):
                first_only, step["add_prefix_space"] = False, False
            elif step.get("type") == "Prepend":
                first_only, step["prepend"] = False, ""
    return first_only
