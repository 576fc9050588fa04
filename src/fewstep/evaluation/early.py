"""What early commit costs and saves: quality against the mean number of network evaluations."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.commit import RULES, Committed, commit_sample
from fewstep.data.codec import save_grid
from fewstep.denoiser import Denoiser
from fewstep.errors import ConfigError, DataError, nearest
from fewstep.evaluation.bootstrap import Estimate, half_samples, spread_of
from fewstep.evaluation.features import FeatureNet, features_of
from fewstep.evaluation.measure import affordable, metric_name
from fewstep.evaluation.metrics import FrechetReference, Stats, gaussian_stats
from fewstep.evaluation.samples import to_host

TOLERANCES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
FULL = "full chain"
_STYLE = {FULL: ("#52606d", "o", 0), "confidence": ("#c2410c", "s", 6), "extrapolation": ("#2563eb", "^", -12)}
"""Rule -> colour, marker, and how far above its points the tolerances stand."""


def commit_curve(
    denoiser: Denoiser,
    net: FeatureNet,
    stats: Stats,
    *,
    rules: Sequence[str] = RULES,
    tolerances: Sequence[float] = TOLERANCES,
    samples: int = 2_000,
    seed: int = 0,
    nodes: int = 18,
    solver: str = "heun",
    times: Sequence[float] | None = None,
    probes: int | None = None,
    labels: Tensor | None = None,
    batch_size: int | None = None,
    replicates: int = 50,
    on_row: Callable[[dict[str, Any]], None] | None = None,
) -> list[dict[str, Any]]:
    """The full chain, then every rule at every tolerance, from the same noise: what it costs, what it gives.

    Args:
        denoiser, nodes, solver, times, probes, labels, batch_size: as in :func:`fewstep.commit.commit_sample`
            (``labels`` is its ``cond``).
        net, stats: the reference: a feature net, and the statistics of the real data's features.
        replicates: half-samples for the intervals of the distance (at most 10 above 512 features); 0 for none.
        on_row: called with each finished row.

    Returns:
        ``[{"rule", "tol", "solver", "nodes", "mean_nfe", "nfe_quantiles": {"min", "q25", "median", "q75", "max"},
        "committed": share that stopped early, "rms_to_full": root mean square distance (model units) to the full
        chain's output from the same noise, "metrics": {"FD-...": value}, "intervals": {"FD-...": [low, high]},
        "change": {"FD-...": [low, high]}}]``; the first row is the full chain. JSON-able. ``change`` is the 95 %
        interval of the difference to the full chain, over the same half-samples: the samples share their noise, so
        that it is far narrower than two intervals side by side.

    Raises:
        ConfigError: an unknown rule, a tolerance that is not positive, or as :func:`fewstep.commit.commit_sample`.
    """
    for rule in rules:
        if rule not in RULES:
            raise ConfigError(f"There is no rule '{rule}' for an early commit", do=nearest(rule, RULES))
    if samples < 2 or not all(tol > 0 for tol in tolerances):
        raise ConfigError(
            "A curve of early commits needs at least 2 samples and positive tolerances",
            got=f"{samples} samples, tolerances {list(tolerances)}",
        )

    def draw(rule: str, tol: float) -> Committed:
        return commit_sample(
            denoiser, samples, times=times, nodes=nodes, solver=solver, rule=rule, tol=tol, probes=probes, seed=seed,
            cond=labels, batch_size=batch_size,
        )  # fmt: skip

    reference, replicates = FrechetReference(stats), affordable(replicates, net.dim)
    full, rows = draw("extrapolation", 0.0), list[dict[str, Any]]()
    base: list[float] = []
    for rule, tol in [(FULL, 0.0), *((rule, tol) for rule in rules for tol in tolerances)]:
        found = full if rule == FULL else draw(rule, tol)
        distances = _distances(denoiser, found.samples, net, reference, replicates, seed)
        base = base or distances
        row = {"rule": rule, "tol": tol, "solver": solver, "nodes": len(times) if times is not None else nodes}
        row |= _cost(found) | {"rms_to_full": float((found.samples - full.samples).double().square().mean().sqrt())}
        row |= _quality(metric_name("fd", net, samples), distances, base)
        rows.append(row)
        if on_row is not None:
            on_row(row)
    return rows


def _cost(found: Committed) -> dict[str, Any]:
    nfe = found.nfe.double().cpu()
    places = {"min": 0.0, "q25": 0.25, "median": 0.5, "q75": 0.75, "max": 1.0}
    quantiles = {name: float(nfe.quantile(place)) for name, place in places.items()}
    committed = float((found.stopped_at > 0).double().mean())
    return {"mean_nfe": float(nfe.mean()), "nfe_quantiles": quantiles, "committed": committed}


def _distances(
    denoiser: Denoiser, x: Tensor, net: FeatureNet, reference: FrechetReference, replicates: int, seed: int
) -> list[float]:
    """Fréchet distances of all samples and of the half-samples; images go through uint8, as through a file."""
    features = features_of(net, to_host(denoiser, x), device=denoiser.device)
    parts = [features, *(features[half] for half in half_samples(len(x), replicates, seed))]
    return [reference.distance(gaussian_stats(part)) for part in parts]


def _quality(name: str, distances: Sequence[float], base: Sequence[float]) -> dict[str, dict[str, Any]]:
    value, change = distances[0], [a - b for a, b in zip(distances, base, strict=True)]
    row: dict[str, dict[str, Any]] = {"metrics": {name: value}, "intervals": {}, "change": {}}
    if len(distances) > 1:
        for key, values in (("intervals", distances), ("change", change)):
            found = Estimate(values[0], spread_of(values[1:]))
            row[key] = {name: [found.low, found.high]}
    return row


def commit_curve_png(path: Path, rows: Iterable[Mapping[str, Any]], metric: str | None = None) -> None:
    """Draw mean evaluations against ``metric`` (default: the first row's), one curve per rule, tolerances beside it.

    Raises:
        DataError: no row has the metric.
        StorageError: the disk refused.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = list(rows)
    metric = metric or next((name for row in rows for name in row["metrics"]), None)
    rows = [row for row in rows if metric in row["metrics"]]
    if metric is None or not rows:
        raise DataError(
            "There is nothing to draw", got=f"no row with {metric or 'a metric'}", want="rows of commit_curve"
        )
    style: Any = {"text.parse_math": False, "axes.unicode_minus": False}
    with warnings.catch_warnings(), rc_context(rc=style):
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = Figure(figsize=(5.2, 3.4), dpi=160, layout="constrained")
        axes = figure.subplots()
        for rule in dict.fromkeys(row["rule"] for row in rows):
            _draw_rule(axes, rule, [row for row in rows if row["rule"] == rule], metric)
        axes.set(xlabel="mean network evaluations per sample", ylabel=f"{metric}, lower is better")
        axes.grid(axis="y", linewidth=0.6, color="#d9dee3")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=8)
        canvas: Any = FigureCanvasAgg(figure)
        canvas.draw()
        pixels = torch.frombuffer(bytearray(canvas.buffer_rgba()), dtype=torch.uint8)
        height, width = canvas.get_width_height()[::-1]
    save_grid(path, pixels.reshape(1, height, width, 4)[..., :3].permute(0, 3, 1, 2), scale=1, pad=0)


def _draw_rule(axes: Any, rule: str, rows: Sequence[Mapping[str, Any]], metric: str) -> None:
    rows = sorted(rows, key=lambda row: row["mean_nfe"])
    nfe, values = [row["mean_nfe"] for row in rows], [row["metrics"][metric] for row in rows]
    bars = [row["intervals"].get(metric, [v, v])[1] - v for row, v in zip(rows, values, strict=True)]
    colour, marker, above = _STYLE[rule]
    axes.plot(nfe, values, color=colour, marker=marker, markersize=4, linewidth=1.5, label=rule)
    axes.errorbar(nfe, values, yerr=bars, color=colour, alpha=0.25, linestyle="none", linewidth=1)
    for row, x, y in zip(rows, nfe, values, strict=True):
        if row["tol"]:
            style = {"fontsize": 7, "ha": "center", "color": colour, "textcoords": "offset points"}
            axes.annotate(f"{row['tol']:g}", (x, y), xytext=(0, above), **style)
