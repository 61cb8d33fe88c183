"""Votes and ratings: Bradley-Terry against known strengths, a file that others hold, the order of the sides, the export."""

import json
import sqlite3
from pathlib import Path

import numpy as np
import pytest

from apps.votes import Vote, Votes, by_kind, question_kind
from mmkit.errors import DataError
from mmkit.pairs import Game, bradley_terry, first_place_share


def played(strengths: dict[str, float], count: int, seed: int = 0, first_bonus: float = 0.0) -> list[Game]:
    """Games between random pairs; strengths are in natural log."""
    rng, names, games = np.random.default_rng(seed), list(strengths), []
    for _ in range(count):
        one, other = (names[place] for place in rng.choice(len(names), 2, replace=False))
        wins = rng.random() < 1 / (1 + np.exp(strengths[other] - strengths[one] - first_bonus))
        games.append(Game(one, other, float(wins)))
    return games


def test_ratings_find_known_strengths() -> None:
    truth = {"a": 1.0, "b": 0.0, "c": -1.0}
    table = {row.name: row for row in bradley_terry(played(truth, 3000), draws=200)}
    for name, strength in truth.items():
        points = 1000 + 400 * strength / np.log(10)
        assert table[name].rating == pytest.approx(points, abs=25)
        assert table[name].low < points < table[name].high
    assert [row.name for row in bradley_terry(played(truth, 3000), draws=20)] == ["a", "b", "c"]


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    truth, covered, tries = {"a": 0.4, "b": -0.4}, 0, 120
    for seed in range(tries):
        row = bradley_terry(played(truth, 120, seed), draws=200, seed=seed)
        a = next(rating for rating in row if rating.name == "a")
        covered += a.low <= 1000 + 400 * 0.4 / np.log(10) <= a.high
    assert covered / tries >= 0.89  # 95 % asked; two standard errors of 120 tries, and a little for the percentile bootstrap


def test_a_tie_is_half_a_win_and_a_perfect_record_stays_finite() -> None:
    tied = bradley_terry([Game("a", "b", 0.5)] * 10, draws=10)
    assert [row.rating for row in tied] == pytest.approx([1000, 1000])
    best = bradley_terry([Game("a", "b", 1.0)] * 10, draws=10)
    assert best[0].name == "a"
    assert np.isfinite([best[0].rating, best[1].rating]).all()
    assert (best[0].wins, best[0].games) == (10, 10)
    assert bradley_terry([]) == []


def test_an_order_that_sways_the_voters_is_seen() -> None:
    _, low, high, n = first_place_share(played({"a": 0.0, "b": 0.0}, 400, first_bonus=1.0))
    assert low > 0.5
    assert n == 400
    _, low, high, n = first_place_share(played({"a": 0.0, "b": 0.0}, 400))
    assert low < 0.5 < high
    assert first_place_share([Game("a", "b", 0.5)]) == (0.5, 0.0, 1.0, 0)


@pytest.mark.parametrize(
    ("question", "kind"),
    [
        ("How many objects are there?", "count"), ("what color is the background?", "colour"), ("what word is written?", "reading"),
        ("is there a cat?", "yes or no"), ("describe the picture.", "describe"), ("where is the dog?", "place"),
        ("what is this?", "object"), ("hm", "other"),
    ],
)  # fmt: skip
def test_a_question_has_a_kind(question: str, kind: str) -> None:
    assert question_kind(question) == kind
    assert Vote(question, "a", "b", "tie").kind == kind


def test_votes_survive_and_are_shared_by_two_demos(tmp_path: Path) -> None:
    path = tmp_path / "deep/votes.sqlite"
    one, other = Votes(path), Votes(path)
    assert one.add(Vote("what's this; DROP TABLE votes?", "clip", "uta", "first", "a 'quoted' answer"))
    assert other.add(Vote("how many?", "uta", "clip", "both_bad"))
    assert [vote.choice for vote in Votes(path).all()] == ["first", "both_bad"]
    assert Votes(path).all()[0].first_answer == "a 'quoted' answer"
    assert list(by_kind(one.all())) == ["object", "count"]
    assert one.export(tmp_path / "votes.jsonl") == 2
    rows = [json.loads(line) for line in (tmp_path / "votes.jsonl").read_text().splitlines()]
    assert [row["choice"] for row in rows] == ["first", "both_bad"]


def test_a_vote_given_while_another_process_holds_the_file_is_kept_and_written_later(tmp_path: Path) -> None:
    votes = Votes(tmp_path / "votes.sqlite", wait=0.1)
    votes.add(Vote("one?", "a", "b", "first"))
    holder = sqlite3.connect(votes.path)
    holder.execute("BEGIN IMMEDIATE")
    assert votes.add(Vote("two?", "a", "b", "second")) is False
    assert [vote.question for vote in votes.all()] == ["one?", "two?"]  # counted already, though it waits
    holder.rollback()
    holder.close()
    assert votes.add(Vote("three?", "a", "b", "tie"))
    assert [vote.question for vote in Votes(votes.path).all()] == ["one?", "two?", "three?"]


def test_a_vote_that_still_waits_at_the_end_is_not_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    votes = Votes(tmp_path / "votes.sqlite", wait=0.1)
    votes.add(Vote("one?", "a", "b", "first"))
    assert votes.close() == votes.path
    holder = sqlite3.connect(votes.path)
    holder.execute("BEGIN IMMEDIATE")
    votes.add(Vote("two?", "a", "b", "second"))
    beside = votes.close(wait=0.1)
    assert [json.loads(line)["question"] for line in beside.read_text().splitlines()] == ["two?"]
    assert str(beside) in capsys.readouterr().err
    holder.close()
    assert votes.close() == votes.path
    assert [vote.question for vote in Votes(votes.path).all()] == ["one?", "two?"]


def test_files_and_choices_that_are_none_are_refused(tmp_path: Path) -> None:
    broken = tmp_path / "votes.sqlite"
    broken.write_text("these are no votes " * 100)
    with pytest.raises(DataError, match=r"votes\.sqlite"):
        Votes(broken)
    with pytest.raises(DataError, match="not 'third'"):
        Vote("?", "a", "b", "third")  # type: ignore[arg-type]
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(DataError, match="folder"):
        Votes(folder).add(Vote("?", "a", "b", "tie"))
