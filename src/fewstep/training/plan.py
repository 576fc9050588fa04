"""What a run will need: memory from counted tensors, time from a few measured steps."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fewstep.objectives import StepRandom
from fewstep.randomness import Streams
from fewstep.training.feed import Feed
from fewstep.training.frozen import storage_bytes
from fewstep.training.trainer import Trainer, autocast, train_mode
from fewstep.types import Progress
from fewstep.world import World

PROBE_IMAGES = 2


@dataclass(frozen=True)
class Plan:
    """Predictions for one process; bytes and seconds.

    ``activations`` are the tensors that autograd keeps for one pass of ``micro_batch`` images; ``memory``
    adds weights (shared ones once), gradients, optimiser state and averages. ``seconds`` is for training alone.
    """

    parameters: int
    trained: int
    steps: int
    weights: int
    gradients: int
    optimizer: int
    averages: int
    activations: int
    micro_batch: int
    images_per_second: float
    seconds: float
    checkpoint: int
    disk: int

    @property
    def memory(self) -> int:
        """Bytes in total, without what the framework itself takes."""
        return self.weights + self.gradients + self.optimizer + self.averages + self.activations


def plan(trainer: Trainer, *, budget: float = 20.0) -> Plan:
    """Predict memory and time of a run on this machine.

    Args:
        trainer: of the run; it is trained a little, and useless afterwards.
        budget: seconds to spend on measuring.
    """
    config, world, student, beside = trainer.config, trainer.world, trainer.student, trainer.beside
    size = sum(p.nbytes for p in student.parameters())
    trained = sum(p.nbytes for p in trainer.trained.parameters() if p.requires_grad)
    share = len(world.share(config.batch_size))
    micro = min(config.micro_batch or share, share)
    per_image = activation_bytes(trainer) / PROBE_IMAGES
    rate = _measure(trainer, micro, budget)
    weights = storage_bytes([student] if beside.teacher is None else [student, beside.teacher])
    followers = [*trainer.averages, *beside.companions.values()]
    own = sum(p.nbytes for name, p in student.backbone.named_parameters() if name not in trainer.frozen)
    averages = own * len(followers)
    checkpoint = 2 * trained + own + averages
    return Plan(
        parameters=sum(p.numel() for p in student.parameters()),
        trained=sum(p.numel() for p in student.parameters() if p.requires_grad),
        steps=config.steps,
        weights=weights,
        gradients=trained,
        optimizer=2 * trained,
        averages=averages,
        activations=int(per_image * micro),
        micro_batch=micro,
        images_per_second=rate * world.size,
        seconds=config.images / (rate * world.size),
        checkpoint=checkpoint,
        disk=checkpoint * (config.output.keep + 1) + size,
    )


def activation_bytes(trainer: Trainer) -> int:
    """Bytes that autograd keeps for a loss on ``PROBE_IMAGES`` images (each storage once, weights not counted)."""
    config, model = trainer.config, trainer.student
    weights = {p.untyped_storage().data_ptr() for p in trainer.trained.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    feed = Feed(trainer.source, model, config.data, config.seed)
    try:
        batch = feed.batch(range(PROBE_IMAGES))
    finally:
        feed.close()
    random = StepRandom(Streams(config.seed), torch.arange(PROBE_IMAGES), model.device)
    train_mode(model)
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        autocast(config.precision, model.device),
    ):
        output = trainer.objective.loss(model, batch, Progress(0, config.images), random, trainer.beside)
        loss = output.per_sample.sum()
        total = sum(kept.values())
    del loss
    return total


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
