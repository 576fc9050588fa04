"""ECT under torch.compile without graph breaks: the same loss and gradient, with the shared dropout mask.

Which rows have r = 0 is decided on the host (shapes depend on it), so the graph begins after that: the two passes,
the dropout tape and the penalty are one graph. A network that was compiled itself works in the whole objective.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fewstep import Denoiser
from fewstep.objectives import ECT
from fewstep.objectives.pairs import make_pair
from fewstep.penalty import Penalty
from fewstep.randomness import DropoutTape, Streams
from fewstep.times import pair

ROWS = 8
OBJECTIVE = ECT(penalty=Penalty("pseudo_huber", "dt", c=0.03))
TIMES = torch.linspace(0.05, 3, ROWS, dtype=torch.float64)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def tape(first: int) -> DropoutTape:
    return DropoutTape(Streams(0), torch.arange(first, first + ROWS))


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, eps = torch.randn(2, ROWS, 1, 8, 8, generator=generator)
    return x, eps


def gradient(loss: Tensor, student: Denoiser) -> list[Tensor]:
    return list(torch.autograd.grad(loss.mean(), list(student.parameters())))


@pytest.mark.parametrize(("ratio", "noisy"), [(1.0, 0), (2.0, 3), (8.0, ROWS)])
def test_the_two_passes_are_one_graph(tiny: Denoiser, ratio: float, noisy: int) -> None:
    student = tiny.clone().train()
    r, gap = pair(OBJECTIVE.mapping, TIMES, ratio)
    assert len(r.nonzero()) == noisy
    compiled = torch.compile(OBJECTIVE.loss_between, fullgraph=True, backend="eager")
    for step in range(2):  # other data and other masks in the second step: neither is baked into the graph
        x, eps = batch(step)
        want = OBJECTIVE.loss_at(student, x, TIMES, eps, ratio, None, tape(step * ROWS))
        got = compiled(student, make_pair(x, eps, TIMES, r, gap), tape(step * ROWS))
        assert torch.equal(got, want)
        for a, b in zip(gradient(got, student), gradient(want, student), strict=True):
            assert torch.equal(a, b)
        undropped = OBJECTIVE.loss_at(student.eval(), x, TIMES, eps, ratio, None, None)
        assert (want - undropped).abs().max() > 1e-4
        student.train()


@pytest.mark.parametrize("ratio", [1.0, 2.0, 8.0])
def test_a_compiled_network_in_the_whole_objective(tiny: Denoiser, ratio: float) -> None:
    student, compiled = tiny.clone().train(), tiny.clone().train()
    compiled.backbone.compile(fullgraph=True, backend="eager")
    for step in range(2):
        x, eps = batch(step)
        want = OBJECTIVE.loss_at(student, x, TIMES, eps, ratio, None, tape(step * ROWS))
        got = OBJECTIVE.loss_at(compiled, x, TIMES, eps, ratio, None, tape(step * ROWS))
        assert torch.equal(got, want)
