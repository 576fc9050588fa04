"""What objectives made of a student at t and a target at r have in common: a bridge, a penalty and levers."""

from __future__ import annotations

from torch import Tensor, nn

from fewstep.denoiser import Denoiser
from fewstep.errors import ConfigError
from fewstep.guidance import require_condition
from fewstep.objectives.base import ALONE, Beside, LossOutput, Objective, StepRandom
from fewstep.objectives.bridges import DataRay, GuidedRay, ReferenceBatch
from fewstep.objectives.couplings import Independent
from fewstep.objectives.levers import Levers, plus
from fewstep.objectives.pairs import Bridge, Pair, draw_times, make_pair, predictions
from fewstep.penalty import Penalty
from fewstep.randomness import DropoutTape
from fewstep.times import Law, Mapping, Schedule, pair
from fewstep.types import Batch, PerSample, Progress, Samples, Times


class TwoPoint(Objective):
    """``w(t, r) rho(f(x_t, t) - sg f(x_r, r))``; the subclass says who the target is and where t and r come from."""

    penalty: Penalty
    bridge: Bridge = DataRay()
    levers: Levers

    @property
    def needs_teacher(self) -> bool:
        return self.bridge.needs_teacher or self.levers.needs_teacher

    @property
    def compiles(self) -> bool:
        return self.levers.anchor is None  # each number of rows at low t would be another graph

    @property
    def guidance_range(self) -> tuple[float, float] | None:
        high = getattr(self.bridge, "guidance_max", None)
        return None if high is None else (getattr(self.bridge, "guidance", 1.0), high)

    @property
    def features(self) -> str | None:
        return self.levers.features

    def extra(self, student: Denoiser) -> nn.Module | None:
        return self.levers.extra(student)

    def prepare(self, student: Denoiser) -> Objective:
        """Refuse a guidance without conditions, and a coupling where the bridge needs independent noise.

        Raises:
            ConfigError: with the remedy.
        """
        if self.guides:
            require_condition(student, do="Set objective.bridge.guidance=1 objective.bridge.guidance_max=null")
        if isinstance(self.bridge, ReferenceBatch | GuidedRay) and not isinstance(self.levers.coupling, Independent):
            raise ConfigError(
                f"The bridge '{self.bridge.kind}' is only right for noise that is independent of the image",
                got=f"coupling '{self.levers.coupling.kind}'",
                do="Choose one of the two: objective.bridge.kind=data, or objective.levers.coupling.kind=independent",
            )
        return self

    def strengths(self, random: StepRandom) -> Times | None:
        """A strength of guidance per row, float64 ``[b]`` on the host; None where the student is not told it."""
        if self.guidance_range is None:
            return None
        low, high = self.guidance_range
        return low + (high - low) * random.uniform("guidance")

    def gap_loss(
        self, student: Denoiser, target: Denoiser, both: Pair, tape: DropoutTape | None, beside: Beside
    ) -> PerSample:
        """The loss once the times are known, all on the device, ``[b]``."""
        out, goal = predictions(student, target, both, self.bridge, tape, beside)
        return self.levers.penalise(self.penalty, student, both, out, goal, beside)


class Neighbours(TwoPoint):
    """A :class:`TwoPoint` whose t and r are neighbours on a grid; the subclass draws them and names the target."""

    def neighbours(self, student: Denoiser, progress: Progress, u: Tensor) -> tuple[Times, Times]:
        """``t > r >= 0``, float64 ``[b]`` on the host, from uniform numbers ``u [b]``."""
        raise NotImplementedError

    def target_of(self, student: Denoiser, beside: Beside) -> Denoiser:
        """The network at r; by default the student itself, without gradient."""
        return student

    def loss(
        self, student: Denoiser, batch: Batch, progress: Progress, random: StepRandom, beside: Beside = ALONE
    ) -> LossOutput:
        """Loss per sample ``[b]``; ``student`` under the EDM clock, in training mode."""
        t, r = self.neighbours(student, progress, random.uniform("times"))
        eps, cost = self.levers.noise(batch, random, beside)
        told = self.strengths(random)
        loss = self.loss_at(student, batch.x, t, r, eps, batch.cond, random.tape(), beside, told)
        return LossOutput(plus(loss, cost))

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
        guidance: Times | None = None,
    ) -> PerSample:
        """The loss at explicit host times ``t > r >= 0 [b]``, noise ``eps [b, ...]`` and strengths of guidance."""
        both = make_pair(x_0, eps, t, r, t - r, cond, self.levers.low, guidance, beside.execute)
        return beside.execute(self.gap_loss, student, self.target_of(student, beside), both, tape, beside)


class Tightening(TwoPoint):
    """A :class:`TwoPoint` with t of a law and ``r = m(t)`` that a schedule tightens; the target is the student."""

    law: Law
    mapping: Mapping
    schedule: Schedule

    def loss(
        self, student: Denoiser, batch: Batch, progress: Progress, random: StepRandom, beside: Beside = ALONE
    ) -> LossOutput:
        """Loss per sample ``[b]``; ``student`` under the EDM clock, in training mode."""
        t = draw_times(self.law, student, random)
        eps, cost = self.levers.noise(batch, random, beside)
        ratio = self.schedule.ratio(progress)
        told = self.strengths(random)
        loss = self.loss_at(student, batch.x, t, eps, ratio, batch.cond, random.tape(), beside, told)
        return LossOutput(plus(loss, cost))

    def loss_at(
        self,
        student: Denoiser,
        x_0: Samples,
        t: Tensor,
        eps: Samples,
        ratio: float,
        cond: Tensor | None = None,
        tape: DropoutTape | None = None,
        beside: Beside = ALONE,
        guidance: Times | None = None,
    ) -> PerSample:
        """The loss at explicit times, noise and ``ratio = q^a``.

        Args:
            student: denoiser under the EDM clock.
            x_0: data ``[b, ...]``; eps: noise of the same shape.
            t: times ``[b]`` on the host: which rows have r = 0 is decided there, without asking the device.
            tape: shares dropout masks between the two passes; None if the network has no dropout.
            guidance: strengths w ``[b]`` on the host, where the student is told them.
        """
        r, gap = pair(self.mapping, t.double(), ratio, student.sigma_min)
        both = make_pair(x_0, eps, t, r, gap, cond, self.levers.low, guidance, beside.execute)
        return beside.execute(self.loss_between, student, both, tape, beside)

    def loss_between(
        self, student: Denoiser, both: Pair, tape: DropoutTape | None = None, beside: Beside = ALONE
    ) -> PerSample:
        """The loss once the times are known, all on the device; ``torch.compile`` makes one graph of it."""
        return self.gap_loss(student, student, both, tape, beside)

    def tightness(self, progress: Progress) -> float | None:
        return self.schedule.ratio(progress)

    def describe(self, progress: Progress) -> dict[str, float]:
        """Stage and the typical r/t (at large t, where n(t) = 1)."""
        ratio = self.schedule.ratio(progress)
        return {"stage": float(self.schedule.stage(progress)), "r/t": 1 - 1 / ratio}
