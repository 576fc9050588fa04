"""Guided students: a pretrained network that is also told how strongly its condition is to guide it."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from fewstep.backbones.two_time import LandingEmbedding
from fewstep.denoiser import Denoiser
from fewstep.errors import ConfigError
from fewstep.guidance import require_condition
from fewstep.types import Condition, Samples


class GuidanceTold(nn.Module):
    """``F(x, c_noise, cond, guidance=w)``: ``inner``, an embedding of ``asinh(w - 1)/4`` added to its noise embedding.

    At the start the added term is zero and the output that of ``inner``, bit for bit, whatever w is. Rows whose
    condition says nothing are told w = 1: there is nothing to be guided by (math.md 3.4, D_c = D_u).
    Source: On Distillation of Guided Diffusion Models (arXiv 2210.03142), whose students are told w.

    Args:
        inner: a conditional network whose ``forward`` takes ``landing [b, inner.landing_width]``.
        low, high: the strengths that it is trained for.
        seed: of the first weights of the embedding.

    Raises:
        ConfigError: the network takes no such embedding.
    """

    guided: ClassVar[bool] = True

    def __init__(self, inner: nn.Module, low: float, high: float, seed: int = 0) -> None:
        super().__init__()
        width = getattr(inner, "landing_width", None)
        if not isinstance(width, int):
            raise ConfigError(
                "This network cannot be told a strength of guidance",
                got=f"a {type(inner).__name__}",
                want="a network with one time that takes an embedding: the library's own, or of diffusers",
                do="Tune for one strength: leave objective.bridge.guidance_max out",
            )
        self.inner, self.guidance_range = inner, (float(low), float(high))
        self.strength = LandingEmbedding(width, seed, columns=1)

    @property
    def null_cond(self) -> Tensor | None:
        """The condition ``[width]`` that says nothing; None is zeros."""
        return getattr(self.inner, "null_cond", None)

    def forward(self, x: Samples, c_noise: Tensor, cond: Condition | None, *, guidance: Tensor) -> Tensor:
        excess = torch.zeros_like(guidance) if cond is None else torch.where(self.says(cond), guidance - 1, 0)
        return self.inner(x, c_noise, cond, landing=self.strength(excess.asinh()[:, None] / 4))

    def says(self, cond: Condition) -> Tensor:
        """Which rows of ``cond [b, width]`` say something, bool ``[b]``."""
        nothing = 0 if self.null_cond is None else self.null_cond.to(cond)
        return (cond != nothing).any(dim=1)


def with_guidance(denoiser: Denoiser, low: float, high: float, seed: int = 0) -> Denoiser:
    """The same network (shared weights) as a student that is told w, equal to ``denoiser`` bit for bit at the start.

    One that is told w already keeps its embedding and gets the new range.

    Args:
        low, high: the strengths that it is to be trained for.
        seed: of the embedding's first weights; the global generator is not used.

    Raises:
        ConfigError: an unconditional model, or a network that cannot be told.
    """
    require_condition(denoiser)
    known = denoiser.backbone if isinstance(denoiser.backbone, GuidanceTold) else None
    inner, spec = (denoiser.backbone, denoiser.spec) if known is None else (known.inner, _inner_spec(denoiser))
    network = GuidanceTold(inner, low, high, seed)
    network.strength.to(device=denoiser.device, dtype=denoiser.dtype)
    if known is not None:
        network.strength = known.strength
    told = None if spec is None else {"name": "guided", "kwargs": {"inner": spec, "low": low, "high": high}}
    return denoiser.around(network, told)


def _inner_spec(denoiser: Denoiser) -> dict[str, object] | None:
    return None if denoiser.spec is None else denoiser.spec["kwargs"]["inner"]
