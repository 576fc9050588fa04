"""Schedulers of diffusers that take the steps of a student, and the arguments that lead them to its noise levels.

All of them are exact: f with fresh noise between the steps (:func:`fewstep.sampling.consistency_sample`), or straight
jumps (:func:`fewstep.sampling.jump_sample`), in the coordinates of the network.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from fewstep.backbones.hf import library
from fewstep.denoiser import Denoiser
from fewstep.process import DiscreteVP, RectifiedFlow
from fewstep.sampling import few_step_times

RAMP = 2**16 + 1
"""Points of the ramp of noise levels of a consistency scheduler: levels are met within 1e-4 of their size."""

SURE = 2.0**30
"""``timestep_scaling`` with which LCMScheduler's own boundary condition is c_skip < 3e-19, c_out = 1 from t = 1 on."""

TABLES = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
"""Predictions of networks that were trained on a table of betas -> diffusers' names."""


@dataclass(frozen=True)
class Stepping:
    """A scheduler, and how it is told noise levels.

    Args:
        scheduler: diffusers' own.
        argument: of its ``set_timesteps``, and of pipelines that pass it on: "timesteps" or "sigmas".
        process: of ``timesteps`` that are an index or a time; None where they are 250 ln sigma.
        factor: that the scheduler multiplies EDM's noise levels by (``shift`` of a flow model).
        spread: what the pipeline makes of ``num_inference_steps``; "own" leaves it to the scheduler.
    """

    scheduler: Any
    argument: Literal["timesteps", "sigmas"]
    process: DiscreteVP | RectifiedFlow | None = None
    factor: float = 1.0
    spread: Literal["own", "even"] = "own"

    def told(self, levels: Sequence[float]) -> list[float]:
        """The argument for EDM noise levels, largest first, as near to them as the scheduler can be.

        EulerDiscreteScheduler wants the final 0, too.
        """
        if isinstance(self.process, RectifiedFlow):
            return [level / (self.factor + level) for level in levels]
        if self.argument == "sigmas":
            return [*levels, 0.0]
        if self.process is None:
            return sorted((self._on_ramp(level) for level in levels), reverse=True)
        last = self.scheduler.config.original_inference_steps - 1
        index = self.process.from_edm(torch.tensor(levels, dtype=torch.float64))
        return [min(int(i), last) for i in index.round()]

    def visited(self, told: Sequence[float] | int) -> list[float]:
        """EDM noise levels of the steps, for the argument or for ``num_inference_steps``."""
        if isinstance(told, int) and self.spread == "even":
            told = np.linspace(1.0, 1 / told, told).tolist()
        if isinstance(told, int):
            self.scheduler.set_timesteps(told)
        else:
            self.scheduler.set_timesteps(**{self.argument: list(told)})
        times = self.scheduler.timesteps.double()
        if isinstance(self.process, RectifiedFlow):
            t = times / 1000
            return (t / (1 - t)).tolist()
        if self.process is None:
            return (times / 250).exp().tolist()
        return self.process.to_edm(times).tolist()

    def scale(self, level: float) -> float:
        """The scheduler's state over EDM's x; 1 where its noise is not bounded."""
        if self.process is None or (isinstance(self.process, DiscreteVP) and self.argument == "sigmas"):
            return 1.0
        return float(self.process.edm_scale(torch.tensor(level, dtype=torch.float64)))

    def _on_ramp(self, level: float) -> int:
        config = self.scheduler.config
        high, low, x = (v ** (1 / config.rho) for v in (config.sigma_max, config.sigma_min, level))
        return round((high - x) / (high - low) * (RAMP - 1))


def stepping_of(denoiser: Denoiser, spread: Literal["own", "even"] = "own") -> Stepping | None:
    """The scheduler for a student; None where diffusers has none.

    Two steps of the plain call, ``num_inference_steps=2``, are the student's own two where the scheduler lets them be
    chosen: consistency schedulers by ``rho``, flow schedulers by ``shift``. LCMScheduler halves its table.

    Args:
        spread: "even" for a pipeline that turns ``num_inference_steps`` into even sigmas itself (Flux).
    """
    p, process, jumps = denoiser.parametrization, denoiser.native, denoiser.sampler == "jump"
    if p.prediction == "edm" and p.time == "quarter_log_thousand" and not jumps:
        return _consistency(denoiser)
    if isinstance(process, DiscreteVP) and p.prediction in TABLES and p.time == "native":
        return _euler(denoiser, process) if jumps else _latent_consistency(denoiser, process)
    if isinstance(process, RectifiedFlow) and p.prediction == "flow" and p.time == "thousand":
        return _flow(denoiser, process, jumps, spread)
    return None


def _consistency(denoiser: Denoiser) -> Stepping:
    """With ``sigma_min=0`` (else the student's boundary shift), which is exact; with the default 0.002 it is not."""
    p = denoiser.parametrization
    mid, low = few_step_times(denoiser, 2)[1], p.boundary_shift
    scheduler = library().CMStochasticIterativeScheduler(
        num_train_timesteps=RAMP,
        sigma_min=low,
        sigma_max=denoiser.sigma_max,
        sigma_data=p.sigma_data,
        rho=_rho(denoiser.sigma_max, mid, low),
        clip_denoised=False,
    )
    return Stepping(scheduler, "timesteps")


def _rho(top: float, mid: float, low: float) -> float:
    """The exponent of the ramp with ``mid`` halfway, ``((top^(1/rho) + low^(1/rho))/2)^rho``; 7 if there is none."""

    def halfway(rho: float) -> float:
        return ((top ** (1 / rho) + low ** (1 / rho)) / 2) ** rho

    least, most = 1.0, 100.0
    if not halfway(most) < mid < halfway(least):
        return 7.0
    for _ in range(60):
        rho = (least + most) / 2
        least, most = (rho, most) if halfway(rho) > mid else (least, rho)
    return least


def _latent_consistency(denoiser: Denoiser, process: DiscreteVP) -> Stepping:
    """``original_inference_steps``: the table up to sigma_max, above half of it, so that every entry can be visited."""
    count = len(process.alphas_cumprod)
    top = int(process.from_edm(torch.tensor(denoiser.sigma_max, dtype=torch.float64)))
    scheduler = library().LCMScheduler(
        num_train_timesteps=count,
        trained_betas=_betas(process),
        prediction_type=TABLES[denoiser.parametrization.prediction],
        original_inference_steps=max(top, count // 2) + 1,
        timestep_scaling=SURE,
        clip_sample=False,
        set_alpha_to_one=False,
    )
    return Stepping(scheduler, "timesteps", process)


def _euler(denoiser: Denoiser, process: DiscreteVP) -> Stepping:
    """Euler steps are jumps: ``x + (s - t)(x - g)/t = g + (s/t)(x - g)``."""
    scheduler = library().EulerDiscreteScheduler(
        num_train_timesteps=len(process.alphas_cumprod),
        trained_betas=_betas(process),
        prediction_type=TABLES[denoiser.parametrization.prediction],
        timestep_spacing="trailing",
    )
    return Stepping(scheduler, "sigmas", process)


def _betas(process: DiscreteVP) -> list[float]:
    alphas = np.array([1.0, *process.alphas_cumprod])
    return (1 - alphas[1:] / alphas[:-1]).tolist()


def _flow(denoiser: Denoiser, process: RectifiedFlow, jumps: bool, spread: Literal["own", "even"]) -> Stepping:
    """``shift`` multiplies EDM's noise levels: once on even sigmas 1, 1/2, twice on the scheduler's own 1, 1/1000."""
    mid = 1.0 if jumps else few_step_times(denoiser, 2)[1]
    shift = 1.0 if jumps else mid if spread == "even" else math.sqrt(999 * mid)
    scheduler = library().FlowMatchEulerDiscreteScheduler(shift=shift, stochastic_sampling=not jumps)
    return Stepping(scheduler, "sigmas", process, factor=shift, spread=spread)
