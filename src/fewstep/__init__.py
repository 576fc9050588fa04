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
    from fewstep.commit import Committed, commit_sample
    from fewstep.data import SOURCES, open_source
    from fewstep.denoiser import Denoiser, Parametrization
    from fewstep.errors import FewstepError
    from fewstep.evaluation import METRICS, Reference, evaluate, evaluate_samples, open_reference
    from fewstep.evaluation.agreement import teacher_agreement
    from fewstep.exports.export import export
    from fewstep.guidance import Guided
    from fewstep.objectives import OBJECTIVES
    from fewstep.process import EDM, VP, DiscreteVP, Process, RectifiedFlow, TrigFlow
    from fewstep.recipes import RECIPES
    from fewstep.runs import Run, pretrain, resume, tune
    from fewstep.sampling import ode_sample, sample
    from fewstep.training.synthetic import generate

_HOMES = {
    "BACKBONES": "backbones",
    "convert": "checkpoint.convert",
    "load": "checkpoint.model",
    "save_model": "checkpoint.model",
    "Committed": "commit",
    "commit_sample": "commit",
    "SOURCES": "data",
    "open_source": "data",
    "Denoiser": "denoiser",
    "Guided": "guidance",
    "Parametrization": "denoiser",
    "FewstepError": "errors",
    "METRICS": "evaluation",
    "Reference": "evaluation",
    "evaluate": "evaluation",
    "evaluate_samples": "evaluation",
    "export": "exports.export",
    "open_reference": "evaluation",
    "teacher_agreement": "evaluation.agreement",
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
    "generate": "training.synthetic",
}

__all__ = [
    "BACKBONES", "EDM", "METRICS", "OBJECTIVES", "RECIPES", "SOURCES", "VP", "Committed", "Denoiser", "DiscreteVP",
    "FewstepError", "Guided", "Parametrization", "Process", "RectifiedFlow", "Reference", "Run", "TrigFlow",
    "commit_sample", "convert", "evaluate", "evaluate_samples", "export", "generate", "load", "ode_sample",
    "open_reference", "open_source", "pretrain", "resume", "sample", "save_model", "teacher_agreement", "tune",
]  # fmt: skip


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'fewstep' has no attribute '{name}'")
    return getattr(importlib.import_module(f"fewstep.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
