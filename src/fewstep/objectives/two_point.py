"""What objectives made of a student at t and a target at r have in common: a bridge, a penalty and levers."""

from __future__ import annotations

from torch import nn

from fewstep.denoiser import Denoiser
from fewstep.objectives.base import Beside, Objective
from fewstep.objectives.bridges import DataRay
from fewstep.objectives.levers import Levers
from fewstep.objectives.pairs import Bridge, Pair, predictions
from fewstep.penalty import Penalty
from fewstep.randomness import DropoutTape
from fewstep.types import PerSample


class TwoPoint(Objective):
    """``w(t, r) rho(f(x_t, t) - sg f(x_r, r))``; the subclass says who the target is and where t and r come from."""

    penalty: Penalty
    bridge: Bridge = DataRay()
    levers: Levers

    @property
    def needs_teacher(self) -> bool:
        return self.bridge.needs_teacher or self.levers.needs_teacher

    @property
    def features(self) -> str | None:
        return self.levers.features

    def extra(self, student: Denoiser) -> nn.Module | None:
        return self.levers.extra(student)

    def gap_loss(
        self, student: Denoiser, target: Denoiser, both: Pair, tape: DropoutTape | None, beside: Beside
    ) -> PerSample:
        """The loss once the times are known, all on the device, ``[b]``."""
        out, goal = predictions(student, target, both, self.bridge, tape, beside)
        return self.levers.penalise(self.penalty, student, both, out, goal, beside)
