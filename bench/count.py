"""Operations, FLOPs, memory and device waits of an update, counted on a CPU without computing it.

    OMP_NUM_THREADS=1 python bench/count.py                          # 10 to 60 s a row
    python bench/count.py --nets ddpmpp --variants fp16 fp16+recompute --batch 128

Our trainer's real step runs on a simulated device whose tensors have sizes but no values
(fewstep.training.simulated), at the end of the schedule, where every row has its target pass; autocast casts where it
does on CUDA. Sizes of kernels' workspaces are unknown. The published step reads the device, so it runs on a tiny
batch of real numbers, and has no memory column. GB are 10^9 bytes, GiB 2^30.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace

import torch
from step import Published, Recipe
from step_nets import NETS, Variant, images, network

from fewstep.training.config import RunConfig
from fewstep.training.cost import PHASES, Counting, Memory, Work
from fewstep.training.simulated import DEVICE, SimulatedDevice
from fewstep.training.trainer import Trainer
from fewstep.world import World

PHASE_ORDER = ("data", "random", "student", "target", "backward", "sanitise", "norm", "optimiser", "ema", "other")
PUBLISHED = {
    "step:Published.sanitise": "sanitise",
    "step:Published.average": "ema",
    "step:Published.batch": "data",
} | dict(PHASES)


@dataclass(frozen=True)
class Row:
    """What one update was counted to do; ``memory`` is its peak in bytes, ``kept`` what autograd keeps per image."""

    name: str
    batch: int
    work: Work
    waits: int
    memory: int | None = None
    kept: float | None = None
    places: tuple[tuple[str, int], ...] = ()


def count_ours(net: str, variant: str, batch: int, micro: int | None) -> Row:
    """Our second update, on a hollow device."""
    settings = replace(Variant.of(variant).config(NETS[net], batch, 256.0), micro_batch=micro)
    with SimulatedDevice(hollow=True) as device, Memory(only=device.has) as memory:
        trainer = _trainer(net, settings)
        trainer.images_seen = 20 * batch
        steps = trainer.steps()
        next(steps)
        device.waits.clear()
        memory.restart()
        with Counting() as counting:
            next(steps)
        steps.close()  # type: ignore[attr-defined]
    curve = memory.curve
    end = next(place for place, (phase, _) in enumerate(curve) if phase == "backward")
    start = max(place for place, (phase, _) in enumerate(curve[:end]) if phase == "data")
    kept = (curve[end - 1][1] - curve[start][1]) / (micro or batch)
    places = tuple((f"{name} at {where}", size) for (name, where), size in memory.at_peak.most_common(8))
    return Row(variant, batch, counting.work, len(device.waits), memory.peak, kept, places)


def _trainer(net: str, settings: RunConfig) -> Trainer:
    student = network(NETS[net], torch.device("cpu")).to(DEVICE)
    return Trainer(settings, student, images(NETS[net].side), World(0, 1, DEVICE))


def count_published(net: str) -> Row:
    """The published step's second update, of two images, with real numbers on a simulated device."""
    with SimulatedDevice() as device:
        model = network(NETS[net], torch.device("cpu")).to(DEVICE)
        data = images(NETS[net].side).data  # type: ignore[attr-defined]
        published = Published(model, data, Recipe(batch=2, last=0))
        published.step()
        device.waits.clear()
        with Counting(PUBLISHED) as counting:
            published.step()
    return Row("published", 2, counting.work, len(device.waits))


def table(rows: list[Row]) -> str:
    """Markdown, one row per way to execute the step."""
    phases = [phase for phase in PHASE_ORDER if any(row.work.operations[phase] for row in rows)]
    names = ["step", "operations", "kernels", *phases, "GFLOP/image", "kept MiB/image", "peak GB (GiB)", "waits"]
    lines = ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
    for row in rows:
        work = row.work
        cells = [row.name, f"{work.operations.total():,}", f"{work.kernels.total():,}"]
        cells += [f"{work.operations[phase]:,}" for phase in phases]
        cells.append(f"{work.flops.total() / row.batch / 1e9:.2f}")
        cells.append("" if row.kept is None else f"{row.kept / 2**20:.1f}")
        cells.append("" if row.memory is None else f"{row.memory / 1e9:.2f} ({row.memory / 2**30:.2f})")
        lines.append("| " + " | ".join([*cells, str(row.waits)]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", default=["ddpmpp", "edm2s", "unet", "dit"], choices=list(NETS))
    parser.add_argument("--variants", nargs="+", default=["fp32", "fp16", "fp32+recompute", "fp16+recompute"])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--micro-batch", type=int)
    parser.add_argument("--no-published", action="store_true", help="it computes: 15 s for ddpmpp on one core")
    parser.add_argument("--places", action="store_true", help="where the memory at the peak was made")
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, batch {arguments.batch}, micro_batch {arguments.micro_batch or 'none'}")
    for net in arguments.nets:
        rows = [] if arguments.no_published else [count_published(net)]
        rows += [count_ours(net, name, arguments.batch, arguments.micro_batch) for name in arguments.variants]
        print(f"\n{net}\n\n{table(rows)}", flush=True)
        for row in rows if arguments.places else []:
            print(f"\n{row.name}: " + ", ".join(f"{size / 1e6:,.0f} MB {place}" for place, size in row.places))


if __name__ == "__main__":
    main()
