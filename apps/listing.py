"""`mmkit list encoders | llms | models | benchmarks | recipes | sweeps`: what there is to name on a command line."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mmkit.config import cli_entry
from mmkit.errors import ConfigError, find

ROOT = Path(__file__).resolve().parent.parent
Rows = tuple[list[str], list[list[str]]]  # headings, rows


def encoders() -> Rows:
    """The encoder catalog."""
    from encoders.catalog import ENCODERS

    return from_table(ENCODERS)


def llms() -> Rows:
    """The language models that come with the kit; hub names and folders are taken beside them."""
    from llm_stage.llms import LLMS

    return from_table(LLMS)


def models() -> Rows:
    """The chat models that come with the kit, as far as their weights are in this installation."""
    from llm_stage.models import MODELS

    headings, rows = from_table(MODELS)
    here = {name: "yes" if row.present else "no" for name, row in MODELS.items()}
    return [*headings, "here"], [[*row, here[row[0]]] for row in rows]


def benchmarks() -> Rows:
    """The benchmarks: their files, what is asked in which words, who scores; controls are left out."""
    from llm_stage.benchmarks import BENCHMARKS

    rows = [row for row in BENCHMARKS.values() if not row.control_of]
    asked = {row.name: f"{row.prompt_name}, {row.max_new_tokens} tokens" for row in rows}
    return ["name", "asked", "scorer", "files"], [[row.name, asked[row.name], row.scorer, row.files] for row in rows]


def recipes() -> Rows:
    """All recipes and what they are for."""
    return from_files("recipes")


def sweeps() -> Rows:
    """All sweeps (`mmkit sweep NAME`)."""
    return from_files("sweeps")


LISTS: dict[str, Callable[[], Rows]] = {
    "encoders": encoders, "llms": llms, "models": models, "benchmarks": benchmarks, "recipes": recipes, "sweeps": sweeps
}  # fmt: skip


def from_table(table: Mapping[str, Any]) -> Rows:
    """Headings and rows of one of the kit's tables, name -> dataclass: its fields that are text."""
    first = next(iter(table.values()))
    fields = [item.name for item in dataclasses.fields(first) if any(isinstance(getattr(row, item.name), str) for row in table.values())]
    return ["name", *fields], [[name, *(str(getattr(row, item) or "") for item in fields)] for name, row in table.items()]


def from_files(kind: str) -> Rows:
    """Headings and rows of the kit's YAML files of a kind, "recipes" or "sweeps"."""
    paths = [path for package in ("encoders", "llm_stage") for path in sorted((ROOT / package / kind).rglob("*.yaml"))]
    return [kind.removesuffix("s"), "what it does"], [[path.stem, purpose(path)] for path in paths]


# What a line of a recipe's head is about; the lines without such a word say what the recipe does.
HEAD_WORDS = ("run", "try", "needs", "expect")


def purpose(path: Path) -> str:
    """What the head of a recipe says it does: its line "what", its first sentence, or what to expect of it."""
    lines = [line.removeprefix("#").strip() for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    said = {line.split(" ", 1)[0]: line.split(" ", 1)[1].strip() for line in reversed(lines) if " " in line}
    if "what" in said:
        return said["what"]
    first = next((line for line in lines if line), "")
    return said.get("expect", first) if first.startswith(HEAD_WORDS) else first


def main(argv: Sequence[str] | None = None) -> Path:
    """Print one list; gives the folder of the installed packages back.

    Raises:
        ConfigError: No list, or more than one, is named.
        NameNotFound: There is no such list.
    """
    import sys

    words = list(sys.argv[1:] if argv is None else argv)
    if words in (["--help"], ["-h"]):
        print(f"mmkit list {' | '.join(LISTS)}")
        return ROOT
    if len(words) != 1:
        raise ConfigError(f"`mmkit list` takes one of {', '.join(LISTS)}; got {' '.join(words) or 'nothing'}")
    headings, rows = find("list", LISTS, words[0])()
    table = Table()
    for heading in headings:
        table.add_column(heading, overflow="fold", no_wrap=heading in ("name", "recipe", "sweep"))
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    return ROOT


if __name__ == "__main__":
    cli_entry(main)
