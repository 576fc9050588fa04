"""Gaussian noise processes ``x_t = alpha(t) x_0 + sigma(t) eps`` and the exact ways between them.

Every process is reached from the canonical EDM coordinates by ``x_edm = x_t / alpha`` and
``sigma_edm = sigma / alpha`` (math.md 1.1). Every prediction type is one affine form
``x_0 = a x_t + b value`` (math.md 1.2), written once in :func:`affine`.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import lru_cache
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor

from fewstep.errors import ConfigError, nearest
from fewstep.types import Samples, Times

PREDICTIONS = ("x0", "eps", "score", "sigma_score", "v", "flow", "velocity", "edm", "trig")


def expand(t: Times, like: Samples) -> Tensor:
    """``t`` of shape ``[b]`` (or a scalar) as ``[b, 1, ...]``, to broadcast over ``like [b, ...]``."""
    return t if t.ndim == 0 else t.reshape(-1, *[1] * (like.ndim - 1))


def affine(kind: str, alpha: Tensor, sigma: Tensor, sigma_data: float = 0.5) -> tuple[Tensor, Tensor]:
    """Coefficients of ``x_0 = a x_t + b value`` for a prediction ``kind`` (math.md 1.2).

    Args:
        kind: "x0", "eps", "score" (of the native marginal), "sigma_score" (sigma * score), "v"
            (alpha eps - sigma x0), "flow" (eps - x0), "edm" (the raw EDM network F) or "trig"
            (the raw TrigFlow network, ``F_trig = -F_edm``, eq. 1.2).
        alpha, sigma: of the process at t, any shape.
        sigma_data: standard deviation of the data, used by "edm" and "trig".

    Raises:
        ConfigError: the kind is unknown.
    """
    if kind == "x0":
        return torch.zeros_like(alpha), torch.ones_like(alpha)
    if kind == "eps":
        return 1 / alpha, -sigma / alpha
    if kind == "score":
        return 1 / alpha, sigma**2 / alpha
    if kind == "sigma_score":
        return 1 / alpha, sigma / alpha
    if kind == "v":
        norm = alpha**2 + sigma**2
        return alpha / norm, -sigma / norm
    if kind == "flow":
        return 1 / (alpha + sigma), -sigma / (alpha + sigma)
    if kind in ("edm", "trig"):
        t = sigma / alpha
        c_skip = sigma_data**2 / (t**2 + sigma_data**2)
        c_out = t * sigma_data / (t**2 + sigma_data**2).sqrt()
        return c_skip / alpha, c_out if kind == "edm" else -c_out
    raise ConfigError(f"'{kind}' is not a prediction type", do=nearest(kind, PREDICTIONS))


@dataclass(frozen=True)
class Process(ABC):
    """A Gaussian path in its own ("native") time ``t``: ``x_t = alpha(t) x_0 + sigma(t) eps``.

    Times may be float tensors of any shape; results have the shape of ``t``.
    """

    kind: ClassVar[str]

    @abstractmethod
    def alpha(self, t: Times) -> Tensor:
        """Signal scale at native time ``t``."""

    @abstractmethod
    def sigma(self, t: Times) -> Tensor:
        """Noise scale at native time ``t``."""

    @abstractmethod
    def from_edm(self, sigma: Times) -> Times:
        """Native time at which ``sigma(t) / alpha(t)`` equals the EDM noise level ``sigma``."""

    @abstractmethod
    def edm_scale(self, sigma: Times) -> Tensor:
        """``alpha`` as a function of the EDM noise level: ``x_t = edm_scale * x_edm`` (math.md 1.1)."""

    @abstractmethod
    def derivatives(self, t: Times) -> tuple[Tensor, Tensor]:
        """``(d alpha / dt, d sigma / dt)`` at native time ``t``."""

    @property
    def edm_range(self) -> tuple[float, float]:
        """EDM noise levels on which a network of this process was trained; (0, inf) if all."""
        return 0.0, math.inf

    def to_edm(self, t: Times) -> Times:
        """EDM noise level ``sigma(t) / alpha(t)`` (math.md 1.1)."""
        return self.sigma(t) / self.alpha(t)

    def perturb(self, x_0: Samples, eps: Samples, t: Times) -> Samples:
        """``x_t = alpha x_0 + sigma eps``; ``x_0``, ``eps`` ``[b, ...]``, ``t`` ``[b]``."""
        t = expand(t, x_0)
        return self.alpha(t) * x_0 + self.sigma(t) * eps

    def velocity(self, x_0: Samples, eps: Samples, t: Times) -> Samples:
        """``dx_t/dt = alpha' x_0 + sigma' eps`` along the conditional path."""
        d_alpha, d_sigma = self.derivatives(expand(t, x_0))
        return d_alpha * x_0 + d_sigma * eps

    def jump(self, x_t: Samples, x_0: Samples, t: Times, s: Times) -> Samples:
        """DDIM step from t to s given ``x_0``: ``alpha_s x_0 + sigma_s/sigma_t (x_t - alpha_t x_0)`` (math.md 3.5)."""
        t, s = expand(t, x_t), expand(s, x_t)
        return self.alpha(s) * x_0 + self.sigma(s) / self.sigma(t) * (x_t - self.alpha(t) * x_0)

    def convert(
        self, value: Samples, kind: str, to: str, x_t: Samples, t: Times, *, sigma_data: float = 0.5
    ) -> Samples:
        """The same prediction in another form, exactly (math.md 1.2); all ``[b, ...]``, ``t`` ``[b]``.

        Args:
            value: the prediction at ``(x_t, t)``.
            kind, to: members of ``PREDICTIONS``; "velocity" is ``alpha' x_0 + sigma' eps``.

        Raises:
            ConfigError: an unknown kind. At sigma = 0 only "x0" exists: others are not finite there.
        """
        a, b = self._affine(kind, expand(t, x_t), sigma_data)
        x_0 = a * x_t + b * value
        a, b = self._affine(to, expand(t, x_t), sigma_data)
        return (x_0 - a * x_t) / b

    def _affine(self, kind: str, t: Tensor, sigma_data: float) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.alpha(t), self.sigma(t)
        if kind == "velocity":
            d_alpha, d_sigma = self.derivatives(t)
            det = alpha * d_sigma - d_alpha * sigma
            return d_sigma / det, -sigma / det
        return affine(kind, alpha, sigma, sigma_data)


@dataclass(frozen=True)
class EDM(Process):
    """Variance exploding, ``x_t = x_0 + t eps`` (Karras et al. 2022): time is the noise level."""

    kind: ClassVar[str] = "edm"

    def alpha(self, t: Times) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Times) -> Tensor:
        return t

    def from_edm(self, sigma: Times) -> Times:
        return sigma

    def edm_scale(self, sigma: Times) -> Tensor:
        return torch.ones_like(sigma)

    def derivatives(self, t: Times) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(t), torch.ones_like(t)


@dataclass(frozen=True)
class VP(Process):
    """Variance-preserving SDE, ``sigma_edm(t) = sqrt(exp(beta_d t^2/2 + beta_min t) - 1)`` (EDM table 1)."""

    beta_d: float = 19.9
    beta_min: float = 0.1
    kind: ClassVar[str] = "vp"

    def alpha(self, t: Times) -> Tensor:
        return (-0.5 * (0.5 * self.beta_d * t**2 + self.beta_min * t)).exp()

    def sigma(self, t: Times) -> Tensor:
        return (-torch.expm1(-(0.5 * self.beta_d * t**2 + self.beta_min * t))).sqrt()

    def from_edm(self, sigma: Times) -> Times:
        root = (self.beta_min**2 + 2 * self.beta_d * torch.log1p(sigma**2)).sqrt()
        return (root - self.beta_min) / self.beta_d

    def edm_scale(self, sigma: Times) -> Tensor:
        return (1 + sigma**2).rsqrt()

    def derivatives(self, t: Times) -> tuple[Tensor, Tensor]:
        rate = 0.5 * (self.beta_d * t + self.beta_min)
        alpha, sigma = self.alpha(t), self.sigma(t)
        return -rate * alpha, rate * alpha**2 / sigma


@dataclass(frozen=True)
class RectifiedFlow(Process):
    """Rectified flow, ``x_t = (1 - t) x_0 + t eps`` on t in [0, 1] (Liu et al. 2022; Lipman et al. 2022)."""

    kind: ClassVar[str] = "flow"

    def alpha(self, t: Times) -> Tensor:
        return 1 - t

    def sigma(self, t: Times) -> Tensor:
        return t

    def from_edm(self, sigma: Times) -> Times:
        return sigma / (1 + sigma)

    def edm_scale(self, sigma: Times) -> Tensor:
        return 1 / (1 + sigma)

    def derivatives(self, t: Times) -> tuple[Tensor, Tensor]:
        return -torch.ones_like(t), torch.ones_like(t)


@dataclass(frozen=True)
class TrigFlow(Process):
    """TrigFlow, ``x_t = cos(t) x_0 + sigma_d sin(t) eps`` on t in [0, pi/2] (Lu and Song 2024)."""

    sigma_data: float = 0.5
    kind: ClassVar[str] = "trig"

    def alpha(self, t: Times) -> Tensor:
        return t.cos()

    def sigma(self, t: Times) -> Tensor:
        return self.sigma_data * t.sin()

    def from_edm(self, sigma: Times) -> Times:
        return torch.atan(sigma / self.sigma_data)

    def edm_scale(self, sigma: Times) -> Tensor:
        return self.sigma_data / (sigma**2 + self.sigma_data**2).sqrt()

    def derivatives(self, t: Times) -> tuple[Tensor, Tensor]:
        return -t.sin(), self.sigma_data * t.cos()


@dataclass(frozen=True)
class DiscreteVP(Process):
    """A DDPM's table of cumulative alphas; native time is the (fractional) index 0..N-1 (math.md 1.5).

    Between entries ``ln sigma_edm`` is interpolated linearly; outside the table the index is clamped.
    """

    alphas_cumprod: tuple[float, ...] = field(repr=False)
    kind: ClassVar[str] = "discrete_vp"

    def __post_init__(self) -> None:
        a = self.alphas_cumprod
        if len(a) < 2 or not all(1 > x > y > 0 for x, y in itertools.pairwise(a)):
            raise ConfigError(
                "The table of cumulative alphas is not a decreasing sequence inside (0, 1)",
                got=f"{len(a)} values",
                do="Leave out entries that are exactly 1 or 0 (zero-terminal-SNR: replace 0 by 2**-24)",
            )

    @classmethod
    def linear(cls, beta_0: float = 1e-4, beta_1: float = 0.02, steps: int = 1000) -> DiscreteVP:
        """Linear betas, as in DDPM (Ho et al. 2020)."""
        return cls.from_betas(torch.linspace(beta_0, beta_1, steps, dtype=torch.float64))

    @classmethod
    def scaled_linear(cls, beta_0: float = 0.00085, beta_1: float = 0.012, steps: int = 1000) -> DiscreteVP:
        """Betas whose square roots are linear, as in Stable Diffusion (Rombach et al. 2022)."""
        return cls.from_betas(torch.linspace(beta_0**0.5, beta_1**0.5, steps, dtype=torch.float64) ** 2)

    @classmethod
    def cosine(cls, steps: int = 1000) -> DiscreteVP:
        """``alpha_bar(u) = cos^2(pi/2 (u + 0.008)/1.008)`` (Nichol and Dhariwal 2021): see :func:`cosine_betas`."""
        return cls.from_betas(cosine_betas(steps))

    @classmethod
    def from_betas(cls, betas: Tensor, *, zero_terminal_snr: bool = False) -> DiscreteVP:
        """``alpha_bar_i = prod_{j <= i} (1 - beta_j)``, computed in the precision of ``betas [N]``.

        Args:
            zero_terminal_snr: shift and scale ``sqrt(alpha_bar)`` so that its last entry is 0 and its first stays (Lin
                et al. 2024, algorithm 1). That last entry becomes 2**-24 as in diffusers, sigma_edm = 4096; or half
                the entry before it, where that is less.

        Raises:
            ConfigError: ``alpha_bar`` does not decrease inside (0, 1).
        """
        bar = torch.cumprod(1 - betas, 0)
        if zero_terminal_snr and len(bar) > 1:
            root = bar.sqrt()
            root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
            bar = torch.cat([root[:-1] ** 2, (root[-2:-1] ** 2 / 2).clamp_max(2**-24)])
        return cls(tuple(bar.tolist()))

    @property
    def edm_range(self) -> tuple[float, float]:
        log_sigma = _log_sigmas(self.alphas_cumprod, torch.device("cpu"))
        return float(log_sigma[0].exp()), float(log_sigma[-1].exp())

    def alpha(self, t: Times) -> Tensor:
        return self.edm_scale(self.to_edm(t))

    def sigma(self, t: Times) -> Tensor:
        sigma = self.to_edm(t)
        return sigma * self.edm_scale(sigma)

    def to_edm(self, t: Times) -> Times:
        table, low = self._cell(t)
        weight = t.clamp(0, len(table) - 1).double() - low
        return torch.lerp(table[low], table[low + 1], weight).exp().to(t.dtype)

    def from_edm(self, sigma: Times) -> Times:
        table = _log_sigmas(self.alphas_cumprod, sigma.device)
        log_sigma = sigma.double().clamp_min(1e-300).log().clamp(table[0], table[-1])
        low = (torch.searchsorted(table, log_sigma, right=True) - 1).clamp(0, len(table) - 2)
        return (low + (log_sigma - table[low]) / (table[low + 1] - table[low])).to(sigma.dtype)

    def edm_scale(self, sigma: Times) -> Tensor:
        return (1 + sigma**2).rsqrt()

    def derivatives(self, t: Times) -> tuple[Tensor, Tensor]:
        table, low = self._cell(t)
        sigma = self.to_edm(t)
        slope = (table[low + 1] - table[low]).to(t.dtype) * sigma
        cubed = self.edm_scale(sigma) ** 3
        return -sigma * cubed * slope, cubed * slope

    def _cell(self, t: Times) -> tuple[Tensor, Tensor]:
        table = _log_sigmas(self.alphas_cumprod, t.device)
        return table, t.floor().clamp(0, len(table) - 2).long()


def cosine_betas(steps: int) -> Tensor:
    """``beta_i = min(0.999, 1 - alpha_bar((i + 1)/N)/alpha_bar(i/N))``, float64 ``[N]`` (Nichol and Dhariwal 2021)."""
    u = torch.arange(steps + 1, dtype=torch.float64) / steps
    bar = ((u + 0.008) / 1.008 * math.pi / 2).cos() ** 2
    return (1 - bar[1:] / bar[:-1]).clamp_max(0.999)


@lru_cache(maxsize=16)
def _log_sigmas(alphas_cumprod: tuple[float, ...], device: torch.device) -> Tensor:
    a = torch.tensor(alphas_cumprod, dtype=torch.float64)
    return (0.5 * ((1 - a) / a).log()).to(device)


AnyProcess: TypeAlias = EDM | VP | RectifiedFlow | TrigFlow | DiscreteVP

PROCESSES: dict[str, type[Process]] = {
    "edm": EDM,
    "vp": VP,
    "flow": RectifiedFlow,
    "trig": TrigFlow,
    "discrete_vp": DiscreteVP,
}
