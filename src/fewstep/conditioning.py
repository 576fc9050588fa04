"""What a network is told beside x_t and t: nothing, a class, or embeddings packed into one row per sample."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fewstep.errors import ConfigError
from fewstep.types import Condition


@dataclass(frozen=True)
class Part:
    """One embedding in a packed row: its name and shape, for example ``Part("text", (77, 768))``."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Conditioning:
    """The form of a condition: every condition is one float row per sample, ``[b, width]``.

    Rows can be drawn, dropped and mixed without knowing what they hold; only the network unpacks them.

    Args:
        num_classes: for class-conditional models: rows are one-hot.
        parts: for text-conditional models: rows are these embeddings, flattened, one after the other.

    Raises:
        ConfigError: both were given.
    """

    num_classes: int = 0
    parts: tuple[Part, ...] = ()

    def __post_init__(self) -> None:
        if self.num_classes and self.parts:
            raise ConfigError("A network is told either a class or embeddings", got=self)

    def __str__(self) -> str:
        parts = ", ".join(f"{part.name} {list(part.shape)}" for part in self.parts)
        return f"told {parts}" if parts else f"{self.num_classes} classes"

    def __bool__(self) -> bool:
        return self.width > 0

    @property
    def width(self) -> int:
        """Numbers per sample; 0 for unconditional models."""
        return self.num_classes or sum(math.prod(part.shape) for part in self.parts)

    def pack(self, **parts: Tensor) -> Condition:
        """``[b, width]`` of the parts by name, each ``[b, *shape]``.

        Raises:
            ConfigError: a part is missing, unknown or of another shape.
        """
        wanted = {part.name: part.shape for part in self.parts}
        given = {name: tuple(value.shape[1:]) for name, value in parts.items()}
        if given != wanted:
            raise ConfigError("The conditions do not have the shapes that this model was trained with", got=given,
                              want=wanted)  # fmt: skip
        return torch.cat([parts[part.name].flatten(1) for part in self.parts], dim=1)

    def unpack(self, rows: Condition) -> dict[str, Tensor]:
        """The parts of ``rows [b, width]`` by name, each ``[b, *shape]``."""
        pieces = torch.split(rows, [math.prod(part.shape) for part in self.parts], dim=1)
        return {p.name: x.reshape(x.shape[0], *p.shape) for p, x in zip(self.parts, pieces, strict=True)}

    def encode(
        self, cond: Tensor | None, batch: int, nothing: Tensor | None, device: torch.device, dtype: torch.dtype
    ) -> Condition | None:
        """The rows a network is given, float ``[b, width]``; None for an unconditional model.

        Args:
            cond: rows ``[b, width]``, class indices ``[b]``, or None for "nothing said".
            nothing: the row ``[width]`` that says nothing (an empty prompt); None is zeros.

        Raises:
            ConfigError: labels for an unconditional model, an unknown class, or another shape.
        """
        if not self:
            if cond is not None:
                raise ConfigError("Labels were given to an unconditional model", do="Call it with cond=None")
            return None
        if cond is None:
            row = torch.zeros(self.width) if nothing is None else nothing
            return row.to(device=device, dtype=dtype).expand(batch, self.width)
        if self.num_classes and cond.ndim == 1 and not cond.is_floating_point():
            cond = F.one_hot(self._classes(cond), self.num_classes)
        if cond.shape != (batch, self.width):
            what = "labels" if self.num_classes else "embedded conditions"
            raise ConfigError(f"The {what} have the wrong shape", got=tuple(cond.shape), want=(batch, self.width))
        return cond.to(device=device, dtype=dtype)

    def _classes(self, cond: Tensor) -> Tensor:
        low, high = (int(cond.min()), int(cond.max())) if len(cond) else (0, 0)
        if low < 0 or high >= self.num_classes:
            known = f"0 to {self.num_classes - 1}"
            raise ConfigError("A label is not a class of this model", got=low if low < 0 else high, want=known)
        return cond.long()
