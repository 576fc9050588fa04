"""The end of a run: the model directory, the table, and what its report is drawn from."""

from __future__ import annotations

import datetime
import json
import platform
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fewstep.backbones.lora import merged
from fewstep.checkpoint.adapter import save_adapter
from fewstep.checkpoint.model import save_model
from fewstep.checkpoint.store import file_hash, write_json
from fewstep.data import Source
from fewstep.data.latents import LatentSource, pictures_of
from fewstep.denoiser import Denoiser
from fewstep.evaluation.evaluate import draw_labels, evaluate, open_reference, to_host
from fewstep.evaluation.features import FeatureNet
from fewstep.evaluation.neighbours import NEAREST, Neighbours, find_neighbours
from fewstep.evaluation.record import TEACHER, TUNED, write_record
from fewstep.evaluation.report import Picture, report_run, step_dial_png
from fewstep.sampling import ode_sample_nfe, possible_among, sample
from fewstep.training.frozen import base_path
from fewstep.training.loop import GRID_STEPS, Watcher, peak_memory
from fewstep.training.past import provenance
from fewstep.training.synthetic import compared_with, origin, standing
from fewstep.training.trainer import Trainer


def finish(
    trainer: Trainer, teacher: Denoiser | None, run: Path, watcher: Watcher, command: str
) -> dict[str, Any] | None:
    """Write ``model/`` (and ``adapter/``), evaluate model and teacher, write ``results.json`` and the report."""
    config = trainer.config
    model = merged(trainer.averages[0])
    about = provenance(config) | {
        "recipe": config.recipe,
        "data": trainer.source.name,
        "images": trainer.images_seen,
    }
    if "adapter" in config.models:
        save_adapter(trainer.averages[0], run / "adapter", base_path(config))
        watcher.saved(run / "adapter")
    if "model" in config.models:
        save_model(model, run / "model", about)
        watcher.saved(run / "model")
    pictures: list[Picture] = []
    results, net = None, None
    if config.eval.samples > 0:
        results, net = _evaluate(trainer, teacher, model, watcher, pictures)
        write_json(run / "results.json", results)
        watcher.saved(run / "results.json")
    elif config.job == "tune":
        pictures += [_picture(trainer, TUNED, model, "consistency", n) for n in possible_among(model, GRID_STEPS)]
    write_record(
        run,
        facts=_facts(trainer, teacher),
        command=with_seed(command, config.seed),
        environment=environment(trainer.world.device),
        pictures=pictures,
        reference=_real(_pictured(trainer), config.output.grid),
        neighbours=_neighbours(trainer, pictures, net),
    )
    record = report_run(run)
    watcher.saved(run / "report.html")
    if pictures:
        step_dial_png(run / "samples" / "step-dial.png", pictures, record.rows)
        watcher.saved(run / "samples" / "step-dial.png")
    return results


def _evaluate(
    trainer: Trainer, teacher: Denoiser | None, model: Denoiser, watcher: Watcher, pictures: list[Picture]
) -> tuple[dict[str, Any], FeatureNet]:
    """Results and pictures of the teacher's solver and of the tuned model (or of the pretrained one alone)."""
    config, out = trainer.config, {}
    compared = pictures_of(compared_with(config, trainer.source), model.codec)
    reference = open_reference(compared, config.eval.features, split=config.data.split, device=model.device)
    tuning = config.job == "tune"
    diffusion = teacher.to(model.device) if teacher is not None else None if tuning else model
    jobs = [(TEACHER, diffusion, "ode", config.eval.teacher_nfe)] if diffusion is not None else []
    jobs += [(TUNED, model, "consistency", tuple(possible_among(model, config.eval.steps)))] if tuning else []
    for name, denoiser, solver, steps in jobs:

        def show(row: dict[str, Any], name: str = name) -> None:
            watcher.evaluated(row | {"model": name})

        out[name] = evaluate(
            denoiser, reference, steps=steps, solver=solver, samples=config.eval.samples, seed=config.seed, on_row=show
        )
        pictures += [_picture(trainer, name, denoiser, solver, n) for n in steps]
    return out, reference.net


def _picture(trainer: Trainer, name: str, denoiser: Denoiser, solver: str, nfe: int) -> Picture:
    n, seed = trainer.config.output.grid, trainer.config.seed
    cond = draw_labels(denoiser, trainer.source, n, seed)
    run = (
        ode_sample_nfe(denoiser, n, nfe, seed=seed, cond=cond)
        if solver == "ode"
        else sample(denoiser, n, steps=nfe, seed=seed, cond=cond)
    )
    return Picture(name, nfe, to_host(denoiser, run))


def _pictured(trainer: Trainer) -> Source:
    """The data as it is measured and shown: of a model of latents, the images."""
    source = standing(trainer.source, trainer.config.eval.samples or trainer.config.output.grid)
    return pictures_of(source, trainer.student.codec)


def _real(source: Source, n: int) -> torch.Tensor:
    index = torch.linspace(0, len(source) - 1, min(n, len(source))).round().long().numpy()
    return source.read(index)


def _neighbours(trainer: Trainer, pictures: list[Picture], net: FeatureNet | None) -> Neighbours | None:
    """Of the tuned model's samples with the fewest steps; of a pretrained model's with the most."""
    tuned = [picture for picture in pictures if picture.model == TUNED]
    shown = min(tuned, key=lambda p: p.nfe) if tuned else max(pictures, key=lambda p: p.nfe, default=None)
    source = _pictured(trainer)
    if shown is None or not source.is_images or len(source) <= NEAREST:
        return None
    return find_neighbours(shown.images, source, net, device=trainer.world.device)


def _facts(trainer: Trainer, teacher: Denoiser | None) -> dict[str, Any]:
    """What config.yaml does not say about the run."""
    source = _pictured(trainer)
    latents = trainer.source.moments if isinstance(trainer.source, LatentSource) else None
    return {
        "images_seen": trainer.images_seen,
        "parameters": sum(p.numel() for p in trainer.student.parameters()),
        "trained": sum(p.numel() for p in trainer.student.parameters() if p.requires_grad),
        "dataset": {"count": len(trainer.source), "shape": [int(side) for side in source.shape]},
        "origin": origin(trainer.source, teacher),
        "latents": None if latents is None else {"mean": latents[0], "std": latents[1]},
        "processes": trainer.world.size,
        "peak_memory": peak_memory(trainer.world.device),
        "teacher": known_of(Path(trainer.config.teacher)) if trainer.config.teacher else {},
    }


def known_of(teacher: Path) -> dict[str, Any]:
    """Provenance and sha256 of the weights of a model or run directory; empty for anything else."""
    for folder in (teacher, teacher / "model"):
        config, weights = folder / "config.json", folder / "model.safetensors"
        if config.is_file() and weights.is_file():
            about = json.loads(config.read_text(encoding="utf-8")).get("provenance") or {}
            return {"provenance": about, "sha256": file_hash(weights)}
    return {}


def with_seed(command: str, seed: int) -> str:
    """The command as typed, with the seed if it was left out; empty for a resumed run, which it would not repeat.

    >>> with_seed("fewstep demo --out run", 0), with_seed("fewstep resume run", 0)
    ('fewstep demo --out run --seed 0', '')
    """
    words = shlex.split(command)
    if not words or "resume" in words[:2]:
        return ""
    return command if any(word.split("=")[0] == "--seed" for word in words) else f"{command} --seed {seed}"


def environment(device: torch.device) -> dict[str, str]:
    """Where the numbers come from."""
    from fewstep import __version__

    return {
        "fewstep": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "threads": str(torch.get_num_threads()),
        "system": platform.platform(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def processor() -> str:
    """The model of the CPU, as Linux tells it; elsewhere its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"CPU {names[0] if names else platform.machine()}"
