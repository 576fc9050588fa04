"""Figures of a run: curves as inline SVG that follow the page's colours, and the step dial as one PNG.

Curves are drawn by matplotlib in placeholder colours, each of which becomes a CSS variable, so that one
picture serves a light and a dark page. Matplotlib is imported in :func:`_plotting` alone, when first needed.
"""

from __future__ import annotations

import io
import itertools
import math
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import torch
from torch import Tensor

from fewstep.data.codec import save_grid
from fewstep.errors import DataError
from fewstep.evaluation.pictures import (
    MOST_POINTS,
    Frame,
    Picture,
    are_all_points,
    frame_of,
    inside,
    is_teacher,
    model_order,
    printable,
    sample_grid,
)

MOST_CURVE_POINTS = 400

_COLOURS = {
    "#010203": "currentColor",
    "#020304": "var(--line)",
    "#030405": "var(--band)",
    "#040506": "var(--teacher)",
    "#050607": "var(--tuned)",
    "#060708": "var(--third)",
}
_INK, _LINE, _BAND, _TEACHER, _TUNED, _THIRD = _COLOURS
_PAPER = {_TEACHER: "#52606d", _TUNED: "#c2410c", _THIRD: "#2563eb"}
_MARKERS = {_TEACHER: ("o", "--"), _TUNED: ("s", "-"), _THIRD: ("^", ":")}


@dataclass(frozen=True)
class Row:
    """One line of the quality table.

    Args:
        model: "teacher (diffusion)", "tuned"; a name that begins with "teacher" is the model before tuning.
        nfe: network evaluations per sample.
        metrics: name with net and sample count -> value, as ``{"FD-pixels-2k": 0.89}``; the first one leads.
        samples_per_second: speed of sampling.
    """

    model: str
    nfe: int
    metrics: dict[str, float]
    samples_per_second: float


# --- what is drawn: pure functions ------------------------------------------------------------------


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


def history_series(
    history: Iterable[Mapping[str, float]], key: str, *, limit: int = MOST_CURVE_POINTS
) -> tuple[list[float], list[float]]:
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


def quality_svg(rows: Sequence[Row], metric: str) -> str | None:
    """Quality against network evaluations, one curve per model; None where nothing was measured."""
    series = quality_series(rows, metric)
    if not series:
        return None
    said = "; ".join(
        f"{model}: " + ", ".join(f"{number(v)} at {nfe}" for nfe, v in zip(*points, strict=True))
        for model, points in series.items()
    )
    with _axes(f"quality-{metric}", f"{metric} against network evaluations. {said}.") as (axes, drawn):
        for model, (nfe, values) in series.items():
            colour = _colour(model, list(series))
            marker, dash = _MARKERS[colour]
            axes.plot(nfe, values, color=colour, marker=marker, linestyle=dash, label=_label(model))
        _evaluation_axis(axes, sorted({n for nfe, _ in series.values() for n in nfe}))
        _value_axis(axes, [v for _, values in series.values() for v in values])
        if higher_is_better(metric):
            axes.set(yscale="linear", ylim=(0, 1.05))
        axes.set_ylabel(f"{_label(metric)}, {'higher' if higher_is_better(metric) else 'lower'} is better")
        if len(series) > 1:
            axes.legend(frameon=False, labelcolor=_INK)
    return drawn[0]


def loss_svg(history: Sequence[Mapping[str, float]]) -> str | None:
    """The loss against images seen, one piece and one band per stage; None without a loss."""
    stages = loss_stages(history)
    if not stages:
        return None
    first, last = stages[0][2][0], stages[-1][2][-1]
    count = f" in {len(stages)} stages" if stages[0][0] is not None else ""
    alt = f"Training loss over {number(stages[-1][1][-1])} images{count}: {number(first)} to {number(last)}."
    with _axes("loss", alt) as (axes, drawn):
        edges = [images[0] for _, images, _ in stages[1:]] + [stages[-1][1][-1]]
        start, span = stages[0][1][0], max(stages[-1][1][-1] - stages[0][1][0], 1)
        for i, ((stage, images, loss), end) in enumerate(zip(stages, edges, strict=True)):
            axes.plot(images, loss, color=_TUNED, marker="." if len(loss) == 1 else "")
            if stage is not None and i % 2 == 0:
                axes.axvspan(start, end, color=_BAND, linewidth=0, zorder=0)
            if stage is not None and end - start > 0.06 * span:
                name = f"stage {stage}" if i == 0 and end - start > 0.1 * span else str(stage)
                middle = (start + end) / 2
                axes.text(middle, 1.02, name, transform=axes.get_xaxis_transform(), ha="center", fontsize=9)
            start = end
        _images_axis(axes)
        _value_axis(axes, [v for _, _, loss in stages for v in loss])
        axes.set_ylabel("loss")
    return drawn[0]


def history_svg(history: Sequence[Mapping[str, float]], key: str, label: str) -> str | None:
    """One column of ``metrics.jsonl`` against images seen; None where no row has it."""
    images, values = history_series(history, key)
    if not images:
        return None
    alt = f"{label} over {number(images[-1])} images: {number(values[0])} to {number(values[-1])}."
    with _axes(key, alt) as (axes, drawn):
        axes.plot(images, values, color=_TUNED, marker="." if len(values) == 1 else "")
        _images_axis(axes)
        axes.yaxis.set_major_formatter(_plotting().ticker.FuncFormatter(lambda v, _: f"{v:g}"))
        axes.set_ylabel(label)
        if min(values) >= 0:
            axes.set_ylim(bottom=0, top=1.08 * max(values) or 1.0)
    return drawn[0]


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
    metric = leading_metric(rows)
    plotting = _plotting()
    with plotting.style({"text.color": "#1f2933", "axes.labelcolor": "#1f2933"}):
        figure = plotting.Figure(figsize=(2.0 * len(steps) + 0.4, 2.35 * len(models) + 0.3), dpi=160)
        grid = figure.subplots(len(models), len(steps), squeeze=False)
        for (i, model), (j, nfe) in itertools.product(enumerate(models), enumerate(steps)):
            axes = grid[i, j]
            _draw_cell(axes, cells.get((model, nfe)), frame, _PAPER[_colour(model, models)])
            if i == 0:
                axes.set_title(evaluations(nfe), fontsize=11)
            if j == 0:
                axes.set_ylabel(_label(model), fontsize=11)
            value = quality_series(rows, metric).get(model) if metric else None
            if metric and value and nfe in value[0]:
                axes.set_xlabel(f"{_label(metric)}  {number(value[1][value[0].index(nfe)])}", fontsize=9)
        figure.tight_layout()
        pixels = plotting.pixels(figure)
    save_grid(path, torch.from_numpy(pixels).permute(2, 0, 1)[None], scale=1, pad=0)


def leading_metric(rows: Iterable[Row]) -> str | None:
    """The metric that captions and the verdict speak of: the first of the first row that has one."""
    return next((name for row in rows for name in row.metrics), None)


def higher_is_better(metric: str) -> bool:
    """Precision and recall rise with quality; every distance falls."""
    return metric.lower().startswith(("precision", "recall"))


def evaluations(nfe: int) -> str:
    """``1 evaluation``, ``2 evaluations``."""
    return f"{nfe} evaluation{'' if nfe == 1 else 's'}"


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


def _colour(model: str, models: Sequence[str]) -> str:
    if is_teacher(model):
        return _TEACHER
    others = [name for name in models if not is_teacher(name)]
    return _TUNED if model == others[0] else _THIRD


# --- matplotlib -------------------------------------------------------------------------------------


def _plotting() -> SimpleNamespace:
    """What is used of matplotlib: no pyplot, so no window and no state of the user's is touched."""
    import matplotlib
    from matplotlib import ticker
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    @contextmanager
    def style(changes: Mapping[str, object]) -> Iterator[None]:
        base = {"text.parse_math": False, "axes.unicode_minus": False, "savefig.facecolor": "white"}
        settings: Any = {**base, **changes}
        with warnings.catch_warnings(), matplotlib.rc_context(rc=settings):
            warnings.filterwarnings("ignore", message="Glyph .* missing from")
            yield

    def pixels(figure: Any) -> np.ndarray:
        canvas: Any = FigureCanvasAgg(figure)
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., :3].copy()

    return SimpleNamespace(Figure=Figure, ticker=ticker, style=style, pixels=pixels)


@contextmanager
def _axes(name: str, alt: str) -> Iterator[tuple[Any, list[str]]]:
    """Axes to draw in; on leaving, the finished SVG is the one item of the list."""
    plotting, drawn = _plotting(), list[str]()
    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": "fewstep",
        **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), _INK),
        **dict.fromkeys(("axes.edgecolor", "grid.color", "xtick.color", "ytick.color"), _LINE),
        **dict.fromkeys(("axes.spines.top", "axes.spines.right"), False),
        "lines.linewidth": 1.8,
        "axes.axisbelow": True,
    }
    with plotting.style(style):
        figure = plotting.Figure(figsize=(4.6, 3.0), layout="constrained")
        axes = figure.subplots()
        axes.grid(axis="y", linewidth=0.7)
        yield axes, drawn
        file = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    drawn.append(_inline(file.getvalue(), name, alt))


def _inline(svg: str, name: str, alt: str) -> str:
    """Matplotlib's file as an element of a page: no addresses, ids of its own, the page's colours."""
    prefix = f"f{zlib.crc32(name.encode('utf-8', 'backslashreplace')):08x}-"
    root = ElementTree.fromstring(svg)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        attributes = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
        element.attrib = {key: _on_page(key, value, prefix) for key, value in attributes.items()}
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag == "style":
                parent.remove(child)
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": printable(alt)}
    return ElementTree.tostring(root, encoding="unicode")


def _on_page(key: str, value: str, prefix: str) -> str:
    if key == "id":
        return prefix + value
    if key in ("href", "clip-path"):
        return value.replace("#", "#" + prefix)
    for placeholder, colour in _COLOURS.items() if key == "style" else ():
        value = value.replace(placeholder, colour)
    return value


def _evaluation_axis(axes: Any, counts: Sequence[int]) -> None:
    ticker, shown = _plotting().ticker, list(counts[:1])
    shown += [n for previous, n in itertools.pairwise(counts) if n >= 1.3 * previous or n == counts[-1]]
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(ticker.FixedLocator(shown))
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda n, _: f"{n:.0f}"))
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.set_xlabel("network evaluations per sample")


def _images_axis(axes: Any) -> None:
    axes.xaxis.set_major_locator(_plotting().ticker.MaxNLocator(5))
    axes.xaxis.set_major_formatter(_plotting().ticker.EngFormatter(sep=""))
    axes.set_xlabel("images seen")


def _value_axis(axes: Any, values: Sequence[float]) -> None:
    """Logarithmic where every value is positive, with plain numbers as labels."""
    ticker = _plotting().ticker
    if min(values) > 0:
        axes.set_yscale("log")
        wide = max(values) >= 3 * min(values)
        subs = (1.0,) if max(values) > 1000 * min(values) else (1.0, 2.0, 5.0)
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=subs) if wide else ticker.MaxNLocator(5))
        axes.yaxis.set_minor_locator(ticker.NullLocator())
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda v, _: f"{v:g}"))
