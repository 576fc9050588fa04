"""Pictures on disk; the way between bytes and model space is that of :mod:`fewstep.levels`."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image

from fewstep.errors import ConfigError, DataError, StorageError
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
    target = Path(target)
    pictures = _pictures(u8)
    for what, said in (("labels", labels), ("captions", captions)):
        if said is not None and len(said) != len(pictures):
            raise DataError(f"Pictures and {what} differ in number", got=len(said), want=f"{len(pictures)} {what}")
    if target.suffix.lower() == ".npz":
        about = {} if labels is None else {"labels": np.asarray(labels, dtype=np.int64)}
        about |= {} if captions is None else {"captions": np.array(captions, dtype=np.str_)}
        return write_file(target, lambda file: np.savez_compressed(file, images=pictures, **about))  # type: ignore[arg-type]
    names = [f"{i:06d}.png" for i in range(len(pictures))]
    records = {"dataset.json": labels, "metadata.jsonl": captions}
    _refuse_stale(target, {*names, *(name for name, said in records.items() if said is not None)})
    for name, picture in zip(names, pictures, strict=True):
        _write_png(target / name, picture)
    if labels is not None:
        text = json.dumps({"labels": [[name, int(label)] for name, label in zip(names, labels, strict=True)]})
        write_file(target / "dataset.json", lambda file: file.write(text.encode()))
    if captions is not None:
        rows = zip(names, captions, strict=True)
        lines = "".join(json.dumps({"file_name": name, "text": caption}) + "\n" for name, caption in rows)
        write_file(target / "metadata.jsonl", lambda file: file.write(lines.encode()))
    return target


def _pictures(u8: torch.Tensor) -> np.ndarray:
    if u8.dtype != torch.uint8 or u8.ndim != 4 or u8.shape[1] not in (1, 3) or 0 in u8.shape:
        got = f"{u8.dtype} {list(u8.shape)}"
        raise DataError("These are not pictures", got=got, want="uint8 [n, 1 or 3, h, w], not empty")
    return u8.cpu().permute(0, 2, 3, 1).contiguous().numpy()


def _picture(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def _refuse_stale(folder: Path, names: set[str]) -> None:
    present = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    read_back = (p for p in present if p.endswith(".png") or p in ("dataset.json", "metadata.jsonl"))
    stale = sorted(p for p in read_back if p not in names)
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
