"""Whole runs: a teacher, data and a configuration in; a run directory with a few-step model out."""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fewstep.backbones import build
from fewstep.backbones.vae import codec_of
from fewstep.checkpoint.diffusers import is_here
from fewstep.checkpoint.model import load
from fewstep.checkpoint.store import write_text
from fewstep.config import dump_yaml, with_overrides
from fewstep.data import SOURCES, Source, open_source
from fewstep.denoiser import Denoiser, Parametrization
from fewstep.errors import CheckpointError, ConfigError, DataError, nearest
from fewstep.evaluation.figures import Row
from fewstep.evaluation.record import rows_from
from fewstep.objectives import OBJECTIVES, Objective
from fewstep.process import EDM
from fewstep.recipes import default_recipe
from fewstep.recipes import recipe as named_recipe
from fewstep.training.checks import check_fit, check_table
from fewstep.training.config import DataConfig, RunConfig
from fewstep.training.feature_space import open_differentiable
from fewstep.training.finish import finish
from fewstep.training.frozen import keeps_base, move_together
from fewstep.training.loop import Watcher, stopping_at_once, train
from fewstep.training.past import check_teacher, read_run
from fewstep.training.prepared import prepared
from fewstep.training.state import restore_state
from fewstep.training.student import equip, make_student
from fewstep.training.synthetic import own_samples, teachers_own
from fewstep.training.trainer import Trainer
from fewstep.world import World

IN_MEMORY = "(in memory)"
"""Stands for a teacher that was given as an object."""


@dataclass(frozen=True)
class Run:
    """A run directory. ``results`` is what :func:`fewstep.evaluate` found at its end, or None."""

    path: Path
    config: RunConfig
    results: dict[str, Any] | None = None

    def model(self, *, weights: str = "ema", network: Denoiser | None = None) -> Denoiser:
        """The few-step model, on the EDM clock: its ``t`` is the noise level, whatever the teacher's time was."""
        return load(self.path, weights=weights, network=network)


def tune(
    teacher: Denoiser | str | Path,
    data: Source | str | Path,
    *,
    out: str | Path,
    recipe: str | None = None,
    objective: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    device: str = "auto",
    watcher: Watcher | None = None,
    command: str = "",
) -> Run:
    """Tune a diffusion model into a few-step generator; writes the run directory ``out``.

    Args:
        teacher: a denoiser, or the path of a model, run or converted checkpoint.
        data: a source, or its spec ("digits", a folder, a zip, an npz; "teacher": samples that it makes itself).
        recipe: a name in RECIPES; default "mid", or "fast" where something is said about the objective.
        objective: a name in OBJECTIVES; default: the recipe's.
        overrides: dotted paths, ``{"optim.lr": 1e-4, "images": 50_000}``.
        device: "auto", "cpu", "cuda", ...
        watcher: is told of progress (the command line's progress bar).
        command: what the report shows as the way to reproduce the run.

    Raises:
        FewstepError: unusable input, non-finite loss, full disk; ``Interrupted`` and ``Preempted`` after the
            state was saved.
    """
    config = configure("tune", recipe, objective, overrides, data)
    named = IN_MEMORY if isinstance(teacher, Denoiser) else _absolute(teacher)
    config = replace(config, teacher=config.teacher or named)
    with joined(device) as world:
        model = teacher if isinstance(teacher, Denoiser) else load(teacher)
        if isinstance(teacher, str | Path):
            check_teacher(config, Path(teacher))
        source = source_of(config, model, world) if isinstance(data, str | Path) else data
        check_fit(model, source)
        return _run(config, make_student(model, config), model, source, world, Path(out), watcher, command)


def pretrain(
    data: Source | str | Path,
    *,
    out: str | Path,
    recipe: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    device: str = "auto",
    watcher: Watcher | None = None,
    command: str = "",
) -> Run:
    """Train a small diffusion model from scratch, to tune it afterwards; arguments as :func:`tune`."""
    config = configure("pretrain", recipe, None, overrides, data)
    if config.model.vae is not None:
        config = replace(config, model=replace(config.model, vae=_absolute(config.model.vae)))
    with joined(device) as world:
        source = source_of(config, None, world) if isinstance(data, str | Path) else data
        student = new_network(config, source)
        return _run(config, student, None, source, world, Path(out), watcher, command)


def resume(
    run: str | Path,
    *,
    device: str = "auto",
    data: Source | None = None,
    teacher: Denoiser | None = None,
    watcher: Watcher | None = None,
    command: str = "",
) -> Run:
    """Continue a run from its newest checkpoint, to the same bits as if it had never stopped (CPU).

    A run that has ended, report and all, is returned as it is.

    Args:
        run: the run directory.
        data: the source again, if it was given as an object.
        teacher: the denoiser again, if it was a network of your own.
    """
    path = Path(run)
    config = read_run(path)
    if (path / "report.html").is_file():
        return open_run(path)
    with joined(device) as world:
        if config.job == "tune" and teacher is None:
            teacher = teacher_again(config, path)
        source = data if data is not None else source_of(config, teacher, world)
        if config.job == "pretrain":
            student = new_network(config, source)
        else:
            student = make_student(teacher if teacher is not None else load(path, weights="student"), config)
        check_fit(student, source)
        source = prepared(student, source, config, world, watcher)
        trainer = make_trainer(config, student, source, world, teacher)
        restore_state(trainer, path)
        return _finish(trainer, teacher, path, watcher, command)


def teacher_again(config: RunConfig, run: Path) -> Denoiser | None:
    """The teacher of an unfinished run; None if it is gone and only its rows in the closing table need it.

    Raises:
        CheckpointError: the objective or the data need it, or it was a network of the user's own, which the run
            directory cannot contain.
    """
    if config.teacher == IN_MEMORY or ".py:" in config.teacher:
        given = IN_MEMORY if config.teacher == IN_MEMORY else f"as {config.teacher}"
        raise CheckpointError(
            f"'{run}' was tuned from a network of your own, given {given}",
            do=f"Give it again: fewstep resume {run} --network file.py:function, or resume(run, teacher=denoiser)",
        )
    if is_here(config.teacher):
        return load(config.teacher)
    own = own_samples(config.data.source) is not None
    if config.objective.needs_teacher or own:
        raise CheckpointError(
            f"The teacher '{config.teacher}' is gone, and "
            + ("the data are its own samples" if own else f"the objective '{config.objective.kind}' follows it"),
            do=f"Put it back, or give it: resume('{run}', teacher=denoiser)",
        )
    return None


def configure(
    job: str, recipe: str | None, objective: str | None, overrides: Mapping[str, Any] | None, data: Source | str | Path
) -> RunConfig:
    """The whole configuration of a run: recipe, then objective, then overrides."""
    about_objective = objective is not None or any(path.split(".")[0] == "objective" for path in overrides or {})
    config = named_recipe(recipe) if recipe is not None else default_recipe(job, about_objective=about_objective)
    if config.job != job:
        raise ConfigError(
            f"The recipe '{config.recipe}' is not one to {job} with",
            do=f"Run: fewstep {config.job} --recipe {config.recipe}",
        )
    if objective is not None and objective != config.objective.kind:
        if objective not in OBJECTIVES:
            raise ConfigError(f"There is no objective '{objective}'", do=nearest(objective, OBJECTIVES))
        config = replace(
            config,
            objective=_inherit(OBJECTIVES[objective](), config.objective),
            student=replace(config.student, sampler_times={}, boundary_shift=0.0),  # the recipe's objective's own
        )
    config = with_overrides(config, overrides or {})
    if config.job != job:
        raise ConfigError(f"These settings are for a run to {config.job}", got=f"job: {config.job}", want=f"job: {job}")
    if isinstance(data, str | Path):
        name = str(data) if own_samples(str(data)) is not None else _absolute(data)
    else:
        name = data.name
    if config.eval.data is not None:
        config = replace(config, eval=replace(config.eval, data=_absolute(config.eval.data)))
    return replace(config, data=replace(config.data, source=name))


def _inherit(objective: Objective, recipes: Objective) -> Objective:
    """``objective`` with the recipe's mapping and schedule, which are made for its length, where it has such fields.

    Law and penalty come along with them. Of a sequence, its second part counts.
    """
    recipes = getattr(recipes, "then", recipes)
    names = ("mapping", "schedule", "law", "penalty")
    if not all(hasattr(each, name) for each in (objective, recipes) for name in names):
        return objective
    return replace(objective, **{name: getattr(recipes, name) for name in names})  # type: ignore[type-var]


def _absolute(path: str | Path) -> str:
    """A path that still holds when the run is resumed from another folder; names of sources stay names.

    Of ``kind:PATH`` and ``kind:PATH#COLUMN`` the path in the middle.
    """
    name = str(path)
    kind, colon, where = name.partition(":")
    if colon and kind in SOURCES:
        plain, hash_sign, column = where.partition("#") if kind == "hf" else (where, "", "")
        return f"{kind}:{_resolved(plain)}{hash_sign}{column}"
    return name if name in SOURCES else _resolved(name)


def _resolved(name: str) -> str:
    """The absolute path of what is there, under the name that it was given otherwise."""
    path = Path(name).expanduser()
    return str(path.resolve()) if name and path.exists() else name


def open_data(config: DataConfig) -> Source:
    """The source of a configuration."""
    return open_source(
        config.source, resize=config.resize, channels=config.channels, labels=config.labels, split=config.split
    )


def source_of(config: RunConfig, teacher: Denoiser | None, world: World) -> Source:
    """The source of a run: as :func:`open_data`, or the teacher's own samples."""
    own = teachers_own(config, teacher, world.device)
    return open_data(config.data) if own is None else own


def open_run(path: Path) -> Run:
    """A run directory with the results that its end left there, if it has ended."""
    results = path / "results.json"
    return Run(path, read_run(path), json.loads(results.read_text(encoding="utf-8")) if results.is_file() else None)


def _sizes(backbone: str, shape: tuple[int, ...], classes: int, given: Mapping[str, Any]) -> dict[str, Any]:
    """What the data says of a network, in that network's words; diffusers' have theirs in the config that is given."""
    if backbone == "diffusers":
        own = {"sample_size": shape[-1], "in_channels": shape[0], "out_channels": shape[0]}
        labels = {"num_class_embeds": classes or None, "num_embeds_ada_norm": classes}
        return {"kind": given.get("kind", "UNet2DModel"), "config": dict(given.get("config") or {}) | own | labels}
    if backbone in ("edm", "adm"):
        return {"img_resolution": shape[-1], "in_channels": shape[0], "out_channels": shape[0], "label_dim": classes}
    if backbone == "edm2":
        return {"img_resolution": shape[-1], "img_channels": shape[0], "label_dim": classes}
    return {"sample_shape": list(shape), "num_classes": classes}


def new_network(config: RunConfig, source: Source) -> Denoiser:
    """A network with fresh weights (seeded) for pretraining on ``source``."""
    classes = source.num_classes if config.model.conditional else 0
    if config.model.conditional and not classes:
        raise DataError("A conditional model needs labels, and the data has none", got=source.name)
    codec = None if config.model.vae is None else codec_of(config.model.vae)
    shape = tuple(source.shape) if codec is None else codec.latent_shape(tuple(source.shape))
    kwargs = config.model.kwargs | _sizes(config.model.backbone, shape, classes, config.model.kwargs)
    spec = {"name": config.model.backbone, "kwargs": kwargs}
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            backbone = build(spec)
    except (ValueError, TypeError, RuntimeError, ArithmeticError, LookupError) as error:
        raise ConfigError(
            f"The network '{config.model.backbone}' cannot be built for samples of shape {shape}: {error}",
            got=f"model.kwargs={config.model.kwargs}",
            do="Images need unet, dit, edm, adm or edm2, points need mlp: --set model.backbone=mlp",
        ) from error
    theirs = config.model.backbone == "diffusers"  # whose embeddings of time expect hundreds
    network = Denoiser(
        backbone,
        EDM(),
        Parametrization("edm", config.model.sigma_data, "quarter_log_thousand" if theirs else "quarter_log"),
        sample_shape=shape,
        num_classes=classes,
        sigma_max=config.model.sigma_max,
        spec=spec,
        codec=codec,
    )
    return equip(network, config)


def make_trainer(
    config: RunConfig, student: Denoiser, source: Source, world: World, teacher: Denoiser | None
) -> Trainer:
    """A trainer with the networks that the objective needs beside the student, on the device.

    A teacher whose weights the student shares goes there with it, in place.
    """
    move_together([student, teacher] if teacher is not None and keeps_base(config) else [student], world.device)
    features = None
    if config.objective.features is not None:
        features = open_differentiable(config.objective.features)
    return Trainer(config, student, source, world, teacher, features)


def demo_teacher() -> Path:
    """The diffusion model of 8x8 digits that the package ships (docs/demo.md says which command made it)."""
    return Path(str(importlib.resources.files("fewstep"))) / "data" / "embedded" / "digits-teacher"


def rows_of(run: Run) -> list[Row]:
    """The quality table of a finished run."""
    return rows_from(run.results or {})


@contextmanager
def joined(device: str) -> Iterator[World]:
    """The process group of a run, left at the end."""
    world = World.join(device)
    try:
        yield world
    finally:
        world.leave()


def _run(
    config: RunConfig,
    student: Denoiser,
    teacher: Denoiser | None,
    source: Source,
    world: World,
    out: Path,
    watcher: Watcher | None,
    command: str,
) -> Run:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(
            f"The output '{out}' already exists and is not empty",
            do=f"Continue it with: fewstep resume {out}. Or choose another --out"
            if (out / "config.yaml").is_file()
            else "Choose another --out",
        )
    check_table(config, source)
    source = prepared(student, source, config, world, watcher)
    trainer = make_trainer(config, student, source, world, teacher)
    world.wait()
    if world.leads:
        write_text(out / "config.yaml", dump_yaml(config))
    return _finish(trainer, teacher, out, watcher, command)


def _finish(trainer: Trainer, teacher: Denoiser | None, out: Path, watcher: Watcher | None, command: str) -> Run:
    watcher = watcher or Watcher()
    train(trainer, out, watcher)
    trainer.world.wait()  # the others leave now: an evaluation may take longer than a collective operation waits
    with stopping_at_once(out):
        results = finish(trainer, teacher, out, watcher, command) if trainer.world.leads else None
    return Run(out, trainer.config, results)
