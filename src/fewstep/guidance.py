"""Classifier-free guidance: a denoiser that wraps a denoiser."""

from __future__ import annotations

from torch import Tensor, nn

from fewstep.denoiser import Denoiser
from fewstep.errors import ConfigError
from fewstep.types import Samples, Times


class Guided(nn.Module):
    """Guidance at sampling time, ``D_u + w (D_c - D_u)`` (math.md 3.4 form 3).

    On a consistency model this is a heuristic: the guided flow's end point is not linear in w.
    """

    def __init__(self, denoiser: Denoiser, weight: float) -> None:
        super().__init__()
        if denoiser.num_classes == 0:
            raise ConfigError("Guidance needs a class-conditional model", got="an unconditional one")
        self.denoiser, self.weight = denoiser, weight

    def forward(
        self, x_t: Samples, t: Times | float, cond: Tensor | None = None, s: Times | float | None = None
    ) -> Samples:
        """``[b, ...]`` as :class:`Denoiser`; two evaluations of the network."""
        unconditional = self.denoiser(x_t, t, None, s)
        return unconditional + self.weight * (self.denoiser(x_t, t, cond, s) - unconditional)
