"""Long measurements that lose nothing: finished parts are kept beside the result until it is whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fewstep.checkpoint.store import write_json
from fewstep.errors import ConfigError


class Partial:
    """Parts by name, written atomically as each is finished, and taken up by the next call that asks for the same.

    Args:
        path: the file, or None to keep nothing.
        about: everything that the parts depend on; parts kept for something else are not used.
    """

    def __init__(self, path: Path | None, about: dict[str, Any]) -> None:
        self._path = path
        self._about: dict[str, Any] = json.loads(json.dumps(about))
        self._parts = self._read()

    def __len__(self) -> int:
        return len(self._parts)

    def part(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The part of that name: as it was kept, or made now and kept.

        Raises:
            ConfigError: the part cannot be kept.
        """
        if name not in self._parts:
            self._parts[name] = make()
            self._write()
        return self._parts[name]

    def _read(self) -> dict[str, dict[str, Any]]:
        if self._path is None or not self._path.is_file():
            return {}
        try:
            kept = json.loads(self._path.read_text(encoding="utf-8"))
            return dict(kept["parts"]) if kept["about"] == self._about else {}
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    def _write(self) -> None:
        if self._path is not None:
            write_json(self._path, {"about": self._about, "parts": self._parts})

    def done(self) -> None:
        """The result is whole: the parts go."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    @staticmethod
    def beside(out: Path | None) -> Path | None:
        """The file of the parts of ``out``.

        Raises:
            ConfigError: ``out`` is not a file name.
        """
        if out is None:
            return None
        if not out.name or out.is_dir():
            raise ConfigError("The result is written to a file", got=f"--out {out}, a directory")
        return out.with_name(f"{out.stem}.partial.json")
