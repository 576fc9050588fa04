"""Data that a diffusion model makes itself, so that it can be tuned without its training data.

Sample i is EDM's Heun solver (Euler where the number of evaluations is even) from noise that depends on the seed and on
i alone, of class ``i mod num_classes``: the same whether it is kept in shards or made when a step asks for it. The
noise has streams of its own, so an evaluation with the same seed draws other samples.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.checkpoint.model import describe, weights_hash
from fewstep.data import Source, open_source
from fewstep.data.shard_source import LABELS, SAMPLES, ShardSource
from fewstep.data.shards import Shards, ShardWriter, open_shards
from fewstep.data.sources import ArraySource, View
from fewstep.denoiser import Denoiser
from fewstep.errors import ConfigError, DataError
from fewstep.evaluation.samples import check_finite, makes_images
from fewstep.guidance import Guided
from fewstep.levels import decode
from fewstep.process import EDM
from fewstep.randomness import Streams
from fewstep.sampling import Model, default_batch_size, heun_sample, karras_grid
from fewstep.training.config import RunConfig

TEACHER = "teacher"
"""The source that is the teacher's own samples, made when they are needed: ``teacher``, or ``teacher:NFE``."""

NFE = 35
"""Evaluations per sample where nothing else is asked for: EDM's 18 nodes."""

DIFFERENT = 2**20
"""How many samples the teacher makes for training; after these come the same ones, in another order."""

_SIGMA_MIN = 0.002
_MADE = "samples of a diffusion model"

OnProgress = Callable[[int, int], None]
"""Called with the samples that are done, and all."""


@dataclass(frozen=True)
class Sampler:
    """A diffusion model's own samples, by number.

    Args:
        teacher: frozen, in eval mode; nobody else may switch its mode meanwhile.
        nfe: evaluations per sample (guided: twice as many); odd is Heun, even Euler.
        seed: of the noise.
        guidance: strength of classifier-free guidance; None is none.
        batch_size: samples at once; changes nothing but the rounding.

    Raises:
        ConfigError: numbers below 1, a text-conditional or a few-step model, or guidance without classes.
    """

    teacher: Denoiser
    nfe: int = NFE
    seed: int = 0
    guidance: float | None = None
    batch_size: int | None = None

    def __post_init__(self) -> None:
        if self.nfe < 1 or (self.batch_size is not None and self.batch_size < 1):
            got = f"{self.nfe} evaluations, batch size {self.batch_size}"
            raise ConfigError("Samples need at least one evaluation, and one at a time", got=got)
        if self.teacher.conditioning.parts:
            raise ConfigError(
                "Samples of a text-conditional model need prompts, which this cannot take yet",
                do="Give the training data: --data SOURCE",
            )
        if self.teacher.two_time or self.teacher.guided or self.teacher.sampler == "jump":
            raise ConfigError("This is a few-step model, and the samples are to be a diffusion model's")
        if self._guided and not self.teacher.conditioning:
            raise ConfigError("Guidance needs a class-conditional model", got=f"guidance {self.guidance}")

    @property
    def _guided(self) -> bool:
        return self.guidance is not None and self.guidance != 1

    @property
    def is_images(self) -> bool:
        """Whether samples are kept as bytes: those of a model of pixels."""
        return self.teacher.codec is None and makes_images(self.teacher)

    @property
    def key(self) -> dict[str, Any]:
        """All that a sample depends on beside its number, JSON-able."""
        teacher = self.teacher
        return {
            "made": _MADE, "teacher": weights_hash(teacher), "meaning": _meaning(teacher),
            "sigma_max": teacher.sigma_max, "num_classes": teacher.num_classes,
            "solver": "heun" if self.nfe % 2 else "euler", "nfe": self.nfe,
            "guidance": self.guidance if self._guided else None, "seed": self.seed,
        }  # fmt: skip

    def labels(self, index: np.ndarray) -> np.ndarray | None:
        """Classes of samples ``index``, int64 ``[b]``; None for an unconditional model."""
        return index.astype(np.int64) % self.teacher.num_classes if self.teacher.num_classes else None

    @torch.no_grad()
    def samples(self, index: np.ndarray) -> Tensor:
        """Samples ``index`` on the CPU: uint8 images, or float32 in model space.

        Raises:
            DataError: a sample is not finite.
        """
        edm = self.teacher.under(EDM())
        model: Model = edm if not self._guided else Guided(edm, self.guidance or 1.0)
        steps, order = ((self.nfe + 1) // 2, 2) if self.nfe % 2 else (self.nfe, 1)
        grid = karras_grid(steps, max(_SIGMA_MIN, edm.sigma_min), edm.sigma_max)
        size = self.batch_size or default_batch_size(edm.sample_shape, edm.device)
        numbers, classes = torch.from_numpy(np.asarray(index, dtype=np.int64)), self.labels(np.asarray(index))
        parts = []
        for rows in (slice(start, start + size) for start in range(0, len(numbers), size)):
            where = numbers[rows].to(edm.device)
            latents = Streams(self.seed).normal("synthetic/latent", where, edm.sample_shape, edm.dtype)
            cond = None if classes is None else torch.from_numpy(classes)[rows].to(edm.device)
            x = heun_sample(model, latents, grid, cond=cond, order=order)
            check_finite(x, int(where[0]))
            parts.append((decode(x, edm.value_range) if self.is_images else x.float()).cpu())
        return torch.cat(parts) if parts else torch.empty(0, *edm.sample_shape)


class TeacherSource:
    """The teacher's own samples as a source: reading a row makes it.

    A pure function of the row's number, with a copy of the network of its own, so it can be read in any thread while
    another copy trains, and by several processes.

    Args:
        teacher: the diffusion model; copied.
        device: where it works.
        nfe, seed: see :class:`Sampler`.
        view: only what the model makes can be asked for.

    Raises:
        ConfigError, DataError: see :class:`Sampler`; a view that the model does not make.
    """

    def __init__(
        self, teacher: Denoiser, device: torch.device | str, *, nfe: int = NFE, seed: int = 0, view: View | None = None
    ) -> None:
        view = view or View()
        self.name = TEACHER if nfe == NFE else f"{TEACHER}:{nfe}"
        view.only_train(self.name)
        self.shape = teacher.sample_shape
        asked = {"--resize": (view.resize, self.shape[-1]), "--channels": (view.channels, self.shape[0])}
        for option, (value, own) in asked.items():
            if value not in (None, own):
                raise DataError("The teacher's samples are as they are", got=f"{option} {value}", want=f"{own}")
        self.sampler = Sampler(teacher.clone().to(device).eval().requires_grad_(False), nfe, seed)
        self.is_images = self.sampler.is_images
        self.labels = self.sampler.labels(np.arange(DIFFERENT)) if view.labels else None
        self.num_classes = teacher.num_classes if self.labels is not None else 0
        told = json.dumps([self.sampler.key, self.num_classes, DIFFERENT], sort_keys=True)
        self.fingerprint = hashlib.sha256(told.encode()).hexdigest()
        self._standing: ArraySource | None = None

    def __len__(self) -> int:
        return DIFFERENT

    def read(self, index: np.ndarray) -> Tensor:
        """Samples at ``index``, made now: uint8 images, or float32 in model space."""
        return self.sampler.samples(index)

    def standing(self, count: int) -> Source:
        """The first ``count`` samples, made once, for what goes through all data."""
        if self._standing is None or len(self._standing) != count:
            index = np.arange(count)
            labels = None if self.labels is None else self.labels[index]
            self._standing = ArraySource(f"{self.name} ({count:,} samples)", self.read(index), labels, self.num_classes)
        return self._standing


def own_samples(spec: str) -> int | None:
    """Evaluations per sample if the source ``spec`` is the teacher itself; None if it is another.

    >>> own_samples("teacher"), own_samples("teacher:17"), own_samples("digits")
    (35, 17, None)

    Raises:
        DataError: what follows ``teacher:`` is no number.
    """
    name, colon, nfe = spec.partition(":")
    if name != TEACHER:
        return None
    if colon and not (nfe.isascii() and nfe.isdecimal() and int(nfe) > 0):
        raise DataError("The number of evaluations is not one", got=spec, want=f"{TEACHER}:{NFE}")
    return int(nfe) if colon else NFE


def teachers_own(config: RunConfig, teacher: Denoiser | None, device: torch.device) -> TeacherSource | None:
    """The source of a run that is tuned on the teacher's own samples; None for other data.

    Raises:
        ConfigError: there is no teacher, or it has no such samples.
    """
    nfe, data = own_samples(config.data.source), config.data
    if nfe is None:
        return None
    if teacher is None:
        raise ConfigError(
            f"'{data.source}' are samples of the model that is tuned, and here is none",
            do="Give the training data: --data SOURCE",
        )
    view = View(data.resize, data.channels, data.labels, data.split)
    return TeacherSource(teacher, device, nfe=nfe, seed=config.seed, view=view)


def standing(source: Source, count: int) -> Source:
    """``source``, or as many samples of it where it is made when it is needed."""
    return source.standing(max(count, 2)) if isinstance(source, TeacherSource) else source


def compared_with(config: RunConfig, source: Source) -> Source:
    """What the closing table is measured against: ``eval.data``, or the training data; standing either way.

    Raises:
        DataError: there is no such source, or its images have another shape.
    """
    if config.eval.data is None:
        return standing(source, config.eval.samples)
    data = config.data
    other = open_source(config.eval.data, resize=data.resize, channels=data.channels, split=data.split)
    if source.is_images and tuple(other.shape) != tuple(source.shape):
        raise DataError(
            f"The images of '{other.name}' (eval.data) do not have the shape of the training data",
            got=tuple(other.shape),
            want=tuple(source.shape),
            do="Add --resize or --channels, which are for both",
        )
    return other


def origin(source: Source, teacher: Denoiser | None) -> str | None:
    """A sentence's worth on data that a model made: whose samples they are; None for other data."""
    if isinstance(source, TeacherSource):
        return f"the teacher's own samples, {source.sampler.nfe} evaluations each, made when needed"
    if not isinstance(source, ShardSource) or source.key.get("made") != _MADE:
        return None
    key = source.key
    own = teacher is not None and weights_hash(teacher) == key["teacher"]
    whose = "the teacher's own samples" if own else f"samples of the diffusion model {str(key['teacher'])[:16]}"
    guided = f", guidance {key['guidance']:g}" if key["guidance"] is not None else ""
    return f"{whose}, {key['nfe']} evaluations each{guided}"


def generate(
    teacher: Denoiser,
    out: str | Path,
    n: int,
    *,
    nfe: int = NFE,
    guidance: float | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    on_progress: OnProgress | None = None,
) -> Shards:
    """Samples 0 to n - 1 of a diffusion model, kept in the folder ``out`` as a source to tune from (``shards:OUT``).

    A stop keeps what was made; calling it again with the same ``batch_size`` goes on to the same bits. A larger n
    extends a finished set.

    Args:
        teacher: the diffusion model.
        nfe: evaluations per sample (guided: twice as many); odd is Heun, even Euler.
        guidance: strength of classifier-free guidance.
        batch_size: samples at once.
        on_progress: called at the start and after each batch.

    Raises:
        ConfigError: numbers below 1, or a model that has no such samples.
        DataError: the folder holds something else, or a sample is not finite.
        StorageError: the disk refused; what was written is kept.
    """
    if n < 1:
        raise ConfigError("The number of samples must be at least 1", got=n)
    modes = {module: module.training for module in teacher.modules()}
    try:
        sampler = Sampler(teacher.eval(), nfe, seed, guidance, batch_size)
        size = batch_size or default_batch_size(teacher.sample_shape, teacher.device)
        with ShardWriter(out, sampler.key, n) as writer:
            tell = on_progress or (lambda done, total: None)
            tell(writer.done, n)
            for rows in _batches(sampler, writer.done, n, size):
                writer.add(rows)
                tell(writer.done, n)
    finally:
        for module, training in modes.items():
            module.training = training
    return open_shards(out)


def _meaning(teacher: Denoiser) -> str:
    """sha256, in hex, of what the weights mean: network, process, prediction, ranges and VAE, wherever that is."""
    about = describe(teacher)
    names = (
        "backbone",
        "process",
        "native",
        "parametrization",
        "sample_shape",
        "sigma_min",
        "sigma_max",
        "value_range",
    )
    told = {name: about[name] for name in names} | {"codec": dict(about["codec"] or {}, folder="")}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _batches(sampler: Sampler, done: int, n: int, size: int) -> Iterator[dict[str, Tensor]]:
    """Rows ``done`` to ``n - 1``, made in batches that begin at multiples of ``size``, wherever it was stopped."""
    for start in range(done - done % size, n, size):
        index = np.arange(start, min(start + size, n))
        new = slice(max(done - start, 0), None)
        rows, labels = {SAMPLES: sampler.samples(index)[new]}, sampler.labels(index[new])
        yield rows if labels is None else rows | {LABELS: torch.from_numpy(labels)}
