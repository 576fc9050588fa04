"""The picture of the step dial: quality against evaluations and against seconds, with intervals."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fewstep.data.codec import save_grid
from fewstep.evaluation.dial import DEFAULT, TEACHER, TUNED
from fewstep.evaluation.pictures import printable
from fewstep.evaluation.svg import evaluation_axis, plotting, style_of, value_axis

_STYLES = {TEACHER: "teacher", TUNED: "tuned", DEFAULT: "third"}


def dial_png(path: Path, result: Mapping[str, Any], caption: str) -> None:
    """One PNG of :func:`fewstep.evaluation.dial.check`'s rows: the metric against NFE, and against seconds.

    Error bars are the 95 % half-sample intervals. ``caption``: data, draw, and the machine that took the seconds.

    Raises:
        StorageError: the disk refused; a file that was there before is untouched.
    """
    rows, metric, tools = result["rows"], result["metric"], plotting()
    with tools.style({"text.color": "#1f2933", "axes.labelcolor": "#1f2933", "axes.axisbelow": True}):
        figure = tools.Figure(figsize=(10.0, 4.9), dpi=140, layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        for axes, key in ((left, _nfe), (right, _seconds)):
            _draw(axes, rows, metric, key)
            axes.grid(axis="y", linewidth=0.6, color="#d5dbe1")
            axes.spines[["top", "right"]].set_visible(False)
        value_axis(left, [end for row in rows for end in _bar(row, metric)])
        evaluation_axis(left, sorted({row["nfe"] for row in rows}))
        left.set_ylabel(f"{printable(metric)}, lower is better")
        _seconds_axis(right, tools.ticker)
        left.legend(frameon=False)
        figure.supxlabel("\n".join(textwrap.wrap(printable(caption), 135)), fontsize=8.5, color="#52606d")
        pixels = tools.pixels(figure)
    save_grid(path, torch.from_numpy(pixels).permute(2, 0, 1)[None], scale=1, pad=0)


def _draw(axes: Any, rows: Sequence[Mapping[str, Any]], metric: str, place: Any) -> None:
    for model, kind in _STYLES.items():
        found = sorted((row for row in rows if row["model"] == model), key=lambda row: row["nfe"])
        if not found:
            continue
        style, x, y = style_of(kind), [place(row) for row in found], [row["metrics"][metric] for row in found]
        low, high = zip(*(_bar(row, metric) for row in found), strict=True)
        errors = [[v - a for v, a in zip(y, low, strict=True)], [b - v for v, b in zip(y, high, strict=True)]]
        dash = style.dash if model != DEFAULT else "none"
        axes.errorbar(
            x, y, yerr=errors, label=model, color=style.paper, marker=style.marker, linestyle=dash,
            markersize=5, linewidth=1.6, elinewidth=1.0, capsize=2.5,
        )  # fmt: skip


def _bar(row: Mapping[str, Any], metric: str) -> tuple[float, float]:
    """The interval; where it reaches below a twentieth of the value, which a logarithmic axis cannot show, cut."""
    value, (low, high) = row["metrics"][metric], row["intervals"][metric]
    return max(low, 0.05 * value), high


def _nfe(row: Mapping[str, Any]) -> float:
    return float(row["nfe"])


def _seconds(row: Mapping[str, Any]) -> float:
    return 1 / float(row["samples_per_second"])


def _seconds_axis(axes: Any, ticker: Any) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(ticker.EngFormatter("s", sep=" "))
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.set_xlabel("seconds per sample")
