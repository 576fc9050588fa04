"""Every objective with every backbone: shape, determinism, gradients to the student alone, precision, two steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fewstep import BACKBONES, EDM, OBJECTIVES, Denoiser, Parametrization
from fewstep.backbones import build
from fewstep.config import from_dict, to_dict
from fewstep.data.sources import ArraySource
from fewstep.objectives import ECT, AnyObjective, StepRandom
from fewstep.randomness import Streams
from fewstep.times import Stages
from fewstep.training.config import OptimConfig, RunConfig
from fewstep.training.trainer import Trainer
from fewstep.types import Batch, Progress
from fewstep.world import World

ROWS, CPU = 6, torch.device("cpu")
SPECS = {
    "edm": {"img_resolution": 8, "in_channels": 1, "out_channels": 1, "model_channels": 8, "channel_mult": [1, 2],
            "num_blocks": 1, "attn_resolutions": [4], "dropout": 0.3},
    "unet": {"sample_shape": [1, 8, 8], "channels": 8, "blocks": 1, "dropout": 0.3},
    "dit": {"sample_shape": [1, 8, 8], "width": 16, "depth": 1, "heads": 2, "dropout": 0.3},
    "mlp": {"sample_shape": [2], "width": 16, "depth": 2},
}  # fmt: skip
SHAPES = {"mlp": (2,)}
MIDDLE = Progress(500, 1000)

pytestmark = [pytest.mark.parametrize("kind", OBJECTIVES), pytest.mark.parametrize("name", BACKBONES)]


def make(name: str) -> Denoiser:
    spec = {"name": name, "kwargs": SPECS[name]}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = build(spec)
        for parameter in backbone.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    shape = SHAPES.get(name, (1, 8, 8))
    return Denoiser(backbone, EDM(), Parametrization("edm"), sample_shape=shape, spec=spec)


def objective(kind: str) -> AnyObjective:
    """The default one; ECT at ratio 8, where every row has r > 0."""
    made = OBJECTIVES[kind]()
    return replace(made, schedule=Stages(q=8.0, last=0)) if isinstance(made, ECT) else made


def rows(name: str, dtype: torch.dtype = torch.float32) -> Batch:
    generator = torch.Generator().manual_seed(1)
    x = 0.5 * torch.randn(ROWS, *SHAPES.get(name, (1, 8, 8)), generator=generator, dtype=torch.float64)
    return Batch(x.to(dtype), None)


def random(first: int = 100, count: int = ROWS) -> StepRandom:
    return StepRandom(Streams(3), torch.arange(first, first + count), CPU)


def loss(kind: str, student: Denoiser, batch: Batch, first: int = 100) -> Tensor:
    return objective(kind).loss(student.train(), batch, MIDDLE, random(first, len(batch.x))).per_sample


@contextmanager
def recorded(student: Denoiser) -> Iterator[list[bool]]:
    """Whether gradients were on in each pass of the network."""
    passes: list[bool] = []
    handle = student.backbone.register_forward_pre_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    yield passes
    handle.remove()


def test_one_number_per_sample_and_the_same_every_time(kind: str, name: str) -> None:
    student, batch = make(name), rows(name)
    torch.manual_seed(1)
    first = loss(kind, student, batch)
    torch.manual_seed(2)  # the global generator plays no part
    again = loss(kind, student, batch)
    assert first.shape == (ROWS,)
    assert (first > 0).all()
    assert torch.equal(first, again)
    assert not torch.allclose(first, loss(kind, student, batch, first=0))  # other images: other noise


def test_each_row_depends_on_itself_alone(kind: str, name: str) -> None:
    student, batch = make(name).double(), rows(name, torch.float64)
    together = loss(kind, student, batch)
    alone = [loss(kind, student, Batch(batch.x[i : i + 1], None), first=100 + i) for i in range(ROWS)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-8, atol=1e-10)


def test_gradients_flow_through_the_students_own_pass_only(kind: str, name: str) -> None:
    """The gradient equals the one of the loss with the target as a constant."""
    student, batch = make(name).double(), rows(name, torch.float64)
    with recorded(student) as passes:
        per_sample = loss(kind, student, batch)
    assert passes == ([True, False] if kind == "ect" else [True])
    parameters = [p for p in student.parameters() if p.requires_grad]
    got = torch.autograd.grad(per_sample.mean(), parameters, allow_unused=True)
    assert any(g is not None and g.any() for g in got)
    if kind == "ect":
        frozen = with_constant_target(student, batch)
        want = torch.autograd.grad(frozen.mean(), parameters, allow_unused=True)
        for a, b in zip(got, want, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def with_constant_target(student: Denoiser, batch: Batch) -> Tensor:
    """ECT written out: two passes with the same noise and the same masks, the second one detached."""
    from fewstep.times import draw, pair

    ect, draws = objective("ect"), random()
    assert isinstance(ect, ECT)
    t = draw(ect.law, draws.uniform("times"), student.sigma_min)
    eps = draws.normal("noise", batch.x)
    r, gap = pair(ect.mapping, t, 8.0)
    shape = (-1, *[1] * (batch.x.ndim - 1))
    tape = draws.tape()
    with tape.record():
        out = student(batch.x + t.reshape(shape) * eps, t)
    with tape.replay():
        target = student(batch.x + r.reshape(shape) * eps, r).detach()
    return ect.penalty(out - target, t, gap, student.sigma_data)


def test_two_steps_in_float32_and_bf16(kind: str, name: str) -> None:
    """bf16 autocast takes nearly the same steps, in weights that stay float32."""
    if name == "mlp":
        source = ArraySource("points", rows(name).x.repeat(4, 1), None)
    else:
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (24, 1, 8, 8), dtype=torch.uint8, generator=generator)
        source = ArraySource("images", images, None)
    results = {}
    for precision in ("fp32", "bf16"):
        config = RunConfig(
            images=2 * ROWS, batch_size=ROWS, precision=precision, objective=objective(kind),
            optim=OptimConfig(name="adam", lr=1e-3, eps=1.0),
        )  # fmt: skip
        student = make(name)
        trainer = Trainer(config, student, source, World(0, 1, CPU))
        assert [r.progress.images_seen for r in trainer.steps()] == [ROWS, 2 * ROWS]
        moved = [b - a for a, b in zip(make(name).parameters(), student.parameters(), strict=True)]
        results[precision] = torch.cat([m.flatten() for m in moved])
        assert results[precision].dtype == torch.float32
        trainer.require_finite()
    a, b = results["fp32"], results["bf16"]
    assert a.abs().max() > 1e-6
    assert not torch.equal(a, b)
    assert torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.98


def test_configuration_round_trip(kind: str, name: str) -> None:
    made = objective(kind)
    assert made.kind == kind
    record = to_dict(made)
    assert record["kind"] == kind
    assert from_dict(OBJECTIVES[kind], record) == made
    described = made.describe(MIDDLE)
    assert all(isinstance(v, float) for v in described.values())


def test_working_precision_is_the_students(kind: str, name: str) -> None:
    make_loss: Callable[[torch.dtype], Tensor] = lambda d: loss(kind, make(name).to(d), rows(name, d))  # noqa: E731
    single, double = make_loss(torch.float32), make_loss(torch.float64)
    assert double.dtype == torch.float64
    torch.testing.assert_close(single.double(), double, rtol=2e-3, atol=1e-4)
