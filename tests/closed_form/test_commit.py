"""Early commit on exact laws: the bound of the confidence rule, the tail of the extrapolation rule, and their cost."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles import Gaussian, Mixture, Plain, as_denoiser
from PIL import Image
from torch import Tensor, nn

from fewstep.commit import RULES, commit_sample, default_probes, posterior_variance, tail
from fewstep.denoiser import Denoiser, Parametrization
from fewstep.errors import ConfigError, DataError
from fewstep.evaluation.early import FULL, commit_curve, commit_curve_png
from fewstep.evaluation.features import features_of, open_features
from fewstep.evaluation.metrics import Stats, frechet_distance, gaussian_stats
from fewstep.process import EDM
from fewstep.randomness import Streams
from fewstep.sampling import few_step_times, karras_grid, ode_sample

LAM, T, SIGMA_D = 0.25, 80.0, 0.5
WHITE = Gaussian.white(LAM)
WIDE = as_denoiser(Gaussian.white(LAM, 64).denoise, 64)
MIXTURE = as_denoiser(Mixture().denoise)
MODES = Mixture(stds=torch.tensor([0.08, 0.08], dtype=torch.float64))
"""Two modes apart: samples near their boundary know late where they go."""


class Counted(nn.Module):
    """A backbone that notes how many rows it saw, and at which noise level."""

    def __init__(self, law: Gaussian | Mixture) -> None:
        super().__init__()
        self.law, self.rows = law, list[tuple[float, int]]()
        self.idle = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        self.rows.append((float(t[0]), len(x)))
        return self.law.denoise(x, t) + 0 * self.idle


def counted(law: Gaussian | Mixture, size: int = 1) -> tuple[Denoiser, Counted]:
    network = Counted(law)
    parametrization = Parametrization("x0", sigma_data=SIGMA_D, time="native")
    return Denoiser(network, EDM(), parametrization, sample_shape=(size,)), network


def rms(a: Tensor, b: Tensor) -> float:
    return float((a - b).square().mean().sqrt())


def exact_trajectory() -> tuple[list[float], Tensor, Tensor, float]:
    """Nodes, D_k and delta_k on the exact trajectory through x = 80 at sigma = 80 of N(0, 0.25), and its end."""
    nodes = karras_grid(18)[:-1]
    start = torch.full((1, 1), T, dtype=torch.float64)
    clean = torch.cat([WHITE.denoise(WHITE.flow(start, T, t), t) for t in nodes]).flatten()
    return nodes, clean, clean.diff().abs(), float(WHITE.endpoint(start, T))


# ----------------------------------------------------------------------------------------- the chain
@pytest.mark.parametrize(("solver", "order"), [("heun", 2), ("euler", 1)])
@pytest.mark.parametrize("rule", RULES)
def test_no_tolerance_gives_the_full_chain_to_the_bit(solver: str, order: int, rule: str) -> None:
    want = ode_sample(MIXTURE, 9, steps=12, order=order, seed=3, first=5)
    got = commit_sample(MIXTURE, 9, nodes=12, solver=solver, rule=rule, tol=0, seed=3, first=5)
    assert torch.equal(got.samples, want)
    assert got.nfe.tolist() == [12 * order - (order - 1)] * 9
    assert got.stopped_at.tolist() == [0.0] * 9


def test_multistep_is_the_deterministic_ddim_step() -> None:
    """x <- D + (t'/t)(x - D) over the few-step times (math.md 2.9)."""
    times = few_step_times(MIXTURE, 4)
    x = Streams(1).normal("sample/latent", torch.arange(6), (1,), torch.float64) * times[0]
    for t, t_next in itertools.pairwise([*times, 0.0]):
        clean = Mixture().denoise(x, t)
        x = clean + t_next / t * (x - clean)
    got = commit_sample(MIXTURE, 6, nodes=4, solver="multistep", rule="extrapolation", tol=0, seed=1)
    torch.testing.assert_close(got.samples, x, rtol=1e-12, atol=1e-12)
    assert got.nfe.tolist() == [4] * 6
    given = commit_sample(MIXTURE, 6, times=times, solver="multistep", rule="extrapolation", tol=0, seed=1)
    assert torch.equal(given.samples, got.samples)


@pytest.mark.parametrize("rule", RULES)
def test_finished_samples_leave_the_batch_and_every_evaluation_is_counted(rule: str) -> None:
    denoiser, network = counted(MODES)
    found = commit_sample(denoiser, 200, nodes=36, rule=rule, tol=0.1)
    assert sum(rows for _, rows in network.rows) == int(found.nfe.sum())
    sizes = [rows for _, rows in network.rows]
    assert max(sizes) == 200
    assert len({*found.nfe.tolist()}) > 3
    at_end = min(rows for t, rows in network.rows if t == min(t for t, _ in network.rows))
    assert at_end == int((found.stopped_at <= min(t for t, _ in network.rows)).sum())


@pytest.mark.parametrize("rule", RULES)
def test_a_sample_does_not_depend_on_its_batch(rule: str) -> None:
    denoiser = as_denoiser(MODES.denoise)
    whole = commit_sample(denoiser, 30, nodes=36, rule=rule, tol=0.1, seed=2)
    assert len({*whole.nfe.tolist()}) > 2
    for size in (1, 7):
        parts = commit_sample(denoiser, 30, nodes=36, rule=rule, tol=0.1, seed=2, batch_size=size)
        torch.testing.assert_close(parts.samples, whole.samples, rtol=1e-10, atol=1e-10)
        assert torch.equal(parts.nfe, whole.nfe)
        assert torch.equal(parts.stopped_at, whole.stopped_at)
    later = commit_sample(denoiser, 10, nodes=36, rule=rule, tol=0.1, seed=2, first=20)
    torch.testing.assert_close(later.samples, whole.samples[20:], rtol=1e-10, atol=1e-10)


def test_the_signs_of_a_probe_belong_to_its_sample() -> None:
    """One probe of six correlated values is noisy, so that a sample's cost tells which signs it was given."""
    denoiser = as_denoiser(Gaussian.random(6).denoise, 6)
    whole = commit_sample(denoiser, 40, nodes=36, tol=0.2, probes=1)
    assert len({*whole.nfe.tolist()}) > 2
    parts = commit_sample(denoiser, 40, nodes=36, tol=0.2, probes=1, batch_size=1)
    assert torch.equal(parts.nfe, whole.nfe)
    assert torch.equal(parts.stopped_at, whole.stopped_at)
    other = commit_sample(denoiser, 40, nodes=36, tol=0.2, probes=1, seed=1)
    assert not torch.equal(other.nfe, whole.nfe)


@pytest.mark.parametrize("rule", RULES)
def test_labels_stay_with_their_samples(rule: str) -> None:
    """Class 0 is narrow and leaves first; its rows lie between those of class 1."""
    laws = [Gaussian.white(1e-6, 1, mean=-3.0), Gaussian.white(1.0, 1, mean=3.0)]

    class Classes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.idle = nn.Parameter(torch.zeros((), dtype=torch.float64))

        def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
            assert cond is not None
            both = torch.stack([law.denoise(x, t) for law in laws], 1)
            return (both * cond[:, :, None]).sum(1) + 0 * self.idle

    parametrization = Parametrization("x0", sigma_data=SIGMA_D, time="native")
    denoiser = Denoiser(Classes(), EDM(), parametrization, sample_shape=(1,), num_classes=2)
    cond = torch.arange(40) % 2
    full = commit_sample(denoiser, 40, nodes=36, cond=cond, tol=0)
    found = commit_sample(denoiser, 40, nodes=36, cond=cond, rule=rule, tol=0.02)
    assert float((found.samples - full.samples).abs().max()) < 0.05
    if rule == "confidence":
        assert int(found.nfe[cond == 0].max()) < int(found.nfe[cond == 1].min())
    by_index = commit_sample(denoiser, 1, nodes=36, cond=cond[7:8], rule=rule, tol=0.02, first=7)
    torch.testing.assert_close(by_index.samples, found.samples[7:8], rtol=1e-10, atol=1e-10)


# ------------------------------------------------------------------------------------ the naive rule
def test_the_naive_rule_stops_where_nothing_is_known_yet() -> None:
    """18 nodes, N(0, 0.25): D moves by .017 at sigma = 5.3, where it is still .453 away from its end (math.md 4.5)."""
    nodes, clean, moved, end = exact_trajectory()
    naive = int((moved <= 0.02).nonzero()[0]) + 1
    at_plateau = nodes.index(next(t for t in nodes if abs(t - 5.315) < 0.01))
    assert naive <= at_plateau
    assert float(moved[at_plateau - 1]) == pytest.approx(0.017, abs=5e-4)
    assert abs(float(clean[at_plateau]) - end) == pytest.approx(0.453, abs=5e-4)
    law = as_denoiser(WHITE.denoise)
    for rule in RULES:
        for tol in (0.02, 0.1, 0.3):
            found = commit_sample(law, 200, rule=rule, tol=tol)
            assert float(found.stopped_at.max()) < SIGMA_D, rule
            assert float(found.stopped_at.max()) > 0, rule


def test_there_is_no_naive_rule() -> None:
    assert RULES == ("confidence", "extrapolation")
    for rule in ("delta", "naive", "change"):
        with pytest.raises(ConfigError, match="There is no rule"):
            commit_sample(MIXTURE, 2, rule=rule)


def test_changes_that_grow_or_stand_still_are_no_evidence() -> None:
    moved, before = torch.tensor([0.1, 0.2, 0.1, 0.0, 0.05]), torch.tensor([0.2, 0.1, 0.1, 0.0, math.nan])
    left = tail(moved, before)
    assert left[:3].tolist() == pytest.approx([0.1, math.inf, math.inf])
    assert left[3:].isnan().all()


# ---------------------------------------------------------------------------------------- confidence
def signs(count: int, size: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (count, size), generator=generator).double() * 2 - 1


def spread_of_law(law: Gaussian | Mixture, x: Tensor, t: float) -> Tensor:
    """Exact ``t^2 tr(dD/dx)/d`` per row, by differentiation."""
    return torch.stack(
        [t**2 * torch.func.jacrev(lambda y: law.denoise(y[None], t)[0])(row).trace() / len(row) for row in x]
    )


@pytest.mark.parametrize(("probes", "size"), [(1, 3), (2, 3), (1, 6), (4, 6)])
def test_the_probe_is_unbiased(probes: int, size: int) -> None:
    law, t, n = Gaussian.random(size), 0.4, 20_000
    x = law.mean.expand(n, size) + 0.3
    clean = law.denoise(x, t)
    found = posterior_variance(lambda x, s, c: law.denoise(x, s), x, t, clean, signs(n, size), 0.01 * t, probes=probes)
    want = float(spread_of_law(law, x[:1], t))
    assert want == pytest.approx(float(t**2 * (law.variances / (law.variances + t**2)).mean()), rel=1e-10)
    error = float(found.std()) / math.sqrt(n)
    assert float(found.std()) > 0.1 * want
    assert float(found.mean()) == pytest.approx(want, abs=4 * error)


def test_orthogonal_probes_are_exact_for_few_values_and_better_than_independent_ones() -> None:
    t = 0.4
    for size, probes in ((1, 1), (2, 2), (3, 4), (4, 4), (7, 8)):
        law = Gaussian.random(size)
        x = law.mean.expand(50, size) + 0.3
        one = posterior_variance(
            lambda x, s, c, law=law: law.denoise(x, s),
            x,
            t,
            law.denoise(x, t),
            signs(50, size),
            0.01 * t,
            probes=probes,
        )
        torch.testing.assert_close(one, spread_of_law(law, x, t), rtol=1e-9, atol=0)
    law = Gaussian.random(32)
    x = law.mean.expand(4000, 32) + 0.3
    single, four = (
        posterior_variance(
            lambda x, s, c: law.denoise(x, s), x, t, law.denoise(x, t), signs(4000, 32), 0.01 * t, probes=probes
        )
        for probes in (1, 4)
    )
    assert float(four.var()) < 0.3 * float(single.var())
    assert [default_probes(shape) for shape in ((1,), (2,), (3,), (3, 4, 5), (1, 8, 8))] == [1, 2, 4, 4, 1]


def test_the_width_of_a_probe_costs_no_accuracy_on_a_mixture() -> None:
    law, x = Mixture(), torch.linspace(-1.5, 1.5, 41, dtype=torch.float64)[:, None]
    for t in (0.05, 0.2, 0.45):
        clean = law.denoise(x, t)
        found = posterior_variance(lambda x, s, c: law.denoise(x, s), x, t, clean, signs(41, 1), 0.01 * t)
        torch.testing.assert_close(found, spread_of_law(law, x, t), rtol=0.02, atol=0)


@pytest.mark.parametrize(
    ("law", "size"), [(WHITE, 1), (Gaussian.white(LAM, 64), 64), (Gaussian.random(8), 8), (Mixture(), 1)]
)
def test_the_tolerance_bounds_the_rms_commit_error(law: Gaussian | Mixture, size: int) -> None:
    """E|f - D|^2 <= E tr Cov: over the samples that were committed, against the exact end of their trajectory."""
    denoiser, n = as_denoiser(law.denoise, size), 400
    full = commit_sample(denoiser, n, nodes=72, tol=0)
    costs = []
    for tol in (0.02, 0.05, 0.1, 0.2):
        found = commit_sample(denoiser, n, nodes=72, tol=tol)
        assert bool((found.stopped_at > 0).all())
        assert 0 < rms(found.samples, full.samples) <= tol
        costs.append(float(found.nfe.double().mean()))
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] < 0.85 * (2 * 72 - 1)


def test_confidence_saves_a_tenth_at_an_error_of_three_percent_of_the_spread() -> None:
    full = commit_sample(WIDE, 100, nodes=36, tol=0)
    found = commit_sample(WIDE, 100, nodes=36, tol=0.1)
    assert float(found.nfe.double().mean()) < 0.9 * 71
    assert rms(found.samples, full.samples) < 0.03 * SIGMA_D


def test_samples_near_the_boundary_of_two_modes_stop_later() -> None:
    denoiser, n = as_denoiser(MODES.denoise), 2000
    z = Streams(0).normal("sample/latent", torch.arange(n), (1,), torch.float64)
    boundary = (MODES.cdf(T * z, T) - 0.3).abs().flatten()
    near, far = boundary < 0.02, boundary > 0.2
    assert int(near.sum()) > 30
    found = commit_sample(denoiser, n, nodes=72, tol=0.1)
    assert float(found.stopped_at[near].mean()) < 0.8 * float(found.stopped_at[far].mean())
    assert float(found.nfe[near].double().mean()) > float(found.nfe[far].double().mean()) + 1


def test_a_negative_variance_commits_nothing() -> None:
    """No posterior mean falls as its input rises: the rule's assumption does not hold, so that the chain goes on."""
    odd = as_denoiser(lambda x, t: 0.4 - 0.2 * x, 1)
    found = commit_sample(odd, 5, tol=0.5)
    assert found.stopped_at.tolist() == [0.0] * 5
    assert torch.equal(found.samples, commit_sample(odd, 5, tol=0).samples)


def test_a_probe_is_spent_only_where_it_can_pay() -> None:
    """White Gaussian: c = sigma_d t/sqrt(sigma_d^2 + t^2). One look below sigma_d says that 1e-6 is out of reach."""
    denoiser, network = counted(Gaussian.white(LAM, 64), 64)
    found = commit_sample(denoiser, 3, tol=1e-6)
    assert found.nfe.tolist() == [36] * 3
    assert found.stopped_at.tolist() == [0.0] * 3
    grid, seen = karras_grid(18), [t for t, _ in network.rows]
    assert [k for k, t in enumerate(grid) if seen.count(t) == 3] == [12]
    found = commit_sample(denoiser, 3, tol=0.1)  # looks at .296 (c = .255) and .0599, not at .140
    assert found.nfe.tolist() == [2 * 14 + 1 + 2] * 3
    assert found.stopped_at.tolist() == pytest.approx([grid[14]] * 3)
    with_four = commit_sample(denoiser, 3, tol=0.1, probes=4)
    assert with_four.nfe.tolist() == [2 * 14 + 1 + 8] * 3
    last = commit_sample(denoiser, 3, times=[80, 0.4, 0.3], solver="euler", tol=1e-6)
    assert last.nfe.tolist() == [3] * 3  # a look at .4 would cost the one evaluation that it could save


def test_more_evidence_is_asked_for_early() -> None:
    """tol {1/4, 1/2, 1} by thirds: six levels near 0.1, where c = .098 (white Gaussian)."""
    times = [0.1 + 0.0001 * (8 - k) for k in range(9)]
    for tol, stop in ((0.4, 0), (0.2, 3), (0.1, 6), (0.39, 3), (0.19, 6)):
        found = commit_sample(WIDE, 2, times=times, solver="euler", tol=tol)
        assert found.stopped_at.tolist() == pytest.approx([times[stop]] * 2), tol


# ------------------------------------------------------------------------------------- extrapolation
def test_the_geometric_tail_is_near_the_truth_below_half_sigma_d() -> None:
    nodes, clean, moved, end = exact_trajectory()
    left = tail(moved[1:], moved[:-1])
    below = [k for k, t in enumerate(nodes) if 0.01 < t < SIGMA_D / 2]
    assert len(below) >= 3
    for k in below:
        assert 0.5 < float(left[k - 2]) / abs(float(clean[k]) - end) < 5, nodes[k]


def test_extrapolation_stops_where_its_formula_says() -> None:
    """Recomputed from the outputs of a chain that runs to its end."""
    tol, nodes, law = 0.05, 18, Mixture()
    x = Streams(0).normal("sample/latent", torch.arange(64), (1,), torch.float64) * T
    grid, clean = karras_grid(nodes), list[Tensor]()
    for t, t_next in itertools.pairwise(grid):
        clean.append(law.denoise(x, t))
        x = x + (t_next - t) * (x - clean[-1]) / t
    want = torch.zeros(64, dtype=torch.float64)
    for k in range(nodes - 2, 1, -1):
        now, before = (clean[k] - clean[k - 1]).abs(), (clean[k - 1] - clean[k - 2]).abs()
        ratio = now / before
        allowed = tol * (0.25 if k < 6 else 0.5 if k < 12 else 1.0)
        stops = (ratio < 1) & (now * ratio / (1 - ratio) <= allowed) & torch.tensor(grid[k] < SIGMA_D)
        want = torch.where(stops.flatten(), grid[k], want)
    found = commit_sample(MIXTURE, 64, nodes=nodes, solver="euler", rule="extrapolation", tol=tol)
    assert len({*want.tolist()}) >= 3
    assert torch.equal(found.stopped_at, want)
    places = [grid.index(t) if t else nodes - 1 for t in want.tolist()]
    assert found.nfe.tolist() == [k + 1 for k in places]
    chosen = torch.stack([clean[k][i] for i, k in enumerate(places)])
    torch.testing.assert_close(found.samples, chosen, rtol=1e-9, atol=1e-9)


def test_extrapolation_costs_less_and_keeps_to_its_tolerance() -> None:
    full = commit_sample(MIXTURE, 500, nodes=36, tol=0)
    for tol in (0.01, 0.03):
        found = commit_sample(MIXTURE, 500, nodes=36, rule="extrapolation", tol=tol)
        assert float(found.nfe.double().mean()) < 0.95 * 71
        assert rms(found.samples, full.samples) < 2 * tol


# ----------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"solver": "consistency"}, "fresh noise .* never settle"),
        ({"solver": "churn"}, "fresh noise .* never settle"),
        ({"solver": "hen"}, "There is no deterministic chain 'hen'. Did you mean 'heun'"),
        ({"rule": "confidance"}, "Did you mean 'confidence'"),
        ({"tol": -0.1}, "at least 0. Got: -0.1"),
        ({"tol": math.nan}, "at least 0. Got: nan"),
        ({"tol": math.inf}, "at least 0. Got: inf"),
        ({"probes": 0}, "at least 1 probe"),
        ({"solver": "multistep"}, "few-step model is the end of a trajectory, .* extrapolation"),
        ({"times": [80, 0.5, 0.0]}, "times cannot be used"),
        ({"times": [0.5, 80]}, "times cannot be used"),
        ({"nodes": 0}, "at least 1"),
        ({"cond": torch.zeros(2, dtype=torch.long)}, "unconditional"),
    ],
)
def test_what_cannot_be_committed_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        commit_sample(MIXTURE, 2, **settings)


# -------------------------------------------------------------------------------------------- curve
def test_the_curve_says_what_each_tolerance_costs_and_gives(tmp_path: Path) -> None:
    size = 3
    law = Gaussian.white(LAM, size)
    denoiser = as_denoiser(law.denoise, size)
    net = open_features("pixels", reference=torch.arange(2.0 * size).reshape(2, size))
    stats = Stats(law.mean, LAM * torch.eye(size, dtype=torch.float64), 10_000)
    rows = commit_curve(denoiser, net, stats, tolerances=(0.02, 0.3), samples=300, nodes=36, seed=4, replicates=20)
    assert [(row["rule"], row["tol"]) for row in rows] == [(FULL, 0.0), *itertools.product(RULES, (0.02, 0.3))]
    name = "FD-Pixels-300"
    full = ode_sample(denoiser, 300, steps=36, seed=4)
    for row in rows:
        found = commit_sample(
            denoiser, 300, nodes=36, rule=row["rule"] if row["tol"] else RULES[0], tol=row["tol"], seed=4
        )
        assert row["rms_to_full"] == pytest.approx(rms(found.samples, full), abs=1e-12)
        assert row["mean_nfe"] == pytest.approx(float(found.nfe.double().mean()))
        assert row["nfe_quantiles"]["max"] == float(found.nfe.max())
        assert row["nfe_quantiles"]["median"] == float(np.median(found.nfe))
        want = frechet_distance(stats, gaussian_stats(features_of(net, found.samples.float())))
        assert row["metrics"] == {name: pytest.approx(want, rel=1e-9)}
        low, high = row["intervals"][name]
        assert low < want < high
    assert rows[0]["mean_nfe"] == 71
    assert rows[0]["rms_to_full"] == 0
    assert rows[0]["change"][name] == [0.0, 0.0]
    low, high = rows[1]["change"][name]
    wide = rows[1]["intervals"][name]
    assert 0 < high - low < 0.2 * (wide[1] - wide[0])
    assert (low + high) / 2 == pytest.approx(rows[1]["metrics"][name] - rows[0]["metrics"][name], rel=1e-9)
    assert rows[2]["rms_to_full"] > 5 * rows[1]["rms_to_full"] > 0

    commit_curve_png(tmp_path / "curve.png", rows)
    picture = np.asarray(Image.open(tmp_path / "curve.png").convert("RGB")).astype(int)
    for colour in ((0x52, 0x60, 0x6D), (0xC2, 0x41, 0x0C), (0x25, 0x63, 0xEB)):
        assert int((np.abs(picture - colour).max(-1) < 12).sum()) > 20, colour
    with pytest.raises(DataError, match="nothing to draw"):
        commit_curve_png(tmp_path / "none.png", rows, "KID")
    for wrong in ({"rules": ("delta",)}, {"tolerances": (0.0,)}, {"samples": 1}):
        with pytest.raises(ConfigError):
            commit_curve(denoiser, net, stats, **wrong)


def test_plain_stays_the_oracles_backbone() -> None:
    """The chain is fed the state in the network's own precision."""
    single = Plain(lambda x, t: WHITE.denoise(x, t).to(x.dtype)).float()
    seen = list[torch.dtype]()
    inner = single.function
    single.function = lambda x, t: (seen.append(x.dtype), inner(x, t))[1]
    parametrization = Parametrization("x0", sigma_data=SIGMA_D, time="native")
    denoiser = Denoiser(single, EDM(), parametrization, sample_shape=(1,))
    found = commit_sample(denoiser, 50, tol=0.05)
    assert {*seen} == {torch.float32}
    exact = commit_sample(as_denoiser(WHITE.denoise), 50, tol=0.05)
    assert found.samples.dtype == torch.float32
    torch.testing.assert_close(found.samples.double(), exact.samples, rtol=1e-3, atol=1e-3)
    assert torch.equal(found.stopped_at, exact.stopped_at)
