"""The Fréchet step at 2,048 features: our eigenvalues beside scipy's sqrtm of the product.

    OMP_NUM_THREADS=2 python bench/frechet.py

Two sample covariances with the spectrum 1/i on different axes, interleaved A B A B in one process; prints the seconds
of each, the ratio of medians, how far the two distances differ, and what a further step count costs once the reference
is factored.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import scipy.linalg
import torch

from fewstep.evaluation.metrics import FrechetReference, Stats, frechet_distance, gaussian_stats


def by_sqrtm(a: Stats, b: Stats) -> float:
    """|Δm|² + tr (S + S' - 2 (S S')^½) as pytorch-fid and its descendants compute it."""
    root = scipy.linalg.sqrtm((a.cov @ b.cov).numpy()).real
    return float((a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace()) - 2 * float(np.trace(root))


def timed(call: Callable[[], float]) -> tuple[float, float]:
    """Seconds and result of one call."""
    start = time.perf_counter()
    value = call()
    return time.perf_counter() - start, value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--rows", type=int, default=4200)
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    scale = torch.arange(1, arguments.dim + 1, dtype=torch.float64).rsqrt()
    rng = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, arguments.rows, arguments.dim, generator=rng, dtype=torch.float64)
    a, b = gaussian_stats(x * scale), gaussian_stats(y * scale.flip(0))
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, scipy {scipy.__version__}, d = {len(scale)}")
    seconds: dict[str, list[float]] = {"ours": [], "sqrtm": []}
    values: dict[str, float] = {}
    routes = {"ours": frechet_distance, "sqrtm": by_sqrtm}
    for _ in range(arguments.rounds):
        for name, route in routes.items():
            took, values[name] = timed(lambda route=route: route(a, b))
            seconds[name].append(took)
            print(f"{name:6s} {took:7.2f} s   {values[name]:.12g}", flush=True)
    reference = FrechetReference(a)
    print(f"again  {timed(lambda: reference.distance(b))[0]:7.2f} s   (ours, reference factored before)")
    ratio = statistics.median(seconds["sqrtm"]) / statistics.median(seconds["ours"])
    print(f"sqrtm / ours: {ratio:.1f}x; relative difference {abs(values['ours'] / values['sqrtm'] - 1):.1e}")


if __name__ == "__main__":
    main()
