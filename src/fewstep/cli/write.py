"""Samples to files, and lists of numbers from the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
from torch import Tensor

from fewstep.data import decode, save_grid, save_images
from fewstep.denoiser import Denoiser
from fewstep.errors import ConfigError
from fewstep.evaluation.pictures import save_points

Number = TypeVar("Number", int, float)


def save_samples(out: Path, denoiser: Denoiser, x: Tensor, cond: Tensor | None) -> Path:
    """One picture (.png), an archive (.npz), or a directory of pictures."""
    labels = None if cond is None else cond.cpu().numpy().astype(np.int64)
    if len(denoiser.sample_shape) != 3:
        points = x.float().cpu()
        if out.suffix == ".png":
            save_points(out, points)
            return out
        if out.suffix != ".npz":
            raise ConfigError("Points are written as a picture or an archive", got=str(out), want="x.png or x.npz")
        out.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(out, points=points.numpy())
        return out
    images = decode(x, denoiser.value_range).cpu()
    if out.suffix == ".png":
        save_grid(out, images)
        return out
    return save_images(out, images, labels)


def parse_numbers(text: str, option: str, kind: Callable[[str], Number]) -> list[Number]:
    """``"1,2,4"`` -> ``[1, 2, 4]``."""
    try:
        values = [kind(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise ConfigError(f"{option} is not a list of numbers", got=text, want="for example 1,2,4") from error
    if not values:
        raise ConfigError(f"{option} is empty", want="for example 1,2,4")
    return values
