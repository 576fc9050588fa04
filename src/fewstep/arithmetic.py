"""The arithmetics that a network can run in, over float32 weights: fp32, TF32, and 16 bits under autocast."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

Precision: TypeAlias = Literal["auto", "fp32", "tf32", "fp16", "bf16"]
Arithmetic: TypeAlias = Literal["fp32", "tf32", "fp16", "bf16"]

HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}
"""The arithmetics of 16 bits."""


@contextmanager
def rounding(kind: Arithmetic, device: torch.device, sample_shape: tuple[int, ...]) -> Iterator[None]:
    """Forward passes in 16 bits, where ``kind`` is that.

    A student must run before a target pass without gradient: autocast keeps the weights it has rounded, and those
    rounded without gradient would take the student's away.

    Args:
        sample_shape: of the networks' samples; the edges of networks for images stay exact (:class:`Edges`).
    """
    if kind not in HALF:
        yield
        return
    with torch.autocast(device.type, dtype=HALF[kind]):
        if len(sample_shape) != 3:
            yield
            return
        with Edges(sample_shape[0], HALF[kind], norms=norms_in_float32(device)):
            yield


def norms_in_float32(device: torch.device) -> bool:
    """Whether normalisations are to compute in float32: where autocast has them so, which a CPU's does not."""
    return device.type != "cpu"


@contextmanager
def tf32(kind: Arithmetic, device: torch.device) -> Iterator[None]:
    """TF32 in forward and backward passes, exactly where ``kind`` is that; no effect off the GPU."""
    if device.type != "cuda":
        yield
        return
    old = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = kind == "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = old


class Edges(TorchFunctionMode):
    """Inside autocast, keeps the edges of a network in float32, and what lies between them in 16 bits.

    Most of the rounding error comes from the edges: the convolutions that read or write samples of ``channels``
    channels, and the linear layers that see one row per sample (embeddings, and what they modulate). They are less than
    1 % of a network's operations, and half of fp16's error at q^a = 256 (docs/performance.md). Not exact: a
    transformer's last layer, and EDM2's last convolution, whose weights come rounded.

    Between them doubling the resolution stays in 16 bits. With ``norms``, normalisations and the activation behind them
    compute in float32 and keep their input in 16 bits for the backward pass, which computes them again (not compiled:
    the compiler decides what is kept). Autocast on a GPU would keep float32, half as much again as all else.
    """

    def __init__(self, channels: int, dtype: torch.dtype, norms: bool = True) -> None:
        super().__init__()
        self._channels, self._dtype, self._norms = channels, dtype, norms

    @staticmethod
    def active() -> Edges | None:
        """The one that is open here, if any."""
        stack = torch.overrides._get_current_function_mode_stack()  # type: ignore[no-untyped-call]
        return next((mode for mode in reversed(stack) if isinstance(mode, Edges)), None)

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if not args or not isinstance(args[0], Tensor) or not torch.is_autocast_enabled(args[0].device.type):
            return func(*args, **kwargs)  # also where somebody switched autocast off, for float32's sake
        if args[0].ndim > 2:
            if self._norms and (func in _NORMS or (func is F.silu and args[0].dtype == torch.float32)):
                return _in_float32(func, args, kwargs, self._dtype)
            if func is F.interpolate and args[0].dtype == self._dtype:
                with torch.autocast(args[0].device.type, enabled=False):
                    return func(*args, **kwargs)
        if func is F.linear and args[0].ndim == 2:
            return _exactly(func, args, kwargs)
        if func is F.conv2d:
            inputs, weight = args[0].shape[1], args[1]
            whole = inputs == weight.shape[1]  # not depthwise
            if whole and inputs in (self._channels, self._channels + 1):  # EDM2 adds a channel of ones
                out = _exactly(func, args, kwargs)
                return out.to(self._dtype) if out.dtype == torch.float32 else out
            if whole and weight.shape[0] == self._channels:
                return _exactly(func, args, kwargs)
        return func(*args, **kwargs)


_NORMS = (F.group_norm, F.layer_norm)


class _Kept(torch.autograd.Function):
    """``function(x, *weights)`` in float32, of whose input 16 bits are kept, and whose result is not, for backward."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], dtype: torch.dtype, x: Tensor, *weights: Tensor) -> Tensor:
        ctx.function, ctx.came = function, x.dtype
        ctx.save_for_backward(x.to(dtype), *weights)
        return function(x.float(), *weights)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        with torch.enable_grad():
            given = [v.detach().requires_grad_() for v in (x.float(), *weights)]
            out = ctx.function(*given)
        of_x, *others = torch.autograd.grad(out, given, gradients[0])
        return None, None, of_x.to(ctx.came), *others


def _in_float32(
    func: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any], half: torch.dtype
) -> Tensor:
    """``func(x, ...)`` of a normalisation or activation with a float32 result; float64 stays."""
    with torch.autocast(args[0].device.type, enabled=False):
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or args[0].dtype == torch.float64:
            return func(*(_widened(a) for a in args), **{name: _widened(a) for name, a in kwargs.items()})
        x, *rest = args
        named = dict(enumerate(rest)) | kwargs  # torch hands over weights by name
        weights = {name: value for name, value in named.items() if isinstance(value, Tensor)}

        def function(x: Tensor, *given: Tensor) -> Tensor:
            filled = named | dict(zip(weights, given, strict=True))
            return func(x, *(filled[i] for i in range(len(rest))), **{name: filled[name] for name in kwargs})

        kept: Tensor = _Kept.apply(function, half, x, *weights.values())  # type: ignore[no-untyped-call]
        return kept


def _exactly(func: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    with torch.autocast(args[0].device.type, enabled=False):
        return func(*(_widened(a) for a in args), **{name: _widened(a) for name, a in kwargs.items()})


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in HALF.values() else value
