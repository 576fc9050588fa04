"""Several seeds as one result, and what an interval of a share is of."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from fewstep.data.sources import ArraySource
from fewstep.evaluation import evaluate_samples
from fewstep.evaluation.reference import open_reference
from fewstep.evaluation.samples import from_source
from fewstep.evaluation.seeds import over_seeds


def run(seed: int, value: float, interval: list[float] | None) -> dict[str, Any]:
    """A result of one seed."""
    return {
        "seed": seed,
        "rows": [{"metrics": {"FD": value}, "intervals": {} if interval is None else {"FD": interval}}],
    }


def test_intervals_over_seeds_stand_around_the_mean() -> None:
    (row,) = over_seeds([run(0, 1.0, [0.8, 1.2]), run(1, 2.0, [1.6, 2.4]), run(2, 6.0, [5.7, 6.3])])["rows"]
    assert row["metrics"]["FD"] == pytest.approx(3.0)
    assert row["intervals"]["FD"] == pytest.approx([2.7, 3.3])
    (row,) = over_seeds([run(0, 1.0, [0.8, 1.2]), run(1, 2.0, None)])["rows"]
    assert row["intervals"] == {}


def measured(metrics: list[str] | None, split: str = "train") -> dict[str, Any]:
    """40 copies of one of the reference's 30 points."""
    rng = torch.Generator().manual_seed(0)
    real = torch.randn(30, 3, generator=rng)
    reference = open_reference(ArraySource("real", real, None), "pixels", split=split, cache=False)
    fake = from_source(ArraySource("fake", real[:1] + 1e-4 * torch.randn(40, 3, generator=rng), None))
    (row,) = evaluate_samples([fake], reference, metrics=metrics, replicates=4)["rows"]
    return dict(row)


def test_the_interval_of_a_share_counts_only_the_samples_that_were_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    assert measured(["precision"])["intervals"]["Precision-Pixels-40"] == pytest.approx([1 - 3 / 40, 1])
    monkeypatch.setattr(sys.modules["fewstep.evaluation.evaluate"], "MOST_ROWS", 25)
    assert measured(["precision"])["intervals"]["Precision-Pixels-40"] == pytest.approx([1 - 3 / 25, 1])


def test_copies_are_looked_for_by_default_in_training_data_alone() -> None:
    assert measured(None)["metrics"]["Memorised-Pixels-40"] == 1
    assert "Memorised-Pixels-40" not in measured(None, split="test")["metrics"]
    assert measured(["memorised"], split="test")["metrics"]["Memorised-Pixels-40"] == 1
