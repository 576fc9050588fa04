"""Improved Consistency Training (Song and Dhariwal, arXiv 2310.14189; math.md 3.2, 8.1)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from fewstep.denoiser import Denoiser
from fewstep.grids import Doubling, Karras, lognormal_shares, neighbours, places
from fewstep.objectives.bridges import DataBridge, DataRay
from fewstep.objectives.levers import NO_LEVERS, Levers
from fewstep.objectives.two_point import Neighbours
from fewstep.penalty import Penalty
from fewstep.times import Lognormal
from fewstep.types import Progress, Times


@dataclass(frozen=True)
class ICT(Neighbours):
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

    def neighbours(self, student: Denoiser, progress: Progress, u: Tensor) -> tuple[Times, Times]:
        nodes = self.grid.nodes(self.schedule.nodes(progress), student.sigma_min, student.sigma_max)
        return neighbours(nodes, places(u, lognormal_shares(self.law, nodes)))

    def describe(self, progress: Progress) -> dict[str, float]:
        """Doublings so far, and the number of nodes."""
        return {"stage": float(self.schedule.stage(progress)), "nodes": float(self.schedule.nodes(progress))}
