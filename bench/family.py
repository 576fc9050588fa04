"""Every objective and every lever from one teacher, on the same images, at the same cost in images: one table.

    python bench/fashion_net.py --data fashion_mnist_28x28_uint8.npz --out work/fashion16.safetensors
    python bench/family.py run --data fashion_mnist_28x28_uint8.npz --work work
    python bench/family.py table --work work

`run` pretrains the teacher if `work/teacher` does not exist, then trains every (entry, seed) that has no row in
`work/rows.jsonl` yet, each in a process of its own, and measures it. Several `run` may work on one folder at the same
time; an interrupted one is continued by starting it again. `--only ect,cd` restricts it, `--images 25600` is the
training length. The comparison itself is in bench/family_entries.py.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from family_entries import COMMON, ENTRIES, TEACHER, scaled
from family_table import print_tables
from fashion_net import open_fashion_net

from fewstep import load, open_source, pretrain, tune
from fewstep.checkpoint.model import KIND, rebuild
from fewstep.checkpoint.store import read_json, read_tensors
from fewstep.data import Source
from fewstep.denoiser import Denoiser
from fewstep.evaluation.evaluate import evaluate
from fewstep.evaluation.reference import Reference, open_reference
from fewstep.sampling import possible_steps
from fewstep.weights import load_weights

STEPS, TEACHER_NFE = (1, 2, 4, 8), (8, 35)


def main() -> None:
    arguments = parse()
    if arguments.command == "table":
        print_tables(arguments.work)
        return
    torch.set_num_threads(1)
    if arguments.one:
        row = run_one(arguments, arguments.one, arguments.seed)
        with (arguments.work / "rows.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        return
    make_teacher(arguments)
    for seed in range(arguments.seeds):
        for name in arguments.only.split(",") if arguments.only else ENTRIES:
            if claim(arguments.work, name, seed, arguments.images):
                start = time.perf_counter()
                code = subprocess.run(
                    [sys.executable, __file__, *sys.argv[1:], "--one", name, "--seed", str(seed)]
                ).returncode
                print(f"{name} seed {seed}: exit {code}, {time.perf_counter() - start:.0f} s", flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "table"))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--data")
    parser.add_argument("--images", type=int, default=25_600, help="training images of every entry")
    parser.add_argument("--samples", type=int, default=1_000, help="behind every number")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default="", help="names of entries, separated by commas")
    parser.add_argument("--one", default="", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


def make_teacher(arguments: argparse.Namespace) -> None:
    """Pretrain the teacher once, and measure it."""
    path = arguments.work / "teacher"
    if not path.is_dir():
        pretrain(arguments.data, out=path, recipe="demo-teacher", overrides=TEACHER)
    if claim(arguments.work, "teacher", 0, 0):
        _, reference = open_data(arguments)
        rows = measured(load(path), reference, TEACHER_NFE, arguments.samples, "ode")
        with (arguments.work / "rows.jsonl").open("a") as file:
            file.write(json.dumps({"entry": "teacher", "seed": 0, "images": 0, "rows": rows}) + "\n")


def claim(work: Path, name: str, seed: int, images: int) -> bool:
    """Take an entry that nobody has taken; claims of processes that died are taken over."""
    claims = work / "claims"
    claims.mkdir(parents=True, exist_ok=True)
    rows = work / "rows.jsonl"
    done = [json.loads(line) for line in rows.read_text().splitlines()] if rows.is_file() else []
    if any((r["entry"], r["seed"], r["images"]) == (name, seed, images) for r in done):
        return False
    path = claims / f"{name}-{seed}-{images}"
    if path.is_file() and Path(f"/proc/{path.read_text() or 0}").is_dir():
        return False
    path.write_text(str(os.getpid()))
    return True


def run_one(arguments: argparse.Namespace, name: str, seed: int) -> dict[str, Any]:
    """Train one entry (its phases one after the other) and measure it."""
    entry, run = ENTRIES[name], arguments.work / "runs" / f"{name}-{seed}-{arguments.images}"
    source, reference = open_data(arguments)
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on, without the reference's pass
    start, model, curve = time.perf_counter(), load(arguments.work / "teacher"), []
    for k, phase in enumerate(entry.phases):
        shutil.rmtree(run / f"phase-{k}", ignore_errors=True)  # what an interrupted attempt left
        settings = scaled(phase.overrides, round(phase.share * arguments.images), arguments.work)
        begin = {"student.start": str(run / f"phase-{k - 1}")} if k > 0 else {}
        done = tune(
            arguments.work / "teacher",
            source,
            out=run / f"phase-{k}",
            recipe="demo",
            objective=phase.objective,
            overrides=COMMON | settings | {"seed": seed} | begin,
        )
        model = done.model()
        curve += curve_of(done.path, reference, arguments) if entry.curve else []
    seconds = time.perf_counter() - start
    peak = peak_mib()
    steps = [n for n in STEPS if n in (possible_steps(model) or STEPS)]
    rows = measured(model, reference, steps, arguments.samples, "consistency")
    for weights in entry.weights:
        found = measured(done.model(weights=weights), reference, steps, arguments.samples, "consistency")
        rows += [row | {"weights": weights} for row in found]
    return {
        "entry": name,
        "seed": seed,
        "images": arguments.images,
        "seconds": seconds,
        "peak": peak,
        "rows": rows,
        "curve": curve,
    }


def open_data(arguments: argparse.Namespace) -> tuple[Source, Reference]:
    source = open_source(arguments.data, resize=16)
    return source, open_reference(source, open_fashion_net(arguments.work / "fashion16.safetensors"))


def measured(model: Denoiser, reference: Reference, steps: Any, samples: int, solver: str) -> list[dict[str, Any]]:
    """Fréchet distance, precision and recall with 95 % intervals; sample i always starts from the same noise."""
    result = evaluate(
        model,
        reference,
        steps=tuple(steps),
        solver=solver,
        samples=samples,
        seed=1000,
        metrics=("fd", "precision", "recall"),
    )
    keep = ("steps", "nfe", "metrics", "intervals", "samples_per_second")
    return [{key: row[key] for key in keep} for row in result["rows"]]


def curve_of(run: Path, reference: Reference, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One and two steps at every checkpoint of a run."""
    found = []
    for path in sorted((run / "checkpoints").glob("images-*"))[1:]:
        model = load_model_of(path)
        rows = measured(model, reference, (1, 2), arguments.samples, "consistency")
        found.append({"images": int(path.name.removeprefix("images-")), "rows": rows})
    return found


def peak_mib() -> float:
    """Peak resident memory of this process in MiB (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def load_model_of(checkpoint: Path) -> Denoiser:
    """The first average of one checkpoint."""
    model = rebuild(read_json(checkpoint / "model.json", KIND), str(checkpoint))
    load_weights(model.backbone, read_tensors(checkpoint / "ema-0.safetensors"), str(checkpoint))
    return model.eval()


if __name__ == "__main__":
    main()
