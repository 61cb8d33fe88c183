"""Features of a frozen encoder on disk: a picture seen before costs one read instead of a decode and a forward pass.

    DIR/KEY/cache.json           what the features are of
    DIR/KEY/SHARD.features       a head of 64 bytes, then records of one size: features [N, C] of one picture each
    DIR/KEY/SHARD.index          the same head, then for each record the SHA-256 of the picture's file and the record's CRC-32

KEY is a hash of the tower's weights and network, the layer and the tokens that are used, the image spec and the precision: with any of them
changed there is nothing to be found. A record is found by the bytes of the picture's file, so that a changed file misses too, and copies
under other names hit. Each process appends to shards of its own, the record first and its index entry second: several may fill one cache at
once, and one that is killed leaves a cache that is whole. A damaged or foreign file is an error that names it.

They are in the type the encoder computes, or as float16 (half the disk of float32, and no longer the same bits). What LLaVA's training
needs, `llm_stage/tower_features.py` fills in: the tokens of the plain picture. What ViSFT's heads need, `encoders/visft_features.py` does:
feature maps of pictures laid out in one of a few ways; the way is then part of what a record is found by.

Letters: n images, N image tokens, C channels of the tower.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import time
import uuid
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal

import torch
from torch import Tensor

from mmkit.checkpoint import atomic_write
from mmkit.errors import ConfigError, DataError

FORMAT = 1
HEAD = struct.Struct("<16s32s16x")  # what it is, of which key
ENTRY = struct.Struct("<32sI")  # SHA-256 of the picture's file, CRC-32 of the record
MAGIC = b"mmkit features 1"
SHARD_BYTES = 16 * 2**30
MARGIN = 0.95  # of the free disk: a full one would take the checkpoints with it
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# These say where a tower's weights came from; they change nothing that is computed.
UNIMPORTANT = {"origin", "training", "text_tower", "transformers_version", "_name_or_path", "architectures", "auto_map"}

Stored = Literal["computed", "float16"]


@dataclass(frozen=True)
class FeatureKey:
    """All that the features of a picture depend on, beside the picture.

    Attributes:
        tower: Hash of the tower's weights (`mmkit.trainable.weights_hash`).
        network: Its configuration: the same weights in another network compute something else.
        spec: The image spec.
        layer, select: Which hidden state, and which tokens of it ("default" drops the first).
        precision: Types of weights and of the forward.
        tokens, width: N and C.
        computed, stored: Types of what the tower gives, and of what is on disk.
    """

    tower: str
    network: dict[str, Any]
    spec: dict[str, Any]
    layer: int
    select: str
    precision: str
    tokens: int
    width: int
    computed: str
    stored: str

    @property
    def digest(self) -> bytes:
        """SHA-256 over all of it."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True, default=str).encode()).digest()

    @property
    def record_bytes(self) -> int:
        """Size of one picture's features."""
        return self.tokens * self.width * DTYPES[self.stored].itemsize


def what_counts(values: Any) -> Any:
    """Give a tower's configuration, those of a joined tower's parts included, without what says where it came from."""
    if isinstance(values, dict):
        return {key: what_counts(value) for key, value in values.items() if key not in UNIMPORTANT}
    return [what_counts(value) for value in values] if isinstance(values, list | tuple) else values


class FeatureCache:
    """The features of one key.

    Args:
        root: The cache's folder; features of other keys may lie in it too.
        key: Of what the features are.
        rebuild: Throw away what is there.

    Raises:
        DataError: A file in it is damaged, or belongs to another cache; the message names it.
    """

    def __init__(self, root: Path | str, key: FeatureKey, *, rebuild: bool = False) -> None:
        self.key, self.folder = key, Path(root) / key.digest.hex()[:16]
        self._places: dict[bytes, tuple[Path, int, int]] = {}  # of which shard, which record, its CRC
        self._open: dict[Path, int] = {}
        if rebuild:
            shutil.rmtree(self.folder, ignore_errors=True)
        if not (self.folder / "cache.json").is_file():
            atomic_write(self.folder / "cache.json", json.dumps({"format": FORMAT, **asdict(key)}, indent=1, default=str) + "\n")
        self.refresh()

    def _cure(self) -> str:
        return f"Delete {self.folder}, or have it made anew with --data.rebuild_cache true"

    def refresh(self) -> None:
        """Read the index again: other processes may have added to it.

        Raises:
            DataError: A file is damaged or foreign.
        """
        _read_key(self.folder)
        self._places = {}
        for index in sorted(self.folder.glob("*.index")):
            content = index.read_bytes()
            self._check_head(index, content)
            body = content[HEAD.size :]
            entries = list(ENTRY.iter_unpack(body[: len(body) // ENTRY.size * ENTRY.size]))  # a writer may be in the middle of an entry
            shard = index.with_suffix(".features")
            held = shard.stat().st_size if shard.is_file() else 0
            needed = HEAD.size + len(entries) * self.key.record_bytes
            if held < needed:
                raise DataError(
                    f"{shard} is truncated: {index.name} lists {len(entries)} pictures, which take {needed:,} bytes, and it holds {held:,}. "
                    f"{self._cure()}"
                )
            with open(shard, "rb") as file:
                self._check_head(shard, file.read(HEAD.size))
            for row, (picture, crc) in enumerate(entries):
                self._places[picture] = (shard, row, crc)

    def _check_head(self, path: Path, content: bytes) -> None:
        if len(content) < HEAD.size:
            raise DataError(f"{path} is truncated: it holds {len(content)} bytes, its head alone takes {HEAD.size}. {self._cure()}")
        magic, digest = HEAD.unpack_from(content)
        if magic != MAGIC:
            raise DataError(f"{path} is no part of a feature cache (it begins with {content[:16]!r}). {self._cure()}")
        if digest != self.key.digest:
            raise DataError(
                f"{path} holds features of other weights, another layer or another image spec (its key is {digest.hex()[:16]}, this "
                f"cache's is {self.folder.name}). {self._cure()}"
            )

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, picture: bytes) -> bool:
        return picture in self._places

    def read(self, picture: bytes) -> Tensor:
        """Give the features [N, C] of a picture, in the type that the tower computes; one read.

        Args:
            picture: SHA-256 of its file (`picture_digest`).

        Raises:
            KeyError: They are not in the cache.
            DataError: What is on disk is not what was written.
        """
        shard, row, crc = self._places[picture]
        if shard not in self._open:
            self._open[shard] = os.open(shard, os.O_RDONLY)
        record = bytearray(self.key.record_bytes)
        # no file position: loader processes share the descriptor
        held = os.preadv(self._open[shard], [record], HEAD.size + row * len(record))
        if held != len(record) or zlib.crc32(record) != crc:
            raise DataError(f"{shard} is damaged at record {row}: not what was written there. {self._cure()}")
        features = torch.frombuffer(record, dtype=DTYPES[self.key.stored]).view(self.key.tokens, self.key.width)
        return features.to(DTYPES[self.key.computed])

    def writer(self) -> FeatureWriter:
        """Give something that appends to shards of its own."""
        return FeatureWriter(self.folder, self.key)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # descriptors mean nothing in another process


def _read_key(folder: Path) -> FeatureKey:
    """What the features in a folder are of.

    Raises:
        DataError: Its cache.json is damaged, or describes another folder's features.
    """
    path = folder / "cache.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        form, key = values.pop("format"), FeatureKey(**values)
        if key.record_bytes < 1:
            raise ValueError(f"a record of {key.record_bytes} bytes")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{path} is damaged: no description of cached features ({error}). Delete {folder}") from error
    if form != FORMAT or key.digest.hex()[:16] != folder.name:
        raise DataError(
            f"{path} (format {form}) describes features of other weights, another layer or another image spec than those of this folder: "
            f"their name would be {key.digest.hex()[:16]}. Delete {folder}"
        )
    return key


def check_cache(root: Path | str) -> None:
    """Look at all that a cache's folder holds, before a training begins.

    Raises:
        DataError: A file is damaged or foreign; the message names it.
        ConfigError: The folder is a file.
    """
    if Path(root).exists() and not Path(root).is_dir():
        raise ConfigError(f"the feature cache {root} is a file; name a folder")
    for path in sorted(Path(root).glob("*/cache.json")):
        FeatureCache(root, _read_key(path.parent))


class FeatureWriter:
    """Appends pictures to shards that no other process writes to; close it, or use it in a `with`."""

    def __init__(self, folder: Path, key: FeatureKey) -> None:
        self.folder, self.key = folder, key
        self._files: tuple[BinaryIO, BinaryIO] | None = None

    def append(self, pictures: Sequence[bytes], features: Tensor) -> None:
        """Add the features [n, N, C] of n pictures, given by their digests."""
        stored = features.detach().to("cpu", DTYPES[self.key.stored]).contiguous()
        if list(stored.shape) != [len(pictures), self.key.tokens, self.key.width]:
            raise ValueError(f"features are {list(stored.shape)}; [{len(pictures)}, {self.key.tokens}, {self.key.width}] were expected")
        if self._files is not None and self._files[0].tell() >= SHARD_BYTES:
            self.close()
        shard, index = self._files = self._files or self._new_shard()
        records = [row.view(torch.uint8).numpy().tobytes() for row in stored.flatten(1)]
        shard.write(b"".join(records))
        shard.flush()  # before the index says that it is there
        index.write(b"".join(ENTRY.pack(picture, zlib.crc32(record)) for picture, record in zip(pictures, records, strict=True)))
        index.flush()

    def _new_shard(self) -> tuple[BinaryIO, BinaryIO]:
        name = f"{int(time.time())}-{uuid.uuid4().hex[:12]}"
        shard, index = (open(self.folder / f"{name}.{kind}", "xb") for kind in ("features", "index"))  # noqa: SIM115 (see `close`)
        for file in (shard, index):
            file.write(HEAD.pack(MAGIC, self.key.digest))
            file.flush()
        return shard, index

    def close(self) -> None:
        """Put all of it on the disk."""
        for file in self._files or ():
            file.flush()
            os.fsync(file.fileno())
            file.close()
        self._files = None

    def __enter__(self) -> FeatureWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def picture_digest(path: Path | str) -> bytes:
    """SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def say_size(cache: FeatureCache, pictures: int, absent: int, rank: int) -> None:
    """State what is there, what will be written and what the disk has.

    Args:
        cache: The cache.
        pictures: How many are wanted.
        absent: How many of them it does not hold.
        rank: The first one prints.

    Raises:
        ConfigError: It has no room.
    """
    needed = absent * (cache.key.record_bytes + ENTRY.size)
    free = shutil.disk_usage(cache.folder).free
    if rank == 0:
        print(
            f"feature cache {cache.folder}: {pictures - absent:,} of {pictures:,} pictures are there; {absent:,} to compute, "
            f"{needed / 1e9:,.2f} GB ({cache.key.tokens} x {cache.key.width} {cache.key.stored} each), {free / 1e9:,.0f} GB free",
            flush=True,
        )
    if needed > MARGIN * free:
        smaller = " --data.feature_dtype float16 halves it;" if cache.key.stored == "float32" else ""
        raise ConfigError(
            f"the feature cache {cache.folder} would take {needed / 1e9:,.2f} GB more ({absent:,} pictures of {cache.key.record_bytes:,} "
            f"bytes), and {free / 1e9:,.2f} GB are free there.{smaller} name another folder with --data.feature_cache, or leave it out"
        )
