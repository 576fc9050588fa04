"""Scaling laws against exact laws, scipy, and their own promise: 95 % intervals that cover 95 %."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewstep.backbones import build
from fewstep.denoiser import Denoiser, Parametrization
from fewstep.errors import DataError
from fewstep.evaluation import scaling
from fewstep.evaluation.compute import forward_flops, target_share, training_flops
from fewstep.evaluation.scaling import Law, Point, check_points, fit, not_identifiable, notes, student_t
from fewstep.objectives import ECT, Diffusion
from fewstep.process import EDM
from fewstep.times import Continuous, Lognormal, Stages

REPEATS = 200


def law_points(
    n: int, *, alpha: float = -0.4, factor: float = 3e5, offset: float = 0.0, noise: float = 0.0, ratio: float = 3.0,
    seed: int = 0, start: float = 1e12,
) -> list[Point]:  # fmt: skip
    sizes = start * ratio ** np.arange(n)
    errors = noise * np.random.default_rng(seed).standard_normal(n)
    values = (offset + factor * sizes**alpha) * np.exp(errors)
    return [Point(f"run-{i}", float(c), float(v)) for i, (c, v) in enumerate(zip(sizes, values, strict=True))]


def logs(points: Sequence[Point]) -> tuple[np.ndarray, np.ndarray]:
    return np.log([p.compute for p in points]), np.log([p.value for p in points])


# ------------------------------------------------------------------------------------------ plain law
@given(
    alpha=st.floats(-2, 1),
    factor=st.floats(1e-3, 1e6),
    n=st.integers(4, 12),
    start=st.sampled_from([1.0, 1e3, 1e12, 1e20]),
)
@settings(max_examples=60, deadline=None)
def test_an_exact_law_comes_back(alpha: float, factor: float, n: int, start: float) -> None:
    points = law_points(n, alpha=alpha, factor=factor, start=start)
    law = fit(points, resamples=50)
    assert law.curve.alpha == pytest.approx(alpha, abs=1e-10)
    assert math.log(law.curve.factor) == pytest.approx(math.log(factor), abs=1e-10 * (1 + math.log(start * 3**n)))
    assert law.without == pytest.approx([alpha] * n, abs=1e-10)
    assert law.outliers == ()
    assert law.alpha_bootstrap == pytest.approx((alpha, alpha), abs=1e-10)
    assert law.curve.at(points[2].compute) == pytest.approx(points[2].value, rel=1e-10)


def test_units_change_the_factor_and_nothing_else() -> None:
    points = law_points(7, noise=0.2, seed=3)
    law = fit(points)
    other = fit([replace(p, compute=p.compute / 1e9, value=p.value * 100) for p in points])
    assert other.curve.alpha == pytest.approx(law.curve.alpha, abs=1e-12)
    assert other.curve.factor == pytest.approx(law.curve.factor * 100 * 1e9**law.curve.alpha, rel=1e-9)
    assert other.curve.alpha_interval == pytest.approx(law.curve.alpha_interval, abs=1e-12)
    assert other.alpha_bootstrap == pytest.approx(law.alpha_bootstrap, abs=1e-12)
    assert (other.r2, other.aicc) == pytest.approx((law.r2, law.aicc), abs=1e-9)


@pytest.mark.parametrize("dof", [1, 2, 3, 4, 5, 10, 31])
@pytest.mark.parametrize("level", [0.5, 0.95, 0.9875, 0.999])
def test_students_t_is_scipys(level: float, dof: int) -> None:
    assert student_t(level, dof) == pytest.approx(scipy.stats.t.ppf(0.5 + level / 2, dof), rel=1e-10)


def test_line_interval_and_correlation_are_scipys() -> None:
    points = law_points(6, noise=0.3, seed=1)
    x, z = logs(points)
    want = scipy.stats.linregress(x, z)
    law = fit(points)
    half = scipy.stats.t.ppf(0.975, 4) * want.stderr
    assert law.curve.alpha == pytest.approx(want.slope, abs=1e-12)
    assert math.log(law.curve.factor) == pytest.approx(want.intercept, abs=1e-10)
    assert law.pearson == pytest.approx(want.rvalue, abs=1e-12)
    assert law.r2 == pytest.approx(want.rvalue**2, abs=1e-12)
    assert law.curve.alpha_interval == pytest.approx((want.slope - half, want.slope + half), abs=1e-10)


def test_the_prediction_band_is_the_textbooks() -> None:
    """``s sqrt(1 + 1/n + (x - mean)^2 / Sxx)`` around ln y, times t."""
    points = law_points(6, noise=0.3, seed=1)
    x, z = logs(points)
    law, at = fit(points), 7e15
    slope, height = np.polyfit(x, z, 1)
    s = math.sqrt(((z - slope * x - height) ** 2).sum() / 4)
    dx = math.log(at) - x.mean()
    half = scipy.stats.t.ppf(0.975, 4) * s * math.sqrt(1 + 1 / 6 + dx**2 / ((x - x.mean()) ** 2).sum())
    low, high = law.curve.band(at)
    middle = slope * math.log(at) + height
    assert (math.log(low), math.log(high)) == pytest.approx((middle - half, middle + half), abs=1e-9)


@pytest.mark.parametrize("n", [4, 5, 8])
def test_the_interval_covers_and_the_bootstrap_does_not_quite(n: int) -> None:
    """95 % intervals of 200 noisy laws; docs/scaling.md quotes a longer run of the same."""
    student = bootstrap = predicted = 0
    for seed in range(REPEATS):
        points = law_points(n + 1, noise=0.1, ratio=2.0, seed=seed)
        x, z = logs(points[:n])
        curve = scaling._curve(x, z, False)
        low, high = curve.alpha_interval
        student += low <= -0.4 <= high
        low, high = scaling._bootstrap(x, z, False, 300, seed)
        bootstrap += low <= -0.4 <= high
        low, high = curve.band(points[n].compute)
        predicted += bool(low <= points[n].value <= high)
    assert 0.91 <= student / REPEATS <= 0.985
    assert 0.91 <= predicted / REPEATS <= 0.985
    assert 0.80 <= bootstrap / REPEATS < student / REPEATS


def test_aicc_is_its_formula_and_none_where_it_has_none() -> None:
    points = law_points(6, noise=0.3, seed=1)
    x, z = logs(points)
    rss = ((z - np.polyval(np.polyfit(x, z, 1), x)) ** 2).sum()
    assert fit(points).aicc == pytest.approx(6 * math.log(rss / 6) + 6 + 24 / 2, abs=1e-9)
    assert fit(points[:4]).aicc is None
    assert fit(points[:5], offset=True, resamples=20).aicc is None


def test_the_bootstrap_is_seeded_and_draws_single_sizes_again() -> None:
    """Of 4 points, 1.6 % of the resamples have one size only; a line through them would be 0/0."""
    points = law_points(7, noise=0.2)
    assert fit(points, seed=1).alpha_bootstrap == fit(points, seed=1).alpha_bootstrap
    assert fit(points, seed=1).alpha_bootstrap != fit(points, seed=2).alpha_bootstrap
    points = law_points(4, noise=0.2)
    many = [replace(points[0], name=f"{i}", value=points[0].value * (1 + i / 50)) for i in range(9)] + points[1:]
    low, high = fit(many).alpha_bootstrap
    assert low < high < 0
    assert scaling._sizes(np.array([[1.0, 1, 1], [2, 1, 2], [3, 1, 2]])).tolist() == [1, 2, 3]


def test_leaving_one_out_finds_the_outlier() -> None:
    points = law_points(8, noise=0.02, seed=4)
    assert fit(points).outliers == ()
    points[6] = replace(points[6], value=points[6].value * 1.5)
    law = fit(points)
    assert law.outliers == (6,)
    others = points[:6] + points[7:]
    assert law.without[6] == pytest.approx(fit(others).curve.alpha, abs=1e-12)
    assert law.without[6] == pytest.approx(-0.4, abs=0.02)
    assert abs(law.curve.alpha + 0.4) > abs(law.without[6] + 0.4)
    assert any("'run-6' lies far from the law of the others" in note for note in notes(points, law))


def test_a_clean_law_is_seldom_said_to_have_outliers() -> None:
    flagged = sum(bool(fit(law_points(6, noise=0.1, seed=s), resamples=2).outliers) for s in range(REPEATS))
    assert 0 < flagged / REPEATS <= 0.09


# --------------------------------------------------------------------------------------- with an offset
def test_an_exact_offset_comes_back() -> None:
    points = law_points(8, offset=0.8, alpha=-0.45)
    law, plain = fit(points, offset=True, resamples=50), fit(points)
    assert law.curve.offset == pytest.approx(0.8, rel=1e-7)
    assert law.curve.alpha == pytest.approx(-0.45, abs=1e-7)
    assert law.curve.factor == pytest.approx(3e5, rel=1e-5)
    assert law.offset_interval == pytest.approx((0.8, 0.8), rel=1e-6)
    assert plain.curve.offset == 0.0 and plain.curve.alpha > -0.44, "the plain law stays what it is"
    assert not_identifiable(plain, law) == ""
    assert "The offset y_inf is supported." in notes(points, plain, law)


@pytest.mark.parametrize("seed", range(5))
def test_a_noisy_offset_is_the_least_squares_of_scipy(seed: int) -> None:
    points = law_points(9, offset=1.0, factor=3e6, alpha=-0.5, noise=0.05, seed=seed)
    x, z = logs(points)

    def residual(p: np.ndarray) -> np.ndarray:
        return np.asarray(np.log(p[0] + np.exp(p[1] + p[2] * (x - x.mean()))) - z)

    want = scipy.optimize.least_squares(
        residual, [0.5, 0.0, -0.5], bounds=([0, -9, -3], [9, 9, 1]), xtol=1e-14, ftol=1e-14, gtol=1e-14
    )
    law = fit(points, offset=True, resamples=20)
    rss = law.curve.spread**2 * law.curve.dof
    assert rss <= 2 * want.cost * (1 + 1e-9)
    assert (law.curve.offset, law.curve.height, law.curve.alpha) == pytest.approx(want.x, rel=1e-4)
    covariance = np.linalg.inv(want.jac.T @ want.jac)
    half = scipy.stats.t.ppf(0.975, 6) * law.curve.spread * math.sqrt(covariance[2, 2])
    assert law.curve.alpha_interval == pytest.approx((want.x[2] - half, want.x[2] + half), rel=1e-3)


def test_the_offset_never_fits_worse_and_is_zero_where_that_is_best() -> None:
    for seed in range(10):
        points = law_points(6, noise=0.1, seed=seed)
        plain, law = fit(points, resamples=2), fit(points, offset=True, resamples=2)
        assert law.r2 >= plain.r2 - 1e-12
        assert law.curve.offset >= 0
    bent_down = [replace(p, value=p.value * math.exp(-0.02 * i * i)) for i, p in enumerate(law_points(6))]
    law = fit(bent_down, offset=True, resamples=2)
    assert law.curve.offset == 0.0
    assert law.curve.alpha == pytest.approx(fit(bent_down).curve.alpha, abs=1e-9)


def test_the_interval_of_the_offset_covers() -> None:
    found = alphas = false = 0
    for seed in range(60):
        points = law_points(8, offset=1.0, factor=1e7, alpha=-0.5, noise=0.05, seed=seed)
        x, z = logs(points)
        curve = scaling._curve(x, z, True)
        low, high = scaling._offset_interval(x, z, curve)
        found += low <= 1 <= high
        low, high = curve.alpha_interval
        alphas += low <= -0.5 <= high
        x, z = logs(law_points(8, noise=0.05, seed=seed))
        false += scaling._offset_interval(x, z, scaling._curve(x, z, True))[0] > 0
    assert 52 <= found < 60
    assert 52 <= alphas < 60
    assert false <= 4, "of 60 plain laws, few are said to have an offset"


def offsets(points: list[Point]) -> tuple[Law, Law]:
    return fit(points, resamples=20), fit(points, offset=True, resamples=20)


def test_an_offset_that_the_points_do_not_show_is_not_claimed() -> None:
    assert "5 points are too few" in not_identifiable(*offsets(law_points(5, offset=1.0)))
    plain, law = offsets(law_points(7, noise=0.1, seed=2))
    assert "reaches from 0 to" in not_identifiable(plain, law)
    assert any("not identifiable" in note for note in notes(law_points(7), plain, law))
    strong, shifted = offsets(law_points(7, offset=0.8, alpha=-0.45, noise=0.01))
    assert not_identifiable(strong, shifted) == ""
    assert "within noise" in not_identifiable(replace(strong, aicc=shifted.aicc + 1.9), shifted)  # type: ignore[operator]


# --------------------------------------------------------------------------------------------- refusals
def test_what_cannot_be_fitted_is_refused() -> None:
    points = law_points(5)
    with pytest.raises(DataError, match=r"fewer than four sizes.*Got: 3 points of 3 sizes"):
        fit(points[:3])
    with pytest.raises(DataError, match="5 points of 3 sizes"):
        check_points([*points[:3], *points[:2]])
    for bad in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(DataError, match=r"positive, finite.*run-1: size .*, value"):
            fit([points[0], replace(points[1], value=bad), *points[2:]])
        with pytest.raises(DataError, match="run-1"):
            fit([points[0], replace(points[1], compute=bad), *points[2:]])
    with pytest.raises(DataError, match="degree of freedom"):
        student_t(0.95, 0)


def test_notes_warn_of_few_points_short_spans_and_no_trend() -> None:
    points = law_points(4, ratio=2.0)
    assert "2 degrees of freedom" in notes(points, fit(points))[0]
    assert "span a factor of 8 only" in notes(points, fit(points))[1]
    flat = law_points(9, alpha=0.0, factor=1.0, noise=0.1)
    assert notes(flat, fit(flat)) == ["The interval of alpha contains 0: these points show no trend."]


# ---------------------------------------------------------------------------------------------- compute
def on_meta(name: str, shape: tuple[int, ...], **kwargs: object) -> Denoiser:
    with torch.device("meta"):
        backbone = build({"name": name, "kwargs": kwargs})
    return Denoiser(backbone, EDM(), Parametrization("edm"), sample_shape=shape)


def test_the_published_network_has_the_published_count() -> None:
    """performance.md: 42.38 GFLOP forward, 127.14 with backward, 169.52 an ECT step at q = 256."""
    model = on_meta(
        "edm", (3, 32, 32), img_resolution=32, in_channels=3, out_channels=3, model_channels=128,
        channel_mult=[2, 2, 2], num_blocks=4,
    )  # fmt: skip
    assert forward_flops(model) / 1e9 == pytest.approx(42.38, abs=0.005)
    assert training_flops(model, Diffusion(), 10) / 1e10 == pytest.approx(127.14, abs=0.01)
    one_hour = ECT(schedule=Stages(q=256.0, images=1000, last=0))
    assert training_flops(model, one_hour, 10) / 1e10 == pytest.approx(169.52, abs=0.01)


def test_attention_is_counted() -> None:
    """4 n^2 d for scores and mixing: the part that grows with the square of the tokens."""

    def count(side: int) -> int:
        return forward_flops(on_meta("dit", (1, side, side), sample_shape=[1, side, side], width=64, depth=1))

    a, b, c = count(8), count(16), count(32)
    tokens = [count_tokens(side) for side in (8, 16, 32)]
    quadratic = np.polyfit(tokens, [a, b, c], 2)[0]
    assert quadratic == pytest.approx(4 * 64, rel=1e-6)


def count_tokens(side: int) -> int:
    return (side // 2) ** 2


def ratio_of_one(q: float) -> ECT:
    return ECT(law=Lognormal(-1.1, 2.0), schedule=Stages(q=q, images=10**9, last=0))


def test_the_share_of_target_passes_is_the_published_one() -> None:
    """math.md 2.5: r = 0 for t <= ln(k/(q^a - 1) - 1); at q = 2 that is 1.9459, at q = 4 0.5108, at 256 never."""
    for q, edge in ((2.0, 1.9459), (4.0, 0.5108)):
        skipped = scipy.stats.norm.cdf((math.log(edge) + 1.1) / 2.0)
        assert target_share(ratio_of_one(q), 1000) == pytest.approx(1 - skipped, abs=2e-4)
    assert target_share(ratio_of_one(256.0), 1000) == 1.0


def test_the_share_is_the_mean_over_the_schedule() -> None:
    both = ECT(law=Lognormal(-1.1, 2.0), schedule=Stages(q=2.0, images=500, first=0, last=1))
    first, second = target_share(ratio_of_one(2.0), 1), target_share(ratio_of_one(4.0), 1)
    assert target_share(both, 1000) == pytest.approx((first + second) / 2, abs=1e-3)
    assert target_share(both, 2000) == pytest.approx((first + 3 * second) / 4, abs=1e-3)
    smooth = replace(both, schedule=Continuous(q=2.0, images=500, limit=4.0))
    assert first < target_share(smooth, 500) < second
