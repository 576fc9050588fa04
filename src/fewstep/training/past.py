"""What the directory of an earlier run says, and what that allows."""

from __future__ import annotations

from pathlib import Path

from fewstep.checkpoint.model import KIND as MODEL_KIND
from fewstep.checkpoint.store import read_json
from fewstep.config import from_dict, read_yaml
from fewstep.errors import CheckpointError, ConfigError
from fewstep.training.config import RunConfig
from fewstep.training.synthetic import own_samples


def read_run(path: Path) -> RunConfig:
    """The configuration of a run directory.

    Raises:
        ConfigError: it is not a run directory.
    """
    if not (path / "config.yaml").is_file():
        raise ConfigError(
            f"'{path}' is not a run directory: it has no config.yaml", do="Give the --out of a tune or pretrain run"
        )
    return from_dict(RunConfig, read_yaml(path / "config.yaml"))


def check_teacher(config: RunConfig, teacher: Path) -> None:
    """Refuse a few-step model where the objective follows a diffusion model, and one that cannot guide.

    Raises:
        ConfigError: ``teacher`` is a tuned run, or one that always saw its labels.
    """
    if config.objective.guides and not hides_labels(teacher):
        raise ConfigError(
            "Guidance asks the teacher what it does without a label, and it never trained without one",
            got=f"data.label_drop=0 in '{teacher}'",
            do="Pretrain it with --set data.label_drop=0.1, or tune with --set objective.bridge.guidance=1",
        )
    do = f"Give the diffusion model as TEACHER, and that run as the start: --set student.start={teacher}"
    if config.objective.needs_teacher:
        require_diffusion(teacher, f"The objective '{config.objective.kind}' follows a diffusion model", do)
    elif own_samples(config.data.source) is not None:
        require_diffusion(teacher, "The data are to be samples of a diffusion model", do)


def require_diffusion(teacher: Path, why: str, do: str = "Give the diffusion model that it was tuned from") -> None:
    """Refuse a run that made a few-step model, and the model that it made.

    Raises:
        ConfigError: ``teacher`` is one.
    """
    job, objective = _made_by(teacher)
    if job == "tune" and objective != "diffusion":
        raise ConfigError(f"{why}, and '{teacher}' is a few-step model", got=f"a run tuned with '{objective}'", do=do)


def provenance(config: RunConfig) -> dict[str, str]:
    """What a model directory says of the run that made it, for :func:`require_diffusion` to read."""
    return {"job": config.job, "objective": config.objective.kind, "teacher": config.teacher}


def _made_by(model: Path) -> tuple[str, str]:
    """Job and kind of objective of the run that a model is from; empty where nobody says."""
    run = _run_of(model)
    if run is not None:
        past = read_run(run)
        return past.job, past.objective.kind
    try:
        about = read_json(model / "config.json", MODEL_KIND).get("provenance") or {}
    except CheckpointError:  # not a model directory
        return "", ""
    return str(about.get("job", "")), str(about.get("objective", ""))


def _run_of(model: Path) -> Path | None:
    """The run directory that is given, or whose ``model`` is; None of others."""
    full = model.resolve()
    runs = [model, full.parent] if full.name == "model" else [model]
    return next((run for run in runs if (run / "config.yaml").is_file()), None)


def hides_labels(model: Path) -> bool:
    """Whether a model has trained without its labels, too; of one that is not a run nobody knows: true."""
    run = _run_of(model)
    return run is None or read_run(run).data.label_drop > 0
