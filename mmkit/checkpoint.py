"""Files that are whole or absent: atomic folders and files, weights in safetensors, strict loading whose error is a diff."""

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmkit.errors import DataError


@contextmanager
def atomic_folder(path: Path | str, overwrite: bool = False) -> Iterator[Path]:
    """Give an empty temporary folder to fill; it takes the name `path` only when the block ends well.

    Everything in it is made readable for whom the folder itself is (safetensors writes files for their owner alone) and flushed to disk
    before the rename. When the block (or the flush) fails, on a full disk for instance, nothing of the
    new folder stays and what was at `path` before is untouched.

    Args:
        path: The folder to make.
        overwrite: Replace a folder of this name. The old one goes away only after the new one is complete.

    Raises:
        FileExistsError: `path` exists and `overwrite` is off.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists already; choose another folder, or allow to overwrite it")
    path.parent.mkdir(parents=True, exist_ok=True)
    work = path.parent / f".{path.name}.writing-{os.getpid()}"
    shutil.rmtree(work, ignore_errors=True)
    try:
        work.mkdir()
        yield work
        readable = work.stat().st_mode & 0o444  # what the umask gives
        for root, _, files in os.walk(work):
            for name in files:
                (Path(root) / name).chmod((Path(root) / name).stat().st_mode | readable)
                _fsync(Path(root) / name)
            _fsync(Path(root))
        _swap(work, path)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    _fsync(path.parent)


def _swap(work: Path, path: Path) -> None:
    """Rename `work` to `path`. An old folder steps aside first: a rename cannot replace a folder that is not empty."""
    old = path.parent / f".{path.name}.old-{os.getpid()}"
    if path.exists():
        os.rename(path, old)
    try:
        os.rename(work, path)
    except OSError:
        if old.exists():
            os.rename(old, path)
        raise
    if old.is_dir():
        shutil.rmtree(old, ignore_errors=True)
    elif old.exists():
        old.unlink()


def atomic_write(path: Path | str, content: bytes | str) -> None:
    """Write a file at once: readers see the old content or the new, never a part, also when the disk is full or the process dies.

    Args:
        path: The file; its folder is made if missing.
        content: Text is written as UTF-8.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    work = path.parent / f".{path.name}.writing-{os.getpid()}"
    try:
        with open(work, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(work, path)
    except BaseException:
        work.unlink(missing_ok=True)
        raise
    _fsync(path.parent)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save_weights(state: Mapping[str, Tensor], path: Path | str) -> None:
    """Write tensors as safetensors, atomically.

    Tensors that share memory (tied embeddings) are written once per name: the file loads the same into tied and untied modules.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    seen: set[int] = set()
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        plain = tensor.detach().cpu().contiguous()
        storage = plain.untyped_storage()
        # safetensors refuses shared memory, and would write the whole storage behind a narrow view
        if storage.data_ptr() in seen or storage.nbytes() != plain.numel() * plain.element_size():
            plain = plain.clone()
        seen.add(plain.untyped_storage().data_ptr())
        tensors[name] = plain
    work = path.parent / f".{path.name}.writing-{os.getpid()}"
    try:
        work.touch()
        mode = work.stat().st_mode  # what the umask gives; safetensors makes files that only their owner can read
        save_file(tensors, str(work), metadata={"format": "pt"})
        work.chmod(mode)
        _fsync(work)
        os.replace(work, path)
    except SafetensorError as error:  # it wraps the operating system's error ("No space left on device")
        work.unlink(missing_ok=True)
        raise OSError(f"cannot write {path}: {error}") from error
    except BaseException:
        work.unlink(missing_ok=True)
        raise


def load_weights(path: Path | str) -> dict[str, Tensor]:
    """Read a weight file onto the CPU: safetensors, or a torch file, which may then hold nothing but plain data.

    Raises:
        DataError: The file is truncated, is no weight file, or holds code.
        FileNotFoundError: There is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weight file {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(str(path))
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, UnpicklingError, RuntimeError, EOFError, KeyError, ValueError) as error:
        raise DataError(
            f"{path} is no whole weight file ({str(error).splitlines()[0] if str(error) else type(error).__name__}); get it again"
        ) from error
    if not isinstance(state, dict):
        raise DataError(f"{path} holds a {type(state).__name__}, not a table of tensors")
    return state


def load_strict(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Fill a module from a state that fits it exactly.

    Args:
        module: The module to fill; left as it was when the state does not fit.
        state: Name to tensor, as from `load_weights`.
        source: Where the state came from, for the message.

    Raises:
        DataError: Names are missing or left over, or shapes differ. The message counts each kind, with common prefix and examples.
    """
    refuse_differences(module.state_dict(), state, source, type(module).__name__)
    module.load_state_dict(dict(state))


def refuse_differences(own: Mapping[str, Tensor], state: Mapping[str, Tensor], source: str, target: str) -> None:
    """Compare names and shapes of what is wanted with what a file holds.

    Args:
        own: Name to tensor, as wanted; only shapes are looked at.
        state: Name to tensor, as found.
        source: Where the state came from, for the message.
        target: What it is for, for the message.

    Raises:
        DataError: As for `load_strict`.
    """
    missing = [name for name in own if name not in state]
    unexpected = [name for name in state if name not in own]
    shapes = [name for name in own if name in state and own[name].shape != state[name].shape]
    if missing or unexpected or shapes:
        lines = [f"{source} does not fit {target}:"]
        lines += _listing("missing", missing, len(own))
        lines += _listing("unexpected", unexpected, len(state))
        pairs = [f"{name} is {list(state[name].shape)}, should be {list(own[name].shape)}" for name in shapes]
        lines += [f"  {len(shapes)} of {len(own)} tensors have another shape: {_some(pairs)}"] if shapes else []
        raise DataError("\n".join([*lines, "  Was it written by another architecture, or with other settings (depth, width, image size)?"]))


def _listing(what: str, names: Sequence[str], total: int) -> list[str]:
    if not names:
        return []
    shared = list(takewhile(lambda parts: len(set(parts)) == 1, zip(*(name.split(".")[:-1] for name in names), strict=False)))
    under = f", all under {'.'.join(parts[0] for parts in shared)}" if shared and len(names) > 1 else ""
    return [f"  {len(names)} of {total} tensors {what}{under}: {_some(names)}"]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f", and {len(names) - 4} more" if len(names) > 4 else "")
