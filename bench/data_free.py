"""Tuning without the training data: real images, the teacher's own samples from shards, or samples made on the fly.

    python bench/data_free.py run --teacher work/teacher --data fashion_mnist_28x28_uint8.npz \
        --net work/fashion16.safetensors --work work/data-free
    python bench/data_free.py table --work work/data-free

Every row is the same number of training images from the same teacher, measured against the real images
(FD-FashionNet16, bench/fashion_net.py). A row that is in `rows.jsonl` is not run again, and shards that were begun are
continued, so an interrupted `run` is started again. `--sets 2000,10000` are the sizes of the shard sets.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from family_entries import COMMON, ECT, scaled
from fashion_net import SIDE, open_fashion_net

from fewstep import load, open_source, tune
from fewstep.evaluation.evaluate import evaluate
from fewstep.evaluation.reference import Reference, open_reference
from fewstep.training.synthetic import generate

STEPS = (1, 2, 4)
METRICS = ("fd", "precision", "recall")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "table"))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--teacher", type=Path)
    parser.add_argument("--data", help="the real images")
    parser.add_argument("--net", type=Path, help="written by bench/fashion_net.py")
    parser.add_argument("--images", type=int, default=64_000, help="training images of every row")
    parser.add_argument("--sets", default="2000,10000", help="sizes of the shard sets")
    parser.add_argument("--nfe", type=int, default=35, help="evaluations behind every sample of the teacher")
    parser.add_argument("--samples", type=int, default=10_000, help="behind every number")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    if arguments.command == "run":
        run(arguments)
    print(table(arguments.work))


def run(arguments: argparse.Namespace) -> None:
    """All rows that are not there yet."""
    if arguments.device == "cpu":
        torch.set_num_threads(1)
    arguments.work.mkdir(parents=True, exist_ok=True)
    source = open_source(arguments.data, resize=SIDE)
    reference = open_reference(source, open_fashion_net(arguments.net), device=arguments.device)
    sets = sorted(int(size) for size in arguments.sets.split(",") if size)
    for seed in range(arguments.seeds):
        if seed == 0:
            keep(arguments, "teacher, 35 evaluations", 0, lambda: measured_teacher(arguments, reference))
        for objective in ("ect", "ecd"):
            name = f"{objective}, {len(source):,} real images"
            keep(arguments, name, seed, lambda o=objective, s=seed: row(arguments, reference, o, source, s))
        for size in sets:
            name = f"ecd, {size:,} samples of the teacher"
            keep(arguments, name, seed, lambda n=size, s=seed: row(arguments, reference, "ecd", n, s))
        name, data = "ecd, samples made on the fly", f"teacher:{arguments.nfe}"
        keep(arguments, name, seed, lambda d=data, s=seed: row(arguments, reference, "ecd", d, s))


def keep(arguments: argparse.Namespace, name: str, seed: int, make: Any) -> None:
    """Append a row unless it is there."""
    found = [(r["row"], r["seed"], r["images"]) for r in kept(arguments.work)]
    if (name, seed, arguments.images) in found:
        return
    start = time.perf_counter()
    made = {"row": name, "seed": seed, "images": arguments.images} | make()
    with (arguments.work / "rows.jsonl").open("a") as file:
        file.write(json.dumps(made) + "\n")
    print(f"{name}, seed {seed}: {time.perf_counter() - start:.0f} s", flush=True)


def kept(work: Path) -> list[dict[str, Any]]:
    path = work / "rows.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def row(arguments: argparse.Namespace, reference: Reference, objective: str, data: Any, seed: int) -> dict[str, Any]:
    """Tune on ``data`` (a source, its spec, or the size of a shard set) and measure against the real images."""
    start, made = time.perf_counter(), 0.0
    if isinstance(data, int):
        folder = arguments.work / f"samples-{data}"
        generate(load(arguments.teacher, device=arguments.device), folder, data, nfe=arguments.nfe)
        made, data = time.perf_counter() - start, str(folder)
    out = arguments.work / "run"
    shutil.rmtree(out, ignore_errors=True)  # what an earlier row or an interrupted attempt left
    settings = COMMON | scaled(ECT, arguments.images, arguments.work) | {"seed": seed}
    begun = time.perf_counter()
    done = tune(
        arguments.teacher, data, out=out, recipe="demo", objective=objective, overrides=settings,
        device=arguments.device,
    )  # fmt: skip
    seconds = time.perf_counter() - begun
    found = evaluate(
        done.model().to(arguments.device), reference, steps=STEPS, samples=arguments.samples, seed=1000, metrics=METRICS
    )
    return {"generate_seconds": made, "seconds": seconds, "rows": found["rows"]}


def measured_teacher(arguments: argparse.Namespace, reference: Reference) -> dict[str, Any]:
    model = load(arguments.teacher, device=arguments.device)
    found = evaluate(model, reference, steps=(35,), solver="ode", samples=arguments.samples, seed=1000, metrics=METRICS)
    return {"generate_seconds": 0.0, "seconds": 0.0, "rows": found["rows"]}


def table(work: Path) -> str:
    """Markdown: FD with its 95 % interval, then precision and recall at the most steps, then seconds."""
    lines = [
        "| data | seed | images | FD, 1 step | 2 steps | 4 steps | precision, recall (4) | generating, s | tuning, s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in kept(work):
        cells = {one["steps"]: fd_of(one) for one in r["rows"]}
        if list(cells) == [35]:
            fds = [f"{cells[35]} (35)", "", ""]
        else:
            fds = [cells.get(steps, "") for steps in STEPS]
        last = {name.split("-")[0]: value for name, value in r["rows"][-1]["metrics"].items()}
        quality = f"{last['Precision']:.3f}, {last['Recall']:.3f}"
        seconds = [f"{r[key]:.0f}" if r[key] else "" for key in ("generate_seconds", "seconds")]
        cells_of_row = [r["row"], str(r["seed"]), f"{r['images']:,}", *fds, quality, *seconds]
        lines.append(f"| {' | '.join(cells_of_row)} |")
    return "\n".join(lines)


def fd_of(measured: dict[str, Any]) -> str:
    name = next(name for name in measured["metrics"] if name.startswith("FD"))
    value, (low, high) = measured["metrics"][name], measured["intervals"][name]
    return f"{value:.2f} ± {(high - low) / 2:.2f}"


if __name__ == "__main__":
    main()
