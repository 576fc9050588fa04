"""Bytes <-> model space: the one place where a grey level becomes a number, and where numbers are rounded."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from fewstep.errors import ConfigError, DataError
from fewstep.types import Samples


class Codec(Protocol):
    """Images <-> model space, for models of latents; ``description`` opens it again from a checkpoint."""

    @property
    def description(self) -> dict[str, Any]:
        """What a checkpoint says of it, JSON-able; without "folder" it is all that latents depend on."""
        ...

    def image_shape(self, latent_shape: tuple[int, ...]) -> tuple[int, ...]:
        """``(C, H, W)`` of the images of latents of that shape."""
        ...

    def latent_shape(self, image_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the latents of such images; DataError where there are none."""
        ...

    def encode(self, images: Tensor) -> Samples:
        """uint8 ``[b, C, H, W]`` -> latents ``[b, ...]``, float32."""
        ...

    def decode(self, latents: Samples) -> Tensor:
        """Latents ``[b, ...]`` -> uint8 ``[b, C, H, W]``."""
        ...


def encode(
    u8: torch.Tensor, value_range: tuple[float, float] = (-1.0, 1.0), dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """``lo + (hi - lo) u8 / 255``, computed as ``u8 / (255 / (hi - lo)) + lo``.

    That is ``u8 / 127.5 - 1`` for (-1, 1) and ``u8 / 255`` for (0, 1), to the bit.

    Args:
        u8: uint8, any shape.
        value_range: ``(lo, hi)`` of levels 0 and 255 in model space.
        dtype: of the result; half precisions are rounded once, from float32.

    Returns:
        float, the same shape and device.

    Raises:
        DataError: ``u8`` is not uint8.
        ConfigError: ``hi <= lo``.
    """
    if u8.dtype != torch.uint8:
        raise DataError("Only bytes can be encoded", got=u8.dtype, want="uint8")
    scale = _scale(value_range)
    work = torch.float64 if dtype == torch.float64 else torch.float32
    return (u8.to(work) / scale + value_range[0]).to(dtype)


def decode(x: torch.Tensor, value_range: tuple[float, float] = (-1.0, 1.0)) -> torch.Tensor:
    """``clip(rint((x - lo) 255 / (hi - lo)), 0, 255)``: ``rint(127.5 (x + 1))`` for (-1, 1); NaN becomes 0.

    Args:
        x: float, any shape, model space.
        value_range: as in :func:`encode`, which this inverts on all 256 levels.

    Returns:
        uint8, the same shape and device.

    Raises:
        ConfigError: ``hi <= lo``.
    """
    scale = _scale(value_range)
    work = x if x.dtype == torch.float64 else x.float()
    levels = torch.round((work - value_range[0]) * scale)
    return torch.nan_to_num(levels, nan=0.0, posinf=255.0, neginf=0.0).clamp(0, 255).to(torch.uint8)


def _scale(value_range: tuple[float, float]) -> float:
    low, high = value_range
    if not low < high:
        raise ConfigError("A value range must rise", got=f"({low}, {high})", want="(lo, hi) with lo < hi")
    return 255 / (high - low)
