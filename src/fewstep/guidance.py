"""Guidance towards a condition: by two evaluations of a network, or by telling its strength to one that knows it."""

from __future__ import annotations

from torch import Tensor, nn

from fewstep.denoiser import Denoiser
from fewstep.errors import ConfigError
from fewstep.process import expand
from fewstep.types import Samples, Times


class Guided(nn.Module):
    """The model at strength w: ``D_u + w (D_c - D_u)`` (math.md 3.4), or what a guided student makes when told w.

    On a diffusion model it is the guided flow. On a consistency model it is a heuristic (form 3): the guided flow's end
    point is not linear in w; a student that was tuned with guidance is not guided a second time but told w.
    What a model does without a condition, it must have learnt: with ``data.label_drop`` above 0.

    Args:
        weight: w, one for all or one per row ``[b]``; 1 is no guidance.

    Raises:
        ConfigError: an unconditional model, or a strength that a guided student was not tuned for.
    """

    def __init__(self, denoiser: Denoiser, weight: float | Times) -> None:
        super().__init__()
        require_condition(denoiser)
        low, high = denoiser.guidance_range
        if isinstance(weight, int | float) and not low <= weight <= high:
            raise ConfigError(
                "This student was not tuned for that strength of guidance", got=weight, want=f"{low:g} to {high:g}"
            )
        self.denoiser, self.weight = denoiser, weight

    def forward(
        self, x_t: Samples, t: Times | float, cond: Tensor | None = None, s: Times | float | None = None
    ) -> Samples:
        """``[b, ...]`` as :class:`Denoiser`; :func:`evaluations` of the network."""
        if self.denoiser.guided:
            return self.denoiser(x_t, t, cond, s, self.weight)
        weight = self.weight
        if isinstance(weight, Tensor):
            weight = expand(weight, x_t).to(x_t.dtype)
        unconditional = self.denoiser(x_t, t, None, s)
        return unconditional + weight * (self.denoiser(x_t, t, cond, s) - unconditional)


def require_condition(denoiser: Denoiser, do: str | None = None) -> None:
    """Refuse to guide a model that has nothing to be guided by; ``do`` is the remedy.

    Raises:
        ConfigError: it is unconditional.
    """
    if not denoiser.conditioning:
        raise ConfigError(
            "Guidance needs a class-conditional model, or a text-conditional one", got="an unconditional one", do=do
        )


def evaluations(denoiser: Denoiser, guidance: float | None) -> int:
    """Evaluations of the network for one of the guided model: 2, or 1 without guidance and of a guided student."""
    return 1 if guidance is None or guidance == 1 or denoiser.guided else 2
