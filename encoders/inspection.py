"""Look inside an encoder: attention maps of every layer and head, and where in a picture a text is found, as PNG.

    mmkit inspect runs/uta/encoder --images photos --text "a cat" "a red bus" --out runs/uta/maps
    mmkit inspect mini-clip --images scene.png --out runs/maps --layers all
    mmkit inspect runs/visft/encoder --before mini-clip --images photos --out runs/visft/maps

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
from encoders.maps import POOLING, attention_figures, attention_maps, cls_patch_cosine, text_maps
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
    before = load_encoder(args.before).float() if args.before else None
    print(describe(encoder))
    name = short_name(args.encoder)
    with atomic_folder(out, overwrite=args.overwrite) as folder:
        pictures = draw_maps(encoder, tower, paths, args.text, layers, name, folder)
        change: dict[str, Any] = {}
        if before is not None:
            sheets, change = draw_comparison(before, encoder, paths, (short_name(args.before), name), folder)
            pictures = [*sheets, *pictures]
        content: dict[str, Any] = {**change, "encoder": name, "source": args.encoder, "texts": args.text, "pictures": pictures}
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
    parser.add_argument("--before", default="", help="another encoder of the same images: its last layer beside this one's, with figures")
    parser.add_argument("--layers", default="auto", help=f"auto: {AUTO_LAYERS} of them, the last one included; all; or numbers: 1,6,12")
    parser.add_argument("--limit", type=int, default=8, help="images at most; default 8")
    parser.add_argument("--text_tower", default="", help="mini-clip, openclip:MODEL/TAG or a folder; default: the one the encoder names")
    parser.add_argument("--overwrite", action="store_true", help="replace --out if it exists")
    return parser


def short_name(source: str) -> str:
    """What a sheet calls an encoder: the name of its run, or of its folder."""
    return Path(source).parent.name if Path(source).name == "encoder" else Path(source).name


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


def draw_comparison(
    before: VisionEncoder, after: VisionEncoder, paths: Sequence[Path], names: tuple[str, str], folder: Path
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Draw the last layer's attention of two encoders, one above the other, and put figures to the difference.

    Args:
        before, after: With CLS.
        paths: Pictures.
        names: What the sheets call them.
        folder: Where the sheets go.

    Returns:
        What maps.json says of each sheet, and the figures, means over the pictures: entropy and distance of the attention (see
        `encoders.maps.attention_figures`), and the cosine of CLS with the patches.
    """
    labels = names if names[0] != names[1] else (f"{names[0]}, before", f"{names[1]}, after")
    sheets: list[dict[str, Any]] = []
    figures: dict[str, dict[str, list[float]]] = {label: {"entropy": [], "distance": [], "cls_patch_cosine": []} for label in labels}
    for number, path in enumerate(paths):
        seen, rows, words = after.spec.fit(open_image(path)), {}, []
        for label, encoder in zip(labels, (before, after), strict=True):
            images = encoder.spec.normalise(encoder.spec.fit(open_image(path))).unsqueeze(0)
            rows[label] = list(attention_maps(encoder, images, [len(encoder.network.blocks)]).values())[-1][0]  # [A, h, w]
            found = {key: float(value) for key, value in attention_figures(rows[label].mean(dim=0)).items()}
            found["cls_patch_cosine"] = float(cls_patch_cosine(encoder, images)[0])
            for key, value in found.items():
                figures[label][key].append(value)
            words.append(
                f"{label}: entropy {found['entropy']:.3f}, distance {found['distance']:.2f} patches, cosine {found['cls_patch_cosine']:.3f}"
            )
        sheet = attention_sheet(seen, rows, f"{labels[0]} and {labels[1]}: attention of CLS in the last layer, {path.name}")
        caption = f"Attention of CLS in the last layer, before and after, every map on a scale of its own. {'; '.join(words)}"
        stem = f"{number + 1:02d}_{re.sub('[^A-Za-z0-9_-]+', '_', path.stem)[:40]}"
        sheets.append(_save(sheet, folder / f"{stem}_before_after.png", "before and after", path, caption))
    means = {label: {key: round(sum(values) / len(values), 5) for key, values in of.items()} for label, of in figures.items()}
    for label, of in means.items():
        print(f"{label}: " + ", ".join(f"{key} {value:.4f}" for key, value in of.items()) + f" (means over {len(paths)} images)")
    return sheets, {"before_after": means, "images": len(paths)}


def _save(sheet: Image.Image, path: Path, kind: str, image: Path, caption: str) -> dict[str, Any]:
    sheet.save(path, optimize=True)
    return {"file": path.name, "kind": kind, "image": image.name, "caption": caption}


if __name__ == "__main__":
    cli_entry(main)
