"""Which samples are in which step: a function of seed and position alone, whatever the ranks, workers, accumulation and restarts.

Epochs follow each other as one endless stream of positions. Position p is item `order(epoch)[p % N]` of epoch `p // N`; step s takes the
positions from s * G to (s + 1) * G, G the global batch. They are dealt to micro-batches and ranks in this order, so nothing is dropped and
nothing is seen twice.
"""

import math
import random
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from mmkit.errors import ConfigError, DataError, MMKitError

Collate = Callable[[list[Any]], Any]


def derive_seed(*parts: int) -> int:
    """Mix whole numbers (seed, epoch, index) into one seed of 63 bits; near inputs give unrelated seeds."""
    return int(np.random.SeedSequence([part % 2**64 for part in parts]).generate_state(1, np.uint64)[0] >> 1)


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's global generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def dataset_length(dataset: Any) -> int:
    """Give the number of items of a dataset, from its `order(0)`, `length` or `len()`.

    Raises:
        DataError: It is empty.
    """
    length = len(dataset.order(0)) if hasattr(dataset, "order") else int(getattr(dataset, "length", 0)) or len(dataset)
    if length < 1:
        raise DataError(f"the data set ({type(dataset).__name__}) is empty: there is nothing to train on")
    return length


@dataclass(frozen=True)
class Layout:
    """How a global batch is dealt: `ranks` processes, each with `accumulation` micro-batches of `micro` samples."""

    micro: int
    accumulation: int
    ranks: int
    rank: int

    @property
    def global_batch_size(self) -> int:
        return self.micro * self.accumulation * self.ranks

    def begin(self, step: int, micro_batch: int) -> int:
        """Give the stream position of this rank's first sample in a micro-batch."""
        return step * self.global_batch_size + (micro_batch * self.ranks + self.rank) * self.micro


class StreamOrder:
    """Turns stream positions into (epoch, index).

    Args:
        dataset: Its `order(epoch) -> list[int]`, where it has one, replaces the permutation; its length must not change between epochs.
        seed: Seed of the permutations.
        group: Sort the samples of so many steps by the data set's `lengths`, so that a step holds samples of like length and less is
            padded. 1 leaves in each step what it would hold anyway, and only deals it by length; 0 is off.
        global_batch_size: Samples in a step, for `group` and `by_modality`.
        by_modality: Fill steps with samples of one kind by the data set's `modalities` (say, with and without an image). Of two kinds, at
            most one step of an epoch is mixed. `group` then sorts within each kind, and steps change places all over the epoch.

    Raises:
        ConfigError: `group` or `by_modality` is set, and the data set says no lengths or modalities, or brings an order of its own.
    """

    def __init__(self, dataset: Any, seed: int, group: int = 0, global_batch_size: int = 1, by_modality: bool = False) -> None:
        self.dataset, self.seed, self.length = dataset, seed, dataset_length(dataset)
        self.group, self.global_batch_size = group, global_batch_size
        self._orders: dict[int, Sequence[int]] = {}
        if group and not hasattr(dataset, "lengths"):
            raise ConfigError(f"run.group_by_length is {group}, and {type(dataset).__name__} says no lengths: set it to 0")
        if by_modality and (not hasattr(dataset, "modalities") or hasattr(dataset, "order")):
            fault = "brings its own order" if hasattr(dataset, "order") else "says no modalities"
            raise ConfigError(f"run.group_by_modality is on, and {type(dataset).__name__} {fault}: set it to false")
        self._lengths = list(dataset.lengths) if group else []
        self._modalities = list(dataset.modalities) if by_modality else []

    def __call__(self, position: int) -> tuple[int, int]:
        epoch, place = divmod(position, self.length)
        if epoch not in self._orders:
            self._orders = {
                kept: order for kept, order in self._orders.items() if kept == epoch - 1
            }  # a batch may reach into the next epoch
            self._orders[epoch] = self._order(epoch)
        return epoch, int(self._orders[epoch][place])

    def _order(self, epoch: int) -> Sequence[int]:
        if hasattr(self.dataset, "order"):
            order: Sequence[int] = self.dataset.order(epoch)
            if len(order) != self.length:
                raise DataError(
                    f"{type(self.dataset).__name__}.order({epoch}) has {len(order)} items, order(0) {self.length}: they must be as many"
                )
            return order
        generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch))
        permutation = torch.randperm(self.length, generator=generator).tolist()
        if self._modalities:
            return self._by_modality(permutation, epoch, generator)
        return self._grouped(permutation, epoch, generator) if self.group else permutation

    def _grouped(self, permutation: list[int], epoch: int, generator: torch.Generator) -> list[int]:
        """Sort by length within windows of `group` steps, then let the steps of a window change places."""
        size = self.global_batch_size
        begin = -epoch * self.length % size  # these complete the last step of the epoch before
        grouped = sorted(permutation[:begin], key=self._lengths.__getitem__)
        for start in range(begin, self.length, self.group * size):
            window = sorted(permutation[start : start + self.group * size], key=self._lengths.__getitem__)
            whole = len(window) // size  # what is left over stays last, or the steps behind it would straddle two lengths
            for step in torch.randperm(whole, generator=generator).tolist():
                grouped += window[step * size : (step + 1) * size]
            grouped += window[whole * size :]
        return grouped

    def _by_modality(self, permutation: list[int], epoch: int, generator: torch.Generator) -> list[int]:
        """Make steps of one kind, and let them change places all over the epoch.

        The most frequent kind also gives what completes the last step of the epoch before, and the unfinished last step of this one, so
        that these are pure too. What the other kinds leave over shares a step with it.
        """
        size = self.global_batch_size
        kinds = {kind: [index for index in permutation if self._modalities[index] == kind] for kind in dict.fromkeys(self._modalities)}
        most, *others = sorted(kinds.values(), key=len, reverse=True)
        whole = [kind[: len(kind) // size * size] for kind in others]
        pool = most + [index for kind, taken in zip(others, whole, strict=True) for index in kind[len(taken) :]]
        begin = -epoch * self.length % size
        head, end = pool[:begin], begin + max(0, self.length - begin) % size
        tail, rest = pool[begin:end], pool[end:]
        pure = max(0, len(most) - end) // size * size
        steps = [step for kind in [rest[:pure], *whole] for step in self._steps(kind)]
        for start in range(pure, len(rest), size):
            mixed = {kind: [index for index in rest[start : start + size] if self._modalities[index] == kind] for kind in kinds}
            steps.append([index for part in mixed.values() for index in self._sorted(part)])
        shuffled = [steps[step] for step in torch.randperm(len(steps), generator=generator).tolist()]
        return self._sorted(head) + [index for step in shuffled for index in step] + self._sorted(tail)

    def _steps(self, indices: list[int]) -> list[list[int]]:
        """Whole steps of samples of one kind, of like length within windows of `group` steps."""
        size = self.global_batch_size
        window = max(1, self.group) * size
        ordered = [index for start in range(0, len(indices), window) for index in self._sorted(indices[start : start + window])]
        return [ordered[start : start + size] for start in range(0, len(ordered), size)]

    def _sorted(self, indices: list[int]) -> list[int]:
        return sorted(indices, key=self._lengths.__getitem__) if self.group else indices


class _MicroBatches:
    """The micro-batches of one rank as lists of (epoch, index): a batch_sampler for DataLoader."""

    def __init__(self, order: StreamOrder, layout: Layout, first_step: int, steps: int) -> None:
        self.order, self.layout, self.first_step, self.steps = order, layout, first_step, steps

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.first_step, self.steps):
            for micro_batch in range(self.layout.accumulation):
                begin = self.layout.begin(step, micro_batch)
                yield [self.order(position) for position in range(begin, begin + self.layout.micro)]

    def __len__(self) -> int:
        return max(0, self.steps - self.first_step) * self.layout.accumulation


@dataclass
class MicroBatch:
    """A collated micro-batch and how many of its samples were kept; or the error that a user can put right."""

    batch: Any = None
    count: int = 0
    skipped: int = 0
    error: Exception | None = None


class _Fetch(Dataset[Any]):
    """Gets and collates whole micro-batches, here or in a worker.

    Global generators are seeded for every item, so random augmentation depends on (seed, epoch, index) and not on which worker did it.
    Errors in data come back as values: torch would wrap a worker's error into a traceback in which the file's name drowns.
    """

    def __init__(self, dataset: Any, collate: Collate, seed: int) -> None:
        self.dataset, self.collate, self.seed = dataset, collate, seed
        self.by_epoch = hasattr(dataset, "get")

    def __getitems__(self, positions: list[tuple[int, int]]) -> list[MicroBatch]:
        try:
            items = [self._item(epoch, index) for epoch, index in positions]
            kept = [item for item in items if item is not None]
            if not kept:
                raise DataError(f"all {len(items)} samples of a micro-batch were skipped, the last being item {positions[-1][1]}")
            return [MicroBatch(self.collate(kept), len(kept), len(items) - len(kept))]
        except (MMKitError, OSError) as error:
            return [MicroBatch(error=error)]

    def __getitem__(self, position: tuple[int, int]) -> MicroBatch:
        return self.__getitems__([position])[0]

    def _item(self, epoch: int, index: int) -> Any:
        seed_everything(derive_seed(self.seed, epoch, index))
        return self.dataset.get(epoch, index) if self.by_epoch else self.dataset[index]


def _only(batches: list[MicroBatch]) -> MicroBatch:
    return batches[0]


def _ignore_interrupt(_: int) -> None:
    """Leave Ctrl-C, which the terminal sends to all processes, to the main one: it needs its workers to finish the step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def micro_batches(
    dataset: Any,
    collate: Collate,
    order: StreamOrder,
    layout: Layout,
    first_step: int,
    steps: int,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[MicroBatch]:
    """Give the micro-batches of one rank from `first_step` on, in order.

    Raises:
        MMKitError, OSError: What `dataset` or `collate` raised, here or in a worker, as it was raised.
        ConfigError: `num_workers` is negative.
    """
    if num_workers < 0:
        raise ConfigError(f"num_workers is {num_workers}; 0 loads in the main process, N in N others")
    loader: DataLoader[Any] = DataLoader(
        _Fetch(dataset, collate, order.seed),
        batch_sampler=_MicroBatches(order, layout, first_step, steps),
        collate_fn=_only,
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=_ignore_interrupt if num_workers else None,
    )
    for found in loader:
        if found.error is not None:
            raise found.error
        yield found


def step_batches(
    source: Iterator[MicroBatch], accumulation: int, weigh: Callable[[Any], float] | None
) -> tuple[list[MicroBatch], list[float], Exception | None]:
    """Get one rank's micro-batches of a step.

    Args:
        source: The micro-batches.
        accumulation: How many are a step.
        weigh: Over how many things the loss of a batch is a mean; None counts samples.

    Returns:
        The micro-batches, their weights, and what went wrong with them. It is not raised: the other ranks have to hear of it.
    """
    found: list[MicroBatch] = []
    weights: list[float] = []
    try:
        for m in range(accumulation):
            found.append(next(source))
            weights.append(float(weigh(found[m].batch)) if weigh is not None else float(found[m].count))
            if not math.isfinite(weights[m]) or weights[m] < 0:
                raise DataError(f"weigh gave {weights[m]} for micro-batch {m + 1} of {accumulation}; a finite number from 0 is right")
    except Exception as error:
        return found, weights, error
    return found, weights, None
