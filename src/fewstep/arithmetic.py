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
        with Edges(sample_shape[0], HALF[kind]):
            yield


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
    1 % of a network's operations, and half of fp16's error at q^a = 256 (docs/performance.md). Between them autocast
    would, on a GPU, run normalisations and doublings of the resolution in float32 and keep their inputs and outputs for
    the backward pass; here they read and write 16 bits, and torch's kernels compute in float32 inside.
    """

    def __init__(self, channels: int, dtype: torch.dtype) -> None:
        super().__init__()
        self._channels, self._dtype = channels, dtype

    @staticmethod
    def active() -> Edges | None:
        """The one that is open here, if any."""
        stack = torch.overrides._get_current_function_mode_stack()  # type: ignore[no-untyped-call]
        return next((mode for mode in reversed(stack) if isinstance(mode, Edges)), None)

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        normed = func in _NORMS and args[0].ndim > 2
        if normed or (func is F.interpolate and args[0].dtype == self._dtype):
            return _rounded(func, args, kwargs, self._dtype)
        if func is F.linear and args[0].ndim == 2:
            return _exactly(func, args, kwargs)
        if func is F.conv2d:
            inputs, weight = args[0].shape[1], args[1]
            whole = inputs == weight.shape[1]  # not depthwise
            if whole and inputs in (self._channels, self._channels + 1):  # EDM2 adds a channel of ones
                return _exactly(func, args, kwargs).to(self._dtype)
            if whole and weight.shape[0] == self._channels:
                return _exactly(func, args, kwargs)
        return func(*args, **kwargs)


_NORMS = (F.group_norm, F.layer_norm)


def _rounded(func: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any], dtype: torch.dtype) -> Tensor:
    """``func`` on tensors of 16 bits; float64 stays."""

    def narrow(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.dtype == torch.float32 else value

    with torch.autocast(args[0].device.type, enabled=False):
        return func(*(narrow(a) for a in args), **{name: narrow(a) for name, a in kwargs.items()})


def _exactly(func: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    with torch.autocast(args[0].device.type, enabled=False):
        return func(*(_widened(a) for a in args), **{name: _widened(a) for name, a in kwargs.items()})


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in HALF.values() else value
