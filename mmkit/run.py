"""Run: the counting around a training step, thin on Hugging Face Accelerate.

A script owns its step; Run owns folders, order of the data, accumulation, weighting, clipping, schedule, precision, ranks, checkpoints,
resume, the NaN stop and the log, and is called by the script:

    run = Run(settings.run, name="uta", settings=settings)
    model, optimizer = run.prepare(model, optimizer)
    run.set_schedule(cosine_schedule(run.plan(dataset), warmup=0.03))
    for batch in run.batches(dataset, collate, weigh=label_tokens):
        loss, terms = run.forward(alignment_step, batch)     # alignment_step(model, batch); see Run.forward
        run.backward(loss, **terms)
        run.log(**terms)
    folder = run.finish()

All randomness of a micro-batch is a function of (seed, step, micro-batch, rank): global generators and `run.generator` are seeded for each.
"""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from mmkit.launch import (
    complete_deepspeed,
    launched,
    make_accelerator,
    read_deepspeed_block,
    shard,
)  # before other users of accelerate, deepspeed

from accelerate.utils import DistributedType, send_to_device  # isort: skip
from torch import Tensor, nn  # isort: skip

from mmkit.batches import (
    Collate,
    Layout,
    MicroBatch,
    StreamOrder,
    dataset_length,
    derive_seed,
    micro_batches,
    seed_everything,
    step_batches,
)
from mmkit.checkpoint import atomic_write
from mmkit.config import to_dict
from mmkit.errors import ConfigError, DataError, TrainingError
from mmkit.manifest import manifest
from mmkit.optim import Schedule, constant_schedule
from mmkit.progress import Progress
from mmkit.ranks import broadcast, common_failure, gather, sum_over_ranks
from mmkit.run_config import RunConfig, accumulation_steps
from mmkit.run_folder import changed_settings, claim_folder, refuse_changes, write_settings
from mmkit.signals import stop_signals
from mmkit.snapshots import load_optimizer, load_plain, load_trained, resume_point, save_snapshot, whole_state
from mmkit.terms import StepTerms

__all__ = ["Run", "RunConfig", "TrainingError"]
LookAhead = Callable[[Iterator[Any]], None]


class Run:
    """One training: its folder, its processes, its counters.

    Args:
        config: How it runs.
        name: What it trains, in progress lines and trackers.
        settings: The script's whole settings, saved as config.yaml.

    Attributes:
        step: Optimizer steps done.
        updated: True after a `backward` that made an optimizer step, until the next micro-batch (the time to update an EMA).
        generator: A CPU generator seeded for the present micro-batch, for masks and the like.
        skipped: Samples of this rank that the data set gave as None (a bad sample it was told to skip).

    Raises:
        ConfigError: The folder holds another run, or the settings contradict each other.
    """

    def __init__(self, config: RunConfig, *, name: str, settings: Any) -> None:
        config.validate()
        if not config.output_dir:
            raise ConfigError("run.output_dir is empty; give the run a folder: --output_dir runs/NAME")
        self.config, self.name, self.settings = config, name, settings
        self.folder = Path(config.output_dir)
        self.begin = time.monotonic()
        block = read_deepspeed_block(config.deepspeed)
        ranks = int(os.environ["WORLD_SIZE"]) if launched() else 1
        self.accumulation = accumulation_steps(config, ranks)
        self.accelerator = make_accelerator(
            config.precision, self.accumulation, block, config.trackers, self.folder, config.find_unused_parameters
        )
        self.deepspeed = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        self.device, self.rank, self.world_size = self.accelerator.device, self.accelerator.process_index, self.accelerator.num_processes
        self.is_main = self.accelerator.is_main_process
        self.layout = Layout(config.micro_batch_size, self.accumulation, self.world_size, self.rank)
        self.step, self.steps, self.updated, self.skipped = 0, config.steps, False, 0
        self.generator = torch.Generator()
        self.schedule: Schedule = constant_schedule()
        self._model: Any = None
        self._optimizer: Any = None
        self._kept: dict[str, Any] = {}
        self._snapshot: Path | None = None
        self._saved_step, self._seconds_before, self._stop_signal = -1, 0.0, 0
        self._weight, self._total, self._micro_batch, self._calls = 1.0, 1.0, 0, 0
        self._batch: Any = None
        self._bad_loss = False
        self._terms = StepTerms(self.folder, self.accumulation, self.rank)
        self._deferred = self.device.type != "cpu"  # there a value that is read makes the host wait: all are read once in a step
        self._grad_norm: float | None = None
        self._open_folder()
        seed_everything(derive_seed(config.seed))
        if block and not self.deepspeed:
            self.print("deepspeed block: not used in a single process; start with `deepspeed SCRIPT ...` for it")

    def print(self, *words: Any) -> None:
        """Print on the first rank only."""
        if self.is_main:
            print(*words, flush=True)

    # ---- the run folder ---------------------------------------------------------------------------------------------------------------

    def _open_folder(self) -> None:
        message = ""
        if self.is_main:
            try:
                claim_folder(self.folder, self.config.resume, self.config.overwrite)
                refuse_changes(self.folder, self.settings)
            except (OSError, ValueError) as error:
                message = str(error)
        message = broadcast(message)  # all ranks stop together, or the others would wait for the first one
        if message:
            raise ConfigError(message)
        if self.config.resume:
            self._snapshot, state = resume_point(self.folder / "checkpoints", self.layout.global_batch_size, self.is_main)
        if self._snapshot is not None:
            self.step, self._saved_step, self._seconds_before = state["step"], state["step"], state["seconds"]
            self.print(f"{self.name}: goes on from {self._snapshot}")
        if self.is_main:
            for key, (before, now) in (changed_settings(self.folder, self.settings) if self._snapshot is not None else {}).items():
                self.print(f"changed since the run began: {key} was {before!r}, is {now!r}")
            write_settings(self.folder, self.settings, self.step)
            atomic_write(self.folder / "manifest.json", json.dumps(self._manifest("running"), indent=1))
        if self.config.trackers:
            self.accelerator.init_trackers(self.name, config={"settings": json.dumps(to_dict(self.settings))})
        self.accelerator.wait_for_everyone()

    def _manifest(self, state: str) -> dict[str, Any]:
        return manifest(
            name=self.name, state=state, step=self.step, seed=self.config.seed, seconds=self.seconds, device=self.device,
            precision=self.config.precision, ranks=self.world_size, global_batch_size=self.layout.global_batch_size,
            deepspeed_stage=self.accelerator.state.deepspeed_plugin.zero_stage if self.deepspeed else None,
        )  # fmt: skip

    @property
    def seconds(self) -> float:
        """Time spent on this run, earlier parts included."""
        return self._seconds_before + time.monotonic() - self.begin

    # ---- before the loop --------------------------------------------------------------------------------------------------------------

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
        """Place the model on its device, wrap it for several ranks, and restore the checkpoint when resuming.

        Under DDP and DeepSpeed the result is a wrapper: call it as a function, or use `Run.forward`; its methods do not synchronise.

        Raises:
            DataError: The checkpoint does not fit the model.
            ConfigError: DeepSpeed is asked for, and a parameter has no dimension.
        """
        if self.deepspeed and (bare := [name for name, parameter in model.named_parameters() if not parameter.dim()]):
            raise ConfigError(f"DeepSpeed cannot send a parameter without a dimension ({', '.join(bare[:3])}): train without run.deepspeed")
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        if self._snapshot is not None and not self.deepspeed:
            load_trained(self._snapshot, model)
        if self.deepspeed:
            c = self.config
            for remark in complete_deepspeed(self.accelerator, model, c.micro_batch_size, self.accumulation, c.precision, c.max_grad_norm):
                self.print(remark)
            shard(self.accelerator, model, c.precision)
        self._model, self._optimizer = self.accelerator.prepare(model, optimizer)
        if self._snapshot is not None:
            load_optimizer(self._snapshot, self.accelerator, self._model, self._optimizer)
        return self._model, self._optimizer

    def unwrap(self) -> Any:
        """Give the bare model, for saving and evaluation."""
        return self.accelerator.unwrap_model(self._model)

    def weights(self) -> dict[str, Tensor] | None:
        """Give the bare model's weights by name, gathered where ZeRO-3 holds them in shares: then on the CPU, and None but on the first rank.

        All ranks must call it.
        """
        return whole_state(self.accelerator, self._model)

    def keep(self, name: str, thing: Any) -> None:
        """Save and restore something else with each checkpoint (an EMA); it has `state_dict()` of plain data, and `load_state_dict`."""
        self._kept[name] = thing
        if self._snapshot is not None:
            thing.load_state_dict(load_plain(self._snapshot / f"kept_{name}.pt"))

    def set_schedule(self, schedule: Schedule) -> None:
        """Let the lr of each group be its `initial_lr` times `schedule(step)`; without it the lr is constant."""
        self.schedule = schedule

    def plan(self, dataset: Any) -> int:
        """Give the number of steps: `steps`, or what `epochs` means for this data set.

        Raises:
            ConfigError: Neither is set.
        """
        self.steps = self.config.steps or math.ceil(self.config.epochs * dataset_length(dataset) / self.layout.global_batch_size)
        if self.steps < 1:
            raise ConfigError("run.steps and run.epochs are both 0: say how long to train")
        return self.steps

    # ---- the loop ---------------------------------------------------------------------------------------------------------------------

    def batches(
        self, dataset: Any, collate: Collate, weigh: Callable[[Any], float] | None = None, look_ahead: LookAhead | None = None
    ) -> Iterator[Any]:
        """Give micro-batches on the device until all steps are done.

        Args:
            dataset: Items come from `dataset.get(epoch, index)` if it has that, else from `dataset[index]`. None is a sample to skip.
            collate: List of items to a batch.
            weigh: Over how many things (label tokens, kept patches) the loss of a batch is a mean. The default is its samples.
            look_ahead: Called before each step with its micro-batches, for losses that need all of them at once (contrastive negatives):
                each comes on the device and with the randomness that it will have again when its turn comes.

        Raises:
            TrainingError: A loss was not finite.
            DataError: A step weighs nothing.
            SystemExit: 130 after Ctrl-C, 143 after SIGTERM; the step is finished and a checkpoint written before.
        """
        steps = self.plan(dataset)
        c = self.config
        order = StreamOrder(dataset, c.seed, c.group_by_length, self.layout.global_batch_size, c.group_by_modality)
        progress = Progress(self.name, steps, self.step, self.layout.global_batch_size, self.is_main)
        found = micro_batches(dataset, collate, order, self.layout, self.step, steps, c.num_workers, self.device.type == "cuda")
        with stop_signals(self._asked_to_stop):
            try:
                while self.step < steps:
                    yield from self._one_step(*step_batches(found, self.accumulation, weigh), look_ahead)
                    self._end_step(progress)
            finally:
                progress.close()
                if hasattr(found, "close"):
                    found.close()

    def _one_step(
        self, found: list[MicroBatch], weights: list[float], failure: Exception | None, look_ahead: LookAhead | None
    ) -> Iterator[Any]:
        mine = [math.fsum(weights), float(self._stop_signal), float(failure is not None)]
        self._total, stop, failed = sum_over_ranks(mine, self.device)
        if failed:
            raise common_failure(failure)
        if stop:
            self._stop(int(self._stop_signal or max(gather(self._stop_signal))))
        if self._total == 0:
            raise DataError(
                f"step {self.step + 1}: nothing in its {self.layout.global_batch_size} samples has weight (no label, no kept patch)"
            )
        for group in self._optimizer.param_groups:
            group["lr"] = group["initial_lr"] * self.schedule(self.step)
        self._terms.begin(self.step + 1)
        self._grad_norm = None
        if look_ahead is not None:
            look_ahead(self._seeded(item.batch, m) for m, item in enumerate(found))
        for m, (item, weight) in enumerate(zip(found, weights, strict=True)):
            self.skipped += item.skipped
            self._micro_batch, self._weight, self._calls, self.updated, self._batch = m, weight, 0, False, item.batch
            with self.accelerator.accumulate(self._model):
                yield self._seeded(item.batch, m)
            if self._bad_loss:
                self._check(name_loss=True)
            if self._calls != 1:
                raise RuntimeError(f"run.backward was called {self._calls} times for a micro-batch of run.batches; once is right")

    def _seeded(self, batch: Any, micro_batch: int) -> Any:
        """Give a micro-batch on the device, with its own randomness."""
        place = derive_seed(self.config.seed, 1, self.step, micro_batch * self.world_size + self.rank)
        seed_everything(place)
        self.generator.manual_seed(place)
        return send_to_device(batch, self.device, non_blocking=True)

    def forward(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call `function(bare_model, *args, **kwargs)` through the wrapper, with its synchronisation and precision.

        A method of the model (`run.forward(VisionEncoder.tokens, images, keep)`) or a loss that needs the model's parts goes this way:
        under DDP and DeepSpeed only a call of the wrapper itself gathers and reduces.
        """
        bare = self.unwrap()

        def inner(*inner_args: Any, **inner_kwargs: Any) -> Any:
            with self.accelerator.autocast():
                return function(bare, *inner_args, **inner_kwargs)

        before = bare.__dict__.get("forward")
        bare.forward = inner
        try:
            return self._model(*args, **kwargs)
        finally:
            del bare.forward
            if before is not None:
                bare.forward = before

    def backward(self, loss: Tensor, **terms: Tensor | float) -> None:
        """Add the gradient of a micro-batch; with the last one of the step, clip, step and zero.

        Args:
            loss: Mean over what `weigh` counts in the batch, []. It is rescaled to its share of the whole step.
            terms: Its parts by name; only checked, so that a NaN is named before the optimizer sees it.

        Raises:
            TrainingError: A term or the gradient is not finite. A loss that is not waits for `log` or the next batch to name its term.
                On an accelerator this is found out once in a step, before the optimizer.
        """
        self._calls += 1
        self._add(terms, logged=False)
        self._add({"loss": loss}, logged=True)
        sync, early = self.accelerator.sync_gradients, not self._deferred
        if early or (sync and self.deepspeed):  # DeepSpeed's backward makes the optimizer step too
            _, bad = self._check(together=not early)
            if bad:
                return
        # Accelerate (or DeepSpeed's engine) divides by the accumulation, DDP (or the engine) by the ranks.
        self.accelerator.backward(loss * (self._weight / self._total * self.accumulation * self.world_size))
        if not sync:
            return
        limit = self.config.max_grad_norm or math.inf
        norm = self.accelerator.clip_grad_norm_(self._model.parameters(), limit)  # under DeepSpeed it only tells the norm
        self._grad_norm, bad = self._check(norm)
        if bad:
            return
        if self._grad_norm is not None and not math.isfinite(self._grad_norm) and self.config.precision != "fp16":  # it skips such steps
            raise self._terms.refuse_gradient(self._grad_norm, self.unwrap())
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.updated = True

    def log(self, **terms: Tensor | float) -> None:
        """Add terms of this micro-batch to the step's line; they are averaged as the loss is. `loss` itself is there already.

        Raises:
            TrainingError: One is not finite.
        """
        self._add({name: value for name, value in terms.items() if name != "loss"}, logged=True)
        self._add({name: value for name, value in terms.items() if name == "loss"}, logged=False)
        if self._bad_loss or not self._deferred:
            self._check(name_loss=True)

    def _add(self, values: dict[str, Tensor | float], logged: bool) -> None:
        self._terms.add(values, self._weight, self._micro_batch + 1, self._batch, logged)

    def _check(self, norm: Any = None, *, name_loss: bool = False, together: bool = False) -> tuple[float | None, bool]:
        """Read what was added, and the gradient's norm; stop at a value that is not finite.

        A bad loss of the present micro-batch waits for a part that names it, which may come with `log`, unless `name_loss`: then this
        gives True. `together` asks the other ranks, too, and stops for a bad value of theirs.
        """
        found, any_bad = self._terms.read(norm, together)
        bad = self._terms.bad()
        if bad is None and any_bad:
            raise TrainingError(f"a loss of another rank is not finite at step {self.step + 1}: that rank names it")
        present = bad is not None and (bad.step, bad.micro_batch) == (self.step + 1, self._micro_batch + 1)
        if bad is not None and (name_loss or bad.name != "loss" or not present):
            raise self._terms.refuse(bad)
        self._bad_loss = bad is not None
        return found, self._bad_loss

    # ---- after a step -----------------------------------------------------------------------------------------------------------------

    def _end_step(self, progress: Progress) -> None:
        self.step += 1
        writes = self.step % self.config.log_every == 0 or self.step == self.steps
        saves = self.step == self.steps or bool(self.config.save_every and self.step % self.config.save_every == 0)
        if writes:
            self._write_row()
        progress.update(self.step, self._terms.last_loss())
        if saves:
            self.save()

    def _write_row(self) -> None:
        self._check(name_loss=True)
        means = self._terms.means()
        row: dict[str, Any] = {
            "step": self.step,
            "samples_seen": self.step * self.layout.global_batch_size,
            **{name: value for name, value in means.items() if math.isfinite(value)},
            "lr": max(group["lr"] for group in self._optimizer.param_groups),
            "grad_norm": self._grad_norm,
            "seconds": round(self.seconds, 3),
        }
        if self.is_main:
            with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        if self.config.trackers:
            self.accelerator.log({name: value for name, value in row.items() if value is not None}, step=self.step)

    def save(self) -> None:
        """Write a checkpoint of the present step, unless there is one."""
        if self._saved_step == self.step or self._model is None:
            return
        size = self.layout.global_batch_size
        counters = {"step": self.step, "samples_seen": self.step * size, "seconds": self.seconds, "global_batch_size": size}
        self._check(name_loss=True)
        kept = self.config.keep_checkpoints
        save_snapshot(self.folder / "checkpoints", self.accelerator, self._model, self._optimizer, self._kept, counters, kept)
        self._saved_step = self.step

    def _asked_to_stop(self, number: int) -> None:
        self._stop_signal = number
        self.print(f"\n{self.name}: stops after this step and saves; again to stop at once")

    def _stop(self, number: int) -> None:
        self.save()
        if self.is_main:
            atomic_write(self.folder / "manifest.json", json.dumps(self._manifest("interrupted"), indent=1))
        self.print(
            f"{self.name}: stopped after step {self.step} of {self.steps}, saved in {self.folder}; the same command with --resume goes on"
        )
        sys.exit(128 + number)

    def finish(self) -> Path:
        """Write the last checkpoint and the manifest.

        Returns:
            The run folder.

        Raises:
            SystemExit: Ctrl-C or SIGTERM came in the last step: all is done and written, but whoever called may have more to do.
        """
        self.save()
        if self.is_main:
            atomic_write(self.folder / "manifest.json", json.dumps(self._manifest("finished"), indent=1))
        if self.config.trackers:
            self.accelerator.end_training()
        self.accelerator.wait_for_everyone()
        if self._stop_signal:
            self.print(f"{self.name}: finished, with its last step")
            sys.exit(128 + self._stop_signal)
        return self.folder
