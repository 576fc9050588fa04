"""Embedded prompts: every caption is encoded once, kept in the user's cache, read back by the number of its image.

The cache holds one set of shards (:mod:`fewstep.data.shards`) per text encoder and set of captions,
``embeddings/KEY``: a row per different caption. It may be deleted at any time.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fewstep.data.shards import SHARD_BYTES, Shards, ShardWriter, open_shards
from fewstep.data.sources import Source

FORMAT = 1
"""Version of what cached rows mean; part of their key."""

BLOCK = 16
"""Captions that are encoded together; a shard holds whole blocks, so that a stop changes no bit."""

HALF_BYTES = 8 * 2**30
"""Rows that would take more than this in float32 are kept in float16 (relative rounding 5e-4)."""

OnEncoded = Callable[[int, int], None]
"""Called with how many different captions are encoded, and how many there are."""


class Encoder(Protocol):
    """Prompts to packed rows; ``hash`` changes with anything that a row depends on beside its prompt."""

    @property
    def hash(self) -> str:
        """sha256, in hex."""
        ...

    @property
    def width(self) -> int:
        """Numbers per row."""
        ...

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Rows float32 ``[b, width]``."""
        ...


class Embedded:
    """The embedded captions of a source: see :class:`fewstep.data.sources.Conditions`.

    Args:
        shards: a row per different caption, as "cond".
        captions: one per sample; the different ones, in the order of their first appearance, are the rows.
    """

    def __init__(self, shards: Shards, captions: Sequence[str]) -> None:
        number = {caption: i for i, caption in enumerate(dict.fromkeys(captions))}
        self._shards, self._row = shards, np.array([number[c] for c in captions], dtype=np.int64)
        (self.width,), _ = shards.tensors["cond"]

    def __len__(self) -> int:
        return len(self._row)

    def read(self, index: np.ndarray) -> Tensor:
        """Rows of the samples at ``index``, float32 ``[b, width]``."""
        return self._shards.read("cond", self._row[index]).float()


def embed(encoder: Encoder, captions: Sequence[str], cache: Path, on_encoded: OnEncoded | None = None) -> Embedded:
    """The embedded captions; what ``cache`` holds already is not encoded again.

    A stop loses at most a minute of encoding: the next call goes on, to the same bits (CPU).

    Args:
        cache: the folder below which every set of rows has a folder of its own.

    Raises:
        DataError: a damaged shard in the cache, with what to do.
        CheckpointError: the text encoders cannot be used.
        StorageError: the disk refused; what was encoded is kept.
    """
    different = list(dict.fromkeys(captions))
    key, total = _key(encoder, different), len(different)
    dtype = getattr(torch, key["dtype"])
    rows = max(1, SHARD_BYTES // (encoder.width * dtype.itemsize) // BLOCK) * BLOCK
    with ShardWriter(cache / _digest(key), key, total, rows) as writer:
        if on_encoded is not None and writer.done < total:
            on_encoded(writer.done, total)
        while writer.done < total:
            start = writer.done - writer.done % BLOCK  # whole blocks: neighbours change the rounding
            encoded = encoder.encode(different[start : start + BLOCK])
            writer.add({"cond": encoded[writer.done - start :].to(dtype)})
            if on_encoded is not None:
                on_encoded(writer.done, total)
    return open_embedded(encoder, captions, cache)


def open_embedded(encoder: Encoder, captions: Sequence[str], cache: Path) -> Embedded:
    """The rows that :func:`embed` has finished.

    Raises:
        DataError: it has not.
    """
    return Embedded(open_shards(cache / _digest(_key(encoder, list(dict.fromkeys(captions))))), captions)


def with_conditions(source: Source, conditions: Embedded) -> Source:
    """The same source, with what a network is to be told about each of its samples."""
    twin = copy.copy(source)
    vars(twin)["conditions"] = conditions
    return twin


def _key(encoder: Encoder, different: Sequence[str]) -> dict[str, Any]:
    half = 4 * encoder.width * len(different) > HALF_BYTES
    return {
        "format": FORMAT,
        "encoder": encoder.hash,
        "captions": _digest(list(different)),
        "dtype": "float16" if half else "float32",
    }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
