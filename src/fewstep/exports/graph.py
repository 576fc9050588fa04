"""The consistency function as a graph that needs no fewstep: a ``torch.export`` program, or ONNX.

What is exported is ``f(x, sigma) -> x_0`` in EDM coordinates, ``x = x_0 + sigma z``, with all scalings of the network
inside; a sampler around it is ten lines (:func:`fewstep.exports.loops.loop`).
"""

from __future__ import annotations

import copy
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from fewstep.denoiser import Denoiser
from fewstep.errors import ConfigError
from fewstep.process import EDM
from fewstep.randomness import Streams

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

TOLERANCE = 1e-4
"""Largest difference of a graph from the model, relative to the model's largest output where that is above 1."""

CHECKED_BATCHES = (1, 5)
"""Batch sizes at which a graph is compared with the model; it is traced with another."""

_TRACED_BATCH = 2

UNBOUNDED = 2**31

Inputs = dict[str, Tensor]


class Function(nn.Module):
    """``f(x, sigma[, cond, guidance, landing]) -> x_0`` in EDM coordinates; ``x [b, ...]``, ``sigma [b]``, float32.

    ``landing [b]`` is the noise level at which a two-time student lands, ``guidance [b]`` the strength that a guided
    one is told; ``cond`` is a packed row (:class:`fewstep.conditioning.Conditioning`).
    """

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser.under(EDM())

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        cond: Tensor | None = None,
        guidance: Tensor | None = None,
        landing: Tensor | None = None,
    ) -> Tensor:
        return self.denoiser(x, sigma, cond, landing, guidance)


def portable(denoiser: Denoiser) -> Denoiser:
    """The model on the CPU, in float32 and eval mode; a copy where it was not."""
    ready = denoiser.device.type == "cpu" and denoiser.dtype == torch.float32 and not denoiser.training
    return denoiser if ready else copy.deepcopy(denoiser).cpu().float().eval()


def input_shapes(denoiser: Denoiser) -> dict[str, tuple[int, ...]]:
    """The inputs of the graph by name, in order, each with its shape without the batch."""
    shapes: dict[str, tuple[int, ...]] = {"x": denoiser.sample_shape, "sigma": ()}
    if denoiser.conditioning:
        shapes["cond"] = (denoiser.conditioning.width,)
    if denoiser.guided:
        shapes["guidance"] = ()
    if denoiser.two_time:
        shapes["landing"] = ()
    return shapes


def example_inputs(denoiser: Denoiser, batch: int) -> Inputs:
    """Inputs ``[batch, ...]`` at noise levels spread evenly in ln sigma from the top down to sigma_data/10."""
    streams, rows = Streams(0), torch.arange(batch)
    low, high = max(denoiser.sigma_min, 0.1 * denoiser.sigma_data), denoiser.sigma_max
    sigma = torch.tensor([high * (low / high) ** (i / max(1, batch - 1)) for i in range(batch)], dtype=torch.float32)
    x = streams.normal("export/x", rows, denoiser.sample_shape)
    given = {"x": sigma.reshape(-1, *[1] * (x.ndim - 1)) * x, "sigma": sigma}
    if denoiser.num_classes:
        given["cond"] = torch.eye(denoiser.num_classes)[rows % denoiser.num_classes]
    elif denoiser.conditioning:
        given["cond"] = streams.normal("export/cond", rows, (denoiser.conditioning.width,))
    if denoiser.guided:
        given["guidance"] = torch.full((batch,), sum(denoiser.guidance_range) / 2)
    if denoiser.two_time:
        given["landing"] = sigma / 4
    return given


def trace(denoiser: Denoiser) -> ExportedProgram:
    """The program of :class:`Function` with a dynamic batch.

    Raises:
        ConfigError: the network cannot be traced.
    """
    given = example_inputs(denoiser, _TRACED_BATCH)
    with _quiet(), torch.no_grad(), _translated("traced with an open batch size"):
        return torch.export.export(
            Function(denoiser).eval(),
            (),
            given,
            dynamic_shapes={name: {0: Dim.DYNAMIC} for name in given},
        )


def largest_batch(program: ExportedProgram) -> int | None:
    """The largest batch that a program takes: the U-Nets of diffusers do something else from 64 on; None is any."""
    most = min((bounds.upper for bounds in program.range_constraints.values()), default=UNBOUNDED)
    return int(most) if most < UNBOUNDED else None


def write_program(denoiser: Denoiser, path: Path) -> tuple[float, int | None]:
    """Write ``program.pt2`` for ``torch.export.load``; returns its largest difference from the model, and batch.

    Raises:
        ConfigError: the network cannot be traced, or the program disagrees with it.
    """
    program = trace(denoiser)
    with _quiet():
        torch.export.save(program, path)
        again = torch.export.load(path).module()
    return _check(denoiser, lambda given: again(**given)), largest_batch(program)


def write_onnx(denoiser: Denoiser, path: Path) -> float:
    """Write ``model.onnx``; returns its largest difference from the model, in onnxruntime.

    Raises:
        ConfigError: onnx is not installed, the network cannot be translated, or the graph disagrees with it.
    """
    session_of = _onnxruntime()
    program = trace(denoiser)
    named = {name: {0: "batch"} for name in input_shapes(denoiser)}
    with _quiet(), _translated("translated to ONNX"):
        program = program.run_decompositions({torch.ops.aten.searchsorted.Tensor: _count_below})
        made = torch.onnx.export(program, dynamo=True, dynamic_shapes=named, output_names=["x_0"], verbose=False)
        assert made is not None  # with dynamo=True
        made.save(path)
    session = session_of(path)

    def run(given: Inputs) -> Tensor:
        return torch.from_numpy(session.run(None, {name: value.numpy() for name, value in given.items()})[0])

    return _check(denoiser, run)


def _check(denoiser: Denoiser, run: Callable[[Inputs], Tensor]) -> float:
    """The largest difference of ``run`` from the model over :data:`CHECKED_BATCHES`."""
    function, worst = Function(denoiser).eval(), 0.0
    for batch in CHECKED_BATCHES:
        given = example_inputs(denoiser, batch)
        with torch.no_grad():
            wanted, found = function(**given), run(given)
        difference = float((found - wanted).abs().max()) if found.shape == wanted.shape else math.inf
        if not difference <= TOLERANCE * max(1.0, float(wanted.abs().max())):
            raise ConfigError(
                f"The graph disagrees with the model, and was not kept (batch {batch})",
                got=f"a difference of {difference:.3g}",
                want=f"at most {TOLERANCE:g}",
                do="Export with --to torch, and please report the network",
            )
        worst = max(worst, difference)
    return worst


def _count_below(
    table: Tensor,
    values: Tensor,
    *,
    out_int32: bool = False,
    right: bool = False,
    side: str | None = None,
    sorter: Tensor | None = None,
) -> Tensor:
    """``searchsorted``, which ONNX lacks: how many entries lie below each value."""
    values = values.unsqueeze(-1)
    return ((table <= values) if right or side == "right" else (table < values)).sum(-1)


def _onnxruntime() -> Callable[[Path], InferenceSession]:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
        from onnxruntime import InferenceSession
    except ImportError as error:
        raise ConfigError(
            f"ONNX export needs {error.name}, which is not installed", do="Run: pip install 'fewstep[onnx]'"
        ) from error
    return lambda path: InferenceSession(str(path), providers=["CPUExecutionProvider"])


@contextmanager
def _translated(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # torch's exporter raises anything that a network's code can
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ConfigError(
            f"The network cannot be {what}: {first}",
            do="Its code must not branch on values, nor turn the batch into a number (x.shape[0], not len(x))",
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's talk about its own insides."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
