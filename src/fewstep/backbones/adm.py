"""ADM, the ImageNet network of Dhariwal and Nichol 2021 (arXiv 2105.05233), in the form of EDM's checkpoints.

EDM calls it ``DhariwalUNet`` (arXiv 2206.00364, table 7). Parameter and buffer names are those of its pickles below
``model.``, so that they load with ``load_state_dict(strict=True)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.backbones.edm_layers import Resample, ResampleConv, check_inputs, group_norm
from fewstep.backbones.layout import LocalDropout, Place, check_sizes, decoder, encoder, heads_of
from fewstep.backbones.recompute import Recomputable
from fewstep.errors import ConfigError

EPS = 1e-5
"""Of all its group normalisations."""
CHANNELS_PER_HEAD = 64
TAPS = (1, 1)
_Layer = TypeVar("_Layer", bound=nn.Module)


class ADM(nn.Module):
    """The raw network F of ADM: ``F(x, c_noise, cond) -> [b, out_channels, h, w]``; it knows no process.

    With the defaults and ``label_dim=1000`` the network of EDM's ImageNet 64x64 checkpoint (296M parameters).

    Args:
        img_resolution: height and width in pixels, a multiple of 2^(levels - 1).
        in_channels, out_channels: image channels.
        label_dim: number of classes, 0 = unconditional.
        augment_dim: number of augmentation labels, 0 = none.
        model_channels: base width; level i has ``model_channels * channel_mult[i]`` channels.
        channel_mult: one factor per level, finest first.
        channel_mult_emb: width of the embedding vector / model_channels.
        num_blocks: residual blocks per level (the decoder has one more).
        attn_resolutions: resolutions with self-attention, in layers of at least 64 channels.
        dropout: dropout probability inside the residual blocks, training only.
        label_dropout: probability that a row's class is replaced by zeros, training only.

    Raises:
        ConfigError: settings that no network can be built from.

    Source: ADM (arXiv 2105.05233); EDM (arXiv 2206.00364), table 7 and appendix F.
    """

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        channel_mult_emb: int = 4,
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (32, 16, 8),
        dropout: float = 0.10,
        label_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        least = {"in_channels": (in_channels, 1), "out_channels": (out_channels, 1), "label_dim": (label_dim, 0)}
        least |= {"augment_dim": (augment_dim, 0), "num_blocks": (num_blocks, 1)}
        least |= {"model_channels": (model_channels, 2), "channel_mult_emb": (channel_mult_emb, 1)}
        check_sizes(img_resolution, channel_mult, least, {"dropout": dropout, "label_dropout": label_dropout})
        if model_channels % 2:
            raise ConfigError("The noise embedding needs an even number of channels", got=model_channels)
        self.sample_shape = (in_channels, img_resolution, img_resolution)
        self.label_dim, self.augment_dim, self.label_dropout = label_dim, augment_dim, label_dropout
        emb = model_channels * channel_mult_emb
        self.map_noise = CosineEmbedding(model_channels)
        self.map_augment = _zero(nn.Linear(augment_dim, model_channels, bias=False)) if augment_dim else None
        self.map_layer0 = nn.Linear(model_channels, emb)
        self.map_layer1 = nn.Linear(emb, emb)
        self.map_label = nn.Linear(label_dim, emb, bias=False) if label_dim else None
        if self.map_label is not None:
            nn.init.normal_(self.map_label.weight)
        widths = [model_channels * mult for mult in channel_mult]
        layout = img_resolution, widths, num_blocks, attn_resolutions
        self.enc = nn.ModuleDict({f"{img_resolution}x{img_resolution}_conv": _conv(in_channels, widths[0], 3)})
        self.enc.update({place.name: Block(place, emb, dropout) for place in encoder(*layout)})
        self.dec = nn.ModuleDict({place.name: Block(place, emb, dropout) for place in decoder(*layout)})
        self.out_norm = group_norm(widths[0], EPS)
        self.out_conv = _zero(_conv(widths[0], out_channels, 3))

    @property
    def landing_width(self) -> int:
        """Width of the ``landing`` that :meth:`forward` takes."""
        return self.map_layer0.in_features

    def forward(
        self,
        x: Tensor,
        c_noise: Tensor,
        cond: Tensor | None = None,
        *,
        augment: Tensor | None = None,
        landing: Tensor | None = None,
    ) -> Tensor:
        """F(x, c_noise, cond): the raw network output, in the precision of ``x`` (or of autocast).

        Args:
            x: preconditioned input, float ``[b, in_channels, img_resolution, img_resolution]``.
            c_noise: noise condition, float ``[b]``; ln(sigma) / 4 in EDM.
            cond: one-hot labels, float ``[b, label_dim]``; None = zeros ("no class").
            augment: augmentation labels, float ``[b, augment_dim]``; None = zeros ("not augmented").
            landing: what a two-time network adds to the noise embedding, float ``[b, landing_width]``.

        Returns:
            float ``[b, out_channels, img_resolution, img_resolution]``.

        Raises:
            DataError: a tensor of the wrong shape, or a condition the network was built without.
        """
        check_inputs(x, c_noise, cond, augment, self.sample_shape, self.label_dim, self.augment_dim)
        emb = self._embed(c_noise, cond, augment, landing, x.dtype)
        skips: list[Tensor] = []
        for block in self.enc.values():
            x = block(x, emb) if isinstance(block, Block) else block(x)
            skips.append(x)
        for name, block in self.dec.items():
            x = block(x, emb, skips.pop()) if "block" in name else block(x, emb)
        return self.out_conv(F.silu(self.out_norm(x)))

    def _embed(
        self, c_noise: Tensor, cond: Tensor | None, augment: Tensor | None, landing: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """Noise, label, augmentation and landing -> the vector ``[b, e]`` that modulates every block."""
        emb = self.map_noise(c_noise).to(dtype)
        if self.map_augment is not None and augment is not None:
            emb = emb + self.map_augment(augment.to(dtype))
        if landing is not None:
            emb = emb + landing.to(emb.dtype)
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        if self.map_label is not None and cond is not None:
            cond = cond.to(dtype)
            if self.training and self.label_dropout > 0:
                drawn = F.dropout(cond.new_ones(len(cond), 1), self.label_dropout, True)
                cond = cond * (drawn > 0).to(dtype)  # through F.dropout, so that a DropoutTape draws it
            emb = emb + self.map_label(cond)
        return F.silu(emb)


class CosineEmbedding(nn.Module):
    """Transformer embedding of the noise: [cos(c w_k), sin(c w_k)], w_k = 10000^(-2k/n); ``[b] -> [b, n]``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pairs = channels // 2

    def forward(self, c_noise: Tensor) -> Tensor:
        steps = torch.arange(self.pairs, dtype=c_noise.dtype, device=c_noise.device)
        phase = c_noise[:, None] * (1 / 10000) ** (steps / self.pairs)
        return torch.cat([phase.cos(), phase.sin()], dim=1)


class Block(Recomputable):
    """The U-Net block of ADM, optionally resampling and with self-attention; the embedding scales and shifts.

    ::

        scale, shift = affine(emb)
        h = conv1(dropout(silu((1 + scale) norm1(conv0(silu(norm0(x)))) + shift)))
        y = skip(x) + h
        y = y + proj(attention(qkv(norm2(y))))                      with attention only

    Shapes: x ``[b, in, h, w]``, emb ``[b, e]`` -> ``[b, out, side, side]``; in the decoder x is ``x`` and ``skip``
    side by side. Source: ADM, section 3.
    """

    def __init__(self, place: Place, emb_channels: int, dropout: float) -> None:
        super().__init__()
        inputs, outputs = place.inputs, place.outputs
        self.norm0 = group_norm(inputs, EPS)
        self.conv0 = _conv(inputs, outputs, 3, place)
        self.affine = nn.Linear(emb_channels, 2 * outputs)
        self.norm1 = group_norm(outputs, EPS)
        self.dropout = LocalDropout(dropout, place.side)
        self.conv1 = _zero(_conv(outputs, outputs, 3))
        self.skip = _skip(place)
        self.heads = heads_of(outputs, CHANNELS_PER_HEAD) if place.attention else 0
        if self.heads:
            self.norm2 = group_norm(outputs, EPS)
            self.qkv = _conv(outputs, 3 * outputs, 1)
            self.proj = _zero(_conv(outputs, outputs, 1))

    def compute(self, x: Tensor, emb: Tensor, skip: Tensor | None = None) -> Tensor:
        """The block itself: see the class."""
        x = x if skip is None else torch.cat([x, skip], dim=1)
        scale, shift = self.affine(emb)[:, :, None, None].chunk(2, dim=1)
        h = self.norm1(self.conv0(F.silu(self.norm0(x))))
        h = F.silu(torch.addcmul(shift, h, 1 + scale))
        x = (x if self.skip is None else self.skip(x)) + self.conv1(self.dropout(h))
        return x + self._attend(x) if self.heads else x

    def _attend(self, x: Tensor) -> Tensor:
        """Self-attention over pixels; of each head's channels of ``qkv``, number 3c + i is channel c of q, k or v."""
        b, c, height, width = x.shape
        heads = self.qkv(self.norm2(x)).reshape(b, self.heads, c // self.heads, 3, height * width)
        q, k, v = heads.permute(3, 0, 1, 4, 2).contiguous().unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(-1, -2).reshape(b, c, height, width))


def _conv(inputs: int, outputs: int, kernel: int, place: Place | None = None) -> nn.Conv2d:
    """A convolution, after halving or doubling where ``place`` says so; weights and biases ~ U(-1, 1)/sqrt(fan_in)."""
    if place is None or place.resample is None:
        return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)
    layer = ResampleConv(inputs, outputs, kernel, TAPS, place.resample)
    layer.reset_parameters()  # torch's own law, which is ADM's
    return layer


def _skip(place: Place) -> nn.Module | None:
    """The way around a block: nothing, a 1x1 convolution, or resampling alone."""
    if place.inputs != place.outputs:
        return _conv(place.inputs, place.outputs, 1, place)
    return Resample(TAPS, place.resample) if place.resample is not None else None


def _zero(layer: _Layer) -> _Layer:
    """Start a layer at 0."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer
