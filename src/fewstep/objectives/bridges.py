"""Bridges: how x_t is carried to the cleaner time r (math.md 2.1, 3.4)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from fewstep.denoiser import Denoiser
from fewstep.errors import ConfigError
from fewstep.guidance import Guided, require_condition
from fewstep.jumps import euler_step, heun_step
from fewstep.objectives.pairs import Pair
from fewstep.process import expand
from fewstep.types import Condition, Samples, Times


@dataclass(frozen=True)
class DataRay:
    """``x_r = x_0 + r eps``: one Euler step with the one-sample, unbiased velocity (math.md eq. 2.3)."""

    kind: ClassVar[str] = "data"

    def __call__(self, both: Pair, x_t: Samples, teacher: Denoiser | None) -> Samples:
        """``x_r [b, ...]``."""
        return both.x_0 + expand(both.r, x_t).to(x_t.dtype) * both.eps

    @property
    def needs_teacher(self) -> bool:
        return False


@dataclass(frozen=True)
class TeacherStep:
    """One step of the teacher's probability-flow ODE from t to r (math.md 3.3, 3.4).

    Args:
        solver: "heun" (second order, two evaluations) or "euler" (first order, one).
        guidance: classifier-free guidance of the ODE, ``v_u + guidance (v_c - v_u)``, for conditional teachers that
            know what "no label" is; 1 is none. It doubles the evaluations.
        guidance_max: every row draws its own strength, evenly between ``guidance`` and this, and the student is told
            it: one student for all of them (arXiv 2210.03142). None is one strength for all, which it is not told.
    """

    solver: Literal["heun", "euler"] = "heun"
    guidance: float = 1.0
    guidance_max: float | None = None
    kind: ClassVar[str] = "teacher"

    def __post_init__(self) -> None:
        check_strength(self.guidance, self.guidance_max)

    def __call__(self, both: Pair, x_t: Samples, teacher: Denoiser | None) -> Samples:
        """``x_r [b, ...]``; where r = 0 it is the teacher's ``D(x_t, t)``."""
        model = require_teacher(teacher)
        step = heun_step if self.solver == "heun" else euler_step
        weight = self.guidance if both.guidance is None else both.guidance
        plain = not isinstance(weight, Tensor) and weight == 1
        return step(model if plain else Guided(model, weight), x_t, both.t, both.r, both.cond)

    @property
    def needs_teacher(self) -> bool:
        return True


@dataclass(frozen=True)
class GuidedRay:
    """The data's noise ray, bent to where guidance points (math.md 3.4, form 2; experimental).

    ``x_r = x_t + (r - t) (eps + (w - 1) (v_c - v_u))`` with the teacher's velocities at x_t; its conditional mean is
    the guided velocity. Rows without a label stay on the ray. The teacher must know what "no label" is: pretrained
    with ``data.label_drop`` above 0.

    Args:
        guidance: w; 1 is the ray itself.
        guidance_max: as of :class:`TeacherStep`: w drawn per row, and told.
    """

    guidance: float = 1.5
    guidance_max: float | None = None
    kind: ClassVar[str] = "guided"

    def __post_init__(self) -> None:
        check_strength(self.guidance, self.guidance_max)

    def __call__(self, both: Pair, x_t: Samples, teacher: Denoiser | None) -> Samples:
        """``x_r = x_0 + r eps + (w - 1) (1 - r/t) (D_c - D_u)``, ``[b, ...]``."""
        ray = DataRay()(both, x_t, teacher)
        if not self.needs_teacher:
            return ray
        model, weight = require_teacher(teacher), self.guidance if both.guidance is None else both.guidance
        require_condition(model)
        shift = model(x_t, both.t, both.cond) - model(x_t, both.t, None)
        return ray + expand((weight - 1) * both.gap / both.t, x_t).to(x_t.dtype) * shift

    @property
    def needs_teacher(self) -> bool:
        return self.guidance != 1 or self.guidance_max is not None


@dataclass(frozen=True)
class ReferenceBatch:
    """The data's noise ray with the batch's posterior mean for x_0 (SCT, arXiv 2410.18958; experimental).

    ``x_r = x_t + (r - t) (x_t - mean)/t``, ``mean = sum_j w_j x_0^j``, ``w = softmax_j(-|x_t - x_0^j|^2/(2 t^2))``
    over the rows j of the batch that have the row's label (math.md 3.13). The row's own image is among them: given
    x_t and the set of images, which of them made x_t is distributed as w, so the mean over batches is exactly
    D(x_t, t), and its variance never exceeds the ray's. On a batch that is the whole data set the mean is D itself.
    All this needs noise that is independent of the image: no coupling.

    The batch is this process's micro-batch: a row's loss depends on the others (G6 exempt), and the result of a run
    on micro-batches and the number of processes. Costs b^2 distances, no evaluation of a network.
    """

    kind: ClassVar[str] = "reference"

    def __call__(self, both: Pair, x_t: Samples, teacher: Denoiser | None) -> Samples:
        """``x_r = x_0 + r eps + (1 - r/t) (mean - x_0)``, ``[b, ...]``."""
        shift = posterior_shift(both.x_0, x_t, both.t, both.cond)
        return DataRay()(both, x_t, teacher) + expand(both.gap / both.t, x_t).to(x_t.dtype) * shift

    @property
    def needs_teacher(self) -> bool:
        return False


def posterior_shift(x_0: Samples, x_t: Samples, t: Times, cond: Condition | None) -> Samples:
    """Posterior mean over the batch minus x_0, ``[b, ...]``, in float32 or better.

    Distances are sums of squared differences and the own image drops out: nothing cancels at small t. In float32 and
    thousands of dimensions the weights are good to 1e-3.
    """
    exact, wide = "donot_use_mm_for_euclid_dist", torch.promote_types(x_t.dtype, torch.float32)
    with torch.autocast(x_t.device.type, enabled=False):
        images, points = x_0.flatten(1).to(wide), x_t.flatten(1).to(wide)
        scaled = torch.cdist(points, images, compute_mode=exact) / t.to(wide)[:, None]
        logits = -scaled.square() / 2
        if cond is not None:
            labels = cond.to(wide)
            logits = logits.masked_fill(torch.cdist(labels, labels, compute_mode=exact) > 0, -torch.inf)
        own = torch.eye(len(images), dtype=torch.bool, device=images.device)
        others = logits.softmax(1).masked_fill(own, 0)
        return (others @ images - others.sum(1, keepdim=True) * images).reshape(x_t.shape)


DataBridge: TypeAlias = DataRay | GuidedRay | ReferenceBatch
"""Bridges whose conditional mean is the data's own probability-flow ODE, guided or not."""


def check_strength(low: float, high: float | None) -> None:
    """Refuse a strength of guidance, or a range of them, that is none.

    Raises:
        ConfigError: with what was given.
    """
    if not math.isfinite(low) or (high is not None and not low < high < math.inf):
        raise ConfigError(
            "The strengths of guidance are no range",
            got=f"guidance={low}, guidance_max={high}",
            want="guidance below guidance_max, both finite; guidance_max=null for one strength",
        )


def require_teacher(teacher: Denoiser | None) -> Denoiser:
    """The teacher, or an error that says how to get one."""
    if teacher is None:
        raise ConfigError(
            "This objective follows a teacher, and there is none",
            do="Tune from a diffusion model: fewstep tune TEACHER --data SOURCE",
        )
    return teacher
