"""Jumps from one noise level to another: along a straight line through an estimate of x_0, or along the teacher's ODE.

Everything is in EDM coordinates, ``x_t = x_0 + t eps``. A network with output g, x_0-like, that is told (or knows)
where it lands and its landing point x_s are two names for the same thing: ``x_s = ddim(g, x_t, t, s)`` and
``g = inv_ddim(x_s, x_t, t, s)`` (math.md 3.5). Times are floats or ``[b]``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fewstep.process import expand
from fewstep.types import Condition, PerSample, Samples, Times

Model = Callable[[Samples, Times, Condition | None], Samples]
"""A denoiser ``D(x_t, t, cond)`` in EDM coordinates."""


def ddim(x_0: Samples, x_t: Samples, t: Times | float, s: Times | float) -> Samples:
    """``x_s = x_0 + (s/t) (x_t - x_0)``, ``[b, ...]``; x_0 itself where s = 0 (DDIM, arXiv 2010.02502; math.md 3.5)."""
    return x_0 + _broadcast(s / t, x_t) * (x_t - x_0)


def inv_ddim(x_s: Samples, x_t: Samples, t: Times | float, s: Times | float) -> Samples:
    """``x_0 = (t x_s - s x_t)/(t - s)``, ``[b, ...]``: where a straight jump must aim to land on x_s; needs s < t.

    Multistep Consistency Models (arXiv 2403.06807), algorithm 1; math.md 3.5.
    """
    return x_s + _broadcast(s / (t - s), x_t) * (x_s - x_t)


def addim(x_0: Samples, x_t: Samples, t: Times, s: Times, variance: PerSample) -> Samples:
    """Adjusted DDIM: :func:`ddim` with the norm that the posterior mean lacks given back, ``[b, ...]``; no gradients.

    ``x_s = x_0 + sqrt(s^2 + (1 - s/t)^2 d V/|eps|^2) eps``, ``eps = (x_t - x_0)/t`` (arXiv 2403.06807, eq. 12 to 14;
    math.md eq. 3.1). The norm is each sample's own.

    Args:
        variance: V, posterior variance of x_0 per dimension, ``[b]``; 0 is plain DDIM.
    """
    ratio = s / t
    offset = x_t - x_0
    square = offset.flatten(1).square().sum(1).clamp_min(torch.finfo(x_t.dtype).tiny)
    lacking = (1 - ratio) ** 2 * variance * offset[0].numel() / square
    return x_0 + _broadcast((ratio**2 + lacking).sqrt(), x_t) * offset


def euler_step(model: Model, x_t: Samples, t: Times, r: Times, cond: Condition | None = None) -> Samples:
    """One Euler step of ``dx/dt = (x - D)/t`` from t to r, ``[b, ...]``; D itself where r = 0 (math.md 3.4)."""
    x_t = _wide(x_t)
    return ddim(model(x_t, t, cond), x_t, t, r)


def heun_step(model: Model, x_t: Samples, t: Times, r: Times, cond: Condition | None = None) -> Samples:
    """One Heun step of ``dx/dt = (x - D)/t`` from t to r, ``[b, ...]`` (math.md 3.3); second order, two evaluations.

    Where r = 0 it is the Euler step D, as in EDM's last step: there the second evaluation is made at (x_t, t) instead
    and not used, so that no network ever sees r = 0 and the device is not asked which rows these are.
    """
    x_t = _wide(x_t)
    slope = (x_t - model(x_t, t, cond)) / _broadcast(t, x_t)
    euler = x_t + _broadcast(r - t, x_t) * slope
    inside = expand(r, x_t) > 0
    there, level = torch.where(inside, euler, x_t), torch.where(r > 0, r, t)
    second = (there - model(there, level, cond)) / _broadcast(level, x_t)
    return torch.where(inside, x_t + _broadcast(r - t, x_t) * (slope + second) / 2, euler)


def _broadcast(factor: Tensor | float, like: Samples) -> Tensor | float:
    return expand(factor, like).to(like.dtype) if isinstance(factor, Tensor) else factor


def _wide(x: Samples) -> Samples:
    """At least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
