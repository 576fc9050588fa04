"""Evaluation: feature nets, metrics, tables and the report."""

from __future__ import annotations

from fewstep.evaluation.evaluate import DEFAULT_METRICS, Reference, evaluate, evaluate_samples, open_reference
from fewstep.evaluation.measure import METRICS

__all__ = ["DEFAULT_METRICS", "METRICS", "Reference", "evaluate", "evaluate_samples", "open_reference"]
