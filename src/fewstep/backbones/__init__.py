"""Backbones: raw networks by name, so that a checkpoint can name its own."""

from __future__ import annotations

from typing import Any

from torch import nn

from fewstep.backbones.adm import ADM
from fewstep.backbones.edm import SongUNet
from fewstep.backbones.edm2 import EDM2
from fewstep.backbones.guided import GuidanceTold
from fewstep.backbones.hf import DiffusersNetwork
from fewstep.backbones.small import MLP, DiT, UNet
from fewstep.backbones.two_time import TwoTime
from fewstep.errors import ConfigError, nearest

BACKBONES: dict[str, type[nn.Module]] = {
    "edm": SongUNet,
    "adm": ADM,
    "edm2": EDM2,
    "unet": UNet,
    "dit": DiT,
    "mlp": MLP,
    "diffusers": DiffusersNetwork,
    "two_time": TwoTime,
    "guided": GuidanceTold,
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
