"""Weights into a network, by name."""

from __future__ import annotations

from torch import Tensor, nn

from fewstep.errors import CheckpointError


def check_weights(module: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Compare names and shapes, and list every missing, unexpected and mis-shaped tensor.

    Raises:
        CheckpointError: the names or shapes do not fit exactly.
    """
    own = module.state_dict()
    missing = sorted(own.keys() - state.keys())
    unexpected = sorted(state.keys() - own.keys())
    misshaped = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
        for name in sorted(own.keys() & state.keys())
        if own[name].shape != state[name].shape
    ]
    problems = [("missing", missing), ("unexpected", unexpected), ("of another shape", misshaped)]
    found = "; ".join(f"{what}: {', '.join(names)}" for what, names in problems if names)
    if found:
        raise CheckpointError(f"The weights in {source} do not fit the network", got=found)


def load_weights(module: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Copy ``state`` into ``module`` by name, after :func:`check_weights`."""
    check_weights(module, state, source)
    module.load_state_dict(state)
