"""ViSFT's released files into folders of this kit, of transformers' BLIP-2, and back.

    mmkit convert visft-lora eva_g_lora_5000.pt --encoder EVA_G --out OUT             merged: an ordinary encoder folder
    mmkit convert visft-lora RUN/adapter --encoder BLIP2_FOLDER --into blip2 --out OUT    transformers' folder, its image tower changed
    mmkit convert visft-lora eva_g_lora_5000.pt --encoder EVA_G --into adapter --out OUT  an adapter folder for this encoder
    mmkit convert visft-lora RUN/adapter --into official --out lora.pt                the authors' flat file
    mmkit convert visft-heads eva_g_detection_heads.ckpt --out OUT

The merge is in float32 and written in the source's own types. OUT is whole or absent.

Source: TencentARC/ViSFT (files), LAVIS (`eva_vit.py`: BLIP-2 runs 39 of EVA-ViT-G's 40 blocks).
"""

import argparse
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from encoders.catalog import describe, load_encoder
from encoders.convert import write_encoder, write_encoder_config
from encoders.heads.official import RULES, read_official_head
from encoders.heads.registry import save_head
from encoders.lora import LoraSettings, add_delta, add_lora
from encoders.lora_files import LoraFile, delta_weight, read_lora, write_official
from encoders.modeling import VisionEncoder
from encoders.text_folder import IN_THIS_FOLDER, TEXT_CONFIG, TEXT_FOLDER
from mmkit.checkpoint import atomic_folder
from mmkit.errors import ConfigError, DataError

BLIP2_QKV = re.compile(r"(?:.*\.)?vision_model\.encoder\.layers\.(\d+)\.self_attn\.qkv\.weight")
TARGETS = ("encoder", "blip2", "adapter", "official")


def lora(argv: Sequence[str] | None = None) -> Path:
    """Merge LoRA into an encoder or a BLIP-2 folder, or write it in another form.

    Raises:
        ConfigError: OUT exists, or a setting is missing.
        DataError: The file is damaged or does not fit; both sides are named.
    """
    parser = argparse.ArgumentParser(prog="mmkit convert visft-lora", description="ViSFT's LoRA -> encoder, BLIP-2, adapter, authors' file")
    parser.add_argument("source", metavar="LORA", help="an adapter folder, or a flat file of the authors' (.pt, .safetensors)")
    parser.add_argument("--encoder", default="", help="encoder folder or name; with --into blip2, a folder of transformers' BLIP-2")
    parser.add_argument("--out", required=True, help="the folder to write (a file with --into official); whole or absent")
    parser.add_argument("--into", choices=TARGETS, default="encoder", help="what to write; default: the encoder with LoRA merged in")
    parser.add_argument(
        "--alpha", type=float, default=None, help="scaling is alpha / rank; default: the adapter's, 1 for the authors' files"
    )
    parser.add_argument("--any_base", action="store_true", help="take an encoder that the adapter was not trained on")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    args = parser.parse_args(argv)
    out = _free(args)
    file = read_lora(args.source)
    settings = LoraSettings(file.rank, file.alpha if args.alpha is None else args.alpha)
    if args.into == "official":
        print(f"{out}: {file.depth} blocks, width {file.width}, rank {file.rank}; their code has alpha 1, this LoRA {settings.alpha:g}")
        return write_official(file.state, out)
    if not args.encoder:
        raise ConfigError(f"--into {args.into} needs --encoder: the weights that the LoRA belongs to")
    if args.into == "blip2":
        return into_blip2(file, settings, Path(args.encoder), out, args.overwrite)
    encoder = load_encoder(args.encoder)
    adapter = add_lora(encoder, settings)
    adapter.load(file.state, file.source)
    if file.base and file.base != adapter.base_hash() and not args.any_base:
        trained_on = file.about.get("source") or "another encoder"
        raise DataError(
            f"{file.source} was trained on {trained_on} (hash {file.base[:12]}); {args.encoder} has other weights "
            f"({adapter.base_hash()[:12]}). Name that encoder, or say --any_base"
        )
    changed = sum(adapter.change()) / file.depth
    print(
        f"LoRA of rank {file.rank}, alpha {settings.alpha:g}: |dW| / |W| of q and v is {100 * changed:.3g} % on average over {file.depth} blocks"
    )
    if args.into == "adapter":
        return adapter.save(out)
    adapter.merge()
    _write_merged(encoder, args.encoder, file, settings, out, args.overwrite)
    print(f"{out}: {describe(encoder)}")
    return out


def _write_merged(encoder: VisionEncoder, source: str, file: LoraFile, settings: LoraSettings, out: Path, overwrite: bool) -> None:
    """Write the encoder folder, with the text tower that lies in the source's."""
    encoder.config.origin = f"ViSFT ({Path(file.source).name}) on {source}"
    how = {"objective": "visft", "lora": Path(file.source).name, "lora_rank": settings.rank, "lora_alpha": settings.alpha}
    encoder.config.training = {**(encoder.config.training or {}), **how}
    own_text = Path(source) / TEXT_FOLDER
    with atomic_folder(out, overwrite=overwrite) as folder:
        write_encoder(encoder, folder)
        if (own_text / TEXT_CONFIG).is_file():
            shutil.copytree(own_text, folder / TEXT_FOLDER)
            write_encoder_config(encoder, folder, IN_THIS_FOLDER)


def into_blip2(file: LoraFile, settings: LoraSettings, source: Path, out: Path, overwrite: bool = False) -> Path:
    """Merge LoRA into the image tower of a folder of transformers' BLIP-2; every other tensor and file is copied as it is.

    Args:
        file: The LoRA. One block more than the tower has is dropped with a note: BLIP-2 cuts EVA-ViT-G's last block off.
        settings: Rank and alpha.
        source: A folder with config.json and safetensors, in one file or in shards.
        out: The folder to write.
        overwrite: Replace it.

    Raises:
        DataError: The folder is no BLIP-2, or its tower has another depth or width.
    """
    weights = sorted(source.glob("*.safetensors"))
    if not weights:
        raise DataError(f"{source} has no safetensors; a folder that transformers' BLIP-2 wrote with save_pretrained was expected")
    found = {int(match[1]): shape for path in weights for name, shape in _shapes(path).items() if (match := BLIP2_QKV.fullmatch(name))}
    depth = len(found)
    if not found or sorted(found) != list(range(depth)):
        raise DataError(f"{source} holds no BLIP-2: no vision_model.encoder.layers.0.self_attn.qkv.weight and so on in {weights[0].name}")
    wanted = [3 * file.width, file.width]
    if file.depth not in (depth, depth + 1) or any(shape != wanted for shape in found.values()):
        raise DataError(
            f"{file.source} has {file.depth} blocks of width {file.width}; the image tower of {source} has {depth} with qkv {found[0]}, "
            f"where {wanted} would fit (one block fewer than the LoRA is right too)"
        )
    if file.depth == depth + 1:
        print(f"note: the LoRA of block {depth} is dropped; {source} has {depth} blocks (BLIP-2 leaves the last of EVA-ViT-G's out)")
    with atomic_folder(out, overwrite=overwrite) as folder:
        for path in source.iterdir():
            if path.is_file() and path not in weights:
                shutil.copy2(path, folder / path.name)
            elif path.is_dir() and not path.name.startswith("."):
                shutil.copytree(path, folder / path.name)
        for path in weights:
            tensors, metadata = _read(path)
            for name, tensor in tensors.items():
                if match := BLIP2_QKV.fullmatch(name):
                    add_delta(tensor, delta_weight(file.state, int(match[1]), settings.alpha / settings.rank))
            save_file(tensors, str(folder / path.name), metadata=metadata)
    print(f"{out}: LoRA of rank {file.rank}, alpha {settings.alpha:g}, merged into {depth} blocks")
    return out


def _shapes(path: Path) -> dict[str, list[int]]:
    with safe_open(str(path), framework="pt") as tensors:
        return {name: list(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118  # no mapping


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(str(path), framework="pt") as tensors:
        return {name: tensors.get_tensor(name) for name in tensors.keys()}, tensors.metadata()  # noqa: SIM118


def heads(argv: Sequence[str] | None = None) -> Path:
    """Convert a head file of the authors' to a head folder.

    Raises:
        ConfigError: OUT exists.
        DataError: It is no such file, or a tensor is missing, left over or of another shape.
    """
    parser = argparse.ArgumentParser(prog="mmkit convert visft-heads", description="a head file of ViSFT's authors -> a head folder")
    parser.add_argument("source", metavar="CKPT", help="eva_{g,e}_{caption,segment,detection}_heads.ckpt")
    parser.add_argument("--out", required=True, help="the folder to write; whole or absent")
    parser.add_argument("--task", default="", choices=["", *RULES], help="which head was trained; default: as the file's name says")
    parser.add_argument("--width", type=int, default=0, help="refuse a head for feature maps of another width (1408 for G, 1792 for E)")
    parser.add_argument("--attention_heads", type=int, default=8, help="not to be seen in the file; the authors have 8")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    args = parser.parse_args(argv)
    out = _free(args)
    head = read_official_head(args.source, args.task, width=args.width, attention_heads=args.attention_heads)
    save_head(head, out, origin=f"ViSFT's {Path(args.source).name}", overwrite=args.overwrite)
    millions = sum(parameter.numel() for parameter in head.parameters()) / 1e6
    print(f"{out}: {head.task} head for feature maps of width {head.config.width}, {millions:.1f} M parameters")
    return out


def _free(args: argparse.Namespace) -> Path:
    """Refuse an OUT that exists before anything is loaded."""
    out = Path(args.out)
    if out.exists() and not args.overwrite:
        raise ConfigError(f"{out} exists already; name another one, or add --overwrite")
    return out
