"""A reader of pickles that cannot run anything: no import, no attribute look-up, no call into the file.

Python's own ``pickle`` looks names up and calls what it finds; a restricted ``find_class`` still leaves
it calling ``__setstate__``, allocating whatever size a file declares (a memo index of 2^31 costs 16 GiB)
and hashing tuples as deep as they come (a crash). :class:`Machine` therefore interprets the opcodes
itself. A name is a key of a literal dict of stand-ins (``checkpoint/stand_ins.py``); a name that is not
in it ends the reading with :class:`~fewstep.errors.UnsafePickleError`. Every size is held against the
bytes that are really there, and nothing recurses.

Source: the opcode list of Python's ``pickletools`` (protocols 0 to 5); PEP 307, PEP 3154, PEP 574.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from fewstep.checkpoint.inert import Ledger, Names, Opaque, StandIn, require_shallow

MALFORMED = (
    TypeError, ValueError, KeyError, IndexError, AttributeError,
    ArithmeticError, RuntimeError, MemoryError, struct.error,
)  # fmt: skip
"""What reading damaged bytes can raise; never seen by a caller, always turned into a CheckpointError."""
LONGEST_LINE = 1 << 24


class Machine:
    """One reading of one pickle in ``data`` from ``position``; ``run`` returns its value.

    Args:
        data: the bytes; values of type bytes are read-only views into it.
        names: (module, name) -> StandIn or harmless constant.
        ledger: limits and wording of errors.
        persistent: resolves persistent ids; None refuses them.
        position: where the pickle starts; afterwards, where it ended.
    """

    def __init__(
        self,
        data: memoryview,
        names: Names,
        ledger: Ledger,
        *,
        persistent: Callable[[object], object] | None = None,
        position: int = 0,
    ) -> None:
        self.data, self.position = data, position
        self._names, self._ledger, self._persistent = names, ledger, persistent
        self._stack: list[object] = []
        self._below: list[list[object]] = []
        self._memo: dict[int, object] = {}

    def run(self) -> object:
        """The value of the pickle; raises CheckpointError (damaged) or UnsafePickleError (refused)."""
        try:
            while (code := self._take(1)[0]) != STOP:
                self._ledger.spend_operations(1)
                operation = OPERATIONS.get(code)
                if operation is None:
                    self._refuse(code)
                else:
                    operation(self)
            if self._below or len(self._stack) != 1:
                raise ValueError("the stack is not empty at its end")
            value = self._stack.pop()
        except MALFORMED as error:
            reason = f"it is damaged or not a pickle (at byte {self.position})"
            raise self._ledger.damaged(reason) from error
        require_shallow(value, self._ledger)
        return value

    def _refuse(self, code: int) -> None:
        if code in REFUSED:
            raise self._ledger.unsafe(REFUSED[code])
        raise ValueError(f"unknown opcode {code}")

    # Reading bytes.

    def _take(self, count: int) -> memoryview:
        end = self.position + count
        if end > len(self.data):
            raise self._ledger.damaged(
                f"it ends at byte {len(self.data)} in the middle of a value (cut off, or not a pickle)"
            )
        piece = self.data[self.position : end]
        self.position = end
        return piece

    def _unsigned(self, width: int) -> int:
        return int.from_bytes(self._take(width), "little")

    def _line(self) -> str:
        length = 128
        while True:
            piece = bytes(self.data[self.position : self.position + length])
            end = piece.find(b"\n")
            if end >= 0:
                self.position += end + 1
                return piece[:end].decode("latin-1")
            if self.position + length >= len(self.data):
                self._take(length + 1)
            if length > LONGEST_LINE:
                raise ValueError("the line is too long")
            length *= 4

    # Stack, marks and memo.

    def _mark(self) -> None:
        if len(self._below) >= self._ledger.limits.marks:
            raise self._ledger.damaged(f"it is nested more than {self._ledger.limits.marks} deep")
        self._below.append(self._stack)
        self._stack = []

    def _items(self) -> list[object]:
        items, self._stack = self._stack, self._below.pop()
        return items

    def _pop_one(self) -> None:
        if self._stack:
            self._stack.pop()
        else:
            self._items()

    def _top(self, count: int) -> tuple[object, ...]:
        if len(self._stack) < count:
            raise IndexError("the stack is too short")
        items = tuple(self._stack[len(self._stack) - count :])
        del self._stack[len(self._stack) - count :]
        return items

    def _remember(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    # Containers.

    def _append(self, items: list[object]) -> None:
        target = self._stack[-1]
        if not isinstance(target, list):
            raise TypeError("only a list can be appended to")
        target.extend(items)

    def _set_items(self, items: list[object]) -> None:
        target = self._stack[-1]
        if not isinstance(target, dict):
            raise TypeError("items can be set in a dict only")
        self._fill(target, items)

    def _fill(self, target: dict[object, object], items: list[object]) -> dict[object, object]:
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[checked_key(key)] = value
        return target

    def _add_items(self, items: list[object]) -> None:
        target = self._stack[-1]
        if not isinstance(target, set):
            raise TypeError("items can be added to a set only")
        target.update(checked_key(item) for item in items)

    # Names and what they build.

    def _global(self, module: object, name: object) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise TypeError("a name must be text")
        if (module, name) not in self._names:
            raise self._ledger.unsafe(f"{module}.{name}")
        self._stack.append(self._names[module, name])

    def _instance(self) -> None:
        self._global(self._line(), self._line())
        raise self._ledger.unsafe("the constructor of an old-style class (opcode INST)")

    def _reduce(self) -> None:
        function, arguments = self._top(2)
        if not isinstance(function, StandIn) or function.build is None:
            named = function.name if isinstance(function, StandIn | Opaque) else type(function).__name__
            raise self._ledger.unsafe(f"a call of {named}")
        if not isinstance(arguments, tuple):
            raise TypeError("arguments must be a tuple")
        self._stack.append(function.build(*arguments))

    def _build(self) -> None:
        (state,) = self._top(1)
        target = self._stack[-1]
        if isinstance(target, Opaque):
            target.state = state
        elif not isinstance(target, dict):  # a dict's extra attributes carry nothing a checkpoint needs
            raise self._ledger.unsafe(f"a change of the state of {type(target).__name__}")

    def _persistent_id(self) -> None:
        if self._persistent is None:
            raise self._ledger.unsafe("an object from outside the file (a persistent id)")
        (key,) = self._top(1)
        self._stack.append(self._persistent(key))


def checked_key(key: object) -> object:
    """``key`` if it may index a dict: text, a small number, a truth value or None (hashing stays shallow)."""
    if key is None or isinstance(key, str | bool) or (isinstance(key, int) and abs(key) < 1 << 31):
        return key
    raise TypeError(f"a {type(key).__name__} cannot be a key")


def _push(read: Callable[[Machine], object]) -> Callable[[Machine], None]:
    def operation(machine: Machine) -> None:
        value = read(machine)  # first: reading may put another stack in place
        machine._stack.append(value)

    return operation


def _text(width: int) -> Callable[[Machine], None]:
    return _push(lambda m: str(m._take(m._unsigned(width)), "utf-8"))


def _bytes(width: int) -> Callable[[Machine], None]:
    return _push(lambda m: m._take(m._unsigned(width)))


def _tuple(count: int) -> Callable[[Machine], None]:
    return _push(lambda m: m._top(count))


def _recall(read: Callable[[Machine], int]) -> Callable[[Machine], None]:
    return _push(lambda m: m._memo[read(m)])


def _integer_line(machine: Machine) -> int | bool:
    line = machine._line()
    if line in ("00", "01"):
        return line == "01"
    return _bounded_integer(line)


def _bounded_integer(line: str) -> int:
    if len(line) > 80:
        raise ValueError("the number is too long")
    return int(line.removesuffix("L"))


def _long(machine: Machine, width: int) -> int:
    size = machine._unsigned(width)
    if size > 32:
        raise ValueError("the number is too long")
    return int.from_bytes(machine._take(size), "little", signed=True)


def _frame(machine: Machine) -> None:
    size = machine._unsigned(8)
    machine._take(size)
    machine.position -= size


def _protocol(machine: Machine) -> None:
    if machine._unsigned(1) > 5:
        raise ValueError("the protocol is newer than 5")


STOP = ord(".")
REFUSED = {
    0x82: "a registered extension (opcode EXT1)",
    0x83: "a registered extension (opcode EXT2)",
    0x84: "a registered extension (opcode EXT4)",
    0x92: "a constructor with keywords (opcode NEWOBJ_EX)",
    0x97: "a buffer from outside the file (opcode NEXT_BUFFER)",
    0x98: "a buffer from outside the file (opcode READONLY_BUFFER)",
    ord("P"): "an object from outside the file (a persistent id)",
    ord("o"): "the constructor of an old-style class (opcode OBJ)",
}
OPERATIONS: dict[int, Callable[[Machine], object]] = {
    0x80: _protocol,
    0x95: _frame,
    # values
    ord("N"): _push(lambda m: None),
    0x88: _push(lambda m: True),
    0x89: _push(lambda m: False),
    ord("I"): _push(_integer_line),
    ord("L"): _push(lambda m: _bounded_integer(m._line())),
    ord("J"): _push(lambda m: int.from_bytes(m._take(4), "little", signed=True)),
    ord("K"): _push(lambda m: m._unsigned(1)),
    ord("M"): _push(lambda m: m._unsigned(2)),
    0x8A: _push(lambda m: _long(m, 1)),
    0x8B: _push(lambda m: _long(m, 4)),
    ord("F"): _push(lambda m: float(m._line())),
    ord("G"): _push(lambda m: struct.unpack(">d", m._take(8))[0]),
    ord("V"): _push(lambda m: m._line().encode("latin-1").decode("raw_unicode_escape")),
    ord("X"): _text(4),
    0x8C: _text(1),
    0x8D: _text(8),
    ord("B"): _bytes(4),
    ord("C"): _bytes(1),
    0x8E: _bytes(8),
    0x96: _bytes(8),
    # stack and memo
    ord("("): Machine._mark,
    ord("0"): Machine._pop_one,
    ord("1"): Machine._items,
    ord("2"): _push(lambda m: m._stack[-1]),
    ord("p"): lambda m: m._remember(_bounded_integer(m._line())),
    ord("q"): lambda m: m._remember(m._unsigned(1)),
    ord("r"): lambda m: m._remember(m._unsigned(4)),
    0x94: lambda m: m._remember(len(m._memo)),
    ord("g"): _recall(lambda m: _bounded_integer(m._line())),
    ord("h"): _recall(lambda m: m._unsigned(1)),
    ord("j"): _recall(lambda m: m._unsigned(4)),
    # containers
    ord(")"): _push(lambda m: ()),
    ord("t"): _push(lambda m: tuple(m._items())),
    0x85: _tuple(1),
    0x86: _tuple(2),
    0x87: _tuple(3),
    ord("]"): _push(lambda m: []),
    ord("l"): _push(lambda m: m._items()),
    ord("a"): lambda m: m._append(list(m._top(1))),
    ord("e"): lambda m: m._append(m._items()),
    ord("}"): _push(lambda m: {}),
    ord("d"): _push(lambda m: m._fill({}, m._items())),
    ord("s"): lambda m: m._set_items(list(m._top(2))),
    ord("u"): lambda m: m._set_items(m._items()),
    0x8F: _push(lambda m: set()),
    0x90: lambda m: m._add_items(m._items()),
    0x91: _push(lambda m: frozenset(checked_key(item) for item in m._items())),
    # names
    ord("c"): lambda m: m._global(m._line(), m._line()),
    0x93: lambda m: m._global(*m._top(2)),
    ord("i"): Machine._instance,
    ord("R"): Machine._reduce,
    0x81: Machine._reduce,
    ord("b"): Machine._build,
    ord("Q"): Machine._persistent_id,
}
