"""The data room: sources of images or points, their order, and the way into and out of model space."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path

from fewstep.data.codec import decode, encode, save_grid, save_images
from fewstep.data.files import folder, npz, zipped
from fewstep.data.hf_datasets import hf
from fewstep.data.order import indices_at, order
from fewstep.data.shard_source import sharded
from fewstep.data.shards import is_shards
from fewstep.data.sources import Source, View, digits, gaussians8, tiles
from fewstep.errors import DataError, nearest

__all__ = [
    "SOURCES",
    "Source",
    "View",
    "decode",
    "encode",
    "indices_at",
    "open_source",
    "order",
    "save_grid",
    "save_images",
]

SOURCES: dict[str, Callable[[str, View], Source]] = {
    "digits": digits,
    "tiles": tiles,
    "gaussians8": gaussians8,
    "folder": folder,
    "zip": zipped,
    "npz": npz,
    "shards": sharded,
    "hf": hf,
}
"""``(where, view) -> Source``: the first three ship with the package, the others read the path ``where``."""

_FILE_KINDS = ("folder", "zip", "npz", "shards", "hf")
_LATER = ("wds",)


def open_source(
    spec: str,
    *,
    resize: int | None = None,
    channels: int | None = None,
    labels: bool = True,
    split: str = "train",
) -> Source:
    """The source that ``spec`` names.

    Args:
        spec: ``digits``, ``tiles``, ``gaussians8``, a folder (of images, or of ``fewstep generate``), a ``.zip`` or an
            ``.npz``; ``folder:PATH``, ``zip:PATH``, ``npz:PATH``, ``shards:PATH`` say the kind whatever the name
            (``./digits`` is the folder ``digits``); ``hf:PATH_OR_NAME[#COLUMN]`` is a Hugging Face data set.
        resize: pixels; centre-crop to a square, then Pillow's antialiased LANCZOS, the same at every call.
        channels: 1 (grey) or 3 (RGB) converts; None keeps what is there (a mixture becomes RGB).
        labels: False leaves labels and captions unread.
        split: ``train``, or ``test`` for an npz with ``x_test`` and for Hugging Face data sets.

    Raises:
        DataError: nothing of that name or path (with the nearest match), or unusable content.
    """
    view = View(resize=resize, channels=channels, labels=labels, split=split)
    prefix, colon, rest = spec.partition(":")
    if colon and prefix in _LATER:
        raise DataError(
            f"The source '{spec}' cannot be opened: '{prefix}:' is not in this version",
            do="Save the images as a folder, a .zip or an .npz and give its path",
        )
    if spec in SOURCES and spec not in _FILE_KINDS:
        return SOURCES[spec]("", view)
    if colon and prefix in _FILE_KINDS:
        return SOURCES[prefix](rest, view)
    path = Path(spec).expanduser() if spec else Path("?")
    kind = _kind_of(path)
    if kind is None:
        raise _unknown(spec, path)
    return SOURCES[kind](str(path), view)


def _kind_of(path: Path) -> str | None:
    try:
        if path.is_dir():
            return "shards" if is_shards(path) else "folder"
        if path.is_file() and path.suffix.lower() in (".zip", ".npz"):
            return path.suffix.lower()[1:]
    except (OSError, ValueError):  # a name the file system refuses
        pass
    return None


def _unknown(spec: str, path: Path) -> DataError:
    names = [name for name in SOURCES if name not in _FILE_KINDS]
    try:
        if path.exists():
            want = "a folder, a .zip or an .npz"
            return DataError(f"The file '{spec}' is of no kind that can be read", want=want)
        siblings = [p for p in path.parent.iterdir() if _kind_of(p)] if path.parent.is_dir() else []
    except (OSError, ValueError):
        siblings = []
    close = difflib.get_close_matches(path.name, [p.name for p in siblings], n=3)
    candidates = names + [str(path.with_name(name)) for name in close]
    do = f"{nearest(spec, candidates)}, or the path of a folder, a .zip or an .npz"
    return DataError(f"There is no data source '{spec}'", do=do)
