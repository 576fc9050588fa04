"""Which arithmetic resolves the gap between student and target: gradients against float64, stage by stage.

    net="--name fashion16 --teacher work/teacher --data fashion_mnist.npz --resize 16 --work precision-work"
    python bench/precision.py train $net
    python bench/precision.py gradients $net --rows docs/precision-rows.jsonl
    python bench/precision.py curves $net --rows docs/precision-rows.jsonl
    python bench/precision_plot.py --rows docs/precision-rows.jsonl --out docs/precision.png

`train` tunes the teacher with the CIFAR-10 recipe's objective (ECT, q = 2, unit-norm distance, weight 1/(t - r),
dropout 0.2) and keeps the weights at the end of every stage. `gradients` computes, with these weights, the gradient of
the same batches in float64 and in every arithmetic (`--kinds`). `curves` trains through all stages once per arithmetic,
same seed. TF32, fp16 and bf16 are emulated as a GPU computes them (bench/emulate.py); "bf16-cpu" is the CPU's autocast.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from precision_step import MODES, RECIPE, STAGES, Training, computing, parameters, passes
from torch import Tensor, nn

from fewstep import EDM, Denoiser, load, open_source
from fewstep.checkpoint.store import read_tensors, write_tensors
from fewstep.data import Source
from fewstep.objectives import ECT, StepRandom
from fewstep.objectives.pairs import draw_times
from fewstep.penalty import Penalty
from fewstep.process import expand
from fewstep.randomness import DropoutTape, Streams
from fewstep.runs import demo_teacher
from fewstep.training.config import DataConfig
from fewstep.training.feed import Feed
from fewstep.weights import load_weights

KINDS = ("fp32", "tf32", "fp16", "fp16+edges", "bf16", "bf16+edges", "bf16-cpu", "bf16-cpu+edges")
DROPOUT = 0.2
FRESH = 50_000_000
"""Position in the data order from where gradients are measured: far behind those trained on."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("train", "gradients", "curves"))
    parser.add_argument("--name", required=True, help="of the network, in the rows")
    parser.add_argument("--teacher", type=Path, help="a model or run; without it the digits model of the package")
    parser.add_argument("--data", default="digits")
    parser.add_argument("--resize", type=int)
    parser.add_argument("--work", type=Path, default=Path("precision-work"), help="the weights of the stages")
    parser.add_argument("--rows", type=Path, default=Path("precision-rows.jsonl"))
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--stage-images", type=int, default=5_120, help="train: per stage")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--batches", type=int, default=6, help="gradients: how many")
    parser.add_argument("--q", type=float, default=2.0, help="gradients: 256 starts from the teacher")
    parser.add_argument("--stages", default="", help="gradients: only these, separated by commas")
    parser.add_argument("--c", type=float, default=0.0, help="gradients: constant of a pseudo-Huber distance")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--steps", type=int, default=1_000, help="curves: over all stages")
    parser.add_argument("--at-once", type=int, help="curves: stop after so many steps; the next call goes on")
    parser.add_argument("--modes", default=";".join(MODES), help="curves: which, separated by semicolons")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    torch.set_num_threads(1)
    job = {"train": train_stages, "gradients": measure_stages, "curves": measure_curves}[arguments.command]
    for row in job(arguments):
        print(json.dumps(row), flush=True)
        with arguments.rows.open("a") as file:
            file.write(json.dumps(row) + "\n")


def open_student(arguments: argparse.Namespace) -> Denoiser:
    """The teacher as a student: training mode, the recipe's dropout."""
    student = load(arguments.teacher or demo_teacher()).under(EDM()).train()
    for layer in student.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = DROPOUT
    return student


def open_data(arguments: argparse.Namespace) -> Source:
    return open_source(arguments.data, resize=arguments.resize)


# ------------------------------------------------------------------------------------------------ training
def train_stages(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Weights at the end of every stage, in ``work/NAME/stage-K.safetensors``."""
    folder = arguments.work / arguments.name
    folder.mkdir(parents=True, exist_ok=True)
    schedule = replace(RECIPE.schedule, images=arguments.stage_images)
    total, student = arguments.stage_images * len(STAGES), open_student(arguments)
    training = Training(
        student, open_data(arguments), replace(RECIPE, schedule=schedule), total, arguments.batch, arguments.lr
    )
    start, losses = time.perf_counter(), []
    for seen, loss in training.steps():
        losses.append(loss)
        if seen % arguments.stage_images == 0:
            stage = seen // arguments.stage_images - 1
            write_tensors(folder / f"stage-{stage}.safetensors", student.backbone.state_dict())
            mean = sum(losses) / len(losses)
            yield {"part": "train", "net": arguments.name, "stage": stage, "images": seen, "loss": mean,
                   "lr": arguments.lr, "seconds": time.perf_counter() - start}  # fmt: skip
            losses.clear()


# ------------------------------------------------------------------------------------------------ gradients
@dataclass(frozen=True)
class Gaps(Penalty):
    """The penalty, which also keeps what it was given."""

    seen: list[Tensor] = field(default_factory=list)

    def __call__(self, delta: Tensor, t: Tensor, gap: Tensor, sigma_data: float = 0.5) -> Tensor:
        self.seen.append(delta.detach().double())
        return super().__call__(delta, t, gap, sigma_data)


@dataclass(frozen=True)
class Rows:
    """One batch: images, labels, noise (fp32 for every arithmetic), times (float64, on the host), and their indices."""

    x: Tensor
    cond: Tensor | None
    eps: Tensor
    t: Tensor
    index: Tensor


@dataclass(frozen=True)
class Found:
    """``gradient [n]`` of the batch's mean, ``loss [b]``, ``delta [b, d]`` = f(x_t) - f(x_r); all float64."""

    gradient: Tensor
    loss: Tensor
    delta: Tensor


def batches(student: Denoiser, source: Source, law: Any, count: int, size: int) -> Iterator[Rows]:
    feed, streams = Feed(source, student, DataConfig(), 0), Streams(1)
    for k in range(count):
        rows = range(FRESH + k * size, FRESH + (k + 1) * size)
        batch, index = feed.batch(rows), torch.arange(rows.start, rows.stop)
        random = StepRandom(streams, index, torch.device("cpu"))
        yield Rows(batch.x, batch.cond, random.normal("noise", batch.x), draw_times(law, student, random), index)
    feed.close()


def gradient(student: Denoiser, objective: ECT, rows: Rows, ratio: float, kind: str, scale: float = 1.0) -> Found:
    """The gradient of the mean loss, the losses and the gaps, as ``kind`` computes them."""
    dtype = torch.float64 if kind == "fp64" else torch.float32
    x, eps, cond = (None if v is None else v.to(dtype) for v in (rows.x, rows.eps, rows.cond))
    penalty = Gaps(objective.penalty.distance, objective.penalty.weight, objective.penalty.c)
    student.zero_grad(set_to_none=True)
    with computing(kind):
        tape = DropoutTape(Streams(1), rows.index)
        with passes(kind, student):
            loss = replace(objective, penalty=penalty).loss_at(student, x, rows.t, eps, ratio, cond, tape)
        (loss.mean() * scale).backward()
    parts = [p.grad.double().flatten() / scale for p in parameters(student) if p.grad is not None]
    return Found(torch.cat(parts), loss.detach().double(), penalty.seen[0].flatten(1))


def largest_scale(student: Denoiser, objective: ECT, rows: Rows, ratio: float, kind: str) -> float:
    """The largest power of 4 that does not overflow fp16: where a scaler settles, within a factor 4."""
    scale = 4.0**9
    while not gradient(student, objective, rows, ratio, kind, scale).gradient.isfinite().all():
        scale /= 4
    return scale


def measure_stages(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row per stage and arithmetic."""
    student, source = open_student(arguments), open_data(arguments)
    penalty = RECIPE.penalty if arguments.c == 0 else Penalty("pseudo_huber", "dt", c=arguments.c)
    last = round(8 / math.log2(arguments.q)) - 1
    chosen = [int(s) for s in arguments.stages.split(",") if s] or range(last + 1)
    objective = replace(RECIPE, penalty=penalty)
    common = {"part": "gradient", "net": arguments.name, "parameters": sum(p.numel() for p in parameters(student)),
              "q": arguments.q, "c": arguments.c, "batch": arguments.batch, "batches": arguments.batches}  # fmt: skip
    for stage in chosen:
        ratio = arguments.q ** (stage + 1)
        if arguments.q < 256:  # weights that were trained on pairs as tight as these
            trained = arguments.work / arguments.name / f"stage-{round(math.log2(ratio)) - 1}.safetensors"
            load_weights(student.backbone, read_tensors(trained), str(trained))
        yield from measure(student, source, objective, ratio, arguments, common | {"stage": stage, "ratio": ratio})


def measure(
    student: Denoiser,
    source: Source,
    objective: ECT,
    ratio: float,
    arguments: argparse.Namespace,
    common: dict[str, Any],
) -> Iterator[dict[str, Any]]:
    """Every arithmetic on the same batches with the same weights."""
    exact = copy.deepcopy(student).double()
    data = list(batches(student, source, objective.law, arguments.batches, arguments.batch))
    truth = [gradient(exact, objective, rows, ratio, "fp64") for rows in data]
    mean = torch.stack([f.gradient for f in truth]).mean(0)
    spread = math.sqrt(sum(float((f.gradient - mean).square().sum()) for f in truth) / (len(truth) - 1))
    common |= {"norm": common_norm([f.gradient for f in truth]), "spread": spread}
    for kind in [k for k in arguments.kinds.split(",") if k]:
        scale = largest_scale(student, objective, data[0], ratio, kind) / 4 if "fp16" in kind else 1.0
        found = [gradient(student, objective, rows, ratio, kind, scale) for rows in data]
        row = common | {"kind": kind, "scale": scale} | compare(found, truth, spread)
        row |= predict(student, exact, data[0], truth[0], ratio, kind)
        if kind == "fp16":
            plain = [gradient(student, objective, rows, ratio, kind) for rows in data[:2]]
            row["error_unscaled"] = compare(plain, truth[:2], spread)["error"]
        yield row


def compare(found: list[Found], truth: list[Found], spread: float) -> dict[str, float]:
    """Relative error and cosine of one batch's gradient, its error in units of the spread from batch to batch, the part
    of the error that batches share, and the median errors of a sample's loss and of its gap."""
    errors = [a.gradient - b.gradient for a, b in zip(found, truth, strict=True)]
    size = math.sqrt(sum(float(e.square().sum()) for e in errors) / len(errors))
    norm = math.sqrt(sum(float(b.gradient.square().sum()) for b in truth) / len(truth))
    angles = [float(torch.nn.functional.cosine_similarity(a.gradient, b.gradient, dim=0))
              for a, b in zip(found, truth, strict=True)]  # fmt: skip
    losses = torch.cat([(a.loss - b.loss).abs() / b.loss for a, b in zip(found, truth, strict=True)])
    gaps = torch.cat([(a.delta - b.delta).norm(dim=1) / b.delta.norm(dim=1) for a, b in zip(found, truth, strict=True)])
    return {"error": size / norm, "cosine": sum(angles) / len(angles), "error_to_spread": size / spread,
            "bias_to_spread": common_norm(errors) / spread,
            "loss_error": float(losses.median()), "gap_error": float(gaps.median())}  # fmt: skip


def common_norm(vectors: list[Tensor]) -> float:
    """``|E v|`` without the bias of ``|mean v|``: from the products of different vectors; 0 if they average out."""
    count, total = len(vectors), torch.stack(vectors).sum(0)
    square = float(total.square().sum()) - sum(float(v.square().sum()) for v in vectors)
    return math.sqrt(max(square, 0.0) / (count * (count - 1)))


@torch.no_grad()
def predict(student: Denoiser, exact: Denoiser, rows: Rows, truth: Found, ratio: float, kind: str) -> dict[str, float]:
    """The theory: ``gap error = sqrt(2) eta |c_out F| / |delta|`` with eta the relative error of the network's output.

    ``c_out F = f(x_t) - c_skip x_t``; medians over the rows with r > 0, of the first batch.
    """
    x_t = rows.x.double() + expand(rows.t, rows.x) * rows.eps.double()
    skip, _ = exact.parametrization.skip_and_out(torch.ones_like(rows.t), rows.t, evaluating=False)
    tape = DropoutTape(Streams(1), rows.index)
    cond = None if rows.cond is None else rows.cond.double()
    with tape.record():
        true = exact(x_t, rows.t, cond)
    with computing(kind), passes(kind, student), DropoutTape(Streams(1), rows.index).record():
        mine = student(x_t.float(), rows.t.float(), rows.cond)
    network = (true - expand(skip, x_t) * x_t).flatten(1).norm(dim=1)
    output = (mine.double() - true).flatten(1).norm(dim=1)
    kept = RECIPE.mapping.n(rows.t) < ratio
    gap = truth.delta.norm(dim=1) / network
    eta = output / network
    return {"output_error": float(eta[kept].median()), "gap": float(gap[kept].median()),
            "predicted_gap_error": float((math.sqrt(2) * eta / gap)[kept].median())}  # fmt: skip


# --------------------------------------------------------------------------------------------------- curves
def measure_curves(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Mean loss per 100 steps of every mode, as it computes it, and the loss of its final weights in fp32."""
    source, images = open_data(arguments), arguments.steps * arguments.batch
    objective = replace(RECIPE, schedule=replace(RECIPE.schedule, images=images // len(STAGES)))
    for name in arguments.modes.split(";"):
        student = open_student(arguments)
        training = Training(student, source, objective, images, arguments.batch, arguments.lr, MODES[name])
        state = arguments.work / f"{arguments.name}-{name}.pt"
        if state.is_file():
            training.restore(state)
        for _ in islice(training.steps(), arguments.at_once):
            pass
        training.save(state)
        if len(training.losses) < arguments.steps:
            continue
        losses = torch.tensor(training.losses, dtype=torch.float64)
        final = {f"{q:g}": true_loss(student, source, q) for q in (2.0, 16.0, 256.0)}
        yield {"part": "curve", "net": arguments.name, "mode": name, "batch": arguments.batch, "steps": arguments.steps,
               "lr": arguments.lr, "losses": losses.unflatten(0, (-1, 100)).mean(1).tolist(), "final": final,
               "skipped": training.scale.skipped, "scale": training.scale.value}  # fmt: skip


@torch.no_grad()
def true_loss(student: Denoiser, source: Source, ratio: float) -> float:
    """Mean loss of the final weights over 1,024 images, in fp32, whatever they were trained in."""
    found = [
        RECIPE.loss_at(student, rows.x, rows.t, rows.eps, ratio, rows.cond, DropoutTape(Streams(1), rows.index)).mean()
        for rows in batches(student, source, RECIPE.law, 8, 128)
    ]
    return float(torch.stack(found).mean())


if __name__ == "__main__":
    main()
