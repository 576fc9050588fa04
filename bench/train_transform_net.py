"""Train the feature net of AYT's distance on one's own images: which transformation was applied, and how far?

    OMP_NUM_THREADS=1 python bench/train_transform_net.py --data fashion.npz --resize 16 --out transforms
    fewstep tune TEACHER --data fashion.npz --resize 16 --out RUN \
        --set objective.levers.distance.net=transforms:transforms

Prints R^2 (1: exact, 0: no better than the mean) of each label on images kept from the training. CPU, about a minute
for the default number of 16x16 images.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from fewstep.data import open_source
from fewstep.training.transform_net import train_transform_net


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a SOURCE, as for fewstep tune")
    parser.add_argument("--resize", type=int, default=None)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=80_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    source = open_source(arguments.data, resize=arguments.resize)
    start, cpu = time.perf_counter(), time.process_time()
    trained = train_transform_net(
        source, arguments.images, arguments.seed, arguments.out,
        report=lambda seen, loss: print(f"{seen:8d} images  MSE {loss:.4f}", flush=True),
    )  # fmt: skip
    for name, r2 in trained.r2.items():
        print(f"{name:15s} R^2 {r2:.3f}")
    spent = f"{time.perf_counter() - start:.0f} s, {time.process_time() - cpu:.0f} CPU s"
    print(f"mean R^2 {trained.mean_r2:.3f} on {trained.validation} images, {spent} -> {arguments.out}")


if __name__ == "__main__":
    main()
