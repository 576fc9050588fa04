"""Guidance in tuning, on Gaussian classes whose guided flow is known exactly (math.md 3.4)."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from oracles import GuidedGaussians
from torch import Tensor, nn

from fewstep import EDM, Denoiser, Guided, Parametrization, ode_sample, sample
from fewstep.backbones.guided import with_guidance
from fewstep.backbones.small import MLP
from fewstep.config import from_dict, to_dict
from fewstep.errors import ConfigError
from fewstep.evaluation.compute import passes
from fewstep.guidance import evaluations
from fewstep.objectives import CD, CT, ECD, ECT, ICT, Beside, Sequence, StepRandom
from fewstep.objectives.bridges import DataRay, GuidedRay, TeacherStep
from fewstep.objectives.pairs import make_pair
from fewstep.penalty import Penalty
from fewstep.randomness import Streams
from fewstep.times import Constant, Stages
from fewstep.types import Batch, Progress

LAW = GuidedGaussians()
SQUARED = Penalty("squared_l2", "one")
ONE_HOT = torch.eye(2, dtype=torch.float64)
Function = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Told(nn.Module):
    """``function(x, t, cond, w)`` as a network that is told w, or one for which w is always 1."""

    def __init__(self, function: Function, guided: bool) -> None:
        super().__init__()
        self.function, self.guided = function, guided
        self.idle = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.rows = 0

    def forward(self, x: Tensor, t: Tensor, cond: Tensor, guidance: Tensor | None = None) -> Tensor:
        self.rows += len(x)
        w = torch.ones_like(t) if guidance is None else torch.where(cond.any(1), guidance, 1.0)
        return self.function(x, t, cond, w) + 0 * self.idle


def denoiser(function: Function, *, guided: bool = False) -> Denoiser:
    parametrization = Parametrization("x0", time="native")
    return Denoiser(Told(function, guided), EDM(), parametrization, sample_shape=(1,), num_classes=2)


def teacher() -> Denoiser:
    return denoiser(LAW.denoise)


def normal(count: int, seed: int) -> Tensor:
    return torch.randn(count, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uniform(low: float, high: float, count: int, seed: int) -> Tensor:
    return low + (high - low) * torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rows(count: int = 24) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x_0, eps, t, labels and strengths, another one in every row; every fourth row has no label."""
    cond = ONE_HOT[torch.arange(count) % 2].clone()
    cond[3::4] = 0
    t = uniform(math.log(0.05), math.log(40), count, 2).exp()
    return normal(count, 0), normal(count, 1), t, cond, uniform(0.5, 4.0, count, 3)


def close(got: Tensor, want: Tensor, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(got.detach(), want, rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------------------------------------- the oracle
def test_the_oracles_flow_solves_the_guided_ode() -> None:
    """Against RK4 with small steps; flows compose; without a label or at w = 1 it is the plain Gaussian's."""
    _, x, t, cond, w = rows()
    x, s = 3 * x, t / 3
    now, steps = x, 1000
    at = lambda k: t * (s / t) ** (k / steps)  # noqa: E731
    velocity = lambda y, at: (y - LAW.denoise(y, at, cond, w)) / at[:, None]  # noqa: E731
    for k in range(steps):
        a, middle, b = at(k), at(k + 0.5), at(k + 1)
        h = (b - a)[:, None]
        k1 = velocity(now, a)
        k2 = velocity(now + (middle - a)[:, None] * k1, middle)
        k3 = velocity(now + (middle - a)[:, None] * k2, middle)
        now = now + h / 6 * (k1 + 4 * (k2 + k3) / 2 + velocity(now + h * k3, b))
    close(LAW.flow(x, t, s, cond, w), now, 1e-6)
    close(LAW.endpoint(LAW.flow(x, t, s, cond, w), s, cond, w), LAW.endpoint(x, t, cond, w), 1e-10)
    own = LAW._law(cond)
    mean, variance = LAW.means[own][:, None], LAW.variances[own][:, None]
    plain = mean + (variance / (variance + t[:, None] ** 2)).sqrt() * (x - mean)
    close(LAW.endpoint(x, t, cond, torch.ones_like(w)), plain, 1e-10)
    close(LAW.endpoint(x, t, cond, w)[3::4], plain[3::4], 1e-10)
    assert (LAW.endpoint(x, t, cond, w) - plain).abs()[0::4].min() > 1e-3


# ------------------------------------------------------------------------------------------------ bridges
def test_the_mean_of_the_guided_ray_is_the_guided_velocity_of_each_rows_own_strength() -> None:
    """Over x_0 given x_t and the class, E[x_r] = x_t + (r - t) v_w(x_t); rows without a label stay on the ray."""
    points, weights = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(6))
    _, noise, t, cond, w = rows()
    x_t, r, n = 2 * noise, 0.7 * t, len(points)
    own = LAW._law(cond)
    variance = LAW.variances[own][:, None]
    spread = (variance * t[:, None] ** 2 / (variance + t[:, None] ** 2)).sqrt()
    x_0 = (LAW.denoise(x_t, t, cond) + spread * points).reshape(-1, 1)
    x, times, told = x_t.repeat_interleave(n, 0), t.repeat_interleave(n), w.repeat_interleave(n)
    eps = (x - x_0) / times[:, None]
    low = r.repeat_interleave(n)
    both = make_pair(x_0, eps, times, low, times - low, cond.repeat_interleave(n, 0), guidance=told)
    got = GuidedRay(0.5, 4.0)(both, both.x_t, teacher()).reshape(-1, n)
    want = x_t + ((r - t) / t)[:, None] * (x_t - LAW.denoise(x_t, t, cond, w))
    close((got * weights / weights.sum()).sum(1, keepdim=True), want)
    ray = DataRay()(both, both.x_t, None).reshape(-1, n)
    close(got[3::4], ray[3::4])
    assert (got - ray).abs()[0::4].min() > 1e-4
    close(
        (ray * weights / weights.sum()).sum(1, keepdim=True),
        x_t + (1 - r / t)[:, None] * (LAW.denoise(x_t, t, cond) - x_t),
    )


@pytest.mark.parametrize(("solver", "order"), [("euler", 2), ("heun", 3)])
def test_the_teachers_step_follows_the_guided_flow_of_each_rows_own_strength(solver: str, order: int) -> None:
    """Its error against the exact guided flow is O(dt^2) and O(dt^3)."""
    x_0, eps, t, cond, w = rows()
    errors = []
    for ratio in (128, 256):
        r = t * (1 - 1 / ratio)
        both = make_pair(x_0, eps, t, r, t - r, cond, guidance=w)
        x_r = TeacherStep(solver, 0.5, 4.0)(both, both.x_t, teacher())  # type: ignore[arg-type]
        errors.append((x_r - LAW.flow(both.x_t, t, r, cond, w)).detach().abs().max())
    assert float(errors[0] / errors[1]) == pytest.approx(2**order, rel=0.05)
    euler = both.x_t + ((r - t) / t)[:, None] * (both.x_t - LAW.denoise(both.x_t, t, cond, w))
    close(TeacherStep("euler", 0.5, 4.0)(both, both.x_t, teacher()), euler)


@pytest.mark.parametrize("bridge", [TeacherStep(), GuidedRay(1.0)])
def test_strength_one_is_no_guidance(bridge: TeacherStep | GuidedRay) -> None:
    """The same bits where it is fixed, to rounding where it is drawn."""
    x_0, eps, t, cond, w = rows()
    wide = type(bridge)(guidance=1.0, guidance_max=2.0)
    plain = make_pair(x_0, eps, t, 0.7 * t, 0.3 * t, cond)
    ones = make_pair(x_0, eps, t, 0.7 * t, 0.3 * t, cond, guidance=torch.ones_like(w))
    want = (
        TeacherStep()(plain, plain.x_t, teacher())
        if isinstance(bridge, TeacherStep)
        else DataRay()(plain, plain.x_t, None)
    )
    assert torch.equal(bridge(plain, plain.x_t, teacher()), want)
    close(wide(ones, ones.x_t, teacher()), want.detach())


def test_a_range_needs_a_teacher_and_conditions() -> None:
    assert GuidedRay(1.0, 2.0).needs_teacher and ECT(bridge=GuidedRay(1.0, 2.0)).needs_teacher
    assert not ECT(bridge=GuidedRay(1.0)).needs_teacher
    free = Denoiser(nn.Linear(1, 1), EDM(), Parametrization(), sample_shape=(1,))
    for bridge in (TeacherStep(guidance=2.0), TeacherStep(guidance_max=2.0)):
        with pytest.raises(ConfigError, match=r"Guidance needs a class-conditional model.*guidance_max=null"):
            ECD(bridge=bridge).prepare(free)
        assert ECD(bridge=bridge).guides
    assert not ECD().guides and not ECT().guides
    for low, high in ((1.0, 1.0), (2.0, 1.0), (math.nan, None), (1.0, math.inf)):
        for kind in (TeacherStep, GuidedRay):
            with pytest.raises(ConfigError, match="no range"):
                kind(guidance=low, guidance_max=high)


# --------------------------------------------------------------------------------------- the fixed points
def composed(objective: ECT | ECD, ratio: float, w: Tensor, cond: Tensor, x: Tensor, top: float = 80.0) -> Tensor:
    """Where the fixed point of ``r = (1 - 1/ratio) t`` sends ``x [k, 1]`` at time ``top``, for ``w [k]``.

    Each step's optimum is found from the objective's own expected loss over its class: with f(x, t) = g x + h and the
    target f(x, r) = x it is a parabola in (g, h), known from six values; the fixed point is the product of the steps.
    """
    count = math.ceil(math.log(top / 1e-6) / -math.log1p(-1 / ratio))
    chain = top * (1 - 1 / ratio) ** torch.arange(count, dtype=torch.float64)
    points, weights = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(3))
    grid = torch.cartesian_prod(points, points)
    weight = (weights[:, None] * weights).flatten() / weights.sum() ** 2
    n, k = len(grid), len(w)
    own = LAW._law(cond)
    x_0 = (LAW.means[own][:, None] + LAW.variances[own].sqrt()[:, None] * grid[:, 0]).expand(count, k, n).reshape(-1, 1)
    eps = grid[:, 1].expand(count, k, n).reshape(-1, 1)
    t = chain[:, None, None].expand(count, k, n).flatten()
    labels, told = cond[:, None].expand(count, k, n, 2).reshape(-1, 2), w[:, None].expand(count, k, n).flatten()

    def expected(g: float, h: float) -> Tensor:
        seen = []

        def f(x: Tensor, t: Tensor, cond: Tensor, w: Tensor) -> Tensor:
            seen.append(w)
            return g * x + h if torch.is_grad_enabled() else x

        student = denoiser(f, guided=True)
        loss = objective.loss_at(student, x_0, t, eps, ratio, labels, None, Beside(teacher()), told)
        assert len(seen) == 2 and torch.equal(seen[0], told) and torch.equal(seen[1], told)
        return loss.detach().reshape(count, k, n) @ weight

    zero = expected(0, 0)
    right, left, up, down, both = (expected(*p) for p in ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1)))
    hessian = torch.stack((right + left - 2 * zero, both - right - up + zero, up + down - 2 * zero), -1)
    slope = torch.stack((right - left, up - down), -1) / 2
    (a, b, d), (p, q) = hessian.unbind(-1), slope.unbind(-1)
    g, h = -(d * p - b * q) / (a * d - b * b), -(a * q - b * p) / (a * d - b * b)
    for step in range(count):
        x = g[step][:, None] * x + h[step][:, None]
    return x


def error(objective: ECT | ECD, ratio: float) -> Tensor:
    """Distance of the fixed point to the guided flow's end point, for two strengths of two classes."""
    w = torch.tensor([0.6, 2.5, 0.6, 2.5], dtype=torch.float64)
    cond = ONE_HOT[torch.tensor([0, 0, 1, 1])]
    x = 80 * normal(4, 7)
    exact = LAW.endpoint(x, torch.full((4,), 80.0, dtype=torch.float64), cond, w)
    return (composed(objective, ratio, w, cond, x) - exact).abs().flatten()


def test_the_fixed_point_of_guided_ect_is_the_guided_flow() -> None:
    """First order in the gap, as without guidance."""
    ect = ECT(mapping=Constant(), penalty=SQUARED, bridge=GuidedRay(0.5, 3.0))
    errors = [error(ect, ratio) for ratio in (32, 64)]
    ratio = errors[0].norm() / errors[1].norm()
    assert 1.9 < float(ratio) < 2.15
    assert errors[1].max() < 0.05


@pytest.mark.parametrize(("solver", "low", "high", "most"), [("euler", 1.9, 2.15, 0.05), ("heun", 3.7, 4.3, 4e-4)])
def test_the_fixed_point_of_guided_ecd_is_the_guided_flow(solver: str, low: float, high: float, most: float) -> None:
    ecd = ECD(mapping=Constant(), penalty=SQUARED, bridge=TeacherStep(solver, 0.5, 3.0))  # type: ignore[arg-type]
    errors = [error(ecd, ratio) for ratio in (32, 64)]
    assert low < float(errors[0].norm() / errors[1].norm()) < high
    assert errors[1].max() < most


# --------------------------------------------------------------------------------------- what a student is told
def exact_student() -> Denoiser:
    return denoiser(LAW.endpoint, guided=True)


def test_the_exact_guided_map_is_stationary_for_every_strength() -> None:
    """A student told w that makes LAW.endpoint(., w) has next to no loss; one that ignores w has."""
    x_0, eps, t, cond, w = rows()
    ecd = ECD(mapping=Constant(), penalty=SQUARED, bridge=TeacherStep("heun", 0.5, 4.0))
    beside = Beside(teacher())
    deaf = denoiser(lambda x, t, cond, w: LAW.endpoint(x, t, cond, torch.full_like(w, 2.0)), guided=True)
    told, untold = (ecd.loss_at(f, x_0, t, eps, 32.0, cond, None, beside, w) for f in (exact_student(), deaf))
    assert told.max() < 1e-11
    assert (told < 1e-3 * untold)[cond.any(1)].all()


@pytest.mark.parametrize("objective", [ECD(bridge=TeacherStep("heun", 1.0, 3.0), schedule=Stages(q=8.0, last=0)),
                                       ECT(bridge=GuidedRay(1.0, 3.0), schedule=Stages(q=8.0, last=0))])  # fmt: skip
def test_a_row_of_a_range_is_a_row_of_its_own_fixed_strength(objective: ECT | ECD) -> None:
    """So for every w the range's student learns what a student of that w alone would."""
    x_0, _, _, cond, _ = rows()
    index = torch.arange(len(x_0))
    random = StepRandom(Streams(5), index, torch.device("cpu"))
    beside, progress = Beside(teacher()), Progress(500, 1000)
    student = denoiser(lambda x, t, cond, w: x / (1 + t[:, None]) + w[:, None].sin(), guided=True)
    got = objective.loss(student, Batch(x_0, cond), progress, random, beside).per_sample
    w = 1 + 2 * Streams(5).uniform("guidance", index)
    assert w.min() < 1.2 and w.max() > 2.8
    bridge = type(objective.bridge)
    for row in (0, 1, 3, 10):
        one = torch.tensor([row])
        own = float(w[row])
        told = 1.0 if row == 3 else own
        fixed = type(objective)(bridge=bridge(guidance=own), schedule=objective.schedule)  # type: ignore[call-arg]
        alone = denoiser(lambda x, t, cond, _, told=told: x / (1 + t[:, None]) + math.sin(told))
        want = fixed.loss(
            alone, Batch(x_0[one], cond[one]), progress, StepRandom(Streams(5), one, torch.device("cpu")), beside
        )
        close(got[one], want.per_sample.detach(), 1e-10)


def test_without_labels_strength_has_no_effect() -> None:
    """All labels dropped: the loss of the unguided objective, whatever was drawn."""
    x_0, eps, t, _, w = rows()
    none = torch.zeros(len(t), 2, dtype=torch.float64)
    beside = Beside(teacher())
    for guided, plain in ((ECD(bridge=TeacherStep("heun", 1.0, 4.0)), ECD()), (ECT(bridge=GuidedRay(1.0, 4.0)), ECT())):
        got = guided.loss_at(exact_student(), x_0, t, eps, 8.0, none, None, beside, w)
        want = plain.loss_at(denoiser(LAW.endpoint), x_0, t, eps, 8.0, none, None, beside)
        close(got, want.detach(), 1e-10)


def test_targets_of_averages_are_told_too() -> None:
    x_0, eps, t, cond, w = rows()
    target = denoiser(lambda x, t, cond, w: LAW.endpoint(x, t, cond, w), guided=True)
    beside = Beside(teacher(), {"target": target})
    cd = CD(bridge=TeacherStep("heun", 0.5, 4.0))
    loss = cd.loss_at(exact_student(), x_0, t, t * 31 / 32, eps, cond, None, beside, w)
    assert loss.max() < 1e-10
    for objective in (CT(bridge=GuidedRay(1.0, 3.0)), ICT(bridge=GuidedRay(1.0, 3.0)), cd):
        assert objective.guidance_range is not None
        random = StepRandom(Streams(0), torch.arange(len(t)), torch.device("cpu"))
        assert objective.loss(exact_student(), Batch(x_0, cond), Progress(500, 1000), random, beside).per_sample.all()


def test_a_student_that_is_not_told_says_so() -> None:
    x_0, eps, t, cond, w = rows()
    with pytest.raises(ConfigError, match="cannot be told a strength of guidance"):
        ECD(bridge=TeacherStep("heun", 1.0, 4.0)).loss_at(
            denoiser(LAW.endpoint), x_0, t, eps, 8.0, cond, None, Beside(teacher()), w
        )


def test_a_gradient_reaches_the_embedding() -> None:
    """And through it, one step later, its first layer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mlp = MLP((1,), 16, 1, num_classes=2).double()
    plain = Denoiser(mlp, EDM(), Parametrization(), sample_shape=(1,), num_classes=2)
    student = with_guidance(plain, 1.0, 3.0)
    for parameter in mlp.head.parameters():
        parameter.data.add_(0.1)
    x_0, eps, t, cond, w = rows()
    ect = ECT(bridge=GuidedRay(1.0, 3.0))
    embedding = student.backbone.strength
    ect.loss_at(student, x_0, t, eps, 8.0, cond, None, Beside(teacher()), w).mean().backward()
    assert embedding.last.weight.grad.abs().max() > 1e-6 and not embedding.first.weight.grad.any()
    embedding.last.weight.data.sub_(embedding.last.weight.grad)
    ect.loss_at(student, x_0, t, eps, 8.0, cond, None, Beside(teacher()), w).mean().backward()
    assert embedding.first.weight.grad.abs().max() > 1e-9


# ------------------------------------------------------------------------------------------------- sampling
@pytest.mark.parametrize("steps", [1, 3])
def test_a_guided_student_is_told_and_others_are_evaluated_twice(steps: int) -> None:
    cond = torch.tensor([0, 1, 1, 0, 1])
    told, plain = exact_student(), denoiser(LAW.endpoint)
    got = sample(told, 5, steps=steps, cond=cond, guidance=2.5)
    assert told.backbone.rows == 5 * steps * evaluations(told, 2.5) == 5 * steps
    if steps == 1:
        x, t = sample(denoiser(lambda x, *_: x), 5), torch.full((5,), 80.0, dtype=torch.float64)
        close(got, LAW.endpoint(x, t, ONE_HOT[cond], torch.full_like(t, 2.5)), 1e-9)
    heuristic = sample(plain, 5, steps=steps, cond=cond, guidance=2.5)
    assert plain.backbone.rows == 5 * steps * evaluations(plain, 2.5) == 10 * steps
    assert (heuristic - got).abs().min() > 1e-3  # the guided flow's end point is not linear in w
    for w in (None, 1.0):
        plain.backbone.rows = 0
        torch.testing.assert_close(
            sample(plain, 5, steps=steps, cond=cond, guidance=w), sample(told, 5, steps=steps, cond=cond)
        )
        assert plain.backbone.rows == 5 * steps * evaluations(plain, w) == 5 * steps


def test_the_teachers_guided_ode_ends_where_the_guided_flow_does() -> None:
    cond, model = torch.tensor([0, 1, 1, 0, 1]), teacher()
    got = ode_sample(model, 5, steps=160, cond=cond, guidance=2.5)
    assert model.backbone.rows == 5 * 2 * 319
    x, t = sample(denoiser(lambda x, *_: x), 5), torch.full((5,), 80.0, dtype=torch.float64)
    close(got, LAW.endpoint(x, t, ONE_HOT[cond], torch.full_like(t, 2.5)), 1e-3)


# ---------------------------------------------------------------------------------------- configuration, cost
def test_a_range_survives_a_file_and_is_counted() -> None:
    for objective in (ECD(bridge=TeacherStep("euler", 1.0, 3.0)), ECT(bridge=GuidedRay(1.0, 3.0))):
        assert from_dict(type(objective), to_dict(objective)) == objective
        assert objective.guidance_range == (1.0, 3.0)
    model = Denoiser(nn.Linear(1, 1), EDM(), Parametrization(), sample_shape=(3, 8, 8), num_classes=2)
    assert passes(ECD(bridge=TeacherStep("euler", 1.0, 3.0)), model, 1000)["teacher", 1] == 2.0
    assert passes(ECT(bridge=GuidedRay(1.0, 3.0)), model, 1000)["teacher", 1] == 2.0


def test_a_sequence_tells_one_range() -> None:
    wide, narrow = (ECD(bridge=TeacherStep("heun", 1.0, high)) for high in (3.0, 2.0))
    assert Sequence(ECD(), wide).guidance_range == (1.0, 3.0) and Sequence(ECD(), wide).guides
    Sequence(wide, wide).prepare(teacher())
    for first, then in ((wide, narrow), (wide, ECD())):
        with pytest.raises(ConfigError, match="other strengths of guidance than the second"):
            Sequence(first, then).prepare(teacher())


def test_guided_refuses_strengths_that_the_student_was_not_tuned_for() -> None:
    student = exact_student()
    student.backbone.guidance_range = (1.0, 3.0)
    with pytest.raises(ConfigError, match=r"not tuned for that strength of guidance. Got: 3.5. Wanted: 1 to 3"):
        Guided(student, 3.5)
    with pytest.raises(ConfigError, match="Got: nan"):
        sample(student, 2, cond=torch.tensor([0, 1]), guidance=math.nan)
