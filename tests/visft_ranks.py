"""Several ViSFT trainings one after another on one rank: importing torch and transformers takes longer than all of them.

torchrun --nproc_per_node 2 tests/visft_ranks.py jobs.json      # a list of command lines
"""

import json
import sys
from pathlib import Path

from encoders.train_visft import main

if __name__ == "__main__":
    for argv in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        main(argv)
