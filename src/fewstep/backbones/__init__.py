"""Backbones: raw networks by name, so that a checkpoint can name its own."""

from __future__ import annotations

from typing import Any

from torch import nn

from fewstep.backbones.edm import SongUNet
from fewstep.backbones.small import MLP, DiT, UNet
from fewstep.errors import ConfigError, nearest

BACKBONES: dict[str, type[nn.Module]] = {
    "edm": SongUNet,
    "unet": UNet,
    "dit": DiT,
    "mlp": MLP,
}


def build(spec: dict[str, Any]) -> nn.Module:
    """The network of ``{"name": ..., "kwargs": {...}}``.

    Raises:
        ConfigError: the name is unknown or the arguments do not fit.
    """
    name = str(spec.get("name"))
    if name not in BACKBONES:
        raise ConfigError(f"There is no backbone '{name}'", do=nearest(name, BACKBONES))
    kwargs = {k: tuple(v) if isinstance(v, list) else v for k, v in dict(spec.get("kwargs") or {}).items()}
    try:
        return BACKBONES[name](**kwargs)
    except TypeError as error:
        raise ConfigError(f"The backbone '{name}' does not take these arguments: {error}", got=kwargs) from error
