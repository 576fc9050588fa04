"""How a network is evaluated when samples are drawn: its arithmetic, compiled or not, block by block.

Only the network runs in another arithmetic; noise, preconditioning and the steps of a sampler stay in float32 and
float64. Nothing of the model is changed: its weights stay float32 and uncompiled, its modules get their modes back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, TypeAlias, get_args

import torch
from torch import Tensor, nn

from fewstep.arithmetic import HALF, Arithmetic, Precision, rounding, tf32
from fewstep.compiling import compiled
from fewstep.denoiser import Denoiser
from fewstep.errors import ConfigError, nearest
from fewstep.guidance import Guided
from fewstep.process import EDM
from fewstep.randomness import Streams
from fewstep.types import Condition, Samples

Model: TypeAlias = Callable[[Tensor, Tensor, Tensor | None], Tensor]
Noise: TypeAlias = Callable[[int], Tensor]
"""Fresh standard normal noise for step k, ``[b, ...]``."""
Run: TypeAlias = Callable[[Model, Tensor, Noise, Tensor | None], Tensor]
"""A sampler, ``run(model, latents, noise, cond)``."""

_TOLD = ("guided", "guidance_range", "two_time", "null_cond")
"""What a backbone says of itself (:class:`fewstep.denoiser.Backbone`)."""


def arithmetic(precision: Precision, device: torch.device) -> Arithmetic:
    """The arithmetic in which networks are evaluated: ``precision``, or for "auto" fp16 on a GPU and fp32 elsewhere.

    "fp32" is torch as it is set: on a GPU it lets convolutions use TF32 unless ``torch.backends.cudnn.allow_tf32`` is
    False. "auto" is never bf16, eight times coarser at the speed of fp16 (docs/performance.md).

    Raises:
        ConfigError: the device cannot do it.
    """
    if precision not in get_args(Precision):
        raise ConfigError(f"There is no precision '{precision}'", do=nearest(precision, get_args(Precision)))
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0
    if precision == "auto":
        return "fp16" if major >= 7 else "fp32"
    if precision == "tf32" and major < 8:
        raise ConfigError("This device has no TF32", got=f"precision 'tf32' on {device}",
                          want="a CUDA device from Ampere on", do="Use fp32, or auto")  # fmt: skip
    if precision == "bf16" and 0 < major < 8:
        raise ConfigError("This GPU has no bf16", got=f"precision 'bf16' on {device}", do="Use fp16, or auto")
    return precision


class Evaluated(nn.Module):
    """A backbone in an arithmetic of its own, compiled or not; what it says of itself is the backbone's."""

    def __init__(self, network: nn.Module, kind: Arithmetic, compile: bool) -> None:
        super().__init__()
        self.network, self.kind, self.training = network, kind, False
        for name in _TOLD:
            if hasattr(network, name):
                setattr(self, name, getattr(network, name))
        self._call = compiled(network) if compile else network.__call__

    def forward(self, x: Samples, c_noise: Tensor, *rest: Any, **named: Any) -> Tensor:
        with rounding(self.kind, x.device, tuple(x.shape[1:])):
            return self._call(x, c_noise, *rest, **named)


@contextmanager
def _evaluating(denoiser: Denoiser, twin: Denoiser) -> Iterator[None]:
    """Eval mode, and then each module's own mode again."""
    training = [module for module in denoiser.modules() if module.training]
    if training:
        twin.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def evaluated(denoiser: Denoiser, precision: Precision = "fp32", compile: bool = False) -> Denoiser:
    """The same model, its network evaluated as told (shared weights); as it is for fp32 without compilation.

    Raises:
        ConfigError: the device cannot do it.
    """
    kind = arithmetic(precision, denoiser.device)
    if not compile and kind not in HALF:
        return denoiser
    return denoiser.around(Evaluated(denoiser.backbone, kind, compile), denoiser.spec)


# ------------------------------------------------------------------------------------------------ blocks
@torch.no_grad()
def blocks_of(
    run: Run,
    denoiser: Denoiser,
    n: int,
    *,
    seed: int = 0,
    cond: Tensor | None = None,
    guidance: float | None = None,
    batch_size: int | None = None,
    first: int = 0,
    precision: Precision = "fp32",
    compile: bool = False,
    part: int = 0,
    parts: int = 1,
) -> Iterator[Samples]:
    """``run(model, latents, noise, cond)`` on samples ``first`` to ``first + n - 1``, in blocks of ``batch_size``.

    The device is asked for a block and not waited for. Compiled networks see one shape: the last block is filled up
    with copies of its last row, which are dropped again.

    Args:
        part, parts: of several parts, every ``parts``-th block beginning with number ``part``.
    """
    if n < 1:
        raise ConfigError("The number of samples must be at least 1", got=n)
    if first < 0:
        raise ConfigError("The number of the first sample must not be negative", got=first)
    if cond is not None and len(cond) != n:
        raise ConfigError("There is not one label per sample", got=len(cond), want=n)
    kind = arithmetic(precision, denoiser.device)
    edm = evaluated(denoiser, precision, compile).under(EDM())
    model: Model = edm
    if guidance is not None and (guidance != 1 or denoiser.guided):
        model = Guided(edm, guidance)
    streams, shape = Streams(seed), denoiser.sample_shape
    _check_classes(denoiser, cond)
    size = min(n, batch_size or default_batch_size(shape, denoiser.device))
    for start in range(part * size, n, parts * size):
        end = min(start + size, n)
        rows = torch.arange(start, start + size if compile else end, device=denoiser.device).clamp_max(end - 1)
        index = rows + first

        def noise(k: int, index: Tensor = index) -> Tensor:
            return streams.normal(f"sample/noise/{k}", index, shape, denoiser.dtype)

        with _evaluating(denoiser, edm), tf32(kind, denoiser.device) if kind == "tf32" else nullcontext():
            latents = streams.normal("sample/latent", index, shape, denoiser.dtype)
            x = run(model, latents, noise, _told(denoiser, cond, start, end, len(rows)))
        yield x[: end - start]


def in_batches(
    run: Run,
    denoiser: Denoiser,
    n: int,
    seed: int,
    cond: Tensor | None,
    guidance: float | None,
    batch_size: int | None,
    first: int,
    precision: Precision = "fp32",
    compile: bool = False,
) -> Samples:
    """All of :func:`blocks_of` together, ``[n, ...]``."""
    blocks = blocks_of(
        run, denoiser, n, seed=seed, cond=cond, guidance=guidance, batch_size=batch_size, first=first,
        precision=precision, compile=compile,
    )  # fmt: skip
    return torch.cat(list(blocks))


def default_batch_size(shape: tuple[int, ...], device: torch.device) -> int:
    """Samples at once that keep a batch near two million values on a GPU, half a million on a CPU."""
    values = 2_000_000 if device.type == "cuda" else 500_000
    return max(1, min(1024, values // math.prod(shape)))


def _are_classes(denoiser: Denoiser, cond: Tensor | None) -> bool:
    """Whether ``cond`` is class indices, and not rows that are given to the network as they are."""
    return cond is not None and cond.ndim == 1 and not cond.is_floating_point() and denoiser.num_classes > 0


def _check_classes(denoiser: Denoiser, cond: Tensor | None) -> None:
    """Read the labels once, so that no evaluation has to: the least and the largest one are the model's."""
    if cond is not None and _are_classes(denoiser, cond):
        denoiser.condition(torch.stack((cond.min(), cond.max())), 2)


def _told(denoiser: Denoiser, cond: Tensor | None, start: int, end: int, rows: int) -> Condition | None:
    """What samples ``start`` to ``end - 1`` are to be of, ``[rows, width]``; the last one is repeated."""
    if cond is None:
        return None
    part = cond[start:end]
    if rows > len(part):
        part = torch.cat((part, part[-1:].expand(rows - len(part), *part.shape[1:])))
    if not _are_classes(denoiser, cond):
        return part
    classes = torch.arange(denoiser.num_classes, device=denoiser.device)
    return (part.to(denoiser.device)[:, None] == classes).to(denoiser.dtype)
