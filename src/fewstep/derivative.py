"""The derivative of a network pass along a path, for objectives in continuous time (math.md 3.8, 3.9)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from fewstep.denoiser import Denoiser
from fewstep.errors import ConfigError
from fewstep.process import expand
from fewstep.randomness import DropoutTape, Streams

Method = Literal["auto", "jvp", "finite"]

TOLERANCE = 0.02
"""Largest relative difference between forward mode and finite differences at which forward mode is believed."""


@torch.no_grad()
def derivative(
    function: Callable[..., Tensor], primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...], method: Method
) -> Tensor:
    """``d/dh function(*(primals + h tangents))`` at h = 0, without gradient and without autocast.

    With the tangent ``(dx/dln t, t)`` this is the derivative with respect to ``ln t``, and h a relative step of time.

    Args:
        function: of as many tensors as ``primals``; called once or twice, so it opens its own dropout tape: both times
            with the masks of the student's pass.
        primals, tangents: floating-point tensors of pairwise equal shape and dtype.
        method: "jvp" is forward-mode differentiation (attention by its plain formula: the fused kernels have no forward
            mode); "finite" is a central difference with h = 0.2 eps^(1/3), 1e-3 in float32, never in TF32.
            "auto" that :func:`settle` did not replace counts as "jvp".

    Returns:
        The derivative, of the shape of the function's result.
    """
    with torch.autocast(primals[0].device.type, enabled=False):
        return (_difference if method == "finite" else _forward_mode)(function, primals, tangents)


def settle(method: Method, student: Denoiser) -> Method:
    """ "jvp" or "finite": what ``method`` means for this network, by trying both on two rows.

    Args:
        student: the network, under the EDM clock; a copy of it is tried, in eval mode.

    Raises:
        ConfigError: "jvp" was asked for, and the network has no forward mode or a wrong one.
    """
    if method == "finite":
        return method
    problem = _try_forward_mode(student)
    if problem is None:
        return "jvp"
    if method == "jvp":
        raise ConfigError(
            "The network cannot be differentiated in forward mode",
            got=problem,
            do="Use finite differences: --set objective.derivative=finite",
        )
    return "finite"


def _forward_mode(function: Callable[..., Tensor], primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
        out, slope = forward_ad.unpack_dual(function(*map(_dual, primals, tangents)))  # type: ignore[no-untyped-call]
    return torch.zeros_like(out) if slope is None else slope


def _dual(primal: Tensor, tangent: Tensor) -> Tensor:
    with warnings.catch_warnings():  # the first call loads decompositions that torch itself has deprecated
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", DeprecationWarning)
        return forward_ad.make_dual(primal, tangent)  # type: ignore[no-untyped-call]


def _difference(function: Callable[..., Tensor], primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> Tensor:
    h = 0.2 * torch.finfo(primals[0].dtype).eps ** (1 / 3)
    with _whole_mantissa():
        ahead, behind = (function(*(p + step * v for p, v in zip(primals, tangents, strict=True))) for step in (h, -h))
    return (ahead - behind) / (2 * h)


@contextmanager
def _whole_mantissa() -> Iterator[None]:
    """No TF32: its 1e-3 is as large as the step."""
    old = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = old


def _in_float64(student: Denoiser) -> Denoiser:
    """A copy in eval mode; in its own precision if its network casts inside."""
    twin = student.clone().double().eval()
    x = torch.zeros(1, *student.sample_shape, dtype=torch.float64, device=student.device)
    try:
        with torch.no_grad():
            twin(x, student.sigma_data)
    except RuntimeError:
        return student.clone().eval()
    return twin


def _try_forward_mode(student: Denoiser) -> str | None:
    """What is wrong with forward mode on this network, in a few words; None if nothing is.

    In float64 where the network can, so that the difference's own rounding is not held against it.
    """
    student, index = _in_float64(student), torch.arange(2, device=student.device)
    t = student.sigma_data * torch.tensor([0.3, 3.0], dtype=student.dtype, device=student.device)
    t = t.clamp(student.sigma_min, student.sigma_max)
    landing = (t / 2,) if student.two_time else ()
    x_0, eps = (Streams(0).normal(name, index, student.sample_shape, t.dtype) for name in ("data", "noise"))
    noise = expand(t, eps) * eps

    def function(x_t: Tensor, t: Tensor) -> Tensor:
        with DropoutTape(Streams(0), index).record():  # the same masks every time
            return student(x_t, t, None, *landing)

    path = (student.sigma_data * x_0 + noise, t), (noise, t)
    try:
        slope = derivative(function, *path, "jvp")
    except RuntimeError as error:
        return str(error).strip().split("\n")[0]
    finite = derivative(function, *path, "finite")
    gap = float(((slope - finite).flatten(1).norm(dim=1) / finite.flatten(1).norm(dim=1)).max())
    return None if gap <= TOLERANCE else f"forward mode and finite differences differ by {gap:.1%}"
