"""The model card of an export: where it comes from, how to sample it, what was measured, under which licence."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

from fewstep.evaluation.pictures import is_teacher
from fewstep.evaluation.record import Record
from fewstep.evaluation.report import table_lines
from fewstep.evaluation.summary import measured_of, summary_of
from fewstep.exports.loops import loop, pipeline_call
from fewstep.exports.origin import UNKNOWN, Origin

LIBRARIES = {"diffusers": "diffusers", "onnx": "onnx", "torch": "pytorch"}


def card(name: str, about: Mapping[str, Any], origin: Origin) -> str:
    """The text of ``README.md``, with the hub's YAML front matter.

    Args:
        name: of the model.
        about: what ``fewstep.json`` holds.
        origin: where it comes from.
    """
    counts = [int(n) for n in about["sampler_times"]]
    what = f"A few-step generator: {_listed(counts)} network evaluation{'s' if max(counts) > 1 else ''} per sample"
    sections = [
        "---\n" + yaml.safe_dump(_front_matter(name, about, origin), sort_keys=False, allow_unicode=True) + "---",
        f"# {name}",
        f"{what}. Written by fewstep {about['fewstep']}.",
        "## How to sample",
        *(_with_diffusers(name, about) if about["to"] == "diffusers" else _with_graph(about)),
        "## Where it comes from",
        *_provenance(origin),
        "## Measured",
        *_measured(origin.record),
        "## Licence",
        _licence(origin),
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(name: str, about: Mapping[str, Any], origin: Origin) -> dict[str, Any]:
    kind = origin.record.config.get("objective.kind") if origin.record is not None else None
    family = "consistency-model" if about["sampler"] == "consistency" else "diffusion-distillation"
    task = "text-to-image" if about["parts"] else "unconditional-image-generation"
    head: dict[str, Any] = {"license": origin.licence, "library_name": LIBRARIES[about["to"]]}
    head |= {"pipeline_tag": task, "tags": ["fewstep", "few-step", family, *([kind] if kind else [])]}
    if origin.base is not None:
        head["base_model"] = origin.base
    results = _model_index(origin.record, task) if origin.record is not None else []
    if results:
        head["model-index"] = [{"name": name, "results": results}]
    return head


def _model_index(record: Record, task: str) -> list[dict[str, Any]]:
    """The measured numbers of the few-step model, as the hub wants them."""
    data = str(record.config.get("data.source"))
    found = []
    for row in record.rows:
        metrics = [
            {"type": metric.lower(), "name": f"{metric}, {_evaluations(row.nfe)}", "value": float(f"{value:.6g}")}
            for metric, value in row.metrics.items()
            if math.isfinite(value)
        ]
        if metrics and not is_teacher(row.model):
            found.append({"task": {"type": task}, "dataset": {"type": data, "name": data}, "metrics": metrics})
    return found


def _with_diffusers(name: str, about: Mapping[str, Any]) -> Iterable[str]:
    yield f"```python\n{pipeline_call(about, name)}\n```"
    if about["calls"]:
        yield "Its own noise levels, as arguments of the pipeline:"
        lines = [
            [n, f"`{argument}={values}`", _levels(about["levels"][n])]
            for n, call in about["calls"].items()
            for argument, values in call.items()
        ]
        yield _table(["Evaluations", "Argument", "Noise levels (EDM)"], lines)
    if about["plain"]:
        yield "With `num_inference_steps` alone, diffusers chooses the noise levels:"
        yield _table(
            ["num_inference_steps", "Noise levels (EDM)"], [[n, _levels(v)] for n, v in about["plain"].items()]
        )
    top = max(max(levels) for levels in about["sampler_times"].values())
    if about["scheduler"] == "FlowMatchEulerDiscreteScheduler":
        yield _start(f"(1 + T) z at its first noise level T = {top:.4g}, {100 / top:.2g} % more than")
    elif about["scheduler"] == "LCMScheduler":
        more = 100 * (math.sqrt(1 + top**-2) - 1)
        yield _start(f"sqrt(1 + T^2) z at its first noise level T = {top:.4g}, {more:.2g} % more than")
    yield f"Against fewstep, one step differs by at most {about['difference']:.2g} (checked at export, float32)."


def _start(where: str) -> str:
    return f"diffusers starts from N(0, 1) in the network's coordinates: from {where} the T z of `fewstep sample`."


def _with_graph(about: Mapping[str, Any]) -> Iterable[str]:
    most = about["largest_batch"]
    batches = "any batch size" if most is None else f"batches of up to {most}"
    inputs = ", ".join(f"`{name}` {shape}" for name, shape in about["inputs"].items())
    yield (
        f"`{about['file']}` holds f(x, sigma) -> x_0 in EDM coordinates, x = x_0 + sigma z, float32. Inputs: {inputs}, "
        f"{batches}."
    )
    yield f"```python\n{loop(about)}\n```"
    elsewhere = [what for what, is_so in (("VAE", about["latents"]), ("text encoders", about["parts"])) if is_so]
    if about["to"] == "torch" and elsewhere:
        yield (
            f"The {' and the '.join(elsewhere)} are not in this directory: `config.json` names their folders on the "
            "machine that exported it (`codec.folder`, `text.pipeline`), in full. Put yours there for `fewstep sample`."
        )
    if about["parts"]:
        parts = ", ".join(f"{part['name']} {part['shape']}" for part in about["parts"])
        yield f"A row of `cond` holds the embeddings of a prompt, flattened, one after the other: {parts}."
    yield (
        f"Against the model it differs by at most {about['difference']:.2g} "
        f"(checked at export, batches of {_listed(about['checked_batches'])})."
    )


def _provenance(origin: Origin) -> Iterable[str]:
    pairs = summary_of(origin.record) if origin.record is not None else [*origin.provenance.items()]
    if not pairs:
        yield "The model was given without a directory, so nothing is known of how it was made."
        return
    yield _table(["", ""], [[str(name), str(value)] for name, value in pairs])
    if origin.record is not None and origin.record.command:
        yield f"Command, as it was typed, of paths the last names:\n\n```\n{origin.record.command}\n```"


def _measured(record: Record | None) -> Iterable[str]:
    if record is None or not record.rows:
        yield "Nothing was measured."
        return
    yield _table(*table_lines(record.rows))
    yield "\n".join(f"- {name}: {value}" for name, value in measured_of(record.results))


def _licence(origin: Origin) -> str:
    if origin.licence == UNKNOWN:
        return "Unknown: ask whoever made the teacher before publishing this, since tuned weights derive from it."
    return f"{origin.licence}, says {origin.said_by}. Weights that were tuned from a teacher derive from it."


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def _levels(levels: Sequence[float | None]) -> str:
    return ", ".join("∞" if level is None else f"{level:.4g}" for level in levels)


def _listed(counts: Sequence[int]) -> str:
    *most, last = map(str, counts)
    return f"{', '.join(most)} or {last}" if most else last


def _evaluations(nfe: int) -> str:
    return f"{nfe} evaluation{'s' if nfe > 1 else ''}"
