"""Which task a step of stage 2 has, and which images: functions of (seed, step) alone, the same on all ranks and after a resume.

A sample of `Run` is a unit: one image, or as many as the task says (the paper's 8 images for detection, 8 for segmentation and 64 for
captions are 8 units, of 1, 1 and 8 images). Each task walks through its own endless stream of images, from where its last step ended.
"""

import bisect
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from encoders.heads.base import StepCounts, Targets
from encoders.heads.registry import HEADS
from encoders.visft_features import TaskData
from mmkit.batches import StreamOrder, derive_seed
from mmkit.errors import ConfigError

Mix = Literal["step", "micro_batch"]
_TASK, _IMAGES = 11, 12  # purposes of seeds


class TaskMixture:
    """The data of stage 2, in an order of its own.

    Args:
        data: The images of each task.
        weights: How often each task comes; they need not add up to 1.
        images: Images of a unit, by task.
        steps: How many steps there will be at most.
        chunk: Units that share a task: the global batch, or a micro-batch on all ranks.
        global_batch_size: Units of a step.
        seed: The run's.

    Raises:
        ConfigError: A weight is negative, or none is above 0.
    """

    def __init__(
        self,
        data: Mapping[str, TaskData],
        weights: Mapping[str, float],
        images: Mapping[str, int],
        *,
        steps: int,
        chunk: int,
        global_batch_size: int,
        seed: int,
    ) -> None:
        self.data, self.images, self.chunk = dict(data), images, chunk
        self.length = steps * global_batch_size
        self.drawn = draw_tasks({task: weights[task] for task in data}, -(-self.length // chunk), seed)
        self.before: list[int] = []  # chunks of the same task that came before
        seen = dict.fromkeys(data, 0)
        for task in self.drawn:
            self.before.append(seen[task])
            seen[task] += 1
        numbers = {task: number for number, task in enumerate(HEADS)}  # not of this run's tasks: leaving one out moves no other's images
        self.streams = {task: StreamOrder(found, derive_seed(seed, _IMAGES, numbers[task])) for task, found in data.items()}

    def order(self, epoch: int) -> Sequence[int]:
        """Give the units as they are."""
        return range(self.length)

    def get(self, epoch: int, index: int) -> dict[str, Any] | None:
        """Give a unit: {"task", "items"}; None where all its pictures were left out."""
        chunk, place = divmod(index, self.chunk)
        task = self.drawn[chunk]
        first = (self.before[chunk] * self.chunk + place) * self.images[task]
        found = [self.data[task].get(*self.streams[task](position)) for position in range(first, first + self.images[task])]
        items = [item for item in found if item is not None]
        return {"task": task, "items": items} if items else None


def draw_tasks(weights: Mapping[str, float], chunks: int, seed: int) -> list[str]:
    """Draw the task of each chunk, from (seed, chunk) alone.

    Raises:
        ConfigError: A weight is negative, or none is above 0.

    Source: ViSFT: captions 0.4, detection 0.3, segmentation 0.3. There rank 0 draws and tells the others; a resumed run draws others.
    """
    total = sum(weights.values())
    if min(weights.values()) < 0 or not total > 0:
        raise ConfigError(f"the tasks' weights are {dict(weights)}; numbers from 0, one of them above, are right")
    tasks, edges = list(weights), list(itertools.accumulate(weights.values()))
    return [tasks[bisect.bisect_right(edges, derive_seed(seed, _TASK, chunk) / 2**63 * total)] for chunk in range(chunks)]


def collate_items(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Stack "pixels" or "features" of one task; "targets" stay a list."""
    inputs = "features" if "features" in items[0] else "pixels"
    return {inputs: torch.stack([item[inputs] for item in items]), "targets": [item["target"] for item in items]}


def collate_units(units: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Stack the images of units of one task."""
    return {"task": units[0]["task"], **collate_items([item for unit in units for item in unit["items"]])}


class TaskCounts:
    """`look_ahead` for micro-batches of several tasks: what each task's loss is a mean over, from its own micro-batches of the step.

    Args:
        heads: By task.
    """

    def __init__(self, heads: Mapping[str, Any]) -> None:
        self.heads = heads
        self._step = StepCounts(self._count)

    def _count(self, batch: Mapping[str, Any]) -> dict[str, float]:
        targets: Targets = batch["targets"]
        found = {f"{task}.{name}": 0.0 for task, head in self.heads.items() for name in (*head.mean_over, "micro_batches")}
        counts = {**self.heads[batch["task"]].counts(targets), "micro_batches": 1.0}
        return found | {f"{batch['task']}.{name}": value for name, value in counts.items()}

    def __call__(self, batches: Any) -> None:
        """Count the micro-batches of the step that begins."""
        self._step(batches)

    def of(self, task: str) -> dict[str, float]:
        """Give the divisors of a micro-batch of this task."""
        share = self._step.mean[f"{task}.micro_batches"]
        return {name: self._step.mean[f"{task}.{name}"] / share for name in self.heads[task].mean_over}
