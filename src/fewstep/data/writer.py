"""Files written whole or not at all, and sets of pictures that are written while they are still being made."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import zipfile
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import IO, Protocol

import numpy as np
import torch
from PIL import Image

from fewstep.errors import DataError, StorageError

THREADS = 4
"""Encoders of PNGs at work beside the one who makes the pictures."""

CHUNK = 32
"""Pictures that an encoder takes at once."""

AHEAD = 2
"""Blocks that may wait to be written; whoever brings another one waits, too."""


class PictureWriter(Protocol):
    """Takes pictures block by block; what it writes is complete when its ``with`` block is left."""

    def __enter__(self) -> PictureWriter: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def add(self, u8: torch.Tensor) -> None:
        """The next pictures, uint8 ``[b, c, h, w]`` on the CPU; waits while too many are unwritten."""
        ...


def picture_writer(
    target: Path, count: int, labels: np.ndarray | None = None, captions: Sequence[str] | None = None
) -> PictureWriter:
    """A writer of ``count`` pictures into a folder or, where the path ends so, an ``.npz``.

    Args:
        labels: class indices ``[count]``, or None; captions: texts ``[count]``, or None.

    Raises:
        DataError: labels or captions of another length; while writing, things that are no pictures, or not ``count``.
        StorageError: the folder holds other images; while writing, the disk refused.
    """
    for what, said in (("labels", labels), ("captions", captions)):
        if said is not None and len(said) != count:
            raise DataError(f"Pictures and {what} differ in number", got=len(said), want=f"{count} {what}")
    kind = PictureArchive if target.suffix.lower() == ".npz" else PictureFolder
    return kind(target, count, labels, captions)


class PictureFolder:
    """``000000.png, ...``, encoded by a few threads; ``dataset.json`` and ``metadata.jsonl`` come last.

    Each file is written whole or not at all. All of them are forced to the disk together, at the end: one at a time
    that takes longer than encoding them.
    """

    def __init__(self, folder: Path, count: int, labels: np.ndarray | None, captions: Sequence[str] | None) -> None:
        self._folder, self._labels, self._captions = folder, labels, captions
        self._names = [f"{i:06d}.png" for i in range(count)]
        records = {"dataset.json": labels, "metadata.jsonl": captions}
        _refuse_stale(folder, {*self._names, *(name for name, said in records.items() if said is not None)})
        self._done = 0
        self._waiting: deque[list[Future[None]]] = deque()
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="fewstep-png")

    def __enter__(self) -> PictureFolder:
        return self

    def add(self, u8: torch.Tensor) -> None:
        """The next pictures, uint8 ``[b, c, h, w]`` on the CPU; waits while ``AHEAD`` blocks are unwritten."""
        pixels = pixels_of(u8)
        while len(self._waiting) >= AHEAD:
            _finish(self._waiting.popleft())
        names = self._names[self._done : self._done + len(pixels)]
        self._done += len(pixels)
        _check_count(self._done, len(self._names), finished=False)
        parts = [slice(start, start + CHUNK) for start in range(0, len(names), CHUNK)]
        self._waiting.append([self._pool.submit(self._write, names[part], pixels[part]) for part in parts])

    def _write(self, names: list[str], pixels: np.ndarray) -> None:
        for name, picture in zip(names, pixels, strict=True):
            write_picture(self._folder / name, picture, forced=False)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            while kind is None and self._waiting:
                _finish(self._waiting.popleft())
        finally:
            self._pool.shutdown(cancel_futures=True)
        if kind is not None:
            return
        _check_count(self._done, len(self._names), finished=True)
        if hasattr(os, "sync"):
            os.sync()
        self._write_records()

    def _write_records(self) -> None:
        """EDM's labels, and the captions as Hugging Face has them."""
        if self._labels is not None:
            pairs = [[name, int(label)] for name, label in zip(self._names, self._labels, strict=True)]
            text = json.dumps({"labels": pairs})
            write_file(self._folder / "dataset.json", lambda file: file.write(text.encode()))
        if self._captions is not None:
            rows = zip(self._names, self._captions, strict=True)
            lines = "".join(json.dumps({"file_name": name, "text": caption}) + "\n" for name, caption in rows)
            write_file(self._folder / "metadata.jsonl", lambda file: file.write(lines.encode()))


class PictureArchive:
    """One ``.npz`` with ``images`` (uint8 ``[n, h, w, c]``), ``labels`` and ``captions``, as numpy compresses it.

    A thread compresses what is there while more is made. A failure leaves an older file as it was.
    """

    def __init__(self, path: Path, count: int, labels: np.ndarray | None, captions: Sequence[str] | None) -> None:
        self._path, self._count, self._done = path, count, 0
        self._about = {} if labels is None else {"labels": np.asarray(labels, dtype=np.int64)}
        self._about |= {} if captions is None else {"captions": np.array(captions, dtype=np.str_)}
        self._blocks: queue.Queue[np.ndarray | BaseException | None] = queue.Queue(AHEAD)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="fewstep-npz")

    def __enter__(self) -> PictureArchive:
        self._written = self._pool.submit(write_file, self._path, self._fill)
        return self

    def add(self, u8: torch.Tensor) -> None:
        """The next pictures, uint8 ``[b, c, h, w]`` on the CPU; waits while ``AHEAD`` blocks are unwritten."""
        pixels = pixels_of(u8)
        self._done += len(pixels)
        _check_count(self._done, self._count, finished=False)
        self._put(pixels)

    def _put(self, block: np.ndarray | BaseException | None) -> None:
        while not self._written.done():
            with contextlib.suppress(queue.Full):
                self._blocks.put(block, timeout=0.1)
                return
        self._written.result()  # raises what stopped it

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        complete = kind is None and self._done == self._count
        try:
            with contextlib.nullcontext() if complete else contextlib.suppress(Exception):
                self._put(None if complete else _Abandoned())
            if complete:
                self._written.result()
            elif kind is None:
                _check_count(self._done, self._count, finished=True)
        finally:
            with contextlib.suppress(queue.Full):
                self._blocks.put_nowait(_Abandoned())  # so that nothing waits for a block
            self._pool.shutdown()

    def _fill(self, file: IO[bytes]) -> None:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, allowZip64=True) as archive:
            first = self._next()
            if first is not None:
                with archive.open("images.npy", "w", force_zip64=True) as member:
                    self._write_images(member, first)
            for name, values in self._about.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, values, allow_pickle=False)

    def _write_images(self, member: IO[bytes], first: np.ndarray) -> None:
        shape = (self._count, *first.shape[1:])
        np.lib.format.write_array_header_1_0(member, {"descr": "|u1", "fortran_order": False, "shape": shape})
        block: np.ndarray | None = first
        while block is not None:
            if block.shape[1:] != shape[1:]:
                raise DataError("The pictures differ in size", got=block.shape[1:], want=shape[1:])
            member.write(block.data)
            block = self._next()

    def _next(self) -> np.ndarray | None:
        block = self._blocks.get()
        if isinstance(block, BaseException):
            raise block
        return block


class _Abandoned(Exception):
    """Whoever makes the pictures has given up."""


def _check_count(done: int, count: int, *, finished: bool) -> None:
    if done > count or (finished and done < count):
        more = "more" if done > count else "fewer"
        raise DataError(f"There are {more} pictures than announced", got=done, want=count)


def _finish(futures: list[Future[None]]) -> None:
    for future in futures:
        future.result()


def _refuse_stale(folder: Path, names: set[str]) -> None:
    present = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    read_back = (p for p in present if p.endswith(".png") or p in ("dataset.json", "metadata.jsonl"))
    stale = sorted(p for p in read_back if p not in names)
    if stale:
        raise StorageError(
            f"The folder '{folder}' holds '{stale[0]}' of an earlier save, which would mix with these images",
            do="Empty it or choose another folder",
        )


# ------------------------------------------------------------------------------------------------ single files
def pixels_of(u8: torch.Tensor) -> np.ndarray:
    """Pictures ``[n, c, h, w]`` as ``[n, h, w, c]``.

    Raises:
        DataError: they are none.
    """
    if u8.dtype != torch.uint8 or u8.ndim != 4 or u8.shape[1] not in (1, 3) or 0 in u8.shape:
        got = f"{u8.dtype} {list(u8.shape)}"
        raise DataError("These are not pictures", got=got, want="uint8 [n, 1 or 3, h, w], not empty")
    return u8.cpu().permute(0, 2, 3, 1).contiguous().numpy()


def write_picture(path: Path, pixels: np.ndarray, *, forced: bool = True) -> Path:
    """Pixels ``[h, w, 1 or 3]`` as a PNG; arguments and errors as :func:`write_file`."""
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    return write_file(path, lambda file: picture.save(file, format="PNG"), forced=forced)


def write_file(path: Path, fill: Callable[[IO[bytes]], object], *, forced: bool = True) -> Path:
    """Write one file atomically: ``fill`` writes into it; returns ``path``.

    Args:
        forced: to the disk, before it takes its name.

    Raises:
        StorageError: the disk refused; an older file is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            fill(file)
            if forced:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise StorageError(f"'{path}' could not be written: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return path
