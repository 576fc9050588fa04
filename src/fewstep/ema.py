"""Exponential and power-function moving averages of weights, and post-hoc reconstruction (math.md 5).

All of them are functions of the images seen after the step, so that they resume exactly.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import numpy as np
import torch
from torch import Tensor

from fewstep.errors import ConfigError


@dataclass(frozen=True)
class ConstantEMA:
    """``ema <- beta ema + (1 - beta) theta`` at every update (ECT: 0.9999; one-hour recipe 0.9993)."""

    beta: float = 0.9999
    kind: ClassVar[str] = "constant"

    def __post_init__(self) -> None:
        if not 0 <= self.beta < 1:
            raise ConfigError("The EMA's beta is outside [0, 1)", got=self.beta)

    def decay(self, images_seen: int, batch_size: int) -> float:
        """``beta``, whatever the images seen."""
        return self.beta


@dataclass(frozen=True)
class HalfLifeEMA:
    """``beta = 0.5^(B/H)``, ``H = min(images, ramp_up * images_seen)`` (EDM: ramp-up 0.05; EDM2: 0.09).

    Args:
        images: half-life in training images.
        ramp_up: share of the images seen that bounds the half-life early on; None for none.
    """

    images: float = 500_000
    ramp_up: float | None = 0.05
    kind: ClassVar[str] = "half_life"

    def __post_init__(self) -> None:
        if self.images <= 0:
            raise ConfigError("The EMA's half-life must be positive", got=self.images)

    def decay(self, images_seen: int, batch_size: int) -> float:
        """``beta`` after the step that ends at ``images_seen``."""
        half_life = self.images
        if self.ramp_up is not None:
            half_life = min(half_life, self.ramp_up * images_seen)
        return float(0.5 ** (batch_size / max(half_life, 1e-8)))


@dataclass(frozen=True)
class PowerEMA:
    """EDM2's power function, ``beta = (1 - B/n)^(gamma + 1)``, n after the step (Karras et al. 2023, eq. 127).

    Args:
        std: relative width sigma_rel of the averaging profile, in (0, 0.28).
    """

    std: float = 0.05
    kind: ClassVar[str] = "power"

    def __post_init__(self) -> None:
        if not 0 < self.std < 12**-0.5:
            raise ConfigError("The power-function EMA's std is outside (0, 0.2887)", got=self.std)

    def decay(self, images_seen: int, batch_size: int) -> float:
        """``beta``; the first update (n = B) copies the weights."""
        return float(max(0.0, 1 - batch_size / images_seen) ** (std_to_gamma(self.std) + 1))


AnyEMA: TypeAlias = ConstantEMA | HalfLifeEMA | PowerEMA


@torch.no_grad()
def update(average: Iterable[Tensor], current: Iterable[Tensor], beta: float) -> None:
    """``average <- beta average + (1 - beta) current``, in place, as one multi-tensor operation."""
    torch._foreach_lerp_(list(average), list(current), 1 - beta)


def std_to_gamma(std: float) -> float:
    """Exponent whose profile has relative width ``std``: largest real root of
    ``g^3 + 7 g^2 + (16 - std^-2) g + (12 - std^-2)`` (EDM2 eq. 123; math.md 5)."""
    inverse = std**-2.0
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def gamma_to_std(gamma: float) -> float:
    """``sigma_rel^2 = (g + 1) / ((g + 2)^2 (g + 3))`` (EDM2 eq. 123)."""
    return float(np.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))))


def profile_product(end_a: np.ndarray, gamma_a: np.ndarray, end_b: np.ndarray, gamma_b: np.ndarray) -> np.ndarray:
    """Inner products ``<p_a, p_b>`` of power-function profiles, float64, broadcast (EDM2 eq. 150)."""
    ratio = np.asarray(end_a, np.float64) / end_b
    exponent = np.where(ratio < 1, gamma_b, -np.asarray(gamma_a, np.float64))
    top = (np.asarray(gamma_a, np.float64) + 1) * (np.asarray(gamma_b, np.float64) + 1) * ratio**exponent
    return top / ((np.asarray(gamma_a, np.float64) + gamma_b + 1) * np.maximum(end_a, end_b))


def posthoc_coefficients(
    ends: Sequence[float], stds: Sequence[float], target_end: float, target_std: float
) -> np.ndarray:
    """Weights of stored snapshots that best rebuild another averaging profile, float64 ``[k]``.

    Solves ``A X = B`` with the profiles' inner products, then scales X to sum 1 (EDM2 algorithm 3).

    Args:
        ends: images seen at each snapshot.
        stds: relative width of each snapshot's profile.
        target_end, target_std: the wanted profile; ``target_std`` outside [min, max] of ``stds`` is unsafe.
    """
    gammas = np.array([std_to_gamma(s) for s in stds])
    n = np.asarray(ends, np.float64)
    a = profile_product(n[:, None], gammas[:, None], n[None, :], gammas[None, :])
    b = profile_product(n, gammas, np.asarray(target_end), np.asarray(std_to_gamma(target_std)))
    x = np.linalg.solve(a, b)
    return x / x.sum()


def reconstruct(snapshots: Sequence[dict[str, Tensor]], coefficients: np.ndarray) -> dict[str, Tensor]:
    """``sum_i x_i theta_i`` in float64, cast back: coefficients are large and alternate in sign."""
    out = {}
    for name, first in snapshots[0].items():
        total = torch.zeros_like(first, dtype=torch.float64)
        for x, snapshot in zip(coefficients.tolist(), snapshots, strict=True):
            total += x * snapshot[name].double()
        out[name] = total.to(first.dtype)
    return out
