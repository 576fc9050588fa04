"""Jumps on exact laws: DDIM and its inverse, the adjusted step's norm, solver orders, the jump sampler's flow map."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from oracles import Gaussian, Mixture, Plain, as_denoiser
from torch import Tensor

from fewstep.denoiser import Denoiser, Parametrization
from fewstep.errors import ConfigError
from fewstep.jumps import addim, ddim, euler_step, heun_step, inv_ddim
from fewstep.process import EDM
from fewstep.randomness import Streams
from fewstep.sampling import few_step_times, jump_sample, jump_times, possible_steps, sample

T = 80.0
LAW = Gaussian.random(3, seed=4)
COUNTS = (1, 2, 4, 8)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def times(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


class FlowMap(Plain):
    """A law's exact ``g(x, t, s)`` as a two-time backbone, which reads its times off ``c_landing``."""

    two_time = True

    def __init__(self, law: Gaussian, sigma_data: float = 0.5) -> None:
        super().__init__(lambda x, t: x)
        self.law, self.unit = law, 2 * sigma_data

    def forward(self, x: Tensor, c_noise: Tensor, cond: Tensor | None, c_landing: Tensor) -> Tensor:
        s, t = ((4 * c).exp().sub(0.002).clamp_min(0) * self.unit for c in c_landing.unbind(1))
        return g(self.law, x, t, s) + 0 * self.idle


def g(law: Gaussian | Mixture, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """``inv_ddim`` of the exact landing point, written out: ``(t x_s - s x_t)/(t - s)``."""
    t, s = t[:, None], s[:, None]
    return (t * law.flow(x, t, s) - s * x) / (t - s)


def jumper(**settings: object) -> Denoiser:
    """A two-time jump student that is exact."""
    parametrization = Parametrization("x0", time="native")
    return Denoiser(FlowMap(LAW), EDM(), parametrization, sample_shape=(3,), sampler="jump", **settings)  # type: ignore[arg-type]


def segments(law: Gaussian, edges: list[float]) -> Denoiser:
    """An exact multistep consistency model: it knows its segments, and is not told where to land."""
    lower = torch.tensor([*edges[1:], 0.0], dtype=torch.float64)

    def land(x: Tensor, t: Tensor) -> Tensor:
        s = torch.stack([lower[lower < float(v) * (1 - 1e-6)].max() for v in t])
        return g(law, x, t, s)

    model = as_denoiser(land, len(law.mean))
    model.sampler, model.sampler_times = "jump", {len(edges): tuple(edges)}
    return model


# ---------------------------------------------------------------------------------------------- steps
def test_ddim_by_hand_and_its_inverse() -> None:
    x_0, x_t = times(1.0, 1.0, -2.0)[:, None], times(5.0, 5.0, 4.0)[:, None]
    t, s = times(4.0, 4.0, 3.0), times(1.0, 0.0, 1.5)
    x_s = ddim(x_0, x_t, t, s)
    assert x_s.flatten().tolist() == [2.0, 1.0, 1.0]
    torch.testing.assert_close(inv_ddim(x_s, x_t, t, s), x_0, rtol=0, atol=1e-14)
    assert float(ddim(x_0, x_t, 4.0, 1.0)[0]) == 2.0
    assert float(inv_ddim(x_s, x_t, 4.0, 1.0)[0]) == 1.0
    x_0, x_t, t = normal(0, 64, 2, 3), normal(1, 64, 2, 3), normal(2, 64).exp()
    for ratio in (0.0, 0.3, 0.999):
        torch.testing.assert_close(inv_ddim(ddim(x_0, x_t, t, ratio * t), x_t, t, ratio * t), x_0, rtol=0, atol=1e-12)
    torch.testing.assert_close(ddim(x_0, x_0 + 3 * x_t, 3.0, 2.0), x_0 + 2 * x_t)  # the data's own ray


def test_addim_without_variance_is_ddim() -> None:
    x_0, x_t, t = normal(0, 64, 2, 3), normal(1, 64, 2, 3), normal(2, 64).exp()
    for ratio in (0.0, 0.4, 1.0):
        torch.testing.assert_close(
            addim(x_0, x_t, t, ratio * t, torch.zeros(64)), ddim(x_0, x_t, t, ratio * t), rtol=0, atol=1e-13
        )
    assert torch.equal(addim(x_0, x_0, t, t / 2, torch.ones(64).double()), x_0)  # no direction: no change, no NaN


def test_addim_adds_the_variance_to_each_samples_own_norm() -> None:
    """Where x_hat is orthogonal to eps_hat: ``|x_s|^2 = |x_hat|^2 + s^2 |eps_hat|^2 + (1 - s/t)^2 d V``."""
    clean, noise = torch.zeros(5, 2, 3).double(), torch.zeros(5, 2, 3).double()
    clean[:, 0], noise[:, 1] = normal(0, 5, 3), normal(1, 5, 3)
    t, s, variance = times(2.0, 2.0, 3.0, 80.0, 0.5), times(1.0, 0.0, 2.0, 2.5, 0.5), times(0.1, 0.2, 0.0, 3.0, 1.0)
    x_s = addim(clean, clean + t[:, None, None] * noise, t, s, variance)
    square = [v.square().sum((1, 2)) for v in (x_s, clean, noise)]
    torch.testing.assert_close(square[0], square[1] + s**2 * square[2] + (1 - s / t) ** 2 * 6 * variance)


@pytest.mark.parametrize("variance", [0.01, 0.001])
def test_addim_restores_the_norm_that_a_ddim_step_with_the_posterior_mean_loses(variance: float) -> None:
    """On N(0, lambda): ``E|x_s|^2 = d (lambda + s^2)``, of which DDIM misses ``(1 - s/t)^2 d V`` exactly.

    The adjusted step takes x_hat and eps_hat to be orthogonal. Here ``E <x_hat, eps_hat> = d V/t`` (Stein), so it
    gives back ``1 + V/(s t)`` of what is missing, to first order in V.
    """
    t, s, d = 2.0, 1.0, 7
    law = Gaussian.white(variance, d)
    x_t = normal(0, 1, d)
    x_t *= math.sqrt(d * (variance + t**2)) / x_t.norm()  # its norm is the expected one
    posterior = variance * t**2 / (variance + t**2)
    clean, level, landing = law.denoise(x_t, t), times(t), times(s)
    missing = (variance + s**2) - float(ddim(clean, x_t, level, landing).square().mean())
    assert missing == pytest.approx((1 - s / t) ** 2 * posterior, rel=1e-9)
    left = (variance + s**2) - float(addim(clean, x_t, level, landing, times(posterior)).square().mean())
    assert -left / missing == pytest.approx(posterior / (s * t), rel=0.02)


# ------------------------------------------------------------------------------------------ ODE steps
Step = Callable[..., Tensor]


def order(step: Step, law: Gaussian | Mixture, x: Tensor) -> float:
    """Order of the global error of ``step`` from t = 2 to 0.5, fitted by halving the steps."""
    errors, counts = [], (8, 16, 32, 64)
    for n in counts:
        state, levels = x, torch.linspace(2, 0.5, n + 1, dtype=torch.float64)
        for t, r in itertools.pairwise(levels):
            state = step(lambda x, t, cond: law.denoise(x, t), state, t.expand(len(x)), r.expand(len(x)))
        errors.append(float((state - law.flow(x, 2.0, 0.5)).abs().max()))
    halvings = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert errors[-1] > 1e-9  # of the method, not of rounding
    return halvings[-1]


@pytest.mark.parametrize(("law", "size"), [(LAW, 3), (Mixture(), 1)])
def test_euler_is_first_order_and_heun_second(law: Gaussian | Mixture, size: int) -> None:
    x = 2 * normal(3, 16, size)
    assert order(euler_step, law, x) == pytest.approx(1, abs=0.05)
    assert order(heun_step, law, x) == pytest.approx(2, abs=0.07)


def test_steps_at_zero_and_rows_of_their_own() -> None:
    """Rows with r = 0 get D, the network never sees time 0, and each row is stepped alone."""
    seen: list[Tensor] = []

    def model(x: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        seen.append(t)
        assert cond is labels
        return LAW.denoise(x, t)

    labels, x = torch.eye(4), normal(5, 4, 3)
    t, r = times(1.0, 2.0, 3.0, 0.5), times(0.0, 1.5, 0.0, 0.1)
    for step, evaluations in ((euler_step, 1), (heun_step, 2)):
        seen.clear()
        out = step(model, x, t, r, labels)
        assert len(seen) == evaluations and all(bool((level > 0).all()) for level in seen)
        torch.testing.assert_close(out[r == 0], LAW.denoise(x, t)[r == 0], rtol=0, atol=1e-14)
        alone = [step(model, x[i : i + 1], t[i : i + 1], r[i : i + 1], labels) for i in range(4)]
        torch.testing.assert_close(out, torch.cat(alone), rtol=0, atol=1e-14)
    low = heun_step(lambda x, t, cond: 0 * x, x.bfloat16(), t, r)
    assert low.dtype == torch.float32


# ------------------------------------------------------------------------------------------- the edges
def test_jump_times_by_hand() -> None:
    model = jumper()
    assert jump_times(model, 1) == [80.0]
    assert jump_times(model, 2) == pytest.approx([80.0, 2.515], rel=1e-3)
    assert jump_times(model, 4)[::2] == pytest.approx(jump_times(model, 2), rel=1e-12)  # nested
    assert jump_times(model, 8)[::2] == pytest.approx(jump_times(model, 4), rel=1e-12)
    grid = [(80 ** (1 / 7) + k / 8 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for k in range(8)]  # EDM eq. 5
    assert jump_times(model, 8) == pytest.approx(grid, rel=1e-12)
    wide = Denoiser(model.backbone, EDM(), Parametrization("x0", sigma_data=1.0), sample_shape=(3,), sigma_max=160.0)
    assert jump_times(wide, 4) == pytest.approx([2 * v for v in jump_times(model, 4)], rel=1e-12)
    coarse = Denoiser(model.backbone, EDM(), model.parametrization, sample_shape=(3,), sigma_min=0.03)
    assert min(jump_times(coarse, 64)) > 0.03
    with pytest.raises(ConfigError, match="at least 1"):
        jump_times(model, 0)


# ----------------------------------------------------------------------------------------- the sampler
def land(latents: Tensor) -> Tensor:
    return LAW.flow(T * latents, T, 0.0)


@pytest.mark.parametrize("steps", COUNTS)
def test_exact_jumps_follow_the_exact_flow(steps: int) -> None:
    latents = normal(6, 32, 3)

    def model(x: Tensor, t: Tensor, cond: Tensor | None, s: Tensor) -> Tensor:
        seen.append((float(t[0]), float(s[0])))
        return g(LAW, x, t, s)

    for edges in (jump_times(jumper(), steps), [T, *(40 / (k + 1) ** 2 for k in range(steps - 1))]):
        seen: list[tuple[float, float]] = []
        torch.testing.assert_close(jump_sample(model, latents, edges, two_time=True), land(latents), rtol=0, atol=1e-10)
        assert seen == list(zip(edges, [*edges[1:], 0.0], strict=True))


@pytest.mark.parametrize("steps", COUNTS)
def test_sample_jumps_with_a_two_time_student(steps: int) -> None:
    model, n = jumper(sampler_times={4: (80.0, 30.0, 3.0, 0.3)}), 9
    latents = Streams(5).normal("sample/latent", torch.arange(n), (3,), torch.float64)
    torch.testing.assert_close(sample(model, n, steps=steps, seed=5), land(latents), rtol=0, atol=1e-10)
    custom = [70.0 / 3**k for k in range(steps)]
    want = LAW.flow(70 * latents, 70.0, 0.0)
    torch.testing.assert_close(sample(model, n, times=custom, seed=5), want, rtol=0, atol=1e-10)
    assert possible_steps(model) is None
    assert few_step_times(model, steps) == ([80.0, 30.0, 3.0, 0.3] if steps == 4 else jump_times(model, steps))


@pytest.mark.parametrize("steps", COUNTS)
def test_sample_jumps_with_a_student_of_segments(steps: int) -> None:
    """Not told where it lands: exact in its own steps, refused in any other."""
    model, n = segments(LAW, jump_times(jumper(), steps)), 9
    want = land(Streams(0).normal("sample/latent", torch.arange(n), (3,), torch.float64))
    torch.testing.assert_close(sample(model, n, steps=steps), want, rtol=0, atol=1e-10)
    own = list(model.sampler_times[steps])
    assert torch.equal(sample(model, n, times=own), sample(model, n, steps=steps))
    assert possible_steps(model) == (steps,)
    for other in {*COUNTS} - {steps}:
        with pytest.raises(ConfigError, match=rf"trained for only\. Got: {other} steps\. Wanted: {steps}\."):
            sample(model, n, steps=other)
    with pytest.raises(ConfigError, match="trained for only"):
        sample(model, n, times=[0.9 * v for v in own])
    model.sampler_times = {}
    with pytest.raises(ConfigError, match="Wanted: none, its sampler_times are empty"):
        few_step_times(model, steps)
    model.sampler_times = {1: (80.0,), 8: tuple(jump_times(jumper(), 8))}
    with pytest.raises(ConfigError, match="Wanted: 1 or 8"):
        sample(model, n, steps=2)


def test_a_consistency_student_is_not_asked_for_its_steps() -> None:
    model = as_denoiser(LAW.endpoint, 3)
    assert model.sampler == "consistency"
    assert possible_steps(model) is None
    assert few_step_times(model, 2) == [80.0, 0.821]


def test_a_jump_differs_from_fresh_noise() -> None:
    """The same network sampled by jumps and by consistency steps: different samples of the same law."""
    model, n = jumper(), 4000
    jumps = sample(model, n, steps=3)
    model.sampler = "consistency"
    fresh = sample(model, n, steps=3)
    assert (jumps - fresh).abs().max() > 0.5
    for x in (jumps, fresh):
        torch.testing.assert_close(x.mean(0), LAW.mean, rtol=0, atol=0.08)
        covariance = LAW.basis * LAW.variances @ LAW.basis.T
        torch.testing.assert_close(torch.cov(x.T), covariance, rtol=0, atol=0.12)


def test_sample_i_does_not_depend_on_the_batch() -> None:
    model = jumper()
    whole = sample(model, 20, steps=4, seed=3)
    for batch_size in (1, 7):
        torch.testing.assert_close(sample(model, 20, steps=4, seed=3, batch_size=batch_size), whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(sample(model, 5, steps=4, seed=3, first=6), whole[6:11], rtol=0, atol=1e-12)
    assert not torch.allclose(sample(model, 20, steps=4, seed=4), whole, atol=1e-2)
