"""Losses on images that are not trained on, batch by batch: what a head has learnt, and what an encoder gains under frozen heads.

RUN/held_out.jsonl has a line for each task and time: {"step", "task", "loss", "terms", "batches"}. The batches are the same each time, with the
same points of the matcher, so that two times (or two runs) can be compared in pairs.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from encoders.visft_features import TaskData
from encoders.visft_mixture import collate_items
from mmkit.checkpoint import atomic_write
from mmkit.errors import DataError
from mmkit.ranks import gather
from mmkit.records import read_jsonl, repair

FILE = "held_out.jsonl"
LossOf = Callable[[str, dict[str, Any]], tuple[Tensor, Mapping[str, Tensor]]]


class HeldOut:
    """The held-out batches of some tasks, and their log.

    Args:
        data: By task; the first view of each picture is taken.
        batch_size: Images at once.
        folder: The run's.
        rank, ranks: Batches are dealt to the ranks.

    Attributes:
        first: Each task's loss at step 0: what `divide_losses` divides by. Plain data, for `Run.keep`.
    """

    def __init__(self, data: Mapping[str, TaskData], batch_size: int, folder: Path, rank: int = 0, ranks: int = 1) -> None:
        self.data, self.batch_size, self.folder, self.rank, self.ranks = dict(data), batch_size, folder, rank, ranks
        self.first: dict[str, float] = {}
        self._written: set[tuple[int, str]] = set()

    def state_dict(self) -> dict[str, float]:
        """Give what a resumed run has to know."""
        return dict(self.first)

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Take it back."""
        self.first = dict(state)

    def begin(self, step: int) -> None:
        """Take lines after `step` out of the log, since those steps will be done again; a run that begins measures step 0 anew, too."""
        file = self.folder / FILE
        if self.rank == 0 and file.is_file():
            repair(file)
            kept = [row for row in read_jsonl(file) if row["step"] <= step > 0]
            atomic_write(file, "".join(json.dumps(row) + "\n" for row in kept))
            self._written = {(row["step"], row["task"]) for row in kept}

    @torch.no_grad()
    def measure(self, step: int, loss_of: LossOf, device: torch.device, **more: Any) -> dict[str, float]:
        """Compute all losses and write them down. All ranks take part.

        Args:
            step: Steps done.
            loss_of: Gives loss and terms of a task's batch, heads asleep.
            device: Where the batches go.
            more: Other values for the first task's line (how far the encoder has moved).

        Returns:
            The mean over batches, by task.
        """
        found: dict[str, float] = {}
        for task, data in self.data.items():
            starts = range(0, len(data), self.batch_size)
            mine = {}
            for number in range(self.rank, len(starts), self.ranks):
                indices = range(starts[number], min(len(data), starts[number] + self.batch_size))
                items = [item for item in (data.get(0, index) for index in indices) if item is not None]
                if items:
                    loss, terms = loss_of(task, to_device(collate_items(items), device))
                    mine[number] = {"loss": float(loss), **{name: float(value) for name, value in terms.items()}}
            rows = [row for _, row in sorted(pair for part in gather(mine) for pair in part.items())]
            if not rows:
                raise DataError(f"none of the {len(data)} held-out images of {task} can be read")
            means = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
            found[task] = means.pop("loss")
            line = {"step": step, "task": task, "loss": found[task], "terms": means, "batches": [row["loss"] for row in rows], **more}
            more = {}
            if self.rank == 0 and (step, task) not in self._written:
                self._written.add((step, task))
                with open(self.folder / FILE, "a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
        if not self.first:
            self.first = dict(found)
        return found


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Move a collated batch."""
    return {
        name: value.to(device)
        if isinstance(value, Tensor)
        else [{key: part.to(device) for key, part in target.items()} for target in value]
        for name, value in batch.items()
    }
