"""What a run will need: memory from counted tensors, time from a few measured steps."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fewstep.backbones.recompute import set_recompute
from fewstep.objectives.base import AS_IT_IS
from fewstep.training.config import Precision, RunConfig
from fewstep.training.cost import Curve, Memory, bytes_at
from fewstep.training.frozen import storage_bytes
from fewstep.training.trainer import Trainer
from fewstep.world import World

PROBES = (2, 3)
"""Images per pass of the steps whose memory is counted; any other number's follows."""


@dataclass(frozen=True)
class Plan:
    """Predictions for one process; bytes and seconds.

    ``memory`` is the most that a step holds at once, all included, without what the framework itself takes:
    ``weights`` (shared ones once), optimiser state and averages always; at the end of the student's pass, of
    ``micro_batch`` images, the ``activations`` that autograd keeps; gradients; and what the passes work with.
    ``seconds`` is for training alone. ``room`` is what the device has, and ``remedies`` what the step would hold with
    other settings, where it has less than ``memory``.
    """

    parameters: int
    trained: int
    steps: int
    weights: int
    gradients: int
    optimizer: int
    averages: int
    activations: int
    memory: int
    micro_batch: int
    images_per_second: float
    seconds: float
    checkpoint: int
    disk: int
    room: int
    remedies: dict[str, int] = field(default_factory=dict)


def plan(trainer: Trainer, *, budget: float = 20.0, room: int | None = None) -> Plan:
    """Predict memory and time of a run on this machine.

    Args:
        trainer: of the run; it is trained a little, and useless afterwards.
        budget: seconds to spend on measuring.
        room: bytes that it must fit in; None is what the device has.
    """
    config, world, student, beside = trainer.config, trainer.world, trainer.student, trainer.beside
    size = sum(p.nbytes for p in student.parameters())
    trained = sum(p.nbytes for p in trainer.trained.parameters() if p.requires_grad)
    share = len(world.share(config.batch_size))
    micro = min(config.micro_batch or share, share)
    room = device_memory(world.device) if room is None else room
    need = Need.count(trainer, several=micro < share)
    memory = need.peak(micro)
    remedies = {} if memory <= room else _remedies(trainer, need, micro, room)
    rate = _measure(trainer, micro, budget)
    followers = [*trainer.averages, *beside.companions.values()]
    own = sum(p.nbytes for name, p in student.backbone.named_parameters() if name not in trainer.frozen)
    averages = own * len(followers)
    checkpoint = 2 * trained + own + averages
    return Plan(
        parameters=sum(p.numel() for p in student.parameters()),
        trained=sum(p.numel() for p in student.parameters() if p.requires_grad),
        steps=config.steps,
        weights=storage_bytes([student] if beside.teacher is None else [student, beside.teacher]),
        gradients=trained,
        optimizer=2 * trained,
        averages=averages,
        activations=need.kept(micro),
        memory=memory,
        micro_batch=micro,
        images_per_second=rate * world.size,
        seconds=config.images / (rate * world.size),
        checkpoint=checkpoint,
        disk=checkpoint * (config.output.keep + 1) + size,
        room=room,
        remedies=remedies,
    )


@dataclass(frozen=True)
class Need:
    """The memory of a step as a function of the images per pass, counted at two sizes."""

    small: Curve
    large: Curve

    @classmethod
    def count(cls, trainer: Trainer, *, several: bool) -> Need:
        """Run three small steps at the end of the schedule, where every row needs its target pass.

        The first one makes the optimiser's state. Nothing is compiled: that would hold less.

        Args:
            several: the step has several passes, which add to the same gradients.
        """
        with _few_images(trainer):
            _one_step(trainer, 1, 1)
            small, large = (_one_step(trainer, images, 2 if several else 1) for images in PROBES)
        return cls(small, large)

    def peak(self, images: int) -> int:
        """Most bytes of a step of ``images`` per pass."""
        return max(live for _, live in self._curve(images))

    def kept(self, images: int) -> int:
        """Bytes that autograd keeps of a pass: what has come between the first batch's images and its backward pass."""
        curve = self._curve(images)
        end = next(place for place, (now, _) in enumerate(curve) if now == "backward")
        start = max((place for place, (now, _) in enumerate(curve[:end]) if now == "data"), default=0)
        return curve[end - 1][1] - curve[start][1]

    def _curve(self, images: int) -> Curve:
        return bytes_at(images, (PROBES[0], self.small), (PROBES[1], self.large))


def device_memory(device: torch.device) -> int:
    """Bytes that the device has in all."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _one_step(trainer: Trainer, images: int, passes: int) -> Curve:
    """The memory of a step of ``passes`` passes."""
    trainer.config = replace(trainer.config, batch_size=images * passes, micro_batch=images)
    trainer.optimizer.zero_grad(set_to_none=True)
    trainer.beside.memory.clear()
    device = trainer.world.device
    with Memory(_held(trainer), only=lambda tensor: tensor.device == device) as memory:
        steps = trainer.steps()
        next(steps)
        steps.close()  # type: ignore[attr-defined]
    return memory.curve


def _held(trainer: Trainer) -> Iterator[Tensor]:
    """The tensors that a run holds between its steps."""
    beside = trainer.beside
    teacher = [] if beside.teacher is None else [beside.teacher]
    for network in (trainer.trained, trainer.student, *trainer.averages, *beside.companions.values(), *teacher):
        yield from network.parameters()
        yield from network.buffers()
    for state in trainer.optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))


@contextmanager
def _few_images(trainer: Trainer) -> Iterator[None]:
    """The trainer at the end of its schedule, alone, and not compiled."""
    config, world, module = trainer.config, trainer.world, trainer._module
    beside = module._beside
    module._beside = replace(beside, execute=AS_IT_IS)
    trainer.config, trainer.world = _endless(config), World(0, 1, world.device)
    trainer.images_seen = config.images
    try:
        yield
    finally:
        trainer.config, trainer.world, module._beside = config, world, beside


def _endless(config: RunConfig) -> RunConfig:
    return replace(config, images=config.images + 64, speed=replace(config.speed, resident="off"))


def _remedies(trainer: Trainer, need: Need, micro: int, room: int) -> dict[str, int]:
    """What the step would hold with one other setting each, by ``--set`` assignment."""
    found = {}
    size = next((size for size in _halves(micro) if need.peak(size) <= room), 1)
    if size < micro:
        found[f"micro_batch={size}"] = need.peak(size)
    config = trainer.config
    half: Precision = "fp16" if trainer.world.device.type == "cuda" else "bf16"
    if trainer.arithmetic(trainer.progress) in ("fp32", "tf32"):
        trainer.config = replace(config, precision=half)
        found[f"precision={half}"] = Need.count(trainer, several=False).peak(micro)
        trainer.config = config
    if not config.speed.recompute and set_recompute(trainer.student.backbone, True):
        found["speed.recompute=true"] = Need.count(trainer, several=False).peak(micro)
        set_recompute(trainer.student.backbone, False)
    return found


def _halves(size: int) -> Iterator[int]:
    while size > 1:
        size //= 2
        yield size


def _measure(trainer: Trainer, micro: int, budget: float) -> float:
    """Images per second of real steps at the end of the schedule, where every row needs its target pass."""
    config, device = trainer.config, trainer.world.device
    trainer.config = replace(config, batch_size=micro, micro_batch=None, images=config.images + micro * 1000)
    trainer.world = World(0, 1, device)
    trainer.images_seen = config.images
    deadline = time.perf_counter() + budget
    times: list[float] = []
    last = time.perf_counter()
    for _ in trainer.steps():
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        now = time.perf_counter()
        times.append(now - last)
        last = now
        if now + times[-1] > deadline or len(times) >= 12:
            break
    steady = sorted(times[1:] or times)
    return micro / steady[len(steady) // 2]
