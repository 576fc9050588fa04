"""Processes: all conversions by product, exact maps to EDM coordinates, velocities and jumps."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from oracles import Gaussian, raw
from torch import Tensor

from fewstep.errors import ConfigError
from fewstep.process import (
    EDM,
    PREDICTIONS,
    PROCESSES,
    VP,
    DiscreteVP,
    Process,
    RectifiedFlow,
    TrigFlow,
    affine,
)

SD_BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
STABLE_DIFFUSION = DiscreteVP(tuple(torch.cumprod(1 - SD_BETAS, 0).tolist()))
ALL = [
    EDM(),
    VP(),
    RectifiedFlow(),
    TrigFlow(),
    TrigFlow(sigma_data=1.3),
    DiscreteVP.linear(),
    STABLE_DIFFUSION,
]
NAMES = ["edm", "vp", "flow", "trig", "trig1.3", "ddpm", "sd"]
LEVELS = torch.tensor([0.05, 0.3, 1.0, 4.0, 12.0], dtype=torch.float64)  # within SD's own range
processes = pytest.mark.parametrize("process", ALL, ids=NAMES)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def setting(process: Process) -> tuple[Gaussian, Tensor, Tensor]:
    """A law, native times of LEVELS and points at the natural scale of each."""
    t = process.from_edm(LEVELS)
    spread = (1 + LEVELS**2).sqrt() * process.edm_scale(LEVELS)
    return Gaussian.random(3), t, normal(len(LEVELS), 3) * spread[:, None]


def test_the_registry_names_every_process() -> None:
    assert {type(p) for p in ALL} == set(PROCESSES.values())
    assert all(cls.kind == name for name, cls in PROCESSES.items())


@processes
@pytest.mark.parametrize(("kind", "to"), list(itertools.product(PREDICTIONS, PREDICTIONS)))
def test_every_conversion_agrees_with_the_exact_law(process: Process, kind: str, to: str) -> None:
    law, t, z = setting(process)
    got = process.convert(raw(kind, law, process, z, t), kind, to, z, t)
    want = raw(to, law, process, z, t)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


@processes
@pytest.mark.parametrize("kind", PREDICTIONS)
def test_conversions_invert(process: Process, kind: str) -> None:
    _, t, z = setting(process)
    value = normal(len(t), 3, seed=1)
    there = process.convert(value, "x0", kind, z, t)
    torch.testing.assert_close(process.convert(there, kind, "x0", z, t), value, rtol=1e-12, atol=1e-12)


def test_native_score_is_the_gradient_of_the_native_marginal() -> None:
    """score_native = -(a^2 S + s^2 I)^-1 (z - a mu), written without any denoiser."""
    law, t, z = setting(VP())
    alpha, sigma = VP().alpha(t)[:, None], VP().sigma(t)[:, None]
    covariance = law.basis * law.variances @ law.basis.T
    noisy = alpha[..., None] ** 2 * covariance + sigma[..., None] ** 2 * torch.eye(3, dtype=torch.float64)
    score = -torch.linalg.solve(noisy, z - alpha * law.mean)
    clean = VP().convert(score, "score", "x0", z, t)
    torch.testing.assert_close(clean, law.denoise(z / alpha, LEVELS), rtol=1e-10, atol=1e-10)


def test_an_unknown_kind_names_its_neighbour() -> None:
    with pytest.raises(ConfigError, match="'epss' is not a prediction type.*Did you mean 'eps'"):
        affine("epss", torch.ones(1), torch.ones(1))


# ------------------------------------------------------------------------------- maps to EDM
@processes
def test_maps_to_edm_and_back(process: Process) -> None:
    t = process.from_edm(LEVELS)
    torch.testing.assert_close(process.to_edm(t), LEVELS, rtol=1e-12, atol=0)
    torch.testing.assert_close(process.edm_scale(LEVELS), process.alpha(t), rtol=1e-12, atol=0)
    torch.testing.assert_close(process.sigma(t) / process.alpha(t), LEVELS, rtol=1e-12, atol=0)


@processes
def test_perturbed_data_is_edm_data_scaled(process: Process) -> None:
    x_0, eps, t = normal(5, 2, 3), normal(5, 2, 3, seed=1), process.from_edm(LEVELS)
    edm = EDM().perturb(x_0, eps, LEVELS)
    torch.testing.assert_close(
        process.perturb(x_0, eps, t), process.edm_scale(LEVELS)[:, None, None] * edm, rtol=1e-11, atol=1e-12
    )


def test_facts_of_the_table() -> None:
    """math.md 1.1: alpha and sigma of each native process as functions of the EDM level."""
    s = LEVELS
    vp, flow, trig = VP().from_edm(s), RectifiedFlow().from_edm(s), TrigFlow().from_edm(s)
    close = lambda got, want: torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)  # noqa: E731
    close(VP().alpha(vp), 1 / (1 + s**2).sqrt())
    close(VP().sigma(vp), s / (1 + s**2).sqrt())
    close(vp, ((0.01 + 39.8 * (1 + s**2).log()).sqrt() - 0.1) / 19.9)
    close(flow, s / (1 + s))
    close(RectifiedFlow().alpha(flow), 1 / (1 + s))
    close(trig, (s / 0.5).atan())
    close(TrigFlow().alpha(trig), 0.5 / (s**2 + 0.25).sqrt())
    assert float(VP().to_edm(torch.ones((), dtype=torch.float64))) == pytest.approx(152.2, abs=0.05)


def test_variance_is_preserved_by_the_vp_processes() -> None:
    for process in (VP(), DiscreteVP.linear(), STABLE_DIFFUSION):
        t = process.from_edm(LEVELS)
        torch.testing.assert_close(
            process.alpha(t) ** 2 + process.sigma(t) ** 2, torch.ones_like(t), rtol=1e-12, atol=0
        )


@pytest.mark.parametrize(
    ("process", "low", "high"),
    [(DiscreteVP.linear(), 0.0100, 157.4), (STABLE_DIFFUSION, 0.0292, 14.61)],
    ids=["ddpm", "sd"],
)
def test_ranges_of_discrete_processes(process: DiscreteVP, low: float, high: float) -> None:
    """math.md 1.5: DDPM's linear betas and Stable Diffusion's scaled-linear ones."""
    got_low, got_high = process.edm_range
    assert got_low == pytest.approx(low, abs=6e-5)
    assert got_high == pytest.approx(high, rel=4e-4)
    last = torch.tensor(999.0, dtype=torch.float64)
    assert float(process.alpha(last)) ** 2 == pytest.approx(process.alphas_cumprod[-1], rel=1e-12)
    assert float(process.to_edm(last)) == pytest.approx(got_high, rel=1e-12)


def test_discrete_time_is_log_linear_and_clamped() -> None:
    process = STABLE_DIFFUSION
    a = np.array(process.alphas_cumprod)
    table = np.sqrt((1 - a) / a)
    whole = torch.arange(1000, dtype=torch.float64)
    np.testing.assert_allclose(process.to_edm(whole).numpy(), table, rtol=1e-12)
    np.testing.assert_allclose(process.from_edm(torch.from_numpy(table)).numpy(), whole.numpy(), rtol=1e-9, atol=1e-9)
    query = torch.tensor([1e-4, math.sqrt(table[400] * table[401]), 0.7, 1e4], dtype=torch.float64)
    want = np.interp(np.log(query.numpy()), np.log(table), np.arange(1000))
    np.testing.assert_allclose(process.from_edm(query).numpy(), want, rtol=1e-10, atol=1e-10)
    assert float(process.from_edm(query)[1]) == pytest.approx(400.5, rel=1e-9)
    # the input is scaled by the queried level, not by the clamped one (math.md 1.5)
    torch.testing.assert_close(process.edm_scale(query), (1 + query**2).rsqrt(), rtol=1e-14, atol=0)


def test_discrete_tables_that_cannot_be_used_are_refused() -> None:
    for table in ((0.9,), (0.9, 0.9), (0.5, 0.7), (1.0, 0.5), (0.5, 0.0)):
        with pytest.raises(ConfigError, match="not a decreasing sequence"):
            DiscreteVP(table)


@processes
def test_single_precision_keeps_six_digits(process: Process) -> None:
    t = process.from_edm(LEVELS)
    assert process.from_edm(LEVELS.float()).dtype == torch.float32
    torch.testing.assert_close(process.from_edm(LEVELS.float()).double(), t, rtol=3e-5, atol=1e-6)
    torch.testing.assert_close(process.to_edm(t.float()).double(), LEVELS, rtol=3e-5, atol=1e-6)


# ------------------------------------------------------------------------- derivatives, jumps
@processes
def test_velocity_is_the_time_derivative_of_the_path(process: Process) -> None:
    x_0, eps, t = normal(5, 3), normal(5, 3, seed=1), process.from_edm(LEVELS)
    step = 1e-5 * t.clamp_max(1.0) if process.kind != "discrete_vp" else torch.full_like(t, 1e-4)
    ahead, behind = process.perturb(x_0, eps, t + step), process.perturb(x_0, eps, t - step)
    slope = (ahead - behind) / (2 * step)[:, None]
    torch.testing.assert_close(process.velocity(x_0, eps, t), slope, rtol=1e-6, atol=1e-6)


@processes
def test_jump_with_the_exact_denoiser_is_an_euler_step_in_edm(process: Process) -> None:
    """DDIM in native coordinates = Euler in (x, sigma): both move along (x - D)/sigma."""
    law, t, z = setting(process)
    s = process.from_edm(0.6 * LEVELS)
    x = z / process.edm_scale(LEVELS)[:, None]
    clean = law.denoise(x, LEVELS)
    euler = x + (0.6 * LEVELS - LEVELS)[:, None] * (x - clean) / LEVELS[:, None]
    want = euler * process.edm_scale(0.6 * LEVELS)[:, None]
    torch.testing.assert_close(process.jump(z, clean, t, s), want, rtol=1e-10, atol=1e-10)


@processes
def test_small_jumps_converge_to_the_gaussian_flow_map(process: Process) -> None:
    """First order: halving the step halves the distance to the exact flow map."""
    law, start, stop = Gaussian.random(3), 4.0, 0.5
    x = 4 * normal(6, 3)
    want = law.flow(x, start, stop)
    errors = []
    for steps in (200, 400):
        levels = torch.logspace(math.log10(start), math.log10(stop), steps + 1, dtype=torch.float64)
        z = x * process.edm_scale(levels[:1])[:, None]
        for now, then in itertools.pairwise(levels):
            clean = law.denoise(z / process.edm_scale(now), now)
            z = process.jump(z, clean, process.from_edm(now), process.from_edm(then))
        errors.append(float((z / process.edm_scale(levels[-1]) - want).norm()))
    assert 1.95 < errors[0] / errors[1] < 2.05
    assert errors[1] < 0.02


def test_jump_onto_itself_and_onto_the_data() -> None:
    x_0, eps, t = normal(5, 3), normal(5, 3, seed=1), TrigFlow().from_edm(LEVELS)
    z = TrigFlow().perturb(x_0, eps, t)
    torch.testing.assert_close(TrigFlow().jump(z, x_0, t, t), z, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(TrigFlow().jump(z, x_0, t, torch.zeros_like(t)), x_0, rtol=1e-12, atol=1e-12)


def test_the_trigflow_network_is_minus_the_edm_network() -> None:
    """Eq. 1.2, and the exact networks of N(0, sigma_d^2 I): F_edm = 0 for the denoiser, and for the
    consistency function F_edm = tan(theta/2) x_in (math.md 7.1 a)."""
    law, t, z = setting(TrigFlow())
    edm = TrigFlow().convert(law.denoise(z / t.cos()[:, None], LEVELS), "x0", "edm", z, t)
    trig = TrigFlow().convert(law.denoise(z / t.cos()[:, None], LEVELS), "x0", "trig", z, t)
    torch.testing.assert_close(trig, -edm, rtol=1e-12, atol=1e-12)
    white = Gaussian.white(0.25, size=3)
    x = z / t.cos()[:, None]
    zero = EDM().convert(white.denoise(x, LEVELS), "x0", "edm", x, LEVELS)
    torch.testing.assert_close(zero, torch.zeros_like(x), rtol=0, atol=1e-12)
    consistent = EDM().convert(white.endpoint(x, LEVELS), "x0", "edm", x, LEVELS)
    x_in = x / (LEVELS**2 + 0.25).sqrt()[:, None]
    torch.testing.assert_close(consistent, (t / 2).tan()[:, None] * x_in, rtol=1e-10, atol=1e-12)


def test_the_trigflow_velocity_is_sigma_d_times_its_network() -> None:
    law, t, z = setting(TrigFlow())
    velocity = raw("velocity", law, TrigFlow(), z, t)
    torch.testing.assert_close(
        TrigFlow().convert(velocity, "velocity", "trig", z, t), velocity / 0.5, rtol=1e-10, atol=1e-12
    )
