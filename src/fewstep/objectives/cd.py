"""Consistency Distillation (Song et al., arXiv 2303.01469; math.md 3.3, 8.1)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor

from fewstep.denoiser import Denoiser
from fewstep.errors import ConfigError
from fewstep.grids import Karras, neighbours, uniform_places
from fewstep.objectives.base import Beside
from fewstep.objectives.bridges import TeacherStep
from fewstep.objectives.levers import NO_LEVERS, Levers
from fewstep.objectives.two_point import Neighbours
from fewstep.penalty import Penalty
from fewstep.types import Progress, Times


@dataclass(frozen=True)
class CD(Neighbours):
    """``rho(f(x_0 + t eps, t) - f_target(x_r, r))``, x_r one step of the teacher's ODE to the next lower node.

    The lowest node counts as clean: there r = 0, and the target is the teacher's denoiser (``fewstep.grids``).

    Args:
        nodes: N, fixed (18 on CIFAR-10, 40 on ImageNet-64).
        grid: where they are.
        target: "ema", a moving average of the student, or "student", the student itself without gradient.
        decay: of that average.
        penalty: distance and weight; the paper's other distance is LPIPS (``levers.distance``).
        bridge: the teacher's step; Heun's, as published.
        levers: additions that are not part of the paper.
    """

    nodes: int = 18
    grid: Karras = field(default_factory=Karras)
    target: Literal["ema", "student"] = "ema"
    decay: float = 0.95
    penalty: Penalty = field(default_factory=lambda: Penalty("squared_l2", "one"))
    bridge: TeacherStep = field(default_factory=TeacherStep)
    levers: Levers = NO_LEVERS
    kind: ClassVar[str] = "cd"

    def __post_init__(self) -> None:
        if self.nodes < 2:
            raise ConfigError("Consistency distillation needs at least 2 nodes", got=self.nodes)
        if not 0 <= self.decay < 1:
            raise ConfigError("The decay of the target must lie in [0, 1)", got=self.decay)

    def companions(self) -> tuple[str, ...]:
        return ("target",) if self.target == "ema" else ()

    def follow(self, name: str, progress: Progress, batch_size: int) -> tuple[str, float]:
        return "student", self.decay

    def neighbours(self, student: Denoiser, progress: Progress, u: Tensor) -> tuple[Times, Times]:
        nodes = self.grid.nodes(self.nodes, student.sigma_min, student.sigma_max)
        return neighbours(nodes, uniform_places(u, self.nodes))

    def target_of(self, student: Denoiser, beside: Beside) -> Denoiser:
        return beside.companions["target"] if self.target == "ema" else student
