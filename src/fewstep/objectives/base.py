"""What every objective is: a frozen choice of clocks, bridge, target and penalty."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from fewstep.denoiser import Denoiser
from fewstep.randomness import DropoutTape, Streams
from fewstep.types import Batch, PerSample, Progress


@dataclass(frozen=True)
class LossOutput:
    """``per_sample [b]`` (whose mean over the global batch is minimised) and detached ``logs``."""

    per_sample: PerSample
    logs: dict[str, Tensor | float] = field(default_factory=dict)


class StepRandom:
    """The random numbers of one step's rows, addressed by global image index.

    Args:
        streams: the run's streams.
        index: global training-image index per row, int64 ``[b]``, on the host.
        device: where noise and masks are needed.
    """

    def __init__(self, streams: Streams, index: Tensor, device: torch.device) -> None:
        self._streams, self._index = streams, index
        self._on_device = index.to(device, non_blocking=True)

    def uniform(self, stream: str) -> Tensor:
        """Uniform numbers on the host, float64 ``[b]``: for laws of t."""
        return self._streams.uniform(stream, self._index)

    def normal(self, stream: str, like: Tensor) -> Tensor:
        """Standard normal noise like ``like [b, ...]``, drawn on its device."""
        return self._streams.normal(stream, self._on_device, tuple(like.shape[1:]), like.dtype)

    def tape(self) -> DropoutTape:
        """A fresh dropout tape for these rows."""
        return DropoutTape(self._streams, self._on_device)


class Objective(Protocol):
    """A training objective: stateless, all schedules pure functions of ``progress``."""

    kind: ClassVar[str]

    def loss(self, student: Denoiser, batch: Batch, progress: Progress, random: StepRandom) -> LossOutput:
        """Loss per sample; gradients flow through the student's own pass only."""
        ...

    def describe(self, progress: Progress) -> dict[str, float]:
        """Numbers for the progress bar and the log: stage, mean r/t, ..."""
        ...


def to_device(values: Tensor, like: Tensor) -> Tensor:
    """Host float64 times ``[b]`` in the dtype and on the device of ``like``, without waiting."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return values.to(device=like.device, dtype=dtype, non_blocking=True)
