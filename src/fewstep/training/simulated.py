"""A device simulated in CPU memory: where a step waits for a GPU, and what it holds there, found without one."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from fewstep import arithmetic, philox
from fewstep.training.cost import Storages, place

HOST = torch.device("cpu")
DEVICE = torch.device("cpu", 0)
"""The simulated device: ``cpu:0`` as a run's device, while ``cpu`` stays the host."""


_TO_FLOAT = frozenset(
    {torch.nn.functional.group_norm, torch.nn.functional.layer_norm, torch.nn.functional.rms_norm}
    | {torch.nn.functional.interpolate, torch.nn.functional.softmax, torch.softmax, torch.Tensor.softmax}
    | {torch.exp, torch.log, torch.rsqrt, torch.reciprocal, torch.pow, torch.sum, torch.Tensor.sum}
    | {torch.Tensor.exp, torch.Tensor.log, torch.Tensor.rsqrt, torch.Tensor.reciprocal}
    | {torch.Tensor.pow, torch.Tensor.__pow__}
)
"""What autocast runs in float32 on CUDA and in 16 bits on a CPU (ATen/autocast_mode.h, torch 2.13)."""


class _CudaAutocast(TorchFunctionMode):
    """Autocast on a CPU casts where it would on CUDA, so that it holds what it would there."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _TO_FLOAT and torch.is_autocast_enabled("cpu"):
            args = tuple(value.float() if _half(value) else value for value in args)
        return func(*args, **(kwargs or {}))


def _half(value: object) -> bool:
    return isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Wait:
    """One wait: ``what`` the host waits for, and ``where`` (``file.py:line``)."""

    what: str
    where: str


class SimulatedDevice:
    """``with SimulatedDevice() as device:``: tensors on ``cpu:0`` count as the device's, and ``device.waits`` grows.

    Waits are what ``torch.cuda.set_sync_debug_mode("error")`` refuses: a number read from a tensor of the device
    (``item``, ``if tensor:``, ``tolist``, ``float``), a size that depends on its values (``nonzero``, a boolean index),
    a blocking copy to or from it; further, host tensors among the arguments of an operation on the device. Reading
    host tensors is free: times are drawn on the host.

    What goes to ``cpu:0`` (``.to``, ``device=``) is the device's, and so is everything made of it; the numbers are
    real. Whatever is to be on the device must get there inside of the ``with`` block, or be given.

    Args:
        tensors: on the device already.
        hollow: the device's tensors are fake, with sizes but no values: nothing is computed there, so that a step of
            any network at any batch passes in seconds; a number read from the device is then an error.
        cuda: autocast keeps in float32 what it does on CUDA (normalisation, for one).
    """

    def __init__(self, tensors: Iterable[Tensor] = (), hollow: bool = False, cuda: bool = True) -> None:
        self._cuda = cuda
        self.fake = FakeTensorMode(allow_non_fake_inputs=True) if hollow else None
        self.waits: list[Wait] = []
        self.kernels = 0
        """Operations on the device that are no views."""
        self._marked: Storages[None] = Storages()
        self._stack = ExitStack()
        for tensor in tensors:
            self.mark(tensor)

    def __enter__(self) -> SimulatedDevice:
        functions, run_backward = _Functions(self), torch.autograd._engine_run_backward  # type: ignore[attr-defined]

        casts = _CudaAutocast() if self._cuda else nullcontext()

        def backward(*args: Any, **kwargs: Any) -> Any:
            with casts, functions:  # which torch.autograd.backward has left, and recomputed blocks need
                return run_backward(*args, **kwargs)

        self._stack.enter_context(casts)
        self._stack.enter_context(functions)
        self._stack.enter_context(_Operations(self))
        self._stack.enter_context(_replaced(torch.autograd, "_engine_run_backward", backward))
        self._stack.enter_context(_replaced(philox, "CHUNK", 2**62))  # in one piece, as on a GPU
        self._stack.enter_context(_replaced(arithmetic, "norms_in_float32", lambda device: self._cuda))
        if self.fake is not None:  # torch would swap a network's fake tensors for equal ones, and cannot
            self._stack.enter_context(_replaced(torch.utils, "swap_tensors", lambda old, new: None))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def mark(self, tensor: Tensor, on: bool = True) -> None:
        """Put the tensor's memory on the device, or on the host."""
        if on:
            self._marked.add(tensor, None)
        else:
            self._marked.discard(tensor)

    def put(self, tensor: Tensor) -> Tensor:
        """A new tensor of the host, as one of the device."""
        if self.fake is not None and not isinstance(tensor, FakeTensor):
            tensor = self.fake.from_tensor(tensor, static_shapes=True)
            tensor.fake_device = DEVICE
        self.mark(tensor)
        return tensor

    def has(self, value: object) -> bool:
        """Whether it is a tensor on the device."""
        return isinstance(value, Tensor) and value in self._marked

    def waited(self, what: str) -> None:
        """Note a wait."""
        self.waits.append(Wait(what, place()))


@contextmanager
def _replaced(owner: Any, name: str, value: object) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


class _Functions(TorchFunctionMode):
    """What has no operation of its own: moves (none, on one real device), factories, and ``tensor.device``."""

    def __init__(self, device: SimulatedDevice) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, device = kwargs or {}, self._device
        if func in _MOVES:
            return self._move(func, args, kwargs)
        if func in _READS and device.has(args[0]):
            device.waited(func.__name__)
        if isinstance(args[0] if args else None, FakeTensor):
            if func is torch.Tensor.data_ptr:
                return args[0].untyped_storage()._cdata  # as good an address as any: it has none
            if func is torch.Tensor.__deepcopy__:
                return _copied(*args)
        out = func(*args, **kwargs)
        if func == torch.Tensor.device.__get__:  # type: ignore[attr-defined]
            return DEVICE if device.has(args[0]) and _caller() != "torch.utils.checkpoint" else out
        if func is torch.Tensor.__deepcopy__ and device.has(args[0]):
            device.mark(out)
        elif isinstance(out, Tensor) and _is_device(kwargs.get("device")):
            if func in _COPIES and not device.has(args[0]):
                device.waited(f"{func.__name__}: a blocking copy to the device")
            return device.put(out)
        return out

    def _move(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        tensor, device = args[0], self._device
        there, non_blocking = _target(func, args[1:], kwargs, device)
        here = device.has(tensor)
        out: Tensor = func(*args, **kwargs)
        if there is None or there == here or (here and not there and _caller().startswith("torch.")):
            return out  # torch's own code moves tensors to where others are, which to it is just "cpu"
        if not non_blocking:
            device.waited(f"a blocking copy {'to' if there else 'from'} the device")
        if out.untyped_storage() is tensor.untyped_storage():
            out = out.clone()
        if there:
            return device.put(out)
        device.mark(out, False)
        return out


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """What is made of the device's tensors is the device's."""

    def __init__(self, device: SimulatedDevice) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device = device

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, device = kwargs or {}, self._device
        tensors = [value for value in tree_iter((args, kwargs)) if isinstance(value, Tensor)]
        on_device = [value for value in tensors if device.has(value)]
        out = func(*args, **kwargs)
        if not on_device:
            return out
        name = func._overloadpacket.__name__
        device.kernels += not func.is_view
        if name == "copy_" and len(on_device) < 2:
            if not (args[2:] and args[2]):
                device.waited("a blocking copy between host and device")
            return out
        if _depends_on_values(func, args):
            device.waited(name)
        if len(on_device) < len(tensors) and any(value.ndim > 0 and not device.has(value) for value in tensors):
            device.waited(f"{name}: a host tensor in an operation on the device")
        for value in tree_iter(out):
            if isinstance(value, Tensor):
                device.mark(value)
        return out


def _depends_on_values(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether the host must know values on the device: a number, or the size of the result."""
    name = func._overloadpacket.__name__
    if name in ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"):
        chosen = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        return chosen and not (name.startswith("index_put") and args[2].numel() == 1)  # that fills by the mask
    return torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags


def _target(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], device: SimulatedDevice
) -> tuple[bool | None, bool]:
    """Whether a move ends on the device (None: it stays where it is), and whether it does not wait."""
    if func is torch.Tensor.cpu:
        return False, False
    other = args[0] if args else kwargs.get("other")
    if isinstance(other, Tensor):
        return device.has(other), bool(kwargs.get("non_blocking", False))
    kwargs = {name: value for name, value in kwargs.items() if name not in ("memory_format", "copy")}
    there, _, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)  # type: ignore[attr-defined]
    return (None if there is None else _is_device(there)), bool(non_blocking)


def _caller() -> str:
    """The module that called a function which came here."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__") == __name__:
        frame = frame.f_back
    return str(frame.f_globals.get("__name__"))


def _copied(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
    """A deep copy of a fake tensor, which torch would ask for its address."""
    if id(tensor) not in memo:
        out = tensor.detach().clone().requires_grad_(tensor.requires_grad)
        out.__dict__.update({name: value for name, value in tensor.__dict__.items() if name == "_is_param"})
        memo[id(tensor)] = out
    found: Tensor = memo[id(tensor)]
    return found


def _is_device(value: object) -> bool:
    return value is not None and torch.device(value).index == 0  # type: ignore[call-overload, no-any-return]


_MOVES = frozenset({torch.Tensor.to, torch.Tensor.cpu})
_READS = frozenset({torch.Tensor.numpy, torch.Tensor.tolist, torch.Tensor.__array__})
_COPIES = frozenset({torch.tensor, torch.as_tensor, torch.asarray})
