"""Easy Consistency Distillation: ECT's schedule along the teacher's ODE (math.md 3.4, 8.1)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from fewstep.denoiser import Denoiser
from fewstep.objectives.base import ALONE, Beside, LossOutput, StepRandom
from fewstep.objectives.bridges import TeacherStep
from fewstep.objectives.levers import NO_LEVERS, Levers, plus
from fewstep.objectives.pairs import draw_times, make_pair
from fewstep.objectives.two_point import TwoPoint
from fewstep.penalty import Penalty
from fewstep.randomness import DropoutTape
from fewstep.times import Law, Lognormal, Mapping, Schedule, Sigmoid, Stages, pair
from fewstep.types import Batch, PerSample, Progress, Samples


@dataclass(frozen=True)
class ECD(TwoPoint):
    """``w(t, r) rho(f(x_0 + t eps, t) - sg f(x_r, r))``, x_r one step of the teacher's ODE, ``r = m(t)`` as in ECT.

    Where r = 0 the student regresses onto the teacher's denoiser. Unlike ECT's, the loss can reach 0.

    Args:
        law: law of t.
        mapping: n(t), constant or sigmoid.
        schedule: q^a as a function of the images seen. Heun's step is worse than Euler's while r/t is small (at q^a = 2
            the std is 1.3 times too large on a Gaussian, math.md 7.2), so this starts at 4.
        penalty: distance and weight.
        bridge: the teacher's step.
        levers: further additions.
    """

    law: Law = field(default_factory=Lognormal)
    mapping: Mapping = field(default_factory=Sigmoid)
    schedule: Schedule = field(default_factory=lambda: Stages(first=1))
    penalty: Penalty = field(default_factory=Penalty)
    bridge: TeacherStep = field(default_factory=TeacherStep)
    levers: Levers = NO_LEVERS
    kind: ClassVar[str] = "ecd"

    def loss(
        self, student: Denoiser, batch: Batch, progress: Progress, random: StepRandom, beside: Beside = ALONE
    ) -> LossOutput:
        """Loss per sample ``[b]``; ``student`` under the EDM clock, in training mode."""
        t = draw_times(self.law, student, random)
        eps, cost = self.levers.noise(batch, random, beside)
        ratio = self.schedule.ratio(progress)
        return LossOutput(plus(self.loss_at(student, batch.x, t, eps, ratio, batch.cond, random.tape(), beside), cost))

    def loss_at(
        self,
        student: Denoiser,
        x_0: Samples,
        t: Tensor,
        eps: Samples,
        ratio: float,
        cond: Tensor | None = None,
        tape: DropoutTape | None = None,
        beside: Beside = ALONE,
    ) -> PerSample:
        """The loss at explicit host times ``t [b]``, noise ``eps [b, ...]`` and ``ratio = q^a``."""
        r, gap = pair(self.mapping, t.double(), ratio, student.sigma_min)
        return self.gap_loss(student, student, make_pair(x_0, eps, t, r, gap, cond, self.levers.low), tape, beside)

    def describe(self, progress: Progress) -> dict[str, float]:
        """Stage and the typical r/t (at large t, where n(t) = 1)."""
        ratio = self.schedule.ratio(progress)
        return {"stage": float(self.schedule.stage(progress)), "r/t": 1 - 1 / ratio}
