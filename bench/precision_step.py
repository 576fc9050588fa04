"""A training step in any arithmetic, for bench/precision.py."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import torch
from emulate import emulate
from torch import Tensor, nn

from fewstep import Denoiser, arithmetic
from fewstep.arithmetic import HALF
from fewstep.data import Source
from fewstep.objectives import ECT, StepRandom
from fewstep.penalty import Penalty
from fewstep.randomness import Streams
from fewstep.times import Stages
from fewstep.training.config import DataConfig
from fewstep.training.feed import Feed
from fewstep.types import Progress

CPU = torch.device("cpu")
STAGES = range(8)
RECIPE = ECT(penalty=Penalty("l2", "dt", c=0.0), schedule=Stages(q=2.0, last=7))


def parameters(student: Denoiser) -> list[nn.Parameter]:
    return [p for p in student.parameters() if p.requires_grad]


def computing(kind: str) -> AbstractContextManager[None]:
    """The arithmetic of forward and backward pass, outside :func:`passes`."""
    name = kind.split("+")[0]
    return emulate(name) if name in ("tf32", "fp16", "bf16") else nullcontext()  # type: ignore[arg-type]


@contextmanager
def passes(kind: str, student: Denoiser) -> Iterator[None]:
    """The arithmetic of forward passes: plain autocast, or "+edges", what the trainer does."""
    name, *kept = kind.split("+")
    name = name.removesuffix("-cpu")
    if name not in HALF:
        yield
    elif kept:
        norms = not kind.startswith("bf16-cpu")  # as on CUDA
        with (
            patch.object(arithmetic, "norms_in_float32", lambda device: norms),
            arithmetic.rounding(name, CPU, student.sample_shape),  # type: ignore[arg-type]
        ):
            yield
    else:
        with torch.autocast("cpu", HALF[name]):
            yield


@dataclass(frozen=True)
class Mode:
    """How a curve is computed: arithmetic up to each q^a, in order.

    Args:
        limits: (largest q^a, arithmetic).
        parts: forward and backward passes per step, which rounds the sum over the batch otherwise.
    """

    limits: tuple[tuple[float, str], ...]
    parts: int = 1

    def kind(self, ratio: float) -> str:
        return next(kind for limit, kind in self.limits if ratio <= limit)


def throughout(kind: str) -> Mode:
    return Mode(((math.inf, kind),))


MODES = {
    "fp32": throughout("fp32"),
    "fp32, two half batches": Mode(((math.inf, "fp32"),), parts=2),
    "rule, GPU": Mode(((16, "bf16+edges"), (256, "fp16+edges"), (math.inf, "fp32"))),
    "rule, CPU": Mode(((16, "bf16-cpu"), (math.inf, "fp32"))),
    "bf16": throughout("bf16"),
    "bf16-cpu": throughout("bf16-cpu"),
    "tf32": throughout("tf32"),
    "fp16": throughout("fp16"),
    "fp16+edges": throughout("fp16+edges"),
}


@dataclass
class Scale:
    """torch.amp.GradScaler's rule: halve and skip on overflow, double after 2,000 good steps."""

    value: float = 2.0**16
    good: int = 0
    skipped: int = 0

    def unscale(self, gradients: list[Tensor]) -> bool:
        """Whether the step may be taken."""
        if not all(bool(g.isfinite().all()) for g in gradients):
            self.value, self.good, self.skipped = self.value / 2, 0, self.skipped + 1
            return False
        torch._foreach_mul_(gradients, 1 / self.value)
        self.good += 1
        if self.good % 2_000 == 0:
            self.value *= 2
        return True


@dataclass
class Training:
    """The step of the trainer (RAdam, no average), in any arithmetic; same seed, same images, noise and masks."""

    student: Denoiser
    source: Source
    objective: ECT
    images: int
    batch: int
    lr: float
    mode: Mode = field(default_factory=lambda: throughout("fp32"))
    scale: Scale = field(default_factory=Scale)
    losses: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.RAdam(parameters(self.student), lr=self.lr)

    def save(self, path: Path) -> None:
        state = {"model": self.student.backbone.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save(state | {"scale": vars(self.scale), "losses": self.losses}, path)

    def restore(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        self.student.backbone.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scale, self.losses = Scale(**state["scale"]), state["losses"]

    def steps(self) -> Iterator[tuple[int, float]]:
        """``(images seen, loss)`` after every step."""
        feed, streams = Feed(self.source, self.student, DataConfig(), 0), Streams(0)
        for seen in range(len(self.losses) * self.batch, self.images, self.batch):
            progress = Progress(seen, self.images)
            kind = self.mode.kind(self.objective.schedule.ratio(progress))
            self.optimizer.zero_grad(set_to_none=True)
            share, loss = self.batch // self.mode.parts, 0.0
            for start in range(seen, seen + self.batch, share):
                rows = range(start, start + share)
                random = StepRandom(streams, torch.arange(rows.start, rows.stop), CPU)
                with computing(kind):
                    with passes(kind, self.student):
                        out = self.objective.loss(self.student, feed.batch(rows), progress, random)
                    part = out.per_sample.sum() / self.batch
                    (part * (self.scale.value if "fp16" in kind else 1)).backward()
                loss += float(part.detach())
            if "fp16" not in kind or self.scale.unscale(
                [p.grad for p in parameters(self.student) if p.grad is not None]
            ):
                self.optimizer.step()
            self.losses.append(loss)
            yield seen + self.batch, loss
        feed.close()
