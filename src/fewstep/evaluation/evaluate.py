"""The front door of the evaluation: a model, or images made elsewhere, against real data."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from fewstep.data import Source
from fewstep.denoiser import Denoiser
from fewstep.errors import ConfigError, DataError, nearest
from fewstep.evaluation.bootstrap import evenly
from fewstep.evaluation.features import FeatureNet, check_features, outputs_of
from fewstep.evaluation.measure import METRICS, MOST_ROWS, Fake, available, measure, metric_name, refuse
from fewstep.evaluation.metrics import StatsAccumulator
from fewstep.evaluation.reference import KEPT_VALUES, Reference, check_comparable, open_reference
from fewstep.evaluation.samples import (
    FILES,
    SOLVERS,
    SampleSet,
    draw_labels,
    generated,
    makes_images,
    shown_shape,
    to_host,
)
from fewstep.inference import Precision
from fewstep.overlap import Arriving, Stopwatch, ahead
from fewstep.sampling import ode_sample_nfe, possible_steps, sample
from fewstep.world import World

__all__ = [
    "DEFAULT_METRICS",
    "Reference",
    "draw_labels",
    "evaluate",
    "evaluate_samples",
    "open_reference",
    "to_host",
]

DEFAULT_METRICS = ("fd", "kid", "sw2", "precision", "recall", "density", "coverage", "memorised", "class", "is")
"""Measured where nothing else is asked for, as far as model, data and feature net allow."""

REPLICATES = 50
OnRow = Callable[[dict[str, Any]], None]
OnProgress = Callable[[str, int, int], None]
"""Called with what is being done, how many samples are done, and how many there are."""


def evaluate(
    denoiser: Denoiser,
    data: Source | Reference | str | Path,
    *,
    steps: Sequence[int] = (1, 2, 4, 8),
    solver: str = "consistency",
    metrics: Sequence[str] | None = None,
    features: str = "auto",
    samples: int = 2_000,
    seed: int = 0,
    guidance: float | None = None,
    batch_size: int | None = None,
    replicates: int = REPLICATES,
    precision: Precision = "fp32",
    compile: bool = False,
    on_row: OnRow | None = None,
    on_progress: OnProgress | None = None,
    world: World | None = None,
) -> dict[str, Any]:
    """Quality of a model at several step counts.

    Args:
        denoiser: the model.
        data: a source, its spec ("digits", a folder, a zip, an npz of images or of EDM statistics), or an
            :func:`open_reference`.
        steps: numbers of network evaluations.
        solver: "consistency" (few-step sampler) or "ode" (EDM's Heun; Euler where the count is even).
        metrics: names in METRICS, or "all" that apply; default: DEFAULT_METRICS as far as they apply.
        samples: per step count; conditional models get labels drawn from the data.
        seed: sample i of every step count starts from the same noise.
        guidance: strength, as of :func:`fewstep.sample`.
        replicates: half-samples behind each 95 % interval; 0 for none.
        precision, compile: of the sampled network, as of :func:`fewstep.sample`; features stay in fp32.
        on_row, on_progress: called with each finished row, and after each block of samples.
        world: several processes share the sampling; only the leading one measures (the others get no rows).

    Returns:
        ``{"features", "reference", "samples", "seed", "rows": [{"solver", "steps", "nfe", "times", "seed",
        "samples_per_second", "metrics": {"FD-Pixels-2k": ...}, "intervals": {"FD-Pixels-2k": [low, high]}}]}``.

    Raises:
        ConfigError: an unknown metric or solver, or fewer than two samples.
        DataError: the data has another shape than the model's samples.
    """
    if solver not in SOLVERS:
        raise ConfigError(f"There is no solver '{solver}'", do=nearest(solver, SOLVERS))
    for name in _named(metrics):
        if name not in METRICS:
            raise ConfigError(f"There is no metric '{name}'", do=nearest(name, METRICS))
    if samples < 2:
        raise ConfigError("An evaluation needs at least two samples", got=samples)
    shape, device = shown_shape(denoiser), denoiser.device
    reference = data if isinstance(data, Reference) else open_reference(data, features, like=shape, device=device)
    check_comparable(reference, shape, makes_images(denoiser))
    cond = draw_labels(denoiser, reference.source, samples, seed)
    kind = cast(Literal["consistency", "ode"], solver)
    sets = [
        generated(denoiser, samples, count, solver=kind, seed=seed, cond=cond, guidance=guidance,
                  batch_size=batch_size, precision=precision, compile=compile)
        for count in steps
    ]  # fmt: skip
    for one in sets:
        _check_needs(_named(metrics), reference, one)
    if compile:  # the whole batch: compiled code is of one shape
        next(iter(min(sets, key=lambda one: one.about["nfe"]).blocks()))
    else:
        _warm_up(denoiser, solver, min(samples, 8), seed, cond, batch_size, precision)
    return evaluate_samples(
        sets,
        reference,
        metrics=metrics,
        seed=seed,
        replicates=replicates,
        device=denoiser.device,
        on_row=on_row,
        on_progress=on_progress,
        world=world,
    )


def evaluate_samples(
    sets: Iterable[SampleSet],
    reference: Reference,
    *,
    metrics: Sequence[str] | None = None,
    seed: int = 0,
    replicates: int = REPLICATES,
    device: torch.device | str = "cpu",
    on_row: OnRow | None = None,
    on_progress: OnProgress | None = None,
    world: World | None = None,
) -> dict[str, Any]:
    """Measure sets of samples from anywhere; arguments and result as :func:`evaluate`.

    Samples pass in blocks: images are never held, features up to 128 million values.
    """
    wanted = metrics in (None, "all") or "is" in _named(metrics)
    rows: list[dict[str, Any]] = []
    count = 0
    for samples in sets:
        check_comparable(reference, samples.shape, samples.is_images)
        count = samples.count
        _check_needs(_named(metrics), reference, samples)
        fake, seconds = see(samples, reference.net, logits=wanted, device=device, on_progress=on_progress, world=world)
        if fake is None:
            continue
        made_here = samples.about["solver"] != FILES
        row = samples.about | {"samples_per_second": samples.count / max(seconds, 1e-9) if made_here else None}
        rows.append(row | numbers(fake, reference, samples.count, metrics, replicates, seed))
        if on_row is not None:
            on_row(rows[-1])
    net = reference.net
    return {
        "features": {"name": net.name, "hash": net.hash, "preprocessing": net.preprocessing},
        "reference": reference.info,
        "samples": count,
        "seed": seed,
        "rows": rows,
    }


def _named(metrics: Sequence[str] | None) -> Sequence[str]:
    """The metrics asked for by name; none where whatever applies is wanted."""
    return () if metrics is None or metrics == "all" else metrics


def _check_needs(metrics: Sequence[str], reference: Reference, samples: SampleSet) -> None:
    """Refuse a metric whose needs will not be met, before time is spent on samples."""
    net, like = reference.net, torch.zeros(1, 1)
    rows = like.expand(min(samples.count, KEPT_VALUES // net.dim), net.dim)
    logits = like.expand(len(rows), 1) if net.extract_with_logits is not None else None
    expected = Fake(reference.stats, rows, samples.labels, logits)
    for name in metrics:
        refuse(name, reference.real, expected)


def see(
    samples: SampleSet,
    net: FeatureNet,
    *,
    logits: bool = False,
    device: torch.device | str = "cpu",
    on_progress: OnProgress | None = None,
    world: World | None = None,
) -> tuple[Fake | None, float]:
    """What the metrics see of ``samples``, and the seconds that making them took; None where another process leads.

    Of several processes each makes every ``world.size``-th block. The leading one takes the features in order, so
    the numbers do not depend on how many there are. Images are never held; features up to 128 million values. A GPU
    makes the next block and its features while those of the last one are summed up here.
    """
    world = world or World(0, 1, torch.device(device))
    logits = logits and net.extract_with_logits is not None
    seen = _Seen(evenly(samples.count, KEPT_VALUES // net.dim).numpy())
    watch = Stopwatch(torch.device(device))
    own = (
        Arriving(outputs_of(net, block, logits=logits, device=device))
        for block in _timed(samples.blocks(world.rank, world.size), watch)
    )
    for outputs in itertools.chain(ahead(own), itertools.repeat(None)):
        parts = [part for part in world.gather(torch.zeros(0) if outputs is None else outputs.get()) if len(part)]
        if not parts:
            break
        for part in parts:
            check_features(net, part[:, : net.dim])
            seen.add(part[:, : net.dim], part[:, net.dim :] if logits else None)
        if on_progress is not None and world.leads:
            on_progress(samples.name, seen.count, samples.count)
    if seen.count != samples.count and world.leads:
        raise DataError("There are fewer samples than announced", got=seen.count, want=samples.count)
    return (seen.fake(samples.labels) if world.leads else None), watch.seconds()


def _timed(blocks: Iterator[Tensor], watch: Stopwatch) -> Iterator[Tensor]:
    """The same blocks; the watch runs while they are made."""
    while True:
        with watch:
            block = next(blocks, None)
        if block is None:
            return
        yield block


class _Seen:
    """Features in the order of the samples: statistics of all, rows ``kept``."""

    def __init__(self, kept: np.ndarray) -> None:
        self.count = 0
        self._kept, self._stats = kept, StatsAccumulator()
        self._rows: list[Tensor] = []
        self._logits: list[Tensor] = []

    def add(self, features: Tensor, logits: Tensor | None) -> None:
        self._stats.add(features)
        first, last = np.searchsorted(self._kept, [self.count, self.count + len(features)])
        chosen = torch.from_numpy(self._kept[first:last] - self.count)
        self._rows.append(features[chosen].float())
        if logits is not None:
            self._logits.append(logits[chosen].float())
        self.count += len(features)

    def fake(self, labels: Tensor | None) -> Fake:
        chosen = None if labels is None else labels[torch.from_numpy(self._kept)]
        return Fake(
            self._stats.stats(), torch.cat(self._rows), chosen, torch.cat(self._logits) if self._logits else None
        )


def numbers(
    fake: Fake, reference: Reference, count: int, metrics: Sequence[str] | None, replicates: int, seed: int
) -> dict[str, Any]:
    """``{"metrics": {name: value}, "intervals": {name: [low, high]}}``, in the order asked for."""
    real = reference.real
    whatever_applies = None if metrics == "all" else DEFAULT_METRICS
    whole = reference.source is not None and reference.info["split"] == "train"
    chosen = list(_named(metrics)) or [
        name for name in available(whatever_applies, real, fake) if whole or name != "memorised"
    ]  # against another split it would miss the copies of training images
    found = measure(chosen, real, fake, replicates=replicates, seed=seed)
    names = {m: metric_name(m, reference.net, count, whole_training_set=whole) for m in chosen}
    seen = min(len(fake.rows), MOST_ROWS)  # by the metrics that are shares
    spans = {names[m]: METRICS[m].interval(found[m], seen) for m in chosen if replicates}
    intervals = {name: list(span) for name, span in spans.items() if span is not None}
    return {"metrics": {names[m]: found[m].value for m in chosen}, "intervals": intervals}


def _warm_up(
    denoiser: Denoiser, solver: str, n: int, seed: int, cond: Tensor | None, batch_size: int | None,
    precision: Precision,
) -> None:  # fmt: skip
    """The first call of a network is slow: it is not part of any samples per second."""
    few = None if cond is None else cond[:n]
    if solver == "ode":
        ode_sample_nfe(denoiser, n, 1, seed=seed, cond=few, batch_size=batch_size, precision=precision)
        return
    steps = min(possible_steps(denoiser) or (1,))
    sample(denoiser, n, steps=steps, seed=seed, cond=few, batch_size=batch_size, precision=precision)
