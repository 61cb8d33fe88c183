"""Where a LLaVA looks while it answers: the attention of each word of an answer over the patches of the images.

    seen = answer_attention(chat, ChatRequest([Turn("user", "what is it?")], [image]), "a red apple")
    seen.shares[2].mean(dim=(0, 1))[0]     # third token, mean over layers and heads, first image: [h, w]

Letters: T tokens of the answer, L layers of the LLM, A heads, I images, h by w patches of one image.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llm_stage.generate import ChatModel, ChatRequest
from llm_stage.llava import tower_geometry
from mmkit.errors import ConfigError, DataError
from mmkit.images import open_image

MAX_TOKENS = 64  # of an answer; each costs L x A x I x h x w numbers


@dataclass(frozen=True)
class AnswerAttention:
    """The attention of an answer.

    Attributes:
        tokens: Its T tokens, as text.
        shares: [T, L, A, I, h, w]; what is missing to 1 goes to words, to CLS and to tiles after the first.
    """

    tokens: list[str]
    shares: Tensor

    @property
    def on_images(self) -> Tensor:
        """The share of attention that goes to the patches at all, mean over heads [T, L]."""
        return self.shares.sum(dim=(3, 4, 5)).mean(dim=2)


@torch.no_grad()
def answer_attention(chat: ChatModel, request: ChatRequest, answer: str) -> AnswerAttention:
    """Read how the attention that wrote each token of an answer was spread over the images' patches.

    One forward pass over prompt and answer with attention computed in the open; nobody else may use the model meanwhile.

    Args:
        chat: A LLaVA.
        request: The question; with at least one image. Of a picture in tiles, its first view (the whole picture) is shown.
        answer: What the model said, or any other words; at most `MAX_TOKENS` tokens of it.

    Raises:
        DataError: There is no image, or the answer is empty.
        ConfigError: The LLM keeps no attention that could be read, or the tower's patches are no square grid.
    """
    if not request.images:
        raise DataError("there is no image whose patches could be looked at")
    geometry, pictures = tower_geometry(chat.model.model.vision_tower), len(request.images)
    if geometry.beyond_grid:
        raise ConfigError("the tower joins several encoders: its tokens are no square grid to draw")
    prompt, images = chat.prompt(request)
    said = chat.tokenizer(answer.strip(), add_special_tokens=False)["input_ids"][:MAX_TOKENS]
    if not said:
        raise DataError("the answer has no words")
    inputs = chat.inputs([[*prompt, *said]], [images])
    places = (inputs["input_ids"][0] == chat.model.config.image_token_id).nonzero()[:, 0].view(-1, chat.tokens_per_image)
    first_views = places[_first_views(chat, request)]
    prefix = chat.tokens_per_image - geometry.num_patches
    patches = first_views[:, prefix:].reshape(-1)  # [I x h x w]
    asking = torch.arange(len(prompt) - 1, len(prompt) - 1 + len(said), device=patches.device)  # the position before writes a token
    rows: list[Tensor] = []
    with _attention_in_the_open(chat.model.model.language_model, asking, patches, rows):
        chat.model(**inputs, use_cache=False, logits_to_keep=1)
    side = int(geometry.num_patches**0.5)
    shares = torch.stack(rows).permute(2, 0, 1, 3).unflatten(-1, (pictures, side, side)).float().cpu()
    return AnswerAttention([chat.tokenizer.decode([token]) for token in said], shares)


def _first_views(chat: ChatModel, request: ChatRequest) -> list[int]:
    """Which of all views are the first of their picture."""
    starts, at = [], 0
    for image in request.images:
        starts.append(at)
        at += len(chat.tiles.views(open_image(image))) if chat.tiles else 1
    return starts


@contextmanager
def _attention_in_the_open(llm: Any, asking: Tensor, patches: Tensor, rows: list[Tensor]) -> Iterator[None]:
    """Let the LLM compute attention where it can be seen, and keep of each layer the rows [A, T, patches] that are asked for."""
    layers = attention_layers(llm)
    if not layers:
        raise ConfigError(f"{type(llm).__name__} has no attention modules that are known here")
    before = llm.config._attn_implementation

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        shares = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if shares is None:
            raise ConfigError(f"{type(llm).__name__} keeps no attention that could be read")
        rows.append(shares[0][:, asking][:, :, patches])

    handles = [layer.register_forward_hook(keep) for layer in layers]
    try:
        llm.set_attn_implementation("eager")  # the fused kernels keep none
        yield
    finally:
        for handle in handles:
            handle.remove()
        llm.set_attn_implementation(before)


def attention_layers(llm: nn.Module) -> Sequence[nn.Module]:
    """An LLM's self-attention modules, the first layer first."""
    return [
        module for name, module in llm.named_modules() if name.rsplit(".", 1)[-1] in ("self_attn", "attn", "attention", "self_attention")
    ]
