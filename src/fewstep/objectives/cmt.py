"""Consistency mid-training (Hu et al., arXiv 2509.24526): the teacher's sampled trajectories, learned directly."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fewstep.denoiser import Denoiser
from fewstep.errors import ConfigError
from fewstep.jumps import euler_step, heun_step
from fewstep.objectives.base import ALONE, Beside, LossOutput, Objective, StepRandom, to_device
from fewstep.objectives.bridges import require_teacher
from fewstep.objectives.feature_distance import FeatureDistance
from fewstep.objectives.pairs import network_pass
from fewstep.penalty import Penalty
from fewstep.randomness import DropoutTape
from fewstep.sampling import karras_grid
from fewstep.types import Batch, Condition, PerSample, Progress, Samples


@dataclass(frozen=True)
class CMT(Objective):
    """``w(t_i) rho(f(x_i, t_i) - x_end)``: every node x_i of a teacher's trajectory from ``T z`` is told where it ends.

    A stage before ECT or another objective: its student is a consistency model already, as good as the teacher's
    sampler at this number of nodes, and ``tune`` takes it from there at a large q^a.

    ``nodes`` consecutive images of the run (by global index) share one trajectory, one node each: the noise is the
    group's first image's, the label that of its first row in the micro-batch. Images serve for labels and shapes only.
    So without labels each row's loss depends on its index alone (G6 holds); with labels, as long as micro-batches
    begin at multiples of ``nodes``. A trajectory that two micro-batches share is computed twice: for cost, too, make
    them multiples. Then it is about two evaluations of the teacher per row (Heun), in 2 ``nodes`` small passes.

    The published code solves with DPM-Solver++ (16 nodes, even in log t, down to t = 0.002), starts from noised data,
    and measures by LPIPS (``distance``), L2 or squared L2, with weight 1. Here the last step lands at 0, on D.

    Args:
        nodes: solver steps, and trajectory points that are learned from.
        solver: "heun" (second order, two evaluations) or "euler" (first order, one).
        low: the lowest node, in units of noise; the highest is the model's sigma_max. EDM's spacing between.
        penalty: distance and weight (t - r is t).
        distance: measures in feature space instead.
    """

    nodes: int = 16
    solver: Literal["heun", "euler"] = "heun"
    low: float = 0.002
    penalty: Penalty = field(default_factory=lambda: Penalty("l2", "one"))
    distance: FeatureDistance | None = None
    kind: ClassVar[str] = "cmt"

    def __post_init__(self) -> None:
        if self.nodes < 2:
            raise ConfigError("A trajectory needs at least 2 nodes", got=self.nodes)
        if not self.low > 0:
            raise ConfigError("The lowest node of a trajectory must have some noise", got=self.low, want="low > 0")

    @property
    def needs_teacher(self) -> bool:
        return True

    @property
    def features(self) -> str | None:
        return None if self.distance is None else self.distance.net

    def levels(self, student: Denoiser) -> list[float]:
        """Noise levels of the nodes, largest first, and the final 0."""
        return karras_grid(self.nodes, max(self.low, student.sigma_min), student.sigma_max)

    def prepare(self, student: Denoiser) -> CMT:
        if not max(self.low, student.sigma_min) < student.sigma_max:
            raise ConfigError(
                "The lowest node is above the highest", got=self.low, want=f"below the model's {student.sigma_max:g}"
            )
        return self

    def loss(
        self, student: Denoiser, batch: Batch, progress: Progress, random: StepRandom, beside: Beside = ALONE
    ) -> LossOutput:
        """Loss per sample ``[b]``; ``student`` under the EDM clock, in training mode."""
        groups = random.groups(self.nodes)
        z = groups.random.normal("noise", batch.x)
        first, member = (v.to(z.device, non_blocking=True) for v in (groups.first, groups.member))
        cond = None if batch.cond is None else batch.cond[first]
        return LossOutput(self.loss_at(student, z, member, groups.place, cond, random.tape(), beside))

    def loss_at(
        self,
        student: Denoiser,
        z: Samples,
        member: Tensor,
        place: Tensor,
        cond: Condition | None = None,
        tape: DropoutTape | None = None,
        beside: Beside = ALONE,
    ) -> PerSample:
        """The loss on nodes of explicit trajectories, ``[b]``.

        Args:
            z: standard noise, one per trajectory, ``[g, ...]``; cond: their labels ``[g, num_classes]`` or None.
            member: each row's trajectory, int64 ``[b]``, on the device.
            place: its node, 0 the noisiest, int64 ``[b]``, on the host.
        """
        levels = self.levels(student)
        states, end = self.trajectories(require_teacher(beside.teacher), z, levels, cond)
        t = to_device(torch.tensor(levels, dtype=torch.float64)[place], z)
        node = place.to(z.device, non_blocking=True)
        labels = None if cond is None else cond[member]
        out = network_pass(student, states[node, member], t, labels, tape and tape.record())
        if self.distance is not None:
            return self.distance(self.penalty, out, end[member], t, t, student.sigma_data, beside.features)
        return self.penalty(out - end[member], t, t, student.sigma_data)

    @torch.no_grad()
    def trajectories(
        self, teacher: Denoiser, z: Samples, levels: list[float], cond: Condition | None = None
    ) -> tuple[Samples, Samples]:
        """States at the nodes, ``[nodes, g, ...]``, and where they end, ``[g, ...]``."""
        ones = to_device(torch.ones(len(z), dtype=torch.float64), z)
        states = [levels[0] * z]
        for t, r in itertools.pairwise(levels):
            step = heun_step if self.solver == "heun" and r > 0 else euler_step
            states.append(step(teacher, states[-1], t * ones, r * ones, cond))
        return torch.stack(states[:-1]), states[-1]
