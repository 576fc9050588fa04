"""Neighbourhood metrics and memorisation: hand-made sets, double loops, and laws that hold for every distribution."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.special
import torch
from torch import Tensor

from fewstep.errors import DataError
from fewstep.evaluation import manifold
from fewstep.evaluation.bootstrap import half_samples, spread_of
from fewstep.evaluation.manifold import memorised, nearest, neighbourhood


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def values(real: Tensor, fake: Tensor, **settings: int) -> dict[str, float]:
    found = neighbourhood(real, fake, replicates=0, **settings)
    return {name: estimate.value for name, estimate in found.items()}


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> tuple[float, float]:
    found = values(real, fake, k=k, density_k=k)
    return found["precision"], found["recall"]


# --- Precision and recall ---------------------------------------------------------------------------------


def test_precision_recall_on_a_line() -> None:
    """Reals 0..9, k = 3: the ball of 9 reaches to 12; the fakes' balls have radius .3 and hold 5 alone."""
    real = torch.arange(10.0)[:, None]
    fake = torch.tensor([[5.0], [5.1], [5.2], [5.3], [12.0], [12.01], [-3.0], [40.0]])
    precision, _ = precision_recall(real, fake)
    assert precision == 6 / 8  # 12 and -3 lie exactly on the rim and count; 12.01 and 40 do not
    _, recall = precision_recall(real, fake[:4])
    assert recall == 1 / 10


def test_copies_are_inside_even_where_duplicates_leave_radius_zero() -> None:
    real = normal(40, 257, seed=33).repeat(5, 1)
    assert precision_recall(real, real[:41].repeat(2, 1)) == (1.0, 1.0)
    assert precision_recall(real, real + 1e-3) == (0.0, 0.0)


# --- All four ---------------------------------------------------------------------------------------------


def test_density_and_coverage_on_a_line() -> None:
    """k = 1, reals 0, 1, 3, 7: the balls [-1, 1], [0, 2], [1, 5], [3, 11]."""
    real = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    found = values(real, torch.tensor([[1.0], [20.0], [30.0]]), k=1, density_k=1)  # 1 is in three of them
    assert found == {"precision": 1 / 3, "recall": 1.0, "density": 3 / 3, "coverage": 3 / 4}
    found = values(real, torch.tensor([[1.0], [1.5], [20.0]]), k=1, density_k=1)  # balls [.5, 1.5], [1, 2], [1.5, 38.5]
    assert found == {"precision": 2 / 3, "recall": 3 / 4, "density": 5 / 3, "coverage": 3 / 4}


def looped(real: Tensor, fake: Tensor, k: int, density_k: int) -> dict[str, float]:
    def radius(points: Tensor, k: int) -> list[float]:
        return [sorted(float((p - q).norm()) for q in points)[k] for p in points]

    def inside(queries: Tensor, points: Tensor, k: int) -> np.ndarray:
        balls = list(zip(points, radius(points, k), strict=True))
        return np.array([[float((q - p).norm()) <= r for p, r in balls] for q in queries])

    return {
        "precision": inside(fake, real, k).any(1).mean(),
        "recall": inside(real, fake, k).any(1).mean(),
        "density": inside(fake, real, density_k).sum() / (density_k * len(fake)),
        "coverage": inside(fake, real, density_k).any(0).mean(),
    }


@pytest.mark.parametrize(("k", "density_k"), [(3, 5), (1, 2), (4, 1)])
def test_all_four_against_double_loops(k: int, density_k: int) -> None:
    real, fake = normal(60, 3, seed=31), 1.3 * normal(45, 3, seed=32) + 0.8
    expected = looped(real, fake, k, density_k)
    assert all(0 < value < 1 for value in expected.values())
    assert values(real, fake, k=k, density_k=density_k) == pytest.approx(expected, abs=1e-12)
    assert precision_recall(real, fake, k=k) == (expected["precision"], expected["recall"])


def test_density_and_coverage_of_the_true_law() -> None:
    """Same law on both sides: E density = 1, E coverage = 1 - Π_{i=1..k} (m - i)/(n + m - i) (Naeem et al.)."""
    n, m, k = 150, 120, 5
    expected = 1 - math.prod((m - i) / (n + m - i) for i in range(1, k + 1))
    found = [values(normal(m, 6, seed=i), normal(n, 6, seed=i + 1000)) for i in range(60)]
    for name, law in (("density", 1.0), ("coverage", expected)):
        sample = [f[name] for f in found]
        error = float(np.std(sample)) / math.sqrt(len(sample))
        assert error < 0.02 and abs(float(np.mean(sample)) - law) < 4 * error


def test_order_and_chunks_do_not_matter() -> None:
    real, fake, p = normal(300, 6, seed=20), 1.2 * normal(250, 6, seed=23), torch.randperm(300)
    expected = values(real, fake)
    assert 0.2 < expected["precision"] < 0.9 and 0.2 < expected["coverage"] < 0.99
    assert values(real[p], fake) == values(real, fake.flip(0)) == values(real, fake, chunk=7) == expected
    assert neighbourhood(real, fake, chunk=7) == neighbourhood(real[p], fake)


def test_spreads_are_those_of_the_metrics_of_the_halves() -> None:
    real, fake = normal(70, 4, seed=1), 1.2 * normal(60, 4, seed=2)
    halves = [values(real, fake[half]) for half in half_samples(60, 12, 5)]
    for name, estimate in neighbourhood(real, fake, replicates=12, seed=5).items():
        assert estimate.spread == pytest.approx(spread_of([h[name] for h in halves]), abs=1e-12)
        assert estimate.spread > 0.005


def test_kept_neighbours_do_not_change_the_radii_of_the_halves() -> None:
    """600 fakes, of which 64 neighbours are kept."""
    real, fake = normal(100, 4, seed=3), normal(600, 4, seed=4)
    halves = [values(real, fake[half])["recall"] for half in half_samples(600, 8, 6)]
    assert neighbourhood(real, fake, replicates=8, seed=6)["recall"].spread == pytest.approx(
        spread_of(halves), abs=1e-12
    )


def test_spreads_estimate_the_deviation_between_generated_sets() -> None:
    real = normal(300, 4, seed=7)
    runs = [neighbourhood(real, 1.1 * normal(300, 4, seed=100 + i), replicates=20, seed=i) for i in range(60)]
    for name, widest in (("precision", 1.4), ("recall", 1.6), ("density", 1.4), ("coverage", 1.9)):
        true = float(np.std([run[name].value for run in runs], ddof=1))
        mean = float(np.mean([run[name].spread for run in runs]))
        assert 1 / 1.4 < mean / true < widest, (name, mean, true)


# --- Memorisation -----------------------------------------------------------------------------------------


def test_memorised_on_a_line() -> None:
    """Rows 0, 0, 1, 4: to another 1, 1, 1, 3; half of it reaches to 0.5 around 0 and 1, and to 1.5 around 4."""
    real = torch.tensor([[0.0], [0.0], [1.0], [4.0]])
    fake = torch.tensor([0.0, 0.4, 0.5, 0.7, 2.4, 2.5, 2.6, 5.4, 6.0])[:, None]  # 0.5 and 2.5 are on the rim
    assert memorised(real, fake, replicates=0).value == 5 / 9  # 0, 0.4, 0.7, 2.6, 5.4
    fake = torch.tensor([0.0, 0.4, 0.7, 2.4, 2.6, 5.4, 6.9, 7.0])[:, None]  # 2.4 belongs to 1, 7 is on the rim
    assert memorised(real, fake, factor=1.0, replicates=0).value == 6 / 8
    assert memorised(real, fake, factor=1e-6, replicates=0).value == 1 / 8


def test_copies_are_memorised_and_fresh_rows_are_not() -> None:
    train, fresh = normal(3000, 16, seed=8), normal(1000, 16, seed=9)
    copies = train[::3] + 1e-3 * fresh
    assert memorised(train, copies).value == 1.0
    few = memorised(train, torch.cat([fresh[:900], copies[:100]]))
    assert few.value == pytest.approx(0.1, abs=0.01) and few.spread == pytest.approx(math.sqrt(0.09 / 1000), rel=0.3)
    assert memorised(train, fresh).value < 0.005
    assert memorised(train, 0.3 * fresh).value < 0.005  # close to everything, and copies of nothing


@pytest.mark.parametrize("d", [1, 2, 3])
def test_fresh_rows_follow_the_stated_laws(d: int) -> None:
    """2^-d at half the distance; 1/(2 - I_{3/4}((d+1)/2, 1/2)) at the whole: the probability of mutual neighbours."""
    rng = torch.Generator().manual_seed(d)
    train, fresh = torch.rand(6000, d, generator=rng), torch.rand(3000, d, generator=rng)
    error = 4 * math.sqrt(0.25 / 3000)
    mutual = 1 / (2 - float(scipy.special.betainc((d + 1) / 2, 0.5, 0.75)))
    assert mutual == pytest.approx({1: 2 / 3, 2: 0.6215, 3: 16 / 27}[d], abs=1e-4)
    assert memorised(train, fresh, replicates=0).value == pytest.approx(2.0**-d, abs=error)
    assert memorised(train, fresh, factor=1.0, replicates=0).value == pytest.approx(mutual, abs=error)
    both = memorised(train, fresh[:1500], heldout_rows=fresh[1500:])
    assert abs(both.value) < 4 * both.spread
    apart = [memorised(train, part).spread for part in fresh.split(1500)]
    assert apart == pytest.approx([math.sqrt(2.0**-d * (1 - 2.0**-d) / 1500)] * 2, rel=0.4)
    assert both.spread == pytest.approx(math.hypot(*apart))


def test_each_row_has_one_fresh_sample_in_its_ball_on_average() -> None:
    """E Σ_x 1[|y - x| < r(x)] = 1 for every law: here a mixture of very different densities."""
    rows = torch.cat([normal(600, 2, seed=10), 20 + 0.01 * normal(600, 2, seed=11)])[torch.randperm(1200)]
    train, fresh = rows[:600], rows[600:]
    reach = nearest(train, train, 2)[0][:, 1]
    assert float((torch.cdist(fresh, train) < reach).sum(1).double().mean()) == pytest.approx(1, abs=0.15)


def test_memorised_does_not_depend_on_order_chunks_or_duplicates() -> None:
    train, fresh = normal(500, 3, seed=12), normal(400, 3, seed=13)
    expected = memorised(train, fresh)
    assert 0.05 < expected.value < 0.3
    assert memorised(train[torch.randperm(500)], fresh) == memorised(train, fresh, chunk=9) == expected
    assert memorised(train.repeat(3, 1), fresh) == memorised(train + 1e3, fresh + 1e3) == expected


def test_distances_are_held_in_bounded_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifold, "BLOCK", 5000)
    rows, sizes = normal(700, 3, seed=14), []
    for block, gaps in manifold._distances(rows, rows, None):
        sizes.append(gaps.numel())
        assert torch.allclose(gaps, torch.cdist(rows[block], rows).square(), atol=1e-9)
    assert max(sizes) <= 5000 and sum(sizes) == 700 * 700


# --- Nearest neighbours -----------------------------------------------------------------------------------


def test_nearest_against_a_full_sort() -> None:
    rows, queries = normal(200, 5, seed=15) + 100, normal(30, 5, seed=16) + 100
    queries[3] = rows[17]
    gaps, index = nearest(rows, queries, 4, chunk=8)
    full = torch.stack([(rows - q).norm(dim=1) for q in queries])
    order = full.argsort(dim=1)[:, :4]
    assert torch.equal(index, order) and gaps == pytest.approx(full.gather(1, order).numpy(), abs=1e-12)
    assert index[3, 0] == 17 and gaps[3, 0] == 0.0
    assert nearest(rows, queries[:0], 4)[1].shape == (0, 4)


# --- What is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "metric",
    [precision_recall, neighbourhood, memorised, lambda x, y: nearest(x, y, 1)],
    ids=["pr", "all", "mem", "nn"],
)
def test_bad_features_are_refused_in_one_sentence(metric) -> None:
    good = normal(12, 3)
    bad = good.clone()
    bad[4, 1] = math.nan
    with pytest.raises(DataError, match=r"not finite\. Got: NaN or infinity in 1 of 12 rows"):
        metric(good, bad)
    with pytest.raises(DataError, match=r"differ in dimension. Got: 3 and 2"):
        metric(good, good[:, :2])
    with pytest.raises(DataError, match=r"too few samples for this metric. Got: 0"):
        metric(good[:0], good)
    with pytest.raises(DataError, match=r"not a table\. Got: shape \[12\]"):
        metric(good, good[:, 0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: precision_recall(x, x, k=0), "k >= 1"),
        (lambda x: precision_recall(x, x, k=10), "at least 11"),
        (lambda x: neighbourhood(x, x), "at least 12"),
        (lambda x: neighbourhood(x[:5], x, replicates=0), "at least 6"),
        (lambda x: memorised(x, x, factor=1.5), r"in \(0, 1\]"),
        (lambda x: memorised(x[:1].repeat(5, 1), x), "training rows are the same"),
        (lambda x: memorised(x, x[:3]), "at least 4"),
        (lambda x: nearest(x, x, 0), "k >= 1"),
        (lambda x: nearest(x, x, 11), "at least 11"),
    ],
)
def test_settings_without_meaning_are_refused(call, message: str) -> None:
    with pytest.raises(DataError, match=message):
        call(normal(10, 3))
