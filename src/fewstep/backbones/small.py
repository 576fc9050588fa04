"""Networks that train on a laptop: a U-Net and a DiT for images, an MLP for points."""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.backbones.recompute import Recomputable
from fewstep.errors import ConfigError
from fewstep.types import Condition, Samples

_Layer = TypeVar("_Layer", bound=nn.Module)


class NoiseEmbedding(nn.Module):
    """``c_noise [b]`` (and one-hot labels) -> ``[b, width]``: cosines and sines of 1/8 to 4 turns, then an MLP.

    A two-time network adds its ``landing [b, width]`` between the two layers.
    """

    frequencies: Tensor

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        turns = torch.logspace(-3, 2, width // 4, base=2.0, dtype=torch.float64)
        self.register_buffer("frequencies", (2 * math.pi * turns).float(), persistent=False)
        self.first = nn.Linear(2 * (width // 4), width)
        self.label = nn.Linear(num_classes, width, bias=False) if num_classes else None
        self.second = nn.Linear(width, width)

    @property
    def width(self) -> int:
        """Of the embedding and of ``landing``."""
        return self.second.in_features

    def forward(self, c_noise: Tensor, cond: Condition | None, landing: Tensor | None = None) -> Tensor:
        angle = c_noise[:, None] * self.frequencies.to(c_noise.dtype)
        out = self.first(torch.cat((angle.cos(), angle.sin()), dim=1).to(self.first.weight.dtype))
        if self.label is not None and cond is not None:
            # one-hot labels times sqrt(classes) have unit variance
            out = out + self.label(cond * math.sqrt(self.label.in_features))
        if landing is not None:
            out = out + landing.to(out.dtype)
        return F.silu(self.second(F.silu(out)))


class ResidualBlock(nn.Module):
    """GroupNorm - SiLU - conv, scale and shift by the embedding, - SiLU - dropout - conv, plus a skip."""

    def __init__(self, inputs: int, outputs: int, embedding: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(_groups(inputs), inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.modulation = nn.Linear(embedding, 2 * outputs)
        self.norm2 = nn.GroupNorm(_groups(outputs), outputs)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = _zero(nn.Conv2d(outputs, outputs, 3, padding=1))
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.modulation(embedding)[:, :, None, None].chunk(2, dim=1)
        h = self.conv1(F.silu(self.norm1(x)))
        h = torch.addcmul(shift, self.norm2(h), 1 + scale)
        return self.skip(x) + self.conv2(self.dropout(F.silu(h)))


class AttentionBlock(nn.Module):
    """Self-attention over pixels with a residual."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(_groups(channels), channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = _zero(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        qkv = self.qkv(self.norm(x)).reshape(b, 3, self.heads, c // self.heads, h * w)
        q, k, v = qkv.permute(1, 0, 2, 4, 3).contiguous().unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(attended.transpose(-1, -2).reshape(b, c, h, w))


class UNet(nn.Module):
    """A small U-Net ``F(x, c_noise, cond)``; ``x [b, c, h, w]``, result of the same shape.

    Args:
        sample_shape: (c, h, w); h and w divisible by ``2^(len(multipliers) - 1)``.
        channels: width at full resolution.
        multipliers: width factor per resolution.
        blocks: residual blocks per resolution.
        attention: resolutions (side lengths) with self-attention.
        dropout: probability inside the residual blocks.
        num_classes: 0 for none.
    """

    def __init__(
        self,
        sample_shape: tuple[int, int, int],
        channels: int = 48,
        multipliers: tuple[int, ...] = (1, 2),
        blocks: int = 2,
        attention: tuple[int, ...] = (),
        dropout: float = 0.0,
        num_classes: int = 0,
    ) -> None:
        super().__init__()
        inputs, height, width = sample_shape
        factor = 2 ** (len(multipliers) - 1)
        if height % factor or width % factor:
            raise ConfigError(
                f"A U-Net with {len(multipliers)} resolutions cannot halve this image size",
                got=f"{height}x{width}",
                want=f"sides divisible by {factor}",
            )
        embedding = 4 * channels
        self.embed = NoiseEmbedding(embedding, num_classes)
        self.stem = nn.Conv2d(inputs, channels, 3, padding=1)
        side, current, skips = height, channels, [channels]
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for level, multiplier in enumerate(multipliers):
            if level > 0:
                self.down.append(nn.Conv2d(current, current, 3, stride=2, padding=1))
                side //= 2
                skips.append(current)
            for _ in range(blocks):
                self.down.append(_Stack(current, channels * multiplier, embedding, dropout, side in attention))
                current = channels * multiplier
                skips.append(current)
        self.middle = _Stack(current, current, embedding, dropout, True)
        for level in reversed(range(len(multipliers))):
            for _ in range(blocks + 1):
                wide = current + skips.pop()
                self.up.append(_Stack(wide, channels * multipliers[level], embedding, dropout, side in attention))
                current = channels * multipliers[level]
            if level > 0:
                self.up.append(_Upsample(current))
                side *= 2
        self.norm = nn.GroupNorm(_groups(current), current)
        self.head = _zero(nn.Conv2d(current, inputs, 3, padding=1))

    @property
    def landing_width(self) -> int:
        """Width of the ``landing`` that :meth:`forward` takes."""
        return self.embed.width

    def forward(
        self, x: Samples, c_noise: Tensor, cond: Condition | None = None, *, landing: Tensor | None = None
    ) -> Tensor:
        embedding = self.embed(c_noise, cond, landing)
        h = self.stem(x)
        skips = [h]
        for layer in self.down:
            h = layer(h, embedding) if isinstance(layer, _Stack) else layer(h)
            skips.append(h)
        h = self.middle(h, embedding)
        for layer in self.up:
            h = layer(h, embedding, skips.pop()) if isinstance(layer, _Stack) else layer(h)
        return self.head(F.silu(self.norm(h)))


class _Stack(Recomputable):
    """A residual block and, where asked, attention; of ``x`` and ``skip`` side by side."""

    def __init__(self, inputs: int, outputs: int, embedding: int, dropout: float, attention: bool) -> None:
        super().__init__()
        self.block = ResidualBlock(inputs, outputs, embedding, dropout)
        self.attention = AttentionBlock(outputs, max(1, outputs // 64)) if attention else None

    def compute(self, x: Tensor, embedding: Tensor, skip: Tensor | None = None) -> Tensor:
        """The block itself: see the class."""
        h = self.block(x if skip is None else torch.cat((x, skip), dim=1), embedding)
        return h if self.attention is None else self.attention(h)


class _Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class DiT(nn.Module):
    """A small diffusion transformer with adaLN-zero (Peebles and Xie 2022); ``x [b, c, h, w]``.

    Args:
        sample_shape: (c, h, w); sides divisible by ``patch``.
        width, depth, heads: of the transformer; patch: side of a patch in pixels.
        dropout: probability after attention and inside the MLP.
        num_classes: 0 for none.
    """

    def __init__(
        self,
        sample_shape: tuple[int, int, int],
        width: int = 128,
        depth: int = 6,
        heads: int = 4,
        patch: int = 2,
        dropout: float = 0.0,
        num_classes: int = 0,
    ) -> None:
        super().__init__()
        inputs, height, side = sample_shape
        if height % patch or side % patch or width % heads:
            raise ConfigError(
                "A DiT needs sides divisible by its patch, and its width by its heads",
                got=(sample_shape, patch, width, heads),
            )
        self.patch, self.grid = patch, (height // patch, side // patch)
        self.embed = NoiseEmbedding(width, num_classes)
        self.stem = nn.Conv2d(inputs, width, patch, stride=patch)
        self.position = nn.Parameter(0.02 * torch.randn(1, self.grid[0] * self.grid[1], width))
        self.blocks = nn.ModuleList(_Transformer(width, heads, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = _zero(nn.Linear(width, 2 * width))
        self.head = _zero(nn.Linear(width, inputs * patch * patch))

    @property
    def landing_width(self) -> int:
        """Width of the ``landing`` that :meth:`forward` takes."""
        return self.embed.width

    def forward(
        self, x: Samples, c_noise: Tensor, cond: Condition | None = None, *, landing: Tensor | None = None
    ) -> Tensor:
        embedding = self.embed(c_noise, cond, landing)
        h = self.stem(x).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            h = block(h, embedding)
        scale, shift = self.modulation(embedding)[:, None].chunk(2, dim=-1)
        h = self.head(self.norm(h) * (1 + scale) + shift)
        b, rows, columns, p = x.shape[0], *self.grid, self.patch
        return h.reshape(b, rows, columns, -1, p, p).permute(0, 3, 1, 4, 2, 5).reshape(x.shape)


class _Transformer(Recomputable):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = _zero(nn.Linear(width, 6 * width))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def compute(self, x: Tensor, embedding: Tensor) -> Tensor:
        """The block itself: see the class."""
        scale1, shift1, gate1, scale2, shift2, gate2 = self.modulation(embedding)[:, None].chunk(6, dim=-1)
        b, n, w = x.shape
        h = self.norm(x) * (1 + scale1) + shift1
        q, k, v = self.qkv(h).reshape(b, n, 3, self.heads, w // self.heads).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, w)
        x = x + gate1 * self.dropout(self.out(h))
        h = self.wide(self.norm(x) * (1 + scale2) + shift2)
        return x + gate2 * self.narrow(self.dropout(F.gelu(h, approximate="tanh")))


class MLP(nn.Module):
    """A residual MLP for points ``[b, k]``, modulated by the noise level.

    Args:
        sample_shape: (k,).
        width, depth: of the residual layers.
        num_classes: 0 for none.
    """

    def __init__(self, sample_shape: tuple[int], width: int = 128, depth: int = 4, num_classes: int = 0) -> None:
        super().__init__()
        (size,) = sample_shape
        self.embed = NoiseEmbedding(width, num_classes)
        self.stem = nn.Linear(size, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.modulations = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.head = _zero(nn.Linear(width, size))

    @property
    def landing_width(self) -> int:
        """Width of the ``landing`` that :meth:`forward` takes."""
        return self.embed.width

    def forward(
        self, x: Samples, c_noise: Tensor, cond: Condition | None = None, *, landing: Tensor | None = None
    ) -> Tensor:
        embedding = self.embed(c_noise, cond, landing)
        h = self.stem(x)
        for layer, modulation in zip(self.layers, self.modulations, strict=True):
            scale, shift = modulation(embedding).chunk(2, dim=1)
            h = h + layer(F.silu(self.norm(h) * (1 + scale) + shift))
        return self.head(F.silu(self.norm(h)))


def _groups(channels: int) -> int:
    return max(g for g in range(1, 33) if (channels % g == 0 and channels // g >= 4) or g == 1)


def _zero(layer: _Layer) -> _Layer:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer
