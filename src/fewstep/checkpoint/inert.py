"""What a pickle becomes when nothing in it is built: inert records, and the ledger of what it may ask for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from fewstep.errors import CheckpointError, UnsafePickleError

REMEDY = (
    "Use the original .pkl or .pt of EDM or ECT; fewstep never runs code from a file, "
    "so save anything else as safetensors with the program that wrote it"
)


@dataclass(frozen=True)
class Limits:
    """What a pickle may ask for: bytes in the file, opcodes, nesting of marks and of values."""

    file_bytes: int = 8 << 30
    operations: int = 2_000_000
    marks: int = 200
    depth: int = 200


@dataclass
class Ledger:
    """What one file has used so far, and how its errors are worded; shared with the pickles nested in it."""

    source: str
    limits: Limits
    storage_bytes: int
    operations: int = 0

    def spend_operations(self, count: int) -> None:
        """Count opcodes and copied items; raises CheckpointError beyond the limit."""
        self.operations += count
        if self.operations > self.limits.operations:
            raise self.damaged(f"it asks for more than {self.limits.operations} operations")

    def spend_storage(self, count: int) -> None:
        """Count bytes of tensor storage; a file cannot hold more of them than its own size."""
        self.storage_bytes -= count
        if self.storage_bytes < 0:
            raise self.damaged("its tensors ask for more bytes than the file holds")

    def damaged(self, reason: str) -> CheckpointError:
        """The error for a file that is not what it should be."""
        return CheckpointError(
            f"'{self.source}' cannot be read as a checkpoint: {reason}",
            do="Check that it is the whole file (its size or checksum) and the one you meant",
        )

    def unsafe(self, name: str) -> UnsafePickleError:
        """The error for a file that asks for ``name``."""
        return UnsafePickleError(
            f"'{self.source}' asks for {printable(name)}, which a checkpoint of EDM or ECT never needs; "
            "reading stopped and nothing was executed",
            do=REMEDY,
        )


@dataclass(frozen=True, eq=False)
class StandIn:
    """What a name of the file stands for: ``build`` is our own function, ``value`` a harmless constant."""

    name: str
    build: Callable[..., object] | None = None
    value: object = None


@dataclass(eq=False)
class Opaque:
    """An object of a class that was not built: its ``name``, and its ``args`` and ``state`` as plain data."""

    name: str
    args: tuple[object, ...] = field(default=(), repr=False)
    state: object = field(default=None, repr=False)


@dataclass(frozen=True, eq=False)
class Persistent:
    """An object of EDM's ``torch_utils.persistence``, unbuilt; ``source`` is its module's text, only text."""

    class_name: str
    source: str = field(repr=False)
    state: dict[object, object] = field(repr=False)

    @property
    def init_args(self) -> object:
        """The positional arguments the object was constructed with."""
        return self.state.get("_init_args", ())

    @property
    def init_kwargs(self) -> object:
        """The keyword arguments the object was constructed with."""
        return self.state.get("_init_kwargs", {})


Names = Mapping[tuple[str, str], object]


def printable(text: str) -> str:
    """``text`` from a file, fit for a terminal: escaped and cut to 80 characters."""
    escaped = text.encode("unicode_escape").decode("ascii")
    return escaped if len(escaped) <= 80 else escaped[:77] + "..."


def require_shallow(value: object, ledger: Ledger) -> None:
    """Raise CheckpointError when values are nested deeper than the limit (no recursion; cycles are fine)."""
    level: list[object] = [value]
    seen: set[int] = set()
    for _ in range(ledger.limits.depth):
        below: list[object] = []
        for item in level:
            if id(item) not in seen:
                seen.add(id(item))
                below.extend(_children(item))
        if not below:
            return
        level = below
    raise ledger.damaged(f"its values are nested more than {ledger.limits.depth} deep")


def _children(value: object) -> list[object]:
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, list | tuple):
        return list(value)
    if isinstance(value, Opaque):
        return [value.args, value.state]
    return [value.state] if isinstance(value, Persistent) else []
