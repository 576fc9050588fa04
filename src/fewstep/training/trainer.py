"""The training loop as a generator: every step is a pure function of the state and the images seen."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fewstep import ema
from fewstep.arithmetic import Arithmetic, rounding, tf32
from fewstep.checkpoint.adapter import describe_base
from fewstep.checkpoint.model import describe, meaning, weights_hash
from fewstep.data import Source
from fewstep.denoiser import Denoiser
from fewstep.errors import ConfigError, NonFiniteError
from fewstep.objectives import Beside, Objective, StepRandom
from fewstep.objectives.base import Features
from fewstep.objectives.bridges import require_teacher
from fewstep.process import EDM
from fewstep.randomness import Streams
from fewstep.training.arithmetic import Scaling, arithmetic
from fewstep.training.config import RunConfig
from fewstep.training.execution import execution, lay_out
from fewstep.training.feed import Feed
from fewstep.training.frozen import base_path, frozen_names, resting_parts, sharing_copy
from fewstep.training.network import (
    after_step,
    after_steps,
    set_dropout,
    set_recomputation,
    train_mode,
    trained_parts,
    unused_parameters,
)
from fewstep.training.optim import (
    align_gradients,
    learning_rate,
    make_optimizer,
    sanitise,
    set_learning_rate,
    steps_taken,
)
from fewstep.types import Batch, Progress
from fewstep.weights import tensors_of
from fewstep.world import World

ASKING = 16
"""Steps of a run in fp16 before which the device is asked how many were skipped."""


@dataclass(frozen=True)
class StepReport:
    """What a step did: ``progress`` after it, and host numbers that cost no device read."""

    progress: Progress
    lr: float
    schedule: dict[str, float]
    arithmetic: Arithmetic


class Trainer:
    """Trains a student; owns the optimiser, the averages and the running sums of the log.

    Args:
        config: the whole configuration.
        student: the network to train, on ``world.device``; trained under the EDM clock. What the configuration leaves
            as it is (``frozen``) is one piece of memory for it, its averages and companions.
        source: the data.
        world: the processes.
        teacher: the diffusion model to follow, for objectives that need one; frozen here, in eval mode.
        features: the feature net of the objective's distance, for objectives that have one.

    Raises:
        ConfigError: the objective needs a teacher and there is none, or the network cannot do what it asks for.
    """

    def __init__(
        self,
        config: RunConfig,
        student: Denoiser,
        source: Source,
        world: World,
        teacher: Denoiser | None = None,
        features: Features | None = None,
    ) -> None:
        world.share(config.batch_size)  # refuses here, before anything is written
        self.config, self.world, self.source = config, world, source
        self.student = student.under(EDM())
        _agree(self.student, world)
        set_dropout(self.student, config.student)
        for parameter in unused_parameters(self.student):
            parameter.requires_grad_(False)
        self.frozen = frozen_names(self.student.backbone, config)
        self.resting = resting_parts(self.student.backbone, config, self.frozen)
        set_recomputation(self.student, config.speed)
        self.objective = config.objective.prepare(self.student)
        last = self.arithmetic(Progress(config.images - 1, config.images))
        lay_out([self.student, *([teacher] if teacher else [])], config.speed, last, shared=bool(self.frozen))
        after_step(self.student)
        self.averages = [_frozen_copy(self.student, self.frozen) for _ in config.emas]
        self.beside = self._company(teacher, features)
        self.trained = trained_parts(self.student, self.beside.extra)
        self.optimizer = make_optimizer(self.trained, config.optim)
        self.images_seen = 0
        self.scaling = Scaling(world.device)
        self.sums = torch.zeros(4, dtype=torch.float64, device=world.device)
        """Since the last log row: loss, gradient norm, how many were not finite, and how many steps fp16 skipped."""
        self.summed_steps = 0
        self._after_step = after_steps(self.student)
        self._horizon = self.objective.horizon(self.student)
        self._streams = Streams(config.seed)
        self._module = _LossModule(self.student, self.objective, self.beside)
        self._wrapped: nn.Module = self._module
        if world.size > 1:
            self._wrapped = DistributedDataParallel(self._module, broadcast_buffers=False)

    def _company(self, teacher: Denoiser | None, features: Features | None) -> Beside:
        """The networks beside the student, on its device."""
        device, objective = self.world.device, self.objective
        frozen = None
        if objective.needs_teacher:
            model = _diffusion_model(require_teacher(teacher))
            frozen = _frozen_copy(model, tensors_of(model.backbone)).to(device).under(EDM())
        companions = {name: _frozen_copy(self.student, self.frozen) for name in objective.companions()}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            extra = objective.extra(self.student)
        execute = execution(self.config, objective, device)
        return Beside(frozen, companions, None if extra is None else extra.to(device), features, execute)

    def arithmetic(self, progress: Progress) -> Arithmetic:
        """In which arithmetic the step runs that starts at ``progress``."""
        return arithmetic(self.config.precision, self.objective.tightness(progress), self.world.device)

    @property
    def progress(self) -> Progress:
        """The clock."""
        return Progress(self.images_seen, self.config.images)

    @cached_property
    def base_record(self) -> dict[str, Any]:
        """``base``: what a checkpoint says of the tensors that the run leaves as they are; empty without any."""
        if not self.frozen:
            return {}
        backbone = self.student.backbone
        kept = {name: tensor for name, tensor in backbone.state_dict().items() if name in self.frozen}
        return {"base": describe_base(backbone, kept, base_path(self.config))}

    @cached_property
    def followed(self) -> str | None:
        """sha256, in hex, of weights and meaning of the teacher that the objective follows; None without one.

        Data that are the teacher's own samples say whose they are in their fingerprint.
        """
        teacher = self.beside.teacher
        if teacher is None:
            return None
        told = json.dumps([weights_hash(teacher), meaning(describe(teacher))], sort_keys=True)
        return hashlib.sha256(told.encode()).hexdigest()

    def steps(self) -> Iterator[StepReport]:
        """Train until ``config.images`` have been seen, one optimiser step per item."""
        feed = Feed(self.source, self.student, self.config.data, self.config.seed, self.config.speed.resident)
        self._train_mode()
        try:
            while self.images_seen < self.config.images:
                kind = self.arithmetic(self.progress)
                with tf32(kind, self.world.device):
                    report = self._step(feed, kind)
                yield report
        finally:
            feed.close()

    def _step(self, feed: Feed, kind: Arithmetic) -> StepReport:
        config, progress = self.config, self.progress
        lr = learning_rate(config.optim, progress)
        set_learning_rate(self.optimizer, config.optim, lr, self._number(kind))
        if not self.student.training:  # somebody drew samples of it in between
            self._train_mode()
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._backward(feed, progress, kind)
        if self.world.size > 1:
            _require_gradients(self.trained)
        norm = self._update(kind)
        self.images_seen += config.batch_size
        self._average()
        self._count(loss, norm, kind)
        return StepReport(self.progress, lr, self.objective.describe(progress), kind)

    def _number(self, kind: Arithmetic) -> int:
        """Which of the optimiser's steps this one is, from 1: those that fp16 skipped do not count.

        RAdam's first steps depend on it, and they are where overflows are: there the device is asked.
        """
        done = self.images_seen // self.config.batch_size
        if kind == "fp16" and 0 < done < ASKING and self.config.optim.name == "radam":
            self.scaling.skipped = done - steps_taken(self.optimizer)
        return done - self.scaling.skipped + 1

    def _update(self, kind: Arithmetic) -> Tensor:
        """Move the weights by their gradients; the norm of these. Nothing here waits for the device."""
        config = self.config.optim
        align_gradients(self.trained)
        self.scaling.unscale(self.optimizer, kind)
        gradients = [p.grad for p in self.trained.parameters() if p.grad is not None]
        if config.guard != "stop" and kind != "fp16":
            sanitise(gradients, infinity=1e5 if config.guard == "clamp" else 0.0)
        norm = torch.nn.utils.get_total_norm(gradients)
        if config.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(list(self.trained.parameters()), config.clip, norm)
        self.scaling.step(self.optimizer, kind)
        for act in self._after_step:
            act()
        return norm

    def _count(self, loss: Tensor, norm: Tensor, kind: Arithmetic) -> None:
        """Add the step to the sums; an overflow of fp16's gradients is a skipped step, not an error."""
        finite = torch.isfinite(norm)
        skipped = ~finite if kind == "fp16" else torch.zeros_like(finite)
        bad = ~(torch.isfinite(loss) & (finite | skipped))
        counted = torch.where(skipped, 0, norm)
        self.sums += torch.stack((loss, counted, bad.to(loss.dtype), skipped.to(loss.dtype))).double()
        self.summed_steps += 1

    def _average(self) -> None:
        """Move the averages and the companions after a step; in the objective's order, so that chains are defined."""
        size = self.config.batch_size
        for law, average in zip(self.config.emas, self.averages, strict=True):
            _follow(average, self.student, law.decay(self.images_seen, size))
        for name, companion in self.beside.companions.items():
            followed, beta = self.objective.follow(name, self.progress, size)
            _follow(companion, self.student if followed == "student" else self.beside.companions[followed], beta)

    def _train_mode(self) -> None:
        """Training mode (dropout on) for the student and its companions: they share their dropout masks."""
        for network in (self.student, *self.beside.companions.values()):
            train_mode(network, self.resting)

    def _backward(self, feed: Feed, progress: Progress, kind: Arithmetic) -> Tensor:
        """Accumulate gradients over this process's share of the global batch; mean loss of the share."""
        config, start = self.config, self.images_seen
        share = self.world.share(config.batch_size)
        size = config.micro_batch or len(share)
        parts = [range(start + a, start + min(a + size, share.stop)) for a in range(share.start, share.stop, size)]
        following = [*parts[1:], range(parts[0].start + config.batch_size, parts[0].stop + config.batch_size)]
        total, window = torch.zeros((), device=self.world.device), self._window(share)
        for part, ahead in zip(parts, following, strict=True):
            batch = feed.batch(part, ahead)
            self.beside.execute.begin()
            random = StepRandom(self._streams, torch.arange(part.start, part.stop), self.world.device, window)
            last = part is parts[-1]
            with nullcontext() if last or self.world.size == 1 else self._wrapped.no_sync():  # type: ignore[operator]
                with rounding(kind, self.world.device, self.student.sample_shape):
                    loss = self._wrapped(batch, progress, random).sum() / len(share)
                self.scaling.backward(loss, kind)
            total += loss.detach()
        return total

    def _window(self, share: range) -> Tensor | None:
        """This process's images in the steps for which the objective computes something at once."""
        size = self.config.batch_size
        steps = self._horizon // len(share)
        if steps < 2:
            return None
        start = self.images_seen // (steps * size) * steps * size
        end = min(start + steps * size, self.config.steps * size)
        return torch.cat([torch.arange(n + share.start, n + share.stop) for n in range(start, end, size)])

    def read_sums(self) -> dict[str, float]:
        """Mean loss and gradient norm since the last call; the only place where the device is read.

        Raises:
            NonFiniteError: a loss or a gradient was not finite.
        """
        loss, norm, bad, skipped = self.world.mean(self.sums).tolist()
        if bad > 0 or self.scaling.exhausted():
            raise self._not_finite()
        steps = max(self.summed_steps, 1)
        self.sums.zero_()
        self.summed_steps = 0
        if self.scaling.used:
            self.scaling.skipped = self.images_seen // self.config.batch_size - steps_taken(self.optimizer)
        row = {"loss": loss / steps, "grad_norm": norm / max(steps - skipped, 1)}
        return row | {"skipped": skipped} if self.scaling.used else row

    def require_finite(self) -> None:
        """Check the weights, and everything since the last log row (reads the device).

        Raises:
            NonFiniteError: a loss, a gradient or a weight is not finite.
        """
        weights = torch.stack([torch.isfinite(p).all() for p in self.student.parameters()]).all()
        if not bool(((self.world.mean(self.sums)[2] == 0) & weights).item()) or self.scaling.exhausted():
            raise self._not_finite()

    def _not_finite(self) -> NonFiniteError:
        return NonFiniteError(
            f"The loss or its gradient stopped being finite before image {self.images_seen}, and that is not saved",
            do="The last good checkpoint is kept. Start again, from the teacher or from that run "
            "(fewstep tune RUN --out NEW), with a lower optim.lr, optim.clip=1, a larger objective.penalty.c or "
            "precision=fp32",
        )


class _LossModule(nn.Module):
    """The loss as a module, so that DistributedDataParallel sees one forward pass."""

    def __init__(self, student: Denoiser, objective: Objective, beside: Beside) -> None:
        super().__init__()
        self.student, self.extra = student, beside.extra
        self._objective, self._beside = objective, beside

    def forward(self, batch: Batch, progress: Progress, random: StepRandom) -> Tensor:
        return self._objective.loss(self.student, batch, progress, random, self._beside).per_sample


def _require_gradients(trained: nn.Module) -> None:
    """Several processes wait for every gradient: name the parameters that get none."""
    idle = [name for name, p in trained.named_parameters() if p.requires_grad and p.grad is None]
    if idle:
        raise ConfigError(
            "Some parameters take no part in the loss, which training on several processes does not allow",
            got=", ".join(idle[:8]),
            do="Freeze them before: parameter.requires_grad_(False)",
        )


def _frozen_copy(network: Denoiser, frozen: Collection[str]) -> Denoiser:
    """A network beside the student; its tensors of these names are ``network``'s memory."""
    return sharing_copy(network, frozen).requires_grad_(False).eval()


def _diffusion_model(teacher: Denoiser) -> Denoiser:
    """Refuse a student of jumps or of guidance, whose output is no denoiser."""
    if teacher.two_time or teacher.guided or teacher.sampler == "jump":
        raise ConfigError(
            "The objective follows a diffusion model, and the teacher is a few-step model",
            do="Give the diffusion model as teacher, and the few-step model as the start: student.start=PATH",
        )
    return teacher


@torch.no_grad()
def _follow(follower: Denoiser, followed: Denoiser, beta: float) -> None:
    """``follower <- beta follower + (1 - beta) followed``; buffers are copied, not averaged; what is shared stays."""
    if beta == 1:
        return
    pairs = zip(follower.parameters(), followed.parameters(), strict=True)
    own = [(mine, theirs) for mine, theirs in pairs if mine.data_ptr() != theirs.data_ptr()]
    ema.update([mine for mine, _ in own], [theirs for _, theirs in own], beta)
    for mine, theirs in zip(follower.buffers(), followed.buffers(), strict=True):
        if mine is not theirs:
            mine.copy_(theirs)


def _agree(student: Denoiser, world: World) -> None:
    """All processes start from the weights of process 0."""
    if world.size > 1:
        for tensor in student.state_dict().values():
            torch.distributed.broadcast(tensor, 0)
