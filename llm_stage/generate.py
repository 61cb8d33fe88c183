"""ChatModel: the one inference path, for evaluation, demo and server.

    chat = ChatModel.load("runs/llava_b/model")
    chat.generate([ChatRequest([Turn("user", "what is this?")], ["apple.png"])])      # ["a red apple"]
    for piece in chat.stream(request): print(piece, end="")

A batch is padded on the left and gives the answers that its rows would give alone (float32; the order of sums differs in half precision).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Event
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import GenerationConfig, LlavaForConditionalGeneration, LlavaProcessor

from llm_stage.batched import answer_in_batches, best_device, sampling, seeded, streamed
from llm_stage.chat_format import IMAGE_MARK, ChatFormat, Turn
from llm_stage.llava import tower_geometry
from llm_stage.llava_folder import LlavaCard, load_llava
from llm_stage.models import MODELS, model_folder
from llm_stage.tiles import Tiles
from mmkit.errors import ConfigError, DataError
from mmkit.images import open_image

ImageSource = Path | str | bytes | Image.Image


@dataclass(frozen=True)
class ChatRequest:
    """One question in its context.

    Attributes:
        turns: An optional system turn, then user and assistant in turn, a user last.
        images: Its pictures. Each `<image>` in a user turn is the place of one; without any mark they go before the first user turn.
    """

    turns: Sequence[Turn]
    images: Sequence[ImageSource] = field(default_factory=tuple)


class ChatModel:
    """A LLaVA that answers.

    Args:
        model: In eval mode, on its device.
        processor: The model's.
        chat_format: Renders prompts as in training; None takes the processor's own chat template (other people's folders).
        name: For tables and labels.
        card: How it was made, where that is known.

    Attributes:
        last_batch_size: Rows of the last batch: smaller than asked for, after memory ran out.
    """

    def __init__(
        self,
        model: LlavaForConditionalGeneration,
        processor: LlavaProcessor,
        chat_format: ChatFormat | None,
        name: str,
        card: LlavaCard | None = None,
    ) -> None:
        self.model, self.processor, self.tokenizer = model, processor, processor.tokenizer
        self.chat_format, self.name, self.card = chat_format, name, card
        self.tokens_per_image = int(model.config.image_seq_length)
        self.tiles = Tiles(card.tiles, tower_geometry(model.model.vision_tower).spec) if card and card.tiles else None
        self.stop_ids = chat_format.stop_ids if chat_format else _stop_ids(model, self.tokenizer)
        self.last_batch_size = 0

    @classmethod
    def load(
        cls,
        folder: Path | str,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        template: str | None = None,
        name: str | None = None,
    ) -> ChatModel:
        """Load any LLaVA folder: ours of any stage, a checkpoint of a run, a stock one with its own processor and chat template, or one
        in LLaVA's own layout.

        Args:
            folder: The folder, or a name of `llm_stage.models.MODELS`.
            device: None is the accelerator if there is one.
            dtype: None is float32 on a CPU, bfloat16 on an accelerator.
            template: Of `ChatFormat`; None is the one it was trained with, or the folder's own.
            name: For tables and labels; None is taken from the folder.

        Raises:
            ConfigError: It is not a LLaVA folder, or has no chat template and none was given.
            DataError: Its weights or its processor are broken.
        """
        given, folder = str(folder), model_folder(folder)
        device = torch.device(device) if device is not None else best_device()
        dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
        model, processor, card = load_llava(folder, dtype)
        template = template or (card.template if card else None)
        if template:
            chat_format = ChatFormat(processor.tokenizer, template, system=card.system if card else None)
        elif processor.chat_template or processor.tokenizer.chat_template:
            chat_format = None
        else:
            raise ConfigError(
                f"{folder} has no chat template; say what it was trained with: template='vicuna_v1' (llama_2, llama_3, chatml, plain)"
            )
        resolved = folder.resolve()
        name = name or (given if given in MODELS else resolved.parent.name if resolved.name == "model" else resolved.name)
        return cls(model.to(device), processor, chat_format, name, card)

    # -- answers ------------------------------------------------------------------------------------------------------------------------

    def generate(
        self,
        requests: Sequence[ChatRequest],
        max_new_tokens: int = 128,
        batch_size: int = 8,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        on_answer: Callable[[int, str], None] | None = None,
    ) -> list[str]:
        """Answer many requests, in batches of like length.

        Args:
            requests: Any number, with images or without.
            max_new_tokens: Longest answer, tokens.
            batch_size: Rows at once; halved when memory runs out.
            temperature: 0 is greedy.
            top_p: Share of probability that is sampled from.
            seed: Of the sampling; the same seed and the same requests in the same batches give the same answers.
            on_answer: Called with (index, answer) as soon as each is there, out of order.

        Returns:
            The answers in the order of the requests, stripped.

        Raises:
            DataError: An image cannot be read, marks and images do not agree, or a prompt is too long; the request is named.
        """
        requests = [self._cut(request, f"request {index}") for index, request in enumerate(requests)]
        prompts = [self._prompt(request, f"request {index}") for index, request in enumerate(requests)]
        order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))  # the longest first: memory runs out at once, or never

        def answer(rows: list[int], position: int) -> list[str]:
            inputs = self._inputs([prompts[i] for i in rows], [requests[i].images for i in rows], rows)
            settings = self._settings(max_new_tokens, temperature, top_p, max(len(prompts[i]) for i in rows))
            with seeded(None if seed is None else seed + position, settings.do_sample):
                output = self.model.generate(**inputs, generation_config=settings)
            return [self._text(ids) for ids in output[:, inputs["input_ids"].shape[1] :].tolist()]

        answers, self.last_batch_size = answer_in_batches(order, batch_size, answer, self.name, on_answer)
        return answers

    def stream(
        self,
        request: ChatRequest,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: Event | None = None,
    ) -> Iterator[str]:
        """Answer one request piece by piece; together the pieces are what `generate` gives.

        Closing the iterator, or setting `stop`, ends the generation after the present token. An error in it is raised here.

        Args:
            request: The question.
            max_new_tokens, temperature, top_p, seed: As for `generate`.
            stop: Set it, from any thread, to end early.
        """
        prompt, images = self.prompt(request)
        inputs = self.inputs([prompt], [images])
        settings = self._settings(max_new_tokens, temperature, top_p, len(prompt))
        yield from streamed(self.model, inputs, settings, self.tokenizer, self.stop_ids, seed, stop)

    def encoder_card(self) -> dict[str, Any]:
        """What is known of the model's vision encoder: for the report, the demo and the model's card."""
        tower = self.model.model.vision_tower
        config = tower.config
        card: dict[str, Any] = {
            "model_type": config.model_type,
            "parameters": sum(parameter.numel() for parameter in tower.parameters()),
            "width": config.hidden_size,
            "image_size": getattr(config, "image_size", None),
            "tokens_per_image": self.tokens_per_image,
        }
        for key in ("architecture", "origin", "training"):
            if getattr(config, key, None):
                card[key] = getattr(config, key)
        return {**card, **(self.card.encoder_card if self.card else {})}

    def prompt(self, request: ChatRequest, where: str = "the request") -> tuple[list[int], Sequence[ImageSource]]:
        """A request as the LLM sees it: token ids with a placeholder for each image token, and the views of its images in order.

        Raises:
            DataError: As `generate`.
        """
        request = self._cut(request, where)
        return self._prompt(request, where), request.images

    def inputs(self, prompts: Sequence[list[int]], images: Sequence[Sequence[ImageSource]]) -> dict[str, Tensor]:
        """Prompts padded on the left [B, L] with their mask, and pixel_values of all their images, on the model's device."""
        return self._inputs(list(prompts), list(images), list(range(len(prompts))))

    # -- inside -------------------------------------------------------------------------------------------------------------------------

    def _cut(self, request: ChatRequest, where: str) -> ChatRequest:
        """The request with the views of its pictures in their place, where the model was trained with tiles."""
        if self.tiles is None or not request.images:
            return request
        views = [self.tiles.views(open_image(image, where)) for image in request.images]
        turns, seen = [], 0
        for turn in place_marks(request):
            marks = turn.text.count(IMAGE_MARK) if turn.role == "user" else 0
            counts = [len(some) for some in views[seen : seen + marks]]
            if len(counts) < marks:
                raise DataError(f"{where}: {IMAGE_MARK} stands more often in the chat than there are images ({len(views)})")
            turns.append(replace(turn, text=self.tiles.place(turn.text, counts)) if marks else turn)
            seen += marks
        if seen != len(views):
            raise DataError(f"{where}: {IMAGE_MARK} stands {seen} times in the chat, and there are {len(views)} images")
        return ChatRequest(turns, [view for some in views for view in some])

    def _prompt(self, request: ChatRequest, where: str) -> list[int]:
        """Ids of one prompt, images as placeholders."""
        turns, count = place_marks(request), len(request.images)
        try:
            if self.chat_format is not None:
                ids = self.chat_format.prompt_ids(turns, count, self.tokens_per_image)
            else:
                ids = self._stock_prompt(turns, count)
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
        limit = getattr(self.model.config.text_config, "max_position_embeddings", None)
        if limit and len(ids) >= limit:
            raise DataError(f"{where}: the prompt has {len(ids)} tokens ({count} image(s)), the LLM takes {limit}: shorten the chat")
        return ids

    def _stock_prompt(self, turns: Sequence[Turn], count: int) -> list[int]:
        """Ids from the folder's own chat template, whose contents are typed parts."""
        if not turns or turns[-1].role != "user":
            raise DataError("a prompt ends with a user turn")
        messages = []
        for turn in turns:
            if count == 0 and IMAGE_MARK in turn.text:
                raise DataError(f"the text says {IMAGE_MARK} and there is no image: this folder's template takes it for a placeholder")
            pieces = turn.text.split(IMAGE_MARK) if turn.role == "user" else [turn.text]
            content: list[dict[str, str]] = []
            for index, piece in enumerate(pieces):
                content += [{"type": "image"}] if index else []
                content += [{"type": "text", "text": piece.strip("\n")}] if piece.strip() else []
            messages.append({"role": turn.role, "content": content})
        text = self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        begins = self.tokenizer.bos_token is not None and text.startswith(self.tokenizer.bos_token)
        ids: list[int] = []
        for token in self.tokenizer(text, add_special_tokens=not begins)["input_ids"]:
            ids += [token] * (self.tokens_per_image if token == self.model.config.image_token_id else 1)
        found = ids.count(self.model.config.image_token_id) // self.tokens_per_image
        if found != count:
            raise DataError(f"the template wrote {found} image(s) where {count} were given")
        return ids

    def _inputs(self, prompts: list[list[int]], images: list[Sequence[ImageSource]], rows: list[int]) -> dict[str, Tensor]:
        """Left-padded ids and mask [B, L] and pixel_values [images, 3, h, w], on the model's device."""
        length = max(map(len, prompts))
        ids = torch.full((len(prompts), length), self._pad_id, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, length - len(prompt) :] = torch.tensor(prompt)
            mask[row, length - len(prompt) :] = 1
        device = self.model.device
        inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
        pictures = [open_image(image, f"request {index}") for index, some in zip(rows, images, strict=True) for image in some]
        if pictures:
            pixels = self.processor.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
            inputs["pixel_values"] = pixels.to(device, self.model.dtype)
        return inputs

    @property
    def _pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return int(pad if pad is not None else self.stop_ids[0])

    def _settings(self, max_new_tokens: int, temperature: float, top_p: float, longest: int) -> GenerationConfig:
        limit = getattr(self.model.config.text_config, "max_position_embeddings", None)
        room = max_new_tokens if not limit else min(max_new_tokens, limit - longest)
        return GenerationConfig(
            max_new_tokens=room, eos_token_id=self.stop_ids, pad_token_id=self._pad_id, **sampling(max_new_tokens, temperature, top_p)
        )

    def _text(self, ids: list[int]) -> str:
        """The words up to the first stop token."""
        ends = [index for index, token in enumerate(ids) if token in self.stop_ids]
        return self.tokenizer.decode(ids[: ends[0]] if ends else ids, skip_special_tokens=True).strip()


def place_marks(request: ChatRequest) -> list[Turn]:
    """The turns, with a mark for each image in front of the first user turn where none was written."""
    turns = list(request.turns)
    if request.images and not any(IMAGE_MARK in turn.text for turn in turns if turn.role == "user"):
        for index, turn in enumerate(turns):
            if turn.role == "user":
                turns[index] = replace(turn, text=f"{IMAGE_MARK}\n" * len(request.images) + turn.text)
                break
    return turns


def _stop_ids(model: LlavaForConditionalGeneration, tokenizer: Any) -> list[int]:
    given = model.generation_config.eos_token_id if model.generation_config else None
    ids = given if isinstance(given, list) else [given, tokenizer.eos_token_id]
    return list(dict.fromkeys(int(i) for i in ids if i is not None))
