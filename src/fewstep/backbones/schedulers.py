"""What a diffusers scheduler says about the network it was made for: process, prediction, time, range of noise.

Schedulers mix two things. How the data was noised and what the network predicts belongs to the network and is read
here. The grid of the sampler (spacing, Karras sigmas, shift, clipping, thresholding) does not change what the network
means, and is ignored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from fewstep.denoiser import Parametrization, TimeMap
from fewstep.errors import ConfigError, nearest
from fewstep.process import EDM, DiscreteVP, Process, RectifiedFlow, cosine_betas

Choice = TypeVar("Choice")

DISCRETE = (
    "DDPMScheduler", "DDPMParallelScheduler", "DDIMScheduler", "DDIMParallelScheduler", "DDIMInverseScheduler",
    "PNDMScheduler", "DPMSolverMultistepScheduler", "DPMSolverMultistepInverseScheduler",
    "DPMSolverSinglestepScheduler", "DPMSolverSDEScheduler", "DEISMultistepScheduler", "UniPCMultistepScheduler",
    "SASolverScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler",
    "LMSDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "LCMScheduler", "TCDScheduler",
)  # fmt: skip
"""Schedulers of networks that were trained on a table of betas."""

PRECONDITIONED = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
FLOW = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler")
CONSISTENCY = ("CMStochasticIterativeScheduler",)
KNOWN = (*DISCRETE, *PRECONDITIONED, *FLOW, *CONSISTENCY)

PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0", "original_sample": "x0"}
"""diffusers' name -> ours, for networks that were trained on a table of betas."""

_BETAS: dict[str, Callable[[float, float, int], Tensor]] = {
    "linear": lambda low, high, n: torch.linspace(low, high, n, dtype=torch.float32),
    "scaled_linear": lambda low, high, n: torch.linspace(low**0.5, high**0.5, n, dtype=torch.float32) ** 2,
    "squaredcos_cap_v2": lambda low, high, n: cosine_betas(n).float(),
    "sigmoid": lambda low, high, n: torch.linspace(-6, 6, n, dtype=torch.float32).sigmoid() * (high - low) + low,
}
"""In float32, as diffusers computes them: the networks were trained on these roundings."""


@dataclass(frozen=True)
class Schedule:
    """What a network of diffusers means; ``c_in`` follows from ``prediction`` (:meth:`Parametrization.c_in`).

    Args:
        process: of the training.
        prediction: a member of ``process.PREDICTIONS``. EDM's networks with "v_prediction" return -F, which is
            TrigFlow's network: "trig".
        time: what the network is told, ``timestep`` in diffusers' words.
        sigma_min, sigma_max: EDM noise levels of the training.
        sigma_data: of the preconditioning; None where it has none.
        boundary_shift: of a consistency model (:class:`Parametrization`).
        shift: of a flow model: samplers move their grid to ``shift t/(1 + (shift - 1) t)``. It is not part of the
            process; a law of t may use it, since it multiplies EDM's noise levels. Where the shift depends on the size
            of the image, that of the largest (1024 pixels).
    """

    process: Process
    prediction: str
    time: TimeMap
    sigma_min: float
    sigma_max: float
    sigma_data: float | None = None
    boundary_shift: float = 0.0
    shift: float = 1.0

    def parametrization(self, sigma_data: float) -> Parametrization:
        """For data of that standard deviation; the preconditioning's own wins.

        A network that predicts x_0 is blended as in :meth:`fewstep.Denoiser.from_module`, so that D(x, 0) = x.
        """
        own = self.sigma_data or sigma_data
        blend = max(self.sigma_min, 0.004 * own) if self.prediction == "x0" else 0.0
        return Parametrization(self.prediction, own, self.time, self.boundary_shift, blend)


def read_schedule(config: Mapping[str, Any]) -> Schedule:
    """The schedule of a ``scheduler_config.json``.

    Args:
        config: with ``_class_name``; what is missing has diffusers' default.

    Raises:
        ConfigError: a scheduler, prediction type or beta schedule that is not known here, or unusable numbers.
    """
    name = str(config.get("_class_name"))
    if name not in KNOWN:
        raise ConfigError(f"The scheduler '{name}' does not say in known terms what the network predicts",
                          do=nearest(name, KNOWN))  # fmt: skip
    try:
        if name in FLOW or config.get("use_flow_sigmas"):
            return _flow(config)
        if name in PRECONDITIONED:
            return _preconditioned(config)
        if name in CONSISTENCY:
            return _consistency(config)
        if config.get("timestep_type") == "continuous" and config.get("prediction_type") == "v_prediction":
            return _continuous(config)
        return _discrete(config)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ConfigError(f"The settings of the {name} cannot be used: {error}") from error


def _discrete(config: Mapping[str, Any]) -> Schedule:
    """A table of betas; time is the index. Its first and last noise levels are the range."""
    prediction = _choose("prediction type", config.get("prediction_type", "epsilon"), PREDICTIONS)
    betas = config.get("trained_betas")
    if betas is None:
        kind = _choose("beta schedule", config.get("beta_schedule", "linear"), _BETAS)
        low, high = float(config.get("beta_start", 0.0001)), float(config.get("beta_end", 0.02))
        table = kind(low, high, int(config.get("num_train_timesteps", 1000)))
    else:
        table = torch.tensor(betas, dtype=torch.float32)
    process = DiscreteVP.from_betas(table, zero_terminal_snr=bool(config.get("rescale_betas_zero_snr")))
    return Schedule(process, prediction, "native", *process.edm_range)


def _preconditioned(config: Mapping[str, Any]) -> Schedule:
    """EDM's preconditioning, ``c_noise = ln(sigma)/4``; with "v_prediction" diffusers turns the sign of c_out."""
    known = {"epsilon": "edm", "v_prediction": "trig"}
    prediction = _choose("prediction type", config.get("prediction_type", "epsilon"), known)
    return Schedule(EDM(), prediction, "quarter_log", *_range(config), float(config.get("sigma_data", 0.5)))


def _continuous(config: Mapping[str, Any]) -> Schedule:
    """EulerDiscreteScheduler on continuous times: v-prediction told ln(sigma)/4, TrigFlow's network at sigma_d = 1."""
    return Schedule(EDM(), "trig", "quarter_log", *_range(config), 1.0)


def _consistency(config: Mapping[str, Any]) -> Schedule:
    """A consistency model with EDM's preconditioning, told 250 ln(sigma), shifted by its sigma_min."""
    low, high = _range(config)
    own = float(config.get("sigma_data", 0.5))
    return Schedule(EDM(), "edm", "quarter_log_thousand", 0.0, high, own, boundary_shift=low)


def _flow(config: Mapping[str, Any]) -> Schedule:
    """Rectified flow on all t in [0, 1], told 1000 t; ``shift`` and dynamic shifting only move the sampler's grid."""
    _choose("prediction type", config.get("prediction_type", "flow_prediction"), {"flow_prediction": "flow"})
    if int(config.get("num_train_timesteps", 1000)) != 1000:
        raise ConfigError(
            "A flow model must be told 1000 t", got=f"num_train_timesteps {config['num_train_timesteps']}"
        )
    if config.get("invert_sigmas"):
        raise ConfigError("A flow model with inverted time is not supported", got="invert_sigmas: true")
    shift = float(config.get("flow_shift" if config.get("use_flow_sigmas") else "shift") or 1.0)
    if config.get("use_dynamic_shifting"):
        shift = math.exp(float(config.get("max_shift") or 1.15))
    return Schedule(RectifiedFlow(), "flow", "thousand", 0.0, math.inf, shift=shift)


def _range(config: Mapping[str, Any]) -> tuple[float, float]:
    """EDM's sigma_min and sigma_max, diffusers' defaults where they are not said."""
    low, high = (config.get(name) for name in ("sigma_min", "sigma_max"))
    return 0.002 if low is None else float(low), 80.0 if high is None else float(high)


def _choose(what: str, name: Any, known: Mapping[str, Choice]) -> Choice:
    if name not in known:
        raise ConfigError(f"The scheduler's {what} '{name}' is not known", do=nearest(str(name), known))
    return known[name]
