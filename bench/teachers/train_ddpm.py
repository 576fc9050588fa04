"""A DDPM of Fashion-MNIST at 16x16 as a diffusers user would make it: `UNet2DModel`, `DDPMScheduler`, `DDPMPipeline`.

    python bench/teachers/train_ddpm.py --data fashion_mnist_28x28_uint8.npz --out ddpm-fashion16

Plain diffusers and torch: nothing of the training is ours, so the teacher is what fewstep meets in the wild. Predicts
eps, linear betas, T = 1000. Writes a pipeline folder every 25,600 images.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fewstep import open_source

SIDE, BATCH, SAVE = 16, 128, 25_600


def network() -> UNet2DModel:
    """1.06 M parameters, no attention."""
    return UNet2DModel(
        sample_size=SIDE, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(32, 64, 64),
        down_block_types=("DownBlock2D",) * 3, up_block_types=("UpBlock2D",) * 3, norm_num_groups=8,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=400_000)
    parser.add_argument("--lr", type=float, default=1e-3)
    a = parser.parse_args()
    torch.manual_seed(0)
    source = open_source(a.data, resize=SIDE)
    x = source.read(torch.arange(len(source)).numpy()).float() / 127.5 - 1
    net, scheduler = network(), DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    optimizer = torch.optim.AdamW(net.parameters(), lr=a.lr)
    seen, total, started = 0, 0.0, time.time()
    while seen < a.images:
        for group in optimizer.param_groups:
            group["lr"] = a.lr * min(1.0, seen / 6_400 + 0.01, max(0.02, (a.images - seen) / (0.3 * a.images)))
        clean = x[torch.randint(len(x), (BATCH,))]
        noise, t = torch.randn_like(clean), torch.randint(1000, (BATCH,))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = net(scheduler.add_noise(clean, noise, t), t).sample
        loss = F.mse_loss(out.float(), noise)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(net)
        seen, total = seen + BATCH, total + float(loss)
        if seen % SAVE == 0 or seen >= a.images:
            print(f"{seen} images  loss {total / (SAVE / BATCH):.4f}  {time.time() - started:.0f} s", flush=True)
            total = 0.0
            DDPMPipeline(average.module, scheduler).save_pretrained(a.out)


if __name__ == "__main__":
    main()
