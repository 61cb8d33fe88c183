"""Intervals and tests give the golden figures, repeat by seed, and respect pairs and clusters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmkit import stats
from mmkit.errors import DataError

GOLDEN = Path(__file__).parent / "golden" / "eval" / "statistics.json"


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    return json.loads(GOLDEN.read_text(encoding="utf-8"))


def test_mcnemar_equals_the_golden_table(golden: dict[str, Any]) -> None:
    for row in golden["mcnemar"]:
        test = stats.mcnemar(row["b"], row["c"])
        assert test.exact_p == pytest.approx(row["exact_two_sided"], abs=1e-9, rel=1e-6), row
        assert test.mid_p == pytest.approx(row["mid_p"], abs=1e-9, rel=1e-6), row
        assert test.chi2 == pytest.approx(row["chi2"], abs=1e-6)
        assert test.chi2_continuity == pytest.approx(row["chi2_continuity"], abs=1e-6)


def test_mcnemar_of_many_thousands_neither_overflows_nor_vanishes() -> None:
    test = stats.mcnemar(20_000, 20_200)
    assert 0.3 < test.mid_p <= test.exact_p < 0.34  # normal approximation: z = 0.998, p = 0.319


def test_identical_answers_give_p_one() -> None:
    assert stats.mcnemar_of([1, 0, 1], [1, 0, 1]).exact_p == 1.0


def test_wilson_equals_the_golden_table(golden: dict[str, Any]) -> None:
    for row in golden["wilson"]:
        assert stats.wilson(row["correct"], row["n"]) == pytest.approx(tuple(row["wilson95"]), abs=1e-6), row


def test_paired_differences_equal_the_golden_table(golden: dict[str, Any]) -> None:
    for row in golden["paired"]:
        ours = stats.paired_difference(row["y"], row["x"])  # the golden figures are y - x
        assert ours.mean == pytest.approx(row["mean_difference"], abs=1e-9)
        assert ours.se == pytest.approx(row["paired_se"], abs=1e-9)
        assert ours.t == pytest.approx(row["t"], abs=1e-6)
        assert ours.unpaired_se == pytest.approx(row["unpaired_se"], abs=1e-6)
        assert (ours.low, ours.high) == pytest.approx(tuple(row["normal95"]), abs=1e-6)


def test_ratios_equal_the_golden_table(golden: dict[str, Any]) -> None:
    for row in golden["ratio_of_means"]:
        value, error = stats.ratio_of_means(row["candidate"], row["reference"])
        assert value == pytest.approx(row["relative"], abs=1e-6)
        assert error == pytest.approx(row["delta_method_se"], abs=1e-6)


def test_clustered_errors_equal_the_golden_table(golden: dict[str, Any]) -> None:
    for row in golden["clustered"]:
        values = [score for group in row["groups"] for score in group]
        images = [index for index, group in enumerate(row["groups"]) for _ in group]
        assert np.mean(values) == pytest.approx(row["accuracy"])
        assert stats.standard_error(values) == pytest.approx(row["naive_se"], abs=1e-6)
        assert stats.standard_error(values, images) == pytest.approx(row["cluster_se"], abs=1e-6)
        assert stats.standard_error(values, images, small_sample=True) == pytest.approx(row["cluster_se_small_sample"], abs=1e-6)


def test_ten_thousand_draws_come_near_two_hundred_thousand(golden: dict[str, Any]) -> None:
    target, pair = golden["bootstrap_target"], golden["paired"][2]
    ours = stats.paired_bootstrap(pair["y"], pair["x"])
    assert (ours.low, ours.high) == pytest.approx(tuple(target["percentile95"]), abs=target["tolerance_for_10000_resamples"])
    target, pair = golden["bootstrap_ratio_target"], golden["ratio_of_means"][2]
    ours = stats.bootstrap_ratio(pair["candidate"], pair["reference"])
    assert (ours.low, ours.high) == pytest.approx(tuple(target["percentile95"]), abs=target["tolerance_for_10000_resamples"])


def test_a_seed_gives_the_same_interval_twice_and_names_of_images_do_not_matter() -> None:
    values = np.random.default_rng(0).integers(0, 2, 60)
    first = stats.mean_interval(values, [f"image {i // 3}" for i in range(60)], seed=5)
    assert first == stats.mean_interval(values, [i // 3 for i in range(60)], seed=5)
    assert first != stats.mean_interval(values, [i // 3 for i in range(60)], seed=6)


def test_a_batched_bootstrap_is_as_good_as_one_in_a_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    columns = np.random.default_rng(1).random((40, 2))
    whole = stats.bootstrap(columns, lambda totals: totals[:, 0] / totals[:, 1], draws=500)
    monkeypatch.setattr(stats, "_CELLS", 400)  # ten draws at a time
    assert np.array_equal(whole, stats.bootstrap(columns, lambda totals: totals[:, 0] / totals[:, 1], draws=500))


def test_questions_of_one_image_widen_the_interval() -> None:
    values = np.repeat(np.random.default_rng(2).integers(0, 2, 50), 6)  # six questions an image, all right or all wrong
    images = np.repeat(np.arange(50), 6).tolist()
    together, apart = stats.mean_interval(values, images), stats.mean_interval(values)
    assert (together.high - together.low) / (apart.high - apart.low) == pytest.approx(6**0.5, rel=0.1)


def test_pairs_narrow_the_interval_of_a_difference() -> None:
    generator = np.random.default_rng(3)
    easy = generator.random(400)
    first, second = (easy < 0.7).astype(float), (easy < 0.66).astype(float)
    paired = stats.paired_bootstrap(first, second)
    assert paired.excludes_zero()
    assert paired.high - paired.low < 0.5 * 2 * 1.96 * stats.paired_difference(first, second).unpaired_se


def test_all_right_has_an_interval_with_width() -> None:
    ours = stats.mean_interval(np.ones(20), list(range(10)) * 2)
    assert (ours.low, ours.high) == pytest.approx(stats.wilson(10, 10))
    assert ours.low < 0.75


def test_holm_is_the_step_down_rule() -> None:
    assert stats.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert stats.holm([0.9, 0.8]) == [1.0, 1.0]


def test_the_smallest_visible_difference_is_the_specs_example() -> None:
    assert 100 * stats.smallest_difference(0.15, 12_578) == pytest.approx(1.0, abs=0.05)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=2, max_size=30), st.integers(0, 3))
def test_an_interval_holds_its_mean_and_stays_in_range(values: list[float], seed: int) -> None:
    ours = stats.mean_interval(values, draws=2000, seed=seed)
    assert -1e-9 <= ours.low <= ours.value + 1e-9
    assert ours.value - 1e-9 <= ours.high <= 1 + 1e-9


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: stats.wilson(3, 0), "no share"),
        (lambda: stats.mcnemar(-1, 2), "counts"),
        (lambda: stats.mean_interval([]), "at least one number"),
        (lambda: stats.mean_interval([50.0, 70.0]), "not percent"),
        (lambda: stats.mean_interval([0.5, float("nan")]), "never NaN"),
        (lambda: stats.paired_bootstrap([1, 0], [1]), "2 scores against 1"),
        (lambda: stats.standard_error([1, 0], ["a"]), "1 cluster names for 2 items"),
        (lambda: stats.bootstrap_ratio([1, 2], [0, 0]), "sum to 0"),
    ],
)
def test_figures_that_mean_nothing_are_refused(call: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        call()


def test_students_t_is_that_of_the_tables() -> None:
    table = {1: 12.7062, 2: 4.30265, 3: 3.18245, 4: 2.77645, 5: 2.57058, 9: 2.26216, 10: 2.22814, 30: 2.04227, 101: 1.98373}
    assert {freedom: round(stats.student_t95(freedom), 5) for freedom in table} == pytest.approx(table, abs=5e-5)
    with pytest.raises(DataError, match="at least two values"):
        stats.student_t95(0)


def test_three_seeds_say_little_and_one_says_nothing_of_spread() -> None:
    found = stats.over_seeds([1.0, 2.0, 3.0])
    assert (found.mean, found.sd, found.n) == (2.0, 1.0, 3)
    assert (found.low, found.high) == pytest.approx((2 - 4.30265 / 3**0.5, 2 + 4.30265 / 3**0.5), abs=1e-4)
    assert stats.over_seeds([0.7]) == stats.OverSeeds(0.7, None, None, None, 1)
    covered = 0
    for seed in range(400):  # the interval holds the truth in 95 of 100 cases
        drawn = stats.over_seeds(np.random.default_rng(seed).normal(5.0, 2.0, 3))
        assert drawn.low is not None
        assert drawn.high is not None
        covered += drawn.low <= 5.0 <= drawn.high
    assert 0.92 <= covered / 400 <= 0.98
