"""Samples drawn and written to files, and lists of numbers from the command line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from fewstep.data import decode, save_grid, save_images
from fewstep.denoiser import Denoiser
from fewstep.errors import ConfigError, StorageError
from fewstep.evaluation.pictures import save_points
from fewstep.sampling import ode_sample_nfe, sample

Number = TypeVar("Number", int, float)


OTHER_FILES = (
    ".jpg",
    ".jpeg",
    ".webp",
    ".gif",
    ".bmp",
    ".tif",
    ".tiff",
    ".svg",
    ".pdf",
    ".npy",
    ".zip",
    ".pt",
    ".json",
)


def check_output(out: Path, denoiser: Denoiser) -> None:
    """Refuse an --out that could not be written, before time is spent on samples.

    Raises:
        ConfigError: a kind of file that is not written, or points to a directory.
    """
    points = len(denoiser.sample_shape) != 3
    if out.suffix.lower() in OTHER_FILES:
        raise ConfigError("Samples are not written as such a file", got=str(out), want="x.png, x.npz or a directory")
    if points and out.suffix not in (".png", ".npz"):
        raise ConfigError("Points are written as a picture or an archive", got=str(out), want="x.png or x.npz")


def spread_labels(denoiser: Denoiser, n: int, label: int | None) -> Tensor | None:
    """Class indices ``[n]``: ``label`` for all, or all classes in turn; None for an unconditional model.

    Raises:
        ConfigError: there is no such class, or there are no classes.
    """
    classes = denoiser.num_classes
    if not classes:
        if label is not None:
            raise ConfigError("The model is not class-conditional", got=f"--label {label}", do="Leave --label out")
        return None
    if label is not None and not 0 <= label < classes:
        raise ConfigError("There is no such class", got=f"--label {label}", want=f"0 to {classes - 1}")
    cond = torch.arange(n) % classes if label is None else torch.full((n,), label)
    return cond.to(denoiser.device)


def draw(
    denoiser: Denoiser,
    n: int,
    levels: Sequence[float] | None,
    nfe: int,
    seed: int,
    cond: Tensor | None,
    guidance: float | None,
    batch_size: int | None,
) -> tuple[Tensor, int]:
    """``n`` samples and the evaluations that each took: at ``levels``, or without them by the teacher's solver."""
    if levels is None:
        return ode_sample_nfe(denoiser, n, nfe, seed=seed, cond=cond, batch_size=batch_size), nfe
    x = sample(denoiser, n, times=levels, seed=seed, cond=cond, guidance=guidance, batch_size=batch_size)
    return x, len(levels) * (2 if guidance is not None and guidance != 1 else 1)


def save_samples(out: Path, denoiser: Denoiser, x: Tensor, cond: Tensor | None) -> Path:
    """One picture (.png), an archive (.npz), or a directory of pictures."""
    labels = None if cond is None else cond.cpu().numpy().astype(np.int64)
    if len(denoiser.sample_shape) != 3:
        points = x.float().cpu()
        if out.suffix == ".png":
            save_points(out, points)
            return out
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            np.savez_compressed(out, points=points.numpy())
        except OSError as error:
            raise StorageError(f"'{out}' could not be written: {error.strerror or error}") from error
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
