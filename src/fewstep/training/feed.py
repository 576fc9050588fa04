"""From source to batches: a pure function of the images seen, read one step ahead, or once and for all."""

from __future__ import annotations

import math
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fewstep.data import Source
from fewstep.data.codec import encode
from fewstep.data.order import indices_at
from fewstep.data.sources import conditions_of
from fewstep.denoiser import Denoiser
from fewstep.randomness import Streams
from fewstep.training.config import DataConfig
from fewstep.types import Batch


class Feed:
    """Batches in model space by global position; the next one is read while the last one trains.

    Args:
        source: the data.
        model: gives value range, form of the conditions and device.
        config: label dropping and mirroring.
        seed: of the data order.
        resident: keep all samples on the model's device; "auto" is on a GPU where they fill at most a quarter of
            its free memory.
    """

    def __init__(
        self,
        source: Source,
        model: Denoiser,
        config: DataConfig,
        seed: int,
        resident: Literal["auto", "on", "off"] = "off",
    ) -> None:
        self._source, self._model, self._config = source, model, config
        self._all = _all_of(source, model.device) if _stays(source, model.device, resident) else None
        self._seed, self._streams = seed, Streams(seed)
        nothing = model.condition(None, 1)
        self._nothing = torch.zeros(0) if nothing is None else nothing.detach().float().cpu()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="fewstep-feed")
        self._next: tuple[range, Future[tuple[Tensor, Tensor | None]]] | None = None

    def batch(self, positions: range, following: range | None = None) -> Batch:
        """The training images at global ``positions``; starts to read ``following``."""
        if self._next is not None and self._next[0] == positions:
            x, label = self._next[1].result()
        else:
            x, label = self._read(positions)
        self._next = (following, self._pool.submit(self._read, following)) if following is not None else None
        device = self._model.device
        x = x.to(device, non_blocking=True)
        if self._all is not None:
            x = self._mirror(self._all[x], torch.arange(positions.start, positions.stop))
        if self._source.is_images:
            x = encode(x, self._model.value_range, self._model.dtype)
        else:
            x = x.to(self._model.dtype)
        return Batch(x, None if label is None else label.to(device=device, dtype=self._model.dtype, non_blocking=True))

    def close(self) -> None:
        """Stop reading ahead."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _read(self, positions: range) -> tuple[Tensor, Tensor | None]:
        """Samples, or only their indices where the samples are on the device; and labels."""
        index = indices_at(self._seed, positions.start, len(positions), len(self._source))
        where = torch.arange(positions.start, positions.stop)
        resident = self._all is not None
        x = torch.from_numpy(index) if resident else self._mirror(self._source.read(index), where)
        x = x.pin_memory() if self._model.device.type == "cuda" else x
        return x, self._labels(index, where)

    def _mirror(self, x: Tensor, where: Tensor) -> Tensor:
        """Half of the images, mirrored; which, depends on the position alone."""
        if not self._config.flip:
            return x
        mirrored = (self._streams.uniform("flip", where) < 0.5).to(x.device, non_blocking=True)
        return torch.where(mirrored.reshape(-1, 1, 1, 1), x.flip(-1), x)

    def _labels(self, index: np.ndarray, where: Tensor) -> Tensor | None:
        """Packed rows for samples ``index``; those that are dropped say nothing, in the model's way."""
        rows = self._rows(index)
        if rows is not None and self._config.label_drop > 0:
            kept = self._streams.uniform("label_drop", where) >= self._config.label_drop
            rows = torch.where(kept[:, None], rows, self._nothing)
        return rows

    def _rows(self, index: np.ndarray) -> Tensor | None:
        """What is said of samples ``index``: embedded captions, or one-hot classes; None where nothing is."""
        embedded, classes = conditions_of(self._source), self._model.num_classes
        if self._model.conditioning.parts and embedded is not None:
            return embedded.read(index)
        if classes == 0 or self._source.labels is None:
            return None
        return torch.nn.functional.one_hot(torch.from_numpy(self._source.labels[index]), classes).float()


BLOCK = 4096
"""Samples that are read at once on their way to the device."""


def _stays(source: Source, device: torch.device, resident: Literal["auto", "on", "off"]) -> bool:
    """Whether all samples are to be kept on the device."""
    if resident != "auto":
        return resident == "on"
    if device.type != "cuda":
        return False
    size = len(source) * math.prod(source.shape) * (1 if source.is_images else 4)
    return 4 * size <= torch.cuda.mem_get_info(device)[0]


def _all_of(source: Source, device: torch.device) -> Tensor:
    """Every sample, ``[n, ...]``, as the source gives them."""
    count = len(source)
    first = source.read(np.arange(min(BLOCK, count)))
    out = torch.empty(count, *first.shape[1:], dtype=first.dtype, device=device)
    out[: len(first)] = first.to(device)
    for start in range(BLOCK, count, BLOCK):
        rows = np.arange(start, min(start + BLOCK, count))
        out[start : start + len(rows)] = source.read(rows).to(device)
    return out
