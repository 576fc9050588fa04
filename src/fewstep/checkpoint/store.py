"""Atomic directories of safetensors and JSON: nothing in them can run code when loaded."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewstep.errors import CheckpointError, StorageError

FORMAT_VERSION = 1

Tensors = Mapping[str, Tensor]


def file_hash(path: Path) -> str:
    """sha256 of a file, 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A temporary sibling of ``path`` to fill; on success it is fsynced and takes the name, on failure it goes.

    An existing directory of that name is replaced only after the new one is complete.

    Raises:
        StorageError: the disk is full or refuses the write; what was there before is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        yield temporary
        for entry in sorted(temporary.rglob("*")):
            _sync(entry)
        _sync(temporary)
        _replace_directory(temporary, path)
        _sync(path.parent)
    except (OSError, SafetensorError) as error:
        raise _storage_error(path, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a small text file atomically.

    Raises:
        StorageError: the disk is full or refuses the write; the old file is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        _sync(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise _storage_error(path, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def append_text(path: Path, text: str) -> None:
    """Add a line to a text file.

    Raises:
        StorageError: the disk is full or refuses the write; what was there before is untouched.
    """
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise _storage_error(path, error) from error


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically; numbers keep every bit."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_tensors(path: Path, tensors: Tensors) -> None:
    """Write a safetensors file (inside :func:`new_directory`, which makes it atomic)."""
    plain: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        shared = tensor.untyped_storage().data_ptr() in seen  # tied weights: safetensors wants separate memory
        seen.add(tensor.untyped_storage().data_ptr())
        plain[name] = tensor.clone() if shared else tensor
    save_file(plain, path)
    path.chmod(0o644)  # safetensors keeps its files to their owner


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        CheckpointError: it is missing, truncated or not a safetensors file.
    """
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"The file '{path}' is missing") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"The file '{path}' is damaged or not a safetensors file", got=str(error)) from error


def read_json(path: Path, expect: str) -> dict[str, Any]:
    """A JSON record that says it is an ``expect`` of this format version.

    Raises:
        CheckpointError: it is missing, damaged, something else, or of another version.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"'{path.parent}' is not a {expect}: it has no {path.name}") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"The file '{path}' is damaged", got=str(error)) from error
    if not isinstance(data, dict) or data.get("format") != expect:
        raise CheckpointError(f"The file '{path}' does not describe a {expect}")
    if data.get("version") != FORMAT_VERSION:
        raise CheckpointError(
            f"'{path.parent}' was written in another version of the format",
            got=f"version {data.get('version')}",
            want=f"version {FORMAT_VERSION}",
            do="Use the fewstep release that wrote it, or convert it there",
        )
    return data


def header(kind: str) -> dict[str, Any]:
    """First fields of every JSON record."""
    return {"format": kind, "version": FORMAT_VERSION}


def _replace_directory(new: Path, path: Path) -> None:
    if not path.exists():
        os.rename(new, path)
        return
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    os.rename(path, old)
    try:
        os.rename(new, path)
    except OSError:
        os.rename(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _storage_error(path: Path, error: Exception) -> StorageError:
    number = getattr(error, "errno", None)
    if number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
        return StorageError(
            f"The disk is full: '{path}' could not be written, and what was saved before is intact",
            do="Free some space, then run: fewstep resume RUN",
        )
    return StorageError(f"'{path}' could not be written ({error}), and what was saved before is intact")
