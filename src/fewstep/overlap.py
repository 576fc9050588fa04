"""Work that goes on side by side: the device makes the next block while the host uses the last one."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Arriving:
    """A tensor on its way to the host: the copy starts here, without waiting, and is waited for in :meth:`get`.

    From a CUDA device it goes to pinned memory, behind what the device was asked for before and not behind what comes
    after; from the CPU it is the tensor itself.
    """

    def __init__(self, x: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._host = x
        if x.device.type == "cuda":
            self._host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
            self._host.copy_(x, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(x.device))

    def get(self) -> Tensor:
        """The tensor on the CPU."""
        if self._event is not None:
            self._event.synchronize()
        return self._host


def ahead(blocks: Iterable[T]) -> Iterator[T]:
    """The same blocks, each given out once the next one has been asked for."""
    waiting: list[T] = []
    for block in blocks:
        waiting.append(block)
        if len(waiting) > 1:
            yield waiting.pop(0)
    yield from waiting


class Stopwatch:
    """Seconds that a device spends on what happens inside ``with watch:``, without waiting for it.

    Of a CUDA device the time between two events in its stream, which includes waiting for the host where the host is
    slower.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._seconds, self._started = device, 0.0, 0.0
        self._spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __enter__(self) -> None:
        if self._device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            self._spans.append((start, end))
            self._spans[-1][0].record(torch.cuda.current_stream(self._device))
        self._started = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        if self._device.type == "cuda":
            self._spans[-1][1].record(torch.cuda.current_stream(self._device))
        else:
            self._seconds += time.perf_counter() - self._started

    def seconds(self) -> float:
        """The sum; waits for the device."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            return sum(start.elapsed_time(end) for start, end in self._spans) / 1000
        return self._seconds
