"""Improved Consistency Training (Song and Dhariwal, arXiv 2310.14189; math.md 3.2, 8.1)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from fewstep.denoiser import Denoiser
from fewstep.grids import Doubling, Karras, lognormal_shares, neighbours, places
from fewstep.objectives.base import ALONE, Beside, LossOutput, StepRandom
from fewstep.objectives.bridges import DataBridge, DataRay
from fewstep.objectives.levers import NO_LEVERS, Levers, plus
from fewstep.objectives.pairs import make_pair
from fewstep.objectives.two_point import TwoPoint
from fewstep.penalty import Penalty
from fewstep.randomness import DropoutTape
from fewstep.times import Lognormal
from fewstep.types import Batch, PerSample, Progress, Samples


@dataclass(frozen=True)
class ICT(TwoPoint):
    """``(sqrt(|d|^2 + c^2) - c)/(t - r)``, ``d = f(x_0 + t eps, t) - sg f(x_0 + r eps, r)``, on neighbours r < t.

    The target is the student itself without gradient; ``c = 0.00054 sqrt(dimensions)``. The pair is drawn by a
    lognormal law of t, made discrete; the lowest node counts as clean: there r = 0 (``fewstep.grids``).

    Args:
        law: lognormal law of t.
        schedule: N(k), nodes of the grid, doubling in equal blocks.
        grid: where they are.
        penalty: distance and weight.
        bridge: how x_t is carried to x_r; the data's own noise ray, as published.
        levers: additions that are not part of the paper.
    """

    law: Lognormal = field(default_factory=Lognormal)
    schedule: Doubling = field(default_factory=Doubling)
    grid: Karras = field(default_factory=Karras)
    penalty: Penalty = field(default_factory=lambda: Penalty("pseudo_huber", "dt", c=None))
    bridge: DataBridge = field(default_factory=DataRay)
    levers: Levers = NO_LEVERS
    kind: ClassVar[str] = "ict"

    def loss(
        self, student: Denoiser, batch: Batch, progress: Progress, random: StepRandom, beside: Beside = ALONE
    ) -> LossOutput:
        """Loss per sample ``[b]``; ``student`` under the EDM clock, in training mode."""
        nodes = self.grid.nodes(self.schedule.nodes(progress), student.sigma_min, student.sigma_max)
        t, r = neighbours(nodes, places(random.uniform("times"), lognormal_shares(self.law, nodes)))
        eps, cost = self.levers.noise(batch, random, beside)
        return LossOutput(plus(self.loss_at(student, batch.x, t, r, eps, batch.cond, random.tape(), beside), cost))

    def loss_at(
        self,
        student: Denoiser,
        x_0: Samples,
        t: Tensor,
        r: Tensor,
        eps: Samples,
        cond: Tensor | None = None,
        tape: DropoutTape | None = None,
        beside: Beside = ALONE,
    ) -> PerSample:
        """The loss at explicit host times ``t > r >= 0 [b]``, float64, and noise ``eps [b, ...]``."""
        both = make_pair(x_0, eps, t, r, t - r, cond, self.levers.low)
        return self.gap_loss(student, student, both, tape, beside)

    def describe(self, progress: Progress) -> dict[str, float]:
        """Doublings so far, and the number of nodes."""
        return {"stage": float(self.schedule.stage(progress)), "nodes": float(self.schedule.nodes(progress))}
