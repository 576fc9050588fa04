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

    Args:
        denoiser: the consistency model.
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
        self._times: list[float] = []
        self._states: list[Tensor] = []
        self.evaluations = 0

    def forget(self) -> None:
        """Drop the kept states: what follows costs the same whatever was run before."""
        self._times.clear()
        self._states.clear()

    def cost(self, times: Sequence[float]) -> int:
        """Network evaluations per sample that ``run(times)`` would take now."""
        return len(times) - self._shared(times)

    @torch.no_grad()
    def run(self, times: Sequence[float]) -> Samples:
        """Samples ``[n, ...]`` in model space at these noise levels, largest first (math.md eq. 2.10)."""
        shared = self._shared(times)
        del self._times[shared:], self._states[shared:]
        with _evaluating(self._model):
            for sigma in times[shared:]:
                self._states.append(torch.cat([self._step(sigma, rows) for rows in self._batches]))
                self._times.append(sigma)
                self.evaluations += 1
        return self._states[-1]

    def _shared(self, times: Sequence[float]) -> int:
        pairs = zip(self._times, times, strict=False)
        return next((k for k, (a, b) in enumerate(pairs) if a != b), min(len(self._times), len(times)))

    def _step(self, sigma: float, rows: Tensor) -> Tensor:
        model, k = self._model, len(self._times)
        stream = "sample/latent" if k == 0 else f"sample/noise/{k}"
        noise = self._streams.normal(stream, rows, model.sample_shape, model.dtype)
        x_t = noise * sigma if k == 0 else (self._states[k - 1][rows].double() + sigma * noise.double()).to(noise.dtype)
        level = torch.full((len(rows),), sigma, dtype=noise.dtype, device=noise.device)
        out: Tensor = model(x_t, level, None if self._cond is None else self._cond[rows])
        return out


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
    """Where the times after the first are looked for: 0.02 to 40 sigma_data, inside the model's own range."""
    low = max(LOWEST * denoiser.sigma_data, denoiser.sigma_min)
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
