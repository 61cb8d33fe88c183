"""Text towers of transformers' CLIP and SigLIP, as `load_text_tower("hf:NAME")` gives them: for students of such teachers."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, CLIPTextModelWithProjection, SiglipTextModel

from encoders.foreign import load_hf
from mmkit.errors import ConfigError, DataError


class HFText(nn.Module):
    """A text model of transformers with the one method of a CLIP model that text needs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def encode_text(self, ids: Tensor) -> Tensor:
        """Token ids [n, context] to features [n, E], not normalised."""
        out: Any = self.model(input_ids=ids)
        features: Tensor = out.text_embeds if getattr(out, "text_embeds", None) is not None else out.pooler_output
        return features


def read_hf_text(name: str) -> tuple[HFText, Callable[[list[str]], Tensor]]:
    """Load the text half of a CLIP or SigLIP and its tokenizer.

    Args:
        name: The hub's name (its local copy) or a folder.

    Raises:
        DataError: It cannot be had, or is not whole.
        ConfigError: It is of another kind, or an image tower alone.
    """
    try:
        config: Any = AutoConfig.from_pretrained(name)
        if config.model_type not in ("clip", "siglip"):
            raise ConfigError(f"'hf:{name}' is a '{config.model_type}'; text towers are taken from a whole 'clip' or 'siglip'")
        text = config.text_config
        if config.model_type == "clip":
            text.projection_dim = config.projection_dim
        model = load_hf(CLIPTextModelWithProjection if config.model_type == "clip" else SiglipTextModel, name, text, f"hf:{name}")
        tokenizer = AutoTokenizer.from_pretrained(name)
    except OSError as error:
        raise DataError(
            f"text tower 'hf:{name}' cannot be had: {str(error).splitlines()[0]}. Give a folder with the tokenizer's files in it, or fetch "
            "it where there is a network"
        ) from error
    context = text.max_position_embeddings

    def tokenize(texts: list[str]) -> Tensor:
        # SigLIP was trained on texts padded to the full length, without a mask; CLIP is causal and does not see what follows the end
        ids = tokenizer(texts, padding="max_length", truncation=True, max_length=context, return_tensors="pt")["input_ids"]
        return torch.as_tensor(ids)

    return HFText(model), tokenize
