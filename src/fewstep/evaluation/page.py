"""Parts that the page of a run and the page of a comparison share: grids of samples, cards of numbers, the engine."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewstep.evaluation.figures import Row, evaluations, higher_is_better, leading_metric, margin, number, quality_svg
from fewstep.evaluation.neighbours import Neighbours
from fewstep.evaluation.pictures import (
    MOST_SAMPLES,
    Frame,
    Picture,
    are_all_points,
    frame_of,
    model_order,
    outside,
    samples_png,
    samples_svg,
)
from fewstep.evaluation.svg import KINDS, kinds_of

PIXELS_OF_ALL_PICTURES = 900_000
"""What keeps the page under 5 MB: noise costs 4 bytes a pixel as PNG in base64."""

SPEED = "Samples per second"


def fill(template: str, context: Mapping[str, Any]) -> str:
    """A template of the package with everything in it escaped; what no UTF-8 can hold is written as an escape."""
    import jinja2

    engine = jinja2.Environment(
        loader=jinja2.PackageLoader("fewstep.evaluation"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = engine.get_template(template).render({"kinds": ("teacher", *KINDS), **context})
    return page.encode("utf-8", "backslashreplace").decode("utf-8")


def markup(figures: Iterable[tuple[str, str | None]]) -> list[tuple[str, Any]]:
    """Titles and figures that are elements already, not text; figures that are None fall away."""
    from markupsafe import Markup

    return [(title, Markup(svg)) for title, svg in figures if svg is not None]


# --- numbers ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """A number of a table: its text, its interval's text, and "best", "undecided", "unproven" or nothing."""

    text: str
    margin: str = ""
    mark: str = ""


Marks = Mapping[tuple[str, int], str]


def metric_cards(
    rows: Sequence[Row],
    kinds: Mapping[str, str] | None = None,
    marks: Mapping[str, Marks] | None = None,
    names: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """A card per metric, in the order of measurement, and one for the speed: figure and table.

    Args:
        kinds: model -> colour; marks: metric -> (model, evaluations) -> mark; names: model -> its longer name.
    """
    from markupsafe import Markup

    kinds = kinds or kinds_of(model_order(row.model for row in rows))
    cards = []
    for metric in dict.fromkeys(name for row in rows for name in row.metrics):
        svg = quality_svg(rows, metric, kinds)
        cells = {
            (row.model, row.nfe): Cell(
                number(row.metrics[metric]),
                margin(row.metrics[metric], row.intervals.get(metric)),
                (marks or {}).get(metric, {}).get((row.model, row.nfe), ""),
            )
            for row in rows
            if metric in row.metrics
        }
        direction = "higher is better" if higher_is_better(metric) else "lower is better"
        figure = None if svg is None else Markup(svg)
        cards.append({"title": metric, "note": direction, "svg": figure, **_table(cells, kinds, names)})
    speeds = {(row.model, row.nfe): Cell(speed(row.samples_per_second)) for row in rows}
    if speeds:
        cards.append({"title": SPEED, "note": "on this machine", "svg": None, **_table(speeds, kinds, names)})
    return cards


def _table(
    cells: Mapping[tuple[str, int], Cell], kinds: Mapping[str, str], names: Mapping[str, str] | None
) -> dict[str, Any]:
    models, steps = model_order(model for model, _ in cells), sorted({nfe for _, nfe in cells})
    head = [{"model": model, "name": (names or {}).get(model, ""), "kind": kinds[model]} for model in models]
    lines = [{"nfe": nfe, "cells": [cells.get((model, nfe), Cell("–")) for model in models]} for nfe in steps]
    return {"head": head, "lines": lines}


def speed(value: float) -> str:
    """Samples per second without needless digits; a dash where it is unknown."""
    if math.isnan(value):
        return "–"
    return f"{value:,.0f}" if 10 <= value < math.inf else number(value)


def values_of(rows: Sequence[Row], model: str, metric: str) -> dict[int, float]:
    """Evaluations -> value of one model and metric."""
    return {row.nfe: row.metrics[metric] for row in rows if row.model == model and metric in row.metrics}


# --- pictures ---------------------------------------------------------------------------------------


def sample_sections(
    pictures: Sequence[Picture],
    real: Tensor | None,
    rows: Sequence[Row],
    kinds: Mapping[str, str] | None = None,
    names: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The step dial (a cell per model and number of evaluations) and the real data."""
    pictures = [picture for picture in pictures if len(picture.images)]
    real = real if real is not None and len(real) else None
    tensors = [picture.images for picture in pictures] + ([] if real is None else [real])
    frame = frame_of(torch.cat(tensors) if real is None else real) if are_all_points(tensors) else None
    most = int((PIXELS_OF_ALL_PICTURES / max(len(tensors), 1)) ** 0.5)
    models = model_order(picture.model for picture in pictures)
    kinds = kinds or kinds_of(models)
    shown = min([MOST_SAMPLES, *(len(picture.images) for picture in pictures)])
    metric = leading_metric(rows)
    cells = {}
    for picture in pictures:
        images = picture.images if frame else picture.images[:shown]
        values = values_of(rows, picture.model, metric) if metric else {}
        cells[picture.model, picture.nfe] = {
            **_drawn(images, frame, most, kinds[picture.model], f"{picture.model}, {evaluations(picture.nfe)}"),
            "metric": metric if picture.nfe in values else None,
            "value": number(values[picture.nfe]) if picture.nfe in values else None,
        }
    return {
        "models": [(name, kinds[name], (names or {}).get(name, "")) for name in models],
        "steps": [(nfe, evaluations(nfe)) for nfe in sorted({picture.nfe for picture in pictures})],
        "cells": cells,
        "cut": sum(outside(images, frame) for images in tensors) if frame else 0,
        "real": None if real is None else _drawn(real, frame, most, "real", "real data"),
    }


def neighbour_cells(near: Neighbours | None) -> list[dict[str, Any]]:
    """A strip per sample, the sample first, with the distances of its training images."""
    if near is None:
        return []
    cells = []
    for i, sample in enumerate(near.samples):
        own, *others = (samples_png(image[None], most=200) for image in (sample, *near.found[i]))
        distances = [number(value) for value in near.distances[i].tolist()]
        labels = [
            f"training image {row}, distance {d}" for row, d in zip(near.index[i].tolist(), distances, strict=True)
        ]
        cells.append(
            {
                "sample": {"svg": None, "address": own[0], "enlarged": own[1], "alt": f"sample {i}"},
                "found": [
                    {"svg": None, "address": address, "enlarged": enlarged, "alt": label}
                    for (address, enlarged), label in zip(others, labels, strict=True)
                ],
                "distances": distances,
                "ratio": number(float(near.ratios[i])),
                "close": float(near.ratios[i]) < 1,
            }
        )
    return cells


def _drawn(images: Tensor, frame: Frame | None, most: int, kind: str, name: str) -> dict[str, Any]:
    from markupsafe import Markup

    if frame is not None:
        alt = f"{len(images)} points of {name}"
        return {"svg": Markup(samples_svg(images, frame, colour=kind, alt=alt)), "alt": alt}
    address, enlarged = samples_png(images, most=most)
    return {"svg": None, "address": address, "enlarged": enlarged, "alt": f"Samples: {name}"}
