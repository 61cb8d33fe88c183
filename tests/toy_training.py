"""A training of milliseconds with everything that goes wrong in real ones: dropout, random augmentation, frozen parts, uneven weights.

Also a script, so that tests can start it under torchrun and deepspeed and kill it.
"""

import json
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmkit.config import cli_entry, load_config
from mmkit.errors import DataError
from mmkit.optim import cosine_schedule, make_ema, param_groups
from mmkit.run import Run, RunConfig
from mmkit.trainable import freeze


@dataclass
class ToySettings:
    """Settings of the toy."""

    run: RunConfig = field(default_factory=RunConfig)
    lr: float = 0.05
    dropout: float = 0.0
    kill_at: int = field(default=-1, metadata={"free": True})  # step in which the process kills itself, after backward
    signal_at: int = field(default=-1, metadata={"free": True})  # step in which it gets Ctrl-C
    nan_at: int = -1
    bad_item: int = -1
    on_bad: str = "error"
    ema: bool = False


class ToyData:
    """37 noisy points; the number matches no batch size, so batches reach over the end of an epoch."""

    def __init__(self, bad_item: int = -1, on_bad: str = "error") -> None:
        self.bad_item, self.on_bad = bad_item, on_bad

    def __len__(self) -> int:
        return 37

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int] | None:
        if index == self.bad_item:
            if self.on_bad == "skip":
                return None
            raise DataError(f"image_{index}.png is truncated")
        generator = torch.Generator().manual_seed(index)
        noise = 0.1 * torch.randn(6)  # global generator, as torchvision's augmentations use it
        return torch.randn(6, generator=generator) + noise, torch.randn(2, generator=generator), index % 5 + 1


def collate(items: list[Any]) -> dict[str, Tensor]:
    x, y, weight = zip(*items, strict=True)
    return {"x": torch.stack(x), "y": torch.stack(y), "weight": torch.tensor(weight)}


class ToyModel(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 8)
        self.norm = freeze(nn.BatchNorm1d(8))  # awake, its statistics would depend on the micro-batch
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.drop = nn.Dropout(dropout)
        self.last = nn.Linear(8, 2)

    def features(self, x: Tensor) -> Tensor:
        return self.drop(self.frozen(torch.tanh(self.norm(self.first(x)))))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.features(x))


def step_loss(model: ToyModel, batch: dict[str, Tensor]) -> Tensor:
    """Weighted mean error; uses a method of the model, not its forward."""
    error = (model.last(model.features(batch["x"])) - batch["y"]).square().mean(1)
    return (error * batch["weight"]).sum() / batch["weight"].sum()


def main(argv: Sequence[str] | None = None) -> Path:
    settings = load_config(ToySettings, argv)
    run = Run(settings.run, name="toy", settings=settings)
    bare = ToyModel(settings.dropout)
    run.prepare(bare, torch.optim.AdamW(param_groups(bare, settings.lr, 0.01)))
    data = ToyData(settings.bad_item, settings.on_bad)
    run.set_schedule(cosine_schedule(run.plan(data), 0.1))
    ema = make_ema(run.unwrap(), 0.9) if settings.ema else None
    if ema is not None:
        run.keep("ema", ema)
    for batch in run.batches(data, collate, weigh=lambda batch: float(batch["weight"].sum())):
        loss = run.forward(step_loss, batch)
        if run.step == settings.nan_at:
            loss = loss * float("nan")
        if run.step == settings.signal_at:
            os.kill(os.getpid(), signal.SIGINT)
        run.backward(loss)
        if run.step == settings.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        run.log(double=2 * loss, draw=torch.rand((), generator=run.generator))
        if ema is not None and run.updated:
            ema.update(run.unwrap(), step=run.step)
    folder = run.finish()
    if ema is not None:
        (folder / "ema.json").write_text(json.dumps({name: value.tolist() for name, value in ema.state_dict().items()}))
    return folder


if __name__ == "__main__":
    cli_entry(main)
