"""A number with its spread at this sample size: the half-sample bootstrap, one rule for every metric.

The standard deviation of a statistic over random halves WITHOUT replacement estimates its standard deviation at
the full size: delete-d jackknife, variance factor (n - d)/d, which is 1 at d = n/2. Resampling with replacement
duplicates rows, and a duplicate breaks nearest neighbours (radius 0) and U-statistics (k(x, x) off the diagonal).
Like every jackknife it errs on the wide side: where a statistic is quadratic in the model's error (FD and KID of a
nearly perfect model) its deviation falls as 1/n, not 1/√n, and the spread is up to √((1/h² - 1/n²)n²) = √3 too wide.
Source: Efron 1982, chapter 8; Efron & Stein 1981 (the wide side); Shao & Wu 1989; Politis & Romano 1994.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fewstep.errors import DataError


@dataclass(frozen=True)
class Estimate:
    """A ``value`` and the standard deviation ``spread`` it has at this sample size (0.0: not estimated)."""

    value: float
    spread: float = 0.0

    @property
    def low(self) -> float:
        """value - 1.96 spread: the lower end of the 95 % interval, which is centred on the value itself,
        so that a finite-sample bias (Fréchet) is neither doubled nor removed."""
        return self.value - 1.96 * self.spread

    @property
    def high(self) -> float:
        """value + 1.96 spread."""
        return self.value + 1.96 * self.spread


def half_samples(n: int, replicates: int, seed: int) -> Iterator[Tensor]:
    """``replicates`` random index sets (int64, on the CPU) of ``n // 2`` of ``n`` rows, without replacement.

    Raises:
        DataError: fewer than 4 rows, or ``replicates`` negative or 1 (a spread needs 2; 0 asks for none).
    """
    if replicates < 0 or replicates == 1:
        raise DataError("A spread needs at least 2 replicates", got=replicates, want="0 (no spread) or at least 2")
    if replicates and n < 4:
        raise DataError("There are too few samples for a spread", got=n, want="at least 4")
    rng = torch.Generator().manual_seed(seed)
    return (torch.randperm(n, generator=rng)[: n // 2] for _ in range(replicates))


def spread_of(values: Sequence[float]) -> float:
    """Standard deviation Σ (v - mean)²/(r - 1) of ``values``, its square root; 0.0 for fewer than 2 values."""
    if len(values) < 2:
        return 0.0
    return float(torch.tensor(values, dtype=torch.float64).std())


def evenly(n: int, most: int) -> Tensor:
    """At most ``most`` evenly spaced row numbers of ``n`` (int64): the same for the same data, whatever is measured."""
    return torch.from_numpy(np.linspace(0, n - 1, min(most, n)).round().astype(np.int64))


def row_order(rows: Tensor) -> Tensor:
    """Row numbers (int64) that put ``rows [n, d]`` in an order that depends on what they hold, not on how they came.

    The rows are sorted lexicographically, then shuffled with a fixed seed, so that every stretch of the result is
    a random sample: random subsets drawn from it are the same whatever the order of the input.
    """
    values = np.ascontiguousarray((rows.detach().cpu().float() + 0.0).numpy())  # + 0.0: there is no -0.0
    bits = values.view(np.int32)
    keys = (bits >> 31) | np.int32(-(2**31))
    keys ^= bits  # read as unsigned numbers, in the order of the floats: the sign bit flipped, negatives inverted
    keys = keys.astype(">i4").view(f"V{4 * keys.shape[1]}")  # each row one string of bytes, which sort as its numbers
    order = torch.from_numpy(np.argsort(keys.ravel(), kind="stable"))
    return order[torch.randperm(len(order), generator=torch.Generator().manual_seed(0))]
