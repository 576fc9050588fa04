"""Code that samples an export without fewstep, as its card shows it; tests run it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

_NUMPY = {
    "open": """\
import json
import numpy as np
import onnxruntime

about, n = json.load(open("fewstep.json")), 4
f = onnxruntime.InferenceSession("model.onnx")
draw = np.random.default_rng(0).standard_normal
x = np.zeros((n, *about["sample_shape"]))""",
    "call": 'f.run(None, {{"x": {x}.astype("f4"), {rest}}})[0]',
    "full": 'np.full(n, {0}, "f4")',
    "classes": 'np.eye({0}, dtype="f4")[np.arange(n) % {0}]',
    "nothing": 'np.zeros((n, {0}), "f4")',
    "bytes": 'images = np.clip((x - low) / (high - low) * 255 + 0.5, 0, 255).astype("u1")',
}
_TORCH = {
    "open": """\
import json
import torch

about, n = json.load(open("fewstep.json")), 4
f = torch.export.load("program.pt2").module()
draw = torch.randn
x = torch.zeros(n, *about["sample_shape"])""",
    "call": "f(x={x}, {rest}).detach()",
    "full": "torch.full((n,), {0})",
    "classes": "torch.eye({0})[torch.arange(n) % {0}]",
    "nothing": "torch.zeros(n, {0})",
    "bytes": "images = ((x - low) / (high - low) * 255 + 0.5).clip(0, 255).byte()",
}


def loop(about: Mapping[str, Any]) -> str:
    """Lines of Python that draw 4 samples with an exported graph (``fewstep.json``'s content)."""
    words = _NUMPY if about["to"] == "onnx" else _TORCH
    jumps, inputs, times = about["sampler"] == "jump", about["inputs"], about["sampler_times"]
    steps, level = "2" if "2" in times else next(iter(times)), "t" if jumps else "sigma"
    given = {"sigma": words["full"].format(level)}
    if "cond" in inputs:
        width = inputs["cond"][1]
        given["cond"] = words["classes" if about["num_classes"] else "nothing"].format(width)
    if "guidance" in inputs:
        given["guidance"] = words["full"].format(float(sum(about["guidance_range"]) / 2))
    if "landing" in inputs:
        given["landing"] = words["full"].format("s" if jumps else "0.0")
    form = '"{}": {}' if about["to"] == "onnx" else "{}={}"
    rest = ", ".join(form.format(name, value) for name, value in given.items())
    if jumps:
        lines = [
            f'times = about["sampler_times"]["{steps}"]',
            "x = times[0] * draw(x.shape)",
            "for t, s in zip(times, [*times[1:], 0.0]):",
            f"    g = {words['call'].format(x='x', rest=rest)}",
            "    x = g + s / t * (x - g)",
        ]
    else:
        lines = [
            f'for sigma in about["sampler_times"]["{steps}"]:',
            "    x_t = x + sigma * draw(x.shape)",
            f"    x = {words['call'].format(x='x_t', rest=rest)}",
        ]
    if about["latents"]:
        lines.append("# x holds scaled latents: its VAE decodes them")
    elif len(about["sample_shape"]) == 3:
        lines += ['low, high = about["value_range"]', words["bytes"]]
    return "\n".join([words["open"], *lines])


def pipeline_call(about: Mapping[str, Any], name: str) -> str:
    """Lines of Python that sample an exported pipeline with plain diffusers."""
    pipeline, calls = str(about["pipeline"]), about["calls"]
    steps = next((n for n in ("2", *calls) if n in calls), None)
    given = []
    if about["parts"]:
        given.append('"a photo of a cat"')
    if about["num_classes"]:
        given.append("class_labels=[0]" if pipeline == "DiTPipeline" else "class_labels=0")
    if steps is None:
        given.append("num_inference_steps=2")
    else:
        [(argument, values)] = calls[steps].items()
        if pipeline == "ConsistencyModelPipeline":
            given.append("num_inference_steps=None")
        elif argument == "sigmas":
            given.append(f"num_inference_steps={steps}")
        given.append(f"{argument}={json.dumps(values)}")
    if pipeline == "DiTPipeline" or (about["parts"] and pipeline != "FluxPipeline"):
        given.append("guidance_scale=1")
    return "\n".join(
        [
            "from diffusers import DiffusionPipeline",
            "",
            f'pipe = DiffusionPipeline.from_pretrained("{name}")  # this folder, or its name on the hub',
            f"image = pipe({', '.join(given)}).images[0]",
        ]
    )
