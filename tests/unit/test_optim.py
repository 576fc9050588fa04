"""The fused optimisers against torch's own, step by step; gradients in another layout; skipped steps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fewstep.training.config import OptimConfig
from fewstep.training.optim import align_gradients, make_optimizer, rectified, set_learning_rate

STEPS = 40


def network(last: bool = False) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)).double()
    return net.to(memory_format=torch.channels_last) if last else net


def gradients(net: nn.Module, step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in net.parameters()]


def apart(one: nn.Module, other: nn.Module) -> float:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


@pytest.mark.parametrize(("name", "decay"), [("radam", 0.0), ("radam", 0.1), ("adam", 0.0), ("adamw", 0.1)])
@pytest.mark.parametrize("last", [False, True])
def test_every_step_is_that_of_torch(name: str, decay: float, last: bool) -> None:
    """Through the five steps without rectification and on; gradients come contiguous, whatever the parameters are."""
    ours, theirs = network(last), network()
    config = OptimConfig(name=name, lr=1e-2, betas=(0.9, 0.99), eps=1e-3, weight_decay=decay)  # type: ignore[arg-type]
    optimizer = make_optimizer(ours, config)
    kind = {"radam": torch.optim.RAdam, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name]
    reference = kind(theirs.parameters(), lr=1e-2, betas=(0.9, 0.99), eps=1e-3, weight_decay=decay)
    for step in range(1, STEPS + 1):
        for net in (ours, theirs):
            for p, g in zip(net.parameters(), gradients(net, step), strict=True):
                p.grad = g
        align_gradients(ours)
        set_learning_rate(optimizer, config, 1e-2, step)
        optimizer.step()
        reference.step()
        assert apart(ours, theirs) < 1e-13, step
    assert apart(ours, network()) > 0.05


def test_the_first_steps_are_not_rectified() -> None:
    factors = [rectified(step, 0.999, 1e-8)[0] for step in range(1, 8)]
    assert [factor > 1 for factor in factors] == [True] * 5 + [False] * 2
    assert 0 < factors[5] < factors[6] < 0.05
    assert rectified(10**6, 0.999, 1e-8) == pytest.approx((1, 1e-8), rel=1e-3)
