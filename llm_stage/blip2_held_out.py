"""Captions of held-out pictures while BLIP-2's second stage trains, and the best model so far.

The loss does not tell: in front of a language model the captions can fall apart while it goes on sinking (LAVIS, issue 407: CIDEr from 55 to
1.1 in five epochs). So a few hundred pictures are captioned every so many steps, CIDEr-D is written to RUN/held_out.jsonl, and the best model
is kept in RUN/best until the end, when it becomes RUN/model.
"""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from encoders.captions import Captioned, read_captions
from llm_stage.blip2_chat import Blip2Chat
from llm_stage.blip2_folder import Blip2Parts, save_blip2
from llm_stage.chat_format import Turn
from llm_stage.generate import ChatRequest
from llm_stage.qformer_folder import WEIGHT_FILE
from mmkit.caption_scoring import cider_d
from mmkit.caption_tokens import tokens
from mmkit.checkpoint import atomic_write, load_weights
from mmkit.ranks import broadcast
from mmkit.records import read_jsonl
from mmkit.run import Run

LOG, BEST = "held_out.jsonl", "best"
CAPTION_TOKENS = 30


@dataclass(frozen=True)
class CaptionCheck:
    """How held-out captions are made.

    Attributes:
        data: Pictures and what people said of them.
        every: Steps between two checks.
        batch_size: Pictures captioned at once.
    """

    data: Captioned
    every: int
    batch_size: int

    @classmethod
    def read(cls, captions: str, images: str, most: int, every: int, batch_size: int) -> "CaptionCheck":
        """Read a caption file and keep its first `most` pictures.

        Raises:
            DataError: The file has another format, or pictures are missing.
        """
        data = read_captions(Path(captions), Path(images), "val")
        paths = data.paths[:most]
        kept = [(text, image) for text, image in zip(data.captions, data.owner, strict=True) if image < len(paths)]
        texts, owner = zip(*kept, strict=True)
        return cls(replace(data, paths=paths, captions=texts, owner=owner), every, batch_size)

    def due(self, run: Run) -> bool:
        """Whether a step has just ended after which there is a check; the last one always has."""
        return run.updated and ((run.step + 1) % self.every == 0 or run.step + 1 == run.steps)

    def score(self, parts: Blip2Parts) -> float:
        """Caption the pictures, and give the mean CIDEr-D, 100 times as usual; words are cut as by `mmkit.caption_tokens`."""
        data, training = self.data, parts.model.training
        parts.model.eval()
        chat = Blip2Chat(parts, "held out")
        asked = [ChatRequest([Turn("user", "")], [data.source(path)]) for path in data.paths]
        said = chat.generate(asked, max_new_tokens=CAPTION_TOKENS, batch_size=self.batch_size)
        parts.model.train(training)
        references: list[list[list[str]]] = [[] for _ in data.paths]
        for text, image in zip(data.captions, data.owner, strict=True):
            references[image].append(tokens(text))
        scores = cider_d([tokens(text) for text in said], references)
        return 100 * sum(scores) / len(scores)


class KeepBest:
    """The checks of a training, their log, and the best model so far; which that is, is saved with each checkpoint.

    Args:
        check: How captions are made.
    """

    def __init__(self, check: CaptionCheck) -> None:
        self.check = check
        self.best: dict[str, float] = {}

    def state_dict(self) -> dict[str, float]:
        """Give the best score and its step."""
        return dict(self.best)

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on behind a checkpoint."""
        self.best = dict(state)

    def look(self, run: Run, parts: Blip2Parts) -> None:
        """Caption, write the score down, and keep the model if none was better; all ranks take part, the first one captions."""
        step, score = run.step + 1, 0.0
        if run.is_main:
            with run.accelerator.autocast():
                score = self.check.score(parts)
            _log(run.folder / LOG, {"step": step, "cider": round(score, 4)})
            run.print(f"step {step}: CIDEr {score:.1f} on {len(self.check.data.paths)} held-out pictures")
        score = broadcast(score)
        if self.best and score <= self.best["cider"]:
            return
        self.best = {"step": step, "cider": score}
        state = run.weights()
        if run.is_main and state is not None:
            save_blip2(parts, run.folder / BEST, state={name: tensor.cpu() for name, tensor in state.items()}, overwrite=True)

    def weights(self, run: Run) -> dict[str, Tensor] | None:
        """Give the best model's weights; None where they are the present ones."""
        if self.best["step"] == run.step:
            found = None
        else:  # a finished run that is started again has it as RUN/model
            kept = run.folder / BEST
            found = load_weights((kept if kept.is_dir() else run.folder / "model") / WEIGHT_FILE)
        run.print(f"held-out captions were best at step {self.best['step']}: CIDEr {self.best['cider']:.1f}; that model is kept")
        return found

    def clear(self, run: Run) -> None:
        """Remove RUN/best, once RUN/model is there."""
        shutil.rmtree(run.folder / BEST, ignore_errors=True)


def _log(path: Path, row: dict[str, Any]) -> None:
    """Add a line; those of an earlier start that went further go."""
    before = [line for line in read_jsonl(path) if line["step"] < row["step"]] if path.is_file() else []
    atomic_write(path, "".join(json.dumps(line) + "\n" for line in [*before, row]))
