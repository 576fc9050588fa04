"""Multistep consistency models: the target, its limits, exact students, and one student for several step counts."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from jumping import SIZE, Net, aim_of, close, double, gradient, lander, normal, student, tape
from oracles import Gaussian, as_denoiser, quadrature
from torch import Tensor

from fewstep.config import from_dict, to_dict
from fewstep.errors import ConfigError
from fewstep.jumps import addim, ddim, euler_step, heun_step, inv_ddim
from fewstep.objectives import ECT, Beside, Multistep, StepRandom
from fewstep.objectives.aims import AdjustedDDIM, Heun, Leg, Ray, place, target_aim
from fewstep.objectives.multistep import Gaps, Grid
from fewstep.penalty import Penalty
from fewstep.randomness import Streams
from fewstep.sampling import sample
from fewstep.segments import Clocks, axis_of, gap_clocks, grid_clocks
from fewstep.times import Constant, Lognormal, Stages
from fewstep.types import Batch, Progress

LAW = Gaussian.random(SIZE)
TEACHER = as_denoiser(LAW.denoise, SIZE)
EXACT = lander(lambda x, t, s: aim_of(LAW, x, t, s))
MEASURE = Penalty("l2", "one")
SEVERAL = Multistep(segments=(1, 2, 4, 8))


def clocks_at(t: Tensor, s: Tensor, fraction: Tensor | float) -> Clocks:
    return gap_clocks(t, s, torch.as_tensor(fraction, dtype=torch.float64).expand_as(t))


def setting(fraction: float = 0.25) -> tuple[Tensor, Clocks, Tensor]:
    """x_0, clocks (the last row lands where r is, two have s = 0), eps."""
    t, s = double(0.2, 1.1, 2.5, 6.0, 40.0), double(0.1, 0.0, 1.0, 0.0, 20.0)
    return normal(5, SIZE, seed=1), clocks_at(t, s, double(*[fraction] * 4, 1.0)), normal(5, SIZE, seed=2)


def column(values: Tensor) -> Tensor:
    return values[:, None]


# ------------------------------------------------------------------------------------------ algebra
def test_two_jumps_in_a_row_have_the_aim_of_one() -> None:
    """target_aim is the published invDDIM(DDIM(g, x_r)), and invDDIM undoes DDIM."""
    x_0, clocks, eps = setting()
    t, r, s = clocks.t[:4], clocks.r[:4], clocks.s[:4]
    x_t, first, g = x_0[:4] + column(t) * eps[:4], normal(4, SIZE, seed=3), normal(4, SIZE, seed=4)
    x_r = ddim(first, x_t, t, r)
    want = inv_ddim(ddim(g, x_r, r, s), x_t, t, s)
    three = place(x_0[:4], eps[:4], Clocks(t, r, s, t - r))
    network = as_denoiser(lambda x, level: g, SIZE)
    close(target_aim(network, three, first, x_r, None, two_time=False), want)
    close(inv_ddim(ddim(g, x_t, t, s), x_t, t, s), g)


def test_a_mismatch_of_aims_is_larger_than_where_they_land() -> None:
    x_0, clocks, eps = setting()
    t, s, x_t = clocks.t, clocks.s, x_0 + column(clocks.t) * eps
    g, y = normal(5, SIZE, seed=3), normal(5, SIZE, seed=4)
    close(ddim(g, x_t, t, s) - ddim(y, x_t, t, s), column(1 - s / t) * (g - y))


@pytest.mark.parametrize("leg", [Ray(), Heun(), AdjustedDDIM(), AdjustedDDIM(eta=0.0)])
def test_every_step_lands_where_its_aim_says(leg: Leg) -> None:
    """(aim, x_r) belong together, and x_r is that of the step's own definition; r = 0 included."""
    x_0, clocks, eps = setting()
    clocks = replace(clocks, r=clocks.r.clone().index_fill_(0, torch.tensor([1]), 0.0))
    clocks = replace(clocks, gap=clocks.t - clocks.r)
    both = place(x_0, eps, clocks).pair
    x_t, t, r = both.x_t, both.t, both.r
    aim, x_r = leg(both, x_t, TEACHER)
    close(ddim(aim, x_t, t, r), x_r)
    error = LAW.denoise(x_t, t) - x_0
    want = {
        "data": x_0 + column(r) * eps,
        "heun": heun_step(TEACHER, x_t, t, r),
        "addim": addim(TEACHER(x_t, t), x_t, t, r, getattr(leg, "eta", 0.0) * error.square().mean(1)),
    }[leg.kind]
    close(x_r, want)
    assert leg.needs_teacher == (leg.kind != "data")


def test_addim_without_variance_is_ddim_and_tends_to_it() -> None:
    x_0, _, eps = setting()
    t = double(0.2, 1.1, 2.5, 6.0, 40.0)
    distances = []
    for part in (1e-2, 5e-3):
        both = place(x_0, eps, clocks_at(t, torch.zeros(5, dtype=torch.float64), part)).pair
        plain = euler_step(TEACHER, both.x_t, both.t, both.r)
        close(AdjustedDDIM(eta=0.0)(both, both.x_t, TEACHER)[1], plain)
        distances.append((AdjustedDDIM()(both, both.x_t, TEACHER)[1] - plain).norm(dim=1))
    assert (distances[1] > 0).all()
    ratio = distances[0] / distances[1]  # second order in the gap
    assert ((ratio > 3.9) & (ratio < 4.1)).all()


# ------------------------------------------------------------------------------------ known limits
@pytest.mark.parametrize("ratio", [2.0, 16.0])
def test_one_segment_with_ects_gaps_is_ect(ratio: float) -> None:
    """Value and gradient, with shared dropout masks, from the law down."""
    schedule, penalty = Stages(q=ratio, last=0), Penalty("pseudo_huber", "dt", 0.03)
    ours = Multistep(segments=(1,), pairing=Gaps(schedule=schedule), penalty=penalty)
    ect = ECT(schedule=schedule, penalty=penalty)
    batch, now = Batch(normal(8, SIZE)), Progress(0, 100)
    network = student(dropout=0.3)
    losses = [
        o.loss(network, batch, now, StepRandom(Streams(0), torch.arange(8), torch.device("cpu"))).per_sample
        for o in (ours, ect)
    ]
    close(*losses)
    close(*(gradient(network, v) for v in losses))
    assert ours.describe(now) == ect.describe(now)


def test_one_segment_on_the_grid_is_consistency_training() -> None:
    """f(x_0 + t eps, t) against f(x_0 + r eps, r) at neighbouring Karras nodes, x_0 below the lowest."""
    network, axis, size = student(), axis_of("karras", 0.5, 0.0, 80.0), 6
    x_0, eps = normal(size, SIZE), normal(size, SIZE, seed=5)
    u = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    clocks = grid_clocks(axis, u, torch.ones(size, dtype=torch.int64), size)
    got = Multistep(segments=(1,)).loss_at(network, x_0, clocks, eps)
    nodes = axis.edges(size)
    t, r = nodes[1:], nodes[:-1]
    target = network(x_0[1:] + column(r[1:]) * eps[1:], r[1:]).detach()
    delta = network(x_0 + column(t) * eps, t) - torch.cat((x_0[:1], target))
    want = (1 / t**2 + 1) * ((delta.square().sum(1) + 1e-8).sqrt() - 1e-4)
    close(got, want, 1e-10)
    close(gradient(network, got), gradient(network, want), 1e-9)


def test_rows_that_land_at_once_compare_with_the_data_and_stay_out_of_the_network() -> None:
    x_0, clocks, eps = setting(fraction=1.0)
    network = student()
    got = Multistep(penalty=MEASURE).loss_at(network, x_0, clocks, eps)
    assert network.backbone.rows == [5]
    close(got, (network(x_0 + column(clocks.t) * eps, clocks.t) - x_0).norm(dim=1))
    mixed = setting()[1]
    Multistep(penalty=MEASURE).loss_at(network, x_0, mixed, eps)
    assert network.backbone.rows[-2:] == [5, 4]


def test_gradient_flows_through_the_student_only() -> None:
    x_0, clocks, eps = setting()
    network = student(two_time=True)
    got = SEVERAL.loss_at(network, x_0, clocks, eps)
    assert network.backbone.learns == [True, False]
    x_t, x_r = x_0 + column(clocks.t) * eps, x_0 + column(clocks.r) * eps
    g = network(x_r, clocks.r, None, clocks.s)
    y = inv_ddim(ddim(g, x_r, clocks.r, clocks.s), x_t, clocks.t, clocks.s)
    out = network(x_t, clocks.t, None, clocks.s)
    constant, leaking = (SEVERAL.penalty(out - v, clocks.t, clocks.clean_gap) for v in (y.detach(), y))
    close(got, constant, 1e-9)
    close(gradient(network, got), gradient(network, constant), 1e-8)
    assert float((gradient(network, got) - gradient(network, leaking)).norm()) > 1e-3


@pytest.mark.parametrize("weight", ["dt", "snr+1"])
def test_the_gap_of_a_weight_is_seen_from_the_aim(weight: str) -> None:
    """1/(t - r) weighs the mismatch where it lands: (1 - s/t)/(t - r) for the aims; 1/t on rows that land at once."""
    x_0, clocks, eps = setting()
    network = student()
    plain = Multistep(penalty=MEASURE).loss_at(network, x_0, clocks, eps)
    got = Multistep(penalty=Penalty("l2", weight)).loss_at(network, x_0, clocks, eps)  # type: ignore[arg-type]
    t, r, s = clocks.t, clocks.r, clocks.s
    want = {"dt": (1 - s / t) / (t - r), "snr+1": 1 / t**2 + 1}[weight]
    close(got, plain * want)
    assert weight != "dt" or float(want[4]) == pytest.approx(1 / 40)


# --------------------------------------------------------------------------------- exact students
def residual(objective: Multistep, part: float, t: float = 3.0, s: float = 1.0) -> Tensor:
    """|g - y| of the exact student at a gap of ``part`` of t - s."""
    x_0, eps = normal(7, SIZE, seed=8), normal(7, SIZE, seed=9)
    times = torch.full((7,), t, dtype=torch.float64)
    clocks = clocks_at(times, torch.full_like(times, s), part)
    return objective.loss_at(EXACT, x_0, clocks, eps, beside=Beside(TEACHER)).detach()


@pytest.mark.parametrize(("leg", "order"), [(Heun(), 3), (AdjustedDDIM(eta=0.0), 2), (AdjustedDDIM(), 2), (Ray(), 1)])
@pytest.mark.parametrize("s", [0.0, 1.0])
def test_the_exact_student_pays_the_steps_local_error(leg: Leg, order: int, s: float) -> None:
    """Heun O(gap^3), Euler and aDDIM O(gap^2), the data's ray O(gap) (and 0 only in the mean)."""
    objective = replace(SEVERAL, step=leg, penalty=MEASURE)
    coarse, fine = (residual(objective, part, s=s) for part in (1e-2, 5e-3))
    assert float(fine.min()) > 1e-10
    orders = (coarse / fine).log2()
    assert float(orders.mean()) == pytest.approx(order, abs=0.06)


def test_with_an_exact_step_the_exact_student_pays_nothing() -> None:
    """The semigroup: landing from the true x_r is landing from x_t, for every t, r and s."""
    x_0, clocks, eps = setting()
    x_t = x_0 + column(clocks.t) * eps
    x_r = LAW.flow(x_t, clocks.t, clocks.r)
    aim = inv_ddim(x_r, x_t, clocks.t, clocks.r)
    three = place(x_0, eps, clocks)
    y = target_aim(EXACT, three, aim, x_r, None, two_time=True)
    close(y, aim_of(LAW, x_t, clocks.t, clocks.s), 1e-9)


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("spacing", ["karras", "cosine"])
def test_sampling_with_the_exact_student_is_the_flow_map(spacing: str, steps: int) -> None:
    objective = replace(SEVERAL, spacing=spacing)  # type: ignore[arg-type]
    model = lander(lambda x, t, s: aim_of(LAW, x, t, s))
    kind, model.sampler_times = objective.sampler(model)
    assert kind == "jump" and sorted(model.sampler_times) == [1, 2, 4, 8]
    latents = Streams(5).normal("sample/latent", torch.arange(6), (SIZE,), torch.float64)
    close(sample(model, 6, steps=steps, seed=5), LAW.flow(80 * latents, 80.0, 0.0), 1e-7)


def test_a_student_that_is_not_told_knows_its_own_edges_only() -> None:
    one = Multistep(segments=(8,))
    assert not one.two_time and SEVERAL.two_time and not Multistep(segments=(8, 8)).two_time
    kind, times = one.sampler(student())
    assert (kind, list(times)) == ("jump", [8])
    assert times[8] == axis_of("karras", 0.5, 0.0, 80.0).levels(8)


# ------------------------------------------------------------------------------ several step counts
def test_each_row_lands_on_its_own_edge() -> None:
    """At the same t, rows differ by their count alone: the network is told each row's s, in both passes."""
    t = torch.full((4,), 70.0, dtype=torch.float64)
    counts = torch.tensor([1, 2, 4, 8])
    x_0, eps = normal(4, SIZE, seed=1), normal(4, SIZE, seed=2)
    network = student(two_time=True)
    axis = SEVERAL.axis(network)
    s = axis.lower_edge(t, counts)
    assert len(set(s.tolist())) == 4
    together = SEVERAL.loss_at(network, x_0, clocks_at(t, s, 0.1), eps)
    told = network.parametrization.c_landing(t, s)
    close(network.backbone.told[0][:, 1:], told)
    close(network.backbone.told[1][:, 1:2], told[:, :1])
    for i in range(4):
        one = slice(i, i + 1)
        alone = SEVERAL.loss_at(network, x_0[one], clocks_at(t[one], s[one], 0.1), eps[one])
        close(alone, together[one])
    moved = SEVERAL.loss_at(network, x_0, clocks_at(t, s.roll(1), 0.1), eps)
    assert ((moved - together).abs() > 1e-3).all()


def test_counts_are_as_likely_as_they_are_named() -> None:
    u = (torch.arange(100, dtype=torch.float64) + 0.5) / 100
    assert torch.bincount(SEVERAL.draw_counts(u)).tolist() == [0, 25, 25, 0, 25, 0, 0, 0, 25]
    weighed = Multistep(segments=(1, 1, 1, 2, 8))
    assert torch.bincount(weighed.draw_counts(u)).tolist() == [0, 60, 20, 0, 0, 0, 0, 0, 20]


@pytest.mark.parametrize("pairing", [Grid(), Gaps(schedule=Stages(q=8, last=0))])
def test_a_step_draws_count_times_and_noise_from_the_rows_streams(pairing: Grid | Gaps) -> None:
    objective, network, x = replace(SEVERAL, pairing=pairing), student(two_time=True, dropout=0.2), normal(9, SIZE)
    index, now = torch.arange(20, 29), Progress(25, 100)
    random = StepRandom(Streams(7), index, torch.device("cpu"))
    got = objective.loss(network, Batch(x), now, random).per_sample
    streams = Streams(7)
    counts = torch.tensor([1, 2, 4, 8])[(4 * streams.uniform("segments", index)).long()]
    u, axis = streams.uniform("times", index), objective.axis(network)
    if isinstance(pairing, Grid):
        clocks = grid_clocks(axis, u, counts, math.sqrt(64 * 1280))
    else:
        t = (-1.1 + 2.0 * torch.special.ndtri(u)).exp()
        clocks = gap_clocks(t, axis.lower_edge(t, counts), pairing.mapping.n(t) / 8)
    eps = streams.normal("noise", index, (SIZE,), torch.float64)
    close(got, objective.loss_at(network, x, clocks, eps, tape=random.tape()))


# -------------------------------------------------------------------------------------- fixed point
def linear_student(variance: float, levels: list[float], s: float) -> list[float]:
    """Gains b(t) that minimise the expected loss on the data's ray, from the lower edge up (one dimension).

    ``b(t) = (1 - a) lam/(lam + t^2) + a b(r) (lam + r t)/(lam + t^2)``, since E[x_0|x_t] and E[x_r|x_t] are linear.
    """
    gains: list[float] = []
    for r, t in zip([s, *levels], levels, strict=False):
        a = 0.0 if r == s else t * (r - s) / (r * (t - s))
        below = gains[-1] if gains else 0.0
        gains.append(((1 - a) * variance + a * below * (variance + r * t)) / (variance + t**2))
    return gains


def test_the_fixed_point_on_a_gaussian() -> None:
    """The recursion's gains are where the expected loss is stationary, and land under-dispersed to first order."""
    variance, s, top = 0.25, 0.8, 3.0
    x_0, eps, weights = quadrature(variance, 8)
    objective = Multistep(penalty=Penalty("squared_l2", "one"))
    biases = []
    for nodes in (8, 16, 32):
        levels = torch.linspace(s, top, nodes + 1, dtype=torch.float64)[1:].tolist()
        gains = linear_student(variance, levels, s)
        scale = torch.tensor(gains[-1], dtype=torch.float64, requires_grad=True)
        network = as_denoiser(lambda x, t, g=gains, k=scale, m=levels[-1]: x * torch.where(t[:, None] == m, k, g[-2]))
        full = torch.full((len(x_0),), top, dtype=torch.float64)
        r = torch.full_like(full, levels[-2])
        clocks = Clocks(full, r, torch.full_like(full, s), full - r)
        loss = weights @ objective.loss_at(network, x_0, clocks, eps)
        (slope,) = torch.autograd.grad(loss, scale)
        assert abs(float(slope)) < 1e-12
        landing = gains[-1] + s / top * (1 - gains[-1])
        biases.append(math.log(landing / math.sqrt((variance + s**2) / (variance + top**2))))
    assert all(b < 0 for b in biases)
    assert 1.9 < biases[0] / biases[1] < 2.3 and 1.9 < biases[1] / biases[2] < 2.15


# ----------------------------------------------------------------------------------------- numerics
@pytest.mark.parametrize("leg", [Ray(), Heun(), AdjustedDDIM()])
def test_float32_where_the_segment_is_narrow(leg: Leg) -> None:
    """t - s = 1e-6 t: the published form, (t x_s - s x_t)/(t - s), loses every digit there."""
    s = double(0.1, 1.0, 5.0, 20.0, 60.0)
    clocks = clocks_at(s * (1 + 1e-6), s, 0.3)
    x_0, eps = normal(5, SIZE, seed=1), normal(5, SIZE, seed=2)
    network = as_denoiser(lambda x, t: torch.tanh(x) * torch.cos(t)[:, None], SIZE)
    teacher = as_denoiser(lambda x, t: 0.25 * x / (0.25 + t[:, None] ** 2), SIZE)
    objective = Multistep(penalty=MEASURE, step=leg)
    exact = objective.loss_at(network, x_0, clocks, eps, beside=Beside(teacher))
    single = objective.loss_at(network.float(), x_0.float(), clocks, eps.float(), beside=Beside(teacher.float()))
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), exact, rtol=2e-5, atol=2e-5)
    naive = inv_ddim(*((x_0 + column(v) * eps).float() for v in (s, clocks.t)), clocks.t.float(), s.float())
    assert not torch.allclose(naive.double(), x_0, rtol=0.1, atol=0.1)


# ------------------------------------------------------------------------------------ configuration
@pytest.mark.parametrize(
    "made",
    [
        Multistep(),
        Multistep((1, 2, 4, 8), "cosine", Gaps(Lognormal(-0.8, 1.6), Constant()), Heun(2.0), Penalty("l2", "dt")),
        Multistep(step=AdjustedDDIM(eta=0.5)),
    ],
)
def test_configuration_round_trip(made: Multistep) -> None:
    assert from_dict(Multistep, to_dict(made)) == made
    assert made.needs_teacher == (made.step.kind != "data")


def test_refusals() -> None:
    for segments in ((), (0,), (4, -1)):
        with pytest.raises(ConfigError, match="segments of at least 1"):
            Multistep(segments=segments)
    for bad in ({"first": 0}, {"first": 100, "last": 50}, {"share": 1.5}):
        with pytest.raises(ConfigError, match="1 <= first <= last"):
            Grid(**bad)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="eta of aDDIM"):
        AdjustedDDIM(eta=-0.1)
    x_0, clocks, eps = setting()
    with pytest.raises(ConfigError, match="follows a teacher"):
        Multistep(step=Heun()).loss_at(student(), x_0, clocks, eps)


def test_masks_are_shared_on_the_rows_that_have_a_target() -> None:
    x_0, clocks, eps = setting()
    network = student(two_time=True, dropout=0.3)
    together = SEVERAL.loss_at(network, x_0, clocks, eps, tape=tape(5))
    order = torch.tensor([4, 2, 0, 3, 1])
    shuffled = Clocks(*(v[order] for v in (clocks.t, clocks.r, clocks.s, clocks.gap)))
    random = StepRandom(Streams(0), order, torch.device("cpu"))
    close(SEVERAL.loss_at(network, x_0[order], shuffled, eps[order], tape=random.tape()), together[order])
    assert isinstance(network.backbone, Net)
