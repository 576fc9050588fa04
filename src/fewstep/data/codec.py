"""Pictures on disk; the way between bytes and model space is that of :mod:`fewstep.levels`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from fewstep.data.writer import picture_writer, pixels_of, write_file, write_picture
from fewstep.errors import ConfigError
from fewstep.levels import decode, encode

__all__ = ["decode", "encode", "save_grid", "save_images", "write_file"]

PAD_LEVEL = 255
"""Grey level between the pictures of a grid."""

CELL = 64
"""A grid without a given scale enlarges its pictures to at least this many pixels."""


def save_grid(
    path: str | Path,
    u8: torch.Tensor,
    *,
    columns: int | None = None,
    scale: int | None = None,
    pad: int = 2,
) -> Path:
    """One PNG with the pictures in rows, enlarged without smoothing; written whole or not at all.

    Args:
        path: the PNG; missing folders are made.
        u8: uint8 ``[n, c, h, w]``, ``c`` 1 or 3.
        columns: pictures per row, ``ceil(sqrt(n))`` unless given.
        scale: whole enlargement factor; unless given, the least that makes a picture 64 pixels.
        pad: white pixels around and between pictures.

    Returns:
        ``path``.

    Raises:
        DataError: ``u8`` is not a stack of pictures.
        ConfigError: ``columns`` or ``scale`` below 1, or ``pad`` below 0.
        StorageError: the disk refused.
    """
    pictures = pixels_of(u8)
    n, height, width, channels = pictures.shape
    columns = math.ceil(math.sqrt(n)) if columns is None else columns
    scale = math.ceil(CELL / max(height, width)) if scale is None else scale
    if columns < 1 or scale < 1 or pad < 0:
        got = f"columns={columns}, scale={scale}, pad={pad}"
        raise ConfigError("A grid cannot be drawn so", got=got, want="columns >= 1, scale >= 1, pad >= 0")
    pictures = pictures.repeat(scale, axis=1).repeat(scale, axis=2)
    rows, down, across = math.ceil(n / columns), height * scale + pad, width * scale + pad
    canvas = np.full((rows * down + pad, columns * across + pad, channels), PAD_LEVEL, dtype=np.uint8)
    for i, picture in enumerate(pictures):
        top, left = pad + i // columns * down, pad + i % columns * across
        canvas[top : top + height * scale, left : left + width * scale] = picture
    return write_picture(Path(path), canvas)


def save_images(
    target: str | Path, u8: torch.Tensor, labels: np.ndarray | None = None, captions: Sequence[str] | None = None
) -> Path:
    """The pictures as ``000000.png, ...`` in a folder, or as one ``.npz``; ``open_source`` reads both back.

    A folder with labels gets EDM's ``dataset.json``, one with captions ``metadata.jsonl``; an npz has the keys
    ``images`` (uint8 ``[n, h, w, c]``) and, where they are given, ``labels`` (int64 ``[n]``) and ``captions``. Files of
    the same names are replaced.

    Args:
        target: a folder, or a path that ends in ``.npz``; missing folders are made.
        u8: uint8 ``[n, c, h, w]``, ``c`` 1 or 3.
        labels: class indices ``[n]``, or None.
        captions: texts ``[n]``, or None.

    Returns:
        ``target``.

    Raises:
        DataError: ``u8`` is not a stack of pictures, or ``labels`` or ``captions`` have another length.
        StorageError: the folder holds other images, which would be mixed with these, or the disk refused.
    """
    with picture_writer(Path(target), len(pixels_of(u8)), labels, captions) as writer:
        writer.add(u8)
    return Path(target)
