"""Curves as inline SVG that follow the page's colours: matplotlib, and what turns its file into an element of a page.

Curves are drawn in placeholder colours, each of which becomes a CSS variable, so that one picture serves a light
and a dark page. Matplotlib is imported in :func:`plotting` alone, when first needed.
"""

from __future__ import annotations

import io
import itertools
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy as np

from fewstep.evaluation.pictures import is_teacher, printable

INK, LINE, BAND = "#010203", "#020304", "#030405"
KINDS = ("tuned", "third", "run3", "run4", "run5", "run6", "run7", "run8")
"""Names of the page's colours for models, in the order in which they are given out; the teacher has its own."""

_MODELS = {"teacher": "#040506"} | {kind: f"#0506{7 + i:02x}" for i, kind in enumerate(KINDS)}
_COLOURS = {INK: "currentColor", LINE: "var(--line)", BAND: "var(--band)"} | {
    colour: f"var(--{kind})" for kind, colour in _MODELS.items()
}
_PAPER = ("#c2410c", "#2563eb", "#15803d", "#a21caf", "#0e7490", "#a16207", "#be123c", "#4d7c0f")
_MARKERS = "s^DvP<X>"
_DASHES = ("-", ":", "-.", (0, (5, 1)), (0, (1, 1)), (0, (3, 1, 1, 1)), (0, (7, 2)), (0, (2, 2)))


@dataclass(frozen=True)
class Style:
    """How a model is drawn: ``colour`` becomes the page's variable, ``paper`` is the one of a PNG."""

    kind: str
    colour: str
    paper: str
    marker: str
    dash: Any


def kinds_of(models: Sequence[str]) -> dict[str, str]:
    """The page's colour of each model: "teacher", and "tuned", "third", ... in order for the others."""
    others = [name for name in dict.fromkeys(models) if not is_teacher(name)]
    return {name: "teacher" if is_teacher(name) else KINDS[others.index(name) % len(KINDS)] for name in models}


def style_of(kind: str) -> Style:
    """Colour, marker and dash of a kind."""
    if kind == "teacher":
        return Style(kind, _MODELS[kind], "#52606d", "o", "--")
    i = KINDS.index(kind)
    return Style(kind, _MODELS[kind], _PAPER[i], _MARKERS[i], _DASHES[i])


def plotting() -> SimpleNamespace:
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
def drawing(name: str, alt: str) -> Iterator[tuple[Any, list[str]]]:
    """Axes to draw in; on leaving, the finished SVG is the one item of the list."""
    tools, drawn = plotting(), list[str]()
    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": "fewstep",
        **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), INK),
        **dict.fromkeys(("axes.edgecolor", "grid.color", "xtick.color", "ytick.color"), LINE),
        **dict.fromkeys(("axes.spines.top", "axes.spines.right"), False),
        "lines.linewidth": 1.8,
        "axes.axisbelow": True,
    }
    with tools.style(style):
        figure = tools.Figure(figsize=(4.6, 3.0), layout="constrained")
        canvas = figure.subplots()
        canvas.grid(axis="y", linewidth=0.7)
        yield canvas, drawn
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


def evaluation_axis(axes: Any, counts: Sequence[int]) -> None:
    """Logarithmic, with the measured counts as labels where there is room for them."""
    ticker, shown = plotting().ticker, list(counts[:1])
    shown += [n for previous, n in itertools.pairwise(counts) if n >= 1.3 * previous or n == counts[-1]]
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(ticker.FixedLocator(shown))
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda n, _: f"{n:.0f}"))
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.set_xlabel("network evaluations per sample")


def images_axis(axes: Any) -> None:
    """Images seen, in thousands and millions."""
    axes.xaxis.set_major_locator(plotting().ticker.MaxNLocator(5))
    axes.xaxis.set_major_formatter(plotting().ticker.EngFormatter(sep=""))
    axes.set_xlabel("images seen")


def value_axis(axes: Any, values: Sequence[float]) -> None:
    """Logarithmic where every value is positive, with plain numbers as labels."""
    ticker = plotting().ticker
    if min(values) > 0:
        axes.set_yscale("log")
        wide = max(values) >= 3 * min(values)
        subs = (1.0,) if max(values) > 1000 * min(values) else (1.0, 2.0, 5.0)
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=subs) if wide else ticker.MaxNLocator(5))
        axes.yaxis.set_minor_locator(ticker.NullLocator())
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda v, _: f"{v:g}"))
