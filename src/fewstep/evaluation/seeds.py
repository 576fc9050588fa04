"""How much every number moves when only the seed changes."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any


def over_seeds(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Results of :func:`fewstep.evaluate` at several seeds as one: every number becomes its mean over the seeds.

    Each row gains ``"seeds": {name: {"mean", "std", "min", "max", "values"}}``, with the standard deviation
    Σ (v - mean)²/(k - 1) of k seeds; its intervals stay those of the first seed, for comparison: mean ± 1.96 std is
    what they estimate. The best of several seeds is reported as "min" and never alone (math.md 6.2 g).
    """
    first = dict(runs[0])
    first["rows"] = [_merged([run["rows"][i] for run in runs]) for i in range(len(first["rows"]))]
    first["seeds"] = [run["seed"] for run in runs]
    return first


def _merged(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    spread = {name: _summary([row["metrics"][name] for row in rows]) for name in rows[0]["metrics"]}
    return dict(rows[0]) | {"metrics": {name: found["mean"] for name, found in spread.items()}, "seeds": spread}


def _summary(values: list[float]) -> dict[str, Any]:
    return {
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else 0.0,
        "min": min(values),
        "max": max(values),
        "values": values,
    }
