"""Distances between images in the feature space of a network (AYT, arXiv 2510.00658, math.md 3.11; LPIPS)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from fewstep.errors import ConfigError, nearest
from fewstep.objectives.base import Features
from fewstep.penalty import Penalty, weigh
from fewstep.process import expand
from fewstep.types import PerSample, Samples, Times

Form = Literal["unit_gradient", "plain"]
Metric = Literal["channels", "squared"]

GUARD = 1e-5
"""Below this length a gradient is not stretched to length 1, and a channel's difference counts as small."""


@dataclass(frozen=True)
class FeatureDistance:
    """``share w(t, r) L_features + (1 - share) penalty(f - sg f_r)`` with the penalty's own weight w.

    "unit_gradient" (AYT): ``h = dM(f, f_r)/df``, normalised to length 1 per sample, then ``L = |f - sg(f - h)|^2/2``,
    whose gradient in f is h: with w = 1/(t - r) each sample pulls with length 1/(t - r), like |f - f_r|/(t - r) in
    pixels, but in the direction that the network feels. Its value is w/2 whatever the gap is: it says nothing.
    "plain": ``L = M(f, f_r)``.

    Args:
        net: the frozen feature net, as ``open_differentiable`` names it: "transforms:PATH", "mnist-cnn:PATH",
            "lpips:PATH".
        form: see above; LPIPS as in consistency models is "plain".
        metric: M, summed over the maps v = difference of features: "channels" (AYT) ``sum_channels |v|`` with the
            length over pixels; "squared" ``|v|^2`` (with lpips:PATH: LPIPS).
        share: of the feature term; 1 is that alone. AYT's "L_ECT + lambda L" is lambda/(1 + lambda), up to the scale.
    """

    net: str = ""
    form: Form = "unit_gradient"
    metric: Metric = "channels"
    share: float = 1.0

    def __post_init__(self) -> None:
        for value, known in ((self.form, get_args(Form)), (self.metric, get_args(Metric))):
            if value not in known:
                raise ConfigError(f"'{value}' is not a choice of a feature distance", do=nearest(str(value), known))
        if not 0 < self.share <= 1:
            raise ConfigError("The share of a feature distance is out of range", got=self.share, want="(0, 1]")
        if not self.net:
            raise ConfigError("A feature distance needs a network", do="Set distance.net to transforms:PATH")

    def __call__(
        self,
        penalty: Penalty,
        out: Samples,
        goal: Samples,
        t: Times,
        gap: Times,
        sigma_data: float,
        features: Features | None,
    ) -> PerSample:
        """The weighed distance between ``out`` and ``goal`` (both ``[b, ...]``; goal without gradient), ``[b]``."""
        if features is None:
            raise ConfigError(f"The feature net '{self.net}' was not opened", do="Pass Beside(features=...)")
        if self.form == "plain":
            term = distance(self.metric, features, out, goal)
        else:
            term = _pull(out, unit_gradient(self.metric, features, out, goal))
        loss = self.share * weigh(penalty.weight, t, gap, sigma_data) * term
        return loss if self.share == 1 else loss + (1 - self.share) * penalty(out - goal, t, gap, sigma_data)


def distance(metric: Metric, features: Features, out: Samples, goal: Samples) -> PerSample:
    """``M(out, goal) [b]``, in float32 or better: features of near images differ by less than bf16 resolves."""
    with torch.autocast(out.device.type, enabled=False):
        with torch.no_grad():
            theirs = features(_precise(goal))
        gaps = [mine - other for mine, other in zip(features(_precise(out)), theirs, strict=True)]
        if metric == "squared":
            return torch.stack([v.flatten(1).square().sum(1) for v in gaps]).sum(0)
        return torch.stack([smooth_length(v).sum(1) for v in gaps]).sum(0)


def smooth_length(v: Tensor) -> Tensor:
    """``sqrt(|v|^2 + 1e-10) - 1e-5`` over pixels, ``[b, c, ...] -> [b, c]``; its gradient at 0 is 0."""
    square = v.flatten(2).square().sum(2) if v.ndim > 2 else v.square()
    return square / ((square + GUARD**2).sqrt() + GUARD)  # without cancellation


def unit_gradient(metric: Metric, features: Features, out: Samples, goal: Samples) -> Samples:
    """``h / max(|h|, 1e-5)`` with ``h = dM/d out``, per sample, ``[b, ...]``; 0 where out = goal."""
    with torch.enable_grad():
        point = _precise(out.detach()).requires_grad_(True)
        (h,) = torch.autograd.grad(distance(metric, features, point, goal.detach()).sum(), point)
    length = h.flatten(1).norm(dim=1).clamp_min(GUARD)
    return h / expand(length, h)


def _pull(out: Samples, h: Samples) -> PerSample:
    """``|out - sg(out - h)|^2 / 2``, ``[b]``: its gradient in ``out`` is h."""
    out = _precise(out)
    # out - sg(out) is an exact 0: the difference is h to the last bit, not what is left of it after out - h
    return ((out - out.detach()) + h).flatten(1).square().sum(1) / 2


def _precise(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
