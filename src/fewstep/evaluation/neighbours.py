"""Nearest neighbours: which training images stand closest to a few samples, to see by eye whether any was memorised."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fewstep.data import Source
from fewstep.errors import DataError
from fewstep.evaluation.features import FeatureNet, iter_features, open_features

SAMPLES, NEAREST = 8, 3
MOST_THROUGH_A_NET = 10_000
"""Larger data is searched by pixels: a second pass through a feature net would cost as much as the reference."""

READ_BLOCK = 512
ROUNDING = 1e-5
"""Share of the largest feature vector's length below which a distance is rounding."""


@dataclass(frozen=True)
class Neighbours:
    """Samples and the training images nearest to each, nearest first.

    Args:
        net: name of the feature net whose Euclidean distances these are.
        searched: how many training images were compared.
        samples: uint8 ``[n, c, h, w]``.
        found: uint8 ``[n, k, c, h, w]``.
        index: int64 ``[n, k]``, rows of the training data.
        distances: float32 ``[n, k]``.
        apart: float32 ``[n]``, from the nearest training image to the nearest one that is not equal to it.
    """

    net: str
    searched: int
    samples: Tensor
    found: Tensor
    index: Tensor
    distances: Tensor
    apart: Tensor

    @property
    def ratios(self) -> Tensor:
        """``[n]`` distance of a sample to its nearest image, in units of that image's own nearest distance.

        Below 1, the sample is closer to a training image than the nearest other training image is.
        """
        return self.distances[:, 0] / self.apart


def find_neighbours(
    samples: Tensor,
    source: Source,
    net: FeatureNet | None = None,
    *,
    nearest: int = NEAREST,
    device: torch.device | str = "cpu",
) -> Neighbours:
    """The ``nearest`` training images of each of the first 8 samples, in constant memory; two passes over the data.

    Args:
        samples: uint8 ``[n, c, h, w]``.
        source: all of the training data.
        net: where distances are measured; pixels in [-1, 1] without one, or for data above 10,000 images.

    Raises:
        DataError: samples or data that are not images of one shape, or no more training images than ``nearest``.
    """
    if samples.dtype != torch.uint8 or samples.ndim != 4 or tuple(samples.shape[1:]) != tuple(source.shape):
        raise DataError(
            "These samples have no neighbours in this data", got=list(samples.shape[1:]), want=list(source.shape)
        )
    if len(source) <= nearest:
        raise DataError("The data is too small for its neighbours", got=len(source), want=f"more than {nearest}")
    if net is None or len(source) > MOST_THROUGH_A_NET:
        net = open_features("pixels", reference=samples[:2])
    shown = samples[:SAMPLES].cpu()
    index, distances = _search(shown, source, net, nearest, device)
    first = source.read(index[:, 0].numpy())
    _, apart = _search(first, source, net, 1, device, equal=False)
    found = source.read(index.flatten().numpy()).view(*index.shape, *samples.shape[1:])
    return Neighbours(net.name, len(source), shown, found, index, distances, apart[:, 0])


def _search(
    images: Tensor, source: Source, net: FeatureNet, k: int, device: torch.device | str, *, equal: bool = True
) -> tuple[Tensor, Tensor]:
    """Rows and distances ``[n, k]`` of the k nearest; of equal distances the lower row comes first.

    ``equal=False`` passes over rows that are equal up to the rounding of float32 features.
    """
    wanted = torch.cat(list(iter_features(net, images, device=device))).double()
    least = ROUNDING * float(wanted.norm(dim=1).max())
    best = torch.full((len(images), 0), 0.0, dtype=torch.float64)
    rows = torch.zeros(len(images), 0, dtype=torch.int64)
    start = 0
    for features in iter_features(net, _blocks(source), device=device):
        block = torch.cdist(wanted, features.double(), compute_mode="donot_use_mm_for_euclid_dist")
        block = block if equal else block.masked_fill(block <= least, torch.inf)
        here = torch.arange(start, start + len(features)).expand(len(images), -1)
        best, order = torch.cat([best, block], 1).sort(dim=1, stable=True)
        rows = torch.cat([rows, here], 1).gather(1, order)[:, :k]
        best, start = best[:, :k], start + len(features)
    return rows, best.float()


def _blocks(source: Source) -> Iterator[Tensor]:
    for start in range(0, len(source), READ_BLOCK):
        yield source.read(np.arange(start, min(start + READ_BLOCK, len(source))))
