"""Tensors by name from a file of ``torch.save``, in its zip or its older layout, without unpickling.

The pickle is run by the inert machine of this room, so a file can do nothing but hold numbers.
Source of the older layout: torch.serialization; five pickles (magic number, protocol, system, the object, the keys of
its storages), then for each key the number of elements (8 bytes) and the elements.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fewstep.checkpoint.inert import Ledger, Limits
from fewstep.checkpoint.machine import Machine
from fewstep.checkpoint.stand_ins import (
    LEGACY_MAGIC,
    LEGACY_PROTOCOL,
    STORAGES,
    StandIns,
    Storage,
    declared,
)
from fewstep.checkpoint.torch_zip import ZIP_START, Archive
from fewstep.errors import CheckpointError


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Name -> tensor on the CPU, of a ``.pth`` that holds a plain state dict.

    Raises:
        CheckpointError: the file is missing, damaged, or holds something else.
        UnsafePickleError: it asks for code to be run; none was.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"'{path}' cannot be opened: {error.strerror}") from error
    ledger = Ledger(str(path), Limits(), storage_bytes=len(raw))
    tree = Archive(raw, ledger).tree() if raw.startswith(ZIP_START) else _legacy_tree(memoryview(raw), ledger)
    if not isinstance(tree, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in tree.items()):
        raise ledger.damaged("it does not hold tensors by name")
    return tree


def _legacy_tree(data: memoryview, ledger: Ledger) -> object:
    """The object of the older layout: its tensors are views of storages that are filled afterwards."""
    storages: dict[str, Storage] = {}

    def storage(pid: object) -> Storage:
        wanted = declared(pid, ledger)
        known = storages.get(wanted.key)
        if known is None:
            ledger.spend_storage(wanted.count * wanted.dtype.itemsize)
            known = storages[wanted.key] = Storage(torch.zeros(wanted.count, dtype=wanted.dtype))
        if known.flat.dtype is not wanted.dtype or known.flat.numel() != wanted.count or wanted.dtype is torch.bool:
            raise ledger.damaged("a tensor's storage is announced twice, differently, or is not of numbers")
        return known

    position, values = 0, []
    for names in (STORAGES, STORAGES, STORAGES, StandIns(ledger).names(), STORAGES):
        machine = Machine(data, names, ledger, persistent=storage, position=position)
        values.append(machine.run())
        position = machine.position
        if len(values) == 1 and values[0] != LEGACY_MAGIC:
            raise ledger.damaged("it does not begin as torch.save begins a file")
    _, protocol, system, tree, keys = values
    known = isinstance(system, dict) and system.get("little_endian") is True and protocol == LEGACY_PROTOCOL
    if not known or not isinstance(keys, list) or len(keys) != len(storages) or {*map(str, keys)} != {*storages}:
        raise ledger.damaged("it is not in a layout that torch writes on a little-endian machine")
    for key in keys:
        position = _fill(storages[str(key)].flat, data, position, ledger)
    return tree


def _fill(flat: Tensor, data: memoryview, position: int, ledger: Ledger) -> int:
    """Read a storage's count and elements into ``flat``; the position after them."""
    start, end = position + 8, position + 8 + flat.numel() * flat.element_size()
    if int.from_bytes(data[position:start], "little") != flat.numel() or end > len(data):
        raise ledger.damaged("a tensor is cut off or contradicts its announced length")
    if flat.numel():
        flat.view(torch.uint8).copy_(torch.from_numpy(np.frombuffer(data[start:end], np.uint8).copy()))
    return end
