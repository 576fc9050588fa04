"""EDM and ECT pickles -> model directories, without running anything of theirs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from fewstep.backbones import build
from fewstep.checkpoint.edm_pickle import NetworkRecord, read_network, require_supported
from fewstep.checkpoint.model import save_model
from fewstep.denoiser import Denoiser, Parametrization
from fewstep.errors import CheckpointError, ConfigError
from fewstep.process import EDM, VP, Process
from fewstep.weights import check_weights, load_weights

PRECONDITIONERS = ("EDMPrecond", "ECMPrecond", "VPPrecond", "VEPrecond")
NETWORKS = {"SongUNet": "edm"}


def convert(src: str | Path, dst: str | Path, *, which: str | None = None) -> Denoiser:
    """Read an EDM or ECT ``.pkl`` (or ECT ``training-state-*.pt``) and write a model directory.

    Args:
        src: the pickle; nothing in it is executed.
        dst: directory to write, which must not exist or be empty; it appears complete or not at all.
        which: "ema" (default for snapshots) or "net" (default for training states).

    Raises:
        UnsafePickleError: the file asks for something outside the allow-list.
        CheckpointError: it is damaged, or of a kind that is not supported.
    """
    source, target = Path(src), Path(dst)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"The output '{target}' already exists and is not empty", do="Choose another directory")
    record = read_network(source, which=which or ("net" if source.suffix == ".pt" else "ema"))
    denoiser = denoiser_of(record, source)
    provenance = {
        "source": source.name,
        "sha256": record.source_sha256,
        "preconditioner": record.precond_class,
        "network": record.model_class,
    }
    save_model(denoiser, target, provenance)
    return denoiser


def denoiser_of(record: NetworkRecord, source: Path) -> Denoiser:
    """The denoiser that a record describes."""
    require_supported(record, PRECONDITIONERS, source)
    if record.model_class not in NETWORKS:
        raise CheckpointError(
            f"'{source}' holds a {record.model_class}, which cannot be converted yet", want=" or ".join(NETWORKS)
        )
    spec = {"name": NETWORKS[record.model_class], "kwargs": record.model_kwargs}
    backbone = _network(spec, record, source)
    native, parametrization = _meaning(record)
    about = record.precond_kwargs
    size, channels = _whole(about, "img_resolution", source), _whole(about, "img_channels", source)
    sigma_max = float(about.get("sigma_max") or 80.0)  # type: ignore[arg-type]  # infinite in EDM's own files
    return Denoiser(
        backbone,
        EDM(),
        parametrization,
        native=native,
        sample_shape=(channels, size, size),
        num_classes=_whole(about, "label_dim", source),
        sigma_max=min(sigma_max, 80.0),
        spec=spec,
    ).eval()


def _network(spec: dict[str, Any], record: NetworkRecord, source: Path) -> nn.Module:
    """The network with its weights; shapes are compared before any memory is spent on it."""
    try:
        with torch.device("meta"):
            check_weights(build(spec), record.state, str(source))
        backbone = build(spec)
    except (ConfigError, ValueError, TypeError, RuntimeError, ArithmeticError, MemoryError) as error:
        raise CheckpointError(f"'{source}' describes a {record.model_class} that cannot be built: {error}") from error
    own = backbone.state_dict()
    load_weights(backbone, {name: tensor.to(own[name].dtype) for name, tensor in record.state.items()}, str(source))
    return backbone


def _meaning(record: NetworkRecord) -> tuple[Process, Parametrization]:
    """Native process and parametrization of a preconditioner (EDM table 1)."""
    about = record.precond_kwargs
    sigma_data = float(about.get("sigma_data") or 0.5)  # type: ignore[arg-type]
    if record.precond_class == "VPPrecond":
        process = VP(float(about.get("beta_d", 19.9)), float(about.get("beta_min", 0.1)))  # type: ignore[arg-type]
        return process, Parametrization("eps", sigma_data, time="thousand_minus_one")
    if record.precond_class == "VEPrecond":
        return EDM(), Parametrization("sigma_score", sigma_data, time="half_log")
    shift = float(about.get("sigma_min") or 0.0) if record.precond_class == "ECMPrecond" else 0.0  # type: ignore[arg-type]
    return EDM(), Parametrization("edm", sigma_data, boundary_shift=shift)


def _whole(about: dict[str, object], name: str, source: Path) -> int:
    value = about.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 65_536:
        raise CheckpointError(f"'{source}' does not say a usable {name}", got=value, want="a whole number")
    return value
