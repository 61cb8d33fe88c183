"""What BLIP-2's second stage learns from: captions of pictures, questions with answers, or both in one training."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from encoders.pairs import CaptionedImages, Pairs
from llm_stage.benchmarks import read_items
from llm_stage.blip2_text import TextFormat
from llm_stage.qformer_text import clean_caption
from mmkit.errors import ConfigError, DataError
from mmkit.images import ImageSpec

_APART = "\x1f"  # between a question and its answer: a pair that is left out takes both along


class AskedImages(CaptionedImages):
    """Pictures with a question; of its ten answers another one is learnt each epoch, so that each counts as often as people gave it."""

    def __init__(self, questions: str, annotations: str, images: str, spec: ImageSpec, seed: int, **more: Any) -> None:
        items, _ = read_items(questions, annotations, images)
        answers = [tuple(f"{item.question}{_APART}{answer}" for answer in item.answers) for item in items]
        super().__init__([(Path(images) / item.image, texts) for item, texts in zip(items, answers, strict=True)], spec, seed, **more)
        if empty := [item.question_id for item in items if not all(answer.strip() for answer in item.answers)]:
            raise DataError(f"{annotations}: question {empty[0]} has an answer without a word; {len(empty)} question(s) in all")


class ImageTexts:
    """Rows of a training: (picture uint8 [3, S, S], prompt, text).

    Args:
        captions: Pictures with captions, or None.
        asked: Pictures with questions, or None.
        prompt: What a question is put into, `{}` standing for it.
        caption_prompt: What stands before a caption.

    Raises:
        ConfigError: There is neither.
    """

    def __init__(self, captions: Pairs | None, asked: AskedImages | None, prompt: str, caption_prompt: str) -> None:
        if captions is None and asked is None:
            raise ConfigError(
                "there is nothing to learn from: give captions (--data.source), questions (--questions, --annotations), or both"
            )
        self.captions, self.asked, self.prompt, self.caption_prompt = captions, asked, prompt, caption_prompt
        self.captioned = 0 if captions is None else len(captions)
        if asked is None and captions is not None and hasattr(captions, "order"):
            self.order = captions.order  # shards are read in their own order

    def __len__(self) -> int:
        return self.captioned + (0 if self.asked is None else len(self.asked))

    def get(self, epoch: int, index: int) -> tuple[Tensor, str, str]:
        """Give one row."""
        if index < self.captioned:
            assert self.captions is not None
            image, caption = self.captions.get(epoch, index)
            return image, self.caption_prompt, clean_caption(caption) or caption
        assert self.asked is not None
        image, both = self.asked.get(epoch, index - self.captioned)
        question, answer = both.split(_APART)
        return image, self.prompt.format(question), answer


def collate(text: TextFormat) -> Callable[[Sequence[tuple[Tensor, str, str]]], dict[str, Tensor]]:
    """Make the function that turns rows into "images" uint8 [B, 3, S, S], "ids", "mask" [B, T] and "labels" [B, T or S]."""

    def make(items: Sequence[tuple[Tensor, str, str]]) -> dict[str, Tensor]:
        images, prompts, texts = zip(*items, strict=True)
        found = text.encode(prompts, texts)
        return {"images": torch.stack(images), "ids": found.ids, "mask": found.mask, "labels": found.labels}

    return make
