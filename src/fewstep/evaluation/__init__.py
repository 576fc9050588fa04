"""Evaluation: feature nets, metrics, tables and the report."""

from __future__ import annotations

from fewstep.evaluation.evaluate import ALL_METRICS, Reference, evaluate, open_reference

__all__ = ["ALL_METRICS", "Reference", "evaluate", "open_reference"]
