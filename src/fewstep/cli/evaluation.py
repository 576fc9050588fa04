"""What ``fewstep eval`` does: opens model, data and teacher, measures, prints, writes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep.checkpoint.store import write_json
from fewstep.cli.options import Output, open_model
from fewstep.cli.progress import Counting
from fewstep.cli.write import parse_numbers
from fewstep.data import Source, open_source
from fewstep.denoiser import Denoiser
from fewstep.errors import ConfigError, nearest
from fewstep.evaluation import DEFAULT_METRICS, METRICS, Reference, evaluate, evaluate_samples, open_reference
from fewstep.evaluation.agreement import teacher_agreement
from fewstep.evaluation.figures import Row, number
from fewstep.evaluation.measure import too_few
from fewstep.evaluation.record import TEACHER
from fewstep.evaluation.reference import check_comparable
from fewstep.evaluation.report import print_table
from fewstep.evaluation.samples import draw_labels, from_pipeline, from_source
from fewstep.evaluation.seeds import over_seeds
from fewstep.runs import check_shape, joined
from fewstep.world import World

AGREEMENT_SAMPLES = 256
"""Samples that teacher and student are compared on one by one: the teacher needs 143 evaluations for each."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """The options of ``fewstep eval``, as they were given."""

    model: str
    data: str
    steps: str
    samples: int
    features: str
    metrics: str
    sampler: str
    teacher: str | None
    teacher_nfe: str
    repeats: int
    replicates: int
    resize: int | None
    channels: int | None
    split: str
    weights: str
    out: Path | None
    batch_size: int | None
    network: str | None
    seed: int
    device: str


@dataclass(frozen=True)
class Job:
    """One model at several step counts; or a pipeline (a name), or images made elsewhere (a source)."""

    subject: Denoiser | Source | str
    solver: str
    steps: list[int]


def run(request: Request, output: Output) -> int:
    """Measure, print the table, write the result."""
    steps, teacher_steps = (
        parse_numbers(request.steps, "--steps", int),
        parse_numbers(request.teacher_nfe, "--teacher-nfe", int),
    )
    metrics = _chosen(request.metrics)
    if request.replicates == 1:
        raise ConfigError("A spread needs at least two half-samples", got="--replicates 1", want="0, or 2 and more")
    with joined(request.device) as world, Counting(output) as counting:
        job = Job(_subject(request, world), request.sampler, steps)
        teacher = _teacher(request, job, world)
        reference = _reference(request, job, world, counting)
        counting.say(f"{request.model} against {_about(reference)}")
        for note in _notes(reference, job, request):
            counting.say(note)
        result = _over_seeds(request, job, reference, metrics, world, counting) | {"model": request.model}
        if teacher is not None:
            slow = Job(teacher, "ode", teacher_steps)
            result["teacher"] = _over_seeds(request, slow, reference, metrics, world, counting)
            result["teacher"]["model"] = request.teacher
            if world.leads:
                result["teacher_agreement"] = _agreement(request, job, teacher, reference, counting)
    if world.leads:
        _show(output, request, result)
        output.result(result)
        if request.out is not None:
            write_json(request.out, result)
    return 0


# --------------------------------------------------------------------------------------------- what is measured
def _subject(request: Request, world: World) -> Denoiser | Source | str:
    """A model of ours, a diffusers pipeline by name, or a source of images made elsewhere."""
    name, path = request.model, Path(request.model).expanduser()
    if (path / "model_index.json").is_file():
        return str(path)
    ours = ".py:" in name or any(
        (path / part).exists() for part in ("config.json", "config.yaml", "model", "checkpoints")
    )
    files = (path.is_dir() and any(path.iterdir())) or path.suffix.lower() in (".zip", ".npz")
    if files and not ours:
        return open_source(name, resize=request.resize, channels=request.channels)
    if not path.exists() and name.count("/") == 1 and not name.startswith((".", "/", "~")) and not path.suffix:
        return name  # a hub id
    return open_model(name, request.weights, request.network, str(world.device))


def _teacher(request: Request, job: Job, world: World) -> Denoiser | None:
    if request.teacher is None:
        return None
    if not isinstance(job.subject, Denoiser):
        raise ConfigError("A teacher goes with a model of fewstep only", got=request.model, do="Leave out --teacher")
    return open_model(request.teacher, device=str(world.device))


def _reference(request: Request, job: Job, world: World, counting: Counting) -> Reference:
    reference = open_reference(
        request.data,
        request.features,
        split=request.split,
        resize=request.resize,
        channels=request.channels,
        device=world.device,
        progress=lambda done, total: counting(f"reading {request.data}", done, total),
    )
    if isinstance(job.subject, Denoiser) and reference.source is not None:
        check_shape(job.subject, reference.source)
    elif isinstance(job.subject, Denoiser):
        check_comparable(reference, job.subject.sample_shape, len(job.subject.sample_shape) == 3)
    return reference


def _chosen(metrics: str) -> list[str] | None:
    """None for "auto"; every metric for "all"; else the names, in order."""
    names = [name.strip() for name in metrics.split(",") if name.strip()]
    if not names:
        raise ConfigError("--metrics is empty", want="for example fd,kid")
    for name in names:
        if name not in METRICS and names not in (["auto"], ["all"]):
            raise ConfigError(f"There is no metric '{name}'", do=nearest(name, [*METRICS, "auto", "all"]))
    return None if names in (["auto"], ["all"]) else names


# ---------------------------------------------------------------------------------------------------- measuring
def _over_seeds(
    request: Request, job: Job, reference: Reference, metrics: list[str] | None, world: World, counting: Counting
) -> dict[str, Any]:
    repeats = 1 if not isinstance(job.subject, Denoiser | str) else request.repeats
    seeds = range(request.seed, request.seed + repeats)
    found = [_measured(request, job, reference, metrics, seed, world, counting) for seed in seeds]
    return found[0] if len(found) == 1 else over_seeds(found)


def _measured(
    request: Request,
    job: Job,
    reference: Reference,
    metrics: list[str] | None,
    seed: int,
    world: World,
    counting: Counting,
) -> dict[str, Any]:
    def show(row: dict[str, Any]) -> None:
        what = "images" if row["nfe"] is None else f"{row['solver']}, {row['nfe']} NFE, seed {seed}"
        counting.say(f"  {what}: " + "  ".join(_value(row, name) for name in [*row["metrics"]][:3]))

    subject = job.subject
    if isinstance(subject, Denoiser):
        return evaluate(
            subject, reference, steps=job.steps, solver=job.solver, metrics=metrics, samples=request.samples, seed=seed,
            batch_size=request.batch_size, replicates=request.replicates, on_row=show, on_progress=counting, world=world,
        )  # fmt: skip
    sets = (
        [
            from_pipeline(
                subject, request.samples, steps=n, seed=seed, batch_size=request.batch_size or 16, device=world.device
            )
            for n in job.steps
        ]
        if isinstance(subject, str)
        else [from_source(subject)]
    )
    return evaluate_samples(
        sets, reference, metrics=metrics, seed=seed, replicates=request.replicates, device=world.device, on_row=show,
        on_progress=counting, world=world,
    )  # fmt: skip


def _agreement(
    request: Request, job: Job, teacher: Denoiser, reference: Reference, counting: Counting
) -> dict[str, Any]:
    assert isinstance(job.subject, Denoiser)
    samples = min(AGREEMENT_SAMPLES, request.samples)
    counting(f"{TEACHER}: 72 nodes for {samples} samples", 0, samples)
    cond = draw_labels(job.subject, reference.source, samples, request.seed)
    return teacher_agreement(
        job.subject, teacher, steps=job.steps, samples=samples, seed=request.seed, cond=cond,
        batch_size=request.batch_size, replicates=request.replicates,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------ telling
def _about(reference: Reference) -> str:
    info, net = reference.info, reference.net
    count = f"{info['count']:,} samples" if info["count"] else "an unstated number of samples"
    split = f", split {info['split']}" if info["split"] else ""
    return f"{info['source']} ({count}{split}), features {net.name} {net.hash[:8]}"


def _notes(reference: Reference, job: Job, request: Request) -> list[str]:
    """What the reader of the numbers must know: gaps in the reference's story, and the bias of few samples."""
    count = len(job.subject) if not isinstance(job.subject, Denoiser | str) else request.samples
    return [*reference.info["notes"], *filter(None, [too_few(count, reference.net.dim)])]


def _value(row: dict[str, Any], name: str) -> str:
    text = f"{name} {number(row['metrics'][name])}"
    interval = row["intervals"].get(name)
    return f"{text} ± {number((interval[1] - interval[0]) / 2)}" if interval else text


def _show(output: Output, request: Request, result: dict[str, Any]) -> None:
    """The table; lines about seeds and the teacher's ODE."""
    if not output.speaks:
        return
    found = [("teacher (diffusion)" if request.sampler == "ode" else Path(request.model).name, result)]
    found += [(TEACHER, result["teacher"])] if "teacher" in result else []
    rows = [
        Row(name, row["nfe"], row["metrics"], row["samples_per_second"], _intervals(row))
        for name, one in reversed(found)
        for row in one["rows"]
        if row["nfe"] is not None
    ]
    if rows:
        print_table(rows, output.console)
    for name, one in found:
        _show_seeds(output, name, one["rows"])
    _show_agreement(output, result.get("teacher_agreement"))


def _intervals(row: dict[str, Any]) -> dict[str, tuple[float, float]]:
    return {name: (low, high) for name, (low, high) in row["intervals"].items()}


def _show_seeds(output: Output, name: str, rows: Sequence[dict[str, Any]]) -> None:
    """How much every number moves between seeds, beside what its half-samples said."""
    from rich.table import Table

    if not any("seeds" in row for row in rows):
        return
    table = Table("NFE", "Number", title=f"{name}: {len(next(iter(rows[0]['seeds'].values()))['values'])} seeds")
    for head in ("mean", "std over seeds", "std by half-samples", "min", "max"):
        table.add_column(head, justify="right")
    for row in rows:
        for metric, found in row["seeds"].items():
            low, high = row["intervals"].get(metric, (math.nan, math.nan))
            cells = (found["mean"], found["std"], (high - low) / 3.92, found["min"], found["max"])
            table.add_row(str(row["nfe"]), metric, *(number(value) for value in cells))
    output.say(table)


def _show_agreement(output: Output, found: dict[str, Any] | None) -> None:
    if found is None:
        return
    output.say(
        f"Distance to the teacher's ODE with the same noise ({found['samples']} samples, {found['nodes']} nodes):"
    )
    for row in found["rows"]:
        output.say(
            f"  steps {row['steps']}: rms {number(row['rms'])}, {100 * row['relative']:.1f} % of the images' rms"
        )
