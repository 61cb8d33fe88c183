"""What the processes of a run tell each other. In a single process nothing is sent."""

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from mmkit.errors import DataError


def _alone() -> bool:
    return not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1


def broadcast(value: Any) -> Any:
    """Give every rank what the first one has; `value` counts on the first only."""
    if _alone():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather(value: Any) -> list[Any]:
    """Give every rank the values of all ranks, in rank order."""
    if _alone():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def sum_over_ranks(values: list[float], device: torch.device) -> list[float]:
    """Give every rank the sums of all ranks' numbers.

    Args:
        values: As many on each rank.
        device: Where the process group can add.
    """
    if _alone():
        return values
    tensor = torch.tensor(values, dtype=torch.float64 if device.type != "mps" else torch.float32, device=device)
    dist.all_reduce(tensor)
    return [float(value) for value in tensor.tolist()]


class _GatherRows(torch.autograd.Function):
    """Rows [B, ...] of every rank, in rank order; each rank's loss sends its gradient back to the rank whose rows it used.

    What torch.distributed.nn.all_gather does too, here with a single all-reduce in the backward, on every backend.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        everyone = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, rows.contiguous())
        return torch.cat(everyone)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total.chunk(dist.get_world_size())[dist.get_rank()]


def rows_of_all_ranks(rows: Tensor) -> tuple[Tensor, int]:
    """Give the rows of all ranks, one below the other, and where this rank's begin.

    Args:
        rows: [B, ...], of one shape on all ranks. Where they want a gradient, all ranks' uses of them send it back here.
    """
    if _alone():
        return rows, 0
    if rows.requires_grad and torch.is_grad_enabled():
        gathered: Tensor = _GatherRows.apply(rows)
        return gathered, dist.get_rank() * len(rows)
    everyone = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, rows.contiguous())
    return torch.cat(everyone), dist.get_rank() * len(rows)


def common_failure(failure: Exception | None) -> Exception:
    """Make the error that each rank stops with after one of them has failed; all ranks call it.

    A rank that stopped alone would leave the others waiting in their next collective.

    Returns:
        The rank's own error; on ranks without one, an error with what the first failing rank says.
    """
    messages = gather(f"{failure}" or type(failure).__name__ if failure is not None else "")
    if failure is not None:
        return failure
    rank, message = next((rank, message) for rank, message in enumerate(messages) if message)
    return DataError(f"rank {rank} stopped: {message}")
