"""From source to batches: a pure function of the images seen, read one step ahead."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

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
    """

    def __init__(self, source: Source, model: Denoiser, config: DataConfig, seed: int) -> None:
        self._source, self._model, self._config = source, model, config
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
        if self._source.is_images:
            x = encode(x, self._model.value_range, self._model.dtype)
        else:
            x = x.to(self._model.dtype)
        return Batch(x, None if label is None else label.to(device=device, dtype=self._model.dtype, non_blocking=True))

    def close(self) -> None:
        """Stop reading ahead."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _read(self, positions: range) -> tuple[Tensor, Tensor | None]:
        index = indices_at(self._seed, positions.start, len(positions), len(self._source))
        x = self._source.read(index)
        where = torch.arange(positions.start, positions.stop)
        if self._config.flip:
            mirrored = self._streams.uniform("flip", where) < 0.5
            x = torch.where(mirrored.reshape(-1, 1, 1, 1), x.flip(-1), x)
        x = x.pin_memory() if self._model.device.type == "cuda" else x
        return x, self._labels(index, where)

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
