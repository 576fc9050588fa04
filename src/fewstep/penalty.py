"""How the gap between student and target is measured and weighed (math.md 2.3, 2.4)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from fewstep.errors import ConfigError, nearest
from fewstep.types import PerSample, Samples, Times

Distance = Literal["squared_l2", "l2", "pseudo_huber"]
Weight = Literal["dt", "sqrt_dt", "snr", "snr+1", "truncated_snr", "snrpk", "c_out", "one"]


@dataclass(frozen=True)
class Penalty:
    """``weight(t, r) * distance(delta)``, one number per sample.

    Args:
        distance: "squared_l2" ``|d|^2``; "l2" ``|d|``; "pseudo_huber" ``sqrt(|d|^2 + c^2) - c`` (eq. 2.6,
            equal to "l2" at c = 0). ``|d|`` sums over all non-batch dimensions. The gradient at d = 0 is 0.
        c: pseudo-Huber constant, in units of the data; None is iCT's choice, 0.00054 sqrt(dimensions).
        weight: "dt" 1/(t-r); "sqrt_dt" (t-r)^-1/2; "snr" 1/t^2; "snr+1" 1/t^2 + 1; "truncated_snr"
            max(1/t^2, 1); "snrpk" 1/t^2 + 1/sigma_d^2 (= 1/c_out^2); "c_out" 1/c_out; "one" 1.
    """

    distance: Distance = "l2"
    weight: Weight = "dt"
    c: float | None = 0.0

    def __post_init__(self) -> None:
        for value, known in ((self.distance, get_args(Distance)), (self.weight, get_args(Weight))):
            if value not in known:
                raise ConfigError(f"'{value}' is not a distance or weight of a penalty", do=nearest(str(value), known))
        if self.c is not None and self.c < 0:
            raise ConfigError("The pseudo-Huber constant is negative", got=self.c, want="c >= 0")

    def __call__(self, delta: Samples, t: Times, gap: Times, sigma_data: float = 0.5) -> PerSample:
        """Penalty per sample: ``delta [b, ...]``, ``t`` and ``gap = t - r`` ``[b]`` -> ``[b]``."""
        return weigh(self.weight, t, gap, sigma_data) * self.measure(delta)

    def measure(self, delta: Samples) -> PerSample:
        """The distance alone, ``[b]``, in float32 or better."""
        if delta.dtype in (torch.float16, torch.bfloat16):
            delta = delta.float()
        square = delta.flatten(1).square().sum(1)
        if self.distance == "squared_l2":
            return square
        c = 0.00054 * math.sqrt(math.prod(delta.shape[1:])) if self.c is None else self.c
        if self.distance == "pseudo_huber" and c > 0:
            # (sqrt(s + c^2) - c) = s / (sqrt(s + c^2) + c), without cancellation at small s
            return square / ((square + c**2).sqrt() + c)
        return _safe_sqrt(square)


def weigh(weight: Weight, t: Times, gap: Times, sigma_data: float = 0.5) -> PerSample:
    """``w(t, r)`` of math.md 2.4, ``[b]``, with ``gap = t - r``."""
    if weight == "dt":
        return 1 / gap
    if weight == "sqrt_dt":
        return gap.rsqrt()
    if weight == "snr":
        return t**-2
    if weight == "snr+1":
        return t**-2 + 1
    if weight == "truncated_snr":
        return (t**-2).clamp_min(1)
    if weight == "snrpk":
        return t**-2 + sigma_data**-2
    if weight == "c_out":
        return (t**-2 + sigma_data**-2).sqrt()
    return torch.ones_like(t)


def _safe_sqrt(square: Tensor) -> Tensor:
    """``sqrt`` whose gradient at 0 is 0 instead of NaN (double where; math.md 2.3)."""
    zero = square == 0
    return torch.where(zero, 0, torch.where(zero, 1, square).sqrt())
