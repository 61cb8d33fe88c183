"""A text tower on its own, in a folder: what an encoder folder carries beside its image tower, so that zero-shot needs nothing else.

ENCODER/text_tower/text_config.json         open_clip's `text_cfg` and joint width
ENCODER/text_tower/text_model.safetensors   the weights, under open_clip's names ("text....")
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import open_clip
from open_clip.transformer import TextTransformer
from torch import Tensor, nn

from mmkit.checkpoint import atomic_write, load_strict, load_weights, save_weights
from mmkit.errors import ConfigError, DataError

TEXT_FOLDER = "text_tower"
TEXT_CONFIG, TEXT_WEIGHTS = "text_config.json", "text_model.safetensors"
CLIP_VOCABULARY = 49408  # entries of CLIP's tokenizer, the only one that comes without files
IN_THIS_FOLDER = f"./{TEXT_FOLDER}"  # `text_tower` in the config.json of an encoder folder that carries one


class TextOnly(nn.Module):
    """open_clip's text transformer with the one method of a CLIP model that text needs; its tensors are named "text...." as in CLIP models."""

    def __init__(self, text: nn.Module) -> None:
        super().__init__()
        self.text = text

    def encode_text(self, ids: Tensor) -> Tensor:
        """Token ids [n, context] to features [n, E], not normalised."""
        features: Tensor = self.text(ids)
        return features


def build_text(text_args: Mapping[str, Any], joint_width: int) -> TextOnly:
    """Build a text tower with random weights.

    Args:
        text_args: open_clip's `text_cfg`: context_length, vocab_size, width, heads, layers, ...
        joint_width: E.

    Raises:
        ConfigError: An argument is unknown, or the sizes contradict each other.
    """
    try:
        return TextOnly(TextTransformer(**text_args, output_dim=joint_width)).eval()
    except (TypeError, AssertionError) as error:
        raise ConfigError(f"open_clip cannot build a text tower with {dict(text_args)}: {error}") from error


def write_text_folder(folder: Path, tower: TextOnly, text_args: Mapping[str, Any], joint_width: int, origin: str) -> None:
    """Write a text tower; the folder is part of one that `atomic_folder` gave."""
    folder.mkdir()
    save_weights(tower.state_dict(), folder / TEXT_WEIGHTS)
    content = {"embed_dim": joint_width, "text_cfg": dict(text_args), "custom_text": True, "mmkit": {"origin": origin}}
    atomic_write(folder / TEXT_CONFIG, json.dumps(content, indent=1) + "\n")


def read_text_config(folder: Path) -> dict[str, Any]:
    """Read the configuration of a text folder.

    Raises:
        DataError: It is no JSON, or says no sizes.
    """
    path = folder / TEXT_CONFIG
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is no valid JSON: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("text_cfg"), dict) or "embed_dim" not in content:
        raise DataError(f"{path} is no text tower's configuration: embed_dim and text_cfg were expected")
    return content


def read_text_folder(folder: Path) -> tuple[TextOnly, Callable[[list[str]], Tensor]]:
    """Load a text tower and its tokenizer.

    Raises:
        DataError: The weights are missing, damaged, or of another size.
    """
    content = read_text_config(folder)
    tower = build_text(content["text_cfg"], content["embed_dim"])
    if not (folder / TEXT_WEIGHTS).is_file():
        raise DataError(f"text tower '{folder}' has no {TEXT_WEIGHTS}: its copy was cut off")
    state = load_weights(folder / TEXT_WEIGHTS)
    load_strict(tower, state, str(folder / TEXT_WEIGHTS))
    tower.to(state["text.token_embedding.weight"].dtype)
    return tower, clip_tokenizer(content["text_cfg"], str(folder))


def clip_tokenizer(text_args: Mapping[str, Any], source: str) -> Callable[[list[str]], Tensor]:
    """Give CLIP's tokenizer for a tower that has CLIP's vocabulary; for any other, a function that says so when it is called."""
    entries = text_args.get("vocab_size", CLIP_VOCABULARY)
    if entries == CLIP_VOCABULARY:
        tokenizer: Callable[[list[str]], Tensor] = open_clip.SimpleTokenizer(context_length=text_args.get("context_length", 77))
        return tokenizer

    def refuse(texts: list[str]) -> Tensor:
        raise ConfigError(
            f"text tower '{source}' has {entries} entries in its vocabulary, CLIP's tokenizer {CLIP_VOCABULARY}: words cannot become its "
            "ids here. Call encode_text with ids of your own, or name another tower of the same space with --text_tower"
        )

    return refuse
