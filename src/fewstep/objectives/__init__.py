"""Objectives: one file and one line each."""

from __future__ import annotations

from fewstep.objectives.base import ALONE, Beside, LossOutput, Objective, StepRandom
from fewstep.objectives.cd import CD
from fewstep.objectives.cmt import CMT
from fewstep.objectives.ct import CT
from fewstep.objectives.ctm import CTM
from fewstep.objectives.diffusion import Diffusion
from fewstep.objectives.ecd import ECD
from fewstep.objectives.ect import ECT
from fewstep.objectives.ict import ICT
from fewstep.objectives.meanflow import MeanFlow
from fewstep.objectives.multistep import Multistep
from fewstep.objectives.scm import SCM
from fewstep.objectives.sequence import Sequence
from fewstep.objectives.tcm import TCM
from fewstep.objectives.tract import TRACT

OBJECTIVES: dict[str, type[Objective]] = {
    "cd": CD,
    "cmt": CMT,
    "ct": CT,
    "ctm": CTM,
    "diffusion": Diffusion,
    "ecd": ECD,
    "ect": ECT,
    "ict": ICT,
    "meanflow": MeanFlow,
    "multistep": Multistep,
    "scm": SCM,
    "sequence": Sequence,
    "tcm": TCM,
    "tract": TRACT,
}
Objective.variants = OBJECTIVES

__all__ = [
    "ALONE",
    "CD",
    "CMT",
    "CT",
    "CTM",
    "ECD",
    "ECT",
    "ICT",
    "OBJECTIVES",
    "SCM",
    "TCM",
    "TRACT",
    "Beside",
    "Diffusion",
    "LossOutput",
    "MeanFlow",
    "Multistep",
    "Objective",
    "Sequence",
    "StepRandom",
]
