"""Text towers: the frozen other half of zero-shot, loaded by name, and the small tokenizer of towers trained from nothing."""

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import open_clip
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from encoders.architectures import register_folder_entry
from encoders.text_folder import TEXT_CONFIG, TEXT_FOLDER, read_text_folder
from mmkit.errors import ConfigError, DataError, NameNotFound
from mmkit.trainable import freeze

MINI_CLIP = Path(__file__).parent / "data" / "mini_clip"
PAD, UNKNOWN, END = "[PAD]", "[UNK]", "[EOS]"  # ids 0, 1, 2 in every tokenizer that `word_tokenizer` makes
END_ID = 2


def word_tokenizer(texts: Iterable[str], entries: int = 4096) -> PreTrainedTokenizerFast:
    """Make a small lower-case tokenizer: frequent words whole, others in pieces, [EOS] at the end.

    Args:
        texts: What the tower will be trained on.
        entries: Largest size of the vocabulary.

    Returns:
        A Hugging Face tokenizer; open_clip's `HFTokenizer` reads what its `save_pretrained` writes.
    """
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace()])
    alphabet = list("abcdefghijklmnopqrstuvwxyz0123456789.,'\"-:;?!&()/")
    trainer = trainers.BpeTrainer(vocab_size=entries, special_tokens=[PAD, UNKNOWN, END], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, END_ID)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, unk_token=UNKNOWN, eos_token=END)


class TextTower(nn.Module):
    """A frozen text tower with its tokenizer: strings in, unit vectors of the joint space out."""

    def __init__(self, clip: nn.Module, tokenizer: Callable[[list[str]], Tensor], name: str, templates: str = "openai") -> None:
        """Keep the text half of an open_clip model.

        Args:
            clip: The open_clip model; its image tower is dropped.
            tokenizer: Strings to ids [n, context].
            name: What it was loaded by; stands in reports.
            templates: Name of the zero-shot prompts it was trained near (see `encoders.zeroshot.TEMPLATES`).
        """
        super().__init__()
        if hasattr(clip, "visual"):
            del clip.visual
        self.clip = freeze(clip)
        self.tokenizer, self.name, self.templates = tokenizer, name, templates
        self.joint_width = int(self.encode(["a"]).shape[1])

    @torch.no_grad()
    def encode(self, texts: Sequence[str], batch_size: int = 256) -> Tensor:
        """Embed texts: [n, E] on the CPU in float32, rows of length 1.

        Raises:
            DataError: There is no text.
        """
        if not texts:
            raise DataError(f"text tower {self.name}: there is no text to embed")
        device = next(self.clip.parameters()).device
        encode_text: Any = self.clip.encode_text
        parts = []
        for start in range(0, len(texts), batch_size):
            ids = self.tokenizer(list(texts[start : start + batch_size])).to(device)  # [b, context]
            parts.append(F.normalize(encode_text(ids).float(), dim=-1).cpu())
        return torch.cat(parts)


def load_text_tower(name: str) -> TextTower:
    """Load a text tower.

    Args:
        name: "mini-clip" (inside this package), "openclip:MODEL/TAG", or a folder with `open_clip_config.json` (with or without
            "openclip:" in front), such as `train_contrastive.py` writes; an encoder folder that carries its text tower; or "hf:NAME", a
            CLIP or SigLIP of transformers.

    Raises:
        NameNotFound: Nothing of this name; the message says what there is.
        ConfigError: The name is empty: the encoder was trained without a text tower.
    """
    if not name:
        raise ConfigError("no text tower is named: zero-shot needs the one of the encoder's joint space, say --text_tower mini-clip")
    if name == "mini-clip":
        if not (MINI_CLIP / "open_clip_config.json").is_file():
            raise DataError(f"mini-clip: its weights are missing from this installation ({MINI_CLIP.name}); reinstall mmkit")
        return _from_folder(MINI_CLIP, name)
    bare = name.removeprefix("openclip:").removeprefix("local-dir:")
    if (Path(bare) / "open_clip_config.json").is_file():
        return _from_folder(Path(bare), name)
    for folder in (Path(bare), Path(bare) / TEXT_FOLDER):
        if (folder / TEXT_CONFIG).is_file():
            return TextTower(*read_text_folder(folder), name)
    if name.startswith("hf:"):
        from encoders.hf_text import read_hf_text  # here, since it imports foreign.py, which imports this file

        return TextTower(*read_hf_text(name.removeprefix("hf:")), name)
    if name.startswith("openclip:"):
        return _from_open_clip(bare, name)
    raise NameNotFound(
        f"no text tower '{name}': it is no folder with open_clip_config.json; there are also mini-clip and openclip:MODEL/TAG "
        "(openclip:ViT-B-16/openai)"
    )


def _from_folder(folder: Path, name: str) -> TextTower:
    register_folder_entry(folder)
    with quiet_open_clip():
        clip = open_clip.create_model(f"local-dir:{folder}")
        tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    about = json.loads((folder / "open_clip_config.json").read_text(encoding="utf-8"))
    return TextTower(clip, tokenizer, name, templates=about.get("mmkit", {}).get("templates", "openai"))


def _from_open_clip(bare: str, name: str) -> TextTower:
    model, _, tag = bare.partition("/")
    tags = dict.fromkeys(open_clip.list_pretrained_tags_by_model(model))
    if not tags:
        near = [known for known in open_clip.list_models() if model.lower()[:6] in known.lower()][:8]
        raise NameNotFound(f"'{name}': open_clip has no model '{model}'; nearest: {', '.join(near) or 'see open_clip.list_models()'}")
    if tag not in tags and not Path(tag).is_file():
        raise NameNotFound(f"'{name}': open_clip knows {model} with {', '.join(tags)}; '{tag}' is neither one of these nor a file")
    with quiet_open_clip():
        clip = open_clip.create_model(model, pretrained=tag, require_pretrained=True)
    return TextTower(clip, open_clip.get_tokenizer(model), name)


@contextmanager
def quiet_open_clip() -> Iterator[None]:
    """Hold back what open_clip and timm log below level ERROR while they build a model."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)  # they warn of every model built without weights, which is what was asked for
    try:
        yield
    finally:
        logger.setLevel(level)
