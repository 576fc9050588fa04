"""What a folder or zip says about its images: classes and captions.

Classes come from EDM's ``dataset.json``, ``{"labels": [[name, class], ...]}``, else from sub-folders. Captions come
from ``"captions": [[name, text], ...]`` in ``dataset.json``, else from a table as of Hugging Face's image folders
(``metadata.jsonl`` or ``metadata.csv`` with ``file_name`` and a column of CAPTION_COLUMNS), else from ``NAME.txt``
beside every image. These files are at the top or in the folder that all images share.
"""

from __future__ import annotations

import csv
import io
import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import IO, Any, Protocol

import numpy as np

from fewstep.errors import DataError

CAPTION_COLUMNS = ("text", "caption", "prompt")
"""What a column of captions may be called; the first that is there is taken."""

CLASS_INDEX = "a whole number from 0"
_UNREADABLE = (OSError, ValueError, TypeError, AttributeError, KeyError, csv.Error, zipfile.BadZipFile)


class Files(Protocol):
    """Named files that hold images (``names``, sorted) and what is said about them."""

    name: str
    names: list[str]

    def open(self, name: str) -> IO[bytes]:
        """A file, for reading."""
        ...

    def has(self, name: str) -> bool:
        """Whether there is such a file, an image or not."""
        ...

    def stamp(self, name: str) -> tuple[int, int]:
        """Two numbers that change with a file."""
        ...

    def close(self) -> None:
        """Nothing more will be read."""
        ...


def labels_of(files: Files) -> np.ndarray | None:
    """The class of every image, int64 ``[n]``; None where nothing says it.

    Raises:
        DataError: an unreadable ``dataset.json``, an image that it leaves out, or a class that is none.
    """
    record = _dataset_json(files)
    if record is not None:
        return _classes(files, *record)
    prefix = _common_folder(files.names)
    folders = [name[len(prefix) :].split("/") for name in files.names]
    if any(len(parts) == 1 for parts in folders):
        return None
    classes = {name: i for i, name in enumerate(sorted({parts[0] for parts in folders}))}
    return np.array([classes[parts[0]] for parts in folders], dtype=np.int64)


def captions_of(files: Files) -> list[str] | None:
    """The caption of every image, ``[n]``; None where nothing says it.

    Raises:
        DataError: an unreadable file of captions, or an image that it leaves out.
    """
    record = _dataset_json(files)
    if record is not None and record[1].get("captions") is not None:
        base, content = record
        where = f"'{base}dataset.json' in '{files.name}'"
        return _in_order(files, where, _pairs(where, base, content["captions"], "text"), "caption")
    for base in _bases(files):
        for name, rows in (("metadata.jsonl", _lines), ("metadata.csv", _table)):
            if files.has(base + name):
                return _from_table(files, base, name, rows)
    return _beside(files)


def _bases(files: Files) -> list[str]:
    """Where files about the images may be: at the top, and in the folder that all images share."""
    return list(dict.fromkeys(["", _common_folder(files.names)]))


def _common_folder(names: Sequence[str]) -> str:
    """The longest folder path, with its slash, that all (sorted) names share."""
    first, last = names[0], names[-1]
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return first[: first.rfind("/", 0, same) + 1]


def _dataset_json(files: Files) -> tuple[str, dict[str, Any]] | None:
    """EDM's record and the folder that it is in."""
    for base in _bases(files):
        if files.has(f"{base}dataset.json"):
            where = f"'{base}dataset.json' in '{files.name}'"
            try:
                with files.open(f"{base}dataset.json") as stream:
                    content = json.load(stream)
                _ = content.get("labels")
            except _UNREADABLE as error:
                raise _not_pairs(where, "class", error) from error
            return base, content
    return None


def _classes(files: Files, base: str, content: Mapping[str, Any]) -> np.ndarray | None:
    where = f"'{base}dataset.json' in '{files.name}'"
    if content.get("labels") is None:
        return None
    values = _in_order(files, where, _pairs(where, base, content["labels"], "class"), "label")
    wrong = next((v for v in values if not isinstance(v, int) or isinstance(v, bool) or v < 0), None)
    if wrong is not None:
        raise DataError(f"A label of {where} is not a class index", got=repr(wrong), want=CLASS_INDEX)
    return np.array(values, dtype=np.int64)


def _pairs(where: str, base: str, pairs: Any, kind: str) -> dict[str, Any]:
    try:
        return {base + str(name).replace("\\", "/"): value for name, value in pairs}
    except _UNREADABLE as error:
        raise _not_pairs(where, kind, error) from error


def _not_pairs(where: str, kind: str, error: Exception) -> DataError:
    place = f": {error}" if isinstance(error, json.JSONDecodeError) else ""
    key = {"class": "labels", "text": "captions"}[kind]
    return DataError(
        f"{where} is not readable{place}", want=f'{{"{key}": [["name", {kind}], ...]}}, or null for the list'
    )


def _in_order(files: Files, where: str, table: Mapping[str, Any], what: str) -> list[Any]:
    """What the table says of every image; captions must be texts."""
    missing = next((name for name in files.names if name not in table), None)
    if missing is not None:
        do = f"Add it{' (it may be empty)' if what == 'caption' else ''}, or open the data without labels"
        raise DataError(f"{where} has no {what} for '{missing}'", do=do)
    values = [table[name] for name in files.names]
    wrong = next((v for v in values if what == "caption" and not isinstance(v, str)), None)
    if wrong is not None:
        raise DataError(f"A caption of {where} is not a text", got=repr(wrong))
    return values


def _from_table(
    files: Files, base: str, name: str, rows: Callable[[IO[bytes]], list[dict[str, Any]]]
) -> list[str] | None:
    """Captions of Hugging Face's image folders; None where the table has no such column."""
    where = f"'{base}{name}' in '{files.name}'"
    try:
        with files.open(base + name) as stream:
            found = rows(stream)
        column = next((c for c in CAPTION_COLUMNS if any(c in row for row in found)), None)
        if column is None:
            return None
        table = {base + str(row["file_name"]).replace("\\", "/"): row.get(column) for row in found}
    except _UNREADABLE as error:
        place = f": {error}" if isinstance(error, json.JSONDecodeError) else ""
        raise DataError(f"{where} is not readable{place}", want="rows with file_name and text, in UTF-8") from error
    return _in_order(files, where, {name: text for name, text in table.items() if text is not None}, "caption")


def _lines(stream: IO[bytes]) -> list[dict[str, Any]]:
    return [dict(json.loads(line)) for line in stream.read().decode("utf-8-sig").splitlines() if line.strip()]


def _table(stream: IO[bytes]) -> list[dict[str, Any]]:
    return list(csv.DictReader(io.StringIO(stream.read().decode("utf-8-sig"), newline="")))


def _beside(files: Files) -> list[str] | None:
    """``NAME.txt`` beside every image, without the white space around the text."""
    names = {name: str(PurePosixPath(name).with_suffix(".txt")) for name in files.names}
    present = {name: beside for name, beside in names.items() if files.has(beside)}
    if not present:
        return None
    try:
        table = {}
        for name, beside in present.items():
            with files.open(beside) as stream:
                table[name] = stream.read().decode("utf-8-sig").strip()
    except _UNREADABLE as error:
        raise DataError(f"The caption '{beside}' in '{files.name}' is not readable", want="text in UTF-8") from error
    return _in_order(files, f"'{files.name}'", table, "caption")
