"""Teacher agreement: does the student land where the teacher's ODE leads from the same noise?"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fewstep.denoiser import Denoiser
from fewstep.errors import ConfigError, DataError
from fewstep.evaluation.bootstrap import Estimate, half_samples, spread_of
from fewstep.process import EDM
from fewstep.randomness import Streams
from fewstep.sampling import default_batch_size, few_step_times, heun_sample, karras_grid, possible_steps, sample

LEAST_NODES = 72
SIGMA_MIN = 0.002


@torch.no_grad()
def teacher_agreement(
    student: Denoiser,
    teacher: Denoiser,
    *,
    steps: Sequence[int] = (1, 2, 4, 8),
    samples: int = 256,
    nodes: int = LEAST_NODES,
    seed: int = 0,
    at: Sequence[float] | None = None,
    cond: Tensor | None = None,
    batch_size: int | None = None,
    replicates: int = 50,
) -> dict[str, Any]:
    """How far the student's samples are from the end points Φ of the teacher's ODE with the same noise z.

        A = E‖f(Tz) - Φ_{T→0}(Tz)‖²/d,  reported as √A and √A/rms(Φ),  rms(Φ) = √(E‖Φ‖²/d)      (math.md 6.7)

    For 2 and more steps f is the few-step sampler with its noise z' fixed by ``seed``, and fresh noise of that size
    keeps A above 0 even for a perfect student (a student that jumps adds none). For each noise level t of ``at`` the
    student starts on the teacher's path: E‖f(x_t, t) - Φ_{t→0}(x_t)‖²/d, x_t = Φ_{T→t}(Tz). Φ is EDM's Heun sampler on
    ``nodes`` Karras nodes and the levels of ``at``, computed once.

    Warning: A does not tend to 0 for models tuned by ECT or consistency training. They follow the ODE of the *data*,
    with a bias of the discretisation, not the ODE of the teacher; on separated modes A is dominated by the samples near
    the borders between their basins (math.md 7.2). Only distillation aims at A = 0.

    Args:
        steps: numbers of network evaluations of the student.
        samples: how many.
        nodes: at least 72, where the teacher's own error is 0.3 % of the spread.
        at: noise levels between 0 and sigma_max (EDM sigma).
        cond: class indices ``[samples]`` or one-hot ``[samples, num_classes]``, for both.
        replicates: halves of the samples for the 95 % intervals; 0 for none.

    Returns:
        JSON-able: ``{"samples", "seed", "nodes", "sampler", "teacher_nfe", "teacher_rms", "rows": [row, ...], "at":
        [row, ...]}`` with row ``{"steps", "times", "rms", "rms_interval": [low, high], "relative",
        "relative_interval"}``; rows of
        "at" have "sigma" in place of "steps" and "times".

    Raises:
        ConfigError: student and teacher differ in sample shape, value range or sigma_max; fewer than 72 nodes; levels
            outside (0, sigma_max); no samples; labels that do not fit.
        DataError: samples that are not finite, or fewer than 4 with a spread.
    """
    levels = sorted({float(t) for t in at or ()}, reverse=True)
    _check(student, teacher, nodes, levels, samples, cond)
    grid = _grid(teacher, nodes, levels)
    path = _path(teacher, grid, levels, samples, seed, cond, batch_size)
    end = path.pop(0.0)
    size = end.flatten(1).double().square().mean(1).cpu()

    def compared(x: Tensor) -> dict[str, Any]:
        error = (x.double() - end.to(x.device).double()).flatten(1).square().mean(1).cpu()
        return _row(error, size, replicates, seed)

    few = [{"steps": n, "times": few_step_times(student, n)} for n in steps]
    landed = (sample(student, samples, steps=n, seed=seed, cond=cond, batch_size=batch_size) for n in steps)
    mid = (_land(student, x_t, t, cond, batch_size) for t, x_t in path.items())
    return {
        "samples": samples,
        "seed": seed,
        "nodes": nodes,
        "sampler": student.sampler,
        "teacher_nfe": 2 * len(grid) - 3,
        "teacher_rms": float(size.mean().sqrt()),
        "rows": [row | compared(x) for row, x in zip(few, landed, strict=True)],
        "at": [{"sigma": t} | compared(x) for t, x in zip(levels, mid, strict=True)],
    }


# ------------------------------------------------------------------------------------------- the paths
def _grid(teacher: Denoiser, nodes: int, levels: list[float]) -> list[float]:
    grid = karras_grid(nodes, max(SIGMA_MIN, teacher.sigma_min), teacher.sigma_max)
    return sorted({*grid, *levels}, reverse=True)


def _path(
    teacher: Denoiser,
    grid: list[float],
    levels: list[float],
    n: int,
    seed: int,
    cond: Tensor | None,
    batch_size: int | None,
) -> dict[float, Tensor]:
    """The teacher's states at ``levels`` and at 0, ``{sigma: [n, ...]}``, from the latents of :func:`sample`."""
    stops = [grid[0], *levels, 0.0]
    pieces = [[t for t in grid if low <= t <= high] for high, low in itertools.pairwise(stops)]
    parts: dict[float, list[Tensor]] = {t: [] for t in stops[1:]}
    streams, shape = Streams(seed), teacher.sample_shape
    with _evaluating(teacher) as model:
        for rows in _batches(teacher, n, batch_size):
            index = torch.arange(rows.start, rows.stop, device=teacher.device)
            x = grid[0] * streams.normal("sample/latent", index, shape, teacher.dtype)
            for piece in pieces:
                x = heun_sample(model, x / piece[0], piece, cond=None if cond is None else cond[rows])
                parts[piece[-1]].append(x)
    return {t: torch.cat(found) for t, found in parts.items()}


def _land(student: Denoiser, x_t: Tensor, t: float, cond: Tensor | None, batch_size: int | None) -> Tensor:
    """f(x_t, t) in batches, ``[n, ...]``."""
    x_t = x_t.to(device=student.device, dtype=student.dtype)
    with _evaluating(student) as model:
        batches = _batches(student, len(x_t), batch_size)
        return torch.cat([model(x_t[rows], t, None if cond is None else cond[rows]) for rows in batches])


def _batches(model: Denoiser, n: int, batch_size: int | None) -> Iterator[slice]:
    size = batch_size or default_batch_size(model.sample_shape, model.device)
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


@contextmanager
def _evaluating(denoiser: Denoiser) -> Iterator[Denoiser]:
    """The model under the EDM clock, without dropout; its modes are restored afterwards."""
    modes = {module: module.training for module in denoiser.modules()}
    try:
        yield denoiser.under(EDM()).eval()
    finally:
        for module, training in modes.items():
            module.training = training


# ----------------------------------------------------------------------------------------- the numbers
def _row(error: Tensor, size: Tensor, replicates: int, seed: int) -> dict[str, Any]:
    """√mean(error) and √(mean(error)/mean(size)) with intervals, of squared norms per dimension ``[n]``."""
    if not bool(torch.isfinite(error).all()):
        bad = f"{int((~torch.isfinite(error)).sum())} of {len(error)}"
        raise DataError("Some samples of the student or the teacher are not finite", got=bad)
    halves = list(half_samples(len(error), replicates, seed))
    row: dict[str, Any] = {}
    for name, unit in (("rms", torch.ones_like(size)), ("relative", size)):
        estimate = Estimate(_ratio(error, unit), spread_of([_ratio(error[h], unit[h]) for h in halves]))
        row |= {name: estimate.value, f"{name}_interval": [estimate.low, estimate.high]}
    return row


def _ratio(error: Tensor, unit: Tensor) -> float:
    return float((error.mean() / unit.mean()).sqrt())


def check_pair(student: Denoiser, teacher: Denoiser) -> None:
    """Refuse a student and a teacher whose samples cannot be compared one by one.

    Raises:
        ConfigError: they differ in sample shape, value range or sigma_max.
    """
    for what in ("sample_shape", "value_range", "sigma_max"):
        ours, theirs = getattr(student, what), getattr(teacher, what)
        if ours != theirs and not (what == "sigma_max" and abs(ours - theirs) <= 1e-6 * theirs):
            raise ConfigError(
                f"Student and teacher differ in {what}, so that their samples cannot be compared one by one",
                got=f"student {ours}, teacher {theirs}",
                do="Give the teacher that the student was tuned from",
            )


def _check(
    student: Denoiser, teacher: Denoiser, nodes: int, levels: list[float], samples: int, cond: Tensor | None
) -> None:
    top = teacher.sigma_max
    check_pair(student, teacher)
    if nodes < LEAST_NODES:
        raise ConfigError(
            "Too few nodes: the teacher's own error would be measured",
            got=nodes,
            want=f"at least {LEAST_NODES}",
            do="On a Gaussian 18 nodes overshoot the spread by 5.5 %, 36 by 1.2 %, 72 by 0.3 % (math.md 4.1)",
        )
    if levels and possible_steps(student) is not None:
        raise ConfigError(
            "This student jumps between the levels it was trained for only, so it cannot start from others",
            got=f"at={levels}",
            do="Leave 'at' out",
        )
    if any(not 0 < t < top for t in levels):
        raise ConfigError("A noise level to start from is out of range", got=levels, want=f"in (0, {top:g})")
    if samples < 1:
        raise ConfigError("The number of samples must be at least 1", got=samples)
    if cond is not None and len(cond) != samples:
        raise ConfigError("There is not one label per sample", got=len(cond), want=samples)
