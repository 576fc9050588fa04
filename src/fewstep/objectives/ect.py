"""Easy Consistency Tuning (Geng et al., arXiv 2406.14548; math.md 2.3 to 2.6, 8.2)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from fewstep.denoiser import Denoiser
from fewstep.objectives.base import LossOutput, StepRandom, to_device
from fewstep.penalty import Penalty
from fewstep.process import expand
from fewstep.randomness import DropoutTape
from fewstep.times import Law, Lognormal, Mapping, Schedule, Sigmoid, Stages, draw, pair
from fewstep.types import Batch, PerSample, Progress, Samples


@dataclass(frozen=True)
class ECT:
    """``w(t, r) rho(f(x_0 + t eps, t) - sg f(x_0 + r eps, r))`` with ``r = max(t (1 - n(t)/q^a), 0)`` (eq. 2.5, 2.8).

    Student and target see the same noise and the same dropout mask; the target is the current network
    without gradient; rows with r = 0 take x_0 and never enter the network.

    Args:
        law: law of t.
        mapping: n(t), constant or sigmoid.
        schedule: q^a as a function of the images seen.
        penalty: distance and weight.
    """

    law: Law = field(default_factory=Lognormal)
    mapping: Mapping = field(default_factory=Sigmoid)
    schedule: Schedule = field(default_factory=Stages)
    penalty: Penalty = field(default_factory=Penalty)
    kind: ClassVar[str] = "ect"

    def loss(self, student: Denoiser, batch: Batch, progress: Progress, random: StepRandom) -> LossOutput:
        """Loss per sample ``[b]``; ``student`` under the EDM clock, in training mode."""
        high = student.sigma_max if student.sigma_min > 0 else float("inf")
        t = draw(self.law, random.uniform("times"), student.sigma_min, high)
        eps = random.normal("noise", batch.x)
        ratio = self.schedule.ratio(progress)
        per_sample = self.loss_at(student, batch.x, t, eps, ratio, batch.cond, random.tape())
        return LossOutput(per_sample)

    def loss_at(
        self,
        student: Denoiser,
        x_0: Samples,
        t: Tensor,
        eps: Samples,
        ratio: float,
        cond: Tensor | None = None,
        tape: DropoutTape | None = None,
    ) -> PerSample:
        """The loss at explicit times, noise and ``ratio = q^a``.

        Args:
            student: denoiser under the EDM clock.
            x_0: data ``[b, ...]``; eps: noise of the same shape.
            t: times ``[b]`` on the host: which rows have r = 0 is decided there, without asking the device.
            tape: shares dropout masks between the two passes; None if the network has no dropout.
        """
        r, gap = pair(self.mapping, t.double(), ratio, student.sigma_min)
        rows = torch.from_numpy(r.numpy().nonzero()[0])
        t, r, gap = (to_device(v, x_0) for v in (t, r, gap))
        return self.loss_between(student, x_0, eps, t, r, gap, rows.to(x_0.device, non_blocking=True), cond, tape)

    def loss_between(
        self,
        student: Denoiser,
        x_0: Samples,
        eps: Samples,
        t: Tensor,
        r: Tensor,
        gap: Tensor,
        rows: Tensor,
        cond: Tensor | None = None,
        tape: DropoutTape | None = None,
    ) -> PerSample:
        """The loss once the times are known, all on the device; ``torch.compile`` makes one graph of it.

        Args:
            t, r, gap: ``[b]``, with ``gap = t - r``.
            rows: which rows have r > 0, int64; only they enter the network a second time.
        """
        student_out = _pass(student, x_0, eps, t, cond, tape and tape.record())
        target = target_of(student, x_0, eps, r, rows, cond, tape)
        return self.penalty(student_out - target, t, gap, student.sigma_data)

    def describe(self, progress: Progress) -> dict[str, float]:
        """Stage and the typical r/t (at large t, where n(t) = 1)."""
        ratio = self.schedule.ratio(progress)
        return {"stage": float(self.schedule.stage(progress)), "r/t": 1 - 1 / ratio}


@torch.no_grad()
def target_of(
    student: Denoiser,
    x_0: Samples,
    eps: Samples,
    r: Tensor,
    rows: Tensor,
    cond: Tensor | None,
    tape: DropoutTape | None,
) -> Samples:
    """``sg f(x_0 + r eps, r)`` on ``rows`` (those with r > 0, int64), x_0 elsewhere."""
    if len(rows) == 0:
        return x_0
    if len(rows) == len(x_0):
        return _pass(student, x_0, eps, r, cond, tape and tape.replay())
    some_cond = None if cond is None else cond[rows]
    out = _pass(student, x_0[rows], eps[rows], r[rows], some_cond, tape and tape.replay(rows))
    return x_0.index_copy(0, rows, out)


def _pass(
    student: Denoiser, x_0: Samples, eps: Samples, t: Tensor, cond: Tensor | None, tape: DropoutTape | None
) -> Samples:
    x_t = x_0 + expand(t, x_0).to(x_0.dtype) * eps
    if tape is None:
        return student(x_t, t, cond)
    with tape:
        return student(x_t, t, cond)
