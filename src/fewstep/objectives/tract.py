"""TRACT, transitive closure time-distillation (Berthelot et al., arXiv 2303.04248; math.md 3.6)."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fewstep.denoiser import Denoiser, Sampler
from fewstep.errors import ConfigError
from fewstep.jumps import ddim
from fewstep.objectives.aims import Heun, Triple, place, target_aim
from fewstep.objectives.base import ALONE, Beside, LossOutput, Objective, StepRandom
from fewstep.objectives.bridges import require_teacher
from fewstep.objectives.pairs import Pair, network_pass
from fewstep.penalty import Penalty
from fewstep.randomness import DropoutTape
from fewstep.sampling import karras_grid
from fewstep.segments import Clocks, phase_clocks
from fewstep.types import Batch, PerSample, Progress, Samples, Times


@dataclass(frozen=True)
class TRACT(Objective):
    """``|F(x_t, t) - F_y|^2``, with y where ``self`` lands on the segment's lower edge from the teacher's x_r.

    In phase p a teacher that needs ``time_schedule[p]`` steps becomes a student that needs ``time_schedule[p + 1]``.
    All phases share the grid ``0, sigma_1, ..., sigma_n``, n = time_schedule[0]: the teacher moves n/schedule[p]
    nodes down, the student jumps to the next multiple of n/schedule[p+1] nodes. The first teacher is the diffusion
    model, which takes a Heun step; each later one is the last phase's average, whose own jump ends one of its steps
    below t. Where the teacher lands on the edge already, its landing point is the target (at the lowest node: its
    estimate of x_0). Published with two phases for VP, where every teacher takes DDIM steps, and one for EDM.
    Not ported: clipping of x_0 to [-1, 1], and teachers without dropout (here they share the student's masks).

    Args:
        time_schedule: step counts, decreasing, each a divisor of the one before.
        solver: the diffusion model's step: "heun" (EDM variant) or "ddim" (VP variant).
        self_ema: beta per step of the self-teacher.
        ema_residual: what a phase's first weights are worth in its average at its end.
        penalty: squared L2 in D-space with weight ``1/c_out^2``, which is squared L2 in F-space with weight 1.
    """

    time_schedule: tuple[int, ...] = (64, 8, 1)
    solver: Literal["heun", "ddim"] = "heun"
    self_ema: float = 0.5
    ema_residual: float = 1e-3
    penalty: Penalty = field(default_factory=lambda: Penalty("squared_l2", "snrpk"))
    kind: ClassVar[str] = "tract"

    def __post_init__(self) -> None:
        pairs = list(itertools.pairwise(self.time_schedule))
        if not pairs or not all(a > b >= 1 and a % b == 0 for a, b in pairs):
            raise ConfigError(
                "TRACT's time schedule cannot be followed", got=self.time_schedule,
                want="decreasing step counts, each a divisor of the one before, for example 64, 8, 1",
            )  # fmt: skip
        if not (0 <= self.self_ema < 1 and 0 < self.ema_residual < 1):
            raise ConfigError(
                "TRACT's averages need self_ema in [0, 1) and ema_residual in (0, 1)",
                got=(self.self_ema, self.ema_residual),
            )

    @property
    def phases(self) -> int:
        """How many times the number of steps shrinks."""
        return len(self.time_schedule) - 1

    @property
    def needs_teacher(self) -> bool:
        return True

    @property
    def compiles(self) -> bool:
        return True

    def phase(self, progress: Progress) -> int:
        """The current phase, 0 to ``phases - 1``; all are equally long."""
        return min(progress.images_seen * self.phases // progress.total_images, self.phases - 1)

    def nodes(self, student: Denoiser) -> Times:
        """``0, sigma_1, ..., sigma_n``: EDM's grid from 0.002 (in units of the data) to sigma_max, ascending."""
        low = max(0.002 * student.sigma_data / 0.5, student.sigma_min)
        grid = karras_grid(self.time_schedule[0], low, student.sigma_max)
        return torch.tensor(grid[::-1], dtype=torch.float64)

    def sampler(self, student: Denoiser) -> tuple[Sampler, dict[int, tuple[float, ...]]]:
        steps = self.time_schedule[-1]
        edges = self.nodes(student)[:: self.time_schedule[0] // steps]
        return "jump", {steps: tuple(edges[1:].flip(0).tolist())}

    def companions(self) -> tuple[str, ...]:
        return ("self", "average", "phase_teacher") if self.phases > 1 else ("self",)

    def follow(self, name: str, progress: Progress, batch_size: int) -> tuple[str, float]:
        if name == "self":
            return "student", self.self_ema
        if name == "average":
            return "student", self.ema_residual ** (batch_size * self.phases / progress.total_images)
        before = Progress(progress.images_seen - batch_size, progress.total_images)
        return "average", 1.0 if self.phase(before) == self.phase(progress) else 0.0

    def clocks(self, student: Denoiser, phase: int, u: Tensor) -> Clocks:
        """Times on the phase's grid from uniform numbers ``[b]``, on the host."""
        n, (steps, fewer) = self.time_schedule[0], self.time_schedule[phase : phase + 2]
        return phase_clocks(self.nodes(student), u, n // steps, n // fewer)

    def loss(
        self, student: Denoiser, batch: Batch, progress: Progress, random: StepRandom, beside: Beside = ALONE
    ) -> LossOutput:
        """Loss per sample ``[b]``; ``student`` under the EDM clock, in training mode."""
        phase = self.phase(progress)
        clocks = self.clocks(student, phase, random.uniform("times"))
        eps = random.normal("noise", batch.x)
        return LossOutput(self.loss_at(student, batch.x, clocks, eps, phase, batch.cond, random.tape(), beside))

    def loss_at(
        self,
        student: Denoiser,
        x_0: Samples,
        clocks: Clocks,
        eps: Samples,
        phase: int,
        cond: Tensor | None = None,
        tape: DropoutTape | None = None,
        beside: Beside = ALONE,
    ) -> PerSample:
        """The loss at explicit times (on the host) and noise."""
        all_three = place(x_0, eps, clocks, cond, beside.execute)
        return beside.execute(self.loss_between, student, all_three, phase, tape, beside)

    def loss_between(
        self,
        student: Denoiser,
        all_three: Triple,
        phase: int,
        tape: DropoutTape | None = None,
        beside: Beside = ALONE,
    ) -> PerSample:
        """The loss once the times are known, all on the device."""
        both, x_t = all_three.pair, all_three.pair.x_t
        out = network_pass(student, x_t, both.t, both.cond, tape and tape.record())
        with torch.no_grad():
            aim, x_r = self._teach(phase, both, x_t, tape, beside)
            y = target_aim(beside.companions["self"], all_three, aim, x_r, tape, two_time=False)
        return self.penalty(out - y, both.t, both.gap, student.sigma_data)

    def _teach(
        self, phase: int, both: Pair, x_t: Samples, tape: DropoutTape | None, beside: Beside
    ) -> tuple[Samples, Samples]:
        """The aim and the landing point of the phase's teacher."""
        if phase == 0 and self.solver == "heun":
            return Heun()(both, x_t, beside.teacher)
        if phase == 0:
            aim = require_teacher(beside.teacher)(x_t, both.t, both.cond)
        else:
            aim = network_pass(beside.companions["phase_teacher"], x_t, both.t, both.cond, tape and tape.replay())
        return aim, ddim(aim, x_t, both.t, both.r)

    def describe(self, progress: Progress) -> dict[str, float]:
        """Phase, and the number of steps its student is to need."""
        phase = self.phase(progress)
        return {"phase": float(phase), "steps": float(self.time_schedule[phase + 1])}
