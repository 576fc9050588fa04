"""Adaptive choice of r: steps of equal local error (after ADCM, arXiv 2510.17266; experimental)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from fewstep.denoiser import Denoiser
from fewstep.errors import ConfigError
from fewstep.jumps import ddim
from fewstep.objectives.bridges import require_teacher
from fewstep.objectives.pairs import Pair
from fewstep.types import Condition, PerSample, Samples, Times

PROBE = 1 / 8
"""Step in ln t over which the teacher's curvature is measured: far enough for float32, near enough to be local."""

LEAST = 1e-6
"""Changes of D smaller than this times sigma_d per dimension, and r below this times t, are rounding."""


@dataclass(frozen=True)
class Adaptive:
    """``r' = t (r/t)^k``, ``k`` per row, so that every pair errs equally much (experimental).

    With ``h = ln(t/r)`` the schedule's step, the row's error is that of one Euler step of the teacher's ODE from t to
    r, carried on to time 0 as on data N(0, sigma_d^2)::

        e = h^2/2 |dD/d ln t| / sqrt(1 + t^2/sigma_d^2),      dD/d ln t along the ODE, by a difference over 1/8 in ln t

    Since e grows as h^2, ``k = sqrt(e_mean/e)`` makes all errors equal; e_mean is the geometric mean of the batch's
    rows with r > 0. ln k is clamped to +-ln(limit) and then centred, so that the geometric mean of ln(t/r) stays
    exactly the schedule's. On N(0, sigma_d^2) equal e means an equal share of ECT's fixed-point error (math.md eq.
    7.4) for every pair, which for a given number of steps is the least sum. Rows with r = 0 stay.

    k depends on x_t but not on which (x_0, eps) made it: the data's ray stays unbiased given x_t (math.md 2.1). It
    does depend on the other rows of the micro-batch (G6 exempt), hence on micro-batches and the number of processes.
    Costs two evaluations of the teacher on the rows with r > 0.

    ADCM itself minimises ``|f(x_t) - f(x_r)|^2 + lambda |f(x_r) - x_0|^2`` over the step by one Gauss-Newton iteration
    with the student's JVP, once in 25000 iterations, along a chain from T to 0, and weighs losses by the inverse of
    their denoising error. Here there are no chain, no JVP, no denoising term and no new weight: the schedule keeps the
    mean step, and the teacher distributes it over t.

    Args:
        limit: bound of k about its mean before centring, > 1.
    """

    limit: float = 4.0

    def __post_init__(self) -> None:
        if not self.limit > 1:
            raise ConfigError("The limit of adaptive steps leaves them nothing to adapt", got=self.limit, want="> 1")

    @torch.no_grad()
    def __call__(self, both: Pair, teacher: Denoiser | None) -> Pair:
        """The pair with another r on its rows with r > 0; always ``0 < r' < t`` there."""
        model, rows = require_teacher(teacher), both.rows
        if len(rows) == 0:
            return both
        t, r, gap = both.t[rows], both.r[rows], both.gap[rows]
        cond = None if both.cond is None else both.cond[rows]
        step = torch.where(gap < t / 2, -torch.log1p(-gap / t), (t / r).log())
        log_k = self.log_factor(step, curvature(model, both.x_t[rows], t, cond), t, model.sigma_data)
        longest = (t / (LEAST * t).clamp_min(model.sigma_min)).log()
        step = torch.minimum(step * log_k.exp(), torch.maximum(step, longest))
        r, gap = t * (-step).exp(), -t * torch.expm1(-step)
        return replace(both, r=both.r.index_copy(0, rows, r), gap=both.gap.index_copy(0, rows, gap))

    def log_factor(self, step: Times, change: PerSample, t: Times, sigma_data: float) -> PerSample:
        """``ln k [b]``, of mean 0, from steps ``ln(t/r)`` and ``|dD/d ln t|``, both ``[b]``."""
        log_error = 2 * step.log() + change.log() - 0.5 * torch.log1p((t / sigma_data) ** 2)
        bound = math.log(self.limit)
        log_k = (-0.5 * (log_error - log_error.mean())).clamp(-bound, bound)
        return log_k - log_k.mean()


def curvature(teacher: Denoiser, x_t: Samples, t: Times, cond: Condition | None) -> PerSample:
    """``|dD/d ln t|`` along the teacher's ODE, ``[b]``, not below ``LEAST sigma_d sqrt(d)/PROBE``; two evaluations.

    ``dD/dt = -t d^2x/dt^2``: where the trajectory is straight D is constant, so this is its curvature.
    """
    near = (t * math.exp(-PROBE)).clamp_min(teacher.sigma_min)
    with torch.autocast(x_t.device.type, enabled=False):  # the change is below bf16's rounding at small t
        here = teacher(x_t, t, cond)
        there = teacher(ddim(here, x_t, t, near), near, cond)
    least = LEAST * teacher.sigma_data * math.sqrt(x_t[0].numel())
    change = (here - there).to(t.dtype).flatten(1).norm(dim=1).clamp_min(least)
    return change / (t / near).log().clamp_min(LEAST)
