"""The counters count what is there: operations and FLOPs by phase, bytes while they live, waits for the device."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from fewstep.training.cost import Counting, Memory, bytes_at, flops, operations, peak_bytes, saved_bytes
from fewstep.training.simulated import DEVICE, HOST, SimulatedDevice

MIB = 2**20
FLOATS = MIB // 4


# ----------------------------------------------------------------------------------------- operations, FLOPs
def test_operations_are_those_that_are_dispatched() -> None:
    x = torch.ones(3, 4)
    work = operations(lambda: (x + 1).t().contiguous() * 2)
    assert work.operations.total() == 4
    assert work.kernels.total() == 3  # the transpose is a view
    assert dict(work.most("other")) == {"add": 1, "t": 1, "clone": 1, "mul": 1}


def test_backward_is_a_phase_of_its_own() -> None:
    weight = nn.Parameter(torch.ones(5, 7))
    work = operations(lambda: (torch.ones(2, 5) @ weight).sum().backward())
    assert work.flops == {"other": 2 * 2 * 5 * 7, "backward": 2 * 2 * 5 * 7}
    assert work.operations["backward"] > 2


def test_phases_are_named_by_the_innermost_function() -> None:
    def inner() -> Tensor:
        return torch.ones(2) + 1

    def outer() -> None:
        inner()
        torch.ones(2)

    here = f"{__name__}:test_phases_are_named_by_the_innermost_function.<locals>."
    with Counting({here + "inner": "in", here + "out*": "out"}) as counting:
        outer()
        torch.ones(1)
    assert counting.work.operations == {"in": 2, "out": 1, "other": 1}


def test_flops_are_those_of_torchs_counter() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, stride=2), nn.Flatten())

    def run() -> None:
        net(torch.ones(2, 3, 9, 9)).sum().backward()

    with FlopCounterMode(display=False) as theirs:
        run()
    assert flops(run) == theirs.get_total_flops() > 0


def test_attention_on_a_cpu_counts_as_its_two_products() -> None:
    q, k, v = (torch.randn(2, 3, 8, 4, requires_grad=True) for _ in range(3))
    product = 2 * 2 * 3 * 8 * 8 * 4
    assert flops(lambda: F.scaled_dot_product_attention(q, k, v)) == 2 * product
    assert flops(lambda: F.scaled_dot_product_attention(q, k, v).sum().backward()) == (2 + 5) * product


# ---------------------------------------------------------------------------------------------------- bytes
def test_the_peak_is_of_what_lives_at_once() -> None:
    def run() -> None:
        a = torch.ones(FLOATS)
        b = a.view(2, -1)  # the same memory
        del a
        c = b + 1
        del b
        torch.ones(FLOATS // 2).add_(c.view(-1)[0])

    assert peak_bytes(run) == 2 * MIB
    held = torch.ones(3 * FLOATS)
    assert peak_bytes(run, [held, held.view(3, -1)]) == 5 * MIB
    assert peak_bytes(lambda: None, [held]) == 3 * MIB


def test_memory_is_given_back() -> None:
    with Memory() as memory:
        a, b = torch.ones(FLOATS), torch.ones(2 * FLOATS)
        assert memory.live == 3 * MIB
        del b
        assert memory.live == MIB
        memory.restart()
        a + 1
    assert (memory.peak, memory.live) == (2 * MIB, MIB)
    assert [live for _, live in memory.curve] == [2 * MIB]
    assert memory.at_peak.most_common(1)[0][0][0] in ("ones", "add")
    assert any(where.startswith("test_cost.py:") for _, where in memory.at_peak)


def test_fake_tensors_have_bytes() -> None:
    with FakeTensorMode():
        assert peak_bytes(lambda: torch.ones(2**40, dtype=torch.float16) * 2) == 2 * 2**41


def test_what_autograd_keeps() -> None:
    x = torch.ones(FLOATS, requires_grad=True)
    assert saved_bytes(lambda: (x.exp() * 2).sum(), [x]) == MIB + 4  # exp keeps its result, and there is the sum
    assert saved_bytes(lambda: (x * 2).sum(), [x]) == 4
    assert saved_bytes(lambda: x.exp().exp().exp().sum(), [x]) == 3 * MIB + 4

    def three(x: Tensor) -> Tensor:
        return x.exp().exp().exp()

    again = saved_bytes(lambda: checkpoint(three, x, use_reentrant=False).sum(), [x])
    assert again == 4  # hooks on saved tensors would not see that the block's input stays; it is held here


def test_bytes_at_another_size_are_those_of_that_size() -> None:
    weight = torch.ones(FLOATS)

    def curve(images: int) -> list[tuple[str, int]]:
        with Memory([weight]) as memory:
            x = torch.ones(images, 1000) * 2  # two of them: largest for many images
            y = x.sum() + 1
            z = weight + y  # largest for few
            del z
        return memory.curve

    found = bytes_at(500, (2, curve(2)), (3, curve(3)))
    assert found == curve(500)
    assert max(live for _, live in curve(2)) == curve(2)[-1][1] > max(live for _, live in curve(2)[:-1])
    assert max(live for _, live in found) == found[1][1] > found[-1][1]


def test_pieces_of_random_numbers_do_not_shift_the_curve() -> None:
    small = [("data", 10), ("random", 11), ("student", 20)]
    large = [("data", 12), ("random", 13), ("random", 14), ("student", 24)]
    assert bytes_at(10, (2, small), (3, large)) == [("data", 26), ("student", 52)]


# ---------------------------------------------------------------------------------------------------- waits
def waits(run: Callable[[Tensor], object], hollow: bool = False) -> list[str]:
    """What ``run`` waits for, given a tensor on the device."""
    with SimulatedDevice(hollow=hollow) as device:
        x = torch.arange(6.0).to(DEVICE, non_blocking=True) + 1
        assert not device.waits
        run(x)
    assert all(wait.where.startswith("test_cost.py:") for wait in device.waits)
    return [wait.what for wait in device.waits]


READS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x.max().item(),
    "if tensor": lambda x: 1 if x.max() > 0 else 0,
    "float": lambda x: float(x[0]),
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
    "boolean mask": lambda x: x[x > 3],
    "assignment by boolean mask": lambda x: x.__setitem__(x > 3, x[:3] * 2),
    "nonzero": lambda x: (x > 3).nonzero(),
    "masked_select": lambda x: x.masked_select(x > 3),
    "equal": lambda x: torch.equal(x, x + 1),
    "cpu": lambda x: x.cpu(),
    "copy to the host": lambda x: x.to(HOST),
    "blocking copy to the device": lambda x: torch.ones(3).to(DEVICE),
    "tensor made of Python numbers": lambda x: torch.tensor([1.0, 2.0], device=DEVICE),
    "host tensor in an operation": lambda x: x + torch.ones(6),
    "host index": lambda x: x[torch.tensor([0, 2])],
    "read of what was made there": lambda x: float(torch.ones(3, device=x.device).sum()),
}


@pytest.mark.parametrize("name", READS)
def test_a_planted_wait_is_seen(name: str) -> None:
    assert len(waits(READS[name])) >= 1


class Reading(torch.autograd.Function):
    """Its backward pass reads the gradient."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x * 1

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad * float(grad.sum())


def test_a_wait_in_the_backward_pass_is_seen() -> None:
    with SimulatedDevice() as device:
        x = torch.ones(3).to(DEVICE, non_blocking=True).requires_grad_()
        Reading.apply(x).sum().backward()
    assert [wait.what for wait in device.waits] == ["_local_scalar_dense"]


FREE: dict[str, Callable[[Tensor], object]] = {
    "work on the device": lambda x: (x * 2 + x.sum()).clamp(min=0),
    "an index on the device": lambda x: x[torch.arange(3, device=x.device)],
    "a fill by mask": lambda x: x.__setitem__(x > 3, 0.0),
    "a choice by mask": lambda x: torch.where(x > 3, x, 0.0),
    "host numbers": lambda x: float(torch.ones(3).sum()) + torch.ones(2).tolist()[0],
    "a host mask": lambda x: torch.ones(3)[torch.ones(3) > 0].numpy(),
    "a copy that does not wait": lambda x: torch.ones(3).to(x.device, non_blocking=True) * x[:3],
    "a host number in an operation": lambda x: x * torch.tensor(2.0),
    "its own device": lambda x: x.to(x.device).to(torch.float64),
    "backward": lambda x: x.clone().requires_grad_().pow(2).sum().backward(),
}


@pytest.mark.parametrize("name", FREE)
@pytest.mark.parametrize("hollow", [False, True])
def test_what_waits_for_nothing_is_free(name: str, hollow: bool) -> None:
    assert waits(FREE[name], hollow) == []


def test_the_simulated_device_computes_real_numbers_and_leaves_nothing_behind() -> None:
    host = torch.arange(3.0)
    with SimulatedDevice() as device:
        moved = host.to(DEVICE, non_blocking=True)
        moved += 1
        assert moved.device == DEVICE != host.device == HOST
        assert device.has(moved) and not device.has(host)
    assert host.tolist() == [0, 1, 2] and moved.tolist() == [1, 2, 3]
    assert moved.device == HOST and len(device.waits) == 0


def test_a_hollow_device_has_sizes_and_no_values() -> None:
    with SimulatedDevice(hollow=True) as device, Memory(only=device.has) as memory:
        x = torch.ones(4, 1).to(DEVICE, non_blocking=True).expand(4, 2**38) * 2
        host = torch.ones(FLOATS)
    assert (x.shape, memory.peak, host.sum().item()) == ((4, 2**38), 4 * 2**40 + 16, FLOATS)
    with SimulatedDevice(hollow=True), pytest.raises(Exception, match="_local_scalar_dense"):
        (torch.ones(1).to(DEVICE) * 2).item()


def test_autocast_on_the_simulated_device_keeps_norms_in_float32_as_cuda_does() -> None:
    net = nn.Sequential(nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4))
    x = torch.ones(1, 4, 2, 2)

    def dtypes(cuda: bool) -> list[torch.dtype]:
        with SimulatedDevice(cuda=cuda), torch.autocast("cpu", torch.bfloat16):
            return [net[0](x).dtype, net(x).dtype]

    assert dtypes(cuda=True) == [torch.bfloat16, torch.float32]
    assert dtypes(cuda=False) == [torch.bfloat16, torch.bfloat16]
