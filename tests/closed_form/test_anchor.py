"""The low-t anchor: nothing at f = D, known on a Gaussian, for the student alone, from the low rows alone."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from oracles import Gaussian, as_denoiser
from torch import Tensor, nn

from fewstep.denoiser import Denoiser, Parametrization
from fewstep.errors import ConfigError
from fewstep.objectives import ECT, OBJECTIVES, Beside, StepRandom
from fewstep.objectives.anchor import Anchor
from fewstep.objectives.levers import Levers
from fewstep.objectives.pairs import make_pair
from fewstep.process import EDM
from fewstep.randomness import Streams
from fewstep.types import Batch, Progress

LAM, SIZE = 0.25, 6
LAW = Gaussian.white(LAM, SIZE)
T = torch.tensor([0.02, 3.0, 0.09, 0.11, 0.0999], dtype=torch.float64)
LOW = torch.tensor([0, 2, 4])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Scaled(nn.Module):
    """``scale D(x, t)`` with a trained scale; records the rows it sees and whether gradients are on."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale, dtype=torch.float64))
        self.passes: list[tuple[list[float], bool]] = []

    def forward(self, x: Tensor, c_noise: Tensor, cond: Tensor | None = None) -> Tensor:
        self.passes.append((c_noise.tolist(), torch.is_grad_enabled()))
        return self.scale * LAW.denoise(x, c_noise)


def scaled(scale: float = 1.0) -> Denoiser:
    return Denoiser(Scaled(scale), EDM(), Parametrization("x0", time="native"), sample_shape=(SIZE,))


def setting() -> tuple[Tensor, Tensor]:
    return 0.5 * normal(5, SIZE, seed=1), normal(5, SIZE, seed=2)


def pair(below: float | None = 0.1) -> Any:
    x_0, eps = setting()
    return make_pair(x_0, eps, T, T / 2, T / 2, None, below)


def test_a_denoiser_pays_nothing() -> None:
    both, teacher = pair(), as_denoiser(LAW.denoise, SIZE)
    assert torch.equal(Anchor()(teacher(both.x_t, both.t), both, teacher), torch.zeros(5, dtype=torch.float64))


def test_the_exact_consistency_function_pays_what_the_gaussian_says() -> None:
    """``w |D|^2 (sqrt(1 + t^2/lambda) - 1)^2/t^2`` below 0.1, which is ``w |D|^2 t^2/(4 lambda^2)`` to 1 %; 0 above."""
    both = pair()
    student, teacher = as_denoiser(LAW.endpoint, SIZE), as_denoiser(LAW.denoise, SIZE)
    term = Anchor(weight=3.0)(student(both.x_t, both.t), both, teacher).detach()
    d = LAW.denoise(both.x_t, both.t).square().sum(1)
    want = 3 * d * ((1 + T**2 / LAM).sqrt() - 1) ** 2 / T**2
    torch.testing.assert_close(term[LOW], want[LOW], rtol=1e-10, atol=0)
    torch.testing.assert_close(term[LOW], (3 * d * T**2 / (4 * LAM**2))[LOW], rtol=0.02, atol=0)
    assert torch.equal(term[[1, 3]], torch.zeros(2, dtype=torch.float64))


def test_only_the_low_rows_go_through_the_teacher_and_the_student_runs_once() -> None:
    student, teacher = scaled(1.1), scaled()
    x_0, eps = setting()
    objective = ECT(levers=Levers(anchor=Anchor()))
    assert objective.needs_teacher
    beside = Beside(teacher=teacher)
    loss = objective.loss_at(student, x_0, T, eps, 1.0, beside=beside)
    assert teacher.backbone.passes == [(T[LOW].tolist(), False)]
    assert student.backbone.passes == [(T.tolist(), True)]
    plain = ECT().loss_at(student, x_0, T, eps, 1.0)
    torch.testing.assert_close(loss - plain, Anchor()(student(pair().x_t, T), pair(), teacher))


def test_the_gradient_is_the_students_alone() -> None:
    """d/ds of |s D - D|^2/t^2 is 2 (s - 1) |D|^2/t^2; the teacher gets none."""
    student, teacher, both = scaled(1.1), scaled(), pair()
    Anchor()(student(both.x_t, both.t), both, teacher).sum().backward()
    d = LAW.denoise(both.x_t, both.t).square().sum(1)
    want = (2 * 0.1 * d / T**2)[LOW].sum()
    torch.testing.assert_close(student.backbone.scale.grad, want)
    assert teacher.backbone.scale.grad is None


def test_without_low_rows_the_teacher_rests() -> None:
    both, teacher = pair(0.01), scaled()
    assert torch.equal(Anchor(0.01)(both.x_0, both, teacher), torch.zeros(5, dtype=torch.float64))
    assert teacher.backbone.passes == []


def test_labels_go_with_their_rows() -> None:
    seen: list[Tensor] = []

    class Labelled(Scaled):
        def forward(self, x: Tensor, c_noise: Tensor, cond: Tensor | None = None) -> Tensor:
            assert cond is not None
            seen.append(cond)
            return super().forward(x, c_noise)

    teacher = Denoiser(
        Labelled(), EDM(), Parametrization("x0", time="native"), sample_shape=(SIZE,), num_classes=5
    )  # fmt: skip
    labels = torch.eye(5, dtype=torch.float64)
    both = replace(pair(), cond=labels)
    Anchor()(both.x_0, both, teacher)
    assert torch.equal(seen[0], labels[LOW])


@pytest.mark.parametrize("kind", [k for k, v in OBJECTIVES.items() if any(f.name == "levers" for f in fields(v))])  # type: ignore[arg-type]
def test_every_objective_with_levers_is_anchored(kind: str) -> None:
    """Below = 100 anchors every row: the loss grows by |f - D|^2/t^2 > 0 on each."""
    student, teacher = as_denoiser(lambda x, t: 0.7 * LAW.denoise(x, t), SIZE).train(), as_denoiser(LAW.denoise, SIZE)
    plain = OBJECTIVES[kind]()
    anchored = replace(plain, levers=Levers(anchor=Anchor(below=100.0)))  # type: ignore[type-var]
    beside = Beside(teacher=teacher, companions=dict.fromkeys(plain.companions(), student))
    batch, random = Batch(setting()[0]), StepRandom(Streams(0), torch.arange(5), torch.device("cpu"))
    losses = [o.loss(student, batch, Progress(0, 100), random, beside).per_sample for o in (plain, anchored)]
    assert (losses[1] > losses[0]).all()


def test_one_graph_under_compile() -> None:
    torch._dynamo.reset()
    objective = ECT(levers=Levers(anchor=Anchor()))
    student, beside = as_denoiser(LAW.endpoint, SIZE), Beside(teacher=as_denoiser(LAW.denoise, SIZE))
    compiled = torch.compile(objective.loss_between, fullgraph=True, backend="eager")
    want = objective.loss_between(student, pair(), None, beside)
    torch.testing.assert_close(compiled(student, pair(), None, beside), want, rtol=1e-12, atol=1e-12)
    torch._dynamo.reset()


def test_bad_input_is_refused() -> None:
    with pytest.raises(ConfigError, match="no place or pulls backwards"):
        Anchor(below=0.0)
    with pytest.raises(ConfigError, match="which of its rows have a low t"):
        Anchor()(pair().x_0, pair(None), scaled())
    with pytest.raises(ConfigError, match="follows a teacher"):
        Anchor()(pair().x_0, pair(), None)
