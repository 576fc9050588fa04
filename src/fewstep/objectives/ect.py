"""Easy Consistency Tuning (Geng et al., arXiv 2406.14548; math.md 2.3 to 2.6, 8.2)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from fewstep.denoiser import Denoiser
from fewstep.objectives.adaptive import Adaptive
from fewstep.objectives.base import ALONE, Beside
from fewstep.objectives.bridges import DataBridge, DataRay
from fewstep.objectives.levers import NO_LEVERS, Levers
from fewstep.objectives.pairs import Pair
from fewstep.objectives.two_point import Tightening
from fewstep.penalty import Penalty
from fewstep.randomness import DropoutTape
from fewstep.times import Law, Lognormal, Mapping, Schedule, Sigmoid, Stages
from fewstep.types import PerSample, Progress


@dataclass(frozen=True)
class ECT(Tightening):
    """``w(t, r) rho(f(x_0 + t eps, t) - sg f(x_0 + r eps, r))`` with ``r = max(t (1 - n(t)/q^a), 0)`` (eq. 2.5, 2.8).

    Student and target see the same noise and the same dropout mask; the target is the current network
    without gradient; rows with r = 0 take x_0 and never enter the network.

    Args:
        law: law of t.
        mapping: n(t), constant or sigmoid.
        schedule: q^a as a function of the images seen.
        penalty: distance and weight.
        bridge: how x_t is carried to x_r; the data's own noise ray, as published, or a variance-reduced one.
        adaptive: moves r so that all pairs err about equally; None keeps the mapping's (experimental).
        levers: additions that are not part of the paper.
    """

    law: Law = field(default_factory=Lognormal)
    mapping: Mapping = field(default_factory=Sigmoid)
    schedule: Schedule = field(default_factory=Stages)
    penalty: Penalty = field(default_factory=Penalty)
    bridge: DataBridge = field(default_factory=DataRay)
    adaptive: Adaptive | None = None
    levers: Levers = NO_LEVERS
    kind: ClassVar[str] = "ect"

    @property
    def needs_teacher(self) -> bool:
        return super().needs_teacher or self.adaptive is not None

    @property
    def compiles(self) -> bool:
        return super().compiles and self.adaptive is None  # which would see the rows that fill up the target pass

    def tightness(self, progress: Progress) -> float | None:
        return None if self.adaptive is not None else super().tightness(progress)

    def loss_between(
        self, student: Denoiser, both: Pair, tape: DropoutTape | None = None, beside: Beside = ALONE
    ) -> PerSample:
        """The loss once the times are known, all on the device; ``torch.compile`` makes one graph of it."""
        if self.adaptive is not None:
            both = self.adaptive(both, beside.teacher)
        return self.gap_loss(student, student, both, tape, beside)
