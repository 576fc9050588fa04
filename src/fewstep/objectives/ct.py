"""Consistency Training (Song et al., arXiv 2303.01469; math.md 3.1, 8.1)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from fewstep.denoiser import Denoiser
from fewstep.errors import ConfigError
from fewstep.grids import Growing, Karras, neighbours, uniform_places
from fewstep.objectives.base import Beside
from fewstep.objectives.bridges import DataBridge, DataRay
from fewstep.objectives.levers import NO_LEVERS, Levers
from fewstep.objectives.two_point import Neighbours
from fewstep.penalty import Penalty
from fewstep.types import Progress, Times


@dataclass(frozen=True)
class CT(Neighbours):
    """``rho(f(x_0 + t eps, t) - f_target(x_0 + r eps, r))`` at neighbours r < t of a growing grid.

    The target is a moving average of the student with decay mu(k), on the same noise and the same dropout mask. The
    lowest node counts as clean: there r = 0 and the target is x_0 (``fewstep.grids``).

    Args:
        schedule: N(k), nodes of the grid.
        grid: where they are.
        mu: decay of the target where the grid is coarsest (0.9 on CIFAR-10, 0.95 on ImageNet-64); 0 is the student.
        penalty: distance and weight; the paper's other distance is LPIPS (``levers.distance``).
        bridge: how x_t is carried to x_r; the data's own noise ray, as published.
        levers: additions that are not part of the paper.
    """

    schedule: Growing = field(default_factory=Growing)
    grid: Karras = field(default_factory=Karras)
    mu: float = 0.9
    penalty: Penalty = field(default_factory=lambda: Penalty("squared_l2", "one"))
    bridge: DataBridge = field(default_factory=DataRay)
    levers: Levers = NO_LEVERS
    kind: ClassVar[str] = "ct"

    def __post_init__(self) -> None:
        if not 0 <= self.mu < 1:
            raise ConfigError("The decay of the target must lie in [0, 1)", got=self.mu)

    def companions(self) -> tuple[str, ...]:
        return ("target",)

    def follow(self, name: str, progress: Progress, batch_size: int) -> tuple[str, float]:
        taken = Progress(progress.images_seen - batch_size, progress.total_images)
        return "student", self.schedule.decay(self.mu, taken)

    def neighbours(self, student: Denoiser, progress: Progress, u: Tensor) -> tuple[Times, Times]:
        nodes = self.grid.nodes(self.schedule.nodes(progress), student.sigma_min, student.sigma_max)
        return neighbours(nodes, uniform_places(u, len(nodes)))

    def target_of(self, student: Denoiser, beside: Beside) -> Denoiser:
        return beside.companions["target"]

    def describe(self, progress: Progress) -> dict[str, float]:
        """The number of nodes."""
        return {"nodes": float(self.schedule.nodes(progress))}
