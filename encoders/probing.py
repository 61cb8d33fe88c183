"""What probes share: a frozen encoder's features (kept in memory where they fit), small heads trained on them over several seeds, figures.

images = ProbeImages(encoder, spec, "patch_tokens", open_, names, labels)
data = kept(images, ...)                        # the features of all images, or the images themselves where they would not fit
head = fit_head(folder, seed, build, data, loss, optimizer, settings)
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from encoders.image_batches import Broken, Source, batches
from encoders.modeling import VisionEncoder
from encoders.zeroshot_pair import autocast
from mmkit.batches import derive_seed
from mmkit.checkpoint import load_strict, load_weights, save_weights
from mmkit.errors import ConfigError, DataError
from mmkit.images import ImageError, ImageSpec, open_image
from mmkit.optim import Schedule
from mmkit.run import Run, RunConfig
from mmkit.stats import over_seeds, wilson

Kind = Literal["patch_tokens", "cls"]
HEADS = "probe_heads"  # folder of the heads' trainings in an evaluation; the report leaves their curves out
HEAD_FILE = "head.safetensors"


@dataclass
class ProbeConfig:
    """What every probe is told."""

    encoder: str = field(default="", metadata={"help": "an encoder folder, a name (`mmkit list encoders`), timm:..., openclip:..., hf:..."})
    out: str = field(default="", metadata={"help": "folder for answers.jsonl, summary.json, manifest.json and the heads", "free": True})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "of the heads: start, order, dropout"})
    cache_gb: float = field(default=4.0, metadata={"help": "keep the training features in memory up to this size; 0 never", "free": True})
    batch_size: int = field(default=64, metadata={"help": "images encoded at once", "free": True})
    on_bad_sample: Literal["error", "skip"] = field(
        default="error", metadata={"help": "an unreadable image: stop, or leave it out, counted"}
    )
    resume: bool = field(default=False, metadata={"help": "go on in --out where an earlier start stopped", "free": True})
    overwrite: bool = field(default=False, metadata={"help": "throw an earlier evaluation in --out away", "free": True})
    run: RunConfig = field(default_factory=RunConfig)

    def validate(self) -> None:
        """Refuse a probe without input or output.

        Raises:
            ConfigError: The message names the flag.
        """
        for name in ("encoder", "out"):
            if not getattr(self, name):
                raise ConfigError(f"--{name} is missing; --help lists all settings")
        if self.run.output_dir:
            raise ConfigError(f"--run.output_dir {self.run.output_dir}: a probe's heads are trained below --out; leave it away")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ConfigError(f"--seeds {self.seeds}: at least one, each once, is right")
        if self.batch_size < 1 or self.cache_gb < 0:
            raise ConfigError(f"--batch_size {self.batch_size}, --cache_gb {self.cache_gb}; at least 1 and at least 0 are right")
        if self.resume and self.overwrite:
            raise ConfigError("--resume keeps what is in --out, --overwrite throws it away: give one of them")


@dataclass(frozen=True)
class ProbeImages:
    """Images for a frozen encoder.

    Attributes:
        encoder: Frozen, on its device.
        spec: How the images are prepared: the encoder's own size, mean and std.
        kind: Which of its tokens the head reads.
        open: Gives an image by its name.
        names: Of the images, all different.
        precision: Of the encoder.
    """

    encoder: VisionEncoder
    spec: ImageSpec
    kind: Kind
    open: Source
    names: Sequence[str]
    precision: str = "fp32"

    def features(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] to patch tokens [B, N, D] or CLS tokens [B, D], float32."""
        with torch.no_grad(), autocast(images.device, self.precision):
            return token_features(self.encoder, images, self.kind).float()

    def batches(self, names: Sequence[str], batch_size: int, workers: int) -> Iterator[tuple[list[str], Tensor, list[Broken]]]:
        """Names, features and what could not be read, a batch at a time."""
        device = next(self.encoder.parameters()).device
        for found, images, broken in batches(self.open, names, self.spec, batch_size, workers):
            yield found, self.features(images.to(device)) if found else images, broken


def token_features(encoder: VisionEncoder, images: Tensor, kind: Kind) -> Tensor:
    """The tokens a probe reads, after the final norm: patch tokens [B, N, D], or the CLS token [B, D].

    A network without CLS gives what its pooling makes of the patches, before the projection to the joint space.
    """
    states = encoder(images).last_hidden_state  # [B, P + N, D]
    if kind == "patch_tokens":
        found: Tensor = states[:, encoder.num_prefix_tokens :]
        return found
    cls: Tensor = states[:, 0] if encoder.num_prefix_tokens else encoder.network.forward_head(states, pre_logits=True)
    return cls


class ProbeData:
    """Features (or images) with labels, for `Run`.

    Args:
        images: Where they come from.
        labels: A row an image [n, ...].
        features: Of all images [n, ...], on the CPU; None opens the images anew in each epoch.
        on_bad_sample: What an unreadable image does, where features are not kept.
    """

    def __init__(self, images: ProbeImages, labels: Tensor, features: Tensor | None, on_bad_sample: str = "error") -> None:
        self.images, self.labels, self.kept, self.on_bad_sample = images, labels, features, on_bad_sample

    def __len__(self) -> int:
        return len(self.labels)

    def get(self, epoch: int, index: int) -> dict[str, Any] | None:
        """Give the place and the pixels of one image."""
        spec = self.images.spec
        try:
            return {"place": index, "pixels": spec.normalise(spec.fit(open_image(self.images.open(self.images.names[index]))))}
        except DataError:
            if self.on_bad_sample == "skip":
                return None
            raise

    def collate(self, items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Give {"images", "labels"} of a batch."""
        places = torch.tensor([item["place"] for item in items])
        return {"images": torch.stack([item["pixels"] for item in items]), "labels": self.labels[places]}

    def features(self, batch: dict[str, Tensor]) -> Tensor:
        """The features of a batch on its device."""
        return batch["features"] if "features" in batch else self.images.features(batch["images"])


class KeptBatches:
    """Kept features a batch at a time: for `Run` one of them is one sample, since seeding and collating images singly costs more than a head.

    Args:
        data: With its features.
        size: Images in a batch; the last one of an epoch may have fewer.
        seed: Of the order.
    """

    def __init__(self, data: ProbeData, size: int, seed: int) -> None:
        self.data, self.size, self.seed = data, size, seed
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))

    def __len__(self) -> int:
        return -(-len(self.data) // self.size)

    def get(self, epoch: int, index: int) -> dict[str, Tensor]:
        """Give {"features", "labels"} of one batch; which images are in it is a function of (seed, epoch, index)."""
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch))
            self._order = (epoch, torch.randperm(len(self.data), generator=generator))
        places = self._order[1][index * self.size : (index + 1) * self.size]
        assert self.data.kept is not None
        return {"features": self.data.kept[places], "labels": self.data.labels[places]}

    def collate(self, items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Join batches."""
        return {key: torch.cat([item[key] for item in items]) for key in items[0]}


def probe_data(images: ProbeImages, labels: Tensor, config: ProbeConfig) -> tuple[ProbeData, dict[str, str]]:
    """Encode all images once, if their features fit into `cache_gb`.

    Args:
        images: n of them.
        labels: [n, ...].
        config: Limits.

    Returns:
        The data, and the images left out with the reason.

    Raises:
        ImageError: An image cannot be read, and `on_bad_sample` is "error".
        DataError: None can be read.
    """
    width = images.encoder.width * (images.encoder.num_patches if images.kind == "patch_tokens" else 1)
    if len(labels) * width * 4 > config.cache_gb * 2**30:
        return ProbeData(images, labels, None, config.on_bad_sample), {}
    place = {name: index for index, name in enumerate(images.names)}
    rows: list[Tensor] = []
    kept: list[int] = []
    left_out: dict[str, str] = {}
    with tqdm(total=len(labels), desc="features", unit="image") as progress:
        for names, features, broken in images.batches(images.names, config.batch_size, config.run.num_workers):
            for bad in broken:
                if config.on_bad_sample == "error":
                    raise ImageError(f"{bad.reason}\n  --on_bad_sample skip leaves such images out, counted")
                left_out[bad.name] = bad.reason
            if names:
                rows.append(features.cpu())
                kept += [place[name] for name in names]
            progress.update(len(names) + len(broken))
    if not rows:
        raise DataError(f"none of {len(labels)} training images could be read; the first: {next(iter(left_out.values()))}")
    return ProbeData(images, labels[kept], torch.cat(rows), config.on_bad_sample), left_out


def fit_head(
    folder: Path,
    seed: int,
    build: Callable[[], nn.Module],
    data: ProbeData,
    loss_of: Callable[[Tensor, Tensor], Tensor],
    weigh: Callable[[dict[str, Tensor]], float],
    optimizer_of: Callable[[nn.Module], torch.optim.Optimizer],
    schedule_of: Callable[[int], Schedule],
    config: ProbeConfig,
) -> nn.Module:
    """Train one head through `Run`, or read it where an earlier start has finished it; interrupted, it goes on from its checkpoint.

    Args:
        folder: Of the evaluation.
        seed: The head's.
        build: Makes a head; torch's generator is seeded before.
        data: Its training set.
        loss_of: (outputs, labels) to the mean loss [].
        weigh: Over how many things the loss of a batch is a mean.
        optimizer_of, schedule_of: From the head, and from the number of steps.
        config: Settings, saved with the head.

    Returns:
        The head on its device, in eval mode.
    """
    place = folder / HEADS / f"seed_{seed}"
    if not (place / HEAD_FILE).is_file():
        own = replace(config.run, output_dir=str(place), seed=seed, resume=True, overwrite=False)
        dealt: ProbeData | KeptBatches = data
        if data.kept is not None:
            dealt, own = KeptBatches(data, config.run.micro_batch_size, seed), replace(own, micro_batch_size=1, global_batch_size=0)
        settings = replace(config, run=own)
        run = Run(settings.run, name=f"{folder.name}, head {seed}", settings=settings)
        head = build()
        model, _ = run.prepare(head, optimizer_of(head))
        run.set_schedule(schedule_of(run.plan(dealt)))
        for batch in run.batches(dealt, dealt.collate, weigh):
            run.backward(loss_of(model(data.features(batch)), batch["labels"]))
        run.finish()
        if run.is_main:
            save_weights(run.unwrap().state_dict(), place / HEAD_FILE)
        run.accelerator.wait_for_everyone()
    head = build()
    load_strict(head, load_weights(place / HEAD_FILE), str(place / HEAD_FILE))
    return head.to(next(data.images.encoder.parameters()).device).eval()


def over_heads(right_by_seed: Sequence[int], n: int) -> dict[str, Any]:
    """A share in percent over several heads, as summaries hold it.

    Args:
        right_by_seed: How many of the n items each head has right.
        n: Items.

    Returns:
        The mean with the Wilson interval of the items (what other items could change), and beside it the heads' own figures and Student's
        interval over them (what other heads could change); one head has no such interval.
    """
    mean = sum(right_by_seed) / len(right_by_seed)
    low, high = wilson(mean, n)
    shares = [100 * right / n for right in right_by_seed]
    spread = over_seeds(shares)
    return {
        "value": round(100 * mean / n, 4),
        "ci95": [round(100 * low, 4), round(100 * high, 4)],
        "n": n,
        "by_seed": [round(share, 4) for share in shares],
        "ci95_over_seeds": None if spread.low is None or spread.high is None else [round(spread.low, 4), round(spread.high, 4)],
    }
