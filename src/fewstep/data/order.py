"""The order of training images: a pure function of the seed and the number of images seen.

Image ``g`` of a run (``g = 0, 1, 2, ...``) is ``order(seed, g // n, n)[g % n]``, whatever the batch size
or the number of processes, so a resumed run needs no state of a loader.
"""

from __future__ import annotations

import functools

import numpy as np

from fewstep.errors import ConfigError


@functools.lru_cache(maxsize=4)
def order(seed: int, epoch: int, n: int) -> np.ndarray:
    """The permutation of ``0..n-1`` in which ``epoch`` visits the data.

    Stable argsort of ``n`` raw 64-bit words of Philox keyed by ``(seed mod 2**64, epoch)``. NumPy promises
    the raw words (not ``Generator.permutation``) for all versions, so the order outlives an upgrade.

    Args:
        seed: the run's seed, any integer.
        epoch: counted from 0.
        n: number of images, at least 1.

    Returns:
        int64 ``[n]``, read-only (the last four are cached).

    Raises:
        ConfigError: ``n < 1`` or ``epoch < 0``.
    """
    if n < 1 or epoch < 0:
        got = f"n={n}, epoch={epoch}"
        raise ConfigError("There is no such order of data", got=got, want="n >= 1 and epoch >= 0")
    words = np.random.Philox(key=np.array([seed % 2**64, epoch], dtype=np.uint64)).random_raw(n)
    permutation = np.argsort(words, kind="stable").astype(np.int64, copy=False)
    permutation.setflags(write=False)
    return permutation


def indices_at(seed: int, start: int, count: int, n: int) -> np.ndarray:
    """Dataset indices of the global training images ``start .. start + count - 1``.

    Args:
        seed: the run's seed.
        start: images seen before, ``>= 0``.
        count: how many, ``>= 0``; may cross any number of epochs.
        n: number of images in the data set.

    Returns:
        int64 ``[count]``; concatenating any partition of a range gives the range.

    Raises:
        ConfigError: ``start`` or ``count`` is negative, or ``n < 1``.
    """
    if n < 1 or start < 0 or count < 0:
        raise ConfigError(
            "There is no such range of training images",
            got=f"start={start}, count={count}, n={n}",
            want="start >= 0, count >= 0, n >= 1",
        )
    pieces = []
    end = start + count
    while start < end:
        epoch, offset = divmod(start, n)
        pieces.append(order(seed, epoch, n)[offset : offset + end - start])
        start += len(pieces[-1])
    return np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int64)
