"""One loader for all models that answer: a LLaVA of any kind, a BLIP-2, another model of transformers, or one behind an endpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llm_stage.blip2_chat import Blip2Chat
from llm_stage.blip2_folder import is_blip2
from llm_stage.endpoint import Endpoint, EndpointChat
from llm_stage.generate import ChatModel
from llm_stage.models import model_folder
from llm_stage.stock_chat import StockChat, is_stock

Chat = ChatModel | Blip2Chat | StockChat | EndpointChat


def load_chat(folder: Path | str, *, verbatim: bool = False, **how: Any) -> Chat:
    """Load a model that answers.

    Args:
        folder: A LLaVA or BLIP-2 folder, an image-text-to-text model of transformers, a name of `llm_stage.models.MODELS`, or MODEL@URL of an
            OpenAI-compatible endpoint.
        verbatim: A BLIP-2 takes what a user says as its whole prompt; see `Blip2Chat`.
        how: Device, dtype and name, as for `ChatModel.load`.
    """
    if is_endpoint(folder):
        return EndpointChat(Endpoint.parse(str(folder)))
    if is_blip2(model_folder(folder)):
        return Blip2Chat.load(folder, verbatim=verbatim, **how)
    if is_stock(model_folder(folder)):
        return StockChat.load(model_folder(folder), verbatim=verbatim, **how)
    return ChatModel.load(folder, **how)


def is_endpoint(model: Path | str) -> bool:
    """Whether a model's name is that of an endpoint."""
    return "@http://" in str(model) or "@https://" in str(model)
