"""CT, iCT, CD and ECD: invariants, and the fixed points of math.md 7.2 found through the objectives themselves."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from oracles import Gaussian, Mixture, as_denoiser, quadrature
from torch import Tensor, nn

from fewstep.backbones.small import MLP
from fewstep.config import from_dict, to_dict
from fewstep.data.sources import ArraySource
from fewstep.denoiser import Denoiser, Parametrization
from fewstep.errors import ConfigError
from fewstep.grids import Doubling, Growing, Karras, neighbours, uniform_places
from fewstep.objectives import CD, CT, ECD, ECT, ICT, OBJECTIVES, Beside, StepRandom
from fewstep.objectives.bridges import DataRay, GuidedRay, TeacherStep
from fewstep.objectives.pairs import make_pair
from fewstep.penalty import Penalty
from fewstep.process import EDM
from fewstep.randomness import DropoutTape, Streams
from fewstep.times import Constant, Sigmoid, Stages, pair
from fewstep.training.config import RunConfig
from fewstep.training.trainer import Trainer
from fewstep.types import Batch, Progress
from fewstep.world import World

SIZE, LAM = 6, 0.25
SQUARED = Penalty("squared_l2", "one")
CPU = torch.device("cpu")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(seed: int = 0, classes: int = 0) -> Denoiser:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mlp = MLP((SIZE,), 32, 2, num_classes=classes).double()
        for parameter in mlp.parameters():
            parameter.data.add_(0.2 * torch.randn_like(parameter))
    return Denoiser(mlp, EDM(), Parametrization(), sample_shape=(SIZE,), num_classes=classes).train()


def setting(batch: int = 5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x_0, (t, r) on an 11-node grid with r = 0 in the first row, eps."""
    t, r = neighbours(Karras().nodes(11, 0.0, 80.0), torch.tensor([0, 2, 5, 8, 9])[:batch])
    return normal(batch, SIZE, seed=1), t, r, normal(batch, SIZE, seed=2)


def gradient(denoiser: Denoiser, loss: Tensor) -> Tensor:
    grads = torch.autograd.grad(loss, [p for p in denoiser.parameters() if p.requires_grad], allow_unused=True)
    return torch.cat([g.flatten() for g in grads if g is not None])


def close(got: Tensor, want: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def step_random(batch: int, seed: int = 0) -> StepRandom:
    return StepRandom(Streams(seed), torch.arange(batch), CPU)


# --------------------------------------------------------------------------- iCT, and ECT as iCT (E2)
@dataclass(frozen=True)
class Neighbours:
    """The mapping whose r is the next lower node, written as n(t) = ratio (1 - r/t)."""

    ratio: float = 4.0
    kind: str = "neighbours"

    def n(self, t: Tensor) -> Tensor:
        nodes = Karras().nodes(11, 0.0, 80.0)
        place = (t[:, None] - nodes).abs().argmin(1) - 1
        t, r = neighbours(nodes, place)
        return self.ratio * (1 - r / t)


def test_e2_ect_on_adjacent_nodes_is_ict() -> None:
    """Value and gradient: w = 1/(t - r), pseudo-Huber on the norm with c = 0.00054 sqrt(d), target sg(theta)."""
    student, (x_0, t, r, eps) = network(), setting()
    c = 0.00054 * math.sqrt(SIZE)
    ict = ICT().loss_at(student, x_0, t, r, eps)
    ect = ECT(mapping=Neighbours(), penalty=Penalty("pseudo_huber", "dt", c)).loss_at(student, x_0, t, eps, 4.0)  # type: ignore[arg-type]
    target = torch.where(r[:, None] > 0, student(x_0 + r[:, None] * eps, r), x_0).detach()
    square = (student(x_0 + t[:, None] * eps, t) - target).square().sum(1)
    want = ((square + c**2).sqrt() - c) / (t - r)
    close(ict, want, 1e-10)
    close(ect, ict, 1e-10)
    expected = gradient(student, want.mean())
    close(gradient(student, ict.mean()), expected, 1e-9)
    close(gradient(student, ect.mean()), expected, 1e-9)


@pytest.mark.parametrize(("size", "c"), [(3 * 32 * 32, 0.0299), (3 * 64 * 64, 0.0599)])
def test_icts_constant_is_that_of_its_dimension(size: int, c: float) -> None:
    delta, one = normal(2, size), torch.ones(2, dtype=torch.float64)
    rough = Penalty("pseudo_huber", "one", round(0.00054 * math.sqrt(size), 4))
    assert rough.c == c
    close(Penalty("pseudo_huber", "one", None)(delta, one, one), rough(delta, one, one), 1e-4)
    exact = Penalty("pseudo_huber", "one", 0.00054 * math.sqrt(size))
    close(ICT().penalty.measure(1e-3 * delta), exact.measure(1e-3 * delta))


def test_an_ict_step_draws_what_its_parts_say() -> None:
    """Block 1 of 8 has 21 nodes; the pair is found by hand from the cumulative lognormal."""
    student, x = network(), normal(64, SIZE)
    got = ICT().loss(student, Batch(x), Progress(1500, 8000), step_random(64)).per_sample
    u = Streams(0).uniform("times", torch.arange(64))
    nodes = [(0.002 ** (1 / 7) + i / 20 * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7 for i in range(21)]
    z = np.array([0.5 * math.erf((math.log(s) + 1.1) / (2 * math.sqrt(2))) for s in nodes])
    place = np.searchsorted((z - z[0]) / (z[-1] - z[0]), u.numpy()) - 1
    t, r = (torch.tensor([nodes[i + k] for i in place], dtype=torch.float64) for k in (1, 0))
    r = torch.where(torch.from_numpy(place) == 0, 0, r)
    eps = Streams(0).normal("noise", torch.arange(64), (SIZE,), torch.float64)
    tape = DropoutTape(Streams(0), torch.arange(64))
    close(got, ICT().loss_at(student, x, t, r, eps, None, tape), 1e-9)
    assert ICT().describe(Progress(1500, 8000)) == {"stage": 1.0, "nodes": 21.0}


# ---------------------------------------------------------------------------------------------- CT
@pytest.mark.parametrize("weight", ["one", "dt"])
def test_ct_compares_with_its_companion(weight: str) -> None:
    """Value and gradient; the target network and the student's second pass get none."""
    student, target, (x_0, t, r, eps) = network(), network(1), setting()
    objective = CT() if weight == "one" else CT(penalty=Penalty("squared_l2", "dt"))
    loss = objective.loss_at(student, x_0, t, r, eps, beside=Beside(companions={"target": target}))
    goal = torch.where(r[:, None] > 0, target(x_0 + r[:, None] * eps, r), x_0).detach()
    want = (student(x_0 + t[:, None] * eps, t) - goal).square().sum(1) * (1 if weight == "one" else 1 / (t - r))
    close(loss, want)
    close(gradient(student, loss.mean()), gradient(student, want.mean()))
    assert not any(p.grad is not None for p in target.parameters())


def test_a_ct_step_draws_what_its_parts_say() -> None:
    student, target, x = network(), network(1), normal(64, SIZE)
    beside = Beside(companions={"target": target})
    got = CT().loss(student, Batch(x), Progress(80, 8000), step_random(64), beside).per_sample
    nodes = Karras().nodes(16, 0.0, 80.0)  # 16 at k/K = 1/100
    t, r = neighbours(nodes, uniform_places(Streams(0).uniform("times", torch.arange(64)), 16))
    eps = Streams(0).normal("noise", torch.arange(64), (SIZE,), torch.float64)
    tape = DropoutTape(Streams(0), torch.arange(64))
    close(got, CT().loss_at(student, x, t, r, eps, None, tape, beside))
    assert CT().describe(Progress(80, 8000)) == {"nodes": 16.0}


def test_cts_target_without_memory_is_the_student() -> None:
    """mu = 0: the companion is a copy after every step, and the loss is iCT's code path with CT's penalty."""
    student, (x_0, t, r, eps) = network(), setting()
    assert CT(mu=0.0).follow("target", Progress(500, 1000), 100) == ("student", 0.0)
    ct = CT().loss_at(student, x_0, t, r, eps, beside=Beside(companions={"target": student.clone()}))
    ict = ICT(penalty=SQUARED).loss_at(student, x_0, t, r, eps)
    close(ct, ict)
    close(gradient(student, ct.mean()), gradient(student, ict.mean()))


def test_cts_target_follows_with_the_decay_of_the_step_taken() -> None:
    """The step that ends at image 100 was taken on the grid of image 0: N = 2, mu = 0.81."""
    assert CT().companions() == ("target",)
    assert CT().follow("target", Progress(100, 8000), 100) == ("student", pytest.approx(0.81))
    name, beta = CT().follow("target", Progress(8000, 8000), 4000)
    assert (name, beta) == ("student", pytest.approx(0.9 ** (2 / 106)))  # 107 nodes half-way


def test_ct_is_cd_with_a_teacher_that_knows_x_0() -> None:
    student, target, (x_0, t, r, eps) = network(), network(1), setting()
    beside = Beside(teacher=as_denoiser(lambda x, now: x_0, SIZE), companions={"target": target})
    want = CT().loss_at(student, x_0, t, r, eps, beside=beside)
    for solver in ("euler", "heun"):
        close(CD(bridge=TeacherStep(solver)).loss_at(student, x_0, t, r, eps, beside=beside), want, 1e-11)


# -------------------------------------------------------------------------------------------- CD, ECD
def test_cds_targets() -> None:
    """ "ema" compares with the companion, "student" with the student; both from the teacher's Heun step."""
    law = Gaussian.random(SIZE, seed=3)
    teacher = as_denoiser(law.denoise, SIZE)
    student, target, (x_0, t, r, eps) = network(), network(1), setting()
    x_t = x_0 + t[:, None] * eps
    d = (x_t - law.denoise(x_t, t)) / t[:, None]
    euler = x_t + (r - t)[:, None] * d
    second = (euler - law.denoise(euler, r)) / r[:, None]
    x_r = torch.where(r[:, None] > 0, x_t + (r - t)[:, None] * (d + second) / 2, euler)
    beside = Beside(teacher, {"target": target})
    for name, net in (("ema", target), ("student", student)):
        goal = torch.where(r[:, None] > 0, net(x_r, r), x_r).detach()
        want = (student(x_t, t) - goal).square().sum(1)
        loss = CD(target=name).loss_at(student, x_0, t, r, eps, beside=beside)  # type: ignore[arg-type]
        close(loss, want, 1e-10)
        weighed = CD(target=name, penalty=Penalty("squared_l2", "dt"))  # type: ignore[arg-type]
        close(weighed.loss_at(student, x_0, t, r, eps, beside=beside), want / (t - r), 1e-10)
        close(gradient(student, loss.mean()), gradient(student, want.mean()), 1e-9)
    assert (CD().companions(), CD(target="student").companions()) == (("target",), ())
    assert CD().follow("target", Progress(64, 100), 64) == ("student", 0.95)


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_at_r_zero_the_target_is_the_teachers_denoiser(solver: str) -> None:
    law, student = Gaussian.random(SIZE, seed=3), network()
    x_0, t, _, eps = setting()
    bridge = TeacherStep(solver)  # type: ignore[arg-type]
    beside = Beside(as_denoiser(law.denoise, SIZE))
    x_t = x_0 + t[:, None] * eps
    want = (student(x_t, t) - law.denoise(x_t, t)).norm(dim=1)
    close(ECD(bridge=bridge, penalty=Penalty("l2", "one")).loss_at(student, x_0, t, eps, 1.0, beside=beside), want)
    got = CD(bridge=bridge, target="student").loss_at(student, x_0, t, torch.zeros_like(t), eps, beside=beside)
    close(got, want**2)


@pytest.mark.parametrize(("solver", "order"), [("euler", 2), ("heun", 3)])
def test_the_floor_of_distillation_is_zero(solver: str, order: int) -> None:
    """Exact f and exact teacher: |delta| = O(dt^2) with Euler, O(dt^3) with Heun, row by row; ECT's is O(dt)."""
    law = Gaussian.random(SIZE, seed=3)
    f, beside = as_denoiser(law.endpoint, SIZE), Beside(as_denoiser(law.denoise, SIZE))
    x_0, _, _, eps = setting()
    t = torch.tensor([0.3, 0.8, 1.5, 4.0, 20.0], dtype=torch.float64)
    length = Penalty("l2", "one")
    ecd = ECD(mapping=Constant(), penalty=length, bridge=TeacherStep(solver))  # type: ignore[arg-type]
    ect = ECT(mapping=Constant(), penalty=length)
    coarse, fine = (ecd.loss_at(f, x_0, t, eps, ratio, beside=beside).detach() for ratio in (128.0, 256.0))
    assert ((coarse / fine).log2() - order).abs().max() < 0.06
    loose = [ect.loss_at(f, x_0, t, eps, ratio).detach() for ratio in (128.0, 256.0)]
    assert ((loose[0] / loose[1]).log2() - 1).abs().max() < 0.06


def test_an_ecd_step_draws_as_ect_does() -> None:
    """With a teacher that knows x_0, the whole step is ECT's."""
    student, x = network(), normal(16, SIZE)
    beside = Beside(as_denoiser(lambda x_t, t: x, SIZE))
    ect, ecd = ECT(), ECD(schedule=Stages())
    want = ect.loss(student, Batch(x), Progress(0, 100), step_random(16)).per_sample
    close(ecd.loss(student, Batch(x), Progress(0, 100), step_random(16), beside).per_sample, want, 1e-10)
    assert ecd.describe(Progress(0, 100)) == ect.describe(Progress(0, 100))
    assert ECD().schedule.ratio(Progress(0, 100)) == 4  # Heun's step is wrong where r/t is small


@pytest.mark.parametrize("kind", ["cd", "ecd"])
def test_a_missing_teacher_is_named(kind: str) -> None:
    objective, student = OBJECTIVES[kind](), network()
    assert objective.needs_teacher
    beside = Beside(companions={"target": network(1)})
    with pytest.raises(ConfigError, match="fewstep tune TEACHER"):
        objective.loss(student, Batch(normal(4, SIZE)), Progress(0, 100), step_random(4), beside)


@pytest.mark.parametrize("kind", ["ct", "ict", "cd", "ecd"])
def test_training_moves_the_student_and_its_average_but_not_the_teacher(kind: str) -> None:
    """Two steps of the real trainer: teacher bits unchanged, companion = the moving average by hand."""
    teacher = network()
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    source = ArraySource("points", normal(32, SIZE).float(), None)
    student = network().float()
    config = RunConfig(images=16, batch_size=8, objective=OBJECTIVES[kind]())
    trainer = Trainer(config, student, source, World(0, 1, CPU), teacher.float())
    average = {k: v.clone() for k, v in student.state_dict().items()}
    decays = {"ct": (0.81, 0.9 ** (2 / 106)), "cd": (0.95, 0.95)}.get(kind)  # CT: N = 2, then 107
    for step, _ in enumerate(trainer.steps()):
        if decays is not None:
            beta, now = decays[step], student.state_dict()
            average = {k: beta * v + (1 - beta) * now[k] for k, v in average.items()}
            state = trainer.beside.companions["target"].state_dict()
            for name, value in average.items():
                torch.testing.assert_close(state[name], value, rtol=1e-5, atol=1e-7)
    assert any(not torch.equal(v, before[k].float()) for k, v in student.state_dict().items())
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name].float())
    if trainer.beside.teacher is not None:
        for name, value in trainer.beside.teacher.state_dict().items():
            assert torch.equal(value, before[name].float())


# --------------------------------------------------------------------------------------- guidance
class Classes(nn.Module):
    """Exact denoisers of one Gaussian per class, N(m_c, 0.25), and of N(m_u, 0.25) where there is no label."""

    means = torch.tensor([-0.7, 0.9, 0.2], dtype=torch.float64)

    def __init__(self) -> None:
        super().__init__()
        self.idle = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.calls = 0

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        self.calls += 1
        mean = torch.where(cond.any(1), cond @ self.means[:2], self.means[2])[:, None]
        return mean + LAM / (LAM + t[:, None] ** 2) * (x - mean) + 0 * self.idle


def conditional() -> Denoiser:
    return Denoiser(Classes(), EDM(), Parametrization("x0", time="native"), sample_shape=(1,), num_classes=2)


def labelled(count: int = 4) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x_0, eps, t, r and labels, the last row without one."""
    t = torch.tensor([0.4, 1.0, 3.0, 9.0], dtype=torch.float64)[:count]
    cond = torch.tensor([[1, 0], [0, 1], [0, 1], [0, 0]], dtype=torch.float64)[:count]
    return normal(count, 1, seed=4), normal(count, 1, seed=5), t, 0.7 * t, cond


@pytest.mark.parametrize("weight", [0.0, 0.5, 2.0])
def test_guided_euler_step(weight: float) -> None:
    """x_r = x_t + (r - t) (v_u + w (v_c - v_u)), v = (x - D)/t; rows without a label are not guided."""
    teacher = conditional()
    x_0, eps, t, r, cond = labelled()
    both = make_pair(x_0, eps, t, r, t - r, cond)
    velocity = [(both.x_t - teacher(both.x_t, t, c)) / t[:, None] for c in (cond, None)]
    want = both.x_t + (r - t)[:, None] * (velocity[1] + weight * (velocity[0] - velocity[1]))
    got = TeacherStep("euler", guidance=weight)(both, both.x_t, teacher)
    close(got, want)
    close(got[3], TeacherStep("euler")(both, both.x_t, teacher)[3])
    assert (got - TeacherStep("euler")(both, both.x_t, teacher)).abs()[:3].min() > 1e-3


def test_guidance_one_is_the_same_bits_at_the_same_cost() -> None:
    teacher = conditional()
    x_0, eps, t, r, cond = labelled()
    both = make_pair(x_0, eps, t, r, t - r, cond)
    for solver, calls in (("euler", 1), ("heun", 2)):
        teacher.backbone.calls = 0
        got = TeacherStep(solver, guidance=1.0)(both, both.x_t, teacher)  # type: ignore[arg-type]
        assert teacher.backbone.calls == calls
        assert torch.equal(got, TeacherStep(solver)(both, both.x_t, teacher))  # type: ignore[arg-type]
    assert torch.equal(GuidedRay(1.0)(both, both.x_t, None), DataRay()(both, both.x_t, None))
    assert not GuidedRay(1.0).needs_teacher and GuidedRay(2.0).needs_teacher


def test_guided_heun_step_guides_both_evaluations() -> None:
    """With one variance for all, the guided field is that of the mean m_u + w (m_c - m_u); the error is O(dt^3)."""
    x_0, eps, t, _, cond = labelled(3)
    mean = Classes.means[2] + 2.0 * (cond @ Classes.means[:2] - Classes.means[2])
    errors = []
    for ratio in (64, 128):
        r = t * (1 - 1 / ratio)
        both = make_pair(x_0, eps, t, r, t - r, cond)
        exact = mean[:, None] + ((LAM + r**2) / (LAM + t**2)).sqrt()[:, None] * (both.x_t - mean[:, None])
        errors.append((TeacherStep("heun", guidance=2.0)(both, both.x_t, conditional()) - exact).detach().abs().max())
    assert float(errors[0] / errors[1]) == pytest.approx(8, rel=0.06)


def test_the_guided_ray_has_the_guided_velocity_as_its_mean() -> None:
    """Over x_0 given x_t and its class, E[x_r] is the teacher's guided Euler step; without a label it is the ray."""
    points, weights = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(8))
    weights = (weights / weights.sum())[:, None]
    x_t, t, r = 1.7, 1.3, 0.8
    teacher = conditional()
    for cond, mean in ((torch.tensor([[0.0, 1.0]]), 0.9), (torch.tensor([[1.0, 0.0]]), -0.7)):
        centre, spread = mean + LAM / (LAM + t**2) * (x_t - mean), math.sqrt(LAM * t**2 / (LAM + t**2))
        x_0 = centre + spread * points[:, None]
        times = [torch.full((8,), v, dtype=torch.float64) for v in (t, r, t - r)]
        both = make_pair(x_0, (x_t - x_0) / t, *times, cond.double().expand(8, 2))
        close(both.x_t, torch.full_like(x_0, x_t))
        got = (weights * GuidedRay(1.8)(both, both.x_t, teacher)).sum()
        close(got, TeacherStep("euler", guidance=1.8)(both, both.x_t, teacher)[0, 0])
        free = replace(both, cond=torch.zeros(8, 2, dtype=torch.float64))
        assert torch.equal(GuidedRay(1.8)(free, both.x_t, teacher), DataRay()(free, both.x_t, None))


@pytest.mark.parametrize("bridge", [TeacherStep(guidance=2.0), GuidedRay(2.0)])
def test_guidance_needs_a_conditional_teacher(bridge: TeacherStep | GuidedRay) -> None:
    x_0, t, r, eps = setting()
    both = make_pair(x_0, eps, t, r, t - r)
    with pytest.raises(ConfigError, match="class-conditional"):
        bridge(both, both.x_t, network())


# ----------------------------------------------------------------------- fixed points on a Gaussian
Step = Callable[[Denoiser, Tensor, Tensor, Tensor, Tensor, Denoiser], Tensor]


def along(objective: CT | CD) -> Step:
    """``loss(student, x_0, t, r, eps, target)`` of an objective with an explicit target and the exact teacher."""
    teacher = as_denoiser(Gaussian.white(LAM).denoise)

    def loss(student: Denoiser, x_0: Tensor, t: Tensor, r: Tensor, eps: Tensor, target: Denoiser) -> Tensor:
        beside = Beside(teacher, {"target": target})
        return objective.loss_at(student, x_0, t, r, eps, beside=beside).detach()

    return loss


def gain(objective: CT | CD, delta: float, top: float = 80.0) -> float:
    """``ln(a(top)/a*(top))`` at the fixed point of the map r = (1 - delta) t.

    Each step's optimum is found from the objective's own expected loss: with f(x, t) = g x and target f(x, r) = x it is
    a parabola in g, known from three values; its minimum is a(t)/a(r) (math.md 7.3).
    """
    count = math.ceil(math.log(top / 1e-6) / -math.log1p(-delta))
    chain = top * (1 - delta) ** torch.arange(count + 1, dtype=torch.float64)
    x_0, eps, weights = quadrature(LAM, nodes=4)
    t, r = (v.repeat_interleave(len(x_0)) for v in (chain[:-1], chain[1:]))
    rows = (x_0.repeat(count, 1), t, r, eps.repeat(count, 1))
    loss, target = along(objective), as_denoiser(lambda x, now: x)

    def expected(g: float) -> Tensor:
        per_row = loss(as_denoiser(lambda x, now: g * x), *rows, target)
        return per_row.reshape(count, -1) @ weights

    low, middle, high = (expected(g) for g in (-1.0, 0.0, 1.0))
    factors = (low - high) / (2 * (low + high - 2 * middle))
    return float(factors.log().sum()) - 0.5 * math.log(LAM / (LAM + top**2))


CONSTANT = {2: 0.84090, 4: 0.93061, 8: 0.96717, 16: 0.98400, 32: 0.99209, 64: 0.99607, 128: 0.99804}
HEUN = {16: 5.3e-4, 32: 1.3e-4, 64: 3.1e-5, 128: 7.7e-6}


@pytest.mark.parametrize("objective", [CT(), CD(bridge=TeacherStep("euler"))], ids=["ct", "cd-euler"])
def test_halving_the_gap_halves_the_log_error_of_ct_and_euler(objective: CT | CD) -> None:
    biases = {ratio: gain(objective, 1 / ratio) for ratio in CONSTANT}
    for ratio, want in CONSTANT.items():
        assert math.exp(biases[ratio]) == pytest.approx(want, abs=1e-4)
    for ratio in (16, 32, 64):
        assert 1.9 < biases[ratio] / biases[2 * ratio] < 2.2


def test_halving_the_gap_quarters_the_log_error_of_heun() -> None:
    biases = {ratio: abs(gain(CD(), 1 / ratio)) for ratio in HEUN}
    for ratio, want in HEUN.items():
        assert biases[ratio] == pytest.approx(want, rel=0.03)
    for ratio in (16, 32, 64):
        assert 3.8 < biases[ratio] / biases[2 * ratio] < 4.3


# ---------------------------------------------------------------------- fixed points on 1-D mixtures
def mixture(kind: str) -> Mixture:
    """math.md 7.2's two: overlapping modes, or modes 3 to 4.5 standard deviations apart."""
    weights, means, stds = {
        "overlapping": ([0.4, 0.6], [-0.4, 0.4], [0.4, 0.3]),
        "separated": ([0.35, 0.65], [-1.0, 0.8], [0.2, 0.3]),
    }[kind]
    return Mixture(*(torch.tensor(v, dtype=torch.float64) for v in (weights, means, stds)))


def posterior(law: Mixture, x: Tensor, t: float, nodes: int = 15) -> tuple[Tensor, Tensor]:
    """Points x_0 ``[n, 2 nodes]`` given x_t = x ``[n]`` and their weights: Gauss-Hermite in each component."""
    points, gauss = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(nodes))
    variance = law.stds**2 + t**2
    logits = law.weights.log() - 0.5 * variance.log() - (x[:, None] - law.means) ** 2 / (2 * variance)
    centre = law.means + law.stds**2 / variance * (x[:, None] - law.means)
    spread = law.stds * t / variance.sqrt()
    x_0 = centre[..., None] + spread[:, None] * points
    weights = logits.softmax(1)[..., None] * gauss / gauss.sum()
    return x_0.flatten(1), weights.flatten(1)


def mixture_error(law: Mixture, objective: CT | CD, delta: float, top: float = 3.0, low: float = 0.01) -> float:
    """RMS over p_T of the fixed point of r = (1 - delta) t minus the exact f, by sweeping the time grid upward.

    Each sweep asks the objective what the best f(x_t, t) is: of the losses (1 - y)^2 and (-1 - y)^2 it gives y.
    """
    interpolate = pytest.importorskip("scipy.interpolate")
    count = round(math.log(top / low) / -math.log1p(-delta))
    chain = [top * (1 - delta) ** k for k in range(count, -1, -1)]
    teacher = as_denoiser(law.denoise)
    ends = [as_denoiser(lambda x, now, v=v: torch.full_like(x, v)) for v in (1.0, -1.0)]
    f: Callable[[Tensor, Tensor], Tensor] = lambda x, now: law.denoise(x, low)  # noqa: E731
    for r, t in itertools.pairwise(chain):
        x = torch.linspace(-2.5 - 5 * t, 2.5 + 5 * t, 801, dtype=torch.float64)
        x_0, weights = posterior(law, x, t) if isinstance(objective, CT) else (x[:, None], torch.ones(801, 1))
        rows = x_0.reshape(-1, 1)
        eps = (x[:, None] - x_0).reshape(-1, 1) / t
        times = [torch.full((len(rows),), v, dtype=torch.float64) for v in (t, r)]
        beside = Beside(teacher, {"target": as_denoiser(f)})
        plus, minus = (objective.loss_at(end, rows, *times, eps, beside=beside).detach() for end in ends)
        best = (weights * ((minus - plus) / 4).reshape(x_0.shape)).sum(1)
        spline, edge = interpolate.CubicSpline(x.numpy(), best.numpy()), float(x[-1])
        f = lambda x, now, spline=spline, edge=edge: torch.from_numpy(spline(x.clamp(-edge, edge).numpy()))  # noqa: E731
    at = torch.linspace(-7, 7, 401, dtype=torch.float64)[:, None]
    density = (-(at**2) / (2 * 9.6)).exp()
    return float(((f(at, at) - law.endpoint(at, top)) ** 2 * density / density.sum()).sum().sqrt())


MIXTURES = {
    ("overlapping", "ct"): (0.0376, 0.0182, 0.0090),
    ("overlapping", "euler"): (0.0318, 0.0150, 0.0073),
    ("overlapping", "heun"): (0.0049, 0.00095, 0.00017),
    ("separated", "ct"): (0.184, 0.136, 0.102),
    ("separated", "euler"): (0.064, 0.035, 0.018),
}


@pytest.mark.parametrize(("kind", "name"), MIXTURES)
def test_fixed_points_on_mixtures(kind: str, name: str) -> None:
    """The RMS errors of math.md 7.2 at delta = 1/4, 1/8, 1/16: falling, but slowly where modes are separate."""
    objective = CT() if name == "ct" else CD(bridge=TeacherStep(name))  # type: ignore[arg-type]
    got = [mixture_error(mixture(kind), objective, delta) for delta in (1 / 4, 1 / 8, 1 / 16)]
    ratios = [a / b for a, b in itertools.pairwise(got)]
    if name == "heun":
        assert all(ratio > 3 for ratio in ratios)
        assert got[:2] == pytest.approx(MIXTURES[kind, name][:2], rel=0.05)
    else:
        assert all(1.15 < ratio < 2.2 for ratio in ratios)
        assert got == pytest.approx(MIXTURES[kind, name], rel=0.05)  # the table's grid is five times finer


# --------------------------------------------------------------------------------- configuration
@pytest.mark.parametrize(
    "objective",
    [
        CT(schedule=Growing(3, 40), mu=0.95),
        CT(bridge=GuidedRay(1.5)),
        ICT(schedule=Doubling(5, 80), grid=Karras(0.01, 5.0)),
        CD(nodes=40, target="student", bridge=TeacherStep("euler", 2.0)),
        ECD(mapping=Sigmoid(4.0), bridge=TeacherStep(guidance=1.3)),
    ],
)
def test_choices_survive_a_file(objective: CT | ICT | CD | ECD) -> None:
    assert from_dict(type(objective), to_dict(objective)) == objective


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CT(mu=1.0), r"\[0, 1\)"),
        (lambda: CD(nodes=1), "at least 2 nodes"),
        (lambda: CD(decay=-0.1), r"\[0, 1\)"),
        (lambda: Penalty("pseudo_huber", "dt", -1.0), "negative"),
    ],
)
def test_unusable_choices_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_pairs_of_ect_and_ecd_are_the_same() -> None:
    """The mapping decides r alone: rows with r = 0 under ECT are those under ECD."""
    t = torch.tensor([0.2, 1.1, 2.5, 6.0, 40.0], dtype=torch.float64)
    student = network()
    rows: list[int] = []
    student.backbone.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    x_0, _, _, eps = setting()
    ECD().loss_at(student, x_0, t, eps, 2.0, beside=Beside(as_denoiser(Gaussian.white(size=SIZE).denoise, SIZE)))
    assert rows == [5, int((pair(Sigmoid(), t, 2.0)[0] > 0).sum())] == [5, 3]
