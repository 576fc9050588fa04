"""Two objectives one after the other in one run: mid-training, then consistency tuning."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

from fewstep.denoiser import Denoiser, Sampler
from fewstep.errors import ConfigError
from fewstep.objectives.base import ALONE, Beside, LossOutput, Objective, StepRandom
from fewstep.types import Batch, Progress


@dataclass(frozen=True)
class Sequence(Objective):
    """``first`` for a share of the run, ``then`` for the rest; each takes its own part of the run for the whole.

    The student is the one that ``then`` trains: its landing time, its sampler. Companions of ``then`` begin as the
    student is when it takes over. The optimiser, its learning rate and the averages go on.

    Args:
        first, then: the two objectives, by default mid-training (arXiv 2509.24526) and ECT; neither may bring
            parameters of its own.
        share: of the run, for ``first``.
    """

    first: Objective = field(default_factory=lambda: Objective.variants["cmt"]())
    then: Objective = field(default_factory=lambda: Objective.variants["ect"]())
    share: float = 0.5
    kind: ClassVar[str] = "sequence"

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ConfigError("The first objective's share of the run must lie in (0, 1)", got=self.share)

    def part(self, progress: Progress) -> tuple[str, Progress]:
        """Which part the step that starts at ``progress`` belongs to, "first" or "then", and the progress within it."""
        seen, total = progress.images_seen, progress.total_images
        switch = round(self.share * total)
        return ("first", Progress(seen, switch)) if seen < switch else ("then", Progress(seen - switch, total - switch))

    @property
    def needs_teacher(self) -> bool:
        return self.first.needs_teacher or self.then.needs_teacher

    @property
    def compiles(self) -> bool:
        return self.first.compiles or self.then.compiles

    @property
    def two_time(self) -> bool:
        return self.then.two_time

    @property
    def guides(self) -> bool:
        return self.first.guides or self.then.guides

    @property
    def guidance_range(self) -> tuple[float, float] | None:
        return self.then.guidance_range

    @property
    def features(self) -> str | None:
        return self.first.features or self.then.features

    def sampler(self, student: Denoiser) -> tuple[Sampler, dict[int, tuple[float, ...]]]:
        return self.then.sampler(student)

    def companions(self) -> tuple[str, ...]:
        return tuple(f"{part}-{name}" for part in ("first", "then") for name in getattr(self, part).companions())

    def follow(self, name: str, progress: Progress, batch_size: int) -> tuple[str, float]:
        owner, _, own = name.partition("-")
        taken, inside = self.part(replace(progress, images_seen=progress.images_seen - batch_size))
        if taken != owner:  # those of ``then`` wait for the last step of ``first``
            return "student", 0.0 if owner == "then" and self.part(progress)[0] == "then" else 1.0
        after = replace(inside, images_seen=min(inside.images_seen + batch_size, inside.total_images))
        followed, beta = getattr(self, owner).follow(own, after, batch_size)
        return followed if followed == "student" else f"{owner}-{followed}", beta

    def prepare(self, student: Denoiser) -> Sequence:
        """Both parts' own checks.

        Raises:
            ConfigError: the two do not train the same kind of student, or one brings parameters.
        """
        if self.first.two_time and not self.then.two_time:
            raise ConfigError(
                "The first objective tells the student where to land, and the second one does not",
                got=f"{self.first.kind}, then {self.then.kind}",
                do="Choose two that land at 0, or two that land on segments",
            )
        if self.first.guidance_range not in (None, self.then.guidance_range):
            raise ConfigError(
                "The first objective tells the student other strengths of guidance than the second one",
                got=f"{self.first.guidance_range}, then {self.then.guidance_range}",
                do="Set the same objective.first.bridge.guidance_max and objective.then.bridge.guidance_max",
            )
        for part in (self.first, self.then):
            if part.extra(student) is not None:
                raise ConfigError(
                    "An objective with parameters of its own cannot be part of a sequence",
                    got=part.kind,
                    do="Make two runs: the second one starts from the first with --set student.start=RUN",
                )
        return replace(self, first=self.first.prepare(student), then=self.then.prepare(student))

    def loss(
        self, student: Denoiser, batch: Batch, progress: Progress, random: StepRandom, beside: Beside = ALONE
    ) -> LossOutput:
        """Loss per sample ``[b]`` of the part that ``progress`` is in."""
        name, inside = self.part(progress)
        own = {k.removeprefix(f"{name}-"): v for k, v in beside.companions.items() if k.startswith(f"{name}-")}
        objective: Objective = getattr(self, name)
        return objective.loss(student, batch, inside, random, replace(beside, companions=own))

    def horizon(self, student: Denoiser) -> int:
        return max(self.first.horizon(student), self.then.horizon(student))

    def tightness(self, progress: Progress) -> float | None:
        name, inside = self.part(progress)
        return getattr(self, name).tightness(inside)

    def describe(self, progress: Progress) -> dict[str, float]:
        """The numbers of the current part, and which it is: 1 or 2."""
        name, inside = self.part(progress)
        return {"part": 1.0 + (name == "then")} | getattr(self, name).describe(inside)
