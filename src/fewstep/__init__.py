"""fewstep: turns a pretrained diffusion model into a generator of 1, 2, 4 or 8 network evaluations.

Public names are loaded on first use, so that ``import fewstep`` and ``fewstep --help`` stay quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fewstep.backbones import BACKBONES
    from fewstep.checkpoint.convert import convert
    from fewstep.checkpoint.model import load, save_model
    from fewstep.data import SOURCES, open_source
    from fewstep.denoiser import Denoiser, Guided, Parametrization
    from fewstep.errors import FewstepError
    from fewstep.evaluation import evaluate
    from fewstep.objectives import OBJECTIVES
    from fewstep.process import EDM, VP, DiscreteVP, Process, RectifiedFlow, TrigFlow
    from fewstep.recipes import RECIPES
    from fewstep.runs import Run, pretrain, resume, tune
    from fewstep.sampling import ode_sample, sample

_HOMES = {
    "BACKBONES": "backbones",
    "convert": "checkpoint.convert",
    "load": "checkpoint.model",
    "save_model": "checkpoint.model",
    "SOURCES": "data",
    "open_source": "data",
    "Denoiser": "denoiser",
    "Guided": "denoiser",
    "Parametrization": "denoiser",
    "FewstepError": "errors",
    "evaluate": "evaluation",
    "OBJECTIVES": "objectives",
    "EDM": "process",
    "VP": "process",
    "DiscreteVP": "process",
    "Process": "process",
    "RectifiedFlow": "process",
    "TrigFlow": "process",
    "RECIPES": "recipes",
    "Run": "runs",
    "pretrain": "runs",
    "resume": "runs",
    "tune": "runs",
    "ode_sample": "sampling",
    "sample": "sampling",
}

__all__ = [
    "BACKBONES", "EDM", "OBJECTIVES", "RECIPES", "SOURCES", "VP", "Denoiser", "DiscreteVP", "FewstepError", "Guided",
    "Parametrization", "Process", "RectifiedFlow", "Run", "TrigFlow", "convert", "evaluate", "load", "ode_sample",
    "open_source", "pretrain", "resume", "sample", "save_model", "tune",
]  # fmt: skip


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'fewstep' has no attribute '{name}'")
    return getattr(importlib.import_module(f"fewstep.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
