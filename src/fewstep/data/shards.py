"""Rows of tensors in a folder of shards: written once, in pieces that a stop does not lose, read at random.

A set is ``shard-00000.safetensors``, ``shard-00001.safetensors``, ... of equally many rows (the last may have fewer)
and, once it is whole, ``manifest.json``. Every shard says in its metadata which set it belongs to (``key``: whatever
the rows depend on), so that an unfinished folder is continued by the one job that began it.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from fewstep.data.codec import write_file
from fewstep.data.lock import lock, unlock
from fewstep.errors import DataError

FORMAT = "fewstep-shards"
VERSION = 1
MANIFEST = "manifest.json"

SHARD_BYTES = 2**27
"""Size of a shard where the rows per shard are not given."""

SAVE_SECONDS = 60.0
"""Rows are not kept from the disk for longer than this, whether or not they fill a shard."""

_KINDS = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "BOOL": torch.bool,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
}  # fmt: skip
_AGAIN = "run the command that wrote the folder again: it goes on from there"

Rows = Mapping[str, Tensor]
"""Named tensors with the same number of rows, ``[n, ...]`` each."""


@dataclass(frozen=True)
class _Column:
    """One tensor of a shard: shape and dtype of a row, and where in the file the rows begin."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class _Header:
    rows: int
    rows_per_shard: int
    key: dict[str, Any]
    columns: dict[str, _Column]

    @property
    def form(self) -> dict[str, dict[str, Any]]:
        """name -> shape and dtype of a row, JSON-able."""
        return {name: _form(column.shape, column.dtype) for name, column in sorted(self.columns.items())}


class ShardWriter:
    """Writes rows into a folder, or goes on where an earlier writer of the same set stopped.

    Use it as a context: leaving it, by an error or Ctrl-C too, keeps every row that was added. One process at a time
    writes: the folder is locked (where its disk can lock files) until the writer is closed, or gone. ::

        with ShardWriter(folder, {"teacher": digest, "seed": 0}, total) as writer:
            for start in range(writer.done, total, 256):
                writer.add({"x": x, "label": label})

    Rows must depend on ``key`` and their number alone; the finished files then have the same bits however often the
    writing was stopped. A larger ``total`` extends a finished set.

    Args:
        folder: made if missing; it may hold nothing else.
        key: JSON-able; all that the rows depend on.
        total: rows of the whole set.
        rows_per_shard: default: as many as make 128 MiB.

    Raises:
        DataError: the folder holds another set, other files, more rows than ``total``, or a damaged shard; or another
            process is writing into it.
        StorageError: (while writing) the disk refused; rows written before are kept.
    """

    def __init__(
        self, folder: str | Path, key: Mapping[str, Any], total: int, rows_per_shard: int | None = None
    ) -> None:
        if total < 1 or (rows_per_shard is not None and rows_per_shard < 1):
            got = f"{total} rows, {rows_per_shard} per shard"
            raise DataError("A set of shards needs at least one row, and one per shard", got=got)
        self._folder, self._total, self._rows_per_shard = Path(folder), total, rows_per_shard
        self._key: dict[str, Any] = json.loads(json.dumps(dict(key)))
        self._form: dict[str, Any] | None = None
        self._state: tuple[int, list[Rows]] = (0, [])
        """Full shards on the disk and the rows after them, changed in one assignment: Ctrl-C comes before or after."""
        self._saved, self._saved_at, self._wrote = 0, time.monotonic(), False
        self._refuse_others()
        self._unlock = weakref.finalize(self, unlock, lock(self._folder), self._folder)
        try:
            self._continue()
        except BaseException:
            self._unlock()
            raise

    @property
    def done(self) -> int:
        """Rows of the set so far; the next one added has this number."""
        full, waiting = self._state
        return full * (self._rows_per_shard or 0) + sum(_count(rows) for rows in waiting)

    def add(self, rows: Rows) -> None:
        """Append rows, ``name -> [n, ...]``; the same names, shapes and dtypes every time.

        Raises:
            DataError: rows of another form, or more than the set has.
        """
        kept = {name: rows[name].detach().cpu().contiguous() for name in sorted(rows)}
        form = {name: _form(tensor.shape[1:], tensor.dtype) for name, tensor in kept.items()}
        if len({len(tensor) for tensor in kept.values()}) != 1 or (self._form is not None and form != self._form):
            raise DataError(f"The rows do not fit the set '{self._folder}'", got=form, want=self._form)
        if self.done + _count(kept) > self._total:
            got = f"{self.done + _count(kept)} rows"
            raise DataError(f"There are more rows than the set '{self._folder}' has", got=got, want=self._total)
        self._form = form
        if self._rows_per_shard is None:
            row_bytes = sum(math.prod(tensor.shape[1:]) * tensor.element_size() for tensor in kept.values())
            self._rows_per_shard = max(1, SHARD_BYTES // max(1, row_bytes))
        self._state[1].append(kept)
        while sum(_count(rows) for rows in self._state[1]) >= self._rows_per_shard:
            full, waiting = self._state
            joined = _join(waiting)
            self._write(full, {name: tensor[: self._rows_per_shard] for name, tensor in joined.items()})
            self._state = (full + 1, [{name: tensor[self._rows_per_shard :] for name, tensor in joined.items()}])
        if time.monotonic() - self._saved_at > SAVE_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write the rows that do not fill a shard yet; that shard is written anew when more come."""
        if self.done > self._saved:
            full, waiting = self._state
            self._write(full, _join(waiting))

    def close(self) -> None:
        """Write what waits and, if the set is whole, its manifest; let others write."""
        try:
            self.flush()
            if self.done == self._total and (self._wrote or not (self._folder / MANIFEST).is_file()):
                self._write_manifest()
        finally:
            self._unlock()

    def _write_manifest(self) -> None:
        shards = range(-(-self._total // (self._rows_per_shard or 1)))
        hashes = [_file_hash(self._folder / _shard_name(i)) for i in shards]
        fingerprint = hashlib.sha256("\n".join(hashes).encode())  # the key is in every shard
        manifest = {
            "format": FORMAT, "version": VERSION, "key": self._key, "count": self._total,
            "rows_per_shard": self._rows_per_shard, "tensors": self._form, "shards": hashes,
            "fingerprint": fingerprint.hexdigest(),
        }  # fmt: skip
        text = json.dumps(manifest, indent=1) + "\n"
        write_file(self._folder / MANIFEST, lambda file: file.write(text.encode()))

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _continue(self) -> None:
        """Take up the shards that are there, up to the first gap."""
        for left in (*self._folder.glob(".shard-*.tmp"), *self._folder.glob(f".{MANIFEST}*.tmp")):
            left.unlink(missing_ok=True)  # of a writer that was killed
        while (path := self._folder / _shard_name(self._state[0])).is_file():
            header = _read_header(path)
            self._check_key(header.key)
            self._form, self._rows_per_shard = header.form, header.rows_per_shard
            if header.rows < header.rows_per_shard:
                self._state[1].append(safetensors.torch.load(path.read_bytes()))
                break
            self._state = (self._state[0] + 1, [])
        self._saved = self.done
        if self.done > self._total:
            do = "Use the whole set, or choose another folder"
            raise DataError(f"The set '{self._folder}' has more rows already", got=self.done, want=self._total, do=do)
        manifest = self._folder / MANIFEST
        if manifest.is_file() and (self.done < self._total or not self._is_told(open_shards(self._folder))):
            manifest.unlink()  # not what the folder holds from here on

    def _is_told(self, shards: Shards) -> bool:
        """Whether a manifest is of this set, as far as it says; contents are compared when they are read."""
        return (len(shards), shards.key) == (self._total, self._key)

    def _refuse_others(self) -> None:
        if self._folder.exists() and not self._folder.is_dir():
            raise DataError(f"'{self._folder}' is a file", want="a folder")
        present = sorted(p.name for p in self._folder.iterdir()) if self._folder.is_dir() else []
        others = [name for name in present if name != MANIFEST and not name.startswith(("shard-", "."))]
        if others:
            do = "Choose a new or empty folder"
            raise DataError(f"The folder '{self._folder}' holds other files", got=others[0], do=do)

    def _check_key(self, key: dict[str, Any]) -> None:
        names = sorted(n for n in key.keys() | self._key.keys() if key.get(n) != self._key.get(n))
        if names:
            raise DataError(
                f"The set '{self._folder}' was made with other settings",
                got=", ".join(f"{n} {key.get(n)!r}" for n in names),
                want=", ".join(f"{n} {self._key.get(n)!r}" for n in names),
                do="Choose another folder, or the settings it was made with",
            )

    def _write(self, number: int, rows: Rows) -> None:
        about = {"format": FORMAT, "version": VERSION, "key": self._key, "rows_per_shard": self._rows_per_shard}
        plain = {name: tensor.contiguous() for name, tensor in rows.items()}
        content = safetensors.torch.save(plain, metadata={"fewstep": json.dumps(about, sort_keys=True)})
        write_file(self._folder / _shard_name(number), lambda file: file.write(content))
        self._wrote = True
        self._saved, self._saved_at = number * (self._rows_per_shard or 0) + _count(rows), time.monotonic()


class Shards:
    """A finished set, read through memory maps; made by :func:`open_shards`.

    Args:
        folder: where it is.
        manifest: the content of its manifest.json.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.key: dict[str, Any] = manifest["key"]
        self.fingerprint: str = manifest["fingerprint"]
        """sha256, in hex, that changes with the key and with every bit of the content."""
        self.tensors: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            name: (tuple(form["shape"]), _dtype(form["dtype"])) for name, form in manifest["tensors"].items()
        }
        """name -> shape and dtype of one row."""
        self._count, self._rows = int(manifest["count"]), int(manifest["rows_per_shard"])
        self._hashes: list[str] = manifest["shards"]
        self._verified: set[int] = set()
        self._open = lru_cache(maxsize=128)(self._open_shard)

    def __len__(self) -> int:
        return self._count

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """Names of the tensors, in alphabetical order."""
        return tuple(sorted(self.tensors))

    def read(self, name: str, index: np.ndarray) -> Tensor:
        """Rows ``index`` (int ``[b]``, any order) of a tensor, ``[b, ...]``: a copy.

        Raises:
            DataError: no such tensor or row, or a shard that is missing or damaged (found when it is first read).
        """
        if name not in self.tensors:
            raise DataError(f"The set '{self.folder}' has no '{name}'", got=name, want=" or ".join(self.tensor_names))
        index = np.asarray(index, dtype=np.int64)
        if index.size and (index.min() < 0 or index.max() >= self._count):
            got = f"rows {index.min()} to {index.max()}"
            raise DataError(f"The set '{self.folder}' has no such rows", got=got, want=f"0 to {self._count - 1}")
        shape, dtype = self.tensors[name]
        out = np.empty((len(index), math.prod(shape) * dtype.itemsize), dtype=np.uint8)
        shards, within = np.divmod(index, self._rows)
        for shard in np.unique(shards):
            here = shards == shard
            out[here] = self._open(int(shard))[name][within[here]]
        return torch.from_numpy(out).flatten().view(dtype).reshape(len(index), *shape)

    def _open_shard(self, shard: int) -> dict[str, np.ndarray]:
        """name -> bytes ``[rows, row_bytes]`` of a shard, mapped."""
        path = self.folder / _shard_name(shard)
        header = _read_header(path)
        rows = min(self._rows, self._count - shard * self._rows)
        if shard not in self._verified:
            if header.rows != rows or _file_hash(path) != self._hashes[shard]:
                raise DataError(
                    f"The shard '{path}' is not the one that was written: its content differs",
                    do=f"Delete it, and {_AGAIN}",
                )
            self._verified.add(shard)
        mapped = np.memmap(path, dtype=np.uint8, mode="r")
        return {
            name: mapped[c.offset : c.offset + rows * c.row_bytes].reshape(rows, c.row_bytes)
            for name, c in header.columns.items()
        }


def open_shards(folder: str | Path) -> Shards:
    """The finished set in ``folder``.

    Raises:
        DataError: it is no set, not finished, damaged or of another version.
    """
    path = Path(folder).expanduser()
    if not (path / MANIFEST).is_file():
        begun = path.is_dir() and any(path.glob("shard-*.safetensors"))
        what = "is not finished" if begun else "is not a set of shards: it has no manifest.json"
        raise DataError(f"'{path}' {what}", do="Run the command that began it again: it goes on" if begun else None)
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise DataError(f"'{path / MANIFEST}' does not describe a set of shards")
        if manifest["version"] != VERSION:
            raise DataError(f"'{path}' was written in another version of the format", got=manifest["version"],
                            want=VERSION, do="Use the fewstep release that wrote it")  # fmt: skip
        return Shards(path, manifest)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"The file '{path / MANIFEST}' is damaged", got=error, do=f"Delete it, and {_AGAIN}") from error


def is_shards(folder: Path) -> bool:
    """Whether the folder is meant as a set of shards, finished or not."""
    return any(folder.glob("shard-*.safetensors"))


def _shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def _read_header(path: Path) -> _Header:
    """What a shard says of itself; its size must be what that amounts to."""
    damaged = DataError(
        f"The shard '{path}' is damaged, cut short or not one of fewstep's", do=f"Delete it, and {_AGAIN}"
    )
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= path.stat().st_size - 8:
                raise damaged
            entries = json.loads(file.read(length))
        about = json.loads(entries.pop("__metadata__")["fewstep"])
        start = 8 + length
        columns = {
            name: _Column(tuple(e["shape"][1:]), _KINDS[e["dtype"]], start + e["data_offsets"][0])
            for name, e in entries.items()
        }
        rows = {e["shape"][0] for e in entries.values()}
        end = start + max(e["data_offsets"][1] for e in entries.values())
        if about["format"] != FORMAT or about["version"] != VERSION or len(rows) != 1 or end != path.stat().st_size:
            raise damaged
        return _Header(rows.pop(), about["rows_per_shard"], about["key"], columns)
    except FileNotFoundError as error:
        raise DataError(f"The shard '{path}' is missing", do=_AGAIN.capitalize()) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise damaged from error


def _count(rows: Rows) -> int:
    return len(next(iter(rows.values()))) if rows else 0


def _join(parts: list[Rows]) -> Rows:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _form(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype) -> dict[str, Any]:
    return {"shape": list(shape), "dtype": str(dtype).removeprefix("torch.")}


def _dtype(name: str) -> torch.dtype:
    return {str(dtype).removeprefix("torch."): dtype for dtype in _KINDS.values()}[name]


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
