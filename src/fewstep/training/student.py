"""Students: what a run trains, made of its teacher and its configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from fewstep.backbones import build
from fewstep.backbones.guided import GuidanceTold, with_guidance
from fewstep.backbones.two_time import with_landing
from fewstep.checkpoint.model import load
from fewstep.denoiser import Denoiser
from fewstep.errors import ConfigError
from fewstep.sampling import check_times
from fewstep.training.config import RunConfig
from fewstep.training.frozen import keeps_base, tuned_copy


def make_student(teacher: Denoiser, config: RunConfig) -> Denoiser:
    """A copy of the teacher, or another start of its network, prepared as the configuration asks.

    It owns its weights, but for those that an adapter or ``student.freeze`` leaves as they are.

    Raises:
        ConfigError, CheckpointError: ``student.start`` is no such start, or what is to be trained cannot be.
    """
    start = config.student.start
    base = teacher if start in ("teacher", "fresh") else _like(load(start), teacher)
    student = tuned_copy(base, config) if keeps_base(config) else base.clone()
    if start == "fresh":
        student.backbone = _fresh(teacher, config.seed)
    if not any(p.requires_grad for p in student.parameters()):
        student.requires_grad_(True)
    if config.student.boundary_shift:
        shifted = replace(student.parametrization, boundary_shift=config.student.boundary_shift)
        student = student.with_parametrization(shifted)
    return equip(student, config)


def _like(start: Denoiser, teacher: Denoiser) -> Denoiser:
    """The model to start from, on the teacher's device, if it makes what the teacher makes."""
    same = (start.sample_shape, start.conditioning) == (teacher.sample_shape, teacher.conditioning)
    if not same or start.sigma_data != teacher.sigma_data:
        raise ConfigError(
            "The model that the student starts from is not of the teacher's kind",
            got=f"samples {start.sample_shape}, {start.conditioning}, sigma_data {start.sigma_data}",
            want=f"samples {teacher.sample_shape}, {teacher.conditioning}, sigma_data {teacher.sigma_data}",
        )
    return start.to(teacher.device)


def _fresh(teacher: Denoiser, seed: int) -> torch.nn.Module:
    """The teacher's architecture with weights of its own, seeded."""
    if teacher.spec is None:
        raise ConfigError(
            "A network of your own cannot be started afresh", got="student.start=fresh", do="Give it with fresh weights"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build(teacher.spec).to(teacher.device, teacher.dtype)


def equip(student: Denoiser, config: RunConfig) -> Denoiser:
    """The landing time and the sampler that the objective trains for, and the configured sampling times.

    A teacher's own sampling times stay where the student is sampled as the teacher was and the objective has none.

    Raises:
        ConfigError: sampling times that are none, or that this student cannot have.
    """
    objective, configured = config.objective, _sampler_times(config, student)
    if objective.two_time:
        student = with_landing(student, seed=config.seed)
    if objective.guidance_range is not None:
        student = with_guidance(student, *objective.guidance_range, seed=config.seed)
    elif isinstance(student.backbone, GuidanceTold):
        raise ConfigError(
            "The model that the student starts from is told its strength of guidance, and this objective says none",
            got=f"the objective '{objective.kind}', without a range of strengths",
            do="Give it a range: --set objective.bridge.guidance=1 objective.bridge.guidance_max=3",
        )
    sampler, times = objective.sampler(student)
    if sampler == "jump" and not objective.two_time:
        _require_one_time(student, objective.kind, configured)
    kept = times or (student.sampler_times if student.sampler == sampler else {})
    student.sampler, student.sampler_times = sampler, kept | configured
    return student


def _require_one_time(student: Denoiser, kind: str, configured: Mapping[int, Sequence[float]]) -> None:
    """A student of segments knows the levels that it is trained for, and is told nothing of where it lands."""
    if student.two_time:
        raise ConfigError(
            f"The objective '{kind}' trains a network that is not told where it lands, and this one is told",
            do="Tune from a diffusion model, or choose an objective with a landing time, for example ctm",
        )
    if configured:
        raise ConfigError(
            f"A student of '{kind}' jumps between the levels it is trained for only, so it takes no others",
            got=f"student.sampler_times for {', '.join(map(str, configured))} steps",
            do="Leave them out: --set student.sampler_times={}",
        )


def _sampler_times(config: RunConfig, student: Denoiser) -> dict[int, tuple[float, ...]]:
    """``student.sampler_times`` by step count, as many decreasing noise levels as steps."""
    found = {}
    for steps, times in config.student.sampler_times.items():
        try:
            levels = check_times([float(t) for t in times], student)
            fits = len(levels) == int(steps)
        except (TypeError, ValueError, ConfigError):
            fits = False
        if not fits:
            raise ConfigError(
                "'student.sampler_times' does not give one noise level per step",
                got=f"{steps}: {times}",
                want="decreasing levels, for example {2: [80, 0.8], 4: [80, 10, 2, 0.5]}",
            )
        found[int(steps)] = tuple(levels)
    return found
