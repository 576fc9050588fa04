"""The registry of metrics: what each needs, and every number with its spread at this sample size."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import overload

from torch import Tensor

from fewstep.errors import ConfigError, DataError, nearest
from fewstep.evaluation.bootstrap import Estimate, evenly, half_samples, row_order, spread_of
from fewstep.evaluation.extrapolation import expected_bias, fd_infinity, fd_infinity_least, fd_infinity_spread
from fewstep.evaluation.features import FeatureNet, is_fid_net
from fewstep.evaluation.manifold import memorised, neighbourhood
from fewstep.evaluation.metrics import (
    FrechetReference,
    Stats,
    kid,
    mmd2_spread,
    sliced_wasserstein_estimate,
)
from fewstep.evaluation.scores import class_agreement, inception_score

MOST_ROWS = 10_000
"""Rows per side of the metrics that compare every sample with every other."""
LEAST_FOR_SPREAD = 12
"""Below so many samples a half is too small for the neighbourhood metrics, and no spread is estimated."""
WIDE, WIDE_REPLICATES = 512, 10
"""From more than so many features on, a Fréchet spread is taken from so few halves (each is an eigenvalue problem of
seconds at 2,048): it is itself known to 1/√18 = 24 %."""


@dataclass(frozen=True)
class Real:
    """The reference, seen through a feature net.

    Args:
        stats: mean and covariance of all of it.
        rows: features ``[m, d]`` of evenly spaced rows; None for EDM-style statistics.
        labels: classes of those rows, int64 ``[m]``.
    """

    stats: Stats
    rows: Tensor | None = None
    labels: Tensor | None = None

    @cached_property
    def frechet(self) -> FrechetReference:
        """The root of the covariance, factored at the first use and kept for all later step counts."""
        return FrechetReference(self.stats)

    @cached_property
    def in_order(self) -> Real:
        """The same with the rows in :func:`row_order`, kept for all later step counts."""
        if self.rows is None:
            return self
        order = row_order(self.rows)
        return replace(self, rows=_taken(self.rows, order), labels=_taken(self.labels, order))


@dataclass(frozen=True)
class Fake:
    """Generated samples, seen through the same net.

    Args:
        stats: mean and covariance of all of them.
        rows: features ``[n, d]``: of all, or of evenly spaced ones where all are too large to hold.
        labels: the classes asked for, int64 ``[n]``.
        logits: class scores ``[n, classes]``, from a net that has them.
    """

    stats: Stats
    rows: Tensor
    labels: Tensor | None = None
    logits: Tensor | None = None

    @property
    def in_order(self) -> Fake:
        """The same with rows (and labels), and logits, in :func:`row_order`."""
        order = row_order(self.rows)
        logits = None if self.logits is None else _taken(self.logits, row_order(self.logits))
        return replace(self, rows=_taken(self.rows, order), labels=_taken(self.labels, order), logits=logits)


@dataclass(frozen=True)
class Metric:
    """One metric.

    Args:
        label: as it stands in the names of numbers ("FD").
        higher_is_better: which way it points.
        needs: names of :data:`NEEDS`.
        measure: (real, fake, replicates, seed) -> the estimate.
        least, most: between which every value lies.
    """

    label: str
    higher_is_better: bool
    needs: frozenset[str]
    measure: Callable[[Real, Fake, int, int], Estimate]
    least: float = -math.inf
    most: float = math.inf

    def interval(self, estimate: Estimate, count: int) -> tuple[float, float] | None:
        """The 95 % interval of a number that saw ``count`` samples, within what is possible; None if not estimated.

        A share of exactly 0 or 1 has no spread; its interval is the rule of three, 3/count wide (Hanley 1983).
        """
        if estimate.spread > 0:
            return max(estimate.low, self.least), min(estimate.high, self.most)
        if (self.least, self.most) != (0.0, 1.0) or estimate.value not in (0.0, 1.0):
            return None
        width = min(3 / count, 1.0)
        return (0.0, width) if estimate.value == 0 else (1 - width, 1.0)


@dataclass(frozen=True)
class Need:
    """What a metric may need: whether it is there, and what to say and do where it is not."""

    met: Callable[[Real, Fake], bool]
    what: str
    do: str


def measure(
    names: Sequence[str], real: Real, fake: Fake, *, replicates: int = 50, seed: int = 0
) -> dict[str, Estimate]:
    """The named metrics, in the order named; the order of the rows on either side does not matter.

    The spread is the half-sample bootstrap's (:mod:`fewstep.evaluation.bootstrap`) over the generated samples; the
    reference is fixed, except for "kid", whose subsets vary on both sides. Metrics of pairs (precision, recall,
    density, coverage, class; the fakes of memorised) see at most :data:`MOST_ROWS` evenly spaced rows per side, and the
    first four at most as many reference rows as samples.

    Args:
        names: of :data:`METRICS`.
        replicates: halves; 0 (and fewer than :data:`LEAST_FOR_SPREAD` samples) leaves every spread 0.0.
        seed: of the random halves, subsets and directions.

    Raises:
        ConfigError: an unknown metric, or one whose needs are not met.
        DataError: too few samples, features that are not finite, or labels of another number than rows.
    """
    for name in names:
        refuse(name, real, fake)
    for rows, labels in ((real.rows, real.labels), (fake.rows, fake.labels)):
        if rows is not None and labels is not None and len(rows) != len(labels):
            raise DataError("Features and labels differ in number", got=f"{len(rows)} rows, {len(labels)} labels")
    real, fake = real.in_order, fake.in_order
    replicates = replicates if len(fake.rows) >= LEAST_FOR_SPREAD else 0
    shared: dict[str, Estimate] = {}
    if set(names) & NEIGHBOURHOOD:
        shared = _neighbourhood(real, fake, replicates, seed)
    return {name: shared.get(name) or METRICS[name].measure(real, fake, replicates, seed) for name in names}


def available(names: Sequence[str] | None, real: Real, fake: Fake) -> list[str]:
    """Those of ``names`` (None: of all metrics) whose needs are met.

    Raises:
        ConfigError: an unknown metric.
    """
    return [n for n in (METRICS if names is None else names) if not _missing(n, real, fake)]


def too_few(n: int, real: Stats) -> str | None:
    """One sentence on the bias of the Fréchet distance where ``n`` samples are few for the features, or None.

    Few is n < 10 d. The sentence quotes :func:`expected_bias`: what a perfect model scores against this reference, to
    first order in d/n; at n <= d the covariance has no full rank and it scores more.
    """
    dim = len(real.mean)
    if n >= 10 * dim:
        return None
    advice = "compare FD at equal sample counts only, or use KID, which has no bias"
    bias = f"{expected_bias(real, n):.3g}" if n > 1 else "nothing known"
    if n <= dim:
        return (
            f"The covariance of {n:,} samples of {dim:,} features has a rank of at most {max(n - 1, 0):,}: even a "
            f"perfect model would score an FD above about {bias} against this reference; {advice}."
        )
    return (
        f"{n:,} samples are few for {dim:,} features: even a perfect model would score an FD of about {bias} "
        f"against this reference; {advice}."
    )


def metric_name(metric: str, net: FeatureNet, count: int, *, whole_training_set: bool = False) -> str:
    """The full name of a number: metric, feature net, samples, as in ``FD-MNIST-CNN-5k`` and ``KID-Pixels-1234``.

    "FID-50k" is said of the published Inception weights, 50,000 samples and the whole training set alone.

    Raises:
        ConfigError: no such metric.
    """
    if metric not in METRICS:
        raise ConfigError(f"There is no metric '{metric}'", do=nearest(metric, METRICS))
    if metric == "fd" and count == 50_000 and is_fid_net(net) and whole_training_set:
        return "FID-50k"
    short = f"{count // 1000}k" if count >= 1000 and count % 1000 == 0 else str(count)
    return f"{METRICS[metric].label}-{net.name}-{short}"


# ------------------------------------------------------------------------------------- what is needed
def _has_rows(real: Real, fake: Fake) -> bool:
    return real.rows is not None


def _has_every_row(real: Real, fake: Fake) -> bool:
    return real.rows is not None and len(real.rows) >= real.stats.count


def _has_labels(real: Real, fake: Fake) -> bool:
    return real.labels is not None and fake.labels is not None


def _has_logits(real: Real, fake: Fake) -> bool:
    return fake.logits is not None


def _has_many(real: Real, fake: Fake) -> bool:
    return len(fake.rows) >= fd_infinity_least(fake.rows.shape[1])


NEEDS: dict[str, Need] = {
    "rows": Need(
        _has_rows,
        "compares samples one by one, and this reference holds statistics only",
        "Give the reference as images, or ask for fd and fd_inf only",
    ),
    "every row": Need(
        _has_every_row,
        "looks for copies among all reference images, and not all of their features are held",
        "Keep the features of every reference image, or leave it out",
    ),
    "labels": Need(
        _has_labels,
        "compares the class asked for with the class seen, and one side has no labels",
        "Use a conditional model and a reference with labels, or leave it out",
    ),
    "logits": Need(
        _has_logits,
        "needs class scores, and this feature net has none",
        "Use a net that classifies, such as inception, or leave it out",
    ),
    "many": Need(
        _has_many,
        "extrapolates over subsets down to a quarter, which are too small for so many features",
        "Generate at least 4 (d + 1) and 32 samples for d features, or ask for fd or kid",
    ),
}


def _missing(name: str, real: Real, fake: Fake) -> list[Need]:
    if name not in METRICS:
        raise ConfigError(f"There is no metric '{name}'", do=nearest(name, METRICS))
    return [NEEDS[need] for need in sorted(METRICS[name].needs) if not NEEDS[need].met(real, fake)]


def refuse(name: str, real: Real, fake: Fake) -> None:
    """Raise ConfigError if the metric does not exist or lacks something that it needs."""
    for need in _missing(name, real, fake)[:1]:
        got = f"{len(fake.rows)} samples of {fake.rows.shape[1]} features" if need is NEEDS["many"] else None
        raise ConfigError(f"The metric '{name}' {need.what}", got=got, do=need.do)


# ---------------------------------------------------------------------------------------- the metrics
def fd_estimate(real: Real, fake: Fake, replicates: int, seed: int) -> Estimate:
    """Fréchet distance of all samples; spread over halves of the rows, · √(rows/samples) where rows are a part."""
    halves = half_samples(len(fake.rows), affordable(replicates, fake.rows.shape[1]), seed)
    spread = spread_of(real.frechet.distances(fake.rows, halves)) if replicates else 0.0
    share = len(fake.rows) / max(fake.stats.count, len(fake.rows))
    return Estimate(real.frechet.distance(fake.stats), spread * math.sqrt(share))


def fd_inf_estimate(real: Real, fake: Fake, replicates: int, seed: int) -> Estimate:
    """:func:`fd_infinity` of the rows, with its spread over halves."""
    value = fd_infinity(real.frechet, fake.rows, seed=seed)
    few = affordable(replicates, fake.rows.shape[1])
    return Estimate(value, fd_infinity_spread(real.frechet, fake.rows, replicates=few, seed=seed))


def kid_estimate(real: Real, fake: Fake, replicates: int, seed: int, subsets: int = 100) -> Estimate:
    """KID by the published protocol, 100 subsets of min(1000, n, m).

    The variance is that of the unbiased MMD over both sets, and std²/100 for having drawn only 100 subsets.
    """
    rows = _rows(real)
    value, std = kid(rows, fake.rows, subsets=subsets, seed=seed)
    if not replicates:
        return Estimate(value)
    return Estimate(
        value, math.hypot(mmd2_spread(rows, fake.rows, replicates=replicates, seed=seed), std / math.sqrt(subsets))
    )


def sw2_estimate(real: Real, fake: Fake, replicates: int, seed: int) -> Estimate:
    """Sliced Wasserstein distance of the rows."""
    return sliced_wasserstein_estimate(_rows(real), fake.rows, replicates=replicates, seed=seed)


def _neighbourhood(real: Real, fake: Fake, replicates: int, seed: int) -> dict[str, Estimate]:
    rows = _rows(real)
    some_fake = evenly(len(fake.rows), MOST_ROWS)
    some_real = evenly(len(rows), len(some_fake))  # as many as samples: balls of equal meaning on both sides
    return neighbourhood(_taken(rows, some_real), _taken(fake.rows, some_fake), replicates=replicates, seed=seed)


def _neighbour(name: str) -> Callable[[Real, Fake, int, int], Estimate]:
    return lambda real, fake, replicates, seed: _neighbourhood(real, fake, replicates, seed)[name]


def _memorised(real: Real, fake: Fake, replicates: int, seed: int) -> Estimate:
    some = evenly(len(fake.rows), MOST_ROWS)
    return memorised(_rows(real), _taken(fake.rows, some), replicates=replicates, seed=seed)


def _inception_score(real: Real, fake: Fake, replicates: int, seed: int) -> Estimate:
    assert fake.logits is not None  # a need
    return inception_score(fake.logits, replicates=replicates, seed=seed)


def _class_agreement(real: Real, fake: Fake, replicates: int, seed: int) -> Estimate:
    rows = _rows(real)
    assert real.labels is not None and fake.labels is not None  # needs
    some, few = evenly(len(rows), MOST_ROWS), evenly(len(fake.rows), MOST_ROWS)
    known = _taken(rows, some), _taken(real.labels, some)
    asked = _taken(fake.rows, few), _taken(fake.labels, few)
    return class_agreement(*known, *asked, replicates=replicates, seed=seed)


def affordable(replicates: int, dim: int) -> int:
    """How many halves a Fréchet spread of ``dim`` features is taken from: at most 10 above 512 features."""
    return min(replicates, WIDE_REPLICATES) if dim > WIDE else replicates


def _rows(real: Real) -> Tensor:
    assert real.rows is not None  # a need
    return real.rows


@overload
def _taken(values: Tensor, order: Tensor) -> Tensor: ...
@overload
def _taken(values: None, order: Tensor) -> None: ...
def _taken(values: Tensor | None, order: Tensor) -> Tensor | None:
    return None if values is None else values[order.to(values.device)]


ROWS = frozenset({"rows"})
METRICS: dict[str, Metric] = {
    "fd": Metric("FD", False, frozenset(), fd_estimate, 0.0),
    "fd_inf": Metric("FD-inf", False, frozenset({"many"}), fd_inf_estimate),
    "kid": Metric("KID", False, ROWS, kid_estimate),
    "sw2": Metric("SW2", False, ROWS, sw2_estimate, 0.0),
    "precision": Metric("Precision", True, ROWS, _neighbour("precision"), 0.0, 1.0),
    "recall": Metric("Recall", True, ROWS, _neighbour("recall"), 0.0, 1.0),
    "density": Metric("Density", True, ROWS, _neighbour("density"), 0.0),
    "coverage": Metric("Coverage", True, ROWS, _neighbour("coverage"), 0.0, 1.0),
    "memorised": Metric("Memorised", False, frozenset({"every row"}), _memorised, 0.0, 1.0),
    "is": Metric("IS", True, frozenset({"logits"}), _inception_score, 1.0),
    "class": Metric("ClassAgreement", True, ROWS | {"labels"}, _class_agreement, 0.0, 1.0),
}
NEIGHBOURHOOD = {"precision", "recall", "density", "coverage"}
