"""Weights from one form into another: official checkpoints into encoder folders, encoder folders into open_clip and timm, other sizes.

    mmkit convert uta CKPT OUT --model uta_b16                 the authors' weights -> image and text tower, ready for `mmkit eval zeroshot`
    mmkit convert eva CKPT OUT --model eva_vit_g               EVA-CLIP's towers, and LAVIS's eva_vit_g.pth
    mmkit convert open-clip ENCODER OUT                        open_clip.create_model("local-dir:OUT")
    mmkit convert timm ENCODER OUT                             timm.create_model("local-dir:OUT", pretrained=True)
    mmkit convert resize ENCODER OUT --patch_size 16 --image_size 224 --method pi

Nothing is resampled, skipped or renamed without a word; OUT is whole or absent.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # started as a file: its folder is on sys.path, the packages' folder is not
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from encoders.catalog import describe, export_timm, load_encoder
from encoders.modeling import VisionEncoder
from encoders.official import EVA_MODELS, UTA_MODELS, OfficialModel, image_tower, read_checkpoint, text_tower
from encoders.open_clip_export import export_open_clip
from encoders.resize import METHODS, resize_encoder
from encoders.text import load_text_tower
from encoders.text_folder import CLIP_VOCABULARY, IN_THIS_FOLDER, TEXT_CONFIG, TEXT_FOLDER, TextOnly, write_text_folder
from mmkit.checkpoint import atomic_folder
from mmkit.config import cli_entry
from mmkit.errors import ConfigError, DataError, NameNotFound, find

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


# ---- official checkpoints ----------------------------------------------------------------------------------------------------------------


def uta(argv: Sequence[str] | None = None) -> Path:
    """Convert a released UTA checkpoint: image tower, text tower, one folder."""
    return _official(argv, "uta", UTA_MODELS, "eva02_base_patch14_224")


def eva(argv: Sequence[str] | None = None) -> Path:
    """Convert an EVA-CLIP checkpoint or LAVIS's eva_vit_g.pth; the text tower comes along where the file has one."""
    return _official(argv, "eva", EVA_MODELS, "eva_giant_patch14_clip_224")


def _official(argv: Sequence[str] | None, family: str, table: Mapping[str, OfficialModel], base: str) -> Path:
    parser = _parser(f"convert {family}", f"a checkpoint of {family.upper()} -> an encoder folder", "CKPT")
    parser.add_argument("--model", default="", help="; ".join(f"{name}: {row.note}" for name, row in table.items()).replace("%", "%%"))
    parser.add_argument("--architecture", default=base, help=f"timm entry that --model_args is for; default {base}")
    parser.add_argument(
        "--model_args", default="", metavar="JSON", help='other sizes: timm\'s arguments, {"img_size": 56, "depth": 3, ...}'
    )
    parser.add_argument(
        "--text_args", default="", metavar="JSON", help='text tower: {"width": 512, "heads": 8, "layers": 12, "context_length": 77, ...}'
    )
    parser.add_argument("--dtype", default="float32", choices=list(DTYPES), help="type of the written weights")
    args = parser.parse_args(argv)
    model = _model_of(args, family, table)
    out = _free(args)
    file = read_checkpoint(Path(args.source))
    name = args.model or f"{args.architecture} {args.model_args}".strip()
    encoder = image_tower(file, model, name)
    encoder.config.training = {"objective": "uta" if family == "uta" else "eva", "checkpoint": Path(args.source).name}
    text = None
    if file.text and encoder.joint_width and model.text_args is not None:
        text = text_tower(file, model.text_args, encoder.joint_width)
    elif file.text:
        raise ConfigError(
            f"{args.source} has a text tower ({len(file.text)} tensors); say its sizes: --text_args JSON, as open_clip's text_cfg"
        )
    elif family == "uta":
        raise DataError(f"{args.source} has no text tower (text.*); a released UTA checkpoint has one")
    encoder.to(DTYPES[args.dtype])
    with atomic_folder(out, overwrite=args.overwrite) as folder:
        write_encoder(encoder, folder)
        if text is not None and model.text_args is not None and encoder.joint_width:
            write_text_folder(folder / TEXT_FOLDER, text.to(DTYPES[args.dtype]), model.text_args, encoder.joint_width, file.source)
            write_encoder_config(encoder, folder, IN_THIS_FOLDER)
    for note in file.notes:
        print(f"note: {note}")
    if text is not None:
        _say_of_text(text, model.text_args or {})
    return _done(encoder, out, ready=text is not None)


def _model_of(args: argparse.Namespace, family: str, table: Mapping[str, OfficialModel]) -> OfficialModel:
    """Take the row of --model, or one made of --model_args and --text_args, which also change a row."""
    sizes, text = _json_table(args.model_args, "--model_args"), _json_table(args.text_args, "--text_args")
    if args.model:
        row = find(f"{family.upper()} model", table, args.model)
    elif args.model_args:
        row = OfficialModel(args.architecture)
    else:
        raise ConfigError(f"say what the file holds: --model {' | '.join(table)}, or --model_args JSON for other sizes")
    changed = row.model_args | sizes
    return OfficialModel(row.architecture, changed, {**(row.text_args or {}), **text} if text else row.text_args, row.joint_width, row.note)


def _say_of_text(text: TextOnly, text_args: Mapping[str, Any]) -> None:
    millions = sum(parameter.numel() for parameter in text.parameters()) / 1e6
    print(f"text tower: {text_args['layers']} layers, width {text_args['width']}, {millions:.1f} M parameters")
    if text_args.get("vocab_size", CLIP_VOCABULARY) != CLIP_VOCABULARY:
        print(f"note: its vocabulary has {text_args['vocab_size']} entries, CLIP's tokenizer {CLIP_VOCABULARY}: it takes ids, not words")


# ---- encoder folders ---------------------------------------------------------------------------------------------------------------------


def open_clip(argv: Sequence[str] | None = None) -> Path:
    """Write an encoder and its text tower as an open_clip model."""
    parser = _parser("convert open-clip", "an encoder and the text tower of its space -> an open_clip folder", "ENCODER")
    parser.add_argument("--text_tower", default="", help="mini-clip, openclip:MODEL/TAG or a folder; default: the one the encoder names")
    args = parser.parse_args(argv)
    out = _free(args)
    encoder = load_encoder(args.source)
    tower = load_text_tower(args.text_tower or encoder.config.text_tower or "")
    with atomic_folder(out, overwrite=args.overwrite) as folder:
        export_open_clip(encoder, tower, folder)
    _done(encoder, out, ready=False)
    line = f'model, _, transform = open_clip.create_model_and_transforms("local-dir:{out}")'
    first = f'exec(open("{out}/timm_entry.py").read()); ' if (out / "timm_entry.py").is_file() else ""
    print(f"in open_clip: {first}{line}\nhere:         mmkit eval zeroshot --encoder openclip:{out} --images FOLDER --out FOLDER")
    return out


def plain_timm(argv: Sequence[str] | None = None) -> Path:
    """Write an encoder's network as a plain timm checkpoint."""
    args = _parser("convert timm", "an encoder -> a timm folder (config.json, model.safetensors)", "ENCODER").parse_args(argv)
    out = _free(args)
    encoder = load_encoder(args.source)
    with atomic_folder(out, overwrite=args.overwrite) as folder:
        export_timm(encoder, folder)
    _done(encoder, out, ready=False)
    print(f'in timm: timm.create_model("local-dir:{out}", pretrained=True)')
    return out


def resize(argv: Sequence[str] | None = None) -> Path:
    """Change an encoder's patch or image size."""
    parser = _parser("convert resize", "an encoder -> the same at another patch or image size", "ENCODER")
    parser.add_argument("--patch_size", type=int, default=None, help="pixels; default: as it is")
    parser.add_argument("--image_size", type=int, default=None, help="pixels; default: as it is")
    parser.add_argument(
        "--method",
        choices=METHODS,
        default="pi",
        help="pi: keeps the response to a resized patch; bicubic: as EVA's script does (no antialias)",
    )
    args = parser.parse_args(argv)
    out = _free(args)
    source = load_encoder(args.source)
    encoder = resize_encoder(source, args.patch_size, args.image_size, args.method)
    own_text = Path(args.source) / TEXT_FOLDER
    with atomic_folder(out, overwrite=args.overwrite) as folder:
        write_encoder(encoder, folder)
        if (own_text / TEXT_CONFIG).is_file():
            shutil.copytree(own_text, folder / TEXT_FOLDER)
            write_encoder_config(encoder, folder, IN_THIS_FOLDER)
    old = source.grid
    print(f"{old[0]} x {old[1]} patches -> {encoder.grid[0]} x {encoder.grid[1]}, {args.method}; the weights were not trained at this size")
    return _done(encoder, out, ready=encoder.config.text_tower is not None)


def write_encoder(encoder: VisionEncoder, folder: Path) -> None:
    """Write an encoder folder: weights, configuration, image processor, and the file that loads them without this kit."""
    encoder.save_pretrained(str(folder))
    for weights in folder.glob("*.safetensors"):  # safetensors makes files that only their owner can read
        weights.chmod((folder / "config.json").stat().st_mode)
    encoder.spec.image_processor().save_pretrained(str(folder))


def write_encoder_config(encoder: VisionEncoder, folder: Path, text_tower_name: str) -> None:
    """Name the text tower in a folder that `write_encoder` has written."""
    encoder.config.text_tower = text_tower_name
    encoder.config.save_pretrained(str(folder))


# ---- what the commands share -------------------------------------------------------------------------------------------------------------


def _parser(name: str, description: str, source: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"mmkit {name}", description=description)
    parser.add_argument(
        "source", metavar=source, help="the file" if source == "CKPT" else "an encoder folder, or a name of `mmkit list encoders`"
    )
    parser.add_argument("out", metavar="OUT", help="the folder to write; whole or absent")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    return parser


def _free(args: argparse.Namespace) -> Path:
    """Refuse an OUT that exists before anything is loaded."""
    out = Path(args.out)
    if out.exists() and not args.overwrite:
        raise ConfigError(f"{out} exists already; name another folder, or add --overwrite")
    return out


def _json_table(text: str, flag: str) -> dict[str, Any]:
    if not text:
        return {}
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{flag} {text}: no valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{flag} {text}: a JSON object is right, as in {flag} '{{\"width\": 512}}'")
    return value


def _done(encoder: VisionEncoder, out: Path, ready: bool) -> Path:
    millions = sum(parameter.numel() for parameter in encoder.parameters()) / 1e6
    print(f"{out}: {describe(encoder)}; {millions:.1f} M parameters")
    if ready:
        print(f"next: mmkit eval zeroshot --encoder {out} --images FOLDER_OF_CLASS_FOLDERS --out RESULTS")
    return out


CONVERSIONS: dict[str, Callable[[Sequence[str] | None], Path]] = {
    "uta": uta,
    "eva": eva,
    "open-clip": open_clip,
    "timm": plain_timm,
    "resize": resize,
}


def main(argv: Sequence[str] | None = None) -> Path:
    """Run the conversion that the first word names.

    Raises:
        NameNotFound: There is none of this name.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words:
        raise NameNotFound(f"name a conversion: {', '.join(CONVERSIONS)}")
    return find("conversion", CONVERSIONS, words[0])(words[1:])


if __name__ == "__main__":
    cli_entry(main)
