"""The demo's browser of runs: the questions of an evaluation, filtered by kind and by who is right, with their images; on to the chat."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from apps import demo_page
from apps.demo_chat import ChatParts
from apps.demo_desk import QUIET
from mmkit.errors import DataError, MMKitError
from mmkit.images import open_image
from mmkit.report_compare import RIGHT
from mmkit.report_data import Evaluation, RunData, read_runs

PER_PAGE = 12
EVERY = "every kind"
DISAGREE, AGREE, ALL_RIGHT, ALL_WRONG = "they disagree", "all the same", "all right", "all wrong"
ONLY = "only right: "


@dataclass(frozen=True)
class Row:
    """One question with every encoder's answer."""

    name: str
    question: str
    kind: str
    reference: str
    image: Path | None
    answers: dict[str, tuple[str, bool]]  # encoder -> words, right


def rows_of(data: RunData, benchmark: str) -> list[Row]:
    """The questions that all encoders of a benchmark were asked, in the order of the file."""
    found = [evaluation for evaluation in data.evaluations if evaluation.benchmark == benchmark and evaluation.items]
    if not found:
        return []
    rows = []
    for name, item in found[0].items.items():
        if all(name in evaluation.items for evaluation in found):
            answers = {evaluation.encoder: _answer(evaluation, name) for evaluation in found}
            rows.append(Row(name, item.question, item.kind, item.reference, item.image, answers))
    return rows


def _answer(evaluation: Evaluation, name: str) -> tuple[str, bool]:
    item = evaluation.items[name]
    return item.answer, item.score >= RIGHT


def kept(rows: Sequence[Row], kind: str, who: str) -> list[Row]:
    """The rows of a kind, and of those who are right."""

    def fits(row: Row) -> bool:
        right = [name for name, (_, good) in row.answers.items() if good]
        if who.startswith(ONLY):
            return right == [who.removeprefix(ONLY)]
        everyone = len(right) == len(row.answers)
        same = everyone or not right
        return {DISAGREE: not same, AGREE: same, ALL_RIGHT: everyone, ALL_WRONG: not right}.get(who, True)

    return [row for row in rows if kind in (EVERY, row.kind) and fits(row)]


class Browser:
    """The tab's handlers.

    Args:
        root: Only run folders in it may be opened.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def folders(self) -> list[str]:
        """Run folders with evaluations, by name."""
        if not self.root.is_dir():
            return []
        return sorted({path.relative_to(self.root).parts[0] for path in self.root.glob("*/**/summary.json")})

    def look(self, name: str | None) -> tuple[Any, str]:
        """The tab was opened: (runs to choose from, notice)."""
        found = self.folders()
        none = f"No evaluations in {self.root.name}/ yet: `mmkit quickstart` makes some; other folders: `mmkit demo --runs`."
        return gr.update(choices=found, value=name if name in found else None), "" if found else demo_page.info_html(none)

    def run(self, name: str) -> RunData:
        """Read a run folder.

        Raises:
            DataError: It lies outside of the root, or holds no evaluation.
        """
        folder = (self.root / name).resolve()
        if not name or not folder.is_relative_to(self.root.resolve()) or folder == self.root.resolve():
            raise DataError(f"'{name}' is no run folder in {self.root.name}")
        return _read(folder, max((path.stat().st_mtime_ns for path in folder.glob("**/summary.json")), default=0))

    def choose_run(self, name: str) -> tuple[Any, Any, Any, Any, str]:
        """A run was chosen: (benchmarks, kinds, who is right, page, rows' notice)."""
        try:
            data = self.run(name)
            benchmarks = [benchmark for benchmark in data.benchmarks if rows_of(data, benchmark)]
            if not benchmarks:
                raise DataError(f"{name} holds no answers to browse")
        except (MMKitError, OSError) as error:
            return gr.skip(), gr.skip(), gr.skip(), 1, demo_page.notice_html(str(error))
        kinds, who = self._filters(data, benchmarks[0])
        return gr.update(choices=benchmarks, value=benchmarks[0]), kinds, who, 1, ""

    def choose_benchmark(self, name: str, benchmark: str) -> tuple[Any, Any, Any]:
        """A benchmark was chosen: (kinds, who is right, page)."""
        try:
            return *self._filters(self.run(name), benchmark), 1
        except (MMKitError, OSError):
            return gr.skip(), gr.skip(), 1

    def _filters(self, data: RunData, benchmark: str) -> tuple[Any, Any]:
        rows = rows_of(data, benchmark)
        kinds = list(dict.fromkeys(row.kind for row in rows if row.kind))
        encoders = list(rows[0].answers) if rows else []
        choices = ["all", *([DISAGREE, AGREE] if len(encoders) > 1 else []), ALL_RIGHT, ALL_WRONG]
        choices += [f"{ONLY}{name}" for name in encoders] if len(encoders) > 1 else []
        return gr.update(choices=[EVERY, *kinds], value=EVERY), gr.update(choices=choices, value=DISAGREE if len(encoders) > 1 else "all")

    def show(self, name: str, benchmark: str, kind: str, who: str, page: float) -> tuple[str, Any, Any]:
        """A page of rows: (HTML, choice of a row, page)."""
        if not name:
            return "", gr.update(choices=[], value=None), 1
        try:
            rows = kept(rows_of(self.run(name), benchmark), kind, who)
        except (MMKitError, OSError) as error:
            return demo_page.notice_html(str(error)), gr.update(choices=[], value=None), 1
        pages = max(1, -(-len(rows) // PER_PAGE))
        number = min(max(1, int(page or 1)), pages)
        shown = rows[(number - 1) * PER_PAGE : number * PER_PAGE]
        count = f"{len(rows)} questions" if len(rows) != 1 else "1 question"
        head = demo_page.info_html(f"{count}; page {number} of {pages}")
        choices = [(f"{place + 1}: {row.question or row.name}", row.name) for place, row in enumerate(shown)]
        cards = "".join(card_html(place + 1, row) for place, row in enumerate(shown))
        return f'{head}<div class="mm-cards">{cards}</div>', gr.update(choices=choices, value=choices[0][1] if choices else None), number

    def to_chat(self, name: str, benchmark: str, row_name: str | None) -> tuple[Any, Any, Any, str]:
        """Take a row to the chat: (image, question, tabs, notice)."""
        try:
            row = next((row for row in rows_of(self.run(name), benchmark) if row.name == row_name), None)
            if row is None:
                raise DataError("choose a question first")
            image = open_image(row.image) if row.image else None
        except (MMKitError, OSError) as error:
            return gr.skip(), gr.skip(), gr.skip(), demo_page.notice_html(str(error))
        return image, row.question, gr.Tabs(selected="chat"), ""


@lru_cache(maxsize=4)
def _read(folder: Path, _changed: int) -> RunData:
    return read_runs([folder])


def card_html(number: int, row: Row) -> str:
    """One question as a card."""
    image: Image.Image | None = None
    if row.image is not None:
        try:
            image = open_image(row.image)
        except (MMKitError, OSError):
            image = None
    picture = f'<img alt="the image of question {number}" src="{demo_page.data_url(image, demo_page.THUMBNAIL)}">' if image else ""
    answers = "".join(
        f'<li><b>{escape(name)}</b><span class="{"mm-right" if right else "mm-wrong"}">{escape(words or "(no words)")} {"✓" if right else "✗"}</span></li>'
        for name, (words, right) in row.answers.items()
    )
    wanted = f"right: {row.reference}" if row.reference else ""
    small = " · ".join(part for part in (row.kind, wanted) if part)
    return f'<article class="mm-card">{picture}<p>{number}. {escape(row.question or row.name)}</p><small>{escape(small)}</small><ul>{answers}</ul></article>'


def build_browse(root: Path, picker: gr.Image, chat: ChatParts, tabs: gr.Tabs, tab: gr.Tab) -> None:
    """Put the tab together, inside the blocks that are open; each time it is opened it looks for runs."""
    browser = Browser(root)
    with gr.Row():
        run = gr.Dropdown(browser.folders(), value=None, label="Run", elem_id="mm-run")
        benchmark = gr.Dropdown([], label="Benchmark", elem_id="mm-benchmark")
        kind = gr.Dropdown([EVERY], value=EVERY, label="Kind", elem_id="mm-kind")
        who = gr.Dropdown(["all"], value="all", label="Who is right", elem_id="mm-who")
    with gr.Row():
        page = gr.Number(1, precision=0, minimum=1, label="Page", elem_id="mm-page", scale=1, min_width=80)
        row = gr.Dropdown([], label="Question", elem_id="mm-row", scale=4)
        go = gr.Button("Ask it in the chat", variant="primary", elem_id="mm-to-chat", scale=2)
    notice = gr.HTML("", elem_id="mm-browse-notice")
    rows = gr.HTML("", elem_id="mm-rows")
    tab.select(browser.look, run, [run, notice], **QUIET)
    shown: dict[str, Any] = {"fn": browser.show, "inputs": [run, benchmark, kind, who, page], "outputs": [rows, row, page], **QUIET}
    run.input(browser.choose_run, run, [benchmark, kind, who, page, notice], **QUIET).then(**shown)
    benchmark.input(browser.choose_benchmark, [run, benchmark], [kind, who, page], **QUIET).then(**shown)
    for control in (kind, who):
        control.input(lambda: 1, None, page, **QUIET).then(**shown)
    page.submit(**shown)
    page.input(**shown)
    go.click(browser.to_chat, [run, benchmark, row], [picker, chat.question, tabs, notice], **QUIET)
