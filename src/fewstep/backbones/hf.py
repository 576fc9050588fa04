"""Networks of diffusers as backbones: ``{"kind": "UNet2DModel", "config": {...}}`` (extra ``hf``).

The network is diffusers' own, under the prefix ``network.``; how its kind is called stands in :mod:`hf_kinds`.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.backbones.hf_kinds import KINDS, Kind
from fewstep.conditioning import Conditioning, Part
from fewstep.errors import ConfigError, nearest
from fewstep.types import Condition, Samples


class DiffusersNetwork(nn.Module):
    """``F(x, timestep, cond)`` of a diffusers network; ``c_noise`` is its ``timestep``.

    Where a network also predicts its variance (twice the channels), the first half is returned. Class labels are
    one-hot rows; a row of zeros is "no label": the null class of a DiT; a U-Net of diffusers has none and gets an
    embedding of zeros, which only a network that was tuned with dropped labels knows. The label dropping inside DiT is
    off: labels are dropped by the trainer.

    Args:
        kind: the network's class, a key of ``KINDS``.
        config: its configuration; what is missing has diffusers' default, what it does not know is left out.
        parts: of text-conditional networks, name and shape of the embeddings in a condition; see
            :class:`fewstep.conditioning.Conditioning`.

    Raises:
        ConfigError: an unknown kind, a configuration that cannot be built or called from here, or other parts than
            the network takes.
    """

    null_cond: Tensor

    def __init__(self, kind: str, config: Mapping[str, Any], parts: Sequence[tuple[str, Sequence[int]]] = ()) -> None:
        super().__init__()
        self.kind, self._kind, self._config = kind, kind_of(kind), complete(kind, config)
        self.conditioning = Conditioning(
            self._kind.classes(self._config), tuple(Part(name, tuple(shape)) for name, shape in parts)
        )
        self._check(kind)
        self.network = _make(kind, self._config)
        _sharpen(self.network)
        self._kind.adapt(self.network)
        self.landing_width: int = self._kind.width(self.network)
        if self.conditioning.parts:
            self.register_buffer("null_cond", torch.zeros(self.conditioning.width))

    def forward(
        self, x: Samples, c_noise: Tensor, cond: Condition | None = None, landing: Tensor | None = None
    ) -> Tensor:
        """``landing [b, landing_width]`` is added to the network's embedding of time."""
        with _added(self._kind.embedders(self.network), landing):
            out = self._kind.call(self.network, x, c_noise, self._said(cond, x.shape[0]))
        return out[:, : x.shape[1]]

    def _said(self, cond: Condition | None, batch: int) -> dict[str, Tensor]:
        """The parts of a text condition by name, or ``labels [b]``."""
        if self.conditioning.parts:
            return self.conditioning.unpack(self.null_cond.expand(batch, -1) if cond is None else cond)
        if not self.conditioning.num_classes:
            return {}
        null = self._kind.null_class(self._config)
        if cond is None:
            device = next(self.network.parameters()).device
            return {"labels": torch.full((batch,), null, device=device)}
        return {"labels": torch.where(cond.any(dim=1), cond.argmax(dim=1), null)}

    def _check(self, kind: str) -> None:
        problem = self._kind.problem(self._config)
        if problem is not None:
            raise ConfigError(f"This {kind} cannot be used as a denoiser", got=problem)
        want = self._kind.parts(self._config)
        have = {part.name: part.shape[-1] for part in self.conditioning.parts}
        if have != want:
            raise ConfigError(
                f"This {kind} takes other conditions", got=have or "none", want=want or "no text",
                do="Each is a part of a row by name, with the size of its last dimension",
            )  # fmt: skip


def kind_of(name: str) -> Kind:
    """How networks of that class are called.

    Raises:
        ConfigError: the class is not known here.
    """
    if name not in KINDS:
        raise ConfigError(f"There is no way to call a diffusers network of class '{name}'", do=nearest(name, KINDS))
    return KINDS[name]


def complete(kind: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with diffusers' defaults, without what the class does not know, as JSON holds it.

    Raises:
        ConfigError: it cannot be written as JSON.
    """
    parameters = inspect.signature(_class(kind).__init__).parameters
    whole = {name: config.get(name, p.default) for name, p in parameters.items() if p.default is not p.empty}
    try:
        return dict(json.loads(json.dumps(whole)))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"The configuration of a {kind} holds something that JSON cannot: {error}") from error


def library() -> Any:
    """The package diffusers.

    Raises:
        ConfigError: it is not installed, or fails to import.
    """
    try:
        import diffusers

        _ = diffusers.UNet2DModel  # imported at first use, with all that it needs
    except Exception as error:  # not installed, or broken by something that it imports
        missing = isinstance(error, ModuleNotFoundError) and error.name == "diffusers"
        raise ConfigError(
            f"Networks of diffusers need the package diffusers, which {'is not' if missing else 'cannot be'} "
            f"{'installed' if missing else 'imported'}",
            got=None if missing else error,
            do="Run: pip install 'fewstep[hf]'",
        ) from error
    return diffusers


def _class(kind: str) -> Any:
    kind_of(kind)
    return getattr(library(), kind)


def _make(kind: str, config: Mapping[str, Any]) -> nn.Module:
    """The network with random weights."""
    made = _class(kind)
    try:
        return made(**config)
    except Exception as error:  # someone else's constructor may raise anything
        raise ConfigError(f"A {kind} cannot be built from this configuration: {error}", got=dict(config)) from error


class TimeFeatures(nn.Module):
    """diffusers' cosines and sines of the time, in float64 where the time is: theirs are float32 at best."""

    def __init__(self, plain: Any) -> None:
        super().__init__()
        self.plain = plain

    def forward(self, timesteps: Tensor) -> Tensor:
        if timesteps.dtype != torch.float64:
            return self.plain(timesteps)
        plain: Any = self.plain
        half = plain.num_channels // 2
        rate = torch.arange(half, dtype=timesteps.dtype, device=timesteps.device) / (half - plain.downscale_freq_shift)
        angle = plain.scale * timesteps[:, None] * (-math.log(10_000) * rate).exp()
        pair = (angle.cos(), angle.sin()) if plain.flip_sin_to_cos else (angle.sin(), angle.cos())
        return nn.functional.pad(torch.cat(pair, dim=1), (0, plain.num_channels % 2))


def _sharpen(network: nn.Module) -> None:
    """Put :class:`TimeFeatures` around every embedding of time; it has no weights."""
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if type(child).__name__ == "Timesteps":
                setattr(parent, name, TimeFeatures(child))


@contextmanager
def _added(modules: Sequence[nn.Module], term: Tensor | None) -> Iterator[None]:
    """While open, what these modules return has ``term`` added. Nothing of it stays: copies and exports are plain."""
    hooks = [
        module.register_forward_hook(lambda _module, _inputs, out: out + term)
        for module in (modules if term is not None else ())
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
