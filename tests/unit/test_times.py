"""Laws of t, mappings to r, and schedules: properties, thresholds, boundaries, refusals."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fewstep.errors import ScheduleError
from fewstep.times import (
    Constant,
    Continuous,
    KarrasUniform,
    Law,
    Lognormal,
    LogUniform,
    Mapping,
    Schedule,
    Sigmoid,
    Stages,
    draw,
    pair,
)
from fewstep.types import Progress

GRID = torch.logspace(-4, 3, 2001, dtype=torch.float64)
laws = st.one_of(
    st.builds(Lognormal, st.floats(-5, 5), st.floats(0.05, 4)),
    st.builds(LogUniform, st.floats(1e-4, 0.1), st.floats(0.2, 1000)),
    st.builds(KarrasUniform, st.floats(1e-4, 0.1), st.floats(0.2, 1000), st.floats(1, 10)),
)
mappings = st.one_of(st.just(Constant()), st.builds(Sigmoid, st.floats(0, 30), st.floats(0, 10)))
schedules = st.one_of(
    st.builds(Stages, st.floats(1.1, 4), st.integers(1, 1000), st.integers(-1, 2), st.integers(2, 9)),
    st.builds(Stages, st.floats(1.1, 300), st.integers(1, 1000), st.just(0), st.none()),
    st.builds(Continuous, st.floats(1.1, 300), st.integers(1, 1000), st.floats(1, 1e6)),
)


def seen(images: int) -> Progress:
    return Progress(images_seen=images, total_images=10_000)


@settings(max_examples=150, deadline=None)
@given(
    laws,
    mappings,
    schedules,
    st.integers(0, 10**9),
    st.lists(st.floats(1e-9, 1 - 1e-9), min_size=1, max_size=20),
)
def test_r_lies_below_t_always(law: Law, mapping: Mapping, schedule: Schedule, images: int, u: list[float]) -> None:
    """G2: 0 <= r < t for every law, mapping, schedule and moment, and t - r is not a difference."""
    t = draw(law, torch.tensor(u, dtype=torch.float64))
    assert t.dtype == torch.float64 and (t > 0).all() and t.isfinite().all()
    ratio = schedule.ratio(seen(images))
    assert 1 <= ratio <= 2**20 * (1 + 1e-9)
    r, gap = pair(mapping, t, ratio)
    assert (r >= 0).all() and (r < t).all() and (gap > 0).all() and (gap <= t).all()
    torch.testing.assert_close(gap, (t * mapping.n(t) / ratio).clamp_max(t), rtol=1e-14, atol=0)


@settings(max_examples=60, deadline=None)
@given(schedules, st.integers(0, 10**6), st.integers(0, 10**6))
def test_schedules_only_tighten(schedule: Schedule, first: int, second: int) -> None:
    early, late = sorted((first, second))
    assert schedule.ratio(seen(early)) <= schedule.ratio(seen(late))
    assert schedule.stage(seen(early)) <= schedule.stage(seen(late))


# --------------------------------------------------------------------------------------------- laws
@pytest.mark.parametrize(
    ("law", "theirs"),
    [
        (Lognormal(-1.1, 2.0), stats.lognorm(s=2.0, scale=math.exp(-1.1))),
        (LogUniform(0.002, 80.0), stats.loguniform(0.002, 80.0)),
    ],
)
def test_laws_are_scipys(law: Law, theirs: stats.rv_continuous) -> None:
    u = torch.linspace(0.001, 0.999, 500, dtype=torch.float64)
    torch.testing.assert_close(law.quantile(u), torch.from_numpy(theirs.ppf(u.numpy())), rtol=1e-9, atol=0)
    torch.testing.assert_close(law.cdf(law.quantile(u)), u, rtol=1e-9, atol=1e-12)


def test_the_karras_law_is_edms_grid_made_continuous() -> None:
    u = torch.arange(18, dtype=torch.float64) / 17
    i = 17 - torch.arange(18, dtype=torch.float64)
    want = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    torch.testing.assert_close(KarrasUniform().quantile(u), want, rtol=1e-12, atol=0)
    torch.testing.assert_close(KarrasUniform().cdf(want), u, rtol=1e-9, atol=1e-12)


def test_tails_of_ects_law() -> None:
    """math.md 2.6: P(t > 80) = 0.31 %, P(t < 0.002) = 0.53 %."""
    low, high = Lognormal(-1.1, 2.0).cdf(torch.tensor([0.002, 80.0], dtype=torch.float64)).tolist()
    assert low == pytest.approx(0.0053, abs=5e-5)
    assert 1 - high == pytest.approx(0.0031, abs=5e-5)


@pytest.mark.parametrize("law", [Lognormal(), LogUniform(0.001, 900.0), KarrasUniform(0.001, 900.0)])
def test_truncated_laws_are_conditional_laws(law: Law) -> None:
    u = torch.linspace(1e-6, 1 - 1e-6, 1000, dtype=torch.float64)
    t = draw(law, u, 0.03, 14.6)
    assert float(t.min()) >= 0.03 and float(t.max()) <= 14.6
    c = law.cdf(torch.tensor([0.03, 14.6], dtype=torch.float64))
    torch.testing.assert_close((law.cdf(t) - c[0]) / (c[1] - c[0]), u, rtol=1e-9, atol=1e-10)


def test_a_law_without_mass_in_the_range_is_refused() -> None:
    with pytest.raises(ScheduleError, match=r"no mass on \[100.0, 200.0\]"):
        draw(LogUniform(0.01, 1.0), torch.tensor([0.5]), 100.0, 200.0)


# ----------------------------------------------------------------------------------------- mappings
@pytest.mark.parametrize(("ratio", "threshold"), [(2.0, 1.9459), (4.0, 0.5108)])
def test_thresholds_of_the_sigmoid_mapping(ratio: float, threshold: float) -> None:
    """math.md 2.5: r = 0 exactly for t <= ln(k/(q^a - 1) - 1)/b."""
    exact = math.log(8 / (ratio - 1) - 1)
    assert exact == pytest.approx(threshold, abs=5e-5)
    r, gap = pair(Sigmoid(), GRID, ratio)
    assert torch.equal(r == 0, exact >= GRID)
    assert torch.equal(gap[r == 0], GRID[r == 0])


def test_facts_of_the_sigmoid_mapping() -> None:
    n = Sigmoid().n(GRID)
    assert float(Sigmoid().n(torch.zeros(1))) == 5.0 and float(n[-1]) == pytest.approx(1.0)
    assert (n.diff() <= 0).all()
    assert (pair(Sigmoid(), GRID, 1.0)[0] == 0).all()
    for ratio in (5.0, 16.0, 256.0):
        r, gap = pair(Sigmoid(), GRID, ratio)
        assert (r > 0).all() and (r.diff() > 0).all()
        assert (gap / GRID >= (1 - 1e-12) / ratio).all() and (gap / GRID <= 5 / ratio).all()
    share = pair(Sigmoid(), GRID, 256.0)[1] / GRID
    assert float(share[-1]) == pytest.approx(0.0039, abs=1e-5)
    assert float(share[0]) == pytest.approx(0.0195, abs=4e-5)


@pytest.mark.parametrize("ratio", [1.5, 2.0, 3.0, 4.0])
def test_r_never_decreases_in_t(ratio: float) -> None:
    assert (pair(Sigmoid(), GRID, ratio)[0].diff() >= 0).all()


def test_the_other_way_of_writing_it() -> None:
    """FastGen and TCM: r = t - t (1 - ratio)(1 + 8 sigmoid(-t)), ratio = 1 - q^-a."""
    want = GRID - GRID / 16 * (1 + 8 * torch.sigmoid(-GRID))
    torch.testing.assert_close(pair(Sigmoid(), GRID, 16.0)[0], want, rtol=1e-12, atol=0)


def test_the_gap_keeps_its_digits() -> None:
    """At q^a = 2^20 a subtraction in float64 would lose six digits."""
    t = torch.tensor([0.1, 3.0, 70.0], dtype=torch.float64)
    _, gap = pair(Constant(), t, 2.0**20)
    torch.testing.assert_close(gap, t / 2**20, rtol=1e-15, atol=0)


def test_noise_below_the_teachers_least_counts_as_clean() -> None:
    t = torch.tensor([0.03, 0.05, 1.0], dtype=torch.float64)
    r, gap = pair(Constant(), t, 2.0, r_min=0.02)
    assert r.tolist() == [0.0, 0.025, 0.5]
    assert gap.tolist() == [0.03, 0.025, 0.5]


# ---------------------------------------------------------------------------------------- schedules
def test_stages_change_on_the_image() -> None:
    stages = Stages(q=2.0, images=100, last=7)
    assert [stages.stage(seen(i)) for i in (0, 99, 100, 199, 200, 799, 800, 10**6)] == [
        0,
        0,
        1,
        1,
        2,
        7,
        7,
        7,
    ]
    assert [stages.ratio(seen(i)) for i in (0, 99, 100, 700, 10**6)] == [2.0, 2.0, 4.0, 256.0, 256.0]


def test_the_published_recipes_end_at_the_same_gap() -> None:
    """math.md 2.5: q = 2 with 8 stages, q = 4 with 4, q = 256 with 1."""
    last = [Stages(2, 3_200_000, 0, 7), Stages(4, 3_200_000, 0, 3), Stages(256, 3_200_000, 0, 0)]
    assert [s.ratio(seen(25_599_999)) for s in last] == [256.0, 256.0, 256.0]
    assert Stages().stage(seen(25_599_999)) == 7 and Stages().stage(seen(3_199_999)) == 0


def test_first_stage_minus_one_is_plain_diffusion() -> None:
    stages = Stages(q=2, images=10, first=-1, last=2)
    assert [stages.ratio(seen(i)) for i in (0, 9, 10, 30, 90)] == [1.0, 1.0, 2.0, 8.0, 8.0]


def test_endless_stages_stop_at_what_float_resolves() -> None:
    assert Stages(q=2, images=1, last=None).ratio(seen(10**7)) == 2.0**20
    assert Stages(q=256, images=1, last=None).ratio(seen(2)) == 2.0**20


def test_continuous_schedule() -> None:
    schedule = Continuous(q=2.0, images=100, limit=256.0)
    assert [schedule.ratio(seen(i)) for i in (0, 50, 100, 700, 10**6)] == pytest.approx([2, 2**1.5, 4, 256, 256])
    assert [schedule.stage(seen(i)) for i in (0, 99, 100, 700, 10**6)] == [0, 0, 1, 7, 7]


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: Stages(q=1.0), "needs q > 1, otherwise r never approaches t. Got: 1.0"),
        (lambda: Stages(q=float("nan")), "needs q > 1"),
        (lambda: Stages(q=float("inf")), "beyond what any precision resolves"),
        (lambda: Stages(images=0), "at least one image"),
        (lambda: Stages(first=-2), "start at -1"),
        (lambda: Stages(first=3, last=2), "last stage comes before the first"),
        (lambda: Stages(q=2, last=20), "beyond what any precision resolves"),
        (lambda: Stages(q=2.0, last=5000), "beyond what any precision resolves"),
        (lambda: Stages(q=256, last=2), "beyond what any precision resolves"),
        (lambda: Continuous(q=0.5), "needs q > 1"),
        (lambda: Continuous(images=0), "images >= 1"),
        (lambda: Continuous(limit=0.5), "limit of q"),
        (lambda: Continuous(limit=2.0**21), "limit of q"),
        (lambda: Lognormal(std=0.0), "std > 0"),
        (lambda: Lognormal(std=float("nan")), "std > 0"),
        (lambda: LogUniform(1.0, 0.5), "0 < low < high"),
        (lambda: LogUniform(0.0, 0.5), "0 < low < high"),
        (lambda: KarrasUniform(0.1, 0.1), "0 < low < high"),
        (lambda: Sigmoid(k=-1.0), "k >= 0 and b >= 0"),
    ],
)
def test_impossible_schedules_say_why(build: Callable[[], object], text: str) -> None:
    with pytest.raises(ScheduleError) as caught:
        build()
    assert text in str(caught.value)
    assert caught.value.exit_code == 2


def test_stages_at_the_limit_are_allowed() -> None:
    assert Stages(q=2, last=19).ratio(seen(10**9)) == 2.0**20
    assert Stages(q=4, last=9).ratio(seen(10**9)) == 2.0**20
