"""Two objectives in one run: who is in charge when, whose companions move; each part is what it is alone."""

from __future__ import annotations

import pytest
import torch
from oracles import Gaussian, as_denoiser
from torch import Tensor

from fewstep.backbones.small import MLP
from fewstep.denoiser import Denoiser, Parametrization
from fewstep.errors import ConfigError
from fewstep.objectives import CMT, CT, ECT, SCM, TCM, Beside, Multistep, Sequence, StepRandom
from fewstep.process import EDM
from fewstep.randomness import Streams
from fewstep.times import Stages
from fewstep.types import Batch, Progress

SIZE, TOTAL = 4, 1000
TEACHER = as_denoiser(Gaussian.white(0.25, SIZE).denoise, SIZE)


def student() -> Denoiser:
    torch.manual_seed(0)
    mlp = MLP((SIZE,), 16, 2).double()
    mlp.head.weight.data.normal_(0, 0.3)
    return Denoiser(mlp, EDM(), Parametrization(), sample_shape=(SIZE,)).train()


def rows() -> StepRandom:
    return StepRandom(Streams(3), torch.arange(8), torch.device("cpu"))


def batch() -> Batch:
    return Batch(torch.randn(8, SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64))


@pytest.mark.parametrize("seen", [0, 249, 250, 600, 999])
def test_each_part_sees_its_own_run(seen: int) -> None:
    first, then = CMT(4), ECT(schedule=Stages(q=2.0, images=100, last=5))
    both, network, beside = Sequence(first, then, share=0.25), student(), Beside(teacher=TEACHER)

    def loss(objective: CMT | ECT | Sequence, progress: Progress) -> Tensor:
        return objective.loss(network, batch(), progress, rows(), beside).per_sample

    got = loss(both, Progress(seen, TOTAL))
    alone = loss(first, Progress(seen, 250)) if seen < 250 else loss(then, Progress(seen - 250, 750))
    assert torch.equal(got, alone)
    described = both.describe(Progress(seen, TOTAL))
    assert described["part"] == (2 if seen >= 250 else 1)
    if seen >= 250:
        assert described["stage"] == min((seen - 250) // 100, 5)


def test_companions_of_the_second_part_begin_where_it_begins() -> None:
    both = Sequence(CT(mu=0.9), TCM(first_share=0.5), share=0.5)
    assert both.companions() == ("first-target", "then-frozen")

    def follow(name: str, seen: int) -> tuple[str, float]:
        return both.follow(name, Progress(seen, TOTAL), 100)

    first, second = CT(mu=0.9), TCM(first_share=0.5)
    for seen in (100, 300, 500):
        assert follow("first-target", seen) == first.follow("target", Progress(seen, 500), 100)
    assert [follow("first-target", seen)[1] for seen in (600, 1000)] == [1.0, 1.0]
    assert [follow("then-frozen", seen)[1] for seen in (100, 400, 500)] == [1.0, 1.0, 0.0]
    for seen in (600, 800, 1000):
        assert follow("then-frozen", seen) == second.follow("frozen", Progress(seen - 500, 500), 100)


def test_each_part_gets_its_own_companions() -> None:
    network = student()
    other = student()
    for parameter in other.parameters():
        parameter.data.mul_(1.1)
    beside = Beside(companions={"first-target": network, "then-target": other})
    both = Sequence(CT(), CT(mu=0.5), share=0.5)
    for seen, companion in ((0, network), (700, other)):
        inside = Progress(seen % 500, 500)
        got = both.loss(network, batch(), Progress(seen, TOTAL), rows(), beside).per_sample
        want = CT().loss(network, batch(), inside, rows(), Beside(companions={"target": companion})).per_sample
        assert torch.equal(got, want)


def test_it_trains_the_student_of_its_second_part() -> None:
    dial = Sequence(CMT(16, segments=(1, 2, 4, 8)), Multistep(segments=(1, 2, 4, 8)))
    assert dial.two_time and dial.needs_teacher
    assert dial.sampler(student()) == Multistep(segments=(1, 2, 4, 8)).sampler(student())
    later = Sequence(CMT(), Multistep(segments=(1, 2)))  # the first part lands at 0, for a student that could be told
    assert later.two_time and later.sampler(student()) == Multistep(segments=(1, 2)).sampler(student())
    plain = Sequence()
    assert (plain.first, plain.then, plain.two_time) == (CMT(), ECT(), False)
    assert plain.sampler(student()) == ("consistency", {})


def test_what_cannot_be_put_together_is_refused() -> None:
    with pytest.raises(ConfigError, match="must lie in"):
        Sequence(share=1.0)
    with pytest.raises(ConfigError, match="tells the student where to land"):
        Sequence(CMT(16, segments=(1, 2)), ECT()).prepare(student())
    with pytest.raises(ConfigError, match="parameters of its own"):
        Sequence(ECT(), SCM()).prepare(student())
