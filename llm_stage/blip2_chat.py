"""A BLIP-2 that answers: the same doors as `ChatModel`, for one image and a question, or a caption.

    chat = Blip2Chat.load("runs/blip2/model")
    chat.generate([ChatRequest([Turn("user", "what colour is it")], ["apple.png"])])      # ["red"]
    chat.generate([ChatRequest([Turn("user", "")], ["apple.png"])])                       # a caption

What a user says is put into the prompt that the model was trained with ("Question: {} Short answer:"); earlier turns stand before it in the
same form. An image is encoded once: what the language model sees of it is kept, by the picture's bytes.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from threading import Event
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import GenerationConfig

from llm_stage.batched import answer_in_batches, best_device, sampling, seeded, streamed
from llm_stage.blip2_folder import Blip2Parts, load_blip2
from llm_stage.chat_format import IMAGE_MARK, Turn
from llm_stage.generate import ChatRequest
from mmkit.errors import DataError
from mmkit.images import open_image

KEPT_BYTES = 2**29  # of soft prompts


class Blip2Chat:
    """A BLIP-2 that answers.

    Args:
        parts: Encoder, model and words, in eval mode, on their device.
        name: For tables and labels.
        verbatim: What a user says is the whole prompt, as benchmarks have it; else it is a question and put into the model's own prompt.

    Attributes:
        last_batch_size: Rows of the last batch: smaller than asked for, after memory ran out.
        encoded: Images that went through the encoder so far.
    """

    def __init__(self, parts: Blip2Parts, name: str, verbatim: bool = False) -> None:
        self.parts, self.name, self.card, self.verbatim = parts, name, parts.card, verbatim
        self.model, self.text, self.tokenizer = parts.model, parts.text, parts.text.tokenizer
        self.tokens_per_image, self.stop_ids = parts.model.config.queries, parts.text.stop_ids
        self.last_batch_size = self.encoded = 0
        self._soft: OrderedDict[str, Tensor] = OrderedDict()

    @classmethod
    def load(
        cls,
        folder: Path | str,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        name: str | None = None,
        verbatim: bool = False,
    ) -> Blip2Chat:
        """Load a BLIP-2 folder.

        Args:
            folder: Of `save_blip2`.
            device: None is the accelerator if there is one.
            dtype: Of the language model; None is float32 on a CPU, bfloat16 on an accelerator.
            name: For tables; None is taken from the folder.
            verbatim: As above.
        """
        device = torch.device(device) if device is not None else best_device()
        dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
        resolved = Path(folder).resolve()
        name = name or (resolved.parent.name if resolved.name == "model" else resolved.name)
        return cls(load_blip2(folder, dtype).to(device), name, verbatim)

    # -- answers ------------------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(
        self,
        requests: Sequence[ChatRequest],
        max_new_tokens: int = 128,
        batch_size: int = 8,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        on_answer: Callable[[int, str], None] | None = None,
        **decoding: Any,
    ) -> list[str]:
        """Answer many requests, in batches of like length; see `ChatModel.generate`.

        Args:
            requests: Each with one image.
            max_new_tokens, batch_size, temperature, top_p, seed, on_answer: As there.
            decoding: More of transformers' `GenerationConfig`: num_beams, length_penalty, min_new_tokens, repetition_penalty.

        Raises:
            DataError: An image cannot be read, a request has none or several, or a prompt is too long; the request is named.
        """
        prompts = [self._prompt(request, f"request {index}") for index, request in enumerate(requests)]
        order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))

        def answer(rows: list[int], position: int) -> list[str]:
            soft = self.soft_prompts([requests[i].images[0] for i in rows], [f"request {i}" for i in rows])
            settings = self._settings(max_new_tokens, temperature, top_p, **decoding)
            with seeded(None if seed is None else seed + position, settings.do_sample):
                output = self.model.language_model.generate(**self._inputs(soft, [prompts[i] for i in rows]), generation_config=settings)
            return [self._answer(ids) for ids in output.tolist()]

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
        """Answer one request piece by piece; see `ChatModel.stream`."""
        prompt = self._prompt(request, "the request")
        with torch.no_grad():
            inputs = self._inputs(self.soft_prompts([request.images[0]], ["the request"]), [prompt])
        settings = self._settings(max_new_tokens, temperature, top_p)
        # without input ids there is no prompt for a streamer to skip; an encoder-decoder sends the token that its decoder begins with
        echo = self.model.writes_apart
        yield from streamed(self.model.language_model, inputs, settings, self.tokenizer, self.stop_ids, seed, stop, skip_prompt=echo)

    def encoder_card(self) -> dict[str, Any]:
        """What is known of the model's vision encoder."""
        config: Any = self.parts.encoder.config
        card = {
            "source": self.card.encoder,
            "model_type": config.model_type,
            "parameters": sum(parameter.numel() for parameter in self.parts.encoder.parameters()),
            "width": config.hidden_size,
            "image_size": self.parts.spec.size,
            "tokens_per_image": self.tokens_per_image,
            "downstream": f"BLIP-2 ({self.card.mode})",
        }
        return card | {key: getattr(config, key) for key in ("architecture", "origin", "training") if getattr(config, key, None)}

    @torch.no_grad()
    def soft_prompts(self, images: Sequence[Any], where: Sequence[str]) -> Tensor:
        """What the language model sees of pictures [B, Q, d]; equal pictures are encoded once, and kept.

        Args:
            images: Paths, bytes or pictures.
            where: What messages call each.
        """
        pictures = [open_image(image, place) for image, place in zip(images, where, strict=True)]
        keys = [_key(picture) for picture in pictures]
        new = {key: picture for key, picture in zip(keys, pictures, strict=True) if key not in self._soft}
        if new:
            self.encoded += len(new)
            spec, device = self.parts.spec, self.model.device
            pixels = torch.stack([spec.normalise(spec.fit(picture)) for picture in new.values()]).to(device)
            for key, row in zip(new, self.model.soft_prompt(self.parts.features(pixels)), strict=True):
                self._soft[key] = row
        found = torch.stack([self._soft[key] for key in keys])
        for key in keys:
            self._soft.move_to_end(key)
        while len(self._soft) * found[0].numel() * found.element_size() > KEPT_BYTES:
            self._soft.popitem(last=False)
        return found

    # -- inside -------------------------------------------------------------------------------------------------------------------------

    def _prompt(self, request: ChatRequest, where: str) -> list[int]:
        """Ids of one prompt."""
        if len(request.images) != 1:
            raise DataError(f"{where}: BLIP-2 reads one image with each question, {len(request.images)} were given")
        marks = sum(turn.text.count(IMAGE_MARK) for turn in request.turns if turn.role == "user")
        if marks > 1:
            raise DataError(f"{where}: {marks} times {IMAGE_MARK} and one image; a BLIP-2 has it in front of everything")
        if self.verbatim:
            said = request.turns[-1].text.removeprefix(f"{IMAGE_MARK}\n")
        else:
            said = prompt_text(request.turns, self.card.prompt, self.card.caption_prompt)
        ids = self.text.prompt(said)
        config: Any = self.model.language_model.config
        limit = getattr(config, "max_position_embeddings", None)
        if limit and len(ids) + self.tokens_per_image >= limit:
            raise DataError(
                f"{where}: prompt and image have {len(ids) + self.tokens_per_image} tokens, the LLM takes {limit}: shorten the chat"
            )
        return ids

    def _inputs(self, soft: Tensor, prompts: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """Embeddings [B, L, d] and mask [B, L]; lead, queries and prompt, padding in front of all."""
        words, length = self.model.language_model.get_input_embeddings(), max(map(len, prompts))
        pad = torch.tensor(self.tokenizer.pad_token_id, device=soft.device)
        lead = words(torch.tensor(self.model.lead, dtype=torch.long, device=soft.device))
        rows, masks = [], []
        for row, prompt in zip(soft, prompts, strict=True):
            short = length - len(prompt)
            inner = words(torch.tensor(list(prompt), dtype=torch.long, device=soft.device))
            rows.append(torch.cat([words(pad).expand(short, -1), lead, row.to(inner.dtype), inner]))
            masks.append(torch.cat([torch.zeros(short), torch.ones(len(lead) + len(row) + len(prompt))]))
        return {"inputs_embeds": torch.stack(rows), "attention_mask": torch.stack(masks).long().to(soft.device)}

    def _settings(self, max_new_tokens: int, temperature: float, top_p: float, **decoding: Any) -> GenerationConfig:
        own = self.model.language_model.config
        begin = {"decoder_start_token_id": own.decoder_start_token_id} if self.model.writes_apart else {}
        return GenerationConfig(
            max_new_tokens=max_new_tokens,
            eos_token_id=self.stop_ids,
            pad_token_id=self.tokenizer.pad_token_id,
            **sampling(max_new_tokens, temperature, top_p),
            **begin,
            **decoding,
        )

    def _answer(self, ids: Sequence[int]) -> str:
        return self.text.decode(ids[1:] if self.model.writes_apart else ids)


def prompt_text(turns: Sequence[Turn], prompt: str, caption_prompt: str) -> str:
    """Put a chat into one line: earlier questions with their answers, then the last question; nothing said asks for a caption."""
    said = [(turn.role, turn.text.replace(IMAGE_MARK, "").strip()) for turn in turns if turn.role != "system"]
    if not said or said[-1][0] != "user":
        raise DataError("a prompt ends with a user turn")
    if len(said) == 1 and not said[0][1]:
        return caption_prompt
    pieces = [prompt.format(text) if role == "user" else f"{text.rstrip('.')}." for role, text in said]
    return " ".join(pieces)


def _key(picture: Image.Image) -> str:
    """Of a picture's pixels."""
    return hashlib.sha256(f"{picture.size} {picture.mode}".encode() + picture.tobytes()).hexdigest()
