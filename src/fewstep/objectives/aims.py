"""Aims: the x_0-like points that straight jumps make for, and the target that two jumps in a row make (math.md 3.5).

A jump t -> r with aim A lands on ``x_r = A + (r/t) (x_t - A)``; every step has an aim, ``inv_ddim(x_r, x_t, t, r)``.
Computed directly, as here, it loses nothing when the gap t - r is small.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor

from fewstep.denoiser import Denoiser
from fewstep.errors import ConfigError
from fewstep.guidance import Guided
from fewstep.jumps import Model, ddim
from fewstep.objectives.base import AS_IT_IS, Execution, to_device
from fewstep.objectives.bridges import require_teacher
from fewstep.objectives.pairs import Pair, rows_where, target_pass
from fewstep.process import expand
from fewstep.randomness import DropoutTape
from fewstep.segments import Clocks
from fewstep.types import Condition, PerSample, Samples, Times


@dataclass(frozen=True)
class Triple:
    """A batch at ``t`` and ``r`` that is to land at ``s``, on the device.

    Args:
        pair: data, noise, ``t``, ``r``, ``gap = t - r``; its ``rows`` are those with r > s, which have a target.
        s: landing time ``[b]``.
        share: the target's share of the student's aim ``[b]`` (:attr:`fewstep.segments.Clocks.share`).
        clean_gap: ``(t - r)/(1 - s/t)``, ``[b]``.
    """

    pair: Pair
    s: Times
    share: Tensor
    clean_gap: Times


def place(
    x_0: Samples, eps: Samples, clocks: Clocks, cond: Condition | None = None, execute: Execution = AS_IT_IS
) -> Triple:
    """Host times on the device; which rows have a target is decided here, without asking the device."""
    rows = rows_where(clocks.r > clocks.s, x_0, execute)
    host = (clocks.t, clocks.r, clocks.gap, clocks.s, clocks.share, clocks.clean_gap)
    t, r, gap, s, share, clean_gap = (to_device(v, x_0) for v in host)
    return Triple(Pair(x_0, eps, t, r, gap, rows, cond), s, share, clean_gap)


# --------------------------------------------------------------------------------- from t to r
@dataclass(frozen=True)
class Ray:
    """The data's own noise ray, ``x_r = x_0 + r eps``: aim x_0."""

    kind: ClassVar[str] = "data"
    needs_teacher: ClassVar[bool] = False

    def __call__(self, both: Pair, x_t: Samples, teacher: Denoiser | None) -> tuple[Samples, Samples]:
        """``(aim, x_r)``, each ``[b, ...]``."""
        return both.x_0, both.x_0 + _wide(both.r, x_t) * both.eps


@dataclass(frozen=True)
class Heun:
    """A Heun step of the teacher's ODE: aim ``D + t/(2 r) (D' - D)``, and D where r = 0 (math.md 3.3).

    Args:
        guidance: classifier-free guidance of the teacher, for class-conditional ones; 1 is none.
    """

    guidance: float = 1.0
    kind: ClassVar[str] = "heun"
    needs_teacher: ClassVar[bool] = True

    def __call__(self, both: Pair, x_t: Samples, teacher: Denoiser | None) -> tuple[Samples, Samples]:
        """``(aim, x_r)``, each ``[b, ...]``; two evaluations of the teacher."""
        model: Model = guided(require_teacher(teacher), self.guidance)
        first = model(x_t, both.t, both.cond)
        inside = both.r > 0
        level = torch.where(inside, both.r, both.t)  # where r = 0 the second evaluation is not used
        there = torch.where(expand(inside, x_t), ddim(first, x_t, both.t, both.r), x_t)
        turn = torch.where(inside, both.t / (2 * level), 0)
        aim = first + _wide(turn, x_t) * (model(there, level, both.cond) - first)
        return aim, ddim(aim, x_t, both.t, both.r)


@dataclass(frozen=True)
class AdjustedDDIM:
    """aDDIM of the teacher with ``V = eta |D - x_0|^2/d`` (arXiv 2403.06807, eq. 12 to 14; math.md eq. 3.1).

    Its aim is ``D + (1 - r/t) v/(k + r/t) (x_t - D)`` with ``v = eta |D - x_0|^2/|x_t - D|^2`` and
    ``k^2 = (r/t)^2 + (1 - r/t)^2 v``; eta = 0 is plain DDIM, an Euler step.

    Args:
        eta: share of the squared error that counts as posterior variance.
        guidance: as for :class:`Heun`; V is that of the teacher without guidance.
    """

    eta: float = 0.75
    guidance: float = 1.0
    kind: ClassVar[str] = "addim"
    needs_teacher: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.eta < 0:
            raise ConfigError("The eta of aDDIM is negative", got=self.eta, want="eta >= 0")

    def __call__(self, both: Pair, x_t: Samples, teacher: Denoiser | None) -> tuple[Samples, Samples]:
        """``(aim, x_r)``, each ``[b, ...]``; one evaluation of the teacher, two more with guidance."""
        model = require_teacher(teacher)
        plain = model(x_t, both.t, both.cond)
        clean = plain if self.guidance == 1 else guided(model, self.guidance)(x_t, both.t, both.cond)
        offset = x_t - clean
        tiny = torch.finfo(offset.dtype).tiny
        lacking = self.eta * _square(plain - both.x_0) / _square(offset).clamp_min(tiny)
        kept, way = both.r / both.t, both.gap / both.t
        norm = (kept**2 + way**2 * lacking).sqrt() + kept
        aim = clean + _wide(way * lacking / norm.clamp_min(tiny), x_t) * offset
        return aim, ddim(aim, x_t, both.t, both.r)


Leg: TypeAlias = Ray | Heun | AdjustedDDIM
"""How x_t is carried to x_r."""


def guided(teacher: Denoiser, guidance: float) -> Denoiser | Guided:
    """The teacher, guided where ``guidance`` is not 1."""
    return teacher if guidance == 1 else Guided(teacher, guidance)


# --------------------------------------------------------------------------------- from r on to s
def target_aim(
    target: Denoiser,
    all_three: Triple,
    aim: Samples,
    x_r: Samples,
    tape: DropoutTape | None,
    two_time: bool,
) -> Samples:
    """Where a jump t -> s must aim to land where the target lands from x_r, ``[b, ...]``.

    ``inv_ddim(ddim(g, x_r, r, s), x_t, t, s) = (1 - a) aim + a g`` with g the target's output at x_r and
    ``a = t (r - s)/(r (t - s))``: x_t itself drops out. Where r = s it is ``aim``, and where s = 0 it is g.
    """
    both = all_three.pair
    g = target_pass(target, x_r, both.r, both.rows, both.cond, tape, all_three.s if two_time else None)
    return torch.lerp(aim, g, _wide(all_three.share, aim).expand_as(aim))


def _wide(times: Times, like: Samples) -> Tensor:
    return expand(times, like).to(like.dtype)


def _square(x: Samples) -> PerSample:
    return x.flatten(1).square().sum(1)
