"""Multistep Consistency Models (Heek et al., arXiv 2403.06807; math.md 3.5), and one student for many step counts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor

from fewstep.denoiser import Denoiser, Sampler
from fewstep.errors import ConfigError
from fewstep.objectives.aims import Leg, Ray, Triple, place, target_aim
from fewstep.objectives.base import ALONE, Beside, LossOutput, Objective, StepRandom
from fewstep.objectives.pairs import draw_times, network_pass
from fewstep.penalty import Penalty
from fewstep.randomness import DropoutTape
from fewstep.segments import Axis, Clocks, Spacing, annealed, axis_of, gap_clocks, grid_clocks
from fewstep.times import Law, Lognormal, Mapping, Schedule, Sigmoid, Stages
from fewstep.types import Batch, PerSample, Progress, Samples


@dataclass(frozen=True)
class Grid:
    """Neighbouring nodes, uniformly drawn; N nodes in all, growing from ``first`` to ``last`` (algorithm 1).

    Args:
        first, last: number of nodes on the whole axis.
        share: the part of the run in which it grows, evenly in ln N; the paper's 100 of 200 thousand steps.
    """

    first: int = 64
    last: int = 1280
    share: float = 0.5
    kind: ClassVar[str] = "grid"

    def __post_init__(self) -> None:
        if not (1 <= self.first <= self.last and 0 <= self.share <= 1):
            raise ConfigError(
                "The grid of a multistep consistency model needs 1 <= first <= last and share in [0, 1]",
                got=(self.first, self.last, self.share),
            )

    def clocks(self, axis: Axis, counts: Tensor, student: Denoiser, progress: Progress, random: StepRandom) -> Clocks:
        """Times of the rows, on the host."""
        nodes = annealed(self.first, self.last, self.share, progress)
        return grid_clocks(axis, random.uniform("times"), counts, nodes)

    def tightness(self, progress: Progress) -> float | None:
        """N: neighbouring nodes are about t/N apart, or more."""
        return float(annealed(self.first, self.last, self.share, progress))

    def describe(self, progress: Progress) -> dict[str, float]:
        """N."""
        return {"nodes": annealed(self.first, self.last, self.share, progress)}


@dataclass(frozen=True)
class Gaps:
    """ECT's law of t and its gap, inside segments: ``r = max(t - (t - s) n(t)/q^a, s)`` (math.md 3.5; experimental).

    Args:
        law, mapping: as ECT's. schedule: as ECT's, too; by default the same q^a = 16 at any length of a run.
    """

    law: Law = field(default_factory=Lognormal)
    mapping: Mapping = field(default_factory=Sigmoid)
    schedule: Schedule = field(default_factory=lambda: Stages(q=16.0, last=0))
    kind: ClassVar[str] = "ect"

    def clocks(self, axis: Axis, counts: Tensor, student: Denoiser, progress: Progress, random: StepRandom) -> Clocks:
        """Times of the rows, on the host."""
        t = draw_times(self.law, student, random)
        fraction = self.mapping.n(t) / self.schedule.ratio(progress)
        return gap_clocks(t, axis.lower_edge(t, counts), fraction, student.sigma_min)

    def tightness(self, progress: Progress) -> float | None:
        """q^a."""
        return self.schedule.ratio(progress)

    def describe(self, progress: Progress) -> dict[str, float]:
        """Stage and the typical r/t at s = 0."""
        ratio = self.schedule.ratio(progress)
        return {"stage": float(self.schedule.stage(progress)), "r/t": 1 - 1 / ratio}


Pairing: TypeAlias = Grid | Gaps


@dataclass(frozen=True)
class Multistep(Objective):
    """``w(t) rho(g(x_t, t) - y)``: a jump aimed at g ends on the lower edge s of t's segment, as its target's does.

    ``y = inv_ddim(ddim(sg g(x_r, r), x_r, r -> s), x_t, t -> s)`` (algorithm 1). Rows with r = s take the step's own
    aim (x_0 on the data's ray) and never enter the network a second time. One segment is CT or ECT, as many segments
    as nodes are diffusion; S segments are sampled in S jumps. With several counts of segments, each row draws one
    and the network is told s: one checkpoint for every count (ours; experimental).

    Args:
        segments: how many equal parts of schedule time; of several counts each is as likely as it is often named.
        spacing: the schedule time.
        pairing: t and r inside a segment; :class:`Gaps` is ours.
        step: how x_t is carried to x_r: on the data's ray (consistency training), by the teacher's aDDIM (consistency
            distillation as published), or by its Heun step.
        penalty: distance and weight of ``g - y``; the published one is unsquared and Huber-smoothed. Weights in
            ``t - r`` see ``(t - r)/(1 - s/t)``, since g - y is ``1/(1 - s/t)`` times the mismatch at s.
    """

    segments: tuple[int, ...] = (8,)
    spacing: Spacing = "karras"
    pairing: Pairing = field(default_factory=Grid)
    step: Leg = field(default_factory=Ray)
    penalty: Penalty = field(default_factory=lambda: Penalty("pseudo_huber", "snr+1", 1e-4))
    kind: ClassVar[str] = "multistep"

    def __post_init__(self) -> None:
        if not self.segments or min(self.segments) < 1:
            raise ConfigError(
                "A multistep objective needs counts of segments of at least 1", got=self.segments, want="for example 8"
            )

    @property
    def needs_teacher(self) -> bool:
        return self.step.needs_teacher

    @property
    def compiles(self) -> bool:
        return True

    @property
    def two_time(self) -> bool:
        return len(set(self.segments)) > 1

    def sampler(self, student: Denoiser) -> tuple[Sampler, dict[int, tuple[float, ...]]]:
        axis = self.axis(student)
        return "jump", {count: axis.levels(count) for count in sorted(set(self.segments))}

    def axis(self, student: Denoiser) -> Axis:
        """Schedule time as noise levels, between those the student knows."""
        return axis_of(self.spacing, student.sigma_data, student.sigma_min, student.sigma_max)

    def loss(
        self, student: Denoiser, batch: Batch, progress: Progress, random: StepRandom, beside: Beside = ALONE
    ) -> LossOutput:
        """Loss per sample ``[b]``; ``student`` under the EDM clock, in training mode."""
        counts = self.draw_counts(random.uniform("segments"))
        clocks = self.pairing.clocks(self.axis(student), counts, student, progress, random)
        eps = random.normal("noise", batch.x)
        return LossOutput(self.loss_at(student, batch.x, clocks, eps, batch.cond, random.tape(), beside))

    def draw_counts(self, u: Tensor) -> Tensor:
        """A number of segments per row, int64 ``[b]``, from uniform numbers ``[b]`` in (0, 1)."""
        return torch.tensor(self.segments)[(u * len(self.segments)).long().clamp_max(len(self.segments) - 1)]

    def loss_at(
        self,
        student: Denoiser,
        x_0: Samples,
        clocks: Clocks,
        eps: Samples,
        cond: Tensor | None = None,
        tape: DropoutTape | None = None,
        beside: Beside = ALONE,
    ) -> PerSample:
        """The loss at explicit times (on the host) and noise."""
        all_three = place(x_0, eps, clocks, cond, beside.execute)
        return beside.execute(self.loss_between, student, all_three, tape, beside)

    def loss_between(
        self, student: Denoiser, all_three: Triple, tape: DropoutTape | None = None, beside: Beside = ALONE
    ) -> PerSample:
        """The loss once the times are known, all on the device."""
        both, x_t = all_three.pair, all_three.pair.x_t
        told = all_three.s if self.two_time else None
        g = network_pass(student, x_t, both.t, both.cond, tape and tape.record(), told)
        with torch.no_grad():
            aim, x_r = self.step(both, x_t, beside.teacher)
            y = target_aim(student, all_three, aim, x_r, tape, self.two_time)
        return self.penalty(g - y, both.t, all_three.clean_gap, student.sigma_data)

    def tightness(self, progress: Progress) -> float | None:
        return self.pairing.tightness(progress)

    def describe(self, progress: Progress) -> dict[str, float]:
        return self.pairing.describe(progress)
