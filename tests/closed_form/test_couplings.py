"""Couplings of noise and images: minibatch optimal transport and the learned one (VCT)."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from fewstep.backbones.small import MLP
from fewstep.config import from_dict, to_dict
from fewstep.denoiser import Denoiser, Parametrization
from fewstep.errors import ConfigError
from fewstep.objectives import ECT, Beside, StepRandom
from fewstep.objectives.couplings import Independent, Learned, NoiseEncoder, OptimalTransport, assignment, kl_to_normal
from fewstep.objectives.levers import Levers
from fewstep.process import EDM, expand
from fewstep.randomness import Streams
from fewstep.times import draw, pair
from fewstep.types import Batch, Progress

START = Progress(images_seen=0, total_images=1000)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def numbers(batch: int) -> StepRandom:
    return StepRandom(Streams(3), torch.arange(batch), torch.device("cpu"))


def points_student() -> Denoiser:
    torch.manual_seed(0)
    backbone = MLP(sample_shape=(2,), width=16)
    for parameter in backbone.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return Denoiser(backbone, EDM(), Parametrization(), sample_shape=(2,)).double().train()


def total(cost: np.ndarray, columns: np.ndarray) -> float:
    assert sorted(columns) == list(range(len(cost)))
    return float(cost[np.arange(len(cost)), columns].sum())


@pytest.mark.parametrize("seed", range(8))
def test_assignment_is_the_best_of_all_720_permutations(seed: int) -> None:
    cost = normal(6, 6, seed=seed).numpy()
    best = min(sum(cost[i, j] for i, j in enumerate(p)) for p in itertools.permutations(range(6)))
    assert total(cost, assignment(cost)) == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("size", [1, 2, 17, 60])
def test_assignment_agrees_with_scipy(size: int) -> None:
    """Also with ties, which have several best permutations."""
    for cost in (normal(size, size, seed=size).numpy(), np.rint(2 * normal(size, size).numpy())):
        assert total(cost, assignment(cost.copy())) == pytest.approx(cost[linear_sum_assignment(cost)].sum(), abs=1e-10)


def test_optimal_transport_permutes_the_noise_and_nothing_else() -> None:
    x_0, eps = 0.5 * normal(32, 1, 4, 4), normal(32, 1, 4, 4, seed=1)
    coupled, cost = OptimalTransport()(x_0, eps, numbers(32), None)
    assert cost is None

    def rows(noise: Tensor) -> list[list[float]]:
        return sorted(noise.flatten(1).tolist())

    def distance(noise: Tensor) -> float:
        return float((x_0 - noise).square().sum())

    assert rows(coupled) == rows(eps), "the marginal of the noise is what it was"
    assert distance(coupled) < 0.95 * distance(eps)
    best = linear_sum_assignment(torch.cdist(x_0.flatten(1), eps.flatten(1)).square().numpy())
    assert torch.equal(coupled, eps[torch.from_numpy(best[1])])


def test_optimal_transport_in_one_dimension_sorts() -> None:
    x_0, eps = normal(50, 1), normal(50, 1, seed=1).float().double()
    coupled, _ = OptimalTransport()(x_0, eps, numbers(50), None)
    assert torch.equal(coupled[x_0[:, 0].argsort()], eps.sort(dim=0).values)


def test_the_lever_reaches_the_loss() -> None:
    """The loss under the lever is the plain loss at the permuted noise."""
    student, batch, random = points_student(), Batch(0.5 * normal(16, 2, seed=2)), numbers(16)
    objective = ECT(levers=Levers(coupling=OptimalTransport()))
    found = objective.loss(student, batch, START, random).per_sample
    eps = random.normal("noise", batch.x)
    coupled, _ = OptimalTransport()(batch.x, eps, random, None)
    assert not torch.equal(eps, coupled)
    t = draw(objective.law, random.uniform("times"), 0.0, float("inf"))
    ratio = objective.schedule.ratio(START)
    assert torch.equal(found, ECT().loss_at(student, batch.x, t, coupled, ratio))
    assert not torch.allclose(found, ECT().loss_at(student, batch.x, t, eps, ratio))


@pytest.mark.parametrize("shape", [(2,), (3, 8, 8), (4, 3, 2, 2)])
def test_the_learned_coupling_starts_as_the_independent_one(shape: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    encoder = NoiseEncoder(shape, 8, 0.5)
    x_0, eps = normal(5, *shape).float(), normal(5, *shape, seed=1).float()
    coupled, cost = Learned()(x_0, eps, numbers(5), encoder)
    assert torch.equal(coupled, eps)
    assert cost is not None and torch.equal(cost, torch.zeros(5))


def test_kl_is_that_of_two_normal_laws() -> None:
    mu, log_sigma = normal(7, 2, 3, 3), 0.5 * normal(7, 2, 3, 3, seed=1)
    truth = kl_divergence(Normal(mu, log_sigma.exp()), Normal(0.0, 1.0)).flatten(1).sum(1)
    torch.testing.assert_close(kl_to_normal(mu, log_sigma), truth, rtol=1e-12, atol=0)
    assert kl_to_normal(torch.tensor([[3.0]]), torch.tensor([[math.log(2)]])).item() == pytest.approx(6 - math.log(2))
    near = torch.full((1, 4), 1e-4)  # KL = sum (ln sigma)^2: float32 would lose it without expm1
    assert kl_to_normal(torch.zeros(1, 4), near).item() == pytest.approx(4e-8, rel=2e-3)


def test_the_learned_cost_is_weighed_and_summed_per_sample() -> None:
    encoder = NoiseEncoder((2,), 4, 0.5).double()
    encoder.last.bias.data = torch.tensor([1.0, 0.0, 0.0, math.log(2)], dtype=torch.float64)
    x_0, eps = normal(3, 2), normal(3, 2, seed=1)
    coupled, cost = Learned(kl=2.5)(x_0, eps, numbers(3), encoder)
    torch.testing.assert_close(coupled, eps * torch.tensor([1.0, 2.0]) + torch.tensor([1.0, 0.0]))
    truth = 2.5 * (0.5 + 1.5 - math.log(2))
    torch.testing.assert_close(cost, torch.full((3,), truth, dtype=torch.float64))


def trained_encoder(student: Denoiser) -> NoiseEncoder:
    torch.manual_seed(4)
    encoder = Learned(width=8).extra(student)
    assert isinstance(encoder, NoiseEncoder)
    encoder.last.weight.data = 0.3 * torch.randn_like(encoder.last.weight)
    return encoder


def test_the_encoder_gets_its_gradient_through_the_students_pass_only() -> None:
    """It equals the derivative with the target held still, from the formula written out."""
    student, x_0 = points_student(), 0.5 * normal(6, 2, seed=2)
    encoder, random = trained_encoder(student), numbers(6)
    objective = ECT(levers=Levers(coupling=Learned(kl=0.7)))
    objective.loss(student, Batch(x_0), START, random, Beside(extra=encoder)).per_sample.sum().backward()
    found = [p.grad.clone() for p in encoder.parameters()]  # type: ignore[union-attr]
    assert all(g.abs().max() > 1e-6 for g in found)

    t = draw(objective.law, random.uniform("times"), 0.0, float("inf"))
    r, gap = pair(objective.mapping, t, objective.schedule.ratio(START))
    assert (r > 0).any() and (r == 0).any()
    mu, log_sigma = encoder(x_0)
    noise = mu + log_sigma.exp() * random.normal("noise", x_0)
    fixed = noise.detach()
    goal = torch.where(expand(r, x_0) > 0, student(x_0 + expand(r, x_0) * fixed, r.clamp_min(1e-9)), x_0).detach()
    out = student(x_0 + expand(t, x_0) * noise, t)
    loss = (out - goal).norm(dim=1) / gap + 0.7 * (mu**2 + (2 * log_sigma).exp() - 1 - 2 * log_sigma).sum(1) / 2
    expected = torch.autograd.grad(loss.sum(), list(encoder.parameters()))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_every_parameter_has_a_gradient_from_the_first_step_on() -> None:
    """Several processes wait for all of them, although only the last layer's is not 0 at first."""
    student = points_student()
    encoder = Learned().extra(student)
    assert encoder is not None
    objective = ECT(levers=Levers(coupling=Learned()))
    loss = objective.loss(student, Batch(0.5 * normal(6, 2)), START, numbers(6), Beside(extra=encoder))
    loss.per_sample.sum().backward()
    assert all(p.grad is not None for p in encoder.parameters())
    assert encoder.last.weight.grad.abs().max() > 1e-6  # type: ignore[union-attr]


def test_the_image_encoder_sees_all_of_a_16_pixel_image_from_its_middle() -> None:
    encoder = NoiseEncoder((1, 16, 16), 4, 0.5).double()
    encoder.last.weight.data = 0.1 * normal(*encoder.last.weight.shape)
    x = normal(1, 1, 16, 16).requires_grad_(True)
    encoder(x)[0][0, 0, 8, 8].backward()
    assert x.grad is not None and (x.grad != 0).all()


def test_the_encoder_sees_data_in_units_of_its_spread() -> None:
    """The same weights give the same law for data twice as wide that is known to be so."""
    student, x_0 = points_student(), 0.5 * normal(6, 2, seed=2)
    encoder = trained_encoder(student)
    wide = NoiseEncoder((2,), 8, 1.0).double()
    wide.load_state_dict(encoder.state_dict())
    for a, b in zip(encoder(x_0), wide(2 * x_0), strict=True):
        assert torch.equal(a, b)


def test_couplings_come_back_from_their_description() -> None:
    for coupling in (Independent(), OptimalTransport(), Learned(kl=0.5, width=7)):
        levers = Levers(coupling=coupling)
        assert from_dict(Levers, to_dict(levers)) == levers


def test_what_cannot_be_learned_is_refused() -> None:
    with pytest.raises(ConfigError, match="kl > 0"):
        Learned(kl=0.0)
    with pytest.raises(ConfigError, match="needs its network"):
        Learned()(normal(2, 2), normal(2, 2), numbers(2), None)
