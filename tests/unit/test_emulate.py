"""bench/emulate.py: rounding bit by bit, and what is rounded where, forward and backward."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.arithmetic import rounding
from fewstep.backbones.small import DiT, UNet

FILE = Path(__file__).resolve().parents[2] / "bench" / "emulate.py"
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


@pytest.fixture(scope="module")
def emulation() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_emulate", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_emulate"] = module
    spec.loader.exec_module(module)
    return module


@contextmanager
def autocast(emulation: ModuleType, kind: str) -> Iterator[None]:
    with emulation.emulate(kind), torch.autocast("cpu", DTYPES.get(kind, torch.bfloat16), enabled=kind in DTYPES):
        yield


def numbers(count: int = 200_000, seed: int = 0) -> Tensor:
    """fp32 of all signs and of exponents -13 to 14, the ties between neighbours in fp16 and bf16 among them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, generator=generator) * torch.exp2(torch.randint(-9, 10, (count,), generator=generator))
    x = x[(x.abs() > 2.0**-14) & (x.abs() < 60_000)]
    word = x.view(torch.int32)
    ties = torch.cat([((word >> cut) << cut) | (1 << (cut - 1)) for cut in (13, 16)])
    return torch.cat((x, ties.view(torch.float32)))


def test_ten_bits_are_those_of_fp16_where_it_is_normal(emulation: ModuleType) -> None:
    x = numbers()
    assert torch.equal(emulation.tf32(x), x.half().float())


def test_seven_bits_are_those_of_bfloat16(emulation: ModuleType) -> None:
    x = numbers(seed=1) * 1e20
    x = torch.cat((x, x * 1e-30, torch.tensor([3.4e38, -3.4e38, float("inf"), float("-inf"), 0.0, -0.0])))
    assert torch.equal(emulation.round_mantissa(x, 7).view(torch.int32), x.bfloat16().float().view(torch.int32))


@pytest.mark.parametrize(
    ("bits", "want"),
    [
        (0x3F800FFF, 0x3F800000),  # below the middle
        (0x3F801000, 0x3F800000),  # a tie goes to the even one, below
        (0x3F803000, 0x3F804000),  # a tie goes to the even one, above
        (0x3F801001, 0x3F802000),  # above the middle
        (0x3FFFFFFF, 0x40000000),  # into the next binade
        (0x7F7FFFFF, 0x7F800000),  # beyond the largest number: inf
        (0x00801000, 0x00800000),  # fp32's exponents, far below those of fp16
        (0x7F800000, 0x7F800000),
    ],
)
def test_tf32_masks(emulation: ModuleType, bits: int, want: int) -> None:
    x = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
    assert emulation.tf32(x).view(torch.int32).item() == want
    assert emulation.tf32(-x).item() == -emulation.tf32(x).item()
    assert emulation.tf32(x).view(torch.int32).item() & 0x1FFF == 0


def test_nan_stays_and_only_fp32_is_rounded(emulation: ModuleType) -> None:
    x = torch.tensor([0x7FFFFFFF, 0x7F800001], dtype=torch.int32).view(torch.float32)
    assert emulation.tf32(x).isnan().all()
    with pytest.raises(TypeError, match="float64"):
        emulation.tf32(torch.ones(1, dtype=torch.float64))


def product(kind: str, x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    """A layer ``x w^T`` and its gradients for a given upstream one, by hand."""
    g = torch.linspace(-1, 1, x.shape[0] * w.shape[0]).reshape(x.shape[0], w.shape[0])
    x, w, g = (v.to(DTYPES.get(kind, torch.float16)).float() for v in (x, w, g))
    found = x @ w.T, g @ w, g.T @ x
    return found if kind == "tf32" else tuple(v.to(DTYPES[kind]).float() for v in found)


@pytest.mark.parametrize("kind", ["tf32", "fp16", "bf16"])
@pytest.mark.parametrize("layer", ["linear", "convolution"])
def test_a_product_and_its_gradients(emulation: ModuleType, kind: str, layer: str) -> None:
    generator = torch.Generator().manual_seed(2)
    x, w = torch.randn(6, 5, generator=generator), torch.randn(4, 5, generator=generator)
    out, to_x, to_w = product(kind, x, w)
    x.requires_grad_()
    w.requires_grad_()
    with autocast(emulation, kind):
        found = F.linear(x, w) if layer == "linear" else F.conv2d(x[..., None, None], w[..., None, None]).flatten(1)
        g = torch.linspace(-1, 1, out.numel()).reshape(out.shape)
        found.backward(g.to(found.dtype))
    assert found.dtype == DTYPES.get(kind, torch.float32)
    assert x.grad is not None and w.grad is not None and x.grad.dtype == w.grad.dtype == torch.float32
    for mine, theirs in ((found, out), (x.grad, to_x), (w.grad, to_w)):
        assert torch.allclose(mine.float(), theirs, rtol=1e-6, atol=1e-6)
    assert not torch.equal(found.float(), (x @ w.T).detach())


def test_a_bias_is_rounded_once_more_after_a_convolution_only(emulation: ModuleType) -> None:
    """1 + 2^-11 rounds to 1 before the bias 2^-11 comes (cuDNN); a matrix product adds it first (cuBLAS): 1 + 2^-10."""
    x, b = torch.tensor([[1 + 2.0**-10, -(2.0**-11)]]), torch.tensor([2.0**-11])
    w = torch.ones(1, 2)
    with autocast(emulation, "fp16"):
        assert F.linear(x, w, b).item() == 1 + 2.0**-10
        assert F.conv2d(x[..., None, None], w[..., None, None], b).item() == 1


def test_fp16_overflows_and_underflows_backward(emulation: ModuleType) -> None:
    for scale, want in ((1e6, float("inf")), (1.0, 1.0), (1e-9, 0.0)):
        x = torch.ones(1, 1, requires_grad=True)
        with autocast(emulation, "fp16"):
            (F.linear(x, torch.ones(1, 1)).float().sum() * scale).backward()
        assert x.grad is not None and x.grad.item() == want
    x = torch.ones(1, 1, requires_grad=True)
    with autocast(emulation, "bf16"):
        (F.linear(x, torch.ones(1, 1)).float().sum() * 1e6).backward()
    assert x.grad is not None and x.grad.item() == torch.tensor(1e6).bfloat16().item()


def test_autocasts_lists(emulation: ModuleType) -> None:
    half, full = torch.ones(2, 4, dtype=torch.float16), torch.ones(2, 4)
    with autocast(emulation, "fp16"):
        assert F.silu(half).dtype == (half + half).dtype == torch.cat((half, half)).dtype == torch.float16
        assert F.layer_norm(half, (4,)).dtype == half.softmax(1).dtype == half.exp().dtype == torch.float32
        assert (half**2).dtype == half.sum().dtype == F.group_norm(half, 2).dtype == torch.float32
        assert F.interpolate(half[None], scale_factor=2).dtype == torch.float32
        assert torch.addcmul(half, half, full).dtype == torch.cat((half, full)).dtype == torch.float32
        assert torch.addcmul(half, half, half).dtype == torch.float16
        assert (full @ half.T).dtype == torch.einsum("ab,cb->ac", full, full).dtype == torch.float16
        assert F.linear(full.double(), full.double()).dtype == torch.float64
    assert (full @ full.T).dtype == torch.float32


@pytest.mark.parametrize("kind", ["tf32", "fp16", "bf16"])
def test_attention_rounds_its_probabilities_and_their_scores_gradient(emulation: ModuleType, kind: str) -> None:
    generator = torch.Generator().manual_seed(3)
    q, k, v, g = (torch.randn(2, 3, 5, 4, generator=generator) for _ in range(4))
    dtype = DTYPES.get(kind)

    def factor(x: Tensor) -> Tensor:
        return emulation.tf32(x) if dtype is None else x.to(dtype).float()

    def result(x: Tensor) -> Tensor:
        return x if dtype is None else x.to(dtype).float()

    p, upstream = torch.softmax(factor(q) @ factor(k).mT / 2, -1), factor(g)
    dp = upstream @ factor(v).mT
    ds = factor(p * (dp - (p * dp).sum(-1, keepdim=True)) / 2)
    want = (result(ds @ factor(k)), result(ds.mT @ factor(q)), result(factor(p).mT @ upstream))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    with autocast(emulation, kind):
        out = F.scaled_dot_product_attention(*leaves)
        out.backward(g.to(out.dtype))
    assert torch.allclose(out.float(), result(factor(p) @ factor(v)), rtol=1e-6, atol=1e-6)
    for leaf, gradient_of in zip(leaves, want, strict=True):
        assert leaf.grad is not None
        assert (leaf.grad != gradient_of).float().mean() < 0.05 or torch.allclose(leaf.grad, gradient_of, rtol=1e-5)


def gradient(network: nn.Module, x: Tensor, c: Tensor) -> Tensor:
    network.zero_grad()
    network(x, c).double().square().sum().backward()
    return torch.cat([p.grad.flatten().double() for p in network.parameters() if p.grad is not None])


@pytest.mark.parametrize("network", ["unet", "dit"])
def test_emulated_bf16_is_as_far_from_float64_as_real_bf16(emulation: ModuleType, network: str) -> None:
    """And TF32 and fp16 are eight times closer: three more bits."""
    torch.manual_seed(4)
    net: nn.Module = UNet((1, 8, 8), 16, (1, 2), 1, (4,)) if network == "unet" else DiT((1, 8, 8), 32, 2, 2)
    for p in net.parameters():
        nn.init.normal_(p, std=0.15) if p.ndim > 1 else nn.init.normal_(p, mean=0.5, std=0.3)
    x, c = torch.randn(8, 1, 8, 8), torch.randn(8)
    want = gradient(net.double(), x.double(), c.double())
    net.float()

    def error(kind: str) -> float:
        context = torch.autocast("cpu", torch.bfloat16) if kind == "real" else autocast(emulation, kind)
        with context:
            return float((gradient(net, x, c) - want).norm() / want.norm())

    real, bf16, fp16, tf32 = (error(kind) for kind in ("real", "bf16", "fp16", "tf32"))
    assert real / 2 < bf16 < 2 * real
    assert bf16 / 16 < fp16 < bf16 / 4
    assert bf16 / 16 < tf32 < bf16 / 4


def test_only_where_autocast_is_on(emulation: ModuleType) -> None:
    full = torch.ones(2, 2)
    with emulation.emulate("fp16"):
        assert (full @ full).dtype == torch.float32
        with torch.autocast("cpu", torch.float16):
            assert (full @ full).dtype == torch.float16
            with torch.autocast("cpu", enabled=False):
                assert F.layer_norm(full.half(), (2,)).dtype == torch.float16
        assert torch.is_autocast_enabled("cpu") is False


def test_the_librarys_edges_stay_in_fp32(emulation: ModuleType) -> None:
    torch.manual_seed(5)
    net = UNet((1, 8, 8), 16, (1, 2), 1, (4,))
    for p in net.parameters():
        nn.init.normal_(p, std=0.2)
    x, c = torch.randn(4, 1, 8, 8), torch.randn(4)
    returned: dict[str, torch.dtype] = {}
    for name, layer in net.named_modules():
        layer.register_forward_hook(lambda _, inputs, out, name=name: returned.update({name: out.dtype}))
    with emulation.emulate("fp16"):
        with rounding("fp16", torch.device("cpu"), (1, 8, 8)):
            out = net(x, c)
        out.square().mean().backward()
    assert out.dtype == returned["head"] == returned["up.0.block.modulation"] == torch.float32
    assert {returned[n] for n in ("stem", "down.0.block.conv1", "middle.attention.qkv")} == {torch.float16}
