"""The EDM networks for small images: DDPM++ and NCSN++ (the "SongUNet" family).

Two U-Nets of Song et al. 2021 (arXiv 2011.13456) in the form of Karras et al. 2022 (EDM, arXiv 2206.00364,
table 7 and appendix F). Parameter and buffer names are those of the published EDM checkpoints: the part of
their state dict below ``model.`` loads with ``load_state_dict(strict=True)``. The resampling filters and the
Fourier frequencies are persistent buffers there and here, so nothing has to be dropped or added.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.backbones.edm_layers import (
    NEAR_ZERO,
    FourierEmbedding,
    PositionalEmbedding,
    Resample,
    ResampleConv,
    ResidualBlock,
    check_inputs,
    conv,
    group_norm,
    linear,
)
from fewstep.backbones.layout import check_sizes, check_taps
from fewstep.errors import ConfigError, nearest

EMBEDDINGS = {"positional": PositionalEmbedding, "fourier": FourierEmbedding}
ENCODERS = ("standard", "skip", "residual")
DECODERS = ("standard", "skip")
LEAST = {"in_channels": 1, "out_channels": 1, "label_dim": 0, "augment_dim": 0}
LEAST |= {"model_channels": 1, "channel_mult_emb": 1, "num_blocks": 1, "channel_mult_noise": 1}


@dataclass(frozen=True)
class SongUNetConfig:
    """The settings of a :class:`SongUNet`, checked; ``dataclasses.asdict`` gives its keyword arguments back.

    Raises:
        ConfigError: a value that no network can be built from, with the sizes concerned.
    """

    img_resolution: int
    in_channels: int
    out_channels: int
    label_dim: int
    augment_dim: int
    model_channels: int
    channel_mult: tuple[int, ...]
    channel_mult_emb: int
    num_blocks: int
    attn_resolutions: tuple[int, ...]
    dropout: float
    label_dropout: float
    embedding_type: str
    channel_mult_noise: int
    encoder_type: str
    decoder_type: str
    resample_filter: tuple[float, ...]

    def __post_init__(self) -> None:
        _check_names(self)
        _check_sizes(self)

    @property
    def resolutions(self) -> tuple[int, ...]:
        """Pixels per side at each level, finest first: img_resolution / 2^level."""
        return tuple(self.img_resolution >> level for level in range(len(self.channel_mult)))

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels at each level: model_channels * channel_mult[level]."""
        return tuple(self.model_channels * mult for mult in self.channel_mult)

    @property
    def noise_channels(self) -> int:
        """Width of the noise embedding: model_channels * channel_mult_noise."""
        return self.model_channels * self.channel_mult_noise

    @property
    def emb_channels(self) -> int:
        """Width of the vector that modulates every block: model_channels * channel_mult_emb."""
        return self.model_channels * self.channel_mult_emb


def _check_names(config: SongUNetConfig) -> None:
    """Refuse an unknown embedding, encoder or decoder with the nearest known name."""
    choices = {"embedding_type": tuple(EMBEDDINGS), "encoder_type": ENCODERS, "decoder_type": DECODERS}
    for field, known in choices.items():
        value = getattr(config, field)
        if value not in known:
            do = nearest(str(value), known)
            raise ConfigError(f"Unknown {field} of an EDM network", got=repr(value), do=do)


def _check_sizes(config: SongUNetConfig) -> None:
    """Refuse sizes that no network can be built from."""
    least = {name: (getattr(config, name), low) for name, low in LEAST.items()}
    shares = {"dropout": config.dropout, "label_dropout": config.label_dropout}
    check_sizes(config.img_resolution, config.channel_mult, least, shares)
    if config.noise_channels < 4 or config.noise_channels % 2:
        raise ConfigError(
            "The noise embedding needs an even number of channels",
            got=f"model_channels * channel_mult_noise = {config.noise_channels}",
            want="an even number, at least 4",
        )
    check_taps(config.resample_filter)


class SongUNet(nn.Module):
    """The raw network F of EDM: ``F(x, c_noise, cond) -> [b, out_channels, h, w]``; it knows no process.

    With the defaults a DDPM++; :func:`ddpmpp` and :func:`ncsnpp` give the published settings.

    Args:
        img_resolution: height and width in pixels, a multiple of 2^(levels - 1).
        in_channels, out_channels: image channels.
        label_dim: number of classes, 0 = unconditional.
        augment_dim: number of augmentation labels, 0 = none.
        model_channels: base width; level i has ``model_channels * channel_mult[i]`` channels.
        channel_mult: one factor per level, finest first.
        channel_mult_emb: width of the embedding vector / model_channels.
        num_blocks: residual blocks per level (the decoder has one more).
        attn_resolutions: resolutions with self-attention (those the network does not have are ignored).
        dropout: dropout probability inside the residual blocks, training only.
        label_dropout: probability that a row's class is replaced by zeros, training only.
        embedding_type: "positional" (DDPM++) or "fourier" (NCSN++).
        channel_mult_noise: width of the noise embedding / model_channels; 1 for DDPM++, 2 for NCSN++.
        encoder_type: "standard" (DDPM++), "skip" or "residual" (NCSN++).
        decoder_type: "standard" or "skip".
        resample_filter: filter taps, [1, 1] for DDPM++, [1, 3, 3, 1] for NCSN++.

    Attributes:
        config: the frozen :class:`SongUNetConfig`.

    Raises:
        ConfigError: settings that no network can be built from.

    Source: EDM (arXiv 2206.00364), table 7 and appendix F; Song et al. (arXiv 2011.13456), appendix H.
    """

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 2, 2),
        channel_mult_emb: int = 4,
        num_blocks: int = 4,
        attn_resolutions: Sequence[int] = (16,),
        dropout: float = 0.10,
        label_dropout: float = 0.0,
        embedding_type: str = "positional",
        channel_mult_noise: int = 1,
        encoder_type: str = "standard",
        decoder_type: str = "standard",
        resample_filter: Sequence[float] = (1, 1),
    ) -> None:
        super().__init__()
        self.config = SongUNetConfig(
            img_resolution=img_resolution,
            in_channels=in_channels,
            out_channels=out_channels,
            label_dim=label_dim,
            augment_dim=augment_dim,
            model_channels=model_channels,
            channel_mult=tuple(channel_mult),
            channel_mult_emb=channel_mult_emb,
            num_blocks=num_blocks,
            attn_resolutions=tuple(attn_resolutions),
            dropout=dropout,
            label_dropout=label_dropout,
            embedding_type=embedding_type,
            channel_mult_noise=channel_mult_noise,
            encoder_type=encoder_type,
            decoder_type=decoder_type,
            resample_filter=tuple(resample_filter),
        )
        self._build_embedding()
        self.enc, skips = _encoder(self.config)
        self.dec = _decoder(self.config, skips)

    def _build_embedding(self) -> None:
        config = self.config
        noise, width = config.noise_channels, config.emb_channels
        self.map_noise = EMBEDDINGS[config.embedding_type](noise)
        self.map_label = linear(config.label_dim, noise) if config.label_dim else None
        self.map_augment = linear(config.augment_dim, noise, bias=False) if config.augment_dim else None
        self.map_layer0 = linear(noise, width)
        self.map_layer1 = linear(width, width)

    @property
    def landing_width(self) -> int:
        """Width of the ``landing`` that :meth:`forward` takes."""
        return self.config.noise_channels

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
        config = self.config
        shape = (config.in_channels, config.img_resolution, config.img_resolution)
        check_inputs(x, c_noise, cond, augment, shape, config.label_dim, config.augment_dim)
        emb = self._embed(c_noise, cond, augment, landing, x.dtype)
        x, skips = self._encode(x, emb)
        return self._decode(x, skips, emb)

    def _embed(
        self, c_noise: Tensor, cond: Tensor | None, augment: Tensor | None, landing: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """Noise, label, augmentation and landing -> the vector ``[b, e]`` that modulates every block."""
        emb = self.map_noise(c_noise).to(dtype)
        if self.map_label is not None:
            classes = emb.new_zeros(emb.shape[0], self.config.label_dim) if cond is None else cond.to(dtype)
            if self.training and self.config.label_dropout > 0:
                drawn = F.dropout(classes.new_ones(emb.shape[0], 1), self.config.label_dropout, True)
                classes = classes * (drawn > 0).to(dtype)  # through F.dropout, so that a DropoutTape draws it
            emb = emb + self.map_label(classes * math.sqrt(self.config.label_dim))
        if self.map_augment is not None and augment is not None:
            emb = emb + self.map_augment(augment.to(dtype))
        if landing is not None:
            emb = emb + landing.to(emb.dtype)
        return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))

    def _encode(self, x: Tensor, emb: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Downward path: the coarsest features and, in order, the features for the decoder."""
        aux, skips = x, []
        for level, side in enumerate(self.config.resolutions):
            at = f"{side}x{side}"
            x = self.enc[f"{at}_conv"](x) if level == 0 else self.enc[f"{at}_down"](x, emb)
            if level > 0 and self.config.encoder_type == "skip":
                aux = self.enc[f"{at}_aux_down"](aux)
                x = x + self.enc[f"{at}_aux_skip"](aux)
            if level > 0 and self.config.encoder_type == "residual":
                x = aux = (x + self.enc[f"{at}_aux_residual"](aux)) * math.sqrt(0.5)
            skips.append(x)
            for index in range(self.config.num_blocks):
                x = self.enc[f"{at}_block{index}"](x, emb)
                skips.append(x)
        return x, skips

    def _decode(self, x: Tensor, skips: list[Tensor], emb: Tensor) -> Tensor:
        """Upward path: consumes ``skips`` from its end and returns the image."""
        image: Tensor | None = None
        coarsest = len(self.config.resolutions) - 1
        for level, side in reversed(list(enumerate(self.config.resolutions))):
            at = f"{side}x{side}"
            for name in ("in0", "in1") if level == coarsest else ("up",):
                x = self.dec[f"{at}_{name}"](x, emb)
            for index in range(self.config.num_blocks + 1):
                x = self.dec[f"{at}_block{index}"](x, emb, skips.pop())
            if level == 0 or self.config.decoder_type == "skip":
                part = self.dec[f"{at}_aux_conv"](F.silu(self.dec[f"{at}_aux_norm"](x)))
                image = part if image is None else part + self.dec[f"{at}_aux_up"](image)
        assert image is not None  # level 0 always draws one
        return image


def _encoder(config: SongUNetConfig) -> tuple[nn.ModuleDict, list[int]]:
    """The modules of the downward path and the channels of each skip connection they feed."""
    emb, taps, dropout = config.emb_channels, config.resample_filter, config.dropout
    enc, skips = nn.ModuleDict(), []
    width, aux_width = config.in_channels, config.in_channels
    for level, (side, out) in enumerate(zip(config.resolutions, config.widths, strict=True)):
        at = f"{side}x{side}"
        if level == 0:
            enc[f"{at}_conv"] = conv(width, config.model_channels, 3)
            width = config.model_channels
        else:
            enc[f"{at}_down"] = ResidualBlock(width, width, emb, side=side, dropout=dropout, resample="down", taps=taps)
        if level > 0 and config.encoder_type == "skip":
            enc[f"{at}_aux_down"] = Resample(taps, "down")
            enc[f"{at}_aux_skip"] = conv(aux_width, width, 1)
        if level > 0 and config.encoder_type == "residual":
            enc[f"{at}_aux_residual"] = ResampleConv(aux_width, width, 3, taps, "down", filter_last=True)
            aux_width = width
        skips.append(width)
        for index in range(config.num_blocks):
            attention = side in config.attn_resolutions
            enc[f"{at}_block{index}"] = ResidualBlock(width, out, emb, side=side, dropout=dropout, attention=attention)
            width = out
            skips.append(width)
    return enc, skips


def _decoder(config: SongUNetConfig, skips: list[int]) -> nn.ModuleDict:
    """The modules of the upward path, which takes skip connections of these channels, last first."""
    emb, taps, dropout = config.emb_channels, config.resample_filter, config.dropout
    dec, skips, width = nn.ModuleDict(), list(skips), config.widths[-1]
    coarsest = len(config.resolutions) - 1
    for level, side in reversed(list(enumerate(config.resolutions))):
        at, out = f"{side}x{side}", config.widths[level]
        if level == coarsest:
            dec[f"{at}_in0"] = ResidualBlock(width, width, emb, side=side, dropout=dropout, attention=True)
            dec[f"{at}_in1"] = ResidualBlock(width, width, emb, side=side, dropout=dropout)
        else:
            dec[f"{at}_up"] = ResidualBlock(width, width, emb, side=side, dropout=dropout, resample="up", taps=taps)
        for index in range(config.num_blocks + 1):
            attention = index == config.num_blocks and side in config.attn_resolutions
            merged = width + skips.pop()
            dec[f"{at}_block{index}"] = ResidualBlock(merged, out, emb, side=side, dropout=dropout, attention=attention)
            width = out
        if level == 0 or config.decoder_type == "skip":
            if level < coarsest and config.decoder_type == "skip":
                dec[f"{at}_aux_up"] = Resample(taps, "up")
            dec[f"{at}_aux_norm"] = group_norm(width)
            dec[f"{at}_aux_conv"] = conv(width, config.out_channels, 3, gain=NEAR_ZERO)
    return dec


def ddpmpp(img_resolution: int = 32, *, channels: int = 3, label_dim: int = 0, augment_dim: int = 0) -> dict[str, Any]:
    """Keyword arguments of EDM's DDPM++ with the CIFAR-10 settings (55.7M parameters).

    The published checkpoints have ``augment_dim`` 9, those for 64x64 ``channel_mult`` [1, 2, 2, 2] (override
    with ``ddpmpp(64) | {...}``). Source: EDM (arXiv 2206.00364), table 7 and appendix F.
    """
    return {
        "img_resolution": img_resolution,
        "in_channels": channels,
        "out_channels": channels,
        "label_dim": label_dim,
        "augment_dim": augment_dim,
        "model_channels": 128,
        "channel_mult": [2, 2, 2],
        "channel_mult_emb": 4,
        "num_blocks": 4,
        "attn_resolutions": [16],
        "dropout": 0.13,
        "label_dropout": 0.0,
        "embedding_type": "positional",
        "channel_mult_noise": 1,
        "encoder_type": "standard",
        "decoder_type": "standard",
        "resample_filter": [1, 1],
    }


def ncsnpp(img_resolution: int = 32, *, channels: int = 3, label_dim: int = 0, augment_dim: int = 0) -> dict[str, Any]:
    """Keyword arguments of EDM's NCSN++ with the CIFAR-10 settings.

    :func:`ddpmpp` with a Fourier embedding of twice the width, a residual encoder, filter [1, 3, 3, 1].
    Source: EDM (arXiv 2206.00364), table 7 and appendix F.
    """
    return ddpmpp(img_resolution, channels=channels, label_dim=label_dim, augment_dim=augment_dim) | {
        "embedding_type": "fourier",
        "channel_mult_noise": 2,
        "encoder_type": "residual",
        "resample_filter": [1, 3, 3, 1],
    }
