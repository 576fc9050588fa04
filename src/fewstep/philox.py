"""Philox4x32-10, a counter-based generator: random words as a pure function of a counter and a key.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. Integer tensor operations alone, so the
words are the same on every device and ``torch.compile`` fuses them into one kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeAlias

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLY = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)

CHUNK = 1 << 14
"""Counters at a time on the CPU: what their words take in int64 (four times 128 KiB) stays in its cache."""

Key: TypeAlias = tuple[int, int] | Tensor
"""A 64-bit key as two words, or its :func:`round_keys` on a device, int64 ``[10, 2]``."""
Word: TypeAlias = Tensor | int
Words: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]


def philox(counter: tuple[Word, Word, Word, Word], key: Key) -> Words:
    """Philox4x32-10: four 32-bit words (in int64 tensors) from four counter words and a 64-bit key.

    The counter words broadcast against each other; those that are tensors are int64.
    """
    c0, c1, c2, c3 = counter
    for k0, k1 in _rounds(key):
        (high0, low0), (high1, low1) = _product(_MULTIPLY[0], c0), _product(_MULTIPLY[1], c2)
        c0, c1, c2, c3 = (high1 ^ (c1 ^ k0)) & _MASK, low1, (high0 ^ (c3 ^ k1)) & _MASK, low0
    return c0, c1 & _MASK, c2, c3 & _MASK  # type: ignore[return-value]  # tensors, as one word of the counter is


def _product(m: int, x: Word) -> tuple[Word, Word]:
    """High and low word of ``m x``, 0 <= x < 2^32, each modulo 2^32.

    Eager kernels wrap: the int64 product has the right 64 bits. Compiled C++ must not overflow, or its optimiser, which
    takes the product for positive, drops masks that are needed (seen with inductor of torch 2.13).
    """
    if not torch.compiler.is_compiling():
        product = m * x
        return product >> 32, product
    low = (x & 0xFFFF) * m
    high = (x >> 16) * m + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def _rounds(key: Key) -> Iterator[tuple[Word, Word]]:
    if isinstance(key, Tensor):
        yield from ((pair[0], pair[1]) for pair in key.unbind())
        return
    for i in range(10):
        yield (key[0] + i * _WEYL[0]) & _MASK, (key[1] + i * _WEYL[1]) & _MASK


def round_keys(key: tuple[int, int], device: torch.device) -> Tensor:
    """The keys of the ten rounds on a device, where a compiled kernel reads them: one kernel for all keys."""
    return torch.tensor(list(_rounds(key))).to(device)


def draw(make: Callable[[Words], Tensor], key: Key, index: Tensor, blocks: int, lane: Word = 0) -> Tensor:
    """What ``make`` makes of the words of the counters (block, lane, index), for ``blocks`` blocks of four words.

    Args:
        make: element by element, four tensors of words ``[r, n]`` -> ``[r, n, k]``.
        index: int64 ``[b]``, on the device where the result is wanted.

    Returns:
        ``[b, blocks * k]``; on the CPU computed piece by piece, so that what lies between stays in the cache.
    """
    index = index.long().reshape(-1, 1)
    low, high = index & _MASK, (index >> 32) & _MASK

    def piece(rows: slice, start: int, end: int) -> Tensor:
        block = torch.arange(start, end, device=index.device).reshape(1, -1)
        return make(philox((block, lane, low[rows], high[rows]), key))

    if torch.compiler.is_compiling() or index.device.type != "cpu" or len(index) * blocks <= CHUNK:
        return piece(slice(None), 0, blocks).flatten(1)
    rows, columns = max(1, CHUNK // blocks), min(blocks, CHUNK)
    out: Tensor | None = None
    for row in range(0, len(index), rows):
        for start in range(0, blocks, columns):
            part = piece(slice(row, row + rows), start, min(start + columns, blocks))
            out = part.new_empty(len(index), blocks, part.shape[-1]) if out is None else out
            out[row : row + rows, start : start + columns] = part
    assert out is not None  # there is more than one piece
    return out.flatten(1)
