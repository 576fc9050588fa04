"""Data laws whose denoiser, flow map and consistency function are known exactly (math.md 7.1).

All of them live in EDM coordinates, ``x_t = x_0 + t eps``, and work in float64 on ``x [b, d]`` and ``t``
a float or ``[b]``. Wrapped as :class:`fewstep.denoiser.Denoiser`, they run through the library's own
samplers and objectives.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from fewstep.denoiser import Denoiser, Parametrization
from fewstep.process import EDM, Process

Time = Tensor | float
Function = Callable[[Tensor, Tensor], Tensor]


def column(t: Time) -> Tensor:
    """``t`` in float64, ``[b, 1]`` or a scalar, to broadcast over ``[b, d]``."""
    t = torch.as_tensor(t, dtype=torch.float64)
    return t if t.ndim == 0 else t.reshape(-1, 1)


class Oracle(Protocol):
    """What every law offers."""

    def denoise(self, x: Tensor, t: Time) -> Tensor:
        """``D(x, t) = E[x_0 | x_t = x]``."""
        ...

    def endpoint(self, x: Tensor, t: Time) -> Tensor:
        """``f(x, t)``: where the probability-flow ODE through (x, t) lands at time 0."""
        ...


@dataclass(frozen=True)
class Gaussian:
    """``N(mean, U diag(variances) U^T)`` (eq. 7.1)."""

    mean: Tensor
    variances: Tensor
    basis: Tensor

    @classmethod
    def white(cls, variance: float = 0.25, size: int = 1, mean: float = 0.0) -> Gaussian:
        """``N(mean, variance I)`` in ``size`` dimensions."""
        eye = torch.eye(size, dtype=torch.float64)
        return cls(torch.full((size,), mean, dtype=torch.float64), torch.full_like(eye[0], variance), eye)

    @classmethod
    def random(cls, size: int, seed: int = 0) -> Gaussian:
        """A correlated law with eigenvalues between 0.02 and 2."""
        generator = torch.Generator().manual_seed(seed)
        basis, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
        mean = torch.randn(size, generator=generator, dtype=torch.float64)
        return cls(mean, torch.logspace(math.log10(0.02), math.log10(2), size, dtype=torch.float64), basis)

    def _act(self, gains: Tensor, x: Tensor) -> Tensor:
        return self.mean + ((x - self.mean) @ self.basis * gains) @ self.basis.T

    def denoise(self, x: Tensor, t: Time) -> Tensor:
        return self._act(self.variances / (self.variances + column(t) ** 2), x)

    def score(self, x: Tensor, t: Time) -> Tensor:
        """``grad log p_t(x)``."""
        covariance = self.basis * self.variances @ self.basis.T
        eye = torch.eye(len(self.mean), dtype=torch.float64)
        noisy = covariance + column(t).expand(len(x), 1)[:, :, None] ** 2 * eye
        return -torch.linalg.solve(noisy, x - self.mean)

    def flow(self, x: Tensor, t: Time, s: Time) -> Tensor:
        """The exact flow map from time t to time s."""
        top, bottom = self.variances + column(s) ** 2, self.variances + column(t) ** 2
        return self._act((top / bottom).sqrt(), x)

    def endpoint(self, x: Tensor, t: Time) -> Tensor:
        return self.flow(x, t, 0.0)


@dataclass(frozen=True)
class PointMasses:
    """Points ``[k, d]`` with weights ``[k]``: ``D`` is the softmax-weighted mean (math.md 7.1 b)."""

    points: Tensor
    weights: Tensor

    def log_density(self, x: Tensor, t: Time) -> Tensor:
        """``log p_t(x)`` up to a constant in x."""
        return torch.logsumexp(self._logits(x, t), dim=1)

    def _logits(self, x: Tensor, t: Time) -> Tensor:
        square = (x[:, None] - self.points).square().sum(-1)
        return self.weights.log() - square / (2 * column(t) ** 2)

    def denoise(self, x: Tensor, t: Time) -> Tensor:
        return self._logits(x, t).softmax(1) @ self.points

    def endpoint(self, x: Tensor, t: Time) -> Tensor:
        """Only for one point: everything lands on it."""
        if len(self.points) != 1:
            raise ValueError("No closed form: use TwoPoints or Mixture")
        return self.points.expand_as(x)


@dataclass(frozen=True)
class TwoPoints:
    """Half the mass at +a, half at -a, ``a [d]``: ``D = a tanh(a.x/t^2)``, ``f = a sign(a.x)``."""

    a: Tensor

    def denoise(self, x: Tensor, t: Time) -> Tensor:
        return (x @ self.a[:, None] / column(t) ** 2).tanh() * self.a

    def endpoint(self, x: Tensor, t: Time) -> Tensor:
        return (x @ self.a[:, None]).sign() * self.a


@dataclass(frozen=True)
class Mixture:
    """A 1-D Gaussian mixture; its flow map is ``F_s^{-1}(F_t(x))`` (eq. 7.2). ``x [b, 1]``."""

    weights: Tensor = field(default_factory=lambda: torch.tensor([0.3, 0.7], dtype=torch.float64))
    means: Tensor = field(default_factory=lambda: torch.tensor([-0.6, 0.5], dtype=torch.float64))
    stds: Tensor = field(default_factory=lambda: torch.tensor([0.35, 0.25], dtype=torch.float64))

    def _spread(self, t: Time) -> Tensor:
        return (self.stds**2 + column(t) ** 2).sqrt()

    def cdf(self, x: Tensor, t: Time) -> Tensor:
        """``P(x_t <= x)``, shape of x."""
        return (torch.special.ndtr((x - self.means) / self._spread(t)) * self.weights).sum(1, keepdim=True)

    def survival(self, x: Tensor, t: Time) -> Tensor:
        """``P(x_t > x)``, without the cancellation of 1 - cdf."""
        return (torch.special.ndtr((self.means - x) / self._spread(t)) * self.weights).sum(1, keepdim=True)

    def quantile(self, low: Tensor, high: Tensor, t: Time) -> Tensor:
        """x with ``cdf = low`` (and ``survival = high``) by bisection to the last bit."""
        reach = 60 * float(self._spread(t).max()) + float(self.means.abs().max())
        left, right = torch.full_like(low, -reach), torch.full_like(low, reach)
        for _ in range(80):
            middle = (left + right) / 2
            below = torch.where(low < 0.5, self.cdf(middle, t) < low, self.survival(middle, t) > high)
            left, right = torch.where(below, middle, left), torch.where(below, right, middle)
        return (left + right) / 2

    def flow(self, x: Tensor, t: Time, s: Time) -> Tensor:
        """The exact flow map from time t to time s."""
        return self.quantile(self.cdf(x, t), self.survival(x, t), s)

    def endpoint(self, x: Tensor, t: Time) -> Tensor:
        return self.flow(x, t, 0.0)

    def denoise(self, x: Tensor, t: Time) -> Tensor:
        variance = self._spread(t) ** 2
        logits = self.weights.log() - 0.5 * variance.log() - (x - self.means) ** 2 / (2 * variance)
        means = self.means + self.stds**2 / variance * (x - self.means)
        return (logits.softmax(1) * means).sum(1, keepdim=True)


@dataclass(frozen=True)
class GuidedGaussians:
    """One Gaussian N(mean, variance) per class and one, the last, for "no label"; guided: ``v_u + w (v_c - v_u)``.

    The guided flow is affine, ``dx/dt = a(t) x - b(t)`` with ``a = t sum_i share_i/(variance_i + t^2)`` and
    ``b = t sum_i share_i mean_i/(variance_i + t^2)`` over i = u, c with shares 1 - w, w. Points are ``x [b, 1]``,
    labels one-hot ``[b, 2]`` or all zero, strengths ``w [b]``.
    """

    means: Tensor = field(default_factory=lambda: torch.tensor([-0.7, 0.9, 0.2], dtype=torch.float64))
    variances: Tensor = field(default_factory=lambda: torch.tensor([0.1, 0.3, 0.8], dtype=torch.float64))

    def _law(self, cond: Tensor) -> Tensor:
        """Which law each row follows."""
        return torch.where(cond.any(1), cond.argmax(1), len(self.means) - 1)

    def denoise(self, x: Tensor, t: Time, cond: Tensor, w: Time = 1.0) -> Tensor:
        """``D_u + w (D_c - D_u)``."""
        free, own = torch.zeros_like(cond), column(w)
        return self._plain(x, t, free) + own * (self._plain(x, t, cond) - self._plain(x, t, free))

    def _plain(self, x: Tensor, t: Time, cond: Tensor) -> Tensor:
        mean, variance = (v[self._law(cond)][:, None] for v in (self.means, self.variances))
        return mean + variance / (variance + column(t) ** 2) * (x - mean)

    def flow(self, x: Tensor, t: Tensor, s: Tensor, cond: Tensor, w: Tensor) -> Tensor:
        """The exact guided flow map from t to s, both ``[b]``: the forcing by Gauss-Legendre in asinh(4 t)."""
        nodes, weights = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(64))
        top, bottom = (4 * t).asinh()[:, None], (4 * s).asinh()[:, None]
        u = (top + bottom) / 2 + (top - bottom) / 2 * nodes
        tau, d_tau = u.sinh() / 4, u.cosh() / 4 * (top - bottom) / 2 * weights
        forcing = (self._forcing(tau, cond, w) / self._growth(tau, cond, w) * d_tau).sum(1, keepdim=True)
        return self._growth(s[:, None], cond, w) * (x / self._growth(t[:, None], cond, w) + forcing)

    def endpoint(self, x: Tensor, t: Tensor, cond: Tensor, w: Tensor) -> Tensor:
        """Where the guided flow through (x, t) lands at time 0."""
        return self.flow(x, t, torch.zeros_like(t), cond, w)

    def _pair(self, cond: Tensor, w: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """(share, mean, variance), each ``[b, 1]``, of "no label" and of the row's own law."""
        laws = ((1 - w, torch.full((len(w),), len(self.means) - 1)), (w, self._law(cond)))
        return [(share[:, None], self.means[k][:, None], self.variances[k][:, None]) for share, k in laws]

    def _growth(self, t: Tensor, cond: Tensor, w: Tensor) -> Tensor:
        return math.prod((v + t**2) ** (share / 2) for share, _, v in self._pair(cond, w))

    def _forcing(self, t: Tensor, cond: Tensor, w: Tensor) -> Tensor:
        return sum(t * share * mean / (v + t**2) for share, mean, v in self._pair(cond, w))


# ------------------------------------------------------------------------------- as denoisers
class Plain(nn.Module):
    """A function of (x, t) as a backbone with one idle float64 parameter, which sets the dtype."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function
        self.idle = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor, c_noise: Tensor, cond: Tensor | None = None) -> Tensor:
        return self.function(x, c_noise) + 0 * self.idle


def as_denoiser(function: Function, size: int = 1, *, sigma_data: float = 0.5, sigma_max: float = 80.0) -> Denoiser:
    """``function(x, sigma)``, for example ``oracle.denoise``, as a Denoiser under the EDM clock."""
    parametrization = Parametrization("x0", sigma_data=sigma_data, time="native")
    return Denoiser(Plain(function), EDM(), parametrization, sample_shape=(size,), sigma_max=sigma_max)


def raw(kind: str, oracle: Oracle, process: Process, z: Tensor, t: Tensor, sigma_data: float = 0.5) -> Tensor:
    """What an exact network of prediction ``kind`` returns at native ``(z, t)``: math.md 1.2's inverses."""
    alpha, sigma = process.alpha(t)[:, None], process.sigma(t)[:, None]
    noise = sigma / alpha
    x = z / alpha
    clean = oracle.denoise(x, noise)
    eps = (x - clean) / noise
    skip = sigma_data**2 / (noise**2 + sigma_data**2)
    out = noise * sigma_data / (noise**2 + sigma_data**2).sqrt()
    d_alpha, d_sigma = process.derivatives(t)
    forms = {
        "x0": clean,
        "eps": eps,
        "score": -eps / sigma,
        "sigma_score": -eps,
        "v": alpha * eps - sigma * clean,
        "flow": eps - clean,
        "velocity": d_alpha[:, None] * clean + d_sigma[:, None] * eps,
        "edm": (clean - skip * x) / out,
        "trig": (skip * x - clean) / out,
    }
    return forms[kind]


class ExactNetwork(nn.Module):
    """An exact raw network; EDM and TrigFlow kinds get their input scaled by c_in, and scale it back."""

    def __init__(self, kind: str, oracle: Oracle, process: Process, sigma_data: float = 0.5) -> None:
        super().__init__()
        self.kind, self.oracle, self.process, self.sigma_data = kind, oracle, process, sigma_data
        self.idle = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        if self.kind in ("edm", "trig"):
            alpha, sigma = self.process.alpha(t)[:, None], self.process.sigma(t)[:, None]
            x = x * (sigma**2 + (alpha * self.sigma_data) ** 2).sqrt()
        return raw(self.kind, self.oracle, self.process, x, t, self.sigma_data)


def exact_denoiser(kind: str, oracle: Oracle, process: Process, size: int, sigma_data: float = 0.5) -> Denoiser:
    """A Denoiser around the exact raw network of ``kind`` under ``process``."""
    network = ExactNetwork(kind, oracle, process, sigma_data)
    parametrization = Parametrization(kind, sigma_data=sigma_data, time="native")
    return Denoiser(network, process, parametrization, sample_shape=(size,))


def quadrature(variance: float, nodes: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    """Gauss-Hermite rule over ``x_0 ~ N(0, variance)`` and ``eps ~ N(0, 1)``: ``(x_0, eps [n, 1], weights [n])``.

    Exact for polynomials up to degree ``2 nodes - 1`` in each.
    """
    points, weights = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(nodes))
    weights = weights / weights.sum()
    x_0 = math.sqrt(variance) * points.repeat_interleave(nodes)
    return (
        x_0[:, None],
        points.repeat(nodes)[:, None],
        weights.repeat_interleave(nodes) * weights.repeat(nodes),
    )
