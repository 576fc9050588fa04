"""What only a CUDA device can show; skipped without one. Not yet run: no GPU was at hand when this was written."""

from __future__ import annotations

import pytest
import torch

from fewstep.backbones import build
from fewstep.data import open_source
from fewstep.denoiser import Denoiser, Parametrization
from fewstep.process import EDM
from fewstep.randomness import DropoutTape, Streams
from fewstep.recipes import RECIPES
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


def test_a_step_never_waits_for_the_device() -> None:
    trainer = Trainer(RECIPES["demo"], student().to(CUDA), open_source("digits"), World(0, 1, CUDA))
    steps = trainer.steps()
    next(steps)
    torch.cuda.set_sync_debug_mode("error")
    try:
        next(steps)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_losses_agree_with_the_cpu() -> None:
    losses = []
    for device in (torch.device("cpu"), CUDA):
        trainer = Trainer(RECIPES["demo"], student().to(device), open_source("digits"), World(0, 1, device))
        for _, _ in zip(range(3), trainer.steps(), strict=False):
            pass
        losses.append(trainer.read_sums()["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
