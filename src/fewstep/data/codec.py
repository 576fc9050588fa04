"""Bytes <-> model space, and pictures on disk."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image

from fewstep.errors import ConfigError, DataError, StorageError

PAD_LEVEL = 255
"""Grey level between the pictures of a grid."""

CELL = 64
"""A grid without a given scale enlarges its pictures to at least this many pixels."""


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
    pictures = _pictures(u8)
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
    return _write_png(Path(path), canvas)


def save_images(target: str | Path, u8: torch.Tensor, labels: np.ndarray | None = None) -> Path:
    """The pictures as ``000000.png, ...`` in a folder, or as one ``.npz``; ``open_source`` reads both back.

    A folder with labels gets EDM's ``dataset.json``; an npz has the keys ``images`` (uint8 ``[n, h, w, c]``)
    and, with labels, ``labels`` (int64 ``[n]``). Files of the same names are replaced.

    Args:
        target: a folder, or a path that ends in ``.npz``; missing folders are made.
        u8: uint8 ``[n, c, h, w]``, ``c`` 1 or 3.
        labels: class indices ``[n]``, or None.

    Returns:
        ``target``.

    Raises:
        DataError: ``u8`` is not a stack of pictures, or ``labels`` has another length.
        StorageError: the folder holds other images, which would be mixed with these, or the disk refused.
    """
    target = Path(target)
    pictures = _pictures(u8)
    if labels is not None and len(labels) != len(pictures):
        raise DataError("Pictures and labels differ in number", got=len(labels), want=f"{len(pictures)} labels")
    if target.suffix.lower() == ".npz":
        classes = {} if labels is None else {"labels": np.asarray(labels, dtype=np.int64)}
        return write_file(target, lambda file: np.savez_compressed(file, images=pictures, **classes))  # type: ignore[arg-type]
    names = [f"{i:06d}.png" for i in range(len(pictures))]
    _refuse_stale(target, {*names, *([] if labels is None else ["dataset.json"])})
    for name, picture in zip(names, pictures, strict=True):
        _write_png(target / name, picture)
    if labels is not None:
        text = json.dumps({"labels": [[name, int(label)] for name, label in zip(names, labels, strict=True)]})
        write_file(target / "dataset.json", lambda file: file.write(text.encode()))
    return target


def _scale(value_range: tuple[float, float]) -> float:
    low, high = value_range
    if not low < high:
        raise ConfigError("A value range must rise", got=f"({low}, {high})", want="(lo, hi) with lo < hi")
    return 255 / (high - low)


def _pictures(u8: torch.Tensor) -> np.ndarray:
    if u8.dtype != torch.uint8 or u8.ndim != 4 or u8.shape[1] not in (1, 3) or 0 in u8.shape:
        got = f"{u8.dtype} {list(u8.shape)}"
        raise DataError("These are not pictures", got=got, want="uint8 [n, 1 or 3, h, w], not empty")
    return u8.cpu().permute(0, 2, 3, 1).contiguous().numpy()


def _picture(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def _refuse_stale(folder: Path, names: set[str]) -> None:
    present = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    stale = sorted(p for p in present if (p.endswith(".png") or p == "dataset.json") and p not in names)
    if stale:
        raise StorageError(
            f"The folder '{folder}' holds '{stale[0]}' of an earlier save, which would mix with these images",
            do="Empty it or choose another folder",
        )


def _write_png(path: Path, pixels: np.ndarray) -> Path:
    return write_file(path, lambda file: _picture(pixels).save(file, format="PNG"))


def write_file(path: Path, fill: Callable[[IO[bytes]], object]) -> Path:
    """Write one file atomically: ``fill`` writes into it; returns ``path``.

    Raises:
        StorageError: the disk refused; an older file is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise StorageError(f"'{path}' could not be written: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return path
