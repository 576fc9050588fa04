"""Early commit: deterministic samplers that stop per sample, once the rest of the trajectory cannot move it far.

The chain is the teacher's probability-flow ODE (Heun or Euler) or the deterministic multistep sampler of a few-step
model. ``D_k = D(x_k, t_k)`` is what the chain would end in if nothing more were learned after step k. Two rules
(math.md 4.5) decide when it may be taken: the posterior spread read off the denoiser's slope, or the geometric tail
of its changes. That ``D_k`` barely moved is no reason to stop: at high noise it stands still because it is still the
mean of the data (18 nodes, Gaussian: it moves by .017 at sigma = 5.3, where the error is .453).

The rules assume: a deterministic trajectory (no churn, no fresh noise); a denoiser close to the posterior mean
("confidence"); changes that decay geometrically ("extrapolation"). A tolerance is a root mean square over pixels in
model units, which says little about perceptual quality.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.denoiser import Denoiser
from fewstep.errors import ConfigError, nearest
from fewstep.sampling import Model, Noise, check_times, few_step_times, in_batches, karras_grid
from fewstep.types import PerSample, Samples

Denoise = Callable[[Samples, float, Tensor | None], Samples]
"""``D(x, sigma, cond)`` on a float64 state at one noise level."""

SOLVERS = {"heun": 2, "euler": 1, "multistep": 1}
"""Deterministic chains -> evaluations per step."""

STOCHASTIC = ("consistency", "churn", "ancestral", "sde", "stochastic")
DEMAND = (0.25, 0.5, 1.0)
"""Share of the tolerance that is granted in the first, middle and last third of the steps."""


@dataclass(frozen=True)
class Committed:
    """What :func:`commit_sample` returns, in the order of the samples' numbers.

    Args:
        samples: ``[n, ...]`` in model space.
        nfe: network evaluations that each took, probes included, int64 ``[n]``.
        stopped_at: EDM noise level at which each was committed, float64 ``[n]``; 0.0 for those that ran to the end.
    """

    samples: Samples
    nfe: Tensor
    stopped_at: Tensor


# --------------------------------------------------------------------------------------- front door
@torch.no_grad()
def commit_sample(
    denoiser: Denoiser,
    n: int,
    *,
    times: Sequence[float] | None = None,
    nodes: int = 18,
    solver: str = "heun",
    rule: str = "confidence",
    tol: float = 0.02,
    probes: int | None = None,
    seed: int = 0,
    cond: Tensor | None = None,
    batch_size: int | None = None,
    first: int = 0,
) -> Committed:
    """``n`` samples of a deterministic chain that stops per sample at the first k where the rule holds; gives ``D_k``.

    confidence:     ``c_k <= tol_k``, the posterior's spread (:func:`posterior_variance`); a probe is an evaluation
    extrapolation:  ``rho < 1``, ``t_k < sigma_d`` and ``delta_k rho/(1 - rho) <= tol_k`` (:func:`tail`), where
                    ``delta_k = |D_k - D_{k-1}|/sqrt(d)`` and ``rho = delta_k/delta_{k-1}``; no extra evaluations

    with ``tol_k = tol {1/4, 1/2, 1}`` in the first, middle and last third of the steps. A probe is spent only where it
    can pay: once ``t < sigma_d``, while more evaluations are left than it costs, and after a refusal at (t, c) not
    before ``t' c/t <= tol'`` (c/t grows towards low noise on a Gaussian). That can delay a commit, never allow one.
    Finished samples leave the batch. Source: math.md 4.5, eq. 4.1 (after Prophet's early commit for text).

    Args:
        denoiser: a diffusion model; with ``solver="multistep"`` a few-step model trained for deterministic steps.
        times: EDM noise levels, decreasing, without the final 0. Default: ``karras_grid(nodes)``; for "multistep"
            the few-step times of ``nodes`` steps.
        nodes: steps of the full chain, which takes ``2 nodes - 1`` (Heun) or ``nodes`` evaluations.
        solver: "heun", "euler", or "multistep": ``x <- D + (t'/t)(x - D)`` over the few-step times (math.md 2.9).
        rule: "confidence" (diffusion models only) or "extrapolation".
        tol: root mean square over the values of a sample, model units; 0 runs the full chain, to the same bits.
        probes: evaluations per look of "confidence", averaged. Default: 1 from 64 values per sample up, else 4
            (2 or 1 for samples of two values or one); exact for samples of at most 4 values.
        seed, cond, batch_size, first: as in :func:`fewstep.sampling.sample`, with the same noise.

    Raises:
        ConfigError: a sampler with fresh noise, an unknown solver or rule, or numbers that cannot be used; a student
            that jumps.
    """
    _check(solver, rule, tol, probes)
    require_end(denoiser)
    if times is not None:
        grid = [*check_times(times, denoiser), 0.0]
    elif solver == "multistep":
        grid = [*few_step_times(denoiser, nodes), 0.0]
    else:
        grid = karras_grid(nodes, max(0.002, denoiser.sigma_min), denoiser.sigma_max)
    looks = _Looks(rule, tol, probes or default_probes(denoiser.sample_shape), denoiser.sigma_data)
    counts, levels = [], []

    def run(model: Model, latents: Tensor, noise: Noise, cond: Tensor | None) -> Tensor:
        found = _chain(model, latents, grid, noise, cond, looks, SOLVERS[solver])
        counts.append(found.nfe)
        levels.append(found.stopped_at)
        return found.samples

    samples = in_batches(run, denoiser, n, seed, cond, None, batch_size, first)
    return Committed(samples, torch.cat(counts), torch.cat(levels))


def require_end(denoiser: Denoiser) -> None:
    """Refuse a student that jumps from level to level: its output is no estimate of the end of its trajectory.

    Raises:
        ConfigError: it is one.
    """
    if denoiser.sampler == "jump":
        raise ConfigError(
            "This student jumps from level to level: what its network returns aims at where it lands, not at the end"
            " of the trajectory, so a chain of it can neither stop early nor be another sampler's",
            do="Draw from it without --sampler and --commit",
        )


def default_probes(shape: tuple[int, ...]) -> int:
    """Probes per look for samples of ``shape``: 1 where d >= 64 averages for itself, else what is exact, at most 4."""
    d = math.prod(shape)
    return 1 if d >= 64 else {1: 1, 2: 2}.get(d, 4)


def posterior_variance(
    denoise: Denoise,
    x: Samples,
    sigma: float,
    clean: Samples,
    signs: Tensor,
    width: float,
    *,
    probes: int = 1,
    cond: Tensor | None = None,
) -> PerSample:
    """``c^2 = sigma^2 tr(dD/dx)/d = tr Cov[x_0 | x]/d``, ``[b]`` (math.md eq. 4.1), in squared model units.

    Each probe is ``sigma^2 v^T (D(x + width v) - D(x)) / (width d)``, v = +-1: Hutchinson's estimator, whose mean
    over signs is that trace. The probes of one look take ``signs`` times the rows of a Hadamard matrix, which are
    orthogonal: what one counts too much of the off-diagonal another counts too little, and with ``probes`` = 1, 2,
    4, ... >= d none is left.

    Args:
        denoise: the denoiser; x: ``[b, ...]`` float64; clean: ``D(x, sigma)``.
        signs: random signs ``[b, ...]``, one draw per sample and look.
        width: length of the difference per value, about ``0.01 sigma``.
    """
    place = torch.arange(x[0].numel(), device=x.device).reshape(x.shape[1:])
    total = torch.zeros(len(x), dtype=x.dtype, device=x.device)
    for probe in range(probes):
        v = signs * _hadamard_row(probe, place)
        change = denoise(x + width * v, sigma, cond) - clean
        total += (v * change).flatten(1).mean(1)
    return sigma**2 * total / (width * probes)


def _hadamard_row(row: int, place: Tensor) -> Tensor:
    """Entries ``(-1)^popcount(row & place)`` of Sylvester's Hadamard matrix, int64, shape of ``place``."""
    odd, bits = torch.zeros_like(place), place & row
    while row:
        odd, bits, row = odd ^ (bits & 1), bits >> 1, row >> 1
    return 1 - 2 * odd


# -------------------------------------------------------------------------------------------- chain
@dataclass(frozen=True)
class _Looks:
    """When a chain looks at its samples, and with what: the rule and its settings."""

    rule: str
    tol: float
    probes: int
    sigma_data: float


@dataclass
class _Alive:
    """The samples that are still on their way, one row each.

    Args:
        rows: place in the batch; x: state, float64; clean: ``D_k``.
        moved: ``delta_k``; before: ``delta_{k-1}``; NaN where there is none yet.
        slope: ``c/t`` of the last look that refused, 0 before the first.
    """

    rows: Tensor
    cond: Tensor | None
    x: Tensor
    clean: Tensor
    moved: Tensor
    before: Tensor
    slope: Tensor

    @classmethod
    def start(cls, x: Tensor, cond: Tensor | None) -> _Alive:
        nothing = torch.full((len(x),), math.nan, dtype=x.dtype, device=x.device)
        rows = torch.arange(len(x), device=x.device)
        return cls(rows, cond, x, torch.full_like(x, math.nan), nothing, nothing, torch.zeros_like(nothing))

    def see(self, clean: Tensor) -> None:
        """Take in ``D_k``."""
        self.before, self.moved = self.moved, (clean - self.clean).flatten(1).square().mean(1).sqrt()
        self.clean = clean

    def keep(self, rows: Tensor) -> _Alive:
        """Those rows alone."""
        cond = None if self.cond is None else self.cond[rows]
        parts = (self.x, self.clean, self.moved, self.before, self.slope)
        return _Alive(self.rows[rows], cond, *(part[rows] for part in parts))


@dataclass(frozen=True)
class _Step:
    """Where a chain is: step k at noise level t, the tolerance there, the evaluations left to a full chain's end."""

    denoise: Denoise
    noise: Noise
    k: int
    t: float
    tol: float
    left: int


def _chain(
    model: Model,
    latents: Samples,
    times: Sequence[float],
    noise: Noise,
    cond: Tensor | None,
    looks: _Looks,
    order: int,
) -> Committed:
    """One batch; the arithmetic of ``heun_sample`` without churn. Order 1 (Euler) is also the multistep step."""

    def denoise(x: Tensor, sigma: float, cond: Tensor | None) -> Tensor:
        level = torch.full((len(x),), sigma, dtype=latents.dtype, device=latents.device)
        return model(x.to(latents.dtype), level, cond).double()

    alive = _Alive.start(latents.double() * times[0], cond)
    out, nfe = torch.empty_like(latents), torch.zeros_like(alive.rows)
    stopped_at = torch.zeros(len(latents), dtype=torch.float64, device=latents.device)
    steps = len(times) - 1
    for k, (t, t_next) in enumerate(itertools.pairwise(times)):
        alive.see(denoise(alive.x, t, alive.cond))
        nfe[alive.rows] += 1
        if looks.tol > 0 and t_next > 0:
            step = _Step(denoise, noise, k, t, looks.tol * DEMAND[3 * k // steps], order * (steps - 1 - k))
            done, spent = _RULES[looks.rule](alive, looks, step)
            nfe[alive.rows] += spent
            out[alive.rows[done]] = alive.clean[done].to(out.dtype)
            stopped_at[alive.rows[done]] = t
            alive = alive.keep(~done)
            if not len(alive.rows):
                break
        d = (alive.x - alive.clean) / t
        x_next = alive.x + (t_next - t) * d
        if t_next > 0 and order == 2:
            d_next = (x_next - denoise(x_next, t_next, alive.cond)) / t_next
            x_next = alive.x + (t_next - t) * 0.5 * (d + d_next)
            nfe[alive.rows] += 1
        alive.x = x_next
    out[alive.rows] = alive.x.to(out.dtype)
    return Committed(out, nfe, stopped_at)


# -------------------------------------------------------------------------------------------- rules
def _confidence(alive: _Alive, looks: _Looks, step: _Step) -> tuple[Tensor, Tensor]:
    done, spent = torch.zeros_like(alive.rows, dtype=torch.bool), torch.zeros_like(alive.rows)
    due = torch.nonzero(alive.slope * step.t <= step.tol).flatten()
    if step.t >= looks.sigma_data or step.left <= looks.probes or not len(due):
        return done, spent
    at, noise = alive.keep(due), step.noise(step.k)
    signs = torch.where(noise[at.rows] < 0, -1.0, 1.0).double()
    width = _width(step.t, noise.dtype, looks.sigma_data)
    variance = posterior_variance(step.denoise, at.x, step.t, at.clean, signs, width, probes=looks.probes, cond=at.cond)
    spread = variance.clamp_min(0).sqrt()
    done[due] = (variance >= 0) & (spread <= step.tol)  # a variance below 0 is no posterior's: it shows nothing
    alive.slope[due] = spread / step.t
    spent[due] = looks.probes
    return done, spent


def _extrapolation(alive: _Alive, looks: _Looks, step: _Step) -> tuple[Tensor, Tensor]:
    done = (tail(alive.moved, alive.before) <= step.tol) & (step.t < looks.sigma_data)
    return done, torch.zeros_like(alive.rows)


_Rule = Callable[[_Alive, _Looks, _Step], tuple[Tensor, Tensor]]
"""-> which rows are done, and the probes that each has cost."""

_RULES: dict[str, _Rule] = {"confidence": _confidence, "extrapolation": _extrapolation}
RULES = tuple(_RULES)


def tail(moved: PerSample, before: PerSample) -> PerSample:
    """``delta rho/(1 - rho)``, rho = moved/before: what is left of changes that decay geometrically; inf if rho >= 1.

    Not a number (which is no evidence either) where there was no change before.
    """
    ratio = moved / before
    return torch.where(ratio >= 1, torch.inf, moved * ratio / (1 - ratio))


def _width(t: float, dtype: torch.dtype, sigma_data: float) -> float:
    """``0.01 t``, but no less than what survives rounding of values of about sigma_d, and no more than t."""
    return min(t, max(0.01 * t, math.sqrt(torch.finfo(dtype).eps) * sigma_data))


def _check(solver: str, rule: str, tol: float, probes: int | None) -> None:
    if solver in STOCHASTIC:
        raise ConfigError(
            f"A sampler with fresh noise ('{solver}') cannot commit early: its consecutive outputs differ by that"
            " noise, so that they never settle",
            want=f"a deterministic chain: {', '.join(SOLVERS)}",
        )
    if solver not in SOLVERS:
        raise ConfigError(f"There is no deterministic chain '{solver}'", do=nearest(solver, SOLVERS))
    if rule not in _RULES:
        raise ConfigError(f"There is no rule '{rule}' for an early commit", do=nearest(rule, _RULES))
    if not 0 <= tol < math.inf:
        raise ConfigError("The tolerance of an early commit must be a number of at least 0", got=tol)
    if probes is not None and probes < 1:
        raise ConfigError("An early commit by confidence needs at least 1 probe", got=probes)
    if solver == "multistep" and rule == "confidence" and tol > 0:
        raise ConfigError(
            "The confidence rule reads the posterior spread off a denoiser's slope; the output of a few-step model is"
            " the end of a trajectory, whose slope means something else",
            do="Use the extrapolation rule, or for a diffusion model the solver 'euler' with these times",
        )
