"""Images as latents: encoded once by a VAE, kept in the user's cache, read back as they are.

The cache holds one set of shards (:mod:`fewstep.data.shards`) per pair of data and VAE, ``latents/KEY``; the key covers
the VAE's weights and scaling, and the data with their preprocessing. It may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fewstep.data.shards import SHARD_BYTES, Shards, ShardWriter, open_shards
from fewstep.data.sources import Source, captions_of, conditions_of
from fewstep.levels import Codec

FORMAT = 1
"""Version of what cached latents mean; part of their key."""

BLOCK = 64
"""Images that are read and encoded together; a shard holds whole blocks, so that a stop changes no bit."""

MEASURED = 4096
"""Most latents that their mean and standard deviation are taken from, evenly spaced."""

OnEncoded = Callable[[int, int], None]
"""Called with how many images are encoded, and how many there are."""


class LatentSource:
    """A source of latents, float32 ``[b, c, h, w]``; name, labels, captions and conditions are those of the images.

    Args:
        pixels: the images.
        shards: their latents, as "x".
    """

    is_images = False

    def __init__(self, pixels: Source, shards: Shards) -> None:
        self.pixels, self._shards = pixels, shards
        self.name, self.labels, self.num_classes = pixels.name, pixels.labels, pixels.num_classes
        self.captions, self.conditions = captions_of(pixels), conditions_of(pixels)
        self.shape, _ = shards.tensors["x"]
        self.fingerprint = shards.fingerprint

    def __len__(self) -> int:
        return len(self._shards)

    def read(self, index: np.ndarray) -> torch.Tensor:
        """Latents at ``index``."""
        return self._shards.read("x", index)

    @cached_property
    def moments(self) -> tuple[float, float]:
        """Mean and standard deviation of all values of up to 4,096 latents."""
        index = np.linspace(0, len(self) - 1, min(MEASURED, len(self))).round().astype(np.int64)
        x = self.read(index).double()
        return float(x.mean()), float(x.std())


class Decoded:
    """Latents from anywhere as the images they decode to, for references and pictures; decoded at every reading.

    Args:
        latents: a source of latents.
        codec: the VAE they belong to.
    """

    is_images = True

    def __init__(self, latents: Source, codec: Codec) -> None:
        self._latents, self._codec = latents, codec
        self.name, self.labels, self.num_classes = latents.name, latents.labels, latents.num_classes
        self.shape = codec.image_shape(tuple(latents.shape))
        self.fingerprint = _digest({"latents": latents.fingerprint, "vae": _vae(codec)})

    def __len__(self) -> int:
        return len(self._latents)

    def read(self, index: np.ndarray) -> torch.Tensor:
        """Images at ``index``, uint8 ``[b, C, H, W]``."""
        return self._codec.decode(self._latents.read(index))


def latents_of(
    source: Source,
    codec: Codec,
    cache: Path,
    *,
    device: torch.device | str = "cpu",
    on_encoded: OnEncoded | None = None,
) -> LatentSource:
    """The latents of a source of images; what ``cache`` holds already is not encoded again.

    A stop loses at most a minute of encoding: the next call goes on, to the same bits (CPU).

    Args:
        cache: the folder below which every set of latents has a folder of its own.
        device: where to encode.

    Raises:
        DataError: images that the VAE does not read; a damaged shard in the cache, with what to do.
        CheckpointError: the VAE is gone or has changed.
        StorageError: the disk refused; what was encoded is kept.
    """
    folder, key, total = cache / latents_key(source, codec), _key(source, codec), len(source)
    with ShardWriter(folder, key, total, _rows_per_shard(source, codec)) as writer:
        if on_encoded is not None and writer.done < total:
            on_encoded(writer.done, total)
        for start in range(writer.done, total, BLOCK):
            images = source.read(np.arange(start, min(start + BLOCK, total)))
            writer.add({"x": codec.encode(images.to(device)).cpu()})
            if on_encoded is not None:
                on_encoded(writer.done, total)
    return open_latents(source, codec, cache)


def open_latents(source: Source, codec: Codec, cache: Path) -> LatentSource:
    """The latents that :func:`latents_of` has finished.

    Raises:
        DataError: it has not.
    """
    return LatentSource(source, open_shards(cache / latents_key(source, codec)))


def latents_key(source: Source, codec: Codec) -> str:
    """The name of a set of latents: sha256, in hex, of all that they depend on."""
    return _digest(_key(source, codec))


def pictures_of(source: Source, codec: Codec | None) -> Source:
    """What the samples of a source look like: itself, the images behind latents, or latents decoded."""
    if isinstance(source, LatentSource):
        return source.pixels
    return source if codec is None or source.is_images else Decoded(source, codec)


def _key(source: Source, codec: Codec) -> dict[str, Any]:
    data = {"fingerprint": source.fingerprint, "count": len(source), "shape": [int(side) for side in source.shape]}
    return {"format": FORMAT, "data": data, "vae": _vae(codec)}


def _vae(codec: Codec) -> dict[str, Any]:
    """All of a codec's description but where it is."""
    return {name: value for name, value in codec.description.items() if name != "folder"}


def _rows_per_shard(source: Source, codec: Codec) -> int:
    """Whole blocks, of about 128 MiB; latents are at most as large as float32 pixels."""
    row_bytes = 4 * math.prod(codec.latent_shape(tuple(source.shape)))
    return max(1, SHARD_BYTES // row_bytes // BLOCK) * BLOCK


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
