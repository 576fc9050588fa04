"""Optimisers by name, and the learning rate as a function of the images seen.

All of them are torch's fused Adam kernel: one operation for all parameters, which can skip a step on the device. RAdam
is that kernel with another learning rate and eps at every step (:func:`rectified`).
"""

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
    kind = torch.optim.AdamW if config.name == "adamw" else torch.optim.Adam
    parts = [
        {"params": parameters, "lr": config.lr * factor, "factor": factor} for factor, parameters in groups.items()
    ]
    fused = all(p.device.type in _FUSED for p in trained.values())
    return kind(parts, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay, fused=fused)


_FUSED = ("cpu", "cuda", "mps", "xpu")
"""Where torch has the fused kernel."""

_PLAIN = 1e16
"""An eps beside which the square root of the second moment is nothing."""


def set_learning_rate(optimizer: torch.optim.Optimizer, config: OptimConfig, lr: float, step: int) -> None:
    """The base learning rate times each group's factor, for optimiser step number ``step``, from 1."""
    factor, eps = rectified(step, config.betas[1], config.eps) if config.name == "radam" else (1.0, config.eps)
    for group in optimizer.param_groups:
        group["lr"], group["eps"] = lr * group["factor"] * factor, eps


def rectified(step: int, beta2: float, eps: float) -> tuple[float, float]:
    """What makes Adam's step n RAdam's (Liu et al., arXiv 1908.03265): a factor on the learning rate, and an eps.

    RAdam moves by ``r_n sqrt(1 - beta2^n) m/(sqrt(v) + eps)`` where the variance of that is finite, and by m before;
    Adam by ``m/(sqrt(v/(1 - beta2^n)) + eps')``: the same with ``eps' = eps/sqrt(1 - beta2^n)``, and for the first
    steps (5, at beta2 = 0.999) with an eps' that leaves nothing of v.
    """
    decay = beta2**step
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * step * decay / (1 - decay)
    if length <= 5:
        return _PLAIN, _PLAIN
    top = (length - 4) * (length - 2) * longest
    return math.sqrt(top / ((longest - 4) * (longest - 2) * length)), eps / math.sqrt(1 - decay)


def steps_taken(optimizer: torch.optim.Optimizer) -> int:
    """How often the weights were moved (reads the device)."""
    return max((int(state["step"]) for state in optimizer.state.values()), default=0)


def align_gradients(module: nn.Module) -> None:
    """Lay each gradient out in memory as its parameter is: the fused kernel walks both side by side."""
    for parameter in module.parameters():
        gradient = parameter.grad
        if gradient is not None and _steps(gradient) != _steps(parameter):
            parameter.grad = torch.empty_like(parameter).copy_(gradient)


def _steps(tensor: Tensor) -> list[int]:
    """Strides of the dimensions along which there is a step."""
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


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
    """Invert :func:`optimizer_tensors`; the step counters, too, are where the kernel wants them.

    Raises:
        CheckpointError: a tensor belongs to no parameter, or has another shape.
    """
    by_name = dict(module.named_parameters())
    for path, value in tensors.items():
        key, _, name = path.partition("/")
        parameter = by_name.get(name)
        if parameter is None or value.shape not in (parameter.shape, torch.Size()):
            raise CheckpointError(f"The optimiser state in {source} does not fit the network", got=path)
        if value.shape:
            value = torch.empty_like(parameter).copy_(value)
        fused = optimizer.defaults.get("fused")
        optimizer.state[parameter][key] = value.to(parameter.device) if value.shape or fused else value
