"""Edges, nodes and the three times of a step: nesting, exact neighbours, thresholds, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fewstep.denoiser import Denoiser, Parametrization
from fewstep.errors import ScheduleError
from fewstep.process import EDM
from fewstep.sampling import jump_times, karras_grid
from fewstep.segments import (
    Axis,
    Clocks,
    Spacing,
    annealed,
    axis_of,
    gap_clocks,
    grid_clocks,
    phase_clocks,
)
from fewstep.times import Sigmoid, pair
from fewstep.types import Progress

SPACINGS: tuple[Spacing, ...] = ("karras", "cosine")
spacings = st.sampled_from(SPACINGS)


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def places(count: int) -> Tensor:
    """One uniform number in the middle of each of ``count`` equal parts."""
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


# ------------------------------------------------------------------------------------------- edges
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("count", [1, 2, 3, 8, 64])
def test_edges_rise_from_zero_to_the_top_and_nest(spacing: Spacing, count: int) -> None:
    axis = axis_of(spacing, 0.5, 0.0, 80.0)
    edges = axis.edges(count)
    assert edges.dtype == torch.float64
    assert edges[0] == 0 and edges[-1] == 80.0
    assert (edges.diff() > 0).all()
    assert torch.equal(axis.edges(2 * count)[::2], edges)
    assert axis.levels(count) == tuple(reversed(edges.tolist()))[:-1]


@pytest.mark.parametrize(("sigma_data", "sigma_min"), [(0.5, 0.0), (1.0, 0.0), (0.5, 0.03)])
def test_karras_edges_are_the_jump_samplers(sigma_data: float, sigma_min: float) -> None:
    denoiser = Denoiser(
        nn.Identity(), EDM(), Parametrization(sigma_data=sigma_data), sample_shape=(2,), sigma_min=sigma_min
    )
    axis = axis_of("karras", sigma_data, sigma_min, denoiser.sigma_max)
    for count in (1, 2, 4, 8, 5):
        assert axis.levels(count) == pytest.approx(jump_times(denoiser, count), rel=1e-12)


def test_edges_by_hand() -> None:
    root = lambda x: x ** (1 / 7)  # noqa: E731
    middle = ((root(0.002) + root(80.0)) / 2) ** 7
    assert axis_of("karras", 0.5, 0.0, 80.0).edges(2).tolist() == pytest.approx([0, middle, 80], rel=1e-13)
    # cosine: log-SNR = -2 ln tan(a u + b), from 20 down to -2 ln 80
    b = math.atan(math.exp(-10))
    a = math.atan(80.0) - b
    log_snr = [-2 * math.log(math.tan(a * u + b)) for u in (0.25, 0.5, 0.75)]
    got = axis_of("cosine", 0.5, 0.0, 80.0).edges(4)[1:4]
    assert got.tolist() == pytest.approx([math.exp(-v / 2) for v in log_snr], rel=1e-12)
    assert axis_of("cosine", 1.0, 0.0, 160.0).edges(4)[1:4].tolist() == pytest.approx((2 * got).tolist(), rel=1e-12)


@settings(deadline=None, max_examples=60)
@given(spacings, st.floats(1e-4, 300), st.lists(st.sampled_from([1, 2, 3, 4, 8, 16]), min_size=1, max_size=5))
def test_the_lower_edge_is_the_largest_one_below(spacing: Spacing, t: float, counts: list[int]) -> None:
    axis = axis_of(spacing, 0.5, 0.0, 80.0)
    below = axis.lower_edge(torch.full((len(counts),), t, dtype=torch.float64), torch.tensor(counts))
    for got, count in zip(below.tolist(), counts, strict=True):
        assert got == max(e for e in axis.edges(count)[:-1].tolist() if e < t)


def test_an_edge_belongs_to_the_segment_below_it() -> None:
    axis = axis_of("karras", 0.5, 0.0, 80.0)
    edges = axis.edges(8)
    assert torch.equal(axis.lower_edge(edges[1:], torch.full((8,), 8)), edges[:-1])


def test_an_axis_upside_down_is_refused() -> None:
    with pytest.raises(ScheduleError, match="lowest level above its highest"):
        Axis("karras", 5.0, 1.0)


# ------------------------------------------------------------------------------------------- nodes
@settings(deadline=None, max_examples=60)
@given(spacings, st.lists(st.sampled_from([1, 2, 4, 8, 3]), min_size=1, max_size=6), st.floats(1, 1280), st.data())
def test_three_times_in_order(spacing: Spacing, counts: list[int], nodes: float, data: st.DataObject) -> None:
    size = len(counts)
    u = double(*data.draw(st.lists(st.floats(1e-9, 1 - 1e-9), min_size=size, max_size=size)))
    axis = axis_of(spacing, 0.5, 0.0, 80.0)
    clocks = grid_clocks(axis, u, torch.tensor(counts), nodes)
    assert ((clocks.s >= 0) & (clocks.s <= clocks.r) & (clocks.r < clocks.t) & (clocks.t <= 80)).all()
    assert torch.equal(clocks.gap, clocks.t - clocks.r)
    assert torch.equal(clocks.s, axis.lower_edge(clocks.t, torch.tensor(counts)))
    assert ((clocks.share >= 0) & (clocks.share <= 1)).all()
    assert torch.equal(clocks.share == 0, clocks.r == clocks.s)


def test_every_pair_of_neighbours_is_as_likely() -> None:
    """8 segments of 5 nodes: 40 uniform numbers, one in each part, give 40 pairs; each ends where the next begins."""
    axis = axis_of("karras", 0.5, 0.0, 80.0)
    clocks = grid_clocks(axis, places(40), torch.full((40,), 8), 41)
    torch.testing.assert_close(clocks.t, axis.edges(40)[1:], rtol=1e-13, atol=0)
    torch.testing.assert_close(clocks.r, axis.edges(40)[:-1], rtol=1e-13, atol=0)
    assert torch.equal(clocks.s, axis.edges(8)[:-1].repeat_interleave(5))


def test_as_many_segments_as_nodes_are_diffusion() -> None:
    clocks = grid_clocks(axis_of("karras", 0.5, 0.0, 80.0), places(64), torch.full((64,), 64), 64)
    assert torch.equal(clocks.r, clocks.s)
    assert torch.equal(clocks.share, torch.zeros(64, dtype=torch.float64))


def test_the_number_of_nodes_grows_evenly_in_its_logarithm() -> None:
    at = lambda seen: annealed(64, 1280, 0.5, Progress(seen, 1000))  # noqa: E731
    assert [at(0), at(500), at(1000)] == pytest.approx([64, 1280, 1280])
    assert at(250) == pytest.approx(math.sqrt(64 * 1280))
    assert annealed(64, 1280, 0.0, Progress(0, 1000)) == 1280


# -------------------------------------------------------------------------------------------- gaps
@settings(deadline=None, max_examples=60)
@given(st.floats(1e-3, 80), st.sampled_from([1.0, 2.0, 16.0, 256.0]), st.sampled_from([0.0, 0.02]))
def test_without_segments_the_gap_is_ects(t: float, ratio: float, r_min: float) -> None:
    time, mapping = double(t), Sigmoid()
    r, gap = pair(mapping, time, ratio, r_min)
    clocks = gap_clocks(time, double(0.0), mapping.n(time) / ratio, r_min)
    assert torch.equal(clocks.r == 0, r == 0)
    torch.testing.assert_close(clocks.r, r, rtol=1e-14, atol=0)
    torch.testing.assert_close(clocks.gap, gap, rtol=1e-14, atol=0)
    torch.testing.assert_close(clocks.clean_gap, gap, rtol=1e-14, atol=0)
    assert torch.equal(clocks.share, (r > 0).double())


def test_a_gap_stops_at_the_edge() -> None:
    t, s = double(4.0, 4.0, 4.0), double(2.0, 2.0, 2.0)
    clocks = gap_clocks(t, s, double(0.25, 1.0, 1.5))
    assert clocks.r.tolist() == [3.5, 2.0, 2.0]
    assert clocks.gap.tolist() == [0.5, 2.0, 2.0]
    assert clocks.clean_gap.tolist() == [1.0, 4.0, 4.0]  # (t - r)/(1 - s/t)
    assert clocks.share.tolist() == pytest.approx([4 * 1.5 / (3.5 * 2), 0, 0])


def test_the_share_keeps_its_digits_where_the_segment_is_narrow() -> None:
    s = double(2.0)
    t = s * (1 + 2.0**-40)
    clocks = gap_clocks(t, s, double(0.5))
    exact = 0.5 * (1 - 2.0**-41)  # t (r - s)/(r (t - s)) = (1/2) t/r
    assert clocks.share.item() == pytest.approx(exact * (1 + 2.0**-40), rel=1e-11)


# ------------------------------------------------------------------------------------------ phases
def grid(n: int) -> Tensor:
    return torch.tensor(karras_grid(n)[::-1], dtype=torch.float64)


def test_phases_of_tract_by_enumeration() -> None:
    """64 -> 8 -> 2 steps: e = index step, t = sigma_{e - semi}, r one teacher step below, s = sigma_{e - step}."""
    nodes = grid(64)
    for steps, fewer in ((64, 8), (8, 2)):
        stride, segment = 64 // steps, 64 // fewer
        clocks = phase_clocks(nodes, places(steps), stride, segment)
        want = {
            (e - semi, e - semi - stride, e - segment)
            for e in range(segment, 65, segment)
            for semi in range(0, segment, stride)
        }
        times = (clocks.t, clocks.r, clocks.s)
        got = zip(*((nodes[:, None] == v).double().argmax(0).tolist() for v in times), strict=True)
        assert sorted(got) == sorted(want)


def test_clocks_are_plain_records() -> None:
    clocks = Clocks(double(4.0), double(2.0), double(1.0), double(2.0))
    assert clocks.share.item() == pytest.approx(4 * 1 / (2 * 3))
    assert clocks.clean_gap.item() == pytest.approx(2 / 0.75)
