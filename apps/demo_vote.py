"""The demo's blind vote: two models answer without their names, in random order; after the vote the names are shown and counted."""

import json
import secrets
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import gradio as gr

from apps import demo_page
from apps.chat_session import ChatSession, ModelShelf
from apps.demo_chat import BUSY, IDLE
from apps.demo_desk import DOWNLOAD, QUIET, STREAMED, Desk, limits_of
from apps.votes import Choice, Vote, Votes, by_kind
from mmkit.errors import DataError, MMKitError
from mmkit.pairs import bradley_terry, first_place_share

BLIND = ("Model A", "Model B")
CHOICES: dict[Choice, str] = {"first": "A is better", "second": "B is better", "tie": "As good", "both_bad": "Both bad"}
FEW = 5  # votes; a kind of question with fewer has no table
ENOUGH = 10  # votes; a bootstrap of fewer says nothing


@dataclass
class Battle:
    """Two models that answer one person until the vote."""

    places: tuple[int, int]
    names: tuple[str, str]
    session: ChatSession
    settings: str = ""
    voted: bool = False

    @classmethod
    def draw(cls, shelf: ModelShelf) -> "Battle":
        """Draw two models and their order; nobody can know them beforehand."""
        first, second = secrets.SystemRandom().sample(range(len(shelf.models)), 2)
        return cls((first, second), (shelf.names[first], shelf.names[second]), ChatSession(shelf.pick([first, second], BLIND)))


class Voting:
    """The tab's handlers; a `Battle` per open page."""

    def __init__(self, desk: Desk, votes: Votes) -> None:
        self.desk, self.votes = desk, votes
        self.battles: dict[str, Battle] = {}

    def ask(self, request: gr.Request, path: str | None, more: Any, question: str, *settings: Any) -> Iterator[Any]:
        """Ask two unnamed models; yields (answers, notice, question box, ask button, stop button, the vote's buttons)."""
        key, memory = str(request.session_hash), self.desk.memory(request)
        closed, open_ = ([gr.update(interactive=state)] * len(CHOICES) for state in (False, True))
        battle = self.battles.get(key)
        try:
            if battle is None or battle.voted:
                battle = self.battles[key] = Battle.draw(self.desk.shelf)
            limits = limits_of(*settings)
            battle.settings = json.dumps(asdict(limits))
            for number, rounds in enumerate(battle.session.ask(question or "", self.desk.images(path, more, request), limits)):
                box = "" if number == 0 else gr.skip()
                yield demo_page.rounds_html(rounds, memory), "", box, *BUSY, *closed
            failed = any(answer.state == "failed" for answer in battle.session.rounds[-1].answers)
            notice = demo_page.notice_html("a model failed: there is nothing to vote on; ask again") if failed else ""
            battle.voted = failed
            yield gr.skip(), notice, gr.skip(), *IDLE, *(closed if failed else open_)
        except (MMKitError, ValueError, OSError) as error:
            yield gr.skip(), demo_page.notice_html(str(error)), gr.skip(), *IDLE, *[gr.skip()] * len(CHOICES)

    def stop(self, request: gr.Request) -> None:
        """End the answers being written."""
        if battle := self.battles.get(str(request.session_hash)):
            battle.session.stop()

    def vote(self, choice: Choice, request: gr.Request) -> tuple[Any, ...]:
        """Keep a vote and say who was who: (notice, table, the vote's buttons)."""
        battle, closed = self.battles.get(str(request.session_hash)), [gr.update(interactive=False)] * len(CHOICES)
        try:
            if battle is None or battle.voted or not battle.session.rounds:
                raise DataError("there is nothing to vote on: ask the two models first; a vote counts once")
            last = battle.session.rounds[-1]
            if not all(answer.finished for answer in last.answers):
                raise DataError("the answers are still being written")
            battle.voted = True
            written = self.votes.add(
                Vote(
                    last.question, *battle.names, choice, last.answers[0].text.strip(), last.answers[1].text.strip(),
                    images=",".join(last.digests), settings=battle.settings,
                )
            )  # fmt: skip
        except (MMKitError, OSError) as error:
            return demo_page.notice_html(str(error)), gr.skip(), *closed
        said = f"{BLIND[0]} was {battle.names[0]}, {BLIND[1]} was {battle.names[1]}."
        if not written:
            said += f" Another process holds {self.votes.path.name}: the vote is kept here and written with the next one."
        return demo_page.info_html(said), self.table(), *closed

    def table(self) -> str:
        """All votes: ratings in all and by kind of question, and whether the order sways."""
        try:
            votes = self.votes.all()
        except MMKitError as error:
            return demo_page.notice_html(str(error))
        if not votes:
            return demo_page.info_html("No vote yet.")
        games = [vote.game for vote in votes]
        kinds = {kind: rows for kind, rows in by_kind(votes).items() if len(rows) >= FEW}
        drawn = [ratings_html("All questions", votes)]
        drawn += [ratings_html(kind, rows) for kind, rows in kinds.items() if len(kinds) > 1]
        share, low, high, n = first_place_share(games)
        order = (
            f"The answer shown first won {share:.0%} [{low:.0%}, {high:.0%}] of {n} votes with a winner"
            if n
            else "No vote has a winner yet"
        )
        sways = " The order sways the voters." if n and not low <= 0.5 <= high else ""
        return "".join(drawn) + demo_page.info_html(f"{order}.{sways} Ratings: Bradley-Terry, ties half a win, 95 % by bootstrap.")

    def export(self) -> tuple[str, str]:
        """All votes as JSONL for the browser, the file's name in the first line: (file, notice)."""
        try:
            rows = [json.dumps(asdict(vote), ensure_ascii=False) for vote in self.votes.all()]
        except MMKitError as error:
            return "", demo_page.notice_html(str(error))
        if not rows:
            return "", demo_page.notice_html("there is no vote to export yet")
        return "mmkit-votes.jsonl\n" + "\n".join(rows) + "\n", ""

    def forget(self, request: gr.Request) -> None:
        """A page was closed."""
        if battle := self.battles.pop(str(request.session_hash), None):
            battle.session.stop()


def ratings_html(caption: str, votes: list[Vote]) -> str:
    """A table of ratings."""
    rows = [
        (
            row.name,
            f"{row.rating:.0f}",
            f"{row.low:.0f} to {row.high:.0f}" if len(votes) >= ENOUGH else "too few votes",
            f"{row.wins:g} of {row.games}",
        )
        for row in bradley_terry([vote.game for vote in votes])
    ]
    count = "1 vote" if len(votes) == 1 else f"{len(votes)} votes"
    return demo_page.table_html(f"{caption}: {count}", ("Model", "Rating", "95 %", "Wins"), rows, numbers=(1, 2, 3))


def build_vote(desk: Desk, votes: Votes, picker: gr.Image, more: gr.Gallery, settings: list[gr.components.Component], tab: gr.Tab) -> None:
    """Put the tab together, inside the blocks that are open."""
    if len(desk.shelf.models) < 2:
        gr.HTML(demo_page.info_html("A blind vote is between two models: start the demo with `--model A --model B`."))
        return
    voting = Voting(desk, votes)
    answers = gr.HTML(demo_page.info_html("Two models answer without their names; vote, and see who they were."), elem_id="mm-vote-answers")
    notice = gr.HTML("", elem_id="mm-vote-notice")
    with gr.Row(elem_id="mm-vote-send"):
        question = gr.Textbox(
            placeholder="Ask both …", show_label=False, label="Question for both", lines=1, max_lines=4, scale=1, container=False,
            elem_id="mm-vote-question",
        )  # fmt: skip
        send = gr.Button("Ask both", variant="primary", elem_id="mm-vote-ask")
        stop = gr.Button("Stop", variant="stop", interactive=False, elem_id="mm-vote-stop")
    with gr.Row(elem_id="mm-vote-buttons"):
        buttons = [gr.Button(text, interactive=False, elem_id=f"mm-vote-{choice}") for choice, text in CHOICES.items()]
    table = gr.HTML("", elem_id="mm-votes")
    export = gr.Button("Export the votes", size="sm", elem_id="mm-vote-export")
    file = gr.Textbox(visible="hidden", elem_id="mm-vote-file", label="file")
    outputs = [answers, notice, question, send, stop, *buttons]
    gr.on([send.click, question.submit], voting.ask, [picker, more, question, *settings], outputs, **STREAMED)
    stop.click(voting.stop, None, None, **QUIET)
    for button, choice in zip(buttons, CHOICES, strict=True):
        button.click(_voter(voting, choice), None, [notice, table, *buttons], **QUIET)
    tab.select(voting.table, None, table, **QUIET)
    export.click(voting.export, None, [file, notice], **QUIET).then(None, file, None, js=DOWNLOAD)
    desk.leavers.append(voting.forget)


def _voter(voting: Voting, choice: Choice) -> Any:
    def vote(request: gr.Request) -> tuple[Any, ...]:
        return voting.vote(choice, request)

    return vote
