"""Figures of a run or of several: quality against evaluations, training curves, and the step dial as one PNG."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.data.codec import save_grid
from fewstep.errors import DataError
from fewstep.evaluation.measure import METRICS
from fewstep.evaluation.pictures import (
    MOST_POINTS,
    Frame,
    Picture,
    are_all_points,
    frame_of,
    inside,
    model_order,
    printable,
    sample_grid,
)
from fewstep.evaluation.svg import (
    BAND,
    INK,
    drawing,
    evaluation_axis,
    images_axis,
    kinds_of,
    plotting,
    style_of,
    value_axis,
)

MOST_CURVE_POINTS = 400
Interval = tuple[float, float]
History = Sequence[Mapping[str, float]]


@dataclass(frozen=True)
class Row:
    """One line of the quality table.

    Args:
        model: "teacher (diffusion)", "tuned"; a name that begins with "teacher" is the model before tuning.
        nfe: network evaluations per sample.
        metrics: name with net and sample count -> value, as ``{"FD-pixels-2k": 0.89}``; the first one leads.
        samples_per_second: speed of sampling.
        intervals: name -> 95 % interval of its value; a metric without one is left out.
    """

    model: str
    nfe: int
    metrics: dict[str, float]
    samples_per_second: float
    intervals: dict[str, Interval] = field(default_factory=dict)


# --- numbers ----------------------------------------------------------------------------------------


def number(value: float) -> str:
    """A number for people: two decimals from 1 to 1000, three significant digits below.

    >>> number(11.4), number(0.00123), number(12345.6), number(-2.5)
    ('11.40', '0.00123', '12,346', '-2.50')
    """
    if not math.isfinite(value):
        return str(value)
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:.3g}"


def margin(value: float, interval: Interval | None) -> str:
    """What stands behind a value: half of its interval to at most two digits, or the interval's ends.

    >>> margin(11.4, (11.1, 11.7)), margin(0.352, (0.3401, 0.3639)), margin(2.0, (1.5, 4.0)), margin(2.0, None)
    ('± 0.30', '± 0.012', '(1.50 to 4.00)', '')
    """
    if interval is None or not all(math.isfinite(v) for v in (value, *interval)):
        return ""
    low, high = interval
    if abs((value - low) - (high - value)) > 0.02 * (high - low):
        return f"({number(low)} to {number(high)})"
    half, size = (high - low) / 2, abs(value)
    decimals = 0 if size >= 1000 else 2 if size >= 1 or size == 0 else 2 - math.floor(math.log10(size))
    if half > 0:
        decimals = max(0, min(decimals, 1 - math.floor(math.log10(float(f"{half:.2g}")))))
    text = f"{half:.{decimals}f}" if decimals < 6 else f"{half:.2g}"
    return f"± {text if float(text) else f'{half:.1g}'}"


def overlap(one: Interval, other: Interval) -> bool:
    """Whether two intervals have a point in common.

    >>> overlap((0.1, 0.2), (0.2, 0.3)), overlap((0.1, 0.2), (0.21, 0.3))
    (True, False)
    """
    return one[0] <= other[1] and other[0] <= one[1]


def leading_metric(rows: Iterable[Row]) -> str | None:
    """The metric that captions and the verdict speak of: the first of the first row that has one."""
    return next((name for row in rows for name in row.metrics), None)


def higher_is_better(metric: str) -> bool:
    """Which way a number points, by the metric that its name begins with; unknown ones are distances, which fall."""
    known = (m.label.lower() for m in METRICS.values() if m.higher_is_better)
    return any(f"{metric.lower()}-".startswith(f"{label}-") for label in known)


def evaluations(nfe: int) -> str:
    """``1 evaluation``, ``2 evaluations``."""
    return f"{nfe} evaluation{'' if nfe == 1 else 's'}"


# --- what is drawn: pure functions ------------------------------------------------------------------


def quality_series(rows: Iterable[Row], metric: str) -> dict[str, tuple[list[int], list[float]]]:
    """Per model: rising evaluations and the finite values of ``metric`` there; the last of doubles counts."""
    rows = list(rows)
    series = {}
    for model in model_order(row.model for row in rows):
        found = {row.nfe: row.metrics[metric] for row in rows if row.model == model and metric in row.metrics}
        points = [(nfe, value) for nfe, value in sorted(found.items()) if math.isfinite(value)]
        if points:
            series[model] = ([nfe for nfe, _ in points], [value for _, value in points])
    return series


def history_series(history: History, key: str, *, limit: int = MOST_CURVE_POINTS) -> tuple[list[float], list[float]]:
    """``images`` and ``key`` of the rows with both, finite; means of bins beyond ``limit`` rows."""
    pairs = [(row["images"], row[key]) for row in history if _finite(row, "images") and _finite(row, key)]
    if not pairs:
        return [], []
    bins = np.array_split(np.asarray(pairs, dtype=np.float64), min(limit, len(pairs)))
    means = [part.mean(0).tolist() for part in bins]
    return [x for x, _ in means], [y for _, y in means]


def loss_stages(
    history: Iterable[Mapping[str, float]], *, limit: int = MOST_CURVE_POINTS
) -> list[tuple[int | None, list[float], list[float]]]:
    """The loss, cut where the stage changes: (stage, images, loss) in order; stage None if unknown."""
    rows = [row for row in history if _finite(row, "images") and _finite(row, "loss")]
    runs = [
        (stage, list(group))
        for stage, group in itertools.groupby(rows, lambda row: int(row["stage"]) if _finite(row, "stage") else None)
    ]
    return [
        (stage, *history_series(group, "loss", limit=max(2, limit * len(group) // len(rows)))) for stage, group in runs
    ]


# --- curves -----------------------------------------------------------------------------------------


def quality_svg(
    rows: Sequence[Row], metric: str, kinds: Mapping[str, str] | None = None, *, name: str = "quality"
) -> str | None:
    """Quality against network evaluations with 95 % bars, one curve per model; None where nothing was measured.

    Args:
        kinds: model -> its colour, as in :func:`kinds_of`, which is the default.
        name: tells figures of one metric on one page apart.
    """
    series = quality_series(rows, metric)
    if not series:
        return None
    kinds = kinds or kinds_of(list(series))
    bars = {(row.model, row.nfe): row.intervals[metric] for row in rows if metric in row.intervals}
    said = "; ".join(
        f"{model}: " + ", ".join(f"{number(v)} at {nfe}" for nfe, v in zip(*points, strict=True))
        for model, points in series.items()
    )
    values = [v for _, found in series.values() for v in found]
    with drawing(f"{name}-{metric}", f"{metric} against network evaluations. {said}.") as (axes, drawn):
        for model, (nfe, found) in series.items():
            style = style_of(kinds[model])
            axes.plot(nfe, found, color=style.colour, marker=style.marker, linestyle=style.dash, label=_label(model))
            for n, value in zip(nfe, found, strict=True):
                low, high = bars.get((model, n), (value, value))
                if high > low and math.isfinite(high - low):
                    floor = min(values) / 4 if min(values) > 0 and not higher_is_better(metric) else low
                    axes.vlines(n, max(low, floor), high, color=style.colour, linewidth=1.4)
        evaluation_axis(axes, sorted({n for nfe, _ in series.values() for n in nfe}))
        value_axis(axes, values)
        if higher_is_better(metric):
            axes.set(yscale="linear", ylim=(0, max(1.0, *values) * 1.05))
        if len(series) > 1:
            axes.legend(frameon=False, labelcolor=INK, fontsize=10)
    return drawn[0]


def loss_svg(history: History) -> str | None:
    """The loss against images seen, one piece and one band per stage; None without a loss."""
    stages = loss_stages(history)
    if not stages:
        return None
    first, last = stages[0][2][0], stages[-1][2][-1]
    count = f" in {len(stages)} stages" if stages[0][0] is not None else ""
    alt = f"Training loss over {number(stages[-1][1][-1])} images{count}: {number(first)} to {number(last)}."
    with drawing("loss", alt) as (axes, drawn):
        edges = [images[0] for _, images, _ in stages[1:]] + [stages[-1][1][-1]]
        start, span = stages[0][1][0], max(stages[-1][1][-1] - stages[0][1][0], 1)
        for i, ((stage, images, loss), end) in enumerate(zip(stages, edges, strict=True)):
            axes.plot(images, loss, color=style_of("tuned").colour, marker="." if len(loss) == 1 else "")
            if stage is not None and i % 2 == 0:
                axes.axvspan(start, end, color=BAND, linewidth=0, zorder=0)
            if stage is not None and end - start > 0.06 * span:
                name = f"stage {stage}" if i == 0 and end - start > 0.14 * span else str(stage)
                middle = (start + end) / 2
                axes.text(middle, 1.02, name, transform=axes.get_xaxis_transform(), ha="center", fontsize=10)
            start = end
        images_axis(axes)
        value_axis(axes, [v for _, _, loss in stages for v in loss])
    return drawn[0]


def history_svg(history: History, key: str, label: str) -> str | None:
    """One column of ``metrics.jsonl`` against images seen; None where no row has it."""
    return overlay_svg({"": history}, key, label, {"": "tuned"})


def overlay_svg(histories: Mapping[str, History], key: str, label: str, kinds: Mapping[str, str]) -> str | None:
    """One column of several histories in one figure, with a legend; None where no row has it."""
    series = {name: history_series(history, key) for name, history in histories.items()}
    series = {name: found for name, found in series.items() if found[0]}
    if not series:
        return None
    ends = [
        f"{f'{name}: ' if name else ''}{number(y[0])} to {number(y[-1])}, {number(x[-1])} images"
        for name, (x, y) in series.items()
    ]
    with drawing(f"history-{key}", f"{label} over the images seen. {'; '.join(ends)}.") as (axes, drawn):
        for name, (images, found) in series.items():
            style, marker = style_of(kinds[name]), "." if len(found) == 1 else ""
            dash = style.dash if len(series) > 1 else "-"
            axes.plot(images, found, color=style.colour, marker=marker, linestyle=dash, label=_label(name))
        _plain_axes(axes, [v for _, found in series.values() for v in found], log=key == "loss")
        if len(series) > 1:
            axes.legend(frameon=False, labelcolor=INK, fontsize=10)
    return drawn[0]


def gap_svg(history: History) -> str | None:
    """The nominal ratio r/t of the two times of a pair, and their gap (t - r)/t; None where no row has it."""
    images, ratio = history_series(history, "r/t")
    if not images:
        return None
    alt = f"r/t rises from {number(ratio[0])} to {number(ratio[-1])}; the gap (t - r)/t is 1 less that."
    with drawing("gap", alt) as (axes, drawn):
        for found, kind, label in ((ratio, "tuned", "r/t"), ([1 - v for v in ratio], "third", "(t - r)/t")):
            style, marker = style_of(kind), "." if len(found) == 1 else ""
            axes.plot(images, found, color=style.colour, linestyle=style.dash, marker=marker, label=label)
        _plain_axes(axes, [1.0])
        axes.legend(frameon=False, labelcolor=INK, fontsize=10)
    return drawn[0]


def _plain_axes(axes: Any, values: Sequence[float], *, log: bool = False) -> None:
    images_axis(axes)
    if log:
        value_axis(axes, values)
        return
    axes.yaxis.set_major_formatter(plotting().ticker.FuncFormatter(lambda v, _: f"{v:g}"))
    if min(values) >= 0:
        axes.set_ylim(bottom=0, top=1.08 * max(values) or 1.0)


# --- the step dial as one PNG ------------------------------------------------------------------------


def step_dial_png(path: Path, pictures: Sequence[Picture], rows: Sequence[Row]) -> None:
    """One PNG: a column per number of evaluations, a row per model (teacher above), the metric below.

    Raises:
        DataError: there is no picture, or one is neither images nor points.
        StorageError: the disk refused; a file that was there before is untouched.
    """
    if not pictures:
        raise DataError("There are no samples to draw a dial of", got="no pictures", want="at least 1")
    models, steps = model_order(p.model for p in pictures), sorted({p.nfe for p in pictures})
    cells = {(p.model, p.nfe): p.images for p in pictures}
    frame = frame_of(torch.cat(list(cells.values()))) if are_all_points(cells.values()) else None
    metric, kinds, tools = leading_metric(rows), kinds_of(models), plotting()
    with tools.style({"text.color": "#1f2933", "axes.labelcolor": "#1f2933"}):
        figure = tools.Figure(figsize=(2.0 * len(steps) + 0.4, 2.35 * len(models) + 0.3), dpi=160)
        grid = figure.subplots(len(models), len(steps), squeeze=False)
        for (i, model), (j, nfe) in itertools.product(enumerate(models), enumerate(steps)):
            axes = grid[i, j]
            _draw_cell(axes, cells.get((model, nfe)), frame, style_of(kinds[model]).paper)
            if i == 0:
                axes.set_title(evaluations(nfe), fontsize=11)
            if j == 0:
                axes.set_ylabel(_label(model), fontsize=11)
            value = quality_series(rows, metric).get(model) if metric else None
            if metric and value and nfe in value[0]:
                axes.set_xlabel(f"{_label(metric)}  {number(value[1][value[0].index(nfe)])}", fontsize=9)
        figure.tight_layout()
        pixels = tools.pixels(figure)
    save_grid(path, torch.from_numpy(pixels).permute(2, 0, 1)[None], scale=1, pad=0)


def _draw_cell(axes: Any, images: Tensor | None, frame: Frame | None, colour: str) -> None:
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(frame is not None and images is not None)
    axes.set_box_aspect(1)
    if images is None:
        axes.text(0.5, 0.5, "not sampled", ha="center", va="center", transform=axes.transAxes, color="#616e7c")
    elif frame is not None:
        xy = inside(images, frame)[:MOST_POINTS]
        axes.scatter(xy[:, 0], xy[:, 1], s=1.5, color=colour, linewidths=0)
        axes.set_xlim(frame.x - frame.half, frame.x + frame.half)
        axes.set_ylim(frame.y - frame.half, frame.y + frame.half)
    else:
        axes.imshow(sample_grid(images), interpolation="nearest")


def _finite(row: Mapping[str, float], key: str) -> bool:
    value = row.get(key)
    return isinstance(value, int | float) and math.isfinite(value)


def _label(text: str) -> str:
    text = printable(text)
    return text if len(text) <= 40 else text[:39] + "…"
