"""The low-t anchor: a consistency model stays a denoiser near the data (math.md 3.14; experimental)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fewstep.denoiser import Denoiser
from fewstep.errors import ConfigError
from fewstep.objectives.bridges import require_teacher
from fewstep.objectives.pairs import Pair
from fewstep.types import PerSample, Samples


@dataclass(frozen=True)
class Anchor:
    """``weight |f(x_t, t) - D_teacher(x_t, t)|^2 / t^2`` on rows with ``t < below`` (math.md 3.14; experimental).

    ``1/t^2`` is ``1/c_out^2`` at small t: the distance is that of the raw network outputs, and ``weight`` has no units.
    The exact consistency function pays ``~ weight |D|^2 t^2/(4 lambda^2)`` on N(0, lambda), since ``f/D = sqrt(1 +
    t^2/lambda)``: the anchor is a bias of order ``below^2``, not for large ``below``. No paper has it.

    Args:
        below: the largest t that is anchored, in units of the data.
        weight: of the term.
    """

    below: float = 0.1
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not (self.below > 0 and self.weight >= 0):
            got = f"below={self.below}, weight={self.weight}"
            raise ConfigError("The anchor has no place or pulls backwards", got=got, want="below > 0 and weight >= 0")

    def __call__(self, out: Samples, both: Pair, teacher: Denoiser | None) -> PerSample:
        """The term per sample, ``[b]``, 0 where it does not apply; ``out [b, ...]`` is the student's f(x_t, t).

        Only the rows ``both.low`` go through the teacher.
        """
        low = both.low
        if low is None:
            raise ConfigError("This objective does not say which of its rows have a low t", do="Leave the anchor out")
        if len(low) == 0:
            return torch.zeros_like(both.t)
        t, cond = both.t[low], None if both.cond is None else both.cond[low]
        with torch.no_grad():
            goal = require_teacher(teacher)(both.x_t[low], t, cond)
        square = (out[low] - goal).to(t.dtype).flatten(1).square().sum(1)
        return torch.zeros_like(both.t).index_copy(0, low, self.weight * square / t**2)
