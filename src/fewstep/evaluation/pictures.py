"""Grids of samples for a page: images as small PNGs, points of the plane as SVG, both in the page itself."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fewstep.data.codec import save_grid
from fewstep.errors import DataError

MOST_SAMPLES = 25
MOST_POINTS = 2000
LEAST_ENLARGED = 320
"""Grids smaller than this many pixels are shown enlarged without smoothing."""


@dataclass(frozen=True)
class Picture:
    """Samples of one model at one number of evaluations; sample i of every picture is of the same noise.

    Args:
        model: as in :class:`Row`.
        nfe: network evaluations per sample.
        images: uint8 ``[n, 1 or 3, h, w]``, or points, float ``[n, 2]``.
    """

    model: str
    nfe: int
    images: Tensor


@dataclass(frozen=True)
class Frame:
    """The square of the plane that every scatter of one report shows: centre and half of its side."""

    x: float
    y: float
    half: float


def is_teacher(model: str) -> bool:
    """Whether a row or a picture is of the diffusion model before tuning."""
    return model.lower().startswith("teacher")


def model_order(models: Iterable[str]) -> list[str]:
    """The distinct names, teachers first, else in order of appearance.

    >>> model_order(["tuned", "teacher (diffusion)", "tuned"])
    ['teacher (diffusion)', 'tuned']
    """
    return sorted(dict.fromkeys(models), key=lambda name: not is_teacher(name))


def are_points(images: Tensor) -> bool:
    """Whether samples are points ``[n, 2]``; if not, they are images.

    Raises:
        DataError: neither points, float ``[n, 2]``, nor images, uint8 ``[n, 1 or 3, h, w]``.
    """
    if images.is_floating_point() and images.ndim == 2 and images.shape[1] == 2:
        return True
    if images.dtype == torch.uint8 and images.ndim == 4 and images.shape[1] in (1, 3) and images[0:1].numel():
        return False
    raise DataError(
        "A picture of a report cannot be drawn",
        got=f"{str(images.dtype).removeprefix('torch.')} {list(images.shape)}",
        want="uint8 [n, 1 or 3, h, w], or points, float [n, 2], with n >= 1",
    )


def are_all_points(samples: Iterable[Tensor]) -> bool:
    """Whether all samples of a report are points; if not, all are images; False where there are none.

    Raises:
        DataError: some cannot be drawn, or images and points mix.
    """
    forms = {are_points(images) for images in samples}
    if len(forms) > 1:
        raise DataError("The samples of one report mix images and points", do="Give all in one form")
    return forms == {True}


def frame_of(points: Tensor) -> Frame:
    """The square about the central 99 % of ``points [n, 2]`` in each coordinate, with a fifth of margin."""
    xy = _points(points)
    if not len(xy):
        return Frame(0.0, 0.0, 1.0)
    low, high = np.quantile(xy, [0.005, 0.995], axis=0)
    half = float((high - low).max()) * 0.6 or 1.0
    return Frame(float(low[0] + high[0]) / 2, float(low[1] + high[1]) / 2, half)


def sample_grid(images: Tensor) -> np.ndarray:
    """Up to 25 images in a near-square grid, RGBA uint8 ``[H, W, 4]``, with transparent gaps between them."""
    shown = images[:MOST_SAMPLES].cpu()
    n, _, height, width = shown.shape
    columns = math.ceil(math.sqrt(n))
    gap = max(1, round(width / 16))
    down, across = height + gap, width + gap
    canvas = np.zeros((math.ceil(n / columns) * down - gap, columns * across - gap, 4), dtype=np.uint8)
    for i, picture in enumerate(shown.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()):
        top, left = i // columns * down, i % columns * across
        canvas[top : top + height, left : left + width] = np.dstack(
            [picture, np.full((height, width), 255, dtype=np.uint8)]
        )
    return canvas


def samples_png(images: Tensor, *, most: int) -> tuple[str, bool]:
    """A grid as a ``data:`` address, and whether it is small enough to be shown enlarged without smoothing.

    Args:
        images: uint8 ``[n, 1 or 3, h, w]``.
        most: pixels that a side may have; fewer images are shown to keep to it, then they are made smaller.
    """
    shown, size = images[:MOST_SAMPLES], max(images.shape[2:])
    side = math.ceil(math.sqrt(len(shown)))
    while side > 2 and side * size > most:
        side -= 1
    picture = Image.fromarray(sample_grid(shown[: side * side]))
    picture.thumbnail((most, most), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    picture.save(file, format="PNG", optimize=True)
    address = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    return address, max(picture.size) < LEAST_ENLARGED


def samples_svg(points: Tensor, frame: Frame, *, colour: str, alt: str) -> str:
    """A scatter of up to 2000 points ``[n, 2]`` as inline SVG; points outside the frame are not drawn."""
    xy = inside(points, frame)[:MOST_POINTS]
    across = 100 + 100 * (xy[:, 0] - frame.x) / frame.half
    down = 100 - 100 * (xy[:, 1] - frame.y) / frame.half
    dots = "".join(f"M{x:.1f} {y:.1f}h0" for x, y in zip(across, down, strict=True))
    svg = ElementTree.Element("svg", {"viewBox": "0 0 200 200", "role": "img", "aria-label": printable(alt)})
    style = f"stroke:var(--{colour});stroke-width:2;stroke-linecap:round"
    ElementTree.SubElement(svg, "path", {"d": dots, "style": style})
    return ElementTree.tostring(svg, encoding="unicode")


def inside(points: Tensor, frame: Frame) -> np.ndarray:
    """The finite points within the frame, float64 ``[m, 2]``."""
    xy = _points(points)
    return np.asarray(xy[(np.abs(xy - [frame.x, frame.y]) <= frame.half).all(axis=1)])


def outside(points: Tensor, frame: Frame) -> int:
    """How many points the frame leaves out."""
    return len(points) - len(inside(points, frame))


def printable(text: str) -> str:
    """``text`` without control characters, which no XML may hold."""
    return "".join(c if c.isprintable() else " " for c in text)


def _points(points: Tensor) -> np.ndarray:
    xy = points.detach().cpu().double().numpy()
    return np.asarray(xy[np.isfinite(xy).all(axis=1)])


def save_points(path: Path, points: Tensor, *, side: int = 480) -> None:
    """Write a scatter of plane points ``[n, 2]`` as a PNG of ``side`` pixels on [-1.5, 1.5]^2, atomically."""
    xy = ((points.double().numpy() / 3 + 0.5) * (side - 1)).round().astype(np.int64)
    xy = xy[((xy >= 1) & (xy < side - 1)).all(axis=1)]
    canvas = np.full((side, side), 255, dtype=np.uint8)
    for dx, dy in ((0, 0), (1, 0), (0, 1), (-1, 0), (0, -1)):
        canvas[side - 1 - xy[:, 1] + dy, xy[:, 0] + dx] = 40
    save_grid(path, torch.from_numpy(canvas)[None, None], columns=1, scale=1, pad=0)
