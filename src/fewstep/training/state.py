"""Save and restore the whole state of a trainer, to the same bits."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.checkpoint.adapter import other_base
from fewstep.checkpoint.averages import save_averages
from fewstep.checkpoint.model import KIND as MODEL_KIND
from fewstep.checkpoint.model import describe, latest_checkpoint, meaning
from fewstep.checkpoint.store import (
    header,
    new_directory,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
    write_text,
)
from fewstep.config import to_dict
from fewstep.denoiser import Denoiser
from fewstep.ema import PowerEMA
from fewstep.errors import CheckpointError
from fewstep.training.frozen import base_path
from fewstep.training.optim import optimizer_tensors, restore_optimizer
from fewstep.training.trainer import Trainer
from fewstep.weights import load_weights

KIND = "fewstep-checkpoint"


def save_state(trainer: Trainer, run: Path) -> Path:
    """Write ``checkpoints/images-XXXXXXXXX`` atomically, point ``latest`` to it, drop the oldest beyond ``keep``.

    Of what the run leaves as it is, only the hash is in it, and where it is from. Only the leading process writes. A
    checkpoint with non-finite history is never written.
    """
    path = run / "checkpoints" / f"images-{trainer.images_seen:09d}"
    sums = trainer.world.mean(trainer.sums)
    if trainer.world.leads:
        with new_directory(path) as directory:
            student = trainer.student
            write_json(directory / "model.json", describe(student) | trainer.base_record)
            write_tensors(directory / "student.safetensors", _trained(trainer, student))
            for k, average in enumerate(trainer.averages):
                write_tensors(directory / f"ema-{k}.safetensors", _trained(trainer, average))
            for name, companion in trainer.beside.companions.items():
                write_tensors(directory / f"companion-{name}.safetensors", _trained(trainer, companion))
            if trainer.beside.extra is not None:
                write_tensors(directory / "extra.safetensors", trainer.beside.extra.state_dict())
            write_tensors(directory / "optimizer.safetensors", optimizer_tensors(trainer.trained, trainer.optimizer))
            write_tensors(directory / "sums.safetensors", {"sums": sums})
            write_json(directory / "state.json", _record(trainer))
        save_averages(run, trainer.images_seen, _power_averages(trainer))
        write_text(run / "checkpoints" / "latest", path.name + "\n")
        _drop_old(path, trainer.config.output.keep)
    trainer.world.wait()
    return path


def restore_state(trainer: Trainer, run: Path) -> Path:
    """Continue from the newest checkpoint of ``run``.

    Raises:
        CheckpointError: it is damaged, of another version, or was made with other data, another teacher or base.
    """
    path = latest_checkpoint(run)
    record = read_json(path / "state.json", KIND)
    if record["data"] != trainer.source.fingerprint:
        raise CheckpointError(
            "The data is not what this run was started with, so it cannot continue to the same result",
            got=f"fingerprint {trainer.source.fingerprint[:12]} of {trainer.source.name}",
            want=f"fingerprint {str(record['data'])[:12]}",
        )
    if record.get("teacher") not in (None, trainer.followed):
        raise CheckpointError(
            "The teacher is not what this run was started with, so it cannot continue to the same result",
            got=f"other weights, or the same with another meaning, in '{trainer.config.teacher}'",
            do=f"Put it back, or give it: resume('{run}', teacher=denoiser)",
        )
    description = read_json(path / "model.json", MODEL_KIND)
    _check_meaning(meaning(description), meaning(describe(trainer.student)))
    if description.get("base") != trainer.base_record.get("base"):
        raise other_base(str(path), base_path(trainer.config))
    files = {"student": trainer.student} | {f"ema-{k}": average for k, average in enumerate(trainer.averages)}
    files |= {f"companion-{name}": companion for name, companion in trainer.beside.companions.items()}
    for name, network in files.items():
        load_weights(network.backbone, read_tensors(path / f"{name}.safetensors"), str(path), but=trainer.frozen)
    if trainer.beside.extra is not None:
        load_weights(trainer.beside.extra, read_tensors(path / "extra.safetensors"), str(path))
    optimizer = path / "optimizer.safetensors"
    restore_optimizer(trainer.trained, trainer.optimizer, read_tensors(optimizer), str(optimizer))
    sums = read_tensors(path / "sums.safetensors")["sums"]
    trainer.sums[: len(sums)].copy_(sums)
    trainer.scaling.restore(record.get("scaling", {}))
    trainer.images_seen, trainer.summed_steps = int(record["images_seen"]), int(record["summed_steps"])
    return path


def _check_meaning(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse a student whose weights would be read in another way than those of the checkpoint."""
    changed = [name for name, value in before.items() if now.get(name) != value]
    if changed:
        raise CheckpointError(
            "The model does not mean what it did when this run was started, so it cannot continue to the same result",
            got=", ".join(f"{name} {now.get(name)}" for name in changed),
            want=", ".join(f"{name} {before[name]}" for name in changed),
            do="Put the config of the model back that the run was started with",
        )


def _power_averages(trainer: Trainer) -> dict[float, dict[str, Tensor]]:
    """Relative width -> weights, of the averages that can be rebuilt at other widths."""
    pairs = zip(trainer.config.emas, trainer.averages, strict=True)
    return {law.std: _trained(trainer, average) for law, average in pairs if isinstance(law, PowerEMA)}


def _trained(trainer: Trainer, network: Denoiser) -> dict[str, Tensor]:
    """The tensors of a network that the run does not leave as they are."""
    return {name: tensor for name, tensor in network.backbone.state_dict().items() if name not in trainer.frozen}


def _record(trainer: Trainer) -> dict[str, object]:
    return header(KIND) | {
        "images_seen": trainer.images_seen,
        "summed_steps": trainer.summed_steps,
        "scaling": trainer.scaling.state(),
        "data": trainer.source.fingerprint,
        "teacher": trainer.followed,
        "torch": torch.__version__,
        "config": to_dict(trainer.config),
    }


def _drop_old(newest: Path, keep: int) -> None:
    """Keep ``newest`` and ``keep - 1`` before it; a killed process may have left half a directory, too."""
    older = sorted(p for p in newest.parent.glob("images-*") if p.name < newest.name)
    for old in [*older[: max(len(older) - keep + 1, 0)], *newest.parent.glob(".images-*")]:
        shutil.rmtree(old, ignore_errors=True)
