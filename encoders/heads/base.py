"""What all task heads share: one contract, the counts their losses are means over, and how they are written and read.

    loss, terms = head(feature_map, targets)              # feature_map [B, C, h, w] of a frozen encoder; one dict of tensors for each image
    found = head.predict(feature_map)                     # one dict for each image

A loss of a head is a sum over objects (or words) divided by how many there are. Over several micro-batches and ranks the divisor must be
that of the whole step, or a step of 1 x 4 images and one of 4 x 1 would differ. So `counts(targets)` says what a micro-batch holds,
`StepCounts` adds it up before the step begins, and each micro-batch weighs the same:

    totals = StepCounts(lambda batch: head.counts(batch["targets"]))
    for batch in run.batches(dataset, collate, weigh=lambda _: 1.0, look_ahead=totals):
        loss, terms = head(features(batch), batch["targets"], totals.mean)
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch import distributed as dist

from encoders.coco_classes import Classes
from mmkit.errors import ConfigError, DataError

Target = Mapping[str, Tensor]
Targets = Sequence[Target]
Terms = dict[str, Tensor]
Prediction = dict[str, Any]


class HeadConfig:
    """Base of the heads' settings: frozen dataclasses that go to JSON and back. The first field is `width`, C of the feature map."""

    width: int

    def to_dict(self) -> dict[str, Any]:
        """Give JSON values that `from_dict` takes back."""
        values: dict[str, Any] = asdict(self)  # type: ignore[call-overload]
        return {
            key: getattr(self, key).to_dict() if isinstance(getattr(self, key), Classes) else list(value) if type(value) is tuple else value
            for key, value in values.items()
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from JSON values.

        Raises:
            DataError: A key is unknown or missing.
        """
        known = {field.name for field in fields(cls)}  # type: ignore[arg-type]
        if strange := sorted(set(values) - known):
            raise DataError(f"{cls.__name__} has no {', '.join(strange)}; it has {', '.join(sorted(known))}")
        ready = {
            key: Classes.from_dict(value) if key == "classes" else tuple(value) if isinstance(value, list) else value
            for key, value in values.items()
        }
        try:
            return cls(**ready)
        except TypeError as error:
            raise DataError(f"{cls.__name__}: {error}") from error


class Head(nn.Module):
    """A task head on the feature map of an encoder.

    Attributes:
        task: Its name in the registry.
        config: Its settings.
        mean_over: Names of the counts its loss divides by.
    """

    task: ClassVar[str]
    mean_over: ClassVar[tuple[str, ...]]

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    def check(self, feature_map: Tensor, targets: Targets | None = None) -> Tensor:
        """Refuse a map of another width or a target too many; give the map in float32.

        Positions and matching are computed in the map's type, and bfloat16 has three digits.

        Raises:
            ValueError: The shapes do not fit.
        """
        if feature_map.dim() != 4 or feature_map.shape[1] != self.config.width:
            raise ValueError(
                f"the {self.task} head takes feature maps [B, {self.config.width}, h, w]; it was given {list(feature_map.shape)}: was it "
                "trained behind another encoder?"
            )
        if targets is not None and len(targets) != len(feature_map):
            raise ValueError(f"{len(feature_map)} feature maps, {len(targets)} targets: one for each image is right")
        return feature_map.float()

    @abstractmethod
    def counts(self, targets: Targets) -> dict[str, float]:
        """Say what the loss of these images is a mean over."""

    @abstractmethod
    def forward(self, feature_map: Tensor, targets: Targets, counts: Mapping[str, float] | None = None) -> tuple[Tensor, Terms]:
        """Give the loss [] and its terms.

        Args:
            feature_map: [B, C, h, w].
            targets: One for each image; see the head.
            counts: What to divide by, from `StepCounts`; None is this batch's own.
        """

    @abstractmethod
    def predict(self, feature_map: Tensor, targets: Targets | None = None, **settings: Any) -> list[Prediction]:
        """Give what the head sees in each image; of `targets` only the picture's place in the canvas is read."""


def divisors(counts: Mapping[str, float]) -> dict[str, float]:
    """Make counts safe to divide by: a batch without any object has loss 0, not 0 / 0."""
    return {name: max(value, 1.0) for name, value in counts.items()}


class StepCounts:
    """`look_ahead` of `Run.batches` that adds up what a whole step's losses are means over.

    Attributes:
        mean: Counts of the present step, divided by its micro-batches on all ranks. A micro-batch's sum over this, averaged over
            micro-batches and ranks, is the whole step's sum over the whole step's count.
    """

    def __init__(self, count: Callable[[Any], Mapping[str, float]]) -> None:
        self.count = count
        self.mean: dict[str, float] = {}

    def __call__(self, batches: Iterator[Any]) -> None:
        """Count the micro-batches of the step that begins."""
        found = [self.count(batch) for batch in batches]
        names = sorted(found[0])
        totals = [sum(counts[name] for counts in found) for name in names] + [float(len(found))]
        if dist.is_available() and dist.is_initialized():
            device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
            tensor = torch.tensor(totals, dtype=torch.float64, device=device)
            dist.all_reduce(tensor)
            totals = tensor.tolist()
        whole = divisors(dict(zip(names, totals[:-1], strict=True)))
        self.mean = {name: value / totals[-1] for name, value in whole.items()}


def positive(config: Any, *names: str) -> None:
    """Check that settings are above 0.

    Raises:
        ConfigError: One is not; it is named.
    """
    for name in names:
        if getattr(config, name) <= 0:
            raise ConfigError(f"{type(config).__name__}.{name} is {getattr(config, name)}; a number above 0 is right")


def target_places(targets: Targets | None, batch: int, device: torch.device) -> Tensor:
    """Give each picture's share of its square canvas, height and width [B, 2]; without targets the canvas is all picture."""
    if targets is None:
        return torch.ones(batch, 2, device=device)
    whole = torch.ones(2)
    return torch.stack([target.get("picture", whole).to(device, torch.float32) for target in targets])
