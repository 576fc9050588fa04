"""Memory and speed of the evaluation's streaming: 10,000 and 50,000 images of 32x32 through a feature net.

    python bench/eval.py [--features pca:64 | mobilenet:PATH | inception:PATH | ...]

Images are made block by block and never held; features are, up to 128 million values (512 MB). Prints, for each count,
images per second, the seconds of every metric, and the growth of the resident memory: A B A B over the counts.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from fewstep.data import open_source
from fewstep.evaluation import DEFAULT_METRICS, open_reference
from fewstep.evaluation.evaluate import see
from fewstep.evaluation.measure import Real, available, measure
from fewstep.evaluation.samples import SampleSet

SHAPE = (3, 32, 32)
BLOCK = 500


def resident() -> float:
    """MiB of this process that are in memory now (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    return float("nan")


def noisy_tiles(count: int) -> SampleSet:
    """Tiles with noise, made when they are asked for."""
    tiles = open_source("tiles").read(torch.arange(4192).numpy())

    def blocks(part: int = 0, parts: int = 1) -> Iterator[Tensor]:
        for start in range(part * BLOCK, count, parts * BLOCK):
            generator = torch.Generator().manual_seed(start)
            index = torch.randint(len(tiles), (min(BLOCK, count - start),), generator=generator)
            noise = 8 * torch.randn(len(index), *SHAPE, generator=generator)
            yield (tiles[index] + noise).round().clamp(0, 255).to(torch.uint8)

    about = {"solver": "noisy tiles", "steps": None, "nfe": None, "times": None, "seed": 0}
    return SampleSet("noisy tiles", count, SHAPE, True, None, about, blocks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", default="pca:64")
    parser.add_argument("--counts", type=int, nargs="+", default=[10_000, 50_000])
    arguments = parser.parse_args()
    reference = open_reference("tiles", arguments.features, cache=False)
    real = Real(reference.stats, reference.rows, reference.labels)
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {reference.net.name}")
    for count in [*arguments.counts, *arguments.counts]:
        samples, before, peak = noisy_tiles(count), resident(), [0.0]

        def watch(what: str, done: int, total: int, peak: list[float] = peak) -> None:
            peak[0] = max(peak[0], resident())

        started = time.perf_counter()
        fake, _ = see(samples, reference.net, on_progress=watch)
        seconds = time.perf_counter() - started
        assert fake is not None
        held = fake.rows.numel() * 4 / 2**20
        line = f"{count:>7,} images: {count / seconds:7.0f} images/s, memory +{peak[0] - before:5.0f} MiB"
        print(f"{line} (features {held:.0f} MiB, the images would be {count * 3072 / 2**20:.0f} MiB)")
        for name in available(DEFAULT_METRICS, real, fake):
            started = time.perf_counter()
            found = measure([name], real, fake)[name]
            print(f"    {name:<10} {found.value:9.4f} +- {found.high - found.value:.4f}", end="")
            print(f"  {time.perf_counter() - started:6.1f} s")


if __name__ == "__main__":
    main()
