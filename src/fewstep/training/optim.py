"""Optimisers by name, and the learning rate as a function of the images seen."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fewstep.errors import CheckpointError
from fewstep.training.config import OptimConfig
from fewstep.types import Progress


def make_optimizer(module: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """The optimiser over all trainable parameters of ``module``."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    kind = {"radam": torch.optim.RAdam, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.name]
    return kind(parameters, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay)


def learning_rate(config: OptimConfig, progress: Progress) -> float:
    """Learning rate of the step that starts at ``progress.images_seen``."""
    n, total = progress.images_seen, progress.total_images
    lr = config.lr
    if config.warmup_images > 0:
        lr *= min(1.0, (n + 1) / config.warmup_images)
    if config.schedule == "inverse_sqrt":
        return lr / math.sqrt(max(n / config.decay_images, 1.0))
    if config.schedule in ("linear", "cosine"):
        left = min(1.0, (total - n) / max(config.decay_share * total, 1.0))
        return lr * (left if config.schedule == "linear" else 0.5 - 0.5 * math.cos(math.pi * left))
    return lr


def sanitise(gradients: list[Tensor], infinity: float = 1e5) -> None:
    """nan -> 0, +-inf -> +-``infinity``, in place (the published guards: 1e5 for CIFAR-10, 0 for ImageNet)."""
    for gradient in gradients:
        torch.nan_to_num(gradient, nan=0.0, posinf=infinity, neginf=-infinity, out=gradient)


def optimizer_tensors(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state by parameter name: ``"exp_avg/stem.weight"``."""
    out = {}
    for name, parameter in module.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            out[f"{key}/{name}"] = value if isinstance(value, Tensor) else torch.tensor(float(value))
    return out


def restore_optimizer(
    module: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], source: str
) -> None:
    """Invert :func:`optimizer_tensors`; keeps the step counters on the CPU, as the optimisers do.

    Raises:
        CheckpointError: a tensor belongs to no parameter, or has another shape.
    """
    by_name = dict(module.named_parameters())
    for path, value in tensors.items():
        key, _, name = path.partition("/")
        parameter = by_name.get(name)
        if parameter is None or value.shape not in (parameter.shape, torch.Size()):
            raise CheckpointError(f"The optimiser state in {source} does not fit the network", got=path)
        optimizer.state[parameter][key] = value if key == "step" else value.to(parameter.device)
