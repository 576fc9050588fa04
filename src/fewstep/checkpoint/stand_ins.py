"""The allow-list: every name a checkpoint of EDM, ECT or EDM2 refers to, and the inert thing it stands for.

Nothing here imports, looks up or calls anything a file names. ``builtins.getattr`` is a record of its
arguments; a class is its name; a tensor is rebuilt by us, held against the bytes of its storage.

Source: the opcode streams of NVlabs/edm, NVlabs/edm2 and locuslab/ect snapshots; torch's legacy
``torch.save`` layout (magic, protocol, system, object, keys, then per storage its length and bytes).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fewstep.checkpoint.inert import Ledger, Names, Opaque, Persistent, StandIn
from fewstep.checkpoint.machine import Machine, checked_key

STORAGES: dict[tuple[str, str], StandIn] = {
    (module, name): StandIn(f"{module}.{name}", value=dtype)
    for module, name, dtype in (
        ("torch", "DoubleStorage", torch.float64),
        ("torch", "FloatStorage", torch.float32),
        ("torch", "HalfStorage", torch.float16),
        ("torch", "BFloat16Storage", torch.bfloat16),
        ("torch", "LongStorage", torch.int64),
        ("torch", "IntStorage", torch.int32),
        ("torch", "ShortStorage", torch.int16),
        ("torch", "CharStorage", torch.int8),
        ("torch", "ByteStorage", torch.uint8),
        ("torch", "BoolStorage", torch.bool),
        ("torch", "UntypedStorage", torch.uint8),
        ("torch.storage", "UntypedStorage", torch.uint8),
    )
}
CONTAINERS = ("ModuleDict", "ModuleList", "Sequential", "ParameterDict", "ParameterList")
DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001
PLAIN_NUMBER = re.compile(r"[<>=|]?(f[248]|[iu][1248]|b1)")


@dataclass(frozen=True, eq=False)
class Storage:
    """The numbers behind one or more tensors, ``flat`` ``[n]``."""

    flat: Tensor


@dataclass(frozen=True, eq=False)
class _Declared:
    """A storage a file announces: its key, type and number of elements."""

    key: str
    dtype: torch.dtype
    count: int


def declared(pid: object, ledger: Ledger) -> _Declared:
    """The storage a persistent id announces; raises CheckpointError when it is anything else."""
    match pid:
        case ("storage", StandIn(value=torch.dtype() as dtype), str(key), str(), int(count), *rest) if (
            count >= 0 and rest in ([], [None])
        ):
            return _Declared(key, dtype, count)
    raise ledger.damaged("it announces a tensor's storage in an unknown form")


def storage_from(data: memoryview | bytes, wanted: _Declared, ledger: Ledger) -> Storage:
    """A storage holding a copy of ``data``; raises CheckpointError unless it is as long as announced."""
    if len(data) != wanted.count * wanted.dtype.itemsize:
        raise ledger.damaged(
            f"a tensor announces {wanted.count} numbers of {wanted.dtype} but {len(data)} bytes are stored"
        )
    ledger.spend_storage(len(data))
    flat = torch.from_numpy(np.frombuffer(data, np.uint8).copy())
    return Storage(flat != 0 if wanted.dtype is torch.bool else flat.view(wanted.dtype))


class StandIns:
    """The functions behind the allowed names, for one file."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def names(self) -> Names:
        """(module, name) -> stand-in; a name that is not here is refused."""
        functions: dict[tuple[str, str], Callable[..., object]] = {
            ("torch_utils.persistence", "_reconstruct_persistent_obj"): self.persistent_object,
            ("torch._utils", "_rebuild_parameter"): self.parameter,
            ("torch._utils", "_rebuild_tensor_v2"): self.tensor,
            ("torch.storage", "_load_from_bytes"): self.storage,
            ("torch", "Size"): self.size,
            ("collections", "OrderedDict"): self.ordered_dict,
            ("dnnlib.util", "EasyDict"): self.ordered_dict,
            ("builtins", "set"): self.set,
            ("__builtin__", "set"): self.set,
            ("numpy", "dtype"): self.dtype,
            ("numpy.core.multiarray", "scalar"): self.scalar,
            ("numpy._core.multiarray", "scalar"): self.scalar,
            ("_codecs", "encode"): self.encode,
        }
        opaque = [("builtins", "getattr"), ("__builtin__", "getattr"), ("torch", "device"), ("numpy", "ndarray")]
        opaque += [(f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")]  # of EDM2's VAE encoder
        opaque += [("torch.nn.modules.container", name) for name in CONTAINERS]
        return {
            **STORAGES,
            **{("torch", name): getattr(torch, name) for name in DTYPES},
            **{key: StandIn(".".join(key), build) for key, build in functions.items()},
            **{key: _opaque(".".join(key)) for key in opaque},
        }

    # EDM's own objects.

    def persistent_object(self, meta: object) -> Persistent:
        """A ``torch_utils.persistence`` object, as data."""
        match meta:
            case {"type": "class", "class_name": str(name), "module_src": str(source), "state": dict(state)}:
                return Persistent(name, source, state)
        raise self._ledger.damaged("an object of torch_utils.persistence is described in an unknown form")

    # torch.

    def storage(self, data: object) -> Storage:
        """The storage in the nested file of ``torch.storage._load_from_bytes``, read without torch.load."""
        if not isinstance(data, memoryview):
            raise TypeError("a nested file must be bytes")
        return read_legacy_storage(data, self._ledger)

    def tensor(
        self, storage: object, offset: object, size: object, stride: object,
        requires_grad: object, hooks: object, metadata: object = None,
    ) -> Tensor:  # fmt: skip
        """A view of ``storage``; raises CheckpointError when any element lies outside of it."""
        if not isinstance(storage, Storage):
            raise TypeError("a tensor needs a storage")
        shape, steps = self.size(size), self.size(stride)
        (start,) = self.size((offset,))
        flat, count = storage.flat, math.prod(shape)
        reach = start + sum((n - 1) * step for n, step in zip(shape, steps, strict=True))
        if len(shape) > 16 or count > flat.numel() or (count and reach >= flat.numel()):
            raise self._ledger.damaged("a tensor reaches beyond its storage")
        return flat.as_strided(shape, steps, start) if count else flat.new_empty(shape)

    def parameter(self, data: object, requires_grad: object, hooks: object) -> Tensor:
        """The tensor of a parameter."""
        if not isinstance(data, Tensor):
            raise TypeError("a parameter needs a tensor")
        return data

    def size(self, values: object) -> tuple[int, ...]:
        """A tuple of whole numbers from 0 to 2^62."""
        whole = isinstance(values, tuple) and all(type(n) is int and 0 <= n <= 1 << 62 for n in values)
        if not whole:
            raise self._ledger.damaged("a tensor's size, stride or offset is not a whole number from 0")
        return values  # type: ignore[return-value]

    # Containers.

    def ordered_dict(self, pairs: object = ()) -> dict[object, object]:
        """A plain dict, empty or from pairs."""
        if not isinstance(pairs, list | tuple):
            raise TypeError("a dict is made from pairs")
        self._ledger.spend_operations(len(pairs))
        return {checked_key(key): value for key, value in pairs}

    def set(self, items: object = ()) -> object:
        """A set of texts and numbers."""
        if not isinstance(items, list | tuple):
            raise TypeError("a set is made from a list")
        self._ledger.spend_operations(len(items))
        return {checked_key(item) for item in items}

    # numpy.

    def dtype(self, code: object, align: object = False, copy: object = True) -> Opaque:
        """The record of a plain numeric dtype; any other (object, void, text) is refused."""
        if not isinstance(code, str) or not PLAIN_NUMBER.fullmatch(code):
            raise self._ledger.unsafe(f"numpy.dtype({code!r:.40})" if isinstance(code, str) else "numpy.dtype")
        return Opaque("numpy.dtype", (code,))

    def scalar(self, dtype: object, data: object) -> object:
        """A numpy scalar as a Python number; its bytes are read as that plain number and nothing else."""
        match dtype:
            case Opaque("numpy.dtype", (str(code),), None):
                big = code.startswith(">")
            case Opaque("numpy.dtype", (str(code),), (int(), "<" | ">" | "|" as order, None, None, None, *_)):
                big = order == ">"
            case _:
                raise self._ledger.unsafe("a numpy scalar that is not a plain number")
        kind = np.dtype((">" if big else "<") + code.lstrip("<>=|"))
        if not isinstance(data, memoryview) or len(data) != kind.itemsize:
            raise self._ledger.damaged("a numpy scalar does not have the bytes its type asks for")
        return np.frombuffer(data, kind)[0].item()

    def encode(self, text: object, codec: object = "utf-8") -> memoryview:
        """Short bytes that an old protocol wrote as Latin-1 text (numpy scalars)."""
        if not isinstance(text, str) or codec not in ("latin1", "latin-1") or len(text) > 1024:
            raise self._ledger.unsafe("_codecs.encode of something that is not a few Latin-1 bytes")
        self._ledger.spend_operations(len(text))
        return memoryview(text.encode("latin-1"))


def _opaque(name: str) -> StandIn:
    return StandIn(name, lambda *args: Opaque(name, args))


def read_legacy_storage(data: memoryview, ledger: Ledger) -> Storage:
    """The one storage of a file in torch's legacy layout (what ``torch.storage`` pickles write).

    The four pickles in it may name storage types only. Raises CheckpointError, UnsafePickleError.
    """
    if bytes(data[:2]) == b"PK":
        raise ledger.damaged("a tensor nested in it is a zip file, which EDM and ECT never write there")
    position = 0
    values: list[object] = []
    for _ in range(5):
        machine = Machine(data, STORAGES, ledger, persistent=lambda pid: declared(pid, ledger), position=position)
        values.append(machine.run())
        position = machine.position
    match values:
        case [magic, protocol, {"little_endian": True}, _Declared() as wanted, [key]] if (
            magic == LEGACY_MAGIC and protocol == LEGACY_PROTOCOL and key == wanted.key
        ):
            pass
        case _:
            raise ledger.damaged("a tensor nested in it is not in the layout torch writes")
    if int.from_bytes(data[position : position + 8], "little") != wanted.count:
        raise ledger.damaged("a tensor nested in it is cut off or contradicts its announced length")
    return storage_from(data[position + 8 :], wanted, ledger)
