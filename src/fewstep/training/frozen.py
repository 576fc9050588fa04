"""What a run leaves as it is: which tensors, and copies of networks that share their memory."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable

import torch
from torch import Tensor, nn

from fewstep.backbones.lora import Adapter, adaptable, attach, base_names
from fewstep.denoiser import Denoiser
from fewstep.errors import ConfigError
from fewstep.training.config import LoRA, RunConfig
from fewstep.weights import chosen, means, shared, tensors_of


def keeps_base(config: RunConfig) -> bool:
    """Whether part of the network stays what it is: an adapter's base, or what is frozen by name."""
    return config.adapter is not None or bool(config.student.freeze)


def base_path(config: RunConfig) -> str:
    """Of the model that a student starts from."""
    return config.teacher if config.student.start in ("teacher", "fresh") else config.student.start


def tuned_copy(base: Denoiser, config: RunConfig) -> Denoiser:
    """A student of ``base`` that owns only what it trains; the rest is the base's memory.

    Raises:
        ConfigError: a pattern means nothing, nothing is left to train, or the network takes no adapter.
    """
    if config.adapter is not None:
        student = sharing_copy(base, tensors_of(base.backbone))
        attach(student.backbone, _adapter(student.backbone, config.adapter), config.seed)
        return student
    parameters = dict(base.backbone.named_parameters(remove_duplicate=False))
    frozen = set(chosen(config.student.freeze, parameters, "student.freeze"))
    if frozen == parameters.keys():
        raise ConfigError(
            "Nothing is left to train: student.freeze means every parameter", got=list(config.student.freeze)
        )
    student = sharing_copy(base, frozen | _matched_buffers(base.backbone, config))
    if not any(p.requires_grad for p in student.parameters()):
        for name, parameter in student.backbone.named_parameters():
            parameter.requires_grad_(name not in frozen)
    return student


def _adapter(backbone: nn.Module, config: LoRA) -> Adapter:
    root, layers = adaptable(backbone, config.targets)
    alpha = config.rank if config.alpha is None else config.alpha
    return Adapter(root, layers, config.rank, alpha, config.stabilised)


def _matched_buffers(backbone: nn.Module, config: RunConfig) -> set[str]:
    return {name for name, _ in backbone.named_buffers() if any(means(p, name) for p in config.student.freeze)}


def frozen_names(backbone: nn.Module, config: RunConfig) -> frozenset[str]:
    """Names of a student's tensors that the run leaves as they are: neither averaged, nor saved with its state.

    An adapter's base with its buffers, or what ``student.freeze`` means; never what the teacher does not have (a
    landing time's embedding, say).
    """
    if config.adapter is not None:
        return base_names(backbone)
    parameters = {name for name, p in backbone.named_parameters(remove_duplicate=False) if not p.requires_grad}
    frozen = {name for name in parameters if any(means(p, name) for p in config.student.freeze)}
    return frozenset(frozen | _matched_buffers(backbone, config))


def resting_parts(backbone: nn.Module, config: RunConfig, frozen: Collection[str]) -> tuple[str, ...]:
    """Names of the parts that are frozen by name as a whole: they run as in evaluation, without dropout.

    An adapter's base is none: its dropout regularises the adapter, and ``student.dropout`` sets it.
    """
    if not config.student.freeze:
        return ()
    found = []
    for name, module in backbone.named_modules():
        inside = [f"{name}.{own}" for own, _ in module.named_parameters(remove_duplicate=False)]
        if name and inside and all(each in frozen for each in inside):
            found.append(name)
    return tuple(found)


def sharing_copy(network: Denoiser, names: Collection[str]) -> Denoiser:
    """A copy whose tensors of these names are ``network``'s memory, without gradients; its codec is the same."""
    out: Denoiser = copy.deepcopy(network, shared(network.backbone, names) | {id(network.codec): network.codec})
    return out


def move_together(networks: Iterable[nn.Module], device: torch.device) -> None:
    """Move networks in place; what they share stays shared."""
    moved: dict[tuple[object, ...], tuple[Tensor, Tensor]] = {}

    def move(tensor: Tensor) -> Tensor:
        key = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if key not in moved:
            moved[key] = (tensor, tensor.to(device))
        return moved[key][1]

    for network in networks:
        network._apply(move)  # type: ignore[no-untyped-call]


def storage_bytes(networks: Iterable[nn.Module]) -> int:
    """Bytes of all parameters of all networks, each piece of memory once."""
    pieces = (p.untyped_storage() for network in networks for p in network.parameters())
    return sum({piece.data_ptr(): piece.nbytes() for piece in pieces}.values())
