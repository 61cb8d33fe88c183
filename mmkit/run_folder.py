"""The folder of a run: claiming it, its config.yaml, and its log when a run goes on."""

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


def changed_settings(folder: Path, settings: Any) -> list[str]:
    """Tell how the settings differ from those that the folder's run began with."""
    path = folder / "config.yaml"
    before = _flat(yaml.safe_load(path.read_text(encoding="utf-8")) or {}) if path.is_file() else {}
    after = _flat(to_dict(settings))
    return [
        f"changed since the run began: {key} was {before.get(key)!r}, is {after.get(key)!r}"
        for key in sorted(before.keys() | after.keys() if before else set())
        if before.get(key) != after.get(key) and key.rsplit(".", 1)[-1] not in ("resume", "overwrite")
    ]


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
