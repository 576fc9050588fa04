"""Truncated Consistency Models (Lee et al., arXiv 2410.14895; math.md 3.7, 8.1)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from fewstep.denoiser import Denoiser, Sampler
from fewstep.errors import ScheduleError
from fewstep.objectives.base import ALONE, Beside, LossOutput, StepRandom, to_device
from fewstep.objectives.levers import NO_LEVERS, Levers, plus
from fewstep.objectives.pairs import draw_times, make_pair, network_pass, rows_where, target_pass
from fewstep.objectives.two_point import TwoPoint
from fewstep.penalty import Penalty
from fewstep.randomness import DropoutTape
from fewstep.times import Law, Lognormal, Mapping, Schedule, Sigmoid, Stages, pair
from fewstep.types import Batch, PerSample, Progress, Samples, Times


@dataclass(frozen=True)
class StudentT:
    """``ln t = mean + std T_nu``, T_nu a Student-t variable; nu = 0.01 has very heavy tails (math.md 3.7)."""

    mean: float = 0.0
    std: float = 0.2
    nu: float = 0.01

    def __post_init__(self) -> None:
        if not (self.std > 0 and self.nu > 0):
            raise ScheduleError("The Student-t law of t needs std > 0 and nu > 0", got=(self.std, self.nu))

    def draw(self, u: Tensor, low: float, high: float) -> Times:
        """Times in [low, high] from uniform ``u [b]`` in (0, 1), float64 ``[b]``, on the host.

        With ``T = sqrt(nu) sinh(y)`` the density of y is ``cosh(y)^-nu``, nearly flat: its integral is tabulated and
        inverted by linear interpolation, good to 1e-6.
        """
        width = self.std * math.sqrt(self.nu)
        bottom, top = (math.asinh((math.log(t) - self.mean) / width) for t in (low, high))
        y = np.linspace(bottom, top, 4097)
        density = np.cosh(y) ** -self.nu
        mass = np.concatenate(([0.0], np.cumsum(density[1:] + density[:-1])))
        drawn = np.interp(u.numpy(), mass / mass[-1], y)
        return torch.from_numpy(np.exp(self.mean + width * np.sinh(drawn))).clamp(low, high)


@dataclass(frozen=True)
class TCM(TwoPoint):
    """First ECT at all times; then ECT at t >= t' alone, held at t' by the frozen model of the first stage.

    In the second stage, with r = m(t) and ``f(x_r, r)`` the student's where r >= t' and the frozen model's below::

        L = E_t [w rho(f(x_t, t) - sg f(x_r, r))] + boundary_weight E_{t = t'} [w rho(...)]

    A share ``boundary`` of the rows, drawn row by row, has t = t'; their r < t', so they tie the student to the frozen
    model. Without them every constant would be consistent. Rows are scaled by ``1/(1 - boundary)`` and
    ``boundary_weight/boundary``, so that the mean over the batch has expectation L.

    The trained student is a consistency function for t >= t' only, and the frozen model is not saved with it: its
    sampling times (:meth:`sampler`, up to 8 steps) stay at t' and above, and so must others that are asked for.

    Args:
        first_share: share of the run that is the first stage; 0 if the starting model is a consistency model already.
        transition: t', the lowest time that the second stage trains.
        boundary: p_b, share of rows at t'.
        boundary_weight: lambda_b.
        law: law of t in the first stage.
        truncated_law: law of t in the second, truncated to [t', sigma_max].
        mapping: n(t), constant or sigmoid.
        schedule: q^a as a function of the images seen, over both stages.
        penalty: distance and weight.
        levers: additions that are not part of the paper.
    """

    first_share: float = 0.5
    transition: float = 1.0
    boundary: float = 0.25
    boundary_weight: float = 0.1
    law: Law = field(default_factory=Lognormal)
    truncated_law: StudentT = field(default_factory=StudentT)
    mapping: Mapping = field(default_factory=Sigmoid)
    schedule: Schedule = field(default_factory=Stages)
    penalty: Penalty = field(default_factory=lambda: Penalty("pseudo_huber", "dt", c=1e-8))
    levers: Levers = NO_LEVERS
    kind: ClassVar[str] = "tcm"

    def __post_init__(self) -> None:
        if not 0 <= self.first_share <= 1:
            raise ScheduleError("TCM's first stage is a share of the run", got=self.first_share, want="0 to 1")
        if not 0 <= self.boundary < 1:
            raise ScheduleError("TCM's boundary rows are a share of the batch", got=self.boundary, want="0 to below 1")
        if not (self.transition > 0 and self.boundary_weight >= 0):
            got = (self.transition, self.boundary_weight)
            raise ScheduleError("TCM needs a transition time > 0 and a boundary weight >= 0", got=got)

    def prepare(self, student: Denoiser) -> TCM:
        if not self.transition < student.sigma_max:
            raise ScheduleError(
                "No noise level is above TCM's transition time, so its second stage would train nothing",
                got=self.transition,
                want=f"below the model's {student.sigma_max:g}",
            )
        super().prepare(student)
        return self

    def truncated(self, progress: Progress) -> bool:
        """Whether the second stage has begun."""
        return progress.images_seen >= self.first_share * progress.total_images

    def companions(self) -> tuple[str, ...]:
        return ("frozen",)

    def follow(self, name: str, progress: Progress, batch_size: int) -> tuple[str, float]:
        """The frozen model is the student after the first stage's last step."""
        taken = Progress(progress.images_seen - batch_size, progress.total_images)
        return "student", 0.0 if self.truncated(progress) and not self.truncated(taken) else 1.0

    def sampler(self, student: Denoiser) -> tuple[Sampler, dict[int, tuple[float, ...]]]:
        """sigma_max, then levels down to t', evenly spaced in ln sigma over a factor ``16^(1 - 2/steps)``."""
        top = student.sigma_max
        times: dict[int, tuple[float, ...]] = {1: (top,)}
        for steps in range(2, 9):
            span = min(math.log(16) * (1 - 2 / steps), 0.5 * math.log(top / self.transition))
            offsets = np.linspace(span, 0.0, steps - 1) if steps > 2 else [0.0]
            times[steps] = (top, *(self.transition * math.exp(offset) for offset in offsets))
        return "consistency", times

    def loss(
        self, student: Denoiser, batch: Batch, progress: Progress, random: StepRandom, beside: Beside = ALONE
    ) -> LossOutput:
        """Loss per sample ``[b]``; ``student`` under the EDM clock, in training mode."""
        eps, cost = self.levers.noise(batch, random, beside)
        ratio = self.schedule.ratio(progress)
        if self.truncated(progress):
            t, held = self.draw(random, student.sigma_max)
            loss = self.loss_at(student, batch.x, t, eps, ratio, held, batch.cond, random.tape(), beside)
        else:
            t = draw_times(self.law, student, random)
            r, gap = pair(self.mapping, t, ratio, student.sigma_min)
            both = make_pair(batch.x, eps, t, r, gap, batch.cond, self.levers.low, execute=beside.execute)
            loss = beside.execute(self.gap_loss, student, student, both, random.tape(), beside)
        return LossOutput(plus(loss, cost))

    def draw(self, random: StepRandom, high: float) -> tuple[Times, Tensor]:
        """Second stage: times ``[b]`` in [t', high] on the host, and which rows are held at t', bool ``[b]``."""
        held = random.uniform("boundary") < self.boundary
        t = self.truncated_law.draw(random.uniform("times"), self.transition, high)
        return torch.where(held, self.transition, t), held

    def loss_at(
        self,
        student: Denoiser,
        x_0: Samples,
        t: Tensor,
        eps: Samples,
        ratio: float,
        held: Tensor,
        cond: Tensor | None = None,
        tape: DropoutTape | None = None,
        beside: Beside = ALONE,
    ) -> PerSample:
        """The second stage's loss at explicit host times ``t [b]``, noise ``eps [b, ...]`` and ``ratio = q^a``.

        Args:
            held: which rows count as boundary rows, bool ``[b]``, on the host.
            beside: ``companions["frozen"]`` is the model of the first stage.

        Raises:
            ScheduleError: a time is below t', where there is nothing to train.
        """
        lowest = t.numpy().min()
        if lowest < self.transition:
            raise ScheduleError("Times below TCM's transition train nothing", got=lowest, want=f">= {self.transition}")
        r, gap = pair(self.mapping, t.double(), ratio, student.sigma_min)
        both = make_pair(x_0, eps, t, r, gap, cond, self.levers.low)
        above = rows_where(r >= self.transition, x_0)
        below = rows_where((r > 0) & (r < self.transition), x_0)
        x_t = both.x_t
        out = network_pass(student, x_t, both.t, cond, tape and tape.record())
        goal = self.bridge(both, x_t, None)
        goal = target_pass(beside.companions["frozen"], goal, both.r, below, cond, tape)
        goal = target_pass(student, goal, both.r, above, cond, tape)
        loss = self.levers.penalise(self.penalty, student, both, out, goal, beside)
        return to_device(self._scale(held), x_0) * loss

    def _scale(self, held: Tensor) -> Tensor:
        """Weight of each row, so that the mean over all rows is a sum of means over the two kinds; float64 ``[b]``."""
        weight = self.boundary_weight / self.boundary if self.boundary > 0 else 0.0
        share = held.double()
        return share * weight + (1 - share) / (1 - self.boundary)

    def tightness(self, progress: Progress) -> float | None:
        return self.schedule.ratio(progress)

    def describe(self, progress: Progress) -> dict[str, float]:
        """Stage of the schedule, the typical r/t, and whether the second stage has begun."""
        ratio = self.schedule.ratio(progress)
        stage = float(self.schedule.stage(progress))
        return {"stage": stage, "r/t": 1 - 1 / ratio, "truncated": float(self.truncated(progress))}
