"""Which neighbours: noise levels on a finite grid, how many of them, and which pair a uniform number picks.

The host side of CT, iCT and CD, float64, as pure functions of uniform numbers and of the images seen. The lowest
node counts as clean: there r = 0 and the target is x_0, because ``f(x, 0) = x`` is the boundary of every student
(math.md 1.4). The papers put the boundary at that node instead (0.002); their N nodes and N - 1 pairs stay as they are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.errors import ScheduleError
from fewstep.times import Lognormal
from fewstep.types import Progress, Times


@dataclass(frozen=True)
class Karras:
    """EDM's nodes, ascending: ``(low^(1/rho) + i/(N-1) (high^(1/rho) - low^(1/rho)))^rho`` (EDM eq. 5; math.md 3.2).

    Args:
        low: least noise level; raised to what the student's network knows.
        rho: larger puts more nodes at small noise.
    """

    low: float = 0.002
    rho: float = 7.0

    def __post_init__(self) -> None:
        if not (self.low > 0 and self.rho > 0):
            raise ScheduleError("A grid of noise levels needs low > 0 and rho > 0", got=(self.low, self.rho))

    def nodes(self, count: int, sigma_min: float, sigma_max: float) -> Tensor:
        """``count`` nodes from the larger of ``low`` and ``sigma_min`` up to ``sigma_max``, float64 ``[count]``."""
        low = max(self.low, sigma_min)
        if not low < sigma_max:
            raise ScheduleError(
                "The lowest node of the grid is not below the highest", got=low, want=f"< {sigma_max:g}"
            )
        roots = torch.linspace(low ** (1 / self.rho), sigma_max ** (1 / self.rho), count, dtype=torch.float64)
        return roots**self.rho


def neighbours(nodes: Tensor, place: Tensor) -> tuple[Times, Times]:
    """``(t, r)``: nodes ``place + 1`` and ``place``, float64 ``[b]`` each, with r = 0 for the lowest.

    Args:
        nodes: ascending ``[N]``.
        place: int64 ``[b]`` in 0 .. N - 2.
    """
    return nodes[place + 1], torch.where(place == 0, 0, nodes[place])


# --------------------------------------------------------------------------------------- which pair
def uniform_places(u: Tensor, count: int) -> Tensor:
    """A pair of ``count`` nodes, all equally likely: int64 ``[b]`` in 0 .. count - 2 from ``u [b]`` in (0, 1) (CT)."""
    return (u * (count - 1)).long().clamp_max(count - 2)


def lognormal_shares(law: Lognormal, nodes: Tensor) -> Tensor:
    """``p(i) ~ P(sigma_i < t <= sigma_{i+1})`` of a lognormal t, normalised, ``[N - 1]`` (iCT; math.md 3.2)."""
    mass = law.cdf(nodes).diff()
    return mass / mass.sum()


def places(u: Tensor, shares: Tensor) -> Tensor:
    """The pair in whose share of (0, 1) ``u [b]`` falls, int64 ``[b]``."""
    return torch.searchsorted(shares.cumsum(0), u, right=True).clamp_max(len(shares) - 1)


# ---------------------------------------------------------------------------------------- how many
@dataclass(frozen=True)
class Growing:
    """``N(k) = ceil(sqrt((k/K) ((s1 + 1)^2 - s0^2) + s0^2) - 1) + 1`` (CT, arXiv 2303.01469; math.md 3.1).

    k/K is the share of the run that is over.

    Args:
        first: s0, nodes at the start.
        last: s1; the end has s1 + 1 nodes.
    """

    first: int = 2
    last: int = 150

    def __post_init__(self) -> None:
        if not 2 <= self.first <= self.last:
            raise ScheduleError("A growing grid needs 2 <= first <= last", got=(self.first, self.last))

    def nodes(self, progress: Progress) -> int:
        """N."""
        growth = (self.last + 1) ** 2 - self.first**2
        square = progress.images_seen * growth / progress.total_images + self.first**2
        return math.ceil(math.sqrt(square) - 1) + 1

    def decay(self, mu: float, progress: Progress) -> float:
        """``mu(k) = exp(s0 ln(mu) / (N(k) - 1))``: the target follows more slowly on finer grids; 0 for mu = 0."""
        return mu ** (self.first / (self.nodes(progress) - 1))


@dataclass(frozen=True)
class Doubling:
    """``N(k) = min(s0 2^(k // K'), s1) + 1`` in blocks of ``K' = K // (log2(s1 // s0) + 1)`` (iCT; math.md 3.2).

    k and K are counted in images. The defaults give 11, 21, 41, ..., 1281 in eight equal blocks.

    Args:
        first, last: s0 and s1.
    """

    first: int = 10
    last: int = 1280

    def __post_init__(self) -> None:
        if not 1 <= self.first <= self.last:
            raise ScheduleError("A doubling grid needs 1 <= first <= last", got=(self.first, self.last))

    def stage(self, progress: Progress) -> int:
        """Doublings so far."""
        blocks = math.log2(self.last // self.first) + 1
        block = progress.images_seen // max(1, math.floor(progress.total_images / blocks))
        return min(block, math.ceil(blocks) - 1)

    def nodes(self, progress: Progress) -> int:
        """N."""
        return int(min(self.first * 2 ** self.stage(progress), self.last)) + 1
