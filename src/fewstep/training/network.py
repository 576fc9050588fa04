"""What the trainer arranges inside a network: which parts train, dropout, modes, memory layout."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

from torch import nn

from fewstep.backbones.layout import LocalDropout
from fewstep.backbones.recompute import set_recompute
from fewstep.denoiser import Denoiser
from fewstep.errors import ConfigError
from fewstep.training.config import SpeedConfig, StudentConfig


def trained_parts(student: Denoiser, extra: nn.Module | None) -> nn.Module:
    """Everything with gradients, as one module: ``backbone`` and, where the objective has its own, ``extra``."""
    parts = {"backbone": student.backbone}
    return nn.ModuleDict(parts if extra is None else parts | {"extra": extra})


def after_step(student: Denoiser) -> None:
    """What the network's layers do after every step of the optimiser (EDM2: forced weight normalisation)."""
    for act in after_steps(student):
        act()


def after_steps(student: Denoiser) -> list[Callable[[], None]]:
    """The same, layer by layer; not those that are frozen, whose weights are the teacher's memory."""
    found = [(layer, getattr(layer, "after_step", None)) for layer in student.backbone.modules()]
    return [act for layer, act in found if act is not None and any(p.requires_grad for p in layer.parameters())]


def set_dropout(module: nn.Module, config: StudentConfig) -> None:
    """Give the network's dropout layers the configured probability; None leaves them alone.

    With ``dropout_max_resolution`` only those that act there or below; those above get 0.

    Raises:
        ConfigError: dropout is asked for by resolution, which this network's layers do not say.
    """
    if config.dropout is None:
        return
    kinds = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
    layers = [layer for layer in module.modules() if isinstance(layer, kinds)]
    most = config.dropout_max_resolution
    if most is not None and not (layers and all(isinstance(layer, LocalDropout) for layer in layers)):
        raise ConfigError(
            "This network does not say at which resolution its dropout layers act (edm, adm and edm2 do)",
            got=f"student.dropout_max_resolution={most}",
            do="Leave it out: --set student.dropout_max_resolution=null",
        )
    for layer in layers:
        above = most is not None and isinstance(layer, LocalDropout) and layer.resolution > most
        layer.p = 0.0 if above else config.dropout


def set_recomputation(student: Denoiser, config: SpeedConfig) -> None:
    """Let the network's blocks keep their inputs alone, where ``speed.recompute`` asks for it.

    Raises:
        ConfigError: the network has no blocks that can.
    """
    if config.recompute and set_recompute(student.backbone, True) == 0:
        raise ConfigError(
            "This network does not say which of its blocks can be computed again in the backward pass",
            got="speed.recompute=true",
            do="Save memory with micro_batch instead: --set speed.recompute=false micro_batch=8",
        )


def unused_parameters(student: Denoiser) -> Iterator[nn.Parameter]:
    """Parameters that take no part in any loss, wherever that network is.

    They are EDM's ``map_augment``, without augmentation labels, and EDM2's ``logvar_linear``.
    """
    for module in student.modules():
        for name in ("map_augment", "logvar_linear"):
            part = getattr(module, name, None)
            if part is not None:
                yield from part.parameters()


def train_mode(network: Denoiser, resting: Collection[str] = ()) -> None:
    """Training mode (dropout on), except for ``resting`` parts and for batch normalisation, which keeps its statistics.

    Two passes per step, over different rows, would mix their statistics in.
    """
    network.train()
    for layer in network.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.eval()
    for name in resting:
        network.backbone.get_submodule(name).eval()
