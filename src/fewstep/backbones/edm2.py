"""EDM2's magnitude-preserving U-Net (Karras et al. 2023, arXiv 2312.02696), under the names of its snapshots.

``EDM2`` is what a snapshot calls ``Precond``, without the preconditioning: the network ``unet`` and the learned
log-variance ``logvar_*``. All of a snapshot's state dict loads with ``load_state_dict(strict=True)``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fewstep.backbones.edm2_layers import BlockSettings, MPBlock, MPConv, MPFourier, mp_silu, mp_sum
from fewstep.backbones.edm_layers import check_inputs
from fewstep.backbones.layout import Place, check_sizes, check_taps, decoder, encoder
from fewstep.errors import ConfigError


class EDM2(nn.Module):
    """The raw network F of EDM2: ``F(x, c_noise, cond) -> [b, img_channels, h, w]``; it knows no process.

    Its layers have ``after_step()``, forced weight normalisation, which the trainer calls after every step of the
    optimiser; no forward pass changes a weight. A new network's output is 0 (``out_gain``).

    Args:
        img_resolution: height and width in pixels, a multiple of 2^(levels - 1).
        img_channels: of images; the network adds a channel of ones.
        label_dim: number of classes, 0 = unconditional.
        model_channels: base width (EDM2-XS 128, S 192, M 256, L 320, XL 384, XXL 448).
        channel_mult: one factor per level, finest first.
        channel_mult_noise: width of the noise embedding / model_channels; None = that of the first level.
        channel_mult_emb: width of the embedding vector / model_channels; None = that of the widest level.
        num_blocks: residual blocks per level (the decoder has one more).
        attn_resolutions: resolutions with self-attention, in layers of at least ``channels_per_head`` channels.
        label_balance: share of the class in the embedding, against the noise.
        concat_balance: share of a skip connection, against the main path.
        logvar_channels: width of the log-variance's embedding; 0 = no log-variance (snapshots of ECT).
        dropout: dropout probability inside the residual blocks, training only.
        dropout_res: no dropout above this resolution (snapshots of ECT).
        resample_filter: filter taps.
        channels_per_head: of attention.
        res_balance, attn_balance: shares of the residual branch and of attention.
        clip_act: activations are clipped to [-clip_act, clip_act]; None = never.

    Raises:
        ConfigError: settings that no network can be built from.

    Source: EDM2, figure 21 and table 6.
    """

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        channel_mult_noise: int | None = None,
        channel_mult_emb: int | None = None,
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (16, 8),
        label_balance: float = 0.5,
        concat_balance: float = 0.5,
        logvar_channels: int = 128,
        dropout: float = 0.0,
        dropout_res: int | None = None,
        resample_filter: Sequence[float] = (1, 1),
        channels_per_head: int = 64,
        res_balance: float = 0.3,
        attn_balance: float = 0.3,
        clip_act: float | None = 256,
    ) -> None:
        super().__init__()
        noise, emb = channel_mult_noise or 1, channel_mult_emb or 1
        least = {"img_channels": (img_channels, 1), "label_dim": (label_dim, 0), "model_channels": (model_channels, 1)}
        least |= {"num_blocks": (num_blocks, 1), "logvar_channels": (logvar_channels, 0)}
        least |= {"channel_mult_noise": (noise, 1), "channel_mult_emb": (emb, 1)}
        least |= {"channels_per_head": (channels_per_head, 1)}
        balances = {"label_balance": label_balance, "concat_balance": concat_balance}
        balances |= {"res_balance": res_balance, "attn_balance": attn_balance}
        check_sizes(img_resolution, channel_mult, least, {"dropout": dropout, **balances})
        check_taps(resample_filter)
        widths = [model_channels * mult for mult in channel_mult]
        settings = BlockSettings(
            emb_channels=max(widths) if channel_mult_emb is None else model_channels * emb,
            resample_filter=tuple(resample_filter),
            channels_per_head=channels_per_head,
            dropout=dropout,
            dropout_res=dropout_res,
            concat_balance=concat_balance,
            res_balance=res_balance,
            attn_balance=attn_balance,
            clip_act=clip_act,
        )
        self.sample_shape = (img_channels, img_resolution, img_resolution)
        self.unet = MPUNet(
            self.sample_shape,
            label_dim,
            noise_channels=widths[0] if channel_mult_noise is None else model_channels * noise,
            encoder_places=list(encoder(img_resolution, widths, num_blocks, attn_resolutions)),
            decoder_places=list(decoder(img_resolution, widths, num_blocks, attn_resolutions)),
            label_balance=label_balance,
            settings=settings,
        )
        self.logvar_fourier = MPFourier(logvar_channels) if logvar_channels else None
        self.logvar_linear = MPConv(logvar_channels, 1) if logvar_channels else None

    @property
    def landing_width(self) -> int:
        """Width of the ``landing`` that :meth:`forward` takes."""
        return len(self.unet.emb_fourier.freqs)

    def forward(
        self, x: Tensor, c_noise: Tensor, cond: Tensor | None = None, *, landing: Tensor | None = None
    ) -> Tensor:
        """F(x, c_noise, cond): the raw network output, in the precision of ``x`` (or of autocast).

        Args:
            x: preconditioned input, float ``[b, img_channels, img_resolution, img_resolution]``.
            c_noise: noise condition, float ``[b]``; ln(sigma) / 4.
            cond: one-hot labels, float ``[b, label_dim]``; None = zeros ("no class").
            landing: what a two-time network adds to the noise embedding, float ``[b, landing_width]``.

        Returns:
            float ``[b, img_channels, img_resolution, img_resolution]``.

        Raises:
            DataError: a tensor of the wrong shape, or a condition the network was built without.
        """
        check_inputs(x, c_noise, cond, None, self.sample_shape, self.unet.label_dim, 0)
        return self.unet(x, c_noise, cond, landing)

    def logvar(self, c_noise: Tensor) -> Tensor:
        """``u(c_noise)``, ``[b] -> [b]``: the learned log-variance of the denoising error (EDM2, equation 21).

        Part of the checkpoints; this library's objectives do not use it (math.md 2.6, note ii).

        Raises:
            ConfigError: the network was made without it.
        """
        if self.logvar_fourier is None or self.logvar_linear is None:
            raise ConfigError("This EDM2 network has no log-variance", got="logvar_channels=0")
        return self.logvar_linear(self.logvar_fourier(c_noise))[:, 0]


class MPUNet(nn.Module):
    """The U-Net itself; see :class:`EDM2`."""

    def __init__(
        self,
        sample_shape: tuple[int, int, int],
        label_dim: int,
        *,
        noise_channels: int,
        encoder_places: Sequence[Place],
        decoder_places: Sequence[Place],
        label_balance: float,
        settings: BlockSettings,
    ) -> None:
        super().__init__()
        channels, side, _ = sample_shape
        self.label_dim, self.label_balance = label_dim, label_balance
        self.out_gain = nn.Parameter(torch.zeros([]))
        self.emb_fourier = MPFourier(noise_channels)
        self.emb_noise = MPConv(noise_channels, settings.emb_channels)
        self.emb_label = MPConv(label_dim, settings.emb_channels) if label_dim else None
        self.enc = nn.ModuleDict({f"{side}x{side}_conv": MPConv(channels + 1, encoder_places[0].inputs, 3)})
        self.enc.update({place.name: MPBlock(place, settings, encoder=True) for place in encoder_places})
        self.dec = nn.ModuleDict({place.name: MPBlock(place, settings, encoder=False) for place in decoder_places})
        self.out_conv = MPConv(decoder_places[-1].outputs, channels, 3)

    def forward(self, x: Tensor, c_noise: Tensor, cond: Tensor | None, landing: Tensor | None) -> Tensor:
        emb = self._embed(c_noise, cond, landing, x.dtype)
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        skips: list[Tensor] = []
        for block in self.enc.values():
            x = block(x, emb) if isinstance(block, MPBlock) else block(x)
            skips.append(x)
        for name, block in self.dec.items():
            x = block(x, emb, skips.pop()) if "block" in name else block(x, emb)
        return self.out_conv(x, self.out_gain)

    def _embed(self, c_noise: Tensor, cond: Tensor | None, landing: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Noise, label and landing -> the vector ``[b, e]`` that scales every block."""
        emb = self.emb_fourier(c_noise).to(dtype)
        if landing is not None:
            emb = emb + landing.to(emb.dtype)
        emb = self.emb_noise(emb)
        if self.emb_label is not None:
            classes = emb.new_zeros(len(emb), self.label_dim) if cond is None else cond.to(dtype)
            emb = mp_sum(emb, self.emb_label(classes * math.sqrt(self.label_dim)), self.label_balance)
        return mp_silu(emb)
