"""Progress of a training: a bar on a terminal, a line every ten seconds anywhere else."""

import sys
import time
from typing import Any

from tqdm import tqdm

LINE_SECONDS = 10.0


class Progress:
    """Counts steps of one run.

    Args:
        name: What is trained, put before the bar.
        steps: The whole length.
        done: Steps that an earlier run has done.
        batch: Samples in a step.
        show: False on all ranks but the first.
    """

    def __init__(self, name: str, steps: int, done: int, batch: int, show: bool = True) -> None:
        self.name, self.steps, self.batch, self.show = name, steps, batch, show
        self.start, self.start_step, self.last_line = time.monotonic(), done, time.monotonic()
        self.bar: Any = None
        if show and sys.stderr.isatty():
            layout = "{desc} {percentage:3.0f}%|{bar}| step {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}"
            self.bar = tqdm(total=steps, initial=done, desc=name, bar_format=layout, dynamic_ncols=True, smoothing=0.05)

    def update(self, step: int, loss: Any) -> None:
        """Show that `step` steps are done. `loss` is a number or a tensor, read only when something is drawn."""
        if not self.show:
            return
        now = time.monotonic()
        if self.bar is not None:
            if now - self.last_line > 0.2 or step == self.steps:
                self.last_line = now
                self.bar.set_postfix_str(f"loss {float(loss):.4f}, {self._rate(step, now):.0f} samples/s", refresh=False)
            self.bar.update(step - self.bar.n)
        elif now - self.last_line >= LINE_SECONDS or step == self.steps:
            self.last_line = now
            left = (now - self.start) / max(1, step - self.start_step) * (self.steps - step)
            rest = f"about {_duration(left)} left" if step < self.steps else f"done in {_duration(now - self.start)}"
            print(
                f"{self.name}: step {step}/{self.steps}  loss {float(loss):.4f}  {self._rate(step, now):.0f} samples/s  {rest}", flush=True
            )

    def close(self) -> None:
        """Leave the bar where it is."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def _rate(self, step: int, now: float) -> float:
        return (step - self.start_step) * self.batch / max(1e-9, now - self.start)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
