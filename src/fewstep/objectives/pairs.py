"""The step that most objectives share: a student at t, a target at r, both landing at time 0."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fewstep.denoiser import Denoiser
from fewstep.objectives.base import AS_IT_IS, Beside, Execution, StepRandom, to_device
from fewstep.process import expand
from fewstep.randomness import DropoutTape
from fewstep.times import Law, draw
from fewstep.types import Condition, Samples, Times


@dataclass(frozen=True)
class Pair:
    """A batch at two times, on the device; ``x_t = x_0 + t eps``.

    Args:
        x_0, eps: data and noise ``[b, ...]``; cond: labels or None.
        t, r, gap: ``[b]``, with ``gap = t - r`` computed without cancellation.
        rows: which rows enter the network a second time, int64: those with r > 0, and perhaps a few others.
        low: which rows have a low t, int64, for :class:`fewstep.objectives.anchor.Anchor`; None if nobody asked.
        guidance: strengths w ``[b]`` that bridge, student and target are told; None where they are told none.
    """

    x_0: Samples
    eps: Samples
    t: Times
    r: Times
    gap: Times
    rows: Tensor
    cond: Condition | None = None
    low: Tensor | None = None
    guidance: Times | None = None

    @property
    def x_t(self) -> Samples:
        """``x_0 + t eps``."""
        return self.x_0 + expand(self.t, self.x_0).to(self.x_0.dtype) * self.eps


class Bridge(Protocol):
    """How x_t is carried to the cleaner time r."""

    def __call__(self, both: Pair, x_t: Samples, teacher: Denoiser | None) -> Samples:
        """``x_r [b, ...]``; where r = 0 it is the target itself."""
        ...

    @property
    def needs_teacher(self) -> bool:
        """Whether it follows a teacher."""
        ...


def draw_times(law: Law, student: Denoiser, random: StepRandom, stream: str = "times") -> Times:
    """Times of the law on the host, float64 ``[b]``, within what the student's network knows."""
    return draw(law, random.uniform(stream), student.sigma_min, highest(student))


def highest(student: Denoiser) -> float:
    """The largest time to train at: sigma_max where the network's clock has ends, else no bound."""
    return student.sigma_max if student.sigma_min > 0 else float("inf")


def make_pair(
    x_0: Samples,
    eps: Samples,
    t: Times,
    r: Times,
    gap: Times,
    cond: Condition | None = None,
    low: float | None = None,
    guidance: Times | None = None,
    execute: Execution = AS_IT_IS,
) -> Pair:
    """The pair of host times ``t, r, gap [b]``, and of host strengths of guidance.

    Which rows have r = 0, and which have t < ``low``, is decided here, without asking the device.
    """
    rows = rows_where(r > 0, x_0, execute)
    lowest = None if low is None else rows_where(t < low, x_0)
    t, r, gap = (to_device(v, x_0) for v in (t, r, gap))
    return Pair(x_0, eps, t, r, gap, rows, cond, lowest, None if guidance is None else to_device(guidance, x_0))


def rows_where(mask: Tensor, like: Tensor, execute: Execution = AS_IT_IS) -> Tensor:
    """Indices of the true rows of a host ``mask [b]``, int64, on the device of ``like``.

    Where ``execute`` wants more rows than that, the first false ones follow.
    """
    flags = mask.numpy()
    chosen = np.argsort(~flags, kind="stable")[: execute.rows(int(flags.sum()), len(flags))]
    return torch.from_numpy(np.ascontiguousarray(chosen)).to(like.device, non_blocking=True)


def predictions(
    student: Denoiser, target: Denoiser, both: Pair, bridge: Bridge, tape: DropoutTape | None, beside: Beside
) -> tuple[Samples, Samples]:
    """``f(x_t, t)`` of the student and ``sg f(x_r, r)`` of the target, each ``[b, ...]``.

    Both passes share the dropout masks of ``tape``. The bridge carries x_t to x_r; where r = 0 that is the target.
    """
    x_t = both.x_t
    out = network_pass(student, x_t, both.t, both.cond, tape and tape.record(), guidance=both.guidance)
    with torch.no_grad():
        x_r = bridge(both, x_t, beside.teacher)
        return out, target_pass(target, x_r, both.r, both.rows, both.cond, tape, guidance=both.guidance)


@torch.no_grad()
def target_pass(
    target: Denoiser,
    x_r: Samples,
    r: Times,
    rows: Tensor,
    cond: Condition | None,
    tape: DropoutTape | None,
    s: Times | None = None,
    guidance: Times | None = None,
) -> Samples:
    """``sg f(x_r, r)`` on those of ``rows`` (int64) that have r > 0, ``x_r`` elsewhere."""
    if len(rows) == 0:
        return x_r
    noisy = expand(r > 0, x_r)
    if len(rows) == len(x_r):
        return torch.where(noisy, network_pass(target, x_r, r, cond, tape and tape.replay(), s, guidance), x_r)
    cond, s, guidance = (None if v is None else v[rows] for v in (cond, s, guidance))
    out = network_pass(target, x_r[rows], r[rows], cond, tape and tape.replay(rows), s, guidance)
    return torch.where(noisy, x_r.index_copy(0, rows, out), x_r)


def network_pass(
    network: Denoiser,
    x_t: Samples,
    t: Times,
    cond: Condition | None,
    tape: DropoutTape | None,
    s: Times | None = None,
    guidance: Times | None = None,
) -> Samples:
    """``f(x_t, t)``, or ``g(x_t, t, s)``, of a network told w or not, with the dropout masks of an open ``tape``."""
    if tape is None:
        return network(x_t, t, cond, s, guidance)
    with tape:
        return network(x_t, t, cond, s, guidance)
