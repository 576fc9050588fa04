"""Two-time students: a pretrained network that is also told the noise level at which it is to land."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.denoiser import Denoiser
from fewstep.errors import ConfigError
from fewstep.types import Condition, Samples

_FREQUENCIES = 16


class LandingEmbedding(nn.Module):
    """``c_landing [b, 2] -> [b, width]``: cosines and sines of 1/8 to 2 turns, then an MLP; its last layer starts at 0.

    Low frequencies only, because tangents pass through it (math.md 3.8). All parameters come from ``seed``. With
    ``columns`` other than 2 it embeds as many other numbers.
    """

    frequencies: Tensor

    def __init__(self, width: int, seed: int, columns: int = 2) -> None:
        super().__init__()
        turns = torch.logspace(-3, 1, _FREQUENCIES, base=2.0, dtype=torch.float64)
        self.register_buffer("frequencies", (2 * math.pi * turns).float(), persistent=False)
        inputs = 2 * columns * _FREQUENCIES
        with torch.random.fork_rng(devices=[]):
            self.first, self.last = nn.Linear(inputs, width), nn.Linear(width, width)
        drawn = torch.randn(width, inputs, generator=torch.Generator().manual_seed(seed), device="cpu")
        with torch.no_grad():
            self.first.weight.copy_(drawn / math.sqrt(inputs))
        for zero in (self.first.bias, *self.last.parameters()):
            nn.init.zeros_(zero)

    def forward(self, c_landing: Tensor) -> Tensor:
        angle = (c_landing[:, :, None] * self.frequencies.to(c_landing.dtype)).flatten(1)
        features = torch.cat((angle.cos(), angle.sin()), dim=1).to(self.first.weight.dtype)
        return self.last(F.silu(self.first(features)))


class TwoTime(nn.Module):
    """``F(x, c_noise, cond, c_landing)``: ``inner`` with a :class:`LandingEmbedding` added to its noise embedding.

    At the start the added term is zero and the output that of ``inner``, bit for bit, wherever it is to land.
    Source: Consistency Trajectory Models (arXiv 2310.02279), which embed the second time like the first.

    Args:
        inner: a network whose ``forward`` takes ``landing [b, inner.landing_width]``: edm, adm, edm2, unet, dit or mlp.
        seed: of the first weights of the embedding.

    Raises:
        ConfigError: the network takes no landing time.
    """

    two_time: ClassVar[bool] = True

    def __init__(self, inner: nn.Module, seed: int = 0) -> None:
        super().__init__()
        width = getattr(inner, "landing_width", None)
        if not isinstance(width, int):
            raise ConfigError(
                "This network cannot be told a landing time, which this kind of student needs",
                got=f"a {type(inner).__name__}",
                want="one of the library's own networks: edm, adm, edm2, unet, dit or mlp",
                do="Choose an objective with one time, for example --objective ect, or tune from such a network",
            )
        self.inner = inner
        self.landing = LandingEmbedding(width, seed)

    @property
    def null_cond(self) -> Tensor | None:
        """The condition ``[width]`` that says nothing; None is zeros."""
        return getattr(self.inner, "null_cond", None)

    def forward(self, x: Samples, c_noise: Tensor, cond: Condition | None, c_landing: Tensor) -> Tensor:
        return self.inner(x, c_noise, cond, landing=self.landing(c_landing))


def with_landing(denoiser: Denoiser, seed: int = 0) -> Denoiser:
    """The same network (shared weights) as a two-time student, equal to ``denoiser`` bit for bit at the start.

    Args:
        seed: of the landing embedding's first weights; the global generator is not used.

    Raises:
        ConfigError: the network is not one of the library's own.
    """
    if denoiser.two_time:
        return denoiser
    network = TwoTime(denoiser.backbone, seed)
    network.landing.to(device=denoiser.device, dtype=denoiser.dtype)
    spec = None if denoiser.spec is None else {"name": "two_time", "kwargs": {"inner": denoiser.spec}}
    return denoiser.around(network, spec)
