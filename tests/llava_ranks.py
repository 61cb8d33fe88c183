"""Several LLaVA trainings one after another on one rank: importing torch, transformers and DeepSpeed takes longer than all of them.

    python tests/llava_ranks.py jobs.json

A job is {"argv": [...]}, a training, or {"copy": RUN, "to": FOLDER, "after": STEP}, see `copy_as_killed`.
"""

import json
import os
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

from llm_stage.train_llava import main


def copy_as_killed(run: Path, to: Path, after: int) -> None:
    """Copy a finished run, and make the copy look as if it had been killed right after it saved a step."""
    shutil.copytree(run, to)
    for checkpoint in (to / "checkpoints").glob("step_*"):
        if int(checkpoint.name.removeprefix("step_")) > after:
            shutil.rmtree(checkpoint)
    shutil.rmtree(to / "model")


def work(jobs: list[dict[str, Any]]) -> None:
    for job in jobs:
        if "argv" in job:
            main(job["argv"])
        elif os.environ["RANK"] == "0":  # the other ranks wait for this one as the next run begins
            copy_as_killed(Path(job["copy"]), Path(job["to"]), job["after"])


if __name__ == "__main__":
    warnings.simplefilter("ignore", FutureWarning)  # DeepSpeed calls torch functions by names that torch is about to drop
    work(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
