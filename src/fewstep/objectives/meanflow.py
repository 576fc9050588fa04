"""MeanFlow: average velocities from their own identity (Geng et al., arXiv 2505.13447; math.md 3.9)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fewstep.denoiser import Denoiser, Sampler
from fewstep.derivative import Method, derivative, settle
from fewstep.errors import ConfigError
from fewstep.objectives.base import ALONE, Beside, LossOutput, Objective, StepRandom, to_device
from fewstep.objectives.bridges import require_teacher
from fewstep.objectives.pairs import draw_times, highest, network_pass, rows_where
from fewstep.process import expand
from fewstep.randomness import DropoutTape
from fewstep.times import Law, Lognormal, draw
from fewstep.types import Batch, Condition, PerSample, Progress, Samples, Times

STEPS = (1, 2, 4, 8)
"""Step counts whose levels the model remembers."""


@dataclass(frozen=True)
class MeanFlow(Objective):
    """``|u - sg[v - (tau - rho) du/dtau]|^2 / sg(|.|^2 + c)^p`` for a student that is told where it lands (eq. 3.4).

    Flow coordinates are ``tau = t/(1+t)``, ``z = x_t/(1+t)``; the landing time s is ``rho = s/(1+s)`` there. The
    student's x0-like output g(x_t, t, s) is the average velocity ``u = (z - g)/tau`` from tau to rho. With D, the clean
    end of the velocity ``v = (z - D)/tau`` (x_0, or the teacher's denoiser), the identity reads

        ``g = D + k [g - D - (1 + t) dg/dln t],   k = 1 - rho/tau = (t - s)/(t (1 + s))``

    with s held fixed in the derivative. s = t is flow matching, s = 0 continuous-time consistency.

    Args:
        law, landing: laws of the two times, of which the later one is t. A lognormal law of t is the logit-normal
            law of tau with the same numbers; the defaults are the published ones for CIFAR-10.
        equal: share of the rows with s = t.
        p, c: exponent and constant of the adaptive weight; the square sums over all dimensions.
        velocity: "data" or "teacher".
        derivative: "jvp", "finite", or "auto": the first where the network can.
    """

    law: Law = field(default_factory=lambda: Lognormal(-0.6, 1.6))
    landing: Law = field(default_factory=lambda: Lognormal(-4.0, 1.6))
    equal: float = 0.25
    p: float = 0.75
    c: float = 1e-3
    velocity: Literal["data", "teacher"] = "data"
    derivative: Method = "auto"
    kind: ClassVar[str] = "meanflow"

    def __post_init__(self) -> None:
        if not (0 <= self.equal <= 1 and self.p >= 0 and self.c > 0):
            raise ConfigError("MeanFlow needs equal in [0, 1], p >= 0 and c > 0", got=(self.equal, self.p, self.c))

    def loss(
        self, student: Denoiser, batch: Batch, progress: Progress, random: StepRandom, beside: Beside = ALONE
    ) -> LossOutput:
        """Loss per sample ``[b]``; ``student`` told its landing time, under the EDM clock, in training mode."""
        t, s = self.times(student, random)
        eps = random.normal("noise", batch.x)
        return LossOutput(self.loss_at(student, batch.x, t, s, eps, batch.cond, random.tape(), beside))

    def times(self, student: Denoiser, random: StepRandom) -> tuple[Times, Times]:
        """``(t, s)`` with ``t >= s >= 0``, on the host, float64 ``[b]``."""
        one, two = (
            draw_times(self.law, student, random),
            draw(self.landing, random.uniform("landing"), high=highest(student)),
        )
        two = torch.where(two < student.sigma_min, 0, two)  # counts as clean
        equal = random.uniform("equal") < self.equal
        t = torch.maximum(one, two)
        return t, torch.where(equal, t, torch.minimum(one, two))

    def loss_at(
        self,
        student: Denoiser,
        x_0: Samples,
        t: Times,
        s: Times,
        eps: Samples,
        cond: Condition | None = None,
        tape: DropoutTape | None = None,
        beside: Beside = ALONE,
    ) -> PerSample:
        """The loss at explicit times ``t >= s [b]`` and noise ``eps [b, ...]``.

        The times are on the host: which rows have s < t, and need a derivative, is decided there.
        """
        rows = rows_where(s < t, x_0)
        t, s = to_device(t, x_0), to_device(s, x_0)
        x_t = x_0 + expand(t, x_0) * eps
        out = network_pass(student, x_t, t, cond, tape and tape.record(), s)
        with torch.no_grad():
            clean = require_teacher(beside.teacher)(x_t, t, cond) if self.velocity == "teacher" else x_0
        slope = self.slope(student, x_t, t, s, clean, rows, cond, tape)
        goal = target(out.detach(), slope, clean, t, s)
        error = ((out - goal) * expand(1 + 1 / t, out)).square().flatten(1).sum(1)
        return error / (error.detach() + self.c) ** self.p

    def slope(
        self,
        student: Denoiser,
        x_t: Samples,
        t: Times,
        s: Times,
        clean: Samples,
        rows: Tensor,
        cond: Condition | None = None,
        tape: DropoutTape | None = None,
    ) -> Samples:
        """``dg/dln t [b, ...]`` along the path towards ``clean``, s held fixed; on ``rows``, 0 elsewhere."""
        if len(rows) == 0:
            return torch.zeros_like(x_t)
        some_cond, some_s = (None if v is None else v[rows] for v in (cond, s))

        def function(x_t: Samples, t: Times) -> Samples:
            return network_pass(student, x_t, t, some_cond, tape and tape.replay(rows), some_s)

        some = derivative(function, (x_t[rows], t[rows]), ((x_t - clean)[rows], t[rows]), self.derivative)
        return torch.zeros_like(x_t).index_copy(0, rows, some)

    @property
    def two_time(self) -> bool:
        """The student is told where it lands."""
        return True

    @property
    def needs_teacher(self) -> bool:
        """For distillation."""
        return self.velocity == "teacher"

    def sampler(self, student: Denoiser) -> tuple[Sampler, dict[int, tuple[float, ...]]]:
        """Jumps between levels that are equally spaced in tau."""
        top = student.sigma_max / (1 + student.sigma_max)
        taus = {steps: [top * k / steps for k in range(steps, 0, -1)] for steps in STEPS}
        return "jump", {steps: tuple(tau / (1 - tau) for tau in levels) for steps, levels in taus.items()}

    def prepare(self, student: Denoiser) -> MeanFlow:
        """Settle how the derivative is taken."""
        return replace(self, derivative=settle(self.derivative, student))


def target(out: Samples, slope: Samples, clean: Samples, t: Times, s: Times) -> Samples:
    """``D + k [g - D - (1 + t) dg/dln t]``, the right-hand side of the identity, ``[b, ...]``."""
    k = (t - s) / (t * (1 + s))
    return clean + expand(k, out) * (out - clean - expand(1 + t, out) * slope)
