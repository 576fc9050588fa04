"""Backbones: raw networks by name, so that a checkpoint can name its own."""

from __future__ import annotations

from typing import Any

from torch import nn

from fewstep.backbones.edm import SongUNet
from fewstep.backbones.small import MLP, DiT, UNet
from fewstep.backbones.two_time import TwoTime
from fewstep.errors import ConfigError, nearest

BACKBONES: dict[str, type[nn.Module]] = {
    "edm": SongUNet,
    "unet": UNet,
    "dit": DiT,
    "mlp": MLP,
    "two_time": TwoTime,
}


def build(spec: dict[str, Any]) -> nn.Module:
    """The network of ``{"name": ..., "kwargs": {...}}``; an argument of that form is a network inside it.

    Raises:
        ConfigError: the name is unknown or the arguments do not fit.
    """
    name = str(spec.get("name"))
    if name not in BACKBONES:
        raise ConfigError(f"There is no backbone '{name}'", do=nearest(name, BACKBONES))
    kwargs = {k: _argument(v) for k, v in dict(spec.get("kwargs") or {}).items()}
    try:
        return BACKBONES[name](**kwargs)
    except TypeError as error:
        raise ConfigError(f"The backbone '{name}' does not take these arguments: {error}", got=kwargs) from error


def _argument(value: Any) -> Any:
    if isinstance(value, dict) and value.keys() == {"name", "kwargs"}:
        return build(value)
    return tuple(value) if isinstance(value, list) else value
