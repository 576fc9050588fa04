"""EDM, ECT and EDM2 pickles -> model directories, without running anything of theirs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.backbones import build
from fewstep.checkpoint.diffusers import is_diffusers, load_diffusers
from fewstep.checkpoint.edm_pickle import NetworkRecord, read_network, require_supported
from fewstep.checkpoint.model import save_model
from fewstep.denoiser import Denoiser, Parametrization
from fewstep.errors import CheckpointError, ConfigError
from fewstep.process import EDM, VP, Process
from fewstep.weights import check_weights, load_weights

NETWORKS = {"SongUNet": "edm", "DhariwalUNet": "adm"}
EDM2_PRECONDITIONER, EDM2_NETWORK = "Precond", "UNet"
PRECONDITIONERS = ("EDMPrecond", "ECMPrecond", "VPPrecond", "VEPrecond", EDM2_PRECONDITIONER)
PIXELS = "StandardRGBEncoder"
"""EDM2's encoder of pixel models: uint8 / 127.5 - 1."""


def convert(src: str | Path, dst: str | Path, *, which: str | None = None) -> Denoiser:
    """Read a ``.pkl`` of EDM, ECT or EDM2, ECT's ``training-state-*.pt`` or a diffusers model; write a model directory.

    Args:
        src: the pickle; nothing in it is executed. Or a folder that diffusers saved, or a hub id.
        dst: directory to write, which must not exist or be empty; it appears complete or not at all.
        which: "ema" (default for snapshots) or "net" (default for training states).

    Raises:
        UnsafePickleError: the file asks for something outside the allow-list.
        CheckpointError: it is damaged, or of a kind that is not supported.
    """
    source, target = Path(src), Path(dst)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"The output '{target}' already exists and is not empty", do="Choose another directory")
    if is_diffusers(src):
        if which is not None:
            raise CheckpointError(f"'{src}' holds one set of weights only", got=which, do="Leave --weights out")
        denoiser = load_diffusers(src)
        save_model(denoiser, target, {"source": str(src), "network": denoiser.backbone.kind})
        return denoiser
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
    _require_pixels(record, source)
    spec, state = _described(record, source)
    backbone = _network(spec, state, record.model_class, source)
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


def _require_pixels(record: NetworkRecord, source: Path) -> None:
    """Refuse EDM2's models of latents: their scaling of each channel is in the encoder, which is not read."""
    if record.encoder_class not in (None, PIXELS):
        raise CheckpointError(
            f"'{source}' is a model of latents (of EDM2's {record.encoder_class}), which cannot be converted",
            want=f"a model of pixels ({PIXELS})",
            do="Convert a pixel model of EDM2, for example edm2-img64-s-1073741-0.075.pkl; "
            "models of latents are taken from diffusers folders",
        )


def _described(record: NetworkRecord, source: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """How to build the network of a record, and its weights under the names of that network."""
    edm2 = record.precond_class == EDM2_PRECONDITIONER
    known = [EDM2_NETWORK] if edm2 else [*NETWORKS]
    if record.model_class not in known:
        raise CheckpointError(
            f"'{source}' holds a {record.model_class} in a {record.precond_class}, which cannot be converted",
            want=" or ".join(known),
        )
    if not edm2:
        return {"name": NETWORKS[record.model_class], "kwargs": record.model_kwargs}, record.state
    head = record.precond_state.get("logvar_fourier.freqs")  # ECT's snapshots of EDM2 networks have none
    kwargs = record.model_kwargs | {"logvar_channels": 0 if head is None else head.numel()}
    state = {f"unet.{name}": tensor for name, tensor in record.state.items()}
    return {"name": "edm2", "kwargs": kwargs}, state | record.precond_state


def _network(spec: dict[str, Any], state: dict[str, Tensor], kind: str, source: Path) -> nn.Module:
    """The network with its weights, in its own precision; shapes are compared before any memory is spent on it."""
    try:
        with torch.device("meta"):
            check_weights(build(spec), state, str(source))
        backbone = build(spec)
    except (ConfigError, ValueError, TypeError, RuntimeError, ArithmeticError, MemoryError) as error:
        raise CheckpointError(f"'{source}' describes a {kind} that cannot be built: {error}") from error
    load_weights(backbone, state, str(source))  # float16 becomes what the network has, float32
    return backbone


def _meaning(record: NetworkRecord) -> tuple[Process, Parametrization]:
    """Native process and parametrization of a preconditioner (EDM table 1); EDM2's is EDM's."""
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
