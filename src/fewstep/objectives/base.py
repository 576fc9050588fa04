"""What every objective is: a frozen choice of clocks, bridge, target and penalty."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from fewstep.denoiser import Denoiser, Sampler
from fewstep.randomness import DropoutTape, Streams
from fewstep.types import Batch, PerSample, Progress

Features: TypeAlias = Callable[[Tensor], list[Tensor]]
"""Images ``[b, ...]`` in model space -> feature maps, each ``[b, ...]``, differentiable."""


@dataclass(frozen=True)
class LossOutput:
    """``per_sample [b]`` (whose mean over the global batch is minimised) and detached ``logs``."""

    per_sample: PerSample
    logs: dict[str, Tensor | float] = field(default_factory=dict)


class Execution:
    """How the part of a loss that knows only device tensors is run: as it is. A compiling one derives from this."""

    def __call__(self, function: Callable[..., Tensor], *arguments: Any) -> Tensor:
        """``function(*arguments)``."""
        return function(*arguments)

    def begin(self) -> None:
        """A pass begins: results of the last one are no longer needed."""

    def rows(self, count: int, batch: int) -> int:
        """How many rows the target pass takes where ``count`` of ``batch`` need it; more than that keep shapes few."""
        return count


AS_IT_IS = Execution()


@dataclass(frozen=True)
class Beside:
    """The networks beside the student; only ``extra`` is trained with it.

    Args:
        teacher: the diffusion model that was given, frozen, in eval mode, under the EDM clock.
        companions: frozen networks that follow the student, by name; in training mode, like the student.
        extra: the objective's own parameters (a learned weight, a coupling network).
        features: the feature net of a distance in feature space.
        execute: runs the part of the loss that can be compiled.
        memory: what an objective keeps from step to step; without it everything is computed again, to the same bits.
    """

    teacher: Denoiser | None = None
    companions: Mapping[str, Denoiser] = field(default_factory=dict)
    extra: nn.Module | None = None
    features: Features | None = None
    execute: Execution = AS_IT_IS
    memory: dict[str, tuple[object, Tensor]] = field(default_factory=dict)


ALONE = Beside()
"""No network but the student."""


class StepRandom:
    """The random numbers of one step's rows, addressed by global image index.

    Args:
        streams: the run's streams.
        index: global training-image index per row, int64 ``[b]``, on the host.
        device: where noise and masks are needed.
        window: indices of all rows of the steps around this one that share what is computed ahead
            (:meth:`Objective.horizon`), int64, on the host; the same for each of these steps. None is ``index``.
    """

    def __init__(self, streams: Streams, index: Tensor, device: torch.device, window: Tensor | None = None) -> None:
        self._streams, self._index = streams, index
        self._window = index if window is None else window
        self._on_device = index.to(device, non_blocking=True)

    def uniform(self, stream: str) -> Tensor:
        """Uniform numbers on the host, float64 ``[b]``: for laws of t."""
        return self._streams.uniform(stream, self._index)

    def normal(self, stream: str, like: Tensor) -> Tensor:
        """Standard normal noise like ``like [b, ...]``, drawn on its device."""
        return self._streams.normal(stream, self._on_device, tuple(like.shape[1:]), like.dtype)

    def tape(self) -> DropoutTape:
        """A fresh dropout tape for these rows."""
        return DropoutTape(self._streams, self._on_device)

    def groups(self, size: int, ahead: bool = False) -> Groups:
        """These rows in groups of ``size`` consecutive images of the run: how they group depends on no batch.

        With ``ahead`` all groups of the window are there, whose ``first`` rows are not known.
        """
        index = self._index.numpy()
        present, first, member = np.unique(index // size, return_index=True, return_inverse=True)
        if ahead:
            present = np.unique(self._window.numpy() // size)
            first, member = np.zeros(0, np.int64), np.searchsorted(present, index // size)
        heads = StepRandom(self._streams, torch.from_numpy(present * size), self._on_device.device)
        return Groups(heads, *(torch.from_numpy(v) for v in (first, member, index % size)))

    @property
    def index(self) -> Tensor:
        """Global training-image index per row, int64 ``[b]``, on the host."""
        return self._index


@dataclass(frozen=True)
class Groups:
    """Rows that share something.

    Args:
        random: the numbers of each group's first image, ``g`` rows, whether that image is here or not.
        first: the first row here of each group, int64 ``[g]``, on the host.
        member, place: each row's group and its place in it, int64 ``[b]``, on the host.
    """

    random: StepRandom
    first: Tensor
    member: Tensor
    place: Tensor


class Objective:
    """A training objective: a frozen dataclass, all schedules pure functions of the progress.

    A new one is one file with a frozen dataclass that derives from this class, and one line in ``OBJECTIVES``. Only
    ``kind`` and ``loss`` are required; the rest has defaults that suit a one-time student without a teacher.
    """

    kind: ClassVar[str]
    variants: ClassVar[Mapping[str, type[Objective]]] = {}
    """The registry, for reading a configuration: ``OBJECTIVES`` itself."""

    def loss(
        self, student: Denoiser, batch: Batch, progress: Progress, random: StepRandom, beside: Beside = ALONE
    ) -> LossOutput:
        """Loss per sample ``[b]``; gradients flow through the student's own pass (and ``beside.extra``) only."""
        raise NotImplementedError

    def horizon(self, student: Denoiser) -> int:
        """Of how many images (some steps) it wants to compute something at once; 0 for none.

        The window that :class:`StepRandom` then knows begins at a multiple of its own length, so that a resumed run
        computes the same.
        """
        return 0

    def tightness(self, progress: Progress) -> float | None:
        """q^a: how many gaps t - r there are between t and 0; 1 where the target is given, None where it is not known.

        The rounding of the outputs matters by this factor, so it decides in which arithmetic a step may run.
        """
        return None

    def describe(self, progress: Progress) -> dict[str, float]:
        """Numbers for the progress bar and the log: stage, typical r/t, ..."""
        return {}

    @property
    def needs_teacher(self) -> bool:
        """Whether ``beside.teacher`` is used."""
        return False

    @property
    def compiles(self) -> bool:
        """Whether its loss hands what can be compiled to ``beside.execute``."""
        return False

    @property
    def two_time(self) -> bool:
        """Whether the student is told its landing time s."""
        return False

    @property
    def guides(self) -> bool:
        """Whether a teacher is asked what it does without the condition, too."""
        legs = [getattr(self, name, None) for name in ("bridge", "step")]
        return any(getattr(leg, "guidance", 1) != 1 or getattr(leg, "guidance_max", None) is not None for leg in legs)

    @property
    def guidance_range(self) -> tuple[float, float] | None:
        """Between which strengths of guidance w lies where the student is told it; None where it is not told."""
        return None

    @property
    def features(self) -> str | None:
        """The feature net of a distance in feature space, as ``fewstep eval --features`` names it."""
        return None

    def sampler(self, student: Denoiser) -> tuple[Sampler, dict[int, tuple[float, ...]]]:
        """How the trained student is sampled, "consistency" or "jump", and noise levels by step count."""
        return "consistency", {}

    def companions(self) -> tuple[str, ...]:
        """Names of the frozen copies of the student that :meth:`follow` moves."""
        return ()

    def follow(self, name: str, progress: Progress, batch_size: int) -> tuple[str, float]:
        """After the step that ended at ``progress``: which network ("student" or a companion) the companion follows,
        and the decay beta of ``companion <- beta companion + (1 - beta) followed``; 1 keeps it, 0 copies."""
        raise NotImplementedError

    def extra(self, student: Denoiser) -> nn.Module | None:
        """Parameters that are trained beside the student; the trainer seeds their initialisation."""
        return None

    def prepare(self, student: Denoiser) -> Objective:
        """Before the first step: refuse what would fail later, and settle choices called "auto"."""
        return self


def to_device(values: Tensor, like: Tensor) -> Tensor:
    """Host float64 times ``[b]`` in the dtype and on the device of ``like``, without waiting."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return values.to(device=like.device, dtype=dtype, non_blocking=True)
