"""What a feature net is, and the checks that stand between images and a network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from fewstep.errors import ConfigError, DataError

IN_UNITS = "x/127.5 - 1"
REPEATED = "; grey repeated to 3 channels"

Extract: TypeAlias = Callable[[Tensor], Tensor]
"""uint8 images ``[b, c, h, w]`` or float points ``[b, ...]`` -> features ``[b, dim]`` on the same device."""
ExtractWithLogits: TypeAlias = Callable[[Tensor], tuple[Tensor, Tensor]]
"""The same images -> features ``[b, dim]`` and the logits ``[b, classes]`` of the net's own classifier."""


@dataclass(frozen=True)
class FeatureNet:
    """A named map from images to features.

    Args:
        name: as it stands in the names of numbers ("MNIST-CNN").
        dim: number of features.
        hash: sha256 of what fixes the map: the weights file, or the reference of a PCA.
        extract: uint8 images ``[b, c, h, w]`` (or, for ``pixels`` and ``pca``, float points) -> ``[b, dim]``.
        preprocessing: what happens to the pixels before the network.
        extract_with_logits: the same, and the logits of the net's classifier; None where it has none.
        verified: the weights are known to be the published ones (by sha256); Inception only.
    """

    name: str
    dim: int
    hash: str
    extract: Extract
    preprocessing: str = ""
    extract_with_logits: ExtractWithLogits | None = None
    verified: bool = False


def with_logits(extract: Extract, head: Callable[[Tensor], Tensor]) -> ExtractWithLogits:
    """``extract`` and, computed from its features, the logits ``head(features)``."""

    def extract_with_logits(images: Tensor) -> tuple[Tensor, Tensor]:
        features = extract(images)
        with torch.no_grad():
            return features, head(features)

    return extract_with_logits


def image_extractor(
    name: str,
    net: Callable[[Tensor], Tensor],
    *,
    channels: int,
    side: int | None = None,
    scale: Callable[[Tensor], Tensor] | None = None,
) -> Extract:
    """``net`` behind the checks of its images, which it gets in [-1, 1] unless ``scale`` says otherwise."""

    def extract(images: Tensor) -> Tensor:
        x = _with_channels(checked_images(images, name), channels, name)
        if side is not None and tuple(x.shape[2:]) != (side, side):
            raise DataError(
                f"The feature net {name} reads images of {side}x{side} pixels only",
                got=f"{x.shape[2]}x{x.shape[3]}",
                do="For other sizes use mobilenet, pca or pixels: nothing is resized silently",
            )
        with torch.no_grad():
            out = (net.to(x.device) if isinstance(net, nn.Module) else net)((scale or _unit)(x))
        if not isinstance(out, Tensor) or out.ndim < 2 or len(out) != len(x):
            got = f"shape {list(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
            raise ConfigError(f"The feature net {name} does not return features", got=got, want=f"[{len(x)}, dim]")
        return out.flatten(1)

    return extract


def checked_images(x: Tensor, name: str) -> Tensor:
    """``x`` itself if it is uint8 ``[b, c, h, w]``; else a DataError."""
    if x.ndim != 4 or x.dtype != torch.uint8:
        raise DataError(
            f"The feature net {name} reads images",
            got=f"{str(x.dtype).removeprefix('torch.')} of shape {list(x.shape)}",
            want="uint8 [b, c, h, w]",
            do="Use pixels or pca for points",
        )
    return x


def _with_channels(x: Tensor, channels: int, name: str) -> Tensor:
    if x.shape[1] == channels:
        return x
    if x.shape[1] == 1:
        return x.expand(-1, channels, -1, -1)
    raise DataError(
        f"The feature net {name} cannot read images of {x.shape[1]} channels",
        want=f"{channels} (or 1)",
        do="Use another feature net: colour is not dropped silently",
    )


def pixels_of(x: Tensor) -> Tensor:
    """uint8 images as x/127.5 - 1, float points as they are, flattened to ``[b, d]``; else a DataError."""
    if x.dtype != torch.uint8 and not x.is_floating_point():
        raise DataError("These are neither images nor points", got=f"values of type {x.dtype}", want="uint8 or float")
    if x.ndim < 2:
        raise DataError(
            "These are neither images nor points", got=f"shape {list(x.shape)}", want="[b, c, h, w] or [b, k]"
        )
    return _unit(x).flatten(1)


def _unit(x: Tensor) -> Tensor:
    """uint8 0..255 -> float32 -1..1; floats as they are."""
    return x.float() / 127.5 - 1 if x.dtype == torch.uint8 else x


def needed(reference: Tensor | None, name: str) -> Tensor:
    """The reference itself if there is one; else a DataError."""
    if reference is None or not len(reference):
        raise DataError(f"The feature net {name} needs reference samples to be opened", got="none", want="at least 2")
    return reference
