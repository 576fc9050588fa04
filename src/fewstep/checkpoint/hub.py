"""Models of the Hugging Face hub: in the cache of downloads, or fetched into it; never pickles (extra ``hf``)."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fewstep.errors import CheckpointError

HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")
NO_HUB_ID = (".zip", ".npz", ".npy", ".png", ".jpg", ".pkl", ".pt", ".pth", ".safetensors", ".json", ".yaml", ".py")
"""Endings of files: such a name is a path."""

PROBE_SECONDS = 3.0


def is_hub_id(name: str) -> bool:
    """``owner/name[@revision]`` where there is no folder ``owner``: beside other files it is a path."""
    plain, _, _ = name.partition("@")
    owner, _, rest = plain.partition("/")
    known = HUB_ID.fullmatch(plain) is not None and ".py:" not in name
    return known and not Path(owner).exists() and Path(rest).suffix.lower() not in NO_HUB_ID


def snapshot(
    name: str,
    revision: str,
    patterns: Sequence[str],
    is_complete: Callable[[Path], bool],
    do: str,
    *,
    fetch: bool = True,
) -> Path:
    """The folder of a model: from the cache if it is complete there, else downloaded, if the hub answers.

    Args:
        name: ``owner/name``.
        revision: branch, tag or commit.
        patterns: files to fetch.
        is_complete: whether a folder holds all that is needed.
        do: what the user is to do where that is not possible.
        fetch: False looks into the cache alone.

    Raises:
        CheckpointError: it is not in the cache, and offline or refused by the hub.
    """
    try:
        import huggingface_hub as hub
    except ImportError as error:
        raise CheckpointError(
            f"There is no folder '{name}': as a hub id, it needs huggingface_hub, which is not installed",
            do="Run: pip install 'fewstep[hf]'",
        ) from error

    def folder_of(local: bool) -> Path:
        return Path(hub.snapshot_download(name, revision=revision, allow_patterns=[*patterns], local_files_only=local))

    try:
        folder = folder_of(local=True)
        if is_complete(folder):
            return folder
    except Exception:  # not in the cache, whatever the hub library calls it
        pass
    reason = _why_not(hub) if fetch else "it was not looked for elsewhere"
    if reason:
        raise CheckpointError(
            f"The model '{name}' is neither a folder nor in the cache '{hub.constants.HF_HUB_CACHE}', and {reason}",
            do=do,
        )
    try:
        return folder_of(local=False)
    except Exception as error:  # no such id, no access, connection lost
        raise CheckpointError(f"The model '{name}' cannot be downloaded", got=first_line(error), do=do) from error


def is_offline() -> bool:
    """Whether the user has asked for no network."""
    return any(
        os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in ("HF_HUB_OFFLINE", "FEWSTEP_OFFLINE")
    )


def first_line(error: BaseException) -> str:
    """What another library says, in one line: its kind of error and the first line of its message."""
    line = next(iter(str(error).strip().splitlines()), "")[:200].rstrip(".")
    return f"{type(error).__name__}: {line}" if line else type(error).__name__


def _why_not(hub: Any) -> str | None:
    """Why the hub cannot be asked, by one short question: its library would try for 23 s per file."""
    if is_offline():
        return "this process is offline (HF_HUB_OFFLINE or FEWSTEP_OFFLINE is set)"
    try:
        hub.get_session().head(hub.constants.ENDPOINT, timeout=PROBE_SECONDS)
    except Exception as error:  # whatever the HTTP library calls it
        return f"{hub.constants.ENDPOINT} does not answer ({first_line(error)})"
    return None
