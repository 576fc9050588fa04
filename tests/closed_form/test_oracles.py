"""The oracles against independent numerics: autograd scores, an ODE solver, each other."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from oracles import Gaussian, Mixture, PointMasses, TwoPoints
from scipy.integrate import solve_ivp
from torch import Tensor


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def integrate(denoise: object, x: Tensor, t: float, s: float) -> Tensor:
    """The probability-flow ODE ``dx/dt = (x - D)/t`` by DOP853, one row."""

    def slope(time: float, y: np.ndarray) -> np.ndarray:
        state = torch.from_numpy(np.ascontiguousarray(y))[None]
        return ((state - denoise(state, time)) / time)[0].numpy()  # type: ignore[operator]

    out = solve_ivp(slope, (t, s), x.numpy(), rtol=1e-11, atol=1e-13, method="DOP853")
    return torch.from_numpy(out.y[:, -1].copy())


def test_gaussian_flow_map_solves_the_ode() -> None:
    law, x = Gaussian.random(4), normal(1, 4)
    torch.testing.assert_close(integrate(law.denoise, x[0], 3.0, 0.2), law.flow(x, 3.0, 0.2)[0], rtol=1e-8, atol=1e-10)


def test_gaussian_denoiser_is_tweedies_formula() -> None:
    law, x, t = Gaussian.random(4), normal(5, 4), 0.7
    torch.testing.assert_close(law.denoise(x, t), x + t**2 * law.score(x, t), rtol=1e-12, atol=1e-12)


def test_gaussian_flow_map_is_a_semigroup() -> None:
    law, x = Gaussian.random(3), normal(6, 3)
    through = law.flow(law.flow(x, 5.0, 1.0), 1.0, 0.3)
    torch.testing.assert_close(through, law.flow(x, 5.0, 0.3), rtol=1e-12, atol=1e-12)


def test_point_masses_are_tweedies_formula() -> None:
    law = PointMasses(normal(6, 3), torch.tensor([0.1, 0.3, 0.1, 0.2, 0.2, 0.1], dtype=torch.float64))
    x, t = normal(5, 3, seed=1).requires_grad_(), 0.8
    (score,) = torch.autograd.grad(law.log_density(x, t).sum(), x)
    torch.testing.assert_close(law.denoise(x, t), x + t**2 * score, rtol=1e-10, atol=1e-12)


def test_one_point_denoises_and_lands_on_itself() -> None:
    law = PointMasses(normal(1, 3), torch.ones(1, dtype=torch.float64))
    x = normal(4, 3, seed=1)
    assert torch.equal(law.denoise(x, 2.0), law.points.expand(4, 3))
    assert torch.equal(law.endpoint(x, 2.0), law.denoise(x, 2.0))


def test_two_points_equal_two_point_masses_and_land_by_sign() -> None:
    a = torch.tensor([0.3, -0.4], dtype=torch.float64)
    law, masses = TwoPoints(a), PointMasses(torch.stack((a, -a)), torch.full((2,), 0.5, dtype=torch.float64))
    x = normal(5, 2)
    torch.testing.assert_close(law.denoise(x, 0.6), masses.denoise(x, 0.6), rtol=1e-12, atol=1e-14)
    landed = integrate(law.denoise, x[0], 2.0, 0.02)
    torch.testing.assert_close(landed, law.endpoint(x, 2.0)[0], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("start", [-1.7, 0.05, 2.4])
def test_mixture_quantile_map_solves_the_ode(start: float) -> None:
    law, x = Mixture(), torch.tensor([[start]], dtype=torch.float64)
    torch.testing.assert_close(law.flow(x, 3.0, 0.1)[0], integrate(law.denoise, x[0], 3.0, 0.1), rtol=1e-8, atol=1e-9)


def test_a_mixture_of_one_is_the_gaussian() -> None:
    one = torch.ones(1, dtype=torch.float64)
    law, gauss = Mixture(one, 0.3 * one, 0.5 * one), Gaussian.white(0.25, mean=0.3)
    x = 3 * normal(9, 1)
    torch.testing.assert_close(law.denoise(x, 1.3), gauss.denoise(x, 1.3), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(law.endpoint(x, 1.3), gauss.endpoint(x, 1.3), rtol=1e-10, atol=1e-10)
