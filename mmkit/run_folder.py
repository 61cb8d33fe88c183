"""The folder of a run: claiming it, its config.yaml, and its log when a run goes on."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import yaml

from mmkit.checkpoint import atomic_write
from mmkit.config import save_config, to_dict
from mmkit.errors import ConfigError
from mmkit.records import read_jsonl, repair


def claim_folder(folder: Path, resume: bool, overwrite: bool) -> None:
    """Make the folder of a run, or refuse one that holds something else.

    Raises:
        ConfigError: The folder is not empty and neither `resume` nor `overwrite` is on, or it is no run of mmkit.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"run.output_dir {folder} is a file; a run needs a folder")
    if folder.is_dir() and any(folder.iterdir()) and not resume:
        if not overwrite:
            raise ConfigError(f"run.output_dir {folder} holds files already; --resume goes on with that run, --overwrite removes it")
        if not (folder / "config.yaml").is_file():
            raise ConfigError(
                f"run.output_dir {folder} holds files and no run of mmkit (no config.yaml): it is not overwritten; name another"
            )
        shutil.rmtree(folder)
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)


def changed_settings(folder: Path, settings: Any) -> dict[str, tuple[Any, Any]]:
    """Give the settings that differ from those that the folder's run began with: name to (before, now)."""
    path = folder / "config.yaml"
    before = _flat(yaml.safe_load(path.read_text(encoding="utf-8")) or {}) if path.is_file() else {}
    after = _flat(to_dict(settings))
    return {
        key: (before.get(key), after.get(key))
        for key in sorted(before.keys() & after.keys())  # a setting that an older version did not have was at its default
        if not _same(before[key], after[key])
    }


def free_settings(settings: Any, prefix: str = "") -> list[str]:
    """Give the settings that may change when a run goes on: those whose field says `metadata={"free": True}`."""
    found: list[str] = []
    for item in dataclasses.fields(settings):
        value = getattr(settings, item.name)
        if dataclasses.is_dataclass(value):
            found += free_settings(value, f"{prefix}{item.name}.")
        elif item.metadata.get("free"):
            found.append(f"{prefix}{item.name}")
    return found


def refuse_changes(folder: Path, settings: Any) -> None:
    """Refuse to go on with a run whose recipe has changed since; without a checkpoint it begins anew, and anything may change.

    Raises:
        ConfigError: The message names each setting, what it was and what it is now.
    """
    if not any((folder / "checkpoints").glob("step_*")):
        return
    free = free_settings(settings)
    changed = {
        key: values
        for key, values in changed_settings(folder, settings).items()
        if not any(key == name or key.startswith(f"{name}.") for name in free)
    }
    if changed:
        lines = "\n".join(f"  {key} was {before!r}, is {now!r}" for key, (before, now) in changed.items())
        raise ConfigError(
            f"the run in {folder} began with other settings:\n{lines}\n  Go on with the old ones, or start anew: another --output_dir, or "
            f"--overwrite. What may change: {', '.join(free)}"
        )


def _same(before: Any, now: Any) -> bool:
    if isinstance(before, str) and isinstance(now, str) and before and now:
        return before == now or Path(before).resolve() == Path(now).resolve()
    return bool(before == now)


def write_settings(folder: Path, settings: Any, step: int) -> None:
    """Write config.yaml, and take lines of steps after `step` out of the log: they will be done again, and each step is there once."""
    save_config(settings, folder / "config.yaml")
    log = folder / "metrics.jsonl"
    if log.is_file():
        repair(log)
        rows = [row for row in read_jsonl(log) if row["step"] <= step]
        atomic_write(log, "".join(json.dumps(row) + "\n" for row in rows))


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value})
    return flat
