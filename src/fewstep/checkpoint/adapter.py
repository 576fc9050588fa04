"""Adapters on disk in the layouts of peft and diffusers, and checkpoints that hold only what was trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fewstep.backbones.lora import Adapter, adapter_of, adapter_tensors, attach, peft_record, plain_name
from fewstep.checkpoint.store import new_directory, write_json, write_tensors
from fewstep.config import from_dict, to_dict
from fewstep.denoiser import Denoiser
from fewstep.errors import CheckpointError
from fewstep.weights import load_weights, tensors_hash


@dataclass(frozen=True)
class Base:
    """What a checkpoint of trained tensors alone says of the rest.

    Args:
        path: of the model that the rest is from, or how it was given.
        sha256: of the names and bits of the tensors that are not in the checkpoint.
        adapter: what the network carries; None where parts of it are frozen.
    """

    path: str
    sha256: str
    adapter: Adapter | None = None


def describe_base(backbone: nn.Module, kept: Mapping[str, Tensor], path: str) -> dict[str, Any]:
    """The record of the base of a network; ``kept`` are its tensors that were not trained."""
    return to_dict(Base(path, tensors_hash(kept), adapter_of(backbone)))


def complete(
    denoiser: Denoiser, record: Mapping[str, Any], base: Denoiser, state: dict[str, Tensor], source: str
) -> None:
    """Give a network of random weights the base's and, on top, the trained tensors ``state`` (with their adapter).

    Raises:
        CheckpointError: the base is not the model that the run was started with.
    """
    about = from_dict(Base, record, source)
    if about.adapter is not None:
        attach(denoiser.backbone, about.adapter)
    given = base.backbone.state_dict()
    own = denoiser.backbone.state_dict()
    kept = {name: _counterpart(name, given) for name in own.keys() - state.keys()}
    found = {name: tensor for name, tensor in kept.items() if tensor is not None and tensor.shape == own[name].shape}
    if found.keys() != kept.keys() or tensors_hash(found) != about.sha256:
        raise other_base(source, about.path)
    load_weights(denoiser.backbone, state | found, source)


def other_base(source: str, path: str) -> CheckpointError:
    """The weights that a run keeps are not those that it was started with."""
    return CheckpointError(
        f"'{source}' holds only what was trained, and the rest is not in '{path}' any more: other weights are there",
        do="Put the model back that the run was started with",
    )


def _counterpart(name: str, given: Mapping[str, Tensor]) -> Tensor | None:
    """The base's tensor: it has no adapter, and may not be inside a network that is told more."""
    plain = plain_name(name)
    while plain not in given and plain.startswith("inner."):
        plain = plain.removeprefix("inner.")
    return given.get(plain)


def save_adapter(denoiser: Denoiser, path: Path, base: str) -> None:
    """Write a directory that ``peft.PeftModel.from_pretrained(network, path)`` loads.

    ``adapter_model.safetensors`` and ``adapter_config.json``; for networks that load adapters themselves
    ``pytorch_lora_weights.safetensors``, too, as ``pipeline.load_lora_weights(path)`` wants it, with the scale in B.
    What a student has beside the adapter (the embedding of a landing time) is in ``model/`` only.

    Args:
        base: name or path of the model that the adapter is for.
    """
    adapter = adapter_of(denoiser.backbone)
    assert adapter is not None
    tensors = adapter_tensors(denoiser.backbone)
    with new_directory(path) as directory:
        named = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
        write_tensors(directory / "adapter_model.safetensors", named)
        write_json(directory / "adapter_config.json", peft_record(adapter, base))
        network = denoiser.backbone.get_submodule(adapter.root)
        if hasattr(network, "load_lora_adapter"):
            prefix = "unet" if type(network).__name__.startswith("UNet") else "transformer"
            scaled = {
                f"{prefix}.{name}": tensor * adapter.scale if name.endswith("lora_B.weight") else tensor
                for name, tensor in tensors.items()
            }
            write_tensors(directory / "pytorch_lora_weights.safetensors", scaled)
