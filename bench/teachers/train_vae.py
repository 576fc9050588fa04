"""A small VAE as a diffusers user would make it: `AutoencoderKL`, 64x64x3 -> 4x16x16, for teachers of latents.

    python bench/teachers/train_vae.py --data emojione_2.2.7_on_white.npz --key x64 --out vae-emoji64

Plain diffusers and torch: nothing of the training is ours. L1 + 1e-6 KL, horizontal flips, bfloat16 autocast. Writes
an `AutoencoderKL` folder every few minutes; its scaling_factor is 1 / (std of the data's latents, posterior modes).
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

BATCH, KL, SAVE, PRINT = 8, 1e-6, 240.0, 100


def network(channels: int, latents: int) -> AutoencoderKL:
    """0.68 M parameters; two halvings."""
    return AutoencoderKL(
        in_channels=channels, out_channels=channels, latent_channels=latents, sample_size=64, layers_per_block=1,
        block_out_channels=(16, 32, 64), down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, norm_num_groups=8, scaling_factor=1.0,
    )  # fmt: skip


def save(vae: AutoencoderKL, x: Tensor, out: Path) -> tuple[float, float]:
    """Measure the latents' std and the reconstructions' PSNR (dB, mean over images), and write the folder."""
    vae.eval()
    with torch.no_grad():
        z = torch.cat([vae.encode(part).latent_dist.mode() for part in x.split(BATCH)])
        y = torch.cat([vae.decode(part).sample.clamp(-1, 1) for part in z[:256].split(BATCH)])
    vae.train()
    psnr = 10 * (4 / (y - x[:256]).square().flatten(1).mean(1)).log10()
    vae.register_to_config(scaling_factor=1 / float(z.std()))
    vae.save_pretrained(out)
    return float(z.std()), float(psnr.mean())


def step(vae: AutoencoderKL, clean: Tensor) -> tuple[Tensor, Tensor]:
    """L1 and KL (nats per latent number) of a batch."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        posterior = vae.encode(clean).latent_dist
        y = vae.decode(posterior.sample()).sample
    return F.l1_loss(y.float(), clean), posterior.kl().mean() / posterior.mean[0].numel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--key", default="x64")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=60_000)
    parser.add_argument("--latents", type=int, default=4)
    parser.add_argument("--lr", type=float, default=1e-3)
    a = parser.parse_args()
    torch.manual_seed(0)
    pixels = torch.from_numpy(np.load(a.data)[a.key])
    x = (pixels.permute(0, 3, 1, 2).float() / 127.5 - 1).contiguous()
    vae = network(x.shape[1], a.latents).to(memory_format=torch.channels_last).train()
    print(f"{sum(p.numel() for p in vae.parameters())} parameters, {len(x)} images", flush=True)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=a.lr, betas=(0.9, 0.99), weight_decay=1e-4)
    steps, started, saved, sums = math.ceil(a.images / BATCH), time.time(), time.time(), torch.zeros(2)
    for i in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = a.lr * min(1.0, i / 100) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * i / steps)))
        clean = x[torch.randint(len(x), (BATCH,))]
        clean = torch.where(torch.rand(BATCH, 1, 1, 1) < 0.5, clean.flip(3), clean)
        l1, kl = step(vae, clean.contiguous(memory_format=torch.channels_last))
        optimizer.zero_grad()
        (l1 + KL * kl).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        sums += torch.stack((l1.detach(), kl.detach()))
        if i % PRINT == 0:
            l1_mean, kl_mean = (sums / PRINT).tolist()
            print(f"{i * BATCH} images  L1 {l1_mean:.4f}  KL {kl_mean:.2f}  {time.time() - started:.0f} s", flush=True)
            sums.zero_()
        if i == steps or time.time() - saved > SAVE:
            std, psnr = save(vae, x, a.out)
            print(f"{i * BATCH} images  PSNR {psnr:.2f} dB  latents' std {std:.3f}  saved {a.out}", flush=True)
            saved = time.time()


if __name__ == "__main__":
    main()
