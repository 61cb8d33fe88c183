"""Whole CLIP models as open_clip builds them: from a name, a folder or a JSON; and their export as a folder that open_clip loads."""

import json
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.factory import get_model_config
from open_clip.timm_model import TimmModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from encoders.architectures import ENTRY_FILE, entry_script, own_entry, register_folder_entry
from encoders.catalog import load_encoder
from encoders.modeling import VisionEncoderConfig
from encoders.text import END_ID, MINI_CLIP, quiet_open_clip, word_tokenizer
from mmkit.checkpoint import atomic_write, load_strict, save_weights
from mmkit.errors import ConfigError, DataError, NameNotFound
from mmkit.images import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, ImageSpec

CONFIG_NAME, WEIGHTS_NAME = "open_clip_config.json", "open_clip_model.safetensors"
OWN_TOKENIZER = "own"  # in text_cfg.hf_tokenizer_name: the tokenizer is made from the captions and lies beside the weights

# The small CLIP of the embedded world: 3.8 M parameters for pictures, 1.2 M for texts.
MINI_CLIP_CONFIG: dict[str, Any] = {
    "embed_dim": 256,
    "vision_cfg": {"image_size": 96, "timm_model_name": "vit_mini_patch16_96", "timm_pool": "token", "timm_proj": ""},
    "text_cfg": {
        "context_length": 24,
        "vocab_size": 4096,
        "hf_tokenizer_name": OWN_TOKENIZER,
        "width": 128,
        "heads": 4,
        "layers": 3,
        "pool_type": "eos",
        "eos_id": END_ID,
        "pad_id": 0,
    },
}


@dataclass
class ClipParts:
    """A CLIP model and what belongs to it.

    Attributes:
        model: open_clip's module, with `visual`, `encode_text` and `logit_scale`.
        tokenizer: Strings to ids [n, context].
        model_config: open_clip's `model_cfg`.
        spec: How pictures are prepared for it.
        origin: Where its weights came from.
        text_origin: Where the text tower's came from, if from elsewhere.
        encoder: The image tower's own configuration, if it came from an encoder folder.
        entry: What `own_entry` gave, where the image tower is no stock timm entry.
    """

    model: nn.Module
    tokenizer: Callable[[list[str]], Tensor]
    model_config: dict[str, Any]
    spec: ImageSpec
    origin: str
    text_origin: str = ""
    encoder: VisionEncoderConfig | None = None
    entry: dict[str, Any] | None = None


def tokenizer_of(hf_tokenizer: PreTrainedTokenizerBase, context_length: int) -> Callable[[list[str]], Tensor]:
    """Wrap a Hugging Face tokenizer as open_clip calls one: strings to padded ids [n, context]."""

    def tokenize(texts: list[str]) -> Tensor:
        return hf_tokenizer(texts, return_tensors="pt", max_length=context_length, padding="max_length", truncation=True)["input_ids"]

    tokenize.tokenizer = hf_tokenizer  # type: ignore[attr-defined]
    return tokenize


def build_clip(model: str, captions: Callable[[], Iterable[str]], saved_tokenizer: Path) -> ClipParts:
    """Build the CLIP model that a training starts from.

    Args:
        model: "mini-clip-new" (the small one, random weights), an open_clip JSON file (random weights), "MODEL" (open_clip's name, random
            weights), "MODEL/TAG" (with open_clip's weights), or a folder that `export_clip` wrote.
        captions: Gives the texts that an own tokenizer is made from; called only if one is needed.
        saved_tokenizer: Folder where an own tokenizer is kept; read instead of making one when it is there (a resumed run).

    Raises:
        NameNotFound: open_clip does not know the model or the tag.
        DataError: A folder or JSON lacks what it needs.
    """
    path = Path(model)
    if path.is_dir():
        return _from_folder(path)
    if model == "mini-clip-new" or path.suffix == ".json":
        config = deepcopy(MINI_CLIP_CONFIG) if model == "mini-clip-new" else _read_model_config(path)
        return _from_config(config, captions, saved_tokenizer)
    name, _, tag = model.partition("/")
    config = get_model_config(name)
    if config is None:
        near = [known for known in open_clip.list_models() if name.lower()[:5] in known.lower()][:6]
        raise NameNotFound(
            f"--model {model}: no folder, no JSON file, and open_clip has no '{name}'; nearest: {', '.join(near) or 'mini-clip-new'}"
        )
    tags = open_clip.list_pretrained_tags_by_model(name)
    if tag and tag not in tags:
        raise NameNotFound(
            f"--model {model}: open_clip's weights for {name} are {', '.join(tags) or 'none'}; without /TAG it starts from random ones"
        )
    with quiet_open_clip():
        clip = open_clip.create_model(name, pretrained=tag or None)
    return ClipParts(clip, open_clip.get_tokenizer(name), config, spec_of(clip), f"open_clip {model}" if tag else "new")


def _read_model_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise DataError(f"--model {path}: there is no such file")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is no valid JSON: {error}") from error
    config = config.get("model_cfg", config)
    missing = [key for key in ("embed_dim", "vision_cfg", "text_cfg") if key not in config]
    if missing:
        raise DataError(f"{path}: an open_clip model has embed_dim, vision_cfg and text_cfg; {', '.join(missing)} is missing")
    return config


def _from_config(config: dict[str, Any], captions: Callable[[], Iterable[str]], saved_tokenizer: Path) -> ClipParts:
    """Build a model with random weights; its tokenizer is its own, or open_clip's."""
    text = config["text_cfg"]
    tokenizer: Callable[[list[str]], Tensor]
    if text.get("hf_tokenizer_name") == OWN_TOKENIZER:
        if saved_tokenizer.is_dir():
            own = PreTrainedTokenizerFast.from_pretrained(saved_tokenizer)
        else:
            own = word_tokenizer(captions(), text.get("vocab_size", 4096))
        text["vocab_size"] = len(own)
        tokenizer = tokenizer_of(own, text["context_length"])
    elif text.get("hf_tokenizer_name"):
        tokenizer = open_clip.HFTokenizer(text["hf_tokenizer_name"], context_length=text.get("context_length", 77))
    else:
        tokenizer = open_clip.SimpleTokenizer(context_length=text.get("context_length", 77))
    with quiet_open_clip():
        kind = open_clip.CustomTextCLIP if config.get("custom_text") or "hf_model_name" in text else open_clip.CLIP
        clip = kind(**{key: value for key, value in config.items() if key != "custom_text"})
    size = config["vision_cfg"].get("image_size", 224)
    return ClipParts(clip, tokenizer, config, ImageSpec(size=size, mean=OPENAI_CLIP_MEAN, std=OPENAI_CLIP_STD), "new")


def _from_folder(folder: Path) -> ClipParts:
    if not (folder / CONFIG_NAME).is_file():
        raise DataError(f"--model {folder}: the folder has no {CONFIG_NAME}; it should be one that open_clip or train_contrastive wrote")
    register_folder_entry(folder)
    with quiet_open_clip():
        clip = open_clip.create_model(f"local-dir:{folder}")
        tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    about = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8")).get("mmkit", {})
    config = _read_model_config(folder / CONFIG_NAME)
    return ClipParts(clip, tokenizer, config, spec_of(clip), str(folder), entry=about.get("timm_entry"))


def clip_from_encoder(source: str, text_tower: str = "") -> ClipParts:
    """Join an image tower and a text tower of the same joint space: a UTA student and its teacher's text tower.

    Args:
        source: What `load_encoder` takes; an encoder folder, say.
        text_tower: "mini-clip", "openclip:MODEL/TAG", or a folder; "" is the one that the encoder names.

    Raises:
        ConfigError: The encoder has no joint space or names no text tower, or the spaces differ in width.
        NameNotFound, DataError: One of them cannot be had.
    """
    encoder = load_encoder(source).float()
    name = text_tower or encoder.config.text_tower or ""
    if encoder.joint_width is None or not name:
        lack = "has no joint image-text space" if encoder.joint_width is None else "names no text tower"
        raise ConfigError(f"--encoder {source} {lack}; train one with UTA, or name the text tower of its space: --encoder_text mini-clip")
    bare = name.removeprefix("openclip:")
    if name != "mini-clip" and "/" not in bare and not Path(bare).is_dir():
        raise ConfigError(f"--encoder_text {name}: a text tower has weights; mini-clip, openclip:MODEL/TAG or a folder is right")
    parts = build_clip(str(MINI_CLIP) if name == "mini-clip" else bare, lambda: [], Path())
    clip: Any = parts.model
    with torch.no_grad():
        width = int(clip.encode_text(parts.tokenizer(["a"])).shape[1])
    if width != encoder.joint_width:
        raise ConfigError(
            f"--encoder {source} has joint width {encoder.joint_width}, text tower {name} has {width}: they belong to different spaces"
        )
    network: Any = encoder.network
    args = dict(encoder.config.model_args or {})
    entry = own_entry(encoder.config.architecture, args)
    vision = {
        "image_size": encoder.spec.size,
        "timm_model_name": entry["name"] if entry else encoder.config.architecture,
        "timm_pool": network.global_pool,
        "timm_proj": "none" if args.get("num_classes") == 0 else "",  # attention pooling itself ends in the joint space
    }
    with quiet_open_clip():
        visual = TimmModel(vision["timm_model_name"], width, encoder.spec.size, vision["timm_pool"], vision["timm_proj"])
    load_strict(visual.trunk, network.state_dict(), source)
    clip.visual = visual
    config = {**parts.model_config, "embed_dim": width, "vision_cfg": vision}
    return ClipParts(clip, parts.tokenizer, config, encoder.spec, source, name, encoder.config, entry)


def spec_of(clip: nn.Module) -> ImageSpec:
    """Read the picture preparation that open_clip attached to a model."""
    preprocess: dict[str, Any] = open_clip.get_model_preprocess_cfg(clip)
    size = preprocess["size"]
    height, width = (size, size) if isinstance(size, int) else size
    if height != width:
        raise ConfigError(f"the model takes pictures of {height} x {width} pixels; only square ones are supported")
    resize = {"shortest": "crop", "squash": "squash", "longest": "pad"}[preprocess.get("resize_mode", "shortest")]
    return ImageSpec(int(height), tuple(preprocess["mean"]), tuple(preprocess["std"]), preprocess.get("interpolation", "bicubic"), resize)  # type: ignore[arg-type]


def export_clip(folder: Path, parts: ClipParts, about: dict[str, Any], half: bool = True) -> None:
    """Write a model as open_clip loads it: `open_clip.create_model_and_transforms("local-dir:FOLDER")` (after `import encoders`).

    Args:
        folder: Where to; it exists.
        parts: The model and what belongs to it.
        about: What goes under "mmkit" in the configuration: training, prompts, figures.
        half: Weights in float16, half the bytes; they are float32 again once loaded.
    """
    mode = {"crop": "shortest", "squash": "squash", "pad": "longest"}[parts.spec.resize]
    spec = parts.spec
    preprocess = {
        "size": [spec.size, spec.size], "mode": "RGB", "mean": list(spec.mean), "std": list(spec.std),
        "interpolation": spec.interpolation, "resize_mode": mode, "fill_color": 0,
    }  # fmt: skip
    if parts.entry:
        about = {**about, "timm_entry": parts.entry}
        atomic_write(folder / ENTRY_FILE, entry_script(**parts.entry))
    content = {"model_cfg": parts.model_config, "preprocess_cfg": preprocess, "mmkit": about}
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in parts.model.state_dict().items()}
    if half:
        # The temperature stays exact: float16 would move it by up to a thousandth, for two bytes.
        state = {name: tensor.half() if tensor.dtype == torch.float32 and tensor.numel() > 1 else tensor for name, tensor in state.items()}
    save_weights(state, folder / WEIGHTS_NAME)
    own = getattr(parts.tokenizer, "tokenizer", None)
    if isinstance(own, PreTrainedTokenizerBase):
        own.save_pretrained(str(folder))
    atomic_write(folder / CONFIG_NAME, json.dumps(content, indent=1) + "\n")
