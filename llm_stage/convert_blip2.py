"""BLIP-2 out of LAVIS's checkpoints and out of transformers' folders, into transformers' folders, and with another encoder.

    mmkit convert lavis-blip2 blip2_pretrained.pth OUT --encoder EVA_VIT_G [--tokenizer bert-base-uncased]       stage 1: a Q-Former folder
    mmkit convert lavis-blip2 blip2_pretrained_opt2.7b.pth OUT --encoder EVA_VIT_G --llm facebook/opt-2.7b       stage 2: a BLIP-2 folder
    mmkit convert blip2-from-hf blip2-opt-2.7b/ OUT            the language model is written beside it, in OUT/llm, unless --llm names it
    mmkit convert blip2-to-hf RUN/model OUT                    for EVA towers, the only kind transformers' BLIP-2 has
    mmkit convert blip2-swap RUN/model OUT --encoder NEW       the same architecture with other weights (ViSFT's way); nothing is trained

Source: salesforce/LAVIS (checkpoints), transformers (modeling_blip_2.py), ViSFT, section 4 (swap).
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2Processor,
)

from encoders.vision_towers import load_tower
from llm_stage.blip2 import Blip2, load_trained
from llm_stage.blip2_folder import Blip2Card, Blip2Parts, is_blip2, load_blip2, save_blip2
from llm_stage.blip2_hf import (
    SIDE_FILE,
    SIDE_KEYS,
    blocks_read,
    eva_tower,
    hf_config,
    qformer_config,
    squashed,
    vision_from_hf,
    vision_to_hf,
)
from llm_stage.blip2_text import TextFormat
from llm_stage.lavis import config_of, from_lavis
from llm_stage.llms import load_any_llm
from llm_stage.qformer import QFormer, QFormerConfig
from llm_stage.qformer_folder import QFormerCard, QFormerParts, load_frozen_encoder, load_qformer, save_qformer
from llm_stage.qformer_text import QFormerTokenizer
from mmkit.checkpoint import atomic_folder, load_strict, load_weights
from mmkit.config import cli_entry
from mmkit.errors import ConfigError, DataError
from mmkit.trainable import freeze

BERT = "bert-base-uncased"


def _parser(name: str, about: str, source: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"mmkit convert {name}", description=about)
    parser.add_argument("source", metavar=source)
    parser.add_argument("out", metavar="OUT", help="the folder to write; whole or absent")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    return parser


def _free(args: argparse.Namespace) -> Path:
    out = Path(args.out)
    if out.exists() and not args.overwrite:
        raise ConfigError(f"{out} exists already; name another folder, or add --overwrite")
    return out


# ---- LAVIS ---------------------------------------------------------------------------------------------------------------------------


def lavis(argv: Sequence[str] | None = None) -> Path:
    """Convert a checkpoint of LAVIS: stage 1 into a Q-Former folder, stage 2 into a BLIP-2 folder.

    Raises:
        ConfigError: OUT exists, or a setting is missing.
        DataError: The file is no such checkpoint, or does not fit the encoder or the language model.
    """
    parser = _parser("lavis-blip2", "a checkpoint of LAVIS -> a Q-Former folder (stage 1) or a BLIP-2 folder (stage 2)", "CKPT")
    parser.add_argument(
        "--encoder", default="", help="the encoder it was trained behind (eva_vit_g.pth by `convert eva`), if not in the file"
    )
    parser.add_argument("--feature_layer", type=int, default=-2, help="its hidden state that is read; -2: 39 of EVA-ViT-G's 40 blocks")
    parser.add_argument("--tokenizer", default=BERT, help=f"stage 1: name or folder; default {BERT}")
    parser.add_argument("--llm", default="", help="stage 2: its language model, by name or folder")
    parser.add_argument(
        "--config", default="{}", metavar="JSON", help='what weights do not say: {"heads": 12, "encoder_heads": 16}, and other ids'
    )
    args = parser.parse_args(argv)
    out, sizes = _free(args), _sizes(args.config)
    loaded: Mapping[str, Any] = load_weights(Path(args.source))
    state: dict[str, Tensor] = dict(loaded.get("model", loaded))
    encoder, layer = _lavis_encoder(state, args, sizes.pop("encoder_heads", 16))
    own = from_lavis(state, args.source)
    if width := _other_width(own, encoder):
        raise DataError(
            f"{args.source} reads tokens of width {width[0]}, {args.encoder} gives {width[1]}: name the encoder it was trained behind"
        )
    projection = next((name for name in ("opt_proj", "t5_proj") if f"{name}.weight" in state), "")
    training = {"checkpoint": Path(args.source).name}
    card = QFormerCard(args.encoder or f"{Path(args.source).name} (its own)", "", layer, "train", training=training)
    if projection:
        return _lavis_stage2(own, state, projection, encoder, card, sizes, args, out)
    tokenizer = QFormerTokenizer.load(args.tokenizer, card.max_tokens)
    config = config_of(own, **{**tokenizer.special, **sizes})
    if len(tokenizer) != config.vocabulary:
        raise DataError(
            f"{args.source} has {config.vocabulary} words, the tokenizer {args.tokenizer} {len(tokenizer)} with [DEC]: another one?"
        )
    model = QFormer(config)
    load_strict(model, own, args.source)
    save_qformer(QFormerParts(encoder, model.eval(), tokenizer, card), out, overwrite=args.overwrite)
    print(f"{out}: a Q-Former of {config.queries} queries behind {card.encoder}, hidden state {layer}")
    return out


def _sizes(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"--config {text}: no valid JSON ({error})") from error
    if not isinstance(found, dict) or not all(isinstance(value, int) for value in found.values()):
        raise ConfigError(f"--config {text}: whole numbers by name are right, as in --config '{{\"heads\": 12}}'")
    return found


def _lavis_encoder(state: Mapping[str, Tensor], args: argparse.Namespace, heads: int) -> tuple[nn.Module, int]:
    """The encoder in the file (tuned checkpoints have their own), or the one that was named; and the hidden state to read."""
    own = {key.removeprefix("visual_encoder."): tensor.float() for key, tensor in state.items() if key.startswith("visual_encoder.")}
    if own and args.encoder:
        raise ConfigError(f"{args.source} brings its own encoder (the *_coco checkpoints were tuned with theirs): leave --encoder out")
    if own:
        encoder = eva_tower(own, heads, args.source)
        encoder.config.image_spec = squashed(encoder.spec.size)
        return freeze(encoder), -1
    if not args.encoder:
        raise ConfigError(
            f"{args.source} holds no encoder: name the one it was trained behind, --encoder FOLDER (mmkit convert eva eva_vit_g.pth ...)"
        )
    return load_frozen_encoder(args.encoder, args.feature_layer), args.feature_layer


def _other_width(own: Mapping[str, Tensor], encoder: nn.Module) -> tuple[int, int] | None:
    config: Any = encoder.config
    found = int(own["ln_vision.weight"].shape[0]) if "ln_vision.weight" in own else 0
    return (found, int(config.hidden_size)) if found != int(config.hidden_size) else None


def _lavis_stage2(
    own: dict[str, Tensor], state: Mapping[str, Tensor], projection: str, encoder: nn.Module, card: QFormerCard, sizes: dict[str, Any],
    args: argparse.Namespace, out: Path,
) -> Path:  # fmt: skip
    """The second stage: the queries' path and its projection, in front of a language model that is named."""
    if not args.llm:
        raise ConfigError(
            f"{args.source} is of the second stage ({projection}): name its language model, --llm facebook/opt-2.7b for example"
        )
    llm, tokenizer = load_any_llm(args.llm)
    text = TextFormat(tokenizer, bool(llm.config.is_encoder_decoder), max_tokens=32)
    model = Blip2(_path_config(own, sizes), llm)
    trained = {key: tensor for key, tensor in own.items() if key in model.trained_state()}
    trained |= {f"language_projection.{kind}": state[f"{projection}.{kind}"] for kind in ("weight", "bias")}
    if trained["language_projection.weight"].shape != model.language_projection.weight.shape:
        raise DataError(
            f"{args.source} projects to width {trained['language_projection.weight'].shape[0]}, {args.llm} has "
            f"{model.language_projection.out_features}: another language model belongs to it"
        )
    load_trained(model, {key: tensor.float() for key, tensor in trained.items()}, args.source)
    prompt = "Question: {} Short answer:"
    made = Blip2Card(card.encoder, args.llm, feature_layer=card.feature_layer, max_tokens=32, prompt=prompt, training=card.training)
    save_blip2(Blip2Parts(encoder, model.eval(), text, made), out, overwrite=args.overwrite)
    print(f"{out}: BLIP-2, {model.config.queries} queries between {card.encoder} and {args.llm}")
    return out


def _path_config(own: Mapping[str, Tensor], sizes: Mapping[str, int]) -> QFormerConfig:
    """The shape of a Q-Former that has its queries' path alone: what it lacks keeps its default."""
    body = {key: tensor for key, tensor in own.items() if key.startswith(("qformer.", "ln_vision", "query_tokens"))}
    words = torch.empty(2, own["query_tokens"].shape[-1])
    filled = {"embeddings.word_embeddings.weight": words, "embeddings.position_embeddings.weight": words, "vision_projection.weight": words}
    found = config_of({**filled, **body}, pad=0, cls=0, sep=0, dec=0, **{key: value for key, value in sizes.items() if key == "heads"})
    default = QFormerConfig(1)
    return replace(
        found, vocabulary=default.vocabulary, positions=default.positions, joint_width=default.joint_width, cls=default.cls, sep=default.sep,
        dec=default.dec,
    )  # fmt: skip


# ---- transformers --------------------------------------------------------------------------------------------------------------------


def from_hf(argv: Sequence[str] | None = None) -> Path:
    """Convert a BLIP-2 folder of transformers: with a language model into a BLIP-2 folder, for retrieval into a Q-Former folder.

    Raises:
        ConfigError: OUT exists, or the folder is no BLIP-2.
        DataError: Weights are missing, or have no place here.
    """
    parser = _parser(
        "blip2-from-hf", "a BLIP-2 folder of transformers -> a BLIP-2 folder, or a Q-Former folder (image-text retrieval)", "FOLDER"
    )
    parser.add_argument("--llm", default="", help="the language model, by name; default: the folder's own, written to OUT/llm")
    args = parser.parse_args(argv)
    out, source = _free(args), Path(args.source)
    file = source / "config.json"
    if not file.is_file() or json.loads(file.read_text(encoding="utf-8")).get("model_type") != "blip-2":
        raise ConfigError(f"{source} is no BLIP-2 folder of transformers: {file.name} should be there and say model_type blip-2")
    config: Any = Blip2Config.from_pretrained(source)
    retrieval = any("Retrieval" in name for name in config.architectures or [])
    kind: Any = Blip2ForImageTextRetrieval if retrieval else Blip2ForConditionalGeneration
    model, info = kind.from_pretrained(source, output_loading_info=True, dtype=torch.float32)
    if lost := sorted(map(str, info["missing_keys"])):
        raise DataError(f"{source}: {len(lost)} weights are missing, such as {lost[0]}; is it a BLIP-2, and whole?")
    state = {key: tensor for key, tensor in model.state_dict().items() if not key.startswith("language_model.")}
    tower = {key.removeprefix("vision_model."): value for key, value in state.items() if key.startswith("vision_model.")}
    own = {key: value for key, value in state.items() if not key.startswith("vision_model.")}
    own |= {f"ln_vision.{kind}": tower.pop(f"post_layernorm.{kind}") for kind in ("weight", "bias")}
    encoder = vision_from_hf(tower, config.vision_config, str(source))
    encoder.config.image_spec = squashed(encoder.spec.size)
    training = {"folder": source.name}
    if retrieval:
        return _retrieval_from_hf(source, config, own, encoder, training, args, out)
    name = args.llm or str(out / "llm")
    card = Blip2Card(str(source), name, feature_layer=-1, max_tokens=32, training=training)
    shape = qformer_config(config, {})
    tokenizer = AutoTokenizer.from_pretrained(source)
    with atomic_folder(out, overwrite=args.overwrite) as work:
        if args.llm:
            llm, tokenizer = load_any_llm(args.llm)
        else:
            llm = model.language_model
            llm.save_pretrained(work / "llm")
            tokenizer.save_pretrained(work / "llm")
            card = replace(card, llm=str(work / "llm"))
        blip2 = Blip2(shape, llm)
        load_trained(blip2, own, str(source))
        parts = Blip2Parts(freeze(encoder), blip2, TextFormat(tokenizer, blip2.writes_apart, max_tokens=32), card)
        save_blip2(parts, work / "blip2")
        for path in (work / "blip2").iterdir():
            path.rename(work / path.name)
        (work / "blip2").rmdir()
        if not args.llm:
            content = json.loads((work / "blip2.json").read_text(encoding="utf-8"))
            (work / "blip2.json").write_text(json.dumps({**content, "llm": name, "llm_folder": "llm"}, indent=1) + "\n", encoding="utf-8")
    print(f"{out}: BLIP-2, {shape.queries} queries, language model {name}")
    return out


def _retrieval_from_hf(
    source: Path, config: Any, own: dict[str, Tensor], encoder: nn.Module, training: dict[str, Any], args: argparse.Namespace, out: Path
) -> Path:
    """Transformers' `Blip2ForImageTextRetrieval` as a Q-Former folder; what it lacks comes from the file beside it, or begins anew."""
    tokenizer = QFormerTokenizer.load(str(source))
    shape = qformer_config(config, tokenizer.special)
    model = QFormer(shape)
    side = source / SIDE_FILE
    kept = load_file(side) if side.is_file() else {key: value for key, value in model.state_dict().items() if SIDE_KEYS.match(key)}
    if not side.is_file():
        print(
            f"note: {source} has no {SIDE_FILE}: temperature and language head begin anew; captions from it mean nothing until it is trained"
        )
    load_strict(model, {**own, **kept}, str(source))
    card = QFormerCard(str(source), "", -1, "train", training=training)
    save_qformer(QFormerParts(freeze(encoder), model.eval(), tokenizer, card), out, overwrite=args.overwrite)
    print(f"{out}: a Q-Former of {shape.queries} queries")
    return out


def to_hf(argv: Sequence[str] | None = None) -> Path:
    """Convert a BLIP-2 or Q-Former folder into one of transformers.

    Raises:
        ConfigError: OUT exists, or its encoder or its form of prompts has no place there.
    """
    parser = _parser("blip2-to-hf", "a BLIP-2 or Q-Former folder -> a folder of transformers, where the encoder is an EVA tower", "FOLDER")
    args = parser.parse_args(argv)
    out = _free(args)
    parts: Any = load_blip2(args.source) if is_blip2(args.source) else load_qformer(args.source)
    tower, vision, dropped = vision_to_hf(parts.encoder, parts.card.feature_layer)
    if dropped:
        print(f"left out, as BLIP-2 does: {', '.join(dropped)}")
    images = parts.spec.image_processor()
    if isinstance(parts, Blip2Parts):
        model, processor = _generating(parts, vision, images)
    else:
        config = hf_config(parts.qformer.config, vision, None, with_words=True)
        model = Blip2ForImageTextRetrieval(config).eval()
        processor = Blip2Processor(images, parts.tokenizer.tokenizer, num_query_tokens=config.num_query_tokens)
    own = parts.model.trained_state() if isinstance(parts, Blip2Parts) else parts.qformer.state_dict()
    side = {key: tensor for key, tensor in own.items() if SIDE_KEYS.match(key)}
    state = {key: tensor for key, tensor in own.items() if key not in side and not key.startswith("ln_vision.")}
    state |= {f"vision_model.{key}": tensor for key, tensor in tower.items()}
    state |= {f"vision_model.post_layernorm.{kind}": own[f"ln_vision.{kind}"] for kind in ("weight", "bias")}
    state |= {key: tensor for key, tensor in model.state_dict().items() if key.startswith("language_model.")}
    load_strict(model, state, args.source)
    with atomic_folder(out, overwrite=args.overwrite) as work:
        model.save_pretrained(work)
        processor.save_pretrained(work)
        if side:
            save_file({key: tensor.contiguous() for key, tensor in side.items()}, str(work / SIDE_FILE))
    print(f"{out}: {type(model).__name__}; note: transformers runs the vision norm with eps 1e-6, this kit (as LAVIS) with 1e-5")
    return out


def _generating(parts: Blip2Parts, vision: Any, images: Any) -> tuple[Any, Any]:
    """Transformers' model around our language model, with a placeholder for the image in its vocabulary; and the processor."""
    if parts.card.lead:
        raise ConfigError(f"this BLIP-2 has {parts.card.lead!r} in front of the image; transformers' puts the image first")
    processor = Blip2Processor(images, parts.text.tokenizer, num_query_tokens=parts.model.config.queries)
    llm = parts.model.language_model
    token = int(processor.tokenizer.convert_tokens_to_ids("<image>"))
    if token >= llm.get_input_embeddings().weight.shape[0]:
        llm.resize_token_embeddings(token + 1, mean_resizing=False)
    config = hf_config(parts.model.config, vision, llm.config, with_words=False)
    config.image_token_index = token
    model = Blip2ForConditionalGeneration(config).eval()
    model.language_model = llm
    return model, processor


# ---- swap ----------------------------------------------------------------------------------------------------------------------------


def swap(argv: Sequence[str] | None = None) -> Path:
    """Put other weights of the same architecture behind a finished Q-Former, or BLIP-2; nothing is trained.

    Raises:
        ConfigError: OUT exists.
        DataError: The encoders are of different architecture; both are described.
    """
    parser = _parser(
        "blip2-swap", "another encoder of the same architecture behind a finished Q-Former or BLIP-2, nothing trained", "FOLDER"
    )
    parser.add_argument("--encoder", required=True, help="the new encoder: folder or name")
    args = parser.parse_args(argv)
    out = _free(args)
    parts: Any = load_blip2(args.source) if is_blip2(args.source) else load_qformer(args.source)
    new = freeze(load_tower(args.encoder))
    layer = same_architecture(parts.encoder, new, parts.card.feature_layer, args.source, args.encoder)
    drift = token_drift(parts.encoder, new, parts.card.feature_layer, layer)
    parts.encoder = new
    parts.card = replace(
        parts.card, encoder=args.encoder, mode="swap", feature_layer=layer, training={**parts.card.training, "drift": drift}
    )
    save: Any = save_blip2 if isinstance(parts, Blip2Parts) else save_qformer
    save(parts, out, overwrite=args.overwrite)
    print(
        f"{out}: {args.encoder} in place of {args.source}'s encoder; mean cosine of their tokens on noise {drift:.4f}\n"
        "note: a swap says whether the Q-Former can still read the features; it favours small changes and does not rank encoders"
    )
    return out


def same_architecture(old: nn.Module, new: nn.Module, layer: int, source: str, name: str) -> int:
    """Compare the blocks that are read; what stands behind them (EVA-ViT-G's 40th block, final norm, head) may be there or not.

    Returns:
        The hidden state of the new one that is read.

    Raises:
        DataError: A weight is missing, of another shape, or not known.
    """
    read = blocks_read(old, layer)
    mine, theirs = (_read_part(encoder, read) for encoder in (old, new))
    if mine != theirs:
        key = next(key for key in [*mine, *theirs] if mine.get(key) != theirs.get(key))
        raise DataError(
            f"{name} is not of the architecture that {source} was made for: {key} is {theirs.get(key, 'not there')} there, {mine.get(key, 'not there')} "
            "here. A swap takes other weights of the same network; for another network calibrate or train a Q-Former (mmkit train qformer)"
        )
    spec_old, spec_new = old.spec, new.spec
    if spec_old != spec_new:
        print(f"note: images are prepared as the new encoder wants them: {spec_new}; before: {spec_old}")
    return read


def _read_part(encoder: nn.Module, blocks: int) -> dict[str, list[int]]:
    found = {}
    for key, tensor in encoder.state_dict().items():
        inner = key.removeprefix("network.")
        behind = inner.startswith(("norm.", "head.", "fc_norm.", "attn_pool.")) or (
            inner.startswith("blocks.") and int(inner.split(".")[1]) >= blocks
        )
        if not behind:
            found[inner] = list(tensor.shape)
    return found


@torch.no_grad()
def token_drift(old: Any, new: Any, layer: int, new_layer: int, count: int = 4) -> float:
    """Mean cosine between the tokens of two encoders on noise images: 1 where nothing changed."""
    size = int(old.spec.size)
    images = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))
    states = [encoder(images, output_hidden_states=[at]).hidden_states[at] for encoder, at in ((old, layer), (new, new_layer))]
    return round(float(nn.functional.cosine_similarity(states[0], states[1], dim=-1).mean()), 6)


if __name__ == "__main__":
    cli_entry(lavis)
