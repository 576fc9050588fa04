"""Moving averages against their analytic weights, and post-hoc reconstruction."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from torch import Tensor

from fewstep.ema import (
    AnyEMA,
    ConstantEMA,
    HalfLifeEMA,
    PowerEMA,
    gamma_to_std,
    posthoc_coefficients,
    profile_product,
    reconstruct,
    std_to_gamma,
    update,
)
from fewstep.errors import ConfigError


def weights(ema: AnyEMA, steps: int, batch: int = 1) -> Tensor:
    """Weight of theta_k (k = 0: the start) in the average after ``steps`` updates, float64 ``[steps + 1]``.

    Step k's weights are the k-th unit vector, so that the average *is* the vector of weights.
    """
    average = torch.zeros(steps + 1, dtype=torch.float64)
    average[0] = 1
    for k in range(1, steps + 1):
        current = torch.zeros_like(average)
        current[k] = 1
        update([average], [current], ema.decay(k * batch, batch))
    return average


def test_constant_weights_are_geometric() -> None:
    got, beta = weights(ConstantEMA(0.9), 40), 0.9
    k = torch.arange(41, dtype=torch.float64)
    want = (1 - beta) * beta ** (40 - k)
    want[0] = beta**40
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)


def test_half_life_halves_after_its_images() -> None:
    batch, steps = 10, 60
    ema = HalfLifeEMA(images=200, ramp_up=None)
    got = weights(ema, steps, batch)
    assert float(got[0]) == pytest.approx(0.5 ** (steps * batch / 200), rel=1e-12)
    assert float(got[60] / got[40]) == pytest.approx(2.0, rel=1e-12)  # 20 steps = 200 images
    assert float(got.sum()) == pytest.approx(1.0, rel=1e-12)


def test_ramp_up_bounds_the_half_life() -> None:
    ema = HalfLifeEMA(images=500_000, ramp_up=0.05)
    assert ema.decay(1_000_000, 128) == pytest.approx(0.5 ** (128 / 50_000), rel=1e-12)
    assert ema.decay(10_000_000, 128) == pytest.approx(0.5 ** (128 / 500_000), rel=1e-12)
    assert ema.decay(40_000_000, 128) == ema.decay(10_000_000, 128)
    assert ema.decay(0, 128) == 0.0


@pytest.mark.parametrize(("beta", "kimg"), [(0.9999, 887), (0.9993, 127)])
def test_half_lives_of_ects_betas(beta: float, kimg: int) -> None:
    """math.md 5: beta = .9999 at batch 128 is a half-life of 887 kimg, .9993 of 127 kimg."""
    assert round(math.log(2) / -math.log(beta) * 128 / 1000) == kimg
    half_life = math.log(2) / -math.log(beta) * 128
    assert HalfLifeEMA(half_life, None).decay(1, 128) == pytest.approx(ConstantEMA(beta).decay(1, 128), rel=1e-12)


@pytest.mark.parametrize("std", [0.05, 0.10, 0.2])
def test_power_weights_follow_the_power_function(std: float) -> None:
    """Weights ~ k^gamma, relative width sigma_rel, and the first update copies the weights."""
    steps, gamma = 1500, std_to_gamma(std)
    got = weights(PowerEMA(std), steps)
    k = torch.arange(steps + 1, dtype=torch.float64)
    want = k**gamma / (k**gamma).sum()
    assert float((got - want).abs().max() / want.max()) < 1.5 * gamma / steps
    position = k / steps
    mean = (got * position).sum()
    assert float(((got * position**2).sum() - mean**2).sqrt()) == pytest.approx(std, abs=2e-3)
    assert float(got[0]) == 0 and PowerEMA(std).decay(128, 128) == 0.0
    assert float(got.sum()) == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize(("std", "gamma"), [(0.01, 96.99), (0.05, 16.97), (0.075, 10.29), (0.10, 6.94)])
def test_table_of_widths_and_exponents(std: float, gamma: float) -> None:
    assert std_to_gamma(std) == pytest.approx(gamma, abs=5e-3)
    assert gamma_to_std(std_to_gamma(std)) == pytest.approx(std, rel=1e-9)


def test_profile_product_is_the_integral() -> None:
    end_a, end_b, gamma_a, gamma_b = 250.0, 500.0, std_to_gamma(0.05), std_to_gamma(0.10)

    def product(t: float) -> float:
        a = (gamma_a + 1) / end_a * (t / end_a) ** gamma_a
        return a * (gamma_b + 1) / end_b * (t / end_b) ** gamma_b

    want = quad(product, 0, end_a, epsabs=1e-14)[0]
    args = (np.float64(end_a), np.float64(gamma_a), np.float64(end_b), np.float64(gamma_b))
    assert float(profile_product(*args)) == pytest.approx(want, rel=1e-9)
    assert float(profile_product(*args[2:], *args[:2])) == pytest.approx(want, rel=1e-9)


def test_sixteen_snapshots_rebuild_another_width() -> None:
    """math.md 5: sigma_rel = 0.075 from {0.05, 0.10} at eight times, 1.2 % in L2."""
    ends, stds = np.repeat(np.arange(1, 9) * 250.0, 2).tolist(), [0.05, 0.10] * 8
    coefficients = posthoc_coefficients(ends, stds, 2000.0, 0.075)
    assert coefficients.sum() == pytest.approx(1.0, rel=1e-9)
    t = np.arange(2001.0)

    def profile(end: float, std: float) -> np.ndarray:
        p = np.where(t <= end, (t / end) ** std_to_gamma(std), 0)
        return p / p.sum()

    snapshots = [{"w": torch.from_numpy(profile(e, s))} for e, s in zip(ends, stds, strict=True)]
    rebuilt = reconstruct(snapshots, coefficients)["w"].numpy()
    want = profile(2000.0, 0.075)
    error = np.sqrt(((rebuilt - want) ** 2).sum() / (want**2).sum())
    assert error == pytest.approx(0.012, abs=1e-3)


def test_an_own_snapshot_is_rebuilt_exactly() -> None:
    coefficients = posthoc_coefficients([500.0, 1000.0, 1500.0], [0.05, 0.1, 0.1], 1000.0, 0.1)
    np.testing.assert_allclose(coefficients, [0, 1, 0], atol=1e-9)


def test_reconstruction_sums_in_float64_and_keeps_the_dtype() -> None:
    """Coefficients are large and alternate: in float32 their sum would lose what is looked for."""
    small = torch.tensor([1.0 + 2**-12])
    out = reconstruct([{"w": small.half()}, {"w": torch.tensor([1.0]).half()}], np.array([1000.0, -999.0]))
    assert out["w"].dtype == torch.float16
    big = reconstruct([{"w": torch.tensor([1.0])}, {"w": torch.tensor([1e-8])}], np.array([1e9, 1.0]))
    assert float(big["w"]) == pytest.approx(1e9)
    close = reconstruct([{"w": small}, {"w": torch.tensor([1.0])}], np.array([1e9, 1 - 1e9]))
    assert float(close["w"]) == pytest.approx(1 + 1e9 * 2**-12, rel=1e-6)


def test_averages_that_mean_nothing_are_refused() -> None:
    for build, text in [
        (lambda: ConstantEMA(1.0), r"outside \[0, 1\)"),
        (lambda: HalfLifeEMA(0), "half-life must be positive"),
        (lambda: PowerEMA(0.3), "outside"),
        (lambda: PowerEMA(0.0), "outside"),
    ]:
        with pytest.raises(ConfigError, match=text):
            build()
