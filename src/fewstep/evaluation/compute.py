"""Training compute of a run in FLOP: images x what the networks do per image."""

from __future__ import annotations

from collections import Counter

import torch
from torch.utils.flop_counter import FlopCounterMode

from fewstep.denoiser import Denoiser
from fewstep.objectives import ECT, Objective, Diffusion
from fewstep.times import draw, pair
from fewstep.types import Progress

_LAW_GRID, _CLOCK_GRID = 1 << 14, 1 << 10


def forward_flops(denoiser: Denoiser) -> int:
    """FLOP of one network evaluation of one sample: matrix products and convolutions, 2 per multiply-add.

    Counted by torch's counter. Use a denoiser on the "meta" device: nothing is computed there, and attention, which
    the counter misses in the CPU's fused kernel, is counted. On one CPU core a DDPM++ counts in under a second.
    """
    where = denoiser.device
    x = torch.zeros(1, *denoiser.sample_shape, device=where)
    cond = torch.zeros(1, denoiser.num_classes, device=where) if denoiser.num_classes else None
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        denoiser.backbone(x, torch.zeros(1, device=where), cond)
    return int(counter.get_total_flops())


def target_share(objective: Objective, images: int, sigma_min: float = 0.0, sigma_max: float = 80.0) -> float:
    """Share of training images with a second, target pass: ``P(r > 0)`` under the law of t, meant over the schedule.

    0 for diffusion; 1 for an objective whose target passes are not known here.

    Args:
        images: length of the run, over which the schedule moves.
        sigma_min, sigma_max: of the student; as in the loss, the law is cut off only where sigma_min > 0.
    """
    if isinstance(objective, Diffusion):
        return 0.0
    if not isinstance(objective, ECT):
        return 1.0
    u = (torch.arange(_LAW_GRID, dtype=torch.float64) + 0.5) / _LAW_GRID
    t = draw(objective.law, u, sigma_min, sigma_max if sigma_min > 0 else float("inf"))
    clock = (Progress(images * (2 * i + 1) // (2 * _CLOCK_GRID), images) for i in range(_CLOCK_GRID))
    ratios = Counter(objective.schedule.ratio(progress) for progress in clock)
    shares = {q: float((pair(objective.mapping, t, q, sigma_min)[0] > 0).double().mean()) for q in ratios}
    return sum(shares[q] * count for q, count in ratios.items()) / _CLOCK_GRID


def training_flops(denoiser: Denoiser, objective: Objective, images: int) -> float:
    """``images F (3 + share)``: F of one forward pass, 2 F for its backward, and the target's forward where r > 0.

    Optimiser, averages, sampling and what the teacher had cost are not counted. EDM's CIFAR-10 network:
    F = 42.38 GFLOP, so 169.5 per image of an ECT step with share 1.
    """
    share = target_share(objective, images, denoiser.sigma_min, denoiser.sigma_max)
    return images * forward_flops(denoiser) * (3 + share)
