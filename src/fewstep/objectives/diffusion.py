"""Denoising score matching with EDM's weighting: how teachers are pretrained."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from fewstep.denoiser import Denoiser
from fewstep.objectives.base import ALONE, Beside, LossOutput, Objective, StepRandom, to_device
from fewstep.objectives.pairs import draw_times, network_pass
from fewstep.penalty import Penalty
from fewstep.randomness import DropoutTape
from fewstep.times import Law, Lognormal
from fewstep.types import Batch, Condition, PerSample, Progress, Samples, Times


@dataclass(frozen=True)
class Diffusion(Objective):
    """``w(t) |D(x_0 + t eps, t) - x_0|^2``, ``w = 1/t^2 + 1/sigma_d^2`` (EDM eq. 2, table 1; math.md 1.3).

    Args:
        law: law of t; EDM's is lognormal(-1.2, 1.2).
        penalty: squared L2 with weight "snrpk" is EDM's.
    """

    law: Law = field(default_factory=lambda: Lognormal(-1.2, 1.2))
    penalty: Penalty = field(default_factory=lambda: Penalty("squared_l2", "snrpk"))
    kind: ClassVar[str] = "diffusion"

    def loss(
        self, student: Denoiser, batch: Batch, progress: Progress, random: StepRandom, beside: Beside = ALONE
    ) -> LossOutput:
        """Loss per sample ``[b]``; ``student`` under the EDM clock, in training mode."""
        t = draw_times(self.law, student, random)
        eps = random.normal("noise", batch.x)
        return LossOutput(self.loss_at(student, batch.x, t, eps, batch.cond, random.tape(), beside))

    def loss_at(
        self,
        student: Denoiser,
        x_0: Samples,
        t: Times,
        eps: Samples,
        cond: Condition | None = None,
        tape: DropoutTape | None = None,
        beside: Beside = ALONE,
    ) -> PerSample:
        """The loss at explicit times ``t [b]`` and noise ``eps [b, ...]``."""
        return beside.execute(self.loss_between, student, x_0, to_device(t, x_0), eps, cond, tape)

    def loss_between(
        self,
        student: Denoiser,
        x_0: Samples,
        t: Times,
        eps: Samples,
        cond: Condition | None = None,
        tape: DropoutTape | None = None,
    ) -> PerSample:
        """The loss once the times are on the device."""
        x_t = student.process.perturb(x_0, eps, t.to(x_0.dtype))
        out = network_pass(student, x_t, t, cond, tape and tape.record())
        return self.penalty(out - x_0, t, t, student.sigma_data)

    @property
    def compiles(self) -> bool:
        return True

    def tightness(self, progress: Progress) -> float | None:
        return 1.0
