"""Grids of noise levels: their nodes, their growth, and which pair a uniform number picks (math.md 3.1, 3.2)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewstep.errors import ScheduleError
from fewstep.grids import Doubling, Growing, Karras, lognormal_shares, neighbours, places, uniform_places
from fewstep.sampling import karras_grid
from fewstep.times import Lognormal
from fewstep.types import Progress


def at(images: int, total: int = 8000) -> Progress:
    return Progress(images, total)


# ------------------------------------------------------------------------------------------- nodes
def test_nodes_are_edms_in_ascending_order() -> None:
    nodes = Karras().nodes(18, 0.0, 80.0)
    assert nodes.dtype == torch.float64
    assert nodes.flip(0).tolist() == pytest.approx(karras_grid(18)[:-1], rel=1e-13)
    i = 6  # math.md 3.1, descending: (T^(1/7) + i/(N-1) (eps^(1/7) - T^(1/7)))^7
    want = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    assert float(nodes[17 - i]) == pytest.approx(want, rel=1e-13)


def test_nodes_keep_to_what_the_network_knows() -> None:
    nodes = Karras().nodes(10, 0.03, 14.6)
    assert (float(nodes[0]), float(nodes[-1])) == pytest.approx((0.03, 14.6))
    with pytest.raises(ScheduleError, match="lowest node of the grid"):
        Karras(low=20.0).nodes(10, 0.0, 14.6)


def test_neighbours_form_one_chain_from_the_top_to_zero() -> None:
    """N nodes are N - 1 pairs; the lowest node counts as 0, so the anchor to x_0 is there."""
    nodes = Karras().nodes(11, 0.0, 80.0)
    t, r = neighbours(nodes, torch.arange(10))
    assert float(r[0]) == 0.0
    assert torch.equal(r[1:], t[:-1])
    assert torch.equal(t, nodes[1:])
    assert float(r[1]) > 0.002


@given(st.integers(2, 300), st.floats(0, 1, exclude_min=True, exclude_max=True))
def test_every_pair_is_ordered(count: int, u: float) -> None:
    nodes, uniform = Karras().nodes(count, 0.0, 80.0), torch.tensor([u], dtype=torch.float64)
    for place in (uniform_places(uniform, count), places(uniform, lognormal_shares(Lognormal(), nodes))):
        t, r = neighbours(nodes, place)
        assert 0 <= float(r) < float(t) <= 80 * (1 + 1e-12)


# ------------------------------------------------------------------------------------- which pair
def test_all_pairs_are_equally_likely() -> None:
    u = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    assert uniform_places(u, 11).bincount().tolist() == [100] * 10
    assert uniform_places(u, 2).unique().tolist() == [0]
    edge = torch.tensor([2.0**-33, 1 - 2.0**-33], dtype=torch.float64)
    assert uniform_places(edge, 151).tolist() == [0, 149]


@pytest.mark.parametrize("count", [2, 11, 1281])
def test_lognormal_shares(count: int) -> None:
    """p(i) ~ erf((ln s_{i+1} - P)/(sqrt 2 S)) - erf((ln s_i - P)/(sqrt 2 S)), and the sum is 1."""
    nodes = Karras().nodes(count, 0.0, 80.0)
    shares = lognormal_shares(Lognormal(-1.1, 2.0), nodes)
    assert shares.shape == (count - 1,)
    assert float(shares.sum()) == pytest.approx(1.0, abs=1e-13)
    z = [math.erf((math.log(s) + 1.1) / (math.sqrt(2) * 2.0)) for s in nodes.tolist()]
    raw = [b - a for a, b in itertools.pairwise(z)]
    assert shares.tolist() == pytest.approx([v / sum(raw) for v in raw], rel=1e-9)


def test_places_have_their_shares() -> None:
    shares = lognormal_shares(Lognormal(), Karras().nodes(11, 0.0, 80.0))
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    counts = places(u, shares).bincount(minlength=10).double()
    torch.testing.assert_close(counts / 100_000, shares, rtol=0, atol=1.1e-5)
    edge = torch.tensor([2.0**-33, 1 - 2.0**-33], dtype=torch.float64)
    assert places(edge, shares).tolist() == [0, 9]


# --------------------------------------------------------------------------------------- how many
@pytest.mark.parametrize(("images", "want"), [(0, 2), (80, 16), (2000, 76), (4000, 107), (8000, 151)])
def test_ct_grows_from_2_to_151_nodes(images: int, want: int) -> None:
    """By hand: k/K = 1/4 gives ceil(sqrt(22797/4 + 4) - 1) + 1 = ceil(74.52) + 1."""
    assert Growing().nodes(at(images)) == want


def test_ct_grows_to_201_on_imagenet() -> None:
    assert Growing(last=200).nodes(at(8000)) == 201


def test_ct_never_shrinks() -> None:
    counts = [Growing().nodes(at(k)) for k in range(8001)]
    assert counts == sorted(counts)
    assert set(counts) >= set(range(20, 152))


def test_decay_of_cts_target() -> None:
    """mu(k) = exp(2 ln mu_0/(N - 1)): 0.81 at N = 2, 0.9^(1/75) at N = 151; 0 stays 0."""
    assert Growing().decay(0.9, at(0)) == pytest.approx(0.81)
    assert Growing().decay(0.9, at(8000)) == pytest.approx(math.exp(2 * math.log(0.9) / 150))
    assert Growing().decay(0.0, at(4000)) == 0.0


def test_ict_doubles_in_eight_equal_blocks() -> None:
    got = [Doubling().nodes(at(images)) for images in range(0, 8000, 1000)]
    assert got == [11, 21, 41, 81, 161, 321, 641, 1281]
    for block, nodes in enumerate(got):
        assert Doubling().nodes(at(1000 * block + 999)) == nodes
        assert Doubling().stage(at(1000 * block)) == block


def test_ict_stays_at_the_last_count() -> None:
    """K' is rounded down, so the run may outlast its blocks; and a run may be shorter than they are."""
    assert Doubling().nodes(Progress(8006, 8007)) == 1281
    assert Doubling().stage(Progress(8006, 8007)) == 7
    assert Doubling(first=10, last=100).nodes(Progress(999, 1000)) == 101
    assert Doubling().nodes(Progress(3, 5)) == 81


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Karras(low=0.0), "low > 0"),
        (lambda: Karras(rho=-1.0), "rho > 0"),
        (lambda: Growing(first=1), "2 <= first <= last"),
        (lambda: Growing(first=20, last=10), "2 <= first <= last"),
        (lambda: Doubling(first=0), "1 <= first <= last"),
    ],
)
def test_unusable_grids_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        make()
