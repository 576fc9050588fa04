"""Power-function averages are kept through a run, and another width is rebuilt from them (math.md 5)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fewstep
from fewstep.denoiser import Denoiser, Parametrization
from fewstep.ema import PowerEMA
from fewstep.errors import CheckpointError
from fewstep.process import EDM


class Line(nn.Module):
    """A network of two numbers: quick to train, and its averages have nothing to hide behind."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor([0.5, -0.3]))

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        return x * self.a


def test_a_width_is_rebuilt_from_the_snapshots(tmp_path: Path) -> None:
    teacher = Denoiser(Line(), EDM(), Parametrization(), sample_shape=(2,))
    laws = [{"kind": "power", "std": std} for std in (0.05, 0.10, 0.075)]
    settings = {
        "images": 4096, "batch_size": 64, "emas": laws, "optim.lr": 0.02, "eval.samples": 0, "output.sample_images": 0,
        "output.checkpoint_images": 256, "output.keep": 1,
    }  # fmt: skip
    run = fewstep.tune(teacher, "gaussians8", out=tmp_path / "run", recipe="points", overrides=settings, device="cpu")
    assert run.config.emas[2] == PowerEMA(0.075)
    stored = tmp_path / "run/averages"
    assert len(list(stored.iterdir())) == 16
    assert len(list((tmp_path / "run/checkpoints").glob("images-*"))) == 1
    tracked = fewstep.load(run.path, weights="ema-2", network=teacher).backbone.a.detach()
    for file in stored.glob("*/std-0.075.safetensors"):
        file.unlink()
    for record in stored.glob("*/averages.json"):
        record.write_text(record.read_text().replace("  0.075,\n", ""))
    rebuilt = fewstep.load(run.path, weights="std=0.075", network=teacher).backbone.a.detach()
    moved = (tracked - teacher.backbone.a.detach()).norm()
    assert moved > 0.01
    assert (rebuilt - tracked).norm() < 0.02 * moved
    with pytest.raises(CheckpointError, match="cannot be rebuilt safely at this width. Got: 0.2"):
        fewstep.load(run.path, weights="std=0.2", network=teacher)
    with pytest.raises(CheckpointError, match="is not a number"):
        fewstep.load(run.path, weights="std=wide", network=teacher)


def test_too_few_snapshots(tmp_path: Path) -> None:
    teacher = Denoiser(Line(), EDM(), Parametrization(), sample_shape=(2,))
    settings = {"images": 128, "batch_size": 64, "eval.samples": 0, "output.sample_images": 0}
    run = fewstep.tune(teacher, "gaussians8", out=tmp_path / "run", recipe="points", overrides=settings, device="cpu")
    with pytest.raises(CheckpointError, match="too few snapshots"):
        fewstep.load(run.path, weights="std=0.05", network=teacher)
