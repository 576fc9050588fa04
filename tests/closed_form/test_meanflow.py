"""MeanFlow against its definition in flow coordinates, and against data whose flow is known (math.md 3.9, 8.2)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from oracles import Gaussian, PointMasses, as_denoiser, quadrature
from torch import Tensor, nn

from fewstep.backbones import build
from fewstep.backbones.small import MLP
from fewstep.backbones.two_time import with_landing
from fewstep.config import from_dict, to_dict
from fewstep.denoiser import Denoiser, Parametrization
from fewstep.errors import ConfigError
from fewstep.jumps import ddim, inv_ddim
from fewstep.objectives import OBJECTIVES, StepRandom
from fewstep.objectives.base import Beside
from fewstep.objectives.meanflow import MeanFlow, target
from fewstep.process import EDM, DiscreteVP, RectifiedFlow
from fewstep.randomness import Streams
from fewstep.sampling import sample
from fewstep.times import Lognormal
from fewstep.types import Batch, Progress

SIZE = 4
TIMES = torch.tensor([0.05, 0.3, 0.7, 2.0, 40.0], dtype=torch.float64)
LANDINGS = torch.tensor([0.01, 0.3, 0.0, 1.5, 3.0], dtype=torch.float64)
ALL = torch.arange(len(TIMES))
START = Progress(0, 1000)
PLAIN = MeanFlow(derivative="jvp")
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch.func.jvp

TwoTimes = Callable[[Tensor, Tensor, Tensor], Tensor]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(name: str = "mlp", **kwargs: Any) -> Denoiser:
    """A random two-time EDM network in float64 without a zero parameter."""
    spec = {"name": name, "kwargs": kwargs or {"sample_shape": [SIZE], "width": 16, "depth": 2}}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        shape = tuple(spec["kwargs"]["sample_shape"])
        plain = Denoiser(build(spec), EDM(), Parametrization("edm"), sample_shape=shape, spec=spec)
        student = with_landing(plain)
        for parameter in student.parameters():
            parameter.data.add_(0.2 * torch.randn_like(parameter))
    return student.double().train()


class Exact(Denoiser):
    """A function g(x, t, s) as a two-time student under the EDM clock."""

    def __init__(self, function: TwoTimes, size: int = SIZE) -> None:
        super().__init__(nn.Identity(), EDM(), Parametrization("x0"), sample_shape=(size,))
        self.function = function

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        cond: Tensor | None = None,
        s: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor:
        assert s is not None
        return self.function(x_t, t, s)


def jumping(law: Gaussian) -> TwoTimes:
    """The g whose landing point is the law's exact flow map."""

    def g(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return inv_ddim(law.flow(x, t, s), x, t, s)

    return g


def rows() -> tuple[Tensor, Tensor, Tensor]:
    """``x_0, eps, x_t``."""
    x_0, eps = 0.5 * normal(len(TIMES), SIZE, seed=1), normal(len(TIMES), SIZE, seed=2)
    return x_0, eps, x_0 + TIMES[:, None] * eps


def flow_time(t: Tensor) -> Tensor:
    return t / (1 + t)


def average_velocity(student: Denoiser) -> TwoTimes:
    """``u(z, tau, rho) = (z - g)/tau`` in flow coordinates, with the student called on the flow's own clock."""
    twin = student.under(RectifiedFlow())
    return lambda z, tau, rho: (z - twin(z, tau, None, rho)) / tau[:, None]


def by_definition(student: Denoiser, x_t: Tensor, clean: Tensor) -> tuple[Tensor, Tensor]:
    """``u`` and ``v - (tau - rho) du/dtau`` (eq. 3.4), by torch.func.jvp with the tangent (v, 1, 0)."""
    tau, rho = flow_time(TIMES), flow_time(LANDINGS)
    z = x_t / (1 + TIMES[:, None])
    v = (z - clean) / tau[:, None]
    tangent = (v, torch.ones_like(tau), torch.zeros_like(rho))
    u, slope = torch.func.jvp(average_velocity(student), (z, tau, rho), tangent)
    return u, v - (tau - rho)[:, None] * slope


def goal_of(objective: MeanFlow, student: Denoiser, x_t: Tensor, clean: Tensor) -> Tensor:
    slope = objective.slope(student, x_t, TIMES, LANDINGS, clean, ALL)
    return target(student(x_t, TIMES, None, LANDINGS).detach(), slope, clean, TIMES, LANDINGS)


# ------------------------------------------------------------------------------------- the identity
@pytest.mark.parametrize(("method", "bound"), [("jvp", 1e-10), ("finite", 1e-5)])
def test_the_target_is_equation_3_4(method: Any, bound: float) -> None:
    student = network()
    x_0, _, x_t = rows()
    u, want = by_definition(student, x_t, x_0)
    z, tau = x_t / (1 + TIMES[:, None]), flow_time(TIMES)[:, None]
    got = (z - goal_of(replace(PLAIN, derivative=method), student, x_t, x_0)) / tau
    torch.testing.assert_close(got, want, rtol=bound, atol=bound)
    assert ((got - u).norm(dim=1) > 0.1).all()


def test_the_loss_is_the_adaptive_square_of_the_velocities() -> None:
    """``E/(E + c)^p``, E the sum of squares; gradient ``2 (du)^T e/(E + c)^p``, nothing through the target."""
    student = network()
    x_0, eps, x_t = rows()
    _, want = by_definition(student, x_t, x_0)
    z, tau = x_t / (1 + TIMES[:, None]), flow_time(TIMES)
    u = average_velocity(student)(z, tau, flow_time(LANDINGS))
    residual = (u - want).detach()
    error = residual.square().sum(1)
    for p, c in ((0.75, 1e-3), (1.0, 0.5), (0.0, 1.0)):
        per_sample = replace(PLAIN, p=p, c=c).loss_at(student, x_0, TIMES, LANDINGS, eps)
        torch.testing.assert_close(per_sample, error / (error + c) ** p, rtol=1e-9, atol=0)
        got = torch.autograd.grad(per_sample.sum(), list(student.parameters()))
        pull = 2 * residual / ((error + c) ** p)[:, None]
        wanted = torch.autograd.grad(u, list(student.parameters()), grad_outputs=pull, retain_graph=True)
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)


def test_the_identity_holds_on_the_exact_flow() -> None:
    """Zero for the exact g of a correlated Gaussian along its own velocity; not for its denoiser."""
    law = Gaussian.random(SIZE, seed=3)
    _, _, x_t = rows()
    clean = law.denoise(x_t, TIMES)
    inside = LANDINGS < TIMES
    some = torch.nonzero(inside)[:, 0]
    x, t, s, d = x_t[some], TIMES[some], LANDINGS[some], clean[some]
    for g, exact in ((jumping(law), True), (lambda x, t, s: law.denoise(x, t), False)):
        student = Exact(g)
        slope = PLAIN.slope(student, x, t, s, d, torch.arange(len(some)))
        miss = target(g(x, t, s), slope, d, t, s) - g(x, t, s)
        assert (miss.abs().max() < 1e-11) if exact else (miss.abs().max() > 0.1)


def test_landing_where_one_is_is_flow_matching() -> None:
    """s = t: ``|u - v|^2`` with ``v = eps - x_0``, and no derivative is taken."""
    student = network()
    x_0, eps, x_t = rows()
    passes: list[bool] = []
    handle = student.backbone.register_forward_pre_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    got = replace(PLAIN, p=0.0).loss_at(student, x_0, TIMES, TIMES, eps)
    handle.remove()
    z, tau = x_t / (1 + TIMES[:, None]), flow_time(TIMES)
    u = average_velocity(student)(z, tau, tau)
    torch.testing.assert_close(got, (u - (eps - x_0)).square().sum(1), rtol=1e-9, atol=0)
    assert passes == [True]


def test_landing_at_zero_is_continuous_time_consistency() -> None:
    """s = 0: the target moves f by ``-(1 + t) df/dln t``, which vanishes for the exact end point alone."""
    law = Gaussian.random(SIZE, seed=4)
    _, _, x = rows()
    zero = torch.zeros_like(TIMES)
    clean = law.denoise(x, TIMES)
    student = Exact(lambda x, t, s: law.endpoint(x, t))
    slope = PLAIN.slope(student, x, TIMES, zero, clean, ALL)
    out = law.endpoint(x, TIMES)
    assert slope.abs().max() < 1e-12
    torch.testing.assert_close(target(out, slope, clean, TIMES, zero), out, rtol=0, atol=1e-12)
    made_up = normal(*x.shape, seed=9)
    want = out - (1 + TIMES)[:, None] * made_up
    torch.testing.assert_close(target(out, made_up, clean, TIMES, zero), want, rtol=1e-12, atol=1e-12)


def test_the_expected_target_is_the_teachers() -> None:
    """``E[target | x_t]`` over the exact posterior of x_0, for any network."""
    points = 0.6 * normal(5, SIZE, seed=4)
    law = PointMasses(points, torch.tensor([0.1, 0.3, 0.2, 0.15, 0.25], dtype=torch.float64))
    student = network()
    _, _, x_t = rows()
    posterior = law._logits(x_t, TIMES).softmax(1)
    each = torch.stack([goal_of(PLAIN, student, x_t, p.expand_as(x_t)) for p in points], dim=1)
    mean = (posterior[:, :, None] * each).sum(1)
    torch.testing.assert_close(mean, goal_of(PLAIN, student, x_t, law.denoise(x_t, TIMES)), rtol=0, atol=1e-11)
    assert (posterior[:, :, None] * (each - mean[:, None]) ** 2).sum((1, 2)).sqrt()[2] > 0.2


def test_the_expected_gradient_vanishes_at_the_flow_map_only() -> None:
    """On N(0, 1/4), quadrature over x_0 and eps, p = 0: for jumps to 0, to half the level, and to nowhere."""
    x_0, eps, weights = quadrature(0.25)
    law = Gaussian.white(0.25, 1)
    exact, wrong = jumping(law), lambda x, t, s: law.denoise(x, t)
    for g, right in ((exact, True), (wrong, False)):
        worst = 0.0
        for time, ratio in ((0.1, 0.5), (0.5, 0.0), (3.0, 0.5), (3.0, 0.0)):
            gain = nn.Parameter(torch.ones((), dtype=torch.float64))
            student = Exact(lambda x, t, s, a=gain, g=g: a * g(x, t, s), 1)
            t = torch.full((len(x_0),), time, dtype=torch.float64)
            per_sample = replace(PLAIN, p=0.0).loss_at(student, x_0, t, ratio * t, eps)
            (gradient,) = torch.autograd.grad((weights * per_sample).sum(), gain)
            worst = max(worst, abs(float(gradient)))
        assert worst < 1e-10 if right else worst > 0.1


# ------------------------------------------------------------------------------------- jumps
def test_a_jump_is_a_step_along_the_average_velocity() -> None:
    """``z_rho = z - (tau - rho) u`` is ``x_s = g + (s/t)(x_t - g)``, for any network; to 0 it is ``z - tau u``."""
    student = network()
    _, _, x_t = rows()
    tau = flow_time(TIMES)
    z = x_t / (1 + TIMES[:, None])
    for s in (LANDINGS, torch.zeros_like(TIMES)):
        rho = flow_time(s)
        u = average_velocity(student)(z, tau, rho)
        landed = ddim(student(x_t, TIMES, None, s), x_t, TIMES, s)
        torch.testing.assert_close(landed / (1 + s[:, None]), z - (tau - rho)[:, None] * u, rtol=1e-10, atol=1e-11)


def test_one_step_from_the_top() -> None:
    """:func:`fewstep.sample` of a trained student: ``x_0 = z - tau u(z, 0, tau)`` at ``tau = T/(1 + T)``."""
    student = network().eval()
    student.sampler, student.sampler_times = PLAIN.sampler(student)
    got = sample(student, 3, steps=1, seed=5)
    top = torch.full((3,), student.sigma_max, dtype=torch.float64)
    noise = Streams(5).normal("sample/latent", torch.arange(3), (SIZE,), torch.float64)
    tau = flow_time(top)
    z = student.sigma_max * noise / (1 + student.sigma_max)
    want = z - tau[:, None] * average_velocity(student)(z, tau, torch.zeros_like(tau))
    torch.testing.assert_close(got, want.detach(), rtol=1e-9, atol=1e-10)


def test_jumps_compose() -> None:
    """``Phi_{s->r} Phi_{t->s} = Phi_{t->r}`` for the exact g, as the sampler jumps."""
    law = Gaussian.random(SIZE, seed=5)
    g = jumping(law)
    _, _, x = rows()
    t, s, r = TIMES, TIMES / 2, TIMES / 10
    via = ddim(g(x, t, s), x, t, s)
    twice = ddim(g(via, s, r), via, s, r)
    torch.testing.assert_close(twice, ddim(g(x, t, r), x, t, r), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(twice, law.flow(x, t, r), rtol=1e-12, atol=1e-12)


def test_the_samplers_levels_are_even_in_tau() -> None:
    how, levels = PLAIN.sampler(network())
    assert how == "jump"
    assert set(levels) == {1, 2, 4, 8}
    for steps, ts in levels.items():
        assert ts[0] == pytest.approx(80)
        taus = [t / (1 + t) for t in ts] + [0]
        assert [a - b for a, b in itertools.pairwise(taus)] == pytest.approx([80 / 81 / steps] * steps)


# ------------------------------------------------------------------------------------- times
def step(count: int) -> StepRandom:
    return StepRandom(Streams(3), torch.arange(count), torch.device("cpu"))


def test_times_are_two_sorted_logit_normals() -> None:
    count = 20_000
    t, s = MeanFlow().times(network(), step(count))
    assert (t >= s).all() and (s >= 0).all()
    assert float((t == s).double().mean()) == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / count))
    logits = flow_time(torch.stack((t, s))).logit()  # ln(tau/(1 - tau)) = ln t
    apart = t > s
    for q in (-6.0, -3.0, -1.0, 1.0):
        one, two = (float(torch.special.ndtr(torch.tensor((q - m) / 1.6))) for m in (-0.6, -4.0))
        later = float((logits[0] <= q).double().mean())
        earlier = float((logits[1][apart] <= q).double().mean())
        assert later == pytest.approx(one * two, abs=4 * 0.5 / math.sqrt(count))
        assert earlier == pytest.approx(1 - (1 - one) * (1 - two), abs=4 * 0.5 / math.sqrt(0.75 * count))


def test_times_stay_where_a_discrete_network_was_trained() -> None:
    """Below its least noise level a landing counts as clean."""
    process = DiscreteVP.linear()
    student = Denoiser(
        MLP((SIZE,), width=16), process, Parametrization("eps", time="native"), sample_shape=(SIZE,)
    ).under(EDM())
    t, s = MeanFlow(landing=Lognormal(-4.0, 1.6)).times(student, step(4000))
    assert student.sigma_min > 0.009
    assert t.min() >= student.sigma_min and t.max() <= student.sigma_max
    assert ((s == 0) | (s >= student.sigma_min)).all()
    assert 0.2 < float((s == 0).double().mean()) < 0.4


def test_a_step_draws_times_and_noise() -> None:
    student, batch, objective = network(), Batch(0.5 * normal(6, SIZE, seed=5)), replace(PLAIN, equal=0.5)
    t, s = objective.times(student, step(6))
    eps = step(6).normal("noise", batch.x)
    assert 0 < int((t == s).sum()) < 6
    got = objective.loss(student, batch, START, step(6)).per_sample
    torch.testing.assert_close(got, objective.loss_at(student, batch.x, t, s, eps), rtol=1e-12, atol=0)


# ------------------------------------------------------------------------------------- networks
IMAGES: dict[str, dict[str, Any]] = {
    "unet": {"sample_shape": [1, 8, 8], "channels": 8, "blocks": 1, "attention": [8], "dropout": 0.3},
    "dit": {"sample_shape": [1, 8, 8], "width": 16, "depth": 1, "heads": 2, "dropout": 0.3},
}


@pytest.mark.parametrize("name", IMAGES)
def test_forward_mode_and_finite_differences_agree_under_dropout(name: str) -> None:
    """One row has s = t: its mask is left out of the derivative, and the others keep theirs."""
    student = network(name, **IMAGES[name])
    t = torch.tensor([0.05, 0.3, 0.7, 5.0], dtype=torch.float64)
    s = torch.tensor([0.01, 0.3, 0.0, 2.0], dtype=torch.float64)
    x_0, eps = 0.5 * normal(4, 1, 8, 8, seed=1), normal(4, 1, 8, 8, seed=2)

    def loss(method: Any, shared: bool = True) -> Tensor:
        tape = step(4).tape() if shared else None
        torch.manual_seed(0)
        return replace(PLAIN, derivative=method).loss_at(student, x_0, t, s, eps, tape=tape)

    torch.testing.assert_close(loss("jvp"), loss("finite"), rtol=1e-5, atol=0)
    torn = loss("finite", shared=False)  # every pass has masks of its own
    assert ((torn / loss("finite"))[[0, 2, 3]] > 10).all()
    alone = [
        replace(PLAIN, derivative="jvp").loss_at(
            student, x_0[i : i + 1], t[i : i + 1], s[i : i + 1], eps[i : i + 1],
            tape=StepRandom(Streams(3), torch.tensor([i]), torch.device("cpu")).tape(),
        )
        for i in range(4)
    ]  # fmt: skip
    torch.testing.assert_close(loss("jvp"), torch.cat(alone), rtol=1e-9, atol=0)


def test_the_derivative_is_taken_only_where_it_is_needed() -> None:
    student = network()
    seen: list[tuple[int, bool]] = []
    student.backbone.register_forward_pre_hook(lambda _, args: seen.append((len(args[0]), torch.is_grad_enabled())))
    x_0, eps, _ = rows()
    PLAIN.loss_at(student, x_0, TIMES, LANDINGS, eps)
    assert seen == [(5, True), (4, False)]


def test_the_teachers_velocity() -> None:
    law = Gaussian.random(SIZE, seed=6)
    teacher, student = as_denoiser(law.denoise, SIZE).eval(), network()
    distilling = replace(PLAIN, velocity="teacher", p=0.0)
    assert distilling.needs_teacher and not PLAIN.needs_teacher
    x_0, eps, x_t = rows()
    got = distilling.loss_at(student, x_0, TIMES, LANDINGS, eps, beside=Beside(teacher=teacher))
    u, want = by_definition(student, x_t, law.denoise(x_t, TIMES))
    torch.testing.assert_close(got, (u - want).square().sum(1), rtol=1e-8, atol=0)
    with pytest.raises(ConfigError, match="teacher"):
        distilling.loss_at(student, x_0, TIMES, LANDINGS, eps)


def test_configuration() -> None:
    assert OBJECTIVES["meanflow"] is MeanFlow
    made = MeanFlow(velocity="teacher", equal=0.5, p=1.0, c=0.01, derivative="finite")
    assert from_dict(MeanFlow, to_dict(made)) == made
    assert made.two_time
    assert made.prepare(network()) == made
    assert MeanFlow().prepare(network()).derivative == "jvp"
    for bad in ({"equal": 1.1}, {"p": -0.5}, {"c": 0.0}):
        with pytest.raises(ConfigError, match="MeanFlow needs"):
            MeanFlow(**bad)
