"""Optimisers by name, and the learning rate as a function of the images seen."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fewstep.errors import CheckpointError
from fewstep.training.config import OptimConfig
from fewstep.types import Progress
from fewstep.weights import chosen, means


def make_optimizer(module: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """The optimiser over all trainable parameters of ``module``; a group per ``factor`` on the learning rate.

    Raises:
        ConfigError: a pattern of ``lr_scale`` means no parameter that is trained.
    """
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    for pattern in config.lr_scale:
        chosen([pattern], trained, "optim.lr_scale")
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in trained.items():
        factor = math.prod(float(f) for pattern, f in config.lr_scale.items() if means(pattern, name))
        groups.setdefault(factor, []).append(parameter)
    kind = {"radam": torch.optim.RAdam, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.name]
    parts = [
        {"params": parameters, "lr": config.lr * factor, "factor": factor} for factor, parameters in groups.items()
    ]
    return kind(parts, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The base learning rate times each group's factor."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["factor"]


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
