"""The text side of a Q-Former: captions made plain, and a tokenizer with BERT's special tokens and [DEC].

Source: LAVIS, lavis/processors/blip_processors.py (which characters go), blip2_qformer.py (the token [DEC] that begins a written caption).
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mmkit.errors import ConfigError, DataError

MOST_WORDS = 50
DEC = "[DEC]"
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", DEC)


def clean_caption(text: str, most_words: int = MOST_WORDS) -> str:
    """Make a caption plain: lower case, without .!"()*#:;~, at most so many words."""
    return " ".join(re.sub(r'[.!"()*#:;~]', " ", text.lower()).split()[:most_words])


def clean_question(text: str, most_words: int = MOST_WORDS) -> str:
    """Make a question plain: as a caption; its characters vanish instead of leaving a space, and the ? stays."""
    return " ".join(re.sub(r'[.!"()*#:;~]', "", text.lower()).split()[:most_words])


class QFormerTokenizer:
    """Texts to ids [CLS] ... [SEP] and back.

    Args:
        tokenizer: A tokenizer of BERT's kind, with or without [DEC].
        max_tokens: Longest text, the special tokens included.

    Raises:
        ConfigError: It lacks one of BERT's special tokens.
    """

    def __init__(self, tokenizer: Any, max_tokens: int = 32) -> None:
        if missing := [name for name in ("pad_token", "cls_token", "sep_token") if getattr(tokenizer, name, None) is None]:
            raise ConfigError(f"a Q-Former's tokenizer is of BERT's kind; this one has no {', '.join(missing)}")
        if max_tokens < 3:
            raise ConfigError(f"max_tokens is {max_tokens}; [CLS], a word and [SEP] need 3")
        if tokenizer.bos_token != DEC:
            tokenizer.add_special_tokens({"bos_token": DEC})
        self.tokenizer, self.max_tokens = tokenizer, max_tokens

    @classmethod
    def load(cls, name: str, max_tokens: int = 32) -> "QFormerTokenizer":
        """Load a tokenizer from a folder or the hub.

        Raises:
            ConfigError: There is none.
        """
        try:
            return cls(AutoTokenizer.from_pretrained(name), max_tokens)
        except (OSError, ValueError) as error:
            raise ConfigError(f"no tokenizer could be loaded from '{name}': {str(error).splitlines()[0]}") from error

    @classmethod
    def learn(cls, captions: Iterable[str], entries: int = 4096, max_tokens: int = 32) -> "QFormerTokenizer":
        """Make a small tokenizer of frequent words and pieces from captions, for Q-Formers that begin without a BERT."""
        tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.BpeTrainer(vocab_size=entries, special_tokens=list(SPECIAL), show_progress=False)
        tokenizer.train_from_iterator((clean_caption(text) for text in captions), trainer)
        tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
        fast = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", bos_token=DEC
        )
        return cls(fast, max_tokens)

    def __len__(self) -> int:
        return len(self.tokenizer)

    @property
    def special(self) -> dict[str, int]:
        """Ids of `pad`, `cls`, `sep`, `dec`, as a `QFormerConfig` wants them."""
        t = self.tokenizer
        return {"pad": t.pad_token_id, "cls": t.cls_token_id, "sep": t.sep_token_id, "dec": t.bos_token_id}

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Give ids [B, T] and mask [B, T] of texts, padded on the right to the longest of them.

        Raises:
            DataError: A text has no word.
        """
        if empty := [place for place, text in enumerate(texts) if not text.strip()]:
            raise DataError(f"text {empty[0]} of {len(texts)} has no word in it")
        found = self.tokenizer(list(texts), padding="longest", truncation=True, max_length=self.max_tokens, return_tensors="pt")
        return found["input_ids"].to(torch.int64), found["attention_mask"].to(torch.int64)

    def decode(self, ids: Tensor) -> list[str]:
        """Give the words of ids [B, T], special tokens left out."""
        return [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)]

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files."""
        self.tokenizer.save_pretrained(str(folder))
