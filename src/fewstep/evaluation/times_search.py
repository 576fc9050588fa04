"""Sampling times as an optimisation: the few-step sampler with its states kept, and a search in ln sigma.

Every candidate starts from the same latents and adds the same noise (common random numbers), so that two sets of
times differ by nothing but the times. The sampler is sequential: candidates that begin alike share their first
evaluations. Source: math.md 2.9 ("treat the times as a small optimisation over quality").
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fewstep.denoiser import Denoiser
from fewstep.jumps import ddim
from fewstep.process import EDM
from fewstep.randomness import Streams
from fewstep.sampling import default_batch_size
from fewstep.types import Samples

LOWEST, HIGHEST = 0.02, 40.0
"""Range of the times in units of sigma_data; also above the model's sigma_min and below half its sigma_max."""
COARSE, FINE = 0.7, 0.1
"""First and last step of the refinement, in ln sigma."""

Score = Callable[[Samples], float]
Times = tuple[float, ...]


class Chain:
    """The few-step sampler with its states kept: times that begin like the last ones share those evaluations.

    ``run(times)`` equals ``sample(denoiser, n, times=times, seed=seed, cond=cond)``. Memory: N states of n samples.
    An evaluation of a student that jumps also depends on where it lands, so fewer of them are shared.

    Args:
        denoiser: the few-step model; one that jumps must be told where it lands.
        n: samples; sample i depends on the seed and on i alone.
        cond: class indices ``[n]``, or None.
        batch_size: samples at once; changes nothing but the rounding.
    """

    def __init__(
        self, denoiser: Denoiser, n: int, *, seed: int = 0, cond: Tensor | None = None, batch_size: int | None = None
    ) -> None:
        self._model, self._streams, self._cond = denoiser.under(EDM()), Streams(seed), cond
        size = batch_size or default_batch_size(denoiser.sample_shape, denoiser.device)
        self._batches = torch.split(torch.arange(n, device=denoiser.device), size)
        self._legs: list[tuple[float, float]] = []
        self._states: list[Tensor] = []
        self.evaluations = 0

    def forget(self) -> None:
        """Drop the kept states: what follows costs the same whatever was run before."""
        self._legs.clear()
        self._states.clear()

    def cost(self, times: Sequence[float]) -> int:
        """Network evaluations per sample that ``run(times)`` would take now."""
        return len(times) - self._shared(self._way(times))

    @torch.no_grad()
    def run(self, times: Sequence[float]) -> Samples:
        """Samples ``[n, ...]`` in model space at these noise levels, largest first (math.md eq. 2.10, 3.5)."""
        way = self._way(times)
        shared = self._shared(way)
        del self._legs[shared:], self._states[shared:]
        with _evaluating(self._model):
            for leg in way[shared:]:
                self._states.append(torch.cat([self._step(*leg, rows) for rows in self._batches]))
                self._legs.append(leg)
                self.evaluations += 1
        return self._states[-1].to(self._model.dtype)

    def _way(self, times: Sequence[float]) -> list[tuple[float, float]]:
        """What evaluation k depends on, beside the state before it: its level and where it lands."""
        if self._model.sampler == "jump":
            return list(itertools.pairwise([*times, 0.0]))
        return [(t, 0.0) for t in times]

    def _shared(self, way: Sequence[tuple[float, float]]) -> int:
        pairs = zip(self._legs, way, strict=False)
        return next((k for k, (a, b) in enumerate(pairs) if a != b), min(len(self._legs), len(way)))

    def _step(self, t: float, s: float, rows: Tensor) -> Tensor:
        """The state after one more evaluation: of jumps in float64, as in ``sample``."""
        model, k = self._model, len(self._legs)
        jumps = model.sampler == "jump"
        if k == 0:
            noise = self._noise("sample/latent", rows)
            x = (noise.double() if jumps else noise) * t
        elif jumps:
            x = self._states[k - 1][rows]
        else:
            x = self._states[k - 1][rows].double() + t * self._noise(f"sample/noise/{k}", rows).double()
        cond = None if self._cond is None else self._cond[rows]
        level, landing = (torch.full((len(rows),), v, dtype=model.dtype, device=rows.device) for v in (t, s))
        out: Tensor = model(x.to(model.dtype), level, cond, *((landing,) if model.two_time else ()))
        return ddim(out.double(), x, t, s) if jumps else out

    def _noise(self, stream: str, rows: Tensor) -> Tensor:
        return self._streams.normal(stream, rows, self._model.sample_shape, self._model.dtype)


@dataclass
class Trials:
    """The value of sampling times on one draw, measured once each, within a budget.

    Args:
        chain: the sampler.
        score: samples -> the number to be minimised.
        watch: told of every measured value: ``watch(evaluations spent since the last budget, best value)``.
    """

    chain: Chain
    score: Score
    watch: Callable[[int, float], None] | None = None
    _values: dict[Times, float] = field(default_factory=dict)
    _from: int = 0
    _most: float = math.inf

    def allow(self, budget: int) -> None:
        """From now on, spend at most ``budget`` network evaluations per sample, and begin without kept states."""
        self.chain.forget()
        self._from, self._most = self.chain.evaluations, budget

    @property
    def spent(self) -> int:
        """Network evaluations per sample since the last :meth:`allow`."""
        return self.chain.evaluations - self._from

    def value(self, times: Times) -> float:
        """The score at ``times``; infinite where they do not decrease or the budget does not reach."""
        if times not in self._values:
            if any(a <= b for a, b in itertools.pairwise(times)):
                return math.inf
            if self.spent + self.chain.cost(times) > self._most:
                return math.inf
            self._values[times] = self.score(self.chain.run(times))
            if self.watch is not None:
                same = [v for t, v in self._values.items() if len(t) == len(times)]
                self.watch(self.spent, min(same))
        return self._values[times]


def time_range(denoiser: Denoiser) -> tuple[float, float]:
    """Where the times after the first are looked for: 0.02 to 40 sigma_data, inside the model's own range.

    For a student that jumps up to sigma_max: it adds no noise, so that its first jumps may be short.
    """
    low = max(LOWEST * denoiser.sigma_data, denoiser.sigma_min)
    if denoiser.sampler == "jump":
        return low, denoiser.sigma_max
    return low, max(low, min(HIGHEST * denoiser.sigma_data, denoiser.sigma_max / 2))


def find_times(trials: Trials, starts: Sequence[Sequence[float]], bounds: tuple[float, float]) -> Times:
    """The best times of one step count that the allowed network evaluations can find.

    From the best of ``starts`` (as many levels each; the first level stays), a pattern search in ln sigma: shift all
    times, stretch them about their middle, then move each alone, the last and cheapest first. Along a direction
    three points are tried and the vertex of their parabola; the step is halved from 0.7 to below 0.1. Few broad
    directions come first because a draw of a few thousand samples does not determine seven times.
    """
    best = min((rounded(start) for start in starts), key=trials.value)
    step = COARSE
    while step >= FINE:
        before = trials.value(best)
        for direction in _directions(len(best) - 1):
            best = _moved(trials, best, direction, step, bounds)
        if not trials.value(best) < 0.98 * before:
            step /= 2
    return best


def resampled(times: Sequence[float], steps: int) -> Times:
    """``times`` with another number of levels: the same curve of ln sigma after the first, evenly resampled.

    A single level becomes a spread of factors from 2 to 1/2 around it.
    """
    logs = [math.log(t) for t in times[1:]]
    logs = logs if len(logs) != 1 else [logs[0] + math.log(2), logs[0] - math.log(2)]
    places = np.linspace(0, len(logs) - 1, steps - 1) if steps > 2 else [(len(logs) - 1) / 2]
    return rounded((times[0], *np.exp(np.interp(places, range(len(logs)), logs)).tolist()))


def rounded(times: Sequence[float]) -> Times:
    """Four digits after the first time: what is measured is what is written."""
    return (float(times[0]), *(float(f"{t:.4g}") for t in times[1:]))


def _directions(count: int) -> list[list[float]]:
    """Unit moves of ``count`` times in ln sigma: shift, stretch, and where that is not all, each alone."""
    shift = [1.0] * count
    stretch = np.linspace(1, -1, count).tolist()
    alone = [[float(i == k) for i in range(count)] for k in reversed(range(count))]
    return [[shift], [shift, stretch]][count - 1] if count <= 2 else [shift, stretch, *alone]


def _moved(trials: Trials, times: Times, direction: list[float], step: float, bounds: tuple[float, float]) -> Times:
    """The best of ``times`` moved along a direction by -step, 0, +step and to the vertex of the parabola."""

    def at(offset: float) -> Times:
        moved = (t * math.exp(offset * d) if d else t for t, d in zip(times[1:], direction, strict=True))
        return rounded((times[0], *(min(max(t, bounds[0]), bounds[1]) for t in moved)))

    tried = [times, at(-step), at(step)]
    middle, left, right = (trials.value(t) for t in tried)
    curvature = left - 2 * middle + right
    if math.isfinite(curvature) and curvature > 0:
        tried.append(at(max(-1.5, min(1.5, 0.5 * (left - right) / curvature)) * step))
    return min(tried, key=trials.value)


@contextmanager
def _evaluating(model: Denoiser) -> Iterator[None]:
    """Dropout off, and every module back in its own mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
