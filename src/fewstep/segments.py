"""Segments: the noise axis cut into parts, the nodes inside them, and the three times of a step (math.md 3.5, 3.6).

The host side of Multistep Consistency Models, TRACT and CTM, float64, as pure functions of uniform numbers and of
the images seen. Everywhere ``s <= r < t``: the student jumps from t to the lower edge s, its target from r.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fewstep.errors import ScheduleError
from fewstep.types import Progress, Times

Spacing = Literal["karras", "cosine"]

_RHO = 7.0
_LOWEST = {"karras": 0.002, "cosine": math.exp(-10)}
"""Level just above u = 0, at sigma_d = 0.5: EDM's 0.002, and log-SNR 20."""


@dataclass(frozen=True)
class Axis:
    """Schedule time u in [0, 1] as a noise level: 0 at u = 0, ``high`` at u = 1, no level between 0 and ``low``.

    Args:
        spacing: "karras" ``(low^(1/7) + u (high^(1/7) - low^(1/7)))^7`` (EDM eq. 5); "cosine"
            ``unit tan(a + u b)`` between the same ends, log-SNR in [-2 ln(high/unit), 20] (arXiv 2403.06807).
        low, high: least and largest noise level.
        unit: the cosine spacing's level at an angle of 45 degrees.
    """

    spacing: Spacing
    low: float
    high: float
    unit: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.low < self.high:
            raise ScheduleError("The noise axis has its lowest level above its highest", got=(self.low, self.high))

    def level(self, u: Tensor) -> Times:
        """The noise level at ``u``, float64, of its shape."""
        u = u.double()
        if self.spacing == "karras":
            low, high = self.low ** (1 / _RHO), self.high ** (1 / _RHO)
            inside = (low + u * (high - low)) ** _RHO
        else:
            low, high = math.atan(self.low / self.unit), math.atan(self.high / self.unit)
            inside = self.unit * torch.tan(low + u * (high - low))
        return torch.where(u <= 0, 0, torch.where(u >= 1, self.high, inside))

    def edges(self, count: int) -> Times:
        """``0 = tau_0 < ... < tau_count = high``, float64 ``[count + 1]``; those of 2 count contain those of count."""
        return self.level(torch.arange(count + 1, dtype=torch.float64) / count)

    def levels(self, count: int) -> tuple[float, ...]:
        """The upper edges of ``count`` segments, largest first: the noise levels of a jump sampler."""
        return tuple(self.edges(count)[1:].flip(0).tolist())

    def lower_edge(self, t: Times, counts: Tensor) -> Times:
        """The largest edge below ``t`` among those of ``counts`` segments, float64 ``[b]``; above ``high`` the last.

        Args:
            t: ``[b]``, > 0.
            counts: number of segments per row, int64 ``[b]``.
        """
        below = torch.zeros_like(t)
        for count in set(counts.tolist()):
            edges = self.edges(count)
            below = torch.where(counts == count, edges[torch.searchsorted(edges[1:-1], t)], below)
        return below


def axis_of(spacing: Spacing, sigma_data: float, sigma_min: float, sigma_max: float) -> Axis:
    """The axis in units of the data, between the noise levels that a network knows (EDM's at sigma_d = 0.5)."""
    unit = sigma_data / 0.5
    return Axis(spacing, max(_LOWEST[spacing] * unit, sigma_min), sigma_max, unit)


@dataclass(frozen=True)
class Clocks:
    """Three times per row, float64 ``[b]`` on the host, ``0 <= s <= r < t``.

    Args:
        t: where the student starts; r: where its target starts; s: where both land.
        gap: ``t - r``, without cancellation.
    """

    t: Times
    r: Times
    s: Times
    gap: Times

    @property
    def share(self) -> Tensor:
        """``a = t (r - s)/(r (t - s))`` in [0, 1]: the target's share of the aim; 0 where r = s, 1 where only s = 0.

        A straight jump t -> r aimed at A and one r -> s aimed at B make one jump t -> s aimed at ``(1 - a) A + a B``.
        """
        lands = self.r == self.s
        first = self.s * self.gap / (torch.where(lands, 1, self.r) * (self.t - self.s))
        return torch.where(lands, 0, 1 - first)

    @property
    def clean_gap(self) -> Times:
        """``(t - r)/(1 - s/t)``: a mismatch of aims is ``1/(1 - s/t)`` times the one at s, and so is this gap."""
        return self.gap / (1 - self.s / self.t)


def grid_clocks(axis: Axis, u: Tensor, counts: Tensor, nodes: float) -> Clocks:
    """Neighbouring nodes of a segment and its lower edge (arXiv 2403.06807, algorithm 1).

    Each of ``counts`` equal parts of the schedule time has ``round(nodes/counts)`` nodes, at least one.

    Args:
        axis: levels of schedule times.
        u: uniform numbers ``[b]`` in (0, 1), which pick t among all nodes of the row's grid.
        counts: number of segments per row, int64 ``[b]``.
        nodes: on the whole axis.
    """
    counts = counts.double()
    inside = (nodes / counts).round().clamp_min(1)
    place = (u * counts * inside).floor().minimum(counts * inside - 1)
    segment = (place / inside).floor()
    node = place - segment * inside
    t, r, s = (axis.level((segment + part) / counts) for part in ((node + 1) / inside, node / inside, 0))
    return Clocks(t, r, s, t - r)


def gap_clocks(t: Times, s: Times, fraction: Tensor, r_min: float = 0.0) -> Clocks:
    """``r = max(t - (t - s) fraction, s)``, which is ECT's r at s = 0 (math.md 3.5; experimental).

    Args:
        t, s: ``[b]``, s < t.
        fraction: ``n(t)/q^a [b]``, of the way from t to s.
        r_min: below it r counts as 0.
    """
    gap = (t - s) * fraction
    lands = (fraction >= 1) | (t - gap < r_min)
    return Clocks(t, torch.where(lands, s, t - gap), s, torch.where(lands, t - s, gap))


def phase_clocks(nodes: Times, u: Tensor, stride: int, segment: int) -> Clocks:
    """Times on a grid for a teacher that moves ``stride`` nodes and a student that moves ``segment`` (math.md 3.6).

    Args:
        nodes: ascending from 0, float64 ``[n + 1]``; n is a multiple of ``segment``, which is one of ``stride``.
        u: uniform numbers ``[b]`` in (0, 1), which pick t among the teacher's nodes.
    """
    count = (len(nodes) - 1) // stride
    place = ((u * count).long().clamp_max(count - 1) + 1) * stride
    t, r, s = nodes[place], nodes[place - stride], nodes[(place - 1) // segment * segment]
    return Clocks(t, r, s, t - r)


def annealed(first: int, last: int, share: float, progress: Progress) -> float:
    """``exp(ln first + clip(i/K, 0, 1) (ln last - ln first))`` with K = ``share`` of the run (arXiv 2403.06807)."""
    done = progress.images_seen / (share * progress.total_images) if share > 0 else 1.0
    return float(first * (last / first) ** min(done, 1.0))
