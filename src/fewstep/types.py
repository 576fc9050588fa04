"""Names for shapes, and the two records that flow through everything.

Shapes are written as in the field: ``b`` batch, ``c h w`` channels and pixels, ``...`` any number of
dimensions, because nothing in the library assumes NCHW.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

Samples: TypeAlias = Tensor
"""Data or noisy data in model space, float ``[b, ...]``."""

Times: TypeAlias = Tensor
"""Noise times, one per sample, float ``[b]``."""

PerSample: TypeAlias = Tensor
"""One number per sample, float ``[b]``."""

Condition: TypeAlias = Tensor
"""One-hot class labels, float ``[b, num_classes]``."""


@dataclass(frozen=True)
class Batch:
    """One batch in model space: ``x`` float ``[b, ...]``, ``cond`` float ``[b, num_classes]`` or None."""

    x: Samples
    cond: Condition | None = None


@dataclass(frozen=True)
class Progress:
    """The one clock of a run, counted in training images: every schedule is a pure function of it."""

    images_seen: int
    total_images: int
