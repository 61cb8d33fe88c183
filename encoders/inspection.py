"""Look inside an encoder: attention maps of every layer and head, and where in a picture a text is found, as PNG.

    mmkit inspect runs/uta/encoder --images photos --text "a cat" "a red bus" --out runs/uta/maps
    mmkit inspect mini-clip --images scene.png --out runs/maps --layers all

The folder holds one PNG a picture and kind, and maps.json, by which `mmkit report` finds them and puts them on its page.

Read the text maps with care: only the image's own token was trained towards texts in CLIP, and a patch need not say what is at its place.
"""

import argparse
import json
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # started as a file: its folder is on sys.path, the packages' folder is not
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from PIL import Image

from encoders.catalog import describe, load_encoder
from encoders.image_data import find_images
from encoders.map_pictures import attention_sheet, text_sheet
from encoders.maps import POOLING, attention_maps, text_maps
from encoders.modeling import VisionEncoder
from encoders.text import TextTower, load_text_tower
from mmkit.checkpoint import atomic_folder, atomic_write
from mmkit.config import cli_entry
from mmkit.errors import ConfigError
from mmkit.images import open_image
from mmkit.manifest import manifest

MAPS_NAME = "maps.json"
AUTO_LAYERS = 6  # rows of a sheet, unless all are asked for


def main(argv: Sequence[str] | None = None) -> Path:
    """Write the maps of some images; gives the folder."""
    args = _parser().parse_args(argv)
    out, start = Path(args.out), time.monotonic()
    if out.exists() and not args.overwrite:
        raise ConfigError(f"{out} exists already; name another folder, or add --overwrite")
    paths = image_files(args.images, args.limit)
    encoder = load_encoder(args.encoder).float()
    layers = chosen_layers(args.layers, len(encoder.network.blocks))
    tower = load_text_tower(args.text_tower or encoder.config.text_tower or "") if args.text else None
    print(describe(encoder))
    name = Path(args.encoder).parent.name if Path(args.encoder).name == "encoder" else Path(args.encoder).name
    with atomic_folder(out, overwrite=args.overwrite) as folder:
        pictures = draw_maps(encoder, tower, paths, args.text, layers, name, folder)
        content = {"encoder": name, "source": args.encoder, "texts": args.text, "pictures": pictures}
        atomic_write(folder / MAPS_NAME, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        made = manifest(seconds=time.monotonic() - start, name="inspect", state="finished")
        atomic_write(folder / "manifest.json", json.dumps(made, indent=1) + "\n")
    print(f"{len(pictures)} sheets: " + ", ".join(str(out / row["file"]) for row in pictures[:4]) + (", ..." if len(pictures) > 4 else ""))
    return out


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mmkit inspect", description="attention and patch-text maps of an encoder, as PNG")
    parser.add_argument("encoder", metavar="ENCODER", help="an encoder folder, or a name of `mmkit list encoders`")
    parser.add_argument("--images", nargs="+", required=True, help="image files, or folders of them")
    parser.add_argument("--text", nargs="+", default=[], help="texts to look for, each in quotes")
    parser.add_argument("--out", required=True, help="folder to write; inside a run folder, `mmkit report` shows it")
    parser.add_argument("--layers", default="auto", help=f"auto: {AUTO_LAYERS} of them, the last one included; all; or numbers: 1,6,12")
    parser.add_argument("--limit", type=int, default=8, help="images at most; default 8")
    parser.add_argument("--text_tower", default="", help="mini-clip, openclip:MODEL/TAG or a folder; default: the one the encoder names")
    parser.add_argument("--overwrite", action="store_true", help="replace --out if it exists")
    return parser


def image_files(images: Sequence[str], limit: int) -> list[Path]:
    """Give the first images of files and folders; a file that is no image is named when it is opened.

    Raises:
        DataError: A folder does not exist or holds no image.
    """
    found: list[Path] = []
    for name in images:
        found += [Path(name)] if Path(name).is_file() else find_images(name)
    return found[: max(limit, 1)]


def chosen_layers(words: str, depth: int) -> list[int]:
    """Turn `--layers` into numbers from 1 to depth.

    Raises:
        ConfigError: It is no list of such numbers.
    """
    if words == "all":
        return list(range(1, depth + 1))
    if words == "auto":
        rows = min(AUTO_LAYERS, depth)
        return sorted({round((row + 1) * depth / rows) for row in range(rows)})
    if not re.fullmatch(r"\d+(,\d+)*", words):
        raise ConfigError(f"--layers {words}: auto, all, or numbers from 1 to {depth} with commas between them are right")
    return [int(word) for word in words.split(",")]


def draw_maps(
    encoder: VisionEncoder,
    tower: TextTower | None,
    paths: Sequence[Path],
    texts: Sequence[str],
    layers: Sequence[int],
    name: str,
    folder: Path,
) -> list[dict[str, Any]]:
    """Draw all sheets into a folder; gives what maps.json says of each."""
    features = tower.encode(list(texts)) if tower is not None else None
    pictures: list[dict[str, Any]] = []
    for number, path in enumerate(paths):
        seen = encoder.spec.fit(open_image(path))
        images = encoder.spec.normalise(seen).unsqueeze(0)
        stem = f"{number + 1:02d}_{re.sub('[^A-Za-z0-9_-]+', '_', path.stem)[:40]}"
        attention = {layer: rows[0] for layer, rows in attention_maps(encoder, images, layers).items()}
        whose = "the image's own token" if encoder.num_prefix_tokens else f"all tokens (and of the {POOLING}'s query)"
        caption = f"Attention of {whose} over the patches: a row a layer, a column a head, every map on a scale of its own"
        sheet = attention_sheet(seen, attention, f"{name}: attention in {path.name}")
        pictures.append(_save(sheet, folder / f"{stem}_attention.png", "attention", path, caption))
        if features is not None:
            maps, whole = text_maps(encoder, images, features)
            sheet = text_sheet(seen, texts, maps[0], whole[0], f"{name}: texts in {path.name}")
            caption = f"Cosine of each patch with {', '.join(f'“{text}”' for text in texts)}, every map on a scale of its own"
            pictures.append(_save(sheet, folder / f"{stem}_text.png", "text", path, caption))
    return pictures


def _save(sheet: Image.Image, path: Path, kind: str, image: Path, caption: str) -> dict[str, Any]:
    sheet.save(path, optimize=True)
    return {"file": path.name, "kind": kind, "image": image.name, "caption": caption}


if __name__ == "__main__":
    cli_entry(main)
