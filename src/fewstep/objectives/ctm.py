"""Consistency Trajectory Models without their GAN (Kim et al., arXiv 2310.02279; math.md 3.10)."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fewstep.denoiser import Denoiser, Sampler
from fewstep.errors import ConfigError
from fewstep.jumps import ddim, heun_step
from fewstep.objectives.base import ALONE, Beside, LossOutput, Objective, StepRandom, to_device
from fewstep.objectives.bridges import require_teacher
from fewstep.objectives.pairs import Pair, draw_times, network_pass, rows_where, target_pass
from fewstep.penalty import Penalty
from fewstep.process import expand
from fewstep.randomness import DropoutTape
from fewstep.segments import axis_of
from fewstep.times import Law, Lognormal
from fewstep.types import Batch, Condition, PerSample, Progress, Samples, Times


@dataclass(frozen=True)
class Route:
    """Where a batch of jumps goes, float64 on the host.

    Args:
        levels: ``[m + 1, b]``: t, the levels that the teacher's m steps visit, and u, ``s <= u < t``.
        s: where student and target land, ``[b]``.
    """

    levels: Tensor
    s: Times


@dataclass(frozen=True)
class CTM(Objective):
    """``rho(f'(x_s, s) - f'(x'_s, s)) + weight * DSM``: two ways from x_t to s, compared at time 0.

    The student's way is one jump, ``x_s = ddim(g(x_t, t, s), x_t, t -> s)``; the target's is the teacher's from t to
    u, then ``x'_s = ddim(g'(x_u, u, s), x_u, u -> s)``. Both are pushed to time 0 by the target network,
    ``f'(x, s) = g'(x, s, 0)``, whose weights get no gradient (x itself where s = 0: consistency distillation). The
    student's ``g(x, t, t)`` is held to the denoiser by score matching. Not ported: the GAN, and the balance of the
    two terms by the norms of their gradients (weight is a constant here; its value is not measured).

    Args:
        nodes: of EDM's grid; t is uniform over them, s over those below t, time 0 included.
        ahead: how many nodes u lies below t, at most down to s; as many steps of the teacher.
        step: "heun", the teacher's ODE, or "data", the data's noise ray, without a teacher.
        target_ema: beta per step of the target network; 0 is the student itself.
        penalty: of the gap at time 0.
        denoising: of ``g(x_t', t', t') - x_0``; law: of t'; weight: of that term, 0 for none.
    """

    nodes: int = 18
    ahead: int = 1
    step: Literal["heun", "data"] = "heun"
    target_ema: float = 0.999
    penalty: Penalty = field(default_factory=lambda: Penalty("squared_l2", "one"))
    denoising: Penalty = field(default_factory=lambda: Penalty("squared_l2", "snrpk"))
    law: Law = field(default_factory=lambda: Lognormal(-1.2, 1.2))
    weight: float = 1.0
    kind: ClassVar[str] = "ctm"

    def __post_init__(self) -> None:
        if not (self.nodes >= 1 and self.ahead >= 1 and self.weight >= 0 and 0 <= self.target_ema < 1):
            raise ConfigError(
                "CTM needs nodes >= 1, ahead >= 1, weight >= 0 and target_ema in [0, 1)",
                got=(self.nodes, self.ahead, self.weight, self.target_ema),
            )

    @property
    def needs_teacher(self) -> bool:
        return self.step == "heun"

    @property
    def two_time(self) -> bool:
        return True

    def sampler(self, student: Denoiser) -> tuple[Sampler, dict[int, tuple[float, ...]]]:
        return "jump", {}

    def companions(self) -> tuple[str, ...]:
        return ("target",)

    def follow(self, name: str, progress: Progress, batch_size: int) -> tuple[str, float]:
        return "student", self.target_ema

    def route(self, student: Denoiser, first: Tensor, second: Tensor) -> Route:
        """Times from two uniform numbers per row, ``[b]`` each: t from the first, s from the second."""
        axis = axis_of("karras", student.sigma_data, student.sigma_min, student.sigma_max)
        edges = axis.edges(self.nodes)
        t = (first * self.nodes).long().clamp_max(self.nodes - 1) + 1
        s = torch.minimum((second * t).long(), t - 1)
        return Route(edges[torch.stack([torch.maximum(t - k, s) for k in range(self.ahead + 1)])], edges[s])

    def loss(
        self, student: Denoiser, batch: Batch, progress: Progress, random: StepRandom, beside: Beside = ALONE
    ) -> LossOutput:
        """Loss per sample ``[b]``; ``student`` under the EDM clock, in training mode."""
        route = self.route(student, random.uniform("times"), random.uniform("landings"))
        eps, tape = random.normal("noise", batch.x), random.tape()
        loss = self.loss_at(student, batch.x, route, eps, batch.cond, tape, beside)
        if self.weight > 0:
            t = draw_times(self.law, student, random, "denoising")
            loss = loss + self.weight * self.denoising_at(student, batch.x, t, eps, batch.cond, random.tape())
        return LossOutput(loss)

    def denoising_at(
        self,
        student: Denoiser,
        x_0: Samples,
        t: Times,
        eps: Samples,
        cond: Condition | None = None,
        tape: DropoutTape | None = None,
    ) -> PerSample:
        """The score-matching term at explicit times (on the host) and noise, ``[b]``."""
        t = to_device(t, x_0)
        x_t = x_0 + expand(t, x_0).to(x_0.dtype) * eps
        out = network_pass(student, x_t, t, cond, tape and tape.record(), t)
        return self.denoising(out - x_0, t, t, student.sigma_data)

    def loss_at(
        self,
        student: Denoiser,
        x_0: Samples,
        route: Route,
        eps: Samples,
        cond: Condition | None = None,
        tape: DropoutTape | None = None,
        beside: Beside = ALONE,
    ) -> PerSample:
        """The comparison at explicit times (on the host) and noise, ``[b]``."""
        apart, above = (rows_where(c, x_0) for c in (route.levels[-1] > route.s, route.s > 0))
        times = (route.levels[0], route.levels[-1], route.levels[0] - route.levels[-1])
        t, u, gap = (to_device(v, x_0) for v in times)
        both = Pair(x_0, eps, t, u, gap, apart, cond)
        s, x_t, target = to_device(route.s, x_0), both.x_t, beside.companions["target"]
        out = network_pass(student, x_t, t, cond, tape and tape.record(), s)
        ours = _push(target, ddim(out, x_t, t, s), s, above, cond, tape)
        with torch.no_grad():
            x_u = self._carry(both, x_t, to_device(route.levels, x_0), beside)
            goal = target_pass(target, x_u, u, apart, cond, tape, s)
            landed = ddim(goal, x_u, u.clamp_min(torch.finfo(u.dtype).tiny), s)
            theirs = _push(target, landed, s, above, cond, tape)
        return self.penalty(ours - theirs, t, gap, student.sigma_data)

    def _carry(self, both: Pair, x_t: Samples, levels: Tensor, beside: Beside) -> Samples:
        """x_u, by the data's ray or by one Heun step per level; a row that has arrived stays where it is."""
        if self.step == "data":
            return both.x_0 + expand(both.r, x_t).to(x_t.dtype) * both.eps
        teacher, x = require_teacher(beside.teacher), x_t
        for start, end in itertools.pairwise(levels.unbind()):
            moves = end < start  # a step from t to t moves nothing, and never divides by a level of 0
            x = heun_step(teacher, x, torch.where(moves, start, both.t), torch.where(moves, end, both.t), both.cond)
        return x


def _push(
    target: Denoiser, x_s: Samples, s: Times, rows: Tensor, cond: Condition | None, tape: DropoutTape | None
) -> Samples:
    """``g'(x_s, s, 0)`` on ``rows`` (those with s > 0), ``x_s`` elsewhere; gradients flow through to ``x_s``."""
    if len(rows) == 0:
        return x_s
    some = None if cond is None else cond[rows]
    out = network_pass(target, x_s[rows], s[rows], some, tape and tape.replay(rows), torch.zeros_like(s[rows]))
    return x_s.index_copy(0, rows, out)
