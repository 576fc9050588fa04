"""TF32, fp16 and bf16 as an NVIDIA GPU computes them, emulated on a CPU.

    with emulate("fp16"):
        with torch.autocast("cpu", torch.float16):
            loss = network(x).square().mean()
        (1024 * loss).backward()  # inside, too

Convolutions, matrix products and attention, forward and backward, get operands rounded to the format (to nearest, ties
to even), multiply and add in fp32, and round what they return: to the format in fp16 and bf16, not at all in TF32. In
fp16 and bf16 tensors really have the 16-bit dtype, and the CPU's autocast casts where CUDA's would, so that every
operation between (SiLU, add, cat, multiply) rounds its result, fp16 overflows to inf and underflows to 0, and those on
autocast's fp32 list (norms, softmax, exp, pow, sum) run in fp32. Weights stay fp32 and are cast at every use.

Not emulated: the order of a tensor core's sums, the dropping of bits in its accumulator, and Winograd transforms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

Kind = Literal["tf32", "fp16", "bf16"]
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
TF32_BITS = 10

_aten = torch.ops.aten
PRODUCTS: dict[Any, tuple[int, ...]] = {
    _aten.convolution.default: (0, 1),
    _aten.convolution_backward.default: (0, 1, 2),
    _aten.mm.default: (0, 1),
    _aten.bmm.default: (0, 1),
    _aten.addmm.default: (1, 2),
    _aten.baddbmm.default: (1, 2),
}
"""What runs on tensor cores -> which of its arguments are factors."""

LOWER = {
    F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d, F.linear,
    torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.baddbmm, torch.einsum, torch.Tensor.matmul,
    torch.Tensor.__matmul__, torch.Tensor.mm, torch.Tensor.bmm, F.scaled_dot_product_attention,
}  # fmt: skip
"""Functions that autocast runs in 16 bit."""

RAISED = {
    F.group_norm, F.layer_norm, F.rms_norm, F.interpolate, F.softmax, F.log_softmax, F.softplus, F.mse_loss, F.l1_loss,
    F.smooth_l1_loss, F.huber_loss, F.cosine_similarity, F.normalize, F.cross_entropy, torch.softmax, torch.log_softmax,
    torch.exp, torch.expm1, torch.log, torch.log1p, torch.log2, torch.log10, torch.pow, torch.square, torch.rsqrt,
    torch.reciprocal, torch.sum, torch.prod, torch.cumsum, torch.norm, torch.linalg.vector_norm, torch.Tensor.softmax,
    torch.Tensor.log_softmax, torch.Tensor.exp, torch.Tensor.log, torch.Tensor.pow, torch.Tensor.__pow__,
    torch.Tensor.square, torch.Tensor.rsqrt, torch.Tensor.reciprocal, torch.Tensor.sum, torch.Tensor.prod,
    torch.Tensor.cumsum, torch.Tensor.norm,
}  # fmt: skip
"""Functions that autocast runs in fp32 (ATen/autocast_mode.h, torch 2.13; nearest-neighbour resampling among them)."""

WIDEST = {torch.addcmul, torch.addcdiv, torch.Tensor.addcmul, torch.Tensor.addcdiv, torch.tensordot, F.grid_sample}
"""Functions that autocast runs in the widest format of their arguments."""


@contextmanager
def emulate(kind: Kind) -> Iterator[None]:
    """Compute as a GPU does in "tf32", or, where ``torch.autocast("cpu")`` is on, as under CUDA's autocast in "fp16" or
    "bf16"; the backward pass belongs inside."""
    if kind == "tf32":
        with _Products(None), _Attention():
            yield
    else:
        with _Products(DTYPES[kind]), _Autocast(DTYPES[kind]):
            yield


def round_mantissa(x: Tensor, bits: int) -> Tensor:
    """``x`` (fp32) with ``bits`` bits behind the leading one, to nearest, ties to even; inf and NaN stay."""
    if x.dtype != torch.float32:
        raise TypeError(f"only fp32 is rounded bit by bit, got {x.dtype}")
    cut = 23 - bits
    word = x.contiguous().view(torch.int32)
    odd = (word >> cut) & 1
    rounded = ((word + ((1 << (cut - 1)) - 1) + odd) >> cut) << cut
    return torch.where(torch.isfinite(x), rounded.view(torch.float32), x)


def tf32(x: Tensor) -> Tensor:
    """``x`` as a tensor core reads it in TF32: 8 bits of exponent, 10 of mantissa."""
    return round_mantissa(x, TF32_BITS)


class _Products(TorchDispatchMode):
    """Rounds the factors of every product, below autograd, so forward and backward; ``dtype`` None is TF32."""

    def __init__(self, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        factors = [args[i] for i in PRODUCTS.get(func, ())]
        if self.dtype is None and factors and factors[0].dtype == torch.float32:
            return func(*(tf32(a) if i in PRODUCTS[func] else a for i, a in enumerate(args)), **kwargs)
        if self.dtype is not None and factors and factors[0].dtype == self.dtype:
            return self._product(func, args, kwargs)
        return func(*args, **kwargs)

    def _product(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """In fp32, from and to 16 bit; a convolution's bias is added after its result was rounded, as cuDNN does."""
        bias = args[2] if func is _aten.convolution.default else None
        if bias is not None:
            args = (*args[:2], None, *args[3:])
        found = func(*(a.float() if isinstance(a, Tensor) else a for a in args), **kwargs)
        if isinstance(found, tuple):
            return tuple(None if f is None else f.to(self.dtype) for f in found)
        out = found.to(self.dtype)
        return out if bias is None else out + bias.reshape(-1, *(1,) * (out.ndim - 2))


class _Attention(TorchFunctionMode):
    """Attention written out, so that its two products and their gradients are products like all others."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        run = attention if func is F.scaled_dot_product_attention else func
        return run(*args, **(kwargs or {}))


class _Autocast(TorchFunctionMode):
    """Where the CPU's autocast is on, does what ``torch.autocast("cuda", dtype)`` would, whose lists are others."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        wanted = self._wanted(func, args) if torch.is_autocast_enabled("cpu") else None
        if wanted is not None:
            args, kwargs = _cast(args, wanted), {key: _cast(value, wanted) for key, value in kwargs.items()}
        run = attention if func is F.scaled_dot_product_attention else func
        with torch.autocast("cpu", enabled=False):
            return run(*args, **kwargs)

    def _wanted(self, func: Callable[..., Any], args: tuple[Any, ...]) -> torch.dtype | None:
        if func in LOWER:
            return self.dtype
        if func in RAISED:
            return torch.float32
        if func in WIDEST:
            kinds = {a.dtype for a in args if isinstance(a, Tensor)}
            return torch.float32 if torch.float32 in kinds else self.dtype
        return None


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Floating tensors of at most 32 bits in ``dtype``, also inside tuples and lists; the rest as it is."""
    if isinstance(value, Tensor):
        known = value.dtype in (torch.float32, torch.float16, torch.bfloat16)
        return value.to(dtype) if known else value
    if isinstance(value, tuple | list) and any(isinstance(v, Tensor) for v in value):
        return type(value)(_cast(v, dtype) for v in value)
    return value


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """``softmax(q k^T scale) v [..., n, d]`` as flash attention rounds it in 16 bit: scores and softmax in fp32, the
    probabilities and the scores' gradient rounded where they become factors, and the result."""
    if attn_mask is not None or dropout_p or is_causal:
        raise NotImplementedError("masks, dropout and causal attention are not emulated")
    dtype, scale = query.dtype, query.shape[-1] ** -0.5 if scale is None else scale
    scores = _GradientFactor.apply(query.float() @ key.float().mT, dtype)
    share = _Factor.apply(torch.softmax(scores * scale, dim=-1), dtype)
    return (share @ value.float()).to(dtype)


class _Factor(torch.autograd.Function):
    """An fp32 value that was rounded to ``dtype`` to become a factor; its gradient is not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.to(dtype).float()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _GradientFactor(torch.autograd.Function):
    """An fp32 value whose gradient is rounded to ``dtype`` to become a factor; itself it is not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtype = dtype
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.to(ctx.dtype).float(), None


def precision_of(kind: Kind) -> float:
    """The unit roundoff u: half the distance from 1 to the next number."""
    return math.ldexp(1, {"tf32": -11, "fp16": -11, "bf16": -8}[kind])
