"""sCM against its definition in TrigFlow coordinates, and against data whose flow is known (math.md 3.8, 8.2)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from oracles import Gaussian, Mixture, PointMasses, as_denoiser, exact_denoiser, quadrature
from torch import Tensor, nn

from fewstep.backbones.small import MLP
from fewstep.config import from_dict, to_dict
from fewstep.denoiser import Denoiser, Parametrization
from fewstep.errors import ConfigError
from fewstep.objectives import OBJECTIVES, StepRandom
from fewstep.objectives.base import ALONE, Beside
from fewstep.objectives.scm import SCM, LearnedWeight
from fewstep.process import EDM, Process, TrigFlow
from fewstep.randomness import Streams
from fewstep.types import Batch, Progress

SIZE, SIGMA = 4, 0.5
TIMES = torch.tensor([0.01, 0.2, 0.7, 2.0, 40.0], dtype=torch.float64)
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch.func.jvp
PLAIN = SCM(learned_weight=False, derivative="jvp")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(dropout: float = 0.0, sigma_data: float = SIGMA, seed: int = 0) -> Denoiser:
    """A random EDM network in float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = MLP((SIZE,), width=16, depth=2)
        for parameter in backbone.parameters():
            parameter.data.add_(0.2 * torch.randn_like(parameter))
    return Denoiser(backbone, EDM(), Parametrization("edm", sigma_data), sample_shape=(SIZE,)).double().train()


def rows() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``x_0, eps, t, x_t``."""
    x_0, eps = 0.5 * normal(len(TIMES), SIZE, seed=1), normal(len(TIMES), SIZE, seed=2)
    return x_0, eps, TIMES, x_0 + TIMES[:, None] * eps


def angle(t: Tensor, sigma_data: float = SIGMA) -> Tensor:
    return torch.atan(t / sigma_data)


def trig_network(student: Denoiser) -> Callable[[Tensor, Tensor], Tensor]:
    """``F(z, theta) = (cos z - f)/(sigma_d sin)``, with the student called on TrigFlow's own clock."""
    sigma_data = student.sigma_data
    twin = student.under(TrigFlow(sigma_data))

    def function(z: Tensor, theta: Tensor) -> Tensor:
        cos, sin = theta.cos()[:, None], theta.sin()[:, None]
        return (cos * z - twin(z, theta)) / (sigma_data * sin)

    return function


def g_by_definition(student: Denoiser, x_t: Tensor, t: Tensor, clean: Tensor, share: float) -> Tensor:
    """Eq. 3.2 written out in (z, theta), by torch.func.jvp with the tangent (dz/dtheta, 1)."""
    sigma_data = student.sigma_data
    theta = angle(t, sigma_data)
    cos, sin = theta.cos()[:, None], theta.sin()[:, None]
    z = cos * x_t
    dz = cos * (x_t - clean) * sigma_data / t[:, None] - sin * clean  # cos n - sin x_0, with n = sigma_d eps
    function = trig_network(student)
    value, slope = torch.func.jvp(function, (z, theta), (dz, torch.ones_like(theta)))
    return -(cos**2) * (sigma_data * value - dz) - share * cos * sin * (z + sigma_data * slope)


def g_of(objective: SCM, student: Denoiser, x_t: Tensor, t: Tensor, clean: Tensor, share: float = 1.0) -> Tensor:
    return objective.tangent(student, student(x_t, t).detach(), x_t, t, clean, share)


@dataclass(frozen=True)
class Landing:
    """A law whose "denoiser" is its consistency function."""

    law: Gaussian

    def denoise(self, x: Tensor, t: Tensor) -> Tensor:
        return self.law.endpoint(x, t)


# ------------------------------------------------------------------------------------- the tangent
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("sigma_data", [0.5, 1.3])
def test_the_tangent_is_equation_3_2(share: float, sigma_data: float) -> None:
    student = network(sigma_data=sigma_data)
    x_0, _, t, x_t = rows()
    want = g_by_definition(student, x_t, t, x_0, share)
    assert want.norm(dim=1).min() > 1e-4
    torch.testing.assert_close(g_of(PLAIN, student, x_t, t, x_0, share), want, rtol=1e-9, atol=1e-10)
    finite = replace(PLAIN, derivative="finite")
    torch.testing.assert_close(g_of(finite, student, x_t, t, x_0, share), want, rtol=1e-5, atol=1e-6)


def test_g_is_cos_times_the_derivative_of_f() -> None:
    """``g = cos(theta) df/dtheta`` along ``z = cos x_0 + sin n``, the derivative as a difference in theta."""
    student = network()
    x_0, eps, t, x_t = rows()
    theta, h = angle(t), 1e-5
    twin = student.under(TrigFlow(SIGMA))

    def f(theta: Tensor) -> Tensor:
        return twin(theta.cos()[:, None] * x_0 + theta.sin()[:, None] * SIGMA * eps, theta)

    step = h * (theta.sin() * theta.cos())
    slope = (f(theta + step) - f(theta - step)) / (2 * step[:, None])
    got = g_of(PLAIN, student, x_t, t, x_0)
    torch.testing.assert_close(got, theta.cos()[:, None] * slope, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("process", [EDM(), TrigFlow(SIGMA)])
def test_g_vanishes_for_the_exact_consistency_function(process: Process) -> None:
    """On a correlated Gaussian, along the exact flow, for networks that are told sigma or theta."""
    law = Gaussian.random(SIZE, seed=3)
    kind = "edm" if process.kind == "edm" else "trig"
    student = exact_denoiser(kind, Landing(law), process, SIZE, SIGMA).under(EDM())
    _, _, t, x_t = rows()
    clean = law.denoise(x_t, t)
    assert g_of(PLAIN, student, x_t, t, clean).abs().max() < 1e-12
    denoiser = exact_denoiser(kind, law, process, SIZE, SIGMA).under(EDM())
    assert g_of(PLAIN, denoiser, x_t, t, clean).abs().median() > 0.05


def test_g_vanishes_where_the_flow_is_curved() -> None:
    """The end point of a mixture's flow is found by bisection, which has finite differences only."""
    law = Mixture()
    student = as_denoiser(law.endpoint)
    t = torch.tensor([0.1, 0.5, 1.0, 3.0], dtype=torch.float64)
    x_t = torch.tensor([[0.3], [-0.5], [0.8], [2.0]], dtype=torch.float64)
    finite = replace(PLAIN, derivative="finite")
    exact, raw = (g_of(finite, as_denoiser(f), x_t, t, law.denoise(x_t, t)) for f in (law.endpoint, law.denoise))
    assert exact.abs().max() < 1e-6
    assert raw.abs().max() > 0.1
    assert g_of(finite, student, x_t, t, law.denoise(x_t, t) + 0.1).abs().min() > 1e-3


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_expected_tangent_of_sct_is_that_of_scd(share: float) -> None:
    """``E[g | x_t]`` over the exact posterior of x_0, for any network: g is affine in the velocity."""
    points = 0.6 * normal(5, SIZE, seed=4)
    law = PointMasses(points, torch.tensor([0.1, 0.3, 0.2, 0.15, 0.25], dtype=torch.float64))
    student = network()
    _, _, t, x_t = rows()
    posterior = law._logits(x_t, t).softmax(1)
    each = torch.stack([g_of(PLAIN, student, x_t, t, p.expand_as(x_t), share) for p in points], dim=1)
    mean = (posterior[:, :, None] * each).sum(1)
    torch.testing.assert_close(mean, g_of(PLAIN, student, x_t, t, law.denoise(x_t, t), share), rtol=0, atol=1e-12)
    spread = (posterior[:, :, None] * (each - mean[:, None]) ** 2).sum((1, 2)).sqrt()
    assert spread[2] > 0.2  # and not because every sample agrees


def test_the_expected_gradient_vanishes_at_the_consistency_function_only() -> None:
    """sCT on N(0, 1/4) with ``f = a(t) x``: quadrature over x_0 and eps, no normalisation (c large)."""
    x_0, eps, weights = quadrature(0.25)
    for power, bound in ((0.5, 1e-13), (1.0, None)):  # the end point is (v/(v + t^2))^(1/2) x, the denoiser ^1
        total = 0.0
        for time in (0.1, 0.5, 3.0):
            gain = nn.Parameter(torch.ones((), dtype=torch.float64))
            student = as_denoiser(lambda x, t, p=power, a=gain: a * (0.25 / (0.25 + t[:, None] ** 2)) ** p * x)
            t = torch.full((len(x_0),), time, dtype=torch.float64)
            per_sample = replace(PLAIN, c=1e12).loss_at(student, x_0, t, eps) * 1e12
            (gradient,) = torch.autograd.grad((weights * per_sample).sum(), gain)
            total = max(total, abs(float(gradient)))
        assert total < bound if bound is not None else total > 0.01, total


@pytest.mark.parametrize("time", [0.002, 80.0, 1e4])
def test_float32_is_enough_up_to_the_ends(time: float) -> None:
    """A network that is told ln(t)/4 has a bounded g even where theta is pi/2 to four digits."""
    x_0, eps, _, _ = rows()
    t = torch.full((len(x_0),), time, dtype=torch.float64)
    x_t = x_0 + time * eps
    want = g_of(PLAIN, network(), x_t, t, x_0)
    assert want.abs().max() < 50
    for method, bound in (("jvp", 1e-4), ("finite", 3e-2)):
        objective = replace(PLAIN, derivative=method)
        got = g_of(objective, network().float(), x_t.float(), t.float(), x_0.float())
        assert ((got - want).norm() / want.norm()).item() < bound


# ------------------------------------------------------------------------------------- the loss
def by_hand(student: Denoiser, g: Tensor, x_t: Tensor, t: Tensor, weight: Tensor, shift: float = 0.1) -> list[Tensor]:
    """``sum of -2 e^w/d (dF)^T g/(rms(g) + c)``."""
    theta = angle(t, student.sigma_data)
    value = trig_network(student)(theta.cos()[:, None] * x_t, theta)
    unit = g / (g.square().mean(1, keepdim=True).sqrt() + shift)
    pull = -2 * weight.exp()[:, None] / g.shape[1] * unit
    return list(torch.autograd.grad(value, list(student.parameters()), grad_outputs=pull))


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_gradient_of_the_loss(share: float) -> None:
    """``-2 e^w/d (dF)^T g``: no second prior weight, nothing through the target."""
    student, extra = network(), LearnedWeight(cosines=5).double()
    extra.coefficients.data = normal(5, seed=7)
    x_0, eps, t, x_t = rows()
    for beside, weight in ((ALONE, torch.zeros(len(t)).double()), (Beside(extra=extra), extra(angle(t)).detach())):
        per_sample = PLAIN.loss_at(student, x_0, t, eps, share, beside=beside)
        got = torch.autograd.grad(per_sample.sum(), list(student.parameters()))
        want = by_hand(student, g_by_definition(student, x_t, t, x_0, share), x_t, t, weight)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)


def test_the_warm_up_starts_with_velocity_matching() -> None:
    """At share 0 the gradient, before normalisation, is that of ``cos^2 sigma_d |F - v/sigma_d|^2/d``."""
    student = network()
    x_0, eps, t, x_t = rows()
    large = 1e9
    got = torch.autograd.grad(
        large * replace(PLAIN, c=large).loss_at(student, x_0, t, eps, 0.0).sum(), list(student.parameters())
    )
    theta = angle(t)
    cos, sin = theta.cos()[:, None], theta.sin()[:, None]
    velocity = cos * SIGMA * eps - sin * x_0
    value = trig_network(student)(cos * x_t, theta)
    matching = (cos**2 * SIGMA * (value - velocity / SIGMA).square()).mean(1).sum()
    for a, b in zip(got, torch.autograd.grad(matching, list(student.parameters())), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_the_normalised_tangent_is_shorter_than_one() -> None:
    g = torch.tensor([[3.0, 4.0], [0.0, 0.0], [3e6, 4e6], [3e-6, 4e-6]], dtype=torch.float64)
    rms = PLAIN.normalise(g).square().mean(1).sqrt()
    length = math.sqrt(12.5)
    assert rms.tolist() == pytest.approx([length / (length + 0.1), 0, 1 - 0.1e-6 / length, length * 1e-5], rel=1e-4)
    assert (rms < 1).all()


def test_the_value_of_the_loss() -> None:
    """At ``theta = theta^-`` it is ``e^w mean(unit g ^2) - w``."""
    student, extra = network(), LearnedWeight(cosines=3).double()
    extra.coefficients.data = normal(3, seed=8)
    x_0, eps, t, x_t = rows()
    g = g_by_definition(student, x_t, t, x_0, 1.0)
    rms = g.square().mean(1).sqrt()
    error, weight = (rms / (rms + 0.1)) ** 2, extra(angle(t))
    torch.testing.assert_close(PLAIN.loss_at(student, x_0, t, eps), error, rtol=1e-9, atol=0)
    got = PLAIN.loss_at(student, x_0, t, eps, beside=Beside(extra=extra))
    torch.testing.assert_close(got, weight.exp() * error - weight, rtol=1e-9, atol=0)


# ------------------------------------------------------------------------------------- the learned weight
def test_the_learned_weight_goes_to_minus_ln_of_the_error() -> None:
    theta = torch.linspace(0.01, 1.56, 200, dtype=torch.float64)
    error = 0.05 + 0.5 * theta.sin() ** 2
    weight = LearnedWeight(cosines=12).double()
    optimizer = torch.optim.LBFGS(weight.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (weight(theta).exp() * error - weight(theta)).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert (weight(theta) + error.log()).abs().max() < 0.02


def test_the_learned_weight_is_bounded_and_keeps_its_gradient() -> None:
    """An error of 0 would send it to infinity."""
    weight = LearnedWeight(cosines=3)
    theta = torch.tensor([0.2, 0.9])
    assert torch.equal(weight(theta), torch.zeros(2))
    for parameter in weight.parameters():
        parameter.data.fill_(1e3)
    assert weight(theta).max() == 10
    weight.coefficients.data = torch.tensor([30.0, 0.0, 0.0])
    high = weight(theta)
    assert 9.9 < high.max() < 10
    (gradient,) = torch.autograd.grad(high.sum(), weight.coefficients)
    assert gradient[0] > 1e-3


# ------------------------------------------------------------------------------------- as an objective
def test_the_share_is_a_function_of_the_images_seen() -> None:
    objective = SCM(warmup_images=1000)
    seen = (0, 1, 500, 1000, 5000)
    assert [objective.share(Progress(n, 9000)) for n in seen] == [0, 0.001, 0.5, 1, 1]
    assert objective.describe(Progress(500, 9000)) == {"share": 0.5}
    assert SCM(warmup_images=0).share(Progress(0, 9000)) == 1


def step(count: int = 6) -> StepRandom:
    return StepRandom(Streams(3), torch.arange(count), torch.device("cpu"))


def test_a_step_draws_its_times_and_warms_up() -> None:
    """The loss of a step is the loss at times of the law, noise of the stream and the share of its progress."""
    student, batch, objective = network(), Batch(0.5 * normal(6, SIZE, seed=5)), replace(PLAIN, warmup_images=100)
    random = step()
    t = (torch.special.ndtri(random.uniform("times")) * 1.6 - 1.0).exp()
    eps = random.normal("noise", batch.x)
    got = objective.loss(student, batch, Progress(25, 1000), step()).per_sample
    torch.testing.assert_close(got, objective.loss_at(student, batch.x, t, eps, 0.25), rtol=1e-9, atol=1e-12)
    assert not torch.allclose(got, objective.loss_at(student, batch.x, t, eps, 1.0))


class Passes(nn.Module):
    """Dropout, and a record of who called with gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.dropout = nn.Linear(SIZE, SIZE, dtype=torch.float64), nn.Dropout(0.5)
        self.with_gradient: list[bool] = []

    def forward(self, x: Tensor, c_noise: Tensor, cond: Tensor | None = None) -> Tensor:
        self.with_gradient.append(torch.is_grad_enabled())
        return self.dropout(self.linear(x) + c_noise[:, None])


def test_one_pass_with_gradient_and_the_derivative_under_the_same_mask() -> None:
    """The value depends on the mask; the masks of the derivative are those of the student's own pass."""
    backbone = Passes()
    student = Denoiser(backbone, EDM(), Parametrization("edm"), sample_shape=(SIZE,)).train()
    x_0, eps, t, _ = rows()
    losses = {}
    for method in ("jvp", "finite"):
        backbone.with_gradient.clear()
        objective = replace(PLAIN, derivative=method)
        losses[method] = objective.loss_at(student, x_0, t, eps, tape=step(len(t)).tape())
        assert backbone.with_gradient == [True] + [False] * (1 if method == "jvp" else 2)
    torch.testing.assert_close(losses["jvp"], losses["finite"], rtol=1e-6, atol=1e-8)
    tape = step(len(t)).tape()
    with tape.record():
        mask = backbone.dropout(torch.ones(len(t), SIZE, dtype=torch.float64))
    backbone.dropout.p = 0.0
    weight, bias = backbone.linear.weight.data, backbone.linear.bias.data

    class Masked(nn.Module):
        def forward(self, x: Tensor, c_noise: Tensor, cond: Tensor | None = None) -> Tensor:
            return mask * (x @ weight.T + bias + c_noise[:, None])

    masked = Denoiser(Masked(), EDM(), Parametrization("edm"), sample_shape=(SIZE,)).train()
    torch.testing.assert_close(losses["jvp"], PLAIN.loss_at(masked, x_0, t, eps), rtol=1e-9, atol=1e-12)
    assert not torch.allclose(losses["jvp"], PLAIN.loss_at(student, x_0, t, eps), rtol=0.05)


def test_the_teachers_velocity() -> None:
    law = Gaussian.random(SIZE, seed=6)
    teacher, student = as_denoiser(law.denoise, SIZE).eval(), network()
    distilling = replace(PLAIN, velocity="teacher")
    assert distilling.needs_teacher
    assert not PLAIN.needs_teacher
    x_0, eps, t, x_t = rows()
    got = distilling.loss_at(student, x_0, t, eps, 0.7, beside=Beside(teacher=teacher))
    g = g_by_definition(student, x_t, t, law.denoise(x_t, t), 0.7)
    rms = g.square().mean(1).sqrt()
    torch.testing.assert_close(got, (rms / (rms + 0.1)) ** 2, rtol=1e-9, atol=0)
    with pytest.raises(ConfigError, match="teacher"):
        distilling.loss_at(student, x_0, t, eps)


def test_configuration() -> None:
    assert OBJECTIVES["scm"] is SCM
    made = SCM(velocity="teacher", warmup_images=7, c=0.2, learned_weight=False, derivative="finite")
    assert from_dict(SCM, to_dict(made)) == made
    student = network()
    assert made.prepare(student) == made
    assert SCM().prepare(student).derivative == "jvp"
    assert isinstance(SCM().extra(student), LearnedWeight)
    assert made.extra(student) is None
    assert SCM().extra(student).coefficients.dtype == torch.float64
    for bad in ({"warmup_images": -1}, {"c": 0.0}):
        with pytest.raises(ConfigError, match="sCM needs"):
            SCM(**bad)
