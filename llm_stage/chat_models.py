"""One loader for all models that answer: a LLaVA of any kind, or a BLIP-2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llm_stage.blip2_chat import Blip2Chat
from llm_stage.blip2_folder import is_blip2
from llm_stage.generate import ChatModel
from llm_stage.models import model_folder

Chat = ChatModel | Blip2Chat


def load_chat(folder: Path | str, *, verbatim: bool = False, **how: Any) -> Chat:
    """Load a model that answers.

    Args:
        folder: A LLaVA or BLIP-2 folder, or a name of `llm_stage.models.MODELS`.
        verbatim: A BLIP-2 takes what a user says as its whole prompt; see `Blip2Chat`.
        how: Device, dtype and name, as for `ChatModel.load`.
    """
    if is_blip2(model_folder(folder)):
        return Blip2Chat.load(folder, verbatim=verbatim, **how)
    return ChatModel.load(folder, **how)
