"""The user's own images: folders, zips and npz archives.

Images lie anywhere below the folder (``.png .jpg .jpeg .webp .bmp``; hidden files are skipped) and are taken
in the order of their names. Labels come from EDM's ``dataset.json``, ``{"labels": [[name, class], ...]}`` or
null, where there is one; otherwise, where every image is in a sub-folder, these are the classes in the order
of their names (folders that all images share do not count). Captions: :mod:`fewstep.data.annotations`.
Transparent pixels are laid on white.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import threading
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from fewstep.data.annotations import CLASS_INDEX, Files, captions_of, labels_of
from fewstep.data.pixels import prepare
from fewstep.data.sources import ArraySource, Source, View, count_classes, fingerprint
from fewstep.errors import DataError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")

IN_MEMORY_BYTES = 2 * 2**30
"""Decoded images up to this size are kept in memory; larger sets are decoded at every read."""

_NPZ_KEYS: dict[str, list[tuple[tuple[str, ...], tuple[str, ...], str]]] = {
    "train": [
        (("x", "images", "samples", "arr_0"), ("y", "labels", "arr_1"), "captions"),
        (("x_train",), ("y_train",), "captions_train"),
    ],
    "test": [(("x_test",), ("y_test",), "captions_test")],
}
"""Per split: keys of images, of labels, of captions."""
_THREADS = min(8, os.cpu_count() or 1)
_BLOCK = 1024
_GREY_MODES = ("1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "I;16N")

A = TypeVar("A")
B = TypeVar("B")


class _FolderFiles:
    """Files below a folder; symbolic links are followed, loops are cut."""

    def __init__(self, where: str) -> None:
        self.name = f"folder:{where}"
        self._root = Path(where).expanduser()
        if not self._root.is_dir():
            raise DataError(f"There is no folder '{where}'")
        try:
            self.names = sorted(_walk(self._root, "", frozenset()))
        except OSError as error:
            raise DataError(f"The folder '{where}' cannot be listed: {error.strerror or error}") from error

    def open(self, name: str) -> IO[bytes]:
        return (self._root / name).open("rb")

    def has(self, name: str) -> bool:
        return (self._root / name).is_file()

    def stamp(self, name: str) -> tuple[int, int]:
        status = (self._root / name).stat()
        return status.st_size, status.st_mtime_ns

    def close(self) -> None: ...


class _ZipFiles:
    """Members of a zip; reading is serialised because ``ZipFile`` is not safe between threads."""

    def __init__(self, where: str) -> None:
        self.name = f"zip:{where}"
        self._lock = threading.Lock()
        try:
            self._zip = zipfile.ZipFile(Path(where).expanduser())
        except FileNotFoundError as error:
            raise DataError(f"There is no zip '{where}'") from error
        except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError) as error:
            raise DataError(f"The zip '{where}' cannot be read: {_reason(error)}") from error
        self._members = {member.filename: member for member in self._zip.infolist() if not member.is_dir()}
        self.names = sorted(name for name in self._members if _is_image(name))

    def open(self, name: str) -> IO[bytes]:
        with self._lock:
            return io.BytesIO(self._zip.read(self._members[name]))

    def has(self, name: str) -> bool:
        return name in self._members

    def stamp(self, name: str) -> tuple[int, int]:
        return self._members[name].file_size, self._members[name].CRC

    def close(self) -> None:
        self._zip.close()


class FileImages:
    """Images decoded at every read, by threads; sizes were checked when it was opened."""

    def __init__(
        self,
        files: Files,
        view: View,
        shape: tuple[int, int, int],
        labels: np.ndarray | None,
        captions: Sequence[str] | None = None,
    ) -> None:
        self.name = files.name
        self.shape: tuple[int, ...] = shape
        self.labels = labels
        self.num_classes = count_classes(labels)
        self.captions = captions
        self.is_images = True
        self._files, self._resize = files, view.resize
        stamps = [[name, *files.stamp(name)] for name in files.names]
        settings = json.dumps([shape, stamps])
        self.fingerprint = fingerprint("files", settings.encode(), labels, captions)

    def __len__(self) -> int:
        return len(self._files.names)

    def read(self, index: np.ndarray) -> torch.Tensor:
        """Images at ``index``, decoded now.

        Raises:
            DataError: an image has become unreadable, or has changed its size.
        """
        out = np.empty((len(index), *self.shape), dtype=np.uint8)
        names = [self._files.names[i] for i in index]
        for slot, image in zip(out, _in_threads(self._decode, names), strict=True):
            slot[...] = image
        return torch.from_numpy(out)

    def _decode(self, name: str) -> np.ndarray:
        pixels = _decode(self._files, name)
        image: np.ndarray = prepare(pixels[None], channels=self.shape[0], resize=self._resize)[0]
        if image.shape != self.shape:
            raise _other_size(name, image.shape, "the data when they were opened", self.shape)
        return image


def folder(where: str, view: View, *, in_memory_bytes: int = IN_MEMORY_BYTES) -> Source:
    """Images below the folder ``where``; see the module for layouts and labels.

    Args:
        where: the path.
        view: settings.
        in_memory_bytes: larger sets are decoded at every read.

    Raises:
        DataError: no folder, no images, an unreadable image, or mixed sizes without ``resize``.
    """
    view.only_train(f"folder:{where}")
    return _open_images(_FolderFiles(where), view, in_memory_bytes)


def zipped(where: str, view: View, *, in_memory_bytes: int = IN_MEMORY_BYTES) -> Source:
    """Images in the zip ``where``; arguments, layouts and errors as for :func:`folder`."""
    view.only_train(f"zip:{where}")
    return _open_images(_ZipFiles(where), view, in_memory_bytes)


def npz(where: str, view: View) -> Source:
    """Arrays in an npz, held in memory.

    Keys: ``x``, ``images``, ``samples`` or ``arr_0`` with optional ``y``, ``labels`` or ``arr_1``; or ``x_train``,
    ``y_train``, ``x_test``, ``y_test``. Images are uint8 ``[n,h,w]``, ``[n,h,w,c]`` or ``[n,c,h,w]`` (where both
    fit, the last axis is the channels), c = 1, 3 or 4 (alpha, laid on white); labels are whole numbers ``[n]`` or
    ``[n,1]``; captions, ``captions`` (``captions_train``, ``captions_test``), are texts ``[n]``. Nothing is unpickled.

    Raises:
        DataError: no such file, key or split, a wrong dtype or shape, or object arrays.
    """
    x, y, texts = _read_npz(where, view)
    if x.dtype != np.uint8:
        raise DataError(f"The images of '{where}' are not bytes", got=x.dtype, want="uint8, 0..255")
    stack = _channels_last(where, x)
    blocks = (stack[i : i + _BLOCK] for i in range(0, len(stack), _BLOCK))
    parts = list(_in_threads(lambda b: prepare(b, channels=view.channels, resize=view.resize), blocks))
    labels = None if y is None else _class_indices(where, y, len(x))
    captions = None if texts is None else _captions(where, texts, len(x))
    return ArraySource(f"npz:{where}", torch.from_numpy(np.concatenate(parts)), labels, captions=captions)


def _open_images(files: Files, view: View, in_memory_bytes: int) -> Source:
    if not files.names:
        raise DataError(f"There are no images in '{files.name}'", want=" ".join(SUFFIXES))
    labels, captions = (labels_of(files), captions_of(files)) if view.labels else (None, None)
    return open_images(files, view, labels, captions, in_memory_bytes)


def open_images(
    files: Files,
    view: View,
    labels: np.ndarray | None,
    captions: Sequence[str] | None,
    in_memory_bytes: int = IN_MEMORY_BYTES,
) -> Source:
    """The images of ``files`` (at least one), decoded once where they are few, else at every read.

    Raises:
        DataError: an unreadable image, or mixed sizes without ``resize``.
    """
    shape = _common_shape(files, view)
    lazy = FileImages(files, view, shape, labels, captions)
    if len(lazy) * int(np.prod(shape)) > in_memory_bytes:
        return lazy
    data = lazy.read(np.arange(len(lazy)))
    files.close()
    return ArraySource(lazy.name, data, labels, captions=captions)


def _common_shape(files: Files, view: View) -> tuple[int, int, int]:
    """(c, h, w) after the view, from the headers alone."""
    first: tuple[int, int] | None = None
    grey = True
    headers = _in_threads(lambda name: _header(files, name), files.names)
    for name, (size, is_grey) in zip(files.names, headers, strict=True):
        first, grey = first or size, grey and is_grey
        if view.resize is None and size != first:
            raise _other_size(name, size, files.names[0], first)
    assert first is not None
    height, width = first if view.resize is None else (view.resize, view.resize)
    return view.channels or (1 if grey else 3), height, width


def _other_size(name: str, size: Sequence[int], other: str, expected: Sequence[int]) -> DataError:
    return DataError(
        "The images differ in size",
        got=f"'{name}' is {size[-1]}x{size[-2]}, '{other}' is {expected[-1]}x{expected[-2]} (width x height)",
        do="Give one size to all: --resize N",
    )


def _header(files: Files, name: str) -> tuple[tuple[int, int], bool]:
    """((height, width), is it grey) of one image, without decoding it."""
    return _with_image(files, name, lambda image: (_upright(image).size[::-1], image.mode in _GREY_MODES))


def _decode(files: Files, name: str) -> np.ndarray:
    """uint8 [h, w, 1 to 4] of one image."""
    return _with_image(files, name, lambda image: _pixels(_upright(image)))


def _with_image(files: Files, name: str, use: Callable[[Image.Image], B]) -> B:
    try:
        with files.open(name) as stream, Image.open(stream) as image:
            return use(image)
    except Exception as error:  # decoders raise every kind of error on damaged bytes
        raise DataError(
            f"The image '{name}' in '{files.name}' cannot be read: {_reason(error)}",
            do="Replace or remove it",
        ) from error


def _upright(image: Image.Image) -> Image.Image:
    """Cameras store the turn of a JPEG in its EXIF; other kinds are taken as they are."""
    if image.format not in ("JPEG", "MPO") or image.getexif().get(0x0112, 1) == 1:
        return image
    return ImageOps.exif_transpose(image)


def _pixels(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I"):  # 16-bit grey: the high byte
        words = np.clip(np.asarray(image), 0, 65535).astype(np.uint16)
        high: np.ndarray = (words[..., None] >> 8).astype(np.uint8)
        return high
    alpha = "A" if image.has_transparency_data else ""
    pixels: np.ndarray = np.asarray(image.convert(("L" if image.mode in _GREY_MODES else "RGB") + alpha))
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _read_npz(where: str, view: View) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Images, labels, captions."""
    path = Path(where).expanduser()
    if not path.is_file():
        raise DataError(f"There is no npz '{where}'")
    if not zipfile.is_zipfile(path):
        raise DataError(f"'{where}' is not an npz archive, or is damaged")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            keys = list(arrays)
            for images, labels, captions in _NPZ_KEYS[view.split]:
                x_key = next((key for key in images if key in keys), None)
                if x_key is not None:
                    y_key = next((key for key in labels if key in keys), None)
                    said = [arrays[key] if view.labels and key in keys else None for key in (y_key, captions)]
                    return np.asarray(arrays[x_key]), said[0], said[1]
    except Exception as error:  # numpy raises every kind of error on damaged bytes
        raise DataError(f"The npz '{where}' cannot be read: {_reason(error)}") from error
    raise DataError(
        f"The npz '{where}' has no images for the split '{view.split}'",
        got=f"the keys {', '.join(keys) or '(none)'}",
        want=" or ".join(key for images, _, _ in _NPZ_KEYS[view.split] for key in images),
    )


def _channels_last(where: str, x: np.ndarray) -> np.ndarray:
    if 0 in x.shape:
        raise DataError(f"There are no images in '{where}'", got=f"shape {list(x.shape)}")
    if x.ndim == 3:
        return x[..., None]
    if x.ndim == 4 and x.shape[-1] in (1, 3, 4):
        return x
    if x.ndim == 4 and x.shape[1] in (1, 3, 4):
        return x.transpose(0, 2, 3, 1)
    want = "[n,h,w], [n,h,w,c] or [n,c,h,w] with c 1, 3 or 4"
    raise DataError(f"The images of '{where}' have a wrong shape", got=list(x.shape), want=want)


def _class_indices(where: str, y: np.ndarray, n: int) -> np.ndarray:
    if y.dtype.kind not in "iu" or y.shape not in ((n,), (n, 1)):
        got, want = f"{y.dtype} {list(y.shape)}", f"whole numbers [{n}], one per image"
        raise DataError(f"The labels of '{where}' cannot be used", got=got, want=want)
    if y.min() < 0:
        raise DataError(f"A label of '{where}' is not a class index", got=int(y.min()), want=CLASS_INDEX)
    return y.reshape(n).astype(np.int64)


def _captions(where: str, texts: np.ndarray, n: int) -> list[str]:
    if texts.dtype.kind != "U" or texts.shape != (n,):
        got, want = f"{texts.dtype} {list(texts.shape)}", f"texts [{n}], one per image"
        raise DataError(f"The captions of '{where}' cannot be used", got=got, want=want)
    return [str(text) for text in texts]


def _walk(root: Path, below: str, above: frozenset[str]) -> Iterator[str]:
    real = os.path.realpath(root / below)
    if real in above:
        return
    with os.scandir(root / below) as entries:
        for entry in entries:
            name = below + entry.name
            if entry.is_dir() and not entry.name.startswith("."):
                yield from _walk(root, name + "/", above | {real})
            elif entry.is_file() and _is_image(name):
                yield name


def _is_image(name: str) -> bool:
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))
    return name.lower().endswith(SUFFIXES) and not hidden


def _in_threads(function: Callable[[A], B], items: Iterable[A]) -> Iterator[B]:
    """``map`` by threads, in order, with a bounded number of items under way."""
    iterator = iter(items)
    with ThreadPoolExecutor(_THREADS) as pool:
        while block := list(itertools.islice(iterator, _BLOCK)):
            yield from pool.map(function, block)


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "it is no image of a known kind"
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return text.rstrip(".")
