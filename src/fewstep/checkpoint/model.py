"""Model directories: ``model.safetensors`` with ``config.json`` <-> a :class:`Denoiser`."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.backbones import build
from fewstep.backbones.lora import merged
from fewstep.backbones.vae import open_codec
from fewstep.checkpoint.adapter import complete
from fewstep.checkpoint.averages import rebuild_average
from fewstep.checkpoint.diffusers import is_diffusers, load_diffusers
from fewstep.checkpoint.store import header, new_directory, read_json, read_tensors, write_json, write_tensors
from fewstep.conditioning import Part
from fewstep.config import from_dict, to_dict
from fewstep.denoiser import Denoiser, Parametrization, Sampler
from fewstep.errors import CheckpointError
from fewstep.process import AnyProcess
from fewstep.weights import load_weights, tensors_hash

KIND = "fewstep-model"

MEANING = (
    "native", "parametrization", "sample_shape", "num_classes", "sigma_min", "sigma_max", "value_range",
    "sampler", "sampler_times",
)  # fmt: skip
"""The fields of :class:`ModelConfig` that :func:`meaning` reads."""


@dataclass(frozen=True)
class ModelConfig:
    """Everything of a denoiser but its weights; ``backbone`` is None for a user's own module."""

    process: AnyProcess
    native: AnyProcess
    parametrization: Parametrization
    sample_shape: tuple[int, ...]
    backbone: dict[str, Any] | None = None
    num_classes: int = 0
    sigma_min: float = 0.0
    sigma_max: float = 80.0
    value_range: tuple[float, float] = (-1.0, 1.0)
    sampler_times: dict[str, Any] = field(default_factory=dict)
    sampler: Sampler = "consistency"
    parts: tuple[Part, ...] = ()
    codec: dict[str, Any] | None = None
    text: dict[str, Any] | None = None


def describe(denoiser: Denoiser) -> dict[str, Any]:
    """The JSON form of everything but the weights."""
    d = denoiser
    times = {str(k): list(v) for k, v in d.sampler_times.items()}
    config = ModelConfig(
        d.process, d.native, d.parametrization, d.sample_shape, d.spec, d.num_classes,  # type: ignore[arg-type]
        d.sigma_min, d.sigma_max, d.value_range, times, d.sampler, d.conditioning.parts,
        None if d.codec is None else d.codec.description, d.text,
    )  # fmt: skip
    return header(KIND) | to_dict(config)


def meaning(description: dict[str, Any]) -> dict[str, Any]:
    """What a description says of how the network's input and output are to be understood, as JSON reads it back.

    That is in no weight and in no path. What an older description does not say is not in it.
    """
    told: dict[str, Any] = json.loads(json.dumps({name: description[name] for name in MEANING if name in description}))
    return told


def rebuild(description: dict[str, Any], source: str, network: Denoiser | None = None) -> Denoiser:
    """The denoiser of a description, with random weights, or around the user's own ``network``.

    Raises:
        CheckpointError: the description names no backbone and no ``network`` was given.
    """
    fields = {k: v for k, v in description.items() if k not in ("format", "version", "provenance", "base")}
    config = from_dict(ModelConfig, fields, source)
    if config.backbone is None and network is None:
        raise CheckpointError(
            f"'{source}' was tuned from a network of your own, which a checkpoint cannot contain",
            do="Give it again: load(path, network=denoiser), or on the command line --network file.py:function",
        )
    backbone = build(config.backbone) if config.backbone is not None else network.clone().backbone  # type: ignore[union-attr]
    return Denoiser(
        backbone,
        config.process,
        config.parametrization,
        native=config.native,
        sample_shape=config.sample_shape,
        num_classes=config.num_classes,
        parts=config.parts,
        sigma_min=config.sigma_min,
        sigma_max=config.sigma_max,
        value_range=config.value_range,
        sampler=config.sampler,
        sampler_times={int(k): tuple(v) for k, v in config.sampler_times.items()},
        spec=config.backbone,
        codec=None if config.codec is None else open_codec(config.codec),
        text=config.text,
    )


def save_model(denoiser: Denoiser, path: Path, provenance: dict[str, Any] | None = None) -> None:
    """Write a model directory atomically."""
    with new_directory(path) as directory:
        write_tensors(directory / "model.safetensors", denoiser.backbone.state_dict())
        write_json(directory / "config.json", describe(denoiser) | {"provenance": provenance or {}})


def load_model(path: Path, network: Denoiser | None = None) -> Denoiser:
    """Read a model directory."""
    denoiser = rebuild(read_json(path / "config.json", KIND), str(path), network)
    load_weights(denoiser.backbone, read_tensors(path / "model.safetensors"), str(path))
    return denoiser


def load(
    path: str | Path | object,
    *,
    weights: str = "ema",
    device: str | torch.device | None = None,
    network: Denoiser | None = None,
) -> Denoiser:
    """A denoiser from a model directory, a converted checkpoint, a run directory or a model of diffusers.

    Args:
        path: the directory; of a run, its finished ``model/`` or else its latest checkpoint is taken. Of diffusers: a
            folder, a hub id ``owner/name[@revision]``, or an open pipeline (:func:`load_diffusers`).
        weights: "ema" (the first average); of a run also "ema-K" (the K-th), "student", or "std=0.075": the
            power-function average of that width, rebuilt from the run's snapshots.
        device: where to put it; default: CPU.
        network: your own module again (``Denoiser.from_module(...)``) for runs that were tuned from one.

    Raises:
        CheckpointError: nothing loadable is there, or it does not fit.
    """
    of_diffusers = not isinstance(path, str | Path) or is_diffusers(path)
    root = Path(path if isinstance(path, str | Path) else ".")
    if not root.is_dir() and not of_diffusers:
        raise _not_a_model(root)
    if of_diffusers or (root / "config.json").is_file():
        if weights != "ema":
            raise CheckpointError(f"'{path}' holds one set of weights only", got=weights, do="Leave weights='ema'")
        denoiser = load_diffusers(path) if of_diffusers else load_model(root, network)
    elif weights.startswith("std="):
        denoiser = _from_averages(root, weights, network)
    elif weights == "ema" and (root / "model" / "config.json").is_file():
        denoiser = load_model(root / "model", network)
    elif (root / "checkpoints").is_dir():
        denoiser = _from_checkpoint(latest_checkpoint(root), weights, network)
    else:
        raise _not_a_model(root)
    return denoiser.to(device).eval() if device is not None else denoiser.eval()


def weights_hash(denoiser: Denoiser) -> str:
    """sha256, in hex, of the names and bits of a model's weights."""
    return tensors_hash(denoiser.backbone.state_dict())


def latest_checkpoint(run: Path) -> Path:
    """The newest complete checkpoint of a run directory.

    Raises:
        CheckpointError: there is none.
    """
    pointer = run / "checkpoints" / "latest"
    if not pointer.is_file():
        raise CheckpointError(
            f"'{run}' has no checkpoint to resume from or load", do="Start the run again: fewstep tune"
        )
    path = run / "checkpoints" / pointer.read_text(encoding="utf-8").strip()
    if not path.is_dir():
        raise CheckpointError(f"The checkpoint '{path}' that '{pointer}' names does not exist")
    return path


def _from_checkpoint(path: Path, weights: str, network: Denoiser | None) -> Denoiser:
    name = "ema-0" if weights == "ema" else weights
    file = path / f"{name}.safetensors"
    if not file.is_file():
        known = sorted(p.stem for p in (*path.glob("ema-*.safetensors"), *path.glob("student.safetensors")))
        raise CheckpointError(
            f"The checkpoint has no weights '{weights}'", got=weights, want=" or ".join(["ema", *known])
        )
    return _put_together(path, read_tensors(file), str(file), network)


def _put_together(path: Path, state: dict[str, Tensor], source: str, network: Denoiser | None) -> Denoiser:
    """The network of a checkpoint with these weights; where they are those that were trained, with its base's.

    An adapter is merged.
    """
    description = read_json(path / "model.json", KIND)
    denoiser = rebuild(description, str(path), network)
    if "base" not in description:
        load_weights(denoiser.backbone, state, source)
        return denoiser
    base = network if network is not None else _base_model(str(description["base"]["path"]), source)
    complete(denoiser, description["base"], base, state, source)
    return merged(denoiser)


def _base_model(path: str, source: str) -> Denoiser:
    try:
        return load(path)
    except CheckpointError as error:
        raise CheckpointError(
            f"'{source}' holds only what was trained, and the model '{path}' that the rest is from cannot be read",
            got=error.what,
            do="Put it back, or give it: load(path, network=denoiser)",
        ) from error


def _from_averages(run: Path, weights: str, network: Denoiser | None) -> Denoiser:
    try:
        std = float(weights.removeprefix("std="))
    except ValueError as error:
        raise CheckpointError("The width of an average is not a number", got=weights, want="std=0.075") from error
    return _put_together(latest_checkpoint(run), rebuild_average(run, std), f"{run / 'averages'}", network)


def _not_a_model(path: Path) -> CheckpointError:
    if path.suffix in (".pkl", ".pt") and path.is_file():
        return CheckpointError(
            f"'{path}' is a pickle, which is never opened directly", do=f"Run: fewstep convert {path} DIRECTORY"
        )
    what = "does not exist" if not path.exists() else "is not a model, a run or a converted checkpoint"
    return CheckpointError(f"'{path}' {what}", want="a directory with config.json, model/ or checkpoints/")
