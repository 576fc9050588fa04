"""What the U-Nets of EDM, ADM and EDM2 share: which block stands where, and the sizes that none can be built from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import nn

from fewstep.errors import ConfigError

Resampling: TypeAlias = Literal["up", "down"]


@dataclass(frozen=True)
class Place:
    """A block of a U-Net: its name, the pixels per side at which it acts, its channels and what it does there."""

    name: str
    side: int
    inputs: int
    outputs: int
    resample: Resampling | None = None
    attention: bool = False


def encoder(resolution: int, widths: Sequence[int], blocks: int, attention: Sequence[int]) -> Iterator[Place]:
    """The downward path of ADM and EDM2 (EDM2, figure 21), after a convolution to ``widths[0]`` channels.

    Args:
        resolution: pixels per side of the image.
        widths: channels per level, finest first.
        blocks: per level, beside the one that halves the resolution.
        attention: sides at which all blocks attend.
    """
    width = widths[0]
    for level, outputs in enumerate(widths):
        side = resolution >> level
        if level > 0:
            yield Place(f"{side}x{side}_down", side, width, width, "down")
        for index in range(blocks):
            yield Place(f"{side}x{side}_block{index}", side, width, outputs, None, side in attention)
            width = outputs


def decoder(resolution: int, widths: Sequence[int], blocks: int, attention: Sequence[int]) -> Iterator[Place]:
    """The upward path that belongs to :func:`encoder`; each ``block`` takes the last skip connection left, too."""
    skips = [widths[0], *(place.outputs for place in encoder(resolution, widths, blocks, attention))]
    width = widths[-1]
    for level, outputs in reversed(list(enumerate(widths))):
        side = resolution >> level
        if level == len(widths) - 1:
            yield Place(f"{side}x{side}_in0", side, width, width, None, True)
            yield Place(f"{side}x{side}_in1", side, width, width)
        else:
            yield Place(f"{side}x{side}_up", side, width, width, "up")
        for index in range(blocks + 1):
            yield Place(f"{side}x{side}_block{index}", side, width + skips.pop(), outputs, None, side in attention)
            width = outputs


class LocalDropout(nn.Dropout):
    """Dropout that says at which ``resolution`` (pixels per side) it acts, so that it can be set by resolution."""

    def __init__(self, p: float, resolution: int) -> None:
        super().__init__(p)
        self.resolution = resolution


def check_sizes(
    resolution: int, channel_mult: Sequence[int], least: Mapping[str, tuple[int, int]], shares: Mapping[str, float]
) -> None:
    """Refuse settings that no network can be built from.

    Args:
        resolution: pixels per side; must halve at each level after the first.
        channel_mult: a whole factor per level.
        least: name -> (value, least value) of whole numbers.
        shares: name -> value of probabilities.

    Raises:
        ConfigError: with the sizes concerned.
    """
    for name, (value, low) in {"img_resolution": (resolution, 1), **least}.items():
        if not isinstance(value, int) or value < low:
            raise ConfigError(f"Unusable {name} of an EDM network", got=value, want=f"an integer >= {low}")
    for name, share in shares.items():
        if not 0 <= share < 1:
            raise ConfigError(f"{name} is not a probability", got=share, want="0 <= p < 1")
    levels = len(channel_mult)
    if levels == 0 or any(not isinstance(mult, int) or mult < 1 for mult in channel_mult):
        raise ConfigError("channel_mult needs one whole factor >= 1 per level", got=channel_mult)
    if resolution % 2 ** (levels - 1):
        raise ConfigError(
            f"Images of {resolution} pixels cannot be halved {levels - 1} times",
            got=f"img_resolution {resolution} with {levels} levels {channel_mult}",
            want=f"a multiple of {2 ** (levels - 1)}",
            do="Resize or pad the images, or shorten channel_mult",
        )


def check_taps(taps: Sequence[float]) -> None:
    """Refuse a resampling filter that is none.

    Raises:
        ConfigError: an odd number of taps, or a sum of 0.
    """
    if not taps or len(taps) % 2 or sum(taps) == 0:
        raise ConfigError(
            "The resampling filter needs an even number of taps with a sum other than 0",
            got=taps,
            want="for example [1, 1] or [1, 3, 3, 1]",
        )


def heads_of(channels: int, channels_per_head: int) -> int:
    """Attention heads of a layer: channels // channels_per_head, 0 for a layer too narrow to attend.

    Raises:
        ConfigError: the channels do not divide into these heads.
    """
    heads = channels // channels_per_head
    if heads and channels % heads:
        raise ConfigError(
            "A layer's channels do not divide into attention heads",
            got=f"{channels} channels, {heads} heads",
            want=f"a multiple of {channels_per_head} channels, or fewer",
        )
    return heads
