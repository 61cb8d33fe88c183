"""README.md of an exported model: what it is, what made it, on which data, how good it is, and the proof that it is the same model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from llm_stage.llava_card import LlavaCard, sha256
from llm_stage.parity import Parity
from mmkit.errors import DataError
from mmkit.manifest import versions
from mmkit.report_data import command_line

HEAD = """---
library_name: {library}
pipeline_tag: image-text-to-text
# license: to be filled in
---
"""
FILL = "to be filled in"


@dataclass
class CardFacts:
    """What the card tells.

    Attributes:
        title: The model's name.
        source: What was exported.
        format: The export's format, and how such a folder is loaded: a few lines of Python.
        loading: See `format`.
        card: How the model was made, where that is known.
        parity: The proof.
        tower: Class of the written vision tower, and what is to be said of it.
        notes: What a user of the folder has to know.
        evaluations: Folders with a summary.json.
    """

    title: str
    source: Path
    format: str
    loading: str
    card: LlavaCard | None
    parity: Parity
    tower: str
    notes: list[str] = field(default_factory=list)
    evaluations: Sequence[Path] = ()


def model_card(facts: CardFacts) -> str:
    """Write the card as Markdown.

    Raises:
        DataError: An evaluation's summary cannot be read.
    """
    runs = lineage(facts.source)
    library = "transformers" if facts.format == "transformers" else "mmkit"
    parts = [
        HEAD.format(library=library) + f"# {facts.title}\n",
        f"A LLaVA model, exported by mmkit as `{facts.format}`.\n\n```python\n{facts.loading}\n```\n",
        *([f"{note}\n" for note in facts.notes]),
        _section("Parts", _parts(facts)),
        _section("Training", _training(runs, facts.card)),
        _section("Data", _data(runs)),
        _section("Metrics", _metrics(facts.evaluations)),
        _section("The same model: logits before and after the export", _proof(facts.parity)),
        _section("Licences", _table(["of", "licence"], [[of, FILL] for of in ("this model", "encoder", "language model", "data")])),
        _section("Versions", ", ".join(f"{name} {number}" for name, number in versions().items())),
    ]
    return "\n".join(parts)


def _section(title: str, body: str) -> str:
    return f"## {title}\n\n{body}\n"


def _table(headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _short(name: str) -> str:
    """A part's name; of a folder, the last two steps: the rest is somebody's machine."""
    return "/".join(Path(name).parts[-2:]) if Path(name).is_absolute() else name


def _parts(facts: CardFacts) -> str:
    card = facts.card
    rows = [["vision tower, as written", facts.tower]]
    if card is not None:
        known = {key: value for key, value in card.encoder_card.items() if key not in ("source",) and value is not None}
        said = ", ".join(f"{key} {_short(str(value))}" for key, value in known.items())
        rows = [
            ["encoder", f"{_short(card.encoder)}{f' ({said})' if said else ''}"],
            ["SHA-256 of its weights", f"`{card.encoder_hash}`"],
            *rows,
            ["projector", f"{card.projector}, on layer {card.feature_layer}"],
            ["language model", _short(card.llm) + (f", held in {card.quantization['bits']} bits in training" if card.quantization else "")],
            ["chat template", card.template + (f", system prompt {card.system!r}" if card.system is not None else "")],
        ]
    return _table(["part", "what"], rows)


# -- training and data ---------------------------------------------------------------------------------------------------------------------


def lineage(source: Path) -> list[Path]:
    """The run folders that led to a model, the last stage first: known by their config.yaml and manifest.json."""
    found: list[Path] = []
    places = [source.resolve().parent, source.resolve().parent.parent]  # RUN/model, RUN/checkpoints/step_N
    while places:
        run = next((place for place in places if (place / "config.yaml").is_file() and (place / "manifest.json").is_file()), None)
        if run is None or run in found:
            break
        found.append(run)
        earlier = _settings(run).get("pretrained")
        places = [Path(earlier).resolve().parent] if earlier else []
    return found


def _settings(run: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return {}
    return values if isinstance(values, dict) else {}


def _training(runs: Sequence[Path], card: LlavaCard | None) -> str:
    if not runs:
        known = ", ".join(f"{key} {value}" for key, value in (card.training if card else {}).items())
        return f"The run's folder was not beside the model; its card says: {known or 'nothing'}."
    parts = []
    for run in reversed(runs):
        manifest, settings = json.loads((run / "manifest.json").read_text(encoding="utf-8")), _settings(run)
        facts = [
            f"{key.replace('_', ' ')} {manifest[key]}"
            for key in ("step", "seed", "precision", "ranks", "global_batch_size")
            if key in manifest
        ]
        made = ", ".join(f"{name} {number}" for name, number in manifest.get("versions", {}).items())
        recipe = yaml.safe_dump(_without_paths(settings), sort_keys=False, allow_unicode=True)
        parts.append(
            f"### {manifest.get('name', run.name)}\n\n```\n{command_line(manifest.get('command'), run)}\n```\n\n{', '.join(facts)}; "
            f"commit {manifest.get('commit') or 'unknown'}; {made}.\n\n<details><summary>all settings</summary>\n\n```yaml\n{recipe}```\n\n</details>"
        )
    return "\n\n".join(parts)


def _without_paths(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _without_paths(value) for key, value in tree.items()}
    return _short(tree) if isinstance(tree, str) and tree.startswith("/") else tree


def _data(runs: Sequence[Path]) -> str:
    rows = []
    for run in reversed(runs):
        name = (_settings(run).get("data") or {}).get("json")
        for path in [Path(one) for one in (name if isinstance(name, list) else [name]) if one]:
            if path.is_file():
                rows.append([run.name, path.name, f"{count_rows(path):,}", f"`{sha256(path)}`"])
            else:
                rows.append([run.name, path.name, "?", "not here when the model was exported"])
    return _table(["run", "file", "rows", "SHA-256"], rows) if rows else f"{FILL}: the run's folder was not beside the model."


def count_rows(path: Path) -> int:
    """Rows of a JSON list or a JSONL file; 0 where it is neither."""
    with open(path, encoding="utf-8") as file:
        if path.suffix == ".jsonl":
            return sum(bool(line.strip()) for line in file)
        try:
            content = json.load(file)
        except ValueError:
            return 0
    return len(content) if isinstance(content, list) else 0


# -- metrics and proof ---------------------------------------------------------------------------------------------------------------------


def _metrics(folders: Sequence[Path]) -> str:
    rows = []
    for folder in folders:
        path = folder if folder.is_file() else folder / "summary.json"
        try:
            summary = json.loads(path.read_text(encoding="utf-8"))
            for name, metric in summary["metrics"].items():
                low, high = metric["ci95"]
                rows.append([summary["benchmark"], name, metric["value"], f"{low} to {high}", metric.get("n", summary.get("n"))])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"--eval {folder}: {path} is no evaluation's summary ({type(error).__name__}: {error})") from error
    return (
        _table(["benchmark", "metric", "value", "95 % interval", "n"], rows) if rows else f"{FILL} (`--eval FOLDER` takes a summary.json)."
    )


def _proof(parity: Parity) -> str:
    rows = [[what, f"{found:.2e}", f"{limit:.2e}"] for what, found, limit in parity.rows()]
    return (
        f"One fixed picture and text, {parity.tokens} positions, computed in float32 at the export; the largest logit is {parity.largest:.3g}.\n\n"
        + _table(["largest difference of a logit", "found", "refused above"], rows)
        + f"\n\nThe likeliest next token is the same at {parity.same_next:.1%} of the positions."
    )
