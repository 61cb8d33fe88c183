"""What made a result: command, versions, commit, machine, time and memory."""

import platform
import resource
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("mmkit", "torch", "transformers", "timm", "open_clip_torch", "accelerate", "peft", "deepspeed")


def versions() -> dict[str, str]:
    """Give the versions of Python and of the packages that matter, as far as they are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """Give the commit of the source tree that runs, with "+changes" if it has any; None outside a repository."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        commit = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
        changes = subprocess.run(
            ["git", "-C", str(root), "status", "--porcelain"], capture_output=True, text=True, timeout=10, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+changes" if changes.strip() else "")


def peak_memory_mb() -> int:
    """Give the largest resident size of this process so far, in MB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak / (1024 * 1024 if sys.platform == "darwin" else 1024))


def manifest(*, seconds: float, device: torch.device | None = None, **facts: Any) -> dict[str, Any]:
    """Describe how a result was made.

    Args:
        seconds: Time it took.
        device: Where it ran; adds the accelerator's name and peak memory.
        facts: What else to tell (seed, step, ranks, ...).
    """
    content = {"command": sys.argv, **facts, "seconds": round(seconds, 1), "peak_memory_mb": peak_memory_mb()}
    if device is not None:
        content["device"] = str(device)
    if device is not None and device.type == "cuda":
        content["accelerator"] = torch.cuda.get_device_name(device)
        content["accelerator_peak_memory_mb"] = int(torch.cuda.max_memory_allocated(device) / 2**20)
    return {**content, "versions": versions(), "commit": git_commit()}
