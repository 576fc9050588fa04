"""When: laws of t, mappings t -> r, and the schedules that tighten them.

Everything here is evaluated on the host in float64, as pure functions of uniform numbers and of the images
seen, so that a step knows which rows have r = 0 without asking the device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor

from fewstep.errors import ScheduleError
from fewstep.types import Progress, Times


# ---------------------------------------------------------------------------------------------- p(t)
@dataclass(frozen=True)
class Lognormal:
    """``ln t ~ N(mean, std^2)`` (EDM: -1.2, 1.2; ECT on CIFAR-10: -1.1, 2.0)."""

    mean: float = -1.1
    std: float = 2.0
    kind: ClassVar[str] = "lognormal"

    def __post_init__(self) -> None:
        _require(self.std > 0, "The lognormal law of t needs std > 0", self.std)

    def cdf(self, t: Tensor) -> Tensor:
        """``P(law <= t)``."""
        return torch.special.ndtr((t.log() - self.mean) / self.std)

    def quantile(self, u: Tensor) -> Tensor:
        """The inverse of ``cdf``."""
        return (self.mean + self.std * torch.special.ndtri(u)).exp()


@dataclass(frozen=True)
class LogUniform:
    """``ln t`` uniform on [ln low, ln high]."""

    low: float = 0.002
    high: float = 80.0
    kind: ClassVar[str] = "loguniform"

    def __post_init__(self) -> None:
        _require(0 < self.low < self.high, "The log-uniform law of t needs 0 < low < high", (self.low, self.high))

    def cdf(self, t: Tensor) -> Tensor:
        return ((t / self.low).log() / math.log(self.high / self.low)).clamp(0, 1)

    def quantile(self, u: Tensor) -> Tensor:
        return self.low * (self.high / self.low) ** u


@dataclass(frozen=True)
class KarrasUniform:
    """``t^(1/rho)`` uniform on [low^(1/rho), high^(1/rho)]: EDM's sampling grid made continuous."""

    low: float = 0.002
    high: float = 80.0
    rho: float = 7.0
    kind: ClassVar[str] = "karras"

    def __post_init__(self) -> None:
        _require(
            0 < self.low < self.high and self.rho > 0, "The Karras law of t needs 0 < low < high", (self.low, self.high)
        )

    def cdf(self, t: Tensor) -> Tensor:
        a, b = self.low ** (1 / self.rho), self.high ** (1 / self.rho)
        return ((t ** (1 / self.rho) - a) / (b - a)).clamp(0, 1)

    def quantile(self, u: Tensor) -> Tensor:
        a, b = self.low ** (1 / self.rho), self.high ** (1 / self.rho)
        return (a + u * (b - a)) ** self.rho


Law: TypeAlias = Lognormal | LogUniform | KarrasUniform


def draw(law: Law, u: Tensor, low: float = 0.0, high: float = math.inf) -> Times:
    """``t`` from uniform numbers ``u`` in (0, 1): the law truncated to [low, high], float64 ``[b]``."""
    bounds = torch.tensor([low, high], dtype=torch.float64)
    c_low, c_high = law.cdf(bounds).tolist()
    _require(c_low < c_high, f"The law of t has no mass on [{low}, {high}]", law)
    return law.quantile(c_low + u.double() * (c_high - c_low)).clamp(low, high)


# -------------------------------------------------------------------------------------------- r = m(t)
@dataclass(frozen=True)
class Constant:
    """``n(t) = 1``: ``r = t (1 - 1/q^a)``."""

    kind: ClassVar[str] = "constant"

    def n(self, t: Tensor) -> Tensor:
        """The factor of the mean gap ``t / ratio``."""
        return torch.ones_like(t)


@dataclass(frozen=True)
class Sigmoid:
    """``n(t) = 1 + k / (1 + exp(b t))`` (math.md eq. 2.8; ECT's default k = 8, b = 1)."""

    k: float = 8.0
    b: float = 1.0
    kind: ClassVar[str] = "sigmoid"

    def __post_init__(self) -> None:
        _require(self.k >= 0 and self.b >= 0, "The sigmoid mapping needs k >= 0 and b >= 0", (self.k, self.b))

    def n(self, t: Tensor) -> Tensor:
        return 1 + self.k * torch.sigmoid(-self.b * t)


Mapping: TypeAlias = Constant | Sigmoid


def pair(mapping: Mapping, t: Times, ratio: float, r_min: float = 0.0) -> tuple[Times, Times]:
    """``(r, t - r)`` with ``r = max(t (1 - n(t)/ratio), 0)`` (math.md eq. 2.8); ``ratio = q^a >= 1``.

    The gap is computed as ``t n(t)/ratio``, never by subtraction (math.md 2.4). Below ``r_min`` (the least
    noise a discrete-time teacher knows) r counts as 0.
    """
    gap = t * mapping.n(t) / ratio
    clean = (gap >= t) | (t - gap < r_min)
    return torch.where(clean, 0, t - gap), torch.where(clean, t, gap)


# ------------------------------------------------------------------------------------- tightening q^a
@dataclass(frozen=True)
class Stages:
    """``ratio = q^(stage + 1)``, ``stage = images_seen // images`` (math.md 2.5).

    Args:
        q: base, > 1 (256 from the start is the one-hour recipe).
        images: length of a stage in training images.
        first: stage to start from (-1 is plain diffusion, ratio 1).
        last: stage to stay in; None for no limit.
    """

    q: float = 2.0
    images: int = 3_200_000
    first: int = 0
    last: int | None = 7
    kind: ClassVar[str] = "stages"

    def __post_init__(self) -> None:
        _require(self.q > 1, "A stage schedule needs q > 1, otherwise r never approaches t", self.q)
        _require(self.images >= 1, "A stage must last at least one image", self.images)
        _require(self.first >= -1, "Stages start at -1 (plain diffusion) or later", self.first)
        _require(self.last is None or self.last >= self.first, "The last stage comes before the first", self.last)
        top = self.first if self.last is None else self.last
        _require(
            (top + 1) * math.log2(self.q) <= 20,
            "q^(last+1) is beyond what any precision resolves (2^20)",
            (self.q, top),
        )

    def stage(self, progress: Progress) -> int:
        """Index of the current stage."""
        stage = self.first + progress.images_seen // self.images
        return stage if self.last is None else min(stage, self.last)

    def ratio(self, progress: Progress) -> float:
        """``q^(stage+1)``; a mean gap of t/ratio."""
        exponent = self.stage(progress) + 1
        return 2.0**20 if exponent * math.log2(self.q) >= 20 else float(self.q**exponent)


@dataclass(frozen=True)
class Continuous:
    """``ratio = min(q^(1 + images_seen/images), limit)``: stages without jumps (math.md 2.5; experimental)."""

    q: float = 2.0
    images: int = 3_200_000
    limit: float = 256.0
    kind: ClassVar[str] = "continuous"

    def __post_init__(self) -> None:
        _require(self.q > 1, "A continuous schedule needs q > 1", self.q)
        _require(self.images >= 1, "A continuous schedule needs images >= 1 per factor q", self.images)
        _require(1 <= self.limit <= 2**20, "The limit of q^a must lie in [1, 2^20]", self.limit)

    def stage(self, progress: Progress) -> int:
        """Number of whole factors q passed, capped where the limit is reached."""
        return math.floor(math.log(self.ratio(progress), self.q) + 1e-9) - 1

    def ratio(self, progress: Progress) -> float:
        """``q^a`` with real ``a = 1 + images_seen/images``."""
        exponent = min(1 + progress.images_seen / self.images, math.log(self.limit, self.q))
        return self.q**exponent


Schedule: TypeAlias = Stages | Continuous


def _require(condition: bool, what: str, got: object) -> None:
    if not condition:
        raise ScheduleError(what, got=got)
