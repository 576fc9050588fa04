"""How much every number moves when only the seed changes."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any


def over_seeds(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Results of :func:`fewstep.evaluate` at several seeds as one: every number becomes its mean over the seeds.

    Each row gains ``"seeds": {name: {"mean", "std", "min", "max", "values"}}``, with the standard deviation
    Σ (v - mean)²/(k - 1) of k seeds. Its intervals are the mean of those of the seeds, of one draw each: 1.96 std is
    what their half-width estimates. The best of several seeds is reported as "min" and never alone (math.md 6.2 g).
    """
    first = dict(runs[0])
    first["rows"] = [_merged([run["rows"][i] for run in runs]) for i in range(len(first["rows"]))]
    first["seeds"] = [run["seed"] for run in runs]
    return first


def _merged(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    spread = {name: _summary([row["metrics"][name] for row in rows]) for name in rows[0]["metrics"]}
    return dict(rows[0]) | {
        "metrics": {name: found["mean"] for name, found in spread.items()},
        "intervals": _mean_intervals([row["intervals"] for row in rows]),
        "seeds": spread,
    }


def _mean_intervals(intervals: Sequence[dict[str, list[float]]]) -> dict[str, list[float]]:
    """Ends meant over the seeds, of the numbers that have an interval at every seed."""
    shared = [name for name in intervals[0] if all(name in found for found in intervals)]
    return {name: [statistics.fmean(found[name][end] for found in intervals) for end in (0, 1)] for name in shared}


def _summary(values: list[float]) -> dict[str, Any]:
    return {
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else 0.0,
        "min": min(values),
        "max": max(values),
        "values": values,
    }
