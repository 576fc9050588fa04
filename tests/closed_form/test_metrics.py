"""Metrics against exact laws, constructed sets, naive loops and an independent package (torchmetrics)."""

from __future__ import annotations

import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor

from fewstep.errors import DataError
from fewstep.evaluation.bootstrap import half_samples
from fewstep.evaluation.extrapolation import fd_infinity
from fewstep.evaluation.metrics import (
    StatsAccumulator,
    _one_sided_variance,
    frechet_distance,
    gaussian_stats,
    kid,
    mmd2_spread,
    mmd2_unbiased,
    sliced_wasserstein,
    sliced_wasserstein_estimate,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def correlated(n: int, d: int, seed: int) -> Tensor:
    return normal(n, d, seed=seed) @ normal(d, d, seed=seed + 1) + normal(d, seed=seed + 2)


# --- KID --------------------------------------------------------------------------------------------------


def naive_mmd2(x: Tensor, y: Tensor) -> float:
    def k(u: Tensor, v: Tensor) -> float:
        return (sum(float(p * q) for p, q in zip(u, v, strict=True)) / len(u) + 1) ** 3

    n, m = len(x), len(y)
    xx = sum(k(x[i], x[j]) for i, j in itertools.permutations(range(n), 2)) / (n * (n - 1))
    yy = sum(k(y[i], y[j]) for i, j in itertools.permutations(range(m), 2)) / (m * (m - 1))
    return xx + yy - 2 * sum(k(u, v) for u in x for v in y) / (n * m)


def test_mmd2_against_a_double_loop() -> None:
    x, y = normal(9, 4, seed=18), normal(6, 4, seed=19) + 0.5
    assert mmd2_unbiased(x, y) == pytest.approx(naive_mmd2(x, y), rel=1e-12)
    mean, std = kid(x, y[:6], subsets=5, size=1000, seed=0)  # subsets of 6
    assert std > 0
    assert kid(y, y.flip(0), subsets=3, size=6)[0] == pytest.approx(naive_mmd2(y, y), rel=1e-10)
    assert mean == kid(x, y, subsets=5, size=6, seed=0)[0]
    assert mean != kid(x, y, subsets=5, size=6, seed=1)[0]


def test_kid_is_unbiased() -> None:
    """Subsets of 5 estimate the same squared MMD as all pairs: here both sets follow one law, so it is 0."""
    values = [mmd2_unbiased(normal(5, 3, seed=i), normal(5, 3, seed=i + 100_000)) for i in range(3000)]
    assert abs(np.mean(values)) < 4 * np.std(values) / math.sqrt(len(values))
    x, y = normal(400, 3, seed=1), 0.3 + normal(400, 3, seed=2)
    mean, std = kid(x, y, subsets=400, size=50, seed=3)
    assert mean == pytest.approx(mmd2_unbiased(x, y), abs=4 * std / math.sqrt(400))


def test_order_and_chunks_do_not_matter() -> None:
    x, y, p = correlated(1500, 6, seed=20), correlated(1100, 6, seed=23), torch.randperm(1500)
    assert mmd2_unbiased(x[p], y) == pytest.approx(mmd2_unbiased(x, y), rel=1e-9)
    assert sliced_wasserstein(x[p], y) == pytest.approx(sliced_wasserstein(x, y), rel=1e-12)
    a, b = gaussian_stats(x[p]), gaussian_stats(x)
    assert (a.cov - b.cov).norm() <= 1e-12 * b.cov.norm()


# --- Sliced Wasserstein -----------------------------------------------------------------------------------


def test_sliced_wasserstein_of_a_scaled_white_cloud_is_exact() -> None:
    """y = s·x with (1/n) Σ x xᵀ = I: W2² = (s - 1)² in every direction."""
    x = normal(200, 4, seed=24)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(x.T @ x / 200)).T
    assert sliced_wasserstein(x, 1.5 * x, directions=64) == pytest.approx(0.5, rel=1e-10)


def test_sliced_wasserstein_of_gaussians() -> None:
    """Per direction (θᵀΔm)² + (√θᵀS θ - √θᵀS'θ)², averaged over the circle."""
    a, b = normal(2, 2, seed=25), normal(2, 2, seed=26)
    delta = torch.tensor([0.4, -0.3], dtype=torch.float64)
    angle = torch.linspace(0, math.pi, 1001, dtype=torch.float64)[:-1]
    theta = torch.stack([angle.cos(), angle.sin()])
    exact = ((delta @ theta) ** 2 + ((a.T @ theta).norm(dim=0) - (b.T @ theta).norm(dim=0)) ** 2).mean().sqrt()
    x, y = normal(20_000, 2, seed=27) @ a.T, normal(15_000, 2, seed=28) @ b.T + delta
    assert sliced_wasserstein(x, y, directions=256, seed=1) == pytest.approx(float(exact), rel=0.03)


def test_sliced_wasserstein_of_unequal_counts_is_exact() -> None:
    x, y = normal(6, 3, seed=29), normal(4, 3, seed=30)
    repeated = sliced_wasserstein(x.repeat(2, 1), y.repeat(3, 1), directions=40, seed=2)
    assert sliced_wasserstein(x, y, directions=40, seed=2) == pytest.approx(repeated, rel=1e-12)
    assert sliced_wasserstein(x, x.repeat(3, 1)) == pytest.approx(0, abs=1e-12)
    line = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [0.0], [3.0]])  # ∫ = (1/6)·1 + (1/3)·4
    assert sliced_wasserstein(*line) == pytest.approx(math.sqrt(1 / 6 + 4 / 3), rel=1e-12)


# --- Spreads: the deviation over fresh sets is the yardstick ----------------------------------------------

FRESH, ROWS, DIM = 200, 200, 3


def spreads_against_fresh_sets(value, spread) -> tuple[float, float]:
    """(standard deviation over fresh sets, mean estimated spread) of a metric of one set ``[ROWS, DIM]``."""
    sets = [1.3 * normal(ROWS, DIM, seed=1000 + i) + 0.4 for i in range(FRESH)]
    return float(np.std([value(x) for x in sets])), float(np.mean([spread(x) for x in sets[:12]]))


def test_spread_of_sliced_wasserstein() -> None:
    real = normal(400, DIM, seed=48)
    true, got = spreads_against_fresh_sets(
        lambda x: sliced_wasserstein(real, x, directions=32),
        lambda x: sliced_wasserstein_estimate(real, x, directions=32, replicates=40).spread,
    )
    assert got == pytest.approx(true, rel=0.25)
    x = normal(ROWS, DIM, seed=49)
    expected = [sliced_wasserstein(real, x[half], seed=7) for half in half_samples(ROWS, 2, 7)]
    assert sliced_wasserstein_estimate(real, x, replicates=2, seed=7).spread == pytest.approx(np.std(expected, ddof=1))


def test_spread_of_mmd2_with_both_sets_fresh() -> None:
    pairs = [(normal(150, DIM, seed=2000 + i), 1.3 * normal(ROWS, DIM, seed=3000 + i) + 0.4) for i in range(FRESH)]
    true = float(np.std([mmd2_unbiased(*pair) for pair in pairs]))
    got = float(np.mean([mmd2_spread(*pair, replicates=40) for pair in pairs[:12]]))
    assert got == pytest.approx(true, rel=0.25)
    fewer = float(np.mean([mmd2_spread(*pair, replicates=40, most=60) for pair in pairs[:12]]))
    assert fewer == pytest.approx(true, rel=0.35)


def test_spread_of_mmd2_is_that_of_its_halves() -> None:
    """With y fixed the terms of y alone cancel in a spread: two halves of x against the plain function."""
    x, y = normal(30, 2, seed=50), normal(20, 2, seed=53) + 0.5
    values = [mmd2_unbiased(x[half], y) for half in half_samples(30, 6, 3)]
    assert _one_sided_variance(x, y, 6, 3) == pytest.approx(np.var(values, ddof=1), rel=1e-9)


# --- torchmetrics as referee ------------------------------------------------------------------------------


class Projection(torch.nn.Module):
    """The feature net of both sides: a fixed affine map of 3x4x4 images to 10 numbers."""

    num_features = 10

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("w", normal(48, 10, seed=35) / 255)

    def forward(self, images: Tensor) -> Tensor:
        return images.double().flatten(1) @ self.w


def referee_images() -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(36)
    real = torch.randint(0, 256, (80, 3, 4, 4), generator=rng, dtype=torch.uint8)
    return real, (torch.randint(0, 200, (80, 3, 4, 4), generator=rng) + 20).to(torch.uint8)


def test_frechet_and_kid_agree_with_torchmetrics() -> None:
    pytest.importorskip("torchmetrics", reason="torchmetrics, the referee, is not installed")
    real, fake = referee_images()
    x, y = Projection()(real), Projection()(fake)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchmetrics.image.fid import FrechetInceptionDistance
        from torchmetrics.image.kid import KernelInceptionDistance

        fid = FrechetInceptionDistance(Projection(), input_img_size=(3, 4, 4))
        fid.set_dtype(torch.float64)
        kernel = KernelInceptionDistance(Projection(), subsets=2, subset_size=80)
        for metric in (fid, kernel):
            metric.update(real, real=True)
            metric.update(fake, real=False)
        expected_fid, expected_kid = float(fid.compute()), float(kernel.compute()[0])
    assert frechet_distance(gaussian_stats(x), gaussian_stats(y)) == pytest.approx(expected_fid, rel=1e-6)
    mean, std = kid(x, y, subsets=2, size=80)
    assert mean == pytest.approx(expected_kid, rel=1e-6) and std < 1e-9


# --- What is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", [mmd2_unbiased, kid, sliced_wasserstein])
def test_bad_features_are_refused_in_one_sentence(metric) -> None:
    good = normal(10, 3)
    bad = good.clone()
    bad[4, 1] = math.nan
    with pytest.raises(DataError, match=r"not finite\. Got: NaN or infinity in 1 of 10 rows"):
        metric(good, bad)
    with pytest.raises(DataError, match=r"differ in dimension. Got: 3 and 2"):
        metric(good, good[:, :2])
    with pytest.raises(DataError, match=r"too few samples for this metric. Got: 1"):
        metric(good, good[:1])
    with pytest.raises(DataError, match=r"not a table\. Got: shape \[10\]"):
        metric(good, good[:, 0])


def test_bad_statistics_are_refused() -> None:
    with pytest.raises(DataError, match=r"too few samples .* Got: 1\. Wanted: at least 2"):
        gaussian_stats(normal(1, 3))
    with pytest.raises(DataError, match=r"differ in dimension"):
        frechet_distance(gaussian_stats(normal(5, 3)), gaussian_stats(normal(5, 4)))
    accumulator = StatsAccumulator()
    accumulator.add(normal(5, 3))
    with pytest.raises(DataError, match=r"differ in dimension. Got: 3 and 4"):
        accumulator.add(normal(5, 4))
    with pytest.raises(DataError, match=r"not finite"):
        accumulator.add(torch.full((2, 3), math.inf))


@pytest.mark.parametrize(
    "call",
    [
        lambda x: kid(x, x, subsets=0),
        lambda x: kid(x, x, size=1),
        lambda x: sliced_wasserstein(x, x, directions=0),
        lambda x: fd_infinity(gaussian_stats(x), x.repeat(4, 1), points=1),
        lambda x: fd_infinity(gaussian_stats(x), x.repeat(3, 1)),
    ],
)
def test_settings_without_meaning_are_refused(call) -> None:
    with pytest.raises(DataError, match=r"at least"):
        call(normal(10, 3))
