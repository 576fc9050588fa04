"""Randomness that depends on (seed, stream, image index) alone.

All random numbers come from the counter-based generator Philox4x32-10 (Salmon et al., "Parallel random
numbers: as easy as 1, 2, 3", SC 2011), evaluated with integer tensor operations, so that image i gets the
same noise, time and dropout mask on any device, in any batch, on any number of processes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import lru_cache, reduce
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fewstep.compiling import compiled
from fewstep.errors import ConfigError
from fewstep.philox import Key, Words, draw, round_keys


@dataclass(frozen=True)
class Streams:
    """Named random streams of one seed; each sample is addressed by its global index.

    ``Streams(seed).normal("noise", index, shape)`` gives row ``i`` as a function of
    ``(seed, "noise", index[i])`` alone.
    """

    seed: int

    def words(self, stream: str, index: Tensor, count: int) -> Tensor:
        """At least ``count`` 32-bit words per index, int64 ``[b, 4 * ceil(count / 4)]``."""
        return draw(lambda words: torch.stack(words, dim=-1), _key(self.seed, stream), index, -(-count // 4))

    def uniform(self, stream: str, index: Tensor, shape: tuple[int, ...] = ()) -> Tensor:
        """Uniform numbers in the open interval (0, 1), float64 ``[b, *shape]``, 32 bits each."""
        count = math.prod(shape)
        bits = self.words(stream, index, count)[:, :count]
        return ((bits.double() + 0.5) * 2.0**-32).reshape(len(index), *shape)

    def normal(self, stream: str, index: Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal numbers ``[b, *shape]`` by Box-Muller in float64, then cast to ``dtype``."""
        count = math.prod(shape)
        pairs = draw(lambda words: _box_muller(words).to(dtype), _key(self.seed, stream), index, -(-count // 4))
        return pairs[:, :count].reshape(len(index), *shape)

    def integers(self, stream: str, index: Tensor, high: int) -> Tensor:
        """Integers in [0, high), int64 ``[b]``."""
        return (self.uniform(stream, index) * high).long()


def _box_muller(words: Words) -> Tensor:
    """Four normal numbers ``[b, n, 4]``, float64, of four words ``[b, n]``."""
    u = [(word.double() + 0.5) * 2.0**-32 for word in words]
    radius, angle = [(-2 * v.log()).sqrt() for v in u[0::2]], [2 * math.pi * v for v in u[1::2]]
    pairs = [(r * a.cos(), r * a.sin()) for r, a in zip(radius, angle, strict=True)]
    return torch.stack([number for pair in pairs for number in pair], dim=-1)


@lru_cache(maxsize=4096)
def _key(seed: int, stream: str) -> tuple[int, int]:
    digest = hashlib.blake2b(f"{seed}/{stream}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


@dataclass(frozen=True)
class _Packed:
    """A mask in one bit per element: ``bits [b, m]`` uint8 holds element ``i m + j`` of a row in bit i of byte j."""

    bits: Tensor
    shape: tuple[int, ...]

    @classmethod
    def of(cls, mask: Tensor, rows: int) -> _Packed:
        """The mask of a batch of ``rows`` images; its first dimension is a multiple of that."""
        flat = mask.reshape(rows, -1)
        planes = F.pad(flat, (0, -flat.shape[1] % 8)).to(torch.uint8).reshape(rows, 8, -1)
        return cls(reduce(torch.bitwise_or, [planes[:, i] << i for i in range(8)]), tuple(mask.shape))

    def unpacked(self, rows: Tensor | None) -> Tensor:
        """The mask of all images, or of ``rows``."""
        bits = self.bits if rows is None else self.bits[rows]
        one = (1 << torch.arange(8, device=bits.device)).to(torch.uint8)
        count = math.prod(self.shape) // len(self.bits)
        flat = ((bits[:, None] & one[:, None]) != 0).reshape(len(bits), -1)[:, :count]
        return flat.reshape(-1, *self.shape[1:])


class DropoutTape(TorchFunctionMode):
    """Draws dropout masks from a stream, records them in order, and replays them for chosen rows.

    Inside ``with tape.record():`` every ``torch.nn.functional.dropout`` (and ``dropout1d..3d``) of any
    network uses a mask that depends on (seed, image index, position of the call) alone. Inside
    ``with tape.replay(rows):`` the same calls get the same masks, restricted to ``rows``: this is the
    shared dropout mask of ECT (math.md 2.3, invariant G4), without saving or restoring the state of any
    generator, on every device. Activation checkpointing must ask :meth:`contexts` for the masks of its second pass, as
    :mod:`fewstep.backbones.recompute` does; any other is refused (``use_reentrant=False``; the reentrant kind cannot
    be seen from here and must not be used).

    Args:
        streams: the run's streams.
        index: global image index of each row, int64 ``[b]``, on the device of the network.
    """

    def __init__(self, streams: Streams, index: Tensor) -> None:
        super().__init__()
        self._key, self._index = _key(streams.seed, "dropout"), index
        self._masks: list[Tensor | _Packed] = []
        self._rows: Tensor | None = None
        self._recording, self._packing = True, False
        self._call = 0

    def record(self) -> DropoutTape:
        """Start a new recording."""
        self._masks, self._rows, self._recording, self._call = [], None, True, 0
        return self

    def replay(self, rows: Tensor | None = None) -> DropoutTape:
        """Play the recorded masks again for ``rows`` (int64 ``[k]``), or for all rows."""
        self._rows, self._recording, self._call = rows, False, 0
        return self

    @staticmethod
    def active() -> DropoutTape | None:
        """The tape that is open here, the innermost one; not inside ``torch.compile``."""
        stack = torch.overrides._get_current_function_mode_stack()  # type: ignore[no-untyped-call]
        return next((mode for mode in reversed(stack) if isinstance(mode, DropoutTape)), None)

    def contexts(self) -> tuple[AbstractContextManager[object], AbstractContextManager[object]]:
        """For part of a pass whose backward runs it again: a context for now, and one for then, with the same masks.

        The part's masks are kept in one bit per element: drawing them again would cost as much as the first time, and
        keeping them as bytes a quarter of what float32 activations of their shape take.
        """
        return self._keeping_bits(), _Onward(self)

    @contextmanager
    def _keeping_bits(self) -> Iterator[None]:
        before, self._packing = self._packing, True
        try:
            yield
        finally:
            self._packing = before

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
        """``input * scale * mask``: of these products autograd saves the mask alone, one byte per element."""
        if not training or p == 0:
            return input
        mask = self._mask(input.shape if spread is None else input.shape[:spread] + (1,) * (input.ndim - spread), p)
        scale = 1 / max(1 - _levels(p) / 65536, 2.0**-16)  # p = 1 keeps nothing: 0, not NaN
        return (input.mul_(scale) if inplace else input * scale).mul_(mask)

    def _mask(self, shape: tuple[int, ...], p: float) -> Tensor:
        self._call += 1
        if self._recording:
            if not self._packing:
                _refuse_recomputation()
            mask = self._draw(tuple(shape), p)
            self._masks.append(_Packed.of(mask, len(self._index)) if self._packing else mask)
            return mask
        if self._call > len(self._masks):
            raise ConfigError("The target pass drew more dropout masks than the student pass", got=self._call)
        kept = self._masks[self._call - 1]
        if isinstance(kept, _Packed):
            return kept.unpacked(self._rows)
        if self._rows is None:
            return kept
        grouped = kept.reshape(len(self._index), -1, *kept.shape[1:])
        return grouped[self._rows].reshape(-1, *kept.shape[1:])

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
        drawn = _KEPT if torch.compiler.is_compiling() else _kept
        return drawn(self._index, *self._key, self._call, -(-count // 8), _levels(p))[:, :count].reshape(shape)


def _kept(index: Tensor, first: int, second: int, lane: int, blocks: int, least: int) -> Tensor:
    """Mask ``[b, 8 blocks]`` of the words of key (first, second): which 16-bit halves are at least ``least``."""
    if index.device.type != "cuda":
        return _mask_of(index, lane, blocks, least, (first, second))
    return _fused(index, lane, blocks, least, (first, second))


def _mask_of(index: Tensor, lane: int | Tensor, blocks: int, least: int, key: Key) -> Tensor:
    def kept(words: Words) -> Tensor:
        halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
        return torch.stack([half >= least for half in halves], dim=-1)

    return draw(kept, key, index, blocks, lane)


_compiled_mask = compiled(_mask_of, dynamic=True)


def _fused(index: Tensor, lane: int, blocks: int, least: int, key: tuple[int, int]) -> Tensor:
    """On a GPU, one kernel for all masks, where some 150 small ones for each would cost more than the network."""
    number = torch.full((), lane, device=index.device)
    return _compiled_mask(index, number, blocks, least, _keys_on(key, index.device))


@lru_cache(maxsize=64)
def _keys_on(key: tuple[int, int], device: torch.device) -> Tensor:
    return round_keys(key, device)


_KEPT = torch.library.custom_op(
    "fewstep::kept",
    _kept,
    mutates_args=(),
    schema="(Tensor index, int first, int second, int lane, int blocks, int least) -> Tensor",
)
"""The same as one opaque operation: inside a compiled loss the rounds of Philox would be most of what is compiled."""

_KEPT.register_fake(
    lambda index, first, second, lane, blocks, least: index.new_empty((index.shape[0], 8 * blocks), dtype=torch.bool)
)


class _Onward(DropoutTape):
    """Plays the masks of a tape from where it is now, as often as wanted, whatever happens to the tape."""

    def __init__(self, tape: DropoutTape) -> None:
        TorchFunctionMode.__init__(self)
        self._index, self._masks, self._rows = tape._index, tape._masks, tape._rows
        self._recording, self._packing = False, False
        self._start = self._call = tape._call

    def __enter__(self) -> _Onward:
        self._call = self._start
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        TorchFunctionMode.__exit__(self, kind, error, trace)  # type: ignore[no-untyped-call]


def _refuse_recomputation() -> None:
    """Foreign checkpointing draws dropout again in backward, outside of the tape: another mask, a wrong gradient."""
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
