"""Does class agreement rise with the strength of guidance? Digits 8x8, a student told w against the other ways.

A logistic regression, fitted to all digits, says how many samples are of the class that was asked for. Compared: the
teacher's guided ODE (10 Heun nodes, 38 evaluations), guided ECT and ECD, tuned once for w in [1, 3] and told w
(one evaluation per step), and a student tuned without guidance under the sampling-time heuristic (two per step).

    python bench/guidance.py --out DIR --images 20000 --seeds 0,1

Needs scikit-learn. A teacher that is in DIR already is used again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from fewstep import Denoiser, load, ode_sample, open_source, pretrain, sample, tune
from fewstep.data import decode, encode
from fewstep.guidance import evaluations

STRENGTHS = (1.0, 1.5, 2.0, 3.0)
SAMPLES = 500
TEACHER = {
    "model.backbone": "unet", "model.conditional": True, "data.label_drop": 0.15, "batch_size": 128,
    "model.kwargs": {"channels": 24, "multipliers": [1, 2], "blocks": 1, "attention": [4]},
    "optim.name": "adam", "optim.lr": 2e-3, "optim.schedule": "cosine", "optim.decay_share": 0.6,
    "emas": [{"kind": "constant", "beta": 0.99}], "eval.samples": 0,
}  # fmt: skip
TUNE = {
    "batch_size": 64, "optim.name": "adam", "optim.lr": 5e-4, "optim.decay_share": 0.4, "eval.samples": 0,
    "emas": [{"kind": "constant", "beta": 0.98}], "output.sample_images": 0,
}  # fmt: skip
RANGE = {"objective.bridge.guidance": 1.0, "objective.bridge.guidance_max": 3.0}
WAYS: dict[str, tuple[str, dict[str, object]]] = {
    "guided ect": ("ect", {"objective.bridge.kind": "guided"} | RANGE),
    "guided ecd": ("ecd", RANGE),
    "heuristic": ("ect", {"data.label_drop": 0.15}),
}


def main() -> None:
    """Train what is missing, measure, print a table and write DIR/guidance.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--teacher-images", type=int, default=60_000)
    parser.add_argument("--images", type=int, default=20_000, help="of each tuning run")
    parser.add_argument("--seeds", default="0,1")
    given = parser.parse_args()
    seeds = [int(seed) for seed in given.seeds.split(",")]
    if not (given.out / "teacher" / "model").is_dir():
        pretrain("digits", out=given.out / "teacher", overrides=TEACHER | {"images": given.teacher_images})
    teacher = load(given.out / "teacher")
    judge = fit_judge(teacher)
    found = [row("teacher ode", seed, judge, teacher, partial(ode_sample, steps=10), 19) for seed in seeds]
    for way, (objective, settings) in WAYS.items():
        for seed in seeds:
            run = given.out / f"{way.replace(' ', '-')}-{seed}"
            if not (run / "model").is_dir():
                schedule = {"kind": "stages", "q": 2.0, "images": given.images // 4, "first": 1, "last": 3}
                settings = settings | {"objective.schedule": schedule, "images": given.images, "seed": seed}
                tune(given.out / "teacher", "digits", out=run, recipe="fast", objective=objective,
                     overrides=TUNE | settings)  # fmt: skip
            for steps in (1, 2):
                found.append(row(way, seed, judge, load(run), few(steps), steps))
    (given.out / "guidance.json").write_text(json.dumps(found, indent=1) + "\n")
    show(found)


def fit_judge(model: Denoiser) -> Callable[[Tensor], Tensor]:
    """Classes of samples in model space, by a logistic regression on the pixels of all digits."""
    source = open_source("digits")
    pixels = source.read(torch.arange(len(source)).numpy())
    clean = encode(pixels, model.value_range, torch.float32).flatten(1)
    judge = LogisticRegression(max_iter=2000).fit(clean, source.labels)
    print(f"the judge knows {judge.score(clean, source.labels):.1%} of the digits it was fitted to")

    def classes(x: Tensor) -> Tensor:
        seen = encode(decode(x, model.value_range), model.value_range, torch.float32)
        return torch.from_numpy(judge.predict(seen.flatten(1)))

    return classes


Draw = Callable[..., Tensor]


def few(steps: int) -> Draw:
    """The few-step sampler at so many steps."""
    return lambda model, **given: sample(model, steps=steps, **given)


def row(
    way: str, seed: int, judge: Callable[[Tensor], Tensor], model: Denoiser, draw: Draw, nfe: int
) -> dict[str, object]:
    """Class agreement and the mean distance between samples of one class, for every strength."""
    labels = torch.arange(SAMPLES) % 10
    agreement, spread, start = {}, {}, time.perf_counter()
    for w in STRENGTHS:
        x = draw(model, n=SAMPLES, seed=100 + seed, cond=labels, guidance=w)
        agreement[w] = float((judge(x) == labels).double().mean())
        spread[w] = float(torch.stack([torch.pdist(x[labels == k].flatten(1)).mean() for k in range(10)]).mean())
    return {
        "way": way, "seed": seed, "nfe": nfe * evaluations(model, 2.0), "agreement": agreement, "spread": spread,
        "seconds": time.perf_counter() - start,
    }  # fmt: skip


def show(found: list[dict[str, object]]) -> None:
    """One line per way and number of evaluations: means over the seeds, agreement in %, spread in brackets."""
    print("way".ljust(14), "NFE".rjust(4), *(f"w={w:g}".rjust(14) for w in STRENGTHS))
    for way, nfe in dict.fromkeys((entry["way"], entry["nfe"]) for entry in found):
        some = [entry for entry in found if (entry["way"], entry["nfe"]) == (way, nfe)]
        cells = []
        for w in STRENGTHS:
            share, spread = (sum(entry[key][w] for entry in some) / len(some) for key in ("agreement", "spread"))  # type: ignore[index]
            cells.append(f"{share:.1%} ({spread:.2f})".rjust(14))
        print(str(way).ljust(14), str(nfe).rjust(4), *cells)


if __name__ == "__main__":
    main()
