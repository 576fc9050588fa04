"""Samples kept in shards as a source: what ``fewstep generate`` writes, and any set with a tensor ``x``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from fewstep.data.pixels import prepare
from fewstep.data.shards import open_shards
from fewstep.data.sources import Source, View, count_classes, fingerprint
from fewstep.errors import DataError

SAMPLES, LABELS = "x", "label"
"""Names of the tensors: samples ``[n, ...]``, uint8 images or floats in model space; class indices int64 ``[n]``."""


class ShardSource:
    """See :class:`fewstep.data.Source`; rows are read from memory maps as they are asked for.

    Args:
        where: the folder.
        view: resize and channels are for images.

    Raises:
        DataError: no such set, no samples in it, or a view that cannot be had of them.
    """

    def __init__(self, where: str, view: View) -> None:
        self.name = f"shards:{where}"
        view.only_train(self.name)
        self._shards, self._view = open_shards(Path(where)), view
        tensors = self._shards.tensors
        if SAMPLES not in tensors or not tensors[SAMPLES][0]:
            raise DataError(f"The shards in '{where}' hold no samples", got=", ".join(tensors), want=f"'{SAMPLES}'")
        shape, dtype = tensors[SAMPLES]
        self.is_images = dtype == torch.uint8 and len(shape) == 3
        if not self.is_images and (view.resize is not None or view.channels is not None):
            raise DataError(f"'{self.name}' holds no images", got=f"{dtype} {list(shape)}",
                            do="Leave out --resize and --channels")  # fmt: skip
        self.key = self._shards.key
        self.shape = (view.channels or shape[0], *((view.resize,) * 2 if view.resize else shape[1:]))
        self.labels: np.ndarray | None = None
        if LABELS in tensors and view.labels:
            self.labels = self._shards.read(LABELS, np.arange(len(self))).long().numpy()
        self.num_classes = max(int(self.key.get("num_classes", 0)) if self.labels is not None else 0,
                               count_classes(self.labels))  # fmt: skip
        self.fingerprint = fingerprint(f"shards {list(self.shape)}", self._shards.fingerprint.encode(), self.labels)

    def __len__(self) -> int:
        return len(self._shards)

    def read(self, index: np.ndarray) -> torch.Tensor:
        """Samples at ``index``.

        Raises:
            DataError: a shard that is missing or damaged.
        """
        x = self._shards.read(SAMPLES, index)
        if not self.is_images:
            return x.float()
        if self.shape == tuple(x.shape[1:]):
            return x
        stack = x.permute(0, 2, 3, 1).numpy()
        return torch.from_numpy(prepare(stack, channels=self._view.channels, resize=self._view.resize))


def sharded(where: str, view: View) -> Source:
    """The samples in the folder ``where``: :class:`ShardSource`."""
    return ShardSource(where, view)
