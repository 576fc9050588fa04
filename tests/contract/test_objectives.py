"""Every objective with every backbone: shape, determinism, gradients to the student alone, precision, two steps."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fewstep import BACKBONES, EDM, OBJECTIVES, Denoiser, Parametrization
from fewstep.backbones import build
from fewstep.backbones.two_time import with_landing
from fewstep.config import from_dict, to_dict
from fewstep.data.sources import ArraySource
from fewstep.grids import Doubling
from fewstep.objectives import ECD, ECT, ICT, TCM, Beside, Multistep, Objective, StepRandom
from fewstep.objectives.multistep import Grid
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
    "adm": {"img_resolution": 8, "in_channels": 1, "out_channels": 1, "model_channels": 8, "channel_mult": [1, 2],
            "num_blocks": 2, "dropout": 0.3},
    "edm2": {"img_resolution": 8, "img_channels": 1, "model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1,
             "attn_resolutions": [4], "channels_per_head": 8, "logvar_channels": 8, "dropout": 0.3},
    "unet": {"sample_shape": [1, 8, 8], "channels": 8, "blocks": 1, "dropout": 0.3},
    "dit": {"sample_shape": [1, 8, 8], "width": 16, "depth": 1, "heads": 2, "dropout": 0.3},
    "mlp": {"sample_shape": [2], "width": 16, "depth": 2},
    "diffusers": {"kind": "UNet2DModel", "config": {
        "sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": [16, 16], "layers_per_block": 1,
        "down_block_types": ["DownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "UpBlock2D"],
        "norm_num_groups": 4, "attention_head_dim": 4, "dropout": 0.3}},
}  # fmt: skip
SHAPES = {"mlp": (2,)}
MIDDLE = Progress(500, 1000)
STEP = 1e-6
GROUPED = ("cmt",)
"""Objectives whose rows share a trajectory."""
THROUGH = ("ctm",)
"""Objectives that differentiate through a frozen network, with respect to its input."""
SELF_TARGET = ("scm", "meanflow")
BF16: dict[str, float] = {}
"""Least cosine between the steps in float32 and bf16, where it is not .98."""


pytestmark = [
    pytest.mark.parametrize("kind", OBJECTIVES),
    pytest.mark.parametrize("name", [name for name in BACKBONES if name not in ("two_time", "guided")]),
]


def make(name: str) -> Denoiser:
    if name == "diffusers":
        pytest.importorskip("diffusers", reason="diffusers is not installed: its networks cannot be built")
    spec = {"name": name, "kwargs": SPECS[name]}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = build(spec)
        for parameter in backbone.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    shape = SHAPES.get(name, (1, 8, 8))
    return Denoiser(backbone, EDM(), Parametrization("edm"), sample_shape=shape, spec=spec)


def make_student(kind: str, name: str) -> Denoiser:
    """A student of the kind that the objective trains; its landing time has an effect."""
    student = make(name)
    if objective(kind).two_time:
        student = with_landing(student)
        student.backbone.landing.last.weight.data.fill_(0.02)  # type: ignore[union-attr]
    return student


def objective(kind: str) -> Objective:
    """The default one, with wide gaps: at ratio 8 every row has r > 0, and bf16 still resolves the gap."""
    made = OBJECTIVES[kind]()
    if isinstance(made, ECT | ECD | TCM):
        return replace(made, schedule=Stages(q=8.0, last=0))
    if isinstance(made, ICT):
        return replace(made, schedule=Doubling(10, 10))
    return replace(made, pairing=Grid(8, 8)) if isinstance(made, Multistep) else made


def company(kind: str, student: Denoiser) -> Beside:
    """A teacher and companions with weights of their own, so that a mix-up shows."""
    made = objective(kind)

    def other(seed: int) -> Denoiser:
        twin = student.clone().requires_grad_(False)
        generator = torch.Generator().manual_seed(seed)
        for parameter in twin.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data.add_(0.02 * noise.to(parameter.dtype))
        return twin

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        extra = made.extra(student)
    return Beside(
        other(1).eval() if made.needs_teacher else None,
        {word: other(2 + k).train() for k, word in enumerate(made.companions())},
        extra if extra is None else extra.to(student.dtype),
    )


def rows(name: str, dtype: torch.dtype = torch.float32) -> Batch:
    generator = torch.Generator().manual_seed(1)
    x = 0.5 * torch.randn(ROWS, *SHAPES.get(name, (1, 8, 8)), generator=generator, dtype=torch.float64)
    return Batch(x.to(dtype), None)


def random(first: int = 100, count: int = ROWS) -> StepRandom:
    return StepRandom(Streams(3), torch.arange(first, first + count), CPU)


def loss(kind: str, student: Denoiser, batch: Batch, first: int = 100, beside: Beside | None = None) -> Tensor:
    made = objective(kind).prepare(student)
    beside = company(kind, student) if beside is None else beside
    return made.loss(student.train(), batch, MIDDLE, random(first, len(batch.x)), beside).per_sample


def test_one_number_per_sample_and_the_same_every_time(kind: str, name: str) -> None:
    student, batch = make_student(kind, name), rows(name)
    torch.manual_seed(1)
    first = loss(kind, student, batch)
    torch.manual_seed(2)  # the global generator plays no part
    again = loss(kind, student, batch)
    assert first.shape == (ROWS,)
    assert first.any()
    assert torch.equal(first, again)
    assert not torch.allclose(first, loss(kind, student, batch, first=0))  # other images: other noise


def test_each_row_depends_on_itself_alone(kind: str, name: str) -> None:
    if kind in GROUPED:
        pytest.skip(f"{kind} trains on groups of rows by design")
    student, batch = make_student(kind, name).double(), rows(name, torch.float64)
    together = loss(kind, student, batch)
    alone = [loss(kind, student, Batch(batch.x[i : i + 1], None), first=100 + i) for i in range(ROWS)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-7, atol=1e-9)


class Split(nn.Module):
    """Two copies of a network: ``live`` in passes with gradients, ``still`` in those without."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.live, self.still = network, copy.deepcopy(network)
        self.two_time = getattr(network, "two_time", False)

    def forward(self, *inputs: Tensor) -> Tensor:
        return (self.live if torch.is_grad_enabled() else self.still)(*inputs)


def test_the_gradient_is_that_of_the_students_own_pass(kind: str, name: str) -> None:
    """Autograd agrees with a finite difference in the weights of the passes with gradients alone: the target is a
    constant, whatever weights it was made with."""
    if kind in SELF_TARGET:
        pytest.skip("its loss is |F - sg(F + g)|^2 with F from one pass: closed_form/ tests its gradient")
    plain = make_student(kind, name).double()
    beside = company(kind, plain)
    student, batch = plain.around(Split(plain.backbone), None), rows(name, torch.float64)
    live = [p for p in student.backbone.live.parameters() if p.requires_grad]  # type: ignore[union-attr]
    generator = torch.Generator().manual_seed(4)
    direction = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in live]
    grads = torch.autograd.grad(loss(kind, student, batch, beside=beside).mean(), live, allow_unused=True)
    slope = sum(float((g * d).sum().detach()) for g, d in zip(grads, direction, strict=True) if g is not None)
    ends = []
    for sign in (1, -1):
        for p, d in zip(live, direction, strict=True):
            p.data.add_(d, alpha=sign * STEP)
        ends.append(float(loss(kind, student, batch, beside=beside).mean().detach()))
        for p, d in zip(live, direction, strict=True):
            p.data.add_(d, alpha=-sign * STEP)
    assert slope != 0
    assert (ends[0] - ends[1]) / (2 * STEP) == pytest.approx(slope, rel=2e-4)


def test_nothing_but_the_student_gets_a_gradient(kind: str, name: str) -> None:
    student = make_student(kind, name)
    beside = company(kind, student)
    others = [net for net in (beside.teacher, *beside.companions.values()) if net is not None]
    before = [parameter.clone() for net in others for parameter in net.parameters()]
    for net in others if kind not in THROUGH else ():
        net.requires_grad_(True)  # not even if they asked for one
    loss(kind, student, rows(name), beside=beside).mean().backward()
    after = [parameter for net in others for parameter in net.parameters()]
    assert all(p.grad is None for p in after)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert any(p.grad is not None and p.grad.any() for p in student.parameters())


def test_two_steps_in_float32_and_bf16(kind: str, name: str) -> None:
    """bf16 autocast takes nearly the same steps, in weights that stay float32; the teacher keeps its bits."""
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
        student, teacher = make_student(kind, name), make(name)
        trainer = Trainer(config, student, source, World(0, 1, CPU), teacher)
        assert [r.progress.images_seen for r in trainer.steps()] == [ROWS, 2 * ROWS]
        pairs = zip(make_student(kind, name).parameters(), student.parameters(), strict=True)
        results[precision] = torch.cat([(b - a).flatten() for a, b in pairs])
        assert results[precision].dtype == torch.float32
        trainer.require_finite()
        same = zip(teacher.parameters(), make(name).parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in same)
    a, b = results["fp32"], results["bf16"]
    assert a.abs().max() > 1e-6
    assert not torch.equal(a, b)
    assert torch.nn.functional.cosine_similarity(a, b, dim=0) > BF16.get(kind, 0.98)


def test_configuration_round_trip(kind: str, name: str) -> None:
    made = objective(kind)
    assert made.kind == kind
    record = json.loads(json.dumps(to_dict(made)))
    assert record["kind"] == kind
    assert from_dict(OBJECTIVES[kind], record) == made
    described = made.describe(MIDDLE)
    assert all(isinstance(v, float) for v in described.values())


def test_working_precision_is_the_students(kind: str, name: str) -> None:
    def at(dtype: torch.dtype) -> Tensor:
        return loss(kind, make_student(kind, name).to(dtype), rows(name, dtype))

    single, double = at(torch.float32), at(torch.float64)
    assert double.dtype == torch.float64
    torch.testing.assert_close(single.double(), double, rtol=5e-3, atol=1e-3)
