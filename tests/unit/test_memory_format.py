"""Layouts in memory: the same numbers in both, the rule, what is refused; and that attention takes the fused kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from fewstep.backbones import build
from fewstep.backbones.memory_format import preferred_layout, set_layout
from fewstep.denoiser import Denoiser, Parametrization
from fewstep.errors import ConfigError
from fewstep.objectives import ECT
from fewstep.process import EDM
from fewstep.randomness import DropoutTape, Streams

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
EDM_SIZES: dict[str, Any] = {"img_resolution": 8, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4]}
NETS: dict[str, dict[str, Any]] = {
    "unet": {"sample_shape": [3, 8, 8], "channels": 16, "dropout": 0.2, "attention": [4]},
    "dit": {"sample_shape": [3, 8, 8], "width": 32, "depth": 2, "heads": 2, "dropout": 0.2},
    "edm": {"in_channels": 3, "out_channels": 3, "model_channels": 16, "dropout": 0.2, **EDM_SIZES},
    "adm": {"in_channels": 3, "out_channels": 3, "model_channels": 64, "dropout": 0.2, **EDM_SIZES},
    "edm2": {"img_channels": 3, "model_channels": 64, "dropout": 0.2, **EDM_SIZES},
}


def make(name: str) -> Denoiser:
    torch.manual_seed(0)
    spec = {"name": name, "kwargs": NETS[name]}
    net = build(spec)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return Denoiser(net, EDM(), Parametrization(), sample_shape=(3, 8, 8), spec=spec).train()


def loss_of(student: Denoiser, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x, eps = torch.randn(2, 4, 3, 8, 8, generator=generator, dtype=torch.float64).to(dtype)
    t = torch.tensor([0.05, 0.3, 2.0, 10.0], dtype=torch.float64)
    return ECT().loss_at(student, x, t, eps, 2.0, None, DropoutTape(Streams(0), torch.arange(4)))


@pytest.mark.parametrize("name", NETS)
def test_both_layouts_make_the_same_loss_and_gradient(name: str) -> None:
    results = []
    for layout in ("contiguous", "channels_last"):
        student = make(name).double()
        set_layout(student.backbone, layout)  # type: ignore[arg-type]
        loss = loss_of(student, torch.float64)
        loss.mean().backward()
        wide = [p for p in student.parameters() if p.ndim == 4 and min(p.shape[1:]) > 1]
        assert wide and all(
            p.is_contiguous(memory_format=torch.channels_last) == (layout != "contiguous") for p in wide
        )
        assert all(p.grad is None or p.grad.stride() == p.stride() for p in student.parameters())
        results.append([loss.detach(), *(p.grad for p in student.parameters() if p.grad is not None)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12 * float(b.abs().max()))


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_attention_takes_the_fused_kernel_in_both_passes(name: str, bf16: bool) -> None:
    student = make(name)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = loss_of(student, torch.float32)
        loss.mean().backward()
    calls = {event.key: event.count for event in seen.key_averages()}
    wanted = calls["aten::scaled_dot_product_attention"]
    assert wanted > 0
    assert calls["aten::_scaled_dot_product_flash_attention_for_cpu"] == wanted
    assert calls["aten::_scaled_dot_product_flash_attention_for_cpu_backward"] == wanted // 2
    assert "aten::_scaled_dot_product_attention_math" not in calls


@pytest.mark.parametrize("name", NETS)
def test_the_rule(name: str) -> None:
    net = make(name).backbone
    assert {preferred_layout(net, kind, CPU) for kind in ("fp32", "tf32", "fp16", "bf16")} == {"contiguous"}
    assert preferred_layout(net, "fp32", CUDA) == "contiguous"
    wanted = "channels_last" if name in ("edm2", "dit") else "contiguous"  # without group normalisation
    assert {preferred_layout(net, kind, CUDA) for kind in ("tf32", "fp16", "bf16")} == {wanted}
    assert preferred_layout(nn.Linear(2, 2), "fp16", CUDA) == "contiguous"


def test_what_would_crash_is_refused() -> None:
    """Torch 2.13 segfaults in the backward pass of a normalisation in channels_last whose input needs no gradient."""
    net = make("unet").backbone
    net.stem.requires_grad_(False)
    with pytest.raises(ConfigError, match="crashes in a group normalisation.*speed.layout at auto"):
        set_layout(net, "channels_last")
    set_layout(net, "contiguous")
    for module in net.modules():
        if isinstance(module, nn.GroupNorm):
            module.requires_grad_(False)
    set_layout(net, "channels_last")
    assert net.stem.weight.is_contiguous(memory_format=torch.channels_last)
