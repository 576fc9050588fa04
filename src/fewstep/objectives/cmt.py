"""Consistency mid-training (Hu et al., arXiv 2509.24526): the teacher's sampled trajectories, learned directly."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fewstep.denoiser import Denoiser, Sampler
from fewstep.errors import ConfigError
from fewstep.inference import default_batch_size
from fewstep.jumps import euler_step, heun_step, inv_ddim
from fewstep.objectives.base import (
    ALONE,
    AS_IT_IS,
    Beside,
    Execution,
    Groups,
    LossOutput,
    Objective,
    StepRandom,
    to_device,
)
from fewstep.objectives.bridges import require_teacher
from fewstep.objectives.feature_distance import FeatureDistance
from fewstep.objectives.pairs import network_pass
from fewstep.penalty import Penalty
from fewstep.randomness import DropoutTape
from fewstep.sampling import karras_grid
from fewstep.segments import Axis, axis_of
from fewstep.types import Batch, Condition, PerSample, Progress, Samples, Times

MOST = (64, 256)
"""Trajectories at a time on a CPU and on a GPU."""


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
        segments: where rows land. (1,) is the end, as published. With S > 1 it is the lower edge of the node's segment,
            of S equal ones; of several counts each row draws one, and the student is told where (ours; experimental).
    """

    nodes: int = 16
    solver: Literal["heun", "euler"] = "heun"
    low: float = 0.002
    penalty: Penalty = field(default_factory=lambda: Penalty("l2", "one"))
    distance: FeatureDistance | None = None
    segments: tuple[int, ...] = (1,)
    kind: ClassVar[str] = "cmt"

    def __post_init__(self) -> None:
        if self.nodes < 2:
            raise ConfigError("A trajectory needs at least 2 nodes", got=self.nodes)
        if not self.low > 0:
            raise ConfigError("The lowest node of a trajectory must have some noise", got=self.low, want="low > 0")

        if not self.segments or min(self.segments) < 1 or any(self.nodes % count for count in self.segments):
            raise ConfigError(
                "The nodes of a trajectory must contain the edges of its segments",
                got=f"{self.nodes} nodes, segments {self.segments}",
                want="counts of segments that divide the number of nodes, for example 1, 2, 4, 8 and 16 nodes",
            )

    @property
    def needs_teacher(self) -> bool:
        return True

    @property
    def compiles(self) -> bool:
        return True

    @property
    def lands_early(self) -> bool:
        """Whether some rows land above time 0."""
        return self.segments != (1,)

    @property
    def two_time(self) -> bool:
        return len(set(self.segments)) > 1

    def sampler(self, student: Denoiser) -> tuple[Sampler, dict[int, tuple[float, ...]]]:
        if not self.lands_early:
            return "consistency", {}
        axis = self.axis(student)
        return "jump", {count: axis.levels(count) for count in sorted(set(self.segments))}

    def axis(self, student: Denoiser) -> Axis:
        """EDM's spacing of noise levels, between those the student knows."""
        return axis_of("karras", student.sigma_data, student.sigma_min, student.sigma_max)

    @property
    def features(self) -> str | None:
        return None if self.distance is None else self.distance.net

    def levels(self, student: Denoiser) -> list[float]:
        """Noise levels of the nodes, largest first, and the final 0."""
        if self.lands_early:
            return self.axis(student).edges(self.nodes).flip(0).tolist()
        return karras_grid(self.nodes, max(self.low, student.sigma_min), student.sigma_max)

    def tightness(self, progress: Progress) -> float | None:
        return 1.0

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
        end = self.landing_nodes(random.index % self.nodes, random.uniform("segments"))
        ahead = batch.cond is None  # the labels of later batches are not known
        groups = random.groups(self.nodes, ahead)
        first, member = (v.to(batch.x.device, non_blocking=True) for v in (groups.first, groups.member))
        cond = None if batch.cond is None else batch.cond[first]
        if not ahead or not self._remembered(groups, beside):
            z = groups.random.normal("noise", batch.x)
            teacher, levels = require_teacher(beside.teacher), self.levels(student)
            states = self.trajectories(teacher, z, levels, cond, beside.execute)
            beside.memory["trajectories"] = (groups.random.index.tolist(), states)
        states = beside.memory["trajectories"][1]
        labels = None if cond is None else cond[member]
        loss = self.loss_on(student, states, member, groups.place, labels, random.tape(), beside, end)
        return LossOutput(loss)

    @staticmethod
    def _remembered(groups: Groups, beside: Beside) -> bool:
        """Whether the trajectories of the window are those that were computed last."""
        known = beside.memory.get("trajectories")
        return known is not None and known[0] == groups.random.index.tolist()

    def horizon(self, student: Denoiser) -> int:
        """Networks are fast on many rows, and a batch has few trajectories: those of some steps go together."""
        size = default_batch_size(student.sample_shape, student.device)
        return self.nodes * min(size, MOST[student.device.type == "cuda"])

    def landing_nodes(self, place: Tensor, u: Tensor) -> Tensor:
        """The node where each row lands, int64 ``[b]``: its segment's lower edge, for a count that ``u [b]`` draws."""
        counts = torch.tensor(self.segments)[(u * len(self.segments)).long().clamp_max(len(self.segments) - 1)]
        length = self.nodes // counts
        return (place // length + 1) * length

    def loss_at(
        self,
        student: Denoiser,
        z: Samples,
        member: Tensor,
        place: Tensor,
        cond: Condition | None = None,
        tape: DropoutTape | None = None,
        beside: Beside = ALONE,
        landing: Tensor | None = None,
    ) -> PerSample:
        """The loss on nodes of explicit trajectories, ``[b]``.

        Args:
            z: standard noise, one per trajectory, ``[g, ...]``; cond: their labels ``[g, num_classes]`` or None.
            member: each row's trajectory, int64 ``[b]``, on the device.
            place: its node, 0 the noisiest, int64 ``[b]``, on the host.
            landing: the node where it lands, int64 ``[b]``, on the host; default: the end.
        """
        states = self.trajectories(require_teacher(beside.teacher), z, self.levels(student), cond, beside.execute)
        labels = None if cond is None else cond[member]
        return self.loss_on(student, states, member, place, labels, tape, beside, landing)

    def loss_on(
        self,
        student: Denoiser,
        states: Samples,
        member: Tensor,
        place: Tensor,
        labels: Condition | None = None,
        tape: DropoutTape | None = None,
        beside: Beside = ALONE,
        landing: Tensor | None = None,
    ) -> PerSample:
        """The loss on nodes of trajectories that are known: ``states [nodes + 1, g, ...]``, labels per row."""
        landing = torch.full_like(place, self.nodes) if landing is None else landing
        levels = torch.tensor(self.levels(student), dtype=torch.float64)
        t, s = (to_device(levels[node], states) for node in (place, landing))
        here, there = (states[node.to(states.device, non_blocking=True), member] for node in (place, landing))
        return beside.execute(self.loss_between, student, here, there, t, s, labels, tape, beside)

    def loss_between(
        self,
        student: Denoiser,
        here: Samples,
        there: Samples,
        t: Times,
        s: Times,
        cond: Condition | None = None,
        tape: DropoutTape | None = None,
        beside: Beside = ALONE,
    ) -> PerSample:
        """The loss once the trajectories are known: states ``here`` at t that are to land where ``there`` is, at s."""
        out = network_pass(student, here, t, cond, tape and tape.record(), s if self.two_time else None)
        goal = inv_ddim(there, here, t, s)
        if self.distance is not None:
            return self.distance(self.penalty, out, goal, t, t, student.sigma_data, beside.features)
        return self.penalty(out - goal, t, t, student.sigma_data)

    @torch.no_grad()
    def trajectories(
        self,
        teacher: Denoiser,
        z: Samples,
        levels: list[float],
        cond: Condition | None = None,
        execute: Execution = AS_IT_IS,
    ) -> Samples:
        """States at the nodes and at the end, ``[nodes + 1, g, ...]``."""
        ones = to_device(torch.ones(len(z), dtype=torch.float64), z)
        states = [levels[0] * z]
        for t, r in itertools.pairwise(levels):
            step = heun_step if self.solver == "heun" and r > 0 else euler_step
            states.append(execute(step, teacher, states[-1], t * ones, r * ones, cond))
        return torch.stack(states)
