"""The loss terms of a step: kept where they were computed, read with one transfer, refused by name when one is not finite."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from mmkit.errors import TrainingError
from mmkit.ranks import gather


@dataclass
class Term:
    """One value of one micro-batch.

    Attributes:
        name: "loss", or what the script calls it.
        value: A tensor until it is read, then a number.
        weight: Of its micro-batch, for the mean over the step.
        step: From 1.
        micro_batch: From 1.
        batch: The micro-batch, saved if the value is not finite.
        logged: False for values that are only checked.
    """

    name: str
    value: Tensor | float
    weight: float
    step: int
    micro_batch: int
    batch: Any
    logged: bool


class StepTerms:
    """Collects the terms of a step on one rank.

    Reading a value of an accelerator makes the host wait for all that was queued before it. So nothing is read until `read`, which brings
    everything over at once; terms that were added after a step's `read` are read with the next one.

    Args:
        folder: The run folder, for batches that broke the training.
        accumulation: Micro-batches in a step, for messages.
        rank: This process, for messages.
    """

    def __init__(self, folder: Path, accumulation: int, rank: int) -> None:
        self.folder, self.accumulation, self.rank = folder, accumulation, rank
        self.terms: list[Term] = []
        self.step = 0

    def begin(self, step: int) -> None:
        """Begin a step (from 1); what was not read of the one before stays to be read."""
        self.step = step
        self.terms = [term for term in self.terms if isinstance(term.value, Tensor)]

    def add(self, values: Mapping[str, Tensor | float], weight: float, micro_batch: int, batch: Any, logged: bool) -> None:
        """Add terms of a micro-batch (from 1); `batch` is what it was made from."""
        for name, value in values.items():
            kept = value.detach() if isinstance(value, Tensor) else float(value)
            self.terms.append(Term(name, kept, weight, self.step, micro_batch, batch, logged))

    def read(self, norm: Tensor | float | None = None, together: bool = False) -> tuple[float | None, bool]:
        """Bring all values to the host.

        Args:
            norm: The gradient's norm, read along.
            together: Ask the other ranks whether they have a value that is not finite; all must call it.

        Returns:
            The norm as a number, and whether any rank has a bad value (without `together`, whether this one has).
        """
        unread = [term for term in self.terms if isinstance(term.value, Tensor)]
        values = [term.value for term in unread] + ([norm] if isinstance(norm, Tensor) else [])
        device = next((value.device for value in values if isinstance(value, Tensor)), torch.device("cpu"))
        numbers: list[float] = []
        if values:
            dtype = torch.float64 if device.type != "mps" else torch.float32
            stacked = torch.stack([value.detach().to(device, dtype).reshape(()) for value in values if isinstance(value, Tensor)])
            if together:
                flag = (~torch.isfinite(stacked[: len(unread)]).all()).to(dtype) + float(self.bad() is not None)
                dist.all_reduce(flag)
                stacked = torch.cat([stacked, flag.reshape(1)])
            numbers = stacked.tolist()
        any_bad = together and bool(numbers.pop())
        for term, number in zip(unread, numbers, strict=False):
            term.value = number
        if isinstance(norm, Tensor):
            norm = numbers[-1]
        return norm, any_bad or self.bad() is not None

    def bad(self) -> Term | None:
        """Give the first read term that is not finite; within its micro-batch a part before the loss, as it says more."""
        wrong = [term for term in self.terms if not isinstance(term.value, Tensor) and not math.isfinite(term.value)]
        return min(wrong, key=lambda term: (term.step, term.micro_batch, term.name == "loss"), default=None)

    def refuse(self, term: Term) -> TrainingError:
        """Make the error about a term that is not finite, and save its batch."""
        same = [other for other in self.terms if (other.step, other.micro_batch) == (term.step, term.micro_batch)]
        others = {other.name: other.value for other in same if other.name != term.name and not isinstance(other.value, Tensor)}
        values = ", ".join(f"{name} {value:.4g}" for name, value in others.items())
        where = f"step {term.step}, micro-batch {term.micro_batch} of {self.accumulation}, rank {self.rank}"
        said = f"loss term '{term.name}' is {term.value} at {where}; {values + '; ' if values else ''}"
        return TrainingError(said + self._dump(term.batch, term.step, term.micro_batch))

    def refuse_gradient(self, norm: float, model: nn.Module) -> TrainingError:
        """Make the error about a gradient that is not finite, and save the step's last batch."""
        names = (name for name, p in model.named_parameters() if p.grad is not None and not bool(torch.isfinite(p.grad).all()))
        last = self.terms[-1]
        return TrainingError(
            f"the gradient is {norm} at step {last.step}, rank {self.rank}, first in {next(names, 'an unknown tensor')}; "
            f"{self._dump(last.batch, last.step, last.micro_batch)}"
        )

    def _dump(self, batch: Any, step: int, micro_batch: int) -> str:
        """Save the batch that broke the training, and say where."""
        path = self.folder / f"nan_{step:08d}" / f"batch_{self.rank}_{micro_batch - 1}.pt"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(batch, path)
        except (OSError, RuntimeError, TypeError, AttributeError) as error:
            return f"the batch could not be saved ({error})"
        return f"the batch is in {path}"

    def means(self) -> dict[str, float]:
        """Average the step's logged terms by weight over micro-batches and ranks; all ranks must call it, after `read`."""
        mine: dict[str, tuple[float, float]] = {}
        logged = [term for term in self.terms if term.logged and term.step == self.step]
        for name in dict.fromkeys(term.name for term in logged):
            same = [term for term in logged if term.name == name]
            mine[name] = (math.fsum(float(term.value) * term.weight for term in same), math.fsum(term.weight for term in same))
        ranks = gather(mine)
        means = {}
        for name in dict.fromkeys(name for terms in ranks for name in terms):
            weight = math.fsum(terms[name][1] for terms in ranks if name in terms)
            means[name] = math.fsum(terms[name][0] for terms in ranks if name in terms) / weight if weight else math.nan
        return means

    def last_loss(self) -> Tensor | float:
        """Give the loss of the newest micro-batch, as it was kept."""
        return next(term.value for term in reversed(self.terms) if term.name == "loss")
