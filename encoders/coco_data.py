"""Images of a COCO-format set with the targets of one task, each a function of (seed, epoch, index) alone.

    coco = read_coco(root, instances=file)
    data = CocoTask(coco, "segmentation", canvas=1024, fill=padding_colour(spec.mean), placer="jitter", seed=0)
    item = data.get(epoch=0, index=3)       # {"pixels": uint8 [3, S, S], "target": {...}}, or None for what was left out
    batch = collate([item, ...])            # {"pixels": uint8 [B, 3, S, S], "targets": [...]}

All pictures of a task lie on squares of one size, from the upper left corner; "picture" in a target says how much of it they fill. An encoder
attends to padding unless the task's head masks it; mixed sizes in a batch would not help, since positions are stretched over the padding.
"""

import json
import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from encoders.coco_files import CocoImage, CocoSet, OnBad
from encoders.placement import PLACERS, Colour, Placement, jitter
from encoders.vocabulary import Vocabulary, pad_tokens
from mmkit.batches import derive_seed
from mmkit.errors import ConfigError, DataError, find
from mmkit.images import ImageError, open_image
from mmkit.records import read_jsonl

Task = Literal["detection", "segmentation", "panoptic", "pose", "caption"]
MASKED = ("segmentation", "panoptic")  # tasks whose targets have masks
SKIP_HINT = "\n  --data.on_bad_sample skip leaves such things out, counted and listed"
_POINTS, _CAPTION = 1, 2  # purposes of an item's seeds: a change in one moves no other


class CocoTask:
    """One task's images and targets.

    A target holds "image_id" [], "original_size" (height, width) [2] and "picture" [2], the share of the canvas that is no padding. Beyond
    that, detection has "labels" [n] and "boxes" [n, 4] (centre x, centre y, width, height as shares of the canvas); segmentation the same,
    "masks" uint8 [n, S, S] and "points_seed" []; panoptic these of every segment, thing or stuff; pose labels, boxes and "keypoints" [n, K, 3]
    (x, y as shares of the canvas, visibility); captions "tokens" [k, T].

    Args:
        coco: The set.
        task: Which.
        canvas: S, side of the square.
        fill: Colour of the padding.
        placer: How pictures are laid out; a name in `placement.PLACERS`.
        jitter_scale: Of placer "jitter".
        seed: The run's.
        vocabulary: For captions.
        captions_per_image: So many captions of an image, chosen at random; 0 takes all.
        max_words: Longer captions are cut.
        permuted: Every image shows another image's picture, squashed to its own size: the control whose annotations say nothing.
        on_bad_sample: "error" stops at a picture that cannot be read or has another size than the file says; "skip" leaves it out and lists it.
        bad_list: Where "skip" writes down what it left out, a JSON line an image; a file, since workers have no other way to tell.
        cache: Keep decoded pictures in memory.

    Raises:
        ConfigError: The settings contradict each other.
        DataError: The set has nothing for the task.
    """

    def __init__(
        self,
        coco: CocoSet,
        task: Task,
        *,
        canvas: int,
        fill: Colour,
        placer: str = "fit",
        jitter_scale: tuple[float, float] = (0.1, 2.0),
        seed: int = 0,
        vocabulary: Vocabulary | None = None,
        captions_per_image: int = 1,
        max_words: int = 50,
        permuted: bool = False,
        on_bad_sample: OnBad = "error",
        bad_list: Path | None = None,
        cache: bool = False,
    ) -> None:
        if canvas < 8:
            raise ConfigError(f"a canvas of {canvas} pixels is too small for a picture; 8 or more is right")
        self.coco, self.task, self.canvas, self.fill, self.seed = coco, task, canvas, fill, seed
        self.place = partial(jitter, scale=jitter_scale) if placer == "jitter" else find("placer", PLACERS, placer)
        self.vocabulary, self.captions_per_image, self.max_words = vocabulary, captions_per_image, max_words
        self.on_bad_sample, self.bad_list = on_bad_sample, bad_list
        self.images = _with_annotations(coco, task, vocabulary)
        self.shown = _derangement(len(self.images), seed) if permuted else list(range(len(self.images)))
        self.cache: dict[int, np.ndarray] | None = {} if cache else None
        self._bad: set[int] = set()

    def __len__(self) -> int:
        return len(self.images)

    def get(self, epoch: int, index: int) -> dict[str, Any] | None:
        """Give {"pixels": uint8 [3, S, S], "target": {...}}; None for a picture that was left out.

        Raises:
            DataError: The picture cannot be read or has another size than the file says, and `on_bad_sample` is "error".
        """
        if index in self._bad:
            return None
        image = self.images[index]
        try:
            picture = self._picture(index)
        except DataError as error:
            if self.on_bad_sample != "skip":
                raise type(error)(f"{error}{SKIP_HINT}") from error
            self._bad.add(index)
            self._write(image.file_name, str(error))
            return None
        place = self.place(image.width, image.height, self.canvas, random.Random(derive_seed(self.seed, epoch, index)))
        pixels = torch.from_numpy(np.array(place.image(picture, self.fill))).permute(2, 0, 1)
        return {"pixels": pixels, "target": self.target(image, place, epoch, index)}

    def target(self, image: CocoImage, place: Placement, epoch: int, index: int) -> dict[str, Tensor]:
        """Give what the task's head is to find in an image that lies like this."""
        target = {
            "image_id": torch.tensor(image.image_id),
            "original_size": torch.tensor([image.height, image.width]),
            "picture": place.picture,
        }
        if self.task == "caption":
            return {**target, "tokens": self._tokens(image, epoch, index)}
        if self.task == "pose":
            return {**target, **self._keypoints(image, place)}
        boxes = place.boxes(torch.tensor([item.box for item in image.objects], dtype=torch.float64))
        keep = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        if self.task in MASKED:
            masks = place.masks([item.mask() for item in image.objects])
            keep = keep & (
                masks.flatten(1).any(1).bool() if len(masks) else keep
            )  # the box may reach into the window where its object does not
            target["masks"] = masks[keep]
            target["points_seed"] = torch.tensor(derive_seed(self.seed, epoch, index, _POINTS))
        sides = torch.cat([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], dim=1) / self.canvas
        labels = torch.tensor([item.label for item in image.objects], dtype=torch.int64)
        return {**target, "labels": labels[keep], "boxes": sides[keep].float()}

    def _keypoints(self, image: CocoImage, place: Placement) -> dict[str, Tensor]:
        """The boxes, labels and keypoints of the objects that have any and are not cut away; in a mirror, left and right change places."""
        assert self.coco.joints is not None
        objects = [item for item in image.objects if any(item.keypoints[2::3])]
        boxes = place.boxes(torch.tensor([item.box for item in objects], dtype=torch.float64))
        keep = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        joints = torch.tensor([item.keypoints for item in objects], dtype=torch.float64).reshape(-1, len(self.coco.joints.names), 3)
        if place.mirrored:
            joints = joints[:, self.coco.joints.mirrored]
        points = place.points(joints[..., :2].reshape(-1, 2)).reshape(*joints.shape[:2], 2) / self.canvas
        sides = torch.cat([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], dim=1) / self.canvas
        labels = torch.tensor([item.label for item in objects], dtype=torch.int64)
        keypoints = torch.cat([points, joints[..., 2:]], dim=-1)
        return {"labels": labels[keep], "boxes": sides[keep].float(), "keypoints": keypoints[keep].float()}

    def _tokens(self, image: CocoImage, epoch: int, index: int) -> Tensor:
        assert self.vocabulary is not None
        captions = list(image.captions)
        if 0 < self.captions_per_image < len(captions):
            captions = random.Random(derive_seed(self.seed, epoch, index, _CAPTION)).sample(captions, self.captions_per_image)
        return pad_tokens([self.vocabulary.encode(caption, self.max_words) for caption in captions])

    def _picture(self, index: int) -> Image.Image:
        """Open the picture that is shown for an image.

        Raises:
            ImageError: It cannot be read.
            DataError: It has another size than the annotations are for.
        """
        image, shown = self.images[index], self.images[self.shown[index]]
        if self.cache is not None and index in self.cache:
            return Image.fromarray(self.cache[index])
        picture = open_image(self.coco.root / shown.file_name, f"image id {shown.image_id}")
        if picture.size != (shown.width, shown.height):
            raise ImageError(
                f"{self.coco.root / shown.file_name} is {picture.width} x {picture.height} pixels; its annotations (image id {shown.image_id}) "
                f"are for {shown.width} x {shown.height}. Scale the picture back, or the boxes and masks with it"
            )
        if picture.size != (image.width, image.height):
            picture = picture.resize((image.width, image.height), Image.Resampling.BILINEAR)
        if self.cache is not None:
            self.cache[index] = np.array(picture)
        return picture

    def _write(self, name: str, fault: str) -> None:
        if self.bad_list is not None:
            with open(self.bad_list, "a", encoding="utf-8") as file:
                file.write(json.dumps({"image": name, "error": fault}) + "\n")

    def bad_images(self) -> dict[str, str]:
        """Give what was left out so far by all workers (and earlier parts of a resumed run): name and why."""
        if self.bad_list is None or not self.bad_list.is_file():
            return {}
        return {row["image"]: row["error"] for row in read_jsonl(self.bad_list)}


def _with_annotations(coco: CocoSet, task: Task, vocabulary: Vocabulary | None) -> tuple[CocoImage, ...]:
    """Give the images a task can use: those with captions, or all, since an image without objects teaches a detector what is nothing.

    Raises:
        ConfigError: Captions without a vocabulary.
        DataError: No image has anything for the task.
    """
    if task == "caption":
        if vocabulary is None:
            raise ConfigError("captions need a vocabulary: Vocabulary.build(coco.captions()), or the head's own")
        images = tuple(image for image in coco.images if image.captions)
    elif task == "pose":
        images = tuple(image for image in coco.images if any(any(item.keypoints[2::3]) for item in image.objects))
        if coco.joints is None:
            raise ConfigError(f"no category of the set in {coco.root} names keypoints: give a keypoints file (--data.keypoints)")
    else:
        images = coco.images if any(image.objects for image in coco.images) else ()
    if not images:
        raise DataError(
            f"none of the {len(coco.images)} images in {coco.root} has what a {task} head learns from; see what was left out:\n{coco.describe()}"
        )
    return images


def _derangement(length: int, seed: int) -> list[int]:
    """Give each of `length` images another one, one to one.

    Raises:
        DataError: There is only one.
    """
    if length < 2:
        raise DataError("a permutation of annotations needs two images or more")
    order = list(range(length))
    random.Random(derive_seed(seed, length)).shuffle(order)
    shown = [0] * length
    for place, image in enumerate(order):
        shown[image] = order[(place + 1) % length]  # one big circle: nobody keeps its own
    return shown


def collate(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Stack pixels to [B, 3, S, S]; targets stay a list, since objects differ in number."""
    return {"pixels": torch.stack([item["pixels"] for item in items]), "targets": [item["target"] for item in items]}
