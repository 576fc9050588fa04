"""Errors that say what happened, what was given, what was wanted and what to do.

Every error a user can cause derives from :class:`FewstepError`; the command line prints it as one
message without a traceback and exits with its ``exit_code``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FewstepError(Exception):
    """Base of all errors a user can cause; ``str(error)`` is a complete sentence with the remedy.

    Args:
        what: what happened, one sentence.
        got: what was given.
        want: what was wanted.
        do: what to do about it (a command where there is one).
    """

    exit_code = 2

    def __init__(self, what: str, *, got: object = None, want: object = None, do: str | None = None) -> None:
        self.what, self.got, self.want, self.do = what, got, want, do
        parts = [what.rstrip(".") + "."]
        if got is not None:
            parts.append(f"Got: {got}.")
        if want is not None:
            parts.append(f"Wanted: {want}.")
        if do is not None:
            parts.append(do if do.endswith((".", "`", "?")) else do + ".")
        super().__init__(" ".join(parts))


class ConfigError(FewstepError):
    """A configuration value, path or file that cannot be used."""


class ScheduleError(ConfigError):
    """A noise-time law, mapping or stage schedule that cannot be run."""


class DataError(FewstepError):
    """Training or reference data that is missing, unreadable or of the wrong form."""


class CheckpointError(FewstepError):
    """A checkpoint that is missing, damaged, of another version or does not fit."""


class UnsafePickleError(CheckpointError):
    """A pickle that asks for something outside the allow-list of inert stand-ins."""


class StorageError(FewstepError):
    """The disk refused a write; what was on disk before is untouched."""


class NonFiniteError(FewstepError):
    """The loss or the gradient stopped being finite."""


class Interrupted(FewstepError):
    """The run was stopped by Ctrl-C (SIGINT) after its state was saved."""

    exit_code = 130


class Preempted(FewstepError):
    """The run was stopped by SIGTERM after its state was saved."""

    exit_code = 75


def nearest(name: str, candidates: Iterable[str]) -> str:
    """A sentence that names the nearest match of ``name`` and all candidates.

    >>> nearest("lerning", ["learning", "seed"])
    "Did you mean 'learning'? Known: learning, seed"
    """
    known = list(candidates)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"Did you mean '{close[0]}'? " if close else ""
    return f"{hint}Known: {', '.join(known)}"
