"""What BLIP-2's language model reads and is to say: prompts, texts, where they end.

    decoder              lead [queries] prompt text "\\n"        loss on the text and its end
    encoder-decoder      lead [queries] prompt </s>  ->  text </s>

Prompt and text are cut apart where the tokens of the prompt end, so that what is said in use is tokenised as in training. A begin token that
a tokenizer puts in front (OPT's </s>) belongs to the lead, or without one to the prompt; with neither it is learnt too, as in LAVIS.

Source: LAVIS, lavis/models/blip2_models/blip2_opt.py ("\\n" ends a text; the begin token is a target where there is no prompt).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from llm_stage.blip2 import IGNORED, Texts
from mmkit.errors import ConfigError, DataError

END = "\n"


class TextFormat:
    """Texts of one language model.

    Args:
        tokenizer: The language model's.
        writes_apart: An encoder-decoder's.
        end: What ends a decoder's text; one token.
        lead: What stands in front of the image: "" as in the paper, or how a chat model's template begins ("<|im_start|>user ").
        max_tokens: Longest prompt and text together, end included; an encoder-decoder's prompt and text each.

    Raises:
        ConfigError: The end is not one token, or there is no pad or end token to be had.
    """

    def __init__(self, tokenizer: Any, writes_apart: bool, end: str = END, lead: str = "", max_tokens: int = 64) -> None:
        self.tokenizer, self.writes_apart, self.end, self.lead, self.max_tokens = tokenizer, writes_apart, end, lead, max_tokens
        if max_tokens < 2:
            raise ConfigError(f"max_tokens is {max_tokens}; a word and its end need 2")
        if tokenizer.pad_token_id is None:
            raise ConfigError("the language model's tokenizer has no pad token; set tokenizer.pad_token and save it")
        closing = [] if writes_apart else tokenizer(end, add_special_tokens=False)["input_ids"]
        if not writes_apart and (len(closing) != 1 or closing[0] == tokenizer.unk_token_id):
            raise ConfigError(
                f"end {end!r} is {len(closing)} tokens for this language model; one is right, such as {tokenizer.eos_token!r}"
            )
        self.stop_ids = list(dict.fromkeys(i for i in [*closing, tokenizer.eos_token_id] if i is not None))

    @property
    def lead_ids(self) -> list[int]:
        """Ids of the lead."""
        found: list[int] = self.tokenizer(self.lead, add_special_tokens=not self.writes_apart)["input_ids"] if self.lead else []
        return found

    def _ids(self, text: str) -> list[int]:
        """Ids of a text behind the queries; a begin token stands in front of the lead, where there is one."""
        begins = self.writes_apart or not self.lead
        found: list[int] = self.tokenizer(text, add_special_tokens=begins)["input_ids"]
        return found

    def split(self, prompt: str, text: str) -> tuple[list[int], list[int]]:
        """Give the ids of a decoder's prompt, and of the text with its end."""
        prompt, text = prompt.rstrip(), text.strip()
        head = self._ids(prompt) if prompt else []
        whole = self._ids(f"{prompt} {text}{self.end}" if prompt else f"{text}{self.end}")
        if whole[: len(head)] != head:  # the tokenizer joins the two: cut them apart by force
            return head, self.tokenizer(f" {text}{self.end}", add_special_tokens=False)["input_ids"]
        return head, whole[len(head) :]

    def encode(self, prompts: Sequence[str], texts: Sequence[str]) -> Texts:
        """Give ids, mask and labels of a batch.

        Args:
            prompts: May be empty.
            texts: What is to be said.

        Raises:
            DataError: A text has no word, or a prompt leaves no room for one.
        """
        if empty := [place for place, text in enumerate(texts) if not text.strip()]:
            raise DataError(f"text {empty[0]} of {len(texts)} has no word in it")
        pad = self.tokenizer.pad_token_id
        if self.writes_apart:
            asked = [self._ids(prompt.rstrip()) for prompt in prompts]
            if long := [prompt for prompt, row in zip(prompts, asked, strict=True) if len(row) > self.max_tokens]:
                raise DataError(f"the prompt {long[0][:80]!r} has more tokens than max_tokens, {self.max_tokens}")
            written = [self._ids(text.strip()) for text in texts]
            cut = [row if len(row) <= self.max_tokens else row[: self.max_tokens] for row in written]
            return Texts(
                *self._padded(asked, pad), pad_sequence([torch.tensor(row) for row in cut], batch_first=True, padding_value=IGNORED)
            )
        rows: list[list[int]] = []
        targets: list[list[int]] = []
        for prompt, text in zip(prompts, texts, strict=True):
            head, said = self.split(prompt, text)
            room = self.max_tokens - len(head)
            if room < 2:
                raise DataError(f"the prompt {prompt[:80]!r} has {len(head)} tokens; max_tokens {self.max_tokens} leave no room for a text")
            said = said if len(said) <= room else said[:room]  # cut, it has no end: nothing is to be learnt from where it stops
            rows.append(head + said)
            targets.append([IGNORED] * len(head) + said)
        ids, mask = self._padded(rows, pad)
        return Texts(ids, mask, pad_sequence([torch.tensor(row) for row in targets], batch_first=True, padding_value=IGNORED))

    @staticmethod
    def _padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
        """Ids and mask [B, T], padded on the right."""
        ids = pad_sequence([torch.tensor(list(row), dtype=torch.long) for row in rows], batch_first=True, padding_value=pad)
        mask = pad_sequence([torch.ones(len(row), dtype=torch.long) for row in rows], batch_first=True)
        return ids, mask

    def prompt(self, text: str) -> list[int]:
        """Give the ids of a prompt in use."""
        return self._ids(text.rstrip()) if text.strip() or self.writes_apart else self._ids("")

    def decode(self, ids: Sequence[int]) -> str:
        """Give the words up to the first token that ends a text."""
        ends = [place for place, token in enumerate(ids) if token in self.stop_ids]
        text: str = self.tokenizer.decode(list(ids)[: ends[0]] if ends else list(ids), skip_special_tokens=True)
        return text.strip()
