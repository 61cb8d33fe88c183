"""The chat models that come with the kit, by name: what `--model NAME` stands for where a folder may stand."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from llm_stage.llava_card import CARD
from llm_stage.llms import llm_source
from mmkit.errors import ConfigError, find

DATA = Path(__file__).parent / "data"
_WINDOW, _WINDOWS = 1 << 16, 16  # of each file, what the fingerprint of a model reads


@dataclass(frozen=True)
class ChatModelRow:
    """A model with a name.

    Attributes:
        about: One line for listings.
        licence: Of the weights.
        folder: Its folder in the package.
        llm: The name of its language model.
    """

    about: str
    licence: str
    folder: Path
    llm: str

    @property
    def present(self) -> bool:
        """Whether its weights are in this installation."""
        return (self.folder / CARD).is_file()

    @property
    def usable(self) -> bool:
        """Whether it would load: its weights are here, and its language model can be had."""
        try:
            return self.present and bool(llm_source(self.llm))
        except ConfigError:
            return False


MODELS: dict[str, ChatModelRow] = {
    "mini-chat": ChatModelRow(
        "mini-clip before SmolLM2-135M-Instruct, adapter and projector; the demo's model where no run is", "Apache-2.0",
        DATA / "smollm2_mini_clip", "smollm2",
    ),
}  # fmt: skip


def model_folder(name: str | Path) -> Path:
    """The folder that a name of `MODELS` stands for; anything else is a folder already.

    Raises:
        ConfigError: The name's weights are not in this installation.
        NameNotFound: There is no such folder, and it looks like a name that the table lacks.
    """
    text, path = str(name), Path(name)
    if path.exists() or (text not in MODELS and (isinstance(name, Path) or "/" in text)):
        return path
    row = find("model or folder", MODELS, text)
    if not row.present:
        raise ConfigError(f"{text}: its weights are not in this installation ({row.folder}); name a folder, such as RUN/model")
    return row.folder


def fingerprint(folder: Path) -> str:
    """Hash a model folder: names, sizes and samples of every file. A whole 14 GB model would take a minute at every start."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder)} {size}\n".encode())
        with open(path, "rb") as file:
            for index in range(_WINDOWS):
                file.seek(max(0, size - _WINDOW) * index // (_WINDOWS - 1))
                digest.update(file.read(_WINDOW))
                if size <= _WINDOW:
                    break
    return digest.hexdigest()[:16]
