"""Sample at several step counts and compare with real data; every number says net, count and NFE."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.data import Source, decode, open_source
from fewstep.denoiser import Denoiser
from fewstep.errors import ConfigError, DataError, nearest
from fewstep.evaluation.features import (
    METRICS,
    PCA_ROWS,
    FeatureNet,
    features_of,
    iter_features,
    metric_name,
    open_features,
)
from fewstep.evaluation.metrics import (
    Stats,
    StatsAccumulator,
    frechet_distance,
    gaussian_stats,
    kid,
    precision_recall,
    sliced_wasserstein,
)
from fewstep.randomness import Streams
from fewstep.sampling import few_step_times, ode_sample_nfe, sample

ALL_METRICS = tuple(METRICS)
READ_BLOCK = 512


@dataclass(frozen=True)
class Reference:
    """Real data seen through a feature net: statistics of all of it, features of evenly spaced rows.

    Args:
        net: the feature net.
        stats: mean and covariance of all rows (for the Fréchet distance).
        rows: features of at most as many rows as are sampled (for the other metrics), ``[m, d]``.
        source: where it comes from.
    """

    net: FeatureNet
    stats: Stats
    rows: Tensor
    source: Source


def open_reference(
    source: Source, features: str = "auto", *, samples: int, device: torch.device | str = "cpu"
) -> Reference:
    """Read the whole source once through the feature net, in constant memory.

    Args:
        features: a feature net; "auto" is "pixels" up to 256 values per sample, else "pca:64".
        samples: how many rows are kept for the metrics that compare samples one by one.
    """
    if features == "auto":
        features = "pixels" if int(np.prod(source.shape)) <= 256 else "pca:64"
    net = open_features(features, reference=source.read(_evenly(len(source), PCA_ROWS)))
    total = StatsAccumulator()
    blocks: Iterator[Tensor] = (
        source.read(np.arange(start, min(start + READ_BLOCK, len(source))))
        for start in range(0, len(source), READ_BLOCK)
    )
    for part in iter_features(net, blocks, device=device):
        total.add(part)
    rows = source.read(_evenly(len(source), max(samples, 2)))
    return Reference(net, total.stats(), features_of(net, rows, device=device), source)


def evaluate(
    denoiser: Denoiser,
    data: Source | Reference | str | Path,
    *,
    steps: Sequence[int] = (1, 2, 4, 8),
    solver: str = "consistency",
    metrics: Sequence[str] = ALL_METRICS,
    features: str = "auto",
    samples: int = 2_000,
    seed: int = 0,
    batch_size: int | None = None,
    on_row: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Quality of a model at several step counts.

    Args:
        denoiser: the model.
        data: a source, its spec ("digits", a folder, a zip, an npz), or a :func:`open_reference`.
        steps: numbers of network evaluations.
        solver: "consistency" (few-step sampler) or "ode" (EDM's Heun; Euler where the count is even).
        metrics: of "fd", "kid", "sw2", "precision", "recall".
        samples: per step count; conditional models get labels drawn from the data.
        seed: sample i of every step count starts from the same noise.
        on_row: called with each finished row.

    Returns:
        ``{"features", "reference", "samples", "seed", "rows": [{"solver", "steps", "nfe", "times",
        "samples_per_second", "metrics": {"FD-Pixels-2k": ...}}]}``; JSON-able.

    Raises:
        ConfigError: an unknown metric or solver, or fewer than two samples.
        DataError: the data has another shape than the model's samples.
    """
    for name in metrics:
        if name not in METRICS:
            raise ConfigError(f"There is no metric '{name}'", do=nearest(name, METRICS))
    if solver not in ("consistency", "ode"):
        raise ConfigError(f"There is no solver '{solver}'", do=nearest(solver, ("consistency", "ode")))
    if samples < 2:
        raise ConfigError("An evaluation needs at least two samples", got=samples)
    data = open_source(str(data)) if isinstance(data, str | Path) else data
    source = data.source if isinstance(data, Reference) else data
    if tuple(source.shape) != denoiser.sample_shape:
        raise DataError(
            "The reference data does not have the model's shape",
            got=tuple(source.shape),
            want=denoiser.sample_shape,
            do="Use --resize or --channels",
        )
    reference = (
        data if isinstance(data, Reference) else open_reference(data, features, samples=samples, device=denoiser.device)
    )
    cond = draw_labels(denoiser, reference.source, samples, seed)
    rows = []
    _generate(denoiser, solver, min(samples, 8), 1, seed, None if cond is None else cond[:8], batch_size)  # warm up
    for count in steps:
        started = time.perf_counter()
        x = _generate(denoiser, solver, samples, count, seed, cond, batch_size)
        images = to_host(denoiser, x, source.is_images)
        rate = samples / (time.perf_counter() - started)
        row = _describe(denoiser, solver, count) | {"samples_per_second": rate}
        row["metrics"] = _measure(
            metrics, reference, features_of(reference.net, images, device=denoiser.device), samples, seed
        )
        rows.append(row)
        if on_row is not None:
            on_row(row)
    return {
        "features": {"name": reference.net.name, "hash": reference.net.hash},
        "reference": {"source": source.name, "count": len(source), "fingerprint": source.fingerprint},
        "samples": samples,
        "seed": seed,
        "rows": rows,
    }


def _evenly(length: int, most: int) -> np.ndarray:
    """At most ``most`` evenly spaced row numbers: the same for the same data, whatever is measured."""
    return np.linspace(0, length - 1, min(most, length)).round().astype(np.int64)


def draw_labels(denoiser: Denoiser, source: Source, n: int, seed: int) -> Tensor | None:
    """Class indices ``[n]`` drawn from the data's labels (uniform without labels); None if unconditional."""
    if denoiser.num_classes == 0:
        return None
    index = torch.arange(n)
    if source.labels is None:
        return Streams(seed).integers("evaluation/labels", index, denoiser.num_classes).to(denoiser.device)
    picked = Streams(seed).integers("evaluation/labels", index, len(source.labels)).numpy()
    return torch.from_numpy(source.labels[picked]).to(denoiser.device)


def to_host(denoiser: Denoiser, x: Tensor, images: bool) -> Tensor:
    """Samples as uint8 images (or float points) on the CPU."""
    return (decode(x, denoiser.value_range) if images else x.float()).cpu()


def _generate(
    denoiser: Denoiser, solver: str, n: int, count: int, seed: int, cond: Tensor | None, batch_size: int | None
) -> Tensor:
    if solver == "ode":
        return ode_sample_nfe(denoiser, n, count, seed=seed, cond=cond, batch_size=batch_size)
    return sample(denoiser, n, steps=count, seed=seed, cond=cond, batch_size=batch_size)


def _describe(denoiser: Denoiser, solver: str, count: int) -> dict[str, Any]:
    times = few_step_times(denoiser, count) if solver == "consistency" else None
    return {"solver": solver, "steps": count, "nfe": count, "times": times}


def _measure(metrics: Sequence[str], reference: Reference, fake: Tensor, n: int, seed: int) -> dict[str, float]:
    """The chosen metrics, in the order chosen, under their full names."""
    real, values = reference.rows, {}
    if "fd" in metrics:
        values["fd"] = frechet_distance(reference.stats, gaussian_stats(fake))
    if "kid" in metrics:
        values["kid"] = kid(real, fake, size=min(1000, len(real), len(fake)), seed=seed)[0]
    if "sw2" in metrics:
        values["sw2"] = sliced_wasserstein(real, fake, seed=seed)
    if "precision" in metrics or "recall" in metrics:
        values["precision"], values["recall"] = precision_recall(real, fake)
    return {metric_name(m, reference.net, n): float(values[m]) for m in metrics}
