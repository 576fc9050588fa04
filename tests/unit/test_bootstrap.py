"""The half-sample bootstrap: known spreads, and an order that the rows carry in themselves."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fewstep.errors import DataError
from fewstep.evaluation.bootstrap import Estimate, evenly, half_samples, row_order, spread_of


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_interval_is_centred_on_the_value() -> None:
    estimate = Estimate(3.0, 0.5)
    assert (estimate.low, estimate.high) == pytest.approx((3 - 0.98, 3 + 0.98))
    assert (Estimate(3.0).low, Estimate(3.0).high) == (3, 3)


def test_spread_of_a_mean_has_the_known_width() -> None:
    """Halves without replacement: Var(mean of a half | all) = s²/n exactly, the variance of the mean of all."""
    x = 2 * normal(400, seed=34)
    spread = spread_of([float(x[half].mean()) for half in half_samples(400, 2000, 5)])
    assert spread == pytest.approx(float(x.std()) / 20, rel=0.07)  # 4 standard errors of a spread from 2,000


def test_interval_covers_the_truth_in_95_of_100_sets() -> None:
    hits = 0
    for seed in range(400):
        x = normal(100, seed=seed)
        half_means = [float(x[half].mean()) for half in half_samples(100, 50, seed)]
        estimate = Estimate(float(x.mean()), spread_of(half_means))
        hits += estimate.low <= 0 <= estimate.high
    assert hits / 400 == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / 400))


def test_halves_are_seeded_distinct_and_without_replacement() -> None:
    halves = list(half_samples(101, 30, 7))
    assert len(halves) == 30
    assert all(len(h) == len(set(h.tolist())) == 50 and min(h) >= 0 and max(h) <= 100 for h in halves)
    assert len({tuple(sorted(h.tolist())) for h in halves}) == 30
    assert all(torch.equal(a, b) for a, b in zip(halves, half_samples(101, 30, 7), strict=True))
    assert not torch.equal(halves[0], next(half_samples(101, 30, 8)))


def test_no_replicates_no_spread() -> None:
    assert list(half_samples(2, 0, 0)) == []
    assert spread_of([]) == spread_of([1.0]) == 0
    assert spread_of([1.0, 3.0]) == pytest.approx(math.sqrt(2))


@pytest.mark.parametrize(("n", "replicates", "text"), [(3, 2, "at least 4"), (9, 1, "at least 2"), (9, -1, "2 repl")])
def test_spreads_without_meaning_are_refused_at_once(n: int, replicates: int, text: str) -> None:
    with pytest.raises(DataError, match=text):
        half_samples(n, replicates, 0)


def test_evenly_spaced_rows_reach_both_ends() -> None:
    assert evenly(5, 10).tolist() == [0, 1, 2, 3, 4]
    assert evenly(101, 5).tolist() == [0, 25, 50, 75, 100]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_row_order_sorts_like_numpy_and_shuffles_with_a_fixed_seed(dtype: torch.dtype) -> None:
    x = (normal(500, 4, seed=1) * 2).round().to(dtype) / 3  # many ties in the first columns, and -0.0
    x[::9, 3] *= 1e-30
    shuffle = torch.randperm(500, generator=torch.Generator().manual_seed(0))
    sorted_rows = x[torch.from_numpy(np.lexsort(x.numpy().T[::-1]).copy())]
    assert torch.equal(x[row_order(x)], sorted_rows[shuffle])
    assert sorted(row_order(x).tolist()) == list(range(500))


def test_row_order_does_not_depend_on_how_the_rows_came() -> None:
    x = normal(300, 5, seed=2).clamp_min(0)  # like features after a ReLU
    mixed = x[torch.randperm(300, generator=torch.Generator().manual_seed(3))]
    assert torch.equal(x[row_order(x)], mixed[row_order(mixed)])
    assert row_order(x[:0]).tolist() == [] and len(row_order(torch.ones(7, 2))) == 7


def test_evenly_spaced_rows_are_distinct_and_include_both_ends() -> None:
    for length, most in ((10, 10), (10, 9), (1000, 999), (1000, 501), (7, 100), (50_000, 33_333)):
        rows = evenly(length, most)
        assert len(rows) == min(length, most)
        assert (rows[0], rows[-1]) == (0, length - 1)
        assert (np.diff(rows) >= 1).all()
