"""Adaptive r: equal errors on a Gaussian, the schedule's mean step, 0 < r < t always, nothing but x_t is looked at."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import Gaussian, Mixture, PointMasses, as_denoiser
from torch import Tensor

from fewstep.config import from_dict, to_dict
from fewstep.denoiser import Denoiser
from fewstep.errors import ConfigError
from fewstep.objectives import ECT, Beside
from fewstep.objectives.adaptive import Adaptive, curvature
from fewstep.objectives.pairs import Pair, make_pair
from fewstep.times import Constant, Mapping, Sigmoid, pair

LAM, SIZE = 0.25, 256
LAW = Gaussian.white(LAM, SIZE)
TEACHER = as_denoiser(LAW.denoise, SIZE)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def made(t: Tensor, ratio: float, mapping: Mapping = Constant()) -> Pair:  # noqa: B008
    r, gap = pair(mapping, t, ratio)
    return make_pair(0.5 * normal(len(t), SIZE, seed=1), normal(len(t), SIZE, seed=2), t, r, gap)


def error(both: Pair) -> Tensor:
    """What one pair adds to -ln(a_ECT/a*), exactly (math.md eq. 7.4)."""
    return -0.5 * torch.log1p(-LAM * both.gap**2 / ((LAM + both.t**2) * (LAM + both.r**2)))


def spread(values: Tensor) -> float:
    return float(values.max() / values.min())


@pytest.mark.parametrize(
    ("mapping", "ratio", "before", "after"),
    [
        (Constant(), 4.0, 33, 4.0),
        (Constant(), 16.0, 27, 1.6),
        (Constant(), 256.0, 25, 1.6),
        (Sigmoid(), 256.0, 392, 1.6),
    ],
)
def test_errors_become_equal_on_a_gaussian(mapping: Mapping, ratio: float, before: float, after: float) -> None:
    """t from 0.05 to 5: errors differ by a factor 25 to 33 (constant) or 392 (sigmoid), adapted by 1.3 to 3.6."""
    both = made(torch.logspace(-1.3, 0.7, 41, dtype=torch.float64), ratio, mapping)
    assert spread(error(both)) == pytest.approx(before, rel=0.03)
    assert spread(error(Adaptive(10.0)(both, TEACHER))) < after  # the limit acts on the sigmoid map at 4, not at 10


@pytest.mark.parametrize("mapping", [Constant(), Sigmoid()])
def test_the_schedules_mean_step_is_kept(mapping: Mapping) -> None:
    """The geometric mean of ln(t/r) over the rows with r > 0, to rounding, also where the limit acts."""
    both = made(torch.logspace(-2.5, 1.9, 60, dtype=torch.float64), 8.0, mapping)
    steps = [(both.t / r).log().log().mean() for r in (both.r, Adaptive(1.5)(both, TEACHER).r)]
    torch.testing.assert_close(steps[0], steps[1], rtol=1e-12, atol=1e-12)
    log_k = ((both.t / Adaptive(1.5)(both, TEACHER).r).log() / (both.t / both.r).log()).log()
    assert spread(log_k.exp()) == pytest.approx(2.25, rel=1e-6)  # from 1/limit to limit: reached on both sides


def test_as_many_steps_err_half_as_much() -> None:
    """A chain from 80 to 0.002 with the adaptive map: the spread error of ECT's fixed point halves at equal steps."""
    t = torch.logspace(math.log10(0.002), math.log10(80), 400, dtype=torch.float64)
    direction = normal(1, SIZE)
    x_t = (LAM + t**2).sqrt()[:, None] * direction / direction.norm()  # |x| as typical, at every t alike
    r, gap = pair(Constant(), t, 16.0)
    adapted = Adaptive()(make_pair(x_t, torch.zeros_like(x_t), t, r, gap), TEACHER)
    logs, steps = t.log().numpy(), (t / adapted.r).log().numpy()

    def chain(step: np.ndarray) -> tuple[int, float]:
        now, count, total = 80.0, 0, 0.0
        while now > 0.002:
            h = float(np.interp(math.log(now), logs, step))
            low, part = now * math.exp(-h), -now * math.expm1(-h)
            total -= 0.5 * math.log1p(-LAM * part**2 / ((LAM + now**2) * (LAM + low**2)))
            now, count = low, count + 1
        return count, total

    count, total = chain(steps)
    even = chain(np.full_like(steps, math.log(80 / 0.002) / count))
    assert abs(even[0] - count) <= 1
    assert 0.4 < total / even[1] < 0.6


@settings(max_examples=40, deadline=None)
@given(
    ratio=st.floats(1.01, 2.0**20),
    limit=st.floats(1.01, 1e3),
    center=st.floats(-3.0, 2.0),
    mapping=st.sampled_from([Constant(), Sigmoid()]),
)
def test_r_stays_between_zero_and_t(ratio: float, limit: float, center: float, mapping: Mapping) -> None:
    """On a bimodal law in float32, with every schedule: 0 < r < t where r was > 0, r = 0 where it was 0."""
    teacher = as_denoiser(Mixture().denoise).float()
    t = (10 ** (center + normal(24, seed=5))).clamp(0.002, 80)
    r, gap = pair(mapping, t, ratio)
    both = make_pair(normal(24, 1).float(), normal(24, 1, seed=1).float(), t, r, gap)
    new = Adaptive(limit)(both, teacher)
    noisy = both.r > 0
    assert torch.equal(new.r > 0, noisy) and torch.equal(new.gap[~noisy], both.gap[~noisy])
    assert (new.gap > 0).all() and (new.gap[noisy] < both.t[noisy]).all()
    torch.testing.assert_close(new.r + new.gap, both.t, rtol=1e-6, atol=0)


def test_small_gaps_have_all_their_digits_in_float32() -> None:
    t = torch.logspace(-1.3, 0.7, 41, dtype=torch.float64)
    both = made(t, 2.0**18)
    single = replace(both, **{k: getattr(both, k).float() for k in ("x_0", "eps", "t", "r", "gap")})
    got = Adaptive()(single, as_denoiser(lambda x, s: LAW.denoise(x.double(), s).float(), SIZE).float())
    torch.testing.assert_close(got.gap.double(), Adaptive()(both, TEACHER).gap, rtol=2e-3, atol=0)
    assert spread(error(replace(both, r=got.r.double(), gap=got.gap.double()))) < 1.6


def test_what_made_x_t_plays_no_part() -> None:
    """The same x_t from other (x_0, eps): the same r. Otherwise the ray would be biased."""
    both = made(torch.logspace(-1, 1, 12, dtype=torch.float64), 8.0)
    other_x = normal(12, SIZE, seed=9)
    other = replace(both, x_0=other_x, eps=(both.x_t - other_x) / both.t[:, None])
    torch.testing.assert_close(Adaptive()(other, TEACHER).r, Adaptive()(both, TEACHER).r, rtol=1e-9, atol=0)
    assert not torch.allclose(Adaptive()(both, TEACHER).r, both.r, rtol=1e-2)


def test_curvature_is_the_closed_form() -> None:
    """``|dD/d ln t| = lam t^2 |x - mu|/(lam + t^2)^2`` along the flow, to the probe's 1/8."""
    t = torch.logspace(-1, 1, 9, dtype=torch.float64)
    x = normal(9, SIZE) * (LAM + t**2).sqrt()[:, None]
    want = LAM * t**2 * x.norm(dim=1) / (LAM + t**2) ** 2
    torch.testing.assert_close(curvature(TEACHER, x, t, None).detach(), want, rtol=0.2, atol=0)


def test_straight_trajectories_and_clean_rows_do_no_harm() -> None:
    """One point: D is constant, the curvature its floor; a row with r = 0 stays, and no teacher sees it."""
    law = PointMasses(torch.ones(1, SIZE, dtype=torch.float64), torch.ones(1, dtype=torch.float64))
    both = made(torch.tensor([0.1, 1.0, 3.0, 9.0], dtype=torch.float64), 2.0, Sigmoid())
    rows: list[int] = []

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        rows.append(len(x))
        return law.denoise(x, t)

    new = Adaptive()(both, as_denoiser(denoise, SIZE))
    assert rows == [2, 2]
    assert both.r.tolist()[:2] == new.r.tolist()[:2] == [0.0, 0.0]
    assert ((new.r[2:] > 0) & (new.r[2:] < new.t[2:])).all()
    rows.clear()
    clean = made(torch.tensor([0.1, 1.0], dtype=torch.float64), 2.0, Sigmoid())
    assert Adaptive()(clean, as_denoiser(denoise, SIZE)) is clean and not rows


def test_the_teachers_least_noise_is_respected() -> None:
    teacher = Denoiser(TEACHER.backbone, TEACHER.process, TEACHER.parametrization, sample_shape=(SIZE,), sigma_min=0.04)
    t = torch.logspace(-1.3, 0.7, 41, dtype=torch.float64)
    r, gap = pair(Constant(), t, 2.0, 0.04)
    new = Adaptive()(make_pair(normal(41, SIZE), normal(41, SIZE, seed=1), t, r, gap), teacher)
    assert float(new.r[new.r > 0].min()) == pytest.approx(0.04, rel=1e-9)


def test_in_ect() -> None:
    """It needs a teacher, changes the pair and nothing else, and is one graph with the two passes."""
    torch._dynamo.reset()
    objective, both = ECT(adaptive=Adaptive(), mapping=Constant()), made(torch.logspace(-1, 1, 8).double(), 8.0)
    assert objective.needs_teacher and not ECT().needs_teacher
    student, beside = as_denoiser(LAW.endpoint, SIZE), Beside(teacher=TEACHER)
    want = ECT().loss_between(student, Adaptive()(both, TEACHER))
    got = objective.loss_at(student, both.x_0, both.t, both.eps, 8.0, beside=beside)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(got, ECT().loss_between(student, both), rtol=1e-3)
    compiled = torch.compile(objective.loss_between, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(student, both, None, beside), want, rtol=1e-9, atol=1e-12)
    torch._dynamo.reset()
    assert from_dict(ECT, to_dict(objective)) == objective


def test_bad_input_is_refused() -> None:
    with pytest.raises(ConfigError, match="nothing to adapt"):
        Adaptive(1.0)
    with pytest.raises(ConfigError, match="follows a teacher"):
        Adaptive()(made(torch.ones(1, dtype=torch.float64), 4.0), None)
