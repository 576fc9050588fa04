"""A tuned model as other tools load it: a diffusers pipeline, an ONNX graph or a torch program, with a model card."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

from fewstep.backbones.lora import merged
from fewstep.checkpoint.model import describe as describe_model
from fewstep.checkpoint.model import load, weights_hash
from fewstep.checkpoint.store import header, new_directory, read_json, write_json, write_tensors, write_text
from fewstep.config import to_dict
from fewstep.denoiser import Denoiser
from fewstep.errors import ConfigError, nearest
from fewstep.exports.card import card
from fewstep.exports.diffusers import STEPS, write_pipeline
from fewstep.exports.graph import CHECKED_BATCHES, input_shapes, portable, write_onnx, write_program
from fewstep.exports.origin import origin_of
from fewstep.sampling import few_step_times, possible_among

Format = Literal["diffusers", "onnx", "torch"]

KIND, ABOUT, CARD = "fewstep-export", "fewstep.json", "README.md"


def export(
    run: str | Path | Denoiser,
    dst: str | Path,
    to: Format = "diffusers",
    *,
    weights: str = "ema",
    network: Denoiser | None = None,
    licence: str | None = None,
) -> Path:
    """Write a few-step model as other tools load it, into a new directory, whole or not at all.

    - "diffusers": a pipeline that ``DiffusionPipeline.from_pretrained`` loads (:func:`write_pipeline`).
    - "onnx": ``model.onnx``, f(x, sigma) -> x_0 with a dynamic batch, compared with the model in onnxruntime.
    - "torch": ``program.pt2`` for ``torch.export.load``, and a model directory that :func:`fewstep.load` opens.

    Beside it ``fewstep.json`` (noise levels, inputs, differences) and ``README.md``, the model card.

    Args:
        run: a run or model directory, or a denoiser.
        dst: the directory to write; it must not hold anything.
        weights, network: as for :func:`fewstep.load`.
        licence: of the weights, as the hub abbreviates it; default: what the teacher's card says.

    Returns:
        ``dst``.

    Raises:
        ConfigError: the model cannot be exported so, an extra is not installed, or ``dst`` is taken.
        CheckpointError: ``run`` cannot be loaded.
        StorageError: the disk refused.
    """
    target = Path(dst)
    if to not in get_args(Format):
        raise ConfigError(f"'{to}' is not a format to export to", do=nearest(str(to), get_args(Format)))
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"The output '{target}' already exists and is not empty", do="Choose another --out")
    denoiser = run if isinstance(run, Denoiser) else load(run, weights=weights, network=network)
    source = source_of(run, denoiser, weights)
    denoiser = portable(merged(denoiser))
    origin = origin_of(None if isinstance(run, Denoiser) else Path(run), licence)
    with new_directory(target) as folder:
        about = describe(denoiser, to) | _WRITERS[to](denoiser, folder) | source | {"licence": origin.licence}
        write_json(folder / ABOUT, about)
        write_text(folder / CARD, card(target.name, about, origin))
        for file in folder.rglob("*.safetensors"):
            file.chmod(0o644)  # safetensors keeps its files to their owner
    return target


def source_of(run: str | Path | Denoiser, denoiser: Denoiser, weights: str) -> dict[str, Any]:
    """What ``fewstep.json`` says of the model that was exported: last name, which weights, and their sha256."""
    name = "" if isinstance(run, Denoiser) else Path(run).resolve().name
    return {"source": name, "weights": weights, "sha256": weights_hash(denoiser)}


def check_exported(
    folder: Path, run: str | Path | Denoiser, to: Format, *, weights: str = "ema", network: Denoiser | None = None
) -> None:
    """Refuse the export in ``folder`` if it is not that of ``run``: arguments as for :func:`export`.

    Raises:
        ConfigError: it is of another model, or in another format, or of other weights.
        CheckpointError: ``run`` cannot be loaded.
    """
    about = read_json(folder / ABOUT, KIND)
    denoiser = run if isinstance(run, Denoiser) else load(run, weights=weights, network=network)
    asked = source_of(run, denoiser, weights) | {"to": to}
    differ = [name for name in ("to", "weights", "sha256") if about.get(name) != asked[name]]
    if differ:
        raise ConfigError(
            f"'{folder}' holds another export than is asked for",
            got=_in_words(about, differ),
            want=_in_words(asked, differ),
            do="Export again to another --out",
        )


def _in_words(about: dict[str, Any], names: list[str]) -> str:
    said = {"to": "--to", "weights": "--weights", "sha256": f"weights of '{about.get('source', 'unknown')}', sha256"}
    return ", ".join(f"{said[name]} {str(about.get(name, 'unknown'))[:12]}" for name in names)


def describe(denoiser: Denoiser, to: Format) -> dict[str, Any]:
    """What a program needs to know to sample the model, JSON-able; noise levels are EDM's."""
    from fewstep import __version__

    times = {str(n): few_step_times(denoiser, n) for n in possible_among(denoiser, STEPS)}
    about = header(KIND) | {"fewstep": __version__, "to": to, "sampler": denoiser.sampler, "sampler_times": times}
    about |= {"sample_shape": list(denoiser.sample_shape), "value_range": list(denoiser.value_range)}
    about |= {"latents": denoiser.codec is not None, "num_classes": denoiser.num_classes}
    about |= {"parts": to_dict(denoiser.conditioning.parts), "sigma_data": denoiser.sigma_data}
    if denoiser.guided:
        about["guidance_range"] = list(denoiser.guidance_range)
    return about


def _graph(denoiser: Denoiser, file: str, difference: float, largest_batch: int | None) -> dict[str, Any]:
    inputs = {name: ["batch", *shape] for name, shape in input_shapes(denoiser).items()}
    about = {"file": file, "inputs": inputs, "largest_batch": largest_batch}
    return about | {"difference": difference, "checked_batches": list(CHECKED_BATCHES)}


def _to_onnx(denoiser: Denoiser, folder: Path) -> dict[str, Any]:
    return _graph(denoiser, "model.onnx", write_onnx(denoiser, folder / "model.onnx"), None)


def _to_torch(denoiser: Denoiser, folder: Path) -> dict[str, Any]:
    difference, largest_batch = write_program(denoiser, folder / "program.pt2")
    write_tensors(folder / "model.safetensors", denoiser.backbone.state_dict())
    write_json(folder / "config.json", describe_model(denoiser))
    return _graph(denoiser, "program.pt2", difference, largest_batch)


_WRITERS: dict[Format, Callable[[Denoiser, Path], dict[str, Any]]] = {
    "diffusers": write_pipeline,
    "onnx": _to_onnx,
    "torch": _to_torch,
}
