"""Samplers on exact laws: order of convergence, gains, variance recursion, seeds per sample."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from oracles import Gaussian, Mixture, as_denoiser
from scipy import stats
from torch import Tensor, nn

from fewstep.denoiser import Denoiser, Parametrization
from fewstep.errors import ConfigError
from fewstep.process import EDM, RectifiedFlow
from fewstep.randomness import Streams
from fewstep.sampling import (
    check_times,
    consistency_sample,
    few_step_times,
    heun_sample,
    karras_grid,
    ode_sample,
    ode_sample_nfe,
    sample,
)

LAM, T = 0.25, 80.0
WHITE = Gaussian.white(LAM)
Model = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def model(function: Callable[[Tensor, Tensor], Tensor]) -> Model:
    return lambda x, t, cond: function(x, t)


def gain(nodes: int, variance: float = LAM, order: int = 2) -> float:
    """Overshoot of the deterministic sampler on N(0, variance): its linear gain over the exact one."""
    law, one = Gaussian.white(variance), torch.ones(1, 1, dtype=torch.float64)
    out = heun_sample(model(law.denoise), one, karras_grid(nodes), order=order)
    return float(out / law.endpoint(T * one, T))


def latents(seed: int, n: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return Streams(seed).normal("sample/latent", torch.arange(n), shape, dtype)


# ---------------------------------------------------------------------------------- EDM's sampler
def test_karras_grid_is_edms_equation_5() -> None:
    grid = karras_grid(18)
    want = [(80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(18)]
    assert grid == pytest.approx([*want, 0.0], rel=1e-12)
    assert karras_grid(1) == [80.0, 0.0]
    for steps in (0, -3):
        with pytest.raises(ConfigError, match="steps must be at least 1"):
            karras_grid(steps)


def test_heun_is_second_order_and_euler_first() -> None:
    """Fitted on [80, 0.002], where every step is of the same order (the last step to 0 is Euler)."""
    one = torch.ones(1, 1, dtype=torch.float64)
    nodes, exact = [72, 144, 288, 576], WHITE.flow(T * one, T, 0.002)
    for order in (1, 2):
        outs = [heun_sample(model(WHITE.denoise), one, karras_grid(n)[:-1], order=order) for n in nodes]
        errors = torch.stack([(out / exact - 1).abs().log() for out in outs]).flatten()
        levels = torch.tensor(nodes, dtype=torch.float64).log()
        slope = torch.linalg.lstsq(torch.stack((levels, torch.ones_like(levels)), 1), errors[:, None]).solution[0]
        assert -float(slope) == pytest.approx(order, abs=0.03), order


@pytest.mark.parametrize(
    ("nodes", "overshoot", "tolerance"), [(18, 0.055, 5e-4), (36, 0.012, 5e-4), (72, 0.0029, 5e-5)]
)
def test_gain_errors_of_the_teacher_reference(nodes: int, overshoot: float, tolerance: float) -> None:
    """math.md 4.1: 5.5 %, 1.2 %, 0.29 % at lambda = 0.25."""
    assert gain(nodes) - 1 == pytest.approx(overshoot, abs=tolerance)


@pytest.mark.parametrize(("variance", "overshoot"), [(1e-4, 0.16), (0.01, 0.09), (4.0, 0.036), (100.0, 0.022)])
def test_gain_errors_of_other_variances(variance: float, overshoot: float) -> None:
    assert gain(18, variance) - 1 == pytest.approx(overshoot, abs=6e-3)


def test_ode_sample_starts_at_sigma_max_times_noise() -> None:
    """The whole front door is linear on a Gaussian: its gain on its own latents is the algorithm's."""
    out = ode_sample(as_denoiser(WHITE.denoise), 6, steps=18, seed=5)
    want = gain(18) * WHITE.endpoint(T * latents(5, 6, 1), T)
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)


def test_evaluations_are_counted_as_promised() -> None:
    calls: list[float] = []

    def counting(x: Tensor, t: Tensor) -> Tensor:
        calls.append(float(t[0]))
        return WHITE.denoise(x, t)

    for nfe in (1, 2, 3, 4, 7, 35):
        calls.clear()
        ode_sample_nfe(as_denoiser(counting), 2, nfe)
        assert len(calls) == nfe
        assert calls[0] == 80.0
    for steps in (1, 2, 5):
        calls.clear()
        sample(as_denoiser(counting), 2, steps=steps)
        assert len(calls) == steps


def test_ode_sample_with_one_step_is_the_denoiser() -> None:
    out = ode_sample(as_denoiser(WHITE.denoise), 3, steps=1)
    torch.testing.assert_close(out, WHITE.denoise(T * latents(0, 3, 1), T), rtol=1e-10, atol=0)


def test_churn_keeps_the_law() -> None:
    """Churn adds variance that the steps remove again: the spread stays within the 72-node error."""
    law, n = Gaussian.white(LAM), 4000
    streams, index = Streams(3), torch.arange(n)
    noise = lambda k: streams.normal(f"churn/{k}", index, (1,), torch.float64)  # noqa: E731
    out = heun_sample(model(law.denoise), latents(3, n, 1), karras_grid(72), noise, churn=20.0, churn_noise=1.0)
    plain = heun_sample(model(law.denoise), latents(3, n, 1), karras_grid(72))
    assert float(out.std()) == pytest.approx(0.5, rel=0.04)
    assert (out - plain).abs().mean() > 0.3  # it did something
    with pytest.raises(ConfigError, match="churn needs noise"):
        heun_sample(model(law.denoise), latents(3, 2, 1), karras_grid(4), churn=20.0)


def test_churn_is_edms_algorithm_2() -> None:
    """One churned step by hand: gamma = min(S_churn/N, sqrt 2 - 1) inside [S_min, S_max] only."""
    noise = torch.full((1, 1), 0.7, dtype=torch.float64)
    x, t, t_next = torch.full((1, 1), 0.4, dtype=torch.float64), 2.0, 0.5
    times = [t, t_next, 0.0]
    out = heun_sample(
        model(WHITE.denoise), x, times, lambda k: noise, churn=0.6, churn_range=(1.0, 3.0), churn_noise=1.003
    )
    t_hat = t * (1 + 0.6 / 2)
    y = x * t + math.sqrt(t_hat**2 - t**2) * 1.003 * noise
    d = (y - WHITE.denoise(y, t_hat)) / t_hat
    y_euler = y + (t_next - t_hat) * d
    y = y + (t_next - t_hat) * (d + (y_euler - WHITE.denoise(y_euler, t_next)) / t_next) / 2
    torch.testing.assert_close(out, WHITE.denoise(y, t_next), rtol=1e-12, atol=0)


# ------------------------------------------------------------------------------ few-step sampler
@pytest.mark.parametrize(("tau", "contraction"), [(0.821, 0.27), (1.526, 0.097)])
@pytest.mark.parametrize("bias", [0.0, 0.02])
def test_variance_recursion_of_the_consistency_sampler(tau: float, contraction: float, bias: float) -> None:
    """math.md 2.9: v' = (1 - bias)^2 a(tau)^2 (v + tau^2), read off the sampler's linear responses."""

    def f(x: Tensor, t: Tensor) -> Tensor:
        return (1 - bias) * WHITE.endpoint(x, t)

    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)

    def variance(times: list[float]) -> float:
        first = consistency_sample(model(f), one, times, lambda k: zero)
        fresh = consistency_sample(model(f), zero, times, lambda k: one)
        return float(first**2 + fresh**2)

    v1, v2 = variance([T]), variance([T, tau])
    assert v1 == pytest.approx((1 - bias) ** 2 * LAM * T**2 / (LAM + T**2), rel=1e-12)
    assert v2 == pytest.approx((1 - bias) ** 2 * LAM / (LAM + tau**2) * (v1 + tau**2), rel=1e-12)
    if bias == 0:
        assert (v2 - LAM) / (v1 - LAM) == pytest.approx(LAM / (LAM + tau**2), rel=1e-6)
        assert (v2 - LAM) / (v1 - LAM) == pytest.approx(contraction, abs=5e-3)


def test_exact_function_gives_the_exact_one_step_law_of_a_gaussian() -> None:
    """Mean mu (1 - sqrt(lam/(lam+T^2))), spread sqrt(lam) T/sqrt(lam+T^2): the prior's only errors (1.5)."""
    law = Gaussian.white(LAM, mean=3.0)
    z = latents(0, 500, 1)
    out = sample(as_denoiser(law.endpoint), 500)
    slope = math.sqrt(LAM) * T / math.sqrt(LAM + T**2)
    want = 3.0 * (1 - math.sqrt(LAM / (LAM + T**2))) + slope * z
    torch.testing.assert_close(out, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_exact_function_gives_the_law_of_a_mixture(steps: int) -> None:
    law = Mixture()
    out = sample(as_denoiser(law.endpoint), 2000, steps=steps, seed=11)[:, 0]
    test = stats.kstest(out.numpy(), lambda x: law.cdf(torch.as_tensor(x)[:, None], 1e-9)[:, 0].numpy())
    assert test.pvalue > 0.01, test
    assert float(out.std()) == pytest.approx(0.5784, abs=0.03)


def test_denoiser_instead_of_consistency_function_is_caught_by_that_test() -> None:
    law = Mixture()
    out = sample(as_denoiser(law.denoise), 2000, seed=11)[:, 0]
    assert stats.kstest(out.numpy(), lambda x: law.cdf(torch.as_tensor(x)[:, None], 1e-9)[:, 0].numpy()).pvalue < 1e-9


def test_one_step_is_multistep_without_mid_times() -> None:
    denoiser = as_denoiser(Mixture().endpoint)
    one = sample(denoiser, 9, seed=2)
    assert torch.equal(one, sample(denoiser, 9, seed=2, times=[80.0]))
    assert torch.equal(one, denoiser(80.0 * latents(2, 9, 1), 80.0))
    assert not torch.equal(one, sample(denoiser, 9, seed=2, times=[80.0, 0.821]))


def test_two_steps_by_hand() -> None:
    law = Mixture()
    first = law.endpoint(T * latents(4, 5, 1), T)
    fresh = Streams(4).normal("sample/noise/1", torch.arange(5), (1,), torch.float64)
    got = sample(as_denoiser(law.endpoint), 5, steps=2, seed=4)
    torch.testing.assert_close(got, law.endpoint(first + 0.821 * fresh, 0.821), rtol=1e-12, atol=1e-12)


# --------------------------------------------------------------------------------- front doors
@pytest.mark.parametrize("front", [sample, ode_sample], ids=["sample", "ode_sample"])
def test_sample_i_depends_on_the_seed_and_on_i_alone(front: Callable[..., Tensor]) -> None:
    denoiser = as_denoiser(Gaussian.random(3).endpoint, 3)
    extra = {"churn": 5.0} if front is ode_sample else {}
    whole = front(denoiser, 64, steps=2, seed=9, batch_size=64, **extra)
    for size in (1, 7, 64, 1000):
        part = front(denoiser, 64, steps=2, seed=9, batch_size=size, **extra)
        torch.testing.assert_close(part, whole, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(front(denoiser, 10, steps=2, seed=9, **extra), whole[:10], rtol=1e-13, atol=1e-13)
    later = front(denoiser, 20, steps=2, seed=9, batch_size=7, first=30, **extra)
    torch.testing.assert_close(later, whole[30:50], rtol=1e-13, atol=1e-13)
    other = front(denoiser, 64, steps=2, seed=10, **extra)
    assert ((other - whole).abs() < 1e-6).sum() == 0
    assert len({round(float(v), 9) for v in whole.flatten()}) == whole.numel()


def test_labels_follow_their_samples_through_the_batches() -> None:
    class ByClass(nn.Module):
        def forward(self, x: Tensor, c_noise: Tensor, cond: Tensor) -> Tensor:
            return 0 * x + cond @ torch.arange(4.0)[:, None]

    denoiser = Denoiser(ByClass(), EDM(), Parametrization("x0", time="native"), sample_shape=(1,), num_classes=4)
    cond = torch.tensor([3, 1, 0, 2, 1, 3, 0])
    out = sample(denoiser, 7, cond=cond, batch_size=3)
    assert out[:, 0].tolist() == cond.tolist()
    assert sample(denoiser, 7, cond=cond, guidance=2.0, batch_size=3)[:, 0].tolist() == (2 * cond).tolist()
    with pytest.raises(ConfigError, match="not one label per sample. Got: 7. Wanted: 8"):
        sample(denoiser, 8, cond=cond)


def test_another_clock_samples_the_same() -> None:
    law = Mixture()
    denoiser = as_denoiser(law.endpoint)
    torch.testing.assert_close(
        sample(denoiser.under(RectifiedFlow()), 20, steps=2),
        sample(denoiser, 20, steps=2),
        rtol=1e-12,
        atol=1e-12,
    )


def test_sampling_uses_eval_mode_and_restores_the_mode() -> None:
    seen: list[bool] = []

    class Spy(nn.Module):
        def forward(self, x: Tensor, c_noise: Tensor, cond: Tensor | None = None) -> Tensor:
            seen.append(self.training)
            return x

    denoiser = Denoiser(Spy(), EDM(), Parametrization(), sample_shape=(2,))
    for training in (True, False):
        denoiser.train(training)
        assert not sample(denoiser, 2).requires_grad
        assert denoiser.training is training and denoiser.backbone.training is training
    assert seen == [False, False]


def test_few_step_times() -> None:
    denoiser = as_denoiser(WHITE.endpoint)
    assert few_step_times(denoiser, 1) == [80.0]
    assert few_step_times(denoiser, 2) == [80.0, pytest.approx(0.821)]
    wide = as_denoiser(WHITE.endpoint, sigma_data=1.0, sigma_max=14.6)
    assert few_step_times(wide, 2) == [14.6, pytest.approx(1.642)]
    denoiser.sampler_times = {2: (80.0, 1.526)}
    assert few_step_times(denoiser, 2) == [80.0, 1.526]
    for steps in range(1, 17):
        assert check_times(few_step_times(wide, steps), wide)
    narrow = as_denoiser(WHITE.endpoint, sigma_data=5.0, sigma_max=14.6)  # 0.821 * 10 * 4 would exceed it
    assert all(check_times(few_step_times(narrow, steps), narrow) for steps in range(1, 17))
    with pytest.raises(ConfigError, match="steps must be at least 1"):
        few_step_times(denoiser, 0)


@pytest.mark.parametrize(
    "times", [[], [0.0], [80.0, 90.0], [1.0, 1.0], [81.0], [80.0, -1.0], [float("nan")], [80.0, float("nan")]]
)
def test_times_that_cannot_be_sampled_at(times: list[float]) -> None:
    with pytest.raises(ConfigError, match=r"sampling times cannot be used.*largest first"):
        sample(as_denoiser(WHITE.endpoint), 2, times=times)


def test_a_count_of_samples_that_means_nothing() -> None:
    with pytest.raises(ConfigError, match="number of samples must be at least 1"):
        sample(as_denoiser(WHITE.endpoint), 0)
