"""Ratings from pairwise votes: the Bradley-Terry model with bootstrap intervals.

P(i is preferred to j) = s_i / (s_i + s_j) (Bradley and Terry 1952), fitted by minorise-maximise steps (Hunter 2004). A tie counts half a win
for either side, as in Chatbot Arena (arXiv 2403.04132, section 4), which also gives the scale: 400 points are odds of ten to one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmkit.stats import wilson

DRAWS, SEED = 1000, 0
MIDDLE = 1000.0  # the mean rating
POINTS = 400.0  # for odds of ten to one
PRIOR = 0.5  # ties added to every pair that met: without, a side that never lost would be infinitely strong
STEPS = 300


@dataclass(frozen=True)
class Game:
    """One vote: who was shown first, who second, and the first one's share of the win: 1, 0, or 1/2 for a tie."""

    first: str
    second: str
    score: float


@dataclass(frozen=True)
class Rating:
    """A model's place in a table of votes; `low` and `high` are the 95 % interval of `rating`."""

    name: str
    rating: float
    low: float
    high: float
    games: int
    wins: float


def bradley_terry(games: Sequence[Game], draws: int = DRAWS, seed: int = SEED) -> list[Rating]:
    """Rate all that met.

    Args:
        games: The votes. Sides that are not connected by any chain of votes are rated against the mean all the same: only ratings within a
            connected group compare.
        draws: Bootstrap samples of the votes.
        seed: Of the bootstrap.

    Returns:
        The strongest first; empty without votes.
    """
    if not games:
        return []
    names = sorted({game.first for game in games} | {game.second for game in games})
    place = {name: index for index, name in enumerate(names)}
    rows = np.array([(place[game.first], place[game.second], game.score) for game in games])
    rng = np.random.default_rng(seed)
    counts = np.vstack([np.ones(len(games)), rng.multinomial(len(games), np.full(len(games), 1 / len(games)), size=draws)])
    ratings = _fit(rows, counts, len(names))
    low, high = np.percentile(ratings[1:], [2.5, 97.5], axis=0)
    played = np.bincount(rows[:, :2].astype(int).ravel(), minlength=len(names))
    wins = np.bincount(rows[:, 0].astype(int), rows[:, 2], len(names)) + np.bincount(rows[:, 1].astype(int), 1 - rows[:, 2], len(names))
    table = [
        Rating(name, float(ratings[0, i]), float(low[i]), float(high[i]), int(played[i]), float(wins[i])) for i, name in enumerate(names)
    ]
    return sorted(table, key=lambda row: -row.rating)


def _fit(rows: np.ndarray, counts: np.ndarray, size: int) -> np.ndarray:
    """Fit each row of counts [S, G] over games [G, 3]; ratings [S, size]."""
    first, second, score = rows[:, 0].astype(int), rows[:, 1].astype(int), rows[:, 2]
    wins = np.zeros((len(counts), size, size))  # [sample, who, against]
    for game in range(len(rows)):
        wins[:, first[game], second[game]] += counts[:, game] * score[game]
        wins[:, second[game], first[game]] += counts[:, game] * (1 - score[game])
    met = np.zeros((size, size), dtype=bool)
    met[first, second] = met[second, first] = True
    wins += PRIOR / 2 * met
    played = wins + wins.transpose(0, 2, 1)
    strength = np.ones((len(counts), size))
    for _ in range(STEPS):
        strength = wins.sum(axis=2) / (played / (strength[:, :, None] + strength[:, None, :])).sum(axis=2)
        strength /= np.exp(np.log(strength).mean(axis=1, keepdims=True))
    fitted: np.ndarray = MIDDLE + POINTS * np.log10(strength)
    return fitted


def first_place_share(games: Sequence[Game]) -> tuple[float, float, float, int]:
    """How often the side shown first won, of the votes that name a winner: (share, low, high, votes), Wilson's 95 % interval.

    Far from a half, the order in which answers are shown sways the voters.
    """
    decided = [game.score for game in games if game.score in (0.0, 1.0)]
    if not decided:
        return 0.5, 0.0, 1.0, 0
    low, high = wilson(sum(decided), len(decided))
    return float(np.mean(decided)), low, high, len(decided)
