"""Whole network, LoRA of three ranks, or a frozen encoder: what each costs and keeps, from one diffusers DDPM.

    python bench/teachers/train_ddpm.py --data fashion_mnist_28x28_uint8.npz --out ddpm-fashion16
    python bench/fashion_net.py --data fashion_mnist_28x28_uint8.npz --out fashion16.safetensors
    python bench/adapters.py run --teacher ddpm-fashion16 --data fashion_mnist_28x28_uint8.npz --net fashion16.safetensors --work work
    python bench/adapters.py table --work work

Every row is a run of its own process: quality at 1, 2 and 4 steps, numbers trained, peak memory, and the drift
``E|f - D|^2 / E|D|^2`` from the teacher D at small t, where a consistency function still agrees with it (math.md 3.14).
`steps` times one step of each, in turns in one process. Finished rows are kept: run it again to continue.
"""  # noqa: E501

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from family import measured, peak_mib
from family_entries import COMMON, ECT, scaled
from fashion_net import open_fashion_net

from fewstep import Denoiser, load, open_reference, open_source, tune
from fewstep.process import EDM
from fewstep.runs import configure, make_trainer
from fewstep.training.student import make_student
from fewstep.world import World

DRIFT_AT = (0.03, 0.1, 0.3, 1.0)
TIMES = {"2": [157.0, 3.0], "4": [157.0, 10.0, 3.0, 1.0]}
"""Noise levels of the samplers, tried by hand on the whole network's run; the default, [157, 0.82], gave 162 at two."""
LORA = {"adapter.kind": "lora"}
ENTRIES: dict[str, dict[str, Any]] = {
    "full": {},
    "lora-4": LORA | {"adapter.rank": 4},
    "lora-16": LORA | {"adapter.rank": 16},
    "lora-64": LORA | {"adapter.rank": 64},
    "lora-16-lr3": LORA | {"adapter.rank": 16, "optim.lr": 3e-3},
    "frozen-encoder": {"student.freeze": ["*conv_in*", "*time_embedding*", "*down_blocks*"]},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "steps", "table"))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--teacher")
    parser.add_argument("--data")
    parser.add_argument("--net", type=Path)
    parser.add_argument("--images", type=int, default=25_600)
    parser.add_argument("--samples", type=int, default=1_000)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--only", default="", help="names of entries, separated by commas")
    parser.add_argument("--objective", default="ect")
    parser.add_argument("--one", default="", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    a = parser.parse_args()
    torch.set_num_threads(1)
    if a.command == "table":
        print_table(a.work)
    elif a.command == "steps":
        time_steps(a)
    elif a.one:
        keep(a.work, run_one(a, a.one, a.seed))
    else:
        run_all(a)


def run_all(a: argparse.Namespace) -> None:
    a.work.mkdir(parents=True, exist_ok=True)
    if not any(row["entry"] == "teacher" for row in rows_of(a.work)):
        _, reference = open_data(a)
        found = measured(load(a.teacher), reference, (4, 8, 35), a.samples, "ode")
        keep(a.work, {"entry": "teacher", "seed": 0, "rows": found})
    for seed in range(a.seeds):
        for name in a.only.split(",") if a.only else ENTRIES:
            entry = f"{name}/{a.objective}"
            if not any((r["entry"], r["seed"], r.get("images")) == (entry, seed, a.images) for r in rows_of(a.work)):
                subprocess.run([sys.executable, __file__, *sys.argv[1:], "--one", name, "--seed", str(seed)])


def settings_of(a: argparse.Namespace, name: str) -> dict[str, Any]:
    return COMMON | scaled(ECT, a.images, a.work) | {"student.sampler_times": TIMES} | ENTRIES[name]


def run_one(a: argparse.Namespace, name: str, seed: int) -> dict[str, Any]:
    source, reference = open_data(a)
    out = a.work / f"{name}-{a.objective}-{seed}"
    shutil.rmtree(out, ignore_errors=True)  # what an interrupted attempt left
    teacher = load(a.teacher)
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on, without the reference's pass
    start = time.perf_counter()
    run = tune(
        a.teacher, source, out=out, recipe="demo", objective=a.objective,
        overrides=settings_of(a, name) | {"seed": seed},
    )  # fmt: skip
    seconds, peak = time.perf_counter() - start, peak_mib()
    model = run.model()
    return {
        "entry": f"{name}/{a.objective}",
        "seed": seed,
        "images": a.images,
        "seconds": seconds,
        "peak": peak,
        "trained": trained_numbers(a, name, teacher),
        "rows": measured(model, reference, (1, 2, 4), a.samples, "consistency"),
        "drift": [drift(model, teacher, source, t) for t in DRIFT_AT],
    }


def trainer_of(a: argparse.Namespace, name: str) -> Any:
    source, _ = open_data(a)
    config = configure("tune", "demo", a.objective, settings_of(a, name), source)
    teacher = load(a.teacher)
    return make_trainer(config, make_student(teacher, config), source, World(0, 1, torch.device("cpu")), teacher)


def trained_numbers(a: argparse.Namespace, name: str, teacher: Denoiser) -> int:
    return sum(p.numel() for p in trainer_of(a, name).trained.parameters() if p.requires_grad)


@torch.no_grad()
def drift(model: Denoiser, teacher: Denoiser, source: Any, t: float) -> float:
    """``E|f - D|^2 / E|D|^2`` over 512 images noised to t."""
    x = source.read(torch.arange(512).numpy() * (len(source) // 512)).float() / 127.5 - 1
    x_t = x + t * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    ours, theirs = (each.under(EDM())(x_t, t) for each in (model, teacher))
    return float((ours - theirs).square().sum() / theirs.square().sum())


def time_steps(a: argparse.Namespace, turns: int = 5) -> None:
    """One step of each entry in turns; the medians, and their ratios to the whole network's."""
    trainers = {name: trainer_of(a, name).steps() for name in ENTRIES}
    for steps in trainers.values():
        next(steps)
    seconds: dict[str, list[float]] = {name: [] for name in ENTRIES}
    for _ in range(turns):
        for name, steps in trainers.items():
            start = time.perf_counter()
            next(steps)
            seconds[name].append(time.perf_counter() - start)
    found = {name: statistics.median(values) for name, values in seconds.items()}
    keep(a.work, {"entry": "steps", "seed": 0, "seconds": found})
    for name, value in found.items():
        spread = f"[{min(seconds[name]):.2f}, {max(seconds[name]):.2f}]"
        print(f"{name:16s} {value:.2f} s a step {spread}, {value / found['full']:.2f} of the whole network's")


def open_data(a: argparse.Namespace) -> tuple[Any, Any]:
    source = open_source(a.data, resize=16)
    return source, open_reference(source, open_fashion_net(a.net))


def rows_of(work: Path) -> list[dict[str, Any]]:
    path = work / "adapters.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def keep(work: Path, row: dict[str, Any]) -> None:
    with (work / "adapters.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


def print_table(work: Path) -> None:
    rows = rows_of(work)
    times = next((r["seconds"] for r in reversed(rows) if r["entry"] == "steps"), {})
    heads = ["trained", "1 step", "2 steps", "4 steps", "peak MiB", "step", *(f"drift at t = {t}" for t in DRIFT_AT)]
    print("| entry | seeds | " + " | ".join(heads) + " |\n" + "|---" * (len(heads) + 2) + "|")
    tuned = [r for r in rows if "drift" in r]
    for entry in dict.fromkeys(r["entry"] for r in tuned):
        mine = [r for r in tuned if r["entry"] == entry]
        quality = [mean(mine, lambda r, k=k: fd(r["rows"][k])) for k in range(3)]
        drifts = [f"{statistics.mean(r['drift'][k] for r in mine):.1e}" for k in range(len(DRIFT_AT))]
        step = times.get(entry.partition("/")[0])
        cells = [f"{mine[0]['trained']:,}", *quality, f"{max(r['peak'] for r in mine):.0f}"]
        cells += [f"{step / times['full']:.2f}" if step else "-", *drifts]
        print(f"| {entry} | {len(mine)} | " + " | ".join(cells) + " |")
    teacher = next((r for r in rows if r["entry"] == "teacher"), None)
    if teacher is not None:
        print("\nTeacher: " + ", ".join(f"{fd(r):.1f} at {r['nfe']} NFE" for r in teacher["rows"]))


def fd(row: dict[str, Any]) -> float:
    return next(value for name, value in row["metrics"].items() if name.startswith("FD-"))


def mean(rows: list[dict[str, Any]], of: Any) -> str:
    values = [of(row) for row in rows]
    spread = f" [{min(values):.1f}, {max(values):.1f}]" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


if __name__ == "__main__":
    main()
