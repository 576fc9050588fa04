"""Couplings: which noise goes with which image (minibatch optimal transport, and VCT, arXiv 2502.18197)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.denoiser import Denoiser
from fewstep.errors import ConfigError
from fewstep.objectives.base import StepRandom
from fewstep.types import PerSample, Samples


@dataclass(frozen=True)
class Independent:
    """Noise independent of the image, as in diffusion."""

    kind: ClassVar[str] = "independent"

    def extra(self, student: Denoiser) -> nn.Module | None:
        """No parameters."""
        return None

    def __call__(
        self, x_0: Samples, eps: Samples, random: StepRandom, extra: nn.Module | None
    ) -> tuple[Samples, PerSample | None]:
        """The noise as it is, at no cost."""
        return eps, None


@dataclass(frozen=True)
class OptimalTransport:
    """The noise rows of a micro batch, permuted so that ``sum_i |x_0^i - eps^i|^2`` is least (experimental).

    A row of noise drawn at random from the batch is still N(0, 1), so sampling starts as ever. But x_0 and eps are
    now correlated: x_t has other marginals and another posterior of x_0 for 0 < t, for which the diffusion teacher's D
    is not the denoiser (mind bridges and anchors that follow it), and which a sampler of several steps, with fresh
    noise at each, does not meet. Given a label, the noise is not N(0, 1) any more. The permutation depends on the rest
    of the micro batch, hence on its size and on the number of processes. The exact assignment is found on
    the host, O(b^3): 60 ms for 128 rows, 0.3 s for 256, 1.5 s for 512 on one core; on a GPU it waits for the device
    once per micro batch.

    Source: Pooladian et al., arXiv 2304.14772, for flows; the baseline "OT" of VCT.
    """

    kind: ClassVar[str] = "ot"

    def extra(self, student: Denoiser) -> nn.Module | None:
        """No parameters."""
        return None

    def __call__(
        self, x_0: Samples, eps: Samples, random: StepRandom, extra: nn.Module | None
    ) -> tuple[Samples, PerSample | None]:
        """The same rows of noise ``[b, ...]`` in another order, at no cost."""
        with torch.no_grad():  # |x_0|^2 and |eps|^2 have the same sum in any order
            cost = -(x_0.flatten(1).double() @ eps.flatten(1).double().T)
        rows = torch.from_numpy(assignment(cost.cpu().numpy()))
        return eps[rows.to(eps.device, non_blocking=True)], None


@dataclass(frozen=True)
class Learned:
    """``eps ~ q(eps | x_0) = N(mu(x_0), sigma(x_0)^2)``, learned with the student (experimental; VCT).

    The cost is ``kl KL(q || N(0, 1))`` per sample, summed over dimensions. A small network gives mu and ln sigma; it
    starts at mu = 0, sigma = 1, the independent coupling. Its gradient comes from the cost and, through eps, from the
    student's pass at ``x_t = x_0 + t eps``; the target at x_r has no gradient, as published. It is not told the label.
    Sampling starts from N(0, T^2), to which the cost holds the noise; what is said of :class:`OptimalTransport` about
    marginals, teachers and several steps is true here too (VCT draws the noise of later steps from q, we do not).

    Args:
        kl: weight of the cost. VCT on CIFAR-10, with ECT's 1/(t - r), uses 10/(T - r(T)): 0.25 in the first stage and
            32 in the last of eight.
        width: channels (images) or units (points) of the network.
    """

    kl: float = 3.0
    width: int = 32
    kind: ClassVar[str] = "learned"

    def __post_init__(self) -> None:
        if not self.kl > 0 or self.width < 1:
            raise ConfigError(
                "A learned coupling cannot be made like this",
                got=f"kl={self.kl}, width={self.width}",
                want="kl > 0 (without it the noise would carry the whole image) and width >= 1",
            )

    def extra(self, student: Denoiser) -> nn.Module | None:
        """The network of mu and ln sigma."""
        encoder = NoiseEncoder(student.sample_shape, self.width, student.sigma_data)
        return encoder.to(device=student.device, dtype=student.dtype)

    def __call__(
        self, x_0: Samples, eps: Samples, random: StepRandom, extra: nn.Module | None
    ) -> tuple[Samples, PerSample | None]:
        """``mu + sigma eps [b, ...]``, with gradient, and the cost ``[b]``."""
        if extra is None:
            raise ConfigError("A learned coupling needs its network", do="Pass Beside(extra=objective.extra(student))")
        mu, log_sigma = (v.to(eps.dtype) for v in extra(x_0))
        return mu + log_sigma.exp() * eps, self.kl * kl_to_normal(mu, log_sigma)


Coupling: TypeAlias = Independent | OptimalTransport | Learned


class NoiseEncoder(nn.Module):
    """``x_0 [b, ...] -> mu, ln sigma``, each ``[b, ...]``: both 0 at first.

    Images ``(c, h, w)``: five 3x3 convolutions, dilated 1, 1, 2, 4 and 1 (a field of 19 pixels); anything else: an MLP.

    Args:
        shape: of one sample; width: hidden channels or units; sigma_data: the input is divided by it.
    """

    def __init__(self, shape: tuple[int, ...], width: int, sigma_data: float) -> None:
        super().__init__()
        self.sigma_data = sigma_data
        if len(shape) == 3:
            sizes = [shape[0], *[width] * 4]
            hidden: list[nn.Module] = [
                nn.Conv2d(a, b, 3, padding=d, dilation=d)
                for a, b, d in zip(sizes[:-1], sizes[1:], (1, 1, 2, 4), strict=True)
            ]
            last: nn.Conv2d | nn.Linear = nn.Conv2d(width, 2 * shape[0], 3, padding=1)
        else:
            size = int(np.prod(shape))
            hidden = [nn.Linear(size, width), nn.Linear(width, width)]
            last = nn.Linear(width, 2 * size)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)  # type: ignore[arg-type]
        self.hidden, self.last = nn.ModuleList(hidden), last

    def forward(self, x_0: Samples) -> tuple[Tensor, Tensor]:
        x = x_0.to(self.last.weight.dtype) / self.sigma_data
        x = x if isinstance(self.last, nn.Conv2d) else x.flatten(1)
        for layer in self.hidden:
            x = F.silu(layer(x))
        mu, log_sigma = self.last(x).chunk(2, dim=1)
        return mu.reshape(x_0.shape), log_sigma.reshape(x_0.shape)


def kl_to_normal(mu: Tensor, log_sigma: Tensor) -> PerSample:
    """``KL(N(mu, sigma^2) || N(0, 1)) = sum (mu^2 + sigma^2 - 1)/2 - ln sigma``, ``[b]``, in nats."""
    # expm1: no cancellation where sigma is near 1
    return ((mu.square() + torch.expm1(2 * log_sigma)) / 2 - log_sigma).flatten(1).sum(1)


def assignment(cost: np.ndarray) -> np.ndarray:
    """The column of each row, a permutation, that makes ``sum_i cost[i, column[i]]`` least; ``cost [b, b]`` finite.

    Exact, O(b^3): each row in turn is joined by the shortest augmenting path in the reduced costs
    ``cost - u - v >= 0`` of the dual prices (Kuhn 1955; Edmonds and Karp 1972).
    """
    size = len(cost)
    row_of, column_of = np.full(size, -1), np.full(size, -1)
    v = cost.min(axis=0)
    u = (cost - v).min(axis=1)
    for first in range(size):
        distance, came_from = np.full(size, np.inf), np.full(size, -1)
        open_distance = distance.copy()  # the same, infinite where the column is settled
        settled: list[int] = []
        row, shortest = first, 0.0
        while row >= 0:  # Dijkstra, until a free column
            step = shortest + (cost[row] - u[row] - v)
            better = step < distance
            better[settled] = False
            distance[better] = open_distance[better] = step[better]
            came_from[better] = row
            column = int(open_distance.argmin())
            shortest = distance[column]
            open_distance[column] = np.inf
            settled.append(column)
            row = row_of[column]
        slack = shortest - distance[settled]
        v[settled] -= slack
        u[row_of[settled[:-1]]] += slack[:-1]
        u[first] += shortest
        while row != first:  # back along the path, each row takes the column it was reached by
            row = came_from[column]
            row_of[column], column_of[row], column = row, column, column_of[row]
    return column_of
