"""The one-page report of a run: HTML that loads nothing and runs nothing; and the table of a terminal."""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fewstep.checkpoint.store import write_text
from fewstep.evaluation.figures import (
    Row,
    evaluations,
    gap_svg,
    higher_is_better,
    history_svg,
    leading_metric,
    loss_svg,
    margin,
    number,
    overlap,
    step_dial_png,
)
from fewstep.evaluation.neighbours import Neighbours
from fewstep.evaluation.page import fill, markup, metric_cards, neighbour_cells, sample_sections, speed, values_of
from fewstep.evaluation.pictures import Picture, is_teacher, model_order
from fewstep.evaluation.record import Record, read_record
from fewstep.evaluation.summary import measured_of, summary_of, tables_of

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = [
    "Picture",
    "ReportData",
    "Row",
    "print_table",
    "quality_table",
    "render",
    "report_of",
    "report_run",
    "step_dial_png",
    "verdict",
    "write_report",
]

LOSS_NOTE = "ECT's loss is not a progress measure: it changes with every stage."
MOST_COLUMNS = 5
"""Metrics that stand side by side in a terminal; more stand below each other."""

_CURVES = (("lr", "learning rate"), ("images_per_second", "images per second"))


@dataclass(frozen=True)
class ReportData:
    """Everything a report shows; any part may be empty.

    Args:
        title: of the page.
        summary: pairs such as ("Teacher", "..."), ("Data", "..."), ("Recipe", "... not measured here").
        rows: the quality table.
        pictures: samples; the same noise in every one.
        reference: real data in the form of ``Picture.images``.
        history: rows of ``metrics.jsonl`` with "images" and any of "loss", "stage", "r/t", "lr",
            "images_per_second"; rows that lack a key are left out of its curve.
        command: as it was typed.
        environment: versions and machine.
        measured: pairs on how the numbers were measured: net, reference, samples, seeds.
        neighbours: training images nearest to some samples.
        again: the command that repeats the run from its directory.
        settings: the text of config.yaml.
        tables: further results, each with a title, a head and lines (the dial, early commits).
        figures: (words, PNG) of further results.
        missing: sentences on what is not here.
    """

    title: str
    summary: list[tuple[str, str]]
    rows: list[Row]
    pictures: list[Picture]
    reference: Tensor | None
    history: list[dict[str, float]]
    command: str
    environment: dict[str, str]
    measured: list[tuple[str, str]] = field(default_factory=list)
    neighbours: Neighbours | None = None
    again: str = ""
    settings: str = ""
    tables: list[dict[str, Any]] = field(default_factory=list)
    figures: list[tuple[str, bytes]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def report_run(run: Path, out: Path | None = None) -> Record:
    """Draw the page of a run from its directory alone, to ``out`` or to the run's ``report.html``.

    Raises:
        ConfigError: it is no run; CheckpointError: a file of it is damaged; StorageError: the disk refused.
    """
    record = read_record(run)
    write_report(out or run / "report.html", report_of(record))
    return record


def report_of(record: Record) -> ReportData:
    """What the page of a run shows."""
    drawn = {name for name in record.figures if name != "step-dial" and name not in record.tables}
    figures = [(f"Figure {name}", record.figures[name].read_bytes()) for name in sorted(drawn)]
    if not record.pictures and "step-dial" in record.figures:
        figures.append(("Samples by step count, drawn at the end of the run", record.figures["step-dial"].read_bytes()))
    return ReportData(
        title=_title(record),
        summary=summary_of(record),
        rows=record.rows,
        pictures=record.pictures,
        reference=record.reference,
        history=record.history,
        command=record.command,
        environment=record.environment,
        measured=measured_of(record.results),
        neighbours=record.neighbours,
        again=record.again,
        settings=record.yaml,
        tables=tables_of(record.tables),
        figures=figures,
        missing=record.missing,
    )


def write_report(path: Path, data: ReportData) -> None:
    """Write the page atomically.

    Raises:
        DataError: samples that are neither images nor points.
        StorageError: the disk refused; a page that was there before is untouched.
    """
    write_text(path, render(data, datetime.now(UTC)))


def render(data: ReportData, written: datetime) -> str:
    """The page as text, a pure function of its arguments."""
    curves = [("loss", loss_svg(data.history)), ("gap of the two times of a pair", gap_svg(data.history))]
    curves += [(label, history_svg(data.history, key, label)) for key, label in _CURVES]
    staged = any("stage" in row for row in data.history)
    context = {
        "data": data,
        "title": data.title,
        "verdict": _emphasised(verdict(data.rows)),
        "cards": metric_cards(data.rows),
        "intervals": any(row.intervals for row in data.rows),
        "neighbours": neighbour_cells(data.neighbours),
        "memorised": _memorised(data.rows),
        "curves": markup(curves),
        "loss_note": LOSS_NOTE if staged else None,
        "tables": [table | {"svg": dict(markup([("", table["svg"])])).get("")} for table in data.tables],
        "figures": [(name, "data:image/png;base64," + base64.b64encode(png).decode()) for name, png in data.figures],
        "when": f"{written:%Y-%m-%d %H:%M} UTC",
        **sample_sections(data.pictures, data.reference, data.rows),
    }
    return fill("report.html.j2", context)


def _emphasised(sentence: str) -> Any:
    """The sentence with its change, ``before → after (by how much)``, set off."""
    from markupsafe import Markup, escape

    text = str(escape(sentence)).replace(" -&gt; ", "\u00a0→ ")
    return Markup(re.sub(r"[^\s;]+\u00a0→ [^\s;]+(?: \([^()]*\))?", r"<b>\g<0></b>", text, count=1))


def _title(record: Record) -> str:
    verb = "Tuned" if record.job == "tune" else "Pretrained"
    seen = record.facts.get("images_seen", record.config.get("images"))
    data, recipe = record.config.get("data.source", "?"), record.config.get("recipe", "custom")
    return f"{verb} on {data}: {f'{seen:,}' if isinstance(seen, int) else '?'} images, recipe {recipe}"


def _memorised(rows: Sequence[Row]) -> list[str]:
    """What the memorisation metric found for the few-step model (or else for all), a line per name."""
    found: dict[str, list[str]] = {}
    for row in [row for row in rows if not is_teacher(row.model)] or rows:
        for name in (name for name in row.metrics if name.startswith("Memorised")):
            found.setdefault(name, []).append(f"{_cell(row, name)} with {evaluations(row.nfe)}")
    return [f"{name}: {', '.join(values)}." for name, values in found.items()]


# --- the verdict and the table ----------------------------------------------------------------------


def verdict(rows: Sequence[Row]) -> str:
    """One sentence: quality at the fewest evaluations where the intervals tell before and after tuning apart.

    >>> rows = [Row("teacher (diffusion)", 1, {"FD-pixels-2k": 11.4}, 9.0),
    ...         Row("teacher (diffusion)", 35, {"FD-pixels-2k": 0.17}, 1.0),
    ...         Row("tuned", 1, {"FD-pixels-2k": 0.89}, 9.0)]
    >>> print(verdict(rows).replace("; ", "\\n"))
    One step: FD-pixels-2k 11.40 -> 0.89 (12.8 times lower) after tuning
    the diffusion model needs 35 evaluations for 0.17.
    """
    metric = leading_metric(rows)
    if metric is None:
        return "No quality was measured in this run."
    values = {model: values_of(rows, model, metric) for model in model_order(row.model for row in rows)}
    teacher = next((values[model] for model in values if is_teacher(model)), {})
    tuned = next((values[model] for model in values if not is_teacher(model)), {})
    shared = sorted(teacher.keys() & tuned.keys())
    if not shared:
        return f"{metric}: {'; '.join(_listed(m, v, metric) for m, v in values.items() if v)}."
    nfe = next((n for n in shared if not _doubt(rows, n, metric)), shared[0])
    before, after = teacher[nfe], tuned[nfe]
    steps = "One step" if nfe == 1 else evaluations(nfe).capitalize()
    change = f"{number(before)} -> {number(after)}{_change(before, after, metric)}"
    doubt = _doubt(rows, nfe, metric)
    return f"{steps}: {metric} {change} after tuning{doubt}{_slow_teacher(teacher, nfe, after, metric)}."


def quality_table(rows: Sequence[Row]) -> Table:
    """The quality table for a terminal; names are shown as they are, never read as markup."""
    from rich.table import Table
    from rich.text import Text

    head, lines = table_lines(rows)
    table = Table()
    for i, name in enumerate(head):
        table.add_column(Text(name), justify="left" if i == 0 else "right", no_wrap=i == 0, overflow="fold")
    for line in lines:
        table.add_row(*(Text(cell) for cell in line))
    return table


def table_lines(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Head and lines of the quality table: a column per metric, or a line per metric where they are many."""
    metrics = list(dict.fromkeys(name for row in rows for name in row.metrics))
    return _wide(rows, metrics) if len(metrics) <= MOST_COLUMNS else _long(rows, metrics)


def print_table(rows: Sequence[Row], console: Console) -> None:
    """Print :func:`quality_table` to the caller's console."""
    console.print(quality_table(rows))


def _wide(rows: Sequence[Row], metrics: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """A line per model and number of evaluations, a column per metric."""
    order = model_order(row.model for row in rows)
    lines = [
        [row.model, str(row.nfe), *(_cell(row, name) for name in metrics), speed(row.samples_per_second)]
        for row in sorted(rows, key=lambda row: (order.index(row.model), row.nfe))
    ]
    return ["Model", "Evaluations", *(_arrow(name) for name in metrics), "Samples/s"], lines


def _long(rows: Sequence[Row], metrics: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """A line per metric and model, a column per number of evaluations."""
    steps, models = sorted({row.nfe for row in rows}), model_order(row.model for row in rows)
    cells = {(row.model, row.nfe): row for row in rows}
    lines = []
    for name in metrics:
        for i, model in enumerate(models):
            found = [cells.get((model, nfe)) for nfe in steps]
            lines.append([_arrow(name) if i == 0 else "", model, *(_cell(row, name) if row else "–" for row in found)])
    for i, model in enumerate(models):
        speeds = [cells.get((model, nfe)) for nfe in steps]
        found_speeds = [speed(row.samples_per_second) if row else "–" for row in speeds]
        lines.append(["Samples/s" if i == 0 else "", model, *found_speeds])
    return ["Metric", "Model", *(evaluations(nfe) for nfe in steps)], lines


def _cell(row: Row, name: str) -> str:
    if name not in row.metrics:
        return "–"
    return f"{number(row.metrics[name])} {margin(row.metrics[name], row.intervals.get(name))}".strip()


def _arrow(name: str) -> str:
    return f"{name}\u00a0{'↑' if higher_is_better(name) else '↓'}"


def _change(before: float, after: float, metric: str) -> str:
    if not (0 < before < float("inf") and 0 < after < float("inf")):
        return ""
    ratio, rose = max(before, after) / min(before, after), after > before
    if ratio < 1.005:
        return " (unchanged)"
    way = "higher" if rose else "lower"
    much = f"{100 * abs(after / before - 1):.0f} %" if ratio < 1.95 else f"{ratio:.{0 if ratio >= 100 else 1}f} times"
    return f" ({much} {way}{'' if rose == higher_is_better(metric) else ', which is worse'})"


def _doubt(rows: Sequence[Row], nfe: int, metric: str) -> str:
    """Says so where the intervals of the two models overlap."""
    teacher = [row for row in rows if row.nfe == nfe and metric in row.intervals and is_teacher(row.model)]
    tuned = [row for row in rows if row.nfe == nfe and metric in row.intervals and not is_teacher(row.model)]
    if teacher and tuned and overlap(teacher[0].intervals[metric], tuned[0].intervals[metric]):
        return ", which decides nothing: the 95 % intervals overlap"
    return ""


def _slow_teacher(teacher: Mapping[int, float], nfe: int, tuned: float, metric: str) -> str:
    """What the diffusion model reaches with more evaluations, if that was measured."""
    best = _best({n: value for n, value in teacher.items() if n > nfe}, metric)
    if best is None:
        return ""
    value = teacher[best]
    if (value >= tuned) if higher_is_better(metric) else (value <= tuned):
        return f"; the diffusion model needs {evaluations(best)} for {number(value)}"
    return f"; the diffusion model's best is {number(value)}, with {evaluations(best)}"


def _best(values: Mapping[int, float], metric: str) -> int | None:
    finite = {nfe: value for nfe, value in values.items() if not math.isnan(value)}
    sign = -1 if higher_is_better(metric) else 1
    return min(finite, key=lambda nfe: (sign * finite[nfe], nfe), default=None)


def _listed(model: str, values: Mapping[int, float], metric: str) -> str:
    first, best = min(values), _best(values, metric)
    text = f"{model} {number(values[first])} with {evaluations(first)}"
    return text if best in (None, first) else f"{text}, {number(values[best])} with {evaluations(best)}"
