"""Webdataset shards with random access: tar files whose members are found by an index, not by reading through.

A sample of a shard is its members with one key (the path up to the first dot of the file's name): `00017.jpg`, `00017.txt`, `00017.json`.

    shards = Shards(["datacomp/{00000..01023}.tar"])
    sample = shards[12]                       # Sample(shard, key, members)
    shards.read(sample, "txt")                # bytes

Why not the `webdataset` package: it streams. A stream knows neither its length nor its n-th sample, and what a worker sees depends on how
many workers and ranks there are. An index (one small file a shard, in the cache folder, made once) gives every sample a number, so that
order, crops and masks are functions of (seed, epoch, index), a resumed run goes on exactly, and ranks and workers change nothing. Reading
stays nearly sequential: `Shards.order` shuffles whole shards, and samples within groups of shards.

Tar files must lie in a file system and must not be compressed: a compressed stream has no places to jump to.
"""

import glob
import hashlib
import os
import re
import tarfile
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError

from mmkit.batches import derive_seed
from mmkit.checkpoint import load_weights, save_weights
from mmkit.errors import DataError

OnBad = Literal["error", "skip"]
Names = Path | str | Sequence[Path | str]
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm")
SKIP_HINT = "\n  --data.on_bad_sample skip leaves such things out, counted and listed"
BLOCK = 512  # bytes; tar counts in them
OPEN_FILES, OPEN_INDICES = 64, 64  # kept open, kept in memory, by each process
GROUP = 16  # shards whose samples are shuffled among each other: 160,000 samples of DataComp
LAYOUT = 1  # of the cached index; another one is made anew


def expand_braces(pattern: str) -> list[str]:
    """Write out "{0000..0099}" (leading zeros count) and "{a,b}"; several in one name multiply.

    Raises:
        DataError: A range runs backwards.
    """
    found = re.search(r"\{([^{}]*)\}", pattern)
    if not found:
        return [pattern]
    before, after = pattern[: found.start()], pattern[found.end() :]
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", found[1])
    if numbers:
        first, last = int(numbers[1]), int(numbers[2])
        if last < first:
            raise DataError(f"{pattern}: {{{found[1]}}} runs backwards; {{0000..0099}} is right")
        middles = [str(number).zfill(len(numbers[1])) for number in range(first, last + 1)]
    else:
        middles = found[1].split(",")
    return [name for middle in middles for name in expand_braces(before + middle + after)]


def is_shard_name(name: Path | str) -> bool:
    """Tell whether a name means tar files ("a.tar", "a.tar.gz", "{00..09}.tar"), not a folder."""
    return bool(re.search(r"\.(tar|tgz)(\.\w+)?$", str(name).lower()))


def holds_shards(name: Path | str) -> bool:
    """Tell whether a name means shards: tar files, or a folder with some and without images beside them."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return is_shard_name(name)
    files = [path.suffix.lower().lstrip(".") for path in folder.rglob("*")]
    return "tar" in files and not any(extension in files for extension in IMAGE_EXTENSIONS)


def find_shards(names: Names) -> list[Path]:
    """Find tar files: names with {00..99} or {a,b}, shell patterns, folders (searched to their depths); sorted in each.

    Raises:
        DataError: A name leads to no file; the message gives the first that is missing.
    """
    if not isinstance(names, str | Path):
        return [path for name in names for path in find_shards(name)]
    text = str(names)
    if re.match(r"(https?|s3|gs|hf|pipe):", text):
        raise DataError(f"{text}: shards are read at random and must lie in a file system; copy them, or mount the place they are in")
    found: list[Path] = []
    for name in expand_braces(os.path.expanduser(text)):
        path = Path(name)
        if path.is_dir():
            found += sorted(path.rglob("*.tar"))
        elif path.is_file():
            found.append(path)
        elif any(sign in name for sign in "*?["):
            found += [Path(match) for match in sorted(glob.glob(name, recursive=True))]
        else:
            raise DataError(f"{name}: there is no such shard{f' (of {text})' if name != text else ''}; give the ones there are")
    if not found:
        raise DataError(f"{text}: no tar file is meant by it; give a folder of shards, or names as in shards/{{0000..0099}}.tar")
    return found


@dataclass(frozen=True)
class Sample:
    """One sample of a shard.

    Attributes:
        shard: The tar file.
        key: What its members' names have in common.
        members: Extension (what follows the first dot, lower case) to offset and size, in bytes.
        names: Extension to the member's full name.
    """

    shard: Path
    key: str
    members: dict[str, tuple[int, int]]
    names: dict[str, str]

    def first(self, extensions: Sequence[str]) -> str | None:
        """Give the first of some extensions that the sample has."""
        return next((extension for extension in extensions if extension in self.members), None)

    def place(self, extension: str) -> str:
        """Name a member, for messages."""
        return f"member '{self.names[extension]}' of {self.shard}"


@dataclass
class ShardIndex:
    """Where the members of one tar file are.

    Attributes:
        shard: The file.
        starts: First member of each sample, and the end [n + 1].
        places: Offset and size of each member [M, 2], bytes.
        names: Member names [M], samples together.
        fault: Why the file ends early or holds nothing; "" for a sound one. The samples before the fault are in the index.
    """

    shard: Path
    starts: np.ndarray
    places: np.ndarray
    names: list[str]
    fault: str = ""

    def __len__(self) -> int:
        return len(self.starts) - 1

    def sample(self, number: int) -> Sample:
        """Give a sample by its number in the shard."""
        members, names, key = {}, {}, ""
        for place in range(int(self.starts[number]), int(self.starts[number + 1])):
            key, extension = split_name(self.names[place])
            members[extension] = (int(self.places[place, 0]), int(self.places[place, 1]))
            names[extension] = self.names[place]
        return Sample(self.shard, key, members, names)


def split_name(name: str) -> tuple[str, str]:
    """Split a member's name into key and extension, as webdataset does: "a/b.seg.png" is "a/b" and "seg.png"."""
    folder, _, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return (f"{folder}/{stem}" if folder else stem), extension.lower()


def scan(shard: Path) -> ShardIndex:
    """Make the index of a tar file by walking over its headers.

    Samples come in the order of their first members; members of one key need not lie together. Members that are no plain files, and names
    without an extension or with a leading dot, are no part of any sample.

    Raises:
        DataError: The file cannot be opened or is no tar file, is compressed, or holds a member twice.
    """
    try:
        members, fault = _walk(shard)
    except (OSError, tarfile.TarError) as error:
        raise DataError(f"shard {shard} cannot be read: {error}") from error
    samples: dict[str, list[tuple[str, int, int]]] = {}
    seen: set[tuple[str, str]] = set()
    for name, offset, size in members:
        key, extension = split_name(name)
        if not extension or key.rpartition("/")[2] == "":
            continue
        if (key, extension) in seen:
            raise DataError(f"shard {shard} holds the member '{name}' twice: which one is meant? Make the shard again")
        seen.add((key, extension))
        samples.setdefault(key, []).append((name, offset, size))
    if not samples and not fault:
        fault = "it is empty: no sample is in it"
    counts = [len(rows) for rows in samples.values()]
    rows = [row for rows in samples.values() for row in rows]
    places = np.array([row[1:] for row in rows], dtype=np.int64).reshape(-1, 2)
    return ShardIndex(shard, np.cumsum([0, *counts], dtype=np.int64), places, [row[0] for row in rows], fault)


def _walk(shard: Path) -> tuple[list[tuple[str, int, int]], str]:
    """Names, offsets and sizes of the plain files in a tar, and what is wrong with its end."""
    total = shard.stat().st_size
    if total == 0:
        return [], "it is empty: 0 bytes"
    with open(shard, "rb") as raw:
        head = raw.read(6)
    packed = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd"}.get(head[:2])
    if packed:
        raise DataError(f"shard {shard} is compressed ({packed}): its members cannot be reached at random; unpack it to a plain .tar")
    members: list[tuple[str, int, int]] = []
    with tarfile.open(shard, "r:") as opened:
        tar: Any = opened  # its types leave out what we read and set
        while True:
            try:
                member = tar.next()
            except tarfile.TarError as error:  # the last member reaches over the end of the file, or a long name is damaged
                return _cut(members, shard, total, str(error))
            if member is None:
                break
            if member.isreg() and not member.issparse():
                members.append((member.name, member.offset_data, member.size))
            tar.members = []  # else it keeps them all
        end = int(tar.offset)
    if members and members[-1][1] + members[-1][2] > total:
        return _cut(members, shard, total, "unexpected end of data")
    return members, _fault_at_end(shard, end, members)


def _cut(members: list[tuple[str, int, int]], shard: Path, total: int, why: str) -> tuple[list[tuple[str, int, int]], str]:
    whole = [member for member in members if member[1] + member[2] <= total]
    at = f"member '{members[len(whole)][0]}'" if len(whole) < len(members) else f"what follows member '{whole[-1][0]}'" if whole else "all"
    return whole, f"it is cut off after {total} bytes ({why}): {at} is not whole. Fetch it again"


def _fault_at_end(shard: Path, end: int, members: list[tuple[str, int, int]]) -> str:
    """Look at what follows the last member: tarfile takes a damaged header for the end, and would drop the rest without a word."""
    after = f"after member '{members[-1][0]}'" if members else "at its beginning"
    with open(shard, "rb") as raw:
        raw.seek(end)
        block = raw.read(BLOCK)
        if not block:
            return f"it is cut off {after}: the end mark of a tar file is missing. Fetch it again"
        if block.strip(b"\0"):
            return f"the header {after} is damaged (byte {end}); what follows it cannot be found. Fetch the shard again"
        while chunk := raw.read(1 << 20):
            if chunk.strip(b"\0"):
                return f"there is more behind its end mark {after} (tar files joined with cat?). Make one tar file of them"
    return ""


# ---- the index, cached ---------------------------------------------------------------------------------------------------------------


def _cached(shard: Path) -> Path:
    """Where a shard's index is kept; another size or time of the file is another index."""
    status = shard.stat()
    key = hashlib.sha256(f"{LAYOUT}\n{shard.resolve()}\n{status.st_size}\n{status.st_mtime_ns}".encode()).hexdigest()[:32]
    root = Path(os.environ.get("MMKIT_CACHE") or Path.home() / ".cache" / "mmkit")
    return root / "shards" / key[:2] / f"{key}.safetensors"


def load_index(shard: Path) -> ShardIndex:
    """Read a shard's index from the cache folder (MMKIT_CACHE, else ~/.cache/mmkit), or make it and keep it there.

    Raises:
        DataError: As `scan`.
    """
    try:
        path = _cached(shard)
    except OSError as error:
        raise DataError(f"shard {shard} cannot be read: {error}") from error
    if path.is_file():
        try:
            state = load_weights(path)
            texts = [bytes(state[name].numpy()).decode("utf-8", "surrogateescape") for name in ("names", "fault")]
            names = texts[0].split("\0") if texts[0] else []
            return ShardIndex(shard, state["starts"].numpy(), state["places"].numpy().reshape(-1, 2), names, texts[1])
        except (SafetensorError, DataError, KeyError, OSError, UnicodeDecodeError):
            path.unlink(missing_ok=True)  # a damaged cache is made again, not reported
    index = scan(shard)
    state = {"starts": torch.from_numpy(index.starts), "places": torch.from_numpy(index.places)}
    for name, text in (("names", "\0".join(index.names)), ("fault", index.fault)):
        state[name] = torch.from_numpy(np.frombuffer(text.encode("utf-8", "surrogateescape"), dtype=np.uint8).copy())
    try:
        save_weights(state, path)
    except OSError as error:
        print(f"the index of {shard} could not be kept at {path} ({error}); it will be made again next time")
    return index


class _Recent:
    """The values used last, as many as `most`; the others go through `drop`."""

    def __init__(self, most: int, drop: Any = None) -> None:
        self.most, self.drop, self.values = most, drop, OrderedDict[Any, Any]()

    def get(self, key: Any, make: Any) -> Any:
        if key in self.values:
            self.values.move_to_end(key)
            return self.values[key]
        value = self.values[key] = make()
        while len(self.values) > self.most:
            _, old = self.values.popitem(last=False)
            if self.drop:
                self.drop(old)
        return value

    def __getstate__(self) -> dict[str, Any]:
        return {"most": self.most, "drop": self.drop, "values": OrderedDict()}  # open files and indices do not travel to a worker


class Shards:
    """All samples of some shards, by number.

    Args:
        names: See `find_shards`.
        on_bad: "error" stops at a shard that is empty, cut off or damaged; "skip" takes the whole samples it has, and lists it in `bad`.

    Attributes:
        paths: The shards with at least one sample, in the order given.
        bad: Shard to what is wrong with it.

    Raises:
        DataError: A shard is unsound and `on_bad` is "error", or there is no sample at all.
    """

    def __init__(self, names: Names, on_bad: OnBad = "error") -> None:
        found = find_shards(names)
        self.bad: dict[str, str] = {}
        counts: dict[int, int] = {}
        # Each rank begins elsewhere: together they make the indices once, and read the others' where those were first.
        ranks, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
        begin = rank * len(found) // max(1, ranks)
        for place in [*range(begin, len(found)), *range(begin)]:
            counts[place] = self._count(found[place], on_bad)
        self.paths = [path for place, path in enumerate(found) if counts[place]]
        self.ends = np.cumsum([counts[place] for place in range(len(found)) if counts[place]], dtype=np.int64)
        if not self.paths:
            raise DataError(f"there is no sample in {len(found)} shards; the first: {next(iter(self.bad.values()))}")
        self._indices, self._files = _Recent(OPEN_INDICES), _Recent(OPEN_FILES, os.close)

    def _count(self, shard: Path, on_bad: OnBad) -> int:
        try:
            index = load_index(shard)
            fault, samples = index.fault and f"shard {shard}: {index.fault}", len(index)
        except DataError as error:
            fault, samples = str(error), 0
        if fault and on_bad == "error":
            raise DataError(fault + SKIP_HINT)
        if fault:
            self.bad[str(shard)] = f"{fault} ({samples} whole samples of it are used)" if samples else fault
        return samples

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        place = int(np.searchsorted(self.ends, index, side="right"))
        first = int(self.ends[place - 1]) if place else 0
        path = self.paths[place]
        found: ShardIndex = self._indices.get(place, lambda: load_index(path))
        return found.sample(index - first)

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    def read(self, sample: Sample, extension: str) -> bytes:
        """Read a member. Several processes may share the open file: each read names its place.

        Raises:
            DataError: The file changed or cannot be read any more.
        """
        offset, size = sample.members[extension]
        try:
            handle = self._files.get(sample.shard, lambda: os.open(sample.shard, os.O_RDONLY))
            parts = []
            while size > 0 and (part := os.pread(handle, size, offset)):
                parts.append(part)
                offset, size = offset + len(part), size - len(part)
        except OSError as error:
            raise DataError(f"{sample.place(extension)} cannot be read: {error}") from error
        if size:
            raise DataError(f"{sample.place(extension)} ends {size} bytes too early: the shard changed while it was in use")
        return b"".join(parts)

    def order(self, seed: int, epoch: int) -> "ShardOrder":
        """Give the shuffled order of an epoch: see `ShardOrder`."""
        return ShardOrder(self.ends, seed, epoch)


class ShardOrder(Sequence[int]):
    """A permutation of all samples that takes next to no memory and reads few shards at a time.

    Shards are shuffled, laid together in groups, and the samples of each group are shuffled: place -> sample is worked out when it is
    asked for. With no more shards than a group holds this is a plain shuffle of everything.

    Args:
        ends: Running total of samples, shard by shard.
        seed, epoch: What the order is a function of.
        group: Shards in a group.
    """

    def __init__(self, ends: np.ndarray, seed: int, epoch: int, group: int = GROUP) -> None:
        self.ends, self.seed, self.epoch, self.group = ends, seed, epoch, group
        counts = np.diff(ends, prepend=0)
        self.shards = np.random.default_rng(derive_seed(seed, epoch, 0)).permutation(len(ends))
        self.firsts = ends - counts
        self.counts = counts
        self.group_ends = np.add.reduceat(counts[self.shards], np.arange(0, len(ends), group)).cumsum()
        self._shuffled = _Recent(3)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[one] for one in range(*place.indices(len(self)))]
        if not 0 <= place < len(self):
            raise IndexError(f"place {place} of {len(self)}")
        number = int(np.searchsorted(self.group_ends, place, side="right"))
        first = int(self.group_ends[number - 1]) if number else 0
        return int(self._shuffled.get(number, lambda: self._group(number))[place - first])

    def _group(self, number: int) -> np.ndarray:
        """The samples of a group [g], shuffled."""
        shards = self.shards[number * self.group : (number + 1) * self.group]
        samples = np.concatenate([np.arange(self.firsts[shard], self.firsts[shard] + self.counts[shard]) for shard in shards])
        return np.random.default_rng(derive_seed(self.seed, self.epoch, number + 1)).permutation(samples)
