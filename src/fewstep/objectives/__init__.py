"""Objectives: one file and one line each."""

from __future__ import annotations

from typing import TypeAlias

from fewstep.objectives.base import LossOutput, Objective, StepRandom
from fewstep.objectives.diffusion import Diffusion
from fewstep.objectives.ect import ECT

AnyObjective: TypeAlias = Diffusion | ECT

OBJECTIVES: dict[str, type[AnyObjective]] = {
    "diffusion": Diffusion,
    "ect": ECT,
}

__all__ = ["ECT", "OBJECTIVES", "AnyObjective", "Diffusion", "LossOutput", "Objective", "StepRandom"]
