"""The part of ``fewstep dial`` that measures early commit: mean evaluations against quality."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from fewstep.checkpoint.store import write_json
from fewstep.cli.options import Output
from fewstep.denoiser import Denoiser
from fewstep.evaluation.early import commit_curve, commit_curve_png
from fewstep.evaluation.figures import margin, number
from fewstep.evaluation.record import TEACHER, TUNED
from fewstep.evaluation.reference import Reference
from fewstep.evaluation.samples import draw_labels
from fewstep.sampling import few_step_times

RESULT, PICTURE = "commit.json", "commit.png"
CHAIN = 8
"""Steps of the tuned model's deterministic chain."""


def measure_commit(
    output: Output,
    denoiser: Denoiser,
    teacher: Denoiser | None,
    reference: Reference,
    *,
    samples: int,
    seed: int,
    batch_size: int | None,
    place: Path | None,
) -> list[dict[str, Any]]:
    """Early commit of the teacher's sampler by both rules, and of the model's deterministic chain by extrapolation.

    Prints a table; writes commit.json and (of the teacher) commit.png into ``place``.
    """
    shared: dict[str, Any] = {"samples": samples, "seed": seed, "batch_size": batch_size}
    rows: list[dict[str, Any]] = []
    for name, model in ((TEACHER, teacher), (TUNED, denoiser)):
        if model is None:
            continue
        chain = {"solver": "heun"} if name == TEACHER else _chain(model)
        labels = draw_labels(model, reference.source, samples, seed)
        output.say(f"Early commit, {name}:")
        found = commit_curve(
            model, reference.net, reference.stats, labels=labels, **chain, **shared,
            on_row=lambda row: output.say(f"  {_told(row)}"),
        )  # fmt: skip
        rows += [{"model": name} | row for row in found]
    if output.speaks:
        output.say(_table(rows))
    if place is not None:
        write_json(place / RESULT, rows)
        commit_curve_png(place / PICTURE, [row for row in rows if row["model"] == rows[0]["model"]])
    return rows


def _chain(denoiser: Denoiser) -> dict[str, Any]:
    return {"solver": "multistep", "rules": ("extrapolation",), "times": few_step_times(denoiser, CHAIN)}


def _told(row: dict[str, Any]) -> str:
    name, value = next(iter(row["metrics"].items()))
    rule = f"{row['rule']}, tol {row['tol']:g}" if row["tol"] else "full chain"
    return (
        f"{rule}: {row['mean_nfe']:.1f} evaluations, {name} {number(value)}, rms to full {number(row['rms_to_full'])}"
    )


def _table(rows: list[dict[str, Any]]) -> Table:
    metric = next(iter(rows[0]["metrics"]))
    table = Table("Model", "Rule")
    for head in ("Tolerance", "Mean evaluations", "Stopped early", "RMS to full", metric):
        table.add_column(head, justify="right")
    for row in rows:
        value = row["metrics"][metric]
        interval = row["intervals"].get(metric)
        table.add_row(
            row["model"],
            row["rule"] if row["tol"] else "full chain",
            f"{row['tol']:g}" if row["tol"] else "",
            f"{row['mean_nfe']:.1f}",
            f"{100 * row['committed']:.0f} %",
            number(row["rms_to_full"]),
            f"{number(value)} {margin(value, tuple(interval))}" if interval else number(value),
        )
    return table
