"""Samplers: the few-step consistency and jump samplers, and EDM's Heun sampler for the teacher.

All of them work in EDM coordinates, start from ``sigma_max * noise`` (not from N(0, T^2 + sigma_d^2)), keep
the state in float64 and draw noise per sample: sample i depends on the seed and on i alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fewstep.denoiser import LANDING_FLOOR, Denoiser
from fewstep.errors import ConfigError
from fewstep.inference import Model, Noise, Precision, Run, default_batch_size, in_batches
from fewstep.jumps import ddim
from fewstep.types import Samples

__all__ = [
    "MID_SIGMA",
    "Model",
    "Noise",
    "check_times",
    "consistency_sample",
    "default_batch_size",
    "few_step_run",
    "few_step_times",
    "heun_sample",
    "in_batches",
    "jump_sample",
    "jump_times",
    "karras_grid",
    "nfe_run",
    "ode_run",
    "ode_sample",
    "ode_sample_nfe",
    "possible_among",
    "possible_steps",
    "sample",
]

TwoTimeModel = Callable[[Tensor, Tensor, Tensor | None, Tensor], Tensor]

MID_SIGMA = 0.821
"""Second time of the published two-step sampler on CIFAR-10 at sigma_d = 0.5 (math.md 2.6)."""


# ------------------------------------------------------------------------------------------ schedules
def karras_grid(steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> list[float]:
    """EDM's ``steps`` nodes from sigma_max to sigma_min, then 0 (EDM eq. 5; math.md 4.1); NFE 2 steps - 1."""
    if steps < 1:
        raise ConfigError("The number of sampling steps must be at least 1", got=steps)
    if steps == 1:
        return [sigma_max, 0.0]
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return [(high + i / (steps - 1) * (low - high)) ** rho for i in range(steps)] + [0.0]


def few_step_times(denoiser: Denoiser, steps: int) -> list[float]:
    """Noise levels of the model's N-step sampler, largest first.

    The model's own ``sampler_times`` where it carries them; else :func:`jump_times` for a student that jumps. For
    a consistency model sigma_max, followed for two steps by ECT's 0.821 (scaled by sigma_d/0.5), and for more by
    levels spaced evenly in ln sigma around it, from 0.821 * 4^(1 - 2/N) down to 0.821 / 4^(1 - 2/N).

    Raises:
        ConfigError: the student was trained for other numbers of steps only.
    """
    if steps < 1:
        raise ConfigError("The number of sampling steps must be at least 1", got=steps)
    if steps in denoiser.sampler_times:
        return list(denoiser.sampler_times[steps])
    possible = possible_steps(denoiser)
    if possible is not None:
        known = " or ".join(map(str, possible)) or "none, its sampler_times are empty"
        raise ConfigError(
            "This student jumps between the levels it was trained for only", got=f"{steps} steps", want=known
        )
    if denoiser.sampler == "jump":
        return jump_times(denoiser, steps)
    mid = min(MID_SIGMA * denoiser.sigma_data / 0.5, denoiser.sigma_max / 8)  # 4 mid stays below sigma_max
    spread = math.log(4.0) * (1 - 2 / steps)
    count = steps - 1
    offsets = [spread * (1 - 2 * i / (count - 1)) if count > 1 else 0.0 for i in range(count)]
    return [denoiser.sigma_max, *(mid * math.exp(o) for o in offsets)]


def jump_times(denoiser: Denoiser, steps: int) -> list[float]:
    """Upper edges of ``steps`` segments, largest first, the last of which ends in 0.

    ``edge_k = ((1 - k/S) (T^(1/7) - lo^(1/7)) + lo^(1/7))^7`` for k = 0 to S - 1, ``T = sigma_max``,
    ``lo = max(0.002 sigma_d/0.5, sigma_min)``: equal parts of EDM's grid; the edges of 2 S steps contain those of S.
    """
    if steps < 1:
        raise ConfigError("The number of sampling steps must be at least 1", got=steps)
    low = max(LANDING_FLOOR * denoiser.sigma_data / 0.5, denoiser.sigma_min) ** (1 / 7)
    high = denoiser.sigma_max ** (1 / 7)
    return [denoiser.sigma_max, *(((1 - k / steps) * (high - low) + low) ** 7 for k in range(1, steps))]


def possible_steps(denoiser: Denoiser) -> tuple[int, ...] | None:
    """The step counts that this model can be sampled in; None is any.

    A student that jumps without being told where it lands knows only the edges it was trained for.
    """
    if denoiser.sampler == "jump" and not denoiser.two_time:
        return tuple(sorted(denoiser.sampler_times))
    return None


def possible_among(denoiser: Denoiser, wanted: Sequence[int]) -> list[int]:
    """Those of the wanted step counts that this model can be sampled in; all of its own if there are none."""
    known = possible_steps(denoiser)
    return [n for n in wanted if known is None or n in known] or list(known or wanted)


# ----------------------------------------------------------------------------------------- algorithms
def consistency_sample(
    model: Model, latents: Samples, times: Sequence[float], noise: Noise, cond: Tensor | None = None
) -> Samples:
    """Multistep consistency sampling, ``x <- f(t_0 z, t_0); x <- f(x + t_k z_k, t_k)`` (math.md eq. 2.10).

    Args:
        model: ``f(x, sigma, cond)`` in EDM coordinates; NFE is ``len(times)``.
        latents: standard normal noise ``[b, ...]``.
        times: noise levels, decreasing.
        noise: fresh noise for k = 1, 2, ...
    """
    x = model(latents * times[0], _level(times[0], latents), cond).double()
    for k, sigma in enumerate(times[1:], start=1):
        x_t = x + sigma * noise(k).double()
        x = model(x_t.to(latents.dtype), _level(sigma, latents), cond).double()
    return x.to(latents.dtype)


def jump_sample(
    model: Model | TwoTimeModel,
    latents: Samples,
    times: Sequence[float],
    cond: Tensor | None = None,
    *,
    two_time: bool = False,
) -> Samples:
    """Jumps from level to level and then to 0, ``x <- g + (t_{k+1}/t_k) (x - g)`` (math.md 3.5); deterministic.

    Algorithm 2 of Multistep Consistency Models (arXiv 2403.06807), and flow maps with a landing time.

    Args:
        model: ``g(x, sigma, cond)`` in EDM coordinates, with a fourth argument, the level of landing ``[b]``, where
            ``two_time``; NFE is ``len(times)``.
        latents: standard normal noise ``[b, ...]``.
        times: noise levels, decreasing, without the final 0.
    """
    x = latents.double() * times[0]
    for t, s in itertools.pairwise([*times, 0.0]):
        landing = (_level(s, latents),) if two_time else ()
        x = ddim(model(x.to(latents.dtype), _level(t, latents), cond, *landing).double(), x, t, s)
    return x.to(latents.dtype)


def heun_sample(
    model: Model,
    latents: Samples,
    times: Sequence[float],
    noise: Noise | None = None,
    cond: Tensor | None = None,
    *,
    churn: float = 0.0,
    churn_range: tuple[float, float] = (0.0, math.inf),
    churn_noise: float = 1.0,
    order: int = 2,
) -> Samples:
    """EDM's sampler (EDM algorithm 2; math.md 4.1): Heun with optional churn, last step Euler.

    Args:
        model: denoiser ``D(x, sigma, cond)`` in EDM coordinates.
        latents: standard normal noise ``[b, ...]``.
        times: noise levels, decreasing, ending in 0; NFE is ``2 (len(times) - 1) - 1`` (order 2).
        noise: noise of step k = 0, 1, ...; needed only with churn.
        churn: S_churn; churn_range: (S_min, S_max); churn_noise: S_noise.
        order: 2 (Heun) or 1 (Euler).
    """
    steps = len(times) - 1
    gamma_max = min(churn / steps, math.sqrt(2) - 1)
    x = latents.double() * times[0]

    def slope(x: Tensor, sigma: float) -> Tensor:
        return (x - model(x.to(latents.dtype), _level(sigma, latents), cond).double()) / sigma

    for k, (t, t_next) in enumerate(itertools.pairwise(times)):
        gamma = gamma_max if churn_range[0] <= t <= churn_range[1] else 0.0
        t_hat = t * (1 + gamma)
        if gamma > 0:
            if noise is None:
                raise ConfigError("A sampler with churn needs noise")
            x = x + math.sqrt(t_hat**2 - t**2) * churn_noise * noise(k).double()
        d = slope(x, t_hat)
        x_next = x + (t_next - t_hat) * d
        if t_next > 0 and order == 2:
            x_next = x + (t_next - t_hat) * 0.5 * (d + slope(x_next, t_next))
        x = x_next
    return x.to(latents.dtype)


# ------------------------------------------------------------------------------------------ front doors
def few_step_run(denoiser: Denoiser, steps: int = 1, times: Sequence[float] | None = None) -> Run:
    """The model's own few-step sampler in ``steps`` evaluations, or at ``times``.

    Raises:
        ConfigError: times or a step count that this model cannot be sampled in.
    """
    levels = few_step_times(denoiser, steps) if times is None else _check_edges(check_times(times, denoiser), denoiser)

    def run(model: Model, latents: Tensor, noise: Noise, cond: Tensor | None) -> Tensor:
        if denoiser.sampler == "jump":
            return jump_sample(model, latents, levels, cond, two_time=denoiser.two_time)
        return consistency_sample(model, latents, levels, noise, cond)

    return run


def ode_run(
    denoiser: Denoiser, steps: int, order: int = 2, sigma_min: float = 0.002, rho: float = 7.0, churn: float = 0.0
) -> Run:
    """EDM's sampler of a diffusion model on ``steps`` nodes: Heun (``order`` 2) or Euler (1)."""
    grid = karras_grid(steps, max(sigma_min, denoiser.sigma_min), denoiser.sigma_max, rho)

    def run(model: Model, latents: Tensor, noise: Noise, cond: Tensor | None) -> Tensor:
        return heun_sample(model, latents, grid, noise, cond, churn=churn, order=order)

    return run


def nfe_run(denoiser: Denoiser, nfe: int) -> Run:
    """The teacher in exactly ``nfe`` evaluations: Heun where that is odd, Euler where even."""
    return ode_run(denoiser, (nfe + 1) // 2) if nfe % 2 else ode_run(denoiser, nfe, order=1)


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    n: int,
    *,
    steps: int = 1,
    times: Sequence[float] | None = None,
    seed: int = 0,
    cond: Tensor | None = None,
    guidance: float | None = None,
    batch_size: int | None = None,
    first: int = 0,
    precision: Precision = "fp32",
    compile: bool = False,
) -> Samples:
    """``n`` samples in ``steps`` network evaluations, ``[n, ...]`` in model space.

    Args:
        denoiser: a few-step student, sampled by its own ``sampler`` (any denoiser works; a diffusion model gives
            blurred means).
        times: EDM noise levels, decreasing; default :func:`few_step_times`.
        cond: class indices ``[n]`` or one-hot ``[n, num_classes]``.
        guidance: strength w. A student that was tuned for a range of strengths is told it, at no cost. Others are
            guided by ``f_u + w (f_c - f_u)``, which doubles the evaluations and on consistency models is a heuristic:
            the guided flow's end point is not linear in w (math.md 3.4).
        batch_size: how many samples at once; changes nothing in the result but the rounding.
        first: the number of the first sample; ``first=k`` gives samples k, k + 1, ... of a longer call.
        precision: arithmetic of the network: "fp32", "tf32", "fp16", "bf16", or "auto" (fp16 on a GPU, else fp32).
        compile: run the network through ``torch.compile``, in batches of one shape; the first one takes minutes.
            Without a compiler it runs as it is, with a :class:`fewstep.compiling.CompileFallback` warning.
    """
    run = few_step_run(denoiser, steps, times)
    return in_batches(run, denoiser, n, seed, cond, guidance, batch_size, first, precision, compile)


@torch.no_grad()
def ode_sample(
    denoiser: Denoiser,
    n: int,
    *,
    steps: int = 18,
    seed: int = 0,
    cond: Tensor | None = None,
    guidance: float | None = None,
    batch_size: int | None = None,
    sigma_min: float = 0.002,
    rho: float = 7.0,
    churn: float = 0.0,
    order: int = 2,
    first: int = 0,
    precision: Precision = "fp32",
    compile: bool = False,
) -> Samples:
    """``n`` samples of a diffusion model by EDM's Heun sampler, ``[n, ...]``; NFE ``2 steps - 1``.

    ``steps=18`` is EDM's CIFAR-10 setting (35 NFE), ``steps=1`` the denoiser itself; ``order=1`` is Euler, one
    evaluation per step. Same noise per seed and index as :func:`sample`, and the same ``first``, ``precision`` and
    ``compile``.
    """
    run = ode_run(denoiser, steps, order, sigma_min, rho, churn)
    return in_batches(run, denoiser, n, seed, cond, guidance, batch_size, first, precision, compile)


@torch.no_grad()
def ode_sample_nfe(
    denoiser: Denoiser,
    n: int,
    nfe: int,
    *,
    seed: int = 0,
    cond: Tensor | None = None,
    guidance: float | None = None,
    batch_size: int | None = None,
    first: int = 0,
    precision: Precision = "fp32",
    compile: bool = False,
) -> Samples:
    """The teacher in exactly ``nfe`` evaluations (guided: twice as many): Heun where nfe is odd, Euler where even."""
    run = nfe_run(denoiser, nfe)
    return in_batches(run, denoiser, n, seed, cond, guidance, batch_size, first, precision, compile)


def check_times(times: Sequence[float], denoiser: Denoiser) -> list[float]:
    """``times`` as a list, or an error if they are not positive, decreasing and within sigma_max."""
    levels = [float(t) for t in times]
    decreasing = all(a > b for a, b in itertools.pairwise(levels))
    if not levels or not decreasing or not (levels[-1] > 0 and levels[0] <= denoiser.sigma_max * (1 + 1e-6)):
        raise ConfigError(
            "The sampling times cannot be used",
            got=levels,
            want=f"decreasing noise levels in (0, {denoiser.sigma_max:g}], largest first",
        )
    return levels


def _check_edges(levels: list[float], denoiser: Denoiser) -> list[float]:
    """``levels``, or an error if this student lands elsewhere when it jumps from them."""
    if possible_steps(denoiser) is not None:
        own = few_step_times(denoiser, len(levels))
        if not all(math.isclose(a, b, rel_tol=1e-6) for a, b in zip(levels, own, strict=True)):
            raise ConfigError("This student jumps between the levels it was trained for only", got=levels, want=own)
    return levels


def _level(sigma: float, like: Tensor) -> Tensor:
    return torch.full((len(like),), sigma, dtype=like.dtype, device=like.device)
