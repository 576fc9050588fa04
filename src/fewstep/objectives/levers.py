"""Levers: changes that compose with any objective made of a student at t and a target at r."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from fewstep.denoiser import Denoiser
from fewstep.objectives.anchor import Anchor
from fewstep.objectives.base import Beside, StepRandom
from fewstep.objectives.couplings import Coupling, Independent
from fewstep.objectives.feature_distance import FeatureDistance
from fewstep.objectives.pairs import Pair
from fewstep.penalty import Penalty
from fewstep.types import Batch, PerSample, Samples


@dataclass(frozen=True)
class Levers:
    """What is changed about a two-point objective; nothing by default.

    Args:
        coupling: which noise goes with which image.
        distance: measures the gap in feature space instead of pixels.
        anchor: holds the student to the teacher's denoiser at small t.
    """

    coupling: Coupling = field(default_factory=Independent)
    distance: FeatureDistance | None = None
    anchor: Anchor | None = None

    @property
    def needs_teacher(self) -> bool:
        """Whether a lever follows the teacher."""
        return self.anchor is not None

    @property
    def low(self) -> float | None:
        """Below which t rows are anchored; None without an anchor. For :func:`fewstep.objectives.pairs.make_pair`."""
        return None if self.anchor is None else self.anchor.below

    @property
    def features(self) -> str | None:
        """The feature net that is needed, or None."""
        return None if self.distance is None else self.distance.net

    def extra(self, student: Denoiser) -> nn.Module | None:
        """Parameters trained beside the student."""
        return self.coupling.extra(student)

    def noise(self, batch: Batch, random: StepRandom, beside: Beside) -> tuple[Samples, PerSample | None]:
        """Noise ``[b, ...]`` coupled to the batch, and what the coupling itself costs, ``[b]`` or None."""
        return self.coupling(batch.x, random.normal("noise", batch.x), random, beside.extra)

    def penalise(
        self, penalty: Penalty, student: Denoiser, both: Pair, out: Samples, goal: Samples, beside: Beside
    ) -> PerSample:
        """The weighed gap between the student's ``out`` and the target's ``goal``, and the anchor, ``[b]``."""
        if self.distance is None:
            loss = penalty(out - goal, both.t, both.gap, student.sigma_data)
        else:
            loss = self.distance(penalty, out, goal, both.t, both.gap, student.sigma_data, beside.features)
        return loss if self.anchor is None else loss + self.anchor(out, both, beside.teacher)


NO_LEVERS = Levers()
"""The objective as published."""


def plus(loss: PerSample, cost: Tensor | None) -> PerSample:
    """``loss`` and, where there is one, the coupling's cost."""
    return loss if cost is None else loss + cost
