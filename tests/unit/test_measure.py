"""The registry of metrics: values of the plain functions, spreads of fresh sets, no order, clear refusals."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

import fewstep.evaluation.measure as module
from fewstep.errors import ConfigError, DataError
from fewstep.evaluation import metrics
from fewstep.evaluation.extrapolation import expected_bias, fd_infinity
from fewstep.evaluation.feature_net import FeatureNet
from fewstep.evaluation.manifold import memorised, neighbourhood
from fewstep.evaluation.measure import METRICS, NEEDS, Fake, Real, available, measure, metric_name, too_few
from fewstep.evaluation.scores import class_agreement, inception_score

CLASSES = 3


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def classes(n: int, seed: int) -> Tensor:
    return torch.randint(CLASSES, (n,), generator=torch.Generator().manual_seed(seed))


def reference(n: int = 200, d: int = 4, seed: int = 1) -> Real:
    labels = classes(n, seed)
    rows = (normal(n, d, seed=seed) + 2 * labels[:, None]).float()
    return Real(metrics.gaussian_stats(rows), rows, labels)


def samples(n: int = 150, d: int = 4, seed: int = 2, scale: float = 1.2) -> Fake:
    labels = classes(n, seed)
    rows = (scale * normal(n, d, seed=seed) + 2 * labels[:, None]).float()
    return Fake(metrics.gaussian_stats(rows), rows, labels, normal(n, 5, seed=seed).float())


def shuffled(values: Tensor | None, order: Tensor) -> Tensor:
    assert values is not None
    return values[order]


def test_every_metric_has_the_value_of_its_plain_function() -> None:
    real, fake = reference(150), samples()  # as many rows on both sides: none is left out
    assert real.rows is not None and real.labels is not None and fake.labels is not None and fake.logits is not None
    found = measure(list(METRICS), real, fake, replicates=4, seed=3)
    near = neighbourhood(real.rows, fake.rows, replicates=0)
    expected = {
        "fd": metrics.frechet_distance(real.stats, fake.stats),
        "fd_inf": fd_infinity(real.stats, fake.rows, seed=3),
        "kid": metrics.kid(real.rows, fake.rows, seed=3)[0],
        "sw2": metrics.sliced_wasserstein(real.rows, fake.rows, seed=3),
        **{name: near[name].value for name in ("precision", "recall", "density", "coverage")},
        "memorised": memorised(real.rows, fake.rows, replicates=0).value,
        "is": inception_score(fake.logits, replicates=0, seed=3).value,
        "class": class_agreement(real.rows, real.labels, fake.rows, fake.labels, replicates=0, seed=3).value,
    }
    assert list(found) == list(METRICS) == list(expected)
    ordered = {"is"}  # computed on splits of the ordered rows; the order itself is tested below
    for name in expected.keys() - ordered:
        assert found[name].value == pytest.approx(expected[name], rel=1e-9, abs=1e-12), name
    assert found["is"].value == pytest.approx(expected["is"], rel=0.3)
    assert all(found[name].spread > 0 for name in found.keys() - {"memorised"})


def test_neither_values_nor_spreads_depend_on_the_order_of_the_rows() -> None:
    real, fake = reference(), samples()
    a, b = torch.randperm(200, generator=torch.manual_seed(5)), torch.randperm(150, generator=torch.manual_seed(6))
    other_real = Real(real.stats, shuffled(real.rows, a), shuffled(real.labels, a))
    other_rows = fake.rows[b]
    other = Fake(metrics.gaussian_stats(other_rows), other_rows, shuffled(fake.labels, b), shuffled(fake.logits, b))
    one, two = (measure(list(METRICS), *sides, replicates=6, seed=4) for sides in ((real, fake), (other_real, other)))
    for name in METRICS:
        assert two[name].value == pytest.approx(one[name].value, rel=1e-9, abs=1e-9), name
        assert two[name].spread == pytest.approx(one[name].spread, rel=1e-9, abs=1e-9), name


def test_large_sets_are_thinned_independently_of_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_ROWS", 60)
    seen: list[tuple[int, int]] = []
    plain = module.neighbourhood

    def watched(real: Tensor, fake: Tensor, **options: int) -> dict[str, module.Estimate]:
        seen.append((len(real), len(fake)))
        return plain(real, fake, replicates=options["replicates"], seed=options["seed"])

    monkeypatch.setattr(module, "neighbourhood", watched)
    real, fake = reference(), samples()
    order = torch.randperm(150, generator=torch.manual_seed(7))
    mixed = replace(fake, rows=fake.rows[order], labels=shuffled(fake.labels, order))
    names = ["precision", "coverage", "memorised", "class"]
    one, two = (measure(names, real, f, replicates=4) for f in (fake, mixed))
    assert one == two
    assert one["class"].value > 0.7  # labels stay with their rows: 1/3 where they do not
    assert seen == [(60, 60), (60, 60)]  # once for both of its metrics, per call
    measure(names, real, samples(n=40), replicates=4)
    assert seen[2:] == [(40, 40)]  # as many reference rows as samples


def test_the_root_of_the_reference_is_factored_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, plain = [], metrics._root
    monkeypatch.setattr(metrics, "_root", lambda cov: calls.append(1) or plain(cov))
    real = reference()
    for seed in (3, 4, 5):
        measure(["fd", "fd_inf"], real, samples(seed=seed), replicates=3)
    assert len(calls) == 1


@pytest.mark.parametrize(("scale", "narrow", "wide"), [(2.0, 0.8, 1.25), (1.0, 0.9, 1.9)], ids=["far", "near"])
def test_spread_of_fd_is_that_of_fresh_sets(scale: float, narrow: float, wide: float) -> None:
    """Far from the data; for a perfect model the distance is quadratic in its error: up to √3 too wide."""
    real = reference(400, 3)
    sets = [samples(200, 3, seed=500 + i, scale=scale) for i in range(200)]
    true = float(np.std([metrics.frechet_distance(real.stats, fake.stats) for fake in sets]))
    got = float(np.mean([measure(["fd"], real, fake, replicates=40)["fd"].spread for fake in sets[:10]]))
    assert narrow * true < got < wide * true


def test_spread_of_fd_of_a_part_of_the_rows_is_scaled_to_all() -> None:
    real, fake = reference(), samples(1600)
    part = Fake(fake.stats, fake.rows[:400])
    few = Fake(metrics.gaussian_stats(fake.rows[:400]), fake.rows[:400])
    got, whole = (measure(["fd"], real, f, replicates=30)["fd"] for f in (part, few))
    assert got.spread == pytest.approx(whole.spread / 2, rel=1e-9)
    assert got.value == pytest.approx(metrics.frechet_distance(real.stats, fake.stats), rel=1e-9)


def test_kid_has_the_noise_of_its_subsets_in_its_spread() -> None:
    real, fake = reference(), samples()
    assert real.rows is not None
    rows, others = real.in_order.rows, fake.in_order.rows
    assert rows is not None
    all_pairs = metrics.mmd2_spread(rows, others, replicates=20, seed=1)
    one = METRICS["kid"].measure(real.in_order, fake.in_order, 20, 1)
    std = metrics.kid(rows, others, seed=1)[1]
    assert one.spread == pytest.approx(math.hypot(all_pairs, std / 10), rel=1e-12) and std > 0


def test_wide_features_get_few_replicates(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    plain = module.half_samples
    monkeypatch.setattr(module, "half_samples", lambda n, r, seed: asked.append(r) or plain(n, r, seed))
    for d in (512, 513):
        rows = normal(16, d, seed=d).float()
        side = metrics.gaussian_stats(rows)
        measure(["fd"], Real(side), Fake(side, rows), replicates=50)
    assert asked == [50, 10]


def test_without_replicates_or_with_few_samples_no_spread_is_claimed() -> None:
    names = ["fd", "kid", "sw2", "precision", "memorised", "is", "class"]
    found = [measure(names, reference(), samples(150), replicates=0), measure(names, reference(), samples(8))]
    assert [e.spread for estimates in found for e in estimates.values()] == [0.0] * 14


# ------------------------------------------------------------------------------------------ needs
def test_what_applies_to_a_reference_of_statistics_only() -> None:
    real, fake = reference(), samples()
    assert available(None, real, fake) == list(METRICS)
    bare = Real(real.stats)
    assert available(None, bare, fake) == ["fd", "fd_inf", "is"]
    assert available(None, bare, replace(fake, logits=None)) == ["fd", "fd_inf"]
    assert available(None, bare, samples(31, 4)) == ["fd", "is"]
    assert available(["recall", "class"], replace(real, labels=None), fake) == ["recall"]
    with pytest.raises(ConfigError, match=r"no metric 'recal'\. Did you mean 'recall'"):
        available(["recal"], real, fake)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("kid", r"'kid' compares samples one by one, .* statistics only\. Give the reference as images"),
        ("precision", r"'precision' compares samples one by one"),
        ("class", r"'class' compares the class asked for .* one side has no labels\. Use a conditional model"),
        ("is", r"'is' needs class scores, and this feature net has none\. Use a net that classifies"),
        ("memorised", r"'memorised' looks for copies among all reference images"),
        ("fd_inf", r"'fd_inf' extrapolates .* Got: 20 samples of 4 features\. Generate at least 4 \(d \+ 1\)"),
        ("fid", r"There is no metric 'fid'\. Did you mean"),
    ],
)
def test_a_metric_without_what_it_needs_is_refused(name: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        measure([name], Real(reference().stats), replace(samples(20), labels=None, logits=None))


def test_memorisation_wants_every_row() -> None:
    real = reference()
    assert real.rows is not None
    part = replace(real, rows=real.rows[::2], labels=None)
    assert "memorised" not in available(None, part, samples())
    with pytest.raises(ConfigError, match=r"'memorised' looks for copies"):
        measure(["memorised"], part, samples())


def test_needs_are_known_and_labels_differ() -> None:
    assert {need for m in METRICS.values() for need in m.needs} == set(NEEDS)
    assert len({m.label for m in METRICS.values()}) == len(METRICS) == 11
    down = [name for name, m in METRICS.items() if not m.higher_is_better]
    assert down == ["fd", "fd_inf", "kid", "sw2", "memorised"]


# -------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize("name", [n for n in METRICS if n != "is"])
def test_features_that_are_not_finite_are_named(name: str) -> None:
    fake = samples()
    fake.rows[7, 1] = math.nan
    with pytest.raises(DataError, match=r"not finite\. Got: NaN or infinity in 1 of 150 rows"):
        measure([name], reference(), fake)


def test_constant_images_are_far_from_the_data_and_cover_nothing() -> None:
    real, flat = reference(), torch.full((100, 4), 0.5)
    names = ["fd", "fd_inf", "kid", "sw2", "precision", "recall", "density", "coverage"]
    found = measure(names, real, Fake(metrics.gaussian_stats(flat), flat), replicates=4)
    exact = float((real.stats.mean - 0.5).square().sum() + real.stats.cov.trace())
    assert found["fd"].value == pytest.approx(exact, rel=1e-9)
    assert found["fd_inf"].value == pytest.approx(exact, rel=1e-9)
    assert found["fd"].spread == pytest.approx(0, abs=1e-9)
    assert found["kid"].value > 1 and found["sw2"].value > 1
    assert found["recall"].value == 0 and found["coverage"].value <= 0.1


def test_labels_of_another_number_are_refused() -> None:
    real, fake = reference(), samples()
    with pytest.raises(DataError, match=r"differ in number\. Got: 150 rows, 149 labels"):
        measure(["fd"], real, replace(fake, labels=classes(149, 0)))


def white(d: int) -> metrics.Stats:
    return metrics.Stats(torch.zeros(d, dtype=torch.float64), torch.eye(d, dtype=torch.float64), 10**6)


def test_too_few_samples_are_explained_with_the_bias() -> None:
    assert too_few(640, white(64)) is None
    few = too_few(500, white(64))
    law = 64 / 500 + 64 * 65 / (4 * 499)
    assert few is not None and f"FD of about {law:.3g} " in few and few.count(". ") == 0
    short = too_few(1500, white(2048))
    assert short is not None and "rank of at most 1,499" in short and "above about 701 " in short
    assert too_few(0, white(5)) is not None and too_few(1, white(1)) is not None


@pytest.mark.parametrize(("n", "d", "power"), [(500, 64, 0.0), (500, 64, 1.5), (64, 64, 0.0), (32, 64, 0.0)])
def test_the_explained_bias_is_about_true(n: int, d: int, power: float) -> None:
    """A perfect model on variances 1/i^power: within a tenth of the law at n >> d, above it without full rank."""
    spectrum = torch.arange(1, d + 1, dtype=torch.float64) ** -power
    exact = metrics.Stats(torch.zeros(d, dtype=torch.float64), torch.diag(spectrum), 10**6)
    draws = (metrics.gaussian_stats(normal(n, d, seed=i) * spectrum.sqrt()) for i in range(20))
    score = float(np.mean([metrics.frechet_distance(draw, exact) for draw in draws]))
    if n > d:
        assert score == pytest.approx(expected_bias(exact, n), rel=0.1)
    else:
        assert expected_bias(exact, n) < score < 2 * d
    if power == 0:
        assert expected_bias(exact, n) == pytest.approx(d / n + d * (d + 1) / (4 * (n - 1)), rel=1e-12)


# --- Names ------------------------------------------------------------------------------------------------


def net(name: str, *, verified: bool = False) -> FeatureNet:
    return FeatureNet(name, 2, "0" * 64, lambda x: x, verified=verified)


def test_numbers_are_named_after_the_net_and_the_count() -> None:
    assert metric_name("fd", net("MNIST-CNN"), 5000) == "FD-MNIST-CNN-5k"
    assert metric_name("fd", net("PCA2"), 50_000, whole_training_set=True) == "FD-PCA2-50k"
    assert metric_name("kid", net("Pixels"), 1234) == "KID-Pixels-1234"
    assert metric_name("class", net("Pixels"), 500) == "ClassAgreement-Pixels-500"
    with pytest.raises(ConfigError, match=r"There is no metric 'fid'\. Did you mean 'fd'\?"):
        metric_name("fid", net("Pixels"), 5000)


def test_fid_50k_is_said_of_one_thing_only() -> None:
    inception = net("Inception", verified=True)
    assert metric_name("fd", inception, 50_000, whole_training_set=True) == "FID-50k"
    assert metric_name("fd", inception, 50_000) == "FD-Inception-50k"
    assert metric_name("fd", inception, 10_000, whole_training_set=True) == "FD-Inception-10k"
    assert metric_name("kid", inception, 50_000, whole_training_set=True) == "KID-Inception-50k"
    assert metric_name("fd", net("Inception-1234abcd"), 50_000, whole_training_set=True) == "FD-Inception-1234abcd-50k"


# --- Intervals --------------------------------------------------------------------------------------------


def test_intervals_stay_within_what_is_possible() -> None:
    share, distance, free = METRICS["recall"], METRICS["fd"], METRICS["kid"]
    assert share.interval(module.Estimate(0.99, 0.01), 100) == (pytest.approx(0.9704), 1.0)
    assert distance.interval(module.Estimate(0.1, 0.1), 100) == (0.0, pytest.approx(0.296))
    assert free.interval(module.Estimate(0.1, 0.1), 100) == (pytest.approx(-0.096), pytest.approx(0.296))


def test_a_share_of_nothing_or_all_has_the_rule_of_three() -> None:
    memorised = METRICS["memorised"]
    assert memorised.interval(module.Estimate(0.0), 300) == (0.0, pytest.approx(0.01))
    assert memorised.interval(module.Estimate(1.0), 300) == (pytest.approx(0.99), 1.0)
    assert memorised.interval(module.Estimate(0.0), 2) == (0.0, 1.0)
    assert memorised.interval(module.Estimate(0.5), 300) is None  # not estimated
    assert METRICS["fd"].interval(module.Estimate(0.0), 300) is None
