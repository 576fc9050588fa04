"""Weights by name: into a network, and those that a pattern means."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.errors import CheckpointError, ConfigError


def check_weights(module: nn.Module, state: dict[str, Tensor], source: str, but: Collection[str] = ()) -> None:
    """Compare names and shapes, and list every missing, unexpected and mis-shaped tensor.

    Args:
        but: names that ``state`` leaves out, on purpose.

    Raises:
        CheckpointError: the names or shapes do not fit exactly.
    """
    own = module.state_dict()
    missing = sorted(own.keys() - state.keys() - set(but))
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


def load_weights(module: nn.Module, state: dict[str, Tensor], source: str, but: Collection[str] = ()) -> None:
    """Copy ``state`` into ``module`` by name, after :func:`check_weights`; what it leaves out stays as it is."""
    check_weights(module, state, source, but)
    module.load_state_dict(state, strict=not but)


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """sha256, in hex, of the names and bits of tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, those that are tied or never saved, too."""
    return dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers())


def shared(module: nn.Module, names: Collection[str]) -> dict[int, Any]:
    """A memo for :func:`copy.deepcopy`: its copies of these tensors are ``module``'s memory, without gradients."""
    memo: dict[int, Any] = {}
    for name, tensor in tensors_of(module).items():
        if name in names and id(tensor) not in memo:
            parameter = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(tensor.detach(), requires_grad=False) if parameter else tensor
    return memo


def means(pattern: str, name: str) -> bool:
    """Whether ``pattern`` (``*``, ``?``, ``[ab]``) means this parameter or layer, or one that it is in.

    It is compared with every run of the name's parts, so that it needs to say neither where the network sits nor what
    is below. "all" means all.

    >>> [means(p, "inner.enc.block0.norm1.weight") for p in ("enc", "norm*", "enc.*.norm1", "weight", "block", "all")]
    [True, True, True, True, False, True]
    """
    parts = name.split(".")
    runs = (".".join(parts[i:j]) for i in range(len(parts)) for j in range(i + 1, len(parts) + 1))
    return pattern == "all" or any(fnmatchcase(run, pattern) for run in runs)


def chosen(patterns: Iterable[str], names: Collection[str], setting: str) -> list[str]:
    """Those of ``names`` that any pattern means, in their order.

    Raises:
        ConfigError: a pattern means none of them (with the nearest, and examples).
    """
    found: set[str] = set()
    for pattern in patterns:
        mine = {name for name in names if means(pattern, name)}
        if not mine:
            raise _means_nothing(pattern, names, setting)
        found |= mine
    return [name for name in names if name in found]


def _means_nothing(pattern: str, names: Collection[str], setting: str) -> ConfigError:
    near = difflib.get_close_matches(pattern.strip("*."), [*names, *{p for n in names for p in n.split(".")}], n=1)
    hint = f"Did you mean '{near[0]}'? " if near else ""
    some = [*names][:: max(1, len(names) // 6)][:6]
    return ConfigError(
        f"A pattern of {setting} means nothing in this network",
        got=pattern,
        do=f"{hint}Some of its {len(names)} names: {', '.join(some)}",
    )
