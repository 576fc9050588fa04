"""How a step is executed: compiled or not, and in which memory layout."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from fewstep.arithmetic import Arithmetic
from fewstep.backbones.memory_format import preferred_layout, set_layout
from fewstep.compiling import compiled
from fewstep.denoiser import Denoiser
from fewstep.errors import ConfigError
from fewstep.objectives import Objective
from fewstep.objectives.base import AS_IT_IS, Execution
from fewstep.training.config import RunConfig, SpeedConfig

WORTH_COMPILING = 100_000
"""Images of a run from which on some minutes of compilation pay on a GPU."""


GRAPHS = 64
"""So many graphs of one loss are no accident."""


class Compiled(Execution):
    """One graph of both passes, the dropout masks and the penalty; its shapes are few.

    Which rows have r = 0 changes with every batch, so the target pass takes them in quarters of the batch: five shapes
    at most, each compiled when it first comes up.

    Args:
        graphs: replay CUDA graphs.
    """

    def __init__(self, graphs: bool = False) -> None:
        limits = torch._dynamo.config  # every count of rows, every part of a run and every network is a graph
        limits.recompile_limit = max(limits.recompile_limit, GRAPHS)
        self._graphs = graphs
        self._made: dict[tuple[int, str], tuple[object, Callable[..., Tensor]]] = {}

    def __call__(self, function: Callable[..., Tensor], *arguments: Any) -> Tensor:
        owner = getattr(function, "__self__", None)
        key = id(owner if owner is not None else function), getattr(function, "__name__", "")
        if key not in self._made:
            self._made[key] = owner, compiled(function, graphs=self._graphs, fullgraph=True)
        return self._made[key][1](*arguments)

    def begin(self) -> None:
        if self._graphs:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]

    def rows(self, count: int, batch: int) -> int:
        quarter = -(-batch // 4)
        return min(batch, -(-count // quarter) * quarter)


def execution(config: RunConfig, objective: Objective, device: torch.device) -> Execution:
    """What ``speed.compile`` asks for.

    Raises:
        ConfigError: an objective that takes derivatives of the network, which cannot be compiled, is to be.
    """
    speed = config.speed
    if speed.compile == "on" and not objective.compiles:
        raise ConfigError(
            f"The objective '{objective.kind}' cannot be compiled",
            got="speed.compile=on",
            do="Leave it out, or set speed.compile=off",
        )
    if speed.graphs and config.micro_batch is not None:
        raise ConfigError(
            "CUDA graphs cannot add up the gradients of several passes",
            got=f"speed.graphs=true micro_batch={config.micro_batch}",
            do="Set micro_batch=null, or speed.graphs=false",
        )
    if speed.graphs and device.type != "cuda":
        raise ConfigError("CUDA graphs need a CUDA device", got=f"speed.graphs=true on {device.type}")
    if speed.recompute and speed.compile == "on":
        raise ConfigError(
            "Computing blocks again in the backward pass is for runs that are not compiled",
            got="speed.recompute=true speed.compile=on",
            do="Choose one of the two; to save memory in a compiled run: micro_batch",
        )
    worth = device.type == "cuda" and config.images >= WORTH_COMPILING and not speed.recompute
    wanted = speed.compile == "on" or (speed.compile == "auto" and worth)
    if speed.graphs and not (wanted and objective.compiles):
        raise ConfigError("CUDA graphs are made of compiled graphs", got="speed.graphs=true", do="Set speed.compile=on")
    return Compiled(speed.graphs) if wanted and objective.compiles else AS_IT_IS


def lay_out(networks: Iterable[Denoiser], speed: SpeedConfig, kind: Arithmetic, shared: bool) -> None:
    """Lay the convolutions' weights out as ``speed.layout`` says; their outputs follow.

    Args:
        kind: the arithmetic that most of the run is in.
        shared: whether the networks share memory with others, which must then stay as it is.

    Raises:
        ConfigError: shared memory is to be laid out anew, or the layout is one that crashes here.
    """
    if shared and speed.layout == "channels_last":
        raise ConfigError(
            "Weights that the run shares with its teacher stay as they lie in memory",
            got="speed.layout=channels_last with an adapter or frozen parts",
            do="Set speed.layout=contiguous",
        )
    if shared:
        return
    for network in networks:
        wanted = preferred_layout(network.backbone, kind, network.device) if speed.layout == "auto" else speed.layout
        set_layout(network.backbone, wanted)
