"""The reference batch (SCT): exact on a full set, unbiased on a part, less noisy than the ray, sound in float32."""

from __future__ import annotations

import itertools

import pytest
import torch
from oracles import Gaussian, PointMasses, as_denoiser
from torch import Tensor

from fewstep.config import from_dict, to_dict
from fewstep.jumps import euler_step
from fewstep.objectives import ECT
from fewstep.objectives.bridges import DataRay, ReferenceBatch, posterior_shift
from fewstep.objectives.pairs import Pair, make_pair
from fewstep.penalty import Penalty
from fewstep.times import Constant

BRIDGE = ReferenceBatch()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pair_of(x_0: Tensor, eps: Tensor, t: Tensor, ratio: float = 4.0, cond: Tensor | None = None) -> Pair:
    r = torch.where(torch.arange(len(t)) % 3 == 2, 0.0, t * (1 - 1 / ratio))
    return make_pair(x_0, eps, t, r, t - r, cond)


def carried(both: Pair) -> Tensor:
    return BRIDGE(both, both.x_t, None)


def test_on_the_whole_data_set_it_is_the_exact_ode_step() -> None:
    """Every point once in the batch: mean = D, so x_r is the Euler step, and D itself where r = 0."""
    points = normal(9, 3)
    law = PointMasses(points, torch.full((9,), 1 / 9, dtype=torch.float64))
    t = torch.logspace(-2, 2, 9, dtype=torch.float64)
    both = pair_of(points, normal(9, 3, seed=1), t)
    want = euler_step(as_denoiser(law.denoise, 3), both.x_t, both.t, both.r)
    torch.testing.assert_close(carried(both), want.detach(), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(carried(both)[2::3], law.denoise(both.x_t, both.t)[2::3], rtol=1e-11, atol=1e-11)
    assert (carried(both) - DataRay()(both, both.x_t, None)).abs().max() > 0.1


def test_unbiased_with_the_own_image_and_biased_without() -> None:
    """Three points, batches of two, every batch enumerated: the mean over what made x_t is D to the last bits."""
    points, weights = torch.tensor([[-1.0], [0.2], [1.5]], dtype=torch.float64), torch.tensor([0.2, 0.5, 0.3])
    law = PointMasses(points, weights.double())
    x, t = torch.tensor([[1.4]], dtype=torch.float64), torch.tensor([0.8], dtype=torch.float64)
    likelihood = (-(x - points).square()[:, 0] / (2 * t**2)).exp() * weights
    own = likelihood / likelihood.sum()
    total, without = torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for i in range(3):
        for j in range(3):
            batch, chance = points[[i, j]], own[i] * weights[j]
            shift = posterior_shift(batch, torch.cat((x, x)), t.expand(2), None)[0]
            total += chance * (batch[0] + shift)
            without += chance * batch[1]
    want = law.denoise(x, t)[0]
    torch.testing.assert_close(total, want, rtol=1e-7, atol=1e-7)
    assert abs(float(without - want)) > 0.3


def test_the_error_falls_with_the_batch() -> None:
    """Mean square distance to D at t = 1, N(0, 1/4): the ray pays lam t^2/(lam + t^2) = 0.2."""
    law, errors = Gaussian.white(0.25, 2), []
    for size in (1, 4, 16, 64, 256):
        x_0, t = 0.5 * normal(2048, 2, seed=3), torch.ones(size, dtype=torch.float64)
        x_t = x_0 + normal(2048, 2, seed=4)
        parts = zip(x_0.split(size), x_t.split(size), strict=True)
        mean = torch.cat([a + posterior_shift(a, b, t, None) for a, b in parts])
        errors.append(float((mean - law.denoise(x_t, 1.0)).square().mean()))
    assert errors[0] == pytest.approx(0.2, rel=0.06)
    assert all(fine < 0.6 * coarse for coarse, fine in itertools.pairwise(errors)), errors
    assert errors[-1] < errors[0] / 50


def test_alone_it_is_the_ray() -> None:
    both = pair_of(normal(1, 5), normal(1, 5, seed=1), torch.tensor([0.7], dtype=torch.float64))
    assert torch.equal(carried(both), DataRay()(both, both.x_t, None))


def test_only_rows_of_the_same_label_count() -> None:
    x_0, eps, t = normal(9, 4), normal(9, 4, seed=1), torch.linspace(0.3, 3, 9, dtype=torch.float64)
    labels = torch.eye(3, dtype=torch.float64)[[0, 1, 0, 2, 1, 0, 0, 1, 2]]
    labels[[5, 7]] = 0  # no label: a class of its own
    got = posterior_shift(x_0, x_0 + t[:, None] * eps, t, labels)
    for rows in ([0, 2, 6], [1, 4], [3, 8], [5, 7]):
        alone = posterior_shift(x_0[rows], (x_0 + t[:, None] * eps)[rows], t[rows], None)
        torch.testing.assert_close(got[rows], alone, rtol=1e-12, atol=1e-12)
    assert (got - posterior_shift(x_0, x_0 + t[:, None] * eps, t, None)).abs().max() > 0.05


@pytest.mark.parametrize("autocast", [False, True])
def test_float32_agrees_with_float64_at_every_noise_level(autocast: bool) -> None:
    """3072 dimensions from t = 0.002 to 80: x_r to 1e-5 of its length where r > 0, and the mean alone (r = 0) to 2e-3,
    since |x_t - x|^2/2t^2 is d/2 = 1536 give or take 1e-4; also inside bf16 autocast."""
    x_0, eps, t = 0.5 * normal(16, 3, 32, 32), normal(16, 3, 32, 32, seed=1), torch.logspace(-2.7, 1.9, 16).double()
    twins = 2 * t[:8] / 3072**0.5  # at distance 2t: the weights are neither 0 nor 1 at small t
    x_0[8:] = x_0[:8] + twins[:, None, None, None] * normal(8, 3, 32, 32, seed=2)
    want = carried(pair_of(x_0, eps, t))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        got = carried(pair_of(x_0.float(), eps.float(), t))
    assert got.dtype == torch.float32
    error = (got - want).flatten(1).norm(dim=1) / want.flatten(1).norm(dim=1)
    clean = torch.arange(16) % 3 == 2
    assert float(error[~clean].max()) < 1e-5
    assert float(error[clean].max()) < 2e-3
    shift = want - DataRay()(pair_of(x_0, eps, t), want, None)
    assert float(shift.abs().max()) > 1e-3  # there is something to get wrong


def test_in_ect_the_target_is_taken_at_the_carried_point() -> None:
    law, x_0, eps = Gaussian.white(0.25, 3), 0.5 * normal(6, 3), normal(6, 3, seed=1)
    student, t = as_denoiser(law.endpoint, 3), torch.linspace(0.2, 4, 6, dtype=torch.float64)
    objective = ECT(mapping=Constant(), penalty=Penalty("l2", "one"), bridge=BRIDGE)
    r = 0.75 * t
    x_r = carried(make_pair(x_0, eps, t, r, t - r))
    want = (law.endpoint(x_0 + t[:, None] * eps, t) - law.endpoint(x_r, r)).norm(dim=1)
    torch.testing.assert_close(objective.loss_at(student, x_0, t, eps, 4.0), want)
    assert not objective.needs_teacher
    assert from_dict(ECT, to_dict(objective)) == objective


def test_one_graph_under_compile() -> None:
    torch._dynamo.reset()
    both, student = pair_of(normal(6, 3), normal(6, 3, seed=1), torch.linspace(0.2, 4, 6).double()), as_denoiser(
        Gaussian.white(0.25, 3).endpoint, 3
    )  # fmt: skip
    objective = ECT(bridge=BRIDGE)
    compiled = torch.compile(objective.loss_between, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(student, both), objective.loss_between(student, both), rtol=1e-12, atol=1e-12)
    torch._dynamo.reset()
