"""What only a CUDA device can show; skipped without one. Not yet run: no GPU was at hand when this was written."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fewstep import sample
from fewstep.backbones import build
from fewstep.data import open_source
from fewstep.denoiser import Denoiser, Parametrization
from fewstep.process import EDM
from fewstep.randomness import DropoutTape, Streams
from fewstep.recipes import RECIPES
from fewstep.training.config import SpeedConfig, StudentConfig
from fewstep.training.trainer import Trainer
from fewstep.world import World

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda", 0)


def student() -> Denoiser:
    torch.manual_seed(0)
    spec = {"name": "unet", "kwargs": {"sample_shape": [1, 8, 8], "channels": 16, "blocks": 1, "dropout": 0.2}}
    return Denoiser(build(spec), EDM(), Parametrization(), sample_shape=(1, 8, 8), spec=spec)


def test_noise_and_masks_are_those_of_the_cpu() -> None:
    index, streams = torch.arange(32), Streams(3)
    assert torch.equal(streams.words("a", index, 64), streams.words("a", index.to(CUDA), 64).cpu())
    noise = streams.normal("a", index, (5,), torch.float64)
    assert torch.allclose(noise, streams.normal("a", index.to(CUDA), (5,), torch.float64).cpu(), rtol=1e-12, atol=1e-12)
    ones = torch.ones(32, 7)
    with DropoutTape(streams, index).record():
        here = torch.nn.functional.dropout(ones, 0.3)
    with DropoutTape(streams, index.to(CUDA)).record():
        there = torch.nn.functional.dropout(ones.to(CUDA), 0.3)
    assert torch.equal(here, there.cpu())


WAYS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "tf32": {"precision": "tf32"},
    "fp16": {"precision": "fp16"},
    "bf16": {"precision": "bf16"},
    "auto": {"precision": "auto"},
    "recompute": {"precision": "fp16", "speed": SpeedConfig(recompute=True)},
    "channels_last": {"precision": "fp16", "speed": SpeedConfig(layout="channels_last")},
    "streamed": {"speed": SpeedConfig(resident="off")},
    "compiled": {"precision": "fp16", "speed": SpeedConfig(compile="on")},
    "graphs": {"precision": "fp16", "speed": SpeedConfig(compile="on", graphs=True)},
}


def trainer(device: torch.device, way: str) -> Trainer:
    settings = replace(RECIPES["demo"], student=StudentConfig(dropout=0.2), **WAYS[way])
    return Trainer(settings, student().to(device), open_source("digits"), World(0, 1, device))


@pytest.mark.parametrize("way", WAYS)
def test_a_step_never_waits_for_the_device(way: str) -> None:
    """After the first steps, which compile, warm up and put the data on the device."""
    steps = trainer(CUDA, way).steps()
    for _ in range(6):
        next(steps)
    torch.cuda.set_sync_debug_mode("error")
    try:
        next(steps)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("way", WAYS)
def test_losses_agree_with_the_cpu(way: str) -> None:
    losses = []
    for device, how in ((torch.device("cpu"), "fp32"), (CUDA, way)):
        made = trainer(device, how)
        for _, _ in zip(range(3), made.steps(), strict=False):
            pass
        row = made.read_sums()
        assert row.get("skipped", 0) <= 3
        losses.append(row["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3 if way in ("fp32", "tf32", "streamed") else 2e-2)


def test_sampling_is_that_of_the_cpu() -> None:
    net = student().eval()
    want = sample(net, 8, steps=2, seed=1)
    for options in ({}, {"precision": "fp16"}, {"precision": "tf32"}, {"precision": "auto", "compile": True}):
        got = sample(net.clone().to(CUDA), 8, steps=2, seed=1, **options).cpu()  # type: ignore[arg-type]
        assert float((got - want).abs().max()) < 0.02
