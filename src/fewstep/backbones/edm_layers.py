"""Building blocks of the EDM U-Nets: noise embeddings, resampling, the residual block.

Parameter and buffer names equal those of the published EDM checkpoints (``conv0``, ``affine``, ``qkv``,
``resample_filter``, ...), so that they load by name. Source: Song et al. 2021 (arXiv 2011.13456) and
Karras et al. 2022 (arXiv 2206.00364), table 7 and appendix F.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.backbones.layout import LocalDropout, Resampling
from fewstep.backbones.recompute import Recomputable
from fewstep.errors import ConfigError, DataError

NEAR_ZERO = 1e-5
"""Gain of a layer that closes a residual branch: at the start the branch adds next to nothing."""

ATTENTION_GAIN = math.sqrt(0.2)
"""Gain of the layer that makes queries, keys and values."""


def xavier(layer: nn.Conv2d | nn.Linear, gain: float = 1.0) -> None:
    """Initialise in place: weight ~ gain U(-a, a), a = sqrt(6 / (fan_in + fan_out)); bias 0."""
    nn.init.xavier_uniform_(layer.weight, gain)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def linear(in_features: int, out_features: int, *, bias: bool = True) -> nn.Linear:
    """A fully connected layer ``[b, in] -> [b, out]``, initialised by :func:`xavier`."""
    layer = nn.Linear(in_features, out_features, bias=bias)
    xavier(layer)
    return layer


def conv(in_channels: int, out_channels: int, kernel: int, *, gain: float = 1.0) -> nn.Conv2d:
    """A convolution ``[b, in, h, w] -> [b, out, h, w]``, zero padded, initialised by :func:`xavier`."""
    layer = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2)
    xavier(layer, gain)
    return layer


def group_norm(channels: int, eps: float = 1e-6) -> nn.GroupNorm:
    """Group normalisation with min(32, channels / 4) groups; DDPM++ and NCSN++ have eps 1e-6 (EDM, table 7).

    Raises:
        ConfigError: the channels do not divide into the groups.
    """
    groups = min(32, channels // 4)
    if groups == 0 or channels % groups:
        raise ConfigError(
            "A layer's channels do not divide into normalisation groups",
            got=f"{channels} channels, {groups} groups",
            want="at least 4 channels, and a multiple of min(32, channels // 4)",
            do="Choose model_channels and channel_mult so that every level has a multiple of 32 channels",
        )
    return nn.GroupNorm(groups, channels, eps=eps)


def check_inputs(
    x: Tensor,
    c_noise: Tensor,
    cond: Tensor | None,
    augment: Tensor | None,
    shape: tuple[int, int, int],
    label_dim: int,
    augment_dim: int,
) -> None:
    """Refuse inputs unless x ``[b, *shape]``, c_noise ``[b]`` and both label tensors ``[b, *_dim]`` or None.

    Raises:
        DataError: a tensor of the wrong shape, or labels for a network that takes none.
    """
    batch = x.shape[0] if x.ndim else 0
    if tuple(x.shape) != (batch, *shape):
        raise DataError(
            "Images of the wrong size for this network",
            got=f"shape {list(x.shape)}",
            want=f"[b, {shape[0]}, {shape[1]}, {shape[2]}]",
            do=f"Resize the images to {shape[1]}x{shape[2]} with {shape[0]} channels",
        )
    if tuple(c_noise.shape) != (batch,):
        got = f"shape {list(c_noise.shape)}"
        raise DataError("One noise condition per image is needed", got=got, want=f"shape [{batch}]")
    for what, value, width in (("class", cond, label_dim), ("augmentation", augment, augment_dim)):
        if value is None or tuple(value.shape) == (batch, width):
            continue
        raise DataError(
            f"The {what} labels do not fit this network",
            got=f"shape {list(value.shape)}",
            want=f"one float row per image, shape [{batch}, {width}]" if width else "none",
            do="Give one-hot rows" if width and what == "class" else f"Call it without {what} labels",
        )


class PositionalEmbedding(nn.Module):
    """Transformer embedding of the noise: [sin(c w_k), cos(c w_k)], w_k = 10000^(-k / (n/2 - 1)).

    Shapes: ``[b] -> [b, n]``. Source: DDPM++ of arXiv 2011.13456, as in EDM, table 7.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, c_noise: Tensor) -> Tensor:
        half = self.channels // 2
        steps = torch.arange(half, dtype=c_noise.dtype, device=c_noise.device)
        phase = c_noise[:, None] * (1 / 10000) ** (steps / (half - 1))
        return torch.cat([phase.sin(), phase.cos()], dim=1)


class FourierEmbedding(nn.Module):
    """Random Fourier features of the noise: [sin(2 pi c f), cos(2 pi c f)], f ~ N(0, 16^2) fixed.

    Shapes: ``[b] -> [b, n]``. Source: NCSN++ of arXiv 2011.13456, as in EDM, table 7.
    """

    freqs: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("freqs", 16 * torch.randn(channels // 2))

    def forward(self, c_noise: Tensor) -> Tensor:
        phase = c_noise[:, None] * (2 * math.pi * self.freqs.to(c_noise.dtype))
        return torch.cat([phase.sin(), phase.cos()], dim=1)


def _kernel(taps: Sequence[float]) -> Tensor:
    """The separable low-pass kernel ``[1, 1, k, k]`` with sum 1 from its ``k`` taps; k must be even."""
    row = torch.tensor([float(tap) for tap in taps])
    return (row.outer(row) / row.sum() ** 2)[None, None]


def _is_box(taps: Sequence[float]) -> bool:
    """Whether the filter is the 2-tap mean, for which pooling and repetition give the same numbers faster."""
    return len(taps) == 2 and taps[0] == taps[1]


def _depthwise(x: Tensor, kernel: Tensor) -> Tensor:
    """The kernel ``[1, 1, k, k]`` for every channel of ``x``, in the precision of ``x``."""
    return kernel.to(x.dtype).expand(x.shape[1], 1, -1, -1)


def _halve(x: Tensor, kernel: Tensor, box: bool, *, padding: int | None = None) -> Tensor:
    """Filter and keep every second pixel, ``[b, c, h, w] -> [b, c, h/2, w/2]``."""
    if box:
        return F.avg_pool2d(x, 2)
    pad = (kernel.shape[-1] - 1) // 2 if padding is None else padding
    return F.conv2d(x, _depthwise(x, kernel), stride=2, padding=pad, groups=x.shape[1])


def _double(x: Tensor, kernel: Tensor, box: bool) -> Tensor:
    """Insert zeros and filter (gain 4), ``[b, c, h, w] -> [b, c, 2h, 2w]``."""
    if box:
        return F.interpolate(x, scale_factor=2, mode="nearest")
    pad = (kernel.shape[-1] - 1) // 2
    return F.conv_transpose2d(x, 4 * _depthwise(x, kernel), stride=2, padding=pad, groups=x.shape[1])


class Resample(nn.Module):
    """Halve or double the resolution with a low-pass filter, without weights.

    Args:
        taps: filter taps, an even number, for example (1, 1) or (1, 3, 3, 1).
        mode: "down" or "up".
        persistent: whether checkpoints hold the filter: those of EDM do, those of EDM2 do not.
    """

    resample_filter: Tensor

    def __init__(self, taps: Sequence[float], mode: Resampling, *, persistent: bool = True) -> None:
        super().__init__()
        self.mode, self.box = mode, _is_box(taps)
        self.register_buffer("resample_filter", _kernel(taps), persistent=persistent)

    def forward(self, x: Tensor) -> Tensor:
        resize = _double if self.mode == "up" else _halve
        return resize(x, self.resample_filter, self.box)


class ResampleConv(nn.Conv2d):
    """Resample with a low-pass filter, then convolve: ``[b, in, h, w] -> [b, out, h', w']``.

    ``filter_last`` convolves the padded input first and filters after, which differs at the border
    only (the auxiliary branch of NCSN++). The filter sums to 1, so the bias may come before it.
    """

    resample_filter: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        taps: Sequence[float],
        mode: Resampling,
        *,
        filter_last: bool = False,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel, padding=kernel // 2)
        if filter_last and mode == "up":
            raise ConfigError("filter_last is defined for downsampling only", got=mode, want="down")
        self.mode, self.box, self.filter_last = mode, _is_box(taps), filter_last
        self.register_buffer("resample_filter", _kernel(taps))
        xavier(self)

    def forward(self, x: Tensor) -> Tensor:
        if self.filter_last:
            border = self.kernel_size[0] // 2 + (self.resample_filter.shape[-1] - 1) // 2
            wide = F.conv2d(x, self.weight, self.bias, padding=border)
            return _halve(wide, self.resample_filter, self.box, padding=0)
        resize = _double if self.mode == "up" else _halve
        return super().forward(resize(x, self.resample_filter, self.box))


class ResidualBlock(Recomputable):
    """The U-Net block of DDPM++ and NCSN++, optionally resampling and with self-attention.

    ::

        h = conv1(dropout(silu(norm1(conv0(silu(norm0(x))) + affine(emb)))))
        y = (skip(x) + h) / sqrt(2)
        y = (y + proj(attention(qkv(norm2(y))))) / sqrt(2)        one head, with ``attention`` only

    Shapes: x ``[b, in, h, w]``, emb ``[b, e]`` -> ``[b, out, side, side]``; in the decoder x is ``x`` and ``skip``
    side by side. Source: EDM, table 7 and appendix F.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        *,
        side: int,
        dropout: float,
        attention: bool = False,
        resample: Resampling | None = None,
        taps: Sequence[float] = (1, 1),
    ) -> None:
        super().__init__()

        def entry(kernel: int) -> nn.Conv2d:
            if resample is None:
                return conv(in_channels, out_channels, kernel)
            return ResampleConv(in_channels, out_channels, kernel, taps, resample)

        self.norm0 = group_norm(in_channels)
        self.conv0 = entry(3)
        self.affine = linear(emb_channels, out_channels)
        self.norm1 = group_norm(out_channels)
        self.dropout = LocalDropout(dropout, side)
        self.conv1 = conv(out_channels, out_channels, 3, gain=NEAR_ZERO)
        self.skip = entry(1) if resample or in_channels != out_channels else None
        self.attention = attention
        if attention:
            self.norm2 = group_norm(out_channels)
            self.qkv = conv(out_channels, 3 * out_channels, 1, gain=ATTENTION_GAIN)
            self.proj = conv(out_channels, out_channels, 1, gain=NEAR_ZERO)

    def compute(self, x: Tensor, emb: Tensor, skip: Tensor | None = None) -> Tensor:
        """The block itself: see the class."""
        x = x if skip is None else torch.cat([x, skip], dim=1)
        h = self.conv0(F.silu(self.norm0(x)))
        h = F.silu(self.norm1(h + self.affine(emb)[:, :, None, None]))
        h = self.conv1(self.dropout(h))
        x = (h + (x if self.skip is None else self.skip(x))) * math.sqrt(0.5)
        return (x + self._attend(x)) * math.sqrt(0.5) if self.attention else x

    def _attend(self, x: Tensor) -> Tensor:
        """Self-attention over pixels; output channel 3c + i of ``qkv`` is channel c of q, k or v."""
        b, c, height, width = x.shape
        heads = self.qkv(self.norm2(x)).reshape(b, 1, c, 3, height * width)
        q, k, v = heads.permute(3, 0, 1, 4, 2).contiguous().unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.proj(mixed.transpose(-1, -2).reshape(b, c, height, width))
        return out
