"""What a piece of training costs, counted and not timed: operations, FLOPs and bytes, by phase and by place.

Everything works on any device and on fake tensors (``torch._subclasses.fake_tensor``), which have sizes but no values:
a network of any size at any batch is counted without computing it. What a kernel takes inside (workspace) is unseen.
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from types import CodeType, FrameType
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

Value = TypeVar("Value")

PHASES: Mapping[str, str] = {
    "torch.autograd.graph:_engine_run_backward": "backward",
    "fewstep.philox:*": "random",
    "fewstep.randomness:Streams.*": "random",
    "fewstep.randomness:DropoutTape._mask": "random",
    "fewstep.denoiser:Denoiser.forward": "student",
    "fewstep.training.feed:Feed.*": "data",
    "fewstep.ema:*": "ema",
    "fewstep.training.*:*_average*": "ema",
    "fewstep.training.*:_follow*": "ema",
    "fewstep.training.*:*sanitise*": "sanitise",
    "torch.nn.utils.clip_grad:*": "norm",
    "torch.optim.*:*": "optimiser",
    "fewstep.training.optim:*": "optimiser",
}
"""``module:function`` -> phase; the innermost function on the stack that is named decides, "other" without any.

Under "student" what runs without gradient is "target": the target's pass, and a teacher's.
"""


class Phases:
    """Calling it tells the phase that runs now, by the Python functions on the stack."""

    def __init__(self, names: Mapping[str, str] = PHASES) -> None:
        self._names = dict(names)
        self._known: dict[CodeType, str | None] = {}

    def __call__(self) -> str:
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            found = self._of(frame)
            if found is not None:
                return "target" if found == "student" and not torch.is_grad_enabled() else found
            frame = frame.f_back
        return "other"

    def _of(self, frame: FrameType) -> str | None:
        code = frame.f_code
        if code not in self._known:
            name = f"{frame.f_globals.get('__name__')}:{code.co_qualname}"
            self._known[code] = next((what for mask, what in self._names.items() if fnmatchcase(name, mask)), None)
        return self._known[code]


def place() -> str:
    """Where in the package, or in who calls it, this runs: ``file.py:line``, the innermost such line.

    In the backward pass the node of the graph.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        module, name = str(frame.f_globals.get("__name__")), frame.f_code.co_name
        if name == "_engine_run_backward":
            node = torch._C._current_autograd_node()  # type: ignore[attr-defined]
            return "backward" if node is None else f"backward of {node.name().removesuffix('Backward0')}"
        if module.partition(".")[0] not in ("torch", "contextlib") and module not in _WATCHERS and name not in _PASSED:
            return f"{frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"


_WATCHERS = (__name__, "fewstep.training.simulated")
_PASSED = ("__torch_dispatch__", "__torch_function__")
"""Functions that are on the stack because somebody watches, or hands on."""


class Storages(Generic[Value]):
    """Pieces of memory and what is known of them, until they are freed; ``freed`` is told then.

    A tensor stands for the memory that it shares with its views.
    """

    def __init__(self, freed: Callable[[Value], None] = lambda value: None) -> None:
        self._known: dict[int, tuple[weakref.ref[Any], Value]] = {}
        self._freed = freed

    def __contains__(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._known

    def add(self, tensor: Tensor, value: Value) -> None:
        """Remember the tensor's memory."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        self._known[key] = weakref.ref(storage, lambda _: self._forget(key)), value

    def discard(self, tensor: Tensor) -> None:
        """Forget it without telling."""
        self._known.pop(tensor.untyped_storage()._cdata, None)

    def _forget(self, key: int) -> None:
        found = self._known.pop(key, None)
        if found is not None:
            self._freed(found[1])


@dataclass
class Work:
    """Operations that were dispatched, by phase.

    Args:
        operations: all of them; kernels: those that are no views, what a GPU launches.
        flops: of matrix products and convolutions, two per multiply-add.
        names: operations by phase and name.
    """

    operations: Counter[str] = field(default_factory=Counter)
    kernels: Counter[str] = field(default_factory=Counter)
    flops: Counter[str] = field(default_factory=Counter)
    names: Counter[tuple[str, str]] = field(default_factory=Counter)

    def most(self, of: str, count: int = 10) -> list[tuple[str, int]]:
        """The most frequent operations of a phase."""
        return Counter({name: n for (where, name), n in self.names.items() if where == of}).most_common(count)


class Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """``with Counting() as counting:``: what this thread dispatches, forward and backward, as ``counting.work``.

    A compiled graph counts for what it calls.

    Args:
        phases: as :data:`PHASES`.
    """

    def __init__(self, phases: Mapping[str, str] = PHASES) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.work, self._phase = Work(), Phases(phases)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.namespace != "aten":  # marks of the profiler
            return out
        now, work = self._phase(), self.work
        work.operations[now] += 1
        work.kernels[now] += not func.is_view
        work.names[now, func._overloadpacket.__name__] += 1
        work.flops[now] += _flops(func._overloadpacket, args, kwargs, out)
        return out


_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
"""The kernels that torch's own table of FLOPs leaves out."""


def _flops(packet: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    """FLOPs of one operation: torch's count, and attention on a CPU by the formula of that on a GPU."""
    if packet is _ATTENTION:
        return int(sdpa_flop_count(*(value.shape for value in args[:3])))  # type: ignore[no-untyped-call]
    if packet is _ATTENTION_BACKWARD:
        return int(sdpa_backward_flop_count(*(value.shape for value in args[:4])))  # type: ignore[no-untyped-call]
    count = flop_registry.get(packet)
    return 0 if count is None else int(count(*args, **kwargs, out_val=out))


def operations(run: Callable[[], object], phases: Mapping[str, str] = PHASES) -> Work:
    """What ``run`` dispatches."""
    with Counting(phases) as counting:
        run()
    return counting.work


def flops(run: Callable[[], object]) -> int:
    """Operations of the matrix products and convolutions of ``run``, backward included: two per multiply-add."""
    return sum(operations(run).flops.values())


class Memory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """``with Memory(held) as memory:``: bytes of the tensors that live, each piece of memory once.

    Counted are those of ``held`` and all that are made or used while it watches, until the last reference is gone.

    Args:
        held: tensors that are there already: weights, the optimiser's state, averages.
        only: which tensors count; default: all.

    Attributes:
        live: bytes now; ``peak``: most bytes so far; ``curve``: phase and bytes after each operation.
        peaks: most bytes by phase; at_peak: bytes by (operation, place) when they were most.
    """

    def __init__(self, held: Iterable[Tensor] = (), only: Callable[[Tensor], bool] = lambda tensor: True) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._only, self._phase = only, Phases()
        self.curve: list[tuple[str, int]] = []
        self.peaks: dict[str, int] = {}
        self.at_peak: Counter[tuple[str, str]] = Counter()
        self._places: Counter[tuple[str, str]] = Counter()
        self._seen: Storages[tuple[int, tuple[str, str]]] = Storages(self._drop)
        self._see(list(held), "held")
        self.restart()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self._see((args, kwargs), "held")
        out = func(*args, **(kwargs or {}))
        self._see(out, func._overloadpacket.__name__)
        now = self._phase()
        self.curve.append((now, self.live))
        self.peaks[now] = max(self.peaks.get(now, 0), self.live)
        if self.live > self.peak:
            self.peak, self.at_peak = self.live, self._places.copy()
        return out

    def restart(self) -> None:
        """Forget peaks and curve, not what lives."""
        self.peak, self.at_peak = self.live, self._places.copy()
        self.curve, self.peaks = [], {}

    def _see(self, values: Any, operation: str) -> None:
        for value in tree_iter(values):
            if isinstance(value, Tensor) and value not in self._seen and self._only(value):
                self._add(value, operation)

    def _add(self, tensor: Tensor, operation: str) -> None:
        size, at = tensor.untyped_storage().nbytes(), (operation, "" if operation == "held" else place())
        self._seen.add(tensor, (size, at))
        self.live += size
        self._places[at] += size

    def _drop(self, piece: tuple[int, tuple[str, str]]) -> None:
        self.live -= piece[0]
        self._places[piece[1]] -= piece[0]


def peak_bytes(run: Callable[[], object], held: Iterable[Tensor] = ()) -> int:
    """Most bytes of tensors at once during ``run``, with ``held`` (weights, optimiser state, averages)."""
    with Memory(held) as memory:
        run()
    return memory.peak


def saved_bytes(run: Callable[[], object], held: Iterable[Tensor] = ()) -> int:
    """Bytes that the result of ``run`` keeps alive: of a loss, what autograd saves for its backward pass.

    Args:
        run: returns the loss.
        held: tensors that are there before and are not counted: weights, the batch.
    """
    with Memory(held) as memory:
        before = memory.live
        result = run()
        kept = memory.live - before
    del result
    return kept


Curve = list[tuple[str, int]]
"""Phase and bytes after each operation: :attr:`Memory.curve`."""


def bytes_at(size: int, small: tuple[int, Curve], large: tuple[int, Curve]) -> Curve:
    """The curve of a step at ``size`` images per pass, from those at two smaller sizes.

    Every operation's bytes are linear in the images, so the curve is known at any size, and its peak may lie elsewhere
    than theirs. On a CPU random numbers are made in more or fewer pieces, small ones: these are left out.

    Args:
        size: images per pass.
        small, large: images per pass, and the curve of a step.
    """
    (few, low), (many, high) = small, large
    if len(low) != len(high):
        low, high = ([point for point in curve if point[0] != "random"] for curve in (low, high))
    share = (size - few) / (many - few)
    return [(now, round(a + (b - a) * share)) for (now, a), (_, b) in zip(low, high, strict=False)]
