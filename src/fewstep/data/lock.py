"""One writer at a time in a folder."""

from __future__ import annotations

import os
import time
from pathlib import Path

from fewstep.errors import DataError

LOCK = ".lock"
"""Locked, and there, while a process writes."""

PATIENCE = 2.0
"""Seconds that a writer waits for another one, which may only be looking whether the set is whole."""


def lock(folder: Path) -> int | None:
    """The folder's lock file, open and locked; None where files cannot be locked.

    Raises:
        DataError: another writer has it, and keeps it.
    """
    try:
        import fcntl

        folder.mkdir(parents=True, exist_ok=True)
        for left in range(round(PATIENCE / 0.1), -1, -1):
            file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(file), os.stat(folder / LOCK)):  # else the last writer has removed it
                    return file
            except (BlockingIOError, FileNotFoundError):
                pass
            except OSError:
                os.close(file)
                raise
            os.close(file)
            if left:
                time.sleep(0.1)
    except (ImportError, OSError):  # no Unix, a disk without locks or that is only read
        return None
    raise DataError(
        f"Another process is writing into '{folder}'",
        do="Wait for it, or choose another folder (data.cache=OTHER for a run, --out OTHER for fewstep generate)",
    )


def unlock(file: int | None, folder: Path) -> None:
    """Give up what :func:`lock` returned."""
    if file is not None:
        (folder / LOCK).unlink(missing_ok=True)
        os.close(file)
