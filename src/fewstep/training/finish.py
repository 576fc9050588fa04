"""The end of a run: the model directory, the table, the report."""

from __future__ import annotations

import datetime
import platform
from pathlib import Path
from typing import Any

import torch

from fewstep.checkpoint.model import save_model
from fewstep.checkpoint.store import write_json
from fewstep.data import Source
from fewstep.denoiser import Denoiser
from fewstep.evaluation.evaluate import Reference, draw_labels, evaluate, open_reference, to_host
from fewstep.evaluation.report import Picture, ReportData, Row, step_dial_png, write_report
from fewstep.sampling import ode_sample_nfe, sample
from fewstep.training.loop import GRID_STEPS, Watcher, peak_memory, read_history
from fewstep.training.trainer import Trainer

TEACHER, TUNED = "teacher (diffusion)", "tuned"


def finish(
    trainer: Trainer, teacher: Denoiser | None, run: Path, watcher: Watcher, command: str
) -> dict[str, Any] | None:
    """Write ``model/``, evaluate model and teacher, write ``results.json`` and ``report.html``."""
    config = trainer.config
    model = trainer.averages[0]
    provenance = {
        "recipe": config.recipe,
        "teacher": config.teacher,
        "data": trainer.source.name,
        "images": trainer.images_seen,
    }
    save_model(model, run / "model", provenance)
    watcher.saved(run / "model")
    rows: list[Row] = []
    pictures: list[Picture] = []
    results = None
    if config.eval.samples > 0:
        reference = open_reference(
            trainer.source, config.eval.features, samples=config.eval.samples, device=model.device
        )
        results = _evaluate(trainer, teacher, model, reference, watcher, rows, pictures)
        write_json(run / "results.json", results)
        watcher.saved(run / "results.json")
    elif config.job == "tune":
        pictures += [_picture(trainer, TUNED, model, "consistency", n) for n in GRID_STEPS]
    data = ReportData(
        title=_title(trainer),
        summary=_summary(trainer, teacher),
        rows=rows,
        pictures=pictures,
        reference=_real(trainer.source, config.output.grid),
        history=read_history(run),
        command=command,
        environment=environment(trainer.world.device),
    )
    write_report(run / "report.html", data)
    watcher.saved(run / "report.html")
    if pictures:
        step_dial_png(run / "samples" / "step-dial.png", pictures, rows)
        watcher.saved(run / "samples" / "step-dial.png")
    return results


def _evaluate(
    trainer: Trainer,
    teacher: Denoiser | None,
    model: Denoiser,
    reference: Reference,
    watcher: Watcher,
    rows: list[Row],
    pictures: list[Picture],
) -> dict[str, Any]:
    """Rows and pictures of the teacher's solver and of the tuned model (or of the pretrained one alone)."""
    config, out = trainer.config, {}
    tuning = config.job == "tune"
    diffusion = teacher.to(model.device) if teacher is not None else None if tuning else model
    jobs = [(TEACHER, diffusion, "ode", config.eval.teacher_nfe)] if diffusion is not None else []
    jobs += [(TUNED, model, "consistency", config.eval.steps)] if tuning else []
    for name, denoiser, solver, steps in jobs:

        def show(row: dict[str, Any], name: str = name) -> None:
            rows.append(Row(name, row["nfe"], row["metrics"], row["samples_per_second"]))
            watcher.evaluated(row | {"model": name})

        out[name] = evaluate(
            denoiser, reference, steps=steps, solver=solver, samples=config.eval.samples, seed=config.seed, on_row=show
        )
        pictures += [_picture(trainer, name, denoiser, solver, n) for n in steps]
    return out


def _picture(trainer: Trainer, name: str, denoiser: Denoiser, solver: str, nfe: int) -> Picture:
    n, seed = trainer.config.output.grid, trainer.config.seed
    cond = draw_labels(denoiser, trainer.source, n, seed)
    run = (
        ode_sample_nfe(denoiser, n, nfe, seed=seed, cond=cond)
        if solver == "ode"
        else sample(denoiser, n, steps=nfe, seed=seed, cond=cond)
    )
    return Picture(name, nfe, to_host(denoiser, run, trainer.source.is_images))


def _real(source: Source, n: int) -> torch.Tensor:
    index = torch.linspace(0, len(source) - 1, min(n, len(source))).round().long().numpy()
    return source.read(index)


def _title(trainer: Trainer) -> str:
    verb = "Tuned" if trainer.config.job == "tune" else "Pretrained"
    return f"{verb} on {trainer.source.name}: {trainer.images_seen:,} images, recipe {trainer.config.recipe}"


def _summary(trainer: Trainer, teacher: Denoiser | None) -> list[tuple[str, str]]:
    config = trainer.config
    parameters = sum(p.numel() for p in trainer.student.parameters())
    rows = [
        ("Objective", config.objective.kind),
        ("Recipe", f"{config.recipe} ({config.note})" if config.note else config.recipe),
        ("Data", f"{trainer.source.name}, {len(trainer.source):,} samples of {tuple(trainer.source.shape)}"),
        ("Network", f"{parameters / 1e6:.2f} M parameters"),
        ("Images seen", f"{trainer.images_seen:,} in batches of {config.batch_size}"),
        ("Seed", str(config.seed)),
        ("Processes", str(trainer.world.size)),
        ("Peak memory", f"{peak_memory(trainer.world.device) / 2**20:.0f} MiB"),
    ]
    if teacher is not None:
        rows.insert(0, ("Teacher", config.teacher))
    return rows


def environment(device: torch.device) -> dict[str, str]:
    """Where the numbers come from."""
    from fewstep import __version__

    hardware = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU {platform.machine()}, {torch.get_num_threads()} threads"
    )
    return {
        "fewstep": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "hardware": hardware,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }
