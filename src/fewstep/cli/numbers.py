"""What ``fewstep eval`` tells people: tables of numbers with their intervals, of seeds, of the teacher's ODE."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from fewstep.cli.options import Output
from fewstep.evaluation import Reference
from fewstep.evaluation.figures import Row, higher_is_better, number
from fewstep.evaluation.record import TEACHER
from fewstep.evaluation.report import print_table


def describe(reference: Reference) -> str:
    """A reference and its net in a few words."""
    info, net = reference.info, reference.net
    count = f"{info['count']:,} samples" if info["count"] else "an unstated number of samples"
    split = f", split {info['split']}" if info["split"] else ""
    return f"{info['source']} ({count}{split}), features {net.name} {net.hash[:8]}"


def effort(row: dict[str, Any]) -> str:
    """Network evaluations; or the steps, where a pipeline's network is not known."""
    return f"{row['steps']} steps" if row["nfe"] is None else f"{row['nfe']} NFE"


def value_of(row: dict[str, Any], name: str) -> str:
    """A number with its name and half the width of its interval."""
    text = f"{name} {number(row['metrics'][name])}"
    interval = row["intervals"].get(name)
    return f"{text} ± {number((interval[1] - interval[0]) / 2)}" if interval else text


def show(output: Output, name: str, result: dict[str, Any]) -> None:
    """The table of the model of that name, and of its teacher; what seeds do; the distance to the teacher's ODE."""
    if not output.speaks:
        return
    found = [(name, result)] + ([(TEACHER, result["teacher"])] if "teacher" in result else [])
    rows = [
        Row(which, row["nfe"], row["metrics"], row["samples_per_second"], _intervals(row))
        for which, one in reversed(found)
        for row in one["rows"]
        if row["nfe"] is not None
    ]
    if rows:
        print_table(rows, output.console)
    for row in result["rows"]:
        if row["nfe"] is None:
            _show_numbers(output, name, row)
    for which, one in found:
        _show_seeds(output, which, one["rows"])
    _show_agreement(output, result.get("teacher_agreement"))


def _show_numbers(output: Output, name: str, row: dict[str, Any]) -> None:
    """Everything that was measured of images whose network evaluations are not known."""
    from rich.table import Table

    table = Table("Number", title=name if row["steps"] is None else f"{name}, {row['steps']} steps")
    table.add_column("Value", justify="right")
    table.add_column("95 % interval")
    for metric, value in row["metrics"].items():
        low, high = row["intervals"].get(metric, (None, None))
        interval = "" if low is None or high is None else f"{number(low)} to {number(high)}"
        table.add_row(f"{metric}\u00a0{'↑' if higher_is_better(metric) else '↓'}", number(value), interval)
    output.say(table)


def _intervals(row: dict[str, Any]) -> dict[str, tuple[float, float]]:
    return {name: (low, high) for name, (low, high) in row["intervals"].items()}


def _show_seeds(output: Output, name: str, rows: Sequence[dict[str, Any]]) -> None:
    """How much every number moves between seeds, beside what its half-samples said."""
    from rich.table import Table

    if not any("seeds" in row for row in rows):
        return
    seeds = len(next(iter(rows[0]["seeds"].values()))["values"])
    table = Table("NFE", "Number", title=f"{name}: {seeds} seeds (numbers above are their means)")
    for head in ("mean", "std over seeds", "std by half-samples", "min", "max"):
        table.add_column(head, justify="right")
    for row in rows:
        for metric, found in row["seeds"].items():
            low, high = row["intervals"].get(metric, (math.nan, math.nan))
            cells = (found["mean"], found["std"], (high - low) / 3.92, found["min"], found["max"])
            table.add_row(
                effort(row).removesuffix(" NFE"),
                metric,
                *("–" if math.isnan(value) else number(value) for value in cells),
            )
    output.say(table)


def _show_agreement(output: Output, found: dict[str, Any] | None) -> None:
    if found is None:
        return
    output.say(
        f"Distance to the teacher's ODE with the same noise ({found['samples']} samples, {found['nodes']} nodes):"
    )
    for row in found["rows"]:
        output.say(
            f"  steps {row['steps']}: rms {number(row['rms'])}, {100 * row['relative']:.1f} % of the images' rms"
        )
    if found["sampler"] == "consistency" and any(row["steps"] > 1 for row in found["rows"]):
        output.say("  From the second step on, the sampler adds fresh noise: there the distance says little.")
