"""Nearest neighbours: which samples lie where the data lies, which data is reached, and what was copied.

All distances are Euclidean in feature space, in float64, and held in blocks of bounded size. Points that are equal up
to rounding (1e-12 of the largest squared norm) count as equal.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fewstep.errors import DataError
from fewstep.evaluation.bootstrap import Estimate, half_samples, spread_of
from fewstep.evaluation.metrics import checked, checked_pair

BLOCK = 2**22
"""Distances held at a time (32 MB)."""


def neighbourhood(
    real_rows: Tensor,
    fake_rows: Tensor,
    *,
    k: int = 3,
    density_k: int = 5,
    replicates: int = 50,
    seed: int = 0,
    chunk: int | None = None,
) -> dict[str, Estimate]:
    """ "precision", "recall", "density" and "coverage" of ``fake_rows [n, d]`` against ``real_rows [m, d]``.

    B_k(x) is the closed ball around x that reaches the k-th nearest other point of x's own set (ties are inside).

        precision = mean_j 1[∃i: y_j ∈ B_k(x_i)]        recall   = mean_i 1[∃j: x_i ∈ B_k(y_j)]
        density   = 1/(K n) Σ_ij 1[y_j ∈ B_K(x_i)]      coverage = mean_i 1[∃j: y_j ∈ B_K(x_i)]

    All lie in [0, 1] but density, which is 1 for a perfect model and may exceed it. ``k`` = 3 and ``density_k`` = K = 5
    are the papers' own. Recall and coverage grow with n: compare equal n only. The spread is over halves of the fakes;
    the reals are fixed. ``chunk`` rows of distances are held at a time (default: :data:`BLOCK` distances).
    Sources: Kynkäänniemi et al. 2019, eqs. 1-3; Naeem et al. 2020 (arXiv 2002.09797), section 3.

    Raises:
        DataError: not more than max(k, K) samples (twice as many fakes with a spread), k or K < 1, different
            dimensions, or features that are not finite.
    """
    if min(k, density_k) < 1 or (chunk is not None and chunk < 1):
        got = f"k={k}, density_k={density_k}, chunk={chunk}"
        raise DataError("Precision and recall need k >= 1 and chunk >= 1", got=got)
    least = max(k, density_k) + 1
    real, fake = checked_pair(real_rows, fake_rows, least=least)
    fake = checked(fake, least=2 * least if replicates else least)
    real, fake, tie = _centred(real, fake)
    chosen = _choices(len(fake), replicates, seed).to(fake.device)
    balls = _nearest(real, real, least, chunk)[0] + tie
    reach = _radii_among(fake, chosen, k, chunk) + tie
    narrow, wide = balls[:, k, None], balls[:, density_k, None]
    inside, count = torch.zeros(len(fake), dtype=torch.bool, device=fake.device), chosen.new_zeros(len(fake)).long()
    recalled, covered = torch.zeros(2, len(chosen), len(real), dtype=torch.bool, device=fake.device)
    for rows, gaps in _distances(real, fake, chunk):
        inside |= (gaps <= narrow[rows]).any(0)
        near = gaps <= wide[rows]
        count += near.sum(0)
        i, j = near.nonzero(as_tuple=True)
        a, b = (gaps <= reach.amax(0)).nonzero(as_tuple=True)
        gap = gaps[a, b]
        for which, mask in enumerate(chosen):
            covered[which, rows][i[mask[j]]] = True
            recalled[which, rows][a[mask[b] & (gap <= reach[which, b])]] = True
    return {
        "precision": _estimate([inside[mask] for mask in chosen]),
        "recall": _estimate(list(recalled)),
        "density": _estimate([count[mask].double() / density_k for mask in chosen]),
        "coverage": _estimate(list(covered)),
    }


def memorised(
    real_rows: Tensor,
    fake_rows: Tensor,
    *,
    factor: float = 0.5,
    heldout_rows: Tensor | None = None,
    replicates: int = 50,
    seed: int = 0,
    chunk: int | None = None,
) -> Estimate:
    """Share of samples closer to a training image than half the distance of that image to the other training images.

    Sample y counts if |y - x| < factor · r(x), where x is its nearest training row and r(x) the distance from x to
    the nearest training row that is not equal to x (duplicates are skipped, ties do not count). ``real_rows [m, d]``
    must be *all* training rows: a copy of a row that is not there is not seen. ``fake_rows [n, d]``.

    ``factor=1`` is 1 - authenticity (Alaa et al. 2022), and fresh data of the same law does not give 0:
    y and x must be each other's nearest neighbour, which has probability 1/(2 - I), I = I_{3/4}((d + 1)/2, 1/2), in d
    dimensions: 2/3, 0.62, 0.59, ... -> 1/2, and less where few rows are the nearest of many. Hence the half. The balls
    |y - x| < r(x)/2 are disjoint, so that x is the nearest row without ambiguity. Each of the m rows has y nearer than
    all other rows with probability 1/m (exchangeability), so that E Σ_x 1[|y - x| < r(x)] = 1 for every law, and balls
    of half the radius hold about 2^-d of that where the law is smooth in d (intrinsic) dimensions.

    Measured on Fashion-MNIST, 64 principal components, m = 60,000, n = 2,000: test images 0.0055 (factor 1: 0.36),
    copies 1, copies with noise of 0.05 of the value range 0.99, blurred test images 0.002.

    Args:
        heldout_rows: real data ``[h, d]`` that was not trained on. The result is then the share minus theirs: 0 for
            fresh data in any dimension.

    Raises:
        DataError: fewer than 2 distinct rows, ``factor`` outside (0, 1], fewer than 4 samples for a spread, different
            dimensions, or features that are not finite.
    """
    if not 0 < factor <= 1:
        raise DataError("The factor of memorisation is a share of a distance", got=factor, want="a number in (0, 1]")
    share = _share(_copies(real_rows, fake_rows, factor, chunk), replicates, seed)
    if heldout_rows is None:
        return share
    fresh = _share(_copies(real_rows, heldout_rows, factor, chunk), replicates, seed)
    return Estimate(share.value - fresh.value, math.hypot(share.spread, fresh.spread))


def nearest(real_rows: Tensor, queries: Tensor, k: int, *, chunk: int | None = None) -> tuple[Tensor, Tensor]:
    """The ``k`` nearest of ``real_rows [m, d]`` to each of ``queries [q, d]``, nearest first.

    Returns:
        Distances, float64 ``[q, k]`` (0 for a copy), and row numbers, int64 ``[q, k]``.

    Raises:
        DataError: fewer than k rows, k < 1, different dimensions, or features that are not finite.
    """
    if k < 1:
        raise DataError("Nearest neighbours need k >= 1", got=k)
    real, fake = checked_pair(real_rows, queries, least=0)
    checked(real, least=k)
    centred, moved, _ = _centred(real, fake)
    index = _nearest(moved, centred, k, chunk)[1]
    exact = _gaps(fake, real, index)
    order = exact.argsort(dim=1, stable=True)
    return exact.gather(1, order), index.gather(1, order)


# ------------------------------------------------------------------------------------------ distances
def _centred(real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor, float]:
    """Both sets around the mean of the reals, and the squared distance below which points count as equal."""
    centre = real.mean(0)
    real, fake = real - centre, fake - centre
    return real, fake, 1e-12 * max(float(x.square().sum(1).max()) if len(x) else 0.0 for x in (real, fake))


def _distances(rows: Tensor, points: Tensor, chunk: int | None) -> Iterator[tuple[slice, Tensor]]:
    """Squared distances in blocks: which rows, and ``[b, points]``, which the receiver may overwrite."""
    row_squares, point_squares = rows.square().sum(1)[:, None], points.square().sum(1)
    size = chunk or max(1, BLOCK // max(len(points), 1))
    for start in range(0, len(rows), size):
        block = slice(start, start + size)
        squares = row_squares[block] + point_squares
        yield block, squares.addmm_(rows[block], points.T, alpha=-2).clamp_min_(0)


def _nearest(rows: Tensor, points: Tensor, count: int, chunk: int | None) -> tuple[Tensor, Tensor]:
    """Squared distances to, and numbers of, the ``count`` nearest points of each row, nearest first ``[n, count]``."""
    values = rows.new_empty(len(rows), count)
    index = torch.empty(len(rows), count, dtype=torch.int64, device=rows.device)
    for block, gaps in _distances(rows, points, chunk):
        values[block], index[block] = gaps.topk(count, largest=False)
    return values, index


def _to_another(rows: Tensor, points: Tensor, tie: float, chunk: int | None) -> Tensor:
    """Distance from each row to the nearest point that is not equal to it ``[b]``; inf where there is none."""
    reach = rows.new_empty(len(rows))
    for block, gaps in _distances(rows, points, chunk):
        reach[block] = gaps.masked_fill_(gaps <= tie, math.inf).amin(1).sqrt()
    return reach


def _gaps(rows: Tensor, points: Tensor, index: Tensor) -> Tensor:
    """|row_i - point_index[i, :]| by subtraction: exactly 0 for a copy. ``[n, k]``."""
    return torch.stack([(rows - points[column]).norm(dim=1) for column in index.T], dim=1)


# -------------------------------------------------------------------------------------------- spreads
def _choices(n: int, replicates: int, seed: int) -> Tensor:
    """Masks ``[1 + replicates, n]``: all rows, then the halves."""
    masks = torch.zeros(1 + replicates, n, dtype=torch.bool)
    masks[0] = True
    for mask, half in zip(masks[1:], half_samples(n, replicates, seed), strict=True):
        mask[half] = True
    return masks


def _radii_among(points: Tensor, chosen: Tensor, k: int, chunk: int | None) -> Tensor:
    """Squared distance from each point to its k-th nearest other chosen point, ``[choices, n]``; -inf off the choice.

    Of each point's neighbours the nearest 16 (k + 1) are kept: that fewer than k + 1 of them are in a random half has a
    probability below 1e-7 (k = 1; 1e-15 at k = 3), and then the farthest one kept stands in.
    """
    gaps, index = _nearest(points, points, min(len(points), 16 * (k + 1)), chunk)
    radii = torch.full(chosen.shape, -math.inf, dtype=gaps.dtype, device=gaps.device)
    for radius, mask in zip(radii, chosen, strict=True):
        place = (mask[index].cumsum(1) <= k).sum(1, keepdim=True).clamp_max(gaps.shape[1] - 1)
        radius[mask] = gaps.gather(1, place)[mask, 0]
    return radii


def _estimate(values: list[Tensor]) -> Estimate:
    """The mean of the first, with the spread of the means of the others."""
    value, *halves = (float(v.double().mean()) for v in values)
    return Estimate(value, spread_of(halves))


# --------------------------------------------------------------------------------------- memorisation
def _copies(real_rows: Tensor, fake_rows: Tensor, factor: float, chunk: int | None) -> Tensor:
    """Which of ``fake_rows`` lie within ``factor`` times the distance of their nearest row to its nearest other."""
    real, fake = checked_pair(real_rows, fake_rows, least=2)
    gap, index = nearest(real, fake, 1, chunk=chunk)
    origins, where = torch.unique(index[:, 0], return_inverse=True)
    centred, _, tie = _centred(real, real[:0])
    reach = _to_another(centred[origins], centred, tie, chunk)
    if bool(reach.isinf().any()):
        raise DataError("All training rows are the same: there is no distance between them", got=f"{len(real)} rows")
    return gap[:, 0] < factor * reach[where] * (1 - 1e-9)


def _share(hits: Tensor, replicates: int, seed: int) -> Estimate:
    halves = half_samples(len(hits), replicates, seed)
    return _estimate([hits, *(hits[half.to(hits.device)] for half in halves)])
