"""Samples drawn and written to files, and lists of numbers from the command line."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from fewstep.data import save_grid
from fewstep.data.writer import picture_writer
from fewstep.denoiser import Denoiser
from fewstep.errors import ConfigError, StorageError
from fewstep.evaluation.pictures import save_points
from fewstep.evaluation.samples import makes_images
from fewstep.overlap import Arriving, ahead

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
    points = not makes_images(denoiser)
    if out.suffix.lower() in OTHER_FILES:
        raise ConfigError("Samples are not written as such a file", got=str(out), want="x.png, x.npz or a directory")
    if points and out.suffix not in (".png", ".npz"):
        raise ConfigError("Points are written as a picture or an archive", got=str(out), want="x.png or x.npz")


def spread_prompts(denoiser: Denoiser, n: int, prompt: str | None, file: Path | None) -> list[str] | None:
    """A prompt per sample: ``prompt`` for all, or the lines of ``file`` in turn; None where neither is given.

    Raises:
        ConfigError: both are given, the model is told no text, or the file is not one of prompts.
    """
    given = {"--prompt": prompt, "--prompts": file}
    options = [option for option, value in given.items() if value is not None]
    if not options:
        return None
    if not denoiser.conditioning.parts:
        do = "Use --label" if denoiser.num_classes else f"Leave {options[0]} out"
        raise ConfigError("The model is not told a text", got=f"{options[0]} {given[options[0]]}", do=do)
    if file is None or prompt is not None:
        if file is not None:
            raise ConfigError("--prompt and --prompts exclude each other", do="Give one")
        return [prompt or ""] * n
    try:
        lines = [line for line in file.expanduser().read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise ConfigError(f"The prompts '{file}' cannot be read", got=error, want="UTF-8, a prompt per line") from error
    if not lines:
        raise ConfigError(f"There are no prompts in '{file}'", want="one per line")
    return [lines[i % len(lines)] for i in range(n)]


def spread_labels(denoiser: Denoiser, n: int, label: int | None) -> Tensor | None:
    """Class indices ``[n]``: ``label`` for all, or all classes in turn; None for a model without classes.

    Raises:
        ConfigError: there is no such class, or there are no classes.
    """
    classes = denoiser.num_classes
    if not classes:
        if label is not None:
            do = "Use --prompt" if denoiser.conditioning else "Leave --label out"
            raise ConfigError("The model is not class-conditional", got=f"--label {label}", do=do)
        return None
    if label is not None and not 0 <= label < classes:
        raise ConfigError("There is no such class", got=f"--label {label}", want=f"0 to {classes - 1}")
    cond = torch.arange(n) % classes if label is None else torch.full((n,), label)
    return cond.to(denoiser.device)


def save_samples(
    out: Path,
    denoiser: Denoiser,
    blocks: Iterable[Tensor],
    n: int,
    cond: Tensor | None,
    prompts: Sequence[str] | None = None,
    on_block: Callable[[int], None] | None = None,
) -> Path:
    """One picture (.png), an archive (.npz), or a directory of pictures; the latter two with classes or prompts.

    Blocks are encoded and written while the next one is made. A directory never holds more than a few of them in
    memory, and neither does an archive; one picture needs all bytes.

    Args:
        blocks: ``n`` samples in order, as they are shown (:func:`fewstep.evaluation.samples.shown`).
        on_block: called with how many samples are there.
    """
    arrived = _counted((block.get() for block in ahead(Arriving(block) for block in blocks)), on_block)
    if not makes_images(denoiser):
        points = torch.cat(list(arrived))
        if out.suffix == ".png":
            save_points(out, points)
            return out
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            np.savez_compressed(out, points=points.numpy())
        except OSError as error:
            raise StorageError(f"'{out}' could not be written: {error.strerror or error}") from error
        return out
    if out.suffix == ".png":
        save_grid(out, torch.cat(list(arrived)))
        return out
    labels = None if cond is None or not denoiser.num_classes else cond.cpu().numpy().astype(np.int64)
    with picture_writer(out, n, labels, prompts) as writer:
        for block in arrived:
            writer.add(block)
    return out


def _counted(blocks: Iterator[Tensor], on_block: Callable[[int], None] | None) -> Iterator[Tensor]:
    done = 0
    for block in blocks:
        done += len(block)
        if on_block is not None:
            on_block(done)
        yield block


def parse_numbers(text: str, option: str, kind: Callable[[str], Number]) -> list[Number]:
    """``"1,2,4"`` -> ``[1, 2, 4]``."""
    try:
        values = [kind(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise ConfigError(f"{option} is not a list of numbers", got=text, want="for example 1,2,4") from error
    if not values:
        raise ConfigError(f"{option} is empty", want="for example 1,2,4")
    return values
