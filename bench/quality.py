"""Time to quality on real data: our recommended recipe and step against the published ones, from the same teacher.

    python bench/fashion_net.py --data fashion_mnist_28x28_uint8.npz --out work/fashion16.safetensors
    python bench/family.py run --data fashion_mnist_28x28_uint8.npz --work work --only teacher   # makes work/teacher
    OMP_NUM_THREADS=1 python bench/quality.py run --data fashion_mnist_28x28_uint8.npz --work work --out quality
    python bench/quality.py table --out quality --figure docs/time-to-quality.png
    python bench/quality.py run --smoke ...                                                      # does it run?

Every (recipe, seed) trains in segments; after each its average is measured (FD-FashionNet16-1k at 1 and 2 steps, as in
docs/family.md), a row is added to quality/rows.jsonl, and the state is saved: started again, it goes on from there.
Wall and processor seconds are those of the training steps alone. The recipes are in RECIPES below.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from family_entries import COMMON, ECT, ENTRIES, scaled
from fashion_net import open_fashion_net
from quality_table import draw, print_tables
from step import Published, Recipe
from step_parts import machine
from torch import nn

from fewstep import load, open_source
from fewstep.data import Source
from fewstep.denoiser import Denoiser
from fewstep.evaluation.evaluate import evaluate
from fewstep.evaluation.reference import Reference, open_reference
from fewstep.runs import configure, make_trainer
from fewstep.training.state import restore_state, save_state
from fewstep.training.student import make_student
from fewstep.world import World


@dataclass(frozen=True)
class Theirs:
    """A recipe for the published step; ``stages`` of equal length, 0 for one q^a from the start."""

    recipe: Recipe
    dropout: float = 0.0
    stages: int = 0


@dataclass(frozen=True)
class Ours:
    """A recipe for our trainer: an objective's name and its settings over bench/family_entries.py's COMMON."""

    objective: str
    settings: dict[str, Any]


SMALL = {"lr": 1e-3, "beta": 0.99}
"""What docs/family.md found for this network in 400 steps: ten times the learning rate, a shorter average.

At q = 256 it is the best, too: FD at 1 and 2 steps after 9,600 images, batch 64, seed 7: 5e-4 516, 402; 1e-3 381, 388;
2e-3 603, 519.
"""

RECIPES: dict[str, Theirs | Ours] = {
    "published": Theirs(Recipe(last=0), dropout=0.2),
    "published, tuned": Theirs(Recipe(batch=64, last=0, **SMALL)),
    "published, stages": Theirs(Recipe(batch=64, q=2.0, first=1, last=3, **SMALL), stages=3),
    "ours": Ours("sequence", ENTRIES["mid"].phases[0].overrides),
    "ours, stages": Ours("ect", ECT),
}
"""published: the one-hour recipe as it is (RAdam 1e-4, batch 128, q = 256 from the start, dropout .2, average .9993).
published, tuned: batch, learning rate, average and dropout as they suit this small network and short run.
published, stages: their step with the best schedule that docs/family.md has for plain ECT (q^a = 4, 8, 16), batch 64.
ours: the default recipe (`mid`: mid-training, then ECT), our step. ours, stages: the same as theirs, with our step."""

POINTS = (1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1)
"""Shares of a run after which it is measured."""


class Runner:
    """One (recipe, seed) with its state on disk."""

    def __init__(self, arguments: argparse.Namespace, name: str, seed: int, source: Source) -> None:
        self.name, self.seed, self.folder = name, seed, arguments.out / f"{name.replace(', ', '-')}-{seed}"
        self.recipe, self._device = RECIPES[name], torch.device(arguments.device)
        teacher = load(arguments.work / "teacher").to(self._device)
        self.step: Callable[[], Any]
        if isinstance(self.recipe, Theirs):
            self._published(self.recipe, teacher, source, arguments.images)
        else:
            self._ours(arguments, self.recipe, teacher, source)

    def _published(self, recipe: Theirs, teacher: Denoiser, source: Source, images: int) -> None:
        for layer in teacher.modules():
            if isinstance(layer, nn.Dropout):
                layer.p = recipe.dropout
        data = source.read(np.arange(len(source)))
        length = max(images // recipe.stages, 1) if recipe.stages else recipe.recipe.stage_images
        self.of: Any = Published(teacher, data, replace(recipe.recipe, stage_images=length), self.seed)
        self.step, self.batch = self.of.step, recipe.recipe.batch

    def _ours(self, arguments: argparse.Namespace, recipe: Ours, teacher: Denoiser, source: Source) -> None:
        settings = COMMON | scaled(recipe.settings, arguments.images, arguments.work) | {"seed": self.seed}
        settings |= {"precision": arguments.precision, "speed.compile": arguments.compile}
        config = configure("tune", "demo", recipe.objective, settings, source)
        self.of = make_trainer(config, make_student(teacher, config), source, World(0, 1, self._device), teacher)
        steps = self.of.steps()
        self.step, self.batch = lambda: next(steps), config.batch_size

    @property
    def model(self) -> Denoiser:
        """The average, which is what comes out."""
        return self.of.average_model if isinstance(self.recipe, Theirs) else self.of.averages[0]

    def until(self, images: int) -> tuple[float, float]:
        """Train until so many images have been seen; wall and processor seconds."""
        start, busy = time.perf_counter(), time.process_time()
        while self.of.images_seen < images:
            self.step()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter() - start, time.process_time() - busy

    def save(self) -> None:
        """So that it can go on from here."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if isinstance(self.recipe, Theirs):
            torch.save(self.of.state(), self.folder / "state.part")
            (self.folder / "state.part").replace(self.folder / "state.pt")
        else:
            save_state(self.of, self.folder)

    def restore(self) -> None:
        """Go on from the last state."""
        if isinstance(self.recipe, Theirs):
            self.of.restore(torch.load(self.folder / "state.pt", weights_only=True))
        else:
            restore_state(self.of, self.folder)


def run(arguments: argparse.Namespace) -> None:
    """Every recipe and seed, from where it was left."""
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    source = open_source(arguments.data, resize=16, labels=False)
    reference = open_reference(source, open_fashion_net(arguments.work / "fashion16.safetensors"))
    (arguments.out / "machine.json").write_text(json.dumps(machine(torch.device(arguments.device))))
    for seed in range(arguments.seeds):
        for name in arguments.only or RECIPES:
            train(arguments, name, seed, source, reference)


def train(arguments: argparse.Namespace, name: str, seed: int, source: Source, reference: Reference) -> None:
    """One recipe and seed: the segments that are left, a row after each."""
    before = read_rows(arguments.out)
    rows = [r for r in before if (r["recipe"], r["seed"]) == (name, seed)]
    runner = Runner(arguments, name, seed, source)
    if not rows:  # the teacher itself, at no cost
        known = next(({k: r[k] for k in ("1", "2")} for r in before if r["images"] == 0), None)
        rows = [{"recipe": name, "seed": seed, "images": 0, "wall": 0.0, "cpu": 0.0}]
        rows[0] |= known or measured(runner.model, reference, arguments.samples)
        add_row(arguments.out, rows[0])
    targets = sorted({-(-round(arguments.images * p) // runner.batch) * runner.batch for p in POINTS})
    done = rows[-1]
    if done["images"] >= targets[-1]:
        return
    if done["images"] > 0:
        runner.restore()
        if runner.of.images_seen != done["images"]:
            raise SystemExit(f"The state in {runner.folder} is not that of its last row: delete both to begin again")
    wall, cpu = done["wall"], done["cpu"]
    for images in targets:
        if images > runner.of.images_seen:
            seconds, busy = runner.until(images)
            wall, cpu = wall + seconds, cpu + busy
            quality = measured(runner.model, reference, arguments.samples)
            runner.save()
            row = {"recipe": name, "seed": seed, "images": images, "wall": wall, "cpu": cpu, **quality}
            add_row(arguments.out, row)


def measured(model: Denoiser, reference: Reference, samples: int) -> dict[str, float]:
    """``{"1": FD, "2": FD}`` at one and two steps; torch's generators are left as they were."""
    with torch.random.fork_rng():
        found = evaluate(
            model.eval(), reference, steps=(1, 2), samples=samples, seed=1000, metrics=("fd",), replicates=0
        )
    return {str(row["steps"]): next(iter(row["metrics"].values())) for row in found["rows"]}


def add_row(out: Path, row: dict[str, Any]) -> None:
    with (out / "rows.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row), flush=True)


def read_rows(out: Path) -> list[dict[str, Any]]:
    path = out / "rows.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "table"))
    parser.add_argument("--data", help="Fashion-MNIST as an npz")
    parser.add_argument("--work", type=Path, help="with teacher/ and fashion16.safetensors, made by bench/family.py")
    parser.add_argument("--out", type=Path, required=True, help="folder of rows.jsonl and of the states")
    parser.add_argument("--images", type=int, default=25_600, help="of every run")
    parser.add_argument("--samples", type=int, default=1_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", type=lambda text: text.split(";"), help="recipes, separated by semicolons")
    parser.add_argument("--precision", default="auto", help="of ours")
    parser.add_argument("--compile", default="off", choices=("on", "off"), help="of ours; compiling counts")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.images, arguments.samples, arguments.seeds = 1_024, 32, 1
    return arguments


def main() -> None:
    arguments = parse()
    if arguments.command == "run":
        run(arguments)
    about = json.loads((arguments.out / "machine.json").read_text())
    print_tables(read_rows(arguments.out), about)
    if arguments.figure:
        draw(read_rows(arguments.out), about, arguments.figure)


if __name__ == "__main__":
    main()
