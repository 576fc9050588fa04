"""Metrics against exact laws, constructed sets, naive loops and an independent package (torchmetrics)."""

from __future__ import annotations

import itertools
import math
import warnings

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from fewstep.errors import DataError
from fewstep.evaluation.metrics import (
    Stats,
    StatsAccumulator,
    frechet_distance,
    gaussian_stats,
    interval,
    kid,
    mmd2_unbiased,
    sliced_wasserstein,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def stats(mean: Tensor, cov: Tensor) -> Stats:
    return Stats(mean.double(), cov.double(), 10_000)


def rotation(d: int, seed: int) -> Tensor:
    return torch.linalg.qr(normal(d, d, seed=seed)).Q


def correlated(n: int, d: int, seed: int) -> Tensor:
    return normal(n, d, seed=seed) @ normal(d, d, seed=seed + 1) + normal(d, seed=seed + 2)


# --- Gaussian statistics ----------------------------------------------------------------------------------


def test_stats_are_mean_and_unbiased_covariance() -> None:
    x = correlated(50, 6, seed=1)
    s = gaussian_stats(x)
    assert s.count == 50 and s.cov.dtype == torch.float64
    np.testing.assert_allclose(s.mean, x.numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(s.cov, np.cov(x.numpy(), rowvar=False), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sizes", [[1] * 40, [7, 0, 33], [39, 1], [13, 13, 14]])
def test_stats_do_not_depend_on_the_split_even_far_from_the_origin(sizes: list[int]) -> None:
    x = correlated(40, 5, seed=2) + 1e3
    whole = gaussian_stats(x)
    accumulator = StatsAccumulator()
    for part in x.split(sizes):
        accumulator.add(part)
    parts = accumulator.stats()
    assert parts.count == 40
    assert (parts.mean - whole.mean).norm() <= 1e-12 * whole.mean.norm()
    assert (parts.cov - whole.cov).norm() <= 1e-12 * whole.cov.norm()


def test_float32_features_are_summed_in_float64() -> None:
    x = (normal(3000, 4, seed=3) + 100).float()
    expected = np.cov(x.numpy().astype(np.float64), rowvar=False)
    np.testing.assert_allclose(gaussian_stats(x).cov, expected, rtol=1e-10, atol=1e-12)


# --- Fréchet distance -------------------------------------------------------------------------------------


def test_frechet_of_diagonal_gaussians() -> None:
    a, b = torch.tensor([1.0, 4.0, 9.0]), torch.tensor([4.0, 0.25, 9.0])
    shift = torch.tensor([3.0, 0.0, -1.0])
    got = frechet_distance(stats(torch.zeros(3), a.diag()), stats(shift, b.diag()))
    assert got == pytest.approx(10 + (1 - 2) ** 2 + (2 - 0.5) ** 2, abs=1e-8)


@pytest.mark.parametrize("d", [2, 7, 40])
def test_frechet_of_commuting_rotated_gaussians(d: int) -> None:
    """S = Q diag(λ) Qᵀ, S' = Q diag(μ) Qᵀ: FD = |Δm|² + Σ (√λ - √μ)²."""
    q, lam, mu = rotation(d, 5), normal(d, seed=6).exp(), normal(d, seed=7).exp()
    delta = normal(d, seed=8)
    got = frechet_distance(stats(torch.zeros(d), q @ lam.diag() @ q.T), stats(delta, q @ mu.diag() @ q.T))
    assert got == pytest.approx(float(delta.square().sum() + (lam.sqrt() - mu.sqrt()).square().sum()), abs=1e-8)


def test_frechet_of_non_commuting_gaussians_in_two_dimensions() -> None:
    """2x2: tr (S S')^½ = √(tr S S' + 2 √det S S')."""
    a, b = (m @ m.T + 0.1 * torch.eye(2, dtype=torch.float64) for m in (normal(2, 2, seed=9), normal(2, 2, seed=10)))
    overlap = math.sqrt(float((a @ b).trace() + 2 * (a.det() * b.det()).sqrt()))
    got = frechet_distance(stats(torch.zeros(2), a), stats(torch.zeros(2), b))
    assert got == pytest.approx(float(a.trace() + b.trace()) - 2 * overlap, abs=1e-8)


@pytest.mark.parametrize(("n", "d"), [(500, 20), (30, 200)], ids=["full rank", "rank deficient"])
def test_frechet_of_a_set_with_itself_is_zero(n: int, d: int) -> None:
    s = gaussian_stats(correlated(n, d, seed=11))
    assert 0 <= frechet_distance(s, s) < 1e-6 * float(s.cov.trace())


@pytest.mark.parametrize(("n", "d"), [(300, 30), (25, 60)], ids=["full rank", "rank deficient"])
def test_frechet_is_symmetric_and_rotation_invariant(n: int, d: int) -> None:
    x, y, q = correlated(n, d, seed=12), correlated(n + 9, d, seed=22), rotation(d, 3)
    one = frechet_distance(gaussian_stats(x), gaussian_stats(y))
    assert frechet_distance(gaussian_stats(y), gaussian_stats(x)) == pytest.approx(one, rel=1e-9)
    assert frechet_distance(gaussian_stats(x @ q), gaussian_stats(y @ q)) == pytest.approx(one, rel=1e-9)


def test_frechet_agrees_with_scipy_sqrtm() -> None:
    a, b = gaussian_stats(correlated(400, 24, seed=13)), gaussian_stats(correlated(300, 24, seed=14))
    root = scipy.linalg.sqrtm((a.cov @ b.cov).numpy()).real
    expected = float((a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace()) - 2 * np.trace(root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


def test_frechet_of_rank_deficient_sets_is_their_nuclear_norm() -> None:
    """With fewer samples than dimensions: tr (S S')^½ = |X_c Y_cᵀ|_* / √((n-1)(m-1))."""
    x, y = normal(12, 50, seed=15), 2 * normal(17, 50, seed=16)
    xc, yc = x - x.mean(0), y - y.mean(0)
    overlap = float(torch.linalg.svdvals(xc @ yc.T).sum()) / math.sqrt(11 * 16)
    a, b = gaussian_stats(x), gaussian_stats(y)
    expected = float((a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace()) - 2 * overlap
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-8)


def test_frechet_finite_sample_bias_law() -> None:
    """math.md 6.2: E[FD] = d/N + d(d+1)/(4(N-1)) for white features and the exact reference."""
    d, n, repeats = 8, 1000, 400
    exact = stats(torch.zeros(d), torch.eye(d))
    values = [frechet_distance(gaussian_stats(x), exact) for x in normal(repeats, n, d, seed=17)]
    mean, error = float(np.mean(values)), float(np.std(values)) / math.sqrt(repeats)
    assert error < 0.03 * mean
    assert abs(mean - (d / n + d * (d + 1) / (4 * (n - 1)))) < 4 * error


def test_a_matrix_that_is_no_covariance_is_refused() -> None:
    bad = stats(torch.zeros(2), torch.tensor([[1.0, 3.0], [3.0, 1.0]]))  # eigenvalues 4 and -2
    with pytest.raises(DataError, match="not a covariance"):
        frechet_distance(bad, bad)


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


# --- Bootstrap interval -----------------------------------------------------------------------------------


def test_interval_of_a_mean_has_the_known_width() -> None:
    x = 2 * normal(400, 1, seed=34)
    low, high = interval(lambda rows: float(rows.mean()), x, n_boot=400, seed=5)
    assert (low + high) / 2 == pytest.approx(float(x.mean()), abs=1e-12)
    assert high - low == pytest.approx(2 * 1.96 * float(x.std()) / 20, rel=0.15)


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
        lambda x: interval(lambda rows: 0.0, x[:1]),
    ],
)
def test_settings_without_meaning_are_refused(call) -> None:
    with pytest.raises(DataError, match=r"at least"):
        call(normal(10, 3))
