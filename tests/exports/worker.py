"""Plain diffusers in a process of its own: ``worker.py REQUESTS.json``.

Each request has a pipeline's folder, arguments of its call, a seed, and the .npy for the state after its last step.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline


def last_state(pipeline: Any, arguments: dict[str, Any]) -> torch.Tensor:
    """The latents after the last step, before they are decoded or clamped."""
    states, step = [], pipeline.scheduler.step

    def recording(*given: Any, **named: Any) -> Any:
        out = step(*given, **named)
        states.append(out[0] if isinstance(out, tuple) else out.prev_sample)
        return out

    pipeline.scheduler.step = recording
    pipeline(**arguments)
    del pipeline.scheduler.step
    return states[-1]


opened: dict[str, Any] = {}
for request in json.loads(Path(sys.argv[1]).read_text()):
    folder = request["folder"]
    if folder not in opened:
        opened[folder] = DiffusionPipeline.from_pretrained(folder)
    torch.manual_seed(request["seed"])
    np.save(request["out"], last_state(opened[folder], request["arguments"]).numpy())
assert not any(name.split(".")[0] == "fewstep" for name in sys.modules)
