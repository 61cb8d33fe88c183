"""What all tests share: no network, one thread, tiny things."""

import os
import shutil
import socket

os.environ.update(
    HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false", WANDB_MODE="disabled"
)
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # laws are bit for bit on the CPU; a GPU test sets its own

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHROMIUM_FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def child_environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process that a test starts: this tree first, and a place of its own for compiled extensions."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    dropped = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_MIXED_PRECISION")
    # A build that is killed leaves a lock, and later ones wait for it for ever: never in the user's own cache.
    extensions = str(tmp_path_factory.getbasetemp() / "torch_extensions")
    kept = {key: value for key, value in os.environ.items() if key not in dropped}
    return {**kept, "PYTHONPATH": path, "TORCH_EXTENSIONS_DIR": extensions}


@pytest.fixture(scope="module")  # no longer: its event loop runs in this thread, and other modules call asyncio.run
def chromium() -> Iterator[Any]:
    """A headless browser, where one is installed."""
    if CHROMIUM is None:
        pytest.skip("chromium is not installed; the page is not driven")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed; the page is not driven")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def free_port() -> int:
    """A port on which nobody listens."""
    with socket.socket() as place:
        place.bind(("localhost", 0))
        return int(place.getsockname()[1])
