"""Layers that preserve magnitudes: what they make of inputs of unit size has unit size.

Weights are normalised whenever they are used; :meth:`MPConv.after_step` also normalises them where they are stored.
Parameter names are those of EDM2's snapshots. Source: Karras et al. 2023 (EDM2, arXiv 2312.02696).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.backbones.edm_layers import Resample
from fewstep.backbones.layout import LocalDropout, Place, heads_of
from fewstep.backbones.recompute import Recomputable

EPS = 1e-4
"""What a magnitude has added before something is divided by it."""


def normalize(x: Tensor, dim: int | None = None) -> Tensor:
    """``x / (1e-4 + rms(x))``: unit magnitude along ``dim``, by default along all dimensions but the first.

    The magnitude is computed in float32 or better. Source: EDM2, equations 30 and 66.
    """
    dims = tuple(range(1, x.ndim)) if dim is None else (dim,)
    norm = torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=_precise(x.dtype))
    rms = norm / math.sqrt(math.prod([x.shape[d] for d in dims]))
    return x / (rms + EPS).to(x.dtype)


def mp_silu(x: Tensor) -> Tensor:
    """``silu(x) / 0.596``: of unit magnitude for normal ``x`` (EDM2, equation 81)."""
    return F.silu(x) / 0.596


def mp_sum(a: Tensor, b: Tensor, t: float) -> Tensor:
    """``((1 - t) a + t b) / sqrt((1 - t)^2 + t^2)`` (EDM2, equation 88)."""
    return torch.lerp(a, b.to(a.dtype), t) / math.hypot(1 - t, t)


def mp_cat(a: Tensor, b: Tensor, t: float) -> Tensor:
    """``a [b, m, ...]`` and ``b [b, n, ...]`` side by side, with shares ``(1 - t)^2 : t^2`` of the whole square.

    ``C ((1 - t)/sqrt(m) a, t/sqrt(n) b)`` with ``C^2 = (m + n)/((1 - t)^2 + t^2)`` (EDM2, equation 103).
    """
    m, n = a.shape[1], b.shape[1]
    scale = math.sqrt(m + n) / math.hypot(1 - t, t)
    return torch.cat([a * (scale * (1 - t) / math.sqrt(m)), b * (scale * t / math.sqrt(n))], dim=1)


class MPFourier(nn.Module):
    """Random Fourier features ``sqrt(2) cos(f c + p)``, f ~ N(0, (2 pi)^2), p ~ U(0, 2 pi), fixed; ``[b] -> [b, n]``.

    Source: EDM2, equation 75.
    """

    freqs: Tensor
    phases: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * torch.randn(channels))
        self.register_buffer("phases", 2 * math.pi * torch.rand(channels))

    def forward(self, c_noise: Tensor) -> Tensor:
        wide = _precise(c_noise.dtype)
        angle = c_noise.to(wide)[:, None] * self.freqs.to(wide) + self.phases.to(wide)
        return (math.sqrt(2) * angle.cos()).to(c_noise.dtype)


class MPConv(nn.Module):
    """A convolution (zero padded), or with ``kernel=0`` a linear layer, of weight ``gain normalize(w)/sqrt(fan_in)``.

    The forward pass never writes: several passes of a step see the same weights (math.md 2.6). Source: EDM2,
    equations 47 and 66.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, *(kernel, kernel) if kernel else ()))

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        scale = gain / math.sqrt(self.weight[0].numel())
        weight = (normalize(self._master()) * scale).to(x.dtype)
        if weight.ndim == 2:
            return F.linear(x, weight)
        return F.conv2d(x, weight, padding=weight.shape[-1] // 2)

    @torch.no_grad()
    def after_step(self) -> None:
        """Forced weight normalisation, ``w <- normalize(w)`` (EDM2, equation 66)."""
        self.weight.copy_(normalize(self._master()))

    def _master(self) -> Tensor:
        """The weights in float32 or better."""
        return self.weight.to(_precise(self.weight.dtype))


@dataclass(frozen=True)
class BlockSettings:
    """What all blocks of a network have in common; see :class:`fewstep.backbones.edm2.EDM2`."""

    emb_channels: int
    resample_filter: tuple[float, ...]
    channels_per_head: int
    dropout: float
    dropout_res: int | None
    concat_balance: float
    res_balance: float
    attn_balance: float
    clip_act: float | None

    def dropout_at(self, side: int) -> float:
        """Probability in a block at this resolution: 0 above ``dropout_res``."""
        return 0.0 if self.dropout_res and side > self.dropout_res else self.dropout


class MPBlock(Recomputable):
    """A block of EDM2's U-Net; x ``[b, in, h, w]``, emb ``[b, e]`` -> ``[b, out, side, side]``.

    In the decoder x is ``mp_cat`` of ``x`` and ``skip``.

    ::

        x = resample(x);  x = normalize(conv_skip(x)) over channels                 encoder
        h = conv_res1(dropout(mp_silu(conv_res0(mp_silu(x)) (1 + emb_gain emb_linear(emb)))))
        x = mp_sum(x, h)                                                            decoder: conv_skip(x) for x
        x = mp_sum(x, attn_proj(attention(normalize(attn_qkv(x)))))                 with attention only

    Source: EDM2, figure 21.
    """

    def __init__(self, place: Place, settings: BlockSettings, *, encoder: bool) -> None:
        super().__init__()
        inputs, outputs, self.encoder, self.settings = place.inputs, place.outputs, encoder, settings
        self.resample = _resampling(place, settings)
        self.emb_gain = nn.Parameter(torch.zeros([]))
        self.conv_res0 = MPConv(outputs if encoder else inputs, outputs, 3)
        self.emb_linear = MPConv(settings.emb_channels, outputs)
        self.dropout = LocalDropout(settings.dropout_at(place.side), place.side)
        self.conv_res1 = MPConv(outputs, outputs, 3)
        self.conv_skip = MPConv(inputs, outputs, 1) if inputs != outputs else None
        self.heads = heads_of(outputs, settings.channels_per_head) if place.attention else 0
        if self.heads:
            self.attn_qkv = MPConv(outputs, 3 * outputs, 1)
            self.attn_proj = MPConv(outputs, outputs, 1)

    def compute(self, x: Tensor, emb: Tensor, skip: Tensor | None = None) -> Tensor:
        """The block itself: see the class."""
        x = x if skip is None else mp_cat(x, skip, self.settings.concat_balance)
        x = x if self.resample is None else self.resample(x)
        if self.encoder:
            x = normalize(self._skip(x), dim=1)
        h = self.conv_res0(mp_silu(x))
        h = mp_silu(h * (self.emb_linear(emb, self.emb_gain) + 1)[:, :, None, None].to(h.dtype))
        h = self.conv_res1(self.dropout(h))
        x = mp_sum(x if self.encoder else self._skip(x), h, self.settings.res_balance)
        if self.heads:
            x = mp_sum(x, self._attend(x), self.settings.attn_balance)
        most = self.settings.clip_act
        return x if most is None else x.clamp(-most, most)

    def _skip(self, x: Tensor) -> Tensor:
        return x if self.conv_skip is None else self.conv_skip(x)

    def _attend(self, x: Tensor) -> Tensor:
        """Cosine attention over pixels; of each head's channels of ``attn_qkv``, number 3c + i is one of q, k or v."""
        b, c, height, width = x.shape
        heads = self.attn_qkv(x).reshape(b, self.heads, c // self.heads, 3, height * width)
        q, k, v = normalize(heads, dim=2).permute(3, 0, 1, 4, 2).contiguous().unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.attn_proj(mixed.transpose(-1, -2).reshape(b, c, height, width))
        return out


def _resampling(place: Place, settings: BlockSettings) -> Resample | None:
    """The filter of a block, which checkpoints do not hold."""
    if place.resample is None:
        return None
    return Resample(settings.resample_filter, place.resample, persistent=False)


def _precise(dtype: torch.dtype) -> torch.dtype:
    """float32, or ``dtype`` where that is better."""
    return torch.promote_types(dtype, torch.float32)
