"""Continuous-time consistency models, sCT and sCD (Lu and Song, arXiv 2410.11081; math.md 3.8)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from fewstep.denoiser import Denoiser
from fewstep.derivative import Method, derivative, settle
from fewstep.errors import ConfigError
from fewstep.objectives.base import ALONE, Beside, LossOutput, Objective, StepRandom, to_device
from fewstep.objectives.bridges import require_teacher
from fewstep.objectives.pairs import draw_times, network_pass
from fewstep.process import expand
from fewstep.randomness import DropoutTape
from fewstep.times import Law, Lognormal
from fewstep.types import Batch, Condition, PerSample, Progress, Samples, Times


@dataclass(frozen=True)
class SCM(Objective):
    """``e^w(theta)/d |F - sg(F + g)|^2 - w(theta)`` with ``g = cos(theta) df/dtheta``, warmed up (eq. 3.2, 3.3).

    In TrigFlow coordinates ``theta = atan(t/sigma_d)``, ``z = cos x_t`` and ``f = cos z - sigma_d sin F``. F is taken
    from f, so every denoiser has one (for an EDM network it is minus the raw output). As ``d ln t = dtheta/(sin cos)``,

        ``g = [share df/dln t + (1 - share) cos^2 (f - D)] / sin,   F - sg F = -(f - sg f)/(sigma_d sin)``

    is eq. 3.2, where D is the clean end of the velocity: x_0 (sCT) or the teacher's D(x_t, t) (sCD). The derivative
    along ``ln t`` carries the factor ``sin cos`` of the published JVP rearrangement, so a network that is told
    ``ln(t)/4`` stays well conditioned up to theta = pi/2; what must be bounded is its slope in ``ln t``.

    Norms are root mean squares over the dimensions of a sample, ``g/(rms(g) + c)``, and the loss is a mean over them.
    The prior weight 1/(sigma_d tan) is inside g already.

    Args:
        law: law of t; the paper's ``ln t ~ N(-1, 1.6^2)``.
        velocity: "data" (sCT, unbiased and noisy) or "teacher" (sCD).
        warmup_images: the share of the tangent grows linearly from 0 (velocity matching) to 1 over so many images.
        c: of the normalised tangent, in units of the data; 0.1 is for sigma_d = 0.5.
        learned_weight: train w(theta) beside the student; otherwise w = 0.
        derivative: "jvp", "finite", or "auto": the first where the network can.
    """

    law: Law = field(default_factory=lambda: Lognormal(-1.0, 1.6))
    velocity: Literal["data", "teacher"] = "data"
    warmup_images: int = 1_280_000
    c: float = 0.1
    learned_weight: bool = True
    derivative: Method = "auto"
    kind: ClassVar[str] = "scm"

    def __post_init__(self) -> None:
        if self.warmup_images < 0 or self.c <= 0:
            raise ConfigError("sCM needs warmup_images >= 0 and c > 0", got=(self.warmup_images, self.c))

    def loss(
        self, student: Denoiser, batch: Batch, progress: Progress, random: StepRandom, beside: Beside = ALONE
    ) -> LossOutput:
        """Loss per sample ``[b]``; ``student`` under the EDM clock, in training mode."""
        t = draw_times(self.law, student, random)
        eps = random.normal("noise", batch.x)
        share = self.share(progress)
        return LossOutput(self.loss_at(student, batch.x, t, eps, share, batch.cond, random.tape(), beside))

    def loss_at(
        self,
        student: Denoiser,
        x_0: Samples,
        t: Times,
        eps: Samples,
        share: float = 1.0,
        cond: Condition | None = None,
        tape: DropoutTape | None = None,
        beside: Beside = ALONE,
    ) -> PerSample:
        """The loss at explicit times ``t [b]``, noise ``eps [b, ...]`` and share of the tangent."""
        t = to_device(t, x_0)
        x_t = x_0 + expand(t, x_0) * eps
        out = network_pass(student, x_t, t, cond, tape and tape.record())
        with torch.no_grad():
            clean = require_teacher(beside.teacher)(x_t, t, cond) if self.velocity == "teacher" else x_0
        goal = self.normalise(self.tangent(student, out.detach(), x_t, t, clean, share, cond, tape))
        theta = torch.atan(t / student.sigma_data)
        residual = (out - out.detach()) / (student.sigma_data * expand(theta.sin(), out)) + goal
        error = residual.square().flatten(1).mean(1)
        if beside.extra is None:
            return error
        weight = beside.extra(theta)
        return weight.exp() * error - weight

    def tangent(
        self,
        student: Denoiser,
        out: Samples,
        x_t: Samples,
        t: Times,
        clean: Samples,
        share: float,
        cond: Condition | None = None,
        tape: DropoutTape | None = None,
    ) -> Samples:
        """g of eq. 3.2, ``[b, ...]``, along the path towards ``clean``; ``out`` is the student's f(x_t, t)."""

        def function(x_t: Samples, t: Times) -> Samples:
            return network_pass(student, x_t, t, cond, tape and tape.replay())

        slope = derivative(function, (x_t, t), (x_t - clean, t), self.derivative)
        theta = expand(torch.atan(t / student.sigma_data), x_t)
        return (share * slope + (1 - share) * theta.cos() ** 2 * (out - clean)) / theta.sin()

    def normalise(self, g: Samples) -> Samples:
        """``g/(rms(g) + c)``, shorter than 1 in the root mean square."""
        rms = g.flatten(1).square().mean(1).sqrt()
        return g / expand(rms + self.c, g)

    def share(self, progress: Progress) -> float:
        """``min(1, images_seen/warmup_images)``."""
        return min(1.0, progress.images_seen / self.warmup_images) if self.warmup_images else 1.0

    def describe(self, progress: Progress) -> dict[str, float]:
        """The share of the tangent."""
        return {"share": self.share(progress)}

    @property
    def needs_teacher(self) -> bool:
        """For sCD."""
        return self.velocity == "teacher"

    def extra(self, student: Denoiser) -> nn.Module | None:
        """The learned weight."""
        return LearnedWeight().to(dtype=student.dtype) if self.learned_weight else None

    def prepare(self, student: Denoiser) -> SCM:
        """Settle how the derivative is taken."""
        return replace(self, derivative=settle(self.derivative, student))


class LearnedWeight(nn.Module):
    """``w(theta) = limit tanh(sum_k a_k cos(2 k theta)/limit)``, 0 at the start.

    ``e^w E - w`` is least at ``w = -ln E``; the limit keeps that finite where the error E vanishes, without cutting the
    gradient off. The cosines are complete on [0, pi/2], and the weight is linear in its few parameters.
    """

    def __init__(self, cosines: int = 32, limit: float = 10.0) -> None:
        super().__init__()
        self.limit = limit
        self.coefficients = nn.Parameter(torch.zeros(cosines))

    def forward(self, theta: Tensor) -> Tensor:
        order = torch.arange(len(self.coefficients), device=theta.device)
        series = ((2 * theta[:, None] * order).cos() * self.coefficients).sum(1)  # a matrix product would be autocast
        return self.limit * (series / self.limit).tanh()
