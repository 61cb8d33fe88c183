"""What a ViSFT training puts together before its first step: sets, pictures with targets, heads, an encoder; and what it writes at the end."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from encoders.catalog import load_encoder
from encoders.coco_data import CocoTask
from encoders.coco_files import CocoSet, read_coco
from encoders.heads.base import Head
from encoders.heads.caption import CaptionHead
from encoders.heads.registry import HEADS, build_head, load_head, read_head_file
from encoders.modeling import VisionEncoder
from encoders.panoptic_files import read_panoptic
from encoders.placement import padding_colour
from encoders.visft_features import FeatureMaps, TaskData
from encoders.visft_settings import FILE_OF, RANDOM_PLACERS, VisftConfig
from encoders.vocabulary import Vocabulary
from mmkit.batches import derive_seed
from mmkit.errors import ConfigError, DataError
from mmkit.trainable import weights_hash

BAD_LIST = "bad_samples.jsonl"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_SHARE, _HEAD = 21, 22  # purposes of seeds


def open_set(config: VisftConfig, tasks: list[str], held_out: bool) -> CocoSet:
    """Read the training or the held-out set, as far as these tasks need it.

    Raises:
        ConfigError: A file that they need is not named.
        DataError: A file is missing or faulty.
    """
    files, prefix = config.files(held_out), "held_out_" if held_out else ""
    wanted = {"images", *(FILE_OF[task] for task in tasks)}
    for name in sorted(wanted):
        if files[name] is None:
            raise ConfigError(f"data.{prefix}{name} is empty, and {', '.join(tasks)} needs it: --data.{prefix}{name} PATH")
    root = files["images"]
    assert root is not None
    instances, captions = (files[name] if name in wanted else None for name in ("instances", "captions"))
    on_bad, sets = config.data.on_bad_sample, {}
    if instances or captions:
        sets[""] = read_coco(root, instances=instances, captions=captions, on_bad=on_bad)
    if "panoptic" in wanted and files["panoptic"] is not None:
        sets["panoptic"] = read_panoptic(root, files["panoptic"], on_bad=on_bad)
    if "keypoints" in wanted:
        sets["pose"] = read_coco(root, instances=files["keypoints"], on_bad=on_bad)
    if held_out and config.data.held_out_limit:
        sets = {name: replace(coco, images=coco.images[: config.data.held_out_limit]) for name, coco in sets.items()}
    if not held_out and config.data_share < 1:
        sets = {name: replace(coco, images=share_of(coco, config.data_share, config.run.seed)) for name, coco in sets.items()}
    first = next(iter(sets))
    return replace(sets[first], others={name: coco for name, coco in sets.items() if name}) if len(sets) > 1 else sets[first]


def share_of(coco: CocoSet, share: float, seed: int) -> tuple[Any, ...]:
    """Choose a share of a set's images; a smaller share of the same seed is part of a larger one."""
    generator = torch.Generator().manual_seed(derive_seed(seed, _SHARE))
    order = torch.randperm(len(coco.images), generator=generator)
    chosen = sorted(order[: max(1, round(share * len(order)))].tolist())
    return tuple(coco.images[index] for index in chosen)


def task_data(
    config: VisftConfig, task: str, coco: CocoSet, encoder: VisionEncoder, canvas: int, head: Head, held_out: bool, folder: Path
) -> TaskData:
    """Lay out a set's pictures for one task.

    Args:
        config: The settings.
        task: Which.
        coco: The set.
        encoder: Its mean is the padding's colour.
        canvas: Side, pixels.
        head: Captions are put into its words.
        held_out: Laid out without chance, all captions of an image, no permutation.
        folder: The run's, for the list of what was left out.
    """
    own, data = config.of(task), config.data
    placer = own.held_out_placer if held_out else own.placer
    found = CocoTask(
        coco.of(task),
        task,  # type: ignore[arg-type]
        canvas=canvas,
        fill=padding_colour(encoder.spec.mean),
        placer=placer,
        jitter_scale=(own.jitter_scale[0], own.jitter_scale[1]),
        seed=config.run.seed if not held_out else 0,
        vocabulary=head.vocabulary if isinstance(head, CaptionHead) else None,
        captions_per_image=0 if held_out else data.captions_per_image,
        permuted=config.permute_annotations and not held_out,
        on_bad_sample=data.on_bad_sample,
        bad_list=folder / BAD_LIST,
        cache=data.cache_pictures,
    )
    return TaskData(found, 1 if held_out or placer not in RANDOM_PLACERS else data.views)


def all_data(
    config: VisftConfig,
    coco: CocoSet,
    encoder: VisionEncoder,
    canvases: Mapping[str, int],
    heads: Mapping[str, Head],
    held_out: bool,
    folder: Path,
) -> dict[str, TaskData]:
    """Lay out a set's pictures for each of several tasks; see `task_data`."""
    return {task: task_data(config, task, coco, encoder, canvases[task], head, held_out, folder) for task, head in heads.items()}


def new_head(config: VisftConfig, encoder: VisionEncoder, coco: CocoSet) -> Head:
    """Make the head of stage 1, with weights from the seed alone.

    Raises:
        DataError: A size in `head` is unknown.
        ConfigError: A size makes no sense, or the set is without captions or objects.
    """
    if config.task == "caption":
        needed: dict[str, Any] = {"words": list(Vocabulary.build(coco.captions(), config.data.min_count).words)}
    else:
        assert coco.classes is not None
        needed = {"classes": coco.classes.to_dict(), **({"things": list(coco.things)} if config.task == "panoptic" else {})}
        if config.task == "pose":
            needed["joints"] = list(coco.joints.names) if coco.joints else []
    if clash := sorted(set(config.head) & {"width", *needed}):
        raise ConfigError(f"head.{clash[0]} is taken from the encoder and the data: leave it out")
    torch.manual_seed(derive_seed(config.run.seed, _HEAD))
    return build_head(config.task, HEADS[config.task].config.from_dict({"width": encoder.width, **needed, **config.head}))


def open_heads(config: VisftConfig, encoder: VisionEncoder) -> tuple[dict[str, Head], dict[str, int]]:
    """Read the heads of stage 2, and the canvas of each: that of the settings, else that it was trained on, else the encoder's size.

    Raises:
        ConfigError: Two heads have one task, or a task that is asked for has none.
        DataError: A head is for another encoder.
    """
    heads: dict[str, Head] = {}
    canvases: dict[str, int] = {}
    digest = weights_hash(encoder)
    for folder in config.heads:
        about = read_head_file(folder)
        if config.tasks and about["task"] not in config.tasks:
            continue
        head = load_head(folder, width=encoder.width)
        if head.task in heads:
            raise ConfigError(f"--heads names two {head.task} heads, the second is {folder}; one for each task is right")
        if about.get("encoder_hash", digest) != digest:
            raise DataError(
                f"{folder} was trained behind '{about.get('encoder')}', whose weights are not those of '{config.encoder}': train the head behind "
                "this encoder, or name the old one with --encoder"
            )
        heads[head.task] = head
        canvases[head.task] = config.of(head.task).canvas or int(about.get("canvas", 0)) or encoder.spec.size
    if missing := [task for task in config.tasks if task not in heads]:
        raise ConfigError(f"--tasks names {missing[0]}, and none of --heads {','.join(config.heads)} is a head for it")
    return heads, canvases


def check_classes(heads: Mapping[str, Head], coco: CocoSet, files: Mapping[str, Path | None]) -> None:
    """Refuse heads that know other categories than a set has.

    Raises:
        DataError: Some that only one side has are named.
    """
    for task, head in heads.items():
        classes = coco.of(task).classes
        if task != "caption" and classes is not None:
            head.config.classes.check_covers(classes, f"the {task} head", str(files[FILE_OF[task]]))


def open_encoder(config: VisftConfig) -> VisionEncoder:
    """Load the encoder as its folder has it, weights in float32."""
    encoder = load_encoder(config.encoder)
    encoder.network.float()
    return encoder


def base_dtype(config: VisftConfig) -> torch.dtype:
    """Give the type of a frozen encoder's weights in training."""
    return DTYPES[config.run.precision] if config.low_base else torch.float32


def feature_maps(config: VisftConfig, encoder: VisionEncoder, head: Head) -> FeatureMaps:
    """Make what feeds a head. The captioner's map is pooled here, so that a cached one is the same."""
    pool = head.config.pool if isinstance(head, CaptionHead) else 0
    return FeatureMaps(encoder, drop_cls=config.drop_cls, imagenet_norm=config.imagenet_norm, pool=pool)


def left_out(data: Mapping[str, TaskData]) -> str:
    """Say which pictures were left out; nothing where none was."""
    bad = {name: fault for found in data.values() for name, fault in found.data.bad_images().items()}
    return f"{len(bad)} pictures were left out ({BAD_LIST}):\n  " + "\n  ".join(bad.values()) if bad else ""
