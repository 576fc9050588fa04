"""The Fréchet distance and its extrapolation against exact laws and scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from fewstep.errors import DataError
from fewstep.evaluation.extrapolation import fd_infinity, fd_infinity_least, fd_infinity_spread
from fewstep.evaluation.metrics import (
    FrechetReference,
    Stats,
    StatsAccumulator,
    frechet_distance,
    gaussian_stats,
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


@pytest.mark.slow
def test_frechet_agrees_with_scipy_sqrtm_at_2048_dimensions() -> None:
    """Feature-like spectra, λ_i = 1/i; the two covariances share no axes."""
    d = 2048
    scale = torch.arange(1, d + 1, dtype=torch.float64).rsqrt()
    a = gaussian_stats(normal(4200, d, seed=51) * scale)
    b = gaussian_stats(normal(4200, d, seed=52) * scale.flip(0) + 0.01)
    root = scipy.linalg.sqrtm((a.cov @ b.cov).numpy()).real
    expected = float((a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace()) - 2 * np.trace(root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


def test_a_reference_factored_once_gives_the_distance_of_either_route() -> None:
    """Stats against reference, rows against reference and the plain function, with more and with fewer rows than d."""
    reference = FrechetReference(gaussian_stats(correlated(300, 40, seed=41)))
    rows = 3 + correlated(90, 40, seed=44)
    for index in (torch.arange(90), torch.arange(0, 90, 3)):  # 90 and 30 rows of 40 features
        expected = frechet_distance(reference.stats, gaussian_stats(rows[index]))
        assert reference.distance(gaussian_stats(rows[index])) == pytest.approx(expected, rel=1e-9)
        assert reference.distances(rows, [index]) == pytest.approx([expected], rel=1e-9)


def test_constant_images_have_an_exact_distance() -> None:
    """S' = 0: FD = |Δm|² + tr S, whichever side is constant; 0 between two equal constants."""
    x, flat = normal(50, 6, seed=45), torch.full((30, 6), 0.25, dtype=torch.float64)
    s, c = gaussian_stats(x), gaussian_stats(flat)
    expected = float((s.mean - 0.25).square().sum() + s.cov.trace())
    for got in (frechet_distance(s, c), frechet_distance(c, s), FrechetReference(c).distance(s)):
        assert got == pytest.approx(expected, rel=1e-12)
    assert FrechetReference(s).distances(flat, [torch.arange(30)]) == pytest.approx([expected], rel=1e-12)
    assert frechet_distance(c, c) == 0
    assert mmd2_unbiased(flat, flat) == pytest.approx(0, abs=1e-12)
    assert sliced_wasserstein(flat, flat) == 0


# --- FD extrapolated --------------------------------------------------------------------------------------


def test_fd_infinity_removes_the_finite_sample_bias() -> None:
    """White features, exact reference: FD_N follows math.md 6.2 at every N, and its extrapolation is near 0."""
    d, n, repeats = 8, 400, 150
    exact = FrechetReference(stats(torch.zeros(d), torch.eye(d)))
    x = normal(repeats, n, d, seed=46)

    def mean_and_error(values: list[float]) -> tuple[float, float]:
        return float(np.mean(values)), float(np.std(values)) / math.sqrt(repeats)

    for size in (n // 4, n):
        law = d / size + d * (d + 1) / (4 * (size - 1))
        mean, error = mean_and_error([exact.distances(rows, [torch.arange(size)])[0] for rows in x])
        assert abs(mean - law) < 4 * error + 0.02 * law  # the law is first order in d/N
        assert error < 0.05 * law
    mean, error = mean_and_error([fd_infinity(exact, rows, seed=i) for i, rows in enumerate(x)])
    law = d / n + d * (d + 1) / (4 * (n - 1))
    assert abs(mean) < 0.1 * law and error < 0.05 * law


def test_fd_infinity_keeps_a_true_distance_and_ignores_order() -> None:
    x = 1.5 * normal(3000, 4, seed=47) + 0.5  # against N(0, 1): 4 (0.25 + 0.25)
    exact = stats(torch.zeros(4), torch.eye(4))
    got = fd_infinity(exact, x, seed=1)
    assert got == pytest.approx(2, abs=0.2)
    assert fd_infinity(exact, x[torch.randperm(3000)], seed=1) == pytest.approx(got, abs=1e-9)
    assert fd_infinity(exact, x, seed=2) != got


def test_fd_infinity_fits_its_points_by_least_squares(monkeypatch: pytest.MonkeyPatch) -> None:
    """FD_N = 3 + 70/N - 900/N² at N = 25 .. 100: the intercept of numpy's polyfit on the same sizes."""
    sizes: list[int] = []

    def law(self: FrechetReference, rows: Tensor, subsets: list[Tensor]) -> list[float]:
        sizes.extend(len(set(s.tolist())) for s in subsets)
        return [3 + 70 / n - 900 / n**2 for n in sizes]

    monkeypatch.setattr(FrechetReference, "distances", law)
    got = fd_infinity(stats(torch.zeros(2), torch.eye(2)), normal(100, 2), points=5)
    assert sizes == [25, 31, 40, 57, 100]  # 100/4, 100/3.25, 100/2.5, 100/1.75, 100/1
    inverse = 1 / np.array(sizes)
    assert got == pytest.approx(np.polyfit(inverse, 3 + 70 * inverse - 900 * inverse**2, 1)[1], rel=1e-9)


def test_fd_infinity_says_how_many_samples_it_wants() -> None:
    assert fd_infinity_least(64) == 260 and fd_infinity_least(2) == 32
    with pytest.raises(DataError, match=r"of 64 features\. Got: 259\. Wanted: at least 260"):
        fd_infinity(stats(torch.zeros(64), torch.eye(64)), normal(259, 64))


def test_a_matrix_that_is_no_covariance_is_refused() -> None:
    bad = stats(torch.zeros(2), torch.tensor([[1.0, 3.0], [3.0, 1.0]]))  # eigenvalues 4 and -2
    with pytest.raises(DataError, match="not a covariance"):
        frechet_distance(bad, bad)


def test_spread_of_fd_infinity_is_that_of_fresh_sets_or_wider() -> None:
    """The noise of the random subsets counts twice in a half: up to √2 too wide, never too narrow."""
    exact = FrechetReference(stats(torch.zeros(3), torch.eye(3)))
    sets = [1.3 * normal(200, 3, seed=1000 + i) + 0.4 for i in range(200)]
    true = float(np.std([fd_infinity(exact, x) for x in sets]))
    got = float(np.mean([fd_infinity_spread(exact, x, replicates=40) for x in sets[:12]]))
    assert 0.9 * true < got < 1.5 * true
    assert fd_infinity_spread(exact, sets[0], replicates=0) == 0
