"""mmkit's models inside lmms-eval: any model that `load_chat` opens answers its tasks, through the same path as mmkit's own evaluation.

    lmms-eval --model mmkit --model_args pretrained=runs/stage2/model --tasks gqa --batch_size 16 --log_samples --output_path OUT
    mmkit score gqa --answers OUT/.../samples_gqa.jsonl --questions Q --out DIR       # the official figures for the same answers

Registered by the entry point group `lmms_eval.models`, so that nothing has to be imported or copied. Several processes under `accelerate
launch` share the questions. Tasks that compare likelihoods, and tasks with video or sound, are refused by name.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from tqdm import tqdm

try:
    from lmms_eval.api.model import lmms
except ImportError as error:
    from mmkit.errors import ConfigError

    raise ConfigError("this is mmkit's model for lmms-eval, which is not installed: pip install 'mmkit[lmms-eval]'") from error

from llm_stage.chat_format import IMAGE_MARK, Turn
from llm_stage.chat_models import load_chat
from llm_stage.generate import ChatRequest
from mmkit.errors import DataError

MAX_NEW_TOKENS = 128  # where a task says nothing
_SAMPLING = ("max_new_tokens", "temperature", "top_p", "seed")


def manifest() -> Any:
    """What lmms-eval registers: the name `mmkit`, a model of chat tasks."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="mmkit", chat_class_path=f"{__name__}.MMKitChat")


class MMKitChat(lmms):
    """A model of mmkit's as lmms-eval wants it.

    Args:
        pretrained: A folder, a name of `mmkit list models`, or MODEL@URL.
        batch_size: Questions at once; halved when memory runs out.
        device: None is the accelerator if there is one, under `accelerate launch` the process's own.
        max_batch_size: Ignored; lmms-eval always gives it.
    """

    is_simple = False

    def __init__(self, pretrained: str, batch_size: int | str = 8, device: str | None = None, max_batch_size: Any = None) -> None:
        super().__init__()
        self._rank, self._world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.batch_size = int(batch_size)
        self.chat = load_chat(pretrained, verbatim=True, **({"device": device} if device else {}))

    @property
    def rank(self) -> int:
        """This process's number."""
        return self._rank

    @property
    def world_size(self) -> int:
        """How many processes share the questions."""
        return self._world_size

    @property
    def device(self) -> Any:
        """Where the model is; an endpoint's is the CPU."""
        return getattr(getattr(self.chat, "model", None), "device", "cpu")

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answer chat requests; those with the same settings in common batches.

        Args:
            requests: Their `args` are (context, doc_to_messages, generation settings, document's number, task, split).

        Returns:
            The answers in the order of the requests, cut at the task's stop words.

        Raises:
            DataError: A message holds video or sound.
        """
        asked = [self._request(instance.args) for instance in requests]
        settings = [self._settings(instance.args[2]) for instance in requests]
        answers = [""] * len(asked)
        order = sorted(range(len(asked)), key=lambda index: repr(settings[index]))
        with tqdm(total=len(asked), desc=f"lmms-eval · {self.chat.name}", unit="question", disable=self.rank != 0) as progress:
            for _, group in groupby(order, key=lambda index: repr(settings[index])):
                places = list(group)

                def keep(number: int, _: str) -> None:
                    progress.update(1)

                how = dict(settings[places[0]])
                until = how.pop("until")
                texts = self.chat.generate([asked[place] for place in places], batch_size=self.batch_size, on_answer=keep, **how)
                for place, text in zip(places, texts, strict=True):
                    answers[place] = cut(text, until)
        return answers

    def _request(self, args: Sequence[Any]) -> ChatRequest:
        """One request of lmms-eval's as one of ours."""
        _, to_messages, _, number, task, split = args
        return read_messages(to_messages(self.task_dict[task][split][number]), f"{task}, document {number}")

    @staticmethod
    def _settings(given: Mapping[str, Any]) -> dict[str, Any]:
        """Generation settings of ours from a task's; `do_sample: false` and a temperature of nought are greedy."""
        how = {key: given[key] for key in _SAMPLING if given.get(key) is not None}
        if given.get("do_sample") is False or not how.get("temperature"):
            how = {key: value for key, value in how.items() if key == "max_new_tokens"}
        until = given.get("until") or []
        return {"max_new_tokens": MAX_NEW_TOKENS, **how, "until": [until] if isinstance(until, str) else list(until)}

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Refused: mmkit's models answer in words.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("mmkit's models answer in words; choose a task of output_type generate_until (most have one)")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Refused: rounds that depend on each other are not asked.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("tasks of several rounds are not answered by mmkit's plug-in; choose one of output_type generate_until")

    def clean(self) -> None:
        """Keep the model: lmms-eval deletes every module of a model it has finished with, also one that is still in training."""


def read_messages(messages: Sequence[Mapping[str, Any]], where: str) -> ChatRequest:
    """Chat messages with typed parts as a request.

    Args:
        messages: Of lmms-eval's protocol; an image's `url` is a picture, its path or its bytes.
        where: For the error.

    Raises:
        DataError: A part is neither text nor an image.
    """
    turns, images = [], []
    for message in messages:
        pieces = []
        for part in [{"type": "text", "text": message["content"]}] if isinstance(message["content"], str) else message["content"]:
            if part["type"] == "text":
                pieces.append(str(part["text"]).replace(IMAGE_MARK, ""))
            elif part["type"] == "image":
                pieces.append(IMAGE_MARK)
                images.append(part["url"])
            else:
                raise DataError(f"{where} holds {part['type']}; mmkit's models take text and images")
        turns.append(Turn(message["role"], "\n".join(piece for piece in pieces if piece)))
    return ChatRequest(turns, images)


def cut(text: str, until: Sequence[str]) -> str:
    """The answer before the first of the stop words."""
    for word in until:
        if word:
            text = text.split(word)[0]
    return text.strip()
