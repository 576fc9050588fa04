"""Sets of samples to be measured: from a model or from files; block by block."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fewstep.backbones.text import prompt_rows
from fewstep.data import Source, decode
from fewstep.data.sources import captions_of, conditions_of
from fewstep.denoiser import Denoiser
from fewstep.errors import ConfigError, DataError, nearest
from fewstep.guidance import Guided, evaluations
from fewstep.inference import Precision, arithmetic, blocks_of
from fewstep.overlap import Arriving
from fewstep.randomness import Streams
from fewstep.sampling import check_times, default_batch_size, few_step_run, few_step_times, nfe_run

READ_ROWS, READ_VALUES = 512, 2**26
"""Most samples, and most pixel values, that are read from files at once."""

SOLVERS = ("consistency", "ode")
FILES = "files"
"""The solver of images that were made elsewhere."""


@dataclass(frozen=True)
class SampleSet:
    """Samples that can be gone through any number of times, in constant memory.

    Args:
        name: for tables.
        count: how many.
        shape: of one, ``(c, h, w)`` or ``(k,)``.
        is_images: uint8 images, or float points.
        labels: the classes that were asked for, int64 ``[count]``, or None.
        about: JSON-able: "solver", "steps", "nfe" (network evaluations per sample), "times" and "seed"; None where
            unknown.
        blocks: ``blocks(part=0, parts=1)`` starts a pass: uint8 ``[b, c, h, w]`` or float ``[b, k]`` in order, where
            they were made (a GPU is not waited for); of several parts, every ``parts``-th block beginning with number
            ``part``.
    """

    name: str
    count: int
    shape: tuple[int, ...]
    is_images: bool
    labels: Tensor | None
    about: dict[str, Any]
    blocks: Callable[..., Iterator[Tensor]]


def generated(
    denoiser: Denoiser,
    n: int,
    steps: int,
    *,
    solver: Literal["consistency", "ode"] = "consistency",
    times: Sequence[float] | None = None,
    seed: int = 0,
    cond: Tensor | None = None,
    guidance: float | None = None,
    batch_size: int | None = None,
    precision: Precision = "fp32",
    compile: bool = False,
) -> SampleSet:
    """``n`` samples of a model in ``steps`` network evaluations each; sample i depends on the seed and i alone.

    Args:
        solver: "consistency" (few-step sampler) or "ode" (EDM's Heun; Euler where ``steps`` is even).
        times: noise levels of the consistency sampler, ``steps`` of them; default: the model's own.
        cond: classes ``[n]``, one-hot ``[n, num_classes]`` or embedded prompts ``[n, width]``; by default uniform
            classes, or no prompt.
        guidance: strength, as of :func:`fewstep.sample`; where it doubles the evaluations, "nfe" is twice ``steps``.
        batch_size: samples at once; changes nothing but the rounding.
        precision, compile: as of :func:`fewstep.sample`; "precision" of ``about`` where it is not fp32.

    Raises:
        ConfigError: settings that cannot be sampled with.
        DataError: (while sampling, at the latest one block later) a sample is not finite.
    """
    if solver not in SOLVERS:
        raise ConfigError(f"There is no solver '{solver}'", do=nearest(solver, SOLVERS))
    if n < 1 or steps < 1 or (batch_size is not None and batch_size < 1):
        got = f"samples {n}, steps {steps}, batch size {batch_size}"
        raise ConfigError("Samples, steps and batch size must be at least 1", got=got)
    levels = _levels(denoiser, steps, solver, times)
    if guidance is not None:
        Guided(denoiser, guidance)  # refuses here what it would refuse while sampling
    cond = draw_labels(denoiser, None, n, seed) if cond is None and denoiser.num_classes else cond
    if cond is not None and len(cond) != n:
        raise ConfigError("There is not one label per sample", got=len(cond), want=n)
    size = min(n, batch_size or default_batch_size(denoiser.sample_shape, denoiser.device))
    kind = arithmetic(precision, denoiser.device)
    run = nfe_run(denoiser, steps) if levels is None else few_step_run(denoiser, times=levels)

    def blocks(part: int = 0, parts: int = 1) -> Iterator[Tensor]:
        made = blocks_of(run, denoiser, n, seed=seed, cond=cond, guidance=guidance, batch_size=size,
                         precision=precision, compile=compile, part=part, parts=parts)  # fmt: skip
        return _shown(denoiser, made, itertools.count(part * size, parts * size))

    nfe = steps * evaluations(denoiser, guidance)
    about: dict[str, Any] = {"solver": solver, "steps": steps, "nfe": nfe, "times": levels, "seed": seed}
    if guidance is not None:
        about["guidance"] = guidance
    if kind != "fp32":
        about["precision"] = kind
    shape, images = shown_shape(denoiser), makes_images(denoiser)
    labels = _classes(cond) if denoiser.num_classes else None
    return SampleSet(solver, n, shape, images, labels, about, blocks)


def _shown(denoiser: Denoiser, blocks: Iterator[Tensor], starts: Iterator[int]) -> Iterator[Tensor]:
    """Blocks as they are shown; one that is not finite is refused when the next one is asked for.

    So no block is waited for before the device has been asked for another (:func:`fewstep.overlap.ahead`).
    """
    last: tuple[int, Arriving] | None = None
    for start, x in zip(starts, blocks, strict=False):
        bad = Arriving(_bad_rows(x))
        if last is not None:
            _refuse(last[0], last[1].get())
        last = start, bad
        yield shown(denoiser, x)
    if last is not None:
        _refuse(last[0], last[1].get())


def from_source(source: Source) -> SampleSet:
    """All of a source of images made elsewhere (:func:`fewstep.open_source`), in its order, with its labels."""

    def blocks(part: int = 0, parts: int = 1) -> Iterator[Tensor]:
        return itertools.islice((block for _, block in read_blocks(source)), part, None, parts)

    labels = None if source.labels is None else torch.from_numpy(source.labels)
    about = {"solver": FILES, "steps": None, "nfe": None, "times": None, "seed": None}
    return SampleSet(source.name, len(source), tuple(source.shape), source.is_images, labels, about, blocks)


def read_blocks(source: Source, multiple: int = 1) -> Iterator[tuple[int, Tensor]]:
    """(number of its first sample, block) of a whole source in order: a multiple of ``multiple`` where that fits."""
    most = max(1, min(READ_ROWS, READ_VALUES // math.prod(source.shape)))
    size = most - most % multiple if most > multiple else most
    for start in range(0, len(source), size):
        yield start, read_rows(source, np.arange(start, min(start + size, len(source))))


def read_rows(source: Source, index: np.ndarray) -> Tensor:
    """``source.read(index)``; points that are not finite are refused.

    Raises:
        DataError: with the number of the first such sample.
    """
    block = source.read(index)
    bad = _not_finite(block)
    if len(bad):
        raise DataError(
            f"The data '{source.name}' hold values that are not finite",
            got=f"NaN or infinity in {len(bad)} of {len(block)} samples, first in number {int(index[bad[0]])}",
            do="Remove them from the data",
        )
    return block


def draw_labels(denoiser: Denoiser, source: Source | None, n: int, seed: int) -> Tensor | None:
    """What samples are to be of, drawn from the data; None for an unconditional model.

    Class indices ``[n]`` (uniform without labels), or embedded captions ``[n, width]``, which stay on the CPU.

    Raises:
        DataError: the model is told a text, and the data have no captions.
    """
    if denoiser.conditioning.parts:
        return _draw_captions(denoiser, source, n, seed)
    if denoiser.num_classes == 0:
        return None
    if source is None or source.labels is None:
        return uniform_labels(denoiser.num_classes, n, seed).to(denoiser.device)
    picked = Streams(seed).integers("evaluation/labels", torch.arange(n), len(source.labels)).numpy()
    return torch.from_numpy(source.labels[picked]).to(denoiser.device)


def _draw_captions(denoiser: Denoiser, source: Source | None, n: int, seed: int) -> Tensor:
    source = check_captions(denoiser, source)
    picked = Streams(seed).integers("evaluation/labels", torch.arange(n), len(source)).numpy()
    embedded, captions = conditions_of(source), captions_of(source)
    if embedded is not None or captions is None:
        assert embedded is not None
        return embedded.read(picked)
    return prompt_rows(denoiser, [captions[i] for i in picked])


def check_captions(denoiser: Denoiser, source: Source | None) -> Source:
    """The data, if they say what a text-conditional model is to be told.

    Raises:
        DataError: no captions, or embeddings of another shape.
    """
    embedded = None if source is None else conditions_of(source)
    if source is not None and embedded is not None:
        if embedded.width != denoiser.conditioning.width:
            raise DataError(
                f"The embeddings of '{source.name}' are not those of this model's text encoders",
                got=f"{embedded.width} numbers per row",
                want=denoiser.conditioning.width,
            )
        return source
    if source is None or captions_of(source) is None:
        named = "there are no data with captions" if source is None else f"'{source.name}' has no captions"
        raise DataError(
            f"The model is told a text for every image, and {named}",
            want='metadata.jsonl beside the images, with {"file_name": "a.png", "text": "what it shows"} in a line for '
            "each, or NAME.txt beside each image",
        )
    return source


def shown_shape(denoiser: Denoiser) -> tuple[int, ...]:
    """Shape of one sample as it is measured and shown: ``(c, h, w)`` of an image, decoded, or ``(k,)`` of a point."""
    shape = denoiser.sample_shape
    return shape if denoiser.codec is None else denoiser.codec.image_shape(shape)


def makes_images(denoiser: Denoiser) -> bool:
    """Whether samples are images; if not, they are points."""
    return len(shown_shape(denoiser)) == 3


def shown(denoiser: Denoiser, x: Tensor) -> Tensor:
    """Samples as uint8 images (or float points) where they are; latents are decoded."""
    if denoiser.codec is not None:
        return denoiser.codec.decode(x.float())
    return decode(x, denoiser.value_range) if makes_images(denoiser) else x.float()


def to_host(denoiser: Denoiser, x: Tensor) -> Tensor:
    """Samples as uint8 images (or float points) on the CPU; latents are decoded."""
    return shown(denoiser, x).cpu()


def _levels(denoiser: Denoiser, steps: int, solver: str, times: Sequence[float] | None) -> list[float] | None:
    """Noise levels of the consistency sampler; None for the ODE solver, which has its own grid."""
    if solver == "ode":
        if times is not None:
            raise ConfigError("The ode solver has its own grid of times", got=f"times={list(times)}", do="Leave it out")
        return None
    if times is None:
        return few_step_times(denoiser, steps)
    levels = check_times(times, denoiser)
    if len(levels) != steps:
        raise ConfigError("There is not one sampling time per step", got=f"{len(levels)} times", want=f"{steps}")
    return levels


def _classes(cond: Tensor | None) -> Tensor | None:
    if cond is None:
        return None
    return (cond.argmax(1) if cond.ndim == 2 else cond).long().cpu()


def uniform_labels(classes: int, n: int, seed: int) -> Tensor:
    """Class indices ``[n]``, int64, each class as likely: number i depends on the seed and i alone."""
    return Streams(seed).integers("evaluation/labels", torch.arange(n), classes)


def _bad_rows(x: Tensor) -> Tensor:
    """Which rows hold NaN or infinity, bool ``[b]``, on the device."""
    if not x.is_floating_point():
        return torch.zeros(len(x), dtype=torch.bool, device=x.device)
    return ~torch.isfinite(x.flatten(1)).all(1)


def _not_finite(x: Tensor) -> Tensor:
    """Row numbers with NaN or infinity."""
    return _bad_rows(x).nonzero().flatten()


def check_finite(x: Tensor, start: int) -> None:
    """Refuse samples, number ``start`` and on, that hold NaN or infinity.

    Raises:
        DataError: with the number of the first such sample.
    """
    _refuse(start, _bad_rows(x).cpu())


def _refuse(start: int, bad: Tensor) -> None:
    """Refuse a block whose rows ``bad [b]``, on the CPU, are not finite."""
    numbers = bad.numpy().nonzero()[0]
    if len(numbers):
        raise DataError(
            "Some samples are not finite",
            got=f"NaN or infinity in {len(numbers)} of {len(bad)}, first in number {start + int(numbers[0])}",
            do="The model has diverged or overflows in half precision: take an earlier checkpoint, or float32",
        )
