"""Randomness that depends on (seed, stream, image index) alone.

All random numbers come from the counter-based generator Philox4x32-10 (Salmon et al., "Parallel random
numbers: as easy as 1, 2, 3", SC 2011), evaluated with integer tensor operations, so that image i gets the
same noise, time and dropout mask on any device, in any batch, on any number of processes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fewstep.errors import ConfigError

_MASK = 0xFFFFFFFF
_MULTIPLY = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox4x32-10: four 32-bit words (in int64 tensors) from four counter words and a 64-bit key."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(_MULTIPLY[0], c0)
        high1, low1 = _multiply(_MULTIPLY[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def _multiply(m: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32-bit words of ``m * x``, without overflow of the signed 64-bit product."""
    low_part = (x & 0xFFFF) * m
    high_part = (x >> 16) * m + (low_part >> 16)
    return high_part >> 16, ((high_part & 0xFFFF) << 16) | (low_part & 0xFFFF)


@dataclass(frozen=True)
class Streams:
    """Named random streams of one seed; each sample is addressed by its global index.

    ``Streams(seed).normal("noise", index, shape)`` gives row ``i`` as a function of
    ``(seed, "noise", index[i])`` alone.
    """

    seed: int

    def words(self, stream: str, index: Tensor, count: int) -> Tensor:
        """At least ``count`` 32-bit words per index, int64 ``[b, 4 * ceil(count / 4)]``."""
        return _words(_key(self.seed, stream), index, count)

    def uniform(self, stream: str, index: Tensor, shape: tuple[int, ...] = ()) -> Tensor:
        """Uniform numbers in the open interval (0, 1), float64 ``[b, *shape]``, 32 bits each."""
        count = math.prod(shape)
        bits = self.words(stream, index, count)[:, :count]
        return ((bits.double() + 0.5) * 2.0**-32).reshape(len(index), *shape)

    def normal(self, stream: str, index: Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal numbers ``[b, *shape]`` by Box-Muller in float64, then cast to ``dtype``."""
        count = math.prod(shape)
        u = (self.words(stream, index, count).double() + 0.5) * 2.0**-32
        radius, angle = (-2 * u[:, 0::2].log()).sqrt(), 2 * math.pi * u[:, 1::2]
        pairs = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1)
        return pairs.reshape(len(index), -1)[:, :count].reshape(len(index), *shape).to(dtype)

    def integers(self, stream: str, index: Tensor, high: int) -> Tensor:
        """Integers in [0, high), int64 ``[b]``."""
        return (self.uniform(stream, index) * high).long()


def _words(key: tuple[int, int], index: Tensor, count: int, lane: int = 0) -> Tensor:
    """Words of the counters (block, lane, index): int64 ``[b, 4 * ceil(count / 4)]``."""
    blocks = -(-count // 4)
    index = index.long().reshape(-1, 1)
    block = torch.arange(blocks, device=index.device).reshape(1, -1)
    zeros = torch.zeros_like(index * block)
    counter = (block + zeros, zeros + lane, (index & _MASK) + zeros, ((index >> 32) & _MASK) + zeros)
    return torch.stack(philox(counter, key), dim=-1).reshape(len(index), -1)


@lru_cache(maxsize=4096)
def _key(seed: int, stream: str) -> tuple[int, int]:
    digest = hashlib.blake2b(f"{seed}/{stream}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


class DropoutTape(TorchFunctionMode):
    """Draws dropout masks from a stream, records them in order, and replays them for chosen rows.

    Inside ``with tape.record():`` every ``torch.nn.functional.dropout`` (and ``dropout1d..3d``) of any
    network uses a mask that depends on (seed, image index, position of the call) alone. Inside
    ``with tape.replay(rows):`` the same calls get the same masks, restricted to ``rows``: this is the
    shared dropout mask of ECT (math.md 2.3, invariant G4), without saving or restoring the state of any
    generator, on every device. Dropout under activation checkpointing is refused (``use_reentrant=False``; the
    reentrant kind cannot be seen from here and must not be used).

    Args:
        streams: the run's streams.
        index: global image index of each row, int64 ``[b]``, on the device of the network.
    """

    def __init__(self, streams: Streams, index: Tensor) -> None:
        super().__init__()
        self._key, self._index = _key(streams.seed, "dropout"), index
        self._masks: list[Tensor] = []
        self._rows: Tensor | None = None
        self._recording = True
        self._call = 0

    def record(self) -> DropoutTape:
        """Start a new recording."""
        self._masks, self._rows, self._recording, self._call = [], None, True, 0
        return self

    def replay(self, rows: Tensor | None = None) -> DropoutTape:
        """Play the recorded masks again for ``rows`` (int64 ``[k]``), or for all rows."""
        self._rows, self._recording, self._call = rows, False, 0
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        if kind is None and not self._recording and self._call != len(self._masks):
            raise ConfigError(
                "The target pass drew another number of dropout masks than the student pass",
                got=self._call,
                want=len(self._masks),
                do="Make the network's dropout calls independent of its input",
            )

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _DROPOUTS:
            return self._dropout(_DROPOUTS[func], *args, **kwargs)
        if func in _REFUSED and _drops(func, args, kwargs):
            raise ConfigError(
                f"Dropout inside {func.__name__} cannot be shared by student and target",
                do="Set dropout_p=0 there (torch.nn.Dropout elsewhere is fine)",
            )
        return func(*args, **kwargs)

    def _dropout(
        self, spread: int | None, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Tensor:
        if not training or p == 0:
            return input
        mask = self._mask(input.shape if spread is None else input.shape[:spread] + (1,) * (input.ndim - spread), p)
        scaled = mask.to(input.dtype) / max(1 - _levels(p) / 65536, 2.0**-16)  # p = 1 keeps nothing: 0, not NaN
        return input.mul_(scaled) if inplace else input * scaled

    def _mask(self, shape: tuple[int, ...], p: float) -> Tensor:
        self._call += 1
        if self._recording:
            _refuse_recomputation()
            self._masks.append(self._draw(tuple(shape), p))
            return self._masks[-1]
        if self._call > len(self._masks):
            raise ConfigError("The target pass drew more dropout masks than the student pass", got=self._call)
        mask = self._masks[self._call - 1]
        if self._rows is None:
            return mask
        grouped = mask.reshape(len(self._index), -1, *mask.shape[1:])
        return grouped[self._rows].reshape(-1, *mask.shape[1:])

    def _draw(self, shape: tuple[int, ...], p: float) -> Tensor:
        """Keep-mask ``shape``: 16 bits per element, kept when they are at least ``65536 p``."""
        rows = len(self._index)
        if shape[0] % rows:
            raise ConfigError(
                "A dropout layer saw a first dimension that is not a multiple of the batch",
                got=tuple(shape),
                want=f"a multiple of {rows}",
            )
        count = math.prod(shape) // rows
        words = _words(self._key, self._index, -(-count // 2), lane=self._call)
        halves = torch.stack((words & 0xFFFF, words >> 16), dim=-1).reshape(rows, -1)[:, :count]
        return (halves >= _levels(p)).reshape(shape)


def _refuse_recomputation() -> None:
    """Activation checkpointing draws dropout again in backward, outside of the tape: another mask, a wrong gradient."""
    if torch.compiler.is_compiling():
        return
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint":
        raise ConfigError(
            "The network recomputes dropout in its backward pass, where it would draw another mask",
            do="Turn its activation checkpointing off, or its dropout: --set student.dropout=0",
        )


def _levels(p: float) -> int:
    return round(p * 65536)


_DROPOUTS: dict[Callable[..., Any], int | None] = {
    F.dropout: None,
    torch.dropout: None,
    F.dropout1d: 2,
    F.dropout2d: 2,
    F.dropout3d: 2,
}
"""Functions that draw masks -> how many leading dimensions the mask has (None: all of them)."""

_REFUSED: dict[Callable[..., Any], tuple[int, str, int, bool]] = {
    F.scaled_dot_product_attention: (4, "dropout_p", 99, True),
    F.multi_head_attention_forward: (10, "dropout_p", 13, True),
    F.alpha_dropout: (1, "p", 2, False),
    F.feature_alpha_dropout: (1, "p", 2, False),
}
"""Functions that drop in ways a tape cannot share -> place and name of p, place and default of ``training``."""


def _drops(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    place, name, flag, default = _REFUSED[func]
    p = args[place] if len(args) > place else kwargs.get(name, 0.0)
    training = args[flag] if len(args) > flag else kwargs.get("training", default)
    return bool(p) and bool(training)
