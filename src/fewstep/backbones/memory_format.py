"""Which layout in memory a network's convolutions are to have, and where channels_last must not be used."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import nn

from fewstep.errors import ConfigError

Layout: TypeAlias = Literal["contiguous", "channels_last"]


def preferred_layout(backbone: nn.Module, kind: str, device: torch.device) -> Layout:
    """The faster layout for one step in the arithmetic ``kind`` ("fp32", "tf32", "fp16", "bf16") on ``device``.

    "channels_last" on a GPU for networks of convolutions without group normalisation (EDM2's) on tensor cores, which
    read it without transposing. Everything else is "contiguous": torch's group normalisation has no channels_last on
    CUDA (it would copy at every layer; ``torch.compile`` chooses for itself), and on the CPU channels_last was measured
    1.00 to 1.06 times as fast in fp32 and 0.8 to 0.9 times in bf16 (docs/performance.md).
    """
    convolutions = any(p.ndim == 4 for p in backbone.parameters())
    normed = any(isinstance(module, nn.GroupNorm) for module in backbone.modules())
    gpu = torch.device(device).type == "cuda" and kind != "fp32"
    return "channels_last" if gpu and convolutions and not normed else "contiguous"


def set_layout(backbone: nn.Module, layout: Layout) -> None:
    """Put the weights of convolutions into this layout, in place; activations follow them.

    Raises:
        ConfigError: on the CPU, where the layout would crash the process (torch 2.13): group normalisation with weights
            to train behind frozen parts, in channels_last.
    """
    if layout == "channels_last" and _crashes(backbone):
        raise ConfigError(
            "This network cannot be trained in channels_last on a CPU: torch crashes in a group normalisation that is "
            "trained behind frozen layers",
            do="Leave speed.layout at auto, or train the whole network",
        )
    form = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    backbone.to(memory_format=form)  # type: ignore[call-overload]


def _crashes(backbone: nn.Module) -> bool:
    trained = [p.requires_grad for p in backbone.parameters() if p.device.type == "cpu"]
    normed = any(p.requires_grad for m in backbone.modules() if isinstance(m, nn.GroupNorm) for p in m.parameters())
    return normed and not all(trained)
