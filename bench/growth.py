"""How the cost of a step grows: with the batch, the resolution, the width, the number of averages, and the images seen.

    OMP_NUM_THREADS=1 python bench/growth.py --out growth.json --figure docs/growth.svg

One small U-Net on a CPU, EDM's DDPM++ on a GPU; one setting is moved at a time, at q^a = 256; its points take turns.
Speed is measured (median of the steps, [25 %, 75 %]; a CPU's in processor time); memory is counted from tensors: what
autograd keeps for a step, and what lives between steps (weights, gradients, moments, averages); on a GPU the measured
peak, too. Nothing may grow with the images seen: that part is a real run (`fewstep.tune`) of many tiny steps. Settings
that are in --out already are not measured again.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from step_nets import ENDLESS, Net, Variant, images, network, trainer_of
from step_parts import clock_of, machine, peak_bytes, resident_bytes
from step_table import load_groups, save_group, spread
from torch import Tensor

from fewstep import tune
from fewstep.backbones.edm import ddpmpp
from fewstep.denoiser import Denoiser
from fewstep.ema import ConstantEMA, PowerEMA
from fewstep.training.loop import Watcher
from fewstep.training.trainer import StepReport, Trainer

BASE = {
    "cpu": {"batch": 8, "side": 16, "width": 16, "averages": 1},
    "cuda": {"batch": 128, "side": 32, "width": 128, "averages": 1},
}
SWEEPS: dict[str, dict[str, list[int]]] = {
    "cpu": {
        "batch": [1, 2, 4, 8, 16, 32, 64],
        "side": [8, 16, 32, 64],
        "width": [8, 16, 32, 64],
        "averages": [1, 2, 4, 8, 16],
    },
    "cuda": {
        "batch": [8, 16, 32, 64, 128, 256, 512],
        "side": [16, 32, 64],
        "width": [32, 64, 128, 256],
        "averages": [1, 2, 4, 8],
    },
}
NAMES = {"batch": "batch", "side": "pixels per side", "width": "channels", "averages": "averages"}
WINDOWS = 10


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    for setting, values in SWEEPS[torch.device(arguments.device).type].items():
        missing = {f"{setting}/{value}" for value in values} - set(load_groups(arguments.out))
        for key, point in sweep(arguments, setting, values) if missing else ():
            keep(arguments, key, point)
        gc.collect()
    if arguments.out is None or "images" not in load_groups(arguments.out):
        keep(arguments, "images", long_run(arguments.steps, arguments.device) | machine(torch.device(arguments.device)))
    rows = load_groups(arguments.out) if arguments.out else MEASURED
    print_tables(rows)
    if arguments.figure:
        draw(rows, arguments.figure)


MEASURED: dict[str, dict[str, Any]] = {}
"""What was measured in this process."""


def keep(arguments: argparse.Namespace, key: str, point: dict[str, Any]) -> None:
    MEASURED[key] = point
    save_group(arguments.out, key, point)
    print(f"{key} done", flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--variant", default="fp32", help="as in bench/step.py")
    parser.add_argument("--seconds", type=float, default=3.0, help="of steps per point, at least 5 steps")
    parser.add_argument("--steps", type=int, default=4_000, help="of the long run")
    parser.add_argument("--out", type=Path, help="JSON, written after every point")
    parser.add_argument("--figure", type=Path, help="SVG or PNG")
    return parser.parse_args()


def net_of(kind: str, side: int, width: int) -> Net:
    """The network of a point."""
    if kind == "cuda":
        return Net({"name": "edm", "kwargs": ddpmpp(side) | {"model_channels": width}}, side, 8)
    sizes = {"sample_shape": [3, side, side], "channels": width, "multipliers": [1, 2], "blocks": 1, "attention": []}
    return Net({"name": "unet", "kwargs": sizes}, side, 8)


class Point:
    """One setting of a sweep: a trainer, and how long its steps took."""

    def __init__(self, arguments: argparse.Namespace, at: dict[str, int]) -> None:
        device = torch.device(arguments.device)
        net = net_of(device.type, at["side"], at["width"])
        emas = (ConstantEMA(0.9999), *(PowerEMA(0.02 + 0.01 * k) for k in range(at["averages"] - 1)))
        config = Variant.of(arguments.variant).config(net, at["batch"], 256.0, emas)
        self.trainer, self.steps = trainer_of(config, network(net, device), images(at["side"]))
        self.at, self.device, self.compiled = at, device, "compile" in arguments.variant
        self.seconds: list[float] = []
        self.run(3)

    def run(self, count: int) -> tuple[float, float]:
        """Seconds of so many steps (processor time on a CPU), and nothing."""
        clock = clock_of(self.device)
        start = clock()
        for _ in range(count):
            next(self.steps)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return clock() - start, 0.0

    def record(self) -> dict[str, Any]:
        """Speed and memory."""
        return machine(self.device) | self.at | {
            "parameters": sum(p.numel() for p in self.trainer.student.parameters()),
            "images_per_second": spread([self.at["batch"] / s for s in self.seconds]),
            "steps": len(self.seconds),
            "resident_bytes": resident_bytes(self.trainer),
            "peak_bytes": peak_bytes(self.trainer, self.run, self.device),
            "saved_bytes": None if self.compiled else saved_bytes(self.trainer, self.steps),
        }  # fmt: skip


def sweep(arguments: argparse.Namespace, setting: str, values: list[int]) -> Iterator[tuple[str, dict[str, Any]]]:
    """All points of a setting, which take turns, so that a slow moment of the machine slows all of them."""
    base = BASE[torch.device(arguments.device).type]
    turns = [Point(arguments, base | {setting: value}) for value in values]
    deadline, rounds = time.perf_counter() + arguments.seconds * len(turns), 0
    while rounds < 5 or (rounds < 300 and time.perf_counter() < deadline):
        for point in turns:
            point.seconds.append(point.run(1)[0])
        rounds += 1
    for value, point in zip(values, turns, strict=True):
        yield f"{setting}/{value}", point.record()


def saved_bytes(trainer: Trainer, steps: Iterator[Any]) -> int:
    """Bytes that autograd keeps for one step, each storage once, weights not counted."""
    weights = {p.untyped_storage().data_ptr() for p in trainer.trained.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        next(steps)
    return sum(kept.values())


class Observer(Watcher):
    """Notes time, memory and open files over the windows of a run."""

    def __init__(self, steps: int, clock: Callable[[], float]) -> None:
        self.windows: list[dict[str, float]] = []
        self._size, self._seconds, self._clock = max(steps // WINDOWS, 1), list[float](), clock
        self._last = clock()

    def stepped(self, report: StepReport) -> None:
        now = self._clock()
        self._seconds.append(now - self._last)
        if len(self._seconds) == self._size:
            middle, low, high = spread([1e3 * s for s in self._seconds])
            record = {"images": report.progress.images_seen, "step_ms": middle, "low": low, "high": high}
            self.windows.append(record | process_state())
            self._seconds.clear()
        self._last = self._clock()


def process_state() -> dict[str, float]:
    """Resident MiB, open files, threads and tensors that Python knows, of this process (Linux)."""
    status = Path("/proc/self/status").read_text()
    tensors = sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())
    return {
        "rss_mib": int(status.split("VmRSS:")[1].split()[0]) / 1024,
        "open_files": len(os.listdir("/proc/self/fd")),
        "threads": int(status.split("Threads:")[1].split()[0]),
        "tensors": tensors,
    }


def long_run(steps: int, device: str) -> dict[str, Any]:
    """A whole run of tiny steps: log, checkpoints and all."""
    spec = {"name": "unet", "kwargs": {"sample_shape": [1, 8, 8], "channels": 8, "multipliers": [1], "blocks": 1}}
    student = network(Net(spec, 8, 2), torch.device("cpu"))
    teacher = Denoiser(student.backbone, student.process, student.parametrization, sample_shape=(1, 8, 8), spec=spec)
    batch, observer = 2, Observer(steps, clock_of(torch.device(device)))
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "images": steps * batch, "batch_size": batch, "precision": "fp32", "eval.samples": 0, "optim.lr": 1e-5,
            "data.labels": False, "output.log_images": 40 * batch, "output.sample_images": 0,
            "output.checkpoint_images": max(steps * batch // (2 * WINDOWS), 1), "output.keep": 1,
            "objective.schedule.images": ENDLESS,
        }  # fmt: skip
        tune(teacher, "digits", out=Path(folder) / "run", recipe="fast", overrides=settings, device=device,
             watcher=observer)  # fmt: skip
    return {"steps": steps, "batch": batch, "windows": observer.windows}


def print_tables(rows: dict[str, dict[str, Any]]) -> None:
    """A Markdown table per setting."""
    some = next(iter(rows.values()))
    print(f"\n{some['machine']}, {some['threads']} thread(s), torch {some['torch']}, {some['date']}")
    for setting, name in NAMES.items():
        print(f"\n| {name} | parameters | images/s | per image and step, MiB | between steps, MiB | peak, MiB |")
        print("|---|---|---|---|---|---|")
        for row in points(rows, setting):
            rate, peak = row["images_per_second"], row["peak_bytes"]
            kept = None if row["saved_bytes"] is None else row["saved_bytes"] / row["batch"]
            print(
                f"| {row[setting]} | {row['parameters']:,} | {rate[0]:.4g} [{rate[1]:.4g}, {rate[2]:.4g}] "
                f"| {mib(kept)} | {mib(row['resident_bytes'])} | {mib(peak)} |"
            )
    if "images" in rows:
        print(
            "\n| images seen | step, ms | resident, MiB | open files | threads | tensors |\n|---|---|---|---|---|---|"
        )
        for w in rows["images"]["windows"]:
            print(
                f"| {w['images']:,} | {w['step_ms']:.2f} [{w['low']:.2f}, {w['high']:.2f}] | {w['rss_mib']:.1f} "
                f"| {w['open_files']} | {w['threads']} | {w['tensors']} |"
            )


def mib(count: float | None) -> str:
    """Bytes in MiB; "-" where there are none to tell."""
    return "-" if count is None else f"{count / 2**20:.2f}"


def points(rows: dict[str, dict[str, Any]], setting: str) -> list[dict[str, Any]]:
    """Of one setting, in order."""
    return sorted((row for key, row in rows.items() if key.startswith(f"{setting}/")), key=lambda row: row[setting])


def draw(rows: dict[str, dict[str, Any]], path: Path) -> None:
    """Six panels: speed against each setting, step time and memory against the images seen."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(11, 5.6), layout="constrained")
    for axis, (setting, name) in zip(axes.flat, NAMES.items(), strict=False):
        found = points(rows, setting)
        x = [row[setting] for row in found]
        middle, low, high = zip(*(row["images_per_second"] for row in found), strict=True)
        axis.plot(x, middle, marker="o")
        axis.fill_between(x, low, high, alpha=0.15, linewidth=0)
        axis.set(xscale="log", xlabel=name, ylabel="images/s", ylim=(0, None) if setting == "averages" else None)
        if setting != "averages":
            axis.set_yscale("log", base=2)
            axis.yaxis.set_major_formatter("{x:g}")
        axis.set_xticks(x, [str(v) for v in x])
        axis.minorticks_off()
    windows = rows["images"]["windows"]
    x = [w["images"] for w in windows]
    panels = (("step_ms", "step, ms (median)"), ("rss_mib", "resident, MiB"))
    for axis, (key, label) in zip(axes.flat[4:], panels, strict=True):
        values = [w[key] for w in windows]
        axis.plot(x, values, marker="o", color="C1")
        axis.set(xlabel="images seen", ylabel=label, ylim=(0, 1.6 * statistics.median(values)))
    figure.suptitle(f"{rows['images']['machine']}, {rows['images']['date']}", fontsize=9)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
