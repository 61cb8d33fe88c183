"""Error bars and comparisons: Wilson, clustered and paired bootstrap, McNemar, ratio of means, Holm.

Two encoders are always compared on the same items; questions that share an image are resampled together, because they fail together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mmkit.errors import DataError

DRAWS = 10_000
Z95 = 1.959963984540054  # two-sided 95 % point of the normal distribution
_CELLS = 4_000_000  # resampled indices held at once, 32 MB: 10,000 draws of 40,000 images do not fit in memory

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval, in the unit of the values given."""

    value: float
    low: float
    high: float
    n: int

    def scaled(self, factor: float) -> Estimate:
        """The same in another unit: `scaled(100)` turns a fraction into percent."""
        return Estimate(self.value * factor, self.low * factor, self.high * factor, self.n)

    def excludes_zero(self) -> bool:
        """True when the interval lies wholly on one side of zero."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class PairedDifference:
    """Mean of x - y over the same items, with the standard error of pairs and, to compare, the one that forgets the pairs."""

    mean: float
    se: float
    unpaired_se: float
    low: float
    high: float
    n: int

    @property
    def t(self) -> float:
        """Mean over its standard error; 0 for identical answers."""
        return self.mean / self.se if self.se else (0.0 if self.mean == 0 else math.copysign(math.inf, self.mean))


@dataclass(frozen=True)
class McNemar:
    """Test of right and wrong on the same items; only the items on which the two disagree speak."""

    only_first: int
    only_second: int
    exact_p: float
    mid_p: float
    chi2: float
    chi2_continuity: float


@dataclass(frozen=True)
class OverSeeds:
    """Mean of the same figure over repeated trainings; spread and interval are None for a single one."""

    mean: float
    sd: float | None
    low: float | None
    high: float | None
    n: int


def wilson(correct: float, n: float) -> tuple[float, float]:
    """The Wilson 95 % interval of one share; good near 0 and 1, where the plain one has no width.

    Args:
        correct: How many were right; fractions (VQA accuracy) are allowed.
        n: Out of how many independent items.

    Raises:
        DataError: n is not positive, or correct is outside 0..n.
    """
    if n <= 0 or not 0 <= correct <= n:
        raise DataError(f"{correct} right of {n} items is no share")
    share, z2 = correct / n, Z95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def standard_error(values: ArrayLike, clusters: Sequence[Hashable] | None = None, small_sample: bool = False) -> float:
    """Standard error of the mean; with clusters, of questions that share an image.

    Args:
        values: Scores [n].
        clusters: The image of each item [n]; None takes the items as independent, with the variance sum((x - mean)^2) / n.
        small_sample: Multiply the clustered variance by G / (G - 1).

    Source: specs of cluster-robust errors: sqrt(sum over images of (errors summed in the image)^2) / n.
    """
    scores = _floats(values, "values")
    residuals = scores - scores.mean()
    if clusters is None:
        return float(math.sqrt((residuals**2).mean() / len(scores)))
    sums = _cluster_sums(residuals[:, None], clusters)[:, 0]  # [G]
    factor = len(sums) / (len(sums) - 1) if small_sample and len(sums) > 1 else 1.0
    return float(math.sqrt(factor * (sums**2).sum()) / len(scores))


def paired_difference(first: ArrayLike, second: ArrayLike) -> PairedDifference:
    """The normal-theory comparison of two encoders on the same items (the bootstrap needs no normality; this one is exact to repeat)."""
    x, y = _pair(first, second)
    if len(x) < 2:
        raise DataError(f"a standard error of {len(x)} item: at least two are needed")
    difference = x - y
    mean, se = float(difference.mean()), float(difference.std(ddof=1) / math.sqrt(len(x)))
    unpaired = math.sqrt((x.var(ddof=1) + y.var(ddof=1)) / len(x))
    return PairedDifference(mean, se, unpaired, mean - Z95 * se, mean + Z95 * se, len(x))


def bootstrap(
    columns: Floats,
    statistic: Callable[[Floats], Floats],
    clusters: Sequence[Hashable] | None = None,
    draws: int = DRAWS,
    seed: int = 0,
) -> Floats:
    """Resample items (or images with all their items) and compute a statistic of the totals in every draw.

    Args:
        columns: [n, S], what is summed over the items: scores of each model, and a column of ones where a mean is wanted.
        statistic: Takes totals [draws, S], gives one number a draw [draws].
        clusters: The image of each item [n]; None resamples items.
        draws: How many resamples.
        seed: Equal seeds give equal intervals.

    Returns:
        The statistic of each draw [draws].

    Raises:
        DataError: No items, or as many clusters as items is not what was given.
    """
    sums = columns if clusters is None else _cluster_sums(columns, clusters)  # [G, S]
    groups, generator = len(sums), np.random.default_rng(seed)
    if not groups:
        raise DataError("no items to resample: is the answer file empty?")
    out = np.empty(draws)
    step = max(1, _CELLS // groups)
    for start in range(0, draws, step):
        picked = generator.integers(0, groups, size=(min(step, draws - start), groups))  # [d, G]
        totals = np.stack([column[picked].sum(axis=1) for column in sums.T], axis=1)  # [d, S]
        out[start : start + len(picked)] = statistic(totals)
    return out


def mean_interval(values: ArrayLike, clusters: Sequence[Hashable] | None = None, draws: int = DRAWS, seed: int = 0) -> Estimate:
    """Mean of scores in [0, 1] with a percentile bootstrap interval, resampled by cluster.

    Where every cluster scores the same 0 or 1, resampling shows no spread: the Wilson interval over clusters is given instead.

    Raises:
        DataError: No values, or a value outside [0, 1].
    """
    scores = _floats(values, "values")
    if scores.min() < 0 or scores.max() > 1:
        raise DataError(f"scores run from {scores.min():g} to {scores.max():g}; fractions from 0 to 1 are wanted, not percent")
    value, n = float(scores.mean()), len(scores)
    groups = n if clusters is None else len(set(clusters))
    if value in (0.0, 1.0):
        low, high = wilson(value * groups, groups)
        return Estimate(value, low, high, n)
    drawn = bootstrap(np.stack([scores, np.ones(n)], axis=1), _mean_of_totals, clusters, draws, seed)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Estimate(value, float(low), float(high), n)


def paired_bootstrap(
    first: ArrayLike, second: ArrayLike, clusters: Sequence[Hashable] | None = None, draws: int = DRAWS, seed: int = 0
) -> Estimate:
    """Mean of first - second on the same items with a percentile 95 % interval.

    Args:
        first: Scores of one model [n].
        second: Scores of the other on the same items, in the same order [n].
        clusters: The image of each item [n].
        draws: How many resamples.
        seed: Equal seeds give equal intervals.
    """
    x, y = _pair(first, second)
    difference = x - y
    drawn = bootstrap(np.stack([difference, np.ones(len(x))], axis=1), _mean_of_totals, clusters, draws, seed)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Estimate(float(difference.mean()), float(low), float(high), len(x))


def bootstrap_ratio(
    candidate: ArrayLike, reference: ArrayLike, clusters: Sequence[Hashable] | None = None, draws: int = DRAWS, seed: int = 0
) -> Estimate:
    """100 * mean(candidate) / mean(reference), a ratio of means, with a percentile interval over resampled items."""
    x, y = _pair(candidate, reference)
    if y.sum() == 0:
        raise DataError("the reference scores sum to 0: a ratio to them has no meaning")
    drawn = bootstrap(np.stack([x, y], axis=1), lambda totals: 100 * totals[:, 0] / totals[:, 1], clusters, draws, seed)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Estimate(float(100 * x.sum() / y.sum()), float(low), float(high), len(x))


def ratio_of_means(candidate: ArrayLike, reference: ArrayLike) -> tuple[float, float]:
    """100 * mean(candidate) / mean(reference) and its delta-method standard error, both in percent."""
    x, y = _pair(candidate, reference)
    if len(x) < 2 or y.mean() == 0:
        raise DataError("a ratio of means needs at least two items and a reference mean that is not 0")
    ratio = float(x.mean() / y.mean())
    spread = math.sqrt(((x - ratio * y) ** 2).sum() / (len(x) - 1) / len(x))
    return 100 * ratio, 100 * spread / float(y.mean())


def over_seeds(values: ArrayLike) -> OverSeeds:
    """Mean, standard deviation (n - 1) and Student's 95 % interval of a figure over seeds.

    With three seeds the interval is 2.5 standard deviations wide to each side: so little do three runs say.
    For a comparison by seed give the differences.
    """
    x = _floats(values, "values")
    if len(x) == 1:
        return OverSeeds(float(x[0]), None, None, None, 1)
    mean, sd = float(x.mean()), float(x.std(ddof=1))
    half = student_t95(len(x) - 1) * sd / math.sqrt(len(x))
    return OverSeeds(mean, sd, mean - half, mean + half, len(x))


def student_t95(freedom: int) -> float:
    """The two-sided 95 % point of Student's t with `freedom` >= 1 degrees.

    Source: the finite sums of Abramowitz and Stegun, 26.7.3 and 26.7.4, inverted by bisection.
    """
    if freedom < 1:
        raise DataError(f"Student's t with {freedom} degrees of freedom: at least two values are needed for an interval")
    low, high = 0.0, 100.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_inside(middle, freedom) < 0.95 else (low, middle)
    return (low + high) / 2


def _t_inside(t: float, freedom: int) -> float:
    """P(|T| < t)."""
    angle = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term, total = (cosine, cosine) if odd else (1.0, 1.0)
    if freedom == 1:
        total = 0.0
    for step in range(2 + odd, freedom, 2):
        term *= cosine * cosine * (step - 1) / step
        total += term
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def mcnemar(only_first: int, only_second: int) -> McNemar:
    """Exact and mid-p test that two models are right equally often.

    Args:
        only_first: Items that the first has right and the second wrong.
        only_second: The other way round.

    Raises:
        DataError: A count is negative.
    """
    b, c = int(only_first), int(only_second)
    if b < 0 or c < 0:
        raise DataError(f"McNemar takes counts, got {b} and {c}")
    n, k = b + c, min(b, c)
    if n == 0:
        return McNemar(b, c, 1.0, 1.0, 0.0, 0.0)
    below, at = math.fsum(_binomial(n, i) for i in range(k)), _binomial(n, k)
    chi2 = (b - c) ** 2 / n
    continuity = max(0, abs(b - c) - 1) ** 2 / n
    return McNemar(b, c, min(1.0, 2 * (below + at)), min(1.0, 2 * below + at), chi2, continuity)


def mcnemar_of(first: ArrayLike, second: ArrayLike, threshold: float = 0.5) -> McNemar:
    """McNemar's test on scores: an item is right from `threshold` on (VQA accuracy 0.6, two agreeing people, is right)."""
    x, y = _pair(first, second)
    right_x, right_y = x >= threshold, y >= threshold
    return mcnemar(int((right_x & ~right_y).sum()), int((right_y & ~right_x).sum()))


def normal_p(value: float, low: float, high: float) -> float:
    """Two-sided p of a difference whose 95 % interval is known, taken as normal."""
    half = (high - low) / 2
    return 1.0 if value == 0 else math.erfc(Z95 * abs(value) / half / math.sqrt(2)) if half else 0.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values of several comparisons by Holm's step-down rule, in the order given."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def smallest_difference(discordance: float, n: int) -> float:
    """The smallest true difference that a 5 % test sees with 80 % power, when a share `discordance` of n items gets different answers."""
    return 2.8 * math.sqrt(discordance / n)


def _binomial(n: int, k: int) -> float:
    """P(X = k) of n fair coins; in logarithms, because 2 ** n overflows from n = 1024 on."""
    return math.exp(math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2))


def _mean_of_totals(totals: Floats) -> Floats:
    return np.asarray(totals[:, 0] / totals[:, 1])


def _floats(values: ArrayLike, name: str) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not len(array):
        raise DataError(f"{name} must be a list of at least one number, got shape {list(array.shape)}")
    if not np.isfinite(array).all():
        raise DataError(f"{int((~np.isfinite(array)).sum())} of {len(array)} {name} are not finite; a missing score is left out, never NaN")
    return array


def _pair(first: ArrayLike, second: ArrayLike) -> tuple[Floats, Floats]:
    x, y = _floats(first, "first scores"), _floats(second, "second scores")
    if len(x) != len(y):
        raise DataError(f"{len(x)} scores against {len(y)}: pairs need the same items in the same order")
    return x, y


def _cluster_sums(columns: Floats, clusters: Sequence[Hashable]) -> Floats:
    """Sum the rows of every cluster: [n, S] -> [G, S]; clusters in order of first appearance, so that names do not change the draws."""
    if len(clusters) != len(columns):
        raise DataError(f"{len(clusters)} cluster names for {len(columns)} items")
    index: dict[Hashable, int] = {}
    which = np.array([index.setdefault(name, len(index)) for name in clusters])
    sums = np.zeros((len(index), columns.shape[1]))
    np.add.at(sums, which, columns)
    return sums
