"""The one-page report of a run: HTML that loads nothing and runs nothing; and the table of a terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fewstep.checkpoint.store import write_text
from fewstep.evaluation.figures import (
    Row,
    evaluations,
    higher_is_better,
    history_svg,
    leading_metric,
    loss_svg,
    number,
    quality_svg,
    step_dial_png,
)
from fewstep.evaluation.pictures import (
    MOST_SAMPLES,
    Frame,
    Picture,
    are_all_points,
    frame_of,
    is_teacher,
    model_order,
    outside,
    samples_png,
    samples_svg,
)

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
    "step_dial_png",
    "verdict",
    "write_report",
]

PIXELS_OF_ALL_PICTURES = 900_000
"""What keeps the page under 5 MB: noise costs 4 bytes a pixel as PNG in base64."""

LOSS_NOTE = "ECT's loss is not a progress measure: it changes with every stage."
_CURVES = (("r/t", "r/t"), ("lr", "learning rate"), ("images_per_second", "images per second"))


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
        command: the command that reproduces the run.
        environment: versions and machine.
    """

    title: str
    summary: list[tuple[str, str]]
    rows: list[Row]
    pictures: list[Picture]
    reference: Tensor | None
    history: list[dict[str, float]]
    command: str
    environment: dict[str, str]


def write_report(path: Path, data: ReportData) -> None:
    """Write the page atomically.

    Raises:
        DataError: samples that are neither images nor points.
        StorageError: the disk refused; a page that was there before is untouched.
    """
    write_text(path, render(data, datetime.now(UTC)))


def render(data: ReportData, written: datetime) -> str:
    """The page as text, a pure function of its arguments."""
    import jinja2

    template = resources.files("fewstep.evaluation").joinpath("templates", "report.html.j2")
    engine = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    context = {
        "data": data,
        "verdict": verdict(data.rows).replace(" -> ", "\u00a0→ "),
        "table": _table(data.rows),
        "when": f"{written:%Y-%m-%d %H:%M} UTC",
        **_sample_sections(data),
        **_curve_sections(data),
    }
    page = engine.from_string(template.read_text(encoding="utf-8")).render(context)
    return page.encode("utf-8", "backslashreplace").decode("utf-8")


# --- the verdict and the table ----------------------------------------------------------------------


def verdict(rows: Sequence[Row]) -> str:
    """One sentence: quality at the fewest evaluations both models were measured at, before and after tuning.

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
    values = {model: _values(rows, model, metric) for model in model_order(row.model for row in rows)}
    teacher = next((values[model] for model in values if is_teacher(model)), {})
    tuned = next((values[model] for model in values if not is_teacher(model)), {})
    shared = sorted(teacher.keys() & tuned.keys())
    if not shared:
        return f"{metric}: {'; '.join(_listed(m, v, metric) for m, v in values.items() if v)}."
    nfe = shared[0]
    before, after = teacher[nfe], tuned[nfe]
    steps = "One step" if nfe == 1 else evaluations(nfe).capitalize()
    change = f"{number(before)} -> {number(after)}{_change(before, after, metric)}"
    return f"{steps}: {metric} {change} after tuning{_slow_teacher(teacher, nfe, after, metric)}."


def quality_table(rows: Sequence[Row]) -> Table:
    """The quality table for a terminal; names are shown as they are, never read as markup."""
    from rich.table import Table
    from rich.text import Text

    content = _table(rows)
    table = Table()
    for i, name in enumerate(content["head"]):
        table.add_column(Text(name), justify="left" if i == 0 else "right", no_wrap=i == 0, overflow="fold")
    for line in content["lines"]:
        table.add_row(*(Text(cell) for cell in line["cells"]))
    return table


def print_table(rows: Sequence[Row], console: Console) -> None:
    """Print :func:`quality_table` to the caller's console."""
    console.print(quality_table(rows))


def _table(rows: Sequence[Row]) -> dict[str, Any]:
    metrics = list(dict.fromkeys(name for row in rows for name in row.metrics))
    order = model_order(row.model for row in rows)
    lines = [
        {
            "kind": _kind(row.model),
            "cells": [
                row.model,
                str(row.nfe),
                *(number(row.metrics[name]) if name in row.metrics else "–" for name in metrics),
                _speed(row.samples_per_second),
            ],
        }
        for row in sorted(rows, key=lambda row: (order.index(row.model), row.nfe))
    ]
    arrows = [f"{name}\u00a0{'↑' if higher_is_better(name) else '↓'}" for name in metrics]
    return {"head": ["Model", "Evaluations", *arrows, "Samples/s"], "lines": lines}


def _speed(value: float) -> str:
    return f"{value:,.0f}" if 10 <= value < math.inf else number(value)


def _values(rows: Sequence[Row], model: str, metric: str) -> dict[int, float]:
    return {row.nfe: row.metrics[metric] for row in rows if row.model == model and metric in row.metrics}


def _change(before: float, after: float, metric: str) -> str:
    if not (0 < before < float("inf") and 0 < after < float("inf")):
        return ""
    ratio, rose = max(before, after) / min(before, after), after > before
    if ratio < 1.005:
        return " (unchanged)"
    way = "higher" if rose else "lower"
    much = f"{100 * abs(after / before - 1):.0f} %" if ratio < 1.95 else f"{ratio:.{0 if ratio >= 100 else 1}f} times"
    return f" ({much} {way}{'' if rose == higher_is_better(metric) else ', which is worse'})"


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


# --- parts of the page ------------------------------------------------------------------------------


def _sample_sections(data: ReportData) -> dict[str, Any]:
    """The step dial (a cell per model and number of evaluations) and the real data."""
    pictures = [picture for picture in data.pictures if len(picture.images)]
    real = data.reference if data.reference is not None and len(data.reference) else None
    tensors = [picture.images for picture in pictures] + ([] if real is None else [real])
    frame = frame_of(torch.cat(tensors) if real is None else real) if are_all_points(tensors) else None
    most = int((PIXELS_OF_ALL_PICTURES / max(len(tensors), 1)) ** 0.5)
    models = model_order(picture.model for picture in pictures)
    steps = sorted({picture.nfe for picture in pictures})
    shown = min([MOST_SAMPLES, *(len(picture.images) for picture in pictures)])
    metric = leading_metric(data.rows)
    cells = {}
    for picture in pictures:
        images = picture.images if frame else picture.images[:shown]
        values = _values(data.rows, picture.model, metric) if metric else {}
        cells[picture.model, picture.nfe] = {
            **_drawn(images, frame, most, _kind(picture.model), f"{picture.model}, {evaluations(picture.nfe)}"),
            "metric": metric if picture.nfe in values else None,
            "value": number(values[picture.nfe]) if picture.nfe in values else None,
        }
    return {
        "models": [(name, _kind(name)) for name in models],
        "steps": [(nfe, evaluations(nfe)) for nfe in steps],
        "cells": cells,
        "cut": sum(outside(images, frame) for images in tensors) if frame else 0,
        "real": None if real is None else _drawn(real, frame, most, "real", "real data"),
    }


def _drawn(images: Tensor, frame: Frame | None, most: int, kind: str, name: str) -> dict[str, Any]:
    from markupsafe import Markup

    if frame is not None:
        alt = f"{len(images)} points of {name}"
        return {"svg": Markup(samples_svg(images, frame, colour=kind, alt=alt)), "alt": alt}
    address, enlarged = samples_png(images, most=most)
    return {"svg": None, "address": address, "enlarged": enlarged, "alt": f"Samples: {name}"}


def _curve_sections(data: ReportData) -> dict[str, Any]:
    from markupsafe import Markup

    metrics = dict.fromkeys(name for row in data.rows for name in row.metrics)
    quality = [quality_svg(data.rows, name) for name in metrics]
    loss = loss_svg(data.history)
    training = [history_svg(data.history, key, label) for key, label in _CURVES]
    staged = any("stage" in row for row in data.history)
    return {
        "quality": _markup(quality, Markup),
        "loss": _markup([loss], Markup),
        "loss_note": LOSS_NOTE if staged else None,
        "training": _markup(training, Markup),
    }


def _markup(figures: Iterable[str | None], markup: Any) -> list[Any]:
    return [markup(svg) for svg in figures if svg is not None]


def _kind(model: str) -> str:
    return "teacher" if is_teacher(model) else "tuned"
