"""Power laws of quality in training compute: ``y = K C^alpha``, and apart from it ``y = y_inf + K C^alpha``.

Both are least squares in ln y (math.md 2.8). Which of the two is fitted is the caller's choice; neither replaces
the other.

The interval is Student's t around the fit, exact where the errors of ln y are normal and alike. The pairs bootstrap
(Efron & Tibshirani 1993, 9.5) is given beside it: of a handful of points it covers about 90 % (docs/scaling.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fewstep.errors import DataError

LEAST_POINTS = 4
RESAMPLES = 2000
_EXACT = 1e-12
"""Least residual of ln y that counts: below it is rounding."""
_ZOOMS, _GRID, _NEWTON = 8, 33, 12

Array = np.ndarray
Interval = tuple[float, float]


@dataclass(frozen=True)
class Point:
    """One run: its size ``compute`` (any unit, > 0) and its quality ``value`` (> 0), perhaps with its interval."""

    name: str
    compute: float
    value: float
    interval: Interval | None = None


@dataclass(frozen=True, eq=False)
class Curve:
    """``y = offset + exp(height + alpha (ln C - centre))`` with what its uncertainty needs.

    Args:
        spread: ``s = sqrt(RSS / dof)``, residual standard deviation of ln y.
        covariance: ``(J^T J)^-1`` of (height, alpha) or (height, alpha, offset), ``[p, p]``; times s^2 it is theirs.
        dof: points minus parameters.
    """

    offset: float
    height: float
    alpha: float
    centre: float
    spread: float
    covariance: Array
    dof: int

    @property
    def factor(self) -> float:
        """K: the power part at C = 1, far outside the data where C is counted in FLOP."""
        return math.exp(min(self.height - self.alpha * self.centre, 700.0))

    def at(self, compute: Array | float) -> Array:
        """y at sizes C ``[...]``."""
        return self.offset + np.exp(self.height + self.alpha * (np.log(compute) - self.centre))

    def band(self, compute: Array | float, level: float = 0.95) -> tuple[Array, Array]:
        """Where one more run of size C would lie: ``exp(ln y +- t s sqrt(1 + j (J^T J)^-1 j^T))``."""
        y = self.at(compute)
        j = _jacobian(np.log(compute) - self.centre, y, self.offset, len(self.covariance))
        width = student_t(level, self.dof) * self.spread * np.sqrt(1 + ((j @ self.covariance) * j).sum(-1))
        return np.exp(np.log(y) - width), np.exp(np.log(y) + width)

    @property
    def alpha_interval(self) -> Interval:
        """``alpha -+ t s sqrt(cov_aa)``, 95 %: exact for the plain law, linearised for the one with an offset."""
        half = student_t(0.95, self.dof) * self.spread * math.sqrt(max(self.covariance[1, 1], 0.0))
        return self.alpha - half, self.alpha + half


@dataclass(frozen=True, eq=False)
class Law:
    """A fitted law and how far to trust it.

    Args:
        alpha_bootstrap: 95 % of alpha over resamples of the points.
        offset_interval: 95 % of y_inf by its profile (F with 1 and dof); None for the plain law.
        r2: share of the variance of ln y that the law explains; pearson: correlation of ln y with ln C.
        aicc: ``n ln(RSS/n) + 2k + 2k(k+1)/(n-k-1)``, k with the spread; None where n < k + 2.
        without: alpha with point i left out, ``[n]``.
        outliers: points outside the 95 % band (all n at once: Bonferroni) of the law of the others.
    """

    curve: Curve
    alpha_bootstrap: Interval
    offset_interval: Interval | None
    r2: float
    pearson: float
    aicc: float | None
    without: tuple[float, ...]
    outliers: tuple[int, ...]

    def describe(self) -> dict[str, Any]:
        """JSON-able."""
        c = self.curve
        return {
            "alpha": c.alpha,
            "alpha_interval": list(c.alpha_interval),
            "interval": f"95 %, Student t, {c.dof} degrees of freedom",
            "alpha_bootstrap": list(self.alpha_bootstrap),
            "K": c.factor,
            "y_inf": c.offset,
            "y_inf_interval": None if self.offset_interval is None else list(self.offset_interval),
            "r2": self.r2,
            "pearson": self.pearson,
            "spread": c.spread,
            "aicc": self.aicc,
            "leave_one_out": [min(self.without), max(self.without)],
            "outliers": list(self.outliers),
        }


def fit(points: Sequence[Point], *, offset: bool = False, resamples: int = RESAMPLES, seed: int = 0) -> Law:
    """Least squares of ln y on ln C; with ``offset``, of ln y on ``ln(y_inf + K C^alpha)``, ``y_inf >= 0``.

    Args:
        points: at least four sizes.
        offset: fit y_inf too, between 0 and the geometric mean of y.
        resamples: of the pairs bootstrap; those with too few sizes for a fit are drawn again.
        seed: of the bootstrap.

    Raises:
        DataError: fewer than four sizes, or a size or value that has no logarithm.
    """
    check_points(points)
    x = np.log([p.compute for p in points])
    z = np.log([p.value for p in points])
    n, curve = len(x), _curve(x, z, offset)
    rss = max(n * _EXACT**2, curve.spread**2 * curve.dof)
    k = 4 if offset else 3
    left = [_curve(np.delete(x, i), np.delete(z, i), offset) for i in range(n)]
    return Law(
        curve,
        _bootstrap(x, z, offset, resamples, seed),
        _offset_interval(x, z, curve) if offset else None,
        1 - rss / max(float(((z - z.mean()) ** 2).sum()), rss),
        _pearson(x, z),
        n * math.log(rss / n) + 2 * k + 2 * k * (k + 1) / (n - k - 1) if n > k + 1 else None,
        tuple(c.alpha for c in left),
        tuple(i for i, c in enumerate(left) if c.dof > 0 and _outside(c, points[i], 1 - 0.05 / n)),
    )


def check_points(points: Sequence[Point]) -> None:
    """Refuse what has no logarithm, and fewer sizes than a law needs.

    Raises:
        DataError: with the points in question.
    """
    bad = [p for p in points if not all(math.isfinite(v) and v > 0 for v in (p.compute, p.value))]
    if bad:
        raise DataError(
            "A power law needs positive, finite sizes and values",
            got="; ".join(f"{p.name}: size {p.compute:g}, value {p.value:g}" for p in bad),
            do="Leave these points out, or measure them again",
        )
    sizes = sorted({p.compute for p in points})
    if len(sizes) < LEAST_POINTS:
        raise DataError(
            "A power law through fewer than four sizes says nothing: two parameters leave too little to check them by",
            got=f"{len(points)} points of {len(sizes)} sizes ({', '.join(f'{s:g}' for s in sizes)})",
            want="at least 4 sizes, better 6 over a factor of 100",
        )


def notes(points: Sequence[Point], law: Law, offset: Law | None = None) -> list[str]:
    """What a reader must know besides the numbers, one sentence each."""
    n, c = len(points), law.curve
    low, high = c.alpha_interval
    said = []
    if n < 8:
        said.append(
            f"With {n} points the interval is wide: Student's t with {c.dof} degrees of freedom. The pairs bootstrap "
            "beside it misses the true alpha about twice as often as it says (docs/scaling.md)."
        )
    span = max(p.compute for p in points) / min(p.compute for p in points)
    if span < 10:
        said.append(f"The sizes span a factor of {span:.3g} only: over less than ten, many curves look like a line.")
    if low <= 0 <= high:
        said.append("The interval of alpha contains 0: these points show no trend.")
    for i in law.outliers:
        said.append(
            f"'{points[i].name}' lies far from the law of the others; without it alpha is {law.without[i]:.3g}."
        )
    if offset is not None:
        reason = not_identifiable(law, offset)
        said.append(f"The offset y_inf is not identifiable: {reason}." if reason else "The offset y_inf is supported.")
    return said


def not_identifiable(law: Law, offset: Law) -> str:
    """Why y_inf cannot be told from 0 by these points; empty if it can."""
    if law.aicc is None or offset.aicc is None or offset.offset_interval is None:
        return f"{len(law.without)} points are too few (AICc of three parameters and a spread needs 6)"
    if offset.offset_interval[0] <= 0:
        return f"its 95 % interval reaches from 0 to {offset.offset_interval[1]:.3g}"
    if law.aicc - offset.aicc < 2:
        return f"it improves on the plain law within noise (AICc {law.aicc:.4g} without, {offset.aicc:.4g} with)"
    return ""


def student_t(level: float, dof: int) -> float:
    """``q`` with ``P(|t| <= q) = level``, by bisection of Abramowitz & Stegun 26.7.3 and 26.7.4 (finite sums).

    Raises:
        DataError: no degrees of freedom, or a level outside (0, 1).
    """
    if dof < 1 or not 0 < level < 1:
        raise DataError("Student's t needs a degree of freedom and a level in (0, 1)", got=(level, dof))
    low, high = 0.0, math.pi / 2
    while high - low > 1e-15:
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, dof) < level else (low, middle)
    return math.sqrt(dof) * math.tan((low + high) / 2)


def _within(theta: float, dof: int) -> float:
    """``P(|t| <= sqrt(dof) tan theta)``."""
    odd, term, total = dof % 2, 1.0, 0.0
    for i in range(odd, dof - 1, 2):
        total += term
        term *= math.cos(theta) ** 2 * (i + 1) / (i + 2)
    if odd:
        return 2 / math.pi * (theta + math.sin(theta) * math.cos(theta) * total)
    return math.sin(theta) * total


# --- least squares, for many data sets at once: x, z [..., n]; results [...] -------------------------------


def _solve(x: Array, z: Array, offset: bool) -> tuple[Array, Array, Array]:
    """``(y_inf, a, b)`` of ``ln(y_inf + exp(a + b x)) = z``; y_inf by a bounded search, whose ends close in."""
    if not offset:
        return np.zeros(x.shape[:-1]), *_line(x, z)
    low, high = np.zeros(x.shape[:-1]), np.exp(z.mean(-1))
    for _ in range(_ZOOMS):
        tried = low[..., None] + (high - low)[..., None] * np.linspace(0, 1, _GRID)
        rss = _profile(x[..., None, :], z[..., None, :], tried)[2]
        best = rss.argmin(-1)[..., None]
        low = np.take_along_axis(tried, np.maximum(best - 1, 0), -1)[..., 0]
        high = np.take_along_axis(tried, np.minimum(best + 1, _GRID - 1), -1)[..., 0]
        found = np.take_along_axis(tried, best, -1)[..., 0]
    a, b, _ = _profile(x, z, found)
    return found, a, b


def _line(x: Array, z: Array) -> tuple[Array, Array]:
    dx = x - x.mean(-1, keepdims=True)
    b = (dx * z).sum(-1) / (dx * dx).sum(-1)
    return z.mean(-1) - b * x.mean(-1), b


def _profile(x: Array, z: Array, offset: Array) -> tuple[Array, Array, Array]:
    """``(a, b, RSS)`` at given offsets ``[...]``: Gauss-Newton, each step a linear fit; the best step counts."""
    y0 = offset[..., None]
    x, z = np.broadcast_arrays(x, z + 0 * y0)
    share = np.maximum(1 - y0 * np.exp(-z), 0.02)  # of the power part in y; a point below y_inf tells little of it
    a, b = _step(x, share, share * (z + np.log(share)))
    best = (a, b, np.full(a.shape, np.inf))
    for _ in range(_NEWTON):
        power = np.exp(np.clip(a[..., None] + b[..., None] * x, -500, 500))
        residual = z - np.log(y0 + power)
        rss = (residual**2).sum(-1)
        best = tuple(np.where(rss < best[2], new, old) for new, old in zip((a, b, rss), best, strict=True))  # type: ignore[assignment]
        da, db = _step(x, power / (y0 + power), residual)
        a, b = a + da, b + db
    return best


def _step(x: Array, weight: Array, target: Array) -> tuple[Array, Array]:
    """``(a, b)`` of least ``sum (target - weight (a + b x))^2``."""
    w2 = weight**2 + 1e-300
    total = w2.sum(-1)
    mean = (w2 * x).sum(-1) / total
    dx = x - mean[..., None]
    b = (dx * weight * target).sum(-1) / np.maximum((w2 * dx * dx).sum(-1), 1e-300)
    return (weight * target).sum(-1) / total - b * mean, b


def _curve(x: Array, z: Array, offset: bool) -> Curve:
    centre = float(x.mean())
    y0, a, b = (float(v) for v in _solve(x - centre, z, offset))
    y, p = y0 + np.exp(a + b * (x - centre)), 3 if offset else 2
    dof = len(x) - p
    rss = float(((z - np.log(y)) ** 2).sum())
    j = _jacobian(x - centre, y, y0, p)
    return Curve(y0, a, b, centre, max(math.sqrt(rss / max(dof, 1)), _EXACT), np.linalg.pinv(j.T @ j), dof)


def _jacobian(dx: Array | float, y: Array, offset: float, parameters: int) -> Array:
    """d ln y by (height, alpha, offset), ``[..., p]``."""
    share = 1 - offset / y
    return np.stack([share, share * dx, 1 / y], -1)[..., :parameters]


def _outside(curve: Curve, point: Point, level: float) -> bool:
    low, high = curve.band(point.compute, level)
    return not low <= point.value <= high


def _pearson(x: Array, z: Array) -> float:
    dx, dz = x - x.mean(), z - z.mean()
    return float((dx * dz).sum() / max(math.sqrt((dx**2).sum() * (dz**2).sum()), 1e-300))


def _bootstrap(x: Array, z: Array, offset: bool, resamples: int, seed: int) -> Interval:
    """2.5 and 97.5 % of alpha over resamples of the points with at least as many sizes as a fit needs."""
    rng, n = np.random.default_rng(seed), len(x)
    picked = rng.integers(n, size=(resamples, n))
    while len(again := np.flatnonzero(_sizes(x[picked]) < (3 if offset else 2))):
        picked[again] = rng.integers(n, size=(len(again), n))
    alpha = _solve(x[picked] - x.mean(), z[picked], offset)[2]
    low, high = np.quantile(alpha, [0.025, 0.975])
    return float(low), float(high)


def _sizes(x: Array) -> Array:
    """Distinct values per row."""
    return 1 + (np.diff(np.sort(x, -1), axis=-1) > 0).sum(-1)


def _offset_interval(x: Array, z: Array, curve: Curve) -> Interval:
    """Every y_inf with ``RSS(y_inf) <= RSS (1 + t^2 / dof)``, between 0 and the geometric mean of y."""
    least = curve.spread**2 * curve.dof
    most = least * (1 + student_t(0.95, curve.dof) ** 2 / curve.dof)

    def edge(end: float) -> float:
        inner, outer = curve.offset, end
        if _profile(x - curve.centre, z, np.asarray(end))[2] <= most:
            return end
        for _ in range(40):
            middle = (inner + outer) / 2
            kept = _profile(x - curve.centre, z, np.asarray(middle))[2] <= most
            inner, outer = (middle, outer) if kept else (inner, middle)
        return inner

    return edge(0.0), edge(math.exp(z.mean()))
