"""Which patches a student sees: encoders/masking.py."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from encoders.masking import SCHEMES, MaskConfig, Masks, kept_count, least_block
from mmkit.errors import ConfigError

ROWS = [
    row
    for row in json.loads((Path(__file__).parent / "golden" / "uta" / "mask_stats.json").read_text(encoding="utf-8"))["rows"]
    if row["scheme"] in SCHEMES
]
COUNT = 1500  # masks a scheme; the golden file's intervals are for 8000


def statistics(keep: np.ndarray, grid: int) -> dict[str, float]:
    """The measures of mask_stats.json, of keep indices [T, K]."""
    times, patches = len(keep), grid * grid
    seen = np.bincount(keep.reshape(-1), minlength=patches)
    share = keep.shape[1] / patches
    states = np.zeros((times, patches), dtype=bool)
    np.put_along_axis(states, keep, True, axis=1)
    states = states.reshape(times, grid, grid)
    edges = (states[:, 1:] != states[:, :-1]).sum() + (states[:, :, 1:] != states[:, :, :-1]).sum()
    return {
        "cv": float(seen.std() / seen.mean()),
        "chi2_per_df": float(((seen - times * share) ** 2).sum() / (times * share * (1 - share)) / (patches - 1)),
        "perimeter": float(edges / times),
    }


def test_the_golden_rows_are_found() -> None:
    assert len(ROWS) == 20
    assert {row["scheme"] for row in ROWS} == set(SCHEMES)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: "{grid}-{ratio}-{scheme}".format(**row))
def test_the_masks_look_like_the_reference(row: dict[str, Any]) -> None:
    masks = Masks(MaskConfig(row["scheme"], row["ratio"]), (row["grid"], row["grid"]), seed=1)
    keep = torch.cat([masks.keep(0, index) for index in range(COUNT)]).numpy()
    assert keep.shape == (COUNT, row["kept"])
    found = statistics(keep, row["grid"])
    for name, (low, high) in row["accept"].items():
        if name == "chi2_per_df":  # about 1 + T c: scale the interval from 8000 masks to ours
            low, high = (1 + (bound - 1) * COUNT / 8000 if bound > 4 else bound for bound in (low, high))
        if name == "cv" and low == 0:  # noise of fewer masks adds to a small spread
            high = (high**2 + row["masked"] / row["kept"] / COUNT) ** 0.5
        assert low <= found[name] <= high, (name, found)


@pytest.mark.parametrize("grid", [14, 16])
def test_a_complementary_view_looks_like_a_reversed_block_mask(grid: int) -> None:
    """One view of a pair drawn at random is a reversed block mask at 0.5; both together show every position exactly as often."""
    masks = Masks(MaskConfig("complementary", 0.5, 2), (grid, grid), seed=1)
    pairs = torch.stack([masks.keep(0, index) for index in range(COUNT)]).numpy()  # [T, 2, K]
    assert statistics(pairs.reshape(2 * COUNT, -1), grid)["cv"] == 0
    coin = np.random.default_rng(0).integers(0, 2, COUNT)
    found = statistics(pairs[np.arange(COUNT), coin], grid)
    accept = next(row for row in ROWS if (row["grid"], row["ratio"], row["scheme"]) == (grid, 0.5, "block_reversed"))["accept"]
    assert accept["perimeter"][0] <= found["perimeter"] <= accept["perimeter"][1]
    assert found["chi2_per_df"] <= accept["chi2_per_df"][1]


@pytest.mark.parametrize("scheme", [*SCHEMES, "complementary"])
@pytest.mark.parametrize("grid", [(6, 6), (3, 4), (14, 14), (2, 2)])
def test_the_count_is_exact_and_positions_are_distinct(scheme: str, grid: tuple[int, int]) -> None:
    views = 2 if scheme == "complementary" else 1
    ratio = 0.5 if scheme == "complementary" else 0.3  # at 0.5 a plain flip would keep the count too
    masks = Masks(MaskConfig(scheme, ratio, views), grid)  # type: ignore[arg-type]
    for index in range(50):
        keep = masks.keep(0, index)
        assert keep.shape == (views, kept_count(grid[0] * grid[1], ratio))
        for row in keep.tolist():
            assert row == sorted(set(row))
            assert row[0] >= 0
            assert row[-1] < grid[0] * grid[1]


def test_a_complementary_pair_covers_every_patch_once() -> None:
    masks = Masks(MaskConfig("complementary", 0.5, 2), (6, 6))
    for index in range(20):
        assert sorted(masks.keep(3, index).reshape(-1).tolist()) == list(range(36))


def test_a_mask_depends_on_seed_epoch_and_index_alone() -> None:
    masks, others = Masks(MaskConfig("block_reversed", 0.5), (6, 6), 7), Masks(MaskConfig("block_reversed", 0.5), (6, 6), 7)
    [masks.keep(0, index) for index in range(10)]  # what was drawn before leaves no trace
    assert torch.equal(masks.keep(2, 5), others.keep(2, 5))
    drawn = [masks.keep(epoch, index).tolist() for epoch in range(3) for index in range(3)]
    assert len({str(keep) for keep in drawn}) == 9
    assert Masks(MaskConfig("block_reversed", 0.5), (6, 6), 8).keep(2, 5).tolist() != masks.keep(2, 5).tolist()


def test_the_smallest_block_shrinks_with_the_grid() -> None:
    assert least_block((14, 14)) == least_block((24, 24)) == 16
    assert 2.9 < least_block((6, 6)) < 3


def test_the_counts_of_the_paper() -> None:
    assert [kept_count(256, ratio) for ratio in (0.4, 0.5, 0.7, 0)] == [154, 128, 77, 256]
    assert [kept_count(196, ratio) for ratio in (0.4, 0.5)] == [118, 98]


def test_what_cannot_be_masked_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"mask.ratio is 1.0"):
        Masks(MaskConfig("random", 1.0), (6, 6))
    with pytest.raises(ConfigError, match=r"give 0\.5 and 2"):
        MaskConfig("complementary", 0.5, 1).validate()
    with pytest.raises(ConfigError, match="3 x 3 patches cannot be halved"):
        Masks(MaskConfig("complementary", 0.5, 2), (3, 3))
