"""What evaluations share: an output folder that can be gone on with, processes that divide the work, figures with intervals.

ranks = Ranks()                                       # alone, or under torchrun, accelerate launch, deepspeed
folder = EvaluationFolder(out, "eval_zeroshot", resume=..., overwrite=...)
folder.refuse()                                       # before anything is loaded
folder.open(identity, ranks)
with part_records(folder.path, ranks) as (records, done):
    for item in ranks.share(todo): records.append(answer(item))
rows = merge_parts(folder.path, order, ranks)
"""

import atexit
import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import PartialState

from mmkit.checkpoint import atomic_write
from mmkit.errors import DataError
from mmkit.launch import launched
from mmkit.manifest import manifest
from mmkit.records import Records, read_jsonl, repair
from mmkit.stats import Z95, wilson

T = TypeVar("T")
ANSWERS = "answers"
OWN_FILES = ("answers.jsonl", "summary.json", "manifest.json")
PATIENCE = timedelta(hours=6)  # a slow disk under one process must not end the others


class Ranks:
    """The processes of one evaluation; one, unless a launcher started several.

    Attributes:
        index, count: This process and how many there are.
        device: Where this process computes.
    """

    def __init__(self, device: str = "auto") -> None:
        self._state: Any = None
        if launched():
            accelerated = torch.cuda.is_available() and device in ("auto", "cuda")
            self._state = PartialState(cpu=not accelerated, timeout=PATIENCE)
            atexit.register(_leave)
        self.index: int = self._state.process_index if self._state else 0
        self.count: int = self._state.num_processes if self._state else 1
        if self._state and device in ("auto", "cuda"):
            self.device = torch.device(self._state.device)
        else:
            self.device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)

    @property
    def first(self) -> bool:
        """True in the process that writes what is common and talks."""
        return self.index == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Give this process's part of the work: every count-th item, so that classes of unequal size are spread."""
        return items[self.index :: self.count]

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.count > 1:
            self._state.wait_for_everyone()

    @contextmanager
    def first_goes_first(self) -> Iterator[None]:
        """Let process 0 do the block, then the others: they find in the cache what it made."""
        if not self.first:
            self.wait()
        yield
        if self.first:
            self.wait()


def _leave() -> None:
    """Close the process group in order, before the interpreter ends."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class EvaluationFolder:
    """An output folder: refused, gone on with, or thrown away; its manifest says what its answers depend on.

    Args:
        path: The folder.
        name: What made it ("eval_zeroshot").
        resume: Go on with the answers in it.
        overwrite: Throw them away.
        own: Files that belong to it and go when it is thrown away, beside those of every evaluation.
        records: What its processes write in parts: answers, and what they work out before them.
    """

    def __init__(
        self, path: Path | str, name: str, *, resume: bool = False, overwrite: bool = False, own: Sequence[str] = (),
        records: Sequence[str] = (ANSWERS,),
    ) -> None:  # fmt: skip
        self.path, self.name, self.resume, self.overwrite, self.records = Path(path), name, resume, overwrite, records
        self.own = (*OWN_FILES, *own, *(f"{kind}.jsonl" for kind in records))
        self.identity: dict[str, Any] = {}
        self._began = time.monotonic()

    def refuse(self) -> None:
        """Look at the folder before anything is loaded.

        Raises:
            DataError: It holds something else, or an evaluation and neither `resume` nor `overwrite` was asked for.
        """
        if not self.path.exists() or (self.path.is_dir() and not any(self.path.iterdir())):
            return
        if not (self.path / "manifest.json").is_file():
            raise DataError(f"--out {self.path} exists and holds no evaluation (no manifest.json in it); give another folder")
        if not (self.resume or self.overwrite):
            raise DataError(f"--out {self.path} holds an evaluation already; --resume goes on with it, --overwrite throws it away")

    def open(self, identity: Mapping[str, Any], ranks: Ranks) -> None:
        """Begin the folder, or go on in it if it holds answers of the same evaluation.

        Args:
            identity: All that an answer depends on: answers of another identity must not be mixed with these.
            ranks: The processes; the first one writes, and all look before it does.

        Raises:
            DataError: What is in the folder was made with another identity; the message names the difference.
        """
        self.identity = dict(identity)
        path = self.path / "manifest.json"
        if path.is_file() and not self.overwrite:
            before = json.loads(path.read_text(encoding="utf-8")).get("identity", {})
            changed = [f"{key} was {before.get(key)!r}, is {value!r}" for key, value in identity.items() if before.get(key) != value]
            if changed:
                raise DataError(f"--out {self.path} holds another evaluation: {'; '.join(changed)}. Give another folder, or --overwrite")
        ranks.wait()
        if ranks.first:
            if self.overwrite:
                for name in self.own:
                    (self.path / name).unlink(missing_ok=True)
                for kind in self.records:
                    for part in _parts(self.path, kind):
                        part.unlink()
            self.path.mkdir(parents=True, exist_ok=True)
            self._write_manifest("running")
            for kind in self.records:
                gather_parts(self.path, kind)
        ranks.wait()

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write the summary, then a manifest that says finished."""
        atomic_write(self.path / "summary.json", json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
        self.close()

    def close(self) -> None:
        """Say finished where there is nothing to sum up (a test split without public answers)."""
        self._write_manifest("finished")

    def _write_manifest(self, state: str) -> None:
        seconds = time.monotonic() - self._began
        content = manifest(seconds=seconds, name=self.name, state=state, identity=self.identity)
        atomic_write(self.path / "manifest.json", json.dumps(content, indent=1) + "\n")


# ---- answers of several processes ----------------------------------------------------------------------------------------------------


def _parts(folder: Path, kind: str) -> list[Path]:
    return sorted(folder.glob(f"{kind}.rank*.jsonl"))


def gather_parts(folder: Path, kind: str = ANSWERS) -> None:
    """Join what the processes of an earlier start left, drop rows without an answer (they are tried again), mend a half-written end."""
    main, parts = folder / f"{kind}.jsonl", _parts(folder, kind)
    if not main.is_file() and not parts:
        return
    rows: dict[Any, dict[str, Any]] = {}
    changed = bool(parts)
    for path in [main, *parts]:
        if not path.is_file():
            continue
        repair(path)
        found = read_jsonl(path)
        kept = [row for row in found if "missing" not in row]
        changed |= len(kept) != len(found)
        rows |= {row["question_id"]: row for row in kept}
    if changed:
        atomic_write(main, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows.values()))
    for path in parts:
        path.unlink()


@contextmanager
def part_records(folder: Path, ranks: Ranks, kind: str = ANSWERS) -> Iterator[tuple[Records, set[Any]]]:
    """Open the file this process appends to, and give the ids that have a row already (by any process of an earlier start)."""
    main = folder / f"{kind}.jsonl"
    done = {row["question_id"] for row in read_jsonl(main)} if main.is_file() else set()
    ranks.wait()  # nobody appends before everybody has read
    with Records(main if ranks.count == 1 else folder / f"{kind}.rank{ranks.index:04d}.jsonl") as records:
        yield records, done


def merge_parts(folder: Path, order: Sequence[Any], ranks: Ranks, kind: str = ANSWERS) -> list[dict[str, Any]]:
    """Wait for all processes, join their rows into KIND.jsonl in the given order, and give them back (to every process).

    Raises:
        DataError: An id has no row: a process ended early.
    """
    ranks.wait()
    main = folder / f"{kind}.jsonl"
    if ranks.first:
        rows = {row["question_id"]: row for path in [main, *_parts(folder, kind)] if path.is_file() for row in read_jsonl(path)}
        absent = [name for name in order if name not in rows]
        if absent:
            raise DataError(
                f"{folder}: {len(absent)} of {len(order)} items have no answer, the first is {absent[0]}; start again, --resume"
            )
        atomic_write(main, "".join(json.dumps(rows[name], ensure_ascii=False) + "\n" for name in order))
        for path in _parts(folder, kind):
            path.unlink()
    ranks.wait()
    place = {name: number for number, name in enumerate(order)}
    return sorted(read_jsonl(main), key=lambda row: place[row["question_id"]])


# ---- figures -------------------------------------------------------------------------------------------------------------------------


def share_metric(right: int, n: int) -> dict[str, Any]:
    """A share in percent with its Wilson 95 % interval, as summaries hold it."""
    low, high = wilson(right, n)
    return {"value": round(100 * right / n, 4), "ci95": [round(100 * low, 4), round(100 * high, 4)], "n": n}


def mean_of_shares(parts: Sequence[tuple[float, int]]) -> dict[str, Any]:
    """The plain mean of several shares, each of a set of its own: value in percent, normal 95 % interval.

    Args:
        parts: (share in [0, 1], items) of each set, all drawn independently. A share of 0 or 1 counts with the spread of its Wilson
            interval, since a spread of 0 would say that more images could change nothing.
    """
    mean = sum(share for share, _ in parts) / len(parts)
    variance = 0.0
    for share, n in parts:
        low, high = wilson(share * n, n)
        spread = share * (1 - share) / n if 0 < share < 1 else ((high - low) / (2 * Z95)) ** 2
        variance += spread / len(parts) ** 2
    half = Z95 * math.sqrt(variance)
    total = sum(n for _, n in parts)
    return {
        "value": round(100 * mean, 4),
        "ci95": [round(100 * max(0.0, mean - half), 4), round(100 * min(1.0, mean + half), 4)],
        "n": total,
    }


def relative(path: Path | str, start: Path | str) -> str:
    """A path as seen from a folder, so that a summary can travel with what it names."""
    return os.path.relpath(path, start)
