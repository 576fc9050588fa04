"""The log-log picture of a scaling law."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fewstep.data.codec import save_grid
from fewstep.evaluation.pictures import printable
from fewstep.evaluation.scaling import Law, Point
from fewstep.evaluation.svg import plotting as open_plotting

_INK, _LINE, _POINTS, _MUTED = "#1f2933", "#2563eb", "#c2410c", "#7b8794"
MOST_NAMES = 24


def formula(law: Law, metric: str = "y", digits: int = 4) -> str:
    """``FD = 3.214e+05 · C^-0.4123``, with ``y_inf + `` before it where the law has an offset."""
    c = law.curve
    offset = f"{c.offset:.{digits}g} + " if law.offset_interval is not None else ""
    return f"{metric} = {offset}{c.factor:.{digits}g} · C^{c.alpha:.{digits}g}"


def interval(law: Law) -> str:
    """``alpha -0.412, 95 % interval -0.5 to -0.3``, and of y_inf where there is one."""
    c = law.curve
    low, high = c.alpha_interval
    said = f"alpha {c.alpha:.3g}, 95 % interval {low:.3g} to {high:.3g} (Student t, {c.dof} degrees of freedom)"
    if law.offset_interval is not None:
        said += f"; y_inf {c.offset:.3g}, {law.offset_interval[0]:.3g} to {law.offset_interval[1]:.3g} (profile)"
    return said


def scaling_png(
    path: Path, points: Sequence[Point], law: Law, *, metric: str, size: str, plain: Law | None = None
) -> None:
    """One PNG: the points by name with their intervals, the law with its 95 % prediction band, the formula below.

    Args:
        law: what the line and the band are of.
        metric, size: labels of the axes, with units.
        plain: also draw this law, dashed.

    Raises:
        StorageError: the disk refused; a file that was there before is untouched.
    """
    plotting = open_plotting()
    with plotting.style({"text.color": _INK, "axes.labelcolor": _INK, "axes.axisbelow": True}):
        figure = plotting.Figure(figsize=(7.0, 5.4), dpi=140, layout="constrained")
        axes = figure.subplots()
        _draw_law(axes, points, law, plain)
        _draw_points(axes, points, law)
        axes.set(xscale="log", yscale="log", xlabel=f"C: {size}", ylabel=printable(metric))
        _plain_ticks(axes, plotting.ticker)
        axes.grid(which="major", linewidth=0.6, color="#d5dbe1")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9, loc="best")
        first = f"{formula(law, 'y')};  r² {law.r2:.3f} in log-log;  {len(points)} points"
        said = "\n".join([first, *textwrap.wrap(interval(law), 112)])
        figure.supxlabel(said, fontsize=8.5, x=0.02, ha="left")
        pixels = plotting.pixels(figure)
    save_grid(path, torch.from_numpy(pixels).permute(2, 0, 1)[None], scale=1, pad=0)


def _draw_law(axes: Any, points: Sequence[Point], law: Law, plain: Law | None) -> None:
    sizes = [p.compute for p in points]
    c = np.geomspace(min(sizes) / 1.3, max(sizes) * 1.3, 200)
    low, high = law.curve.band(c)
    axes.fill_between(c, low, high, color=_LINE, alpha=0.13, linewidth=0, label="95 % band for one more run")
    axes.plot(c, law.curve.at(c), color=_LINE, linewidth=1.8, label=formula(law, "y"))
    if plain is not None:
        axes.plot(c, plain.curve.at(c), color=_MUTED, linewidth=1.3, linestyle="--", label=formula(plain, "y"))
    # the band of few points is wide: the axis follows the points, and the band where it stays near them
    values = [v for p in points for v in (p.value, *(p.interval or ())) if v > 0]
    near = max(max(values) / min(values), 1.5)
    bottom, top = max(low.min(), min(values) / near), min(high.max(), max(values) * near)
    axes.set_ylim(min(bottom, min(values)) / 1.15, max(top, max(values)) * 1.15)


def _draw_points(axes: Any, points: Sequence[Point], law: Law) -> None:
    for p in points:
        if p.interval is not None:
            low = max(p.interval[0], p.value / 100)
            axes.plot([p.compute] * 2, [low, p.interval[1]], color=_POINTS, linewidth=1.2)
    axes.plot([p.compute for p in points], [p.value for p in points], "o", color=_POINTS, markersize=6, label="runs")
    for p in points if len(points) <= MOST_NAMES else ():
        above = p.value >= law.curve.at(p.compute)
        name = printable(p.name)
        axes.annotate(
            name if len(name) <= 24 else name[:23] + "…",
            (p.compute, p.value),
            xytext=(7, 6) if above else (-7, -6),
            textcoords="offset points",
            ha="left" if above else "right",
            va="bottom" if above else "top",
            fontsize=8.5,
        )


def _plain_ticks(axes: Any, ticker: Any) -> None:
    """Plain numbers on the vertical axis, 1, 2, 5 of each decade where there are few decades."""
    low, high = axes.get_ylim()
    subs = (1.0,) if high > 1000 * low else (1.0, 2.0, 5.0)
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=subs))
    axes.yaxis.set_minor_locator(ticker.NullLocator())
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda v, _: f"{v:g}"))
    left, right = axes.get_xlim()
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1.0,) if right > 200 * left else (1.0, 2.0, 5.0)))
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda v, _: f"{v:,.6g}" if v < 1e6 else f"{v:.0e}"))
