"""Hugging Face data sets as sources, through the library ``datasets`` (extra ``data``).

The image column is the first of that kind; captions are the column behind ``#``, else one of CAPTION_COLUMNS; labels
are the first column of classes. Images are decoded by us, as those of a folder are.
"""

from __future__ import annotations

import io
import logging
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from fewstep.data.annotations import CAPTION_COLUMNS, CLASS_INDEX
from fewstep.data.files import open_images
from fewstep.data.sources import Source, View
from fewstep.errors import ConfigError, DataError, nearest

INSTALL = "Run `pip install 'fewstep[data]'`"


def hf(where: str, view: View) -> Source:
    """The data set ``where``: ``PATH`` or ``OWNER/NAME``, with ``#COLUMN`` for captions in a column of that name.

    A path is a folder of parquet, arrow, csv or json files, an image folder, what ``save_to_disk`` wrote, or one
    parquet file; a name is found in the cache of ``datasets``, or on the hub unless HF_HUB_OFFLINE is set.

    Raises:
        ConfigError: ``datasets`` is not installed.
        DataError: no such data set, split or column, no images in it, or an unreadable image.
    """
    path, _, column = where.partition("#")
    library = _library()
    with _quiet(library):
        table = _load(library, path, view.split)
    images = [name for name, kind in table.features.items() if isinstance(kind, library.Image)]
    if not images or not len(table):
        raise DataError(f"There are no images in 'hf:{path}'", got=f"{len(table)} rows of {', '.join(table.features)}")
    labels, captions = (_labels(library, where, table), _captions(path, table, column)) if view.labels else (None, None)
    files = _Rows(f"hf:{where}", table.select_columns(images[0]).cast_column(images[0], library.Image(decode=False)))
    return open_images(files, view, labels, captions)


class _Rows:
    """The images of a table as files, named by their numbers; see :class:`fewstep.data.annotations.Files`."""

    def __init__(self, name: str, table: Any) -> None:
        self.name, self._table = name, table
        self._column = table.column_names[0]
        self.names = [str(i) for i in range(len(table))]

    def open(self, name: str) -> IO[bytes]:
        return io.BytesIO(self._bytes(name))

    def has(self, name: str) -> bool:
        return name in self.names

    def stamp(self, name: str) -> tuple[int, int]:
        content = self._bytes(name)
        return len(content), zlib.crc32(content)

    def close(self) -> None: ...

    def _bytes(self, name: str) -> bytes:
        image = self._table[int(name)][self._column]
        if image is None:
            raise DataError(f"Row {name} of '{self.name}' has no image", do="Remove it")
        content: bytes = image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()
        return content


def _labels(library: Any, where: str, table: Any) -> np.ndarray | None:
    name = next((name for name, kind in table.features.items() if isinstance(kind, library.ClassLabel)), None)
    if name is None:
        return None
    values = table.with_format(None)[name]
    wrong = next((v for v in values if v is None or v < 0), 0)
    if wrong != 0:
        raise DataError(f"A label of 'hf:{where}' is not a class index", got=repr(wrong), want=CLASS_INDEX)
    return np.array(values, dtype=np.int64)


def _captions(path: str, table: Any, asked: str) -> list[str] | None:
    if asked and asked not in table.features:
        raise DataError(f"'hf:{path}' has no column '{asked}'", do=nearest(asked, table.features))
    column = asked or next((name for name in CAPTION_COLUMNS if name in table.features), None)
    if column is None:
        return None
    values = list(table.with_format(None)[column])
    wrong = next((i for i, value in enumerate(values) if not isinstance(value, str)), None)
    if wrong is not None:
        got = f"{values[wrong]!r:.60} in row {wrong}"
        raise DataError(f"The captions of 'hf:{path}' are not texts", got=got, want=f"a text per row in '{column}'")
    return values


def _load(library: Any, path: str, split: str) -> Any:
    """A table, from the disk or from the hub."""
    local = Path(path).expanduser()
    try:
        if (local / "state.json").is_file() or (local / "dataset_dict.json").is_file():
            found = library.load_from_disk(str(local))
            splits = found if isinstance(found, dict) else {"train": found}
            if split not in splits:
                raise ValueError(f"the splits are {', '.join(splits)}")
            return splits[split]
        if local.is_file():
            return library.load_dataset("parquet", data_files={"train": str(local)}, split=split)
        return library.load_dataset(str(local) if local.is_dir() else path, split=split)
    except Exception as error:  # whatever the library calls it
        raise _not_loaded(path, split, local.exists(), error) from error


def _not_loaded(path: str, split: str, local: bool, error: Exception) -> DataError:
    line = next(iter(str(error).strip().splitlines()), "")[:200].rstrip(".")
    if "split" in line.lower():
        return DataError(f"'hf:{path}' has no split '{split}'", got=line)
    if local:
        return DataError(f"The data set in '{path}' cannot be read", got=f"{type(error).__name__}: {line}")
    return DataError(
        f"There is no data set 'hf:{path}': it is no folder, not in the cache, and could not be fetched",
        got=f"{type(error).__name__}: {line}",
        do=f"Run `hf download {path} --repo-type dataset --local-dir DIR` where there is a network, and give hf:DIR",
    )


def _library() -> Any:
    try:
        import datasets
    except Exception as error:  # not installed, or one of the packages that it needs is broken
        raise ConfigError(
            "Data sets of Hugging Face need the library datasets, which cannot be imported",
            got=f"{type(error).__name__}: {error}",
            do=INSTALL,
        ) from error
    return datasets


@contextmanager
def _quiet(library: Any) -> Iterator[None]:
    """No bars, and of the hub's retries no word."""
    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub")]
    before, bars = [logger.level for logger in loggers], not library.are_progress_bars_disabled()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    library.disable_progress_bars()
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
        if bars:
            library.enable_progress_bars()
