"""Distances between two sets of features ``[n, d]``: plain functions, float64 inside, on any device.

All results are Python floats. Which features are compared is :mod:`fewstep.evaluation.features`' affair.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.errors import DataError
from fewstep.evaluation.bootstrap import Estimate, evenly, half_samples, row_order, spread_of


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
        x = checked(features, least=0)
        if self._count and x.shape[1] != len(self._mean):
            raise other_dimension(len(self._mean), x.shape[1])
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
            raise too_few_samples(self._count, 2)
        return Stats(self._mean, self._scatter / (self._count - 1), self._count)


def gaussian_stats(features: Tensor) -> Stats:
    """Mean and covariance Σ (x - m)(x - m)ᵀ/(N - 1) of ``features [n, d]``, n >= 2.

    Raises:
        DataError: fewer than 2 samples, or features that are not finite.
    """
    accumulator = StatsAccumulator()
    accumulator.add(features)
    return accumulator.stats()


class FrechetReference:
    """One side of the Fréchet distance with the root R Rᵀ = S of its covariance factored once.

    Args:
        stats: mean and covariance of this side; the other sides come later, one by one.
    """

    def __init__(self, stats: Stats) -> None:
        self.stats, self._root = stats, _root(stats.cov)

    def distance(self, other: Stats) -> float:
        """:func:`frechet_distance` to ``other``: |m - m'|² + tr S + tr S' - 2 Σ √λ_i(Rᵀ S' R).

        Raises:
            DataError: as :func:`frechet_distance`.
        """
        self._must_fit(len(other.mean))
        root = self._root
        mean, cov = other.mean.to(root), other.cov.to(root)
        overlap = _root_sum(torch.linalg.eigvalsh(root.T @ cov @ root), rank=other.count - 1)
        scale = float(self.stats.cov.trace() + cov.trace())
        total = float((self.stats.mean - mean).square().sum()) + scale - 2 * overlap
        if not total >= -1e-6 * scale:
            raise DataError(
                "The Fréchet distance is negative beyond rounding: one of the covariances is not a covariance",
                got=f"{total:.6g} at a total variance of {scale:.6g}",
                want="symmetric, no negative eigenvalues",
            )
        return max(total, 0.0)

    def distances(self, rows: Tensor, subsets: Iterable[Tensor]) -> list[float]:
        """Distances to subsets (index sets of >= 2) of ``rows [n, d]``, each without a covariance of its own:
        Rᵀ S' R is the covariance of the rows Z = (x - m) R, which are projected once.

        Raises:
            DataError: another dimension than the reference, or features that are not finite.
        """
        x = checked(rows, least=2)
        self._must_fit(x.shape[1])
        x = x - self.stats.mean.to(x)
        z, trace = x @ self._root.to(x), float(self.stats.cov.trace())
        return [self._centred_distance(x[index], z[index], trace) for index in (s.to(x.device) for s in subsets)]

    def _must_fit(self, dim: int) -> None:
        if dim != len(self.stats.mean):
            raise other_dimension(len(self.stats.mean), dim)

    @staticmethod
    def _centred_distance(x: Tensor, z: Tensor, trace: float) -> float:
        gap, n = x.mean(0), len(x)
        spread = float((x - gap).square().sum()) / (n - 1)
        z = z - z.mean(0)
        gram = z @ z.T if n <= z.shape[1] else z.T @ z
        overlap = _root_sum(torch.linalg.eigvalsh(gram / (n - 1)), rank=n - 1)
        return float(gap.square().sum()) + trace + spread - 2 * overlap


def frechet_distance(a: Stats, b: Stats) -> float:
    """|m_a - m_b|² + tr S_a + tr S_b - 2 tr (S_a S_b)^½, in squared feature units.

    The trace is Σ √λ_i(Rᵀ S_b R) with R Rᵀ = S_a on the support of S_a, so that covariances without
    full rank (n <= d) are exact too. Rounding may leave a total of -1e-6·tr: that is 0. Biased
    upwards at finite N (white features, exact reference: d/N + d(d+1)/(4(N-1))): compare equal N only.
    Source: Dowson & Landau 1982; Heusel et al. 2017, eq. 6.

    Raises:
        DataError: different dimensions, or a covariance that is not one (a total below -1e-6·tr).
    """
    few, many = (a, b) if a.count <= b.count else (b, a)
    return FrechetReference(few).distance(many)


def mmd2_unbiased(x: Tensor, y: Tensor) -> float:
    """Squared MMD of k(u, v) = (uᵀv/d + 1)³ between ``x [n, d]`` and ``y [m, d]``; may be negative.

    Σ_{i≠j} k(x_i, x_j)/(n(n-1)) + Σ_{i≠j} k(y_i, y_j)/(m(m-1)) - 2 mean k(x_i, y_j)
    Source: Gretton et al. 2012, eq. 3; Bińkowski et al. 2018, section 4.

    Raises:
        DataError: fewer than 2 samples, different dimensions, or features that are not finite.
    """
    x, y = checked_pair(x, y, least=2)
    n, m = len(x), len(y)
    within_x = (_kernel_sum(x, x) - float(_cubic(x.square().sum(1), x.shape[1]).sum())) / (n * (n - 1))
    within_y = (_kernel_sum(y, y) - float(_cubic(y.square().sum(1), y.shape[1]).sum())) / (m * (m - 1))
    return within_x + within_y - 2 * _kernel_sum(x, y) / (n * m)


def kid(x: Tensor, y: Tensor, *, subsets: int = 100, size: int = 1000, seed: int = 0) -> tuple[float, float]:
    """Mean and standard deviation of :func:`mmd2_unbiased` over random subsets: the published protocol.

    Each of ``subsets`` draws takes ``min(size, n, m)`` rows of ``x [n, d]`` and of ``y [m, d]`` without
    replacement, from the rows in :func:`row_order`: the order in which they were generated does not matter.
    Source: Bińkowski et al. 2018, section 4 (Kernel Inception Distance, there on Inception features).

    Raises:
        DataError: fewer than 2 samples, ``subsets`` < 1, ``size`` < 2, different dimensions, not finite.
    """
    if subsets < 1 or size < 2:
        raise DataError("KID needs at least 1 subset of at least 2", got=f"subsets={subsets}, size={size}")
    x, y = checked_pair(x, y, least=2)
    x, y = x[row_order(x)], y[row_order(y)]
    size = min(size, len(x), len(y))
    subsets = 1 if size == len(x) == len(y) else subsets  # every subset is the whole
    rng = torch.Generator().manual_seed(seed)

    def draw(z: Tensor) -> Tensor:
        return z[torch.randperm(len(z), generator=rng)[:size].to(z.device)]

    values = torch.tensor([mmd2_unbiased(draw(x), draw(y)) for _ in range(subsets)], dtype=torch.float64)
    return float(values.mean()), float(values.std(correction=0))


def mmd2_spread(x: Tensor, y: Tensor, *, replicates: int, seed: int = 0, most: int = 5000) -> float:
    """Standard deviation of :func:`mmd2_unbiased` at these sizes, from halves of ``x [n, d]`` and of ``y [m, d]``.

    √(n'/n Var_halves(x) + m'/m Var_halves(y)), with kernels of n', m' <= ``most`` evenly spaced rows held once.
    Where x and y follow one law the statistic is degenerate (its deviation falls as 1/n, not 1/√n) and the
    spread is too wide, by at most √3.

    Raises:
        DataError: fewer than 4 samples, different dimensions, or features that are not finite.
    """
    if replicates == 0:
        return 0.0
    x, y = checked_pair(x, y, least=4)
    a, b = x[evenly(len(x), most)], y[evenly(len(y), most)]
    by_x = _one_sided_variance(a, b, replicates, seed) * len(a) / len(x)
    return math.sqrt(by_x + _one_sided_variance(b, a, replicates, seed + 1) * len(b) / len(y))


def _one_sided_variance(x: Tensor, y: Tensor, replicates: int, seed: int) -> float:
    """Variance of the terms of mmd2 that hold x, over halves a of x: aᵀK a/(h(h-1)) - 2 aᵀ mean_j k(x, y_j)/h."""
    n, dim = x.shape
    chosen = x.new_zeros(replicates, n)
    for row, index in zip(chosen, half_samples(n, replicates, seed), strict=True):
        row[index.to(x.device)] = 1
    within = _cubic(x @ x.T, dim).fill_diagonal_(0)
    across = torch.cat([_cubic(part @ y.T, dim).mean(1) for part in torch.split(x, 1024)])
    half = n // 2
    values = ((chosen @ within) * chosen).sum(1) / (half * (half - 1)) - 2 * (chosen @ across) / half
    return float(values.var())


def sliced_wasserstein(x: Tensor, y: Tensor, *, directions: int = 256, seed: int = 0) -> float:
    """√ mean_θ W2²(θᵀx, θᵀy) over random unit directions θ, in feature units.

    W2² = ∫ (Q_x(u) - Q_y(u))² du is exact for ``x [n, d]`` and ``y [m, d]`` of any n, m >= 2: the two
    step quantile functions are compared on the union of their grids i/n and j/m.
    Source: Rabin et al. 2011, eq. 8; Bonneel et al. 2015.

    Raises:
        DataError: fewer than 2 samples, ``directions`` < 1, different dimensions, not finite.
    """
    return _sliced_wasserstein(x, y, [], directions, seed)[0]


def sliced_wasserstein_estimate(
    x: Tensor, y: Tensor, *, directions: int = 256, replicates: int = 50, seed: int = 0
) -> Estimate:
    """:func:`sliced_wasserstein` with the spread by :func:`half_samples` of ``y [m, d]``; x is fixed.

    The directions are the same throughout; every set is projected and sorted once.

    Raises:
        DataError: as :func:`sliced_wasserstein`, or fewer than 4 samples in y.
    """
    halves = list(half_samples(len(y), replicates, seed))
    value, *others = _sliced_wasserstein(x, y, halves, directions, seed)
    return Estimate(value, spread_of(others))


def _sliced_wasserstein(x: Tensor, y: Tensor, subsets: list[Tensor], directions: int, seed: int) -> list[float]:
    """The distance of x to y, and to each of the subsets (row numbers) of y."""
    if directions < 1:
        raise DataError("The sliced Wasserstein distance needs at least 1 direction", got=directions)
    x, y = checked_pair(x, y, least=2)
    rng = torch.Generator().manual_seed(seed)
    theta = torch.randn(x.shape[1], directions, generator=rng, dtype=torch.float64)
    theta = (theta / theta.norm(dim=0)).to(x.device)
    masks = [torch.zeros(len(y), dtype=torch.bool).index_fill(0, index, True).to(x.device) for index in subsets]
    totals = [0.0] * (1 + len(masks))
    for part in torch.split(theta, 32, dim=1):
        ahead, (behind, rows) = (part.T @ x.T).sort(1).values, (part.T @ y.T).sort(1)
        totals[0] += _squared_gap(ahead, behind)
        for number, mask in enumerate(masks, start=1):
            totals[number] += _squared_gap(ahead, behind[mask[rows]].view(len(behind), -1))
    return [math.sqrt(total / directions) for total in totals]


def _squared_gap(x: Tensor, y: Tensor) -> float:
    """Σ over the rows (sorted samples ``[k, n]`` and ``[k, m]``) of ∫ (Q_x(u) - Q_y(u))² du."""
    n, m = x.shape[1], y.shape[1]
    steps = torch.cat([torch.arange(1, n + 1) * m, torch.arange(1, m + 1) * n])  # in units of 1/(n m)
    ends = torch.unique(steps).to(x.device)
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    widths = (ends - starts).double() / (n * m)
    gap = x[:, starts // m] - y[:, starts // n]
    return float(gap.square().sum(0) @ widths)


def _root_sum(eigenvalues: Tensor, rank: int) -> float:
    """Σ √λ over the ``rank`` largest (all, if rank < 1): what rounding leaves of an exact 0 is not summed."""
    top = eigenvalues[-rank:] if 0 < rank < len(eigenvalues) else eigenvalues
    return float(top.clamp_min(0).sqrt().sum())


def _root(cov: Tensor) -> Tensor:
    """R ``[d, r]`` with R Rᵀ = cov, on its support: eigenvalues above d·eps·λ_max."""
    values, vectors = torch.linalg.eigh(cov)
    keep = values > len(values) * torch.finfo(values.dtype).eps * values[-1]
    return torch.mul(vectors[:, keep], values[keep].sqrt())


def _cubic(dot: Tensor, dim: int) -> Tensor:
    base = dot / dim + 1
    return base.square().mul_(base)  # several times faster than a power


def _kernel_sum(x: Tensor, y: Tensor) -> float:
    """Σ_ij k(x_i, y_j), in blocks that stay in the cache; Σ b³ is the inner product of b² and b."""
    total = 0.0
    for rows in torch.split(x / x.shape[1], 64):
        base = (rows @ y.T).add_(1).flatten()
        total += float(base.square().dot(base))
    return total


def checked(features: Tensor, least: int) -> Tensor:
    """``features`` as float64 ``[n, d]``, n >= ``least`` (on the CPU where the device has no float64).

    Raises:
        DataError: not ``[n, d]``, fewer than ``least`` rows, or features that are not finite.
    """
    if features.ndim != 2 or features.shape[1] < 1:
        raise DataError("Features are not a table", got=f"shape {list(features.shape)}", want="[n, d]")
    if len(features) < least:
        raise too_few_samples(len(features), least)
    x = (features.cpu() if features.device.type == "mps" else features).detach().double()
    if not bool(torch.isfinite(x).all()):
        rows = int((~torch.isfinite(x)).any(1).sum())
        raise DataError(
            "Some features are not finite",
            got=f"NaN or infinity in {rows} of {len(x)} rows",
            do="Look at the images they come from: a generator that diverges is the usual cause",
        )
    return x


def checked_pair(x: Tensor, y: Tensor, least: int) -> tuple[Tensor, Tensor]:
    """Both :func:`checked`, of one dimension, on the device of ``x``.

    Raises:
        DataError: as :func:`checked`, or different dimensions.
    """
    x, y = checked(x, least), checked(y, least)
    if x.shape[1] != y.shape[1]:
        raise other_dimension(x.shape[1], y.shape[1])
    return x, y.to(x.device)


def too_few_samples(got: int, least: int) -> DataError:
    """The error for ``got`` samples where ``least`` are needed."""
    return DataError("There are too few samples for this metric", got=got, want=f"at least {least}")


def other_dimension(first: int, second: int) -> DataError:
    """The error for features of two dimensions."""
    return DataError(
        "The two sets of features differ in dimension",
        got=f"{first} and {second}",
        do="Compute both with the same feature net",
    )
