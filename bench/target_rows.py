"""What it is worth that rows with r = 0 never enter the network: our ECT loss against one that runs them all, and one
that runs student and target as one batch.

    OMP_NUM_THREADS=1 python bench/target_rows.py

Same network, batch and noise, forward and backward, interleaved A B A B in one process; prints images/s, the ratio
of medians and the share of rows with r > 0 for the first stages of the published schedules.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import Tensor

from fewstep.backbones import build
from fewstep.denoiser import Denoiser, Parametrization
from fewstep.objectives import ECT
from fewstep.objectives.base import to_device
from fewstep.process import EDM, expand
from fewstep.times import Lognormal, draw, pair


def all_rows(objective: ECT, student: Denoiser, x_0: Tensor, t: Tensor, eps: Tensor, ratio: float) -> Tensor:
    """The same loss with a target pass over every row, as in the published code (r = 0 is masked afterwards)."""
    r, gap = (to_device(v, x_0) for v in pair(objective.mapping, t, ratio))
    t = to_device(t, x_0)
    out = student(x_0 + expand(t, x_0) * eps, t)
    with torch.no_grad():
        target = student(x_0 + expand(r, x_0) * eps, r.clamp_min(1e-6))
        target = torch.where(expand(r, x_0) > 0, target, x_0)
    return objective.penalty(out - target, t, gap)


def one_batch(objective: ECT, student: Denoiser, x_0: Tensor, t: Tensor, eps: Tensor, ratio: float) -> Tensor:
    """The same loss with x_t and x_r in one pass, whose second half is detached afterwards."""
    r, gap = (to_device(v, x_0) for v in pair(objective.mapping, t, ratio))
    t = to_device(t, x_0)
    both = torch.cat((x_0 + expand(t, x_0) * eps, x_0 + expand(r, x_0) * eps))
    out, target = student(both, torch.cat((t, r.clamp_min(1e-6)))).chunk(2)
    target = torch.where(expand(r, x_0) > 0, target.detach(), x_0)
    return objective.penalty(out - target, t, gap)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--side", type=int, default=16)
    parser.add_argument("--channels", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    shape = (3, arguments.side, arguments.side)
    spec = {"name": "unet", "kwargs": {"sample_shape": list(shape), "channels": arguments.channels}}
    student = Denoiser(build(spec), EDM(), Parametrization(), sample_shape=shape).train()
    x_0, eps = torch.randn(arguments.batch, *shape) * 0.5, torch.randn(arguments.batch, *shape)
    objective = ECT(law=Lognormal(-1.1, 2.0))
    t = draw(objective.law, (torch.arange(arguments.batch, dtype=torch.float64) + 0.5) / arguments.batch)
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, batch {arguments.batch}, {shape}")
    for q, stage in ((2.0, 0), (2.0, 1), (4.0, 0), (256.0, 0)):
        ratio = q ** (stage + 1)
        share = float((pair(objective.mapping, t, ratio)[0] > 0).double().mean())
        losses = {"ours": objective.loss_at, "all": all_rows, "one": one_batch}
        times: dict[str, list[float]] = {name: [] for name in losses}
        for _ in range(arguments.rounds):
            for name in times:
                start = time.perf_counter()
                first = () if name == "ours" else (objective,)
                losses[name](*first, student, x_0, t, eps, ratio).mean().backward()  # type: ignore[operator]
                times[name].append(time.perf_counter() - start)
        ours, everything, one = (statistics.median(times[name]) for name in losses)
        print(
            f"q={q:g} stage {stage}: rows with r > 0 {share:6.1%}   ours {arguments.batch / ours:8.1f} images/s   "
            f"all rows {arguments.batch / everything:8.1f}   ratio {everything / ours:.2f}   "
            f"in one batch {arguments.batch / one:8.1f}   ratio {one / ours:.2f}"
        )


if __name__ == "__main__":
    main()
