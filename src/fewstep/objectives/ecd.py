"""Easy Consistency Distillation: ECT's schedule along the teacher's ODE (math.md 3.4, 8.1)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from fewstep.objectives.bridges import TeacherStep
from fewstep.objectives.levers import NO_LEVERS, Levers
from fewstep.objectives.two_point import Tightening
from fewstep.penalty import Penalty
from fewstep.times import Law, Lognormal, Mapping, Schedule, Sigmoid, Stages


@dataclass(frozen=True)
class ECD(Tightening):
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
