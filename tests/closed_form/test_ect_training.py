"""Stochastic ECT through the real trainer reaches the closed-form fixed point of every stage (math.md 7.2, 8).

Data ``N(0, sigma_d^2 I)``, EDM preconditioning and ``F(x, t) = (phi(ln t) . theta) x``: at theta = 0 this is the
exact denoiser, a pretrained teacher. One-step samples from t = 8 then have the spread ``a(8)/a*(8)``, whose value at
stage q^a is known (``SIGMOID_8``: math.md 7.2, row T = 8); given x_t the gap is symmetric about its mean, so the
dimension and the penalty do not matter.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from fewstep import EDM, Denoiser, Parametrization
from fewstep.data.sources import ArraySource
from fewstep.ema import ConstantEMA
from fewstep.objectives import ECT
from fewstep.penalty import Penalty
from fewstep.times import LogUniform, Stages
from fewstep.training import execution
from fewstep.training.config import OptimConfig, RunConfig, SpeedConfig
from fewstep.training.trainer import Trainer
from fewstep.world import World

SIGMOID_8 = {2: 0.2773, 4: 0.6787, 8: 0.8616, 16: 0.9366, 32: 0.9695, 64: 0.9850}
PLAN = {2: (400, 0.01), 4: (500, 0.008), 8: (1300, 2e-3), 16: (1400, 1e-3), 32: (1300, 8e-4), 64: (1200, 5e-4)}
"""q^a -> optimiser steps and learning rate: noise grows relative to what is left to learn."""

TOP, SIGMA_DATA, SIZE, BATCH = 8.0, 0.5, 1024, 64
LOW, HIGH, FEATURES = 0.05, 9.0, 20


class Gain(nn.Module):
    """``F(x, t) = (phi(ln t) . theta) x`` with normalised Gaussian bumps, evenly spaced in ln t."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centres", torch.linspace(math.log(LOW), math.log(HIGH), FEATURES))
        self.theta = nn.Parameter(torch.zeros(FEATURES))

    def forward(self, x: Tensor, c_noise: Tensor, cond: Tensor | None = None) -> Tensor:
        width = self.centres[1] - self.centres[0]
        bumps = (-0.5 * ((4 * c_noise[:, None] - self.centres) / width) ** 2).softmax(1)
        return (bumps @ self.theta)[:, None] * x


def data() -> ArraySource:
    """8,192 points of exactly the right second moment."""
    x = torch.randn(8192, SIZE, generator=torch.Generator().manual_seed(0))
    return ArraySource("normal", x * (SIGMA_DATA / x.square().mean().sqrt()), None)


def stage(student: Denoiser, ratio: int, source: ArraySource, compile: Literal["on", "off"] = "off") -> Denoiser:
    """One stage of ECT from ``student``; the moving average at its end."""
    number = round(math.log2(ratio)) - 1
    steps, lr = PLAN[ratio]
    images = steps * BATCH
    config = RunConfig(
        seed=ratio,
        images=images,
        batch_size=BATCH,
        objective=ECT(
            law=LogUniform(LOW, HIGH),
            schedule=Stages(q=2.0, images=images, first=number, last=number),
            penalty=Penalty("pseudo_huber", "dt", c=0.06),
        ),
        optim=OptimConfig(name="adam", lr=lr, betas=(0.9, 0.99), schedule="cosine", decay_share=1.0),
        emas=(ConstantEMA(0.995),),
        speed=SpeedConfig(compile=compile),
    )
    trainer = Trainer(config, student, source, World(0, 1, torch.device("cpu")))
    reports = list(trainer.steps())
    assert len(reports) == steps
    assert reports[-1].schedule["r/t"] == 1 - 1 / ratio
    return trainer.averages[0]


def spread(model: Denoiser) -> float:
    """Standard deviation of one-step samples from ``N(0, 8^2 + sigma_d^2)``, relative to the data's."""
    x = torch.ones(1, SIZE)
    gain = model(x, TOP)[0, 0].item()
    return gain * math.sqrt(SIGMA_DATA**2 + TOP**2) / SIGMA_DATA


@pytest.mark.slow
def test_every_stage_reaches_its_fixed_point() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    source = data()
    model = Denoiser(Gain(), EDM(), Parametrization("edm", sigma_data=SIGMA_DATA), sample_shape=(SIZE,))
    assert spread(model) == pytest.approx(SIGMA_DATA / math.sqrt(SIGMA_DATA**2 + TOP**2), rel=1e-5)
    got = {}
    for ratio in SIGMOID_8:
        model = stage(model.requires_grad_(True), ratio, source)
        got[ratio] = spread(model)
    torch.set_num_threads(threads)
    print({k: round(v, 4) for k, v in got.items()})
    assert list(got.values()) == sorted(got.values())
    for ratio, want in SIGMOID_8.items():
        assert got[ratio] == pytest.approx(want, abs=0.01 if ratio >= 8 else 0.12), ratio


@pytest.mark.slow
def test_the_compiled_path_reaches_them_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first three stages, whose target pass is filled up with rows that have r = 0."""
    monkeypatch.setattr(execution, "compiled", partial(execution.compiled, backend="aot_eager"))
    source = data()
    model = Denoiser(Gain(), EDM(), Parametrization("edm", sigma_data=SIGMA_DATA), sample_shape=(SIZE,))
    for ratio in (2, 4, 8):
        model = stage(model.requires_grad_(True), ratio, source, compile="on")
    assert spread(model) == pytest.approx(SIGMOID_8[8], abs=0.01)
