"""Where things are kept that can be made again: the user's cache."""

from __future__ import annotations

import os
from pathlib import Path

from fewstep.errors import ConfigError


def cache_directory() -> Path | None:
    """``$FEWSTEP_CACHE``, else ``$XDG_CACHE_HOME/fewstep``, else ``~/.cache/fewstep``; None without a home."""
    own, base = os.environ.get("FEWSTEP_CACHE"), os.environ.get("XDG_CACHE_HOME")
    try:
        if own:
            return Path(own).expanduser().absolute()
        return (Path(base) if base and Path(base).is_absolute() else Path.home() / ".cache") / "fewstep"
    except RuntimeError:  # no home directory
        return None


def place_for(kind: str, folder: str | None = None) -> Path:
    """``folder``, or the part of the user's cache that holds things of this ``kind``.

    Raises:
        ConfigError: there is neither.
    """
    if folder is not None:
        return Path(folder).expanduser().absolute()
    root = cache_directory()
    if root is None:
        raise ConfigError(
            f"There is no place to keep {kind}: there is no home directory",
            do="Set FEWSTEP_CACHE to a folder, or --set data.cache=FOLDER",
        )
    return root / kind
