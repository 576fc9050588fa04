"""CTM: its relatives (consistency distillation, diffusion), exact students, and who is trained."""

from __future__ import annotations

import pytest
import torch
from jumping import SIZE, Net, aim_of, close, double, frozen, gradient, lander, normal, student, tape
from oracles import Gaussian, as_denoiser
from torch import Tensor

from fewstep.config import from_dict, to_dict
from fewstep.denoiser import Denoiser
from fewstep.errors import ConfigError
from fewstep.jumps import ddim, heun_step
from fewstep.objectives import CTM, Beside, Diffusion, StepRandom
from fewstep.objectives.ctm import Route
from fewstep.penalty import Penalty
from fewstep.randomness import Streams
from fewstep.sampling import sample
from fewstep.segments import axis_of
from fewstep.types import Batch, Progress

LAW = Gaussian.random(SIZE)
TEACHER = as_denoiser(LAW.denoise, SIZE)
EXACT = lander(lambda x, t, s: aim_of(LAW, x, t, s))
MEASURE = Penalty("l2", "one")


def column(values: Tensor) -> Tensor:
    return values[:, None]


def setting() -> tuple[Tensor, Route, Tensor]:
    """x_0, a route with u > s, u = s, s = 0 and u = s = 0 among its rows, eps."""
    t, u, s = double(0.5, 1.1, 2.5, 6.0, 40.0), double(0.4, 1.0, 2.0, 0.0, 20.0), double(0.1, 1.0, 0.0, 0.0, 1.0)
    return normal(5, SIZE, seed=1), Route(torch.stack((t, u)), s), normal(5, SIZE, seed=2)


def beside(target: Denoiser) -> Beside:
    return Beside(TEACHER, {"target": target})


# ------------------------------------------------------------------------------------------- routes
def test_routes_by_enumeration() -> None:
    """t over all nodes, s over all below it, u two nodes below t but not below s."""
    objective, edges = CTM(nodes=4, ahead=2), axis_of("karras", 0.5, 0.0, 80.0).edges(4)
    first = (torch.arange(16, dtype=torch.float64) // 4 + 0.5) / 4
    second = (torch.arange(16, dtype=torch.float64) % 4 + 0.5) / 4
    route = objective.route(student(), first, second)
    found = {tuple(edges.tolist().index(v) for v in row) for row in torch.vstack((route.levels, route.s)).T.tolist()}
    assert found == {(t, max(t - 1, s), max(t - 2, s), s) for t in range(1, 5) for s in range(t)}


# ---------------------------------------------------------------------------------------- relatives
def test_landing_at_zero_in_one_step_is_consistency_distillation() -> None:
    """f(x_t, t) - f'(heun(x_t), u), value and gradient; where u = 0 the teacher's D."""
    x_0, route, eps = setting()
    route = Route(route.levels, torch.zeros(5, dtype=torch.float64))
    network, target = student(two_time=True), frozen(student(two_time=True))
    got = CTM(penalty=MEASURE).loss_at(network, x_0, route, eps, beside=beside(target))
    assert target.backbone.rows == [4]
    t, u = route.levels
    x_t = x_0 + column(t) * eps
    x_u = heun_step(TEACHER, x_t, t, u)
    goal = torch.where(column(u) > 0, target(x_u, u.clamp_min(1e-3)), x_u)
    want = (network(x_t, t) - goal).norm(dim=1)
    close(got, want)
    close(gradient(network, got), gradient(network, want), 1e-10)


def test_the_comparison_at_time_zero_written_out() -> None:
    x_0, route, eps = setting()
    network, target = student(two_time=True), frozen(student(two_time=True))
    with torch.no_grad():
        for parameter in target.parameters():
            parameter.mul_(0.8)
    got = CTM(penalty=Penalty("l2", "dt")).loss_at(network, x_0, route, eps, beside=beside(target))
    for i in (0, 1, 4):  # s > 0
        t, u, s = (v[i : i + 1] for v in (*route.levels, route.s))
        x_t = x_0[i : i + 1] + column(t) * eps[i : i + 1]
        x_u = heun_step(TEACHER, x_t, t, u)
        ours = target(ddim(network(x_t, t, None, s), x_t, t, s), s, None, 0.0)
        other = x_u if i == 1 else ddim(target(x_u, u, None, s), x_u, u, s)
        theirs = target(other, s, None, 0.0)
        close(got[i : i + 1], (ours - theirs).norm(dim=1) / (t - u), 1e-10)


def test_on_the_datas_ray_it_needs_no_teacher() -> None:
    x_0, route, eps = setting()
    network, target = student(two_time=True), frozen(student(two_time=True))
    objective = CTM(step="data", penalty=MEASURE)
    assert not objective.needs_teacher and CTM().needs_teacher
    got = objective.loss_at(network, x_0, route, eps, beside=Beside(None, {"target": target}))
    t, u, s = (v[2:4] for v in (*route.levels, route.s))  # s = 0; the second row has u = 0
    x_t, x_u = x_0[2:4] + column(t) * eps[2:4], x_0[2:4] + column(u) * eps[2:4]
    goal = torch.cat((target(x_u[:1], u[:1], None, s[:1]), x_0[3:4]))
    close(got[2:4], (network(x_t, t, None, s) - goal).norm(dim=1))
    with pytest.raises(ConfigError, match="follows a teacher"):
        CTM().loss_at(network, x_0, route, eps, beside=Beside(None, {"target": target}))


def test_score_matching_where_it_lands_where_it_is() -> None:
    """The second term is EDM's loss of g(x, t, t), on the step's own noise and masks."""
    x_0, t, eps = normal(5, SIZE, seed=1), double(0.2, 1.1, 2.5, 6.0, 40.0), normal(5, SIZE, seed=2)
    network = student(two_time=True)
    got = CTM().denoising_at(network, x_0, t, eps)
    close(got, (1 / t**2 + 4) * (network(x_0 + column(t) * eps, t, None, t) - x_0).square().sum(1))
    exact = CTM().denoising_at(EXACT, x_0, t, eps)
    close(exact, Diffusion().loss_at(TEACHER, x_0, t, eps), 1e-9)


# --------------------------------------------------------------------------------- exact students
@pytest.mark.parametrize("s", [0.0, 0.7])
def test_the_exact_student_pays_heuns_error(s: float) -> None:
    """O(gap^3) in one step, and 0 with the exact solver."""
    x_0, eps = normal(7, SIZE, seed=8), normal(7, SIZE, seed=9)
    t, landing = torch.full((7,), 2.0, dtype=torch.float64), torch.full((7,), s, dtype=torch.float64)

    def loss(objective: CTM, *levels: float) -> Tensor:
        route = Route(torch.stack([t * level for level in levels]), landing)
        return objective.loss_at(EXACT, x_0, route, eps, beside=beside(EXACT)).detach().mean()

    one = CTM(penalty=MEASURE)
    orders = torch.log2(loss(one, 1.0, 0.98) / loss(one, 1.0, 0.99))
    assert float(orders) == pytest.approx(3, abs=0.1)
    two = CTM(ahead=2, penalty=MEASURE)
    assert float(loss(one, 1.0, 0.9) / loss(two, 1.0, 0.95, 0.9)) == pytest.approx(4, abs=0.7)
    straight = Gaussian.white(1e-20, SIZE)  # a point: straight trajectories, on which Heun is exact
    teacher = as_denoiser(straight.denoise, SIZE)
    landed = lander(lambda x, now, end: torch.zeros_like(x))
    route = Route(torch.stack((t, 0.8 * t)), landing)
    nothing = one.loss_at(landed, x_0, route, eps, beside=Beside(teacher, {"target": landed}))
    close(nothing, torch.zeros_like(nothing), 1e-12)


def test_a_row_that_has_arrived_stays() -> None:
    """Two Heun steps for the first row, one for the second, whose u is 0 after it."""
    x_0, eps = normal(2, SIZE, seed=1), normal(2, SIZE, seed=2)
    levels, s = torch.stack((double(4.0, 0.5), double(3.0, 0.0), double(2.0, 0.0))), double(0.0, 0.0)
    network, target = student(two_time=True), frozen(student(two_time=True))
    got = CTM(ahead=2, penalty=MEASURE).loss_at(network, x_0, Route(levels, s), eps, beside=beside(target))
    x_t = x_0 + column(levels[0]) * eps
    x_u = heun_step(TEACHER, x_t, levels[0], levels[1])
    twice = heun_step(TEACHER, x_u[:1], double(3.0), double(2.0))
    goal = torch.cat((target(twice, double(2.0)), x_u[1:]))
    close(got, (network(x_t, levels[0]) - goal).norm(dim=1))
    assert torch.isfinite(gradient(network, got)).all()


@pytest.mark.parametrize("steps", [1, 3, 6])
def test_sampling_with_the_exact_student_is_the_flow_map(steps: int) -> None:
    model = lander(lambda x, t, s: aim_of(LAW, x, t, s))
    model.sampler, times = CTM().sampler(model)
    assert times == {} and model.sampler == "jump"
    latents = Streams(5).normal("sample/latent", torch.arange(6), (SIZE,), torch.float64)
    close(sample(model, 6, steps=steps, seed=5), LAW.flow(80 * latents, 80.0, 0.0), 1e-7)


# ------------------------------------------------------------------------------------ who is trained
def test_gradient_reaches_the_student_through_the_target_but_not_the_target() -> None:
    x_0, route, eps = setting()
    network, target = student(two_time=True), frozen(student(two_time=True))
    objective = CTM(penalty=Penalty("squared_l2", "one"))
    got = objective.loss_at(network, x_0, route, eps, beside=beside(target))
    assert isinstance(network.backbone, Net) and isinstance(target.backbone, Net)
    assert network.backbone.learns == [True]
    assert target.backbone.learns == [True, False, False]  # pushes ours with gradients, lands and pushes theirs without
    assert target.backbone.rows == [3, 3, 3]  # rows with s > 0, with u > s, with s > 0
    got.sum().backward(retain_graph=True)
    assert all(p.grad is None for p in target.parameters())
    t, u, s = (v[4:] for v in (*route.levels, route.s))
    x_t = x_0[4:] + column(t) * eps[4:]
    x_u = heun_step(TEACHER, x_t, t, u)
    theirs = target(ddim(target(x_u, u, None, s), x_u, u, s), s).detach()
    landed = ddim(network(x_t, t, None, s), x_t, t, s)
    through, straight = (target(landed, s) - theirs, landed - theirs)
    close(gradient(network, got[4]), gradient(network, through.square().sum()), 1e-9)
    assert not torch.allclose(gradient(network, got[4]), gradient(network, straight.square().sum()))


def test_the_target_follows_the_student() -> None:
    assert CTM().companions() == ("target",)
    assert CTM().follow("target", Progress(10, 100), 5) == ("student", 0.999)
    assert CTM(target_ema=0.0).follow("target", Progress(10, 100), 5) == ("student", 0.0)


def test_masks_are_shared_with_the_target() -> None:
    """Identical networks and a step that moves nothing: only shared masks make the two ways equal."""
    x_0, route, eps = setting()
    network = student(two_time=True, dropout=0.4)
    target = frozen(network)
    near = Route(torch.stack((route.levels[0], route.levels[0] * (1 - 1e-9))), 0.3 * route.levels[0])
    shared = CTM(penalty=MEASURE).loss_at(network, x_0, near, eps, None, tape(5), beside(target))
    assert float(shared.max().detach()) < 1e-7
    order = torch.tensor([4, 2, 0, 3, 1])
    together = CTM().loss_at(network, x_0, route, eps, None, tape(5), beside(target))
    mixed = StepRandom(Streams(0), order, torch.device("cpu")).tape()
    shuffled = Route(route.levels[:, order], route.s[order])
    close(CTM().loss_at(network, x_0[order], shuffled, eps[order], None, mixed, beside(target)), together[order])


def test_a_step_is_its_two_parts() -> None:
    objective, network, x = CTM(weight=0.3), student(two_time=True, dropout=0.2), normal(9, SIZE)
    index = torch.arange(20, 29)
    random, company, streams = StepRandom(Streams(7), index, torch.device("cpu")), beside(frozen(network)), Streams(7)
    got = objective.loss(network, Batch(x), Progress(0, 100), random, company).per_sample
    route = objective.route(network, streams.uniform("times", index), streams.uniform("landings", index))
    eps = streams.normal("noise", index, (SIZE,), torch.float64)
    t = (-1.2 + 1.2 * torch.special.ndtri(streams.uniform("denoising", index))).exp()
    compared = objective.loss_at(network, x, route, eps, None, random.tape(), company)
    close(got, compared + 0.3 * objective.denoising_at(network, x, t, eps, None, random.tape()))
    alone = CTM(weight=0.0).loss(network, Batch(x), Progress(0, 100), random, company).per_sample
    close(alone, compared)


def test_configuration_round_trip_and_refusals() -> None:
    made = CTM(nodes=36, ahead=3, step="data", target_ema=0.0, penalty=Penalty("l2", "dt"), weight=0.5)
    assert from_dict(CTM, to_dict(made)) == made
    assert made.two_time
    for bad in ({"nodes": 0}, {"ahead": 0}, {"weight": -1.0}, {"target_ema": 1.0}):
        with pytest.raises(ConfigError, match="CTM needs"):
            CTM(**bad)  # type: ignore[arg-type]
