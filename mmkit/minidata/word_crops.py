"""Cut the embedded words out of their pictures, as word-recognition sets have them.

    python -m mmkit.minidata.word_crops --data runs/quickstart/data --out runs/visft/words

Writes train.jsonl, val.jsonl, test.jsonl ({"image", "word"} a line) and the crops. In the embedded pictures a word takes up a few patches
anywhere; IC03, SVT, IIIT and their kin are cut to the word, and so is what an OCR probe is given. Where a word stands is known from the scene,
which is drawn up again from the data's seed.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mmkit.checkpoint import atomic_folder
from mmkit.config import cli_entry, load_config
from mmkit.errors import ConfigError, DataError
from mmkit.images import open_image
from mmkit.minidata.build import WORD_PICTURES
from mmkit.minidata.formats import SCENE_SPLITS
from mmkit.minidata.world import sample_scene
from mmkit.records import read_jsonl

MARGIN = 2  # pixels around the word


@dataclass
class WordCropsConfig:
    """Settings."""

    data: str = field(default="", metadata={"help": "folder of `mmkit data mini`"})
    out: str = field(default="", metadata={"help": "folder to make"})

    resume: bool = field(default=False, metadata={"help": "keep the folder if it exists"})

    def validate(self) -> None:
        """Refuse to read from or write to nothing."""
        for name in ("data", "out"):
            if not getattr(self, name):
                raise ConfigError(f"--{name} is missing: --data FOLDER of `mmkit data mini`, --out FOLDER to make")


def main(argv: Sequence[str] | None = None) -> Path:
    """Write the crops, and give the folder.

    Raises:
        DataError: `data` is no embedded data set, or says other words than its seed.
        FileExistsError: `out` exists, and `resume` is off.
    """
    config = load_config(WordCropsConfig, argv)
    data, out = Path(config.data), Path(config.out)
    if config.resume and (out / "test.jsonl").is_file():
        return out
    try:
        seed = int(json.loads((data / "manifest.json").read_text(encoding="utf-8"))["settings"]["seed"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"--data {data} is no finished embedded data set ({error}); `mmkit data mini --out {data}` makes one") from error
    with atomic_folder(out) as folder:
        for split in WORD_PICTURES:
            rows = [_cut(data, split, row, seed, folder) for row in read_jsonl(data / "words" / f"{split}.jsonl")]
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return out


def _cut(data: Path, split: str, row: dict[str, object], seed: int, folder: Path) -> dict[str, object]:
    """Cut one word out; gives its row."""
    index = int(str(row["id"]))
    word = sample_scene(np.random.default_rng((seed, 3, SCENE_SPLITS.index(split), index)), [], 0, 1.0).word
    if word is None or word.text != row["word"]:
        raise DataError(
            f"{data / 'words'}: {split} {index} says '{row['word']}', seed {seed} says '{word.text if word else ''}'; draw the data anew"
        )
    picture = open_image(data / "words" / str(row["image"]))
    left, top, width, height = word.box
    box = (
        max(0, left - MARGIN),
        max(0, top - MARGIN),
        min(picture.width, left + width + MARGIN),
        min(picture.height, top + height + MARGIN),
    )
    target = folder / str(row["image"])
    target.parent.mkdir(parents=True, exist_ok=True)
    picture.crop(box).save(target)
    return {"id": index, "image": row["image"], "word": word.text}


if __name__ == "__main__":
    cli_entry(main)
