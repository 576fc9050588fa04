"""The Fréchet distance extrapolated to infinitely many samples, where its finite-sample bias is gone."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.errors import DataError
from fewstep.evaluation.bootstrap import half_samples, row_order, spread_of
from fewstep.evaluation.metrics import FrechetReference, Stats, checked


def fd_infinity(real: Stats | FrechetReference, fake_rows: Tensor, *, points: int = 8, seed: int = 0) -> float:
    """FD extrapolated to infinitely many fakes: the intercept of least squares FD_N = a + b/N.

    N takes ``points`` values from n/4 to n, evenly spaced in 1/N, each on a random subset without replacement of
    ``fake_rows [n, d]`` in :func:`row_order`. The bias of the reference remains; may be slightly negative.
    Source: Chong & Forsyth 2020, section 4 (there on Inception features, 15 values of N from 5,000 up).

    Raises:
        DataError: fewer than :func:`fd_infinity_least` samples (below, FD_N is not linear in 1/N), ``points``
            < 2, different dimensions, or features that are not finite.
    """
    if points < 2:
        raise DataError("FD-infinity needs at least 2 points to extrapolate", got=points)
    x = checked(fake_rows, least=2)
    least = fd_infinity_least(x.shape[1])
    if len(x) < least:
        raise DataError(
            f"There are too few samples to extrapolate the Fréchet distance of {x.shape[1]} features",
            got=len(x),
            want=f"at least {least}: the smallest quarter must still have a covariance of full rank",
            do="Generate more samples, or use kid, which has no bias",
        )
    reference = real if isinstance(real, FrechetReference) else FrechetReference(real)
    rng = torch.Generator().manual_seed(seed)
    return _extrapolated(reference, x, [row_order(x)], points, rng)[0]


def fd_infinity_least(dim: int) -> int:
    """The fewest samples for :func:`fd_infinity` of ``dim`` features: 4 (dim + 1), and never below 32."""
    return max(4 * (dim + 1), 32)


def fd_infinity_spread(reference: FrechetReference, fake_rows: Tensor, *, replicates: int, seed: int = 0) -> float:
    """Standard deviation of :func:`fd_infinity` at this n, by :func:`half_samples` of ``fake_rows [n, d]``.

    A half is extrapolated from n/8 .. n/2. The noise of the random subsets counts twice: up to √2 too wide.
    """
    rng = torch.Generator().manual_seed(seed)
    halves = list(half_samples(len(fake_rows), replicates, seed))
    return spread_of(_extrapolated(reference, fake_rows, halves, 8, rng)) if halves else 0.0


def _extrapolated(
    reference: FrechetReference, x: Tensor, pools: list[Tensor], points: int, rng: torch.Generator
) -> list[float]:
    """For each pool of row numbers the intercept at 1/N = 0 of FD_N over subsets of that pool."""
    n = len(pools[0])
    sizes = (n / torch.linspace(4, 1, points, dtype=torch.float64)).round().long()
    draws = (pool[torch.randperm(n, generator=rng)[: int(size)]] for pool in pools for size in sizes)
    values = torch.tensor(reference.distances(x, draws), dtype=torch.float64).view(len(pools), points)
    inverse = 1 / sizes.double()
    centred = inverse - inverse.mean()
    slope = values @ centred / centred.square().sum()
    return [float(intercept) for intercept in values.mean(1) - slope * inverse.mean()]


def expected_bias(real: Stats, n: int) -> float:
    """What ``n`` samples of a perfect model score, n >= 2: E[FD] against the exact reference, to first order in d/n.

        Σλ_i/n + (Σ_ij λ_i λ_j/(λ_i + λ_j) + Σλ_i/2)/(2(n - 1))      (λ: eigenvalues of the covariance)

    From the mean's variance Σλ/n and the second-order term of the Bures distance, ½ Σ_ij H_ij²/(λ_i + λ_j), with the
    sampling variance E[H_ij²] = λ_i λ_j (1 + δ_ij)/(n - 1). White features give d/n + d(d+1)/(4(n-1)) (math.md 6.2).
    """
    values = torch.linalg.eigvalsh(real.cov).clamp_min(0)
    pairs = values[:, None] * values / (values[:, None] + values).clamp_min(torch.finfo(values.dtype).tiny)
    return float(values.sum() / n + (pairs.sum() + values.sum() / 2) / (2 * (n - 1)))
