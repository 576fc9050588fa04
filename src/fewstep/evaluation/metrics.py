"""Distances between two sets of features ``[n, d]``: plain functions, float64 inside, on any device.

All results are Python floats. Which features are compared is :mod:`fewstep.evaluation.features`' affair.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.errors import DataError


@dataclass(frozen=True)
class Stats:
    """A Gaussian summary: ``mean [d]`` and ``cov [d, d]`` (1/(N-1)), float64, of ``count`` features."""

    mean: Tensor
    cov: Tensor
    count: int


class StatsAccumulator:
    """``Stats`` of features that arrive in batches, in constant memory and whatever the split.

    M <- M + S_b + δ δᵀ·N n_b/(N + n_b),  δ = mean_b - mean   (Chan, Golub & LeVeque 1983, eq. 2.1)
    """

    def __init__(self) -> None:
        self._count = 0
        self._mean = self._scatter = torch.zeros(0, dtype=torch.float64)

    def add(self, features: Tensor) -> None:
        """Take in one batch ``[b, d]``, b >= 0.

        Raises:
            DataError: not ``[b, d]``, not finite, or of another dimension than before.
        """
        x = _checked(features, least=0)
        if self._count and x.shape[1] != len(self._mean):
            raise _other_dimension(len(self._mean), x.shape[1])
        if not len(x):
            return
        if not self._count:
            self._mean, self._scatter = x.new_zeros(x.shape[1]), x.new_zeros(x.shape[1], x.shape[1])
        mean = x.mean(0)
        centred = x - mean
        delta = mean.to(self._mean.device) - self._mean
        total = self._count + len(x)
        self._mean = self._mean + delta * (len(x) / total)
        between = torch.outer(delta, delta) * (self._count * len(x) / total)
        self._scatter = self._scatter + (centred.T @ centred).to(self._scatter.device) + between
        self._count = total

    def stats(self) -> Stats:
        """The summary of everything added so far.

        Raises:
            DataError: fewer than 2 samples were added.
        """
        if self._count < 2:
            raise _too_few(self._count, 2)
        return Stats(self._mean, self._scatter / (self._count - 1), self._count)


def gaussian_stats(features: Tensor) -> Stats:
    """Mean and covariance Σ (x - m)(x - m)ᵀ/(N - 1) of ``features [n, d]``, n >= 2.

    Raises:
        DataError: fewer than 2 samples, or features that are not finite.
    """
    accumulator = StatsAccumulator()
    accumulator.add(features)
    return accumulator.stats()


def frechet_distance(a: Stats, b: Stats) -> float:
    """|m_a - m_b|² + tr S_a + tr S_b - 2 tr (S_a S_b)^½, in squared feature units.

    The trace is Σ √λ_i(Rᵀ S_b R) with R Rᵀ = S_a on the support of S_a, so that covariances without
    full rank (n <= d) are exact too. Rounding may leave a total of -1e-6·tr: that is 0. Biased
    upwards at finite N (white features, exact reference: d/N + d(d+1)/(4(N-1))): compare equal N only.
    Source: Dowson & Landau 1982; Heusel et al. 2017, eq. 6.

    Raises:
        DataError: different dimensions, or a covariance that is not one (a total below -1e-6·tr).
    """
    if a.mean.shape != b.mean.shape:
        raise _other_dimension(len(a.mean), len(b.mean))
    few, many = (a, b) if a.count <= b.count else (b, a)
    mean, cov = many.mean.to(few.mean), many.cov.to(few.cov)
    root = _root(few.cov)
    overlap = torch.linalg.eigvalsh(root.T @ cov @ root).clamp_min(0).sqrt().sum()
    scale = float(few.cov.trace() + cov.trace())
    total = float((few.mean - mean).square().sum()) + scale - 2 * float(overlap)
    if not total >= -1e-6 * scale:
        raise DataError(
            "The Fréchet distance is negative beyond rounding: one of the covariances is not a covariance",
            got=f"{total:.6g} at a total variance of {scale:.6g}",
            want="symmetric, no negative eigenvalues",
        )
    return max(total, 0.0)


def mmd2_unbiased(x: Tensor, y: Tensor) -> float:
    """Squared MMD of k(u, v) = (uᵀv/d + 1)³ between ``x [n, d]`` and ``y [m, d]``; may be negative.

    Σ_{i≠j} k(x_i, x_j)/(n(n-1)) + Σ_{i≠j} k(y_i, y_j)/(m(m-1)) - 2 mean k(x_i, y_j)
    Source: Gretton et al. 2012, eq. 3; Bińkowski et al. 2018, section 4.

    Raises:
        DataError: fewer than 2 samples, different dimensions, or features that are not finite.
    """
    x, y = _pair(x, y, least=2)
    n, m = len(x), len(y)
    within_x = (_kernel_sum(x, x) - float(_cubic(x.square().sum(1), x.shape[1]).sum())) / (n * (n - 1))
    within_y = (_kernel_sum(y, y) - float(_cubic(y.square().sum(1), y.shape[1]).sum())) / (m * (m - 1))
    return within_x + within_y - 2 * _kernel_sum(x, y) / (n * m)


def kid(x: Tensor, y: Tensor, *, subsets: int = 100, size: int = 1000, seed: int = 0) -> tuple[float, float]:
    """Mean and standard deviation of :func:`mmd2_unbiased` over random subsets without replacement.

    Each of ``subsets`` draws takes ``min(size, n, m)`` rows of ``x [n, d]`` and of ``y [m, d]``.
    Source: Bińkowski et al. 2018, section 4 (Kernel Inception Distance, there on Inception features).

    Raises:
        DataError: fewer than 2 samples, ``subsets`` < 1, ``size`` < 2, different dimensions, not finite.
    """
    if subsets < 1 or size < 2:
        raise DataError("KID needs at least 1 subset of at least 2", got=f"subsets={subsets}, size={size}")
    x, y = _pair(x, y, least=2)
    size = min(size, len(x), len(y))
    rng = torch.Generator().manual_seed(seed)

    def draw(z: Tensor) -> Tensor:
        return z[torch.randperm(len(z), generator=rng)[:size].to(z.device)]

    values = torch.tensor([mmd2_unbiased(draw(x), draw(y)) for _ in range(subsets)], dtype=torch.float64)
    return float(values.mean()), float(values.std(correction=0))


def sliced_wasserstein(x: Tensor, y: Tensor, *, directions: int = 256, seed: int = 0) -> float:
    """√ mean_θ W2²(θᵀx, θᵀy) over random unit directions θ, in feature units.

    W2² = ∫ (Q_x(u) - Q_y(u))² du is exact for ``x [n, d]`` and ``y [m, d]`` of any n, m >= 2: the two
    step quantile functions are compared on the union of their grids i/n and j/m.
    Source: Rabin et al. 2011, eq. 8; Bonneel et al. 2015.

    Raises:
        DataError: fewer than 2 samples, ``directions`` < 1, different dimensions, not finite.
    """
    if directions < 1:
        raise DataError("The sliced Wasserstein distance needs at least 1 direction", got=directions)
    x, y = _pair(x, y, least=2)
    rng = torch.Generator().manual_seed(seed)
    theta = torch.randn(x.shape[1], directions, generator=rng, dtype=torch.float64)
    theta = (theta / theta.norm(dim=0)).to(x.device)
    n, m = len(x), len(y)
    steps = torch.cat([torch.arange(1, n + 1) * m, torch.arange(1, m + 1) * n])  # in units of 1/(n m)
    ends = torch.unique(steps).to(x.device)
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    widths = (ends - starts).double() / (n * m)
    total = 0.0
    for part in torch.split(theta, 32, dim=1):
        gap = (x @ part).sort(0).values[starts // m] - (y @ part).sort(0).values[starts // n]
        total += float(widths @ gap.square().sum(1))
    return math.sqrt(total / directions)


def precision_recall(real: Tensor, fake: Tensor, *, k: int = 3, chunk: int = 1024) -> tuple[float, float]:
    """Shares of fakes inside the manifold of the reals, and of reals inside that of the fakes, in [0, 1].

    A set's manifold is the union of closed balls around its points that reach the k-th nearest other
    point. Ties count as inside. ``chunk`` rows of distances are held at a time.
    Source: Kynkäänniemi et al. 2019, eqs. 1-3.

    Raises:
        DataError: not more than k samples, k < 1, different dimensions, or features that are not finite.
    """
    if k < 1 or chunk < 1:
        raise DataError("Precision and recall need k >= 1 and chunk >= 1", got=f"k={k}, chunk={chunk}")
    real, fake = _pair(real, fake, least=k + 1)
    centre = real.mean(0)
    real, fake = real - centre, fake - centre
    tie = 1e-12 * float(torch.maximum(real.square().sum(1).max(), fake.square().sum(1).max()))
    precision = _inside(fake, real, _radii(real, k, chunk) + tie, chunk)
    return precision, _inside(real, fake, _radii(fake, k, chunk) + tie, chunk)


def interval(
    metric: Callable[[Tensor], float], x: Tensor, *, n_boot: int = 50, z: float = 1.96, seed: int = 0
) -> tuple[float, float]:
    """metric(x) ± z · (bootstrap standard deviation): the spread of the number at this sample size.

    ``n_boot`` resamples of the rows of ``x [n, ...]`` with replacement give the standard deviation; the
    interval is centred on the value itself, so a finite-sample bias (Fréchet) is neither doubled nor removed.
    Source: Efron & Tibshirani 1993, section 13.2.

    Raises:
        DataError: fewer than 2 samples or fewer than 2 resamples.
    """
    if len(x) < 2 or n_boot < 2:
        raise DataError("An interval needs at least 2 samples and 2 resamples", got=f"{len(x)} and {n_boot}")
    rng = torch.Generator().manual_seed(seed)
    draws = (torch.randint(len(x), (len(x),), generator=rng).to(x.device) for _ in range(n_boot))
    spread = float(torch.tensor([metric(x[rows]) for rows in draws], dtype=torch.float64).std())
    value = metric(x)
    return value - z * spread, value + z * spread


def _root(cov: Tensor) -> Tensor:
    """R ``[d, r]`` with R Rᵀ = cov, on its support: eigenvalues above d·eps·λ_max."""
    values, vectors = torch.linalg.eigh(cov)
    keep = values > len(values) * torch.finfo(values.dtype).eps * values[-1]
    root: Tensor = vectors[:, keep] * values[keep].sqrt()
    return root


def _cubic(dot: Tensor, dim: int) -> Tensor:
    return torch.pow(torch.div(dot, dim) + 1, 3)


def _kernel_sum(x: Tensor, y: Tensor) -> float:
    return sum(float(_cubic(rows @ y.T, x.shape[1]).sum()) for rows in torch.split(x, 1024))


def _squared_distances(rows: Tensor, points: Tensor) -> Tensor:
    squares = rows.square().sum(1)[:, None] + points.square().sum(1)
    return torch.addmm(squares, rows, points.T, alpha=-2).clamp_min(0)


def _radii(points: Tensor, k: int, chunk: int) -> Tensor:
    """Squared distance to the k-th nearest other point: the (k+1)-th smallest, itself included."""
    parts = (_squared_distances(rows, points) for rows in torch.split(points, chunk))
    return torch.cat([distances.kthvalue(k + 1, dim=1).values for distances in parts])


def _inside(queries: Tensor, points: Tensor, radii: Tensor, chunk: int) -> float:
    hits = sum(int((_squared_distances(q, points) <= radii).any(1).sum()) for q in torch.split(queries, chunk))
    return hits / len(queries)


def _checked(features: Tensor, least: int) -> Tensor:
    """``features`` as float64 ``[n, d]``, n >= ``least`` (on the CPU where the device has no float64)."""
    if features.ndim != 2 or features.shape[1] < 1:
        raise DataError("Features are not a table", got=f"shape {list(features.shape)}", want="[n, d]")
    if len(features) < least:
        raise _too_few(len(features), least)
    x = (features.cpu() if features.device.type == "mps" else features).detach().double()
    if not bool(torch.isfinite(x).all()):
        rows = int((~torch.isfinite(x)).any(1).sum())
        raise DataError(
            "Some features are not finite",
            got=f"NaN or infinity in {rows} of {len(x)} rows",
            do="Look at the images they come from: a generator that diverges is the usual cause",
        )
    return x


def _pair(x: Tensor, y: Tensor, least: int) -> tuple[Tensor, Tensor]:
    x, y = _checked(x, least), _checked(y, least)
    if x.shape[1] != y.shape[1]:
        raise _other_dimension(x.shape[1], y.shape[1])
    return x, y.to(x.device)


def _too_few(got: int, least: int) -> DataError:
    return DataError("There are too few samples for this metric", got=got, want=f"at least {least}")


def _other_dimension(first: int, second: int) -> DataError:
    return DataError(
        "The two sets of features differ in dimension",
        got=f"{first} and {second}",
        do="Compute both with the same feature net",
    )
