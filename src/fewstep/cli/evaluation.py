"""What ``fewstep eval`` does: opens model, data and teacher, measures, prints, writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fewstep.checkpoint.hub import is_hub_id
from fewstep.checkpoint.model import describe as describe_model
from fewstep.checkpoint.model import weights_hash
from fewstep.checkpoint.store import write_json
from fewstep.cli.numbers import describe, effort, show, value_of
from fewstep.cli.options import Output, noting_fallbacks, open_model
from fewstep.cli.partial import Partial
from fewstep.cli.progress import Counting
from fewstep.cli.write import parse_numbers
from fewstep.data import Source, open_source
from fewstep.denoiser import Denoiser
from fewstep.errors import ConfigError, nearest
from fewstep.evaluation import METRICS, Reference, evaluate, evaluate_samples, open_reference
from fewstep.evaluation.agreement import check_pair, teacher_agreement
from fewstep.evaluation.measure import too_few
from fewstep.evaluation.pipelines import from_pipeline, open_pipeline
from fewstep.evaluation.record import TEACHER
from fewstep.evaluation.reference import check_comparable
from fewstep.evaluation.samples import SampleSet, draw_labels, from_source, makes_images, shown_shape
from fewstep.evaluation.seeds import over_seeds
from fewstep.evaluation.statistics_file import is_statistics
from fewstep.inference import Precision
from fewstep.runs import joined
from fewstep.sampling import few_step_times, possible_among
from fewstep.training.checks import check_shape
from fewstep.world import World

STEPS, SAMPLES, TEACHER_NFE = "1,2,4,8", 5_000, "35"
"""What is measured where the options do not say."""

PIPELINE_BATCH = 16

FEWEST_HALVED = 4
"""Samples that can be halved for a spread."""

AGREEMENT_SAMPLES = 256
"""Samples that teacher and student are compared on one by one: the teacher needs 143 evaluations for each."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """The options of ``fewstep eval``, as they were given; None: not given."""

    model: str
    data: str
    steps: str | None
    samples: int | None
    features: str
    metrics: str
    sampler: str
    teacher: str | None
    teacher_nfe: str | None
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
    guidance: float | None
    precision: Precision
    compile: bool

    @property
    def count(self) -> int:
        """Samples per step count, of what makes samples."""
        return SAMPLES if self.samples is None else self.samples


@dataclass(frozen=True)
class Pipeline:
    """A diffusers pipeline, opened."""

    name: str
    call: Callable[..., Any]


Subject = Denoiser | Pipeline | Source
"""A model of ours, someone else's pipeline, or images made elsewhere."""


@dataclass(frozen=True)
class Job:
    """What is measured; a model or a pipeline at several step counts."""

    subject: Subject
    solver: str
    steps: list[int]


@dataclass(frozen=True)
class Session:
    """What all measurements of one call share."""

    request: Request
    reference: Reference
    metrics: Sequence[str] | None
    world: World
    counting: Counting
    parts: Partial


def run(request: Request, output: Output) -> int:
    """Measure, print the table, write the result."""
    steps = parse_numbers(request.steps or STEPS, "--steps", int)
    teacher_steps = parse_numbers(request.teacher_nfe or TEACHER_NFE, "--teacher-nfe", int)
    if min(steps + teacher_steps) < 1:
        raise ConfigError("The number of sampling steps must be at least 1", got=min(steps + teacher_steps))
    kept = Partial.beside(request.out)
    metrics = _chosen(request.metrics)
    if request.replicates == 1:
        raise ConfigError("A spread needs at least two half-samples", got="--replicates 1", want="0, or 2 and more")
    with joined(request.device) as world, Counting(output) as counting, noting_fallbacks(counting.say):
        subject = _subject(request, world)
        _check_options(request, subject)
        if isinstance(subject, Denoiser) and request.sampler != "ode":
            steps = _possible(subject, steps, given=request.steps is not None)
        job = Job(subject, request.sampler, steps)
        teacher = None if request.teacher is None else open_model(request.teacher, device=str(world.device))
        if teacher is not None and isinstance(subject, Denoiser):
            check_pair(subject, teacher)
        reference = _reference(request, job, world, counting)
        counting.say(f"{request.model} against {describe(reference)}")
        for note in _notes(reference, job, request):
            counting.say(note)
        parts = Partial(
            kept if world.size == 1 and not isinstance(subject, Pipeline) else None,
            _depends_on(request, reference, subject, teacher),
        )
        if len(parts):
            counting.say(f"Going on: {len(parts)} parts of this measurement were kept in {kept}")
        session = Session(request, reference, metrics, world, counting, parts)
        result = _over_seeds(session, job) | {"model": request.model}
        if teacher is not None:
            result["teacher"] = _over_seeds(session, Job(teacher, "ode", teacher_steps)) | {"model": request.teacher}
            if world.leads:
                result["teacher_agreement"] = _agreement(session, job, teacher)
    if world.leads:
        show(output, TEACHER if request.sampler == "ode" else Path(request.model).name, result)
        output.result(result)
        if request.out is not None:
            write_json(request.out, result)
            parts.done()
    return 0


def _possible(model: Denoiser, steps: list[int], *, given: bool) -> list[int]:
    """The step counts that were asked for, or those of the default ones that the model can do.

    Raises:
        ConfigError: one that was asked for cannot be done.
    """
    if not given:
        return possible_among(model, steps)
    for n in steps:
        few_step_times(model, n)
    return steps


def _depends_on(request: Request, reference: Reference, subject: Subject, teacher: Denoiser | None) -> dict[str, Any]:
    """What every part of a measurement depends on; step counts and seeds are in the names of the parts."""
    free = ("out", "steps", "teacher_nfe", "repeats", "seed", "device")
    models = {"model": subject, "teacher": teacher}
    return {
        "request": {key: value for key, value in vars(request).items() if key not in free},
        "reference": [reference.info["fingerprint"], reference.info["preprocessing_hash"], reference.net.hash],
        "models": {name: _identity(model) for name, model in models.items() if isinstance(model, Denoiser)},
        "files": None if isinstance(subject, Denoiser | Pipeline) else subject.fingerprint,
    }


def _identity(model: Denoiser) -> dict[str, Any]:
    """Weights, and all that sampling depends on beside them."""
    return describe_model(model) | {"weights": weights_hash(model)}


# --------------------------------------------------------------------------------------------- what is measured
def _subject(request: Request, world: World) -> Subject:
    """A model of ours, a diffusers pipeline, or a source of images made elsewhere; opened."""
    name, path = request.model, Path(request.model).expanduser()
    if (path / "model_index.json").is_file() or is_hub_id(name):
        return Pipeline(name, open_pipeline(name, world.device))
    ours = ".py:" in name or any(
        (path / part).exists() for part in ("config.json", "config.yaml", "model", "checkpoints")
    )
    files = (path.is_dir() and any(path.iterdir())) or path.suffix.lower() in (".zip", ".npz")
    if files and not ours:
        return open_source(name, resize=request.resize, channels=request.channels)
    return open_model(name, request.weights, request.network, str(world.device))


def _check_options(request: Request, subject: Subject) -> None:
    """Refuse options that would change nothing: whoever gives one expects another measurement.

    Raises:
        ConfigError: with the first such option.
    """
    is_model, is_pipeline = isinstance(subject, Denoiser), isinstance(subject, Pipeline)
    of_a_model = {
        "--sampler": None if request.sampler == "consistency" else request.sampler,
        "--weights": None if request.weights == "ema" else request.weights,
        "--network": request.network,
        "--guidance": request.guidance,
        "--teacher": request.teacher,
        "--precision": None if request.precision == "fp32" else request.precision,
        "--compile": request.compile or None,
    }
    of_sampling = {"--steps": request.steps, "--repeats": None if request.repeats == 1 else request.repeats}
    what = "a diffusers pipeline" if is_pipeline else "images made elsewhere"
    for option, value in ({} if is_model else of_a_model if is_pipeline else of_a_model | of_sampling).items():
        if value is not None:
            raise ConfigError(f"{option} does not go with {what}", got=f"{option} {value}", do=f"Leave {option} out")
    if request.teacher_nfe is not None and request.teacher is None:
        raise ConfigError("--teacher-nfe is about a teacher", got="no teacher", do="Add --teacher")
    if request.teacher is not None and request.sampler != "consistency":
        raise ConfigError(
            "--teacher goes with few-step sampling: it measures the teacher's solver itself",
            got=f"--sampler {request.sampler}",
            do="Leave one of them out",
        )
    if request.teacher is not None and request.guidance is not None:
        raise ConfigError(
            "--guidance does not go with --teacher, whose agreement is measured without it",
            got=f"--guidance {request.guidance:g}",
            do="Measure the two one after the other: the teacher with --sampler ode",
        )
    if not isinstance(subject, Denoiser | Pipeline) and request.samples not in (None, len(subject)):
        raise ConfigError(
            "Images made elsewhere are measured all together: their count is part of every number's name",
            got=f"-n {request.samples}, {len(subject)} images",
            do="Leave -n out",
        )


def _reference(request: Request, job: Job, world: World, counting: Counting) -> Reference:
    data: Source | str = request.data
    if not is_statistics(request.data):
        data = open_source(request.data, split=request.split, resize=request.resize, channels=request.channels)
        if isinstance(job.subject, Denoiser):
            check_shape(job.subject, data)
    reference = open_reference(
        data,
        request.features,
        split=request.split,
        resize=request.resize,
        channels=request.channels,
        like=_shape(job.subject),
        device=world.device,
        progress=lambda done, total: counting(f"reading {request.data}", done, total),
    )
    if isinstance(job.subject, Denoiser):
        check_comparable(reference, shown_shape(job.subject), makes_images(job.subject))
    return reference


def _shape(subject: Subject) -> tuple[int, ...] | None:
    """Of one sample; None where only sampling will tell."""
    if isinstance(subject, Pipeline):
        return None
    return shown_shape(subject) if isinstance(subject, Denoiser) else tuple(subject.shape)


def _chosen(metrics: str) -> Sequence[str] | None:
    """None for "auto"; "all"; or the names, in order."""
    names = [name.strip() for name in metrics.split(",") if name.strip()]
    if not names:
        raise ConfigError("--metrics is empty", want="for example fd,kid")
    for name in names:
        if name in ("auto", "all") and len(names) > 1:
            raise ConfigError(f"'{name}' stands for a whole list", got=f"--metrics {metrics}", do="Give it alone")
        if name not in [*METRICS, "auto", "all"]:
            raise ConfigError(f"There is no metric '{name}'", do=nearest(name, [*METRICS, "auto", "all"]))
    return None if names == ["auto"] else "all" if names == ["all"] else names


# ---------------------------------------------------------------------------------------------------- measuring
def _over_seeds(session: Session, job: Job) -> dict[str, Any]:
    request = session.request
    found = [_measured(session, job, seed) for seed in range(request.seed, request.seed + request.repeats)]
    return found[0] if len(found) == 1 else over_seeds(found)


def _measured(session: Session, job: Job, seed: int) -> dict[str, Any]:
    """Of a model each step count is a part of its own: it takes longest."""
    part = session.parts.part
    if not isinstance(job.subject, Denoiser):
        return part(f"seed {seed}", lambda: _of_others(session, job, seed))
    found = [
        part(f"{job.solver}, {n} NFE, seed {seed}", partial(_of_a_model, session, job, n, seed)) for n in job.steps
    ]
    return found[0] | {"rows": [row for one in found for row in one["rows"]]}


def _of_a_model(session: Session, job: Job, steps: int, seed: int) -> dict[str, Any]:
    assert isinstance(job.subject, Denoiser)
    request = session.request
    return evaluate(
        job.subject, session.reference, steps=[steps], solver=job.solver, metrics=session.metrics,
        samples=request.count, seed=seed, guidance=request.guidance, batch_size=request.batch_size,
        replicates=request.replicates, precision=request.precision, compile=request.compile,
        on_row=partial(_show_row, session, seed), on_progress=session.counting, world=session.world,
    )  # fmt: skip


def _of_others(session: Session, job: Job, seed: int) -> dict[str, Any]:
    """Someone else's pipeline, or images made elsewhere."""
    request, subject = session.request, job.subject
    if isinstance(subject, Pipeline):
        batch_size = request.batch_size or PIPELINE_BATCH
        sets = [
            from_pipeline(subject.call, request.count, steps=n, seed=seed, batch_size=batch_size, name=subject.name)
            for n in job.steps
        ]
    else:
        assert not isinstance(subject, Denoiser)
        sets = [from_source(subject)]
    if session.metrics is None:
        sets = [_labelled_alike(samples, session.reference) for samples in sets]
    return evaluate_samples(
        sets, session.reference, metrics=session.metrics, seed=seed, replicates=request.replicates,
        device=session.world.device, on_row=partial(_show_row, session, seed), on_progress=session.counting,
        world=session.world,
    )  # fmt: skip


def _show_row(session: Session, seed: int, row: dict[str, Any]) -> None:
    what = "images" if row["steps"] is None else f"{row['solver']}, {effort(row)}, seed {seed}"
    session.counting.say(f"  {what}: " + "  ".join(value_of(row, name) for name in [*row["metrics"]][:3]))


def _labelled_alike(samples: SampleSet, reference: Reference) -> SampleSet:
    """Without labels where the reference lacks one of their classes: nothing can be said of those."""
    if samples.labels is None or reference.labels is None or torch.isin(samples.labels, reference.labels).all():
        return samples
    return replace(samples, labels=None)


def _agreement(session: Session, job: Job, teacher: Denoiser) -> dict[str, Any]:
    assert isinstance(job.subject, Denoiser)
    request, student = session.request, job.subject
    samples = min(AGREEMENT_SAMPLES, request.count)
    session.counting(f"{TEACHER}: 72 nodes for {samples} samples", 0, samples)
    cond = draw_labels(student, session.reference.source, samples, request.seed)
    return session.parts.part(
        f"agreement, {job.steps}, seed {request.seed}",
        lambda: teacher_agreement(
            student, teacher, steps=job.steps, samples=samples, seed=request.seed, cond=cond,
            batch_size=request.batch_size, replicates=request.replicates if samples >= FEWEST_HALVED else 0,
        ),
    )  # fmt: skip


def _notes(reference: Reference, job: Job, request: Request) -> list[str]:
    """What the reader of the numbers must know: gaps in the reference's story, and the bias of few samples."""
    count = request.count if isinstance(job.subject, Denoiser | Pipeline) else len(job.subject)
    return [*reference.info["notes"], *filter(None, [too_few(count, reference.stats)])]
