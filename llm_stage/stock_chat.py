"""Other people's models: any image-text-to-text model of transformers by its own processor and chat template, and transformers' BLIP-2.

    chat = StockChat.load("Qwen2.5-VL-3B-Instruct/")
    chat.generate([ChatRequest([Turn("user", "what is this?")], ["apple.png"])])

A batch is padded on the left. Rows with and without pictures are answered apart, since processors mix them up; what a processor wrote is
held against what was asked: every row must have placeholders if and only if it has pictures.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from threading import Event
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig

from llm_stage.batched import answer_in_batches, best_device, sampling, seeded, streamed
from llm_stage.blip2_chat import prompt_text
from llm_stage.chat_format import IMAGE_MARK, Turn
from llm_stage.generate import ChatRequest, place_marks
from mmkit.errors import ConfigError, DataError
from mmkit.images import open_image

OWN_TYPES = ("llava",)  # `ChatModel` does these
BLIP2_PROMPT = "Question: {} Short answer:"


class StockChat:
    """A model of transformers that answers.

    Args:
        model: In eval mode, on its device.
        processor: Its own.
        name: For tables and labels.
        verbatim: A BLIP-2 takes what a user says as its whole prompt, as benchmarks have it.

    Attributes:
        last_batch_size: Rows of the last batch: smaller than asked for, after memory ran out.
    """

    def __init__(self, model: Any, processor: Any, name: str, verbatim: bool = False) -> None:
        self.model, self.processor, self.tokenizer, self.name, self.verbatim = model, processor, processor.tokenizer, name, verbatim
        self.blip2 = model.config.model_type == "blip-2"
        self.last_batch_size = 0
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        if not self.blip2 and not (getattr(processor, "chat_template", None) or self.tokenizer.chat_template):
            raise ConfigError(f"{name} has no chat template: neither its processor nor its tokenizer brings one")

    @classmethod
    def load(
        cls, folder: Path | str, *, device: Any = None, dtype: torch.dtype | None = None, name: str | None = None, verbatim: bool = False
    ) -> StockChat:
        """Load a folder, or a name on the hub.

        Raises:
            ConfigError: Transformers cannot load it as an image-text-to-text model.
        """
        device = torch.device(device) if device is not None else best_device()
        dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
        try:
            processor = AutoProcessor.from_pretrained(folder)
            loaded: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, output_loading_info=True)
            model, info = loaded
        except (OSError, ValueError, ImportError) as error:
            raise ConfigError(f"{folder} could not be loaded as an image-text-to-text model: {str(error).splitlines()[0]}") from error
        if info["missing_keys"]:
            raise ConfigError(
                f"{folder}: {len(info['missing_keys'])} weights are missing, such as {sorted(map(str, info['missing_keys']))[0]}"
            )
        return cls(model.eval().to(device), processor, name or Path(folder).resolve().name, verbatim)

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
        **decoding: Any,
    ) -> list[str]:
        """Answer many requests; see `ChatModel.generate`."""
        texts = [self._text(request, f"request {index}") for index, request in enumerate(requests)]
        order = sorted(range(len(texts)), key=lambda index: (bool(requests[index].images), -len(texts[index])))

        def answer(rows: list[int], position: int) -> list[str]:
            inputs = self._inputs([texts[i] for i in rows], [requests[i] for i in rows], [f"request {i}" for i in rows])
            settings = self._settings(max_new_tokens, temperature, top_p, **decoding)
            with torch.no_grad(), seeded(None if seed is None else seed + position, settings.do_sample):
                output = self.model.generate(**inputs, generation_config=settings)
            return [self._answer(ids) for ids in output[:, self._echo(inputs) :].tolist()]

        with_images = [bool(request.images) for request in requests]
        answers, self.last_batch_size = answer_in_batches(order, batch_size, answer, self.name, on_answer, with_images.__getitem__)
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
        inputs = self._inputs([self._text(request, "the request")], [request], ["the request"])
        settings = self._settings(max_new_tokens, temperature, top_p)
        yield from streamed(self.model, inputs, settings, self.tokenizer, self._stops(), seed, stop)

    def encoder_card(self) -> dict[str, Any]:
        """What is known of the model's vision encoder."""
        config = getattr(self.model.config, "vision_config", None)
        keys = ("model_type", "hidden_size", "image_size", "patch_size")
        return {"source": self.name, **{key: getattr(config, key) for key in keys if getattr(config, key, None) is not None}}

    # -- inside -------------------------------------------------------------------------------------------------------------------------

    def _text(self, request: ChatRequest, where: str) -> str:
        """The prompt as the processor takes it, with a mark of its own for each picture."""
        turns = place_marks(request)
        if not turns or turns[-1].role != "user":
            raise DataError(f"{where}: a prompt ends with a user turn")
        marks = sum(turn.text.count(IMAGE_MARK) for turn in turns if turn.role == "user")
        if marks != len(request.images):
            raise DataError(f"{where}: {marks} times {IMAGE_MARK} and {len(request.images)} picture(s)")
        if self.blip2:
            if len(request.images) != 1:
                raise DataError(f"{where}: BLIP-2 reads one image with each question, {len(request.images)} were given")
            return turns[-1].text.removeprefix(f"{IMAGE_MARK}\n") if self.verbatim else prompt_text(turns, BLIP2_PROMPT, "")
        messages = [{"role": turn.role, "content": _parts(turn)} for turn in turns]
        text: str = self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return text

    def _inputs(self, texts: Sequence[str], requests: Sequence[ChatRequest], where: Sequence[str]) -> dict[str, Any]:
        pictures = [[open_image(image, place) for image in request.images] for request, place in zip(requests, where, strict=True)]
        flat = [picture for row in pictures for picture in row]
        images = {"images": flat if all(len(row) == 1 for row in pictures) else pictures} if flat else {}
        found = self.processor(text=list(texts), **images, return_tensors="pt", padding=True, padding_side="left")
        token = getattr(self.model.config, "image_token_id", None) or getattr(self.model.config, "image_token_index", None)
        if token is not None:
            counts = (found["input_ids"] == token).sum(dim=1).tolist()
            for count, row, place in zip(counts, pictures, where, strict=True):
                wanted = len(row) * self.processor.num_query_tokens if self.blip2 else count
                if count != wanted or bool(count) != bool(row):
                    raise DataError(f"{place}: the processor of {self.name} wrote {count} image placeholders for {len(row)} picture(s)")
        dtype = self.model.dtype
        return {
            key: value.to(self.model.device, dtype) if value.is_floating_point() else value.to(self.model.device)
            for key, value in found.items()
        }

    def _echo(self, inputs: dict[str, Any]) -> int:
        """How many ids of the output are the prompt; an encoder-decoder writes its begin token."""
        return 1 if self.model.config.is_encoder_decoder or self._decoder_apart() else int(inputs["input_ids"].shape[1])

    def _decoder_apart(self) -> bool:
        return bool(getattr(getattr(self.model.config, "text_config", None), "is_encoder_decoder", False))

    def _stops(self) -> list[int]:
        given = self.model.generation_config.eos_token_id
        ids = [*(given if isinstance(given, list) else [given]), self.tokenizer.eos_token_id]
        if self.blip2 and not self._decoder_apart():  # OPT ends an answer with a line
            ids += self.tokenizer("\n", add_special_tokens=False)["input_ids"][-1:]
        return list(dict.fromkeys(int(i) for i in ids if i is not None))

    def _settings(self, max_new_tokens: int, temperature: float, top_p: float, **decoding: Any) -> GenerationConfig:
        own = self.model.generation_config
        begin = {"decoder_start_token_id": own.decoder_start_token_id} if getattr(own, "decoder_start_token_id", None) is not None else {}
        return GenerationConfig(
            max_new_tokens=max_new_tokens,
            eos_token_id=self._stops(),
            pad_token_id=self.tokenizer.pad_token_id,
            **sampling(max_new_tokens, temperature, top_p),
            **begin,
            **decoding,
        )

    def _answer(self, ids: Sequence[int]) -> str:
        stops = set(self._stops())
        ends = [place for place, token in enumerate(ids) if token in stops]
        text: str = self.tokenizer.decode(list(ids)[: ends[0]] if ends else list(ids), skip_special_tokens=True)
        return text.strip()


def _parts(turn: Turn) -> list[dict[str, str]]:
    """A turn as typed parts, an image for each mark."""
    if turn.role != "user":
        return [{"type": "text", "text": turn.text}]
    parts: list[dict[str, str]] = []
    for number, piece in enumerate(turn.text.split(IMAGE_MARK)):
        parts += [{"type": "image"}] if number else []
        parts += [{"type": "text", "text": piece.strip("\n")}] if piece.strip() else []
    return parts


def is_stock(folder: Path) -> bool:
    """Whether a folder holds a model of transformers that `ChatModel` does not load."""
    file = folder / "config.json"
    if not file.is_file():
        return False
    try:
        kind = json.loads(file.read_text(encoding="utf-8")).get("model_type", "")
    except ValueError:
        return False
    return kind in _image_text_types() and kind not in OWN_TYPES


def _image_text_types() -> set[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    return set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
