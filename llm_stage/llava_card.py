"""The card beside every LLaVA of ours: its parts, how they were joined, and the hashes of its weight files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from encoders.vision_towers import folders, with_folders
from mmkit.checkpoint import atomic_write
from mmkit.errors import DataError

CARD = "mmkit_llava.json"
_FOLDERS = ("encoder", "llm")  # fields that may name a folder
_WEIGHTS = (".safetensors", ".bin")


@dataclass(frozen=True)
class LlavaCard:
    """How a LLaVA was put together.

    Attributes:
        encoder, llm: Names or folders, as given to `build_llava`; folders are found relative to the card, then as they were given.
        encoder_hash: Of the tower's weights (`weights_hash`): another encoder under the same name is refused.
        projector, feature_layer, select: As for `build_llava`.
        template, system: Of `ChatFormat`.
        stage: 1 or 2.
        resize: As for `with_resize`.
        tiles: Of `Tiles`: how large pictures are cut in use; 0 not at all.
        quantization: How the LLM was held in training, if not whole: {"bits": 4, "type": "nf4", "double": true, "dtype": "bf16"}. Its
            adapters are added to weights that went through the same rounding.
        encoder_card: What is known of the encoder: its origin, width, image size, tokens.
        training: Data and steps, for people.
    """

    encoder: str
    llm: str
    encoder_hash: str
    projector: str = "mlp2x_gelu"
    feature_layer: int = -2
    select: Literal["auto", "default", "full"] = "auto"
    template: str = "own"
    system: str | None = None
    stage: int = 1
    resize: str = "own"
    tiles: int = 0
    quantization: dict[str, Any] = field(default_factory=dict)
    encoder_card: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)

    def write(self, folder: Path, home: Path, *, files: bool = True) -> None:
        """Write the card into `folder`, whose final place is `home`.

        Args:
            folder: Where the files are by now.
            home: Where the folder will be.
            files: Put the hashes of its weight files into the card; False for a folder that is no model (a run).
        """
        values = asdict(self)
        for key in _FOLDERS:
            if Path(values[key]).is_dir():
                values[f"{key}_folder"] = os.path.relpath(values[key], home)
                values[key] = str(Path(values[key]).absolute())
        if parts := folders(self.encoder) if not Path(self.encoder).is_dir() else []:  # several encoders, or one at another image size
            values["encoder_parts"] = {str(Path(part).absolute()): os.path.relpath(part, home) for part in parts}
            values["encoder"] = with_folders(self.encoder, lambda part: str(Path(part).absolute()))
        values |= {"files": file_table(folder)} if files else {}
        atomic_write(folder / CARD, json.dumps(values, indent=1) + "\n")


def read_card(folder: Path) -> LlavaCard | None:
    """The card of a folder, with its references resolved; None where there is none (a folder that mmkit did not write).

    Raises:
        DataError: It is broken.
    """
    values = _read(folder / CARD)
    if values is None:
        return None
    values.pop("files", None)
    try:
        for key in _FOLDERS:
            near = values.pop(f"{key}_folder", None)
            if near is not None and (folder / near).is_dir():
                values[key] = os.path.normpath(folder / near)
        for absolute, near in values.pop("encoder_parts", {}).items():
            if (folder / near).is_dir():
                values["encoder"] = values["encoder"].replace(absolute, os.path.normpath(folder / near))
        return LlavaCard(**values)
    except TypeError as error:
        raise DataError(f"{folder / CARD} is not a card that this version of mmkit wrote: {error}") from error


def _read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not a card that this version of mmkit wrote: {error}") from error
    if not isinstance(values, dict):
        raise DataError(f"{path} is not a card that this version of mmkit wrote: a table was expected in it")
    return values


# -- files ---------------------------------------------------------------------------------------------------------------------------------


def file_table(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of each weight file in a folder, by its path in it."""
    found = sorted(path for path in folder.rglob("*") if path.suffix in _WEIGHTS and path.is_file())
    return {path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in found}


def sha256(path: Path) -> str:
    """Hash a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_files(folder: Path) -> None:
    """Hold the weight files of a folder against the table in its card; a folder without one has only its own headers.

    Raises:
        DataError: A file is missing, cut off, or not the one that was written; the message names it.
    """
    values = _read(folder / CARD) or {}
    for name, entry in values.get("files", {}).items():
        path = folder / name
        if not path.is_file():
            raise DataError(f"{path} is missing: {CARD} lists it, with {entry['bytes']:,} bytes. Copy the folder again, all files of it")
        if (size := path.stat().st_size) != entry["bytes"]:
            why = "its copy was cut off" if size < entry["bytes"] else "it is not the file that was written"
            raise DataError(f"{path} has {size:,} bytes, should have {entry['bytes']:,}: {why}. Copy it again")
    check_shards(folder)
    for name, entry in values.get("files", {}).items():
        if (found := sha256(folder / name)) != entry["sha256"]:
            raise DataError(
                f"{folder / name} is not the file that was written: it hashes to {found[:12]}, {CARD} says {entry['sha256'][:12]}. Copy it "
                f"again; if it was changed on purpose, remove its line in {CARD}"
            )


def check_shards(folder: Path) -> None:
    """See that all shards of the folder's index are there, and that no safetensors file in it is cut off.

    Raises:
        DataError: The message names the file.
    """
    for index in sorted(folder.glob("*.index.json")):
        try:
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise DataError(f"{index} is no index of weight files: {error}") from error
        missing = [name for name in shards if not (folder / name).is_file()]
        if missing:
            raise DataError(f"{folder / missing[0]} is missing, one of {len(shards)} shards of {index.name}: get all of them")
    refuse_cut_off(folder.glob("*.safetensors"))


def refuse_cut_off(paths: Iterable[Path]) -> None:
    """Compare each safetensors file's length with what its header says.

    Raises:
        DataError: They differ, or the header cannot be read.
    """
    for path in sorted(paths):
        size = path.stat().st_size
        try:
            with open(path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if length > size - 8:
                    raise ValueError("its header is cut off")
                header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            expected = 8 + length + max(ends, default=0)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path} is no safetensors file: {error}. Get it again") from error
        if size != expected:
            raise DataError(f"{path} has {size:,} bytes, its header speaks of {expected:,}: its copy was cut off. Get it again")
